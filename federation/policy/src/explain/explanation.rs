//! The outcomes of policy for one packet.

use super::answer::AnswerLine;
use crate::evaluate::Answer;

/// What is enforced, and what would be if every staged policy were committed; `None` when none is staged.
#[derive(Debug)]
pub struct Explanation {
    pub enforced: Answer,
    pub pending: Option<Answer>,
    pub(super) form: &'static str,
}

impl Explanation {
    /// By a prepared form of the evaluator.
    pub fn new(enforced: Answer, pending: Option<Answer>) -> Self {
        Self { enforced, pending, form: "prepared" }
    }

    /// As it is printed.
    pub fn line(&self) -> AnswerLine<'_> {
        AnswerLine::new(&self.enforced, self.pending.as_ref(), self.form)
    }
}
