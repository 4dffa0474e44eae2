//! The behaviour that all stores share.

use std::sync::Arc;
use std::time::Duration;

use hanse_store::{
    Compare, Key, MAX_TRANSACTION_BYTES, MAX_TRANSACTION_PARTS, MAX_VALUE_BYTES, Outcome, Prefix, Revision, Store,
    StoreError, StoreUrl, Transaction, create, in_memory, open,
};

fn key(segments: &[&str]) -> Key {
    Key::new(segments).unwrap()
}

fn prefix(segments: &[&str]) -> Prefix {
    Prefix::new(segments).unwrap()
}

/// Runs `check` on each embedded implementation. Their time can be paused.
async fn on_embedded<F: Future<Output = ()>>(check: impl Fn(Arc<dyn Store>) -> F) {
    check(in_memory()).await;
    let folder = tempfile::tempdir().unwrap();
    check(create(&StoreUrl::file(folder.path().join("store"))).await.unwrap()).await;
}

/// Runs `check` on a new store in etcd.
#[cfg(feature = "etcd")]
async fn on_etcd<F: Future<Output = ()>>(check: impl Fn(Arc<dyn Store>) -> F) {
    check(create(&crate::etcd::nodes::shared().await.url()).await.unwrap()).await;
}

/// There is none in this build.
#[cfg(not(feature = "etcd"))]
async fn on_etcd<F: Future<Output = ()>>(_: impl Fn(Arc<dyn Store>) -> F) {}

/// Runs `check` on each implementation.
async fn on_each<F: Future<Output = ()>>(check: impl Fn(Arc<dyn Store>) -> F) {
    on_embedded(&check).await;
    on_etcd(check).await;
}

/// The revision of a transaction that was applied.
async fn made(store: &dyn Store, transaction: Transaction) -> Revision {
    match store.commit(transaction).await.unwrap() {
        Outcome::Committed(revision) => revision,
        Outcome::Conflict => panic!("conflict"),
    }
}

#[tokio::test]
async fn compare_and_swap_lets_one_of_two_win() {
    on_each(|store| async move {
        let create = Transaction::default().when(Compare::Absent(key(&["a"])));
        let start = store.revision().await.unwrap();
        let created = made(&*store, create.clone().put(key(&["a"]), "1")).await;
        assert!(created > start);
        assert_eq!(store.commit(create.put(key(&["a"]), "2")).await.unwrap(), Outcome::Conflict);
        let swap = |at| Transaction::default().when(Compare::Modified(key(&["a"]), at)).put(key(&["a"]), "3");
        let (first, second) = tokio::join!(store.commit(swap(created)), store.commit(swap(created)));
        let outcomes = [first.unwrap(), second.unwrap()];
        assert!(outcomes.contains(&Outcome::Conflict), "{outcomes:?}");
        let entry = store.read(&key(&["a"])).await.unwrap().unwrap();
        assert!(entry.modified > created && outcomes.contains(&Outcome::Committed(entry.modified)), "{outcomes:?}");
        assert_eq!((entry.created, entry.value.as_ref()), (created, b"3".as_slice()));
        assert!(store.revision().await.unwrap() >= entry.modified, "others may write to the same etcd");
        // Of a revision that no transaction has.
        for never in [0, entry.modified + 1_000_000, u64::MAX] {
            let absent = Transaction::default().when(Compare::Modified(key(&["absent"]), never));
            assert_eq!(store.commit(absent.put(key(&["b"]), "")).await.unwrap(), Outcome::Conflict, "{never}");
            assert_eq!(store.commit(swap(never)).await.unwrap(), Outcome::Conflict, "{never}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_transaction_is_whole_and_empty_ones_change_nothing() {
    on_each(|store| async move {
        let both = Transaction::default().put(key(&["c", "a"]), "1").put(key(&["c", "b"]), "2").put(key(&["cc"]), "3");
        let revision = made(&*store, both).await;
        let listing = store.list(&prefix(&["c"])).await.unwrap();
        assert!(listing.revision >= revision);
        assert_eq!(listing.entries.iter().map(|e| e.key.name().to_owned()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(listing.entries.iter().all(|e| (e.created, e.modified) == (revision, revision)));
        let mut watch = store.watch(prefix(&[]), revision).await.unwrap();
        assert!(made(&*store, Transaction::default().delete(key(&["absent"]))).await >= revision);
        assert!(made(&*store, Transaction::default()).await >= revision);
        let checked = Transaction::default().when(Compare::Present(key(&["absent"])));
        assert_eq!(store.commit(checked.clone()).await.unwrap(), Outcome::Conflict);
        assert_eq!(store.commit(checked.delete(key(&["c", "a"]))).await.unwrap(), Outcome::Conflict);
        let after = store.list(&prefix(&[])).await.unwrap();
        assert_eq!(after.entries.len(), 3);
        let next = made(&*store, Transaction::default().put(key(&["d"]), "4").delete(key(&["cc"]))).await;
        let events = watch.next().await.unwrap();
        let changed: Vec<_> = events.iter().map(|e| (e.revision, e.key.name(), e.entry.is_some())).collect();
        assert_eq!(
            changed,
            [(next, "cc", false), (next, "d", true)],
            "nothing is reported of transactions that changed nothing"
        );
    })
    .await;
}

#[tokio::test]
async fn refuses_what_exceeds_the_limits_and_takes_the_largest_that_is_permitted() {
    on_each(|store| async move {
        let refused = |transaction| {
            let store = store.clone();
            async move { assert!(matches!(store.commit(transaction).await, Err(StoreError::Limit(_)))) }
        };
        refused(Transaction::default().put(key(&["x"]), "1").delete(key(&["x"]))).await;
        refused(Transaction::default().put(key(&["x"]), vec![0; MAX_VALUE_BYTES + 1])).await;
        let half = vec![0; MAX_TRANSACTION_BYTES / 2];
        refused(Transaction::default().put(key(&["x"]), half.clone()).put(key(&["y"]), half)).await;
        // Keys of the greatest length, as many as possible, and as many comparisons of others.
        let long = |number: usize, name: &str| key(&[&format!("{name}{number:03}{}", "k".repeat(1_018))]);
        let mut largest = Transaction::default();
        for number in 0..MAX_TRANSACTION_PARTS {
            largest = largest.when(Compare::Absent(long(number, "a"))).put(long(number, "b"), "");
        }
        let size: usize = largest.changes.iter().map(hanse_store::Change::size).sum();
        let hanse_store::Change::Put { value, .. } = &mut largest.changes[0] else { panic!("a put") };
        *value = vec![1; (MAX_TRANSACTION_BYTES - size).min(MAX_VALUE_BYTES)].into();
        let size: usize = largest.changes.iter().map(hanse_store::Change::size).sum();
        let hanse_store::Change::Put { value, .. } = &mut largest.changes[1] else { panic!("a put") };
        *value = vec![1; MAX_TRANSACTION_BYTES - size].into();
        refused(largest.clone().delete(key(&["one more"]))).await;
        refused(largest.clone().when(Compare::Absent(key(&["one more"])))).await;
        made(&*store, largest).await;
        assert_eq!(store.list(&prefix(&[])).await.unwrap().entries.len(), MAX_TRANSACTION_PARTS);
    })
    .await;
}

#[tokio::test]
async fn lists_pages_of_large_and_small_values_at_one_revision() {
    on_each(|store| async move {
        // More entries than a page, most of them together larger than a response may be.
        for number in 0..1_200_u32 {
            let size = if (500..530).contains(&number) { MAX_VALUE_BYTES } else { 10 };
            let put = Transaction::default().put(key(&["p", &format!("{number:04}")]), vec![7; size]);
            made(&*store, put).await;
        }
        let listing = store.list(&prefix(&["p"])).await.unwrap();
        let names: Vec<_> = listing.entries.iter().map(|e| e.key.name().to_owned()).collect();
        assert_eq!(names, (0..1_200).map(|number| format!("{number:04}")).collect::<Vec<_>>());
        assert!(listing.entries[529].value.len() == MAX_VALUE_BYTES && listing.entries[530].value.len() == 10);
        assert!(listing.revision >= listing.entries[1_199].modified);
    })
    .await;
}

#[tokio::test]
async fn a_watch_misses_and_repeats_nothing() {
    on_each(|store| async move {
        let before = store.revision().await.unwrap();
        let first = made(&*store, Transaction::default().put(key(&["w", "0"]), "")).await;
        let mut past = store.watch(prefix(&["w"]), before).await.unwrap();
        let mut future = store.watch(prefix(&["w"]), first).await.unwrap();
        let writer = store.clone();
        let writing = tokio::spawn(async move {
            for i in 1..50_u32 {
                writer.commit(Transaction::default().put(key(&["w", &i.to_string()]), "")).await.unwrap();
                writer.commit(Transaction::default().put(key(&["other"]), "")).await.unwrap();
            }
            writer.commit(Transaction::default().delete(key(&["w", "0"]))).await.unwrap();
        });
        for (watch, first) in [(&mut past, 0), (&mut future, 1)] {
            let mut seen = Vec::new();
            while seen.last().is_none_or(|e: &hanse_store::Event| e.entry.is_some()) {
                // Dropping a future drops no change.
                let Ok(events) = tokio::time::timeout(Duration::from_millis(1), watch.next()).await else { continue };
                seen.extend(events.unwrap());
                assert_eq!(watch.revision(), watch.revision().max(seen.last().unwrap().revision));
            }
            let names: Vec<_> = seen.iter().map(|e| e.key.name().to_owned()).collect();
            let mut expected: Vec<_> = (first..50).map(|i| i.to_string()).collect();
            expected.push("0".to_owned());
            assert_eq!(names, expected);
            assert!(seen.is_sorted_by_key(|e| e.revision));
        }
        writing.await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_watch_below_the_floor_says_so() {
    let store = in_memory();
    let mut slow = store.watch(prefix(&[]), 0).await.unwrap();
    for _ in 0..70 {
        let value = vec![0; hanse_store::MAX_VALUE_BYTES];
        store.commit(Transaction::default().put(key(&["large"]), value)).await.unwrap();
    }
    assert!(matches!(store.watch(prefix(&[]), 0).await, Err(StoreError::Compacted { .. })));
    assert!(store.watch(prefix(&[]), 69).await.is_ok());
    assert!(matches!(slow.next().await, Err(StoreError::Compacted { .. })), "what it has missed is gone");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_not_renewed_takes_its_keys() {
    on_embedded(lease_ends).await;
}

/// In real time: etcd has a clock of its own.
#[cfg(feature = "etcd")]
#[tokio::test]
async fn a_lease_of_etcd_that_is_not_renewed_takes_its_keys() {
    on_etcd(lease_ends).await;
}

async fn lease_ends(store: Arc<dyn Store>) {
    let second = Duration::from_secs(1);
    let lease = store.grant_lease(second).await.unwrap();
    assert_eq!(store.time_to_live(lease).await.unwrap(), second);
    let both = Transaction::default().put_with_lease(key(&["l"]), "1", lease);
    made(&*store, both.put_with_lease(key(&["m"]), "1", lease).put(key(&["n"]), "1")).await;
    for _ in 0..5 {
        tokio::time::sleep(second * 3 / 4).await;
        store.renew_lease(lease).await.unwrap();
    }
    assert_eq!(store.read(&key(&["l"])).await.unwrap().expect("renewed").lease, Some(lease));
    let mut watch = store.watch(prefix(&[]), store.revision().await.unwrap()).await.unwrap();
    let ended = tokio::time::timeout(second * 60, watch.next()).await.expect("it ends").unwrap();
    let names: Vec<_> = ended.iter().map(|e| (e.key.name().to_owned(), e.entry.is_none())).collect();
    assert_eq!(names, [("l".to_owned(), true), ("m".to_owned(), true)]);
    assert_eq!(ended[0].revision, ended[1].revision, "one transaction");
    assert!(store.read(&key(&["l"])).await.unwrap().is_none() && store.read(&key(&["n"])).await.unwrap().is_some());
    assert!(matches!(store.renew_lease(lease).await, Err(StoreError::NoLease(it)) if it == lease));
    assert!(matches!(store.time_to_live(lease).await, Err(StoreError::NoLease(_))));
    let dead = Transaction::default().put_with_lease(key(&["l"]), "2", lease);
    assert!(matches!(store.commit(dead).await, Err(StoreError::NoLease(it)) if it == lease));
}

#[tokio::test]
async fn leases_end_on_request() {
    on_each(|store| async move {
        let [lease, other] = [60, 5_000].map(Duration::from_secs).map(|ttl| store.grant_lease(ttl));
        let (lease, other) = (lease.await.unwrap(), other.await.unwrap());
        assert_eq!(store.time_to_live(other).await.unwrap(), Duration::from_secs(5_000));
        made(&*store, Transaction::default().put_with_lease(key(&["l"]), "1", lease)).await;
        made(&*store, Transaction::default().put_with_lease(key(&["kept"]), "1", lease)).await;
        made(&*store, Transaction::default().put(key(&["kept"]), "2")).await;
        store.end_lease(lease).await.unwrap();
        assert!(matches!(store.end_lease(lease).await, Err(StoreError::NoLease(it)) if it == lease));
        assert!(store.read(&key(&["l"])).await.unwrap().is_none());
        let kept = store.read(&key(&["kept"])).await.unwrap().expect("a write without the lease detaches a key");
        assert_eq!(kept.lease, None);
        assert_ne!(store.grant_lease(Duration::from_secs(60)).await.unwrap(), lease);
        let mixed =
            Transaction::default().put_with_lease(key(&["a"]), "", other).put_with_lease(key(&["b"]), "", lease);
        assert!(matches!(store.commit(mixed).await, Err(StoreError::NoLease(it)) if it == lease));
        assert!(store.read(&key(&["a"])).await.unwrap().is_none(), "all or nothing");
        store.renew_lease(other).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn keeps_everything_when_the_file_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let url = StoreUrl::file(&path);
    let lease = {
        let store = create(&url).await.unwrap();
        let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
        store.commit(Transaction::default().put(key(&["a"]), "1")).await.unwrap();
        store.commit(Transaction::default().put_with_lease(key(&["b"]), "2", lease)).await.unwrap();
        assert!(matches!(open(&url).await, Err(StoreError::InUse)), "one process at a time");
        lease
    };
    // The lease task keeps the store open until its next tick.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let store = loop {
        match open(&url).await {
            Ok(store) => break store,
            Err(error) if std::time::Instant::now() > deadline => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    assert_eq!(store.revision().await.unwrap(), 2);
    assert_eq!(store.read(&key(&["b"])).await.unwrap().unwrap().lease, Some(lease));
    store.renew_lease(lease).await.unwrap();
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}
