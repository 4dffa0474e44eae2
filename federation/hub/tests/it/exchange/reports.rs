//! Reports of enforcement.

use super::*;

/// Two bytes of a message become a hundred times as much in memory. Publishing continues, but an older report must not
/// show the cluster as healthy.
#[test]
fn bounds_reports_of_enforcement() {
    let mut it = Publishing::new(grant(serde_json::json!({})));
    let reported = |nodes: usize, errors: usize| {
        let node = pb::NodePosition { errors: vec![pb::ObjectError::default(); errors], ..pb::NodePosition::default() };
        pb::Realisation { nodes: vec![node; nodes], ..pb::Realisation::default() }
    };
    assert_eq!(kept(reported(1_000, 10)).nodes.len(), 1_000);
    for (nodes, errors) in [(20_000, 0), (10_000, 10)] {
        it.say(report(reported(nodes, errors)));
        let kept = kept(reported(nodes, errors));
        assert_eq!((kept.nodes.len(), &kept.hub), (0, &None));
        assert!(words(&kept.problems[0]).contains("nodes, of "), "{kept:?}");
    }
    // It names no origin, which is not that all are equal.
    let id =
        it.exchange.watch_open_wire("train".into(), pb::WatchOpen { protocol: 1, ..pb::WatchOpen::default() }).unwrap();
    assert_eq!(it.exchange.digests_equal("train"), None);
    let hub = Some(pb::Position { epoch: 1, revision: 1 });
    let reported =
        |origins: Vec<pb::OriginState>| report(pb::Realisation { hub, origins, ..pb::Realisation::default() });
    it.say(reported(Vec::new()));
    assert_eq!(it.exchange.digests_equal("train"), None, "it is not served yet");
    it.exchange.next_wire(id).unwrap();
    assert_eq!(it.exchange.digests_equal("train"), Some(true));
    let of_hub = |digest: u128| {
        vec![pb::OriginState { digest: digest.to_le_bytes().to_vec().into(), ..pb::OriginState::default() }]
    };
    it.say(reported(of_hub(1)));
    assert_eq!(it.exchange.digests_equal("train"), Some(false), "policies and clusters count as well");
    it.say(reported(of_hub(it.exchange.expected_digest(id, "").unwrap())));
    assert_eq!(it.exchange.digests_equal("train"), Some(true));
}

/// The cluster does not store an origin that its report does not list.
#[test]
fn missing_origin_makes_digests_differ() {
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
    let reported =
        |origins| pb::Realisation { hub: Some(pb::Position { epoch: 1, revision: 1 }), origins, ..Default::default() };
    say(&mut it.exchange, report(reported(Vec::new())));
    assert_eq!(it.exchange.digests_equal("serve"), Some(false));
    let digest = it.exchange.expected_digest(id, "train").unwrap().to_le_bytes().to_vec().into();
    let held = pb::OriginState { origin: "train".to_owned(), digest, ..pb::OriginState::default() };
    say(&mut it.exchange, report(reported(vec![held])));
    assert_eq!(it.exchange.digests_equal("serve"), Some(true));
}

/// A hub whose files are older than the state of a cluster: the stream waits, and status reports it.
#[test]
fn reports_clusters_ahead_of_the_hub() {
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

/// The hub keeps them, and shows them to administrators.
#[test]
fn bounds_each_name_and_text_of_a_report() {
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
    let policy = pb::PolicyState { policy: "p".to_owned(), state: refused, ..Default::default() };
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
    let waiting = pb::PolicyState { policy: "p".to_owned(), state: Some(waiting), ..Default::default() };
    let policy = pb::PolicyState { policy: name.clone(), ..Default::default() };
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
