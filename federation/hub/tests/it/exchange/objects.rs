//! Which objects of a cluster are used, and which are refused.

use super::*;

#[test]
fn refuses_each_object_by_itself_with_its_reason() {
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
fn names_refused_objects_in_reports() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["a"], "cidrs": ["10.1.0.0/16"]})));
    let strange = pb::Endpoint { addresses: vec![vec![10, 2, 0, 1].into()], ..endpoint(7) };
    let account = pb::ServiceAccount { namespace: 2, name: "default".to_owned(), labels: Vec::new() };
    let named = [(1, namespace("a", &[])), (2, namespace("b", &[])), (3, Body::ServiceAccount(account))];
    it.delta(&[&named[..], &[(10, Body::Endpoint(strange))]].concat(), &[]);
    let origin = it.exchange.origin("train").unwrap();
    let reasons: Vec<String> = origin.refusals(9).1.iter().map(|(id, why)| origin.explain(*id, why)).collect();
    assert_eq!(
        reasons,
        [
            "namespace b: namespace b is not granted",
            "service account b/default: it refers to namespace b, which does not exist or is refused",
            "pod a/pod-7: address 10.2.0.1 is not granted"
        ]
    );
    assert_eq!(origin.describe(99), "object 99");
}

/// Jobs come and go, each with a label set of its own: what they leave behind would grow for ever.
#[test]
fn removed_label_sets_leave_no_profiles() {
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

/// Labels that a pod does not share with others of its set, and names of its ports, are evaluated per endpoint.
#[test]
fn selects_endpoints_by_own_labels_and_port_names() {
    let mut it = Publishing::new(grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"]})));
    let select = |selector: &str, ports: &[&str]| pb::Selection {
        clusters: Some(pb::selection::Clusters::All(pb::AllClusters {})),
        selector: selector.to_owned(),
        port_names: ports.iter().map(|name| (*name).to_owned()).collect(),
    };
    let own = vec![select("index == '3'", &[]), select("team == 'a'", &["metrics"])];
    let open = pb::WatchOpen { protocol: 1, own, ..pb::WatchOpen::default() };
    let watching = it.exchange.watch_open_wire("serve".into(), open).unwrap();
    assert_eq!(sent_of_train(&mut it.exchange, watching).0, [0_u64; 0]);
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
    assert_eq!(sent_of_train(&mut it.exchange, watching), (vec![1, 2, 10, 12], vec![]));
    it.delta(&[pod(10, "4", &[]), pod(11, "3", &[])], &[]);
    assert_eq!(sent_of_train(&mut it.exchange, watching), (vec![11], vec![10]));
    it.delta(&[pod(12, "5", &[])], &[]);
    assert_eq!(sent_of_train(&mut it.exchange, watching), (vec![], vec![12]));
    // Keys that no pod has any more are dropped, and those of the other pods stay.
    for at in 0..500 {
        let labels = pairs(&[(&format!("run-{at}"), "x")]);
        it.delta(&[(20, Body::Endpoint(pb::Endpoint { label_set: 2, labels, ..endpoint(20) }))], &[]);
    }
    let keys = it.exchange.origin("train").unwrap().own_key_count();
    assert!((2..=64).contains(&keys), "{keys}");
    it.delta(&[pod(10, "3", &[])], &[]);
    assert_eq!(sent_of_train(&mut it.exchange, watching), (vec![10], vec![]));
}

/// Whichever came first: the one that changed last owns it, and who owned it before owns it again when that one goes.
#[test]
fn newest_endpoint_owns_a_contested_address() {
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
