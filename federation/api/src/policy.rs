//! Policies, converted as far as their manifest alone allows. The rest depends on the cluster that has the policy, on its
//! nodes, or on the other clusters of the ClusterSet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_policy::evaluate::Direction;
use hanse_policy::model::{ClusterName, ClusterScope, EntityMatch, Phase, Policy, PolicyId, Rule};
use hanse_policy::selector::Expr;
use hanse_policy::tri::Tri;
use ipnet::IpNet;

use crate::clusters::{ClusterLabels, ClusterSelector, select_clusters};
use crate::field::FieldError;
use crate::inventory::NodeInfo;
use crate::unreadable::{close_rules, restrict};

/// A direction whose rules are without effect because the policy's types leave it out, and the field that lists the types.
pub type LeftOut = (Direction, &'static str);

/// A policy of one cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalPolicy {
    /// Its identifier names no cluster.
    policy: Policy,
    node_peers: Vec<NodePeers>,
    left_out: Vec<LeftOut>,
}

/// What the rules of a policy take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PolicySize {
    /// At about 600 bytes.
    pub rules: usize,
    /// Nets and ports, at some 24 bytes.
    pub entries: usize,
}

/// Consecutive egress rules whose destination is every node that a selector selects.
#[derive(Debug, Clone, PartialEq)]
pub struct NodePeers {
    pub first: usize,
    pub count: usize,
    pub selector: Expr,
}

impl LocalPolicy {
    pub fn new(mut policy: Policy) -> Self {
        // Most policies have one rule, and a vector that grows has room for four.
        [&mut policy.ingress, &mut policy.egress].into_iter().flatten().for_each(Vec::shrink_to_fit);
        Self { policy, node_peers: Vec::new(), left_out: Vec::new() }
    }

    pub fn with_node_peers(self, node_peers: Vec<NodePeers>) -> Self {
        Self { node_peers, ..self }
    }

    /// `has_rules`: whether the manifest has ingress rules, and egress rules.
    pub fn with_types(self, has_rules: [bool; 2], field: &'static str) -> Self {
        Self { left_out: left_out(&self.policy, has_rules, field), ..self }
    }

    /// The identifier of the policy in `cluster`.
    pub fn id(&self, cluster: &ClusterName) -> PolicyId {
        PolicyId { cluster: Some(Arc::clone(cluster)), ..self.policy.id.clone() }
    }

    /// The identifier, without a cluster.
    pub fn local_id(&self) -> &PolicyId {
        &self.policy.id
    }

    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// What its rules take.
    pub fn size(&self) -> PolicySize {
        let rules = || self.policy.ingress.iter().chain(&self.policy.egress).flatten();
        let of_end = |end: &EntityMatch| end.nets.len() + end.not_nets.len() + end.ports.len() + end.not_ports.len();
        PolicySize {
            rules: rules().count(),
            entries: rules().map(|rule| of_end(&rule.source) + of_end(&rule.destination)).sum(),
        }
    }

    /// The directions that it isolates or decides: ingress, egress.
    pub fn directions(&self) -> [bool; 2] {
        [self.policy.ingress.is_some(), self.policy.egress.is_some()]
    }

    /// Makes all its rules unknown, and frees them. `why`: what is wrong with the spec.
    pub fn close(&mut self, why: &str) {
        close_rules(&mut self.policy, &FieldError { path: "spec".to_owned(), message: why.to_owned() });
        self.node_peers.clear();
    }

    /// Whether the rules depend on the nodes of the cluster.
    pub fn has_node_peers(&self) -> bool {
        !self.node_peers.is_empty()
    }

    pub(crate) fn mark_unknown(&mut self, paths: &[String]) {
        mark_unknown(&mut self.policy, paths);
    }

    /// Makes unknown what errors concern, see [`crate::unreadable`].
    pub(crate) fn restrict(&mut self, errors: &[FieldError]) {
        let [_, is_egress_closed] = restrict(&mut self.policy, errors, !self.node_peers.is_empty());
        if is_egress_closed {
            self.node_peers.clear();
        }
    }

    /// The policy in `cluster`, which has these nodes.
    pub fn in_cluster(&self, cluster: &ClusterName, nodes: &BTreeMap<Arc<str>, NodeInfo>) -> Policy {
        let mut policy = self.policy.clone();
        policy.id.cluster = Some(Arc::clone(cluster));
        if let Some(rules) = &self.policy.egress
            && self.has_node_peers()
        {
            policy.egress = Some(self.with_nodes(rules, nodes));
        }
        policy
    }

    /// The nodes of each family become rules of their own, since a rule with nets matches their families only.
    fn with_nodes(&self, rules: &[Rule], nodes: &BTreeMap<Arc<str>, NodeInfo>) -> Vec<Rule> {
        let mut all = Vec::with_capacity(rules.len());
        let mut done = 0;
        for NodePeers { first, count, selector } in &self.node_peers {
            all.extend_from_slice(&rules[done..*first]);
            done = first + count;
            let selected = nodes.values().filter(|node| selector.evaluate(&node.labels) == Tri::Yes);
            let addresses = selected.flat_map(|node| &node.addresses).map(|address| IpNet::from(*address));
            let (v4, v6): (Vec<IpNet>, Vec<IpNet>) = addresses.partition(|net| matches!(net, IpNet::V4(_)));
            for nets in [v4, v6].into_iter().filter(|nets| !nets.is_empty()) {
                let to_nodes = |rule: &Rule| {
                    let destination = EntityMatch { nets: nets.clone(), ..rule.destination.clone() };
                    Rule { destination, ..rule.clone() }
                };
                all.extend(rules[*first..done].iter().map(to_nodes));
            }
        }
        all.extend_from_slice(&rules[done..]);
        all
    }
}

/// A policy of the federation.
#[derive(Debug, Clone, PartialEq)]
pub struct FederatedPolicy {
    /// In the phase `Guard`, enforced by and with peers in all clusters.
    policy: Policy,
    /// Selects the clusters that enforce it; `None` for all.
    enforcers: Option<ClusterSelector>,
    peers: Vec<PeerClusters>,
    left_out: Vec<LeftOut>,
}

/// The clusters of a peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerClusters {
    pub direction: Direction,
    /// The position of the rule.
    pub rule: usize,
    pub is_source: bool,
    pub clusters: ClusterSelector,
}

impl FederatedPolicy {
    pub fn new(policy: Policy, enforcers: Option<ClusterSelector>, peers: Vec<PeerClusters>) -> Self {
        Self { policy, enforcers, peers, left_out: Vec::new() }
    }

    /// `has_rules`: whether the manifest has ingress rules, and egress rules.
    pub fn with_types(self, has_rules: [bool; 2], field: &'static str) -> Self {
        Self { left_out: left_out(&self.policy, has_rules, field), ..self }
    }

    pub fn id(&self) -> &PolicyId {
        &self.policy.id
    }

    /// Whether it is a StagedFederatedNetworkPolicy.
    pub fn is_staged(&self) -> bool {
        self.policy.staged.is_some()
    }

    /// The clusters that enforce it, among clusters with these labels.
    pub fn enforcers(&self, clusters: &ClusterLabels) -> BTreeSet<ClusterName> {
        match &self.enforcers {
            Some(selector) => select_clusters(&selector.selector, clusters),
            None => clusters.keys().cloned().collect(),
        }
    }

    /// The name of its tier.
    pub fn tier(&self) -> &Arc<str> {
        &self.policy.tier.name
    }

    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// Every cluster selector in the manifest.
    pub fn cluster_selectors(&self) -> impl Iterator<Item = &ClusterSelector> {
        self.enforcers.iter().chain(self.peers.iter().map(|peer| &peer.clusters))
    }

    /// Makes all rules unknown, for the reason that `what` is not known.
    pub fn mark_unknown(&mut self, what: &[String]) {
        mark_unknown(&mut self.policy, what);
    }

    /// Makes unknown what errors concern, see [`crate::unreadable`].
    pub(crate) fn restrict(&mut self, errors: &[FieldError]) {
        let [is_ingress_closed, is_egress_closed] = restrict(&mut self.policy, errors, !self.peers.is_empty());
        self.peers.retain(|peer| match peer.direction {
            Direction::Ingress => !is_ingress_closed,
            Direction::Egress => !is_egress_closed,
        });
        if errors.iter().any(|error| error.path == "spec.clusterSelector") {
            self.enforcers = None;
        }
    }

    /// The policy among clusters with these labels. `tiers`: the phase of each federated tier. A policy of another tier is not
    /// in force, and its phase has no meaning.
    pub fn among(&self, clusters: &ClusterLabels, tiers: &BTreeMap<Arc<str>, Phase>) -> Policy {
        self.resolve(&|selector| select_clusters(&selector.selector, clusters), tiers)
    }

    /// The same, with cluster selectors that are resolved elsewhere.
    pub fn resolve(
        &self,
        select: &dyn Fn(&ClusterSelector) -> BTreeSet<ClusterName>,
        tiers: &BTreeMap<Arc<str>, Phase>,
    ) -> Policy {
        let mut policy = self.policy.clone();
        policy.tier.phase = tiers.get(&policy.tier.name).copied().unwrap_or(Phase::Guard);
        if let Some(selector) = self.enforcers.as_ref().filter(|it| it.selector.expr != Expr::All) {
            policy.enforcers = ClusterScope::Named(select(selector));
        }
        for PeerClusters { direction, rule, is_source, clusters } in &self.peers {
            let rules = match direction {
                Direction::Ingress => &mut policy.ingress,
                Direction::Egress => &mut policy.egress,
            };
            let Some(rule) = rules.as_mut().and_then(|rules| rules.get_mut(*rule)) else { continue };
            let end = if *is_source { &mut rule.source } else { &mut rule.destination };
            // A selector of all clusters selects their workloads by name, and no network set.
            if let Some(selection) = &mut end.selection {
                selection.clusters = ClusterScope::Named(select(clusters));
            }
        }
        policy
    }
}

fn left_out(policy: &Policy, [has_ingress, has_egress]: [bool; 2], field: &'static str) -> Vec<LeftOut> {
    let directions = [
        (Direction::Ingress, has_ingress && policy.ingress.is_none()),
        (Direction::Egress, has_egress && policy.egress.is_none()),
    ];
    directions.into_iter().filter(|(_, is_left_out)| *is_left_out).map(|(direction, _)| (direction, field)).collect()
}

/// Makes the rules of a policy unknown that have an unknown field, and all of them where the field is elsewhere.
fn mark_unknown(policy: &mut Policy, paths: &[String]) {
    let rule_of = |path: &str| {
        let (is_ingress, rest) = match path.strip_prefix("spec.ingress[") {
            Some(rest) => (true, rest),
            None => (false, path.strip_prefix("spec.egress[")?),
        };
        Some((is_ingress, rest.split_once(']')?.0.parse::<u32>().ok()?))
    };
    for path in paths {
        let affected = rule_of(path);
        for (is_ingress, rules) in [(true, &mut policy.ingress), (false, &mut policy.egress)] {
            let rules = rules.iter_mut().flatten();
            for rule in rules.filter(|rule| affected.is_none_or(|it| it == (is_ingress, rule.index))) {
                rule.not_understood = Some(format!("{path} is not known").into());
            }
        }
    }
}
