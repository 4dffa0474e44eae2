//! Revisions, compare-and-swap, prefix watch and leases over an embedded file or memory.
//!
//! Guarantees: a committed transaction is on disk and survives `kill -9` and power loss. Transactions are applied one after
//! the other, each with a revision of its own. A watch delivers every change once, or returns an error. The keys of a lease
//! are deleted when it is not renewed within its time to live.
//!
//! [`Store`] is the only interface, and [`open`] finds the implementation by URL; errors name no library. etcd v3 fits behind
//! it: one revision per transaction, comparisons on a key's modification revision, watches from a revision with an error
//! below the compaction floor, leases renewed by id. The store does not interpret values. It is not for data that changes
//! many times a second: endpoints are never stored.

mod engine;
mod file;
mod key;
mod url;
mod watch;

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use engine::Engine;

pub use key::{Key, KeyError, Prefix};
pub use url::{StoreUrl, StoreUrlError};
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

/// A condition of a transaction.
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

/// Changes that are applied together, if every condition is true.
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

/// The result of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Applied and durable. The revision is unchanged where nothing changed.
    Committed(Revision),
    /// A condition was false; nothing changed.
    Conflict,
}

/// A change of one key.
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
    #[error("the changes since revision {after} are no longer available, only those since {floor}: list again")]
    Compacted { after: Revision, floor: Revision },
    /// There is nothing at the URL.
    #[error("the store does not exist")]
    Absent,
    /// [`create`] found something at the URL.
    #[error("the store exists already")]
    Exists,
    #[error("the store is in use by another process")]
    InUse,
    #[error("the store cannot be read or written")]
    Io(#[source] io::Error),
    /// What is at the URL was not made by [`create`].
    #[error("this is not a store of Hanse: {0}")]
    Foreign(&'static str),
    #[error("the store is damaged: {0}")]
    Damaged(String),
    #[error("this version cannot read the store: {0}")]
    Format(&'static str),
    #[error("the store is closed after a failed write")]
    Closed,
}

/// The future of a store operation.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// A store. Every method is safe to call concurrently; one that writes returns when its change is durable.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// The newest revision.
    fn revision(&self) -> StoreFuture<'_, Revision>;

    /// One key.
    fn read<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Entry>>;

    /// All keys below `prefix`.
    fn list<'a>(&'a self, prefix: &'a Prefix) -> StoreFuture<'a, Listing>;

    /// Applies `transaction` if its conditions are true. A transaction whose future is dropped may still commit.
    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, Outcome>;

    /// Every change below `prefix` after revision `after`, in order.
    /// Fails with `Compacted` when those changes are no longer available; the caller then lists again and watches from there.
    fn watch(&self, prefix: Prefix, after: Revision) -> StoreFuture<'_, Watch>;

    /// A new lease. It ends when it is not renewed for `time_to_live`, by the monotonic clock of the store. A restart of the
    /// store renews every lease.
    fn grant_lease(&self, time_to_live: Duration) -> StoreFuture<'_, LeaseId>;

    /// Renews `lease` for its whole time to live.
    fn renew_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()>;

    /// Ends `lease` now: its keys are deleted in one transaction.
    fn end_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()>;
}

/// Makes an empty store at `url`; a file is readable by its owner only. Must be called within a tokio runtime.
///
/// # Errors
/// `Exists` when there is something at `url`, `Io` when the store cannot be made.
pub fn create(url: &StoreUrl) -> Result<Arc<dyn Store>, StoreError> {
    match url {
        StoreUrl::File(path) => {
            let (file, state) = file::File::create(path)?;
            Ok(Arc::new(Engine::start(Some(file), state)))
        }
    }
}

/// Opens the store at `url`. A file is read and verified as a whole. Must be called within a tokio runtime.
///
/// # Errors
/// `Absent` when there is nothing at `url`; `InUse`, `Foreign`, `Damaged`, `Format` and `Io` as they say.
pub fn open(url: &StoreUrl) -> Result<Arc<dyn Store>, StoreError> {
    match url {
        StoreUrl::File(path) => {
            let (file, state) = file::File::open(path)?;
            Ok(Arc::new(Engine::start(Some(file), state)))
        }
    }
}

/// A store that ends with the process. Must be called within a tokio runtime.
pub fn in_memory() -> Arc<dyn Store> {
    Arc::new(Engine::start(None, engine::State::default()))
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
