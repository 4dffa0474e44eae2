//! The hub as a whole: its store, its listeners and its background tasks.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use hanse_identity::context::Context;
use hanse_identity::keys::{Credentials, Key};
use hanse_identity::tls::{
    Connections, CredentialStore, IncomingLimits, Peer, PresentedAuthority, ServerTls, Trust, http2_server, incoming,
};
use hanse_identity::{Identity, TrustDomain};
use hanse_kubernetes::election;
use hanse_kubernetes::metrics::MetricsReview;
use hanse_proto::federation::v1::administration_server::AdministrationServer;
use hanse_proto::federation::v1::exchange_server::ExchangeServer;
use hanse_proto::federation::v1::inquiries_server::InquiriesServer;
use hanse_proto::federation::v1::questions_server::QuestionsServer;
use hanse_proto::federation::v1::registration_server::RegistrationServer;
use hanse_proto::federation::v1::renewal_server::RenewalServer;
use hanse_runtime::files;
use hanse_runtime::health::{Condition, Health};
use hanse_runtime::metrics::Metrics;
use hanse_runtime::monitor::{MetricsOptions, Reviews, serve_health, serve_metrics};
use hanse_runtime::shutdown::Shutdown;
use hanse_store::{Prefix, Store, StoreError, StoreUrl};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tracing::{error, info, warn};

use crate::administration::{Administration, create_user, refused};
use crate::admission;
use crate::authority::{Authority, Lifetimes};
use crate::backup;
use crate::exchange::service::Service;
use crate::management::Monitor;
use crate::metrics::HubMetrics;
use crate::operator::{self, Operator};
use crate::questions::{self, Questions};
use crate::registration::Registration;
use crate::registry::{Clock, Registry, begin_epoch};
use crate::roles::Role;
use crate::sealed::{self, UnlockKey};
use crate::status::Realisations;
use crate::transfer;
use crate::volume;
use hanse_exchange::limits::MAX_MESSAGE_BYTES;
use hanse_kubernetes::Access;

/// The largest request of the administration: a manifest of 256 KiB with room.
const MAX_REQUEST_BYTES: usize = 1 << 20;
/// The largest request on the join listener: a token and two requests are below 20 KiB.
const MAX_JOIN_BYTES: usize = 64 << 10;
/// The join listener accepts connections without a client certificate: few, and each of them short.
const JOIN_LIMITS: IncomingLimits = IncomingLimits {
    connections: 512,
    per_identity: None,
    // A join is one call of less than a second.
    per_address: Some(16),
    per_network: Some(64),
    handshakes: 64,
    per_second: Some(10.0),
    lifetime: Some(Duration::from_secs(30)),
    stalls_after: Duration::from_secs(5),
};
/// How long streams may take to end when the hub stops.
const DRAIN: Duration = Duration::from_secs(5);

/// How often metrics and readiness are updated.
const OBSERVED_EVERY: Duration = Duration::from_secs(2);

/// How a hub runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// The folder of `ca.key` and `ca.pem`; not used with a key file.
    pub data: PathBuf,
    /// The file that unlocks the authority's key in the store.
    pub key_file: Option<PathBuf>,
    /// The store; by default `hub.redb` in the folder.
    pub store: StoreUrl,
    pub listen: SocketAddr,
    pub join_listen: SocketAddr,
    /// The addresses at which members reach this replica; none are announced by default.
    pub advertise: BTreeSet<String>,
    pub health_listen: Option<SocketAddr>,
    pub metrics: MetricsOptions,
    /// How long a cluster may be silent before its lease ends.
    pub lease: Duration,
    pub lifetimes: Lifetimes,
    /// The wall clock of registrations; TLS always uses the machine's.
    pub clock: Clock,
    /// The files are from a backup: members may have newer state, and receive everything again.
    pub restored: bool,
    /// The API server that reviews the tokens of callers of metrics.
    pub api_server: Option<Access>,
    /// The management cluster of which the operator reconciles the custom resources.
    pub operator: Option<Access>,
    /// The admission webhook of the management cluster; only with the operator.
    pub webhook: Option<admission::Options>,
}

impl Options {
    /// The defaults for a hub whose files are in `data`.
    pub fn new(data: PathBuf, listen: SocketAddr, join_listen: SocketAddr) -> Self {
        Self {
            store: default_store(&data),
            data,
            key_file: None,
            listen,
            join_listen,
            advertise: BTreeSet::new(),
            health_listen: None,
            metrics: MetricsOptions::default(),
            api_server: None,
            lease: Duration::from_secs(30),
            lifetimes: Lifetimes::default(),
            clock: Clock::default(),
            restored: false,
            operator: None,
            webhook: None,
        }
    }
}

/// A running hub.
#[derive(Debug)]
pub struct Hub {
    pub address: SocketAddr,
    pub join_address: SocketAddr,
    pub registry: Registry,
    pub authority: Authority,
    pub connections: Connections,
    pub metrics: Metrics,
}

/// Exists while `init` runs: a repeated `init` removes what an interrupted one has made.
const UNFINISHED: &str = "init.unfinished";
/// The files of `init`.
const FILES: [&str; 5] = ["ca.key", "ca.pem", "admin.key", "admin.pem", "admin.context"];

/// The store of a hub whose files are in `data`, unless another is given.
pub fn default_store(data: &Path) -> StoreUrl {
    StoreUrl::file(data.join("hub.redb"))
}

/// Makes a ClusterSet: its root authority in `data`, its store, and the first administrator with the context file
/// `admin.context`. An interrupted `init` can be repeated.
///
/// # Errors
/// When the folder is not empty, the store exists, or files cannot be written.
pub async fn init(
    data: &Path,
    store_url: &StoreUrl,
    trust_domain: &TrustDomain,
    listen: SocketAddr,
) -> anyhow::Result<()> {
    init_with(data, store_url, None, trust_domain, listen).await
}

/// As [`init`]. With an unlock key, the authority's key is in the store only, encrypted.
///
/// # Errors
/// As [`init`].
pub async fn init_with(
    data: &Path,
    store_url: &StoreUrl,
    unlock: Option<&UnlockKey>,
    trust_domain: &TrustDomain,
    listen: SocketAddr,
) -> anyhow::Result<()> {
    let unfinished = data.join(UNFINISHED);
    let own = store_url.path().filter(|path| path.starts_with(data));
    if unfinished.exists() {
        // A store elsewhere is never removed.
        for path in FILES.iter().map(|name| data.join(name)).chain(own.map(Path::to_owned)) {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {} of an interrupted init", path.display()));
                }
                _ => {}
            }
        }
    } else if ["ca.key", "ca.pem"].iter().any(|name| data.join(name).exists()) || own.is_some_and(Path::exists) {
        anyhow::bail!(
            "{} already contains a ClusterSet: serve it with `hanse-hub run`, or choose another folder",
            data.display()
        );
    } else if std::fs::read_dir(data).is_ok_and(|mut entries| entries.next().is_some()) {
        anyhow::bail!("{} is not empty: choose an empty folder for the hub", data.display());
    }
    files::private_folder(data).with_context(|| format!("make {}", data.display()))?;
    files::write_secret(&unfinished, b"").with_context(|| format!("write {}", unfinished.display()))?;
    let now = SystemTime::now();
    let authority = match unlock {
        None => Authority::create(data, trust_domain, now),
        Some(_) => Authority::create_certificate(data, trust_domain, now),
    };
    let authority = authority.context("make the root")?;
    let store = hanse_store::create(store_url).await.with_context(|| format!("create the store {store_url}"))?;
    if let Some(unlock) = unlock {
        sealed::seal(&*store, authority.ca(), unlock).await.context("fill the store")?;
    }
    let lease = Duration::from_secs(30);
    let registry =
        Registry::open(store, lease, Clock::default(), &Shutdown::default()).await.context("fill the store")?;
    registry.bind(authority.root()).await.context("fill the store")?;
    let key = Key::generate()?;
    let roles = vec![Role::Administrator];
    let public = key.public().to_string();
    create_user(&registry, &authority, &Identity::Hub, "admin", roles, &public, now)
        .await
        .context("make the administrator")?;
    let request = hanse_identity::keys::RequestedKey::from_request(&key.request()?)?;
    let identity = Identity::user("admin")?;
    let certificate = authority.ca().issue(&identity, &request, authority.lifetimes.user, now)?;
    let credentials = Credentials::new(key, certificate)?;
    credentials.key.write(&data.join("admin.key"))?;
    credentials.certificate.write(&data.join("admin.pem"))?;
    write_context(data, trust_domain, listen)?;
    std::fs::remove_file(&unfinished).with_context(|| format!("remove {}", unfinished.display()))?;
    Ok(())
}

/// Writes the context file of the first administrator.
pub(crate) fn write_context(data: &Path, trust_domain: &TrustDomain, listen: SocketAddr) -> anyhow::Result<()> {
    let context = Context {
        hubs: vec![reachable(listen).to_string()],
        trust_domain: Some(trust_domain.to_string()),
        ca: "ca.pem".into(),
        certificate: "admin.pem".into(),
        key: "admin.key".into(),
    };
    let text = serde_json::to_string_pretty(&context)? + "\n";
    files::write_secret(&data.join("admin.context"), text.as_bytes()).context("write admin.context")
}

/// Whether `data` contains a ClusterSet whose [`init`] was completed: its root key, or its store, which may contain the key.
pub fn is_initialised(data: &Path, store: &StoreUrl) -> bool {
    let file = store.path().filter(|path| path.starts_with(data));
    (data.join("ca.key").exists() || file.is_some_and(Path::exists)) && !data.join(UNFINISHED).exists()
}

/// The address of a listener for clients on this machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let loopback = match listen {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::LOCALHOST),
        SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::LOCALHOST),
    };
    let ip = if listen.ip().is_unspecified() { loopback } else { listen.ip() };
    SocketAddr::new(ip, listen.port())
}

impl Hub {
    /// Opens the store and the listeners, and serves until `shutdown`.
    ///
    /// # Errors
    /// When files or listeners cannot be opened.
    pub async fn start(options: Options, shutdown: &Shutdown) -> anyhow::Result<Self> {
        let restricted = volume::restrict_after_group_change(&options.data, &["ca.key", "admin.key", "admin.context"]);
        for path in restricted.context("restrict the files of the hub to their owner")? {
            warn!(path = %path.display(), "the group of the volume had got access to this file: mode 0600 is restored");
        }
        let data = options.data.display();
        if options.data.join(UNFINISHED).exists() {
            anyhow::bail!("`hanse-hub init` was interrupted in {data}: repeat it");
        }
        let url = &options.store;
        let file = url.path().filter(|path| path.starts_with(&options.data));
        // A missing store is not an empty one: policies and revocations would be gone.
        let authority = ["ca.key", "ca.pem"].map(|name| options.data.join(name));
        let needed = authority.iter().map(PathBuf::as_path).filter(|_| options.key_file.is_none()).chain(file);
        for path in needed {
            let name = path.file_name().unwrap_or_default().display();
            match path.try_exists() {
                Ok(true) => {}
                Ok(false) if authority[0].exists() || file.is_some_and(Path::exists) => {
                    anyhow::bail!(
                        "{name} of the ClusterSet in {data} is missing: restore all of its files from one backup, and start \
                         the hub once with --restored"
                    );
                }
                Ok(false) => anyhow::bail!("{data} does not contain a ClusterSet: create one with `hanse-hub init`"),
                Err(error) => return Err(error).with_context(|| format!("look for {name} in {data}")),
            }
        }
        let restore = "restore all files of the hub from one backup, and start it once with --restored";
        let store = match hanse_store::open(url).await {
            Ok(store) => store,
            // The store itself is not at fault.
            Err(
                error @ (StoreError::InUse
                | StoreError::Io(_)
                | StoreError::Format(_)
                | StoreError::Unavailable(_)
                | StoreError::Denied(_)
                | StoreError::Settings(_)
                | StoreError::Unsupported),
            ) => {
                return Err(error).with_context(|| format!("open the store {url}"));
            }
            Err(error) => anyhow::bail!("open the store {url}: {error}: {restore}"),
        };
        transfer::check_served(&*store).await.with_context(|| format!("open the store {url}"))?;
        // `init` creates an administrator, and the last one cannot be deleted.
        if store.list(&Prefix::new(&["user"])?).await?.entries.is_empty() {
            anyhow::bail!("open the store {url}: it was not filled by `hanse-hub init`: {restore}");
        }
        if let Some(path) = url.path() {
            backup::serve(path, store.clone(), shutdown);
        }
        Self::start_with(options, store, shutdown).await
    }

    /// As [`Self::start`], with an open store.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_with(options: Options, store: Arc<dyn Store>, shutdown: &Shutdown) -> anyhow::Result<Self> {
        let stop = shutdown.token();
        let (health, metrics) = (Health::default(), Metrics::default());
        let (serving, writing) = (health.condition("serving"), health.condition("store"));
        shutdown.tell(&health);
        if let Some(address) = options.health_listen {
            serve_health(address, &health, shutdown).await?;
        }
        let audience = options.metrics.audience.clone();
        let reviews = options.api_server.clone().map(|access| Reviews::new(MetricsReview::new(access, audience)));
        let reviews = reviews.ok_or("the hub has no access to one");
        serve_metrics(&options.metrics, &metrics, reviews, shutdown).await?;

        let authority = match &options.key_file {
            None => Authority::read(&options.data, options.lifetimes).context("read the root")?,
            Some(file) => Authority::new(sealed::unseal(&*store, file).await?, options.lifetimes),
        };
        if options.restored {
            let epoch = begin_epoch(&*store).await.context("begin a new epoch")?;
            tracing::warn!(epoch, "new epoch of the registry begun: start the hub without --restored the next time");
        }
        let registry =
            Registry::open(store, options.lease, options.clock, shutdown).await.context("read the registry")?;
        registry.bind(authority.root()).await.context("read the registry")?;
        let credentials = CredentialStore::new(authority.hub_credentials().context("issue the hub's certificate")?)?;
        let (renewing, renewed, until) = (authority.clone(), credentials.clone(), stop.clone());
        shutdown.supervise("certificate renewal", move || renewing.clone().keep_fresh(renewed.clone(), until.clone()));

        // Only leaves that the root issued, to members and users that the registry knows; checked at each handshake.
        let accept = |identity: &Identity| matches!(identity, Identity::Cluster(_) | Identity::User(_));
        let admits = registry.clone();
        let trust =
            Trust::new(authority.root(), accept)?.with_revocation(move |certificate| !admits.admits(certificate));
        let connections = Connections::default();
        writing.set(true);
        let counted = HubMetrics::new(&metrics);

        let exchange = Service::new(registry.clone(), stop.clone()).with_metrics(&counted);
        let exchange_replica = exchange.replica();
        let following = exchange.clone();
        shutdown.supervise("distribution of the registry", move || following.clone().follow_registry());
        let realisations: Arc<dyn Realisations> = Arc::new(exchange.clone());
        let closing = (registry.clone(), connections.clone(), counted.clone(), stop.clone());
        shutdown.supervise("closing of revoked connections", move || {
            let (registry, connections, metrics, stop) = closing.clone();
            close_refused(registry, connections, metrics, stop)
        });
        let (probing, until) = (registry.clone(), stop.clone());
        shutdown.supervise("store probe", move || {
            let (registry, stop) = (probing.clone(), until.clone());
            async move {
                loop {
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(OBSERVED_EVERY) => registry.probe().await,
                    }
                }
            }
        });
        let monitor = options.operator.as_ref().map(|_| Monitor::new(&election::identity()));
        let observing = (registry.clone(), Arc::clone(&realisations), writing, counted.clone(), stop.clone());
        let monitored = monitor.clone();
        shutdown.supervise("metrics", move || {
            let (registry, realisations, writing, metrics, stop) = observing.clone();
            observe(registry, realisations, writing, metrics, monitored.clone(), stop)
        });
        let questions = Questions::new(registry.clone(), stop.clone());
        let mut registration = Registration::new(registry.clone(), authority.clone(), counted.clone());
        let mut administration =
            Administration::new(registry.clone(), authority.clone(), connections.clone(), Arc::clone(&realisations));
        if let Some((access, monitor)) = options.operator.as_ref().zip(monitor) {
            administration = administration.with_management(monitor.clone());
            // Only one process can open a file.
            if options.store.path().is_none() {
                let reporting = (registry.clone(), monitor.clone(), stop.clone());
                shutdown.supervise("state of the operator", move || {
                    let (registry, monitor, stop) = reporting.clone();
                    let identity = Arc::clone(monitor.identity());
                    registry.report_operator(identity, move || monitor.record(), stop)
                });
            }
            administration = administration.with_operator(&operator::KINDS);
            registration = registration.with_operator();
            let client = access.client().await.context("start the operator")?;
            if let Some(webhook) = options.webhook {
                let webhook = admission::start(webhook, client.clone(), registry.clone(), &counted, &monitor, shutdown);
                let webhook = webhook.await;
                let webhook = webhook.context("start the webhook")?;
                webhook.set_when_usable(health.condition("webhook"), shutdown);
                administration = administration.with_webhook(webhook.state);
            }
            let operator = Operator::new(client, administration.clone(), registry.clone(), realisations, monitor);
            let operator = operator.with_metrics(&counted.operator);
            let stop = stop.clone();
            shutdown.supervise("operator", move || operator.clone().run(stop.clone()));
        }
        let routes = Routes::builder()
            .add_service(RenewalServer::new(registration.clone()).max_decoding_message_size(MAX_JOIN_BYTES))
            .add_service(AdministrationServer::new(administration).max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_service(ExchangeServer::new(exchange).max_decoding_message_size(MAX_MESSAGE_BYTES))
            .add_service(QuestionsServer::new(questions.clone()).max_decoding_message_size(questions::MAX_ANSWER_BYTES))
            .add_service(InquiriesServer::new(questions).max_decoding_message_size(MAX_REQUEST_BYTES))
            .clone()
            .routes();

        let tls = ServerTls::mutual(credentials.clone(), &trust)?;
        let main = incoming(options.listen, tls, IncomingLimits::default(), connections.clone(), stop.clone());
        let main = main.await.with_context(|| format!("listen on {}", options.listen))?;
        let tls = ServerTls::anonymous(credentials, PresentedAuthority::fixed(authority.root()))?;
        let joining = incoming(options.join_listen, tls, JOIN_LIMITS, Connections::default(), stop.clone());
        let joining = joining.await.with_context(|| format!("listen for joins on {}", options.join_listen))?;
        let (address, join_address) = (main.address(), joining.address());

        let server =
            http2_server().add_routes(routes).serve_with_incoming_shutdown(main, stop.clone().cancelled_owned());
        shutdown.essential("listener for members and users", server);
        let registration = RegistrationServer::new(registration).max_decoding_message_size(MAX_JOIN_BYTES);
        let server = http2_server()
            .timeout(Duration::from_secs(20))
            .add_service(registration)
            .serve_with_incoming_shutdown(joining, stop.clone().cancelled_owned());
        shutdown.essential("listener for joins", server);
        // Long streams do not end by themselves: their connections are closed after half of the drain time.
        let closing = connections.clone();
        shutdown.spawn("closing of connections", async move {
            stop.cancelled().await;
            tokio::time::sleep(DRAIN / 2).await;
            closing.close_where(|_| true);
        });
        if !options.advertise.is_empty() {
            let announcing = (registry.clone(), exchange_replica, options.advertise, shutdown.token());
            shutdown.supervise("announcement of addresses", move || {
                let (registry, replica, addresses, stop) = announcing.clone();
                registry.announce(replica, addresses, stop)
            });
        }
        serving.set(true);
        info!(%address, %join_address, trust_domain = %authority.trust_domain(), "hub is serving");
        Ok(Self { address, join_address, registry, authority, connections, metrics })
    }

    /// The time that [`Shutdown::drain`] gives a hub.
    pub const DRAIN: Duration = DRAIN;
}

/// Follows the registry: a revocation closes connections at once, on every replica.
async fn close_refused(registry: Registry, connections: Connections, metrics: HubMetrics, stop: CancellationToken) {
    let mut view = registry.subscribe();
    let mut lease = registry.lease_time();
    loop {
        let snapshot = view.borrow_and_update().clone();
        let now = registry.lease_time();
        if std::mem::replace(&mut lease, now) != now {
            // Members take over the interval of heartbeats when they connect: with that of a longer lease, they would count as silent.
            let is_cluster = |peer: &Peer| matches!(peer.identity(), Some(Identity::Cluster(_)));
            let closed = connections.close_where(is_cluster);
            info!(lease_seconds = now.as_secs(), closed, "the lease of clusters has changed: they connect again");
        }
        let closed = connections.close_where(|peer| !peer.closed.is_cancelled() && refused(&snapshot, peer));
        if closed > 0 {
            metrics.closed.inc_by(closed as u64);
            warn!(closed, "closed connections whose certificates are no longer admitted");
        }
        metrics.connections.set(i64::try_from(connections.len()).unwrap_or(i64::MAX));
        tokio::select! {
            () = stop.cancelled() => return,
            changed = view.changed() => if changed.is_err() { return },
            // For the count alone: a connection that is revoked during its handshake is refused after it.
            () = tokio::time::sleep(OBSERVED_EVERY) => {}
        }
    }
}

/// Updates metrics and readiness.
async fn observe(
    registry: Registry,
    realisations: Arc<dyn Realisations>,
    writing: Condition,
    metrics: HubMetrics,
    monitor: Option<Monitor>,
    stop: CancellationToken,
) {
    loop {
        let problems = monitor.as_ref().map_or(0, |it| i64::from(it.record().total));
        metrics.operator_problems.set(problems);
        // Also while a pass does not end.
        let waiting = monitor.as_ref().map_or(Duration::ZERO, Monitor::waiting_for);
        metrics.operator.queued_for(waiting);
        metrics.observe(&registry.snapshot(), &realisations.clusters());
        let seconds = registry.unavailable_for().map_or(0, |it| it.as_secs().max(1));
        metrics.store_unavailable.set(i64::try_from(seconds).unwrap_or(i64::MAX));
        if registry.failed() && writing.holds() {
            writing.set(false);
            error!("the store cannot be written: the hub accepts no changes; repair the store and restart the hub");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(OBSERVED_EVERY) => {}
        }
    }
}
