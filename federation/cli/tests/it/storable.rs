//! What API servers refuse of objects that are read all the same, what controllers make of them, and what `convert` names.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::json::messages;

fn hanse(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("hanse runs");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("written");
    child.wait_with_output().expect("hanse ends")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(output: &Output) -> Vec<Value> {
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

fn service(spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: a}}\nspec: {{selector: {{app: web}}, {spec}}}\n"
    )
}

fn pod(ports: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: a, labels: {{app: web}}}}\nspec: {{containers: [{{name: c, \
         ports: {ports}}}]}}\nstatus: {{phase: Running, podIP: 10.0.0.1}}\n"
    )
}

#[test]
fn ports_that_api_servers_refuse_are_refused_by_check() {
    let template = |ports: &str| {
        format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: d, namespace: a}}\nspec:\n  selector: {{matchLabels: {{app: \
             web}}}}\n  template:\n    metadata: {{labels: {{app: web}}}}\n    spec:\n      initContainers:\n      - {{name: i, \
             ports: {ports}}}\n"
        )
    };
    let cases: Vec<(String, &[&str])> = vec![
        (pod("[{name: http, containerPort: 80}]"), &[]),
        (pod("[{containerPort: 80}, {name: '', containerPort: 81}]"), &[]),
        (pod("[{name: this-is-a-very-long-name, containerPort: 80}]"), &["spec.containers[0].ports[0].name"]),
        (pod("[{name: HTTP, containerPort: 80}]"), &["spec.containers[0].ports[0].name"]),
        (pod("[{name: '8080', containerPort: 80}]"), &["spec.containers[0].ports[0].name"]),
        (
            pod("[{name: http, containerPort: 80}, {name: http, containerPort: 81}]"),
            &["spec.containers[0].ports[1].name"],
        ),
        (pod("[{name: http, containerPort: 0}]"), &["spec.containers[0].ports[0].containerPort"]),
        (pod("[{name: http, containerPort: 80, protocol: tcp}]"), &["spec.containers[0].ports[0].protocol"]),
        (template("[{name: a_b, containerPort: 80}]"), &["spec.template.spec.initContainers[0].ports[0].name"]),
        (template("[{name: a-b, containerPort: 80}]"), &[]),
        (service("ports: [{port: 80}]"), &[]),
        (service("ports: [{port: 80, targetPort: http}, {name: b, port: 80, protocol: UDP}]"), &["spec.ports[0].name"]),
        (
            service("ports: [{name: a, port: 80, targetPort: 0}, {name: b, port: 80, protocol: UDP, targetPort: ''}]"),
            &[],
        ),
        (service("ports: [{port: 80, targetPort: '8080'}]"), &["spec.ports[0].targetPort"]),
        (service("ports: [{port: 80, targetPort: Web}]"), &["spec.ports[0].targetPort"]),
        (service("ports: [{port: 0}]"), &["spec.ports[0].port"]),
        (service("ports: [{port: 80, protocol: tcp}]"), &["spec.ports[0].protocol"]),
        (service("ports: [{port: 80}, {port: 81}]"), &["spec.ports[0].name", "spec.ports[1].name"]),
        (service("ports: [{name: a, port: 80}, {name: a, port: 81}]"), &["spec.ports[1].name"]),
        (service("ports: [{name: a, port: 80}, {name: b, port: 80, protocol: TCP}]"), &["spec.ports[1]"]),
        (service("ports: [{name: A_1, port: 80}]"), &["spec.ports[0].name"]),
        (service("ports: [{name: a-name-of-more-than-15-characters, port: 80}]"), &[]),
        (service("ports: []"), &["spec.ports"]),
        (service("clusterIP: None"), &[]),
        (service("type: ExternalName, externalName: a.example"), &[]),
    ];
    for (object, expected) in cases {
        let output = hanse(&["policy", "check", "-o", "json", "-"], &object);
        let lines = json(&output);
        assert_eq!(lines.len(), 1, "{object}\n{lines:#?}");
        let errors = lines[0]["errors"].as_array().expect("a list");
        let fields: Vec<&str> = errors.iter().filter_map(|error| error["field"].as_str()).collect();
        assert_eq!(fields, expected, "{object}\n{errors:#?}");
        let result = if expected.is_empty() { ("accepted", Some(0)) } else { ("refused", Some(1)) };
        assert_eq!((lines[0]["result"].as_str().unwrap_or_default(), output.status.code()), result, "{object}");
    }
    // By line, with what to do.
    let block = "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: a}\nspec:\n  ports:\n  - port: 80\n    \
                 targetPort: '8080'\n";
    // A template is rendered first.
    let output = hanse(&["policy", "check", "-"], block);
    let told = text(&output.stdout);
    assert!(told.contains("-:7: Service a/s: spec.ports[0].targetPort: \"8080\" is not a port name: "), "{told}");
    assert!(told.contains("; write a number without quotes"), "{told}");
    let output = hanse(&["policy", "check", "-"], &service("ports: [{port: 80, targetPort: '{{ .port }}'}]"));
    assert!(output.status.success() && text(&output.stdout).contains("1 template"), "{output:?}");
    let help = text(&hanse(&["policy", "check", "--help"], "").stdout);
    for part in ["Policies, tiers, network sets", "EndpointSlices", "names, numbers and protocols of ports"] {
        assert!(help.replace('\n', " ").contains(part), "{part}: {help}");
    }
}

/// The objects stay where they are: nothing is left out of an answer because of a port.
#[test]
fn objects_with_such_ports_stay_in_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = pod("[{name: HTTP, containerPort: 80}, {name: web, containerPort: 0, protocol: tcp}]");
    let quoted = service("clusterIP: 10.96.0.9, ports: [{port: 80, targetPort: '8082'}]");
    let zero = service("clusterIP: 10.96.0.8, ports: [{port: 80, targetPort: 0}]").replace("name: s,", "name: z,");
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web-in, namespace: a}\nspec: {podSelector: \
                  {}, ingress: [{ports: [{port: 80}]}]}\n";
    std::fs::write(folder.path().join("all.yaml"), [&server, &quoted, &zero, policy].join("---\n")).expect("manifests");
    let cluster = format!("c={}", folder.path().display());
    let queries = "{\"from\": {\"ip\": \"192.0.2.1\"}, \"to\": {\"namespace\": \"a\", \"pod\": \"p\"}, \"port\": 80}\n\
                   {\"from\": {\"ip\": \"192.0.2.1\"}, \"to\": {\"namespace\": \"a\", \"pod\": \"p\"}, \"port\": 81}\n\
                   {\"from\": {\"ip\": \"192.0.2.1\"}, \"to\": {\"service\": \"a/z\"}, \"port\": 80}\n";
    let output = hanse(&["policy", "explain", "--cluster", &cluster, "--queries", "-", "-o", "json"], queries);
    let verdicts: Vec<Value> = json(&output).iter().map(|line| line["verdict"].clone()).collect();
    assert_eq!(
        (output.status.code(), verdicts),
        (Some(0), vec!["allow".into(), "deny".into(), "allow".into()]),
        "{output:?}"
    );
    let notes = messages(&output);
    assert!(notes.contains("all.yaml:10: note: Service s: spec.ports[0].targetPort: \"8082\""), "{notes}");
}

#[test]
fn policy_that_an_operator_makes_is_noted() {
    let cluster = |network: &str| {
        format!(
            "{network}\n    headGroupSpec: {{template: {{spec: {{containers: [{{name: h, ports: [{{name: dashboard, containerPort: \
             8265}}]}}]}}}}}}\n"
        )
    };
    let object = |kind: &str, field: &str, network: &str| {
        let spec = cluster(network);
        let spec = if field.is_empty() { spec.replace("\n    ", "\n  ") } else { format!("  {field}:\n  {spec}") };
        format!("apiVersion: ray.io/v1\nkind: {kind}\nmetadata: {{name: train, namespace: ml}}\nspec:\n{spec}")
    };
    for (kind, field) in [("RayCluster", ""), ("RayJob", "rayClusterSpec"), ("RayService", "rayClusterConfig")] {
        let dot = if field.is_empty() { "" } else { "." };
        let closed = object(kind, field, "  networkPolicy: {mode: DenyAll}");
        let output = hanse(&["policy", "check", "-"], &closed);
        let expected =
            format!("note: {kind} train spec.{field}{dot}networkPolicy: makes the operator create NetworkPolicies");
        assert!(text(&output.stdout).contains(&expected), "{closed}\n{output:?}");
        assert!(output.status.success(), "{output:?}");
        let output = hanse(&["policy", "matrix", "--cluster", "c=-", "--port", "8265"], &closed);
        assert!(text(&output.stderr).contains("makes the operator create NetworkPolicies"), "{output:?}");
        for open in ["  rayVersion: '2'", "  networkPolicy:"] {
            let output = hanse(&["policy", "check", "-"], &object(kind, field, open));
            assert!(output.status.success() && !text(&output.stdout).contains("note:"), "{output:?}");
        }
    }
}

fn admin(kind: &str, name: &str, priority: &str) -> String {
    format!(
        "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n  {priority}subject: \
         {{namespaces: {{}}}}\n  ingress: [{{action: Deny, from: [{{namespaces: {{}}}}]}}]\n"
    )
}

fn admins(name: &str) -> String {
    admin("AdminNetworkPolicy", name, "priority: 5\n  ")
}

fn baseline(name: &str) -> String {
    admin("BaselineAdminNetworkPolicy", name, "")
}

fn cluster_policy(name: &str) -> String {
    format!(
        "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: {name}}}\nspec: {{tier: \
         Admin, priority: 1, subject: {{namespaces: {{}}}}}}\n"
    )
}

/// What is read, what is written (tier and name), and a part of what is said.
type NameCase<'a> = (&'a [String], &'a [(&'a str, &'a str)], Option<&'a str>);

#[test]
fn converted_objects_have_names_of_their_own() {
    let cases: &[NameCase<'_>] = &[
        (&[admins("a"), baseline("default")], &[("Admin", "a"), ("Baseline", "default")], None),
        (
            &[admins("default"), baseline("default")],
            &[("Admin", "default"), ("Baseline", "default-baseline")],
            Some("-:9: note: BaselineAdminNetworkPolicy default is written as ClusterNetworkPolicy default-baseline"),
        ),
        (
            &[baseline("default"), admins("default")],
            &[("Baseline", "default-baseline"), ("Admin", "default")],
            Some("-:1: note: BaselineAdminNetworkPolicy default is written as ClusterNetworkPolicy default-baseline"),
        ),
        (
            &[admins("default"), admins("default-baseline"), baseline("default")],
            &[("Admin", "default"), ("Admin", "default-baseline")],
            Some("not written: ClusterNetworkPolicy default-baseline would replace the AdminNetworkPolicy at -:9"),
        ),
        (
            &[admins("a"), admins("a")],
            &[("Admin", "a")],
            Some(
                "-:9: AdminNetworkPolicy a: not written: ClusterNetworkPolicy a would replace the AdminNetworkPolicy at -:1",
            ),
        ),
        (
            &[admins("a"), cluster_policy("a")],
            &[],
            Some(
                "-:1: AdminNetworkPolicy a: not written: ClusterNetworkPolicy a would replace the ClusterNetworkPolicy at -:9",
            ),
        ),
        (
            &[cluster_policy("default"), baseline("default")],
            &[],
            Some("not written: ClusterNetworkPolicy default would replace the ClusterNetworkPolicy at -:1"),
        ),
        (&[admins("a"), cluster_policy("b")], &[("Admin", "a")], None),
    ];
    for (objects, expected, said) in cases {
        let input = objects.join("---\n");
        let output = hanse(&["policy", "convert", "-o", "json", "-"], &input);
        let written = json(&output);
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let written: Vec<(String, String)> =
            written.iter().map(|it| (word(&it["spec"]["tier"]), word(&it["metadata"]["name"]))).collect();
        let written: Vec<(&str, &str)> = written.iter().map(|(tier, name)| (&**tier, &**name)).collect();
        assert_eq!(written, *expected, "{input}\n{output:?}");
        let told = text(&output.stderr);
        assert!(said.is_none_or(|said| told.contains(said)), "{input}\n{told}");
        let refused = said.is_some_and(|said| !said.contains("note:"));
        assert_eq!(output.status.code(), Some(i32::from(refused)), "{input}\n{told}");
        // Nothing of the output replaces another part of it.
        let checked = hanse(&["policy", "check", "-"], &text(&hanse(&["policy", "convert", "-"], &input).stdout));
        assert!(expected.is_empty() || !text(&checked.stdout).contains("note"), "{checked:?}");
    }
}

#[test]
fn convert_names_fields_as_they_were_written() {
    let with = |ports: &str| {
        admins("x").replace("from: [{namespaces: {}}]", &format!("from: [{{namespaces: {{}}}}], ports: {ports}"))
    };
    // No port is every port, in both.
    let output = hanse(&["policy", "convert", "-o", "json", "-"], &with("[]"));
    let written = json(&output);
    assert_eq!((written.len(), &written[0]["spec"]["ingress"][0]["protocols"]), (1, &Value::Null), "{output:?}");
    let ports = "{portNumber: {protocol: TCP, port: 80}}, ".repeat(26);
    for (ports, field) in [
        (format!("[{ports}]"), "no equivalent: spec.ingress[0].ports: "),
        (
            "[{portNumber: {protocol: TCP, port: 80}}, {portNumber: {port: 99999}}]".to_owned(),
            "malformed: spec.ingress[0].ports[1]: ",
        ),
    ] {
        let output = hanse(&["policy", "convert", "-"], &with(&ports));
        let told = text(&output.stderr);
        assert!(told.contains(&format!("-:7: AdminNetworkPolicy x: {field}")), "{told}");
    }
}

#[test]
fn grants_that_overlap_are_refused() {
    let member = |name: &str, net: &str| {
        format!(
            "apiVersion: hanse.dev/v1alpha1\nkind: MemberCluster\nmetadata: {{name: {name}}}\nspec: {{grants: {{namespaces: ['*'], \
             cidrs: [{net}]}}}}\n"
        )
    };
    for (nets, refused) in [
        (["10.0.0.0/16", "10.1.0.0/16"], false),
        (["10.0.0.0/16", "10.0.1.0/24"], true),
        (["fd00::/64", "fd00::/48"], true),
    ] {
        let input = format!("{}---\n{}", member("a", nets[0]), member("b", nets[1]));
        let output = hanse(&["policy", "check", "-o", "json", "-"], &input);
        let results: Vec<Value> = json(&output).iter().map(|line| line["result"].clone()).collect();
        let second = if refused { "refused" } else { "accepted" };
        assert_eq!(results, ["accepted", second], "{nets:?}: {output:?}");
        assert_eq!(output.status.code(), Some(i32::from(refused)), "{nets:?}");
        let told = text(&hanse(&["policy", "check", "-"], &input).stdout);
        let expected = format!(
            "-:6: MemberCluster b: spec.grants.cidrs: {} overlaps with {}, which is granted to the cluster a",
            nets[1], nets[0]
        );
        assert_eq!(told.contains(&expected), refused, "{told}");
        // Answers go on, and say so.
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("pod.yaml"), pod("[{containerPort: 80}]")).expect("manifests");
        let cluster = format!("a={}", folder.path().display());
        let output = hanse(&["policy", "matrix", "--cluster", &cluster, "--federation", "-", "--port", "80"], &input);
        assert_eq!(text(&output.stderr).contains("which is granted to the cluster a"), refused, "{output:?}");
    }
}
