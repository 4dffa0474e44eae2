//! The operator of a hub on a real API server: the hub, kubectl and `hanse` are processes.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use hanse_e2e::kubernetes::{ApiServer, Etcd, Options, manifests, run, until};
use hanse_e2e::process::Process;
use hanse_hub::custom_resources;
use hanse_hub::operator::LEASE;
use serde_json::{Value, json};

use crate::chart;

mod clusters;
mod command;
mod proxy;
mod refusals;
mod replicas;
mod rights;
mod writes;

/// The user that the chart gives the hub.
const USER: &str = "system:serviceaccount:hanse:hanse-hub";
const PATIENCE: Duration = Duration::from_secs(60);
/// Counts are written within a minute.
const COUNTED: Duration = Duration::from_secs(120);

const TIER: &str = "apiVersion: hanse.dev/v1alpha1
kind: Tier
metadata: {name: platform}
spec: {phase: Guard, order: 100, defaultAction: Deny}
";

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"
    )
}

const DENY: &str = "tier: platform, selector: all(), types: [Ingress], ingress: []";

/// The service account of the hub, and its roles and bindings, as the chart renders them.
fn of_chart() -> Vec<Value> {
    let hub = chart::set(chart::set(chart::complete(), "member.enabled", json!(false)), "agent.enabled", json!(false));
    let objects = chart::rendered(&chart::set(hub, "hub.operator", json!({"enabled": true})));
    let kinds = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];
    let rights: Vec<Value> =
        objects.into_iter().filter(|it| it["kind"].as_str().is_some_and(|it| kinds.contains(&it))).collect();
    assert_eq!(rights.len(), 7, "an account, three roles and their bindings: {rights:#?}");
    rights
}

/// A management cluster and a hub.
struct World {
    server: ApiServer,
    /// Of the operator, which has the rights of the chart.
    kubeconfig: PathBuf,
    folder: tempfile::TempDir,
    listen: [SocketAddr; 2],
    /// The URL of the store of the hub; `None`: a file.
    store: Option<String>,
    hub: Option<Process>,
}

/// A management cluster with the definitions and these objects of the chart, and the kubeconfig of the hub's service account.
pub(crate) async fn management(objects: &[Value]) -> (ApiServer, PathBuf) {
    management_with(Options::new("management"), objects).await
}

pub(crate) async fn management_with(options: Options, objects: &[Value]) -> (ApiServer, PathBuf) {
    let etcd = Etcd::start().expect("etcd starts");
    let server = ApiServer::start(&etcd, options).await.expect("it is ready");
    let crds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    let installed = server.kubectl().expect("kubectl").args(["apply", "--server-side", "-f"]).arg(crds).output();
    assert!(installed.expect("it runs").status.success());
    let client = server.client().await.expect("a client");
    for definition in custom_resources::definitions() {
        manifests::established(&client, &definition.name).await.expect("it is established");
    }
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": chart::NAMESPACE}});
    for object in std::iter::once(&namespace).chain(objects) {
        manifests::apply(&client, "test", &object.to_string()).await.expect("it is applied");
    }
    let mut account = server.service_account(chart::NAMESPACE, "hanse-hub").await.expect("a kubeconfig");
    account["contexts"][0]["context"]["namespace"] = json!(chart::NAMESPACE);
    let kubeconfig = server.write_kubeconfig("hub", &account).expect("it is written");
    (server, kubeconfig)
}

/// Addresses that are free.
fn free<const COUNT: usize>() -> [SocketAddr; COUNT] {
    let ports = [(); COUNT].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    ports.map(|it| it.local_addr().expect("an address"))
}

impl World {
    async fn start() -> Self {
        let mut world = Self::prepare().await;
        world.start_hub();
        world
    }

    /// A management cluster with the definitions and the rights of the chart, and a hub that does not run yet.
    async fn prepare() -> Self {
        Self::prepare_on(None).await
    }

    async fn prepare_on(store: Option<String>) -> Self {
        let (server, kubeconfig) = management(&of_chart()).await;
        let listen = free();
        let world =
            Self { server, kubeconfig, folder: tempfile::tempdir().expect("a folder"), listen, store, hub: None };
        let made = world.hub_command("init").output().expect("it runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        world
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    fn hub_command(&self, verb: &str) -> Command {
        let mut command = Command::new(crate::system::programs().join("hanse-hub"));
        let [listen, join] = self.listen.map(|it| it.to_string());
        command.args([verb, "--listen", &listen, "--join-listen", &join, "--data"]).arg(self.data());
        self.store.iter().for_each(|store| _ = command.args(["--store", store]));
        command
    }

    fn start_hub(&mut self) {
        let mut command = self.hub_command("run");
        command.arg("--operator").arg("--kubeconfig").arg(&self.kubeconfig);
        let before = self.hub_log().matches("hub is serving").count();
        let hub = Process::start_bound(command, &self.folder.path().join("hub.log")).expect("it starts");
        self.hub = Some(hub);
        let served = hanse_e2e::probe::until(PATIENCE, || self.hub_log().matches("hub is serving").count() > before);
        assert!(served.is_some(), "{}", self.hub_log());
    }

    fn hub_log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("hub.log")).unwrap_or_default()
    }

    fn kubectl(&self, arguments: &[&str]) -> (bool, String) {
        text(&self.server.kubectl().expect("kubectl").args(arguments).output().expect("it runs"))
    }

    fn apply(&self, manifest: &str) {
        let path = self.folder.path().join("manifest.yaml");
        std::fs::write(&path, manifest).expect("written");
        let (success, text) = self.kubectl(&["apply", "-f", path.to_str().expect("UTF-8")]);
        assert!(success, "{text}");
    }

    fn hub_is_killed(&mut self) {
        self.hub.take().expect("it runs").kill().expect("killed");
    }

    /// The API server answers.
    fn succeed(&self, arguments: &[&str]) -> String {
        let (success, text) = self.kubectl(arguments);
        assert!(success, "{arguments:?}: {text}\n{}", self.hub_log());
        text
    }

    fn hanse(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(crate::system::programs().join("hanse"));
        let output = command.env("HANSE_CONTEXT", self.data().join("admin.context")).args(arguments).output();
        text(&output.expect("it runs"))
    }

    /// The operator, as `hanse status` shows it.
    fn operator(&self) -> Value {
        let (success, text) = self.hanse(&["status", "-o", "json"]);
        if success { serde_json::from_str::<Value>(&text).expect("JSON")["operator"].clone() } else { Value::Null }
    }

    /// The problems of the operator, by reason.
    fn problems(&self) -> BTreeMap<String, String> {
        let operator = self.operator();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let problems = operator["problems"].as_array().into_iter().flatten();
        problems.map(|it| (text(&it["reason"]), text(&it["message"]))).collect()
    }

    /// Waits until `hanse status` names a hub that reconciles, and no problem.
    async fn until_operated(&self) {
        let is = || {
            let operator = self.operator();
            operator["leader"].is_string() && operator["problemsTotal"] == 0
        };
        self.until("the operator has no problem", is).await;
    }

    /// The hub's objects, as `Kind/name`.
    fn stored(&self) -> String {
        let (success, text) = self.hanse(&["get", "-o", "name"]);
        assert!(success, "{text}");
        text
    }

    async fn until(&self, what: &str, is: impl Fn() -> bool) {
        self.until_within(PATIENCE, what, is).await;
    }

    /// Waits for a count in a status.
    async fn until_counted(&self, is: impl Fn() -> bool) {
        self.until_within(COUNTED, "it is counted", is).await;
    }

    async fn until_within(&self, patience: Duration, what: &str, is: impl Fn() -> bool) {
        let found = until(patience, async || is()).await;
        assert!(found.is_some(), "{what}: {}\n{}", self.kubectl(&["get", "hanse", "-o", "yaml"]).1, self.hub_log());
    }

    fn status(&self, object: &str) -> Value {
        let (success, text) = self.kubectl(&["get", object, "-o", "json"]);
        if success { serde_json::from_str::<Value>(&text).expect("JSON")["status"].clone() } else { Value::Null }
    }

    fn condition(&self, object: &str, kind: &str) -> [String; 2] {
        let status = self.status(object);
        let found = status["conditions"].as_array().into_iter().flatten().find(|it| it["type"] == kind).cloned();
        let field = |name: &str| found.as_ref().and_then(|it| it[name].as_str()).unwrap_or_default().to_owned();
        [field("status"), field("reason")]
    }

    /// What the operator wrote so far, except the Lease, which is not audited.
    fn writes(&self) -> Vec<String> {
        let audit = self.server.audit().expect("the audit log");
        let is_write = |it: &&Value| {
            it["stage"] == "ResponseComplete"
                && it["user"]["username"] == USER
                && !["get", "list", "watch"].iter().any(|verb| it["verb"] == *verb)
        };
        audit.iter().filter(is_write).map(|it| format!("{} {}", it["verb"], it["requestURI"])).collect()
    }

    /// Requests that the operator has no right to.
    fn forbidden(&self) -> Vec<String> {
        let audit = self.server.audit().expect("the audit log");
        let is = |it: &&Value| it["user"]["username"] == USER && it["responseStatus"]["code"] == 403;
        audit.iter().filter(is).map(|it| format!("{} {}", it["verb"], it["requestURI"])).collect()
    }
}

fn text(output: &Output) -> (bool, String) {
    let text = if output.status.success() { &output.stdout } else { &output.stderr };
    (output.status.success(), String::from_utf8_lossy(text).into_owned())
}

#[test]
fn custom_resources_become_objects_of_the_hub() {
    run(async {
        let mut world = World::start().await;
        world.apply(&format!("{TIER}---\n{}", policy("deny", DENY)));
        let (waited, text) = world.kubectl(&[
            "wait",
            "--for=condition=Accepted",
            "--timeout=60s",
            "fnp/deny",
            "tiers.hanse.dev/platform",
        ]);
        assert!(waited, "{text}\n{}", world.hub_log());
        assert!(world.stored().contains("deny") && world.stored().contains("platform"), "{}", world.stored());
        let no_clusters = ["False", "NoClusters"].map(str::to_owned);
        world.until("not enforced", || world.condition("fnp/deny", "Enforced") == no_clusters).await;
        let (_, audit) = world.hanse(&["audit", "-o", "json"]);
        let audit: Value = serde_json::from_str(&audit).expect("JSON");
        assert!(audit.to_string().contains(r#""operator""#), "{audit}");

        // The hub refuses users where custom resources are the truth.
        let path = world.folder.path().join("by-hand.yaml");
        std::fs::write(&path, policy("by-hand", DENY)).expect("written");
        for arguments in [&["apply", "-f", path.to_str().expect("UTF-8")][..], &["delete", "fnp", "deny"]] {
            let (success, text) = world.hanse(arguments);
            assert!(!success && text.contains("kubectl"), "{arguments:?}: {text}");
        }

        // What the hub does not accept has a condition and an Event; the last version stays in force.
        let before = world.hanse(&["get", "fnp", "deny", "-o", "json"]).1;
        world.apply(&policy("deny", "tier: none, selector: all(), types: [Ingress], ingress: []"));
        world
            .until("refused", || {
                world.condition("fnp/deny", "Accepted") == ["False", "TierNotFound"].map(str::to_owned)
            })
            .await;
        assert_eq!(world.hanse(&["get", "fnp", "deny", "-o", "json"]).1, before);
        world.until("an Event", || world.kubectl(&["get", "events", "-A"]).1.contains("TierNotFound")).await;
        world.apply(&policy("broken", "tier: platform, selector: 'app ==', types: [Ingress], ingress: []"));
        world.until("invalid", || world.condition("fnp/broken", "Accepted")[0] == "False").await;
        assert!(!world.stored().contains("broken"));
        assert_eq!(world.status("fnp/broken")["observedGeneration"], 1);
        world.apply(&policy("broken", DENY));
        world.apply(&policy("deny", DENY));
        for name in ["fnp/broken", "fnp/deny"] {
            world.until("accepted", || world.condition(name, "Accepted")[0] == "True").await;
        }

        // A tier goes after its policies.
        let (deleted, text) = world.kubectl(&["delete", "--wait=false", "tiers.hanse.dev/platform"]);
        assert!(deleted, "{text}");
        world.until("in use", || world.condition("tiers.hanse.dev/platform", "Terminating")[1] == "InUse").await;
        assert!(world.stored().contains("platform"));
        let (deleted, text) = world.kubectl(&["delete", "--timeout=60s", "fnp", "--all"]);
        assert!(deleted, "{text}\n{}", world.hub_log());
        world.until("gone", || world.stored().trim().is_empty()).await;
        world.until("the tier is gone", || !world.kubectl(&["get", "tiers.hanse.dev/platform"]).0).await;
        assert!(world.hub.as_mut().is_some_and(|hub| !hub.has_ended()), "{}", world.hub_log());
        assert_eq!(world.forbidden(), Vec::<String>::new());
    });
}

#[test]
fn restarts_and_definitions_lose_nothing_and_idle_writes_nothing() {
    run(async {
        let mut world = World::start().await;
        world.apply(&format!("{TIER}---\n{}---\n{}", policy("deny", DENY), policy("other", DENY)));
        for name in ["fnp/deny", "fnp/other", "tiers.hanse.dev/platform"] {
            world.until("accepted", || world.condition(name, "Accepted")[0] == "True").await;
        }
        let counted = async |world: &World, policies: u32| {
            world.until_counted(|| world.status("tiers.hanse.dev/platform")["policies"] == policies).await;
        };
        counted(&world, 2).await;

        // The hub is killed; meanwhile an object is deleted, and another one is made.
        world.hub.take().expect("it runs").kill().expect("killed");
        assert!(world.kubectl(&["delete", "--wait=false", "fnp/other"]).0);
        world.apply(&policy("new", DENY));
        world.start_hub();
        world.until("reconciled", || world.stored().contains("new") && !world.stored().contains("other")).await;
        world.until("accepted", || world.condition("fnp/new", "Accepted")[0] == "True").await;

        // The API server is down: the hub's policies stay. Then everything converges by itself.
        world.until_operated().await;
        world.server.kill().expect("killed");
        assert!(world.stored().contains("deny"));
        // Status says so, with the reason, and that nothing is reconciled.
        let reasons = || world.problems().into_keys().collect::<Vec<_>>();
        world.until("status names both", || reasons() == ["APIServerUnavailable", "NoLeader"]).await;
        assert!(world.problems()["APIServerUnavailable"].contains("refused"), "{}", world.operator());
        assert!(world.operator()["leader"].is_null(), "{}", world.operator());
        let (_, shown) = world.hanse(&["status"]);
        assert!(shown.contains("the API server of the management cluster does not answer: "), "{shown}");
        world.server.start_again().await.expect("ready");
        world.apply(&policy("newer", DENY));
        world.until("reconciled", || world.condition("fnp/newer", "Accepted")[0] == "True").await;
        assert!(world.stored().contains("deny") && world.stored().contains("newer"));
        world.until_operated().await;

        // Passes go on every second, and write nothing. The Lease shows that they did.
        let version = || {
            world
                .kubectl(&["get", "lease", LEASE, "-n", chart::NAMESPACE, "-o", "jsonpath={.metadata.resourceVersion}"])
                .1
        };
        counted(&world, 3).await;
        let before = world.writes();
        for _ in 0..3 {
            let last = version();
            world.until("the Lease is renewed", || version() != last).await;
        }
        assert_eq!(world.writes(), before);
        assert!(!before.is_empty(), "writes are counted");

        // The definition goes, and its objects with it: they stay in force.
        assert!(world.kubectl(&["delete", "--timeout=60s", "crd", "federatednetworkpolicies.hanse.dev"]).0);
        assert!(world.stored().contains("deny") && world.stored().contains("newer"), "{}", world.stored());
        let audit = json!(world.hanse(&["audit", "-o", "json", "--object", "FederatedNetworkPolicy/deny"]).1);
        assert!(!audit.to_string().contains("delete"), "{audit}");
    });
}

#[test]
fn one_of_two_hubs_reconciles() {
    run(async {
        let mut world = World::start().await;
        let namespace = ["-n", chart::NAMESPACE];
        let holder = |world: &World| {
            let path = "jsonpath={.spec.holderIdentity}";
            world.kubectl(&["get", "lease", LEASE, namespace[0], namespace[1], "-o", path]).1
        };
        world.until("elected", || !holder(&world).is_empty()).await;
        let first = holder(&world);
        // Another candidate takes the Lease: the hub stops to reconcile, and does not write again until it is given back.
        let take = |name: &str| {
            let patch = json!({"spec": {"holderIdentity": name, "leaseDurationSeconds": 20}}).to_string();
            world.kubectl(&["patch", "lease", LEASE, "-n", chart::NAMESPACE, "--type=merge", "-p", &patch])
        };
        assert!(take("other").0);
        world.until("it is noticed", || world.hub_log().contains("another process has taken the Lease")).await;
        world.apply(TIER);
        // Status names the other one, which this hub knows from the Lease only.
        let leader = |world: &World| [world.operator()["leader"].clone(), world.operator()["leadingMs"].clone()];
        if holder(&world) == "other" {
            let shown = leader(&world);
            assert!(shown == [json!("other"), Value::Null] || holder(&world) != "other", "{shown:?}");
        }
        // The other one does not renew it.
        loop {
            let (writes, stored) = (world.writes(), world.stored());
            if holder(&world) != "other" {
                break;
            }
            assert_eq!((writes, stored.trim()), (Vec::new(), ""), "{}", world.hub_log());
        }
        world.until("elected again", || holder(&world) == first).await;
        world.until("status names it", || leader(&world)[0] == *first && leader(&world)[1].is_u64()).await;
        world.until("reconciled", || world.condition("tiers.hanse.dev/platform", "Accepted")[0] == "True").await;
        // At its end, the hub gives the Lease back.
        world.hub.take().expect("it runs").stop(PATIENCE).expect("it stops");
        assert_eq!(holder(&world), "");
    });
}
