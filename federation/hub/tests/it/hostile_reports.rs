//! One member that reports nonsense harms what is known of itself only.

use hanse_member::registration::MemberIdentity;
use hanse_proto::federation::v1 as wire;
use hanse_proto::federation::v1::exchange_client::ExchangeClient;
use hanse_protocol::reason::wire::parse_reason;
use hanse_protocol::reason::words::Words;
use hanse_protocol::reason::{ExchangeProblem, Reason};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use wire::publish_request::Message;

use crate::support::{TestHub, eventually};

struct Publishing {
    outbox: mpsc::Sender<wire::PublishRequest>,
    answers: tonic::Streaming<wire::PublishResponse>,
}

impl Publishing {
    async fn of(member: &MemberIdentity, hub: &TestHub) -> Self {
        Self::of_process(member, hub, 0).await.0
    }

    /// With the first answer: that of another process with the same key is that it is refused.
    async fn of_process(
        member: &MemberIdentity,
        hub: &TestHub,
        instance: u8,
    ) -> (Self, Result<Option<wire::PublishResponse>, tonic::Status>) {
        let connection = member.hub_client().unwrap().connect(&hub.hub.address.to_string()).await.unwrap();
        let (outbox, sending) = mpsc::channel(4);
        let instance = vec![instance; 16].into();
        let open = Message::Open(wire::PublishOpen { protocol: 1, epoch: 1, instance, yields: false });
        outbox.send(wire::PublishRequest { message: Some(open) }).await.unwrap();
        let answers = ExchangeClient::new(connection.channel).publish(ReceiverStream::new(sending)).await;
        let mut answers = answers.unwrap().into_inner();
        let first = answers.message().await;
        (Self { outbox, answers }, first)
    }

    async fn report(&self, realisation: wire::Realisation) {
        let message = Some(Message::Realisation(realisation.encode_to_vec().into()));
        self.outbox.send(wire::PublishRequest { message }).await.unwrap();
    }
}

/// Every number of a report is as large as it can be: sums of them stay what they are, and status and metrics go on.
#[tokio::test]
async fn the_largest_numbers_break_neither_status_nor_metrics() {
    let hub = TestHub::start().await;
    let (hostile, honest) = (hub.member("hostile").await, hub.member("honest").await);
    let node = wire::NodePosition {
        node: "n".to_owned(),
        hub_revision: u64::MAX,
        local_revision: u64::MAX,
        connected: true,
        age_ms: u64::MAX,
        unenforced_total: u32::MAX,
        ..wire::NodePosition::default()
    };
    let most = Some(wire::Position { epoch: u64::MAX, revision: u64::MAX });
    let report = wire::Realisation {
        hub: most,
        received: most,
        nodes: vec![node; 3],
        agents: u32::MAX,
        agents_current: u32::MAX,
        ..wire::Realisation::default()
    };
    let (hostile, honest) = (Publishing::of(&hostile, &hub).await, Publishing::of(&honest, &hub).await);
    hostile.report(report).await;
    let of_honest = wire::NodePosition { unenforced_total: 7, ..wire::NodePosition::default() };
    honest.report(wire::Realisation { nodes: vec![of_honest], ..wire::Realisation::default() }).await;
    let mut admin = hub.admin().await;
    eventually("both reports are shown", || {
        let mut admin = admin.clone();
        async move {
            let status = admin.status(wire::StatusRequest {}).await.unwrap().into_inner();
            let unenforced: Vec<(String, u32)> =
                status.clusters.into_iter().map(|it| (it.name, it.unenforced)).collect();
            unenforced == [("honest".to_owned(), 7), ("hostile".to_owned(), u32::MAX)]
        }
    })
    .await;
    // What keeps the metrics true goes on, and the registry is still followed.
    let text = || async { hub.hub.metrics.encode() };
    eventually("metrics show both", || async { text().await.contains("hanse_hub_publishing_clusters 2") }).await;
    drop(honest);
    eventually("metrics go on", || async { text().await.contains("hanse_hub_publishing_clusters 1") }).await;
    admin.list_clusters(wire::ListClustersRequest::default()).await.unwrap();
    assert!(!hub.shutdown.token().is_cancelled());
}

/// The folder of a member was copied: both processes have its key, and neither is known to be genuine.
#[tokio::test]
async fn of_two_processes_with_one_key_the_first_publishes_and_the_cluster_does_not_count_as_enforcing() {
    let hub = TestHub::start().await;
    let member = hub.member("a").await;
    let problems = || async {
        let status = hub.admin().await.status(wire::StatusRequest {}).await.unwrap().into_inner();
        let problems = status.clusters.into_iter().flat_map(|it| it.problems);
        let reasons = problems.map(|it| parse_reason(it.reason.unwrap_or_default()));
        let in_use = |it: &Reason| matches!(it, Reason::Exchange(ExchangeProblem::ClusterKeyInUse { .. }));
        reasons.filter(in_use).map(|it| Words(&it).to_string()).collect::<Vec<String>>()
    };
    let (mut first, welcome) = Publishing::of_process(&member, &hub, 1).await;
    assert!(welcome.is_ok());
    let (next, welcome) = Publishing::of_process(&member, &hub, 1).await;
    assert!(welcome.is_ok(), "the next connection of the same process");
    drop(next);
    // It may be the same member, which has started again ...
    let (mut copy, welcome) = Publishing::of_process(&member, &hub, 2).await;
    assert!(welcome.is_ok() && problems().await.is_empty());
    let ended = loop {
        match first.answers.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it says why"),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), tonic::Code::Aborted);
    // ... but the first is not gone.
    let (first, welcome) = Publishing::of_process(&member, &hub, 1).await;
    assert!(welcome.is_ok());
    while let Ok(Some(_)) = copy.answers.message().await {}
    let (_, refused) = Publishing::of_process(&member, &hub, 2).await;
    assert!(
        refused.is_err_and(|it| it.code() == tonic::Code::Aborted && it.message().contains("in use from 127.0.0.1:"))
    );
    assert!(matches!(&problems().await[..], [problem] if problem.contains("(served)")), "{:?}", problems().await);
    drop(first);
}

/// Each costs the hub work: a cluster that reports without pause is served at a pace, over however many streams.
#[tokio::test]
async fn reports_of_one_cluster_are_taken_at_a_pace() {
    let hub = TestHub::start().await;
    let member = hub.member("a").await;
    let streams = [Publishing::of(&member, &hub).await, Publishing::of(&member, &hub).await];
    let began = std::time::Instant::now();
    for number in 0..11 {
        streams[number % 2].report(wire::Realisation::default()).await;
    }
    // A stream that says no more ends when all of it is taken.
    for Publishing { outbox, mut answers } in streams {
        drop(outbox);
        while let Ok(Some(_)) = answers.message().await {}
    }
    assert!(began.elapsed() >= std::time::Duration::from_secs(1), "{:?}", began.elapsed());
}

/// Which process speaks is known by its first message: before it, nothing counts as a sign of the cluster's life.
#[tokio::test]
async fn a_stream_that_does_not_begin_with_open_is_refused() {
    let hub = TestHub::start().await;
    let member = hub.member("a").await;
    let connection = member.hub_client().unwrap().connect(&hub.hub.address.to_string()).await.unwrap();
    let (outbox, sending) = mpsc::channel(4);
    let beat = Message::Heartbeat(wire::Heartbeat { received_age_ms: Some(0) });
    outbox.send(wire::PublishRequest { message: Some(beat) }).await.unwrap();
    let answers = ExchangeClient::new(connection.channel).publish(ReceiverStream::new(sending)).await;
    let refused = answers.unwrap().into_inner().message().await.expect_err("nothing was opened");
    assert!(refused.code() == tonic::Code::InvalidArgument && refused.message().contains("open"), "{refused}");
    let status = hub.admin().await.status(wire::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.clusters[0].lease, "never heard");
}
