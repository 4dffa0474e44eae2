//! `hanse-member`: one cluster's inventory, its hub streams, and the fan-out to its agents.

// What others wrote is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use hanse_identity::keys::Credentials;
use hanse_identity::{Identity, tls};
use hanse_member::fanout::{
    NodeRecord, NodeToken, create_node_token, list_node_tokens, list_nodes, revoke_node, revoke_node_token,
};
use hanse_member::flows::{self, Party, Record};
use hanse_member::process::{self, Options};
use hanse_member::registration::MemberIdentity;
use hanse_ruleset::UnknownPods;
use hanse_runtime::moment::rfc3339;
use hanse_runtime::shutdown::Shutdown;
use hanse_runtime::{logging, text};
use serde_json::json;

/// How long a stop waits for tasks.
const DRAIN: Duration = Duration::from_secs(5);

/// Publishes one cluster to the hub, receives the others, and tells the cluster's agents what to enforce.
#[derive(Debug, Parser)]
#[command(name = "hanse-member", version, propagate_version = true)]
struct Cli {
    /// text or json.
    #[arg(long, global = true, default_value_t)]
    log_format: logging::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join where needed, and serve the cluster's agents.
    Run(Box<RunArgs>),
    /// Join, and no more: also a cluster that has joined before, and whose registration was revoked.
    ///
    /// The member gets a new key. The cluster's own authority keeps its key, so that agents need not enrol again: where that
    /// key is in other hands, begin with an empty folder instead.
    Join(JoinArgs),
    /// Tokens with which nodes enrol.
    NodeToken {
        #[command(subcommand)]
        command: NodeTokenCommand,
    },
    /// What kernels decided of connections of this cluster's pods, with what policy says of them, as enforced and as staged.
    ///
    /// Each line is what one node decided alike within two seconds. Everything stands in `flows/*.jsonl` in the folder, a JSON
    /// object in each line, of which the newest 64 to 128 MiB are kept; `-o json` prints such lines.
    Flows(FlowsArgs),
    /// Nodes that have enrolled.
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
}

#[derive(Debug, Args)]
struct FlowsArgs {
    /// The folder of the member's files.
    #[arg(long)]
    data: PathBuf,
    /// Only those of which policy would say something else if what is staged were enforced.
    #[arg(long)]
    would_change: bool,
    /// Only what kernels decided so.
    #[arg(long, value_enum)]
    decision: Option<Decision>,
    /// Only those from or to this pod, NAMESPACE/NAME, of this or another cluster.
    #[arg(long)]
    pod: Option<String>,
    /// The newest so many of these.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    last: u32,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Decision {
    /// They began.
    Allowed,
    /// They did not begin.
    Denied,
    /// They were under way.
    Cut,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// The folder of the member's files.
    #[arg(long)]
    data: PathBuf,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// The nodes that have enrolled: since when, until when their certificates are valid, and whether they are revoked.
    List(ListArgs),
    /// Let a node in no more, and make its tokens useless. A member that runs ends its stream within two seconds. A token
    /// that is made afterwards enrols it anew.
    Revoke {
        /// The folder of the member's files.
        #[arg(long)]
        data: PathBuf,
        /// The node's name.
        node: String,
    },
}

#[derive(Debug, Subcommand)]
enum NodeTokenCommand {
    /// Print a token, a secret, that enrols one node once.
    ///
    /// The cluster must have joined: where it is about to, since its member was started a moment ago, this waits for it.
    Create(NodeTokenArgs),
    /// The tokens that are kept: id, node, when it ends, and whether a node has used it.
    List(ListArgs),
    /// Make a token useless. A node that has enrolled with it stays.
    Revoke {
        /// The folder of the member's files.
        #[arg(long)]
        data: PathBuf,
        /// As `list` shows it.
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
    /// The folder of the member's files.
    #[arg(long)]
    data: PathBuf,
    /// The cluster's name, to be sure: the folder knows it.
    #[arg(long)]
    cluster: Option<String>,
    /// The node's name.
    #[arg(long)]
    node: String,
    /// How long the token is valid.
    #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    seconds: u64,
    /// How long to wait for the cluster to join, in seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    wait_seconds: u64,
    /// A table is the token alone, so that it can go into a file.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Args)]
struct JoinArgs {
    /// The folder of the member's files; made when absent. No `hanse-member run` may use it meanwhile.
    #[arg(long)]
    data: PathBuf,
    /// The cluster's name in its ClusterSet.
    #[arg(long)]
    cluster: String,
    /// Where the hub takes newcomers, HOST:PORT; may be given once for each replica.
    #[arg(long, required = true)]
    join: Vec<String>,
    /// A file with a join token.
    #[arg(long)]
    token_file: PathBuf,
    /// What a federated Allow means here: `Pass` leaves to this cluster's own tiers, `Final` ends.
    #[arg(long, value_enum, default_value_t = FederatedAllow::Pass)]
    federated_allow: FederatedAllow,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The folder of the member's files; made when absent.
    #[arg(long)]
    data: PathBuf,
    /// The cluster's name in its ClusterSet.
    #[arg(long)]
    cluster: String,
    /// The hub, HOST:PORT; may be given once for each replica.
    #[arg(long, required = true)]
    hub: Vec<String>,
    /// Where the hub takes newcomers, HOST:PORT; needed until the cluster has joined, and for late renewal.
    #[arg(long)]
    join: Vec<String>,
    /// A file with a join token; needed until the cluster has joined.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// A directory of Kubernetes manifests: the cluster. Where it, or a directory below it, has no manifest any more, what was read last
    /// stays in force.
    #[arg(long)]
    source: PathBuf,
    /// For agents, who show certificates.
    #[arg(long)]
    agent_listen: SocketAddr,
    /// For nodes with a node token.
    #[arg(long)]
    enrol_listen: SocketAddr,
    /// How long certificates of nodes are valid; they are renewed well before.
    #[arg(long, default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(2..=7_776_000))]
    node_certificate_seconds: u64,
    /// What a federated Allow means here: `Pass` leaves to this cluster's own tiers, `Final` ends.
    #[arg(long, value_enum, default_value_t = FederatedAllow::Pass)]
    federated_allow: FederatedAllow,
    /// What happens to pods whose rules have not arrived yet.
    #[arg(long, value_enum, default_value_t = Unknown::Deny)]
    unknown_pods: Unknown,
    /// Health and readiness over HTTP.
    #[arg(long)]
    health_listen: Option<SocketAddr>,
    /// Prometheus metrics over HTTP, on a loopback address.
    #[arg(long)]
    metrics_listen: Option<SocketAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FederatedAllow {
    #[value(name = "Pass")]
    Pass,
    #[value(name = "Final")]
    Final,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Unknown {
    #[value(name = "Deny")]
    Deny,
    #[value(name = "Allow")]
    Allow,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
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
        Command::Run(args) => {
            let shutdown = Shutdown::default();
            let options = Options {
                data: args.data,
                cluster: args.cluster,
                hubs: args.hub,
                join: args.join,
                token_file: args.token_file,
                source: args.source,
                agent_listen: args.agent_listen,
                enrol_listen: args.enrol_listen,
                federated_allow_final: args.federated_allow == FederatedAllow::Final,
                node_lifetime: Duration::from_secs(args.node_certificate_seconds),
                unknown_pods: match args.unknown_pods {
                    Unknown::Deny => UnknownPods::Deny,
                    Unknown::Allow => UnknownPods::Allow,
                },
                health_listen: args.health_listen,
                metrics_listen: args.metrics_listen,
            };
            let running = process::run(options, shutdown.clone());
            tokio::select! {
                ended = running => ended?,
                signalled = shutdown.wait_for_signal() => signalled.context("wait for a signal")?,
            }
            shutdown.drain(DRAIN).await;
            shutdown.outcome()
        }
    }
}

async fn join(args: JoinArgs) -> anyhow::Result<()> {
    let _held = process::hold(&args.data)?;
    let is_final = args.federated_allow == FederatedAllow::Final;
    let shutdown = Shutdown::default();
    let stop = shutdown.token();
    let joining = MemberIdentity::join(&args.data, &args.cluster, &args.token_file, &args.join, is_final, &stop);
    tokio::select! {
        joined = joining => joined.map(drop).context("join"),
        signalled = shutdown.wait_for_signal() => signalled.context("wait for a signal"),
    }
}

/// The identity of the member whose folder this is; of `cluster`, where that is given.
fn identity_of(data: &Path, cluster: Option<&str>) -> anyhow::Result<MemberIdentity> {
    let file = data.join("member.pem");
    anyhow::ensure!(file.exists(), "{} is the folder of no member that has joined", data.display());
    let own = Credentials::read_file(&file)?;
    let Identity::Cluster(own) = own.identity() else { anyhow::bail!("{} is of no cluster", file.display()) };
    MemberIdentity::read(data, cluster.unwrap_or(own))?.context("its files are gone")
}

/// Waits for the member's certificate, which is the last file that joining writes; at most `patience`.
fn wait_until_joined(data: &Path, patience: Duration) {
    const LOOK_EVERY: Duration = Duration::from_millis(50);
    let (file, start) = (data.join("member.pem"), Instant::now());
    let mut said = false;
    while !file.exists() && start.elapsed() < patience {
        if !said && start.elapsed() > Duration::from_secs(1) {
            said = true;
            let (file, seconds) = (file.display(), patience.as_secs());
            text::note(format_args!(
                "waiting up to {seconds} s for the cluster to join: {file} does not exist yet; hanse-member run or join \
                 writes it"
            ));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn print(output: Output, value: &serde_json::Value) -> anyhow::Result<()> {
    match output {
        Output::Yaml => write!(text::stdout(), "{}", text::yaml(value)?)?,
        Output::Table | Output::Json => text::line(format_args!("{value}"))?,
    }
    Ok(())
}

fn print_flows(args: &FlowsArgs) -> anyhow::Result<()> {
    let decision = args.decision.map(|decision| match decision {
        Decision::Allowed => "allowed",
        Decision::Denied => "denied",
        Decision::Cut => "cut",
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
        output => records.iter().try_for_each(|record| print(output, &serde_json::to_value(record)?))?,
    }
    Ok(())
}

/// The verdicts of policy beside what the kernel decided; the reason is that of the direction which decides.
fn flow_table(records: &[Record<'_>]) -> String {
    let mut table = format!(
        "{:<20}  {:<8} {:>6}  {:<40} {:<40} {:<12} {:<7} {:<7} REASON\n",
        "LAST AT", "DECISION", "COUNT", "FROM", "TO", "PROTOCOL", "POLICY", "STAGED"
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
            "{:<20}  {:<8} {:>6}  {:<40} {:<40} {:<12} {:<7} {:<7} {}",
            record.last_at,
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
            wait_until_joined(&args.data, Duration::from_secs(args.wait_seconds));
            let identity = identity_of(&args.data, args.cluster.as_deref())?;
            let created = create_node_token(&args.data, &identity, &args.node, Duration::from_secs(args.seconds))?;
            let node = &args.node;
            if created.known == Some(false) {
                text::note(format_args!(
                    "warning: the source of {} knows no node {node}; the token is made all the same",
                    identity.cluster()
                ));
            }
            match args.output {
                Output::Table => text::line(format_args!("{}", created.text))?,
                output => {
                    let ends_at = rfc3339(created.expires_at);
                    print(output, &json!({"id": created.id, "node": node, "endsAt": ends_at, "token": created.text}))?;
                }
            }
        }
        NodeTokenCommand::List(ListArgs { data, output }) => {
            let tokens = list_node_tokens(&data)?;
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
                print(output, &rows.map(one).collect())?;
            }
        }
        NodeTokenCommand::Revoke { data, id } => {
            anyhow::ensure!(
                revoke_node_token(&data, &id)?,
                "there is no node token {id}: see `hanse-member node-token list`"
            );
            text::line(format_args!("node token {id} revoked"))?;
        }
    }
    Ok(())
}

fn node(command: NodeCommand) -> anyhow::Result<()> {
    match command {
        NodeCommand::List(ListArgs { data, output }) => {
            let nodes = list_nodes(&data)?;
            let state = |node: &NodeRecord| match (node.revoked, node.ends_at() < SystemTime::now()) {
                (true, _) => "revoked",
                (false, true) => "certificate ended",
                (false, false) => "enrolled",
            };
            // Of a node that enrolled before this was kept it is not known.
            let time = |at: SystemTime| if at == SystemTime::UNIX_EPOCH { "-".to_owned() } else { rfc3339(at) };
            let rows = nodes.iter().map(|it| (&it.node, time(it.enrolled_at()), time(it.ends_at()), state(it)));
            if matches!(output, Output::Table) {
                text::line(format_args!("{:<32} {:<20}  {:<20}  STATE", "NODE", "ENROLLED AT", "CERTIFICATE ENDS AT"))?;
                for (node, enrolled_at, ends_at, state) in rows {
                    text::line(format_args!("{node:<32} {enrolled_at:<20}  {ends_at:<20}  {state}"))?;
                }
            } else {
                let one = |(node, enrolled_at, ends_at, state)| json!({"node": node, "enrolledAt": enrolled_at, "certificateEndsAt": ends_at, "state": state});
                print(output, &rows.map(one).collect())?;
            }
        }
        NodeCommand::Revoke { data, node } => {
            if !revoke_node(&data, &node)? {
                text::note(format_args!(
                    "warning: no node {node} has enrolled, and the source knows none; it is revoked all the same"
                ));
            }
            text::line(format_args!("node {node} revoked: its rules stay in its kernel, and it is told nothing more"))?;
        }
    }
    Ok(())
}
