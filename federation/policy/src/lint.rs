//! Likely mistakes in policies.
//!
//! Findings cover the clusters that were read. They do not prove that policy is safe. A rule is reported as shadowed, or as
//! one that never matches, only where [`imply`] proves it.
//!
//! The parts that a rule of a source object was converted into are judged together: a rule with several peers is shadowed
//! when all of its parts are.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ipnet::IpNet;

use crate::evaluate::{Direction, OrderedTier, order, rules};
use crate::inventory::{Cluster, EffectiveLabels, EndpointId, EndpointKind, Inventory, selects};
use crate::model::{
    Action, ClusterName, ClusterScope, EntityMatch, Phase, Policy, PolicyId, PolicyKind, PolicySet, Port, Protocol,
    Rule, Selection, StagedAction, TierDefault, TierId,
};
use crate::selector::{Expr, Selector, build, needs};
use crate::tri::Tri;
use crate::workload::{Workload, telling_keys, workloads};

mod dns;
pub mod imply;
mod pitfalls;
mod ports;
mod services;
mod shadowed;
mod ties;

use imply::{everything, families, implies, is_contradictory, is_within};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Probably a mistake.
    Warning,
    /// Allows more than is reasonable, or cannot have the effect that is written.
    Error,
}

/// A kind of finding. Ids are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Check {
    pub id: &'static str,
    pub name: &'static str,
    pub severity: Severity,
    /// How to fix it.
    pub advice: &'static str,
}

macro_rules! checks {
    ($($constant:ident $id:literal $name:literal $severity:ident $advice:literal)*) => {
        $(pub const $constant: Check = Check { id: $id, name: $name, severity: Severity::$severity, advice: $advice };)*
        /// Every check.
        pub const CHECKS: &[Check] = &[$($constant),*];
    };
}

checks! {
    SUBJECT_SELECTS_NOTHING "HN001" "subject-selects-nothing" Warning
        "Correct the selector, or delete the policy if its workloads are gone."
    PEER_SELECTS_NOTHING "HN002" "peer-selects-nothing" Warning
        "Correct the selector or its clusters. This rule has no effect."
    RULE_NEVER_MATCHES "HN003" "rule-never-matches" Error
        "Split the rule: no packet meets all of its conditions."
    RULE_SHADOWED "HN004" "rule-shadowed" Warning
        "Delete the rule, or move it before the rule that decides first."
    NO_DEFAULT_DENY "HN005" "namespace-without-default-deny" Warning
        "Add a policy that selects every pod of the namespace and allows nothing, or a federated one for the cluster."
    CLUSTER_WITHOUT_DEFAULT_DENY "HN006" "cluster-without-default-deny" Warning
        "Add a policy with an empty selector to a tier that denies by default. In a Baseline tier it applies only to traffic that no other policy decides."
    EGRESS_TO_WORLD "HN007" "egress-to-world" Warning
        "Restrict the destinations with a selector, nets, or a network set, for example of the image registries that are needed."
    PASS_TO_NOTHING "HN008" "pass-to-nothing" Note
        "Traffic that passes here is allowed by the profile. Add a later tier that denies it, or deny it here."
    MISSING_CLUSTER "HN009" "cluster-unknown-or-stale" Warning
        "The cluster's endpoints are unknown or absent, so Allow rules for them do not match. Correct the name, or run `hanse status` to see why the cluster is silent."
    MISSING_TIER "HN010" "tier-without-object" Warning
        "Create the tier. Without the tier object, a federated policy is not in force, and a tier of the cluster itself is evaluated last and denies."
    NOT_UNDERSTOOD "HN011" "not-understood" Error
        "Upgrade, or rewrite the rule: an Allow rule like this never matches, and a Deny or Pass rule denies everything that it may match."
    RULE_REDUNDANT "HN012" "rule-redundant" Note
        "An earlier policy has the same effect: delete the rule, unless something else depends on it."
    ONLY_LOGS "HN013" "only-logs" Warning
        "Add a rule that decides after the Log rule (Allow, Pass or Deny), or give the tier defaultAction: Pass."
    NAMESPACE_LABEL "HN014" "label-of-namespaces" Warning
        "Move the comparison into namespaceSelector."
    HOST_POLICY "HN015" "host-endpoint-policy" Note
        "Leave this policy to Calico: Hanse enforces policy on pods, not on host endpoints."
    GLOBAL_SET_OUT_OF_SCOPE "HN016" "global-set-out-of-scope" Warning
        "Add namespaceSelector: global() to this end of the rule: without it a NetworkPolicy selects in its own namespace only."
    DNS_CUT "HN017" "dns-cut-off" Warning
        "Allow egress to port 53 (UDP and TCP) of the cluster's DNS, unless these pods must not resolve names."
    NET_OF_SERVICE "HN018" "net-of-a-service" Warning
        "Select the Service's pods, or the addresses of backends that are not pods, with the port that they listen on: policy is evaluated after the Service's address and port were translated to those of a backend."
    RULES_LEFT_OUT "HN019" "rules-left-out-by-types" Error
        "Add the direction to policyTypes (types in Calico's and federated policies), or delete these rules: only that list determines which directions a policy restricts."
    PORT_NAME_UNKNOWN "HN020" "port-name-without-port" Warning
        "Correct the name or the protocol, or name the port in the pod's containers: name, number and protocol must all agree."
    EQUAL_PRIORITY "HN021" "equal-priority" Warning
        "Give the policies different priorities: the API does not define the order of policies with equal priority."
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Finding {
    pub check: Check,
    /// The cluster of the policy, or the cluster that was checked.
    pub cluster: Option<ClusterName>,
    pub about: About,
    pub message: String,
}

/// The object that a finding is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum About {
    /// With the list and the index in it, where it is one rule.
    Policy(PolicyId, Option<(Direction, u32)>),
    Tier(TierId),
    /// Of the cluster that the finding names.
    Namespace(Arc<str>),
    /// The cluster as a whole.
    Cluster,
}

/// Checks that are skipped for a cluster without known pods.
pub const NEEDING_PODS: &[Check] = &[
    SUBJECT_SELECTS_NOTHING,
    PEER_SELECTS_NOTHING,
    NO_DEFAULT_DENY,
    CLUSTER_WITHOUT_DEFAULT_DENY,
    PASS_TO_NOTHING,
    GLOBAL_SET_OUT_OF_SCOPE,
    DNS_CUT,
];

/// The clusters without known pods.
pub fn without_pods(inventory: &Inventory) -> BTreeSet<&ClusterName> {
    let has_pods = |cluster: &Cluster| cluster.endpoints.keys().any(|id| id.kind == EndpointKind::Pod);
    inventory.clusters.iter().filter(|(_, cluster)| !has_pods(cluster)).map(|(name, _)| name).collect()
}

const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// All findings, each once, in a stable order. `hosts`: the clusters with host endpoints, which policies may select instead
/// of pods. `without_tier`: federated policies that are not in force because their tier has no object.
pub fn lint(
    policies: &PolicySet,
    inventory: &Inventory,
    hosts: &BTreeSet<ClusterName>,
    without_tier: &[(PolicyId, TierId)],
) -> Vec<Finding> {
    let workloads = workloads(inventory, &telling_keys([policies]));
    let mut findings = Vec::new();
    let layers = std::iter::once((None, &policies.federation));
    let layers = layers.chain(policies.clusters.iter().map(|(name, layer)| (Some(name.clone()), layer)));
    let services = services::ServiceAddresses::new(inventory);
    let (without_pods, assumed) = (without_pods(inventory), dns::assumed_servers(inventory));
    let mut facts = Facts { inventory, workloads: &workloads, services, without_pods, assumed, known: HashMap::new() };
    for (policy, tier) in without_tier {
        let message = format!("tier {:?} has no object, so the policy is not in force", tier.name);
        let about = About::Policy(policy.clone(), None);
        findings.push(Finding { check: MISSING_TIER, cluster: policy.cluster.clone(), about, message });
    }
    for (cluster, layer) in layers {
        for policy in layer.policies.values() {
            let mut found = |check, rule, message| {
                let about = About::Policy(policy.id.clone(), rule);
                findings.push(Finding { check, cluster: cluster.clone(), about, message });
            };
            if layer.tier(&policy.tier).0.missing {
                found(MISSING_TIER, None, format!("tier {:?} has no object", policy.tier.name));
            }
            let enforcers = enforcers(policy, inventory);
            for name in named(&policy.enforcers).filter(|name| !inventory.clusters.contains_key(*name)) {
                found(MISSING_CLUSTER, None, format!("enforced by cluster {name:?}, which is unknown"));
            }
            if policy.host_only {
                found(HOST_POLICY, None, "doNotTrack and preDNAT act on host endpoints only".to_owned());
            }
            if !counts(policy) {
                continue;
            }
            let subject = &policy.selector;
            if let Some(message) = pitfalls::names_a_namespace(subject) {
                found(NAMESPACE_LABEL, None, format!("selector: {message}"));
            }
            if is_contradictory(&subject.expr) {
                found(
                    SUBJECT_SELECTS_NOTHING,
                    None,
                    format!("{} contradicts itself and selects nothing", subject.shown()),
                );
            } else if enforcers.is_empty() {
                found(SUBJECT_SELECTS_NOTHING, None, "no known cluster enforces it".to_owned());
            } else if enforcers.iter().any(|enforcer| facts.may_have_subjects(enforcer, subject)) {
            } else if policy.id.namespace.is_none() && enforcers.iter().any(|enforcer| hosts.contains(*enforcer)) {
                found(HOST_POLICY, None, format!("{} selects no pod, but may select host endpoints", subject.shown()));
            } else {
                found(SUBJECT_SELECTS_NOTHING, None, format!("{} selects no pod", subject.shown()));
            }
            for direction in DIRECTIONS {
                if let Some(message) = pitfalls::only_logs(policy, direction, layer.tier(&policy.tier).1) {
                    found(ONLY_LOGS, None, message);
                }
                for (index, parts) in written(rules(policy, direction).unwrap_or_default()) {
                    for (check, message) in about(policy, &parts, direction, &enforcers, &mut facts) {
                        found(check, Some((direction, index)), message);
                    }
                }
            }
        }
    }
    findings.extend(shadowed::decided_before(policies, inventory));
    for name in inventory.clusters.keys() {
        let own = workloads.get(name).map_or(&[][..], Vec::as_slice);
        let tiers = order(policies, name);
        open_namespaces(&tiers, name, own, &mut findings);
        passes_to_nothing(policies, &tiers, name, own, &mut findings);
        ties::equal_priorities(&tiers, name, &workloads, &mut findings);
    }
    findings.extend(dns::cut_off(policies, inventory));
    let mut known = HashSet::new();
    findings.retain(|finding| known.insert(finding.clone()));
    findings
}

/// Rules of a direction that a policy has and its types leave out, which no [`PolicySet`] contains. `field`: where the policy
/// lists its directions.
pub fn rules_left_out(policy: PolicyId, direction: Direction, field: &str) -> Finding {
    let (list, name) = match direction {
        Direction::Ingress => ("ingress", "Ingress"),
        Direction::Egress => ("egress", "Egress"),
    };
    let message =
        format!("{field} omits {name}: the {list} rules have no effect, and the policy does not restrict {list}");
    let cluster = policy.cluster.clone();
    Finding { check: RULES_LEFT_OUT, cluster, about: About::Policy(policy, Some((direction, 0))), message }
}

/// Whether a policy affects pods, now or when it is committed.
fn counts(policy: &Policy) -> bool {
    !policy.host_only && matches!(policy.staged, None | Some(StagedAction::Set))
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

/// The rules as written, each with the parts that it was converted into.
fn written(list: &[Rule]) -> BTreeMap<u32, Vec<&Rule>> {
    let mut written: BTreeMap<u32, Vec<&Rule>> = BTreeMap::new();
    for rule in list {
        written.entry(rule.index).or_default().push(rule);
    }
    written
}

type Workloads<'a> = BTreeMap<&'a ClusterName, Vec<Workload<'a>>>;

/// What selections select, evaluated once each.
struct Facts<'a> {
    inventory: &'a Inventory,
    workloads: &'a Workloads<'a>,
    services: services::ServiceAddresses<'a>,
    without_pods: BTreeSet<&'a ClusterName>,
    /// Clusters with the DNS servers that they are assumed to have.
    assumed: BTreeMap<ClusterName, Cluster>,
    known: HashMap<(Option<ClusterName>, Selection), bool>,
}

impl Facts<'_> {
    /// The pods of a cluster that a policy with this selector is for, or may be for when they run.
    fn subjects(&self, cluster: &ClusterName, subject: &Selector) -> impl Iterator<Item = &Workload<'_>> {
        let pods = self.workloads.get(cluster).into_iter().flatten();
        pods.filter(|it| it.members[0].0.kind == EndpointKind::Pod).filter(move |it| subject_of(it, subject) != Tri::No)
    }

    /// Whether a policy with this selector is for something in a cluster, as far as that is known.
    fn may_have_subjects(&self, cluster: &ClusterName, subject: &Selector) -> bool {
        let of_assumed = |owner: &Cluster| {
            owner.endpoints.iter().any(|(id, endpoint)| {
                let labels = EffectiveLabels { cluster: owner, id, endpoint, first_hand: true };
                subject.evaluate(&labels) != Tri::No
            })
        };
        self.without_pods.contains(cluster)
            || self.subjects(cluster, subject).next().is_some()
            || self.assumed.get(cluster).is_some_and(of_assumed)
    }

    /// Whether it is not known what is selected: of a cluster without pods here, or a DNS server that is not among them.
    fn may_select_others(&self, enforcer: &ClusterName, selection: &Selection) -> bool {
        let in_scope = |name: &ClusterName| selection.clusters.contains(enforcer, name);
        let is_selected = |(name, owner): (&ClusterName, &Cluster)| {
            let mut servers = owner.endpoints.iter();
            servers.any(|(id, endpoint)| selects(enforcer, selection, name, owner, id, endpoint) != Tri::No)
        };
        self.without_pods.iter().any(|name| in_scope(name)) || self.assumed.iter().any(is_selected)
    }

    /// Whether anything may be selected: a pod or a network set.
    fn selects(&mut self, enforcer: &ClusterName, selection: &Selection) -> bool {
        let named = matches!(selection.clusters, ClusterScope::Named(_));
        let key = ((!named).then(|| enforcer.clone()), selection.clone());
        let (inventory, workloads) = (self.inventory, self.workloads);
        *self.known.entry(key).or_insert_with(|| {
            let may = |it: &Workload<'_>| {
                let (id, endpoint) = it.members[0];
                selects(enforcer, selection, it.cluster, it.owner, id, endpoint) != Tri::No
            };
            workloads.values().flatten().any(may)
                || inventory.federated_sets.keys().any(|id| inventory.selects_federated_set(selection, id) != Tri::No)
        })
    }

    /// Whether a network set may be selected, which may have the addresses of pods.
    fn selects_set(&self, enforcers: &[&ClusterName], selection: &Selection) -> bool {
        let sets = self.workloads.values().flatten().filter(|it| it.members[0].0.kind == EndpointKind::NetworkSet);
        let mut of_clusters = sets.flat_map(|it| enforcers.iter().map(move |enforcer| (it, *enforcer)));
        of_clusters.any(|(it, enforcer)| {
            let (id, endpoint) = it.members[0];
            selects(enforcer, selection, it.cluster, it.owner, id, endpoint) != Tri::No
        }) || self
            .inventory
            .federated_sets
            .keys()
            .any(|id| self.inventory.selects_federated_set(selection, id) != Tri::No)
    }

    /// Another cluster whose network set a selection of the whole ClusterSet would select, if such sets were exchanged.
    fn set_elsewhere(&self, enforcer: &ClusterName, selection: &Selection) -> Option<(&ClusterName, &EndpointId)> {
        let sets = self.workloads.values().flatten().filter(|it| it.cluster != enforcer);
        let sets =
            sets.filter(|it| it.members[0].0.kind == EndpointKind::NetworkSet && is_subject(it, &selection.selector));
        sets.filter(|_| selection.clusters == ClusterScope::All).map(|it| (it.cluster, it.members[0].0)).next()
    }

    /// The stale clusters on which what is selected depends: those that are named, and those that had some of it.
    fn stale(&self, enforcers: &[&ClusterName], selection: &Selection) -> Vec<&ClusterName> {
        let depends = |name: &ClusterName, cluster: &Cluster| match &selection.clusters {
            ClusterScope::Local => false,
            ClusterScope::Named(names) => names.contains(name),
            ClusterScope::All => self.workloads.get(name).into_iter().flatten().any(|it| {
                let (id, endpoint) = it.members[0];
                let labels = EffectiveLabels { cluster, id, endpoint, first_hand: false };
                selection.selector.evaluate(&labels) == Tri::Yes
            }),
        };
        let others = |name: &ClusterName| enforcers.iter().any(|enforcer| *enforcer != name);
        let stale = self.inventory.clusters.iter().filter(|(name, cluster)| cluster.stale && others(name));
        stale.filter(|(name, cluster)| depends(name, cluster)).map(|(name, _)| name).collect()
    }

    /// Whether a network set of every address of a family is selected.
    fn selects_world(&self, enforcer: &ClusterName, selection: &Selection) -> bool {
        let world = |nets: &[IpNet]| [true, false].iter().any(|v4| is_within(&everything(*v4), nets));
        let sets = self.workloads.values().flatten().flat_map(|it| it.members.iter().map(move |member| (it, member)));
        let mut of_clusters = sets.filter(|(_, (_, endpoint))| world(&endpoint.nets));
        of_clusters
            .any(|(it, (id, endpoint))| selects(enforcer, selection, it.cluster, it.owner, id, endpoint) == Tri::Yes)
            || self.inventory.federated_sets.iter().any(|(id, endpoint)| {
                world(&endpoint.nets) && self.inventory.selects_federated_set(selection, id) == Tri::Yes
            })
    }
}

/// Whether a policy of its own cluster with this selector certainly applies to a workload.
fn is_subject(workload: &Workload<'_>, subject: &Selector) -> bool {
    subject_of(workload, subject) == Tri::Yes
}

fn subject_of(workload: &Workload<'_>, subject: &Selector) -> Tri {
    let (id, endpoint) = workload.members[0];
    subject.evaluate(&EffectiveLabels { cluster: workload.owner, id, endpoint, first_hand: true })
}

/// Findings about a single rule.
fn about(
    policy: &Policy,
    parts: &[&Rule],
    direction: Direction,
    enforcers: &[&ClusterName],
    facts: &mut Facts<'_>,
) -> Vec<(Check, String)> {
    let mut found = Vec::new();
    let contradicts = |rule: &&Rule| {
        contradiction(rule).or_else(|| pitfalls::own_end_excludes(policy, rule, direction, enforcers, facts))
    };
    let contradictions: Vec<String> = parts.iter().filter_map(contradicts).collect();
    // Where one peer of several is impossible, the others still have an effect.
    let never = contradictions.len() == parts.len();
    found.extend(contradictions.into_iter().filter(|_| never).map(|reason| (RULE_NEVER_MATCHES, reason)));
    let own_side = match direction {
        Direction::Ingress => "destination",
        Direction::Egress => "source",
    };
    for rule in parts {
        found.extend(rule.unknown_because().map(|reason| (NOT_UNDERSTOOD, reason.to_owned())));
        for (side, entity) in [("source", &rule.source), ("destination", &rule.destination)] {
            let of_services = facts.services.nets_of_services(policy, entity, enforcers);
            found.extend(of_services.into_iter().map(|message| (NET_OF_SERVICE, format!("{side} {message}"))));
            let is_own = side == own_side;
            let of_names = ports::without_pods(policy, rule, (side, entity), is_own, enforcers, facts);
            found.extend(of_names.into_iter().map(|message| (PORT_NAME_UNKNOWN, message)));
            if let Some(service) = &entity.service {
                let key = (service.namespace.clone(), service.name.clone());
                let has_backends = |name: &&ClusterName| {
                    let service = facts.inventory.clusters.get(*name).and_then(|cluster| cluster.services.get(&key));
                    service.is_some_and(|service| match side {
                        "source" => !service.addresses.is_empty() || !service.planned.is_empty(),
                        _ => !service.backends.is_empty() || service.planned.values().any(|ports| !ports.is_empty()),
                    })
                };
                let is_known = enforcers.iter().all(|name| !facts.without_pods.contains(name));
                if !enforcers.is_empty() && is_known && !enforcers.iter().any(has_backends) {
                    let message = format!("{side} service {}/{} has no backends", service.namespace, service.name);
                    found.push((PEER_SELECTS_NOTHING, message));
                }
            }
            for selection in entity.selection.iter().chain(&entity.not_selection) {
                for name in named(&selection.clusters).filter(|it| !facts.inventory.clusters.contains_key(*it)) {
                    let message = format!("{side} names cluster {name:?}, which is unknown");
                    found.push((MISSING_CLUSTER, message));
                }
                for name in facts.stale(enforcers, selection) {
                    let message = format!("{side} depends on cluster {name:?}, whose data is stale");
                    found.push((MISSING_CLUSTER, message));
                }
            }
            let asked = entity.selection.iter().chain(&entity.not_selection);
            let named = asked.filter_map(|selection| pitfalls::names_a_namespace(&selection.selector));
            found.extend(named.map(|message| (NAMESPACE_LABEL, format!("{side}: {message}"))));
            for selection in entity.selection.iter().chain(&entity.not_selection).filter(|_| !never) {
                let nothing = enforcers.iter().copied().find(|enforcer| !facts.selects(enforcer, selection));
                let Some(enforcer) = nothing.filter(|it| !facts.may_select_others(it, selection)) else { continue };
                if let Some((cluster, set)) = facts.set_elsewhere(enforcer, selection) {
                    let message = format!(
                        "{} selects nothing in cluster {enforcer:?}: the network set {} of cluster {cluster:?} \
                         matches only there; a FederatedNetworkSet matches everywhere",
                        selection.selector.shown(),
                        set.name
                    );
                    found.push((PEER_SELECTS_NOTHING, message));
                }
            }
            let Some(selection) = entity.selection.as_ref().filter(|_| !never) else { continue };
            if !enforcers.is_empty() && !enforcers.iter().any(|enforcer| facts.selects(enforcer, selection)) {
                if enforcers.iter().any(|enforcer| facts.may_select_others(enforcer, selection)) {
                    continue;
                }
                match pitfalls::missed_global_set(policy, selection, enforcers, facts.inventory) {
                    Some(set) => found.push((
                        GLOBAL_SET_OUT_OF_SCOPE,
                        format!(
                            "{} selects nothing: GlobalNetworkSet {set} has no namespace",
                            selection.selector.shown()
                        ),
                    )),
                    // A federated policy names what some clusters have, which may not be among those that are read.
                    None if policy.id.cluster.is_none() && dns::is_of_usual_server(selection) => {}
                    None => {
                        let message = format!("{} selects nothing", selection.selector.shown());
                        // That is usual where only the manifests of an application were read.
                        let unread = pitfalls::unread_namespace(selection, enforcers, facts.inventory);
                        found.push(match unread {
                            Some(namespace) => (
                                Check { severity: Severity::Note, ..PEER_SELECTS_NOTHING },
                                format!("{message}: namespace {namespace} is not among the manifests"),
                            ),
                            None => (PEER_SELECTS_NOTHING, message),
                        });
                    }
                }
                continue;
            }
            let own = pitfalls::own_end(rule, direction).is_some_and(|(name, _)| name == side);
            let missed = own.then(|| pitfalls::own_end_missed(policy, rule, direction, enforcers, facts)).flatten();
            found.extend(missed.map(|message| (PEER_SELECTS_NOTHING, message)));
        }
        if rule.action == Action::Allow && direction == Direction::Egress && !never {
            let through = |selection: &Selection| enforcers.iter().any(|it| facts.selects_world(it, selection));
            let entity = &rule.destination;
            if is_world(entity) || entity.selection.as_ref().is_some_and(through) && entity.service.is_none() {
                let but = if entity.not_nets.is_empty() { "" } else { " but the excluded" };
                found.push((EGRESS_TO_WORLD, format!("it allows egress to every address{but}, {}", traffic(rule))));
            }
        }
    }
    found
}

/// The protocol and ports of a rule, for messages.
fn traffic(rule: &Rule) -> String {
    let ports = rule.destination.ports.iter().map(|port| match port {
        Port::Range(low, high) if low == high => low.to_string(),
        Port::Range(low, high) => format!("{low}-{high}"),
        Port::Named(name) => name.to_string(),
    });
    let ports = ports.collect::<Vec<_>>().join(", ");
    match (rule.protocol, ports.is_empty()) {
        (None, true) => "on every port".to_owned(),
        (None, false) => format!("on {ports}"),
        (Some(protocol), true) => format!("by {protocol:?}").to_uppercase().replacen("BY", "by", 1),
        (Some(protocol), false) => format!("on {}/{ports}", format!("{protocol:?}").to_uppercase()),
    }
}

/// Why no packet can match.
fn contradiction(rule: &Rule) -> Option<String> {
    if families(rule) == [false, false] {
        return Some("its conditions are for different address families".to_owned());
    }
    let number = rule.protocol.map(Protocol::number);
    if number.is_some() && rule.not_protocol.map(Protocol::number) == number {
        return Some("it requires and excludes the same protocol".to_owned());
    }
    if rule.icmp.is_some_and(|icmp| icmp.kind.is_some()) && rule.not_icmp == rule.icmp {
        return Some("it requires and excludes the same ICMP type".to_owned());
    }
    let ports = !rule.source.ports.is_empty() || !rule.destination.ports.is_empty();
    match number {
        Some(number) if ports && !matches!(number, 6 | 17 | 33 | 132 | 136) => {
            return Some("it requires ports of a protocol without ports".to_owned());
        }
        Some(number) if rule.icmp.is_some_and(|icmp| icmp.kind.is_some()) && !matches!(number, 1 | 58) => {
            return Some("it requires ICMP types of another protocol".to_owned());
        }
        _ => {}
    }
    [("source", &rule.source), ("destination", &rule.destination)]
        .into_iter()
        .find_map(|(side, entity)| entity_contradiction(side, entity))
}

fn entity_contradiction(side: &str, entity: &EntityMatch) -> Option<String> {
    if !entity.nets.is_empty() && entity.nets.iter().all(|net| is_within(net, &entity.not_nets)) {
        return Some(format!("{side}: every net is also excluded"));
    }
    let excluded = |port: &Port| entity.not_ports.contains(port) || imply::within_ranges(port, &entity.not_ports);
    if !entity.ports.is_empty() && entity.ports.iter().all(excluded) {
        return Some(format!("{side}: every port is also excluded"));
    }
    let selection = entity.selection.as_ref().filter(|selection| is_contradictory(&selection.selector.expr))?;
    Some(format!("{} contradicts itself", selection.selector.shown()))
}

/// Whether every address of a family matches, but for exceptions.
fn is_world(entity: &EntityMatch) -> bool {
    entity.selection.is_none()
        && entity.service.is_none()
        && (entity.nets.is_empty() || [true, false].iter().any(|v4| is_within(&everything(*v4), &entity.nets)))
        && entity.ports.iter().all(|port| matches!(port, Port::Range(..)))
}

fn title(id: &PolicyId) -> String {
    crate::explain::answer::policy_name(id)
}

fn list_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

fn action_verb(action: Action) -> &'static str {
    match action {
        Action::Allow => "allows",
        Action::Deny => "denies",
        Action::Pass => "passes",
        Action::Log => "logs",
    }
}

/// Labels that must be present for the expression to be true, with the value where it is one.
fn required_labels(expr: &Expr) -> Vec<(&str, Option<&str>)> {
    needs::every(expr).into_iter().map(|(key, value)| (&**key, value.map(|value| &**value))).collect()
}

/// The families for which a policy denies, in a direction, everything that it does not allow: by the end of a tier that
/// denies, or by a rule that denies everything.
fn closes(tier: &OrderedTier<'_>, policy: &Policy, direction: Direction) -> [bool; 2] {
    let Some(list) = rules(policy, direction).filter(|_| policy.acts()) else { return [false, false] };
    if tier.default == TierDefault::Deny {
        return [true, true];
    }
    let mut closed = [false, false];
    for rule in list.iter().filter(|rule| rule.action == Action::Deny && rule.unknown_because().is_none()) {
        let bare = rule.protocol.is_none() && rule.not_protocol.is_none() && rule.icmp.is_none();
        if !bare || rule.not_icmp.is_some() {
            continue;
        }
        for (family, on) in families(rule).into_iter().enumerate() {
            let all = |entity: &EntityMatch| is_everything(entity, policy.id.kind, family == 0);
            closed[family] |= on && all(&rule.source) && all(&rule.destination);
        }
    }
    closed
}

fn is_everything(entity: &EntityMatch, kind: PolicyKind, v4: bool) -> bool {
    // The peers of a ClusterNetworkPolicy are pods: all of them is the most that it can say.
    let every_pod = |selection: &Selection| {
        let pod = Expr::And([build::pods(), build::has_namespace()].into());
        kind == PolicyKind::ClusterNetworkPolicy && implies(&pod, &selection.selector.expr)
    };
    (entity.nets.is_empty() || is_within(&everything(v4), &entity.nets))
        && entity.not_nets.is_empty()
        && entity.ports.is_empty()
        && entity.not_ports.is_empty()
        && entity.service.is_none()
        && entity.not_selection.is_none()
        && entity.selection.as_ref().is_none_or(every_pod)
}

/// Namespaces in which some pod has no default deny.
fn open_namespaces(
    tiers: &[OrderedTier<'_>],
    name: &ClusterName,
    workloads: &[Workload<'_>],
    findings: &mut Vec<Finding>,
) {
    let all = || tiers.iter().flat_map(|tier| tier.policies.iter().map(move |policy| (tier, *policy)));
    let closing = DIRECTIONS.map(|direction| {
        let closing = all().map(|(tier, policy)| (policy, closes(tier, policy, direction)));
        closing.filter(|(_, families)| families.contains(&true)).collect::<Vec<_>>()
    });
    // All, open for ingress, open for egress, and not running.
    let mut open: BTreeMap<&Arc<str>, [usize; 4]> = BTreeMap::new();
    for workload in workloads {
        let (id, _) = workload.members[0];
        let (EndpointKind::Pod, Some(namespace)) = (id.kind, &id.namespace) else { continue };
        let applying = closing.each_ref().map(|closing| {
            let applying = closing.iter().filter(|(policy, _)| is_subject(workload, &policy.selector));
            applying.fold([false, false], |[a, b], (_, [c, d])| [a || *c, b || *d])
        });
        // Those without an address, ended or not yet begun, are open to nothing; those that do not run at all will have one.
        for (_, endpoint) in workload.members.iter().filter(|(_, endpoint)| endpoint.is_reachable()) {
            let counts = open.entry(namespace).or_default();
            counts[0] += 1;
            counts[3] += usize::from(endpoint.planned.is_some());
            for (at, closed) in applying.iter().enumerate() {
                let open = [true, false].into_iter().any(|v4| endpoint.has_family(v4) && !closed[usize::from(!v4)]);
                counts[at + 1] += usize::from(open);
            }
        }
    }
    let all_open =
        !open.is_empty() && open.values().all(|[pods, ingress, egress, _]| ingress == pods && egress == pods);
    if all_open {
        let message = "no pod has a default deny".to_owned();
        let (check, cluster) = (CLUSTER_WITHOUT_DEFAULT_DENY, Some(name.clone()));
        findings.push(Finding { check, cluster, about: About::Cluster, message });
    }
    for (namespace, [pods, ingress, egress, planned]) in open {
        let many = |some, all| many(some, all, if planned > 0 { "workload" } else { "pod" });
        let what = match (ingress, egress) {
            (0, 0) => continue,
            (0, open) => format!("egress is unrestricted ({})", many(open, pods)),
            (open, 0) => format!("ingress is unrestricted ({})", many(open, pods)),
            (one, other) if one == other => format!("ingress and egress are unrestricted ({})", many(one, pods)),
            (ingress, egress) => {
                format!("ingress ({}) and egress ({}) are unrestricted", many(ingress, pods), many(egress, pods))
            }
        };
        let message = format!("namespace {namespace}: {what}");
        let about = About::Namespace(namespace.clone());
        findings.push(Finding { check: NO_DEFAULT_DENY, cluster: Some(name.clone()), about, message });
    }
}

fn many(some: usize, all: usize, noun: &str) -> String {
    match (some, all) {
        (1, 1) => format!("1 {noun}"),
        (some, all) if some == all => format!("all {all} {noun}s"),
        (some, all) => format!("{some} of {all} {noun}s"),
    }
}

/// Where no later tier has a policy for any of the pods whose traffic is passed.
fn passes_to_nothing(
    policies: &PolicySet,
    tiers: &[OrderedTier<'_>],
    name: &ClusterName,
    workloads: &[Workload<'_>],
    findings: &mut Vec<Finding>,
) {
    for direction in DIRECTIONS {
        let acts = |policy: &&Policy| policy.acts() && rules(policy, direction).is_some();
        let acting: Vec<Vec<&Policy>> =
            tiers.iter().map(|tier| tier.policies.iter().copied().filter(acts).collect()).collect();
        // For each tier: the pods that it judges, and how many of those a later one judges too.
        let judged = |policies: &[&Policy], workload: &Workload<'_>| {
            policies.iter().any(|policy| is_subject(workload, &policy.selector))
        };
        for (at, tier) in tiers.iter().enumerate().filter(|(at, _)| !acting[*at].is_empty()) {
            let to_nothing = |first: &[&Policy]| {
                let pods = workloads.iter().filter(|it| it.members[0].0.kind == EndpointKind::Pod);
                let mut pods = pods.filter(|it| judged(first, it)).peekable();
                pods.peek().is_some() && pods.all(|it| !acting[at + 1..].iter().any(|later| judged(later, it)))
            };
            let list = list_name(direction);
            let written = |layer: &crate::model::Layer| layer.tiers.contains_key(tier.id);
            let own =
                if tier.id.phase == Phase::Local { policies.clusters.get(name) } else { Some(&policies.federation) };
            if tier.default == TierDefault::Pass && own.is_some_and(written) && to_nothing(&acting[at]) {
                let message =
                    format!("{list} traffic that no rule of the tier decides is passed, and no later tier decides it");
                let (check, cluster) = (PASS_TO_NOTHING, Some(name.clone()));
                findings.push(Finding { check, cluster, about: About::Tier(tier.id.clone()), message });
            }
            for policy in &acting[at] {
                let passing = rules(policy, direction).unwrap_or_default().iter().find(|it| it.action == Action::Pass);
                if let Some(rule) = passing.filter(|_| to_nothing(&[policy])) {
                    let message = format!("{list} traffic is passed, and no tier after {} decides it", tier.id.name);
                    let about = About::Policy(policy.id.clone(), Some((direction, rule.index)));
                    let (check, cluster) = (PASS_TO_NOTHING, Some(name.clone()));
                    findings.push(Finding { check, cluster, about, message });
                }
            }
        }
    }
}
