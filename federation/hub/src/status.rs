//! The state of clusters, from the exchange to the administration API.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hanse_protocol::reason::{Object, Reason, Subject};
use hanse_store::Revision;

use crate::manifest::ObjectId;

/// What is known of one cluster's publishing and enforcing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Realisation {
    /// It has a stream to this replica.
    pub connected: bool,
    /// Of what it publishes.
    pub epoch: u64,
    pub revision: u64,
    pub endpoints: u64,
    /// Whether its copy of the others equals what was selected for it; `None` before it has reported.
    pub digests_equal: Option<bool>,
    /// The hub's revision that the rule sets of all its nodes come from, and the one that it has received.
    pub enforced_revision: Revision,
    pub received_revision: Revision,
    pub agents: u32,
    pub agents_current: u32,
    /// Objects refused, and the first of them in words.
    pub refused: u64,
    pub refusals: Vec<String>,
    /// Pods that are not enforced.
    pub unenforced: u32,
    /// The first of what is wrong with it and keeps its nodes from enforcing, and how much there is.
    pub problems: Vec<Problem>,
    pub problems_total: u32,
}

/// One reason why a cluster or a node does not enforce everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Empty: the cluster as a whole.
    pub node: String,
    /// The object that has the problem, where it is none of `items`.
    pub at: Option<Object>,
    pub reason: Reason,
    /// Pods and objects, as far as they were reported. None: the node as a whole.
    pub items: Vec<Subject>,
    pub count: u32,
}

impl Problem {
    pub fn new(node: &str, reason: Reason) -> Self {
        Self { node: node.to_owned(), at: None, reason, items: Vec::new(), count: 1 }
    }
}

/// How far one node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeProgress {
    pub name: String,
    pub state: NodeState,
    pub connected: bool,
    /// Term and number of the rule set in force, and the revisions that it was compiled from.
    pub generation: (u64, u64),
    pub hub_revision: Revision,
    pub local_revision: u64,
    /// Since its agent last acknowledged something, or its stream ended.
    pub age: Option<Duration>,
    pub agent_version: String,
    /// Pods that are not enforced.
    pub unenforced: u32,
    pub problems: Vec<Problem>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    Enforcing,
    Lagging,
    /// Its cluster is silent.
    Unknown,
}

/// How far one object is enforced in one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectStatus {
    pub state: ObjectState,
    /// How many of its nodes enforce it.
    pub nodes_enforcing: u32,
    pub nodes: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectState {
    Enforced,
    /// It is not enforced yet.
    Lagging(Reasons),
    /// It cannot be enforced as written.
    Refused(Reasons),
}

/// The first of several reasons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reasons {
    pub first: Vec<NodeReason>,
    /// How many more nodes have a reason.
    pub more: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeReason {
    /// Empty: the cluster as a whole.
    pub node: String,
    /// As in [`Problem`].
    pub at: Option<Object>,
    pub reason: Reason,
}

impl Reasons {
    /// One reason of a cluster as a whole.
    pub fn of_cluster(reason: Reason) -> Self {
        Self { first: vec![NodeReason { node: String::new(), at: None, reason }], more: 0 }
    }
}

impl ObjectStatus {
    /// Of a cluster without a report of its nodes.
    pub fn lagging(reason: Reason) -> Self {
        Self { state: ObjectState::Lagging(Reasons::of_cluster(reason)), nodes_enforcing: 0, nodes: 0 }
    }
}

/// The exchange, as far as status needs it.
pub trait Realisations: Send + Sync + 'static {
    /// Every cluster of which something is known.
    fn clusters(&self) -> BTreeMap<Arc<str>, Realisation>;

    /// The nodes of a cluster in the order of their names, as far as they were reported.
    fn nodes(&self, cluster: &str) -> Vec<NodeProgress>;

    /// How far an object is in every cluster that must enforce it; of one that is gone, how far all are with `gone_at`. None:
    /// it is not distributed yet.
    fn object(&self, id: &ObjectId, gone_at: Revision) -> Option<BTreeMap<Arc<str>, ObjectStatus>>;
}

/// Before the exchange runs, nothing is known.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoRealisations;

impl Realisations for NoRealisations {
    fn clusters(&self) -> BTreeMap<Arc<str>, Realisation> {
        BTreeMap::new()
    }

    fn nodes(&self, _cluster: &str) -> Vec<NodeProgress> {
        Vec::new()
    }

    fn object(&self, _id: &ObjectId, _gone_at: Revision) -> Option<BTreeMap<Arc<str>, ObjectStatus>> {
        None
    }
}
