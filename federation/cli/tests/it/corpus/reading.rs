//! Reads the corpus, for each evaluator that must agree with it. The files beside this one are data.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Corpus {
    /// Cluster → namespace → labels.
    pub namespaces: BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>,
    /// `cluster:namespace/pod`; the cluster is `c` where left out.
    pub pods: BTreeMap<String, Pod>,
    /// Any other objects of cluster `c`.
    #[serde(default)]
    pub objects: Vec<Value>,
    /// Objects of the federation.
    #[serde(default)]
    pub federation: Vec<Value>,
    pub cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Pod {
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    pub ips: Vec<String>,
    #[serde(default)]
    pub containers: Vec<Value>,
    #[serde(default)]
    pub account: Option<String>,
    #[serde(default)]
    pub host_network: bool,
    #[serde(default)]
    pub phase: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// The clause that the case checks.
    pub clause: String,
    /// Policies of cluster `c`.
    #[serde(default)]
    pub policies: Vec<Value>,
    /// By cluster, for clusters other than `c`.
    #[serde(default)]
    pub elsewhere: BTreeMap<String, Vec<Value>>,
    #[serde(default)]
    pub federated: Vec<Value>,
    #[serde(default)]
    pub allow: Vec<String>,
    #[serde(default)]
    pub deny: Vec<String>,
    #[serde(default)]
    pub error: Vec<String>,
    /// The verdicts as if all staged policies were committed.
    #[serde(default)]
    pub staged: Staged,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Staged {
    #[serde(default)]
    pub allow: Vec<String>,
    #[serde(default)]
    pub deny: Vec<String>,
}

/// What a clause says of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    Allow,
    Deny,
    /// The question has no answer.
    Error,
}

impl Corpus {
    /// Reads one file of the directory, by its name without the ending.
    pub fn read(directory: &Path, name: &str) -> Self {
        let path: PathBuf = directory.join(format!("{name}.yaml"));
        let text = std::fs::read_to_string(&path).expect("the corpus is part of the repository");
        serde_yaml_ng::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// The manifests of each cluster in a case.
    pub fn clusters(&self, case: &Case) -> BTreeMap<&str, Vec<Value>> {
        let objects = |(cluster, namespaces): (&'_ String, &BTreeMap<String, BTreeMap<String, String>>)| {
            let mut objects: Vec<Value> = namespaces.iter().map(|(name, labels)| namespace(name, labels)).collect();
            let pods = self.pods.iter().map(|(name, pod)| (split(name), pod));
            let own = pods.filter(|((at, ..), _)| at == cluster);
            objects.extend(own.map(|((_, namespace, name), it)| pod(namespace, name, it)));
            if cluster == "c" {
                objects.extend(self.objects.iter().chain(&case.policies).cloned());
            }
            objects.extend(case.elsewhere.get(cluster).into_iter().flatten().cloned());
            objects
        };
        self.namespaces.iter().map(|it| (it.0.as_str(), objects(it))).collect()
    }

    /// The manifests of the federation in a case.
    pub fn federation(&self, case: &Case) -> Vec<Value> {
        self.federation.iter().chain(&case.federated).cloned().collect()
    }
}

impl Case {
    /// Each packet, with what the clause says of it. `staged`: as if all staged policies were committed.
    pub fn packets(&self, staged: bool) -> impl Iterator<Item = (&str, Expected)> {
        let lists = match staged {
            false => vec![(&self.allow, Expected::Allow), (&self.deny, Expected::Deny), (&self.error, Expected::Error)],
            true => vec![(&self.staged.allow, Expected::Allow), (&self.staged.deny, Expected::Deny)],
        };
        lists.into_iter().flat_map(|(list, expected)| list.iter().map(move |packet| (packet.as_str(), expected)))
    }
}

pub fn split(name: &str) -> (&str, &str, &str) {
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
pub fn question(text: &str) -> Value {
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
