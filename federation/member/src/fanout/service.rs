//! The streams of agents.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_proto::agent::v1 as wire;
use hanse_ruleset::{Delta, Digest, RuleSet};
use hanse_runtime::Identity;
use hanse_runtime::agent_wire::{encode, generation, parse_digest, parse_generation};
use hanse_runtime::keys::RequestedKey;
use hanse_runtime::tls::peer_identity;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{Fanout, enrol};
use crate::registration::MemberIdentity;

/// Messages that wait for an agent's connection: 4 MiB at most.
const OUTBOX: usize = 4;
/// After a delta that could not be put in force, it is tried again after this long even when nothing changed.
const RETRY: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct Service {
    pub fanout: Fanout,
    pub identity: MemberIdentity,
    pub stop: CancellationToken,
}

/// The node that a request's certificate names.
fn node_of<T>(request: &Request<T>) -> Result<Arc<str>, Status> {
    match peer_identity(request)? {
        Identity::Node { node, .. } => Ok(Arc::clone(node)),
        _ => Err(Status::permission_denied("only nodes of this cluster may ask")),
    }
}

#[tonic::async_trait]
impl wire::agents_server::Agents for Service {
    async fn renew(&self, request: Request<wire::RenewRequest>) -> Result<Response<wire::EnrolResponse>, Status> {
        let node = node_of(&request)?;
        let key = RequestedKey::from_request(&request.into_inner().request)
            .map_err(|error| Status::invalid_argument(format!("the request cannot be used: {error}")))?;
        Ok(Response::new(enrol::issue(&self.identity, &node, &key, self.fanout.shared.lifetime)?))
    }

    type SyncStream = Pin<Box<dyn Stream<Item = Result<wire::MemberToAgent, Status>> + Send>>;

    async fn sync(
        &self,
        request: Request<Streaming<wire::AgentToMember>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let node = node_of(&request)?;
        let (outbox, sending) = mpsc::channel(OUTBOX);
        let (fanout, stop) = (self.fanout.clone(), self.stop.clone());
        tokio::spawn(async move {
            let (target, number, replaced) = fanout.attach(&node);
            let stream =
                AgentStream { node: node.clone(), fanout: fanout.clone(), outbox, held: None, in_flight: None };
            let ended = tokio::select! {
                () = stop.cancelled() => Ok(()),
                () = replaced.cancelled() => Ok(()),
                ended = stream.run(request.into_inner(), target) => ended,
            };
            if let Err(status) = ended {
                tracing::info!(%node, error = status.message(), "the agent's stream ended");
            }
            fanout.detach(&node, number);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }
}

struct AgentStream {
    node: Arc<str>,
    fanout: Fanout,
    outbox: mpsc::Sender<Result<wire::MemberToAgent, Status>>,
    /// What the agent has acknowledged, where we know its contents.
    held: Option<Arc<RuleSet>>,
    /// What was sent and is not acknowledged.
    in_flight: Option<Arc<RuleSet>>,
}

impl AgentStream {
    async fn run(
        mut self,
        mut incoming: Streaming<wire::AgentToMember>,
        mut target: watch::Receiver<Option<Arc<RuleSet>>>,
    ) -> Result<(), Status> {
        let mut greeted = false;
        loop {
            if greeted && self.in_flight.is_none() {
                let newest = target.borrow_and_update().clone();
                if let Some(newest) = newest {
                    self.send(newest).await?;
                }
            }
            let idle = self.in_flight.is_none();
            tokio::select! {
                message = incoming.message() => {
                    use wire::agent_to_member::Message;
                    let Some(message) = message? else { return Ok(()) };
                    match message.message {
                        Some(Message::Hello(hello)) => {
                            greeted = true;
                            self.hello(&hello, &target)?;
                        }
                        Some(Message::Ack(ack)) => self.ack(ack).await?,
                        None => return Err(Status::invalid_argument("message is missing or not understood")),
                    }
                }
                changed = target.changed(), if greeted && idle => {
                    changed.map_err(|_| Status::unavailable("the node is gone"))?;
                    target.mark_changed();
                }
            }
        }
    }

    /// Where the agent holds what we would send anyway, its contents are known.
    fn hello(&mut self, hello: &wire::Hello, target: &watch::Receiver<Option<Arc<RuleSet>>>) -> Result<(), Status> {
        let digest = parse_digest(&hello.digest).map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.in_flight = None;
        self.held = target.borrow().clone().filter(|rules| rules.digest() == digest).map(|rules| {
            let generation = parse_generation(hello.generation);
            Arc::new(RuleSet { generation, hub_revision: 0, local_revision: 0, ..(*rules).clone() })
        });
        Ok(())
    }

    /// Sends what turns what is held into `newest`; its position alone where the digest is the same.
    async fn send(&mut self, newest: Arc<RuleSet>) -> Result<(), Status> {
        let place = |rules: &RuleSet| (rules.generation, rules.hub_revision, rules.local_revision);
        let same = self.held.as_ref().filter(|held| held.digest() == newest.digest());
        if let Some(held) = same {
            if place(held) == place(&newest) {
                return Ok(());
            }
            let position = wire::Position {
                generation: Some(generation(newest.generation)),
                revisions: Some(wire::Revisions { hub: newest.hub_revision, local: newest.local_revision }),
            };
            let message = wire::member_to_agent::Message::Position(position);
            self.push(wire::MemberToAgent { message: Some(message) }).await?;
        } else {
            for message in encode(&Delta::between(self.held.as_deref(), &newest)) {
                self.push(message).await?;
            }
        }
        self.in_flight = Some(newest);
        Ok(())
    }

    async fn push(&self, message: wire::MemberToAgent) -> Result<(), Status> {
        self.outbox.send(Ok(message)).await.map_err(|_| Status::cancelled("the agent is gone"))
    }

    async fn ack(&mut self, ack: wire::Ack) -> Result<(), Status> {
        let held: Digest = parse_digest(&ack.digest).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let revisions = ack.revisions.unwrap_or_default();
        let failed = (!ack.failed.is_empty()).then_some(ack.failed);
        let (generation, now) = (parse_generation(ack.generation), Instant::now());
        // Otherwise it is news of what is in force, such as a probe's: what is under way still is.
        let answers = self.in_flight.as_ref().is_some_and(|sent| failed.is_some() || sent.generation == generation);
        let known = self.held.as_ref().is_some_and(|ours| ours.digest() == held);
        let done = self.in_flight.take_if(|_| answers).filter(|sent| failed.is_none() && sent.digest() == held);
        let failed_again = failed.is_some();
        self.fanout.update(&self.node, |status| {
            status.generation = generation;
            status.digest = held;
            status.hub_revision = revisions.hub;
            status.local_revision = revisions.local;
            status.refused = ack.refusals.into_iter().map(|it| (it.object, it.reason)).collect();
            status.failed = failed;
            status.heard = Some(now);
        });
        match done {
            Some(done) => self.held = Some(done),
            None if !answers && known => {}
            // What the agent has is not what we thought: from the beginning, and not at once.
            None => {
                self.held = None;
                if failed_again {
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
        Ok(())
    }
}
