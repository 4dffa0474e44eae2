//! The operator: it reconciles the custom resources of `hanse.dev` in the management cluster with the hub's store.
//!
//! It reconciles Tier, FederatedNetworkSet, FederatedNetworkPolicy and StagedFederatedNetworkPolicy, and writes them as `hanse apply`
//! does: with the same validation and the same audit records, whose author is `operator`. What the hub refuses has the condition
//! `Accepted=False` and an Event, and its last good version stays in force.
//!
//! Objects are deleted by their finalizer only. An incomplete list, a custom resource that disappears without its finalizer, and the
//! deletion of a definition delete nothing: such objects stay in force until a custom resource of the same name is created and
//! deleted. A Tier that policies name is kept, with the condition `Terminating`, until they are deleted.
//!
//! # Writes to the API server
//!
//! A status is written only when it differs, apart from ages and messages about clusters: at once when the state or the reason of a
//! condition, or the hub's answer to this version changes, otherwise at most once a minute for each object. When nothing changes,
//! nothing is written but the Lease. What was written is read from the objects, so that a new leader does not write it again.

mod election;
mod objects;
mod reconcile;
mod status;

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{SelectAll, select_all};
use futures::{FutureExt as _, StreamExt as _};
use hanse_runtime::retry::Backoff;
use kube::api::DynamicObject;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::administration::Administration;
use crate::manifest::Kind;
use crate::registry::Registry;
use crate::status::Realisations;
use election::Election;
pub use election::LEASE;
pub use objects::KINDS;
use reconcile::Reconciler;

/// Passes begin at least this often, since the progress of clusters does not notify.
const EVERY: Duration = Duration::from_secs(1);
/// The shortest time between two passes: a burst of events is one pass.
const GATHER: Duration = Duration::from_millis(20);
/// Of the time of one thread, passes take at most one in this number.
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
    identity: String,
}

impl std::fmt::Debug for Operator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Operator").field("identity", &self.identity).finish_non_exhaustive()
    }
}

type Events = SelectAll<futures::stream::BoxStream<'static, (Kind, watcher::Result<watcher::Event<DynamicObject>>)>>;

impl Operator {
    pub fn new(
        client: Client,
        administration: Administration,
        registry: Registry,
        realisations: Arc<dyn Realisations>,
    ) -> Self {
        // The name of a pod; unique also for two hubs on one machine.
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let identity = format!("{}-{:08x}", host.trim(), rand::random::<u32>());
        Self { client, administration, registry, realisations, identity }
    }

    /// Reconciles whenever this hub has the Lease, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut election = Election::new(self.client.clone(), self.identity.clone());
        loop {
            let since = tokio::select! {
                () = stop.cancelled() => return,
                since = election.acquire() => since,
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return election.release().await,
                // Whatever is being written is dropped.
                () = election.keep(since) => {}
                () = self.reconcile() => {}
            }
        }
    }

    async fn reconcile(&self) {
        let Self { client, administration, registry, realisations, identity } = self.clone();
        let reporter = Reporter { controller: "hanse-hub".to_owned(), instance: Some(identity) };
        let mut events = watch(&client);
        let mut view = registry.subscribe();
        let recorder = Recorder::new(client.clone(), reporter);
        let mut reconciler = Reconciler::new(client, administration, registry, realisations, recorder);
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut not_before = Instant::now();
        loop {
            tokio::select! {
                Some((kind, event)) = events.next() => reconciler.take(kind, event),
                changed = view.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(not_before + EVERY) => {}
            }
            tokio::time::sleep_until(not_before).await;
            while let Some(Some((kind, event))) = events.next().now_or_never() {
                reconciler.take(kind, event);
            }
            view.borrow_and_update();
            let started = Instant::now();
            let pause = match reconciler.pass().await {
                Ok(()) => {
                    backoff.reset();
                    GATHER.max(started.elapsed() * (SHARE - 1))
                }
                Err(error) => {
                    warn!(error = format!("{error:#}"), "custom resources not reconciled");
                    backoff.next_delay()
                }
            };
            not_before = Instant::now() + pause;
        }
    }
}

/// The events of all kinds, from complete lists on. Watches resume where they ended.
fn watch(client: &Client) -> Events {
    let of_kind = |kind: Kind| {
        let resource = objects::resource(kind)?;
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let events = watcher(api, watcher::Config::default()).backoff(Delays(Backoff::new(RETRY.0, RETRY.1)));
        Some(events.map(move |event| (kind, event)).boxed())
    };
    select_all(KINDS.into_iter().filter_map(of_kind))
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
