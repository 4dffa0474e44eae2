//! Why an operation failed.

use std::io;
use std::pin::Pin;

use crate::model::{LeaseId, Revision};

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
    /// [`create`](crate::create) found something at the URL.
    #[error("the store exists already")]
    Exists,
    #[error("the store is in use by another process")]
    InUse,
    #[error("the store cannot be read or written")]
    Io(#[source] io::Error),
    /// What is at the URL was not made by [`create`](crate::create).
    #[error("this is not a store of Hanse: {0}")]
    Foreign(&'static str),
    #[error("the store is damaged: {0}")]
    Damaged(String),
    #[error("this version cannot read the store: {0}")]
    Format(&'static str),
    #[error("the store is closed after a failed write")]
    Closed,
    /// The store did not answer in time. A transaction may or may not have been committed.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// The credentials or rights do not suffice.
    #[error("the store denies access: {0}")]
    Denied(String),
    #[error("the store accepts no writes: {0}")]
    Full(String),
    /// A file that the URL names cannot be used.
    #[error("{0}")]
    Settings(String),
    /// The URL needs a feature that this build does not have.
    #[error("this build does not support etcd: build it with the Cargo feature `etcd` (cargo build --features etcd)")]
    Unsupported,
}

/// The future of a store operation.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;
