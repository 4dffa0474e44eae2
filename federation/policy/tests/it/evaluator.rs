//! Properties of the evaluators on random policies.

use hanse_policy::evaluate::{Answer, Judgement, Step, Verdict, View, evaluate};
use hanse_policy::inventory::LabelGrant;
use hanse_policy::model::{Policy, PolicyId, PolicyKind, PolicySet};
use hanse_policy::prepared::Prepared;

use crate::worlds::{Random, World, query, world};

const WORLDS: u64 = 150;
const QUERIES: usize = 60;

/// Seeds differ from run to run unless HANSE_SEED fixes them.
fn first_seed() -> u64 {
    let seed = std::env::var("HANSE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0_u8) >> 16);
    println!("HANSE_SEED={seed}");
    seed
}

fn each_world(mut check: impl FnMut(u64, &mut Random, World)) {
    let first = first_seed();
    for seed in first..first + WORLDS {
        let mut random = Random(seed);
        let world = world(&mut random);
        check(seed, &mut random, world);
    }
}

#[test]
fn prepared_evaluator_equals_the_reference() {
    let (mut total, mut denied, mut judged) = (0, 0, std::collections::BTreeMap::<String, usize>::new());
    let mut federated_staged = 0;
    each_world(|seed, random, world| {
        let is_staged = |policy: &Policy| policy.id.kind == PolicyKind::StagedFederatedNetworkPolicy;
        let federated = &world.policies.federation.policies;
        let replaces = |it: &PolicyId| it.commits_to().is_some_and(|it| federated.contains_key(&it));
        federated_staged += federated.values().filter(|it| is_staged(it) && replaces(&it.id)).count();
        for view in [View::Enforced, View::Pending] {
            let prepared = Prepared::new(&world.policies, &world.inventory, view);
            for _ in 0..QUERIES {
                let query = query(random, &world.inventory);
                let expected = evaluate(&world.policies, &world.inventory, &query, view);
                assert_eq!(prepared.evaluate(&query), expected, "seed {seed}, {view:?}, {query:?}");
                total += 1;
                denied += usize::from(expected.verdict == Verdict::Deny);
                for clause in clauses(&world, &expected) {
                    *judged.entry(clause.into()).or_default() += 1;
                }
                for step in [&expected.egress, &expected.ingress].into_iter().flatten().flat_map(|judged| &judged.trace)
                {
                    let name = match step {
                        Step::Rule { action, effect, .. } => format!("rule {action:?} {effect:?}"),
                        Step::EndOfTier { action, .. } => format!("end of tier {action:?}"),
                        Step::Profile => "profile".into(),
                        Step::Itself => "itself".into(),
                    };
                    *judged.entry(name).or_default() += 1;
                }
            }
        }
    });
    assert!(federated_staged > 0, "no staged federated policy replaces another");
    println!("{total} answers, {denied} deny; {judged:#?}");
    assert!(denied * 10 >= total * 3 && denied * 10 <= total * 7, "{denied} of {total} deny");
    let missing: Vec<&str> = CLAUSES.into_iter().filter(|clause| !judged.contains_key(*clause)).collect();
    assert!(missing.is_empty(), "{missing:?} never spoke");
}

const CLAUSES: [&str; 21] = [
    "ipVersion",
    "protocol",
    "notProtocol",
    "icmp",
    "notICMP",
    "http",
    "not understood",
    "source nets",
    "source notNets",
    "source selection",
    "source notSelection",
    "source ports",
    "source notPorts",
    "source service",
    "destination nets",
    "destination notNets",
    "destination selection",
    "destination notSelection",
    "destination ports",
    "destination notPorts",
    "destination service",
];

/// The conditions of the rules in a trace.
fn clauses(world: &World, answer: &Answer) -> Vec<&'static str> {
    let mut found = Vec::new();
    for (judgement, egress) in [(&answer.egress, true), (&answer.ingress, false)] {
        for step in judgement.iter().flat_map(|judgement| &judgement.trace) {
            let Step::Rule { policy, index, .. } = step else { continue };
            let layer =
                policy.cluster.as_ref().map_or(&world.policies.federation, |name| &world.policies.clusters[name]);
            let policy = &layer.policies[policy];
            let rules = if egress { &policy.egress } else { &policy.ingress };
            let spoke = rules.iter().flatten().find(|rule| rule.index == *index).expect("the trace names its rule");
            let ends = [&spoke.source, &spoke.destination];
            let given = [
                spoke.ip_version.is_some(),
                spoke.protocol.is_some(),
                spoke.not_protocol.is_some(),
                spoke.icmp.is_some(),
                spoke.not_icmp.is_some(),
                spoke.http.is_some(),
                spoke.not_understood.is_some(),
            ]
            .into_iter()
            .chain(ends.into_iter().flat_map(|end| {
                [
                    !end.nets.is_empty(),
                    !end.not_nets.is_empty(),
                    end.selection.is_some(),
                    end.not_selection.is_some(),
                    !end.ports.is_empty(),
                    !end.not_ports.is_empty(),
                    end.service.is_some(),
                ]
            }));
            found.extend(CLAUSES.into_iter().zip(given).filter(|(_, given)| *given).map(|(clause, _)| clause));
        }
    }
    found
}

/// What allows with less known allowed with more known.
#[test]
fn unknown_never_allows() {
    let mut closed = 0;
    each_world(|seed, random, mut world| {
        let queries: Vec<_> = (0..QUERIES).map(|_| query(random, &world.inventory)).collect();
        let before = answers(&world, &queries);
        for cluster in world.inventory.clusters.values_mut() {
            match random.below(3) {
                0 => cluster.stale = true,
                1 => cluster.label_grant = LabelGrant::Keys(Default::default()),
                _ => {}
            }
        }
        for ((query, known), unknown) in queries.iter().zip(before).zip(answers(&world, &queries)) {
            assert!(known == Verdict::Allow || unknown == Verdict::Deny, "seed {seed}: {query:?} was opened");
            closed += usize::from(known != unknown);
        }
    });
    assert!(closed > 0, "nothing became unknown");
}

fn answers(world: &World, queries: &[hanse_policy::evaluate::Query]) -> Vec<Verdict> {
    let prepared = Prepared::new(&world.policies, &world.inventory, View::Enforced);
    queries.iter().map(|query| prepared.evaluate(query).verdict).collect()
}

/// Staged policies never act, and the pending view without them is the enforced one.
#[test]
fn staged_policies_are_not_enforced() {
    each_world(|seed, random, world| {
        let mut without = world.policies.clone();
        let PolicySet { federation, clusters } = &mut without;
        for layer in [federation].into_iter().chain(clusters.values_mut()) {
            layer.policies.retain(|_, policy| policy.staged.is_none());
        }
        for _ in 0..QUERIES {
            let query = query(random, &world.inventory);
            let enforced = evaluate(&world.policies, &world.inventory, &query, View::Enforced);
            for view in [View::Enforced, View::Pending] {
                assert_eq!(evaluate(&without, &world.inventory, &query, view), enforced, "seed {seed}: {query:?}");
            }
        }
    });
}

/// The verdict is that of the last step, and of the two directions the stricter one.
#[test]
fn trace_ends_with_the_deciding_step() {
    each_world(|seed, random, world| {
        for _ in 0..QUERIES {
            let query = query(random, &world.inventory);
            let answer = evaluate(&world.policies, &world.inventory, &query, View::Enforced);
            let judgements: Vec<&Judgement> = [&answer.egress, &answer.ingress].into_iter().flatten().collect();
            let denied = judgements.iter().any(|judgement| judgement.verdict == Verdict::Deny);
            assert_eq!(answer.verdict == Verdict::Deny, denied, "seed {seed}");
            assert_eq!(answer.egress.is_some(), query.source.pod.is_some(), "seed {seed}");
            assert_eq!(answer.ingress.is_some(), query.destination.pod.is_some(), "seed {seed}");
            for judgement in judgements {
                let opens = matches!(judgement.trace.last(), Some(Step::Profile | Step::Itself))
                    || matches!(
                        judgement.trace.last(),
                        Some(Step::Rule { action: hanse_policy::model::Action::Allow, .. })
                    );
                assert_eq!(judgement.verdict == Verdict::Allow, opens, "seed {seed}: {judgement:?}");
            }
        }
    });
}
