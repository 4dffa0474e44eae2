//! A repository that was never deployed: workloads without pods.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

/// Deployments, a job, services and policies; no pod, no namespace, no address.
const SHOP: &str = "\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop}
spec:
  replicas: 0
  template:
    metadata: {labels: {app: db}}
    spec: {serviceAccountName: db, containers: [{name: c, ports: [{name: sql, containerPort: 5432}]}]}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: report, namespace: shop}
spec: {suspend: true, jobTemplate: {spec: {template: {metadata: {labels: {app: report}}, spec: {}}}}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: node, namespace: kube-system}
spec: {template: {metadata: {labels: {app: node}}, spec: {hostNetwork: true}}}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.7, selector: {app: db}, ports: [{name: sql, port: 15432, targetPort: sql}]}
---
apiVersion: v1
kind: Service
metadata: {name: all, namespace: shop}
spec: {selector: {tier: none}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: peers, namespace: shop}
spec: {clusterIP: None, selector: {app: web}}
---
apiVersion: v1
kind: Service
metadata: {name: out, namespace: shop}
spec: {type: ExternalName, externalName: db.example.com}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: sql}]
  - from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ops}}}]
  egress:
  - to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.9.0.0/16]}}]
";

struct Folder {
    root: tempfile::TempDir,
    cluster: String,
}

/// A file of queries, one a line.
pub fn write_queries(folder: &Path, questions: &[Value]) -> String {
    let file = folder.join("queries.jsonl");
    let lines: Vec<String> = questions.iter().map(Value::to_string).collect();
    std::fs::write(&file, lines.join("\n")).expect("queries");
    file.display().to_string()
}

impl Folder {
    fn new(text: &str) -> Self {
        let root = tempfile::tempdir().expect("temporary directory");
        std::fs::create_dir(root.path().join("c")).expect("directory");
        std::fs::write(root.path().join("c/all.yaml"), text).expect("manifests");
        let cluster = format!("c={}", root.path().join("c").display());
        Self { root, cluster }
    }

    fn hanse(&self, command: &str, arguments: &[&str]) -> Output {
        let mut it = Command::new(env!("CARGO_BIN_EXE_hanse"));
        it.args(["policy", command, "--cluster", &self.cluster]).args(arguments);
        it.output().expect("hanse runs")
    }

    fn lines(&self, command: &str, arguments: &[&str]) -> Vec<Value> {
        let output = self.hanse(command, &[arguments, &["-o", "json"]].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
    }

    fn queries(&self, questions: &[Value]) -> String {
        write_queries(self.root.path(), questions)
    }

    fn answers(&self, questions: &[Value], arguments: &[&str]) -> Vec<Value> {
        let file = self.queries(questions);
        let mut answers = self.lines("explain", &[&["--queries", &file], arguments].concat());
        let reference = self.lines("explain", &[&["--queries", &file, "--reference"], arguments].concat());
        assert_eq!(answers.len(), questions.len());
        for (answer, mut by_reference) in answers.iter_mut().zip(reference) {
            without_form(answer);
            without_form(&mut by_reference);
            assert_eq!(*answer, by_reference, "the reference evaluator agrees");
        }
        answers
    }
}

fn without_form(value: &mut Value) {
    if let Some(object) = value.as_object_mut() {
        object.remove("form");
        object.values_mut().for_each(without_form);
    } else if let Some(list) = value.as_array_mut() {
        list.iter_mut().for_each(without_form);
    }
}

fn workload(name: &str) -> Value {
    json!({"cluster": "c", "namespace": "shop", "pod": name})
}

fn ask(from: Value, to: Value, port: u16) -> Value {
    json!({"from": from, "to": to, "port": port})
}

fn text(output: &Output) -> String {
    [&*output.stdout, &*output.stderr].map(String::from_utf8_lossy).concat()
}

#[test]
fn workloads_are_explained_by_kind_and_name() {
    let shop = Folder::new(SHOP);
    let (web, db) = (|| workload("deployment/web"), || workload("statefulset/db"));
    let outside = || json!({"ip": "203.0.113.1"});
    let cases = [
        (ask(web(), db(), 5432), "allow", None),
        (ask(web(), db(), 5433), "deny", None),
        (ask(workload("cronjob/report"), db(), 5432), "deny", None),
        (ask(outside(), db(), 5432), "deny", None),
        (ask(outside(), web(), 8080), "allow", None),
        // What a rule says by nets depends on the address.
        (
            ask(db(), web(), 8080),
            "depends",
            Some("deny, but allow if the destination's address is in 10.0.0.0/8 (without 10.9.0.0/16)"),
        ),
        (ask(db(), json!({"ip": "10.1.0.1"}), 8080), "allow", None),
        (ask(db(), json!({"ip": "10.9.0.1"}), 8080), "deny", None),
        // Over the other family nothing does.
        (json!({"from": db(), "to": web(), "port": 8080, "ipVersion": 6}), "deny", None),
        // Two pods of one workload.
        (ask(web(), web(), 8080), "allow", None),
        (ask(db(), db(), 5432), "deny", None),
    ];
    let questions: Vec<Value> = cases.iter().map(|(question, ..)| question.clone()).collect();
    let answers = shop.answers(&questions, &[]);
    for ((question, verdict, on), answer) in cases.iter().zip(&answers) {
        assert_eq!(answer["verdict"], *verdict, "{question}\n{answer:#}");
        let told = answer["dependsOn"].as_str().map(|told| told.trim_start_matches("the address: "));
        assert_eq!(told, *on, "{question}\n{answer:#}");
    }
    assert_eq!(answers[0]["notRunning"], json!(["c/shop/deployment/web", "c/shop/statefulset/db (replicas: 0)"]));
    assert_eq!(answers[2]["notRunning"][0], "c/shop/cronjob/report (suspended)");
    assert_eq!(
        (&answers[5]["egress"]["verdict"], &answers[5]["ingress"]["verdict"]),
        (&json!("depends"), &json!("allow"))
    );
    // Where pods get their addresses in some nets only, nothing is left to depend on.
    let question = ask(db(), web(), 8080);
    for (nets, verdict) in [("10.244.0.0/16", "allow"), ("10.9.4.0/22,fd00::/64", "deny"), ("10.8.0.0/15", "depends")] {
        let answers = shop.answers(std::slice::from_ref(&question), &["--pod-net", nets]);
        assert_eq!(answers[0]["verdict"], verdict, "{nets}: {answers:#?}");
    }
    let file = shop.queries(&questions);
    let table = text(&shop.hanse("explain", &["--queries", &file]));
    assert!(table.contains("c/shop/deployment/web (not running)"), "{table}");
    assert!(table.contains("c/shop/statefulset/db (not running, replicas: 0)"), "{table}");
    assert!(table.contains("[1] depends on the address: deny, but allow if"), "{table}");
}

#[test]
fn query_for_an_unknown_workload_suggests_a_name() {
    let shop = Folder::new(SHOP);
    let host = json!({"cluster": "c", "namespace": "kube-system", "pod": "daemonset/node"});
    let answers = shop.answers(
        &[ask(workload("web"), workload("statefulset/db"), 5432), ask(host, workload("statefulset/db"), 5432)],
        &[],
    );
    assert_eq!(answers[0]["error"], "no pod shop/web in cluster c; did you mean deployment/web?");
    assert!(answers[1]["error"].as_str().is_some_and(|error| error.contains("host-network pod")), "{answers:#?}");
}

#[test]
fn a_question_to_a_service_is_answered_for_its_backends() {
    let shop = Folder::new(SHOP);
    let web = || workload("deployment/web");
    let service = |name: &str| json!({"service": format!("shop/{name}")});
    let answers = shop.answers(
        &[
            ask(web(), service("db"), 15432),
            ask(web(), json!({"ip": "10.96.0.7"}), 15432),
            ask(web(), json!({"cluster": "c", "namespace": "shop", "service": "peers"}), 8080),
            ask(web(), service("db"), 5432),
            ask(web(), service("all"), 80),
            ask(web(), service("out"), 80),
            ask(web(), service("gone"), 80),
            ask(service("db"), web(), 80),
            ask(web(), json!({"service": "db"}), 80),
        ],
        &[],
    );
    for answer in &answers[..2] {
        assert_eq!(answer["verdict"], "allow", "{answer:#}");
        let service = &answer["service"];
        assert_eq!((&service["name"], service["backends"].as_array().map(Vec::len)), (&json!("c/shop/db"), Some(1)));
        assert_eq!(service["backends"][0]["to"]["pod"], "statefulset/db");
        assert_eq!(
            (&service["backends"][0]["port"], &service["backends"][0]["answer"]["verdict"]),
            (&json!(5432), &json!("allow"))
        );
    }
    assert_eq!(
        (&answers[2]["service"]["headless"], &answers[2]["service"]["backends"][0]["port"]),
        (&json!(true), &json!(8080))
    );
    for (answer, expected) in answers[3..].iter().zip([
        "c/shop/db is a Service without port 5432/TCP; it has 15432/TCP (sql)",
        "c/shop/all is a Service without backends: its selector selects no pod",
        "c/shop/out is a Service of type ExternalName: its name is db.example.com",
        "no Service shop/gone in cluster c",
        "shop/db is a Service, which can be queried only with --cluster",
        "a Service is named by its namespace",
    ]) {
        assert!(answer["error"].as_str().is_some_and(|error| error.contains(expected)), "{expected}: {answer}");
    }
}

/// One backend of two is allowed.
#[test]
fn a_service_whose_backends_differ_depends_on_the_backend() {
    let text = SHOP.replace("selector: {tier: none}, ports: [{port: 80}]", "ports: [{port: 80}]")
        + "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: all-1, namespace: shop, labels: {kubernetes.io/service-name: all}}\naddressType: IPv4\nendpoints: [{addresses: [10.1.0.1]}, {addresses: [10.9.0.1]}]\nports: [{port: 80}]\n";
    let shop = Folder::new(&text);
    let question = ask(workload("statefulset/db"), json!({"service": "shop/all"}), 80);
    let answers = shop.answers(std::slice::from_ref(&question), &[]);
    assert_eq!(answers[0]["verdict"], "depends", "{answers:#?}");
    assert_eq!(answers[0]["dependsOn"], "the backend: 10.1.0.1:80 allow, 10.9.0.1:80 deny");
    let file = shop.queries(&[question]);
    let table = text_of_table(&shop, &file);
    assert!(table.contains("service c/shop/all") && table.contains("  10.9.0.1, port 80"), "{table}");
}

/// Packets to a Service go to ready endpoints, or else to those that end and still serve.
#[test]
fn a_service_is_answered_for_endpoints_that_get_its_packets() {
    let (ready, not_ready) = ("", ", conditions: {ready: false, serving: false, terminating: false}");
    let (ending, ended) = (
        ", conditions: {ready: false, serving: true, terminating: true}",
        ", conditions: {ready: false, serving: false, terminating: true}",
    );
    let cases = [
        ([ready, ready], &["10.1.0.1", "10.9.0.1"][..]),
        ([ready, not_ready], &["10.1.0.1"]),
        ([ready, ending], &["10.1.0.1"]),
        ([not_ready, ending], &["10.9.0.1"]),
        ([not_ready, ended], &[]),
    ];
    for (conditions, expected) in cases {
        let endpoints =
            format!("{{addresses: [10.1.0.1]{}}}, {{addresses: [10.9.0.1]{}}}", conditions[0], conditions[1]);
        let text = SHOP.replace("selector: {tier: none}, ports: [{port: 80}]", "ports: [{port: 80}]")
            + &format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: all-1, namespace: shop, labels: \
                 {{kubernetes.io/service-name: all}}}}\naddressType: IPv4\nendpoints: [{endpoints}]\nports: [{{port: 80}}]\n"
            );
        let question = ask(workload("statefulset/db"), json!({"service": "shop/all"}), 80);
        let answer = &Folder::new(&text).answers(&[question], &[])[0];
        let backends = answer["service"]["backends"].as_array().cloned().unwrap_or_default();
        let addresses: Vec<&str> = backends.iter().filter_map(|backend| backend["to"]["ip"].as_str()).collect();
        assert_eq!(addresses, expected, "{endpoints}\n{answer:#}");
        assert_eq!(answer.get("error").is_some(), expected.is_empty(), "{answer:#}");
    }
}

fn text_of_table(folder: &Folder, queries: &str) -> String {
    text(&folder.hanse("explain", &["--queries", queries]))
}

/// A Calico rule by service matches the workloads behind it, and its ports.
#[test]
fn rules_by_service_match_workloads() {
    let policy = "---\napiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: web, namespace: shop}\nspec: {selector: app == 'web', types: [Egress], egress: [{action: Allow, destination: {services: {name: db, namespace: shop}}}]}\n";
    let shop = Folder::new(&format!("{SHOP}{policy}"));
    let to = |name: &str, port| ask(workload("deployment/web"), workload(name), port);
    let answers =
        shop.answers(&[to("statefulset/db", 5432), to("statefulset/db", 22), to("cronjob/report", 5432)], &[]);
    let verdicts: Vec<&str> = answers.iter().filter_map(|answer| answer["egress"]["verdict"].as_str()).collect();
    assert_eq!(verdicts, ["allow", "deny", "deny"]);
}

#[test]
fn a_matrix_without_ports_takes_those_that_are_declared() {
    let shop = Folder::new(SHOP);
    let lines = shop.lines("matrix", &[]);
    let verdict = |from: &str, to: &str| -> Vec<(u64, String)> {
        let of_pair = lines.iter().filter(|line| line["from"]["pod"] == from && line["to"]["pod"] == to);
        let cell = |line: &Value| Some((line["port"].as_u64()?, line["verdict"].as_str()?.to_owned()));
        of_pair.filter_map(cell).collect()
    };
    assert_eq!(verdict("deployment/web", "statefulset/db"), [(5432, "allow".to_owned())]);
    assert_eq!(verdict("cronjob/report", "statefulset/db"), [(5432, "deny".to_owned())]);
    assert_eq!(verdict("statefulset/db", "deployment/web"), [(8080, "depends".to_owned())]);
    assert_eq!(verdict("deployment/web", "cronjob/report"), []);
    assert!(lines.iter().all(|line| line["from"]["pod"] != "daemonset/node"), "on the host's network: {lines:#?}");
    let one = lines.iter().find(|line| line["verdict"] == "depends").expect("one");
    assert!(one["dependsOn"].as_str().is_some_and(|on| on.contains("10.0.0.0/8")), "{one}");
    assert_eq!(one["notRunning"], json!(["from", "to"]));
    let table = shop.hanse("matrix", &[]);
    let told = text(&table);
    assert!(
        table.status.success() && told.contains("declared ports   + allow   . deny   ? depends on an address"),
        "{told}"
    );
    assert!(told.contains("c/shop/statefulset/db (not running, replicas: 0) 5432/TCP"), "{told}");
    assert!(told.contains("1 destination without a declared container port omitted"), "{told}");
    // With --port all are asked.
    let lines = shop.lines("matrix", &["--port", "80"]);
    assert_eq!(lines.len(), 9, "{lines:#?}");
    let none =
        Folder::new("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec: {template: {spec: {}}}\n");
    let output = none.hanse("matrix", &[]);
    assert!(!output.status.success() && text(&output).contains("use --port"), "{output:?}");
}

#[test]
fn lint_and_order_answer_for_workloads() {
    let shop = Folder::new(SHOP);
    let findings = shop.lines("lint", &[]);
    let of = |id: &str| findings.iter().filter(|it| it["id"] == id).collect::<Vec<_>>();
    assert!(of("HN001").is_empty(), "its subject is a workload: {findings:#?}");
    let peers = of("HN002");
    assert_eq!(peers.len(), 1, "{findings:#?}");
    assert_eq!(peers[0]["rule"], "ingress[1]");
    let open: Vec<&str> = of("HN005").iter().filter_map(|it| it["message"].as_str()).collect();
    assert!(open.len() == 1 && open[0].contains("2 of 3 workloads"), "{open:?}");
    assert_eq!(shop.lines("order", &[])[0]["policies"][0]["name"], "db");
}

#[test]
fn diff_compares_workloads() {
    let (before, after) = (Folder::new(SHOP), Folder::new(&SHOP.replace("[{port: sql}]", "[{port: 9}]")));
    let with = ["--with", &*after.cluster, "--port", "5432,9"];
    let mut lines = before.lines("diff", &with);
    let summary = lines.pop().expect("a last line");
    let expected = json!({"opened": 1, "closed": 1, "incomplete": false, "onlyBefore": [], "onlyAfter": []});
    assert_eq!(summary["summary"], expected);
    let told: Vec<_> = lines
        .iter()
        .map(|line| {
            (
                line["from"]["pods"][0].clone(),
                line["to"]["pods"][0].clone(),
                line["ipVersion"].clone(),
                line["after"].clone(),
            )
        })
        .collect();
    let pair =
        |version: u8, after: &str| (json!("deployment/web"), json!("statefulset/db"), json!(version), json!(after));
    assert_eq!(told, [pair(4, "deny"), pair(4, "allow"), pair(6, "deny"), pair(6, "allow")], "{lines:#?}");
    assert!(lines.iter().all(|line| line.get("condition").is_none()), "{lines:#?}");
    // What changes for some addresses only says for which.
    let wider = Folder::new(&SHOP.replace("except: [10.9.0.0/16]", "except: []"));
    let lines = before.lines("diff", &["--with", &wider.cluster, "--port", "8080"]);
    let to_web = lines.iter().find(|line| line["to"]["pods"][0] == "deployment/web").expect("a change");
    assert_eq!(to_web["condition"], "the destination's address is in 10.9.0.0/16", "{lines:#?}");
    let table = text(&before.hanse("diff", &["--with", &wider.cluster, "--port", "8080"]));
    assert!(
        table.contains("c/shop/deployment/web (not running)") && table.contains("TCP 8080, if the destination's"),
        "{table}"
    );
}

#[test]
fn check_accepts_workloads_and_refuses_malformed_ones() {
    let shop = Folder::new(SHOP);
    let directory = |folder: &Folder| folder.root.path().join("c").display().to_string();
    let check = |folder: &Folder| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
        command.args(["policy", "check", &directory(folder)]).output().expect("hanse runs")
    };
    let output = check(&shop);
    assert!(output.status.success() && text(&output).contains("9 accepted, 0 refused, 0 skipped"), "{output:?}");
    let wrong = Folder::new(&SHOP.replace("containerPort: 8080", "containerPort: http"));
    let output = check(&wrong);
    let field = "all.yaml:8: Deployment shop/web: spec.template.spec.containers[0].ports[0].containerPort: ";
    assert!(!output.status.success() && text(&output).contains(field), "{output:?}");
    let file = Path::new(&directory(&wrong)).join("queries.jsonl");
    std::fs::write(&file, "").expect("queries");
    assert!(!wrong.hanse("explain", &["--queries", &file.display().to_string()]).status.success());
}

/// Labels that controllers set when pods run open nothing before, whether they are required, excluded or of the policy's own
/// pods; and the answer names them.
#[test]
fn labels_set_at_run_time_are_unknown() {
    let exists = |key: &str| format!("{{matchExpressions: [{{key: {key}, operator: Exists}}]}}");
    let absent = |key: &str| format!("{{matchExpressions: [{{key: {key}, operator: DoesNotExist}}]}}");
    let kubernetes = |subject: &str, peer: &str| {
        format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {{podSelector: {subject}, policyTypes: [Ingress], ingress: [{{from: [{{podSelector: {peer}}}]}}]}}\n"
        )
    };
    let calico = |rule: &str| {
        format!(
            "---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {{name: p}}\nspec: {{selector: app == 'web', types: [Ingress], ingress: [{rule}, {{action: Allow}}]}}\n"
        )
    };
    let closed = kubernetes("{}", &exists("none")).replace("name: p,", "name: closed,");
    let (web, report) = ("c/shop/deployment/web", "c/shop/cronjob/report (suspended)");
    let hash = "c/shop/deployment/web (value of label pod-template-hash unknown)";
    let job = "c/shop/cronjob/report (suspended, value of label job-name unknown)";
    // Only indexed jobs set it.
    const INDEX: &str = "batch.kubernetes.io/job-completion-index";
    let index = "c/shop/cronjob/report (suspended, label batch.kubernetes.io/job-completion-index unknown)";
    let unknown = Some("deny-unknown");
    let one_of = |key: &str| format!("{{matchExpressions: [{{key: {key}, operator: In, values: [x]}}]}}");
    let deny = |selector: &str| calico(&format!("{{action: Deny, source: {{selector: '{selector}'}}}}"));
    let cases = [
        (kubernetes("{}", "{}"), "allow", None, [report, web]),
        (kubernetes(&exists("other"), &exists("none")), "allow", None, [report, web]),
        (kubernetes("{}", &absent("other")), "allow", None, [report, web]),
        // That the label is there is certain, and its value is not known.
        (kubernetes("{}", &exists("job-name")), "allow", None, [job, web]),
        (kubernetes("{}", &absent("job-name")), "deny", None, [job, web]),
        (kubernetes("{}", &one_of("job-name")), "deny", None, [job, web]),
        (kubernetes(&exists("pod-template-hash"), &exists("none")), "deny", None, [report, hash]),
        (kubernetes(&absent("pod-template-hash"), &exists("none")), "allow", None, [report, hash]),
        (closed.clone() + &kubernetes(&exists("pod-template-hash"), "{}"), "allow", None, [report, hash]),
        (closed.clone() + &kubernetes(&absent("pod-template-hash"), "{}"), "deny", None, [report, hash]),
        // The policy may be for the pod: then it isolates it, but it may also not allow anything.
        (kubernetes(&one_of("pod-template-hash"), &exists("none")), "deny", None, [report, hash]),
        (closed.clone() + &kubernetes(&one_of("pod-template-hash"), "{}"), "deny", None, [report, hash]),
        // The same rule in a policy that is for the pod is not passed over.
        (
            closed
                + &kubernetes(&one_of("pod-template-hash"), "{}")
                + &kubernetes("{}", "{}").replace("name: p,", "name: q,"),
            "allow",
            None,
            [report, hash],
        ),
        (deny("has(job-name)"), "deny", None, [job, web]),
        (deny("!has(job-name)"), "allow", None, [job, web]),
        (deny("job-name == \"x\""), "deny", unknown, [job, web]),
        (deny("job-name != \"x\""), "deny", unknown, [job, web]),
        (calico("{action: Pass, source: {selector: job-name == 'x'}}"), "deny", unknown, [job, web]),
        (kubernetes("{}", &exists(INDEX)), "deny", None, [index, web]),
        (kubernetes("{}", &absent(INDEX)), "deny", None, [index, web]),
        (deny(&format!("has({INDEX})")), "deny", unknown, [index, web]),
        (deny(&format!("!has({INDEX})")), "deny", unknown, [index, web]),
        (calico(&format!("{{action: Pass, source: {{selector: has({INDEX})}}}}")), "deny", unknown, [index, web]),
        (deny("has(other)"), "allow", None, [report, web]),
    ];
    for (policies, verdict, effect, not_running) in cases {
        let shop = Folder::new(&format!("{SHOP}{policies}"));
        let answer = &shop.answers(&[ask(workload("cronjob/report"), workload("deployment/web"), 8080)], &[])[0];
        assert_eq!(answer["verdict"], verdict, "{policies}\n{answer:#}");
        assert_eq!(answer["notRunning"], json!(not_running), "{policies}");
        let trace = answer["ingress"]["trace"].as_array().expect("a trace");
        assert_eq!(trace.last().and_then(|step| step["effect"].as_str()), effect, "{policies}\n{answer:#}");
    }
    // Such a policy may be for pods, and its peers may be.
    let text = kubernetes(&exists("pod-template-hash"), &exists("job-name"));
    let findings = Folder::new(&format!("{SHOP}{text}")).lines("lint", &[]);
    let of_policy = findings.iter().filter(|it| it["policy"].as_str().is_some_and(|policy| policy.ends_with("shop/p")));
    let nothing: Vec<&Value> = of_policy.filter(|it| it["id"] == "HN001" || it["id"] == "HN002").collect();
    assert!(nothing.is_empty(), "{nothing:#?}");
}
