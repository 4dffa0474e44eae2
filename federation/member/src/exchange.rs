//! The member's side of the exchange over connections. Its state machines are in `hanse-exchange`.

pub mod client;

pub use hanse_exchange::member::{model, publisher, receiver};
