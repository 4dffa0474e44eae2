//! Answers to the hub's questions: the identities of pods, and the verdicts of policy for packets.
//!
//! Answers about packets come from the evaluator that [`crate::world`] updates; answers about pods from the source's state.
//! One question is worked on at a time, beside everything else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use hanse_api::assemble::ClusterState;
use hanse_policy::explain::Question;
use hanse_policy::inventory::{Cluster, EffectiveLabels, Endpoint, EndpointId, EndpointKind};
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::questions_client::QuestionsClient;
use hanse_runtime::retry::Backoff;
use hanse_runtime::shutdown::Shutdown;
use pb::answer::Answer as Reply;
use pb::pods_question::Which;
use pb::question::Question as Asked;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::hubs::{Hubs, Targets};
use crate::live::{Live, State};
use crate::own_streams::describe;
use crate::registration::MemberIdentity;
use crate::world::World;
use hanse_exchange::codec::object::octets;

/// The most queries in one question.
const MAX_QUERIES: usize = 64;
/// The most pods in one answer: some 400 bytes each, so that it fits in a message.
const MAX_PODS: usize = 10_000;
/// The largest question: 64 queries of 4 KiB.
const MAX_QUESTION_BYTES: usize = 512 << 10;
/// Answers that wait for the connection; the hub has at most this many questions open.
const OUTBOX: usize = 16;
const MAX_DELAY: Duration = Duration::from_secs(5);

/// Answers questions. Clones share the evaluator.
#[derive(Debug, Clone)]
pub struct Answering {
    live: Live,
    requests: mpsc::Sender<StateRequest>,
}

/// A request for the state of the cluster, as its source has it.
#[derive(Debug)]
pub struct StateRequest {
    answer: oneshot::Sender<Arc<ClusterState>>,
}

impl StateRequest {
    pub fn answer(self, world: &World) {
        // The requester may have given up.
        let _ = self.answer.send(Arc::clone(world.local()));
    }
}

impl Answering {
    /// Also returns the requests that the process is to answer.
    pub fn new(live: Live) -> (Self, mpsc::Receiver<StateRequest>) {
        let (requests, received) = mpsc::channel(1);
        (Self { live, requests }, received)
    }

    /// Answers questions of every replica of the hub until the shutdown: a user may be connected to any of them.
    pub fn start(&self, identity: &MemberIdentity, hubs: &Hubs, shutdown: &Shutdown) {
        let (this, identity) = (self.clone(), identity.clone());
        hubs.for_each(Targets::Reached, shutdown, "answers to the hub", move |hub, stop| {
            let (this, identity) = (this.clone(), identity.clone());
            async move { this.answer_forever(&identity, &hub, &stop).await }
        });
    }

    async fn answer_forever(&self, identity: &MemberIdentity, hub: &str, stop: &CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(100), MAX_DELAY);
        loop {
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.attend(identity, hub, &mut backoff) => ended,
            };
            if let Err(error) = ended {
                tracing::debug!(error = format!("{error:#}"), hub, "no stream for questions; trying again");
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
                question = questions.message() => question.context("receive a question")?,
                // The next connection uses the new certificate.
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
            Some(Asked::Explain(question)) => Reply::Explained(explain(&self.live.read(), &question.queries)),
            Some(Asked::Pods(pb::PodsQuestion { which: Some(which) })) => match self.state() {
                Some(state) => Reply::Pods(pods(&state.cluster, &which)),
                None => Reply::Refused("the member is stopping".to_owned()),
            },
            Some(Asked::Pods(_)) | None => Reply::Refused("the question is not understood by this version".to_owned()),
        }
    }

    /// The state of the cluster. While it is kept, a change costs a copy of it. Blocking. `None`: the process has ended.
    fn state(&self) -> Option<Arc<ClusterState>> {
        let (answer, received) = oneshot::channel();
        self.requests.blocking_send(StateRequest { answer }).ok()?;
        received.blocking_recv().ok()
    }
}

fn explain(state: &State, queries: &[Bytes]) -> pb::Explained {
    let judge = state.judge();
    let explain = |query: &Bytes| -> Result<Bytes, String> {
        let question: Question = serde_json::from_slice(query).map_err(|error| error.to_string())?;
        let packet = judge.packet(&question).map_err(|error| error.to_string())?;
        let explanation = judge.explain(&packet);
        let own = |end| state.own_stream(&judge, &packet, end);
        let line = explanation.line().with_own_streams(own(&packet.source), own(&packet.destination));
        serde_json::to_vec(&line).map(Bytes::from).map_err(|error| error.to_string())
    };
    let described: BTreeSet<String> = state.own_streams.values().flatten().map(describe).collect();
    let explained = |query| {
        use pb::explanation::Explanation;
        let explanation = explain(query).map_or_else(Explanation::Error, Explanation::Answer);
        pb::Explanation { explanation: Some(explanation) }
    };
    pb::Explained {
        explanations: queries.iter().map(explained).collect(),
        hub_revision: state.hub_revision,
        local_revision: state.local_revision,
        own_streams: described.into_iter().collect(),
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
