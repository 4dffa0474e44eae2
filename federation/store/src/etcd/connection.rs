//! The connection to etcd: one node at a time, the next one after a failure.

use std::path::Path;
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use hanse_runtime::files;
use hanse_runtime::retry::Backoff;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::failure::Failure;
use crate::error::StoreError;
use crate::url::EtcdUrl;

/// A TCP connection in the network of one site takes far less.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection without any answer is closed after both: etcd refuses pings more often than every five seconds.
const PING_EVERY: Duration = Duration::from_secs(8);
const PING_TIMEOUT: Duration = Duration::from_secs(4);
/// Largest file of certificates, in bytes.
const MAX_PEM_BYTES: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct Connection {
    url: EtcdUrl,
    /// How long one attempt may take: a node that hangs leaves time for the others.
    attempt: Duration,
    node: Mutex<Node>,
}

struct Node {
    /// Position in the URL.
    index: usize,
    /// Increases with each replaced client, so that late failures of an old one do not end a new one.
    generation: u64,
    client: Option<Client>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("index", &self.index).field("generation", &self.generation).finish_non_exhaustive()
    }
}

/// A client, and which one it is.
#[derive(Clone)]
pub(super) struct Current {
    pub(super) client: Client,
    pub(super) generation: u64,
}

/// Why an operation failed for good.
#[derive(Debug)]
pub(super) enum CallError {
    /// The answer of etcd.
    Failure(Failure),
    /// No answer in time, or settings that cannot be used.
    Store(StoreError),
}

impl From<CallError> for StoreError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Store(error) => error,
            CallError::Failure(failure) => match failure {
                Failure::Node(text) | Failure::Busy(text) => Self::Unavailable(text),
                Failure::Token => Self::Denied("etcd does not accept its own authentication token".to_owned()),
                Failure::Denied(text) => Self::Denied(text),
                Failure::Full(text) => Self::Full(text),
                Failure::Refused(text) => Self::Settings(format!("etcd refused a request: {text}")),
                // Their callers know what they mean; elsewhere they are not expected.
                failure @ (Failure::Compacted | Failure::Future | Failure::NoLease | Failure::Large) => {
                    Self::Settings(format!("etcd refused a request: {failure:?}"))
                }
            },
        }
    }
}

impl Connection {
    /// Replicas of the hub begin at different nodes.
    pub(super) fn new(url: EtcdUrl, first: usize) -> Self {
        let attempt = (url.timeout / 4).max(Duration::from_secs(1));
        let index = first % url.hosts.len().max(1);
        Self { url, attempt, node: Mutex::new(Node { index, generation: 0, client: None }) }
    }

    pub(super) fn url(&self) -> &EtcdUrl {
        &self.url
    }

    /// How long one attempt may take.
    pub(super) fn attempt(&self) -> Duration {
        self.attempt
    }

    /// When an operation that begins now has to end.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.url.timeout
    }

    /// As [`Self::call_until`], with the time of one operation.
    pub(super) async fn call<T, F>(&self, request: impl Fn(Client) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        self.call_until(self.deadline(), request).await
    }

    /// Sends a request that may be repeated, to one node after the other, until one answers.
    pub(super) async fn call_until<T, F>(
        &self,
        deadline: Instant,
        request: impl Fn(Client) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
        let mut authenticated = false;
        let mut last = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let seconds = self.url.timeout.as_secs();
                let last = last.unwrap_or_else(|| "no node was tried".to_owned());
                let text = format!(
                    "no node answered within {seconds} s (last: {last}); check the network, and that a majority of etcd's \
                     nodes is running"
                );
                return Err(CallError::Store(StoreError::Unavailable(text)));
            }
            let attempt = self.attempt.min(left);
            let current = match timeout(attempt, self.current()).await {
                Ok(Ok(current)) => current,
                Ok(Err(CallError::Failure(Failure::Node(text) | Failure::Busy(text)))) => {
                    last = Some(text);
                    tokio::time::sleep(backoff.next_delay().min(left)).await;
                    continue;
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    // The end of the operation may have cut this attempt: what a node said before says more.
                    last.get_or_insert_with(|| "a node did not accept a connection".to_owned());
                    continue;
                }
            };
            let failure = match timeout(attempt, request(current.client)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => Failure::from(error),
                Err(_) => Failure::Node(format!("no answer within {:.0} s", attempt.as_secs_f64())),
            };
            match failure {
                Failure::Node(text) => last = Some(self.failed(current.generation, &text).await),
                Failure::Busy(text) => last = Some(text),
                Failure::Token if !authenticated => {
                    authenticated = true;
                    self.forget(current.generation).await;
                    continue;
                }
                failure => return Err(CallError::Failure(failure)),
            }
            tokio::time::sleep(backoff.next_delay().min(left)).await;
        }
    }

    /// The client of the current node, which connects when it is first used. With a user, it is authenticated here.
    pub(super) async fn current(&self) -> Result<Current, CallError> {
        let mut node = self.node.lock().await;
        if let Some(client) = &node.client {
            return Ok(Current { client: client.clone(), generation: node.generation });
        }
        let host = &self.url.hosts[node.index];
        let options = self.options().await.map_err(CallError::Store)?;
        let scheme = if self.url.tls { "https" } else { "http" };
        let connecting = timeout(self.attempt, Client::connect([format!("{scheme}://{host}")], Some(options)));
        let failure = match connecting.await {
            Ok(Ok(client)) => {
                node.generation += 1;
                node.client = Some(client.clone());
                return Ok(Current { client, generation: node.generation });
            }
            Ok(Err(error)) => Failure::from(error),
            Err(_) => Failure::Node(format!("no answer within {:.0} s", self.attempt.as_secs_f64())),
        };
        let failure = match failure {
            Failure::Node(text) => Failure::Node(format!("{host}: {text}")),
            failure => failure,
        };
        node.index = (node.index + 1) % self.url.hosts.len();
        Err(CallError::Failure(failure))
    }

    /// Goes on to the next node, unless that has happened already. Returns the reason with the name of the node.
    pub(super) async fn failed(&self, generation: u64, reason: &str) -> String {
        let mut node = self.node.lock().await;
        if node.generation != generation || node.client.is_none() {
            return reason.to_owned();
        }
        let reason = format!("{}: {reason}", self.url.hosts[node.index]);
        debug!(reason, "etcd node failed; trying the next");
        node.client = None;
        node.index = (node.index + 1) % self.url.hosts.len();
        reason
    }

    /// Connects again to the same node: the token has ended, or the password or certificate was replaced.
    pub(super) async fn forget(&self, generation: u64) {
        let mut node = self.node.lock().await;
        if node.generation == generation {
            node.client = None;
        }
    }

    /// Read anew for each connection, so that replaced certificates and passwords are used.
    async fn options(&self) -> Result<ConnectOptions, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if self.url.tls {
            options = options.with_tls(self.tls().await?);
        }
        if let Some((user, file)) = &self.url.user {
            let password = blocking(file, files::read_provided_secret).await?;
            let password = std::str::from_utf8(&password).map_err(|_| unusable(file, &"the password is not UTF-8"))?;
            let password = password.trim_end_matches(['\r', '\n']);
            if password.is_empty() {
                return Err(unusable(file, &"the password is empty"));
            }
            options = options.with_user(user, password);
        }
        Ok(options)
    }

    async fn tls(&self) -> Result<TlsOptions, StoreError> {
        let mut tls = TlsOptions::new();
        if let Some(ca) = &self.url.ca {
            tls = tls.ca_certificate(Certificate::from_pem(blocking(ca, read_pem).await?));
        }
        if let Some((certificate, key)) = &self.url.certificate {
            let chain = blocking(certificate, read_pem).await?;
            let key = blocking(key, files::read_provided_secret).await?;
            tls = tls.identity(Identity::from_pem(chain, &*key));
        }
        if let Some(name) = &self.url.server_name {
            tls = tls.domain_name(name);
        }
        Ok(tls)
    }
}

fn read_pem(path: &Path) -> std::io::Result<Vec<u8>> {
    if std::fs::metadata(path)?.len() > MAX_PEM_BYTES {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "it is larger than 1 MiB"));
    }
    let bytes = std::fs::read(path)?;
    if bytes.windows(11).any(|it| it == b"-----BEGIN ") {
        return Ok(bytes);
    }
    Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "it contains nothing in PEM format"))
}

/// Reads a file, without blocking the runtime.
async fn blocking<T: Send + 'static>(
    path: &Path,
    read: impl FnOnce(&Path) -> std::io::Result<T> + Send + 'static,
) -> Result<T, StoreError> {
    let path = path.to_owned();
    let (path, outcome) = tokio::task::spawn_blocking(move || {
        let outcome = read(&path);
        (path, outcome)
    })
    .await
    .map_err(|_| StoreError::Closed)?;
    outcome.map_err(|error| unusable(&path, &error))
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Settings(format!("the file {} of the store's URL cannot be used: {error}", path.display()))
}
