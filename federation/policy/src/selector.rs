//! The selector language of Calico v3, to the byte.

use std::sync::Arc;

/// The syntax tree. Chains are flat; two-word spellings and doubled `!` are normalised by the parser.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expr {
    All,
    /// True wherever it stands by itself; in a namespace selector it means "has no namespace".
    Global,
    Has(Arc<str>),
    Equal(Arc<str>, Arc<str>),
    NotEqual(Arc<str>, Arc<str>),
    Contains(Arc<str>, Arc<str>),
    StartsWith(Arc<str>, Arc<str>),
    EndsWith(Arc<str>, Arc<str>),
    /// Sorted, without doubles.
    In(Arc<str>, Arc<[Arc<str>]>),
    NotIn(Arc<str>, Arc<[Arc<str>]>),
    Not(Arc<Expr>),
    And(Arc<[Expr]>),
    Or(Arc<[Expr]>),
}

/// A parsed selector with its canonical form. Equality, order and hash are those of the canonical form.
#[derive(Debug, Clone)]
pub struct Selector {
    pub expr: Expr,
    pub canonical: Arc<str>,
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
