//! Limits of batches, numbers and messages.

use super::*;

#[test]
fn requests_a_snapshot_when_refused_objects_may_fit() {
    let mut it = Publishing::new(grant(serde_json::json!({
        "namespaces": ["*"], "cidrs": ["10.1.0.0/16"], "limits": {"endpoints": 3, "labelSets": 1}
    })));
    it.delta(&[(1, namespace("a", &[]))], &[]);
    let label_set = |app| Body::LabelSet(pb::LabelSet { labels: pairs(&[("app", app)]) });
    it.delta(&[(2, label_set("x")), (3, label_set("y"))], &[]);
    let endpoints: Vec<(u64, Body)> = (1..=5).map(|at| (u64::from(at) + 10, Body::Endpoint(endpoint(at)))).collect();
    let answers = it.delta(&endpoints, &[]);
    let refused = answers.iter().find_map(|answer| match answer {
        Response::Refusals(refusals) => Some(refusals),
        _ => None,
    });
    let refused: Vec<_> = refused.unwrap().refusals.iter().map(|it| (it.id, it.reason.clone().unwrap())).collect();
    let limit = |what: &str| Reason::LimitExceeded(what.to_owned());
    assert_eq!(refused, [(3, limit("label sets")), (14, limit("endpoints")), (15, limit("endpoints"))]);
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
        "what does not fit is not requested at each heartbeat"
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
    // What was requested on a stream that has ended is requested on the next.
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
fn stages_one_batch_per_cluster() {
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
fn older_batch_ends_the_stream() {
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

/// What lies beyond would leave no number for the cluster's own member.
#[test]
fn refuses_epochs_and_revisions_above_the_limit() {
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
fn bounds_unfinished_batches_of_all_clusters_together() {
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
fn does_not_stage_more_than_a_cluster_may_keep() {
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
fn does_not_decode_messages_that_cost_too_much() {
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
