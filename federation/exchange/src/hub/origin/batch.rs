//! Batches: staged until they are complete, then applied. Limits of what is staged and kept.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::codec::{DecodeError, frame, object};
use crate::model::{Grant, Position};

/// Objects kept beside the granted endpoints and label sets: namespaces, accounts and what is refused.
pub const MAX_OTHERS: usize = 65_536;
/// Bytes kept of an origin: for each granted endpoint and label set this many on the average (usual ones have below 300) ...
pub const BYTES_PER_OBJECT: usize = 1 << 10;
/// ... and for everything else.
const OTHER_BYTES: usize = 16 << 20;

/// Why a batch changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("epoch {0} is older than the present one")]
    OldEpoch(u64),
    #[error("a delta without a snapshot before it")]
    NoSnapshot,
    #[error("revision {0} is older than the present one")]
    OldRevision(u64),
}

/// A batch as it is staged: frames as they were received, which take no more memory than their bytes.
#[derive(Debug, Default)]
pub struct Batch {
    pub snapshot: bool,
    frames: Vec<Bytes>,
    /// Of the frames.
    bytes: usize,
    /// Updates and removals in them.
    updates: usize,
    /// Updates that have no readable id, or exceed what is staged of one batch.
    pub unreadable: usize,
}

/// The newest bytes of each id, none for a removal.
pub type Updates = BTreeMap<u64, Option<Bytes>>;

impl Batch {
    pub fn of(snapshot: bool) -> Self {
        Self { snapshot, ..Self::default() }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes a frame; one beyond the limits is only counted.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn put(&mut self, bytes: &Bytes, limits: StagedLimits) -> Result<(), DecodeError> {
        let read = frame::read(bytes)?;
        let updates = read.upserts.len() + read.removals.len();
        if self.updates + updates > limits.objects || self.bytes + bytes.len() > limits.bytes {
            self.unreadable += updates;
            return Ok(());
        }
        self.updates += updates;
        self.bytes += bytes.len();
        // Copied: a slice may keep the buffer that it was received in.
        self.frames.push(Bytes::copy_from_slice(bytes));
        Ok(())
    }

    /// The batch, to be applied at this position.
    pub fn end(self, position: Position, same_epoch: bool) -> Applying {
        Applying {
            position,
            same_epoch,
            snapshot: self.snapshot,
            unreadable: self.unreadable,
            frames: self.frames.into(),
            updates: Updates::new(),
            scanned: 0,
            found: Vec::new(),
            removals: None,
        }
    }
}

/// A batch that is being applied, part by part: first it is read, then comes what it removes, then what it updates.
#[derive(Debug)]
pub struct Applying {
    pub position: Position,
    pub same_epoch: bool,
    pub snapshot: bool,
    pub unreadable: usize,
    frames: VecDeque<Bytes>,
    /// The updates that were read.
    pub updates: Updates,
    /// Slots below this one were compared with a snapshot.
    pub scanned: u32,
    /// The ids in those slots that the snapshot does not name.
    pub found: Vec<u64>,
    /// Once all of it was read.
    pub removals: Option<Vec<u64>>,
}

impl Applying {
    /// Reads the next frame, and returns its number of updates. `None`: there is no other.
    pub fn read(&mut self) -> Option<usize> {
        // Each was read when it was staged.
        let frame = frame::read(&self.frames.pop_front()?).unwrap_or_default();
        let count = frame.upserts.len() + frame.removals.len();
        self.updates.extend(frame.removals.into_iter().map(|id| (id, None)));
        for update in frame.upserts {
            match object::id_of(&update) {
                Some(id) => drop(self.updates.insert(id, Some(update))),
                None => self.unreadable += 1,
            }
        }
        Some(count)
    }
}

/// How much of one batch is staged: more than may be kept, so that objects beyond the grant are refused by name.
#[derive(Debug, Clone, Copy)]
pub struct StagedLimits {
    pub objects: usize,
    pub bytes: usize,
}

impl StagedLimits {
    pub fn of(grant: &dyn Grant) -> Self {
        let granted = grant.max_endpoints().saturating_add(grant.max_label_sets());
        Self { objects: granted.saturating_add(2 * MAX_OTHERS), bytes: kept_bytes(grant).saturating_add(OTHER_BYTES) }
    }
}

/// Most bytes that are kept of an origin.
pub fn kept_bytes(grant: &dyn Grant) -> usize {
    let granted = grant.max_endpoints().saturating_add(grant.max_label_sets());
    granted.saturating_mul(BYTES_PER_OBJECT).saturating_add(OTHER_BYTES)
}
