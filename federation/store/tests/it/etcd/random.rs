//! The same random operations on the embedded store and on etcd have the same results.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hanse_store::{
    Compare, Entry, Event, Key, LeaseId, Outcome, Revision, Store, StoreError, Transaction, create, in_memory,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::nodes::shared;
use super::{key, next, prefix};

/// Both stores, and which revisions and leases correspond.
struct Pair {
    embedded: Arc<dyn Store>,
    etcd: Arc<dyn Store>,
    /// The revision of etcd, by that of the embedded store.
    revisions: BTreeMap<Revision, Revision>,
    leases: Vec<(LeaseId, LeaseId)>,
}

type Seen = (Key, Option<(Vec<u8>, Revision, Revision, Option<LeaseId>)>);

impl Pair {
    /// An entry with the numbers of etcd.
    fn mapped(&self, entry: &Entry) -> (Vec<u8>, Revision, Revision, Option<LeaseId>) {
        let lease = entry.lease.map(|lease| self.leases.iter().find(|it| it.0 == lease).unwrap().1);
        (entry.value.to_vec(), self.revisions[&entry.created], self.revisions[&entry.modified], lease)
    }

    fn events(&self, events: &[Event]) -> Vec<(Revision, Seen)> {
        let seen =
            |it: &Event| (self.revisions[&it.revision], (it.key.clone(), it.entry.as_ref().map(|it| self.mapped(it))));
        events.iter().map(seen).collect()
    }

    async fn compare(&self, below: &[&str]) {
        let (one, two) =
            (self.embedded.list(&prefix(below)).await.unwrap(), self.etcd.list(&prefix(below)).await.unwrap());
        let keys = |entries: &[Entry]| entries.iter().map(|it| it.key.clone()).collect::<Vec<_>>();
        assert_eq!(keys(&one.entries), keys(&two.entries));
        for (one, two) in one.entries.iter().zip(&two.entries) {
            assert_eq!(self.mapped(one), plain(two), "{}", one.key);
        }
    }
}

fn plain(entry: &Entry) -> (Vec<u8>, Revision, Revision, Option<LeaseId>) {
    (entry.value.to_vec(), entry.created, entry.modified, entry.lease)
}

/// The two results of one transaction.
#[derive(Debug, PartialEq)]
enum Result {
    Committed,
    Conflict,
    NoLease(usize),
    Limit,
}

fn result(outcome: &std::result::Result<Outcome, StoreError>, lease: impl Fn(LeaseId) -> usize) -> Result {
    match outcome {
        Ok(Outcome::Committed(_)) => Result::Committed,
        Ok(Outcome::Conflict) => Result::Conflict,
        Err(StoreError::NoLease(it)) => Result::NoLease(lease(*it)),
        Err(StoreError::Limit(_)) => Result::Limit,
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn etcd_and_the_embedded_store_agree() {
    let seed = std::env::var("HANSE_SEED").ok().and_then(|it| it.parse().ok()).unwrap_or_else(|| rand::rng().random());
    println!("HANSE_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (embedded, etcd) = (in_memory(), create(&shared().await.url()).await.unwrap());
    let start = etcd.revision().await.unwrap();
    let mut pair = Pair { embedded, etcd, revisions: BTreeMap::from([(0, start)]), leases: Vec::new() };
    let keys: Vec<Key> =
        ["a", "b", "c"].iter().flat_map(|one| ["x", "y", "z", "zz"].map(|two| key(&[one, two]))).collect();
    let mut counts = [0_usize; 4];
    for step in 0..600 {
        match random.random_range(0..100) {
            0..5 if pair.leases.len() < 20 => {
                let time_to_live = Duration::from_secs(random.random_range(600..10_000));
                let one = pair.embedded.grant_lease(time_to_live).await.unwrap();
                let two = pair.etcd.grant_lease(time_to_live).await.unwrap();
                let (a, b) =
                    (pair.embedded.time_to_live(one).await.unwrap(), pair.etcd.time_to_live(two).await.unwrap());
                assert_eq!(a, b);
                pair.leases.push((one, two));
            }
            5..8 if !pair.leases.is_empty() => {
                let (one, two) = *pair.leases.choose(&mut random).unwrap();
                let before = pair.embedded.revision().await.unwrap();
                let (a, b) = (pair.embedded.end_lease(one).await, pair.etcd.end_lease(two).await);
                assert_eq!(a.is_ok(), b.is_ok(), "step {step}: {a:?} {b:?}");
                let after = pair.embedded.revision().await.unwrap();
                if after > before {
                    let now = pair.etcd.revision().await.unwrap();
                    // Other tests write to the same etcd: the change itself has the revision.
                    let mut watch =
                        pair.etcd.watch(prefix(&[]), *pair.revisions.last_key_value().unwrap().1).await.unwrap();
                    let events = next(&mut watch).await.unwrap();
                    assert!(events[0].revision <= now && events.iter().all(|it| it.revision == events[0].revision));
                    pair.revisions.insert(after, events[0].revision);
                }
            }
            8..12 if !pair.leases.is_empty() => {
                let (one, two) = *pair.leases.choose(&mut random).unwrap();
                let (a, b) = (pair.embedded.renew_lease(one).await, pair.etcd.renew_lease(two).await);
                assert_eq!(a.is_ok(), b.is_ok(), "step {step}: {a:?} {b:?}");
            }
            12..20 => pair.compare([&[][..], &["a"], &["b"], &["a", "z"]].choose(&mut random).unwrap()).await,
            20..30 => {
                let key = keys.choose(&mut random).unwrap();
                let (one, two) = (pair.embedded.read(key).await.unwrap(), pair.etcd.read(key).await.unwrap());
                assert_eq!(one.map(|it| pair.mapped(&it)), two.map(|it| plain(&it)), "step {step}: {key}");
            }
            _ => {
                let (mut one, mut two) = (Transaction::default(), Transaction::default());
                for _ in 0..random.random_range(0..3) {
                    let key = keys.choose(&mut random).unwrap().clone();
                    let (a, b) = match random.random_range(0..4) {
                        0 => (Compare::Absent(key.clone()), Compare::Absent(key)),
                        1 => (Compare::Present(key.clone()), Compare::Present(key)),
                        _ => {
                            let known: Vec<_> = pair.revisions.iter().collect();
                            let current = pair.embedded.read(&key).await.unwrap().map(|it| it.modified);
                            let at = current.filter(|_| random.random_bool(0.7));
                            let (one, two) = match at {
                                Some(at) => (at, pair.revisions[&at]),
                                None => known.choose(&mut random).map(|it| (*it.0, *it.1)).unwrap(),
                            };
                            (Compare::Modified(key.clone(), one), Compare::Modified(key, two))
                        }
                    };
                    (one, two) = (one.when(a), two.when(b));
                }
                for _ in 0..random.random_range(0..5) {
                    let key = keys.choose(&mut random).unwrap().clone();
                    let value = vec![random.random::<u8>(); random.random_range(0..200)];
                    (one, two) = match (random.random_range(0..10), pair.leases.choose(&mut random)) {
                        (0..3, _) => (one.delete(key.clone()), two.delete(key)),
                        (3..5, Some((a, b))) => {
                            (one.put_with_lease(key.clone(), value.clone(), *a), two.put_with_lease(key, value, *b))
                        }
                        _ => (one.put(key.clone(), value.clone()), two.put(key, value)),
                    };
                }
                let before = pair.embedded.revision().await.unwrap();
                let (a, b) = (pair.embedded.commit(one.clone()).await, pair.etcd.commit(two).await);
                let position = |lease, second: bool| {
                    pair.leases.iter().position(|it| if second { it.1 == lease } else { it.0 == lease }).unwrap()
                };
                let (first, second) = (result(&a, |it| position(it, false)), result(&b, |it| position(it, true)));
                assert_eq!(first, second, "step {step}: {one:?}");
                counts[match first {
                    Result::Committed => 0,
                    Result::Conflict => 1,
                    Result::NoLease(_) => 2,
                    Result::Limit => 3,
                }] += 1;
                if let (Ok(Outcome::Committed(one)), Ok(Outcome::Committed(two))) = (a, b)
                    && one > before
                {
                    assert!(two > *pair.revisions.last_key_value().unwrap().1);
                    pair.revisions.insert(one, two);
                }
            }
        }
    }
    assert!(counts.iter().all(|it| *it > 3), "each kind of result: {counts:?}");
    pair.compare(&[]).await;
    // Watches from any revision see the same.
    let known: Vec<_> = pair.revisions.iter().map(|(one, two)| (*one, *two)).collect();
    let (last, _) = *known.last().unwrap();
    for below in [&[][..], &["a"], &["c", "zz"]] {
        for _ in 0..5 {
            let (one, two) = *known.choose(&mut random).unwrap();
            let (mut watch, mut other) = (
                pair.embedded.watch(prefix(below), one).await.unwrap(),
                pair.etcd.watch(prefix(below), two).await.unwrap(),
            );
            let mut expected = Vec::new();
            while watch.revision() < last {
                match tokio::time::timeout(Duration::ZERO, watch.next()).await {
                    Ok(events) => expected.extend(pair.events(&events.unwrap())),
                    Err(_) => break,
                }
            }
            let mut seen = Vec::new();
            while seen.len() < expected.len() {
                seen.extend(next(&mut other).await.unwrap());
            }
            let seen: Vec<(Revision, Seen)> =
                seen.iter().map(|it| (it.revision, (it.key.clone(), it.entry.as_ref().map(plain)))).collect();
            assert_eq!(expected, seen, "from {one}");
        }
    }
    println!("committed, conflicts, ended leases, refused: {counts:?}");
}
