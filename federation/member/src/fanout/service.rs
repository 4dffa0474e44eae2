//! The streams of agents.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hanse_identity::Identity;
use hanse_identity::instances::Instance;
use hanse_identity::keys::{Fingerprint, RequestedKey};
use hanse_identity::tls::{peer, peer_identity};
use hanse_proto::agent::v1 as wire;
use hanse_protocol::reason::{Failure, wire as report};
use hanse_protocol::{encode, generation, parse_digest, parse_generation};
use hanse_ruleset::{Delta, Digest};
use hanse_runtime::monitor::Verdict;
use hanse_runtime::rate_limit::RateLimit;
use hanse_runtime::supervisor::caught;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use super::enrol;
use super::nodes::Locked;
use super::state::{Attached, Fanout, Target, not_registered};
use super::status::RulesPosition;
use crate::flows::Inbox;
use crate::registration::MemberIdentity;

/// Messages that wait for an agent's connection: at most 4 MiB.
const OUTBOX: usize = 4;
/// When a rule set that the agent could not enforce is sent again, if nothing changes before.
const RETRY: Duration = Duration::from_secs(5);

/// Refusals, and pods that are not enforced, of one acknowledgement; others are ignored.
const MAX_REPORTED: usize = 1_000;
/// Bytes of an agent's version.
const MAX_VERSION: usize = 64;
/// Files of one acknowledgement that cannot be written.
const MAX_FILES: usize = 16;
/// How long the first message of a stream may take, which is sent with the call.
const HELLO_TIME: Duration = Duration::from_secs(10);

/// Renewals of one node in the lifetime of a certificate. One is enough; responses may be lost.
const RENEWALS_IN_A_LIFETIME: f64 = 16.0;

#[derive(Debug)]
pub struct Service {
    fanout: Fanout,
    identity: MemberIdentity,
    flows: Inbox,
    /// Each costs a signature and a write.
    renewals: Mutex<RateLimit<Arc<str>>>,
    stop: CancellationToken,
}

impl Service {
    pub fn new(fanout: Fanout, identity: MemberIdentity, flows: Inbox, stop: CancellationToken) -> Self {
        let lifetime = fanout.shared.lifetime.as_secs_f64().max(1.0);
        let renewals = RateLimit::with_burst(RENEWALS_IN_A_LIFETIME / lifetime, RENEWALS_IN_A_LIFETIME);
        Self { fanout, identity, flows, renewals: Mutex::new(renewals), stop }
    }
}

/// The node that a request's certificate names, and the certificate's key.
fn node_of<T>(request: &Request<T>) -> Result<(Arc<str>, Fingerprint), Status> {
    match (peer_identity(request)?, &peer(request)?.certificate) {
        (Identity::Node { node, .. }, Some(certificate)) => Ok((Arc::clone(node), certificate.public)),
        _ => Err(Status::permission_denied("only nodes of this cluster may call this")),
    }
}

#[tonic::async_trait]
impl wire::agents_server::Agents for Service {
    async fn renew(&self, request: Request<wire::RenewRequest>) -> Result<Response<wire::EnrolResponse>, Status> {
        let (node, own) = node_of(&request)?;
        let now = tokio::time::Instant::now();
        if !self.renewals.lock().unwrap_or_else(PoisonError::into_inner).allows(Arc::clone(&node), now) {
            let most = RENEWALS_IN_A_LIFETIME;
            return Err(Status::resource_exhausted(format!(
                "{most} renewals in the lifetime of a certificate are enough"
            )));
        }
        let from = peer(&request)?.address;
        self.fanout.refuse_former(&node, own, from).await?;
        let key = RequestedKey::from_request(&request.into_inner().request)
            .map_err(|error| Status::invalid_argument(format!("invalid request: {error}")))?;
        let lifetime = self.fanout.shared.lifetime;
        let ends = SystemTime::now() + lifetime;
        let (name, next) = (Arc::clone(&node), key.public());
        let renew = move |it: &Locked<'_>| it.renew(&name, &own, &next, ends, from);
        let renewed = self.fanout.shared.keys.change(renew).await.flatten();
        if !renewed.map_err(|_| Status::internal("write the renewal"))? {
            return Err(not_registered(&node));
        }
        Ok(Response::new(enrol::issue(&self.identity, &node, &key, lifetime)?))
    }

    async fn report_flows(&self, request: Request<wire::Flows>) -> Result<Response<wire::FlowsTaken>, Status> {
        let (node, key) = node_of(&request)?;
        if !self.fanout.shared.keys.allows(&node, &key) {
            return Err(not_registered(&node));
        }
        self.flows.take(node, request.into_inner())?;
        Ok(Response::new(wire::FlowsTaken {}))
    }

    async fn review_metrics_token(
        &self,
        request: Request<wire::MetricsToken>,
    ) -> Result<Response<wire::MetricsVerdict>, Status> {
        let (node, key) = node_of(&request)?;
        if !self.fanout.shared.keys.allows(&node, &key) {
            return Err(not_registered(&node));
        }
        let Some(reviews) = &self.fanout.shared.metrics_reviews else {
            return Err(Status::unavailable("the member reviews no tokens: it runs without --metrics-token-review"));
        };
        let verdict = reviews.decide(&request.into_inner().token, node).await;
        let verdict = verdict.map_err(|error| Status::unavailable(error.to_string()))?;
        let (authenticated, allowed, user) = match verdict {
            Verdict::Allowed => (true, true, String::new()),
            Verdict::Forbidden { user } => (true, false, user),
            Verdict::Unauthenticated => (false, false, String::new()),
        };
        Ok(Response::new(wire::MetricsVerdict { authenticated, allowed, user }))
    }

    type SyncStream = Pin<Box<dyn Stream<Item = Result<wire::MemberToAgent, Status>> + Send>>;

    async fn sync(
        &self,
        request: Request<Streaming<wire::AgentToMember>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let (node, key) = node_of(&request)?;
        let address = peer(&request)?.address;
        let mut incoming = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIME, incoming.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("the first message took too long"))??;
        let Some(wire::agent_to_member::Message::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(Status::invalid_argument("the first message must be a hello"));
        };
        let instance = Instance::new(&hello.instance, address);
        let Attached { target, number, replaced } = self.fanout.attach(&node, key, instance).await?;
        let (outbox, sending) = mpsc::channel(OUTBOX);
        let (fanout, stop) = (self.fanout.clone(), self.stop.clone());
        let span = tracing::info_span!("agent_stream", %node);
        let serving = async move {
            let stream = AgentStream {
                node: node.clone(),
                fanout: fanout.clone(),
                outbox,
                acknowledged: None,
                in_flight: None,
                not_before: None,
            };
            let ended = tokio::select! {
                () = stop.cancelled() => Ok(()),
                () = replaced.cancelled() => Ok(()),
                ended = caught("the stream of an agent", stream.run(hello, incoming, target)) => {
                    ended.unwrap_or_else(|panicked| Err(Status::internal(panicked.to_string())))
                }
            };
            if let Err(status) = ended {
                tracing::info!(%node, error = status.message(), "stream of the agent ended");
            }
            fanout.detach(&node, number);
        };
        tokio::spawn(serving.instrument(span));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }
}

struct AgentStream {
    node: Arc<str>,
    fanout: Fanout,
    outbox: mpsc::Sender<Result<wire::MemberToAgent, Status>>,
    /// The rule set that the agent acknowledged, if its contents are known.
    acknowledged: Option<Arc<Target>>,
    /// The rule set that was sent and is not acknowledged.
    in_flight: Option<Arc<Target>>,
    /// The newest rule set could not be enforced: it is not sent again before, but a newer one is.
    not_before: Option<tokio::time::Instant>,
}

impl AgentStream {
    async fn run(
        mut self,
        hello: wire::Hello,
        mut incoming: Streaming<wire::AgentToMember>,
        mut target: watch::Receiver<Option<Arc<Target>>>,
    ) -> Result<(), Status> {
        self.hello(&hello, &target)?;
        loop {
            let idle = self.in_flight.is_none();
            if idle && self.not_before.is_none() {
                let newest = target.borrow_and_update().clone();
                if let Some(newest) = newest {
                    self.send(newest).await?;
                }
            }
            let (idle, not_before) = (self.in_flight.is_none(), self.not_before);
            tokio::select! {
                message = incoming.message() => {
                    use wire::agent_to_member::Message;
                    let Some(message) = message? else { return Ok(()) };
                    match message.message {
                        Some(Message::Hello(hello)) => self.hello(&hello, &target)?,
                        Some(Message::Ack(ack)) => self.ack(ack)?,
                        None => return Err(Status::invalid_argument("message is missing or unknown")),
                    }
                }
                changed = target.changed(), if idle => {
                    changed.map_err(|_| Status::unavailable("the node was removed"))?;
                    target.mark_changed();
                    self.not_before = None;
                }
                () = until(not_before), if idle && not_before.is_some() => self.not_before = None,
            }
        }
    }

    /// If the agent has the rule set that would be sent, its contents are known.
    fn hello(&mut self, hello: &wire::Hello, target: &watch::Receiver<Option<Arc<Target>>>) -> Result<(), Status> {
        let version = bounded(hello.version.clone(), MAX_VERSION);
        self.fanout.update(&self.node, |status| status.version = version);
        let digest = parse_digest(&hello.digest).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let whole_did_not_fit = self.in_flight.take().is_some() && self.acknowledged.is_none();
        self.not_before = whole_did_not_fit.then(|| tokio::time::Instant::now() + RETRY);
        self.acknowledged = target.borrow().clone().filter(|target| target.node.digest == digest).map(|target| {
            let position = RulesPosition { generation: parse_generation(hello.generation), ..RulesPosition::default() };
            Arc::new(Target { node: target.node.clone(), position })
        });
        Ok(())
    }

    /// Sends the delta to `newest`; only its position if the digest is the same.
    async fn send(&mut self, newest: Arc<Target>) -> Result<(), Status> {
        let position = newest.position;
        let same = self.acknowledged.as_ref().filter(|known| known.node.digest == newest.node.digest);
        if let Some(known) = same {
            if known.position == position {
                return Ok(());
            }
            let position = wire::Position {
                generation: Some(generation(position.generation)),
                revisions: Some(wire::Revisions { hub: position.hub_revision, local: position.local_revision }),
            };
            let message = wire::member_to_agent::Message::Position(position);
            self.push(wire::MemberToAgent { message: Some(message) }).await?;
        } else {
            let messages = {
                let known = self.acknowledged.as_ref().map(|known| &known.node);
                let step = known.and_then(|known| newest.node.delta_from(known.digest));
                let mut delta = step.unwrap_or_else(|| {
                    let known = known.map(|known| (&*known.rules, known.digest));
                    Delta::between_known(known, &newest.node.rules, newest.node.digest)
                });
                delta.generation = position.generation;
                (delta.hub_revision, delta.local_revision) = (position.hub_revision, position.local_revision);
                encode(&delta)
            };
            for message in messages {
                self.push(message).await?;
            }
        }
        self.in_flight = Some(newest);
        Ok(())
    }

    async fn push(&self, message: wire::MemberToAgent) -> Result<(), Status> {
        self.outbox.send(Ok(message)).await.map_err(|_| Status::cancelled("the agent has disconnected"))
    }

    fn ack(&mut self, ack: wire::Ack) -> Result<(), Status> {
        let digest: Digest = parse_digest(&ack.digest).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let revisions = ack.revisions.unwrap_or_default();
        let generation = parse_generation(ack.generation);
        let of_generation = |it: &Option<Arc<Target>>| {
            it.as_ref().filter(|it| it.position.generation == generation).map(|it| it.position.hub_epoch)
        };
        let hub_epoch =
            of_generation(&self.in_flight).or_else(|| of_generation(&self.acknowledged)).unwrap_or_default();
        let mut position =
            RulesPosition { generation, hub_epoch, hub_revision: revisions.hub, local_revision: revisions.local };
        let mut failed = ack.failure.map(report::parse_failure);
        // An agent reports again for its last rule set when a finding changes: this does not answer the one in flight.
        let is_answer = self.in_flight.as_ref().is_some_and(|sent| sent.position == position);
        let is_expected = match (&self.in_flight, &self.acknowledged) {
            (Some(sent), _) if is_answer => sent.node.digest == digest,
            (None, Some(known)) => known.node.digest == digest,
            _ => true,
        };
        if !is_expected && failed.is_none() {
            failed =
                Some(Failure::Inconsistent(format!("the agent reports the digest {digest}, which is of other rules")));
            position = RulesPosition::default();
        }
        if failed.is_some() {
            // The whole rule set is sent, and not at once.
            (self.in_flight, self.acknowledged) = (None, None);
            self.not_before = Some(tokio::time::Instant::now() + RETRY);
        } else if is_answer {
            (self.acknowledged, self.not_before) = (self.in_flight.take(), None);
        }
        let unenforced = ack.unenforced.into_iter().take(MAX_REPORTED).map(|it| {
            (report::parse_pod(it.pod.unwrap_or_default()), report::parse_finding(it.finding.unwrap_or_default()))
        });
        let unenforced = unenforced.collect();
        let refused = ack.refusals.into_iter().take(MAX_REPORTED).map(|it| {
            (it.object.and_then(report::parse_object), report::parse_rejection(it.rejection.unwrap_or_default()))
        });
        let refused = refused.collect();
        let hooks = ack.hooks.map(report::parse_hooks);
        let files = ack.files.into_iter().take(MAX_FILES).map(report::parse_file).collect();
        self.fanout.update(&self.node, |status| {
            status.position = position;
            status.digest = digest;
            status.refused = refused;
            status.failed = failed;
            status.hooks = hooks;
            status.unenforced = unenforced;
            status.files = files;
            status.last_seen = Some(Instant::now());
        });
        Ok(())
    }
}

/// At most `bytes` of a text of an agent.
fn bounded(mut text: String, bytes: usize) -> String {
    text.truncate(text.floor_char_boundary(bytes));
    text
}

async fn until(at: Option<tokio::time::Instant>) {
    if let Some(at) = at {
        tokio::time::sleep_until(at).await;
    }
}

#[cfg(test)]
mod tests {
    use hanse_protocol::reason::HookProblem;
    use hanse_ruleset::{Generation, NodeConfig, RuleSet};
    use wire::member_to_agent::Message;

    use super::*;
    use crate::world::NodeRules;

    struct Sent {
        stream: AgentStream,
        outbox: mpsc::Receiver<Result<wire::MemberToAgent, Status>>,
        _folder: tempfile::TempDir,
    }

    impl Sent {
        async fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let fanout = Fanout::new(folder.path(), Duration::from_secs(60)).expect("a term");
            let (outbox, sent) = mpsc::channel(16);
            drop(
                fanout
                    .attach(&"n".into(), Fingerprint([0; 32]), crate::fanout::instance_of_test(1))
                    .await
                    .expect("it is accepted"),
            );
            let node = "n".into();
            let stream = AgentStream { node, fanout, outbox, acknowledged: None, in_flight: None, not_before: None };
            Self { stream, outbox: sent, _folder: folder }
        }

        /// The base of the delta that is sent; none for a whole rule set or a position.
        async fn send(&mut self, target: &Arc<Target>) -> Option<Digest> {
            self.stream.send(Arc::clone(target)).await.expect("there is room");
            let mut base = None;
            while let Ok(message) = self.outbox.try_recv() {
                if let Some(Message::Begin(begin)) = message.expect("a message").message {
                    base = (!begin.base.is_empty()).then(|| parse_digest(&begin.base).expect("a digest"));
                }
            }
            base
        }

        fn ack(&mut self, target: &Target, failure: Option<Failure>, hooks: Option<HookProblem>) {
            self.ack_digest(target, target.node.digest, failure, hooks);
        }

        fn ack_digest(
            &mut self,
            target: &Target,
            digest: Digest,
            failure: Option<Failure>,
            hooks: Option<HookProblem>,
        ) {
            let position = target.position;
            let ack = wire::Ack {
                generation: Some(generation(position.generation)),
                digest: hanse_protocol::digest(digest),
                revisions: Some(wire::Revisions { hub: position.hub_revision, local: position.local_revision }),
                failure: failure.as_ref().map(report::failure),
                hooks: hooks.as_ref().map(report::hooks),
                ..wire::Ack::default()
            };
            self.stream.ack(ack).expect("an ack");
        }
    }

    /// A rule set that differs by number.
    fn target(number: u64) -> Arc<Target> {
        let range = format!("10.0.{number}.0/24").parse().expect("a net");
        let node = NodeConfig { pod_ranges: vec![range], ..NodeConfig::default() };
        let rules = Arc::new(RuleSet { node, ..RuleSet::default() });
        let digest = rules.digest();
        let generation = Generation { term: 1, number };
        let position = RulesPosition { generation, hub_epoch: 1, hub_revision: number, local_revision: 1 };
        Arc::new(Target { node: NodeRules { rules, digest, step: None }, position })
    }

    #[tokio::test]
    async fn report_for_the_last_rules_does_not_acknowledge_those_in_flight() {
        let (first, second) = (target(1), target(2));
        let mut sent = Sent::new().await;
        assert_eq!(sent.send(&first).await, None, "the whole");
        sent.ack(&first, None, None);
        assert_eq!(sent.send(&second).await, Some(first.node.digest));
        sent.ack(&first, None, Some(HookProblem::NotProven));
        assert!(sent.stream.in_flight.is_some(), "still under way");
        let status = || sent.stream.fanout.realisation()["n"].clone();
        assert_eq!((status().hooks, status().position.hub_revision), (Some(HookProblem::NotProven), 1));
        sent.ack(&second, None, None);
        assert!(sent.stream.in_flight.is_none());
        assert_eq!(sent.stream.acknowledged.as_ref().map(|it| it.node.digest), Some(second.node.digest));
        assert_eq!(sent.stream.fanout.realisation()["n"].position.hub_revision, 2);
    }

    #[tokio::test]
    async fn acknowledgement_of_other_rules_fails_and_is_not_answered_at_once() {
        let (first, second) = (target(1), target(2));
        let mut sent = Sent::new().await;
        for acknowledged_before in [false, true] {
            sent.send(&first).await;
            if acknowledged_before {
                sent.ack(&first, None, None);
                assert!(sent.stream.not_before.is_none());
            }
            sent.ack_digest(&first, second.node.digest, None, None);
            let status = sent.stream.fanout.realisation()["n"].clone();
            assert!(matches!(status.failed, Some(Failure::Inconsistent(_))), "{status:?}");
            assert_eq!(status.position, RulesPosition::default(), "no node counts as current by it");
            assert!(sent.stream.not_before.is_some() && sent.stream.acknowledged.is_none());
            sent.stream.not_before = None;
        }
        assert_eq!(sent.send(&first).await, None, "the whole");
        sent.ack(&first, None, None);
        assert_eq!(sent.stream.fanout.realisation()["n"].failed, None);
    }

    #[tokio::test]
    async fn failed_rule_set_is_sent_again_whole_and_later() {
        let (first, second) = (target(1), target(2));
        let mut sent = Sent::new().await;
        sent.send(&first).await;
        sent.ack(&first, None, None);
        sent.send(&second).await;
        sent.ack(&first, Some(Failure::EnforcerEnded), None);
        let status = sent.stream.fanout.realisation()["n"].clone();
        assert_eq!((status.failed, status.position.hub_revision), (Some(Failure::EnforcerEnded), 1));
        assert!(sent.stream.not_before.is_some());
        assert_eq!(sent.send(&second).await, None, "from the beginning");
        // An agent that cannot use the whole one sends a hello again, without end if it were answered at once.
        sent.stream.not_before = None;
        let (_, current) = watch::channel(Some(second));
        sent.stream
            .hello(&wire::Hello { digest: vec![0; 16].into(), ..wire::Hello::default() }, &current)
            .expect("a hello");
        assert!(sent.stream.not_before.is_some());
    }
}
