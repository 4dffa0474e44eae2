//! `hanse-hub`: makes a ClusterSet (`init`) and serves it (`run`).

// What others wrote is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use hanse_hub::authority::Lifetimes;
use hanse_hub::server::{Hub, Options, init};
use hanse_identity::{TrustDomain, tls};
use hanse_runtime::shutdown::Shutdown;
use hanse_runtime::{logging, text};

/// The hub of a ClusterSet: registry, trust, exchange and policy distribution.
#[derive(Debug, Parser)]
#[command(name = "hanse-hub", version, propagate_version = true)]
struct Cli {
    /// text or json.
    #[arg(long, global = true, default_value_t)]
    log_format: logging::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the root authority, the store, and the first administrator's context file DATA/admin.context.
    Init(InitArgs),
    /// Serve.
    Run(RunArgs),
}

#[derive(Debug, Args)]
struct InitArgs {
    /// The folder of the hub's files; made when absent.
    #[arg(long)]
    data: PathBuf,
    /// The name that all identities of this ClusterSet begin with.
    #[arg(long, default_value = "hanse.local")]
    trust_domain: String,
    /// Where members and users will reach the hub: written into the administrator's context.
    #[arg(long)]
    listen: SocketAddr,
    /// Where newcomers will reach the hub.
    #[arg(long)]
    join_listen: SocketAddr,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The folder of the hub's files.
    #[arg(long)]
    data: PathBuf,
    /// For members and users, who show certificates.
    #[arg(long)]
    listen: SocketAddr,
    /// For newcomers with a token.
    #[arg(long)]
    join_listen: SocketAddr,
    /// Health and readiness over HTTP.
    #[arg(long)]
    health_listen: Option<SocketAddr>,
    /// Prometheus metrics over HTTP, on a loopback address.
    #[arg(long)]
    metrics_listen: Option<SocketAddr>,
    /// How long a cluster may be silent before its endpoints count as unknown.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(5..=86_400))]
    lease_seconds: u64,
    /// How long certificates of members and of the hub are valid.
    #[arg(long, default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    certificate_seconds: u64,
    /// DATA was restored from a backup: give it once, at the first start, and members whose state is newer than the backup
    /// follow it. What was revoked or changed since the backup must be done again.
    #[arg(long)]
    restored: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            text::note(format_args!("hanse-hub: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(cli: Cli) -> anyhow::Result<()> {
    logging::init(cli.log_format);
    tls::install_provider();
    match cli.command {
        Command::Init(args) => {
            let trust_domain = TrustDomain::new(&args.trust_domain).context("read --trust-domain")?;
            init(&args.data, &trust_domain, args.listen).await?;
            let (data, listen, join_listen) = (args.data.display(), args.listen, args.join_listen);
            text::line(format_args!("A ClusterSet {trust_domain} is in {data}. Administer it with:"))?;
            text::line("")?;
            text::line(format_args!("  export HANSE_CONTEXT={data}/admin.context"))?;
            text::line("")?;
            text::line("Serve it with:")?;
            text::line("")?;
            text::line(format_args!("  hanse-hub run --data {data} --listen {listen} --join-listen {join_listen}"))?;
            Ok(())
        }
        Command::Run(args) => {
            let shutdown = Shutdown::default();
            let options = Options {
                health_listen: args.health_listen,
                metrics_listen: args.metrics_listen,
                lease: Duration::from_secs(args.lease_seconds),
                restored: args.restored,
                lifetimes: Lifetimes { leaf: Duration::from_secs(args.certificate_seconds), ..Lifetimes::default() },
                ..Options::new(args.data, args.listen, args.join_listen)
            };
            Hub::start(options, &shutdown).await?;
            shutdown.wait_for_signal().await.context("wait for a signal")?;
            shutdown.drain(Hub::DRAIN).await;
            shutdown.outcome()
        }
    }
}
