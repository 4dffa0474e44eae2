//! The README's commands, read from the README and run word for word, as if they were pasted one by one.
//!
//! One thing differs: the programs are built already, so of a command that begins with `cargo build … &&` only what follows
//! is run, in a directory whose `target/debug` contains them. A section's commands run in one shell, in a sandbox, and each must
//! end with exit code 0 before the next begins.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hanse_e2e::fabric::{Fabric, ROUTER};
use hanse_e2e::kubernetes::cluster::{Cluster, Endpoint};
use hanse_e2e::kubernetes::{self, Etcd, kubeconfig};
use hanse_e2e::probe::Observed;
use hanse_e2e::{go, sandbox, world};
use serde_json::{Value, json};

use crate::system::programs;

/// Commands that take longer than this hang.
const PATIENCE_SECONDS: u32 = 180;

/// The code of a section of the README: its indented lines, without those of the sections below it.
fn section(title: &str) -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(&readme).expect("the README");
    let mut lines = text.lines().skip_while(|line| line.trim_start_matches('#') != format!(" {title}"));
    assert!(lines.next().is_some(), "the README has no section {title:?}");
    let lines = lines.take_while(|line| !line.starts_with("## ") && !line.starts_with("### "));
    lines.filter_map(|line| line.strip_prefix("    ")).map(str::to_owned).collect()
}

/// Whether the shell would wait for more: it knows the ends of its own commands best.
fn is_whole(command: &str) -> bool {
    let unfinished = command.ends_with('\\') || command.ends_with('|') || command.ends_with("&&");
    let checked = Command::new("bash").args(["-n", "-c", command]).stderr(Stdio::null()).status().expect("bash");
    !unfinished && checked.success()
}

fn commands(title: &str) -> Vec<String> {
    let (mut commands, mut open) = (Vec::new(), String::new());
    for line in section(title) {
        open.push_str(&line);
        if is_whole(&open) {
            commands.push(std::mem::take(&mut open));
        } else {
            open.push('\n');
        }
    }
    assert!(open.is_empty(), "{title}: this command has no end: {open}");
    assert!(!commands.is_empty(), "{title} has no commands");
    commands
}

/// What is run in a clone whose programs are built.
fn built(command: &str) -> &str {
    if !command.starts_with("cargo build ") {
        return command;
    }
    command.split_once("&& ").map_or("true", |(_, rest)| rest)
}

/// A folder like a clone in which the programs are built.
fn clone() -> tempfile::TempDir {
    let clone = tempfile::tempdir_in("/run").expect("a folder");
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::create_dir_all(clone.path().join("target")).expect("a folder");
    symlink(programs(), clone.path().join("target/debug")).expect("a link");
    std::fs::create_dir_all(clone.path().join("e2e")).expect("a folder");
    for (from, to) in [("demo", "e2e"), ("../deploy", ".")] {
        let copied = Command::new("cp").arg("-r").arg(repository.join(from)).arg(clone.path().join(to)).status();
        assert!(copied.expect("cp").success());
    }
    clone
}

/// One command's exit code and what it printed.
struct Ran {
    command: String,
    code: String,
    output: String,
}

/// Runs a section's commands in one shell, with further variables. Files of the test are in a folder of their own.
fn run(clone: &Path, title: &str, variables: &[(&str, String)]) -> Vec<Ran> {
    let commands = commands(title);
    let files = tempfile::tempdir_in("/run").expect("a folder");
    let file = |at: usize, what: &str| files.path().join(format!("{at}.{what}"));
    // Each command prints into a file of its own, and leaves its exit code in another.
    let mut script = String::new();
    for (at, command) in commands.iter().enumerate() {
        let (out, code, command) = (file(at, "out"), file(at, "code"), built(command));
        script.push_str(&format!("exec >{} 2>&1\n{command}\necho $? >{}\n", out.display(), code.display()));
    }
    let path = files.path().join("script");
    std::fs::write(&path, script).expect("room");
    let mut shell = Command::new("timeout");
    shell.arg(PATIENCE_SECONDS.to_string()).arg("bash").arg(&path).current_dir(clone);
    shell.env_remove("HANSE_CONTEXT").envs(variables.iter().cloned()).stdin(Stdio::null()).status().expect("bash");
    let read = |at: usize, what: &str| std::fs::read_to_string(file(at, what)).unwrap_or_default();
    let ran = commands.into_iter().enumerate().map(|(at, command)| {
        let code = read(at, "code").trim().to_owned();
        Ran { command, code, output: read(at, "out") }
    });
    let ran: Vec<Ran> = ran.collect();
    for it in &ran {
        let logs = || {
            let logs = ["hub.log", "member.log", "node-1.log", "node-2.log"];
            let read = |name: &&str| std::fs::read_to_string(clone.join(name)).unwrap_or_default();
            logs.iter().map(read).collect::<Vec<_>>().join("\n--\n")
        };
        let code = if it.code.is_empty() { "it did not end in time, or the shell ended" } else { &it.code };
        assert_eq!(it.code, "0", "{title}: {}\n{code}: {}\n{}", it.command, it.output, logs());
    }
    ran
}

fn output<'a>(ran: &'a [Ran], command: &str) -> &'a str {
    let found = ran.iter().find(|it| it.command.starts_with(command));
    &found.unwrap_or_else(|| panic!("the README has no command {command:?}")).output
}

#[test]
fn readme_walk_through_ends_in_enforced() {
    sandbox::test("readme::readme_walk_through_ends_in_enforced", || {
        let clone = clone();
        let title = "Run a hub, a cluster and its nodes";
        let before = std::fs::read_dir(clone.path()).expect("the clone").count();
        let ran = run(clone.path(), title, &[]);
        let enforced = output(&ran, "hanse wait --for=enforced");
        assert!(enforced.contains("default-deny is enforced"), "{enforced}");
        let status = output(&ran, "hanse status");
        assert!(status.contains("2 of 2"), "both nodes enforce: {status}");
        let after = std::fs::read_dir(clone.path()).expect("the clone").count();
        assert_eq!(after, before, "its last commands remove what the others made");
        assert_eq!(hanse_e2e::namespace::list().expect("listed"), Vec::<String>::new());
    });
}

#[test]
fn readme_questions_are_answered() {
    sandbox::test("readme::readme_questions_are_answered", || {
        let clone = clone();
        let ran = run(clone.path(), "Evaluate policy", &[]);
        assert!(output(&ran, "echo ").contains("deny: end of tier platform"), "{}", output(&ran, "echo "));
        assert!(output(&ran, "hanse policy diff").contains("TCP 9443"), "{}", output(&ran, "hanse policy diff"));
    });
}

/// What a test cluster has not: a provisioner of volumes.
const VOLUME: &str = "apiVersion: v1
kind: PersistentVolume
metadata: {name: one}
spec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteOnce], hostPath: {path: /one}}
";
const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Clusters like those of a reader, with the demo's workloads.
async fn clusters(fabric: &Fabric, scratch: &Path) -> [Cluster; 3] {
    let etcd = Etcd::start().expect("etcd starts");
    let address = ROUTER.parse().expect("an address");
    let workloads = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/kubernetes");
    let start = async |world: world::Cluster| {
        let (scratch, programs) = (scratch.join(&world.name), programs());
        std::fs::create_dir(&scratch).expect("a folder");
        let cluster = Cluster::start(&etcd, address, &world, fabric, &programs, &scratch).await.expect("it starts");
        // The management cluster has none.
        let text = std::fs::read_to_string(workloads.join(format!("{}.yaml", world.name))).unwrap_or_default();
        cluster.apply(&format!("{VOLUME}---\n{text}")).await.expect("they are applied");
        cluster
    };
    let [train, prod, management] = worlds();
    let (train, prod, management) = tokio::join!(start(train), start(prod), start(management));
    [train, prod, management]
}

fn worlds() -> [world::Cluster; 3] {
    [("train", 10), ("prod", 30), ("management", 40)].map(|(name, number): (&str, u8)| {
        let node = |of: u8| world::Node {
            name: format!("node-{of}"),
            addresses: vec![[192, 168, number, of].into()],
            pod_ranges: vec![format!("10.{number}.{of}.0/24").parse().expect("a range")],
        };
        world::Cluster { name: name.to_owned(), directory: "".into(), nodes: vec![node(1), node(2)], pods: Vec::new() }
    })
}

#[test]
fn readme_policies_are_enforced_in_two_clusters() {
    sandbox::test("readme::readme_policies_are_enforced_in_two_clusters", || {
        let (clone, scratch) = (clone(), tempfile::tempdir_in("/run").expect("a folder"));
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(scratch.path(), open).expect("every user may enter");
        let fabric = Fabric::build(&worlds()).expect("the network");
        fabric.router().enter(|| {
            kubernetes::run(async {
                let clusters = clusters(&fabric, scratch.path()).await;
                let config = kubeconfig::merged(clusters.iter().map(|it| &it.server)).expect("kubeconfigs");
                let path = scratch.path().join("kubeconfig");
                kubeconfig::write_private(&path, &config.to_string()).expect("written");
                let tools = [kubernetes::programs::kubernetes("kubectl"), go::Program::Helm.build()];
                let tools =
                    tools.map(|tool| tool.expect("it is built").parent().expect("a folder").display().to_string());
                let file = |name: &str| scratch.path().join(name).display().to_string();
                let variables = [
                    ("PATH", format!("{}:{}", tools.join(":"), std::env::var("PATH").unwrap_or_default())),
                    ("KUBECONFIG", path.display().to_string()),
                    ("KUBECACHEDIR", file("kubectl-cache")),
                    ("HELM_CACHE_HOME", file("helm-cache")),
                    ("HELM_CONFIG_HOME", file("helm-config")),
                    ("HELM_DATA_HOME", file("helm-data")),
                    ("REGISTRY", "registry.example".to_owned()),
                    ("HUB_DIGEST", DIGEST.to_owned()),
                    ("MEMBER_DIGEST", DIGEST.to_owned()),
                    ("AGENT_DIGEST", DIGEST.to_owned()),
                ];
                let ran = run(clone.path(), "Enforce a policy in two clusters", &variables);
                println!("{}", output(&ran, "kubectl --context management get mc"));
                let table = output(&ran, "kubectl --context management get hanse");
                let is_enforced = |line: &&str| line.contains("2/2") && line.contains("4/4");
                assert_eq!(table.lines().filter(is_enforced).count(), 6, "{table}");

                // Everything goes on when the shell has ended.
                let pod = async |cluster: usize, namespace: &str, label: &str| -> Endpoint {
                    let count = if label == "app=trainer" { 2 } else { 1 };
                    clusters[cluster].ready(namespace, label, count).await.expect("it runs").remove(0)
                };
                let (trainer, registry) =
                    (pod(0, "training", "app=trainer").await, pod(0, "registry", "app=model-registry").await);
                let (vllm, gateway) = (pod(1, "inference", "app=vllm").await, pod(1, "edge", "app=gateway").await);
                for (from, to, expected) in [
                    (&trainer, &registry, Observed::Open),
                    (&vllm, &registry, Observed::Open),
                    (&gateway, &vllm, Observed::Open),
                    (&gateway, &registry, Observed::Closed),
                    (&registry, &trainer, Observed::Closed),
                    (&trainer, &vllm, Observed::Closed),
                ] {
                    assert_eq!(from.observe(to), expected, "{} to {}", from.title(), to.title());
                }

                joins_again(&clusters[0], &variables);
                refuses_unresolved_addresses(&clusters[2], &variables);
                assert!(agent_folder(scratch.path(), "train", 1).exists(), "agents keep their files there");
                // Removed, nothing is left, and all is open again.
                // It goes on in the same shell.
                let mut variables = variables;
                variables[0].1 = format!("{}/target/debug:{}", clone.path().display(), variables[0].1);
                let ran = self::run(clone.path(), "Remove it", &variables);
                ran.iter().for_each(|it| println!("{}\n{}", it.command, it.output));
                for (from, to) in [(&gateway, &registry), (&registry, &trainer), (&trainer, &vllm)] {
                    assert_eq!(from.observe(to), Observed::Open, "{} to {}", from.title(), to.title());
                }
                for cluster in &clusters {
                    nothing_is_left(cluster, &fabric, scratch.path()).await;
                }
            });
        });
    });
}

/// A DaemonSet like that of another policy engine, without pods.
const ENGINE: &str = "apiVersion: apps/v1
kind: DaemonSet
metadata: {name: node-agent, namespace: kube-system}
spec:
  selector: {matchLabels: {app: engine}}
  template:
    metadata: {labels: {app: engine}}
    spec:
      nodeSelector: {no: node}
      containers: [{name: calico-node, image: 'registry.example/mirror/calico/node:v3.30.0'}]
";

/// `hanse join` may be repeated, and what begins beside another policy engine observes.
fn joins_again(train: &Cluster, variables: &[(&str, String)]) {
    hanse_e2e::federation::kubectl(&train.server, &["apply", "-f", "-"], ENGINE).expect("it is applied");
    let join = |more: &[&str]| {
        let mut command = Command::new(programs().join("hanse"));
        command.args(["join", "--kube-context=train", "--hub-context=management", "--cluster=train"]);
        command.args(["--registry=registry.example", "--output=json"]).args(more);
        for image in ["member", "agent"] {
            command.arg(format!("--{image}-digest={DIGEST}"));
        }
        let output = command.envs(variables.iter().cloned()).output().expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{more:?}: {}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    };
    let (joined, notes) = join(&[]);
    let first = joined.clone();
    let joined: Value = serde_json::from_str(&joined).expect("JSON");
    let engines = json!(["Calico (kube-system/node-agent)"]);
    let expected = json!({
        "apiVersion": "cli.hanse.dev/v1", "kind": "Result", "cluster": "train", "namespace": "hanse", "release": "hanse",
        "enforcement": "Enforce", "policyEngines": engines, "nodes": 2,
    });
    assert_eq!(joined, expected, "what enforces goes on: {notes}");
    assert!(!notes.contains("join token"), "a cluster that has joined needs no token: {notes}");

    // A removal that did not end leaves nodes without rules. Repeated, `hanse join` enforces again.
    let mut command = Command::new(programs().join("hanse"));
    command.args(["uninstall", "--kube-context=train", "--timeout=1"]).envs(variables.iter().cloned());
    let aborted = command.output().expect("it runs");
    let message = String::from_utf8_lossy(&aborted.stderr).into_owned();
    assert!(
        !aborted.status.success() && message.contains("to enforce again instead, repeat `hanse join`"),
        "{message}"
    );
    let arguments = || {
        let path = "jsonpath={.spec.template.spec.containers[0].args[0]}";
        hanse_e2e::federation::kubectl(&train.server, &["get", "-n=hanse", "ds/hanse-agent", "-o", path], "")
            .expect("read")
    };
    assert_eq!(arguments(), "cleanup");
    assert_eq!(join(&[]).0, first, "all nodes have rules again");
    assert_eq!(arguments(), "run");

    let (manifests, notes) = join(&["--release=second", "--dry-run"]);
    assert!(manifests.contains("- --enforcement=Observe\n"), "{manifests}");
    assert!(notes.contains("Calico (kube-system/node-agent) enforces policy here"), "{notes}");
}

/// The StatefulSet of a hub whose replicas announce the names of their Services, without pods.
const REPLICAS: &str = "apiVersion: apps/v1
kind: StatefulSet
metadata: {name: other-hanse-hub, namespace: hanse}
spec:
  replicas: 0
  selector: {matchLabels: {app: other}}
  template:
    metadata: {labels: {app: other}}
    spec:
      containers:
      - {name: hub, image: registry.example/hanse-hub, args: [run, '--advertise=$(POD_NAME).hanse.svc:7443']}
";

/// `hanse join` accepts no name of a Service that only the cluster of the hub resolves, and says so before it changes anything.
fn refuses_unresolved_addresses(management: &Cluster, variables: &[(&str, String)]) {
    hanse_e2e::federation::kubectl(&management.server, &["apply", "-f", "-"], REPLICAS).expect("it is applied");
    for (release, host, named) in [
        (
            "hanse",
            "hanse-hub.hanse.svc",
            "--hub hanse-hub.hanse.svc:7443: only the cluster of the hub resolves this name",
        ),
        ("other", "hub.example", "the replicas of the hub announce $(POD_NAME).hanse.svc:7443"),
    ] {
        let mut command = Command::new(programs().join("hanse"));
        command.args(["join", "--kube-context=train", "--hub-context=management", "--cluster=train"]);
        command.args(["--registry=registry.example", "--hub-release", release, "--timeout=1"]);
        command.args([format!("--hub={host}:7443"), format!("--join={host}:7444")]);
        for image in ["member", "agent"] {
            command.arg(format!("--{image}-digest={DIGEST}"));
        }
        let output = command.envs(variables.iter().cloned()).output().expect("it runs");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && message.contains(named), "{message}");
        assert!(!message.contains("installing") && !message.contains("upgrading"), "{message}");
    }
    let delete = ["delete", "--namespace=hanse", "statefulset/other-hanse-hub"];
    hanse_e2e::federation::kubectl(&management.server, &delete, "").expect("it is deleted");
}

/// Where the agent of a node keeps its files.
fn agent_folder(scratch: &Path, cluster: &str, node: u8) -> PathBuf {
    scratch.join(cluster).join("nodes").join(format!("node-{node}/var/lib/hanse/agent"))
}

/// What no object, node or file of a cluster may contain after `hanse uninstall`.
async fn nothing_is_left(cluster: &Cluster, fabric: &Fabric, scratch: &Path) {
    let kubectl = |arguments: &[&str]| {
        let output = cluster.server.kubectl().expect("kubectl").args(arguments).output().expect("it runs");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let name = cluster.name();
    let kinds = kubectl(&["api-resources", "--verbs=list", "-o", "name"]);
    let kinds: Vec<&str> = kinds.lines().filter(|it| !it.starts_with("events")).collect();
    assert!(kinds.contains(&"clusterroles.rbac.authorization.k8s.io"), "{kinds:?}");
    let found = kubectl(&["get", &kinds.join(","), "--all-namespaces", "-o", "name"]);
    let left: Vec<&str> = found.lines().filter(|it| it.contains("hanse")).collect();
    assert!(left.is_empty() && found.contains("namespace/kube-system"), "{name}: {left:?}");
    let nodes = kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].spec.taints[*].key}"]);
    assert!(!nodes.contains("hanse.dev"), "{name}: {nodes}");
    for number in [1, 2] {
        let node = fabric.node(name, &format!("node-{number}")).expect("a node");
        let rules = node.enter(|| Command::new("nft").args(["list", "ruleset"]).output()).expect("nft");
        assert!(rules.status.success(), "{name}: node-{number}: {rules:?}");
        assert!(!String::from_utf8_lossy(&rules.stdout).contains("hanse"), "{name}: node-{number}: {rules:?}");
        let folder = agent_folder(scratch, name, number);
        assert!(!folder.exists(), "{name}: {}", folder.display());
    }
}
