//! Manifests compiled and put into the kernel of every node, without the processes that carry them there.
//!
//! It joins the compiler and the dataplane directly, so that packets judge the two together.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hanse_api::manifest::{Manifests, read_dir};
use hanse_api::{assemble_cluster, assemble_federation};
use hanse_compiler::{Input, compile};
use hanse_dataplane::Backend as _;
use hanse_dataplane::nftables::{Config, Nftables};
use hanse_policy::inventory::Inventory;
use hanse_policy::model::{ClusterName, PolicySet};
use hanse_ruleset::{Generation, NodeConfig, RuleSet, UnknownPods};

use crate::fabric::{Fabric, UPLINK};
use crate::world::Cluster;

/// The dataplanes of all nodes, by (cluster, node).
#[derive(Debug, Default)]
pub struct Enforcement {
    nodes: BTreeMap<(String, String), Kernel>,
    number: u64,
}

struct Kernel(Nftables);

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kernel")
    }
}

impl Enforcement {
    /// Reads, compiles and applies everything; returns how long that took. A refused manifest or rule is an error.
    pub fn apply(&mut self, fabric: &Fabric, clusters: &[Cluster], federation: &Path) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let (policies, inventory) = load(clusters, federation)?;
        for cluster in clusters {
            let config = |node: &crate::world::Node| NodeConfig {
                pod_ranges: node.pod_ranges.clone(),
                node_addresses: node.addresses.clone(),
                unknown_pods: UnknownPods::Deny,
                ..NodeConfig::default()
            };
            let nodes: BTreeMap<Arc<str>, NodeConfig> =
                cluster.nodes.iter().map(|node| (node.name.as_str().into(), config(node))).collect();
            let name: ClusterName = cluster.name.as_str().into();
            let compiled = compile(Input { cluster: &name, policies: &policies, inventory: &inventory, nodes: &nodes });
            self.enforce(fabric, &cluster.name, compiled.nodes)?;
        }
        Ok(start.elapsed())
    }

    /// Puts the rule sets of a cluster's nodes in force, as their next generation. A refused rule is an error.
    pub fn enforce(
        &mut self,
        fabric: &Fabric,
        cluster: &str,
        nodes: BTreeMap<Arc<str>, RuleSet>,
    ) -> anyhow::Result<()> {
        self.number += 1;
        for (node, mut rules) in nodes {
            rules.generation = Generation { term: 1, number: self.number };
            let key = (cluster.to_owned(), node.to_string());
            if !self.nodes.contains_key(&key) {
                let namespace = fabric.node(&key.0, &key.1).context("find the node's namespace")?;
                let config = Config { uplinks: vec![UPLINK.to_owned()], ..Config::default() };
                let kernel = namespace.enter(|| Nftables::open(config)).context("open nftables")?;
                self.nodes.insert(key.clone(), Kernel(kernel));
            }
            let kernel = self.nodes.get_mut(&key).context("find the node's dataplane")?;
            let applied = kernel.0.apply(&Arc::new(rules)).context("apply rules")?;
            if !applied.refused.is_empty() {
                bail!("the kernel of {}/{} refuses {:?}", key.0, key.1, applied.refused);
            }
        }
        Ok(())
    }
}

/// The policies and inventory of a federation's manifests.
pub fn assemble(clusters: &[(ClusterName, Manifests)], federation: &Manifests) -> (PolicySet, Inventory) {
    let (mut policies, mut inventory) = (PolicySet::default(), Inventory::default());
    let federation = assemble_federation(&federation.objects, clusters.iter().map(|(name, _)| name.clone()));
    for (name, manifests) in clusters {
        let mut state = assemble_cluster(name, manifests.objects.iter().cloned());
        if let Some(member) = federation.members.get(name) {
            state.cluster.labels = member.labels.clone();
            state.cluster.label_grant = member.grants.label_grant();
            state.cluster.federated_allow_final = member.federated_allow_final;
        }
        inventory.clusters.insert(name.clone(), state.cluster);
        policies.clusters.insert(name.clone(), state.layer);
    }
    inventory.federated_sets = federation.sets;
    policies.federation = federation.layer;
    (policies, inventory)
}

fn load(clusters: &[Cluster], federation: &Path) -> anyhow::Result<(PolicySet, Inventory)> {
    let clusters: Vec<(ClusterName, Manifests)> = clusters
        .iter()
        .map(|cluster| Ok((ClusterName::from(cluster.name.as_str()), read(&cluster.directory)?)))
        .collect::<anyhow::Result<_>>()?;
    Ok(assemble(&clusters, &read(federation)?))
}

fn read(directory: &Path) -> anyhow::Result<Manifests> {
    let manifests = read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    match manifests.diagnostics.first() {
        None => Ok(manifests),
        Some(first) => bail!("{}:{}: {}", first.location.file, first.location.line, first.message),
    }
}
