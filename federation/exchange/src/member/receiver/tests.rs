use super::*;
use crate::limits::{EXISTING_TIER, MAX_HUB_OBJECT_BYTES};
use crate::message::WrittenScope;
use hanse_proto::federation::v1 as pb;
use prost::Message as _;

/// Refuses the text `unreadable`.
#[derive(Debug)]
struct Refusing;

impl Check for Refusing {
    fn check(&self, _: ManifestKind, json: &Bytes) -> Result<(), String> {
        if json == "unreadable" { Err("a field is new".to_owned()) } else { Ok(()) }
    }
}

fn policy(json: &'static [u8], revision: u64, features: &[&str]) -> Bytes {
    let manifest = pb::Manifest {
        name: "p".to_owned(),
        json: Bytes::from_static(json),
        enforcers: vec!["here".to_owned()],
        clusters: Vec::new(),
    };
    let features = features.iter().map(|it| (*it).to_owned()).collect();
    let body = Some(pb::object_update::Body::Policy(manifest));
    pb::ObjectUpdate { id: 7, revision, features, body }.encode_to_vec().into()
}

fn p() -> (ManifestKind, Arc<str>) {
    (ManifestKind::Policy, "p".into())
}

/// One batch of the hub's, and the interest that it needs.
fn send(receiver: &mut Receiver, snapshot: bool, object: &Bytes, revision: u64) {
    let frame = frame::cut([object], &[]).remove(0);
    let position = Position { epoch: 1, revision };
    take(receiver, interest_of(1, Vec::new()));
    take(receiver, WatchResponse::Begin { origin: None, snapshot, needs_interest: 1 });
    take(receiver, WatchResponse::Frame(frame));
    take(receiver, WatchResponse::End { position, digest: Some(digest_of(object)), view: 0 });
}

fn interest_of(number: u64, added: Vec<WrittenSelection>) -> WatchResponse {
    WatchResponse::Interest(InterestChange { number, added, ..InterestChange::default() })
}

/// What became of the policy, if anything: its text, or that it is gone.
fn in_force(receiver: &mut Receiver) -> Option<Option<Bytes>> {
    let mut now = None;
    for change in receiver.take_updates().unwrap_or_default().changes {
        if let Change::Manifest { manifest, .. } = change {
            now = Some(manifest.map(|it| it.json));
        }
    }
    now
}

#[test]
fn what_is_older_than_what_was_handed_out_waits_for_the_hub() {
    let mut receiver = Receiver::checked(Refusing);
    receiver.open();
    send(&mut receiver, true, &policy(b"1", 1, &[]), 1);
    let stored = receiver.store();
    let restored = || {
        let mut restored = Receiver::restore_checked(&stored, Refusing).expect("whole");
        restored.require_confirmation();
        assert_eq!(restored.take_updates().expect("what is held").in_force, Position::default());
        restored.open();
        restored
    };
    let mut news = restored();
    send(&mut news, false, &policy(b"2", 2, &[]), 2);
    assert_eq!(news.take_updates().expect("news").in_force.revision, 2);
    let mut none = restored();
    take(&mut none, WatchResponse::Heartbeat);
    assert!(none.take_updates().is_none(), "the hub has not told the interest");
    take(&mut none, interest_of(1, Vec::new()));
    assert!(none.take_updates().is_none(), "more may be under way");
    take(&mut none, WatchResponse::Heartbeat);
    assert_eq!(none.take_updates().expect("it is as it was").in_force.revision, 1);
}

#[test]
fn the_last_version_that_can_be_read_holds_also_across_a_restart() {
    for (json, features, why) in [
        (&b"unreadable"[..], &[][..], "a field is new"),
        (b"2", &["time"], "time"),
        (b"2", &[EXISTING_TIER], "its tier does not exist"),
    ] {
        let mut receiver = Receiver::checked(Refusing);
        assert!(receiver.take_updates().is_none(), "nothing is known yet");
        receiver.open();
        send(&mut receiver, true, &policy(b"1", 1, &[]), 1);
        assert_eq!(in_force(&mut receiver), Some(Some(Bytes::from_static(b"1"))));
        assert!(receiver.refused().is_empty());
        send(&mut receiver, false, &policy(json, 2, features), 2);
        assert_eq!(in_force(&mut receiver), None, "no change");
        assert!(receiver.refused()[&p()].contains(why));

        let mut restored = Receiver::restore_checked(&receiver.store(), Refusing).expect("whole");
        assert_eq!(in_force(&mut restored), Some(Some(Bytes::from_static(b"1"))), "after a restart");
        assert!(restored.refused()[&p()].contains(why), "and is still reported");
        restored.open();
        send(&mut restored, true, &policy(json, 2, features), 2);
        assert_eq!(in_force(&mut restored), None, "the hub's next word takes nothing away");
        send(&mut restored, false, &policy(b"3", 3, &[]), 3);
        assert_eq!(in_force(&mut restored), Some(Some(Bytes::from_static(b"3"))));
        assert!(restored.refused().is_empty());
    }
}
#[test]
fn a_policy_that_never_could_be_read_is_handed_on() {
    for (json, features) in [(&b"unreadable"[..], &[][..]), (b"2", &["time"])] {
        let mut receiver = Receiver::checked(Refusing);
        receiver.open();
        send(&mut receiver, true, &policy(json, 1, features), 1);
        assert_eq!(in_force(&mut receiver), Some(Some(Bytes::from_static(json))));
        assert!(receiver.refused().contains_key(&p()));
        let mut restored = Receiver::restore_checked(&receiver.store(), Refusing).expect("whole");
        assert_eq!(in_force(&mut restored), Some(Some(Bytes::from_static(json))), "after a restart");
        assert!(restored.refused().contains_key(&p()));
        // Its next version, which cannot be read either; then one that can, and one more that cannot.
        restored.open();
        send(&mut restored, true, &policy(json, 2, &["newer"]), 2);
        assert_eq!(in_force(&mut restored), Some(Some(Bytes::from_static(json))));
        send(&mut restored, false, &policy(b"3", 3, &[]), 3);
        assert_eq!(in_force(&mut restored), Some(Some(Bytes::from_static(b"3"))));
        send(&mut restored, false, &policy(json, 4, features), 4);
        assert_eq!(in_force(&mut restored), None);
    }
}

/// A kind of object that this version does not know, as a staged policy is to versions before it: nothing else depends on it.
#[test]
fn object_of_an_unknown_kind_is_refused_alone() {
    let unknown = |id: u64| {
        // Field 31 of the body, a manifest.
        let features = vec!["kind-of-next-year".to_owned()];
        let mut bytes = pb::ObjectUpdate { id, revision: 1, features, body: None }.encode_to_vec();
        bytes.extend([0xfa, 0x01, 3, 0x0a, 1, b'p']);
        Bytes::from(bytes)
    };
    let mut receiver = Receiver::checked(Refusing);
    receiver.open();
    let objects = [unknown(6), policy(b"1", 1, &[])];
    let frame = frame::cut([&objects[0], &objects[1]], &[]).remove(0);
    let position = Position { epoch: 1, revision: 1 };
    let digest = objects.iter().fold(0_u128, |sum, it| sum.wrapping_add(digest_of(it)));
    take(&mut receiver, interest_of(1, Vec::new()));
    take(&mut receiver, WatchResponse::Begin { origin: None, snapshot: true, needs_interest: 1 });
    take(&mut receiver, WatchResponse::Frame(frame));
    take(&mut receiver, WatchResponse::End { position, digest: Some(digest), view: 0 });
    assert_eq!(in_force(&mut receiver), Some(Some(Bytes::from_static(b"1"))));
    assert!(receiver.refused().is_empty(), "it is no policy that this version knows");
}

#[test]
fn staged_policy_is_received_beside_the_enforced_one() {
    let json = Bytes::from_static(b"2");
    let manifest =
        crate::model::Manifest { json, enforcers: BTreeSet::new(), resolved: Vec::new(), features: Vec::new() };
    let staged = object::Object::Manifest { kind: ManifestKind::StagedPolicy, name: "p".into(), manifest };
    let bytes = Bytes::from(object::encode(6, 0, &staged));
    let wire = pb::ObjectUpdate::decode(&*bytes).expect("it was encoded here");
    assert_eq!(wire.features, ["staged-policy"], "versions without it refuse the object by this name");
    assert_eq!(object::decode(&bytes).expect("an id").object, Ok(staged));
    let mut receiver = Receiver::checked(Refusing);
    receiver.open();
    send(&mut receiver, true, &bytes, 1);
    let changes = receiver.take_updates().expect("in force").changes;
    let [Change::Manifest { kind: ManifestKind::StagedPolicy, .. }] = &changes[..] else { panic!("{changes:?}") };
    assert!(receiver.refused().is_empty());
}

#[test]
fn a_policy_that_never_had_a_tier_is_not_handed_on() {
    let mut receiver = Receiver::checked(Refusing);
    receiver.open();
    send(&mut receiver, true, &policy(b"1", 1, &[EXISTING_TIER]), 1);
    assert_eq!(in_force(&mut receiver), None);
    assert!(receiver.refused()[&p()].contains("tier does not exist"));
    let mut restored = Receiver::restore_checked(&receiver.store(), Refusing).expect("whole");
    assert_eq!(in_force(&mut restored), None, "after a restart");
    restored.open();
    send(&mut restored, true, &policy(b"1", 2, &[]), 2);
    assert_eq!(in_force(&mut restored), Some(Some(Bytes::from_static(b"1"))), "its tier is there");
    assert!(restored.refused().is_empty());
    // One that is in doubt does not give way to one without a tier.
    let mut receiver = Receiver::checked(Refusing);
    receiver.open();
    send(&mut receiver, true, &policy(b"unreadable", 1, &[]), 1);
    assert_eq!(in_force(&mut receiver), Some(Some(Bytes::from_static(b"unreadable"))));
    send(&mut receiver, false, &policy(b"2", 2, &[EXISTING_TIER]), 2);
    assert_eq!(in_force(&mut receiver), None);
}

/// The hub says that an interest is complete right behind a batch that was not taken: it is complete with the snapshot.
#[test]
fn a_policy_waits_for_endpoints_whose_batch_was_not_taken() {
    let begin = |origin: Option<&str>, snapshot| WatchResponse::Begin {
        origin: origin.map(Into::into),
        snapshot,
        needs_interest: 1,
    };
    let position = Position { epoch: 1, revision: 1 };
    let end = |digest| WatchResponse::End { position, digest: Some(digest), view: 1 };
    let mut receiver = Receiver::checked(Refusing);
    receiver.open();
    let interest = InterestChange { number: 1, origins: vec!["far".into()], ..InterestChange::default() };
    take(&mut receiver, WatchResponse::Interest(interest));
    let object = policy(b"1", 1, &[]);
    let frame = frame::cut([&object], &[]).remove(0);
    for message in [begin(None, true), WatchResponse::Frame(frame), end(digest_of(&object)), begin(Some("far"), false)]
    {
        take(&mut receiver, message);
    }
    let asked = receiver.take(end(7)).expect("the protocol");
    assert_eq!(asked, [WatchRequest::Mismatch { origin: Some("far".into()) }]);
    let complete = WatchResponse::Complete { interest: 1, origin: "far".into(), position: Some(position), view: 1 };
    take(&mut receiver, complete);
    assert_eq!(in_force(&mut receiver), None, "what it needs has not come");
    take(&mut receiver, begin(Some("far"), true));
    take(&mut receiver, end(0));
    assert_eq!(in_force(&mut receiver), Some(Some(Bytes::from_static(b"1"))));
}

fn take(receiver: &mut Receiver, message: WatchResponse) {
    receiver.take(message).expect("the protocol");
}

fn selection(selector: &str) -> WrittenSelection {
    WrittenSelection { clusters: WrittenScope::All, selector: selector.to_owned(), port_names: Vec::new() }
}

/// The interest and the own selections that an opening names.
fn opening(receiver: &mut Receiver) -> (Vec<String>, Vec<String>) {
    let WatchRequest::Open(open) = receiver.open() else { panic!("not an opening") };
    let texts = |list: Vec<WrittenSelection>| list.into_iter().map(|it| it.selector).collect::<Vec<_>>();
    (texts(open.interest), texts(open.own))
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|it| (*it).to_owned()).collect()
}

#[test]
fn an_opening_that_is_refused_is_followed_by_a_wider_one() {
    let mut receiver = Receiver::default();
    let own = |name: &str| {
        let selector = hanse_policy::selector::Selector::parse(&format!("has({name})")).expect("a selector");
        Interest::from([Arc::new(Wanted::new(hanse_policy::model::ClusterScope::All, &selector, BTreeSet::new()))])
    };
    receiver.set_own(&own("a"));
    receiver.open();
    take(&mut receiver, interest_of(1, vec![selection("has(b)")]));
    assert_eq!(opening(&mut receiver), (texts(&["has(b)"]), texts(&["has(a)"])));
    receiver.set_rejected(Some("selections[0]: 24836 bytes, of 8192".to_owned()));
    assert_eq!(opening(&mut receiver), (texts(&["all()"]), texts(&["all()"])));
    let problem = &receiver.problems()[0];
    assert!(matches!(problem, ReceiveProblem::SelectionsRejected(why) if why.contains("24836")), "{problem:?}");
    assert!(receiver.set_own(&own("c")).is_none(), "the hub has everything from it");
    assert!(receiver.set_own(&Interest::new()).is_some());
    receiver.set_own(&own("a"));
    // Another hub is asked for what is needed.
    receiver.set_rejected(None);
    assert_eq!(opening(&mut receiver), (texts(&["has(b)"]), texts(&["has(a)"])));
    assert_eq!(receiver.problems(), []);
    // One from an earlier version, which is larger than a message.
    let many = (0..140_000).map(|it| selection(&format!("{it:050} == 'x'"))).collect();
    take(&mut receiver, interest_of(1, many));
    assert_eq!(opening(&mut receiver).0, texts(&["all()"]));
}

#[test]
fn the_whole_interest_replaces_what_the_hub_could_not_read() {
    let mut receiver = Receiver::default();
    receiver.open();
    take(&mut receiver, interest_of(1, vec![selection("has(b)")]));
    receiver.open();
    let refused = RefusedParts { parts: texts(&["interest[0].selector: too long"]), total: 1 };
    take(&mut receiver, WatchResponse::PartsRefused(refused));
    assert!(matches!(&receiver.problems()[0], ReceiveProblem::SelectionRejected(why) if why.contains("too long")));
    let interest =
        InterestChange { number: 1, added: vec![selection("all()")], whole: true, ..InterestChange::default() };
    take(&mut receiver, WatchResponse::Interest(interest));
    assert_eq!(opening(&mut receiver).0, texts(&["all()"]));
}

/// An object of the hub's that is too large, and one without an id: the rest of the batch counts, and so does the next one.
#[test]
fn an_object_that_cannot_be_read_is_refused_by_itself() {
    let mut receiver = Receiver::checked(Refusing);
    receiver.open();
    let large = pb::ObjectUpdate { id: 9, revision: 0, features: vec!["x".repeat(MAX_HUB_OBJECT_BYTES)], body: None };
    let nameless = pb::ObjectUpdate { id: 0, revision: 1, features: Vec::new(), body: None };
    let objects = [policy(b"1", 1, &[]), large.encode_to_vec().into(), nameless.encode_to_vec().into()];
    let digest = objects.iter().fold(0_u128, |sum, it| sum.wrapping_add(digest_of(it)));
    for (snapshot, revision) in [(true, 1), (true, 2), (false, 3)] {
        let sent = if revision == 3 { Vec::new() } else { objects.to_vec() };
        take(&mut receiver, interest_of(1, Vec::new()));
        take(&mut receiver, WatchResponse::Begin { origin: None, snapshot, needs_interest: 1 });
        frame::cut(sent, &[]).into_iter().for_each(|frame| take(&mut receiver, WatchResponse::Frame(frame)));
        let position = Position { epoch: 1, revision };
        let end = WatchResponse::End { position, digest: Some(digest), view: 0 };
        let answers = receiver.take(end).expect("the protocol");
        let mismatch = |it: &WatchRequest| matches!(it, WatchRequest::Mismatch { .. });
        assert!(!answers.iter().any(mismatch), "{revision}: {answers:?}");
    }
    assert_eq!(in_force(&mut receiver), Some(Some(Bytes::from_static(b"1"))));
    assert_eq!(receiver.hub_digest(), digest);
    assert_eq!(receiver.problems()[0], ReceiveProblem::ObjectsUnreadable { cluster: None, count: 2 });
}
