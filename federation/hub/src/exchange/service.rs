//! The exchange over gRPC. Who a caller is comes from its certificate; what it is sent is decided by [`hanse_exchange::hub`].
//!
//! One lock guards the core, which never waits while it holds it. A receiver's stream asks for the next message when its
//! connection has room, so a slow one costs its dirty ids and nothing else, and makes nobody wait.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hanse_identity::Identity;
use hanse_identity::instances::Instance;
use hanse_identity::tls::{peer, peer_identity};
use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::exchange_server::Exchange as Wire;
use hanse_protocol::reason::{ExchangeProblem, Reason};
use hanse_runtime::supervisor::caught;
use hanse_store::Revision;
use prometheus_client::metrics::histogram::Histogram;
use prost::Message as _;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use super::derive::Deriver;
use super::progress::Report;
use super::report;
use super::speakers::{Speakers, Speaking};
use crate::grants::Limits;
use crate::manifest::{Kind, ObjectId};
use crate::metrics::HubMetrics;
use crate::registry::{Lease, Registry, Snapshot};
use crate::status::{NodeProgress, ObjectState, ObjectStatus, Problem, Realisation, Realisations, Reasons};
use hanse_exchange::codec;
use hanse_exchange::hub::{Exchange, PublishError, PublishId, Published, ReadOpening, ReadRequest, ReceiverId};
use hanse_exchange::limits::MAX_PLAIN_BYTES;
use hanse_exchange::message::{PublishRequest, WatchRequest, WatchResponse};
use hanse_exchange::model::{ManifestKind, Position};

/// Messages that wait for one connection: 4 × 1 MiB at most.
const OUTBOX: usize = 4;
/// How often a quiet stream says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Streams of one cluster in each direction: replicas of its member, each twice while a certificate is renewed.
const MAX_STREAMS: usize = 8;
/// A watching stream says what it holds within this time.
const OPENING_TIME: Duration = Duration::from_secs(30);
/// The exchange is free for so long after each part of a large batch: 300 parts take 0.3 s longer.
const BETWEEN_PARTS: Duration = Duration::from_millis(1);
/// The next frame of a batch comes within this time ...
const FRAME_TIME: Duration = Duration::from_secs(30);
/// ... and its end within this: 300,000 endpoints of 250 bytes take 10 minutes at 1 Mbit/s.
const BATCH_TIME: Duration = Duration::from_secs(900);
/// How often one cluster may report: a report is up to 4 MiB, and is compared with all that the cluster enforces.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// How often one cluster may open a watching stream, or change what it wants: a change is judged against every endpoint that it concerns.
const OWN_EVERY: Duration = Duration::from_millis(100);
/// After a part of the work that a new interest of a cluster makes, the cluster's next part comes so many times later than the part
/// took: what all streams of one cluster make the hub evaluate takes at most a third of the exchange's time.
const EVALUATION_PAUSE: u32 = 2;
/// A lease is for seconds: hearing a cluster once in this time is enough.
const HEARD_EVERY: Duration = Duration::from_secs(1);
/// What keeps nodes from enforcing, of one cluster, that status names: some 200 bytes each.
const MAX_PROBLEMS: usize = 32;

/// The exchange of this replica. Clones share it.
#[derive(Debug, Clone)]
pub struct Service {
    registry: Registry,
    shared: Arc<Shared>,
    stop: CancellationToken,
    /// How long the lock was held, each time.
    held: Histogram,
}

#[derive(Debug, Default)]
struct Shared {
    exchange: Mutex<Exchange>,
    /// Wakes the stream of a receiver.
    wake: Mutex<HashMap<ReceiverId, Arc<Notify>>>,
    /// How many streams each cluster has here.
    publishing: Mutex<BTreeMap<ClusterName, usize>>,
    watching: Mutex<BTreeMap<ClusterName, usize>>,
    rates: Mutex<BTreeMap<ClusterName, Rate>>,
    /// The last report of enforcement of each cluster, and when it came.
    reported: Mutex<BTreeMap<ClusterName, (tokio::time::Instant, Arc<pb::Realisation>)>>,
    /// Clusters that are connected and have not published here yet.
    unpublished: Mutex<BTreeMap<ClusterName, Unpublished>>,
    receiving: Mutex<BTreeMap<ClusterName, Receiving>>,
    speakers: Speakers,
    /// When each cluster may next report, and change what it wants, over whichever stream.
    reports: Mutex<BTreeMap<ClusterName, tokio::time::Instant>>,
    wants: Mutex<BTreeMap<ClusterName, tokio::time::Instant>>,
    /// When each cluster's interests may next be evaluated.
    evaluations: Mutex<BTreeMap<ClusterName, tokio::time::Instant>>,
}

/// What a cluster said last of what reaches it.
#[derive(Debug, Clone, Copy)]
struct Receiving {
    /// How long ago it had received something; none where it has not since its start.
    age: Option<Duration>,
    said: tokio::time::Instant,
}

impl Receiving {
    /// Takes in what a cluster says now. A process that has received nothing yet does not renew what a former one received: one that
    /// restarts within each lease would never count as deaf.
    fn note(
        all: &mut BTreeMap<ClusterName, Self>,
        cluster: &ClusterName,
        age: Option<Duration>,
        said: tokio::time::Instant,
    ) {
        let now = Self { age, said };
        match age {
            Some(_) => drop(all.insert(cluster.clone(), now)),
            None => _ = all.entry(cluster.clone()).or_insert(now),
        }
    }

    /// Why a cluster does not count as enforcing, if it does not: what it has may be old. `watches`: it has a watching
    /// stream here.
    fn trouble(
        this: Option<&Self>,
        watches: bool,
        lease: Duration,
        now: tokio::time::Instant,
    ) -> Option<ExchangeProblem> {
        let no_stream = || ExchangeProblem::NotWatching;
        let Some(this) = this else { return (!watches).then(no_stream) };
        let age = this.age.unwrap_or_default().saturating_add(now.duration_since(this.said));
        if age >= lease {
            return Some(ExchangeProblem::NotReceiving(age));
        }
        (this.age.is_none() && !watches).then(no_stream)
    }
}

/// How long a cluster has not published, and since it last sent something of its first batch.
#[derive(Debug, Clone, Copy)]
struct Unpublished {
    since: tokio::time::Instant,
    progress: tokio::time::Instant,
    heard: tokio::time::Instant,
    /// That it is silent was said.
    told: bool,
}

impl Unpublished {
    fn new(now: tokio::time::Instant) -> Self {
        Self { since: now, progress: now, heard: now, told: false }
    }

    /// Whoever sends nothing for a lease's time, or does not come to an end of it in ten, is silent: others would wait for it
    /// for ever.
    fn is_silent(&mut self, lease: Duration, now: tokio::time::Instant) -> bool {
        // Its lease had ended; nobody waited for it.
        if now.duration_since(self.heard) > lease {
            *self = Self::new(now);
        }
        self.heard = now;
        now.duration_since(self.progress) > lease || now.duration_since(self.since) > lease * 10
    }
}

/// A batch that has begun and not ended: what is staged of it is held for so long.
#[derive(Debug, Clone, Copy)]
struct Unfinished {
    began: tokio::time::Instant,
    /// When something of it came last.
    progress: tokio::time::Instant,
}

impl Unfinished {
    fn follow(this: &mut Option<Self>, request: &PublishRequest, now: tokio::time::Instant) {
        match (request, this.as_mut()) {
            (PublishRequest::Begin { .. }, _) => *this = Some(Self { began: now, progress: now }),
            (PublishRequest::Frame(_), Some(unfinished)) => unfinished.progress = now,
            (PublishRequest::End { .. }, _) => *this = None,
            _ => {}
        }
    }

    /// It was the hub that made it wait.
    fn waited(&mut self, time: Duration) {
        self.began += time;
        self.progress += time;
    }

    fn ends_at(&self) -> tokio::time::Instant {
        (self.began + BATCH_TIME).min(self.progress + FRAME_TIME)
    }
}

/// What comes next, in time where a batch is unfinished.
async fn within<T>(unfinished: &Option<Unfinished>, next: impl Future<Output = T>) -> Result<T, Status> {
    match unfinished {
        None => Ok(next.await),
        Some(unfinished) => tokio::time::timeout_at(unfinished.ends_at(), next)
            .await
            .map_err(|_| Status::deadline_exceeded("a batch was begun and not ended in time")),
    }
}

/// One of a cluster's streams.
#[derive(Debug)]
struct Place {
    shared: Arc<Shared>,
    cluster: ClusterName,
    of: fn(&Shared) -> &Mutex<BTreeMap<ClusterName, usize>>,
}

impl Place {
    fn take(
        shared: &Arc<Shared>,
        cluster: &ClusterName,
        of: fn(&Shared) -> &Mutex<BTreeMap<ClusterName, usize>>,
    ) -> Result<Self, Status> {
        let mut streams = lock(of(shared));
        let count = streams.entry(cluster.clone()).or_default();
        if *count >= MAX_STREAMS {
            return Err(Status::resource_exhausted(format!("{MAX_STREAMS} such streams of the cluster are open")));
        }
        *count += 1;
        Ok(Self { shared: Arc::clone(shared), cluster: cluster.clone(), of })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut streams = lock((self.of)(&self.shared));
        if let Some(count) = streams.get_mut(&self.cluster) {
            *count -= 1;
            if *count == 0 {
                streams.remove(&self.cluster);
            }
        }
    }
}

/// How many updates a cluster may publish now: a bucket that fills at the granted rate, and holds a minute of it or
/// everything that the cluster may publish, whichever is more. It may be overdrawn by one message.
#[derive(Debug, Clone, Copy)]
struct Rate {
    left: f64,
    at: tokio::time::Instant,
    slowed: Option<tokio::time::Instant>,
}

impl Rate {
    /// Takes `updates` out, and says how long the next ones must wait.
    fn spend(&mut self, updates: usize, limits: Limits, now: tokio::time::Instant) -> Duration {
        // At least one in a second, or nothing would ever end.
        let per_second = limits.updates_per_second.max(1) as f64;
        let full = (per_second * 60.0).max(limits.endpoints.saturating_add(limits.label_sets) as f64);
        self.left = (self.left + now.duration_since(self.at).as_secs_f64() * per_second).min(full) - updates as f64;
        self.at = now;
        if self.left >= 0.0 {
            return Duration::ZERO;
        }
        self.slowed = Some(now);
        Duration::try_from_secs_f64(-self.left / per_second).unwrap_or(Duration::MAX)
    }

    fn full(now: tokio::time::Instant) -> Self {
        Self { left: f64::MAX, at: now, slowed: None }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere does not make the data wrong: each call leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    pub fn new(registry: Registry, stop: CancellationToken) -> Self {
        let shared = Arc::<Shared>::default();
        // Three chances within a lease.
        let heartbeat = u64::try_from(registry.lease_time().as_millis() / 3).unwrap_or(u64::MAX);
        lock(&shared.exchange).set_heartbeat(heartbeat);
        Self { registry, shared, stop, held: HubMetrics::default().exchange_held }
    }

    /// Measures into the hub's metrics.
    pub fn with_metrics(self, metrics: &HubMetrics) -> Self {
        Self { held: metrics.exchange_held.clone(), ..self }
    }

    /// Follows the registry until `stop`: policies, clusters, grants, leases.
    pub async fn follow_registry(self) {
        let mut view = self.registry.subscribe();
        let mut deriver = Deriver::default();
        loop {
            let snapshot = view.borrow_and_update().clone();
            let newest = deriver.federation(&self.registry, &snapshot);
            self.with(|exchange| exchange.set_federation_part(newest));
            while self.with(Exchange::regrant_more) {
                tokio::time::sleep(BETWEEN_PARTS).await;
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                changed = view.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Works on the core, and wakes whoever then has something to be sent.
    fn with<T>(&self, work: impl FnOnce(&mut Exchange) -> T) -> T {
        let (result, ready) = {
            let mut exchange = lock(&self.shared.exchange);
            let began = Instant::now();
            let result = work(&mut exchange);
            let ready = exchange.take_ready();
            drop(exchange);
            self.held.observe(began.elapsed().as_secs_f64());
            (result, ready)
        };
        let wake = lock(&self.shared.wake);
        ready.iter().filter_map(|id| wake.get(id)).for_each(|notify| notify.notify_one());
        result
    }

    /// Looks at the core.
    fn look<T>(&self, at: impl FnOnce(&Exchange) -> T) -> T {
        let exchange = lock(&self.shared.exchange);
        let began = Instant::now();
        let result = at(&exchange);
        drop(exchange);
        self.held.observe(began.elapsed().as_secs_f64());
        result
    }

    /// A cluster was heard; which counts for nothing while it does not publish.
    async fn heard(&self, cluster: &ClusterName) -> Result<(), Status> {
        if self.is_silent(cluster) {
            return Ok(());
        }
        self.registry.heard(cluster).await.map_err(|error| Status::permission_denied(error.to_string()))
    }

    fn is_silent(&self, cluster: &ClusterName) -> bool {
        let now = tokio::time::Instant::now();
        let published = self.look(|exchange| exchange.has_published(cluster));
        let mut unpublished = lock(&self.shared.unpublished);
        if published {
            unpublished.remove(cluster);
            return false;
        }
        let state = unpublished.entry(cluster.clone()).or_insert_with(|| Unpublished::new(now));
        let silent = state.is_silent(self.registry.lease_time(), now);
        if silent && !std::mem::replace(&mut state.told, true) {
            tracing::warn!(%cluster, "it is connected and does not publish: it counts as silent");
        }
        silent
    }

    /// Why a cluster does not count as enforcing, whatever it reports of its nodes: nothing newer may have reached it.
    fn not_reached(&self, exchange: &Exchange, cluster: &ClusterName) -> Option<ExchangeProblem> {
        if let Some(conflict) = self.shared.speakers.conflict(cluster) {
            return Some(conflict);
        }
        if let Some(ahead) = exchange.ahead_of_hub(cluster) {
            let hub = exchange.federation().position.revision;
            return Some(ExchangeProblem::AheadOfHub { at: ahead, hub });
        }
        let watches = lock(&self.shared.watching).contains_key(cluster);
        let lease = self.registry.lease_time();
        Receiving::trouble(lock(&self.shared.receiving).get(cluster), watches, lease, tokio::time::Instant::now())
    }

    /// Its first batch is under way.
    fn progresses(&self, cluster: &ClusterName) {
        if let Some(state) = lock(&self.shared.unpublished).get_mut(cluster) {
            state.progress = tokio::time::Instant::now();
        }
    }

    async fn published(
        self,
        cluster: ClusterName,
        place: Place,
        from: SocketAddr,
        mut incoming: Streaming<pb::PublishRequest>,
        outbox: mpsc::Sender<Result<pb::PublishResponse, Status>>,
    ) {
        let id = self.with(|exchange| exchange.publish_open(cluster.clone()));
        let taken = self.take_published(&cluster, id, from, &mut incoming, &outbox);
        let ended = tokio::select! {
            () = self.stop.cancelled() => Ok(()),
            ended = guarded("a publishing stream", taken) => ended,
        };
        self.with(|exchange| exchange.publish_close(id));
        drop(place);
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
        incoming: &mut Streaming<pb::PublishRequest>,
        outbox: &mpsc::Sender<Result<pb::PublishResponse, Status>>,
    ) -> Result<(), Status> {
        let mut heard: Option<tokio::time::Instant> = None;
        let mut unfinished = None;
        let mut speaking: Option<Speaking> = None;
        let taken_over = || Status::aborted("another process publishes with this cluster's key");
        loop {
            let next = tokio::select! {
                biased;
                () = replaced(speaking.as_ref()) => return Err(taken_over()),
                next = within(&unfinished, incoming.message()) => next??,
            };
            let Some(request) = next else { return Ok(()) };
            let is_report = matches!(request.message, Some(pb::publish_request::Message::Realisation(_)));
            if !is_report && request.encoded_len() > MAX_PLAIN_BYTES {
                return Err(Status::invalid_argument("a message has at most 4 MiB"));
            }
            let request =
                codec::publish::decode_request(request).map_err(|error| Status::invalid_argument(error.to_string()))?;
            if let PublishRequest::Open { instance, .. } = &request {
                speaking = Some(self.shared.speakers.speak(cluster, Instance::new(instance, from))?);
            }
            // Before it is known which process speaks, nothing of the cluster counts as heard.
            let Some(speaking) = &speaking else {
                return Err(Status::invalid_argument("the first message must be open"));
            };
            if heard.is_none_or(|it| it.elapsed() > HEARD_EVERY) {
                self.heard(cluster).await?;
                heard = Some(tokio::time::Instant::now());
            }
            if let PublishRequest::Report(bytes) = &request {
                tokio::time::sleep_until(self.slot(cluster, |shared| &shared.reports, REPORT_EVERY)).await;
                if speaking.is_replaced() {
                    return Err(taken_over());
                }
                // Read while nobody waits for the exchange; one that is too large is not taken, and publishing goes on.
                let report = report::read(bytes);
                self.take_report(cluster, id, report).map_err(refused)?;
                continue;
            }
            if let PublishRequest::Heartbeat { received_age_ms } = &request {
                let age = received_age_ms.map(Duration::from_millis);
                let now = tokio::time::Instant::now();
                Receiving::note(&mut lock(&self.shared.receiving), cluster, age, now);
            }
            let updates = match &request {
                PublishRequest::Frame(bytes) => codec::frame::count(bytes),
                _ => 0,
            };
            if updates > 0 {
                self.progresses(cluster);
            }
            let began = tokio::time::Instant::now();
            Unfinished::follow(&mut unfinished, &request, began);
            let mut published = self.with(|exchange| exchange.publish_part(id, request)).map_err(refused)?;
            let answers = loop {
                match published {
                    Published::Answers(answers) => break answers,
                    Published::More => {
                        // A lock is not fair: who waits for it gets it meanwhile.
                        tokio::time::sleep(BETWEEN_PARTS).await;
                        if heard.is_none_or(|it| it.elapsed() > HEARD_EVERY) {
                            self.heard(cluster).await?;
                            heard = Some(tokio::time::Instant::now());
                        }
                        published = self.with(|exchange| exchange.publish_more(id)).map_err(refused)?;
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

    /// When a cluster may do next what it may do once in `every`. Streams that wait have a slot each; one that is given up costs its
    /// own cluster no more than the others wait.
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

    /// Waits where a cluster publishes faster than it was granted. Nothing is lost: the stream fills up, and the member
    /// sends the newest when there is room again. Meanwhile the cluster counts as heard.
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
        tracing::warn!(%cluster, granted = limits.updates_per_second, ?wait, "updates come faster than granted, taken later");
        let until = now.checked_add(wait).unwrap_or(now + Duration::from_secs(86_400));
        while tokio::time::Instant::now() < until {
            tokio::select! {
                () = tokio::time::sleep_until(until.min(tokio::time::Instant::now() + HEARD_EVERY)) => {}
                () = outbox.closed() => return Err(Status::cancelled("the member is gone")),
            }
            // It is we who make it wait.
            self.progresses(cluster);
            self.heard(cluster).await?;
        }
        Ok(())
    }

    async fn watched(
        self,
        cluster: ClusterName,
        place: Place,
        mut incoming: Streaming<pb::WatchRequest>,
        outbox: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    ) {
        let opened = async {
            let first = tokio::time::timeout(OPENING_TIME, incoming.message()).await;
            let first = first.map_err(|_| Status::deadline_exceeded("the first message took too long"))??;
            self.heard(&cluster).await?;
            let Some(WatchRequest::Open(open)) = first.and_then(codec::watch::decode_request) else {
                return Err(Status::invalid_argument("the first message must be open"));
            };
            tokio::time::sleep_until(self.slot(&cluster, |shared| &shared.wants, OWN_EVERY)).await;
            // Read while nobody waits for the exchange.
            let open = ReadOpening::of(open);
            let id = self.with(|exchange| exchange.watch_opened(cluster.clone(), open));
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
        self.with(|exchange| exchange.watch_close(id));
        drop(place);
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
        let mut heard = tokio::time::Instant::now();
        let mut has_more = false;
        let mut next_request = heard;
        let mut next_part = heard;
        loop {
            tokio::select! {
                biased;
                // Also while a slow reader leaves no room: what it acknowledges, and that it lives, does not wait for it.
                request = async {
                    tokio::time::sleep_until(next_request).await;
                    incoming.next().await
                } => {
                    let Some(request) = request.transpose()? else { return Ok(()) };
                    let request = codec::watch::decode_request(request);
                    if matches!(request, Some(WatchRequest::Own(_))) {
                        next_request = self.slot(cluster, |shared| &shared.wants, OWN_EVERY) + OWN_EVERY;
                    }
                    if heard.elapsed() > HEARD_EVERY {
                        self.heard(cluster).await?;
                        heard = tokio::time::Instant::now();
                    }
                    // A message of a later version.
                    let Some(request) = request else { continue };
                    let request = ReadRequest::of(request);
                    self.with(|exchange| exchange.watch_read(id, request))
                        .map_err(|error| Status::invalid_argument(error.to_string()))?;
                }
                () = notify.notified(), if !has_more => has_more = true,
                // Room first, then the message: what is newest when there is room.
                room = async {
                    tokio::time::sleep_until(next_part).await;
                    outbox.reserve().await
                }, if has_more => {
                    let room = room.map_err(|_| gone())?;
                    let began = Instant::now();
                    let (message, is_building) = self.with(|exchange| (exchange.next(id), exchange.is_building(id)));
                    if is_building {
                        let pause = BETWEEN_PARTS.max(began.elapsed() * EVALUATION_PAUSE);
                        next_part = self.slot(cluster, |shared| &shared.evaluations, pause) + pause;
                    }
                    match message {
                        Some(message) => room.send(Ok(codec::watch::encode_response(message))),
                        None => has_more = is_building,
                    }
                }
                _ = beat.tick() => match outbox.try_reserve() {
                    Ok(room) => {
                        room.send(Ok(codec::watch::encode_response(WatchResponse::Heartbeat)));
                    }
                    Err(TrySendError::Closed(())) => return Err(gone()),
                    // What waits says it as well.
                    Err(TrySendError::Full(())) => {}
                },
            }
        }
    }
}

/// Returns when another process is served than the one that speaks.
async fn replaced(speaking: Option<&Speaking>) {
    match speaking {
        Some(speaking) => speaking.replaced().await,
        None => std::future::pending().await,
    }
}

/// A defect that one cluster's messages meet ends its stream, and leaves nothing of the stream behind.
async fn guarded(name: &'static str, stream: impl Future<Output = Result<(), Status>>) -> Result<(), Status> {
    caught(name, stream).await.unwrap_or_else(|panicked| Err(Status::internal(panicked.to_string())))
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
        let place = Place::take(&self.shared, &cluster, |shared| &shared.publishing)?;
        let (outbox, sending) = mpsc::channel(OUTBOX);
        let span = tracing::info_span!("publish_stream", %cluster);
        tokio::spawn(self.clone().published(cluster, place, from, request.into_inner(), outbox).instrument(span));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let cluster = cluster_of(&request)?;
        let place = Place::take(&self.shared, &cluster, |shared| &shared.watching)?;
        let (outbox, sending) = mpsc::channel(OUTBOX);
        let span = tracing::info_span!("watch_stream", %cluster);
        tokio::spawn(self.clone().watched(cluster, place, request.into_inner(), outbox).instrument(span));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }
}

impl Realisations for Service {
    fn clusters(&self) -> BTreeMap<Arc<str>, Realisation> {
        let publishing = lock(&self.shared.publishing).clone();
        let rates = lock(&self.shared.rates).clone();
        let snapshot = self.registry.snapshot();
        let names: Vec<ClusterName> = self.look(|exchange| exchange.federation().clusters.keys().cloned().collect());
        let mut known: BTreeMap<Arc<str>, Realisation> = BTreeMap::new();
        // What they say is put into words when nobody waits for the exchange.
        let mut reports = Vec::new();
        for name in &names {
            // One by one: each is compared with all others, which of thousands takes seconds in all.
            let exchange = lock(&self.shared.exchange);
            let began = Instant::now();
            let entry = known.entry(name.clone()).or_default();
            entry.connected = publishing.get(name).is_some_and(|count| *count > 0);
            if let Some(origin) = exchange.origin(name) {
                let position = origin.position;
                (entry.epoch, entry.revision) = (position.epoch, position.revision);
                entry.endpoints = origin.endpoint_count() as u64;
                let (total, refusals) = origin.refusals(10);
                entry.refused = total as u64;
                entry.refusals = refusals.into_iter().map(|(id, why)| origin.explain(id, &why)).collect();
            }
            let slowed = rates.get(name).and_then(|rate| rate.slowed);
            if slowed.is_some_and(|at| at.elapsed() < Duration::from_secs(60)) {
                let granted = snapshot.clusters.get(name).map_or(0, |it| it.grant.limits.updates_per_second);
                entry.refusals.push(format!("more than {granted} updates per second: taken later"));
            }
            // Of one that is not connected that is said already.
            let not_reached = entry.connected.then(|| self.not_reached(&exchange, name)).flatten();
            entry.problems.extend(not_reached.map(|why| Problem::new("", Reason::Exchange(why))));
            if let Some(told) = self.last_report(&exchange, name) {
                entry.received_revision = told.received.as_ref().map_or(0, |at| at.revision);
                (entry.agents, entry.agents_current) = (told.agents, told.agents_current);
                entry.digests_equal = exchange.digests_equal(name);
                let unenforced = told.nodes.iter().map(|node| node.unenforced_total);
                entry.unenforced = unenforced.fold(0, u32::saturating_add);
                reports.push((name.clone(), told));
            }
            drop(exchange);
            self.held.observe(began.elapsed().as_secs_f64());
        }
        let position = self.look(|exchange| exchange.federation().position);
        for (name, told) in reports {
            let Some(entry) = known.get_mut(&name) else { continue };
            let report = self.report(&snapshot, &name, &told, position);
            entry.enforced_revision = report.enforced_revision();
            let mut problems = report.problems();
            entry.problems.extend(problems.by_ref().take(MAX_PROBLEMS));
            let total = entry.problems.len() + problems.count();
            entry.problems_total = u32::try_from(total).unwrap_or(u32::MAX);
        }
        known
    }

    fn nodes(&self, cluster: &str) -> Vec<NodeProgress> {
        let (told, position) =
            self.look(|exchange| (self.last_report(exchange, cluster), exchange.federation().position));
        let snapshot = self.registry.snapshot();
        let nodes =
            told.iter().flat_map(|told| self.report(&snapshot, cluster, told, position).nodes().collect::<Vec<_>>());
        let mut nodes: Vec<NodeProgress> = nodes.collect();
        nodes.sort_by(|one, other| one.name.cmp(&other.name));
        nodes
    }

    fn object(&self, id: &ObjectId, gone_at: Revision) -> Option<BTreeMap<Arc<str>, ObjectStatus>> {
        let snapshot = self.registry.snapshot();
        let object = snapshot.objects.get(id);
        let needed = object.map_or(if gone_at > 0 { gone_at } else { snapshot.revision }, |object| object.revision);
        let policy = object.filter(|_| id.kind == Kind::FederatedNetworkPolicy).map(|_| &*id.name);
        let exchange = lock(&self.shared.exchange);
        let federation = exchange.federation();
        let position = federation.position;
        let clusters: Vec<ClusterName> = match policy {
            Some(name) => {
                let manifest = federation.manifests.get(&(ManifestKind::Policy, Arc::from(name)))?;
                manifest.enforcers.iter().flatten().cloned().collect()
            }
            None if position.revision < needed => return None,
            None => federation.clusters.keys().cloned().collect(),
        };
        let told = |cluster: &ClusterName| (self.last_report(&exchange, cluster), self.not_reached(&exchange, cluster));
        let told: Vec<_> = clusters.iter().map(told).collect();
        drop(exchange);
        let status =
            |cluster: &ClusterName, (told, not_reached): (Option<Arc<pb::Realisation>>, Option<ExchangeProblem>)| {
                let Some(told) = told else { return ObjectStatus::lagging(Reason::NotReported) };
                let report = self.report(&snapshot, cluster, &told, position);
                let status = report.object(policy, needed);
                if report.silent {
                    let silent = self.registry.silent_for(cluster).map_or(Duration::ZERO, |since| since);
                    let why = Reasons::of_cluster(Reason::ClusterSilent(silent));
                    return ObjectStatus { state: ObjectState::Lagging(why), ..status };
                }
                if let Some(why) = not_reached {
                    let why = Reasons::of_cluster(Reason::Exchange(why));
                    return ObjectStatus { state: ObjectState::Lagging(why), ..status };
                }
                status
            };
        Some(clusters.iter().zip(told).map(|(cluster, told)| (cluster.clone(), status(cluster, told))).collect())
    }
}

impl Service {
    fn take_report(&self, cluster: &ClusterName, id: PublishId, report: pb::Realisation) -> Result<(), PublishError> {
        let state = report::state(&report);
        self.with(|exchange| exchange.publish_report(id, state))?;
        let reported = (tokio::time::Instant::now(), Arc::new(report));
        lock(&self.shared.reported).insert(cluster.clone(), reported);
        Ok(())
    }

    /// The last report of an accepted cluster.
    fn last_report(&self, exchange: &Exchange, cluster: &str) -> Option<Arc<pb::Realisation>> {
        let reported = lock(&self.shared.reported).get(cluster).map(|(_, report)| Arc::clone(report));
        reported.filter(|_| exchange.has_reported(cluster))
    }

    fn report<'a>(&self, snapshot: &Snapshot, cluster: &str, told: &'a pb::Realisation, hub: Position) -> Report<'a> {
        let at = lock(&self.shared.reported).get(cluster).map(|(at, _)| *at);
        let silent = snapshot.clusters.get(cluster).is_some_and(|it| it.lease == Lease::Stale);
        Report { told, hub, age: at.map_or(Duration::ZERO, |at| at.elapsed()), silent }
    }
}

#[cfg(test)]
mod tests;
