//! The exchange over connections: members publish endpoints, receivers are sent those that their policies can select, with
//! the policies. Its state machine is in `hanse-exchange`.
//!
//! [`service`] serves streams, [`derive`] converts the registry into the exchange's view of it. Endpoints are in memory only:
//! a hub that restarts counts an origin as not yet synced until it has published again, and reports nothing as removed.

mod admission;
pub mod derive;
mod liveness;
mod mutex;
mod processes;
mod progress;
pub mod report;
pub mod service;
