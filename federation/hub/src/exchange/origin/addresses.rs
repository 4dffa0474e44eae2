//! Which endpoint of an origin owns an address: of those that claim it the newest.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hashbrown::HashMap;

/// The owners of addresses, by slot. The families are apart because an IPv4 address takes a quarter of the room.
#[derive(Debug, Default)]
pub struct Addresses {
    v4: HashMap<Ipv4Addr, u32>,
    v6: HashMap<Ipv6Addr, u32>,
    /// Everybody who claims an address that more than one claims.
    contested: BTreeMap<IpAddr, BTreeSet<u32>>,
}

impl Addresses {
    pub fn owner(&self, address: IpAddr) -> Option<u32> {
        match address {
            IpAddr::V4(address) => self.v4.get(&address).copied(),
            IpAddr::V6(address) => self.v6.get(&address).copied(),
        }
    }

    /// A slot claims an address. `age` orders slots, the newest last; those that may own another address now, or one less, are
    /// added to `rivals`.
    pub fn claim<A: Ord>(
        &mut self,
        address: IpAddr,
        slot: u32,
        age: impl Fn(u32) -> Option<A>,
        rivals: &mut BTreeSet<u32>,
    ) {
        match self.owner(address) {
            None => self.give(address, Some(slot)),
            Some(owner) => {
                let claimants = self.contested.entry(address).or_insert_with(|| BTreeSet::from([owner]));
                if !claimants.insert(slot) && claimants.len() == 1 {
                    self.contested.remove(&address);
                    return;
                }
                self.decide(address, age, rivals);
            }
        }
    }

    /// A slot claims an address no more, if it did.
    pub fn release<A: Ord>(
        &mut self,
        address: IpAddr,
        slot: u32,
        age: impl Fn(u32) -> Option<A>,
        rivals: &mut BTreeSet<u32>,
    ) {
        if let Some(claimants) = self.contested.get_mut(&address) {
            if claimants.remove(&slot) {
                self.decide(address, age, rivals);
            }
        } else if self.owner(address) == Some(slot) {
            self.give(address, None);
        }
    }

    pub fn shrink(&mut self) {
        self.v4.shrink_to_fit();
        self.v6.shrink_to_fit();
    }

    fn decide<A: Ord>(&mut self, address: IpAddr, age: impl Fn(u32) -> Option<A>, rivals: &mut BTreeSet<u32>) {
        let Some(claimants) = self.contested.get(&address) else { return };
        rivals.extend(claimants);
        let newest = claimants.iter().copied().max_by_key(|slot| age(*slot));
        if claimants.len() <= 1 {
            self.contested.remove(&address);
        }
        self.give(address, newest);
    }

    fn give(&mut self, address: IpAddr, owner: Option<u32>) {
        match (address, owner) {
            (IpAddr::V4(address), Some(owner)) => drop(self.v4.insert(address, owner)),
            (IpAddr::V6(address), Some(owner)) => drop(self.v6.insert(address, owner)),
            (IpAddr::V4(address), None) => drop(self.v4.remove(&address)),
            (IpAddr::V6(address), None) => drop(self.v6.remove(&address)),
        }
    }
}
