//! hanse-agent: enforces one node's rule sets.
//!
//! It follows its member, and keeps one rule set in the dataplane and in a checksummed file. Rules stay in force when the agent stops,
//! crashes, or cannot reach its member. It makes no decisions, and reports those of the dataplane.

// Text of other programs is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod backend;
pub mod enforcer;
pub mod flows;
pub mod identity;
pub mod metrics;
pub mod pod_ranges;
mod prober;
pub mod reviews;
pub mod snapshot;
pub mod status;
pub mod sync;
