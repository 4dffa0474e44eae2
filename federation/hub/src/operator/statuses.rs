//! Statuses that are being written. Nothing waits for them: the hub's policies must not be late because a write of a status is.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ObjectReference;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::error;

use super::resource::Key;
use super::writer::{CONCURRENT, Patched, Write, Writer};

/// Statuses in flight. What is computed waits for at most some of them.
const MAX: usize = 256;

/// An Event about a refusal, which follows the status that says the same.
pub struct Refusal {
    pub about: ObjectReference,
    pub reason: String,
    pub message: String,
}

/// Statuses in flight; dropped, they are cancelled.
pub struct Statuses {
    tasks: JoinSet<(Key, Patched)>,
    keys: BTreeSet<Key>,
    finished: Vec<(Key, Patched)>,
    permits: Arc<Semaphore>,
}

impl Default for Statuses {
    fn default() -> Self {
        let permits = Arc::new(Semaphore::new(CONCURRENT));
        Self { tasks: JoinSet::new(), keys: BTreeSet::new(), finished: Vec::new(), permits }
    }
}

impl Statuses {
    /// Whether the status of an object may be sent: no earlier one is in flight, and there is room.
    pub fn has_room(&self, key: &Key) -> bool {
        self.keys.len() < MAX && !self.keys.contains(key)
    }

    pub fn send(&mut self, writer: &Writer, key: Key, write: Write, refusal: Option<Refusal>) {
        self.keys.insert(key.clone());
        let (writer, permits) = (writer.clone(), Arc::clone(&self.permits));
        self.tasks.spawn(async move {
            // The semaphore is never closed.
            let _permit = permits.acquire_owned().await;
            let patched = writer.write(&key, write).await;
            if let (Patched::Made(_), Some(refusal)) = (&patched, refusal) {
                writer.publish(&key, refusal.about, refusal.reason, &refusal.message).await;
            }
            (key, patched)
        });
    }

    /// Waits until one is written. Cancel safe. Without one in flight, it does not return.
    pub async fn written(&mut self) {
        match self.tasks.join_next().await {
            Some(ended) => self.finish(ended),
            None => std::future::pending().await,
        }
    }

    /// The answers since the last call.
    pub fn take(&mut self) -> Vec<(Key, Patched)> {
        while let Some(ended) = self.tasks.try_join_next() {
            self.finish(ended);
        }
        std::mem::take(&mut self.finished)
    }

    fn finish(&mut self, ended: Result<(Key, Patched), tokio::task::JoinError>) {
        match ended {
            Ok((key, patched)) => {
                self.keys.remove(&key);
                self.finished.push((key, patched));
            }
            // The key is not known: all others that are in flight are sent again.
            Err(error) => {
                error!(%error, "a task that writes a status has ended");
                self.tasks = JoinSet::new();
                self.keys.clear();
            }
        }
    }
}
