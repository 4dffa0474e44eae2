//! Which source a member has.

use std::path::PathBuf;

use super::{Directory, Kubernetes, Missing, Source};
use crate::state::State;
use hanse_kubernetes::Access;

/// Where the objects of a cluster are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A directory of manifests.
    Directory(PathBuf),
    /// The API server of the cluster.
    Kubernetes(Access),
}

impl Location {
    /// The source at this location. `state`: of the member. `missing`: see [`Kubernetes::with_missing`].
    ///
    /// # Errors
    /// When the system refuses what the source needs.
    pub fn open(&self, state: &State, missing: Missing) -> std::io::Result<Box<dyn Source>> {
        Ok(match self {
            Self::Directory(path) => Box::new(Directory::new(path)),
            Self::Kubernetes(access) => Box::new(Kubernetes::new(access.clone(), state)?.with_missing(missing)),
        })
    }
}
