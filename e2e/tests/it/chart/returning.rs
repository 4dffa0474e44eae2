//! Members that return: a leader that was cut off, one with a new join token, and one whose state is where an earlier version of the chart
//! left it. And what no replica may drop meanwhile: policies whose kind was deleted.

use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use hanse_e2e::kubernetes::crds::Calico;
use hanse_e2e::kubernetes::until;
use hanse_e2e::namespace::Namespace;
use hanse_e2e::probe::Observed;
use hanse_e2e::sandbox::{self, Privilege};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::ListParams;
use serde_json::{Value, json};

use super::failover::{CLOSED_CLIENT, Files, SLICE, STATE, leader, leads};
use super::installed::{AGENTS, values};
use super::{NAMESPACE, PATIENCE, Release, STATE as SECRETS, output, set, success};
use crate::clusters::east::East;

/// The user of the member in its pod.
const USER: u32 = 65532;
const KIND: &str = "customresourcedefinition/globalnetworkpolicies.projectcalico.org";
/// The pod that a policy of that kind closes.
const CLOSED_POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: kept, namespace: default, labels: {app: kept}}
spec: {nodeName: a, containers: [{name: kept, image: kept, ports: [{containerPort: 8080}]}]}
";
const CLOSES: &str = "apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: keep}
spec: {selector: app == 'kept', types: [Ingress], ingress: [{action: Deny}]}
";
/// A pod that exists only for the leader that takes over.
const LATER_POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: later, namespace: default, labels: {app: later}}
spec: {nodeName: b, containers: [{name: later, image: later, ports: [{containerPort: 8080}]}]}
";

/// Drops packets of the members on a node; until it is dropped.
struct Cut(Arc<Namespace>);

impl Cut {
    fn set(&self, rules: &str) {
        let chain = format!("chain output {{ type filter hook output priority -300; {rules} }}");
        let table = "table inet partition";
        let text = format!("{table}\ndelete {table}\n{table} {{\n{chain}\n}}\n");
        self.0.enter(|| success(Command::new("nft").args(["-f", "-"]), &text));
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.enter(|| drop(output(Command::new("nft").args(["-f", "-"]), "delete table inet partition\n")));
    }
}

/// A policy closes a pod, and its kind is deleted. Returns the pod.
pub async fn deletes_a_kind(east: &East, hub: &Pod, from: &Pod) -> Pod {
    east.apply(CLOSED_POD).await;
    let pod = east.ready("default", "app=kept", 1).await;
    east.until_observed(from, &pod, Observed::Open).await;
    east.apply(&Calico::V3.definitions()).await;
    east.apply(CLOSES).await;
    east.until_observed(from, &pod, Observed::Closed).await;
    east.kubectl(&["delete", KIND], "");
    is_kept(east, hub).await;
    pod[0].clone()
}

/// The member that leads keeps the policy, and reports it.
pub async fn is_kept(east: &East, hub: &Pod) {
    let text = "1 object kept in force (globalnetworkpolicies.projectcalico.org/keep)";
    let reported = until(PATIENCE, async || {
        let status = east.status(hub);
        status["connected"] == true && status.to_string().contains(text)
    });
    assert!(reported.await.is_some(), "{:#}\n{}", east.status(hub), east.logs());
}

/// Only the command ends it.
pub async fn forgets(east: &East, from: &Pod, pod: &Pod) {
    let files = Files::at(east, "forgetting");
    assert!(files.run(&["forget"]).contains("globalnetworkpolicies.projectcalico.org/keep"));
    files.run(&["forget", "--all"]);
    let refused = files.fail(&["flows"]);
    assert!(refused.contains("another member of the cluster leads"), "{refused}");
    east.until_observed(from, std::slice::from_ref(pod), Observed::Open).await;
}

/// The leader is cut off from everything, and another one takes its place. When the hub can be reached again, and the API server cannot yet,
/// it does not know that it no longer leads: it publishes nothing.
pub async fn yields_after_a_partition(east: &East, hub: &Pod, web: &Pod, client: &Pod) {
    let first = leads(east).await;
    let name = first.name_any();
    let log = || east.programs.log(NAMESPACE, &name, "member");
    let starts = || log().matches("waiting for the Lease").count();
    let (before, closes) = (starts(), std::slice::from_ref(client));
    let port = east.server.address().port();
    let cut = Cut(east.network(&first));
    let start = Instant::now();
    cut.set(&format!("tcp dport {{ {port}, 7443, 7444 }} drop; tcp sport {{ 7500, 7501 }} drop;"));
    east.apply(LATER_POD).await;
    east.kubectl(&["apply", "-f", "-"], CLOSED_CLIENT);
    let second = east.next_leader(&first).await;
    println!("another member led {:?} after the leader was cut off", start.elapsed());
    east.until_observed(web, closes, Observed::Closed).await;
    println!("a policy changed packets {:?} after the leader was cut off", start.elapsed());
    east.until_current(hub, AGENTS).await;
    println!("all agents were current {:?} after the leader was cut off", start.elapsed());
    println!("{}", took(&east.programs.log(NAMESPACE, &second.name_any(), "member")));
    is_kept(east, hub).await;

    let state = || east.kubectl(&["--namespace", NAMESPACE, "get", "secret", STATE, "-o", "jsonpath={.data}"], "");
    let slice = || east.kubectl(&["--namespace", NAMESPACE, "get", "endpointslice", SLICE, "-o", "yaml"], "");
    let (state_before, slice_before, served) = (state(), slice(), east.status(hub));
    let number = |status: &Value, key: &str| status[key].as_u64().unwrap_or_default();
    let is_of_second = || {
        let status = east.status(hub);
        let position = |it: &Value| (number(it, "epoch"), number(it, "revision"));
        assert!(
            position(&status) >= position(&served),
            "what the first one knows is published: {status:#}\n{served:#}"
        );
        assert!(status["connected"] == true && !status.to_string().contains("in use"), "{status:#}");
    };
    cut.set(&format!("tcp dport {port} drop;"));
    let start = Instant::now();
    let yielded = until(PATIENCE, async || {
        is_of_second();
        log().contains("another process publishes for the cluster") && starts() > before
    });
    assert!(yielded.await.is_some(), "{}", log());
    println!("the former leader ended {:?} after it reached the hub again", start.elapsed());
    assert!(log().contains("was elected to publish"), "{}", log());
    drop(cut);
    east.members().await;
    is_of_second();
    assert_eq!(leader(east).await.map(|it| it.uid()), Some(second.uid()), "the leader has not changed");
    assert_eq!((state(), slice()), (state_before, slice_before), "only the leader writes");
    east.until_current(hub, AGENTS).await;
    east.until_observed(web, closes, Observed::Closed).await;
    east.kubectl(&["--namespace", "default", "delete", "networkpolicy", "client"], "");
    east.until_observed(web, closes, Observed::Open).await;
    east.kubectl(&["--namespace", "default", "delete", "pod", "later", "--wait=false"], "");
}

/// What a new leader does until its first rule sets, from its log.
fn took(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let acquired = lines.iter().rposition(|line| line.contains("Lease acquired")).unwrap_or_default();
    let end = lines[acquired..].iter().position(|line| line.contains("compiled")).unwrap_or_default();
    lines[acquired..=acquired + end].join("\n")
}

/// The nodes, with their keys.
fn nodes(files: &Files) -> Value {
    let mut list: Value = serde_json::from_str(&files.run(&["node", "list", "-o", "json"])).expect("JSON");
    list["items"].take()
}

/// The cluster was removed at the hub, and joins with a new token. Its agents stay enrolled, and enforce meanwhile.
pub async fn joins_again(east: &East, hub: &Pod) {
    let files = Files::at(east, "joining");
    let (before, start) = (nodes(&files), Instant::now());
    east.hanse(hub, &["cluster", "revoke", "east", "--reason", "test"]);
    let token = east.hanse(hub, &["token", "create", "--cluster", "east"]);
    let kubectl = |arguments: &[&str], input: &str| {
        let all: Vec<&str> = ["--namespace", NAMESPACE].into_iter().chain(arguments.iter().copied()).collect();
        east.kubectl(&all, input)
    };
    kubectl(&["create", "secret", "generic", "hanse-join", "--from-file=token=/dev/stdin"], token.trim());
    let joined = r#"[{"op":"remove","path":"/data/member.pem"}]"#;
    kubectl(&["patch", "secret", STATE, "--type=json", "-p", joined], "");
    let certificate = || kubectl(&["get", "secret", STATE, "-o", r"jsonpath={.data.member\.pem}"], "");
    assert_eq!(certificate(), "");
    kubectl(&["rollout", "restart", "deployment/hanse-member"], "");
    let has_joined = until(PATIENCE, async || !certificate().is_empty());
    assert!(has_joined.await.is_some(), "{}", east.logs());
    // What the hub says of the agents is not what a member said that has ended.
    kubectl(&["rollout", "status", "deployment/hanse-member", "--timeout=60s"], "");
    east.until_current(hub, AGENTS).await;
    println!("all agents were current {:?} after the cluster was revoked, and joined again", start.elapsed());
    kubectl(&["delete", "secret", "hanse-join"], "");
    assert_eq!(nodes(&files), before, "no node has enrolled again");
}

/// The state is in a claim, as earlier versions of the chart left it, and `helm upgrade` moves it into the Secrets.
pub async fn moves_from_a_claim(east: &East, hub: &Pod) {
    let files = Files::at(east, "moving");
    let (before, release, start) = (nodes(&files), Release { server: &east.server }, Instant::now());
    let last = leads(east).await.uid().expect("it has a uid");
    let claim = east.claim("hanse-member");
    let folder = claim.join("member");
    std::fs::create_dir_all(&claim).expect("a folder");
    east.kubectl(&["--namespace", NAMESPACE, "scale", "deployment/hanse-member", "--replicas=0"], "");
    let label = ListParams::default().labels("app.kubernetes.io/component=member");
    let stopped = until(PATIENCE, async || east.pods(NAMESPACE).list(&label).await.is_ok_and(|it| it.items.is_empty()));
    assert!(stopped.await.is_some(), "the members have stopped");
    files.copy_to(&folder);
    // The caches of the process that served last: only they contain the policies that are kept.
    let caches = east.scratch.join("volumes").join(last).join("data/member/source");
    success(Command::new("cp").arg("-a").arg(caches).arg(&folder), "");
    if sandbox::privilege() != Some(Privilege::UserNamespace) {
        give(&claim);
    }
    let mut delete = vec!["--namespace", NAMESPACE, "delete", "secret"];
    delete.extend(SECRETS.iter().map(String::as_str));
    east.kubectl(&delete, "");
    let text = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": "hanse-member", "namespace": NAMESPACE},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}},
        },
    });
    east.kubectl(&["apply", "-f", "-"], &text.to_string());
    let values = values(east, Some(hub));
    let moving =
        set(set(values.clone(), "member.cache", json!({"claim": "hanse-member"})), "member.replicas", json!(1));
    release.helm(&["upgrade", "hanse"], Some(&moving));
    east.ready_component("member", 1).await;
    east.until_current(hub, AGENTS).await;
    println!("all agents were current {:?} after the upgrade from a claim began", start.elapsed());
    for file in ["member.pem", "intermediate.pem"] {
        assert!(!folder.join(file).exists(), "{file} was moved");
    }
    assert_eq!(std::fs::read_dir(folder.join("nodes")).map_or(0, Iterator::count), 0, "the keys of nodes were moved");
    release.helm(&["upgrade", "hanse"], Some(&values));
    east.members().await;
    east.until_current(hub, AGENTS).await;
    println!("all members were ready {:?} after the upgrade from a claim began", start.elapsed());
    assert_eq!(nodes(&files), before, "no node has enrolled again");
    east.kubectl(&["--namespace", NAMESPACE, "delete", "persistentvolumeclaim", "hanse-member", "--wait=false"], "");
}

/// Gives a folder to the user of the member.
fn give(path: &Path) {
    chown(path, Some(USER), Some(USER)).expect("it is given");
    for entry in path.read_dir().into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => give(&path),
            path => chown(&path, Some(USER), Some(USER)).expect("it is given"),
        }
    }
}
