//! The fan-out: every agent is sent the rule set of its node, as a delta against the one that it has.
//!
//! One delta is in flight to an agent at a time, and the next starts from the rule set that it acknowledged. So a slow agent is sent the
//! newest state and nothing in between, does not delay others, and costs one rule set (shared by pointer) of memory. An agent that keeps
//! up is sent the compiler's own delta; others are sent a computed one.
//! The identity of an agent comes from its certificate, which the cluster's own authority issued.

mod enrol;
mod nodes;
mod service;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hanse_identity::Identity;
use hanse_identity::ca::CaError;
use hanse_identity::instances::{Instance, Instances};
use hanse_identity::keys::{Fingerprint, KeyError};
use hanse_identity::tls::{
    Connections, CredentialStore, Incoming, IncomingLimits, PresentedAuthority, ServerTls, Trust, http2_server,
    incoming,
};
use hanse_proto::agent::v1::agents_server::AgentsServer;
use hanse_proto::agent::v1::enrolment_server::EnrolmentServer;
use hanse_protocol::reason::{Failure, FileProblem, Finding, HookProblem, Object, Rejection};
use hanse_ruleset::{Digest, EndpointId, Generation};
use hanse_runtime::health::Writes;
use hanse_runtime::shutdown::Shutdown;
use ipnet::IpNet;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub use enrol::{
    Created, NodeToken, NodeTokenError, create_node_token, list_node_tokens, list_nodes, revoke_node, revoke_node_token,
};
pub use nodes::NodeRecord;
use nodes::Nodes;

use crate::exchange::model::Position;
use crate::flows::Inbox;
use crate::registration::MemberIdentity;
use crate::world::{Compiled, NodeRules};

/// Enrolments per second of one address.
const ENROLMENTS_PER_SECOND: f64 = 5.0;
/// How long an enrolment waits until the source is read.
const SOURCE_PATIENCE: Duration = Duration::from_secs(5);
/// How often revoked nodes are looked for: for 5,000 nodes this takes 20 ms of a thread of its own.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The largest message of an agent: 2,000 refusals and pods of about 300 bytes.
const MAX_MESSAGE_BYTES: usize = 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum FanoutError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("listen on {0}")]
    Listen(SocketAddr, #[source] std::io::Error),
    #[error("read the keys of nodes in {0}")]
    Nodes(PathBuf, #[source] std::io::Error),
    #[error("write the term to {0}")]
    Term(PathBuf, #[source] std::io::Error),
}

/// The status of one node's agent.
#[derive(Debug, Clone, Default)]
pub struct NodeStatus {
    pub connected: bool,
    /// Of the rules in force, by the last acknowledgement.
    pub position: RulesPosition,
    pub digest: Digest,
    /// Objects that the kernel refused; `None`: an object of a kind that this version does not know.
    pub refused: Vec<(Option<Object>, Rejection)>,
    /// Why the newest generation is not in force.
    pub failed: Option<Failure>,
    /// What is wrong with the hooks as a whole.
    pub hooks: Option<HookProblem>,
    /// Pods that are not enforced, or not proven to be.
    pub unenforced: Vec<(EndpointId, Finding)>,
    /// Files that the agent cannot write.
    pub files: Vec<FileProblem>,
    /// When the last acknowledgement arrived.
    pub acknowledged_at: Option<Instant>,
    /// The agent's version; empty if it did not send it.
    pub version: String,
    /// The addresses, served and refused, of two processes that use the node's key, or its key and a former one. Acknowledgements do
    /// not count then.
    pub rivals: Option<(SocketAddr, SocketAddr)>,
}

/// Sends rule sets to agents. Clones share everything.
#[derive(Debug, Clone)]
pub struct Fanout {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    term: u64,
    /// The lifetime of certificates of nodes, and of the member's own for its agents.
    lifetime: Duration,
    nodes: Mutex<BTreeMap<Arc<str>, NodeState>>,
    /// The registered key of each node.
    keys: Arc<Nodes>,
    source: watch::Sender<SourceNodes>,
    writes: Option<Writes>,
    /// Counts changes of any node's status.
    changed: watch::Sender<u64>,
}

type PodRanges = Arc<BTreeMap<Arc<str>, Vec<IpNet>>>;

/// The nodes of the source, with the ranges of their pods.
#[derive(Debug, PartialEq, Eq)]
struct SourceNodes {
    nodes: PodRanges,
    /// Read by this process; else by the last one, if there was one.
    read: bool,
}

/// The rule set that a node must enforce from now on.
#[derive(Debug, Clone)]
struct Target {
    node: NodeRules,
    position: RulesPosition,
}

/// The generation of a rule set, and the revisions that it was compiled from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RulesPosition {
    pub generation: Generation,
    /// Of the hub's revision; 0 if unknown. Agents do not send it: within a term a generation is of one epoch.
    pub hub_epoch: u64,
    pub hub_revision: u64,
    pub local_revision: u64,
}

#[derive(Debug)]
struct NodeState {
    target: watch::Sender<Option<Arc<Target>>>,
    status: NodeStatus,
    /// The number of the node's stream; an older one is ended.
    stream: u64,
    /// The key of its certificate, and the processes that have used it.
    key: Option<Fingerprint>,
    instances: Instances,
    replaced: CancellationToken,
}

/// The stream of a node.
struct Attached {
    /// The rule set that the node must enforce.
    target: watch::Receiver<Option<Arc<Target>>>,
    number: u64,
    /// Cancelled when it must end.
    replaced: CancellationToken,
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
    /// Starts a new term. It grows with each start, so that agents prefer the rules of this process over those of an earlier one.
    /// `lifetime` is that of certificates of nodes, and of the member's own for its agents.
    ///
    /// # Errors
    /// When the term cannot be written, or the keys of nodes cannot be read.
    pub fn new(data: &Path, lifetime: Duration) -> Result<Self, FanoutError> {
        let path = data.join("term");
        let last = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
        // If the file is missing, the clock keeps the term growing.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let term = last.max(now).saturating_add(1);
        hanse_runtime::files::write_atomic(&path, format!("{term}\n").as_bytes(), 0o600)
            .map_err(|error| FanoutError::Term(path, error))?;
        let keys = Arc::new(Nodes::new(data));
        keys.reload().map_err(|error| FanoutError::Nodes(data.to_owned(), error))?;
        let source = SourceNodes { nodes: Arc::new(keys.read_known().unwrap_or_default()), read: false };
        let source = watch::Sender::new(source);
        let shared = Shared {
            term,
            lifetime,
            nodes: Mutex::default(),
            keys,
            source,
            writes: None,
            changed: watch::Sender::new(0),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Reports files that cannot be written to `writes`.
    pub fn with_writes(mut self, writes: Writes) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.writes = Some(writes);
        }
        self
    }

    /// Opens both listeners; returns their addresses. Flows of agents go into `flows`.
    ///
    /// # Errors
    /// When an address cannot be bound, or no certificate can be issued.
    pub async fn serve(
        &self,
        identity: &MemberIdentity,
        agents: SocketAddr,
        enrolment: SocketAddr,
        flows: Inbox,
        shutdown: &Shutdown,
    ) -> Result<(SocketAddr, SocketAddr), FanoutError> {
        let authority = identity.authority();
        let cluster = Identity::Cluster(Arc::clone(identity.cluster()));
        let credentials = authority.issue_credentials(&cluster, self.shared.lifetime, SystemTime::now())?;
        let credentials = CredentialStore::new(credentials)?;
        let own = Arc::clone(identity.cluster());
        let trust = Trust::new(
            authority.certificate(),
            move |identity| matches!(identity, Identity::Node { cluster, .. } if *cluster == own),
        )?;
        let mutual = ServerTls::mutual(credentials.clone(), &trust)?;
        // Node tokens name the newest authority.
        let newest = identity.clone();
        let presented = PresentedAuthority::new(move || newest.authority().certificate().der.clone());
        let anonymous = ServerTls::anonymous(credentials.clone(), presented)?;
        let stop = shutdown.token();
        let listen = async |address, tls, limits| -> Result<Incoming, FanoutError> {
            let listening = incoming(address, tls, limits, Connections::default(), stop.clone()).await;
            listening.map_err(|error| FanoutError::Listen(address, error))
        };
        let agents = listen(agents, mutual, IncomingLimits::default()).await?;
        // Clients are not authenticated: few connections, each short.
        let limits = IncomingLimits {
            connections: 256,
            per_address: Some(64),
            per_network: Some(128),
            stalls_after: Duration::from_secs(5),
            per_second: Some(ENROLMENTS_PER_SECOND),
            lifetime: Some(Duration::from_secs(30)),
            ..IncomingLimits::default()
        };
        let enrolment = listen(enrolment, anonymous, limits).await?;
        let addresses = (agents.address(), enrolment.address());
        let service = service::Service { fanout: self.clone(), identity: identity.clone(), flows, stop: stop.clone() };
        let server = AgentsServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let until = stop.clone().cancelled_owned();
        let server = http2_server().add_service(server).serve_with_incoming_shutdown(agents, until);
        shutdown.essential("listener for agents", server);
        let service = enrol::Service { fanout: self.clone(), identity: identity.clone() };
        let enrol = EnrolmentServer::new(service).max_decoding_message_size(16 * 1024);
        let until = stop.clone().cancelled_owned();
        let server = http2_server().add_service(enrol).serve_with_incoming_shutdown(enrolment, until);
        shutdown.essential("listener for enrolment", server);
        let (fanout, until) = (self.clone(), stop.clone());
        shutdown.supervise("revocation of nodes", move || {
            let (fanout, until) = (fanout.clone(), until.clone());
            async move { fanout.follow_revocations(until).await }
        });
        let renewing = (identity.clone(), cluster, self.shared.lifetime, credentials, stop);
        shutdown.supervise("renewal of the certificate for agents", move || {
            let (identity, cluster, lifetime, credentials, stop) = renewing.clone();
            renew(identity, cluster, lifetime, credentials, stop)
        });
        Ok(addresses)
    }

    /// Sets the nodes of the source, with the ranges of their pods, which a node is sent when it enrols.
    pub fn set_source_nodes(&self, nodes: impl Iterator<Item = (Arc<str>, Vec<IpNet>)>) {
        let source = SourceNodes { nodes: Arc::new(nodes.collect()), read: true };
        if *self.shared.source.borrow() != source {
            let written = self.shared.keys.write_known(&source.nodes);
            if let Some(writes) = &self.shared.writes {
                writes.note("known-nodes.json", &written);
            }
            self.shared.source.send_replace(source);
        }
    }

    /// The nodes of the source. A member that has just started waits until it has read it, unless the last process knew the node.
    async fn source_nodes(&self, node: &str) -> Option<PodRanges> {
        let mut source = self.shared.source.subscribe();
        let has_it =
            |source: &SourceNodes| source.read || source.nodes.get(node).is_some_and(|ranges| !ranges.is_empty());
        let source = tokio::time::timeout(SOURCE_PATIENCE, source.wait_for(has_it)).await.ok()?.ok()?;
        Some(Arc::clone(&source.nodes))
    }

    /// Sets the rule sets of nodes and the revisions that all of them are compiled from. A node whose rules did not change is sent its new
    /// position only. A node that was removed is sent nothing more.
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

    /// Changes whenever the status of a node does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    fn nodes(&self) -> std::sync::MutexGuard<'_, BTreeMap<Arc<str>, NodeState>> {
        self.shared.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, node: &str, change: impl FnOnce(&mut NodeStatus)) {
        if let Some(node) = self.nodes().get_mut(node) {
            change(&mut node.status);
        }
        self.shared.changed.send_modify(|count| *count += 1);
    }

    /// Starts the stream of a node.
    async fn attach(&self, name: &Arc<str>, key: Fingerprint, instance: Instance) -> Result<Attached, Status> {
        let keys = &self.shared.keys;
        self.refuse_former(name, key, instance.address()).await?;
        if keys.awaits(name, &key) {
            let (node, from) = (Arc::clone(name), instance.address());
            let promoted = keys.change(move |it| it.promote(&node, &key, from)).await.flatten();
            if !promoted.map_err(|_| Status::internal("write the key of the node"))? {
                return Err(service::not_registered(name));
            }
        }
        let mut nodes = self.nodes();
        // Under the lock: a revocation after this check ends the stream.
        if !keys.allows(name, &key) {
            return Err(service::not_registered(name));
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
    async fn refuse_former(&self, name: &str, key: Fingerprint, from: SocketAddr) -> Result<(), Status> {
        if !self.shared.keys.was_replaced(name, &key) {
            return Ok(());
        }
        let node = name.to_owned();
        let rivals = self.shared.keys.change(move |it| it.dispute(&node, &key, from)).await.flatten();
        self.shared.changed.send_modify(|count| *count += 1);
        match rivals.map_err(|_| Status::internal("write that two keys of the node are in use"))? {
            Some((served, _)) => Err(Status::aborted(refusal(name, served))),
            None => Err(service::not_registered(name)),
        }
    }

    /// Ends streams whose keys are no longer registered: of one node, or of all.
    fn expel(&self, only: Option<&str>) {
        for (name, node) in self.nodes().iter().filter(|(name, _)| only.is_none_or(|only| only == &***name)) {
            if node.status.connected && node.key.is_some_and(|key| !self.shared.keys.allows(name, &key)) {
                tracing::info!(node = %name, "stream of the node ended: its key is no longer registered");
                node.replaced.cancel();
            }
        }
    }

    /// Follows revocations: another process changes the files of nodes.
    async fn follow_revocations(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
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

    fn detach(&self, name: &str, stream: u64) {
        if let Some(node) = self.nodes().get_mut(name).filter(|node| node.stream == stream) {
            node.status.connected = false;
        }
        self.shared.changed.send_modify(|count| *count += 1);
    }
}

/// Renews the certificate for agents.
async fn renew(
    identity: MemberIdentity,
    cluster: Identity,
    lifetime: Duration,
    credentials: CredentialStore,
    stop: CancellationToken,
) {
    loop {
        let wait = credentials.current().certificate.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait.max(Duration::from_secs(1))) => {}
        }
        let issued = identity.authority().issue_credentials(&cluster, lifetime, SystemTime::now());
        let replaced = issued
            .map_err(|error| error.to_string())
            .and_then(|new| credentials.replace(new).map_err(|error| error.to_string()));
        if let Err(error) = replaced {
            tracing::error!(error, "certificate for agents not renewed");
        }
    }
}

/// The answer to a process whose key another process uses.
fn refusal(node: &str, served: SocketAddr) -> String {
    format!("the key of node {node} is in use from {served}: one of both is a copy; revoke the node and enrol it again")
}

#[cfg(test)]
fn instance_of_test(number: u8) -> Instance {
    Instance::new(&[number; 16], SocketAddr::from(([192, 0, 2, number], 1)))
}

#[cfg(test)]
mod tests;
