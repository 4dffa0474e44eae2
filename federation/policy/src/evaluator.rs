//! The evaluator of a member: the verdicts of [`crate::evaluate`] for the pods of one cluster, kept up to date change by
//! change.
//!
//! Endpoints are in an [`IndexedInventory`], which the compiler uses too, so that they take no memory here. Policies are
//! stored once, with those that are staged. A *chain* is the list of rules that judge the pods which the same selectors
//! match, in one direction; it is built when a packet first needs it, and dropped when one of its policies changes. A
//! change of an endpoint touches no chain.
//!
//! Rules are evaluated by the reference's own code, over matches that the inventory has found already. Most rules that do
//! not match are skipped by their outline: protocol, port, and one selector or net for each end.
//!
//! Only directions of the local cluster's pods are judged: other clusters' own policies are not known. Pods that do not run
//! are unknown here; offline tools use [`crate::prepared`].

mod chain;
mod judge;
mod policies;
mod question;

pub use judge::Judge;
pub use policies::Evaluator;
