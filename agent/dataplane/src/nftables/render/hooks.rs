//! Chains that do not depend on policy: hooks, judging, verdicts and flow logging.

use hanse_ruleset::{Enforcement, Family, NodeConfig, PortRange, UnknownPods};

use super::sets::{Element, intervals};
use super::{
    End, ICMP, ICMP_V6, KernelChain, MARKED_ALLOWED, MARKED_DEAD, Mark, Render, Rule, address_length, both,
    compare_protocol, family_digit, goto, interface_key, jump, port_in, rule,
};
use crate::nftables::expression::{Compare, Ct, Direction, Expression, Meta, R1, R32, SetName, Verdict};
use crate::nftables::flows::{ALLOWED, COPIED_BYTES, CUT, CUT_IN_REPLY, DENIED, OBSERVED, OBSERVED_IN_REPLY};
use crate::nftables::{Config, Epoch};

/// The beginning of a probe's payload, and so of its answer: with the node's address, and with the address of another pod.
pub const PROBE_OWN: [u8; 8] = *b"hanse?\0n";
pub const PROBE_ACROSS: [u8; 8] = *b"hanse?\0p";
/// Rate limits of the log rules, per second: of allowed connections, and of denied or cut ones. Packets beyond them are counted.
const TOLD_ALLOWED: u32 = 10_000;
const TOLD_FORBIDDEN: u32 = 1_000;
/// The chains that log decisions.
const LOG_ALLOWED: &str = "log-allowed";
const LOG_DENIED: &str = "log-denied";
const LOG_CUT: &str = "log-cut";
/// The bit of `ct status` of a connection whose first packet has left the node.
const STATUS_CONFIRMED: u32 = 0x8;
/// Bits of `ct state`.
const STATE_INVALID: u32 = 0x1;
const STATE_ESTABLISHED: u32 = 0x2;
const STATE_RELATED: u32 = 0x4;
const STATE_NEW: u32 = 0x8;
const STATE_UNTRACKED: u32 = 0x40;
const TCP: u8 = 6;
const UDP: u8 = 17;
const IGMP: u8 = 2;
/// The chain for sources that do not identify the sender.
const NAMELESS: &str = "nameless";

impl Render<'_> {
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
            rules.extend(self.jump_to_endpoint(end, map));
        }
        rules.push(rule(self.set_mark(Mark::None).into_iter().chain([goto("allowed")])));
        KernelChain { name: format!("judge{}", family_digit(self.family)), hook: None, rules }
    }

    /// `tonode4`, `tonode6`: connections from pods to this node, in both directions.
    fn judge_to_node(self, node: &NodeConfig) -> KernelChain {
        let mut rules = self.own_streams(node);
        rules.extend(self.jump_to_endpoint(End::Source, "tonode"));
        rules.push(rule(self.set_mark(Mark::None).into_iter().chain([goto("allowed")])));
        KernelChain { name: format!("node{}", family_digit(self.family)), hook: None, rules }
    }

    /// Jumps to the chain of the endpoint at `end`. An endpoint of this node must return with Allow: while generations change, a packet
    /// may reach a chain that is still empty for it.
    fn jump_to_endpoint(self, end: End, map: &str) -> [Rule; 4] {
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

/// Chains that do not depend on policy, except those that set the epoch.
pub fn base_chains(config: &Config, node: &NodeConfig) -> Vec<KernelChain> {
    const PRE_ROUTING: u32 = 0;
    const INPUT: u32 = 1;
    const FORWARD: u32 = 2;
    const OUTPUT: u32 = 3;
    const RAW: i32 = -300;
    const FILTER: i32 = 0;
    let chain = |name: &str, rules| KernelChain { name: name.into(), hook: None, rules };
    let mut chains = verdict_chains(config, node.enforcement);
    if config.flows {
        chains.extend(log_chains(node.enforcement));
    }
    chains.push(chain(NAMELESS, nameless()));
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
    if node.enforcement == Enforcement::Observe {
        chains.iter_mut().flat_map(|chain| &mut chain.rules).for_each(let_pass);
    }
    chains
}

/// A rule that drops or resets accepts instead.
fn let_pass(rule: &mut Rule) {
    for expression in &mut rule.expressions {
        if matches!(expression, Expression::Verdict(Verdict::Drop) | Expression::TcpReset) {
            *expression = accept();
        }
    }
}

/// Drops packets from or to a member of one of the fixed `sets`. A packet without a connection has only its own addresses.
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

/// `prerouting`: drops forged sources of pods. An uplink may bring any source.
fn arrival() -> Vec<Rule> {
    let uplink = [
        Expression::LoadMeta { key: Meta::InputInterfaceName, register: R1 },
        Expression::Lookup { set: SetName::Named("uplinks".into()), register: R1, invert: false },
        accept(),
    ];
    // Discovery starts without an address, and ends at the node or on a bridge, which `forward` enforces.
    let discovery = neighbour_discovery().into_iter().chain([accept()]);
    let forged = [
        Expression::FibSourceInterface { register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: vec![0; 4] },
        Expression::Counter,
        Expression::Verdict(Verdict::Drop),
    ];
    let mut rules = vec![rule(from_loopback()), rule(uplink), rule(discovery), rule(forged)];
    // Every link has these sources, so they do not identify the sender: the kernel routes them back to any interface.
    rules.push(rule(family_is(Family::V4).into_iter().chain(begins_with(12, &[0; 4], 32)).chain([goto(NAMELESS)])));
    rules
        .push(rule(family_is(Family::V6).into_iter().chain(begins_with(8, &[0xfe, 0x80], 10)).chain([goto(NAMELESS)])));
    rules.extend(tunnels());
    for (probe, set) in [(PROBE_OWN, "answered"), (PROBE_ACROSS, "crossed")] {
        let noted = |family| rule(probe_answer(family, probe).into_iter().chain(note_source(family, set)));
        rules.extend(both().map(noted));
    }
    rules
}

/// Tunnel packets of pods: IPIP, VXLAN or Geneve (RFC 7348, RFC 8926; 8472 is Linux' port of VXLAN). None of these authenticates the
/// sender, and the inner packet could have any source.
fn tunnels() -> Vec<Rule> {
    const IPIP: u8 = 4;
    let drop = || [Expression::Counter, Expression::Verdict(Verdict::Drop)];
    let to_port = |port: u16| rule(protocol_is(UDP).into_iter().chain(to_port_is(port)).chain(drop()));
    [rule(protocol_is(IPIP).into_iter().chain(drop()))].into_iter().chain([4789, 8472, 6081].map(to_port)).collect()
}

fn to_port_is(port: u16) -> [Expression; 2] {
    [
        Expression::LoadPayload { base: 2, offset: 2, length: 2, register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: port.to_be_bytes().to_vec() },
    ]
}

/// Packets before a pod has its address, and of group management: DHCP, IGMP and MLD (RFC 2710, RFC 3810). All others need a pod's
/// address, by which they are judged.
fn nameless() -> Vec<Rule> {
    let kinds = |first, last| {
        let kind = [
            Expression::LoadPayload { base: 2, offset: 0, length: 1, register: R1 },
            Expression::Compare { register: R1, operator: Compare::AtLeast, value: vec![first] },
            Expression::Compare { register: R1, operator: Compare::AtMost, value: vec![last] },
        ];
        rule(protocol_is(ICMP_V6).into_iter().chain(kind).chain([accept()]))
    };
    let to_server = |port| rule(protocol_is(UDP).into_iter().chain(to_port_is(port)).chain([accept()]));
    vec![
        kinds(130, 132),
        kinds(143, 143),
        rule(protocol_is(IGMP).into_iter().chain([accept()])),
        to_server(67),
        to_server(547),
        rule([Expression::Counter, Expression::Verdict(Verdict::Drop)]),
    ]
}

/// Matches when the first `bits` at `offset` of the network header are those of `value`.
fn begins_with(offset: u32, value: &[u8], bits: usize) -> [Expression; 3] {
    let mask = (0..value.len()).map(|at| (0xff00_u16 >> bits.saturating_sub(8 * at).min(8)) as u8).collect();
    let length = value.len() as u32;
    [
        Expression::LoadPayload { base: 1, offset, length, register: R1 },
        Expression::Bitwise { register: R1, mask, xor: vec![0; value.len()] },
        Expression::Compare { register: R1, operator: Compare::Equal, value: value.to_vec() },
    ]
}

/// Multicast and broadcast of pods, whose receivers cannot be judged.
fn to_many(family: Family) -> Vec<Rule> {
    let groups: &[[Expression; 3]] = match family {
        Family::V4 => &[begins_with(16, &[0xe0], 4), begins_with(16, &[0xff; 4], 32)],
        Family::V6 => &[begins_with(24, &[0xff], 8)],
    };
    let of_ours = |group: &[Expression; 3], set: &str| {
        let set = SetName::Named(format!("{set}{}", family_digit(family)));
        let from = [load_source(family), Expression::Lookup { set, register: R1, invert: false }];
        let drop = [Expression::Counter, Expression::Verdict(Verdict::Drop)];
        rule(family_is(family).into_iter().chain(group.iter().cloned()).chain(from).chain(drop))
    };
    groups.iter().flat_map(|group| ["ranges", "pods"].map(|set| of_ours(group, set))).collect()
}

/// `forward`: all traffic of pods, except with their own node.
fn through_node(config: &Config) -> Vec<Rule> {
    // The answer was recorded when it arrived, and the pod whose address the probe had did not send it.
    let answered =
        |family| rule(probe_answer(family, PROBE_ACROSS).into_iter().chain([Expression::Verdict(Verdict::Drop)]));
    let mut rules: Vec<Rule> = both().map(answered).into();
    // Discovery is never routed, and routed packets have fewer hops. With all hops it is on a bridge.
    let all_hops = [
        Expression::LoadPayload { base: 1, offset: 7, length: 1, register: R1 },
        Expression::Compare { register: R1, operator: Compare::Equal, value: vec![255] },
        accept(),
    ];
    rules.push(rule(neighbour_discovery().into_iter().chain(all_hops)));
    rules
        .push(rule(neighbour_discovery().into_iter().chain([Expression::Counter, Expression::Verdict(Verdict::Drop)])));
    rules.extend(both().into_iter().flat_map(to_many));
    let unknown = state_is(STATE_INVALID | STATE_UNTRACKED);
    rules.extend(per_family(&unknown, "untracked"));
    rules.push(rule(unknown.into_iter().chain([accept()])));
    // A connection that a helper expected has its master's mark, but is judged by itself. An error about a connection shares both.
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
    // The direction of a connection that is picked up in the middle is unknown.
    rules.extend(per_family(&picked_up(), "untracked"));
    rules.extend(per_family(&[], "judge"));
    rules
}

/// `input`: packets to the node itself.
fn to_node() -> Vec<Rule> {
    let unknown = state_is(STATE_INVALID | STATE_UNTRACKED);
    // Packets of the node to itself, also resets to one of its sockets.
    let mut rules = vec![rule(from_loopback())];
    let discovery = state_is(STATE_UNTRACKED).into_iter().chain(protocol_is(ICMP_V6)).chain([accept()]);
    rules.push(rule(discovery));
    rules.extend(per_family(&unknown, "guarded"));
    rules.push(rule(unknown.into_iter().chain([accept()])));
    // Replies to connections of the node.
    rules.push(rule(direction_is(Direction::Reply).into_iter().chain([accept()])));
    rules.push(rule([jump("short")]));
    rules.extend(per_family(&[], "node"));
    rules
}

/// `output`: packets of the node itself.
fn from_node() -> Vec<Rule> {
    // Errors, and resets by these rules.
    let mut rules = vec![rule(state_is(STATE_RELATED).into_iter().chain([accept()]))];
    // The middle of a connection that a pod may have opened: a pod that may not reach the node must not be reached this way.
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

/// The first tracked packet of a TCP connection that is not its first packet.
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

/// The answer of a pod to a probe: an echo reply with the probe's payload.
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

/// The chains that set the epoch, whose only rule changes with each generation. They have no verdicts: the kernel accepts such rules
/// without checking the whole table for loops.
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
fn verdict_chains(config: &Config, enforcement: Enforcement) -> Vec<KernelChain> {
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
    let logging = |rule: Rule| Some(rule).filter(|_| config.flows);
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
                logging(rule(begins().into_iter().chain([jump(LOG_ALLOWED)]))),
                Some(rule([jump("note-allowed")])),
                Some(rule([Expression::Verdict(Verdict::Accept)])),
            ],
        ),
        chain(
            "deny",
            vec![
                Some(rule(begun.into_iter().chain([goto("forbid")]))),
                logging(rule([jump(LOG_DENIED)])),
                // The packets after the first one pass too, and are not logged again.
                (enforcement == Enforcement::Observe).then(|| rule([jump("note-dead")])),
                drop(),
            ],
        ),
        chain("undecided", vec![logging(rule(state_is(STATE_NEW).into_iter().chain([jump(LOG_DENIED)]))), drop()]),
        chain(
            "forbid",
            vec![
                // An error does not show the connection, which is logged and marked with its own next packet.
                logging(rule(error_about(ICMP))),
                logging(rule(error_about(ICMP_V6))),
                // A dead connection was logged when it was marked.
                logging(rule(ct_mark_is(was_allowed, was_allowed).chain([jump(LOG_CUT)]))),
                logging(rule(ct_mark_is(config.ct_mark_mask, 0).chain([jump(LOG_CUT)]))),
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

/// The chains that log decisions. Verdicts do not depend on them: packets over the limit are counted and return.
pub fn log_chains(enforcement: Enforcement) -> [KernelChain; 3] {
    let (denied, cut_groups) = match enforcement {
        Enforcement::Enforce => (DENIED, [CUT, CUT_IN_REPLY]),
        Enforcement::Observe => (OBSERVED, [OBSERVED, OBSERVED_IN_REPLY]),
    };

    let over =
        |per_second| rule([Expression::Over { per_second }, Expression::Counter, Expression::Verdict(Verdict::Return)]);
    let log = |group| Expression::Log { group, bytes: Some(COPIED_BYTES) };
    let cut = |direction, group| rule(direction_is(direction).into_iter().chain([log(group)]));
    // Expected by a helper, and not answered yet.
    let not_begun = rule(state_is(STATE_RELATED).into_iter().chain([goto(LOG_DENIED)]));
    let cut_either_way = [cut(Direction::Original, cut_groups[0]), cut(Direction::Reply, cut_groups[1])];
    [
        (LOG_ALLOWED, vec![over(TOLD_ALLOWED), rule([log(ALLOWED)])]),
        (LOG_DENIED, vec![over(TOLD_FORBIDDEN), rule([log(denied)])]),
        (LOG_CUT, [not_begun, over(TOLD_FORBIDDEN)].into_iter().chain(cut_either_way).collect()),
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

fn state_is(states: u32) -> [Expression; 3] {
    [
        Expression::LoadCt { key: Ct::State, direction: None, register: R1 },
        Expression::Bitwise { register: R1, mask: states.to_ne_bytes().to_vec(), xor: vec![0; 4] },
        Expression::Compare { register: R1, operator: Compare::NotEqual, value: vec![0; 4] },
    ]
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
