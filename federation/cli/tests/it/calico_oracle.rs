//! Calico's tiers, policies and network sets a second time: read straight over the JSON of the objects, sharing nothing with
//! the conversion and the evaluator, and compared with `hanse policy explain` at random.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;

use serde_json::{Value, json};

use crate::oracle::{Random, list, text};

const ROUNDS: u64 = 120;
const QUERIES: usize = 150;

type Labels = BTreeMap<String, String>;

type Meaning = fn(&Labels) -> bool;

/// Selectors with their meaning over one map of labels.
const SELECTORS: [(&str, Meaning); 9] = [
    ("app == 'one'", |labels| labels.get("app").is_some_and(|value| value == "one")),
    ("app != 'one'", |labels| labels.get("app").is_none_or(|value| value != "one")),
    ("has(role)", |labels| labels.contains_key("role")),
    ("!has(role)", |labels| !labels.contains_key("role")),
    ("role in {'one', 'x'}", |labels| labels.get("role").is_some_and(|value| value == "one")),
    ("role not in {'two'}", |labels| labels.get("role").is_none_or(|value| value != "two")),
    ("app starts with 'o' && has(role)", |labels| {
        labels.get("app").is_some_and(|value| value.starts_with('o')) && labels.contains_key("role")
    }),
    ("has(zone) || role contains 'w'", |labels| {
        labels.contains_key("zone") || labels.get("role").is_some_and(|value| value.contains('w'))
    }),
    ("all()", |_| true),
];

fn holds(selector: &Value, labels: &Labels) -> bool {
    SELECTORS.iter().find(|(known, _)| selector == known).expect("a known selector").1(labels)
}

/// A pod or a network set.
struct Thing {
    object: Value,
    labels: Labels,
    namespace: Option<String>,
    account: Option<String>,
    addresses: Vec<ipnet::IpNet>,
    ports: Vec<(String, u8, u16)>,
}

struct World {
    namespaces: BTreeMap<String, Labels>,
    accounts: BTreeMap<(String, String), Labels>,
    things: Vec<Thing>,
    tiers: Vec<Value>,
    policies: Vec<Value>,
    /// Of the service `front` of namespace `a`: address, protocol, port.
    backends: Vec<(IpAddr, u8, u16)>,
    /// What decided, and with which fields.
    occurred: RefCell<BTreeMap<String, usize>>,
}

struct Packet {
    ends: [(IpAddr, Option<usize>); 2],
    protocol: u8,
    /// Of the source and of the destination.
    ports: [u16; 2],
    icmp: (u8, u8),
}

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

fn selector(random: &mut Random) -> &'static str {
    random.pick(&SELECTORS).0
}

const V4_NETS: [&str; 4] = ["10.0.0.0/29", "10.0.0.4/30", "203.0.113.0/24", "0.0.0.0/0"];
const V6_NETS: [&str; 3] = ["fd00::/125", "2001:db8::/32", "::/0"];
const PORTS: [u16; 3] = [80, 81, 8080];
const NAMES: [&str; 2] = ["http", "dns"];
const NAMED: [(&str, u8); 3] = [("TCP", 6), ("UDP", 17), ("SCTP", 132)];

fn entity(random: &mut Random, v6: bool, ports: Ports) -> Value {
    let mut entity = json!({});
    let nets: &[&str] = if v6 { &V6_NETS } else { &V4_NETS };
    type Make<'m> = &'m dyn Fn(&mut Random) -> Value;
    let fields: [(&str, usize, Make<'_>); 8] = [
        ("selector", 3, &|random| json!(selector(random))),
        ("notSelector", 6, &|random| json!(selector(random))),
        ("namespaceSelector", 5, &|random| match random.below(4) {
            0 => json!("global()"),
            _ => json!(selector(random)),
        }),
        ("serviceAccounts", 9, &|random| match random.once_in(2) {
            true => json!({"names": [random.pick(&["runner", "default"])]}),
            false => json!({"selector": selector(random)}),
        }),
        ("nets", 6, &|random| {
            let (first, second) = (random.pick(nets), random.pick(nets));
            if first == second { json!([first]) } else { json!([first, second]) }
        }),
        // The last of each is everything, which may not be excluded.
        ("notNets", 9, &|random| json!([random.pick(&nets[..nets.len() - 1])])),
        ("ports", 4, &|random| match if ports == Ports::Named { 0 } else { random.below(3) } {
            0 => json!([random.pick(&NAMES)]),
            1 => json!([random.pick(&PORTS), random.pick(&NAMES)]),
            _ => json!(["80:81"]),
        }),
        ("notPorts", 9, &|random| match ports == Ports::Named || random.once_in(2) {
            true => json!([random.pick(&NAMES)]),
            false => json!([random.pick(&PORTS)]),
        }),
    ];
    for (name, times, make) in fields {
        if random.once_in(times * 3 / 2) && (ports != Ports::None || !name.to_lowercase().ends_with("ports")) {
            entity[name] = make(random);
        }
    }
    entity
}

fn rule(random: &mut Random, section: &str) -> Value {
    let v6 = random.once_in(4);
    let action = random.pick(&["Allow", "Allow", "Deny", "Pass", "Log"]);
    let protocol = match random.below(9) {
        0..3 => None,
        3 => Some(json!("TCP")),
        4 => Some(json!("UDP")),
        5 => Some(random.pick(&[json!("SCTP"), json!("TCP")])),
        6 => Some(random.pick(&[json!(6), json!(17)])),
        7 if v6 => Some(random.pick(&[json!("ICMPv6"), json!(58)])),
        7 => Some(random.pick(&[json!("ICMP"), json!(1)])),
        _ => Some(json!("UDP")),
    };
    let is_icmp = protocol.as_ref().is_some_and(|protocol| matches!(number(protocol), 1 | 58));
    let ports = match &protocol {
        None => Ports::Named,
        Some(_) if is_icmp => Ports::None,
        Some(_) => Ports::Any,
    };
    let mut rule = json!({"action": action});
    let of_source = if random.once_in(2) { ports } else { Ports::None };
    rule["source"] = entity(random, v6, of_source);
    rule["destination"] = entity(random, v6, ports);
    if random.once_in(5) {
        // A service is the whole peer.
        let (peer, mut service) = if section == "ingress" { ("source", json!({})) } else { ("destination", json!({})) };
        service["services"] = json!({"name": "front", "namespace": "a"});
        rule[peer] = service;
    }
    let icmp = |random: &mut Random| match random.once_in(2) {
        true => json!({"type": random.pick(&[8, 3])}),
        false => json!({"type": random.pick(&[8, 3]), "code": random.below(2)}),
    };
    match &protocol {
        Some(protocol) => rule["protocol"] = protocol.clone(),
        None if random.once_in(4) => {
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
    if random.once_in(8) {
        rule["ipVersion"] = json!(if v6 { 6 } else { 4 });
    }
    rule
}

fn number(protocol: &Value) -> u8 {
    match protocol.as_str() {
        None => u8::try_from(protocol.as_u64().expect("a number")).expect("of a protocol"),
        Some("TCP") => 6,
        Some("UDP") => 17,
        Some("SCTP") => 132,
        Some("ICMP") => 1,
        Some("ICMPv6") => 58,
        Some(other) => panic!("{other}?"),
    }
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
            spec[section] = (0..random.below(6)).map(|_| rule(random, section)).collect();
        }
    }
    match random.below(4) {
        0 => spec["types"] = json!(["Ingress"]),
        1 => spec["types"] = json!(["Ingress", "Egress"]),
        _ => {}
    }
    if random.once_in(2) {
        spec["selector"] = json!(selector(random));
    }
    if random.once_in(5) {
        spec["serviceAccountSelector"] = json!(selector(random));
    }
    if global && random.once_in(4) {
        spec["namespaceSelector"] = json!(selector(random));
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

fn world(random: &mut Random) -> World {
    let namespaces: BTreeMap<_, _> = ["a", "b"].map(|name| (name.to_owned(), labels(random))).into();
    let mut accounts = BTreeMap::new();
    for namespace in ["a", "b"] {
        accounts.insert((namespace.to_owned(), "runner".to_owned()), labels(random));
    }
    let mut things = Vec::new();
    for at in 1..8 {
        let (namespace, labels) = (random.pick(&["a", "b"]), labels(random));
        let account = random.pick(&["runner", "default"]);
        let mut ports: Vec<(String, u8, u16)> = Vec::new();
        for name in NAMES {
            if random.once_in(2) {
                ports.push((name.to_owned(), random.pick(&NAMED).1, random.pick(&PORTS)));
            }
        }
        let written: Vec<Value> = ports
            .iter()
            .map(|(name, protocol, port)| {
                let protocol = NAMED.iter().find(|(_, number)| number == protocol).expect("known").0;
                match protocol {
                    "TCP" => json!({"name": name, "containerPort": port}),
                    _ => json!({"name": name, "containerPort": port, "protocol": protocol}),
                }
            })
            .collect();
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("pod{at}"), "namespace": namespace, "labels": labels},
            "spec": {
                "serviceAccountName": account,
                "containers": [{"name": "c", "ports": written}],
            },
            "status": {"phase": "Running", "podIP": format!("10.0.0.{at}"),
                "podIPs": [{"ip": format!("10.0.0.{at}")}, {"ip": format!("fd00::{at}")}]},
        });
        let addresses = [format!("10.0.0.{at}/32"), format!("fd00::{at}/128")].map(|net| net.parse().expect("net"));
        things.push(Thing {
            object,
            labels,
            namespace: Some(namespace.to_owned()),
            account: Some(account.to_owned()),
            addresses: addresses.into(),
            ports,
        });
    }
    for at in 0..random.below(3) {
        let (global, mut labels) = (random.once_in(2), labels(random));
        labels.insert("zone".to_owned(), "out".to_owned());
        let nets = [random.pick(&V4_NETS[..3]), random.pick(&V6_NETS[..2])];
        let kind = if global { "GlobalNetworkSet" } else { "NetworkSet" };
        let mut metadata = json!({"name": format!("set{at}"), "labels": labels});
        if !global {
            metadata["namespace"] = json!("a");
        }
        let object =
            json!({"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": metadata, "spec": {"nets": nets}});
        things.push(Thing {
            object,
            labels,
            namespace: (!global).then(|| "a".to_owned()),
            account: None,
            addresses: nets.map(|net| net.parse().expect("net")).into(),
            ports: Vec::new(),
        });
    }
    let tier = |random: &mut Random, name: &str| {
        let mut spec = json!({"defaultAction": random.pick(&["Deny", "Pass"])});
        if random.once_in(2) {
            spec["order"] = json!(random.below(3));
        }
        json!({"apiVersion": "projectcalico.org/v3", "kind": "Tier", "metadata": {"name": name}, "spec": spec})
    };
    let tiers = vec![tier(random, "first"), tier(random, "second")];
    let policies = (0..2 + random.below(7)).map(|at| policy(random, at)).collect();
    let mut backends = vec![("203.0.113.9".parse().expect("address"), 6, 80)];
    for (protocol, port) in [(6, 8080), (6, 81), (17, 81), (132, 80)] {
        backends.push((things[random.below(7)].addresses[0].addr(), protocol, port));
    }
    // A slice without ports.
    backends.push((things[random.below(7)].addresses[0].addr(), 0, 0));
    backends.retain(|_| !random.once_in(5));
    World { namespaces, accounts, things, tiers, policies, backends, occurred: RefCell::default() }
}

impl World {
    fn of_namespace(&self, thing: &Thing, selector: &Value) -> bool {
        match (&thing.namespace, selector.as_str()) {
            (namespace, Some("global()")) => namespace.is_none(),
            (namespace, Some("all()")) => namespace.is_some(),
            // Without a namespace there are no labels of one, which is all that a negation asks.
            (None, _) => holds(selector, &Labels::new()),
            (Some(namespace), _) => holds(selector, &self.namespaces[namespace]),
        }
    }

    fn of_account(&self, thing: &Thing, selector: &Value) -> bool {
        let key = thing.namespace.clone().zip(thing.account.clone());
        holds(selector, key.and_then(|key| self.accounts.get(&key)).unwrap_or(&Labels::new()))
    }

    fn occurs(&self, what: impl Into<String>) {
        *self.occurred.borrow_mut().entry(what.into()).or_default() += 1;
    }

    fn rule_matches(&self, rule: &Value, own: Option<&str>, packet: &Packet) -> bool {
        let v4 = packet.ends[0].0.is_ipv4();
        let of_other_family = |protocol: &Value| protocol == if v4 { "ICMPv6" } else { "ICMP" };
        let has_icmp = |wanted: &Value| {
            packet.protocol == if v4 { 1 } else { 58 }
                && wanted["type"] == packet.icmp.0
                && wanted.get("code").is_none_or(|code| *code == packet.icmp.1)
        };
        let given = |name: &str| rule.get(name);
        given("protocol").is_none_or(|it| number(it) == packet.protocol && !of_other_family(it))
            && given("notProtocol").is_none_or(|it| number(it) != packet.protocol)
            && given("ipVersion").is_none_or(|version| (version == 4) == v4)
            && given("icmp").is_none_or(has_icmp)
            && !given("notICMP").is_some_and(has_icmp)
            && (0..2).all(|end| self.entity_matches(rule, end, own, packet))
    }

    fn entity_matches(&self, rule: &Value, end: usize, own: Option<&str>, packet: &Packet) -> bool {
        let entity = &rule[["source", "destination"][end]];
        let ((address, pod), port) = (packet.ends[end], packet.ports[end]);
        if entity.get("services").is_some() {
            let is_backend = |backend: &&(IpAddr, u8, u16)| {
                backend.0 == address && (end == 0 || (backend.1, backend.2) == (packet.protocol, port))
            };
            return self.backends.iter().filter(is_backend).count() > 0;
        }
        let within = |nets: &Value| {
            list(nets).iter().any(|net| text(net).parse::<ipnet::IpNet>().expect("net").contains(&address))
        };
        let foreign = |nets: &Value| {
            !list(nets).is_empty() && list(nets).iter().all(|net| text(net).contains(':') == address.is_ipv4())
        };
        if [&entity["nets"], &entity["notNets"]].into_iter().any(foreign) {
            return false;
        }
        if !list(&entity["nets"]).is_empty() && !within(&entity["nets"]) || within(&entity["notNets"]) {
            return false;
        }
        // A name without a protocol in the rule is that of a TCP port.
        let named_of_protocol = rule.get("protocol").is_some() || packet.protocol == 6;
        let port_in = |ports: &Value| {
            list(ports).iter().any(|wanted| match wanted.as_str() {
                Some("80:81") => (80..=81).contains(&port),
                Some(name) => pod.is_some_and(|pod| {
                    let named = (name.to_owned(), packet.protocol, port);
                    named_of_protocol && self.things[pod].ports.contains(&named)
                }),
                None => *wanted == port,
            })
        };
        if !list(&entity["ports"]).is_empty() && !port_in(&entity["ports"]) || port_in(&entity["notPorts"]) {
            return false;
        }
        let here: Vec<&Thing> =
            self.things.iter().filter(|thing| thing.addresses.iter().any(|net| net.contains(&address))).collect();
        let given = |name: &str| entity.get(name);
        let (namespaces, accounts) = (given("namespaceSelector"), given("serviceAccounts"));
        let looks = given("selector").is_some() || given("notSelector").is_some() || accounts.is_some();
        let limited = own.filter(|_| namespaces.is_none() && looks);
        let positive = given("selector").is_some() || namespaces.is_some() || accounts.is_some() || limited.is_some();
        let selected = |thing: &&&Thing| {
            given("selector").is_none_or(|selector| holds(selector, &thing.labels))
                && namespaces.is_none_or(|selector| self.of_namespace(thing, selector))
                && limited.is_none_or(|own| thing.namespace.as_deref() == Some(own))
                && accounts.is_none_or(|accounts| {
                    let names = list(&accounts["names"]);
                    (names.is_empty()
                        || thing.account.as_ref().is_some_and(|account| names.iter().any(|name| name == account)))
                        && accounts.get("selector").is_none_or(|selector| self.of_account(thing, selector))
                })
        };
        let unwanted = |selector: &Value| here.iter().any(|thing| holds(selector, &thing.labels));
        (!positive || here.iter().filter(selected).count() > 0) && !given("notSelector").is_some_and(unwanted)
    }

    fn direction(&self, packet: &Packet, ingress: bool) -> bool {
        let Some(pod) = packet.ends[usize::from(ingress)].1 else { return true };
        let pod = &self.things[pod];
        let section = if ingress { "ingress" } else { "egress" };
        let applies = |policy: &&Value| {
            let (spec, namespace) = (&policy["spec"], policy["metadata"]["namespace"].as_str());
            let rules = |name: &str| !list(&spec[name]).is_empty();
            let of_direction = match list(&spec["types"]) {
                [] => {
                    if ingress {
                        rules("ingress") || !rules("egress")
                    } else {
                        rules("egress")
                    }
                }
                types => types.iter().any(|name| text(name).to_lowercase() == section),
            };
            of_direction
                && namespace.is_none_or(|namespace| pod.namespace.as_deref() == Some(namespace))
                && spec.get("selector").is_none_or(|selector| holds(selector, &pod.labels))
                && spec.get("namespaceSelector").is_none_or(|selector| self.of_namespace(pod, selector))
                && spec.get("serviceAccountSelector").is_none_or(|selector| self.of_account(pod, selector))
        };
        let mut by_tier: BTreeMap<(bool, u64, String), Vec<&Value>> = BTreeMap::new();
        for policy in self.policies.iter().filter(applies) {
            let name = policy["spec"]["tier"].as_str().unwrap_or("default");
            let object = self.tiers.iter().find(|tier| tier["metadata"]["name"] == name);
            let order = match (object, name) {
                (Some(tier), _) => tier["spec"]["order"].as_u64().unwrap_or(u64::MAX),
                (None, "default") => 1_000_000,
                (None, _) => u64::MAX,
            };
            by_tier.entry((object.is_none() && name != "default", order, name.to_owned())).or_default().push(policy);
        }
        'tiers: for ((.., name), mut policies) in by_tier {
            policies.sort_by_key(|policy| {
                let namespace = policy["metadata"]["namespace"].as_str().unwrap_or_default();
                let tie = format!("{}/{namespace}/{}", text(&policy["metadata"]["name"]), text(&policy["kind"]));
                (policy["spec"]["order"].as_u64().unwrap_or(u64::MAX), tie)
            });
            for policy in policies {
                let own = policy["metadata"]["namespace"].as_str();
                for rule in list(&policy["spec"][section]) {
                    if !self.rule_matches(rule, own, packet) {
                        continue;
                    }
                    self.occurs(format!("action {}", text(&rule["action"])));
                    for (field, value) in rule.as_object().into_iter().flatten() {
                        let entity = matches!(field.as_str(), "source" | "destination");
                        let inner = value.as_object().filter(|_| entity).into_iter().flatten();
                        inner.for_each(|(name, _)| self.occurs(format!("{field}.{name}")));
                        if !entity && field != "action" {
                            self.occurs(field.clone());
                        }
                    }
                    match text(&rule["action"]) {
                        "Allow" => return true,
                        "Deny" => return false,
                        "Pass" => continue 'tiers,
                        _ => {}
                    }
                }
            }
            let tier = self.tiers.iter().find(|tier| tier["metadata"]["name"] == name.as_str());
            if tier.is_none_or(|tier| tier["spec"]["defaultAction"] == "Deny") {
                self.occurs("end of tier Deny");
                return false;
            }
            self.occurs("end of tier Pass");
        }
        self.occurs("profile");
        true
    }
}

fn round(seed: u64, denied: &mut usize, total: &mut usize, occurred: &mut BTreeMap<String, usize>) {
    let mut random = Random(seed);
    let world = world(&mut random);
    let (mut lines, mut expected) = (Vec::new(), Vec::new());
    for _ in 0..QUERIES {
        let v6 = random.once_in(3);
        let end = |random: &mut Random| match random.below(9) {
            at @ 0..7 => (world.things[at].addresses[usize::from(v6)].addr(), Some(at)),
            7 if v6 => ("2001:db8::9".parse().expect("address"), None),
            7 => ("203.0.113.9".parse().expect("address"), None),
            _ if v6 => ("fd00:9::9".parse().expect("address"), None),
            _ => ("198.51.100.9".parse().expect("address"), None),
        };
        let ends = [end(&mut random), end(&mut random)];
        let icmp = if v6 { (58, "ICMPv6") } else { (1, "ICMP") };
        let (protocol, name) = random.pick(&[(6, "TCP"), (6, "TCP"), (17, "UDP"), (132, "SCTP"), icmp]);
        let has_ports = !matches!(protocol, 1 | 58);
        let ports = [random.pick(&PORTS), random.pick(&PORTS)].map(|port| if has_ports { port } else { 0 });
        let packet = Packet { ends, protocol, ports, icmp: (random.pick(&[8, 3]), random.below(2) as u8) };
        let itself = ends[0].1.is_some() && ends[0].1 == ends[1].1;
        expected.push(itself || world.direction(&packet, false) && world.direction(&packet, true));
        let mut line = json!({"from": {"ip": ends[0].0}, "to": {"ip": ends[1].0}, "protocol": name});
        if has_ports {
            (line["sourcePort"], line["port"]) = (json!(ports[0]), json!(ports[1]));
        } else {
            line["icmp"] = json!({"type": packet.icmp.0, "code": packet.icmp.1});
        }
        lines.push(line.to_string());
    }
    let root = tempfile::tempdir().expect("temporary directory");
    let named = |kind: &str, name: &str, namespace: Option<&str>, labels: &Labels| json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace, "labels": labels}});
    let mut items: Vec<Value> =
        world.namespaces.iter().map(|(name, labels)| named("Namespace", name, None, labels)).collect();
    let accounts = world.accounts.iter();
    items.extend(accounts.map(|((namespace, name), labels)| named("ServiceAccount", name, Some(namespace), labels)));
    items.extend(world.things.iter().map(|thing| thing.object.clone()));
    items.extend(world.tiers.iter().chain(&world.policies).cloned());
    items.push(
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "front", "namespace": "a"}, "spec": {}}),
    );
    for (at, (address, protocol, port)) in world.backends.iter().enumerate() {
        let protocol = NAMED.iter().find(|(_, number)| number == protocol);
        let ports = protocol.map_or(json!([]), |(protocol, _)| json!([{"port": port, "protocol": protocol}]));
        items.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("front-{at}"), "namespace": "a", "labels": {"kubernetes.io/service-name": "front"}},
            "endpoints": [{"addresses": [address]}], "ports": ports,
        }));
    }
    let all = json!({"apiVersion": "v1", "kind": "List", "items": items});
    std::fs::write(root.path().join("all.json"), all.to_string()).expect("manifests");
    let queries = root.path().join("queries.jsonl");
    std::fs::write(&queries, lines.join("\n")).expect("queries");
    let output = Command::new(env!("CARGO_BIN_EXE_hanse"))
        .args(["policy", "explain", "-o", "json", "--cluster", &format!("k={}", root.path().display()), "--queries"])
        .arg(&queries)
        .output()
        .expect("hanse runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "seed {seed}: {stderr}\n{all:#}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let answers: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(answers.len(), expected.len(), "seed {seed}");
    for ((line, expected), answer) in lines.iter().zip(expected).zip(answers) {
        let verdict = if expected { "allow" } else { "deny" };
        assert_eq!(answer["verdict"], verdict, "seed {seed}\n{line}\n{answer}\n{all:#}");
        *total += 1;
        *denied += usize::from(!expected);
    }
    for (what, times) in world.occurred.into_inner() {
        *occurred.entry(what).or_default() += times;
    }
}

/// What a run is not worth much without.
const CLAUSES: [&str; 23] = [
    "action Allow",
    "action Deny",
    "action Pass",
    "action Log",
    "end of tier Deny",
    "end of tier Pass",
    "profile",
    "protocol",
    "notProtocol",
    "icmp",
    "notICMP",
    "ipVersion",
    "source.selector",
    "source.notSelector",
    "source.namespaceSelector",
    "source.serviceAccounts",
    "source.services",
    "source.nets",
    "source.notNets",
    "destination.selector",
    "destination.services",
    "destination.ports",
    "destination.notPorts",
];

#[test]
fn calicos_policies_mean_what_their_text_says() {
    let first = std::env::var("HANSE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0_u8) >> 16);
    println!("HANSE_SEED={first}");
    let (mut denied, mut total, mut occurred) = (0, 0, BTreeMap::new());
    for seed in first..first + ROUNDS {
        round(seed, &mut denied, &mut total, &mut occurred);
    }
    println!("{total} packets, {denied} denied; {occurred:#?}");
    assert!(denied * 10 >= total * 3 && denied * 10 <= total * 7, "{denied} of {total} are denied");
    let missing: Vec<&str> = CLAUSES.into_iter().filter(|clause| !occurred.contains_key(*clause)).collect();
    assert!(missing.is_empty(), "{missing:?} never decided");
}
