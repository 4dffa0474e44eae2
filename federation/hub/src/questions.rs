//! Queries to members, for users: the hub does not store the policies of clusters.
//!
//! A member answers queries over a stream that it opens. The member of the source evaluates egress, that of the destination
//! ingress; the member of each end resolves its identity. The answer names a member without a stream.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use hanse_exchange::limits::MAX_ADDRESSES;
use hanse_identity::Identity;
use hanse_identity::tls::peer_identity;
use hanse_policy::evaluate::{End, Query};
use hanse_policy::explain::answer::{AnswerVerdict, Asked};
use hanse_policy::explain::{AnswerLine, Owners, QueryEnd, Question};
use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind, Inventory};
use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use hanse_runtime::supervisor::caught;
use pb::answer::Answer as Reply;
use pb::explanation::Explanation as Explained;
use pb::pods_question::Which;
use pb::question::Question as Ask;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::administration::{caller, permit};
use crate::registration::status;
use crate::registry::{Cluster, ClusterState, Registry};
use crate::roles::Need;

/// Queries in one request, and in one question.
const MAX_QUERIES: usize = 64;
/// A query: names of 253 bytes and some numbers.
const MAX_QUERY_BYTES: usize = 4096;
/// Questions that one member has at once.
const MAX_UNDER_WAY: usize = 16;
/// Pods in one answer, as members limit them.
const MAX_PODS: usize = 10_000;
/// Pods in one list, before the last cluster's: some 40 MiB.
const MAX_LISTED: usize = 100_000;
/// How long a member may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest answer: 64 traces, or 10,000 pods of some 400 bytes.
pub const MAX_ANSWER_BYTES: usize = 4 << 20;

/// The members that attend. Clones share them.
#[derive(Debug, Clone)]
pub struct Questions {
    registry: Registry,
    attendants: Arc<Mutex<BTreeMap<ClusterName, Attendant>>>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Attendant {
    /// Distinguishes the streams of one cluster.
    stream: u64,
    outbox: mpsc::Sender<Result<pb::Question, Status>>,
    next: u64,
    waiting: HashMap<u64, oneshot::Sender<Reply>>,
}

/// Why a member did not answer.
#[derive(Debug, Clone, thiserror::Error)]
enum AskError {
    #[error("the member of cluster {0} is not connected to this hub; see `hanse status`")]
    Absent(ClusterName),
    #[error("the member of cluster {0} has {MAX_UNDER_WAY} pending queries: try again later")]
    Busy(ClusterName),
    #[error("the member of cluster {0} did not answer within {patience} s", patience = PATIENCE.as_secs())]
    Silent(ClusterName),
    #[error("the member of cluster {0} refused the query: {1}")]
    Refused(ClusterName, String),
    #[error("the member of cluster {0} sent an answer that does not match the query")]
    Wrong(ClusterName),
    #[error("the member of cluster {0} sent an answer that this version cannot read: {1}")]
    Unreadable(ClusterName, String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves the map consistent, also when it panics.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Questions {
    pub fn new(registry: Registry, stop: CancellationToken) -> Self {
        Self { registry, attendants: Arc::default(), stop }
    }

    async fn ask(&self, cluster: &ClusterName, question: Ask) -> Result<Reply, AskError> {
        let absent = || AskError::Absent(cluster.clone());
        let (answer, answered) = oneshot::channel();
        let (outbox, message) = {
            let mut attendants = lock(&self.attendants);
            let attendant = attendants.get_mut(cluster).ok_or_else(absent)?;
            attendant.waiting.retain(|_, waiting| !waiting.is_closed());
            if attendant.waiting.len() >= MAX_UNDER_WAY {
                return Err(AskError::Busy(cluster.clone()));
            }
            attendant.next += 1;
            attendant.waiting.insert(attendant.next, answer);
            (attendant.outbox.clone(), pb::Question { id: attendant.next, question: Some(question) })
        };
        let asked = async {
            outbox.send(Ok(message)).await.map_err(|_| absent())?;
            answered.await.map_err(|_| absent())
        };
        match tokio::time::timeout(PATIENCE, asked).await {
            Err(_) => Err(AskError::Silent(cluster.clone())),
            Ok(Ok(Reply::Refused(why))) => Err(AskError::Refused(cluster.clone(), why)),
            Ok(answer) => answer,
        }
    }

    async fn pods(&self, cluster: &ClusterName, which: Which) -> Result<pb::Pods, AskError> {
        match self.ask(cluster, Ask::Pods(pb::PodsQuestion { which: Some(which.clone()) })).await? {
            Reply::Pods(pods) => Ok(self.requested(cluster, &which, pods)),
            _ => Err(AskError::Wrong(cluster.clone())),
        }
    }

    async fn explained(&self, cluster: &ClusterName, queries: Vec<Bytes>) -> Result<pb::Explained, AskError> {
        let count = queries.len();
        match self.ask(cluster, Ask::Explain(pb::ExplainQuestion { queries })).await? {
            Reply::Explained(explained) if explained.explanations.len() == count => Ok(explained),
            _ => Err(AskError::Wrong(cluster.clone())),
        }
    }

    /// Of the pods that a member answered, those that were requested, at most one of each name, without addresses that are granted to
    /// another cluster: a member does not decide who owns these.
    fn requested(&self, cluster: &ClusterName, which: &Which, answered: pb::Pods) -> pb::Pods {
        let snapshot = self.registry.snapshot();
        let own = snapshot.clusters.get(cluster);
        let is_own = |bytes: &Bytes| {
            address(bytes).is_some_and(|address| {
                own.is_some_and(|it| it.grant.permits_address(address))
                    || snapshot.clusters.values().all(|it| !it.grant.permits_address(address))
            })
        };
        let is_requested = |pod: &pb::PodInfo| match which {
            Which::Name(name) => (&pod.namespace, &pod.name) == (&name.namespace, &name.name),
            Which::Address(address) => !pod.host_network && pod.addresses.contains(address),
            Which::All(_) => true,
        };
        let most = if matches!(which, Which::All(_)) { MAX_PODS } else { 1 };
        let mut names = HashSet::new();
        let pods = answered.pods.into_iter().take(most).filter_map(|mut pod| {
            pod.addresses.truncate(MAX_ADDRESSES);
            // A pod on the host's network has addresses of its node, which no pod owns.
            if !pod.host_network {
                pod.addresses.retain(is_own);
            }
            (is_requested(&pod) && names.insert((pod.namespace.clone(), pod.name.clone()))).then_some(pod)
        });
        pb::Pods { pods: pods.collect(), truncated: answered.truncated }
    }

    /// The cluster whose granted CIDRs contain an address.
    fn granted(&self, address: IpAddr) -> Option<ClusterName> {
        let snapshot = self.registry.snapshot();
        snapshot.clusters.iter().find(|(_, it)| it.grant.permits_address(address)).map(|(name, _)| name.clone())
    }

    /// Resolves each end at its own cluster. Returns the errors by cluster, too.
    async fn resolve(&self, questions: &[Question]) -> (Inventory, BTreeMap<ClusterName, AskError>) {
        let mut wanted: BTreeSet<(ClusterName, WantedPod)> = BTreeSet::new();
        for question in questions {
            for (this, other) in [(&question.from, &question.to), (&question.to, &question.from)] {
                match this {
                    QueryEnd::Pod { cluster: Some(cluster), namespace, pod } => {
                        wanted.insert((cluster.as_str().into(), WantedPod::Name(namespace.clone(), pod.clone())));
                    }
                    QueryEnd::Pod { cluster: None, .. } | QueryEnd::Service { .. } => {}
                    QueryEnd::Address { ip } => {
                        let Ok(address) = ip.parse::<IpAddr>() else { continue };
                        let address = address.to_canonical();
                        let beside = match other {
                            QueryEnd::Pod { cluster: Some(cluster), .. } => Some(ClusterName::from(cluster.as_str())),
                            _ => None,
                        };
                        let asked = beside.into_iter().chain(self.granted(address));
                        wanted.extend(asked.map(|cluster| (cluster, WantedPod::Address(address))));
                    }
                }
            }
        }
        let mut inventory = Inventory::default();
        let mut failed = BTreeMap::new();
        let wanted: Vec<_> = wanted.into_iter().collect();
        // Each member takes some at a time; the rest wait for these.
        for wanted in wanted.chunks(MAX_UNDER_WAY / 2) {
            let asked = wanted.iter().map(async |(cluster, which)| (cluster, self.pods(cluster, which.into()).await));
            for (cluster, pods) in join_all(asked).await {
                match pods {
                    Ok(pods) => {
                        let endpoints = &mut inventory.clusters.entry(cluster.clone()).or_default().endpoints;
                        endpoints.extend(pods.pods.iter().map(endpoint));
                    }
                    Err(error) => drop(failed.insert(cluster.clone(), error)),
                }
            }
        }
        (inventory, failed)
    }

    async fn explain(&self, queries: Vec<Bytes>) -> Vec<pb::Explanation> {
        let read = |query: &Bytes| -> Result<Question, String> {
            if query.len() > MAX_QUERY_BYTES {
                return Err(format!("malformed query: more than {MAX_QUERY_BYTES} bytes"));
            }
            let question: Question =
                serde_json::from_slice(query).map_err(|error| format!("malformed query: {error}"))?;
            let nameless = |place: &QueryEnd| matches!(place, QueryEnd::Pod { cluster: None, .. });
            match nameless(&question.from) || nameless(&question.to) {
                true => Err("cluster is missing".to_owned()),
                false => Ok(question),
            }
        };
        let questions: Vec<Result<Question, String>> = queries.iter().map(read).collect();
        let readable: Vec<Question> = questions.iter().filter_map(|it| it.as_ref().ok().cloned()).collect();
        let (inventory, mut failed) = self.resolve(&readable).await;
        let owners = Owners::new(&inventory);
        let packet = |question: &Question| -> Result<Query, String> {
            for place in [&question.from, &question.to] {
                let cluster = match place {
                    QueryEnd::Pod { cluster, .. } => cluster.as_deref().map(ClusterName::from),
                    QueryEnd::Service { .. } => None,
                    QueryEnd::Address { ip } => ip.parse().ok().and_then(|it: IpAddr| self.granted(it.to_canonical())),
                };
                if let Some(error) = cluster.and_then(|cluster| failed.get(&cluster)) {
                    return Err(error.to_string());
                }
            }
            owners.packet(question).map_err(|error| error.to_string())
        };
        let packets: Vec<Result<Query, String>> =
            questions.iter().map(|it| it.as_ref().map_err(Clone::clone).and_then(packet)).collect();
        // For each member, the indexes of the queries that have an end in its cluster.
        let mut asked: BTreeMap<ClusterName, Vec<usize>> = BTreeMap::new();
        for (at, packet) in packets.iter().enumerate() {
            let Ok(packet) = packet else { continue };
            let ends = [&packet.source, &packet.destination].into_iter().filter_map(|end| end.pod.as_ref());
            let clusters: BTreeSet<&ClusterName> = ends.map(|(cluster, _)| cluster).collect();
            clusters.into_iter().for_each(|cluster| asked.entry(cluster.clone()).or_default().push(at));
        }
        let ask = async |(cluster, numbers): (ClusterName, Vec<usize>)| {
            let queries = numbers.iter().filter_map(|at| Some(rewritten(packets[*at].as_ref().ok()?, &cluster)));
            let answer = self.explained(&cluster, queries.collect()).await;
            (cluster, numbers, answer)
        };
        let mut answers: BTreeMap<(usize, ClusterName), (Explained, Asked)> = BTreeMap::new();
        for (cluster, numbers, answer) in join_all(asked.into_iter().map(ask)).await {
            match answer {
                Ok(answer) => {
                    let asked = Asked {
                        cluster: cluster.to_string(),
                        hub_revision: answer.hub_revision,
                        local_revision: answer.local_revision,
                        own_streams: answer.own_streams,
                    };
                    let explained = answer.explanations.into_iter().filter_map(|it| it.explanation);
                    for (at, explained) in numbers.into_iter().zip(explained) {
                        answers.insert((at, cluster.clone()), (explained, asked.clone()));
                    }
                }
                Err(error) => drop(failed.insert(cluster, error)),
            }
        }
        let join = |(at, packet): (usize, Result<Query, String>)| -> Result<Bytes, String> {
            let packet = packet?;
            let mut asked = Vec::new();
            let mut side = |end: &End, is_source: bool| -> Result<Option<AnswerLine<'_>>, String> {
                let Some((cluster, _)) = &end.pod else { return Ok(None) };
                let Some((explained, by)) = answers.get(&(at, cluster.clone())) else {
                    return Err(failed.get(cluster).cloned().unwrap_or(AskError::Wrong(cluster.clone())).to_string());
                };
                if !asked.contains(by) {
                    asked.push(by.clone());
                }
                match explained {
                    Explained::Error(error) => Err(AskError::Refused(cluster.clone(), error.clone()).to_string()),
                    Explained::Answer(json) => {
                        let line: AnswerLine<'_> = serde_json::from_slice(json)
                            .map_err(|error| AskError::Unreadable(cluster.clone(), error.to_string()).to_string())?;
                        let direction = if is_source { &line.egress } else { &line.ingress };
                        // The end is a pod, so that it has a verdict.
                        match direction.verdict {
                            AnswerVerdict::None => Err(AskError::Wrong(cluster.clone()).to_string()),
                            _ => Ok(Some(line)),
                        }
                    }
                }
            };
            let (source, destination) = (side(&packet.source, true)?, side(&packet.destination, false)?);
            let line = AnswerLine { asked, ..AnswerLine::joined(source, destination) };
            serde_json::to_vec(&line).map(Bytes::from).map_err(|error| error.to_string())
        };
        let joined = packets.into_iter().enumerate().map(join);
        joined
            .map(|it| pb::Explanation { explanation: Some(it.map_or_else(Explained::Error, Explained::Answer)) })
            .collect()
    }

    async fn list(&self, cluster: &str) -> pb::ListPodsResponse {
        let snapshot = self.registry.snapshot();
        // A cluster that has not joined, or was revoked, has no pods in the federation.
        let wanted = |(name, it): &(&ClusterName, &Arc<Cluster>)| match cluster {
            "" => it.state == ClusterState::Accepted,
            cluster => ***name == *cluster,
        };
        let clusters: Vec<ClusterName> =
            snapshot.clusters.iter().filter(wanted).map(|(name, _)| name.clone()).collect();
        let (mut pods_listed, mut notes) = (Vec::new(), Vec::new());
        let mut note =
            |cluster: &ClusterName, note: String| notes.push(pb::ClusterNote { cluster: cluster.to_string(), note });
        if clusters.is_empty() && !cluster.is_empty() {
            note(&cluster.into(), "cluster not found".to_owned());
        }
        // One after the other: the answers of all at once would be 4 MiB for each of 1,000 clusters.
        for cluster in clusters {
            if pods_listed.len() >= MAX_LISTED {
                note(
                    &cluster,
                    format!("not queried: the limit of {MAX_LISTED} pods is reached; query this cluster by name"),
                );
                continue;
            }
            match self.pods(&cluster, Which::All(pb::AllPods {})).await {
                Ok(pods) => {
                    if pods.truncated {
                        note(&cluster, format!("has more pods than the {} that are listed", pods.pods.len()));
                    }
                    pods_listed
                        .extend(pods.pods.into_iter().map(|pod| pb::PodInfo { cluster: cluster.to_string(), ..pod }));
                }
                Err(error) => note(&cluster, error.to_string()),
            }
        }
        pb::ListPodsResponse { pods: pods_listed, notes }
    }

    /// Receives the answers of a member until its stream ends.
    async fn attended(
        self,
        cluster: ClusterName,
        mut incoming: Streaming<pb::Answer>,
        outbox: mpsc::Sender<Result<pb::Question, Status>>,
    ) {
        let stream = {
            let mut attendants = lock(&self.attendants);
            // The newest stream answers for the cluster; pending queries of an older one fail.
            let stream = attendants.get(&cluster).map_or(1, |earlier| earlier.stream + 1);
            let attendant = Attendant { stream, outbox, next: 0, waiting: HashMap::new() };
            attendants.insert(cluster.clone(), attendant);
            stream
        };
        let mut take = async || -> Result<(), Status> {
            while let Some(answer) = incoming.message().await? {
                let mut attendants = lock(&self.attendants);
                let attendant = attendants.get_mut(&cluster).filter(|it| it.stream == stream);
                let Some(attendant) = attendant else { return Ok(()) };
                let waiting = attendant.waiting.remove(&answer.id);
                if let (Some(waiting), Some(answer)) = (waiting, answer.answer) {
                    // The caller may have disconnected.
                    let _ = waiting.send(answer);
                }
            }
            Ok(())
        };
        let ended = tokio::select! {
            () = self.stop.cancelled() => Ok(()),
            ended = caught("answers of a member", take()) => {
                ended.unwrap_or_else(|panicked| Err(Status::internal(panicked.to_string())))
            }
        };
        if let Err(status) = ended {
            tracing::info!(%cluster, error = status.message(), "query stream of a member ended");
        }
        let mut attendants = lock(&self.attendants);
        if attendants.get(&cluster).is_some_and(|it| it.stream == stream) {
            attendants.remove(&cluster);
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum WantedPod {
    Name(String, String),
    Address(IpAddr),
}

impl From<&WantedPod> for Which {
    fn from(wanted: &WantedPod) -> Self {
        match wanted {
            WantedPod::Name(namespace, name) => {
                Self::Name(pb::PodName { namespace: namespace.clone(), name: name.clone() })
            }
            WantedPod::Address(IpAddr::V4(address)) => Self::Address(Bytes::copy_from_slice(&address.octets())),
            WantedPod::Address(IpAddr::V6(address)) => Self::Address(Bytes::copy_from_slice(&address.octets())),
        }
    }
}

fn address(bytes: &Bytes) -> Option<IpAddr> {
    let address = match bytes.len() {
        4 => <[u8; 4]>::try_from(&bytes[..]).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(&bytes[..]).ok().map(IpAddr::from),
    };
    address.map(|address| address.to_canonical())
}

fn endpoint(pod: &pb::PodInfo) -> (EndpointId, Endpoint) {
    let addresses: Vec<IpAddr> = pod.addresses.iter().filter_map(address).collect();
    let (addresses, host_addresses) = if pod.host_network { (Vec::new(), addresses) } else { (addresses, Vec::new()) };
    let id = EndpointId {
        kind: EndpointKind::Pod,
        namespace: Some(pod.namespace.as_str().into()),
        name: pod.name.as_str().into(),
    };
    (id, Endpoint { addresses, host_addresses, host_network: pod.host_network, ..Endpoint::default() })
}

/// A query for the member of `cluster`: its own ends by name, the others by address.
fn rewritten(packet: &Query, cluster: &ClusterName) -> Bytes {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Rewritten {
        from: QueryEnd,
        to: QueryEnd,
        protocol: u8,
        port: u16,
        source_port: u16,
        #[serde(skip_serializing_if = "Option::is_none")]
        icmp: Option<Icmp>,
        ip_version: u8,
    }
    #[derive(Serialize)]
    struct Icmp {
        #[serde(rename = "type")]
        kind: u8,
        code: u8,
    }
    let place = |end: &End| match &end.pod {
        Some((owner, id)) if owner == cluster => QueryEnd::Pod {
            cluster: Some(owner.to_string()),
            namespace: id.namespace.as_deref().unwrap_or_default().to_owned(),
            pod: id.name.to_string(),
        },
        _ => QueryEnd::Address { ip: end.address.to_string() },
    };
    let query = Rewritten {
        from: place(&packet.source),
        to: place(&packet.destination),
        protocol: packet.protocol,
        port: packet.destination_port,
        source_port: packet.source_port,
        icmp: packet.icmp.map(|(kind, code)| Icmp { kind, code }),
        ip_version: if packet.source.address.is_ipv4() { 4 } else { 6 },
    };
    serde_json::to_vec(&query).expect("names and numbers are JSON").into()
}

#[tonic::async_trait]
impl pb::questions_server::Questions for Questions {
    type AttendStream = Pin<Box<dyn Stream<Item = Result<pb::Question, Status>> + Send>>;

    async fn attend(&self, request: Request<Streaming<pb::Answer>>) -> Result<Response<Self::AttendStream>, Status> {
        let Identity::Cluster(cluster) = peer_identity(&request)? else {
            return Err(Status::permission_denied("only members answer queries"));
        };
        let cluster = Arc::clone(cluster);
        let (outbox, sending) = mpsc::channel(MAX_UNDER_WAY);
        tokio::spawn(self.clone().attended(cluster, request.into_inner(), outbox));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }
}

#[tonic::async_trait]
impl pb::inquiries_server::Inquiries for Questions {
    async fn explain(&self, request: Request<pb::ExplainRequest>) -> Result<Response<pb::ExplainResponse>, Status> {
        permit(&self.registry.snapshot(), &caller(&request)?, Need::View).map_err(status)?;
        let queries = request.into_inner().queries;
        if queries.len() > MAX_QUERIES {
            return Err(Status::invalid_argument(format!("at most {MAX_QUERIES} queries in one request")));
        }
        Ok(Response::new(pb::ExplainResponse { explanations: Questions::explain(self, queries).await }))
    }

    async fn list_pods(&self, request: Request<pb::ListPodsRequest>) -> Result<Response<pb::ListPodsResponse>, Status> {
        permit(&self.registry.snapshot(), &caller(&request)?, Need::View).map_err(status)?;
        Ok(Response::new(self.list(&request.into_inner().cluster).await))
    }
}
