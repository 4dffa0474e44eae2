//! How often the operator writes, with 250 clusters: what it does at rest, and while the state of every cluster changes all the time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use hanse_e2e::kubernetes::{run, until};
use hanse_hub::administration::Administration;
use hanse_hub::authority::{Authority, Lifetimes};
use hanse_hub::management::Monitor;
use hanse_hub::manifest::ObjectId;
use hanse_hub::operator::Operator;
use hanse_hub::registry::records::{self, MemberRecord, MemberState};
use hanse_hub::registry::{Clock, Registry};
use hanse_hub::status::{NodeProgress, ObjectState, ObjectStatus, Realisation, Realisations};
use hanse_identity::TrustDomain;
use hanse_identity::tls::Connections;
use hanse_runtime::shutdown::Shutdown;
use hanse_store::{Key, StoreUrl, Transaction};
use serde_json::Value;

use super::{DENY, PATIENCE, TIER, World, policy};

const CLUSTERS: u64 = 250;
/// The writes that the operator saves for an object, beyond one a minute.
const BURST: usize = 5;

/// The time over which writes are counted, at rest and then while everything changes: `HANSE_WRITES_SECONDS`. Counts are written once a
/// minute, so that longer times show the rate.
fn window() -> Duration {
    let seconds = std::env::var("HANSE_WRITES_SECONDS").ok().map(|it| it.parse().expect("seconds"));
    Duration::from_secs(seconds.unwrap_or(15))
}

/// 250 clusters of three nodes, which report anew in each moment where `churns`.
#[derive(Default)]
struct Fleet {
    churns: AtomicBool,
    reports: AtomicU64,
}

impl Fleet {
    fn report(&self) -> u64 {
        if self.churns.load(Ordering::Relaxed) { self.reports.fetch_add(1, Ordering::Relaxed) } else { 0 }
    }
}

fn name(index: u64) -> Arc<str> {
    format!("c{index:03}").into()
}

/// In this process: 250 clusters with their agents do not fit on the machine. Hub, store, operator and API server are real.
struct Reported(Arc<Fleet>);

impl Realisations for Reported {
    fn clusters(&self) -> BTreeMap<Arc<str>, Realisation> {
        let report = self.0.report();
        let of = |index| {
            let realisation = Realisation {
                connected: true,
                revision: report,
                endpoints: 1_000 + report % 7,
                digests_equal: Some(report.is_multiple_of(2)),
                enforced_revision: report,
                received_revision: u64::MAX,
                agents: 3,
                agents_current: u32::try_from(report % 4).unwrap_or_default().min(3),
                ..Realisation::default()
            };
            (name(index), realisation)
        };
        (0..CLUSTERS).map(of).collect()
    }

    fn nodes(&self, _: &str) -> Vec<NodeProgress> {
        Vec::new()
    }

    fn object(&self, _: &ObjectId, _: u64) -> Option<BTreeMap<Arc<str>, ObjectStatus>> {
        let nodes_enforcing = u32::try_from(self.0.report() % 4).unwrap_or_default().min(3);
        let status = ObjectStatus { state: ObjectState::Enforced, nodes_enforcing, nodes: 3 };
        Some((0..CLUSTERS).map(|index| (name(index), status.clone())).collect())
    }
}

/// The writes by object, except those of the Lease.
fn by_object(writes: &[String]) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    for write in writes {
        let object = write.split(['?', ' ']).nth(1).unwrap_or_default().trim_end_matches("/status");
        *count.entry(object.to_owned()).or_default() += 1;
    }
    count
}

#[test]
fn writes_are_few_with_250_clusters_that_change_and_none_at_rest() {
    run(async {
        let world = World::prepare().await;
        let kubeconfig: Value = serde_json::from_slice(&std::fs::read(&world.kubeconfig).expect("read")).expect("JSON");
        let client = hanse_e2e::kubernetes::kubeconfig::client(&kubeconfig).await.expect("a client");
        let shutdown = Shutdown::default();
        let trust_domain = TrustDomain::new("hanse.local").expect("a trust domain");
        let data = world.folder.path().join("other");
        std::fs::create_dir(&data).expect("a folder");
        Authority::create(&data, &trust_domain, SystemTime::now()).expect("an authority");
        let authority = Authority::read(&data, Lifetimes::default()).expect("an authority");
        let store = hanse_store::create(&StoreUrl::file(data.join("hub.redb"))).await.expect("a store");
        for index in 0..CLUSTERS {
            let record = MemberRecord {
                key: String::new(),
                previous_key: None,
                state: MemberState::Accepted,
                certificate_expires_at: 2_000_000_000,
                federated_allow_final: false,
                token: String::new(),
            };
            let key = |part: &str| Key::new(&[part, &*name(index)]).expect("a key");
            // A lease that does not end.
            let joined = Transaction::default().put(key("member"), records::encode(&record)).put(key("lease"), "30");
            store.commit(joined).await.expect("it is written");
        }
        let lease = Duration::from_secs(30);
        let registry = Registry::open(store, lease, Clock::default(), &shutdown).await.expect("it is opened");
        let fleet = Arc::new(Fleet::default());
        let realisations: Arc<dyn Realisations> = Arc::new(Reported(Arc::clone(&fleet)));
        let administration =
            Administration::new(registry.clone(), authority, Connections::default(), Arc::clone(&realisations));
        let monitor = Monitor::new("hub");
        let operator = Operator::new(client, administration, registry, realisations, monitor);
        let task = tokio::spawn(operator.run(shutdown.token()));

        let mut manifests: Vec<String> = Vec::new();
        manifests.extend((0..10).map(|index| policy(&format!("p{index}"), DENY)));
        manifests.extend((0..CLUSTERS).map(|index| {
            let name = name(index);
            format!("apiVersion: hanse.dev/v1alpha1\nkind: MemberCluster\nmetadata: {{name: {name}}}\nspec: {{}}\n")
        }));
        // Last, so that its status counts all policies at once.
        manifests.push(TIER.to_owned());
        world.apply(&manifests.join("---\n"));
        let objects = manifests.len();
        let is_written = || by_object(&world.writes()).len() >= objects;
        assert!(until(PATIENCE, async || is_written()).await.is_some(), "{}", by_object(&world.writes()).len());
        for (object, kind) in [("fnp/p9", "Enforced"), ("mc/c249", "Connected")] {
            let is = || world.condition(object, kind)[0] == "True";
            assert!(until(PATIENCE, async || is()).await.is_some(), "{}", world.status(object));
        }
        // All has been said: three passes write nothing.
        let mut last = usize::MAX;
        let is_settled = until(PATIENCE * 2, async || {
            tokio::time::sleep(Duration::from_secs(3)).await;
            std::mem::replace(&mut last, world.writes().len()) == last
        });
        assert!(is_settled.await.is_some());

        let before = world.writes().len();
        tokio::time::sleep(window()).await;
        assert_eq!(world.writes().split_off(before), Vec::<String>::new(), "at rest, nothing is written");

        // Each pass finds other counts, revisions, digests and nodes that lag.
        fleet.churns.store(true, Ordering::Relaxed);
        let (before, start) = (world.writes().len(), Instant::now());
        tokio::time::sleep(window()).await;
        let writes = by_object(&world.writes()[before..]);
        let minutes = start.elapsed().as_secs_f64() / 60.0;
        let (total, most) = (writes.values().sum::<usize>(), writes.values().copied().max().unwrap_or_default());
        println!(
            "{objects} objects, {} reports: {total} writes in {minutes:.2} min, {:.2} an object, at most {most}",
            fleet.reports.load(Ordering::Relaxed),
            total as f64 / objects as f64,
        );
        assert!(writes.len() > objects / 2, "the status follows: {}", writes.len());
        assert!(most as f64 <= BURST as f64 + minutes.ceil(), "{writes:#?}");
        shutdown.drain(Duration::from_secs(5)).await;
        task.await.expect("it ends");
    });
}
