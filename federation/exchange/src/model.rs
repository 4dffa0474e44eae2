//! The types of both sides: positions, clusters, federated objects, refusals.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::inventory::{LabelGrant, Labels};
use hanse_policy::model::ClusterName;
use ipnet::IpNet;

pub use crate::interest::{Interest, Wanted};

/// A position in what one origin publishes; both numbers are the publisher's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    pub epoch: u64,
    pub revision: u64,
}

/// What a cluster may publish.
pub trait Grant: Send + Sync + std::fmt::Debug {
    fn permits_namespace(&self, name: &str) -> bool;
    fn permits_address(&self, address: IpAddr) -> bool;
    /// Whether the value is permitted. A key outside the grant is not refused but unknown.
    fn permits_label(&self, key: &str, value: &str) -> bool;
    fn label_grant(&self) -> LabelGrant;
    /// Most endpoints.
    fn max_endpoints(&self) -> usize;
    /// Most label sets.
    fn max_label_sets(&self) -> usize;
}

/// Grants everything, without limits: for tests and benchmarks.
#[derive(Debug)]
pub struct GrantAll;

impl Grant for GrantAll {
    fn permits_namespace(&self, _: &str) -> bool {
        true
    }

    fn permits_address(&self, _: IpAddr) -> bool {
        true
    }

    fn permits_label(&self, _: &str, _: &str) -> bool {
        true
    }

    fn label_grant(&self) -> LabelGrant {
        LabelGrant::All
    }

    fn max_endpoints(&self) -> usize {
        usize::MAX
    }

    fn max_label_sets(&self) -> usize {
        usize::MAX
    }
}

/// A cluster's lease. Only the hub ends one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// The hub has never received anything of the cluster.
    NeverConnected,
    Live,
    /// Every selector answers unknown for its endpoints.
    Stale {
        /// How long the cluster had been silent when its lease ended, by the hub's clock.
        silent_ms: u64,
    },
}

/// Sorted by key; keys are unique in what a hub accepts.
pub type Pairs = Box<[(Arc<str>, Arc<str>)]>;

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

/// A federated object as members receive it.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// As its author wrote it.
    pub json: Bytes,
    /// For a policy the clusters that enforce it.
    pub enforcers: BTreeSet<ClusterName>,
    /// What its cluster selectors select: expressions as written, and names.
    pub resolved: Vec<(Arc<str>, BTreeSet<ClusterName>)>,
    /// Features that it needs and this version does not have.
    pub features: Vec<String>,
}

/// A cluster of the ClusterSet, as the registry has it.
#[derive(Debug, Clone)]
pub struct ClusterState {
    pub labels: Labels,
    pub grant: Arc<dyn Grant>,
    /// Differs whenever the grant or its visibility does; the same on every replica.
    pub grant_token: u64,
    pub cidrs: Vec<IpNet>,
    pub lease: Lease,
    pub federated_allow_final: bool,
    /// The clusters that may see its exports; `None`: all.
    pub visible_to: Option<BTreeSet<ClusterName>>,
}

impl ClusterState {
    /// Whether receivers must be sent the same for both.
    pub(crate) fn same(&self, other: &Self) -> bool {
        let all = |it: &Self| (it.grant_token, it.lease, it.federated_allow_final);
        all(self) == all(other)
            && self.labels == other.labels
            && self.cidrs == other.cidrs
            && self.visible_to == other.visible_to
    }

    /// Whether a receiver that selects something of it waits for it. `synced`: it has published to this replica.
    pub(crate) fn waits_for(&self, synced: bool) -> bool {
        synced || self.lease != Lease::NeverConnected
    }

    /// As members are sent it.
    pub fn record(&self) -> ClusterRecord {
        ClusterRecord {
            labels: self.labels.clone(),
            label_grant: self.grant.label_grant(),
            cidrs: self.cidrs.clone(),
            lease: self.lease,
            federated_allow_final: self.federated_allow_final,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ManifestKind {
    Policy,
    /// Evaluated for flows, not enforced.
    StagedPolicy,
    Tier,
    NetworkSet,
}

/// A federated object with what the hub derives from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FederatedManifest {
    pub json: Bytes,
    /// For a policy the clusters that enforce it; `None` for other kinds: all.
    pub enforcers: Option<BTreeSet<ClusterName>>,
    /// Other clusters that are sent it. A staged policy takes the policy that it replaces out of the staged verdicts of all clusters that
    /// enforce that one.
    pub also_for: BTreeSet<ClusterName>,
    /// What its cluster selectors select now.
    pub resolved: BTreeMap<Arc<str>, BTreeSet<ClusterName>>,
    /// What its enforcers must be sent before it comes into force.
    pub interest: Interest,
    pub features: Vec<String>,
}

impl ManifestKind {
    /// Whether it is a policy, enforced or staged.
    pub fn is_policy(self) -> bool {
        matches!(self, Self::Policy | Self::StagedPolicy)
    }
}

impl FederatedManifest {
    /// The clusters that are sent it; `None`: all.
    pub fn audience(&self) -> Option<BTreeSet<ClusterName>> {
        self.enforcers.as_ref().map(|enforcers| enforcers.union(&self.also_for).cloned().collect())
    }
}

/// The ClusterSet's own state at one revision of the hub's store.
#[derive(Debug, Clone, Default)]
pub struct Federation {
    /// Its epoch identifies the store.
    pub position: Position,
    /// The accepted clusters. One that is missing was removed.
    pub clusters: BTreeMap<ClusterName, ClusterState>,
    pub manifests: BTreeMap<(ManifestKind, Arc<str>), Arc<FederatedManifest>>,
}

/// Why the hub does not use an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("malformed: {0}")]
    Malformed(String),
    #[error("this hub does not know feature {0}")]
    FeatureUnknown(String),
    #[error("namespace {0} is not granted")]
    NamespaceNotGranted(Arc<str>),
    #[error("address {0} is not granted")]
    AddressNotGranted(IpAddr),
    #[error("label {0} is not granted")]
    LabelNotGranted(String),
    #[error("a newer endpoint owns {0}")]
    AddressTaken(IpAddr),
    #[error("it refers to object {0}, which does not exist or is refused")]
    ReferenceMissing(u64),
    #[error("more {0} than granted")]
    LimitExceeded(Limit),
    #[error("members do not publish {0}")]
    KindNotPublishable(Arc<str>),
    /// From a hub of another version.
    #[error("unknown reason")]
    Unknown,
}

/// A limit of what a cluster may publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Endpoints,
    LabelSets,
    OtherObjects,
    Bytes,
}

impl Limit {
    pub const ALL: [Self; 4] = [Self::Endpoints, Self::LabelSets, Self::OtherObjects, Self::Bytes];
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Endpoints => "endpoints",
            Self::LabelSets => "label sets",
            Self::OtherObjects => "other objects",
            Self::Bytes => "bytes",
        })
    }
}

/// A cluster's report about the data that it has received.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReportedState {
    /// The hub's position that its policies come from. `None`: the report could not be used.
    pub hub: Option<Position>,
    /// The hub's position that it has received.
    pub received: Option<Position>,
    /// The digest of what it has of each origin; an empty name is the hub's own objects.
    pub origins: BTreeMap<Arc<str>, Option<u128>>,
}

/// The digest of one object: see the wire's description.
pub fn digest_of(bytes: &[u8]) -> u128 {
    let mut first = [0; 16];
    first.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    u128::from_le_bytes(first)
}

/// The first 64 bits of a hash.
pub(crate) fn first_bits(hash: &blake3::Hash) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}
