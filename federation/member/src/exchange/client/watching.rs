//! Watching one replica of the hub, and moving to another.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hanse_exchange::codec;
use hanse_exchange::interest::Interest;
use hanse_exchange::limits::MAX_MESSAGE_BYTES;
use hanse_identity::tls::Connection;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::exchange_client::ExchangeClient;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tracing::Instrument as _;

use super::opening::{OUTBOX, Renewals, SILENCE, connect, not_opened, within};
use super::{Client, lock};
use crate::exchange::receiver::Receiver;
use crate::hubs::{Choice, Next};
use crate::registration::MemberIdentity;

/// The interval between checks for a better replica of the hub.
const CHOOSE_EVERY: Duration = Duration::from_millis(500);
/// How long an open Watch stream may wait until the hub is as new as this member, if there are other hubs.
const SERVED_WITHIN: Duration = Duration::from_secs(5);
/// The maximum size of a stored error of the hub.
const MAX_ERROR_BYTES: usize = 512;

impl Client {
    pub(super) async fn watch_for_ever(&self, identity: &MemberIdentity, stop: &CancellationToken) {
        let mut choice = Choice::default();
        let mut moving: Option<(String, Connection)> = None;
        loop {
            let (hub, connection) = match moving.take() {
                Some((hub, connection)) => (hub, Some(connection)),
                None => tokio::select! {
                    () = stop.cancelled() => return,
                    hub = self.next_hub(&mut choice) => (hub, None),
                },
            };
            let watched = self.watch_once(identity, &hub, connection, &mut choice);
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = watched.instrument(tracing::info_span!("watch_stream", hub)) => ended,
            };
            lock(&self.shared.watching).hub = None;
            if let Ok(WatchEnd::Moves(to, connection)) = ended {
                tracing::info!(from = hub, to, "watching another replica of the hub");
                moving = Some((to, connection));
                continue;
            }
            choice.failed(&hub, Instant::now());
            {
                let mut receiver = lock(&self.shared.receiver);
                receiver.disconnected();
                // After any other error, the request is sent again unchanged: another hub, or a newer version, may accept it.
                receiver.set_rejected(ended.as_ref().err().and_then(rejected));
            }
            let error = match ended {
                Ok(_) => "the hub closed the stream".to_owned(),
                Err(error) => {
                    let error = clip(&format!("{error:#}"));
                    tracing::warn!(error, hub, "watch stream ended, trying again; the received state stays in use");
                    error
                }
            };
            lock(&self.shared.watching).error = Some(error);
        }
    }

    /// The replica to watch next, as soon as it may be tried.
    async fn next_hub(&self, choice: &mut Choice) -> String {
        let mut changes = self.shared.hubs.changes();
        loop {
            let view = Arc::clone(&changes.borrow_and_update());
            match choice.next(&view, Instant::now()) {
                Next::Hub(hub) => return hub,
                Next::At(at) => tokio::select! {
                    () = tokio::time::sleep_until(at) => {}
                    // This client has the sender.
                    _ = changes.changed() => {}
                },
            }
        }
    }

    async fn watch_once(
        &self,
        identity: &MemberIdentity,
        hub: &str,
        connection: Option<Connection>,
        choice: &mut Choice,
    ) -> anyhow::Result<WatchEnd> {
        let mut renewals = Renewals::of(identity);
        let mut moves = Moves::new(self, identity);
        let mut own = self.shared.own.subscribe();
        let connection = match connection {
            Some(connection) => connection,
            None => within(connect(identity, hub)).await?,
        };
        let (mut outbox, mut incoming) = within(self.open_watch(connection, &mut own)).await?;
        let mut opened = Instant::now();
        loop {
            let answers = tokio::select! {
                message = tokio::time::timeout(SILENCE, incoming.message()) => {
                    let message = message.context("the hub is silent")?.context("watch")?;
                    let Some(message) = message else { return Ok(WatchEnd::Closed) };
                    let answers = self.receive(message)?;
                    if self.with_receiver(Receiver::is_served) {
                        choice.serves(hub);
                        let mut watching = lock(&self.shared.watching);
                        if watching.hub.is_none() {
                            watching.hub = Some(hub.to_owned());
                            tracing::info!(hub, "hub serves the watch stream");
                        }
                    } else if opened.elapsed() > SERVED_WITHIN && self.shared.hubs.all().len() > 1 {
                        anyhow::bail!("the hub has older objects than this cluster");
                    }
                    answers
                }
                changed = own.changed() => {
                    changed.context("watch")?;
                    let wanted = own.borrow_and_update().clone();
                    let request = lock(&self.shared.receiver).set_own(&wanted);
                    request.map(codec::watch::encode_request).into_iter().collect::<Vec<_>>()
                }
                // Only the connection is opened in advance: the receiver supports one stream at a time.
                connection = renewals.opened(hub, || connect(identity, hub)) => {
                    (outbox, incoming) = within(self.open_watch(connection, &mut own)).await?;
                    opened = Instant::now();
                    continue;
                }
                (to, connection) = moves.opened(hub, choice) => return Ok(WatchEnd::Moves(to, connection)),
            };
            for answer in answers {
                // Detects a hub that does not read.
                let sent = tokio::time::timeout(SILENCE, outbox.send(answer)).await;
                sent.context("the hub does not read the stream")?.context("send a response")?;
            }
        }
    }

    /// Opens a Watch stream and waits for the first message.
    async fn open_watch(
        &self,
        connection: Connection,
        own: &mut watch::Receiver<Interest>,
    ) -> anyhow::Result<(mpsc::Sender<pb::WatchRequest>, Streaming<pb::WatchResponse>)> {
        let mut client = ExchangeClient::new(connection.channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let (outbox, sending) = mpsc::channel(OUTBOX);
        let open = {
            let mut receiver = lock(&self.shared.receiver);
            receiver.set_own(&own.borrow_and_update());
            receiver.open()
        };
        outbox.send(codec::watch::encode_request(open)).await?;
        let incoming = client.watch(ReceiverStream::new(sending)).await;
        let mut incoming = incoming.map_err(|status| not_opened(&connection.peer, &status))?.into_inner();
        let first = incoming.message().await.context("watch")?.context("the hub closed the stream")?;
        let answers = self.receive(first)?;
        for answer in answers {
            outbox.send(answer).await.context("send a response")?;
        }
        Ok((outbox, incoming))
    }
}

/// Why a Watch stream ended.
enum WatchEnd {
    Closed,
    /// The next stream is opened on this connection to another replica.
    Moves(String, Connection),
}

/// Finds a better replica to watch, and connects to it while the present stream is served.
struct Moves<'a> {
    client: &'a Client,
    identity: &'a MemberIdentity,
    check: Instant,
    opening: Option<(String, Opening<'a>)>,
}

type Opening<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Connection>> + Send + 'a>>;

impl<'a> Moves<'a> {
    fn new(client: &'a Client, identity: &'a MemberIdentity) -> Self {
        Self { client, identity, check: Instant::now() + CHOOSE_EVERY, opening: None }
    }

    /// Waits until a better replica is connected. Cancel safe: a later call continues.
    async fn opened(&mut self, watched: &str, choice: &mut Choice) -> (String, Connection) {
        loop {
            let Some((to, opening)) = &mut self.opening else {
                tokio::time::sleep_until(self.check).await;
                let now = Instant::now();
                self.check = now + CHOOSE_EVERY;
                let (received, _) = self.client.with_receiver(Receiver::positions);
                if let Some(to) = choice.better(watched, received, &self.client.shared.hubs.view(), now) {
                    let (identity, hub) = (self.identity, to.clone());
                    let opening = async move { within(connect(identity, &hub)).await };
                    self.opening = Some((to, Box::pin(opening)));
                }
                continue;
            };
            let (opened, to) = (opening.await, to.clone());
            self.opening = None;
            match opened {
                Ok(connection) => return (to, connection),
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(error, hub = to, "preferred replica of the hub not reached; the stream stays");
                    choice.failed(&to, Instant::now());
                }
            }
        }
    }
}

/// The message of the hub, if a stream ended because the hub rejected a request.
fn rejected(error: &anyhow::Error) -> Option<String> {
    let status = error.chain().find_map(|cause| cause.downcast_ref::<tonic::Status>())?;
    // `OutOfRange`: the message is too large.
    matches!(status.code(), tonic::Code::InvalidArgument | tonic::Code::OutOfRange).then(|| clip(status.message()))
}

/// Limits the size of an error.
fn clip(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_ERROR_BYTES)].to_owned()
}
