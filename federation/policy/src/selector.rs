//! The selector language of Calico v3, to the byte.
//!
//! [`Selector::parse`] reads an expression, [`Selector::canonical`] and [`Selector::id`] name it as Calico does, and
//! [`Expr::evaluate`] gives its value over labels of which some may be unknown. [`build`] makes the expressions that
//! conversions need (namespace scope, account names, Kubernetes label selectors).
//!
//! Parentheses keep their place in the tree: `(a && b) && c` and `a && b && c` mean the same and have
//! different canonical forms, as in Calico. So has `!(!a)`, whose canonical form `!!a` reads back as `a`.

use std::fmt::Write as _;
use std::sync::Arc;

use base64::Engine as _;
use sha2::{Digest as _, Sha224};

use crate::tri::Tri;

pub mod build;
pub mod needs;
mod parse;
pub mod property;

pub use parse::{MAX_LABEL_BYTES, MAX_NESTING, SyntaxError};

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

/// An expression with its canonical form. Equality, order and hash are those of the canonical form.
#[derive(Debug, Clone)]
pub struct Selector {
    pub expr: Expr,
    pub canonical: Arc<str>,
    /// The fields of the policy that it was derived from, behind their place in a rule: for people, and of no other effect.
    written: Option<Arc<str>>,
}

impl Selector {
    /// Reads an expression; empty or blank is `all()`.
    pub fn parse(text: &str) -> Result<Self, SyntaxError> {
        parse::parse(text).map(Self::from)
    }

    pub fn all() -> Self {
        Self::from(Expr::All)
    }

    /// The same selector, derived from these fields of a policy.
    pub fn with_written(self, written: impl Into<Arc<str>>) -> Self {
        Self { written: Some(written.into()), ..self }
    }

    /// What people wrote: the fields that it was derived from, or else the canonical form.
    pub fn shown(&self) -> &str {
        self.written.as_deref().unwrap_or(&self.canonical)
    }

    /// Calico's identifier: `s:` and the unpadded URL-safe base64 of SHA-224 over `s:` and the canonical form.
    pub fn id(&self) -> String {
        let hash = Sha224::new().chain_update("s:").chain_update(self.canonical.as_bytes()).finalize();
        format!("s:{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(hash))
    }

    pub fn evaluate<L: LabelLookup + ?Sized>(&self, labels: &L) -> Tri {
        self.expr.evaluate(labels)
    }
}

impl From<Expr> for Selector {
    fn from(expr: Expr) -> Self {
        let canonical = expr.to_string().into();
        Self { expr, canonical, written: None }
    }
}

impl std::str::FromStr for Selector {
    type Err = SyntaxError;

    fn from_str(text: &str) -> Result<Self, SyntaxError> {
        Self::parse(text)
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.canonical)
    }
}

impl PartialEq for Selector {
    fn eq(&self, other: &Self) -> bool {
        self.canonical == other.canonical
    }
}

impl Eq for Selector {}

impl PartialOrd for Selector {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Selector {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.canonical.cmp(&other.canonical)
    }
}

impl std::hash::Hash for Selector {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.canonical.hash(state);
    }
}
