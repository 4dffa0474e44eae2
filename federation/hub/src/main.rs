//! `hanse-hub`: makes a ClusterSet (`init`), serves it (`run`), and prints its custom resource definitions (`crds`).

// Text from elsewhere is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use hanse_hub::authority::Lifetimes;
use hanse_hub::custom_resources::{self, Definition};
use hanse_hub::server::{Hub, Options, default_store, init};
use hanse_identity::{TrustDomain, tls};
use hanse_runtime::shutdown::Shutdown;
use hanse_runtime::{logging, settings, text};
use hanse_store::StoreUrl;

/// The hub of a ClusterSet: registers clusters, issues certificates, and distributes endpoints and policies.
#[derive(Debug, Parser)]
#[command(name = "hanse-hub", version, propagate_version = true)]
struct Cli {
    /// Format of the log: text or json.
    #[arg(long, global = true, default_value_t)]
    log_format: logging::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a ClusterSet: its root authority, its store and the context file DATA/admin.context of the first administrator.
    Init(InitArgs),
    /// Run the hub.
    Run(Box<RunArgs>),
    /// Print the CustomResourceDefinitions of hanse.dev as YAML, for kubectl apply --server-side -f -.
    Crds(CrdsArgs),
}

#[derive(Debug, Args)]
struct CrdsArgs {
    /// Write one file per definition into this directory instead, and remove other YAML files.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Write nothing; fail if the files of the directory differ.
    #[arg(long, requires = "directory")]
    check: bool,
}

#[derive(Debug, Args)]
struct InitArgs {
    /// Directory for the hub's files; created if missing.
    #[arg(long)]
    data: PathBuf,
    /// Store to create, as a URL: file:PATH, or etcd://HOST:PORT,…/PREFIX?SETTINGS (etcds: with TLS) [default: file:DATA/hub.redb].
    #[arg(long)]
    store: Option<StoreUrl>,
    /// SPIFFE trust domain of all identities of this ClusterSet.
    #[arg(long, default_value = "hanse.local")]
    trust_domain: String,
    /// Address for members and users; written into the administrator's context file.
    #[arg(long)]
    listen: SocketAddr,
    /// Address for clusters that join.
    #[arg(long)]
    join_listen: SocketAddr,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Directory of the hub's files.
    #[arg(long, value_name = "DIRECTORY", help_heading = "Files")]
    data: PathBuf,
    /// Store to open, as a URL: file:PATH, or etcd://HOST:PORT,…/PREFIX?SETTINGS (etcds: with TLS) [default: file:DATA/hub.redb].
    #[arg(long, value_name = "URL", help_heading = "Files")]
    store: Option<StoreUrl>,
    /// Address for members and users (mutual TLS).
    #[arg(long, value_name = "ADDRESS", help_heading = "Listeners")]
    listen: SocketAddr,
    /// Address for clusters that join with a token (server certificate only).
    #[arg(long, value_name = "ADDRESS", help_heading = "Listeners")]
    join_listen: SocketAddr,
    /// Serve health and readiness over HTTP at this address.
    #[arg(long, value_name = "ADDRESS", help_heading = "Observability")]
    health_listen: Option<SocketAddr>,
    /// Serve Prometheus metrics over HTTP at this address: a loopback address, unless a token is required.
    #[arg(long, value_name = "ADDRESS", help_heading = "Observability")]
    metrics_listen: Option<SocketAddr>,
    /// File with the bearer token that the metrics require, readable by its owner, and at most by a group of this process.
    #[arg(long, value_name = "FILE", help_heading = "Observability", requires = "metrics_listen")]
    metrics_token_file: Option<PathBuf>,
    /// Lease of a cluster. When the hub has received nothing from a cluster for this number of seconds, policies treat the cluster's
    /// endpoints as unknown.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, help_heading = "Clusters", value_parser = clap::value_parser!(u64).range(5..=86_400))]
    lease_seconds: u64,
    /// Validity of the certificates of members and of the hub, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400, help_heading = "Clusters", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    certificate_seconds: u64,
    /// Start from a restored backup. Use this option once, at the first start: members with newer state then follow the hub. Repeat
    /// revocations and changes that were made after the backup. It cannot be set by a variable or a file, which would repeat it.
    #[arg(long, help_heading = "Files")]
    restored: bool,
}

fn main() -> ExitCode {
    match run(settings::parse(&["restored"])) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            text::note(format_args!("hanse-hub: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    // One thread may be busy with the exchange; the others serve the rest.
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get().max(2));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    runtime.context("start the runtime")?.block_on(serve(cli))
}

async fn serve(cli: Cli) -> anyhow::Result<()> {
    logging::init(cli.log_format);
    tls::install_provider();
    match cli.command {
        Command::Init(args) => {
            let trust_domain = TrustDomain::new(&args.trust_domain).context("read --trust-domain")?;
            let store = args.store.unwrap_or_else(|| default_store(&args.data));
            init(&args.data, &store, &trust_domain, args.listen).await?;
            let (data, listen, join_listen) = (args.data.display(), args.listen, args.join_listen);
            let given = if store == default_store(&args.data) { String::new() } else { format!(" --store {store}") };
            text::line(format_args!("Created ClusterSet {trust_domain} in {data}. Administer it with:"))?;
            text::line("")?;
            text::line(format_args!("  export HANSE_CONTEXT={data}/admin.context"))?;
            text::line("")?;
            text::line("Serve it with:")?;
            text::line("")?;
            text::line(format_args!(
                "  hanse-hub run --data {data}{given} --listen {listen} --join-listen {join_listen}"
            ))?;
            Ok(())
        }
        Command::Crds(args) => match args.directory {
            Some(directory) => custom_resources::write(&directory, args.check),
            None => {
                let all: anyhow::Result<Vec<String>> =
                    custom_resources::definitions().iter().map(Definition::yaml).collect();
                Ok(all?.join("---\n").lines().try_for_each(text::line)?)
            }
        },
        Command::Run(args) => {
            let args = *args;
            let shutdown = Shutdown::default();
            let options = Options {
                health_listen: args.health_listen,
                metrics_listen: args.metrics_listen,
                metrics_token_file: args.metrics_token_file,
                lease: Duration::from_secs(args.lease_seconds),
                restored: args.restored,
                lifetimes: Lifetimes { leaf: Duration::from_secs(args.certificate_seconds), ..Lifetimes::default() },
                ..Options::new(args.data, args.listen, args.join_listen)
            };
            let options = Options { store: args.store.unwrap_or_else(|| options.store.clone()), ..options };
            Hub::start(options, &shutdown).await?;
            shutdown.wait_for_signal().await.context("wait for a signal")?;
            shutdown.drain(Hub::DRAIN).await;
            shutdown.outcome()
        }
    }
}
