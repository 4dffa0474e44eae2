//! The member as a process: source in, hub streams, compiler, fan-out to agents, report back.
//!
//! It starts with everything else down, once the cluster has joined: from its source, and from what it last received.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hanse_k8s_api::assemble::Federation;
use hanse_k8s_api::manifest::{Manifests, Object, read_bytes};
use hanse_policy::model::{ClusterScope, Phase, Port};
use hanse_policy::selector::{Expr, Selector};
use hanse_proto::federation::v1 as pb;
use hanse_ruleset::UnknownPods;
use hanse_runtime::files;
use hanse_runtime::health::Health;
use hanse_runtime::metrics::Metrics;
use hanse_runtime::monitor::{self, Page};
use hanse_runtime::shutdown::Shutdown;
use tokio::sync::mpsc;

use crate::exchange::client::Client;
use crate::exchange::model::{Change, Manifest, ManifestKind, Updates, Wanted};
use crate::exchange::wire::digest_bytes;
use crate::fanout::Fanout;
use crate::questions::Answering;
use crate::registration::MemberIdentity;
use crate::source::{Directory, Source as _, Sourced};
use crate::world::World;

/// How often the source is looked at: edits apply within a second.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Realisation is told when it changes, at most this often.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// Errors of one node that are told.
const MAX_ERRORS: usize = 100;

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
}

/// Joins where needed, and runs until the shutdown.
///
/// # Errors
/// When the cluster cannot join, or a listener cannot be opened.
pub async fn run(options: Options, shutdown: Shutdown) -> anyhow::Result<()> {
    let stop = shutdown.token();
    files::private_folder(&options.data).with_context(|| format!("make {}", options.data.display()))?;
    let (health, metrics) = (Health::default(), Metrics::default());
    let (joined, sourced) = (health.condition("joined"), health.condition("source read"));
    if let Some(address) = options.health_listen {
        monitor::serve(address, Page::Health(health.clone()), stop.clone()).await?;
    }
    if let Some(address) = options.metrics_listen {
        monitor::serve(address, Page::Metrics(metrics.clone(), None), stop.clone()).await?;
    }
    let identity = match MemberIdentity::read(&options.data, &options.cluster)? {
        Some(identity) => identity,
        None => {
            let token = options.token_file.as_ref().context("the cluster has not joined: --token-file is needed")?;
            let join = &options.join;
            MemberIdentity::join(&options.data, &options.cluster, token, join, options.federated_allow_final, &stop)
                .await?
        }
    };
    joined.set(true);
    shutdown.spawn(identity.clone().keep_fresh(options.hubs.clone(), options.join.clone(), stop.clone()));
    let fanout = Fanout::new(&options.data, options.node_lifetime)?;
    let (agents, enrolment) = fanout.serve(&identity, options.agent_listen, options.enrol_listen, &shutdown).await?;
    tracing::info!(cluster = options.cluster, %agents, %enrolment, "member serves");
    let client = Client::restore(&options.data);

    let (news, mut local_news) = mpsc::channel::<Arc<Sourced>>(1);
    let mut source = Directory::new(identity.cluster().clone(), options.source.clone());
    std::thread::spawn(move || {
        while !news.is_closed() {
            if let Some(sourced) = source.look()
                && news.blocking_send(sourced).is_err()
            {
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    });
    // Until the source was read nothing is known of this cluster, and nothing is published or enforced anew.
    let local = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        local = local_news.recv() => local.context("read the source")?,
    };
    sourced.set(true);
    let answering = Answering::new(identity.cluster().clone(), client.clone());
    let mut member = Member {
        world: World::new(identity.cluster().clone(), options.unknown_pods, Vec::new()),
        manifests: BTreeMap::new(),
        refused: BTreeMap::new(),
        nodes: BTreeSet::new(),
        fanout: fanout.clone(),
        client: client.clone(),
        answering: answering.clone(),
    };
    member.take_local(local);
    if let Some(updates) = client.take_updates() {
        member.receive(updates);
    }
    member.changed();
    client.start(&identity, &options.hubs, &shutdown);
    answering.start(&identity, &options.hubs, &shutdown);
    let (mut received, mut acknowledged) = (client.changes(), fanout.changes());
    let mut report = tokio::time::interval(REPORT_EVERY);
    report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            local = local_news.recv() => {
                member.take_local(local.context("read the source")?);
                member.changed();
                told = false;
            }
            changed = received.changed() => {
                changed.context("receive")?;
                if let Some(updates) = client.take_updates() {
                    member.receive(updates);
                    member.changed();
                }
                told = false;
            }
            changed = acknowledged.changed() => {
                changed.context("fan out")?;
                told = false;
            }
            _ = report.tick(), if !told => {
                member.report();
                told = true;
            }
        }
    }
}

struct Member {
    world: World,
    /// The federated objects in force, as their authors wrote them.
    manifests: BTreeMap<(ManifestKind, Arc<str>), Manifest>,
    /// Federated policies that cannot be read here, and why.
    refused: BTreeMap<Arc<str>, String>,
    nodes: BTreeSet<Arc<str>>,
    fanout: Fanout,
    client: Client,
    answering: Answering,
}

impl Member {
    /// What the source has is published, and says what this cluster looks for in others.
    fn take_local(&mut self, local: Arc<Sourced>) {
        self.client.publish(&local.state.cluster);
        self.world.set_local(local);
        self.client.want(self.wanted());
    }

    fn receive(&mut self, updates: Updates) {
        let mut federation_changed = false;
        for change in updates.changes {
            let Change::Manifest { kind, name, manifest } = change else {
                self.world.receive(change);
                continue;
            };
            federation_changed = true;
            match manifest {
                Some(manifest) => drop(self.manifests.insert((kind, name), manifest)),
                None => drop(self.manifests.remove(&(kind, name))),
            }
        }
        self.world.hub_revision = updates.in_force.revision;
        if federation_changed {
            self.read_federation();
        }
    }

    /// Converts the federated objects anew. One that cannot be read keeps its last version that could.
    fn read_federation(&mut self) {
        let before = self.world.federation();
        let mut now = Federation::default();
        self.refused.clear();
        let mut policies = Vec::new();
        let mut phases: BTreeMap<Arc<str>, Phase> = BTreeMap::new();
        for ((kind, name), manifest) in &self.manifests {
            let mut read = Manifests::default();
            read_bytes(&Arc::from(format!("{kind:?} {name}")), &manifest.json, &mut read);
            let object = read.objects.pop().filter(|_| read.diagnostics.is_empty()).map(|it| it.object);
            match object {
                Some(Object::Tier(tier)) => {
                    let tier = tier.convert(&mut Default::default());
                    phases.insert(name.clone(), tier.id.phase);
                    now.layer.tiers.insert(tier.id.clone(), tier);
                }
                Some(Object::FederatedNetworkSet(set)) => {
                    let (id, set) = set.convert(&mut Default::default());
                    now.sets.insert(id, set);
                }
                Some(Object::FederatedNetworkPolicy(policy)) => policies.push((policy, manifest)),
                _ => {
                    let why = read.diagnostics.iter().map(|it| format!("{}: {}", it.field, it.message));
                    let why = why.collect::<Vec<_>>().join("; ");
                    tracing::error!(object = %name, why, "a federated object cannot be read; its last version holds");
                    self.refused.insert(name.clone(), why);
                    let last = before.layer.policies.iter().find(|(id, _)| id.name == *name);
                    now.layer.policies.extend(last.map(|(id, policy)| (id.clone(), policy.clone())));
                    let last = before.layer.tiers.iter().find(|(id, _)| id.name == *name);
                    now.layer.tiers.extend(last.map(|(id, tier)| (id.clone(), tier.clone())));
                }
            }
        }
        for (policy, manifest) in policies {
            // The hub has resolved the selectors of clusters; everybody takes its word.
            let resolve = |selector: Option<&Selector>| match selector {
                None => ClusterScope::All,
                Some(selector) if selector.expr == Expr::All => ClusterScope::All,
                Some(selector) => {
                    let same = |(text, _): &&(Arc<str>, _)| Selector::parse(text).is_ok_and(|it| it == *selector);
                    let names = manifest.resolved.iter().find(same).map(|(_, names)| names.clone());
                    ClusterScope::Named(names.unwrap_or_default())
                }
            };
            let mut policy = policy.convert_with(&resolve, &phases, &mut Default::default());
            policy.enforcers = ClusterScope::Named(manifest.enforcers.clone());
            now.layer.policies.insert(policy.id.clone(), policy);
        }
        self.world.set_federation(now);
    }

    /// Something changed: compiles and hands out.
    fn changed(&mut self) {
        let start = Instant::now();
        let (hub_revision, local_revision) = (self.world.hub_revision, self.world.local().revision);
        let compiled = self.world.compile();
        let compile_us = start.elapsed().as_micros();
        for gone in self.nodes.iter().filter(|node| !compiled.contains_key(*node)) {
            self.fanout.forget(gone);
        }
        self.nodes = compiled.keys().cloned().collect();
        for (node, rules) in compiled {
            self.fanout.publish(node, rules.clone());
        }
        self.answering.tell(self.world.local(), self.world.federation(), hub_revision);
        tracing::info!(hub_revision, local_revision, compile_us, "compiled");
    }

    /// What this cluster's own policies look for in others.
    fn wanted(&self) -> BTreeSet<Wanted> {
        let mut wanted = BTreeSet::new();
        for policy in self.world.local().state.layer.policies.values().filter(|policy| policy.acts()) {
            for entity in
                policy.ingress.iter().chain(&policy.egress).flatten().flat_map(|it| [&it.source, &it.destination])
            {
                let selections = [&entity.selection, &entity.not_selection].into_iter().flatten();
                for selection in selections.filter(|it| it.clusters != ClusterScope::Local) {
                    let (clusters, selector) = (selection.clusters.clone(), selection.selector.clone());
                    wanted.insert(Wanted { clusters, selector, port_names: BTreeSet::new() });
                }
                let clusters = entity.named_port_scope(&policy.id);
                let ports = entity.ports.iter().chain(&entity.not_ports);
                let named =
                    ports.filter_map(|port| if let Port::Named(name) = port { Some(name.clone()) } else { None });
                let port_names: BTreeSet<Arc<str>> = named.collect();
                if !port_names.is_empty() && clusters != ClusterScope::Local {
                    wanted.insert(Wanted { clusters, selector: Selector::from(Expr::All), port_names });
                }
            }
        }
        wanted
    }

    /// Tells the hub how far enforcement is.
    fn report(&self) {
        let realised = self.fanout.realisation();
        let nodes = self.nodes.iter().map(|node| {
            let status = realised.get(node).cloned().unwrap_or_default();
            let refused = status.refused.iter().map(|(object, error)| (object.clone(), error.clone()));
            let failed = status.failed.iter().map(|error| (String::new(), error.clone()));
            pb::NodePosition {
                node: node.to_string(),
                hub_revision: status.hub_revision,
                local_revision: status.local_revision,
                connected: status.connected,
                // Rounded, so that time alone is no news.
                age_ms: status.heard.map_or(u64::MAX, |heard| heard.elapsed().as_secs() / 10 * 10_000),
                errors: refused
                    .chain(failed)
                    .take(MAX_ERRORS)
                    .map(|(object, error)| pb::ObjectError { object, error })
                    .collect(),
            }
        });
        let nodes: Vec<pb::NodePosition> = nodes.collect();
        let current = |node: &&pb::NodePosition| {
            node.connected
                && node.hub_revision == self.world.hub_revision
                && node.local_revision == self.world.local().revision
        };
        let agents_current = nodes.iter().filter(current).count();
        let refused = self.refused.iter().map(|(policy, why)| pb::PolicyState {
            policy: policy.to_string(),
            state: Some(pb::policy_state::State::Refused(why.clone())),
        });
        let (waiting, origins, positions) = self.client.with_receiver(|receiver| {
            let (policies, clusters) = receiver.waiting();
            let clusters: Vec<String> = clusters.iter().map(|name| name.to_string()).collect();
            let waiting = policies.into_iter().map(|policy| pb::PolicyState {
                policy: policy.to_string(),
                state: Some(pb::policy_state::State::Waiting(pb::Waiting { clusters: clusters.clone() })),
            });
            let origins = receiver.origins().into_iter().map(|(origin, status)| pb::OriginState {
                origin: origin.to_string(),
                position: Some(status.position.into()),
                digest: digest_bytes(status.digest),
            });
            (waiting.collect::<Vec<_>>(), origins.collect::<Vec<_>>(), receiver.positions())
        });
        self.client.report(pb::Realisation {
            hub: Some(positions.1.into()),
            received: Some(positions.0.into()),
            agents: u32::try_from(nodes.len()).unwrap_or(u32::MAX),
            agents_current: u32::try_from(agents_current).unwrap_or(u32::MAX),
            nodes,
            policies: refused.chain(waiting).collect(),
            origins,
        });
    }
}
