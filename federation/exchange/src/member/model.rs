//! What is received, in the words of the policy model.

use std::collections::BTreeSet;
use std::sync::Arc;

pub use crate::interest::Wanted;
use bytes::Bytes;
use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind, Inventory, LabelGrant, Labels, Namespace};
use hanse_policy::model::ClusterName;
use ipnet::IpNet;

/// A position in what one origin publishes; both numbers are the publisher's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    pub epoch: u64,
    pub revision: u64,
}

/// What is known of a cluster's lease. Only the hub ends one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// The hub has never heard it.
    NeverHeard,
    Live,
    /// Its endpoints are unknown to every selector.
    Stale {
        /// How long it had been silent when the hub said so, by the hub's clock.
        silent_ms: u64,
    },
}

/// A cluster as all members see it.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterRecord {
    pub labels: Labels,
    pub label_grant: LabelGrant,
    /// The nets that its endpoints' addresses come from.
    pub cidrs: Vec<IpNet>,
    pub lease: Lease,
    pub federated_allow_final: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ManifestKind {
    Policy,
    Tier,
    NetworkSet,
}

/// A federated object that is in force.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// As its author wrote it.
    pub json: Bytes,
    pub enforcers: BTreeSet<ClusterName>,
    /// What its cluster selectors select: expressions as written, and names.
    pub resolved: Vec<(Arc<str>, BTreeSet<ClusterName>)>,
    /// What it needs and this version does not have.
    pub features: Vec<String>,
}

/// One change of what is known. `None` is: gone.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Cluster {
        name: ClusterName,
        record: Option<ClusterRecord>,
    },
    /// The cluster left or was revoked: everything of it is gone.
    Withdrawn {
        name: ClusterName,
    },
    Namespace {
        cluster: ClusterName,
        name: Arc<str>,
        labels: Option<Labels>,
    },
    ServiceAccount {
        cluster: ClusterName,
        namespace: Arc<str>,
        name: Arc<str>,
        labels: Option<Labels>,
    },
    Endpoint {
        cluster: ClusterName,
        id: EndpointId,
        endpoint: Option<Endpoint>,
    },
    Manifest {
        kind: ManifestKind,
        name: Arc<str>,
        manifest: Option<Manifest>,
    },
}

/// Changes that count together, and the hub's position that the policies in force then come from.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Updates {
    pub changes: Vec<Change>,
    pub in_force: Position,
}

impl Change {
    /// Brings an inventory up to date. Manifests are left to the caller, who converts them into policy.
    pub fn apply(&self, inventory: &mut Inventory) {
        match self {
            Self::Cluster { name, record: Some(record) } => {
                let cluster = inventory.clusters.entry(name.clone()).or_default();
                cluster.labels.clone_from(&record.labels);
                cluster.label_grant.clone_from(&record.label_grant);
                cluster.stale = matches!(record.lease, Lease::Stale { .. });
                cluster.federated_allow_final = record.federated_allow_final;
            }
            Self::Cluster { name, record: None } | Self::Withdrawn { name } => drop(inventory.clusters.remove(name)),
            Self::Namespace { cluster, name, labels } => {
                let namespaces = &mut inventory.clusters.entry(cluster.clone()).or_default().namespaces;
                match labels {
                    Some(labels) => drop(namespaces.insert(name.clone(), Namespace { labels: labels.clone() })),
                    None => drop(namespaces.remove(name)),
                }
            }
            Self::ServiceAccount { cluster, namespace, name, labels } => {
                let accounts = &mut inventory.clusters.entry(cluster.clone()).or_default().service_accounts;
                let key = (namespace.clone(), name.clone());
                match labels {
                    Some(labels) => drop(accounts.insert(key, labels.clone())),
                    None => drop(accounts.remove(&key)),
                }
            }
            Self::Endpoint { cluster, id, endpoint } => {
                let endpoints = &mut inventory.clusters.entry(cluster.clone()).or_default().endpoints;
                match endpoint {
                    Some(endpoint) => drop(endpoints.insert(id.clone(), endpoint.clone())),
                    None => drop(endpoints.remove(id)),
                }
            }
            Self::Manifest { .. } => {}
        }
    }
}

/// A pod's id.
pub fn pod(namespace: Arc<str>, name: Arc<str>) -> EndpointId {
    EndpointId { kind: EndpointKind::Pod, namespace: Some(namespace), name }
}

/// The digest of one object: see the wire's description.
pub fn digest_of(bytes: &[u8]) -> u128 {
    let mut first = [0; 16];
    first.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    u128::from_le_bytes(first)
}
