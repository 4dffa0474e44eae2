//! What remote endpoints cost a member: memory, and one edit at an origin of 100,000 endpoints.
//!
//! `remote [SHAPE…] [-o json]`. Each shape runs in a process of its own. The origin and the hub run in another one, which records
//! what the hub sends, so that the resident size of the shape's process grows by the member's side alone: the receiver, the
//! compiler with its inventory and its evaluator, and the rule set of one node. Every message is decoded as on a stream, without
//! sockets.
//!
//! All 100,000 endpoints of the origin are selected by one federated policy.
//!
//! - `memory`: the growth of the resident size after the start, by endpoint, and the duration of the start.
//! - `edit`: one endpoint gets a label set that no other has, and later its former one. Timed from the decoded message to the
//!   changes (`receive`), and to the compiled rule set of the node (`compiled`).
//! - `replace`: one endpoint gets another address, so that a set of 200,000 addresses changes too.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_api::assemble::Candidates;
use hanse_api::manifest::{Manifests, read_bytes};
use hanse_exchange::codec;
use hanse_exchange::hub::{Exchange, PublishId};
use hanse_exchange::interest::Wanted;
use hanse_exchange::member::publisher::{ChangedExports, PublishSession, Publisher};
use hanse_exchange::member::receiver::Receiver;
use hanse_exchange::message::{PublishResponse, WatchRequest};
use hanse_exchange::model::{ClusterState, FederatedManifest, Federation, GrantAll, Lease, ManifestKind, Position};
use hanse_member::own_streams::Ends;
use hanse_member::source::Changes;
use hanse_member::world::World;
use hanse_policy::inventory::{Cluster, Endpoint, EndpointId, EndpointKind, Labels, NamedPort, Namespace};
use hanse_policy::model::{ClusterName, ClusterScope};
use hanse_policy::selector::Selector;
use hanse_proto::federation::v1 as pb;
use hanse_ruleset::UnknownPods;
use prost::Message as _;

const SHAPES: &[&str] = &["memory", "edit", "replace"];
const ENDPOINTS: usize = 100_000;
/// Label sets: one for every 100 endpoints.
const APPLICATIONS: usize = 1_000;
const EDITS: usize = 1_001;

type Rows = Vec<(&'static str, f64, &'static str)>;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    match &arguments[..] {
        [child, shape] if child == "--child" => {
            for (metric, value, unit) in run(shape) {
                println!("{metric} {value} {unit}");
            }
            return;
        }
        [record, shape, file] if record == "--record" => return Recorder::new(file).record(shape),
        _ => {}
    }
    let json = arguments.windows(2).any(|pair| pair == ["-o", "json"]);
    let named: Vec<&str> = SHAPES.iter().copied().filter(|shape| arguments.iter().any(|it| it == shape)).collect();
    let program = std::env::current_exe().expect("the running program has a path");
    for shape in if named.is_empty() { SHAPES.to_vec() } else { named } {
        let output = Command::new(&program).args(["--child", shape]).output().expect("start a run");
        assert!(output.status.success(), "{shape}: {}", String::from_utf8_lossy(&output.stderr));
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let [metric, value, unit] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("not a row: {line}") };
            let value: f64 = value.parse().expect("a number");
            if json {
                println!(
                    r#"{{"bench":"remote","shape":"{shape}","metric":"{metric}","value":{value},"unit":"{unit}"}}"#
                );
            } else {
                println!("{shape:<13} {metric:<34} {value:>14.3} {unit}");
            }
        }
    }
}

// The member.

fn run(shape: &str) -> Rows {
    let mut recorded = Recorded::make(shape);
    let mut member = Member::new();
    let resident = resident_bytes();
    let began = Instant::now();
    for response in recorded.next() {
        member.take(response);
    }
    member.compile();
    let start = began.elapsed();
    let memory = (resident_bytes() - resident) / ENDPOINTS as f64;
    // With the pod of this cluster.
    assert_eq!(member.set_members(), 2 * ENDPOINTS + 1, "both addresses of every endpoint are in the set");
    if shape == "memory" {
        return vec![("memory-per-endpoint", memory, "B"), ("start", start.as_secs_f64() * 1e3, "ms")];
    }
    let [mut received, mut compiled] = [const { Vec::new() }; 2];
    for _ in 0..EDITS {
        // A batch is a beginning, a frame and an end.
        let mut time = Duration::ZERO;
        for response in recorded.next() {
            time += member.take(response);
        }
        received.push(time);
        compiled.push(time + member.compile());
    }
    let ([receive, receive_p99], [compile, compile_p99]) = (percentiles(received), percentiles(compiled));
    vec![
        ("compiled-median", compile, "us"),
        ("compiled-p99", compile_p99, "us"),
        ("receive-median", receive, "us"),
        ("receive-p99", receive_p99, "us"),
    ]
}

struct Member {
    receiver: Receiver,
    world: World,
}

impl Member {
    /// With one node, which has one pod.
    fn new() -> Self {
        let text = "apiVersion: v1\nkind: Node\nmetadata: {name: 'n'}\nspec: {podCIDR: 10.255.0.0/24}\n\
                    status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}\n---\n\
                    apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a, labels: {app: web}}\n\
                    spec: {nodeName: 'n'}\nstatus: {phase: Running, podIP: 10.255.0.2}\n";
        let mut read = Manifests::default();
        read_bytes(&"cluster.yaml".into(), text.as_bytes(), &mut read);
        assert!(read.diagnostics.is_empty(), "{:?}", read.diagnostics);
        let mut candidates = Candidates::default();
        candidates.replace_all(read.objects);
        let objects = candidates.take_changes();
        let mut world = World::new("here".into(), UnknownPods::default(), Ends::default());
        world.take_local(Changes { objects, problems: Vec::new(), revision: 1 });
        let mut receiver = Receiver::default();
        receiver.open();
        Self { receiver, world }
    }

    /// Takes one message of the hub. Returns how long that took from when it was decoded.
    fn take(&mut self, response: pb::WatchResponse) -> Duration {
        let response = codec::watch::decode_response(response).expect("the hub wrote it").expect("a known kind");
        let began = Instant::now();
        self.receiver.take(response).expect("the protocol");
        began.elapsed()
    }

    /// Hands the changes to the compiler and brings the rule set up to date. Returns how long that took.
    fn compile(&mut self) -> Duration {
        let began = Instant::now();
        self.world.receive(self.receiver.take_updates().expect("something changed"));
        let changed = self.world.compile().expect("the hub's policies are known").changed.len();
        let time = began.elapsed();
        assert!(changed <= 1, "there is one node");
        time
    }

    fn set_members(&self) -> usize {
        let node = self.world.nodes().values().next().expect("one node");
        let sets = node.rules.sets.values();
        sets.map(|set| if let hanse_ruleset::Members::Addresses(all) = &set.members { all.len() } else { 0 }).sum()
    }
}

fn percentiles(mut times: Vec<Duration>) -> [f64; 2] {
    times.sort();
    [times[times.len() / 2], times[times.len() * 99 / 100]].map(|it| it.as_secs_f64() * 1e6)
}

fn resident_bytes() -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).unwrap_or_default() * 1024.0
}

/// What the hub sent, read as it is taken: groups of messages.
struct Recorded(BufReader<File>);

impl Recorded {
    fn make(shape: &str) -> Self {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let program = std::env::current_exe().expect("the running program has a path");
        let made = Command::new(program).args(["--record", shape]).arg(file.path()).status().expect("start");
        assert!(made.success());
        Self(BufReader::new(file.reopen().expect("the file is there")))
    }

    fn number(&mut self) -> usize {
        let mut bytes = [0; 4];
        self.0.read_exact(&mut bytes).expect("as it was written");
        u32::from_le_bytes(bytes) as usize
    }

    /// The next group of messages.
    fn next(&mut self) -> impl Iterator<Item = pb::WatchResponse> {
        let count = self.number();
        (0..count).map(|_| {
            let mut bytes = vec![0; self.number()];
            self.0.read_exact(&mut bytes).expect("as it was written");
            pb::WatchResponse::decode(&bytes[..]).expect("the hub wrote it")
        })
    }
}

// The origin and the hub.

struct Recorder {
    file: BufWriter<File>,
    exchange: Exchange,
    publisher: Publisher,
    session: PublishSession,
    inventory: Cluster,
}

impl Recorder {
    fn new(file: &str) -> Self {
        let mut exchange = Exchange::new();
        exchange.set_federation(federation());
        let (mut publisher, mut session) = (Publisher::new(1), PublishSession::default());
        session.take(&mut publisher, PublishResponse::Welcome { published: None, heartbeat_ms: 1 });
        let file = BufWriter::new(File::create(file).expect("a new file"));
        Self { file, exchange, publisher, session, inventory: inventory() }
    }

    /// Writes what the hub sends: all of the beginning, then each edit.
    fn record(mut self, shape: &str) {
        let origin = self.exchange.publish_open("origin".into());
        let open = PublishSession::open(&self.publisher, &[0; 16], false);
        self.exchange.publish(origin, open).expect("the protocol");
        self.publisher.publish_all(&self.inventory);
        self.send(origin);
        let mut receiver = Receiver::default();
        let WatchRequest::Open(open) = receiver.open() else { panic!("not an opening") };
        let watch = self.exchange.watch_open("here".into(), open).expect("accepted");
        let mut write = |it: &mut Self| {
            let mut messages = Vec::new();
            loop {
                // The class of an interest is built in parts.
                let Some(response) = it.exchange.next(watch) else {
                    if it.exchange.is_building(watch) {
                        continue;
                    }
                    break;
                };
                messages.push(codec::watch::encode_response(response.clone()).encode_to_vec());
                for request in receiver.take(response).expect("the protocol") {
                    it.exchange.watch(watch, request).expect("the protocol");
                }
            }
            assert!(receiver.take_updates().is_some(), "nothing changed after {} messages", messages.len());
            it.file.write_all(&(messages.len() as u32).to_le_bytes()).expect("room");
            for message in messages {
                it.file.write_all(&(message.len() as u32).to_le_bytes()).expect("room");
                it.file.write_all(&message).expect("room");
            }
        };
        write(&mut self);
        let ids: Vec<EndpointId> = self.inventory.endpoints.keys().cloned().collect();
        for round in 0..if shape == "memory" { 0 } else { EDITS } {
            let id = &ids[round / 2 * 7_919 % ids.len()];
            let number: usize = id.name.rsplit('-').next().and_then(|it| it.parse().ok()).expect("its number");
            let mut edited = endpoint(number, &format!("app-{}", number % APPLICATIONS));
            match shape {
                _ if round % 2 == 1 => {}
                "edit" => drop(edited.labels.insert("app".into(), "moved".into())),
                _ => edited.addresses[0] = Ipv4Addr::from(0x0b00_0000 + number as u32).into(),
            }
            self.inventory.endpoints.insert(id.clone(), edited);
            let (namespaces, service_accounts, endpoints) = (&[].into(), &[].into(), &[id.clone()].into());
            self.publisher.publish(&self.inventory, ChangedExports { namespaces, service_accounts, endpoints });
            self.send(origin);
            write(&mut self);
        }
        self.file.flush().expect("room");
    }

    fn send(&mut self, origin: PublishId) {
        if self.publisher.must_store() {
            let (_, reserved) = self.publisher.store();
            self.publisher.stored(reserved);
        }
        for request in self.session.poll(&self.publisher) {
            let answers = self.exchange.publish(origin, request).expect("the protocol");
            answers.into_iter().for_each(|answer| self.session.take(&mut self.publisher, answer));
        }
        assert_eq!(self.session.refusals().total, 0, "{:?}", self.session.refusals().refusals.first());
    }
}

/// The clusters `origin` and `here`, and a policy of `here` that selects every endpoint.
fn federation() -> Federation {
    let state = ClusterState {
        labels: Labels::new(),
        grant: Arc::new(GrantAll),
        grant_token: 1,
        cidrs: Vec::new(),
        lease: Lease::Live,
        federated_allow_final: false,
        visible_to: None,
    };
    let manifest = |json: serde_json::Value, enforcers: Option<&[&str]>, interest| {
        let enforcers = enforcers.map(|names| names.iter().map(|name| ClusterName::from(*name)).collect());
        let (json, resolved, features) = (json.to_string().into(), Default::default(), Vec::new());
        Arc::new(FederatedManifest { json, enforcers, also_for: BTreeSet::new(), resolved, interest, features })
    };
    let of = |kind: &str, name: &str, spec: serde_json::Value| serde_json::json!({"apiVersion": "hanse.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec});
    let tier = of("Tier", "platform", serde_json::json!({"phase": "Guard", "order": 1}));
    let policy = of(
        "FederatedNetworkPolicy",
        "peers",
        serde_json::json!({
            "tier": "platform", "order": 1, "selector": "all()", "types": ["Ingress"],
            "ingress": [{"action": "Allow", "source": {"selector": "has(app)"}}]
        }),
    );
    let selector = Selector::parse("has(app)").expect("a selector");
    let wanted = Arc::new(Wanted::new(ClusterScope::All, &selector, [].into()));
    Federation {
        position: Position { epoch: 1, revision: 1 },
        clusters: ["origin", "here"].into_iter().map(|name| (name.into(), state.clone())).collect(),
        manifests: [
            ((ManifestKind::Tier, "platform".into()), manifest(tier, None, [].into())),
            ((ManifestKind::Policy, "peers".into()), manifest(policy, Some(&["here"]), [wanted].into())),
        ]
        .into(),
    }
}

/// Pods of one cluster: ten namespaces, 100 pods of each application.
fn inventory() -> Cluster {
    let mut it = Cluster::default();
    for number in 0..10 {
        let labels = [("stage".into(), "prod".into())].into_iter().collect();
        it.namespaces.insert(format!("namespace-{number}").into(), Namespace { labels });
    }
    for number in 0..ENDPOINTS {
        let application = number % APPLICATIONS;
        let name = format!("app-{application}-7c9f8d6b5-{number:05}");
        let namespace = Some(format!("namespace-{}", application % 10).into());
        let id = EndpointId { kind: EndpointKind::Pod, namespace, name: name.into() };
        it.endpoints.insert(id, endpoint(number, &format!("app-{application}")));
    }
    it
}

/// Four labels, an IPv4 and an IPv6 address, a named port, a node.
fn endpoint(number: usize, app: &str) -> Endpoint {
    let application = number % APPLICATIONS;
    let labels = [
        ("app", app.to_owned()),
        ("app.kubernetes.io/part-of", format!("product-{}", application % 20)),
        ("team", format!("team-{}", application % 40)),
        ("pod-template-hash", format!("7c9f8d6b5{application}")),
    ];
    let v6 = 0xfd00_u128 << 112 | number as u128;
    Endpoint {
        labels: labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect(),
        addresses: vec![Ipv4Addr::from(0x0a00_0000 + number as u32).into(), Ipv6Addr::from(v6).into()],
        ports: vec![NamedPort { name: "http".into(), protocol: 6, port: 8080 }],
        node: Some(format!("node-{}", number % 1_000).into()),
        ..Endpoint::default()
    }
}
