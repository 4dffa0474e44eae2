//! Work that one cluster makes is done in parts, between which others are served.

use hanse_exchange::hub::{PublishError, Published};

use super::*;

fn everywhere(selector: String) -> pb::Selection {
    let clusters = Some(pb::selection::Clusters::All(pb::AllClusters {}));
    pb::Selection { clusters, selector, port_names: Vec::new() }
}

fn watch(exchange: &mut Exchange, own: Vec<pb::Selection>) -> ReceiverId {
    exchange.watch_open_wire("serve".into(), pb::WatchOpen { protocol: 1, own, ..Default::default() }).unwrap()
}

fn any_grant() -> MemberCluster {
    grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"]}))
}

fn part(exchange: &mut Exchange, id: PublishId, message: Request) -> Result<Published, PublishError> {
    let request = pb::PublishRequest { message: Some(message) };
    exchange.publish_part(id, codec::publish::decode_request(request).unwrap())
}

/// Sends a delta on a stream, of which nothing or the first part is applied.
fn begin_delta(exchange: &mut Exchange, id: PublishId, revision: u64, upserts: &[(u64, Body)]) -> Published {
    let update = |(id, body): &(u64, Body)| {
        let body = Some(body.clone());
        pb::ObjectUpdate { id: *id, revision, features: Vec::new(), body }.encode_to_vec().into()
    };
    let frame = pb::Frame { upserts: upserts.iter().map(update).collect(), removals: Vec::new() };
    let kind = Some(pb::begin::Kind::Delta(pb::Delta {}));
    let begin = pb::Begin { origin: String::new(), kind, needs_interest: 0 };
    part(exchange, id, Request::Begin(begin)).unwrap();
    part(exchange, id, Request::Frame(frame.encode_to_vec().into())).unwrap();
    let position = Some(pb::Position { epoch: 1, revision });
    part(exchange, id, Request::End(pb::End { position, digest: bytes::Bytes::new(), view: 0 })).unwrap()
}

/// The calls that a batch still takes.
fn calls(exchange: &mut Exchange, id: PublishId, mut published: Published) -> usize {
    let mut calls = 0;
    while matches!(published, Published::More) {
        calls += 1;
        published = exchange.publish_more(id).unwrap();
    }
    calls
}

#[test]
fn selects_exactly_by_more_own_keys_than_are_kept() {
    let mut it = Publishing::new(any_grant());
    let own = |pod: u8| (0..8).map(|key| pb::Pair { key: format!("k-{pod}-{key}"), value: "v".to_owned() }).collect();
    let pod =
        |at: u8| (u64::from(at) + 10, Body::Endpoint(pb::Endpoint { label_set: 2, labels: own(at), ..endpoint(at) }));
    let set = (2, Body::LabelSet(pb::LabelSet { labels: pairs(&[("app", "web")]) }));
    it.delta(&[(1, namespace("a", &[])), set, pod(1)], &[]);
    let keys = |it: &Publishing| it.exchange.origin("train").unwrap().own_key_count();
    assert_eq!(keys(&it), 8);
    let select = ["k-7-3 == 'v'", "has(k-9-1) && app == 'web'", "!has(k-5-0) && has(k-5-1)", "app == 'db'"];
    let some = watch(&mut it.exchange, select.map(|text| everywhere(text.to_owned())).into());
    let all_but_one = watch(&mut it.exchange, vec![everywhere("app == 'web' && !has(k-7-3)".to_owned())]);
    sent_of_train(&mut it.exchange, some);
    sent_of_train(&mut it.exchange, all_but_one);
    it.delta(&(2..=100).map(pod).collect::<Vec<_>>(), &[]);
    assert!(keys(&it) <= 256, "{}", keys(&it));
    assert_eq!(sent_of_train(&mut it.exchange, some).0, [1, 2, 17, 19]);
    assert_eq!(sent_of_train(&mut it.exchange, all_but_one).0.len(), 98);
    // A class that is made afterwards.
    let later = watch(&mut it.exchange, vec![everywhere("k-7-3 == 'v' || k-8-3 == 'w'".to_owned())]);
    assert_eq!(sent_of_train(&mut it.exchange, later).0, [1, 2, 17]);
    // A change of one of them is found by its labels before and after.
    it.delta(&[(17, Body::Endpoint(pb::Endpoint { label_set: 2, labels: own(9), ..endpoint(7) }))], &[]);
    assert_eq!(sent_of_train(&mut it.exchange, some).0, [17]);
    assert!(sent_of_train(&mut it.exchange, all_but_one).0.contains(&17));
    // Without endpoints it begins again.
    it.delta(&[], &(11..=110).collect::<Vec<_>>());
    it.delta(&[pod(3)], &[]);
    assert_eq!(keys(&it), 8);
}

/// Of one profile and thousands of selections as well as of many profiles.
#[test]
fn judges_new_selections_in_parts_of_equal_work() {
    for profiles in [1, 20_u8] {
        let mut it = Publishing::new(any_grant());
        let objects = (1..=profiles).flat_map(|at| {
            let labels = pairs(&[("app", &format!("app-{at}"))]);
            let set = (u64::from(at) + 100, Body::LabelSet(pb::LabelSet { labels }));
            let pod = pb::Endpoint { label_set: u64::from(at) + 100, ..endpoint(at) };
            [set, (u64::from(at) + 200, Body::Endpoint(pod))]
        });
        it.delta(&[(1, namespace("a", &[]))].into_iter().chain(objects).collect::<Vec<_>>(), &[]);
        it.exchange.set_slice(1);
        let count = 2_000;
        let none = |at: usize| everywhere(format!("!has(x-{at}) && app == 'app-1' && !has(app)"));
        let own = (0..count).map(|at| if at == 1_999 { everywhere("!has(y)".to_owned()) } else { none(at) });
        let id = watch(&mut it.exchange, own.collect());
        let mut parts = 0;
        while it.exchange.next_wire(id).is_none() {
            assert!(it.exchange.is_building(id));
            parts += 1;
        }
        // Reading them takes one part for each; a part judges 64.
        let judging = count / 64;
        assert!(parts >= count + judging, "{parts} parts for {profiles} profiles");
        assert_eq!(sent_of_train(&mut it.exchange, id).0.len(), 1 + 2 * usize::from(profiles));
    }
}

#[test]
fn applies_a_changed_namespace_to_its_endpoints_in_parts() {
    let mut it = Publishing::new(any_grant());
    let pods: Vec<(u64, Body)> = (1..=100).map(|at| (u64::from(at) + 10, Body::Endpoint(endpoint(at)))).collect();
    it.delta(&[&[(1, namespace("a", &[]))][..], &pods].concat(), &[]);
    let labelled = watch(&mut it.exchange, vec![everywhere("pcns.stage == 'prod'".to_owned())]);
    assert_eq!(sent_of_train(&mut it.exchange, labelled).0, [0_u64; 0]);
    it.exchange.set_slice(10);
    for (revision, stage, selected) in [(10, "prod", true), (11, "dev", false)] {
        let published = begin_delta(&mut it.exchange, it.id, revision, &[(1, namespace("a", &[("stage", stage)]))]);
        assert!(matches!(published, Published::More));
        // A class that is built meanwhile.
        let between = watch(&mut it.exchange, vec![everywhere("all()".to_owned())]);
        assert_eq!(sent_of_train(&mut it.exchange, labelled), (vec![], vec![]));
        let more = calls(&mut it.exchange, it.id, published);
        assert!((9..=12).contains(&more), "{more} calls");
        let (come, gone) = sent_of_train(&mut it.exchange, labelled);
        assert_eq!((come.len(), gone.len()), if selected { (101, 0) } else { (0, 101) });
        while it.exchange.is_building(between) {
            sent_of_train(&mut it.exchange, between);
        }
        it.exchange.watch_close(between);
    }
    // Without its namespace, and with it again: all of them come and go.
    let all = watch(&mut it.exchange, vec![everywhere("all()".to_owned())]);
    let mut first = Vec::new();
    while first.len() < 101 {
        first.extend(sent_of_train(&mut it.exchange, all).0);
    }
    it.revision = 11;
    it.delta(&[], &[1]);
    assert_eq!((it.refusals().len(), sent_of_train(&mut it.exchange, all).1.len()), (100, 101));
    it.delta(&[(1, namespace("a", &[]))], &[]);
    assert_eq!((it.refusals(), sent_of_train(&mut it.exchange, all).0.len()), (vec![], 101));
}

#[test]
fn applies_the_rest_of_a_batch_in_parts_after_its_stream_ended() {
    let mut it = Publishing::new(any_grant());
    it.delta(&[(1, namespace("a", &[]))], &[]);
    it.exchange.set_slice(10);
    let pods: Vec<(u64, Body)> = (1..=100).map(|at| (u64::from(at) + 10, Body::Endpoint(endpoint(at)))).collect();
    let count = |it: &Publishing| it.exchange.origin("train").unwrap().endpoint_count();
    let published = begin_delta(&mut it.exchange, it.id, 10, &pods);
    assert!(matches!(published, Published::More));
    it.exchange.publish_close(it.id);
    assert!(count(&it) < 20, "{}", count(&it));
    let mut more = 0;
    while let Ok(Published::More) = it.exchange.publish_more(it.id) {
        more += 1;
    }
    assert!((8..=12).contains(&more), "{more}");
    assert_eq!(count(&it), 100);
    assert!(it.exchange.publish_more(it.id).is_err());
    // Another stream of the cluster waits for it, and goes on with it.
    it.id = it.exchange.publish_open("train".into());
    it.open();
    let published = begin_delta(&mut it.exchange, it.id, 11, &[&[(1, namespace("b", &[]))][..], &pods].concat());
    assert!(matches!(published, Published::More));
    it.exchange.publish_close(it.id);
    it.id = it.exchange.publish_open("train".into());
    it.open();
    let published = begin_delta(&mut it.exchange, it.id, 12, &[(111, Body::Endpoint(endpoint(101)))]);
    let more = calls(&mut it.exchange, it.id, published);
    assert!(more >= 9, "{more}");
    assert_eq!((count(&it), it.exchange.origin("train").unwrap().position.revision), (101, 12));
    // One that waits makes room for a newer one.
    let old = it.id;
    begin_delta(&mut it.exchange, old, 13, &[&[(1, namespace("a", &[]))][..], &pods].concat());
    let waiting = it.exchange.publish_open("train".into());
    let newest = it.exchange.publish_open("train".into());
    for (id, revision) in [(waiting, 14), (newest, 15)] {
        part(&mut it.exchange, id, Request::Open(pb::PublishOpen { protocol: 1, epoch: 1, ..Default::default() }))
            .unwrap();
        assert!(matches!(begin_delta(&mut it.exchange, id, revision, &[]), Published::More));
        assert!(it.exchange.staged_bytes() < 100);
    }
    let dropped = loop {
        match it.exchange.publish_more(waiting) {
            Ok(Published::More) => {}
            other => break other,
        }
    };
    assert!(matches!(dropped, Err(PublishError::Protocol(_))), "{dropped:?}");
    calls(&mut it.exchange, newest, Published::More);
    assert_eq!(it.exchange.origin("train").unwrap().position.revision, 15);
    assert!(matches!(it.exchange.publish_more(old), Ok(Published::Answers(_))));
}
