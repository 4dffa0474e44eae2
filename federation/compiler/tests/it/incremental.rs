//! After any updates, in any order and with any number of commits, the result equals that of a fresh compilation. The changes of a commit
//! turn each rule set into the next.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_compiler::{Changes, Compiler, Update};
use hanse_policy::inventory::EndpointKind;
use hanse_policy::model::ClusterName;
use hanse_ruleset::RuleSet;

use crate::shared::{compile, place_pods, rule_sets, shuffle, undo, updates};
use crate::worlds::{Random, World, world};

const RUNS: u64 = 150;
const SEED: u64 = 7_000;

/// The rule sets of agents, maintained with deltas only.
#[derive(Default)]
struct Agents(BTreeMap<Arc<str>, RuleSet>);

impl Agents {
    fn take(&mut self, compiler: &mut Compiler, changes: &Changes) {
        for (node, change) in &changes.nodes {
            let delta = change.step.delta(&compiler.rule_set(node));
            let held = self.0.remove(node).unwrap_or_default();
            let next = held.apply(&delta).unwrap_or_else(|error| panic!("{node}: {error}\n{change:#?}"));
            if !change.removed {
                self.0.insert(node.clone(), next);
            }
        }
    }
}

#[test]
fn any_sequence_ends_as_from_nothing() {
    for offset in 0..RUNS {
        let seed = SEED + offset;
        println!("seed {seed}");
        let mut random = Random(seed);
        let local: ClusterName = "prod".into();
        let worlds: Vec<World> = (0..4)
            .map(|_| {
                let mut world = world(&mut random);
                place_pods(&mut world);
                world
            })
            .collect();
        let mut compiler = Compiler::new(local.clone());
        let mut agents = Agents::default();
        let mut held: Vec<Update> = Vec::new();
        for world in &worlds {
            // From the last world to this one: what is gone goes, what is new comes, in a random order with commits between.
            let next = updates(world, &local);
            let mut steps: Vec<Update> = held
                .iter()
                .filter_map(undo)
                .filter(|gone| !next.iter().filter_map(undo).any(|kept| kept == *gone))
                .chain(next.iter().cloned())
                .collect();
            shuffle(&mut random, &mut steps);
            for step in steps {
                // Something that comes and goes on the way.
                if random.once_in(8)
                    && !matches!(step, Update::Cluster { .. } | Update::RemoveCluster { .. })
                    && let Some(gone) = undo(&step)
                {
                    compiler.apply(step.clone());
                    if random.once_in(2) {
                        let changes = compiler.commit();
                        agents.take(&mut compiler, &changes);
                    }
                    compiler.apply(gone);
                }
                compiler.apply(step);
                if random.once_in(10) {
                    let changes = compiler.commit();
                    agents.take(&mut compiler, &changes);
                }
            }
            let changes = compiler.commit();
            agents.take(&mut compiler, &changes);
            let incremental = rule_sets(&mut compiler);
            let from_nothing = rule_sets(&mut compile(world, &local));
            assert_eq!(incremental.len(), from_nothing.len(), "seed {seed}");
            for ((name, have), (_, want)) in incremental.iter().zip(&from_nothing) {
                assert!(have == want, "seed {seed}: {name}\n{have:#?}\n{want:#?}");
            }
            let kept: Vec<(Arc<str>, RuleSet)> = agents.0.iter().map(|(name, it)| (name.clone(), it.clone())).collect();
            assert!(kept == incremental, "seed {seed}: what the changes tell differs");
            assert_eq!(compiler.report(), compile(world, &local).report(), "seed {seed}");
            let again = compiler.commit();
            assert!(again.nodes.is_empty(), "a commit of nothing changes nothing");
            held = next;
        }
        // Everything goes: nothing stays behind.
        for gone in held.iter().filter_map(undo) {
            compiler.apply(gone);
        }
        let changes = compiler.commit();
        agents.take(&mut compiler, &changes);
        assert!(compiler.nodes().is_empty() && agents.0.is_empty(), "seed {seed}");
        compiler.check_empty();
    }
}

/// The order of updates does not matter.
#[test]
fn contested_address_has_one_owner() {
    let mut random = Random(3);
    for _ in 0..50 {
        let mut world = world(&mut random);
        place_pods(&mut world);
        let local: ClusterName = "prod".into();
        let shared: std::net::IpAddr = "10.9.9.9".parse().unwrap();
        for cluster in world.inventory.clusters.values_mut() {
            for (at, (id, endpoint)) in cluster.endpoints.iter_mut().enumerate() {
                if at % 3 == 0 && id.kind == EndpointKind::Pod && !endpoint.host_network {
                    endpoint.addresses.push(shared);
                }
            }
        }
        let want = rule_sets(&mut compile(&world, &local));
        for (_, rules) in &want {
            let holders = rules.endpoints.values().filter(|it| it.addresses.contains(&shared)).count();
            assert!(holders <= 1);
        }
        let mut all = updates(&world, &local);
        shuffle(&mut random, &mut all);
        let mut compiler = Compiler::new(local.clone());
        for update in all {
            compiler.apply(update);
            if random.once_in(5) {
                compiler.commit();
            }
        }
        compiler.commit();
        assert_eq!(rule_sets(&mut compiler), want);
    }
}
