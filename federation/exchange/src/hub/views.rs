//! What a class selects of one origin.

use std::sync::Weak;

use bytes::Bytes;

use super::origin::{Before, Changes, Entry, Origin};
use super::selections::Selections;
use super::slots::{Bits, Slots};

hanse_policy::slab_id! {
    pub(super) struct ClassId;
}

/// What a class selects of one origin.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) members: Slots,
    pub(super) digest: u128,
    /// The frames of its snapshot, while a receiver is sent them.
    pub(super) snapshot: Option<Weak<Vec<Bytes>>>,
}

impl View {
    /// Adds an endpoint that the interest selects, and what it refers to.
    pub(super) fn add_endpoint(&mut self, origin: &Origin, slot: u32) {
        self.add(origin, slot);
        for support in origin.supports_of(slot) {
            self.add(origin, support);
        }
    }

    fn add(&mut self, origin: &Origin, slot: u32) {
        if let Some(entry) = origin.entry(slot)
            && !self.members.set(slot, true)
        {
            self.digest = self.digest.wrapping_add(entry.digest());
        }
    }

    /// Applies a change of the origin, and returns the ids that a receiver must be sent. `fit` are the changed endpoints that were in
    /// the view, or may be now.
    pub(super) fn update(
        &mut self,
        origin: &Origin,
        changes: &Changes,
        fit: &[u32],
        interest: &Bits,
        selections: &Selections,
    ) -> Vec<u64> {
        let mut dirty = Vec::new();
        let mut supports = self.members.of(&changes.supports);
        for (slot, before) in fit.iter().filter_map(|slot| changes.endpoints.get_key_value(slot)) {
            let now = origin.endpoint_selected(*slot, interest, selections);
            let was = self.members.set(*slot, now);
            self.account(origin, *slot, *before, was, now, &mut dirty);
            if now {
                supports.extend(origin.supports_of(*slot));
            }
        }
        supports.sort_unstable();
        supports.dedup();
        for (slot, before) in supports.iter().filter_map(|slot| changes.supports.get_key_value(slot)) {
            let now = origin.support_selected(*slot, &self.members);
            let was = self.members.set(*slot, now);
            self.account(origin, *slot, *before, was, now, &mut dirty);
        }
        dirty
    }

    fn account(&mut self, origin: &Origin, slot: u32, before: Before, was: bool, now: bool, dirty: &mut Vec<u64>) {
        let after = origin.entry(slot).filter(|_| now).map_or(0, Entry::digest);
        if was {
            self.digest = self.digest.wrapping_sub(before.digest);
        }
        self.digest = self.digest.wrapping_add(after);
        if was != now || (now && before.digest != after) {
            dirty.push(before.id);
        }
    }
}
