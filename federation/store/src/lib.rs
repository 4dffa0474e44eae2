//! Revisions, compare-and-swap, prefix watch and leases over an embedded file, memory or etcd.
//!
//! Guarantees: a committed transaction is on disk and survives `kill -9` and power loss. Transactions are applied one after
//! the other, each with a revision of its own. A watch delivers every change once, or returns an error. The keys of a lease
//! are deleted when it is not renewed within its time to live.
//!
//! [`Store`] is the only interface, and [`open`] finds the implementation by URL; errors name no library. The store does not
//! interpret values. It is not for data that changes many times a second: endpoints are never stored.
//!
//! The store on etcd needs the feature `etcd` of this crate; without it, its URLs are read, and cannot be opened.

mod engine;
mod error;
#[cfg(feature = "etcd")]
mod etcd;
mod file;
mod key;
mod limits;
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
pub use url::{EtcdUrl, StoreUrl, StoreUrlError};
pub use watch::{Changes, Watch};

/// Makes an empty store at `url`; a file is readable by its owner only. Must be called within a tokio runtime.
///
/// # Errors
/// `Exists` when there is something at `url`, `Io` when the store cannot be made; on etcd, as [`open`].
pub async fn create(url: &StoreUrl) -> Result<Arc<dyn Store>, StoreError> {
    match url {
        StoreUrl::File(path) => {
            let (file, state) = file::File::create(path)?;
            Ok(Arc::new(Engine::start(Some(file), state)))
        }
        #[cfg(feature = "etcd")]
        StoreUrl::Etcd(url) => Ok(Arc::new(etcd::Etcd::create(url).await?)),
        #[cfg(not(feature = "etcd"))]
        StoreUrl::Etcd(_) => Err(StoreError::Unsupported),
    }
}

/// Opens the store at `url`. A file is read and verified as a whole. Must be called within a tokio runtime.
///
/// # Errors
/// `Absent` when there is nothing at `url`; `InUse`, `Foreign`, `Damaged`, `Format`, `Io`, `Unavailable`, `Denied`, `Settings` and
/// `Unsupported` as they say.
pub async fn open(url: &StoreUrl) -> Result<Arc<dyn Store>, StoreError> {
    match url {
        StoreUrl::File(path) => {
            let (file, state) = file::File::open(path)?;
            Ok(Arc::new(Engine::start(Some(file), state)))
        }
        #[cfg(feature = "etcd")]
        StoreUrl::Etcd(url) => Ok(Arc::new(etcd::Etcd::open(url).await?)),
        #[cfg(not(feature = "etcd"))]
        StoreUrl::Etcd(_) => Err(StoreError::Unsupported),
    }
}

/// A store that ends with the process. Must be called within a tokio runtime.
pub fn in_memory() -> Arc<dyn Store> {
    Arc::new(Engine::start(None, state::State::default()))
}
