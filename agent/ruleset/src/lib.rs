//! Rule sets of nodes: the contract between the compiler of a member and the agent of a node.
//!
//! A [`RuleSet`] is a bag of objects: sets, policies, chains and endpoints. Policies and chains are named by their
//! content, so that what must change together always gets a new name. Sets are named by their meaning (their selector), because their contents may be one generation newer than the rules that use them. Three-valued matching
//! is already resolved here: a clause names the *certain* or the *possible* set of a selector, the one that fails closed.
//!
//! Pure: no I/O, no clock. [`evaluate()`] is the meaning; a backend must agree with it on every packet.

pub mod delta;
pub mod digest;
pub mod evaluate;
pub mod model;
pub mod report;

pub use delta::{ApplyError, Delta, Objects, SetChange, Step};
pub use digest::Digest;
pub use evaluate::{Hook, Outcome, Packet, Verdict, evaluate};
pub use model::{
    Action, Chain, ChainId, EndpointId, Enforcement, Family, Generation, Icmp, LocalEndpoint, Members, NodeConfig,
    OwnStream, Peer, Phase, Policy, PolicyId, PortRange, Rule, RuleSet, Set, SetId, SetKind, SocketAddress, Tier,
    TierDefault, UnknownPods,
};
pub use report::{Finding, Object, Refusal, Rejection};
