//! What a dataplane reports of a rule set, as values.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{ChainId, EndpointId, PolicyId, SetId};

/// An object of a rule set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    Policy { id: PolicyId, name: Arc<str> },
    Set(SetId),
    Chain(ChainId),
    Endpoint(EndpointId),
}

/// Why the dataplane refused an object. An object that denies is in force instead.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rejection {
    /// The message of the dataplane's error.
    pub error: String,
    /// The set that was refused, where a policy is closed because of it.
    pub set: Option<SetId>,
}

/// An object that the dataplane refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub object: Object,
    pub rejection: Rejection,
}

/// What a probe found of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Finding {
    /// The hooks see its packets, on every address.
    Enforced,
    /// The first probe is under way.
    Pending,
    /// It does not answer on this address, so nothing is known.
    Silent(IpAddr),
    /// The address belongs to the node, so its packets are the node's.
    HostNetwork(IpAddr),
    /// It has several interfaces, whose names these are; only the one with its address is judged.
    SecondInterface(String),
    /// What it sends from this address to other pods does not pass the hooks.
    Bypassed(IpAddr),
    /// It is judged but for what it sends to services: the node balances them by IPVS, which takes packets past the hooks.
    Ipvs,
    /// A finding that this version does not know, of a pod that is not enforced.
    Unknown,
}

impl Finding {
    /// Whether policy is known not to act on the pod. Of a pod that does not answer nothing is known; a pod on the host's network is
    /// selected by no policy.
    pub fn is_error(&self) -> bool {
        match self {
            Self::Enforced | Self::Pending | Self::Silent(_) | Self::HostNetwork(_) => false,
            Self::SecondInterface(_) | Self::Bypassed(_) | Self::Ipvs | Self::Unknown => true,
        }
    }
}
