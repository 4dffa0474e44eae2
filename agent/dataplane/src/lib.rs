//! Puts a rule set into the kernel.
//!
//! [`Backend`] is what an agent needs of a dataplane; [`nftables::Nftables`] is the driver. What is promised: a
//! generation takes effect as a whole; what is in force stays when the agent stops; one that starts adopts what it finds;
//! what the kernel refuses is closed, named, and does not keep the rest out. See `README.md` for every chain and set.
//!
//! What is not done here: deciding what to enforce, and talking to anybody but the kernel.

pub mod nftables;

use std::sync::Arc;

use hanse_ruleset::{Digest, Generation, RuleSet};

/// What was found in the kernel at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing of ours.
    Nothing,
    /// Rules of this generation and digest; they stay in force until something else is applied.
    Rules { generation: Generation, digest: Digest },
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

    /// Removes everything of ours.
    fn cleanup(&mut self) -> Result<(), Error>;
}
