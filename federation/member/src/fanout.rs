//! The fan-out: every agent gets what its node must enforce, as a delta against what it holds.
//!
//! One delta is under way to an agent at a time, and the next starts from what it acknowledged, so a slow agent is sent
//! the newest state and nothing in between, makes nobody wait, and costs one rule set (shared by pointer) of memory. Who
//! keeps up is sent the compiler's own step; differences are looked for only towards who does not.
//! Who an agent is comes from its certificate, which the cluster's own authority issued.

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

/// Enrolments that one address may ask for in a second.
const ENROLMENTS_PER_SECOND: f64 = 5.0;
/// How long an enrolment waits for the source to be read.
const SOURCE_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether a node was revoked: of 5,000 nodes that takes a thread of its own 20 ms.
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
    #[error("read which keys speak for the nodes, in {0}")]
    Nodes(PathBuf, #[source] std::io::Error),
    #[error("keep the term in {0}")]
    Term(PathBuf, #[source] std::io::Error),
}

/// What is known of one node's agent.
#[derive(Debug, Clone, Default)]
pub struct NodeStatus {
    pub connected: bool,
    /// Of what is in force, by the last ack.
    pub place: Place,
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
    /// When the last ack came.
    pub heard: Option<Instant>,
    /// The agent's version; empty where it did not send it.
    pub version: String,
    /// From where the node's key is used, or its key and a former one, where that are two places: who is served, and who is
    /// refused. What was acknowledged does not count then.
    pub rivals: Option<(SocketAddr, SocketAddr)>,
}

/// Hands rule sets to agents. Clones share everything.
#[derive(Debug, Clone)]
pub struct Fanout {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    term: u64,
    /// How long certificates of nodes, and of the member towards them, are valid.
    lifetime: Duration,
    nodes: Mutex<BTreeMap<Arc<str>, Node>>,
    /// Which key speaks for each.
    kept: Arc<Nodes>,
    known: watch::Sender<Known>,
    writes: Option<Writes>,
    /// Counts changes of any node's status.
    changed: watch::Sender<u64>,
}

type KnownNodes = Arc<BTreeMap<Arc<str>, Vec<IpNet>>>;

/// The nodes that the source knows, with the ranges of their pods.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    nodes: KnownNodes,
    /// By this process; else they are those of the last one, if there was one.
    read: bool,
}

/// What a node must enforce from now on.
#[derive(Debug, Clone)]
struct Target {
    node: NodeRules,
    place: Place,
}

/// Where a rule set stands: its generation, and the revisions that it is true of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    pub generation: Generation,
    /// Of the hub's revision; 0 where it is not known. Agents do not send it: within a term a generation is of one epoch.
    pub hub_epoch: u64,
    pub hub_revision: u64,
    pub local_revision: u64,
}

#[derive(Debug)]
struct Node {
    target: watch::Sender<Option<Arc<Target>>>,
    status: NodeStatus,
    /// Number of the stream that speaks for the node; an older one is told to end.
    stream: u64,
    /// The key that its certificate is for, and who has used it.
    key: Option<Fingerprint>,
    instances: Instances,
    replaced: CancellationToken,
}

/// A stream that speaks for a node.
struct Attached {
    /// What the node must enforce.
    target: watch::Receiver<Option<Arc<Target>>>,
    number: u64,
    /// When it must end.
    replaced: CancellationToken,
}

impl Node {
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
    /// A new term begins: it grows with each start, so that agents take what this member says over what an earlier one
    /// said. `lifetime` is that of certificates of nodes, and of the member towards them.
    ///
    /// # Errors
    /// When the term cannot be kept, or what is kept of nodes cannot be read.
    pub fn new(data: &Path, lifetime: Duration) -> Result<Self, FanoutError> {
        let path = data.join("term");
        let last = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
        // Where the file was lost, the clock keeps the term growing.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let term = last.max(now).saturating_add(1);
        hanse_runtime::files::write_atomic(&path, format!("{term}\n").as_bytes(), 0o600)
            .map_err(|error| FanoutError::Term(path, error))?;
        let kept = Arc::new(Nodes::new(data));
        kept.reload().map_err(|error| FanoutError::Nodes(data.to_owned(), error))?;
        let known = Known { nodes: Arc::new(kept.read_known().unwrap_or_default()), read: false };
        let known = watch::Sender::new(known);
        let shared = Shared {
            term,
            lifetime,
            nodes: Mutex::default(),
            kept,
            known,
            writes: None,
            changed: watch::Sender::new(0),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Tells `writes` which files cannot be written.
    pub fn with_writes(mut self, writes: Writes) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.writes = Some(writes);
        }
        self
    }

    /// Opens both listeners; returns their addresses. What agents tell of flows goes into `flows`.
    ///
    /// # Errors
    /// When an address cannot be bound, or no certificate can be made.
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
        // Tokens of nodes name the newest.
        let newest = identity.clone();
        let presented = PresentedAuthority::new(move || newest.authority().certificate().der.clone());
        let anonymous = ServerTls::anonymous(credentials.clone(), presented)?;
        let stop = shutdown.token();
        let listen = async |address, tls, limits| -> Result<Incoming, FanoutError> {
            let listening = incoming(address, tls, limits, Connections::default(), stop.clone()).await;
            listening.map_err(|error| FanoutError::Listen(address, error))
        };
        let agents = listen(agents, mutual, IncomingLimits::default()).await?;
        // Anybody may connect: few connections, each short.
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

    /// The nodes that the source knows now, with the ranges of their pods: what a node is told when it enrols.
    pub fn know(&self, nodes: impl Iterator<Item = (Arc<str>, Vec<IpNet>)>) {
        let known = Known { nodes: Arc::new(nodes.collect()), read: true };
        if *self.shared.known.borrow() != known {
            let written = self.shared.kept.write_known(&known.nodes);
            if let Some(writes) = &self.shared.writes {
                writes.note("known-nodes.json", &written);
            }
            self.shared.known.send_replace(known);
        }
    }

    /// What the source knows of nodes. A member that has just started is about to read it: of a node that came while it was
    /// away, what an earlier one read says nothing.
    async fn known(&self, node: &str) -> Option<KnownNodes> {
        let mut known = self.shared.known.subscribe();
        let says = |known: &Known| known.read || known.nodes.get(node).is_some_and(|ranges| !ranges.is_empty());
        let known = tokio::time::timeout(SOURCE_PATIENCE, known.wait_for(says)).await.ok()?.ok()?;
        Some(Arc::clone(&known.nodes))
    }

    /// What nodes must enforce from now on, and the revisions that this, and all that did not change, is true of. A node that
    /// did not change is sent its new position only. A node that is gone is sent nothing more.
    pub fn publish(&self, compiled: Compiled, hub: Position, local_revision: u64) {
        let Position { epoch: hub_epoch, revision: hub_revision } = hub;
        let mut nodes = self.nodes();
        for gone in compiled.removed {
            if let Some(gone) = nodes.remove(&gone) {
                gone.replaced.cancel();
            }
        }
        for (name, rules) in compiled.changed {
            let node = nodes.entry(name).or_insert_with(Node::new);
            let number = node.target.borrow().as_ref().map_or(1, |last| last.place.generation.number + 1);
            let generation = Generation { term: self.shared.term, number };
            let place = Place { generation, hub_epoch, hub_revision, local_revision };
            node.target.send_replace(Some(Arc::new(Target { node: rules, place })));
        }
        for node in nodes.values() {
            node.target.send_if_modified(|target| {
                let Some(last) = target else { return false };
                let mut place = Place { hub_epoch, hub_revision, local_revision, ..last.place };
                if hub_epoch != last.place.hub_epoch {
                    place.generation.number += 1;
                }
                let moved = place != last.place;
                if moved {
                    *target = Some(Arc::new(Target { node: last.node.clone(), place }));
                }
                moved
            });
        }
    }

    /// What is known of every node that is, or ought to be, enforced.
    pub fn realisation(&self) -> BTreeMap<Arc<str>, NodeStatus> {
        let now = tokio::time::Instant::now();
        let status = |name: &str, node: &Node| {
            let rivals = node.instances.rivals(now).or_else(|| self.shared.kept.rivals(name));
            NodeStatus { rivals, ..node.status.clone() }
        };
        self.nodes().iter().map(|(name, node)| (Arc::clone(name), status(name, node))).collect()
    }

    /// Changes whenever the status of a node does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    fn nodes(&self) -> std::sync::MutexGuard<'_, BTreeMap<Arc<str>, Node>> {
        self.shared.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, node: &str, change: impl FnOnce(&mut NodeStatus)) {
        if let Some(node) = self.nodes().get_mut(node) {
            change(&mut node.status);
        }
        self.shared.changed.send_modify(|count| *count += 1);
    }

    /// A stream begins to speak for a node.
    async fn attach(&self, name: &Arc<str>, key: Fingerprint, instance: Instance) -> Result<Attached, Status> {
        let kept = &self.shared.kept;
        self.refuse_former(name, key, instance.address()).await?;
        if kept.awaits(name, &key) {
            let (node, from) = (Arc::clone(name), instance.address());
            let promoted = kept.change(move |it| it.promote(&node, &key, from)).await.flatten();
            if !promoted.map_err(|_| Status::internal("keep which key speaks for the node"))? {
                return Err(service::not_registered(name));
            }
        }
        let mut nodes = self.nodes();
        // Under the lock: who revokes it after this look sees the stream.
        if !kept.allows(name, &key) {
            return Err(service::not_registered(name));
        }
        let node = nodes.entry(Arc::clone(name)).or_insert_with(Node::new);
        if node.key != Some(key) {
            node.instances = Instances::default();
        }
        let is_open = node.status.connected;
        let now = tokio::time::Instant::now();
        let is_let_in = node.instances.take(instance, is_open, now);
        if let Some((served, refused)) = node.instances.to_warn(now) {
            tracing::warn!(
                node = %name, %served, %refused,
                "the node's key is used from two places: one is a copy of its folder; revoke the node, and enrol it anew"
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

    /// Refuses a key that a renewal has replaced. It is tried again and again, as by one of two processes with one key.
    async fn refuse_former(&self, name: &str, key: Fingerprint, from: SocketAddr) -> Result<(), Status> {
        if !self.shared.kept.was_replaced(name, &key) {
            return Ok(());
        }
        let node = name.to_owned();
        let rivals = self.shared.kept.change(move |it| it.dispute(&node, &key, from)).await.flatten();
        self.shared.changed.send_modify(|count| *count += 1);
        match rivals.map_err(|_| Status::internal("keep that two keys speak for the node"))? {
            Some((served, _)) => Err(Status::aborted(refusal(name, served))),
            None => Err(service::not_registered(name)),
        }
    }

    /// Ends the streams whose keys speak for their nodes no more: of one node, or of all.
    fn expel(&self, only: Option<&str>) {
        for (name, node) in self.nodes().iter().filter(|(name, _)| only.is_none_or(|only| only == &***name)) {
            if node.status.connected && node.key.is_some_and(|key| !self.shared.kept.allows(name, &key)) {
                tracing::info!(node = %name, "its stream ends: another key speaks for it now, or none");
                node.replaced.cancel();
            }
        }
    }

    /// Nodes are revoked by another process, which changes their files.
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
            let kept = Arc::clone(&self.shared.kept);
            match tokio::task::spawn_blocking(move || kept.reload()).await.map_err(Into::into).flatten() {
                Ok(false) => {}
                Ok(true) => self.expel(None),
                Err(error) => tracing::error!(%error, "which keys speak for nodes cannot be read; what was read stays"),
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

/// Keeps the certificate towards agents fresh.
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
            tracing::error!(error, "the certificate towards agents cannot be renewed");
        }
    }
}

/// What a process is sent that is refused since another one is served.
fn refusal(node: &str, served: SocketAddr) -> String {
    format!("the key of node {node} is in use from {served}: one of both is a copy; revoke the node, and enrol it anew")
}

#[cfg(test)]
fn instance_of_test(number: u8) -> Instance {
    Instance::new(&[number; 16], SocketAddr::from(([192, 0, 2, number], 1)))
}

#[cfg(test)]
mod tests {
    use hanse_identity::TrustDomain;
    use hanse_identity::ca::Ca;
    use hanse_identity::keys::{Certificate, Credentials, Key, RequestedKey};
    use hanse_identity::tls::TlsClient;
    use hanse_proto::agent::v1 as wire;
    use hanse_proto::agent::v1::agents_client::AgentsClient;
    use hanse_protocol::{self, Assembled, Assembler};
    use hanse_ruleset::{NodeConfig, RuleSet};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;
    use tonic::{Status, Streaming};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);
    const SOON: Duration = Duration::from_secs(20);

    fn intermediate(root: &Ca, cluster: &str) -> Credentials {
        let key = Key::generate().expect("a key");
        let requested = RequestedKey::from_request(&key.request().expect("signed")).expect("whole");
        let issued = root.issue_intermediate(cluster, &requested, HOUR, SystemTime::now()).expect("issued");
        Credentials::new(key, issued).expect("they fit")
    }

    fn root() -> Ca {
        Ca::root(&TrustDomain::new("hanse.test").expect("a domain"), HOUR, SystemTime::now()).expect("a root")
    }

    /// The cluster `c`, whose files are in `data`.
    pub(super) fn joined(data: &Path) -> MemberIdentity {
        let (root, cluster) = (root(), Identity::cluster("c").expect("a name"));
        root.certificate().write(&data.join("root.pem")).expect("written");
        intermediate(&root, "c").write_file(&data.join("intermediate.pem")).expect("written");
        let own = root.issue_credentials(&cluster, HOUR, SystemTime::now()).expect("issued");
        own.write_file(&data.join("member.pem")).expect("written");
        MemberIdentity::read(data, "c").expect("whole").expect("it has joined")
    }

    struct World {
        identity: MemberIdentity,
        fanout: Fanout,
        address: String,
        shutdown: Shutdown,
        folder: tempfile::TempDir,
    }

    impl Drop for World {
        fn drop(&mut self) {
            self.shutdown.begin();
        }
    }

    impl World {
        async fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let identity = joined(folder.path());
            let fanout = Fanout::new(folder.path(), HOUR).expect("a term");
            let (shutdown, any) = (Shutdown::default(), "127.0.0.1:0".parse().expect("an address"));
            let (agents, _) = fanout.serve(&identity, any, any, Inbox::new().0, &shutdown).await.expect("it listens");
            Self { identity, fanout, address: agents.to_string(), shutdown, folder }
        }

        /// Whoever holds `credentials` opens a stream.
        async fn open(&self, credentials: Credentials) -> anyhow::Result<Agent> {
            self.open_as(credentials, 0).await
        }

        /// As the process of this number.
        async fn open_as(&self, credentials: Credentials, instance: u8) -> anyhow::Result<Agent> {
            let authority = self.identity.authority();
            let trust = Trust::new(authority.certificate(), |identity| matches!(identity, Identity::Cluster(_)))?;
            let client = TlsClient::mutual(CredentialStore::new(credentials)?, &trust)?;
            let connection = client.connect(&self.address).await?;
            let (outbox, sending) = mpsc::channel(4);
            let digest = hanse_protocol::digest(RuleSet::default().digest());
            let hello = wire::Hello { digest, instance: vec![instance; 16].into(), ..wire::Hello::default() };
            outbox.send(message(wire::agent_to_member::Message::Hello(hello))).await?;
            let stream = AgentsClient::new(connection.channel).sync(ReceiverStream::new(sending)).await?.into_inner();
            Ok(Agent { outbox, stream, held: RuleSet::default() })
        }

        /// A certificate for a new key, as an agent asks for it that has `credentials`.
        async fn renew(&self, credentials: Credentials) -> anyhow::Result<Credentials> {
            let authority = self.identity.authority();
            let trust = Trust::new(authority.certificate(), |identity| matches!(identity, Identity::Cluster(_)))?;
            let connection =
                TlsClient::mutual(CredentialStore::new(credentials)?, &trust)?.connect(&self.address).await?;
            let key = Key::generate()?;
            let request = wire::RenewRequest { request: key.request()?.into() };
            let answer = AgentsClient::new(connection.channel).renew(request).await?.into_inner();
            Ok(Credentials::new(key, Certificate::from_der(&answer.certificate)?)?)
        }

        async fn agent(&self, node: &str) -> Agent {
            let node = Identity::node("c", node).expect("a name");
            let issued = self.identity.authority().issue_credentials(&node, HOUR, SystemTime::now());
            self.open(issued.expect("issued")).await.expect("its member serves it")
        }

        /// Each node's rules differ, by its place in `nodes` and by `number`.
        fn publish(&self, nodes: &[&str], number: u8) {
            let changed = nodes.iter().enumerate().map(|(at, name)| {
                let range = format!("10.{at}.{number}.0/24").parse().expect("a net");
                let node = NodeConfig { pod_ranges: vec![range], ..NodeConfig::default() };
                let rules = Arc::new(RuleSet { node, ..RuleSet::default() });
                ((*name).into(), NodeRules { digest: rules.digest(), rules, step: None })
            });
            let compiled = Compiled { changed: changed.collect(), removed: Vec::new() };
            let hub = Position { epoch: 1, revision: u64::from(number) };
            self.fanout.publish(compiled, hub, 1);
        }
    }

    fn message(message: wire::agent_to_member::Message) -> wire::AgentToMember {
        wire::AgentToMember { message: Some(message) }
    }

    struct Agent {
        outbox: mpsc::Sender<wire::AgentToMember>,
        stream: Streaming<wire::MemberToAgent>,
        held: RuleSet,
    }

    impl Agent {
        /// The range of the next rule set.
        async fn receive(&mut self) -> Result<String, Status> {
            let mut assembler = Assembler::default();
            loop {
                let next = tokio::time::timeout(SOON, self.stream.message()).await.expect("in time")?;
                let next = next.ok_or_else(|| Status::cancelled("the stream ended"))?;
                if let Assembled::Delta(delta) = assembler.receive(next).expect("understood") {
                    self.held = self.held.apply(&delta).expect("it fits");
                    return Ok(self.held.node.pod_ranges[0].to_string());
                }
            }
        }

        async fn ack(&self) {
            let ack = wire::Ack {
                generation: Some(hanse_protocol::generation(self.held.generation)),
                digest: hanse_protocol::digest(self.held.digest()),
                revisions: Some(wire::Revisions { hub: self.held.hub_revision, local: self.held.local_revision }),
                ..wire::Ack::default()
            };
            self.outbox.send(message(wire::agent_to_member::Message::Ack(ack))).await.expect("the stream is open");
        }
    }

    #[tokio::test]
    async fn a_slow_agent_makes_nobody_wait_and_is_sent_the_newest() {
        let world = World::new().await;
        let nodes = ["slow", "quick"];
        let (mut slow, mut quick) = (world.agent("slow").await, world.agent("quick").await);
        world.publish(&nodes, 1);
        assert_eq!(slow.receive().await.expect("sent"), "10.0.1.0/24");
        for number in 1..=20 {
            world.publish(&nodes, number);
            // What comes between is left out where something newer is there already.
            while quick.receive().await.expect("sent") != format!("10.1.{number}.0/24") {
                quick.ack().await;
            }
            quick.ack().await;
        }
        slow.ack().await;
        assert_eq!(slow.receive().await.expect("sent"), "10.0.20.0/24", "nothing in between");
    }

    #[tokio::test]
    async fn a_lock_that_another_holds_makes_only_those_wait_who_need_it() {
        let world = World::new().await;
        let key = |name: &str| Fingerprint::of(name.as_bytes());
        let (kept, now) = (&world.fanout.shared.kept, SystemTime::now());
        for node in ["a", "b"] {
            let locked = kept.lock().expect("free");
            locked.enrolled(node, &key("first"), now, now + HOUR).expect("kept");
            let from = instance_of_test(1).address();
            assert!(locked.renew(node, &key("first"), &key("second"), now + HOUR, from).expect("kept"));
        }
        let held = kept.lock().expect("free");
        let fanout = world.fanout.clone();
        let renewed = tokio::spawn(async move { fanout.attach(&"a".into(), key("second"), instance_of_test(1)).await });
        // It has begun, on the only thread.
        tokio::task::yield_now().await;
        world.publish(&["a", "b"], 1);
        let first = world
            .fanout
            .attach(&"b".into(), key("first"), instance_of_test(1))
            .await
            .expect("nothing is changed by it");
        assert!(first.target.borrow().is_some() && !renewed.is_finished());
        drop(held);
        assert!(renewed.await.expect("no panic").is_ok());
        assert!(!kept.allows("a", &key("first")), "the renewed key is the only one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_came_while_the_member_was_away_waits_for_the_source() {
        let folder = tempfile::tempdir().expect("a folder");
        let range: IpNet = "10.1.0.0/24".parse().expect("a net");
        let start = || Fanout::new(folder.path(), HOUR).expect("a term");
        let know = |fanout: &Fanout, nodes: &[&str]| {
            fanout.know(nodes.iter().map(|node| ((*node).into(), vec![range])));
        };
        know(&start(), &["old"]);
        let fanout = start();
        let known = async |node: &str| Some(fanout.known(node).await?.get(node).cloned());
        assert_eq!(known("old").await, Some(Some(vec![range])), "by what the last one read");
        assert_eq!(known("new").await, None, "in time nothing is read");
        let read = async {
            tokio::task::yield_now().await;
            know(&fanout, &["old", "new"]);
        };
        assert_eq!(tokio::join!(known("new"), read).0, Some(Some(vec![range])));
        assert_eq!(known("none").await, Some(None), "the source knows nothing of it");
    }

    #[tokio::test]
    async fn of_two_processes_with_one_key_one_is_served_and_both_are_named() {
        let world = World::new().await;
        world.publish(&["a"], 1);
        let node = Identity::node("c", "a").expect("a name");
        let key = world.identity.authority().issue_credentials(&node, HOUR, SystemTime::now()).expect("issued");
        let rivals = || world.fanout.realisation()["a"].rivals;
        let mut changes = world.fanout.changes();
        let mut real = world.open_as(key.clone(), 1).await.expect("served");
        real.receive().await.expect("sent");
        // It may have started again; the earlier stream ends.
        let mut copy = world.open_as(key.clone(), 2).await.expect("served");
        copy.receive().await.expect("sent");
        assert!(real.receive().await.is_err() && rivals().is_none());
        // It has not.
        let mut real = world.open_as(key.clone(), 1).await.expect("served");
        real.receive().await.expect("sent");
        assert!(copy.receive().await.is_err());
        for _ in 0..5 {
            changes.mark_unchanged();
            let refused = world.open_as(key.clone(), 2).await.err().expect("refused");
            let told = format!("{refused:#}");
            assert!(told.contains("the key of node a is in use from 127.0.0.1:"), "{told}");
            assert!(changes.has_changed().expect("it lives"), "what is reported");
        }
        let (served, refused) = rivals().expect("both are named");
        assert!(served != refused && served.ip() == refused.ip());
        // Its stream goes on.
        real.ack().await;
        world.publish(&["a"], 2);
        assert_eq!(real.receive().await.expect("sent"), "10.0.2.0/24");
        // Another key speaks for the node now: of that one nobody has a copy.
        let key = world.identity.authority().issue_credentials(&node, HOUR, SystemTime::now()).expect("issued");
        world.open_as(key, 3).await.expect("served").receive().await.expect("sent");
        assert_eq!(rivals(), None);
    }

    /// Who has a copy of a node's folder, and renews, has the key that speaks for the node; the node has the former one.
    #[tokio::test]
    async fn a_copy_of_a_nodes_folder_that_renews_is_named_when_the_node_comes_back() {
        let world = World::new().await;
        world.publish(&["a"], 1);
        let node = Identity::node("c", "a").expect("a name");
        let key = world.identity.authority().issue_credentials(&node, HOUR, SystemTime::now()).expect("issued");
        let enrolled = |kept: &Nodes, key: &Credentials| {
            let now = SystemTime::now();
            kept.lock().expect("free").enrolled("a", &key.certificate.public, now, now + HOUR).expect("kept");
        };
        enrolled(&world.fanout.shared.kept, &key);
        let rivals = || world.fanout.realisation()["a"].rivals;
        let mut real = world.open_as(key.clone(), 1).await.expect("served");
        real.receive().await.expect("sent");
        // The node renews, and crashes before it has the answer: its key goes on, and renews again.
        world.renew(key.clone()).await.expect("renewed");
        let mut real = world.open_as(key.clone(), 2).await.expect("served");
        real.receive().await.expect("sent");
        assert_eq!(rivals(), None);
        let copy_key = world.renew(key.clone()).await.expect("renewed");
        let mut copy = world.open_as(copy_key.clone(), 3).await.expect("served");
        copy.receive().await.expect("sent");
        assert!(real.receive().await.is_err() && rivals().is_none());
        let mut changes = world.fanout.changes();
        changes.mark_unchanged();
        let refused = world.open_as(key.clone(), 2).await.err().expect("refused");
        assert!(format!("{refused:#}").contains("the key of node a is in use from 127.0.0.1:"), "{refused:#}");
        assert!(changes.has_changed().expect("it lives"), "what is reported");
        let (served, refused) = rivals().expect("both are named");
        assert!(served != refused && served.ip() == refused.ip());
        // The other ways to use it say so as well, and it gets no certificate.
        assert!(format!("{:#}", world.renew(key.clone()).await.expect_err("refused")).contains("one of both"));
        // A member that starts again still knows it.
        let restarted = Fanout::new(world.folder.path(), HOUR).expect("a term");
        assert_eq!(restarted.shared.kept.rivals("a"), Some((served, refused)));
        // Until it is enrolled anew.
        let fresh = world.identity.authority().issue_credentials(&node, HOUR, SystemTime::now()).expect("issued");
        enrolled(&world.fanout.shared.kept, &fresh);
        world.open_as(fresh, 4).await.expect("served").receive().await.expect("sent");
        assert_eq!(rivals(), None);
        assert!(world.open_as(copy_key, 3).await.is_err() && rivals().is_none());
    }

    /// An agent does not send the epoch of what it acknowledges, so within a term each generation is of one epoch.
    #[tokio::test]
    async fn a_restored_hub_gives_each_node_a_new_generation() {
        let world = World::new().await;
        world.publish(&["a"], 7);
        let key = Fingerprint::of(b"key");
        let attached = world.fanout.attach(&"a".into(), key, instance_of_test(1)).await.expect("served");
        let place = || attached.target.borrow().as_ref().map(|it| it.place).expect("there is one");
        let publish = |epoch, revision| {
            world.fanout.publish(Compiled::default(), Position { epoch, revision }, 1);
            (place().generation.number, place().hub_epoch, place().hub_revision)
        };
        assert_eq!(publish(1, 7), (1, 1, 7));
        assert_eq!(publish(1, 8), (1, 1, 8));
        assert_eq!(publish(2, 8), (2, 2, 8));
        assert_eq!(publish(2, 9), (2, 2, 9));
    }

    #[tokio::test]
    async fn a_certificate_asks_for_its_own_nodes_rules() {
        let world = World::new().await;
        world.publish(&["a", "b"], 1);
        for (node, range) in [("a", "10.0.1.0/24"), ("b", "10.1.1.0/24")] {
            assert_eq!(world.agent(node).await.receive().await.expect("sent"), range);
        }
        let authority = world.identity.authority();
        let own = authority.issue_credentials(&Identity::cluster("c").expect("a name"), HOUR, SystemTime::now());
        let member = world.identity.credentials().current();
        let other = Ca::new(intermediate(&root(), "d"), false).expect("an authority");
        let node = Identity::node("d", "a").expect("a name");
        let stranger = other.issue_credentials(&node, HOUR, SystemTime::now());
        for (who, credentials) in [
            ("the cluster", own.expect("issued")),
            ("its member", member),
            ("a node of another", stranger.expect("issued")),
        ] {
            // TLS 1.3 clients learn of a refusal only with the first answer.
            let Ok(mut agent) = world.open(credentials).await else { continue };
            assert!(agent.receive().await.is_err(), "{who}");
        }
    }
}
