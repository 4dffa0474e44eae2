//! Verdicts of rules on packets.

use std::sync::Arc;

use hanse_dataplane::Backend as _;
use hanse_ruleset::{
    Action, Chain, EndpointId, Enforcement, Generation, LocalEndpoint, Members, NodeConfig, OwnStream, Peer, Phase,
    Policy, PortRange, Rule, RuleSet, Set, SetId, Tier, TierDefault, UnknownPods,
};

use crate::net::{Net, address, passes};

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
    pub own_streams: Vec<OwnStream>,
    pub unknown_pods: UnknownPods,
    pub enforcement: Enforcement,
    pub number: u64,
}

impl Build {
    pub fn rules(self) -> Arc<RuleSet> {
        let mut rules = RuleSet {
            generation: Generation { term: 1, number: self.number },
            node: NodeConfig {
                pod_ranges: vec!["10.1.0.0/24".parse().expect("a net"), "fd01::/64".parse().expect("a net")],
                own_streams: self.own_streams,
                unknown_pods: self.unknown_pods,
                enforcement: self.enforcement,
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
fn pod_reaches_its_node_unless_another_kind_than_networkpolicy_denies_it() {
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
fn new_pod_is_closed_until_its_rules_arrive() {
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

#[test]
fn uplink_may_bring_any_source() {
    let mut net = Net::new();
    net.pod(2);
    let mut driver = net.driver();
    // Neither is routed back to where it comes from: the one comes by the uplink, the other from the pod.
    for (host, source) in [("remote", "10.77.0.1"), ("p2", "10.77.0.2")] {
        crate::net::ip(&format!("-n {} addr add {source}/32 dev lo", net.name(host)));
    }
    let (at_pod, at_remote) = (net.udp("p2", "10.1.0.2:53"), net.udp("remote", "10.9.0.2:53"));
    assert!(net.datagram("remote", "10.77.0.1:4000", &at_pod) && net.datagram("p2", "10.77.0.2:4000", &at_remote));
    driver.apply(&Build { pods: vec![2], ..Build::default() }.rules()).expect("applied");
    assert!(net.datagram("remote", "10.77.0.1:4001", &at_pod));
    assert!(!net.datagram("p2", "10.77.0.2:4001", &at_remote));
}

/// A stream from anywhere to `port` of pod 3, of pod 2 and of the node.
fn own_stream(port: u16) -> OwnStream {
    let to = ["10.1.0.2/31", "10.1.255.1/32", "fd01::2/127", "fd01:ffff::1/128", "10.9.0.2/32", "fd09::2/128"];
    OwnStream {
        name: "member to agents".into(),
        from: Vec::new(),
        to: to.map(|net| net.parse().expect("a net")).into(),
        protocol: 6,
        port,
    }
}

#[test]
fn own_streams_cannot_be_denied_in_any_hook_direction_or_family() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let ways = [
        ("p2", "p3", "10.1.0.3"),
        ("p2", "p3", "fd01::3"),
        ("remote", "p3", "10.1.0.3"),
        ("remote", "p3", "fd01::3"),
        ("p2", "remote", "10.9.0.2"),
        ("p2", "remote", "fd09::2"),
        ("p2", "node", "10.1.255.1"),
        ("p2", "node", "fd01:ffff::1"),
        ("node", "p3", "10.1.0.3"),
        ("node", "p3", "fd01::3"),
    ];
    // Deny-everything, everywhere; pod 3 is not even known.
    let closed = |number, own_streams| Build {
        pods: vec![2],
        ingress: Some(vec![]),
        egress: Some(vec![]),
        to_node: Some(vec![]),
        own_streams,
        number,
        ..Build::default()
    };
    driver.apply(&closed(1, vec![own_stream(7443)]).rules()).expect("applied");
    let mut held = Vec::new();
    for (from, to, at) in ways {
        let ip = address(at);
        let (own, other) = (std::net::SocketAddr::new(ip, 7443), std::net::SocketAddr::new(ip, 7444));
        let listeners = [own, other].map(|at| net.listen(to, &at.to_string()));
        assert_eq!(net.connect(from, &other.to_string()).is_some(), from == "node", "{from} to {other}: another port");
        let (mut client, mut server) = net.pair(from, &own.to_string(), &listeners[0]);
        assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client), "{from} to {own}");
        held.push((from, own, client, server));
    }
    // It continues across generations, busy or not, and the server may send first.
    driver.apply(&closed(2, vec![own_stream(7443), own_stream(9)]).rules()).expect("applied");
    for (from, own, client, server) in &mut held {
        assert!(passes(server, client) && passes(client, server), "{from} to {own}: after a generation");
    }
    // Only the list of own streams opened them.
    driver.apply(&closed(3, vec![]).rules()).expect("applied");
    for (from, own, client, server) in &mut held {
        assert_eq!(passes(server, client), *from == "node", "{from} to {own}: without the list");
    }
}

#[test]
fn unknown_pods_pass_with_the_setting_allow() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let _listeners = ["10.1.0.3:80", "[fd01::3]:80"].map(|at| net.listen("p3", at));
    for (number, unknown_pods) in [(1, UnknownPods::Deny), (2, UnknownPods::Allow), (3, UnknownPods::Deny)] {
        driver.apply(&Build { pods: vec![2], unknown_pods, number, ..Build::default() }.rules()).expect("applied");
        for (from, to) in [("p2", "10.1.0.3:80"), ("p2", "[fd01::3]:80"), ("remote", "10.1.0.3:80")] {
            let passes = unknown_pods == UnknownPods::Allow;
            assert_eq!(net.connect(from, to).is_some(), passes, "{from} to {to}, {unknown_pods:?}");
        }
    }
}

#[test]
fn node_that_observes_drops_nothing_until_it_enforces() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    net.pod(4);
    let mut driver = net.driver();
    let mut apply = |number, enforcement| {
        // Pod 4 has no rules, as a new pod.
        let build = Build { pods: vec![2, 3], ingress: Some(vec![]), to_node: Some(vec![]), ..Build::default() };
        driver.apply(&Build { enforcement, number, ..build }.rules()).expect("applied");
    };
    let to = [("p2", "p3", "10.1.0.3:80"), ("p2", "p3", "[fd01::3]:80"), ("remote", "p3", "10.1.0.3:81")];
    let unknown = [("p4", "p3", "10.1.0.3:82"), ("p3", "p4", "10.1.0.4:80"), ("p2", "node", "10.1.255.1:83")];
    let ways: Vec<_> = to.into_iter().chain(unknown).collect();
    let listeners: Vec<_> = ways.iter().map(|(_, at, address)| net.listen(at, address)).collect();
    let mut held = Vec::new();
    for (number, enforcement) in
        [(1, Enforcement::Enforce), (2, Enforcement::Observe), (3, Enforcement::Observe), (4, Enforcement::Enforce)]
    {
        apply(number, enforcement);
        for (client, server) in &mut held {
            let both = passes(client, server) && passes(server, client);
            assert_eq!(both, enforcement == Enforcement::Observe, "generation {number}: {client:?}");
        }
        for ((from, _, address), listener) in ways.iter().zip(&listeners) {
            match enforcement {
                Enforcement::Observe => held.push(net.pair(from, address, listener)),
                Enforcement::Enforce => assert!(net.connect(from, address).is_none(), "{from} to {address}: {number}"),
            }
        }
    }
}

#[test]
fn pod_reaches_itself_through_a_service_and_its_node_regardless_of_policy() {
    let mut net = Net::new();
    net.pod(2);
    let mut driver = net.driver();
    let node = net.name("node");
    let nat = "table ip services { chain prerouting { type nat hook prerouting priority -100; \
               ip daddr 10.96.0.1 tcp dport 80 dnat to 10.1.0.2:80; }; chain postrouting { type nat hook postrouting \
               priority 100; ip saddr 10.1.0.2 ip daddr 10.1.0.2 masquerade; }; }";
    crate::net::ip(&format!("netns exec {node} nft {nat}"));
    driver
        .apply(&Build { pods: vec![2], ingress: Some(vec![]), egress: Some(vec![]), ..Build::default() }.rules())
        .expect("applied");
    let _listener = net.listen("p2", "10.1.0.2:80");
    assert!(net.connect("p2", "10.96.0.1:80").is_some(), "the packet turns at the node");
    assert!(net.connect("remote", "10.1.0.2:80").is_none());
}

/// A link-local address does not identify the sender, nor a group the receivers.
#[test]
fn link_local_addresses_do_not_bypass_policy() {
    // A pod and its node.
    let mut net = Net::new();
    net.pod(2);
    let mut driver = net.driver();
    let _listener = net.listen("node", "[::]:90");
    let link = net.within("p2", || nix::net::if_::if_nametoindex("eth0").expect("its index"));
    let to = format!("[fe80::1%{link}]:90");
    assert!(net.connect("p2", &to).is_some(), "without rules");
    driver.apply(&Build { pods: vec![2], to_node: Some(vec![]), ..Build::default() }.rules()).expect("applied");
    assert!(net.connect("p2", &to).is_none());
    assert!(net.connect("p2", "[fd01:ffff::1]:90").is_none());

    // Pods on a bridge.
    let mut net = Net::new();
    net.bridged_pods(&[2, 3, 4], true);
    let mut driver = net.driver();
    let (receiver, nameless) = (net.name("p3"), net.name("p4"));
    crate::net::ip(&format!("-n {nameless} addr flush dev eth0"));
    crate::net::ip(&format!("-n {nameless} route add default dev eth0"));
    crate::net::ip(&format!("-n {receiver} addr add fe80::3/64 dev eth0 nodad"));
    let link = net.within("p2", || nix::net::if_::if_nametoindex("eth0").expect("its index"));
    let by_link = format!("[fe80::3%{link}]:80");
    let _listener = net.listen("p3", "[::]:80");
    let sockets = ["0.0.0.0:53", "[::]:54"].map(|at| net.udp("p3", at));
    let to_all = |pod: &str, from: &str, to: &str, socket: &std::net::UdpSocket| {
        let sender = net.udp(pod, from);
        sender.set_broadcast(true).expect("set");
        crate::net::drain(socket);
        let to: std::net::SocketAddr = to.parse().expect("an address");
        sender.send_to(b"probe", to).is_ok() && socket.recv_from(&mut [0; 16]).is_ok()
    };
    let group = format!("[ff02::1%{link}]:54");
    let ways = || {
        [
            net.connect("p2", &by_link).is_some(),
            to_all("p2", "10.1.0.2:4000", "255.255.255.255:53", &sockets[0]),
            to_all("p2", "10.1.0.2:4000", "224.0.0.1:53", &sockets[0]),
            // From 0.0.0.0, for it has no address.
            to_all("p4", "0.0.0.0:4000", "255.255.255.255:53", &sockets[0]),
            to_all("p2", "[fd01::2]:4000", &group, &sockets[1]),
            to_all("p2", "[::]:4000", &group, &sockets[1]),
        ]
    };
    // A port of a bridge forwards some time after it is up.
    assert!(crate::net::until(|| net.connect("p2", &by_link)).is_some(), "without rules");
    assert_eq!(ways(), [true; 6], "without rules");
    driver.apply(&Build { pods: vec![2, 3], ingress: Some(vec![]), ..Build::default() }.rules()).expect("applied");
    assert_eq!(ways(), [false; 6]);
    let open = Build { pods: vec![2, 3], number: 1, ..Build::default() };
    driver.apply(&open.rules()).expect("applied");
    assert!(net.connect("p2", "[fd01::3]:80").is_some() && net.connect("p2", "10.1.0.3:80").is_some());
}

/// The inner packet could have any source.
#[test]
fn pods_cannot_send_into_tunnels_of_the_node() {
    let mut net = Net::new();
    net.pod(2);
    let mut driver = net.driver();
    let sockets = [4789, 8472, 6081].map(|port| net.udp("node", &format!("10.1.255.1:{port}")));
    let other = net.udp("node", "10.1.255.1:4790");
    let seen = "table ip seen { chain in { type filter hook input priority 0; ip protocol 4 counter; }; }";
    crate::net::ip(&format!("netns exec {} nft {seen}", net.name("node")));
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 4, 0, 0, 10, 1, 0, 2, 10, 1, 255, 1];
    packet.extend([0x45, 0, 0, 20, 0, 0, 0, 0, 64, 59, 0, 0, 10, 1, 0, 9, 10, 1, 0, 8]);
    let wrapped = || {
        net.raw("p2", address("10.1.255.1"), &packet);
        let text = crate::net::nft(&net, "list table ip seen");
        text.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok())
    };
    assert!(crate::net::until(|| wrapped().filter(|count: &u64| *count > 0)).is_some(), "without rules");
    for socket in &sockets {
        assert!(net.datagram("p2", "10.1.0.2:4000", socket), "without rules");
    }
    driver.apply(&Build { pods: vec![2], ..Build::default() }.rules()).expect("applied");
    let before = wrapped();
    for socket in &sockets {
        assert!(!net.datagram("p2", "10.1.0.2:4000", socket));
    }
    assert!(net.datagram("p2", "10.1.0.2:4000", &other));
    assert_eq!(wrapped(), before);
}

#[test]
fn neighbour_discovery_does_not_bypass_policy() {
    let mut net = Net::new();
    net.pod(2);
    let mut driver = net.driver();
    // A neighbour advertisement with a forged source, to the remote host: routers never forward these.
    let (from, to) = (address("fd77::1"), address("fd09::2"));
    let (std::net::IpAddr::V6(source), std::net::IpAddr::V6(target)) = (from, to) else { unreachable!() };
    let mut message = vec![136, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    let length = u32::try_from(message.len()).expect("short").to_be_bytes();
    let pseudo = [&source.octets()[..], &target.octets(), &length, &[0, 0, 0, 58], &message].concat();
    let mut sum: u32 = pseudo.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    message[2..4].copy_from_slice(&(!u16::try_from(sum).expect("folded")).to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0, 0, 24, 58, 255];
    packet.extend(source.octets());
    packet.extend(target.octets());
    packet.extend(&message);
    // A table of the remote host counts its packets.
    let remote = net.name("remote");
    let count =
        "table ip6 seen { chain in { type filter hook prerouting priority -300; ip6 saddr fd77::1 counter; }; }";
    crate::net::ip(&format!("netns exec {remote} nft {count}"));
    let seen = || {
        let listed = std::process::Command::new("ip")
            .args(["netns", "exec", &remote, "nft", "list", "table", "ip6", "seen"])
            .output()
            .expect("nft of nftables");
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        let packets = text.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next()).expect("a counter");
        packets.parse::<u64>().expect("a number")
    };
    net.raw("p2", to, &packet);
    assert!(crate::net::until(|| (seen() == 1).then_some(())).is_some(), "without rules it arrives");
    driver.apply(&Build { pods: vec![2], ..Build::default() }.rules()).expect("applied");
    net.raw("p2", to, &packet);
    // An allowed packet takes the same way afterwards.
    let _listener = net.listen("remote", "[fd09::2]:80");
    assert!(net.connect("p2", "[fd09::2]:80").is_some(), "the pod's own discovery works");
    assert_eq!(seen(), 1);
}

#[test]
fn untracked_packets_pass_only_where_nothing_is_judged() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    // Another table disables tracking.
    let node = net.name("node");
    let table =
        "table inet other { chain pre { type filter hook prerouting priority -300; udp dport 5000 notrack; }; }";
    crate::net::ip(&format!("netns exec {node} nft {table}"));
    let ways = [
        ("10.1.0.2:4000", "p3", "10.1.0.3:5000"),
        ("10.1.0.2:4000", "remote", "10.9.0.2:5000"),
        ("10.1.0.2:4000", "node", "10.1.255.1:5000"),
        ("[fd01::2]:4000", "p3", "[fd01::3]:5000"),
        ("[fd01::2]:4000", "node", "[fd01:ffff::1]:5000"),
    ];
    let receivers = ways.map(|(_, to, at)| (to, net.udp(to, at)));
    for (number, to_node) in [(1, None), (2, Some(vec![]))] {
        let guarded = to_node.is_some();
        driver.apply(&Build { pods: vec![2, 3], to_node, number, ..Build::default() }.rules()).expect("applied");
        for ((from, to, at), (_, receiver)) in ways.iter().zip(&receivers) {
            // No policy denies these, but none could.
            let passes = *to == "node" && !guarded;
            assert_eq!(net.datagram("p2", from, receiver), passes, "{at}, guarded: {guarded}");
        }
    }
}

#[test]
fn fragments_are_judged_as_one_packet() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let udp = |port| {
        let destination = Peer { ports: vec![PortRange { first: port, last: port }], ..Peer::default() };
        Rule { destination, protocol: Some(17), ..rule(Action::Allow) }
    };
    driver
        .apply(&Build { pods: vec![2, 3], ingress: Some(vec![udp(5000)]), ..Build::default() }.rules())
        .expect("applied");
    for (from, at, passes) in [
        ("10.1.0.2:0", "10.1.0.3:5000", true),
        ("10.1.0.2:0", "10.1.0.3:5001", false),
        ("[fd01::2]:0", "[fd01::3]:5000", true),
        ("[fd01::2]:0", "[fd01::3]:5001", false),
    ] {
        let (receiver, sender) = (net.udp("p3", at), net.udp("p2", from));
        // Three fragments on a link of 1,500 bytes; only the first has ports.
        sender.send_to(&[7; 4000], at).expect("sent");
        let mut buffer = [0; 8000];
        assert_eq!(receiver.recv_from(&mut buffer).is_ok_and(|(length, _)| length == 4000), passes, "{at}");
    }
}

#[test]
fn errors_about_allowed_connections_pass() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let build = Build { pods: vec![2, 3], ingress: Some(vec![from_set(Action::Allow, "clients")]), ..Build::default() };
    // Pod 2 may open connections to pod 3, none are allowed to pod 2: the error is not a connection of its own.
    let build = Build { sets: vec![addresses("clients", &["10.1.0.2", "fd01::2"])], ..build };
    driver.apply(&build.rules()).expect("applied");
    for (from, to) in [("10.1.0.2:4000", "10.1.0.3:9"), ("[fd01::2]:4000", "[fd01::3]:9")] {
        let socket = net.udp("p2", from);
        socket.connect(to).expect("set");
        socket.send(b"no listener").expect("sent");
        let error = socket.recv(&mut [0; 16]).expect_err("no answer");
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::ConnectionRefused,
            "{to}: the port is unreachable, and we hear it"
        );
    }
}
