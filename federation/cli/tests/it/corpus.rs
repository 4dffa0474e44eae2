//! The corpus: every clause of what the policy APIs mean, as manifests and packets with the verdict that the clause
//! gives. The files under `corpus/` are the data; this runs them through `hanse policy explain`.

mod reading;

use std::path::Path;
use std::process::Command;

use reading::{Case, Corpus, Expected};
use serde_json::Value;

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
    let corpus = Corpus::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/corpus"), name);
    let mut wrong = Vec::new();
    for case in &corpus.cases {
        for (query, expected, answer) in answers(&corpus, case) {
            let verdict = if expected.is_staged { &answer["staged"]["verdict"] } else { &answer["verdict"] };
            let said = match verdict.as_str() {
                Some("allow") => Expected::Allow,
                Some("deny") => Expected::Deny,
                _ => Expected::Error,
            };
            if said != expected.verdict {
                wrong.push(format!("{}\n  {query}: expected {expected:?}, was {answer}", case.clause));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), corpus.cases.len(), wrong.join("\n"));
}

#[derive(Debug)]
struct Verdict {
    /// As if all staged policies were committed.
    is_staged: bool,
    verdict: Expected,
}

/// Each query of a case with the expected verdict and the answer.
fn answers<'c>(corpus: &Corpus, case: &'c Case) -> Vec<(&'c str, Verdict, Value)> {
    let root = tempfile::tempdir().expect("temporary directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(["policy", "explain", "-o", "json"]);
    for (cluster, objects) in corpus.clusters(case) {
        let directory = root.path().join(cluster);
        std::fs::create_dir(&directory).expect("directory");
        write(&directory.join("all.yaml"), &objects);
        command.arg("--cluster").arg(format!("{cluster}={}", directory.display()));
    }
    let directory = root.path().join("the-federation");
    std::fs::create_dir(&directory).expect("directory");
    write(&directory.join("all.yaml"), &corpus.federation(case));
    command.arg("--federation").arg(&directory);
    let enforced = case.packets(false).map(|(query, verdict)| (query, Verdict { is_staged: false, verdict }));
    let staged = case.packets(true).map(|(query, verdict)| (query, Verdict { is_staged: true, verdict }));
    let packets: Vec<(&str, Verdict)> = enforced.chain(staged).collect();
    let lines: Vec<String> = packets.iter().map(|(query, _)| reading::question(query).to_string()).collect();
    let questions = root.path().join("queries.jsonl");
    std::fs::write(&questions, lines.join("\n")).expect("queries");
    let output = command.arg("--queries").arg(&questions).output().expect("hanse runs");
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let answers: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON lines")).collect();
    assert_eq!(answers.len(), lines.len(), "{}: {stderr}", case.clause);
    assert!(case.error.is_empty() == output.status.success(), "{}: {} {stderr}", case.clause, output.status);
    packets.into_iter().zip(answers).map(|((query, expected), answer)| (query, expected, answer)).collect()
}

fn write(path: &Path, objects: &[Value]) {
    // JSON is YAML of which every reader thinks alike: a name such as `n` is no truth value in quotes.
    let documents: Vec<String> = objects.iter().map(Value::to_string).collect();
    std::fs::write(path, documents.join("\n---\n")).expect("manifests");
}
