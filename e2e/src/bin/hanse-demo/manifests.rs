//! Edits of the manifests that the members watch.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, bail};
use hanse_e2e::world::Pod;

/// A client in another Kubernetes namespace, on the node of the attacker.
pub fn newcomer(pods: &[Pod]) -> anyhow::Result<Pod> {
    let attacker = pods.iter().find(|pod| pod.name == "attacker-0").context("the attacker is in the manifests")?;
    let beside = |address: &IpAddr| match address {
        IpAddr::V4(address) => IpAddr::V4((u32::from(*address) + 50).into()),
        IpAddr::V6(address) => IpAddr::V6((u128::from(*address) + 50).into()),
    };
    let addresses = attacker.addresses.iter().map(beside).collect();
    Ok(Pod { namespace: "apps".into(), name: "newcomer-0".into(), addresses, ..attacker.clone() })
}

pub fn newcomer_manifest(pod: &Pod) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {}, namespace: {}, labels: {{app: client}}}}\n\
         spec: {{nodeName: {}}}\nstatus: {{phase: Running, podIP: {}, podIPs: [{{ip: {}}}, {{ip: \"{}\"}}]}}\n",
        pod.name, pod.namespace, pod.node, pod.addresses[0], pod.addresses[0], pod.addresses[1]
    )
}

/// Replaces text in a file atomically, as editors do.
pub fn edit(path: &Path, from: &str, to: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path).context("read a manifest")?;
    if !text.contains(from) {
        bail!("{} does not contain {from}", path.display());
    }
    replace(path, &text.replace(from, to))
}

/// As [`edit`], in the document of one pod.
pub fn edit_pod(path: &Path, pod: &str, from: &str, to: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path).context("read a manifest")?;
    let documents = text.split("\n---\n").map(|document| {
        let is_it = document.lines().any(|line| line.trim() == format!("name: {pod}"));
        if is_it { document.replace(from, to) } else { document.to_owned() }
    });
    replace(path, &documents.collect::<Vec<_>>().join("\n---\n"))
}

fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).context("write a manifest")?;
    std::fs::rename(&beside, path).context("put a manifest in its place")
}
