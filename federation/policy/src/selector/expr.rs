//! Expressions, and their value over labels.

use std::fmt::Write as _;
use std::sync::Arc;

use crate::tri::Tri;

/// The syntax tree. A chain of one operator is one node; two-word spellings and doubled `!` are normalised by the parser.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expr {
    All,
    /// True by itself; in a namespace selector it means "has no namespace".
    Global,
    Has(Arc<str>),
    Equal(Arc<str>, Arc<str>),
    NotEqual(Arc<str>, Arc<str>),
    Contains(Arc<str>, Arc<str>),
    StartsWith(Arc<str>, Arc<str>),
    EndsWith(Arc<str>, Arc<str>),
    /// Sorted, without duplicates.
    In(Arc<str>, Arc<[Arc<str>]>),
    /// Sorted, without duplicates.
    NotIn(Arc<str>, Arc<[Arc<str>]>),
    Not(Arc<Expr>),
    And(Arc<[Expr]>),
    Or(Arc<[Expr]>),
}

/// What is known of one label of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Label<'a> {
    Present(&'a str),
    Absent,
    /// It is there, and its value is not known.
    Some,
    /// Its origin may not set this key, so neither its value nor its absence says anything.
    Unknown,
}

/// Labels that an expression can be evaluated over.
pub trait LabelLookup {
    fn label(&self, key: &str) -> Label<'_>;
}

impl LabelLookup for std::collections::BTreeMap<Arc<str>, Arc<str>> {
    fn label(&self, key: &str) -> Label<'_> {
        self.get(key).map_or(Label::Absent, |value| Label::Present(value))
    }
}

impl LabelLookup for std::collections::BTreeMap<String, String> {
    fn label(&self, key: &str) -> Label<'_> {
        self.get(key).map_or(Label::Absent, |value| Label::Present(value))
    }
}

impl Expr {
    /// The value over `labels`. Every comparison with an unknown label, or an unknown value, is unknown, and negation keeps it
    /// so; a missing label makes `!=` and `not in` true and every other comparison false.
    pub fn evaluate<L: LabelLookup + ?Sized>(&self, labels: &L) -> Tri {
        let compare = |key: &str, absent: bool, present: &dyn Fn(&str) -> bool| match labels.label(key) {
            Label::Present(value) => Tri::from(present(value)),
            Label::Absent => Tri::from(absent),
            Label::Some | Label::Unknown => Tri::Unknown,
        };
        let holds = |values: &[Arc<str>], value: &str| values.binary_search_by(|have| (**have).cmp(value)).is_ok();
        match self {
            Self::All | Self::Global => Tri::Yes,
            Self::Has(key) => match labels.label(key) {
                Label::Present(_) | Label::Some => Tri::Yes,
                Label::Absent => Tri::No,
                Label::Unknown => Tri::Unknown,
            },
            Self::Equal(key, wanted) => compare(key, false, &|value| value == &**wanted),
            Self::NotEqual(key, wanted) => compare(key, true, &|value| value != &**wanted),
            Self::Contains(key, part) => compare(key, false, &|value| value.contains(&**part)),
            Self::StartsWith(key, part) => compare(key, false, &|value| value.starts_with(&**part)),
            Self::EndsWith(key, part) => compare(key, false, &|value| value.ends_with(&**part)),
            Self::In(key, values) => compare(key, false, &|value| holds(values, value)),
            Self::NotIn(key, values) => compare(key, true, &|value| !holds(values, value)),
            Self::Not(inner) => !inner.evaluate(labels),
            Self::And(parts) => {
                let mut all = Tri::Yes;
                for part in parts.iter() {
                    all = all.and(part.evaluate(labels));
                    if all == Tri::No {
                        break;
                    }
                }
                all
            }
            Self::Or(parts) => {
                let mut any = Tri::No;
                for part in parts.iter() {
                    any = any.or(part.evaluate(labels));
                    if any == Tri::Yes {
                        break;
                    }
                }
                any
            }
        }
    }

    /// Calls `visit` with every label key that the expression names.
    pub fn for_each_key<'a>(&'a self, visit: &mut impl FnMut(&'a Arc<str>)) {
        match self {
            Self::All | Self::Global => {}
            Self::Has(key)
            | Self::Equal(key, _)
            | Self::NotEqual(key, _)
            | Self::Contains(key, _)
            | Self::StartsWith(key, _)
            | Self::EndsWith(key, _)
            | Self::In(key, _)
            | Self::NotIn(key, _) => visit(key),
            Self::Not(inner) => inner.for_each_key(visit),
            Self::And(parts) | Self::Or(parts) => parts.iter().for_each(|part| part.for_each_key(visit)),
        }
    }

    fn write(&self, out: &mut String) {
        let quoted = |out: &mut String, text: &str| {
            let quote = if text.contains('"') { '\'' } else { '"' };
            out.extend([quote]);
            out.push_str(text);
            out.extend([quote]);
        };
        let comparison = |out: &mut String, key: &str, operator: &str, value: &str| {
            let _ = write!(out, "{key} {operator} ");
            quoted(out, value);
        };
        let membership = |out: &mut String, key: &str, operator: &str, values: &[Arc<str>]| {
            let _ = write!(out, "{key} {operator} {{");
            for (at, value) in values.iter().enumerate() {
                out.push_str(if at == 0 { "" } else { ", " });
                quoted(out, value);
            }
            out.push('}');
        };
        let chain = |out: &mut String, parts: &[Self], operator: &str| {
            out.push('(');
            for (at, part) in parts.iter().enumerate() {
                out.push_str(if at == 0 { "" } else { operator });
                part.write(out);
            }
            out.push(')');
        };
        match self {
            Self::All => out.push_str("all()"),
            Self::Global => out.push_str("global()"),
            Self::Has(key) => {
                let _ = write!(out, "has({key})");
            }
            Self::Equal(key, value) => comparison(out, key, "==", value),
            Self::NotEqual(key, value) => comparison(out, key, "!=", value),
            Self::Contains(key, value) => comparison(out, key, "contains", value),
            Self::StartsWith(key, value) => comparison(out, key, "starts with", value),
            Self::EndsWith(key, value) => comparison(out, key, "ends with", value),
            Self::In(key, values) => membership(out, key, "in", values),
            Self::NotIn(key, values) => membership(out, key, "not in", values),
            Self::Not(inner) => {
                out.push('!');
                inner.write(out);
            }
            Self::And(parts) => chain(out, parts, " && "),
            Self::Or(parts) => chain(out, parts, " || "),
        }
    }
}

/// The canonical form.
impl std::fmt::Display for Expr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = String::new();
        self.write(&mut out);
        f.write_str(&out)
    }
}
