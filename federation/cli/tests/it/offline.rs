//! The contracts of the offline commands, besides the verdicts.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

pub fn hanse(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hanse")).args(arguments).output().expect("hanse runs")
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn help_states_what_verdicts_do_not_include() {
    for command in ["explain", "matrix"] {
        let output = hanse(&["policy", command, "--help"]);
        let help = String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(help.contains("traffic from a node to its own pods"), "{help}");
    }
    let output = hanse(&["policy", "--help"]);
    let help = String::from_utf8_lossy(&output.stdout);
    for line in ["Evaluate packets, and show which rule decides", "Evaluate all pairs of pods, on each port"] {
        assert!(help.lines().any(|it| it.ends_with(line)), "{help}");
    }
}

#[test]
fn completion_scripts_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let output = hanse(&["completion", shell]);
        assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("hanse"), "{shell}");
        // To a reader that went away.
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
        let output = command.args(["completion", shell]).stdout(writer).output().expect("hanse runs");
        assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {output:?}");
    }
}

#[test]
fn manifests_are_checked_by_file_and_line() {
    let root = tempfile::tempdir().expect("temporary directory");
    let file = root.path().join("all.yaml");
    let manifests = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: good, namespace: web}
spec: {podSelector: {}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: bad, namespace: web}
spec:
  podSelector: {}
  ingress:
  - ports:
    - port: 70000
---
apiVersion: example.org/v1
kind: Other
metadata: {name: other}
---
broken: [
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: last}
spec:
  selector: has(a
";
    std::fs::write(&file, manifests).expect("manifests");
    let output = hanse(&["policy", "check", "-o", "json", text(root.path())]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let lines: Vec<Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let told: Vec<(u64, &str, bool)> = lines
        .iter()
        .map(|line| (line["line"].as_u64().unwrap_or(0), line["name"].as_str().unwrap_or(""), line["ok"] == true))
        .collect();
    assert_eq!(told[..3], [(1, "good", true), (6, "bad", false), (15, "other", true)], "{lines:#?}");
    assert_eq!(told[4], (21, "last", false), "{lines:#?}");
    assert!(told[3].0 >= 19 && !told[3].2, "{lines:#?}");
    assert_eq!(lines[1]["errors"][0]["field"], "spec.ingress[0].ports[0].port");
    assert_eq!(lines[4]["errors"][0]["field"], "spec.selector");
    let fields = |value: &Value| value.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
    for line in &lines {
        assert_eq!(fields(line), ["file", "line", "apiVersion", "kind", "namespace", "name", "ok", "result", "errors"]);
        for error in line["errors"].as_array().expect("a list") {
            assert_eq!(fields(error), ["field", "message"]);
        }
    }
    assert_eq!(lines[2]["result"], "skipped");
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 Other (example.org/v1)"), "{output:?}");
    let output = hanse(&["policy", "check", text(root.path())]);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(told.contains("all.yaml:13: NetworkPolicy web/bad: spec.ingress[0].ports[0].port: "), "{told}");
}

#[test]
fn a_misspelt_kind_is_refused() {
    let root = tempfile::tempdir().expect("temporary directory");
    let text = "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolcy\nmetadata: {name: p}\n";
    std::fs::write(root.path().join("a.yaml"), text).expect("manifests");
    let output = hanse(&["policy", "check", "-o", "json", root.path().to_str().expect("UTF-8")]);
    let line: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (output.status.code(), &line["ok"], &line["errors"][0]["field"]),
        (Some(1), &false.into(), &"kind".into())
    );
}

#[test]
fn different_objects_with_one_key_make_answers_incomplete() {
    let root = tempfile::tempdir().expect("temporary directory");
    let policy = |rules: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: web}}\nspec: {{podSelector: {{}}, ingress: [{rules}]}}\n"
        )
    };
    std::fs::write(root.path().join("a.yaml"), policy("")).expect("manifests");
    std::fs::write(root.path().join("b.yaml"), format!("{WORLD}---\n{}", policy("{}"))).expect("manifests");
    for format in ["json", "table"] {
        let output = hanse(&["policy", "check", "-o", format, text(root.path())]);
        assert!(output.status.success(), "{output:?}");
        let told = [output.stdout, output.stderr].concat();
        let told = String::from_utf8_lossy(&told).into_owned();
        assert!(told.contains("NetworkPolicy p conflicts with") && told.contains("a.yaml:1, a different"), "{told}");
        let output = hanse(&["policy", "check", "--strict", "-o", format, text(root.path())]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    let queries = root.path().join("queries.jsonl");
    std::fs::write(&queries, r#"{"from":{"ip":"10.0.0.1"},"to":{"ip":"10.0.0.2"},"port":80}"#).expect("queries");
    let cluster = format!("c={}", root.path().display());
    let output = hanse(&["policy", "explain", "--cluster", &cluster, "--queries", text(&queries), "-o", "json"]);
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (output.status.code(), &answer["verdict"], &answer["incomplete"]),
        (Some(1), &json!("deny"), &json!(true))
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("refused: NetworkPolicy p: metadata.name: conflicts with"), "{stderr}");
    assert!(stderr.contains("`kustomize build DIR | hanse policy"), "{stderr}");
    // A copy is the same object.
    std::fs::write(root.path().join("b.yaml"), format!("{WORLD}---\n# a copy\n{}", policy(""))).expect("manifests");
    let output = hanse(&["policy", "explain", "--cluster", &cluster, "--queries", text(&queries), "-o", "json"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("duplicate of") && stderr.contains("a.yaml:1;"), "{stderr}");
}

/// What a query may leave out, and how else it may be written.
#[test]
fn queries_have_defaults_and_spellings() {
    let root = tempfile::tempdir().expect("temporary directory");
    for (cluster, app) in [("a", "client"), ("b", "server")] {
        let directory = root.path().join(cluster);
        std::fs::create_dir(&directory).expect("directory");
        let policy = format!(
            "---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {{name: p}}\nspec:\n  selector: app == '{app}'\n  types: [Ingress]\n  ingress:\n  \
             - {{action: Allow, protocol: TCP, source: {{ports: [40000]}}, destination: {{ports: [80]}}}}\n  - {{action: Allow, protocol: ICMP, icmp: {{type: 8, code: 0}}}}\n  \
             - {{action: Allow, protocol: ICMPv6, icmp: {{type: 128, code: 0}}}}\n  \
             - {{action: Allow, protocol: SCTP}}\n  - {{action: Allow, protocol: 47}}\n"
        );
        let world = WORLD.split("---\napiVersion: projectcalico.org/v3").next().expect("the pods");
        std::fs::write(directory.join("all.yaml"), format!("{world}{policy}")).expect("manifests");
    }
    let pod = |cluster: &str, name: &str| format!(r#"{{"cluster":"{cluster}","namespace":"web","pod":"{name}"}}"#);
    let (server_a, server_b, client_b) = (pod("a", "server"), pod("b", "server"), pod("b", "client"));
    let (outside, outside_v6) = (r#"{"ip":"203.0.113.1"}"#, r#"{"ip":"2001:db8::1"}"#);
    let cases = [
        // Of both clusters' pods with the address it is the one of the other end's cluster: in b the server is closed, in a not.
        (format!(r#"{{"from":{client_b},"to":{{"ip":"10.0.0.1"}},"port":81}}"#), "deny"),
        (format!(r#"{{"from":{server_a},"to":{{"ip":"10.0.0.1"}},"port":81}}"#), "allow"),
        (format!(r#"{{"from":{{"ip":"10.0.0.2"}},"to":{server_b},"port":81}}"#), "deny"),
        (format!(r#"{{"from":{outside},"to":{server_b},"port":80}}"#), "allow"),
        (
            format!(
                r#"{{"from":{outside},"to":{server_b},"port":80,"protocol":null,"sourcePort":null,"icmp":null,"ipVersion":null}}"#
            ),
            "allow",
        ),
        (format!(r#"{{"from":{outside},"to":{server_b},"port":80,"protocol":"TCP","sourcePort":40000}}"#), "allow"),
        (format!(r#"{{"from":{outside},"to":{server_b},"port":80,"sourcePort":40001}}"#), "deny"),
        (format!(r#"{{"from":{outside},"to":{server_b},"port":80,"protocol":"UDP"}}"#), "deny"),
        (format!(r#"{{"from":{outside},"to":{server_b},"port":80,"protocol":6}}"#), "allow"),
        (format!(r#"{{"from":{outside},"to":{server_b},"port":1,"protocol":"132"}}"#), "allow"),
        (format!(r#"{{"from":{outside},"to":{server_b},"protocol":"ICMP","icmp":{{"type":8,"code":0}}}}"#), "allow"),
        (format!(r#"{{"from":{outside},"to":{server_b},"protocol":1,"icmp":{{"type":8}}}}"#), "allow"),
        (format!(r#"{{"from":{outside},"to":{server_b},"protocol":"ICMP","icmp":{{"type":0,"code":0}}}}"#), "deny"),
        (format!(r#"{{"from":{outside},"to":{server_b},"protocol":"ICMP","icmp":{{"type":8,"code":1}}}}"#), "deny"),
        (format!(r#"{{"from":{outside},"to":{server_b},"protocol":"ICMP"}}"#), "allow"),
        (format!(r#"{{"from":{outside},"to":{server_b},"protocol":58}}"#), "deny"),
        (format!(r#"{{"from":{outside_v6},"to":{server_b},"protocol":"ICMPv6"}}"#), "allow"),
        (format!(r#"{{"from":{outside_v6},"to":{server_b},"protocol":"ICMPv6","icmp":{{"type":129}}}}"#), "deny"),
        (format!(r#"{{"from":{outside_v6},"to":{server_b},"protocol":1}}"#), "deny"),
        (format!(r#"{{"from":{outside},"to":{server_b},"protocol":"47"}}"#), "allow"),
        (format!(r#"{{"from":{outside},"to":{server_b},"protocol":255}}"#), "deny"),
        (format!(r#"{{"from":{outside},"to":{{"ip":"2001:db8::1"}},"port":1}}"#), "error"),
        (format!(r#"{{"from":{client_b},"to":{server_b},"port":81,"ipVersion":5}}"#), "error"),
        (format!(r#"{{"from":{outside},"to":{server_b},"port":80,"ipVersion":6}}"#), "error"),
        (format!(r#"{{"from":{outside},"to":{server_b},"protocol":"SCTP"}}"#), "error"),
        (format!(r#"{{"from":{outside},"to":{server_b},"port":65536}}"#), "error"),
        (format!(r#"{{"from":{outside},"to":{server_b},"port":80,"protocol":256}}"#), "error"),
        (format!(r#"{{"from":{outside},"to":{{"namespace":"web","pod":"server"}},"port":80}}"#), "error"),
        (format!(r#"{{"from":{outside},"to":{},"port":80}}"#, pod("c", "server")), "error"),
        (r#"{"from":{"ip":"10.0.0"},"to":{"ip":"10.0.0.1"},"port":80}"#.to_owned(), "error"),
        (r#"{"from":{},"to":{"ip":"10.0.0.1"},"port":80}"#.to_owned(), "error"),
        ("no JSON".to_owned(), "error"),
    ];
    let queries = root.path().join("queries.jsonl");
    std::fs::write(&queries, cases.iter().map(|(line, _)| line.as_str()).collect::<Vec<_>>().join("\n\n"))
        .expect("queries");
    let clusters = ["a", "b"].map(|name| format!("{name}={}", root.path().join(name).display()));
    let output = hanse(&[
        "policy",
        "explain",
        "--cluster",
        &clusters[0],
        "--cluster",
        &clusters[1],
        "--queries",
        text(&queries),
        "-o",
        "json",
    ]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(stdout.lines().count(), cases.len(), "{output:?}");
    for ((query, wanted), answer) in cases.iter().zip(stdout.lines()) {
        let answer: Value = serde_json::from_str(answer).expect("JSON");
        let verdict =
            if answer.get("error").is_some() { "error" } else { answer["verdict"].as_str().expect("a verdict") };
        assert_eq!(verdict, *wanted, "{query}\n{answer:#}");
    }
}

#[test]
fn unreadable_directory_is_an_error() {
    let missing = "/nonexistent/manifests";
    let cluster = format!("c={missing}");
    for arguments in [&["policy", "check", missing][..], &["policy", "diff", "--cluster", &cluster, "--staged"]] {
        let output = hanse(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("read /nonexistent/manifests: No such"), "{stderr}");
        assert_eq!(stderr.matches(missing).count(), 1, "{stderr}");
    }
}

#[test]
fn an_empty_directory_is_an_error_and_standard_input_is_checked() {
    let root = tempfile::tempdir().expect("temporary directory");
    let output = hanse(&["policy", "check", "-o", "json", text(root.path())]);
    assert!(output.status.code() == Some(1) && output.stdout.is_empty(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("no manifests"), "{output:?}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(["policy", "check", "-o", "json", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("hanse runs");
    let namespace = b"apiVersion: v1\nkind: Namespace\nmetadata: {name: UPPER}\n";
    child.stdin.take().expect("a pipe").write_all(namespace).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let line: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&line["file"], &line["name"], &line["ok"]), (&json!("-"), &json!("UPPER"), &json!(false)));
}

#[test]
fn check_and_explain_name_a_federated_policy_whose_tier_does_not_exist() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (cluster, policies, tiers) = (root.path().join("c"), root.path().join("policies"), root.path().join("tiers"));
    for directory in [&cluster, &policies, &tiers] {
        std::fs::create_dir(directory).expect("directory");
    }
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a}\nspec: {nodeName: n1}\n\
               status: {phase: Running, podIP: 10.0.0.1}\n";
    std::fs::write(cluster.join("pod.yaml"), pod).expect("manifests");
    let policy = "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {name: closed}\n\
                  spec: {tier: ghost, types: [Ingress]}\n";
    std::fs::write(policies.join("policy.yaml"), policy).expect("manifests");
    let tier = "apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {name: ghost}\nspec: {order: 1}\n";
    std::fs::write(tiers.join("tier.yaml"), tier).expect("manifests");
    let said = "note: FederatedNetworkPolicy closed";
    let output = hanse(&["policy", "check", text(&policies)]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains(said) && told.contains("spec.tier: Tier \"ghost\""), "{told}");
    let output = hanse(&["policy", "check", text(&policies), text(&tiers)]);
    assert!(!String::from_utf8_lossy(&output.stdout).contains("note:"), "{output:?}");
    let of_cluster = format!("c={}", cluster.display());
    let queries = root.path().join("queries.jsonl");
    std::fs::write(&queries, r#"{"from": {"ip": "203.0.113.1"}, "to": {"namespace": "a", "pod": "p"}, "port": 80}"#)
        .expect("queries");
    let explain = || {
        let sources = ["policy", "explain", "--cluster", &of_cluster, "--federation", text(&policies)];
        let output = hanse(&[&sources[..], &["-o", "json", "--queries", text(&queries)]].concat());
        (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (answer, told) = explain();
    assert!(answer.contains("\"verdict\":\"allow\"") && told.contains(said), "{answer} {told}");
    std::fs::write(policies.join("tier.yaml"), tier).expect("manifests");
    let (answer, told) = explain();
    assert!(answer.contains("\"verdict\":\"deny\"") && !told.contains("note:"), "{answer} {told}");
}

#[test]
fn object_with_a_duplicate_key_keeps_its_name() {
    let root = tempfile::tempdir().expect("temporary directory");
    let manifests = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n  name: b\n";
    std::fs::write(root.path().join("all.yaml"), manifests).expect("manifests");
    let output = hanse(&["policy", "check", "-o", "json", text(root.path())]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let line: Value = serde_json::from_slice(&output.stdout).expect("one line of JSON");
    assert_eq!(
        (&line["line"], &line["apiVersion"], &line["kind"], &line["name"]),
        (&json!(1), &json!("v1"), &json!("Namespace"), &json!("a"))
    );
    assert!(line["errors"][0]["message"].as_str().is_some_and(|it| it.contains("duplicate key \"name\"")), "{line}");
}

#[test]
fn malformed_query_is_refused() {
    let root = tempfile::tempdir().expect("temporary directory");
    std::fs::write(root.path().join("world.yaml"), WORLD).expect("manifests");
    let cluster = format!("c={}", root.path().display());
    for (arguments, named) in [
        (["--port", "80", "--ip-version", "5"], "4 or 6"),
        (["--port", "0", "--ip-version", "4"], "from 1 to 65535"),
        (["--port", "80/ICMP", "--ip-version", "4"], "has no ports"),
        (["--port", "80/47", "--ip-version", "4"], "has no ports"),
    ] {
        let output = hanse(&[&["policy", "matrix", "--cluster", &cluster][..], &arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(named), "{arguments:?}: {output:?}");
    }
    let ends = r#""from":{"ip":"10.0.0.1"},"to":{"ip":"10.0.0.2"},"port":80"#;
    let queries = [
        format!(r#"{{{ends},"protcol":"UDP"}}"#),
        r#"{"from":{"ip":"10.0.0.1","cluster":"c"},"to":{"ip":"10.0.0.2"},"port":80}"#.to_owned(),
        r#"{"from":{"ip":"10.0.0.1"},"to":{"namespace":"web","pod":"server","node":"n"},"port":80}"#.to_owned(),
        format!(r#"{{{ends},"protocol":"ICMP","icmp":{{"type":8,"kode":0}}}}"#),
        format!("{{{ends}}}"),
    ];
    let file = root.path().join("queries.jsonl");
    std::fs::write(&file, queries.join("\n")).expect("queries");
    let output = hanse(&["policy", "explain", "--cluster", &cluster, "--queries", text(&file), "-o", "json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let refused: Vec<bool> = stdout.lines().map(|line| line.starts_with(r#"{"error":"malformed query: "#)).collect();
    assert_eq!(refused, [true, true, true, true, false], "{stdout}");
}

#[test]
fn a_malformed_query_is_named_by_its_line() {
    let root = tempfile::tempdir().expect("temporary directory");
    std::fs::write(root.path().join("world.yaml"), WORLD).expect("manifests");
    let cluster = format!("c={}", root.path().display());
    let file = root.path().join("queries.jsonl");
    let good = r#"{"from":{"ip":"10.0.0.1"},"to":{"ip":"10.0.0.2"},"port":80}"#;
    std::fs::write(&file, format!("\u{feff}{good}\n\n  {{\"from\": SECRET}}\n")).expect("queries");
    for format in ["json", "table"] {
        let output = hanse(&["policy", "explain", "--cluster", &cluster, "--queries", text(&file), "-o", format]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(stdout.contains("queries.jsonl:3: column 12: expected value"), "{stdout}");
        assert_eq!(stdout.matches("malformed").count(), 1, "{stdout}");
        assert!(!stdout.contains("SECRET"), "what is no query is not repeated: {stdout}");
    }
}

/// Of a pair that opens for some packets and closes for others, over both IP versions.
#[test]
fn diff_counts_a_pair_once_for_each_change() {
    let root = tempfile::tempdir().expect("temporary directory");
    let world = WORLD.split("---\napiVersion: projectcalico.org/v3").next().expect("the pods");
    for (name, port) in [("one", 80), ("two", 81)] {
        let policy = format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: web}}\nspec: {{podSelector: {{matchLabels: {{app: server}}}}, ingress: [{{from: [{{podSelector: {{}}}}], ports: [{{port: {port}}}]}}]}}\n"
        );
        std::fs::create_dir(root.path().join(name)).expect("directory");
        std::fs::write(root.path().join(name).join("all.yaml"), format!("{world}{policy}")).expect("manifests");
    }
    let [one, two] = ["one", "two"].map(|name| format!("c={}", root.path().join(name).display()));
    let output = hanse(&["policy", "diff", "--cluster", &one, "--with", &two]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && stdout.ends_with("1 pair opened, 1 closed\n"), "{output:?}");
    // `--with` replaces a cluster that is read.
    let other = two.replacen("c=", "d=", 1);
    for (with, expected) in [
        (&["--with", other.as_str()][..], "--with d: no --cluster has this name"),
        (&["--with", &two, "--with", &two], "--with c: given twice"),
    ] {
        let output = hanse(&[&["policy", "diff", "--cluster", &one][..], with].concat());
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(expected), "{output:?}");
    }
}

#[test]
fn explain_names_an_allow_that_cannot_be_judged() {
    let root = tempfile::tempdir().expect("temporary directory");
    let world = WORLD.split("---\napiVersion: projectcalico.org/v3").next().expect("the pods");
    let policy = "---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: web}\nspec:\n  selector: app == 'server'\n  types: [Ingress]\n  ingress:\n  - {action: Allow, protocol: UDP, destination: {ports: [80]}}\n  - {action: Allow, protocol: TCP, http: {methods: [GET]}}\n  - {action: Allow, protocol: TCP, http: {methods: [GET]}}\n";
    std::fs::write(root.path().join("all.yaml"), format!("{world}{policy}")).expect("manifests");
    let file = root.path().join("queries.jsonl");
    std::fs::write(&file, r#"{"from":{"ip":"10.0.0.2"},"to":{"ip":"10.0.0.1"},"port":80}"#).expect("queries");
    let cluster = format!("c={}", root.path().display());
    let asked = ["policy", "explain", "--cluster", &cluster, "--queries", text(&file), "-o", "json"];
    for arguments in [asked.to_vec(), [&asked[..], &["--reference"]].concat()] {
        let output = hanse(&arguments);
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let trace = answer["ingress"]["trace"].as_array().expect("a trace");
        let told: Vec<_> = trace.iter().map(|step| (&step["rule"], &step["action"], &step["effect"])).collect();
        let http = |rule| (rule, json!("Allow"), json!("not-enforced"));
        let wanted = [http(json!(1)), http(json!(2)), (Value::Null, json!("Deny"), Value::Null)];
        assert_eq!(told, wanted.iter().map(|(a, b, c)| (a, b, c)).collect::<Vec<_>>(), "{answer:#}");
        assert_eq!(answer["verdict"], "deny");
    }
}

const WORLD: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: web, labels: {kubernetes.io/metadata.name: web}}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: web, labels: {app: server}}
spec: {nodeName: 'n', containers: [{name: c}]}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: web, labels: {app: client}}
spec: {nodeName: 'n', containers: [{name: c}]}
status: {phase: Running, podIP: 10.0.0.2, podIPs: [{ip: 10.0.0.2}, {ip: 'fd00::2'}]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: server}
spec:
  order: 5
  selector: app == 'server'
  types: [Ingress]
  ingress:
  - {action: Log}
  - {action: Allow, protocol: UDP}
---
apiVersion: projectcalico.org/v3
kind: StagedGlobalNetworkPolicy
metadata: {name: server}
spec:
  order: 5
  selector: app == 'server'
  types: [Ingress]
  ingress:
  - {action: Allow, protocol: TCP, source: {selector: app == 'client'}, destination: {ports: [80]}}
";

#[test]
fn explain_names_what_decided_and_what_is_staged() {
    let root = tempfile::tempdir().expect("temporary directory");
    std::fs::write(root.path().join("world.yaml"), WORLD).expect("manifests");
    let queries = root.path().join("queries.jsonl");
    let pod = |name: &str| json!({"cluster": "c", "namespace": "web", "pod": name});
    let lines = [
        json!({"from": pod("client"), "to": pod("server"), "protocol": "TCP", "port": 80}),
        json!({"from": {"ip": "10.0.0.2"}, "to": pod("server"), "protocol": 17, "port": 80}),
        json!({"from": pod("nobody"), "to": pod("server"), "protocol": "TCP", "port": 80}),
        json!({"from": {"ip": "203.0.113.1"}, "to": {"ip": "203.0.113.2"}, "protocol": "TCP", "port": 80}),
    ];
    std::fs::write(&queries, lines.map(|line| line.to_string()).join("\n")).expect("queries");
    let cluster = format!("c={}", root.path().display());
    let output = hanse(&["policy", "explain", "--cluster", &cluster, "--queries", text(&queries), "-o", "json"]);
    assert_eq!(output.status.code(), Some(1), "a query has no answer: {output:?}");
    let answers: Vec<Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let [first, second, third, fourth] = &answers[..] else { panic!("{answers:#?}") };
    assert_eq!(first["verdict"], "deny");
    assert_eq!(first["egress"], json!({"verdict": "allow", "trace": [{"profile": "kubernetes", "action": "Allow"}]}));
    let policy =
        json!({"cluster": "c", "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy", "name": "server"});
    assert_eq!(
        first["ingress"]["trace"],
        json!([
            {"phase": "Local", "tier": "default", "policy": policy, "rule": 0, "action": "Log"},
            {"phase": "Local", "tier": "default", "policy": policy, "endOfTier": true, "action": "Deny"},
        ])
    );
    assert_eq!(first["staged"]["verdict"], "allow", "the staged policy takes the place of the enforced one");
    assert_eq!(second["verdict"], "allow");
    assert_eq!(second["ingress"]["trace"][1]["rule"], 1);
    assert!(third["error"].as_str().is_some_and(|error| error.contains("nobody")), "{third}");
    assert_eq!((&fourth["egress"]["verdict"], &fourth["ingress"]["verdict"]), (&json!("none"), &json!("none")));
    assert_eq!(fourth["verdict"], "allow");
}

#[test]
fn diff_shows_what_staged_policies_would_change() {
    let root = tempfile::tempdir().expect("temporary directory");
    std::fs::write(root.path().join("world.yaml"), WORLD).expect("manifests");
    let cluster = format!("c={}", root.path().display());
    let output = hanse(&["policy", "diff", "--cluster", &cluster, "--staged", "--exit-code", "-o", "json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let mut changes: Vec<Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(changes.pop().is_some_and(|last| last["summary"].is_object()), "{output:?}");
    let opened = |change: &&Value| change["after"] == "allow";
    let named: Vec<_> =
        changes.iter().filter(opened).map(|change| (&change["from"]["pods"], &change["ports"])).collect();
    let client = (&json!(["client"]), &json!([80, 80]));
    assert_eq!(named, [client, client], "one in each family");
    assert!(changes.iter().any(|change| change["protocol"] == "UDP" && change["after"] == "deny"), "{changes:#?}");
}

const STAGED_FEDERATION: &str = "\
apiVersion: hanse.dev/v1alpha1
kind: Tier
metadata: {name: guard}
spec: {phase: Guard, order: 1, defaultAction: Pass}
---
apiVersion: hanse.dev/v1alpha1
kind: FederatedNetworkPolicy
metadata: {name: server}
spec: {tier: guard, order: 1, selector: app == 'server', types: [Ingress], ingress: [{action: Deny, protocol: UDP}]}
---
apiVersion: hanse.dev/v1alpha1
kind: StagedFederatedNetworkPolicy
metadata: {name: server}
spec: {stagedAction: Set, tier: guard, order: 1, selector: app == 'server', types: [Ingress], ingress: [{action: Deny, protocol: SCTP}]}
";

#[test]
fn offline_commands_read_staged_federated_policies() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (world, federation) = (root.path().join("c"), root.path().join("federation"));
    let (without_staged, _) =
        WORLD.split_once("---\napiVersion: projectcalico.org/v3\nkind: Staged").expect("it is last");
    for (directory, text) in [(&world, without_staged), (&federation, STAGED_FEDERATION)] {
        std::fs::create_dir(directory).expect("a directory");
        std::fs::write(directory.join("all.yaml"), text).expect("manifests");
    }
    let (cluster, federated) = (format!("c={}", world.display()), federation.display().to_string());
    let lines = |arguments: &[&str]| -> Vec<Value> {
        let output = hanse(&[arguments, &["--cluster", &cluster, "--federation", &federated, "-o", "json"]].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
    };
    let changes = lines(&["policy", "diff", "--staged"]);
    let changed = changes.iter().filter(|it| it["summary"].is_null());
    let changed: Vec<_> = changed.map(|it| (&it["protocol"], &it["before"], &it["after"])).collect();
    let (udp, deny, allow) = (json!("UDP"), json!("deny"), json!("allow"));
    assert!(!changed.is_empty() && changed.iter().all(|it| *it == (&udp, &deny, &allow)), "{changes:#?}");
    let order = lines(&["policy", "order"]);
    let guard = order.iter().find(|it| it["tier"] == "guard").expect("the tier");
    let staged = guard["policies"].as_array().expect("a list").iter().map(|it| &it["staged"]).collect::<Vec<_>>();
    assert_eq!(staged, [&Value::Null, &json!("Set")], "{guard:#}");
    let check = hanse(&["policy", "check", &federated]);
    assert!(check.status.success(), "{check:?}");
    // The action is of the staged kind only, and one of four.
    for (from, to, field) in [
        ("stagedAction: Set", "stagedAction: Drop", "spec.stagedAction: \"Drop\" is not one of Set, Delete"),
        ("kind: Staged", "kind: ", "spec.stagedAction: is a field of StagedFederatedNetworkPolicy only"),
        ("kind: StagedFederatedN", "kind: StagedFederateN", "did you mean StagedFederatedNetworkPolicy"),
    ] {
        std::fs::write(federation.join("all.yaml"), STAGED_FEDERATION.replace(from, to)).expect("manifests");
        let wrong = hanse(&["policy", "check", &federated]);
        let err = String::from_utf8_lossy(&[wrong.stdout, wrong.stderr].concat()).into_owned();
        assert!(!wrong.status.success() && err.contains(field), "{to}: {err}");
    }
}

#[test]
fn order_and_matrix_and_lint_answer() {
    let root = tempfile::tempdir().expect("temporary directory");
    std::fs::write(root.path().join("world.yaml"), WORLD).expect("manifests");
    let cluster = format!("c={}", root.path().display());
    let lines = |arguments: &[&str]| -> Vec<Value> {
        let output = hanse(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
    };
    let order = lines(&["policy", "order", "--cluster", &cluster, "-o", "json"]);
    assert_eq!(order[0]["tier"], "default");
    assert_eq!(order[0]["order"], 1_000_000.0);
    let matrix = lines(&["policy", "matrix", "--cluster", &cluster, "--port", "80,53/UDP", "-o", "json"]);
    let verdict = |from: &str, to: &str, protocol: &str| {
        let found = matrix
            .iter()
            .find(|line| line["from"]["pod"] == from && line["to"]["pod"] == to && line["protocol"] == protocol);
        found.map(|line| line["verdict"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(verdict("client", "server", "TCP").as_deref(), Some("deny"));
    assert_eq!(verdict("client", "server", "UDP").as_deref(), Some("allow"));
    assert_eq!(verdict("server", "client", "TCP").as_deref(), Some("allow"));
    let findings = lines(&["policy", "lint", "--cluster", &cluster, "-o", "json"]);
    assert!(findings.iter().any(|finding| finding["id"] == "HN005"), "{findings:#?}");
    let sarif = hanse(&["policy", "lint", "--cluster", &cluster, "-o", "sarif"]);
    let sarif: Value = serde_json::from_slice(&sarif.stdout).expect("JSON");
    assert_eq!(sarif["version"], "2.1.0");
}

#[test]
fn presets_are_valid_manifests() {
    let needed = [
        ("gpu-collective", "job=llama"),
        ("gpu-collective", "namespace=jobs"),
        ("egress-registries", "nets=203.0.113.0/24"),
    ];
    let root = tempfile::tempdir().expect("temporary directory");
    for preset in
        ["tiers", "default-deny", "deny-metadata", "stages", "model-registry", "gpu-collective", "egress-registries"]
    {
        let mut arguments = vec!["policy", "scaffold", preset, "--set", "clusters=!has(x)"];
        if preset == "tiers" {
            arguments.truncate(3);
        }
        for (_, parameter) in needed.iter().filter(|(name, _)| *name == preset) {
            arguments.extend(["--set", parameter]);
        }
        let output = hanse(&arguments);
        assert!(output.status.success(), "{preset}: {output:?}");
        std::fs::write(root.path().join(format!("{preset}.yaml")), output.stdout).expect("manifests");
    }
    let output = hanse(&["policy", "check", text(root.path())]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    for given in ["job=llama", "namespace=jobs"] {
        let output = hanse(&["policy", "scaffold", "gpu-collective", "--set", given]);
        assert!(!output.status.success(), "a parameter is missing");
    }
}

#[test]
fn a_preset_says_which_parameter_makes_no_manifest() {
    for (preset, parameters, named) in [
        ("gpu-collective", &["namespace=jobs", "job=Llama_7B"][..], "parameter job: "),
        ("gpu-collective", &["namespace=Jobs", "job=llama"], "parameter namespace: "),
        ("egress-registries", &["from=all()", "nets=foo"], "parameter nets: "),
        ("egress-registries", &["nets=203.0.113.0/28", "from=app == 'x"], "parameter from: "),
        ("egress-registries", &["nets=203.0.113.0/28], more: [x"], "parameter nets: "),
        ("model-registry", &["readPort=1", "writePort=99999"], "parameter writePort: "),
        ("stages", &["clusters="], "parameter clusters: "),
    ] {
        let mut arguments = vec!["policy", "scaffold", preset];
        arguments.extend(parameters.iter().flat_map(|parameter| ["--set", parameter]));
        let output = hanse(&arguments);
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{parameters:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(named), "{parameters:?}: {output:?}");
    }
}

#[test]
fn an_address_is_the_newest_live_pods() {
    let root = tempfile::tempdir().expect("temporary directory");
    let pod = |name: &str, created: &str, phase: &str, app: &str| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "web", "creationTimestamp": created, "labels": {"app": app}},
            "spec": {"containers": []}, "status": {"phase": phase, "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]},
        })
    };
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "p", "namespace": "web"},
        "spec": {"podSelector": {"matchLabels": {"app": "new"}}},
    });
    let items = [
        pod("a", "2026-01-01T00:00:00Z", "Running", "old"),
        pod("b", "2026-02-01T00:00:00Z", "Running", "new"),
        pod("c", "2026-03-01T00:00:00Z", "Succeeded", "ended"),
        policy,
    ];
    std::fs::write(
        root.path().join("all.json"),
        json!({"kind": "List", "apiVersion": "v1", "items": items}).to_string(),
    )
    .expect("manifests");
    let queries = root.path().join("queries.jsonl");
    let query = json!({"from": {"ip": "203.0.113.1"}, "to": {"ip": "10.0.0.1"}, "protocol": "TCP", "port": 80});
    let older = json!({"from": {"ip": "203.0.113.1"}, "to": {"cluster": "c", "namespace": "web", "pod": "a"}, "protocol": "TCP", "port": 80});
    std::fs::write(&queries, format!("{query}\n{older}\n")).expect("queries");
    let cluster = format!("c={}", root.path().display());
    let output = hanse(&["policy", "explain", "--cluster", &cluster, "--queries", text(&queries), "-o", "json"]);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(lines[0].contains("\"verdict\":\"deny\""), "{stdout}");
    assert!(lines[1].contains("has no address"), "{stdout}");
}

/// All presets together, over two clusters of AI workloads.
#[test]
fn presets_have_the_documented_effect() {
    let root = tempfile::tempdir().expect("temporary directory");
    let federation = root.path().join("federation");
    std::fs::create_dir(&federation).expect("directory");
    for preset in [
        &["tiers"][..],
        &["default-deny"],
        &["deny-metadata"],
        &["stages"],
        &["model-registry"],
        &["gpu-collective", "--set", "namespace=jobs", "--set", "job=llama"],
        &["egress-registries", "--set", "nets=203.0.113.0/28", "--set", "from=app == 'builder'"],
    ] {
        let output = hanse(&[&["policy", "scaffold"], preset].concat());
        assert!(output.status.success(), "{preset:?}: {output:?}");
        std::fs::write(federation.join(format!("{}.yaml", preset[0])), output.stdout).expect("manifests");
    }
    let namespace = |name: &str, stage: &str| {
        let labels = json!({"kubernetes.io/metadata.name": name, "stage": stage});
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    };
    let pod = |namespace: &str, name: &str, address: &str, labels: Value| {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {"containers": []}, "status": {"phase": "Running", "podIP": address},
        })
    };
    let job = |name: &str| json!({"batch.kubernetes.io/job-name": name});
    let worlds = [
        (
            "train",
            vec![
                namespace("jobs", "train"),
                namespace("kube-system", ""),
                pod("jobs", "llama-0", "10.0.0.1", job("llama")),
                pod("jobs", "llama-1", "10.0.0.2", job("llama")),
                pod("jobs", "other-0", "10.0.0.3", job("other")),
                pod("jobs", "loader", "10.0.0.4", json!({"models": "write"})),
                pod("jobs", "builder", "10.0.0.5", json!({"app": "builder"})),
                pod("kube-system", "dns", "10.0.0.9", json!({"k8s-app": "kube-dns"})),
            ],
        ),
        (
            "serve",
            vec![
                namespace("llm", "inference"),
                pod("llm", "vllm", "10.1.0.1", json!({"models": "read"})),
                pod("llm", "peer", "10.1.0.2", json!({})),
                pod("llm", "registry", "10.1.0.3", json!({"app": "model-registry"})),
            ],
        ),
    ];
    let mut arguments = vec!["policy".to_owned(), "explain".to_owned(), "-o".to_owned(), "json".to_owned()];
    for (name, items) in worlds {
        let directory = root.path().join(name);
        std::fs::create_dir(&directory).expect("directory");
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        std::fs::write(directory.join("all.json"), list.to_string()).expect("manifests");
        arguments.extend(["--cluster".to_owned(), format!("{name}={}", directory.display())]);
    }
    let cases = [
        ("10.0.0.1", "10.0.0.2", "TCP", 29500, "allow", "workers of one job"),
        ("10.0.0.3", "10.0.0.1", "TCP", 29500, "deny", "workers of another job of the same stage"),
        ("10.0.0.1", "10.0.0.3", "TCP", 29500, "deny", "a worker to another job, though the stage is open"),
        ("10.0.0.3", "10.0.0.5", "TCP", 29500, "allow", "within the stage, to what the preset is not for"),
        ("10.0.0.5", "10.0.0.9", "UDP", 53, "allow", "names can be looked up by others"),
        ("10.0.0.1", "10.1.0.1", "TCP", 80, "deny", "training to inference"),
        ("10.1.0.1", "10.1.0.2", "TCP", 80, "allow", "within inference"),
        ("10.0.0.4", "10.1.0.3", "TCP", 8081, "allow", "a writer publishes, across clusters and stages"),
        ("10.1.0.1", "10.1.0.3", "TCP", 8080, "allow", "a reader reads"),
        ("10.0.0.5", "10.1.0.3", "TCP", 8080, "deny", "neither reader nor writer, of another stage"),
        ("10.0.0.1", "10.0.0.9", "UDP", 53, "allow", "names can be looked up"),
        ("10.0.0.1", "10.0.0.9", "UDP", 54, "deny", "and nothing else"),
        ("10.0.0.5", "203.0.113.5", "TCP", 443, "allow", "out to a named registry"),
        ("10.0.0.5", "203.0.113.99", "TCP", 443, "deny", "and to nothing else outside"),
        ("10.0.0.4", "203.0.113.5", "TCP", 443, "deny", "nor by others"),
        ("10.0.0.9", "169.254.169.254", "TCP", 80, "deny", "the metadata address, even without a default deny"),
        ("203.0.113.1", "10.1.0.1", "TCP", 80, "deny", "from outside"),
    ];
    let queries = root.path().join("queries.jsonl");
    let line = |(from, to, protocol, port, ..): &(&str, &str, &str, u16, &str, &str)| {
        json!({"from": {"ip": from}, "to": {"ip": to}, "protocol": protocol, "port": port}).to_string()
    };
    std::fs::write(&queries, cases.iter().map(line).collect::<Vec<_>>().join("\n")).expect("queries");
    arguments.extend(["--federation".to_owned(), federation.display().to_string()]);
    arguments.extend(["--queries".to_owned(), queries.display().to_string()]);
    let output = hanse(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(output.status.success(), "{output:?}");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    for (answer, (from, to, _, port, verdict, about)) in stdout.lines().zip(cases) {
        let answer: Value = serde_json::from_str(answer).expect("JSON");
        assert_eq!(answer["verdict"], verdict, "{about}: {from} -> {to}:{port}\n{answer:#}");
    }
}

/// Where standard error is closed (`2>&1 | head`), what would be said there is dropped.
#[test]
fn closed_standard_error_does_not_stop_the_command() {
    let directory = tempfile::tempdir().expect("a directory");
    let bad = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: A}\nspec: {more: 1}\n---\n";
    std::fs::write(directory.path().join("bad.yaml"), bad.repeat(2_000)).expect("written");
    let path = directory.path().to_str().expect("UTF-8");
    for arguments in [
        &["policy", "check", path][..],
        &["policy", "lint", "--cluster", &format!("c={path}")],
        &["policy", "matrix", "--cluster", &format!("c={path}"), "--port", "80"],
        &["policy", "selector", "a = 'b'"],
        &["status"],
        &["nothing"],
    ] {
        for stdout_too in [false, true] {
            let (reader, writer) = std::io::pipe().expect("a pipe");
            drop(reader);
            let stdout = if stdout_too { Stdio::from(writer.try_clone().expect("cloned")) } else { Stdio::null() };
            let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
            command.args(arguments).env_remove("HANSE_CONTEXT").stdin(Stdio::null()).stdout(stdout).stderr(writer);
            let status = command.status().expect("it starts");
            assert!(matches!(status.code(), Some(0..=2)), "{arguments:?}: {status}");
        }
    }
}
