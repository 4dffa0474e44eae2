//! Which source a member has.

use std::path::{Path, PathBuf};

use hanse_kubernetes::Access;
use hanse_runtime::health::Writes;

use super::kept::Kept;
use super::kubernetes::{Earlier, Missing, earlier};
use super::{Directory, Kubernetes, LastGood, Source};
use crate::state::State;

/// Where the objects of a cluster are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A directory of manifests.
    Directory(PathBuf),
    /// The API server of the cluster.
    Kubernetes(Access),
}

impl Location {
    /// The source at this location, with what an earlier process knew of it. `state`: of the member. `writes`: reports failed writes.
    ///
    /// # Errors
    /// When the system refuses what the source needs; when the state cannot be read.
    pub fn open(&self, state: &State, writes: Writes) -> std::io::Result<LastGood<Box<dyn Source>>> {
        let kept = Kept::open(state.data(), writes);
        match self {
            Self::Directory(path) => Ok(LastGood::new(Box::new(Directory::new(path)), kept)),
            Self::Kubernetes(access) => {
                let Earlier { texts, missing } = earlier(state)?;
                let missing = if kept.is_whole() { unknown_to(&kept, missing) } else { missing };
                let source = Kubernetes::new(access.clone(), state)?.with_missing(missing);
                // Its caches may lack what it could not write.
                let texts = texts.into_iter().map(|(origin, text)| (Path::new(&origin).into(), text.into_bytes()));
                Ok(LastGood::new(Box::new(source) as Box<dyn Source>, kept).with_texts(texts))
            }
        }
    }
}

/// What caches that are whole do not contain: they may be older than the state, where they could not be written. A process knows the
/// objects of each definition that they name.
fn unknown_to(kept: &Kept, missing: Missing) -> Missing {
    let mut definitions = missing.definitions;
    if !definitions.is_empty() {
        for origin in kept.origins() {
            definitions.retain(|definition| !origin.starts_with(definition));
        }
    }
    Missing { kept: 0, definitions }
}
