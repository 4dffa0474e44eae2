//! Simulates a hub and members without sockets and clocks, driven by a seed: any event may occur between two messages.
//!
//! Invariants, checked after each step for each receiver: its state of an origin is a past state of that origin; objects are removed only
//! after a message of their origin or of the hub; a policy is in force only together with all endpoints that it can select. At the end,
//! when all members are connected and no messages are left, every receiver has exactly the endpoints of its interest, and digests are
//! equal.

mod fleet;

use std::collections::BTreeMap;

use fleet::{Fleet, Random};
use hanse_exchange::member::receiver::ReceiveProblem;
use hanse_policy::model::ClusterScope;

const RUNS: u64 = 400;
const STEPS: usize = 600;

fn seed() -> u64 {
    std::env::var("HANSE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_124)
}

/// Uses the printed seed and the following ones, one per run.
#[test]
fn random_faults_neither_drop_objects_nor_open_gaps() {
    let seed = seed();
    println!("seed {seed}");
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for run in seed..seed + RUNS {
        let mut fleet = Fleet::new(Random(run), &mut counts);
        for step in 0..STEPS {
            fleet.at = format!("seed {run}, step {step}");
            fleet.random_event();
        }
        fleet.at = format!("seed {run}, at rest");
        fleet.settle();
    }
    println!("{counts:#?}");
    for (what, least) in [
        ("pod changed", 1_000),
        ("namespace changed", 100),
        ("policy applied", 500),
        ("policy deleted", 100),
        ("own interest changed", 100),
        ("publish stream cut", 100),
        ("watch stream cut", 100),
        ("hub restarted", 50),
        ("member restarted", 50),
        ("numbering lost", 10),
        ("lease ended", 50),
        ("grant changed", 50),
        ("cluster withdrawn", 20),
        ("cluster came", 20),
        ("policy waited", 50),
        ("policy came into force", 500),
        ("left interest", 100),
        ("resumed without a snapshot", 100),
        ("snapshot", 100),
        ("batch applied in parts", 1_000),
        ("interest evaluated in parts", 1_000),
        ("interest evaluated outside the exchange", 500),
    ] {
        let seen = counts.get(what).copied().unwrap_or_default();
        assert!(seen >= least, "{what}: only {seen} times");
    }
}

/// A fleet at rest with one pod in each of many namespaces.
fn large<'a>(counts: &'a mut BTreeMap<&'static str, usize>) -> Fleet<'a> {
    let mut fleet = Fleet::new(Random(1), counts);
    fleet.apply_policy("everything", "all()", &[0, 2], ClusterScope::All);
    fleet.set_pods(1, (0..2_000).map(|number| (format!("pod-{number}"), "web")));
    fleet.settle();
    fleet
}

#[test]
fn resumed_stream_receives_changes_only() {
    let mut counts = BTreeMap::new();
    let mut fleet = large(&mut counts);
    let whole = fleet.bytes_received(0);
    fleet.cut_watch(0);
    fleet.set_pod(1, "pod-7", "app", "db");
    fleet.remove_pod(1, "pod-8");
    fleet.settle();
    let resumed = fleet.bytes_received(0) - whole;
    assert!(resumed < 2_000 && whole > 50_000, "{resumed} bytes after {whole}");
    // The publisher too goes on where it was, also at a hub that is asked anew after its own restart of the stream.
    let published = fleet.bytes_published(1);
    fleet.cut_publish(1);
    fleet.set_pod(1, "pod-9", "app", "db");
    fleet.settle();
    let again = fleet.bytes_published(1) - published;
    assert!(again < 2_000, "{again} bytes published after {published}");
}

#[test]
fn slow_receiver_gets_the_newest_state_once_and_delays_no_other() {
    let mut counts = BTreeMap::new();
    let mut fleet = large(&mut counts);
    fleet.stall(0);
    let before = (fleet.bytes_received(0), fleet.bytes_received(2));
    for round in 0..50 {
        let value = |number| if (number + round) % 2 == 0 { "web" } else { "db" };
        fleet.set_pods(1, (0..200).map(|number| (format!("pod-{number}"), value(number))));
        fleet.pump();
    }
    assert_eq!(fleet.bytes_received(0), before.0, "it is stalled");
    assert!(fleet.has_all_of(2, 1), "the others went on");
    fleet.resume(0);
    fleet.settle();
    let (slow, fast) = (fleet.bytes_received(0) - before.0, fleet.bytes_received(2) - before.1);
    assert!(slow * 10 < fast, "10,000 changes of 200 pods came to {slow} bytes, and to {fast} for one that kept up");
}

#[test]
fn withdrawal_overtakes_queued_messages() {
    let mut counts = BTreeMap::new();
    let mut fleet = large(&mut counts);
    fleet.stall(0);
    fleet.set_pods(2, (0..2_000).map(|number| (format!("pod-{number}"), "web")));
    fleet.pump();
    fleet.resume(0);
    // The first message of a batch is out, the rest of it waits.
    fleet.deliver_one(0);
    fleet.withdraw(1);
    fleet.deliver_one(0);
    assert!(!fleet.has_any_of(0, 1), "the next message after a withdrawal is the withdrawal");
}

#[test]
fn hub_restart_keeps_member_state_and_policy_order() {
    let mut counts = BTreeMap::new();
    let mut fleet = large(&mut counts);
    fleet.restart_hub();
    fleet.restart_without_state(3);
    fleet.apply_policy("late", "app == 'web'", &[0, 3], ClusterScope::All);
    // Cluster 1 lives and has not published to this hub yet; the receivers are connected.
    for _ in 0..100 {
        fleet.deliver_one(0);
        fleet.deliver_one(3);
    }
    assert!(fleet.has_all_of(0, 1), "what it holds, it keeps");
    assert!(!fleet.enforces(0, "late") && !fleet.enforces(3, "late"), "the policy waits for cluster 1");
    fleet.pump();
    assert!(fleet.enforces(0, "late") && fleet.enforces(3, "late") && fleet.has_all_of(3, 1));
}

/// A Guard rule with 400 names of service accounts of 58 bytes.
fn guard_of_many_accounts() -> String {
    let names: Vec<String> = (0..400).map(|it| format!("{it:058}")).collect();
    serde_json::json!({
        "apiVersion": "hanse.dev/v1alpha1", "kind": "FederatedNetworkPolicy", "metadata": {"name": "guard"},
        "spec": {"tier": "platform", "types": ["Ingress"], "ingress": [
            {"action": "Allow", "source": {"serviceAccounts": {"names": names}}}
        ]}
    })
    .to_string()
}

#[test]
fn policy_with_an_oversized_selection_reaches_a_reconnecting_member() {
    let mut counts = BTreeMap::new();
    let mut fleet = large(&mut counts);
    fleet.apply_manifest("guard", &guard_of_many_accounts(), &[0]);
    fleet.settle();
    fleet.cut_watch(0);
    // All of this happens while the member is away, and after it has come back.
    fleet.set_pod(1, "pod-7", "app", "db");
    fleet.pump();
    assert!(fleet.has_label(0, 1, "pod-7", "app", "db"), "a relabelled pod");
    assert_eq!(fleet.problems(0), [], "what the hub derives it reads back");
    fleet.cut_watch(0);
    fleet.delete_policy("guard");
    fleet.pump();
    assert!(!fleet.in_force(0, "guard"), "a deleted policy");
    fleet.cut_watch(0);
    fleet.withdraw(1);
    fleet.pump();
    assert!(!fleet.has_any_of(0, 1), "a revoked cluster");
}

#[test]
fn unreadable_selection_is_widened_and_reported() {
    let mut counts = BTreeMap::new();
    let mut fleet = large(&mut counts);
    // From an earlier version, of the member's own policies.
    fleet.register_oversized(3);
    for when in ["while the stream is open", "at its opening"] {
        fleet.settle();
        let problems = fleet.problems(3);
        let [ReceiveProblem::SelectionRejected(part)] = &problems[..] else { panic!("{when}: {problems:?}") };
        assert!(part.contains("own[0].selector"), "{when}: {part}");
        assert!(fleet.has_all_of(3, 1), "{when}: everything comes in its place");
        fleet.set_pod(1, "pod-7", "app", when.split(' ').next().expect("a word"));
        fleet.pump();
        assert!(fleet.has_label(3, 1, "pod-7", "app", when.split(' ').next().expect("a word")), "{when}");
        fleet.cut_watch(3);
    }
    fleet.register_nothing(3);
    fleet.settle();
    assert_eq!(fleet.problems(3), []);
}
