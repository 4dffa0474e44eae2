//! The state of each policy.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_policy::model::{ClusterName, PolicyId};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

/// One entry per policy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    pub policies: BTreeMap<PolicyId, PolicyReport>,
    /// Addresses that more than one endpoint claims. The owner is the endpoint of the local cluster, then the first by name.
    pub contested: Vec<std::net::IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PolicyReport {
    /// Pods of the local cluster that it selects, whether or not they run on a node yet.
    pub selects: usize,
    /// Some node's rule set has it.
    pub is_active: bool,
    pub peers: Vec<PeerReport>,
    pub ignored: Vec<Ignored>,
}

/// The endpoints of a rule's selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerReport {
    pub direction: Direction,
    /// The rule's index as written.
    pub rule: u32,
    /// The canonical selector.
    pub selector: Arc<str>,
    /// Endpoints that belong, and those that may, by cluster; network sets of the federation under the empty name.
    pub clusters: BTreeMap<ClusterName, (usize, usize)>,
}

/// A part of a policy that has no effect, or less than is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignored {
    /// `None`: the whole policy.
    pub rule: Option<(Direction, u32)>,
    pub reason: Reason,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    #[error("staged policies never act")]
    Staged,
    #[error("doNotTrack and preDNAT have no effect on pods")]
    HostOnly,
    #[error("this cluster does not enforce the policy")]
    EnforcedElsewhere,
    #[error("the policy selects no pod of this cluster")]
    SelectsNothing,
    #[error("nets, protocol and IP version are for different address families")]
    NoFamily,
    #[error("not understood, so it matches nothing: {0}")]
    NeverMatches(Arc<str>),
    #[error("not understood, so it denies everything that it may match: {0}")]
    Denies(Arc<str>),
}
