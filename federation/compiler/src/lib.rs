//! Policies and inventory in, per-node rule sets and a report out.
//!
//! [`Compiler`] holds the state of one cluster as its member knows it. [`Compiler::apply`] takes one update and is cheap;
//! [`Compiler::commit`] brings the rule sets of all nodes up to date and says what changed: shared set members once, and
//! per node what it gains and loses. Nodes that need the same chains share one profile, so that an update costs what it
//! touches.
//!
//! Promises: the same state gives the same bytes, in whatever order and however many commits it came. After any updates
//! the result is the one from nothing. Unknown never opens: rules name the certain or the possible members of a
//! selector, whichever fails closed.
//!
//! [`compile()`] does the same for a state that is at hand whole.
//!
//! Does not: read clocks, do I/O, number generations, encode anything.

mod change;
mod commit;
mod compiler;
mod node;
mod policy;
mod pool;
mod report;
mod rule;
mod update;
mod whole;

pub use change::{Changes, NodeChange, Objects};
pub use compiler::Compiler;
pub use hanse_policy::indexed::ClusterRecord;
pub use report::{Direction, Ignored, PeerReport, PolicyReport, Reason, Report};
pub use update::Update;
pub use whole::{Compiled, Input, compile};
