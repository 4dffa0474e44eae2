//! Addresses that the node learned, as members of compiled sets.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_dataplane::{Backend as _, Found, LearnedAddress};
use hanse_ruleset::{Action, RuleSet, SetId};

use crate::net::{Net, address, is_reset, nft, passes, until};
use crate::verdicts::{Build, addresses, from_set, rule};

/// Pod 3 accepts the members of the set `known`.
fn rules(members: &[&str], number: u64) -> Arc<RuleSet> {
    let sets = vec![addresses("known", members)];
    Build {
        pods: vec![2, 3, 4],
        ingress: Some(vec![from_set(Action::Allow, "known")]),
        sets,
        number,
        ..Build::default()
    }
    .rules()
}

fn known() -> SetId {
    SetId::of_meaning(&["known"])
}

fn learned(members: &[&str], time_to_live: Duration) -> Vec<LearnedAddress> {
    members.iter().map(|member| LearnedAddress { address: address(member), time_to_live }).collect()
}

const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_secs(1);

fn net() -> (Net, [TcpListener; 2]) {
    let mut net = Net::new();
    for pod in [2, 3, 4] {
        net.pod(pod);
    }
    let listeners = ["10.1.0.3:80", "[fd01::3]:80"].map(|at| net.listen("p3", at));
    (net, listeners)
}

/// Whether pod 2 reaches pod 3, over both families. Connections are accepted: the queue of a listener is short.
fn reaches(net: &Net, listeners: &[TcpListener; 2]) -> [bool; 2] {
    let reached = ["10.1.0.3:80", "[fd01::3]:80"].map(|at| net.connect("p2", at).is_some());
    listeners.iter().for_each(|listener| while listener.accept().is_ok() {});
    reached
}

#[test]
fn learned_address_passes_until_its_end_and_its_connections_are_cut_then() {
    let (net, listeners) = net();
    let mut driver = net.driver();
    let rules = rules(&["10.1.0.4"], 1);
    driver.apply(&rules).expect("applied");
    assert_eq!(reaches(&net, &listeners), [false; 2]);
    let began = Instant::now();
    assert_eq!(driver.learn(known(), &learned(&["10.1.0.2", "fd01::2"], SHORT * 3)).expect("learned"), 0);
    assert_eq!(reaches(&net, &listeners), [true; 2]);
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &listeners[0]);
    while reaches(&net, &listeners) != [false; 2] {
        assert!(began.elapsed() < SHORT * 20, "it never ends: {}", nft(&net, "list table inet hanse"));
    }
    assert!(began.elapsed() >= SHORT * 3, "{:?}", began.elapsed());
    // The kernel ends it by itself; the next check for drift cuts connections, and finds no drift.
    assert!(until(|| (!driver.repair().expect("looked") && is_reset(&mut client)).then_some(())).is_some());
    assert!(!passes(&mut server, &mut client));
    assert_eq!(reaches(&net, &listeners), [false; 2]);
}

#[test]
fn learned_addresses_are_neither_in_the_digest_nor_drift() {
    let (net, listeners) = net();
    let mut driver = net.driver();
    let rules = rules(&["10.1.0.4"], 1);
    driver.apply(&rules).expect("applied");
    driver.learn(known(), &learned(&["10.1.0.2"], LONG)).expect("learned");
    assert!(!driver.repair().expect("looked"));
    let found = Found::Rules { generation: rules.generation, digest: rules.digest() };
    assert_eq!(net.driver().adopt(Some(&rules)).expect("read"), found);
    // A repair writes the learned addresses as well.
    nft(&net, "flush chain inet hanse forward");
    assert!(driver.repair().expect("repaired"));
    assert_eq!(reaches(&net, &listeners), [true, false]);
    assert_eq!(net.driver().adopt(Some(&rules)).expect("read"), found);
}

#[test]
fn learned_addresses_stay_while_their_set_does() {
    let (net, listeners) = net();
    let mut driver = net.driver();
    driver.apply(&rules(&["10.1.0.4"], 1)).expect("applied");
    driver.learn(known(), &learned(&["10.1.0.2", "fd01::2"], LONG)).expect("learned");
    // Compiled as well, and no longer.
    for (number, members) in [(2, &["10.1.0.2", "10.1.0.4"][..]), (3, &["10.1.0.4"]), (4, &[])] {
        driver.apply(&rules(members, number)).expect("applied");
        assert_eq!(reaches(&net, &listeners), [true; 2], "{members:?}");
    }
    // A generation without the set forgets them.
    let without = Build { pods: vec![2, 3, 4], ingress: Some(vec![]), number: 5, ..Build::default() };
    driver.apply(&without.rules()).expect("applied");
    driver.apply(&rules(&["10.1.0.4"], 6)).expect("applied");
    assert_eq!(reaches(&net, &listeners), [false; 2]);
    // A set that does not exist.
    let unknown = SetId::of_meaning(&["another"]);
    assert_eq!(driver.learn(unknown, &learned(&["10.1.0.2"], LONG)).expect("nothing to do"), 1);
    assert_eq!(reaches(&net, &listeners), [false; 2]);
}

#[test]
fn compiled_members_do_not_end_with_what_was_learned() {
    let (net, listeners) = net();
    let mut driver = net.driver();
    driver.apply(&rules(&["10.1.0.4"], 1)).expect("applied");
    let began = Instant::now();
    driver.learn(known(), &learned(&["10.1.0.2", "fd01::2"], SHORT)).expect("learned");
    // One becomes a compiled member, the other is extended.
    driver.apply(&rules(&["10.1.0.2", "10.1.0.4"], 2)).expect("applied");
    driver.learn(known(), &learned(&["fd01::2"], LONG)).expect("learned");
    while began.elapsed() < SHORT * 2 {
        assert!(!driver.repair().expect("looked"), "no drift");
        assert_eq!(reaches(&net, &listeners), [true; 2]);
    }
}

#[test]
fn restarted_agent_keeps_learned_addresses_only_with_the_rules_it_adopts() {
    let (net, listeners) = net();
    let mut driver = net.driver();
    let first = rules(&["10.1.0.4"], 1);
    driver.apply(&first).expect("applied");
    driver.learn(known(), &learned(&["10.1.0.2"], LONG)).expect("learned");
    driver.learn(known(), &learned(&["fd01::2"], SHORT)).expect("learned");
    let began = Instant::now();
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &listeners[0]);
    drop(driver);
    let mut driver = net.driver();
    driver.adopt(Some(&first)).expect("read");
    driver.apply(&first).expect("applied");
    assert_eq!(reaches(&net, &listeners), [true; 2]);
    assert!(passes(&mut client, &mut server), "connections stay");
    // It has read them: a learned address that is compiled does not end, and one that is no longer compiled stays until its end.
    driver.apply(&rules(&["fd01::2", "10.1.0.2"], 2)).expect("applied");
    driver.apply(&rules(&["fd01::2"], 3)).expect("applied");
    while began.elapsed() < SHORT * 2 {
        driver.repair().expect("looked");
        assert_eq!(reaches(&net, &listeners), [true; 2]);
    }
    // An agent that does not know the rules in force writes a new table, without learned addresses.
    let mut driver = net.driver();
    driver.adopt(None).expect("read");
    driver.apply(&rules(&["fd01::2"], 4)).expect("applied");
    assert_eq!(reaches(&net, &listeners), [false, true]);
}

/// Also for a set that denies.
#[test]
fn learning_judges_connections_again() {
    let (net, listeners) = net();
    let mut driver = net.driver();
    let build = Build {
        pods: vec![2, 3, 4],
        ingress: Some(vec![from_set(Action::Deny, "known"), rule(Action::Allow)]),
        sets: vec![addresses("known", &[])],
        ..Build::default()
    };
    driver.apply(&build.rules()).expect("applied");
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &listeners[0]);
    assert!(passes(&mut client, &mut server));
    driver.learn(known(), &learned(&["10.1.0.2"], LONG)).expect("learned");
    assert!(is_reset(&mut client));
}
