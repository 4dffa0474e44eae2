//! What a member is received of connections, by the task alone and by the whole program.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hanse_agent::flows::{WindowResult, listen, report};
use hanse_agent::identity::NodeIdentity;
use hanse_agent::metrics::AgentMetrics;
use hanse_agent::reviews::MemberReview;
use hanse_agent::snapshot;
use hanse_agent::status::Status as AgentStatus;
use hanse_dataplane::nftables::flows::Flows;
use hanse_identity::ca::Ca;
use hanse_identity::keys::{Credentials, Fingerprint, Key, RequestedKey};
use hanse_identity::tls::{
    Connections, CredentialStore, IncomingLimits, ServerTls, Trust, http2_server, incoming, install_provider, peer,
};
use hanse_identity::{Identity, TrustDomain};
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_server::{Agents, AgentsServer};
use hanse_runtime::monitor::{Review as _, Unreviewed, Verdict};
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::enforcer::{Node, accepting};
use crate::net::until;

const HOUR: Duration = Duration::from_secs(3_600);
/// A window, and what a machine under load takes on top.
const SOON: Duration = Duration::from_secs(20);

/// The key and the address of the connection.
type Sender = (Fingerprint, SocketAddr);

/// A member that receives flows, which it records with their sender, and refuses while it has refusals; and that reviews tokens by their
/// text.
struct Service {
    refusals: Arc<Mutex<VecDeque<Code>>>,
    received: mpsc::UnboundedSender<(Sender, wire::Flows)>,
}

#[tonic::async_trait]
impl Agents for Service {
    async fn renew(&self, _: Request<wire::RenewRequest>) -> Result<Response<wire::EnrolResponse>, Status> {
        Err(Status::unavailable("not part of this test"))
    }

    type SyncStream = Pin<Box<dyn Stream<Item = Result<wire::MemberToAgent, Status>> + Send>>;

    async fn sync(&self, _: Request<Streaming<wire::AgentToMember>>) -> Result<Response<Self::SyncStream>, Status> {
        Err(Status::unavailable("not part of this test"))
    }

    async fn report_flows(&self, request: Request<wire::Flows>) -> Result<Response<wire::FlowsTaken>, Status> {
        let from = peer(&request)?;
        let by = (from.certificate.as_ref().expect("shown").public, from.address);
        let _ = self.received.send((by, request.into_inner()));
        match self.refusals.lock().unwrap_or_else(PoisonError::into_inner).pop_front() {
            Some(code) => Err(Status::new(code, "no")),
            None => Ok(Response::new(wire::FlowsTaken {})),
        }
    }

    async fn review_metrics_token(
        &self,
        request: Request<wire::MetricsToken>,
    ) -> Result<Response<wire::MetricsVerdict>, Status> {
        let token = request.into_inner().token;
        let user = if token == "forbidden" { "eve".to_owned() } else { String::new() };
        match &*token {
            "down" => Err(Status::unavailable("the API server does not answer")),
            // An answer of another version: nothing is allowed that is not authenticated.
            "odd" => Ok(Response::new(wire::MetricsVerdict { authenticated: false, allowed: true, user })),
            _ => {
                let (authenticated, allowed) = (token != "invalid", token == "allowed");
                Ok(Response::new(wire::MetricsVerdict { authenticated, allowed, user }))
            }
        }
    }
}

struct Member {
    authority: Ca,
    address: String,
    refusals: Arc<Mutex<VecDeque<Code>>>,
    received: mpsc::UnboundedReceiver<(Sender, wire::Flows)>,
    stop: CancellationToken,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Member {
    /// Of the cluster `c`.
    async fn new() -> Self {
        install_provider();
        let (now, domain) = (SystemTime::now(), TrustDomain::new("hanse.test").expect("a domain"));
        let root = Ca::root(&domain, HOUR, now).expect("a root");
        let key = Key::generate().expect("a key");
        let requested = RequestedKey::from_request(&key.request().expect("signed")).expect("whole");
        let issued = root.issue_intermediate("c", &requested, HOUR, now).expect("issued");
        let authority = Ca::new(Credentials::new(key, issued).expect("they fit"), false).expect("an authority");
        let own = authority.issue_credentials(&Identity::cluster("c").expect("a name"), HOUR, now).expect("issued");
        let trust = Trust::new(authority.certificate(), |identity| matches!(identity, Identity::Node { .. }));
        let own = CredentialStore::new(own).expect("usable");
        let tls = ServerTls::mutual(own, &trust.expect("an anchor")).expect("TLS");
        let (stop, any) = (CancellationToken::new(), "127.0.0.1:0".parse().expect("an address"));
        let (limits, connections) = (IncomingLimits::default(), Connections::default());
        let incoming = incoming(any, tls, limits, connections, stop.clone()).await.expect("it listens");
        let (address, refusals) = (incoming.address().to_string(), Arc::default());
        let (sender, received) = mpsc::unbounded_channel();
        let service = Service { refusals: Arc::clone(&refusals), received: sender };
        let until = stop.clone().cancelled_owned();
        let server = http2_server().add_service(AgentsServer::new(service));
        tokio::spawn(server.serve_with_incoming_shutdown(incoming, until));
        Self { authority, address, refusals, received, stop }
    }

    fn issue(&self, lifetime: Duration) -> Credentials {
        let node = Identity::node("c", "n").expect("a name");
        self.authority.issue_credentials(&node, lifetime, SystemTime::now()).expect("issued")
    }

    /// What node `n` has once it has enrolled.
    fn enrol(&self, data: &Path) -> NodeIdentity {
        self.authority.certificate().write(&data.join("authority.pem")).expect("written");
        self.issue(HOUR).write_file(&data.join("node.pem")).expect("written");
        NodeIdentity::read(data, "n").expect("whole").expect("it has enrolled")
    }

    async fn next(&mut self) -> Option<(Sender, wire::Flows)> {
        tokio::time::timeout(SOON, self.received.recv()).await.ok().flatten()
    }

    /// By which key, and what.
    async fn next_by(&mut self) -> Option<(Fingerprint, wire::Flows)> {
        self.next().await.map(|((key, _), flows)| (key, flows))
    }
}

fn window(port: u32, missed: u64) -> wire::Flows {
    wire::Flows { flows: vec![wire::Flow { port, count: 1, ..wire::Flow::default() }], missed }
}

struct Reporter {
    windows: mpsc::Sender<WindowResult>,
    state: watch::Receiver<String>,
}

impl Reporter {
    fn new(member: &Member, identity: &NodeIdentity, members: Vec<String>) -> Self {
        let (windows, receiver) = mpsc::channel(8);
        let (sender, state) = watch::channel(String::new());
        tokio::spawn(report(receiver, sender, identity.clone(), members, AgentMetrics::default(), member.stop.clone()));
        Self { windows, state }
    }

    async fn state(&mut self, wanted: &str) {
        let reached = tokio::time::timeout(SOON, self.state.wait_for(|state| state.contains(wanted))).await;
        assert!(reached.is_ok_and(|it| it.is_ok()), "{wanted}: {:?}", self.state);
    }
}

#[tokio::test]
async fn reports_windows_to_a_member_that_accepts_them_with_the_newest_certificate() {
    let (mut member, data) = (Member::new().await, tempfile::tempdir().expect("a folder"));
    let identity = member.enrol(data.path());
    // The first does not exist; the second refuses twice.
    member.refusals.lock().expect("whole").extend([Code::Unavailable, Code::PermissionDenied]);
    let members = vec!["127.0.0.1:1".to_owned(), member.address.clone()];
    let mut reporter = Reporter::new(&member, &identity, members);
    reporter.windows.send(Ok(window(1, 5))).await.expect("taken");
    reporter.state("not reported: reach the member").await;
    let key = identity.credentials.current().certificate.public;
    for refused in 0..3 {
        assert_eq!(member.next_by().await, Some((key, window(1, 5))), "sent again after {refused} refusals");
    }
    reporter.state("reported to the member").await;
    reporter.windows.send(Ok(window(2, 0))).await.expect("taken");
    assert_eq!(member.next_by().await, Some((key, window(2, 0))), "dropped decisions are reported once");
    identity.credentials.replace(member.issue(HOUR)).expect("usable");
    let renewed = identity.credentials.current().certificate.public;
    assert_ne!(renewed, key);
    reporter.windows.send(Ok(window(3, 0))).await.expect("taken");
    assert_eq!(member.next_by().await, Some((renewed, window(3, 0))));
    // A window that cannot be read is not sent again.
    member.refusals.lock().expect("whole").push_back(Code::InvalidArgument);
    reporter.windows.send(Ok(window(4, 1))).await.expect("taken");
    assert_eq!(member.next_by().await, Some((renewed, window(4, 1))));
    reporter.state("cannot read them").await;
    reporter.windows.send(Ok(window(5, 0))).await.expect("taken");
    assert_eq!(member.next_by().await, Some((renewed, window(5, 2))));
}

#[tokio::test]
async fn reuses_a_connection_unless_it_may_end_during_a_call() {
    for (lifetime, is_kept) in [(HOUR, true), (Duration::from_secs(8), false)] {
        let (mut member, data) = (Member::new().await, tempfile::tempdir().expect("a folder"));
        let identity = member.enrol(data.path());
        identity.credentials.replace(member.issue(lifetime)).expect("usable");
        let reporter = Reporter::new(&member, &identity, vec![member.address.clone()]);
        let mut over = Vec::new();
        for port in [1, 2] {
            reporter.windows.send(Ok(window(port, 0))).await.expect("taken");
            let ((_, from), received) = member.next().await.expect("received");
            assert_eq!(received, window(port, 0));
            over.push(from);
        }
        assert_eq!(over[0] == over[1], is_kept, "{lifetime:?}: {over:?}");
    }
}

#[tokio::test]
async fn busy_member_receives_windows_over_the_same_connection() {
    let (mut member, data) = (Member::new().await, tempfile::tempdir().expect("a folder"));
    let identity = member.enrol(data.path());
    member.refusals.lock().expect("whole").push_back(Code::ResourceExhausted);
    let mut reporter = Reporter::new(&member, &identity, vec![member.address.clone()]);
    reporter.windows.send(Ok(window(1, 0))).await.expect("taken");
    let first = member.next().await.expect("received");
    reporter.state("the member is busy").await;
    assert_eq!(member.next().await, Some(first), "the same key and port of the agent");
    reporter.state("reported to the member").await;
    // A certificate that arrives meanwhile is used at once.
    member.refusals.lock().expect("whole").push_back(Code::ResourceExhausted);
    reporter.windows.send(Ok(window(2, 0))).await.expect("taken");
    assert!(member.next().await.is_some());
    reporter.state("the member is busy").await;
    identity.credentials.replace(member.issue(HOUR)).expect("usable");
    let renewed = identity.credentials.current().certificate.public;
    assert_eq!(member.next_by().await, Some((renewed, window(2, 0))));
}

#[test]
fn waits_for_another_listener_to_end() {
    let (node, _listeners) = Node::new();
    node.net.within("node", || {
        let former = Flows::open("hanse").expect("no other listener");
        let began = Instant::now();
        let mut backend = hanse_agent::backend::open(hanse_dataplane::Settings::default()).expect("opened");
        let refused = listen(false, &mut *backend).err().expect("another process listens");
        assert!(refused.starts_with("unavailable: "), "{refused}");
        assert!(began.elapsed() > Duration::from_secs(1), "{:?}", began.elapsed());
        drop(former);
        assert!(listen(false, &mut *backend).is_ok());
    });
}

#[tokio::test]
async fn pauses_when_the_member_does_not_accept_flows() {
    let (mut member, data) = (Member::new().await, tempfile::tempdir().expect("a folder"));
    let identity = member.enrol(data.path());
    member.refusals.lock().expect("whole").extend([Code::Unimplemented; 2]);
    let mut reporter = Reporter::new(&member, &identity, vec![member.address.clone()]);
    reporter.windows.send(Ok(window(1, 0))).await.expect("taken");
    assert!(member.next().await.is_some());
    reporter.state("the member does not accept flows").await;
    // Windows are still received.
    for port in 2..40 {
        reporter.windows.send(Ok(window(port, 0))).await.expect("taken");
    }
    let called_again = tokio::time::timeout(Duration::from_secs(2), member.received.recv()).await;
    assert!(called_again.is_err(), "{called_again:?}");
}

struct Agent(Child);

impl Agent {
    fn new(node: &Node, member: &str, more: &[&str]) -> Self {
        let inside = node.net.name("node");
        let started = Command::new("ip")
            .args(["netns", "exec", &inside, env!("CARGO_BIN_EXE_hanse-agent"), "run", "--node", "n"])
            .args(["--member", member, "--data"])
            .arg(node.data.path())
            .args(more)
            .spawn();
        Self(started.expect("started"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[test]
fn agent_reports_flows_unless_switched_off() {
    let (node, _listeners) = Node::new();
    snapshot::write(&node.options().snapshot(), &accepting(80, 7)).expect("written");
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    // The member runs on the node.
    let test = async {
        let mut member = Member::new().await;
        member.enrol(node.data.path());
        let agent = Agent::new(&node, &member.address, &[]);
        assert!(until(|| node.table().contains("chain log-allowed").then_some(())).is_some(), "{}", node.table());
        for at in ["10.1.0.3:80", "[fd01::3]:80", "10.1.0.3:80", "10.1.0.3:81"] {
            assert_eq!(node.net.connect("p2", at).is_some(), at.ends_with(":80"), "{at}");
        }
        let mut counts = BTreeMap::new();
        let (allowed, denied) = (wire::Decision::Allowed as i32, wire::Decision::Denied as i32);
        let all = |counts: &BTreeMap<_, u64>| {
            let of = |length: usize, port: u32, decision: i32| counts.get(&(length, port, decision)).copied();
            of(4, 80, allowed) == Some(2) && of(16, 80, allowed) == Some(1) && of(4, 81, denied) >= Some(1)
        };
        while !all(&counts) {
            let Some((_, received)) = member.next().await else { panic!("{counts:?}") };
            assert_eq!(received.missed, 0);
            for flow in received.flows {
                *counts.entry((flow.destination.len(), flow.port, flow.decision)).or_default() += flow.count;
            }
        }
        let status = || AgentStatus::read(node.data.path()).map(|status| status.flows).unwrap_or_default();
        assert!(until(|| (status() == "reported to the member").then_some(())).is_some(), "{}", status());
        drop(agent);
        assert!(node.table().contains("chain log-allowed"), "its rules stay");
        assert!(node.net.connect("p2", "10.1.0.3:80").is_some() && node.net.connect("p2", "10.1.0.3:81").is_none());
        let _agent = Agent::new(&node, &member.address, &["--no-flows"]);
        let off = || (!node.table().contains("chain log-allowed") && status() == "off").then_some(());
        assert!(until(off).is_some(), "{}: {}", status(), node.table());
        assert!(node.net.connect("p2", "10.1.0.3:80").is_some() && node.net.connect("p2", "10.1.0.3:81").is_none());
    };
    node.net.within("node", || runtime().expect("a runtime").block_on(test));
}

#[tokio::test]
async fn member_reviews_the_tokens_of_callers_of_metrics() {
    let (member, data) = (Member::new().await, tempfile::tempdir().expect("a folder"));
    let review = MemberReview::default();
    let unavailable = |why: &str| Err(Unreviewed::Unavailable(why.to_owned()));
    assert_eq!(review.review("allowed").await, unavailable("the node has not enrolled"));
    // The first member does not exist.
    review.enrolled(member.enrol(data.path()), vec!["127.0.0.1:1".to_owned(), member.address.clone()]);
    for (token, expected) in [
        ("allowed", Ok(Verdict::Allowed)),
        ("forbidden", Ok(Verdict::Forbidden { user: "eve".to_owned() })),
        ("invalid", Ok(Verdict::Unauthenticated)),
        ("odd", Ok(Verdict::Unauthenticated)),
        ("down", unavailable("the member answers: the API server does not answer")),
        ("allowed", Ok(Verdict::Allowed)),
    ] {
        assert_eq!(review.review(token).await, expected, "{token}");
    }
    // Without a member, nothing is allowed.
    drop(member);
    let ended = async {
        while review.review("allowed").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, ended).await.expect("the member is gone");
}
