//! Policies, and the chains of endpoints that evaluate them.

use hanse_ruleset::{
    Action, Chain, ChainId, Icmp, Peer, Policy, PolicyId, PortRange, Rule as PolicyRule, SetId, TierDefault,
};

use super::sets::{intervals, set_name};
use super::{
    End, KernelChain, Mark, Render, Rule, address_length, chain_name, compare_protocol, goto, jump, policy_chain_name,
    port_in, rule,
};
use crate::nftables::expression::{Compare, Ct, Direction, Expression, R1, R32, SetName, Verdict};

/// Protocols with ports: TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];
/// The group to which Log rules send packets.
const LOG_GROUP: u16 = 4738;

impl Render<'_> {
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

    /// Replaces a policy that the kernel refuses: it denies.
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
        let with_port_in = |way: &mut Rule, ports: &[PortRange], invert| {
            if !has_ports {
                protocol_with_ports(way, false);
            }
            port_in(way, end, ports, invert);
        };
        if !peer.ports.is_empty() || !peer.port_sets.is_empty() {
            let mut next = Vec::new();
            if !peer.ports.is_empty() {
                let mut with = ways.clone();
                and(&mut with, |way| with_port_in(way, &peer.ports, false));
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
            and(&mut ways, |way| with_port_in(way, &peer.not_ports, true));
            ways.extend(without);
        }
        for set in &peer.not_port_sets {
            and(&mut ways, |way| self.socket_in_set(way, end, *set, true));
        }
        ways
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
}

fn and(ways: &mut [Rule], add: impl Fn(&mut Rule)) {
    ways.iter_mut().for_each(add);
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
