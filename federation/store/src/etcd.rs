//! The store on etcd v3, for any number of processes.
//!
//! Reads and transactions are linearizable: they need a majority of etcd's nodes, and fail with `Unavailable` without one, within
//! the URL's timeout. Watches wait for it, and continue where they were. A revision is etcd's own, so that those of the
//! transactions of one store have gaps.
//!
//! A marker, the key `store`, distinguishes an empty store from a missing one. [`keys`] lists what else is in etcd.

mod changes;
mod commits;
mod connection;
mod failure;
mod keys;
mod leases;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare as Condition, CompareOp, GetOptions, KeyValue, Txn, TxnOp};

use self::changes::Following;
use self::commits::Commits;
use self::connection::{CallError, Connection};
use self::failure::Failure;
use self::keys::{Root, revision};
use self::leases::Leases;
use crate::error::{StoreError, StoreFuture};
use crate::key::{Key, Prefix};
use crate::limits::check;
use crate::model::{Entry, LeaseId, Listing, Outcome, Revision, Transaction};
use crate::store::Store;
use crate::url::EtcdUrl;
use crate::watch::Watch;

/// The value of the marker: the format of the keys.
const FORMAT: &[u8] = b"hanse-store 1";
const MARKER: &str = "store";
/// Entries in one response of a listing. It adapts to the size of values, to stay below the limit.
const PAGE: i64 = 512;
/// The smallest page. Its entries have at most 1 MiB each, below the limit of a response.
const MIN_PAGE: i64 = 8;
const MAX_RESPONSE_BYTES: usize = 16 << 20;
/// Listings that are begun again, because etcd was compacted between two pages.
const MAX_LISTINGS: usize = 5;

#[derive(Debug, Clone)]
pub(crate) struct Etcd {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    connection: Arc<Connection>,
    root: Root,
    commits: Commits,
    leases: Leases,
}

impl Etcd {
    fn new(url: &EtcdUrl) -> Self {
        // Random keys of the standard library: a name, not a secret.
        let random = || RandomState::new().hash_one(std::process::id());
        let (root, session) = (Root::new(&url.prefix), format!("{:016x}{:016x}", random(), random()));
        let connection = Arc::new(Connection::new(url.clone(), usize::try_from(random() >> 33).unwrap_or_default()));
        let commits = Commits::new(&root, session);
        Self { shared: Arc::new(Shared { connection, root, commits, leases: Leases::default() }) }
    }

    /// Makes an empty store where no key begins with the prefix.
    pub(crate) async fn create(url: &EtcdUrl) -> Result<Self, StoreError> {
        let this = Self::new(url);
        let (root, marker) = (&this.shared.root, this.shared.root.own(MARKER));
        let (first, end) = root.everything();
        // Names this attempt, so that a repetition finds its own marker.
        let value = [FORMAT, b" ", RandomState::new().hash_one(0).to_string().as_bytes()].concat();
        let make = Txn::new()
            .when([Condition::create_revision(first, CompareOp::Equal, 0).with_range(end)])
            .and_then([TxnOp::put(marker, value.clone(), None)]);
        let made = this
            .shared
            .connection
            .call(|client| {
                let make = make.clone();
                async move { client.kv_client().txn(make).await }
            })
            .await?;
        if made.succeeded() || this.marker().await?.0.is_some_and(|found| found.value() == value) {
            return Ok(this);
        }
        Err(StoreError::Exists)
    }

    pub(crate) async fn open(url: &EtcdUrl) -> Result<Self, StoreError> {
        let this = Self::new(url);
        if let Some(marker) = this.marker().await?.0 {
            return this.checked(&marker);
        }
        let (first, end) = this.shared.root.everything();
        let one = GetOptions::new().with_range(end).with_limit(1).with_keys_only();
        if this.get(first, one).await?.0.is_empty() {
            return Err(StoreError::Absent);
        }
        // Another process may have created the store in between.
        match this.marker().await?.0 {
            Some(marker) => this.checked(&marker),
            None => Err(StoreError::Foreign("keys of other programs begin with its prefix")),
        }
    }

    fn checked(self, marker: &KeyValue) -> Result<Self, StoreError> {
        match marker.value().starts_with(FORMAT) {
            true => Ok(self),
            false => Err(StoreError::Format("its format is not 1")),
        }
    }

    /// The marker, and the newest revision.
    async fn marker(&self) -> Result<(Option<KeyValue>, Revision), StoreError> {
        let (mut found, at) = self.get(self.shared.root.own(MARKER), GetOptions::new()).await?;
        Ok((found.pop(), at))
    }

    async fn get(&self, key: Vec<u8>, options: GetOptions) -> Result<(Vec<KeyValue>, Revision), CallError> {
        let call = self.shared.connection.call(|client| {
            let (key, options) = (key.clone(), options.clone());
            async move {
                client.kv_client().max_decoding_message_size(MAX_RESPONSE_BYTES).get(key, Some(options)).await
            }
        });
        let mut answer = call.await?;
        let at = answer.header().map_or(0, |it| revision(it.revision()));
        Ok((answer.take_kvs(), at))
    }

    /// Lists page by page, all as of the revision of the first.
    async fn listing(&self, prefix: &Prefix) -> Result<Listing, CallError> {
        let (mut first, end) = self.shared.root.below(prefix);
        let (mut page, mut at) = (PAGE, 0);
        let mut entries = Vec::new();
        loop {
            let options = GetOptions::new().with_range(&*end).with_limit(page).with_revision(keys::number(at));
            let (found, newest) = match self.get(first.clone(), options).await {
                Err(CallError::Failure(Failure::Large)) if page > MIN_PAGE => {
                    page = (page / 4).max(MIN_PAGE);
                    continue;
                }
                answer => answer?,
            };
            if at == 0 {
                at = newest;
            }
            entries.extend(found.iter().filter_map(|it| self.shared.root.entry(it)));
            match found.last() {
                Some(last) if i64::try_from(found.len()).is_ok_and(|count| count >= page) => {
                    // The smallest key after it.
                    first = [last.key(), b"\0"].concat();
                }
                _ => return Ok(Listing { revision: at, entries }),
            }
        }
    }
}

impl Store for Etcd {
    fn revision(&self) -> StoreFuture<'_, Revision> {
        Box::pin(async { Ok(self.marker().await?.1) })
    }

    fn read<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(async move {
            let (found, _) = self.get(self.shared.root.key(key), GetOptions::new()).await?;
            Ok(found.first().and_then(|it| self.shared.root.entry(it)))
        })
    }

    fn list<'a>(&'a self, prefix: &'a Prefix) -> StoreFuture<'a, Listing> {
        Box::pin(async move {
            for _ in 1..MAX_LISTINGS {
                match self.listing(prefix).await {
                    Err(CallError::Failure(Failure::Compacted)) => {}
                    listing => return Ok(listing?),
                }
            }
            match self.listing(prefix).await {
                Err(CallError::Failure(Failure::Compacted)) => Err(StoreError::Unavailable(
                    "etcd is compacted more often than the store can be listed: keep more history".to_owned(),
                )),
                listing => Ok(listing?),
            }
        })
    }

    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, Outcome> {
        Box::pin(async move {
            check(&transaction)?;
            let shared = self.shared.clone();
            // To its end, so that its slot is known afterwards.
            let work = tokio::spawn(async move {
                shared.commits.commit(&shared.connection, &shared.root, &shared.leases, &transaction).await
            });
            work.await.map_err(|_| StoreError::Closed)?
        })
    }

    fn watch(&self, prefix: Prefix, after: Revision) -> StoreFuture<'_, Watch> {
        Box::pin(async move {
            let (connection, root) = (self.shared.connection.clone(), self.shared.root.clone());
            let range = root.below(&prefix);
            Ok(Watch::new(Following::start(connection, root, range, after).await?))
        })
    }

    fn grant_lease(&self, time_to_live: Duration) -> StoreFuture<'_, LeaseId> {
        Box::pin(self.shared.leases.grant(&self.shared.connection, time_to_live))
    }

    fn renew_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(self.shared.leases.renew(&self.shared.connection, lease))
    }

    fn time_to_live(&self, lease: LeaseId) -> StoreFuture<'_, Duration> {
        Box::pin(self.shared.leases.time_to_live(&self.shared.connection, lease))
    }

    fn end_lease(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(self.shared.leases.end(&self.shared.connection, lease))
    }
}
