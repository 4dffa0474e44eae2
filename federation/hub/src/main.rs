//! `hanse-hub`: makes a ClusterSet (`init`), serves it (`run`), and prints its custom resource definitions (`crds`).

// Text from elsewhere is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use hanse_exchange::hubs::{self, MAX_ANNOUNCED};
use hanse_hub::admission::{self, Address, ClientOptions};
use hanse_hub::authority::Lifetimes;
use hanse_hub::backup;
use hanse_hub::custom_resources::{self, Definition};
use hanse_hub::initialise;
use hanse_hub::sealed::{self, UnlockKey};
use hanse_hub::server::{Hub, Options, default_store, init_with, is_initialised};
use hanse_hub::transfer::{self, Copied};
use hanse_identity::{TrustDomain, tls};
use hanse_kubernetes::Access;
use hanse_runtime::monitor::MetricsOptions;
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
    /// Copy the store, as of one revision, to a new file that only its owner can read, or to the standard output. The hub may run.
    #[command(after_help = "\
Examples:
  hanse-hub backup hub.backup --data /var/lib/hanse-hub
  kubectl exec hanse-hub-0 -c hub -- hanse-hub backup - --data /data/hub > hub.backup")]
    Backup(BackupArgs),
    /// Fill a new store from a backup. Repeat the command if it was interrupted.
    #[command(after_help = "\
Examples:
  hanse-hub restore --check hub.backup
  hanse-hub restore hub.backup file:/srv/hub/hub.redb --data /srv/hub")]
    Restore(RestoreArgs),
    /// Move the store, or the authority's key into it.
    #[command(subcommand)]
    Store(StoreCommand),
}

#[derive(Debug, Args)]
struct CrdsArgs {
    /// Write one file per definition into this directory instead, and remove other YAML files.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Write nothing; fail if the files of the directory differ.
    #[arg(long, requires = "directory")]
    check: bool,
    /// Add the annotation with which Helm keeps the definitions, and all of their objects, when a release is uninstalled.
    #[arg(long)]
    helm: bool,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Copy a store to a new one, such as from a file to etcd or back, and verify the copy. Stop every hub first. The source is kept,
    /// and no longer served. Repeat the command if it was interrupted.
    Migrate {
        /// Store to copy, as a URL.
        from: StoreUrl,
        /// Store to fill, as a URL: it must not exist, or be empty.
        to: StoreUrl,
    },
    /// Put the authority's key of DATA into the store, encrypted. Afterwards a hub needs only --store and --key-file.
    Seal {
        /// Directory with ca.key and ca.pem.
        #[arg(long, value_name = "DIRECTORY")]
        data: PathBuf,
        /// Store, as a URL [default: file:DATA/hub.redb].
        #[arg(long, value_name = "URL")]
        store: Option<StoreUrl>,
        /// File with the key that encrypts the authority's key: 32 random bytes; created if missing.
        #[arg(long, value_name = "FILE")]
        key_file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct BackupArgs {
    /// File to create, or - for the standard output.
    file: PathBuf,
    /// Directory of the hub's files: ca.key, ca.pem and, with ca.key, those of the first administrator become part of the backup.
    #[arg(long, value_name = "DIRECTORY", required_unless_present = "store")]
    data: Option<PathBuf>,
    /// Store to copy, as a URL [default: file:DATA/hub.redb].
    #[arg(long, value_name = "URL")]
    store: Option<StoreUrl>,
}

#[derive(Debug, Args)]
struct RestoreArgs {
    /// Backup to read, or - for the standard input.
    file: PathBuf,
    /// Store to fill, as a URL: it must not exist, or be empty.
    #[arg(required_unless_present = "check")]
    store: Option<StoreUrl>,
    /// Directory for the files of the hub that are part of the backup; created if missing.
    #[arg(long, value_name = "DIRECTORY")]
    data: Option<PathBuf>,
    /// Only verify that the backup is complete.
    #[arg(long, conflicts_with_all = ["store", "data"])]
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
    /// Keep the authority's key in the store only, encrypted with the key in this file: 32 random bytes; created if missing. Each
    /// replica of the hub needs the same file.
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// SPIFFE trust domain of all identities of this ClusterSet.
    #[arg(long, default_value = "hanse.local")]
    trust_domain: String,
    /// Address for members and users; written into the administrator's context file.
    #[arg(long)]
    listen: SocketAddr,
    /// Address for clusters that join.
    #[arg(long)]
    join_listen: SocketAddr,
    /// Succeed without changes if the directory already contains a ClusterSet. With --key-file and a store on etcd: if the store does.
    /// Several replicas may then run this command at the same time; the one that creates the administrator says so.
    #[arg(long)]
    if_missing: bool,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Directory of the hub's files. Not needed with --store and --key-file.
    #[arg(long, value_name = "DIRECTORY", help_heading = "Files", required_unless_present_all = ["store", "key_file"])]
    data: Option<PathBuf>,
    /// File with the key that unlocks the authority's key in the store, readable by its owner, and at most by a group of this process.
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    key_file: Option<PathBuf>,
    /// Store to open, as a URL: file:PATH, or etcd://HOST:PORT,…/PREFIX?SETTINGS (etcds: with TLS) [default: file:DATA/hub.redb].
    #[arg(long, value_name = "URL", help_heading = "Files")]
    store: Option<StoreUrl>,
    /// Address for members and users (mutual TLS).
    #[arg(long, value_name = "ADDRESS", help_heading = "Listeners")]
    listen: SocketAddr,
    /// Address for clusters that join with a token (server certificate only).
    #[arg(long, value_name = "ADDRESS", help_heading = "Listeners")]
    join_listen: SocketAddr,
    /// Address at which members reach this replica; repeat it for several. The hub sends the addresses of all running replicas to
    /// members, which then connect to each of them. Without it, members connect to the addresses that they are configured with.
    #[arg(long, value_name = "HOST:PORT", help_heading = "Listeners", value_parser = advertised)]
    advertise: Vec<String>,
    /// Serve health and readiness over HTTP at this address.
    #[arg(long, value_name = "ADDRESS", help_heading = "Observability")]
    health_listen: Option<SocketAddr>,
    #[command(flatten)]
    metrics: MetricsOptions,
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
    /// Reconcile the custom resources of hanse.dev in the management cluster. They are then written with kubectl: `hanse apply`,
    /// `hanse delete` and `hanse cluster accept` are refused.
    #[arg(long, help_heading = "Operator")]
    operator: bool,
    /// File with the address and the credentials of the management cluster, for the operator and for reviews of tokens. Without it, the
    /// hub uses the service account of its pod.
    #[arg(long, value_name = "FILE", help_heading = "Operator")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig file; by default its current one.
    #[arg(long, value_name = "NAME", help_heading = "Operator", requires = "kubeconfig")]
    context: Option<String>,
    /// Serve the admission webhook for the kinds of hanse.dev over HTTPS at this address. API servers then refuse objects that the hub
    /// would not accept.
    #[arg(long, value_name = "ADDRESS", help_heading = "Operator", requires_all = ["operator", "webhook_address"])]
    webhook_listen: Option<SocketAddr>,
    /// Service of the webhook, on port 443.
    #[arg(long, value_name = "NAMESPACE/NAME", help_heading = "Operator", group = "webhook_address", requires = "webhook_listen", value_parser = Address::service)]
    webhook_service: Option<Address>,
    /// Address of the webhook for API servers, for a hub outside of their cluster: https://HOST:PORT.
    #[arg(long, value_name = "URL", help_heading = "Operator", group = "webhook_address", requires = "webhook_listen", value_parser = Address::url)]
    webhook_url: Option<Address>,
    /// Existing ValidatingWebhookConfiguration that the hub keeps up to date.
    #[arg(long, value_name = "NAME", help_heading = "Operator", default_value = admission::CONFIGURATION)]
    webhook_configuration: String,
    /// Validity of the certificates of the webhook, in seconds. They are replaced after two thirds of it.
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400, help_heading = "Operator", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    webhook_certificate_seconds: u64,
    /// File with the authorities of the client certificates that API servers present to the webhook (PEM). It is read again when it
    /// changes. Without it, the webhook answers all who reach it.
    #[arg(long, value_name = "FILE", help_heading = "Operator", requires = "webhook_listen")]
    webhook_client_ca: Option<PathBuf>,
    /// Common name of the client certificates of API servers; repeatable. Required where the authority also signs for others.
    #[arg(long, value_name = "NAME", help_heading = "Operator", requires = "webhook_client_ca")]
    webhook_client_name: Vec<String>,
}

/// An address that members can use.
fn advertised(text: &str) -> Result<String, String> {
    hubs::read(text.trim()).map_err(|error| error.to_string())
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
            if args.if_missing && is_initialised(&args.data, &store) {
                return Ok(text::line(format_args!("{} already contains a ClusterSet", args.data.display()))?);
            }
            if let Some(key_file) = args.key_file.as_deref().filter(|_| args.if_missing && store.path().is_none()) {
                let made = initialise::initialise(&args.data, &store, key_file, &trust_domain, args.listen).await?;
                let data = args.data.display();
                let what = match made {
                    true => format!(
                        "Created ClusterSet {trust_domain} in {store}. Administer it with {data}/admin.context."
                    ),
                    false => format!("{store} already contains a ClusterSet."),
                };
                return Ok(text::line(what)?);
            }
            let unlock = args.key_file.as_deref().map(UnlockKey::read_or_create).transpose()?;
            let unlock = unlock.as_ref().map(|it| &it.0);
            init_with(&args.data, &store, unlock, &trust_domain, args.listen).await?;
            let (data, listen, join_listen) = (args.data.display(), args.listen, args.join_listen);
            let mut given =
                if store == default_store(&args.data) { String::new() } else { format!(" --store {}", quoted(&store)) };
            if let Some(file) = &args.key_file {
                given = format!("{given} --key-file {}", file.display());
            }
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
        Command::Crds(args) => {
            let mut definitions = custom_resources::definitions();
            if args.helm {
                definitions = definitions.into_iter().map(Definition::kept_by_helm).collect();
            }
            match args.directory {
                Some(directory) => custom_resources::write(definitions, &directory, args.check),
                None => {
                    let all: anyhow::Result<Vec<String>> = definitions.iter().map(Definition::yaml).collect();
                    Ok(all?.join("---\n").lines().try_for_each(text::line)?)
                }
            }
        }
        Command::Run(args) => {
            let args = *args;
            anyhow::ensure!(
                args.kubeconfig.is_none() || args.operator || args.metrics.token_review,
                "--kubeconfig is for --operator and --metrics-token-review"
            );
            let data = args.data.unwrap_or_default();
            let shutdown = Shutdown::default();
            let webhook = args.webhook_listen.zip(args.webhook_service.or(args.webhook_url));
            let webhook = webhook.map(|(listen, address)| admission::Options {
                listen,
                address,
                configuration: args.webhook_configuration,
                lifetime: Duration::from_secs(args.webhook_certificate_seconds),
                clients: ClientOptions {
                    authorities: args.webhook_client_ca,
                    names: args.webhook_client_name.into_iter().collect(),
                },
            });
            anyhow::ensure!(
                args.advertise.len() <= MAX_ANNOUNCED,
                "--advertise is given {} times: a replica announces at most {MAX_ANNOUNCED} addresses",
                args.advertise.len()
            );
            let management = Access { kubeconfig: args.kubeconfig, context: args.context };
            let options = Options {
                advertise: args.advertise.into_iter().collect(),
                health_listen: args.health_listen,
                api_server: args.metrics.token_review.then(|| management.clone()),
                metrics: args.metrics,
                lease: Duration::from_secs(args.lease_seconds),
                restored: args.restored,
                key_file: args.key_file,
                operator: args.operator.then_some(management),
                webhook,
                lifetimes: Lifetimes { leaf: Duration::from_secs(args.certificate_seconds), ..Lifetimes::default() },
                ..Options::new(data, args.listen, args.join_listen)
            };
            let options = Options { store: args.store.unwrap_or_else(|| options.store.clone()), ..options };
            Hub::start(options, &shutdown).await?;
            shutdown.wait_for_signal().await.context("wait for a signal")?;
            shutdown.drain(Hub::DRAIN).await;
            shutdown.outcome()
        }
        Command::Backup(args) => {
            let store =
                args.store.or_else(|| args.data.as_deref().map(default_store)).context("give --data or --store")?;
            let file = named(&args.file);
            let made = backup::backup(&store, args.data.as_deref(), file).await?;
            let (to, bytes) = (file.map_or("the standard output".into(), |it| it.to_string_lossy()), made.bytes);
            let mut lines =
                vec![format!("Wrote {} entries of revision {} to {to} ({bytes} bytes).", made.entries, made.revision)];
            if made.has_open_key {
                lines.push("It contains the authority's key, unencrypted: keep it as safe as ca.key.".to_owned());
            } else if !made.has_authority {
                let without = "It does not contain the authority's key: back up ca.key and ca.pem, or give --data.";
                lines.push(without.to_owned());
            }
            for line in lines {
                match file {
                    Some(_) => text::line(line)?,
                    // The standard output is the backup.
                    None => text::note(line),
                }
            }
            Ok(())
        }
        Command::Restore(args) => {
            let archive = backup::read(named(&args.file))?;
            let Some(store) = args.store else {
                let (entries, revision) = (archive.entries.len(), archive.revision);
                let file = args.file.display();
                return Ok(text::line(format_args!("{file} is complete: {entries} entries of revision {revision}."))?);
            };
            let (copied, written) = backup::restore(&archive, &store, args.data.as_deref(), &mut progress).await?;
            copied_line(copied, &store)?;
            for path in written {
                text::line(format_args!("Wrote {}.", path.display()))?;
            }
            text::line("Repeat revocations and changes that were made after the backup.")?;
            Ok(())
        }
        Command::Store(StoreCommand::Migrate { from, to }) => {
            let copied = transfer::migrate(&from, &to, &mut progress).await?;
            copied_line(copied, &to)?;
            text::line(format_args!("Serve it with --store {}. {from} is kept, and no longer served.", quoted(&to)))?;
            Ok(())
        }
        Command::Store(StoreCommand::Seal { data, store, key_file }) => {
            let url = store.unwrap_or_else(|| default_store(&data));
            sealed::seal_folder(&data, &url, &key_file).await?;
            let file = key_file.display();
            text::line(format_args!("The authority's key is in {url}, encrypted with {file}. Serve it with:"))?;
            text::line("")?;
            text::line(format_args!(
                "  hanse-hub run --store {} --key-file {file} --listen … --join-listen …",
                quoted(&url)
            ))?;
            text::line("")?;
            text::line(format_args!(
                "Then keep a copy of {file} apart from the store, and delete {}.",
                data.join("ca.key").display()
            ))?;
            Ok(())
        }
    }
}

/// `None` for `-`, the standard input or output.
fn named(file: &Path) -> Option<&Path> {
    (file != Path::new("-")).then_some(file)
}

/// A URL for a shell, for which `&` and `?` have a meaning.
fn quoted(store: &StoreUrl) -> String {
    let text = store.to_string();
    if text.contains(['&', '?', ' ']) { format!("'{text}'") } else { text }
}

/// Reports how far a copy is.
fn progress(made: usize, all: usize) {
    text::note(format_args!("{made} of {all} changes written"));
}

fn copied_line(copied: Copied, to: &StoreUrl) -> anyhow::Result<()> {
    let entries = copied.entries;
    if copied.was_complete {
        text::line(format_args!("{to} was complete already: {entries} entries, verified."))?;
    } else {
        text::line(format_args!("Copied {entries} entries to {to}, and verified them."))?;
    }
    Ok(())
}
