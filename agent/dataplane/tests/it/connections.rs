//! Connections that outlive generations.

use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hanse_dataplane::Backend as _;
use hanse_dataplane::nftables::Config;
use hanse_ruleset::{Action, Peer, PortRange, Rule};

use crate::net::{Net, is_reset, passes};
use crate::verdicts::{Build, addresses, from_set, rule, to_port};

#[test]
fn cuts_forbidden_connections_at_both_ends() {
    for (to, listen) in [("10.1.0.3:80", "10.1.0.3:80"), ("[fd01::3]:80", "[fd01::3]:80")] {
        let mut net = Net::new();
        net.pod(2);
        net.pod(3);
        let mut driver = net.driver();
        let listener = net.listen("p3", listen);
        let open =
            |number| Build { pods: vec![2, 3], ingress: Some(vec![rule(Action::Allow)]), number, ..Build::default() };
        // The server may open connections itself: only connections to it are forbidden.
        let closed = |number| Build {
            pods: vec![2, 3],
            ingress: Some(vec![to_port(Action::Deny, 80), rule(Action::Allow)]),
            number,
            ..Build::default()
        };
        driver.apply(&open(1).rules()).expect("applied");
        let (mut busy_client, mut busy_server) = net.pair("p2", to, &listener);
        let (mut idle_client, mut idle_server) = net.pair("p2", to, &listener);
        assert!(passes(&mut busy_client, &mut busy_server) && passes(&mut busy_server, &mut busy_client));
        driver.apply(&closed(2).rules()).expect("applied");
        assert!(!passes(&mut busy_client, &mut busy_server), "{to}: the client goes on");
        assert!(is_reset(&mut busy_client), "{to}: the client is not told");
        assert!(is_reset(&mut busy_server), "{to}: the server is not told");
        // The idle one: the server sends first.
        assert!(!passes(&mut idle_server, &mut idle_client), "{to}: the server goes on");
        assert!(is_reset(&mut idle_server) && is_reset(&mut idle_client), "{to}: the idle connection");
        assert!(net.connect("p2", to).is_none());
        driver.apply(&open(3).rules()).expect("applied");
        assert!(net.connect("p2", to).is_some(), "{to}: open again");
    }
}

#[test]
fn drops_connections_picked_up_in_the_middle() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let mut driver = net.driver();
    let listener = net.listen("p3", "10.1.0.3:80");
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &listener);
    assert!(passes(&mut client, &mut server));
    // Connections of the server are allowed, those to port 80 are not, and the kernel does not know the connection, which was not
    // tracked before.
    let closed = Build {
        pods: vec![2, 3],
        ingress: Some(vec![to_port(Action::Deny, 80), rule(Action::Allow)]),
        ..Build::default()
    };
    driver.apply(&closed.rules()).expect("applied");
    assert!(!passes(&mut server, &mut client));
    assert!(!passes(&mut client, &mut server));
}

#[test]
fn cuts_connections_to_the_node_for_good() {
    for to in ["10.1.255.1:90", "[fd01:ffff::1]:90"] {
        let mut net = Net::new();
        net.pod(2);
        let mut driver = net.driver();
        let listener = net.listen("node", to);
        let open = |number| Build { pods: vec![2], number, ..Build::default() };
        let closed = |number| Build { pods: vec![2], to_node: Some(vec![]), number, ..Build::default() };
        // The kernel does not know one of them, which was not tracked before: its client is unknown.
        let (mut lost_client, mut lost_server) = net.pair("p2", to, &listener);
        driver.apply(&open(1).rules()).expect("applied");
        let (mut client, mut server) = net.pair("p2", to, &listener);
        let (mut idle_client, mut idle_server) = net.pair("p2", to, &listener);
        assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client));
        driver.apply(&closed(2).rules()).expect("applied");
        assert!(!passes(&mut client, &mut server) && is_reset(&mut client), "{to}: from the pod");
        assert!(!passes(&mut idle_server, &mut idle_client) && is_reset(&mut idle_server), "{to}: from the node");
        assert!(!passes(&mut lost_server, &mut lost_client), "{to}: forgotten, from the node");
        assert!(!passes(&mut lost_client, &mut lost_server), "{to}: forgotten, from the pod");
        assert!(net.connect("p2", to).is_none());
    }
}

#[test]
fn cuts_udp_conversations() {
    for (client, server) in [("10.1.0.2:4000", "10.1.0.3:5000"), ("[fd01::2]:4000", "[fd01::3]:5000")] {
        let mut net = Net::new();
        net.pod(2);
        net.pod(3);
        let mut driver = net.driver();
        let (asking, answering) = (net.udp("p2", client), net.udp("p3", server));
        let says = |from: &UdpSocket, to: &UdpSocket| {
            let at = to.local_addr().expect("bound");
            from.send_to(b"x", at).is_ok() && to.recv_from(&mut [0; 16]).is_ok()
        };
        let build =
            |ingress, number| Build { pods: vec![2, 3], ingress: Some(ingress), number, ..Build::default() }.rules();
        driver.apply(&build(vec![rule(Action::Allow)], 1)).expect("applied");
        assert!(says(&asking, &answering) && says(&answering, &asking));
        // Pod 3 may still send to pod 2, but not as a reply to a forbidden packet.
        let to_server = Peer { ports: vec![PortRange { first: 5000, last: 5000 }], ..Peer::default() };
        let forbid = Rule { destination: to_server, protocol: Some(17), ..rule(Action::Deny) };
        driver.apply(&build(vec![forbid, rule(Action::Allow)], 2)).expect("applied");
        assert!(!says(&answering, &asking) && !says(&asking, &answering), "{server}");
    }
}

#[test]
fn judges_connections_that_a_helper_expects_by_themselves() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    let node = net.name("node");
    let helper = "table ip helpers { ct helper ftp { type \"ftp\" protocol tcp; }; chain prerouting { type filter hook \
                  prerouting priority 0; tcp dport 21 ct helper set \"ftp\"; }; }";
    let loaded = std::process::Command::new("ip").args(["netns", "exec", &node, "nft", helper]).output();
    assert!(loaded.as_ref().is_ok_and(|it| it.status.success()), "{loaded:?}");
    let mut driver = net.driver();
    let build = |ports: &[u16], number| {
        let ingress = Some(ports.iter().map(|port| to_port(Action::Allow, *port)).collect());
        Build { pods: vec![2, 3], ingress, number, ..Build::default() }.rules()
    };
    driver.apply(&build(&[21], 1)).expect("applied");
    let (control, _data) = (net.listen("p3", "10.1.0.3:21"), net.listen("p3", "10.1.0.3:5001"));
    // The server announces a port, and the kernel expects a connection to it: 19 * 256 + 137.
    let (mut client, mut server) = net.pair("p2", "10.1.0.3:21", &control);
    let mut tell = |text: &[u8]| {
        server.write_all(text).expect("sent");
        let mut heard = vec![0; text.len()];
        client.read_exact(&mut heard).expect("received");
    };
    tell(b"220 ready\r\n");
    tell(b"227 Entering Passive Mode (10,1,0,3,19,137)\r\n");
    assert!(net.connect("p2", "10.1.0.3:5001").is_none(), "expected, but not allowed");
    driver.apply(&build(&[21, 5001], 2)).expect("applied");
    assert!(net.connect("p2", "10.1.0.3:5001").is_some());
}

#[test]
fn judges_again_when_epochs_are_reused() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    // Seven bits of epochs: the number is reused after 127 generations.
    let mut driver = net.driver_with(Config { ct_mark_mask: 0xff00_0000, ..Config::default() });
    let listener = net.listen("p3", "10.1.0.3:80");
    let build = |list, number| Build { pods: vec![2, 3], ingress: Some(list), number, ..Build::default() }.rules();
    for lead in [1, 63, 64, 126] {
        for number in 0..lead {
            driver.apply(&build(vec![rule(Action::Allow)], number)).expect("applied");
        }
        let (mut client, mut server) = net.pair("p2", "10.1.0.3:80", &listener);
        assert!(passes(&mut client, &mut server));
        for number in 0..127 {
            driver.apply(&build(vec![], 1000 + number)).expect("applied");
        }
        assert!(!passes(&mut client, &mut server), "judged {lead} generations in");
    }
}

#[test]
fn allowed_connections_survive_a_thousand_generations() {
    let mut net = Net::new();
    net.pod(2);
    net.pod(3);
    // A service address that another table translates.
    let node = net.name("node");
    let nat = "table ip services { chain prerouting { type nat hook prerouting priority -100; \
               ip daddr 10.96.0.1 tcp dport 80 dnat to 10.1.0.3:8080\n}\n}\n";
    let loaded = std::process::Command::new("ip").args(["netns", "exec", &node, "nft", nat]).output();
    assert!(loaded.is_ok_and(|it| it.status.success()), "nft of nftables makes the translation");
    // Few epochs, which are reused several times.
    let mut driver = net.driver_with(Config { ct_mark_mask: 0xff00_0000, ..Config::default() });
    let generation = |number: u64| {
        let members = [format!("10.200.{}.{}", number / 250, number % 250 + 1)];
        let members: Vec<&str> = members.iter().map(String::as_str).collect();
        Build {
            pods: vec![2, 3],
            ingress: Some(vec![from_set(Action::Deny, "forbidden"), to_port(Action::Allow, 8080)]),
            sets: vec![addresses("forbidden", &members)],
            number,
            ..Build::default()
        }
    };
    driver.apply(&generation(0).rules()).expect("applied");
    let listener = net.listen("p3", "10.1.0.3:8080");
    let (mut direct, mut direct_server) = net.pair("p2", "10.1.0.3:8080", &listener);
    let (mut service, mut service_server) = net.pair("p2", "10.96.0.1:80", &listener);
    for number in 1..=1000 {
        driver.apply(&generation(number).rules()).expect("applied");
        if number % 10 == 0 {
            assert!(passes(&mut direct, &mut direct_server), "{number}");
            assert!(passes(&mut service_server, &mut service), "{number}: from the server, translated");
            assert!(passes(&mut service, &mut service_server), "{number}: translated");
        }
    }
}

#[test]
fn no_forbidden_packet_passes_while_generations_change() {
    let mut net = Net::new();
    for pod in [2, 3, 4] {
        net.pod(pod);
    }
    let mut driver = net.driver();
    // Everything changes its name each time: the list of rules, so policy, chain and the endpoints' elements.
    let generation = |number: u64| {
        let mut rules = vec![from_set(Action::Allow, if number.is_multiple_of(2) { "even" } else { "odd" })];
        rules.extend((0..number % 3).map(|extra| to_port(Action::Deny, 1000 + extra as u16)));
        let name = if number.is_multiple_of(2) { "even" } else { "odd" };
        Build {
            pods: vec![2, 3, 4],
            ingress: Some(rules),
            sets: vec![addresses(name, &["10.1.0.2"])],
            number,
            ..Build::default()
        }
    };
    driver.apply(&generation(0).rules()).expect("applied");
    let (allowed, forbidden) = (net.udp("p3", "10.1.0.3:5000"), net.udp("p3", "10.1.0.3:5001"));
    assert!(net.datagram("p2", "10.1.0.2:4000", &allowed) && !net.datagram("p4", "10.1.0.4:4000", &forbidden));
    let done = AtomicBool::new(false);
    let (sent_allowed, sent_forbidden) = (AtomicU64::new(0), AtomicU64::new(0));
    // Each round from a new port, so that every packet is the first of its connection, and from one that stays.
    let flood = |pod: &str, to: &str, sent: &AtomicU64| {
        let own = format!("10.1.0.{}:0", &pod[1..]);
        net.within(pod, || {
            let lasting = UdpSocket::bind(&own).expect("bound");
            while !done.load(Ordering::Relaxed) {
                let fresh = UdpSocket::bind(&own).expect("bound");
                for socket in [&fresh, &lasting] {
                    sent.fetch_add(u64::from(socket.send_to(b"flood", to).is_ok()), Ordering::Relaxed);
                }
            }
        });
    };
    let mut received = 0u64;
    std::thread::scope(|scope| {
        scope.spawn(|| flood("p2", "10.1.0.3:5000", &sent_allowed));
        scope.spawn(|| flood("p4", "10.1.0.3:5001", &sent_forbidden));
        allowed.set_nonblocking(true).expect("set");
        for number in 1..=1000 {
            driver.apply(&generation(number).rules()).expect("applied");
            while allowed.recv_from(&mut [0; 16]).is_ok() {
                received += 1;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    forbidden.set_nonblocking(true).expect("set");
    let leaked = std::iter::from_fn(|| forbidden.recv_from(&mut [0; 16]).ok()).count();
    let (sent_allowed, sent_forbidden) = (sent_allowed.into_inner(), sent_forbidden.into_inner());
    println!(
        "1000 generations: {sent_forbidden} forbidden packets sent, {leaked} received; {sent_allowed} allowed sent, {received} received"
    );
    assert!(sent_forbidden > 1000 && received > 1000, "the flood is one");
    assert_eq!(leaked, 0);
}
