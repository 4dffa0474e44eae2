//! Three evaluators, one verdict: the reference, the compiled rule sets and the kernel judge the same packets.
//!
//! Every pod is a network namespace behind the node of its cluster, everybody else one namespace behind the router. Packets
//! are real; each carries a number, and its verdict is whether the number arrives, now or later: a packet that policy
//! denies must not have arrived when the last one has been sent.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hanse_api::manifest::{Manifests, read_bytes};
use hanse_compiler::{Input, compile};
use hanse_e2e::enforcement::{Enforcement, assemble};
use hanse_e2e::fabric::Fabric;
use hanse_e2e::packet::{ICMP, ICMPV6, Packet, Sender, Tap, forget_connections};
use hanse_e2e::world::{Cluster, Node, Pod};
use hanse_e2e::{probe, sandbox};
use hanse_policy::evaluate::{End, Query, Step, Verdict, View, evaluate};
use hanse_policy::explain::{Owners, Question};
use hanse_policy::inventory::{EndpointKind, Inventory};
use hanse_policy::model::{ClusterName, PolicySet};
use hanse_ruleset::{Hook, NodeConfig, RuleSet, UnknownPods};
use serde_json::Value;

use crate::corpus::{Corpus, Expected, question};
use crate::worlds::{Random, query, world};

/// The router in front of every pod of a cluster.
const NODE: &str = "n1";
/// The addresses of hosts that are not pods.
const OUTSIDE: &str = "outside";
/// The files of the corpus, one for each API.
const CORPUS: [&str; 4] = ["kubernetes", "cluster", "calico", "federated"];
/// How long an allowed packet may be on its way: most take a tenth of a millisecond, the first to an address the time
/// that its neighbour needs to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pods and everybody else, connected, with a verdict for every packet.
struct Lab {
    fabric: Fabric,
    enforcement: Enforcement,
    clusters: Vec<Cluster>,
    /// By cluster and address.
    places: BTreeMap<(String, IpAddr), Place>,
    sent: u64,
    /// What must not arrive, with what to say when it does.
    denied: BTreeMap<u64, String>,
    arrived: BTreeSet<u64>,
}

/// Protocol and both ends, sorted: what connection tracking knows a connection by.
type Connection = (u8, [(IpAddr, u16); 2]);

struct Place {
    sender: Sender,
    tap: Tap,
}

impl Lab {
    /// A namespace for each set of addresses of a cluster, and one for those outside.
    fn build(pods: &[(String, Vec<IpAddr>)], outside: &BTreeSet<IpAddr>) -> Self {
        let mut clusters: BTreeMap<String, Cluster> = BTreeMap::new();
        let all = pods.iter().cloned().chain([(OUTSIDE.to_owned(), outside.iter().copied().collect())]);
        for (at, (name, addresses)) in (1..).zip(all) {
            let order = clusters.len() + 1;
            let cluster = clusters.entry(name.clone()).or_insert_with(|| {
                let node = [format!("198.18.0.{order}"), format!("2001:db8:ffff::{order}")];
                let addresses = node.map(|text| text.parse().expect("an address")).into();
                let node = Node { name: NODE.to_owned(), addresses, pod_ranges: Vec::new() };
                Cluster { name: name.clone(), directory: Path::new("").to_owned(), nodes: vec![node], pods: Vec::new() }
            });
            cluster.nodes[0].pod_ranges.extend(addresses.iter().map(|address| ipnet::IpNet::from(*address)));
            let (name, node) = (format!("p{at}"), NODE.to_owned());
            let cluster_name = cluster.name.clone();
            let pod = Pod { cluster: cluster_name, namespace: "x".into(), name, node, addresses, port: 0 };
            cluster.pods.push(pod);
        }
        let clusters: Vec<Cluster> = clusters.into_values().collect();
        let fabric = Fabric::build(&clusters).expect("the network");
        let mut places = BTreeMap::new();
        for pod in clusters.iter().flat_map(|cluster| &cluster.pods) {
            let inside = fabric.pod(pod).expect("built");
            for address in &pod.addresses {
                let place =
                    Place { sender: Sender::open(inside).expect("root"), tap: Tap::open(inside).expect("root") };
                places.insert((pod.cluster.clone(), *address), place);
            }
        }
        let (denied, arrived) = (BTreeMap::new(), BTreeSet::new());
        Self { fabric, enforcement: Enforcement::default(), clusters, places, sent: 0, denied, arrived }
    }

    /// Puts the policies in force in every cluster's kernel, and forgets what connections there were. Returns the rule sets.
    fn enforce(&mut self, policies: &PolicySet, inventory: &Inventory) -> BTreeMap<ClusterName, RuleSet> {
        // The guards of the hooks are not under test: an address that no generation names is just an address.
        let config = NodeConfig { unknown_pods: UnknownPods::Allow, ..NodeConfig::default() };
        let nodes: BTreeMap<Arc<str>, NodeConfig> = BTreeMap::from([(NODE.into(), config)]);
        let mut all = BTreeMap::new();
        for cluster in inventory.clusters.keys() {
            let mut compiled = compile(Input { cluster, policies, inventory, nodes: &nodes }).nodes;
            all.insert(cluster.clone(), compiled[NODE].clone());
            let Some(node) = self.fabric.node(cluster, NODE) else { continue };
            forget_connections(node).expect("root");
            let rules = std::mem::take(&mut compiled);
            self.enforcement.enforce(&self.fabric, cluster, rules).expect("the kernel takes the rules");
        }
        all
    }

    fn place(&self, end: &End) -> Option<(String, IpAddr)> {
        let of_pod = end.pod.as_ref().map(|(cluster, _)| (cluster.to_string(), end.address));
        let outside = (OUTSIDE.to_owned(), end.address);
        // A host-network pod has a namespace of its own here, and is not a pod of the node.
        let any = || self.places.keys().find(|(_, address)| *address == end.address).cloned();
        let found = of_pod.or_else(|| self.places.contains_key(&outside).then_some(outside)).or_else(any)?;
        self.places.contains_key(&found).then_some(found)
    }

    /// Sends the first packet of the connection, where there is a way for it. Returns its number.
    fn send(&mut self, query: &Query, used: &mut BTreeSet<Connection>) -> Option<u64> {
        let (from, to) = (self.place(&query.source)?, self.place(&query.destination)?);
        // The fabric has one way between two places, and none from a place to itself.
        let inside = |(cluster, address): &(String, IpAddr)| {
            let pods = self.clusters.iter().filter(|it| it.name == *cluster).flat_map(|it| &it.pods);
            pods.map(|pod| &pod.addresses).position(|addresses| addresses.contains(address))
        };
        if from.0 == to.0 && inside(&from) == inside(&to) {
            return None;
        }
        // Connection tracking begins a connection with these only; SCTP is left to the evaluators.
        let echo = if query.source.address.is_ipv4() { (ICMP, 8) } else { (ICMPV6, 128) };
        let begins = match query.protocol {
            ICMP | ICMPV6 => query.icmp.is_some_and(|(kind, _)| (query.protocol, kind) == echo),
            33 | 132 | 136 => false,
            _ => true,
        };
        // An answer to an earlier packet, or the same connection, is not a first packet.
        let mut ends = [(query.source.address, query.source_port), (query.destination.address, query.destination_port)];
        ends.sort();
        let is_echo = matches!(query.protocol, ICMP | ICMPV6);
        if !begins || (!is_echo && !used.insert((query.protocol, ends))) {
            return None;
        }
        self.sent += 1;
        let packet = Packet {
            source: query.source.address,
            destination: query.destination.address,
            protocol: query.protocol,
            source_port: query.source_port,
            destination_port: query.destination_port,
            icmp: query.icmp.unwrap_or_default(),
            number: self.sent,
        };
        self.places[&from].sender.send(&packet).expect("sent");
        Some(self.sent)
    }

    fn look(&mut self) {
        for place in self.places.values() {
            self.arrived.extend(place.tap.arrived().expect("the tap is open"));
        }
        if let Some((_, what)) = self.denied.iter().find(|(number, _)| self.arrived.contains(number)) {
            panic!("the kernel let through what policy denies: {what}");
        }
    }

    /// Waits for what is allowed.
    fn wait_for(&mut self, allowed: BTreeMap<u64, String>) {
        let all = probe::until(PATIENCE, || {
            self.look();
            allowed.keys().all(|number| self.arrived.contains(number))
        });
        if all.is_none() {
            let missing: Vec<&String> =
                allowed.iter().filter(|(number, _)| !self.arrived.contains(number)).map(|(_, what)| what).collect();
            panic!("the kernel dropped what policy allows, {} of {}: {}", missing.len(), allowed.len(), missing[0]);
        }
    }
}

/// What the compiled rule sets say.
fn by_rules(rules: &BTreeMap<ClusterName, RuleSet>, query: &Query) -> (Verdict, Vec<Vec<String>>) {
    let packet = hanse_ruleset::Packet {
        source: query.source.address,
        destination: query.destination.address,
        protocol: query.protocol,
        source_port: query.source_port,
        destination_port: query.destination_port,
        icmp: query.icmp,
    };
    let (mut verdict, mut traces) = (Verdict::Allow, Vec::new());
    // Each end's node judges what it knows of the packet; a pod's packet to itself never leaves it.
    if query.source.pod.is_some() && query.source == query.destination {
        return (verdict, traces);
    }
    for (cluster, _) in [&query.source, &query.destination].into_iter().filter_map(|end| end.pod.as_ref()) {
        let outcome = hanse_ruleset::evaluate(&rules[cluster], &packet, Hook::Forward);
        if outcome.verdict == hanse_ruleset::Verdict::Deny {
            verdict = Verdict::Deny;
        }
        traces.push(outcome.trace);
    }
    (verdict, traces)
}

/// How often what occurred.
#[derive(Default)]
struct Counts(BTreeMap<String, usize>);

impl Counts {
    fn add(&mut self, what: impl Into<String>) {
        *self.0.entry(what.into()).or_default() += 1;
    }

    fn of(&self, what: &str) -> usize {
        self.0.get(what).copied().unwrap_or_default()
    }
}

#[test]
fn kernel_agrees_with_the_reference_on_random_worlds() {
    const WORLDS: u64 = 150;
    const PACKETS: usize = 200;
    // The worlds of the compiler's own run, which counts their clauses.
    let first_seed = std::env::var("HANSE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_124_u64);
    sandbox::test("kernel::kernel_agrees_with_the_reference_on_random_worlds", || {
        let first = world(&mut Random(first_seed)).inventory;
        let mut pods = Vec::new();
        for (name, cluster) in &first.clusters {
            for (_, pod) in cluster.endpoints.iter().filter(|(id, _)| id.kind == EndpointKind::Pod) {
                pods.push((name.to_string(), [&*pod.addresses, &*pod.host_addresses].concat()));
            }
        }
        let outside = ["203.0.113.9", "2001:db8::9"].map(|text| text.parse().expect("an address")).into();
        let mut lab = Lab::build(&pods, &outside);
        let mut counts = Counts::default();
        println!("seed {first_seed} (HANSE_SEED sets another)");
        for seed in first_seed..first_seed + WORLDS {
            let mut random = Random(seed);
            let mut world = world(&mut random);
            for (id, pod) in world.inventory.clusters.values_mut().flat_map(|cluster| &mut cluster.endpoints) {
                pod.node = (id.kind == EndpointKind::Pod).then(|| NODE.into());
            }
            let rules = lab.enforce(&world.policies, &world.inventory);
            let (mut allowed, mut used) = (BTreeMap::new(), BTreeSet::new());
            for _ in 0..PACKETS {
                let query = query(&mut random, &world.inventory);
                let reference = evaluate(&world.policies, &world.inventory, &query, View::Enforced);
                let (compiled, trace) = by_rules(&rules, &query);
                let what = || format!("seed {seed}: {query:?}\nreference {reference:#?}\nrules {trace:#?}");
                assert_eq!(compiled, reference.verdict, "{}", what());
                counts.add(format!("{:?}", reference.verdict));
                for step in reference.egress.iter().chain(&reference.ingress).filter_map(|it| it.trace.last()) {
                    counts.add(match step {
                        Step::Rule { action, effect, .. } => format!("decided by a rule: {action:?} {effect:?}"),
                        Step::EndOfTier { action, .. } => format!("decided by the end of a tier: {action:?}"),
                        Step::Profile => "decided by the profile".into(),
                        Step::Itself => "a pod to itself".into(),
                    });
                }
                let Some(number) = lab.send(&query, &mut used) else { continue };
                counts.add(format!("kernel {:?}", reference.verdict));
                let family = if query.source.address.is_ipv4() { 4 } else { 6 };
                counts.add(format!("kernel IPv{family} protocol {}", query.protocol));
                match reference.verdict {
                    Verdict::Allow => drop(allowed.insert(number, what())),
                    Verdict::Deny => drop(lab.denied.insert(number, what())),
                }
            }
            lab.wait_for(allowed);
        }
        lab.look();
        println!("{:#?}", counts.0);
        let sent = counts.of("kernel Allow") + counts.of("kernel Deny");
        assert!(sent >= 10_000, "the kernel judged {sent} packets");
        for kind in ["", "kernel "] {
            let [allow, deny] = ["Allow", "Deny"].map(|verdict| counts.of(&format!("{kind}{verdict}")));
            assert!(allow.min(deny) * 10 >= (allow + deny) * 3, "unbalanced: {allow} allowed, {deny} denied");
        }
    });
}

#[test]
fn kernel_agrees_with_the_corpus() {
    sandbox::test("kernel::kernel_agrees_with_the_corpus", || {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../federation/cli/tests/it/corpus");
        let mut counts = Counts::default();
        for name in CORPUS {
            let corpus = Corpus::read(&directory, name);
            let (pods, outside) = inhabitants(&corpus);
            let mut lab = Lab::build(&pods, &outside);
            for case in &corpus.cases {
                let clusters: Vec<(ClusterName, Manifests)> = corpus
                    .clusters(case)
                    .into_iter()
                    .map(|(name, objects)| (name.into(), manifests(&objects)))
                    .collect();
                let (policies, mut inventory) = assemble(&clusters, &manifests(&corpus.federation(case)));
                for (id, pod) in inventory.clusters.values_mut().flat_map(|cluster| &mut cluster.endpoints) {
                    pod.node = (id.kind == EndpointKind::Pod).then(|| NODE.into());
                }
                let rules = lab.enforce(&policies, &inventory);
                let (mut allowed, mut used) = (BTreeMap::new(), BTreeSet::new());
                let owners = Owners::new(&inventory);
                for (text, expected) in case.packets(false) {
                    let wanted = match expected {
                        Expected::Allow => Verdict::Allow,
                        Expected::Deny => Verdict::Deny,
                        Expected::Error => continue,
                    };
                    let packet: Question = serde_json::from_value(question(text)).expect("a question");
                    let query = owners.packet(&packet).expect("it has an answer");
                    let (compiled, trace) = by_rules(&rules, &query);
                    let what = || format!("{name}: {}\n  {text}\nrules {trace:#?}", case.clause);
                    assert_eq!(compiled, wanted, "{}", what());
                    counts.add(format!("{name}: {wanted:?}"));
                    let Some(number) = lab.send(&query, &mut used) else {
                        counts.add(format!("{name}: by the evaluators only"));
                        continue;
                    };
                    counts.add(format!("{name}: by the kernel {wanted:?}"));
                    match wanted {
                        Verdict::Allow => drop(allowed.insert(number, what())),
                        Verdict::Deny => drop(lab.denied.insert(number, what())),
                    }
                }
                lab.wait_for(allowed);
            }
            lab.look();
        }
        println!("{:#?}", counts.0);
        for name in CORPUS {
            let judged = ["Allow", "Deny"].map(|verdict| counts.of(&format!("{name}: by the kernel {verdict}")));
            let left = counts.of(&format!("{name}: by the evaluators only"));
            assert!(judged.iter().all(|judged| *judged > 10) && judged.iter().sum::<usize>() > left * 3, "{name}");
        }
    });
}

/// Who has a namespace of their own in every case of a file, and who is outside.
fn inhabitants(corpus: &Corpus) -> (Vec<(String, Vec<IpAddr>)>, BTreeSet<IpAddr>) {
    let (mut pods, mut outside) = (Vec::new(), BTreeSet::new());
    let mut owned = BTreeSet::new();
    for (name, pod) in &corpus.pods {
        let addresses: Vec<IpAddr> = pod.ips.iter().filter_map(|ip| ip.parse().ok()).collect();
        let ended = matches!(pod.phase.as_deref(), Some("Succeeded" | "Failed"));
        if pod.host_network || ended {
            outside.extend(addresses);
        } else if addresses.iter().all(|address| !owned.contains(address)) {
            owned.extend(addresses.iter().copied());
            pods.push((crate::corpus::split(name).0.to_owned(), addresses));
        }
    }
    let ends = corpus.cases.iter().flat_map(|case| case.packets(false)).flat_map(|(text, _)| {
        let question = question(text);
        let address = |ip: &str| ip.parse::<IpAddr>().ok().map(|address| address.to_canonical());
        ["from", "to"].map(|end| question[end]["ip"].as_str().and_then(address))
    });
    outside.extend(ends.flatten());
    outside.retain(|address| !owned.contains(address) && !address.is_loopback() && !address.is_multicast());
    (pods, outside)
}

fn manifests(objects: &[Value]) -> Manifests {
    let mut read = Manifests::default();
    for object in objects {
        read_bytes(&"case".into(), object.to_string().as_bytes(), &mut read);
    }
    read
}
