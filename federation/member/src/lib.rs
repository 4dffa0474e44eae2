//! hanse-member: one cluster's inventory, its hub streams, and the fan-out to its agents.

pub mod fanout;
pub mod registration;
