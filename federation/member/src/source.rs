//! Where a member reads its own cluster from.
//!
//! A [`Source`] reports changes of single objects, so that an edit costs what it touches. [`LastGood`] stands between any
//! source and the rest of the member: it keeps what was last read well, also across restarts. [`Directory`] is a source of
//! files with ordinary Kubernetes YAML.

mod directory;
mod kept;
mod last_good;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use hanse_api::assemble::{ObjectChange, ObjectKey, Position};
use hanse_api::{Diagnostic, Manifest};

pub use self::directory::Directory;
pub use self::last_good::{Known, LastGood};

/// A change that a source reports. Objects come from origins, such as a file or a collection of an API; a scope is an origin,
/// or everything below a path, and the empty path is everything.
#[derive(Debug, Clone)]
pub enum Event {
    /// An object is new or different.
    Upsert(Position, Box<Manifest>),
    /// An object of an origin that cannot be read completely. It is used only where the origin never could be.
    Partial(Position, Box<Manifest>),
    /// An object is gone.
    Delete(Position, ObjectKey),
    /// Everything in a scope is gone.
    Remove(Arc<Path>),
    /// A scope cannot be read now: its objects stay as they were read last. The problems replace earlier ones of the scope.
    Retain(Arc<Path>, Vec<Diagnostic>),
    /// A scope can be read again.
    Release(Arc<Path>),
    /// All objects of a scope follow, until it is synced.
    Relist(Arc<Path>),
    /// All objects of a scope were sent since it was listed. Others of it are gone, unless they are retained. Before everything
    /// is synced once, nothing is known of the cluster, which is not an empty cluster.
    Synced(Arc<Path>),
    /// The text from which all objects of an origin can be read again after a restart.
    Keep(Arc<Path>, Vec<u8>),
}

/// Reports how the cluster changes.
pub trait Source: Send {
    /// What changed since the last call; at first, everything. May block. `known`: what is in force.
    fn poll(&mut self, known: &mut Known) -> Vec<Event>;
}

/// What is new in a cluster.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    pub objects: Vec<ObjectChange>,
    /// Everything that is wrong now, with file and line.
    pub problems: Vec<Diagnostic>,
    /// Grows with each change, across restarts too.
    pub revision: u64,
}

/// Logs each problem once, when it appears.
#[derive(Debug, Default)]
pub struct LoggedProblems(BTreeSet<(Arc<str>, u32, String)>);

impl LoggedProblems {
    /// `problems`: all that there are now.
    pub fn log(&mut self, problems: &[Diagnostic]) {
        let key = |it: &Diagnostic| (it.location.file.clone(), it.location.line, it.message.clone());
        let before = std::mem::replace(&mut self.0, problems.iter().map(key).collect());
        for it in problems.iter().filter(|it| !before.contains(&key(it))) {
            let (file, line) = (&*it.location.file, it.location.line);
            tracing::warn!(file, line, field = it.field, problem = it.message, "manifest not used as written");
        }
    }
}
