//! Clusters in network namespaces, for the demo and for tests that inspect packets.
//!
//! Every node and pod is a network namespace of its own, joined by veth pairs and plain routes, without bridges, IPv4
//! and IPv6 alike. All of it is made inside a [`sandbox`], so that the machine's own network is never touched and
//! nothing is left when the process ends, however it ends.
//!
//! This crate only makes networks, starts processes and sends packets; what should pass is for policy to say.

pub mod deployment;
pub mod enforcement;
pub mod expectation;
pub mod fabric;
pub mod federation;
pub mod go;
pub mod kubernetes;
pub mod matrix;
pub mod namespace;
pub mod packet;
pub mod probe;
pub mod process;
pub mod sandbox;
pub mod world;
