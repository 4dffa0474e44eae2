//! Findings about single rules.

use super::check::*;
use super::facts::{Facts, named};
use super::imply::{self, everything, families, is_contradictory, is_within};
use super::{dns, pitfalls, ports};
use crate::evaluate::Direction;
use crate::model::{Action, ClusterName, EntityMatch, Policy, Port, Protocol, Rule, Selection};

/// Findings about a single rule.
pub(super) fn about(
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
pub(super) fn traffic(rule: &Rule) -> String {
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
pub(super) fn contradiction(rule: &Rule) -> Option<String> {
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

pub(super) fn entity_contradiction(side: &str, entity: &EntityMatch) -> Option<String> {
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
pub(super) fn is_world(entity: &EntityMatch) -> bool {
    entity.selection.is_none()
        && entity.service.is_none()
        && (entity.nets.is_empty() || [true, false].iter().any(|v4| is_within(&everything(*v4), &entity.nets)))
        && entity.ports.iter().all(|port| matches!(port, Port::Range(..)))
}
