//! The member's side: what its cluster publishes, and what it receives.
//!
//! Silence removes nothing: a member without a hub keeps what it has received.

pub mod model;
pub mod publisher;
pub mod receiver;
