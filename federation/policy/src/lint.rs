//! What is written and probably not meant.
//!
//! Findings are about what is known here: all clusters that were read. They never say that policy is safe.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;

use crate::evaluate::{Direction, order, rules};
use crate::inventory::{Cluster, EndpointId, EndpointKind, Inventory};
use crate::model::{
    Action, ClusterName, ClusterScope, EntityMatch, IpVersion, Policy, PolicyId, PolicySet, Protocol, Rule, Selection,
    TierDefault, TierId,
};
use crate::tri::Tri;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Probably not what was meant.
    Warning,
    /// Opens more than anyone should mean, or cannot do what it says.
    Error,
}

/// A kind of finding. Ids are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Check {
    pub id: &'static str,
    pub name: &'static str,
    pub severity: Severity,
    /// What to do about it.
    pub advice: &'static str,
}

macro_rules! checks {
    ($($constant:ident $id:literal $name:literal $severity:ident $advice:literal)*) => {
        $(pub const $constant: Check = Check { id: $id, name: $name, severity: Severity::$severity, advice: $advice };)*
        /// Every check there is.
        pub const CHECKS: &[Check] = &[$($constant),*];
    };
}

checks! {
    SUBJECT_SELECTS_NOTHING "HN001" "subject-selects-nothing" Warning
        "Correct the selector, or delete the policy if its workloads are gone."
    PEER_SELECTS_NOTHING "HN002" "peer-selects-nothing" Warning
        "Correct the selector or its clusters; an Allow rule like this opens nothing, a Deny rule closes nothing."
    RULE_NEVER_MATCHES "HN003" "rule-never-matches" Error
        "Split the rule: what it asks for cannot hold of one packet."
    RULE_SHADOWED "HN004" "rule-shadowed" Warning
        "Delete the rule, or move it before the one that decides first."
    NO_DEFAULT_DENY "HN005" "namespace-without-default-deny" Warning
        "Add a policy that selects every pod of the namespace and allows nothing, or a federated one for the cluster."
    CLUSTER_WITHOUT_DEFAULT_DENY "HN006" "cluster-without-default-deny" Warning
        "Add a policy with an empty selector to a tier that denies, in Baseline for what no other policy speaks of."
    EGRESS_TO_WORLD "HN007" "egress-to-world" Warning
        "Name the destinations: a selector, nets, or a network set of the registries that are needed."
    PASS_TO_NOTHING "HN008" "pass-to-nothing" Note
        "What passes here is decided by the profile, which allows: add a later tier that denies, or deny here."
    MISSING_CLUSTER "HN009" "cluster-unknown-or-stale" Warning
        "Its endpoints are unknown or absent: rules that allow them do not match."
    MISSING_TIER "HN010" "tier-without-object" Warning
        "Create the tier: without an object it comes last and denies."
    NOT_UNDERSTOOD "HN011" "not-understood" Error
        "Upgrade, or rewrite the rule: where it allows it never matches, elsewhere it denies all that it may cover."
}

#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    pub check: Check,
    /// Whose policies, or which cluster it was found in.
    pub cluster: Option<ClusterName>,
    pub policy: Option<PolicyId>,
    /// The list and the index in it.
    pub rule: Option<(Direction, u32)>,
    pub message: String,
}

/// Everything that was found, in a stable order.
pub fn lint(policies: &PolicySet, inventory: &Inventory) -> Vec<Finding> {
    let mut findings = Vec::new();
    let layers = std::iter::once((None, &policies.federation));
    let layers = layers.chain(policies.clusters.iter().map(|(name, layer)| (Some(name.clone()), layer)));
    let mut selected = Selected { inventory, known: BTreeMap::new() };
    for (cluster, layer) in layers {
        let mut missing: Vec<&TierId> = Vec::new();
        for policy in layer.policies.values() {
            let mut found = |check, rule, message| {
                findings.push(Finding {
                    check,
                    cluster: cluster.clone(),
                    policy: Some(policy.id.clone()),
                    rule,
                    message,
                });
            };
            if layer.tier(&policy.tier).0.missing && !missing.contains(&&policy.tier) {
                missing.push(&policy.tier);
                found(MISSING_TIER, None, format!("tier {:?} has no object", policy.tier.name));
            }
            let enforcers = enforcers(policy, inventory);
            for name in named(&policy.enforcers).filter(|name| !inventory.clusters.contains_key(*name)) {
                found(MISSING_CLUSTER, None, format!("it is enforced by cluster {name:?}, which is not known here"));
            }
            let own = Selection { clusters: ClusterScope::Local, selector: policy.selector.clone() };
            if !enforcers.iter().any(|enforcer| selected.any(enforcer, &own, true)) {
                found(SUBJECT_SELECTS_NOTHING, None, format!("{} selects no pod", policy.selector));
            }
            for direction in [Direction::Ingress, Direction::Egress] {
                let list = rules(policy, direction).unwrap_or_default();
                for (at, rule) in list.iter().enumerate() {
                    let place = Some((direction, rule.index));
                    for (check, message) in about(rule, direction, policy, &enforcers, &mut selected) {
                        found(check, place, message);
                    }
                    let first = list[..at].iter().find(|before| before.index != rule.index && covers(before, rule));
                    if let Some(first) = first {
                        found(RULE_SHADOWED, place, format!("rule {} decides all that it matches", first.index));
                    }
                }
            }
        }
    }
    for (name, cluster) in &inventory.clusters {
        open_namespaces(policies, name, cluster, &mut findings);
        passes_to_nothing(policies, name, &mut findings);
    }
    findings.dedup();
    findings
}

fn enforcers<'a>(policy: &'a Policy, inventory: &'a Inventory) -> Vec<&'a ClusterName> {
    match &policy.id.cluster {
        Some(own) => vec![own],
        None => inventory.clusters.keys().filter(|name| policy.enforcers.contains(name, name)).collect(),
    }
}

fn named(scope: &ClusterScope) -> impl Iterator<Item = &ClusterName> {
    match scope {
        ClusterScope::Named(names) => Some(names.iter()),
        ClusterScope::Local | ClusterScope::All => None,
    }
    .into_iter()
    .flatten()
}

/// Whether selections select anything, asked once each.
struct Selected<'a> {
    inventory: &'a Inventory,
    known: BTreeMap<(Option<ClusterName>, Selection, bool), bool>,
}

impl Selected<'_> {
    fn any(&mut self, enforcer: &ClusterName, selection: &Selection, pods_only: bool) -> bool {
        let local = selection.clusters == ClusterScope::Local;
        let key = (local.then(|| enforcer.clone()), selection.clone(), pods_only);
        *self.known.entry(key).or_insert_with(|| {
            let sets = self.inventory.federated_sets.keys();
            let counts = |id: &EndpointId| !pods_only || id.kind == EndpointKind::Pod;
            let of_clusters = self.inventory.clusters.iter().any(|(name, cluster)| {
                let selects = |id| self.inventory.selects(enforcer, selection, name, id) != Tri::No;
                cluster.endpoints.keys().filter(|id| counts(id)).any(selects)
            });
            of_clusters
                || sets.filter(|id| counts(id)).any(|id| self.inventory.selects_federated_set(selection, id) != Tri::No)
        })
    }
}

/// What is odd about one rule by itself.
fn about(
    rule: &Rule,
    direction: Direction,
    policy: &Policy,
    enforcers: &[&ClusterName],
    selected: &mut Selected<'_>,
) -> Vec<(Check, String)> {
    let mut found = Vec::new();
    if let Some(reason) = rule.unknown_because() {
        found.push((NOT_UNDERSTOOD, reason.to_owned()));
    }
    for (side, entity) in [("source", &rule.source), ("destination", &rule.destination)] {
        let Some(selection) = &entity.selection else { continue };
        for name in named(&selection.clusters) {
            match selected.inventory.clusters.get(name) {
                None => {
                    found.push((MISSING_CLUSTER, format!("{side} names cluster {name:?}, which is not known here")))
                }
                Some(cluster) if cluster.stale => {
                    found.push((MISSING_CLUSTER, format!("{side} depends on cluster {name:?}, whose data is stale")));
                }
                Some(_) => {}
            }
        }
        if !enforcers.is_empty() && !enforcers.iter().any(|enforcer| selected.any(enforcer, selection, false)) {
            found.push((PEER_SELECTS_NOTHING, format!("{side} {} selects nothing", selection.selector)));
        }
    }
    if let Some(reason) = contradiction(rule) {
        found.push((RULE_NEVER_MATCHES, reason));
    }
    let acts = policy.acts() && rule.action == Action::Allow && direction == Direction::Egress;
    if acts && is_world(&rule.destination) {
        found.push((EGRESS_TO_WORLD, "it allows egress to every address".to_owned()));
    }
    found
}

/// Why no packet can match.
fn contradiction(rule: &Rule) -> Option<String> {
    let families = |nets: &[IpNet]| {
        [true, false].map(|v4| nets.is_empty() || nets.iter().any(|net| matches!(net, IpNet::V4(_)) == v4))
    };
    let lists = [&rule.source.nets, &rule.source.not_nets, &rule.destination.nets, &rule.destination.not_nets];
    let mut possible =
        lists.into_iter().map(|nets| families(nets)).fold([true, true], |[a, b], [c, d]| [a && c, b && d]);
    match rule.protocol {
        Some(Protocol::Icmp) => possible[1] = false,
        Some(Protocol::IcmpV6) => possible[0] = false,
        _ => {}
    }
    match rule.ip_version {
        Some(IpVersion::V4) => possible[1] = false,
        Some(IpVersion::V6) => possible[0] = false,
        None => {}
    }
    if possible == [false, false] {
        return Some("its parts speak of different address families".to_owned());
    }
    let number = rule.protocol.map(Protocol::number);
    if number.is_some() && rule.not_protocol.map(Protocol::number) == number {
        return Some("it asks for a protocol and against it".to_owned());
    }
    let ports = !rule.source.ports.is_empty() || !rule.destination.ports.is_empty();
    match number {
        Some(number) if ports && !matches!(number, 6 | 17 | 33 | 132 | 136) => {
            Some("it asks for ports of a protocol that has none".to_owned())
        }
        Some(number) if rule.icmp.is_some() && !matches!(number, 1 | 58) => {
            Some("it asks for ICMP types of another protocol".to_owned())
        }
        _ => None,
    }
}

/// Whether every address matches.
fn is_world(entity: &EntityMatch) -> bool {
    let everything = |net: &IpNet| net.prefix_len() == 0;
    entity.selection.is_none()
        && entity.not_selection.is_none()
        && entity.service.is_none()
        && (entity.nets.is_empty() || entity.nets.iter().any(everything))
        && entity.ports.iter().all(|port| matches!(port, crate::model::Port::Range(..)))
}

/// Whether `first` certainly decides whatever `rule` matches: each of its parts is absent or the same.
fn covers(first: &Rule, rule: &Rule) -> bool {
    fn wider<T: PartialEq>(first: &Option<T>, rule: &Option<T>) -> bool {
        first.is_none() || first == rule
    }
    let lists = |first: &EntityMatch, rule: &EntityMatch| {
        (first.nets.is_empty() || first.nets == rule.nets)
            && (first.not_nets.is_empty() || first.not_nets == rule.not_nets)
            && (first.ports.is_empty() || first.ports == rule.ports)
            && (first.not_ports.is_empty() || first.not_ports == rule.not_ports)
            && wider(&first.selection, &rule.selection)
            && wider(&first.not_selection, &rule.not_selection)
            && wider(&first.service, &rule.service)
    };
    first.action != Action::Log
        && first.unknown_because().is_none()
        && wider(&first.ip_version, &rule.ip_version)
        && wider(&first.protocol, &rule.protocol)
        && wider(&first.not_protocol, &rule.not_protocol)
        && wider(&first.icmp, &rule.icmp)
        && wider(&first.not_icmp, &rule.not_icmp)
        && lists(&first.source, &rule.source)
        && lists(&first.destination, &rule.destination)
}

/// Namespaces in which some pod is judged by no tier that denies what no rule speaks of.
fn open_namespaces(policies: &PolicySet, name: &ClusterName, cluster: &Cluster, findings: &mut Vec<Finding>) {
    // Subjects of the tiers that deny, for each direction.
    let tiers = order(policies, name);
    let closing = |direction: Direction| -> Vec<&Policy> {
        let denying = tiers.iter().filter(|tier| tier.default == TierDefault::Deny);
        denying
            .flat_map(|tier| tier.policies.iter().copied())
            .filter(|policy| policy.acts() && rules(policy, direction).is_some())
            .collect()
    };
    let mut open: BTreeMap<&Arc<str>, [usize; 3]> = BTreeMap::new();
    let closing = [closing(Direction::Ingress), closing(Direction::Egress)];
    for (id, endpoint) in &cluster.endpoints {
        let (EndpointKind::Pod, Some(namespace), false) = (id.kind, &id.namespace, endpoint.host_network) else {
            continue;
        };
        let labels = crate::inventory::EffectiveLabels { cluster, id, endpoint, first_hand: true };
        let counts = open.entry(namespace).or_default();
        counts[0] += 1;
        for (at, closing) in closing.iter().enumerate() {
            let closed = closing.iter().any(|policy| policy.selector.evaluate(&labels) == Tri::Yes);
            counts[at + 1] += usize::from(!closed);
        }
    }
    let mut all_open = !open.is_empty();
    for (namespace, [pods, ingress, egress]) in open {
        all_open &= ingress == pods && egress == pods;
        if ingress + egress > 0 {
            let message = format!(
                "namespace {namespace}: of {pods} pods {ingress} take whatever no rule speaks of, {egress} may send it"
            );
            findings.push(Finding {
                check: NO_DEFAULT_DENY,
                cluster: Some(name.clone()),
                policy: None,
                rule: None,
                message,
            });
        }
    }
    if all_open {
        let message = "no pod is denied anything by default".to_owned();
        let check = CLUSTER_WITHOUT_DEFAULT_DENY;
        findings.push(Finding { check, cluster: Some(name.clone()), policy: None, rule: None, message });
    }
}

/// Tiers that pass on what they do not decide while nothing follows.
fn passes_to_nothing(policies: &PolicySet, name: &ClusterName, findings: &mut Vec<Finding>) {
    let tiers = order(policies, name);
    let Some(last) = tiers.iter().rfind(|tier| tier.policies.iter().any(|policy| policy.acts())) else { return };
    let passing = |policy: &&&Policy| {
        let both = [Direction::Ingress, Direction::Egress].into_iter().flat_map(|direction| rules(policy, direction));
        policy.acts() && both.flatten().any(|rule| rule.action == Action::Pass)
    };
    let by_rule = last.policies.iter().find(passing);
    if last.default == TierDefault::Pass || by_rule.is_some() {
        let message = format!("tier {} passes, and no tier after it has policies", last.id.name);
        let policy = by_rule.map(|policy| policy.id.clone());
        findings.push(Finding { check: PASS_TO_NOTHING, cluster: Some(name.clone()), policy, rule: None, message });
    }
}
