//! The enforcer on a dataplane that fails: no kernel, no privileges.

use std::sync::Arc;
use std::time::Duration;

use hanse_agent::enforcer::{EnforceError, Enforcer, Options, Proofs, Started};
use hanse_agent::metrics::AgentMetrics;
use hanse_agent::snapshot;
use hanse_dataplane::{Error, Finding};
use hanse_protocol::reason::HookProblem;
use hanse_ruleset::{EndpointId, RuleSet};
use hanse_runtime::health::{Health, Writes};
use hanse_runtime::metrics::Metrics;
use tokio::sync::watch;

use crate::enforcer::{accepting, block_on};
use crate::fake::{Fake, refusal};
use crate::net::until;

struct World {
    fake: Fake,
    data: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { fake: Fake::default(), data: tempfile::tempdir().expect("a directory") }
    }

    fn options(&self) -> Options {
        let writes = Writes::new(&Health::default());
        Options { data: self.data.path().to_owned(), pod_ranges: Vec::new(), writes, metrics: AgentMetrics::default() }
    }

    fn try_start(&self) -> Result<Started, EnforceError> {
        Enforcer::start(self.fake.backend(), self.options())
    }

    fn start(&self) -> Started {
        self.try_start().expect("started")
    }

    /// A node that enforces generation 1 of port 80.
    fn enforcing() -> (Self, Started) {
        let world = Self::new();
        let started = world.start();
        block_on(started.enforcer.apply(accepting(80, 1))).expect("applied");
        (world, started)
    }

    fn snapshot(&self) -> Option<RuleSet> {
        snapshot::read(&self.options().snapshot())
    }

    fn waits_for_snapshot(&self, rules: &RuleSet) -> bool {
        until(|| (self.snapshot().as_ref() == Some(rules)).then_some(())).is_some()
    }

    fn waits_for_rules(&self, number: u64) -> bool {
        until(|| (self.fake.number() == Some(number) && !self.fake.state().damaged).then_some(())).is_some()
    }
}

/// Ends the process's thread as a stop of the agent does.
fn stop(started: Started) {
    drop(started.enforcer);
    block_on(started.ended.wait());
}

fn proofs_of(started: &Started) -> Arc<Proofs> {
    started.enforcer.proofs().borrow().clone()
}

/// Whether `wanted` is published in time.
fn reaches(proofs: &mut watch::Receiver<Arc<Proofs>>, wanted: &dyn Fn(&Proofs) -> bool) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let reached = tokio::time::timeout(Duration::from_secs(20), proofs.wait_for(|it| wanted(it))).await;
        reached.is_ok_and(|it| it.is_ok())
    })
}

fn is_not_restored(proofs: &Proofs) -> bool {
    matches!(proofs.hooks, Some(HookProblem::NotRestored(_)))
}

fn pod(name: &str) -> EndpointId {
    EndpointId { namespace: "a".into(), name: name.into() }
}

#[test]
fn failed_apply_keeps_the_former_rules_and_snapshot_and_the_next_apply_works() {
    let (world, started) = World::enforcing();
    assert!(world.waits_for_snapshot(&accepting(80, 1)));
    world.fake.state().failing.apply = 1;
    let failed = block_on(started.enforcer.apply(accepting(81, 2)));
    assert!(matches!(failed, Err(EnforceError::Backend(Error::Access(_)))), "{failed:?}");
    assert_eq!(world.fake.number(), Some(1));
    block_on(started.enforcer.apply(accepting(81, 3))).expect("applied");
    assert_eq!(world.fake.state().attempts, [0, 1, 2, 3]);
    assert!(world.waits_for_snapshot(&accepting(81, 3)));
    stop(started);
}

#[test]
fn dataplane_that_fails_for_ever_keeps_the_last_good_rules_across_restart() {
    let (world, started) = World::enforcing();
    world.fake.state().failing.apply = u32::MAX;
    for number in 2..12 {
        assert!(block_on(started.enforcer.apply(accepting(81, number))).is_err(), "{number}");
    }
    // Drift of what is in force is repaired all the same.
    world.fake.state().damaged = true;
    assert!(world.waits_for_rules(1));
    stop(started);
    assert_eq!(world.snapshot().as_ref(), Some(&*accepting(80, 1)), "what failed is not saved");
    let started = world.start();
    assert_eq!(started.in_force, Some(accepting(80, 1)));
    assert_eq!(world.fake.number(), Some(1));
}

#[test]
fn refused_policy_is_named_and_the_rest_is_in_force() {
    let world = World::new();
    let rules = accepting(80, 1);
    let (id, policy) = rules.policies.first_key_value().expect("one policy");
    world.fake.state().refuses.insert(*id);
    let started = world.start();
    let applied = block_on(started.enforcer.apply(Arc::clone(&rules))).expect("applied");
    assert_eq!(applied.refused, [refusal(*id, &policy.name)]);
    assert_eq!(world.fake.number(), Some(1));
    stop(started);
    // Also at a start: with rules in the dataplane, and without.
    for is_empty in [false, true] {
        if is_empty {
            world.fake.state().rules = None;
        }
        let started = world.start();
        assert_eq!(
            (&started.in_force, &started.refused[..]),
            (&Some(rules.clone()), &[refusal(*id, &policy.name)][..])
        );
        stop(started);
    }
}

#[test]
fn rules_of_another_generation_stay_until_the_next_apply() {
    let (world, started) = World::enforcing();
    stop(started);
    snapshot::write(&world.options().snapshot(), &accepting(81, 9)).expect("written");
    let attempts = world.fake.state().attempts.len();
    let started = world.start();
    assert_eq!((&started.in_force, world.fake.number(), started.open), (&None, Some(1), false));
    assert_eq!(world.fake.state().attempts.len(), attempts, "nothing is changed");
    block_on(started.enforcer.apply(accepting(81, 10))).expect("applied");
    assert_eq!(world.fake.number(), Some(10));
}

#[test]
fn damaged_rules_are_repaired_at_the_start() {
    let (world, started) = World::enforcing();
    stop(started);
    world.fake.state().damaged = true;
    let started = world.start();
    assert_eq!(started.in_force, Some(accepting(80, 1)));
    assert!(!world.fake.state().damaged);
    stop(started);
    // A start that cannot restore them reports that, and tries again.
    (world.fake.state().damaged, world.fake.state().failing.apply) = (true, 1);
    world.fake.state().failing.repair = 1;
    let started = world.start();
    assert_eq!(started.in_force, Some(accepting(80, 1)));
    assert!(is_not_restored(&proofs_of(&started)));
    assert!(world.waits_for_rules(1));
    assert!(reaches(&mut started.enforcer.proofs(), &|it| *it == Proofs::default()));
}

#[test]
fn start_fails_when_the_dataplane_cannot_be_read() {
    let (world, started) = World::enforcing();
    stop(started);
    world.fake.state().failing.adopt = 1;
    assert!(matches!(world.try_start().err(), Some(EnforceError::Backend(Error::Access(_)))));
    assert_eq!(world.fake.number(), Some(1), "nothing is changed");
    assert_eq!(world.start().in_force, Some(accepting(80, 1)));
}

#[test]
fn snapshot_is_applied_when_the_dataplane_has_lost_its_rules() {
    let (world, started) = World::enforcing();
    stop(started);
    // The machine has restarted.
    world.fake.state().rules = None;
    let started = world.start();
    assert_eq!((started.in_force.as_ref(), started.open), (Some(&accepting(80, 1)), false));
    assert_eq!(world.fake.number(), Some(1));
}

#[test]
fn drift_is_repaired_also_after_repairs_that_failed() {
    let (world, _started) = World::enforcing();
    for failures in [0, 2] {
        (world.fake.state().rules, world.fake.state().failing.repair) = (None, failures);
        assert!(world.waits_for_rules(1), "after {failures} failures");
        assert_eq!(world.fake.state().failing.repair, 0);
    }
}

#[test]
fn failed_repair_is_published_until_the_rules_are_restored() {
    let registry = Metrics::default();
    let world = World::new();
    let options = Options { metrics: AgentMetrics::new(&registry), ..world.options() };
    let started = Enforcer::start(world.fake.backend(), options).expect("started");
    let mut proofs = started.enforcer.proofs();
    let mut reaches = |wanted: &dyn Fn(&Proofs) -> bool| reaches(&mut proofs, wanted);
    let enforced = |count: u8| registry.encode().contains(&format!("hanse_agent_pods{{state=\"enforced\"}} {count}\n"));
    let fail = || (world.fake.state().damaged, world.fake.state().failing.repair) = (true, u32::MAX);
    block_on(started.enforcer.apply(accepting(80, 1))).expect("applied");
    let is_proven = |it: &Proofs| *it == Proofs::default();
    assert!(reaches(&|_| enforced(2)) && reaches(&is_proven));
    fail();
    assert!(reaches(&is_not_restored));
    let pending: Vec<_> = [pod("p2"), pod("p3")].map(|pod| (pod, Finding::Pending)).into();
    assert_eq!(Vec::from_iter(proofs_of(&started).unenforced.clone()), pending, "former proofs do not count");
    assert!(enforced(0));
    world.fake.state().failing.repair = 0;
    assert!(reaches(&is_proven) && enforced(2));
    assert!(!world.fake.state().damaged);
    // Also by a generation.
    fail();
    assert!(reaches(&is_not_restored));
    block_on(started.enforcer.apply(accepting(81, 2))).expect("applied");
    assert!(!is_not_restored(&proofs_of(&started)));
}

#[test]
fn repairs_that_fail_are_tried_less_often() {
    let (world, _started) = World::enforcing();
    (world.fake.state().damaged, world.fake.state().failing.repair) = (true, u32::MAX);
    let attempts = || Some(world.fake.state().failed_repairs.clone()).filter(|all| all.len() >= 5);
    let attempts = (0..10).find_map(|_| until(attempts)).expect("it is tried again");
    let pauses: Vec<Duration> = attempts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (pause, least) in pauses.iter().zip([200, 400, 800, 1000]) {
        assert!(*pause >= Duration::from_millis(least), "{pauses:?}");
    }
}

#[test]
fn generation_that_arrives_while_another_fails_is_applied_after_it() {
    let (world, started) = World::enforcing();
    world.fake.state().failing.apply = 1;
    let (first, second) = (started.enforcer.apply(accepting(81, 2)), started.enforcer.apply(accepting(82, 3)));
    let (first, second) = block_on(async { tokio::join!(first, second) });
    assert!(first.is_err() && second.is_ok(), "{first:?} {second:?}");
    assert_eq!((world.fake.number(), &world.fake.state().attempts[..]), (Some(3), &[0, 1, 2, 3][..]));
    assert!(world.waits_for_snapshot(&accepting(82, 3)));
}

#[test]
fn findings_follow_the_dataplane_and_probes_that_fail_are_reported() {
    let world = World::new();
    let silent = Finding::Silent([10, 1, 0, 3].into());
    {
        let mut state = world.fake.state();
        state.findings.insert(pod("p3"), silent.clone());
        (state.failing.probe, state.failing.findings) = (1, 1);
    }
    let started = world.start();
    let mut proofs = started.enforcer.proofs();
    let mut reaches = |wanted: &dyn Fn(&Proofs) -> bool| reaches(&mut proofs, wanted);
    block_on(started.enforcer.apply(accepting(80, 1))).expect("applied");
    assert!(reaches(&|it| matches!(it.hooks, Some(HookProblem::ProbeNotSent(_)))));
    assert!(reaches(&|it| matches!(it.hooks, Some(HookProblem::ProbeNotRead(_)))));
    assert!(reaches(&|it| it.hooks.is_none() && it.unenforced.keys().eq([&pod("p3")])));
    // A pod that is not proven is probed again.
    world.fake.state().findings.insert(pod("p3"), Finding::Bypassed([10, 1, 0, 3].into()));
    assert!(reaches(&|it| it.unenforced.values().any(|it| matches!(it, Finding::Bypassed(_)))));
    world.fake.state().findings.clear();
    assert!(reaches(&|it| *it == Proofs::default()));
}

#[test]
fn panic_of_the_backend_ends_the_thread_and_leaves_the_rules() {
    let (world, started) = World::enforcing();
    assert!(world.waits_for_snapshot(&accepting(80, 1)));
    world.fake.state().panics = true;
    let failed = block_on(started.enforcer.apply(accepting(81, 2)));
    assert!(matches!(failed, Err(EnforceError::Ended)), "{failed:?}");
    block_on(started.ended.wait());
    assert!(matches!(block_on(started.enforcer.apply(accepting(81, 3))), Err(EnforceError::Ended)));
    assert_eq!(world.fake.number(), Some(1));
    // The next process adopts them.
    world.fake.state().panics = false;
    assert_eq!(world.start().in_force, Some(accepting(80, 1)));
}
