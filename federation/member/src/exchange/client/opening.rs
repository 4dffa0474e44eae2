//! Opening the streams to a hub, and opening them again after a renewal of the certificate.

use std::pin::Pin;
use std::time::Duration;

use anyhow::Context as _;
use hanse_identity::tls::{Connection, Peer};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;

use crate::registration::MemberIdentity;

/// The capacity of a stream's send queue: at most 4 × 1 MiB.
pub(super) const OUTBOX: usize = 4;
/// The timeout of a stream without messages. The hub sends a heartbeat every 3 seconds.
pub(super) const SILENCE: Duration = Duration::from_secs(15);
/// The interval between attempts to replace a stream after a renewal, while the old stream continues.
const REOPEN_AFTER: Duration = Duration::from_secs(2);

/// Opens a stream with a timeout.
pub(super) async fn within<T>(opening: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::time::timeout(SILENCE, opening).await.context("the hub is silent")?
}

pub(super) fn not_opened(hub: &Peer, status: &Status) -> anyhow::Error {
    anyhow::anyhow!("open the stream: {}", hub.explain(status))
}

pub(super) async fn connect(identity: &MemberIdentity, hub: &str) -> anyhow::Result<Connection> {
    Ok(identity.connect(hub).await?)
}

/// Opens a new stream after each renewal of the certificate.
pub(super) struct Renewals<'a, T> {
    changed: watch::Receiver<()>,
    again: Option<Instant>,
    opening: Option<Pin<Box<dyn Future<Output = anyhow::Result<T>> + Send + 'a>>>,
}

impl<'a, T: 'a> Renewals<'a, T> {
    pub(super) fn of(identity: &MemberIdentity) -> Self {
        let mut changed = identity.credentials().subscribe();
        changed.mark_unchanged();
        Self { changed, again: None, opening: None }
    }

    /// Waits for the next renewal, then returns the result of `open`. Cancel safe: a later call continues, so that the caller can serve
    /// the old stream meanwhile.
    pub(super) async fn opened<F>(&mut self, hub: &str, open: impl Fn() -> F) -> T
    where
        F: Future<Output = anyhow::Result<T>> + Send + 'a,
    {
        loop {
            let Some(opening) = &mut self.opening else {
                self.due().await;
                self.opening = Some(Box::pin(within(open())));
                continue;
            };
            let opened = opening.await;
            self.opening = None;
            match opened {
                Ok(opened) => return opened,
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(
                        error,
                        hub,
                        "stream with the renewed certificate not opened; the old stream stays in use"
                    );
                    self.again = Some(Instant::now() + REOPEN_AFTER);
                }
            }
        }
    }

    async fn due(&mut self) {
        let changed = async { drop(self.changed.changed().await) };
        match self.again {
            None => changed.await,
            Some(again) => tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(again) => {}
            },
        }
        self.again = None;
        self.changed.mark_unchanged();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn old_stream_is_served_while_the_next_one_opens() {
        let (renewed, changed) = watch::channel(());
        let mut renewals = Renewals { changed, again: None, opening: None };
        let (asked, answers) = (std::cell::Cell::new(0), mpsc::channel::<anyhow::Result<u32>>(2));
        let answered = Arc::new(tokio::sync::Mutex::new(answers.1));
        let open = || {
            asked.set(asked.get() + 1);
            let answered = answered.clone();
            async move { answered.lock().await.recv().await.expect("an answer") }
        };
        // The old stream receives a message each millisecond, and each cancels the future.
        let mut messages = tokio::time::interval(Duration::from_millis(1));
        messages.tick().await;
        let mut serve = async |until: u32| -> Option<u32> {
            for _ in 0..until {
                tokio::select! {
                    _ = messages.tick() => {}
                    opened = renewals.opened("hub", open) => return Some(opened),
                }
            }
            None
        };
        assert_eq!(serve(50).await, None, "nothing was renewed");
        assert_eq!(asked.get(), 0);
        renewed.send_replace(());
        assert_eq!(serve(50).await, None);
        assert_eq!(asked.get(), 1, "once, however often the future was dropped");
        answers.0.send(Err(anyhow::anyhow!("down"))).await.expect("sent");
        assert_eq!(serve(10).await, None, "it is tried again later");
        answers.0.send(Ok(7)).await.expect("sent");
        assert_eq!(serve(REOPEN_AFTER.as_millis() as u32 + 10).await, Some(7));
        assert_eq!(asked.get(), 2);
        // A hub that does not respond causes a timeout.
        renewed.send_replace(());
        assert_eq!(serve((SILENCE + REOPEN_AFTER).as_millis() as u32 + 10).await, None);
        assert_eq!(asked.get(), 4);
    }
}
