//! Port names that no pod has: mostly typing errors, or names that containers declare with another protocol.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::inventory::{EndpointKind, selects};
use crate::model::{ClusterName, EntityMatch, Policy, Port, Protocol, Rule};
use crate::tri::Tri;

use super::facts::{Facts, named, subject_of};

/// Names that are listed.
const MAX_NAMES: usize = 5;

/// The names of ports of one end that match on no pod, for people. Nothing where no pod is known, or where pods get ports that
/// are not known before they run. `is_own`: the end is the policy's own pod.
pub(super) fn without_pods(
    policy: &Policy,
    rule: &Rule,
    (side, entity): (&str, &EntityMatch),
    is_own: bool,
    enforcers: &[&ClusterName],
    facts: &Facts<'_>,
) -> Vec<String> {
    let of = |ports: &[Port]| -> BTreeSet<Arc<str>> {
        let names =
            ports.iter().filter_map(|port| if let Port::Named(name) = port { Some(name.clone()) } else { None });
        names.collect()
    };
    let lists = [("port", of(&entity.ports)), ("notPorts", of(&entity.not_ports))];
    if lists.iter().all(|(_, names)| names.is_empty()) {
        return Vec::new();
    }
    let selection = entity.named_port_pods(&policy.id);
    if named(&selection.clusters).any(|name| !facts.inventory.clusters.contains_key(name)) {
        return Vec::new();
    }
    let mut has_pods = false;
    let mut known: BTreeSet<(&str, u8)> = BTreeSet::new();
    for enforcer in enforcers {
        for workload in facts.workloads.values().flatten() {
            let (id, endpoint) = workload.members[0];
            let is_subject = || workload.cluster == *enforcer && subject_of(workload, &policy.selector) != Tri::No;
            if id.kind != EndpointKind::Pod
                || selects(enforcer, selection, workload.cluster, workload.owner, id, endpoint) == Tri::No
                || is_own && !is_subject()
            {
                continue;
            }
            has_pods = true;
            for (_, pod) in &workload.members {
                if pod.planned.as_ref().is_some_and(|planned| planned.run_time_ports) {
                    return Vec::new();
                }
                known.extend(pod.ports.iter().map(|port| (&*port.name, port.protocol)));
            }
        }
        // A DNS server that is not among the pods here has the ports of one.
        for (name, owner) in &facts.assumed {
            for (id, pod) in &owner.endpoints {
                if !is_own && selects(enforcer, selection, name, owner, id, pod) != Tri::No {
                    known.extend(pod.ports.iter().map(|port| (&*port.name, port.protocol)));
                }
            }
        }
    }
    if !has_pods {
        return Vec::new();
    }
    let whose = if is_own { "the policy's own pods" } else { "the pods that it can match" };
    let matches = |protocol: u8| {
        let number = |protocol: Protocol| protocol.number();
        rule.protocol.map(number).is_none_or(|it| it == protocol)
            && rule.not_protocol.map(number).is_none_or(|it| it != protocol)
    };
    let wrong = |list: &str, name: &Arc<str>| {
        let protocols: BTreeSet<u8> = known.iter().filter(|(it, _)| **it == **name).map(|(_, it)| *it).collect();
        if protocols.iter().any(|protocol| matches(*protocol)) {
            return None;
        }
        let what = format!("{side} {list} {name:?}");
        if protocols.is_empty() {
            let names: BTreeSet<&str> = known.iter().map(|(name, _)| *name).collect();
            let more = if names.len() > MAX_NAMES { ", …" } else { "" };
            let names: Vec<&str> = names.into_iter().take(MAX_NAMES).collect();
            let others = match names.is_empty() {
                true => "they have none".to_owned(),
                false => format!("they have {}{more}", names.join(", ")),
            };
            return Some(format!("{what}: no container of {whose} has a port of this name ({others})"));
        }
        let protocols: Vec<String> = protocols.into_iter().map(crate::explain::protocol_name).collect();
        let protocols = protocols.join(" and ");
        Some(format!("{what}: {whose} have it for {protocols} only, which the rule does not match"))
    };
    let wrong = lists.iter().flat_map(|(list, names)| names.iter().filter_map(|name| wrong(list, name)));
    wrong.collect()
}
