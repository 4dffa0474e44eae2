//! Work that one cluster makes is done in parts, between which others are served.

use std::collections::BTreeMap;

use hanse_exchange::hub::{Next, PublishError, Published};

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

/// Sends a delta of objects of this revision on a stream, of which nothing or the first part is applied.
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

/// A linear congruential generator.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    /// Namespace 1, 2 or 3.
    fn namespace(&mut self, number: u64) -> (u64, Body) {
        let stage = format!("s-{}", self.below(3));
        let labels = [("stage", &*stage)];
        let count = usize::from(self.below(4) > 0);
        (number, namespace(&format!("ns-{number}"), &labels[..count]))
    }

    /// One of 24 endpoints, in one of three namespaces and with one of four label sets.
    fn pod(&mut self, number: u64) -> (u64, Body) {
        let mut labels = Vec::new();
        for key in 1..=3 {
            if self.below(3) == 0 {
                labels.push(pb::Pair { key: format!("k-{key}"), value: format!("v-{}", self.below(2)) });
            }
        }
        let http = pb::NamedPort { name: "http".to_owned(), protocol: 6, port: 80 };
        let ports = vec![http; self.below(2) as usize];
        let (namespace, label_set) = (1 + self.below(3), 11 + self.below(4));
        let pod = pb::Endpoint { namespace, label_set, labels, ports, ..endpoint(number as u8) };
        (100 + number, Body::Endpoint(pod))
    }
}

/// Everything that an answer depends on changes while it is evaluated: labels of namespaces and endpoints, ports, the keys of own
/// labels, the profiles of endpoints, and grants.
#[test]
fn selects_the_same_if_objects_change_during_an_evaluation() {
    let own = || {
        let select = [
            "pcns.stage == 's-1' && app == 'a-1'",
            "!has(pcns.stage) || app == 'a-2'",
            "k-1 == 'v-1' && app == 'a-0'",
            "!has(k-2) && pcns.stage == 's-0'",
            "has(k-3) || k-1 == 'v-0'",
        ];
        let port_names = vec!["http".to_owned()];
        let with_port = pb::Selection { port_names, ..everywhere("app == 'a-3'".to_owned()) };
        select.map(|it| everywhere(it.to_owned())).into_iter().chain([with_port]).collect::<Vec<_>>()
    };
    let without_keys = || {
        grant(
            serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"], "labels": {"app": ["*"], "k-1": ["*"]}}),
        )
    };
    let (mut evaluated, mut changed) = (0, 0);
    for seed in 1..=2_000_u64 {
        let (mut random, mut it) = (Random(seed), Publishing::new(any_grant()));
        it.exchange.set_slice(1);
        // By ID, with their revisions.
        let mut objects: BTreeMap<u64, (u64, Body)> = BTreeMap::new();
        let mut publish = |it: &mut Publishing, changed: Vec<(u64, Body)>, removed: &[u64]| {
            it.delta(&changed, removed);
            removed.iter().for_each(|id| drop(objects.remove(id)));
            objects.extend(changed.into_iter().map(|(id, body)| (id, (it.revision, body))));
        };
        let set = |at: u64| (10 + at, Body::LabelSet(pb::LabelSet { labels: pairs(&[("app", &format!("a-{at}"))]) }));
        let mut first: Vec<(u64, Body)> = (1..=4).map(set).collect();
        first.extend((1..=3).map(|at| random.namespace(at)));
        first.extend((1..=24).map(|at| random.pod(at)));
        publish(&mut it, first, &[]);
        let id = watch(&mut it.exchange, own());
        let mut granted = federation(any_grant(), 1);
        loop {
            match it.exchange.next_step(id) {
                Next::Evaluate(evaluation) => {
                    let answers = evaluation.evaluate();
                    evaluated += 1;
                    for _ in 0..random.below(3) {
                        changed += 1;
                        let (pod, namespace) = (1 + random.below(24), 1 + random.below(3));
                        match random.below(8) {
                            0 => publish(&mut it, vec![], &[100 + pod]),
                            1 | 2 => publish(&mut it, vec![random.namespace(namespace)], &[]),
                            3 => {
                                let revision = granted.position.revision + 1;
                                let grant = if revision.is_multiple_of(2) { without_keys() } else { any_grant() };
                                granted = federation(grant, revision);
                                it.exchange.set_federation(granted.clone());
                            }
                            _ => publish(&mut it, vec![random.pod(pod)], &[]),
                        }
                    }
                    it.exchange.take_evaluated(&answers);
                }
                Next::Nothing => break,
                Next::Message(_) | Next::Building => {}
            }
        }
        // Another exchange with the same objects at rest.
        let mut at_rest = Publishing::new(any_grant());
        at_rest.exchange.set_federation(granted);
        let mut objects: Vec<_> = objects.into_iter().collect();
        objects.sort_by_key(|(_, (revision, _))| *revision);
        for (id, (revision, body)) in objects {
            begin_delta(&mut at_rest.exchange, at_rest.id, revision, &[(id, body)]);
        }
        let same = watch(&mut at_rest.exchange, own());
        sent_of_train(&mut at_rest.exchange, same);
        assert_eq!(
            it.exchange.expected_digest(id, "train"),
            at_rest.exchange.expected_digest(same, "train"),
            "seed {seed}"
        );
    }
    assert!(evaluated > 5_000 && changed > 5_000, "{evaluated} evaluations, {changed} changes");
}
