//! Restart, drift, removal, and what the kernel refuses.

use std::process::Command;

use hanse_dataplane::{Backend as _, Found};
use hanse_ruleset::Action;

use crate::net::{Net, passes};
use crate::verdicts::{Build, addresses, from_set, rule};

fn nft(net: &Net, command: &str) -> String {
    let output = Command::new("ip")
        .args(["netns", "exec", &net.name("node"), "nft"])
        .args(command.split(' '))
        .output()
        .expect("nft of nftables");
    assert!(output.status.success(), "nft {command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn closed() -> Build {
    Build {
        pods: vec![2, 3],
        ingress: Some(vec![from_set(Action::Allow, "friends")]),
        sets: vec![addresses("friends", &["10.1.0.9", "fd01::9"])],
        ..Build::default()
    }
}

#[test]
fn a_restarted_agent_adopts_what_it_finds() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let rules = closed().rules();
    let mut driver = net.driver();
    assert_eq!(driver.adopt(Some(&rules)).expect("read"), Found::Nothing);
    driver.apply(&rules).expect("applied");
    drop(driver);
    // Enforcement outlives the agent.
    let _listener = net.listen("p3", "10.1.0.3:80");
    assert!(net.connect("p2", "10.1.0.3:80").is_none());
    let before = nft(&net, "-a list table inet hanse");
    let mut driver = net.driver();
    let found = Found::Rules { generation: rules.generation, digest: rules.digest() };
    assert_eq!(driver.adopt(Some(&rules)).expect("read"), found);
    assert_eq!(nft(&net, "-a list table inet hanse"), before, "adoption changes nothing");
    // Only the difference is written: the policy's chain keeps its handle.
    let next = Build { pods: vec![2, 3, 4], number: 7, ..closed() }.rules();
    driver.apply(&next).expect("applied");
    let after = nft(&net, "-a list table inet hanse");
    let policy = before.lines().find(|line| line.contains("chain p4-")).expect("the policy's chain");
    assert!(after.lines().any(|line| line == policy), "the chain of the policy was written again");
    assert!(net.connect("p2", "10.1.0.3:80").is_none());
    // Without knowing what should be there, the rules stay, and the next generation replaces them whole.
    drop(driver);
    let mut driver = net.driver();
    assert!(matches!(driver.adopt(None).expect("read"), Found::Rules { .. }));
    assert!(net.connect("p2", "10.1.0.3:80").is_none());
    let open = Build { pods: vec![2, 3], number: 8, ..Build::default() }.rules();
    driver.apply(&open).expect("applied");
    assert!(net.connect("p2", "10.1.0.3:80").is_some());
}

#[test]
fn a_tampered_table_is_not_adopted() {
    let net = Net::new();
    let rules = closed().rules();
    net.driver().apply(&rules).expect("applied");
    let chain = nft(&net, "list table inet hanse");
    let name = chain
        .lines()
        .find(|line| line.contains("chain p4-"))
        .and_then(|line| line.split_whitespace().nth(1))
        .expect("a chain")
        .to_owned();
    nft(&net, &format!("flush chain inet hanse {name}"));
    let mut driver = net.driver();
    driver.adopt(Some(&rules)).expect("read");
    driver.apply(&rules).expect("applied");
    let chain = nft(&net, &format!("list chain inet hanse {name}"));
    assert!(chain.contains("ct original"), "{chain}");
}

#[test]
fn drift_is_repaired() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    driver.apply(&closed().rules()).expect("applied");
    let _listener = net.listen("p3", "10.1.0.3:80");
    assert!(!driver.repair().expect("looked"), "nothing was changed");
    for damage in ["flush chain inet hanse forward", "delete table inet hanse", "flush ruleset"] {
        nft(&net, damage);
        assert!(net.connect("p2", "10.1.0.3:80").is_some(), "{damage}: the damage is real");
        assert!(driver.repair().expect("repaired"), "{damage}");
        assert!(net.connect("p2", "10.1.0.3:80").is_none(), "{damage}");
        assert!(!driver.repair().expect("looked"), "{damage}: its own repair is no drift");
    }
    // Somebody else's table is none of ours.
    nft(&net, "add table inet other");
    assert!(!driver.repair().expect("looked"));
}

#[test]
fn cleanup_leaves_nothing_and_cuts_nobody() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let open = Build { pods: vec![2, 3], ingress: Some(vec![rule(Action::Allow)]), ..Build::default() };
    driver.apply(&open.rules()).expect("applied");
    let listener = net.listen("p3", "10.1.0.3:80");
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &listener);
    driver.cleanup().expect("removed");
    driver.cleanup().expect("nothing to remove is fine");
    assert_eq!(nft(&net, "list ruleset").trim(), "");
    assert!(passes(&mut client, &mut server));
}
