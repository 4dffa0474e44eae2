//! Clusters, join tokens and the ClusterSet as custom resources: `hanse-member` is a process.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use hanse_e2e::kubernetes::kubeconfig::write_private;
use hanse_e2e::kubernetes::{Controllers, run, until};
use hanse_e2e::process::Process;
use serde_json::{Value, json};

use super::{PATIENCE, World};
use crate::chart::NAMESPACE;

impl World {
    /// A file with the join token of a Secret.
    fn token(&self, secret: &str) -> PathBuf {
        let template = "go-template={{.data.token | base64decode}}";
        let token = self.succeed(&["get", "secret", secret, "-n", NAMESPACE, "-o", template]);
        let path = self.folder.path().join(format!("{secret}.token"));
        write_private(&path, &token).expect("it is written");
        path
    }

    fn member(&self, cluster: &str, token: &PathBuf) -> Process {
        let source = self.folder.path().join(format!("{cluster}-source"));
        fs::create_dir_all(&source).expect("a folder");
        let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n";
        fs::write(source.join("namespace.yaml"), namespace).expect("written");
        let mut command = Command::new(crate::system::programs().join("hanse-member"));
        let [hub, join] = self.listen.map(|it| it.to_string());
        command.args(["run", "--cluster", cluster, "--hub", &hub, "--join", &join, "--source"]).arg(source);
        command.args(["--agent-listen", "127.0.0.1:0", "--enrol-listen", "127.0.0.1:0", "--token-file"]).arg(token);
        command.arg("--data").arg(self.folder.path().join(cluster));
        let log = self.folder.path().join(format!("member-{cluster}.log"));
        Process::start_bound(command, &log).expect("it starts")
    }

    fn patch(&self, object: &str, patch: &Value) {
        self.succeed(&["patch", object, "--type=merge", "-p", &patch.to_string()]);
    }

    fn is(&self, object: &str, kind: &str, expected: [&str; 2]) -> bool {
        self.condition(object, kind) == expected.map(str::to_owned)
    }

    async fn until_is(&self, object: &str, kind: &str, expected: [&str; 2]) {
        self.until(&format!("{object}: {kind} is {expected:?}"), || self.is(object, kind, expected)).await;
    }

    fn clusters(&self) -> Value {
        let (success, text) = self.hanse(&["cluster", "list", "-o", "json"]);
        assert!(success, "{text}");
        serde_json::from_str::<Value>(&text).expect("JSON")["items"].clone()
    }
}

const EAST: &str = "apiVersion: hanse.dev/v1alpha1
kind: MemberCluster
metadata: {name: east}
spec: {labels: {env: prod}, grants: {namespaces: ['*'], cidrs: [10.1.0.0/16]}}
";

fn token(name: &str, cluster: &str, more: &str) -> String {
    format!(
        "apiVersion: hanse.dev/v1alpha1\nkind: ClusterJoinToken\nmetadata: {{name: {name}}}\nspec: {{cluster: {cluster}, secretName: {name}{more}}}\n"
    )
}

#[test]
fn clusters_join_are_accepted_suspended_and_removed_by_their_custom_resource() {
    run(async {
        let world = World::start().await;
        // In any order: the tokens and their cluster, which another one overlaps.
        let west = EAST.replace("east", "west");
        world.apply(&format!("{}---\n{EAST}", token("east-1", "east", ", accept: false")));
        world.until_is("mc/east", "Accepted", ["False", "NotJoined"]).await;
        world.until_is("cjt/east-1", "Issued", ["True", "Issued"]).await;
        world.apply(&west);
        world.until_is("mc/west", "Accepted", ["False", "Conflict"]).await;
        let message = world.status("mc/west")["conditions"][0]["message"].to_string();
        assert!(message.contains("overlaps with 10.1.0.0/16"), "{message}");
        world.until("an Event", || world.kubectl(&["get", "events", "-A"]).1.contains("Conflict")).await;

        // It joins, and waits. Users do not accept it.
        let mut east = world.member("east", &world.token("east-1"));
        world.until_is("mc/east", "Accepted", ["False", "AwaitingAcceptance"]).await;
        assert!(world.is("mc/east", "Connected", ["False", "NotAccepted"]));
        let (accepted, text) = world.hanse(&["cluster", "accept", "east"]);
        assert!(!accepted && text.contains("spec.acceptance"), "{text}");
        world.patch("mc/east", &json!({"spec": {"acceptance": "Accepted"}}));
        let waited = world.kubectl(&["wait", "--for=condition=Connected", "--timeout=60s", "mc/east"]);
        assert!(waited.0, "{}\n{}\n{}", waited.1, world.hub_log(), east.log());
        world.until_is("mc/east", "Accepted", ["True", "Accepted"]).await;
        world.until_counted(|| world.status("mc/east")["digestsEqual"] == true).await;
        let status = world.status("mc/east");
        assert_eq!((&status["keyExchange"], &status["agents"]), (&json!("X25519MLKEM768"), &json!("0/0")), "{status}");
        assert!(status["certificateExpirationTime"].is_string() && status["connectionTime"].is_string(), "{status}");
        assert!(world.is("mc/east", "Enforcing", ["False", "NoAgents"]), "{status}");
        world.until_is("cjt/east-1", "Used", ["True", "Used"]).await;
        let shown = world.succeed(&["get", "mc,cjt", "-o", "wide"]);
        assert!(!shown.contains("<invalid>"), "{shown}");

        // It is suspended, and returns with what it has.
        world.patch("mc/east", &json!({"spec": {"acceptance": "Pending"}}));
        world.until_is("mc/east", "Accepted", ["False", "AwaitingAcceptance"]).await;
        world.patch("mc/east", &json!({"spec": {"acceptance": "Accepted"}}));
        world.until_is("mc/east", "Connected", ["True", "Connected"]).await;

        // Its deletion removes its registration, and the token that it used. Its grants are free.
        assert_eq!(world.clusters().as_array().map(Vec::len), Some(1), "{}", world.clusters());
        world.succeed(&["delete", "--timeout=60s", "mc/east"]);
        world.until_is("mc/west", "Accepted", ["False", "NotJoined"]).await;
        world.until_is("cjt/east-1", "Expired", ["True", "Revoked"]).await;
        let names = world.clusters();
        assert!(!names.to_string().contains("east"), "{names}");
        let (_, audit) = world.hanse(&["audit", "-o", "json", "--object", "cluster/east"]);
        for action in ["cluster.accept", "cluster.suspend", "cluster.remove"] {
            assert!(audit.contains(action), "{action}: {audit}");
        }
        // What its MemberCluster says precedes the token, from the first moment on.
        world.patch("mc/west", &json!({"spec": {"acceptance": "Pending"}}));
        world.until("it is stored", || world.hanse(&["get", "mc", "west", "-o", "json"]).1.contains("Pending")).await;
        world.apply(&token("west-1", "west", ", accept: true"));
        world.until_is("cjt/west-1", "Issued", ["True", "Issued"]).await;
        let _west = world.member("west", &world.token("west-1"));
        world.until_is("mc/west", "Accepted", ["False", "AwaitingAcceptance"]).await;
        let (_, audit) = world.hanse(&["audit", "-o", "json", "--object", "cluster/west"]);
        assert!(audit.contains("join") && !audit.contains("cluster.suspend"), "never accepted: {audit}");

        // The member that runs does not register again.
        world.until("it is refused", || east.log().contains("revoked") || east.log().contains("not admitted")).await;
        assert!(!east.has_ended() && !world.kubectl(&["get", "mc/east"]).0);
        assert_eq!(world.forbidden(), Vec::<String>::new());
    });
}

#[test]
fn clusters_that_joined_without_custom_resource_get_one_with_their_grants() {
    run(async {
        let mut world = World::prepare().await;
        // The hub ran without an operator: a cluster has joined, and another one is expected, with grants.
        let mut command = world.hub_command("run");
        command.stdout(std::process::Stdio::null());
        let log = world.folder.path().join("hub.log");
        world.hub = Some(Process::start_bound(command, &log).expect("it starts"));
        world.until("it serves", || world.hub_log().contains("hub is serving")).await;
        let manifest = world.folder.path().join("east.yaml");
        fs::write(&manifest, EAST).expect("written");
        let tier = world.folder.path().join("tier.yaml");
        fs::write(&tier, super::TIER).expect("written");
        for file in [&manifest, &tier] {
            let (applied, text) = world.hanse(&["apply", "-f", file.to_str().expect("UTF-8")]);
            assert!(applied, "{text}");
        }
        let (made, text) = world.hanse(&["token", "create", "--cluster", "joined"]);
        assert!(made, "{text}");
        let path = world.folder.path().join("joined.token");
        write_private(&path, &text).expect("it is written");
        let _member = world.member("joined", &path);
        world.until("it has joined", || world.clusters().to_string().contains("joined")).await;
        let spec = |world: &World| {
            let text = world.hanse(&["get", "MemberCluster", "east", "-o", "json"]).1;
            serde_json::from_str::<Value>(&text).expect("JSON")["spec"].clone()
        };
        let before = spec(&world);

        world.hub.take().expect("it runs").stop(PATIENCE).expect("it stops");
        world.start_hub();
        world.until_is("mc/joined", "Connected", ["True", "Connected"]).await;
        world.until_is("mc/east", "Accepted", ["False", "NotJoined"]).await;
        assert_eq!((spec(&world), before["grants"]["cidrs"].clone()), (before.clone(), json!(["10.1.0.0/16"])));
        let cidrs = world.succeed(&["get", "mc/east", "-o", "jsonpath={.spec.grants.cidrs}"]);
        assert_eq!(cidrs, r#"["10.1.0.0/16"]"#);

        // What no custom resource explains stays in force, and is reported.
        assert!(world.stored().contains("platform"));
        world.apply("apiVersion: hanse.dev/v1alpha1\nkind: ClusterSet\nmetadata: {name: default}\nspec: {trustDomain: hanse.local}\n");
        world.until_is("cset/default", "Synchronized", ["False", "ObjectsWithoutResource"]).await;
        assert_eq!(world.status("cset/default")["objectsWithoutResource"], json!(["Tier/platform"]));
        world.apply(super::TIER);
        world.until_is("cset/default", "Synchronized", ["True", "Synchronized"]).await;
        world.until_counted(|| world.status("cset/default")["clusters"] == "1/1").await;

        // A cluster that joins now gets one, too.
        let (_, text) = world.hanse(&["token", "create", "--cluster", "later"]);
        let path = world.folder.path().join("later.token");
        write_private(&path, &text).expect("it is written");
        let _later = world.member("later", &path);
        world.until_is("mc/later", "Connected", ["True", "Connected"]).await;
    });
}

#[test]
fn join_tokens_are_written_once() {
    run(async {
        let world = World::start().await;
        let _controllers = Controllers::start(&world.server).await.expect("they work");
        world.succeed(&["create", "secret", "generic", "taken", "-n", NAMESPACE, "--from-literal=a=b"]);
        world.apply(&format!("{}---\n{}", token("good", "a", ""), token("taken", "a", ", lifetimeSeconds: 60")));
        world.until_is("cjt/good", "Issued", ["True", "Issued"]).await;
        world.until_is("cjt/taken", "Issued", ["False", "SecretExists"]).await;
        let kept = world.succeed(&["get", "secret", "taken", "-n", NAMESPACE, "-o", "jsonpath={.data}"]);
        assert_eq!(kept, r#"{"a":"Yg=="}"#);
        let secret = fs::read_to_string(world.token("good")).expect("it is read");
        assert!(secret.starts_with("hanse-join.v1.a."), "a join token");
        let last = secret.rsplit('.').next().expect("the secret part");
        let object = world.succeed(&["get", "cjt/good", "-o", "json"]);
        assert!(!object.contains(last) && !world.hub_log().contains(last), "the secret is in the Secret only");

        // The Secret is deleted: it is not written again, also by another hub.
        let id = world.status("cjt/good")["tokenId"].as_str().expect("an id").to_owned();
        world.succeed(&["delete", "secret", "good", "-n", NAMESPACE]);
        // The other one gets its Secret when its name is free.
        world.succeed(&["delete", "secret", "taken", "-n", NAMESPACE]);
        world.until_is("cjt/taken", "Issued", ["True", "Issued"]).await;
        let mut world = world;
        world.hub_is_killed();
        // Also where the status is gone: the hub remembers.
        world.succeed(&["patch", "cjt/good", "--subresource=status", "--type=merge", "-p", r#"{"status":null}"#]);
        world.start_hub();
        world.apply(&token("next", "a", ", lifetimeSeconds: 2"));
        world.until_is("cjt/next", "Issued", ["True", "Issued"]).await;
        world.until("the same token", || world.status("cjt/good")["tokenId"] == json!(id)).await;
        assert!(!world.kubectl(&["get", "secret", "good", "-n", NAMESPACE]).0);
        world.until_is("cjt/next", "Expired", ["True", "Expired"]).await;
        assert!(world.is("cjt/good", "Expired", ["False", "Valid"]));

        // Deletion revokes, and the Secret goes with it.
        let tokens = || world.hanse(&["token", "list", "-o", "json"]).1;
        assert!(tokens().contains(&id), "{}", tokens());
        world.succeed(&["delete", "--timeout=60s", "cjt/good", "cjt/taken"]);
        assert!(!tokens().contains(&id), "{}", tokens());
        world.until("garbage", || !world.kubectl(&["get", "secret", "taken", "-n", NAMESPACE]).0).await;
        assert_eq!(world.forbidden(), Vec::<String>::new());
    });
}

#[test]
fn cluster_set_configures_the_hub_and_keeps_its_trust_domain() {
    run(async {
        let world = World::start().await;
        let cluster_set = |spec: &str| {
            format!("apiVersion: hanse.dev/v1alpha1\nkind: ClusterSet\nmetadata: {{name: default}}\nspec: {{{spec}}}\n")
        };
        world.apply(&cluster_set("trustDomain: other.example, leaseSeconds: 300"));
        world.until_is("cset/default", "Ready", ["False", "TrustDomainMismatch"]).await;
        world.until("an Event", || world.kubectl(&["get", "events", "-A"]).1.contains("TrustDomainMismatch")).await;
        assert!(!world.hub_log().contains("the lease of clusters has changed"));
        world.succeed(&["delete", "--timeout=60s", "cset/default"]);

        world.apply(&token("east-1", "east", ", accept: true"));
        world.until_is("cjt/east-1", "Issued", ["True", "Issued"]).await;
        let _east = world.member("east", &world.token("east-1"));
        world.until_is("mc/east", "Connected", ["True", "Connected"]).await;
        let defaults = "defaults: {limits: {endpoints: 7}, joinTokenSeconds: 2}";
        world.apply(&cluster_set(&format!("trustDomain: hanse.local, leaseSeconds: 5, {defaults}")));
        world.until_is("cset/default", "Ready", ["True", "Ready"]).await;
        world.until("the lease is used", || world.hub_log().contains("the lease of clusters has changed")).await;
        let log = world.hub_log();
        let changed = log.lines().find(|line| line.contains("the lease of clusters has changed")).expect("found");
        assert!(changed.contains("lease_seconds=5") && !changed.contains("closed=0"), "{changed}");
        // The member has connected again, with heartbeats for the new lease: it does not become silent.
        world.until_is("mc/east", "Connected", ["True", "Connected"]).await;
        let limits = || world.hanse(&["get", "MemberCluster", "east", "-o", "json"]).1;
        world
            .until("defaults", || limits().contains(r#""endpoints": 7"#) || limits().contains(r#""endpoints":7"#))
            .await;
        assert!(
            world.succeed(&["get", "mc/east", "-o", "jsonpath={.spec}"]).len() <= 2,
            "the object stays as it was written"
        );
        world.apply(&token("short", "east", ""));
        world.until_is("cjt/short", "Expired", ["True", "Expired"]).await;
        let root = world.status("cset/default")["rootFingerprint"].to_string();
        assert!(root.len() > 60, "{root}");

        // Without it, the settings of the command line are back.
        world.succeed(&["delete", "--timeout=60s", "cset/default"]);
        world.until("removed", || !limits().contains("endpoints")).await;
        let renewed = until(PATIENCE, async || world.hub_log().contains("lease_seconds=30"));
        assert!(renewed.await.is_some(), "{}", world.hub_log());
        assert_eq!(world.forbidden(), Vec::<String>::new());
    });
}
