//! What rules mean to packets.

use std::sync::Arc;

use hanse_dataplane::Backend as _;
use hanse_ruleset::{
    Action, Chain, EndpointId, Generation, LocalEndpoint, Members, NodeConfig, Peer, Phase, Policy, PortRange, Rule,
    RuleSet, Set, SetId, Tier, TierDefault,
};

use crate::net::{Net, address};

pub fn rule(action: Action) -> Rule {
    Rule {
        action,
        index: 0,
        unknown: false,
        family: None,
        protocol: None,
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: Peer::default(),
        destination: Peer::default(),
    }
}

/// A rule set of pods 10.1.0.N and fd01::N that are all judged by the same two lists of rules, `None`: not at all.
#[derive(Default)]
pub struct Build {
    pub pods: Vec<u8>,
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
    pub to_node: Option<Vec<Rule>>,
    pub sets: Vec<Set>,
    pub number: u64,
}

impl Build {
    pub fn rules(self) -> Arc<RuleSet> {
        let mut rules = RuleSet {
            generation: Generation { term: 1, number: self.number },
            node: NodeConfig {
                pod_ranges: vec!["10.1.0.0/24".parse().expect("a net"), "fd01::/64".parse().expect("a net")],
                ..NodeConfig::default()
            },
            ..RuleSet::default()
        };
        for set in self.sets {
            rules.sets.insert(set.id, Arc::new(set));
        }
        let mut chain = |list: Option<Vec<Rule>>, name: &str| {
            let tiers = list.map(|list| {
                let policy = Policy { name: name.into(), rules: list };
                let id = policy.id();
                rules.policies.insert(id, Arc::new(policy));
                Tier { name: "default".into(), policies: vec![id], default: TierDefault::Deny }
            });
            let phase = Phase { name: "Local".into(), tiers: tiers.into_iter().collect() };
            let chain = Chain { phases: vec![phase], profile_allows: true };
            let id = chain.id();
            rules.chains.insert(id, Arc::new(chain));
            id
        };
        let ingress = chain(self.ingress, "ingress");
        let egress = chain(self.egress, "egress");
        let egress_to_node = chain(self.to_node, "to node");
        for pod in self.pods {
            let id = EndpointId { namespace: "a".into(), name: format!("p{pod}").into() };
            let addresses = vec![address(&format!("10.1.0.{pod}")), address(&format!("fd01::{pod}"))];
            let endpoint = LocalEndpoint { id: id.clone(), addresses, ingress, egress, egress_to_node };
            rules.endpoints.insert(id, Arc::new(endpoint));
        }
        Arc::new(rules)
    }
}

pub fn addresses(name: &str, members: &[&str]) -> Set {
    let members = members.iter().map(|member| address(member)).collect();
    Set { id: SetId::of_meaning(&[name]), members: Members::Addresses(members) }
}

pub fn from_set(action: Action, name: &str) -> Rule {
    let source = Peer { in_sets: vec![vec![SetId::of_meaning(&[name])]], ..Peer::default() };
    Rule { source, ..rule(action) }
}

pub fn to_port(action: Action, port: u16) -> Rule {
    let destination = Peer { ports: vec![PortRange { first: port, last: port }], ..Peer::default() };
    Rule { destination, protocol: Some(6), ..rule(action) }
}

#[test]
fn ports_sets_and_families() {
    let mut net = Net::new();
    for pod in [2, 3, 4] {
        net.pod(pod);
    }
    let mut driver = net.driver();
    let listeners = ["10.1.0.3:80", "10.1.0.3:81", "[fd01::3]:80", "[fd01::3]:81"].map(|at| net.listen("p3", at));
    // Nothing applied: open, which shows that the network itself works.
    for to in ["10.1.0.3:80", "10.1.0.3:81", "[fd01::3]:80", "[fd01::3]:81"] {
        assert!(net.connect("p2", to).is_some(), "{to} without rules");
        assert!(net.connect("remote", to).is_some(), "{to} from outside without rules");
    }
    let allowed = Rule { source: from_set(Action::Allow, "clients").source, ..to_port(Action::Allow, 80) };
    let build = Build {
        pods: vec![2, 3, 4],
        ingress: Some(vec![allowed]),
        sets: vec![addresses("clients", &["10.1.0.2", "fd01::2", "10.9.0.2"])],
        ..Build::default()
    };
    driver.apply(&build.rules()).expect("applied");
    for (from, to, passes) in [
        ("p2", "10.1.0.3:80", true),
        ("p2", "[fd01::3]:80", true),
        ("p2", "10.1.0.3:81", false),
        ("p2", "[fd01::3]:81", false),
        ("p4", "10.1.0.3:80", false),
        ("p4", "[fd01::3]:80", false),
        ("remote", "10.1.0.3:80", true),
        ("remote", "[fd01::3]:80", false),
        // The node always reaches its own pods.
        ("node", "10.1.0.3:81", true),
        ("node", "[fd01::3]:81", true),
    ] {
        assert_eq!(net.connect(from, to).is_some(), passes, "{from} to {to}");
    }
    drop(listeners);
}

#[test]
fn a_pod_reaches_its_node_unless_another_kind_than_networkpolicy_denies_it() {
    let mut net = Net::new();
    net.pod(2);
    let mut driver = net.driver();
    let _listeners = ["10.1.255.1:90", "[fd01:ffff::1]:90"].map(|at| net.listen("node", at));
    let both = ["10.1.255.1:90", "[fd01:ffff::1]:90"];
    driver.apply(&Build { pods: vec![2], egress: Some(vec![]), ..Build::default() }.rules()).expect("applied");
    for to in both {
        assert!(net.connect("p2", to).is_some(), "{to}");
    }
    let closed = Build { pods: vec![2], to_node: Some(vec![]), number: 1, ..Build::default() };
    driver.apply(&closed.rules()).expect("applied");
    for to in both {
        assert!(net.connect("p2", to).is_none(), "{to}");
    }
}

#[test]
fn a_new_pod_is_closed_until_its_rules_arrive() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let _listeners = ["10.1.0.3:80", "[fd01::3]:80"].map(|at| net.listen("p3", at));
    let _own = net.listen("p2", "10.1.0.2:80");
    driver.apply(&Build { pods: vec![3], ..Build::default() }.rules()).expect("applied");
    assert!(net.connect("p2", "10.1.0.3:80").is_none());
    assert!(net.connect("p2", "[fd01::3]:80").is_none());
    assert!(net.connect("p3", "10.1.0.2:80").is_none());
    assert!(net.connect("remote", "10.1.0.2:80").is_none());
    assert!(net.connect("node", "10.1.0.2:80").is_some());
    driver.apply(&Build { pods: vec![2, 3], number: 1, ..Build::default() }.rules()).expect("applied");
    assert!(net.connect("p2", "10.1.0.3:80").is_some());
    assert!(net.connect("p2", "[fd01::3]:80").is_some());
    assert!(net.connect("p3", "10.1.0.2:80").is_some());
}

#[test]
fn forged_sources_do_not_pass() {
    let mut net = Net::new();
    for pod in [2, 3, 4] {
        net.pod(pod);
    }
    let mut driver = net.driver();
    let target = net.udp("p3", "10.1.0.3:53");
    // Pod 4 takes the address of pod 2, of the remote host and of the node.
    let thief = net.name("p4");
    for stolen in ["10.1.0.2", "10.9.0.2", "10.1.255.1"] {
        crate::net::ip(&format!("-n {thief} addr add {stolen}/32 dev lo"));
    }
    let sources = ["10.1.0.2:4000", "10.9.0.2:4000"];
    for source in sources {
        assert!(net.datagram("p4", source, &target), "{source} without rules: the forgery itself works");
    }
    let open = Build { pods: vec![2, 3, 4], ..Build::default() };
    driver.apply(&open.rules()).expect("applied");
    for source in ["10.1.0.2:4000", "10.9.0.2:4000", "10.1.255.1:4000"] {
        assert!(!net.datagram("p4", source, &target), "{source}");
    }
    assert!(net.datagram("p4", "10.1.0.4:4000", &target));
    assert!(net.datagram("p2", "10.1.0.2:4000", &target));
}
