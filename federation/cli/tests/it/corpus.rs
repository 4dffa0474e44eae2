//! The corpus: every clause of what the policy APIs mean, as manifests and packets with the verdict that the clause
//! gives. The files under `corpus/` are the data; this runs them through `hanse policy explain`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Cluster → namespace → labels.
    namespaces: BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>,
    /// `cluster:namespace/pod`; the cluster is `c` where left out.
    pods: BTreeMap<String, Pod>,
    /// Any other objects of cluster `c`.
    #[serde(default)]
    objects: Vec<Value>,
    /// Objects of the federation.
    #[serde(default)]
    federation: Vec<Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Pod {
    #[serde(default)]
    labels: BTreeMap<String, String>,
    ips: Vec<String>,
    #[serde(default)]
    containers: Vec<Value>,
    #[serde(default)]
    account: Option<String>,
    #[serde(default)]
    host_network: bool,
    #[serde(default)]
    phase: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// The clause that the case stands for.
    clause: String,
    /// Policies of cluster `c`.
    #[serde(default)]
    policies: Vec<Value>,
    /// By cluster, for clusters other than `c`.
    #[serde(default)]
    elsewhere: BTreeMap<String, Vec<Value>>,
    #[serde(default)]
    federated: Vec<Value>,
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    deny: Vec<String>,
    #[serde(default)]
    error: Vec<String>,
}

#[test]
fn kubernetes_network_policy() {
    check("kubernetes");
}

#[test]
fn cluster_network_policy() {
    check("cluster");
}

#[test]
fn calico() {
    check("calico");
}

#[test]
fn federated() {
    check("federated");
}

fn check(name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/it/corpus/{name}.yaml"));
    let text = std::fs::read_to_string(&path).expect("the corpus is part of the repository");
    let file: File = serde_yaml_ng::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut wrong = Vec::new();
    for case in &file.cases {
        for (query, expected, answer) in answers(&file, case) {
            if answer["verdict"].as_str().unwrap_or("error") != expected {
                wrong.push(format!("{}\n  {query}: expected {expected}, was {answer}", case.clause));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), file.cases.len(), wrong.join("\n"));
}

/// Each query of a case with the expected verdict and the answer.
fn answers<'c>(file: &File, case: &'c Case) -> Vec<(&'c str, &'static str, Value)> {
    let root = tempfile::tempdir().expect("temporary directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(["policy", "explain", "-o", "json"]);
    for (cluster, namespaces) in &file.namespaces {
        let directory = root.path().join(cluster);
        std::fs::create_dir(&directory).expect("directory");
        let mut objects: Vec<Value> = namespaces.iter().map(|(name, labels)| namespace(name, labels)).collect();
        objects.extend(
            file.pods
                .iter()
                .map(|(name, pod)| (split(name), pod))
                .filter(|((at, ..), _)| at == cluster)
                .map(|((_, namespace, name), it)| pod(namespace, name, it)),
        );
        if cluster == "c" {
            objects.extend(file.objects.iter().chain(&case.policies).cloned());
        }
        objects.extend(case.elsewhere.get(cluster).into_iter().flatten().cloned());
        write(&directory.join("all.yaml"), &objects);
        command.arg("--cluster").arg(format!("{cluster}={}", directory.display()));
    }
    let directory = root.path().join("the-federation");
    std::fs::create_dir(&directory).expect("directory");
    write(&directory.join("all.yaml"), &file.federation.iter().chain(&case.federated).cloned().collect::<Vec<_>>());
    command.arg("--federation").arg(&directory);
    let lists = [(&case.allow, "allow"), (&case.deny, "deny"), (&case.error, "error")];
    let queries: Vec<(&str, &str)> = lists
        .into_iter()
        .flat_map(|(list, expected)| list.iter().map(move |query| (query.as_str(), expected)))
        .collect();
    let lines: Vec<String> = queries.iter().map(|(query, _)| question(query).to_string()).collect();
    let questions = root.path().join("queries.jsonl");
    std::fs::write(&questions, lines.join("\n")).expect("queries");
    let output = command.arg("--queries").arg(&questions).output().expect("hanse runs");
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let answers: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON lines")).collect();
    assert_eq!(answers.len(), queries.len(), "{}: {stderr}", case.clause);
    assert!(case.error.is_empty() == output.status.success(), "{}: {} {stderr}", case.clause, output.status);
    queries.into_iter().zip(answers).map(|((query, expected), answer)| (query, expected, answer)).collect()
}

fn write(path: &Path, objects: &[Value]) {
    let documents: Vec<String> = objects.iter().map(|object| serde_yaml_ng::to_string(object).expect("YAML")).collect();
    std::fs::write(path, documents.join("---\n")).expect("manifests");
}

fn split(name: &str) -> (&str, &str, &str) {
    let (cluster, rest) = name.split_once(':').unwrap_or(("c", name));
    let (namespace, pod) = rest.split_once('/').unwrap_or_else(|| panic!("{name}: cluster:namespace/pod"));
    (cluster, namespace, pod)
}

fn namespace(name: &str, labels: &BTreeMap<String, String>) -> Value {
    let mut labels = labels.clone();
    labels.insert("kubernetes.io/metadata.name".to_owned(), name.to_owned());
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

fn pod(namespace: &str, name: &str, pod: &Pod) -> Value {
    let ips: Vec<Value> = pod.ips.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": pod.labels},
        "spec": {
            "serviceAccountName": pod.account.as_deref().unwrap_or("default"),
            "hostNetwork": pod.host_network,
            "nodeName": "n1",
            "containers": pod.containers,
        },
        "status": {
            "phase": pod.phase.as_deref().unwrap_or("Running"),
            "podIP": pod.ips.first(),
            "podIPs": ips,
        },
    })
}

/// `FROM -> TO PROTOCOL[/PORT] [from PORT] [type/code T/C] [v4|v6]`, an end being an address or as in `pods`.
fn question(text: &str) -> Value {
    let (from, rest) = text.split_once(" -> ").unwrap_or_else(|| panic!("{text}: FROM -> TO PROTOCOL"));
    let mut words = rest.split(' ');
    let end = |text: &str| match text.contains('/') {
        true => {
            let (cluster, namespace, pod) = split(text);
            json!({"cluster": cluster, "namespace": namespace, "pod": pod})
        }
        false => json!({"ip": text}),
    };
    let mut question = json!({"from": end(from), "to": end(words.next().unwrap_or_default())});
    let protocol = words.next().unwrap_or_else(|| panic!("{text}: no protocol"));
    let (protocol, port) = protocol.split_once('/').map_or((protocol, None), |(protocol, port)| (protocol, Some(port)));
    question["protocol"] = json!(protocol);
    if let Some(port) = port {
        question["port"] = json!(port.parse::<u16>().expect(text));
    }
    while let Some(word) = words.next() {
        match word {
            "v4" => question["ipVersion"] = json!(4),
            "v6" => question["ipVersion"] = json!(6),
            "from" => question["sourcePort"] = json!(words.next().expect(text).parse::<u16>().expect(text)),
            "type/code" => {
                let (kind, code) = words.next().and_then(|word| word.split_once('/')).expect(text);
                question["icmp"] =
                    json!({"type": kind.parse::<u8>().expect(text), "code": code.parse::<u8>().expect(text)});
            }
            other => panic!("{text}: {other}?"),
        }
    }
    question
}
