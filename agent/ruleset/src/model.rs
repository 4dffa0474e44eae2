//! The objects of a rule set.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// The version of a rule set. The term grows with each change of the leading member, so a higher term wins with any
/// number. Ordered by term, then number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation {
    pub term: u64,
    pub number: u64,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

id!(
    /// Names a set by its meaning: a hash of the canonical selector, its cluster scope, the kind and whether it has the
    /// certain or the possible members.
    SetId
);
id!(
    /// Names a policy by its content.
    PolicyId
);
id!(
    /// Names a chain by its content.
    ChainId
);

/// A pod of this node: structured, never joined.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// An address with a protocol number and a port: one named port of one pod, or one port of a service's backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketAddress {
    pub address: IpAddr,
    pub protocol: u8,
    pub port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetKind {
    /// Single addresses (a hash set in a backend).
    Addresses,
    /// Nets that may overlap (an interval set in a backend).
    Nets,
    /// Address, protocol and port.
    Sockets,
}

/// The members of a set: sorted, without duplicates, of both families.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Members {
    Addresses(BTreeSet<IpAddr>),
    Nets(BTreeSet<IpNet>),
    Sockets(BTreeSet<SocketAddress>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    pub id: SetId,
    pub members: Members,
}

impl Set {
    pub fn kind(&self) -> SetKind {
        match self.members {
            Members::Addresses(_) => SetKind::Addresses,
            Members::Nets(_) => SetKind::Nets,
            Members::Sockets(_) => SetKind::Sockets,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Ends the direction: the packet may pass.
    Allow,
    /// Ends everything: the packet is dropped.
    Deny,
    /// Leaves the tier.
    Pass,
    /// Leaves the phase. This is what a federated Allow becomes where the cluster has not granted `federatedAllow: Final`:
    /// the remaining tiers of the phase are skipped and the next phase decides.
    Leave,
    /// Logs the packet and continues.
    Log,
}

/// Both ends inclusive, `first <= last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Icmp {
    pub kind: u8,
    pub code: Option<u8>,
}

/// Conditions on one end of a packet, all of which must be met.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Peer {
    /// The address is in one of these; empty: no condition.
    pub nets: Vec<IpNet>,
    /// The address is in none of these.
    pub not_nets: Vec<IpNet>,
    /// For every inner list the address is in at least one of its sets (kinds Addresses and Nets). The inner list is the
    /// parts of one selector; an empty inner list never matches.
    pub in_sets: Vec<Vec<SetId>>,
    /// The address is in none of these sets (kinds Addresses and Nets).
    pub not_sets: Vec<SetId>,
    /// The (address, protocol, port) is in every one of these sets (kind Sockets): service matches with ports.
    pub in_sockets: Vec<SetId>,
    /// The port is in one of these ranges *or* (address, protocol, port) is in one of `port_sets`. No condition when
    /// both are empty. Only TCP (6), UDP (17), UDP-Lite (136), SCTP (132) and DCCP (33) have ports; others do not match.
    pub ports: Vec<PortRange>,
    /// Named ports (kind Sockets); see `ports`.
    pub port_sets: Vec<SetId>,
    /// The port is in none of these ranges. A packet without ports satisfies it.
    pub not_ports: Vec<PortRange>,
    /// (address, protocol, port) is in none of these sets (kind Sockets).
    pub not_port_sets: Vec<SetId>,
}

/// A rule matches when all its conditions are met.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    pub action: Action,
    /// Zero-based index in the source policy's list of this direction; several compiled rules may share one.
    pub index: u32,
    /// This rule denies because a match of its source rule is unknown, not because the source rule has action Deny.
    pub unknown: bool,
    pub family: Option<Family>,
    pub protocol: Option<u8>,
    pub not_protocol: Option<u8>,
    pub icmp: Option<Icmp>,
    pub not_icmp: Option<Icmp>,
    pub source: Peer,
    pub destination: Peer,
}

/// One direction of one policy, in its rules' order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Policy {
    /// For people and for the ack: `kind namespace/name`, with the tier in the chain.
    pub name: Arc<str>,
    pub rules: Vec<Rule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TierDefault {
    Deny,
    Pass,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tier {
    pub name: Arc<str>,
    /// In order. Never empty: a tier without a policy that applies in this direction is absent.
    pub policies: Vec<PolicyId>,
    /// What happens when no policy of the tier decided.
    pub default: TierDefault,
}

/// Tiers that [`Action::Leave`] skips together: federated Guard, local, federated Baseline.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Phase {
    pub name: Arc<str>,
    pub tiers: Vec<Tier>,
}

/// What judges one direction of an endpoint, shared by all endpoints that are judged alike. When no phase decided,
/// `profile` does.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chain {
    pub phases: Vec<Phase>,
    /// `true`: allow (what Kubernetes profiles give); `false`: deny.
    pub profile_allows: bool,
}

/// A pod on this node that policy judges (never a host-network or an ended one).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalEndpoint {
    pub id: EndpointId,
    /// Sorted; an address belongs to at most one endpoint of a rule set.
    pub addresses: Vec<IpAddr>,
    pub ingress: ChainId,
    pub egress: ChainId,
    /// Egress to this node's own addresses: without Kubernetes NetworkPolicy, which never denies that.
    pub egress_to_node: ChainId,
}

/// One of Hanse's own streams, or DNS to be kept: accepted before every tier, in its original direction.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnStream {
    pub name: Arc<str>,
    /// Where it starts; empty is anywhere.
    pub from: Vec<IpNet>,
    /// Where it ends; never empty.
    pub to: Vec<IpNet>,
    pub protocol: u8,
    pub port: u16,
}

/// The verdict for an address of the node's pod ranges that belongs to no endpoint of the rule set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum UnknownPods {
    /// Deny both ways, except with the pod's own node: a new pod is not open before its rules arrive.
    #[default]
    Deny,
    Allow,
}

/// What happens to a packet that is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Enforcement {
    #[default]
    Enforce,
    /// It is logged, and passes.
    Observe,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NodeConfig {
    /// The ranges from which this node's pods get their addresses.
    pub pod_ranges: Vec<IpNet>,
    /// All addresses of this node.
    pub node_addresses: Vec<IpAddr>,
    pub unknown_pods: UnknownPods,
    pub enforcement: Enforcement,
    pub own_streams: Vec<OwnStream>,
}

/// Everything that one node must enforce.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuleSet {
    pub generation: Generation,
    /// The hub revision that this was compiled from; 0 without a hub.
    pub hub_revision: u64,
    /// The revision of the member's own source that this was compiled from.
    pub local_revision: u64,
    pub node: NodeConfig,
    pub sets: BTreeMap<SetId, Arc<Set>>,
    pub policies: BTreeMap<PolicyId, Arc<Policy>>,
    pub chains: BTreeMap<ChainId, Arc<Chain>>,
    pub endpoints: BTreeMap<EndpointId, Arc<LocalEndpoint>>,
}
