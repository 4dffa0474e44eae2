//! Which labels an expression needs to be true, for indexes that find the selectors of given labels.
//!
//! Valid for known labels only: if a label may be unknown, its absence does not exclude a match.

use std::sync::Arc;

use super::expr::Expr;

/// A label key, with its value unless any will do.
pub type Need<'e> = (&'e Arc<str>, Option<&'e Arc<str>>);

/// Labels of which at least one must be present for the expression to be true; `None` where it can be true without any.
/// Of several such lists the one of least `cost`.
pub fn one_of<'e, C: Ord>(expr: &'e Expr, cost: &impl Fn(&[Need<'e>]) -> C) -> Option<Vec<Need<'e>>> {
    one_of_signed(expr, false, cost)
}

fn one_of_signed<'e, C: Ord>(expr: &'e Expr, negated: bool, cost: &impl Fn(&[Need<'e>]) -> C) -> Option<Vec<Need<'e>>> {
    match (expr, negated) {
        (Expr::Not(inner), _) => one_of_signed(inner, !negated, cost),
        // Nothing makes these true.
        (Expr::All | Expr::Global, true) => Some(Vec::new()),
        (Expr::Equal(key, value), false) | (Expr::NotEqual(key, value), true) => Some(vec![(key, Some(value))]),
        (Expr::In(key, values), false) | (Expr::NotIn(key, values), true) => {
            Some(values.iter().map(|value| (key, Some(value))).collect())
        }
        (Expr::Has(key) | Expr::Contains(key, _) | Expr::StartsWith(key, _) | Expr::EndsWith(key, _), false) => {
            Some(vec![(key, None)])
        }
        (Expr::And(parts), false) | (Expr::Or(parts), true) => {
            let lists = parts.iter().filter_map(|part| one_of_signed(part, negated, cost));
            lists.min_by_key(|list| cost(list))
        }
        (Expr::Or(parts), false) | (Expr::And(parts), true) => {
            let lists: Option<Vec<_>> = parts.iter().map(|part| one_of_signed(part, negated, cost)).collect();
            Some(lists?.into_iter().flatten().collect())
        }
        _ => None,
    }
}

/// Labels each of which must be present for the expression to be true; not all of them are found.
pub fn every(expr: &Expr) -> Vec<Need<'_>> {
    match expr {
        Expr::Equal(key, value) => vec![(key, Some(value))],
        Expr::In(key, values) => vec![(key, if values.len() == 1 { values.first() } else { None })],
        Expr::Has(key) | Expr::Contains(key, _) | Expr::StartsWith(key, _) | Expr::EndsWith(key, _) => {
            vec![(key, None)]
        }
        Expr::And(parts) => parts.iter().flat_map(every).collect(),
        Expr::All | Expr::Global | Expr::NotEqual(..) | Expr::NotIn(..) | Expr::Not(_) | Expr::Or(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::selector::Selector;
    use crate::tri::Tri;

    const EXPRESSIONS: [&str; 16] = [
        "all()",
        "!all()",
        "a == '1'",
        "a != '1'",
        "!(a != '1')",
        "a in {'1', '2'}",
        "a not in {'1', '2'}",
        "has(b)",
        "!has(b)",
        "a contains '1'",
        "a == '1' && b == '2'",
        "a == '1' || c == '3'",
        "a == '1' || !has(c)",
        "!(a != '1' || !has(b))",
        "!(a != '1' && b not in {'2'})",
        "b starts with '2' && (has(a) || has(c)) && c != '1'",
    ];

    /// Over every combination of three labels: where an expression is true, one of its needs, and every other, is there.
    #[test]
    fn true_selector_has_its_required_labels() {
        for text in EXPRESSIONS {
            let expr = Selector::parse(text).expect("a selector").expr;
            let mut indexed = 0;
            for bits in 0..64 {
                let value = |at: u32| bits / 4_u32.pow(at) % 4;
                let pairs = ["a", "b", "c"].into_iter().zip(0..).filter(|(_, at)| value(*at) > 0);
                let labels: BTreeMap<Arc<str>, Arc<str>> =
                    pairs.map(|(key, at)| (key.into(), value(at).to_string().into())).collect();
                let present = |(key, value): &Need<'_>| {
                    labels.get(*key).is_some_and(|have| value.is_none_or(|value| value == have))
                };
                let some = one_of(&expr, &|list| list.len());
                let excluded = some.as_ref().is_some_and(|list| !list.iter().any(present));
                indexed += usize::from(excluded);
                if expr.evaluate(&labels) == Tri::Yes {
                    assert!(!excluded, "{text} over {labels:?}: {some:?}");
                    assert!(every(&expr).iter().all(present), "{text} over {labels:?}");
                }
            }
            let may_be_empty = expr.evaluate(&BTreeMap::<Arc<str>, Arc<str>>::new()) == Tri::Yes;
            assert_eq!(indexed == 0, may_be_empty, "{text}: only what holds without labels has no needs");
        }
    }
}
