//! The exchange between hub and members: endpoints that clusters publish, and the policies that select them.
//!
//! [`hub`] and [`member`] are the two sides as state machines without sockets, clocks and randomness. Both use one [`codec`],
//! one set of [`limits`] and one derivation of interests ([`interest`]), so that each side can read what the other writes.
//! Connections, timers and files are in the crates of the hub and of the member.

pub mod codec;
pub mod hub;
pub mod hubs;
pub mod interest;
pub mod limits;
pub mod member;
pub mod message;
pub mod model;
