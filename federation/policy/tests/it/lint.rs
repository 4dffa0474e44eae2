//! What lint calls certain is: no packet of a random world contradicts it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use hanse_policy::evaluate::{Direction, Effect, Step, View, evaluate};
use hanse_policy::lint::{About, RULE_NEVER_MATCHES, RULE_REDUNDANT, RULE_SHADOWED, lint};
use hanse_policy::model::PolicyId;

use crate::worlds::{Random, query, world};

#[test]
fn shadowed_and_impossible_rules_never_decide() {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..600 {
        let mut random = Random(seed);
        let world = world(&mut random);
        // By policy, list and rule; without a rule, the whole list.
        let mut dead: HashMap<(PolicyId, Direction, Option<u32>), &str> = HashMap::new();
        for finding in lint(&world.policies, &world.inventory, &BTreeSet::new(), &[]) {
            let certain = [RULE_SHADOWED, RULE_REDUNDANT, RULE_NEVER_MATCHES].contains(&finding.check);
            let About::Policy(policy, rule) = finding.about else { continue };
            if !certain {
                continue;
            }
            *counts.entry(finding.check.id).or_default() += 1;
            let direction = match rule {
                Some((direction, _)) => direction,
                None if finding.message.starts_with("its ingress") => Direction::Ingress,
                None => Direction::Egress,
            };
            dead.insert((policy, direction, rule.map(|(_, index)| index)), finding.check.id);
        }
        for _ in 0..400 {
            let packet = query(&mut random, &world.inventory);
            let answer = evaluate(&world.policies, &world.inventory, &packet, View::Enforced);
            for (direction, judgement) in [(Direction::Egress, answer.egress), (Direction::Ingress, answer.ingress)] {
                for step in judgement.into_iter().flat_map(|it| it.trace) {
                    let Step::Rule { policy, index, effect, .. } = step else { continue };
                    if effect == Effect::NotEnforced {
                        continue;
                    }
                    *counts.entry("rules that acted").or_default() += 1;
                    let own = dead.get(&(policy.clone(), direction, Some(index)));
                    let whole = dead.get(&(policy.clone(), direction, None));
                    // What may match denies, though it can never match for certain.
                    let id = own.filter(|id| **id != RULE_NEVER_MATCHES.id || effect != Effect::DeniedUnknown);
                    assert_eq!(id.or(whole), None, "seed {seed}: {policy:?} {direction:?} {index} acts on {packet:?}");
                }
            }
        }
    }
    println!("{counts:?}");
    for check in [RULE_SHADOWED, RULE_REDUNDANT, RULE_NEVER_MATCHES] {
        assert!(counts.get(check.id).is_some_and(|count| *count >= 20), "{} is hardly tried: {counts:?}", check.id);
    }
}
