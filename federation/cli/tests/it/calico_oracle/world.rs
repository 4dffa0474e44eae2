//! Random worlds of Calico's objects, in which the clauses meet that are easily misread: network sets that contain pods'
//! addresses, negated selectors alone and beside positive parts in policies with and without a namespace, and port names
//! with and without a protocol, in lists with numbers, negated, and beside selections.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::reference::{Labels, Meaning, Packet, Socket, State, Thing, number};
use crate::oracle::Random;

/// The manifests and queries of a run.
pub struct World {
    pub state: State,
    /// Every object, as an API server has it.
    pub objects: Vec<Value>,
}

/// Pods come first among the things.
pub const PODS: usize = 7;

/// Selectors with their meaning over one map of labels.
const SELECTORS: [(&str, Meaning); 11] = [
    ("app == 'one'", |labels, _| labels.get("app").is_some_and(|value| value == "one")),
    ("app != 'one'", |labels, _| labels.get("app").is_none_or(|value| value != "one")),
    ("has(role)", |labels, _| labels.contains_key("role")),
    ("!has(role)", |labels, _| !labels.contains_key("role")),
    ("role in {'one', 'x'}", |labels, _| labels.get("role").is_some_and(|value| value == "one")),
    ("role not in {'two'}", |labels, _| labels.get("role").is_none_or(|value| value != "two")),
    ("app starts with 'o' && has(role)", |labels, _| {
        labels.get("app").is_some_and(|value| value.starts_with('o')) && labels.contains_key("role")
    }),
    ("has(zone) || role contains 'w'", |labels, _| {
        labels.contains_key("zone") || labels.get("role").is_some_and(|value| value.contains('w'))
    }),
    ("zone == 'lan'", |labels, _| labels.get("zone").is_some_and(|value| value == "lan")),
    ("all() && !has(role)", |labels, all| all && !labels.contains_key("role")),
    ("all()", |_, all| all),
];

const V4_NETS: [&str; 5] = ["10.0.0.0/29", "10.0.0.4/30", "10.0.0.2/31", "203.0.113.0/24", "0.0.0.0/0"];
const V6_NETS: [&str; 4] = ["fd00::/125", "fd00::2/127", "2001:db8::/32", "::/0"];
const PORTS: [u16; 3] = [80, 81, 8080];
const NAMES: [&str; 2] = ["http", "dns"];
const NAMED: [(&str, u8); 3] = [("TCP", 6), ("UDP", 17), ("SCTP", 132)];

/// Which ports a rule may name: none where its protocol has none, and names alone where it has no protocol.
#[derive(Clone, Copy, PartialEq)]
enum Ports {
    None,
    Named,
    Any,
}

fn labels(random: &mut Random) -> Labels {
    let mut labels = Labels::new();
    for key in ["app", "role"] {
        if random.once_in(2) {
            labels.insert(key.to_owned(), random.pick(&["one", "two"]).to_owned());
        }
    }
    labels
}

fn selector(random: &mut Random) -> Value {
    json!(random.pick(&SELECTORS).0)
}

fn positive(random: &mut Random, entity: &mut Value) {
    match random.below(6) {
        0..3 => entity["selector"] = selector(random),
        3 => entity["namespaceSelector"] = random.pick(&[json!("global()"), json!("all()")]),
        4 => entity["namespaceSelector"] = selector(random),
        _ => {
            entity["serviceAccounts"] = match random.once_in(2) {
                true => json!({"names": [random.pick(&["runner", "default"])]}),
                false => json!({"selector": selector(random)}),
            }
        }
    }
}

fn nets(random: &mut Random, v6: bool, entity: &mut Value) {
    let nets: &[&str] = if v6 { &V6_NETS } else { &V4_NETS };
    if random.once_in(2) {
        let (first, second) = (random.pick(nets), random.pick(nets));
        entity["nets"] = if first == second { json!([first]) } else { json!([first, second]) };
    } else {
        // The last of each is everything, which may not be excluded.
        entity["notNets"] = json!([random.pick(&nets[..nets.len() - 1])]);
    }
}

/// Numbers, ranges and names, or names alone.
fn port_list(random: &mut Random, ports: Ports) -> Value {
    match if ports == Ports::Named { random.below(3) } else { random.below(6) } {
        0 => json!([random.pick(&NAMES)]),
        1 | 2 => json!(NAMES),
        3 | 4 => json!([random.pick(&PORTS), random.pick(&NAMES)]),
        _ => json!(["80:81"]),
    }
}

/// The end that a policy selects says little about itself, so that rules match.
fn entity(random: &mut Random, v6: bool, ports: Ports, is_peer: bool) -> Value {
    if is_peer && ports != Ports::None && random.once_in(4) {
        // A set that holds pods' addresses, and names of their ports.
        let field = random.pick(&["ports", "notPorts"]);
        return json!({"selector": "zone == 'lan'", field: port_list(random, ports)});
    }
    let mut entity = json!({});
    match if is_peer || random.once_in(4) { random.below(10) } else { 0 } {
        0 => {}
        1 => positive(random, &mut entity),
        2 => entity["notSelector"] = selector(random),
        3..6 => {
            positive(random, &mut entity);
            entity["notSelector"] = selector(random);
        }
        6 | 7 => positive(random, &mut entity),
        8 => nets(random, v6, &mut entity),
        _ => {
            positive(random, &mut entity);
            positive(random, &mut entity);
            nets(random, v6, &mut entity);
        }
    }
    if ports != Ports::None {
        if random.once_in(2) {
            entity["ports"] = port_list(random, ports);
        }
        if random.once_in(3) {
            entity["notPorts"] = port_list(random, ports);
        }
    }
    entity
}

fn rule(random: &mut Random, section: &str) -> Value {
    let v6 = random.once_in(4);
    let protocol = match random.below(10) {
        0..4 => None,
        4 | 5 => Some(json!("TCP")),
        6 => Some(json!("UDP")),
        7 => Some(json!("SCTP")),
        8 => Some(random.pick(&[json!(6), json!(17)])),
        _ if v6 => Some(random.pick(&[json!("ICMPv6"), json!(58)])),
        _ => Some(random.pick(&[json!("ICMP"), json!(1)])),
    };
    let is_icmp = protocol.as_ref().is_some_and(|protocol| matches!(number(protocol), 1 | 58));
    let ports = match &protocol {
        None => Ports::Named,
        Some(_) if is_icmp => Ports::None,
        Some(_) => Ports::Any,
    };
    let mut rule = json!({"action": random.pick(&["Allow", "Allow", "Allow", "Deny", "Deny", "Pass", "Log"])});
    let of_source = if random.once_in(3) { ports } else { Ports::None };
    rule["source"] = entity(random, v6, of_source, section == "ingress");
    rule["destination"] = entity(random, v6, ports, section == "egress");
    if random.once_in(8) {
        // A service is the whole peer.
        let peer = if section == "ingress" { "source" } else { "destination" };
        rule[peer] = json!({"services": {"name": "front", "namespace": "a"}});
    }
    let icmp = |random: &mut Random| match random.once_in(2) {
        true => json!({"type": random.pick(&[8, 3])}),
        false => json!({"type": random.pick(&[8, 3]), "code": random.below(2)}),
    };
    match &protocol {
        Some(protocol) => rule["protocol"] = protocol.clone(),
        None if random.once_in(3) => {
            rule["notProtocol"] = random.pick(&[json!("UDP"), json!("TCP"), json!(17), json!("SCTP")]);
        }
        None => {}
    }
    if is_icmp && !random.once_in(3) {
        rule["icmp"] = icmp(random);
    }
    if random.once_in(if is_icmp { 3 } else { 20 }) {
        rule["notICMP"] = icmp(random);
    }
    if random.once_in(10) {
        rule["ipVersion"] = json!(if v6 { 6 } else { 4 });
    }
    rule
}

fn policy(random: &mut Random, at: usize) -> Value {
    let global = random.once_in(2);
    let mut metadata = json!({"name": format!("p{at}")});
    if !global {
        metadata["namespace"] = json!(random.pick(&["a", "b"]));
    }
    let mut spec = json!({});
    for section in ["ingress", "egress"] {
        if !random.once_in(3) {
            spec[section] = (0..random.below(7)).map(|_| rule(random, section)).collect();
        }
    }
    match random.below(4) {
        0 => spec["types"] = json!(["Ingress"]),
        1 => spec["types"] = json!(["Ingress", "Egress"]),
        _ => {}
    }
    if random.once_in(2) {
        spec["selector"] = selector(random);
    }
    if random.once_in(5) {
        spec["serviceAccountSelector"] = selector(random);
    }
    if global && random.once_in(4) {
        spec["namespaceSelector"] = selector(random);
    }
    if random.once_in(2) {
        spec["order"] = json!(random.below(3));
    }
    if !random.once_in(3) {
        spec["tier"] = json!(random.pick(&["first", "second", "ghost", "default"]));
    }
    let kind = if global { "GlobalNetworkPolicy" } else { "NetworkPolicy" };
    json!({"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": metadata, "spec": spec})
}

fn pod(random: &mut Random, at: usize) -> (Thing, Value) {
    let (namespace, labels) = (random.pick(&["a", "b"]), labels(random));
    let account = random.pick(&["runner", "default"]);
    let mut ports: Vec<(String, u8, u16)> = Vec::new();
    for name in NAMES {
        if random.once_in(2) {
            ports.push((name.to_owned(), random.pick(&NAMED).1, random.pick(&PORTS)));
        }
    }
    let written = ports.iter().map(|(name, protocol, port)| {
        let protocol = NAMED.iter().find(|(_, number)| number == protocol).expect("known").0;
        match protocol {
            "TCP" => json!({"name": name, "containerPort": port}),
            _ => json!({"name": name, "containerPort": port, "protocol": protocol}),
        }
    });
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("pod{at}"), "namespace": namespace, "labels": labels},
        "spec": {
            "serviceAccountName": account, "nodeName": format!("n{}", at % 2),
            "containers": [{"name": "c", "ports": written.collect::<Vec<Value>>()}],
        },
        "status": {"phase": "Running", "podIP": format!("10.0.0.{at}"),
            "podIPs": [{"ip": format!("10.0.0.{at}")}, {"ip": format!("fd00::{at}")}]},
    });
    let nets = [format!("10.0.0.{at}/32"), format!("fd00::{at}/128")].map(|net| net.parse().expect("net"));
    let (namespace, account) = (Some(namespace.to_owned()), Some(account.to_owned()));
    (Thing { labels, namespace, account, nets: nets.into(), ports }, object)
}

fn network_set(random: &mut Random, at: usize) -> (Thing, Value) {
    let (global, mut labels) = (random.once_in(2), labels(random));
    labels.insert("zone".to_owned(), random.pick(&["lan", "out"]).to_owned());
    let nets = [random.pick(&V4_NETS[..4]), random.pick(&V6_NETS[..3])];
    let kind = if global { "GlobalNetworkSet" } else { "NetworkSet" };
    let namespace = (!global).then(|| random.pick(&["a", "b"]).to_owned());
    let mut metadata = json!({"name": format!("set{at}"), "labels": labels});
    if let Some(namespace) = &namespace {
        metadata["namespace"] = json!(namespace);
    }
    let object =
        json!({"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": metadata, "spec": {"nets": nets}});
    let nets = nets.map(|net| net.parse().expect("net")).into();
    (Thing { labels, namespace, account: None, nets, ports: Vec::new() }, object)
}

pub fn world(random: &mut Random) -> World {
    let namespaces: BTreeMap<_, _> = ["a", "b"].map(|name| (name.to_owned(), labels(random))).into();
    let accounts: BTreeMap<_, _> =
        ["a", "b"].map(|namespace| ((namespace.to_owned(), "runner".to_owned()), labels(random))).into();
    let named = |kind: &str, name: &str, namespace: Option<&str>, labels: &Labels| {
        let metadata = json!({"name": name, "namespace": namespace, "labels": labels});
        json!({"apiVersion": "v1", "kind": kind, "metadata": metadata})
    };
    let mut objects: Vec<Value> =
        namespaces.iter().map(|(name, labels)| named("Namespace", name, None, labels)).collect();
    let of_namespaces = accounts.iter();
    objects.extend(
        of_namespaces.map(|((namespace, name), labels)| named("ServiceAccount", name, Some(namespace), labels)),
    );
    let mut things = Vec::new();
    for at in 0..PODS {
        let (thing, object) = pod(random, at + 1);
        things.push(thing);
        objects.push(object);
    }
    for at in 0..1 + random.below(3) {
        let (thing, object) = network_set(random, at);
        things.push(thing);
        objects.push(object);
    }
    let tier = |random: &mut Random, name: &str| {
        let mut spec = json!({"defaultAction": random.pick(&["Deny", "Pass", "Pass"])});
        if random.once_in(2) {
            spec["order"] = json!(random.below(3));
        }
        json!({"apiVersion": "projectcalico.org/v3", "kind": "Tier", "metadata": {"name": name}, "spec": spec})
    };
    let tiers = vec![tier(random, "first"), tier(random, "second")];
    let policies: Vec<Value> = (0..2 + random.below(7)).map(|at| policy(random, at)).collect();
    objects.extend(tiers.iter().chain(&policies).cloned());
    let backends = backends(random, &things);
    objects.push(
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "front", "namespace": "a"}, "spec": {}}),
    );
    for (at, (address, protocol, port)) in backends.iter().enumerate() {
        let protocol = NAMED.iter().find(|(_, number)| number == protocol);
        let ports = protocol.map_or(json!([]), |(protocol, _)| json!([{"port": port, "protocol": protocol}]));
        objects.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("front-{at}"), "namespace": "a", "labels": {"kubernetes.io/service-name": "front"}},
            "endpoints": [{"addresses": [address]}], "ports": ports,
        }));
    }
    let selectors = SELECTORS.map(|(text, meaning)| (text.to_owned(), meaning)).into();
    World { state: State { namespaces, accounts, things, tiers, policies, backends, selectors }, objects }
}

fn backends(random: &mut Random, things: &[Thing]) -> Vec<Socket> {
    let mut backends: Vec<Socket> = vec![("203.0.113.9".parse().expect("address"), 6, 80)];
    // The last is of a slice without ports.
    for (protocol, port) in [(6, 8080), (6, 81), (17, 81), (132, 80), (0, 0)] {
        backends.push((things[random.below(PODS)].nets[0].addr(), protocol, port));
    }
    backends.retain(|_| !random.once_in(5));
    backends
}

/// A packet, and its question for `hanse policy explain`.
pub fn packet(random: &mut Random, state: &State) -> (Packet, Value) {
    let v6 = random.once_in(3);
    let end = |random: &mut Random| -> (IpAddr, Option<usize>) {
        match random.below(PODS + 2) {
            at @ 0..PODS => (state.things[at].nets[usize::from(v6)].addr(), Some(at)),
            PODS if v6 => ("2001:db8::9".parse().expect("address"), None),
            PODS => ("203.0.113.9".parse().expect("address"), None),
            _ if v6 => ("fd00:9::9".parse().expect("address"), None),
            _ => ("198.51.100.9".parse().expect("address"), None),
        }
    };
    let ends = [end(random), end(random)];
    let icmp = if v6 { (58, "ICMPv6") } else { (1, "ICMP") };
    let (mut protocol, mut name) = random.pick(&[(6, "TCP"), (6, "TCP"), (17, "UDP"), (132, "SCTP"), icmp]);
    let mut ports = [random.pick(&PORTS), random.pick(&PORTS)];
    // Often a port that one of the ends has a name for.
    let at = usize::from(!random.once_in(4));
    let named = ends[at].1.map(|pod| &state.things[pod].ports).filter(|ports| !ports.is_empty());
    if let Some(named) = named.filter(|_| !random.once_in(3)) {
        let (_, of, port) = &named[random.below(named.len())];
        (name, protocol) = *NAMED.iter().find(|(_, number)| number == of).expect("known");
        ports[at] = *port;
    }
    let has_ports = !matches!(protocol, 1 | 58);
    let ports = ports.map(|port| if has_ports { port } else { 0 });
    let packet = Packet {
        addresses: ends.map(|(address, _)| address),
        protocol,
        ports,
        icmp: (random.pick(&[8, 3]), random.below(2) as u8),
    };
    let mut line = json!({"from": {"ip": ends[0].0}, "to": {"ip": ends[1].0}, "protocol": name});
    if has_ports {
        (line["sourcePort"], line["port"]) = (json!(ports[0]), json!(ports[1]));
    } else {
        line["icmp"] = json!({"type": packet.icmp.0, "code": packet.icmp.1});
    }
    (packet, line)
}
