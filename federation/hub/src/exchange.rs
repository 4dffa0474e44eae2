//! The exchange: members publish endpoints, receivers are sent those that their policies can select, with the policies.
//!
//! [`core`] decides, without sockets, clocks and randomness; [`origin`] holds what one cluster publishes; [`select`] finds
//! the selections that labels satisfy; [`wire`] converts. What it holds of endpoints is in memory only: a hub that restarts
//! counts an origin as not yet synced until it has published again, and tells nobody that anything is gone.

pub mod core;
pub mod derive;
pub mod model;
pub mod origin;
mod progress;
pub mod select;
pub mod service;
mod speakers;
pub mod wire;
