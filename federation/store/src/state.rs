//! The durable state, and how one transaction changes it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::key::Key;
use crate::model::{Entry, LeaseId, Revision};

/// The durable state.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) revision: Revision,
    pub(crate) last_lease: u64,
    pub(crate) entries: BTreeMap<Key, Entry>,
    pub(crate) leases: BTreeMap<LeaseId, Duration>,
}

/// The writes of one transaction.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) revision: Revision,
    pub(crate) last_lease: u64,
    /// The new entry of a key, or its deletion.
    pub(crate) entries: BTreeMap<Key, Option<Entry>>,
    pub(crate) leases: BTreeMap<LeaseId, Option<Duration>>,
}
