//! What the exchange tells the administration API about clusters.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_store::Revision;

/// What is known of one cluster's publishing and enforcing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Realisation {
    /// It has a stream to this replica.
    pub connected: bool,
    /// Of what it publishes.
    pub epoch: u64,
    pub revision: u64,
    pub endpoints: u64,
    /// Whether what it holds of the others equals what was selected for it; none before it has said.
    pub digests_equal: Option<bool>,
    /// The hub's revision that the rule sets of all its nodes come from, and the one that it has received.
    pub enforced_revision: Revision,
    pub received_revision: Revision,
    pub agents: u32,
    pub agents_current: u32,
    /// Objects refused, and the first of them in words.
    pub refused: u64,
    pub refusals: Vec<String>,
    /// Pods that are not enforced.
    pub unenforced: u32,
    /// The first of what is wrong with its source and of what keeps nodes from enforcing, in words.
    pub problems: Vec<String>,
}

/// How far one policy is enforced in one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyState {
    Enforced,
    /// Who lags, in words.
    Lagging(String),
    /// Why it cannot be enforced as written.
    Refused(String),
}

/// The exchange, as far as status needs it.
pub trait Realisations: Send + Sync + 'static {
    /// Every cluster of which something is known.
    fn clusters(&self) -> BTreeMap<Arc<str>, Realisation>;

    /// The clusters that `policy` names, with how far it is enforced there; none when there is no such policy.
    fn policy(&self, policy: &str) -> Option<BTreeMap<Arc<str>, PolicyState>>;
}

/// Before the exchange runs, nothing is known.
#[derive(Debug, Clone, Copy, Default)]
pub struct NothingKnown;

impl Realisations for NothingKnown {
    fn clusters(&self) -> BTreeMap<Arc<str>, Realisation> {
        BTreeMap::new()
    }

    fn policy(&self, _policy: &str) -> Option<BTreeMap<Arc<str>, PolicyState>> {
        None
    }
}
