//! Likely mistakes in policies.
//!
//! Findings cover the clusters that were read. They do not prove that policy is safe. A rule is reported as shadowed, or as
//! one that never matches, only where [`imply`] proves it.
//!
//! Conversion may split a rule of a source object into several rules. They are checked together: a rule with several peers is shadowed
//! if all of its parts are.

mod check;
mod defaults;
mod dns;
mod facts;
pub mod imply;
mod pitfalls;
mod ports;
mod rules;
mod run;
mod services;
mod shadowed;
mod ties;

pub use check::*;
pub use facts::without_pods;
pub use run::{lint, rules_left_out};
