//! The embedded store, over a file or in memory.
//!
//! The state is kept in memory and answers every read; the file is written before the state changes. The hub's store is
//! small (registrations, policies, a bounded audit).

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tracing::error;

use crate::error::{StoreError, StoreFuture};
use crate::file::File;
use crate::key::{Key, Prefix};
use crate::limits::check;
use crate::model::{Change, Compare, Entry, Event, LeaseId, Listing, Outcome, Revision, Transaction};
use crate::state::{Batch, State};
use crate::store::Store;
use crate::watch::{History, Recent, Watch};

/// How often leases are checked for their end.
const LEASE_TICK: Duration = Duration::from_millis(100);

/// A store over a file or memory. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: RwLock<State>,
    /// When each lease ends. Not durable: a restart renews every lease.
    deadlines: std::sync::Mutex<HashMap<LeaseId, Instant>>,
    history: Arc<RwLock<History>>,
    newest: watch::Sender<Revision>,
    writer: Mutex<Writer>,
}

#[derive(Debug)]
struct Writer {
    disk: Option<Arc<File>>,
    /// After a failed write the content of the file is unknown, so no further write is accepted.
    failed: bool,
}

impl Engine {
    pub(crate) fn start(disk: Option<File>, state: State) -> Self {
        let now = Instant::now();
        let shared = Arc::new(Shared {
            deadlines: std::sync::Mutex::new(state.leases.iter().map(|(id, ttl)| (*id, after(now, *ttl))).collect()),
            history: Arc::new(RwLock::new(History::new(state.revision))),
            newest: watch::Sender::new(state.revision),
            state: RwLock::new(state),
            writer: Mutex::new(Writer { disk: disk.map(Arc::new), failed: false }),
        });
        let weak = Arc::downgrade(&shared);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LEASE_TICK).await;
                let Some(shared) = weak.upgrade() else { return };
                let now = Instant::now();
                let ended: Vec<LeaseId> =
                    shared.deadlines().iter().filter(|(_, deadline)| **deadline <= now).map(|(id, _)| *id).collect();
                for lease in ended {
                    if let Err(error) = shared.end(lease, Some(now)).await {
                        error!(%error, %lease, "ending a lease failed");
                    }
                }
            }
        });
        Self { shared }
    }
}

impl Shared {
    fn deadlines(&self) -> std::sync::MutexGuard<'_, HashMap<LeaseId, Instant>> {
        self.deadlines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `batch` to the file, then applies it. It completes even when the caller's future is dropped.
    async fn write(self: &Arc<Self>, writer: &mut Writer, batch: Batch) -> Result<(), StoreError> {
        if writer.failed {
            return Err(StoreError::Closed);
        }
        let batch = match writer.disk.clone() {
            None => batch,
            Some(disk) => {
                writer.failed = true;
                let (batch, written) = tokio::task::spawn_blocking(move || {
                    let written = disk.write(&batch);
                    (batch, written)
                })
                .await
                .map_err(|_| StoreError::Closed)?;
                written?;
                writer.failed = false;
                batch
            }
        };
        {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            let mut history = self.history.write().unwrap_or_else(PoisonError::into_inner);
            state.revision = batch.revision;
            state.last_lease = batch.last_lease;
            for (lease, ttl) in batch.leases {
                match ttl {
                    Some(ttl) => drop(state.leases.insert(lease, ttl)),
                    None => drop(state.leases.remove(&lease)),
                }
            }
            for (key, entry) in batch.entries {
                match &entry {
                    Some(entry) => drop(state.entries.insert(key.clone(), entry.clone())),
                    None => drop(state.entries.remove(&key)),
                }
                history.push(Event { revision: batch.revision, key, entry });
            }
            history.trim();
        }
        self.newest.send_replace(batch.revision);
        Ok(())
    }

    fn batch(&self) -> Batch {
        let state = self.state();
        Batch { revision: state.revision, last_lease: state.last_lease, ..Batch::default() }
    }

    async fn commit(self: Arc<Self>, transaction: Transaction) -> Result<Outcome, StoreError> {
        let mut writer = self.writer.lock().await;
        let mut batch = self.batch();
        {
            let state = self.state();
            let is_true = |compare: &Compare| match compare {
                Compare::Absent(key) => !state.entries.contains_key(key),
                Compare::Present(key) => state.entries.contains_key(key),
                Compare::Modified(key, revision) => state.entries.get(key).is_some_and(|e| e.modified == *revision),
            };
            if !transaction.compares.iter().all(is_true) {
                return Ok(Outcome::Conflict);
            }
            let revision = state.revision + 1;
            for change in transaction.changes {
                match change {
                    Change::Put { key, value, lease } => {
                        if let Some(lease) = lease.filter(|lease| !state.leases.contains_key(lease)) {
                            return Err(StoreError::NoLease(lease));
                        }
                        let created = state.entries.get(&key).map_or(revision, |e| e.created);
                        let entry = Entry { key: key.clone(), value, created, modified: revision, lease };
                        batch.entries.insert(key, Some(entry));
                    }
                    Change::Delete(key) if state.entries.contains_key(&key) => drop(batch.entries.insert(key, None)),
                    Change::Delete(_) => {}
                }
            }
            if batch.entries.is_empty() {
                return Ok(Outcome::Committed(state.revision));
            }
            batch.revision = revision;
        }
        let revision = batch.revision;
        self.write(&mut writer, batch).await?;
        Ok(Outcome::Committed(revision))
    }

    async fn grant(self: Arc<Self>, ttl: Duration) -> Result<LeaseId, StoreError> {
        let mut writer = self.writer.lock().await;
        let mut batch = self.batch();
        batch.last_lease += 1;
        let lease = LeaseId(batch.last_lease);
        batch.leases.insert(lease, Some(ttl));
        self.write(&mut writer, batch).await?;
        self.deadlines().insert(lease, after(Instant::now(), ttl));
        Ok(lease)
    }

    /// Ends a lease; with `unless_after`, only if it has not been renewed beyond that moment meanwhile.
    async fn end(self: &Arc<Self>, lease: LeaseId, unless_after: Option<Instant>) -> Result<(), StoreError> {
        let mut writer = self.writer.lock().await;
        if let Some(now) = unless_after
            && self.deadlines().get(&lease).is_none_or(|deadline| *deadline > now)
        {
            return Ok(());
        }
        let mut batch = self.batch();
        {
            let state = self.state();
            if !state.leases.contains_key(&lease) {
                return Err(StoreError::NoLease(lease));
            }
            batch.leases.insert(lease, None);
            let keys = state.entries.values().filter(|e| e.lease == Some(lease)).map(|e| (e.key.clone(), None));
            batch.entries.extend(keys);
            if !batch.entries.is_empty() {
                batch.revision += 1;
            }
        }
        // Before the write, so that a renewal during it fails.
        self.deadlines().remove(&lease);
        self.write(&mut writer, batch).await
    }
}

/// When a lease ends; one that is longer than the clock can express ends in a year.
fn after(now: Instant, time_to_live: Duration) -> Instant {
    now.checked_add(time_to_live).unwrap_or_else(|| now + Duration::from_secs(366 * 86_400))
}

/// Finishes `work` even when the caller's future is dropped, so that memory and file never differ.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::spawn(work).await.map_err(|_| StoreError::Closed)?
}

impl Store for Engine {
    fn revision(&self) -> StoreFuture<'_, Revision> {
        Box::pin(async { Ok(self.shared.state().revision) })
    }

    fn read<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(async { Ok(self.shared.state().entries.get(key).cloned()) })
    }

    fn list<'a>(&'a self, prefix: &'a Prefix) -> StoreFuture<'a, Listing> {
        Box::pin(async {
            let state = self.shared.state();
            let below = state.entries.range(prefix.first()..).take_while(|(key, _)| prefix.matches(key));
            Ok(Listing { revision: state.revision, entries: below.map(|(_, entry)| entry.clone()).collect() })
        })
    }

    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, Outcome> {
        Box::pin(async {
            check(&transaction)?;
            finish(self.shared.clone().commit(transaction)).await
        })
    }

    fn watch(&self, prefix: Prefix, after: Revision) -> StoreFuture<'_, Watch> {
        Box::pin(async move {
            let floor = self.shared.history.read().unwrap_or_else(PoisonError::into_inner).floor();
            if after < floor {
                return Err(StoreError::Compacted { after, floor });
            }
            let (history, newest) = (self.shared.history.clone(), self.shared.newest.subscribe());
            Ok(Watch::new(Recent { history, newest, prefix, after }))
        })
    }

    fn grant_lease(&self, time_to_live: Duration) -> StoreFuture<'_, LeaseId> {
        Box::pin(async move { finish(self.shared.clone().grant(time_to_live)).await })
    }

    fn renew_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let ttl = self.shared.state().leases.get(&lease).copied().ok_or(StoreError::NoLease(lease))?;
            let mut deadlines = self.shared.deadlines();
            let deadline = deadlines.get_mut(&lease).ok_or(StoreError::NoLease(lease))?;
            *deadline = after(Instant::now(), ttl);
            Ok(())
        })
    }

    fn time_to_live(&self, lease: LeaseId) -> StoreFuture<'_, Duration> {
        Box::pin(async move { self.shared.state().leases.get(&lease).copied().ok_or(StoreError::NoLease(lease)) })
    }

    fn end_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        let shared = self.shared.clone();
        Box::pin(async move { finish(async move { shared.end(lease, None).await }).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keeps_a_lease_that_is_renewed_while_it_is_being_ended() {
        let store = Engine::start(None, State::default());
        let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
        let key = Key::new(&["l"]).unwrap();
        store.commit(Transaction::default().put_with_lease(key.clone(), "1", lease)).await.unwrap();
        // Found to have ended a moment before it was renewed.
        store.shared.end(lease, Some(Instant::now())).await.unwrap();
        assert!(store.read(&key).await.unwrap().is_some());
        store.renew_lease(lease).await.unwrap();
        store.shared.end(lease, Some(Instant::now() + Duration::from_secs(61))).await.unwrap();
        assert!(store.read(&key).await.unwrap().is_none());
    }
}
