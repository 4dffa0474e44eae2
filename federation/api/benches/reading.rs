//! Time and memory for reading large files, against their budgets.
//!
//! `pods`: 200 MB of YAML, a list of pods as `kubectl get pods -o yaml` writes it, most of whose fields are not read. `blocks`:
//! one NetworkPolicy with 1,000,000 ipBlocks. `unknown`: a policy of 1.1 MB with 200 unknown fields.
//!
//! `cargo bench -p hanse-api --bench reading [-- [SHAPE…] -o json]`. Each file is read by a process of its own, whose peak
//! of resident memory includes the file. A figure above its budget fails the run; the budget of time is one of CPU time,
//! which is the wall clock's where the machine has nothing else to do, since one thread reads.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

struct Shape {
    name: &'static str,
    write: fn() -> String,
    objects: usize,
    max_seconds: f64,
    max_megabytes: f64,
}

const SHAPES: &[Shape] = &[
    Shape { name: "pods", write: pods, objects: 41_000, max_seconds: 15.0, max_megabytes: 1_000.0 },
    Shape { name: "blocks", write: blocks, objects: 1, max_seconds: 3.0, max_megabytes: 500.0 },
    Shape { name: "unknown", write: unknown, objects: 0, max_seconds: 0.5, max_megabytes: 50.0 },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, path, objects] = &arguments[..]
        && mode == "--read"
    {
        read(Path::new(path), objects);
        return ExitCode::SUCCESS;
    }
    let json = arguments.iter().any(|argument| argument == "json");
    let named = |shape: &Shape| arguments.iter().any(|argument| argument == shape.name);
    let all = !SHAPES.iter().any(named);
    let directory = tempfile::tempdir().expect("a directory");
    let mut over = false;
    for shape in SHAPES.iter().filter(|shape| all || named(shape)) {
        let path = directory.path().join(format!("{}.yaml", shape.name));
        let text = (shape.write)();
        std::fs::write(&path, &text).expect("written");
        let program = std::env::current_exe().expect("it has a path");
        let child = Command::new(program).arg("--read").arg(&path).arg(shape.objects.to_string()).output();
        let output = child.expect("it starts");
        assert!(output.status.success(), "{}: {}", shape.name, String::from_utf8_lossy(&output.stderr));
        let figures = String::from_utf8_lossy(&output.stdout);
        let figures: Vec<f64> = figures.split_whitespace().map(|figure| figure.parse().expect("a number")).collect();
        let rows = [
            ("file", text.len() as f64 / 1e6, "MB", f64::INFINITY),
            ("wall", figures[0], "s", f64::INFINITY),
            ("cpu", figures[1], "s", shape.max_seconds),
            ("peak-resident", figures[2], "MB", shape.max_megabytes),
        ];
        for (metric, value, unit, budget) in rows {
            over |= value > budget;
            let shape = shape.name;
            if json {
                println!(
                    r#"{{"bench":"reading","shape":"{shape}","metric":"{metric}","value":{value},"unit":"{unit}"}}"#
                );
            } else if budget.is_finite() {
                println!("{shape:<10} {metric:<34} {value:>14.3} {unit} (budget {budget} {unit})");
            } else {
                println!("{shape:<10} {metric:<34} {value:>14.3} {unit}");
            }
        }
        let _ = std::io::stdout().flush();
    }
    if over { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn read(path: &Path, objects: &str) {
    let start = Instant::now();
    let read = hanse_api::read_dir(path).expect("readable");
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!(read.objects.len().to_string(), objects, "{:?}", read.diagnostics.first());
    assert_eq!(read.diagnostics.is_empty(), objects != "0", "{:?}", read.diagnostics.first());
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux reports it");
    let kilobytes: f64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    // What this thread, the only one, spent on a processor, in nanoseconds.
    let spent = std::fs::read_to_string("/proc/self/schedstat").expect("Linux reports it");
    let nanoseconds: f64 = spent.split(' ').next().and_then(|it| it.parse().ok()).expect("a number");
    println!("{seconds} {} {}", nanoseconds / 1e9, kilobytes * 1024.0 / 1e6);
}

fn pods() -> String {
    let mut text = "apiVersion: v1\nitems:\n".to_owned();
    for pod in 0..41_000 {
        let (high, low) = (pod / 250, pod % 250);
        let _ = write!(
            text,
            "- apiVersion: v1\n  kind: Pod\n  metadata:\n    annotations:\n      checksum/config: \"{pod:064}\"\n    creationTimestamp: \"2026-01-01T00:00:00Z\"\n    generateName: web-{pod}-\n    labels:\n      app: web\n      pod-template-hash: h{pod}\n      team: t{low}\n    name: web-{pod}\n    namespace: n{low}\n    uid: 00000000-0000-0000-0000-{pod:012}\n  spec:\n    containers:\n"
        );
        for container in 0..3 {
            let _ = writeln!(text, "    - env:");
            for variable in 0..14 {
                let _ = write!(
                    text,
                    "      - name: VARIABLE_{variable}\n        value: \"the value of {variable} in {container}\"\n"
                );
            }
            let _ = write!(
                text,
                "      image: registry.example.org/team/web@sha256:{pod:064}\n      imagePullPolicy: IfNotPresent\n      name: c{container}\n      ports:\n      - containerPort: {}\n        name: http{container}\n        protocol: TCP\n      resources:\n        limits:\n          cpu: \"1\"\n          memory: 1Gi\n      terminationMessagePath: /dev/termination-log\n      volumeMounts:\n      - mountPath: /var/run/secrets/kubernetes.io/serviceaccount\n        name: kube-api-access\n        readOnly: true\n",
                8000 + container
            );
        }
        let _ = write!(
            text,
            "    nodeName: node-{}\n    restartPolicy: Always\n    serviceAccountName: default\n    tolerations:\n    - effect: NoExecute\n      key: node.kubernetes.io/not-ready\n      operator: Exists\n      tolerationSeconds: 300\n  status:\n    hostIP: 192.168.0.{low}\n    phase: Running\n    podIP: 10.0.{high}.{low}\n    podIPs:\n    - ip: 10.0.{high}.{low}\n    qosClass: BestEffort\n",
            pod % 1000
        );
    }
    text + "kind: List\nmetadata:\n  resourceVersion: \"\"\n"
}

fn blocks() -> String {
    let mut text = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  name: p\n  namespace: a\nspec:\n  podSelector: {}\n  ingress:\n  - from:\n".to_owned();
    for block in 0..1_000_000_u32 {
        let [_, a, b, c] = block.to_be_bytes();
        let _ = write!(text, "    - ipBlock:\n        cidr: 10.{a}.{b}.{c}/32\n");
    }
    text
}

fn unknown() -> String {
    let mut text =
        "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata:\n  name: p\nspec:\n".to_owned();
    for field in 0..200 {
        let _ = writeln!(text, "  field{field}: 1");
    }
    text.push_str("  selector: all()\n  types: [Ingress]\n  ingress:\n");
    for rule in 0..1_000 {
        let nets: Vec<String> = (0..80).map(|net| format!("10.{}.{}.0/24", rule % 250, net)).collect();
        let _ = writeln!(text, "  - {{action: Allow, source: {{nets: [{}]}}}}", nets.join(", "));
    }
    text
}
