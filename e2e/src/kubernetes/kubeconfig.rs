//! Kubeconfigs: how a user reaches an API server.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::certificates::Certified;
use super::server::ApiServer;

/// What a user authenticates with.
#[derive(Debug, Clone)]
pub enum Credentials {
    Certificate(Certified),
    Token(String),
}

/// One cluster and one user, as JSON, which every reader of a kubeconfig accepts.
pub fn kubeconfig(cluster: &str, url: &str, authority: &str, credentials: &Credentials) -> Value {
    let user = match credentials {
        Credentials::Certificate(certified) => json!({
            "client-certificate-data": STANDARD.encode(&certified.certificate),
            "client-key-data": STANDARD.encode(&certified.key),
        }),
        Credentials::Token(token) => json!({ "token": token }),
    };
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": cluster,
            "cluster": { "server": url, "certificate-authority-data": STANDARD.encode(authority) },
        }],
        "users": [{ "name": "user", "user": user }],
        "contexts": [{ "name": cluster, "context": { "cluster": cluster, "user": "user" } }],
        "current-context": cluster,
    })
}

/// One kubeconfig with a context for the administrator of each server, named as the server. The last one is the current context.
///
/// # Errors
/// When the kubeconfig of a server cannot be read.
pub fn merged<'a>(servers: impl IntoIterator<Item = &'a ApiServer>) -> anyhow::Result<Value> {
    let mut merged = json!({ "apiVersion": "v1", "kind": "Config", "clusters": [], "users": [], "contexts": [] });
    for server in servers {
        let text = std::fs::read_to_string(server.kubeconfig()).context("read a kubeconfig")?;
        let mut one: Value = serde_json::from_str(&text).context("read a kubeconfig")?;
        one["users"][0]["name"] = json!(server.name());
        one["contexts"][0]["context"]["user"] = json!(server.name());
        for key in ["clusters", "users", "contexts"] {
            let (to, from) = (merged[key].as_array_mut(), one[key].as_array());
            to.context("a kubeconfig has lists")?.extend(from.into_iter().flatten().cloned());
        }
        merged["current-context"] = json!(server.name());
    }
    Ok(merged)
}

/// A client of this kubeconfig. It belongs to the Tokio runtime in which it is made, and connects in the network namespace of the
/// runtime's threads.
///
/// # Errors
/// When the kubeconfig is malformed.
pub async fn client(kubeconfig: &Value) -> anyhow::Result<kube::Client> {
    let kubeconfig = serde_json::from_value(kubeconfig.clone()).context("read the kubeconfig")?;
    let options = kube::config::KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.context("read the kubeconfig")?;
    kube::Client::try_from(config).context("make a client")
}

/// Writes a file that only its owner may read.
///
/// # Errors
/// When it cannot be written.
pub fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut options = File::options();
    let file = options.create(true).write(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).with_context(|| format!("write {}", path.display()))
}
