//! Access to the API server of a cluster, for the hub's operator, for members and for `hanse`.
//!
//! A crate of its own, so that only the programs that need it depend on the client.

pub mod change;
pub mod election;
pub mod metrics;
mod proxy;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// The longest time until the API server accepts a connection, and answers a single request.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// The longest time without a byte on a connection with an open request. The API server sends a bookmark about once a minute on a watch: one
/// that is silent for longer is dead, also where nothing has closed it on this side.
pub const SILENCE: Duration = Duration::from_secs(90);

/// The API server of the cluster: that of the pod in which the process runs, or that of a kubeconfig file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// `None`: the service account of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// The context in the file; `None` for its current one.
    pub context: Option<String>,
}

impl Access {
    /// Reads the configuration. Does not connect. The default namespace of the client is that of the pod, or of the context.
    ///
    /// # Errors
    /// When the file, or what it names, cannot be read, or the process does not run in a pod.
    pub async fn client(&self) -> anyhow::Result<Client> {
        Client::try_from(self.config().await?).context("read the configuration for the API server")
    }

    async fn config(&self) -> anyhow::Result<Config> {
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let file = || format!("read {} (--kubeconfig)", path.display());
                let kubeconfig = Kubeconfig::read_from(path).with_context(file)?;
                self.of_kubeconfig(kubeconfig).await.with_context(file)?
            }
            // Directly, whatever the environment says: a pod reaches its API server without a proxy.
            None => Config::incluster().context(
                "the service account of the pod: give --kubeconfig to a process that does not run in a pod of the cluster",
            )?,
        };
        config.connect_timeout = Some(ANSWER_WITHIN);
        config.read_timeout = Some(SILENCE);
        Ok(config)
    }

    /// As [`Self::client`], for a command of a user: without a file, what `kubectl` would use.
    ///
    /// # Errors
    /// When a file, or what it names, cannot be read.
    pub async fn user_client(&self) -> anyhow::Result<Client> {
        if self.kubeconfig.is_some() {
            return self.client().await;
        }
        let file = "read the kubeconfig (KUBECONFIG, or ~/.kube/config); --kubeconfig names another one";
        let kubeconfig = Kubeconfig::read().context(file)?;
        let mut config = self.of_kubeconfig(kubeconfig).await.context(file)?;
        config.connect_timeout = Some(ANSWER_WITHIN);
        Client::try_from(config).context(file)
    }

    async fn of_kubeconfig(&self, mut kubeconfig: Kubeconfig) -> anyhow::Result<Config> {
        let declared = proxy::take(&mut kubeconfig, self.context.as_deref())?;
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        let server = &config.cluster_url;
        let to = proxy::Destination {
            is_https: server.scheme_str() != Some("http"),
            host: server.host().unwrap_or_default(),
            port: server.port_u16(),
        };
        let proxy = match declared {
            Some(declared) => Some(declared),
            None => proxy::Environment::of_process().proxy(to)?,
        };
        // A parse error names the character, and not the URL.
        config.proxy_url = proxy.map(|url| url.parse()).transpose().context("read the URL of the proxy")?;
        Ok(config)
    }

    /// Connects to the API server.
    ///
    /// # Errors
    /// When the configuration cannot be read, or the API server does not answer, or not to this user.
    pub async fn check(&self) -> anyhow::Result<()> {
        answered(self.client().await?.apiserver_version()).await.map(drop)
    }
}

/// Why a request of the API server has no result. The source of the errors of [`answered`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    pub message: String,
    /// The API server answered, and refused. Otherwise there was no answer.
    pub is_refusal: bool,
}

impl RequestError {
    pub fn new(error: kube::Error) -> Self {
        let is_refusal = matches!(error, kube::Error::Api(_));
        Self { message: message(error), is_refusal }
    }
}

/// The result of one request, within a limited time.
///
/// # Errors
/// A [`RequestError`], when the API server does not answer in time, or refuses.
pub async fn answered<T>(request: impl Future<Output = kube::Result<T>>) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(ANSWER_WITHIN, request).await;
    let late = |_| {
        let message = format!("no answer of the API server within {} s", ANSWER_WITHIN.as_secs());
        RequestError { message, is_refusal: false }
    };
    Ok(answer.map_err(late)?.map_err(RequestError::new)?)
}

/// As [`answered`], with the error itself; `None` when there is no answer in time.
async fn answered_by<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Option<kube::Error>> {
    tokio::time::timeout(ANSWER_WITHIN, request).await.map_err(|_| None)?.map_err(Some)
}

/// What the API server answered, or why it did not, with all causes.
pub fn message(error: kube::Error) -> String {
    let error = match error {
        kube::Error::Api(status) if !status.message.is_empty() => return status.message,
        error => error,
    };
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        let message = error.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt as _, pin_mut};
    use k8s_openapi::api::core::v1::Namespace;
    use kube::Api;
    use kube::api::WatchParams;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// A server that sends one event of a watch and then nothing, as one whose connection was lost on the way does.
    #[tokio::test]
    async fn a_watch_that_is_silent_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let file = std::env::temp_dir().join(format!("hanse-silence-{}", std::process::id()));
        let text = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", listener.local_addr().expect("bound"))}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        });
        std::fs::write(&file, text.to_string()).expect("written");
        let access = Access { kubeconfig: Some(file.clone()), context: None };
        let client = access.client().await.expect("a client");
        std::fs::remove_file(&file).expect("removed");
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("it connects");
            let mut request = [0; 4096];
            while !request.windows(4).any(|it| it == b"\r\n\r\n") {
                let read = stream.read(&mut request).await.expect("a request");
                assert!(read > 0, "the client has hung up");
            }
            let event = r#"{"type":"ADDED","object":{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a"}}}"#;
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{event}\n\r\n",
                event.len() + 1
            );
            stream.write_all(answer.as_bytes()).await.expect("sent");
            stream
        };
        let namespaces: Api<Namespace> = Api::all(client);
        let watch = async { namespaces.watch(&WatchParams::default(), "1").await.expect("it is answered") };
        let (_open, events) = tokio::join!(serve, watch);
        pin_mut!(events);
        assert!(matches!(events.next().await, Some(Ok(_))), "the event arrives");
        tokio::time::pause();
        let end = tokio::time::timeout(SILENCE + Duration::from_secs(1), events.next()).await.expect("the watch ends");
        assert!(matches!(end, None | Some(Err(_))), "{end:?}");
    }
}
