//! Addresses of a node's pods.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::bail;
use ipnet::IpNet;

/// Gives each pod one address from each range, each time the next free one, as most plugins do, so that an address is not used
/// again at once.
#[derive(Debug)]
pub struct Addresses {
    ranges: Vec<Range>,
}

#[derive(Debug)]
struct Range {
    net: IpNet,
    used: BTreeSet<IpAddr>,
    last: IpAddr,
}

impl Addresses {
    pub fn new(ranges: &[IpNet]) -> Self {
        let range = |net: &IpNet| Range { net: *net, used: BTreeSet::new(), last: net.network() };
        Self { ranges: ranges.iter().map(range).collect() }
    }

    /// One address from each range. `before` are those that the pod had, and has again where they are free.
    ///
    /// # Errors
    /// When a range is used up; nothing is taken then.
    pub fn take(&mut self, before: &[IpAddr]) -> anyhow::Result<Vec<IpAddr>> {
        let mut taken = Vec::new();
        for range in &mut self.ranges {
            let again = before.iter().find(|it| range.net.contains(*it) && !range.used.contains(*it));
            match again.copied().or_else(|| range.next()) {
                Some(address) => taken.push(address),
                None => bail!("pod range {} has no free address", range.net),
            }
        }
        for (range, address) in self.ranges.iter_mut().zip(&taken) {
            range.used.insert(*address);
            range.last = *address;
        }
        Ok(taken)
    }

    pub fn release(&mut self, addresses: &[IpAddr]) {
        for range in &mut self.ranges {
            range.used.retain(|address| !addresses.contains(address));
        }
    }
}

impl Range {
    /// Neither the first address, which is that of the network, nor the last one, which is its broadcast.
    fn next(&self) -> Option<IpAddr> {
        let usable = |address: &IpAddr| {
            *address != self.net.network() && *address != self.net.broadcast() && !self.used.contains(address)
        };
        // The used ones and the two that are left out: of as many and one more, one is free, if any is.
        let attempts = self.used.len() + 3;
        let mut candidate = self.last;
        for _ in 0..attempts {
            candidate = match after(candidate) {
                Some(next) if self.net.contains(&next) => next,
                _ => self.net.network(),
            };
            if usable(&candidate) {
                return Some(candidate);
            }
        }
        None
    }
}

fn after(address: IpAddr) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(address) => IpAddr::V4(u32::from(address).checked_add(1)?.into()),
        IpAddr::V6(address) => IpAddr::V6(u128::from(address).checked_add(1)?.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn addresses_are_used_again_only_after_all_others() {
        let mut addresses =
            Addresses::new(&["10.0.0.0/29".parse().expect("a range"), "fd00::/64".parse().expect("a range")]);
        assert_eq!(addresses.take(&[]).expect("free"), [ip("10.0.0.1"), ip("fd00::1")]);
        assert_eq!(addresses.take(&[]).expect("free"), [ip("10.0.0.2"), ip("fd00::2")]);
        addresses.release(&[ip("10.0.0.1"), ip("fd00::1")]);
        for last in 3..=6 {
            assert_eq!(addresses.take(&[]).expect("free")[0], ip(&format!("10.0.0.{last}")));
        }
        assert_eq!(addresses.take(&[]).expect("free")[0], ip("10.0.0.1"));
        let error = addresses.take(&[]).expect_err("all are used").to_string();
        assert_eq!(error, "pod range 10.0.0.0/29 has no free address");
        // The address of the other range was not taken with it.
        addresses.release(&[ip("10.0.0.4")]);
        assert_eq!(addresses.take(&[]).expect("free"), [ip("10.0.0.4"), ip("fd00::8")]);
    }

    #[test]
    fn a_pod_gets_the_addresses_that_it_had() {
        let mut addresses = Addresses::new(&["10.0.0.0/29".parse().expect("a range")]);
        assert_eq!(addresses.take(&[ip("10.0.0.5"), ip("fd00::5")]).expect("free"), [ip("10.0.0.5")]);
        // It is used, or of another range.
        assert_eq!(addresses.take(&[ip("10.0.0.5")]).expect("free"), [ip("10.0.0.6")]);
        assert_eq!(addresses.take(&[ip("10.9.0.5")]).expect("free"), [ip("10.0.0.1")]);
    }
}
