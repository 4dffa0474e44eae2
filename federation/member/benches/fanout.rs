//! Measures the time from a policy at the hub to the last agent of a cluster, and back.
//!
//! `fanout [SHAPE…] [-o json]`. Each shape runs in a separate process with a hub and its store on disk, a member and its source on disk,
//! and one agent per node, each with its own TLS connection. An agent decodes and acknowledges messages like `hanse-agent`. Every
//! hundredth agent also applies them to a rule set and compares the digest. The others do not, because in a real cluster they do not
//! share the processors of this machine. The kernel is not included: see `nftables`.
//!
//! - `thousand`: 1,000 nodes of 10 pods, 1,000 policies of the cluster's own.
//! - `large`: 1,000 nodes of 100 pods, 10,000 policies of the cluster's own.
//!
//! Measured are: `policy`, a federated policy that selects pods on every node is applied at the hub; `pod`, one pod gets
//! another label in the source, and every node's sets follow. `-applied`: until the last agent has it; `-told`: until the
//! hub says that the policy is enforced.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, ensure};
use hanse_hub::server::{Hub, Options as HubOptions, default_store, init};
use hanse_identity::keys::{Certificate, Credentials};
use hanse_identity::tls::{CredentialStore, TlsClient, Trust, install_provider};
use hanse_identity::{Identity, TrustDomain};
use hanse_member::process::{self, Options};
use hanse_member::registration::MemberIdentity;
use hanse_member::source::Location;
use hanse_proto::agent::v1 as agent;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::administration_client::AdministrationClient;
use hanse_protocol::{self, Assembled, Assembler};
use hanse_ruleset::{Enforcement, RuleSet, UnknownPods};
use hanse_runtime::files;
use hanse_runtime::monitor::MetricsOptions;
use hanse_runtime::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

const SHAPES: &[(&str, Shape)] = &[
    ("thousand", Shape { nodes: 1_000, pods: 10, policies: 1_000 }),
    ("large", Shape { nodes: 1_000, pods: 100, policies: 10_000 }),
];
/// Changes of each kind, from which the median and the 99th percentile are taken.
const CHANGES: usize = 101;
/// The timeout of each step.
const PATIENCE: Duration = Duration::from_secs(120);
const CLUSTER: &str = "train";
/// The number of applications, each with pods in one namespace and policies for them.
const APPLICATIONS: usize = 20;

#[derive(Debug, Clone, Copy)]
struct Shape {
    nodes: usize,
    /// On each.
    pods: usize,
    policies: usize,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    if let [child, shape] = &arguments[..]
        && child == "--child"
    {
        let (_, shape) = SHAPES.iter().find(|(name, _)| name == shape).context("a known shape")?;
        install_provider();
        return tokio::runtime::Runtime::new()?.block_on(run(*shape));
    }
    let json = arguments.windows(2).any(|pair| pair == ["-o", "json"]);
    let all: Vec<&str> = SHAPES.iter().map(|(name, _)| *name).collect();
    let named: Vec<&str> = all.iter().copied().filter(|shape| arguments.iter().any(|it| it == shape)).collect();
    let program = std::env::current_exe()?;
    for shape in if named.is_empty() { all } else { named } {
        let output = Command::new(&program).args(["--child", shape]).stderr(std::process::Stdio::inherit()).output()?;
        ensure!(output.status.success(), "{shape} failed");
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let mut parts = line.split(' ');
            let (Some(metric), Some(value), Some(unit)) = (parts.next(), parts.next(), parts.next()) else { continue };
            if json {
                println!(
                    r#"{{"bench":"fanout","shape":"{shape}","metric":"{metric}","value":{value},"unit":"{unit}"}}"#
                );
            } else {
                println!("{shape:<13} {metric:<34} {value:>14} {unit}");
            }
        }
    }
    Ok(())
}

async fn run(shape: Shape) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let shutdown = Shutdown::default();
    let (hub_data, data, source) =
        (folder.path().join("hub"), folder.path().join("member"), folder.path().join("source"));
    write_source(&source, shape)?;

    let any: SocketAddr = "127.0.0.1:0".parse()?;
    init(&hub_data, &default_store(&hub_data), &TrustDomain::new("hanse.bench")?, any).await?;
    // Whoever made the store lets go of its file on a thread of its own, a moment later.
    let start = Instant::now();
    let hub = loop {
        match Hub::start(HubOptions::new(hub_data.clone(), any, any), &shutdown).await {
            Err(_) if start.elapsed() < Duration::from_secs(2) => tokio::time::sleep(Duration::from_millis(20)).await,
            started => break started?,
        }
    };
    let mut admin = administrator(&hub_data, hub.address).await?;
    let grants = json!({"namespaces": ["*"], "cidrs": ["10.0.0.0/8"]});
    apply(&mut admin, &object("MemberCluster", CLUSTER, json!({"grants": grants}))).await?;
    apply(&mut admin, &object("Tier", "platform", json!({"phase": "Guard", "order": 1.0, "defaultAction": "Pass"})))
        .await?;
    let request = pb::CreateTokenRequest { cluster: CLUSTER.to_owned(), lifetime_seconds: 600, accept: true };
    let token = admin.create_token(request).await?.into_inner().token;
    files::private_folder(&data)?;
    files::write_secret(&data.join("token"), token.as_bytes())?;

    let began = Instant::now();
    let agent_listen = free_address()?;
    let options = Options {
        data: data.clone(),
        cluster: CLUSTER.to_owned(),
        hubs: vec![hub.address.to_string()],
        join: vec![hub.join_address.to_string()],
        token_file: Some(data.join("token")),
        source: Location::Directory(source.clone()),
        agent_account: None,
        authority_config_map: None,
        agent_service: None,
        state: None,
        agent_listen,
        enrol_listen: any,
        federated_allow_final: false,
        node_lifetime: Duration::from_secs(86_400),
        unknown_pods: UnknownPods::Deny,
        enforcement: Enforcement::Enforce,
        node_taints: hanse_member::node_taints::NodeTaints::Leave,
        health_listen: None,
        metrics: MetricsOptions::default(),
    };
    let member = tokio::spawn(process::run(options, shutdown.clone()));
    let identity = loop {
        ensure!(!member.is_finished() && began.elapsed() < PATIENCE, "the member did not join");
        match MemberIdentity::read(&data, CLUSTER)? {
            Some(identity) => break identity,
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let (applied, mut collector) = Collector::new(shape.nodes);
    for number in 0..shape.nodes {
        let agent =
            Agent { number, member: agent_listen.to_string(), identity: identity.clone(), applied: applied.clone() };
        tokio::spawn(agent.run());
    }
    // Whatever the revisions are: every agent has something.
    collector.wait(|hub, local| hub > 0 && local > 0).await?;
    println!("start {:.0} ms", milliseconds(began.elapsed()));
    println!("start-cpu {:.0} ms", cpu_ms());
    // What the start leaves to be done is not part of what follows.
    wait_enforced(&mut admin, "warm", 0).await?;

    let (mut last, mut told, cpu) = (Vec::new(), Vec::new(), cpu_ms());
    for round in 0..CHANGES {
        let began = Instant::now();
        let revision = apply(&mut admin, &policy("changing", round)).await?;
        let at = collector.wait(|hub, _| hub >= revision).await?;
        last.push(milliseconds(at.saturating_duration_since(began)));
        poll_enforced(&mut admin, "changing").await?;
        told.push(milliseconds(began.elapsed()));
    }
    println!("policy-cpu {:.1} ms", (cpu_ms() - cpu) / CHANGES as f64);
    percentiles("policy-applied", last);
    percentiles("policy-told", told);

    let (mut last, cpu) = (Vec::new(), cpu_ms());
    for round in 0..CHANGES {
        let node = round * 7 % shape.nodes;
        let before = collector.highest_local();
        let began = Instant::now();
        write_node(&source, shape, node, Some(round))?;
        let at = collector.wait(|_, local| local > before).await?;
        last.push(milliseconds(at.saturating_duration_since(began)));
    }
    println!("pod-cpu {:.1} ms", (cpu_ms() - cpu) / CHANGES as f64);
    percentiles("pod-applied", last);
    println!("peak-resident {:.0} MB", resident_bytes("VmHWM:") / 1e6);
    shutdown.begin();
    drop(member);
    // The process ends here: a thousand streams need not be closed one by one.
    std::process::exit(0)
}

fn object(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "hanse.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// Selects pods on every node, and differs from round to round.
fn policy(name: &str, round: usize) -> Value {
    let spec = json!({
        "tier": "platform", "order": 10.0, "selector": "app in {'app-1', 'app-2', 'app-3'}", "types": ["Ingress"],
        "ingress": [
            {"action": "Deny", "protocol": "TCP", "destination": {"ports": [10_000 + round]}},
            {"action": "Allow", "protocol": "TCP", "source": {"selector": "app == 'app-4'"}, "destination": {"ports": [8000]}}
        ]
    });
    object("FederatedNetworkPolicy", name, spec)
}

type Admin = AdministrationClient<Channel>;

async fn administrator(data: &Path, hub: SocketAddr) -> anyhow::Result<Admin> {
    let credentials = Credentials::read(&data.join("admin.key"), &data.join("admin.pem"))?;
    let root = Certificate::read(&data.join("ca.pem"))?;
    let trust = Trust::new(&root, |identity| *identity == Identity::Hub)?;
    let client = TlsClient::mutual(CredentialStore::new(credentials)?, &trust)?;
    Ok(AdministrationClient::new(client.connect(&hub.to_string()).await?.channel))
}

/// The hub's revision at which it is applied.
async fn apply(admin: &mut Admin, manifest: &Value) -> anyhow::Result<u64> {
    let request = pb::ApplyRequest {
        manifest: serde_json::to_vec(manifest)?.into(),
        precondition: None,
        allow_missing_tier: false,
    };
    Ok(admin.apply(request).await?.into_inner().revision)
}

async fn wait_enforced(admin: &mut Admin, name: &str, round: usize) -> anyhow::Result<()> {
    apply(admin, &policy(name, round)).await?;
    poll_enforced(admin, name).await
}

async fn poll_enforced(admin: &mut Admin, name: &str) -> anyhow::Result<()> {
    use pb::object_in_cluster::State::Enforced;
    let began = Instant::now();
    let kind = pb::ObjectKind::FederatedNetworkPolicy.into();
    let request = pb::ObjectStatusRequest { kind, name: name.to_owned(), gone_at: 0 };
    loop {
        let status = admin.object_status(request.clone()).await?.into_inner();
        if !status.clusters.is_empty() && status.clusters.iter().all(|it| matches!(it.state, Some(Enforced(_)))) {
            return Ok(());
        }
        ensure!(began.elapsed() < PATIENCE, "not enforced: {status:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What an agent has, as it says so: node, hub revision, local revision, since when.
type Applied = (usize, u64, u64, Instant);

struct Collector {
    applied: mpsc::UnboundedReceiver<Applied>,
    nodes: Vec<Option<(u64, u64, Instant)>>,
}

impl Collector {
    fn new(nodes: usize) -> (mpsc::UnboundedSender<Applied>, Self) {
        let (sender, applied) = mpsc::unbounded_channel();
        (sender, Self { applied, nodes: vec![None; nodes] })
    }

    fn highest_local(&self) -> u64 {
        self.nodes.iter().flatten().map(|(_, local, _)| *local).max().unwrap_or_default()
    }

    /// Until `is_there` of every agent; when the last came.
    async fn wait(&mut self, is_there: impl Fn(u64, u64) -> bool) -> anyhow::Result<Instant> {
        let holds = |it: &Option<(u64, u64, Instant)>| it.is_some_and(|(hub, local, _)| is_there(hub, local));
        let mut missing = self.nodes.iter().filter(|it| !holds(it)).count();
        while missing > 0 {
            let next = tokio::time::timeout(PATIENCE, self.applied.recv()).await;
            let next = next.with_context(|| format!("{missing} agents are not there"))?;
            let (node, hub, local, at) = next.context("the agents are gone")?;
            let was = holds(&self.nodes[node]);
            self.nodes[node] = Some((hub, local, at));
            missing -= usize::from(!was && holds(&self.nodes[node]));
        }
        self.nodes.iter().flatten().map(|(_, _, at)| *at).max().context("there are agents")
    }
}

struct Agent {
    number: usize,
    member: String,
    identity: MemberIdentity,
    applied: mpsc::UnboundedSender<Applied>,
}

impl Agent {
    async fn run(self) {
        if let Err(error) = self.follow().await {
            eprintln!("agent {}: {error:#}", self.number);
            std::process::exit(1);
        }
    }

    async fn follow(&self) -> anyhow::Result<()> {
        let authority = self.identity.authority();
        let node = Identity::node(self.identity.cluster(), &node_name(self.number))?;
        let credentials = authority.issue_credentials(&node, Duration::from_secs(86_400), SystemTime::now())?;
        let trust = Trust::new(authority.certificate(), |identity| matches!(identity, Identity::Cluster(_)))?;
        let client = TlsClient::mutual(CredentialStore::new(credentials)?, &trust)?;
        let connection = loop {
            match client.connect(&self.member).await {
                Ok(connection) => break connection,
                // The listener opens right after the files are there.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        let mut client = AgentsClient::new(connection.channel).max_decoding_message_size(2 << 20);
        let (outbox, sending) = mpsc::channel(4);
        let hello =
            agent::Hello { digest: hanse_protocol::digest(RuleSet::default().digest()), ..agent::Hello::default() };
        outbox.send(agent::AgentToMember { message: Some(agent::agent_to_member::Message::Hello(hello)) }).await?;
        let mut stream = client.sync(ReceiverStream::new(sending)).await?.into_inner();
        let (mut assembler, mut digest) = (Assembler::default(), RuleSet::default().digest());
        // Every hundredth applies what it is sent.
        let mut rules = self.number.is_multiple_of(100).then(RuleSet::default);
        while let Some(message) = stream.message().await? {
            let (generation, hub, local) = match assembler.receive(message)? {
                Assembled::Nothing => continue,
                Assembled::Delta(delta) => {
                    ensure!(delta.base.is_none_or(|base| base == digest), "a delta from what is not held");
                    if let Some(rules) = &mut rules {
                        *rules = rules.apply(&delta)?;
                    }
                    digest = delta.digest;
                    (delta.generation, delta.hub_revision, delta.local_revision)
                }
                Assembled::Position { generation, hub_revision, local_revision } => {
                    (generation, hub_revision, local_revision)
                }
            };
            let _ = self.applied.send((self.number, hub, local, Instant::now()));
            let ack = agent::Ack {
                generation: Some(hanse_protocol::generation(generation)),
                digest: hanse_protocol::digest(digest),
                revisions: Some(agent::Revisions { hub, local }),
                ..agent::Ack::default()
            };
            outbox.send(agent::AgentToMember { message: Some(agent::agent_to_member::Message::Ack(ack)) }).await?;
        }
        anyhow::bail!("the member closed the stream")
    }
}

fn node_name(number: usize) -> String {
    format!("node-{number}")
}

/// One file for each node with its pods, and one of policies.
fn write_source(folder: &Path, shape: Shape) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    for node in 0..shape.nodes {
        write_node(folder, shape, node, None)?;
    }
    let policies: Vec<Value> = (0..shape.policies)
        .map(|number| {
            let app = format!("app-{}", number % APPLICATIONS);
            let peer = format!("app-{}", (number + 1) % APPLICATIONS);
            json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": {"name": format!("policy-{number}"), "namespace": namespace(number, shape)},
                "spec": {"podSelector": {"matchLabels": {"app": app}}, "ingress": [
                    {"from": [{"podSelector": {"matchLabels": {"app": peer}}}], "ports": [{"port": 8000 + number % 50}]}
                ]}
            })
        })
        .collect();
    write_list(&folder.join("policies.json"), policies)
}

fn namespace(number: usize, shape: Shape) -> String {
    // As many policies in each namespace.
    format!("namespace-{}", number / APPLICATIONS % (shape.policies / APPLICATIONS).max(1))
}

fn write_node(folder: &Path, shape: Shape, node: usize, changed: Option<usize>) -> anyhow::Result<()> {
    let mut objects = vec![json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name(node)},
        "spec": {"podCIDR": format!("10.{}.{}.0/24", node / 250, node % 250)},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("192.168.{}.{}", node / 250, 1 + node % 250)}]}
    })];
    for pod in 0..shape.pods {
        let number = node * shape.pods + pod;
        let mut app = number % APPLICATIONS;
        if pod == 0
            && let Some(changed) = changed
        {
            app = (app + 1 + changed % (APPLICATIONS - 1)) % APPLICATIONS;
        }
        objects.push(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": format!("pod-{number}"), "namespace": namespace(number, shape),
                "labels": {"app": format!("app-{app}"), "team": format!("team-{}", number % 7)}
            },
            "spec": {"nodeName": node_name(node), "serviceAccountName": "default"},
            "status": {"phase": "Running", "podIP": format!("10.{}.{}.{}", node / 250, node % 250, 1 + pod)}
        }));
    }
    write_list(&folder.join(format!("node-{node}.json")), objects)
}

fn write_list(path: &PathBuf, items: Vec<Value>) -> anyhow::Result<()> {
    let text = serde_json::to_vec(&json!({"apiVersion": "v1", "kind": "List", "items": items}))?;
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, text)?;
    std::fs::rename(temporary, path)?;
    Ok(())
}

fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn percentiles(metric: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    println!("{metric}-median {:.1} ms", times[times.len() / 2]);
    println!("{metric}-p99 {:.1} ms", times[times.len() * 99 / 100]);
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Of the whole process, in steps of ten.
fn cpu_ms() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = text.rsplit(") ").next().unwrap_or_default();
    let ticks = after_name.split(' ').skip(11).take(2).filter_map(|it| it.parse::<f64>().ok());
    ticks.sum::<f64>() * 10.0
}

fn resident_bytes(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).unwrap_or_default() * 1024.0
}
