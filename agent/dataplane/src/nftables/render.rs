//! A rule set into nftables chains, sets and rules, as values, without access to the kernel.
//!
//! Policy is judged on the ends that connection tracking has, in the connection's original direction, so the same
//! chains judge both directions of a connection, and an ICMP error is judged as the connection that it is about.

mod hooks;
mod policy;
mod sets;

use hanse_ruleset::{ChainId, Family, PolicyId, PortRange};

pub use self::hooks::{PROBE_ACROSS, PROBE_OWN, base_chains, epoch_chains, epoch_elements, log_chains};
pub use self::sets::{
    CLEAR_EVERY_MS, Element, INTERVAL, MAP, SetDefinition, TIMEOUT, address_bytes, endpoint_elements, fixed_sets,
    range_elements, set_definitions, set_elements, set_name,
};
use super::Config;
use super::expression::{Compare, Ct, Direction, Expression, Meta, R1, SetName, Verdict};

/// Sets with the one connection mark of the present epoch.
const MARKED_ALLOWED: &str = "marked-allowed";
const MARKED_DEAD: &str = "marked-dead";
/// ICMP's and ICMPv6's protocol numbers.
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;

/// A rule with its anonymous sets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    pub expressions: Vec<Expression>,
    pub anonymous: Vec<AnonymousSet>,
}

/// Key bytes of intervals (both ends inclusive) or of single values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnonymousSet {
    pub key_length: u32,
    pub intervals: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A chain with all its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelChain {
    pub name: String,
    /// Type, hook number and priority of a base chain.
    pub hook: Option<(&'static str, u32, i32)>,
    pub rules: Vec<Rule>,
}

pub fn family_digit(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}

fn both() -> [Family; 2] {
    [Family::V4, Family::V6]
}

pub fn address_length(family: Family) -> u32 {
    match family {
        Family::V4 => 4,
        Family::V6 => 16,
    }
}

pub fn interface_key(name: &str) -> Vec<u8> {
    let mut key = name.as_bytes().to_vec();
    key.resize(16, 0);
    key
}

pub fn policy_chain_name(id: PolicyId, family: Family) -> String {
    format!("p{}-{id}", family_digit(family))
}

pub fn chain_name(id: ChainId, family: Family) -> String {
    format!("c{}-{id}", family_digit(family))
}

/// Builds the rules of one family.
#[derive(Debug, Clone, Copy)]
pub struct Render<'a> {
    pub config: &'a Config,
    pub family: Family,
}

/// The state of judging a direction, in two bits of the packet's mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    None = 0b00,
    Allow = 0b01,
    Pass = 0b10,
    Leave = 0b11,
}

impl Render<'_> {
    fn set_mark(self, mark: Mark) -> [Expression; 3] {
        let mask = self.config.packet_mark_mask();
        [
            Expression::LoadMeta { key: Meta::Mark, register: R1 },
            Expression::Bitwise {
                register: R1,
                mask: (!mask).to_ne_bytes().to_vec(),
                xor: self.config.packet_mark(mark as u32).to_ne_bytes().to_vec(),
            },
            Expression::SetMeta { key: Meta::Mark, register: R1 },
        ]
    }

    /// The masked mark compared with a value.
    fn mark_is(self, operator: Compare, mask: u32, mark: Mark) -> [Expression; 3] {
        [
            Expression::LoadMeta { key: Meta::Mark, register: R1 },
            Expression::Bitwise {
                register: R1,
                mask: self.config.packet_mark(mask).to_ne_bytes().to_vec(),
                xor: vec![0; 4],
            },
            Expression::Compare {
                register: R1,
                operator,
                value: self.config.packet_mark(mark as u32 & mask).to_ne_bytes().to_vec(),
            },
        ]
    }

    fn icmp_protocol(self) -> u8 {
        match self.family {
            Family::V4 => ICMP,
            Family::V6 => ICMP_V6,
        }
    }

    fn load_address(self, end: End, register: u32) -> Expression {
        let key = match self.family {
            Family::V4 => Ct::SourceV4,
            Family::V6 => Ct::SourceV6,
        };
        Expression::LoadCt { key, direction: Some(end.direction()), register }
    }

    fn address_in(self, way: &mut Rule, end: End, nets: &[(Vec<u8>, Vec<u8>)], invert: bool) {
        way.expressions.push(self.load_address(end, R1));
        way.in_intervals(address_length(self.family), nets.to_vec(), invert);
    }

    fn in_set(self, end: End, set: &str, invert: bool) -> [Expression; 2] {
        let set = SetName::Named(format!("{set}{}", family_digit(self.family)));
        [self.load_address(end, R1), Expression::Lookup { set, register: R1, invert }]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
}

impl End {
    /// An end is the source of its own direction: the connection's destination, after translation, is the source of
    /// what comes back.
    fn direction(self) -> Direction {
        match self {
            Self::Source => Direction::Original,
            Self::Destination => Direction::Reply,
        }
    }
}

impl Rule {
    /// Matches when the loaded value is in one of the intervals. An anonymous set is used only where it is needed: the kernel searches
    /// all sets for a free name.
    fn in_intervals(&mut self, key_length: u32, intervals: Vec<(Vec<u8>, Vec<u8>)>, invert: bool) {
        let compare = |operator, value: &[u8]| Expression::Compare { register: R1, operator, value: value.to_vec() };
        match (&intervals[..], invert) {
            ([(only, last)], false) if only == last => self.expressions.push(compare(Compare::Equal, only)),
            ([(only, last)], true) if only == last => self.expressions.push(compare(Compare::NotEqual, only)),
            ([(first, last)], false) => {
                self.expressions.extend([compare(Compare::AtLeast, first), compare(Compare::AtMost, last)]);
            }
            _ => {
                self.anonymous.push(AnonymousSet { key_length, intervals });
                let set = SetName::Anonymous(self.anonymous.len() - 1);
                self.expressions.push(Expression::Lookup { set, register: R1, invert });
            }
        }
    }
}

fn rule(expressions: impl IntoIterator<Item = Expression>) -> Rule {
    Rule { expressions: expressions.into_iter().collect(), anonymous: Vec::new() }
}

fn jump(chain: impl Into<String>) -> Expression {
    Expression::Verdict(Verdict::Jump(chain.into()))
}

fn goto(chain: &str) -> Expression {
    Expression::Verdict(Verdict::Goto(chain.into()))
}

fn compare_protocol(way: &mut Rule, operator: Compare, protocol: u8) {
    way.expressions.push(Expression::LoadCt { key: Ct::Protocol, direction: None, register: R1 });
    way.expressions.push(Expression::Compare { register: R1, operator, value: vec![protocol] });
}

fn port_in(way: &mut Rule, end: End, ranges: &[PortRange], invert: bool) {
    let key = Ct::ProtoSource;
    way.expressions.push(Expression::LoadCt { key, direction: Some(end.direction()), register: R1 });
    let bounds = ranges.iter().map(|range| (range.first.into(), range.last.into())).collect();
    way.in_intervals(2, sets::merged(bounds, 2), invert);
}
