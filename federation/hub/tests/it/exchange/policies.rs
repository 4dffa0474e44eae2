//! Policies that the hub cannot use.

use super::*;

#[tokio::test]
async fn unreadable_policy_version_removes_nothing() {
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

    // A hub that starts with it does not know the earlier version: it is sent to all clusters, which keep everything that it may need.
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

#[tokio::test]
async fn policy_without_tier_removes_nothing_and_applies_with_its_tier() {
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
    // Also after a restart, which is not distinguishable from this: the versions that members keep may need anything.
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

/// A policy for one cluster.
fn only_for(cluster: &str, policy: Vec<u8>) -> Vec<u8> {
    let policy = String::from_utf8(policy).unwrap();
    policy.replace("\"all()\"", &format!("\"hanse.dev/cluster == '{cluster}'\"")).into_bytes()
}

fn staged(tier: &str) -> Vec<u8> {
    let policy = String::from_utf8(only_for("train", peered("p", tier))).unwrap();
    policy.replace("FederatedNetworkPolicy", "StagedFederatedNetworkPolicy").into_bytes()
}

#[tokio::test]
async fn staged_policy_is_sent_where_it_applies_and_where_it_replaces() {
    let store = in_memory();
    let commit = async |transaction: Transaction| {
        let committed = store.commit(transaction).await.unwrap();
        let hanse_store::Outcome::Committed(revision) = committed else { panic!("{committed:?}") };
        revision
    };
    let put =
        async |key: &[&str], value: Vec<u8>| commit(Transaction::default().put(Key::new(key).unwrap(), value)).await;
    for cluster in ["prod", "serve", "train"] {
        put(&["member", cluster], br#"{"key":"k","state":"accepted"}"#.to_vec()).await;
    }
    put(&["object", "Tier", "platform"], tier("platform")).await;
    // Of a newer version: it changes nothing for the others.
    put(&["object", "TierOfTiers", "x"], b"{}".to_vec()).await;
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
    let (of_enforced, of_staged) = ((ManifestKind::Policy, "p".into()), (ManifestKind::StagedPolicy, "p".into()));
    let audience = |it: &FederatedManifest| it.audience().into_iter().flatten().map(|it| it.to_string()).collect();
    let object = ["object", "StagedFederatedNetworkPolicy", "p"];

    let alone = derive(put(&object, staged("platform")).await).await;
    let first: Vec<String> = audience(&alone[&of_staged]);
    assert_eq!(first, ["train"]);
    assert!(!alone[&of_staged].interest.is_empty(), "flows have its verdicts");
    let of_serve = only_for("serve", peered("p", "platform"));
    let both = derive(put(&["object", "FederatedNetworkPolicy", "p"], of_serve).await).await;
    let joint: Vec<String> = audience(&both[&of_staged]);
    assert_eq!(joint, ["serve", "train"]);
    let enforced: Vec<String> = audience(&both[&of_enforced]);
    assert_eq!(enforced, ["serve"], "the enforced one is not sent elsewhere");
    let again = derive(registry.snapshot().revision).await;
    assert!(Arc::ptr_eq(&again[&of_staged], &both[&of_staged]), "an unchanged policy costs nothing");

    // Its tier is missing: the last version with a tier stays, and a new one needs nothing.
    let moved = derive(put(&object, staged("ghost")).await).await;
    assert_eq!(moved[&of_staged].features, [EXISTING_TIER]);
    assert_eq!(moved[&of_staged].interest, both[&of_staged].interest);
    let id = |kind| ObjectId { kind, name: "p".into() };
    let acceptance = |kind| registry.snapshot().acceptance(&id(kind));
    let missing = acceptance(Kind::StagedFederatedNetworkPolicy).expect("it exists");
    assert_eq!((&missing, missing.reason()), (&Acceptance::TierNotFound("ghost".into()), Some("TierNotFound")));
    assert_eq!(acceptance(Kind::FederatedNetworkPolicy), Some(Acceptance::Accepted));
    assert_eq!(acceptance(Kind::Tier), None);
    let fresh = Deriver::default().federation(&registry, &registry.snapshot()).manifests;
    assert!(fresh[&of_staged].interest.is_empty(), "no Deny depends on a staged policy");

    let gone = derive(commit(Transaction::default().delete(Key::new(&object).unwrap())).await).await;
    assert!(!gone.contains_key(&of_staged) && gone.contains_key(&of_enforced));
}
