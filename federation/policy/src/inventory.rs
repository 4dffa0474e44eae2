//! What policy is judged against: clusters, namespaces, endpoints, network sets and services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::ClusterName;

pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// Which label keys an origin may set. A key outside is *unknown* on its objects, not absent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LabelGrant {
    #[default]
    All,
    Keys(BTreeSet<Arc<str>>),
}

/// One cluster as its policies and those of the federation see it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Cluster {
    /// Set at the hub only.
    pub labels: Labels,
    pub label_grant: LabelGrant,
    /// Its lease has ended: every selector answers unknown for each of its endpoints.
    pub stale: bool,
    /// A federated Allow is final here, instead of leaving to the local tiers.
    pub federated_allow_final: bool,
    pub namespaces: BTreeMap<Arc<str>, Namespace>,
    pub service_accounts: BTreeMap<(Arc<str>, Arc<str>), Labels>,
    pub endpoints: BTreeMap<EndpointId, Endpoint>,
    pub services: BTreeMap<(Arc<str>, Arc<str>), Service>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Namespace {
    /// As stored; `kubernetes.io/metadata.name` is added by the API server and by our sources.
    pub labels: Labels,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EndpointKind {
    Pod,
    /// NetworkSet (with a namespace) or GlobalNetworkSet and FederatedNetworkSet (without).
    NetworkSet,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId {
    pub kind: EndpointKind,
    pub namespace: Option<Arc<str>>,
    pub name: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPort {
    pub name: Arc<str>,
    pub protocol: u8,
    pub port: u16,
}

/// Whatever a selector can match: a pod that owns addresses, or a network set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its own labels, as written. Effective labels add the namespace's under `pcns.`, the account's under `pcsa.`, and
    /// `projectcalico.org/{namespace,serviceaccount,orchestrator}`; own labels of those names are dropped first.
    pub labels: Labels,
    pub service_account: Option<Arc<str>>,
    /// A pod's addresses, the primary first; empty for a pod that ended, has none yet, or is on the host's network.
    pub addresses: Vec<IpAddr>,
    /// A network set's nets.
    pub nets: Vec<IpNet>,
    pub ports: Vec<NamedPort>,
    pub node: Option<Arc<str>>,
    /// Shares its node's addresses, and is selected by nothing.
    pub host_network: bool,
}

/// A service with its backends, for `services` matches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    pub backends: BTreeSet<(IpAddr, u8, u16)>,
}

/// The whole ClusterSet, as far as it is known here.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Inventory {
    pub clusters: BTreeMap<ClusterName, Cluster>,
    /// FederatedNetworkSets: of no cluster, matched within [`crate::model::ClusterScope::All`].
    pub federated_sets: BTreeMap<EndpointId, Endpoint>,
}
