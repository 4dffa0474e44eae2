//! Logged decisions: one for each connection, with its client and server.

use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use hanse_dataplane::Backend as _;
use hanse_dataplane::nftables::Config;
use hanse_dataplane::nftables::flows::{Decided, Decision, Flows};
use hanse_ruleset::{Action, Enforcement, Peer, PortRange, Rule};

use crate::net::{Net, address, ip, is_reset, nft, passes, until};
use crate::verdicts::{Build, rule, to_port};

/// The kernel gathers packets for half a second; after this time without packets there are none.
const QUIET: Duration = Duration::from_millis(800);

struct Listener(Flows);

impl Listener {
    fn new(net: &Net) -> Self {
        // A program that another test starts at this moment has inherited the closed socket until it runs.
        let opened = net.within("node", || until(|| Flows::open("hanse").ok()));
        Self(opened.expect("no other listener"))
    }

    /// The decisions since the last call, in order of their text, and the number of dropped ones.
    fn all(&mut self) -> (Vec<Decided>, u64) {
        let (mut logged, mut missed) = (Vec::new(), 0);
        loop {
            let before = logged.len();
            missed += self.0.wait(QUIET, |decided| logged.push(decided)).expect("netlink works");
            if logged.len() == before {
                return (logged, missed);
            }
        }
    }

    fn logged(&mut self) -> Vec<String> {
        let (logged, missed) = self.all();
        assert_eq!((missed, self.0.suppressed().expect("read")), (0, 0));
        let mut logged: Vec<String> = logged.iter().map(text).collect();
        logged.sort();
        logged
    }
}

fn text(decided: &Decided) -> String {
    let Decided { decision, source, destination, protocol, port, source_port, icmp, at } = decided;
    let age = at.elapsed().expect("not in the future");
    assert!(age < Duration::from_secs(30), "{decided:?}: {age:?} ago");
    // Clients have ports that the kernel chooses, or 4000.
    assert_eq!(*source_port >= 4000, [6, 17].contains(protocol), "{decided:?}");
    let icmp = icmp.map(|(kind, code)| format!(" {kind}/{code}")).unwrap_or_default();
    format!("{decision:?} {protocol} {source} {destination} {port}{icmp}")
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from)).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).expect("folded")).to_be_bytes()
}

/// An ICMP or ICMPv6 message as a whole packet.
fn icmp(from: &str, to: &str, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, code, 0, 0], rest].concat();
    match (address(from), address(to)) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum);
            let length = u8::try_from(20 + message.len()).expect("short");
            let header = [0x45, 0, 0, length, 0, 0, 0, 0, 64, 1, 0, 0];
            [&header[..], &from.octets(), &to.octets(), &message].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = u8::try_from(message.len()).expect("short");
            let pseudo = [&from.octets()[..], &to.octets(), &[0, 0, 0, length, 0, 0, 0, 58], &message].concat();
            message[2..4].copy_from_slice(&checksum(&pseudo));
            let header = [0x60, 0, 0, 0, 0, length, 58, 64];
            [&header[..], &from.octets(), &to.octets(), &message].concat()
        }
        _ => unreachable!("one family"),
    }
}

const ECHO: &[u8] = &[0, 7, 0, 1, 1, 2, 3, 4];

#[test]
fn logs_allowed_connections_once() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let open =
        |number| Build { pods: vec![2, 3], number, ingress: Some(vec![rule(Action::Allow)]), ..Build::default() };
    driver.apply(&open(1).rules()).expect("applied");
    let mut listener = Listener::new(&net);
    let mut wanted = Vec::new();
    let mut pairs = Vec::new();
    for (from, source, to, at) in [
        ("p2", "10.1.0.2", "p3", "10.1.0.3:80"),
        ("p2", "fd01::2", "p3", "[fd01::3]:80"),
        ("remote", "10.9.0.2", "p3", "10.1.0.3:81"),
        ("p3", "10.1.0.3", "remote", "10.9.0.2:82"),
        ("p3", "fd01::3", "node", "[fd01:ffff::1]:83"),
        ("p3", "10.1.0.3", "node", "10.1.255.1:84"),
        // A node reaches its own pods, which is not judged.
        ("node", "", "p3", "10.1.0.3:85"),
        ("node", "", "p2", "[fd01::2]:86"),
    ] {
        pairs.push(net.pair(from, at, &net.listen(to, at)));
        if from != "node" {
            let at: std::net::SocketAddr = at.parse().expect("an address");
            wanted.push(format!("Allowed 6 {source} {} {}", at.ip(), at.port()));
        }
    }
    // The first has no answer, the other is a conversation.
    let (silent, asking) = (net.udp("p2", "10.1.0.2:4000"), net.udp("p2", "[fd01::2]:4000"));
    let (deaf, answering) = (net.udp("p3", "10.1.0.3:5000"), net.udp("p3", "[fd01::3]:5001"));
    wanted.extend(["Allowed 17 10.1.0.2 10.1.0.3 5000", "Allowed 17 fd01::2 fd01::3 5001"].map(str::to_owned));
    wanted.extend(["Allowed 1 10.1.0.2 10.1.0.3 0 8/0", "Allowed 58 fd01::3 fd01::2 0 128/0"].map(str::to_owned));
    for number in 2..5 {
        for (client, server) in &mut pairs {
            assert!(passes(client, server) && passes(server, client));
        }
        let mut heard = [0; 8];
        silent.send_to(b"x", "10.1.0.3:5000").expect("sent");
        deaf.recv_from(&mut heard).expect("allowed");
        asking.send_to(b"x", "[fd01::3]:5001").expect("sent");
        let (_, from) = answering.recv_from(&mut heard).expect("allowed");
        answering.send_to(b"y", from).expect("sent");
        asking.recv_from(&mut heard).expect("allowed");
        net.raw("p2", address("10.1.0.3"), &icmp("10.1.0.2", "10.1.0.3", 8, 0, ECHO));
        net.raw("p3", address("fd01::2"), &icmp("fd01::3", "fd01::2", 128, 0, ECHO));
        driver.apply(&open(number).rules()).expect("applied");
    }
    wanted.sort();
    assert_eq!(listener.logged(), wanted);
}

#[test]
fn logs_each_denied_first_packet() {
    let mut net = Net::new();
    for pod in [2, 3, 4] {
        net.pod(pod);
    }
    let mut driver = net.driver();
    // Pod 4 is not known yet.
    let build = Build { pods: vec![2, 3], ingress: Some(vec![]), to_node: Some(vec![]), ..Build::default() };
    driver.apply(&build.rules()).expect("applied");
    let mut listener = Listener::new(&net);
    let _listeners =
        [("p3", "10.1.0.3:80"), ("p3", "[fd01::3]:80"), ("node", "10.1.255.1:90"), ("remote", "10.9.0.2:80")]
            .map(|(host, at)| net.listen(host, at));
    for (from, to) in
        [("p2", "10.1.0.3:80"), ("remote", "[fd01::3]:80"), ("p2", "10.1.255.1:90"), ("p4", "10.9.0.2:80")]
    {
        assert!(net.connect(from, to).is_none(), "{from} to {to}");
    }
    let receiver = net.udp("p3", "[fd01::3]:5000");
    for from in ["[fd01::2]:4000", "[fd01::2]:4001"] {
        assert!(!net.datagram("p2", from, &receiver));
    }
    net.raw("remote", address("10.1.0.3"), &icmp("10.9.0.2", "10.1.0.3", 8, 0, ECHO));
    let wanted = [
        "Denied 1 10.9.0.2 10.1.0.3 0 8/0",
        "Denied 17 fd01::2 fd01::3 5000",
        "Denied 17 fd01::2 fd01::3 5000",
        "Denied 6 10.1.0.2 10.1.0.3 80",
        "Denied 6 10.1.0.2 10.1.255.1 90",
        "Denied 6 10.1.0.4 10.9.0.2 80",
        "Denied 6 fd09::2 fd01::3 80",
    ];
    assert_eq!(listener.logged(), wanted);
}

#[test]
fn logs_cut_connections_once_with_client_and_server() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    // The kernel tracks connections before there are rules.
    nft(&net, "add table inet other");
    nft(&net, "add chain inet other c { type filter hook forward priority 5; }");
    nft(&net, "add rule inet other c ct state established accept");
    let [v4, v6, to_node] = [("p3", "10.1.0.3:80"), ("p3", "[fd01::3]:80"), ("node", "10.1.255.1:90")]
        .map(|(host, at)| net.listen(host, at));
    let (mut elder, mut elder_server) = net.pair("remote", "10.1.0.3:80", &v4);
    assert!(passes(&mut elder, &mut elder_server));
    let build = |open: bool, number| {
        let list = |open: bool| Some(if open { vec![rule(Action::Allow)] } else { vec![] });
        Build { pods: vec![2, 3], ingress: list(open), to_node: list(open), number, ..Build::default() }.rules()
    };
    driver.apply(&build(true, 1)).expect("applied");
    let mut listener = Listener::new(&net);
    let (mut busy, mut busy_server) = net.pair("p2", "10.1.0.3:80", &v4);
    let (mut idle, mut idle_server) = net.pair("p2", "[fd01::3]:80", &v6);
    let (mut node, mut node_server) = net.pair("p3", "10.1.255.1:90", &to_node);
    let (asking, answering) = (net.udp("p2", "10.1.0.2:4000"), net.udp("p3", "10.1.0.3:5000"));
    let (lone, deaf) = (net.udp("p2", "[fd01::2]:4000"), net.udp("p3", "[fd01::3]:5001"));
    let mut heard = [0; 8];
    asking.send_to(b"x", "10.1.0.3:5000").expect("sent");
    answering.recv_from(&mut heard).expect("allowed");
    answering.send_to(b"y", "10.1.0.2:4000").expect("sent");
    asking.recv_from(&mut heard).expect("allowed");
    lone.send_to(b"x", "[fd01::3]:5001").expect("sent");
    deaf.recv_from(&mut heard).expect("allowed");
    // The pod's own kernel answers neither of these.
    net.sysctl("p3", "net.ipv4.icmp_echo_ignore_all=1");
    let (request, reply) = (icmp("10.1.0.2", "10.1.0.3", 8, 0, ECHO), icmp("10.1.0.3", "10.1.0.2", 0, 0, ECHO));
    net.raw("p2", address("10.1.0.3"), &request);
    net.raw("p3", address("10.1.0.2"), &reply);
    assert_eq!(listener.logged().len(), 6, "all are under way");

    driver.apply(&build(false, 2)).expect("applied");
    // An error about a connection arrives before its own next packet, which is logged nevertheless.
    let inner = [&[0x45, 0, 0, 29, 0, 0, 0, 0, 63, 17, 0, 0][..], &[10, 1, 0, 2, 10, 1, 0, 3]].concat();
    let inner = [&[0; 4], &inner[..], &[0x0f, 0xa0, 0x13, 0x88, 0, 9, 0, 0, b'x']].concat();
    net.raw("p3", address("10.1.0.2"), &icmp("10.1.0.3", "10.1.0.2", 3, 3, &inner));
    for number in 3..5 {
        // From either end: by the client, by the server, and by both.
        assert!(!passes(&mut busy, &mut busy_server));
        assert!(!passes(&mut idle_server, &mut idle));
        assert!(!passes(&mut node_server, &mut node));
        assert!(!passes(&mut elder_server, &mut elder));
        answering.send_to(b"y", "10.1.0.2:4000").expect("sent");
        asking.send_to(b"x", "10.1.0.3:5000").expect("sent");
        net.raw("p3", address("10.1.0.2"), &reply);
        if number == 3 {
            lone.send_to(b"x", "[fd01::3]:5001").expect("sent");
        }
        driver.apply(&build(false, number)).expect("applied");
    }
    assert!(is_reset(&mut busy) && is_reset(&mut idle_server));
    assert!(answering.recv_from(&mut heard).is_err() && asking.recv_from(&mut heard).is_err());
    let wanted = [
        "Cut 1 10.1.0.2 10.1.0.3 0 8/0",
        "Cut 17 10.1.0.2 10.1.0.3 5000",
        "Cut 6 10.1.0.2 10.1.0.3 80",
        "Cut 6 10.1.0.3 10.1.255.1 90",
        "Cut 6 10.9.0.2 10.1.0.3 80",
        "Cut 6 fd01::2 fd01::3 80",
        // Without an answer it is not open.
        "Denied 17 fd01::2 fd01::3 5001",
    ];
    assert_eq!(listener.logged(), wanted);
}

#[test]
fn logs_addresses_of_the_client_and_the_real_server() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let nat = "table ip services { chain prerouting { type nat hook prerouting priority -100; \
               ip daddr 10.96.0.1 tcp dport 80 dnat to 10.1.0.3:8080; }; chain postrouting { type nat hook postrouting \
               priority 100; masquerade; }; }";
    ip(&format!("netns exec {} nft {nat}", net.name("node")));
    let mut driver = net.driver();
    let build = |rules, number| Build { pods: vec![2, 3], ingress: Some(rules), number, ..Build::default() }.rules();
    driver.apply(&build(vec![to_port(Action::Allow, 8080)], 1)).expect("applied");
    let mut listener = Listener::new(&net);
    let server = net.listen("p3", "10.1.0.3:8080");
    let (mut client, mut answer) = net.pair("p2", "10.96.0.1:80", &server);
    let (mut outsider, mut other) = net.pair("remote", "10.96.0.1:80", &server);
    let masked = [&answer, &other].map(|it| it.peer_addr().expect("connected").ip());
    assert!(!masked.contains(&address("10.1.0.2")) && !masked.contains(&address("10.9.0.2")), "masked: {masked:?}");
    assert_eq!(listener.logged(), ["Allowed 6 10.1.0.2 10.1.0.3 8080", "Allowed 6 10.9.0.2 10.1.0.3 8080"]);
    driver.apply(&build(vec![], 2)).expect("applied");
    assert!(!passes(&mut answer, &mut client) && !passes(&mut outsider, &mut other));
    assert!(net.connect("p2", "10.96.0.1:80").is_none());
    let wanted = ["Cut 6 10.1.0.2 10.1.0.3 8080", "Cut 6 10.9.0.2 10.1.0.3 8080", "Denied 6 10.1.0.2 10.1.0.3 8080"];
    assert_eq!(listener.logged(), wanted);
}

#[test]
fn logs_connections_that_a_helper_expects() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let helper = "table ip helpers { ct helper ftp { type \"ftp\" protocol tcp; }; chain prerouting { type filter hook \
                  prerouting priority 0; tcp dport 21 ct helper set \"ftp\"; }; }";
    let loaded = Command::new("ip").args(["netns", "exec", &net.name("node"), "nft", helper]).output();
    assert!(loaded.as_ref().is_ok_and(|it| it.status.success()), "{loaded:?}");
    let mut driver = net.driver();
    let build = |ports: &[u16], number| {
        let ingress = Some(ports.iter().map(|port| to_port(Action::Allow, *port)).collect());
        Build { pods: vec![2, 3], ingress, number, ..Build::default() }.rules()
    };
    driver.apply(&build(&[21], 1)).expect("applied");
    let mut listener = Listener::new(&net);
    let (control, _data) = (net.listen("p3", "10.1.0.3:21"), net.listen("p3", "10.1.0.3:5001"));
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:21", &control);
    let mut tell = |text: &[u8]| {
        server.write_all(text).expect("sent");
        client.read_exact(&mut vec![0; text.len()]).expect("received");
    };
    tell(b"220 ready\r\n");
    for number in [2, 3] {
        // 19 * 256 + 137.
        tell(b"227 Entering Passive Mode (10,1,0,3,19,137)\r\n");
        assert_eq!(net.connect("p2", "10.1.0.3:5001").is_some(), number == 3);
        driver.apply(&build(&[21, 5001], number)).expect("applied");
    }
    let wanted =
        ["Allowed 6 10.1.0.2 10.1.0.3 21", "Allowed 6 10.1.0.2 10.1.0.3 5001", "Denied 6 10.1.0.2 10.1.0.3 5001"];
    assert_eq!(listener.logged(), wanted);
}

#[test]
fn node_that_observes_logs_what_it_would_deny_once() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let mut apply = |number, allow: bool, enforcement| {
        let ingress = Some(allow.then(|| rule(Action::Allow)).into_iter().collect());
        let build = Build { pods: vec![2, 3], ingress, enforcement, number, ..Build::default() };
        driver.apply(&build.rules()).expect("applied");
    };
    let mut listener = Listener::new(&net);
    apply(1, false, Enforcement::Observe);
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &net.listen("p3", "10.1.0.3:80"));
    for _ in 0..3 {
        assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client));
    }
    apply(2, false, Enforcement::Observe);
    assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client));
    assert_eq!(listener.logged(), ["Observed 6 10.1.0.2 10.1.0.3 80"], "once, in all generations");
    apply(3, true, Enforcement::Observe);
    let (mut opened, mut at) = net.pair("p2", "[fd01::3]:81", &net.listen("p3", "[fd01::3]:81"));
    assert_eq!(listener.logged(), ["Allowed 6 fd01::2 fd01::3 81"]);
    // An open connection that is not allowed any more; its server speaks first.
    apply(4, false, Enforcement::Observe);
    assert!(passes(&mut at, &mut opened) && passes(&mut opened, &mut at));
    assert_eq!(listener.logged(), ["Observed 6 fd01::2 fd01::3 81"]);
    apply(5, false, Enforcement::Enforce);
    assert!(!passes(&mut opened, &mut at), "it was open");
    assert!(net.connect("p2", "10.1.0.3:80").is_none());
    let denied: Vec<_> = listener.logged().into_iter().filter(|it| it.starts_with("Denied")).collect();
    assert_eq!(denied, ["Denied 6 10.1.0.2 10.1.0.3 80"]);
}

#[test]
fn rate_limits_keep_verdicts_and_count_suppressed_decisions() {
    const ALLOWED: usize = 40_000;
    const DENIED: usize = 10_000;
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    // To each port a connection of its own.
    let many = Peer { ports: vec![PortRange { first: 10_000, last: 60_000 }], ..Peer::default() };
    let allow = Rule { destination: many, protocol: Some(17), ..rule(Action::Allow) };
    let build = |number| Build { pods: vec![2, 3], ingress: Some(vec![allow.clone()]), number, ..Build::default() };
    driver.apply(&build(1).rules()).expect("applied");
    let mut listener = Listener::new(&net);
    let count = "table ip seen { chain in { type filter hook prerouting priority -300; udp dport 10000-60000 counter drop; \
                 udp dport 9 counter drop; }; }";
    ip(&format!("netns exec {} nft {count}", net.name("p3")));
    net.within("p2", || {
        let socket = std::net::UdpSocket::bind("10.1.0.2:4000").expect("bound");
        for port in (10_000..).take(ALLOWED) {
            socket.send_to(b"x", ("10.1.0.3", port)).expect("sent");
        }
        for _ in 0..DENIED {
            socket.send_to(b"x", "10.1.0.3:9").expect("sent");
        }
    });
    let listed = Command::new("ip")
        .args(["netns", "exec", &net.name("p3"), "nft", "list", "table", "ip", "seen"])
        .output()
        .expect("nft of nftables");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let arrived: Vec<&str> = listed.split("counter packets ").skip(1).filter_map(|it| it.split(' ').next()).collect();
    assert_eq!(arrived, [ALLOWED.to_string().as_str(), "0"], "{listed}");
    let (logged, missed) = listener.all();
    let suppressed = listener.0.suppressed().expect("read");
    let of = |decision| logged.iter().filter(|it| it.decision == decision).count();
    let (allowed, denied) = (of(Decision::Allowed), of(Decision::Denied));
    println!(
        "{allowed} of {ALLOWED} allowed and {denied} of {DENIED} denied are logged, {suppressed} suppressed, {missed} dropped"
    );
    assert!((10_000..ALLOWED).contains(&allowed) && (1_000..DENIED).contains(&denied), "{allowed}, {denied}");
    let sum = (allowed + denied) as u64 + suppressed + missed;
    assert_eq!(
        sum,
        (ALLOWED + DENIED) as u64,
        "{allowed} and {denied} logged, {suppressed} suppressed, {missed} dropped"
    );
    assert_eq!(listener.0.suppressed().expect("read"), 0, "each is counted once");
    // New rules have new counters, and a new listener ignores what was suppressed before.
    nft(&net, "flush table inet hanse");
    assert!(driver.repair().expect("repaired"));
    assert_eq!(listener.0.suppressed().expect("read"), 0);
    net.within("p2", || {
        let socket = std::net::UdpSocket::bind("10.1.0.2:4001").expect("bound");
        for _ in 0..DENIED {
            socket.send_to(b"x", "10.1.0.3:9").expect("sent");
        }
    });
    drop(listener);
    assert_eq!(Listener::new(&net).0.suppressed().expect("read"), 0);
}

#[test]
fn group_has_one_listener_and_the_trial_leaves_nothing() {
    let net = Net::new();
    let other = Net::new();
    let first = Listener::new(&net);
    let second = net.within("node", || Flows::open("hanse"));
    assert!(second.is_err(), "{second:?}");
    // Each network namespace has its own.
    drop(Listener::new(&other));
    drop(first);
    drop(Listener::new(&net));
    assert_eq!(nft(&net, "list ruleset").trim(), "");
}

#[test]
fn writes_and_removes_log_rules_as_configured() {
    let net = Net::new();
    let rules = Build { pods: vec![2, 3], ingress: Some(vec![rule(Action::Allow)]), ..Build::default() }.rules();
    let of = |flows| net.driver_with(Config { flows, ..Config::default() });
    let mut tables = Vec::new();
    for flows in [false, true, false] {
        let mut driver = of(flows);
        driver.adopt(Some(&rules)).expect("read");
        driver.apply(&rules).expect("applied");
        tables.push(nft(&net, "list table inet hanse"));
    }
    let logs = |table: &String| table.contains("log-allowed") && table.contains("log group 4740");
    assert_eq!(tables.iter().map(logs).collect::<Vec<_>>(), [false, true, false]);
}
