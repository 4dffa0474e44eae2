//! Replicas of the hub and nodes of etcd fail while everything changes: no member misses a change, and nothing becomes unknown.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hanse_exchange::hubs::weight;
use hanse_proto::federation::v1 as wire;
use tokio::time::Instant;

use crate::etcd_nodes::{self as nodes, SOON};
use crate::etcd_proxy::Proxy;
use crate::replicas::churn::{Churn, converge, longest, longest_of_policies, policy};
use crate::replicas::members::Member;
use crate::replicas::{LEASE, World, when};
use crate::support::{Admin, apply};

/// How long each phase changes things.
const PHASE: Duration = Duration::from_secs(4);

/// Each phase changes endpoints and policies all the time, and prints the longest time until a change arrived.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_member_misses_a_change_when_replicas_and_nodes_of_etcd_fail() {
    let mut etcd = nodes::Nodes::start().await;
    let url = etcd.url_with("timeout=3");
    let mut world = World::start(&[url.clone(), url.clone(), url]).await;
    let mut members = Vec::new();
    // The first one prefers the replica that it is configured with, so that it watches that one from the start.
    let rank =
        |name: &String| (1..3).filter(|it| weight(name, world.address(*it)) > weight(name, world.address(0))).count();
    let first = (0..).map(|number| format!("m-{number}")).find(|name| rank(name) == 0).unwrap();
    for (number, name) in [first.as_str(), "b", "c"].into_iter().enumerate() {
        members.push(Arc::new(world.member(name, u8::try_from(number).unwrap() + 1, 0).await));
    }
    // Each learns of all replicas from the one that it is configured with, and publishes to all.
    for member in &members {
        when("the list of hubs", &world, SOON, || member.hubs.all().len() == 3).await;
    }
    world.settle().await;

    let phase = async |world: &World, members: &[Arc<Member>], what: &str, admins: BTreeMap<usize, Admin>| {
        let began = Instant::now();
        let churn = Churn::start(members, admins);
        tokio::time::sleep(PHASE).await;
        let policies = churn.end().await;
        let converged = converge(world, members).await;
        (began, policies, converged, what.to_owned())
    };
    let show = |members: &[Arc<Member>],
                (began, policies, converged, what): (Instant, Vec<(u64, Instant)>, Duration, String)| {
        let (count, endpoints) = longest(members, began);
        let of_policies = longest_of_policies(members, &policies);
        println!(
            "{what}: {count} changes of endpoints, the longest after {endpoints:?}; {} of a policy, the longest after \
             {of_policies:?}; converged {converged:?} after the last",
            policies.len()
        );
        policies.len()
    };
    let result = phase(&world, &members, "nothing fails", world.admins().await).await;
    assert!(show(&members, result) > 3);

    // The replica that the first member watches.
    let watched = world.number_of(&members[0].watched().expect("it watches one"));
    assert_eq!(watched, 0, "it prefers this one");
    let admins = world.admins().await;
    let began = Instant::now();
    let churn = Churn::start(&members, admins);
    tokio::time::sleep(PHASE / 4).await;
    world.kill(watched);
    let moved = when("it watches another replica", &world, SOON, || {
        members[0].watched().is_some_and(|now| world.number_of(&now) != watched)
    })
    .await;
    tokio::time::sleep(PHASE).await;
    let policies = churn.end().await;
    let converged = converge(&world, &members).await;
    show(&members, (began, policies, converged, format!("the watched replica is killed, left after {moved:?}")));
    world.settle().await;
    let left: Vec<String> = members[0].hubs.all();
    println!("addresses that the member knows after that: {left:?}");

    // It returns, and takes over its clusters again.
    world.run(watched);
    let admins = world.admins().await;
    let back = when("it watches its replica again", &world, SOON * 2, || {
        members[0].watched().is_some_and(|now| world.number_of(&now) == watched)
    });
    let began = Instant::now();
    let churn = Churn::start(&members, admins);
    let back = back.await;
    let policies = churn.end().await;
    let converged = converge(&world, &members).await;
    show(&members, (began, policies, converged, format!("the replica is back, and watched after {back:?}")));
    world.settle().await;

    let leader = etcd.leader().await;
    let admins = world.admins().await;
    let began = Instant::now();
    let churn = Churn::start(&members, admins);
    tokio::time::sleep(PHASE / 4).await;
    etcd.kill(leader);
    tokio::time::sleep(PHASE).await;
    let policies = churn.end().await;
    let converged = converge(&world, &members).await;
    show(&members, (began, policies, converged, "the leader of etcd is killed".to_owned()));

    // A second node: the majority is lost, for longer than a lease.
    let second = (0..3).find(|number| *number != leader).unwrap();
    let before: Vec<usize> = members.iter().map(|it| it.seen.lock().unwrap().stale.len()).collect();
    etcd.kill(second);
    for number in world.running() {
        world
            .until(number, "status states that the store is unavailable", |it| it.store_unavailable_ms.is_some())
            .await;
    }
    let began = Instant::now();
    let churn = Churn::start(&members, world.admins().await);
    tokio::time::sleep(LEASE * 3).await;
    let policies = churn.end().await;
    assert!(policies.is_empty(), "no change of policy is accepted without a majority");
    let converged = converge(&world, &members).await;
    show(&members, (began, policies, converged, "the majority of etcd is lost".to_owned()));
    for number in world.running() {
        let status =
            world.until(number, "status", |it| it.store_unavailable_ms.is_some_and(|since| since > 10_000)).await;
        assert!(status.clusters.iter().all(|it| it.lease == "live" && it.connected), "{status:?}");
    }
    let after: Vec<usize> = members.iter().map(|it| it.seen.lock().unwrap().stale.len()).collect();
    assert_eq!(before, after, "no cluster became unknown");

    etcd.run(leader);
    etcd.run(second);
    let began = Instant::now();
    for number in world.running() {
        world.until(number, "the store answers again", |it| it.store_unavailable_ms.is_none()).await;
    }
    println!("the store is available {:?} after its nodes were started", began.elapsed());
    let result = phase(&world, &members, "the majority is back", world.admins().await).await;
    assert!(show(&members, result) > 3);
    world.settle().await;
    for member in &members {
        assert!(member.seen.lock().unwrap().stale.is_empty(), "{} saw a stale cluster", member.name);
    }
}

/// A replica that no longer sees the store goes on with what it has read: members leave it for one that sees newer policies, and
/// return.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_leave_a_replica_that_has_lost_the_store() {
    let etcd = nodes::shared().await;
    let url = etcd.url_with("timeout=3").to_string();
    let hosts = etcd.hosts();
    let proxy = Proxy::start(&hosts[0]).await;
    let through = url.replace(&hosts.join(","), &proxy.host());
    let world = World::start(&[url.parse().unwrap(), through.parse().unwrap()]).await;
    // One that prefers the replica behind the proxy.
    let prefers = |name: &String| weight(name, world.address(1)) > weight(name, world.address(0));
    let name = (0..).map(|number| format!("m-{number}")).find(prefers).unwrap();
    let member = Arc::new(world.member(&name, 1, 0).await);
    let watches = |number: usize| member.watched().is_some_and(|now| world.number_of(&now) == number);
    when("it watches the preferred replica", &world, SOON, || watches(1)).await;
    world.settle().await;
    proxy.interrupt();
    let mut admin = world.admin(0).await;
    let began = Instant::now();
    let changed = admin.apply(apply(policy(7))).await.unwrap().into_inner().revision;
    let has = || member.client.with_receiver(|it| it.positions().1.revision >= changed);
    when("the change arrives", &world, SOON, has).await;
    println!("a change arrives {:?} after the watched replica has lost the store", began.elapsed());
    assert!(watches(0));
    let seen = member.seen.lock().unwrap().times[&(String::new(), "p".to_owned())].clone();
    assert_eq!(seen.last().unwrap().0, 7);
    // What it sends the member after that is not older: it does not serve it until it has the same.
    proxy.resume();
    when("it watches the preferred replica again", &world, SOON * 2, || watches(1)).await;
    assert!(has());
    world.settle().await;
}

/// A cluster that one replica does not hear is live, since another one hears it. The members that watch the first must not take what
/// it has for current.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_a_replica_does_not_hear_is_unknown_there() {
    let etcd = nodes::shared().await;
    let url = etcd.url();
    let world = World::start(&[url.clone(), url]).await;
    let prefers = |name: &String| weight(name, world.address(1)) > weight(name, world.address(0));
    let name = (0..).map(|number| format!("m-{number}")).find(prefers).unwrap();
    let member = world.member(&name, 1, 0).await;
    let token = world.token("half").await;
    let half =
        crate::support::join(&world.folder.path().join("half"), "half", &token, world.join_address(0)).await.unwrap();
    let heard = crate::replicas_registration::publish(&half, world.address(0)).await;
    when("it watches the second replica", &world, SOON, || {
        member.watched().is_some_and(|now| world.number_of(&now) == 1)
    })
    .await;
    when("the cluster is unknown there", &world, SOON, || {
        let seen = member.seen.lock().unwrap();
        seen.inventory.clusters.get("half").is_some_and(|it| it.stale)
    })
    .await;
    let of = |status: &wire::StatusResponse| status.clusters.iter().find(|it| it.name == "half").cloned().unwrap();
    let status = of(&world.until(1, "status", |it| !of(it).problems.is_empty()).await);
    assert_eq!((status.lease.as_str(), status.connected), ("live", false), "{status:?}");
    let problem = format!("{:?}", status.problems[0].reason);
    assert!(problem.contains("NotPublishing"), "{problem}");
    assert!(of(&world.until(0, "status", |_| true).await).connected);
    // It is heard there as well.
    let also = crate::replicas_registration::publish(&half, world.address(1)).await;
    when("the cluster is known again", &world, SOON, || {
        let seen = member.seen.lock().unwrap();
        seen.inventory.clusters.get("half").is_some_and(|it| !it.stale)
    })
    .await;
    heard.abort();
    also.abort();
}
