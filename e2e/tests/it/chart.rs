//! The Helm chart: what it renders, what it refuses, and what a release leaves behind.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use hanse_e2e::go;
use hanse_member::state::SecretName;
use serde::Deserialize as _;
use serde_json::{Value, json};

mod failover;
mod images;
pub(crate) mod installed;
mod jobs;
mod openshift;
mod releases;
mod replicas;
mod returning;
mod state;

use releases::Release;

const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const NAMESPACE: &str = "hanse";
/// Helm takes its own version for that of a server that it does not know.
const VERSION: &str = "v1.36.0";
const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// The set of values with which the hub uses the network of its node.
const ON_HOST: &str = "hub on host";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root").to_owned()
}

fn chart() -> PathBuf {
    root().join("deploy/chart")
}

/// Helm without a server.
fn helm() -> Command {
    let mut command = Command::new(go::Program::Helm.build().expect("Helm is built"));
    let nowhere = std::env::temp_dir().join("hanse-test-helm");
    for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(name, &nowhere);
    }
    command
}

/// Runs a command with a text as its input.
pub(crate) fn output(command: &mut Command, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().expect("it starts");
    process.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads its input");
    process.wait_with_output().expect("it ends")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// As [`output`], of a command that succeeds.
fn success(command: &mut Command, input: &str) -> String {
    let ended = output(command, input);
    assert!(ended.status.success(), "{command:?}\n{}{}", text(&ended.stderr), text(&ended.stdout));
    text(&ended.stdout)
}

/// Values with all components enabled.
pub(crate) fn complete() -> Value {
    json!({
        "image": {"registry": "registry.example/hanse"},
        "hub": {"enabled": true, "image": {"digest": DIGEST}},
        "member": {
            "enabled": true, "image": {"digest": DIGEST}, "cluster": "east", "hub": {"tokenSecret": {"name": "hanse-join"}},
        },
        "agent": {"enabled": true, "image": {"digest": DIGEST}},
    })
}

pub(crate) fn set(mut values: Value, path: &str, value: Value) -> Value {
    let mut at = &mut values;
    for key in path.split('.') {
        at = &mut at[key];
    }
    *at = value;
    values
}

/// Sets of values, which between them render every line of the templates.
pub(crate) fn value_sets() -> BTreeMap<&'static str, Value> {
    let remote = json!(["hub.example:7443", "[2001:db8::1]:7443"]);
    let remote = set(set(complete(), "hub.enabled", json!(false)), "member.hub.addresses", remote);
    let remote = set(remote, "member.hub.joinAddresses", json!(["hub.example:7444"]));
    let hub = set(set(complete(), "member.enabled", json!(false)), "agent.enabled", json!(false));
    let mut all = complete();
    for (path, value) in [
        ("openshift.enabled", json!(true)),
        ("image.pullSecrets", json!(["registry"])),
        (
            "hub.service",
            json!({
                "type": "LoadBalancer", "annotations": {"example.com/a": "b"}, "loadBalancerClass": "example.com/internal",
                "loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8::/32"],
            }),
        ),
        ("hub.persistence", json!({"storageClassName": "", "whenDeleted": "Delete"})),
        ("hub.nodeSelector", json!({"a": "b"})),
        ("hub.affinity", json!({"podAntiAffinity": {}})),
        ("hub.listenHost", json!("[::]")),
        ("hub.operator", json!({"enabled": true})),
        (
            "hub.webhook",
            json!({
                "enabled": true, "from": [{"ipBlock": {"cidr": "192.0.2.1/32"}}],
                "clientCA": {"secretName": "api-server-ca", "names": ["kube-apiserver"]},
            }),
        ),
        ("hub.resources", json!({"limits": {"cpu": 2}})),
        ("member.hostNetwork", json!(false)),
        ("member.state", json!({"whenDeleted": "Delete"})),
        ("member.cache", json!({"size": "2Gi", "claim": "hanse-member"})),
        ("member.replicas", json!(1)),
        ("member.calico", json!(false)),
        ("member.clusterNetworkPolicies", json!(false)),
        ("member.tolerations", json!([{"key": "a", "operator": "Exists"}])),
        ("agent.member", json!({"host": "member.example"})),
        ("agent.uplinks", json!(["eth0", "eth1"])),
        ("agent.maxUnavailable", json!(3)),
        ("metrics.enabled", json!(true)),
        ("metrics.audience", json!("hanse-metrics")),
        (
            "metrics.tls",
            json!({"secretName": "metrics-tls", "issuerRef": {"kind": "ClusterIssuer", "name": "internal"}}),
        ),
        ("metrics.readers", json!([{"kind": "ServiceAccount", "name": "prometheus", "namespace": "monitoring"}])),
        ("metrics.from", json!([{"namespaceSelector": {"matchLabels": {"a": "b"}}}])),
        (
            "metrics.serviceMonitor",
            json!({"enabled": true, "labels": {"release": "prometheus"}, "tokenFile": "/var/run/hanse/token"}),
        ),
        ("metrics.prometheusRule", json!({"enabled": true, "labels": {"release": "prometheus"}})),
        ("metrics.dashboard", json!({"enabled": true, "annotations": {"grafana_folder": "Network"}})),
    ] {
        all = set(all, path, value);
    }
    let cleanup = set(complete(), "agent.cleanup", json!(true));
    let etcd = set(set(hub.clone(), "hub.replicas", json!(3)), "hub.keySecret", json!({"name": "hanse-unlock"}));
    let url = "etcds://etcd-0.etcd:2379,etcd-1.etcd:2379/hanse?ca=/etc/hanse/etcd/ca.crt";
    let etcd = set(etcd, "hub.etcd", json!({"url": url, "secretName": "hanse-etcd"}));
    let names = json!({"example.com/a": "b", "external-dns.alpha.kubernetes.io/hostname": "hub.example"});
    let of_replica = json!({"external-dns.alpha.kubernetes.io/hostname": "$(POD_NAME).hub.example"});
    let service = json!({"type": "LoadBalancer", "annotations": names, "replicaAnnotations": of_replica});
    let etcd = set(etcd, "hub.service", service);
    let mut on_host = set(complete(), "openshift.enabled", json!(true));
    for (path, value) in [
        ("hub.hostNetwork", json!(true)),
        ("hub.operator", json!({"enabled": true})),
        (
            "hub.webhook",
            json!({"enabled": true, "clientCA": {"secretName": "api-server-ca", "names": ["kube-apiserver"]}}),
        ),
    ] {
        on_host = set(on_host, path, value);
    }
    let sets = [
        ("complete", complete()),
        (ON_HOST, on_host),
        ("remote hub", remote),
        ("hub only", hub),
        ("all options", all),
        ("cleanup", cleanup),
        ("etcd", etcd),
    ];
    BTreeMap::from(sets)
}

/// The Secrets that a member expects.
static STATE: LazyLock<Vec<String>> =
    LazyLock::new(|| SecretName { namespace: NAMESPACE.to_owned(), name: "hanse-member".to_owned() }.secrets());

fn template(values: &Value) -> Command {
    let mut command = helm();
    command.args(["template", "hanse"]).arg(chart());
    command.args(["--namespace", NAMESPACE, "--kube-version", VERSION, "--set-json"]);
    // One argument for each key at the top.
    let keys = values.as_object().expect("an object");
    let keys: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
    command.arg(keys[0].clone());
    for key in &keys[1..] {
        command.arg("--set-json").arg(key);
    }
    command
}

/// What `helm template` prints.
pub(crate) fn manifests_of(values: &Value) -> String {
    success(&mut template(values), "")
}

pub(crate) fn rendered(values: &Value) -> Vec<Value> {
    let rendered = manifests_of(values);
    let documents = serde_yaml_ng::Deserializer::from_str(&rendered);
    let objects = documents.map(|document| Value::deserialize(document).expect("YAML"));
    objects.filter(|object| !object.is_null()).collect()
}

/// Name of the component, and the pod's spec, of all workloads.
fn pods(objects: &[Value]) -> Vec<(String, &Value)> {
    let workloads = objects.iter().filter(|it| it["spec"]["template"]["spec"].is_object());
    workloads
        .map(|it| {
            let component = it["metadata"]["labels"]["app.kubernetes.io/component"].as_str().expect("a component");
            (component.to_owned(), &it["spec"]["template"]["spec"])
        })
        .collect()
}

pub(crate) fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

#[test]
fn lint_finds_nothing() {
    for (name, values) in value_sets() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        serde_json::to_writer(&file, &values).expect("written");
        let mut command = helm();
        command.args(["lint", "--strict", "--kube-version", VERSION]).arg(chart()).arg("--values").arg(file.path());
        println!("{name}: {}", success(&mut command, ""));
    }
}

#[test]
fn wrong_values_are_refused_by_name() {
    for (path, value, named) in [
        ("image.registry", json!(""), "/image/registry"),
        ("image.registry", json!("registry.example/"), "/image/registry"),
        ("image.tag", json!("latest"), "'tag'"),
        ("hub.image.digest", json!(""), "/hub/image/digest"),
        ("hub.image.digest", json!("latest"), "/hub/image/digest"),
        ("member.image.digest", json!(""), "/member/image/digest"),
        ("agent.image.digest", json!(""), "/agent/image/digest"),
        ("hub.replicas", json!(3), "hub.etcd.url"),
        ("hub.replicas", json!(0), "/hub/replicas"),
        ("hub.etcd.url", json!("file:/data/hub.redb"), "/hub/etcd/url"),
        ("hub.etcd.url", json!("etcd://etcd:2379"), "hub.keySecret.name"),
        ("hub.advertise", json!("hub.example"), "/hub/advertise"),
        ("hub.leaseSeconds", json!(1), "/hub/leaseSeconds"),
        ("hub.job.action", json!("Backup"), "/hub/job/action"),
        ("hub.job.action", json!("MigrateToEtcd"), "hub.etcd.url is empty"),
        ("hub.persistence.file", json!("../hub.redb"), "/hub/persistence/file"),
        ("hub.resources.limits.memory", json!("much"), "/hub/resources/limits/memory"),
        ("hub.persistence.whenDeleted", json!("Maybe"), "/hub/persistence/whenDeleted"),
        ("hub.podDisruptionBudget.maxUnavailable", json!(2), "/hub/podDisruptionBudget/maxUnavailable"),
        ("member.replicas", json!(0), "/member/replicas"),
        ("member.cache.claim", json!("hanse-member"), "member.replicas"),
        ("member.persistence", json!({"enabled": false}), "'persistence'"),
        ("member.cluster", json!(""), "/member/cluster"),
        ("member.cluster", json!("East"), "/member/cluster"),
        ("member.hub.addresses", json!(["hub.example"]), "/member/hub/addresses/0"),
        ("member.hub.tokenSecret.name", json!(""), "/member/hub/tokenSecret/name"),
        ("member.unknownPods", json!("deny"), "/member/unknownPods"),
        ("agent.enabled", json!("yes"), "/agent/enabled"),
        ("agent.maxUnavailable", json!("0%"), "/agent/maxUnavailable"),
        ("agent.uplinks", json!(["an interface of a node"]), "/agent/uplinks/0"),
        ("metrics.enabled", json!(true), "/metrics/tls/secretName"),
        ("metrics.serviceMonitor.enabled", json!(true), "metrics.enabled"),
        (
            "metrics",
            json!({"enabled": true, "tls": {"secretName": "m", "agents": {"secretName": "m"}}}),
            "metrics.tls.agents.secretName",
        ),
        (
            "metrics",
            json!({"enabled": true, "audience": "a", "tls": {"secretName": "m"}, "serviceMonitor": {"enabled": true}}),
            "metrics.serviceMonitor.tokenFile",
        ),
        ("metrics.dashboard.enabled", json!(true), "metrics.enabled"),
        ("hub.webhook.clientCA.names", json!(["kube-apiserver"]), "hub.webhook.clientCA.secretName"),
        ("hub.enabled", json!(false), "member.hub.addresses"),
        ("member.enabled", json!(false), "member.enabled"),
        (
            "hub",
            json!({"enabled": false, "image": {"digest": DIGEST}, "operator": {"enabled": true}}),
            "hub.operator.enabled",
        ),
        ("hub.webhook.enabled", json!(true), "hub.operator.enabled"),
        (
            "hub",
            json!({"image": {"digest": DIGEST}, "operator": {"enabled": true}, "webhook": {"enabled": true}, "enabled": true}),
            "hub.webhook.from and hub.webhook.clientCA.secretName",
        ),
        (
            "hub",
            json!({
                "enabled": true, "image": {"digest": DIGEST}, "operator": {"enabled": true}, "networkPolicy": false,
                "webhook": {"enabled": true, "from": [{"ipBlock": {"cidr": "192.0.2.1/32"}}]},
            }),
            "hub.webhook.clientCA.secretName is empty, and hub.networkPolicy is false",
        ),
        ("hub.webhook.certificateSeconds", json!(1), "/hub/webhook/certificateSeconds"),
        (
            "hub",
            json!({
                "enabled": true, "image": {"digest": DIGEST}, "operator": {"enabled": true}, "hostNetwork": true,
                "webhook": {"enabled": true, "from": [{"ipBlock": {"cidr": "192.0.2.1/32"}}]},
            }),
            "hub.webhook.clientCA.secretName is empty, and hub.hostNetwork is true",
        ),
        (
            "hub",
            json!({
                "enabled": true, "image": {"digest": DIGEST}, "operator": {"enabled": true}, "hostNetwork": true,
                "webhook": {"enabled": true, "clientCA": {"secretName": "api-server-ca"}},
            }),
            "hub.webhook.clientCA.names is empty, and hub.hostNetwork is true",
        ),
        ("hub.service.loadBalancerClass", json!("internal"), "hub.service.type LoadBalancer, not ClusterIP"),
        ("hub.service.loadBalancerSourceRanges", json!(["192.0.2.0/24"]), "hub.service.type LoadBalancer"),
        ("hub.service.loadBalancerSourceRanges", json!(["192.0.2.1"]), "/hub/service/loadBalancerSourceRanges/0"),
        ("openshift.enabled", json!("yes"), "/openshift/enabled"),
    ] {
        let refused = output(&mut template(&set(complete(), path, value.clone())), "");
        let message = text(&refused.stderr);
        assert!(!refused.status.success() && message.contains(named), "{path}: {value}: {message}");
    }
    let nothing = output(&mut template(&json!({"image": {"registry": "registry.example"}})), "");
    assert!(text(&nothing.stderr).contains("no component is enabled"), "{}", text(&nothing.stderr));
}

/// Every value of the schema has a description, a default where it is not free, and is used.
#[test]
fn schema_describes_every_value() {
    fn walk(path: &str, schema: &Value, values: &Value, templates: &str) {
        assert!(schema["description"].as_str().is_some_and(|it| !it.is_empty()), "{path} has no description");
        let Some(properties) = schema["properties"].as_object() else {
            let name = path.rsplit('.').next().unwrap_or_default();
            // Resources are rendered as a whole.
            let is_used = path == ".global" || path.contains(".resources.") || templates.contains(&format!(".{name}"));
            assert!(is_used, "{path} is in no template");
            return;
        };
        assert_eq!(schema["additionalProperties"], json!(false), "{path} accepts unknown values");
        let known: BTreeSet<&String> = properties.keys().collect();
        for key in values.as_object().into_iter().flatten().map(|(key, _)| key) {
            assert!(known.contains(key), "{path}.{key} is not in the schema");
        }
        for (key, property) in properties {
            let is_optional = key == "global" || path.ends_with("limits");
            assert!(is_optional || values.get(key).is_some(), "{path}.{key} has no default");
            walk(&format!("{path}.{key}"), property, &values[key], templates);
        }
    }
    let read = |name: &str| std::fs::read_to_string(chart().join(name)).expect("it is read");
    let schema: Value = serde_json::from_str(&read("values.schema.json")).expect("JSON");
    let values: Value = serde_yaml_ng::from_str(&read("values.yaml")).expect("YAML");
    let files = std::fs::read_dir(chart().join("templates")).expect("a folder");
    let templates: String =
        files.map(|it| std::fs::read_to_string(it.expect("a file").path()).expect("it is read")).collect();
    walk("", &schema, &values, &templates);
}

/// Members need the node in the tokens of agents.
#[test]
fn older_versions_of_kubernetes_are_refused_for_every_component() {
    for name in ["hub only", "remote hub"] {
        let refused = output(template(&value_sets()[name]).args(["--kube-version", "v1.30.9"]), "");
        let message = text(&refused.stderr);
        assert!(!refused.status.success() && message.contains("kubeVersion: >=1.31.0-0"), "{name}: {message}");
    }
}

/// Argo CD may overwrite the label `app.kubernetes.io/instance` of the objects that it applies, and no label of pods. What selects objects
/// uses a label that it leaves alone.
#[test]
fn only_pods_are_selected_by_a_label_that_argo_cd_overwrites() {
    let (instance, release) = ("app.kubernetes.io/instance", "chart.hanse.dev/release");
    for (name, values) in value_sets() {
        let objects = rendered(&values);
        for object in objects.iter().filter(|it| it["kind"] != "CustomResourceDefinition") {
            let (kind, metadata) = (object["kind"].as_str().expect("a kind"), &object["metadata"]);
            assert_eq!(metadata["labels"][release], "hanse", "{name}: {kind} {}", metadata["name"]);
            let spec = object["spec"].to_string();
            let selects_pods =
                ["DaemonSet", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service", "StatefulSet"];
            assert!(selects_pods.contains(&kind) || !spec.contains(instance), "{name}: {kind}: {spec}");
        }
        let templates = objects.iter().map(|it| &it["spec"]["template"]["metadata"]).filter(|it| it.is_object());
        for metadata in templates.clone() {
            assert_eq!(metadata["labels"][instance], "hanse", "{name}");
        }
        // What the cluster exports has none of the labels that are the hub's.
        let accounts = objects.iter().filter(|it| it["kind"] == "ServiceAccount").map(|it| &it["metadata"]);
        for metadata in accounts.chain(templates) {
            let mut labels = metadata["labels"].as_object().expect("labels").keys();
            assert!(labels.all(|it| !it.starts_with("hanse.dev/")), "{name}: {metadata}");
        }
        let services: Vec<&Value> = objects.iter().filter(|it| it["kind"] == "Service").collect();
        for monitor in objects.iter().filter(|it| it["kind"] == "ServiceMonitor") {
            let labels = monitor["spec"]["selector"]["matchLabels"].as_object().expect("labels");
            let is_selected = |it: &&&Value| labels.iter().all(|(key, value)| it["metadata"]["labels"][key] == *value);
            let names: Vec<&Value> = services.iter().filter(is_selected).map(|it| &it["metadata"]["name"]).collect();
            assert_eq!(names, [&json!("hanse-metrics")], "{name}");
        }
    }
}

/// Kinds that Argo CD does not apply by default: what needs one of their objects would wait for ever.
#[test]
fn templates_have_no_kind_that_argo_cd_leaves_out() {
    for (name, values) in value_sets() {
        for object in rendered(&values) {
            let kind = object["kind"].as_str().expect("a kind");
            assert!(
                !["Lease", "Endpoints", "EndpointSlice"].contains(&kind),
                "{name}: {kind} {}",
                object["metadata"]["name"]
            );
        }
    }
}

#[test]
fn pods_have_the_least_privileges() {
    for (name, values) in value_sets() {
        let objects = rendered(&values);
        for (component, pod) in pods(&objects) {
            let (is_agent, is_member) = (component == "agent", component == "member");
            let at = format!("{name}: {component}");
            let flag = |key: &str| pod[key] == json!(true);
            assert!(!flag("hostPID") && !flag("hostIPC"), "{at}");
            let may_use_host = is_agent || is_member || name == ON_HOST;
            assert!(!flag("hostNetwork") || may_use_host, "{at}");
            assert_eq!(flag("enableServiceLinks"), is_agent, "{at}: {pod}");
            // Only the member and the hub call the API server: for the operator, and to review the tokens of readers of metrics.
            let has = |argument: &str| list(&pod["containers"][0], "args").any(|it| it == argument);
            let calls = is_member || has("--operator") || component == "hub" && has("--metrics-token-review");
            assert_eq!(pod["automountServiceAccountToken"] == json!(false), !calls, "{at}");
            check_metrics(&at, &component, pod);
            assert_eq!(pod["securityContext"]["seccompProfile"], json!({"type": "RuntimeDefault"}), "{at}");
            for volume in list(pod, "volumes").filter(|it| it["hostPath"].is_object()) {
                assert!(is_agent && volume["hostPath"]["path"] == "/var/lib/hanse", "{at}: {volume}");
            }
            for container in list(pod, "initContainers").chain(list(pod, "containers")) {
                let at = format!("{at}: {}", container["name"]);
                let security = &container["securityContext"];
                assert_eq!(security["capabilities"]["drop"], json!(["ALL"]), "{at}");
                let added = if is_agent { json!(["NET_ADMIN", "NET_RAW"]) } else { Value::Null };
                assert_eq!(security["capabilities"]["add"], added, "{at}");
                assert_eq!(security["readOnlyRootFilesystem"], json!(true), "{at}");
                assert_eq!(security["allowPrivilegeEscalation"], json!(false), "{at}");
                assert!(security["privileged"].is_null() && security["runAsUser"].is_null(), "{at}");
                let expected = if is_agent { (json!(0), Value::Null) } else { (json!(65532), json!(true)) };
                let user = (&pod["securityContext"]["runAsUser"], &pod["securityContext"]["runAsNonRoot"]);
                assert_eq!(user, (&expected.0, &expected.1), "{at}");
                assert_eq!(
                    container["image"],
                    json!(format!("registry.example/hanse/hanse-{component}@{DIGEST}")),
                    "{at}"
                );
                for (kind, key) in [("requests", "cpu"), ("requests", "memory"), ("limits", "memory")] {
                    assert!(!container["resources"][kind][key].is_null(), "{at}: resources.{kind}.{key}");
                }
                for mount in list(container, "volumeMounts").filter(|it| it["readOnly"] != json!(true)) {
                    assert_eq!(mount["name"], "data", "{at}: only the data is written");
                }
            }
            for container in list(pod, "containers") {
                check_listeners(&format!("{name}: {component}"), container);
            }
        }
        let has_operator =
            pods(&objects).iter().any(|(_, pod)| list(&pod["containers"][0], "args").any(|it| it == "--operator"));
        let roles = objects.iter().filter(|it| it["rules"].is_array());
        for rule in roles.flat_map(|role| list(role, "rules")) {
            let mut all = ["apiGroups", "resources", "verbs"].map(|key| list(rule, key)).into_iter().flatten();
            assert!(all.all(|it| it != "*"), "{name}: {rule}");
            // Join tokens are written, and no Secret is read or changed but those of the member's state.
            let is_of_secrets = list(rule, "resources").any(|it| it == "secrets");
            let is_of_operator = has_operator && rule["verbs"] == json!(["create"]);
            let mut names = list(rule, "resourceNames").filter_map(Value::as_str).peekable();
            let is_of_state = names.peek().is_some()
                && names.all(|name| STATE.contains(&name.to_owned()))
                && rule["verbs"] == json!(["get", "patch", "watch"]);
            assert!(!is_of_secrets || is_of_operator || is_of_state, "{name}: {rule}");
        }
    }
}

/// The member taints the nodes that the DaemonSet of agents selects, and no others.
#[test]
fn only_nodes_of_agents_are_tainted() {
    let selected = set(complete(), "agent.nodeSelector", json!({"pool": "gpu", "example.com/a": "1"}));
    let os = set(complete(), "agent.nodeSelector", json!({"kubernetes.io/os": "other"}));
    let mut sets: Vec<(&str, Value)> = value_sets().into_iter().collect();
    sets.extend([("selected", selected), ("os", os)]);
    for (name, values) in sets {
        let objects = rendered(&values);
        let pods: BTreeMap<_, _> = pods(&objects).into_iter().collect();
        let Some(member) = pods.get("member") else { continue };
        let arguments: Vec<&str> = list(&member["containers"][0], "args").filter_map(Value::as_str).collect();
        let taints = arguments.contains(&"--taint-new-nodes");
        assert_eq!(arguments.contains(&"--remove-node-taints"), name == "cleanup", "{name}");
        assert_ne!(taints, name == "cleanup", "{name}");
        let labels = arguments.iter().filter_map(|it| it.strip_prefix("--agent-node-label=")?.split_once('='));
        let labels: BTreeMap<_, _> = labels.map(|(key, value)| (key.to_owned(), json!(value))).collect();
        let selector = pods["agent"]["nodeSelector"].as_object().expect("labels");
        let expected = selector.iter().filter(|_| taints).map(|(key, value)| (key.clone(), value.clone())).collect();
        assert_eq!(labels, expected, "{name}");
    }
}

/// Metrics beyond loopback need TLS and reviewed tokens.
fn check_metrics(at: &str, component: &str, pod: &Value) {
    let container = &pod["containers"][0];
    let arguments: Vec<&str> = list(container, "args").filter_map(Value::as_str).collect();
    let Some(listen) = arguments.iter().find_map(|it| it.strip_prefix("--metrics-listen=")) else { return };
    assert!(!listen.starts_with("127."), "{at}: {listen}");
    let folder = "/var/run/hanse-metrics";
    for argument in ["--metrics-certificate=FOLDER/tls.crt", "--metrics-key=FOLDER/tls.key", "--metrics-token-review"] {
        assert!(arguments.contains(&&*argument.replace("FOLDER", folder)), "{at}: {argument}");
    }
    let mount = list(container, "volumeMounts").find(|it| it["mountPath"] == folder).expect("a mount");
    let volume = list(pod, "volumes").find(|it| it["name"] == mount["name"]).expect("a volume");
    // A pod does not wait for the certificate.
    let secret = &volume["secret"];
    // The key of agents is on every node.
    let of = if component == "agent" { "metrics-tls-agents" } else { "metrics-tls" };
    assert_eq!((&secret["secretName"], &secret["optional"]), (&json!(of), &json!(true)), "{at}");
    let has_audience = arguments.contains(&"--metrics-audience=hanse-metrics");
    assert_eq!(has_audience, component != "agent", "{at}: the member requests the reviews of agents");
}

/// What a Prometheus server is given fits what pods serve.
#[test]
fn prometheus_verifies_and_authenticates() {
    let objects = rendered(&value_sets()["all options"]);
    let of = |kind: &str, name: &str| {
        let found = objects.iter().find(|it| it["kind"] == kind && it["metadata"]["name"] == name);
        found.unwrap_or_else(|| panic!("{kind} {name}"))
    };
    let endpoints = &of("ServiceMonitor", "hanse-metrics")["spec"]["endpoints"];
    let endpoints = endpoints.as_array().expect("a list");
    let mut names = BTreeSet::new();
    for (endpoint, certificate, secret, action) in [
        (&endpoints[0], "hanse-metrics", "metrics-tls", "drop"),
        (&endpoints[1], "hanse-metrics-agents", "metrics-tls-agents", "keep"),
    ] {
        let certificate = &of("Certificate", certificate)["spec"];
        assert_eq!((&endpoint["scheme"], &endpoint["port"]), (&json!("https"), &json!("metrics")));
        assert_eq!(endpoint["tlsConfig"]["ca"]["secret"], json!({"name": secret, "key": "ca.crt"}));
        assert!(endpoint["tlsConfig"]["insecureSkipVerify"].is_null());
        assert_eq!(certificate["dnsNames"], json!([endpoint["tlsConfig"]["serverName"]]));
        assert_eq!(certificate["secretName"], secret);
        names.insert(certificate["dnsNames"][0].as_str().expect("a name"));
        let relabeling = &endpoint["relabelings"][0];
        assert_eq!((&relabeling["regex"], &relabeling["action"]), (&json!("agent"), &json!(action)));
        assert_eq!(relabeling["sourceLabels"], json!(["__meta_kubernetes_pod_label_app_kubernetes_io_component"]));
        assert_eq!(endpoint["bearerTokenFile"], "/var/run/hanse/token");
        assert!(endpoint["authorization"].is_null());
    }
    assert_eq!((endpoints.len(), names.len()), (2, 2), "agents cannot present themselves as hub or member");
    let with_token = set(
        value_sets()["all options"].clone(),
        "metrics.serviceMonitor",
        json!({"enabled": true, "tokenSecret": {"name": "scraper"}}),
    );
    let monitor = rendered(&with_token).into_iter().find(|it| it["kind"] == "ServiceMonitor").expect("a monitor");
    let endpoint = &monitor["spec"]["endpoints"][0];
    assert_eq!(endpoint["authorization"]["credentials"], json!({"name": "scraper", "key": "token"}));
    assert!(endpoint["bearerTokenFile"].is_null());

    // Readers have one right, and reviewers two; agents have none.
    let reader = of("ClusterRole", "hanse-metrics-reader");
    assert_eq!(reader["rules"], json!([{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]));
    assert_eq!(of("ClusterRoleBinding", "hanse-metrics-reader")["subjects"][0]["name"], "prometheus");
    let subjects = &of("ClusterRoleBinding", "hanse-metrics-review")["subjects"];
    let subjects: Vec<&str> = subjects.as_array().into_iter().flatten().filter_map(|it| it["name"].as_str()).collect();
    assert_eq!(subjects, ["hanse-hub", "hanse-member"]);
    let dashboard = of("ConfigMap", "hanse-metrics-dashboard");
    assert_eq!(dashboard["metadata"]["labels"]["grafana_dashboard"], "1");
    let text = dashboard["data"]["hanse.json"].as_str().expect("a text");
    let file = std::fs::read_to_string(chart().join("files/dashboards/hanse.json")).expect("it is read");
    assert_eq!(text, file);
}

/// The ports of a container are those of its listeners, and its probes are those of the listener of health.
fn check_listeners(at: &str, container: &Value) {
    let mut listeners = BTreeMap::new();
    for argument in list(container, "args").filter_map(Value::as_str) {
        let Some((name, address)) = argument.split_once("listen=") else { continue };
        let (host, port) = address.rsplit_once(':').expect("HOST:PORT");
        let name = match name.trim_start_matches('-').trim_end_matches('-') {
            "" => "hub",
            "agent" => "agents",
            name => name,
        };
        listeners.insert(name.to_owned(), (host.to_owned(), port.parse::<u64>().expect("a port")));
    }
    let ports: BTreeMap<String, u64> = list(container, "ports")
        .map(|it| (it["name"].as_str().expect("a name").to_owned(), it["containerPort"].as_u64().expect("a port")))
        .collect();
    assert_eq!(listeners.iter().map(|(name, it)| (name.clone(), it.1)).collect::<BTreeMap<_, _>>(), ports, "{at}");
    for (probe, path) in [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
        let get = &container[probe]["httpGet"];
        assert_eq!((&get["path"], &get["port"]), (&json!(path), &json!("health")), "{at}: {probe}");
        let host = &listeners["health"].0;
        let expected = if host == "127.0.0.1" { json!(host) } else { Value::Null };
        assert_eq!(get["host"], expected, "{at}: {probe} reaches the listener");
    }
}

/// Each replica announces an address of its own, at which a Service serves it alone; all have the same store and key.
#[test]
fn replicas_of_the_hub_announce_addresses_of_their_own() {
    let objects = rendered(&value_sets()["etcd"]);
    let set = objects.iter().find(|it| it["kind"] == "StatefulSet").expect("the hub");
    assert_eq!(set["spec"]["replicas"], json!(3));
    let pod = &set["spec"]["template"]["spec"];
    let arguments =
        |container: &Value| list(container, "args").filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>();
    let (init, run) = (arguments(&pod["initContainers"][0]), arguments(&pod["containers"][0]));
    for expected in ["--key-file=/etc/hanse/unlock/unlock.key", "--data=/data/hub"] {
        assert!(
            init.iter().any(|it| it == expected) && run.iter().any(|it| it == expected),
            "{expected}: {init:?} {run:?}"
        );
    }
    let store = |of: &[String]| of.iter().find(|it| it.starts_with("--store=etcds://")).cloned();
    assert!(store(&init).is_some() && store(&init) == store(&run), "{init:?} {run:?}");
    assert!(init.iter().any(|it| it == "--if-missing"), "{init:?}");
    let announced = run.iter().find_map(|it| it.strip_prefix("--advertise=")).expect("an address");
    for number in 0..3 {
        let name = format!("hanse-hub-{number}");
        let address = announced.replace("$(POD_NAME)", &name);
        assert_eq!(address, format!("{name}.{NAMESPACE}.svc:7443"));
        let service = objects.iter().find(|it| it["kind"] == "Service" && it["metadata"]["name"] == name).expect(&name);
        assert_eq!(service["spec"]["selector"]["statefulset.kubernetes.io/pod-name"], json!(name));
        let annotations = json!({
            "example.com/a": "b", "external-dns.alpha.kubernetes.io/hostname": format!("{name}.hub.example"),
        });
        assert_eq!(service["metadata"]["annotations"], annotations);
    }
    for volume in list(pod, "volumes") {
        // YAML 1.2 reads the octal number of YAML 1.1 as a text.
        assert_eq!(volume["secret"]["defaultMode"], json!("0440"), "no other user reads it: {volume}");
    }
    let spread: Vec<&str> =
        list(pod, "topologySpreadConstraints").filter_map(|it| it["topologyKey"].as_str()).collect();
    assert_eq!(spread, ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]);
    // One replica with the embedded store has none of this.
    let objects = rendered(&value_sets()["hub only"]);
    assert_eq!(objects.iter().filter(|it| it["kind"] == "Service").count(), 1);
}
