//! Puts a rule set into the kernel.
//!
//! [`Backend`] is what an agent needs of a dataplane; [`nftables::Nftables`] is the driver. What is promised: a
//! generation takes effect as a whole; what is in force stays when the agent stops; one that starts adopts what it finds;
//! what the kernel refuses is closed, named, and does not keep the rest out. See `README.md` for every chain and set.
//!
//! What is not done here: deciding what to enforce, and talking to anybody but the kernel.

// What others wrote is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod nftables;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use hanse_ruleset::{Digest, EndpointId, Generation, LocalEndpoint, RuleSet};

/// What was found in the kernel at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing of ours.
    Nothing,
    /// Rules of this generation and digest; they stay in force until something else is applied. `whole`: they are what was
    /// expected, as far as they were looked at.
    Rules { generation: Generation, digest: Digest, whole: bool },
}

/// What came of applying a generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Objects that the kernel refused, with the reason; what fails closed stands in their place.
    pub refused: Vec<Refusal>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `policy …`, `set …`, `chain …`, `endpoint …`.
    pub object: String,
    pub reason: String,
}

/// What a probe found of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// The hooks see its packets, on every address.
    Enforced,
    /// The address is one of the node itself, so its packets are the node's.
    HostNetwork(IpAddr),
    /// It has more than one way out, and only the one with its address is judged: their names.
    SecondInterface(String),
    /// It lives, but what it sends from this address to other pods passes by the hooks.
    Bypassed(IpAddr),
    /// It is judged but for what goes to services: the node balances them by IPVS, which takes packets past the hooks.
    Ipvs,
    /// It does not answer on this address, so nothing is known.
    Silent(IpAddr),
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Enforced => write!(f, "enforced"),
            Self::HostNetwork(address) => write!(f, "host network: {address} is an address of the node"),
            Self::SecondInterface(names) => {
                write!(f, "second interface: of {names} only the one with the pod's address is judged")
            }
            Self::Bypassed(address) => write!(
                f,
                "bypassed: what {address} sends to other pods does not pass the hooks (a bridge without br_netfilter, or a \
                 program that moves packets past them)"
            ),
            Self::Ipvs => write!(
                f,
                "services are not judged: kube-proxy runs in IPVS mode here; run it in nftables or iptables mode"
            ),
            Self::Silent(address) => write!(f, "not proven: {address} does not answer the probe"),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("talk to the kernel over netlink")]
    Io(#[source] std::io::Error),
    #[error("the kernel keeps refusing the rules: {0}")]
    Refused(String),
}

/// A dataplane. All calls are blocking; each is one transaction.
pub trait Backend: Send {
    /// What is in the kernel. With the rule set that it should hold (`expected`) and equal to it, later calls change only
    /// the difference.
    fn adopt(&mut self, expected: Option<&Arc<RuleSet>>) -> Result<Found, Error>;

    /// Makes `next` what is enforced. Connections that it may forbid are judged again with their next packet.
    fn apply(&mut self, next: &Arc<RuleSet>) -> Result<Applied, Error>;

    /// Puts back what someone else changed; whether anything was.
    fn repair(&mut self) -> Result<bool, Error>;

    /// Asks `endpoints` for packets that the hooks must see. A little later (answers within one machine take less than a
    /// millisecond, and a neighbour's answer before the first) [`Self::findings`] tells which were.
    fn probe(&mut self, endpoints: &[Arc<LocalEndpoint>]) -> Result<(), Error>;

    /// What the probe before found of `endpoints`, the ones that it asked.
    fn findings(&mut self, endpoints: &[Arc<LocalEndpoint>]) -> Result<BTreeMap<EndpointId, Finding>, Error>;

    /// Removes everything of ours.
    fn cleanup(&mut self) -> Result<(), Error>;
}
