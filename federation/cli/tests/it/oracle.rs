//! NetworkPolicy and ClusterNetworkPolicy a second time: read straight from the API's text over the JSON of the objects, sharing nothing
//! with the conversion and the evaluator, and compared with `hanse policy explain` on random policies, pods and packets.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;

use serde_json::{Value, json};

const ROUNDS: u64 = 40;
const QUERIES: usize = 250;

/// SplitMix64: its whole state is its seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }

    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

const NAMESPACES: [&str; 3] = ["a", "b", "c"];
const KEYS: [&str; 3] = ["app", "tier", "x"];
const VALUES: [&str; 3] = ["one", "two", ""];
const PROTOCOLS: [(&str, u8); 3] = [("TCP", 6), ("UDP", 17), ("SCTP", 132)];
const NUMBERS: [u16; 4] = [53, 80, 81, 8080];
const NAMES: [&str; 3] = ["http", "dns", "none"];
/// One has what another begins with: equal priorities go by name.
const POLICY_NAMES: [&str; 5] = ["c-z", "c.0", "c0", "c", "c-0"];
/// Addresses that no pod owns, of each family.
const OUTSIDE: [[&str; 3]; 2] = [["203.0.113.9", "192.168.0.1", "192.168.0.2"], ["2001:db8::9", "fd10::1", "fd10::2"]];
const NETS: [(&str, &str); 6] = [
    ("10.0.0.0/24", "10.0.0.4/30"),
    ("10.0.0.0/29", "10.0.0.2/32"),
    ("0.0.0.0/0", "10.0.0.0/25"),
    ("203.0.113.7/24", "203.0.113.0/25"),
    ("fd00::/64", "fd00::4/126"),
    ("::/0", "2001:db8::/32"),
];

fn labels(random: &mut Random) -> Value {
    let mut labels = serde_json::Map::new();
    for key in KEYS {
        if random.once_in(2) {
            labels.insert(key.to_owned(), json!(random.pick(&VALUES)));
        }
    }
    Value::Object(labels)
}

fn selector(random: &mut Random) -> Value {
    let mut selector = json!({});
    if random.once_in(2) {
        selector["matchLabels"] = json!({random.pick(&KEYS): random.pick(&VALUES)});
    }
    if random.once_in(3) {
        let operator = random.pick(&["In", "NotIn", "Exists", "DoesNotExist"]);
        let mut requirement = json!({"key": random.pick(&KEYS), "operator": operator});
        if matches!(operator, "In" | "NotIn") {
            requirement["values"] = json!([random.pick(&VALUES), random.pick(&VALUES)]);
        }
        selector["matchExpressions"] = json!([requirement]);
    }
    selector
}

fn peer(random: &mut Random) -> Value {
    if random.once_in(4) {
        let (cidr, except) = random.pick(&NETS);
        let except: Vec<&str> = if random.once_in(2) { vec![except] } else { Vec::new() };
        return json!({"ipBlock": {"cidr": cidr, "except": except}});
    }
    match random.below(3) {
        0 => json!({"podSelector": selector(random)}),
        1 => json!({"namespaceSelector": selector(random)}),
        _ => json!({"podSelector": selector(random), "namespaceSelector": selector(random)}),
    }
}

fn port(random: &mut Random) -> Value {
    let mut port = json!({});
    if random.once_in(2) {
        port["protocol"] = json!(random.pick(&PROTOCOLS).0);
    }
    match random.below(4) {
        0 => {}
        1 => port["port"] = json!(random.pick(&NAMES)),
        2 => {
            port["port"] = json!(80);
            port["endPort"] = json!(random.pick(&[80, 81, 9000]));
        }
        _ => port["port"] = json!(random.pick(&NUMBERS)),
    }
    port
}

fn rules(random: &mut Random, peers: &str) -> Value {
    let some = |random: &mut Random, make: fn(&mut Random) -> Value| -> Value {
        (0..random.below(3)).map(|_| make(random)).collect()
    };
    let rule = |random: &mut Random| {
        let mut rule = json!({});
        if !random.once_in(4) {
            rule[peers] = some(random, peer);
        }
        if !random.once_in(3) {
            rule["ports"] = some(random, port);
        }
        rule
    };
    (0..random.below(3)).map(|_| rule(random)).collect()
}

fn policy(random: &mut Random, at: usize) -> Value {
    let mut spec = json!({"podSelector": if random.once_in(2) { json!({}) } else { selector(random) }});
    if !random.once_in(3) {
        spec["ingress"] = rules(random, "from");
    }
    if !random.once_in(3) {
        spec["egress"] = rules(random, "to");
    }
    match random.below(5) {
        0 => spec["policyTypes"] = json!(["Ingress"]),
        1 => spec["policyTypes"] = json!(["Egress"]),
        2 => spec["policyTypes"] = json!(["Egress", "Ingress"]),
        _ => {}
    }
    let metadata = json!({"name": format!("p{at}"), "namespace": random.pick(&NAMESPACES)});
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec})
}

fn cluster_policy(random: &mut Random, at: usize) -> Value {
    let pods = |random: &mut Random| {
        let mut pods = json!({"podSelector": selector(random)});
        if random.once_in(2) {
            pods["namespaceSelector"] = selector(random);
        }
        json!({"pods": pods})
    };
    let workloads = |random: &mut Random| match random.once_in(2) {
        true => json!({"namespaces": selector(random)}),
        false => pods(random),
    };
    let protocol = |random: &mut Random| {
        let name = random.pick(&["tcp", "udp", "sctp"]);
        match random.below(10) {
            0 => random.pick(&[
                json!({"icmp": {}}),
                json!({name: {"flags": 2}}),
                json!({name: {"destinationPort": {"set": [80]}}}),
            ]),
            1..4 => json!({name: {"destinationPort": {"number": random.pick(&NUMBERS)}}}),
            4..7 => json!({name: {"destinationPort": {"range": {"start": 60, "end": random.pick(&[80, 81])}}}}),
            _ => json!({"destinationNamedPort": random.pick(&NAMES)}),
        }
    };
    let rules = |random: &mut Random, peers: &str| -> Value {
        let rule = |random: &mut Random| {
            let peer = |random: &mut Random| match (peers == "to", random.below(12)) {
                (true, 0..4) => json!({"networks": [random.pick(&NETS).0, random.pick(&NETS[1..]).1]}),
                (true, 4..6) => json!({"nodes": selector(random)}),
                (_, 6) => random.pick(&[json!({"vms": {"a": "b"}}), json!({"pods": {"podSelector": {}, "more": 1}})]),
                _ => workloads(random),
            };
            let list: Vec<Value> = (0..1 + random.below(2)).map(|_| peer(random)).collect();
            let has_networks = list.iter().any(|peer| peer.get("networks").or(peer.get("nodes")).is_some());
            let mut rule = json!({"action": random.pick(&["Accept", "Deny", "Pass"]), peers: list});
            if random.once_in(2) {
                let entries = (0..1 + random.below(2)).map(|_| protocol(random));
                let named = |entry: &Value| entry.get("destinationNamedPort").is_some();
                // Networks have no named ports: the API refuses both in one rule.
                let entries: Vec<Value> = entries.filter(|entry| !(has_networks && named(entry))).collect();
                if !entries.is_empty() {
                    rule["protocols"] = json!(entries);
                }
            }
            rule
        };
        (0..random.below(3)).map(|_| rule(random)).collect()
    };
    let (ingress, egress) = (rules(random, "from"), rules(random, "to"));
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": POLICY_NAMES[at]},
        "spec": {
            "tier": random.pick(&["Admin", "Baseline"]), "priority": random.below(3),
            "subject": workloads(random), "ingress": ingress, "egress": egress,
        },
    })
}

fn pod(random: &mut Random, at: usize) -> Value {
    let container = |random: &mut Random| {
        let ports = (0..random.below(3)).map(|_| {
            let mut port = json!({"name": random.pick(&NAMES[..2]), "containerPort": random.pick(&NUMBERS)});
            if random.once_in(2) {
                port["protocol"] = json!(random.pick(&PROTOCOLS).0);
            }
            port
        });
        let ports: Vec<Value> = ports.collect();
        json!({"name": "c", "ports": ports})
    };
    let host = random.once_in(10);
    let mut first = container(random);
    if random.once_in(2) {
        first["restartPolicy"] = json!("Always");
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("pod{at}"), "namespace": random.pick(&NAMESPACES), "labels": labels(random)},
        "spec": {"hostNetwork": host, "containers": [container(random), container(random)], "initContainers": [first]},
        "status": {
            "phase": if random.once_in(12) { "Succeeded" } else { "Running" },
            "podIP": format!("10.0.0.{at}"),
            "podIPs": [{"ip": format!("10.0.0.{at}")}, {"ip": format!("fd00::{at}")}],
        },
    })
}

fn node(random: &mut Random, at: usize) -> Value {
    let addresses = [
        json!({"type": "InternalIP", "address": OUTSIDE[0][at]}),
        json!({"type": "InternalIP", "address": OUTSIDE[1][at]}),
    ];
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("n{at}"), "labels": labels(random)},
        "status": {"addresses": addresses},
    })
}

/// Unknown fields.
const STRANGE: [&str; 5] = ["vms", "icmp", "more", "flags", "set"];

/// Whether a peer or a protocol has an unknown field.
fn is_strange(value: &Value) -> bool {
    let strange = |(name, value): (&String, &Value)| STRANGE.contains(&name.as_str()) || is_strange(value);
    value.as_object().is_some_and(|fields| fields.iter().any(strange))
}

struct World {
    nodes: Vec<Value>,
    namespaces: BTreeMap<String, Value>,
    pods: Vec<Value>,
    policies: Vec<Value>,
    cluster_policies: Vec<Value>,
}

struct Packet<'w> {
    source: (IpAddr, Option<&'w Value>),
    destination: (IpAddr, Option<&'w Value>),
    protocol: u8,
    port: u16,
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

impl World {
    fn selects(&self, selector: &Value, labels: &Value) -> bool {
        let has = |key: &str, value: &str| labels.get(key).is_some_and(|have| have == value);
        let pairs = selector["matchLabels"].as_object().into_iter().flatten();
        pairs.into_iter().all(|(key, value)| has(key, text(value)))
            && list(&selector["matchExpressions"]).iter().all(|requirement| {
                let key = text(&requirement["key"]);
                let one_of = list(&requirement["values"]).iter().any(|value| has(key, text(value)));
                match text(&requirement["operator"]) {
                    "In" => one_of,
                    "NotIn" => !one_of,
                    "Exists" => labels.get(key).is_some(),
                    _ => labels.get(key).is_none(),
                }
            })
    }

    fn peer_matches(&self, peer: &Value, namespace: &str, address: IpAddr, pod: Option<&Value>) -> bool {
        let within = |cidr: &Value| text(cidr).parse::<ipnet::IpNet>().expect("CIDR").contains(&address);
        if let Some(block) = peer.get("ipBlock") {
            return within(&block["cidr"]) && !list(&block["except"]).iter().any(within);
        }
        let Some(pod) = pod else { return false };
        let of_pod = text(&pod["metadata"]["namespace"]);
        let in_namespace = match peer.get("namespaceSelector") {
            Some(selector) => self.selects(selector, &self.namespaces[of_pod]),
            None => of_pod == namespace,
        };
        in_namespace && peer.get("podSelector").is_none_or(|it| self.selects(it, &pod["metadata"]["labels"]))
    }

    fn port_matches(&self, entry: &Value, packet: &Packet<'_>) -> bool {
        let number = |name: &Value| PROTOCOLS.iter().find(|(known, _)| name == known).map_or(6, |(_, number)| *number);
        if number(&entry["protocol"]) != packet.protocol {
            return false;
        }
        match &entry["port"] {
            Value::Null => true,
            Value::String(name) => packet.destination.1.is_some_and(|pod| {
                let containers = list(&pod["spec"]["containers"]).iter().chain(list(&pod["spec"]["initContainers"]));
                containers.flat_map(|container| list(&container["ports"])).any(|port| {
                    port["name"] == **name
                        && port["containerPort"] == packet.port
                        && number(&port["protocol"]) == packet.protocol
                })
            }),
            first => {
                let first = first.as_u64().expect("port");
                let last = entry["endPort"].as_u64().unwrap_or(first);
                (first..=last).contains(&u64::from(packet.port))
            }
        }
    }

    /// `None` where no rule of the tier ends it.
    fn tier(&self, packet: &Packet<'_>, ingress: bool, tier: &str) -> Option<bool> {
        let (pod, other) =
            if ingress { (packet.destination.1?, packet.source) } else { (packet.source.1?, packet.destination) };
        let (rules, peers) = if ingress { ("ingress", "from") } else { ("egress", "to") };
        let mut policies: Vec<&Value> =
            self.cluster_policies.iter().filter(|policy| policy["spec"]["tier"] == tier).collect();
        policies.sort_by_key(|it| (it["spec"]["priority"].as_u64(), text(&it["metadata"]["name"]).to_owned()));
        for policy in policies.into_iter().map(|policy| &policy["spec"]) {
            if !self.workload_matches(&policy["subject"], Some(pod)) {
                continue;
            }
            for rule in list(&policy[rules]) {
                let of_peer = |peer: &Value| match (peer.get("networks"), peer.get("nodes")) {
                    (Some(nets), _) => {
                        list(nets).iter().any(|net| text(net).parse::<ipnet::IpNet>().expect("CIDR").contains(&other.0))
                    }
                    (_, Some(selector)) => self.nodes.iter().any(|node| {
                        self.selects(selector, &node["metadata"]["labels"])
                            && list(&node["status"]["addresses"])
                                .iter()
                                .any(|it| text(&it["address"]) == other.0.to_string())
                    }),
                    _ => self.workload_matches(peer, other.1),
                };
                let of_protocol = |entry: &Value| self.protocol_matches(entry, packet);
                let strange_peer = list(&rule[peers]).iter().any(is_strange);
                let strange_protocol = list(&rule["protocols"]).iter().any(is_strange);
                let peers_match = list(&rule[peers]).iter().any(of_peer);
                let matched =
                    peers_match && rule.get("protocols").is_none_or(|entries| list(entries).iter().any(of_protocol));
                // What is not understood fails closed.
                match (strange_peer, strange_protocol, text(&rule["action"])) {
                    (true, ..) | (_, true, _) if rule["action"] == "Accept" => continue,
                    (true, ..) => return Some(false),
                    (_, true, _) if peers_match => return Some(false),
                    (_, true, _) => continue,
                    _ => {}
                }
                match (matched, text(&rule["action"])) {
                    (false, _) => {}
                    (true, "Accept") => return Some(true),
                    (true, "Deny") => return Some(false),
                    (true, _) => return None,
                }
            }
        }
        None
    }

    /// A subject or a peer: `namespaces` or `pods`.
    fn workload_matches(&self, workload: &Value, pod: Option<&Value>) -> bool {
        let Some(pod) = pod else { return false };
        let namespace = &self.namespaces[text(&pod["metadata"]["namespace"])];
        match (workload.get("namespaces"), workload.get("pods")) {
            (Some(selector), _) => self.selects(selector, namespace),
            (None, pods) => pods.is_some_and(|pods| {
                self.selects(&pods["podSelector"], &pod["metadata"]["labels"])
                    && pods.get("namespaceSelector").is_none_or(|selector| self.selects(selector, namespace))
            }),
        }
    }

    fn protocol_matches(&self, entry: &Value, packet: &Packet<'_>) -> bool {
        if let Some(name) = entry.get("destinationNamedPort") {
            // Its protocol is the container port's.
            let any =
                |(protocol, _): &(&str, u8)| self.port_matches(&json!({"port": name, "protocol": protocol}), packet);
            return PROTOCOLS.iter().any(any);
        }
        let known = |(name, number): &(&str, u8)| entry.get(name.to_lowercase()).map(|spec| (spec, *number));
        let Some((spec, number)) = PROTOCOLS.iter().find_map(known) else { return false };
        let port = &spec["destinationPort"];
        let (first, last) = match (port["number"].as_u64(), port["range"].as_object()) {
            (Some(number), _) => (number, number),
            (None, Some(range)) => (range["start"].as_u64().expect("start"), range["end"].as_u64().expect("end")),
            // Not understood.
            (None, None) => return false,
        };
        number == packet.protocol && (first..=last).contains(&u64::from(packet.port))
    }

    /// Admin, then NetworkPolicy where it isolates, then Baseline, then allow.
    fn judged(&self, packet: &Packet<'_>, ingress: bool) -> bool {
        let admin = self.tier(packet, ingress, "Admin");
        let own = admin.or_else(|| self.direction(packet, ingress));
        own.or_else(|| self.tier(packet, ingress, "Baseline")).unwrap_or(true)
    }

    /// `None` where the pod is not isolated.
    fn direction(&self, packet: &Packet<'_>, ingress: bool) -> Option<bool> {
        let (pod, other) =
            if ingress { (packet.destination.1?, packet.source) } else { (packet.source.1?, packet.destination) };
        let (kind, rules, peers) = if ingress { ("Ingress", "ingress", "from") } else { ("Egress", "egress", "to") };
        let mut isolated = None;
        for policy in &self.policies {
            let (spec, namespace) = (&policy["spec"], text(&policy["metadata"]["namespace"]));
            let applies = match spec.get("policyTypes") {
                Some(types) => list(types).iter().any(|known| known == kind),
                None => ingress || !list(&spec["egress"]).is_empty(),
            };
            let selected = pod["metadata"]["namespace"] == namespace
                && self.selects(&spec["podSelector"], &pod["metadata"]["labels"]);
            if !applies || !selected {
                continue;
            }
            let allowed = list(&spec[rules]).iter().any(|rule| {
                let (peers, ports) = (list(&rule[peers]), list(&rule["ports"]));
                (peers.is_empty() || peers.iter().any(|peer| self.peer_matches(peer, namespace, other.0, other.1)))
                    && (ports.is_empty() || ports.iter().any(|port| self.port_matches(port, packet)))
            });
            isolated = Some(isolated.unwrap_or(false) || allowed);
        }
        isolated
    }

    fn verdict(&self, packet: &Packet<'_>) -> bool {
        let itself = packet.source.1.is_some()
            && packet.source.1.map(|pod| &pod["metadata"]["name"])
                == packet.destination.1.map(|pod| &pod["metadata"]["name"]);
        itself || self.judged(packet, false) && self.judged(packet, true)
    }
}

fn round(seed: u64, denied: &mut usize, total: &mut usize) {
    let mut random = Random(seed);
    let world = World {
        nodes: (1..3).map(|at| node(&mut random, at)).collect(),
        namespaces: NAMESPACES.iter().map(|name| ((*name).to_owned(), labels(&mut random))).collect(),
        pods: (1..9).map(|at| pod(&mut random, at)).collect(),
        policies: (0..1 + random.below(9)).map(|at| policy(&mut random, at)).collect(),
        cluster_policies: (0..random.below(5)).map(|at| cluster_policy(&mut random, at)).collect(),
    };
    let end = |random: &mut Random, v6: bool| -> (IpAddr, Option<usize>) {
        let at = random.below(world.pods.len() + 2);
        let Some(pod) = world.pods.get(at) else {
            let outside = random.pick(&OUTSIDE[usize::from(v6)]);
            return (outside.parse().expect("address"), None);
        };
        let address = text(&pod["status"]["podIPs"][usize::from(v6)]["ip"]).parse().expect("address");
        let owns = pod["spec"]["hostNetwork"] == false && pod["status"]["phase"] == "Running";
        (address, owns.then_some(at))
    };
    let (mut lines, mut expected) = (Vec::new(), Vec::new());
    for _ in 0..QUERIES {
        let v6 = random.once_in(3);
        let (source, destination) = (end(&mut random, v6), end(&mut random, v6));
        let (protocol, port) = (random.pick(&PROTOCOLS), random.pick(&NUMBERS));
        let place = |random: &mut Random, (address, pod): (IpAddr, Option<usize>)| match pod {
            Some(at) if random.once_in(2) => {
                let metadata = &world.pods[at]["metadata"];
                json!({"cluster": "k", "namespace": metadata["namespace"], "pod": metadata["name"]})
            }
            _ => json!({"ip": address}),
        };
        let line = json!({
            "from": place(&mut random, source), "to": place(&mut random, destination),
            "protocol": protocol.0, "port": port, "ipVersion": if v6 { 6 } else { 4 },
        });
        let of = |(address, pod): (IpAddr, Option<usize>)| (address, pod.map(|at| &world.pods[at]));
        let packet = Packet { source: of(source), destination: of(destination), protocol: protocol.1, port };
        expected.push(world.verdict(&packet));
        lines.push(line.to_string());
    }
    let root = tempfile::tempdir().expect("temporary directory");
    let namespaces = world.namespaces.iter().map(
        |(name, labels)| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
    );
    let items: Vec<Value> = namespaces
        .chain(world.nodes.iter().chain(&world.pods).chain(&world.policies).chain(&world.cluster_policies).cloned())
        .collect();
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
    assert!(output.status.success(), "seed {seed}: {stderr}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let answers: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(answers.len(), expected.len(), "seed {seed}");
    for ((line, expected), answer) in lines.iter().zip(expected).zip(answers) {
        let verdict = if expected { "allow" } else { "deny" };
        assert_eq!(answer["verdict"], verdict, "seed {seed}\n{line}\n{answer}\n{all:#}");
        *total += 1;
        *denied += usize::from(!expected);
    }
}

#[test]
fn kubernetes_policies_mean_what_their_text_says() {
    let first = std::env::var("HANSE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0_u8) >> 16);
    println!("HANSE_SEED={first}");
    let (mut denied, mut total) = (0, 0);
    for seed in first..first + ROUNDS {
        round(seed, &mut denied, &mut total);
    }
    println!("{total} packets, {denied} denied");
    assert!(denied * 10 >= total * 3 && denied * 10 <= total * 7, "{denied} of {total} are denied");
}
