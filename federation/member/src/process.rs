//! The member as a process: source in, hub streams, compiler, fan-out to agents, report back.
//!
//! It starts with everything else down, once the cluster has joined: from its source, and from what it last received.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hanse_exchange::interest::{self, Interest};
use hanse_policy::model::Layer;
use hanse_ruleset::UnknownPods;
use hanse_runtime::files;
use hanse_runtime::health::{Condition, Health, Writes};
use hanse_runtime::metrics::Metrics as Registry;
use hanse_runtime::monitor::{self, Page};
use hanse_runtime::shutdown::Shutdown;
use tokio::sync::mpsc;

use crate::exchange::client::Client;
use crate::fanout::Fanout;
use crate::flows::{self, Inbox};
use crate::metrics::{FlowMetrics, Metrics};
use crate::own_streams::Ends;
use crate::questions::Answering;
use crate::registration::MemberIdentity;
use crate::report;
use crate::resolver::Resolver;
use crate::source::{Directory, News, Source as _};
use crate::world::World;

/// How often the source is looked at: an edit is taken at the second look, and is to apply within a second.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_millis(250);
/// Realisation is told when it changes, at most this often.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// How often this process's own addresses are looked at: routes and addresses of its host may come late, and move.
const LOOK_AT_ADDRESSES_EVERY: Duration = Duration::from_secs(10);

/// How often it is looked at whether anything comes from the hub.
const LOOK_AT_HUB_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
pub struct Options {
    pub data: PathBuf,
    pub cluster: String,
    pub hubs: Vec<String>,
    pub join: Vec<String>,
    pub token_file: Option<PathBuf>,
    pub source: PathBuf,
    pub agent_listen: SocketAddr,
    pub enrol_listen: SocketAddr,
    pub federated_allow_final: bool,
    /// How long certificates of nodes are valid.
    pub node_lifetime: Duration,
    pub unknown_pods: UnknownPods,
    pub health_listen: Option<SocketAddr>,
    pub metrics_listen: Option<SocketAddr>,
    /// The file of the bearer token that metrics require.
    pub metrics_token_file: Option<PathBuf>,
}

/// Joins where needed, and runs until the shutdown.
///
/// # Errors
/// When the cluster cannot join, or a listener cannot be opened.
pub async fn run(options: Options, shutdown: Shutdown) -> anyhow::Result<()> {
    let stop = shutdown.token();
    let _held = hold(&options.data)?;
    let (health, registry) = (Health::default(), Registry::default());
    let (joined, sourced) = (health.condition("joined"), health.condition("source read"));
    let (heard, watching) = (health.condition("hub heard"), health.condition("hub watched"));
    shutdown.tell(&health);
    let writes = Writes::new(&health);
    if let Some(address) = options.health_listen {
        monitor::serve(address, Page::Health(health.clone()), &shutdown).await?;
    }
    if let Some(address) = options.metrics_listen {
        let page = Page::metrics(&registry, options.metrics_token_file.as_deref())?;
        monitor::serve(address, page, &shutdown).await?;
    }
    let identity = match MemberIdentity::read(&options.data, &options.cluster)? {
        Some(identity) => {
            if options.token_file.as_deref().is_some_and(|file| identity.is_of_other_cluster_set(file)) {
                tracing::warn!(
                    data = %options.data.display(),
                    "the token in --token-file is of another ClusterSet than the files in --data, and is not used: where the hub was set \
                     up anew, join it with an empty folder as --data; nodes then enrol with new tokens"
                );
            }
            identity
        }
        None => {
            let token = options.token_file.as_ref().context("the cluster has not joined: --token-file is needed")?;
            check_before_joining(&options).context("the token is not used yet")?;
            let join = &options.join;
            MemberIdentity::join(&options.data, &options.cluster, token, join, options.federated_allow_final, &stop)
                .await?
        }
    };
    joined.set(true);
    let resolver = Resolver::restore(&options.data, options.hubs.iter().chain(&options.join));
    let identity = identity.with_resolver(resolver.clone());
    let (resolving, until) = (resolver.clone(), stop.clone());
    shutdown.supervise("resolution of names", move || resolving.clone().keep_fresh(until.clone()));
    let renewing = (identity.clone(), options.hubs.clone(), options.join.clone(), stop.clone());
    shutdown.supervise("certificate renewal", move || {
        let (identity, hubs, join, stop) = renewing.clone();
        identity.keep_fresh(hubs, join, stop)
    });
    let fanout = Fanout::new(&options.data, options.node_lifetime)?.with_writes(writes.clone());
    let (flows, told) = Inbox::new();
    let (agents, enrolment) =
        fanout.serve(&identity, options.agent_listen, options.enrol_listen, flows, &shutdown).await?;
    tracing::info!(cluster = options.cluster, %agents, %enrolment, "member serves");
    let ends = |resolver: &Resolver| Ends {
        hubs: resolver.addresses(&options.hubs),
        joins: resolver.addresses(&options.join),
        agents: Some(agents),
        enrolment: Some(enrolment),
    };
    let client = Client::restore(&options.data, writes.clone());

    let (news, mut local_news) = mpsc::channel::<News>(1);
    let (directory, data, kept) = (options.source.clone(), options.data.clone(), writes.clone());
    // Started again, it begins with the last good state of each file.
    let reading = move || {
        let mut source = Directory::new(directory.clone(), &data, kept.clone());
        while !news.is_closed() {
            let began = Instant::now();
            if let Some(it) = source.look()
                && news.blocking_send(it).is_err()
            {
                return;
            }
            // Of many files a look takes long, and is not to take a whole processor.
            std::thread::sleep((began.elapsed() * 4).clamp(LOOK_EVERY, LOOK_AT_LEAST_EVERY));
        }
    };
    shutdown.supervise_thread("source", reading).context("start the thread that reads the source")?;
    // Until the source was read nothing is known of this cluster, and nothing is published or enforced anew.
    let local = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        local = local_news.recv() => local.context("read the source")?,
    };
    sourced.set(true);
    let world = World::new(identity.cluster().clone(), options.unknown_pods, ends(&resolver));
    let world = world.with_reader(client.reader());
    let (live, (answering, mut requests)) = (world.live().clone(), Answering::new(world.live().clone()));
    let mut member = Member {
        world,
        fanout: fanout.clone(),
        client: client.clone(),
        heard,
        metrics: Metrics::new(&registry),
        writes: writes.clone(),
    };
    // What was received before this start counts from the first compile on.
    if let Some(updates) = client.take_updates() {
        member.world.receive(updates);
    }
    member.take_local(local);
    client.start(&identity, &options.hubs, &shutdown);
    answering.start(&identity, &options.hubs, &shutdown);
    let told = Arc::new(tokio::sync::Mutex::new(told));
    let keeping = (told, live, options.data.clone(), FlowMetrics::new(&registry), writes.clone(), stop.clone());
    shutdown.supervise("flow records", move || {
        let (told, live, data, metrics, writes, stop) = keeping.clone();
        async move { flows::keep(&mut *told.lock().await, live, data, metrics, writes, stop).await }
    });
    let (mut received, mut acknowledged, mut resolved) = (client.changes(), fanout.changes(), resolver.changes());
    let mut written = writes.changes();
    let mut report = tokio::time::interval(REPORT_EVERY);
    report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut addresses = tokio::time::interval(LOOK_AT_ADDRESSES_EVERY);
    addresses.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut watched = tokio::time::interval(LOOK_AT_HUB_EVERY);
    watched.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut reported, mut problems) = (false, Vec::new());
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            local = local_news.recv() => {
                member.take_local(local.context("read the source")?);
                reported = false;
            }
            changed = received.changed() => {
                changed.context("receive")?;
                if let Some(updates) = client.take_updates() {
                    member.world.receive(updates);
                    member.changed();
                }
                reported = false;
            }
            changed = acknowledged.changed() => {
                changed.context("fan out")?;
                reported = false;
            }
            changed = resolved.changed() => {
                changed.context("resolve")?;
                member.world.set_ends(ends(&resolver));
                member.changed();
            }
            Ok(()) = written.changed() => reported = false,
            _ = addresses.tick() => if member.world.look_at_addresses() {
                member.changed();
            },
            // That nothing comes is no event.
            _ = watched.tick() => {
                watching.set(client.is_watching());
                let now = client.problems();
                reported &= now == problems;
                problems = now;
            }
            Some(request) = requests.recv() => request.answer(&member.world),
            _ = report.tick(), if !reported => {
                member.report();
                reported = true;
            }
        }
    }
}

/// What a member that has joined could not run without: what is wrong is to show while the token is unused.
fn check_before_joining(options: &Options) -> anyhow::Result<()> {
    let source = options.source.display();
    options.source.read_dir().with_context(|| format!("read the directory {source} (--source)"))?;
    for (listen, flag) in [(options.agent_listen, "--agent-listen"), (options.enrol_listen, "--enrol-listen")] {
        TcpListener::bind(listen).with_context(|| format!("listen on {listen} ({flag})"))?;
    }
    anyhow::ensure!(
        options.agent_listen != options.enrol_listen || options.agent_listen.port() == 0,
        "--agent-listen and --enrol-listen are both {}: name two",
        options.agent_listen
    );
    // As much as what joining is to leave there.
    let (path, data) = (options.data.join("written"), options.data.display());
    files::write_secret(&path, &[0; 16 << 10]).with_context(|| format!("write files in {data} (--data)"))?;
    std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
}

/// Makes the folder of the member's files where it is absent, and keeps other members from using it until the file is
/// dropped.
///
/// # Errors
/// When it cannot be made, or another process holds it.
pub fn hold(data: &Path) -> anyhow::Result<File> {
    files::private_folder(data).with_context(|| format!("make {}", data.display()))?;
    files::hold(&data.join("lock"), Duration::ZERO).with_context(|| format!("hold {}", data.display()))
}

struct Member {
    world: World,
    fanout: Fanout,
    client: Client,
    /// The hub was heard, by this process or by an earlier one.
    heard: Condition,
    metrics: Metrics,
    writes: Writes,
}

impl Member {
    /// What the source has is enforced here, published, and says what this cluster looks for in others.
    fn take_local(&mut self, news: News) {
        let changed = self.world.take_local(news);
        self.changed();
        let local = self.world.local();
        self.fanout.set_source_nodes(local.nodes.iter().map(|(name, node)| (name.clone(), node.pod_ranges.clone())));
        self.client.publish(&local.cluster, &changed);
        if !changed.policies.is_empty() {
            self.client.want(wanted(&local.layer));
        }
    }

    /// Something changed: compiles and hands out.
    fn changed(&mut self) {
        let start = Instant::now();
        let (hub, local_revision) = (self.world.hub_position(), self.world.local_revision());
        let Some(compiled) = self.world.compile() else {
            tracing::info!("the hub has not been heard yet: nodes keep what they have, and new ones stay closed");
            return;
        };
        self.heard.set(true);
        let took = start.elapsed();
        self.metrics.compiled(took);
        let nodes = compiled.changed.len();
        self.fanout.publish(compiled, hub, local_revision);
        tracing::info!(hub_revision = hub.revision, local_revision, compile_us = took.as_micros(), nodes, "compiled");
    }

    /// Tells the hub how far enforcement is.
    fn report(&self) {
        let nodes = self.fanout.realisation();
        let policies = self.client.with_receiver(|it| (it.refused().len(), it.waiting().0.len()));
        self.metrics.tell(&self.world, nodes.values(), policies);
        self.client.report(report::realisation(&self.world, &nodes, &self.client, self.writes.failing()));
    }
}

/// What a cluster's own policies look for in others. Staged ones too: their outcome is told as well. Pods are sent with their
/// ports, and a port's name is looked up on those that the selection beside it selects, or on the cluster's own.
fn wanted(layer: &Layer) -> Interest {
    interest::derive(layer.policies.values().filter(|policy| !policy.host_only), interest::OWN)
}

#[cfg(test)]
mod tests {
    use hanse_api::assemble_cluster;
    use hanse_api::manifest::{self, Manifests};
    use hanse_exchange::interest::Wanted;
    use hanse_policy::model::ClusterScope;

    use super::*;

    #[test]
    fn what_is_staged_is_asked_for_too() {
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
        // The name of the port asks for no pods beyond the policy's own.
        assert!(
            enforced.iter().all(|it| it.port_names().is_empty() && *it.clusters() == ClusterScope::All),
            "{enforced:?}"
        );
        assert_eq!(enforced.len(), 1, "{enforced:?}");
    }

    #[test]
    fn own_policies_that_select_in_too_many_ways_receive_everything() {
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
