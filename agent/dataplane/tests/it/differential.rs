//! Random rule sets and packets: the kernel's verdict is the evaluator's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, recv, sendto, socket,
};

use hanse_dataplane::Backend as _;
use hanse_ruleset::{
    Action, Chain, EndpointId, Enforcement, Family, Generation, Hook, Icmp, LocalEndpoint, Members, NodeConfig,
    OwnStream, Packet, Peer, Phase, Policy, PortRange, Rule, RuleSet, Set, SetId, SocketAddress, Tier, TierDefault,
    UnknownPods, Verdict, evaluate,
};

use crate::net::{Net, address, until};
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

/// Rule sets of one run; each judges 12 packets on each of 34 ways.
const ROUNDS: u64 = 30;
const NODE: [&str; 2] = ["10.1.255.1", "fd01:ffff::1"];

fn all_addresses() -> Vec<IpAddr> {
    hosts().into_iter().flat_map(|(_, addresses)| addresses).collect()
}

/// The namespaces that send and receive, with their addresses.
fn hosts() -> Vec<(String, [IpAddr; 2])> {
    let pod = |pod: &u8| (format!("p{pod}"), [format!("10.1.0.{pod}"), format!("fd01::{pod}")]);
    let others = [("remote", ["10.9.0.2", "fd09::2"]), ("node", NODE)];
    let others = others.map(|(name, texts)| (name.to_owned(), texts.map(str::to_owned)));
    let all = PODS.iter().map(pod).chain(others);
    all.map(|(name, texts)| (name, texts.map(|text| address(&text)))).collect()
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
    let net = |text: &str| text.parse().expect("a net");
    let mut node = NodeConfig {
        pod_ranges: vec![net("10.1.0.0/24"), net("fd01::/64")],
        node_addresses: NODE.map(address).into(),
        unknown_pods: *random.pick(&[UnknownPods::Deny, UnknownPods::Allow]),
        enforcement: if random.one_in(8) { Enforcement::Observe } else { Enforcement::Enforce },
        ..NodeConfig::default()
    };
    if random.one_in(3) {
        *clauses.entry("own_streams").or_default() += 1;
        let (protocol, port) = (*random.pick(&[6, 17]), *random.pick(&PORTS));
        let from = if random.one_in(2) { vec![*random.pick(&nets())] } else { Vec::new() };
        let to = vec![*random.pick(&nets())];
        node.own_streams = vec![OwnStream { name: "own".into(), from, to, protocol, port }];
    }
    let mut rules = RuleSet { generation: Generation { term: 1, number }, node, ..RuleSet::default() };
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
    let unknown: Vec<u8> = PODS.into_iter().filter(|_| random.one_in(12)).collect();
    if !unknown.is_empty() {
        *clauses.entry("unknown pod").or_default() += 1;
    }
    let mut random_policy = |random: &mut Random, name: String, rules: &mut RuleSet| {
        let list = (0..1 + random.below(4)).map(|index| {
            let actions = [Action::Allow, Action::Allow, Action::Deny, Action::Pass, Action::Leave, Action::Log];
            let mut it = Rule { index: u32::try_from(index).expect("small"), ..rule(*random.pick(&actions)) };
            let mut count = |name| *clauses.entry(name).or_default() += 1;
            match random.below(12) {
                0 => {
                    count("not_protocol");
                    it.not_protocol = Some(*random.pick(&PROTOCOLS));
                }
                1 => {
                    count("family");
                    it.family = Some(*random.pick(&[Family::V4, Family::V6]));
                }
                2..5 => {
                    count("protocol");
                    it.protocol = Some(*random.pick(&PROTOCOLS));
                }
                5 => {
                    count("icmp");
                    it.icmp = Some(*random.pick(&icmps()));
                }
                6 => {
                    count("not_icmp");
                    it.not_icmp = Some(*random.pick(&icmps()));
                }
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
        let egress_to_node = chain("to node", random, &mut rules);
        if unknown.contains(&pod) {
            continue;
        }
        let id = EndpointId { namespace: "a".into(), name: format!("p{pod}").into() };
        let addresses = vec![address(&format!("10.1.0.{pod}")), address(&format!("fd01::{pod}"))];
        let endpoint = LocalEndpoint { id: id.clone(), addresses, ingress, egress, egress_to_node };
        rules.endpoints.insert(id, Arc::new(endpoint));
    }
    rules
}

const PROTOCOLS: [u8; 5] = [6, 17, 1, 58, 132];

fn icmps() -> Vec<Icmp> {
    [8, 128, 13].iter().flat_map(|kind| [None, Some(0), Some(1)].map(|code| Icmp { kind: *kind, code })).collect()
}

/// A way through the node, to it or from it.
struct Way {
    from: String,
    source: IpAddr,
    target: IpAddr,
    hook: Hook,
}

fn ways() -> Vec<Way> {
    let hosts = hosts();
    let mut ways = Vec::new();
    for (from, sources) in &hosts {
        for (to, targets) in hosts.iter().filter(|(to, _)| to != from) {
            let hook = match (from.as_str(), to.as_str()) {
                ("node", "remote") | ("remote", "node") => continue,
                ("node", _) => Hook::Output,
                (_, "node") => Hook::Input,
                _ => Hook::Forward,
            };
            for (source, target) in sources.iter().zip(targets) {
                ways.push(Way { from: from.clone(), source: *source, target: *target, hook });
            }
        }
    }
    ways
}

/// What one host listens on.
struct Receivers {
    udp: BTreeMap<SocketAddr, UdpSocket>,
    tcp: Vec<TcpListener>,
    /// Of both families: raw sockets see every ICMP packet that arrives.
    icmp: [OwnedFd; 2],
}

impl Receivers {
    fn new(net: &Net, host: &str, addresses: [IpAddr; 2]) -> Self {
        let all = || addresses.into_iter().flat_map(|ip| PORTS.map(|port| SocketAddr::new(ip, port)));
        let udp = |at: SocketAddr| {
            let socket = net.udp(host, &at.to_string());
            socket.set_nonblocking(true).expect("set");
            (at, socket)
        };
        let tcp = all().map(|at| net.listen(host, &at.to_string())).collect();
        let raw = |family, protocol| {
            net.within(host, || socket(family, SockType::Raw, SockFlag::SOCK_NONBLOCK, protocol).expect("root"))
        };
        let icmp = [raw(AddressFamily::Inet, SockProtocol::Icmp), raw(AddressFamily::Inet6, SockProtocol::IcmpV6)];
        Self { udp: all().map(udp).collect(), tcp, icmp }
    }

    /// The numbers of the probes that have arrived.
    fn collect(&self, arrived: &mut BTreeSet<u16>) {
        let mut buffer = [0; 256];
        for socket in self.udp.values() {
            while let Ok((2, _)) = socket.recv_from(&mut buffer) {
                arrived.insert(u16::from_be_bytes([buffer[0], buffer[1]]));
            }
        }
        // The other end detects the connection; this makes room in the queue.
        self.tcp.iter().for_each(|listener| while listener.accept().is_ok() {});
        for (socket, header) in self.icmp.iter().zip([20, 0]) {
            while let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                // Requests alone, which are of even types here (8, 128), and timestamps (13).
                let Some([kind, _, _, _, high, low, ..]) = buffer.get(header..length) else { continue };
                if [8, 128, 13].contains(kind) {
                    arrived.insert(u16::from_be_bytes([*high, *low]));
                }
            }
        }
    }
}

/// A packet that was sent, and how its arrival is detected.
struct Probe {
    packet: Packet,
    hook: Hook,
    /// Of TCP the socket, which is connected or not.
    stream: Option<TcpStream>,
    _socket: Option<UdpSocket>,
    number: u16,
}

impl Probe {
    fn arrived(&self, arrived: &BTreeSet<u16>) -> bool {
        match &self.stream {
            Some(stream) => stream.peer_addr().is_ok(),
            None => arrived.contains(&self.number),
        }
    }
}

/// Sends the probes of one way, within its source's namespace.
fn send(way: &Way, numbers: &mut u16) -> Vec<Probe> {
    let mut probes = Vec::new();
    let (source, destination) = (way.source, way.target);
    let mut next = || {
        *numbers = numbers.wrapping_add(1);
        *numbers
    };
    let family = if source.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    for port in PORTS {
        let (number, at) = (next(), SocketAddr::new(destination, port));
        let udp = UdpSocket::bind(SocketAddr::new(source, 0)).expect("bound");
        // A denial at the node itself may return an error.
        let _ = udp.send_to(&number.to_be_bytes(), at);
        let source_port = udp.local_addr().expect("bound").port();
        let packet = Packet { source, destination, protocol: 17, source_port, destination_port: port, icmp: None };
        probes.push(Probe { packet, hook: way.hook, stream: None, _socket: Some(udp), number });
        let tcp = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).expect("a socket");
        bind(tcp.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(source, 0))).expect("bound");
        let _ = connect(tcp.as_raw_fd(), &SockaddrStorage::from(at));
        let stream = TcpStream::from(tcp);
        let source_port = stream.local_addr().expect("bound").port();
        let packet = Packet { source_port, protocol: 6, ..packet };
        probes.push(Probe { packet, hook: way.hook, stream: Some(stream), _socket: None, number });
    }
    let kinds: &[(u8, u8)] = if source.is_ipv4() { &[(8, 0), (8, 1), (13, 0)] } else { &[(128, 0), (128, 1)] };
    for (kind, code) in kinds {
        let number = next();
        let protocol = if source.is_ipv4() { SockProtocol::Icmp } else { SockProtocol::IcmpV6 };
        let raw = socket(family, SockType::Raw, SockFlag::SOCK_NONBLOCK, protocol).expect("root");
        bind(raw.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(source, 0))).expect("bound");
        let _ = sendto(
            raw.as_raw_fd(),
            &icmp_message(*kind, *code, number, source.is_ipv4()),
            &SockaddrStorage::from(SocketAddr::new(destination, 0)),
            MsgFlags::empty(),
        );
        let packet = Packet {
            source,
            destination,
            protocol: if source.is_ipv4() { 1 } else { 58 },
            source_port: 0,
            destination_port: 0,
            icmp: Some((*kind, *code)),
        };
        probes.push(Probe { packet, hook: way.hook, stream: None, _socket: None, number });
    }
    probes
}

/// A request of 20 bytes with a number; of ICMPv6 the kernel makes the checksum.
fn icmp_message(kind: u8, code: u8, number: u16, checksum: bool) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(number.to_be_bytes());
    message.resize(20, 0);
    if checksum {
        let words = message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let sum: u32 = words.sum();
        let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).expect("few words");
        message[2..4].copy_from_slice(&(!folded).to_be_bytes());
    }
    message
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
    let receivers: Vec<Receivers> =
        hosts().into_iter().map(|(host, addresses)| Receivers::new(&net, &host, addresses)).collect();
    let ways = ways();
    let (mut clauses, mut verdicts) = (BTreeMap::new(), BTreeMap::<(&str, &str, Verdict2), u32>::new());
    let mut numbers = 0u16;
    for number in 1..=ROUNDS {
        let rules = Arc::new(random_rules(&mut random, number, &mut clauses));
        let applied = driver.apply(&rules).expect("applied");
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        let mut probes: Vec<(Probe, bool, Vec<String>)> = Vec::new();
        for (host, _) in hosts() {
            let own = ways.iter().filter(|way| way.from == host);
            let sent: Vec<Probe> = net.within(&host, || own.flat_map(|way| send(way, &mut numbers)).collect());
            probes.extend(sent.into_iter().map(|probe| {
                let outcome = evaluate(&rules, &probe.packet, probe.hook);
                (probe, outcome.verdict == Verdict::Allow, outcome.trace)
            }));
        }
        // What is allowed arrives, sooner or later. What is denied went the same ways at the same time.
        let mut arrived = BTreeSet::new();
        let all_there = || {
            receivers.iter().for_each(|receivers| receivers.collect(&mut arrived));
            probes.iter().all(|(probe, allowed, _)| !allowed || probe.arrived(&arrived)).then_some(())
        };
        until(all_there);
        for (probe, allowed, trace) in &probes {
            let packet = &probe.packet;
            assert_eq!(
                probe.arrived(&arrived),
                *allowed,
                "seed {seed}, rule set {number}, {:?} {packet:?}: {trace:#?}",
                probe.hook
            );
            let protocol = match packet.protocol {
                6 => "TCP",
                17 => "UDP",
                _ => "ICMP",
            };
            let family = if packet.source.is_ipv4() { "IPv4" } else { "IPv6" };
            let verdict = if *allowed { Verdict2::Allow } else { Verdict2::Deny };
            *verdicts.entry((protocol, family, verdict)).or_default() += 1;
        }
    }
    let total: u32 = verdicts.values().sum();
    println!("{total} packets, {ROUNDS} rule sets; clauses {clauses:?}");
    for ((protocol, family, verdict), count) in &verdicts {
        println!("{protocol:<5} {family} {verdict:?}: {count}");
    }
    assert!(total >= 10_000, "{total} packets");
    assert_eq!(verdicts.len(), 12, "both verdicts of three protocols in two families");
    for wanted in [Verdict2::Allow, Verdict2::Deny] {
        let count: u32 = verdicts.iter().filter(|((.., verdict), _)| *verdict == wanted).map(|(_, count)| count).sum();
        println!("{wanted:?} {:.1} %", f64::from(count) * 100.0 / f64::from(total));
        assert!(count * 10 >= total * 3, "{wanted:?} occurs {count} times of {total}");
    }
    assert_eq!(clauses.len(), 17, "every clause occurs: {clauses:?}");
}

/// A verdict as a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict2 {
    Allow,
    Deny,
}
