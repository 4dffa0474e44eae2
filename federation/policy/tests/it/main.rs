//! The policy crate from outside.

mod diff;
mod evaluator;
mod lint;
mod selectors;
mod unknown;
mod worlds;
