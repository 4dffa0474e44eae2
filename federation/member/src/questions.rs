//! What this member answers when a hub asks: who its pods are, and what policy says of packets.
//!
//! Answers come from what was received and read last, put together when the first question after a change comes, so that
//! who is never asked pays nothing. A question of pods is answered from the source as it is. One question is worked on at a time, beside everything else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use hanse_api::assemble::{ClusterState, Federation};
use hanse_policy::evaluate::{End, Query};
use hanse_policy::explain::{Explainer, Question};
use hanse_policy::inventory::{Cluster, EffectiveLabels, Endpoint, EndpointId, EndpointKind, Inventory};
use hanse_policy::model::{ClusterName, PolicySet};
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::questions_client::QuestionsClient;
use hanse_ruleset::OwnStream;
use hanse_runtime::retry::Backoff;
use hanse_runtime::shutdown::Shutdown;
use ipnet::IpNet;
use pb::answer::Answer as Reply;
use pb::pods_question::Which;
use pb::question::Question as Asked;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::exchange::client::Client;
use crate::exchange::receiver::Receiver;
use crate::own_streams::describe;
use crate::registration::MemberIdentity;
use crate::world::{NodeRules, World};
use hanse_exchange::codec::object::octets;

/// Queries that one question may have.
const MAX_QUERIES: usize = 64;
/// Pods that one answer tells: of some 400 bytes each, so that it fits in a message.
const MAX_PODS: usize = 10_000;
/// The largest question: 64 queries of 4 KiB.
const MAX_QUESTION_BYTES: usize = 512 << 10;
/// Answers that wait for the connection; the hub asks no more at once.
const OUTBOX: usize = 16;
const MAX_DELAY: Duration = Duration::from_secs(5);

/// Answers questions. Clones share what they know.
#[derive(Debug, Clone)]
pub struct Answering {
    cluster: ClusterName,
    client: Client,
    asks: mpsc::Sender<Ask>,
    known: Arc<Mutex<Option<Arc<Known>>>>,
}

/// The process is asked what holds now.
#[derive(Debug)]
pub struct Ask {
    /// The version that is known already; `None`: policies are not asked for.
    have: Option<u64>,
    told: oneshot::Sender<Told>,
}

/// What holds now.
#[derive(Debug)]
struct Told {
    version: u64,
    local: Arc<ClusterState>,
    local_revision: u64,
    /// When the version is news.
    federation: Option<Federation>,
    hub_revision: u64,
    /// By node.
    own_streams: BTreeMap<Arc<str>, Vec<OwnStream>>,
}

impl Ask {
    /// Answers with what `world` holds, `version` being another whenever that changed, and never 0.
    pub fn answer(self, world: &World, version: u64) {
        let news = self.have.is_some_and(|have| have != version);
        let own = |(name, it): (&Arc<str>, &NodeRules)| (name.clone(), it.rules.node.own_streams.clone());
        let own_streams =
            news.then(|| world.nodes().iter().map(own).filter(|(_, streams)| !streams.is_empty()).collect());
        // Who asked may have given up.
        let _ = self.told.send(Told {
            version,
            local: Arc::clone(world.local()),
            local_revision: world.local_revision(),
            federation: news.then(|| world.federation().clone()),
            hub_revision: world.hub_revision(),
            own_streams: own_streams.unwrap_or_default(),
        });
    }
}

/// Everything that an answer needs.
#[derive(Debug)]
pub struct Known {
    /// Of [`Told`].
    pub version: u64,
    pub policies: PolicySet,
    pub inventory: Inventory,
    pub cluster: ClusterName,
    /// Hanse's own streams, by node.
    pub own_streams: BTreeMap<Arc<str>, Vec<OwnStream>>,
    pub hub_revision: u64,
    pub local_revision: u64,
    /// When it was put together.
    pub since: Instant,
}

impl Answering {
    /// And what the process is asked, over which it is to answer.
    pub fn new(cluster: ClusterName, client: Client) -> (Self, mpsc::Receiver<Ask>) {
        let (asks, asked) = mpsc::channel(1);
        (Self { cluster, client, asks, known: Arc::default() }, asked)
    }

    /// Attends at every hub until the shutdown.
    pub fn start(&self, identity: &MemberIdentity, hubs: &[String], shutdown: &Shutdown) {
        for hub in hubs {
            let (this, identity, hub, stop) = (self.clone(), identity.clone(), hub.clone(), shutdown.token());
            shutdown.supervise("answers to the hub", move || {
                let (this, identity, hub, stop) = (this.clone(), identity.clone(), hub.clone(), stop.clone());
                async move { this.attend_for_ever(&identity, &hub, &stop).await }
            });
        }
    }

    async fn attend_for_ever(&self, identity: &MemberIdentity, hub: &str, stop: &CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(100), MAX_DELAY);
        loop {
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.attend(identity, hub, &mut backoff) => ended,
            };
            if let Err(error) = ended {
                tracing::debug!(error = format!("{error:#}"), hub, "not attending, trying again");
            }
            if !backoff.wait(stop).await {
                return;
            }
        }
    }

    async fn attend(&self, identity: &MemberIdentity, hub: &str, backoff: &mut Backoff) -> anyhow::Result<()> {
        let mut renewed = identity.credentials().subscribe();
        renewed.mark_unchanged();
        let connection = identity.connect(hub).await?;
        let mut client = QuestionsClient::new(connection.channel).max_decoding_message_size(MAX_QUESTION_BYTES);
        let (outbox, sending) = mpsc::channel(OUTBOX);
        outbox.send(pb::Answer::default()).await?;
        let mut questions = client.attend(ReceiverStream::new(sending)).await.context("open the stream")?.into_inner();
        backoff.reset();
        loop {
            let question = tokio::select! {
                question = questions.message() => question.context("be asked")?,
                // The next connection shows the new certificate.
                _ = renewed.changed() => return Ok(()),
            };
            let Some(question) = question else { return Ok(()) };
            let this = self.clone();
            let answer = tokio::task::spawn_blocking(move || this.answer(question.question)).await?;
            outbox.send(pb::Answer { id: question.id, answer: Some(answer) }).await.context("answer")?;
        }
    }

    fn answer(&self, question: Option<Asked>) -> Reply {
        match question {
            Some(Asked::Explain(question)) if question.queries.len() > MAX_QUERIES => {
                Reply::Refused(format!("more than {MAX_QUERIES} queries"))
            }
            Some(Asked::Explain(question)) => match self.known(Duration::ZERO) {
                Some(known) => Reply::Explained(known.explain(&question.queries)),
                None => Reply::Refused("the member is stopping".to_owned()),
            },
            Some(Asked::Pods(pb::PodsQuestion { which: Some(which) })) => match self.told(None) {
                Some(told) => Reply::Pods(pods(&told.local.cluster, &which)),
                None => Reply::Refused("the member is stopping".to_owned()),
            },
            Some(Asked::Pods(_)) | None => Reply::Refused("the question is not understood by this version".to_owned()),
        }
    }

    /// Blocking. `None`: the process has ended.
    fn told(&self, have: Option<u64>) -> Option<Told> {
        let (told, answer) = oneshot::channel();
        self.asks.blocking_send(Ask { have, told }).ok()?;
        answer.blocking_recv().ok()
    }

    /// What holds, or held at most `age` ago. Blocking. `None`: the process has ended.
    pub fn known(&self, age: Duration) -> Option<Arc<Known>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.as_ref().filter(|known| known.since.elapsed() < age) {
            return Some(Arc::clone(known));
        }
        let told = self.told(Some(known.as_ref().map_or(0, |known| known.version)))?;
        if told.federation.is_some() {
            *known = Some(Arc::new(Known::new(&self.cluster, told, &self.client)));
        }
        known.clone()
    }
}

impl Known {
    /// The others as the hub has them, this cluster as its own source has it.
    fn new(cluster: &ClusterName, told: Told, client: &Client) -> Self {
        // Let go at once: while it is held, a change costs a copy of it.
        let ClusterState { cluster: mut own, layer, .. } = Arc::unwrap_or_clone(told.local);
        // Put together when the receiver is free again.
        let everything = client.with_receiver(Receiver::everything);
        let mut inventory = Inventory::default();
        everything.iter().for_each(|change| change.apply(&mut inventory));
        let federation = told.federation.unwrap_or_default();
        if let Some(record) = inventory.clusters.get(cluster) {
            own.labels.clone_from(&record.labels);
            own.label_grant.clone_from(&record.label_grant);
            own.federated_allow_final = record.federated_allow_final;
        }
        inventory.clusters.insert(cluster.clone(), own);
        inventory.federated_sets = federation.sets;
        let policies = PolicySet { federation: federation.layer, clusters: BTreeMap::from([(cluster.clone(), layer)]) };
        Self {
            version: told.version,
            policies,
            inventory,
            cluster: cluster.clone(),
            own_streams: told.own_streams,
            hub_revision: told.hub_revision,
            local_revision: told.local_revision,
            since: Instant::now(),
        }
    }

    fn explain(&self, queries: &[Bytes]) -> pb::Explained {
        let explainer = Explainer::new(&self.policies, &self.inventory);
        let explain = |query: &Bytes| -> Result<Bytes, String> {
            let question: Question = serde_json::from_slice(query).map_err(|error| error.to_string())?;
            let explanation = explainer.explain(&question).map_err(|error| error.to_string())?;
            let packet = explainer.packet(&question).map_err(|error| error.to_string())?;
            let own = |end| self.own_stream(&packet, end);
            let line = explanation.line().with_own_streams(own(&packet.source), own(&packet.destination));
            serde_json::to_vec(&line).map(Bytes::from).map_err(|error| error.to_string())
        };
        let described: BTreeSet<String> = self.own_streams.values().flatten().map(describe).collect();
        let explained = |query| {
            use pb::explanation::Explanation;
            let explanation = explain(query).map_or_else(Explanation::Error, Explanation::Answer);
            pb::Explanation { explanation: Some(explanation) }
        };
        pb::Explained {
            explanations: queries.iter().map(explained).collect(),
            hub_revision: self.hub_revision,
            local_revision: self.local_revision,
            own_streams: described.into_iter().collect(),
        }
    }

    /// The stream of Hanse's own that a packet belongs to where `end` is judged, if any: on the node of that pod.
    pub fn own_stream(&self, packet: &Query, end: &End) -> Option<&str> {
        let (cluster, id) = end.pod.as_ref().filter(|(cluster, _)| *cluster == self.cluster)?;
        let node = self.inventory.clusters.get(cluster)?.endpoints.get(id)?.node.as_ref()?;
        let holds = |nets: &[IpNet], end: &End| nets.iter().any(|net| net.contains(&end.address));
        let is_it = |stream: &&OwnStream| {
            (stream.from.is_empty() || holds(&stream.from, &packet.source))
                && holds(&stream.to, &packet.destination)
                && (stream.protocol, stream.port) == (packet.protocol, packet.destination_port)
        };
        self.own_streams.get(node)?.iter().find(is_it).map(|stream| &*stream.name)
    }
}

fn pods(cluster: &Cluster, which: &Which) -> pb::Pods {
    let info = |(id, endpoint): (&EndpointId, &Endpoint)| {
        let labels = EffectiveLabels { cluster, id, endpoint, first_hand: true }.known();
        let addresses = if endpoint.host_network { &endpoint.host_addresses } else { &endpoint.addresses };
        pb::PodInfo {
            cluster: String::new(),
            namespace: id.namespace.as_deref().unwrap_or_default().to_owned(),
            name: id.name.to_string(),
            addresses: addresses.iter().map(octets).collect(),
            host_network: endpoint.host_network,
            labels: labels.into_iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
        }
    };
    let is_pod = |(id, _): &(&EndpointId, &Endpoint)| id.kind == EndpointKind::Pod;
    let all = cluster.endpoints.iter().filter(is_pod);
    match which {
        Which::Name(name) => {
            let id = EndpointId {
                kind: EndpointKind::Pod,
                namespace: Some(name.namespace.as_str().into()),
                name: name.name.as_str().into(),
            };
            pb::Pods { pods: cluster.endpoints.get_key_value(&id).map(info).into_iter().collect(), truncated: false }
        }
        Which::Address(address) => {
            let owns = |(_, it): &(&EndpointId, &Endpoint)| {
                !it.host_network && it.addresses.iter().any(|own| octets(own) == *address)
            };
            pb::Pods { pods: all.filter(owns).take(1).map(info).collect(), truncated: false }
        }
        Which::All(_) => {
            let truncated = all.clone().nth(MAX_PODS).is_some();
            pb::Pods { pods: all.take(MAX_PODS).map(info).collect(), truncated }
        }
    }
}
