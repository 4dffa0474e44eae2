//! Random rule sets and packets: the kernel's verdict is the evaluator's.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use hanse_dataplane::Backend as _;
use hanse_ruleset::{
    Action, Chain, EndpointId, Family, Generation, Hook, LocalEndpoint, Members, NodeConfig, Packet, Peer, Phase,
    Policy, PortRange, Rule, RuleSet, Set, SetId, SocketAddress, Tier, TierDefault, Verdict, evaluate,
};

use crate::net::{Net, address};
use crate::verdicts::rule;

/// xorshift64*: the same seed gives the same worlds.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[usize::try_from(self.below(from.len() as u64)).expect("small")]
    }
}

const PODS: [u8; 3] = [2, 3, 4];
const PORTS: [u16; 4] = [80, 81, 443, 8080];

fn all_addresses() -> Vec<std::net::IpAddr> {
    let pods = PODS.iter().flat_map(|pod| [format!("10.1.0.{pod}"), format!("fd01::{pod}")]);
    pods.chain(["10.9.0.2".to_owned(), "fd09::2".to_owned()]).map(|text| address(&text)).collect()
}

fn nets() -> Vec<ipnet::IpNet> {
    [
        "10.1.0.2/31",
        "10.1.0.0/24",
        "10.0.0.0/8",
        "10.9.0.2/32",
        "fd01::2/127",
        "fd01::/64",
        "fd00::/8",
        "::/0",
        "0.0.0.0/0",
    ]
    .map(|net| net.parse().expect("a net"))
    .into()
}

fn random_peer(
    random: &mut Random,
    sets: &[SetId],
    sockets: &[SetId],
    clauses: &mut BTreeMap<&'static str, u32>,
    has_ports: bool,
) -> Peer {
    let mut peer = Peer::default();
    let mut count = |name| *clauses.entry(name).or_default() += 1;
    match random.below(6) {
        0 => {
            count("in_sets");
            peer.in_sets = vec![vec![*random.pick(sets)]];
            if random.one_in(2) {
                count("alternatives");
                peer.in_sets[0].push(*random.pick(sets));
            }
            if random.one_in(4) {
                peer.in_sets.push(vec![*random.pick(sets)]);
            }
        }
        1 => {
            count("not_sets");
            peer.not_sets = vec![*random.pick(sets)];
        }
        2 => {
            count("nets");
            peer.nets = vec![*random.pick(&nets()), *random.pick(&nets())];
        }
        3 => {
            count("not_nets");
            peer.not_nets = vec![*random.pick(&nets())];
        }
        _ => {}
    }
    if has_ports && random.one_in(2) {
        let first = *random.pick(&PORTS);
        let range = PortRange { first, last: first.saturating_add(*random.pick(&[0, 1, 400])) };
        match random.below(5) {
            0 => {
                count("port_sets");
                peer.port_sets = vec![*random.pick(sockets)];
            }
            1 => {
                count("not_ports");
                peer.not_ports = vec![range];
            }
            2 => {
                count("not_port_sets");
                peer.not_port_sets = vec![*random.pick(sockets)];
            }
            3 => {
                count("in_sockets");
                peer.in_sockets = vec![*random.pick(sockets)];
            }
            _ => {
                count("ports");
                peer.ports = vec![range, PortRange { first: 443, last: 443 }];
            }
        }
    }
    peer
}

fn random_rules(random: &mut Random, number: u64, clauses: &mut BTreeMap<&'static str, u32>) -> RuleSet {
    let mut rules = RuleSet {
        generation: Generation { term: 1, number },
        node: NodeConfig {
            pod_ranges: vec!["10.1.0.0/24".parse().expect("a net"), "fd01::/64".parse().expect("a net")],
            ..NodeConfig::default()
        },
        ..RuleSet::default()
    };
    let addresses = all_addresses();
    let (mut sets, mut sockets) = (Vec::new(), Vec::new());
    for index in 0..4 {
        let id = SetId::of_meaning(&["addresses", &index.to_string()]);
        let members = addresses.iter().copied().filter(|_| random.one_in(2)).collect();
        rules.sets.insert(id, Arc::new(Set { id, members: Members::Addresses(members) }));
        sets.push(id);
        let id = SetId::of_meaning(&["nets", &index.to_string()]);
        let members = nets().into_iter().filter(|_| random.one_in(4)).collect();
        rules.sets.insert(id, Arc::new(Set { id, members: Members::Nets(members) }));
        sets.push(id);
        let id = SetId::of_meaning(&["sockets", &index.to_string()]);
        let all = addresses.iter().flat_map(|address| {
            PORTS.iter().flat_map(move |port| {
                [6, 17].map(|protocol| SocketAddress { address: *address, protocol, port: *port })
            })
        });
        let members = all.filter(|_| random.one_in(2)).collect();
        rules.sets.insert(id, Arc::new(Set { id, members: Members::Sockets(members) }));
        sockets.push(id);
    }
    let mut random_policy = |random: &mut Random, name: String, rules: &mut RuleSet| {
        let list = (0..1 + random.below(4)).map(|index| {
            let actions = [Action::Allow, Action::Allow, Action::Deny, Action::Pass, Action::Leave, Action::Log];
            let mut it = Rule { index: u32::try_from(index).expect("small"), ..rule(*random.pick(&actions)) };
            match random.below(6) {
                0 => it.not_protocol = Some(*random.pick(&[6, 17])),
                1 => it.family = Some(*random.pick(&[Family::V4, Family::V6])),
                2 | 3 => it.protocol = Some(*random.pick(&[6, 17])),
                _ => {}
            }
            it.source = random_peer(random, &sets, &sockets, clauses, false);
            it.destination = random_peer(random, &sets, &sockets, clauses, true);
            it
        });
        let policy = Policy { name: name.into(), rules: list.collect() };
        let id = policy.id();
        rules.policies.insert(id, Arc::new(policy));
        id
    };
    for pod in PODS {
        let mut chain = |direction: &str, random: &mut Random, rules: &mut RuleSet| {
            let phases = ["Guard", "Local"].map(|phase| {
                let tiers = (0..random.below(3)).map(|tier| {
                    let policies = (0..1 + random.below(2))
                        .map(|policy| {
                            random_policy(random, format!("{pod} {direction} {phase} {tier} {policy}"), rules)
                        })
                        .collect();
                    let default = *random.pick(&[TierDefault::Deny, TierDefault::Pass, TierDefault::Pass]);
                    Tier { name: format!("t{tier}").into(), policies, default }
                });
                Phase { name: phase.into(), tiers: tiers.collect() }
            });
            let chain = Chain { phases: phases.into(), profile_allows: !random.one_in(5) };
            let id = chain.id();
            rules.chains.insert(id, Arc::new(chain));
            id
        };
        let ingress = chain("in", random, &mut rules);
        let egress = chain("out", random, &mut rules);
        let id = EndpointId { namespace: "a".into(), name: format!("p{pod}").into() };
        let addresses = vec![address(&format!("10.1.0.{pod}")), address(&format!("fd01::{pod}"))];
        let endpoint = LocalEndpoint { id: id.clone(), addresses, ingress, egress, egress_to_node: egress };
        rules.endpoints.insert(id, Arc::new(endpoint));
    }
    rules
}

/// Where each probe starts and ends: namespace and address of both.
fn routes() -> Vec<(String, std::net::IpAddr, String, std::net::IpAddr)> {
    let hosts: Vec<(String, [String; 2])> = PODS
        .iter()
        .map(|pod| (format!("p{pod}"), [format!("10.1.0.{pod}"), format!("fd01::{pod}")]))
        .chain([("remote".to_owned(), ["10.9.0.2".to_owned(), "fd09::2".to_owned()])])
        .collect();
    let mut routes = Vec::new();
    for (from, sources) in &hosts {
        for (to, targets) in hosts.iter().filter(|(to, _)| to != from) {
            for (source, target) in sources.iter().zip(targets) {
                routes.push((from.clone(), address(source), to.clone(), address(target)));
            }
        }
    }
    routes
}

#[test]
fn the_kernel_agrees_with_the_evaluator() {
    let seed = std::env::var("HANSE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x5eed_0001);
    println!("seed {seed} (HANSE_SEED sets another)");
    let mut random = Random(seed);
    let mut net = Net::new();
    for pod in PODS {
        net.pod(pod);
    }
    let mut driver = net.driver();
    let receivers: BTreeMap<SocketAddr, (UdpSocket, std::net::TcpListener)> = routes()
        .iter()
        .map(|(_, _, to, target)| (to.clone(), *target))
        .collect::<std::collections::BTreeSet<_>>()
        .into_iter()
        .flat_map(|(to, target)| PORTS.map(|port| (to.clone(), SocketAddr::new(target, port))))
        .map(|(to, at)| {
            let udp = net.udp(&to, &at.to_string());
            udp.set_nonblocking(true).expect("set");
            (at, (udp, net.listen(&to, &at.to_string())))
        })
        .collect();
    let (mut clauses, mut verdicts) = (BTreeMap::new(), BTreeMap::<Verdict2, u32>::new());
    for number in 1..=60 {
        let rules = Arc::new(random_rules(&mut random, number, &mut clauses));
        let applied = driver.apply(&rules).expect("applied");
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        let mut sent: Vec<(Packet, UdpSocket, SocketAddr)> = Vec::new();
        for (from, source, _, target) in routes() {
            for port in PORTS {
                let socket = net.within(&from, || UdpSocket::bind(SocketAddr::new(source, 0)).expect("bound"));
                let at = SocketAddr::new(target, port);
                let own = socket.local_addr().expect("bound").port();
                socket.send_to(&own.to_be_bytes(), at).expect("sent");
                let packet = Packet {
                    source,
                    destination: target,
                    protocol: 17,
                    source_port: own,
                    destination_port: port,
                    icmp: None,
                };
                sent.push((packet, socket, at));
            }
        }
        // Delivery within one machine happens within the send; one round trip to every receiver makes sure of it.
        let mut arrived = std::collections::BTreeSet::new();
        for (at, (udp, _)) in &receivers {
            let mut buffer = [0; 16];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                arrived.insert((from, *at));
            }
        }
        for (packet, socket, at) in &sent {
            let outcome = evaluate(&rules, packet, Hook::Forward);
            let passed = arrived.contains(&(socket.local_addr().expect("bound"), *at));
            *verdicts.entry(Verdict2::from(outcome.verdict)).or_default() += 1;
            let expected = outcome.verdict == Verdict::Allow;
            assert_eq!(passed, expected, "seed {seed}, rule set {number}, {packet:?}: {:#?}", outcome.trace);
        }
        // TCP, a sample: a denied connection costs patience.
        for _ in 0..4 {
            let all = routes();
            let (from, source, _, target) = random.pick(&all).clone();
            let port = *random.pick(&PORTS);
            let packet =
                Packet { source, destination: target, protocol: 6, source_port: 0, destination_port: port, icmp: None };
            let outcome = evaluate(&rules, &packet, Hook::Forward);
            let at = SocketAddr::new(target, port);
            let passed = net.within(&from, || TcpStream::connect_timeout(&at, Duration::from_millis(150)).is_ok());
            assert_eq!(
                passed,
                outcome.verdict == Verdict::Allow,
                "seed {seed}, rule set {number}, {packet:?}: {:#?}",
                outcome.trace
            );
        }
    }
    println!("clauses {clauses:?}, verdicts {verdicts:?}");
    let total: u32 = verdicts.values().sum();
    for (verdict, count) in &verdicts {
        assert!(count * 10 >= total * 3, "{verdict:?} occurs {count} times of {total}");
    }
    assert_eq!(verdicts.len(), 2);
    assert_eq!(clauses.len(), 10, "every clause occurs: {clauses:?}");
}

/// A verdict as a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict2 {
    Allow,
    Deny,
}

impl From<Verdict> for Verdict2 {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Allow => Self::Allow,
            Verdict::Deny => Self::Deny,
        }
    }
}
