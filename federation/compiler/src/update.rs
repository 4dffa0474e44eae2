//! What can change in the state that is compiled.

use std::sync::Arc;

use hanse_policy::inventory::{Endpoint, EndpointId, LabelGrant, Labels, Namespace, Service};
use hanse_policy::model::{ClusterName, Policy, PolicyId, Tier, TierId};
use hanse_ruleset::NodeConfig;

/// What the hub, or the operator, says of a cluster as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClusterRecord {
    pub label_grant: LabelGrant,
    /// The lease has ended: every selector answers unknown for its endpoints. Says nothing of the local cluster.
    pub stale: bool,
    /// In the local cluster: a federated Allow is final, instead of leaving to the local tiers.
    pub federated_allow_final: bool,
}

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
    /// Of the phase in its id: Local is the local cluster's, the others are the federation's.
    Tier(Tier),
    RemoveTier(TierId),
    /// Those of other clusters are not held.
    Policy(Policy),
    RemovePolicy(PolicyId),
}
