//! The state of a ClusterSet: one store, and a view of it in memory.
//!
//! Every change is decided on one [`Snapshot`] and committed only if no other change came between (the audit's counter is
//! compared), with its audit record in the same transaction. When a change returns, the snapshot includes it. Leases and
//! the `heard` entries are outside of that order: they carry no decision.

mod availability;
mod changes;
mod instances;
mod leases;
pub mod records;
mod replicas;
mod snapshot;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hanse_identity::Identity;
use hanse_identity::keys::Certificate;
use hanse_runtime::retry::Backoff;
use hanse_runtime::shutdown::Shutdown;
use hanse_store::{
    Change, Compare, Key, KeyError, MAX_TRANSACTION_BYTES, MAX_TRANSACTION_PARTS, Outcome, Prefix, Revision, Store,
    StoreError, Transaction,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::manifest::{Kind, ObjectId};

use availability::Availability;
pub use changes::{DECIDED_WITHIN, MAX_AGE, approval_key, change_key};
use records::{AuditDetail, AuditRecord};
pub use snapshot::{Acceptance, Cluster, ClusterState, Lease, Object, Snapshot};

/// Audit records stored. Each new one replaces the oldest. 10,000 × about 300 bytes is 3 MiB.
pub const MAX_AUDIT_RECORDS: u64 = 10_000;
/// Manifests in one answer about the audit log: newer records have theirs. A response has 64 MiB.
const MAX_DETAILS_BYTES: usize = 32 << 20;
/// Maximum number of clusters with a registration.
pub use hanse_exchange::limits::MAX_CLUSTERS;
/// Most objects of one kind, users, and tokens that have not ended.
pub const MAX_OBJECTS: usize = 50_000;
/// Maximum size of all objects together: one response of at most 64 MiB contains all of them.
pub const MAX_OBJECT_BYTES: usize = 48 << 20;
pub const MAX_USERS: usize = 10_000;
pub const MAX_TOKENS: usize = 10_000;

/// Attempts of a change. Only other replicas cause conflicts.
const MAX_ATTEMPTS: usize = 32;

/// How long a change waits for the view after it was committed: a watch whose node hangs is opened again after some 12 s.
const SHOWN_WITHIN: Duration = Duration::from_secs(30);

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
    /// It waits for an approval.
    #[error("{0}")]
    Pending(String),
    #[error("the store failed")]
    Store(#[from] StoreError),
    #[error("conflicting changes of other replicas: try again")]
    Busy,
}

/// The denials that were recorded recently. A caller without rights must not push the records of others out of the audit log.
/// Every denial is in the process log.
#[derive(Debug, Default)]
struct Denials(HashMap<(String, &'static str), Instant>);

impl Denials {
    /// Interval between two records of the same caller and action.
    const EVERY: Duration = Duration::from_secs(600);
    /// Callers and actions in memory: 4,096 × about 100 bytes.
    const MAX: usize = 4_096;

    fn is_new(&mut self, action: &AuditAction, now: Instant) -> bool {
        self.0.retain(|_, at| now.duration_since(*at) < Self::EVERY);
        let key = (action.who.clone(), action.action);
        let is_new = !self.0.contains_key(&key) && self.0.len() < Self::MAX;
        if is_new {
            self.0.insert(key, now);
        }
        is_new
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
    /// An audit record with its keys: 300 bytes of an object, 100 of a user, 1,000 of a denial's reason, and JSON around them. The
    /// manifests of its detail as JSON text are twice as long at most.
    const AUDIT_BYTES: usize = (2 << 10) + 4 * records::MAX_DETAIL_BYTES;

    fn new(snapshot: &Snapshot, at: u64) -> Result<Self, ChangeError> {
        let counter = key(&["meta", "audit"])?;
        // Fails if another change was committed in between.
        let compare = match snapshot.audit_revision {
            0 => Compare::Absent(counter.clone()),
            revision => Compare::Modified(counter.clone(), revision),
        };
        let (transaction, keys) = (Transaction::default().when(compare), HashSet::new());
        Ok(Self { transaction, keys, bytes: 0, at, counter, number: snapshot.audit_number })
    }

    /// Whether the changes and their audit record fit. A transaction changes each key at most once.
    fn fits(&self, changes: &Transaction) -> bool {
        // The audit record with its detail, those that they replace, and the counter.
        let parts = self.transaction.changes.len() + changes.changes.len() + 5;
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

    fn audit(
        &mut self,
        action: &AuditAction,
        outcome: String,
        detail: Option<&AuditDetail>,
    ) -> Result<(), ChangeError> {
        self.number += 1;
        let AuditAction { who, action, object, .. } = action.clone();
        let detailed = detail.is_some();
        let record = AuditRecord { at: self.at, who, action: action.to_owned(), object, outcome, detailed };
        let mut transaction = std::mem::take(&mut self.transaction);
        transaction = transaction.put(audit_key(self.number)?, records::encode(&record));
        if let Some(detail) = detail {
            transaction = transaction.put(detail_key(self.number)?, records::encode(detail));
        }
        if let Some(oldest) = self.number.checked_sub(MAX_AUDIT_RECORDS).filter(|n| *n > 0) {
            transaction = transaction.delete(audit_key(oldest)?).delete(detail_key(oldest)?);
        }
        self.transaction = transaction;
        Ok(())
    }

    /// `None` if there are no changes.
    fn transaction(self) -> Option<Transaction> {
        let changes = !self.transaction.changes.is_empty();
        changes.then(|| self.transaction.put(self.counter, self.number.to_string()))
    }
}

/// A request, as the audit log records it.
#[derive(Debug, Clone)]
pub struct AuditAction {
    pub who: String,
    pub action: &'static str,
    pub object: String,
    /// The outcome of a successful action, and the manifests that it is about, where they are not those of the transaction.
    pub proposed: Option<Box<(String, AuditDetail)>>,
}

/// A handle on the registry. Clones share it.
#[derive(Debug, Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn Store>,
    epoch: u64,
    lease_time: Duration,
    clock: Clock,
    view: watch::Sender<Arc<Snapshot>>,
    /// Orders the changes of this replica, so that they do not conflict among themselves.
    changing: tokio::sync::Mutex<()>,
    availability: Availability,
    /// Per cluster: grants and renewals of one lease are serialized, those of different clusters are not. The lease itself is in the
    /// view: any replica renews it.
    renewing: Mutex<HashMap<Arc<str>, Arc<tokio::sync::Mutex<()>>>>,
    last_received: Mutex<HashMap<Arc<str>, Instant>>,
    failed: AtomicBool,
    denied: Mutex<Denials>,
    /// Stops following the store when the last handle is dropped.
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
    /// When the store fails, or contains a record that this version cannot read.
    pub async fn open(
        store: Arc<dyn Store>,
        lease_time: Duration,
        clock: Clock,
        shutdown: &Shutdown,
    ) -> Result<Self, ChangeError> {
        let epoch = read_or_make_epoch(&*store).await?;
        let everything = Prefix::new::<&str>(&[]).map_err(|e| ChangeError::Invalid(e.to_string()))?;
        let mut listing = store.list(&everything).await?;
        if listing.entries.iter().all(|entry| entry.modified < listing.revision) {
            // Something was deleted, or another program uses the same etcd. With an entry that is newer than that, this replica
            // has the same revision as those that have seen each change, and members that change between them never go back.
            store.commit(Transaction::default().put(key(&["meta", "opened"])?, epoch.to_string())).await?;
            listing = store.list(&everything).await?;
        }
        let snapshot = Snapshot::from_listing(&listing).map_err(ChangeError::Invalid)?;
        let view = watch::Sender::new(Arc::new(snapshot));
        let stop = CancellationToken::new();
        let following = (store.clone(), view.clone(), Arc::new(AtomicU64::new(listing.revision)), stop.clone());
        // Ends with the last handle: requests that are served during shutdown need the view.
        tokio::spawn(shutdown.supervised("view of the store", move || {
            let (store, view, after, stop) = following.clone();
            follow(store, view, after, stop)
        }));
        let (marked, seen, until) = (store.clone(), view.clone(), stop.clone());
        let this = Self {
            shared: Arc::new(Shared {
                store,
                epoch,
                lease_time,
                clock,
                view,
                changing: tokio::sync::Mutex::default(),
                availability: Availability::default(),
                renewing: Mutex::default(),
                last_received: Mutex::default(),
                failed: AtomicBool::new(false),
                denied: Mutex::default(),
                _following: stop.drop_guard(),
            }),
        };
        this.renew_after_outage().await?;
        tokio::spawn(shutdown.supervised("marks of silent clusters", move || {
            Self::mark_silent(marked.clone(), seen.subscribe(), until.clone())
        }));
        Ok(this)
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

    /// Whether a write has failed. The store then refuses further writes, and a restart reads its state again.
    pub fn failed(&self) -> bool {
        self.shared.failed.load(Ordering::Acquire)
    }

    fn checked<T>(&self, outcome: Result<T, StoreError>) -> Result<T, ChangeError> {
        if matches!(outcome, Err(StoreError::Closed | StoreError::Io(_))) {
            self.shared.failed.store(true, Ordering::Release);
        }
        self.shared.availability.note(outcome.as_ref().err());
        Ok(outcome?)
    }

    /// For how long the store has not answered, if it does not. Changes are refused meanwhile, and all else goes on from the view.
    pub fn unavailable_for(&self) -> Option<Duration> {
        self.shared.availability.unavailable_for()
    }

    /// Checks whether the store answers. Each call may take as long as an operation of the store.
    pub async fn probe(&self) {
        // Its error is noted, and belongs to no caller.
        let _ = self.checked(self.shared.store.revision().await);
    }

    /// The newest view.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.view.borrow().clone()
    }

    /// Sees each new view; a slow reader sees the newest only.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.shared.view.subscribe()
    }

    /// Identifies the numbering of the store: revisions of different epochs are not comparable.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    /// For how long a cluster may be silent: a setting of the ClusterSet, or else of this process.
    pub fn lease_time(&self) -> Duration {
        let set = self.shared.view.borrow().settings.as_ref().and_then(|it| it.lease_seconds);
        set.map_or(self.shared.lease_time, Duration::from_secs)
    }

    pub fn now(&self) -> SystemTime {
        (self.shared.clock.0)()
    }

    /// Seconds since 1970.
    pub fn now_seconds(&self) -> u64 {
        seconds(self.now())
    }

    /// Whether the owner of this certificate is registered with its key and not revoked. TLS verifies the certificate itself
    /// (chain, validity).
    pub fn admits(&self, certificate: &Certificate) -> bool {
        self.snapshot().admits(certificate)
    }

    /// Makes one change. `decide` is called with the newest view, possibly more than once, and returns the transaction and the
    /// response. The audit record is added to the transaction.
    ///
    /// # Errors
    /// What `decide` returns (a denial is audited too), or the store's failure.
    pub async fn change<T>(
        &self,
        action: &AuditAction,
        mut decide: impl FnMut(&Snapshot) -> Result<(Transaction, T), ChangeError>,
    ) -> Result<(Revision, T), ChangeError> {
        let mut outcomes =
            self.change_many(std::slice::from_ref(action), |action| action, |_, snapshot| decide(snapshot)).await?;
        outcomes.pop().unwrap_or(Err(ChangeError::Busy))
    }

    /// Makes changes in order, as many from the first on as fit into one transaction, and returns their results. Each is decided
    /// as by [`Self::change`], on a view that includes the earlier ones, and has its own audit record. A refused change does not
    /// affect the others.
    ///
    /// # Errors
    /// When the store fails: then none of them was made.
    pub async fn change_many<I, T>(
        &self,
        items: &[I],
        action: impl Fn(&I) -> &AuditAction,
        mut decide: impl FnMut(&I, &Snapshot) -> Result<(Transaction, T), ChangeError>,
    ) -> Result<Vec<Result<(Revision, T), ChangeError>>, ChangeError> {
        let _turn = self.shared.changing.lock().await;
        // Those that waited for their turn would wait for the store one after the other.
        self.shared.availability.check()?;
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
                let action = action(item);
                let outcome = match decide(item, &view) {
                    Ok((transaction, answer)) if transaction.changes.is_empty() => Ok((false, answer)),
                    Ok((transaction, answer)) => {
                        if !commit.fits(&transaction) && !outcomes.is_empty() {
                            break;
                        }
                        let (outcome, detail) = match action.proposed.as_deref() {
                            Some((outcome, detail)) => (outcome.clone(), Some(detail.clone())),
                            None => ("done".to_owned(), detail(&view, &transaction)),
                        };
                        if index + 1 < items.len() {
                            Arc::make_mut(&mut view).preview(&transaction);
                        }
                        commit.add(transaction);
                        commit.audit(action, outcome, detail.as_ref())?;
                        Ok((true, answer))
                    }
                    Err(error @ ChangeError::Denied(_)) => {
                        if !commit.fits(&Transaction::default()) && !outcomes.is_empty() {
                            break;
                        }
                        let is_new = *news.entry(index).or_insert_with(|| {
                            warn!(who = action.who, action = action.action, object = action.object, %error, "denied");
                            self.shared.denied.lock().unwrap_or_else(PoisonError::into_inner).is_new(action, now)
                        });
                        if is_new {
                            commit.audit(action, error.to_string(), None)?;
                        }
                        Err(error)
                    }
                    Err(error) => Err(error),
                };
                outcomes.push(outcome);
            }
            let made = match commit.transaction() {
                None => Outcome::Committed(snapshot.revision),
                Some(transaction) => self.checked(self.shared.store.commit(transaction).await)?,
            };
            if let Outcome::Committed(revision) = made {
                self.shown(revision).await?;
                for (item, outcome) in items.iter().zip(&outcomes) {
                    let AuditAction { who, action, object, .. } = action(item);
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

    /// The newest `limit` audit records, newest first; only of `object`, where that is not empty. A record
    /// of `token/ID for cluster/NAME` is of both.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn audit(&self, limit: usize, object: &str) -> Result<Vec<(u64, AuditRecord, AuditDetail)>, ChangeError> {
        let records = self.checked(self.shared.store.list(&Prefix::new(&["audit"]).map_err(invalid)?).await)?;
        let mut found = Vec::new();
        for entry in records.entries.iter().rev() {
            if found.len() >= limit {
                break;
            }
            if let Ok(number) = entry.key.name().parse()
                && let Ok(record) = records::decode::<AuditRecord>(&entry.value)
                && (object.is_empty() || record.object == object || record.object.split(" for ").any(|it| it == object))
            {
                found.push((number, record, AuditDetail::default()));
            }
        }
        let mut bytes = 0;
        for (number, record, detail) in &mut found {
            if record.detailed
                && bytes < MAX_DETAILS_BYTES
                && let Some(entry) = self.checked(self.shared.store.read(&detail_key(*number)?).await)?
            {
                bytes += entry.value.len();
                *detail = records::decode(&entry.value).unwrap_or_default();
            }
        }
        Ok(found)
    }

    /// Waits until the view shows `revision`, which was committed.
    async fn shown(&self, revision: Revision) -> Result<(), ChangeError> {
        let mut view = self.subscribe();
        let shown = view.wait_for(|snapshot| snapshot.revision >= revision);
        match tokio::time::timeout(SHOWN_WITHIN, shown).await {
            Ok(shown) => drop(shown.map_err(|_| StoreError::Closed)?),
            Err(_) => {
                let text = format!("the change was made at revision {revision}, and cannot be read back yet");
                return Err(StoreError::Unavailable(text).into());
            }
        }
        Ok(())
    }
}

/// Applies the store's events to the view. Where the store has compacted them, it lists again. `after`: the revision up to which
/// everything was read, which is also that of changes outside of this store.
async fn follow(
    store: Arc<dyn Store>,
    view: watch::Sender<Arc<Snapshot>>,
    after: Arc<AtomicU64>,
    stop: CancellationToken,
) {
    let Ok(everything) = Prefix::new::<&str>(&[]) else { return };
    let mut backoff = Backoff::default();
    loop {
        let from = after.load(Ordering::Acquire);
        let mut events = match store.watch(everything.clone(), from).await {
            Ok(events) => events,
            Err(StoreError::Compacted { .. }) => {
                match store.list(&everything).await.map(|listing| (listing.revision, Snapshot::from_listing(&listing)))
                {
                    Ok((read, Ok(mut snapshot))) => {
                        // The newest change may have been a deletion.
                        snapshot.revision = snapshot.revision.max(view.borrow().revision);
                        view.send_replace(Arc::new(snapshot));
                        after.store(read, Ordering::Release);
                    }
                    Ok((_, Err(error))) => error!(%error, "store entry cannot be read"),
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
                    error!(%error, key = %event.key, "store entry cannot be read");
                }
            }
            view.send_replace(Arc::new(snapshot));
            after.store(events.revision(), Ordering::Release);
        }
        after.fetch_max(events.revision(), Ordering::AcqRel);
    }
}

/// Seconds in the upper half make a later store's epoch the greater one, where epochs are compared at all.
pub(crate) fn new_epoch() -> Result<u64, ChangeError> {
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

/// Begins a new epoch in a store that was restored from a backup. Members may have newer state of the hub than the backup; the
/// new epoch invalidates it.
///
/// # Errors
/// When the store fails.
pub async fn begin_epoch(store: &dyn Store) -> Result<u64, ChangeError> {
    let epoch = new_epoch()?;
    store.commit(Transaction::default().put(key(&["meta", "epoch"])?, epoch.to_string())).await?;
    Ok(epoch)
}

/// A key from names that have been checked already.
pub(crate) fn key(segments: &[&str]) -> Result<Key, ChangeError> {
    Key::new(segments).map_err(invalid)
}

fn invalid(error: KeyError) -> ChangeError {
    ChangeError::Invalid(error.to_string())
}

fn audit_key(number: u64) -> Result<Key, ChangeError> {
    key(&["audit", &format!("{number:020}")])
}

fn detail_key(number: u64) -> Result<Key, ChangeError> {
    key(&["audit-detail", &format!("{number:020}")])
}

/// The manifests before and after a change of an object.
fn detail(view: &Snapshot, transaction: &Transaction) -> Option<AuditDetail> {
    transaction.changes.iter().find_map(|change| {
        let ["object", kind, name] = change.key().segments().collect::<Vec<_>>()[..] else { return None };
        let id = ObjectId { kind: Kind::from_name(kind)?, name: name.into() };
        let before = view.objects.get(&id).map(|object| &object.manifest[..]);
        let after = if let Change::Put { value, .. } = change { Some(&value[..]) } else { None };
        Some(AuditDetail::of(before, after))
    })
}

pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl AuditAction {
    pub fn new(who: &Identity, action: &'static str, object: impl Into<String>) -> Self {
        Self { who: who.to_string(), action, object: object.into(), proposed: None }
    }
}
