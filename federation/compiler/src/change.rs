//! What a commit changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_ruleset::{ChainId, Digest, EndpointId, LocalEndpoint, NodeConfig, PolicyId, SetChange, SetId};

/// The outcome of [`crate::Compiler::commit`]. What nodes share stands here once: new objects by name (get them from the
/// compiler, encode each once), and changes of sets.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Members that came and went in sets that some node had before and still has.
    pub sets: BTreeMap<SetId, Arc<SetChange>>,
    /// Nodes whose rule set changed, by name.
    pub nodes: BTreeMap<Arc<str>, NodeChange>,
}

/// Shared objects that a node gains and loses; nodes that gain and lose the same share one list. All sorted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Objects {
    pub sets_added: Vec<SetId>,
    pub sets_removed: Vec<SetId>,
    pub policies_added: Vec<PolicyId>,
    pub policies_removed: Vec<PolicyId>,
    pub chains_added: Vec<ChainId>,
    pub chains_removed: Vec<ChainId>,
}

/// What turns the rule set that a node had at the last commit into the present one.
#[derive(Debug, Clone, Default)]
pub struct NodeChange {
    pub base: Digest,
    pub digest: Digest,
    /// The node has neither configuration nor pods any more.
    pub removed: bool,
    pub config: Option<NodeConfig>,
    pub objects: Arc<Objects>,
    /// Of [`Changes::sets`], those that this node had before and still has; sorted.
    pub set_changes: Vec<SetId>,
    /// New and changed, by id.
    pub endpoints: Vec<Arc<LocalEndpoint>>,
    pub endpoints_removed: Vec<EndpointId>,
}
