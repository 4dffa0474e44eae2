//! The store on real etcd nodes, beside what the suite checks.

mod access;
mod failover;
pub mod nodes;
mod proxy;
mod random;

use std::sync::Arc;
use std::time::Duration;

use hanse_store::{
    Compare, Event, Key, Outcome, Prefix, Revision, Store, StoreError, StoreUrl, Transaction, create, open,
};

use nodes::{SOON, shared};

fn key(segments: &[&str]) -> Key {
    Key::new(segments).unwrap()
}

fn prefix(segments: &[&str]) -> Prefix {
    Prefix::new(segments).unwrap()
}

async fn put(store: &dyn Store, name: &str, value: &str) -> Revision {
    match store.commit(Transaction::default().put(key(&["k", name]), value.to_owned())).await.unwrap() {
        Outcome::Committed(revision) => revision,
        Outcome::Conflict => panic!("no condition"),
    }
}

/// A client of one node, to administer it.
async fn client(nodes: &nodes::Nodes, number: usize, options: etcd_client::ConnectOptions) -> etcd_client::Client {
    etcd_client::Client::connect([nodes.address(number)], Some(options)).await.unwrap()
}

/// Compacts the history up to and including `revision`.
async fn compact(nodes: &nodes::Nodes, revision: Revision) {
    let mut administrator = client(nodes, 0, etcd_client::ConnectOptions::new()).await;
    administrator.compact(revision.try_into().unwrap(), None).await.unwrap();
}

/// The next changes of a watch, which must come.
async fn next(watch: &mut hanse_store::Watch) -> Result<Vec<Event>, StoreError> {
    tokio::time::timeout(SOON, watch.next()).await.expect("a change or an error")
}

/// The same store with another prefix or other settings.
fn with(url: &StoreUrl, change: impl FnOnce(&mut hanse_store::EtcdUrl)) -> StoreUrl {
    let StoreUrl::Etcd(mut url) = url.clone() else { panic!("{url}") };
    change(&mut url);
    StoreUrl::Etcd(url)
}

#[tokio::test]
async fn is_created_once_and_opened_only_where_it_is() {
    let nodes = shared().await;
    let url = nodes.url();
    assert!(matches!(open(&url).await, Err(StoreError::Absent)));
    let (one, two) = tokio::join!(create(&url), create(&url));
    assert!(one.is_ok() != two.is_ok(), "one of two creates it");
    assert!([one, two].into_iter().any(|it| matches!(it, Err(StoreError::Exists))));
    let store = open(&url).await.unwrap();
    let revision = put(&*store, "a", "1").await;
    // Any number of processes, which see each other at once.
    let other = open(&url).await.unwrap();
    assert_eq!(other.read(&key(&["k", "a"])).await.unwrap().unwrap().modified, revision);
    let swap = Transaction::default().when(Compare::Modified(key(&["k", "a"]), revision)).put(key(&["k", "a"]), "2");
    let (one, two) = tokio::join!(store.commit(swap.clone()), other.commit(swap));
    assert!([one.unwrap(), two.unwrap()].contains(&Outcome::Conflict));

    let foreign = nodes.url();
    let StoreUrl::Etcd(parts) = &foreign else { panic!("{foreign}") };
    let mut administrator = client(&nodes, 0, etcd_client::ConnectOptions::new()).await;
    administrator.put(format!("{}:something", parts.prefix), "1", None).await.unwrap();
    assert!(matches!(open(&foreign).await, Err(StoreError::Foreign(_))));
    assert!(matches!(create(&foreign).await, Err(StoreError::Exists)), "keys of others are not taken over");
    administrator.put(format!("{}:\0store", parts.prefix), "hanse-store 2", None).await.unwrap();
    assert!(matches!(open(&foreign).await, Err(StoreError::Format(_))));
}

#[tokio::test]
async fn stores_with_different_prefixes_do_not_see_each_other() {
    let nodes = shared().await;
    let url = nodes.url();
    let within = |path: &str| with(&url, |it| it.prefix.push_str(path));
    let outer = create(&url).await.unwrap();
    let inner = create(&within("/inner")).await.unwrap();
    let beside = create(&within("0")).await.unwrap();
    let mut watches = Vec::new();
    for (store, name) in [(&outer, "outer"), (&inner, "inner"), (&beside, "beside")] {
        watches.push((store.watch(prefix(&[]), store.revision().await.unwrap()).await.unwrap(), name));
    }
    for (store, name) in [(&inner, "inner"), (&beside, "beside"), (&outer, "outer")] {
        put(&**store, name, "").await;
        let seen = store.list(&prefix(&[])).await.unwrap().entries;
        assert_eq!(seen.iter().map(|it| it.key.name()).collect::<Vec<_>>(), [name]);
    }
    for (mut watch, name) in watches {
        let events = next(&mut watch).await.unwrap();
        assert_eq!(events.iter().map(|it| it.key.name()).collect::<Vec<_>>(), [name]);
    }
    // Something else than Hanse wrote below the prefix: it is skipped.
    let StoreUrl::Etcd(parts) = &url else { panic!("{url}") };
    let mut watch = outer.watch(prefix(&[]), outer.revision().await.unwrap()).await.unwrap();
    let mut administrator = client(&nodes, 0, etcd_client::ConnectOptions::new()).await;
    administrator.put(format!("{}:stray", parts.prefix), "1", None).await.unwrap();
    put(&*outer, "after", "").await;
    assert_eq!(next(&mut watch).await.unwrap()[0].key.name(), "after");
    assert_eq!(outer.list(&prefix(&[])).await.unwrap().entries.len(), 2);
}

#[tokio::test]
async fn a_watch_below_a_compaction_says_so_and_listing_again_continues() {
    // A cluster of its own: a compaction concerns all stores.
    let nodes = nodes::Nodes::start().await;
    let store = create(&nodes.url()).await.unwrap();
    let mut revisions = Vec::new();
    for number in 0..20 {
        revisions.push(put(&*store, "a", &number.to_string()).await);
    }
    let mut live = store.watch(prefix(&[]), revisions[19]).await.unwrap();
    store.commit(Transaction::default().delete(key(&["k", "a"]))).await.unwrap();
    let deleted = next(&mut live).await.unwrap()[0].revision;
    compact(&nodes, deleted).await;
    for after in [0, revisions[3], revisions[19]] {
        let error = store.watch(prefix(&[]), after).await.expect_err("compacted");
        assert!(
            matches!(error, StoreError::Compacted { after: it, floor } if (it, floor) == (after, deleted)),
            "{error}"
        );
    }
    let listing = store.list(&prefix(&[])).await.unwrap();
    assert!(listing.entries.is_empty() && listing.revision >= deleted);
    let mut again = store.watch(prefix(&[]), listing.revision).await.unwrap();
    let last = put(&*store, "b", "1").await;
    for watch in [&mut again, &mut live] {
        assert_eq!(next(watch).await.unwrap().iter().map(|it| it.revision).collect::<Vec<_>>(), [last]);
    }
}

#[tokio::test]
async fn a_watch_that_was_away_during_a_compaction_says_so() {
    let nodes = nodes::Nodes::start().await;
    let proxy = proxy::Proxy::start(&nodes.hosts()[0]).await;
    let url = nodes.url();
    let direct = create(&url).await.unwrap();
    let store = open(&with(&url, |it| it.hosts = vec![proxy.host()])).await.unwrap();
    let mut watch = store.watch(prefix(&[]), store.revision().await.unwrap()).await.unwrap();
    put(&*store, "seen", "").await;
    assert_eq!(next(&mut watch).await.unwrap()[0].key.name(), "seen");
    proxy.interrupt();
    put(&*direct, "missed", "1").await;
    let last = put(&*direct, "missed", "2").await;
    compact(&nodes, last).await;
    proxy.resume();
    let error = next(&mut watch).await.expect_err("changes are gone");
    assert!(matches!(error, StoreError::Compacted { floor, .. } if floor == last), "{error}");
}

/// The answer of a transaction that etcd has applied is lost: it is applied once, and its revision is found.
#[tokio::test]
async fn a_transaction_whose_answer_is_lost_is_applied_once() {
    let nodes = shared().await;
    let proxy = proxy::Proxy::start(&nodes.hosts()[0]).await;
    let url = with(&nodes.url(), |it| it.hosts = vec![proxy.host()]);
    let store = create(&url).await.unwrap();
    let direct = open(&with(&url, |it| it.hosts = nodes.hosts())).await.unwrap();
    let mut watch = direct.watch(prefix(&[]), direct.revision().await.unwrap()).await.unwrap();
    // The slot of commits exists.
    let mut at = put(&*store, "a", "start").await;
    assert_eq!(next(&mut watch).await.unwrap()[0].revision, at);
    for round in 0..6 {
        let mut swap = Transaction::default().put(key(&["k", "a"]), round.to_string());
        // Without a condition of the caller, a repetition would be applied again.
        let is_conditional = round % 2 == 0;
        if is_conditional {
            swap = swap.when(Compare::Modified(key(&["k", "a"]), at));
        }
        proxy.swallow_answers();
        let committing = store.commit(swap.clone());
        let meanwhile = async {
            // It is applied; its answer is not sent.
            let applied = next(&mut watch).await.unwrap();
            proxy.interrupt();
            proxy.resume();
            applied
        };
        let (outcome, applied) = tokio::join!(committing, meanwhile);
        assert_eq!(applied.len(), 1);
        assert_eq!(outcome.unwrap(), Outcome::Committed(applied[0].revision), "round {round}");
        at = applied[0].revision;
        // No second change follows.
        if is_conditional {
            assert_eq!(store.commit(swap).await.unwrap(), Outcome::Conflict);
        }
        let marker = put(&*direct, "marker", "").await;
        assert_eq!(next(&mut watch).await.unwrap().iter().map(|it| it.revision).collect::<Vec<_>>(), [marker]);
    }
}

#[tokio::test]
async fn many_transactions_at_once_are_all_applied() {
    let store: Arc<dyn Store> = create(&shared().await.url()).await.unwrap();
    let writers = (0..100).map(|number: u32| {
        let store = store.clone();
        tokio::spawn(async move { put(&*store, &number.to_string(), "").await })
    });
    let mut revisions = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        revisions.push(writer.await.unwrap());
    }
    revisions.sort_unstable();
    revisions.dedup();
    assert_eq!((revisions.len(), store.list(&prefix(&["k"])).await.unwrap().entries.len()), (100, 100));
    // A caller that stops waiting does not disturb the next.
    for _ in 0..50 {
        let commit = store.commit(Transaction::default().put(key(&["k", "dropped"]), ""));
        let _ = tokio::time::timeout(Duration::from_micros(200), commit).await;
        put(&*store, "kept", "").await;
    }
}

#[tokio::test]
async fn a_request_that_etcd_limits_more_is_refused_with_its_reason() {
    let extra = ["--max-txn-ops", "16", "--max-request-bytes", "65536"].map(str::to_owned);
    let nodes = nodes::Nodes::start_with(&extra, false).await;
    let store = create(&nodes.url()).await.unwrap();
    let mut many = Transaction::default();
    for number in 0..20 {
        many = many.put(key(&["k", &number.to_string()]), "");
    }
    let error = store.commit(many).await.unwrap_err().to_string();
    assert!(error.contains("too many operations"), "{error}");
    let large = Transaction::default().put(key(&["k", "large"]), vec![0; 100_000]);
    let error = store.commit(large).await.unwrap_err().to_string();
    assert!(error.contains("too large"), "{error}");
    put(&*store, "small", "").await;
}

#[tokio::test]
async fn a_full_etcd_refuses_changes_and_answers_questions_until_there_is_room() {
    let nodes = nodes::Nodes::start_with(&["--quota-backend-bytes", "4194304"].map(str::to_owned), false).await;
    let store = create(&nodes.url()).await.unwrap();
    put(&*store, "small", "kept").await;
    let mut last = 0;
    let error = loop {
        match store.commit(Transaction::default().put(key(&["k", "large"]), vec![0; 200_000])).await {
            Ok(Outcome::Committed(revision)) => last = revision,
            Ok(Outcome::Conflict) => panic!("no condition"),
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, StoreError::Full(text) if text.contains("disarm its alarm")), "{error}");
    assert_eq!(store.list(&prefix(&["k"])).await.unwrap().entries.len(), 2, "it can be read");
    compact(&nodes, last).await;
    for number in 0..3 {
        client(&nodes, number, etcd_client::ConnectOptions::new()).await.defragment().await.unwrap();
    }
    let mut administrator = client(&nodes, 0, etcd_client::ConnectOptions::new()).await;
    let (action, kind) = (etcd_client::AlarmAction::Deactivate, etcd_client::AlarmType::Nospace);
    for alarm in administrator.alarm(etcd_client::AlarmAction::Get, kind, None).await.unwrap().alarms() {
        let mut options = etcd_client::AlarmOptions::new();
        options.with_member(alarm.member_id());
        administrator.alarm(action, kind, Some(options)).await.unwrap();
    }
    put(&*store, "small", "changed").await;
}
