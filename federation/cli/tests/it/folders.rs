//! Folders as they lie in Git: templates, values, kinds of others, and nothing at all.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

pub fn hanse(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("hanse runs");
    // A command that reads no input may end before all of it is written.
    child.stdin.take().expect("piped").write_all(input.as_bytes()).ok();
    child.wait_with_output().expect("hanse ends")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// The `result` of each object of a folder with one file, and the exit code.
fn results(content: &str, arguments: &[&str]) -> (Vec<String>, Option<i32>) {
    let root = tempfile::tempdir().expect("temporary directory");
    std::fs::write(root.path().join("file.yaml"), content).expect("manifests");
    let output = hanse(&[&["policy", "check", "-o", "json", text(root.path())], arguments].concat(), "");
    let results = lines(&output).iter().map(|line| line["result"].as_str().expect("a result").to_owned()).collect();
    (results, output.status.code())
}

const POLICY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: web}\nspec: {podSelector: {}}\n";

const PODS: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: web}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: web, labels: {app: a}}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: web, labels: {app: b}}
status: {phase: Running, podIP: 10.0.0.2, podIPs: [{ip: 10.0.0.2}]}
";

#[test]
fn other_files_beside_manifests_give_notes() {
    let cases = [
        ("{{- if .Values.enabled }}\napiVersion: v1\nkind: Pod\n{{- end }}\n", "template"),
        (
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: '{{ .Release.Name }}'}\n",
            "template",
        ),
        (
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a}\nspec:\n  podSelector: {}\n  ingress:\n  - ports:\n    - port: \"{{ .Values.port }}\"\n",
            "template",
        ),
        ("apiVersion: v2\nname: chart\nversion: 1.0.0\n", "notObject"),
        ("replicas: 3\nimage: {tag: latest}\n", "notObject"),
        ("resources: [a.yaml]\n", "notObject"),
        ("- op: replace\n  path: /spec/replicas\n  value: 3\n", "notObject"),
        ("{\"panels\": [], \"schemaVersion\": 39}\n", "notObject"),
    ];
    for (content, expected) in cases {
        let both = format!("{content}---\n{POLICY}");
        assert_eq!(results(&both, &[]), (vec![expected.to_owned(), "accepted".to_owned()], Some(0)), "{content}");
        assert_eq!(results(&both, &["--strict"]).1, Some(1), "{content}");
    }
}

/// An object that is wrong stays refused, whatever its annotations say.
#[test]
fn misspelt_policy_is_an_error() {
    for content in [
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a, annotations: {a: '{{ b }}'}}\nspec:\n  podSelector: {}\n  ingress:\n  - ports:\n    - port: 70000\n",
        "apiVersion: networking.k8s.io/v1\nmetadata: {name: a}\nspec: {podSelector: {}}\n",
        "kind: NetworkPolicy\nmetadata: {name: a}\nspec: {podSelector: {}}\n",
        "- {kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {name: a}, spec: {podSelecter: {}}}\n",
    ] {
        assert_eq!(results(content, &[]), (vec!["refused".to_owned()], Some(1)), "{content}");
    }
}

#[test]
fn a_template_is_named_once_with_its_line() {
    let root = tempfile::tempdir().expect("temporary directory");
    let content = format!(
        "{POLICY}---\n# a comment\n{{{{- range .Values.all }}}}\n  {{{{ . }}}}: [\n{{{{- end }}}}\n---\n{POLICY}"
    );
    std::fs::write(root.path().join("t.yaml"), content).expect("manifests");
    let output = hanse(&["policy", "check", text(root.path())], "");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(told.matches("a template: ").count(), 1, "{told}");
    assert!(told.contains("t.yaml:7: note: a template: render it first"), "{told}");
    assert!(told.contains("accepted, 0 refused, 0 skipped, 1 template"), "{told}");
}

#[test]
fn lists_without_a_kind_are_read_as_calicoctl_reads_them() {
    let content = "- apiVersion: projectcalico.org/v3\n  kind: GlobalNetworkSet\n  metadata: {name: a}\n  spec: {nets: [10.0.0.0/8]}\n\
                   - apiVersion: projectcalico.org/v3\n  kind: GlobalNetworkPolicy\n  metadata: {name: b}\n  spec: {selector: all()}\n";
    assert_eq!(results(content, &[]), (vec!["accepted".to_owned(); 2], Some(0)));
}

#[test]
fn kinds_of_policy_in_another_group_are_refused() {
    for (api, kind) in [
        ("extensions/v1beta1", "NetworkPolicy"),
        ("v1", "NetworkPolicy"),
        ("networking.k8s.io", "NetworkPolicy"),
        ("projectcalico.org", "GlobalNetworkPolicy"),
        ("projectcalico.org", "Tier"),
        ("calico.org/v3", "GlobalNetworkPolicy"),
        ("calico.org/v3", "GlobalNetworkSet"),
        ("extensions/v1beta1", "NetworkPolicyList"),
        ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy"),
    ] {
        let list = if kind.ends_with("List") { "items: [{metadata: {name: a}}]\n" } else { "" };
        let content = format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: a}}\n{list}");
        assert_eq!(results(&content, &[]), (vec!["refused".to_owned()], Some(1)), "{content}");
    }
    for (api, kind) in
        [("crd.antrea.io/v1beta1", "NetworkPolicy"), ("crd.antrea.io/v1beta1", "Tier"), ("a.org/v1", "Tier")]
    {
        let content = format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: a}}\n");
        assert_eq!(results(&content, &[]), (vec!["skipped".to_owned()], Some(0)), "{content}");
    }
}

#[test]
fn skipped_kinds_are_counted_and_policy_of_other_systems_is_singled_out() {
    let root = tempfile::tempdir().expect("temporary directory");
    let object = |api: &str, kind: &str, name: &str| {
        format!("---\napiVersion: {api}\nkind: {kind}\nmetadata: {{name: {name}}}\n")
    };
    let mut content = POLICY.to_owned();
    for name in ["a", "b", "c"] {
        content += &object("v1", "ConfigMap", name);
    }
    content += &object("cilium.io/v2", "CiliumNetworkPolicy", "x");
    content += &object("security.istio.io/v1", "AuthorizationPolicy", "y");
    content += &object("networking.istio.io/v1", "Gateway", "z");
    std::fs::write(root.path().join("f.yaml"), &content).expect("manifests");
    let output = hanse(&["policy", "check", text(root.path())], "");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in [
        "warning: skipped 1 CiliumNetworkPolicy (cilium.io/v2): network policy of Cilium",
        "warning: skipped 1 AuthorizationPolicy (security.istio.io/v1): network policy of Istio",
        "skipped, of kinds that Hanse does not read: 1 Gateway (networking.istio.io/v1), 3 ConfigMap (v1)",
        "1 accepted, 0 refused, 6 skipped",
    ] {
        assert!(told.lines().any(|it| it.starts_with(line)), "{line}: {told}");
    }
    let output = hanse(&["policy", "check", "-o", "json", text(root.path())], "");
    let systems: Vec<Value> = lines(&output).into_iter().map(|mut line| line["system"].take()).collect();
    assert_eq!(systems.iter().filter(|system| **system == "Cilium").count(), 1, "{systems:?}");
}

#[test]
fn standard_input_is_a_cluster() {
    let root = tempfile::tempdir().expect("temporary directory");
    let queries = root.path().join("q.jsonl");
    std::fs::write(&queries, r#"{"from":{"cluster":"c","namespace":"web","pod":"a"},"to":{"cluster":"c","namespace":"web","pod":"b"},"port":80}"#)
        .expect("queries");
    let arguments = ["policy", "explain", "--cluster", "c=-", "-o", "json", "--queries"];
    let input = format!("{PODS}---\n{POLICY}");
    let output = hanse(&[&arguments[..], &[text(&queries)]].concat(), &input);
    assert!(output.status.success() && lines(&output)[0]["verdict"] == "deny", "{output:?}");
    let output = hanse(&[&arguments[..], &["-"]].concat(), &input);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("can be used once"), "{output:?}");
}

#[test]
fn empty_input_has_no_verdict() {
    let root = tempfile::tempdir().expect("temporary directory");
    let folder = |name: &str, content: &str| {
        let folder = root.path().join(name);
        std::fs::create_dir(&folder).expect("directory");
        if !content.is_empty() {
            std::fs::write(folder.join("f.yaml"), content).expect("manifests");
        }
        format!("c={}", folder.display())
    };
    let empty = folder("empty", "");
    let skipped = folder("skipped", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n");
    let only_policy = folder("policy", POLICY);
    let pods = folder("pods", PODS);
    let others = folder("others", &PODS.replace("web", "shop"));
    let queries = root.path().join("q.jsonl");
    std::fs::write(&queries, r#"{"from":{"ip":"192.0.2.1"},"to":{"ip":"192.0.2.2"},"port":80}"#).expect("queries");
    for cluster in [&empty, &skipped, &only_policy] {
        for command in [
            &["lint"][..],
            &["order"],
            &["matrix", "--port", "80"],
            &["explain", "--queries", text(&queries)],
            &["diff", "--staged"],
        ] {
            if cluster == &only_policy && matches!(command, ["order" | "lint"]) {
                // Which policies come first is not a verdict, and some checks need no pods.
                continue;
            }
            let arguments = [&["policy"], command, &["--cluster", cluster]].concat();
            let output = hanse(&arguments, "");
            assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{arguments:?}: {output:?}");
        }
    }
    let diff = |with: &str| hanse(&["policy", "diff", "--exit-code", "--cluster", &pods, "--with", with], "");
    let output = diff(&others);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing was compared"), "{output:?}");
    assert_eq!(diff(&pods).status.code(), Some(0));
    let output = hanse(&["policy", "check", text(&root.path().join("empty"))], "");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn answer_without_refused_objects_is_marked_incomplete() {
    let root = tempfile::tempdir().expect("temporary directory");
    let broken = POLICY.replace("podSelector: {}", "podSelector: {}, ingress: 3").replace("name: p", "name: q");
    std::fs::write(root.path().join("f.yaml"), format!("{PODS}---\n{POLICY}---\n{broken}")).expect("manifests");
    let cluster = format!("c={}", root.path().display());
    let queries = root.path().join("q.jsonl");
    std::fs::write(&queries, r#"{"from":{"cluster":"c","namespace":"web","pod":"a"},"to":{"cluster":"c","namespace":"web","pod":"b"},"port":80}"#)
        .expect("queries");
    for command in [&["lint"][..], &["order"], &["matrix", "--port", "80"], &["explain", "--queries", text(&queries)]] {
        let arguments = [&["policy"], command, &["--cluster", &cluster]].concat();
        let output = hanse(&arguments, "");
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(told.lines().any(|line| line.starts_with("incomplete: 1 error above")), "{arguments:?}: {told}");
        let output = hanse(&[&arguments[..], &["-o", "json"]].concat(), "");
        let lines = lines(&output);
        assert!(!lines.is_empty() && lines.iter().all(|line| line["incomplete"] == true), "{arguments:?}: {output:?}");
    }
}

#[test]
fn endless_files_are_not_read() {
    let root = tempfile::tempdir().expect("temporary directory");
    std::fs::write(root.path().join("f.yaml"), POLICY).expect("manifests");
    let status = Command::new("mkfifo").arg(root.path().join("pipe.yaml")).status().expect("mkfifo runs");
    assert!(status.success());
    let output = hanse(&["policy", "check", text(root.path())], "");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(told.contains("pipe.yaml:1: not a regular file"), "{told}");
}

const ADMIN: &str = "\
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {name: a, uid: x, annotations: {kubectl.kubernetes.io/last-applied-configuration: '{}'}}
spec:
  priority: 7
  subject: {namespaces: {matchLabels: {team: red}}}
  ingress:
  - name: from-blue
    action: Allow
    from: [{pods: {namespaceSelector: {matchLabels: {team: blue}}, podSelector: {}}}]
    ports: [{portNumber: {protocol: UDP, port: 53}}, {portRange: {start: 8000, end: 8010}}, {namedPort: http}]
  egress:
  - {action: Pass, to: [{networks: [10.0.0.0/8]}]}
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: BaselineAdminNetworkPolicy
metadata: {name: default}
spec:
  subject: {namespaces: {}}
  ingress: [{action: Deny, from: [{namespaces: {}}]}]
";

#[test]
fn admin_network_policies_become_cluster_network_policies() {
    let output = hanse(&["policy", "convert", "-", "-o", "json"], ADMIN);
    assert!(output.status.success(), "{output:?}");
    let converted = lines(&output);
    let expected = serde_json::json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": {"name": "a"},
        "spec": {
            "tier": "Admin", "priority": 7, "subject": {"namespaces": {"matchLabels": {"team": "red"}}},
            "ingress": [{
                "name": "from-blue", "action": "Accept",
                "from": [{"pods": {"namespaceSelector": {"matchLabels": {"team": "blue"}}, "podSelector": {}}}],
                "protocols": [
                    {"udp": {"destinationPort": {"number": 53}}},
                    {"tcp": {"destinationPort": {"range": {"start": 8000, "end": 8010}}}},
                    {"destinationNamedPort": "http"},
                ],
            }],
            "egress": [{"action": "Pass", "to": [{"networks": ["10.0.0.0/8"]}]}],
        },
    });
    assert_eq!(converted[0], expected);
    assert_eq!((&converted[1]["spec"]["tier"], &converted[1]["spec"]["priority"]), (&"Baseline".into(), &1000.into()));
    let output = hanse(&["policy", "convert", "-"], ADMIN);
    let output = hanse(&["policy", "check", "-"], &String::from_utf8_lossy(&output.stdout));
    assert!(String::from_utf8_lossy(&output.stdout).contains("2 accepted, 0 refused"), "{output:?}");
}

#[test]
fn fields_without_an_equivalent_are_reported_and_not_converted() {
    let same = ADMIN.replace(
        "{namespaceSelector: {matchLabels: {team: blue}}, podSelector: {}}",
        "{namespaces: {sameLabels: [team]}}",
    );
    let output = hanse(&["policy", "convert", "-", "-o", "json"], &same);
    assert_eq!((output.status.code(), lines(&output).len()), (Some(1), 1), "{output:?}");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        told.contains("-:10: AdminNetworkPolicy a: no equivalent: spec.ingress[0].from[0].pods.namespaces"),
        "{told}"
    );
    let output = hanse(&["policy", "convert", "-"], POLICY);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let output = hanse(&["policy", "check", "-"], ADMIN);
    assert!(String::from_utf8_lossy(&output.stdout).contains("`hanse policy convert`"), "{output:?}");
}

#[test]
fn misspelt_fields_and_operators_are_suggested() {
    let content = "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: a}\nspec:\n  selector: app = 'x'\n---\n\
                   apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: b}\nspec:\n  Ingress: []\n";
    let output = hanse(&["policy", "check", "-"], content);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(told.contains("write == for equality") && told.contains("did you mean `ingress`?"), "{told}");
}
