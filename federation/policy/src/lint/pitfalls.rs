//! Frequent mistakes in Calico's policies, which users report as bugs.

use crate::evaluate::{Direction, rules};
use crate::inventory::{Cluster, EffectiveLabels, EndpointKind, Inventory};
use crate::model::{Action, ClusterName, Policy, PolicyKind, Rule, Selection, TierDefault};
use crate::selector::{Expr, Selector, build};
use crate::tri::Tri;

use super::facts::{Facts, list_name, required_labels};
use super::imply::excludes;

/// Where a policy's rules in this direction are all Log, in a tier that denies.
pub fn only_logs(policy: &Policy, direction: Direction, default: TierDefault) -> Option<String> {
    let list = rules(policy, direction)?;
    let only = !list.is_empty() && list.iter().all(|rule| rule.action == Action::Log);
    (only && default == TierDefault::Deny).then(|| {
        let (list, tier) = (list_name(direction), &policy.tier.name);
        format!("{list} has only Log rules: traffic that they log is denied at the end of tier {tier}")
    })
}

/// The end of a rule that is the policy's own pod: its name, and its selection.
pub fn own_end(rule: &Rule, direction: Direction) -> Option<(&'static str, &Selection)> {
    let (name, entity) = match direction {
        Direction::Ingress => ("destination", &rule.destination),
        Direction::Egress => ("source", &rule.source),
    };
    Some((name, entity.selection.as_ref()?))
}

/// Why the selection of a rule's own end excludes all of the policy's pods, where that is proven.
pub(super) fn own_end_excludes(
    policy: &Policy,
    rule: &Rule,
    direction: Direction,
    enforcers: &[&ClusterName],
    facts: &Facts<'_>,
) -> Option<String> {
    let (name, selection) = own_end(rule, direction)?;
    let (list, asked) = (list_name(direction), selection.selector.shown());
    let never = excludes(&policy.selector.expr, &selection.selector.expr) && !facts.selects_set(enforcers, selection);
    never.then(|| format!("{asked} excludes the policy's own pods, which are the {name} of all {list}"))
}

/// The selection of a rule's own end, where some of the policy's pods are known and none of them matches it.
pub(super) fn own_end_missed(
    policy: &Policy,
    rule: &Rule,
    direction: Direction,
    enforcers: &[&ClusterName],
    facts: &Facts<'_>,
) -> Option<String> {
    let (name, selection) = own_end(rule, direction)?;
    if facts.selects_set(enforcers, selection) {
        return None;
    }
    let mut has_pods = false;
    for enforcer in enforcers {
        for pods in facts.subjects(enforcer, &policy.selector) {
            has_pods = true;
            let (id, endpoint) = pods.members[0];
            if crate::inventory::selects(enforcer, selection, enforcer, pods.owner, id, endpoint) != Tri::No {
                return None;
            }
        }
    }
    let (list, asked) = (list_name(direction), selection.selector.shown());
    has_pods.then(|| format!("{asked} selects none of the policy's own pods, which are the {name} of all {list}"))
}

/// Where a selector compares `projectcalico.org/name`, which is a label of namespaces and accounts only.
pub fn names_a_namespace(selector: &Selector) -> Option<String> {
    let mut found = false;
    selector.expr.for_each_key(&mut |key| found |= &**key == build::NAME);
    found.then(|| {
        format!(
            "{} is a label of namespaces: compare it in a namespaceSelector, or compare {} in the selector",
            build::NAME,
            build::NAMESPACE
        )
    })
}

/// The namespace that a selection requires and that is not among those that are known, where only manifests of workloads
/// were read: pods that run come with all namespaces of their cluster, manifests with those of an application.
pub(super) fn unread_namespace<'s>(
    selection: &'s Selection,
    enforcers: &[&ClusterName],
    inventory: &Inventory,
) -> Option<&'s str> {
    let is_name = |key: &str| {
        let of_namespace = key.strip_prefix(build::NAMESPACE_PREFIX);
        key == build::NAMESPACE || matches!(of_namespace, Some(build::NAME | "kubernetes.io/metadata.name"))
    };
    let required = required_labels(&selection.selector.expr);
    let name = required.into_iter().find_map(|(key, value)| value.filter(|_| is_name(key)))?;
    let in_scope = inventory
        .clusters
        .iter()
        .filter(|(cluster, _)| enforcers.iter().any(|enforcer| selection.clusters.contains(enforcer, cluster)));
    let is_unread = |(_, cluster): (&ClusterName, &Cluster)| {
        let mut pods = cluster.endpoints.iter().filter(|(id, _)| id.kind == EndpointKind::Pod);
        !cluster.namespaces.contains_key(name) && pods.all(|(_, pod)| pod.planned.is_some())
    };
    let mut in_scope = in_scope.peekable();
    (in_scope.peek().is_some() && in_scope.all(is_unread)).then_some(name)
}

/// The global network set that a selection would select, were it not limited to namespaces.
pub fn missed_global_set<'i>(
    policy: &Policy,
    selection: &Selection,
    enforcers: &[&ClusterName],
    inventory: &'i Inventory,
) -> Option<&'i str> {
    let is_calico = matches!(
        policy.id.kind,
        PolicyKind::CalicoNetworkPolicy
            | PolicyKind::CalicoGlobalNetworkPolicy
            | PolicyKind::StagedNetworkPolicy
            | PolicyKind::StagedGlobalNetworkPolicy
    );
    let Expr::And(parts) = &selection.selector.expr else { return None };
    let (scope, asked): (Vec<&Expr>, Vec<&Expr>) = parts.iter().partition(|part| is_namespace_scope(part));
    if !is_calico || scope.is_empty() || asked.is_empty() {
        return None;
    }
    let asked = build::all_of(asked.into_iter().cloned());
    let clusters = enforcers.iter().filter_map(|name| inventory.clusters.get(*name));
    let mut sets = clusters.flat_map(|cluster| cluster.endpoints.iter().map(move |(id, set)| (cluster, id, set)));
    let found = sets.find(|(cluster, id, endpoint)| {
        let labels = EffectiveLabels { cluster, id, endpoint, first_hand: true };
        id.kind == EndpointKind::NetworkSet && id.namespace.is_none() && asked.evaluate(&labels) == Tri::Yes
    });
    found.map(|(_, id, _)| &*id.name)
}

/// Whether an expression is about the namespace only.
fn is_namespace_scope(expr: &Expr) -> bool {
    let (mut any, mut only) = (false, true);
    expr.for_each_key(&mut |key| {
        any = true;
        only &= &**key == build::NAMESPACE || key.starts_with(build::NAMESPACE_PREFIX);
    });
    any && only
}
