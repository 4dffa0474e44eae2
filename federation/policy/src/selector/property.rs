//! Properties of parsing that must be true for every text, for the fuzz target and the tests.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::canonical::Selector;
use super::expr::{Label, LabelLookup};
use crate::tri::Tri;

/// Every label has this value.
struct Everywhere(Label<'static>);

impl LabelLookup for Everywhere {
    fn label(&self, _: &str) -> Label<'_> {
        self.0
    }
}

/// Panics where a text shows the parser wrong.
///
/// An error names a place in the text, or its end. What is read has a canonical form that reads back, means the same over
/// labels that the text is about, and is its own canonical form from the second reading on (the first collapses `!`
/// around parentheses).
pub fn holds_of(text: &str) {
    let selector = match Selector::parse(text) {
        Ok(selector) => selector,
        Err(error) => {
            let at = error.column.checked_sub(1).expect("columns count from 1");
            assert!(at <= text.len() && text.is_char_boundary(at), "{text:?}: {error}");
            return;
        }
    };
    let again = Selector::parse(&selector.canonical).unwrap_or_else(|error| panic!("{text:?}: {selector}: {error}"));
    let third = Selector::parse(&again.canonical).unwrap_or_else(|error| panic!("{text:?}: {again}: {error}"));
    assert_eq!(again.canonical, third.canonical, "{text:?}");
    let values = ["", "a", "b'\""].map(Label::Present);
    for label in [Label::Absent, Label::Some, Label::Unknown].into_iter().chain(values) {
        let labels = Everywhere(label);
        assert_eq!(selector.evaluate(&labels), again.evaluate(&labels), "{text:?}, every label {label:?}");
    }
    // Of `!(!a)` the form is `!!a`, which reads as `a`: so the language has it.
    if !selector.canonical.contains("!!") {
        assert_eq!((&again.canonical, again.id()), (&selector.canonical, selector.id()), "{text:?}");
    }
    let mut labels = BTreeMap::<Arc<str>, Arc<str>>::new();
    let same = |labels: &BTreeMap<Arc<str>, Arc<str>>| {
        let value = selector.evaluate(labels);
        assert_ne!(value, Tri::Unknown, "{text:?}: every label is known");
        assert_eq!(value, again.evaluate(labels), "{text:?} over {labels:?}");
    };
    same(&labels);
    // Labels one after another: the parts of a selector meet more than all or none of them.
    selector.expr.for_each_key(&mut |key| {
        labels.insert(key.clone(), key.clone());
        same(&labels);
    });
}
