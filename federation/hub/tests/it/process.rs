//! The real binary: `kill -9` in the middle of changes, and what it writes to its log.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use hanse_identity::keys::Credentials;
use hanse_identity::token::{Token, TokenKind};
use hanse_proto::federation::v1 as wire;

use crate::support::{Admin, SOON, apply, connect, is_served, join, open, policy};

pub struct Process {
    pub child: Child,
    pub listen: String,
    pub join: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ports that were free a moment ago.
pub fn free_ports() -> [String; 2] {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().to_string())
}

pub fn hub() -> Command {
    Command::new(env!("CARGO_BIN_EXE_hanse-hub"))
}

pub fn initialise(data: &Path) -> [String; 2] {
    let [listen, join] = free_ports();
    let made = hub().args(["init", "--listen", &listen, "--join-listen", &join, "--data"]).arg(data).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    [listen, join]
}

pub fn start(data: &Path, [listen, join]: &[String; 2], log: &Path) -> Process {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
    let child = hub()
        .args(["run", "--log-format", "json", "--listen", listen, "--join-listen", join, "--data"])
        .arg(data)
        .env("HANSE_LOG", "trace")
        .stderr(Stdio::from(log))
        .spawn()
        .unwrap();
    Process { child, listen: listen.clone(), join: join.clone() }
}

pub async fn administrator(data: &Path, process: &Process) -> Admin {
    let credentials = Credentials::read(&data.join("admin.key"), &data.join("admin.pem")).unwrap();
    let deadline = tokio::time::Instant::now() + SOON;
    while open(credentials.clone(), &data.join("ca.pem"), &process.listen).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "the hub does not serve");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    connect(credentials, &data.join("ca.pem"), &process.listen).await
}

#[test]
fn what_failed_is_said_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("other"), "").unwrap();
    let mut command = hub();
    command.args(["init", "--listen", "127.0.0.1:1", "--join-listen", "127.0.0.1:2", "--data"]).arg(folder.path());
    let output = command.env("RUST_BACKTRACE", "1").output().unwrap();
    let wanted = format!("hanse-hub: {} is not empty: choose an empty folder for the hub\n", folder.path().display());
    assert_eq!((output.status.code(), &*String::from_utf8_lossy(&output.stderr)), (Some(1), wanted.as_str()));
}

#[tokio::test]
async fn kill_9_loses_nothing_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("hub");
    let log = folder.path().join("log");
    let ports = initialise(&data);
    assert!(
        !hub()
            .args(["init", "--listen", &ports[0], "--join-listen", &ports[1], "--data"])
            .arg(&data)
            .output()
            .unwrap()
            .status
            .success(),
        "twice"
    );
    let seed = std::env::var("HANSE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_nanos().into());
    println!("seed {seed}");
    let mut random: u64 = seed;
    let mut accepted = Vec::new();
    let mut members = Vec::new();
    for round in 0..4_usize {
        let mut process = start(&data, &ports, &log);
        let mut admin = administrator(&data, &process).await;
        let cluster = format!("cluster-{round}");
        let request = wire::CreateTokenRequest { cluster: cluster.clone(), lifetime_seconds: 600, accept: true };
        let token = admin.create_token(request).await.unwrap().into_inner().token;
        members.push(join(&folder.path().join(&cluster), &cluster, &token, &process.join).await.unwrap());
        if round == 2 {
            let revoke = wire::RevokeClusterRequest { name: "cluster-0".to_owned(), reason: "test".to_owned() };
            admin.revoke_cluster(revoke).await.unwrap();
        }
        // Changes go on while the signal comes.
        let mut writer = admin.clone();
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let writing = tokio::spawn(async move {
            for i in 0.. {
                let name = format!("policy-{round}-{i}");
                if writer.apply(apply(policy(&name, "platform"))).await.is_err() {
                    return;
                }
                sender.send(name).unwrap();
            }
        });
        for _ in 0..5 + round * 3 {
            accepted.push(receiver.recv().await.unwrap());
        }
        // At any instant of a write.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        tokio::time::sleep(Duration::from_micros((random >> 33) % 10_000)).await;
        process.child.kill().unwrap();
        process.child.wait().unwrap();
        writing.await.unwrap();
        while let Some(name) = receiver.recv().await {
            accepted.push(name);
        }
    }
    let process = start(&data, &ports, &log);
    let mut admin = administrator(&data, &process).await;
    let objects = admin.get(wire::GetRequest::default()).await.unwrap().into_inner().objects;
    for name in &accepted {
        assert!(objects.iter().any(|o| o.name == *name), "{name} was accepted");
    }
    for (round, member) in members.iter().enumerate() {
        assert_eq!(is_served(member, &process.listen).await, round != 0, "cluster-{round}");
    }
    println!("4 kills, {} policies accepted, {} found, 4 registrations, 1 revocation", accepted.len(), objects.len());
}

#[tokio::test]
async fn no_secret_is_in_the_log_even_at_trace() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("hub");
    let log = folder.path().join("log");
    let ports = initialise(&data);
    let process = start(&data, &ports, &log);
    let mut admin = administrator(&data, &process).await;
    let request = wire::CreateTokenRequest { cluster: "train".to_owned(), lifetime_seconds: 600, accept: true };
    let token = admin.create_token(request).await.unwrap().into_inner().token;
    let member = join(&folder.path().join("train"), "train", &token, &process.join).await.unwrap();
    member.renew(&process.listen).await.unwrap();
    // A wrong use of the token is logged, without the token.
    assert!(join(&folder.path().join("second"), "train", &token, &process.join).await.is_err());
    drop(process);

    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("cluster joined") && text.contains("join refused"), "the log is there:\n{text}");
    assert!(text.contains(&Token::parse(TokenKind::Cluster, &token).unwrap().id), "tokens are named by their id");
    let mut secrets = vec![token.rsplit_once('.').unwrap().1.to_owned()];
    for key in ["ca.key", "admin.key"] {
        let pem = std::fs::read_to_string(data.join(key)).unwrap();
        secrets.extend(pem.lines().filter(|line| !line.starts_with("-----")).map(str::to_owned));
    }
    for secret in secrets.iter().filter(|s| s.len() >= 20) {
        assert!(!text.contains(secret), "a secret is in the log");
    }
    for line in text.lines() {
        assert!(line.starts_with('{'), "every line is JSON: {line}");
    }
}

/// What `hanse-hub` says when it does not start; it must not take long to say it.
fn refused(arguments: &[&str], data: &Path) -> String {
    let mut command = hub();
    command.args(arguments).arg("--data").arg(data).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let deadline = std::time::Instant::now() + SOON;
    while process.try_wait().unwrap().is_none() {
        if std::time::Instant::now() > deadline {
            process.kill().unwrap();
            panic!("it runs: {arguments:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = process.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn a_hub_that_cannot_start_says_why_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (data, other, log) = (folder.path().join("hub"), folder.path().join("other"), folder.path().join("log"));
    let [listen, join] = free_ports();
    let run = ["run", "--listen", &listen, "--join-listen", &join];
    let init = ["init", "--listen", &listen, "--join-listen", &join];
    let check = |arguments: &[&str], data: &Path, expected: &[&str]| {
        let said = refused(arguments, data);
        assert!(expected.iter().all(|text| said.contains(text)), "expected {expected:?}: {said}");
    };
    check(&run, &data, &["does not contain a ClusterSet", "hanse-hub init"]);
    assert!(!data.exists(), "nothing was made");
    let ports = initialise(&data);
    initialise(&other);
    check(&init, &data, &["already contains a ClusterSet"]);
    check(&init, folder.path(), &["is not empty"]);
    // As the init container of a pod, which runs at each start.
    let root = std::fs::read(data.join("ca.key")).unwrap();
    let again = hub().args(init).args(["--if-missing", "--data"]).arg(&data).output().unwrap();
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert_eq!(std::fs::read(data.join("ca.key")).unwrap(), root);
    check(&["init", "--if-missing", "--listen", &listen, "--join-listen", &join], folder.path(), &["is not empty"]);

    // Neither is one that something happened to a new one.
    let whole = std::fs::read(data.join("hub.redb")).unwrap();
    let empty = folder.path().join("empty.redb");
    drop(hanse_store::create(&hanse_store::StoreUrl::file(&empty)).await.unwrap());
    let unfilled = std::fs::read(&empty).unwrap();
    let mut changed = whole.clone();
    // Something in it that a checksum covers.
    let at = changed.windows(5).rposition(|bytes| bytes == b"admin").unwrap();
    changed[at] ^= 1;
    for (bytes, expected) in [
        (&b""[..], "it is empty"),
        (b"kind: Pod\n", "it is not a database"),
        (&whole[..whole.len() / 2], "is damaged"),
        (&changed, "is damaged"),
        (&unfilled, "it was not filled by `hanse-hub init`"),
    ] {
        std::fs::write(data.join("hub.redb"), bytes).unwrap();
        check(&run, &data, &["hub.redb", expected, "restore all files", "--restored"]);
    }
    std::fs::write(data.join("hub.redb"), &whole).unwrap();

    // Without its store it would have no policies and no revocations.
    std::fs::rename(data.join("hub.redb"), data.join("kept")).unwrap();
    check(&run, &data, &["hub.redb of the ClusterSet", "is missing", "backup"]);
    std::fs::copy(other.join("hub.redb"), data.join("hub.redb")).unwrap();
    check(&run, &data, &["another ClusterSet"]);
    std::fs::rename(data.join("kept"), data.join("hub.redb")).unwrap();
    use std::os::unix::fs::PermissionsExt;
    let key = data.join("ca.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    check(&run, &data, &["ca.key", "0600"]);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();

    let process = start(&data, &ports, &log);
    administrator(&data, &process).await;
    check(&run, &data, &["in use by another process"]);
    let taken = ["run", "--listen", &process.listen, "--join-listen", &join];
    check(&taken, &other, &["listen on", "in use"]);
    drop(process);

    // An interrupted init is repeated, and not served.
    std::fs::write(other.join("init.unfinished"), b"").unwrap();
    check(&run, &other, &["was interrupted", "repeat it"]);
    let before = std::fs::read(other.join("ca.pem")).unwrap();
    initialise(&other);
    assert_ne!(std::fs::read(other.join("ca.pem")).unwrap(), before);
}

#[tokio::test]
async fn takes_settings_from_options_then_variables_then_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("hub");
    let [listen, join] = initialise(&data);
    let [health, metrics] = free_ports();
    let (settings, token) = (folder.path().join("hub.yaml"), folder.path().join("metrics.token"));
    std::fs::write(&token, "a-token-of-more-than-22-bytes\n").unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    // Whatever precedes must win: these addresses belong to another machine.
    let file = format!(
        "data: {}\nlisten: 192.0.2.1:1\njoin-listen: 192.0.2.1:2\nmetrics-listen: '{metrics}'\nmetrics-token-file: {}\n",
        data.display(),
        token.display()
    );
    std::fs::write(&settings, file).unwrap();
    let child = hub()
        .args(["run", "--listen", &listen, "--health-listen", &health])
        .env("HANSE_HUB_LISTEN", "192.0.2.1:3")
        .env("HANSE_HUB_JOIN_LISTEN", &join)
        .env("HANSE_HUB_CONFIG", &settings)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _process = Process { child, listen: listen.clone(), join: join.clone() };
    crate::support::eventually("ready", || async { page(&health, "/readyz").await.ends_with("ready") }).await;
    let refused = page(&metrics, "/metrics").await;
    assert!(refused.starts_with("HTTP/1.1 401") && !refused.contains("hanse_"), "{refused}");

    std::fs::write(&settings, "listens: 127.0.0.1:1\n").unwrap();
    let output = hub().arg("run").env("HANSE_HUB_CONFIG", &settings).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{printed}");
    assert!(printed.contains("hub.yaml: listens: unknown setting"), "{printed}");

    // A restore that is repeated at each start would let an older store win.
    let run = ["run", "--listen", &listen, "--join-listen", &join, "--data"];
    let output = hub().args(run).arg(&data).env("HANSE_HUB_RESTORED", "true").output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{printed}");
    assert!(printed.contains("HANSE_HUB_RESTORED: --restored is only an option of the command line"), "{printed}");
}

#[tokio::test]
async fn serves_a_store_that_is_given_by_url() {
    let folder = tempfile::tempdir().unwrap();
    let (data, file) = (folder.path().join("hub"), folder.path().join("elsewhere.redb"));
    let store = format!("file://{}", file.display());
    let [listen, join] = free_ports();
    let init = |data: &Path, store: &str| {
        let arguments = ["init", "--listen", &listen, "--join-listen", &join, "--store", store, "--data"];
        hub().args(arguments).arg(data).output().unwrap()
    };
    let output = init(&data, &store);
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && printed.contains(&format!("--store file:{}", file.display())), "{printed}");
    assert!(file.exists() && !data.join("hub.redb").exists());

    // The default of `run` is another store, which does not exist.
    let run = ["run", "--listen", &listen, "--join-listen", &join];
    assert!(refused(&run, &data).contains("hub.redb of the ClusterSet"));
    let gone = format!("file:{}", folder.path().join("gone").display());
    let reason = refused(&[&run[..], &["--store", &gone]].concat(), &data);
    assert!(reason.contains("the store does not exist") && reason.contains("backup"), "{reason}");
    let health = free_ports()[0].clone();
    let child = hub()
        .args(run)
        .args(["--health-listen", &health, "--store", &store, "--data"])
        .arg(&data)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let process = Process { child, listen: listen.clone(), join: join.clone() };
    crate::support::eventually("ready", || async { page(&health, "/readyz").await.ends_with("ready") }).await;
    drop(process);

    // A store outside of the folder is never replaced.
    let before = std::fs::read(&file).unwrap();
    let output = init(&folder.path().join("other"), &store);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("the store exists already"));
    assert_eq!(std::fs::read(&file).unwrap(), before);
    let output = init(&folder.path().join("third"), "consul://127.0.0.1:8500");
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && printed.contains("unknown store scheme \"consul\""), "{printed}");
    // Nothing listens at the port: it is one of those that a program must be given.
    let output = init(&folder.path().join("fourth"), "etcd://127.0.0.1:1?timeout=2");
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    let expected =
        if cfg!(feature = "etcd") { "a majority of etcd's nodes is running" } else { "with the Cargo feature `etcd`" };
    assert!(output.status.code() == Some(1) && printed.contains(expected), "{printed}");
}

/// The answer of a monitoring page.
async fn page(address: &str, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let Ok(mut stream) = tokio::net::TcpStream::connect(address).await else { return String::new() };
    let request = format!("GET {path} HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn a_hub_tells_its_health_and_stops_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("hub");
    let [listen, join] = initialise(&data);
    let [health, metrics] = free_ports();
    let child = hub()
        .args(["run", "--listen", &listen, "--join-listen", &join, "--health-listen", &health])
        .args(["--metrics-listen", &metrics, "--data"])
        .arg(&data)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut process = Process { child, listen, join };
    crate::support::eventually("ready", || async { page(&health, "/readyz").await.ends_with("ready") }).await;
    assert!(page(&health, "/healthz").await.ends_with("ok"));
    // Some are there from the first observation on.
    for name in ["hanse_hub_connections", "hanse_hub_registry_revision", "hanse_hub_clusters", "hanse_hub_endpoints"] {
        crate::support::eventually(name, || async { page(&metrics, "/metrics").await.contains(name) }).await;
    }
    let id = nix::unistd::Pid::from_raw(process.child.id().try_into().unwrap());
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
    let ended = tokio::task::spawn_blocking(move || process.child.wait().unwrap());
    let status = tokio::time::timeout(SOON, ended).await.expect("it stops").unwrap();
    assert_eq!(status.code(), Some(0));
}
