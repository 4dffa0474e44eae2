//! Who holds an address.

use std::hash::BuildHasher as _;
use std::net::IpAddr;

use hashbrown::hash_table::Entry;
use smallvec::SmallVec;

use super::inventory::IndexedInventory;
use super::model::{LOCAL, SlotId};
use crate::inventory::EndpointKind;

impl IndexedInventory {
    pub fn holder(&self, address: IpAddr) -> Option<SlotId> {
        let same = |(at, position): &(SlotId, u32)| self.slots[*at].addresses.get(*position as usize) == Some(&address);
        self.holders.find(self.hasher.hash_one(address), same).map(|(at, _)| *at)
    }

    /// Makes an endpoint, which must have the address in its slot, its holder.
    fn set_holder(&mut self, address: IpAddr, at: SlotId) {
        if let Some(position) = self.slots[at].addresses.iter().position(|it| *it == address) {
            self.hold_free(address, at, position as u32);
        }
    }

    /// Makes an endpoint the holder of an address unless there is one, which is returned.
    fn hold_free(&mut self, address: IpAddr, at: SlotId, position: u32) -> Option<SlotId> {
        let (slots, hasher) = (&self.slots, &self.hasher);
        let address_of = |(at, position): &(SlotId, u32)| slots[*at].addresses.get(*position as usize);
        let hash = |it: &(SlotId, u32)| address_of(it).map_or(0, |address| hasher.hash_one(address));
        match self.holders.entry(hasher.hash_one(address), |it| address_of(it) == Some(&address), hash) {
            Entry::Occupied(holder) => Some(holder.get().0),
            Entry::Vacant(free) => {
                free.insert((at, position));
                None
            }
        }
    }

    /// Must be called while the holder has the address in its slot.
    fn unset_holder(&mut self, address: IpAddr) {
        let slots = &self.slots;
        let same = |(at, position): &(SlotId, u32)| slots[*at].addresses.get(*position as usize) == Some(&address);
        if let Ok(entry) = self.holders.find_entry(self.hasher.hash_one(address), same) {
            entry.remove();
        }
    }

    /// Claims what is at a position of an endpoint's slot.
    pub(super) fn claim(&mut self, at: SlotId, position: usize) {
        let address = self.slots[at].addresses[position];
        if let Some(holder) = self.hold_free(address, at, position as u32) {
            let claimants = self.contested.entry(address).or_insert_with(|| SmallVec::from_slice(&[holder]));
            claimants.push(at);
            self.settle(address);
        }
    }

    /// Gives up what is still in an endpoint's slot.
    pub(super) fn yield_address(&mut self, address: IpAddr, at: SlotId) {
        match self.contested.get_mut(&address) {
            None => self.unset_holder(address),
            Some(claimants) => {
                claimants.retain(|claimant| *claimant != at);
                self.settle(address);
            }
        }
    }

    /// Decides who holds a contested address.
    fn settle(&mut self, address: IpAddr) {
        let Some(claimants) = self.contested.get(&address) else { return };
        let claimants = claimants.clone();
        let first = claimants.iter().copied().min_by(|a, b| self.precedence(*a).cmp(&self.precedence(*b)));
        let holder = self.holder(address);
        if first != holder {
            for changed in [holder, first].into_iter().flatten() {
                self.mark(changed);
            }
            self.unset_holder(address);
            if let Some(first) = first {
                self.set_holder(address, first);
            }
        }
        if claimants.len() < 2 {
            self.contested.remove(&address);
        }
    }

    fn precedence(&self, at: SlotId) -> (bool, &str, EndpointKind, Option<&str>, &str) {
        let slot = &self.slots[at];
        let context = &self.contexts[slot.context];
        let cluster = &self.clusters[context.cluster].name;
        (context.cluster != LOCAL, cluster, context.kind, context.namespace.as_deref(), &slot.name)
    }

    /// The addresses that an endpoint holds.
    pub fn held(&self, at: SlotId) -> impl Iterator<Item = IpAddr> {
        let slot = &self.slots[at];
        let uncontested = self.contested.is_empty();
        slot.addresses.iter().copied().filter(move |it| uncontested || self.holder(*it) == Some(at))
    }

    /// Every endpoint that claims an address.
    pub fn claimants(&self, address: IpAddr) -> impl Iterator<Item = SlotId> {
        let contested = self.contested.get(&address);
        let holder = self.holder(address).filter(|_| contested.is_none());
        contested.into_iter().flatten().copied().chain(holder)
    }

    /// The addresses that more than one endpoint claims.
    pub fn contested(&self) -> impl Iterator<Item = IpAddr> {
        self.contested.keys().copied()
    }
}
