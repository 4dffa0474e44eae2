//! The commands that copy a store: backups of a running hub, and migration between files and etcd.

#[cfg(feature = "etcd")]
mod etcd;

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use hanse_proto::federation::v1 as wire;
use hanse_store::{Key, Prefix, StoreUrl, open};

use crate::process::{Process, administrator, hub, initialise, start};
use crate::support::{apply, policy};

/// Runs the program to its end.
fn run(arguments: &[&str]) -> Output {
    hub().args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn succeeds(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    text(&output)
}

fn fails(arguments: &[&str], expected: &[&str]) {
    let output = run(arguments);
    let printed = text(&output);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {printed}");
    assert!(expected.iter().all(|it| printed.contains(it)), "{arguments:?}: expected {expected:?}: {printed}");
    assert_eq!(printed.trim_end().lines().filter(|it| !it.contains("changes written")).count(), 1, "{printed}");
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The names of the policies that an administrator sees.
async fn policies(admin: &mut crate::support::Admin) -> Vec<String> {
    let all =
        admin.get(wire::GetRequest { kind: wire::ObjectKind::FederatedNetworkPolicy.into(), name: String::new() });
    let objects = all.await.unwrap().into_inner().objects;
    objects.into_iter().map(|it| it.name).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_hub_is_backed_up_at_one_revision_and_restored() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (data, log) = (at("hub"), at("log"));
    let ports = initialise(&data);
    let process = start(&data, &ports, &log);
    let mut admin = administrator(&data, &process).await;
    // Changes go on while backups are made.
    let mut writer = admin.clone();
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let writing = tokio::spawn(async move {
        let mut count = 0;
        while stopped.try_recv().is_err() {
            writer.apply(apply(policy(&format!("p-{count:04}"), "platform"))).await.unwrap();
            count += 1;
        }
        count
    });
    let mut last = 0;
    for number in 0..5 {
        let file = at(&format!("backup-{number}"));
        let printed = succeeds(&["backup", path(&file), "--data", path(&data)]);
        assert!(printed.contains("authority's key, unencrypted"), "{printed}");
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        // At one revision: the counter of the audit log, its records and the policies belong together.
        let target = StoreUrl::file(at(&format!("copy-{number}")));
        succeeds(&["restore", path(&file), &target.to_string()]);
        let store = open(&target).await.unwrap();
        let count = async |below: &[&str]| store.list(&Prefix::new(below).unwrap()).await.unwrap().entries.len();
        let counter = store.read(&Key::new(&["meta", "audit"]).unwrap()).await.unwrap().unwrap();
        let counter: usize = String::from_utf8_lossy(&counter.value).parse().unwrap();
        let objects = count(&["object"]).await;
        assert_eq!(count(&["audit"]).await, counter);
        assert!(counter > objects && objects >= last, "{counter} records, {objects} objects");
        last = objects;
    }
    let _ = stop.send(());
    let written = writing.await.unwrap();
    assert!(written >= last && last > 0);
    fails(&["backup", path(&at("backup-0")), "--data", path(&data)], &["backup-0 exists already"]);
    let file = at("backup");
    // As `kubectl exec … > FILE` does.
    let output = run(&["backup", "-", "--data", path(&data)]);
    assert!(output.status.success(), "{}", text(&output));
    std::fs::write(&file, &output.stdout).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&format!("({} bytes)", output.stdout.len())) && said.contains("unencrypted"), "{said}");
    let printed = succeeds(&["restore", "--check", path(&file)]);
    assert!(printed.contains("is complete"), "{printed}");
    // A reader that ends early is an error.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = hub().args(["backup", "-", "--data", path(&data)]).stdout(full).output().unwrap();
    assert!(!output.status.success() && text(&output).contains("standard output"), "{}", text(&output));
    let expected = policies(&mut admin).await;
    drop(process);
    // A hub that is stopped is backed up too; what a killed one leaves is not in the way.
    succeeds(&["backup", path(&at("cold")), "--store", &format!("file:{}/hub.redb", data.display())]);

    // Somewhere else, with all that a hub needs.
    let other = at("other");
    let store = format!("file:{}/hub.redb", other.display());
    let restore = ["restore", path(&file), &store, "--data", path(&other)];
    let mut from_input = restore;
    from_input[1] = "-";
    let input = std::fs::File::open(&file).unwrap();
    let output = hub().args(from_input).stdin(input).output().unwrap();
    let printed = text(&output);
    assert!(output.status.success(), "{printed}");
    assert!(["ca.key", "admin.context", "verified"].iter().all(|it| printed.contains(it)), "{printed}");
    assert!(succeeds(&restore).contains("complete already"), "it can be repeated");
    let process = start(&other, &ports, &log);
    let mut admin = administrator(&other, &process).await;
    assert_eq!(policies(&mut admin).await, expected);
    let epoch = async |folder: &Path, process: Option<Process>| {
        drop(process);
        let url = StoreUrl::file(folder.join("hub.redb"));
        let store = loop {
            match open(&url).await {
                Ok(store) => break store,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        store.read(&Key::new(&["meta", "epoch"]).unwrap()).await.unwrap().unwrap().value
    };
    assert_ne!(epoch(&other, Some(process)).await, epoch(&data, None).await, "members receive everything again");

    // What is not a backup, or does not fit, changes nothing.
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let (damaged, absent) = (at("damaged"), format!("file:{}", at("absent").display()));
    std::fs::write(&damaged, &bytes).unwrap();
    fails(&["restore", path(&damaged), &absent], &["damaged", "checksum"]);
    bytes[middle] ^= 1;
    for length in [100, middle, bytes.len() - 1] {
        std::fs::write(&damaged, &bytes[..length]).unwrap();
        fails(&["restore", path(&damaged), &absent], &["damaged or incomplete"]);
        fails(&["restore", "--check", path(&damaged)], &["damaged or incomplete"]);
    }
    std::fs::write(&damaged, "kind: Pod").unwrap();
    fails(&["restore", path(&damaged), &absent], &["not a backup"]);
    assert!(!at("absent").exists());
    initialise(&at("third"));
    let third = format!("file:{}/hub.redb", at("third").display());
    fails(&["restore", path(&file), &third], &["is not empty"]);
    fails(&["restore", path(&file), &absent, "--data", path(&at("third"))], &["another ClusterSet"]);
    fails(&["backup", path(&at("none")), "--store", &absent], &["does not exist"]);
    assert!(!at("none").exists());
}

#[tokio::test]
async fn the_key_of_the_authority_moves_into_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (data, key_file, other) = (at("hub"), at("unlock.key"), at("other.key"));
    let ports = initialise(&data);
    let store = format!("file:{}/hub.redb", data.display());
    let seal = ["store", "seal", "--data", path(&data), "--key-file", path(&key_file)];
    let run_with = |key: &Path| {
        let arguments = ["run", "--listen", &*ports[0], "--join-listen", &*ports[1], "--store", &*store, "--key-file"];
        let mut command = hub();
        command.args(arguments).arg(key).current_dir(folder.path());
        command
    };
    let refused = |key: &Path| String::from_utf8(run_with(key).output().unwrap().stderr).unwrap();
    std::fs::write(&other, [9; 32]).unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(refused(&other).contains("hanse-hub store seal"), "{}", refused(&other));
    assert!(succeeds(&seal).contains("--key-file"));
    assert_eq!(std::fs::metadata(&key_file).unwrap().len(), 32);
    succeeds(&seal);
    let mut with_other = seal;
    with_other[5] = path(&other);
    fails(&with_other, &["other.key does not unlock"]);
    assert!(refused(&other).contains("other.key does not unlock"), "{}", refused(&other));
    std::fs::remove_file(data.join("ca.key")).unwrap();
    let child = run_with(&key_file).stderr(Stdio::null()).spawn().unwrap();
    let process = Process { child, listen: ports[0].clone(), join: ports[1].clone() };
    let mut admin = administrator(&data, &process).await;
    admin.apply(apply(policy("sealed", "platform"))).await.unwrap();
    let printed = succeeds(&["backup", path(&at("backup")), "--data", path(&data)]);
    assert!(!printed.contains("unencrypted") && !printed.contains("does not contain"), "{printed}");
    let backup = std::fs::read(at("backup")).unwrap();
    assert!(!backup.windows(11).any(|it| it == b"PRIVATE KEY"));
}
