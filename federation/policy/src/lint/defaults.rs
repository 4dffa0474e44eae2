//! Findings about traffic that no rule decides.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::check::{About, CLUSTER_WITHOUT_DEFAULT_DENY, Finding, NO_DEFAULT_DENY, PASS_TO_NOTHING};
use super::facts::{DIRECTIONS, is_subject, list_name, many};
use super::imply::{everything, families, implies, is_within};
use crate::evaluate::{Direction, OrderedTier, rules};
use crate::inventory::EndpointKind;
use crate::model::{Action, ClusterName, EntityMatch, Phase, Policy, PolicyKind, PolicySet, Selection, TierDefault};
use crate::selector::{Expr, build};
use crate::workload::Workload;

/// The families for which a policy denies, in a direction, everything that it does not allow: by the end of a tier that
/// denies, or by a rule that denies everything.
pub(super) fn closes(tier: &OrderedTier<'_>, policy: &Policy, direction: Direction) -> [bool; 2] {
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

pub(super) fn is_everything(entity: &EntityMatch, kind: PolicyKind, v4: bool) -> bool {
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
pub(super) fn open_namespaces(
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

/// Where no later tier has a policy for any of the pods whose traffic is passed.
pub(super) fn passes_to_nothing(
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
