//! The evaluator that is kept up to date by updates, against the reference and against one made from nothing.

use std::collections::BTreeMap;

use hanse_compiler::{Compiler, Update};
use hanse_policy::evaluate::{Answer, Judgement, Query, Verdict, View, evaluate};
use hanse_policy::evaluator::Judge;
use hanse_policy::inventory::{Cluster, Endpoint, EndpointId, EndpointKind, Inventory};
use hanse_policy::model::{
    ClusterName, ClusterScope, Order, Phase, Policy, PolicyId, PolicyKind, PolicySet, StagedAction, TierId,
};
use hanse_policy::selector::Selector;

use crate::shared::{compile, place_pods, shuffle, undo, updates};
use crate::worlds::{Random, World, query, world};

const RUNS: u64 = 120;
const SEED: u64 = 9_000;
const QUERIES: usize = 40;
const VIEWS: [View; 2] = [View::Enforced, View::Pending];

/// The reference's answer in the directions that the cluster judges.
fn reference(world: &World, local: &ClusterName, query: &Query, view: View) -> [Option<Judgement>; 2] {
    let Answer { egress, ingress, .. } = evaluate(&world.policies, &world.inventory, query, view);
    let is_local = |end: &hanse_policy::evaluate::End| end.pod.as_ref().is_some_and(|(cluster, _)| cluster == local);
    [egress.filter(|_| is_local(&query.source)), ingress.filter(|_| is_local(&query.destination))]
}

fn check(judge: &Judge<'_>, world: &World, local: &ClusterName, query: &Query, seed: u64) -> [Option<Judgement>; 2] {
    let [enforced, pending] = VIEWS.map(|view| {
        let Answer { egress, ingress, .. } = judge.evaluate(query, view);
        let wanted = reference(world, local, query, view);
        let found = [egress, ingress];
        // A packet between a pod and itself is judged wherever the pod is.
        let itself = query.source.pod.is_some() && query.source.pod == query.destination.pod;
        assert!(itself || found == wanted, "seed {seed}: {query:?} {view:?}\nfound {found:#?}\nreference {wanted:#?}");
        found
    });
    let explanation = judge.explain(query);
    assert_eq!([explanation.enforced.egress, explanation.enforced.ingress], enforced);
    let staged = explanation.pending.map_or(enforced.clone(), |answer| [answer.egress, answer.ingress]);
    assert_eq!(staged, pending, "seed {seed}: an evaluator without staged policies has one outcome");
    enforced
}

/// After random edits in a random order, with commits between, every answer is the reference's for the world that results,
/// with its trace, enforced and staged.
#[test]
fn any_sequence_of_edits_ends_in_the_references_answers() {
    let local: ClusterName = "prod".into();
    let mut verdicts: BTreeMap<String, usize> = BTreeMap::new();
    for seed in SEED..SEED + RUNS {
        let mut random = Random(seed);
        let worlds: Vec<World> = (0..4)
            .map(|_| {
                let mut world = world(&mut random);
                place_pods(&mut world);
                world
            })
            .collect();
        let mut compiler = Compiler::with_evaluator(local.clone());
        let mut held: Vec<Update> = Vec::new();
        for world in &worlds {
            let next = updates(world, &local);
            let mut steps: Vec<Update> = held
                .iter()
                .filter_map(undo)
                .filter(|gone| !next.iter().filter_map(undo).any(|kept| kept == *gone))
                .chain(next.iter().cloned())
                .collect();
            shuffle(&mut random, &mut steps);
            for step in steps {
                compiler.apply(step);
                if random.once_in(10) {
                    compiler.commit();
                    // Chains are built between edits, so that stale ones would be found.
                    let judge = compiler.judge().expect("made with an evaluator");
                    for _ in 0..3 {
                        judge.explain(&query(&mut random, &world.inventory));
                    }
                }
            }
            compiler.commit();
            let mut from_nothing = Compiler::with_evaluator(local.clone());
            next.iter().cloned().for_each(|update| from_nothing.apply(update));
            from_nothing.commit();
            let judges = [&compiler, &from_nothing].map(|it| it.judge().expect("made with an evaluator"));
            for _ in 0..QUERIES {
                let query = query(&mut random, &world.inventory);
                for judge in &judges {
                    let found = check(judge, world, &local, &query, seed);
                    for judgement in found.iter().flatten() {
                        *verdicts.entry(format!("{:?}", judgement.verdict)).or_default() += 1;
                    }
                }
            }
            held = next;
        }
        // Everything is removed: only the selector of every pod stays.
        held.iter().filter_map(undo).for_each(|gone| compiler.apply(gone));
        compiler.commit();
        compiler.check_empty();
    }
    println!("verdicts {verdicts:?}");
    assert!(verdicts.len() == 2 && verdicts.values().all(|count| *count > 1_000), "unbalanced: {verdicts:?}");
}

#[test]
fn a_compiler_without_an_evaluator_has_no_judge() {
    let world = World { inventory: Inventory::default(), policies: PolicySet::default() };
    assert!(compile(&world, &"prod".into()).judge().is_none());
}

/// The owner of an address is the local cluster's pod, else the first by cluster and name.
#[test]
fn finds_pods_by_address() {
    let mut random = Random(5);
    let local: ClusterName = "serve".into();
    for _ in 0..20 {
        let mut world = world(&mut random);
        place_pods(&mut world);
        let shared = "10.9.9.9".parse().unwrap();
        for endpoint in world.inventory.clusters.values_mut().flat_map(|cluster| cluster.endpoints.values_mut()) {
            if !endpoint.addresses.is_empty() && random.once_in(3) {
                endpoint.addresses.push(shared);
            }
        }
        let mut compiler = Compiler::with_evaluator(local.clone());
        updates(&world, &local).into_iter().for_each(|update| compiler.apply(update));
        compiler.commit();
        let judge = compiler.judge().expect("made with an evaluator");
        let owners = hanse_policy::explain::Owners::new(&world.inventory);
        let all = world.inventory.clusters.values().flat_map(|cluster| cluster.endpoints.values());
        for address in all.flat_map(|endpoint| &endpoint.addresses).chain([&"192.0.2.77".parse().unwrap()]) {
            assert_eq!(judge.end(*address), owners.of(*address, &local));
        }
    }
}

/// A staged policy that selects no pod still takes the policy that it would delete or replace out of the pending outcome.
#[test]
fn staging_changes_the_pending_outcome_of_the_policy_that_it_replaces() {
    use PolicyKind::{CalicoGlobalNetworkPolicy, FederatedNetworkPolicy};
    use PolicyKind::{StagedFederatedNetworkPolicy, StagedGlobalNetworkPolicy};
    staging(Some("prod"), Phase::Local, [CalicoGlobalNetworkPolicy, StagedGlobalNetworkPolicy], &ClusterScope::Local);
    let kinds = [FederatedNetworkPolicy, StagedFederatedNetworkPolicy];
    for phase in [Phase::Guard, Phase::Baseline] {
        // Also where the staged version is for other clusters only.
        for enforcers in [ClusterScope::All, ClusterScope::Named(["other".into()].into())] {
            staging(None, phase, kinds, &enforcers);
        }
    }
}

fn staging(owner: Option<&str>, phase: Phase, [enforced, staged]: [PolicyKind; 2], staged_for: &ClusterScope) {
    let id = |kind| PolicyId { cluster: owner.map(Into::into), kind, namespace: None, name: "p".into() };
    let policy = |kind, selector: &str, staged| Policy {
        tier: TierId { phase, name: "default".into() },
        order: Order(None),
        enforcers: match (staged, owner) {
            (Some(_), _) => staged_for.clone(),
            (None, Some(_)) => ClusterScope::Local,
            (None, None) => ClusterScope::All,
        },
        selector: Selector::parse(selector).unwrap(),
        // Without rules: denied at the end of the tier.
        ingress: Some(Vec::new()),
        egress: None,
        staged,
        host_only: false,
        id: id(kind),
    };
    let pod = |name: &str, address: &str| {
        let id = EndpointId { kind: EndpointKind::Pod, namespace: Some("web".into()), name: name.into() };
        let addresses = vec![address.parse().unwrap()];
        (id, Endpoint { addresses, node: Some("n".into()), ..Endpoint::default() })
    };
    let cluster = Cluster { endpoints: [pod("a", "10.0.0.1"), pod("b", "10.0.0.2")].into(), ..Cluster::default() };
    let inventory = Inventory { clusters: [("prod".into(), cluster)].into(), ..Inventory::default() };
    let mut world = World { inventory, policies: PolicySet::default() };
    let mut compiler = Compiler::with_evaluator("prod");
    updates(&world, &"prod".into()).into_iter().for_each(|update| compiler.apply(update));
    let enforced = policy(enforced, "all()", None);
    let pending = |action| policy(staged, "has(nothing)", Some(action));
    let gone = || Err(id(staged));
    let mut found = Vec::new();
    for edit in [Ok(enforced), Ok(pending(StagedAction::Delete)), gone(), Ok(pending(StagedAction::Set)), gone()] {
        let layer = match owner {
            Some(name) => world.policies.clusters.entry(name.into()).or_default(),
            None => &mut world.policies.federation,
        };
        compiler.apply(match edit {
            Ok(policy) => {
                layer.policies.insert(policy.id.clone(), policy.clone());
                Update::Policy(policy)
            }
            Err(id) => {
                layer.policies.remove(&id);
                Update::RemovePolicy(id)
            }
        });
        compiler.commit();
        let judge = compiler.judge().expect("made with an evaluator");
        let [source, destination] = ["10.0.0.1", "10.0.0.2"].map(|address| judge.end(address.parse().unwrap()));
        let query = Query { source, destination, protocol: 6, source_port: 1, destination_port: 2, icmp: None };
        check(&judge, &world, &"prod".into(), &query, 0);
        found.push(judge.evaluate(&query, View::Pending).verdict);
    }
    use Verdict::{Allow, Deny};
    assert_eq!(found, [Deny, Allow, Deny, Allow, Deny]);
}
