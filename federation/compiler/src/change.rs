//! What a commit changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_ruleset::Step;

/// The outcome of [`crate::Compiler::commit`]. Nodes name new objects; get those from the compiler, and encode each once.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Nodes whose rule set changed, by name.
    pub nodes: BTreeMap<Arc<str>, NodeChange>,
}

/// What turns the rule set that a node had at the last commit into the present one.
#[derive(Debug, Clone, Default)]
pub struct NodeChange {
    /// The node no longer has a configuration or pods.
    pub removed: bool,
    pub step: Step,
}
