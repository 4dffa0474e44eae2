//! `hanse policy explain`, whoever answers it: questions as they are written, the packets that they ask about, and answers as
//! they are printed.

pub mod answer;
pub mod question;

pub use answer::AnswerLine;
pub use question::{Owners, Place, ProtocolName, Question, QuestionError, has_ports, protocol_name};

use std::net::IpAddr;

use crate::evaluate::{Answer, End, Query, View, evaluate};
use crate::inventory::Inventory;
use crate::model::{ClusterName, PolicySet};
use crate::prepared::Prepared;

/// Policies and an inventory, ready to be asked.
#[derive(Debug)]
pub struct Explainer<'a> {
    policies: &'a PolicySet,
    inventory: &'a Inventory,
    owners: Owners<'a>,
    enforced: Prepared<'a>,
    /// When something is staged.
    pending: Option<Prepared<'a>>,
    reference: bool,
}

/// What is enforced, and what would be if every staged policy were committed; `None` when none is staged.
#[derive(Debug)]
pub struct Explanation {
    pub enforced: Answer,
    pub pending: Option<Answer>,
    form: &'static str,
}

impl Explanation {
    /// As it is printed.
    pub fn line(&self) -> AnswerLine<'_> {
        AnswerLine::new(&self.enforced, self.pending.as_ref(), self.form)
    }
}

impl<'a> Explainer<'a> {
    pub fn new(policies: &'a PolicySet, inventory: &'a Inventory) -> Self {
        Self {
            policies,
            inventory,
            owners: Owners::new(inventory),
            enforced: Prepared::new(policies, inventory, View::Enforced),
            pending: policies.has_staged().then(|| Prepared::new(policies, inventory, View::Pending)),
            reference: false,
        }
    }

    /// Looks everything up anew for each question. The answers are the same.
    pub fn by_reference(self, reference: bool) -> Self {
        Self { reference, ..self }
    }

    pub fn has_staged(&self) -> bool {
        self.pending.is_some()
    }

    /// The packet that a question asks about.
    ///
    /// # Errors
    /// When the question names what is not there, or is no packet.
    pub fn packet(&self, question: &Question) -> Result<Query, QuestionError> {
        self.owners.packet(question)
    }

    /// # Errors
    /// When the question names what is not there, or is no packet.
    pub fn explain(&self, question: &Question) -> Result<Explanation, QuestionError> {
        Ok(self.explain_packet(&self.owners.packet(question)?))
    }

    /// An address as an end of a packet, with the pod that owns it: of several clusters' pods that of `prefer`.
    pub fn end(&self, address: IpAddr, prefer: &ClusterName) -> End {
        self.owners.of(address, prefer)
    }

    pub fn explain_packet(&self, packet: &Query) -> Explanation {
        let form = if self.reference { "reference" } else { "prepared" };
        let pending = self.pending.as_ref().map(|pending| self.ask(pending, packet, View::Pending));
        Explanation { enforced: self.ask(&self.enforced, packet, View::Enforced), pending, form }
    }

    fn ask(&self, prepared: &Prepared<'_>, packet: &Query, view: View) -> Answer {
        match self.reference {
            true => evaluate(self.policies, self.inventory, packet, view),
            false => prepared.evaluate(packet),
        }
    }
}
