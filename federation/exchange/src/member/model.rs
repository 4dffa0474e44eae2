//! What a member receives, as changes of an inventory.

use std::sync::Arc;

use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind, Inventory, Labels, Namespace};
use hanse_policy::model::ClusterName;

pub use crate::interest::Wanted;
pub use crate::model::{ClusterRecord, Lease, Manifest, ManifestKind, Position, digest_of};

/// One change of what was received. `None`: removed.
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

/// Changes that take effect together, and the hub's position that the policies in force then come from.
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
