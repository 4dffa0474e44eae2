//! What the exchange costs: a whole ClusterSet's start, its memory, one change that every member is sent, and a receiver that reconnects.
//!
//! `hub [SHAPE…] [-o json]`. Each shape runs in a process of its own, so that its resident size is that of nothing else.
//! Every message is encoded and decoded as on a stream; there are no sockets and no TLS. Wall time is the best of the
//! runs, as the machine may be busy; CPU time and memory are that run's. What members of other machines publish is made by
//! a process of its own and read from a file, so that the resident size is that of the hub's side alone.
//!
//! - `everything`: 250 clusters × 1,000 endpoints, and a policy that makes every cluster be sent all of them.
//! - `tenants`: the same, and each cluster's policies select one application of 250: as many interests as clusters.
//! - `receiver`: a member that is sent everything of `everything`: applying it, and coming back.
//! - `held`: how long one call keeps all others waiting, of a snapshot of 300,000 endpoints: applied whole, and in parts.
//! - `thousand`: 1,000 clusters × 1,000 endpoints, all of them selected by every cluster; ten of the clusters watch.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read as _, Write as _};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use hanse_exchange::codec;
use hanse_exchange::hub::{Exchange, Next, PublishId, Published, ReadOpening, ReceiverId};
use hanse_exchange::member::publisher::{PublishSession, Publisher};
use hanse_exchange::member::receiver::Receiver;
use hanse_exchange::message::{PublishRequest, WatchOpen, WatchRequest, WatchResponse, WrittenScope, WrittenSelection};
use hanse_exchange::model::{
    ClusterState, FederatedManifest, Federation, GrantAll, Lease, ManifestKind, Position, Wanted,
};
use hanse_policy::inventory::{Cluster, Endpoint, EndpointId, EndpointKind, Labels, NamedPort, Namespace};
use hanse_policy::model::{ClusterName, ClusterScope};
use hanse_policy::selector::Selector;
use hanse_proto::federation::v1 as pb;
use prost::Message as _;

const SHAPES: &[&str] = &["everything", "tenants", "receiver", "thousand", "held"];
/// Processes per shape; the best one counts.
const RUNS: usize = 3;
const ENDPOINTS: usize = 1_000;
/// Applications: the label sets of a cluster. A tenant of the second shape owns one.
const APPLICATIONS: usize = 250;
/// Single changes, from which the median and the 99th percentile are taken.
const CHANGES: usize = 101;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    match &arguments[..] {
        [child, shape] if child == "--child" => return run(shape),
        [record, clusters, file] if record == "--record" => return record_publishers(clusters, file),
        _ => {}
    }
    let json = arguments.windows(2).any(|pair| pair == ["-o", "json"]);
    let named: Vec<&str> = SHAPES.iter().copied().filter(|shape| arguments.iter().any(|it| it == shape)).collect();
    let program = std::env::current_exe().expect("the running program has a path");
    for shape in if named.is_empty() { SHAPES.to_vec() } else { named } {
        let mut runs: Vec<Vec<(String, f64, String)>> = (0..RUNS)
            .map(|_| {
                let output = Command::new(&program).args(["--child", shape]).output().expect("start a run");
                assert!(output.status.success(), "{shape}: {}", String::from_utf8_lossy(&output.stderr));
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                text.lines().filter_map(parse).collect()
            })
            .collect();
        runs.sort_by(|a, b| a[0].1.total_cmp(&b[0].1));
        for (metric, value, unit) in &runs[0] {
            if json {
                println!(r#"{{"bench":"hub","shape":"{shape}","metric":"{metric}","value":{value},"unit":"{unit}"}}"#);
            } else {
                println!("{shape:<13} {metric:<34} {value:>14.3} {unit}");
            }
        }
    }
}

fn parse(line: &str) -> Option<(String, f64, String)> {
    let mut parts = line.split(' ');
    Some((parts.next()?.into(), parts.next()?.parse().ok()?, parts.next()?.into()))
}

fn run(shape: &str) {
    match shape {
        "everything" => hub(250, 250, |_| Selector::parse("has(app)").expect("a selector")),
        "tenants" => hub(250, 250, |cluster| Selector::parse(&format!("app == 'app-{cluster}'")).expect("a selector")),
        "thousand" => hub(1_000, 10, |_| Selector::parse("has(app)").expect("a selector")),
        "held" => held(300_000),
        _ => receiver(250),
    }
}

fn name(cluster: usize) -> ClusterName {
    format!("cluster-{cluster}").into()
}

/// Live clusters, and a policy for each selector, enforced by those that it is given for.
fn federation(clusters: usize, selector: impl Fn(usize) -> Selector) -> Federation {
    let state = ClusterState {
        labels: Labels::new(),
        grant: Arc::new(GrantAll),
        grant_token: 1,
        cidrs: Vec::new(),
        lease: Lease::Live,
        federated_allow_final: false,
        visible_to: None,
    };
    let mut federation = Federation { position: Position { epoch: 1, revision: 1 }, ..Federation::default() };
    federation.clusters = (0..clusters).map(|cluster| (name(cluster), state.clone())).collect();
    for cluster in 0..clusters {
        let selector = selector(cluster);
        let policy: Arc<str> = selector.canonical.to_string().into();
        let wanted = Wanted::new(ClusterScope::All, &selector, [].into());
        let manifest = federation.manifests.entry((ManifestKind::Policy, policy)).or_insert_with(|| {
            Arc::new(FederatedManifest {
                json: Bytes::from_static(b"{}"),
                enforcers: Some([].into()),
                also_for: [].into(),
                resolved: [].into(),
                interest: [Arc::new(wanted)].into(),
                features: Vec::new(),
            })
        });
        let manifest = Arc::make_mut(manifest);
        manifest.enforcers.get_or_insert_default().insert(name(cluster));
    }
    federation
}

/// A cluster's pods: ten namespaces, four pods of each application, two addresses each, a named port.
fn inventory(cluster: usize) -> Cluster {
    inventory_of(cluster, ENDPOINTS)
}

fn inventory_of(cluster: usize, endpoints: usize) -> Cluster {
    let mut it = Cluster::default();
    for number in 0..10 {
        let labels = [("stage".into(), "prod".into())].into_iter().collect();
        it.namespaces.insert(format!("namespace-{number}").into(), Namespace { labels });
    }
    for number in 0..endpoints {
        let application = number % APPLICATIONS;
        let namespace = format!("namespace-{}", application % 10);
        let id = EndpointId {
            kind: EndpointKind::Pod,
            namespace: Some(namespace.into()),
            name: format!("app-{application}-7c9f8d6b5-{number:05}").into(),
        };
        let labels = [
            ("app", format!("app-{application}")),
            ("app.kubernetes.io/part-of", format!("product-{}", application % 20)),
            ("team", format!("team-{}", application % 40)),
            ("pod-template-hash", format!("7c9f8d6b5{application}")),
        ];
        let place = (cluster * ENDPOINTS + number) as u32;
        let v6 = 0xfd00_u128 << 112 | u128::from(place);
        let endpoint = Endpoint {
            labels: labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect(),
            addresses: vec![std::net::Ipv4Addr::from(0x0a00_0000 + place).into(), std::net::Ipv6Addr::from(v6).into()],
            ports: vec![NamedPort { name: "http".into(), protocol: 6, port: 8080 }],
            node: Some(format!("node-{}", number % 50).into()),
            ..Endpoint::default()
        };
        it.endpoints.insert(id, endpoint);
    }
    it
}

fn encoded(request: PublishRequest) -> Vec<u8> {
    codec::publish::encode_request(request).encode_to_vec()
}

fn decoded(bytes: &[u8]) -> PublishRequest {
    let request = pb::PublishRequest::decode(bytes).expect("what was encoded");
    codec::publish::decode_request(request).expect("what was encoded")
}

/// A member's publishing stream.
struct Publishing {
    publisher: Publisher,
    session: PublishSession,
    id: PublishId,
}

impl Publishing {
    fn open(exchange: &mut Exchange, cluster: usize) -> Self {
        let mut it = Self {
            publisher: Publisher::new(1),
            session: PublishSession::default(),
            id: exchange.publish_open(name(cluster)),
        };
        let open = encoded(PublishSession::open(&it.publisher, &[0; 16], false));
        it.send(exchange, vec![open]);
        it
    }

    fn poll(&mut self, inventory: &Cluster) -> Vec<Vec<u8>> {
        self.publisher.publish_all(inventory);
        if self.publisher.must_store() {
            // As if it were on disk.
            let (_, reserved) = self.publisher.store();
            self.publisher.stored(reserved);
        }
        self.session.poll(&self.publisher).into_iter().map(encoded).collect()
    }

    fn send(&mut self, exchange: &mut Exchange, requests: Vec<Vec<u8>>) {
        for bytes in requests {
            let request = decoded(&bytes);
            for answer in exchange.publish(self.id, request).expect("the protocol") {
                self.session.take(&mut self.publisher, answer);
            }
        }
    }
}

/// Writes what each cluster's member publishes at its start: per cluster a count, then each request with its length.
fn record_publishers(clusters: &str, file: &str) {
    let clusters: usize = clusters.parse().expect("a number");
    let mut file = BufWriter::new(File::create(file).expect("a new file"));
    for cluster in 0..clusters {
        // A hub that holds nothing gives the answers that the real one will.
        let mut exchange = Exchange::new();
        exchange.set_federation(federation(1, |_| Selector::all()));
        let open = encoded(PublishSession::open(&Publisher::new(1), &[0; 16], false));
        let mut publishing = Publishing::open(&mut exchange, 0);
        let requests = [vec![open], publishing.poll(&inventory(cluster))].concat();
        file.write_all(&(requests.len() as u32).to_le_bytes()).expect("room");
        for request in requests {
            file.write_all(&(request.len() as u32).to_le_bytes()).expect("room");
            file.write_all(&request).expect("room");
        }
    }
    file.flush().expect("room");
}

/// What [`record_publishers`] wrote, one cluster after the other.
struct Recorded(BufReader<File>);

impl Recorded {
    fn make(clusters: usize) -> Self {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let program = std::env::current_exe().expect("the running program has a path");
        let mut record = Command::new(program);
        let made = record.arg("--record").arg(clusters.to_string()).arg(file.path()).status().expect("start");
        assert!(made.success());
        Self(BufReader::new(file.into_file()))
    }

    fn number(&mut self) -> usize {
        let mut bytes = [0; 4];
        self.0.read_exact(&mut bytes).expect("as it was written");
        u32::from_le_bytes(bytes) as usize
    }

    fn next(&mut self) -> Vec<Vec<u8>> {
        let count = self.number();
        let one = |it: &mut Self| {
            let mut request = vec![0; it.number()];
            it.0.read_exact(&mut request).expect("as it was written");
            request
        };
        (0..count).map(|_| one(self)).collect()
    }
}

/// Opens a receiver's stream.
fn watch(exchange: &mut Exchange, cluster: usize, receiver: &mut Receiver) -> ReceiverId {
    let WatchRequest::Open(open) = receiver.open() else { panic!("not an opening") };
    exchange.watch_open(name(cluster), open).expect("accepted")
}

/// The next message for a receiver, once the class of its interest is built.
fn next(exchange: &mut Exchange, id: ReceiverId) -> Option<WatchResponse> {
    loop {
        let message = exchange.next(id);
        if message.is_some() || !exchange.is_building(id) {
            return message;
        }
    }
}

/// Encodes what a receiver is to be sent; how many bytes.
fn drain(exchange: &mut Exchange, id: ReceiverId, buffer: &mut Vec<u8>) -> usize {
    let mut bytes = 0;
    while let Some(response) = next(exchange, id) {
        buffer.clear();
        codec::watch::encode_response(response).encode(buffer).expect("a growing buffer");
        bytes += buffer.len();
    }
    bytes
}

/// The longest of the calls that a snapshot takes: of one to the exchange, while the others wait.
fn held(endpoints: usize) {
    for (way, slice) in [("whole", usize::MAX), ("parts", 1_000)] {
        let mut exchange = Exchange::new();
        exchange.set_slice(slice);
        exchange.set_federation(federation(2, |_| Selector::parse("has(app)").expect("a selector")));
        let watcher = watch(&mut exchange, 1, &mut Receiver::default());
        let mut buffer = Vec::new();
        drain(&mut exchange, watcher, &mut buffer);
        let mut publishing = Publishing::open(&mut exchange, 0);
        let requests = publishing.poll(&inventory_of(0, endpoints));
        let [mut longest, mut whole] = [0.0_f64; 2];
        let mut time = |began: Instant| {
            let took = began.elapsed().as_secs_f64() * 1e3;
            longest = longest.max(took);
            whole += took;
        };
        for bytes in requests {
            let request = decoded(&bytes);
            let began = Instant::now();
            let mut published = exchange.publish_part(publishing.id, request).expect("the protocol");
            time(began);
            while let Published::More = published {
                let began = Instant::now();
                published = exchange.publish_more(publishing.id).expect("the protocol");
                time(began);
            }
        }
        println!("{way}-longest-call {longest} ms");
        println!("{way}-all-calls {whole} ms");
        let mut longest = 0.0_f64;
        loop {
            let began = Instant::now();
            let more = exchange.next(watcher);
            longest = longest.max(began.elapsed().as_secs_f64() * 1e3);
            if more.is_none() {
                break;
            }
        }
        println!("{way}-longest-send {longest} ms");
        // Everything is judged again under another grant.
        let mut regranted = federation(2, |_| Selector::parse("has(app)").expect("a selector"));
        regranted.position.revision += 1;
        regranted.clusters.values_mut().for_each(|state| state.grant_token += 1);
        let mut longest = 0.0_f64;
        let began = Instant::now();
        exchange.set_federation_part(regranted);
        longest = longest.max(began.elapsed().as_secs_f64() * 1e3);
        loop {
            let began = Instant::now();
            let more = exchange.regrant_more();
            longest = longest.max(began.elapsed().as_secs_f64() * 1e3);
            if !more {
                break;
            }
        }
        println!("{way}-longest-regrant {longest} ms");
        drain(&mut exchange, watcher, &mut buffer);
        // A receiver whose interest no other has: of everything, of as many selections as a member may register, and of some that
        // are evaluated for every profile.
        let selector = |what: &str, at: usize| match what {
            "everything" => "has(team)".to_owned(),
            "negated" => format!("!has(other-{at})"),
            _ => format!("app == 'app-{at}'"),
        };
        for (what, count) in [("everything", 1), ("many-selections", 16_384), ("negated", 64)] {
            let written = |at: usize| WrittenSelection {
                clusters: WrittenScope::All,
                selector: selector(what, at),
                port_names: Vec::new(),
            };
            let own = (0..count).map(written).collect();
            let open = WatchOpen { protocol: 1, own, ..WatchOpen::default() };
            let began = Instant::now();
            let open = ReadOpening::of(open);
            println!("{way}-{what}-read-outside {} ms", began.elapsed().as_secs_f64() * 1e3);
            let began = Instant::now();
            let id = exchange.watch_opened(name(1), open).expect("accepted");
            let [mut longest, mut longest_outside] = [began.elapsed().as_secs_f64() * 1e3, 0.0];
            let whole = Instant::now();
            loop {
                let began = Instant::now();
                let next = exchange.next_step(id);
                longest = longest.max(began.elapsed().as_secs_f64() * 1e3);
                match next {
                    Next::Message(_) | Next::Nothing => break,
                    Next::Building => {}
                    Next::Evaluate(evaluation) => {
                        let began = Instant::now();
                        let evaluated = evaluation.evaluate();
                        longest_outside = longest_outside.max(began.elapsed().as_secs_f64() * 1e3);
                        let began = Instant::now();
                        exchange.take_evaluated(&evaluated);
                        longest = longest.max(began.elapsed().as_secs_f64() * 1e3);
                    }
                }
            }
            println!("{way}-{what}-class {} ms", whole.elapsed().as_secs_f64() * 1e3);
            println!("{way}-{what}-longest-class-call {longest} ms");
            println!("{way}-{what}-longest-outside {longest_outside} ms");
            loop {
                let began = Instant::now();
                let more = exchange.regrant_more();
                longest = longest.max(began.elapsed().as_secs_f64() * 1e3);
                if more {
                    continue;
                }
                let began = Instant::now();
                let more = exchange.next(id);
                longest = longest.max(began.elapsed().as_secs_f64() * 1e3);
                if more.is_none() && !exchange.is_building(id) {
                    break;
                }
            }
            println!("{way}-{what}-longest-call {longest} ms");
            let began = Instant::now();
            exchange.watch_close(id);
            println!("{way}-{what}-close {} ms", began.elapsed().as_secs_f64() * 1e3);
        }
    }
}

/// What the hub's side costs.
fn hub(clusters: usize, watchers: usize, selector: impl Fn(usize) -> Selector) {
    let mut recorded = Recorded::make(clusters);
    let resident = resident_bytes("VmRSS:");
    let mut exchange = Exchange::new();
    exchange.set_federation(federation(clusters, selector));
    let mut clock = Clock::default();
    let mut buffer = Vec::new();
    let receivers: Vec<ReceiverId> =
        (0..watchers).map(|cluster| watch(&mut exchange, cluster, &mut Receiver::default())).collect();
    let mut sent = 0;
    for id in &receivers {
        sent += drain(&mut exchange, *id, &mut buffer);
    }
    for cluster in 0..clusters {
        let id = exchange.publish_open(name(cluster));
        let requests = recorded.next();
        clock.time(|| {
            for bytes in requests {
                exchange.publish(id, decoded(&bytes)).expect("the protocol");
            }
        });
        // As in the process, receivers are sent what is due between two publishers.
        clock.time(|| {
            for id in exchange.take_ready() {
                sent += drain(&mut exchange, id, &mut buffer);
            }
        });
    }
    println!("bootstrap {} ms", clock.wall_ms);
    println!("bootstrap-cpu {} ms", clock.cpu_ms);
    println!("sent {} MB", sent as f64 / 1e6);
    let grown = resident_bytes("VmRSS:") - resident;
    println!("memory-per-endpoint {} B", grown / (clusters * ENDPOINTS) as f64);
    println!("peak-resident {} MB", resident_bytes("VmHWM:") / 1e6);

    // The member of the first cluster, for the single changes: the hub has what it has published.
    let mut it = inventory(0);
    let mut publishing = Publishing::open(&mut exchange, 0);
    let requests = publishing.poll(&it);
    publishing.send(&mut exchange, requests);
    for id in exchange.take_ready() {
        drain(&mut exchange, id, &mut buffer);
    }
    let ids: Vec<EndpointId> = it.endpoints.keys().cloned().collect();
    let mut changes = Vec::new();
    for round in 0..CHANGES {
        let endpoint = it.endpoints.get_mut(&ids[round * 7 % ids.len()]).expect("one of its ids");
        endpoint.labels.insert("team".into(), format!("moved-{round}").into());
        let requests = publishing.poll(&it);
        let mut clock = Clock::default();
        clock.time(|| {
            publishing.send(&mut exchange, requests);
            for id in exchange.take_ready() {
                drain(&mut exchange, id, &mut buffer);
            }
        });
        changes.push(clock.wall_ms);
    }
    percentiles("change-to-all", changes);
}

/// What one member's side costs, and its coming back.
fn receiver(clusters: usize) {
    let mut exchange = Exchange::new();
    exchange.set_federation(federation(clusters, |_| Selector::parse("has(app)").expect("a selector")));
    let mut last = None;
    for cluster in 1..clusters {
        let it = inventory(cluster);
        let mut publishing = Publishing::open(&mut exchange, cluster);
        let requests = publishing.poll(&it);
        publishing.send(&mut exchange, requests);
        last = Some((publishing, it));
    }
    let mut receiver = Receiver::default();
    let mut id = watch(&mut exchange, 0, &mut receiver);
    let resident = resident_bytes("VmRSS:");
    let (mut applying, mut bytes) = (Clock::default(), 0);
    bytes += follow(&mut exchange, id, &mut receiver, &mut applying);
    drop(receiver.take_updates());
    let remote = ((clusters - 1) * ENDPOINTS) as f64;
    println!("bootstrap {} ms", applying.wall_ms);
    println!("bootstrap-cpu {} ms", applying.cpu_ms);
    println!("received {} MB", bytes as f64 / 1e6);
    println!("memory-per-endpoint {} B", (resident_bytes("VmRSS:") - resident) / remote);

    let (mut publishing, mut it) = last.expect("at least one cluster");
    let ids: Vec<EndpointId> = it.endpoints.keys().cloned().collect();
    let (mut resumed, mut resumed_bytes) = (Vec::new(), 0);
    for round in 0..CHANGES.min(21) {
        exchange.watch_close(id);
        receiver.disconnected();
        let endpoint = it.endpoints.get_mut(&ids[round * 7 % ids.len()]).expect("one of its ids");
        endpoint.labels.insert("team".into(), format!("moved-{round}").into());
        let requests = publishing.poll(&it);
        publishing.send(&mut exchange, requests);
        let mut whole = Clock::default();
        whole.time(|| {
            id = watch(&mut exchange, 0, &mut receiver);
            resumed_bytes = follow(&mut exchange, id, &mut receiver, &mut Clock::default());
        });
        assert!(receiver.take_updates().is_some(), "the change came");
        resumed.push(whole.wall_ms);
    }
    percentiles("resume", resumed);
    println!("resume-bytes {resumed_bytes} B");

    let mut stored = Clock::default();
    let text = stored.time(|| receiver.store());
    println!("store {} ms", stored.wall_ms);
    println!("stored {} MB", text.len() as f64 / 1e6);
    let mut restored = Clock::default();
    let again = restored.time(|| Receiver::restore(&text)).expect("what was stored");
    println!("restore {} ms", restored.wall_ms);
    assert_eq!(again.origins().len(), clusters - 1);
}

/// Until nothing more is said; only the receiver's side is timed.
fn follow(exchange: &mut Exchange, id: ReceiverId, receiver: &mut Receiver, clock: &mut Clock) -> usize {
    let mut bytes = 0;
    while let Some(response) = next(exchange, id) {
        let response = codec::watch::encode_response(response).encode_to_vec();
        bytes += response.len();
        let requests = clock.time(|| {
            let response = pb::WatchResponse::decode(&response[..]).expect("what was encoded");
            let response = codec::watch::decode_response(response).expect("what was encoded");
            receiver.take(response.expect("of a known kind")).expect("the protocol")
        });
        for request in requests {
            exchange.watch(id, request).expect("the protocol");
        }
    }
    bytes
}

fn percentiles(metric: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    println!("{metric}-median {} ms", times[times.len() / 2]);
    println!("{metric}-p99 {} ms", times[times.len() * 99 / 100]);
}

/// Time that was taken by what is measured.
#[derive(Default)]
struct Clock {
    wall_ms: f64,
    cpu_ms: f64,
}

impl Clock {
    fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let (cpu, wall) = (cpu_ms(), Instant::now());
        let outcome = work();
        self.wall_ms += wall.elapsed().as_secs_f64() * 1e3;
        self.cpu_ms += cpu_ms() - cpu;
        outcome
    }
}

fn cpu_ms() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or_default() / 1e6
}

fn resident_bytes(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).unwrap_or_default() * 1024.0
}
