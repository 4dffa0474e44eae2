//! The context file of a user: where the hub is, and the files that the user authenticates with.
//!
//! `hanse-hub init` and `hanse user create` write it as JSON; `hanse` reads it as YAML or JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A context file. Paths are relative to the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Context {
    /// Addresses of the hub's replicas, `HOST:PORT`. They are tried in this order.
    pub hubs: Vec<String>,
    /// If set, the trust domain that `ca` must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<String>,
    /// The root certificate of the ClusterSet, PEM.
    pub ca: PathBuf,
    /// The user's certificate, PEM.
    pub certificate: PathBuf,
    /// The user's private key, PEM.
    pub key: PathBuf,
}
