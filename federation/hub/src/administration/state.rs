//! The state of the administration service, and its views of the registry.

use std::sync::Arc;

use hanse_identity::tls::Connections;
use tokio::sync::Semaphore;
use tonic::{Request, Status};

use super::access::{caller, permit};
use crate::authority::Authority;
use crate::manifest::Kind;
use crate::registration::status;
use crate::registry::{Registry, Snapshot};
use crate::roles::Need;
use crate::status::Realisations;

/// Maximum number of watchers of this replica. Each has one view of the registry; successive views share the objects.
pub(super) const MAX_WATCHERS: usize = 64;
/// Concurrent dry runs. Each stores what it would have written, at most 48 MiB.
pub(super) const MAX_DRY_RUNS: usize = 4;

/// The service of `administration.proto`.
#[derive(Clone)]
pub struct Administration {
    pub(super) registry: Registry,
    pub(super) authority: Authority,
    pub(super) connections: Connections,
    pub(super) realisations: Arc<dyn Realisations>,
    pub(super) watchers: Arc<Semaphore>,
    pub(super) dry_runs: Arc<Semaphore>,
    /// Kinds that only the operator writes.
    pub(super) operated: &'static [Kind],
}

impl std::fmt::Debug for Administration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Administration").field("registry", &self.registry).finish_non_exhaustive()
    }
}

impl Administration {
    pub fn new(
        registry: Registry,
        authority: Authority,
        connections: Connections,
        realisations: Arc<dyn Realisations>,
    ) -> Self {
        let (watchers, dry_runs) = (Arc::new(Semaphore::new(MAX_WATCHERS)), Arc::new(Semaphore::new(MAX_DRY_RUNS)));
        Self { registry, authority, connections, realisations, watchers, dry_runs, operated: &[] }
    }

    /// With kinds that only the operator writes.
    #[must_use]
    pub fn with_operator(self, operated: &'static [Kind]) -> Self {
        Self { operated, ..self }
    }

    /// The registry, for a caller who may view it.
    pub(super) fn view<T>(&self, request: &Request<T>) -> Result<Arc<Snapshot>, Status> {
        let snapshot = self.registry.snapshot();
        permit(&snapshot, &caller(request)?, Need::View).map_err(status)?;
        Ok(snapshot)
    }
}
