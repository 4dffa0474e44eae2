//! The life of a node: enrolled, restarted without a member, revoked, late, enrolled anew.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use hanse_e2e::deployment::{Deployment, PATIENCE};
use hanse_e2e::fabric::Fabric;
use hanse_e2e::probe::{self, Listener, Observed};
use hanse_e2e::process::Process;
use hanse_e2e::sandbox;
use hanse_e2e::world::{Cluster, Node, Pod};
use serde_json::Value;

use crate::system::programs;

/// Where the member does not run.
const NODE: &str = "node-2";

/// One cluster of the demo.
struct World {
    cluster: Cluster,
    scratch: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/train");
        let cluster = Cluster::read("train", &directory).expect("the demo's manifests");
        Self { cluster, scratch: tempfile::tempdir_in("/run").expect("a folder") }
    }

    fn node(&self) -> &Node {
        self.cluster.nodes.iter().find(|it| it.name == NODE).expect("in the demo")
    }

    fn pod(&self, name: &str) -> &Pod {
        self.cluster.pods.iter().find(|pod| pod.name == name).expect("in the demo")
    }

    fn join<'f>(&self, fabric: &'f Fabric, lifetime: Option<u32>) -> Deployment<'f> {
        let mut system = Deployment::start_with(fabric, &programs(), self.scratch.path(), lifetime).expect("a hub");
        let clusters = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/federation/clusters.yaml");
        system.hanse(&["apply", "-f", &clusters.to_string_lossy()]).expect("applied");
        system.join(&self.cluster, &self.cluster.directory).expect("joined");
        system.settle(&["train"]).expect("in sync");
        system
    }

    fn data(&self) -> PathBuf {
        self.scratch.path().join(format!("agent-train-{NODE}"))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.scratch.path().join(format!("agent-train-{NODE}.log"))).unwrap_or_default()
    }

    fn said(&self, text: &str) -> usize {
        self.log().matches(text).count()
    }

    /// Waits until the agent has said `text` more than `before` times.
    fn says(&self, text: &str, before: usize) {
        let said = probe::until(PATIENCE, || self.said(text) > before);
        assert!(said.is_some(), "it does not say {text:?}:\n{}", self.log());
    }

    fn status(&self) -> Value {
        let data = self.data();
        let output = run("hanse-agent", &["status", "-o", "json", "--data", &data.to_string_lossy()]);
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        assert!(status.is_null() || status["kind"] == "AgentStatus", "{status}");
        status
    }

    /// Waits until the agent says so of itself.
    fn becomes(&self, running: bool, connected: bool) {
        let is = || {
            let status = self.status();
            (&status["running"], &status["connected"]) == (&running.into(), &connected.into())
        };
        assert!(probe::until(PATIENCE, is).is_some(), "{}\n{}", self.status(), self.log());
    }

    /// Of `hanse-member` with the member's folder.
    fn member(&self, arguments: &[&str]) -> Output {
        let data = self.scratch.path().join("member-train");
        let output = run("hanse-member", &[arguments, &["--data", &data.to_string_lossy()]].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        output
    }

    /// What `hanse-member` lists.
    fn listed(&self, what: &str) -> Vec<Value> {
        let list: Value = serde_json::from_slice(&self.member(&[what, "list", "-o", "json"]).stdout).expect("JSON");
        assert_eq!(list["apiVersion"], "cli.hanse.dev/v1");
        list["items"].as_array().expect("a list").clone()
    }

    /// A new token for the node, where its agent looks for one.
    fn new_token(&self) {
        let token = self.member(&["node-token", "create", "--node", NODE]).stdout;
        // The file of the first, readable by its owner only.
        std::fs::write(self.token(), token).expect("written");
    }

    fn token(&self) -> PathBuf {
        self.scratch.path().join(format!("train-{NODE}.token"))
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(programs().join(program)).args(arguments).output().expect("it starts")
}

#[test]
fn node_without_rules_denies_without_a_member() {
    sandbox::test("nodes::node_without_rules_denies_without_a_member", || {
        let world = World::new();
        let fabric = Fabric::build(std::slice::from_ref(&world.cluster)).expect("the network");
        let (from, to) = (world.pod("trainer-1"), world.pod("registry-0"));
        let _listener =
            Listener::start(fabric.pod(to).expect("built"), to.port, &to.title()).expect("the port is free");
        let observed = || {
            let inside = fabric.pod(from).expect("built");
            [0, 1].map(|family| probe::tcp(inside, SocketAddr::new(to.addresses[family], to.port), &to.title()))
        };
        let mut system = world.join(&fabric, None);
        assert_eq!(observed(), [const { Observed::Open }; 2]);
        let (log, closed) = (world.log(), "closed until the first rules arrive");
        let (closed, enforced) = (log.find(closed), log.find(" enforced "));
        assert!(closed.is_some() && closed < enforced, "a new node is closed before its first rules:\n{log}");

        // As after a restart of the machine without its snapshot, while the member is away.
        system.kill_agent("train", NODE).expect("killed");
        system.kill_member("train").expect("killed");
        world.becomes(false, false);
        let node = fabric.node("train", NODE).expect("built");
        let cleaned = node.enter(|| run("hanse-agent", &["cleanup"]));
        assert!(cleaned.status.success(), "{cleaned:?}");
        std::fs::write(world.data().join("ruleset.snapshot"), "no snapshot").expect("written");
        assert_eq!(observed(), [const { Observed::Open }; 2], "nothing is in force");
        system.start_agent(&world.cluster, world.node()).expect("started");
        let closed = probe::until(PATIENCE, || observed() == [const { Observed::Closed }; 2]);
        assert!(closed.is_some(), "{}", world.log());
        world.becomes(true, false);
        assert_eq!(world.status()["podRanges"], serde_json::json!(["10.10.2.0/24", "fd00:10:2::/64"]));
        system.start_member(&world.cluster, &world.cluster.directory).expect("started");
        let open = probe::until(PATIENCE, || observed() == [const { Observed::Open }; 2]);
        assert!(open.is_some(), "{}", world.log());
        world.becomes(true, true);
    });
}

#[test]
fn only_the_key_of_the_last_enrolment_is_accepted() {
    sandbox::test("nodes::only_the_key_of_the_last_enrolment_is_accepted", || {
        let world = World::new();
        let fabric = Fabric::build(std::slice::from_ref(&world.cluster)).expect("the network");
        let mut system = world.join(&fabric, None);
        let enrolled = world.listed("node");
        let states: Vec<_> = enrolled.iter().map(|it| (it["node"].as_str(), it["state"].as_str())).collect();
        assert_eq!(states, [(Some("node-1"), Some("enrolled")), (Some(NODE), Some("enrolled"))]);
        world.becomes(true, true);
        system.kill_agent("train", NODE).expect("killed");
        world.becomes(false, false);

        // What is refused is said, and nothing is used up.
        let member = world.cluster.nodes[0].addresses[0];
        let (agents, enrol) = (format!("{member}:7500"), format!("{member}:7501"));
        let refused = |node: &str, folder: &str, said: &str| {
            let data = world.scratch.path().join(folder);
            let token = world.token();
            let arguments = ["run", "--node", node, "--member", &agents, "--enrol", &enrol, "--data"];
            let files = [data.to_str().expect("a path"), "--token-file", token.to_str().expect("a path")];
            let inside = fabric.node("train", NODE).expect("built");
            let output = inside.enter(|| run("hanse-agent", &[&arguments[..], &files].concat()));
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.code() == Some(1) && error.contains(said), "{:?}: {error}", output.status);
        };
        for time in 0..5 {
            refused(NODE, &format!("again-{time}"), "hanse-agent: the member refused: the token is not valid");
        }
        world.new_token();
        let other = "hanse-agent: the member refused: the token is for node node-2, not for node node-9";
        refused("node-9", "other", other);
        let states: Vec<_> = world.listed("node-token").iter().map(|it| it["state"].to_string()).collect();
        assert_eq!(states.iter().filter(|it| *it == "\"unused\"").count(), 1, "{states:?}");

        // What is tried again is said with its cause.
        let mut nowhere = Command::new(programs().join("hanse-agent"));
        nowhere.args(["run", "--node", NODE, "--member", &agents, "--enrol", &format!("{member}:9"), "--token-file"]);
        nowhere.arg(world.token()).arg("--data").arg(world.scratch.path().join("nowhere"));
        let inside = fabric.node("train", NODE).expect("built");
        let log = world.scratch.path().join("nowhere.log");
        let mut nowhere = Process::start(inside, nowhere, &log).expect("started");
        assert!(nowhere.wait_for("reach the member: connect to", PATIENCE), "{}", nowhere.log());
        assert!(nowhere.log().contains("connection refused"), "{}", nowhere.log());
        drop(nowhere);

        // Revoked while it is connected, it goes; the token that was made before helps it no more.
        system.start_agent(&world.cluster, world.node()).expect("started");
        world.becomes(true, true);
        world.member(&["node", "revoke", NODE]);
        world.says("the member refuses this node", 0);
        world.says("set --token-file to a new node token", 0);
        world.becomes(true, false);
        assert_eq!(world.listed("node")[1]["state"], "revoked");
        // A new one in the same file does, without a restart.
        let enrolled = world.said("enrolled node=\"node-2\"");
        world.new_token();
        world.becomes(true, true);
        assert_eq!(world.said("enrolled node=\"node-2\""), enrolled + 1, "{}", world.log());
        assert_eq!(world.listed("node")[1]["state"], "enrolled");
    });
}

/// A typo in the path or in the name of a node is not taken for a revocation.
#[test]
fn offline_commands_fail_in_a_directory_that_is_not_of_a_joined_member() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("typo");
    for command in [
        &["node", "list"][..],
        &["node", "revoke", "node-1"],
        &["node-token", "list"],
        &["node-token", "revoke", "0123456789abcdef"],
        &["node-token", "create", "--node", "node-1", "--wait-seconds", "0"],
        &["flows"],
    ] {
        let output = run("hanse-member", &[command, &["--data", &data.to_string_lossy()]].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{command:?}: {error}");
        assert!(error.contains("typo is not the directory of a member that has joined"), "{command:?}: {error}");
        assert!(!data.exists(), "{command:?} creates nothing");
    }
}

/// Its directory is gone, so that it has another authority than the one at which the node enrolled.
#[test]
fn node_enrols_again_at_a_new_member() {
    sandbox::test("nodes::node_enrols_again_at_a_new_member", || {
        let world = World::new();
        let fabric = Fabric::build(std::slice::from_ref(&world.cluster)).expect("the network");
        let mut system = world.join(&fabric, None);
        world.becomes(true, true);
        system.kill_member("train").expect("killed");
        std::fs::remove_dir_all(world.scratch.path().join("member-train")).expect("removed");
        system.hanse(&["cluster", "revoke", "train"]).expect("revoked");
        system.make_token("train").expect("a token");
        system.start_member(&world.cluster, &world.cluster.directory).expect("started");
        // Nothing is presented of the token with which it enrolled at the former authority.
        world.says("has another authority than the one at which this node enrolled", 0);
        world.says("is of the former authority: put a new node token", 0);
        world.becomes(true, false);
        let why = world.status()["notInSync"].as_str().unwrap_or_default().to_owned();
        assert!(why.contains("an authority that is not trusted here"), "{why}");
        let enrolled = world.said("enrolled node=\"node-2\"");
        world.new_token();
        world.becomes(true, true);
        assert_eq!(world.status()["notInSync"], "");
        assert_eq!(world.said("enrolled node=\"node-2\""), enrolled + 1, "{}", world.log());

        // An agent of a node that the source does not know, such as one whose name is misspelt.
        let token = world.scratch.path().join("node-9.token");
        let made = world.member(&["node-token", "create", "--node", "node-9"]).stdout;
        hanse_runtime::files::write_secret(&token, &made).expect("written");
        let member = world.cluster.nodes[0].addresses[0];
        let mut stranger = Command::new(programs().join("hanse-agent"));
        stranger.args([
            "run",
            "--node",
            "node-9",
            "--member",
            &format!("{member}:7500"),
            "--enrol",
            &format!("{member}:7501"),
        ]);
        let data = world.scratch.path().join("stranger");
        stranger.arg("--token-file").arg(token).arg("--data").arg(&data);
        system.kill_agent("train", NODE).expect("killed");
        let inside = fabric.node("train", NODE).expect("built");
        let stranger = Process::start(inside, stranger, &world.scratch.path().join("stranger.log")).expect("started");
        let known = probe::until(PATIENCE, || {
            let status = system.try_hanse(&["status"]).expect("it runs").stdout;
            String::from_utf8_lossy(&status)
                .contains("node node-9: its agent is connected, but the source has no Node of this name")
        });
        assert!(known.is_some(), "{}\n{}", stranger.log(), system.logs());
        let status = run("hanse-agent", &["status", "--data", &data.to_string_lossy()]).stdout;
        let status = String::from_utf8_lossy(&status).into_owned();
        assert!(status.contains("check that its cluster has a Node node-9"), "{status}");
    });
}

#[test]
fn expired_certificate_is_renewed_late_or_by_token() {
    sandbox::test("nodes::expired_certificate_is_renewed_late_or_by_token", || {
        let world = World::new();
        let fabric = Fabric::build(std::slice::from_ref(&world.cluster)).expect("the network");
        let mut system = world.join(&fabric, Some(4));
        let away = |system: &mut Deployment<'_>| {
            let before = world.said("this node's certificate expired at");
            system.kill_member("train").expect("killed");
            world.says("this node's certificate expired at", before);
            world.becomes(true, false);
        };
        away(&mut system);
        let late = world.said("late=true");
        system.start_member(&world.cluster, &world.cluster.directory).expect("started");
        world.says("late=true", late);
        world.becomes(true, true);

        // Not where the node was revoked; then a new token does.
        away(&mut system);
        world.member(&["node", "revoke", NODE]);
        system.start_member(&world.cluster, &world.cluster.directory).expect("started");
        world.says("and the member does not renew it: the member refused", 0);
        assert!(!world.status()["connected"].as_bool().expect("a status"));
        world.new_token();
        world.becomes(true, true);
    });
}

/// A file system of its own, so small that it is soon full.
fn small_disk(at: &Path, size: &str) {
    use nix::mount::{MsFlags, mount};
    std::fs::create_dir_all(at).expect("a folder");
    let options = format!("size={size},mode=0700");
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).expect("mounted");
}

/// Until nothing more fits in.
fn fill(disk: &Path) -> PathBuf {
    use std::io::Write as _;
    let path = disk.join("filler");
    let mut file = std::fs::File::create(&path).expect("one more file");
    while file.write_all(&[7; 4_096]).is_ok() {}
    path
}

#[test]
fn full_disk_is_reported_in_status_until_resolved() {
    sandbox::test("nodes::full_disk_is_reported_in_status_until_resolved", || {
        let world = World::new();
        let fabric = Fabric::build(std::slice::from_ref(&world.cluster)).expect("the network");
        let disks = [world.data(), world.scratch.path().join("member-train")];
        disks.iter().for_each(|disk| small_disk(disk, "2m"));
        let system = world.join(&fabric, None);
        let problems = || {
            let status = system.hanse(&["status", "-o", "json"]).unwrap_or_default();
            let status: Value = serde_json::from_str(&status).unwrap_or_default();
            // Applying the demo's federation names other clusters, which never join.
            let train = status["items"].as_array().into_iter().flatten().find(|it| it["name"] == "train");
            train.map_or_else(String::new, |it| [&it["problems"], &it["nodes"]].map(Value::to_string).concat())
        };
        let fillers: Vec<PathBuf> = disks.iter().map(|disk| fill(disk)).collect();
        // What comes now is enforced, and cannot be kept.
        let policies = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/federation");
        system.hanse(&["apply", "-f", &policies.to_string_lossy()]).expect("applied");
        let full = |file: &str| format!("{file} cannot be written: No space left on device");
        let wanted = [full("ruleset.snapshot"), full("receiver.snapshot")];
        let shown = || wanted.iter().all(|problem| problems().contains(problem));
        assert!(probe::until(PATIENCE, shown).is_some(), "{}\n{}", problems(), system.logs());
        system.hanse(&["wait", "--for=enforced", "--timeout", "20", "default-deny"]).expect("enforced all the same");
        assert!(world.status()["digest"].is_string(), "{}", world.log());
        assert_eq!(world.said("ruleset.snapshot\" error=No space"), 1, "it is logged once:\n{}", world.log());

        for filler in fillers {
            std::fs::remove_file(filler).expect("removed");
        }
        let is_over = || !problems().contains("cannot be written");
        assert!(probe::until(PATIENCE, is_over).is_some(), "{}\n{}", problems(), system.logs());
        world.says("written again", 0);
        assert_eq!(world.status()["problems"], serde_json::json!([]));
    });
}
