//! `hanse-member`: one cluster's inventory, its hub streams, and the fan-out to its agents.

// Text from elsewhere is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use hanse_identity::keys::Credentials;
use hanse_identity::{Identity, tls};
use hanse_kubernetes::Access;
use hanse_member::agent_service::AgentService;
use hanse_member::api_server::{AgentAccount, ConfigMapName};
use hanse_member::fanout::{
    NodeRecord, NodeToken, allow_node, create_node_token, list_node_tokens, list_nodes, revoke_node, revoke_node_token,
};
use hanse_member::flows::{self, Party, Record};
use hanse_member::node_taints::NodeTaints;
use hanse_member::process::{self, Options};
use hanse_member::registration::MemberIdentity;
use hanse_member::source::{self, Location};
use hanse_member::state::{SecretName, State};
use hanse_ruleset::{Enforcement, UnknownPods};
use hanse_runtime::moment::rfc3339;
use hanse_runtime::monitor::MetricsOptions;
use hanse_runtime::shutdown::Shutdown;
use hanse_runtime::text::{Items, Versioned};
use hanse_runtime::{logging, settings, text};
use serde_json::json;

/// Objects have many small parts, and are dropped by another thread than that which has read them: the allocator of glibc used a fifth of
/// the processor's time of each event.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The file of the state with the member's key and certificate.
const MEMBER_FILE: &str = "member.pem";
/// The time that tasks have to end when the process stops.
const DRAIN: Duration = Duration::from_secs(5);

/// The member of one cluster: publishes its endpoints to the hub, receives those of other clusters, and sends rule sets to its agents.
#[derive(Debug, Parser)]
#[command(name = "hanse-member", version, propagate_version = true)]
struct Cli {
    /// Format of the log: text or json.
    #[arg(long, global = true, default_value_t)]
    log_format: logging::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the member. A cluster that has not joined yet joins first.
    Run(Box<RunArgs>),
    /// Join and exit. A cluster whose registration was revoked joins again.
    ///
    /// The member gets a new key. The cluster's own authority keeps its key, so agents stay enrolled. If that key was stolen,
    /// join with an empty directory instead.
    Join(JoinArgs),
    /// Manage the tokens with which nodes enrol.
    NodeToken {
        #[command(subcommand)]
        command: NodeTokenCommand,
    },
    /// Show recorded flow decisions, with the enforced and the staged verdict of policy.
    ///
    /// A line is a group of equal decisions of one node within two seconds. `flows/*.jsonl` in the data directory contains the newest 64
    /// to 128 MiB of records, one JSON object per line. `-o json` prints these lines.
    Flows(FlowsArgs),
    /// List and revoke enrolled nodes.
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// Remove objects that are kept although their CustomResourceDefinition was deleted.
    ///
    /// When the definition of a kind of policies is deleted, the API server deletes the policies too. The member keeps them in force
    /// until they return, or until they are forgotten here. Without arguments, the command lists them.
    Forget(ForgetArgs),
}

#[derive(Debug, Args)]
struct ForgetArgs {
    /// Directory of the files of the running member.
    #[arg(long)]
    data: PathBuf,
    /// Objects, as the command lists them: `globalnetworkpolicies.crd.projectcalico.org/default.deny`.
    #[arg(value_name = "COLLECTION/[NAMESPACE/]NAME", conflicts_with = "all")]
    objects: Vec<String>,
    /// Forget all kept objects.
    #[arg(long)]
    all: bool,
    /// Output format of the list.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Args)]
struct FlowsArgs {
    /// Directory of the member's files.
    #[arg(long)]
    data: PathBuf,
    /// Only flows whose verdict would change if the staged policies were enforced.
    #[arg(long)]
    would_change: bool,
    /// Only flows with this decision.
    #[arg(long, value_enum)]
    decision: Option<Decision>,
    /// Only flows from or to this pod, in any cluster.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pod: Option<String>,
    /// Show at most this many flows, the newest.
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    last: u32,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Decision {
    /// The connection was allowed.
    Allowed,
    /// The connection was denied.
    Denied,
    /// An established connection was cut.
    Cut,
    /// The connection passed although policy denies it: the node observes.
    Observed,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Directory of the member's files.
    #[arg(long)]
    data: PathBuf,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// List enrolled nodes, with their certificates and their state.
    List(ListArgs),
    /// Revoke a node and its tokens. A running member closes the node's stream within two seconds. A new token enrols the node
    /// again.
    Revoke {
        /// Directory of the member's files.
        #[arg(long)]
        data: PathBuf,
        /// Name of the node.
        node: String,
    },
    /// Let a revoked node enrol again with a token of its service account. Its former keys stay refused.
    Allow {
        /// Directory of the member's files.
        #[arg(long)]
        data: PathBuf,
        /// Name of the node.
        node: String,
    },
}

#[derive(Debug, Subcommand)]
enum NodeTokenCommand {
    /// Create a token that enrols one node once, and print it. The token is a secret.
    ///
    /// The command waits until the cluster has joined.
    Create(NodeTokenArgs),
    /// List tokens, with their nodes and their state.
    List(ListArgs),
    /// Revoke a token. A node that has enrolled with it stays enrolled.
    Revoke {
        /// Directory of the member's files.
        #[arg(long)]
        data: PathBuf,
        /// The token's id, as `list` shows it.
        id: String,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
    Yaml,
}

#[derive(Debug, Args)]
struct NodeTokenArgs {
    /// Directory of the member's files.
    #[arg(long)]
    data: PathBuf,
    /// Check that the directory belongs to this cluster.
    #[arg(long)]
    cluster: Option<String>,
    /// Name of the node.
    #[arg(long)]
    node: String,
    /// Validity of the token, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    seconds: u64,
    /// How long to wait until the cluster has joined, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    wait_seconds: u64,
    /// Output format. `table` prints the token alone, so that it can be redirected to a file.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Args)]
struct JoinArgs {
    /// Directory for the member's files; created if missing. `hanse-member run` must not use it at the same time.
    #[arg(long)]
    data: PathBuf,
    /// Name of the cluster in its ClusterSet.
    #[arg(long)]
    cluster: String,
    /// Join address of the hub; repeat it for each replica.
    #[arg(long, value_name = "HOST:PORT", required = true, value_parser = settings::host_port)]
    join: Vec<String>,
    /// File with a join token.
    #[arg(long)]
    token_file: PathBuf,
    /// Effect of an Allow of a federated policy in this cluster: `Pass` continues with the cluster's own tiers, `Final` allows.
    #[arg(long, value_enum, default_value_t = FederatedAllow::Pass)]
    federated_allow: FederatedAllow,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Directory for the member's files; created if missing.
    #[arg(long, value_name = "DIRECTORY", help_heading = "Files")]
    data: PathBuf,
    /// Secret in which the member keeps its keys and those of nodes, so that a pod that starts with an empty --data needs no token, together
    /// with the Secrets NAME-nodes-0 to NAME-nodes-f and NAME-kept. All of them must exist. Of several members with this option, the one
    /// that has the Lease of the same name serves, and the others wait. With --source kubernetes only.
    #[arg(long, value_name = "NAMESPACE/NAME", help_heading = "Files", value_parser = namespaced)]
    state_secret: Option<(String, String)>,
    /// Where the objects of the cluster are: `kubernetes` for its API server, or a directory of Kubernetes manifests (`./kubernetes` for
    /// one of this name). If the directory or a subdirectory no longer has manifests, its last objects stay in force.
    #[arg(long, value_name = "kubernetes|DIRECTORY", help_heading = "Source")]
    source: PathBuf,
    /// File with the address and the credentials of the API server. Without it, the member uses the service account of its pod.
    #[arg(long, value_name = "FILE", help_heading = "Source")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig file; by default its current one.
    #[arg(long, value_name = "NAME", help_heading = "Source", requires = "kubeconfig")]
    context: Option<String>,
    /// Name of the cluster in its ClusterSet.
    #[arg(long, help_heading = "Hub")]
    cluster: String,
    /// Address of the hub; repeat it for each replica.
    #[arg(long, value_name = "HOST:PORT", required = true, help_heading = "Hub", value_parser = settings::host_port)]
    hub: Vec<String>,
    /// Join address of the hub; needed until the cluster has joined, and for late renewal.
    #[arg(long, value_name = "HOST:PORT", help_heading = "Hub", value_parser = settings::host_port)]
    join: Vec<String>,
    /// File with a join token; needed until the cluster has joined.
    #[arg(long, value_name = "FILE", help_heading = "Hub")]
    token_file: Option<PathBuf>,
    /// Effect of an Allow of a federated policy in this cluster: `Pass` continues with the cluster's own tiers, `Final` allows.
    #[arg(long, value_enum, default_value_t = FederatedAllow::Pass, help_heading = "Hub")]
    federated_allow: FederatedAllow,
    /// Address for agents (mutual TLS).
    #[arg(long, value_name = "ADDRESS", help_heading = "Nodes")]
    agent_listen: SocketAddr,
    /// Address for nodes that enrol with a node token (server certificate only).
    #[arg(long, value_name = "ADDRESS", help_heading = "Nodes")]
    enrol_listen: SocketAddr,
    /// Validity of the certificates of nodes, in seconds. Agents renew them after two thirds of this time.
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400, help_heading = "Nodes",
          value_parser = clap::value_parser!(u64).range(2..=7_776_000))]
    node_certificate_seconds: u64,
    /// Service account of the agents: nodes enrol with its tokens that are bound to a pod, and need no node tokens.
    #[arg(long, value_name = "NAMESPACE/NAME", help_heading = "Nodes", value_parser = namespaced)]
    agent_service_account: Option<(String, String)>,
    /// Audience that the service-account tokens of agents must have.
    #[arg(long, value_name = "AUDIENCE", default_value = "hanse-member", help_heading = "Nodes")]
    agent_audience: String,
    /// ConfigMap in which the member keeps the certificate of the cluster's authority for agents, under `authority.pem`.
    #[arg(long, value_name = "NAMESPACE/NAME", help_heading = "Nodes", value_parser = namespaced)]
    authority_config_map: Option<(String, String)>,
    /// Service without a selector through which agents reach the member that serves: it writes the EndpointSlice NAME-leader.
    #[arg(long, value_name = "NAMESPACE/NAME", help_heading = "Nodes", value_parser = namespaced, requires_all = ["state_secret", "agent_address"])]
    agent_service: Option<(String, String)>,
    /// Address of this process in the EndpointSlice of --agent-service: of its pod.
    #[arg(long, value_name = "IP", help_heading = "Nodes")]
    agent_address: Option<IpAddr>,
    /// Verdict for traffic of pods without rules, such as new pods.
    #[arg(long, value_enum, default_value_t = Unknown::Deny, help_heading = "Nodes")]
    unknown_pods: Unknown,
    /// What happens to denied packets. Observe: they are logged as observed and pass, and no policy counts as enforced. The label
    /// `hanse.dev/enforcement` of a Node overrides this.
    #[arg(long, value_enum, default_value_t = EnforcementMode::Enforce, help_heading = "Nodes")]
    enforcement: EnforcementMode,
    /// Give nodes that come later the taint `hanse.dev/agent-not-ready:NoSchedule` until their agents have rules (needs the right to
    /// `patch` `nodes`).
    #[arg(long, help_heading = "Nodes")]
    taint_new_nodes: bool,
    /// Label of the nodes on which agents run; repeat it where they need several. With --taint-new-nodes: other nodes get no taint, and a
    /// node whose labels no longer match is freed of it.
    #[arg(long, value_name = "KEY=VALUE", default_value = "kubernetes.io/os=linux", help_heading = "Nodes", value_parser = label)]
    agent_node_label: Vec<(String, String)>,
    /// Remove the taint of --taint-new-nodes from all nodes: for a cluster whose agents are removed.
    #[arg(long, help_heading = "Nodes", conflicts_with = "taint_new_nodes")]
    remove_node_taints: bool,
    /// Serve health and readiness over HTTP at this address.
    #[arg(long, value_name = "ADDRESS", help_heading = "Observability")]
    health_listen: Option<SocketAddr>,
    #[command(flatten)]
    metrics: MetricsOptions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FederatedAllow {
    #[value(name = "Pass")]
    Pass,
    #[value(name = "Final")]
    Final,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EnforcementMode {
    #[value(name = "Enforce")]
    Enforce,
    #[value(name = "Observe")]
    Observe,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Unknown {
    #[value(name = "Deny")]
    Deny,
    #[value(name = "Allow")]
    Allow,
}

fn main() -> ExitCode {
    match run(settings::parse(&[])) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            text::note(format_args!("hanse-member: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(cli: Cli) -> anyhow::Result<()> {
    logging::init(cli.log_format);
    tls::install_provider();
    match cli.command {
        Command::NodeToken { command } => node_token(command),
        Command::Join(args) => join(args).await,
        Command::Node { command } => node(command),
        Command::Flows(args) => print_flows(&args),
        Command::Forget(args) => forget(args),
        Command::Run(args) => {
            let args = *args;
            let shutdown = Shutdown::default();
            let source = location(args.source, args.kubeconfig, args.context)?;
            let needs_server = args.agent_service_account.is_some()
                || args.authority_config_map.is_some()
                || args.state_secret.is_some();
            anyhow::ensure!(
                !needs_server || matches!(source, Location::Kubernetes(_)),
                "--state-secret, --agent-service-account and --authority-config-map are for --source kubernetes"
            );
            let options = Options {
                data: args.data,
                cluster: args.cluster,
                hubs: args.hub,
                join: args.join,
                token_file: args.token_file,
                source,
                state: args.state_secret.map(|(namespace, name)| SecretName { namespace, name }),
                agent_service: args
                    .agent_service
                    .zip(args.agent_address)
                    .map(|((namespace, name), address)| AgentService { namespace, name, address }),
                agent_account: args.agent_service_account.map(|(namespace, name)| AgentAccount {
                    namespace,
                    name,
                    audience: args.agent_audience,
                }),
                authority_config_map: args
                    .authority_config_map
                    .map(|(namespace, name)| ConfigMapName { namespace, name }),
                agent_listen: args.agent_listen,
                enrol_listen: args.enrol_listen,
                federated_allow_final: args.federated_allow == FederatedAllow::Final,
                node_lifetime: Duration::from_secs(args.node_certificate_seconds),
                unknown_pods: match args.unknown_pods {
                    Unknown::Deny => UnknownPods::Deny,
                    Unknown::Allow => UnknownPods::Allow,
                },
                enforcement: match args.enforcement {
                    EnforcementMode::Enforce => Enforcement::Enforce,
                    EnforcementMode::Observe => Enforcement::Observe,
                },
                node_taints: match (args.taint_new_nodes, args.remove_node_taints) {
                    (true, _) => NodeTaints::Until(args.agent_node_label.into_iter().collect()),
                    (false, true) => NodeTaints::Remove,
                    (false, false) => NodeTaints::Leave,
                },
                health_listen: args.health_listen,
                metrics: args.metrics,
            };
            let elected = OnceLock::new();
            let running = process::run_elected(options, shutdown.clone(), &elected);
            let ended = tokio::select! {
                ended = running => ended,
                signalled = shutdown.wait_for_signal() => signalled.context("wait for a signal"),
            };
            let has_ended = shutdown.drain(DRAIN).await;
            // Only when nothing is served any more.
            if let Some(leadership) = elected.get().filter(|_| has_ended) {
                leadership.release().await;
            }
            ended?;
            shutdown.outcome()
        }
    }
}

/// Reads NAMESPACE/NAME.
fn namespaced(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('/').filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty());
    let (namespace, name) = parts.ok_or_else(|| format!("\"{text}\" is not NAMESPACE/NAME"))?;
    match name.contains('/') {
        true => Err(format!("\"{text}\" is not NAMESPACE/NAME")),
        false => Ok((namespace.to_owned(), name.to_owned())),
    }
}

/// A label of nodes.
fn label(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('=').filter(|(key, value)| !key.is_empty() && !value.contains(['=', ',']));
    let (key, value) = parts.ok_or_else(|| format!("\"{text}\" is not KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

/// The location that `--source` names.
fn location(source: PathBuf, kubeconfig: Option<PathBuf>, context: Option<String>) -> anyhow::Result<Location> {
    if source.as_os_str() == "kubernetes" {
        return Ok(Location::Kubernetes(Access { kubeconfig, context }));
    }
    anyhow::ensure!(
        kubeconfig.is_none(),
        "--kubeconfig is for --source kubernetes; the source is the directory {}",
        source.display()
    );
    Ok(Location::Directory(source))
}

async fn join(args: JoinArgs) -> anyhow::Result<()> {
    let _lock = process::lock_data(&args.data)?;
    anyhow::ensure!(
        !State::of_member(&args.data)?.is_in_secrets(),
        "the state of the member of {} is in Secrets: remove member.pem from the first of them, and start the member with a new token",
        args.data.display()
    );
    let is_final = args.federated_allow == FederatedAllow::Final;
    let shutdown = Shutdown::default();
    let stop = shutdown.token();
    let joining = MemberIdentity::join(&args.data, &args.cluster, &args.token_file, &args.join, is_final, &stop);
    tokio::select! {
        joined = joining => joined.map(drop).context("join"),
        signalled = shutdown.wait_for_signal() => signalled.context("wait for a signal"),
    }
}

/// The state of a member that has joined. Fails otherwise, so that a typo in the path is not taken for an empty member.
fn joined_state(data: &Path) -> anyhow::Result<State> {
    let state = State::of_member(data)?;
    anyhow::ensure!(has_joined(&state)?, "{} is not the directory of a member that has joined", data.display());
    Ok(state)
}

/// Whether the state contains the member's certificate, the last file that a join writes.
fn has_joined(state: &State) -> anyhow::Result<bool> {
    Ok(state.version(MEMBER_FILE).with_context(|| format!("read {MEMBER_FILE}"))?.is_some())
}

/// The identity in a state. If `cluster` is given, it must be the identity of that cluster.
fn identity_of(state: &State, cluster: Option<&str>) -> anyhow::Result<MemberIdentity> {
    let pem = state.read_key(MEMBER_FILE).with_context(|| format!("read {MEMBER_FILE}"))?;
    let own = Credentials::from_pem(&pem.context("the files of the member are missing")?)?;
    let Identity::Cluster(own) = own.identity() else {
        anyhow::bail!("{MEMBER_FILE} is not the certificate of a cluster")
    };
    MemberIdentity::read(state, cluster.unwrap_or(own))?.context("the files of the member are missing")
}

/// Waits at most `patience` for the member's certificate.
fn wait_until_joined(data: &Path, patience: Duration) -> anyhow::Result<State> {
    const LOOK_EVERY: Duration = Duration::from_millis(50);
    const LOOK_IN_SECRETS_EVERY: Duration = Duration::from_millis(500);
    let start = Instant::now();
    let mut said = false;
    loop {
        let state = State::of_member(data)?;
        if has_joined(&state)? {
            return Ok(state);
        }
        if start.elapsed() >= patience {
            return joined_state(data);
        }
        if !said && start.elapsed() > Duration::from_secs(1) {
            said = true;
            let (data, seconds) = (data.display(), patience.as_secs());
            text::note(format_args!(
                "waiting up to {seconds} s for the cluster of {data} to join: it has no {MEMBER_FILE} yet; hanse-member run or join writes \
                 it"
            ));
        }
        std::thread::sleep(if state.is_in_secrets() { LOOK_IN_SECRETS_EVERY } else { LOOK_EVERY });
    }
}

fn print(output: Output, value: &impl serde::Serialize) -> anyhow::Result<()> {
    match output {
        Output::Yaml => write!(text::stdout(), "{}", text::yaml(value)?)?,
        Output::Table | Output::Json => text::line(serde_json::to_string(value)?)?,
    }
    Ok(())
}

fn print_list(
    output: Output,
    kind: &'static str,
    items: impl Iterator<Item = serde_json::Value>,
) -> anyhow::Result<()> {
    print(output, &Versioned::new(kind, Items { items: items.collect::<Vec<_>>() }))
}

fn print_flows(args: &FlowsArgs) -> anyhow::Result<()> {
    let state = joined_state(&args.data)?;
    anyhow::ensure!(
        state.has_current_caches().context("find out which member leads")?,
        "another member of the cluster leads, and has the records of its flows: run this command in its pod"
    );
    let decision = args.decision.map(|decision| match decision {
        Decision::Allowed => "allowed",
        Decision::Denied => "denied",
        Decision::Cut => "cut",
        Decision::Observed => "observed",
    });
    let pod = match &args.pod {
        Some(pod) => Some(pod.split_once('/').context("--pod is NAMESPACE/NAME")?),
        None => None,
    };
    let is_pod = |party: &Party, (namespace, name): (&str, &str)| {
        party.pod.as_ref().is_some_and(|it| (&*it.namespace, &*it.name) == (namespace, name))
    };
    let wanted = |record: &Record<'_>| {
        (!args.would_change || record.would_change())
            && decision.is_none_or(|decision| record.decision == decision)
            && pod.is_none_or(|pod| is_pod(&record.from, pod) || is_pod(&record.to, pod))
    };
    let records = flows::read(&args.data, args.last as usize, wanted)
        .with_context(|| format!("read the flows in {}", args.data.display()))?;
    match args.output {
        Output::Table => write!(text::stdout(), "{}", flow_table(&records))?,
        output => records.iter().try_for_each(|record| print(output, record))?,
    }
    Ok(())
}

/// The verdicts of policy, to be printed next to the decision of the kernel. The reason is that of the deciding direction.
fn flow_table(records: &[Record<'_>]) -> String {
    let mut table = format!(
        "{:<20}  {:<20} {:<8} {:>6}  {:<40} {:<40} {:<12} {:<7} {:<7} REASON\n",
        "LAST AT", "NODE", "DECISION", "COUNT", "FROM", "TO", "PROTOCOL", "POLICY", "STAGED"
    );
    for record in records {
        let protocol = match (record.port, &record.icmp) {
            (Some(port), _) => format!("{} {port}", record.protocol),
            (None, Some(icmp)) => format!("{} {}/{}", record.protocol, icmp.kind, icmp.code),
            (None, None) => record.protocol.clone(),
        };
        let policy = &record.policy;
        let (egress, ingress, verdict) = match (&policy.staged.egress, &policy.staged.ingress) {
            (Some(egress), Some(ingress)) if record.would_change() => (egress, ingress, &policy.staged.verdict),
            _ => (&policy.egress, &policy.ingress, &policy.verdict),
        };
        let decides = if egress.verdict == *verdict { egress } else { ingress };
        let row = format!(
            "{:<20}  {:<20} {:<8} {:>6}  {:<40} {:<40} {:<12} {:<7} {:<7} {}",
            record.last_at,
            record.node,
            record.decision,
            record.count,
            record.from.to_string(),
            record.to.to_string(),
            protocol,
            policy.verdict,
            policy.staged.verdict,
            decides.reason(),
        );
        table.push_str(&text::one_line(&row));
        table.push('\n');
    }
    table
}

fn node_token(command: NodeTokenCommand) -> anyhow::Result<()> {
    match command {
        NodeTokenCommand::Create(args) => {
            let state = wait_until_joined(&args.data, Duration::from_secs(args.wait_seconds))?;
            let identity = identity_of(&state, args.cluster.as_deref())?;
            let created = create_node_token(&state, &identity, &args.node, Duration::from_secs(args.seconds))?;
            let node = &args.node;
            if created.known == Some(false) {
                text::note(format_args!(
                    "warning: the source of {} has no node {node}; the token was created nevertheless",
                    identity.cluster()
                ));
            }
            match args.output {
                Output::Table => text::line(format_args!("{}", created.text))?,
                output => {
                    let ends_at = rfc3339(created.expires_at);
                    let token = json!({"id": created.id, "node": node, "endsAt": ends_at, "token": created.text});
                    print(output, &Versioned::new("NodeToken", token))?;
                }
            }
        }
        NodeTokenCommand::List(ListArgs { data, output }) => {
            let tokens = list_node_tokens(&joined_state(&data)?)?;
            let state = |token: &NodeToken| match (token.is_used(), token.has_ended(SystemTime::now())) {
                (_, true) => "ended",
                (true, false) => "used",
                (false, false) => "unused",
            };
            let rows = tokens.iter().map(|(id, token)| (id, &token.node, rfc3339(token.expires_at()), state(token)));
            if matches!(output, Output::Table) {
                text::line(format_args!("{:<18} {:<32} {:<20}  STATE", "ID", "NODE", "ENDS AT"))?;
                for (id, node, ends_at, state) in rows {
                    text::line(format_args!("{id:<18} {node:<32} {ends_at:<20}  {state}"))?;
                }
            } else {
                let one =
                    |(id, node, ends_at, state)| json!({"id": id, "node": node, "endsAt": ends_at, "state": state});
                print_list(output, "NodeTokenList", rows.map(one))?;
            }
        }
        NodeTokenCommand::Revoke { data, id } => {
            anyhow::ensure!(
                revoke_node_token(&joined_state(&data)?, &id)?,
                "node token {id} does not exist: see `hanse-member node-token list`"
            );
            text::line(format_args!("node token {id} revoked"))?;
        }
    }
    Ok(())
}

fn node(command: NodeCommand) -> anyhow::Result<()> {
    match command {
        NodeCommand::List(ListArgs { data, output }) => {
            let nodes = list_nodes(&joined_state(&data)?)?;
            let state = |node: &NodeRecord| match (node.revoked, node.ends_at() < SystemTime::now()) {
                (true, _) => "revoked",
                _ if node.is_awaited() => "may enrol",
                (false, true) => "certificate ended",
                (false, false) => "enrolled",
            };
            // Records of earlier versions have no time.
            let time = |at: SystemTime| if at == SystemTime::UNIX_EPOCH { "-".to_owned() } else { rfc3339(at) };
            let rows = nodes.iter().map(|it| (&it.node, time(it.enrolled_at()), time(it.ends_at()), state(it)));
            if matches!(output, Output::Table) {
                text::line(format_args!("{:<32} {:<20}  {:<20}  STATE", "NODE", "ENROLLED AT", "CERTIFICATE ENDS AT"))?;
                for (node, enrolled_at, ends_at, state) in rows {
                    text::line(format_args!("{node:<32} {enrolled_at:<20}  {ends_at:<20}  {state}"))?;
                }
            } else {
                let one = |(node, enrolled_at, ends_at, state)| json!({"node": node, "enrolledAt": enrolled_at, "certificateEndsAt": ends_at, "state": state});
                print_list(output, "EnrolledNodeList", rows.map(one))?;
            }
        }
        NodeCommand::Allow { data, node } => {
            allow_node(&joined_state(&data)?, &node)?;
            text::line(format_args!("node {node} may enrol again"))?;
        }
        NodeCommand::Revoke { data, node } => {
            revoke_node(&joined_state(&data)?, &node)?;
            text::line(format_args!(
                "node {node} revoked; its current rules stay in its kernel, and it receives no further ones"
            ))?;
        }
    }
    Ok(())
}

fn forget(args: ForgetArgs) -> anyhow::Result<()> {
    let ForgetArgs { data, objects, all, output } = args;
    let state = joined_state(&data)?;
    let kept = source::kept_objects(&state).with_context(|| format!("read the kept objects in {}", data.display()))?;
    let objects = match all {
        true => kept.clone(),
        false => {
            if let Some(other) = objects.iter().find(|it| !kept.contains(*it)) {
                anyhow::bail!(
                    "{other} is not a kept object: `hanse-member forget --data {}` lists them",
                    data.display()
                );
            }
            objects
        }
    };
    if objects.is_empty() && !all {
        return match output {
            Output::Table if kept.is_empty() => Ok(text::line("no object is kept")?),
            Output::Table => Ok(kept.iter().try_for_each(text::line)?),
            output => print_list(output, "KeptObjectList", kept.iter().map(|name| json!({"object": name}))),
        };
    }
    let count = objects.len();
    source::forget(&state, objects, all).map_err(|error| match error.kind() {
        std::io::ErrorKind::TimedOut => anyhow::anyhow!("the member of {} does not run", data.display()),
        _ => anyhow::Error::new(error).context("write the request"),
    })?;
    text::line(format_args!("{count} {} forgotten", if count == 1 { "object" } else { "objects" }))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_of_flows_names_the_node_that_decided() {
        let direction = json!({"verdict": "deny", "trace": []});
        let end = |ip| json!({"ip": ip});
        let record = |node: &str| {
            let record = json!({
                "firstAt": "a", "lastAt": "2030-01-01T00:00:00Z", "judgedAt": "a", "node": node, "decision": "allowed", "count": 1,
                "from": end("10.0.0.1"), "to": end("10.0.0.2"), "protocol": "TCP", "port": 80, "verdict": "deny",
                "egress": direction, "ingress": direction, "staged": {"verdict": "deny"}, "form": "compiled",
                "hubRevision": 1, "localRevision": 1,
            });
            serde_json::from_value::<Record<'static>>(record).expect("a record")
        };
        let table = flow_table(&["node-1", "node-2"].map(record));
        let columns = table.lines().map(|line| line.split_whitespace().nth(1).unwrap_or_default().to_owned());
        assert_eq!(columns.skip(1).collect::<Vec<_>>(), ["node-1", "node-2"], "{table}");
        assert!(table.starts_with("LAST AT               NODE  "), "{table}");
    }
}
