//! The truth of a ClusterSet, in one store, and a view of it that everybody reads.
//!
//! Every change is decided on one [`Snapshot`] and committed only if no other change came between (the audit's counter is
//! compared), with its audit record in the same transaction. When a change is answered, the snapshot shows it. Leases and
//! "was heard" are outside of that order, since they carry no decision.

pub mod records;
mod snapshot;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hanse_identity::Identity;
use hanse_identity::keys::Certificate;
use hanse_runtime::retry::Backoff;
use hanse_runtime::shutdown::Shutdown;
use hanse_store::{
    Change, Compare, Key, LeaseId, MAX_TRANSACTION_BYTES, MAX_TRANSACTION_PARTS, Outcome, Prefix, Revision, Store,
    StoreError, Transaction,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use records::{AuditRecord, MemberState};
pub use snapshot::{Cluster, ClusterState, Lease, Object, Snapshot};

/// Audit records kept; the oldest goes with each new one. 10,000 × about 300 bytes is 3 MiB.
pub const MAX_AUDIT_RECORDS: u64 = 10_000;
/// Most clusters with a registration.
pub use hanse_exchange::limits::MAX_CLUSTERS;
/// Most objects of one kind, users, and tokens that have not ended.
pub const MAX_OBJECTS: usize = 50_000;
/// Most bytes of all objects together: they are answered in one message of at most 64 MiB.
pub const MAX_OBJECT_BYTES: usize = 48 << 20;
pub const MAX_USERS: usize = 10_000;
pub const MAX_TOKENS: usize = 10_000;

/// How long a conflicting change is tried again: conflicts come from other replicas only.
const MAX_ATTEMPTS: usize = 32;

/// Reads the wall clock; replaced by tests.
#[derive(Clone)]
pub struct Clock(pub Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Default for Clock {
    fn default() -> Self {
        Self(Arc::new(SystemTime::now))
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Denied(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    Limit(String),
    #[error("the store failed")]
    Store(#[from] StoreError),
    #[error("other replicas changed the registry too often meanwhile")]
    Busy,
}

/// The denials that are on record since a while: who may do nothing must not push what others did out of the audit. Every
/// denial is in the log.
#[derive(Debug, Default)]
struct Denials(HashMap<(String, &'static str), Instant>);

impl Denials {
    /// One caller's denials of one action are on record once in this time.
    const EVERY: Duration = Duration::from_secs(600);
    /// Callers and actions that are remembered: 4,096 × about 100 bytes.
    const MAX: usize = 4_096;

    fn is_news(&mut self, deed: &Deed, now: Instant) -> bool {
        self.0.retain(|_, at| now.duration_since(*at) < Self::EVERY);
        let key = (deed.who.clone(), deed.action);
        let news = !self.0.contains_key(&key) && self.0.len() < Self::MAX;
        if news {
            self.0.insert(key, now);
        }
        news
    }
}

/// One transaction of changes with their audit records.
struct Commit {
    transaction: Transaction,
    keys: HashSet<Key>,
    bytes: usize,
    at: u64,
    counter: Key,
    number: u64,
}

impl Commit {
    /// An audit record with its keys: 300 bytes of an object, 100 of a user, 1,000 of a denial's reason, and JSON around them.
    const AUDIT_BYTES: usize = 2 << 10;

    fn new(snapshot: &Snapshot, at: u64) -> Result<Self, ChangeError> {
        let counter = key(&["meta", "audit"])?;
        // No other change came between.
        let compare = match snapshot.audit_revision {
            0 => Compare::Absent(counter.clone()),
            revision => Compare::Modified(counter.clone(), revision),
        };
        let (transaction, keys) = (Transaction::default().when(compare), HashSet::new());
        Ok(Self { transaction, keys, bytes: 0, at, counter, number: snapshot.audit_number })
    }

    /// Whether these changes and their audit record still fit. A transaction changes a key once.
    fn fits(&self, changes: &Transaction) -> bool {
        // The audit record, the one that it replaces, and the counter.
        let parts = self.transaction.changes.len() + changes.changes.len() + 3;
        let bytes = self.bytes + changes.changes.iter().map(Change::size).sum::<usize>() + Self::AUDIT_BYTES;
        parts <= MAX_TRANSACTION_PARTS
            && bytes <= MAX_TRANSACTION_BYTES
            && !changes.changes.iter().any(|change| self.keys.contains(change.key()))
    }

    fn add(&mut self, changes: Transaction) {
        self.bytes += changes.changes.iter().map(Change::size).sum::<usize>() + Self::AUDIT_BYTES;
        self.keys.extend(changes.changes.iter().map(|change| change.key().clone()));
        self.transaction.compares.extend(changes.compares);
        self.transaction.changes.extend(changes.changes);
    }

    fn audit(&mut self, deed: &Deed, outcome: String) -> Result<(), ChangeError> {
        self.number += 1;
        let Deed { who, action, object } = deed.clone();
        let record = AuditRecord { at: self.at, who, action: action.to_owned(), object, outcome };
        let mut transaction = std::mem::take(&mut self.transaction);
        transaction = transaction.put(audit_key(self.number)?, records::encode(&record));
        if let Some(oldest) = self.number.checked_sub(MAX_AUDIT_RECORDS).filter(|n| *n > 0) {
            transaction = transaction.delete(audit_key(oldest)?);
        }
        self.transaction = transaction;
        Ok(())
    }

    /// None where nothing changes.
    fn transaction(self) -> Option<Transaction> {
        let changes = !self.transaction.changes.is_empty();
        changes.then(|| self.transaction.put(self.counter, self.number.to_string()))
    }
}

/// Who does what, for the audit.
#[derive(Debug, Clone)]
pub struct Deed {
    pub who: String,
    pub action: &'static str,
    pub object: String,
}

/// A handle on the registry. Clones share it.
#[derive(Debug, Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

type HeldLease = Arc<tokio::sync::Mutex<Option<LeaseId>>>;

struct Shared {
    store: Arc<dyn Store>,
    epoch: u64,
    lease_time: Duration,
    clock: Clock,
    view: watch::Sender<Arc<Snapshot>>,
    /// Orders the changes of this replica, so that they do not conflict among themselves.
    changing: tokio::sync::Mutex<()>,
    /// Each cluster's, which is granted and renewed by one at a time: clusters make each other wait for nothing.
    leases: Mutex<HashMap<Arc<str>, HeldLease>>,
    heard: Mutex<HashMap<Arc<str>, Instant>>,
    failed: AtomicBool,
    denied: Mutex<Denials>,
    /// Lives as long as the handles do.
    _following: tokio_util::sync::DropGuard,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("store", &self.store).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Registry {
    /// Reads the store and follows it. `lease_time` is how long a cluster may be silent before it counts as stale.
    ///
    /// # Errors
    /// When the store fails, or holds a record that this version cannot read.
    pub async fn open(
        store: Arc<dyn Store>,
        lease_time: Duration,
        clock: Clock,
        shutdown: &Shutdown,
    ) -> Result<Self, ChangeError> {
        let epoch = read_or_make_epoch(&*store).await?;
        let everything = Prefix::new::<&str>(&[]).map_err(|e| ChangeError::Invalid(e.to_string()))?;
        let listing = store.list(&everything).await?;
        let snapshot = Snapshot::from_listing(&listing).map_err(ChangeError::Invalid)?;
        let leases = listing.entries.iter().filter_map(|e| {
            let mut segments = e.key.segments();
            (segments.next() == Some("lease")).then_some(())?;
            Some((Arc::from(segments.next()?), Arc::new(tokio::sync::Mutex::new(Some(e.lease?)))))
        });
        let leases = Mutex::new(leases.collect());
        let view = watch::Sender::new(Arc::new(snapshot));
        let stop = CancellationToken::new();
        let following = (store.clone(), view.clone(), stop.clone());
        // It ends with the last handle: what is answered while the hub stops needs the view.
        tokio::spawn(shutdown.supervised("view of the store", move || {
            let (store, view, stop) = following.clone();
            follow(store, view, stop)
        }));
        Ok(Self {
            shared: Arc::new(Shared {
                store,
                epoch,
                lease_time,
                clock,
                view,
                changing: tokio::sync::Mutex::default(),
                leases,
                heard: Mutex::default(),
                failed: AtomicBool::new(false),
                denied: Mutex::default(),
                _following: stop.drop_guard(),
            }),
        })
    }

    /// Ties the store to a ClusterSet's root, or checks that it is tied to this one.
    ///
    /// # Errors
    /// When it is tied to another root, or the store fails.
    pub async fn bind(&self, root: &Certificate) -> Result<(), ChangeError> {
        let (name, root) = (key(&["meta", "root"])?, root.fingerprint().to_string());
        let make = Transaction::default().when(Compare::Absent(name.clone())).put(name.clone(), root.clone());
        self.shared.store.commit(make).await?;
        match self.shared.store.read(&name).await? {
            Some(entry) if entry.value == root.as_bytes() => Ok(()),
            _ => {
                let text = format!("the store belongs to another ClusterSet than the root certificate {root}");
                Err(ChangeError::Conflict(text))
            }
        }
    }

    /// A write has failed: the store takes no more, and a new start must find out what it holds.
    pub fn failed(&self) -> bool {
        self.shared.failed.load(Ordering::Acquire)
    }

    fn noted<T>(&self, outcome: Result<T, StoreError>) -> Result<T, ChangeError> {
        if matches!(outcome, Err(StoreError::Closed | StoreError::Io(_))) {
            self.shared.failed.store(true, Ordering::Release);
        }
        Ok(outcome?)
    }

    /// The newest view.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.view.borrow().clone()
    }

    /// Sees each new view; a slow reader sees the newest only.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.shared.view.subscribe()
    }

    /// Names the store's numbering: revisions of different epochs have nothing to do with each other.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    pub fn lease_time(&self) -> Duration {
        self.shared.lease_time
    }

    pub fn now(&self) -> SystemTime {
        (self.shared.clock.0)()
    }

    /// Seconds since 1970.
    pub fn now_seconds(&self) -> u64 {
        seconds(self.now())
    }

    /// Whether this certificate may be used now: its owner is registered with this key and has not been revoked. The
    /// certificate itself (chain, time) is TLS's business.
    pub fn admits(&self, certificate: &Certificate) -> bool {
        self.snapshot().admits(certificate)
    }

    /// A cluster was heard: its lease begins, or begins again. Cheap while the lease holds (nothing is written), so it may be
    /// called for each message.
    ///
    /// # Errors
    /// When the store fails, or the cluster is not accepted.
    pub async fn heard(&self, cluster: &str) -> Result<(), ChangeError> {
        let name: Arc<str> = cluster.into();
        if !self.snapshot().members.get(cluster).is_some_and(|m| m.record.state == MemberState::Accepted) {
            return Err(ChangeError::NotFound(format!("cluster {cluster} is not accepted")));
        }
        let now = Instant::now();
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), now);
        let lease = {
            let mut leases = self.shared.leases.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(leases.entry(name).or_default())
        };
        let mut held = lease.lock().await;
        if let Some(lease) = *held {
            match self.shared.store.renew_lease(lease).await {
                Ok(()) => return Ok(()),
                Err(StoreError::NoLease(_)) => *held = None,
                Err(error) => return Err(error.into()),
            }
        }
        let lease = self.noted(self.shared.store.grant_lease(self.shared.lease_time).await)?;
        let live = Transaction::default()
            .put_with_lease(key(&["lease", cluster])?, Bytes::new(), lease)
            .put(key(&["heard", cluster])?, Bytes::new());
        let outcome = self.noted(self.shared.store.commit(live).await)?;
        *held = Some(lease);
        if let Outcome::Committed(revision) = outcome {
            self.shown(revision).await?;
        }
        info!(cluster, "cluster heard");
        Ok(())
    }

    /// How long ago this replica heard a cluster, by its monotonic clock.
    pub fn silent_for(&self, cluster: &str) -> Option<Duration> {
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner).get(cluster).map(Instant::elapsed)
    }

    /// Makes one change. `decide` is called with the newest view, possibly more than once, and returns the transaction and
    /// what to answer. The audit record is added here.
    ///
    /// # Errors
    /// What `decide` returns (a denial is audited too), or the store's failure.
    pub async fn change<T>(
        &self,
        deed: &Deed,
        mut decide: impl FnMut(&Snapshot) -> Result<(Transaction, T), ChangeError>,
    ) -> Result<(Revision, T), ChangeError> {
        let mut outcomes =
            self.change_many(std::slice::from_ref(deed), |deed| deed, |_, snapshot| decide(snapshot)).await?;
        outcomes.pop().unwrap_or(Err(ChangeError::Busy))
    }

    /// Makes changes in order, as many from the first on as fit into one transaction, and returns what became of these.
    /// Each is decided as by [`Self::change`], on a view that shows those before it, and has its own audit record; one that
    /// is refused changes nothing and does not affect the others.
    ///
    /// # Errors
    /// When the store fails: then none of them was made.
    pub async fn change_many<I, T>(
        &self,
        items: &[I],
        deed: impl Fn(&I) -> &Deed,
        mut decide: impl FnMut(&I, &Snapshot) -> Result<(Transaction, T), ChangeError>,
    ) -> Result<Vec<Result<(Revision, T), ChangeError>>, ChangeError> {
        let _turn = self.shared.changing.lock().await;
        let now = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(200));
        // Of a denial that was new at the first attempt the record is due at the second, too.
        let mut news: HashMap<usize, bool> = HashMap::new();
        for _ in 0..MAX_ATTEMPTS {
            let snapshot = self.snapshot();
            let mut view = Arc::clone(&snapshot);
            let mut commit = Commit::new(&snapshot, self.now_seconds())?;
            let mut outcomes = Vec::new();
            for (index, item) in items.iter().enumerate() {
                let deed = deed(item);
                let outcome = match decide(item, &view) {
                    Ok((transaction, answer)) if transaction.changes.is_empty() => Ok((false, answer)),
                    Ok((transaction, answer)) => {
                        if !commit.fits(&transaction) && !outcomes.is_empty() {
                            break;
                        }
                        if index + 1 < items.len() {
                            Arc::make_mut(&mut view).preview(&transaction);
                        }
                        commit.add(transaction);
                        commit.audit(deed, "done".to_owned())?;
                        Ok((true, answer))
                    }
                    Err(error @ ChangeError::Denied(_)) => {
                        if !commit.fits(&Transaction::default()) && !outcomes.is_empty() {
                            break;
                        }
                        let is_news = *news.entry(index).or_insert_with(|| {
                            warn!(who = deed.who, action = deed.action, object = deed.object, %error, "denied");
                            self.shared.denied.lock().unwrap_or_else(PoisonError::into_inner).is_news(deed, now)
                        });
                        if is_news {
                            commit.audit(deed, error.to_string())?;
                        }
                        Err(error)
                    }
                    Err(error) => Err(error),
                };
                outcomes.push(outcome);
            }
            let made = match commit.transaction() {
                None => Outcome::Committed(snapshot.revision),
                Some(transaction) => self.noted(self.shared.store.commit(transaction).await)?,
            };
            if let Outcome::Committed(revision) = made {
                self.shown(revision).await?;
                for (item, outcome) in items.iter().zip(&outcomes) {
                    let Deed { who, action, object } = deed(item);
                    if matches!(outcome, Ok((true, _))) {
                        info!(who, action, object, revision, "registry changed");
                    }
                }
                let at = |changed| if changed { revision } else { snapshot.revision };
                let outcomes = outcomes.into_iter();
                return Ok(outcomes.map(|it| it.map(|(changed, answer)| (at(changed), answer))).collect());
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
        Err(ChangeError::Busy)
    }

    /// The newest `limit` audit records, newest first; only of `object`, where that is not empty.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn audit(&self, limit: usize, object: &str) -> Result<Vec<(u64, AuditRecord)>, ChangeError> {
        let newest = self.snapshot().audit_number;
        let mut found = Vec::new();
        for number in (1..=newest).rev().take(MAX_AUDIT_RECORDS as usize) {
            if found.len() >= limit {
                break;
            }
            if let Some(entry) = self.shared.store.read(&audit_key(number)?).await?
                && let Ok(record) = records::decode::<AuditRecord>(&entry.value)
                && (object.is_empty() || record.object == object)
            {
                found.push((number, record));
            }
        }
        Ok(found)
    }

    /// Waits until the view shows `revision`.
    async fn shown(&self, revision: Revision) -> Result<(), ChangeError> {
        let mut view = self.subscribe();
        view.wait_for(|snapshot| snapshot.revision >= revision).await.map_err(|_| StoreError::Closed)?;
        Ok(())
    }
}

/// Applies the store's events to the view. Where the store no longer holds them, it lists again.
async fn follow(store: Arc<dyn Store>, view: watch::Sender<Arc<Snapshot>>, stop: CancellationToken) {
    let Ok(everything) = Prefix::new::<&str>(&[]) else { return };
    let mut backoff = Backoff::default();
    loop {
        let from = view.borrow().revision;
        let mut events = match store.watch(everything.clone(), from).await {
            Ok(events) => events,
            Err(StoreError::Compacted { .. }) => {
                match store.list(&everything).await.map(|listing| Snapshot::from_listing(&listing)) {
                    Ok(Ok(snapshot)) => drop(view.send_replace(Arc::new(snapshot))),
                    Ok(Err(error)) => error!(%error, "the store holds what cannot be read"),
                    Err(error) => error!(%error, "the store cannot be listed"),
                }
                if !backoff.wait(&stop).await {
                    return;
                }
                continue;
            }
            Err(error) => {
                error!(%error, "the store cannot be watched");
                if !backoff.wait(&stop).await {
                    return;
                }
                continue;
            }
        };
        backoff.reset();
        loop {
            let batch = tokio::select! {
                () = stop.cancelled() => return,
                batch = events.next() => batch,
            };
            let Ok(batch) = batch else { break };
            let mut snapshot = Snapshot::clone(&view.borrow());
            for event in &batch {
                if let Err(error) = snapshot.apply(event) {
                    error!(%error, key = %event.key, "the store holds what cannot be read");
                }
            }
            view.send_replace(Arc::new(snapshot));
        }
    }
}

/// Seconds in the upper half make a later store's epoch the greater one, where epochs are compared at all.
fn new_epoch() -> Result<u64, ChangeError> {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| ChangeError::Invalid("the random generator failed".to_owned()))?;
    Ok(seconds(SystemTime::now()) << 32 | u64::from(u32::from_le_bytes(bytes)))
}

async fn read_or_make_epoch(store: &dyn Store) -> Result<u64, ChangeError> {
    let name = key(&["meta", "epoch"])?;
    let make = Transaction::default().when(Compare::Absent(name.clone())).put(name.clone(), new_epoch()?.to_string());
    store.commit(make).await?;
    let entry = store.read(&name).await?;
    let text = entry.as_ref().and_then(|e| std::str::from_utf8(&e.value).ok());
    text.and_then(|t| t.parse().ok()).ok_or_else(|| ChangeError::Invalid("the store's epoch cannot be read".to_owned()))
}

/// Gives a store that was restored from a backup another epoch: what others hold of the hub's may be newer than it, and in
/// the new epoch counts for nothing.
///
/// # Errors
/// When the store fails.
pub async fn begin_epoch(store: &dyn Store) -> Result<(), ChangeError> {
    let transaction = Transaction::default().put(key(&["meta", "epoch"])?, new_epoch()?.to_string());
    store.commit(transaction).await?;
    Ok(())
}

/// A key from names that have been checked already.
pub(crate) fn key(segments: &[&str]) -> Result<Key, ChangeError> {
    Key::new(segments).map_err(|e| ChangeError::Invalid(e.to_string()))
}

fn audit_key(number: u64) -> Result<Key, ChangeError> {
    key(&["audit", &format!("{number:020}")])
}

pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Deed {
    pub fn new(who: &Identity, action: &'static str, object: impl Into<String>) -> Self {
        Self { who: who.to_string(), action, object: object.into() }
    }
}
