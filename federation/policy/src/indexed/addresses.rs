//! The owner of each address. If several endpoints claim an address, one of them owns it.

use std::hash::BuildHasher as _;
use std::net::IpAddr;

use hashbrown::hash_table::Entry;
use smallvec::SmallVec;

use super::inventory::IndexedInventory;
use super::model::{LOCAL, SlotId};
use crate::inventory::EndpointKind;

impl IndexedInventory {
    pub fn owner(&self, address: IpAddr) -> Option<SlotId> {
        let same = |(at, position): &(SlotId, u32)| self.slots[*at].addresses.get(*position as usize) == Some(&address);
        self.owners.find(self.hasher.hash_one(address), same).map(|(at, _)| *at)
    }

    /// Makes an endpoint the owner of an address. The address must be in its slot.
    fn set_owner(&mut self, address: IpAddr, at: SlotId) {
        if let Some(position) = self.slots[at].addresses.iter().position(|it| *it == address) {
            self.claim_if_free(address, at, position as u32);
        }
    }

    /// Makes an endpoint the owner of an address without an owner. Returns the current owner otherwise.
    fn claim_if_free(&mut self, address: IpAddr, at: SlotId, position: u32) -> Option<SlotId> {
        let (slots, hasher) = (&self.slots, &self.hasher);
        let address_of = |(at, position): &(SlotId, u32)| slots[*at].addresses.get(*position as usize);
        let hash = |it: &(SlotId, u32)| address_of(it).map_or(0, |address| hasher.hash_one(address));
        match self.owners.entry(hasher.hash_one(address), |it| address_of(it) == Some(&address), hash) {
            Entry::Occupied(owner) => Some(owner.get().0),
            Entry::Vacant(free) => {
                free.insert((at, position));
                None
            }
        }
    }

    /// Removes the owner of an address. Must be called while the address is in the slot of the owner.
    fn unset_owner(&mut self, address: IpAddr) {
        let slots = &self.slots;
        let same = |(at, position): &(SlotId, u32)| slots[*at].addresses.get(*position as usize) == Some(&address);
        if let Ok(entry) = self.owners.find_entry(self.hasher.hash_one(address), same) {
            entry.remove();
        }
    }

    /// Claims the address at a position of an endpoint's slot.
    pub(super) fn claim(&mut self, at: SlotId, position: usize) {
        let address = self.slots[at].addresses[position];
        if let Some(owner) = self.claim_if_free(address, at, position as u32) {
            let claimants = self.contested.entry(address).or_insert_with(|| SmallVec::from_slice(&[owner]));
            claimants.push(at);
            self.settle(address);
        }
    }

    /// Withdraws the claim of an endpoint. The address must still be in its slot.
    pub(super) fn yield_address(&mut self, address: IpAddr, at: SlotId) {
        match self.contested.get_mut(&address) {
            None => self.unset_owner(address),
            Some(claimants) => {
                claimants.retain(|claimant| *claimant != at);
                self.settle(address);
            }
        }
    }

    /// Determines the owner of a contested address.
    fn settle(&mut self, address: IpAddr) {
        let Some(claimants) = self.contested.get(&address) else { return };
        let claimants = claimants.clone();
        let first = claimants.iter().copied().min_by(|a, b| self.precedence(*a).cmp(&self.precedence(*b)));
        let owner = self.owner(address);
        if first != owner {
            for changed in [owner, first].into_iter().flatten() {
                self.mark(changed);
            }
            self.unset_owner(address);
            if let Some(first) = first {
                self.set_owner(address, first);
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

    /// The addresses that an endpoint owns.
    pub fn owned(&self, at: SlotId) -> impl Iterator<Item = IpAddr> {
        let slot = &self.slots[at];
        let uncontested = self.contested.is_empty();
        slot.addresses.iter().copied().filter(move |it| uncontested || self.owner(*it) == Some(at))
    }

    /// Every endpoint that claims an address.
    pub fn claimants(&self, address: IpAddr) -> impl Iterator<Item = SlotId> {
        let contested = self.contested.get(&address);
        let owner = self.owner(address).filter(|_| contested.is_none());
        contested.into_iter().flatten().copied().chain(owner)
    }

    /// The addresses that more than one endpoint claims.
    pub fn contested(&self) -> impl Iterator<Item = IpAddr> {
        self.contested.keys().copied()
    }
}
