//! How soon changes reach a member again when replicas of the hub, or nodes of its etcd, fail.
//!
//! `failover [replica] [leader] [majority] [ROUNDS] [-o json]`: all shapes, with five rounds of each, if none is named. Three replicas of the
//! hub as processes on three nodes of etcd, with leases of 5 s, and three members in this process, each with a pod that changes every 20 ms.
//! Three users change a policy, each at its replica and every 150 ms. All share the processors of the machine.
//!
//! - `replica`: the replica that a member watches is killed, and started again after the round.
//! - `leader`: the node that leads etcd is killed, and started again after the round.
//! - `majority`: two nodes of etcd are killed, and started again after one lease. While they are away no policy can change.
//!
//! `endpoint` and `policy` are the times from the failure until the first later change has reached the member; for a policy of `majority`,
//! from the start of the nodes. `longest endpoint` and `longest policy` are the longest times of any change in a round.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

#[path = "../../store/tests/it/etcd/nodes.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod etcd_nodes;
#[path = "../tests/it/process.rs"]
#[expect(dead_code, unused_imports, reason = "the tests in it use more")]
mod process;
#[path = "../tests/it/replicas.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod replicas;
#[path = "../tests/it/support.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod support;

use etcd_nodes::{Nodes, SOON};
use replicas::churn::{Churn, converge, longest, longest_of_policies};
use replicas::members::Member;
use replicas::{LEASE, World, when};

const SHAPES: [&str; 3] = ["replica", "leader", "majority"];
const ROUNDS: usize = 5;
/// How long things change before and after a failure.
const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_secs(3);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    let json = arguments.windows(2).any(|pair| pair == ["-o", "json"]);
    let rounds = arguments.iter().find_map(|it| it.parse().ok()).unwrap_or(ROUNDS);
    let named: Vec<&str> = SHAPES.into_iter().filter(|shape| arguments.iter().any(|it| it == shape)).collect();
    let shapes = if named.is_empty() { SHAPES.to_vec() } else { named };
    hanse_identity::tls::install_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut federation = Federation::start().await;
        for shape in shapes {
            let mut times = BTreeMap::<&str, Vec<Duration>>::new();
            for _ in 0..rounds {
                for (metric, time) in federation.round(shape).await {
                    times.entry(metric).or_default().push(time);
                }
            }
            times.into_iter().for_each(|(metric, times)| print(json, shape, metric, times));
        }
    });
}

fn print(json: bool, shape: &str, metric: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let Some(last) = times.len().checked_sub(1) else { return };
    // The nearest rank: p99 of 100 is the 99th.
    let rank = |percent: usize| times[(times.len() * percent).div_ceil(100).saturating_sub(1).min(last)];
    for (what, time) in [("p50", rank(50)), ("p99", rank(99)), ("max", times[last])] {
        let (value, rounds) = (time.as_secs_f64() * 1e3, times.len());
        if json {
            println!(
                r#"{{"bench":"failover","shape":"{shape}","metric":"{metric} {what} of {rounds}","value":{value},"unit":"ms"}}"#
            );
        } else {
            println!("{shape:<10} {:<34} {value:>12.1} ms", format!("{metric}, {what} of {rounds}"));
        }
    }
}

struct Federation {
    etcd: Nodes,
    world: World,
    members: Vec<Arc<Member>>,
}

impl Federation {
    async fn start() -> Self {
        let etcd = Nodes::start().await;
        let url = etcd.url_with("timeout=3");
        let world = World::start(&[url.clone(), url.clone(), url]).await;
        let mut members = Vec::new();
        for (number, name) in (1..).zip(["a", "b", "c"]) {
            members.push(Arc::new(world.member(name, number, 0).await));
        }
        for member in &members {
            when("the list of hubs", &world, SOON, || member.hubs.all().len() == 3).await;
        }
        world.settle().await;
        Self { etcd, world, members }
    }

    /// One failure, from a federation in which nothing fails to the next.
    async fn round(&mut self, shape: &str) -> Vec<(&'static str, Duration)> {
        let churn = Churn::start(&self.members, self.world.admins().await);
        tokio::time::sleep(BEFORE).await;
        // Since when endpoints, and policies, are expected.
        let (failed, restored, policies) = match shape {
            "replica" => self.replica(churn).await,
            "leader" => self.leader(churn).await,
            _ => self.majority(churn).await,
        };
        converge(&self.world, &self.members).await;
        self.world.settle().await;
        let member = &self.members[0];
        let since: Vec<_> = policies.iter().filter(|(_, began)| *began >= failed).copied().collect();
        vec![
            ("endpoint", first(member, &self.members, failed)),
            ("longest endpoint", longest(&self.members, failed).1),
            ("policy", first_of_policies(member, &policies, restored)),
            ("longest policy", longest_of_policies(&self.members, &since)),
        ]
    }

    async fn replica(&mut self, churn: Churn) -> (Instant, Instant, Vec<(u64, Instant)>) {
        let watched = self.world.number_of(&self.members[0].watched().expect("it watches one"));
        let failed = Instant::now();
        self.world.kill(watched);
        tokio::time::sleep(AFTER).await;
        let policies = churn.end().await;
        self.world.run(watched);
        let members = &self.members;
        when("all replicas are known", &self.world, SOON, || members.iter().all(|it| it.hubs.all().len() == 3)).await;
        (failed, failed, policies)
    }

    async fn leader(&mut self, churn: Churn) -> (Instant, Instant, Vec<(u64, Instant)>) {
        let leader = self.etcd.leader().await;
        let failed = Instant::now();
        self.etcd.kill(leader);
        tokio::time::sleep(AFTER * 2).await;
        let policies = churn.end().await;
        self.etcd.run(leader);
        self.etcd.healthy(leader).await;
        (failed, failed, policies)
    }

    async fn majority(&mut self, churn: Churn) -> (Instant, Instant, Vec<(u64, Instant)>) {
        let leader = self.etcd.leader().await;
        let other = (leader + 1) % 3;
        let failed = Instant::now();
        self.etcd.kill(leader);
        self.etcd.kill(other);
        tokio::time::sleep(LEASE).await;
        let restored = Instant::now();
        self.etcd.run(leader);
        self.etcd.run(other);
        self.etcd.healthy(leader).await;
        self.etcd.healthy(other).await;
        for number in self.world.running() {
            self.world.until(number, "the store answers again", |it| it.store_unavailable_ms.is_none()).await;
        }
        tokio::time::sleep(AFTER).await;
        (failed, restored, churn.end().await)
    }
}

/// The time from `since` until a member had a change of another cluster that was made after it.
fn first(member: &Member, members: &[Arc<Member>], since: Instant) -> Duration {
    let seen = member.seen.lock().unwrap();
    let mut arrivals = Vec::new();
    for other in members.iter().filter(|it| it.name != member.name) {
        for (subject, changes) in other.made.lock().unwrap().iter() {
            let times = seen.times.get(subject).map_or(&[][..], Vec::as_slice);
            let made = changes.iter().filter(|(_, at)| *at >= since);
            let arrived = made.filter_map(|(value, at)| times.iter().find(|(seen, when)| seen >= value && when >= at));
            arrivals.extend(arrived.map(|(_, when)| *when));
        }
    }
    arrivals.into_iter().min().expect("a change arrived").duration_since(since)
}

/// The same for the policy.
fn first_of_policies(member: &Member, confirmed: &[(u64, Instant)], since: Instant) -> Duration {
    let seen = member.seen.lock().unwrap();
    let times = seen.times.get(&(String::new(), "p".to_owned())).map_or(&[][..], Vec::as_slice);
    let made = confirmed.iter().filter(|(_, began)| *began >= since);
    let arrived = made.filter_map(|(value, began)| times.iter().find(|(seen, when)| seen == value && when >= began));
    arrived.map(|(_, when)| *when).min().expect("a change arrived").duration_since(since)
}
