//! The exchange without sockets and clocks: what members publish goes in, what receivers must be sent comes out.
//!
//! Receivers with the same interest form a class ([`classes`]). A receiver has, per origin, the ids that are dirty, and no queue
//! of messages: a slow one is sent the newest state once. A batch is made at one revision, so that a receiver always has a state
//! that the origin had.

mod batches;
mod claims;
mod classes;
mod derived;
mod evaluation;
mod exchange;
mod federation;
mod interests;
mod objects;
mod opening;
pub mod origin;
mod publish;
mod publisher;
mod receiver;
mod recent;
pub mod selections;
pub mod slots;
mod views;
mod watch;

pub use evaluation::{Evaluated, Evaluation};
pub use exchange::Exchange;
pub use opening::{ReadOpening, ReadRequest};
pub use publish::{PublishError, Published};
pub use publisher::PublishId;
pub use receiver::ReceiverId;
pub use watch::{Next, ReceiverState, WatchError};
