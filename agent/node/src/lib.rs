//! hanse-agent: enforces one node's rule sets.
//!
//! It holds one rule set at a time, keeps it in the kernel and in a checksummed file, and follows its member. What is in
//! force stays so when the agent stops, crashes, or has nobody to talk to. It decides nothing, and tells what the kernel
//! decided.

// What others wrote is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod enforcer;
pub mod flows;
pub mod identity;
pub mod pod_ranges;
pub mod snapshot;
pub mod status;
pub mod sync;
pub mod uplinks;
