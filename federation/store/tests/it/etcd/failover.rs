//! Nodes that are killed or hang, in the middle of writes, watches and leases.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hanse_store::{Compare, Event, Outcome, Revision, Store, StoreError, Transaction, create, open};

use super::nodes::{Nodes, SOON};
use super::{key, next, prefix, put};

/// Marks the value of a transaction that does not change the counter.
const FREE: &str = "free";

/// What a writer has been promised: the key and value of each revision.
type Written = BTreeMap<Revision, (String, String)>;

/// Writes keys of its own. Two of three transactions also add one to a counter that all writers share, on the condition that it
/// is unchanged; the third has no condition, and would be applied twice if it were sent twice.
async fn write(store: Arc<dyn Store>, writer: usize, made: Arc<AtomicU64>, stop: Arc<AtomicBool>) -> Written {
    let counter = key(&["counter"]);
    let mut written = Written::new();
    let mut number = 0;
    while !stop.load(Ordering::SeqCst) {
        let name = format!("{writer}-{}", number % 10);
        if number % 3 == 2 {
            let value = format!("{writer}/{number} {FREE}");
            let free = Transaction::default().put(key(&["w", &name]), value.clone());
            let Outcome::Committed(revision) = store.commit(free).await.unwrap() else { panic!("no condition") };
            assert!(written.insert(revision, (name, value)).is_none());
            number += 1;
            made.fetch_add(1, Ordering::SeqCst);
            continue;
        }
        let current = store.read(&counter).await.unwrap();
        let count: u64 = current.as_ref().map_or(0, |it| String::from_utf8_lossy(&it.value).parse().unwrap());
        let compare = match &current {
            Some(it) => Compare::Modified(counter.clone(), it.modified),
            None => Compare::Absent(counter.clone()),
        };
        let value = format!("{writer}/{number}");
        let transaction = Transaction::default()
            .when(compare)
            .put(counter.clone(), (count + 1).to_string())
            .put(key(&["w", &name]), value.clone());
        // The election of a leader takes less than the timeout: every transaction has a result.
        if let Outcome::Committed(revision) = store.commit(transaction).await.unwrap() {
            assert!(written.insert(revision, (name, value)).is_none());
            number += 1;
            made.fetch_add(1, Ordering::SeqCst);
        }
    }
    written
}

/// Reads until the marker, without a conclusion of its own.
async fn read(mut watch: hanse_store::Watch) -> Vec<Event> {
    let mut events = Vec::new();
    while events.last().is_none_or(|it: &Event| it.key.name() != "marker") {
        events.extend(next(&mut watch).await.unwrap());
    }
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_change_is_dropped_or_repeated_when_leaders_are_killed() {
    let mut nodes = Nodes::start().await;
    let url = nodes.url();
    let store = create(&url).await.unwrap();
    let start = store.revision().await.unwrap();
    let (made, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (mut writers, mut readers) = (Vec::new(), Vec::new());
    for writer in 0..3 {
        let store = open(&url).await.unwrap();
        readers.push(tokio::spawn(read(store.watch(prefix(&[]), start).await.unwrap())));
        writers.push(tokio::spawn(write(store, writer, made.clone(), stop.clone())));
    }
    let more = async |count: u64| {
        let (target, deadline) = (made.load(Ordering::SeqCst) + count, Instant::now() + SOON);
        while made.load(Ordering::SeqCst) < target {
            assert!(Instant::now() < deadline, "writes do not go on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    more(50).await;
    for _ in 0..3 {
        let leader = nodes.leader().await;
        let killed = Instant::now();
        nodes.kill(leader);
        more(1).await;
        println!("leader n{leader} killed: first commit after {} ms", killed.elapsed().as_millis());
        more(30).await;
        nodes.run(leader);
        nodes.healthy(leader).await;
        more(10).await;
    }
    // One that hangs keeps its connections open.
    let leader = nodes.leader().await;
    let stopped = Instant::now();
    nodes.signal(leader, "-STOP");
    more(1).await;
    println!("leader n{leader} stopped: first commit after {} ms", stopped.elapsed().as_millis());
    more(30).await;
    nodes.signal(leader, "-CONT");
    more(10).await;
    stop.store(true, Ordering::SeqCst);
    let mut written = Written::new();
    for writer in writers {
        for (revision, change) in writer.await.unwrap() {
            assert!(written.insert(revision, change).is_none(), "one revision, one transaction");
        }
    }
    let marker = put(&*store, "marker", "").await;
    let counted = written.values().filter(|it| !it.1.ends_with(FREE)).count();
    let count = store.read(&key(&["counter"])).await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&count.value), counted.to_string(), "each applied once");
    for reader in readers {
        let events = tokio::time::timeout(SOON, reader).await.expect("the marker comes").unwrap();
        assert_eq!(events.last().unwrap().revision, marker);
        assert!(events.is_sorted_by_key(|it| it.revision));
        let of = |events: &[Event], first: &str| -> Written {
            let events = events.iter().filter(|it| it.key.segments().next() == Some(first));
            let value = |it: &Event| String::from_utf8_lossy(&it.entry.as_ref().unwrap().value).into_owned();
            events.map(|it| (it.revision, (it.key.name().to_owned(), value(it)))).collect()
        };
        assert_eq!(events.len(), written.len() + counted + 1, "each change once");
        assert_eq!(of(&events, "w"), written);
        let counts: Vec<_> = of(&events, "counter").into_values().map(|it| it.1.parse::<usize>().unwrap()).collect();
        assert_eq!(counts, (1..=counted).collect::<Vec<_>>());
    }
    println!("{} transactions", written.len());
}

#[tokio::test]
async fn without_a_majority_operations_end_and_watches_resume_afterwards() {
    let mut nodes = Nodes::start().await;
    let store = create(&nodes.url_with("timeout=3")).await.unwrap();
    let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    let first = put(&*store, "a", "1").await;
    let mut watch = store.watch(prefix(&[]), first).await.unwrap();
    nodes.kill(0);
    nodes.kill(1);
    let began = Instant::now();
    let put_again = Transaction::default().put(key(&["k", "lost"]), "");
    let (one, two) = (key(&["k", "a"]), prefix(&[]));
    let (commit, read, list, revision, grant, end, watching) = tokio::join!(
        store.commit(put_again),
        store.read(&one),
        store.list(&two),
        store.revision(),
        store.grant_lease(Duration::from_secs(60)),
        store.end_lease(lease),
        store.watch(prefix(&[]), first),
    );
    let took = began.elapsed();
    let errors = [commit.err(), read.err(), list.err(), revision.err(), grant.err(), end.err(), watching.err()];
    for (index, error) in errors.iter().enumerate() {
        let error = error.as_ref().unwrap_or_else(|| panic!("operation {index} succeeded without a majority"));
        let text = error.to_string();
        assert!(matches!(error, StoreError::Unavailable(_)) && text.contains("is unavailable"), "{index}: {text}");
    }
    assert!(errors[0].as_ref().unwrap().to_string().contains("a majority of etcd's nodes"));
    assert!(took < Duration::from_secs(8), "{took:?}");
    let waiting = tokio::time::timeout(Duration::from_millis(500), watch.next()).await;
    assert!(waiting.is_err(), "a watch waits: {waiting:?}");
    nodes.run(0);
    nodes.run(1);
    nodes.healthy(0).await;
    let last = loop {
        // The first may still find no leader.
        let again = Transaction::default().put(key(&["k", "b"]), "2");
        match store.commit(again).await {
            Ok(Outcome::Committed(revision)) => break revision,
            Err(StoreError::Unavailable(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    let mut seen = Vec::new();
    while seen.last().is_none_or(|it: &Event| it.revision < last) {
        seen.extend(next(&mut watch).await.unwrap());
    }
    // The transaction that failed may have been applied, but not after the next one.
    seen.retain(|it| it.key.name() != "lost");
    assert_eq!(seen.iter().map(|it| it.revision).collect::<Vec<_>>(), [last]);
}

#[tokio::test]
async fn a_lease_survives_a_change_of_leader_and_then_ends_in_time() {
    let mut nodes = Nodes::start().await;
    let store = create(&nodes.url()).await.unwrap();
    let time_to_live = Duration::from_secs(4);
    let lease = store.grant_lease(time_to_live).await.unwrap();
    let leased = Transaction::default().put_with_lease(key(&["l"]), "", lease);
    let Outcome::Committed(at) = store.commit(leased).await.unwrap() else { panic!("no condition") };
    let mut watch = store.watch(prefix(&["l"]), at).await.unwrap();
    let leader = nodes.leader().await;
    nodes.kill(leader);
    // Renewed for twice its time to live, through the election.
    let until = Instant::now() + time_to_live * 2;
    let mut renewed = Instant::now();
    while Instant::now() < until {
        store.renew_lease(lease).await.unwrap();
        renewed = Instant::now();
        let ended = tokio::time::timeout(Duration::from_millis(200), watch.next()).await;
        assert!(ended.is_err(), "it is renewed: {ended:?}");
    }
    let ended = next(&mut watch).await.unwrap();
    let after = renewed.elapsed();
    println!("a lease of 4 s ended {} ms after its last renewal", after.as_millis());
    assert!(ended[0].entry.is_none() && after >= time_to_live, "{after:?}");
    assert!(matches!(store.renew_lease(lease).await, Err(StoreError::NoLease(_))));
    nodes.run(leader);
}
