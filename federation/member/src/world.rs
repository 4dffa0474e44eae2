//! All that a member knows, and what its nodes must enforce because of it.
//!
//! What comes from the hub and from the cluster's own source becomes updates of the compiler, so that a change costs what it
//! touches. A cluster is first-hand to itself: what the hub relays of it is not looked at.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_compiler::{ClusterRecord, Compiler, Report, Update};
use hanse_k8s_api::assemble::{Federation, NodeInfo};
use hanse_policy::inventory::{EndpointKind, Labels, Namespace};
use hanse_policy::model::{ClusterName, Layer};
use hanse_ruleset::{NodeConfig, OwnStream, RuleSet, UnknownPods};

use crate::exchange::model::{self, Change, Lease};
use crate::source::Sourced;

#[derive(Debug)]
pub struct World {
    cluster: ClusterName,
    unknown_pods: UnknownPods,
    /// Hanse's own streams, which come before every tier.
    own_streams: Vec<OwnStream>,
    local: Arc<Sourced>,
    federation: Arc<Federation>,
    /// The hub's revision that this is true of; 0 without a hub.
    pub hub_revision: u64,
    compiler: Compiler,
    nodes: BTreeMap<Arc<str>, RuleSet>,
}

impl World {
    pub fn new(cluster: ClusterName, unknown_pods: UnknownPods, own_streams: Vec<OwnStream>) -> Self {
        Self {
            compiler: Compiler::new(cluster.clone()),
            cluster,
            unknown_pods,
            own_streams,
            local: Arc::default(),
            federation: Arc::default(),
            hub_revision: 0,
            nodes: BTreeMap::new(),
        }
    }

    /// The cluster as its source has it.
    pub fn local(&self) -> &Arc<Sourced> {
        &self.local
    }

    pub fn federation(&self) -> &Arc<Federation> {
        &self.federation
    }

    /// What became of each policy.
    pub fn report(&self) -> Report {
        self.compiler.report()
    }

    /// Takes what the source has now in place of what it had.
    pub fn set_local(&mut self, now: Arc<Sourced>) {
        let before = std::mem::replace(&mut self.local, now);
        let now = Arc::clone(&self.local);
        let (before, now) = (&before.state, &now.state);
        for (name, namespace) in differences(&before.cluster.namespaces, &now.cluster.namespaces) {
            self.namespace(self.cluster.clone(), name.clone(), namespace.map(|it| it.labels.clone()));
        }
        for ((namespace, name), labels) in differences(&before.cluster.service_accounts, &now.cluster.service_accounts)
        {
            self.account(self.cluster.clone(), namespace.clone(), name.clone(), labels.cloned());
        }
        for (id, endpoint) in differences(&before.cluster.endpoints, &now.cluster.endpoints) {
            let (cluster, id) = (Some(self.cluster.clone()), id.clone());
            self.compiler.apply(match endpoint.cloned() {
                Some(endpoint) => Update::Endpoint { cluster, id, endpoint },
                None => Update::RemoveEndpoint { cluster, id },
            });
        }
        for ((namespace, name), service) in differences(&before.cluster.services, &now.cluster.services) {
            let (namespace, name) = (namespace.clone(), name.clone());
            self.compiler.apply(match service.cloned() {
                Some(service) => Update::Service { namespace, name, service },
                None => Update::RemoveService { namespace, name },
            });
        }
        for (name, node) in differences(&before.nodes, &now.nodes) {
            let name = name.clone();
            let update = match node {
                Some(node) => Update::Node { name, config: self.node(node) },
                None => Update::RemoveNode { name },
            };
            self.compiler.apply(update);
        }
        self.layer(&before.layer, &now.layer);
    }

    /// Takes what the federation says now in place of what it said.
    pub fn set_federation(&mut self, now: Federation) {
        let now = Arc::new(now);
        let before = std::mem::replace(&mut self.federation, Arc::clone(&now));
        for (id, set) in differences(&before.sets, &now.sets) {
            let (cluster, id) = (None, id.clone());
            self.compiler.apply(match set.cloned() {
                Some(endpoint) => Update::Endpoint { cluster, id, endpoint },
                None => Update::RemoveEndpoint { cluster, id },
            });
        }
        self.layer(&before.layer, &now.layer);
    }

    /// Takes a change of another cluster, or what the hub says of this one. Manifests are left to the caller, who converts
    /// them into policy.
    pub fn receive(&mut self, change: Change) {
        match change {
            Change::Cluster { name, record: Some(record) } => {
                let record = record_of(&record);
                self.compiler.apply(Update::Cluster { name, record });
            }
            // What is said of this cluster is withdrawn; what is in it is its own.
            Change::Cluster { name, record: None } | Change::Withdrawn { name } if name == self.cluster => {
                self.compiler.apply(Update::Cluster { name, record: ClusterRecord::default() });
            }
            Change::Cluster { name, record: None } | Change::Withdrawn { name } => {
                self.compiler.apply(Update::RemoveCluster { name });
            }
            Change::Namespace { cluster, name, labels } if cluster != self.cluster => {
                self.namespace(cluster, name, labels);
            }
            Change::ServiceAccount { cluster, namespace, name, labels } if cluster != self.cluster => {
                self.account(cluster, namespace, name, labels);
            }
            Change::Endpoint { cluster, id, endpoint } if cluster != self.cluster && id.kind == EndpointKind::Pod => {
                let cluster = Some(cluster);
                self.compiler.apply(match endpoint {
                    Some(endpoint) => Update::Endpoint { cluster, id, endpoint },
                    None => Update::RemoveEndpoint { cluster, id },
                });
            }
            Change::Namespace { .. }
            | Change::ServiceAccount { .. }
            | Change::Endpoint { .. }
            | Change::Manifest { .. } => {}
        }
    }

    /// Brings the rule set of every node up to date.
    pub fn compile(&mut self) -> &BTreeMap<Arc<str>, RuleSet> {
        let changes = self.compiler.commit();
        for (name, change) in &changes.nodes {
            if change.removed {
                self.nodes.remove(name);
            } else {
                self.nodes.insert(name.clone(), self.compiler.rule_set(name));
            }
        }
        for rules in self.nodes.values_mut() {
            rules.hub_revision = self.hub_revision;
            rules.local_revision = self.local.revision;
        }
        &self.nodes
    }

    fn namespace(&mut self, cluster: ClusterName, name: Arc<str>, labels: Option<Labels>) {
        self.compiler.apply(match labels {
            Some(labels) => Update::Namespace { cluster, name, namespace: Namespace { labels } },
            None => Update::RemoveNamespace { cluster, name },
        });
    }

    fn account(&mut self, cluster: ClusterName, namespace: Arc<str>, name: Arc<str>, labels: Option<Labels>) {
        self.compiler.apply(match labels {
            Some(labels) => Update::ServiceAccount { cluster, namespace, name, labels },
            None => Update::RemoveServiceAccount { cluster, namespace, name },
        });
    }

    fn layer(&mut self, before: &Layer, now: &Layer) {
        for (id, tier) in differences(&before.tiers, &now.tiers) {
            self.compiler.apply(tier.cloned().map_or_else(|| Update::RemoveTier(id.clone()), Update::Tier));
        }
        for (id, policy) in differences(&before.policies, &now.policies) {
            self.compiler.apply(policy.cloned().map_or_else(|| Update::RemovePolicy(id.clone()), Update::Policy));
        }
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

fn record_of(record: &model::ClusterRecord) -> ClusterRecord {
    ClusterRecord {
        label_grant: record.label_grant.clone(),
        stale: matches!(record.lease, Lease::Stale { .. }),
        federated_allow_final: record.federated_allow_final,
    }
}

/// What is new or different, and what is gone (`None`). O(both).
fn differences<'a, K: Ord, V: PartialEq>(
    before: &'a BTreeMap<K, V>,
    now: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, Option<&'a V>)> {
    let gone = before.keys().filter(|key| !now.contains_key(key)).map(|key| (key, None));
    let new = now.iter().filter(|(key, value)| before.get(key) != Some(value)).map(|(key, value)| (key, Some(value)));
    gone.chain(new)
}

#[cfg(test)]
mod tests {
    use hanse_k8s_api::assemble_cluster;
    use hanse_k8s_api::manifest::{Manifests, read_bytes};
    use hanse_policy::inventory::Endpoint;
    use hanse_ruleset::Digest;

    use super::*;
    use crate::exchange::model::pod;

    const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: n}\nspec: {podCIDR: 10.0.0.0/24}\n\
                        status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}\n---\n";
    const DENY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: d, namespace: a}\n\
                        spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}\n---\n";

    fn pod_of(name: &str, app: &str, address: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: a, labels: {{app: {app}}}}}\n\
             spec: {{nodeName: n}}\nstatus: {{phase: Running, podIP: {address}}}\n---\n"
        )
    }

    fn sourced(text: &str, revision: u64) -> Arc<Sourced> {
        let mut read = Manifests::default();
        read_bytes(&"cluster.yaml".into(), text.as_bytes(), &mut read);
        assert!(read.diagnostics.is_empty(), "{:?}", read.diagnostics);
        let state = assemble_cluster(&"here".into(), read.objects.iter());
        Arc::new(Sourced { state, problems: Vec::new(), revision })
    }

    fn world() -> World {
        World::new("here".into(), UnknownPods::default(), Vec::new())
    }

    fn digest(world: &mut World) -> Digest {
        world.compile()["n"].digest()
    }

    #[test]
    fn an_edit_comes_to_the_same_as_a_start_from_it() {
        let states = [
            format!("{NODE}{}{}", pod_of("p", "web", "10.0.0.1"), pod_of("q", "db", "10.0.0.2")),
            format!("{NODE}{DENY}{}{}", pod_of("p", "web", "10.0.0.1"), pod_of("q", "db", "10.0.0.2")),
            format!("{NODE}{DENY}{}{}", pod_of("p", "db", "10.0.0.1"), pod_of("r", "web", "10.0.0.2")),
            format!("{NODE}{}", pod_of("p", "db", "10.0.0.3")),
        ];
        let mut kept = world();
        let mut seen = std::collections::BTreeSet::new();
        for (revision, state) in (1..).zip(states.iter().chain(states.iter().rev())) {
            kept.set_local(sourced(state, revision));
            let mut fresh = world();
            fresh.set_local(sourced(state, revision));
            assert_eq!(digest(&mut kept), digest(&mut fresh), "revision {revision}");
            assert_eq!(kept.compile()["n"].local_revision, revision);
            seen.insert(digest(&mut kept));
        }
        assert_eq!(seen.len(), states.len(), "each state has rules of its own");
    }

    #[test]
    fn a_cluster_is_first_hand_to_itself() {
        let mut world = world();
        world.set_local(sourced(&format!("{NODE}{DENY}{}", pod_of("p", "web", "10.0.0.1")), 1));
        let before = digest(&mut world);
        let relayed = |endpoint| Change::Endpoint { cluster: "here".into(), id: pod("a".into(), "p".into()), endpoint };
        world.receive(relayed(Some(Endpoint::default())));
        world.receive(relayed(None));
        world.receive(Change::Namespace { cluster: "here".into(), name: "a".into(), labels: None });
        world.receive(Change::Withdrawn { name: "here".into() });
        assert_eq!(digest(&mut world), before, "what the hub says of this cluster's endpoints is not looked at");
    }
}
