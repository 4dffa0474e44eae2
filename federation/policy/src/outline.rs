//! The parts of a rule that most packets fail on, laid out to be checked quickly.

use std::cell::Cell;

use ipnet::IpNet;

use crate::evaluate::{Query, has_ports};
use crate::model::{Port, Rule};

/// No requirement.
pub(crate) const ANY: u32 = u32::MAX;
const ANY_PROTOCOL: u16 = u16::MAX;

/// 16 bytes: four in a line of a cache.
#[derive(Debug)]
pub(crate) struct Outline {
    /// For source and destination, the number of a bit that is set where the end may match, or [`ANY`].
    pub ends: [u32; 2],
    protocol: u16,
    /// The range of all numeric ports of the destination; first after last when all are names.
    first: u16,
    last: u16,
    /// The rule requires a destination port; some of them are names.
    ports: bool,
    named: bool,
}

impl Outline {
    pub fn of(rule: &Rule, ends: [Option<u32>; 2]) -> Self {
        let mut outline = Self {
            ends: ends.map(|end| end.unwrap_or(ANY)),
            protocol: rule.protocol.map_or(ANY_PROTOCOL, |protocol| protocol.number().into()),
            first: u16::MAX,
            last: 0,
            ports: !rule.destination.ports.is_empty(),
            named: false,
        };
        for port in &rule.destination.ports {
            match port {
                Port::Range(first, last) => {
                    (outline.first, outline.last) = (outline.first.min(*first), outline.last.max(*last));
                }
                Port::Named(_) => outline.named = true,
            }
        }
        outline
    }
}

/// A packet, as outlines are compared with it.
#[derive(Debug)]
pub(crate) struct PacketOutline<'b> {
    bits: &'b EndBits,
    protocol: u16,
    /// 0 where the packet has none.
    port: u16,
    has_port: bool,
    /// The destination is a pod with named ports.
    has_names: bool,
}

impl<'b> PacketOutline<'b> {
    pub fn new(query: &Query, has_names: bool, bits: &'b EndBits) -> Self {
        Self {
            bits,
            protocol: query.protocol.into(),
            port: query.destination_port,
            has_port: has_ports(query.protocol),
            has_names,
        }
    }

    /// Whether a rule may match.
    pub fn may_match(&self, rule: &Outline) -> bool {
        let is_set = |end: usize| {
            let number = rule.ends[end];
            number == ANY || self.bits.is_set(end, number)
        };
        let in_range = rule.first <= self.port && self.port <= rule.last;
        let port = !rule.ports || self.has_port && (in_range || rule.named && self.has_names);
        (rule.protocol == ANY_PROTOCOL || rule.protocol == self.protocol) && port && is_set(0) && is_set(1)
    }
}

/// For each end, one bit for each number that an outline can require.
#[derive(Debug)]
pub(crate) struct EndBits {
    words: [Box<[Cell<u64>]>; 2],
}

impl EndBits {
    pub fn new(count: u32) -> Self {
        Self { words: [(); 2].map(|()| vec![Cell::new(0); count.div_ceil(64) as usize].into()) }
    }

    pub fn clear(&self) {
        self.words.iter().flatten().for_each(|word| word.set(0));
    }

    pub fn set(&self, end: usize, number: u32) {
        let word = &self.words[end][number as usize / 64];
        word.set(word.get() | 1 << (number % 64));
    }

    fn is_set(&self, end: usize, number: u32) -> bool {
        self.words[end][number as usize / 64].get() >> (number % 64) & 1 == 1
    }
}

/// The only net of a list.
pub(crate) fn only(nets: &[IpNet]) -> Option<IpNet> {
    if let [net] = nets { Some(*net) } else { None }
}
