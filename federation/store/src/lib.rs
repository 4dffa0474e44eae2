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
mod error;
mod file;
mod key;
mod model;
mod state;
mod store;
mod url;
mod watch;

use std::sync::Arc;

use engine::Engine;

pub use error::{StoreError, StoreFuture};
pub use key::{Key, KeyError, Prefix};
pub use model::{
    Change, Compare, Entry, Event, LeaseId, Listing, MAX_TRANSACTION_BYTES, MAX_TRANSACTION_PARTS, MAX_VALUE_BYTES,
    Outcome, Revision, Transaction,
};
pub use store::Store;
pub use url::{StoreUrl, StoreUrlError};
pub use watch::{Changes, Watch};

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
    Arc::new(Engine::start(None, state::State::default()))
}
