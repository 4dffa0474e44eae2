//! A release in a cluster whose pods run: with the arguments, files, service accounts and rights that the chart renders.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use futures::StreamExt as _;
use hanse_e2e::fabric::Fabric;
use hanse_e2e::kubernetes::certificates::Authority;
use hanse_e2e::kubernetes::crds::{self, Calico};
use hanse_e2e::kubernetes::{TokenOptions, kubeconfig, run, until};
use hanse_e2e::probe::{self, Observed};
use hanse_e2e::process::Process;
use hanse_e2e::sandbox;
use hanse_e2e::world::Node;
use hanse_member::api_server::{AgentAccount, ReviewError, Reviewer};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use serde_json::{Value, json};

use super::failover::{Files, SLICE, STATE, fails_over, leads};
use super::{NAMESPACE, PATIENCE, Release, complete, list, rendered, set, success};
use crate::clusters::east::{East, WORKLOADS, node, world};
use crate::clusters::nodes::{addresses, is_ready};
use crate::metrics::reviews;

/// How many members run at once to find out which rights they need.
const BATCH: usize = 27;
/// The lease of a cluster at the hub: shorter than that of its members' Lease.
const LEASE_SECONDS: u64 = 10;
/// Of tokens for metrics.
const AUDIENCE: &str = "hanse-metrics";
/// The nodes, of which one comes later.
pub(super) const AGENTS: usize = 3;
/// The pods of the member.
pub(super) const MEMBERS: usize = 2;

/// Volumes without a class: no provisioner runs.
const VOLUMES: &str = "apiVersion: v1
kind: PersistentVolume
metadata: {name: one}
spec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteOnce], hostPath: {path: /one}}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: two}
spec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteOnce], hostPath: {path: /two}}
---
apiVersion: v1
kind: Namespace
metadata: {name: hanse}
";

const CLOSED: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: default}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]}
";

/// The client may connect to the other pods, and nothing else may.
pub(super) const OPEN_FOR_CLIENT: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
";

fn reader() -> Value {
    json!({"kind": "ServiceAccount", "name": "prometheus", "namespace": NAMESPACE})
}

impl East {
    pub(crate) fn kubectl(&self, arguments: &[&str], input: &str) -> String {
        success(self.server.kubectl().expect("kubectl").args(arguments), input)
    }

    pub(crate) async fn ready_component(&self, component: &str, count: usize) -> Vec<Pod> {
        self.ready(NAMESPACE, &format!("app.kubernetes.io/component={component}"), count).await
    }

    /// Deletes a pod, and waits for the one that takes its place.
    async fn reschedule(&self, component: &str, pod: &Pod) -> Pod {
        let (pods, name) = (self.pods(NAMESPACE), pod.metadata.name.as_deref().expect("a name"));
        pods.delete(name, &DeleteParams::default()).await.expect("it is deleted");
        let gone = until(PATIENCE, async || {
            let current = pods.get_opt(name).await.expect("an answer");
            current.is_none_or(|it| it.metadata.uid != pod.metadata.uid)
        });
        assert!(gone.await.is_some(), "{name} is gone");
        self.ready_component(component, 1).await.remove(0)
    }

    pub(super) fn claim(&self, name: &str) -> PathBuf {
        self.scratch.join("claims/east").join(NAMESPACE).join(name)
    }

    /// `hanse` of the hub's image, as with `kubectl exec` in the hub's pod.
    pub(super) fn hanse(&self, hub: &Pod, arguments: &[&str]) -> String {
        let mut command = Command::new(crate::system::programs().join("hanse"));
        command.arg("--context").arg(self.claim("data-hanse-hub-0").join("hub/admin.context")).args(arguments);
        self.network(hub).enter(|| success(&mut command, ""))
    }

    /// Whether a listener of a pod can be reached from another.
    fn connects(&self, from: &Pod, to: &Pod, port: u16) -> bool {
        let to = SocketAddr::new(addresses(to)[0], port);
        self.network(from).enter(|| TcpStream::connect_timeout(&to, probe::PATIENCE).is_ok())
    }
}

pub(super) fn values(east: &East, hub: Option<&Pod>) -> Value {
    let mut values = complete();
    for (path, value) in [
        ("hub.persistence", json!({"storageClassName": ""})),
        ("hub.nodeSelector", json!({"kubernetes.io/hostname": "a"})),
        ("hub.leaseSeconds", json!(LEASE_SECONDS)),
        // For reviews of tokens. The policy of the chart, which Hanse enforces, permits no other egress.
        ("hub.apiServerPorts", json!([east.server.address().port()])),
        (
            "metrics",
            json!({"enabled": true, "audience": AUDIENCE, "tls": {"secretName": "metrics-tls"}, "readers": [reader()]}),
        ),
    ] {
        values = set(values, path, value);
    }
    let Some(hub) = hub else {
        return set(set(values, "member.enabled", json!(false)), "agent.enabled", json!(false));
    };
    let address = |port: u16| json!([SocketAddr::new(addresses(hub)[0], port).to_string()]);
    set(set(values, "member.hub.addresses", address(7443)), "member.hub.joinAddresses", address(7444))
}

#[test]
fn installed_release_enforces_with_the_rights_of_the_chart() {
    sandbox::test("chart::installed::installed_release_enforces_with_the_rights_of_the_chart", || {
        let (world, late) = (world(), node("late", 3));
        let mut later = world.clone();
        later.nodes.push(late.clone());
        let fabric = Fabric::build(std::slice::from_ref(&later)).expect("the network");
        let scratch = tempfile::tempdir_in("/run").expect("a folder");
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).expect("every user may enter");
        fabric.router().enter(|| {
            run(async {
                let mut east = East::start(&world, &fabric, scratch.path()).await;
                let authority = Authority::create("metrics").expect("an authority");
                let hub = installs(&east, &authority).await;
                enforces(&east, &hub).await;
                serves_metrics(&east, &hub, &authority).await;
                taints_new_nodes(&mut east, &fabric, &late).await;
                frees_nodes_without_agents(&east).await;
                fails_over(&mut east, &hub).await;
                needs_its_rights(&east, &fabric).await;
            });
        });
    });
}

/// In the order of the notes: hub, token, member and agents.
async fn installs(east: &East, authority: &Authority) -> Pod {
    east.apply(VOLUMES).await;
    east.apply(&reviews::secret("metrics-tls", authority, reviews::SERVER_NAME)).await;
    east.apply(&reviews::secret("metrics-tls-agents", authority, reviews::AGENT_NAME)).await;
    let (release, start) = (Release { server: &east.server }, Instant::now());
    release.helm(&["install", "hanse"], Some(&values(east, None)));
    let hub = east.ready_component("hub", 1).await.remove(0);
    let root = || fs::read(east.claim("data-hanse-hub-0").join("hub/ca.key")).expect("the root key");
    let before = root();
    // A hub that is rescheduled goes on with its ClusterSet.
    let hub = east.reschedule("hub", &hub).await;
    assert_eq!(root(), before);
    let token = east.hanse(&hub, &["token", "create", "--cluster", "east"]);
    east.kubectl(
        &["--namespace", NAMESPACE, "create", "secret", "generic", "hanse-join", "--from-file=token=/dev/stdin"],
        token.trim(),
    );
    release.helm(&["upgrade", "hanse"], Some(&values(east, Some(&hub))));
    east.ready_component("member", MEMBERS).await;
    east.ready_component("agent", 2).await;
    println!("hub, member and agents were ready after {:?}", start.elapsed());
    hub
}

/// Prometheus, in a pod, scrapes hub, member and agents over TLS with the token of its service account; others do not.
async fn serves_metrics(east: &East, hub: &Pod, authority: &Authority) {
    for account in ["prometheus", "other"] {
        east.kubectl(&["--namespace", NAMESPACE, "create", "serviceaccount", account], "");
    }
    let token = async |account: &str, options: &TokenOptions| {
        east.server.token(NAMESPACE, account, options).await.expect("a token")
    };
    let for_metrics = TokenOptions { audiences: vec![AUDIENCE.to_owned()], ..TokenOptions::default() };
    let (prometheus, other) = (token("prometheus", &for_metrics).await, token("other", &for_metrics).await);
    let for_api_server = token("prometheus", &TokenOptions::default()).await;
    let client = &east.ready("default", "app=client", 1).await[0];
    let leader = leads(east).await;
    let of_node = |number: u8, port: u16| SocketAddr::from(([172, 20, 0, number], port));
    let (of_both, of_agents) = (reviews::SERVER_NAME, reviews::AGENT_NAME);
    for (to, server, name) in [
        (SocketAddr::new(addresses(hub)[0], 7446), of_both, "hanse_hub_clusters{state=\"live\"} 1"),
        // Of the members, the one that serves; it may be on either node.
        (SocketAddr::new(addresses(&leader)[0], 7503), of_both, "hanse_member_nodes_current 2"),
        (of_node(1, 7505), of_agents, "hanse_agent_in_sync 1"),
        (of_node(2, 7505), of_agents, "hanse_agent_in_sync 1"),
    ] {
        let mut last = String::new();
        for (token, status, words) in [
            (Some(&*prometheus), 200, name),
            (Some(&*other), 403, "needs the verb \"get\" on the nonResourceURL \"/metrics\""),
            (Some(&*for_api_server), 401, "not valid"),
            (Some("nonsense"), 401, "not valid"),
            (None, 401, "not valid"),
        ] {
            let answered = until(PATIENCE, async || {
                let answer = east.network(client).enter(|| reviews::scrape_as(to, server, &authority.pem(), token));
                last = format!("{answer:?}");
                answer.is_ok_and(|it| it.0 == status && it.1.contains(words))
            });
            assert!(answered.await.is_some(), "{to}: not {status} {words}: {last}\n{}", east.logs());
        }
        // The key of agents, which is on every node, is not good for hub and member.
        let other = if server == of_both { of_agents } else { of_both };
        let refused = east.network(client).enter(|| reviews::scrape_as(to, other, &authority.pem(), Some(&prometheus)));
        let refused = format!("{:#}", refused.expect_err("the certificate is for another name"));
        assert!(refused.contains("certificate"), "{to}: {refused}");
        let answer = east.network(client).enter(|| reviews::plain(to, &prometheus));
        assert!(!answer.contains("HTTP/1.1") && !answer.contains("hanse_"), "{to}: {answer}");
    }
}

async fn enforces(east: &East, hub: &Pod) {
    east.apply(WORKLOADS).await;
    let web = east.ready("default", "app=web", 2).await;
    let client = &east.ready("default", "app=client", 1).await[0];
    east.until_observed(client, &web, Observed::Open).await;
    east.kubectl(&["apply", "-f", "-"], CLOSED);
    east.until_observed(client, &web, Observed::Closed).await;
    east.kubectl(&["apply", "-f", "-"], OPEN_FOR_CLIENT);
    east.until_observed(client, &web, Observed::Open).await;
    east.kubectl(&["--namespace", "default", "delete", "networkpolicy", "web"], "");
    // The chart's own policy: members and users reach the hub, and its health is for its node only.
    let is_enforced = until(PATIENCE, async || {
        east.connects(client, hub, 7443) && east.connects(client, hub, 7444) && !east.connects(client, hub, 7445)
    });
    assert!(is_enforced.await.is_some(), "{}", east.logs());
    assert!(is_ready(&east.ready_component("hub", 1).await[0]));
}

/// A node that comes later has the taint until its agent has rules; those that were there never had it.
async fn taints_new_nodes(east: &mut East, fabric: &Fabric, late: &Node) {
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(east.client.clone());
    let watched = WatchParams::default();
    let from = nodes.list(&ListParams::default()).await.expect("nodes").metadata.resource_version.expect("a version");
    east.add(fabric, late).await;
    let has_taint = |node: &k8s_openapi::api::core::v1::Node| {
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        taints.into_iter().any(|taint| taint.key == "hanse.dev/agent-not-ready" && taint.effect == "NoSchedule")
    };
    let mut events = std::pin::pin!(nodes.watch(&watched, &from).await.expect("a watch"));
    let (mut was_tainted, mut steps) = (false, Vec::new());
    let settled = tokio::time::timeout(PATIENCE, async {
        while let Some(event) = events.next().await {
            let (WatchEvent::Added(node) | WatchEvent::Modified(node)) = event.expect("an event") else { continue };
            if node.name_any() != late.name {
                assert!(!has_taint(&node), "{} was there at the first start", node.name_any());
                continue;
            }
            steps.push(has_taint(&node));
            was_tainted |= has_taint(&node);
            if was_tainted && !has_taint(&node) {
                return;
            }
        }
    });
    assert!(settled.await.is_ok(), "tainted and then not: {steps:?}\n{}", east.logs());
    // Clouds set the taints of a group of nodes also on nodes that run.
    east.kubectl(&["taint", "nodes", &late.name, "hanse.dev/agent-not-ready=:NoSchedule"], "");
    let node = async || nodes.get(&late.name).await.expect("the node");
    let freed = until(PATIENCE, async || !has_taint(&node().await)).await;
    assert!(freed.is_some(), "{}", east.logs());
    east.ready_component("agent", AGENTS).await;
}

/// A node that the DaemonSet does not select keeps no taint, also when its labels change while it waits for an agent.
async fn frees_nodes_without_agents(east: &East) {
    let create = |name: &str, os: &str, taints: Value| {
        let metadata = json!({"name": name, "labels": {"kubernetes.io/os": os}});
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": taints}});
        east.kubectl(&["create", "-f", "-"], &node.to_string());
    };
    let has_taint = |name: &str| {
        let node = east.kubectl(&["get", &format!("node/{name}"), "-o", "jsonpath={.spec.taints[*].key}"], "");
        node.split(' ').any(|key| key == "hanse.dev/agent-not-ready")
    };
    // As kubelets register with --register-with-taints.
    let taint = json!([{"key": "hanse.dev/agent-not-ready", "effect": "NoSchedule"}]);
    create("windows", "windows", taint);
    create("relabelled", "linux", json!([]));
    let settled = until(PATIENCE, async || has_taint("relabelled") && !has_taint("windows"));
    assert!(settled.await.is_some(), "{}", east.logs());
    east.kubectl(&["label", "--overwrite", "node/relabelled", "kubernetes.io/os=windows"], "");
    let freed = until(PATIENCE, async || !has_taint("relabelled"));
    assert!(freed.await.is_some(), "{}", east.logs());
    // No kubelet ends its pod.
    let pods = ["--namespace", NAMESPACE, "delete", "pods", "--field-selector=spec.nodeName=relabelled"];
    east.kubectl(&[&pods[..], &["--force", "--grace-period=0"]].concat(), "");
    east.kubectl(&["delete", "node/windows", "node/relabelled"], "");
    east.ready_component("agent", AGENTS).await;
}

/// Group, resource, verb, and the name where the rule is for one.
pub(crate) type Right = (String, String, String, Option<String>);

/// All rights of the rules of a role.
pub(crate) fn rights(role: &Value) -> BTreeSet<Right> {
    let texts = |rule: &Value, key: &str| -> Vec<String> {
        list(rule, key).map(|it| it.as_str().expect("a text").to_owned()).collect()
    };
    let mut rights = BTreeSet::new();
    for rule in list(role, "rules") {
        let names = texts(rule, "resourceNames");
        let names: Vec<Option<String>> =
            if names.is_empty() { vec![None] } else { names.into_iter().map(Some).collect() };
        for group in texts(rule, "apiGroups") {
            for resource in texts(rule, "resources") {
                for verb in texts(rule, "verbs") {
                    for name in &names {
                        rights.insert((group.clone(), resource.clone(), verb.clone(), name.clone()));
                    }
                }
            }
        }
    }
    rights
}

/// A role with these rights but one, and its account. A stand-in right shows when the role is in effect.
fn without(index: usize, kind: &str, rights: &BTreeSet<Right>, missing: &Right) -> String {
    let rules: Vec<Value> = rights
        .iter()
        .filter(|right| *right != missing)
        .map(|(group, resource, verb, name)| {
            json!({"apiGroups": [group], "resources": [resource], "verbs": [verb], "resourceNames": name.as_slice()})
        })
        .chain([json!({"apiGroups": ["test.example"], "resources": [kind.to_lowercase()], "verbs": ["get"]})])
        .collect();
    let metadata = json!({"name": format!("rights-{index}"), "namespace": NAMESPACE});
    let reference = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": metadata["name"]});
    let subject = json!({"kind": "ServiceAccount", "name": metadata["name"], "namespace": NAMESPACE});
    let version = "rbac.authorization.k8s.io/v1";
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata});
    let mut role = json!({"apiVersion": version, "kind": kind, "metadata": metadata, "rules": rules});
    let mut binding = json!({
        "apiVersion": version, "kind": format!("{kind}Binding"), "metadata": metadata, "roleRef": reference,
        "subjects": [subject],
    });
    if kind == "ClusterRole" {
        for object in [&mut role, &mut binding] {
            object["metadata"].as_object_mut().expect("an object").remove("namespace");
        }
    }
    [account, role, binding].map(|it| it.to_string()).join("\n---\n")
}

/// Waits until the roles of an account are in effect.
async fn in_effect(client: &kube::Client) {
    for resource in ["clusterrole", "role"] {
        let attributes = ResourceAttributes {
            group: Some("test.example".to_owned()),
            resource: Some(resource.to_owned()),
            verb: Some("get".to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            ..ResourceAttributes::default()
        };
        let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
        let review = SelfSubjectAccessReview { spec, ..Default::default() };
        let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
        let allowed = until(PATIENCE, async || {
            let reviewed = api.create(&PostParams::default(), &review).await;
            reviewed.is_ok_and(|it| it.status.is_some_and(|status| status.allowed))
        });
        assert!(allowed.await.is_some(), "the roles are in effect");
    }
}

/// Waits until the log of a member names the right that it does not have, and no other.
async fn is_named((group, resource, verb, name): &Right, process: &Process) {
    let named = format!("cannot {verb} resource \"{resource}\" in API group \"{group}\"");
    let log = || process.log().replace('\\', "");
    // The client library does not always pass on why a watch is refused; then the log names the collection only.
    let collection = match group.as_str() {
        "" => format!("file=\"{resource}\""),
        group => format!("file=\"{resource}.{group}\""),
    };
    let is_of = |line: &str| name.as_ref().is_none_or(|name| line.contains(name));
    let is_named = |line: &str| {
        (line.contains(&named) && is_of(line))
            || (verb == "watch" && line.contains(&collection) && line.contains("cannot be read"))
    };
    let found = until(PATIENCE, async || log().lines().any(is_named)).await;
    assert!(found.is_some(), "without it, nothing says: {named} {name:?}\n{}", log());
    // What the member reads itself, and its state, are in its report at once; what only other programs read when it fails for a while.
    if let ("nodes" | "endpointslices", "patch" | "create") = (resource.as_str(), verb.as_str()) {
        let is_reported = |line: &str| line.contains("object not written") && line.contains(&named);
        let reported = until(PATIENCE, async || log().lines().any(is_reported)).await;
        assert!(reported.is_some(), "it is not reported: {named} {name:?}\n{}", log());
    }
    let other = log()
        .lines()
        .find(|it| it.contains(" cannot ") && it.contains("forbidden") && !it.contains(&named))
        .map(str::to_owned);
    assert_eq!(other, None, "only {named} is missing");
}

/// The member of a release whose agents are removed frees all nodes.
async fn removes_taints(east: &East, fabric: &Fabric, files: &Files) {
    east.kubectl(&["taint", "nodes", "--overwrite", "unready", "a", "hanse.dev/agent-not-ready=:NoSchedule"], "");
    let administrator = east.server.user("taints", &["system:masters"]).expect("a user");
    let kubeconfig = east.server.write_kubeconfig("taints", &administrator).expect("written");
    let (folder, log) = (east.scratch.join("taints"), east.scratch.join("taints.log"));
    files.copy_to(&folder);
    let mut command = Command::new(crate::system::programs().join("hanse-member"));
    command.args(["run", "--cluster", "east", "--hub", "127.0.0.1:1", "--source", "kubernetes", "--data"]);
    command.arg(&folder).arg("--kubeconfig").arg(&kubeconfig).arg("--remove-node-taints");
    command.args(["--agent-listen", "127.0.0.1:0", "--enrol-listen", "127.0.0.1:0"]);
    let process = Process::start(fabric.router(), command, &log).expect("it starts");
    let taints = ["get", "nodes", "-o", "jsonpath={.items[*].spec.taints[*].key}"];
    let freed = until(PATIENCE, async || !east.kubectl(&taints, "").contains("hanse.dev/agent-not-ready"));
    assert!(freed.await.is_some(), "{}", process.log());
}

/// Each right of the member's roles is taken away in turn, and the member's log names it. One that is not missed is superfluous.
async fn needs_its_rights(east: &East, fabric: &Fabric) {
    // The kinds that a member reads where they exist.
    for calico in [Calico::V3, Calico::Stored] {
        east.apply(&calico.definitions()).await;
    }
    east.apply(&crds::cluster_network_policies().expect("its project publishes it")).await;
    let objects = rendered(&complete());
    let of = |kind: &str| {
        let of_member = |it: &&Value| it["kind"] == kind && it["metadata"]["name"] == "hanse-member";
        rights(objects.iter().find(of_member).expect("a role"))
    };
    let (cluster, local) = (of("ClusterRole"), of("Role"));
    let review = ("authentication.k8s.io".to_owned(), "tokenreviews".to_owned(), "create".to_owned(), None);
    assert!(cluster.contains(&review));
    let files = Files::at(east, "rights");
    east.kubectl(&["--namespace", NAMESPACE, "scale", "deployment/hanse-member", "--replicas=0"], "");
    // The controllers recover from the outage of their API server with delays of up to half a minute.
    let stopped = until(2 * PATIENCE, async || {
        let label = ListParams::default().labels("app.kubernetes.io/component=member");
        east.pods(NAMESPACE).list(&label).await.is_ok_and(|it| it.items.is_empty())
    });
    assert!(stopped.await.is_some(), "the members have stopped");
    // Without an agent.
    let unready = "apiVersion: v1\nkind: Node\nmetadata: {name: unready, labels: {kubernetes.io/os: linux}}\n";
    east.kubectl(&["create", "-f", "-"], unready);
    let taint = (String::new(), "nodes".to_owned(), "patch".to_owned(), None);
    assert!(cluster.contains(&taint));
    let of_cluster: Vec<&Right> = cluster.iter().filter(|right| **right != review).collect();
    let mut count = 0;
    let start = Instant::now();
    let mut prepare = async |missing: &Right| {
        let index = count;
        count += 1;
        let roles = [without(index, "ClusterRole", &cluster, missing), without(index, "Role", &local, missing)];
        east.apply(&roles.join("\n---\n")).await;
        let name = format!("rights-{index}");
        let account = east.server.service_account(NAMESPACE, &name).await.expect("a token");
        in_effect(&kubeconfig::client(&account).await.expect("a client")).await;
        let kubeconfig = east.server.write_kubeconfig(&name, &account).expect("written");
        let (folder, log) = (east.scratch.join(&name), east.scratch.join(format!("{name}.log")));
        let mut command = Command::new(crate::system::programs().join("hanse-member"));
        // No hub is needed, nor may there be two members of a cluster.
        command.args(["run", "--cluster", "east", "--hub", "127.0.0.1:1", "--source", "kubernetes", "--data"]);
        command.arg(&folder).arg("--kubeconfig").arg(&kubeconfig);
        command.args(["--agent-listen", "127.0.0.1:0", "--enrol-listen", "127.0.0.1:0"]);
        (command, folder, log)
    };
    for missing in of_cluster.chunks(BATCH) {
        let mut members = Vec::new();
        for missing in missing {
            let (mut command, folder, log) = prepare(missing).await;
            // They do not wait for one Lease.
            files.copy_to(&folder);
            // The others would taint the node before it.
            if **missing == taint {
                command.arg("--taint-new-nodes");
            }
            members.push((*missing, Process::start(fabric.router(), command, &log).expect("it starts")));
        }
        for (right, process) in &members {
            is_named(right, process).await;
        }
    }
    // One after the other: they have one Lease, and write the same objects. Of the Secrets beside the first, one is enough.
    let is_alike = |name: &Option<String>| {
        let is_further = |it: &String| it != STATE && it.starts_with(STATE) && it != SLICE;
        name.as_ref().is_some_and(|it| is_further(it) && !it.ends_with("-7"))
    };
    for missing in local.iter().filter(|(.., name)| !is_alike(name)) {
        let (mut command, _, log) = prepare(missing).await;
        let clear = |object: &str, patch: &str| {
            east.kubectl(&["--namespace", NAMESPACE, "patch", object, "--type=merge", "-p", patch], "")
        };
        clear("configmap/hanse-authority", r#"{"data":null}"#);
        // Each begins without a holder; without the right to create the Lease, it must not exist.
        east.kubectl(&["--namespace", NAMESPACE, "delete", "lease", STATE, "--ignore-not-found"], "");
        if (missing.1.as_str(), missing.2.as_str()) != ("leases", "create") {
            let metadata = json!({"name": STATE, "namespace": NAMESPACE});
            let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata});
            east.kubectl(&["create", "-f", "-"], &lease.to_string());
        }
        east.kubectl(&["--namespace", NAMESPACE, "delete", "endpointslice", SLICE, "--ignore-not-found"], "");
        command.args(["--state-secret", "hanse/hanse-member", "--authority-config-map", "hanse/hanse-authority"]);
        command.args(["--agent-service", "hanse/hanse-member", "--agent-address", "192.0.2.1"]);
        let process = Process::start(fabric.router(), command, &log).expect("it starts");
        is_named(missing, &process).await;
    }
    println!("{} rights are needed: {:?}", count + 1, start.elapsed());
    removes_taints(east, fabric, &files).await;

    // Tokens of nodes are reviewed on their enrolment.
    let index = count;
    east.apply(
        &[without(index, "ClusterRole", &cluster, &review), without(index, "Role", &local, &review)].join("\n---\n"),
    )
    .await;
    let account = east.server.service_account(NAMESPACE, &format!("rights-{index}")).await.expect("a token");
    let client = kubeconfig::client(&account).await.expect("a client");
    in_effect(&client).await;
    let agents = AgentAccount {
        namespace: NAMESPACE.to_owned(),
        name: "hanse-agent".to_owned(),
        audience: "hanse-member".to_owned(),
    };
    match Reviewer::new(client, agents).node_of("token").await {
        Err(ReviewError::Failed(error)) => {
            let error = format!("{error:#}");
            assert!(error.contains("cannot create resource \"tokenreviews\""), "{error}");
        }
        other => panic!("the review fails: {other:?}"),
    }
}
