//! Policies and inventory in, per-node rule sets and a report out.
//!
//! Pure and deterministic: the same input gives the same bytes. [`whole::compile`] compiles from nothing.

pub mod whole;

pub use whole::{Compiled, Input, PolicyReport, compile};
