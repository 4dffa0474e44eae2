//! The member's side of the exchange: what this cluster publishes, and what it receives.
//!
//! [`publisher`] and [`receiver`] decide, without sockets, clocks and randomness; [`client`] runs them over connections to
//! the hub's replicas and keeps their snapshots on disk. A member without a hub goes on with what it holds: nothing here
//! removes anything because of silence.

pub mod client;
pub mod model;
pub mod publisher;
pub mod receiver;
pub mod wire;
