//! What became of each policy.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_policy::model::{ClusterName, PolicyId};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

/// One entry per policy that is held.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    pub policies: BTreeMap<PolicyId, PolicyReport>,
    /// Addresses that more than one endpoint claims; the one that holds it is the local cluster's, then the first by name.
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

/// Whom a selector of a rule stands for.
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

/// What of a policy does nothing, or less than it says.
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
    #[error("doNotTrack and preDNAT do nothing on pods")]
    HostOnly,
    #[error("this cluster does not enforce it")]
    EnforcedElsewhere,
    #[error("it selects no pod of this cluster")]
    SelectsNothing,
    #[error("its nets, protocol and IP version leave no family to match")]
    NoFamily,
    #[error("not understood, so it matches nothing: {0}")]
    NeverMatches(Arc<str>),
    #[error("not understood, so it denies all that it could cover: {0}")]
    Denies(Arc<str>),
}
