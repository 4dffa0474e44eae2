//! Selectors: expressions with their canonical form.

use std::sync::Arc;

use base64::Engine as _;
use sha2::{Digest as _, Sha224};

use super::expr::{Expr, LabelLookup};
use super::parse::{SyntaxError, parse};
use crate::tri::Tri;

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
        parse(text).map(Self::from)
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
