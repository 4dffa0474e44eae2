//! Interests: what members receive.

use super::*;

/// A policy may select in more than a message takes: what the hub sends as an interest, it reads when the member comes back.
#[tokio::test]
async fn reads_back_derived_interest_when_a_member_reconnects() {
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
fn unreadable_part_of_an_opening_does_not_end_the_stream() {
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
    // Instead of its previous interest the receiver is sent the whole of the present one.
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

/// The most that a legitimate peer sends is read.
#[test]
fn decodes_the_largest_legitimate_messages() {
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
fn sends_nothing_while_a_changed_grant_is_applied_in_parts() {
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
    assert_eq!(sent_of_train(&mut it.exchange, watching).0.len(), 101);
    // Values of the key are no longer granted: each endpoint is refused.
    let none = grant(serde_json::json!({"namespaces": ["*"], "cidrs": ["10.1.0.0/16"], "labels": {"app": ["b"]}}));
    it.exchange.set_federation_part(federation(none, 2));
    let mut parts = 0;
    let (come, gone) = loop {
        let ready = it.exchange.take_ready();
        let sent = sent_of_train(&mut it.exchange, watching);
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
    assert_eq!(sent_of_train(&mut it.exchange, watching), (vec![], vec![]));
    while it.exchange.regrant_more() {}
    assert_eq!(sent_of_train(&mut it.exchange, watching).0.len(), 101);
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
fn bounds_idle_interests_in_bytes() {
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
