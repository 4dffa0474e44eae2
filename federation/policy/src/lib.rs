//! Clusters, selectors, tiers and policies, and the reference evaluator that everything else must agree with.
//!
//! Every policy API is a conversion into [`model`] (in `federation/api`). Pure: no I/O, no clock.

pub mod diff;
pub mod evaluate;
pub mod evaluator;
pub mod explain;
pub mod indexed;
pub mod inventory;
pub mod lint;
pub mod model;
mod outline;
pub mod placement;
pub mod prepared;
pub mod selector;
pub mod slab;
pub mod tri;
pub mod workload;
