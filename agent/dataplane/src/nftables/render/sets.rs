//! Sets and maps, and their elements.

use std::collections::BTreeSet;
use std::net::IpAddr;

use hanse_ruleset::{Family, LocalEndpoint, Members, NodeConfig, Set, SetId, SetKind};
use ipnet::IpNet;

use super::{MARKED_ALLOWED, MARKED_DEAD, address_length, both, chain_name, family_digit};

/// The flags of `NFTA_SET_FLAGS` in use.
pub const INTERVAL: u32 = 0x4;
pub const MAP: u32 = 0x8;
/// Packets add elements, which are not drift.
pub const DYNAMIC: u32 = 0x20;

/// Elements may have a timeout. All sets of addresses have the flag: it cannot be added later, and does not slow look-ups.
pub const TIMEOUT: u32 = 0x10;
/// How often the kernel frees ended elements, which no longer match. Its default of a second would walk every set.
pub const CLEAR_EVERY_MS: u32 = 600_000;

/// An element of a named set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    Key(Vec<u8>),
    /// Both ends inclusive.
    Interval(Vec<u8>, Vec<u8>),
    /// With a timeout in milliseconds.
    Ending(Vec<u8>, u64),
    Jump(Vec<u8>, String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetDefinition {
    pub name: String,
    pub flags: u32,
    pub key_length: u32,
    /// How tools show keys; the kernel ignores it.
    pub key_type: u32,
}

/// Types as libnftables numbers them; a concatenation has six bits for each part.
const INTERFACE_NAME: u32 = 41;
const MARK_TYPE: u32 = 19;
const PROTOCOL_AND_PORT: u32 = (12 << 6) | 13;

fn address_type(family: Family) -> u32 {
    match family {
        Family::V4 => 7,
        Family::V6 => 8,
    }
}

pub fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Nets of one family as intervals that neither overlap nor touch.
pub fn intervals(nets: impl Iterator<Item = IpNet>, family: Family) -> Vec<(Vec<u8>, Vec<u8>)> {
    let bounds = nets
        .filter(|net| Family::of(net.addr()) == family)
        .map(|net| match net {
            IpNet::V4(net) => (u32::from(net.network()).into(), u32::from(net.broadcast()).into()),
            IpNet::V6(net) => (net.network().into(), net.broadcast().into()),
        })
        .collect();
    merged(bounds, address_length(family) as usize)
}

/// Intervals (both ends inclusive) that neither overlap nor touch, as keys of `length` bytes.
pub fn merged(mut bounds: Vec<(u128, u128)>, length: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
    bounds.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::new();
    for (first, last) in bounds {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    let bytes = |value: u128| value.to_be_bytes()[16 - length..].to_vec();
    merged.into_iter().map(|(first, last)| (bytes(first), bytes(last))).collect()
}

/// The kernel's name of a rule set's set.
pub fn set_name(id: SetId, family: Family) -> String {
    format!("s{}-{id}", family_digit(family))
}

pub fn set_definitions(set: &Set) -> [SetDefinition; 2] {
    both().map(|family| {
        let address = address_length(family);
        let kind = address_type(family);
        let (flags, key_length, key_type) = match set.kind() {
            SetKind::Addresses => (TIMEOUT, address, kind),
            SetKind::Nets => (INTERVAL, address, kind),
            SetKind::Sockets => (0, address + 8, (kind << 12) | PROTOCOL_AND_PORT),
        };
        SetDefinition { name: set_name(set.id, family), flags, key_length, key_type }
    })
}

pub fn set_elements(members: &Members, family: Family) -> Vec<Element> {
    match members {
        Members::Addresses(members) => {
            let of_family = members.iter().filter(|address| Family::of(**address) == family);
            of_family.map(|address| Element::Key(address_bytes(*address))).collect()
        }
        Members::Nets(members) => {
            intervals(members.iter().copied(), family).into_iter().map(|(a, b)| Element::Interval(a, b)).collect()
        }
        Members::Sockets(members) => {
            let of_family = members.iter().filter(|socket| Family::of(socket.address) == family);
            of_family
                .map(|socket| {
                    let mut key = address_bytes(socket.address);
                    key.extend([socket.protocol, 0, 0, 0]);
                    key.extend(socket.port.to_be_bytes());
                    key.extend([0, 0]);
                    Element::Key(key)
                })
                .collect()
        }
    }
}

/// The maps and sets of a node's own endpoints and ranges.
pub fn fixed_sets() -> Vec<SetDefinition> {
    let mark = |name: &str| SetDefinition { name: name.into(), flags: 0, key_length: 4, key_type: MARK_TYPE };
    let mut sets = vec![
        SetDefinition { name: "uplinks".into(), flags: 0, key_length: 16, key_type: INTERFACE_NAME },
        mark(MARKED_ALLOWED),
        mark(MARKED_DEAD),
    ];
    for family in both() {
        let (digit, length) = (family_digit(family), address_length(family));
        let kind = address_type(family);
        let set = |name: &str, flags, key_length| {
            let key_type = if key_length > length { (kind << 6) | kind } else { kind };
            SetDefinition { name: format!("{name}{digit}"), flags, key_length, key_type }
        };
        sets.extend([
            set("pods", 0, length),
            set("ranges", INTERVAL, length),
            set("guarded", 0, length),
            set("self", 0, length * 2),
            set("egress", MAP, length),
            set("ingress", MAP, length),
            set("tonode", MAP, length),
            set("answered", DYNAMIC, length),
            set("crossed", DYNAMIC, length),
        ]);
    }
    sets
}

/// The elements of one endpoint in the fixed sets: set name and element. `guarded`: its traffic to the node is judged.
pub fn endpoint_elements(endpoint: &LocalEndpoint, guarded: bool) -> BTreeSet<(String, Element)> {
    let mut elements = BTreeSet::new();
    for address in &endpoint.addresses {
        let family = Family::of(*address);
        let digit = family_digit(family);
        let key = address_bytes(*address);
        elements.insert((format!("pods{digit}"), Element::Key(key.clone())));
        if guarded {
            elements.insert((format!("guarded{digit}"), Element::Key(key.clone())));
        }
        for (map, chain) in
            [("egress", endpoint.egress), ("ingress", endpoint.ingress), ("tonode", endpoint.egress_to_node)]
        {
            elements.insert((format!("{map}{digit}"), Element::Jump(key.clone(), chain_name(chain, family))));
        }
        for other in endpoint.addresses.iter().filter(|other| Family::of(**other) == family) {
            let pair = [key.clone(), address_bytes(*other)].concat();
            elements.insert((format!("self{digit}"), Element::Key(pair)));
        }
    }
    elements
}

pub fn range_elements(node: &NodeConfig, family: Family) -> Vec<Element> {
    let nets = node.pod_ranges.iter().copied();
    intervals(nets, family).into_iter().map(|(first, last)| Element::Interval(first, last)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nets_merge_into_disjoint_intervals() {
        let nets = ["10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/8", "192.168.0.0/24", "::/0"];
        let nets: Vec<IpNet> = nets.iter().map(|net| net.parse().expect("a net")).collect();
        let expected =
            vec![(vec![10, 0, 0, 0], vec![11, 255, 255, 255]), (vec![192, 168, 0, 0], vec![192, 168, 0, 255])];
        assert_eq!(intervals(nets.iter().copied(), Family::V4), expected);
        assert_eq!(intervals(nets.into_iter(), Family::V6), vec![(vec![0; 16], vec![255; 16])]);
    }
}
