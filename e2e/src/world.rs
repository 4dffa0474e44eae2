//! What the manifests of a directory say of nodes and pods: enough to build their network.
//!
//! Read separately from the product's own reading, and only for addresses and ports.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_yaml_ng::Value;

#[derive(Debug, Clone)]
pub struct Cluster {
    pub name: String,
    pub directory: PathBuf,
    pub nodes: Vec<Node>,
    pub pods: Vec<Pod>,
}

#[derive(Debug, Clone)]
pub struct Node {
    pub name: String,
    pub addresses: Vec<IpAddr>,
    /// The ranges that its pods' addresses come from.
    pub pod_ranges: Vec<ipnet::IpNet>,
}

#[derive(Debug, Clone)]
pub struct Pod {
    pub cluster: String,
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
    /// The TCP port that its first container serves.
    pub port: u16,
}

impl Pod {
    /// `cluster/pod`, unique in the demo's worlds.
    pub fn title(&self) -> String {
        format!("{}/{}", self.cluster, self.name)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {message}")]
    Malformed { path: PathBuf, message: String },
}

impl Cluster {
    /// Reads every `.yaml` of the directory.
    pub fn read(name: &str, directory: &Path) -> Result<Self, WorldError> {
        let mut cluster =
            Self { name: name.to_owned(), directory: directory.to_owned(), nodes: Vec::new(), pods: Vec::new() };
        let read = |source| WorldError::Read { path: directory.to_owned(), source };
        let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
            .map_err(read)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
            .collect();
        files.sort();
        for path in files {
            let text =
                std::fs::read_to_string(&path).map_err(|source| WorldError::Read { path: path.clone(), source })?;
            let malformed = |message: String| WorldError::Malformed { path: path.clone(), message };
            for document in serde_yaml_ng::Deserializer::from_str(&text) {
                let object = Value::deserialize(document).map_err(|error| malformed(error.to_string()))?;
                match object["kind"].as_str() {
                    Some("Node") => cluster.nodes.push(node(&object).map_err(malformed)?),
                    Some("Pod") => cluster.pods.push(pod(name, &object).map_err(malformed)?),
                    _ => {}
                }
            }
        }
        Ok(cluster)
    }
}

fn text(value: &Value, what: &str) -> Result<String, String> {
    value.as_str().map(str::to_owned).ok_or_else(|| format!("{what} is missing"))
}

fn items<T: std::str::FromStr>(list: &Value, key: Option<&str>, what: &str) -> Result<Vec<T>, String> {
    let list = list.as_sequence().ok_or_else(|| format!("{what} is missing"))?;
    list.iter()
        .map(|item| text(key.map_or(item, |key| &item[key]), what)?.parse().map_err(|_| format!("{what} is malformed")))
        .collect()
}

fn node(object: &Value) -> Result<Node, String> {
    Ok(Node {
        name: text(&object["metadata"]["name"], "metadata.name")?,
        addresses: items(&object["status"]["addresses"], Some("address"), "status.addresses")?,
        pod_ranges: items(&object["spec"]["podCIDRs"], None, "spec.podCIDRs")?,
    })
}

fn pod(cluster: &str, object: &Value) -> Result<Pod, String> {
    let port = object["spec"]["containers"][0]["ports"][0]["containerPort"].as_u64();
    Ok(Pod {
        cluster: cluster.to_owned(),
        namespace: text(&object["metadata"]["namespace"], "metadata.namespace")?,
        name: text(&object["metadata"]["name"], "metadata.name")?,
        node: text(&object["spec"]["nodeName"], "spec.nodeName")?,
        addresses: items(&object["status"]["podIPs"], Some("ip"), "status.podIPs")?,
        port: port.and_then(|port| u16::try_from(port).ok()).ok_or("the first container's port is missing")?,
    })
}
