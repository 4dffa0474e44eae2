//! `hanse install`, `join` and `uninstall` in a cluster that is the management cluster and a cluster of the ClusterSet: with the rights
//! that the guide lists, and with a node that does not answer. The tests of the README run the usual case.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hanse_e2e::fabric::Fabric;
use hanse_e2e::kubernetes::{run, until};
use hanse_e2e::{go, sandbox};
use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::chart::{self, NAMESPACE};
use crate::clusters::east::{East, world};
use crate::clusters::nodes::{PATIENCE, addresses};

mod webhook;

const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const USER: &str = "installer";

/// Without a class: no provisioner runs. The namespace exists before, so that roles can be bound in it.
const PREPARED: &str = "apiVersion: v1
kind: PersistentVolume
metadata: {name: one}
spec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteOnce], hostPath: {path: /one}}
---
apiVersion: v1
kind: Namespace
metadata: {name: hanse, labels: {pod-security.kubernetes.io/enforce: privileged}}
";
const QUOTA: &str = "apiVersion: v1
kind: ResourceQuota
metadata: {name: none, namespace: hanse}
spec: {hard: {pods: '0'}}
";

/// The ClusterRoles of the guide, without those that only further values of the chart need.
fn roles() -> BTreeMap<String, Value> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/guide/install.md");
    let page = std::fs::read_to_string(page).expect("the page");
    let blocks = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let documents = blocks.flat_map(serde_yaml_ng::Deserializer::from_str);
    let objects = documents.map(|document| Value::deserialize(document).expect("YAML"));
    let is_optional = |it: &Value| it == "hanse-release-metrics" || it == "hanse-release-openshift";
    let roles = objects.filter(|it| it["kind"] == "ClusterRole" && !is_optional(&it["metadata"]["name"]));
    roles.map(|it| (it["metadata"]["name"].as_str().expect("a name").to_owned(), it)).collect()
}

/// Where the guide says that they are bound; `None`: in the cluster.
fn namespace_of(role: &str) -> Option<&'static str> {
    match role {
        "hanse-release" | "hanse-join-hub" => Some(NAMESPACE),
        "hanse-install-events" => Some("default"),
        _ => None,
    }
}

fn binding(role: &str) -> Value {
    let namespace = namespace_of(role);
    let kind = if namespace.is_some() { "RoleBinding" } else { "ClusterRoleBinding" };
    let group = "rbac.authorization.k8s.io";
    json!({
        "apiVersion": format!("{group}/v1"), "kind": kind, "metadata": {"name": format!("{USER}-{role}"), "namespace": namespace},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": group, "kind": "User", "name": USER}],
    })
}

/// The commands, as a user who has only the rights of the guide.
struct Installer<'a> {
    east: &'a East,
    kubeconfig: PathBuf,
    helm: PathBuf,
}

/// Exit code, result and messages.
type Ended = (Option<i32>, String, String);

impl<'a> Installer<'a> {
    fn new(east: &'a East) -> Self {
        let user = east.server.user(USER, &[]).expect("a kubeconfig");
        let kubeconfig = east.server.write_kubeconfig(USER, &user).expect("it is written");
        Self { east, kubeconfig, helm: go::Program::Helm.build().expect("Helm is built") }
    }

    fn hanse(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new(crate::system::programs().join("hanse"));
        command.args(arguments).arg("--kubeconfig").arg(&self.kubeconfig).env_remove("HANSE_KUBECONFIG");
        command.env("PATH", self.helm.parent().expect("a folder")).env("HOME", self.east.server.path("home"));
        let output = command.output().expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    fn install(&self, more: &[&str]) -> Ended {
        let ports = format!("hub.apiServerPorts={{{}}}", self.east.server.address().port());
        let digest = format!("--hub-digest={DIGEST}");
        let arguments = ["install", "--registry=registry.example", &digest, "--set=hub.service.type=ClusterIP"];
        self.hanse(&[&arguments[..], &["--set", &ports], more].concat())
    }

    fn join(&self, hub: &str, more: &[&str]) -> Ended {
        let digests = ["member", "agent"].map(|it| format!("--{it}-digest={DIGEST}"));
        let addresses = [("hub", 7443), ("join", 7444)].map(|(option, port)| format!("--{option}={hub}:{port}"));
        let arguments = ["join", "--cluster=east", "--registry=registry.example", &digests[0], &digests[1]];
        self.hanse(&[&arguments[..], &[&addresses[0], &addresses[1]], more].concat())
    }

    /// Binds a role, and waits until it has an effect: a right that nothing else needs shows that.
    async fn grant(&self, role: &Value, marker: &str) {
        let mut role = role.clone();
        let rule = json!({"apiGroups": [""], "resources": [marker], "verbs": ["get"]});
        role["rules"].as_array_mut().expect("rules").push(rule);
        let name = role["metadata"]["name"].as_str().expect("a name");
        self.east.apply(&role.to_string()).await;
        self.east.apply(&binding(name).to_string()).await;
        let namespace = namespace_of(name).unwrap_or(NAMESPACE);
        let question = ["auth", "can-i", "get", marker, "--as", USER, "--namespace", namespace];
        let is = until(PATIENCE, async || {
            let answer = self.east.server.kubectl().expect("kubectl").args(question).output();
            String::from_utf8_lossy(&answer.expect("it runs").stdout).trim() == "yes"
        });
        assert!(is.await.is_some(), "{name} is in effect");
    }

    /// Grants all roles, of which one lacks its rights to a resource.
    async fn without(&self, role: &str, resource: &str) {
        let mut less = roles()[role].clone();
        let rules = less["rules"].as_array_mut().expect("rules");
        for rule in rules.iter_mut().filter(|it| it["resources"].is_array()) {
            rule["resources"].as_array_mut().expect("resources").retain(|it| it != resource);
        }
        rules.retain(|it| it["resources"] != json!([]));
        self.grant(&less, &format!("without-{resource}")).await;
    }

    async fn with(&self, role: &str, resource: &str) {
        self.grant(&roles()[role], &format!("with-{resource}")).await;
    }
}

#[test]
fn commands_need_the_listed_rights_and_remove_everything() {
    sandbox::test("install::commands_need_the_listed_rights_and_remove_everything", || {
        let world = world();
        let fabric = Fabric::build(std::slice::from_ref(&world)).expect("the network");
        let scratch = tempfile::tempdir_in("/run").expect("a folder");
        std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o755)).expect("every user may enter");
        fabric.router().enter(|| {
            run(async {
                let mut east = East::start(&world, &fabric, scratch.path()).await;
                east.apply(PREPARED).await;
                for node in ["a", "b"] {
                    track_connections(&fabric, east.server.name(), node);
                }
                let hub = installs_and_joins(&east).await;
                names_missing_rights(&east, &hub).await;
                webhook::needs_its_rights(&east).await;
                removes_the_member_only(&mut east, &fabric).await;
                removes_the_rest(&east).await;
                leaves_what_others_installed(&east).await;
            });
        });
    });
}

/// As on nodes of a cluster with kube-proxy, connections are tracked before agents run. Agents reset those that they see in the middle,
/// which are the hub's here; a side that only reads would not notice.
fn track_connections(fabric: &Fabric, cluster: &str, node: &str) {
    let rules = "add table inet proxy
add chain inet proxy forward { type filter hook forward priority 0; }
add rule inet proxy forward ct state new accept
";
    let node = fabric.node(cluster, node).expect("a node");
    node.enter(|| {
        let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft");
        nft.stdin.take().expect("a pipe").write_all(rules.as_bytes()).expect("it reads");
        assert!(nft.wait().expect("it ends").success());
    });
}

/// Returns the address of the hub.
async fn installs_and_joins(east: &East) -> String {
    let installer = Installer::new(east);
    let roles = roles();
    assert_eq!(roles.len(), 7, "{:?}", roles.keys());
    for role in roles.keys() {
        installer.with(role, "all").await;
    }
    // Helm may have created the StatefulSet when it fails.
    east.apply(QUOTA).await;
    let counted = until(PATIENCE, async || {
        !east.kubectl(&["--namespace", NAMESPACE, "get", "quota/none", "-o", "jsonpath={.status.hard}"], "").is_empty()
    });
    assert!(counted.await.is_some(), "the quota is in effect");
    // A user cannot grant what it lacks.
    for resource in ["clustersets"].iter().chain(&webhook::RESOURCES) {
        installer.without("hanse-install", resource).await;
        // Roles of an earlier attempt are not checked again.
        east.kubectl(&["delete", "clusterrole", "hanse-hub", "hanse-hub-webhook", "--ignore-not-found"], "");
        let (code, _, refused) = installer.install(&[&webhook::VALUES[..], &["--timeout=2"]].concat());
        // Helm looks for what an earlier attempt has created before it creates anything.
        let whys = ["permissions not currently held".to_owned(), format!("User \"{USER}\" cannot get resource")];
        let is_named = whys.iter().any(|why| refused.contains(why)) && refused.contains(resource);
        assert!(code == Some(1) && is_named, "without {resource}: {refused}");
        installer.with("hanse-install", resource).await;
    }
    // What keeps pods from being created is in the events of their controller only, which repeats them less and less often.
    let (code, _, refused) = installer.install(&[&webhook::VALUES[..], &["--timeout=15"]].concat());
    let warning = "StatefulSet hanse-hub: FailedCreate: ";
    let error = refused.split_once("hanse: install the hub (").map_or("", |(_, error)| error);
    assert!(code == Some(1) && refused.contains(&format!("  warning of {warning}")), "{refused}");
    assert!(
        error.contains(warning) && error.contains("exceeded quota") && error.contains("no pods exist"),
        "{refused}"
    );
    east.kubectl(&["--namespace", NAMESPACE, "delete", "quota/none"], "");
    let (code, _, notes) = installer.install(&webhook::VALUES);
    assert_eq!(code, Some(0), "{notes}\n{}", east.logs());
    assert!(!notes.contains("exceeded quota"), "an old warning explains nothing: {notes}");

    let hub = addresses(&east.ready_component("hub", 1).await[0])[0].to_string();
    let (code, joined, notes) = installer.join(&hub, &["--output=json"]);
    assert_eq!(code, Some(0), "{notes}\n{}", east.logs());
    let joined: Value = serde_json::from_str(&joined).expect("JSON");
    assert_eq!((&joined["nodes"], &joined["enforcement"]), (&json!(2), &json!("Enforce")), "{notes}");
    hub
}

/// Without one of the rights, a command names it, and nothing else is missing.
async fn names_missing_rights(east: &East, hub: &str) {
    let installer = Installer::new(east);
    for (role, resource, is_join) in [
        ("hanse-release", "secrets", false),
        ("hanse-release", "poddisruptionbudgets", false),
        ("hanse-release-cluster", "clusterroles", false),
        ("hanse-install", "validatingwebhookconfigurations", false),
        ("hanse-install-events", "rolebindings", false),
        ("hanse-join", "nodes", true),
        ("hanse-release-cluster", "daemonsets", true),
        ("hanse-join-management", "memberclusters", true),
    ] {
        installer.without(role, resource).await;
        let (code, _, text) = if is_join { installer.join(hub, &[]) } else { installer.install(&[]) };
        let is_named =
            text.contains(&format!("User \"{USER}\" cannot")) && text.contains(&format!("resource \"{resource}\""));
        assert!(code == Some(1) && is_named, "{role} without {resource}: {text}");
        installer.with(role, resource).await;
    }
    // What another program has set is overwritten, also by Helm 4.
    let member = |arguments: &[&str]| {
        east.kubectl(&[&["--namespace", NAMESPACE], arguments, &["deployment/hanse-member"]].concat(), "")
    };
    member(&["scale", "--replicas=1"]);
    let (code, _, text) = installer.join(hub, &[]);
    assert_eq!(code, Some(0), "with all of them: {text}");
    assert_eq!(member(&["get", "-o", "jsonpath={.spec.replicas}"]), "2");
}

/// Of the release, with a node that does not answer.
async fn removes_the_member_only(east: &mut East, fabric: &Fabric) {
    let name = east.server.name().to_owned();
    let rules = |node: &str| {
        let node = fabric.node(&name, node).expect("a node");
        let rules = node.enter(|| Command::new("nft").args(["list", "ruleset"]).output()).expect("nft");
        assert!(rules.status.success(), "{rules:?}");
        String::from_utf8_lossy(&rules.stdout).contains("hanse")
    };
    let (code, _, text) = Installer::new(east).hanse(&["uninstall"]);
    assert!(code == Some(2) && text.contains("--delete-clusterset") && text.contains("--member-only"), "{text}");
    assert!(rules("a") && rules("b"), "nothing was removed");

    // As a machine that has no power any more; the controller would report it after a minute.
    let hub = east.ready_component("hub", 1).await.remove(0);
    let node_of_hub = hub.spec.as_ref().and_then(|it| it.node_name.clone()).expect("it is bound");
    let (dead, alive) = if node_of_hub == "a" { ("b", "a") } else { ("a", "b") };
    drop(east.kubelets.remove(dead).expect("it runs"));
    let conditions =
        json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]}});
    let node = format!("node/{dead}");
    east.kubectl(&["patch", &node, "--subresource=status", "--type=strategic", "-p", &conditions.to_string()], "");
    let installer = Installer::new(east);
    let (code, _, text) = installer.hanse(&["uninstall", "--member-only", "--timeout=5"]);
    assert!(code == Some(1) && text.contains(&format!("rules may be in force on {dead};")), "{text}");
    assert!(text.contains("rules removed from 1 of 2 nodes"), "{text}");
    assert!(rules(dead), "its kernel enforces");
    east.kubectl(&["get", "--namespace", NAMESPACE, "deployment/hanse-member", "mc/east"], "");

    let (code, removed, text) =
        installer.hanse(&["uninstall", "--member-only", "--timeout=15", "--force", "--output=json"]);
    assert_eq!(code, Some(0), "{text}\n{}", east.logs());
    let removed: Value = serde_json::from_str(&removed).expect("JSON");
    let left = json!([format!("rules and /var/lib/hanse of node {dead}")]);
    assert_eq!((&removed["nodes"], &removed["left"]), (&json!(1), &left), "{text}");
    assert!(rules(dead) && !rules(alive), "the node that answers is clean");
    let found = east.kubectl(
        &["get", "deployments,daemonsets,secrets,leases,clusterroles,mc,cjt", "--all-namespaces", "-o", "name"],
        "",
    );
    let of_member: Vec<&str> = found
        .lines()
        .filter(|it| it.contains("hanse-member") || *it == "secret/hanse-join" || it.ends_with("/east"))
        .collect();
    assert!(of_member.is_empty() && found.contains("clusterrole.rbac.authorization.k8s.io/hanse-hub"), "{found}");
    // The hub stays, with its ClusterSet, and the command may be repeated.
    let values = east
        .server
        .helm()
        .expect("Helm")
        .args(["get", "values", "hanse", "--output=json", "--namespace", NAMESPACE])
        .output();
    let values: Value = serde_json::from_slice(&values.expect("it runs").stdout).expect("JSON");
    let member = &values["member"];
    assert_eq!(
        (&member["enabled"], &member["cluster"]),
        (&json!(false), &json!("")),
        "the release is no cluster: {values}"
    );
    let (code, done, text) = installer.hanse(&["uninstall", "--member-only"]);
    assert!(code == Some(0) && done.contains("contains no member"), "{done}{text}");
    let same = east.ready_component("hub", 1).await.remove(0);
    assert_eq!(same.metadata.uid, hub.metadata.uid, "the hub was not touched");
}

async fn removes_the_rest(east: &East) {
    let installer = Installer::new(east);
    let (code, removed, text) = installer.hanse(&["uninstall", "--delete-clusterset", "--force", "--output=json"]);
    assert_eq!(code, Some(0), "{text}");
    let removed: Value = serde_json::from_str(&removed).expect("JSON");
    assert_eq!(removed["left"], json!(["namespace hanse, which another program created"]), "{text}");
    let found = east.kubectl(&["get", "crd,clusterroles,clusterrolebindings", "-o", "name"], "");
    let is_left = |it: &&str| it.contains("hanse") && !roles().keys().any(|role| it.ends_with(role));
    let left: Vec<&str> = found.lines().filter(is_left).collect();
    assert!(left.is_empty(), "{left:?}");
    let kinds = "statefulsets,pvc,secrets,configmaps,leases,services,roles,networkpolicies";
    let mut found = String::new();
    // A claim stays until the pod of the hub has ended.
    let gone = until(PATIENCE, async || {
        found = east.kubectl(&["--namespace", NAMESPACE, "get", kinds, "-o", "name"], "");
        found.trim() == "configmap/kube-root-ca.crt"
    });
    assert!(gone.await.is_some(), "{found}\n{text}");
}

/// What `helm template` and `kubectl apply` installed is not removed, and the command says how it is.
async fn leaves_what_others_installed(east: &East) {
    let installer = Installer::new(east);
    let (code, _, text) = installer.hanse(&["uninstall"]);
    assert!(code == Some(1) && text.contains("no workload of Hanse in any namespace"), "{text}");
    east.kubectl(&["apply", "-f", "-"], &chart::manifests_of(&chart::complete()));
    let (code, _, text) = installer.hanse(&["uninstall", "--delete-clusterset", "--force"]);
    assert_eq!(code, Some(1), "{text}");
    for named in [
        "StatefulSet hanse-hub, Deployment hanse-member, DaemonSet hanse-agent",
        "installed by kubectl-client-side-apply",
        "Nothing was removed",
        "agent.cleanup=true",
        "hanse.dev/operator",
        "delete --ignore-not-found secrets,configmaps --selector chart.hanse.dev/release=hanse`",
        "lease hanse-hub-operator`",
    ] {
        assert!(text.contains(named), "{named}: {text}");
    }
    let (code, _, text) = installer.hanse(&["uninstall", "--release=second"]);
    assert!(code == Some(1) && text.contains("--namespace hanse --release hanse"), "{text}");
    let kinds = "statefulset/hanse-hub,deployment/hanse-member,daemonset/hanse-agent";
    for object in kinds.split(',') {
        east.kubectl(&["--namespace", NAMESPACE, "get", object], "");
    }
    // By the program that installed it.
    east.kubectl(&["annotate", "--all-namespaces", "daemonsets", "-l", "app.kubernetes.io/name=hanse", ARGO], "");
    let (code, _, text) = installer.hanse(&["uninstall"]);
    assert!(code == Some(1) && text.contains("Argo CD (Application mesh)"), "{text}");
}

const ARGO: &str = "argocd.argoproj.io/tracking-id=mesh:apps/DaemonSet:hanse/hanse-agent";
