//! What a cluster publishes at once, staged until it is complete, and how much of it is kept.

use std::collections::BTreeMap;

use crate::exchange::model::Grant;

/// Objects kept beside the granted endpoints and label sets: namespaces, accounts and what is refused.
pub const MAX_OTHERS: usize = 65_536;
/// Bytes kept of an origin: for each granted endpoint and label set this many on the average (usual ones have below 300) ...
pub const BYTES_PER_OBJECT: usize = 1 << 10;
/// ... and for everything else.
const OTHER_BYTES: usize = 16 << 20;

/// Why a batch changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("epoch {0} is older than the one held")]
    OldEpoch(u64),
    #[error("a delta, and nothing is held that it could change")]
    NothingHeld,
    #[error("revision {0} is not past the one held")]
    OldRevision(u64),
}

/// A batch as it was staged: the newest bytes of each id, none for a removal.
#[derive(Debug, Default)]
pub struct Batch {
    pub snapshot: bool,
    pub updates: BTreeMap<u64, Option<Box<[u8]>>>,
    /// Of the updates.
    pub bytes: usize,
    /// Updates that have no readable id, or are beyond what is staged of one batch.
    pub unreadable: usize,
}

impl Batch {
    /// Takes an update of a readable id; one beyond the limits is only counted.
    pub fn put(&mut self, id: u64, update: Option<&[u8]>, limits: StagedLimits) {
        let len = update.map_or(0, <[u8]>::len);
        if self.updates.len() >= limits.objects && !self.updates.contains_key(&id) || self.bytes + len > limits.bytes {
            self.unreadable += 1;
            return;
        }
        self.bytes += len;
        if let Some(old) = self.updates.insert(id, update.map(Box::from)).flatten() {
            self.bytes -= old.len();
        }
    }
}

/// How much of one batch is staged: twice what may be kept, so that what exceeds the grant is refused by name for long.
#[derive(Debug, Clone, Copy)]
pub struct StagedLimits {
    pub objects: usize,
    pub bytes: usize,
}

impl StagedLimits {
    pub fn of(grant: &dyn Grant) -> Self {
        let granted = grant.max_endpoints().saturating_add(grant.max_label_sets());
        Self {
            objects: granted.saturating_add(MAX_OTHERS).saturating_mul(2),
            bytes: kept_bytes(grant).saturating_mul(2),
        }
    }
}

/// Most bytes that are kept of an origin.
pub fn kept_bytes(grant: &dyn Grant) -> usize {
    let granted = grant.max_endpoints().saturating_add(grant.max_label_sets());
    granted.saturating_mul(BYTES_PER_OBJECT).saturating_add(OTHER_BYTES)
}
