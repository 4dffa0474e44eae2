//! The source of a member: the objects of its own cluster.
//!
//! A [`Source`] reports changes of single objects, so that the cost of an edit is proportional to the change. [`LastGood`] is a layer
//! above any source, which keeps the last good state, also across restarts. [`Directory`] is a source that reads Kubernetes YAML files.

mod directory;
mod kept;
mod kubernetes;
mod last_good;
mod location;
mod problems;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hanse_api::assemble::{ObjectChange, ObjectKey, Position};
use hanse_api::manifest::Manifests;
use hanse_api::{Diagnostic, Manifest};

pub use self::directory::Directory;
pub use self::kubernetes::{Kubernetes, forget, kept_objects};
pub use self::last_good::{LastGood, Objects};
pub use self::location::Location;
pub use self::problems::{ProblemChange, Problems};

/// A change that a source reports. Objects come from origins, such as files or collections of an API. A scope is an origin, or all
/// origins below a path; the empty path is the whole source.
#[derive(Debug, Clone)]
pub enum Event {
    /// An object is new or different.
    Upsert(Position, Box<Manifest>),
    /// An object of an origin that cannot be read completely. It is used only if the origin was never read completely.
    Partial(Position, Box<Manifest>),
    /// An object was deleted.
    Delete(Position, ObjectKey),
    /// All objects in a scope were deleted.
    Remove(Arc<Path>),
    /// A scope is unreadable: its objects stay as they were last read. The problems replace earlier ones of the scope.
    Retain(Arc<Path>, Vec<Diagnostic>),
    /// A scope is readable again.
    Release(Arc<Path>),
    /// All objects of a scope follow, until [`Self::Synced`].
    Relist(Arc<Path>),
    /// All objects of a scope were sent since [`Self::Relist`]. Its other objects are deleted, unless they are retained. Until the whole
    /// source is synced for the first time, the state of the cluster is unknown, and not empty.
    Synced(Arc<Path>),
    /// The text from which all objects of an origin can be restored after a restart.
    Keep(Arc<Path>, Vec<u8>),
    /// The same for an origin that cannot be read completely. It is used only if the origin was never read completely.
    KeepPartial(Arc<Path>, Vec<u8>),
}

/// Reports changes of the cluster's objects.
pub trait Source: Send {
    /// The changes since the last call; at first, all objects. May block. `objects`: the objects in force.
    fn poll(&mut self, objects: &mut Objects) -> Vec<Event>;

    /// The time until the next poll, after one that took `took`.
    fn pause(&self, took: Duration) -> Duration;
}

impl<S: Source + ?Sized> Source for Box<S> {
    fn poll(&mut self, objects: &mut Objects) -> Vec<Event> {
        (**self).poll(objects)
    }

    fn pause(&self, took: Duration) -> Duration {
        (**self).pause(took)
    }
}

/// Reports what was read from an origin. Returns whether it was read completely.
fn report(origin: &Arc<Path>, read: Manifests, events: &mut Vec<Event>) -> bool {
    let is_good = read.diagnostics.is_empty();
    events.push(match is_good {
        true => Event::Release(Arc::clone(origin)),
        false => Event::Retain(Arc::clone(origin), read.diagnostics),
    });
    events.push(Event::Relist(Arc::clone(origin)));
    for (index, manifest) in (0..).zip(read.objects.into_iter().chain(read.partial)) {
        let (position, manifest) = (Position { origin: Arc::clone(origin), index }, Box::new(manifest));
        events.push(match is_good {
            true => Event::Upsert(position, manifest),
            false => Event::Partial(position, manifest),
        });
    }
    events.push(Event::Synced(Arc::clone(origin)));
    is_good
}

/// Changes of a cluster.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    pub objects: Vec<ObjectChange>,
    /// What has changed about the problems of the source.
    pub problems: Vec<ProblemChange>,
    /// Increases with each change, also across restarts.
    pub revision: u64,
}
