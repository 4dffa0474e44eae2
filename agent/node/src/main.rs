//! `hanse-agent`: enforces one node's rule sets.

// Text of other programs is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::{Args, Parser, Subcommand, ValueEnum};
use hanse_agent::enforcer::{Enforcer, Options, Started};
use hanse_agent::identity::{Enrolment, NodeIdentity, Proof};
use hanse_agent::metrics::AgentMetrics;
use hanse_agent::pod_ranges;
use hanse_agent::reviews::MemberReview;
use hanse_agent::status::{self, Status};
use hanse_agent::sync::Follower;
use hanse_agent::{backend, flows};
use hanse_dataplane::{Settings, Uplinks};
use hanse_identity::{tls, token};
use hanse_runtime::health::{Health, Writes};
use hanse_runtime::metrics::Metrics;
use hanse_runtime::moment::rfc3339;
use hanse_runtime::monitor::{MetricsOptions, Reviews, serve_health, serve_metrics};
use hanse_runtime::shutdown::Shutdown;
use hanse_runtime::text::Versioned;
use hanse_runtime::{files, logging, settings, text};
use ipnet::IpNet;
use tokio::sync::watch;

/// How long tasks may take to end.
const DRAIN: Duration = Duration::from_secs(5);

/// Enforce one node's policy in the kernel. Rules stay in force when the agent stops.
#[derive(Debug, Parser)]
#[command(name = "hanse-agent", version, propagate_version = true)]
struct Cli {
    /// Format of the log: text or json.
    #[arg(long, global = true, default_value_t)]
    log_format: logging::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Enrol the node if needed, and enforce its policy.
    Run(Box<RunArgs>),
    /// Remove all rules of Hanse from the kernel, and the connection marks that they set. All traffic of pods is allowed afterwards.
    ///
    /// The rules in the kernel name the bits of the marks. The masks given here apply to rules of earlier versions, which do not.
    Cleanup(CleanupArgs),
    /// Show the enforcement status of this node.
    Status(StatusArgs),
}

#[derive(Debug, Args)]
#[command(mut_arg("metrics-audience", |argument| argument.hide(true)))]
struct RunArgs {
    /// Directory of the agent's files; created if missing.
    #[arg(long, value_name = "DIRECTORY", help_heading = "Files")]
    data: PathBuf,
    /// Name of this node in its cluster.
    #[arg(long, help_heading = "Member")]
    node: String,
    /// Address of the cluster's member; repeatable.
    #[arg(long, value_name = "HOST:PORT", required = true, help_heading = "Member", value_parser = settings::host_port)]
    member: Vec<String>,
    /// Enrolment address of the member; required until the node has enrolled, and to renew an expired certificate.
    #[arg(long, value_name = "HOST:PORT", help_heading = "Member", value_parser = settings::host_port)]
    enrol: Option<String>,
    /// File with a node token; required until the node has enrolled, and again if the member refuses the node.
    #[arg(long, value_name = "FILE", help_heading = "Member")]
    token_file: Option<PathBuf>,
    /// File with a token of the agents' service account that is bound to the pod of this agent, in place of a node token.
    #[arg(long, value_name = "FILE", help_heading = "Member", requires = "authority", conflicts_with = "token_file")]
    service_account_token: Option<PathBuf>,
    /// File with the certificate of the cluster's authority (PEM), to which alone the service-account token is presented.
    #[arg(long, value_name = "FILE", help_heading = "Member", requires = "service_account_token")]
    authority: Option<PathBuf>,
    /// External interface of the node; repeatable. Default: interfaces with a route to more than one address outside of the node's pod
    /// ranges.
    #[arg(long, value_name = "INTERFACE", help_heading = "Enforcement")]
    uplink: Vec<String>,
    /// Pod range of the node, whose traffic is denied until the first rules arrive; repeatable. Default: the ranges that the member last
    /// sent, at enrolment or with rules.
    #[arg(long, value_name = "CIDR", help_heading = "Enforcement")]
    pod_range: Vec<IpNet>,
    #[command(flatten)]
    marks: Marks,
    /// Do not report flows to the member.
    #[arg(long, help_heading = "Observability")]
    no_flows: bool,
    /// Serve health and readiness over HTTP at this address.
    #[arg(long, value_name = "ADDRESS", help_heading = "Observability")]
    health_listen: Option<SocketAddr>,
    #[command(flatten)]
    metrics: MetricsOptions,
}

#[derive(Debug, Args)]
struct Marks {
    /// Bits of the connection mark that Hanse uses: at least 8, contiguous.
    #[arg(long, value_name = "MASK", value_parser = parse_mask, default_value = "0xffff0000", help_heading = "Enforcement")]
    ct_mark_mask: u32,
    /// Bits of the packet mark that Hanse uses while it evaluates a packet: at least 2, contiguous.
    #[arg(long, value_name = "MASK", value_parser = parse_mask, default_value = "0x00300000", help_heading = "Enforcement")]
    packet_mark_mask: u32,
}

#[derive(Debug, Args)]
struct CleanupArgs {
    /// Directory of the agent's files, which is removed as well: the node then needs to enrol again.
    #[arg(long, value_name = "DIRECTORY", help_heading = "Files")]
    data: Option<PathBuf>,
    #[command(flatten)]
    marks: Marks,
    /// Do not exit until a signal arrives: a DaemonSet would repeat the command.
    #[arg(long)]
    stay: bool,
    /// Serve health and readiness over HTTP at this address. Ready: everything is removed.
    #[arg(long, value_name = "ADDRESS", help_heading = "Observability", requires = "stay")]
    health_listen: Option<SocketAddr>,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// Directory of the agent's files.
    #[arg(long)]
    data: PathBuf,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
    Yaml,
}

fn parse_mask(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("\"{text}\" is not a 32-bit mask such as 0xffff0000"))
}

impl Marks {
    fn settings(&self, uplinks: Uplinks) -> anyhow::Result<Settings> {
        let (ct_mark_mask, packet_mark_mask) = (self.ct_mark_mask, self.packet_mark_mask);
        let settings = Settings { ct_mark_mask, packet_mark_mask, uplinks };
        settings.check()?;
        Ok(settings)
    }
}

fn main() -> ExitCode {
    let cli: Cli = settings::parse(&[]);
    logging::init(cli.log_format);
    let outcome = match cli.command {
        Command::Run(args) => run(*args),
        Command::Cleanup(args) => cleanup(&args),
        Command::Status(args) => print_status(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            text::note(format_args!("hanse-agent: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn cleanup(args: &CleanupArgs) -> anyhow::Result<()> {
    let settings = args.marks.settings(Uplinks::Detected)?;
    // An agent that runs would apply its rules again.
    let lock = args.data.as_deref().filter(|data| data.exists()).map(status::lock).transpose()?;
    let removed = backend::open(settings).and_then(|mut backend| backend.cleanup());
    removed.context("remove the rules (this needs root, or CAP_NET_ADMIN)")?;
    text::line(format_args!("All rules of Hanse are removed from the kernel of this node."))?;
    if let Some(data) = args.data.as_deref().filter(|_| lock.is_some()) {
        std::fs::remove_dir_all(data).with_context(|| format!("remove {}", data.display()))?;
        text::line(format_args!("The agent's files in {} are removed.", data.display()))?;
    }
    if args.stay { stay(args.health_listen) } else { Ok(()) }
}

/// Waits for a signal.
#[tokio::main(flavor = "current_thread")]
async fn stay(health_listen: Option<SocketAddr>) -> anyhow::Result<()> {
    let (shutdown, health) = (Shutdown::default(), Health::default());
    health.condition("rules removed").set(true);
    if let Some(address) = health_listen {
        serve_health(address, &health, &shutdown).await?;
    }
    shutdown.wait_for_signal().await.context("wait for a signal")?;
    shutdown.drain(DRAIN).await;
    shutdown.outcome()
}

fn print_status(args: &StatusArgs) -> anyhow::Result<()> {
    let mut status = Status::read(&args.data)?;
    let running = status::runs(&args.data);
    status.connected &= running;
    if !matches!(args.output, Output::Table) {
        let mut value = serde_json::to_value(&status)?;
        value["writtenAt"] = rfc3339(status.written_at()).into();
        value["running"] = running.into();
        let value = Versioned::new("AgentStatus", value);
        match args.output {
            Output::Yaml => write!(text::stdout(), "{}", text::yaml(&value)?)?,
            Output::Table | Output::Json => text::line(serde_json::to_string(&value)?)?,
        }
        return Ok(());
    }
    let stopped = "no: the last known status follows; the rules stay in the kernel";
    text::line(format_args!("node         {}", status.node))?;
    text::line(format_args!("running      {}", if running { "yes" } else { stopped }))?;
    text::line(format_args!("generation   {}.{}", status.term, status.number))?;
    text::line(format_args!("digest       {}", status.digest))?;
    text::line(format_args!("revisions    hub {}, local {}", status.hub_revision, status.local_revision))?;
    text::line(format_args!(
        "enforced     {} endpoints, {} policies, {} sets",
        status.endpoints, status.policies, status.sets
    ))?;
    text::line(format_args!("pod ranges   {}", status.ranges()))?;
    if status.observes {
        text::line("mode         Observe: what is denied is logged, and passes")?;
    }
    let in_sync = match (status.connected, running, status.not_in_sync.as_str()) {
        (true, _, "") => "yes".to_owned(),
        (_, true, why) if !why.is_empty() => format!("no: {why}"),
        _ => "no".to_owned(),
    };
    text::line(format_args!("in sync      {in_sync}"))?;
    text::line(format_args!("as of        {} ({} s ago)", rfc3339(status.written_at()), status.age_seconds()))?;
    let hooks = if status.hooks.is_empty() { "see pod traffic" } else { &status.hooks };
    text::line(format_args!("hooks        {hooks}"))?;
    text::line(format_args!("flows        {}", status.flows))?;
    for pod in &status.unenforced {
        text::line(format_args!("unenforced   {}/{}: {}", pod.namespace, pod.name, pod.reason))?;
    }
    for refused in &status.refused {
        text::line(format_args!("refused      {refused}"))?;
    }
    for problem in &status.problems {
        text::line(format_args!("problem      {problem}"))?;
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn run(args: RunArgs) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.metrics.audience.is_none(),
        "--metrics-audience is an option of the member, which requests the reviews of its agents"
    );
    tls::install_provider();
    files::private_folder(&args.data).with_context(|| format!("make {}", args.data.display()))?;
    let _lock = status::lock(&args.data)?;
    let uplinks = if args.uplink.is_empty() { Uplinks::Detected } else { Uplinks::Named(args.uplink) };
    let mut dataplane = backend::open(args.marks.settings(uplinks)?).context("open the dataplane (this needs root)")?;
    // Before the first rules: those report decisions only if the kernel supports it.
    let listening = flows::listen(args.no_flows, &mut *dataplane);
    let (flows_state, flow_states) =
        watch::channel(listening.as_ref().err().cloned().unwrap_or_else(|| "not reported yet".to_owned()));
    let (shutdown, health) = (Shutdown::default(), Health::default());
    let (stop, writes) = (shutdown.token(), Writes::new(&health));
    let metrics = Metrics::default();
    let counted = AgentMetrics::new(&metrics);
    let options = Options {
        data: args.data.clone(),
        pod_ranges: args.pod_range.iter().map(IpNet::trunc).collect(),
        writes: writes.clone(),
        metrics: counted.clone(),
    };
    // Before any member is reached: the node is closed, or as it was.
    let Started { enforcer, in_force, refused, pod_ranges, open, ended } =
        Enforcer::start(dataplane, options).context("apply the last known state (this needs root)")?;
    let in_sync = health.condition("in sync with the member");
    shutdown.tell(&health);
    if let Some(address) = args.health_listen {
        serve_health(address, &health, &shutdown).await?;
    }
    let reviewer = MemberReview::default();
    serve_metrics(&args.metrics, &metrics, Ok(Reviews::new(reviewer.clone())), &shutdown).await?;
    let (status, statuses) = watch::channel(Status::default());
    let (node, data) = (args.node, args.data);
    // Keeps the thread running when the task that follows the member ends.
    let _thread = enforcer.clone();
    let mut follower = Follower {
        node: node.clone(),
        enforcer,
        in_force,
        refused,
        pod_ranges,
        open,
        connected: false,
        not_in_sync: "no member has been reached yet".to_owned(),
        // Unique to this process.
        instance: token::random().map_err(anyhow::Error::msg)?,
        writes: writes.clone(),
        in_sync,
        metrics: counted.clone(),
        status,
    };
    follower.publish();
    let windows = listening.ok().map(|decisions| flows::collect(decisions, &shutdown));
    let windows = windows.transpose().context("start the thread that reads flows")?;
    let tasks = shutdown.clone();
    let keeping = (data.clone(), statuses, flow_states, writes.clone());
    shutdown.supervise("status file", move || {
        let (data, statuses, flow_states, writes) = keeping.clone();
        status::keep(data, statuses, flow_states, writes)
    });
    let proof = match (args.token_file, args.service_account_token, args.authority) {
        (Some(file), ..) => Some(Proof::NodeToken(file)),
        (None, Some(token_file), Some(authority_file)) => Some(Proof::ServiceAccount { token_file, authority_file }),
        (None, ..) => None,
    };
    let (member, enrolment) = (args.member, Enrolment { address: args.enrol, proof });
    let task = shutdown.spawn("member stream", async move {
        // Without an identity there is no stream; the rules in force stay.
        let identity = match NodeIdentity::read(&data, &node)? {
            Some(identity) => identity,
            None => {
                let identity = NodeIdentity::enrol(&data, &node, &enrolment, &member, &stop).await?;
                let ranges = pod_ranges::read(&data);
                match (open, ranges.is_empty()) {
                    (true, false) => follower.close(ranges).await?,
                    (true, true) => tracing::warn!("the member has no pod range of this node"),
                    (false, _) => {}
                }
                identity
            }
        };
        let renewing = (identity.clone(), member.clone(), enrolment, stop.clone());
        tasks.supervise("certificate renewal", move || {
            let (identity, members, enrolment, stop) = renewing.clone();
            identity.keep_fresh(members, enrolment, stop)
        });
        if let Some(windows) = windows {
            let windows = Arc::new(tokio::sync::Mutex::new(windows));
            let reporting = (windows, flows_state, identity.clone(), member.clone(), counted, stop.clone());
            tasks.supervise("flows", move || {
                let (windows, state, identity, members, metrics, stop) = reporting.clone();
                async move { flows::report(&mut *windows.lock().await, state, identity, members, metrics, stop).await }
            });
        }
        reviewer.enrolled(identity.clone(), member.clone());
        follower.run(identity, member, stop).await;
        anyhow::Ok(())
    });
    let failed = tokio::select! {
        // The cause before its consequence.
        biased;
        // The rules stay in force, and the next start adopts them.
        followed = task => match followed.context("follow the member")? {
            Ok(followed) => followed.err(),
            Err(panicked) => Some(panicked.into()),
        },
        () = ended.wait() => Some(anyhow!("the enforcer thread has ended: the rules stay in force and are no longer repaired")),
        signalled = shutdown.wait_for_signal() => { signalled.context("wait for a signal")?; None }
    };
    shutdown.drain(DRAIN).await;
    failed.map_or_else(|| shutdown.outcome(), Err)
}
