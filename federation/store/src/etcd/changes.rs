//! Watches: a stream of etcd, opened again where it broke.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{GetOptions, WatchOptions, WatchResponse, WatchStream};
use hanse_runtime::retry::Backoff;
use tokio::time::timeout;
use tracing::{info, warn};

use super::connection::{CallError, Connection};
use super::failure::Failure;
use super::keys::{Range, Root, number, revision};
use crate::error::{StoreError, StoreFuture};
use crate::model::{Event, Revision};
use crate::watch::Changes;

/// The largest message: a reader that is further behind lists again. As much as the embedded store keeps.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

#[derive(Debug)]
pub(super) struct Following {
    connection: Arc<Connection>,
    root: Root,
    range: Range,
    /// All changes up to this revision were returned.
    after: Revision,
    /// The newest revision that etcd has shown: it must not go back.
    seen: Revision,
    open: Option<Open>,
    backoff: Backoff,
    /// A warning was logged, and nothing was received since.
    interrupted: bool,
}

#[derive(Debug)]
struct Open {
    stream: WatchStream,
    generation: u64,
}

/// Why a stream could not be opened.
enum Refusal {
    /// Try again.
    Later(String),
    Error(StoreError),
}

impl Following {
    /// Begins to watch.
    pub(super) async fn start(
        connection: Arc<Connection>,
        root: Root,
        range: Range,
        after: Revision,
    ) -> Result<Self, StoreError> {
        let backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        let mut this = Self { connection, root, range, after, seen: 0, open: None, backoff, interrupted: false };
        let deadline = this.connection.deadline();
        loop {
            match this.open().await {
                Ok(()) => return Ok(this),
                Err(Refusal::Error(error)) => return Err(error),
                Err(Refusal::Later(reason)) if tokio::time::Instant::now() >= deadline => {
                    return Err(StoreError::Unavailable(reason));
                }
                Err(Refusal::Later(_)) => tokio::time::sleep(this.backoff.next_delay()).await,
            }
        }
    }

    async fn open(&mut self) -> Result<(), Refusal> {
        self.check().await?;
        let (stream, generation) = match self.stream(number(self.after) + 1).await {
            // The token may have ended; etcd reports that as a lack of rights.
            Err(Refusal::Error(StoreError::Denied(_))) if self.connection.url().user.is_some() => {
                if let Ok(current) = self.connection.current().await {
                    self.connection.forget(current.generation).await;
                }
                self.stream(number(self.after) + 1).await?
            }
            opened => opened?,
        };
        self.open = Some(Open { stream, generation });
        Ok(())
    }

    /// Checks that the changes after `self.after` are available. A change at the revision of a compaction itself may be gone
    /// without an error in versions of etcd before 3.4.34 and 3.5.16, so that it counts as compacted.
    async fn check(&mut self) -> Result<(), Refusal> {
        let key = self.root.own("store");
        // etcd's revisions begin with 1, that of an empty cluster.
        let at = GetOptions::new().with_revision(number(self.after).max(1)).with_count_only();
        let answer = self
            .connection
            .call(|client| {
                let (key, at) = (key.clone(), at.clone());
                async move { client.kv_client().get(key, Some(at)).await }
            })
            .await;
        match answer {
            Ok(_) => Ok(()),
            Err(CallError::Failure(Failure::Future)) if self.seen == 0 => Ok(()),
            Err(CallError::Failure(Failure::Future)) => {
                let text = format!(
                    "revision {} was read, and is newer than the newest: etcd was restored from a backup; restart the hub \
                     with --restored",
                    self.after
                );
                Err(Refusal::Error(StoreError::Damaged(text)))
            }
            Err(CallError::Failure(Failure::Compacted)) => {
                let floor = self.floor().await.unwrap_or(self.after + 1);
                Err(Refusal::Error(StoreError::Compacted { after: self.after, floor }))
            }
            Err(error) => Err(refusal(error)),
        }
    }

    /// The revision of the last compaction.
    async fn floor(&self) -> Option<Revision> {
        let reading = async {
            let (mut stream, _) = self.stream(1).await.ok()?;
            loop {
                let answer = stream.message().await.ok()??;
                if answer.compact_revision() > 0 {
                    return Some(revision(answer.compact_revision()));
                }
            }
        };
        timeout(self.connection.attempt(), reading).await.ok()?
    }

    /// Opens a stream from `start`, and waits until etcd has confirmed it.
    async fn stream(&self, start: i64) -> Result<(WatchStream, u64), Refusal> {
        let attempt = self.connection.attempt();
        let current = match timeout(attempt, self.connection.current()).await {
            Ok(current) => current.map_err(refusal)?,
            Err(_) => return Err(Refusal::Later("a node did not accept a connection".to_owned())),
        };
        let options = WatchOptions::new().with_range(&*self.range.1).with_start_revision(start).with_progress_notify();
        let mut client = current.client.watch_client().max_decoding_message_size(MAX_MESSAGE_BYTES);
        let opening = async {
            let mut stream = client.watch(&*self.range.0, Some(options)).await?;
            let answer = stream.message().await?;
            Ok::<_, etcd_client::Error>((stream, answer))
        };
        let failure = match timeout(attempt, opening).await {
            Ok(Ok((stream, Some(answer)))) if answer.created() && !answer.canceled() => {
                return Ok((stream, current.generation));
            }
            Ok(Ok((_, Some(answer)))) if answer.cancel_reason().contains("permission denied") => {
                Failure::Denied(self.denied())
            }
            Ok(Ok((_, Some(answer)))) => Failure::Node(format!("watch refused: {}", answer.cancel_reason())),
            Ok(Ok((_, None))) => Failure::Node("watch ended".to_owned()),
            Ok(Err(error)) => Failure::from(error),
            Err(_) => Failure::Node("no answer to a watch".to_owned()),
        };
        match failure {
            Failure::Node(text) => Err(Refusal::Later(self.connection.failed(current.generation, &text).await)),
            Failure::Token => {
                self.connection.forget(current.generation).await;
                Err(Refusal::Later("the token has ended".to_owned()))
            }
            failure => Err(refusal(CallError::Failure(failure))),
        }
    }

    fn denied(&self) -> String {
        let name = self.connection.url().user.as_ref().map_or("this client", |it| &*it.0);
        format!("{name} may not read the keys that begin with {}:", self.connection.url().prefix)
    }

    /// Takes over a message; an error ends the watch.
    fn take(&mut self, message: &WatchResponse) -> Result<Vec<Event>, StoreError> {
        if message.canceled() && message.compact_revision() > 0 {
            let floor = revision(message.compact_revision());
            return Err(StoreError::Compacted { after: self.after, floor });
        }
        let mut events = Vec::with_capacity(message.events().len());
        for event in message.events() {
            let Some(found) = event.kv() else { continue };
            let at = revision(found.mod_revision());
            self.seen = self.seen.max(at);
            let Some(key) = self.root.parse(found.key()) else { continue };
            // A deletion has no creation.
            let entry = if found.create_revision() > 0 { self.root.entry(found) } else { None };
            if at > self.after {
                events.push(Event { revision: at, key, entry });
            }
        }
        // Within a transaction in the order of keys, as every store reports them.
        events.sort_by(|one, two| (one.revision, &one.key).cmp(&(two.revision, &two.key)));
        // Whole transactions: etcd splits none of them.
        self.after = self.after.max(match message.events().last().and_then(|it| it.kv()) {
            Some(last) => revision(last.mod_revision()),
            // A notification of progress: there are no changes up to its revision.
            None if !message.created() && !message.canceled() => {
                message.header().map_or(0, |it| revision(it.revision()))
            }
            None => 0,
        });
        self.seen = self.seen.max(self.after);
        Ok(events)
    }

    async fn next_events(&mut self) -> Result<Vec<Event>, StoreError> {
        loop {
            let Some(open) = &mut self.open else {
                match self.open().await {
                    Ok(()) if self.interrupted => {
                        info!(after = self.after, "watch of the store resumed");
                        self.interrupted = false;
                    }
                    Ok(()) => {}
                    Err(Refusal::Error(StoreError::Unavailable(reason)) | Refusal::Later(reason)) => {
                        self.interrupt(&reason);
                        tokio::time::sleep(self.backoff.next_delay()).await;
                    }
                    Err(Refusal::Error(error)) => return Err(error),
                }
                continue;
            };
            let generation = open.generation;
            let reason = match open.stream.message().await {
                Ok(Some(message)) => {
                    self.backoff.reset();
                    let events = self.take(&message)?;
                    if !events.is_empty() {
                        return Ok(events);
                    }
                    if !message.canceled() {
                        continue;
                    }
                    format!("watch ended: {}", message.cancel_reason())
                }
                Ok(None) => "watch ended".to_owned(),
                Err(error) => match Failure::from(error) {
                    Failure::Node(text) | Failure::Busy(text) | Failure::Refused(text) | Failure::Denied(text) => text,
                    Failure::Large => {
                        // More than this reader may keep: it lists again.
                        let floor = self.seen.max(self.after + 1);
                        return Err(StoreError::Compacted { after: self.after, floor });
                    }
                    failure => format!("{failure:?}"),
                },
            };
            self.open = None;
            let reason = self.connection.failed(generation, &reason).await;
            self.interrupt(&reason);
            tokio::time::sleep(self.backoff.next_delay()).await;
        }
    }

    fn interrupt(&mut self, reason: &str) {
        if !self.interrupted {
            warn!(reason, after = self.after, "watch of the store interrupted");
            self.interrupted = true;
        }
    }
}

impl Changes for Following {
    /// What it keeps is in `self`, so that dropping the future drops nothing.
    fn next(&mut self) -> StoreFuture<'_, Vec<Event>> {
        Box::pin(self.next_events())
    }

    fn revision(&self) -> Revision {
        self.after
    }
}

fn refusal(error: CallError) -> Refusal {
    match StoreError::from(error) {
        StoreError::Unavailable(reason) => Refusal::Later(reason),
        error => Refusal::Error(error),
    }
}
