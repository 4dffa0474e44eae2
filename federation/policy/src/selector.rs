//! The selector language of Calico v3, to the byte.
//!
//! [`Selector::parse`] reads an expression, [`Selector::canonical`] and [`Selector::id`] name it as Calico does, and
//! [`Expr::evaluate`] gives its value over labels of which some may be unknown. [`build`] makes the expressions that
//! conversions need (namespace scope, account names, Kubernetes label selectors).
//!
//! Parentheses keep their place in the tree: `(a && b) && c` and `a && b && c` mean the same and have
//! different canonical forms, as in Calico. So has `!(!a)`, whose canonical form `!!a` reads back as `a`.

pub mod build;
mod canonical;
mod expr;
pub mod needs;
mod parse;
pub mod property;

pub use canonical::Selector;
pub use expr::{Expr, Label, LabelLookup};
pub use parse::{MAX_LABEL_BYTES, MAX_NESTING, SyntaxError};
