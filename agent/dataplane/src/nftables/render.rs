//! A rule set into nftables chains, sets and rules, as values: nothing here talks to the kernel.
//!
//! All policy is judged on the ends that connection tracking knows, in the connection's original direction, so the same
//! chains judge both directions of a connection, and an ICMP error is judged as the connection that it is about.

use std::collections::BTreeSet;
use std::net::IpAddr;

use hanse_ruleset::{
    Action, Chain, ChainId, Family, Icmp, LocalEndpoint, Members, NodeConfig, Peer, Policy, PolicyId, PortRange,
    Rule as PolicyRule, Set, SetId, SetKind, TierDefault, UnknownPods,
};
use ipnet::IpNet;

use super::expression::{Compare, Ct, Direction, Expression, Meta, R1, R32, SetName, Verdict};
use super::flows::{ALLOWED, COPIED_BYTES, CUT, CUT_IN_REPLY, DENIED};
use super::{Config, Epoch};

/// The flags of `NFTA_SET_FLAGS` that we use.
pub const INTERVAL: u32 = 0x4;
pub const MAP: u32 = 0x8;
/// Packets add to it: nobody's drift.
pub const DYNAMIC: u32 = 0x20;
/// The sets of one connection mark each, which says: judged under the present epoch.
const MARKED_ALLOWED: &str = "marked-allowed";
const MARKED_DEAD: &str = "marked-dead";
/// ICMP's and ICMPv6's protocol numbers.
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;
/// Protocols with ports: TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];
const TCP: u8 = 6;
/// How a probe's payload begins, and so what answers it: in the node's name, and in the name of another pod.
pub const PROBE_OWN: [u8; 8] = *b"hanse?\0n";
pub const PROBE_ACROSS: [u8; 8] = *b"hanse?\0p";
/// The group to which Log rules send packets.
const LOG_GROUP: u16 = 4738;
/// What is told of in a second: connections that are allowed, and those that are denied or cut. What is more is counted.
const TOLD_ALLOWED: u32 = 10_000;
const TOLD_FORBIDDEN: u32 = 1_000;
/// The chains that tell.
const TELL_ALLOWED: &str = "tell-allowed";
const TELL_DENIED: &str = "tell-denied";
const TELL_CUT: &str = "tell-cut";
/// The bit of `ct status` of a connection whose first packet has left the node.
const STATUS_CONFIRMED: u32 = 0x8;
/// Bits of `ct state`.
const STATE_INVALID: u32 = 0x1;
const STATE_ESTABLISHED: u32 = 0x2;
const STATE_RELATED: u32 = 0x4;
const STATE_NEW: u32 = 0x8;
const STATE_UNTRACKED: u32 = 0x40;

/// A rule with the sets that are its own.
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

/// An element of a named set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    Key(Vec<u8>),
    /// Both ends inclusive.
    Interval(Vec<u8>, Vec<u8>),
    Jump(Vec<u8>, String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetDefinition {
    pub name: String,
    pub flags: u32,
    pub key_length: u32,
    /// How people's tools show keys; the kernel does not look at it.
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

/// A chain with its rules, whole.
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

fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Nets of one family as intervals that neither overlap nor touch.
fn intervals(nets: impl Iterator<Item = IpNet>, family: Family) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut bounds: Vec<(u128, u128)> = nets
        .filter(|net| Family::of(net.addr()) == family)
        .map(|net| match net {
            IpNet::V4(net) => (u32::from(net.network()).into(), u32::from(net.broadcast()).into()),
            IpNet::V6(net) => (net.network().into(), net.broadcast().into()),
        })
        .collect();
    bounds.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::new();
    for (first, last) in bounds {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    let length = address_length(family) as usize;
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
            SetKind::Addresses => (0, address, kind),
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

/// The maps and sets that hold a node's own endpoints and ranges.
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

/// What one endpoint adds to the fixed sets: set name and element. `guarded`: its way to the node is judged.
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

    /// The chain of one endpoint direction with its phases and tiers: each a chain of its own, named by the whole.
    pub fn chain(self, id: ChainId, chain: &Chain) -> Vec<KernelChain> {
        let name = chain_name(id, self.family);
        let mut chains = Vec::new();
        let mut top = Vec::new();
        for (phase_index, phase) in chain.phases.iter().enumerate() {
            let phase_name = format!("{name}-{phase_index}");
            let mut phase_rules = Vec::new();
            for (tier_index, tier) in phase.tiers.iter().enumerate() {
                let tier_name = format!("{phase_name}-{tier_index}");
                let mut tier_rules = Vec::new();
                for policy in &tier.policies {
                    tier_rules.push(rule([jump(policy_chain_name(*policy, self.family))]));
                    let decided = self.mark_is(Compare::NotEqual, 0b11, Mark::None);
                    tier_rules.push(rule(decided.into_iter().chain([Expression::Verdict(Verdict::Return)])));
                }
                if tier.default == TierDefault::Deny {
                    tier_rules.push(rule([goto("deny")]));
                }
                chains.push(KernelChain { name: tier_name.clone(), hook: None, rules: tier_rules });
                phase_rules.push(rule([jump(tier_name)]));
                // Allow and Leave have the low bit; a Pass ends with its tier.
                let leaves = self.mark_is(Compare::NotEqual, 0b01, Mark::None);
                phase_rules.push(rule(leaves.into_iter().chain([Expression::Verdict(Verdict::Return)])));
                phase_rules.push(rule(self.set_mark(Mark::None)));
            }
            chains.push(KernelChain { name: phase_name.clone(), hook: None, rules: phase_rules });
            top.push(rule([jump(phase_name)]));
            let allowed = self.mark_is(Compare::Equal, 0b11, Mark::Allow);
            top.push(rule(allowed.into_iter().chain([Expression::Verdict(Verdict::Return)])));
            top.push(rule(self.set_mark(Mark::None)));
        }
        top.push(match chain.profile_allows {
            true => rule(self.set_mark(Mark::Allow)),
            false => rule([goto("deny")]),
        });
        chains.push(KernelChain { name, hook: None, rules: top });
        chains
    }

    /// One direction of one policy.
    pub fn policy(self, id: PolicyId, policy: &Policy) -> KernelChain {
        let mut rules = Vec::new();
        for policy_rule in &policy.rules {
            for matches in self.alternatives(policy_rule) {
                let mut kernel_rule = matches;
                kernel_rule.expressions.extend(self.action(policy_rule.action));
                rules.push(kernel_rule);
            }
        }
        KernelChain { name: policy_chain_name(id, self.family), hook: None, rules }
    }

    /// What stands in for a policy that the kernel refuses: whoever uses it is closed.
    pub fn closed_policy(self, id: PolicyId) -> KernelChain {
        KernelChain { name: policy_chain_name(id, self.family), hook: None, rules: vec![rule([goto("deny")])] }
    }

    fn action(self, action: Action) -> Vec<Expression> {
        let mark_and_return = |mark| {
            let mut expressions = self.set_mark(mark).to_vec();
            expressions.push(Expression::Verdict(Verdict::Return));
            expressions
        };
        match action {
            Action::Allow => mark_and_return(Mark::Allow),
            Action::Pass => mark_and_return(Mark::Pass),
            Action::Leave => mark_and_return(Mark::Leave),
            Action::Deny => vec![goto("deny")],
            Action::Log => vec![Expression::Log { group: LOG_GROUP, bytes: None }],
        }
    }

    /// The ways in which a rule can match: each a conjunction.
    fn alternatives(self, policy_rule: &PolicyRule) -> Vec<Rule> {
        if policy_rule.family.is_some_and(|family| family != self.family) {
            return Vec::new();
        }
        let mut ways = vec![Rule::default()];
        if let Some(protocol) = policy_rule.protocol {
            and(&mut ways, |way| compare_protocol(way, Compare::Equal, protocol));
        }
        if let Some(protocol) = policy_rule.not_protocol {
            and(&mut ways, |way| compare_protocol(way, Compare::NotEqual, protocol));
        }
        if let Some(icmp) = policy_rule.icmp {
            and(&mut ways, |way| {
                compare_protocol(way, Compare::Equal, self.icmp_protocol());
                compare_icmp(way, Compare::Equal, icmp);
            });
        }
        if let Some(icmp) = policy_rule.not_icmp {
            ways = self.not_icmp(ways, icmp);
        }
        let has_ports = policy_rule.protocol.is_some_and(|protocol| WITH_PORTS.contains(&protocol));
        for (peer, end) in [(&policy_rule.source, End::Source), (&policy_rule.destination, End::Destination)] {
            ways = self.peer(ways, peer, end, has_ports);
        }
        ways
    }

    fn icmp_protocol(self) -> u8 {
        match self.family {
            Family::V4 => ICMP,
            Family::V6 => ICMP_V6,
        }
    }

    fn not_icmp(self, ways: Vec<Rule>, icmp: Icmp) -> Vec<Rule> {
        let mut other = ways.clone();
        and(&mut other, |way| compare_protocol(way, Compare::NotEqual, self.icmp_protocol()));
        let mut kind = ways.clone();
        and(&mut kind, |way| {
            compare_protocol(way, Compare::Equal, self.icmp_protocol());
            compare_icmp(way, Compare::NotEqual, Icmp { code: None, ..icmp });
        });
        other.extend(kind);
        if let Some(code) = icmp.code {
            let mut with_other_code = ways;
            and(&mut with_other_code, |way| {
                compare_protocol(way, Compare::Equal, self.icmp_protocol());
                compare_icmp(way, Compare::Equal, Icmp { code: None, ..icmp });
                load_icmp(way);
                way.expressions.push(Expression::Bitwise { register: R1, mask: vec![0, 0xff], xor: vec![0, 0] });
                way.expressions.push(Expression::Compare {
                    register: R1,
                    operator: Compare::NotEqual,
                    value: vec![0, code],
                });
            });
            other.extend(with_other_code);
        }
        other
    }

    /// `has_ports`: the rule's protocol is one with ports.
    fn peer(self, mut ways: Vec<Rule>, peer: &Peer, end: End, has_ports: bool) -> Vec<Rule> {
        let family = self.family;
        if !peer.nets.is_empty() {
            let nets = intervals(peer.nets.iter().copied(), family);
            if nets.is_empty() {
                return Vec::new();
            }
            and(&mut ways, |way| self.address_in(way, end, &nets, false));
        }
        let not_nets = intervals(peer.not_nets.iter().copied(), family);
        if !not_nets.is_empty() {
            and(&mut ways, |way| self.address_in(way, end, &not_nets, true));
        }
        for any in &peer.in_sets {
            let mut next = Vec::new();
            for set in any {
                let mut with = ways.clone();
                and(&mut with, |way| self.address_in_set(way, end, *set, false));
                next.extend(with);
            }
            ways = next;
        }
        for set in &peer.not_sets {
            and(&mut ways, |way| self.address_in_set(way, end, *set, true));
        }
        for set in &peer.in_sockets {
            and(&mut ways, |way| self.socket_in_set(way, end, *set, false));
        }
        if !peer.ports.is_empty() || !peer.port_sets.is_empty() {
            let mut next = Vec::new();
            if !peer.ports.is_empty() {
                let mut with = ways.clone();
                and(&mut with, |way| {
                    if !has_ports {
                        protocol_with_ports(way, false);
                    }
                    port_in(way, end, &peer.ports, false);
                });
                next.extend(with);
            }
            for set in &peer.port_sets {
                let mut with = ways.clone();
                and(&mut with, |way| self.socket_in_set(way, end, *set, false));
                next.extend(with);
            }
            ways = next;
        }
        if !peer.not_ports.is_empty() {
            let mut without = if has_ports { Vec::new() } else { ways.clone() };
            and(&mut without, |way| protocol_with_ports(way, true));
            and(&mut ways, |way| {
                if !has_ports {
                    protocol_with_ports(way, false);
                }
                port_in(way, end, &peer.not_ports, true);
            });
            ways.extend(without);
        }
        for set in &peer.not_port_sets {
            and(&mut ways, |way| self.socket_in_set(way, end, *set, true));
        }
        ways
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

    fn address_in_set(self, way: &mut Rule, end: End, set: SetId, invert: bool) {
        way.expressions.push(self.load_address(end, R1));
        let set = SetName::Named(set_name(set, self.family));
        way.expressions.push(Expression::Lookup { set, register: R1, invert });
    }

    /// Protocols without ports have no socket in any set: their port is read as what the protocol has there, and the
    /// protocol is part of the key.
    fn socket_in_set(self, way: &mut Rule, end: End, set: SetId, invert: bool) {
        let words = address_length(self.family) / 4;
        way.expressions.push(self.load_address(end, R32));
        way.expressions.push(Expression::LoadCt { key: Ct::Protocol, direction: None, register: R32 + words });
        way.expressions.push(Expression::LoadCt {
            key: Ct::ProtoSource,
            direction: Some(end.direction()),
            register: R32 + words + 1,
        });
        let set = SetName::Named(set_name(set, self.family));
        way.expressions.push(Expression::Lookup { set, register: R32, invert });
    }

    fn in_set(self, end: End, set: &str, invert: bool) -> [Expression; 2] {
        let set = SetName::Named(format!("{set}{}", family_digit(self.family)));
        [self.load_address(end, R1), Expression::Lookup { set, register: R1, invert }]
    }

    /// `judge4`, `judge6`: packets that pass through the node.
    fn judge(self, node: &NodeConfig) -> KernelChain {
        let mut rules = self.own_streams(node);
        if node.unknown_pods == UnknownPods::Deny {
            for end in [End::Source, End::Destination] {
                let ranged = self.in_set(end, "ranges", false);
                rules.push(rule(ranged.into_iter().chain(self.in_set(end, "pods", true)).chain([goto("deny")])));
            }
        }
        let words = address_length(self.family) / 4;
        let itself = SetName::Named(format!("self{}", family_digit(self.family)));
        rules.push(rule([
            self.load_address(End::Source, R32),
            self.load_address(End::Destination, R32 + words),
            Expression::Lookup { set: itself, register: R32, invert: false },
            goto("allowed"),
        ]));
        for (end, map) in [(End::Source, "egress"), (End::Destination, "ingress")] {
            rules.extend(self.ask(end, map));
        }
        rules.push(rule(self.set_mark(Mark::None).into_iter().chain([goto("allowed")])));
        KernelChain { name: format!("judge{}", family_digit(self.family)), hook: None, rules }
    }

    /// `tonode4`, `tonode6`: connections from pods to this node, in both directions.
    fn judge_to_node(self, node: &NodeConfig) -> KernelChain {
        let mut rules = self.own_streams(node);
        rules.extend(self.ask(End::Source, "tonode"));
        rules.push(rule(self.set_mark(Mark::None).into_iter().chain([goto("allowed")])));
        KernelChain { name: format!("node{}", family_digit(self.family)), hook: None, rules }
    }

    /// Asks the chain of the endpoint at `end`. Whoever is one of ours must come back with Allow: while generations
    /// change, a chain may be reached that is still empty for this packet.
    fn ask(self, end: End, map: &str) -> [Rule; 4] {
        let map = format!("{map}{}", family_digit(self.family));
        let undecided = self.mark_is(Compare::NotEqual, 0b11, Mark::Allow);
        [
            rule(self.set_mark(Mark::None)),
            rule(self.in_set(end, "pods", true).into_iter().chain(self.set_mark(Mark::Allow))),
            rule([self.load_address(end, R1), Expression::VerdictMap { map, register: R1 }]),
            rule(undecided.into_iter().chain([goto("undecided")])),
        ]
    }

    fn own_streams(self, node: &NodeConfig) -> Vec<Rule> {
        let mut rules = Vec::new();
        for stream in &node.own_streams {
            let to = intervals(stream.to.iter().copied(), self.family);
            let from = intervals(stream.from.iter().copied(), self.family);
            if to.is_empty() || (from.is_empty() && !stream.from.is_empty()) {
                continue;
            }
            let mut way = Rule::default();
            compare_protocol(&mut way, Compare::Equal, stream.protocol);
            port_in(&mut way, End::Destination, &[PortRange { first: stream.port, last: stream.port }], false);
            self.address_in(&mut way, End::Destination, &to, false);
            if !from.is_empty() {
                self.address_in(&mut way, End::Source, &from, false);
            }
            way.expressions.push(goto("allowed"));
            rules.push(way);
        }
        rules
    }
}

/// Chains that do not change with policy, but for those that note the epoch.
pub fn base_chains(config: &Config, node: &NodeConfig) -> Vec<KernelChain> {
    const PRE_ROUTING: u32 = 0;
    const INPUT: u32 = 1;
    const FORWARD: u32 = 2;
    const OUTPUT: u32 = 3;
    const RAW: i32 = -300;
    const FILTER: i32 = 0;
    let chain = |name: &str, rules| KernelChain { name: name.into(), hook: None, rules };
    let mut chains = verdict_chains(config);
    if config.flows {
        chains.extend(telling_chains());
    }
    for family in both() {
        let render = Render { config, family };
        chains.push(render.judge(node));
        chains.push(render.judge_to_node(node));
        chains.push(chain(&format!("untracked{}", family_digit(family)), drop_addressed(family, &["ranges", "pods"])));
        chains.push(chain(&format!("guarded{}", family_digit(family)), drop_addressed(family, &["guarded"])));
    }
    for (name, hook, priority, rules) in [
        ("prerouting", PRE_ROUTING, RAW, arrival()),
        ("input", INPUT, FILTER, to_node()),
        ("forward", FORWARD, FILTER, through_node(config)),
        ("output", OUTPUT, FILTER, from_node()),
    ] {
        chains.push(KernelChain { name: name.into(), hook: Some(("filter", hook, priority)), rules });
    }
    chains
}

/// Drops what comes from or goes to a member of one of the fixed `sets`. Of a packet without a connection only its own
/// addresses are known.
fn drop_addressed(family: Family, sets: &[&str]) -> Vec<Rule> {
    let digit = family_digit(family);
    let ends = [load_source(family), load_destination(family)];
    let drop = |load: Expression, set: &&str| {
        let set = SetName::Named(format!("{set}{digit}"));
        let lookup = Expression::Lookup { set, register: R1, invert: false };
        rule([load, lookup, Expression::Counter, Expression::Verdict(Verdict::Drop)])
    };
    ends.into_iter().flat_map(|load| sets.iter().map(move |set| drop(load.clone(), set))).collect()
}

/// Both families' forms of a rule: `matches` and then a jump to the chain of the family.
fn per_family(matches: &[Expression], chain: &str) -> [Rule; 2] {
    both().map(|family| {
        let leap = jump(format!("{chain}{}", family_digit(family)));
        rule(family_is(family).into_iter().chain(matches.iter().cloned()).chain([leap]))
    })
}

fn accept() -> Expression {
    Expression::Verdict(Verdict::Accept)
}

fn from_loopback() -> [Expression; 3] {
    [
        Expression::LoadMeta { key: Meta::InputInterfaceName, register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: interface_key("lo") },
        accept(),
    ]
}

/// `prerouting`: no forged source comes from where pods are. An uplink is trusted with any source.
fn arrival() -> Vec<Rule> {
    let uplink = [
        Expression::LoadMeta { key: Meta::InputInterfaceName, register: R1 },
        Expression::Lookup { set: SetName::Named("uplinks".into()), register: R1, invert: false },
        accept(),
    ];
    // It starts without an address, and ends at the node or on a bridge: `forward` sees to that.
    let discovery = neighbour_discovery().into_iter().chain([accept()]);
    let forged = [
        Expression::FibSourceInterface { register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: vec![0; 4] },
        Expression::Counter,
        Expression::Verdict(Verdict::Drop),
    ];
    let mut rules = vec![rule(from_loopback()), rule(uplink), rule(discovery), rule(forged)];
    for (probe, set) in [(PROBE_OWN, "answered"), (PROBE_ACROSS, "crossed")] {
        let noted = |family| rule(probe_answer(family, probe).into_iter().chain(note_source(family, set)));
        rules.extend(both().map(noted));
    }
    rules
}

/// `forward`: whatever a pod exchanges with anybody but its own node.
fn through_node(config: &Config) -> Vec<Rule> {
    // It was noted when it arrived, and the pod in whose name we asked did not ask.
    let answered =
        |family| rule(probe_answer(family, PROBE_ACROSS).into_iter().chain([Expression::Verdict(Verdict::Drop)]));
    let mut rules: Vec<Rule> = both().map(answered).into();
    // Routed packets have lost a hop by now, and discovery is never routed. With all its hops it is on a bridge.
    let all_hops = [
        Expression::LoadPayload { base: 1, offset: 7, length: 1, register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: vec![255] },
        accept(),
    ];
    rules.push(rule(neighbour_discovery().into_iter().chain(all_hops)));
    rules
        .push(rule(neighbour_discovery().into_iter().chain([Expression::Counter, Expression::Verdict(Verdict::Drop)])));
    let unknown = state_is(STATE_INVALID | STATE_UNTRACKED);
    rules.extend(per_family(&unknown, "untracked"));
    rules.push(rule(unknown.into_iter().chain([accept()])));
    // A connection that a helper expected has its master's mark, but not its verdict; errors about one share both.
    for family in both() {
        let icmp = Render { config, family }.icmp_protocol();
        let other = [
            Expression::LoadMeta { key: Meta::TransportProtocol, register: R1 },
            Expression::Compare { register: R1, operator: Compare::NotEqual, value: vec![icmp] },
            jump(format!("judge{}", family_digit(family))),
        ];
        rules.push(rule(family_is(family).into_iter().chain(state_is(STATE_RELATED)).chain(other)));
    }
    rules.push(rule([jump("short")]));
    // A connection that is picked up in the middle cannot be judged in its direction.
    rules.extend(per_family(&picked_up(), "untracked"));
    rules.extend(per_family(&[], "judge"));
    rules
}

/// `input`: what comes to the node itself.
fn to_node() -> Vec<Rule> {
    let unknown = state_is(STATE_INVALID | STATE_UNTRACKED);
    // What the node says to itself; a reset of ours to one of its sockets too.
    let mut rules = vec![rule(from_loopback())];
    let discovery = state_is(STATE_UNTRACKED).into_iter().chain(protocol_is(ICMP_V6)).chain([accept()]);
    rules.push(rule(discovery));
    rules.extend(per_family(&unknown, "guarded"));
    rules.push(rule(unknown.into_iter().chain([accept()])));
    // What the node began is answered.
    rules.push(rule(direction_is(Direction::Reply).into_iter().chain([accept()])));
    rules.push(rule([jump("short")]));
    rules.extend(per_family(&[], "node"));
    rules
}

/// `output`: what the node itself sends.
fn from_node() -> Vec<Rule> {
    // Errors, and our own resets.
    let mut rules = vec![rule(state_is(STATE_RELATED).into_iter().chain([accept()]))];
    // The middle of a connection that a pod may have begun: who may not reach the node must not be reached by it that way.
    let invalid: Vec<Expression> = state_is(STATE_INVALID).into_iter().chain(protocol_is(TCP)).collect();
    rules.extend(per_family(&invalid, "guarded"));
    rules.push(rule(state_is(STATE_INVALID | STATE_UNTRACKED).into_iter().chain([accept()])));
    rules.extend(per_family(&picked_up(), "guarded"));
    rules.push(rule(direction_is(Direction::Original).into_iter().chain([accept()])));
    rules.push(rule([jump("short")]));
    rules.extend(per_family(&[], "node"));
    rules
}

fn direction_is(direction: Direction) -> [Expression; 2] {
    [
        Expression::LoadCt { key: Ct::Direction, direction: None, register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: vec![direction as u8] },
    ]
}

/// TCP that connection tracking sees for the first time, and not from its beginning.
fn picked_up() -> Vec<Expression> {
    const FIN_SYN_RST_ACK: u8 = 0x17;
    const SYN: u8 = 0x02;
    let flags = [
        Expression::LoadPayload { base: 2, offset: 13, length: 1, register: R1 },
        Expression::Bitwise { register: R1, mask: vec![FIN_SYN_RST_ACK], xor: vec![0] },
        Expression::Compare { register: R1, operator: Compare::NotEqual, value: vec![SYN] },
    ];
    state_is(STATE_NEW).into_iter().chain(protocol_is(TCP)).chain(flags).collect()
}

/// Router and neighbour solicitation and advertisement (RFC 4861).
fn neighbour_discovery() -> Vec<Expression> {
    let kinds = [
        Expression::LoadPayload { base: 2, offset: 0, length: 1, register: R1 },
        Expression::Compare { register: R1, operator: Compare::AtLeast, value: vec![133] },
        Expression::Compare { register: R1, operator: Compare::AtMost, value: vec![136] },
    ];
    protocol_is(ICMP_V6).into_iter().chain(kinds).collect()
}

/// What a pod answers to a probe of ours: an echo reply with the probe's payload.
fn probe_answer(family: Family, payload: [u8; 8]) -> Vec<Expression> {
    let (protocol, reply) = match family {
        Family::V4 => (ICMP, 0),
        Family::V6 => (ICMP_V6, 129),
    };
    let content = [
        Expression::LoadPayload { base: 2, offset: 0, length: 1, register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: vec![reply] },
        Expression::LoadPayload { base: 2, offset: 8, length: 8, register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: payload.to_vec() },
    ];
    family_is(family).into_iter().chain(protocol_is(protocol)).chain(content).collect()
}

/// Adds the packet's source to a set.
fn note_source(family: Family, set: &str) -> [Expression; 2] {
    let set = format!("{set}{}", family_digit(family));
    [load_source(family), Expression::AddToSet { set, register: R1 }]
}

fn load_source(family: Family) -> Expression {
    let (offset, length) = match family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    };
    Expression::LoadPayload { base: 1, offset, length, register: R1 }
}

fn load_destination(family: Family) -> Expression {
    let (offset, length) = match family {
        Family::V4 => (16, 4),
        Family::V6 => (24, 16),
    };
    Expression::LoadPayload { base: 1, offset, length, register: R1 }
}

/// The chains that note the epoch, whose only rule changes with each generation. Nothing in them ends a packet's way: such
/// rules the kernel accepts without walking the whole table for loops.
pub fn epoch_chains(config: &Config, epoch: Epoch) -> [KernelChain; 2] {
    [("note-allowed", true), ("note-dead", false)].map(|(name, allowed)| {
        let note = rule([
            Expression::LoadCt { key: Ct::Mark, direction: None, register: R1 },
            Expression::Bitwise {
                register: R1,
                mask: (!config.ct_mark_mask).to_ne_bytes().to_vec(),
                xor: config.ct_mark(epoch, allowed).to_ne_bytes().to_vec(),
            },
            Expression::SetCtMark { register: R1 },
        ]);
        KernelChain { name: name.into(), hook: None, rules: vec![note] }
    })
}

/// The marks of connections that are judged under `epoch`: set and element.
pub fn epoch_elements(config: &Config, epoch: Epoch) -> [(&'static str, Element); 2] {
    [(MARKED_ALLOWED, true), (MARKED_DEAD, false)]
        .map(|(set, allowed)| (set, Element::Key(config.ct_mark(epoch, allowed).to_ne_bytes().to_vec())))
}

/// `short` for connections that are already judged, `allowed` and `deny` for those that are now.
fn verdict_chains(config: &Config) -> Vec<KernelChain> {
    let chain = |name: &str, rules: Vec<Option<Rule>>| {
        let rules = rules.into_iter().flatten().collect();
        KernelChain { name: name.into(), hook: None, rules }
    };
    let marked = |set: &str| {
        let set = SetName::Named(set.into());
        let lookup = Expression::Lookup { set, register: R1, invert: false };
        load_ct_mark(config.ct_mark_mask).into_iter().chain([lookup])
    };
    let ct_mark_is = |mask: u32, mark: u32| {
        let compare =
            Expression::Compare { register: R1, operator: Compare::Equal, value: mark.to_ne_bytes().to_vec() };
        load_ct_mark(mask).into_iter().chain([compare])
    };
    let was_allowed = config.ct_mark(Epoch(0), true);
    let begun = state_is(STATE_ESTABLISHED | STATE_RELATED);
    let drop = || Some(rule([Expression::Counter, Expression::Verdict(Verdict::Drop)]));
    let telling = |rule: Rule| Some(rule).filter(|_| config.flows);
    vec![
        chain(
            "short",
            vec![
                Some(rule(marked(MARKED_ALLOWED).chain([Expression::Verdict(Verdict::Accept)]))),
                Some(rule(marked(MARKED_DEAD).chain([goto("dead")]))),
            ],
        ),
        chain(
            "allowed",
            vec![
                telling(rule(begins().into_iter().chain([jump(TELL_ALLOWED)]))),
                Some(rule([jump("note-allowed")])),
                Some(rule([Expression::Verdict(Verdict::Accept)])),
            ],
        ),
        chain(
            "deny",
            vec![Some(rule(begun.into_iter().chain([goto("forbid")]))), telling(rule([jump(TELL_DENIED)])), drop()],
        ),
        chain("undecided", vec![telling(rule(state_is(STATE_NEW).into_iter().chain([jump(TELL_DENIED)]))), drop()]),
        chain(
            "forbid",
            vec![
                // An error shows itself, not the connection: that is told, and marked, with its own next packet.
                telling(rule(error_about(ICMP))),
                telling(rule(error_about(ICMP_V6))),
                // What is dead already was told when it died.
                telling(rule(ct_mark_is(was_allowed, was_allowed).chain([jump(TELL_CUT)]))),
                telling(rule(ct_mark_is(config.ct_mark_mask, 0).chain([jump(TELL_CUT)]))),
                Some(rule([jump("note-dead")])),
                Some(rule([goto("dead")])),
            ],
        ),
        chain(
            "dead",
            vec![Some(rule(protocol_is(TCP).into_iter().chain([Expression::Counter, Expression::TcpReset]))), drop()],
        ),
    ]
}

/// The chains that tell what was decided. A verdict never depends on them: what is over a limit is counted, and returns.
pub fn telling_chains() -> [KernelChain; 3] {
    let over =
        |per_second| rule([Expression::Over { per_second }, Expression::Counter, Expression::Verdict(Verdict::Return)]);
    let log = |group| Expression::Log { group, bytes: Some(COPIED_BYTES) };
    let cut = |direction, group| rule(direction_is(direction).into_iter().chain([log(group)]));
    // What a helper expected, and nobody answered yet.
    let not_begun = rule(state_is(STATE_RELATED).into_iter().chain([goto(TELL_DENIED)]));
    let cut_either_way = [cut(Direction::Original, CUT), cut(Direction::Reply, CUT_IN_REPLY)];
    [
        (TELL_ALLOWED, vec![over(TOLD_ALLOWED), rule([log(ALLOWED)])]),
        (TELL_DENIED, vec![over(TOLD_FORBIDDEN), rule([log(DENIED)])]),
        (TELL_CUT, [not_begun, over(TOLD_FORBIDDEN)].into_iter().chain(cut_either_way).collect()),
    ]
    .map(|(name, rules)| KernelChain { name: name.into(), hook: None, rules })
}

/// The packet is the first of its connection, which the kernel confirms when it leaves the node.
fn begins() -> [Expression; 3] {
    [
        Expression::LoadCt { key: Ct::Status, direction: None, register: R1 },
        Expression::Bitwise { register: R1, mask: STATUS_CONFIRMED.to_ne_bytes().to_vec(), xor: vec![0; 4] },
        Expression::Compare { register: R1, operator: Compare::Equal, value: vec![0; 4] },
    ]
}

fn error_about(icmp: u8) -> Vec<Expression> {
    state_is(STATE_RELATED).into_iter().chain(protocol_is(icmp)).chain([goto("dead")]).collect()
}

fn load_ct_mark(mask: u32) -> [Expression; 2] {
    [
        Expression::LoadCt { key: Ct::Mark, direction: None, register: R1 },
        Expression::Bitwise { register: R1, mask: mask.to_ne_bytes().to_vec(), xor: vec![0; 4] },
    ]
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
    /// Whether what is loaded lies in one of the intervals. A set of the rule's own only where it must be: the kernel
    /// finds a name for each by looking at all others.
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

fn and(ways: &mut [Rule], add: impl Fn(&mut Rule)) {
    ways.iter_mut().for_each(add);
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

/// The packet's own protocol, which differs from the connection's for an ICMP error.
fn protocol_is(protocol: u8) -> [Expression; 2] {
    [
        Expression::LoadMeta { key: Meta::TransportProtocol, register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: vec![protocol] },
    ]
}

fn family_is(family: Family) -> [Expression; 2] {
    let number = match family {
        Family::V4 => 2,
        Family::V6 => 10,
    };
    [
        Expression::LoadMeta { key: Meta::NetfilterProtocol, register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: vec![number] },
    ]
}

fn state_is(states: u32) -> [Expression; 3] {
    [
        Expression::LoadCt { key: Ct::State, direction: None, register: R1 },
        Expression::Bitwise { register: R1, mask: states.to_ne_bytes().to_vec(), xor: vec![0; 4] },
        Expression::Compare { register: R1, operator: Compare::NotEqual, value: vec![0; 4] },
    ]
}

/// Type and code, which connection tracking keeps where other protocols have the destination port.
fn load_icmp(way: &mut Rule) {
    let direction = Some(Direction::Original);
    way.expressions.push(Expression::LoadCt { key: Ct::ProtoDestination, direction, register: R1 });
}

fn compare_icmp(way: &mut Rule, operator: Compare, icmp: Icmp) {
    load_icmp(way);
    let (mask, value) = match icmp.code {
        None => (vec![0xff, 0], vec![icmp.kind, 0]),
        Some(code) => (vec![0xff, 0xff], vec![icmp.kind, code]),
    };
    way.expressions.push(Expression::Bitwise { register: R1, mask, xor: vec![0, 0] });
    way.expressions.push(Expression::Compare { register: R1, operator, value });
}

fn protocol_with_ports(way: &mut Rule, invert: bool) {
    way.expressions.push(Expression::LoadCt { key: Ct::Protocol, direction: None, register: R1 });
    let protocols = WITH_PORTS.map(|protocol| (vec![protocol], vec![protocol]));
    way.in_intervals(1, protocols.to_vec(), invert);
}

fn port_in(way: &mut Rule, end: End, ranges: &[PortRange], invert: bool) {
    let key = Ct::ProtoSource;
    way.expressions.push(Expression::LoadCt { key, direction: Some(end.direction()), register: R1 });
    let mut sorted: Vec<(u16, u16)> = ranges.iter().map(|range| (range.first, range.last)).collect();
    sorted.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::new();
    for (first, last) in sorted {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    let bytes = |port: u16| port.to_be_bytes().to_vec();
    way.in_intervals(2, merged.into_iter().map(|(first, last)| (bytes(first), bytes(last))).collect(), invert);
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
