//! Policies and inventory in, per-node rule sets and a report out.
//!
//! [`Compiler`] has the state of one cluster as its member knows it. [`Compiler::apply`] applies one update and is cheap;
//! [`Compiler::commit`] brings the rule sets of all nodes up to date and returns what changed on each node. Nodes that
//! need the same chains share one profile, so that an update costs what it touches.
//!
//! Promises: the same state gives the same bytes, whatever the order and the number of commits. After any updates
//! the result is the one from nothing. Unknown never opens: rules name the certain or the possible members of a
//! selector, whichever fails closed.
//!
//! [`compile()`] compiles a whole state at once.
//!
//! Does not: read clocks, do I/O, number generations, encode anything.

mod chain;
mod change;
mod commit;
mod compiler;
mod ids;
mod node;
mod policies;
mod policy;
mod pool;
mod report;
mod rule;
mod tiers;
mod update;
mod whole;

pub use change::{Changes, NodeChange};
pub use compiler::Compiler;
pub use hanse_policy::indexed::ClusterRecord;
pub use report::{Direction, Ignored, PeerReport, PolicyReport, Reason, Report};
pub use update::Update;
pub use whole::{Compiled, Input, compile};
