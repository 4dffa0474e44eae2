use hanse_exchange::message::WatchOpen;
use hanse_exchange::model::Position;
use hanse_runtime::shutdown::Shutdown;
use hanse_store::{Key, Transaction, in_memory};

use hanse_protocol::reason::{Agent, Behind, ExchangeProblem, Lag, Reason};

use super::*;
use crate::exchange::admission::{Account, FRAME_TIME};
use crate::grants::Limits;
use crate::manifest::{Kind, ObjectId};
use crate::registry::Clock;
use crate::status::{ObjectState, Realisations as _, Reasons};

/// Of a hub with the accepted clusters `train` and `serve`.
async fn service() -> Service {
    let store = in_memory();
    let member = || br#"{"key":"k","state":"accepted"}"#.to_vec();
    for name in ["train", "serve"] {
        let put = Transaction::default().put(Key::new(&["member", name]).expect("a key"), member());
        store.commit(put).await.expect("kept");
    }
    let lease = Duration::from_secs(30);
    let registry = Registry::open(store, lease, Clock::default(), &Shutdown::default()).await.expect("opened");
    let service = Service::new(registry, CancellationToken::new());
    let newest = Deriver::default().federation(&service.registry, &service.registry.snapshot());
    service.with(|exchange| exchange.set_federation(newest)).await;
    service
}

/// A publishing stream of `train`, which has reported.
async fn reported(service: &Service, report: pb::Realisation) -> PublishId {
    let open = |exchange: &mut Exchange| {
        let id = exchange.publish_open("train".into());
        let open = PublishRequest::Open { protocol: 1, epoch: 1, instance: Default::default(), yields: false };
        exchange.publish(id, open).expect("the protocol");
        id
    };
    let id = service.with(open).await;
    service.take_report(&"train".into(), id, report).await.expect("it is open");
    id
}

/// A report of nodes that are as far as the hub, and its position.
async fn in_sync(service: &Service, nodes: &[&str]) -> (pb::Realisation, Position) {
    let at = service.with(|exchange| exchange.federation().position).await;
    let node = |name: &&str| pb::NodePosition {
        node: (*name).to_owned(),
        hub_revision: at.revision,
        hub_epoch: Some(at.epoch),
        connected: true,
        ..pb::NodePosition::default()
    };
    let nodes = nodes.iter().map(node).collect();
    (pb::Realisation { hub: Some(at.into()), received: Some(at.into()), nodes, ..Default::default() }, at)
}

/// The report of one node concerns that node: its cluster does not count as ahead of the hub.
#[tokio::test]
async fn a_node_that_is_ahead_of_the_hub_is_named_with_its_figures() {
    let service = service().await;
    let (mut report, at) = in_sync(&service, &["a", "b"]).await;
    report.nodes[1].hub_revision = at.revision + 1;
    reported(&service, report).await;
    let train = service.clusters().remove("train").expect("it is known");
    let named = train.problems.iter().map(|it| (it.node.as_str(), it.reason.clone())).collect::<Vec<_>>();
    let behind = Some(Behind::AheadOfHub { at: at.revision + 1, hub: at.revision });
    assert_eq!(named, [("b", Reason::Lag(Lag { agent: Agent::Connected, behind, failure: None }))]);
    assert_eq!(train.enforced_revision, 0, "of {}", at.revision);
    assert_eq!(service.with(|exchange| exchange.ahead_of_hub("train")).await, None);
    let nodes: Vec<bool> = service.nodes("train").iter().map(|it| it.problems.is_empty()).collect();
    assert_eq!(nodes, [true, false]);
}

/// The hub was started with `--restored`: its revisions start again, and a node that is away has one of the time before.
#[tokio::test]
async fn a_node_of_an_earlier_epoch_does_not_count_as_enforcing() {
    let service = service().await;
    let (mut report, at) = in_sync(&service, &["a", "b"]).await;
    report.nodes[1].hub_epoch = Some(at.epoch - 1);
    reported(&service, report.clone()).await;
    let train = service.clusters().remove("train").expect("it is known");
    assert_eq!(train.enforced_revision, 0);
    let behind = Some(Behind::OtherEpoch { at: at.revision });
    let lag = Reason::Lag(Lag { agent: Agent::Connected, behind, failure: None });
    assert_eq!(train.problems[0].reason, lag);
    report.nodes[1].hub_epoch = Some(at.epoch);
    reported(&service, report).await;
    assert_eq!(service.clusters()["train"].enforced_revision, at.revision);
}

/// What its nodes enforce may be old: nothing newer has reached it.
#[tokio::test(start_paused = true)]
async fn a_cluster_that_received_nothing_for_a_lease_is_shown_as_lagging() {
    let service = service().await;
    let (report, at) = in_sync(&service, &["a"]).await;
    reported(&service, report).await;
    let _publishing = StreamPermit::acquire(&service.shared.publishing, &"train".into()).expect("room");
    let say = |age_ms| {
        let receiving = Receiving { age: Some(Duration::from_millis(age_ms)), reported: tokio::time::Instant::now() };
        lock(&service.shared.receiving).insert("train".into(), receiving);
    };
    let cluster = || ObjectId { kind: Kind::MemberCluster, name: "train".into() };
    let state = || service.object(&cluster(), at.revision).expect("distributed").remove("train").expect("it").state;
    let problems = || service.clusters().remove("train").expect("it is known").problems;
    say(0);
    assert_eq!((state(), problems().len()), (ObjectState::Enforced, 0));
    tokio::time::advance(Duration::from_millis(29_999)).await;
    assert_eq!(state(), ObjectState::Enforced);
    tokio::time::advance(Duration::from_millis(1)).await;
    let why = Reason::Exchange(ExchangeProblem::NotReceiving(Duration::from_secs(30)));
    assert_eq!(state(), ObjectState::Lagging(Reasons::of_cluster(why.clone())));
    assert_eq!(problems()[0].reason, why);
    // The reported age counts as well, and newer data end it.
    say(30_000);
    assert_eq!(state(), ObjectState::Lagging(Reasons::of_cluster(why)));
    say(0);
    assert_eq!(state(), ObjectState::Enforced);
}

/// Messages of a slow receiver are read while there is no room for its own.
#[tokio::test(start_paused = true)]
async fn reads_messages_of_a_receiver_that_leaves_no_room() {
    let service = service().await;
    let open = || WatchOpen { protocol: 1, ..WatchOpen::default() };
    let id = service.with(|exchange| exchange.watch_open("train".into(), open())).await.expect("accepted");
    let notify = Notify::new();
    notify.notify_one();
    let (outbox, _unread) = mpsc::channel(1);
    let (member, sent) = mpsc::channel(2);
    let mut incoming = ReceiverStream::new(sent);
    let cluster = ClusterName::from("train");
    let (send, watch) = {
        let send = service.send_watched(&cluster, id, &mut incoming, &outbox, &notify);
        let watch = async {
            // It has filled the room, and has more.
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(outbox.capacity(), 0);
            let at = service.with(|exchange| exchange.federation().position).await;
            let ack = codec::watch::encode_request(WatchRequest::InForce { interest: 7, hub: at });
            member.send(Ok(ack)).await.expect("it is read");
            tokio::time::sleep(Duration::from_secs(1)).await;
            let in_force = service.with(|exchange| exchange.receivers()[0].interest_in_force).await;
            let again = codec::watch::encode_request(WatchRequest::Open(open()));
            member.send(Ok(again)).await.expect("it is read");
            in_force
        };
        tokio::join!(tokio::time::timeout(Duration::from_secs(600), send), watch)
    };
    assert_eq!(watch, 7);
    let ended = send.expect("in time").expect_err("a second opening");
    assert!(ended.message().contains("open comes once"), "{ended}");
}

#[test]
fn a_batch_must_end_in_time() {
    let start = tokio::time::Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let say = |unfinished: &mut Option<Unfinished>, message, seconds| {
        Unfinished::follow(unfinished, &message, at(seconds));
        unfinished.map(|it| it.ends_at().duration_since(start).as_secs())
    };
    let frame = || PublishRequest::Frame(bytes::Bytes::new());
    let mut unfinished = None;
    assert_eq!(say(&mut unfinished, frame(), 0), None, "nothing has begun");
    assert_eq!(say(&mut unfinished, PublishRequest::Begin { snapshot: true }, 10), Some(40));
    assert_eq!(say(&mut unfinished, PublishRequest::Heartbeat { received_age_ms: None }, 20), Some(40));
    assert_eq!(say(&mut unfinished, frame(), 30), Some(60));
    assert_eq!(say(&mut unfinished, frame(), 900), Some(910), "15 minutes in all");
    unfinished.as_mut().expect("it is").waited(Duration::from_secs(100));
    assert_eq!(say(&mut unfinished, frame(), 1_000), Some(1_010), "and what the hub made it wait");
    assert_eq!(say(&mut unfinished, PublishRequest::End { position: Position::default(), digest: None }, 1_005), None);
}

#[tokio::test]
async fn a_late_part_of_a_batch_ends_the_stream() {
    let never = std::future::pending::<()>;
    let begun = tokio::time::Instant::now().checked_sub(FRAME_TIME).expect("the clock is older");
    let late = Some(Unfinished { began: begun, progress: begun });
    let error = within(&late, never()).await.expect_err("it never comes");
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
    assert_eq!(within(&None, std::future::ready(7)).await.expect("nothing is unfinished"), 7);
}

#[test]
fn a_cluster_that_receives_nothing_for_a_lease_does_not_count_as_enforcing() {
    let (lease, start) = (Duration::from_secs(30), tokio::time::Instant::now());
    let say = |age: Option<u64>| Receiving { age: age.map(Duration::from_millis), reported: start };
    let problem = |said: Receiving, watches, seconds| {
        Receiving::problem(Some(&said), watches, lease, start + Duration::from_secs(seconds))
    };
    assert_eq!(problem(say(Some(0)), true, 0), None);
    // A stream is open, and nothing arrives on it.
    assert_eq!(problem(say(Some(30_000)), true, 0), Some(ExchangeProblem::NotReceiving(lease)));
    assert_eq!(problem(say(Some(29_999)), true, 0), None);
    assert_eq!(problem(say(Some(0)), false, 29), None, "it may watch another replica");
    assert!(problem(say(Some(u64::MAX)), true, 1).is_some());
    assert!(problem(say(Some(0)), true, 30).is_some(), "its report is as old");
    // A cluster that has received nothing since its start; one that has not reported yet.
    for said in [Some(say(None)), None] {
        assert_eq!(Receiving::problem(said.as_ref(), true, lease, start), None);
        assert!(Receiving::problem(said.as_ref(), false, lease, start).is_some());
    }
}

#[test]
fn a_member_that_restarts_within_each_lease_and_receives_nothing_does_not_count_as_enforcing() {
    let (lease, start) = (Duration::from_secs(30), tokio::time::Instant::now());
    let cluster = ClusterName::from("a");
    let after = |seconds| start + Duration::from_secs(seconds);
    for first in [Some(Duration::ZERO), None] {
        let mut all = BTreeMap::new();
        Receiving::note(&mut all, &cluster, first, start);
        for seconds in [10, 20, 29] {
            Receiving::note(&mut all, &cluster, None, after(seconds));
            assert_eq!(Receiving::problem(all.get(&cluster), true, lease, after(seconds)), None);
        }
        assert!(Receiving::problem(all.get(&cluster), true, lease, after(30)).is_some());
        Receiving::note(&mut all, &cluster, Some(Duration::ZERO), after(31));
        assert_eq!(Receiving::problem(all.get(&cluster), true, lease, after(60)), None);
    }
}

#[test]
fn delays_updates_above_the_granted_rate() {
    let limits = Limits { endpoints: 100, label_sets: 0, updates_per_second: 10 };
    let start = tokio::time::Instant::now();
    let mut rate = Rate::full(start);
    // A minute's worth, though only 100 endpoints are granted.
    assert_eq!(rate.spend(600, limits, start), Duration::ZERO);
    assert_eq!((rate.spend(20, limits, start), rate.slowed), (Duration::from_secs(2), Some(start)));
    let later = start + Duration::from_secs(4);
    assert_eq!(rate.spend(20, limits, later), Duration::ZERO, "40 have come in, 20 of them for what was taken");
    assert_eq!(rate.spend(10, limits, later), Duration::from_secs(1));
    // A snapshot of everything that is granted passes at once, however low the rate.
    let slow = Limits { updates_per_second: 0, ..limits };
    assert_eq!(Rate::full(start).spend(100, slow, start), Duration::ZERO);
}

/// What the streams of a cluster used is waited for by all of them, before an opening and before each part; others are served.
#[tokio::test(start_paused = true)]
async fn streams_of_a_cluster_wait_for_the_time_that_it_used() {
    let service = service().await;
    let watch = |name: &str| {
        let cluster = ClusterName::from(name);
        let permit = StreamPermit::acquire(&service.shared.watching, &cluster).expect("room");
        let (outbox, received) = mpsc::channel(OUTBOX);
        let open = WatchRequest::Open(WatchOpen { protocol: 1, ..WatchOpen::default() });
        let requests = tokio_stream::iter([Ok(codec::watch::encode_request(open))]);
        let requests = Box::pin(requests.chain(tokio_stream::pending()));
        tokio::spawn(service.clone().watched(cluster, permit, requests, outbox));
        received
    };
    // The time until the next message that is not a heartbeat.
    let next = async |received: &mut mpsc::Receiver<Result<pb::WatchResponse, Status>>| {
        let began = tokio::time::Instant::now();
        loop {
            let message = received.recv().await.expect("it is open").expect("a message").message;
            if !matches!(message, Some(pb::watch_response::Message::Heartbeat(_))) {
                return began.elapsed();
            }
        }
    };
    // Of 60 s that 20 s of use cost, 20 s have passed, and 0.1 s are a burst.
    let wait = Duration::from_millis(39_900);
    let train = ClusterName::from("train");
    service.shared.used_watching.charge(&train, Duration::from_secs(20));
    let (mut of_train, mut of_serve) = (watch("train"), watch("serve"));
    assert_eq!(next(&mut of_serve).await, Duration::ZERO);
    // A cheap call of another stream does not lower the debt.
    service.shared.used_watching.charge(&train, Duration::from_nanos(1));
    assert!(next(&mut of_train).await >= wait);
    // An open stream waits as well.
    while tokio::time::timeout(HEARTBEAT / 2, next(&mut of_train)).await.is_ok() {}
    service.shared.used_watching.charge(&train, Duration::from_secs(20));
    let newer = |exchange: &mut Exchange| {
        let mut newer = exchange.federation().clone();
        newer.position.revision += 1;
        exchange.set_federation(newer);
    };
    service.with(newer).await;
    assert!(next(&mut of_train).await >= wait);
}

/// Batches that cost much keep the streams of other clusters from their turn no longer than a part of them.
#[tokio::test(start_paused = true)]
async fn publishing_streams_of_a_cluster_wait_for_the_time_that_it_used() {
    let service = service().await;
    let train = ClusterName::from("train");
    service.shared.used_publishing.charge(&train, Duration::from_secs(20));
    let welcomed = async |name: &str| {
        let cluster = ClusterName::from(name);
        let permit = StreamPermit::acquire(&service.shared.publishing, &cluster).expect("room");
        let (outbox, mut received) = mpsc::channel(OUTBOX);
        let open = PublishRequest::Open { protocol: 1, epoch: 1, instance: Default::default(), yields: false };
        let requests = tokio_stream::iter([Ok(codec::publish::encode_request(open))]);
        let requests = Box::pin(requests.chain(tokio_stream::pending()));
        let from = SocketAddr::from(([127, 0, 0, 1], 1));
        tokio::spawn(service.clone().published(cluster, permit, from, requests, outbox));
        let began = tokio::time::Instant::now();
        // The name of the replica precedes the welcome.
        loop {
            let answer = received.recv().await.expect("it is open").expect("an answer").message;
            if matches!(answer, Some(pb::publish_response::Message::Welcome(_))) {
                return began.elapsed();
            }
        }
    };
    assert_eq!(welcomed("serve").await, Duration::ZERO);
    assert!(welcomed("train").await >= Duration::from_millis(39_900));
}

/// While the exchange is busy, streams that wait for it take no thread, and the last status is served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_is_served_while_the_exchange_is_busy() {
    let service = service().await;
    let last = service.clusters();
    assert_eq!(last.len(), 2);
    let busy = service.shared.exchange.lock().await;
    for _ in 0..16 {
        let waiting = service.clone();
        tokio::spawn(async move { waiting.look(|_| ()).await });
    }
    let other = service.clone();
    let mut served = tokio::spawn(async move { other.clusters() }).await.expect("no panic");
    for status in served.values_mut() {
        let problem = status.problems.remove(0);
        assert!(matches!(problem.reason, Reason::Exchange(ExchangeProblem::OldStatus(Some(_)))), "{problem:?}");
        status.problems_total -= 1;
    }
    assert_eq!(served, last);
    lock(&service.shared.last_status).clear();
    let other = service.clone();
    let served = tokio::spawn(async move { other.clusters() }).await.expect("no panic");
    let unknown = Reason::Exchange(ExchangeProblem::OldStatus(None));
    assert!(
        served.len() == 2 && served.values().all(|it| it.problems[0].reason == unknown && !it.connected),
        "{served:?}"
    );
    drop(busy);
}

/// It keeps selections in force that nothing of the hub needs, and does not acknowledge.
#[tokio::test(start_paused = true)]
async fn receiver_that_never_acknowledges_is_sent_everything_after_some_time() {
    let service = service().await;
    let has = |key: &str| pb::Selection {
        clusters: Some(pb::selection::Clusters::All(pb::AllClusters {})),
        selector: format!("has({key})"),
        port_names: Vec::new(),
    };
    let open = pb::WatchOpen { protocol: 1, interest: vec![has("a")], ..pb::WatchOpen::default() };
    let open = pb::WatchRequest { message: Some(pb::watch_request::Message::Open(open)) };
    let requests = Box::pin(tokio_stream::iter([Ok(open)]).chain(tokio_stream::pending()));
    let permit = StreamPermit::acquire(&service.shared.watching, &"train".into()).expect("room");
    let (outbox, mut received) = mpsc::channel(OUTBOX);
    let began = tokio::time::Instant::now();
    tokio::spawn(service.clone().watched("train".into(), permit, requests, outbox));
    loop {
        let message = received.recv().await.expect("it is open").expect("a message").message;
        if let Some(pb::watch_response::Message::Interest(change)) = message
            && change.added.iter().any(|it| it.selector == "all()")
        {
            break;
        }
    }
    let after = began.elapsed();
    assert!((ACKNOWLEDGE_TIME..ACKNOWLEDGE_TIME + 3 * HEARTBEAT).contains(&after), "{after:?}");
}

#[test]
fn batch_without_updates_counts_as_one() {
    let frame = |updates: u64| {
        let frame = pb::Frame { upserts: Vec::new(), removals: (1..=updates).collect() };
        PublishRequest::Frame(frame.encode_to_vec().into())
    };
    let begin = PublishRequest::Begin { snapshot: false };
    assert_eq!([cost(&begin), cost(&frame(0)), cost(&frame(7))], [1, 1, 7]);
    assert_eq!(cost(&PublishRequest::Heartbeat { received_age_ms: None }), 0);
}

#[test]
fn account_permits_one_third_of_the_time_and_a_burst() {
    let start = tokio::time::Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let used = Duration::from_millis;
    let mut account = Account::default();
    assert_eq!(account.wait(start), Duration::ZERO);
    // Three streams use 10 ms each, one after the other: 90 ms are owed, which is within the burst.
    (1..=3).for_each(|part| account.charge(used(10), at(part * 10)));
    assert_eq!(account.wait(at(30)), Duration::ZERO);
    account.charge(used(1_000), at(1_030));
    assert_eq!(account.wait(at(1_030)), used(3_000 + 90 - 1_030 - 100));
    let before = account.wait(at(1_030));
    account.charge(Duration::ZERO, at(1_030));
    assert_eq!(account.wait(at(1_030)), before);
    assert_eq!(account.wait(at(1_030) + before), Duration::ZERO);
}

/// As between two replicas: one that was started a moment ago waits for clusters, and one that does not hear a cluster for longer
/// than a lease treats it as stale, although the lease in the store lasts.
#[test]
fn a_cluster_is_unheard_after_a_lease_without_a_message_here() {
    let (lease, start) = (Duration::from_secs(30), tokio::time::Instant::now());
    let at = |seconds| start + Duration::from_secs(seconds);
    let (train, serve) = (ClusterName::from("train"), ClusterName::from("serve"));
    let both = [train.clone(), serve.clone()];
    let mut hearing = Hearing::default();
    // `serve` is heard all the time, `train` never.
    let heard = |name: &str| (name == "serve").then_some(Duration::from_secs(1));
    assert!(hearing.unheard(both.iter(), heard, lease, at(0)).is_empty());
    assert!(hearing.unheard(both.iter(), heard, lease, at(47)).is_empty());
    let unheard = hearing.unheard(both.iter(), heard, lease, at(48));
    assert_eq!(unheard, BTreeMap::from([(train.clone(), Duration::from_secs(48))]));
    assert!(hearing.unheard(both.iter(), |_| Some(Duration::ZERO), lease, at(49)).is_empty(), "it is heard");
    // The time since it was heard counts, once it was.
    let gone = |name: &str| (name == "train").then_some(Duration::from_secs(60));
    assert_eq!(hearing.unheard(both.iter(), gone, lease, at(109)).len(), 2);
    // Its lease has ended, and another one begins.
    assert!(hearing.unheard([serve].iter(), heard, lease, at(110)).is_empty());
    assert!(hearing.unheard(both.iter(), heard, lease, at(111)).is_empty(), "a new lease gives it time");
}
