//! `hanse-agent`: enforces one node's rule sets.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use hanse_agent::enforcer::{Enforcer, Options, Started};
use hanse_agent::identity::NodeIdentity;
use hanse_agent::status::Status;
use hanse_agent::sync::Follower;
use hanse_dataplane::Backend as _;
use hanse_dataplane::nftables::{Config, Nftables};
use hanse_runtime::health::Health;
use hanse_runtime::monitor::{Page, serve};
use hanse_runtime::shutdown::Shutdown;
use hanse_runtime::{files, logging, tls};
use ipnet::IpNet;

/// How long a stop waits for tasks.
const DRAIN: Duration = Duration::from_secs(5);

/// Enforces one node's rule sets in the kernel. Rules stay in force when it stops.
#[derive(Debug, Parser)]
#[command(name = "hanse-agent", version, propagate_version = true)]
struct Cli {
    /// text or json.
    #[arg(long, global = true, default_value_t)]
    log_format: logging::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Enrol where needed, and enforce.
    Run(Box<RunArgs>),
    /// Remove every rule of Hanse from the kernel. Pods are then open.
    Cleanup(CleanupArgs),
    /// What is in force on this node.
    Status(StatusArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The folder of the agent's files; made when absent.
    #[arg(long)]
    data: PathBuf,
    /// The node's name in its cluster.
    #[arg(long)]
    node: String,
    /// The cluster's member, HOST:PORT; may be given several times.
    #[arg(long, required = true)]
    member: Vec<String>,
    /// Where the member enrols nodes, HOST:PORT; needed until the node has enrolled.
    #[arg(long)]
    enrol: Option<String>,
    /// A file with a node token; needed until the node has enrolled.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// An interface that leads out of the node; may be given several times. Without one, those with routes to more than
    /// one address outside of the node's pod ranges.
    #[arg(long)]
    uplink: Vec<String>,
    /// A range of the node's pods, closed until the first rules arrive; may be given several times.
    #[arg(long)]
    pod_range: Vec<IpNet>,
    #[command(flatten)]
    marks: Marks,
    /// Health and readiness over HTTP.
    #[arg(long)]
    health_listen: Option<SocketAddr>,
}

#[derive(Debug, Args)]
struct Marks {
    /// Bits of the connection mark that are Hanse's: at least 8, side by side.
    #[arg(long, value_parser = parse_mask, default_value = "0xffff0000")]
    ct_mark_mask: u32,
    /// Bits of the packet mark that Hanse uses while it judges a packet: at least 2, side by side.
    #[arg(long, value_parser = parse_mask, default_value = "0x00300000")]
    packet_mark_mask: u32,
}

#[derive(Debug, Args)]
struct CleanupArgs {
    #[command(flatten)]
    marks: Marks,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// The folder of the agent's files.
    #[arg(long)]
    data: PathBuf,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn parse_mask(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("\"{text}\" is no mask of 32 bits, such as 0xffff0000"))
}

impl Marks {
    fn config(&self, uplinks: Vec<String>) -> anyhow::Result<Config> {
        let (ct_mark_mask, packet_mark_mask) = (self.ct_mark_mask, self.packet_mark_mask);
        let config = Config { ct_mark_mask, packet_mark_mask, uplinks, ..Config::default() };
        config.check()?;
        Ok(config)
    }
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    logging::init(cli.log_format);
    match cli.command {
        Command::Run(args) => run(*args),
        Command::Cleanup(args) => {
            let config = args.marks.config(Vec::new())?;
            let removed = Nftables::open(config).and_then(|mut backend| backend.cleanup());
            removed.context("remove the rules (this needs root, or CAP_NET_ADMIN)")?;
            println!("Every rule of Hanse is removed from this node's kernel.");
            Ok(())
        }
        Command::Status(args) => {
            let status = Status::read(&args.data)?;
            match args.output {
                Output::Json => println!("{}", serde_json::to_string(&status)?),
                Output::Table => {
                    println!("node         {}", status.node);
                    println!("generation   {}.{}", status.term, status.number);
                    println!("digest       {}", status.digest);
                    println!("revisions    hub {}, local {}", status.hub_revision, status.local_revision);
                    println!(
                        "enforced     {} endpoints, {} policies, {} sets",
                        status.endpoints, status.policies, status.sets
                    );
                    println!("in sync      {}", if status.connected { "yes" } else { "no" });
                    println!("as of        {} s ago", status.age_seconds());
                    let hooks = if status.hooks.is_empty() { "see the pods' packets" } else { &status.hooks };
                    println!("hooks        {hooks}");
                    for pod in &status.unenforced {
                        println!("unenforced   {}/{}: {}", pod.namespace, pod.name, pod.reason);
                    }
                    for refused in &status.refused {
                        println!("refused      {refused}");
                    }
                }
            }
            Ok(())
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(args: RunArgs) -> anyhow::Result<()> {
    tls::install_provider();
    files::private_folder(&args.data).with_context(|| format!("make {}", args.data.display()))?;
    let options = Options {
        data: args.data.clone(),
        detect_uplinks: args.uplink.is_empty(),
        dataplane: args.marks.config(args.uplink)?,
        pod_ranges: args.pod_range.iter().map(IpNet::trunc).collect(),
    };
    // Before anybody is asked: the node is closed, or as it was.
    let Started { enforcer, held, refused } =
        Enforcer::start(options).context("bring the kernel to what is known (this needs root)")?;
    let shutdown = Shutdown::default();
    let stop = shutdown.token();
    let health = Health::default();
    let in_sync = health.condition("in sync with the member");
    if let Some(address) = args.health_listen {
        serve(address, Page::Health(health), stop.clone()).await?;
    }
    let (node, data) = (args.node.clone(), args.data.clone());
    let follower = Follower { node, data, enforcer, held, refused, in_sync };
    let (member, enrol, token_file) = (args.member, args.enrol, args.token_file);
    let (data, node, begin) = (args.data, args.node, shutdown.clone());
    let task = shutdown.spawn(async move {
        let identity = match NodeIdentity::read(&data, &node)? {
            Some(identity) => identity,
            None => {
                let enrol = enrol.context("the node has not enrolled: --enrol and --token-file are needed")?;
                let token = token_file.context("the node has not enrolled: --token-file is needed")?;
                let enrolled = NodeIdentity::enrol(&data, &node, &enrol, &token, &stop).await;
                // Without an identity there is nothing to follow; the kernel keeps what it has.
                enrolled.inspect_err(|_| begin.begin())?
            }
        };
        let fresh = tokio::spawn(identity.clone().keep_fresh(member.clone(), stop.clone()));
        follower.run(identity, member, stop).await;
        let _ = fresh.await;
        anyhow::Ok(())
    });
    let failed = tokio::select! {
        signalled = shutdown.wait_for_signal() => { signalled.context("wait for a signal")?; None }
        ended = task => ended.context("follow the member")?.err(),
    };
    shutdown.drain(DRAIN).await;
    failed.map_or(Ok(()), Err)
}
