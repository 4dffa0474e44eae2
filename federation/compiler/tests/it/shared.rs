//! Worlds as updates.

use std::sync::Arc;

use hanse_compiler::{Compiler, Update};
use hanse_policy::inventory::EndpointKind;
use hanse_policy::model::ClusterName;
use hanse_ruleset::{Digest, NodeConfig, RuleSet};

use crate::worlds::{Random, World};

pub const NODES: &[&str] = &["node-a", "node-b"];
/// Of every node.
pub const NODE_ADDRESS: &str = "192.0.2.1";

/// Puts every pod on a node, by its place.
pub fn place_pods(world: &mut World) {
    for cluster in world.inventory.clusters.values_mut() {
        for (at, (id, endpoint)) in cluster.endpoints.iter_mut().enumerate() {
            if id.kind == EndpointKind::Pod {
                endpoint.node = Some(NODES[at % 2].into());
            }
        }
    }
}

/// All updates that make the state of `local` what the world says.
pub fn updates(world: &World, local: &ClusterName) -> Vec<Update> {
    let mut all = Update::all_of(local, &world.policies, &world.inventory);
    for name in NODES {
        let config = NodeConfig { node_addresses: vec![NODE_ADDRESS.parse().unwrap()], ..NodeConfig::default() };
        all.push(Update::Node { name: (*name).into(), config });
    }
    all
}

pub fn compile(world: &World, local: &ClusterName) -> Compiler {
    let mut compiler = Compiler::new(local.clone());
    updates(world, local).into_iter().for_each(|update| compiler.apply(update));
    compiler.commit();
    compiler
}

/// All rule sets, with their digests found true.
pub fn rule_sets(compiler: &mut Compiler) -> Vec<(Arc<str>, RuleSet)> {
    let names = compiler.nodes();
    let all: Vec<_> = names.into_iter().map(|name| (name.clone(), compiler.rule_set(&name))).collect();
    for (name, rules) in &all {
        rules.check_references().unwrap();
        let kept: Option<Digest> = compiler.digest(name);
        assert_eq!(kept, Some(rules.digest()), "digest of {name}");
    }
    all
}

pub fn shuffle<T>(random: &mut Random, all: &mut [T]) {
    for at in (1..all.len()).rev() {
        all.swap(at, random.below(at + 1));
    }
}

/// The update that removes what an update added.
pub fn undo(update: &Update) -> Option<Update> {
    Some(match update.clone() {
        Update::Cluster { name, .. } => Update::RemoveCluster { name },
        Update::Namespace { cluster, name, .. } => Update::RemoveNamespace { cluster, name },
        Update::ServiceAccount { cluster, namespace, name, .. } => {
            Update::RemoveServiceAccount { cluster, namespace, name }
        }
        Update::Endpoint { cluster, id, .. } => Update::RemoveEndpoint { cluster, id },
        Update::Service { namespace, name, .. } => Update::RemoveService { namespace, name },
        Update::Node { name, .. } => Update::RemoveNode { name },
        Update::Tier(tier) => Update::RemoveTier(tier.id),
        Update::Policy(policy) => Update::RemovePolicy(policy.id),
        _ => return None,
    })
}
