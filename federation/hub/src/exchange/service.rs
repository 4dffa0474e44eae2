//! The exchange over gRPC. A caller's certificate identifies its cluster; [`hanse_exchange::hub`] decides what it is sent.
//!
//! One lock guards the state of the exchange, and no work under it waits. Streams wait for it in turn and without a thread, so that
//! administration and metrics are served also when the exchange has much to do. New interests are evaluated outside it, and what the
//! streams of a cluster use is charged to the cluster.
//!
//! A receiver's stream requests the next message when its
//! connection has room, so that a slow receiver costs its dirty ids only, and delays no other.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hanse_identity::Identity;
use hanse_identity::instances::Instance;
use hanse_identity::tls::{peer, peer_identity};
use hanse_identity::token;
use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::exchange_server::Exchange as Wire;
use hanse_runtime::supervisor::caught;
use prometheus_client::metrics::histogram::Histogram;
use prost::Message as _;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use super::admission::{Accounts, MAX_STREAMS, Rate, StreamCounts, StreamPermit, Unfinished, within};
use super::derive::Deriver;
use super::liveness::{Hearing, Receiving, Unpublished};
use super::mutex::lock;
use super::processes::{Processes, ServedProcess};
use super::report;
use crate::metrics::HubMetrics;
use crate::registry::{self, Cluster, ClusterState, Registry, Snapshot};
use crate::status::Realisation;
use hanse_exchange::codec;
use hanse_exchange::hub::{Exchange, Next, PublishError, PublishId, Published, ReadOpening, ReadRequest, ReceiverId};
use hanse_exchange::limits::MAX_PLAIN_BYTES;
use hanse_exchange::message::{PublishRequest, PublishResponse, WatchRequest, WatchResponse};
use hanse_exchange::model::{Lease, Position};

mod status;

/// Messages that wait for one connection: 4 × 1 MiB at most.
const OUTBOX: usize = 4;
/// How often a heartbeat is sent on an idle stream.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// The first message of a watching stream must arrive within this time.
const OPENING_TIME: Duration = Duration::from_secs(30);
/// The lock is free for this time after each part of a large batch: 300 parts take 0.3 s longer.
const BETWEEN_PARTS: Duration = Duration::from_millis(1);
/// How often one cluster may report: a report is up to 4 MiB, and is compared with all that the cluster enforces.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// How often one cluster may open a watching stream, or change its interest: a change is evaluated for every endpoint that it
/// concerns.
const OWN_EVERY: Duration = Duration::from_millis(100);
/// A receiver that keeps a replaced interest for this time without an acknowledgement is sent everything instead.
const ACKNOWLEDGE_TIME: Duration = Duration::from_secs(600);
/// A lease lasts for seconds: one renewal in this time is enough.
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// How often a publishing member is sent the position of this replica, if that has changed.
const POSITION_EVERY: Duration = HEARTBEAT;
/// How often the digests of a watching member are compared for the other replicas: for 1,000 members this takes some 2 % of the
/// exchange's time.
const COMPARE_EVERY: Duration = Duration::from_secs(20);
/// How often a replica checks which clusters it hears.
const HEAR_EVERY: Duration = Duration::from_secs(1);

/// The exchange of this replica. Clones share it.
#[derive(Debug, Clone)]
pub struct Service {
    registry: Registry,
    shared: Arc<Shared>,
    stop: CancellationToken,
    /// How long each piece of work kept the lock.
    lock_time: Histogram,
}

#[derive(Debug, Default)]
struct Shared {
    exchange: tokio::sync::Mutex<Exchange>,
    /// Wakes the stream of a receiver.
    wake: Mutex<HashMap<ReceiverId, Arc<Notify>>>,
    publishing: StreamCounts,
    watching: StreamCounts,
    rates: Mutex<BTreeMap<ClusterName, Rate>>,
    /// The last report of enforcement of each cluster, and when it came.
    reported: Mutex<BTreeMap<ClusterName, (tokio::time::Instant, Arc<pb::Realisation>)>>,
    /// The last status of each cluster, and when it was made: it is served, marked, while the exchange is too busy for a new one.
    last_status: Mutex<BTreeMap<Arc<str>, (Instant, Realisation)>>,
    /// Clusters that are connected and have not published here yet.
    unpublished: Mutex<BTreeMap<ClusterName, Unpublished>>,
    receiving: Mutex<BTreeMap<ClusterName, Receiving>>,
    processes: Processes,
    /// When each cluster may next report, and change its interest, on any of its streams.
    reports: Mutex<BTreeMap<ClusterName, tokio::time::Instant>>,
    interests: Mutex<BTreeMap<ClusterName, tokio::time::Instant>>,
    /// What the publishing streams, and the watching streams, of each cluster have used of the exchange's time.
    used_publishing: Accounts,
    used_watching: Accounts,
    /// Identifies this process: 16 random bytes.
    replica: Bytes,
    /// The position of the hub's own objects.
    position: watch::Sender<Position>,
    /// The announced addresses of all replicas.
    hubs: watch::Sender<Arc<BTreeSet<String>>>,
    /// The clusters with a lease that this replica does not hear, and for how long.
    unheard: Mutex<BTreeMap<ClusterName, Duration>>,
}

/// The time between heartbeats, in milliseconds: three chances within a lease.
fn heartbeat(registry: &Registry) -> u64 {
    u64::try_from(registry.lease_time().as_millis() / 3).unwrap_or(u64::MAX)
}

impl Service {
    pub fn new(registry: Registry, stop: CancellationToken) -> Self {
        let mut exchange = Exchange::default();
        exchange.set_heartbeat(heartbeat(&registry));
        // If no randomness is available, TLS fails as well. Without an identifier, a member publishes to each address.
        let replica = token::random::<16>().map_or_else(|_| Bytes::new(), |id| Bytes::copy_from_slice(&id));
        let shared = Arc::new(Shared { exchange: tokio::sync::Mutex::new(exchange), replica, ..Shared::default() });
        Self { registry, shared, stop, lock_time: HubMetrics::default().exchange_lock }
    }

    /// Measures into the hub's metrics.
    pub fn with_metrics(self, metrics: &HubMetrics) -> Self {
        Self { lock_time: metrics.exchange_lock.clone(), ..self }
    }

    /// The name under which this process announces its addresses.
    pub fn replica(&self) -> Arc<str> {
        hex(&self.shared.replica).into()
    }

    /// Follows the registry until `stop`: policies, clusters, grants, leases.
    pub async fn follow_registry(self) {
        let mut view = self.registry.subscribe();
        let mut deriver = Deriver::default();
        let mut hearing = Hearing::default();
        let mut hear = tokio::time::interval(HEAR_EVERY);
        loop {
            let snapshot = view.borrow_and_update().clone();
            let mut newest = deriver.federation(&self.registry, &snapshot);
            let unheard = self.unheard(&mut hearing, &snapshot);
            let lease_ms = u64::try_from(self.registry.lease_time().as_millis()).unwrap_or(u64::MAX);
            for name in unheard.keys() {
                if let Some(cluster) = newest.clusters.get_mut(name) {
                    // As at the end of its lease: what this replica has of it may be old.
                    cluster.lease = Lease::Stale { silent_ms: lease_ms };
                }
            }
            let names: BTreeSet<ClusterName> = unheard.keys().cloned().collect();
            self.note_unheard(unheard);
            let heartbeat = heartbeat(&self.registry);
            let position = newest.position;
            self.with(|exchange| {
                // Of streams that are opened from now on: those of before are closed when the lease changes.
                exchange.set_heartbeat(heartbeat);
                exchange.set_federation_part(newest)
            })
            .await;
            self.shared.position.send_if_modified(|at| std::mem::replace(at, position) != position);
            let hubs = snapshot.hub_addresses();
            self.shared.hubs.send_if_modified(|list| {
                let is_new = **list != hubs;
                if is_new {
                    *list = Arc::new(hubs);
                }
                is_new
            });
            while self.with(Exchange::regrant_more).await {
                tokio::time::sleep(BETWEEN_PARTS).await;
            }
            loop {
                tokio::select! {
                    () = self.stop.cancelled() => return,
                    changed = view.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        break;
                    }
                    _ = hear.tick() => {
                        let unheard = self.unheard(&mut hearing, &self.registry.snapshot());
                        let is_changed = !unheard.keys().eq(&names);
                        self.note_unheard(unheard);
                        if is_changed {
                            break;
                        }
                    }
                }
            }
        }
    }

    fn unheard(&self, hearing: &mut Hearing, snapshot: &Snapshot) -> BTreeMap<ClusterName, Duration> {
        let is_live = |it: &&Arc<Cluster>| it.state == ClusterState::Accepted && it.lease == registry::Lease::Live;
        let live = snapshot.clusters.values().filter(is_live).map(|it| &it.name);
        let heard = |cluster: &str| self.registry.silent_for(cluster);
        hearing.unheard(live, heard, self.registry.lease_time(), tokio::time::Instant::now())
    }

    fn note_unheard(&self, unheard: BTreeMap<ClusterName, Duration>) {
        let mut noted = lock(&self.shared.unheard);
        for (cluster, silent) in unheard.iter().filter(|(cluster, _)| !noted.contains_key(*cluster)) {
            tracing::warn!(
                %cluster, seconds = silent.as_secs(),
                "nothing received from a cluster for longer than a lease, although another replica is connected: its data counts as old here"
            );
        }
        for cluster in noted.keys().filter(|cluster| !unheard.contains_key(*cluster)) {
            tracing::info!(%cluster, "cluster sends to this replica again, or has no lease");
        }
        *noted = unheard;
    }

    /// Changes the exchange, and wakes the receivers that then have something to be sent.
    async fn with<T>(&self, work: impl FnOnce(&mut Exchange) -> T) -> T {
        self.timed(work).await.0
    }

    /// As [`Self::with`]; returns also how long the lock was kept.
    async fn timed<T>(&self, work: impl FnOnce(&mut Exchange) -> T) -> (T, Duration) {
        let (result, ready, took) = {
            let mut exchange = self.shared.exchange.lock().await;
            let began = Instant::now();
            let result = work(&mut exchange);
            let ready = exchange.take_ready();
            drop(exchange);
            (result, ready, began.elapsed())
        };
        self.lock_time.observe(took.as_secs_f64());
        let wake = lock(&self.shared.wake);
        ready.iter().filter_map(|id| wake.get(id)).for_each(|notify| notify.notify_one());
        (result, took)
    }

    /// As [`Self::with`], for a watching stream of a cluster. The time is charged to the cluster, with that of `prepared`, which
    /// was needed before.
    async fn charged<T>(&self, cluster: &ClusterName, prepared: Duration, work: impl FnOnce(&mut Exchange) -> T) -> T {
        let (result, took) = self.timed(work).await;
        self.shared.used_watching.charge(cluster, prepared + took);
        result
    }

    /// As [`Self::with`], for a publishing stream of a cluster, to which the time is charged.
    async fn publishing<T>(&self, cluster: &ClusterName, work: impl FnOnce(&mut Exchange) -> T) -> T {
        let (result, took) = self.timed(work).await;
        self.shared.used_publishing.charge(cluster, took);
        result
    }

    /// Reads the exchange.
    async fn look<T>(&self, at: impl FnOnce(&Exchange) -> T) -> T {
        let exchange = self.shared.exchange.lock().await;
        let began = Instant::now();
        let result = at(&exchange);
        drop(exchange);
        self.lock_time.observe(began.elapsed().as_secs_f64());
        result
    }

    /// Renews the lease of a cluster that sent a message, unless it counts as silent because it does not publish.
    async fn renew_lease(&self, cluster: &ClusterName) -> Result<(), Status> {
        if self.is_silent(cluster).await {
            return Ok(());
        }
        self.registry.renew_lease(cluster).await.map_err(|error| Status::permission_denied(error.to_string()))
    }

    async fn is_silent(&self, cluster: &ClusterName) -> bool {
        let now = tokio::time::Instant::now();
        let published = self.look(|exchange| exchange.has_published(cluster)).await;
        let mut unpublished = lock(&self.shared.unpublished);
        if published {
            unpublished.remove(cluster);
            return false;
        }
        let state = unpublished.entry(cluster.clone()).or_insert_with(|| Unpublished::new(now));
        let silent = state.is_silent(self.registry.lease_time(), now);
        if silent && !std::mem::replace(&mut state.is_logged, true) {
            tracing::warn!(%cluster, "cluster is connected but does not publish: it counts as silent");
        }
        silent
    }

    /// A part of a cluster's first batch arrived.
    fn progresses(&self, cluster: &ClusterName) {
        if let Some(state) = lock(&self.shared.unpublished).get_mut(cluster) {
            state.progress = tokio::time::Instant::now();
        }
    }

    async fn published(
        self,
        cluster: ClusterName,
        permit: StreamPermit,
        from: SocketAddr,
        mut incoming: impl Stream<Item = Result<pb::PublishRequest, Status>> + Unpin,
        outbox: mpsc::Sender<Result<pb::PublishResponse, Status>>,
    ) {
        let id = self.with(|exchange| exchange.publish_open(cluster.clone())).await;
        let taken = self.take_published(&cluster, id, from, &mut incoming, &outbox);
        let ended = tokio::select! {
            () = self.stop.cancelled() => Ok(()),
            ended = guarded("a publishing stream", taken) => ended,
        };
        self.with(|exchange| exchange.publish_close(id)).await;
        // The rest of a batch is applied in parts as well.
        while !self.stop.is_cancelled()
            && let Ok(Published::More) = self.publishing(&cluster, |exchange| exchange.publish_more(id)).await
        {
            tokio::time::sleep(BETWEEN_PARTS).await;
            self.shared.used_publishing.affordable(&cluster).await;
        }
        drop(permit);
        if let Err(status) = ended {
            tracing::info!(%cluster, error = status.message(), "publishing ended");
            let _ = outbox.send(Err(status)).await;
        }
    }

    async fn take_published(
        &self,
        cluster: &ClusterName,
        id: PublishId,
        from: SocketAddr,
        incoming: &mut (impl Stream<Item = Result<pb::PublishRequest, Status>> + Unpin),
        outbox: &mpsc::Sender<Result<pb::PublishResponse, Status>>,
    ) -> Result<(), Status> {
        let mut renewed: Option<tokio::time::Instant> = None;
        let mut unfinished = None;
        let mut served: Option<ServedProcess> = None;
        let taken_over = || Status::aborted("another process publishes with this cluster's key");
        let mut position = self.shared.position.subscribe();
        let mut send_position = tokio::time::interval(POSITION_EVERY);
        loop {
            let next = tokio::select! {
                biased;
                () = replaced(served.as_ref()) => return Err(taken_over()),
                _ = send_position.tick(), if served.is_some() => {
                    if position.has_changed().unwrap_or(false)
                        && let Ok(room) = outbox.try_reserve()
                    {
                        room.send(Ok(self.replica_now(&mut position)));
                    }
                    continue;
                }
                next = within(&unfinished, incoming.next()) => next?.transpose()?,
            };
            let Some(request) = next else { return Ok(()) };
            let is_report = matches!(request.message, Some(pb::publish_request::Message::Realisation(_)));
            if !is_report && request.encoded_len() > MAX_PLAIN_BYTES {
                return Err(Status::invalid_argument("a message has at most 4 MiB"));
            }
            let request =
                codec::publish::decode_request(request).map_err(|error| Status::invalid_argument(error.to_string()))?;
            if let PublishRequest::Open { instance, yields, .. } = &request {
                let recorded = self.recorded_instance(cluster);
                let instance = Instance::new(instance, from);
                served = Some(self.shared.processes.admit(cluster, instance, *yields, recorded.as_deref())?);
                let replica = self.replica_now(&mut position);
                outbox.send(Ok(replica)).await.map_err(|_| Status::cancelled("the member is gone"))?;
            }
            // The lease is not renewed before the process is known.
            let Some(process) = &served else {
                return Err(Status::invalid_argument("the first message must be open"));
            };
            if renewed.is_none_or(|it| it.elapsed() > RENEW_EVERY) {
                self.renew_lease(cluster).await?;
                self.record_instance(cluster);
                renewed = Some(tokio::time::Instant::now());
            }
            if let PublishRequest::Report(bytes) = &request {
                tokio::time::sleep_until(self.slot(cluster, |shared| &shared.reports, REPORT_EVERY)).await;
                if process.is_replaced() {
                    return Err(taken_over());
                }
                // Decoded outside the lock. A report that is too large is refused, and publishing goes on.
                let report = report::read(bytes);
                self.take_report(cluster, id, report).await.map_err(refused)?;
                continue;
            }
            if let PublishRequest::Heartbeat { received_age_ms } = &request {
                let age = received_age_ms.map(Duration::from_millis);
                let now = tokio::time::Instant::now();
                Receiving::note(&mut lock(&self.shared.receiving), cluster, age, now);
            }
            let updates = cost(&request);
            if matches!(&request, PublishRequest::Frame(bytes) if codec::frame::count(bytes) > 0) {
                self.progresses(cluster);
            }
            let began = tokio::time::Instant::now();
            Unfinished::follow(&mut unfinished, &request, began);
            self.shared.used_publishing.affordable(cluster).await;
            let publish = |exchange: &mut Exchange| exchange.publish_part(id, request);
            let mut published = self.publishing(cluster, publish).await.map_err(refused)?;
            let answers = loop {
                match published {
                    Published::Answers(answers) => break answers,
                    Published::More => {
                        // Others get the lock in this pause.
                        tokio::time::sleep(BETWEEN_PARTS).await;
                        self.shared.used_publishing.affordable(cluster).await;
                        if renewed.is_none_or(|it| it.elapsed() > RENEW_EVERY) {
                            self.renew_lease(cluster).await?;
                            renewed = Some(tokio::time::Instant::now());
                        }
                        let publish = |exchange: &mut Exchange| exchange.publish_more(id);
                        published = self.publishing(cluster, publish).await.map_err(refused)?;
                    }
                }
            };
            for answer in answers {
                let answer = codec::publish::encode_response(answer);
                outbox.send(Ok(answer)).await.map_err(|_| Status::cancelled("the member is gone"))?;
            }
            self.slow_down(cluster, updates, outbox).await?;
            if let Some(unfinished) = &mut unfinished {
                unfinished.waited(began.elapsed());
            }
        }
    }

    /// The number of the process that publishes for a cluster, as the store has it.
    fn recorded_instance(&self, cluster: &ClusterName) -> Option<Vec<u8>> {
        let recorded = self.registry.snapshot().instance_of(cluster)?;
        let byte = |at: usize| recorded.get(at..at + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        (0..recorded.len()).step_by(2).map(byte).collect()
    }

    /// Records the process that publishes for a cluster, where the store does not name it. The stream does not wait for the store.
    fn record_instance(&self, cluster: &ClusterName) {
        let recorded = self.recorded_instance(cluster);
        let Some(number) = self.shared.processes.to_record(cluster, recorded.as_deref()) else { return };
        let (registry, cluster) = (self.registry.clone(), cluster.clone());
        tokio::spawn(async move {
            let outcome = registry.record_instance(&cluster, &hex(&number)).await;
            if let Err(error) = outcome
                && registry.unavailable_for().is_none()
            {
                tracing::warn!(%cluster, %error, "process of a cluster not recorded");
            }
        });
    }

    /// This process, and the position of its objects, for a publishing member.
    fn replica_now(&self, position: &mut watch::Receiver<Position>) -> pb::PublishResponse {
        let hub = *position.borrow_and_update();
        codec::publish::encode_response(PublishResponse::Replica { id: self.shared.replica.clone(), hub })
    }

    /// When a cluster may next do what it may do once in `every`. Each waiting stream has a slot; an abandoned slot delays only the
    /// streams of its own cluster.
    fn slot(
        &self,
        cluster: &ClusterName,
        of: fn(&Shared) -> &Mutex<BTreeMap<ClusterName, tokio::time::Instant>>,
        every: Duration,
    ) -> tokio::time::Instant {
        let now = tokio::time::Instant::now();
        let mut slots = lock(of(&self.shared));
        let next = slots.entry(cluster.clone()).or_insert(now);
        let latest = now + every * u32::try_from(MAX_STREAMS).unwrap_or(u32::MAX);
        let at = (*next).clamp(now, latest);
        *next = at + every;
        at
    }

    /// Waits if a cluster publishes faster than its grant allows. No update is dropped: the stream fills up, and the member sends
    /// its newest state when there is room again. The lease is renewed meanwhile.
    async fn slow_down<T>(
        &self,
        cluster: &ClusterName,
        updates: usize,
        outbox: &mpsc::Sender<T>,
    ) -> Result<(), Status> {
        let Some(limits) = self.registry.snapshot().clusters.get(cluster).map(|it| it.grant.limits) else {
            return Ok(());
        };
        let now = tokio::time::Instant::now();
        let wait = {
            let mut rates = lock(&self.shared.rates);
            rates.entry(cluster.clone()).or_insert_with(|| Rate::full(now)).spend(updates, limits, now)
        };
        if wait.is_zero() {
            return Ok(());
        }
        tracing::warn!(%cluster, granted = limits.updates_per_second, ?wait, "updates above the granted rate: delayed");
        let until = now.checked_add(wait).unwrap_or(now + Duration::from_secs(86_400));
        while tokio::time::Instant::now() < until {
            tokio::select! {
                () = tokio::time::sleep_until(until.min(tokio::time::Instant::now() + RENEW_EVERY)) => {}
                () = outbox.closed() => return Err(Status::cancelled("the member is gone")),
            }
            // The hub delays it.
            self.progresses(cluster);
            self.renew_lease(cluster).await?;
        }
        Ok(())
    }

    async fn watched(
        self,
        cluster: ClusterName,
        permit: StreamPermit,
        mut incoming: impl Stream<Item = Result<pb::WatchRequest, Status>> + Unpin,
        outbox: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    ) {
        let opened = async {
            let first = tokio::time::timeout(OPENING_TIME, incoming.next()).await;
            let first = first.map_err(|_| Status::deadline_exceeded("the first message took too long"))?;
            let first = first.transpose()?;
            self.renew_lease(&cluster).await?;
            let Some(WatchRequest::Open(open)) = first.and_then(codec::watch::decode_request) else {
                return Err(Status::invalid_argument("the first message must be open"));
            };
            tokio::time::sleep_until(self.slot(&cluster, |shared| &shared.interests, OWN_EVERY)).await;
            self.shared.used_watching.affordable(&cluster).await;
            // Decoded outside the lock.
            let began = Instant::now();
            let open = ReadOpening::of(open);
            let opened = |exchange: &mut Exchange| exchange.watch_opened(cluster.clone(), open);
            let id = self.charged(&cluster, began.elapsed(), opened).await;
            id.map_err(|error| Status::invalid_argument(error.to_string()))
        };
        let id = match opened.await {
            Ok(id) => id,
            Err(status) => {
                let _ = outbox.send(Err(status)).await;
                return;
            }
        };
        let notify = Arc::new(Notify::new());
        notify.notify_one();
        lock(&self.shared.wake).insert(id, Arc::clone(&notify));
        let ended = tokio::select! {
            () = self.stop.cancelled() => Ok(()),
            ended = guarded("a watching stream", self.send_watched(&cluster, id, &mut incoming, &outbox, &notify)) => {
                ended
            }
        };
        lock(&self.shared.wake).remove(&id);
        self.charged(&cluster, Duration::ZERO, |exchange| exchange.watch_close(id)).await;
        drop(permit);
        if let Err(status) = ended {
            tracing::info!(%cluster, error = status.message(), "watching ended");
            let _ = outbox.send(Err(status)).await;
        }
    }

    async fn send_watched(
        &self,
        cluster: &ClusterName,
        id: ReceiverId,
        incoming: &mut (impl Stream<Item = Result<pb::WatchRequest, Status>> + Unpin),
        outbox: &mpsc::Sender<Result<pb::WatchResponse, Status>>,
        notify: &Notify,
    ) -> Result<(), Status> {
        let gone = || Status::cancelled("the member is gone");
        let mut beat = tokio::time::interval(HEARTBEAT);
        let mut renewed = tokio::time::Instant::now();
        let mut has_more = false;
        let mut next_request = renewed;
        let mut next_part = renewed;
        // A request that was received and not taken yet.
        let mut waiting: Option<WatchRequest> = None;
        let mut keeps_since: Option<tokio::time::Instant> = None;
        let mut hubs = self.shared.hubs.subscribe();
        hubs.mark_changed();
        // The last comparison: when, and its result.
        let (mut is_welcomed, mut compared) = (false, None);
        loop {
            tokio::select! {
                biased;
                // Acknowledgements and heartbeats of a slow reader are read also while there is no room for it.
                request = async {
                    tokio::time::sleep_until(next_request).await;
                    incoming.next().await
                }, if waiting.is_none() => {
                    let Some(request) = request.transpose()? else { return Ok(()) };
                    let request = codec::watch::decode_request(request);
                    if matches!(request, Some(WatchRequest::Own(_))) {
                        next_request = self.slot(cluster, |shared| &shared.interests, OWN_EVERY) + OWN_EVERY;
                    }
                    if renewed.elapsed() > RENEW_EVERY {
                        self.renew_lease(cluster).await?;
                        renewed = tokio::time::Instant::now();
                    }
                    // None: a message of a later version.
                    waiting = request.filter(|request| *request != WatchRequest::Heartbeat);
                }
                () = self.shared.used_watching.affordable(cluster), if waiting.is_some() => {
                    let Some(request) = waiting.take() else { continue };
                    // Decoded outside the lock.
                    let began = Instant::now();
                    let request = ReadRequest::of(request);
                    self.charged(cluster, began.elapsed(), |exchange| exchange.watch_read(id, request)).await
                        .map_err(|error| Status::invalid_argument(error.to_string()))?;
                }
                () = notify.notified(), if !has_more => has_more = true,
                // The message is made when there is room for it, so that it is the newest.
                room = async {
                    tokio::time::sleep_until(next_part).await;
                    let room = outbox.reserve().await;
                    self.shared.used_watching.affordable(cluster).await;
                    room
                }, if has_more => {
                    let room = room.map_err(|_| gone())?;
                    match self.charged(cluster, Duration::ZERO, |exchange| exchange.next_step(id)).await {
                        Next::Message(message) => {
                            is_welcomed |= matches!(message, WatchResponse::Welcome { .. });
                            room.send(Ok(codec::watch::encode_response(message)));
                        }
                        Next::Evaluate(evaluation) => {
                            // Outside the lock.
                            let began = Instant::now();
                            let evaluated = evaluation.evaluate();
                            let take = |exchange: &mut Exchange| exchange.take_evaluated(&evaluated);
                            self.charged(cluster, began.elapsed(), take).await;
                        }
                        Next::Building => next_part = tokio::time::Instant::now() + BETWEEN_PARTS,
                        Next::Nothing => has_more = false,
                    }
                }
                // Only while it is served: then this replica's list is not older than what the member has.
                room = async {
                    // This service has the sender.
                    let _ = hubs.changed().await;
                    // Marked again if this is cancelled while it waits for room.
                    hubs.mark_changed();
                    outbox.reserve().await
                }, if is_welcomed => {
                    let list: Vec<String> = hubs.borrow_and_update().iter().cloned().collect();
                    room.map_err(|_| gone())?.send(Ok(codec::watch::encode_response(WatchResponse::Hubs(list))));
                }
                now = beat.tick() => {
                    // With one replica, no other needs the result. Right after a change, digests differ for a moment.
                    let is_due = compared.is_none_or(|(at, equal): (tokio::time::Instant, bool)| {
                        !equal || at.elapsed() > COMPARE_EVERY
                    });
                    if is_welcomed && is_due && hubs.borrow().len() > 1 {
                        let equal = self.look(|exchange| exchange.digests_equal(cluster)).await;
                        if let (Some(equal), Ok(room)) = (equal, outbox.try_reserve()) {
                            compared = Some((now, equal));
                            room.send(Ok(codec::watch::encode_response(WatchResponse::Compared { equal })));
                        }
                    }
                    let keeps_replaced = self.look(|exchange| exchange.keeps_replaced(id)).await;
                    keeps_since = keeps_replaced.then(|| keeps_since.unwrap_or(now));
                    if keeps_since.is_some_and(|since| since.elapsed() > ACKNOWLEDGE_TIME) {
                        self.charged(cluster, Duration::ZERO, |exchange| exchange.widen(id)).await;
                    }
                    match outbox.try_reserve() {
                        Ok(room) => {
                            room.send(Ok(codec::watch::encode_response(WatchResponse::Heartbeat)));
                        }
                        Err(TrySendError::Closed(())) => return Err(gone()),
                        // The messages that wait serve as heartbeats.
                        Err(TrySendError::Full(())) => {}
                    }
                }
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns when another process is served instead.
async fn replaced(served: Option<&ServedProcess>) {
    match served {
        Some(process) => process.replaced().await,
        None => std::future::pending().await,
    }
}

/// A panic while a stream is served ends only that stream.
async fn guarded(name: &'static str, stream: impl Future<Output = Result<(), Status>>) -> Result<(), Status> {
    caught(name, stream).await.unwrap_or_else(|panicked| Err(Status::internal(panicked.to_string())))
}

/// The updates that a message counts as. A batch costs one even if it has none.
fn cost(request: &PublishRequest) -> usize {
    match request {
        PublishRequest::Frame(bytes) => codec::frame::count(bytes).max(1),
        PublishRequest::Begin { .. } => 1,
        _ => 0,
    }
}

fn refused(error: PublishError) -> Status {
    match error {
        PublishError::NoRoom => Status::resource_exhausted(error.to_string()),
        _ => Status::invalid_argument(error.to_string()),
    }
}

fn cluster_of<T>(request: &Request<T>) -> Result<ClusterName, Status> {
    match peer_identity(request)? {
        Identity::Cluster(name) => Ok(Arc::clone(name)),
        _ => Err(Status::permission_denied("only members exchange")),
    }
}

#[tonic::async_trait]
impl Wire for Service {
    type PublishStream = Pin<Box<dyn Stream<Item = Result<pb::PublishResponse, Status>> + Send>>;

    async fn publish(
        &self,
        request: Request<Streaming<pb::PublishRequest>>,
    ) -> Result<Response<Self::PublishStream>, Status> {
        let cluster = cluster_of(&request)?;
        let from = peer(&request)?.address;
        let permit = StreamPermit::acquire(&self.shared.publishing, &cluster)?;
        let (outbox, sending) = mpsc::channel(OUTBOX);
        let span = tracing::info_span!("publish_stream", %cluster);
        tokio::spawn(self.clone().published(cluster, permit, from, request.into_inner(), outbox).instrument(span));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let cluster = cluster_of(&request)?;
        let permit = StreamPermit::acquire(&self.shared.watching, &cluster)?;
        let (outbox, sending) = mpsc::channel(OUTBOX);
        let span = tracing::info_span!("watch_stream", %cluster);
        tokio::spawn(self.clone().watched(cluster, permit, request.into_inner(), outbox).instrument(span));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }
}

impl Service {
    async fn take_report(
        &self,
        cluster: &ClusterName,
        id: PublishId,
        report: pb::Realisation,
    ) -> Result<(), PublishError> {
        let state = report::state(&report);
        self.with(|exchange| exchange.publish_report(id, state)).await?;
        let reported = (tokio::time::Instant::now(), Arc::new(report));
        lock(&self.shared.reported).insert(cluster.clone(), reported);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
