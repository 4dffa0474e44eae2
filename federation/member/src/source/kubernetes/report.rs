//! What the tasks of a source report to it.

use super::collection::Collection;
use crate::source::Event;

/// The definition of one collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Definition {
    Absent,
    /// It is being deleted, and its objects with it.
    Terminating,
    Present {
        uid: String,
    },
}

/// What a task reports about a collection.
#[derive(Debug)]
pub enum Report {
    Events(Vec<Event>),
    State(Collection, State),
}

#[derive(Debug)]
pub enum State {
    /// A list is complete.
    Listed,
    /// The API server has answered.
    Alive,
    Failing(String),
    /// The definition of a custom collection.
    Definition(Definition),
}
