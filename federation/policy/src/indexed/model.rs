//! What the indexed inventory stores.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use smallvec::SmallVec;

use super::id_set::IdSet;
use super::matches::{ClassId, FastMap, KeyId, PairId, RealmId};
use crate::inventory::{Cluster, EndpointKind, LabelGrant, NamedPort};
use crate::model::ClusterName;
use crate::slab_id;

slab_id! {
    /// A cluster, or the federation. Clusters keep their ids when they are withdrawn.
    pub struct ClusterId;
    /// What endpoints of one cluster, kind, namespace and account have in common.
    pub struct ContextId;
    /// An endpoint.
    pub struct SlotId;
    /// A node of the local cluster. Nodes keep their ids.
    pub struct NodeIndex;
}

/// The pseudo-cluster of federated network sets.
pub const FEDERATION: ClusterId = ClusterId::at(0);
/// The cluster whose view this is.
pub const LOCAL: ClusterId = ClusterId::at(1);

/// A pod has one of each family at most, with few exceptions.
pub type Addresses = SmallVec<[IpAddr; 2]>;
/// Namespace and name.
pub type ServiceKey = (Arc<str>, Arc<str>);

/// What the hub, or the operator, says of a cluster as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClusterRecord {
    pub label_grant: LabelGrant,
    /// The lease has ended: the value of every selector is unknown for its endpoints. Ignored for the local cluster.
    pub stale: bool,
    /// In the local cluster: a federated Allow is final, instead of leaving to the local tiers.
    pub federated_allow_final: bool,
}

impl ClusterRecord {
    pub fn of(cluster: &Cluster) -> Self {
        Self {
            label_grant: cluster.label_grant.clone(),
            stale: cluster.stale,
            federated_allow_final: cluster.federated_allow_final,
        }
    }
}

#[derive(Debug)]
pub struct IndexedCluster {
    pub name: ClusterName,
    /// `None`: its objects count as absent.
    pub record: Option<ClusterRecord>,
    pub(super) realm: RealmId,
    pub(super) endpoints: IdSet<SlotId>,
    pub(super) namespaces: FastMap<Arc<str>, Pairs>,
    pub(super) accounts: FastMap<(Arc<str>, Arc<str>), Pairs>,
}

impl IndexedCluster {
    pub(super) fn new(name: ClusterName, record: Option<ClusterRecord>, realm: RealmId) -> Self {
        Self {
            name,
            record,
            realm,
            endpoints: IdSet::default(),
            namespaces: FastMap::default(),
            accounts: FastMap::default(),
        }
    }
}

/// The labels of a namespace or an account, in the smallest form.
pub(super) type Pairs = Box<[(Arc<str>, Arc<str>)]>;

#[derive(Debug)]
pub(super) struct Context {
    pub cluster: ClusterId,
    pub kind: EndpointKind,
    pub namespace: Option<Arc<str>>,
    pub account: Option<Arc<str>>,
    /// The labels that it adds to those of its endpoints; sorted by key.
    pub pairs: Vec<(KeyId, PairId)>,
    pub endpoints: IdSet<SlotId>,
    pub dirty: bool,
}

/// An endpoint.
#[derive(Debug)]
pub struct Slot {
    pub name: Arc<str>,
    pub(super) context: ContextId,
    /// As of the last refresh; `None`: no selector matches it.
    pub class: Option<ClassId>,
    pub node: Option<NodeIndex>,
    /// Its own labels, in the order of their keys.
    pub(super) own: Box<[PairId]>,
    /// All that it claims; see [`super::IndexedInventory::held`].
    pub(super) addresses: Addresses,
    pub nets: Box<[IpNet]>,
    /// Shared by all endpoints with equal ports; `None` for none.
    pub(super) ports: Option<Arc<[NamedPort]>>,
    pub(super) host_network: bool,
    /// Not removed; a removed one stays until the refresh.
    pub(super) live: bool,
    pub(super) dirty: bool,
}

impl Slot {
    pub fn ports(&self) -> &[NamedPort] {
        self.ports.as_deref().unwrap_or_default()
    }
}

/// What an endpoint contributed to sets at the last refresh.
#[derive(Debug, Clone, PartialEq)]
pub struct Contribution {
    pub cluster: ClusterId,
    pub class: ClassId,
    pub stale: bool,
    pub node: Option<NodeIndex>,
    pub addresses: Addresses,
    pub nets: SmallVec<[IpNet; 1]>,
    pub ports: SmallVec<[NamedPort; 1]>,
    /// A pod of the local cluster that policy judges.
    pub judged: bool,
}

/// The endpoints of a class.
#[derive(Debug, Default)]
pub struct Members {
    pub all: IdSet<SlotId>,
    /// The pods of the local cluster that policy judges.
    pub judged: IdSet<SlotId>,
}
