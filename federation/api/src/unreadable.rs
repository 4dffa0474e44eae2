//! What is in force of a policy that cannot be read completely, and of which no earlier version is: unknown never opens.
//!
//! An error in a rule makes that rule unknown. An error in what the policy selects makes it select everything that a policy of its
//! kind and namespace can select, and one in its position puts it first; in both cases all its rules are unknown, since an Allow
//! would otherwise reach more than it should. Rules of a Kubernetes NetworkPolicy only allow: those that are unknown allow nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_policy::model::{
    Action, ClusterScope, EntityMatch, Order, Phase, Policy, PolicyId, PolicyKind, Rule, TierId,
};
use hanse_policy::selector::build::{self, Namespaces};
use hanse_policy::selector::{Expr, Selector};

use crate::field::FieldError;

/// Before every order that an API accepts.
const FIRST: Order = Order(Some(f64::MIN));
/// Of the reason in a rule.
const MAX_REASON_CHARACTERS: usize = 200;

/// The part of a policy in which a field is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// A rule of ingress (`true`) or egress, by its index.
    Rule(bool, u32),
    /// All rules of a direction.
    Rules(bool),
    AllRules,
    Types,
    Subject,
    Position,
    /// It changes nothing of a verdict.
    Harmless,
    /// The whole policy.
    Whole,
}

fn part_of(path: &str) -> Part {
    let Some(field) = path.strip_prefix("spec.") else {
        return match path {
            "metadata.annotations" => Part::AllRules,
            _ if path.starts_with("metadata.") => Part::Harmless,
            _ => Part::Whole,
        };
    };
    let end = field.find(['.', '[']).unwrap_or(field.len());
    let (name, rest) = field.split_at(end);
    match name {
        "ingress" | "egress" => {
            let index = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')?.0.parse().ok());
            index.map_or(Part::Rules(name == "ingress"), |index| Part::Rule(name == "ingress", index))
        }
        "types" | "policyTypes" => Part::Types,
        "selector" | "namespaceSelector" | "serviceAccountSelector" | "podSelector" | "subject" | "clusterSelector" => {
            Part::Subject
        }
        "tier" | "order" | "priority" => Part::Position,
        "performanceHints" | "stagedAction" | "doNotTrack" | "preDNAT" | "applyOnForward" => Part::Harmless,
        _ => Part::Whole,
    }
}

/// Whether an error in a field means that other endpoints may be selected.
pub fn is_of_subject(path: &str) -> bool {
    part_of(path) == Part::Subject
}

fn is_additive(kind: PolicyKind) -> bool {
    matches!(kind, PolicyKind::KubernetesNetworkPolicy | PolicyKind::StagedKubernetesNetworkPolicy)
}

/// Everything that a policy can select.
fn everything(id: &PolicyId) -> Selector {
    let expr = match (id.kind, &id.namespace) {
        (kind, Some(namespace)) if is_additive(kind) => build::kubernetes_pods(Namespaces::Named(namespace), None),
        (PolicyKind::ClusterNetworkPolicy, _) => build::kubernetes_pods(Namespaces::Any, None),
        (_, Some(namespace)) => build::in_namespace(namespace),
        (_, None) => Expr::All,
    };
    Selector::from(expr).with_written("unknown: every pod that the policy can select".to_owned())
}

/// A policy of which nothing can be read. `tier`: its tier as far as it can be read; otherwise the first of those that always exist.
/// `order`: that of all policies of its kind, if they have one.
pub fn unread(id: PolicyId, tier: Option<&str>, order: Option<f64>, why: &FieldError) -> Policy {
    let order = order.map_or(FIRST, |order| Order(Some(order)));
    let is_federated = matches!(id.kind, PolicyKind::FederatedNetworkPolicy | PolicyKind::StagedFederatedNetworkPolicy);
    let (phase, enforcers) =
        if is_federated { (Phase::Guard, ClusterScope::All) } else { (Phase::Local, ClusterScope::Local) };
    let mut policy = Policy {
        tier: TierId { phase, name: tier.unwrap_or("kube-admin").into() },
        order,
        enforcers,
        selector: everything(&id),
        ingress: None,
        egress: None,
        staged: None,
        host_only: false,
        id,
    };
    close(&mut policy.ingress, is_additive(policy.id.kind), why);
    close(&mut policy.egress, is_additive(policy.id.kind), why);
    policy
}

/// Makes unknown what errors concern. `has_positions`: other parts of the policy refer to rules by their position. Returns whether all
/// rules of ingress, and of egress, were replaced.
pub fn restrict(policy: &mut Policy, errors: &[FieldError], has_positions: bool) -> [bool; 2] {
    let is_additive = is_additive(policy.id.kind);
    let mut affected: [BTreeMap<u32, &FieldError>; 2] = Default::default();
    let mut all: [Option<&FieldError>; 2] = [None; 2];
    for error in errors {
        let part = part_of(&error.path);
        match part {
            Part::Harmless => {}
            Part::Rule(is_ingress, index) if !has_positions => {
                let rules = &mut affected[usize::from(!is_ingress)];
                // An error in the action counts before others.
                if !rules.contains_key(&index) || hides_action(error) {
                    rules.insert(index, error);
                }
            }
            Part::Rules(is_ingress) => {
                let rules = if is_ingress { &mut policy.ingress } else { &mut policy.egress };
                rules.get_or_insert_default();
                all[usize::from(!is_ingress)].get_or_insert(error);
            }
            Part::Types => {
                for (rules, all) in [&mut policy.ingress, &mut policy.egress].into_iter().zip(&mut all) {
                    if rules.is_none() {
                        *rules = Some(Vec::new());
                        all.get_or_insert(error);
                    }
                }
            }
            Part::Rule(..) | Part::AllRules | Part::Subject | Part::Position | Part::Whole => {
                if matches!(part, Part::Subject | Part::Whole) {
                    policy.selector = everything(&policy.id);
                }
                if matches!(part, Part::Position | Part::Whole) && !is_additive {
                    policy.order = FIRST;
                }
                if part == Part::Whole {
                    policy.ingress.get_or_insert_default();
                    policy.egress.get_or_insert_default();
                }
                for all in &mut all {
                    all.get_or_insert(error);
                }
            }
        }
    }
    for (rules, (all, affected)) in [&mut policy.ingress, &mut policy.egress].into_iter().zip(all.iter().zip(&affected))
    {
        match all {
            Some(error) if rules.is_some() => close(rules, is_additive, error),
            _ => rules.iter_mut().for_each(|rules| replace(rules, affected, is_additive)),
        }
    }
    all.map(|all| all.is_some())
}

/// Makes all rules unknown, and frees them.
pub fn close_rules(policy: &mut Policy, error: &FieldError) {
    let is_additive = is_additive(policy.id.kind);
    for rules in [&mut policy.ingress, &mut policy.egress].into_iter().filter(|rules| rules.is_some()) {
        *rules = Some(Vec::new());
        close(rules, is_additive, error);
    }
}

fn hides_action(error: &FieldError) -> bool {
    error.path.ends_with(".action") || error.path.ends_with(']')
}

/// Replaces rules by unknown ones of the same action.
fn replace(rules: &mut Vec<Rule>, affected: &BTreeMap<u32, &FieldError>, is_additive: bool) {
    if is_additive {
        for rule in rules {
            if let Some(error) = affected.get(&rule.index) {
                rule.not_understood = Some(reason(error));
            }
        }
        return;
    }
    let mut actions: BTreeMap<u32, Action> = BTreeMap::new();
    rules.retain(|rule| {
        let is_affected = affected.contains_key(&rule.index);
        if is_affected {
            actions.insert(rule.index, rule.action);
        }
        !is_affected
    });
    if affected.is_empty() {
        return;
    }
    for (index, error) in affected {
        let action = actions.get(index).copied().filter(|_| !hides_action(error)).unwrap_or(Action::Deny);
        rules.push(unknown_rule(action, *index, error));
    }
    rules.sort_by_key(|rule| rule.index);
}

fn close(rules: &mut Option<Vec<Rule>>, is_additive: bool, error: &FieldError) {
    match is_additive {
        true => rules.get_or_insert_default().iter_mut().for_each(|rule| rule.not_understood = Some(reason(error))),
        false => *rules = Some(vec![unknown_rule(Action::Deny, 0, error)]),
    }
}

fn reason(error: &FieldError) -> Arc<str> {
    error.to_string().chars().take(MAX_REASON_CHARACTERS).collect::<String>().into()
}

fn unknown_rule(action: Action, index: u32, error: &FieldError) -> Rule {
    Rule {
        action,
        index,
        ip_version: None,
        protocol: None,
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: EntityMatch::default(),
        destination: EntityMatch::default(),
        http: None,
        not_understood: Some(reason(error)),
    }
}
