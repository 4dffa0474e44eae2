//! What a store contains, and how it changes.

use std::fmt;

use bytes::Bytes;

use crate::key::Key;

/// Largest value, in bytes: etcd's default request limit is 1.5 MiB, which a transaction of one value stays below.
pub const MAX_VALUE_BYTES: usize = 1 << 20;
/// Most changes and comparisons in a transaction, each: etcd permits 128 by default, of which its store needs one itself.
pub const MAX_TRANSACTION_PARTS: usize = 127;
/// Most bytes of keys and values in a transaction. With the keys of 127 comparisons (1 KiB each), the prefix of 254 keys (129
/// bytes each) and some 64 bytes around each part this is below 1.5 MiB, etcd's default.
pub const MAX_TRANSACTION_BYTES: usize = (1 << 20) + (256 << 10);

/// The number of a transaction that changed something. It increases and is never reused; on etcd, transactions of other
/// programs use numbers too.
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
    /// Applied and durable. Where nothing changed, this is a revision that includes all earlier changes.
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

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
