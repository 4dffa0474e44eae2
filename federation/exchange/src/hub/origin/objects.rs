//! The objects of an origin, by slot and by id.
//!
//! A slot is given to another object only after [`Objects::settle`], when all that follow the origin have been informed of the
//! removal: within one change a slot identifies one object.

use std::hash::BuildHasher as _;

use hanse_policy::slab::{Id as _, Slab};
use hashbrown::{DefaultHashBuilder, HashTable};

use super::addresses::Claim;
use super::profiles::ProfileId;
use crate::codec::object::{self, EndpointObject, Object};
use crate::model::{Refusal, digest_of};

hanse_policy::slab_id! {
    struct SlotId;
}

/// 48 bytes: there is one for each endpoint of the ClusterSet. Everything else is read from its bytes when it is needed.
#[derive(Debug)]
pub struct Entry {
    pub id: u64,
    pub bytes: Box<[u8]>,
    pub touched: u64,
    pub(super) body: Body,
    /// It is used: it and everything that it refers to are accepted, and a newer endpoint has none of its addresses.
    pub visible: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Body {
    /// `position` is its index in its profile's list.
    Endpoint {
        profile: ProfileId,
        position: u32,
    },
    /// A namespace or an account, which is among the origin's `named`.
    Named,
    LabelSet,
    /// The reason is among the origin's `refused`.
    Refused,
}

/// An object before a change.
#[derive(Debug, Clone, Copy)]
pub struct Before {
    pub id: u64,
    pub digest: u128,
}

impl Entry {
    pub fn digest(&self) -> u128 {
        digest_of(&self.bytes)
    }

    pub(super) fn before(&self) -> Before {
        Before { id: self.id, digest: self.digest() }
    }

    pub(super) fn claim(&self, slot: u32) -> Claim {
        let revision = object::decode_export(&self.bytes).map_or(0, |update| update.revision);
        Claim { revision, id: self.id, slot }
    }
}

#[derive(Debug, Default)]
pub(super) struct Objects {
    /// An inner `None`: the object was removed, and the slot is not free yet.
    slots: Slab<SlotId, Option<Entry>>,
    removed: Vec<u32>,
    /// Slots by the ids of their objects.
    ids: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Objects {
    /// One above the highest slot that is in use.
    pub(super) fn bound(&self) -> u32 {
        self.slots.bound()
    }

    pub(super) fn get(&self, slot: u32) -> Option<&Entry> {
        entry(&self.slots, slot)
    }

    /// Panics where the slot has no object.
    pub(super) fn get_mut(&mut self, slot: u32) -> &mut Entry {
        self.slots[SlotId::new(slot)].as_mut().expect("a slot that is referred to has an object")
    }

    /// Panics where the slot has no object.
    pub(super) fn live(&self, slot: u32) -> &Entry {
        self.get(slot).expect("a slot that is referred to has an object")
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Entry)> {
        self.slots.iter().filter_map(|(slot, entry)| Some((slot.number(), entry.as_ref()?)))
    }

    pub(super) fn slot_of(&self, id: u64) -> Option<u32> {
        let is_it = |slot: &u32| self.get(*slot).is_some_and(|entry| entry.id == id);
        self.ids.find(self.hasher.hash_one(id), is_it).copied()
    }

    pub(super) fn remove(&mut self, id: u64) -> Option<(u32, Entry)> {
        let slots = &self.slots;
        let is_it = |slot: &u32| entry(slots, *slot).is_some_and(|entry| entry.id == id);
        let (slot, _) = self.ids.find_entry(self.hasher.hash_one(id), is_it).ok()?.remove();
        self.removed.push(slot);
        Some((slot, self.take(slot)?))
    }

    /// A slot for an object: that of the object which it replaces, because followers know it by the slot, or a free one.
    /// [`Self::insert`] follows.
    pub(super) fn reserve(&mut self, replaced: Option<u32>) -> u32 {
        match replaced {
            Some(slot) => {
                self.removed.retain(|removed| *removed != slot);
                slot
            }
            None => self.slots.insert(None).number(),
        }
    }

    /// Stores an object in a slot that [`Self::reserve`] returned.
    pub(super) fn insert(&mut self, slot: u32, entry: Entry) {
        let id = entry.id;
        self.put_back(slot, entry);
        let (slots, hasher) = (&self.slots, &self.hasher);
        self.ids.insert_unique(hasher.hash_one(id), slot, |slot| hash_of(slots, hasher, *slot));
    }

    /// Takes an object out to change it; [`Self::put_back`] follows.
    pub(super) fn take(&mut self, slot: u32) -> Option<Entry> {
        self.slots.get_mut(SlotId::new(slot))?.take()
    }

    pub(super) fn put_back(&mut self, slot: u32, entry: Entry) {
        self.slots[SlotId::new(slot)] = Some(entry);
    }

    /// Frees the slots of removed objects.
    pub(super) fn settle(&mut self) {
        for slot in self.removed.drain(..) {
            self.slots.remove(SlotId::new(slot));
        }
    }

    pub(super) fn shrink(&mut self) {
        self.slots.shrink_to_fit();
        let (slots, hasher) = (&self.slots, &self.hasher);
        self.ids.shrink_to_fit(|slot| hash_of(slots, hasher, *slot));
    }
}

fn entry(slots: &Slab<SlotId, Option<Entry>>, slot: u32) -> Option<&Entry> {
    slots.get(SlotId::new(slot))?.as_ref()
}

fn hash_of(slots: &Slab<SlotId, Option<Entry>>, hasher: &DefaultHashBuilder, slot: u32) -> u64 {
    hasher.hash_one(entry(slots, slot).map_or(0, |entry| entry.id))
}

/// Reads an object that the cluster published.
pub(super) fn read(bytes: &[u8]) -> Result<Object, Refusal> {
    match object::decode_export(bytes) {
        Some(update) => update.object.map_err(Refusal::from),
        None => Err(Refusal::Malformed("not an object".to_owned())),
    }
}

pub(super) fn endpoint_of(bytes: &[u8]) -> Option<EndpointObject> {
    match read(bytes) {
        Ok(Object::Endpoint(endpoint)) => Some(endpoint),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry_of(id: u64) -> Entry {
        Entry { id, bytes: Box::default(), touched: 0, body: Body::LabelSet, visible: true }
    }

    #[test]
    fn reuses_a_slot_only_after_the_removal_is_settled() {
        let mut objects = Objects::default();
        for id in [7, 8] {
            let slot = objects.reserve(None);
            objects.insert(slot, entry_of(id));
        }
        let (slot, removed) = objects.remove(7).expect("it exists");
        assert_eq!((slot, removed.id, objects.slot_of(7)), (0, 7, None));
        assert!(objects.get(slot).is_none());
        let other = objects.reserve(None);
        assert_eq!(other, 2);
        objects.insert(other, entry_of(9));
        objects.settle();
        assert_eq!((objects.reserve(None), objects.bound()), (0, 3));
        assert_eq!(objects.iter().map(|(slot, entry)| (slot, entry.id)).collect::<Vec<_>>(), [(1, 8), (2, 9)]);
    }

    #[test]
    fn an_object_takes_the_slot_of_the_one_that_it_replaces() {
        let mut objects = Objects::default();
        let slot = objects.reserve(None);
        objects.insert(slot, entry_of(7));
        objects.remove(7);
        assert_eq!(objects.reserve(Some(slot)), slot);
        objects.insert(slot, entry_of(7));
        objects.settle();
        assert_eq!((objects.slot_of(7), objects.reserve(None)), (Some(slot), 1));
    }

    #[test]
    fn an_entry_takes_48_bytes() {
        assert_eq!((size_of::<Entry>(), size_of::<Option<Option<Entry>>>()), (48, 48));
    }
}
