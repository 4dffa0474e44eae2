//! What the API server of a large cluster costs a member.
//!
//! `kubernetes [SHAPE…] [-o json]`. A real kube-apiserver and etcd have 100,000 pods on 1,000 nodes, 5,000 services with their
//! EndpointSlices, and 10,000 NetworkPolicies in 1,000 namespaces. The member's source, inventory and compiler run in a process of
//! their own. All processes share the processors of the machine.
//!
//! - `start`: from the start of the process to the first rule sets of all nodes, with the process's time and peak memory.
//! - `change`: the label of a pod changes. From the answer of the API server to the compiled rule sets.
//! - `events`: labels of pods change as fast as the API server accepts it. The member's processor time for each event.
//! - `recorded`: 2,000 events/s from a recorded stream, by a server that only sends it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use hanse_e2e::kubernetes::{ApiServer, Etcd, Options, run};
use hanse_exchange::member::model::Updates;
use hanse_exchange::model::Position;
use hanse_kubernetes::Access;
use hanse_member::own_streams::Ends;
use hanse_member::source::Location;
use hanse_member::world::World;
use hanse_ruleset::UnknownPods;
use hanse_runtime::health::{Health, Writes};
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// That of the member.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SHAPES: &[&str] = &["start", "change", "events", "recorded"];
const PODS: usize = 100_000;
const NODES: usize = 1_000;
const NAMESPACES: usize = 1_000;
const SERVICES: usize = 5_000;
const POLICIES: usize = 10_000;
/// Requests at once.
const WRITERS: usize = 32;
const CHANGES: usize = 101;
const EVENTS: usize = 10_000;
/// The rate and the number of events of a recorded stream.
const RECORDED_PER_SECOND: usize = 2_000;
const RECORDED: usize = 20_000;
/// The label that changes.
const LABEL: &str = "bench";
const PATIENCE: Duration = Duration::from_secs(600);

type Rows = Vec<(&'static str, f64, &'static str)>;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    if let [child, kubeconfig, data] = &arguments[..]
        && child == "--member"
    {
        return member(Path::new(kubeconfig), Path::new(data));
    }
    let json = arguments.windows(2).any(|pair| pair == ["-o", "json"]);
    let named: Vec<&str> = SHAPES.iter().copied().filter(|shape| arguments.iter().any(|it| it == shape)).collect();
    let shapes = if named.is_empty() { SHAPES.to_vec() } else { named };
    let print = |shape: &str, rows: Rows| {
        for (metric, value, unit) in rows {
            if json {
                println!(
                    r#"{{"bench":"kubernetes","shape":"{shape}","metric":"{metric}","value":{value},"unit":"{unit}"}}"#
                );
            } else {
                println!("{shape:<13} {metric:<34} {value:>14.3} {unit}");
            }
        }
    };
    run(async {
        if shapes != ["recorded"] {
            let cluster = Cluster::new().await;
            let mut member = Member::start(&cluster.server.kubeconfig());
            let started = member.started();
            for shape in &shapes {
                match *shape {
                    "start" => print(shape, started.clone()),
                    "change" => print(shape, changes(&cluster, &mut member).await),
                    "events" => print(shape, events(&cluster, &mut member).await),
                    _ => {}
                }
            }
        }
        if shapes.contains(&"recorded") {
            print("recorded", recorded().await);
        }
    });
}

// The member: prints what it sees, one line each.

fn member(kubeconfig: &Path, data: &Path) {
    hanse_identity::tls::install_provider();
    let start = Instant::now();
    let access = Access { kubeconfig: Some(kubeconfig.to_owned()), context: None };
    let source = Location::Kubernetes(access).open(&data.into(), Writes::new(&Health::default()));
    let mut source = source.expect("a source");
    let mut world = World::new("c".into(), UnknownPods::default(), Ends::default());
    // The hub has no policies.
    world.receive(Updates { changes: Vec::new(), in_force: Position { epoch: 1, revision: 1 } });
    let mut is_started = false;
    let mut seen = 0;
    loop {
        let Some(changes) = source.poll() else { continue };
        let objects = changes.objects.len();
        assert!(changes.problems.iter().all(|it| it.problems.is_empty()), "{:?}", changes.problems);
        let changed: Vec<String> =
            changes.objects.iter().filter_map(|it| it.object.as_ref().and_then(|it| changed_label(it))).collect();
        world.take_local(changes);
        let nodes = world.compile().map_or(0, |compiled| compiled.changed.len());
        if is_started {
            seen += objects;
        } else {
            is_started = true;
            println!("started {} {nodes} {objects}", start.elapsed().as_secs_f64());
        }
        println!("seen {seen}");
        for value in changed {
            println!("label {value}");
        }
        std::io::stdout().flush().expect("the reader waits");
    }
}

/// The value of the label that the benchmark changes one by one.
fn changed_label(manifest: &hanse_api::Manifest) -> Option<String> {
    let hanse_api::Object::Pod(pod) = &manifest.object else { return None };
    pod.labels.get(LABEL).filter(|value| value.starts_with('c')).map(ToString::to_string)
}

struct Member {
    child: Child,
    lines: Receiver<(Instant, String)>,
    seen: Arc<AtomicUsize>,
    _data: tempfile::TempDir,
}

impl Member {
    fn start(kubeconfig: &Path) -> Self {
        let data = tempfile::tempdir().expect("a folder");
        let program = std::env::current_exe().expect("the running program has a path");
        let mut command = Command::new(program);
        let command = command.arg("--member").args([kubeconfig, data.path()]).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start the member");
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let (sender, lines) = channel();
        let seen = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&seen);
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                match line.strip_prefix("seen ") {
                    Some(number) => count.store(number.parse().expect("a number"), Ordering::Relaxed),
                    None => drop(sender.send((Instant::now(), line))),
                }
            }
        });
        Self { child, lines, seen, _data: data }
    }

    fn started(&mut self) -> Rows {
        let (_, line) = self.lines.recv_timeout(PATIENCE).expect("the member starts");
        let words: Vec<&str> = line.split(' ').collect();
        let (seconds, nodes, objects) = (words[1].parse().expect("seconds"), words[2], words[3]);
        assert_eq!(nodes, NODES.to_string(), "{line}");
        assert!(objects.parse::<usize>().is_ok_and(|it| it > PODS + SERVICES + POLICIES), "{line}");
        vec![
            ("first-rule-sets", seconds, "s"),
            ("processor-time", self.processor_seconds(), "s"),
            ("peak-memory", self.peak_bytes() / 1e6, "MB"),
        ]
    }

    fn processor_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it runs");
        let fields: Vec<&str> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
        let ticks: f64 = [11, 12].iter().map(|at| fields[*at].parse::<f64>().expect("ticks")).sum();
        // USER_HZ, which is 100 on every platform of Linux.
        ticks / 100.0
    }

    fn peak_bytes(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.and_then(|it| it.trim().trim_end_matches(" kB").parse::<f64>().ok()).expect("a size") * 1024.0
    }

    async fn until_seen(&self, count: usize) {
        let start = Instant::now();
        while self.seen.load(Ordering::Relaxed) < count {
            assert!(start.elapsed() < PATIENCE, "{} of {count} events", self.seen.load(Ordering::Relaxed));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

fn percentiles(mut times: Vec<Duration>) -> [f64; 2] {
    times.sort();
    [times[times.len() / 2], times[times.len() * 99 / 100]].map(|it| it.as_secs_f64() * 1e3)
}

async fn changes(cluster: &Cluster, member: &mut Member) -> Rows {
    let mut times = Vec::new();
    for number in 0..CHANGES {
        cluster.label(number * 977 % PODS, &format!("c{number}")).await;
        let answered = Instant::now();
        loop {
            let (at, line) = member.lines.recv_timeout(PATIENCE).expect("the change");
            if line == format!("label c{number}") {
                times.push(at.saturating_duration_since(answered));
                break;
            }
        }
    }
    let [median, p99] = percentiles(times);
    vec![("compiled-median", median, "ms"), ("compiled-p99", p99, "ms")]
}

async fn events(cluster: &Cluster, member: &mut Member) -> Rows {
    let (seen, processor) = (member.seen.load(Ordering::Relaxed), member.processor_seconds());
    let start = Instant::now();
    let writes = (0..EVENTS).map(|number| cluster.label(number * 7 % PODS, "e"));
    futures::stream::iter(writes).buffer_unordered(WRITERS).collect::<Vec<()>>().await;
    let rate = EVENTS as f64 / start.elapsed().as_secs_f64();
    member.until_seen(seen + EVENTS).await;
    let each = (member.processor_seconds() - processor) / EVENTS as f64 * 1e6;
    vec![("rate", rate, "1/s"), ("processor-time-per-event", each, "us")]
}

// The cluster.

struct Cluster {
    server: ApiServer,
    client: kube::Client,
}

fn namespace(number: usize) -> String {
    format!("n-{:06}", number % NAMESPACES)
}

fn pod_name(number: usize) -> String {
    format!("app-7c9f8d6b5-{number:06}")
}

fn pod_address(number: usize) -> String {
    // Three digits in each part, so that addresses have one length.
    format!("10.{}.{}.{}", 100 + number / 22_500 % 150, 100 + number / 150 % 150, 100 + number % 150)
}

fn node_name(number: usize) -> String {
    format!("node-{:06}", number % NODES)
}

fn uid(number: usize) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

fn pod(number: usize) -> Value {
    let environment: Vec<Value> =
        (0..10).map(|it| json!({"name": format!("SETTING_{it}"), "value": "a value of usual length"})).collect();
    let mounts = json!([{"name": "data", "mountPath": "/data"}, {"name": "config", "mountPath": "/etc/app"}]);
    let container = |name: &str| {
        json!({
            "name": name, "image": format!("registry.example.com/team/{name}:1.27.3"), "env": environment, "volumeMounts": mounts,
            "ports": [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}],
            "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
            "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}},
        })
    };
    let owner = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "app-7c9f8d6b5", "uid": uid(0), "controller": true}]);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": pod_name(number), "namespace": namespace(number), "ownerReferences": owner,
            "labels": {"app": "web", "app.kubernetes.io/part-of": "product", "team": "seven", "pod-template-hash": "7c9f8d6b5"},
        },
        "spec": {
            "nodeName": node_name(number), "automountServiceAccountToken": false,
            "containers": [container("web"), container("sidecar")],
            "volumes": [{"name": "data", "emptyDir": {}}, {"name": "config", "configMap": {"name": "app"}}],
        },
    })
}

fn pod_status(number: usize) -> Value {
    let address = pod_address(number);
    let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(condition);
    json!({"status": {
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "hostIP": "192.0.2.1", "conditions": conditions,
    }})
}

impl Cluster {
    async fn new() -> Self {
        let etcd = Etcd::start().expect("etcd starts");
        // Priority and fairness would limit the writers of the benchmark, not the member.
        let options = Options::new("bench")
            .argument("--enable-priority-and-fairness=false")
            .argument("--max-mutating-requests-inflight=0")
            .argument("--max-requests-inflight=0");
        let server = ApiServer::start(&etcd, options).await.expect("it is ready");
        let cluster = Self { client: server.client().await.expect("a client"), server };
        let namespaces = (0..NAMESPACES).map(|it| {
            let name = namespace(it);
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"stage": "prod"}}})
        });
        cluster.create("v1", "Namespace", namespaces).await;
        let nodes = (0..NODES).map(|it| {
            let range = format!("10.{}.{}.0/26", it / 250, it % 250);
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name(it)}, "spec": {"podCIDR": range, "podCIDRs": [range]}})
        });
        cluster.create("v1", "Node", nodes).await;
        let accounts = (0..NAMESPACES).map(|it| {
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": namespace(it)}})
        });
        cluster.create("v1", "ServiceAccount", accounts).await;
        let services = (0..SERVICES).map(|it| {
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s-{it}"), "namespace": namespace(it)},
                   "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]}})
        });
        cluster.create("v1", "Service", services).await;
        let slices = (0..SERVICES).map(|it| {
            let endpoints: Vec<Value> = (0..10).map(|at| json!({"addresses": [pod_address(it * 20 + at)], "conditions": {"ready": true}})).collect();
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
                   "metadata": {"name": format!("s-{it}-abcde"), "namespace": namespace(it), "labels": {"kubernetes.io/service-name": format!("s-{it}")}},
                   "ports": [{"name": "", "port": 8080, "protocol": "TCP"}]})
        });
        cluster.create("discovery.k8s.io/v1", "EndpointSlice", slices).await;
        let policies = (0..POLICIES).map(|it| {
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": format!("p-{it}"), "namespace": namespace(it)},
                   "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"], "ingress": [
                       {"from": [{"podSelector": {"matchLabels": {"team": "seven"}}}], "ports": [{"port": 8080}]}]}})
        });
        cluster.create("networking.k8s.io/v1", "NetworkPolicy", policies).await;
        cluster.copy_pods(&etcd).await;
        cluster
    }

    async fn create(&self, api_version: &str, kind: &str, objects: impl Iterator<Item = Value>) {
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        let creating = objects.map(|object| {
            let object: DynamicObject = serde_json::from_value(object).expect("an object");
            let api: Api<DynamicObject> = match &object.metadata.namespace {
                Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
                None => Api::all_with(self.client.clone(), &resource),
            };
            async move { drop(api.create(&PostParams::default(), &object).await.expect("created")) }
        });
        futures::stream::iter(creating).buffer_unordered(WRITERS).collect::<Vec<()>>().await;
    }

    /// Creates one pod, and copies it in etcd with another name, namespace, node, address and uid: 200,000 requests to the API server
    /// would take many times as long.
    async fn copy_pods(&self, etcd: &Etcd) {
        self.create("v1", "Pod", std::iter::once(pod(0))).await;
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &namespace(0), &pods());
        let status = Patch::Merge(pod_status(0));
        let first = api.patch_status(&pod_name(0), &PatchParams::default(), &status).await.expect("its status is set");
        let first_uid = first.metadata.uid.expect("a uid");
        let key = |number: usize| format!("/bench/pods/{}/{}", namespace(number), pod_name(number));
        let value = etcd.read(&key(0)).expect("it is stored");
        let numbers: Vec<usize> = (1..PODS).collect();
        for part in numbers.chunks(100) {
            let copy = |number: &usize| {
                let mut copy = value.clone();
                for (from, to) in [
                    (pod_name(0), pod_name(*number)),
                    (namespace(0), namespace(*number)),
                    (node_name(0), node_name(*number)),
                    (pod_address(0), pod_address(*number)),
                    (first_uid.clone(), uid(*number)),
                ] {
                    replace(&mut copy, from.as_bytes(), to.as_bytes());
                }
                (key(*number), copy)
            };
            etcd.write(&part.iter().map(copy).collect::<Vec<_>>()).expect("written");
        }
    }

    async fn label(&self, number: usize, value: &str) {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &namespace(number), &pods());
        let patch = Patch::Merge(json!({"metadata": {"labels": {LABEL: value}}}));
        api.patch(&pod_name(number), &PatchParams::default(), &patch).await.expect("labelled");
    }
}

fn pods() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"))
}

/// Replaces a text by another one of the same length, which leaves a protobuf message valid.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    let mut at = 0;
    while let Some(found) = bytes[at..].windows(from.len()).position(|it| it == from) {
        bytes[at + found..at + found + to.len()].copy_from_slice(to);
        at += found + to.len();
    }
}

// A recorded stream.

/// Answers lists with nothing but 1,000 pods, and the watch of pods with events at a constant rate.
async fn recorded() -> Rows {
    const KNOWN: usize = 1_000;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let object = |number: usize, version: usize| {
        let mut object = pod(number);
        object["metadata"]["resourceVersion"] = version.to_string().into();
        object["metadata"]["uid"] = uid(number).into();
        // The last one is reported when it is compiled.
        let label = if version == RECORDED + 1 { "c".to_owned() } else { format!("r{version}") };
        object["metadata"]["labels"][LABEL] = label.into();
        object["status"] = pod_status(number)["status"].clone();
        object
    };
    let listed: Vec<Value> = (0..KNOWN).map(|number| object(number, 1)).collect();
    let lines: Vec<String> = (0..RECORDED)
        .map(|number| format!("{}\n", json!({"type": "MODIFIED", "object": object(number % KNOWN, number + 2)})))
        .collect();
    let (listed, lines) = (Arc::new(listed), Arc::new(lines));
    let (begin, begun) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).expect("set");
            tokio::spawn(serve(stream, Arc::clone(&listed), Arc::clone(&lines), begun.clone()));
        }
    });
    let folder = tempfile::tempdir().expect("a folder");
    let kubeconfig = folder.path().join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    });
    std::fs::write(&kubeconfig, config.to_string()).expect("written");
    let member = Member::start(&kubeconfig);
    while member.lines.try_recv().is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let processor = member.processor_seconds();
    let start = Instant::now();
    begin.send_replace(true);
    while !member.lines.try_recv().is_ok_and(|(_, line)| line == "label c") {
        assert!(start.elapsed() < PATIENCE, "the last event");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (time, used) = (start.elapsed().as_secs_f64(), member.processor_seconds() - processor);
    vec![
        ("rate", RECORDED as f64 / time, "1/s"),
        ("processor-time-per-event", used / RECORDED as f64 * 1e6, "us"),
        ("processors", used / time, ""),
    ]
}

async fn serve(
    stream: TcpStream,
    listed: Arc<Vec<Value>>,
    lines: Arc<Vec<String>>,
    mut begun: tokio::sync::watch::Receiver<bool>,
) {
    let mut stream = tokio::io::BufStream::new(stream);
    loop {
        let mut request = String::new();
        if stream.read_line(&mut request).await.is_ok_and(|read| read == 0) {
            return;
        }
        loop {
            let mut header = String::new();
            stream.read_line(&mut header).await.expect("a request");
            if header.trim().is_empty() {
                break;
            }
        }
        let is_watch = request.contains("watch=true");
        let is_pods = request.contains("/api/v1/pods");
        if !is_watch {
            let items = if is_pods { &listed[..] } else { &[] };
            let body =
                json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})
                    .to_string();
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(answer.as_bytes()).await.expect("sent");
            stream.flush().await.expect("sent");
            continue;
        }
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.expect("sent");
        stream.flush().await.expect("sent");
        if is_pods && begun.wait_for(|begun| *begun).await.is_ok() {
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            for part in lines.chunks(RECORDED_PER_SECOND / 100) {
                ticks.tick().await;
                let part = part.concat();
                stream.write_all(format!("{:x}\r\n{part}\r\n", part.len()).as_bytes()).await.expect("sent");
                stream.flush().await.expect("sent");
            }
        }
        std::future::pending::<()>().await;
    }
}
