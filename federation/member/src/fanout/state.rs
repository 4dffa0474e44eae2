//! The state of the fan-out: the rule set and the stream of each node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hanse_identity::ca::CaError;
use hanse_identity::instances::{Instance, Instances};
use hanse_identity::keys::{Fingerprint, KeyError};
use hanse_ruleset::Generation;
use hanse_runtime::health::Writes;
use hanse_runtime::monitor::Reviews;
use ipnet::IpNet;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::nodes::Nodes;
use super::status::{NodeStatus, RulesPosition};
use crate::api_server::Reviewer;
use crate::exchange::model::Position;
use crate::state::State;
use crate::world::{Compiled, NodeRules};

/// The last term of rule sets, in the state.
const TERM: &str = "term";
/// How long an enrolment waits until the source has been read.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(5);
/// The interval between checks for revoked nodes. For 5,000 nodes, a check takes 20 ms of a separate thread.
const CHECK_REVOCATIONS_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum FanoutError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("listen on {0}")]
    Listen(SocketAddr, #[source] std::io::Error),
    #[error("read the keys of nodes")]
    Nodes(#[source] std::io::Error),
    #[error("write the file {TERM} of the state")]
    Term(#[source] std::io::Error),
}

/// Sends rule sets to agents. Clones share everything.
#[derive(Debug, Clone)]
pub struct Fanout {
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    term: u64,
    /// The lifetime of certificates of nodes, and of the member's certificate for agents.
    pub(super) lifetime: Duration,
    nodes: Mutex<BTreeMap<Arc<str>, NodeState>>,
    /// The registered key of each node.
    pub(super) keys: Arc<Nodes>,
    source: watch::Sender<SourceNodes>,
    writes: Option<Writes>,
    /// Reviews service-account tokens, if nodes may enrol with them.
    pub(super) reviewer: Option<Reviewer>,
    /// Reviews the tokens of callers of the agents' metrics.
    pub(super) metrics_reviews: Option<Reviews>,
    /// Counts changes of any node's status.
    changed: watch::Sender<u64>,
}

pub(super) type PodRanges = Arc<BTreeMap<Arc<str>, Vec<IpNet>>>;

/// The nodes of the source, with their pod ranges.
#[derive(Debug, PartialEq, Eq)]
pub struct SourceNodes {
    nodes: PodRanges,
    /// Those on which no agent is to run.
    without_agent: BTreeSet<Arc<str>>,
    /// Those with the taint of nodes whose agents have no rules.
    tainted: BTreeSet<Arc<str>>,
    /// False if they are from an earlier process.
    read: bool,
}

/// Whether a node has rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Its agent has acknowledged rules.
    Ready,
    /// Its agent has not.
    Waiting,
    /// No agent is to run there.
    NoAgent,
}

/// The rule set that a node must enforce.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) node: NodeRules,
    pub(super) position: RulesPosition,
}

#[derive(Debug)]
pub(super) struct NodeState {
    target: watch::Sender<Option<Arc<Target>>>,
    status: NodeStatus,
    /// The number of the current stream. Older streams are ended.
    stream: u64,
    /// The key of the certificate, and the processes that have used it.
    key: Option<Fingerprint>,
    instances: Instances,
    replaced: CancellationToken,
}

/// The stream of a node.
pub(super) struct Attached {
    /// The rule set that the node must enforce.
    pub(super) target: watch::Receiver<Option<Arc<Target>>>,
    pub(super) number: u64,
    /// Cancelled when the stream must end.
    pub(super) replaced: CancellationToken,
}

impl NodeState {
    fn new() -> Self {
        Self {
            target: watch::Sender::new(None),
            status: NodeStatus::default(),
            stream: 0,
            key: None,
            instances: Instances::default(),
            replaced: CancellationToken::new(),
        }
    }
}

impl Fanout {
    /// Starts a new term. Terms increase with each start, so that agents prefer the rule sets of this process over those of an earlier
    /// one. `lifetime`: of certificates of nodes, and of the member's certificate for agents.
    ///
    /// # Errors
    /// When the term cannot be written, or the keys of nodes cannot be read.
    pub fn new(state: impl Into<State>, lifetime: Duration) -> Result<Self, FanoutError> {
        let state = state.into();
        let turn = state.turn();
        let last =
            state.read(TERM).ok().flatten().and_then(|text| std::str::from_utf8(&text).ok()?.trim().parse().ok());
        // If the file is missing, the clock ensures that the term increases.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let term = last.unwrap_or(0).max(now).saturating_add(1);
        // In a Secret, this fails if another process has begun a term since it was read: no two have the same one.
        state.write_in(&turn, TERM, format!("{term}\n").as_bytes()).map_err(FanoutError::Term)?;
        let keys = Arc::new(Nodes::new(&state));
        keys.reload().map_err(FanoutError::Nodes)?;
        let nodes = Arc::new(keys.read_source_nodes().unwrap_or_default());
        let source = SourceNodes { nodes, without_agent: BTreeSet::new(), tainted: BTreeSet::new(), read: false };
        let source = watch::Sender::new(source);
        let shared = Shared {
            term,
            lifetime,
            nodes: Mutex::default(),
            keys,
            source,
            writes: None,
            reviewer: None,
            metrics_reviews: None,
            changed: watch::Sender::new(0),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Accepts service-account tokens for enrolment.
    pub fn with_reviewer(mut self, reviewer: Option<Reviewer>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.reviewer = reviewer;
        }
        self
    }

    /// Answers agents whether the bearers of tokens may read their metrics.
    pub fn with_metrics_reviews(mut self, reviews: Option<Reviews>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.metrics_reviews = reviews;
        }
        self
    }

    /// Reports files that cannot be written to `writes`.
    pub fn with_writes(mut self, writes: Writes) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.writes = Some(writes);
        }
        self
    }

    /// Sets the nodes of the source with their pod ranges, which a node receives when it enrols. On those in `without_agent`, no agent is
    /// to run; those in `tainted` have the taint of nodes whose agents have no rules.
    pub fn set_source_nodes(
        &self,
        nodes: impl Iterator<Item = (Arc<str>, Vec<IpNet>)>,
        without_agent: BTreeSet<Arc<str>>,
        tainted: BTreeSet<Arc<str>>,
    ) {
        let source = SourceNodes { nodes: Arc::new(nodes.collect()), without_agent, tainted, read: true };
        if *self.shared.source.borrow() != source {
            let written = self.shared.keys.write_source_nodes(&source.nodes);
            if let Some(writes) = &self.shared.writes {
                writes.note("known-nodes.json", &written);
            }
            self.shared.source.send_replace(source);
        }
    }

    /// The nodes of the source. Waits until the source has been read, unless an earlier process has stored the pod ranges of the node.
    pub(super) async fn source_nodes(&self, node: &str) -> Option<PodRanges> {
        let mut source = self.shared.source.subscribe();
        let has_it =
            |source: &SourceNodes| source.read || source.nodes.get(node).is_some_and(|ranges| !ranges.is_empty());
        let source = tokio::time::timeout(SOURCE_TIMEOUT, source.wait_for(has_it)).await.ok()?.ok()?;
        Some(Arc::clone(&source.nodes))
    }

    /// Sets the rule sets of nodes, and the revisions from which all of them are compiled. A node with an unchanged rule set receives only
    /// its new position. The streams of removed nodes end.
    pub fn publish(&self, compiled: Compiled, hub: Position, local_revision: u64) {
        let Position { epoch: hub_epoch, revision: hub_revision } = hub;
        let mut nodes = self.nodes();
        for gone in compiled.removed {
            if let Some(gone) = nodes.remove(&gone) {
                gone.replaced.cancel();
            }
        }
        for (name, rules) in compiled.changed {
            let node = nodes.entry(name).or_insert_with(NodeState::new);
            let number = node.target.borrow().as_ref().map_or(1, |last| last.position.generation.number + 1);
            let generation = Generation { term: self.shared.term, number };
            let position = RulesPosition { generation, hub_epoch, hub_revision, local_revision };
            node.target.send_replace(Some(Arc::new(Target { node: rules, position })));
        }
        for node in nodes.values() {
            node.target.send_if_modified(|target| {
                let Some(last) = target else { return false };
                let mut position = RulesPosition { hub_epoch, hub_revision, local_revision, ..last.position };
                if hub_epoch != last.position.hub_epoch {
                    position.generation.number += 1;
                }
                let moved = position != last.position;
                if moved {
                    *target = Some(Arc::new(Target { node: last.node.clone(), position }));
                }
                moved
            });
        }
    }

    /// The status of every node that has a rule set, or an agent.
    pub fn realisation(&self) -> BTreeMap<Arc<str>, NodeStatus> {
        let now = tokio::time::Instant::now();
        let status = |name: &str, node: &NodeState| {
            let rivals = node.instances.rivals(now).or_else(|| self.shared.keys.rivals(name));
            NodeStatus { rivals, ..node.status.clone() }
        };
        self.nodes().iter().map(|(name, node)| (Arc::clone(name), status(name, node))).collect()
    }

    /// Why tokens of agents could not be reviewed, if that is so.
    pub fn review_failure(&self) -> Option<String> {
        self.shared.reviewer.as_ref()?.failure()
    }

    /// Whether the source has been read.
    pub fn has_source_nodes(&self) -> bool {
        self.shared.source.borrow().read
    }

    /// The nodes of the source, whether each has rules, and whether it has the taint. Empty until the source has been read.
    pub fn readiness(&self) -> BTreeMap<Arc<str>, (Readiness, bool)> {
        let source = self.shared.source.borrow();
        let nodes = self.nodes();
        let readiness = |name: &Arc<str>| {
            let status = nodes.get(name).map(|node| &node.status);
            let has_rules =
                status.is_some_and(|status| status.connected && status.position.generation != Generation::default());
            match has_rules {
                true => Readiness::Ready,
                false if source.without_agent.contains(name) => Readiness::NoAgent,
                false => Readiness::Waiting,
            }
        };
        let names = source.nodes.keys().filter(|_| source.read);
        names.map(|name| (Arc::clone(name), (readiness(name), source.tainted.contains(name)))).collect()
    }

    /// Changes whenever nodes of the source are added, removed or changed.
    pub fn source_changes(&self) -> watch::Receiver<SourceNodes> {
        self.shared.source.subscribe()
    }

    /// Whether the node has enrolled at any time.
    pub fn has_enrolled(&self, node: &str) -> bool {
        self.shared.keys.has_record(node)
    }

    /// Changes whenever the status of a node does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    fn nodes(&self) -> std::sync::MutexGuard<'_, BTreeMap<Arc<str>, NodeState>> {
        self.shared.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn update(&self, node: &str, change: impl FnOnce(&mut NodeStatus)) {
        if let Some(node) = self.nodes().get_mut(node) {
            change(&mut node.status);
        }
        self.shared.changed.send_modify(|count| *count += 1);
    }

    /// Starts the stream of a node.
    pub(super) async fn attach(
        &self,
        name: &Arc<str>,
        key: Fingerprint,
        instance: Instance,
    ) -> Result<Attached, Status> {
        let keys = &self.shared.keys;
        self.refuse_former(name, key, instance.address()).await?;
        if keys.awaits(name, &key) {
            let (node, from) = (Arc::clone(name), instance.address());
            let promoted = keys.change(move |it| it.promote(&node, &key, from)).await.flatten();
            if !promoted.map_err(|_| Status::internal("write the key of the node"))? {
                return Err(not_registered(name));
            }
        }
        let mut nodes = self.nodes();
        // Under the lock: a revocation after this check ends the stream.
        if !keys.allows(name, &key) {
            return Err(not_registered(name));
        }
        let node = nodes.entry(Arc::clone(name)).or_insert_with(NodeState::new);
        if node.key != Some(key) {
            node.instances = Instances::default();
        }
        let is_open = node.status.connected;
        let now = tokio::time::Instant::now();
        let is_let_in = node.instances.take(instance, is_open, now);
        if let Some((served, refused)) = node.instances.to_warn(now) {
            tracing::warn!(
                node = %name, %served, %refused,
                "the node's key is used from two addresses: one is a copy of its directory; revoke the node and enrol it again"
            );
        }
        if !is_let_in {
            let refusal = node.instances.served().map(|served| refusal(name, served));
            drop(nodes);
            self.shared.changed.send_modify(|count| *count += 1);
            return Err(Status::aborted(refusal.unwrap_or_default()));
        }
        node.replaced.cancel();
        node.replaced = CancellationToken::new();
        node.stream += 1;
        node.key = Some(key);
        node.status.connected = true;
        let (target, replaced) = (node.target.subscribe(), node.replaced.clone());
        Ok(Attached { target, number: node.stream, replaced })
    }

    /// Refuses a key that a renewal has replaced, and records its use: two processes have the node's directory.
    pub(super) async fn refuse_former(&self, name: &str, key: Fingerprint, from: SocketAddr) -> Result<(), Status> {
        if !self.shared.keys.was_replaced(name, &key) {
            return Ok(());
        }
        let node = name.to_owned();
        let rivals = self.shared.keys.change(move |it| it.dispute(&node, &key, from)).await.flatten();
        self.shared.changed.send_modify(|count| *count += 1);
        match rivals.map_err(|_| Status::internal("write that two keys of the node are in use"))? {
            Some((served, _)) => Err(Status::aborted(refusal(name, served))),
            None => Err(not_registered(name)),
        }
    }

    /// Ends streams whose keys are no longer registered: of one node, or of all.
    pub(super) fn expel(&self, only: Option<&str>) {
        for (name, node) in self.nodes().iter().filter(|(name, _)| only.is_none_or(|only| only == &***name)) {
            if node.status.connected && node.key.is_some_and(|key| !self.shared.keys.allows(name, &key)) {
                tracing::info!(node = %name, "stream of the node ended: its key is no longer registered");
                node.replaced.cancel();
            }
        }
    }

    /// Follows revocations: another process changes the files of nodes.
    pub(super) async fn follow_revocations(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(CHECK_REVOCATIONS_EVERY) => {}
            }
            let now = tokio::time::Instant::now();
            let mut settled = false;
            self.nodes().values_mut().for_each(|node| settled |= node.instances.settle(now));
            if settled {
                self.shared.changed.send_modify(|count| *count += 1);
            }
            let keys = Arc::clone(&self.shared.keys);
            match tokio::task::spawn_blocking(move || keys.reload()).await.map_err(Into::into).flatten() {
                Ok(false) => {}
                Ok(true) => self.expel(None),
                Err(error) => tracing::error!(%error, "keys of nodes not read; the last ones stay"),
            }
        }
    }

    pub(super) fn detach(&self, name: &str, stream: u64) {
        if let Some(node) = self.nodes().get_mut(name).filter(|node| node.stream == stream) {
            node.status.connected = false;
            node.status.last_seen = Some(Instant::now());
        }
        self.shared.changed.send_modify(|count| *count += 1);
    }
}

/// The answer to a node whose key is not registered.
pub(super) fn not_registered(node: &str) -> Status {
    let message =
        format!("this key is not registered for node {node}: it was revoked, or the node has enrolled again since");
    Status::permission_denied(message)
}

/// The answer to a process whose key another process uses.
fn refusal(node: &str, served: SocketAddr) -> String {
    format!("the key of node {node} is in use from {served}: one of both is a copy; revoke the node and enrol it again")
}
