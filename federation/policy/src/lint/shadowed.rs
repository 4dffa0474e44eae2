//! Rules, and whole policies, that never decide: [`super::imply`] proves that an earlier rule matches everything that they match.

use std::collections::{BTreeMap, HashMap};

use super::check::{About, Check, Finding, RULE_REDUNDANT, RULE_SHADOWED};
use super::facts::{DIRECTIONS, action_verb, enforcers, list_name, required_labels, title, written};
use super::imply::{covers, implies};
use crate::evaluate::{Direction, OrderedTier, order, rules};
use crate::inventory::Inventory;
use crate::model::{Action, Policy, PolicyId, PolicyKind, PolicySet, Rule, TierDefault};
use crate::selector::Expr;

/// A policy in its place in one cluster and one direction.
struct Asked<'a> {
    tier: usize,
    policy: &'a Policy,
    rules: &'a [Rule],
    /// The number of its subject.
    subject: usize,
}

/// The rule or policy that decides earlier.
type Witness = (Check, String);

/// Rules, and whole policies, before which something else decides, in every cluster that enforces them.
pub fn decided_before(policies: &PolicySet, inventory: &Inventory) -> Vec<Finding> {
    let mut found: BTreeMap<(&PolicyId, Direction, Option<u32>), Vec<Witness>> = BTreeMap::new();
    for (cluster, owner) in &inventory.clusters {
        let tiers = order(policies, cluster);
        for direction in DIRECTIONS {
            in_one_cluster(&tiers, owner.federated_allow_final, direction, |policy, index, witness| {
                found.entry((&policy.id, direction, index)).or_default().push(witness);
            });
        }
    }
    let all = [&policies.federation].into_iter().chain(policies.clusters.values());
    let all: BTreeMap<&PolicyId, &Policy> = all.flat_map(|layer| &layer.policies).collect();
    let mut findings = Vec::new();
    for ((id, direction, index), mut witnesses) in found {
        let enforced_by = enforcers(all[id], inventory).len();
        if witnesses.len() < enforced_by {
            continue;
        }
        // As shadowed as where it is least.
        witnesses.sort_by_key(|(check, _)| check.severity);
        let (check, message) = witnesses.remove(0);
        let about = About::Policy(id.clone(), index.map(|index| (direction, index)));
        findings.push(Finding { check, cluster: id.cluster.clone(), about, message });
    }
    findings
}

fn in_one_cluster<'a>(
    tiers: &[OrderedTier<'a>],
    federated_allow_final: bool,
    direction: Direction,
    mut found: impl FnMut(&'a Policy, Option<u32>, Witness),
) {
    let (mut subjects, mut numbers): (Vec<&Expr>, HashMap<&str, usize>) = (Vec::new(), HashMap::new());
    let mut asked: Vec<Asked<'a>> = Vec::new();
    for (tier, it) in tiers.iter().enumerate() {
        for policy in it.policies.iter().copied() {
            let Some(rules) = rules(policy, direction).filter(|_| policy.acts()) else { continue };
            let subject = *numbers.entry(&policy.selector.canonical).or_insert(subjects.len());
            if subject == subjects.len() {
                subjects.push(&policy.selector.expr);
            }
            asked.push(Asked { tier, policy, rules, subject });
        }
    }
    let wider = wider_subjects(&subjects);
    let mut by_subject: Vec<Vec<usize>> = vec![Vec::new(); subjects.len()];
    for (at, it) in asked.iter().enumerate() {
        by_subject[it.subject].push(at);
    }
    let leaves = |it: &Asked<'_>, rule: &Rule| {
        rule.action == Action::Allow && it.policy.id.cluster.is_none() && !federated_allow_final
    };
    // Whether something leaves a tier before its end; and whether something leaves its phase.
    let some = |tier: usize, holds: &dyn Fn(&Asked<'_>, &Rule) -> bool| {
        asked.iter().filter(|it| it.tier == tier).any(|it| it.rules.iter().any(|rule| holds(it, rule)))
    };
    let passes: Vec<bool> = (0..tiers.len()).map(|tier| some(tier, &|_, rule| rule.action == Action::Pass)).collect();
    let left: Vec<bool> = (0..tiers.len()).map(|tier| some(tier, &leaves)).collect();
    // Whether what reaches `target` was evaluated to the end in `first` before it: nothing passed on, or left the phase.
    let whole = |first: usize, target: usize| {
        let (first_phase, phase) = (tiers[first].id.phase, tiers[target].id.phase);
        !passes[first]
            && (first_phase == phase || !(0..=first).any(|tier| left[tier] && tiers[tier].id.phase == first_phase))
    };
    let ends = |first: usize, target: usize| tiers[first].default == TierDefault::Deny && whole(first, target);
    for (at, target) in asked.iter().enumerate() {
        let mut before: Vec<usize> = wider[target.subject].iter().flat_map(|it| &by_subject[*it]).copied().collect();
        before.retain(|first| *first < at);
        before.sort_unstable();
        let ending = before.iter().find(|first| {
            let tier = asked[**first].tier;
            tier < target.tier && ends(tier, target.tier)
        });
        if let Some(ending) = ending {
            // What only denies is a backstop: that it is not evaluated changes nothing.
            if target.rules.iter().all(|rule| rule.action == Action::Deny) {
                continue;
            }
            let (tier, policy) = (&tiers[asked[*ending].tier].id.name, title(&asked[*ending].policy.id));
            let list = list_name(direction);
            let message = format!(
                "its {list} is never evaluated: {policy} selects the same pods, and tier {tier} denies the traffic that it does not decide"
            );
            found(target.policy, None, (RULE_SHADOWED, message));
            continue;
        }
        'rules: for (index, parts) in written(target.rules) {
            let mut witness: Option<(&Asked<'_>, &Rule)> = None;
            for part in parts {
                let decides = |first: &Asked<'_>, rule: &Rule| {
                    first.tier == target.tier
                        || whole(first.tier, target.tier)
                            && match rule.action {
                                Action::Deny => true,
                                Action::Allow => {
                                    !leaves(first, rule) || tiers[first.tier].id.phase == tiers[target.tier].id.phase
                                }
                                Action::Pass | Action::Log => false,
                            }
                };
                let own = target.rules.iter().take_while(|rule| !std::ptr::eq(*rule, part));
                let own = own.filter(|rule| rule.index != index).map(|rule| (target, rule));
                let others = before.iter().map(|first| &asked[*first]);
                let others = others.flat_map(|first| first.rules.iter().map(move |rule| (first, rule)));
                let first = others.chain(own).find(|(first, rule)| {
                    decides(first, rule) && covers((rule, &first.policy.id), (part, &target.policy.id))
                });
                let Some(first) = first else { continue 'rules };
                // The one that does something else than the rule says more.
                if witness.is_none_or(|(_, known)| known.action == part.action) {
                    witness = Some(first);
                }
            }
            let Some((first, rule)) = witness else { continue };
            let same = parts_action(target.rules, index) == Some(rule.action);
            let elsewhere = !std::ptr::eq(first.policy, target.policy);
            let additive = |policy: &Policy| policy.id.kind == PolicyKind::KubernetesNetworkPolicy;
            if same && elsewhere && additive(first.policy) && additive(target.policy) {
                // These policies add up; that two of them open the same is how they are written.
                continue;
            }
            // Which of them comes first is not certain: [`ties`].
            let [before, after] = [first.policy, target.policy];
            let of_clusters = [before, after].iter().all(|it| it.id.kind == PolicyKind::ClusterNetworkPolicy);
            if elsewhere && !same && of_clusters && first.tier == target.tier && before.order == after.order {
                continue;
            }
            let by = match elsewhere {
                true => format!("{} {}[{}]", title(&first.policy.id), list_name(direction), rule.index),
                false => format!("rule {}", rule.index),
            };
            let tier = &tiers[first.tier].id.name;
            let of_tier = if first.tier == target.tier { String::new() } else { format!(" in tier {tier}") };
            let action = action_verb(rule.action);
            let check = if same && elsewhere { RULE_REDUNDANT } else { RULE_SHADOWED };
            found(
                target.policy,
                Some(index),
                (check, format!("{by}{of_tier} comes first and {action} everything that it matches")),
            );
        }
    }
}

fn parts_action(list: &[Rule], index: u32) -> Option<Action> {
    list.iter().find(|rule| rule.index == index).map(|rule| rule.action)
}

/// For each subject those that select all that it does, itself included, as far as that is shown.
fn wider_subjects(subjects: &[&Expr]) -> Vec<Vec<usize>> {
    // A wider subject that asks for a label is found by that label.
    let mut by_label: HashMap<Option<(&str, Option<&str>)>, Vec<usize>> = HashMap::new();
    for (at, subject) in subjects.iter().enumerate() {
        let mut asked = required_labels(subject);
        asked.sort_by_key(|(_, value)| value.is_none());
        by_label.entry(asked.first().copied()).or_default().push(at);
    }
    let wider = |subject: &&Expr| {
        let mut keys = vec![None];
        for (key, value) in required_labels(subject) {
            keys.extend([Some((key, None)), Some((key, value))]);
        }
        keys.sort_unstable();
        keys.dedup();
        let candidates = keys.iter().filter_map(|key| by_label.get(key)).flatten().copied();
        candidates.filter(|at| implies(subject, subjects[*at])).collect()
    };
    subjects.iter().map(wider).collect()
}
