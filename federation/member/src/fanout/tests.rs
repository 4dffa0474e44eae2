//! Agents of a member, over real connections.

use std::collections::BTreeSet;
use std::path::Path;

use hanse_identity::TrustDomain;
use hanse_identity::ca::Ca;
use hanse_identity::keys::{Certificate, Credentials, Fingerprint, Key, RequestedKey};
use hanse_identity::tls::TlsClient;
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_protocol::{self, Assembled, Assembler};
use hanse_ruleset::{NodeConfig, RuleSet};
use ipnet::IpNet;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::nodes::Nodes;
use super::*;
use crate::exchange::model::Position;
use crate::world::{Compiled, NodeRules};

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
        let folder = tempfile::tempdir().expect("a directory");
        let identity = joined(folder.path());
        let fanout = Fanout::new(folder.path(), HOUR).expect("a term");
        let (shutdown, any) = (Shutdown::default(), "127.0.0.1:0".parse().expect("an address"));
        let (agents, _) = fanout.serve(&identity, any, any, Inbox::new().0, &shutdown).await.expect("it listens");
        Self { identity, fanout, address: agents.to_string(), shutdown, folder }
    }

    /// Opens a stream with `credentials`.
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
        Ok(Agent { outbox, stream, rules: RuleSet::default() })
    }

    /// Renews `credentials`, for a new key.
    async fn renew(&self, credentials: Credentials) -> anyhow::Result<Credentials> {
        let authority = self.identity.authority();
        let trust = Trust::new(authority.certificate(), |identity| matches!(identity, Identity::Cluster(_)))?;
        let connection = TlsClient::mutual(CredentialStore::new(credentials)?, &trust)?.connect(&self.address).await?;
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

    /// The rules of a node depend on its index in `nodes` and on `number`.
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
    rules: RuleSet,
}

impl Agent {
    /// The range of the next rule set.
    async fn receive(&mut self) -> Result<String, Status> {
        let mut assembler = Assembler::default();
        loop {
            let next = tokio::time::timeout(SOON, self.stream.message()).await.expect("in time")?;
            let next = next.ok_or_else(|| Status::cancelled("the stream ended"))?;
            if let Assembled::Delta(delta) = assembler.receive(next).expect("understood") {
                self.rules = self.rules.apply(&delta).expect("it fits");
                return Ok(self.rules.node.pod_ranges[0].to_string());
            }
        }
    }

    async fn ack(&self) {
        let ack = wire::Ack {
            generation: Some(hanse_protocol::generation(self.rules.generation)),
            digest: hanse_protocol::digest(self.rules.digest()),
            revisions: Some(wire::Revisions { hub: self.rules.hub_revision, local: self.rules.local_revision }),
            ..wire::Ack::default()
        };
        self.outbox.send(message(wire::agent_to_member::Message::Ack(ack))).await.expect("the stream is open");
    }
}

#[tokio::test]
async fn slow_agent_is_sent_the_newest_rules_and_delays_no_other() {
    let world = World::new().await;
    let nodes = ["slow", "quick"];
    let (mut slow, mut quick) = (world.agent("slow").await, world.agent("quick").await);
    world.publish(&nodes, 1);
    assert_eq!(slow.receive().await.expect("sent"), "10.0.1.0/24");
    for number in 1..=20 {
        world.publish(&nodes, number);
        // A newer rule set replaces one that is not sent yet.
        while quick.receive().await.expect("sent") != format!("10.1.{number}.0/24") {
            quick.ack().await;
        }
        quick.ack().await;
    }
    slow.ack().await;
    assert_eq!(slow.receive().await.expect("sent"), "10.0.20.0/24", "nothing in between");
}

#[tokio::test]
async fn locked_keys_delay_only_streams_that_change_them() {
    let world = World::new().await;
    let key = |name: &str| Fingerprint::of(name.as_bytes());
    let (keys, now) = (&world.fanout.shared.keys, SystemTime::now());
    for node in ["a", "b"] {
        let locked = keys.lock().expect("not locked");
        locked.enrolled(node, &key("first"), now, now + HOUR).expect("kept");
        let from = instance_of_test(1).address();
        assert!(locked.renew(node, &key("first"), &key("second"), now + HOUR, from).expect("kept"));
    }
    let locked = keys.lock().expect("not locked");
    let fanout = world.fanout.clone();
    let renewed = tokio::spawn(async move { fanout.attach(&"a".into(), key("second"), instance_of_test(1)).await });
    // It has started, on the only thread.
    tokio::task::yield_now().await;
    world.publish(&["a", "b"], 1);
    let first =
        world.fanout.attach(&"b".into(), key("first"), instance_of_test(1)).await.expect("nothing is changed by it");
    assert!(first.target.borrow().is_some() && !renewed.is_finished());
    drop(locked);
    assert!(renewed.await.expect("no panic").is_ok());
    assert!(!keys.allows("a", &key("first")), "the renewed key is the only one");
}

#[tokio::test(start_paused = true)]
async fn enrolment_of_a_new_node_waits_for_the_source() {
    let folder = tempfile::tempdir().expect("a directory");
    let range: IpNet = "10.1.0.0/24".parse().expect("a net");
    let start = || Fanout::new(folder.path(), HOUR).expect("a term");
    let know = |fanout: &Fanout, nodes: &[&str]| {
        fanout.set_source_nodes(
            nodes.iter().map(|node| ((*node).into(), vec![range])),
            BTreeSet::new(),
            BTreeSet::new(),
        );
    };
    know(&start(), &["old"]);
    let fanout = start();
    let known = async |node: &str| Some(fanout.source_nodes(node).await?.get(node).cloned());
    assert_eq!(known("old").await, Some(Some(vec![range])), "as the last process read it");
    assert_eq!(known("new").await, None, "nothing is read in time");
    let read = async {
        tokio::task::yield_now().await;
        know(&fanout, &["old", "new"]);
    };
    assert_eq!(tokio::join!(known("new"), read).0, Some(Some(vec![range])));
    assert_eq!(known("none").await, Some(None), "the source does not have it");
}

#[tokio::test]
async fn serves_one_of_two_processes_with_one_key_and_reports_both() {
    let world = World::new().await;
    world.publish(&["a"], 1);
    let node = Identity::node("c", "a").expect("a name");
    let key = world.identity.authority().issue_credentials(&node, HOUR, SystemTime::now()).expect("issued");
    let rivals = || world.fanout.realisation()["a"].rivals;
    let mut changes = world.fanout.changes();
    let mut real = world.open_as(key.clone(), 1).await.expect("served");
    real.receive().await.expect("sent");
    // It may be a restart; the earlier stream ends.
    let mut copy = world.open_as(key.clone(), 2).await.expect("served");
    copy.receive().await.expect("sent");
    assert!(real.receive().await.is_err() && rivals().is_none());
    // It is not.
    let mut real = world.open_as(key.clone(), 1).await.expect("served");
    real.receive().await.expect("sent");
    assert!(copy.receive().await.is_err());
    for _ in 0..5 {
        changes.mark_unchanged();
        let refused = world.open_as(key.clone(), 2).await.err().expect("refused");
        let message = format!("{refused:#}");
        assert!(message.contains("the key of node a is in use from 127.0.0.1:"), "{message}");
        assert!(changes.has_changed().expect("it runs"), "it is reported");
    }
    let (served, refused) = rivals().expect("both are named");
    assert!(served != refused && served.ip() == refused.ip());
    // Its stream continues.
    real.ack().await;
    world.publish(&["a"], 2);
    assert_eq!(real.receive().await.expect("sent"), "10.0.2.0/24");
    // The node has another key now, of which there is no copy.
    let key = world.identity.authority().issue_credentials(&node, HOUR, SystemTime::now()).expect("issued");
    world.open_as(key, 3).await.expect("served").receive().await.expect("sent");
    assert_eq!(rivals(), None);
}

/// A copy of a node's directory that renews has the registered key; the node has the former one.
#[tokio::test]
async fn reports_a_renewed_copy_of_a_nodes_directory_when_the_node_returns() {
    let world = World::new().await;
    world.publish(&["a"], 1);
    let node = Identity::node("c", "a").expect("a name");
    let key = world.identity.authority().issue_credentials(&node, HOUR, SystemTime::now()).expect("issued");
    let enrolled = |keys: &Nodes, key: &Credentials| {
        let now = SystemTime::now();
        keys.lock().expect("not locked").enrolled("a", &key.certificate.public, now, now + HOUR).expect("kept");
    };
    enrolled(&world.fanout.shared.keys, &key);
    let rivals = || world.fanout.realisation()["a"].rivals;
    let mut real = world.open_as(key.clone(), 1).await.expect("served");
    real.receive().await.expect("sent");
    // The node renews, and crashes before it has the answer: its key stays valid, and renews again.
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
    assert!(changes.has_changed().expect("it runs"), "it is reported");
    let (served, refused) = rivals().expect("both are named");
    assert!(served != refused && served.ip() == refused.ip());
    // A renewal with it is refused with the same message.
    assert!(format!("{:#}", world.renew(key.clone()).await.expect_err("refused")).contains("one of both"));
    // A restarted member still has it.
    let restarted = Fanout::new(world.folder.path(), HOUR).expect("a term");
    assert_eq!(restarted.shared.keys.rivals("a"), Some((served, refused)));
    // Until the node enrols again.
    let fresh = world.identity.authority().issue_credentials(&node, HOUR, SystemTime::now()).expect("issued");
    enrolled(&world.fanout.shared.keys, &fresh);
    world.open_as(fresh, 4).await.expect("served").receive().await.expect("sent");
    assert_eq!(rivals(), None);
    assert!(world.open_as(copy_key, 3).await.is_err() && rivals().is_none());
}

#[tokio::test]
async fn agent_was_last_seen_when_its_stream_ended() {
    let world = World::new().await;
    let (node, key) = ("a".into(), Fingerprint::of(b"key"));
    let first = world.fanout.attach(&node, key, instance_of_test(1)).await.expect("served");
    let second = world.fanout.attach(&node, key, instance_of_test(1)).await.expect("served");
    let last_seen = || world.fanout.realisation()["a"].last_seen;
    world.fanout.detach("a", first.number);
    assert_eq!(last_seen(), None, "the newer stream is open");
    let before_end = std::time::Instant::now();
    world.fanout.detach("a", second.number);
    assert!(last_seen().is_some_and(|at| at >= before_end), "{:?}", last_seen());
}

/// An agent does not send the epoch of what it acknowledges, so within a term each generation is of one epoch.
#[tokio::test]
async fn restored_hub_gives_each_node_a_new_generation() {
    let world = World::new().await;
    world.publish(&["a"], 7);
    let key = Fingerprint::of(b"key");
    let attached = world.fanout.attach(&"a".into(), key, instance_of_test(1)).await.expect("served");
    let position = || attached.target.borrow().as_ref().map(|it| it.position).expect("there is one");
    let publish = |epoch, revision| {
        world.fanout.publish(Compiled::default(), Position { epoch, revision }, 1);
        (position().generation.number, position().hub_epoch, position().hub_revision)
    };
    assert_eq!(publish(1, 7), (1, 1, 7));
    assert_eq!(publish(1, 8), (1, 1, 8));
    assert_eq!(publish(2, 8), (2, 2, 8));
    assert_eq!(publish(2, 9), (2, 2, 9));
}

#[tokio::test]
async fn certificate_gives_access_to_its_own_nodes_rules_only() {
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
        // With TLS 1.3 a client notices a refusal with the first answer.
        let Ok(mut agent) = world.open(credentials).await else { continue };
        assert!(agent.receive().await.is_err(), "{who}");
    }
}
