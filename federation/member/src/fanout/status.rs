//! The status of the agents, as they report it.

use std::net::SocketAddr;
use std::time::Instant;

use hanse_protocol::reason::{Failure, FileProblem, Finding, HookProblem, Object, Rejection};
use hanse_ruleset::{Digest, EndpointId, Generation};

/// The status of one node's agent.
#[derive(Debug, Clone, Default)]
pub struct NodeStatus {
    pub connected: bool,
    /// Of the rule set in force, from the last acknowledgement.
    pub position: RulesPosition,
    pub digest: Digest,
    /// Objects that the kernel refused; `None`: an object of an unknown kind.
    pub refused: Vec<(Option<Object>, Rejection)>,
    /// Why the newest generation is not in force.
    pub failed: Option<Failure>,
    /// A problem that affects all hooks.
    pub hooks: Option<HookProblem>,
    /// Pods that are not enforced, or not proven to be enforced.
    pub unenforced: Vec<(EndpointId, Finding)>,
    /// Files that the agent cannot write.
    pub files: Vec<FileProblem>,
    /// When the last acknowledgement arrived, or the stream ended.
    pub last_seen: Option<Instant>,
    /// The agent's version; empty if it did not send it.
    pub version: String,
    /// The addresses, served and refused, of two processes that use the key of the node, or its key and a former one. Acknowledgements
    /// then do not count.
    pub rivals: Option<(SocketAddr, SocketAddr)>,
}

impl NodeStatus {
    /// Whether the rules in the kernel may differ from the rule set.
    pub fn rules_may_differ(&self) -> bool {
        self.hooks.as_ref().is_some_and(HookProblem::rules_may_differ)
    }
}

/// The generation of a rule set, and the revisions from which it was compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RulesPosition {
    pub generation: Generation,
    /// The epoch of `hub_revision`; 0 if unknown. Agents do not send it: within a term, a generation belongs to one epoch.
    pub hub_epoch: u64,
    pub hub_revision: u64,
    pub local_revision: u64,
}
