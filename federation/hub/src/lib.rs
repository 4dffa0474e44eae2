//! hanse-hub: registry, trust, exchange and policy distribution of a ClusterSet.
//!
//! [`registry`] is the truth: registrations, grants, users, federated objects and leases, in one store, every change with
//! its audit record in one transaction. [`registration`] lets clusters join and renew, [`administration`] serves platform
//! teams, and the exchange relays what members publish. Endpoints are never in the store.

// What others wrote is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod administration;
pub mod admission;
pub mod archive;
pub mod authority;
pub mod backup;
pub mod custom_resources;
pub mod exchange;
pub mod grants;
pub mod initialise;
pub mod management;
pub mod manifest;
pub mod metrics;
pub mod operator;
pub mod questions;
mod registration;
pub mod registry;
pub mod roles;
pub mod sealed;
pub mod server;
pub mod status;
pub mod transfer;
mod volume;
