//! The state of the administration service, and its views of the registry.

use std::sync::Arc;

use hanse_identity::tls::Connections;
use tokio::sync::{Semaphore, watch};
use tonic::{Request, Status};

use super::access::{caller, permit};
use crate::admission;
use crate::authority::Authority;
use crate::management::Monitor;
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
    /// The state of the admission webhook, if this hub has one.
    pub(super) webhook: Option<watch::Receiver<admission::State>>,
    /// The state of the operator and of the webhook, if this hub has an operator.
    pub(super) management: Option<Monitor>,
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
        Self {
            registry,
            authority,
            connections,
            realisations,
            watchers,
            dry_runs,
            operated: &[],
            webhook: None,
            management: None,
        }
    }

    /// With kinds that only the operator writes.
    #[must_use]
    pub fn with_operator(self, operated: &'static [Kind]) -> Self {
        Self { operated, ..self }
    }

    /// With the state of the operator and of the webhook.
    #[must_use]
    pub fn with_management(self, monitor: Monitor) -> Self {
        Self { management: Some(monitor), ..self }
    }

    /// With an admission webhook, which records the authors of changes.
    #[must_use]
    pub fn with_webhook(self, state: watch::Receiver<admission::State>) -> Self {
        Self { webhook: Some(state), ..self }
    }

    pub(crate) fn has_webhook(&self) -> bool {
        self.webhook.is_some()
    }

    /// The state of the admission webhook. `None`: this hub has none.
    pub(crate) fn webhook_state(&self) -> Option<admission::State> {
        self.webhook.as_ref().map(|state| state.borrow().clone())
    }

    /// The registry, for a caller who may view it.
    pub(super) fn view<T>(&self, request: &Request<T>) -> Result<Arc<Snapshot>, Status> {
        let snapshot = self.registry.snapshot();
        permit(&snapshot, &caller(request)?, Need::View).map_err(status)?;
        Ok(snapshot)
    }
}
