//! Acknowledgements of the follower, without a member.

use hanse_dataplane::{Object, Rejection};
use hanse_protocol::reason::HookProblem;
use hanse_ruleset::{Digest, NodeConfig, Policy, PolicyId};
use hanse_runtime::health::Health;
use hanse_runtime::metrics::Metrics;

use self::fake::Fake;
use super::*;
use crate::enforcer::{Options, Proofs};

#[path = "../../tests/it/fake.rs"]
#[expect(dead_code, reason = "the tests of the enforcer use all of it")]
mod fake;

fn refusal() -> Refusal {
    let object = Object::Policy { id: PolicyId([1; 16]), name: "NetworkPolicy a/b".into() };
    Refusal { object, rejection: Rejection { error: "too wide".into(), set: None } }
}

fn follower() -> Follower {
    let pod = EndpointId { namespace: "a".into(), name: "p".into() };
    let hooks = Some(HookProblem::NotProven);
    let proofs = Proofs { hooks, unenforced: [(pod, Finding::Ipvs)].into() };
    let rules = RuleSet { generation: Generation { term: 5, number: 9 }, ..RuleSet::default() };
    Follower {
        node: "n".into(),
        enforcer: Enforcer::ended(proofs),
        in_force: Some(Arc::new(rules)),
        refused: vec![refusal()],
        pod_ranges: Vec::new(),
        open: false,
        connected: false,
        not_in_sync: String::new(),
        instance: [7; 16],
        writes: Writes::new(&Health::default()),
        in_sync: Health::default().condition("in sync"),
        metrics: AgentMetrics::default(),
        status: watch::Sender::new(Status::default()),
    }
}

fn ack(message: wire::AgentToMember) -> wire::Ack {
    match message.message {
        Some(wire::agent_to_member::Message::Ack(ack)) => ack,
        other => panic!("an ack, not {other:?}"),
    }
}

#[test]
fn new_position_keeps_refusals_and_findings() {
    let mut follower = follower();
    let ack = ack(follower.advance(Generation { term: 5, number: 10 }, 3, 4));
    assert_eq!(ack.generation, Some(wire::Generation { term: 5, number: 10 }));
    assert_eq!(ack.revisions, Some(wire::Revisions { hub: 3, local: 4 }));
    assert_eq!(ack.failure, None);
    let refused: Vec<_> = ack.refusals.into_iter().filter_map(|it| report::parse_object(it.object?)).collect();
    assert_eq!(refused, [refusal().object]);
    let pod = EndpointId { namespace: "a".into(), name: "p".into() };
    let pod = wire::PodStatus { pod: Some(report::pod(&pod)), finding: Some(report::finding(&Finding::Ipvs)) };
    assert_eq!((ack.unenforced, ack.hooks), (vec![pod], Some(report::hooks(&HookProblem::NotProven))));
    let status = follower.status.borrow().clone();
    assert!(status.connected && follower.in_sync.holds());
    assert_eq!((status.number, status.refused), (10, vec!["policy NetworkPolicy a/b: too wide".to_owned()]));
}

#[test]
fn reports_files_that_cannot_be_written_until_they_can() {
    let follower = follower();
    let published = |follower: &Follower| {
        follower.publish();
        let problems = follower.status.borrow().problems.clone();
        let files = ack(follower.ack(None)).files.into_iter().map(report::parse_file);
        assert_eq!(files.map(|it| Words(&it).to_string()).collect::<Vec<_>>(), problems);
        problems
    };
    assert!(published(&follower).is_empty());
    follower.writes.note("ruleset.snapshot", &Err(std::io::ErrorKind::StorageFull.into()));
    assert_eq!(published(&follower), ["ruleset.snapshot cannot be written: no storage space"]);
    follower.writes.note("ruleset.snapshot", &Ok(()));
    assert!(published(&follower).is_empty());
}

#[test]
fn agent_without_a_member_is_not_ready() {
    let mut follower = follower();
    follower.advance(Generation { term: 5, number: 10 }, 3, 4);
    assert!(follower.in_sync.holds());
    follower.disconnected("the stream ended".to_owned());
    assert!(!follower.in_sync.holds() && !follower.status.borrow().connected);
}

#[test]
fn node_whose_rules_cannot_be_restored_is_not_in_sync() {
    let registry = Metrics::default();
    let hooks = HookProblem::NotRestored("not permitted".to_owned());
    let proofs = Proofs { hooks: Some(hooks.clone()), ..Proofs::default() };
    let metrics = AgentMetrics::new(&registry);
    let mut follower = Follower { enforcer: Enforcer::ended(proofs), metrics, ..follower() };
    let is_in_sync = |text: &str| registry.encode().contains(&format!("hanse_agent_in_sync {text}\n"));
    let reported = ack(follower.advance(Generation { term: 5, number: 10 }, 3, 4));
    assert_eq!(reported.hooks, Some(report::hooks(&hooks)));
    let status = follower.status.borrow().clone();
    assert!(status.connected && !follower.in_sync.holds() && is_in_sync("0"));
    assert_eq!(status.not_in_sync, "the rules in the kernel cannot be restored: not permitted");
    follower.enforcer = Enforcer::ended(Proofs::default());
    follower.publish();
    assert!(follower.in_sync.holds() && is_in_sync("1"));
    assert_eq!(follower.status.borrow().not_in_sync, "");
}

#[test]
fn pods_are_reported_open_only_without_closed_ranges() {
    let mut follower = Follower { in_force: None, ..follower() };
    let published = |follower: &Follower| {
        follower.publish();
        let status = follower.status.borrow();
        (status.open, status.ranges())
    };
    let (open, closed) = ("none known: a pod is OPEN", "unknown: ranges that were closed before");
    let (is_open, text) = published(&follower);
    assert!(!is_open && text.starts_with(closed), "the kernel has ranges that were closed: {text}");
    follower.open = true;
    let (is_open, text) = published(&follower);
    assert!(is_open && text.starts_with(open), "{text}");
    // Rules without a range close none.
    (follower.in_force, follower.open) = (Some(Arc::default()), false);
    assert!(published(&follower).0);
    let node = NodeConfig { pod_ranges: vec!["10.1.0.0/24".parse().expect("a net")], ..NodeConfig::default() };
    follower.in_force = Some(Arc::new(RuleSet { node, ..RuleSet::default() }));
    assert_eq!(published(&follower), (false, "10.1.0.0/24".to_owned()));
}

#[test]
fn ignores_rules_of_a_term_that_is_over() {
    let follower = follower();
    let at = |term, number| Generation { term, number };
    assert!(follower.is_behind(at(4, 100)) && !follower.is_behind(at(5, 1)) && !follower.is_behind(at(6, 0)));
    let ack = ack(follower.behind(at(4, 100)));
    assert_eq!(ack.failure.map(report::parse_failure), Some(Failure::TermOver { term: 4, current: 5 }));
    assert_eq!(ack.generation, Some(wire::Generation { term: 5, number: 9 }));
}

#[tokio::test]
async fn inconsistent_rule_set_is_reported_and_not_requested_again() {
    let mut follower = follower();
    let wrong = Delta { digest: Digest(1), ..Delta::default() };
    let failure = ack(follower.apply(&wrong).await).failure.map(report::parse_failure);
    assert!(matches!(failure, Some(Failure::Inconsistent(_))), "{failure:?}");
    assert!(follower.in_force.is_some(), "the rules in force stay");
    // A delta from another base is requested as a whole.
    let base = Delta { base: Some(Digest(2)), ..wrong };
    let answer = follower.apply(&base).await.message;
    assert!(matches!(answer, Some(wire::agent_to_member::Message::Hello(_))), "{answer:?}");
}

/// The rules of a dataplane that fails, refuses a policy, and recovers.
#[tokio::test]
async fn acknowledges_what_the_dataplane_enforces_and_never_more() {
    let (fake, directory) = (Fake::default(), tempfile::tempdir().expect("a directory"));
    let writes = Writes::new(&Health::default());
    let metrics = AgentMetrics::default();
    let options = Options { data: directory.path().to_owned(), pod_ranges: Vec::new(), writes, metrics };
    let started = Enforcer::start(fake.backend(), options).expect("started");
    let mut follower = Follower { enforcer: started.enforcer, in_force: None, refused: Vec::new(), ..follower() };
    let policy = Policy { name: "NetworkPolicy a/b".into(), rules: Vec::new() };
    let rules = |number, policies: &[&Policy]| RuleSet {
        generation: Generation { term: 5, number },
        policies: policies.iter().map(|it| (it.id(), Arc::new((*it).clone()))).collect(),
        ..RuleSet::default()
    };
    let (first, second) = (rules(1, &[]), rules(2, &[&policy]));
    let digest = |rules: &RuleSet| hanse_protocol::digest(rules.digest());
    let to_first = ack(follower.apply(&Delta::between(None, &first)).await);
    assert_eq!((to_first.failure, to_first.digest), (None, digest(&first)));
    // It fails: the acknowledgement names the generation before, and why.
    fake.state().failing.apply = 1;
    let failed = ack(follower.apply(&Delta::between(Some(&first), &second)).await);
    assert!(matches!(failed.failure.map(report::parse_failure), Some(Failure::Dataplane(_))));
    assert_eq!((failed.generation.map(|it| it.number), failed.digest), (Some(1), digest(&first)));
    // It works again, and refuses the policy.
    fake.state().refuses.insert(policy.id());
    let applied = ack(follower.apply(&Delta::between(None, &second)).await);
    assert_eq!((applied.failure, applied.digest, applied.refusals.len()), (None, digest(&second), 1));
    fake.state().panics = true;
    let ended = ack(follower.apply(&Delta::between(Some(&second), &rules(3, &[]))).await);
    assert_eq!(ended.failure.map(report::parse_failure), Some(Failure::EnforcerEnded));
    assert_eq!((ended.generation.map(|it| it.number), ended.refusals.len()), (Some(2), 1));
    started.ended.wait().await;
}
