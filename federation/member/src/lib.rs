//! hanse-member: one cluster's inventory, its hub streams, and the fan-out to its agents.

// What others wrote is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod agent_service;
pub mod api_server;
pub mod exchange;
pub mod fanout;
pub mod federated;
pub mod flows;
pub mod hubs;
pub mod leadership;
pub mod live;
pub mod metrics;
pub mod node_taints;
mod outside_ranges;
pub mod own_streams;
pub mod process;
pub mod questions;
pub mod registration;
pub mod report;
pub mod resolver;
pub mod source;
pub mod state;
pub mod world;
