//! The Jobs of the chart, as pods: from a store in a file to etcd and back, and from a backup into etcd, as the guide describes it.

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use hanse_e2e::kubernetes::until;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::ListParams;
use serde_json::{Value, json};

use super::replicas::{POLICY, REPLICAS, pod};
use super::{NAMESPACE, PATIENCE, Release, complete, output, set, success, template, text};
use crate::clusters::east::East;
use crate::clusters::nodes::addresses;

/// The file of the second move.
const BACK: &str = "back.redb";

/// As in the guide, with the namespace of the release.
fn kubectl(east: &East, arguments: &[&str], input: &str) -> String {
    east.kubectl(&[&["--namespace", NAMESPACE], arguments].concat(), input)
}

fn stop_hub(east: &East) {
    kubectl(east, &["scale", "statefulset/hanse-hub", "--replicas=0"], "");
    kubectl(east, &["wait", "--for=delete", "pod/hanse-hub-0", "--timeout=60s"], "");
}

/// Runs a Job of the chart until it is complete. `input` is what `kubectl attach` sends to it.
async fn run(east: &East, values: &Value, action: &str, input: Option<Vec<u8>>) {
    let values = set(values.clone(), "hub.job", json!({"action": action}));
    let job = success(template(&values).args(["--show-only", "templates/hub-job.yaml"]), "");
    kubectl(east, &["create", "-f", "-"], &job);
    if let Some(input) = input {
        attach(east, input).await;
    }
    let waiting = ["wait", "--for=condition=complete", "--timeout=60s", "job/hanse-hub-job"];
    let mut wait = east.server.kubectl().expect("kubectl");
    let waited = output(wait.args(["--namespace", NAMESPACE]).args(waiting), "");
    assert!(waited.status.success(), "{action}: {}\n{}", text(&waited.stderr), east.logs());
    kubectl(east, &["delete", "job/hanse-hub-job"], "");
}

/// The simulated node has no `attach`: it gives a container with `stdin: true` a pipe.
async fn attach(east: &East, input: Vec<u8>) {
    let label = ListParams::default().labels("app.kubernetes.io/component=hub-job");
    let mut pipe = None;
    let opened = until(PATIENCE, async || {
        let pods = east.pods(NAMESPACE).list(&label).await.expect("a list").items;
        pipe = pods.first().map(|it| east.programs.standard_input(NAMESPACE, &it.name_any(), "job"));
        pipe.as_ref().is_some_and(|it| it.exists())
    });
    assert!(opened.await.is_some(), "{}", east.logs());
    let pipe = pipe.expect("it exists");
    // This waits for the reader; the node runs meanwhile.
    let written = tokio::task::spawn_blocking(move || fs::write(pipe, input));
    tokio::time::timeout(PATIENCE, written).await.expect("it is read").expect("no panic").expect("it is written");
}

/// From a file to etcd, where a backup is made, back to another file, and from the backup into the store of `values`.
pub async fn moves_to_etcd(east: &East, release: &Release<'_>, values: &Value, files: &Path) {
    let only = |values: Value| set(set(values, "member.enabled", json!(false)), "agent.enabled", json!(false));
    let operated = set(complete(), "hub.operator", json!({"enabled": true}));
    let embedded = only(set(operated, "hub.persistence", json!({"storageClassName": ""})));
    release.helm(&["install", "hanse"], Some(&embedded));
    east.ready_component("hub", 1).await;
    east.kubectl(&["apply", "-f", "-"], POLICY);
    east.kubectl(&["wait", "--for=condition=Accepted", "--timeout=60s", "fnp/web"], "");
    let claim = |number: usize| east.scratch.join(format!("claims/east/{NAMESPACE}/data-{}/hub", pod(number)));
    let root = |number: usize| fs::read(claim(number).join("ca.pem")).expect("the certificate of the authority");
    let before = root(0);

    let url = values["hub"]["etcd"]["url"].as_str().expect("a URL");
    let first = url.replace("/hanse?", "/first?");
    assert_ne!(first, url);
    let on_first = set(only(values.clone()), "hub.etcd.url", json!(first));
    stop_hub(east);
    run(east, &on_first, "MigrateToEtcd", None).await;
    let backup = back_up(&first.replace("/etc/hanse/etcd", files.to_str().expect("UTF-8")), files);

    // Back to a file, which a hub serves.
    let back = set(on_first, "hub.persistence.file", json!(BACK));
    run(east, &back, "MigrateToFile", None).await;
    assert!(claim(0).join(BACK).is_file());
    let etcd = &back["hub"]["etcd"];
    let back = set(set(back.clone(), "hub.replicas", json!(1)), "hub.etcd", set(etcd.clone(), "url", json!("")));
    let back = set(back, "hub.hostNetwork", json!(true));
    release.helm(&["upgrade", "hanse"], Some(&back));
    let hub = east.ready_component("hub", 1).await.remove(0);
    assert_eq!(root(0), before, "it is the same ClusterSet");
    // In the network of its node, as for API servers that reach no pods.
    let node = east.kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].status.addresses[*].address}"], "");
    let address = addresses(&hub)[0];
    assert!(node.split(' ').any(|it| it == address.to_string()), "{address} is not of a node: {node}");
    for port in [7443, 7444] {
        TcpStream::connect((address, port)).expect("it listens there");
    }
    assert!(TcpStream::connect((address, 7445)).is_err(), "health is on loopback");
    let store = release.get("statefulset/hanse-hub", "{.spec.template.spec.containers[0].args}");
    assert!(store.contains(&format!("--store=file:/data/hub/{BACK}")), "{store}");
    serves_the_policy(east, &hub, &claim(0)).await;

    // The restored store is that of the backup.
    stop_hub(east);
    run(east, &only(values.clone()), "Restore", Some(backup)).await;
    let notes = release.helm(&["upgrade", "hanse"], Some(&only(values.clone())));
    assert!(notes.contains("store is on etcd") && notes.contains("hub.advertise"), "{notes}");
    let hub = east.ready_component("hub", REPLICAS).await.remove(0);
    assert!((0..REPLICAS).all(|number| root(number) == before), "it is the same ClusterSet");
    serves_the_policy(east, &hub, &claim(0)).await;
}

/// `hanse-hub backup - --store`, with the files of the Secret, which only their owner may read.
fn back_up(url: &str, files: &Path) -> Vec<u8> {
    fs::set_permissions(files.join("tls.key"), fs::Permissions::from_mode(0o600)).expect("it is the test's");
    let mut command = Command::new(crate::system::programs().join("hanse-hub"));
    let copied = command.args(["backup", "-", "--store", url]).output().expect("it runs");
    assert!(copied.status.success() && !copied.stdout.is_empty(), "{}", text(&copied.stderr));
    copied.stdout
}

/// The hub has the policy from before.
async fn serves_the_policy(east: &East, hub: &Pod, data: &Path) {
    let mut shown = String::new();
    let found = until(PATIENCE, async || {
        let mut command = Command::new(crate::system::programs().join("hanse"));
        command.arg("--context").arg(data.join("admin.context")).args(["get", "fnp", "web", "-o", "json"]);
        let printed = east.network(hub).enter(|| output(&mut command, ""));
        shown = text(&[printed.stdout, printed.stderr].concat());
        printed.status.success() && shown.contains("\"platform\"")
    });
    assert!(found.await.is_some(), "{shown}\n{}", east.logs());
}
