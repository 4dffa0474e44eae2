//! Manifests of every kind that Hanse reads, and their conversion into the policy model.
//!
//! [`manifest::read_dir`] and [`manifest::read_bytes`] turn files into typed, validated [`manifest::Object`]s; what
//! cannot be understood becomes a [`manifest::Diagnostic`] with file, line and field, and never hides its neighbours.
//! [`assemble`] turns the objects of one cluster, or of the federation, into inventory and policies. Wire types stop here.
//!
//! No clock, no network; files are touched in `manifest::read_dir` alone.

pub mod address;
pub mod admin_network_policy;
pub mod assemble;
pub mod calico;
pub mod cluster_network_policy;
pub mod clusters;
pub mod decode;
pub mod diagnostic;
pub mod document;
pub mod federated;
pub mod field;
pub mod files;
pub mod hanse;
pub mod inventory;
pub mod kind;
pub mod kubernetes;
pub mod label_selector;
pub mod limits;
pub mod manifest;
pub mod metadata;
pub mod names;
pub mod network_policy;
pub mod object;
pub mod policy;
pub mod policy_fields;
pub mod rule;
mod schema;
pub mod shared;
pub mod stored;
pub mod strict;
mod unreadable;
pub mod workload;

pub use assemble::planned::{Offline, assemble_offline};
pub use assemble::{Federation, assemble_cluster, assemble_federation};
pub use diagnostic::{Diagnostic, NotObject, SourceLocation};
pub use manifest::{Manifest, Manifests, Skipped, read_bytes, read_dir};
pub use object::Object;
