//! What can change in the state that is compiled.

use std::sync::Arc;

use hanse_policy::indexed::ClusterRecord;
use hanse_policy::inventory::{Endpoint, EndpointId, Inventory, Labels, Namespace, Service};
use hanse_policy::model::{ClusterName, Policy, PolicyId, PolicySet, Tier, TierId};
use hanse_ruleset::NodeConfig;

/// One change of state. Objects of a cluster that has no record count as absent until it has one; the local cluster
/// always has one.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    Cluster {
        name: ClusterName,
        record: ClusterRecord,
    },
    /// Withdraws the cluster with all that is in it.
    RemoveCluster {
        name: ClusterName,
    },
    Namespace {
        cluster: ClusterName,
        name: Arc<str>,
        namespace: Namespace,
    },
    RemoveNamespace {
        cluster: ClusterName,
        name: Arc<str>,
    },
    ServiceAccount {
        cluster: ClusterName,
        namespace: Arc<str>,
        name: Arc<str>,
        labels: Labels,
    },
    RemoveServiceAccount {
        cluster: ClusterName,
        namespace: Arc<str>,
        name: Arc<str>,
    },
    /// A pod or a network set; `cluster: None` is a network set of the federation.
    Endpoint {
        cluster: Option<ClusterName>,
        id: EndpointId,
        endpoint: Endpoint,
    },
    RemoveEndpoint {
        cluster: Option<ClusterName>,
        id: EndpointId,
    },
    /// Of the local cluster: only its services can be matched.
    Service {
        namespace: Arc<str>,
        name: Arc<str>,
        service: Service,
    },
    RemoveService {
        namespace: Arc<str>,
        name: Arc<str>,
    },
    /// Of the local cluster.
    Node {
        name: Arc<str>,
        config: NodeConfig,
    },
    RemoveNode {
        name: Arc<str>,
    },
    /// A tier of the local cluster (phase Local) or of the federation (the other phases).
    Tier(Tier),
    RemoveTier(TierId),
    /// Policies of other clusters are ignored.
    Policy(Policy),
    RemovePolicy(PolicyId),
}

impl Update {
    /// What makes of the empty state of `local` all that policies and inventory say; its nodes aside.
    pub fn all_of(local: &ClusterName, policies: &PolicySet, inventory: &Inventory) -> Vec<Self> {
        let mut all = Vec::new();
        for (cluster, it) in &inventory.clusters {
            all.push(Self::Cluster { name: cluster.clone(), record: ClusterRecord::of(it) });
            all.extend(it.namespaces.iter().map(|(name, namespace)| Self::Namespace {
                cluster: cluster.clone(),
                name: name.clone(),
                namespace: namespace.clone(),
            }));
            all.extend(it.service_accounts.iter().map(|((namespace, name), labels)| Self::ServiceAccount {
                cluster: cluster.clone(),
                namespace: namespace.clone(),
                name: name.clone(),
                labels: labels.clone(),
            }));
        }
        let of_clusters = inventory.clusters.iter().map(|(name, it)| (Some(name), &it.endpoints));
        for (cluster, endpoints) in of_clusters.chain([(None, &inventory.federated_sets)]) {
            all.extend(endpoints.iter().map(|(id, endpoint)| Self::Endpoint {
                cluster: cluster.cloned(),
                id: id.clone(),
                endpoint: endpoint.clone(),
            }));
        }
        let own = inventory.clusters.get(local).into_iter().flat_map(|it| &it.services);
        all.extend(own.map(|((namespace, name), service)| Self::Service {
            namespace: namespace.clone(),
            name: name.clone(),
            service: service.clone(),
        }));
        for layer in [Some(&policies.federation), policies.clusters.get(local)].into_iter().flatten() {
            all.extend(layer.tiers.values().cloned().map(Self::Tier));
            all.extend(layer.policies.values().cloned().map(Self::Policy));
        }
        all
    }
}
