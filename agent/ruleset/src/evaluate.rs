//! The reference evaluator of rule sets: slow and obvious.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{
    Action, Chain, ChainId, Enforcement, Family, Icmp, LocalEndpoint, Members, Peer, PortRange, Rule, RuleSet, SetId,
    SocketAddress, TierDefault, UnknownPods,
};

/// The original direction of a connection, between its ends after translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// 0 where the protocol has none.
    pub source_port: u16,
    pub destination_port: u16,
    /// Type and code, for ICMP and ICMPv6.
    pub icmp: Option<(u8, u8)>,
}

/// Where the packet is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hook {
    /// Through the node: between pods, or between a pod and elsewhere.
    Forward,
    /// From a pod to its own node.
    Input,
    /// From the node to its own pod: always passes.
    Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    Allow,
    Deny,
}

/// A verdict and the rules that led to it, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    pub trace: Vec<String>,
}

/// Judges a packet as a node with `rules` must.
pub fn evaluate(rules: &RuleSet, packet: &Packet, hook: Hook) -> Outcome {
    let mut trace = Vec::new();
    let mut verdict = judge(rules, packet, hook, &mut trace);
    if verdict == Verdict::Deny && rules.node.enforcement == Enforcement::Observe {
        trace.push("observed only".into());
        verdict = Verdict::Allow;
    }
    Outcome { verdict, trace }
}

fn judge(rules: &RuleSet, packet: &Packet, hook: Hook, trace: &mut Vec<String>) -> Verdict {
    let node = &rules.node;
    if hook == Hook::Output {
        trace.push("node to its own pod".into());
        return Verdict::Allow;
    }
    if hook == Hook::Input && node.node_addresses.contains(&packet.source) {
        trace.push("connection of the node itself".into());
        return Verdict::Allow;
    }
    for stream in &node.own_streams {
        let from = stream.from.is_empty() || stream.from.iter().any(|net| net.contains(&packet.source));
        let to = stream.to.iter().any(|net| net.contains(&packet.destination));
        if from && to && stream.protocol == packet.protocol && stream.port == packet.destination_port {
            trace.push(format!("own stream {}", stream.name));
            return Verdict::Allow;
        }
    }
    let holder = |address: IpAddr| rules.endpoints.values().find(|endpoint| endpoint.addresses.contains(&address));
    let (source, destination) = (holder(packet.source), holder(packet.destination));
    if node.unknown_pods == UnknownPods::Deny {
        for (address, is_endpoint) in [(packet.source, source.is_some()), (packet.destination, destination.is_some())] {
            let in_range = node.pod_ranges.iter().any(|net| net.contains(&address));
            let with_node = hook == Hook::Input;
            if in_range && !is_endpoint && !with_node {
                trace.push(format!("unknown pod {address}"));
                return Verdict::Deny;
            }
        }
    }
    if let (Some(a), Some(b)) = (source, destination)
        && a.id == b.id
    {
        trace.push("pod to itself".into());
        return Verdict::Allow;
    }
    let ends = [
        source.map(|endpoint| {
            (if hook == Hook::Input { endpoint.egress_to_node } else { endpoint.egress }, "egress", endpoint)
        }),
        destination.filter(|_| hook == Hook::Forward).map(|endpoint| (endpoint.ingress, "ingress", endpoint)),
    ];
    for (chain, direction, endpoint) in ends.into_iter().flatten() {
        if judge_chain(rules, chain, packet, direction, endpoint, trace) == Verdict::Deny {
            return Verdict::Deny;
        }
    }
    Verdict::Allow
}

fn judge_chain(
    rules: &RuleSet,
    chain: ChainId,
    packet: &Packet,
    direction: &str,
    endpoint: &LocalEndpoint,
    trace: &mut Vec<String>,
) -> Verdict {
    let at = format!("{direction} of {}/{}", endpoint.id.namespace, endpoint.id.name);
    let Some(chain): Option<&Arc<Chain>> = rules.chains.get(&chain) else {
        trace.push(format!("{at}: chain {chain} is missing"));
        return Verdict::Deny;
    };
    'phases: for phase in &chain.phases {
        'tiers: for tier in &phase.tiers {
            for policy in tier.policies.iter().filter_map(|id| rules.policies.get(id)) {
                for rule in &policy.rules {
                    if !matches(rules, rule, packet) {
                        continue;
                    }
                    trace.push(format!(
                        "{at}: {}/{} {} rule {} {:?}{}",
                        phase.name,
                        tier.name,
                        policy.name,
                        rule.index,
                        rule.action,
                        if rule.unknown { " (unknown)" } else { "" },
                    ));
                    match rule.action {
                        Action::Allow => return Verdict::Allow,
                        Action::Deny => return Verdict::Deny,
                        Action::Pass => continue 'tiers,
                        Action::Leave => continue 'phases,
                        Action::Log => {}
                    }
                }
            }
            trace.push(format!("{at}: {}/{} end of tier {:?}", phase.name, tier.name, tier.default));
            if tier.default == TierDefault::Deny {
                return Verdict::Deny;
            }
        }
    }
    trace.push(format!("{at}: profile"));
    if chain.profile_allows { Verdict::Allow } else { Verdict::Deny }
}

fn matches(rules: &RuleSet, rule: &Rule, packet: &Packet) -> bool {
    let icmp_matches = |icmp: Icmp| {
        let protocol = if packet.source.is_ipv4() { 1 } else { 58 };
        packet.protocol == protocol
            && packet
                .icmp
                .is_some_and(|(kind, code)| kind == icmp.kind && icmp.code.is_none_or(|wanted| wanted == code))
    };
    rule.family.is_none_or(|family| family == Family::of(packet.source))
        && rule.protocol.is_none_or(|protocol| protocol == packet.protocol)
        && rule.not_protocol.is_none_or(|protocol| protocol != packet.protocol)
        && rule.icmp.is_none_or(icmp_matches)
        && rule.not_icmp.is_none_or(|icmp| !icmp_matches(icmp))
        && peer_matches(rules, &rule.source, packet.source, packet.protocol, packet.source_port)
        && peer_matches(rules, &rule.destination, packet.destination, packet.protocol, packet.destination_port)
}

fn peer_matches(rules: &RuleSet, peer: &Peer, address: IpAddr, protocol: u8, port: u16) -> bool {
    let has_ports = matches!(protocol, 6 | 17 | 33 | 132 | 136);
    let in_set = |set: &SetId| match rules.sets.get(set).map(|set| &set.members) {
        Some(Members::Addresses(members)) => members.contains(&address),
        Some(Members::Nets(members)) => members.iter().any(|net| net.contains(&address)),
        Some(Members::Sockets(members)) => has_ports && members.contains(&SocketAddress { address, protocol, port }),
        None => false,
    };
    let in_ranges =
        |ranges: &[PortRange]| has_ports && ranges.iter().any(|range| range.first <= port && port <= range.last);
    let no_ports_named = peer.ports.is_empty() && peer.port_sets.is_empty();
    (peer.nets.is_empty() || peer.nets.iter().any(|net| net.contains(&address)))
        && !peer.not_nets.iter().any(|net| net.contains(&address))
        && peer.in_sets.iter().all(|any| any.iter().any(in_set))
        && !peer.not_sets.iter().any(in_set)
        && peer.in_sockets.iter().all(in_set)
        && (no_ports_named || in_ranges(&peer.ports) || peer.port_sets.iter().any(in_set))
        && !in_ranges(&peer.not_ports)
        && !peer.not_port_sets.iter().any(in_set)
}
