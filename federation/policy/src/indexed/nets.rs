//! Values by the nets that contain an address.

use std::net::IpAddr;

use hashbrown::HashMap;
use ipnet::IpNet;
use smallvec::SmallVec;

/// Values by net. A lookup takes one probe for each prefix length in use.
#[derive(Debug)]
pub struct NetTable<T> {
    by_net: HashMap<IpNet, SmallVec<[T; 2]>, foldhash::fast::RandomState>,
    /// By family, the number of nets of each prefix length in use.
    lengths: [Vec<(u8, u32)>; 2],
}

impl<T> Default for NetTable<T> {
    fn default() -> Self {
        Self { by_net: HashMap::default(), lengths: Default::default() }
    }
}

impl<T: Copy + PartialEq> NetTable<T> {
    /// Adds a value to a net. A value may be added more than once.
    pub fn insert(&mut self, net: IpNet, value: T) {
        let values = self.by_net.entry(net.trunc()).or_default();
        if values.is_empty() {
            let lengths = &mut self.lengths[usize::from(matches!(net, IpNet::V6(_)))];
            match lengths.binary_search_by_key(&net.prefix_len(), |(length, _)| *length) {
                Ok(at) => lengths[at].1 += 1,
                Err(at) => lengths.insert(at, (net.prefix_len(), 1)),
            }
        }
        values.push(value);
    }

    /// Removes a value from a net once.
    pub fn remove(&mut self, net: IpNet, value: T) {
        let Some(values) = self.by_net.get_mut(&net.trunc()) else { return };
        let Some(at) = values.iter().position(|have| *have == value) else { return };
        values.swap_remove(at);
        if values.is_empty() {
            self.by_net.remove(&net.trunc());
            let lengths = &mut self.lengths[usize::from(matches!(net, IpNet::V6(_)))];
            if let Ok(at) = lengths.binary_search_by_key(&net.prefix_len(), |(length, _)| *length) {
                lengths[at].1 -= 1;
                if lengths[at].1 == 0 {
                    lengths.remove(at);
                }
            }
        }
    }

    /// The values of a net.
    pub fn of(&self, net: IpNet) -> &[T] {
        self.by_net.get(&net.trunc()).map_or(&[], |values| values)
    }

    /// The values of all nets that contain an address.
    pub fn containing(&self, address: IpAddr) -> impl Iterator<Item = T> {
        let lengths = self.lengths[usize::from(address.is_ipv6())].iter();
        let nets = lengths.filter_map(move |(length, _)| IpNet::new(address, *length).ok());
        nets.filter_map(|net| self.by_net.get(&net.trunc())).flatten().copied()
    }

    pub fn is_empty(&self) -> bool {
        self.by_net.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_values_of_every_containing_net() {
        let net = |text: &str| text.parse::<IpNet>().expect("a net");
        let mut table = NetTable::default();
        let all = [("10.0.0.0/8", 1), ("10.1.0.7/16", 2), ("10.1.0.0/16", 3), ("::/0", 4), ("10.1.0.0/16", 3)];
        for (text, value) in all {
            table.insert(net(text), value);
        }
        let found = |table: &NetTable<i32>, address: &str| {
            let mut found: Vec<i32> = table.containing(address.parse().expect("an address")).collect();
            found.sort_unstable();
            found
        };
        assert_eq!(found(&table, "10.1.2.3"), [1, 2, 3, 3]);
        assert_eq!(found(&table, "10.2.0.0"), [1]);
        assert_eq!(found(&table, "fd00::1"), [4]);
        for (text, value) in &all[..4] {
            table.remove(net(text), *value);
        }
        assert_eq!(found(&table, "10.1.2.3"), [3]);
        table.remove(net(all[4].0), 3);
        assert!(table.is_empty() && table.lengths.iter().all(Vec::is_empty));
    }
}
