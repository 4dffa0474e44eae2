//! Rule sets say what the reference evaluator says.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_compiler::Input;
use hanse_policy::evaluate::{End, Step, Verdict, View, evaluate};
use hanse_policy::model::{ClusterName, EntityMatch, PolicySet};
use hanse_ruleset::{Hook, NodeConfig, Packet, RuleSet};

use crate::shared::{NODES, compile, place_pods, rule_sets};
use crate::worlds::{Random, World, query, world};

const WORLDS: u64 = 400;
const QUERIES: usize = 60;

fn seed() -> u64 {
    std::env::var("HANSE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_124)
}

/// The seeds of worlds are the run's seed and what follows it.
#[test]
fn rule_sets_agree_with_the_reference() {
    let seed = seed();
    println!("seed {seed}");
    let mut verdicts: BTreeMap<String, usize> = BTreeMap::new();
    let mut clauses: BTreeMap<&str, usize> = BTreeMap::new();
    let mut effects: BTreeMap<String, usize> = BTreeMap::new();
    for offset in 0..WORLDS {
        let mut random = Random(seed + offset);
        let mut world = world(&mut random);
        place_pods(&mut world);
        count_clauses(&world.policies, &mut clauses);
        let compiled: BTreeMap<ClusterName, BTreeMap<_, RuleSet>> = world
            .inventory
            .clusters
            .keys()
            .map(|name| (name.clone(), rule_sets(&mut compile(&world, name)).into_iter().collect()))
            .collect();
        let obvious: BTreeMap<ClusterName, BTreeMap<_, RuleSet>> =
            world.inventory.clusters.keys().map(|name| (name.clone(), obvious(&world, name))).collect();
        for _ in 0..QUERIES {
            let query = query(&mut random, &world.inventory);
            let wanted = evaluate(&world.policies, &world.inventory, &query, View::Enforced);
            let packet = Packet {
                source: query.source.address,
                destination: query.destination.address,
                protocol: query.protocol,
                source_port: query.source_port,
                destination_port: query.destination_port,
                icmp: query.icmp,
            };
            for (which, compiled) in [("compiler", &compiled), ("whole", &obvious)] {
                let mut found = Verdict::Allow;
                let mut trace = Vec::new();
                for end in [&query.source, &query.destination] {
                    let Some(rules) = rules_of(&world, compiled, end) else { continue };
                    let outcome = hanse_ruleset::evaluate(rules, &packet, Hook::Forward);
                    if outcome.verdict == hanse_ruleset::Verdict::Deny {
                        found = Verdict::Deny;
                    }
                    trace.push(outcome.trace);
                }
                let seed = seed + offset;
                let same = found == wanted.verdict;
                assert!(same, "seed {seed}, {which}: {query:?}\nreference {wanted:#?}\nrules {trace:#?}");
            }
            *verdicts.entry(format!("{:?}", wanted.verdict)).or_default() += 1;
            for step in wanted.egress.iter().chain(&wanted.ingress).flat_map(|it| &it.trace) {
                let what = match step {
                    Step::Rule { action, effect, .. } => format!("{action:?} {effect:?}"),
                    Step::EndOfTier { action, .. } => format!("end of tier {action:?}"),
                    Step::Profile => "profile".into(),
                    Step::Itself => "itself".into(),
                };
                *effects.entry(what).or_default() += 1;
            }
        }
    }
    println!("verdicts {verdicts:?}\nsteps {effects:#?}\nclauses {clauses:#?}");
    let all: usize = verdicts.values().sum();
    assert!(verdicts.values().all(|count| count * 10 >= all * 3), "unbalanced: {verdicts:?}");
}

fn obvious(world: &World, cluster: &ClusterName) -> BTreeMap<Arc<str>, RuleSet> {
    let nodes = NODES.iter().map(|name| ((*name).into(), NodeConfig::default())).collect();
    let (policies, inventory) = (&world.policies, &world.inventory);
    hanse_compiler::compile(Input { cluster, policies, inventory, nodes: &nodes }).nodes
}

fn rules_of<'a>(
    world: &World,
    compiled: &'a BTreeMap<ClusterName, BTreeMap<Arc<str>, RuleSet>>,
    end: &End,
) -> Option<&'a RuleSet> {
    let (cluster, pod) = end.pod.as_ref()?;
    let node = world.inventory.clusters[cluster].endpoints[pod].node.as_ref()?;
    compiled[cluster].get(node)
}

fn count_clauses(policies: &PolicySet, clauses: &mut BTreeMap<&'static str, usize>) {
    let layers = [&policies.federation].into_iter().chain(policies.clusters.values());
    for policy in layers.flat_map(|layer| layer.policies.values()).filter(|policy| policy.acts()) {
        for rule in [&policy.ingress, &policy.egress].into_iter().flatten().flatten() {
            let mut count = |name, has: bool| *clauses.entry(name).or_default() += has as usize;
            count("ipVersion", rule.ip_version.is_some());
            count("protocol", rule.protocol.is_some());
            count("notProtocol", rule.not_protocol.is_some());
            count("icmp", rule.icmp.is_some());
            count("notICMP", rule.not_icmp.is_some());
            count("not understood", rule.unknown_because().is_some());
            let mut either = |name, has: &dyn Fn(&EntityMatch) -> bool| {
                count(name, [&rule.source, &rule.destination].into_iter().any(has));
            };
            either("nets", &|it| !it.nets.is_empty());
            either("notNets", &|it| !it.not_nets.is_empty());
            either("selector", &|it| it.selection.is_some());
            either("notSelector", &|it| it.not_selection.is_some());
            either("ports", &|it| !it.ports.is_empty());
            either("notPorts", &|it| !it.not_ports.is_empty());
            either("service", &|it| it.service.is_some());
        }
    }
}
