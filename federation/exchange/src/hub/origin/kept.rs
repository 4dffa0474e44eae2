//! How much of what a cluster publishes is kept, and what is not because of a limit.

use std::collections::BTreeMap;

use super::batch::{BYTES_PER_OBJECT, MAX_OTHERS, kept_bytes};
use crate::codec::object::Object;
use crate::model::{Grant, Limit, Refusal};

#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The digest of all objects.
    pub(super) digest: u128,
    pub(super) objects: usize,
    pub(super) endpoints: usize,
    pub(super) label_sets: usize,
    pub(super) bytes: usize,
}

/// How much more could be kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    endpoints: usize,
    label_sets: usize,
    others: usize,
    bytes: usize,
}

impl Kept {
    pub(super) fn room(&self, grant: &dyn Grant) -> Room {
        Room {
            endpoints: grant.max_endpoints().saturating_sub(self.endpoints),
            label_sets: grant.max_label_sets().saturating_sub(self.label_sets),
            others: MAX_OTHERS.saturating_sub(self.others()),
            bytes: kept_bytes(grant).saturating_sub(self.bytes),
        }
    }

    fn others(&self) -> usize {
        self.objects - self.endpoints - self.label_sets
    }

    /// The limit that one more object exceeds.
    pub(super) fn exceeded(&self, grant: &dyn Grant, object: &Result<Object, Refusal>, bytes: usize) -> Option<Limit> {
        match object {
            _ if self.bytes + bytes > kept_bytes(grant) => Some(Limit::Bytes),
            Ok(Object::Endpoint(_)) if self.endpoints >= grant.max_endpoints() => Some(Limit::Endpoints),
            Ok(Object::LabelSet { .. }) if self.label_sets >= grant.max_label_sets() => Some(Limit::LabelSets),
            Ok(Object::Endpoint(_) | Object::LabelSet { .. }) => None,
            _ => (self.others() >= MAX_OTHERS).then_some(Limit::OtherObjects),
        }
    }
}

/// Objects that are not kept because of a limit.
#[derive(Debug, Default)]
pub(super) struct Overflow {
    pub(super) refused: BTreeMap<u64, Refusal>,
    /// Updates that have no readable id, or exceed what is staged of one batch.
    pub(super) unreadable: usize,
    /// The room when a snapshot was requested last, or that it left.
    pub(super) requested: Option<Room>,
}

impl Overflow {
    pub(super) fn refuse(&mut self, id: u64, limit: Limit) {
        // At most this many are named.
        if self.refused.len() < MAX_OTHERS {
            self.refused.insert(id, Refusal::LimitExceeded(limit));
        }
    }

    pub(super) fn clear(&mut self) {
        self.refused.clear();
        self.unreadable = 0;
    }

    /// Whether a snapshot should be requested: there is now room for all of what was not kept because of a limit, or for a
    /// hundredth of what is granted. It is requested once per stream, until there is more room than at that time, or than the
    /// snapshot left: the sizes of the refused objects are not known.
    pub(super) fn requests_snapshot(&mut self, room: Room, grant: &dyn Grant) -> bool {
        let requested = self.requested;
        let fits = |limit: Limit, of: fn(Room) -> usize, most: usize, share: usize| {
            let lacking = self.refused.values().filter(|why| **why == Refusal::LimitExceeded(limit)).count();
            lacking > 0
                && of(room) >= lacking.saturating_mul(share).min(1 + most / 100)
                && requested.is_none_or(|requested| of(room) >= of(requested) + share)
        };
        let requests = !self.refused.is_empty()
            && (fits(Limit::Endpoints, |room| room.endpoints, grant.max_endpoints(), 1)
                || fits(Limit::LabelSets, |room| room.label_sets, grant.max_label_sets(), 1)
                || fits(Limit::OtherObjects, |room| room.others, MAX_OTHERS, 1)
                || fits(Limit::Bytes, |room| room.bytes, kept_bytes(grant), BYTES_PER_OBJECT));
        if requests {
            self.requested = Some(room);
        }
        requests
    }
}
