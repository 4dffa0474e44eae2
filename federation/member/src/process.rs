//! The member as a process: it connects its source, the hub streams, the compiler, the fan-out to agents and the reports.
//!
//! After the cluster has joined, the member starts without the hub, from its source and the last received objects. With a state in Secrets,
//! several processes may run: one leads, and the others wait until they do.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hanse_api::inventory::NodeInfo;
use hanse_exchange::interest::{self, Interest};
use hanse_kubernetes::metrics::MetricsReview;
use hanse_policy::model::Layer;
use hanse_ruleset::{Enforcement, UnknownPods};
use hanse_runtime::files;
use hanse_runtime::health::{Condition, Health, Writes};
use hanse_runtime::metrics::Metrics as Registry;
use hanse_runtime::monitor::{MetricsOptions, Reviews, serve_health, serve_metrics};
use hanse_runtime::retry::Backoff;
use hanse_runtime::shutdown::Shutdown;
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::agent_service::{AgentService, keep_endpoints};
use crate::api_server::{self, AgentAccount, ConfigMapName, REVIEWS_REPORTED_AS, Reviewer};
use crate::exchange::client::Client;
use crate::fanout::Fanout;
use crate::flows::{self, Inbox};
use crate::hubs::Hubs;
use crate::leadership::Leadership;
use crate::live::Live;
use crate::metrics::{FlowMetrics, Metrics};
use crate::node_taints::{NodeTaints, keep_taints};
use crate::own_streams::Ends;
use crate::questions::{Answering, StateRequest};
use crate::registration::MemberIdentity;
use crate::report;
use crate::resolver::Resolver;
use crate::source::{Changes, Location};
use crate::state::moving::take_from_data;
use crate::state::{SecretName, State};
use crate::world::World;

/// The minimum interval between reports to the hub. A report is sent when the enforcement status changes.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// The interval between look-ups of this process's own addresses. Routes and addresses of the host may appear late, and change.
const CHECK_ADDRESSES_EVERY: Duration = Duration::from_secs(10);
/// The interval between checks of the connection to the hub.
const CHECK_HUB_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
pub struct Options {
    pub data: PathBuf,
    pub cluster: String,
    pub hubs: Vec<String>,
    pub join: Vec<String>,
    pub token_file: Option<PathBuf>,
    pub source: Location,
    /// The Secrets of the state, and the Lease that elects the process that serves. `None`: the state is in the data directory.
    pub state: Option<SecretName>,
    /// The Service at which agents reach the process that serves.
    pub agent_service: Option<AgentService>,
    /// The service account of agents that enrol with its tokens.
    pub agent_account: Option<AgentAccount>,
    /// Where agents find the cluster's authority.
    pub authority_config_map: Option<ConfigMapName>,
    pub agent_listen: SocketAddr,
    pub enrol_listen: SocketAddr,
    pub federated_allow_final: bool,
    /// The lifetime of certificates of nodes.
    pub node_lifetime: Duration,
    pub unknown_pods: UnknownPods,
    /// Of nodes whose label does not say otherwise.
    pub enforcement: Enforcement,
    pub node_taints: NodeTaints,
    pub health_listen: Option<SocketAddr>,
    pub metrics: MetricsOptions,
}

/// Joins the cluster if necessary, and runs until the shutdown.
///
/// # Errors
/// When the cluster cannot join, or a listener cannot be opened.
pub async fn run(options: Options, shutdown: Shutdown) -> anyhow::Result<()> {
    run_elected(options, shutdown, &OnceLock::new()).await
}

/// As [`run`]. `elected` is set when this process leads: the caller releases it after the shutdown.
///
/// # Errors
/// As [`run`].
pub async fn run_elected(options: Options, shutdown: Shutdown, elected: &OnceLock<Leadership>) -> anyhow::Result<()> {
    let stop = shutdown.token();
    let _lock = lock_data(&options.data)?;
    let reviews = metrics_reviews(&options);
    let mut monitoring = Monitoring::start(&options, reviews.clone(), &shutdown).await?;
    let Some((state, leadership)) = begin(&options, &monitoring, elected, &shutdown).await? else { return Ok(()) };
    if leadership.is_some() {
        monitoring.begin();
    }
    let identity = identity(&options, &state, &stop).await?;
    monitoring.joined.set(true);
    let hubs = Hubs::restore(&options.cluster, &options.data, &options.hubs, monitoring.writes.clone());
    let resolver = Resolver::restore(&options.data, hubs.all().iter().chain(&options.join));
    let identity = identity.with_resolver(resolver.clone());
    keep_fresh(&options, &identity, (&resolver, &hubs), &shutdown);
    let fanout = Fanout::new(&state, options.node_lifetime)?;
    let fanout = fanout.with_writes(monitoring.writes.clone()).with_reviewer(reviewer(&options).await?);
    let fanout = fanout.with_metrics_reviews(reviews);
    let (inbox, flows) = Inbox::new();
    let (agents, enrolment) =
        fanout.serve(&identity, options.agent_listen, options.enrol_listen, inbox, &shutdown).await?;
    tracing::info!(cluster = options.cluster, %agents, %enrolment, "member serves");
    if let (Some(service), Some(leadership), Location::Kubernetes(access)) =
        (&options.agent_service, &leadership, &options.source)
    {
        let writes = monitoring.writes.clone();
        let keeping = (access.clone(), service.clone(), leadership.clone(), writes, stop.clone());
        shutdown.supervise("Service of agents", move || {
            let (access, service, leadership, writes, stop) = keeping.clone();
            keep_endpoints(access, service, (agents, enrolment), leadership, writes, stop)
        });
    }
    if let (true, Location::Kubernetes(access)) = (options.node_taints.are_kept(), &options.source) {
        let (taints, writes) = (options.node_taints.clone(), monitoring.writes.clone());
        let keeping = (taints, access.clone(), fanout.clone(), state.clone(), writes, stop.clone());
        shutdown.supervise("taints of nodes", move || {
            let (taints, access, fanout, state, writes, stop) = keeping.clone();
            keep_taints(taints, access, fanout, state, writes, stop)
        });
    }
    let client = Client::restore(&options.data, monitoring.writes.clone(), hubs.clone()).with_leadership(leadership);
    let mut changes = start_source(&options, &state, &monitoring.writes, &shutdown)?;
    // Before the source has been read, the state of the cluster is unknown, and nothing new is published or enforced.
    let local = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        local = changes.recv() => local.context("read the source")?,
    };
    monitoring.sourced.set(true);
    let ends = EndsOf { join: options.join.clone(), hubs: hubs.clone(), resolver: resolver.clone(), agents, enrolment };
    let world = World::new(identity.cluster().clone(), options.unknown_pods, ends.now());
    let world = world.with_enforcement(options.enforcement).with_reader(client.reader());
    let live = world.live().clone();
    let (answering, requests) = Answering::new(live.clone());
    let mut member = Member {
        world,
        fanout,
        node_taints: options.node_taints.clone(),
        client: client.clone(),
        hub_received: monitoring.hub_received.clone(),
        metrics: Metrics::new(&monitoring.registry),
        writes: monitoring.writes.clone(),
    };
    // Objects that were received before this start are part of the first compilation.
    if let Some(updates) = client.take_updates() {
        member.world.receive(updates);
    }
    member.take_local(local);
    client.start(&identity, &shutdown);
    answering.start(&identity, &hubs, &shutdown);
    keep_flows(flows, live, &options, &monitoring, &shutdown);
    let inputs = Inputs { source: changes, requests, ends, watching: monitoring.watching };
    member.run(inputs, &resolver, &stop).await
}

/// Health and metrics of the process.
struct Monitoring {
    health: Health,
    registry: Registry,
    writes: Writes,
    /// Of a process that waits until it leads.
    standby: Condition,
    joined: Condition,
    sourced: Condition,
    hub_received: Condition,
    watching: Condition,
}

/// The state of the member. If it is in Secrets, waits until this process leads; `None`: it stops before.
async fn begin(
    options: &Options,
    monitoring: &Monitoring,
    elected: &OnceLock<Leadership>,
    shutdown: &Shutdown,
) -> anyhow::Result<Option<(State, Option<Leadership>)>> {
    let data = options.data.as_path();
    let (Some(name), Location::Kubernetes(access)) = (&options.state, &options.source) else {
        State::locate(data, None).context("write in --data")?;
        return Ok(Some((data.into(), None)));
    };
    State::locate(data, Some((access, name))).context("write in --data")?;
    let acquired = Leadership::acquire(access, name, &monitoring.standby, &monitoring.writes, shutdown).await?;
    let Some(leadership) = acquired else { return Ok(None) };
    let leadership = elected.get_or_init(|| leadership).clone();
    let mut backoff = Backoff::default();
    let stop = shutdown.token();
    loop {
        let opening = (data.to_owned(), access.clone(), name.clone(), monitoring.writes.clone());
        let opened = tokio::task::spawn_blocking(move || {
            let (data, access, name, writes) = opening;
            let state = State::lead(&data, &access, &name, &writes)?;
            take_from_data(&state)?;
            state.claim_caches().context("claim the caches in --data")?;
            anyhow::Ok(state)
        });
        match opened.await? {
            Ok(state) => return Ok(Some((state, Some(leadership)))),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, state = %name, "state of the member not usable: nothing is served, nodes keep their rules");
            }
        }
        if !backoff.wait(&stop).await {
            return Ok(None);
        }
    }
}

impl Monitoring {
    async fn start(options: &Options, reviews: Option<Reviews>, shutdown: &Shutdown) -> anyhow::Result<Self> {
        let (health, registry) = (Health::default(), Registry::default());
        let mut this = Self {
            standby: Condition::default(),
            joined: Condition::default(),
            sourced: Condition::default(),
            hub_received: Condition::default(),
            watching: Condition::default(),
            writes: Writes::new(&health),
            health: health.clone(),
            registry,
        };
        match &options.state {
            Some(_) => this.standby = health.condition("Lease read"),
            None => this.begin(),
        }
        shutdown.tell(&health);
        if let Some(address) = options.health_listen {
            serve_health(address, &health, shutdown).await?;
        }
        serve_metrics(&options.metrics, &this.registry, reviews.ok_or("it is for --source kubernetes"), shutdown)
            .await?;
        Ok(this)
    }

    /// From now on, the process is ready when it serves. Before, it is ready to do so when it has to.
    fn begin(&mut self) {
        self.joined = self.health.condition("joined");
        self.sourced = self.health.condition("source read");
        self.hub_received = self.health.condition("hub received");
        self.watching = self.health.condition("hub watched");
    }
}

/// The identity of the cluster: from its files, or from joining with a token.
async fn identity(options: &Options, state: &State, stop: &CancellationToken) -> anyhow::Result<MemberIdentity> {
    if let Some(identity) = MemberIdentity::read(state, &options.cluster)? {
        if options.token_file.as_deref().is_some_and(|file| identity.is_of_other_cluster_set(file)) {
            tracing::warn!(
                data = %options.data.display(),
                "token in --token-file ignored: it belongs to another ClusterSet than the state of the member. To join a hub that was set up \
                 anew, use an empty folder as --data, or empty Secrets; nodes then enrol again"
            );
        }
        return Ok(identity);
    }
    let token = options.token_file.as_ref().context("the cluster has not joined: --token-file is required")?;
    check_before_joining(options).await.context("the token is not used yet")?;
    let (cluster, join) = (&options.cluster, &options.join);
    Ok(MemberIdentity::join(state, cluster, token, join, options.federated_allow_final, stop).await?)
}

/// Starts the tasks that resolve the hubs' names and renew certificates.
fn keep_fresh(options: &Options, identity: &MemberIdentity, (resolver, hubs): (&Resolver, &Hubs), shutdown: &Shutdown) {
    let resolving = (resolver.clone(), hubs.clone(), options.join.clone(), shutdown.token());
    shutdown.supervise("resolution of names", move || {
        let (resolver, hubs, join, stop) = resolving.clone();
        resolver.keep_fresh(hubs, join, stop)
    });
    if let (Some(to), Location::Kubernetes(access)) = (&options.authority_config_map, &options.source) {
        let keeping = (access.clone(), to.clone(), identity.clone(), shutdown.token());
        shutdown.supervise("authority's ConfigMap", move || {
            let (access, to, identity, stop) = keeping.clone();
            api_server::keep_authority(access, to, identity, stop)
        });
    }
    let renewing = (identity.clone(), hubs.clone(), options.join.clone(), shutdown.token());
    shutdown.supervise("certificate renewal", move || {
        let (identity, hubs, join, stop) = renewing.clone();
        identity.keep_fresh(hubs, join, stop)
    });
}

/// Reviews the tokens of agents, if nodes enrol with them.
async fn reviewer(options: &Options) -> anyhow::Result<Option<Reviewer>> {
    let (Some(agents), Location::Kubernetes(access)) = (&options.agent_account, &options.source) else {
        return Ok(None);
    };
    Ok(Some(Reviewer::new(access.client().await?, agents.clone())))
}

/// Reviews of the tokens of callers of metrics, of this process and of its agents, which share the verdicts.
fn metrics_reviews(options: &Options) -> Option<Reviews> {
    match &options.source {
        Location::Kubernetes(access) if options.metrics.token_review => {
            Some(Reviews::new(MetricsReview::new(access.clone(), options.metrics.audience.clone())))
        }
        Location::Kubernetes(_) | Location::Directory(_) => None,
    }
}

/// Starts the thread that reads the source. After a restart, it continues with the last good state; without it, with the objects that the
/// last process kept although their kind was deleted.
fn start_source(
    options: &Options,
    state: &State,
    writes: &Writes,
    shutdown: &Shutdown,
) -> anyhow::Result<mpsc::Receiver<Changes>> {
    let (sender, receiver) = mpsc::channel::<Changes>(1);
    let (location, state, writes) = (options.source.clone(), state.clone(), writes.clone());
    let read = move || {
        let mut source = match location.open(&state, writes.clone()) {
            Ok(source) => source,
            Err(error) => panic!("the source cannot be opened: {error}"),
        };
        while !sender.is_closed() {
            let began = Instant::now();
            if let Some(changes) = source.poll()
                && sender.blocking_send(changes).is_err()
            {
                return;
            }
            std::thread::sleep(source.pause(began.elapsed()));
        }
    };
    shutdown.supervise_thread("source", read).context("start the thread that reads the source")?;
    Ok(receiver)
}

/// Starts the task that writes flow records.
fn keep_flows(
    flows: mpsc::Receiver<flows::FromNode>,
    live: Live,
    options: &Options,
    monitoring: &Monitoring,
    shutdown: &Shutdown,
) {
    let flows = Arc::new(tokio::sync::Mutex::new(flows));
    let (metrics, writes) = (FlowMetrics::new(&monitoring.registry), monitoring.writes.clone());
    let keeping = (flows, live, options.data.clone(), metrics, writes, shutdown.token());
    shutdown.supervise("flow records", move || {
        let (flows, live, data, metrics, writes, stop) = keeping.clone();
        async move { flows::keep(&mut *flows.lock().await, live, data, metrics, writes, stop).await }
    });
}

/// Determines the ends of Hanse's own streams.
struct EndsOf {
    join: Vec<String>,
    hubs: Hubs,
    resolver: Resolver,
    agents: SocketAddr,
    enrolment: SocketAddr,
}

impl EndsOf {
    fn now(&self) -> Ends {
        Ends {
            hubs: self.resolver.addresses(self.hubs.configured()),
            announced: self.resolver.addresses(&self.hubs.announced()),
            joins: self.resolver.addresses(&self.join),
            agents: Some(self.agents),
            enrolment: Some(self.enrolment),
        }
    }
}

/// Checks what a member needs after it has joined, so that errors appear before the token is used.
async fn check_before_joining(options: &Options) -> anyhow::Result<()> {
    match &options.source {
        Location::Directory(path) => {
            path.read_dir().with_context(|| format!("read the directory {} (--source)", path.display()))?;
        }
        Location::Kubernetes(access) => access.check().await.context("the API server (--source kubernetes)")?,
    }
    for (listen, flag) in [(options.agent_listen, "--agent-listen"), (options.enrol_listen, "--enrol-listen")] {
        TcpListener::bind(listen).with_context(|| format!("listen on {listen} ({flag})"))?;
    }
    anyhow::ensure!(
        options.agent_listen != options.enrol_listen || options.agent_listen.port() == 0,
        "--agent-listen and --enrol-listen are both {}: use two addresses",
        options.agent_listen
    );
    // About the number of bytes that joining writes.
    let (path, data) = (options.data.join("written"), options.data.display());
    files::write_secret(&path, &[0; 16 << 10]).with_context(|| format!("write files in {data} (--data)"))?;
    std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
}

/// Creates the data directory if it does not exist, and locks it until the returned file is dropped.
///
/// # Errors
/// When it cannot be created, or another process has locked it.
pub fn lock_data(data: &Path) -> anyhow::Result<File> {
    files::private_folder(data).with_context(|| format!("create {}", data.display()))?;
    files::lock_file(&data.join("lock"), Duration::ZERO).with_context(|| format!("lock {}", data.display()))
}

struct Member {
    world: World,
    fanout: Fanout,
    node_taints: NodeTaints,
    client: Client,
    /// Objects were received from the hub, by this process or an earlier one.
    hub_received: Condition,
    metrics: Metrics,
    writes: Writes,
}

/// The inputs of a running member.
struct Inputs {
    source: mpsc::Receiver<Changes>,
    requests: mpsc::Receiver<StateRequest>,
    ends: EndsOf,
    watching: Condition,
}

fn every(period: Duration) -> Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

impl Member {
    /// Reacts to changes until `stop`.
    async fn run(mut self, mut inputs: Inputs, resolver: &Resolver, stop: &CancellationToken) -> anyhow::Result<()> {
        let (client, fanout) = (self.client.clone(), self.fanout.clone());
        let (mut received, mut acknowledged, mut resolved) = (client.changes(), fanout.changes(), resolver.changes());
        let mut written = self.writes.changes();
        let (mut report, mut addresses) = (every(REPORT_EVERY), every(CHECK_ADDRESSES_EVERY));
        let mut hub = every(CHECK_HUB_EVERY);
        let (mut is_reported, mut problems) = (false, (Vec::new(), None));
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                local = inputs.source.recv() => {
                    self.take_local(local.context("read the source")?);
                    is_reported = false;
                }
                changed = received.changed() => {
                    changed.context("receive")?;
                    if let Some(updates) = client.take_updates() {
                        self.world.receive(updates);
                        self.changed();
                    }
                    is_reported = false;
                }
                changed = acknowledged.changed() => {
                    changed.context("fan out")?;
                    is_reported = false;
                }
                changed = resolved.changed() => {
                    changed.context("resolve")?;
                    self.world.set_ends(inputs.ends.now());
                    self.changed();
                }
                Ok(()) = written.changed() => is_reported = false,
                _ = addresses.tick() => if self.world.look_at_addresses() {
                    self.changed();
                },
                // A connection that becomes silent causes no event.
                _ = hub.tick() => {
                    inputs.watching.set(client.is_watching());
                    let now = (client.problems(), client.digests_equal());
                    is_reported &= now == problems;
                    problems = now;
                }
                Some(request) = inputs.requests.recv() => request.answer(&self.world),
                _ = report.tick(), if !is_reported => {
                    self.report();
                    is_reported = true;
                }
            }
        }
    }

    /// Enforces and publishes changes of the source, and registers the interest of this cluster's policies.
    fn take_local(&mut self, changes: Changes) {
        let changed = self.world.take_local(changes);
        self.changed();
        let local = self.world.local();
        // The ranges of a node that only observes are not closed while it has no rules.
        let closed = |node: &NodeInfo| match self.world.enforcement(node) {
            Enforcement::Enforce => node.pod_ranges.clone(),
            Enforcement::Observe => Vec::new(),
        };
        // All nodes are compared: only if one has changed.
        if !changed.nodes.is_empty() || !self.fanout.has_source_nodes() {
            let ranges = local.nodes.iter().map(|(name, node)| (name.clone(), closed(node)));
            let without_agent = local.nodes.iter().filter(|(_, node)| !self.node_taints.have_agent(&node.labels));
            let without_agent = without_agent.map(|(name, _)| name.clone()).collect();
            let tainted = local.nodes.iter().filter(|(_, node)| node.agent_not_ready).map(|(name, _)| name.clone());
            self.fanout.set_source_nodes(ranges, without_agent, tainted.collect());
        }
        self.client.publish(&local.cluster, &changed);
        if !changed.policies.is_empty() {
            self.client.want(wanted(&local.layer));
        }
    }

    /// Compiles after a change, and sends the rule sets that changed to their nodes.
    fn changed(&mut self) {
        let _span = tracing::info_span!("compile").entered();
        let start = Instant::now();
        let (hub, local_revision) = (self.world.hub_position(), self.world.local_revision());
        let Some(compiled) = self.world.compile() else {
            tracing::info!("nothing received from the hub yet: nodes keep their rules, and new nodes stay closed");
            return;
        };
        self.hub_received.set(true);
        let took = start.elapsed();
        self.metrics.compiled(took);
        let nodes = compiled.changed.len();
        self.fanout.publish(compiled, hub, local_revision);
        tracing::info!(hub_revision = hub.revision, local_revision, compile_us = took.as_micros(), nodes, "compiled");
    }

    /// Reports the enforcement status to the hub.
    fn report(&self) {
        let nodes = self.fanout.realisation();
        let policies = self.client.with_receiver(|it| (it.refused().len(), it.waiting().0.len()));
        self.metrics.set(&self.world, &nodes, policies);
        let mut failing = self.writes.failing();
        failing.extend(self.fanout.review_failure().map(|error| (REVIEWS_REPORTED_AS, error)));
        self.client.report(report::realisation(&self.world, &nodes, &self.client, failing));
    }
}

/// The interest of the cluster's own policies in endpoints of other clusters. Includes staged policies, because flows contain their
/// verdicts. Named ports need no selection of their own: endpoints include their ports, and a port name refers to the pods of the
/// selection of the same end, or to pods of this cluster.
fn wanted(layer: &Layer) -> Interest {
    interest::derive(layer.policies.values().filter(|policy| !policy.host_only), interest::OWN)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use hanse_api::assemble_cluster;
    use hanse_api::manifest::{self, Manifests};
    use hanse_exchange::interest::Wanted;
    use hanse_policy::model::ClusterScope;

    use super::*;

    #[test]
    fn announced_addresses_of_the_hub_are_not_configured_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let names = ["10.0.0.1:7443", "10.0.0.2:7443", "10.0.0.3:7443"].map(str::to_owned);
        let writes = Writes::new(&hanse_runtime::health::Health::default());
        let hubs = Hubs::restore("train", folder.path(), &names[..1], writes);
        hubs.announce(&names[..2]);
        let of = |name: &String| BTreeSet::from([name.parse().expect("an address")]);
        let (agents, enrolment) = (([0; 4], 7500).into(), ([0; 4], 7501).into());
        let resolver = Resolver::restore(folder.path(), &names);
        let ends = EndsOf { join: names[2..].to_vec(), hubs, resolver, agents, enrolment }.now();
        let [hubs, announced, joins] = names.each_ref().map(of);
        assert_eq!(ends, Ends { hubs, announced, joins, agents: Some(agents), enrolment: Some(enrolment) });
    }

    #[test]
    fn staged_policies_register_the_same_interest() {
        let text = "\
apiVersion: projectcalico.org/v3
kind: KIND
metadata: {name: p, namespace: a, annotations: {hanse.dev/peers: ClusterSet}}
spec: {ingress: [{action: Deny, protocol: TCP, source: {selector: app == 'x'}, destination: {ports: [web]}}]}
";
        let of = |kind: &str| {
            let mut read = Manifests::default();
            manifest::read_bytes(&"f.yaml".into(), text.replace("KIND", kind).as_bytes(), &mut read);
            assert_eq!(read.diagnostics, []);
            wanted(&assemble_cluster(&"c".into(), read.objects).layer)
        };
        let enforced = of("NetworkPolicy");
        assert!(enforced.iter().any(|it| it.selector().canonical.contains("app")), "{enforced:?}");
        assert_eq!(of("StagedNetworkPolicy"), enforced);
        // The port name selects no further pods.
        assert!(
            enforced.iter().all(|it| it.port_names().is_empty() && *it.clusters() == ClusterScope::All),
            "{enforced:?}"
        );
        assert_eq!(enforced.len(), 1, "{enforced:?}");
    }

    #[test]
    fn too_large_own_interest_is_widened_to_everything() {
        let of = |policies: usize| {
            let policy = |at: usize| {
                format!(
                    "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\n\
                     metadata: {{name: p{at}, annotations: {{hanse.dev/peers: ClusterSet}}}}\n\
                     spec: {{ingress: [{{action: Allow, source: {{selector: \"app == '{at:0980}'\"}}}}]}}\n"
                )
            };
            let text = (0..policies).map(policy).collect::<Vec<_>>().join("---\n");
            let mut read = Manifests::default();
            manifest::read_bytes(&"f.yaml".into(), text.as_bytes(), &mut read);
            assert_eq!(read.diagnostics, []);
            wanted(&assemble_cluster(&"c".into(), read.objects).layer)
        };
        assert_eq!(of(1_000).len(), 1_000);
        assert_eq!(of(2_200), Interest::from([Arc::new(Wanted::everything())]), "2.2 MiB");
    }
}
