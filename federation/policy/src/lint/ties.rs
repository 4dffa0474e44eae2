//! ClusterNetworkPolicies of one tier with equal priority that contradict each other. The API does not define their order; Hanse sorts
//! them by name, other implementations may not.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::evaluate::{Direction, OrderedTier, rules};
use crate::inventory::{EndpointKind, selects};
use crate::model::{Action, ClusterName, EntityMatch, Policy, PolicyKind, Port, Rule};
use crate::tri::Tri;
use crate::workload::Workload;

use super::check::{About, EQUAL_PRIORITY, Finding};
use super::facts::{DIRECTIONS, Workloads, is_subject, list_name, title};

/// Policies of one priority that are compared: 4,950 pairs.
const MAX_POLICIES: usize = 100;

/// A policy with what it selects in the cluster.
struct Candidate<'p> {
    policy: &'p Policy,
    subjects: Vec<bool>,
    /// Of ingress, and of egress.
    rules: [Vec<Side<'p>>; 2],
}

/// A rule with the endpoints that its peer certainly selects.
struct Side<'p> {
    rule: &'p Rule,
    peer: &'p EntityMatch,
    selected: Vec<bool>,
}

pub(super) fn equal_priorities(
    tiers: &[OrderedTier<'_>],
    name: &ClusterName,
    workloads: &Workloads<'_>,
    findings: &mut Vec<Finding>,
) {
    let own = workloads.get(name).map_or(&[][..], Vec::as_slice);
    let all: Vec<&Workload<'_>> = workloads.values().flatten().collect();
    for tier in tiers {
        let is_of_kind = |policy: &&&Policy| policy.id.kind == PolicyKind::ClusterNetworkPolicy && policy.acts();
        let policies: Vec<&Policy> = tier.policies.iter().filter(is_of_kind).copied().collect();
        for tied in policies.chunk_by(|a, b| a.order == b.order).filter(|tied| tied.len() > 1) {
            let tied = tied.iter().take(MAX_POLICIES);
            let tied: Vec<Candidate<'_>> = tied.map(|policy| Candidate::new(policy, name, own, &all)).collect();
            for (at, second) in tied.iter().enumerate() {
                for first in &tied[..at] {
                    findings.extend(contradiction(first, second, &all));
                }
            }
        }
    }
}

impl<'p> Candidate<'p> {
    fn new(policy: &'p Policy, name: &ClusterName, own: &[Workload<'_>], all: &[&Workload<'_>]) -> Self {
        let subjects =
            own.iter().map(|it| it.members[0].0.kind == EndpointKind::Pod && is_subject(it, &policy.selector));
        let side = |direction, rule: &'p Rule| {
            let peer = match direction {
                Direction::Ingress => &rule.source,
                Direction::Egress => &rule.destination,
            };
            let is_selected = |it: &&Workload<'_>| {
                let (id, endpoint) = it.members[0];
                peer.selection
                    .as_ref()
                    .is_some_and(|selection| selects(name, selection, it.cluster, it.owner, id, endpoint) == Tri::Yes)
            };
            Side { rule, peer, selected: all.iter().map(is_selected).collect() }
        };
        let of = |direction| {
            let known = rules(policy, direction).unwrap_or_default().iter();
            known.filter(|rule| rule.unknown_because().is_none()).map(|rule| side(direction, rule)).collect()
        };
        Self { policy, subjects: subjects.collect(), rules: DIRECTIONS.map(of) }
    }
}

/// The first rules of two policies that decide otherwise of a packet that both match.
fn contradiction(first: &Candidate<'_>, second: &Candidate<'_>, all: &[&Workload<'_>]) -> Vec<Finding> {
    if !intersect(&first.subjects, &second.subjects) {
        return Vec::new();
    }
    let of = |(at, direction): (usize, Direction)| {
        let pairs = second.rules[at].iter().flat_map(|b| first.rules[at].iter().map(move |a| (a, b)));
        let (a, b) = pairs.into_iter().find(|(a, b)| {
            let decide = a.rule.action != b.rule.action && a.rule.action != Action::Log && b.rule.action != Action::Log;
            decide && same_traffic(a.rule, b.rule) && same_peer(a, b, all)
        })?;
        let (list, other) = (list_name(direction), title(&first.policy.id));
        let priority = first.policy.order.0.unwrap_or_default();
        let message = format!(
            "it contradicts {list}[{}] of {other}, which has the same priority {priority}: the API leaves their order to the \
             implementation (Hanse orders them by name)",
            a.rule.index
        );
        let about = About::Policy(second.policy.id.clone(), Some((direction, b.rule.index)));
        Some(Finding { check: EQUAL_PRIORITY, cluster: second.policy.id.cluster.clone(), about, message })
    };
    DIRECTIONS.into_iter().enumerate().filter_map(of).collect()
}

fn intersect(a: &[bool], b: &[bool]) -> bool {
    a.iter().zip(b).any(|(a, b)| *a && *b)
}

fn same_traffic(a: &Rule, b: &Rule) -> bool {
    let protocols = [a, b].map(|rule| rule.protocol.map(crate::model::Protocol::number));
    let ports = [&a.destination.ports, &b.destination.ports];
    let shared = |one: &Port, other: &Port| match (one, other) {
        (Port::Range(low, high), Port::Range(from, to)) => low <= to && from <= high,
        (Port::Named(one), Port::Named(other)) => one == other,
        // Which number a name is differs from pod to pod.
        _ => false,
    };
    (protocols[0].is_none() || protocols[1].is_none() || protocols[0] == protocols[1])
        && (ports.iter().any(|ports| ports.is_empty())
            || ports[0].iter().any(|one| ports[1].iter().any(|other| shared(one, other))))
}

/// Whether some endpoint or address is the peer of both.
fn same_peer(a: &Side<'_>, b: &Side<'_>, all: &[&Workload<'_>]) -> bool {
    let is_any = |side: &Side<'_>| side.peer.selection.is_none() && side.peer.nets.is_empty();
    let is_some = |side: &Side<'_>| is_any(side) || !side.peer.nets.is_empty() || side.selected.contains(&true);
    let of_pods = |selected: &Side<'_>, nets: &[IpNet]| {
        let mut chosen = all.iter().zip(&selected.selected).filter(|(_, chosen)| **chosen);
        let within = |address: &IpAddr| nets.iter().any(|net| net.contains(address));
        chosen.any(|(it, _)| it.members.iter().flat_map(|(_, pod)| &pod.addresses).any(within))
    };
    if is_any(a) || is_any(b) {
        return is_some(a) && is_some(b);
    }
    let overlap = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
    intersect(&a.selected, &b.selected)
        || a.peer.nets.iter().any(|one| b.peer.nets.iter().any(|other| overlap(one, other)))
        || of_pods(a, &b.peer.nets)
        || of_pods(b, &a.peer.nets)
}
