//! The compiler against the reference evaluator, and against itself from nothing.

mod differential;
mod evaluator;
mod incremental;
mod report;
mod shared;

#[path = "../../../policy/tests/it/worlds.rs"]
mod worlds;
