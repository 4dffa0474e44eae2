//! Runs all checks.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::check::*;
use super::facts::{DIRECTIONS, Facts, counts, enforcers, named, without_pods, written};
use super::imply::is_contradictory;
use super::rules::about;
use super::{defaults, dns, pitfalls, services, shadowed, ties};
use crate::evaluate::{Direction, order, rules};
use crate::inventory::Inventory;
use crate::model::{ClusterName, PolicyId, PolicySet, TierId};
use crate::workload::{relevant_keys, workloads};

/// All findings, each once, in a stable order. `hosts`: the clusters with host endpoints, which policies may select instead
/// of pods. `without_tier`: federated policies that are not in force because their tier has no object.
pub fn lint(
    policies: &PolicySet,
    inventory: &Inventory,
    hosts: &BTreeSet<ClusterName>,
    without_tier: &[(PolicyId, TierId)],
) -> Vec<Finding> {
    let workloads = workloads(inventory, &relevant_keys([policies]));
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
        defaults::open_namespaces(&tiers, name, own, &mut findings);
        defaults::passes_to_nothing(policies, &tiers, name, own, &mut findings);
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
