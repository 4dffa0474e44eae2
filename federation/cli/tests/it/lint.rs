//! What `hanse policy lint` finds, and what it does not.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// A namespace with one pod that carries every label of these cases, closed by default but for DNS, so that nothing else is
/// found.
const WORLD: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: web, labels: {kubernetes.io/metadata.name: web}}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: web, labels: {app: a, role: b}}
spec: {nodeName: 'n', containers: [{name: c, ports: [{name: http, containerPort: 80}]}]}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: end}
spec: {order: 9000000, defaultAction: Deny}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: end.closed}
spec: {tier: end, types: [Ingress, Egress]}
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: dns}
spec: {order: 1, defaultAction: Pass}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: dns.clients}
spec:
  tier: dns
  selector: '!has(cut)'
  types: [Egress]
  egress:
  - {action: Allow, protocol: UDP, destination: {namespaceSelector: kubernetes.io/metadata.name == 'kube-system', ports: [53]}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: dns.servers}
spec:
  tier: dns
  namespaceSelector: kubernetes.io/metadata.name == 'kube-system'
  types: [Ingress]
  ingress:
  - {action: Allow, protocol: UDP, destination: {ports: [53]}}
---
apiVersion: v1
kind: Namespace
metadata: {name: kube-system, labels: {kubernetes.io/metadata.name: kube-system}}
---
apiVersion: v1
kind: Pod
metadata: {name: dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec: {nodeName: node, containers: [{name: c}]}
status: {phase: Running, podIP: 10.0.0.53, podIPs: [{ip: 10.0.0.53}, {ip: 'fd00::53'}]}
---
";

fn lint(root: &Path, arguments: &[&str]) -> Vec<Value> {
    let cluster = format!("c={}", root.display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    let output = command.args(["policy", "lint", "--cluster", &cluster, "-o", "json"]).args(arguments).output();
    let output = output.expect("hanse runs");
    assert!(output.status.code().is_some_and(|code| code < 2), "{output:?}");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// A policy in a tier that passes on, with these rules.
fn policy(kind: &str, name: &str, spec: &str) -> String {
    format!("---\napiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n{spec}\n")
}

/// A title, policies of the default tier, and what is found in them by id and rule.
type Case<'a> = (&'a str, Vec<String>, &'a [(&'a str, &'a str)]);

#[test]
fn each_finding_and_its_neighbour() {
    let ingress = |order: u32, subject: &str, rules: &[&str]| {
        let rules: String = rules.iter().map(|rule| format!("\n  - {rule}")).collect();
        format!("  order: {order}\n  selector: {subject}\n  types: [Ingress]\n  ingress:{rules}")
    };
    let egress = |rule: &str| format!("  order: 1\n  types: [Egress]\n  egress:\n  - {rule}");
    let tcp = |ports: &str| format!("{{action: Allow, protocol: TCP, destination: {{ports: [{ports}]}}}}");
    let cases: Vec<Case<'_>> = vec![
        (
            "the same ports before",
            vec![ingress(1, "all()", &[&tcp("80, 443"), &tcp("443")])],
            &[("HN004", "ingress[1]")],
        ),
        (
            "ranges together",
            vec![ingress(1, "all()", &[&tcp("'1:80', '81:90'"), &tcp("'70:85'")])],
            &[("HN004", "ingress[1]")],
        ),
        ("a part of the ports", vec![ingress(1, "all()", &[&tcp("80"), &tcp("'80:81'")])], &[]),
        (
            "another protocol",
            vec![ingress(1, "all()", &[&tcp("53"), "{action: Allow, protocol: UDP, destination: {ports: [53]}}"])],
            &[],
        ),
        ("a log decides nothing", vec![ingress(1, "all()", &["{action: Log}", &tcp("80")])], &[]),
        (
            "a pass leaves the tier",
            vec![ingress(1, "all()", &["{action: Pass}", &tcp("80")])],
            &[("HN004", "ingress[1]")],
        ),
        (
            "a wider net",
            vec![ingress(
                1,
                "all()",
                &["{action: Deny, source: {nets: [10.0.0.0/8]}}", "{action: Allow, source: {nets: [10.1.0.0/16]}}"],
            )],
            &[("HN004", "ingress[1]")],
        ),
        (
            "the other family",
            vec![ingress(1, "all()", &["{action: Deny, ipVersion: 4}", "{action: Allow, protocol: TCP}"])],
            &[],
        ),
        (
            "a wider selector",
            vec![ingress(
                1,
                "all()",
                &["{action: Deny, source: {selector: has(app)}}", "{action: Allow, source: {selector: app == 'a'}}"],
            )],
            &[("HN004", "ingress[1]")],
        ),
        (
            "a narrower selector",
            vec![ingress(
                1,
                "all()",
                &["{action: Deny, source: {selector: app == 'a'}}", "{action: Allow, source: {selector: has(app)}}"],
            )],
            &[],
        ),
        (
            "an exception before",
            vec![ingress(
                1,
                "all()",
                &["{action: Deny, source: {notNets: [10.0.0.0/8]}}", "{action: Allow, source: {nets: [10.1.0.0/16]}}"],
            )],
            &[],
        ),
        (
            "a policy before",
            vec![ingress(1, "has(app)", &["{action: Deny}"]), ingress(2, "app == 'a'", &[&tcp("80")])],
            &[("HN004", "ingress[0]")],
        ),
        (
            "a policy of other pods",
            vec![ingress(1, "app == 'a'", &["{action: Deny}"]), ingress(2, "has(role)", &[&tcp("80")])],
            &[],
        ),
        (
            "the same again",
            vec![ingress(1, "has(app)", &[&tcp("80")]), ingress(2, "app == 'a'", &[&tcp("80")])],
            &[("HN012", "ingress[0]")],
        ),
        (
            "labels that exclude each other",
            vec![ingress(1, "all()", &["{action: Allow, source: {selector: app == 'a' && app == 'b'}}"])],
            &[("HN003", "ingress[0]")],
        ),
        (
            "nets that are all excluded",
            vec![ingress(1, "all()", &["{action: Allow, source: {nets: [10.1.0.0/16], notNets: [10.0.0.0/8]}}"])],
            &[("HN003", "ingress[0]")],
        ),
        (
            "a peer that is not there",
            vec![ingress(1, "all()", &["{action: Allow, source: {selector: app == 'gone'}}"])],
            &[("HN002", "ingress[0]")],
        ),
        ("subjects that are not there", vec![ingress(1, "app == 'gone'", &["{action: Deny}"])], &[("HN001", "")]),
        ("the world", vec![egress("{action: Allow}")], &[("HN007", "egress[0]")]),
        (
            "the world in halves",
            vec![egress("{action: Allow, destination: {nets: [0.0.0.0/1, 128.0.0.0/1]}}")],
            &[("HN007", "egress[0]")],
        ),
        (
            "the world but some",
            vec![egress("{action: Allow, destination: {notSelector: app == 'a'}}")],
            &[("HN007", "egress[0]")],
        ),
        ("some of the world", vec![egress("{action: Allow, destination: {nets: [203.0.113.0/24]}}")], &[]),
        ("a pass that is caught", vec![ingress(1, "all()", &["{action: Pass, protocol: UDP}"])], &[]),
    ];
    for (about, policies, expected) in cases {
        let root = tempfile::tempdir().expect("temporary directory");
        let mut text = WORLD.to_owned();
        for (at, spec) in policies.iter().enumerate() {
            text += &policy("GlobalNetworkPolicy", &format!("p{at}"), spec);
        }
        std::fs::write(root.path().join("world.yaml"), text).expect("manifests");
        let findings = lint(root.path(), &[]);
        let of = |finding: &Value, field: &str| finding[field].as_str().unwrap_or_default().to_owned();
        let mut found: Vec<(String, String)> = findings.iter().map(|it| (of(it, "id"), of(it, "rule"))).collect();
        found.sort();
        let expected: Vec<(String, String)> =
            expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        assert_eq!(found, expected, "{about}: {findings:#?}");
    }
}

#[test]
fn tiers_end_and_namespaces_are_open() {
    let root = tempfile::tempdir().expect("temporary directory");
    let world = "\
apiVersion: v1
kind: Namespace
metadata: {name: web, labels: {kubernetes.io/metadata.name: web}}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: web, labels: {app: a}}
spec: {nodeName: 'n', containers: [{name: c}]}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: watch}
spec: {order: 10, defaultAction: Pass}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: watch.some}
spec: {tier: watch, types: [Ingress], ingress: [{action: Deny, protocol: UDP}]}
";
    let file = root.path().join("world.yaml");
    std::fs::write(&file, world).expect("manifests");
    let at = |id: &str| {
        let findings = lint(root.path(), &[]);
        let found = findings.into_iter().find(|finding| finding["id"] == id);
        found.map(|finding| (finding["line"].as_u64(), finding["message"].as_str().unwrap_or_default().to_owned()))
    };
    let line = |found: Option<(Option<u64>, String)>| found.and_then(|(line, _)| line);
    assert_eq!(line(at("HN008")), Some(11), "the tier's own place");
    assert_eq!(line(at("HN005")), Some(1), "the namespace's own place");
    assert!(at("HN006").is_some(), "the cluster is open as a whole");
    // A later policy of the same direction catches what passes; one of the other does not.
    let with = |more: &str| std::fs::write(&file, format!("{world}---\n{more}")).expect("manifests");
    with(&policy("GlobalNetworkPolicy", "later", "  types: [Egress]")["---\n".len()..]);
    assert!(at("HN008").is_some());
    with(&policy("GlobalNetworkPolicy", "later", "  types: [Ingress]")["---\n".len()..]);
    assert_eq!(at("HN008"), None);
    let open = at("HN005").expect("egress is open").1;
    assert!(open.contains("egress is unrestricted (1 pod)") && !open.contains("ingress"), "{open}");
    // A ClusterNetworkPolicy denies by its rules, for its tier only passes.
    with(
        "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: closed}\nspec:\n  tier: Baseline\n  priority: 10\n  subject: {namespaces: {}}\n  ingress: [{action: Deny, from: [{namespaces: {}}]}]\n  egress: [{action: Deny, to: [{networks: ['0.0.0.0/0', '::/0']}]}]\n",
    );
    assert_eq!(at("HN005"), None);
    assert_eq!(at("HN006"), None);
}

/// A pod without an address is open to nothing, and makes nothing less open.
#[test]
fn pods_without_addresses_count_for_nothing() {
    let root = tempfile::tempdir().expect("temporary directory");
    let ended = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: done, namespace: web, labels: {app: done}}\nstatus: {phase: Succeeded, podIP: 10.0.0.2}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: early, namespace: empty}\nstatus: {phase: Pending}\n";
    let open = WORLD.split("---\napiVersion: projectcalico.org/v3").next().expect("the pod");
    std::fs::write(root.path().join("world.yaml"), format!("{open}{ended}")).expect("manifests");
    let findings = lint(root.path(), &[]);
    let of = |id: &str| -> Vec<&str> {
        let found = findings.iter().filter(|finding| finding["id"] == id);
        found.map(|finding| finding["message"].as_str().expect("a message")).collect()
    };
    assert_eq!(of("HN006").len(), 1, "{findings:#?}");
    assert_eq!(of("HN005").len(), 1, "{findings:#?}");
    assert!(of("HN005")[0].contains("namespace web: ingress and egress are unrestricted (1 pod)"), "{findings:#?}");
}

/// As a source a service is its addresses, as a destination its ports.
#[test]
fn a_service_without_ports_is_a_source_only() {
    let root = tempfile::tempdir().expect("temporary directory");
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s-1, namespace: web, labels: {kubernetes.io/service-name: s}}\naddressType: IPv4\nendpoints: [{addresses: [10.0.0.1]}]\nports: []\n";
    let rules = "  order: 1\n  types: [Ingress, Egress]\n  ingress: [{action: Allow, source: {services: {name: s, namespace: web}}}]\n  egress: [{action: Allow, destination: {services: {name: s, namespace: web}}}]";
    let text = format!("{WORLD}{slice}{}", policy("GlobalNetworkPolicy", "p", rules));
    std::fs::write(root.path().join("world.yaml"), text).expect("manifests");
    let findings = lint(root.path(), &[]);
    let found: Vec<_> = findings.iter().map(|finding| (&finding["id"], &finding["rule"])).collect();
    assert_eq!(found, [(&Value::from("HN002"), &Value::from("egress[0]"))], "{findings:#?}");
}

#[test]
fn rules_that_depend_on_a_stale_cluster_are_reported_with_their_line() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (own, far, federation) = (root.path().join("c"), root.path().join("far"), root.path().join("federation"));
    for directory in [&own, &far, &federation] {
        std::fs::create_dir(directory).expect("directory");
    }
    std::fs::write(own.join("world.yaml"), WORLD).expect("manifests");
    std::fs::write(far.join("world.yaml"), WORLD.replace("app: a", "app: far")).expect("manifests");
    let policies = "\
apiVersion: hanse.dev/v1alpha1
kind: Tier
metadata: {name: base}
spec: {phase: Guard, order: 1, defaultAction: Pass}
---
apiVersion: hanse.dev/v1alpha1
kind: FederatedNetworkPolicy
metadata: {name: p}
spec:
  tier: base
  order: 1
  types: [Ingress]
  ingress:
  - {action: Allow, source: {selector: app == 'a'}}
  - {action: Allow, source: {selector: app == 'far'}}
";
    std::fs::write(federation.join("all.yaml"), policies).expect("manifests");
    let (far, federation) = (format!("far={}", far.display()), federation.display().to_string());
    let fleet = ["--cluster", &far, "--federation", &federation];
    let stale = |arguments: &[&str]| -> Vec<Value> {
        let findings = lint(&own, &[&fleet[..], arguments].concat());
        findings.into_iter().filter(|finding| finding["id"] == "HN009").collect()
    };
    assert_eq!(stale(&[]), Vec::<Value>::new());
    let found = stale(&["--stale", "far"]);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((&found[0]["rule"], &found[0]["line"]), (&"ingress[1]".into(), &15.into()), "{found:#?}");
}

#[test]
fn a_selector_that_only_another_clusters_set_satisfies_is_named() {
    let root = tempfile::tempdir().expect("temporary directory");
    let (own, far, federation) = (root.path().join("c"), root.path().join("far"), root.path().join("federation"));
    for directory in [&own, &far, &federation] {
        std::fs::create_dir(directory).expect("directory");
    }
    let set = "---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkSet\nmetadata: {name: lan, labels: {k: v}}\n\
               spec: {nets: [192.0.2.0/24]}\n";
    std::fs::write(own.join("world.yaml"), WORLD).expect("manifests");
    std::fs::write(far.join("world.yaml"), WORLD.to_owned() + set).expect("manifests");
    let policies = "\
apiVersion: hanse.dev/v1alpha1
kind: Tier
metadata: {name: base}
spec: {phase: Guard, order: 1, defaultAction: Pass}
---
apiVersion: hanse.dev/v1alpha1
kind: FederatedNetworkPolicy
metadata: {name: p}
spec:
  tier: base
  types: [Ingress]
  ingress:
  - {action: Deny, source: {selector: k == 'v'}}
";
    std::fs::write(federation.join("all.yaml"), policies).expect("manifests");
    let (far, directory) = (format!("far={}", far.display()), federation.display().to_string());
    let of_selectors = || -> Vec<Value> {
        let findings = lint(&own, &["--cluster", &far, "--federation", &directory]);
        findings.into_iter().filter(|finding| finding["id"] == "HN002").collect()
    };
    let found = of_selectors();
    let messages: Vec<&str> = found.iter().filter_map(|finding| finding["message"].as_str()).collect();
    assert_eq!(messages.len(), 1, "{found:#?}");
    for part in ["cluster \"c\"", "network set lan of cluster \"far\"", "FederatedNetworkSet"] {
        assert!(messages[0].contains(part), "{part}: {messages:?}");
    }
    // One that every cluster has.
    let federated = set.replace("projectcalico.org/v3", "hanse.dev/v1alpha1").replace("Global", "Federated");
    std::fs::write(federation.join("set.yaml"), federated).expect("manifests");
    assert_eq!(of_selectors(), Vec::<Value>::new());
}

#[test]
fn sarif_has_what_its_schema_requires() {
    let root = tempfile::tempdir().expect("temporary directory");
    let folder = root.path().join("a folder");
    std::fs::create_dir(&folder).expect("directory");
    let world =
        WORLD.to_owned() + &policy("GlobalNetworkPolicy", "p", "  types: [Egress]\n  egress:\n  - {action: Allow}");
    std::fs::write(folder.join("world.yaml"), &world).expect("manifests");
    let cluster = format!("c={}", folder.display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    let output =
        command.args(["policy", "lint", "--cluster", &cluster, "-o", "sarif", "--fail-on", "warning"]).output();
    let output = output.expect("hanse runs");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let log: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    // SARIF 2.1.0, sections 3.13, 3.14, 3.18, 3.19, 3.27 to 3.30 and 3.49: what must be there, and of which kind.
    assert_eq!(log["version"], "2.1.0");
    let run = &log["runs"][0];
    let driver = &run["tool"]["driver"];
    assert!(driver["name"].is_string(), "{log:#}");
    let rules = driver["rules"].as_array().expect("rules");
    let mut ids: Vec<&str> = rules.iter().map(|rule| rule["id"].as_str().expect("a rule has an id")).collect();
    assert!(rules.iter().all(|rule| rule["shortDescription"]["text"].is_string() && rule["help"]["text"].is_string()));
    ids.dedup();
    assert_eq!(ids.len(), rules.len(), "ids are of one rule each");
    let results = run["results"].as_array().expect("results");
    assert!(!results.is_empty());
    for result in results {
        assert!(result["message"]["text"].is_string(), "{result:#}");
        assert!(["note", "warning", "error"].contains(&result["level"].as_str().expect("a level")), "{result:#}");
        let index = result["ruleIndex"].as_u64().expect("an index") as usize;
        assert_eq!(rules[index]["id"], result["ruleId"], "{result:#}");
        for location in result["locations"].as_array().expect("locations") {
            let physical = &location["physicalLocation"];
            let uri = physical["artifactLocation"]["uri"].as_str().expect("a URI");
            assert!(uri.starts_with("file:///") && uri.contains("a%20folder"), "{uri}");
            assert!(physical["region"]["startLine"].as_u64().is_some_and(|line| line > 0), "{result:#}");
        }
    }
    assert_eq!(
        run["invocations"],
        serde_json::json!([{"executionSuccessful": true, "toolExecutionNotifications": []}])
    );

    // What is refused makes the run incomplete (3.20.14, 3.20.21 and 3.58).
    let broken = policy("GlobalNetworkPolicy", "q", "  types: [Both]");
    std::fs::write(folder.join("broken.yaml"), broken).expect("manifests");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    let output = command.args(["policy", "lint", "--cluster", &cluster, "-o", "sarif", "--fail-on", "never"]).output();
    let output = output.expect("hanse runs");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let log: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let invocation = &log["runs"][0]["invocations"][0];
    assert_eq!(invocation["executionSuccessful"], false, "{invocation:#}");
    let notification = &invocation["toolExecutionNotifications"][0];
    assert_eq!(notification["level"], "error");
    assert!(
        notification["message"]["text"].as_str().is_some_and(|text| text.contains("spec.types[0]")),
        "{notification:#}"
    );
    let physical = &notification["locations"][0]["physicalLocation"];
    assert!(physical["artifactLocation"]["uri"].as_str().is_some_and(|uri| uri.ends_with("/broken.yaml")));
    assert_eq!(physical["region"]["startLine"], 6);
}

/// What selects nothing is shown as it is written, each peer by itself.
#[test]
fn messages_show_what_is_written() {
    let kubernetes = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: k, namespace: web}\nspec:\n  podSelector: {matchLabels: {app: gone}, matchExpressions: [{key: x, operator: In, values: [b, a]}]}\n  ingress:\n  - from:\n    - podSelector: {}\n    - podSelector: {matchLabels: {app: none}}\n    - namespaceSelector: {matchLabels: {team: ''}}\n      podSelector: {}\n    - podSelector: {matchExpressions: [{key: app, operator: In, values: [c]}, {key: app, operator: NotIn, values: [c]}]}\n---\n";
    let never = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: m, namespace: web}\nspec:\n  podSelector: {}\n  ingress:\n  - from:\n    - podSelector: {matchExpressions: [{key: a, operator: Exists}, {key: a, operator: DoesNotExist}]}\n    - podSelector: {matchExpressions: [{key: b, operator: Exists}, {key: b, operator: DoesNotExist}]}\n---\n";
    let calico = policy(
        "NetworkPolicy",
        "c, namespace: web",
        "  selector: app=='gone'\n  serviceAccountSelector: has(x)\n  ingress:\n  - {action: Allow, source: {selector: \"app in {'y','x'}\", notSelector: has(z), serviceAccounts: {names: [b, a]}}}\n  - {action: Allow, source: {selector: app == 'a' && app == 'b', namespaceSelector: all()}}",
    );
    let cluster = "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: p}\nspec:\n  tier: Admin\n  priority: 1\n  subject: {pods: {podSelector: {matchLabels: {app: gone}}}}\n  ingress:\n  - action: Deny\n    from:\n    - namespaces: {matchLabels: {team: x}}\n    - pods: {namespaceSelector: {matchLabels: {team: x}}, podSelector: {}}\n---\n";
    let root = tempfile::tempdir().expect("temporary directory");
    std::fs::write(root.path().join("world.yaml"), format!("{WORLD}{kubernetes}{never}{calico}---\n{cluster}"))
        .expect("manifests");
    let mut messages: Vec<String> = Vec::new();
    for line in lint(root.path(), &[]) {
        if matches!(line["id"].as_str(), Some("HN001" | "HN002" | "HN003")) {
            messages.push(line["message"].as_str().expect("a message").to_owned());
        }
    }
    messages.sort();
    let expected = [
        "from[0] {namespaces: {matchLabels: {team: x}}} selects nothing",
        "from[0] {podSelector: {matchExpressions: [{key: a, operator: Exists}, {key: a, operator: DoesNotExist}]}} contradicts itself",
        "from[1] {podSelector: {matchExpressions: [{key: b, operator: Exists}, {key: b, operator: DoesNotExist}]}} contradicts itself",
        "from[1] {podSelector: {matchLabels: {app: none}}} selects nothing",
        "from[1] {pods: {namespaceSelector: {matchLabels: {team: x}}, podSelector: {}}} selects nothing",
        "from[2] {namespaceSelector: {matchLabels: {team: ''}}, podSelector: {}} selects nothing",
        "from[3] {podSelector: {matchExpressions: [{key: app, operator: In, values: [c]}, {key: app, operator: NotIn, values: [c]}]}} selects nothing",
        "podSelector: {matchLabels: {app: gone}, matchExpressions: [{key: x, operator: In, values: [b, a]}]} selects no pod",
        "selector: app=='gone', serviceAccountSelector: has(x) selects no pod",
        "source {namespaceSelector: all(), selector: app == 'a' && app == 'b'} contradicts itself",
        "source {serviceAccounts: {names: [b, a]}, selector: app in {'y','x'}, notSelector: has(z)} selects nothing",
        "subject {pods: {podSelector: {matchLabels: {app: gone}}}} selects no pod",
    ];
    assert_eq!(messages, expected);
}

/// What people report as bugs of Calico.
#[test]
fn common_mistakes_are_found() {
    let found = |extra: &str| -> Vec<(String, String)> {
        let root = tempfile::tempdir().expect("temporary directory");
        std::fs::write(root.path().join("world.yaml"), format!("{WORLD}{extra}")).expect("manifests");
        let cluster = format!("c={}", root.path().display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
        let output =
            command.args(["policy", "lint", "--cluster", &cluster, "-o", "json"]).output().expect("hanse runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"));
        let word = |line: &Value, name: &str| line[name].as_str().unwrap_or_default().to_owned();
        lines.map(|line| (word(&line, "id"), word(&line, "message"))).collect()
    };
    let rule = |direction: &str, rule: &str| {
        let list = direction.to_lowercase();
        format!("  selector: app == 'a'\n  types: [{direction}]\n  {list}:\n  - {rule}")
    };
    let namespaced = |spec: &str| policy("NetworkPolicy", "np, namespace: web", spec);
    let global = |spec: &str| policy("GlobalNetworkPolicy", "g", spec);
    let set = "---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkSet\nmetadata: {name: lan, labels: {zone: lan}}\nspec: {nets: [10.9.0.0/16]}\n";
    let hosts = "---\napiVersion: projectcalico.org/v3\nkind: HostEndpoint\nmetadata: {name: h}\nspec: {node: node}\n";
    // The policy for DNS leaves it out.
    let cut = WORLD.split("---\n").nth(1).expect("a pod").replace("name: server", "name: cut");
    let cut = format!(
        "---\n{}",
        cut.replace("10.0.0.1", "10.0.0.9").replace("fd00::1", "fd00::9").replace("role: b", "role: b, cut: x")
    );
    let kubernetes = |rules: &str| {
        let spec = format!("  podSelector: {{}}\n  policyTypes: [Egress]\n  {rules}");
        policy("NetworkPolicy", "np, namespace: web", &spec).replace("projectcalico.org/v3", "networking.k8s.io/v1")
    };
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: web}\nspec: {clusterIP: 10.96.0.10, selector: {role: b}, ports: [{port: 80}]}\n";
    let pod_beside = WORLD.split("---\n").nth(1).expect("a pod").replace("name: server", "name: beside");
    let pod_beside = format!("---\n{}", pod_beside.replace("10.0.0.1", "10.96.7.7").replace("role: b", "label: x"));
    let cases = [
        ("only logs", global(&rule("Ingress", "{action: Log}")), &["HN013"][..]),
        (
            "logs and decides",
            global(&rule("Ingress", "{action: Log}\n  - {action: Allow, source: {selector: app == 'a'}}")),
            &[],
        ),
        (
            "asks the wrong pod",
            global(&rule("Ingress", "{action: Allow, destination: {selector: app == 'b'}}")),
            &["HN003"],
        ),
        (
            "asks a pod that is not there",
            global(&rule("Ingress", "{action: Allow, destination: {selector: has(other)}}")),
            &["HN002"],
        ),
        ("asks the right pod", global(&rule("Ingress", "{action: Allow, destination: {selector: role == 'b'}}")), &[]),
        (
            "asks a pod for the label of its namespace",
            global(&rule("Ingress", "{action: Allow, source: {selector: projectcalico.org/name == 'web'}}")),
            &["HN014", "HN002"],
        ),
        (
            "asks a namespace for its name",
            global(&rule("Ingress", "{action: Allow, source: {namespaceSelector: projectcalico.org/name == 'web'}}")),
            &[],
        ),
        (
            "a global set from a namespace",
            namespaced(&rule("Ingress", "{action: Allow, source: {selector: zone == 'lan'}}")) + set,
            &["HN016"],
        ),
        (
            "a global set from a namespace, rightly",
            namespaced(&rule(
                "Ingress",
                "{action: Allow, source: {selector: zone == 'lan', namespaceSelector: global()}}",
            )) + set,
            &[],
        ),
        (
            "for hosts",
            policy("GlobalNetworkPolicy", "h", "  selector: host == 'h'\n  types: [Ingress]") + hosts,
            &["HN015"],
        ),
        (
            "untracked",
            policy("GlobalNetworkPolicy", "h", "  doNotTrack: true\n  applyOnForward: true\n  types: [Ingress]"),
            &["HN015"],
        ),
        ("for hosts that are not there", policy("GlobalNetworkPolicy", "h", "  selector: host == 'h'"), &["HN001"]),
        ("without DNS", cut.clone(), &["HN017"]),
        (
            "with the DNS of nodes",
            cut.clone()
                + &global(&rule(
                    "Egress",
                    "{action: Allow, protocol: UDP, destination: {nets: [169.254.20.10/32], ports: [53]}}",
                )),
            &[],
        ),
        (
            "the address of a Service",
            kubernetes("egress: [{to: [{ipBlock: {cidr: 10.96.0.10/32}}, {namespaceSelector: {}}]}]") + service,
            &["HN018"],
        ),
        (
            "a range of Services",
            kubernetes("egress: [{to: [{ipBlock: {cidr: 10.96.0.0/12}}, {namespaceSelector: {}}]}]") + service,
            &["HN018"],
        ),
        (
            "a set with the address of a Service",
            global(&rule("Egress", "{action: Deny, destination: {selector: zone == 'lan'}}"))
                + &set.replace("10.9.0.0/16", "10.9.0.0/16, 10.96.0.10/32")
                + service,
            &["HN018"],
        ),
        (
            "all that is private",
            kubernetes("egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}, {namespaceSelector: {}}]}]") + service,
            &[],
        ),
        (
            "a net of pods and Services",
            kubernetes("egress: [{to: [{ipBlock: {cidr: 10.96.0.0/12}}, {namespaceSelector: {}}]}]")
                + service
                + &pod_beside,
            &[],
        ),
        (
            "DNS at its Service's address, with a cache on each node",
            kubernetes("egress: [{to: [{ipBlock: {cidr: 10.96.0.53/32}}, {namespaceSelector: {}}]}]")
                + &service.replace("10.96.0.10", "10.96.0.53").replace("port: 80", "port: 53")
                + &pod_beside.replace("label: x", "k8s-app: node-local-dns"),
            &[],
        ),
    ];
    for (title, extra, expected) in cases {
        let found = found(&extra);
        let ids: Vec<&str> = found.iter().map(|(id, _)| &**id).filter(|id| *id != "HN004").collect();
        assert_eq!(ids, expected, "{title}: {found:#?}");
    }
}

/// Selectors of policies are printed whole, as they are written, with their places: rows that begin alike stay distinct.
#[test]
fn order_prints_selectors_as_written() {
    let labels =
        |last: &str| format!("{{app.kubernetes.io/part-of: a-very-long-name-of-an-application, tier: {last}}}");
    let of_kubernetes = |name: &str| {
        format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: web}}\nspec: {{podSelector: {{matchLabels: {}}}}}\n",
            labels(name)
        )
    };
    let manifests = of_kubernetes("front")
        + &of_kubernetes("back")
        + &policy("NetworkPolicy", "own, namespace: web", "  selector: app=='a'&&has(b)")
        + &policy("GlobalNetworkPolicy", "all", "  namespaceSelector: team == 'x'")
        + &policy("GlobalNetworkPolicy", "none", "  types: [Ingress]");
    let root = tempfile::tempdir().expect("temporary directory");
    std::fs::write(root.path().join("p.yaml"), manifests).expect("manifests");
    let cluster = format!("c={}", root.path().display());
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
        let output = command.args(["policy", "order", "--cluster", &cluster]).args(arguments).output();
        String::from_utf8(output.expect("hanse runs").stdout).expect("text")
    };
    let table = run(&[]);
    for (name, line, selector) in [
        ("front", 2, format!("podSelector: {{matchLabels: {}}}", labels("front"))),
        ("back", 7, format!("podSelector: {{matchLabels: {}}}", labels("back"))),
        ("own", 12, "selector: app=='a'&&has(b)".to_owned()),
        ("all", 18, "namespaceSelector: team == 'x'".to_owned()),
        ("none", 24, "all()".to_owned()),
    ] {
        let found = table.lines().find(|row| row.contains(&format!("{name} "))).unwrap_or_default();
        let is_whole = found.contains(&format!("p.yaml:{line} ")) && found.ends_with(&format!("  {selector}"));
        assert!(is_whole, "{name}: {table}");
    }
    let tier: Value = serde_json::from_str(run(&["-o", "json"]).lines().next().unwrap_or_default()).expect("JSON");
    let own = tier["policies"].as_array().into_iter().flatten().find(|it| it["name"] == "own").expect("the policy");
    assert_eq!(own["selector"], "selector: app=='a'&&has(b)");
    let effective = "(projectcalico.org/namespace == \"web\" && (app == \"a\" && has(b)))";
    assert_eq!((&own["effectiveSelector"], &own["line"]), (&effective.into(), &12.into()));
}
