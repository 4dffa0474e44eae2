//! Findings of probes: pods are enforced only if the hooks see their packets.

use std::collections::BTreeMap;

use hanse_dataplane::nftables::Nftables;
use hanse_dataplane::{Backend as _, Finding};

use crate::net::{Net, address, ip, until};
use crate::verdicts::Build;

/// The findings of pods 2, 3, … by their names: probed again until they are as expected, since answers may take a moment.
fn probed(net: &Net, driver: &mut Nftables, pods: &[u8], wanted: &[(&str, Finding)]) -> BTreeMap<String, Finding> {
    let rules = Build { pods: pods.to_vec(), ..Build::default() }.rules();
    let endpoints: Vec<_> = rules.endpoints.values().cloned().collect();
    let mut found = BTreeMap::new();
    let mut ask = || {
        driver.probe(&endpoints).expect("sent");
        let pause = std::time::Instant::now() + std::time::Duration::from_millis(50);
        while std::time::Instant::now() < pause {
            std::thread::yield_now();
        }
        let findings = driver.findings(&endpoints).expect("read");
        found = findings.into_iter().map(|(id, finding)| (id.name.to_string(), finding)).collect();
        wanted.iter().all(|(name, finding)| found.get(*name) == Some(finding)).then_some(())
    };
    net.within("node", || until(&mut ask));
    found
}

fn check(net: &Net, driver: &mut Nftables, pods: &[u8], wanted: &[(&str, Finding)]) {
    let found = probed(net, driver, pods, wanted);
    let wanted: BTreeMap<String, Finding> =
        wanted.iter().map(|(name, finding)| ((*name).to_owned(), finding.clone())).collect();
    assert_eq!(found, wanted);
}

#[test]
fn distinguishes_enforced_pods_from_others() {
    let mut net = Net::new();
    let mut driver = net.driver();
    net.pod(2);
    driver.apply(&Build { pods: vec![2], ..Build::default() }.rules()).expect("applied");
    // A pod alone on its node has no other pod to bypass the hooks to.
    check(&net, &mut driver, &[2], &[("p2", Finding::Enforced)]);
    for pod in [3, 4, 5] {
        net.pod(pod);
    }
    // Policy denies everything: the probe passes nevertheless.
    let closed = Build { pods: vec![2, 3, 4, 5, 6], ingress: Some(vec![]), egress: Some(vec![]), ..Build::default() };
    driver.apply(&closed.rules()).expect("applied");
    net.sysctl("p3", "net.ipv4.icmp_echo_ignore_all=1");
    let (node, four, five) = (net.name("node"), net.name("p4"), net.name("p5"));
    ip(&format!("link add second netns {node} type veth peer name eth1 netns {four}"));
    ip(&format!("-n {five} link add lan0 link eth0 type macvlan"));
    ip(&format!("-n {five} link set lan0 up"));
    ip(&format!("-n {node} addr add 10.1.0.6/32 dev lo"));
    let wanted = [
        ("p2", Finding::Enforced),
        ("p3", Finding::Silent(address("10.1.0.3"))),
        ("p4", Finding::SecondInterface("pod4, second".into())),
        ("p5", Finding::SecondInterface("pod5, lan0".into())),
        ("p6", Finding::HostNetwork(address("10.1.0.6"))),
    ];
    check(&net, &mut driver, &[2, 3, 4, 5, 6], &wanted);
}

/// In IPVS mode kube-proxy binds the addresses of services to this interface.
#[test]
fn reports_services_balanced_by_ipvs() {
    let mut net = Net::new();
    net.pod(2);
    let mut driver = net.driver();
    driver.apply(&Build { pods: vec![2], ..Build::default() }.rules()).expect("applied");
    check(&net, &mut driver, &[2], &[("p2", Finding::Enforced)]);
    let node = net.name("node");
    ip(&format!("-n {node} link add kube-ipvs0 type veth peer name other"));
    check(&net, &mut driver, &[2], &[("p2", Finding::Ipvs)]);
}

#[test]
fn pods_on_a_bridge_are_enforced_only_if_it_is_filtered() {
    for filtered in [true, false] {
        let mut net = Net::new();
        net.bridged_pods(&[2, 3], filtered);
        let mut driver = net.driver();
        driver.apply(&Build { pods: vec![2, 3], ingress: Some(vec![]), ..Build::default() }.rules()).expect("applied");
        let _listeners = ["10.1.0.3:80", "[fd01::3]:80"].map(|at| net.listen("p3", at));
        for to in ["10.1.0.3:80", "[fd01::3]:80"] {
            // What the probe is to say, by a packet.
            assert_eq!(net.connect("p2", to).is_none(), filtered, "{to}");
        }
        let finding = |pod: u8| match filtered {
            true => Finding::Enforced,
            false => Finding::Bypassed(address(&format!("10.1.0.{pod}"))),
        };
        check(&net, &mut driver, &[2, 3], &[("p2", finding(2)), ("p3", finding(3))]);
    }
}
