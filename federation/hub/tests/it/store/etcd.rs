//! With the store on three real nodes of etcd.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{fails, path, policies, succeeds, text};
use crate::etcd_nodes as nodes;
use crate::process::{Process, administrator, free_ports, hub, initialise, start};
use crate::support::{SOON, apply, policy};

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
    let two = spawn(&arguments, &second, &log);
    let (mut a, mut b) = (administrator(&data, &one).await, administrator(&data, &two).await);
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
