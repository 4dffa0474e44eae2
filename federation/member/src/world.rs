//! All that a member knows, and what its nodes must enforce because of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_compiler::{Compiled, Input, compile};
use hanse_k8s_api::assemble::{Federation, NodeInfo};
use hanse_policy::inventory::Inventory;
use hanse_policy::model::{ClusterName, PolicySet};
use hanse_ruleset::{NodeConfig, OwnStream, UnknownPods};

use crate::source::Sourced;

/// What comes from the hub: the other clusters' endpoints, and what the federation says.
#[derive(Debug, Clone, Default)]
pub struct Imports {
    pub inventory: Inventory,
    pub federation: Federation,
    /// The hub's revision that this is true of; 0 without a hub.
    pub revision: u64,
}

#[derive(Debug, Clone)]
pub struct World {
    pub cluster: ClusterName,
    pub unknown_pods: UnknownPods,
    /// Hanse's own streams, which come before every tier.
    pub own_streams: Vec<OwnStream>,
    pub local: Arc<Sourced>,
    pub imports: Imports,
}

impl World {
    /// The rule set of every node.
    pub fn compile(&self) -> Compiled {
        let (policies, inventory) = (self.policies(), self.inventory());
        let nodes: BTreeMap<Arc<str>, NodeConfig> =
            self.local.state.nodes.iter().map(|(name, node)| (Arc::clone(name), self.node(node))).collect();
        let input = Input { cluster: &self.cluster, policies: &policies, inventory: &inventory, nodes: &nodes };
        let mut compiled = compile(input);
        for rules in compiled.nodes.values_mut() {
            rules.hub_revision = self.imports.revision;
            rules.local_revision = self.local.revision;
        }
        compiled
    }

    pub fn policies(&self) -> PolicySet {
        PolicySet {
            federation: self.imports.federation.layer.clone(),
            clusters: BTreeMap::from([(self.cluster.clone(), self.local.state.layer.clone())]),
        }
    }

    /// The others as the hub has them, this cluster as its own source has it.
    pub fn inventory(&self) -> Inventory {
        let mut inventory = self.imports.inventory.clone();
        let mut own = self.local.state.cluster.clone();
        if let Some(record) = inventory.clusters.get(&self.cluster) {
            own.labels.clone_from(&record.labels);
            own.label_grant.clone_from(&record.label_grant);
            own.federated_allow_final = record.federated_allow_final;
        }
        inventory.clusters.insert(self.cluster.clone(), own);
        inventory.federated_sets.clone_from(&self.imports.federation.sets);
        inventory
    }

    fn node(&self, node: &NodeInfo) -> NodeConfig {
        NodeConfig {
            pod_ranges: node.pod_ranges.clone(),
            node_addresses: node.addresses.clone(),
            unknown_pods: self.unknown_pods,
            own_streams: self.own_streams.clone(),
        }
    }
}
