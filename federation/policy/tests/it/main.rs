//! The policy crate from outside.

mod evaluator;
mod selectors;
mod unknown;
mod worlds;
