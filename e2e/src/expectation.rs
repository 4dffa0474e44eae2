//! The verdicts of `hanse policy explain` for the manifests that the cluster runs from.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::world::{Cluster, Pod};

#[derive(Debug, Clone)]
pub struct Expectation {
    pub allowed: bool,
    /// The rule that decided, as `explain` names it; empty where none did.
    pub answer: Value,
}

#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("hanse policy explain: {0}")]
    Failed(String),
    #[error("an answer of hanse policy explain: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// One answer for each pair, in order: a TCP connection to the second's port over the IP version.
pub fn explain(
    hanse: &Path,
    clusters: &[Cluster],
    federation: Option<&Path>,
    pairs: &[(&Pod, &Pod)],
    version: u8,
    scratch: &Path,
) -> Result<Vec<Expectation>, ExplainError> {
    let name = |pod: &Pod| json!({"cluster": pod.cluster, "namespace": pod.namespace, "pod": pod.name});
    let mut lines = String::new();
    for (from, to) in pairs {
        let query =
            json!({"from": name(from), "to": name(to), "protocol": "TCP", "port": to.port, "ipVersion": version});
        lines.push_str(&query.to_string());
        lines.push('\n');
    }
    let queries: PathBuf = scratch.join("queries.jsonl");
    std::fs::write(&queries, lines)?;
    let mut command = Command::new(hanse);
    command.args(["policy", "explain", "-o", "json", "--queries"]).arg(&queries);
    for cluster in clusters {
        command.arg("--cluster").arg(format!("{}={}", cluster.name, cluster.directory.display()));
    }
    if let Some(directory) = federation {
        command.arg("--federation").arg(directory);
    }
    let output = command.output()?;
    if !output.status.success() {
        return Err(ExplainError::Failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let answers: Vec<Expectation> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| {
            let answer: Value = serde_json::from_str(line)?;
            Ok(Expectation { allowed: answer["verdict"] == "allow", answer })
        })
        .collect::<Result<_, serde_json::Error>>()?;
    if answers.len() != pairs.len() {
        return Err(ExplainError::Failed(format!("{} answers to {} questions", answers.len(), pairs.len())));
    }
    Ok(answers)
}
