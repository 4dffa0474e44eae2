//! Revisions, compare-and-swap, prefix watch and leases over an embedded file or memory.
//!
//! What it promises: a transaction that was answered is on disk and survives `kill -9` and power loss; transactions are
//! applied one after the other and each has a revision; a watch misses nothing and repeats nothing, or says that it
//! cannot; a lease that nobody renews for its time to live takes its keys with it.
//!
//! The trait is shaped so that etcd v3 fits behind it: one revision per transaction, comparisons on a key's modification
//! revision, watches from a revision with an error below the compaction floor, leases renewed by id. It does not
//! interpret values, and it is not for data that changes many times a second: endpoints never come here.

mod engine;
mod file;
mod key;
mod watch;

use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;

pub use engine::Engine;
pub use key::{Key, KeyError, Prefix};
pub use watch::{Changes, Watch};

/// Largest value, in bytes: etcd's default request limit is 1.5 MiB, which a transaction of one value stays below.
pub const MAX_VALUE_BYTES: usize = 1 << 20;
/// Most operations and comparisons in a transaction, each: etcd's default.
pub const MAX_TRANSACTION_PARTS: usize = 128;
/// Most bytes of keys and values in a transaction.
pub const MAX_TRANSACTION_BYTES: usize = (1 << 20) + (256 << 10);

/// The number of a transaction that changed something; the first is 1. Never reused.
pub type Revision = u64;

/// A lease. Never reused while its keys live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// A key's value and history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: Key,
    pub value: Bytes,
    /// The transaction that made the key, since it was last absent.
    pub created: Revision,
    /// The transaction that wrote this value.
    pub modified: Revision,
    pub lease: Option<LeaseId>,
}

/// All entries below a prefix as of one revision, in the order of their keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    pub revision: Revision,
    pub entries: Vec<Entry>,
}

/// What must hold for a transaction to be applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(Key),
    /// The key exists.
    Present(Key),
    /// The key was last written by this transaction.
    Modified(Key, Revision),
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Put {
        key: Key,
        value: Bytes,
        lease: Option<LeaseId>,
    },
    /// Deleting what is absent changes nothing.
    Delete(Key),
}

impl Change {
    pub fn key(&self) -> &Key {
        match self {
            Self::Put { key, .. } | Self::Delete(key) => key,
        }
    }

    /// What it counts towards [`MAX_TRANSACTION_BYTES`].
    pub fn size(&self) -> usize {
        let value = if let Self::Put { value, .. } = self { value.len() } else { 0 };
        self.key().as_bytes().len() + value
    }
}

/// Changes that happen together, if every comparison holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    pub compares: Vec<Compare>,
    pub changes: Vec<Change>,
}

impl Transaction {
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    #[must_use]
    pub fn put(mut self, key: Key, value: impl Into<Bytes>) -> Self {
        self.changes.push(Change::Put { key, value: value.into(), lease: None });
        self
    }

    #[must_use]
    pub fn put_with_lease(mut self, key: Key, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        self.changes.push(Change::Put { key, value: value.into(), lease: Some(lease) });
        self
    }

    #[must_use]
    pub fn delete(mut self, key: Key) -> Self {
        self.changes.push(Change::Delete(key));
        self
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Applied and durable. The revision is unchanged where nothing changed.
    Committed(Revision),
    /// A comparison did not hold; nothing changed.
    Conflict,
}

/// One key's change, as a watch sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub revision: Revision,
    pub key: Key,
    /// Absent when the key was deleted, or its lease ended.
    pub entry: Option<Entry>,
}

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{0}")]
    Limit(&'static str),
    #[error("lease {0} does not exist")]
    NoLease(LeaseId),
    #[error("the changes since revision {asked} are no longer held: list again (held since {floor})")]
    Compacted { asked: Revision, floor: Revision },
    #[error("the store's file is in use by another process")]
    Open(#[source] redb::DatabaseError),
    #[error("the store's file cannot be read or written")]
    File(#[source] redb::Error),
    #[error("the store's file is not a store: {0}")]
    Foreign(&'static str),
    #[error("the store's file is damaged: {0}")]
    Damaged(String),
    #[error("the store's file holds what this version cannot read: {0}")]
    Format(&'static str),
    #[error("the store is closed after a failed write")]
    Closed,
}

/// The future of a store operation.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// A store. Every method is safe to call concurrently; one that writes answers when its change is durable.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// The newest revision.
    fn revision(&self) -> StoreFuture<'_, Revision>;

    /// One key.
    fn read<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Entry>>;

    /// All keys below `prefix`.
    fn list<'a>(&'a self, prefix: &'a Prefix) -> StoreFuture<'a, Listing>;

    /// Applies `transaction` if its comparisons hold. A future that is dropped may still have committed.
    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, Outcome>;

    /// Every change below `prefix` after revision `after`, in order, as they happen.
    /// Fails when those changes are no longer held; the caller then lists again, and watches from there.
    fn watch(&self, prefix: Prefix, after: Revision) -> StoreFuture<'_, Watch>;

    /// A new lease. It ends when not renewed for `time_to_live`, measured by the store's own monotonic clock; a store that restarts
    /// gives every lease its whole time again.
    fn grant_lease(&self, time_to_live: Duration) -> StoreFuture<'_, LeaseId>;

    /// Gives `lease` its whole time again.
    fn renew_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()>;

    /// Ends `lease` now: its keys are deleted in one transaction.
    fn end_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()>;
}

/// Makes a store in a new file at `path` (mode 0600). Must be called within a tokio runtime.
///
/// # Errors
/// When there is a file already, or it cannot be made.
pub fn create_file(path: &Path) -> Result<Engine, StoreError> {
    let (disk, state) = file::File::create(path)?;
    Ok(Engine::start(Some(disk), state))
}

/// Opens the store in the file at `path`. All of the file is read and verified. Must be called within a tokio runtime.
///
/// # Errors
/// When there is no such file, or it is in use by another process, is empty, damaged or another program's, or holds another format.
pub fn open_file(path: &Path) -> Result<Engine, StoreError> {
    let (disk, state) = file::File::open(path)?;
    Ok(Engine::start(Some(disk), state))
}

/// A store that is gone with the process. Must be called within a tokio runtime.
pub fn in_memory() -> Engine {
    Engine::start(None, engine::State::default())
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
