//! What a cluster may publish, and what becomes of policies that the hub cannot read.

use std::collections::BTreeSet;
use std::sync::Arc;

use hanse_exchange::codec;
use hanse_exchange::hub::{Exchange, PublishId, ReceiverId};
use hanse_exchange::interest::Wanted;
use hanse_exchange::limits::EXISTING_TIER;
use hanse_exchange::message::{PublishRequest, WatchRequest};
use hanse_exchange::model::{ClusterState, Federation, Lease, ManifestKind, Position};
use hanse_hub::exchange::derive::{Deriver, UNREADABLE};
use hanse_hub::exchange::report as report_of;
use hanse_hub::grants::MemberCluster;
use hanse_hub::registry::{Clock, Registry};
use hanse_policy::inventory::Labels;
use hanse_policy::model::{ClusterName, ClusterScope};
use hanse_proto::federation::v1 as pb;
use hanse_proto::report::v1 as reasons;
use hanse_protocol::reason::wire::parse_reason;
use hanse_protocol::reason::words::Words;
use hanse_store::{Key, Transaction, in_memory};
use pb::object_update::Body;
use pb::publish_request::Message as Request;
use pb::publish_response::Message as Response;
use pb::refusal::Reason;
use prost::Message as _;

use crate::support::{eventually, policy};

/// The exchange as connections use it: with encoded messages.
trait Wire {
    fn publish_wire(&mut self, id: PublishId, request: pb::PublishRequest) -> Result<Vec<pb::PublishResponse>, String>;
    fn watch_open_wire(&mut self, cluster: ClusterName, open: pb::WatchOpen) -> Result<ReceiverId, String>;
    fn next_wire(&mut self, id: ReceiverId) -> Option<pb::WatchResponse>;
}

impl Wire for Exchange {
    fn publish_wire(&mut self, id: PublishId, request: pb::PublishRequest) -> Result<Vec<pb::PublishResponse>, String> {
        let request = codec::publish::decode_request(request).map_err(|error| error.to_string())?;
        if let PublishRequest::Report(bytes) = &request {
            let state = report_of::state(&report_of::read(bytes));
            return self.publish_report(id, state).map(|()| Vec::new()).map_err(|error| error.to_string());
        }
        let answers = self.publish(id, request).map_err(|error| error.to_string())?;
        Ok(answers.into_iter().map(codec::publish::encode_response).collect())
    }

    fn watch_open_wire(&mut self, cluster: ClusterName, open: pb::WatchOpen) -> Result<ReceiverId, String> {
        let open = pb::WatchRequest { message: Some(pb::watch_request::Message::Open(open)) };
        let Some(WatchRequest::Open(open)) = codec::watch::decode_request(open) else { panic!("not an opening") };
        self.watch_open(cluster, open).map_err(|error| error.to_string())
    }

    fn next_wire(&mut self, id: ReceiverId) -> Option<pb::WatchResponse> {
        self.next(id).map(codec::watch::encode_response)
    }
}

fn grant(grants: serde_json::Value) -> MemberCluster {
    let manifest = serde_json::json!({
        "apiVersion": "hanse.dev/v1alpha1", "kind": "MemberCluster", "metadata": {"name": "train"},
        "spec": {"grants": grants}
    });
    MemberCluster::from_manifest(manifest.to_string().as_bytes()).unwrap()
}

/// A hub with one cluster of these grants, which publishes.
struct Publishing {
    exchange: Exchange,
    id: PublishId,
    revision: u64,
}

impl Publishing {
    fn new(grant: MemberCluster) -> Self {
        let mut exchange = Exchange::new();
        exchange.set_federation(federation(grant, 1));
        let id = exchange.publish_open("train".into());
        let mut it = Self { exchange, id, revision: 0 };
        it.open();
        it.batch(pb::begin::Kind::Snapshot(pb::Snapshot {}), &[], &[]);
        it
    }

    fn open(&mut self) -> Vec<Response> {
        self.say(Request::Open(pb::PublishOpen { protocol: 1, epoch: 1, ..Default::default() }))
    }

    /// The stream ends, and the next one is opened.
    fn reopen(&mut self) -> Vec<Response> {
        self.exchange.publish_close(self.id);
        self.id = self.exchange.publish_open("train".into());
        self.open()
    }

    fn say(&mut self, message: Request) -> Vec<Response> {
        let request = pb::PublishRequest { message: Some(message) };
        self.exchange.publish_wire(self.id, request).unwrap().into_iter().filter_map(|answer| answer.message).collect()
    }

    fn batch(&mut self, kind: pb::begin::Kind, upserts: &[(u64, Body)], removals: &[u64]) -> Vec<Response> {
        self.revision += 1;
        let upserts = upserts.iter().map(|(id, body)| {
            let body = Some(body.clone());
            pb::ObjectUpdate { id: *id, revision: self.revision, features: Vec::new(), body }.encode_to_vec().into()
        });
        let frame = pb::Frame { upserts: upserts.collect(), removals: removals.to_vec() };
        self.say(Request::Begin(pb::Begin { origin: String::new(), kind: Some(kind), needs_interest: 0 }));
        self.say(Request::Frame(frame.encode_to_vec().into()));
        let position = Some(pb::Position { epoch: 1, revision: self.revision });
        self.say(Request::End(pb::End { position, digest: bytes::Bytes::new(), view: 0 }))
    }

    fn delta(&mut self, upserts: &[(u64, Body)], removals: &[u64]) -> Vec<Response> {
        self.batch(pb::begin::Kind::Delta(pb::Delta {}), upserts, removals)
    }

    /// All current refusals, by ID.
    fn refusals(&self) -> Vec<(u64, String)> {
        let (total, list) = self.exchange.origin("train").unwrap().refusals(100);
        assert_eq!(total, list.len());
        list.into_iter().map(|(id, why)| (id, why.to_string())).collect()
    }
}

fn federation(grant: MemberCluster, revision: u64) -> Federation {
    let state = ClusterState {
        labels: Labels::new(),
        grant_token: revision,
        grant: Arc::new(grant),
        cidrs: Vec::new(),
        lease: Lease::Live,
        federated_allow_final: false,
        visible_to: None,
    };
    Federation {
        position: Position { epoch: 1, revision },
        clusters: [("serve".into(), state.clone()), ("train".into(), state)].into(),
        manifests: Default::default(),
    }
}

fn report(realisation: pb::Realisation) -> Request {
    Request::Realisation(realisation.encode_to_vec().into())
}

/// As the hub keeps a report.
fn kept(realisation: pb::Realisation) -> pb::Realisation {
    report_of::read(&realisation.encode_to_vec())
}

fn namespace(name: &str, labels: &[(&str, &str)]) -> Body {
    Body::Namespace(pb::Namespace { name: name.to_owned(), labels: pairs(labels) })
}

fn pairs(labels: &[(&str, &str)]) -> Vec<pb::Pair> {
    labels.iter().map(|(key, value)| pb::Pair { key: (*key).to_owned(), value: (*value).to_owned() }).collect()
}

/// An endpoint of namespace 1 with the address 10.1.0.`last`.
fn endpoint(last: u8) -> pb::Endpoint {
    pb::Endpoint {
        namespace: 1,
        name: format!("pod-{last}"),
        addresses: vec![vec![10, 1, 0, last].into()],
        ..pb::Endpoint::default()
    }
}

#[test]
fn each_object_is_refused_by_itself_and_for_its_own_reason() {
    let mut it = Publishing::new(grant(serde_json::json!({
        "namespaces": ["a"], "cidrs": ["10.1.0.0/16"], "labels": {"stage": ["dev"], "app": ["*"]}
    })));
    let port = |port, protocol| pb::NamedPort { name: "http".to_owned(), port, protocol };
    let labelled = |labels: &[(&str, &str)]| pb::Endpoint { labels: pairs(labels), ..endpoint(9) };
    let cases: Vec<(Body, Option<&str>)> = vec![
        (Body::Endpoint(endpoint(2)), None),
        (namespace("a", &[("stage", "prod")]), Some("label stage=prod is not granted")),
        (namespace("a", &[("hanse.dev/x", "y")]), Some("label hanse.dev/x=y is not granted")),
        (namespace("a", &[("kubernetes.io/metadata.name", "b")]), Some("label kubernetes.io/metadata.name=b")),
        (namespace("a", &[("kubernetes.io/metadata.name", "a"), ("stage", "dev"), ("team", "x")]), None),
        (namespace("b", &[]), Some("namespace b is not granted")),
        (Body::Endpoint(pb::Endpoint { addresses: vec![vec![10, 2, 0, 1].into()], ..endpoint(3) }), Some("10.2.0.1")),
        (Body::Endpoint(pb::Endpoint { addresses: vec![vec![1].into()], ..endpoint(3) }), Some("1 bytes, of 4 or 16")),
        (Body::Endpoint(labelled(&[("stage", "prod")])), Some("label stage=prod")),
        (Body::Endpoint(labelled(&[("app", "a"), ("app", "b")])), Some("duplicate key")),
        (Body::Endpoint(labelled(&[("other", "unknown, not refused")])), None),
        (Body::Endpoint(pb::Endpoint { ports: vec![port(0, 6)], ..endpoint(4) }), Some("ports")),
        (Body::Endpoint(pb::Endpoint { ports: vec![port(65_536, 6)], ..endpoint(4) }), Some("ports")),
        (Body::Endpoint(pb::Endpoint { ports: vec![port(80, 256)], ..endpoint(4) }), Some("ports")),
        (Body::Endpoint(pb::Endpoint { ports: vec![port(80, 6)], ..endpoint(5) }), None),
        (Body::Endpoint(pb::Endpoint { namespace: 77, ..endpoint(6) }), Some("refers to object 77")),
        (Body::Endpoint(pb::Endpoint { name: "x".repeat(254), ..endpoint(7) }), Some("254 bytes")),
        (Body::Policy(pb::Manifest::default()), Some("do not publish policy")),
        (Body::Cluster(pb::ClusterRecord::default()), Some("do not publish clusters")),
    ];
    it.delta(&[(1, namespace("a", &[]))], &[]);
    let upserts: Vec<(u64, Body)> =
        cases.iter().enumerate().map(|(at, (body, _))| (at as u64 + 10, body.clone())).collect();
    it.delta(&upserts, &[]);
    let refusals = it.refusals();
    for (at, (body, expected)) in cases.iter().enumerate() {
        let found = refusals.iter().find(|(id, _)| *id == at as u64 + 10).map(|(_, why)| why.as_str());
        match (expected, found) {
            (None, None) => {}
            (Some(expected), Some(found)) => assert!(found.contains(expected), "{body:?}: {found}"),
            _ => panic!("{body:?}: {found:?}, expected {expected:?}"),
        }
    }
    // Its own namespace object says which of two is newer; another cluster's name is nowhere in what it can say.
    it.delta(&[], &upserts.iter().map(|(id, _)| *id).collect::<Vec<_>>());
    assert_eq!(it.refusals(), []);
}

#[test]
fn a_refused_object_is_told_by_its_name() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["a"], "cidrs": ["10.1.0.0/16"]})));
    let strange = pb::Endpoint { addresses: vec![vec![10, 2, 0, 1].into()], ..endpoint(7) };
    let account = pb::ServiceAccount { namespace: 2, name: "default".to_owned(), labels: Vec::new() };
    let named = [(1, namespace("a", &[])), (2, namespace("b", &[])), (3, Body::ServiceAccount(account))];
    it.delta(&[&named[..], &[(10, Body::Endpoint(strange))]].concat(), &[]);
    let origin = it.exchange.origin("train").unwrap();
    let told: Vec<String> = origin.refusals(9).1.iter().map(|(id, why)| origin.explain(*id, why)).collect();
    assert_eq!(
        told,
        [
            "namespace b: namespace b is not granted",
            "service account b/default: it refers to namespace b, which does not exist or is refused",
            "pod a/pod-7: address 10.2.0.1 is not granted"
        ]
    );
    assert_eq!(origin.describe(99), "object 99");
}

#[test]
fn limits_refuse_what_is_beyond_and_a_snapshot_is_asked_for_when_there_is_room() {
    let mut it = Publishing::new(grant(serde_json::json!({
        "namespaces": ["*"], "cidrs": ["10.1.0.0/16"], "limits": {"endpoints": 3, "labelSets": 1}
    })));
    it.delta(&[(1, namespace("a", &[]))], &[]);
    let label_set = |app| Body::LabelSet(pb::LabelSet { labels: pairs(&[("app", app)]) });
    it.delta(&[(2, label_set("x")), (3, label_set("y"))], &[]);
    let endpoints: Vec<(u64, Body)> = (1..=5).map(|at| (u64::from(at) + 10, Body::Endpoint(endpoint(at)))).collect();
    let answers = it.delta(&endpoints, &[]);
    let told = answers.iter().find_map(|answer| match answer {
        Response::Refusals(refusals) => Some(refusals),
        _ => None,
    });
    let told: Vec<_> = told.unwrap().refusals.iter().map(|it| (it.id, it.reason.clone().unwrap())).collect();
    let limit = |what: &str| Reason::LimitExceeded(what.to_owned());
    assert_eq!(told, [(3, limit("label sets")), (14, limit("endpoints")), (15, limit("endpoints"))]);
    assert_eq!(it.exchange.origin("train").unwrap().endpoint_count(), 3);
    // An update of one that is kept is no newcomer.
    it.delta(&[(11, Body::Endpoint(pb::Endpoint { node: "n".to_owned(), ..endpoint(1) }))], &[]);
    assert_eq!(it.exchange.origin("train").unwrap().endpoint_count(), 3);
    assert!(it.say(Request::Heartbeat(pb::Heartbeat::default())).is_empty(), "there is no room");
    it.delta(&[], &[12]);
    let answers = it.say(Request::Heartbeat(pb::Heartbeat::default()));
    assert!(matches!(answers[..], [Response::Resync(_)]), "{answers:?}");
    assert!(
        it.say(Request::Heartbeat(pb::Heartbeat::default())).is_empty(),
        "what does not fit is not asked for at each beat"
    );
    // The snapshot fills the room, so that the next place that becomes free is news.
    let but = |gone: &[u64]| -> Vec<(u64, Body)> {
        let all =
            [(1, namespace("a", &[])), (2, label_set("x")), (3, label_set("y"))].into_iter().chain(endpoints.clone());
        all.filter(|(id, _)| !gone.contains(id)).collect()
    };
    it.batch(pb::begin::Kind::Snapshot(pb::Snapshot {}), &but(&[12]), &[]);
    assert_eq!(it.exchange.origin("train").unwrap().endpoint_count(), 3);
    assert!(it.say(Request::Heartbeat(pb::Heartbeat::default())).is_empty());
    it.delta(&[], &[11]);
    assert!(matches!(it.say(Request::Heartbeat(pb::Heartbeat::default()))[..], [Response::Resync(_)]));
    assert!(it.say(Request::Heartbeat(pb::Heartbeat::default())).is_empty());
    // What was asked of a stream that has ended is asked of the next.
    it.reopen();
    assert!(matches!(it.say(Request::Heartbeat(pb::Heartbeat::default()))[..], [Response::Resync(_)]));
    // Or a wider grant.
    it.batch(pb::begin::Kind::Snapshot(pb::Snapshot {}), &but(&[]), &[]);
    assert!(it.say(Request::Heartbeat(pb::Heartbeat::default())).is_empty());
    let wider = grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"], "limits": {"endpoints": 9}}));
    it.exchange.set_federation(federation(wider, 2));
    assert!(matches!(it.say(Request::Heartbeat(pb::Heartbeat::default()))[..], [Response::Resync(_)]));
}

/// Memory is bounded by cluster, not by stream.
#[test]
fn one_batch_of_a_cluster_is_staged_at_a_time() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"]})));
    it.delta(&[(1, namespace("a", &[]))], &[]);
    let older = it.id;
    let begin = || {
        let kind = Some(pb::begin::Kind::Snapshot(pb::Snapshot {}));
        let begin = Request::Begin(pb::Begin { origin: String::new(), kind, needs_interest: 0 });
        pb::PublishRequest { message: Some(begin) }
    };
    it.exchange.publish_wire(older, begin()).unwrap();
    it.id = it.exchange.publish_open("train".into());
    it.say(Request::Open(pb::PublishOpen { protocol: 1, epoch: 1, ..Default::default() }));
    it.exchange.publish_wire(it.id, begin()).unwrap();
    let position = Some(pb::Position { epoch: 1, revision: it.revision + 1 });
    let end = || {
        let end = Request::End(pb::End { position, digest: bytes::Bytes::new(), view: 0 });
        pb::PublishRequest { message: Some(end) }
    };
    let error = it.exchange.publish_wire(older, end()).unwrap_err();
    assert!(error.contains("another stream"), "{error}");
    it.exchange.publish_wire(it.id, end()).unwrap();
}

/// Two members with the files of one cluster: the one whose numbering is behind learns this from its next welcome, and is not
/// requested to repeat it.
#[test]
fn what_is_older_than_held_ends_the_stream() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"]})));
    it.delta(&[(1, namespace("a", &[]))], &[]);
    let newest = it.revision;
    let kind = Some(pb::begin::Kind::Snapshot(pb::Snapshot {}));
    it.say(Request::Begin(pb::Begin { origin: String::new(), kind, needs_interest: 0 }));
    let position = Some(pb::Position { epoch: 1, revision: newest - 1 });
    let end = Request::End(pb::End { position, digest: bytes::Bytes::new(), view: 0 });
    let error = it.exchange.publish_wire(it.id, pb::PublishRequest { message: Some(end) }).unwrap_err();
    assert!(error.contains("second member"), "{error}");
    assert_eq!(it.exchange.origin("train").unwrap().position, Position { epoch: 1, revision: newest });
    let answers = it.reopen();
    let [Response::Welcome(welcome)] = &answers[..] else { panic!("{answers:?}") };
    assert_eq!(welcome.position, Some(pb::Position { epoch: 1, revision: newest }));
}

/// Two bytes of a message become a hundred times as much in memory. Publishing continues, but an older report must not
/// show the cluster as healthy.
#[test]
fn a_realisation_is_bounded() {
    let mut it = Publishing::new(grant(serde_json::json!({})));
    let told = |nodes: usize, errors: usize| {
        let node = pb::NodePosition { errors: vec![pb::ObjectError::default(); errors], ..pb::NodePosition::default() };
        pb::Realisation { nodes: vec![node; nodes], ..pb::Realisation::default() }
    };
    assert_eq!(kept(told(1_000, 10)).nodes.len(), 1_000);
    for (nodes, errors) in [(20_000, 0), (10_000, 10)] {
        it.say(report(told(nodes, errors)));
        let kept = kept(told(nodes, errors));
        assert_eq!((kept.nodes.len(), &kept.hub), (0, &None));
        assert!(words(&kept.problems[0]).contains("nodes, of "), "{kept:?}");
    }
    // It names no origin, which is not that all are equal.
    let id =
        it.exchange.watch_open_wire("train".into(), pb::WatchOpen { protocol: 1, ..pb::WatchOpen::default() }).unwrap();
    assert_eq!(it.exchange.digests_equal("train"), None);
    let hub = Some(pb::Position { epoch: 1, revision: 1 });
    let told = |origins: Vec<pb::OriginState>| report(pb::Realisation { hub, origins, ..pb::Realisation::default() });
    it.say(told(Vec::new()));
    assert_eq!(it.exchange.digests_equal("train"), None, "it is not served yet");
    it.exchange.next_wire(id).unwrap();
    assert_eq!(it.exchange.digests_equal("train"), Some(true));
    let of_hub = |digest: u128| {
        vec![pb::OriginState { digest: digest.to_le_bytes().to_vec().into(), ..pb::OriginState::default() }]
    };
    it.say(told(of_hub(1)));
    assert_eq!(it.exchange.digests_equal("train"), Some(false), "policies and clusters count as well");
    it.say(told(of_hub(it.exchange.expected_digest(id, "").unwrap())));
    assert_eq!(it.exchange.digests_equal("train"), Some(true));
}

/// The cluster does not store an origin that its report does not list.
#[test]
fn an_origin_that_a_cluster_does_not_hold_makes_digests_differ() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"]})));
    it.delta(&[(1, namespace("a", &[])), (2, Body::Endpoint(endpoint(1)))], &[]);
    let everything = pb::Selection {
        clusters: Some(pb::selection::Clusters::All(pb::AllClusters {})),
        selector: "all()".to_owned(),
        port_names: Vec::new(),
    };
    let open = pb::WatchOpen { protocol: 1, own: vec![everything], ..pb::WatchOpen::default() };
    let id = it.exchange.watch_open_wire("serve".into(), open).unwrap();
    while it.exchange.next_wire(id).is_some() || it.exchange.is_building(id) {}
    let publishing = it.exchange.publish_open("serve".into());
    let say = |exchange: &mut Exchange, message| {
        exchange.publish_wire(publishing, pb::PublishRequest { message: Some(message) }).unwrap();
    };
    say(&mut it.exchange, Request::Open(pb::PublishOpen { protocol: 1, epoch: 1, ..Default::default() }));
    let told =
        |origins| pb::Realisation { hub: Some(pb::Position { epoch: 1, revision: 1 }), origins, ..Default::default() };
    say(&mut it.exchange, report(told(Vec::new())));
    assert_eq!(it.exchange.digests_equal("serve"), Some(false));
    let digest = it.exchange.expected_digest(id, "train").unwrap().to_le_bytes().to_vec().into();
    let held = pb::OriginState { origin: "train".to_owned(), digest, ..pb::OriginState::default() };
    say(&mut it.exchange, report(told(vec![held])));
    assert_eq!(it.exchange.digests_equal("serve"), Some(true));
}

/// A hub whose files are older than the state of a cluster: the stream waits, and status reports it.
#[test]
fn a_cluster_that_is_ahead_of_the_hub_is_named() {
    let mut it = Publishing::new(grant(serde_json::json!({})));
    assert_eq!(it.exchange.ahead_of_hub("train"), None);
    let at = |revision| Some(pb::Position { epoch: 1, revision });
    let node = |hub_revision| pb::NodePosition { hub_revision, ..pb::NodePosition::default() };
    // A node's word does not count here: one node must not make its cluster doubt the hub. The node itself is named, with its
    // figures, among the problems of the cluster's nodes.
    for (hub, received, node_at, ahead) in
        [(1, 1, 1, None), (2, 1, 1, Some(2)), (1, 3, 1, Some(3)), (1, 1, u64::MAX, None), (2, 3, 4, Some(3))]
    {
        let realisation =
            pb::Realisation { hub: at(hub), received: at(received), nodes: vec![node(node_at)], ..Default::default() };
        it.say(report(realisation));
        assert_eq!(it.exchange.ahead_of_hub("train"), ahead);
    }
    // Of another numbering nothing can be said.
    let other = Some(pb::Position { epoch: 7, revision: 9 });
    it.say(report(pb::Realisation { hub: other, received: other, nodes: vec![node(9)], ..Default::default() }));
    assert_eq!(it.exchange.ahead_of_hub("train"), None);
    let open = pb::WatchOpen { protocol: 1, hub: at(288), ..pb::WatchOpen::default() };
    let id = it.exchange.watch_open_wire("train".into(), open).unwrap();
    assert!(it.exchange.next_wire(id).is_none(), "it is not served");
    assert_eq!(it.exchange.ahead_of_hub("train"), Some(288));
}

/// A policy may select in more than a message takes: what the hub sends as an interest, it reads when the member comes back.
#[tokio::test]
async fn what_the_hub_derives_it_reads_back_when_a_member_reconnects() {
    let store = in_memory();
    let put = async |key: &[&str], value: Vec<u8>| {
        store.commit(Transaction::default().put(Key::new(key).unwrap(), value)).await.unwrap()
    };
    for member in ["train", "serve"] {
        put(&["member", member], br#"{"key":"k","state":"accepted"}"#.to_vec()).await;
    }
    put(&["object", "Tier", "platform"], tier("platform")).await;
    let names: Vec<String> = (0..400).map(|at| format!("account-{at:050}")).collect();
    let accounts = serde_json::json!({"action": "Deny", "source": {"serviceAccounts": {"names": names}}});
    let wide = String::from_utf8(policy("wide", "platform")).unwrap();
    let wide = wide.replace(r#"{"action":"Deny"}"#, &accounts.to_string());
    assert!(wide.len() > 20_000);
    put(&["object", "FederatedNetworkPolicy", "wide"], wide.into_bytes()).await;
    let shutdown = hanse_runtime::shutdown::Shutdown::default();
    let registry =
        Registry::open(store, std::time::Duration::from_secs(30), Clock::default(), &shutdown).await.unwrap();
    let mut exchange = Exchange::new();
    exchange.set_federation(Deriver::default().federation(&registry, &registry.snapshot()));
    let mut sent = |open: pb::WatchOpen| {
        let id = exchange.watch_open_wire("train".into(), pb::WatchOpen { protocol: 1, ..open }).unwrap();
        let all: Vec<_> = std::iter::from_fn(|| exchange.next_wire(id)).filter_map(|it| it.message).collect();
        exchange.watch_close(id);
        let (mut added, mut refused) = (Vec::new(), Vec::new());
        for message in all {
            match message {
                pb::watch_response::Message::Interest(it) => added.extend(it.added),
                pb::watch_response::Message::Refused(it) => refused.extend(it.parts),
                _ => {}
            }
        }
        (added, refused)
    };
    let (interest, refused) = sent(pb::WatchOpen::default());
    assert_eq!((interest.len(), &refused[..]), (1, &[][..]));
    assert_eq!(interest[0].selector, "all()", "it is sent more, and nothing that the policy selects is missing");
    let (news, refused) = sent(pb::WatchOpen { interest, ..pb::WatchOpen::default() });
    assert_eq!((news, refused), (Vec::new(), Vec::new()), "it is what the member came with");
}

/// What cannot be taken of an opening is sent anew, or widened, and the stream goes on.
#[test]
fn a_part_of_an_opening_that_cannot_be_taken_does_not_end_the_stream() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"]})));
    it.delta(&[(1, namespace("a", &[])), (2, Body::Endpoint(endpoint(1)))], &[]);
    let selection = |selector: String, ports: usize| pb::Selection {
        clusters: Some(pb::selection::Clusters::Named(pb::Clusters { names: vec!["train".to_owned()] })),
        selector,
        port_names: (0..ports).map(|it| format!("p{it}")).collect(),
    };
    let none = || selection("has(none)".to_owned(), 0);
    let too_long = || selection(format!("app in {{'{}'}}", "x".repeat(8_192)), 0);
    let unscoped = || pb::Selection { clusters: None, ..none() };
    // What is sent of an endpoint that `has(none)` does not select, and the first part that is refused.
    let sent = |it: &mut Publishing, open: pb::WatchOpen| {
        let id = it.exchange.watch_open_wire("serve".into(), pb::WatchOpen { protocol: 1, ..open }).unwrap();
        let all: Vec<_> = std::iter::from_fn(|| it.exchange.next_wire(id)).filter_map(|it| it.message).collect();
        let frames = all.iter().filter_map(|it| match it {
            pb::watch_response::Message::Frame(bytes) => pb::Frame::decode(bytes.clone()).ok(),
            _ => None,
        });
        let is_pod = |bytes: &bytes::Bytes| {
            matches!(pb::ObjectUpdate::decode(bytes.clone()).unwrap().body, Some(Body::Endpoint(_)))
        };
        let pods = frames.flat_map(|frame| frame.upserts).filter(is_pod).count();
        let refused = all.iter().find_map(|it| match it {
            pb::watch_response::Message::Refused(refused) => Some(refused.clone()),
            _ => None,
        });
        let whole = all.iter().any(|it| matches!(it, pb::watch_response::Message::Interest(it) if it.whole));
        it.exchange.watch_close(id);
        (pods, refused.map(|it| (it.total, it.parts[0].clone())), whole)
    };
    let own = |own: Vec<pb::Selection>| pb::WatchOpen { own, ..pb::WatchOpen::default() };
    assert_eq!(sent(&mut it, own(vec![none()])), (0, None, false));
    let (pods, refused, whole) = sent(&mut it, own(vec![none(), too_long()]));
    let (total, part) = refused.unwrap();
    assert_eq!((pods, total, whole), (1, 1, false));
    assert!(part.starts_with("own[1].selector: 8203 bytes, of 8192"), "{part}");
    for (broken, part) in [
        (selection("(".to_owned(), 0), "own[0].selector: "),
        (selection("all()".to_owned(), 257), "own[0].portNames: 257 names, of 256"),
        (selection("all()".to_owned(), 0), ""),
        (unscoped(), "own[0].clusters: missing"),
    ] {
        let (pods, refused, _) = sent(&mut it, own(vec![broken]));
        let named = refused.map_or(String::new(), |(_, part)| part);
        assert!(named.starts_with(part) && (named.is_empty() == part.is_empty()), "{named}, of {part}");
        // A missing scope does not restrict the selection either.
        assert_eq!(pods, usize::from(!part.contains("clusters")), "{part}");
    }
    let many = sent(&mut it, own(vec![none(); 16_385]));
    assert_eq!((many.0, many.1.unwrap().1), (1, "own: 16385 selections, of 16384".to_owned()));
    // Of what was complete before: the receiver forgets what it named, and is told all of what there is now.
    let (pods, refused, whole) =
        sent(&mut it, pb::WatchOpen { interest: vec![too_long()], ..pb::WatchOpen::default() });
    assert_eq!((pods, refused.unwrap().0, whole), (1, 1, true));
    let origin = pb::ResumePoint { origin: "train".to_owned(), position: None, ..pb::ResumePoint::default() };
    let (pods, refused, _) = sent(
        &mut it,
        pb::WatchOpen { origins: vec![origin], own: vec![selection("all()".to_owned(), 0)], ..Default::default() },
    );
    assert_eq!((pods, refused.unwrap()), (1, (1, "origins[0].position: missing".to_owned())));
}

/// What lies beyond would leave no number for the cluster's own member.
#[test]
fn numbers_that_leave_none_after_them_are_refused() {
    let most = hanse_exchange::limits::MAX_NUMBER;
    for (epoch, revision, taken) in
        [(most, most, true), (most + 1, 1, false), (1, most + 1, false), (u64::MAX, u64::MAX, false)]
    {
        let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"]})));
        let kind = Some(pb::begin::Kind::Snapshot(pb::Snapshot {}));
        it.say(Request::Begin(pb::Begin { origin: String::new(), kind, needs_interest: 0 }));
        let end = pb::End { position: Some(pb::Position { epoch, revision }), digest: bytes::Bytes::new(), view: 0 };
        let answer = it.exchange.publish_wire(it.id, pb::PublishRequest { message: Some(Request::End(end)) });
        assert_eq!(answer.is_ok(), taken, "{epoch} {revision}: {answer:?}");
        assert!(answer.is_ok() || answer.unwrap_err().contains("9007199254740991"));
        let at = it.exchange.origin("train").unwrap().position;
        assert_eq!(at, if taken { Position { epoch, revision } } else { Position { epoch: 1, revision: 1 } });
    }
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"]})));
    let update = pb::ObjectUpdate { id: 1, revision: most + 1, features: Vec::new(), body: Some(namespace("a", &[])) };
    let frame = pb::Frame { upserts: vec![update.encode_to_vec().into()], removals: Vec::new() };
    let kind = Some(pb::begin::Kind::Delta(pb::Delta {}));
    it.say(Request::Begin(pb::Begin { origin: String::new(), kind, needs_interest: 0 }));
    it.say(Request::Frame(frame.encode_to_vec().into()));
    let position = Some(pb::Position { epoch: 1, revision: 2 });
    it.say(Request::End(pb::End { position, digest: bytes::Bytes::new(), view: 0 }));
    assert!(it.refusals()[0].1.contains("revision 9007199254740992"), "{:?}", it.refusals());
}

/// Whatever a cluster is granted: of what is staged, all clusters together have so much, and the largest goes first.
#[test]
fn unfinished_batches_are_bounded_for_all_clusters_together() {
    let limits = serde_json::json!({"endpoints": 1_000_000});
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "limits": limits})));
    let begin = |exchange: &mut Exchange, id| {
        let kind = Some(pb::begin::Kind::Snapshot(pb::Snapshot {}));
        let begin = Request::Begin(pb::Begin { origin: String::new(), kind, needs_interest: 0 });
        exchange.publish_wire(id, pb::PublishRequest { message: Some(begin) }).unwrap();
    };
    // One object of a million bytes.
    let frame = |number: u64| {
        let update =
            pb::ObjectUpdate { id: number + 1, revision: 1, features: vec!["x".repeat(1_000_000)], body: None };
        let frame = pb::Frame { upserts: vec![update.encode_to_vec().into()], removals: Vec::new() };
        pb::PublishRequest { message: Some(Request::Frame(frame.encode_to_vec().into())) }
    };
    let other = it.exchange.publish_open("serve".into());
    it.exchange
        .publish_wire(
            other,
            pb::PublishRequest {
                message: Some(Request::Open(pb::PublishOpen { protocol: 1, epoch: 1, ..Default::default() })),
            },
        )
        .unwrap();
    begin(&mut it.exchange, it.id);
    begin(&mut it.exchange, other);
    it.exchange.publish_wire(other, frame(0)).unwrap();
    let mut taken = 0;
    let error = loop {
        match it.exchange.publish_wire(it.id, frame(taken)) {
            Ok(_) => taken += 1,
            Err(error) => break error,
        }
        assert!(it.exchange.staged_bytes() <= 256 << 20);
    };
    assert_eq!(taken, 267, "and one of the other's come to 256 MiB");
    assert!(error.contains("unfinished batches"), "{error}");
    assert!(it.exchange.staged_bytes() < 2 << 20, "what was staged of it is gone, the other's is not");
    it.exchange.publish_wire(other, frame(1)).unwrap();
    it.exchange.publish_close(other);
    assert_eq!(it.exchange.staged_bytes(), 0, "what is left of a stream that ended");
}

/// A batch that exceeds what may be kept of its cluster is not staged beyond that; what is left out is counted.
#[test]
fn what_exceeds_a_clusters_room_is_not_staged() {
    let limits = serde_json::json!({"endpoints": 1, "labelSets": 1});
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "limits": limits})));
    let kind = Some(pb::begin::Kind::Snapshot(pb::Snapshot {}));
    it.say(Request::Begin(pb::Begin { origin: String::new(), kind, needs_interest: 0 }));
    for number in 0..64_u64 {
        let update =
            pb::ObjectUpdate { id: number + 1, revision: 1, features: vec!["x".repeat(1_000_000)], body: None };
        let frame = pb::Frame { upserts: vec![update.encode_to_vec().into()], removals: Vec::new() };
        it.say(Request::Frame(frame.encode_to_vec().into()));
    }
    // 16 MiB for all but endpoints and label sets, twice, and 2 KiB for those.
    assert!((32 << 20..34 << 20).contains(&(it.exchange.staged_bytes() + 1_000_100)), "{}", it.exchange.staged_bytes());
    let position = Some(pb::Position { epoch: 1, revision: 2 });
    it.say(Request::End(pb::End { position, digest: bytes::Bytes::new(), view: 0 }));
    assert_eq!(it.exchange.staged_bytes(), 0);
    assert_eq!(it.exchange.origin("train").unwrap().refusals(100).0, 64);
    // As many objects, however small.
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "limits": limits})));
    let begin = pb::Begin { origin: String::new(), kind, needs_interest: 0 };
    it.say(Request::Begin(begin));
    let frame = pb::Frame { upserts: Vec::new(), removals: (1..=1_000).collect() };
    let bytes = frame.encode_to_vec();
    for _ in 0..200 {
        it.say(Request::Frame(bytes.clone().into()));
    }
    assert_eq!(it.exchange.staged_bytes(), 131 * bytes.len(), "131,074 objects");
}

/// Two bytes on the wire become two hundred in memory, so that is counted before it is decoded.
#[test]
fn a_message_is_not_decoded_where_that_costs_too_much() {
    use hanse_proto::bounded::{Bounded, cost, decode};
    // Empty nodes of a report of 4 MiB: 2 million of them would take 2 GB while their list grows.
    let nodes = [26, 0].repeat(2 << 20);
    assert!(cost(pb::Realisation::SHAPE, &nodes) > 1 << 30);
    let mut it = Publishing::new(grant(serde_json::json!({})));
    let kept = report_of::read(&nodes);
    it.say(Request::Realisation(nodes.into()));
    assert!(
        kept.nodes.is_empty() && words(&kept.problems[0]).contains("takes more than 128 MiB in memory"),
        "{kept:?}"
    );
    // Empty selections of an opening of 16 MiB.
    let own = [&[10, 128, 128, 128, 8][..], &[42, 0].repeat(8 << 20)].concat();
    assert_eq!(decode::<pb::WatchRequest>(&own[..]).unwrap_err().code(), tonic::Code::ResourceExhausted);
    // Empty updates of a frame of 1 MiB.
    let kind = Some(pb::begin::Kind::Delta(pb::Delta {}));
    it.say(Request::Begin(pb::Begin { origin: String::new(), kind, needs_interest: 0 }));
    let frame = Request::Frame([10, 0].repeat(1 << 19).into());
    let error = it.exchange.publish_wire(it.id, pb::PublishRequest { message: Some(frame) }).unwrap_err();
    assert!(error.contains("cannot be read"), "{error}");
    // Empty labels of an object: it is refused by its size, before it is read.
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"]})));
    let labels = vec![pb::Pair::default(); 1 << 18];
    it.delta(&[(7, Body::LabelSet(pb::LabelSet { labels }))], &[]);
    assert_eq!(it.refusals().len(), 1);
    assert!(it.refusals()[0].1.ends_with("bytes, of 16384"), "{:?}", it.refusals());
}

/// The most that a legitimate peer sends is read.
#[test]
fn the_largest_interests_reports_and_pages_are_within_what_decoding_may_cost() {
    use hanse_exchange::interest::{DERIVED, OWN, Size, WHOLE};
    use hanse_proto::bounded::{Bounded, cost};
    fn check<T: Bounded>(message: &T) -> f64 {
        let bytes = message.encode_to_vec();
        assert!(bytes.len() <= hanse_exchange::limits::MAX_MESSAGE_BYTES, "{} bytes", bytes.len());
        let part = cost(T::SHAPE, &bytes) as f64 / T::MAX_DECODED_BYTES as f64;
        assert!(part <= 1.0, "{part}");
        part
    }
    // As many as their bytes allow, of the shortest selectors: these cost most.
    let selections = |size: Size| {
        let mut bytes = 0;
        let mut list = Vec::new();
        for at in 0..size.selections {
            let selector = hanse_policy::selector::Selector::parse(&format!("has(a{at})")).unwrap();
            let wanted = Wanted::new(ClusterScope::All, &selector, BTreeSet::new());
            bytes += wanted.size();
            if bytes > size.bytes {
                break;
            }
            list.push(pb::Selection::decode(&codec::selection::encode(&(&wanted).into())[..]).unwrap());
        }
        list
    };
    let (whole, own) = (selections(WHOLE), selections(OWN));
    assert!(whole.len() > 150_000 && selections(DERIVED).len() == 65_536 && own.len() == 16_384);
    let names = |count: usize| (0..count).map(|at| format!("{at:0255}")).collect::<Vec<_>>();
    let digest = bytes::Bytes::from(vec![0; 16]);
    let position = Some(pb::Position { epoch: u64::MAX, revision: u64::MAX });
    let origin = |origin| pb::ResumePoint { origin, position, view: u64::MAX, digest: digest.clone() };
    let origins = names(4_096).into_iter().map(origin).collect();
    let open = pb::WatchOpen { protocol: 1, hub: position, origins, interest: whole.clone(), own, hub_digest: digest };
    let opened = check(&pb::WatchRequest { message: Some(pb::watch_request::Message::Open(open)) });
    assert!(opened > 0.5, "{opened}: the bound may be closer");
    let interest =
        pb::Interest { number: 1, added: whole.clone(), removed: whole, origins: names(4_096), whole: false };
    check(&pb::WatchResponse { message: Some(pb::watch_response::Message::Interest(interest)) });
    let pod = unenforced("namespace", "a-pod-of-it");
    let node = pb::NodePosition { node: "a-node".into(), unenforced: vec![pod; 5], ..Default::default() };
    let report = pb::Realisation { nodes: vec![node; 13_000], ..Default::default() };
    assert!((2 << 20..4 << 20).contains(&report.encoded_len()));
    check(&report);
}

/// Of many endpoints that takes seconds, in which others are served; what is sent is the state before or the one after.
#[test]
fn another_grant_is_applied_in_parts_of_which_nothing_is_sent() {
    let granted = |labels: &[&str]| {
        let labels: serde_json::Map<_, _> = labels.iter().map(|key| ((*key).to_owned(), ["*"].into())).collect();
        grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"], "labels": labels}))
    };
    let mut it = Publishing::new(granted(&["app"]));
    it.exchange.set_slice(10);
    let labelled = |at: u8| pb::Endpoint { labels: pairs(&[("app", "a"), ("index", &at.to_string())]), ..endpoint(at) };
    let pods: Vec<(u64, Body)> = (1..=100).map(|at| (u64::from(at) + 10, Body::Endpoint(labelled(at)))).collect();
    it.delta(&[&[(1, namespace("a", &[]))][..], &pods].concat(), &[]);
    let own = vec![pb::Selection {
        clusters: Some(pb::selection::Clusters::All(pb::AllClusters {})),
        selector: "app == 'a'".to_owned(),
        port_names: Vec::new(),
    }];
    let open = pb::WatchOpen { protocol: 1, own, ..pb::WatchOpen::default() };
    let watching = it.exchange.watch_open_wire("serve".into(), open).unwrap();
    assert_eq!(told(&mut it.exchange, watching).0.len(), 101);
    // Values of the key are no longer granted: each endpoint is refused.
    let none = grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"], "labels": {"app": ["b"]}}));
    it.exchange.set_federation_part(federation(none, 2));
    let mut parts = 0;
    let (come, gone) = loop {
        let ready = it.exchange.take_ready();
        let sent = told(&mut it.exchange, watching);
        if sent != (vec![], vec![]) {
            assert!(ready.contains(&watching));
            break sent;
        }
        assert!(parts < 100);
        it.exchange.regrant_more();
        parts += 1;
    };
    // Of 101 slots, and then of the profiles that are left.
    assert!((11..=15).contains(&parts), "{parts}");
    assert_eq!((come.len(), gone.len()), (0, 101));
    while it.exchange.regrant_more() {}
    assert_eq!(it.refusals().len(), 100);
    // Back again, while a batch is applied in parts between them.
    it.exchange.set_federation_part(federation(granted(&["app", "index"]), 3));
    assert!(it.exchange.regrant_more());
    it.delta(&[(200, Body::Endpoint(labelled(200)))], &[11]);
    assert_eq!(told(&mut it.exchange, watching), (vec![], vec![]));
    while it.exchange.regrant_more() {}
    assert_eq!(told(&mut it.exchange, watching).0.len(), 101);
    assert_eq!(it.refusals(), []);
    // A cluster that goes meanwhile.
    it.exchange.set_federation_part(federation(granted(&[]), 4));
    let mut gone = federation(granted(&[]), 5);
    gone.clusters.remove("train");
    it.exchange.set_federation_part(gone);
    assert!(!it.exchange.regrant_more() && it.exchange.regrants() == 0);
}

/// Classes without receivers are bounded by what they take, not by their number alone.
#[test]
fn interests_that_are_kept_for_receivers_that_have_gone_are_bounded_in_bytes() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"]})));
    let open = |of: usize, count: usize| {
        let selection = |at: usize| pb::Selection {
            clusters: Some(pb::selection::Clusters::All(pb::AllClusters {})),
            selector: format!("app == 'a-{of}-{at:080}'"),
            port_names: Vec::new(),
        };
        pb::WatchOpen { protocol: 1, own: (0..count).map(selection).collect(), ..pb::WatchOpen::default() }
    };
    let mut most = 0;
    for of in 0..16 {
        let id = it.exchange.watch_open_wire("serve".into(), open(of, 16_384)).unwrap();
        while it.exchange.next_wire(id).is_some() || it.exchange.is_building(id) {}
        it.exchange.watch_close(id);
        most = most.max(it.exchange.idle_bytes());
        assert!(it.exchange.idle_bytes() <= 64 << 20, "{}", it.exchange.idle_bytes());
    }
    assert!(most > 32 << 20, "{most}: some are kept");
    // Small ones are bounded by their number.
    for of in 0..16 {
        let id = it.exchange.watch_open_wire("serve".into(), open(of, 1)).unwrap();
        while it.exchange.next_wire(id).is_some() || it.exchange.is_building(id) {}
        it.exchange.watch_close(id);
    }
    assert!(it.exchange.idle_bytes() < 64 << 10, "{}", it.exchange.idle_bytes());
}

fn words(reason: &reasons::Reason) -> String {
    Words(&parse_reason(reason.clone())).to_string()
}

fn unenforced(namespace: &str, name: &str) -> pb::UnenforcedPod {
    let finding = reasons::Finding { kind: reasons::finding::Kind::Pending.into(), ..Default::default() };
    let pod = reasons::Pod { namespace: namespace.to_owned(), name: name.to_owned() };
    pb::UnenforcedPod { pod: Some(pod), finding: Some(finding) }
}

/// The hub keeps them, and shows them to administrators.
#[test]
fn names_and_texts_of_a_report_have_bounds_each() {
    let long = "ä".repeat(40_000);
    let other = || Some(reasons::Reason { reason: Some(reasons::reason::Reason::PolicyUnreadable(long.clone())) });
    let subject = Some(reasons::subject::Subject::FederatedPolicy(long.clone()));
    let error = pb::ObjectError { subject: Some(reasons::Subject { subject }), at: None, reason: other() };
    let hooks = Some(reasons::hook_problem::Problem::ProbeNotSent(long.clone()));
    let failure = Some(reasons::failure::Failure::Dataplane(long.clone()));
    let pod = pb::UnenforcedPod {
        finding: Some(reasons::Finding {
            kind: reasons::finding::Kind::SecondInterface.into(),
            interfaces: long.clone(),
            address: vec![1; 80_000].into(),
        }),
        ..unenforced("a", "p")
    };
    let node = pb::NodePosition {
        node: "n".repeat(253),
        hooks: Some(reasons::HookProblem { problem: hooks }),
        failure: Some(reasons::Failure { failure }),
        files: vec![reasons::FileProblem { file: long.clone(), error: long.clone() }],
        errors: vec![error],
        unenforced: vec![pod.clone()],
        ..pb::NodePosition::default()
    };
    let refused = Some(pb::policy_state::State::Refused(long.clone()));
    let policy = pb::PolicyState { policy: "p".to_owned(), state: refused };
    let whole = pb::Realisation {
        nodes: vec![node.clone()],
        policies: vec![policy],
        problems: other().into_iter().collect(),
        ..pb::Realisation::default()
    };
    let taken = kept(whole);
    let state = taken.policies[0].state.clone();
    let Some(pb::policy_state::State::Refused(why)) = state else { panic!("{state:?}") };
    assert_eq!(taken.nodes.len(), 1);
    assert!((1_000..=2_048).contains(&why.len()) && why.ends_with("ä…"), "{} bytes", why.len());
    // Everything else together: seven texts and names.
    let rest = pb::Realisation { policies: Vec::new(), ..taken };
    assert!((2_500..5_000).contains(&rest.encoded_len()), "{} bytes", rest.encoded_len());
    // A name is not cut: it would name something else.
    let name = "x".repeat(254);
    let named = |node: pb::NodePosition| pb::Realisation { nodes: vec![node], ..pb::Realisation::default() };
    let waiting = pb::policy_state::State::Waiting(pb::Waiting { clusters: vec![name.clone()] });
    let waiting = pb::PolicyState { policy: "p".to_owned(), state: Some(waiting) };
    let policy = pb::PolicyState { policy: name.clone(), state: None };
    let origin = pb::OriginState { origin: name.clone(), ..pb::OriginState::default() };
    for (what, realisation) in [
        ("a node's", named(pb::NodePosition { node: name.clone(), ..node.clone() })),
        ("a pod's", named(pb::NodePosition { unenforced: vec![unenforced("a", &name)], ..node.clone() })),
        ("a pod's namespace", named(pb::NodePosition { unenforced: vec![unenforced(&name, "p")], ..node })),
        ("a cluster's", pb::Realisation { policies: vec![waiting], ..pb::Realisation::default() }),
        ("a policy's", pb::Realisation { policies: vec![policy], ..pb::Realisation::default() }),
        ("an origin's", pb::Realisation { origins: vec![origin], ..pb::Realisation::default() }),
    ] {
        let taken = kept(realisation);
        assert!(taken.nodes.is_empty() && taken.policies.is_empty(), "{what}");
        let problem = words(&taken.problems[0]);
        assert!(problem.contains(&format!("254 bytes of {what}")) && problem.ends_with(", of 253"), "{problem}");
    }
}

/// Jobs come and go, each with a label set of its own: what they leave behind would grow for ever.
#[test]
fn what_has_gone_leaves_nothing_behind() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"]})));
    it.delta(&[(1, namespace("a", &[]))], &[]);
    let mut sizes = Vec::new();
    for job in 0..200_u64 {
        let labels = pairs(&[("job", &job.to_string())]);
        let set = (100 + job, Body::LabelSet(pb::LabelSet { labels }));
        let pod = (10, Body::Endpoint(pb::Endpoint { label_set: 100 + job, ..endpoint(1) }));
        let gone: &[u64] = if job == 0 { &[] } else { &[99 + job] };
        it.delta(&[set, pod], gone);
        assert_eq!(it.refusals(), []);
        sizes.push(it.exchange.origin("train").unwrap().profile_bound());
    }
    assert!(sizes.iter().all(|size| *size <= 2), "{sizes:?}");
}

/// What a batch of `train` says, in the order of its frames: ids that come, and ids that go.
fn told(exchange: &mut Exchange, id: ReceiverId) -> (Vec<u64>, Vec<u64>) {
    use pb::watch_response::Message;
    let (mut come, mut gone, mut of_train) = (Vec::new(), Vec::new(), false);
    while let Some(response) = exchange.next_wire(id) {
        match response.message {
            Some(Message::Begin(begin)) => of_train = begin.origin == "train",
            Some(Message::Frame(bytes)) if of_train => {
                let frame = pb::Frame::decode(bytes).unwrap();
                come.extend(frame.upserts.into_iter().map(|bytes| pb::ObjectUpdate::decode(bytes).unwrap().id));
                gone.extend(frame.removals);
            }
            _ => {}
        }
    }
    come.sort_unstable();
    (come, gone)
}

/// Labels that a pod does not share with others of its set, and names of its ports, are evaluated per endpoint.
#[test]
fn endpoints_are_selected_by_labels_of_their_own_and_by_their_ports() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"]})));
    let select = |selector: &str, ports: &[&str]| pb::Selection {
        clusters: Some(pb::selection::Clusters::All(pb::AllClusters {})),
        selector: selector.to_owned(),
        port_names: ports.iter().map(|name| (*name).to_owned()).collect(),
    };
    let own = vec![select("index == '3'", &[]), select("team == 'a'", &["metrics"])];
    let open = pb::WatchOpen { protocol: 1, own, ..pb::WatchOpen::default() };
    let watching = it.exchange.watch_open_wire("serve".into(), open).unwrap();
    assert_eq!(told(&mut it.exchange, watching).0, [0_u64; 0]);
    let pod = |last: u8, index: &str, ports: &[&str]| {
        let ports = ports.iter().map(|name| pb::NamedPort { name: (*name).to_owned(), protocol: 6, port: 9090 });
        let labels = pairs(&[("index", index)]);
        (
            u64::from(last),
            Body::Endpoint(pb::Endpoint { label_set: 2, labels, ports: ports.collect(), ..endpoint(last) }),
        )
    };
    let set = (2, Body::LabelSet(pb::LabelSet { labels: pairs(&[("team", "a")]) }));
    let pods = [pod(10, "3", &[]), pod(11, "4", &[]), pod(12, "5", &["metrics"]), pod(13, "6", &["http"])];
    it.delta(&[&[(1, namespace("a", &[])), set][..], &pods].concat(), &[]);
    assert_eq!(told(&mut it.exchange, watching), (vec![1, 2, 10, 12], vec![]));
    it.delta(&[pod(10, "4", &[]), pod(11, "3", &[])], &[]);
    assert_eq!(told(&mut it.exchange, watching), (vec![11], vec![10]));
    it.delta(&[pod(12, "5", &[])], &[]);
    assert_eq!(told(&mut it.exchange, watching), (vec![], vec![12]));
    // Keys that nobody has any more are not judged for ever, and those of pods that stay are.
    for at in 0..500 {
        let labels = pairs(&[(&format!("run-{at}"), "x")]);
        it.delta(&[(20, Body::Endpoint(pb::Endpoint { label_set: 2, labels, ..endpoint(20) }))], &[]);
    }
    let keys = it.exchange.origin("train").unwrap().own_key_count();
    assert!((2..=64).contains(&keys), "{keys}");
    it.delta(&[pod(10, "3", &[])], &[]);
    assert_eq!(told(&mut it.exchange, watching), (vec![10], vec![]));
}

/// Whichever came first: the one that changed last owns it, and who owned it before owns it again when that one goes.
#[test]
fn an_address_is_owned_by_the_newest_of_those_that_claim_it() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"]})));
    it.delta(&[(1, namespace("a", &[]))], &[]);
    let taken = |it: &Publishing| it.refusals().into_iter().map(|(id, _)| id).collect::<BTreeSet<_>>();
    let claim = |id: u64| (id, Body::Endpoint(endpoint(9)));
    for (upserts, removals, refused) in [
        (vec![claim(12)], vec![], vec![]),
        (vec![claim(11)], vec![], vec![12]),
        (vec![claim(10), claim(14)], vec![], vec![10, 11, 12]),
        // One that moves away and comes back is the newest.
        (vec![(11, Body::Endpoint(endpoint(8)))], vec![], vec![10, 12]),
        (vec![claim(11)], vec![], vec![10, 12, 14]),
        (vec![], vec![12], vec![10, 14]),
        (vec![], vec![11], vec![10]),
        (vec![], vec![14], vec![]),
        (vec![claim(15)], vec![], vec![10]),
        // One that refers to nothing owns nothing.
        (vec![(15, Body::Endpoint(pb::Endpoint { label_set: 77, ..endpoint(9) }))], vec![], vec![15]),
        (vec![], vec![15], vec![]),
    ] {
        it.delta(&upserts, &removals);
        assert_eq!(taken(&it), BTreeSet::from_iter(refused), "{upserts:?} {removals:?}");
    }
}

#[tokio::test]
async fn a_policy_that_the_hub_cannot_read_takes_nothing_away() {
    let store = in_memory();
    let put = async |key: &[&str], value: Vec<u8>| {
        store.commit(Transaction::default().put(Key::new(key).unwrap(), value)).await.unwrap()
    };
    let member = br#"{"key":"k","state":"accepted"}"#.to_vec();
    put(&["member", "train"], member.clone()).await;
    put(&["member", "serve"], member).await;
    put(&["object", "Tier", "platform"], tier("platform")).await;
    put(&["object", "FederatedNetworkPolicy", "deny"], policy("deny", "platform")).await;
    let shutdown = hanse_runtime::shutdown::Shutdown::default();
    let opened = || Registry::open(store.clone(), std::time::Duration::from_secs(30), Clock::default(), &shutdown);
    let registry = opened().await.unwrap();
    let key = (ManifestKind::Policy, Arc::from("deny"));
    let mut deriver = Deriver::default();
    let before = deriver.federation(&registry, &registry.snapshot()).manifests[&key].clone();
    assert!(before.features.is_empty());

    // Another version writes what this one does not understand.
    let newer = String::from_utf8(policy("deny", "platform")).unwrap().replace("\"order\":10", "\"dscp\":7");
    let change = put(&["object", "FederatedNetworkPolicy", "deny"], newer.clone().into_bytes()).await;
    let hanse_store::Outcome::Committed(revision) = change else { panic!("{change:?}") };
    eventually("the view shows it", || async { registry.snapshot().revision >= revision }).await;
    let after = deriver.federation(&registry, &registry.snapshot()).manifests[&key].clone();
    assert_eq!(after.json, newer.as_bytes(), "the author's bytes go on");
    assert_eq!(after.features, [UNREADABLE]);
    assert_eq!((&after.enforcers, &after.interest), (&before.enforcers, &before.interest));

    // A hub that starts with it knows nothing of what it was: everybody is told, and keeps all that it could need.
    let registry = opened().await.unwrap();
    let anew = Deriver::default().federation(&registry, &registry.snapshot()).manifests[&key].clone();
    assert_eq!(anew.enforcers.iter().flatten().count(), 2);
    assert_eq!(anew.interest.iter().next().unwrap().selector().canonical.to_string(), "all()");
}

/// With a peer, which makes its enforcers need something.
fn peered(name: &str, tier: &str) -> Vec<u8> {
    let policy = String::from_utf8(policy(name, tier)).unwrap();
    policy.replace(r#"{"action":"Deny"}"#, r#"{"action":"Deny","source":{"selector":"k == 'v'"}}"#).into_bytes()
}

fn tier(name: &str) -> Vec<u8> {
    let metadata = serde_json::json!({"name": name});
    let tier = serde_json::json!({"apiVersion": "hanse.dev/v1alpha1", "kind": "Tier", "metadata": metadata, "spec": {"order": 1}});
    tier.to_string().into_bytes()
}

#[tokio::test]
async fn a_policy_whose_tier_does_not_exist_takes_nothing_away_and_comes_with_its_tier() {
    let store = in_memory();
    let commit = async |transaction: Transaction| {
        let committed = store.commit(transaction).await.unwrap();
        let hanse_store::Outcome::Committed(revision) = committed else { panic!("{committed:?}") };
        revision
    };
    let put =
        async |key: &[&str], value: Vec<u8>| commit(Transaction::default().put(Key::new(key).unwrap(), value)).await;
    put(&["member", "train"], br#"{"key":"k","state":"accepted"}"#.to_vec()).await;
    put(&["object", "Tier", "platform"], tier("platform")).await;
    put(&["object", "FederatedNetworkPolicy", "deny"], peered("deny", "platform")).await;
    let registry = Registry::open(
        store.clone(),
        std::time::Duration::from_secs(30),
        Clock::default(),
        &hanse_runtime::shutdown::Shutdown::default(),
    )
    .await
    .unwrap();
    let mut deriver = Deriver::default();
    let mut derive = async |revision: u64| {
        eventually("the view shows it", || async { registry.snapshot().revision >= revision }).await;
        deriver.federation(&registry, &registry.snapshot()).manifests
    };
    let key = |name: &str| (ManifestKind::Policy, Arc::from(name));
    let before = derive(registry.snapshot().revision).await[&key("deny")].clone();
    assert!(before.features.is_empty() && !before.interest.is_empty());

    let moved = peered("deny", "ghost");
    let after = derive(put(&["object", "FederatedNetworkPolicy", "deny"], moved.clone()).await).await;
    let after = after[&key("deny")].clone();
    assert_eq!((&after.json[..], &after.features[..]), (&moved[..], &[EXISTING_TIER.to_owned()][..]));
    assert_eq!((&after.enforcers, &after.interest), (&before.enforcers, &before.interest), "what is in force needs it");

    let fresh = derive(put(&["object", "FederatedNetworkPolicy", "new"], peered("new", "ghost")).await).await;
    let fresh = fresh[&key("new")].clone();
    // Also after a restart, of which this cannot be told apart: what members keep may need anything.
    let everything = [Arc::new(Wanted::everything())].into();
    assert_eq!((fresh.features.len(), &fresh.interest), (1, &everything));

    let with_tier = derive(put(&["object", "Tier", "ghost"], tier("ghost")).await).await;
    for name in ["deny", "new"] {
        assert!(with_tier[&key(name)].features.is_empty(), "{name}");
    }
    // A tier that goes stays with those that have a policy in it.
    let gone = commit(Transaction::default().delete(Key::new(&["object", "Tier", "ghost"]).unwrap())).await;
    let gone = derive(gone).await;
    assert!(gone.contains_key(&(ManifestKind::Tier, Arc::from("ghost"))));
    assert_eq!(gone[&key("new")].features, [EXISTING_TIER]);
}
