//! The behaviour that all stores share.

use std::sync::Arc;
use std::time::Duration;

use hanse_store::{Compare, Key, Outcome, Prefix, Store, StoreError, StoreUrl, Transaction, create, in_memory, open};

fn key(segments: &[&str]) -> Key {
    Key::new(segments).unwrap()
}

fn prefix(segments: &[&str]) -> Prefix {
    Prefix::new(segments).unwrap()
}

/// Runs `check` on each implementation.
async fn on_each<F: Future<Output = ()>>(check: impl Fn(Arc<dyn Store>) -> F) {
    check(in_memory()).await;
    let folder = tempfile::tempdir().unwrap();
    check(create(&StoreUrl::file(folder.path().join("store"))).unwrap()).await;
}

#[tokio::test]
async fn compare_and_swap_lets_one_of_two_win() {
    on_each(|store| async move {
        let create = Transaction::default().when(Compare::Absent(key(&["a"])));
        assert_eq!(store.commit(create.clone().put(key(&["a"]), "1")).await.unwrap(), Outcome::Committed(1));
        assert_eq!(store.commit(create.put(key(&["a"]), "2")).await.unwrap(), Outcome::Conflict);
        let swap = |at| Transaction::default().when(Compare::Modified(key(&["a"]), at)).put(key(&["a"]), "3");
        let (first, second) = tokio::join!(store.commit(swap(1)), store.commit(swap(1)));
        let outcomes = [first.unwrap(), second.unwrap()];
        assert!(outcomes.contains(&Outcome::Conflict) && outcomes.contains(&Outcome::Committed(2)), "{outcomes:?}");
        let entry = store.read(&key(&["a"])).await.unwrap().unwrap();
        assert_eq!((entry.created, entry.modified, entry.value.as_ref()), (1, 2, b"3".as_slice()));
    })
    .await;
}

#[tokio::test]
async fn a_transaction_is_whole_and_empty_ones_have_no_revision() {
    on_each(|store| async move {
        let both = Transaction::default().put(key(&["c", "a"]), "1").put(key(&["c", "b"]), "2").put(key(&["cc"]), "3");
        store.commit(both).await.unwrap();
        let listing = store.list(&prefix(&["c"])).await.unwrap();
        assert_eq!(listing.revision, 1);
        assert_eq!(listing.entries.iter().map(|e| e.key.name().to_owned()).collect::<Vec<_>>(), ["a", "b"]);
        let nothing = Transaction::default().delete(key(&["absent"]));
        assert_eq!(store.commit(nothing).await.unwrap(), Outcome::Committed(1));
        let refused = Transaction::default().when(Compare::Present(key(&["absent"]))).delete(key(&["c", "a"]));
        assert_eq!(store.commit(refused).await.unwrap(), Outcome::Conflict);
        let twice = Transaction::default().put(key(&["x"]), "1").delete(key(&["x"]));
        assert!(matches!(store.commit(twice).await, Err(StoreError::Limit(_))));
        let large = Transaction::default().put(key(&["x"]), vec![0; hanse_store::MAX_VALUE_BYTES + 1]);
        assert!(matches!(store.commit(large).await, Err(StoreError::Limit(_))));
    })
    .await;
}

#[tokio::test]
async fn a_watch_misses_and_repeats_nothing() {
    on_each(|store| async move {
        store.commit(Transaction::default().put(key(&["w", "0"]), "")).await.unwrap();
        let mut past = store.watch(prefix(&["w"]), 0).await.unwrap();
        let mut future = store.watch(prefix(&["w"]), 1).await.unwrap();
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
                seen.extend(watch.next().await.unwrap());
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
async fn a_lease_that_nobody_renews_takes_its_keys() {
    on_each(|store| async move {
        let second = Duration::from_secs(1);
        let lease = store.grant_lease(second).await.unwrap();
        store.commit(Transaction::default().put_with_lease(key(&["l"]), "1", lease)).await.unwrap();
        for _ in 0..5 {
            tokio::time::sleep(second * 3 / 4).await;
            store.renew_lease(lease).await.unwrap();
        }
        assert!(store.read(&key(&["l"])).await.unwrap().is_some(), "renewed");
        let mut watch = store.watch(prefix(&["l"]), store.revision().await.unwrap()).await.unwrap();
        let ended = tokio::time::timeout(second * 60, watch.next()).await.expect("it ends");
        let event = ended.unwrap().remove(0);
        assert!(event.entry.is_none() && store.read(&key(&["l"])).await.unwrap().is_none());
        assert!(matches!(store.renew_lease(lease).await, Err(StoreError::NoLease(_))));
        let dead = Transaction::default().put_with_lease(key(&["l"]), "2", lease);
        assert!(matches!(store.commit(dead).await, Err(StoreError::NoLease(_))));
    })
    .await;
}

#[tokio::test]
async fn leases_end_on_request() {
    on_each(|store| async move {
        let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
        store.commit(Transaction::default().put_with_lease(key(&["l"]), "1", lease)).await.unwrap();
        store.end_lease(lease).await.unwrap();
        assert!(store.read(&key(&["l"])).await.unwrap().is_none());
        assert_ne!(store.grant_lease(Duration::from_secs(60)).await.unwrap(), lease);
    })
    .await;
}

#[tokio::test]
async fn keeps_everything_when_the_file_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let url = StoreUrl::file(&path);
    let lease = {
        let store = create(&url).unwrap();
        let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
        store.commit(Transaction::default().put(key(&["a"]), "1")).await.unwrap();
        store.commit(Transaction::default().put_with_lease(key(&["b"]), "2", lease)).await.unwrap();
        assert!(matches!(open(&url), Err(StoreError::InUse)), "one process at a time");
        lease
    };
    // The lease task keeps the store open until its next tick.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let store = loop {
        match open(&url) {
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
