//! The operator: it reconciles the custom resources of `hanse.dev` in the management cluster with the hub's store.
//!
//! Tiers, sets, policies and MemberClusters are written as `hanse apply` does: with the same validation and the same audit records, whose
//! author is `operator`. What the hub refuses has the condition `Accepted=False` and an Event, and its last good version stays in force.
//! The ClusterSet becomes settings of the hub, and a ClusterJoinToken a token in a Secret.
//!
//! Objects are deleted by their finalizer only. An incomplete list, a custom resource that disappears without its finalizer, and the
//! deletion of a definition delete nothing: such objects stay in force, and are reported as objects without a custom resource, until a
//! custom resource of the same name is created and deleted. A Tier that policies name is kept, with the condition `Terminating`, until they
//! are deleted.
//!
//! # Writes to the API server
//!
//! A status is written only when it differs, apart from ages and messages about clusters. [`allowance`] limits the writes of each object to
//! one a minute, with a burst for changes of conditions. When nothing changes, nothing is written but the Lease. What was written is read
//! from the objects, so that a new leader does not write it again.

mod allowance;
mod condition;
mod members;
mod metrics;
mod objects;
mod reconcile;
mod resource;
mod status;
mod statuses;
mod tracked;
mod writer;

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{SelectAll, select_all};
use futures::{FutureExt as _, StreamExt as _};
use hanse_kubernetes::election::Election;
use hanse_runtime::retry::Backoff;
use kube::api::DynamicObject;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::administration::Administration;
use crate::management::{Monitor, Task};
use crate::manifest::Kind;
use crate::registry::Registry;
use crate::status::Realisations;
pub use metrics::OperatorMetrics;
use reconcile::Reconciler;
use resource::Resource;
use writer::Writer;

/// The kinds of the hub's objects that the operator reconciles.
pub const KINDS: [Kind; 5] = Kind::ALL;

/// The name of the Lease whose holder reconciles.
pub const LEASE: &str = "hanse-hub-operator";

/// Objects in a page of a list: at most 50 × 1.5 MiB are in memory for each kind.
const PAGE: u32 = 50;

/// Passes begin at least this often, since the progress of clusters does not notify.
const EVERY: Duration = Duration::from_secs(1);
/// The shortest time between two passes: a burst of events is one pass.
const GATHER: Duration = Duration::from_millis(20);
/// Of the time of one thread, passes take at most one in this number. The time in which they wait for answers does not count: changes
/// that arrive meanwhile must not wait for a multiple of it.
const SHARE: u32 = 8;
/// Delays after a failed pass, or a failed watch.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// The operator of one hub.
#[derive(Clone)]
pub struct Operator {
    client: Client,
    administration: Administration,
    registry: Registry,
    realisations: Arc<dyn Realisations>,
    monitor: Monitor,
    metrics: OperatorMetrics,
}

impl std::fmt::Debug for Operator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Operator").field("identity", self.monitor.identity()).finish_non_exhaustive()
    }
}

type Events =
    SelectAll<futures::stream::BoxStream<'static, (Resource, watcher::Result<watcher::Event<DynamicObject>>)>>;

impl Operator {
    pub fn new(
        client: Client,
        administration: Administration,
        registry: Registry,
        realisations: Arc<dyn Realisations>,
        monitor: Monitor,
    ) -> Self {
        Self { client, administration, registry, realisations, monitor, metrics: OperatorMetrics::default() }
    }

    /// Counts into these metrics.
    #[must_use]
    pub fn with_metrics(self, metrics: &OperatorMetrics) -> Self {
        Self { metrics: metrics.clone(), ..self }
    }

    /// Reconciles whenever this hub has the Lease, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut election = Election::new(self.client.clone(), None, LEASE, self.monitor.identity().to_string());
        loop {
            let since = tokio::select! {
                () = stop.cancelled() => return,
                since = election.acquire(|attempt| self.monitor.attempted(attempt)) => since,
            };
            self.metrics.leader.set(1);
            self.monitor.leads(true);
            let is_stopped = tokio::select! {
                biased;
                () = stop.cancelled() => true,
                // Whatever is being written is dropped.
                () = election.keep(since, |attempt| self.monitor.attempted(attempt)) => false,
                () = self.reconcile() => false,
            };
            self.metrics.leader.set(0);
            self.metrics.queued_for(Duration::ZERO);
            self.monitor.leads(false);
            if is_stopped {
                return election.release().await;
            }
        }
    }

    async fn reconcile(&self) {
        let Self { client, administration, registry, realisations, monitor, metrics } = self.clone();
        let reporter = Reporter { controller: "hanse-hub".to_owned(), instance: Some(monitor.identity().to_string()) };
        let mut events = watch(&client);
        let mut view = registry.subscribe();
        let recorder = Recorder::new(client.clone(), reporter);
        let writer = Writer { client, recorder, metrics: metrics.clone(), monitor: monitor.clone() };
        let mut reconciler = Reconciler::new(writer, administration, registry, realisations);
        // When the oldest change arrived that no pass has reconciled.
        let mut waiting: Option<Instant> = None;
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut not_before = Instant::now();
        loop {
            tokio::select! {
                Some((resource, event)) = events.next() => {
                    if waiting.is_none() {
                        waiting = Some(Instant::now());
                        monitor.waiting(waiting);
                    }
                    reconciler.take(resource, event);
                }
                changed = view.changed() => if changed.is_err() { return },
                () = reconciler.written() => {}
                () = tokio::time::sleep_until(not_before + EVERY) => {}
            }
            tokio::time::sleep_until(not_before).await;
            while let Some(Some((resource, event))) = events.next().now_or_never() {
                reconciler.take(resource, event);
            }
            metrics.queued_for(waiting.map_or(Duration::ZERO, |since| since.elapsed()));
            view.borrow_and_update();
            let pause = match reconciler.pass().await {
                Ok(()) => {
                    waiting = None;
                    monitor.waiting(None);
                    monitor.done(Task::Reconcile, "");
                    metrics.queued_for(Duration::ZERO);
                    backoff.reset();
                    GATHER.max(reconciler.busy() * (SHARE - 1))
                }
                Err(error) => {
                    warn!(error = format!("{error:#}"), "custom resources not reconciled");
                    monitor.failed(Task::Reconcile, "", &error);
                    backoff.next_delay()
                }
            };
            not_before = Instant::now() + pause;
        }
    }
}

/// The events of all kinds, from complete lists on. Watches resume where they ended.
fn watch(client: &Client) -> Events {
    let of_kind = |resource: Resource| {
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource.api());
        let configuration = watcher::Config::default().page_size(PAGE);
        let events = watcher(api, configuration).backoff(Delays(Backoff::new(RETRY.0, RETRY.1)));
        events.map(move |event| (resource, event)).boxed()
    };
    select_all(Resource::ALL.map(of_kind))
}

/// Delays of a watch that fails.
struct Delays(Backoff);

impl Iterator for Delays {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.0.next_delay())
    }
}

impl kube::runtime::utils::Backoff for Delays {
    fn reset(&mut self) {
        self.0.reset();
    }
}
