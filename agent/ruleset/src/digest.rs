//! Content names and the order-independent digest by which two sides know that they have the same state.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{
    Chain, ChainId, Enforcement, LocalEndpoint, Members, NodeConfig, Peer, Policy, PolicyId, RuleSet, Set, SetId,
    SocketAddress,
};

/// A sum, modulo 2^128, of the hashes of all objects: adding and removing one are each one operation, and the order does not
/// matter.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub u128);

impl Digest {
    pub fn add(&mut self, other: Digest) {
        self.0 = self.0.wrapping_add(other.0);
    }

    pub fn remove(&mut self, other: Digest) {
        self.0 = self.0.wrapping_sub(other.0);
    }

    /// The digest of one set member: the set's identity is part of it, so that members of two sets never cancel.
    pub fn of_address(set: SetId, member: IpAddr) -> Self {
        Hasher::new("address").bytes(&set.0).address(member).digest()
    }

    pub fn of_net(set: SetId, member: IpNet) -> Self {
        Hasher::new("net").bytes(&set.0).net(member).digest()
    }

    pub fn of_socket(set: SetId, member: SocketAddress) -> Self {
        Hasher::new("socket")
            .bytes(&set.0)
            .address(member.address)
            .number(member.protocol.into())
            .number(member.port.into())
            .digest()
    }

    /// An empty set counts too.
    pub fn of_set(set: &Set) -> Self {
        let mut sum = Hasher::new("set").bytes(&set.id.0).number(set.kind() as u64).digest();
        match &set.members {
            Members::Addresses(members) => members.iter().for_each(|m| sum.add(Self::of_address(set.id, *m))),
            Members::Nets(members) => members.iter().for_each(|m| sum.add(Self::of_net(set.id, *m))),
            Members::Sockets(members) => members.iter().for_each(|m| sum.add(Self::of_socket(set.id, *m))),
        }
        sum
    }

    pub fn of_policy(id: PolicyId) -> Self {
        Hasher::new("policy").bytes(&id.0).digest()
    }

    pub fn of_chain(id: ChainId) -> Self {
        Hasher::new("chain").bytes(&id.0).digest()
    }

    pub fn of_endpoint(endpoint: &LocalEndpoint) -> Self {
        let mut hasher = Hasher::new("endpoint").text(&endpoint.id.namespace).text(&endpoint.id.name);
        hasher = hasher.number(endpoint.addresses.len() as u64);
        for address in &endpoint.addresses {
            hasher = hasher.address(*address);
        }
        hasher.bytes(&endpoint.ingress.0).bytes(&endpoint.egress.0).bytes(&endpoint.egress_to_node.0).digest()
    }

    pub fn of_node(node: &NodeConfig) -> Self {
        let mut hasher = Hasher::new("node").nets(&node.pod_ranges).number(node.node_addresses.len() as u64);
        for address in &node.node_addresses {
            hasher = hasher.address(*address);
        }
        hasher = hasher.number(node.unknown_pods as u64).number(node.own_streams.len() as u64);
        for stream in &node.own_streams {
            hasher = hasher.text(&stream.name).nets(&stream.from).nets(&stream.to);
            hasher = hasher.number(stream.protocol.into()).number(stream.port.into());
        }
        // As before this setting existed, where it is not used.
        if node.enforcement == Enforcement::Observe {
            hasher = hasher.text("observe");
        }
        hasher.digest()
    }
}

impl RuleSet {
    /// The digest of all that is enforced; generation and revisions are not part of it.
    pub fn digest(&self) -> Digest {
        self.digest_with(self.sets.values().map(|set| Digest::of_set(set)))
    }

    /// As [`Self::digest`], where the digests of the sets are known already.
    pub fn digest_with(&self, sets: impl IntoIterator<Item = Digest>) -> Digest {
        let mut sum = Digest::of_node(&self.node);
        sets.into_iter().for_each(|set| sum.add(set));
        self.policies.keys().for_each(|id| sum.add(Digest::of_policy(*id)));
        self.chains.keys().for_each(|id| sum.add(Digest::of_chain(*id)));
        self.endpoints.values().for_each(|endpoint| sum.add(Digest::of_endpoint(endpoint)));
        sum
    }
}

impl Policy {
    /// The content name.
    pub fn id(&self) -> PolicyId {
        let mut hasher = Hasher::new("policy content").text(&self.name).number(self.rules.len() as u64);
        for rule in &self.rules {
            hasher = hasher
                .number(rule.action as u64)
                .number(rule.index.into())
                .number(rule.unknown.into())
                .number(rule.family.map_or(0, |family| family as u64 + 1))
                .optional(rule.protocol.map(u64::from))
                .optional(rule.not_protocol.map(u64::from));
            for icmp in [rule.icmp, rule.not_icmp] {
                hasher = hasher
                    .optional(icmp.map(|icmp| icmp.kind.into()))
                    .optional(icmp.and_then(|icmp| icmp.code).map(u64::from));
            }
            hasher = hasher.peer(&rule.source).peer(&rule.destination);
        }
        PolicyId(hasher.name())
    }
}

impl Chain {
    /// The content name.
    pub fn id(&self) -> ChainId {
        let mut hasher =
            Hasher::new("chain content").number(self.profile_allows.into()).number(self.phases.len() as u64);
        for phase in &self.phases {
            hasher = hasher.text(&phase.name).number(phase.tiers.len() as u64);
            for tier in &phase.tiers {
                hasher = hasher.text(&tier.name).number(tier.default as u64).number(tier.policies.len() as u64);
                for policy in &tier.policies {
                    hasher = hasher.bytes(&policy.0);
                }
            }
        }
        ChainId(hasher.name())
    }
}

impl SetId {
    /// Names a set by its meaning, a list of texts of which none runs into the next.
    pub fn of_meaning(parts: &[&str]) -> Self {
        let mut hasher = Hasher::new("set meaning").number(parts.len() as u64);
        for part in parts {
            hasher = hasher.text(part);
        }
        Self(hasher.name())
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// Every field goes in with its length or a fixed width, so that no two different contents give the same input. The input
/// is gathered first: hashing it at once costs a fraction of feeding the hash field by field.
struct Hasher(Vec<u8>);

impl Hasher {
    fn new(what: &str) -> Self {
        Self(Vec::with_capacity(128)).text(what)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn number(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    fn optional(self, number: Option<u64>) -> Self {
        match number {
            None => self.bytes(&[0]),
            Some(number) => self.bytes(&[1]).number(number),
        }
    }

    fn text(self, text: &str) -> Self {
        self.number(text.len() as u64).bytes(text.as_bytes())
    }

    fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.bytes(&[4]).bytes(&address.octets()),
            IpAddr::V6(address) => self.bytes(&[6]).bytes(&address.octets()),
        }
    }

    fn net(self, net: IpNet) -> Self {
        self.bytes(&[net.prefix_len()]).address(net.network())
    }

    fn nets(self, nets: &[IpNet]) -> Self {
        let hasher = self.number(nets.len() as u64);
        nets.iter().fold(hasher, |hasher, net| hasher.net(*net))
    }

    fn sets(self, sets: &[SetId]) -> Self {
        let hasher = self.number(sets.len() as u64);
        sets.iter().fold(hasher, |hasher, set| hasher.bytes(&set.0))
    }

    fn peer(self, peer: &Peer) -> Self {
        let mut hasher = self.nets(&peer.nets).nets(&peer.not_nets).number(peer.in_sets.len() as u64);
        for any in &peer.in_sets {
            hasher = hasher.sets(any);
        }
        hasher = hasher.sets(&peer.not_sets).sets(&peer.in_sockets);
        for ports in [&peer.ports, &peer.not_ports] {
            hasher = hasher.number(ports.len() as u64);
            for range in ports {
                hasher = hasher.number(range.first.into()).number(range.last.into());
            }
        }
        hasher.sets(&peer.port_sets).sets(&peer.not_port_sets)
    }

    fn name(self) -> [u8; 16] {
        let mut name = [0; 16];
        name.copy_from_slice(&blake3::hash(&self.0).as_bytes()[..16]);
        name
    }

    fn digest(self) -> Digest {
        Digest(u128::from_le_bytes(self.name()))
    }
}
