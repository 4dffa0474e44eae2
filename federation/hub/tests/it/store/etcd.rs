//! With the store on three real nodes of etcd.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use hanse_proto::federation::v1 as wire;

use super::{fails, path, policies, succeeds, text};
use crate::etcd_nodes as nodes;
use crate::process::{Process, administrator, free_ports, hub, initialise, start};
use crate::replicas_registration::publish;
use crate::support::{Admin, SOON, apply, join, policy};

fn spawn(arguments: &[&str], ports: &[String; 2], log: &Path) -> Process {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
    let listen = ["run", "--listen", &*ports[0], "--join-listen", &*ports[1]];
    let child = hub().args(listen).args(arguments).stderr(Stdio::from(log)).spawn().unwrap();
    Process { child, listen: ports[0].clone(), join: ports[1].clone() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_migrates_to_etcd_and_back_also_after_kills() {
    let nodes = nodes::shared().await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (data, log) = (at("hub"), at("log"));
    let ports = initialise(&data);
    let file = format!("file:{}/hub.redb", data.display());
    let etcd = nodes.url().to_string();
    let process = start(&data, &ports, &log);
    let mut admin = administrator(&data, &process).await;
    for number in 0..300 {
        admin.apply(apply(policy(&format!("p-{number:04}"), "platform"))).await.unwrap();
    }
    fails(&["store", "migrate", &file, &etcd], &["in use by another process"]);
    let expected = policies(&mut admin).await;
    drop((admin, process));

    // Killed at some moments, also before it has begun.
    for milliseconds in [1, 40, 60, 80] {
        let mut child = hub().args(["store", "migrate", &file, &etcd]).stderr(Stdio::null()).spawn().unwrap();
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let printed = succeeds(&["store", "migrate", &file, &etcd]);
    assert!(printed.contains("verified"), "{printed}");
    assert!(succeeds(&["store", "migrate", &file, &etcd]).contains("complete already"));
    let stopped = ["run", "--data", path(&data), "--listen", &ports[0], "--join-listen", &ports[1]];
    fails(&stopped, &["was migrated", &format!("--store '{etcd}'")]);
    fails(&["store", "migrate", &file, &nodes.url().to_string()], &["migrated to", "already"]);
    let process = spawn(&["--data", path(&data), "--store", &etcd], &ports, &log);
    let mut admin = administrator(&data, &process).await;
    assert_eq!(policies(&mut admin).await, expected);
    admin.apply(apply(policy("on-etcd", "platform"))).await.unwrap();
    drop((admin, process));

    let back = format!("file:{}", at("back.redb").display());
    fails(&["store", "migrate", &etcd, &file], &["is not empty"]);
    succeeds(&["store", "migrate", &etcd, &back]);
    let process = spawn(&["--data", path(&data), "--store", &back], &ports, &log);
    let mut admin = administrator(&data, &process).await;
    assert_eq!(policies(&mut admin).await.len(), expected.len() + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_need_the_url_and_the_key_file_only() {
    let nodes = nodes::shared().await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (data, log, key_file, empty) = (at("hub"), at("log"), at("unlock.key"), at("empty"));
    let (first, second) = (free_ports(), free_ports());
    let url = nodes.url().to_string();
    let init = ["init", "--listen", &*first[0], "--join-listen", &*first[1], "--store", &*url];
    let printed = succeeds(&[&init[..], &["--data", path(&data), "--key-file", path(&key_file)]].concat());
    assert!(printed.contains(&format!("--store {url} --key-file {}", key_file.display())), "{printed}");
    assert!(!data.join("ca.key").exists() && data.join("ca.pem").exists());
    fails(&[&init[..], &["--data", path(&at("second")), "--key-file", path(&key_file)]].concat(), &["exists already"]);

    let arguments = ["--store", &*url, "--key-file", path(&key_file)];
    let one = spawn(&arguments, &first, &log);
    let mut a = administrator(&data, &one).await;
    // Another program's change, which is not one of this store.
    hanse_store::create(&nodes.url()).await.unwrap();
    let two = spawn(&arguments, &second, &log);
    let mut b = administrator(&data, &two).await;
    let revisions = async |a: &mut Admin, b: &mut Admin| {
        let one = a.status(wire::StatusRequest {}).await.unwrap().into_inner().revision;
        (one, b.status(wire::StatusRequest {}).await.unwrap().into_inner().revision)
    };
    // A replica that starts later is at the revision of the others, also when other programs write to the same etcd.
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        let (one, two) = revisions(&mut a, &mut b).await;
        if one == two {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "revisions {one} and {two}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Both write, and see what the other has written.
    for number in 0..10 {
        a.apply(apply(policy(&format!("a-{number}"), "platform"))).await.unwrap();
        b.apply(apply(policy(&format!("b-{number}"), "platform"))).await.unwrap();
    }
    let deadline = tokio::time::Instant::now() + SOON;
    while policies(&mut a).await.len() < 20 || policies(&mut b).await.len() < 20 {
        assert!(tokio::time::Instant::now() < deadline, "each replica sees all changes");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let backup = at("backup");
    succeeds(&["backup", path(&backup), "--store", &url]);
    drop(one);
    b.apply(apply(policy("after", "platform"))).await.unwrap();
    drop(two);

    // The backup alone is enough, with the key file.
    let restored = nodes.url().to_string();
    succeeds(&["restore", path(&backup), &restored]);
    let three = spawn(&["--store", &restored, "--key-file", path(&key_file)], &first, &log);
    let mut c = administrator(&data, &three).await;
    assert_eq!(policies(&mut c).await.len(), 20);
    std::fs::create_dir(&empty).unwrap();
    let without = ["run", "--store", &url, "--listen", &first[0], "--join-listen", &first[1]];
    let output = Command::new(env!("CARGO_BIN_EXE_hanse-hub")).args(without).current_dir(&empty).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("--data"), "{}", text(&output));
    let secret = std::fs::read(&key_file).unwrap();
    let log = std::fs::read(&log).unwrap();
    assert!(!log.windows(16).any(|it| it == &secret[..16]) && !log.windows(11).any(|it| it == b"PRIVATE KEY"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_of_etcd_members_go_on_and_status_states_since_when() {
    let mut nodes = nodes::Nodes::start().await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (data, log, key_file) = (at("hub"), at("log"), at("unlock.key"));
    let (first, second) = (free_ports(), free_ports());
    let url = nodes.url_with("timeout=3").to_string();
    let init = ["init", "--listen", &*first[0], "--join-listen", &*first[1], "--store", &*url];
    succeeds(&[&init[..], &["--data", path(&data), "--key-file", path(&key_file)]].concat());
    // A lease that is short, and ends while etcd is away, if its end does not wait for etcd.
    let arguments = ["--store", &*url, "--key-file", path(&key_file), "--lease-seconds", "5"];
    let one = spawn(&arguments, &first, &log);
    let two = spawn(&arguments, &second, &log);
    let (mut a, mut b) = (administrator(&data, &one).await, administrator(&data, &two).await);
    let request = wire::CreateTokenRequest { cluster: "train".to_owned(), lifetime_seconds: 600, accept: true };
    let token = a.create_token(request).await.unwrap().into_inner().token;
    let member = join(&at("train"), "train", &token, &one.join).await.unwrap();
    let publishing = publish(&member, &one.listen).await;
    let status = async |admin: &mut Admin| admin.status(wire::StatusRequest {}).await.unwrap().into_inner();
    let until = async |admin: &mut Admin, what: &str, is: &dyn Fn(&wire::StatusResponse) -> bool| {
        let deadline = tokio::time::Instant::now() + SOON * 3;
        loop {
            let now = status(admin).await;
            if is(&now) {
                return now;
            }
            assert!(tokio::time::Instant::now() < deadline, "{what}: {now:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let is_live = |it: &wire::StatusResponse| it.clusters[0].lease == "live" && it.store_unavailable_ms.is_none();
    until(&mut a, "live", &is_live).await;
    until(&mut b, "live at both", &is_live).await;

    nodes.kill(0);
    nodes.kill(1);
    for admin in [&mut a, &mut b] {
        let seen = until(admin, "unavailable", &|it| it.store_unavailable_ms.is_some()).await;
        assert!(seen.clusters[0].lease == "live", "{seen:?}");
    }
    // A change is refused at once, with the reason.
    let began = std::time::Instant::now();
    let refused = a.apply(apply(policy("refused", "platform"))).await.unwrap_err();
    assert!(refused.code() == tonic::Code::Unavailable && refused.message().contains("majority"), "{refused:?}");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let seen = until(&mut a, "its time grows", &|it| it.store_unavailable_ms.is_some_and(|it| it > 8_000)).await;
    assert!(seen.clusters[0].connected && seen.clusters[0].lease == "live", "the member goes on: {seen:?}");

    nodes.run(0);
    nodes.run(1);
    for admin in [&mut a, &mut b] {
        let seen = until(admin, "available again", &|it| it.store_unavailable_ms.is_none()).await;
        assert!(seen.clusters[0].lease == "live", "no cluster became silent: {seen:?}");
    }
    a.apply(apply(policy("accepted", "platform"))).await.unwrap();
    until(&mut b, "it is seen by the other", &|it| it.clusters[0].lease == "live").await;
    assert!(!publishing.is_finished(), "its stream was never closed");
}

/// Each replica that receives messages of a cluster keeps it live, also one that did not begin its lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_stays_live_while_any_replica_receives_from_it() {
    let nodes = nodes::shared().await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (data, log, key_file) = (at("hub"), at("log"), at("unlock.key"));
    let ports = [free_ports(), free_ports(), free_ports()];
    let url = nodes.url().to_string();
    let init = ["init", "--listen", &*ports[0][0], "--join-listen", &*ports[0][1], "--store", &*url];
    succeeds(&[&init[..], &["--data", path(&data), "--key-file", path(&key_file)]].concat());
    let arguments = ["--store", &*url, "--key-file", path(&key_file), "--lease-seconds", "5"];
    let [one, two, three] = ports.each_ref().map(|ports| spawn(&arguments, ports, &log));
    let mut admin = administrator(&data, &three).await;
    administrator(&data, &two).await;
    let request = wire::CreateTokenRequest { cluster: "train".to_owned(), lifetime_seconds: 600, accept: true };
    let token = admin.create_token(request).await.unwrap().into_inner().token;
    let member = join(&at("train"), "train", &token, &one.join).await.unwrap();
    let lease = async |admin: &mut Admin| {
        admin.status(wire::StatusRequest {}).await.unwrap().into_inner().clusters[0].lease.clone()
    };
    let until = async |admin: &mut Admin, expected: &str| {
        let deadline = tokio::time::Instant::now() + SOON;
        while lease(admin).await != expected {
            assert!(tokio::time::Instant::now() < deadline, "it does not become {expected}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let stays_live = async |admin: &mut Admin| {
        // Longer than the lease, and the second that etcd may add.
        let end = tokio::time::Instant::now() + Duration::from_secs(9);
        while tokio::time::Instant::now() < end {
            assert_eq!(lease(admin).await, "live");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let first = publish(&member, &one.listen).await;
    until(&mut admin, "live").await;
    let second = publish(&member, &two.listen).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    // The one that joined later dies: the first keeps the cluster live.
    drop(two);
    stays_live(&mut admin).await;
    // The one that began the lease dies: another keeps it.
    let third = publish(&member, &three.listen).await;
    drop(one);
    stays_live(&mut admin).await;
    third.abort();
    until(&mut admin, "stale").await;
    assert!(first.await.is_ok() && second.await.is_ok());
}

/// etcd ends leases also while no hub runs: that a hub was away says nothing about a cluster.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_ends_while_no_hub_runs_begins_again_with_the_next() {
    let nodes = nodes::shared().await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (data, log, key_file, ports) = (at("hub"), at("log"), at("unlock.key"), free_ports());
    let url = nodes.url().to_string();
    let init = ["init", "--listen", &*ports[0], "--join-listen", &*ports[1], "--store", &*url];
    succeeds(&[&init[..], &["--data", path(&data), "--key-file", path(&key_file)]].concat());
    let arguments = ["--store", &*url, "--key-file", path(&key_file), "--lease-seconds", "5"];
    let hub = spawn(&arguments, &ports, &log);
    let mut admin = administrator(&data, &hub).await;
    let mut members = Vec::new();
    for cluster in ["live", "quiet"] {
        let request = wire::CreateTokenRequest { cluster: cluster.to_owned(), lifetime_seconds: 600, accept: true };
        let token = admin.create_token(request).await.unwrap().into_inner().token;
        members.push(join(&at(cluster), cluster, &token, &hub.join).await.unwrap());
    }
    let leases = async |admin: &mut Admin| {
        let clusters = admin.status(wire::StatusRequest {}).await.unwrap().into_inner().clusters;
        clusters.into_iter().map(|it| it.lease).collect::<Vec<_>>()
    };
    let until = async |admin: &mut Admin, expected: [&str; 2]| {
        let deadline = tokio::time::Instant::now() + SOON;
        loop {
            let now = leases(admin).await;
            if now == expected {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{now:?} does not become {expected:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let _live = publish(&members[0], &hub.listen).await;
    publish(&members[1], &hub.listen).await.abort();
    until(&mut admin, ["live", "stale"]).await;
    let store = hanse_store::open(&url.parse().unwrap()).await.unwrap();
    let reads = async |segments: &[&str], exists: bool| {
        let (key, deadline) = (hanse_store::Key::new(segments).unwrap(), tokio::time::Instant::now() + SOON);
        while store.read(&key).await.unwrap().is_some() != exists {
            assert!(tokio::time::Instant::now() < deadline, "{key} does not become {exists}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    // The hub has noted what it has observed. One that dies before would give the cluster another lease.
    reads(&["silent", "quiet"], true).await;
    drop((admin, hub));
    reads(&["lease", "live"], false).await;
    let hub = spawn(&arguments, &ports, &log);
    let mut admin = administrator(&data, &hub).await;
    assert_eq!(leases(&mut admin).await, ["live", "stale"], "as when the hub ended");
    until(&mut admin, ["stale", "stale"]).await;
    let _live = publish(&members[0], &hub.listen).await;
    until(&mut admin, ["live", "stale"]).await;
}
