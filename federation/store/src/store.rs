//! The interface of every store.

use std::fmt;
use std::time::Duration;

use crate::error::StoreFuture;
use crate::key::{Key, Prefix};
use crate::model::{Entry, LeaseId, Listing, Outcome, Revision, Transaction};
use crate::watch::Watch;

/// A store. Every method is safe to call concurrently; one that writes returns when its change is durable.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// The newest revision. It may belong to a transaction that changed nothing in this store.
    fn revision(&self) -> StoreFuture<'_, Revision>;

    /// One key.
    fn read<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Entry>>;

    /// All keys below `prefix`.
    fn list<'a>(&'a self, prefix: &'a Prefix) -> StoreFuture<'a, Listing>;

    /// Applies `transaction` if its conditions are true. A transaction whose future is dropped may still commit, and one that
    /// failed with `Unavailable` may have committed.
    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, Outcome>;

    /// Every change below `prefix` after revision `after`, in order.
    /// Fails with `Compacted` when those changes are no longer available; the caller then lists again and watches from there.
    fn watch(&self, prefix: Prefix, after: Revision) -> StoreFuture<'_, Watch>;

    /// A new lease. It ends when it is not renewed for `time_to_live`, by the monotonic clock of the store. A restart of the
    /// store renews every lease. It does not end earlier; on etcd it ends up to a sixth later, or two seconds.
    fn grant_lease(&self, time_to_live: Duration) -> StoreFuture<'_, LeaseId>;

    /// Renews `lease` for its whole time to live.
    fn renew_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()>;

    /// The time to live that `lease` was granted with.
    fn time_to_live(&self, lease: LeaseId) -> StoreFuture<'_, Duration>;

    /// Ends `lease` now: its keys are deleted in one transaction.
    fn end_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()>;
}
