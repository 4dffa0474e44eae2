//! Changes of endpoints and policies without a pause, and when they reached members: for the tests of failovers, and for their benchmark.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::members::{Member, Numbers};
use super::{World, when};
use crate::support::{Admin, SOON, apply};

/// Changes endpoints of all clusters, and a policy.
pub struct Churn {
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    /// The changes of the policy that a replica confirmed.
    policies: Arc<std::sync::Mutex<Vec<(u64, Instant)>>>,
}

/// Numbers of all changes: later ones are greater.
static NEXT: AtomicU64 = AtomicU64::new(2);

pub fn policy(order: u64) -> Vec<u8> {
    serde_json::json!({
        "apiVersion": "hanse.dev/v1alpha1", "kind": "FederatedNetworkPolicy", "metadata": {"name": "p"},
        "spec": {
            "tier": "platform", "order": order, "clusterSelector": "all()", "selector": "has(seq)", "types": ["Ingress"],
            "ingress": [{"action": "Deny", "source": {"selector": "has(other)"}}]
        }
    })
    .to_string()
    .into_bytes()
}

impl Churn {
    pub fn start(members: &[Arc<Member>], admins: BTreeMap<usize, Admin>) -> Self {
        let stop = CancellationToken::new();
        let policies = Arc::<std::sync::Mutex<Vec<(u64, Instant)>>>::default();
        let mut tasks = Vec::new();
        for member in members {
            let (member, stop) = (member.clone(), stop.clone());
            tasks.push(tokio::spawn(async move {
                while !stop.is_cancelled() {
                    member.change(NEXT.fetch_add(1, Ordering::SeqCst));
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }));
        }
        // One writer at each replica: what one refuses because it stops, another makes.
        for mut admin in admins.into_values() {
            let (stop, policies) = (stop.clone(), policies.clone());
            tasks.push(tokio::spawn(async move {
                while !stop.is_cancelled() {
                    let (order, began) = (NEXT.fetch_add(1, Ordering::SeqCst), Instant::now());
                    let applied = tokio::time::timeout(Duration::from_secs(5), admin.apply(apply(policy(order)))).await;
                    if matches!(applied, Ok(Ok(_))) {
                        policies.lock().unwrap().push((order, began));
                    }
                    tokio::time::sleep(Duration::from_millis(150)).await;
                }
            }));
        }
        Self { stop, tasks, policies }
    }

    pub async fn end(self) -> Vec<(u64, Instant)> {
        self.stop.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
        std::mem::take(&mut *self.policies.lock().unwrap())
    }
}

/// The longest time from a change until another cluster had it, or a newer one of the same object, of the changes since `since`.
pub fn longest(members: &[Arc<Member>], since: Instant) -> (usize, Duration) {
    let mut made = Numbers::new();
    for member in members {
        made.extend(member.made.lock().unwrap().clone());
    }
    let (mut count, mut worst) = (0, Duration::ZERO);
    for member in members {
        let seen = member.seen.lock().unwrap();
        for (subject, changes) in made.iter().filter(|(subject, _)| subject.0 != member.name) {
            let times = seen.times.get(subject).cloned().unwrap_or_default();
            for (value, at) in changes.iter().filter(|(_, at)| *at >= since) {
                let arrived = times.iter().find(|(seen, when)| seen >= value && when >= at);
                let arrived = arrived.unwrap_or_else(|| panic!("{} never had {value} of {subject:?}", member.name));
                (count, worst) = (count + 1, worst.max(arrived.1 - *at));
            }
        }
    }
    (count, worst)
}

/// The same for the policy. Replicas write it in turn, so that its order is not that of the numbers: a change arrived when any
/// state of after it was received.
pub fn longest_of_policies(members: &[Arc<Member>], confirmed: &[(u64, Instant)]) -> Duration {
    let arrivals = members.iter().map(|member| {
        let seen = member.seen.lock().unwrap();
        let times = seen.times.get(&(String::new(), "p".to_owned())).cloned().unwrap_or_default();
        let arrived = |(value, began): &(u64, Instant)| {
            let same =
                times.iter().find(|(seen, _)| seen == value).or_else(|| times.iter().find(|(_, at)| at >= began));
            same.unwrap_or_else(|| panic!("{} never had policy {value}", member.name)).1.duration_since(*began)
        };
        confirmed.iter().map(arrived).max().unwrap_or_default()
    });
    arrivals.max().unwrap_or_default()
}

pub async fn converge(world: &World, members: &[Arc<Member>]) -> Duration {
    let all = || members.iter().all(|one| members.iter().all(|other| one.name == other.name || one.has(other)));
    when("all clusters have all endpoints", world, SOON, all).await
}
