//! The reference evaluator: the verdict of policy on one packet, written for clarity.
//!
//! All other evaluators (compiled rule sets, the kernel, [`crate::prepared`]) must agree with [`evaluate`]. It does not include the
//! guards of the kernel hooks: an address without a pod is treated alike in pod ranges and outside of them.
//!
//! # Order
//! A direction is evaluated with the policies of the pod's cluster: federated tiers of phase Guard, the tiers of the cluster, federated
//! tiers of phase Baseline, then the profile of the pod, which allows, as in Kubernetes. A tier without a policy that applies to the pod
//! in this direction is skipped with its default action.
//!
//! # Unknown never opens
//! A rule matches, does not match, or may match. If it may match, Allow does not apply, Deny and Pass deny, and Log is skipped.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::inventory::{EndpointId, EndpointKind, Inventory, NamedPort, Service};
use crate::model::{
    Action, ClusterName, ClusterScope, EntityMatch, Icmp, IpVersion, Layer, Order, Phase, Policy, PolicyId, PolicySet,
    Port, Protocol, Rule, Selection, ServiceMatch, StagedAction, TierDefault, TierId,
};
use crate::tri::Tri;

/// One packet: the first of a connection, with the addresses after translation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Query {
    pub source: End,
    pub destination: End,
    /// The IP protocol number.
    pub protocol: u8,
    /// 0 if the protocol has no ports.
    pub source_port: u16,
    pub destination_port: u16,
    /// Type and code, for ICMP and ICMPv6.
    pub icmp: Option<(u8, u8)>,
}

/// One end of a packet. Both ends are of one family.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct End {
    pub address: IpAddr,
    /// The pod with the address; `None` if no such pod is known.
    pub pod: Option<(ClusterName, EndpointId)>,
}

/// The policies to evaluate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum View {
    /// The enforced policies.
    Enforced,
    /// The policies after committing all staged ones: `Set` replaces or adds a policy, `Delete` removes it. `Learn` and `Ignore` have no
    /// effect.
    Pending,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    Allow,
    Deny,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Deny when either direction denies.
    pub verdict: Verdict,
    /// The judgement of the source's policies; `None` where the source is not a pod.
    pub egress: Option<Judgement>,
    /// The judgement of the destination's policies; `None` where the destination is not a pod.
    pub ingress: Option<Judgement>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    pub verdict: Verdict,
    /// The steps that had an effect, in order; the last decided.
    pub trace: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A rule that matches, a Deny or Pass rule that may match, or an Allow rule with a part that cannot be evaluated.
    Rule {
        tier: TierId,
        policy: PolicyId,
        /// Index in the list of this direction, as written.
        index: u32,
        action: Action,
        effect: Effect,
    },
    /// No rule of the tier decided. `last` is the last policy that applies.
    EndOfTier { tier: TierId, last: PolicyId, action: TierDefault },
    /// No tier decided.
    Profile,
    /// A pod can always reach itself.
    Itself,
}

/// The effect of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// That of its action.
    Acted,
    /// A federated Allow, which ends its phase; the next phase decides.
    Left,
    /// The rule may match, so it denies.
    DeniedUnknown,
    /// An Allow that may match and has a part that cannot be evaluated, such as HTTP: it does not allow.
    NotEnforced,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

/// The verdict of policy on `query`.
pub fn evaluate(policies: &PolicySet, inventory: &Inventory, query: &Query, view: View) -> Answer {
    let facts = Inspection { inventory };
    let judge = |end: &End, direction| {
        let (cluster, pod) = end.pod.as_ref()?;
        let owner = inventory.clusters.get(cluster).filter(|owner| owner.endpoints.contains_key(pod))?;
        let tiers = applicable_tiers(policies, inventory, cluster, pod, direction, view);
        let enforcer = Enforcer { facts: &facts, cluster, federated_allow_final: owner.federated_allow_final };
        let all_rules = tiers.iter().filter_map(|tier| {
            tier.with_rules(tier.policies.iter().copied().flat_map(move |policy| {
                let selects = tier.selects(policy);
                rules(policy, direction).unwrap_or_default().iter().map(move |rule| (policy, rule, selects))
            }))
        });
        Some(enforcer.judge(all_rules, query))
    };
    answer(query, is_of_several(inventory, query), judge)
}

/// Whether the source is a workload that does not run and may have several pods. Two addresses then belong to two pods.
pub(crate) fn is_of_several(inventory: &Inventory, query: &Query) -> bool {
    let pod = query.source.pod.as_ref().and_then(|(cluster, pod)| inventory.clusters.get(cluster)?.endpoints.get(pod));
    pod.and_then(|pod| pod.planned.as_ref()).is_some_and(|planned| planned.several)
}

/// Evaluates both directions of `query` with `judge`, which returns `None` if an end is not a pod.
pub(crate) fn answer(query: &Query, of_several: bool, judge: impl Fn(&End, Direction) -> Option<Judgement>) -> Answer {
    let is_one = !of_several || query.source.address == query.destination.address;
    let (egress, ingress) = if query.source.pod.is_some() && query.source.pod == query.destination.pod && is_one {
        let itself = || Some(Judgement { verdict: Verdict::Allow, trace: vec![Step::Itself] });
        (itself(), itself())
    } else {
        (judge(&query.source, Direction::Egress), judge(&query.destination, Direction::Ingress))
    };
    let denied = [&egress, &ingress].into_iter().flatten().any(|judgement| judgement.verdict == Verdict::Deny);
    Answer { verdict: if denied { Verdict::Deny } else { Verdict::Allow }, egress, ingress }
}

/// A tier with the policies that apply to one pod in one direction, in order. Never empty.
#[derive(Debug, Clone)]
pub(crate) struct TierView<'a> {
    pub id: &'a TierId,
    pub default: TierDefault,
    pub policies: Vec<&'a Policy>,
    /// The policies for which it is unknown whether they select the pod.
    pub uncertain: Vec<&'a Policy>,
}

impl<'a> TierView<'a> {
    /// With the rules that can decide.
    pub fn with_rules<I>(&self, rules: I) -> Option<TierRules<'a, I>> {
        let last = &self.policies.last()?.id;
        Some(TierRules { id: self.id, default: self.default, last, rules })
    }

    /// Whether a policy of the tier selects the pod.
    pub fn selects(&self, policy: &Policy) -> Tri {
        if self.uncertain.iter().any(|it| std::ptr::eq(*it, policy)) { Tri::Unknown } else { Tri::Yes }
    }
}

/// The tiers that apply to `pod` in `direction`, in the order of evaluation.
fn applicable_tiers<'a>(
    policies: &'a PolicySet,
    inventory: &Inventory,
    cluster: &ClusterName,
    pod: &EndpointId,
    direction: Direction,
    view: View,
) -> Vec<TierView<'a>> {
    let layers = [Some(&policies.federation), policies.clusters.get(cluster)];
    let mut applying: Vec<(&Layer, &Policy)> = layers
        .into_iter()
        .flatten()
        .flat_map(|layer| {
            acting(layer, view)
                .into_iter()
                .filter(|policy| policy.enforcers.contains(cluster, cluster))
                .filter(|policy| rules(policy, direction).is_some())
                .filter(|policy| applies(inventory, policy, cluster, pod) != Tri::No)
                .map(move |policy| (layer, policy))
        })
        .collect();
    in_order(&mut applying);
    let applies = |policy: &Policy| applies(inventory, policy, cluster, pod);
    in_tiers(applying.into_iter().map(|(layer, policy)| (layer, policy, applies(policy))))
}

/// Whether a policy selects a pod of the enforcing cluster. Unknown only for pods that do not run, because of labels that are set at run
/// time. If unknown, the policy does not allow, and its tier applies to the pod.
fn applies(inventory: &Inventory, policy: &Policy, cluster: &ClusterName, pod: &EndpointId) -> Tri {
    let own = Selection { clusters: ClusterScope::Local, selector: policy.selector.clone() };
    inventory.selects(cluster, &own, cluster, pod)
}

/// A tier with its policies, in the order of evaluation.
#[derive(Debug, Clone)]
pub struct OrderedTier<'a> {
    pub id: &'a TierId,
    pub order: Order,
    pub default: TierDefault,
    /// Policies name it, and no object defines it.
    pub missing: bool,
    pub policies: Vec<&'a Policy>,
}

/// All tiers that `cluster` has or enforces, in the order of evaluation: those without policies, and policies
/// that never act, included.
pub fn order<'a>(policies: &'a PolicySet, cluster: &str) -> Vec<OrderedTier<'a>> {
    let mut tiers = Vec::new();
    for layer in [Some(&policies.federation), policies.clusters.get(cluster)].into_iter().flatten() {
        let enforced = || layer.policies.values().filter(|policy| policy.enforcers.contains(cluster, cluster));
        let ids: BTreeSet<&TierId> = layer.tiers.keys().chain(enforced().map(|policy| &policy.tier)).collect();
        for id in ids {
            let mut own: Vec<(&Layer, &Policy)> =
                enforced().filter(|policy| policy.tier == *id).map(|policy| (layer, policy)).collect();
            in_order(&mut own);
            tiers.push((id, layer, own));
        }
    }
    tiers.sort_by_key(|(id, layer, _)| (id.phase, layer.tier(id).0));
    tiers
        .into_iter()
        .map(|(id, layer, own)| {
            let (rank, default) = layer.tier(id);
            let policies = own.into_iter().map(|(_, policy)| policy).collect();
            OrderedTier { id, order: rank.order, default, missing: rank.missing, policies }
        })
        .collect()
}

/// Sorts policies by phase, then by the rank of their tier, then by order, then by their tie string.
pub(crate) fn in_order(policies: &mut [(&Layer, &Policy)]) {
    policies.sort_by_cached_key(|(layer, policy)| {
        let (rank, _) = layer.tier(&policy.tier);
        (policy.tier.phase, rank, policy.order, policy.id.tie())
    });
}

/// Sorted policies, and whether each selects the pod, in their tiers.
pub(crate) fn in_tiers<'a>(sorted: impl IntoIterator<Item = (&'a Layer, &'a Policy, Tri)>) -> Vec<TierView<'a>> {
    let mut tiers: Vec<TierView<'a>> = Vec::new();
    for (layer, policy, selects) in sorted {
        let uncertain = Some(policy).filter(|_| selects == Tri::Unknown);
        match tiers.last_mut() {
            Some(tier) if *tier.id == policy.tier => {
                tier.policies.push(policy);
                tier.uncertain.extend(uncertain);
            }
            _ => {
                let (_, default) = layer.tier(&policy.tier);
                let uncertain = uncertain.into_iter().collect();
                tiers.push(TierView { id: &policy.tier, default, policies: vec![policy], uncertain });
            }
        }
    }
    tiers
}

/// The policies of a layer that act in a view.
pub(crate) fn acting(layer: &Layer, view: View) -> Vec<&Policy> {
    let pending = view == View::Pending;
    // What staged policies replace or delete.
    let gone: Vec<PolicyId> = layer
        .policies
        .values()
        .filter(|policy| pending && matches!(policy.staged, Some(StagedAction::Set | StagedAction::Delete)))
        .filter_map(|policy| policy.id.commits_to())
        .collect();
    let acts = |policy: &&Policy| match policy.staged {
        None => !gone.contains(&policy.id),
        Some(StagedAction::Set) => pending,
        Some(StagedAction::Delete | StagedAction::Learn | StagedAction::Ignore) => false,
    };
    layer.policies.values().filter(|policy| !policy.host_only).filter(acts).collect()
}

pub(crate) fn rules(policy: &Policy, direction: Direction) -> Option<&[Rule]> {
    match direction {
        Direction::Ingress => policy.ingress.as_deref(),
        Direction::Egress => policy.egress.as_deref(),
    }
}

/// A tier that applies to a pod in one direction.
pub(crate) struct TierRules<'p, I> {
    pub id: &'p TierId,
    pub default: TierDefault,
    /// The last policy that applies.
    pub last: &'p PolicyId,
    /// The rules in order, without those that cannot decide, each with whether its policy selects the pod.
    pub rules: I,
}

/// The enforcing cluster and its facts.
pub(crate) struct Enforcer<'c, F> {
    pub facts: &'c F,
    pub cluster: &'c str,
    pub federated_allow_final: bool,
}

impl<F: Facts> Enforcer<'_, F> {
    /// Evaluates the tiers in order.
    pub fn judge<'p, I>(&self, tiers: impl Iterator<Item = TierRules<'p, I>>, query: &Query) -> Judgement
    where
        I: Iterator<Item = (&'p Policy, &'p Rule, Tri)>,
    {
        let mut trace = Vec::new();
        let mut left: Option<Phase> = None;
        'tiers: for tier in tiers {
            if left == Some(tier.id.phase) {
                continue;
            }
            for (policy, rule, selects) in tier.rules {
                let federated = policy.id.cluster.is_none();
                let matches = rule_matches(self.facts, self.cluster, policy, rule, query).and(selects);
                let effect = match (rule.action, matches) {
                    (Action::Allow, Tri::Unknown) if rule.unknown_because().is_some() => Effect::NotEnforced,
                    (_, Tri::No) | (Action::Allow | Action::Log, Tri::Unknown) => continue,
                    (Action::Deny | Action::Pass, Tri::Unknown) => Effect::DeniedUnknown,
                    (Action::Allow, Tri::Yes) if federated && !self.federated_allow_final => Effect::Left,
                    (_, Tri::Yes) => Effect::Acted,
                };
                let (tier_id, id) = (tier.id.clone(), policy.id.clone());
                trace.push(Step::Rule { tier: tier_id, policy: id, index: rule.index, action: rule.action, effect });
                match (rule.action, effect) {
                    (_, Effect::NotEnforced) => {}
                    (_, Effect::DeniedUnknown) | (Action::Deny, _) => {
                        return Judgement { verdict: Verdict::Deny, trace };
                    }
                    (_, Effect::Left) => {
                        left = Some(tier.id.phase);
                        continue 'tiers;
                    }
                    (Action::Allow, _) => return Judgement { verdict: Verdict::Allow, trace },
                    (Action::Pass, _) => continue 'tiers,
                    (Action::Log, _) => {}
                }
            }
            trace.push(Step::EndOfTier { tier: tier.id.clone(), last: tier.last.clone(), action: tier.default });
            if tier.default == TierDefault::Deny {
                return Judgement { verdict: Verdict::Deny, trace };
            }
        }
        trace.push(Step::Profile);
        Judgement { verdict: Verdict::Allow, trace }
    }
}

/// The properties of the ends of a packet that rules evaluate.
pub(crate) trait Facts {
    /// Whether the selection matches the end: its pod, or a network set that contains its address.
    fn selected(&self, enforcer: &str, selection: &Selection, end: &End) -> Tri;
    /// Whether the end is a pod of `pods` with a port of this name, number and protocol.
    fn named_port(&self, enforcer: &str, pods: &Selection, name: &str, end: &End, protocol: u8, port: u16) -> Tri;
    /// Whether the end is a backend of a service of the enforcing cluster: by address, protocol and port, or without a
    /// `port` by address alone.
    fn backend(&self, enforcer: &str, service: &ServiceMatch, end: &End, port: Option<(u8, u16)>) -> Tri;
}

/// Looks everything up in the inventory, each time.
struct Inspection<'a> {
    inventory: &'a Inventory,
}

impl Facts for Inspection<'_> {
    fn selected(&self, enforcer: &str, selection: &Selection, end: &End) -> Tri {
        let holds = |nets: &[ipnet::IpNet]| nets.iter().any(|net| net.contains(&end.address));
        let mut any = Tri::No;
        if let Some((cluster, pod)) = &end.pod {
            any = any.or(self.inventory.selects(enforcer, selection, cluster, pod));
        }
        for (name, cluster) in &self.inventory.clusters {
            for (id, endpoint) in &cluster.endpoints {
                if id.kind == EndpointKind::NetworkSet && holds(&endpoint.nets) {
                    any = any.or(self.inventory.selects(enforcer, selection, name, id));
                }
            }
        }
        for (id, endpoint) in &self.inventory.federated_sets {
            if holds(&endpoint.nets) {
                any = any.or(self.inventory.selects_federated_set(selection, id));
            }
        }
        any
    }

    fn named_port(&self, enforcer: &str, pods: &Selection, name: &str, end: &End, protocol: u8, port: u16) -> Tri {
        let Some((cluster, id)) = &end.pod else { return Tri::No };
        let pod = self.inventory.clusters.get(cluster).and_then(|owner| owner.endpoints.get(id));
        let named = pod.is_some_and(|pod| has_named_port(&pod.ports, name, protocol, port));
        // Of a stale cluster this is unknown: what was a named port when it fell silent may still be one.
        Tri::from(named).and(self.inventory.selects(enforcer, pods, cluster, id))
    }

    fn backend(&self, enforcer: &str, service: &ServiceMatch, end: &End, port: Option<(u8, u16)>) -> Tri {
        backend(self.inventory, enforcer, service, end, port)
    }
}

/// See [`Facts::named_port`].
pub(crate) fn has_named_port(ports: &[NamedPort], name: &str, protocol: u8, port: u16) -> bool {
    ports.iter().any(|have| &*have.name == name && have.protocol == protocol && have.port == port)
}

/// See [`Facts::backend`]. A service that does not exist has no backends.
pub(crate) fn backend(
    inventory: &Inventory,
    enforcer: &str,
    service: &ServiceMatch,
    end: &End,
    port: Option<(u8, u16)>,
) -> Tri {
    let key = (service.namespace.clone(), service.name.clone());
    let found = inventory.clusters.get(enforcer).and_then(|cluster| cluster.services.get(&key));
    let pod = end.pod.as_ref().filter(|(cluster, _)| **cluster == *enforcer).map(|(_, pod)| pod);
    Tri::from(found.is_some_and(|service| is_backend(service, end.address, pod, port)))
}

/// Whether an address, or a pod of the service's cluster without an address, is a backend of a service.
pub(crate) fn is_backend(
    service: &Service,
    address: IpAddr,
    pod: Option<&EndpointId>,
    port: Option<(u8, u16)>,
) -> bool {
    let planned = pod.and_then(|pod| service.planned.get(pod));
    match port {
        Some((protocol, port)) => {
            service.backends.contains(&(address, protocol, port))
                || planned.is_some_and(|ports| ports.contains(&(protocol, port)))
        }
        None => service.addresses.contains(&address) || planned.is_some(),
    }
}

/// Whether `rule` of `policy` matches.
pub(crate) fn rule_matches(facts: &impl Facts, enforcer: &str, policy: &Policy, rule: &Rule, query: &Query) -> Tri {
    let version = if query.destination.address.is_ipv4() { IpVersion::V4 } else { IpVersion::V6 };
    if !header_matches(rule, query, version) {
        return Tri::No;
    }
    let understood = if rule.unknown_because().is_some() { Tri::Unknown } else { Tri::Yes };
    let end_matches = |entity: &EntityMatch, end: &End, port: u16, side: Side| {
        entity_matches(facts, enforcer, policy, entity, end, query.protocol, port, side)
    };
    let source = end_matches(&rule.source, &query.source, query.source_port, Side::Source);
    if source == Tri::No {
        return Tri::No;
    }
    let destination = end_matches(&rule.destination, &query.destination, query.destination_port, Side::Destination);
    understood.and(source).and(destination)
}

/// Whether a rule matches the packet's header, and applies to its family at all.
fn header_matches(rule: &Rule, query: &Query, version: IpVersion) -> bool {
    if rule.ip_version.is_some_and(|wanted| wanted != version) || !is_on(rule, version) {
        return false;
    }
    rule.protocol.is_none_or(|wanted| wanted.number() == query.protocol)
        && rule.not_protocol.is_none_or(|unwanted| unwanted.number() != query.protocol)
        && rule.icmp.is_none_or(|wanted| icmp_matches(wanted, query, version))
        && rule.not_icmp.is_none_or(|unwanted| unwanted.kind.is_none() || !icmp_matches(unwanted, query, version))
}

/// Whether a rule applies to an IP family. It does not if one of its lists of nets or negated nets has no net of the family, or if its
/// protocol is the *name* of ICMP of the other family.
fn is_on(rule: &Rule, version: IpVersion) -> bool {
    let of_version = |net: &ipnet::IpNet| matches!(net, ipnet::IpNet::V4(_)) == (version == IpVersion::V4);
    let lists = [&rule.source.nets, &rule.source.not_nets, &rule.destination.nets, &rule.destination.not_nets];
    let foreign = match rule.protocol {
        Some(Protocol::Icmp) => version == IpVersion::V6,
        Some(Protocol::IcmpV6) => version == IpVersion::V4,
        _ => false,
    };
    !foreign && lists.into_iter().all(|nets| nets.is_empty() || nets.iter().any(of_version))
}

/// Type and code are those of the family's own ICMP.
fn icmp_matches(wanted: Icmp, query: &Query, version: IpVersion) -> bool {
    let Some(kind) = wanted.kind else { return true };
    let protocol = if version == IpVersion::V4 { 1 } else { 58 };
    let same = |(have, code)| kind == have && wanted.code.is_none_or(|wanted| wanted == code);
    query.protocol == protocol && query.icmp.is_some_and(same)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

#[expect(clippy::too_many_arguments, reason = "the packet's parts, each named")]
fn entity_matches(
    facts: &impl Facts,
    enforcer: &str,
    policy: &Policy,
    entity: &EntityMatch,
    end: &End,
    protocol: u8,
    port: u16,
    side: Side,
) -> Tri {
    let in_nets = |nets: &[ipnet::IpNet]| nets.iter().any(|net| net.contains(&end.address));
    if !entity.nets.is_empty() && !in_nets(&entity.nets) || in_nets(&entity.not_nets) {
        return Tri::No;
    }
    let any_port = |ports: &[Port]| {
        let mut any = Tri::No;
        for wanted in ports.iter().filter(|_| has_ports(protocol)) {
            any = any.or(match wanted {
                Port::Range(first, last) => Tri::from((*first..=*last).contains(&port)),
                Port::Named(name) => {
                    facts.named_port(enforcer, entity.named_port_pods(&policy.id), name, end, protocol, port)
                }
            });
        }
        any
    };
    let mut all = Tri::Yes;
    if !entity.ports.is_empty() {
        all = all.and(any_port(&entity.ports));
    }
    if !entity.not_ports.is_empty() {
        all = all.and(!any_port(&entity.not_ports));
    }
    if let Some(service) = entity.service.as_ref().filter(|_| all != Tri::No) {
        let port = (side == Side::Destination).then_some((protocol, port));
        all = all.and(facts.backend(enforcer, service, end, port));
    }
    if let Some(selection) = entity.selection.as_ref().filter(|_| all != Tri::No) {
        all = all.and(facts.selected(enforcer, selection, end));
    }
    if let Some(unwanted) = entity.not_selection.as_ref().filter(|_| all != Tri::No) {
        all = all.and(!facts.selected(enforcer, unwanted, end));
    }
    all
}

/// TCP, UDP, DCCP, SCTP and UDP-Lite.
pub fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 6 | 17 | 33 | 132 | 136)
}
