//! The exchange over gRPC. Who a caller is comes from its certificate; what it is sent is decided by [`super::core`].
//!
//! One lock guards the core, which never waits while it holds it. A receiver's stream asks for the next message when its
//! connection has room, so a slow one costs its dirty ids and nothing else, and makes nobody wait.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::exchange_server::Exchange as Wire;
use hanse_runtime::Identity;
use hanse_runtime::tls::peer_identity;
use tokio::sync::{Notify, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::core::{Exchange, PublishId, ReceiverId};
use super::derive::federation;
use super::model::ManifestKind;
use crate::registry::{Lease, Registry};
use crate::status::{PolicyState, Realisation, Realisations};

/// Messages that wait for one connection: 4 × 1 MiB at most.
const OUTBOX: usize = 4;
/// How often a quiet stream says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(3);

/// What keeps nodes from enforcing, of one cluster, that status names: some 200 bytes each.
const MAX_PROBLEMS: usize = 32;
/// Errors of this stand for any object.
const EVERY_OBJECT: &str = "*";

/// The exchange of this replica. Clones share it.
#[derive(Debug, Clone)]
pub struct Service {
    registry: Registry,
    shared: Arc<Shared>,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct Shared {
    exchange: Mutex<Exchange>,
    /// Wakes the stream of a receiver.
    wake: Mutex<HashMap<ReceiverId, Arc<Notify>>>,
    /// How many publishing streams each cluster has here.
    publishing: Mutex<BTreeMap<ClusterName, usize>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere does not make the data wrong: each call leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    pub fn new(registry: Registry, stop: CancellationToken) -> Self {
        Self { registry, shared: Arc::default(), stop }
    }

    /// Follows the registry until `stop`: policies, clusters, grants, leases.
    pub async fn follow_registry(self) {
        let mut view = self.registry.subscribe();
        loop {
            let snapshot = view.borrow_and_update().clone();
            let newest = federation(&self.registry, &snapshot);
            self.with(|exchange| exchange.set_federation(newest));
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
            let result = work(&mut exchange);
            (result, exchange.take_ready())
        };
        let wake = lock(&self.shared.wake);
        ready.iter().filter_map(|id| wake.get(id)).for_each(|notify| notify.notify_one());
        result
    }

    async fn heard(&self, cluster: &str) -> Result<(), Status> {
        self.registry.heard(cluster).await.map_err(|error| Status::permission_denied(error.to_string()))
    }

    async fn published(
        self,
        cluster: ClusterName,
        mut incoming: Streaming<pb::PublishRequest>,
        outbox: mpsc::Sender<Result<pb::PublishResponse, Status>>,
    ) {
        let id = self.with(|exchange| exchange.publish_open(cluster.clone()));
        *lock(&self.shared.publishing).entry(cluster.clone()).or_default() += 1;
        let ended = tokio::select! {
            () = self.stop.cancelled() => Ok(()),
            ended = self.take_published(&cluster, id, &mut incoming, &outbox) => ended,
        };
        self.with(|exchange| exchange.publish_close(id));
        if let Some(count) = lock(&self.shared.publishing).get_mut(&cluster) {
            *count = count.saturating_sub(1);
        }
        if let Err(status) = ended {
            tracing::info!(%cluster, error = status.message(), "publishing ended");
            let _ = outbox.send(Err(status)).await;
        }
    }

    async fn take_published(
        &self,
        cluster: &ClusterName,
        id: PublishId,
        incoming: &mut Streaming<pb::PublishRequest>,
        outbox: &mpsc::Sender<Result<pb::PublishResponse, Status>>,
    ) -> Result<(), Status> {
        self.heard(cluster).await?;
        let mut heard = tokio::time::Instant::now();
        while let Some(request) = incoming.message().await? {
            // A lease is for seconds: hearing it once a second is enough.
            if heard.elapsed() > Duration::from_secs(1) {
                self.heard(cluster).await?;
                heard = tokio::time::Instant::now();
            }
            let answers = self
                .with(|exchange| exchange.publish(id, request))
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
            for answer in answers {
                outbox.send(Ok(answer)).await.map_err(|_| Status::cancelled("the member is gone"))?;
            }
        }
        Ok(())
    }

    async fn watched(
        self,
        cluster: ClusterName,
        mut incoming: Streaming<pb::WatchRequest>,
        outbox: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    ) {
        let opened = async {
            let first = incoming.message().await?;
            let Some(pb::watch_request::Message::Open(open)) = first.and_then(|first| first.message) else {
                return Err(Status::invalid_argument("the first message must be open"));
            };
            let id = self.with(|exchange| exchange.watch_open(cluster.clone(), open));
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
            ended = self.send_watched(&cluster, id, &mut incoming, &outbox, &notify) => ended,
        };
        lock(&self.shared.wake).remove(&id);
        self.with(|exchange| exchange.watch_close(id));
        if let Err(status) = ended {
            tracing::info!(%cluster, error = status.message(), "watching ended");
            let _ = outbox.send(Err(status)).await;
        }
    }

    async fn send_watched(
        &self,
        cluster: &ClusterName,
        id: ReceiverId,
        incoming: &mut Streaming<pb::WatchRequest>,
        outbox: &mpsc::Sender<Result<pb::WatchResponse, Status>>,
        notify: &Notify,
    ) -> Result<(), Status> {
        let gone = |_| Status::cancelled("the member is gone");
        let mut beat = tokio::time::interval(HEARTBEAT);
        loop {
            tokio::select! {
                biased;
                request = incoming.message() => {
                    let Some(request) = request? else { return Ok(()) };
                    self.with(|exchange| exchange.watch(id, request))
                        .map_err(|error| Status::invalid_argument(error.to_string()))?;
                }
                // Room first, then the message: what is newest when there is room.
                room = async { notify.notified().await; outbox.reserve().await } => {
                    let mut room = room.map_err(|_| Status::cancelled("the member is gone"))?;
                    while let Some(message) = self.with(|exchange| exchange.next(id)) {
                        room.send(Ok(message));
                        room = outbox.reserve().await.map_err(|_| Status::cancelled("the member is gone"))?;
                    }
                }
                _ = beat.tick() => {
                    self.heard(cluster).await?;
                    let message = pb::watch_response::Message::Heartbeat(pb::Heartbeat {});
                    outbox.send(Ok(pb::WatchResponse { message: Some(message) })).await.map_err(gone)?;
                }
            }
        }
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
        let (outbox, sending) = mpsc::channel(OUTBOX);
        tokio::spawn(self.clone().published(cluster, request.into_inner(), outbox));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let cluster = cluster_of(&request)?;
        let (outbox, sending) = mpsc::channel(OUTBOX);
        tokio::spawn(self.clone().watched(cluster, request.into_inner(), outbox));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }
}

/// What keeps a node from enforcing, in words.
fn problems(node: &pb::NodePosition) -> impl Iterator<Item = String> {
    let name = &node.node;
    let probe = (!node.probe.is_empty()).then(|| format!("node {name}: {}", node.probe));
    let errors = node.errors.iter().map(move |it| match it.object.as_str() {
        "" | EVERY_OBJECT => format!("node {name}: {}", it.error),
        object => format!("node {name}: {object}: {}", it.error),
    });
    let pod = move |it: &pb::UnenforcedPod| {
        format!("node {name}: pod {}/{} is not enforced: {}", it.namespace, it.name, it.reason)
    };
    probe.into_iter().chain(errors).chain(node.unenforced.iter().map(pod))
}

impl Realisations for Service {
    fn clusters(&self) -> BTreeMap<Arc<str>, Realisation> {
        let publishing = lock(&self.shared.publishing).clone();
        let exchange = lock(&self.shared.exchange);
        let mut known: BTreeMap<Arc<str>, Realisation> = BTreeMap::new();
        for name in exchange.federation().clusters.keys() {
            let entry = known.entry(name.clone()).or_default();
            entry.connected = publishing.get(name).is_some_and(|count| *count > 0);
            if let Some(origin) = exchange.origin(name) {
                let position = origin.position;
                (entry.epoch, entry.revision) = (position.epoch, position.revision);
                entry.endpoints = origin.endpoint_count() as u64;
                let (total, refusals) = origin.refusals(10);
                entry.refused = total as u64;
                entry.refusals = refusals.into_iter().map(|(id, why)| format!("object {id}: {why}")).collect();
            }
            if let Some(told) = exchange.realisations().get(name) {
                entry.enforced_revision = told.hub.as_ref().map_or(0, |at| at.revision);
                entry.received_revision = told.received.as_ref().map_or(0, |at| at.revision);
                (entry.agents, entry.agents_current) = (told.agents, told.agents_current);
                entry.digests_equal = exchange.digests_equal(name);
                entry.unenforced = told.nodes.iter().map(|node| node.unenforced_total).sum();
                entry.problems = told.nodes.iter().flat_map(problems).take(MAX_PROBLEMS).collect();
            }
        }
        known
    }

    fn policy(&self, policy: &str) -> Option<BTreeMap<Arc<str>, PolicyState>> {
        let snapshot = self.registry.snapshot();
        let object = snapshot
            .objects
            .iter()
            .find(|(id, _)| id.kind == crate::manifest::Kind::FederatedNetworkPolicy && *id.name == *policy);
        let needed = object.map(|(_, object)| object.revision)?;
        let exchange = lock(&self.shared.exchange);
        let manifest = exchange.federation().manifests.get(&(ManifestKind::Policy, Arc::from(policy)))?;
        let state = |cluster: &ClusterName| {
            if snapshot.clusters.get(cluster).is_some_and(|it| it.lease == Lease::Stale) {
                let silent = self.registry.silent_for(cluster).map_or(0, |since| since.as_secs());
                return PolicyState::Lagging(format!("silent for {silent} s"));
            }
            let Some(told) = exchange.realisations().get(cluster) else {
                return PolicyState::Lagging("has not reported yet".to_owned());
            };
            if let Some(refused) = told.policies.iter().find(|it| it.policy == policy) {
                match &refused.state {
                    Some(pb::policy_state::State::Refused(why)) => return PolicyState::Refused(why.clone()),
                    Some(pb::policy_state::State::Waiting(waiting)) => {
                        return PolicyState::Lagging(format!("waits for {}", waiting.clusters.join(", ")));
                    }
                    None => {}
                }
            }
            for node in &told.nodes {
                let of = |object: &str| node.errors.iter().find(|error| error.object == object);
                if let Some(error) = of(policy) {
                    return PolicyState::Refused(format!("node {}: {}", node.node, error.error));
                }
                if let Some(error) = of(EVERY_OBJECT) {
                    return PolicyState::Lagging(format!("node {}: {}", node.node, error.error));
                }
                if node.hub_revision < needed {
                    let failed = of("").map(|failed| format!(": {}", failed.error)).unwrap_or_default();
                    let at = node.hub_revision;
                    return PolicyState::Lagging(format!("node {} is at revision {at}{failed}", node.node));
                }
            }
            match told.hub.as_ref().map_or(0, |at| at.revision) {
                at if at < needed => PolicyState::Lagging(format!("is at revision {at}")),
                _ => PolicyState::Enforced,
            }
        };
        let enforcers = manifest.enforcers.iter().flatten();
        Some(enforcers.map(|cluster| (cluster.clone(), state(cluster))).collect())
    }
}
