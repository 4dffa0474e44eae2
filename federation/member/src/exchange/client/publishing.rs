//! Publishing to one replica of the hub.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use hanse_exchange::codec;
use hanse_exchange::limits::MAX_MESSAGE_BYTES;
use hanse_exchange::message::{PublishRequest, PublishResponse};
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::exchange_client::ExchangeClient;
use hanse_runtime::retry::Backoff;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tracing::Instrument as _;

use super::opening::{OUTBOX, Renewals, not_opened, within};
use super::{Client, lock};
use crate::exchange::publisher::PublishSession;
use crate::hubs::Reached;
use crate::registration::MemberIdentity;

/// The interval between heartbeats on an idle stream.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// The maximum interval between attempts to connect to a hub.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// An open Publish stream.
struct PublishStream {
    outbox: mpsc::Sender<pb::PublishRequest>,
    answers: Streaming<pb::PublishResponse>,
    session: PublishSession,
    reached: Reached,
}

impl Client {
    pub(super) async fn publish_for_ever(&self, identity: &MemberIdentity, hub: &str, stop: &CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(100), MAX_RETRY_INTERVAL);
        loop {
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.publish_once(identity, hub, &mut backoff).instrument(tracing::info_span!("publish_stream", hub)) => ended,
            };
            match ended {
                Ok(None) => {}
                Ok(Some(replica)) => {
                    tracing::debug!(hub, "not published to: another address leads to the same replica of the hub");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = self.shared.hubs.while_covered(hub, &replica) => {}
                    }
                }
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), hub, "publish stream ended, trying again");
                    if let Some(leadership) = self.shared.leadership.as_ref().filter(|_| is_replaced(&error)) {
                        leadership.note_replaced();
                    }
                }
            }
            if !backoff.wait(stop).await {
                return;
            }
        }
    }

    /// Publishes until the stream ends. Returns the replica if another address leads to it.
    async fn publish_once(
        &self,
        identity: &MemberIdentity,
        hub: &str,
        backoff: &mut Backoff,
    ) -> anyhow::Result<Option<Bytes>> {
        let mut renewals = Renewals::of(identity);
        let mut stream = within(self.open_publish(identity, hub)).await?;
        let mut published = self.shared.published.subscribe();
        let mut realisation = self.shared.realisation.subscribe();
        realisation.mark_changed();
        let mut beat = tokio::time::interval(HEARTBEAT);
        loop {
            let requests = self.poll(&mut stream.session);
            for request in requests {
                stream.outbox.send(codec::publish::encode_request(request)).await.context("publish")?;
            }
            let message = tokio::select! {
                answer = stream.answers.message() => {
                    let Some(answer) = answer.context("publish")? else { return Ok(None) };
                    backoff.reset();
                    let Some(answer) = codec::publish::decode_response(answer) else { continue };
                    if let PublishResponse::Replica { id, hub } = &answer {
                        stream.reached.serves(id, *hub);
                    }
                    let refused = matches!(answer, PublishResponse::Refusals(_));
                    stream.session.take(&mut lock(&self.shared.publisher), answer);
                    if refused {
                        self.log_refusals(&stream.session);
                    }
                    continue;
                }
                replica = stream.reached.covered() => return Ok(Some(replica)),
                changed = published.changed() => { changed.context("publish")?; continue }
                changed = realisation.changed() => {
                    changed.context("publish")?;
                    match realisation.borrow_and_update().clone() {
                        Some(realisation) => PublishRequest::Report(realisation.encode_to_vec().into()),
                        None => continue,
                    }
                }
                _ = beat.tick() => self.heartbeat(),
                // After a renewal, a new connection replaces this one as soon as it is open.
                opened = renewals.opened(hub, || self.open_publish(identity, hub)) => {
                    stream = opened;
                    realisation.mark_changed();
                    continue;
                }
            };
            stream.outbox.send(codec::publish::encode_request(message)).await.context("publish")?;
        }
    }

    /// Opens a Publish stream and waits for the welcome.
    async fn open_publish(&self, identity: &MemberIdentity, hub: &str) -> anyhow::Result<PublishStream> {
        let connection = identity.connect(hub).await?;
        let mut client = ExchangeClient::new(connection.channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let (outbox, sending) = mpsc::channel(OUTBOX);
        // Another process may lead by now, and the hub knows it.
        let yields = self.shared.leadership.as_ref().is_some_and(|it| !it.is_certain());
        let open = PublishSession::open(&lock(&self.shared.publisher), &self.shared.instance, yields);
        outbox.send(codec::publish::encode_request(open)).await?;
        let answers = client.publish(ReceiverStream::new(sending)).await;
        let mut answers = answers.map_err(|status| not_opened(&connection.peer, &status))?.into_inner();
        let mut session = PublishSession::default();
        let mut served_by = None;
        loop {
            let answer = answers.message().await.context("read the first response")?;
            match codec::publish::decode_response(answer.context("the hub closed the stream")?) {
                // It precedes the welcome.
                Some(PublishResponse::Replica { id, hub }) => served_by = Some((id, hub)),
                Some(welcome) => {
                    session.take(&mut lock(&self.shared.publisher), welcome);
                    break;
                }
                None => {}
            }
        }
        let reached = self.shared.hubs.reach(hub);
        if let Some((replica, position)) = &served_by {
            reached.serves(replica, *position);
        }
        Ok(PublishStream { outbox, answers, session, reached })
    }

    fn log_refusals(&self, session: &PublishSession) {
        let mut logged = lock(&self.shared.refusals);
        if *logged == *session.refusals() {
            return;
        }
        let publisher = lock(&self.shared.publisher);
        for (id, refusal) in &session.refusals().refusals {
            let object = publisher.name_of(*id).unwrap_or_default();
            tracing::warn!(object, id, %refusal, "object of this cluster refused by the hub");
        }
        logged.clone_from(session.refusals());
    }
}

/// Whether a stream ended because the hub serves another process with the key of the cluster.
fn is_replaced(error: &anyhow::Error) -> bool {
    let status = error.chain().find_map(|cause| cause.downcast_ref::<tonic::Status>());
    status.is_some_and(|status| status.code() == tonic::Code::Aborted)
}
