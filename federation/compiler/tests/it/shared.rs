//! Worlds as updates.

use std::sync::Arc;

use hanse_compiler::{ClusterRecord, Compiler, Update};
use hanse_policy::inventory::{Cluster, EndpointKind};
use hanse_policy::model::{ClusterName, Layer};
use hanse_ruleset::{Digest, NodeConfig, RuleSet};

use crate::worlds::World;

pub const NODES: &[&str] = &["node-a", "node-b"];

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

pub fn record(cluster: &Cluster) -> ClusterRecord {
    ClusterRecord {
        label_grant: cluster.label_grant.clone(),
        stale: cluster.stale,
        federated_allow_final: cluster.federated_allow_final,
    }
}

/// All updates that make the state of `local` what the world says.
pub fn updates(world: &World, local: &ClusterName) -> Vec<Update> {
    let mut all = Vec::new();
    for (name, cluster) in &world.inventory.clusters {
        all.push(Update::Cluster { name: name.clone(), record: record(cluster) });
        for (namespace, content) in &cluster.namespaces {
            let (name, namespace) = (namespace.clone(), content.clone());
            all.push(Update::Namespace { cluster: cluster_name(world, cluster), name, namespace });
        }
        for ((namespace, account), labels) in &cluster.service_accounts {
            all.push(Update::ServiceAccount {
                cluster: name.clone(),
                namespace: namespace.clone(),
                name: account.clone(),
                labels: labels.clone(),
            });
        }
        for (id, endpoint) in &cluster.endpoints {
            all.push(Update::Endpoint { cluster: Some(name.clone()), id: id.clone(), endpoint: endpoint.clone() });
        }
    }
    for (id, endpoint) in &world.inventory.federated_sets {
        all.push(Update::Endpoint { cluster: None, id: id.clone(), endpoint: endpoint.clone() });
    }
    for ((namespace, name), service) in &world.inventory.clusters[local].services {
        let (namespace, name, service) = (namespace.clone(), name.clone(), service.clone());
        all.push(Update::Service { namespace, name, service });
    }
    let layer = |all: &mut Vec<Update>, layer: &Layer| {
        all.extend(layer.tiers.values().cloned().map(Update::Tier));
        all.extend(layer.policies.values().cloned().map(Update::Policy));
    };
    layer(&mut all, &world.policies.federation);
    layer(&mut all, &world.policies.clusters[local]);
    for name in NODES {
        let config = NodeConfig { node_addresses: vec!["192.0.2.1".parse().unwrap()], ..NodeConfig::default() };
        all.push(Update::Node { name: (*name).into(), config });
    }
    all
}

fn cluster_name(world: &World, cluster: &Cluster) -> ClusterName {
    let found = world.inventory.clusters.iter().find(|(_, it)| std::ptr::eq(*it, cluster));
    found.unwrap().0.clone()
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
