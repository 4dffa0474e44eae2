//! Enforces a rule set in the kernel.
//!
//! [`Backend`] is the only interface between an agent and a dataplane: desired state goes in; observed state, findings and
//! decisions come out. [`nftables::Nftables`] is one backend. See `README.md` for every chain and set.
//!
//! Every backend guarantees: a generation takes effect as a whole; rules stay in force when the agent stops; an agent that
//! starts recognises them; an object that the kernel refuses is replaced by one that denies, is reported, and
//! does not affect other objects.

// Text of other programs is printed by `hanse_runtime::text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod decisions;
pub mod nftables;
mod settings;
mod uplinks;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

pub use decisions::{Decided, Decision, Decisions};
pub use settings::{Settings, SettingsError, Uplinks};

use hanse_ruleset::{Digest, EndpointId, Generation, LocalEndpoint, RuleSet, SetId};
pub use hanse_ruleset::{Finding, Object, Refusal, Rejection};

/// The rules in the kernel at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// No rules of Hanse.
    Nothing,
    /// Rules that were written for this generation and digest, which stay in force until others are applied. Another program may have
    /// changed them since.
    Rules { generation: Generation, digest: Digest },
}

/// The result of applying a generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    pub refused: Vec<Refusal>,
}

/// An address that the node itself learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LearnedAddress {
    pub address: IpAddr,
    /// From one second to one day; what is shorter or longer is set to it.
    pub time_to_live: Duration,
}

/// Why a backend failed. What was enforced before stays enforced.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The dataplane cannot be read or changed. Whether the last change took effect is not known.
    #[error("access the kernel's dataplane")]
    Access(#[source] io::Error),
    /// The dataplane refuses the rule set as a whole, also where every object that it refuses is replaced by one that denies.
    #[error("the kernel refuses the rule set: {0}")]
    Refused(String),
}

/// A dataplane. All calls block; each one is a transaction.
pub trait Backend: Send {
    /// Reads which rules are in force, and changes none. The next call that changes rules writes all of them in one transaction. Where the
    /// rules in force are those of `expected`, [`Self::repair`] restores them, and addresses that the node learned are kept.
    ///
    /// # Errors
    /// [`Error::Access`].
    fn adopt(&mut self, expected: Option<&Arc<RuleSet>>) -> Result<Found, Error>;

    /// Enforces `next`. Connections that it may forbid are judged again with their next packet.
    ///
    /// # Errors
    /// When nothing of `next` is in force.
    fn apply(&mut self, next: &Arc<RuleSet>) -> Result<Applied, Error>;

    /// Restores the rule set that was applied last where another program changed it, and cuts the connections of learned members
    /// that have ended. Returns whether there was drift.
    ///
    /// # Errors
    /// When it is not restored.
    fn repair(&mut self) -> Result<bool, Error>;

    /// Sends `endpoints` packets whose answers the hooks must see. [`Self::findings`] returns the result a little later: answers
    /// within one machine take less than a millisecond, and the first one of a new neighbour a few.
    ///
    /// # Errors
    /// When nothing can be sent.
    fn probe(&mut self, endpoints: &[Arc<LocalEndpoint>]) -> Result<(), Error>;

    /// The result of the last probe for `endpoints`, which must be those that it was sent to.
    ///
    /// # Errors
    /// When the answers cannot be read.
    fn findings(&mut self, endpoints: &[Arc<LocalEndpoint>]) -> Result<BTreeMap<EndpointId, Finding>, Error>;

    /// Listens to decisions. Rule sets that are adopted and applied afterwards report their decisions; without this call they do
    /// not.
    ///
    /// # Errors
    /// When the kernel does not support it; `ResourceBusy` or `PermissionDenied` while another process may be listening.
    fn decisions(&mut self) -> io::Result<Box<dyn Decisions>>;

    /// Adds addresses that the node itself learned to a set of kind Addresses, each until its time to live is over; those that are
    /// there already are extended. They match like compiled members, and are neither in the digest nor drift. A set keeps them across
    /// generations that have it, and they end with it. When members are added, and when members end, connections are judged again.
    ///
    /// Returns how many were not added: the set does not exist or is full, or the node is.
    ///
    /// # Errors
    /// When the dataplane does not have them yet; the next change writes them.
    fn learn(&mut self, set: SetId, members: &[LearnedAddress]) -> Result<usize, Error>;

    /// Removes every rule, and the connection marks that these rules gave, whatever the settings.
    ///
    /// # Errors
    /// When rules may be left.
    fn cleanup(&mut self) -> Result<(), Error>;
}
