//! Rule sets on the wire: between `hanse.agent.v1` and the types of `hanse-ruleset`, both ways.
//!
//! A delta is sent as Begin, parts of bounded size, End. An error of conversion names the field.

pub mod reason;

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use hanse_proto::agent::v1 as wire;
use hanse_ruleset as rules;
use hanse_ruleset::{Delta, Digest, Members, SetChange};
use ipnet::IpNet;

/// Set members of one part: at most 40 bytes each, so at most 400 KiB.
const MEMBERS_PER_PART: usize = 10_000;
/// Bytes of objects after which a part is closed: with the largest object (1,024 rules of about 500 bytes) it stays
/// below the 1 MiB of a message.
const PART_BYTES: usize = 400 * 1024;
/// Objects of one delta that a receiver takes: a node's 1,000,000 set members and 100,000 rules.
const MAX_PARTS: usize = 1_000;
/// Flows of one message, which agents send and members accept. With about 100 bytes each 200 KiB.
pub const MAX_FLOWS: usize = 2_000;

/// Why a message is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("{0} is missing or unknown")]
    Missing(&'static str),
    #[error("{0} is out of range")]
    Range(&'static str),
    #[error("{0} is out of order")]
    Order(&'static str),
    #[error("the delta has more than {MAX_PARTS} parts")]
    TooLarge,
}

pub fn generation(from: rules::Generation) -> wire::Generation {
    wire::Generation { term: from.term, number: from.number }
}

pub fn parse_generation(from: Option<wire::Generation>) -> rules::Generation {
    from.map_or_else(Default::default, |it| rules::Generation { term: it.term, number: it.number })
}

pub fn digest(from: Digest) -> Bytes {
    Bytes::copy_from_slice(&from.0.to_be_bytes())
}

pub fn parse_digest(from: &[u8]) -> Result<Digest, WireError> {
    let bytes = from.try_into().map_err(|_| WireError::Range("digest"))?;
    Ok(Digest(u128::from_be_bytes(bytes)))
}

/// The feature of agents that drop nothing if the rule set says so: others would enforce it.
const OBSERVE: &str = "observe";
const FEATURES: [&str; 1] = [OBSERVE];

/// The messages of a delta.
pub fn encode(delta: &Delta) -> Vec<wire::MemberToAgent> {
    use wire::member_to_agent::Message;
    let begin = wire::Begin {
        base: delta.base.map(digest).unwrap_or_default(),
        digest: digest(delta.digest),
        generation: Some(generation(delta.generation)),
        revisions: Some(wire::Revisions { hub: delta.hub_revision, local: delta.local_revision }),
        node: delta.node.as_ref().map(node),
        features: delta.node.as_ref().map(features_of).unwrap_or_default(),
    };
    let mut parts = Parts::default();
    for set in &delta.sets {
        parts.set(set);
    }
    for (id, change) in &delta.set_changes {
        parts.change(*id, change);
    }
    for policy in &delta.policies {
        let policy = wire::Policy { name: policy.name.to_string(), rules: policy.rules.iter().map(rule).collect() };
        parts.room(prost_len(&policy)).policies.push(policy);
    }
    for it in &delta.chains {
        let chain = chain(it);
        parts.room(prost_len(&chain)).chains.push(chain);
    }
    for it in &delta.endpoints {
        let endpoint = endpoint(it);
        parts.room(prost_len(&endpoint)).endpoints.push(endpoint);
    }
    for id in &delta.removed_sets {
        parts.room(18).removed_sets.push(id16(id.0));
    }
    for id in &delta.removed_policies {
        parts.room(18).removed_policies.push(id16(id.0));
    }
    for id in &delta.removed_chains {
        parts.room(18).removed_chains.push(id16(id.0));
    }
    for id in &delta.removed_endpoints {
        parts.room(64).removed_endpoints.push(endpoint_name(id));
    }
    let parts = parts.done.into_iter().chain([parts.open]);
    let messages =
        [Message::Begin(begin)].into_iter().chain(parts.map(Message::Part)).chain([Message::End(wire::End {})]);
    messages.map(|message| wire::MemberToAgent { message: Some(message) }).collect()
}

fn prost_len(message: &impl prost::Message) -> usize {
    message.encoded_len()
}

#[derive(Default)]
struct Parts {
    done: Vec<wire::Part>,
    open: wire::Part,
    bytes: usize,
}

impl Parts {
    /// The part with room for `bytes` more.
    fn room(&mut self, bytes: usize) -> &mut wire::Part {
        if self.bytes > 0 && self.bytes + bytes > PART_BYTES {
            self.done.push(std::mem::take(&mut self.open));
            self.bytes = 0;
        }
        self.bytes += bytes;
        &mut self.open
    }

    fn set(&mut self, set: &rules::Set) {
        use wire::set::Members as Wire;
        let id = || id16(set.id.0);
        let empty = match &set.members {
            Members::Addresses(_) => Wire::Addresses(wire::Addresses::default()),
            Members::Nets(_) => Wire::Nets(wire::Nets::default()),
            Members::Sockets(_) => Wire::Sockets(wire::Sockets::default()),
        };
        self.room(24).sets.push(wire::Set { id: id(), members: Some(empty) });
        let change = match &set.members {
            Members::Addresses(members) => {
                SetChange::Addresses { add: members.iter().copied().collect(), remove: Vec::new() }
            }
            Members::Nets(members) => SetChange::Nets { add: members.iter().copied().collect(), remove: Vec::new() },
            Members::Sockets(members) => {
                SetChange::Sockets { add: members.iter().copied().collect(), remove: Vec::new() }
            }
        };
        self.change(set.id, &change);
    }

    fn change(&mut self, id: rules::SetId, change: &SetChange) {
        use wire::set_change::Change;
        let mut push = |bytes: usize, change: Change| {
            self.room(bytes).set_changes.push(wire::SetChange { id: id16(id.0), change: Some(change) });
        };
        match change {
            SetChange::Addresses { add, remove } => {
                for add in add.chunks(MEMBERS_PER_PART) {
                    let add: Vec<Bytes> = add.iter().copied().map(address).collect();
                    push(add.len() * 18, Change::Addresses(wire::AddressChange { add, remove: Vec::new() }));
                }
                for remove in remove.chunks(MEMBERS_PER_PART) {
                    let remove: Vec<Bytes> = remove.iter().copied().map(address).collect();
                    push(remove.len() * 18, Change::Addresses(wire::AddressChange { add: Vec::new(), remove }));
                }
            }
            SetChange::Nets { add, remove } => {
                for add in add.chunks(MEMBERS_PER_PART) {
                    let add: Vec<wire::Net> = add.iter().copied().map(net).collect();
                    push(add.len() * 24, Change::Nets(wire::NetChange { add, remove: Vec::new() }));
                }
                for remove in remove.chunks(MEMBERS_PER_PART) {
                    let remove: Vec<wire::Net> = remove.iter().copied().map(net).collect();
                    push(remove.len() * 24, Change::Nets(wire::NetChange { add: Vec::new(), remove }));
                }
            }
            SetChange::Sockets { add, remove } => {
                for add in add.chunks(MEMBERS_PER_PART) {
                    let add: Vec<wire::Socket> = add.iter().copied().map(socket).collect();
                    push(add.len() * 28, Change::Sockets(wire::SocketChange { add, remove: Vec::new() }));
                }
                for remove in remove.chunks(MEMBERS_PER_PART) {
                    let remove: Vec<wire::Socket> = remove.iter().copied().map(socket).collect();
                    push(remove.len() * 28, Change::Sockets(wire::SocketChange { add: Vec::new(), remove }));
                }
            }
        }
    }
}

/// Assembles the messages of a delta.
#[derive(Debug, Default)]
pub struct Assembler {
    open: Option<(Delta, usize)>,
}

/// What a message completes.
#[derive(Debug)]
pub enum Assembled {
    /// More messages must follow.
    Nothing,
    Delta(Box<Delta>),
    Position {
        generation: rules::Generation,
        hub_revision: u64,
        local_revision: u64,
    },
}

impl Assembler {
    /// # Errors
    /// When a message is invalid; the delta in flight is dropped.
    pub fn receive(&mut self, message: wire::MemberToAgent) -> Result<Assembled, WireError> {
        use wire::member_to_agent::Message;
        match message.message.ok_or(WireError::Missing("message"))? {
            Message::Begin(begin) => {
                self.open = None;
                if begin.features.iter().any(|feature| !FEATURES.contains(&&**feature)) {
                    return Err(WireError::Missing("a feature that the delta needs"));
                }
                let revisions = begin.revisions.unwrap_or_default();
                let delta = Delta {
                    base: (!begin.base.is_empty()).then(|| parse_digest(&begin.base)).transpose()?,
                    digest: parse_digest(&begin.digest)?,
                    generation: parse_generation(begin.generation),
                    hub_revision: revisions.hub,
                    local_revision: revisions.local,
                    node: begin.node.map(parse_node).transpose()?,
                    ..Delta::default()
                };
                self.open = Some((delta, 0));
                Ok(Assembled::Nothing)
            }
            Message::Part(part) => {
                let (mut delta, parts) = self.open.take().ok_or(WireError::Order("part"))?;
                if parts >= MAX_PARTS {
                    return Err(WireError::TooLarge);
                }
                parse_part(part, &mut delta)?;
                self.open = Some((delta, parts + 1));
                Ok(Assembled::Nothing)
            }
            Message::End(wire::End {}) => {
                let (delta, _) = self.open.take().ok_or(WireError::Order("end"))?;
                Ok(Assembled::Delta(Box::new(delta)))
            }
            Message::Position(position) => {
                let revisions = position.revisions.unwrap_or_default();
                Ok(Assembled::Position {
                    generation: parse_generation(position.generation),
                    hub_revision: revisions.hub,
                    local_revision: revisions.local,
                })
            }
        }
    }
}

fn parse_part(part: wire::Part, delta: &mut Delta) -> Result<(), WireError> {
    for set in part.sets {
        use wire::set::Members as Wire;
        let members = match set.members.ok_or(WireError::Missing("set.members"))? {
            Wire::Addresses(members) => {
                Members::Addresses(members.addresses.iter().map(|it| parse_address(it)).collect::<Result<_, _>>()?)
            }
            Wire::Nets(members) => Members::Nets(parse_nets(members.nets)?.into_iter().collect()),
            Wire::Sockets(members) => {
                Members::Sockets(members.sockets.into_iter().map(parse_socket).collect::<Result<_, _>>()?)
            }
        };
        delta.sets.push(Arc::new(rules::Set { id: rules::SetId(parse_id(&set.id)?), members }));
    }
    for change in part.set_changes {
        use wire::set_change::Change;
        let id = rules::SetId(parse_id(&change.id)?);
        let addresses = |list: Vec<Bytes>| list.iter().map(|it| parse_address(it)).collect::<Result<Vec<_>, _>>();
        let sockets = |list: Vec<wire::Socket>| list.into_iter().map(parse_socket).collect::<Result<Vec<_>, _>>();
        let change = match change.change.ok_or(WireError::Missing("set_change.change"))? {
            Change::Addresses(it) => SetChange::Addresses { add: addresses(it.add)?, remove: addresses(it.remove)? },
            Change::Nets(it) => SetChange::Nets { add: parse_nets(it.add)?, remove: parse_nets(it.remove)? },
            Change::Sockets(it) => SetChange::Sockets { add: sockets(it.add)?, remove: sockets(it.remove)? },
        };
        delta.set_changes.push((id, change));
    }
    for policy in part.policies {
        let rules = policy.rules.into_iter().map(parse_rule).collect::<Result<_, _>>()?;
        delta.policies.push(Arc::new(rules::Policy { name: policy.name.into(), rules }));
    }
    for chain in part.chains {
        delta.chains.push(Arc::new(parse_chain(chain)?));
    }
    for endpoint in part.endpoints {
        delta.endpoints.push(Arc::new(rules::LocalEndpoint {
            id: parse_endpoint_name(endpoint.id.ok_or(WireError::Missing("endpoint.id"))?),
            addresses: endpoint.addresses.iter().map(|it| parse_address(it)).collect::<Result<_, _>>()?,
            ingress: rules::ChainId(parse_id(&endpoint.ingress)?),
            egress: rules::ChainId(parse_id(&endpoint.egress)?),
            egress_to_node: rules::ChainId(parse_id(&endpoint.egress_to_node)?),
        }));
    }
    for id in &part.removed_sets {
        delta.removed_sets.push(rules::SetId(parse_id(id)?));
    }
    for id in &part.removed_policies {
        delta.removed_policies.push(rules::PolicyId(parse_id(id)?));
    }
    for id in &part.removed_chains {
        delta.removed_chains.push(rules::ChainId(parse_id(id)?));
    }
    delta.removed_endpoints.extend(part.removed_endpoints.into_iter().map(parse_endpoint_name));
    Ok(())
}

fn id16(id: [u8; 16]) -> Bytes {
    Bytes::copy_from_slice(&id)
}

fn parse_id(bytes: &[u8]) -> Result<[u8; 16], WireError> {
    bytes.try_into().map_err(|_| WireError::Range("id"))
}

fn address(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
        IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
    }
}

fn parse_address(bytes: &[u8]) -> Result<IpAddr, WireError> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Ok(octets.into());
    }
    <[u8; 16]>::try_from(bytes).map(IpAddr::from).map_err(|_| WireError::Range("address"))
}

fn net(net: IpNet) -> wire::Net {
    wire::Net { address: address(net.network()), prefix: net.prefix_len().into() }
}

fn parse_net(net: wire::Net) -> Result<IpNet, WireError> {
    let prefix = u8::try_from(net.prefix).map_err(|_| WireError::Range("net.prefix"))?;
    let net = IpNet::new(parse_address(&net.address)?, prefix).map_err(|_| WireError::Range("net.prefix"))?;
    Ok(net.trunc())
}

pub fn nets(nets: &[IpNet]) -> Vec<wire::Net> {
    nets.iter().copied().map(net).collect()
}

/// # Errors
/// When an address has another length than 4 or 16 bytes, or a prefix is longer than it.
pub fn parse_nets(nets: Vec<wire::Net>) -> Result<Vec<IpNet>, WireError> {
    nets.into_iter().map(parse_net).collect()
}

fn socket(socket: rules::SocketAddress) -> wire::Socket {
    wire::Socket { address: address(socket.address), protocol: socket.protocol.into(), port: socket.port.into() }
}

fn parse_socket(socket: wire::Socket) -> Result<rules::SocketAddress, WireError> {
    Ok(rules::SocketAddress {
        address: parse_address(&socket.address)?,
        protocol: u8::try_from(socket.protocol).map_err(|_| WireError::Range("socket.protocol"))?,
        port: u16::try_from(socket.port).map_err(|_| WireError::Range("socket.port"))?,
    })
}

fn rule(rule: &rules::Rule) -> wire::Rule {
    let icmp = |icmp: rules::Icmp| wire::Icmp { r#type: icmp.kind.into(), code: icmp.code.map(u32::from) };
    let action = match rule.action {
        rules::Action::Allow => wire::Action::Allow,
        rules::Action::Deny => wire::Action::Deny,
        rules::Action::Pass => wire::Action::Pass,
        rules::Action::Leave => wire::Action::Leave,
        rules::Action::Log => wire::Action::Log,
    };
    let family = match rule.family {
        None => wire::Family::Any,
        Some(rules::Family::V4) => wire::Family::V4,
        Some(rules::Family::V6) => wire::Family::V6,
    };
    wire::Rule {
        action: action.into(),
        index: rule.index,
        unknown: rule.unknown,
        family: family.into(),
        protocol: rule.protocol.map(u32::from),
        not_protocol: rule.not_protocol.map(u32::from),
        icmp: rule.icmp.map(icmp),
        not_icmp: rule.not_icmp.map(icmp),
        source: Some(peer(&rule.source)),
        destination: Some(peer(&rule.destination)),
    }
}

fn parse_rule(rule: wire::Rule) -> Result<rules::Rule, WireError> {
    let byte = |value: u32, field| u8::try_from(value).map_err(|_| WireError::Range(field));
    let icmp = |icmp: wire::Icmp| -> Result<_, WireError> {
        let code = icmp.code.map(|code| byte(code, "icmp.code")).transpose()?;
        Ok(rules::Icmp { kind: byte(icmp.r#type, "icmp.type")?, code })
    };
    let action = match rule.action() {
        wire::Action::Allow => rules::Action::Allow,
        wire::Action::Deny => rules::Action::Deny,
        wire::Action::Pass => rules::Action::Pass,
        wire::Action::Leave => rules::Action::Leave,
        wire::Action::Log => rules::Action::Log,
        wire::Action::Unspecified => return Err(WireError::Missing("rule.action")),
    };
    let family = match wire::Family::try_from(rule.family).map_err(|_| WireError::Range("rule.family"))? {
        wire::Family::Any => None,
        wire::Family::V4 => Some(rules::Family::V4),
        wire::Family::V6 => Some(rules::Family::V6),
    };
    Ok(rules::Rule {
        action,
        index: rule.index,
        unknown: rule.unknown,
        family,
        protocol: rule.protocol.map(|it| byte(it, "rule.protocol")).transpose()?,
        not_protocol: rule.not_protocol.map(|it| byte(it, "rule.not_protocol")).transpose()?,
        icmp: rule.icmp.map(icmp).transpose()?,
        not_icmp: rule.not_icmp.map(icmp).transpose()?,
        source: parse_peer(rule.source.unwrap_or_default())?,
        destination: parse_peer(rule.destination.unwrap_or_default())?,
    })
}

fn peer(peer: &rules::Peer) -> wire::Peer {
    let sets = |sets: &[rules::SetId]| sets.iter().map(|set| id16(set.0)).collect::<Vec<_>>();
    let ports = |ports: &[rules::PortRange]| {
        let range = |range: &rules::PortRange| wire::PortRange { first: range.first.into(), last: range.last.into() };
        ports.iter().map(range).collect::<Vec<_>>()
    };
    wire::Peer {
        nets: nets(&peer.nets),
        not_nets: nets(&peer.not_nets),
        in_sets: peer.in_sets.iter().map(|any| wire::AnyOf { sets: sets(any) }).collect(),
        not_sets: sets(&peer.not_sets),
        in_sockets: sets(&peer.in_sockets),
        ports: ports(&peer.ports),
        port_sets: sets(&peer.port_sets),
        not_ports: ports(&peer.not_ports),
        not_port_sets: sets(&peer.not_port_sets),
    }
}

fn parse_peer(peer: wire::Peer) -> Result<rules::Peer, WireError> {
    let sets = |sets: &[Bytes]| sets.iter().map(|it| parse_id(it).map(rules::SetId)).collect::<Result<Vec<_>, _>>();
    let ports = |ports: Vec<wire::PortRange>| {
        let port = |port: u32| u16::try_from(port).map_err(|_| WireError::Range("port"));
        let range = |it: wire::PortRange| Ok(rules::PortRange { first: port(it.first)?, last: port(it.last)? });
        ports.into_iter().map(range).collect::<Result<Vec<_>, WireError>>()
    };
    Ok(rules::Peer {
        nets: parse_nets(peer.nets)?,
        not_nets: parse_nets(peer.not_nets)?,
        in_sets: peer.in_sets.iter().map(|any| sets(&any.sets)).collect::<Result<_, _>>()?,
        not_sets: sets(&peer.not_sets)?,
        in_sockets: sets(&peer.in_sockets)?,
        ports: ports(peer.ports)?,
        port_sets: sets(&peer.port_sets)?,
        not_ports: ports(peer.not_ports)?,
        not_port_sets: sets(&peer.not_port_sets)?,
    })
}

fn chain(chain: &rules::Chain) -> wire::Chain {
    let tier = |tier: &rules::Tier| wire::Tier {
        name: tier.name.to_string(),
        policies: tier.policies.iter().map(|policy| id16(policy.0)).collect(),
        default_deny: tier.default == rules::TierDefault::Deny,
    };
    let phase = |phase: &rules::Phase| wire::Phase {
        name: phase.name.to_string(),
        tiers: phase.tiers.iter().map(tier).collect(),
    };
    wire::Chain { phases: chain.phases.iter().map(phase).collect(), profile_allows: chain.profile_allows }
}

fn parse_chain(chain: wire::Chain) -> Result<rules::Chain, WireError> {
    let tier = |tier: wire::Tier| -> Result<_, WireError> {
        let policies = tier.policies.iter().map(|id| parse_id(id).map(rules::PolicyId)).collect::<Result<_, _>>()?;
        let default = if tier.default_deny { rules::TierDefault::Deny } else { rules::TierDefault::Pass };
        Ok(rules::Tier { name: tier.name.into(), policies, default })
    };
    let phase = |phase: wire::Phase| -> Result<_, WireError> {
        let tiers = phase.tiers.into_iter().map(tier).collect::<Result<_, _>>()?;
        Ok(rules::Phase { name: phase.name.into(), tiers })
    };
    let phases = chain.phases.into_iter().map(phase).collect::<Result<_, _>>()?;
    Ok(rules::Chain { phases, profile_allows: chain.profile_allows })
}

fn endpoint_name(id: &rules::EndpointId) -> wire::EndpointName {
    wire::EndpointName { namespace: id.namespace.to_string(), name: id.name.to_string() }
}

fn parse_endpoint_name(id: wire::EndpointName) -> rules::EndpointId {
    rules::EndpointId { namespace: id.namespace.into(), name: id.name.into() }
}

fn endpoint(endpoint: &rules::LocalEndpoint) -> wire::Endpoint {
    wire::Endpoint {
        id: Some(endpoint_name(&endpoint.id)),
        addresses: endpoint.addresses.iter().copied().map(address).collect(),
        ingress: id16(endpoint.ingress.0),
        egress: id16(endpoint.egress.0),
        egress_to_node: id16(endpoint.egress_to_node.0),
    }
}

fn node(node: &rules::NodeConfig) -> wire::Node {
    let stream = |stream: &rules::OwnStream| wire::OwnStream {
        name: stream.name.to_string(),
        from: nets(&stream.from),
        to: nets(&stream.to),
        protocol: stream.protocol.into(),
        port: stream.port.into(),
    };
    wire::Node {
        pod_ranges: nets(&node.pod_ranges),
        node_addresses: node.node_addresses.iter().copied().map(address).collect(),
        allow_unknown_pods: node.unknown_pods == rules::UnknownPods::Allow,
        own_streams: node.own_streams.iter().map(stream).collect(),
        observe: node.enforcement == rules::Enforcement::Observe,
    }
}

/// The features that an agent must have for a node's settings.
fn features_of(node: &rules::NodeConfig) -> Vec<String> {
    let observes = node.enforcement == rules::Enforcement::Observe;
    observes.then(|| OBSERVE.to_owned()).into_iter().collect()
}

fn parse_node(node: wire::Node) -> Result<rules::NodeConfig, WireError> {
    let stream = |stream: wire::OwnStream| -> Result<_, WireError> {
        Ok(rules::OwnStream {
            name: stream.name.into(),
            from: parse_nets(stream.from)?,
            to: parse_nets(stream.to)?,
            protocol: u8::try_from(stream.protocol).map_err(|_| WireError::Range("own_stream.protocol"))?,
            port: u16::try_from(stream.port).map_err(|_| WireError::Range("own_stream.port"))?,
        })
    };
    let unknown_pods = if node.allow_unknown_pods { rules::UnknownPods::Allow } else { rules::UnknownPods::Deny };
    Ok(rules::NodeConfig {
        pod_ranges: parse_nets(node.pod_ranges)?,
        node_addresses: node.node_addresses.iter().map(|it| parse_address(it)).collect::<Result<_, _>>()?,
        unknown_pods,
        enforcement: if node.observe { rules::Enforcement::Observe } else { rules::Enforcement::Enforce },
        own_streams: node.own_streams.into_iter().map(stream).collect::<Result<_, _>>()?,
    })
}
