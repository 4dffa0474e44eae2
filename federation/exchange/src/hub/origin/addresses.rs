//! Which endpoint of an origin owns an address: the newest of those that claim it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hashbrown::HashMap;

/// A claim to an address. The greatest wins: that of the endpoint with the newest revision of its publisher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    pub revision: u64,
    pub id: u64,
    pub slot: u32,
}

/// The owners of addresses, by slot. The families are apart because an IPv4 address takes a quarter of the room.
#[derive(Debug, Default)]
pub struct Addresses {
    v4: HashMap<Ipv4Addr, u32>,
    v6: HashMap<Ipv6Addr, u32>,
    /// All claims to an address with more than one.
    contested: BTreeMap<IpAddr, BTreeSet<Claim>>,
}

impl Addresses {
    pub fn owner(&self, address: IpAddr) -> Option<u32> {
        match address {
            IpAddr::V4(address) => self.v4.get(&address).copied(),
            IpAddr::V6(address) => self.v6.get(&address).copied(),
        }
    }

    /// Adds a claim. Slots that now own one address more, or one less by it are added to `rivals`.
    pub fn claim(
        &mut self,
        address: IpAddr,
        claim: Claim,
        of_owner: impl Fn(u32) -> Claim,
        rivals: &mut BTreeSet<u32>,
    ) {
        match self.owner(address) {
            None => self.give(address, Some(claim.slot)),
            Some(owner) if owner == claim.slot => {}
            Some(owner) => {
                self.contested.entry(address).or_insert_with(|| BTreeSet::from([of_owner(owner)])).insert(claim);
                self.decide(address, rivals);
            }
        }
    }

    /// Drops a claim, if there was one.
    pub fn release(&mut self, address: IpAddr, claim: Claim, rivals: &mut BTreeSet<u32>) {
        if let Some(claimants) = self.contested.get_mut(&address) {
            if claimants.remove(&claim) {
                self.decide(address, rivals);
            }
        } else if self.owner(address) == Some(claim.slot) {
            self.give(address, None);
        }
    }

    pub fn shrink(&mut self) {
        self.v4.shrink_to_fit();
        self.v6.shrink_to_fit();
    }

    fn decide(&mut self, address: IpAddr, rivals: &mut BTreeSet<u32>) {
        let Some(claimants) = self.contested.get(&address) else { return };
        let newest = claimants.last().map(|claim| claim.slot);
        if claimants.len() <= 1 {
            self.contested.remove(&address);
        }
        let owner = self.owner(address);
        if owner != newest {
            rivals.extend(owner.into_iter().chain(newest));
            self.give(address, newest);
        }
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
