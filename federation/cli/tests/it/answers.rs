//! What an answer says of what it is about, and what is said where it would be about nothing.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::folders::hanse;
use crate::json::messages;
use crate::online::World;
use crate::workloads::write_queries;

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

fn all_of(output: &Output) -> String {
    [&*output.stdout, &*output.stderr].map(String::from_utf8_lossy).concat()
}

struct Folder {
    root: tempfile::TempDir,
}

impl Folder {
    fn new(content: &str) -> Self {
        let root = tempfile::tempdir().expect("temporary directory");
        std::fs::create_dir(root.path().join("c")).expect("directory");
        std::fs::write(root.path().join("c/all.yaml"), content).expect("manifests");
        Self { root }
    }

    fn cluster(&self) -> String {
        format!("c={}", self.root.path().join("c").display())
    }

    fn run(&self, command: &str, arguments: &[&str]) -> Output {
        hanse(&[&["policy", command, "--cluster", &self.cluster()], arguments].concat(), "")
    }

    fn queries(&self, questions: &[Value]) -> String {
        write_queries(self.root.path(), questions)
    }

    fn answers(&self, questions: &[Value], arguments: &[&str]) -> Vec<Value> {
        let queries = self.queries(questions);
        lines(&self.run("explain", &[&["--queries", &*queries, "-o", "json"], arguments].concat()))
    }
}

/// Two deployments without pods; egress of web is limited to nets.
const SHOP: &str = "\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec: {template: {metadata: {labels: {app: web}}, spec: {containers: [{name: c, ports: [{containerPort: 8080}]}]}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: db, namespace: shop}
spec: {template: {metadata: {labels: {app: db}}, spec: {containers: [{name: c, ports: [{containerPort: 5432}]}]}}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress:
  - to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.9.0.0/16]}}, {ipBlock: {cidr: 'fd00::/8'}}]
";

fn web_to_db() -> Value {
    json!({"from": {"namespace": "shop", "pod": "deployment/web"}, "to": {"namespace": "shop", "pod": "deployment/db"}, "port": 5432})
}

#[test]
fn pods_have_no_address_of_a_family_without_a_pod_net() {
    let shop = Folder::new(SHOP);
    let of = |version: Option<u8>| {
        let mut question = web_to_db();
        question["ipVersion"] = version.map_or(Value::Null, Value::from);
        question
    };
    let questions = [of(None), of(Some(4)), of(Some(6))];
    let verdicts = |nets: &str| -> Vec<String> {
        let said =
            |answer: &Value| answer["verdict"].as_str().or(answer["error"].as_str()).unwrap_or_default().to_owned();
        shop.answers(&questions, &["--pod-net", nets]).iter().map(said).collect()
    };
    let none = |version: u8| format!("shop/deployment/web has no address of IPv{version}");
    assert_eq!(verdicts("10.244.0.0/16"), ["allow", "allow", &none(6)]);
    assert_eq!(verdicts("10.9.0.0/16"), ["deny", "deny", &none(6)]);
    assert_eq!(verdicts("fd00:1::/64"), ["allow", &none(4), "allow"]);
    assert_eq!(verdicts("2001:db8::/64"), ["deny", &none(4), "deny"]);
    assert_eq!(verdicts("10.244.0.0/16,2001:db8::/64"), ["allow", "allow", "deny"]);
    // A matrix of the other version is about nothing.
    let matrix = |arguments: &[&str]| shop.run("matrix", &[&["-o", "json", "--to", "app == 'db'"], arguments].concat());
    let output = matrix(&["--pod-net", "fd00:1::/64", "--from", "app == 'web'"]);
    let verdicts: Vec<Value> = lines(&output).into_iter().map(|mut line| line["verdict"].take()).collect();
    assert_eq!((verdicts, output.status.code()), (vec![json!("allow")], Some(0)));
    let output = matrix(&["--pod-net", "fd00:1::/64", "--ip-version", "4"]);
    assert_eq!((output.stdout.len(), output.status.code()), (0, Some(1)), "{output:?}");
    // Changes of rules for the other version change no verdict.
    let wider = Folder::new(&SHOP.replace("fd00::/8", "::/0"));
    let diff = |nets: &[&str]| {
        let with = ["--with", &*wider.cluster(), "-o", "json"];
        let lines = lines(&shop.run("diff", &[&with, nets].concat()));
        lines.last().expect("a summary")["summary"]["opened"].clone()
    };
    assert_ne!(diff(&[]), json!(0));
    assert_eq!(diff(&["--pod-net", "10.244.0.0/16", "--outside", "203.0.113.1"]), json!(0));
}

#[test]
fn nothing_selected_or_queried_is_an_error() {
    let shop = Folder::new(SHOP);
    for (option, other) in [("--from", "--to"), ("--to", "--from")] {
        for format in ["table", "json"] {
            let output = shop.run("matrix", &[option, "app == 'gone'", other, "all()", "--port", "80", "-o", format]);
            assert_eq!((output.stdout.len(), output.status.code()), (0, Some(1)), "{output:?}");
            let said = messages(&output);
            assert!(
                said.contains(&format!("{option} selects no pod with an address of its own: app == \"gone\"")),
                "{said}"
            );
        }
    }
    for content in ["", "\n \n", "\u{feff}\n"] {
        let file = shop.root.path().join("queries.jsonl");
        std::fs::write(&file, content).expect("queries");
        for format in ["table", "json"] {
            let output = shop.run("explain", &["--queries", &file.display().to_string(), "-o", format]);
            assert_eq!((output.stdout.len(), output.status.code()), (0, Some(1)), "{output:?}");
            assert!(String::from_utf8_lossy(&output.stderr).contains("no queries found"), "{output:?}");
        }
    }
}

#[test]
fn a_running_federation_without_members_answers_nothing() {
    let world = World::new();
    for format in ["table", "json"] {
        let done = world.hanse(&["policy", "matrix", "--port", "80", "-o", format]);
        assert_eq!((done.code, done.out.as_str()), (Some(1), ""), "{done:?}");
        assert!(done.err.contains("no member reports a pod"), "{done:?}");
    }
    let done = crate::online::run(Some(&world.context), &["policy", "explain", "--queries", "-"], "\n");
    assert_eq!((done.code, done.out.as_str()), (Some(1), ""), "{done:?}");
    assert!(done.err.contains("no queries found"), "{done:?}");
}

#[test]
fn check_reports_that_nothing_was_validated() {
    for content in [
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n",
        "{{ if .Values.x }}\na: [\n{{ end }}\n",
        "replicas: 3\n",
    ] {
        let output = hanse(&["policy", "check", "-"], content);
        assert!(output.status.success() && all_of(&output).contains("note: nothing was validated"), "{output:?}");
        assert_eq!(hanse(&["policy", "check", "--strict", "-"], content).status.code(), Some(1), "{content}");
    }
    let output = hanse(&["policy", "check", "-"], "");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = all_of(&output);
    assert!(said.contains("standard input: no objects") && !said.contains(".yaml"), "{said}");
    let output = hanse(&["policy", "matrix", "--cluster", "c=-"], "# nothing\n");
    assert!(all_of(&output).contains("standard input: no objects"), "{output:?}");
    let help = all_of(&hanse(&["policy", "check", "--help"], ""));
    assert!(help.split_whitespace().collect::<Vec<_>>().join(" ").contains("the exit code is 0, or 1 with --strict"));
}

#[test]
fn rules_for_a_dns_service_that_is_not_among_the_manifests_are_no_finding() {
    let rule = |peer: &str| {
        format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: dns, namespace: shop}}\nspec: {{podSelector: {{}}, policyTypes: [Egress], egress: [{{to: [{peer}], ports: [{{port: 53, protocol: UDP}}, {{port: 53}}]}}]}}\n"
        )
    };
    let namespace = |name: &str| format!("namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {name}}}}}");
    let ids = |content: &str| -> Vec<String> {
        let findings = lines(&Folder::new(content).run("lint", &["-o", "json"]));
        let ids = findings.iter().filter_map(|finding| finding["id"].as_str().map(str::to_owned));
        ids.filter(|id| id == "HN001" || id == "HN002").collect()
    };
    let app = SHOP.split("---\napiVersion: networking").next().expect("the deployments");
    let label = "podSelector: {matchLabels: {k8s-app: kube-dns}}";
    let calico = "---\napiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: d, namespace: shop}\nspec: {types: [Egress], egress: [{action: Allow, protocol: UDP, destination: {namespaceSelector: projectcalico.org/name == 'kube-system', selector: k8s-app == 'kube-dns', ports: [53]}}]}\n";
    // The usual rules, also those that are for the servers themselves.
    let of_servers = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: s, namespace: kube-system}\nspec: {podSelector: {matchLabels: {k8s-app: kube-dns}}}\n";
    for usual in [
        rule(&format!("{{{}, {label}}}", namespace("kube-system"))),
        rule(&format!("{{{}}}", namespace("kube-system"))),
        rule(&format!("{{namespaceSelector: {{}}, {label}}}")),
        rule(&format!(
            "{{{}, podSelector: {{matchLabels: {{dns.operator.openshift.io/daemonset-dns: default}}}}}}",
            namespace("openshift-dns")
        )),
        calico.to_owned(),
        of_servers.to_owned(),
    ] {
        assert_eq!(ids(&format!("{app}{usual}")), [""; 0], "{usual}");
    }
    // Another namespace that is not among the manifests of an application is worth a note; with the pods of a whole cluster,
    // or a namespace that is there, it is a warning.
    let severity = |content: &str| {
        let findings = lines(&Folder::new(content).run("lint", &["-o", "json"]));
        let found = findings.into_iter().find(|finding| finding["id"] == "HN002");
        found.and_then(|mut found| found["severity"].take().as_str().map(str::to_owned))
    };
    let running = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\nstatus: {phase: Running, podIP: 10.0.0.1}\n";
    let (gone, of_shop) = (namespace("gone"), namespace("shop"));
    for (peer, more, expected) in [
        (format!("{{{}, podSelector: {{matchLabels: {{app: gone}}}}}}", namespace("kube-system")), "", "note"),
        (format!("{{{gone}}}"), "", "note"),
        (format!("{{{gone}}}"), running, "warning"),
        (format!("{{{of_shop}, podSelector: {{matchLabels: {{app: gone}}}}}}"), "", "warning"),
        ("{namespaceSelector: {matchLabels: {team: gone}}}".to_owned(), "", "warning"),
    ] {
        let content = format!("{app}{}{more}", rule(&peer));
        assert_eq!(severity(&content).as_deref(), Some(expected), "{content}");
    }
    // Where the servers are known, what does not select them is a finding.
    let server = "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: coredns, namespace: kube-system}\nspec: {template: {metadata: {labels: {k8s-app: kube-dns}}, spec: {containers: [{name: c}]}}}\n";
    let openshift = rule(&format!("{{{}}}", namespace("openshift-dns")));
    assert_eq!(ids(&format!("{app}{openshift}{server}")), ["HN002"]);
}

#[test]
fn every_address_of_a_service_is_resolved() {
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: shop}\nspec: {type: LoadBalancer, clusterIP: 10.96.0.7, externalIPs: [192.0.2.7, '2001:db8::7'], loadBalancerIP: 203.0.113.8, selector: {app: db}, ports: [{port: 15432, targetPort: 5432}]}\nstatus: {loadBalancer: {ingress: [{ip: 203.0.113.7}, {hostname: db.example.com}]}}\n";
    let isolated = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: db, namespace: shop}\nspec: {podSelector: {matchLabels: {app: db}}}\n";
    let shop = Folder::new(&(SHOP.to_owned() + service + isolated));
    for address in ["10.96.0.7", "192.0.2.7", "2001:db8::7", "203.0.113.7", "203.0.113.8"] {
        let mut question = web_to_db();
        (question["to"], question["port"]) = (json!({"ip": address}), json!(15432));
        let answer = &shop.answers(&[question], &[])[0];
        assert_eq!(
            (&answer["verdict"], &answer["service"]["name"]),
            (&json!("deny"), &json!("c/shop/db")),
            "{answer:#}"
        );
        assert_eq!(answer["service"]["backends"][0]["port"], 5432);
    }
    let wrong = Folder::new(&(SHOP.to_owned() + &service.replace("192.0.2.7", "192.0.2")));
    assert!(all_of(&wrong.run("matrix", &[])).contains("spec.externalIPs[0]: "));
}

#[test]
fn lint_checks_policies_without_pods() {
    let policies = "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: p}\nspec:\n  order: 1\n  selector: app == 'a'\n  types: [Ingress]\n  ingress:\n  - {action: Allow, protocol: TCP, source: {selector: app == 'a' && app == 'b'}}\n  - {action: Allow, source: {selector: app == 'gone'}}\n";
    let folder = Folder::new(policies);
    let output = folder.run("lint", &["-o", "json"]);
    let found = lines(&output);
    let ids: Vec<&Value> = found.iter().map(|line| &line["id"]).collect();
    assert_eq!(ids, [&json!("HN003"), &Value::Null], "{found:#?}");
    assert_eq!(output.status.code(), Some(1), "an error was found");
    let last = &found[1];
    assert!(last["notRun"].as_array().is_some_and(|ids| ids.contains(&json!("HN002"))), "{last}");
    assert_eq!(last["clusters"], json!(["c"]));
    let output = folder.run("lint", &["--fail-on", "never"]);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(told.contains("not run for cluster c, without pods and workloads: HN001, HN002"), "{told}");
    let sarif: Value = serde_json::from_slice(&folder.run("lint", &["-o", "sarif"]).stdout).expect("JSON");
    let notification = &sarif["runs"][0]["invocations"][0]["toolExecutionNotifications"][0];
    assert_eq!(notification["level"], "note", "{sarif:#}");
    // Without a finding the exit code is that of no finding.
    let output = Folder::new(&policies.replace(" && app == 'b'", "")).run("lint", &[]);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && told.starts_with("nothing found\nnot run for cluster c"), "{output:?}");
    // Nothing is said of a cluster with pods.
    assert!(!all_of(&Folder::new(SHOP).run("lint", &[])).contains("not run"));
}

/// Runs a command whose standard output is closed, or is closed after its first line.
fn closed(arguments: &[&str], after_first_line: bool) -> Option<i32> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    if !after_first_line {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        return command.stdout(writer).status().expect("it starts").code();
    }
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut reader = BufReader::with_capacity(64, child.stdout.take().expect("piped"));
    reader.read_line(&mut String::new()).expect("a line");
    drop(reader);
    child.wait().expect("it ends").code()
}

#[test]
fn a_closed_standard_output_does_not_change_the_exit_code() {
    // More than a pipe keeps.
    let bad = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: A}\nspec: {more: 1}\n---\n";
    let wrong = Folder::new(&(SHOP.to_owned() + "---\n" + &bad.repeat(2_000)));
    let (wrong_folder, wrong_cluster) = (wrong.root.path().join("c").display().to_string(), wrong.cluster());
    let right = Folder::new(SHOP);
    let (right_folder, right_cluster) = (right.root.path().join("c").display().to_string(), right.cluster());
    let wider = Folder::new(&SHOP.replace("10.0.0.0/8", "0.0.0.0/0")).root.keep();
    let wider = format!("c={}", wider.join("c").display());
    let questions = vec![json!({"from": {"ip": "192.0.2.1"}, "to": {"ip": "192.0.2.2"}, "port": 80}); 2_000];
    let about_nothing = right.queries(&questions);
    let admin = "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\nmetadata: {name: aX}\nspec: {priority: 7, subject: {namespaces: {}}}\n---\n";
    let good: String = (0..3_000).map(|number| admin.replace("aX", &format!("a{number}"))).collect();
    let admins = Folder::new(&(good.clone() + &admin.replace("priority: 7", "priority: x")));
    let goods = Folder::new(&good);
    let [admins, goods] = [&admins, &goods].map(|it| it.root.path().join("c").display().to_string());
    for (arguments, code) in [
        (&["check", &*wrong_folder][..], 1),
        (&["check", &right_folder], 0),
        (&["lint", "--cluster", &wrong_cluster], 1),
        (&["lint", "--cluster", &right_cluster, "--fail-on", "note"], 1),
        (&["lint", "--cluster", &right_cluster, "--fail-on", "note", "-o", "json"], 1),
        (&["lint", "--cluster", &right_cluster, "--fail-on", "never", "-o", "sarif"], 0),
        (&["convert", &admins], 1),
        (&["convert", &goods], 0),
        (&["order", "--cluster", &wrong_cluster], 1),
        (&["matrix", "--cluster", &wrong_cluster, "--port", "80"], 1),
        (&["matrix", "--cluster", &right_cluster, "--port", "80"], 0),
        (&["diff", "--cluster", &right_cluster, "--with", &wider, "--exit-code"], 1),
        (&["diff", "--cluster", &right_cluster, "--with", &wider, "--exit-code", "-o", "json"], 1),
        (&["diff", "--cluster", &right_cluster, "--with", &wider, "-o", "json"], 0),
        (&["explain", "--cluster", &right_cluster, "--queries", &about_nothing, "-o", "json"], 1),
        (&["explain", "--cluster", &right_cluster, "--queries", &about_nothing], 1),
    ] {
        let arguments = [&["policy"], arguments].concat();
        for after_first_line in [false, true] {
            assert_eq!(closed(&arguments, after_first_line), Some(code), "{arguments:?} {after_first_line}");
        }
    }
}

#[test]
fn diff_names_what_is_in_one_state_only_and_ends_with_a_summary() {
    let before = Folder::new(SHOP);
    let renamed = Folder::new(&SHOP.replacen("name: db", "name: database", 1));
    let broken = Folder::new(
        &(SHOP.to_owned()
            + "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: x}\nspec: {more: 1}\n"),
    );
    let output = before.run("diff", &["--with", &renamed.cluster(), "-o", "json"]);
    let summary = lines(&output).pop().expect("a line");
    let expected = json!({"summary": {
        "opened": 0, "closed": 0, "incomplete": false,
        "onlyBefore": ["c/shop/deployment/db"], "onlyAfter": ["c/shop/deployment/database"],
    }});
    assert_eq!((summary, output.status.code()), (expected, Some(0)), "{output:?}");
    let said = all_of(&before.run("diff", &["--with", &renamed.cluster()]));
    assert!(said.contains("1 pod or workload in the first state only, not compared: c/shop/deployment/db"), "{said}");
    assert!(said.contains("in the second state only, not compared: c/shop/deployment/database"), "{said}");
    let output = before.run("diff", &["--with", &broken.cluster(), "-o", "json"]);
    let summary = lines(&output).pop().expect("a line");
    assert_eq!((&summary["summary"]["incomplete"], output.status.code()), (&json!(true), Some(1)), "{output:?}");
    let other = Folder::new(&SHOP.replace("shop", "other"));
    let said = all_of(&before.run("diff", &["--with", &other.cluster()]));
    assert!(said.contains("nothing was compared: the first has c/shop/deployment/db"), "{said}");
}

#[test]
fn every_policy_without_a_tier_is_a_warning() {
    let local = |name: &str| {
        format!(
            "---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {{name: ghost.{name}}}\nspec: {{tier: ghost, selector: app == 'web', types: [Ingress]}}\n"
        )
    };
    let federated = |name: &str| {
        format!(
            "---\napiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {{name: {name}}}\nspec: {{tier: gone, types: [Ingress]}}\n"
        )
    };
    let shop = Folder::new(&(SHOP.to_owned() + &local("a") + &local("b")));
    let federation = shop.root.path().join("f.yaml");
    std::fs::write(&federation, federated("first") + &federated("second")).expect("manifests");
    let arguments = ["--federation", &federation.display().to_string(), "-o", "json"];
    let output = shop.run("lint", &[&arguments[..], &["--fail-on", "warning"]].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let found = lines(&output);
    let found: Vec<_> = found.iter().filter(|line| line["id"] == "HN010").collect();
    let policies: Vec<&str> = found.iter().filter_map(|line| line["policy"].as_str()).collect();
    let expected = [
        "FederatedNetworkPolicy first",
        "FederatedNetworkPolicy second",
        "GlobalNetworkPolicy ghost.a",
        "GlobalNetworkPolicy ghost.b",
    ];
    assert_eq!(policies, expected, "{found:#?}");
    assert!(found.iter().all(|line| line["severity"] == "warning"), "{found:#?}");
    assert!(
        found[0]["message"].as_str().is_some_and(|text| text.contains("\"gone\"") && text.contains("not in force"))
    );
    assert!(
        found[1]["file"].as_str().is_some_and(|file| file.ends_with("f.yaml")) && found[1]["line"] == 7,
        "{found:#?}"
    );
}

#[test]
fn query_without_a_known_endpoint_is_reported() {
    let shop = Folder::new(SHOP);
    let outside = || json!({"ip": "192.0.2.1"});
    let nothing = json!({"from": outside(), "to": {"ip": "198.51.100.1"}, "port": 80});
    let known = json!({"from": outside(), "to": {"namespace": "shop", "pod": "deployment/db"}, "port": 5432});
    let queries = shop.queries(std::slice::from_ref(&nothing));
    let output = shop.run("explain", &["--queries", &queries, "-o", "json"]);
    assert_eq!((output.status.code(), &lines(&output)[0]["neitherEndKnown"]), (Some(1), &json!(true)), "{output:?}");
    let output = shop.run("explain", &["--queries", &queries]);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        told.contains("allow [1]") && told.contains("[1] neither end is a known endpoint: no policy applies"),
        "{told}"
    );
    let queries = shop.queries(&[known, nothing]);
    let output = shop.run("explain", &["--queries", &queries, "-o", "json"]);
    let answers = lines(&output);
    assert_eq!(output.status.code(), Some(0), "one of them is about something: {output:?}");
    assert_eq!((&answers[0]["neitherEndKnown"], &answers[1]["neitherEndKnown"]), (&Value::Null, &json!(true)));
}

#[test]
fn depends_lists_the_rules_that_decide() {
    let shop = Folder::new(SHOP);
    let answer = &shop.answers(&[web_to_db()], &[])[0];
    let egress = &answer["egress"];
    assert_eq!(egress["verdict"], "depends", "{answer:#}");
    let decided: Vec<_> = egress["decidedBy"].as_array().expect("a list").iter().collect();
    assert_eq!(decided.len(), 2, "{egress:#}");
    assert!(decided.iter().all(|step| step["policy"]["name"] == "web"), "{egress:#}");
    assert!(decided.iter().any(|step| step["rule"] == 0) && decided.iter().any(|step| step["endOfTier"] == true));
    assert_eq!(answer["ingress"].get("decidedBy"), None);
    let queries = shop.queries(&[web_to_db()]);
    let reasons = [
        "deny: end of tier default after NetworkPolicy shop/web",
        "allow: NetworkPolicy shop/web rule 0 in tier default",
    ];
    let table = all_of(&shop.run("explain", &["--queries", &queries]));
    assert!(table.contains(&format!("depends: {}", reasons.join("; or "))), "{table}");
    let matrix = lines(&shop.run("matrix", &["-o", "json", "--from", "app == 'web'", "--to", "app == 'db'"]));
    assert_eq!(matrix[0]["decidedBy"], json!(reasons), "{matrix:#?}");
    let table = all_of(&shop.run("matrix", &["--from", "app == 'web'", "--to", "app == 'db'"]));
    assert!(table.contains(&format!("({})", reasons.join("; or "))), "{table}");
}

#[test]
fn fields_of_calico_enterprise_are_named_as_such_and_open_nothing() {
    let policy = |kind: &str, spec: &str| {
        let metadata = if kind.contains("Global") { "{name: p}" } else { "{name: p, namespace: shop}" };
        format!("---\napiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n")
    };
    let rule =
        "{selector: app == 'db', types: [Egress], egress: [{action: Allow, destination: {domains: [a.example.com]}}]}";
    for (object, field) in [
        (policy("NetworkPolicy", rule), "spec.egress[0].destination.domains"),
        (policy("GlobalNetworkPolicy", rule), "spec.egress[0].destination.domains"),
        (policy("StagedGlobalNetworkPolicy", rule), "spec.egress[0].destination.domains"),
        (policy("GlobalNetworkPolicy", "{selector: all(), packetCapture: {}}"), "spec.packetCapture"),
        (
            policy("GlobalNetworkSet", "{nets: [10.0.0.0/8], allowedEgressDomains: [a.example.com]}"),
            "spec.allowedEgressDomains",
        ),
        (policy("NetworkSet", "{allowedEgressDomains: [a.example.com]}"), "spec.allowedEgressDomains"),
    ] {
        let output = hanse(&["policy", "check", "-"], &object);
        let said = all_of(&output);
        assert!(said.contains(&format!("{field}: a field of Calico Enterprise, `")), "{said}");
        assert!(!said.contains("did you mean") && output.status.code() == Some(1), "{said}");
    }
    // What it would allow is closed, and what else the policy closes too.
    let shop = Folder::new(&(SHOP.to_owned() + &policy("GlobalNetworkPolicy", rule)));
    let question =
        json!({"from": {"namespace": "shop", "pod": "deployment/db"}, "to": {"ip": "192.0.2.1"}, "port": 443});
    let answer = &shop.answers(&[question], &[])[0];
    assert_eq!((&answer["verdict"], &answer["incomplete"]), (&json!("deny"), &json!(true)), "{answer:#}");
}

#[test]
fn errors_contain_no_terms_of_libraries() {
    let policy = |spec: &str| {
        format!("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p}}\nspec: {spec}\n")
    };
    let service =
        |port: &str| format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s}}\nspec: {{ports: [{port}]}}\n");
    let pod = |port: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: s}}\nspec: {{containers: [{{name: c, ports: [{{containerPort: {port}}}]}}]}}\n"
        )
    };
    for (content, expected) in [
        (policy("{}") + &policy("{}"), "a line `---` is missing between them"),
        (service("{port: 70000}"), "spec.ports[0].port: 70000 is not a port (1–65535)"),
        (service("{port: -1}"), "spec.ports[0].port: -1 is not a port (1–65535)"),
        (service("{port: web}"), "spec.ports[0].port: \"web\" is not a port (1–65535)"),
        (
            service("{port: 1, targetPort: 70000}"),
            "spec.ports[0].targetPort: is neither a port (1–65535) nor a port's name",
        ),
        (pod("70000"), "spec.containers[0].ports[0].containerPort: 70000 is not a port (1–65535)"),
        (
            policy("{ingress: [{ports: [{port: 70000}]}]}"),
            "spec.ingress[0].ports[0].port: 70000 is not a port (1–65535)",
        ),
        (policy("{ingress: {}}"), "spec.ingress: a mapping, where a list is expected"),
        (policy("{ingress: [{from: 3}]}"), "spec.ingress[0].from: 3, where a list is expected"),
        (policy("{podSelector: [a]}"), "spec.podSelector: a list, where a mapping is expected"),
        (
            policy("{podSelector: {matchLabels: {a: true}}}"),
            "spec.podSelector.matchLabels.a: true, where text is expected; text needs quotes",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {hostNetwork: 3}\n".to_owned(),
            "spec.hostNetwork: 3, where true or false is expected",
        ),
    ] {
        let said = all_of(&hanse(&["policy", "check", "-"], &content));
        assert!(said.contains(expected), "{expected}\n{said}");
        for word in ["u16", "invalid type", "invalid value", "sequence", "untagged", "struct"] {
            assert!(!said.contains(word), "{word}: {said}");
        }
    }
    let shop = Folder::new(SHOP);
    let ends = json!({"from": {"ip": "10.0.0.1"}, "to": {"ip": "10.0.0.2"}});
    for (field, value, expected) in [
        ("port", json!(70000), ": port: 70000 is not a port (1–65535)"),
        ("sourcePort", json!("a"), ": sourcePort: \"a\" is not a port (1–65535)"),
        ("ipVersion", json!(300), ": ipVersion: 300, where a whole number from 0 to 255 is expected"),
        ("icmp", json!(3), ": icmp: 3, where a mapping is expected"),
        ("prt", json!(3), "unknown field `prt`; did you mean `port`?"),
    ] {
        let mut question = ends.clone();
        question[field] = value;
        let answer = &shop.answers(&[question], &[])[0];
        assert!(answer["error"].as_str().is_some_and(|error| error.contains(expected)), "{expected}: {answer}");
    }
    let answer = &shop.answers(&[json!({"from": {"ip": "10.0.0.1"}})], &[])[0];
    assert!(answer["error"].as_str().is_some_and(|error| error.ends_with("to: is missing")), "{answer}");
    let admin = |spec: &str| {
        format!(
            "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\nmetadata: {{name: a}}\nspec: {spec}\n"
        )
    };
    for (spec, expected) in [
        (
            "{priority: x, subject: {namespaces: {}}}",
            "malformed: spec.priority: \"x\", where a whole number is expected",
        ),
        ("{priority: 1, subject: {namespaces: {}}, ingres: []}", "malformed: spec.ingres: unknown field"),
        (
            "{priority: 1, subject: {namespaces: {}}, ingress: [{action: Drop, from: [{namespaces: {}}]}]}",
            "malformed: spec.ingress[0].action",
        ),
        (
            "{priority: 1, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {sameLabels: [a]}}]}]}",
            "no equivalent: spec.ingress[0].from[0].namespaces.sameLabels",
        ),
    ] {
        let said = all_of(&hanse(&["policy", "convert", "-"], &admin(spec)));
        assert!(said.contains(expected), "{expected}\n{said}");
    }
}

/// Rows come while the queries go on, in columns that stay.
#[test]
fn a_table_of_endless_queries_is_printed_in_blocks() {
    let shop = Folder::new(SHOP);
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(["policy", "explain", "--cluster", &shop.cluster(), "--queries", "-"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("hanse runs");
    let mut input = child.stdin.take().expect("piped");
    let (sender, received) = mpsc::channel();
    let output = BufReader::new(child.stdout.take().expect("piped"));
    let reader =
        std::thread::spawn(move || output.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line))));
    let next = || received.recv_timeout(Duration::from_secs(60)).expect("a line, before the queries end");
    let query = web_to_db().to_string() + "\n";
    input.write_all(query.repeat(600).as_bytes()).expect("it reads");
    let heading = next();
    let column = heading.find("VERDICT").expect("a column");
    let mut last_note = 0;
    for (block, rows) in [(0, 500), (500, 500)] {
        if block > 0 {
            input.write_all(query.repeat(500).as_bytes()).expect("it reads");
        }
        for number in 0..rows {
            let row = next();
            assert!(row[column..].starts_with(&format!("depends [{}]", block + number + 1)), "{heading}\n{row}");
        }
        for _ in 0..rows {
            last_note += 1;
            assert!(next().starts_with(&format!("[{last_note}] depends on the address")));
        }
    }
    drop(input);
    assert!(next()[column..].starts_with("depends [1001]"));
    assert!(child.wait().expect("it ends").success());
    reader.join().expect("it ends");
}

#[test]
fn objects_without_a_namespace_are_in_the_one_that_is_named() {
    let content = SHOP.replace(", namespace: shop", "")
        + "---\napiVersion: v1\nkind: Service\nmetadata: {name: db}\nspec: {selector: {app: db}, ports: [{port: 5432}]}\n---\n\
           apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: c}\nspec: {selector: app == 'db', types: [Ingress]}\n---\n\
           apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: g}\nspec: {order: 1, selector: all()}\n---\n\
           apiVersion: v1\nkind: Pod\nmetadata: {name: other, namespace: own}\nstatus: {phase: Running, podIP: 10.0.0.1}\n";
    let folder = Folder::new(&content);
    let mut question = web_to_db();
    question["to"] = json!({"service": "shop/db"});
    let answer = &folder.answers(&[question], &["-n", "shop"])[0];
    assert_eq!((&answer["verdict"], &answer["service"]["name"]), (&json!("deny"), &json!("c/shop/db")), "{answer:#}");
    let places = |arguments: &[&str]| -> Vec<String> {
        let lines = lines(&folder.run("matrix", &[&["--port", "80", "-o", "json"], arguments].concat()));
        let mut all: Vec<String> = lines
            .iter()
            .map(|line| format!("{}/{}", line["to"]["namespace"], line["to"]["pod"]).replace('"', ""))
            .collect();
        all.sort();
        all.dedup();
        all
    };
    assert_eq!(places(&["--namespace", "shop"]), ["own/other", "shop/deployment/db", "shop/deployment/web"]);
    assert_eq!(places(&[]), ["default/deployment/db", "default/deployment/web", "own/other"]);
    for command in [&["lint", "-o", "json"][..], &["order", "-o", "json"], &["diff", "--staged", "-o", "json"]] {
        let output = folder.run(command[0], &[&command[1..], &["--namespace", "shop"]].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.code().is_some_and(|code| code < 2) && !text.contains("default/"), "{output:?}");
    }
    let output = hanse(&["policy", "check", "-o", "json", "--namespace", "shop", "-"], &content);
    let namespaces: Vec<Value> = lines(&output).into_iter().map(|mut line| line["namespace"].take()).collect();
    let expected = ["shop", "shop", "shop", "shop", "shop", "", "own"]
        .map(|it| if it.is_empty() { Value::Null } else { json!(it) });
    assert_eq!(namespaces, expected, "{output:?}");
    let output = hanse(&["policy", "check", "--namespace", "Shop", "-"], &content);
    assert!(output.status.code() == Some(2) && all_of(&output).contains("a namespace has at most 63"), "{output:?}");
    // A line of the manifests is still found by the object's name.
    let order = lines(&folder.run("order", &["-n", "shop", "-o", "json"]));
    let policies = order.iter().flat_map(|tier| tier["policies"].as_array().into_iter().flatten());
    assert!(policies.clone().count() == 3 && policies.into_iter().all(|policy| policy["line"].is_u64()), "{order:#?}");
}
