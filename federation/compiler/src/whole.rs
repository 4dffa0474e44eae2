//! Compiling a whole state once.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_policy::inventory::Inventory;
use hanse_policy::model::{ClusterName, PolicySet};
use hanse_ruleset::{NodeConfig, RuleSet};

use crate::{Compiler, Report, Update};

/// What is compiled.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    pub cluster: &'a ClusterName,
    pub policies: &'a PolicySet,
    pub inventory: &'a Inventory,
    /// The cluster's nodes with what only the node needs.
    pub nodes: &'a BTreeMap<Arc<str>, NodeConfig>,
}

/// The rule sets of those nodes, and the report.
#[derive(Debug, Clone, PartialEq)]
pub struct Compiled {
    pub nodes: BTreeMap<Arc<str>, RuleSet>,
    pub report: Report,
}

/// A [`Compiler`] that takes everything at once.
pub fn compile(input: Input<'_>) -> Compiled {
    let mut compiler = Compiler::new(input.cluster.clone());
    for update in Update::all_of(input.cluster, input.policies, input.inventory) {
        compiler.apply(update);
    }
    for (name, config) in input.nodes {
        compiler.apply(Update::Node { name: name.clone(), config: config.clone() });
    }
    compiler.commit();
    let nodes = input.nodes.keys().map(|name| (name.clone(), compiler.rule_set(name))).collect();
    Compiled { nodes, report: compiler.report() }
}
