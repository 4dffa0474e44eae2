//! The one internal model of policy.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;

use crate::selector::Selector;

/// A cluster's name in its ClusterSet: a DNS label.
pub type ClusterName = Arc<str>;

/// The clusters whose endpoints a selection can match. Cluster selectors are already resolved to names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClusterScope {
    /// The cluster that enforces the policy.
    Local,
    /// Every cluster of the ClusterSet, its workloads; and the enforcing cluster's own network sets and the federated ones.
    All,
    /// The workloads of these clusters, and no network sets.
    Named(BTreeSet<ClusterName>),
}

/// A set of workloads: a selector over effective labels (see [`crate::inventory`]) within a scope of clusters. Namespace
/// and account scope are part of the selector: `projectcalico.org/namespace`, `pcns.…`, `projectcalico.org/serviceaccount`,
/// `pcsa.…`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selection {
    pub clusters: ClusterScope,
    pub selector: Selector,
}

/// Whose tiers and policies: federated and local names are different even when spelt alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Federated tiers before the cluster's own.
    Guard,
    /// The cluster's own tiers.
    Local,
    /// Federated tiers after the cluster's own.
    Baseline,
}

/// `None` (absent) sorts last; otherwise by value. Never NaN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Order(pub Option<f64>);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TierId {
    pub phase: Phase,
    pub name: Arc<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TierDefault {
    Deny,
    Pass,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Tier {
    pub id: TierId,
    pub order: Order,
    pub default: TierDefault,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    /// networking.k8s.io/v1
    KubernetesNetworkPolicy,
    /// policy.networking.k8s.io/v1alpha2
    ClusterNetworkPolicy,
    /// projectcalico.org/v3
    CalicoNetworkPolicy,
    CalicoGlobalNetworkPolicy,
    StagedNetworkPolicy,
    StagedGlobalNetworkPolicy,
    StagedKubernetesNetworkPolicy,
    /// hanse.dev/v1alpha1
    FederatedNetworkPolicy,
    StagedFederatedNetworkPolicy,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyId {
    /// `None`: the federation's.
    pub cluster: Option<ClusterName>,
    pub kind: PolicyKind,
    pub namespace: Option<Arc<str>>,
    pub name: Arc<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StagedAction {
    Set,
    Delete,
    Learn,
    Ignore,
}

/// A policy as it is enforced by one cluster, or by each cluster of `enforcers`.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    pub id: PolicyId,
    pub tier: TierId,
    pub order: Order,
    /// The clusters that enforce it. For a policy of a cluster: that cluster.
    pub enforcers: ClusterScope,
    /// The endpoints of an enforcing cluster to which the policy applies.
    pub selector: Selector,
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
    /// If set, the policy is staged and not enforced.
    pub staged: Option<StagedAction>,
    /// `doNotTrack` or `preDNAT`: no effect on pods.
    pub host_only: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    Allow,
    Deny,
    Pass,
    Log,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpVersion {
    V4,
    V6,
}

/// A protocol by name or by number: a *name* ICMP or ICMPv6 implies the family, the number does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Icmp,
    IcmpV6,
    Sctp,
    UdpLite,
    Number(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Icmp {
    pub kind: Option<u8>,
    pub code: Option<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    /// Both ends inclusive.
    Range(u16, u16),
    /// Looked up on the pod at this end of the packet (see [`EntityMatch::named_port_pods`]): a container port of this name
    /// with the packet's protocol and port.
    Named(Arc<str>),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceMatch {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HttpMatch {
    pub methods: Vec<String>,
    pub paths: Vec<HttpPath>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HttpPath {
    Exact(String),
    Prefix(String),
}

/// The conditions on one end of a packet. All given conditions must be satisfied.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EntityMatch {
    pub nets: Vec<IpNet>,
    pub not_nets: Vec<IpNet>,
    /// An object with the address, a pod or a network set, is selected.
    pub selection: Option<Selection>,
    /// No object with the address is selected. True for addresses without an object. Conditions on a single object, positive and
    /// negative, belong into one `selection`.
    pub not_selection: Option<Selection>,
    pub ports: Vec<Port>,
    pub not_ports: Vec<Port>,
    pub service: Option<ServiceMatch>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    pub action: Action,
    /// Zero-based index in the source object's list; a conversion may make several rules of one.
    pub index: u32,
    pub ip_version: Option<IpVersion>,
    pub protocol: Option<Protocol>,
    pub not_protocol: Option<Protocol>,
    pub icmp: Option<Icmp>,
    pub not_icmp: Option<Icmp>,
    pub source: EntityMatch,
    pub destination: EntityMatch,
    pub http: Option<HttpMatch>,
    /// A description of a part of the source rule that this version does not support. The rule never matches with certainty.
    pub not_understood: Option<Arc<str>>,
}

/// The tiers and policies of one owner.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Layer {
    pub tiers: BTreeMap<TierId, Tier>,
    pub policies: BTreeMap<PolicyId, Policy>,
}

/// Everything that is written: the federation's, and each cluster's own.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PolicySet {
    pub federation: Layer,
    pub clusters: BTreeMap<ClusterName, Layer>,
}

impl PolicySet {
    /// Whether any policy is staged.
    pub fn has_staged(&self) -> bool {
        let layers = [&self.federation].into_iter().chain(self.clusters.values());
        layers.flat_map(|layer| layer.policies.values()).any(|policy| policy.staged.is_some())
    }
}

/// The position of a tier in its phase: existing tiers by order and name, then tiers that policies name but that do not exist.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TierRank {
    pub missing: bool,
    pub order: Order,
    pub name: Arc<str>,
}

impl Layer {
    /// A tier as it applies: as its object says, else as one of the three that always exist, else (`None` for the tier
    /// object) at the end of its phase with default action Deny.
    pub fn tier(&self, id: &TierId) -> (TierRank, TierDefault) {
        let rank = |missing, order| TierRank { missing, order, name: id.name.clone() };
        if let Some(tier) = self.tiers.get(id) {
            return (rank(false, tier.order), tier.default);
        }
        match (id.phase, &*id.name) {
            (Phase::Local, "default") => (rank(false, Order(Some(1_000_000.0))), TierDefault::Deny),
            (Phase::Local, "kube-admin") => (rank(false, Order(Some(1_000.0))), TierDefault::Pass),
            (Phase::Local, "kube-baseline") => (rank(false, Order(Some(10_000_000.0))), TierDefault::Pass),
            _ => (rank(true, Order(None)), TierDefault::Deny),
        }
    }
}

impl PolicyKind {
    /// The kind in the string that breaks ties of order.
    pub fn name(self) -> &'static str {
        match self {
            Self::KubernetesNetworkPolicy => "KubernetesNetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Self::CalicoNetworkPolicy => "NetworkPolicy",
            Self::CalicoGlobalNetworkPolicy => "GlobalNetworkPolicy",
            Self::StagedNetworkPolicy => "StagedNetworkPolicy",
            Self::StagedGlobalNetworkPolicy => "StagedGlobalNetworkPolicy",
            Self::StagedKubernetesNetworkPolicy => "StagedKubernetesNetworkPolicy",
            Self::FederatedNetworkPolicy => "FederatedNetworkPolicy",
            Self::StagedFederatedNetworkPolicy => "StagedFederatedNetworkPolicy",
        }
    }
}

impl PolicyId {
    /// What orders policies of equal order in a tier: `name/namespace/kind`, compared as bytes. A staged policy has the
    /// position that it will have when committed. ClusterNetworkPolicies of equal priority are ordered by name, in which
    /// `a` comes before `a-b`; the API leaves it open.
    pub fn tie(&self) -> String {
        if self.kind == PolicyKind::ClusterNetworkPolicy {
            return format!("{}\0/{}", self.name, self.kind.name());
        }
        let kind = self.commits_to().map_or(self.kind, |committed| committed.kind);
        format!("{}/{}/{}", self.name, self.namespace.as_deref().unwrap_or(""), kind.name())
    }
}

impl PolicyId {
    /// For a staged kind, the policy that it would become. Of a federated one in every cluster, also in those that only the other
    /// of the two is for.
    pub fn commits_to(&self) -> Option<PolicyId> {
        let kind = match self.kind {
            PolicyKind::StagedNetworkPolicy => PolicyKind::CalicoNetworkPolicy,
            PolicyKind::StagedGlobalNetworkPolicy => PolicyKind::CalicoGlobalNetworkPolicy,
            PolicyKind::StagedKubernetesNetworkPolicy => PolicyKind::KubernetesNetworkPolicy,
            PolicyKind::StagedFederatedNetworkPolicy => PolicyKind::FederatedNetworkPolicy,
            _ => return None,
        };
        Some(PolicyId { kind, ..self.clone() })
    }
}

impl Policy {
    /// Whether it acts: staged policies and those of hosts do not.
    pub fn acts(&self) -> bool {
        self.staged.is_none() && !self.host_only
    }
}

impl Rule {
    /// Why this rule never matches with certainty: a part is not supported, or only a gateway can evaluate it. `None` if it can.
    pub fn unknown_because(&self) -> Option<&str> {
        let http = self.http.as_ref().map(|_| "http needs a gateway");
        self.not_understood.as_deref().or(http)
    }
}

impl EntityMatch {
    /// The pods to which a named port of this end refers: those of the selection. Without a selection, all pods of the ClusterSet for
    /// a federated policy, and all pods of the cluster for its own policies. Network sets have no ports, so they never count.
    pub fn named_port_pods(&self, policy: &PolicyId) -> &Selection {
        static ALL: LazyLock<Selection> = LazyLock::new(|| every_pod(ClusterScope::All));
        static LOCAL: LazyLock<Selection> = LazyLock::new(|| every_pod(ClusterScope::Local));
        let every_pod = if policy.cluster.is_none() { &ALL } else { &LOCAL };
        self.selection.as_ref().unwrap_or(every_pod)
    }
}

fn every_pod(clusters: ClusterScope) -> Selection {
    Selection { clusters, selector: Selector::all() }
}

impl Protocol {
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Icmp => 1,
            Self::IcmpV6 => 58,
            Self::Sctp => 132,
            Self::UdpLite => 136,
            Self::Number(number) => number,
        }
    }
}

impl Eq for Order {}

impl PartialOrd for Order {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Order {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        match (self.0, other.0) {
            // Adding zero turns -0.0 into 0.0, which policy files do not distinguish.
            (Some(a), Some(b)) => (a + 0.0).total_cmp(&(b + 0.0)),
            (a, b) => b.is_some().cmp(&a.is_some()),
        }
    }
}
