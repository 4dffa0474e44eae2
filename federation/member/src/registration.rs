//! The identity of a member: joining with a token, its files, and the renewal of its certificates.
//!
//! Files of the state: `member.pem` (key and certificate, 0600), `intermediate.pem` (the cluster's own authority, 0600),
//! `root.pem`, and during a request `*.next.pem` with the next keys. A key is stored before it is sent to the hub, so that a registered
//! key survives a crash. With these files, a member starts without the hub.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hanse_identity::Identity;
use hanse_identity::ca::{Ca, CaError};
use hanse_identity::keys::{Certificate, Credentials, Key, KeyError};
use hanse_identity::tls::{ClientError, Connection, CredentialStore, Peer, PinnedRoot, TlsClient, Trust};
use hanse_identity::token::{Token, TokenError, TokenKind};
use hanse_proto::federation::v1 as wire;
use hanse_proto::federation::v1::registration_client::RegistrationClient;
use hanse_proto::federation::v1::renewal_client::RenewalClient;
use hanse_runtime::files;
use hanse_runtime::retry::Backoff;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use zeroize::Zeroizing;

use crate::hubs::Hubs;
use crate::resolver::Resolver;
use crate::state::State;

/// The files of the state.
const MEMBER: &str = "member.pem";
const MEMBER_NEXT: &str = "member.next.pem";
const AUTHORITY: &str = "intermediate.pem";
const AUTHORITY_NEXT: &str = "intermediate.next.pem";
const ROOT: &str = "root.pem";
/// The timeout of a call for a certificate.
const CALL_TIME: Duration = Duration::from_secs(15);

/// Why a member has no identity.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("read the token from {0}")]
    TokenFile(PathBuf, #[source] std::io::Error),
    #[error("{0} does not contain a cluster token, but {1}")]
    NoToken(PathBuf, TokenError),
    #[error("the token is for cluster {0}, not {1}")]
    OtherCluster(String, String),
    #[error("the files in {0} belong to cluster {1}, not {2}")]
    OtherFiles(PathBuf, String, String),
    #[error("the files in {0} belong to another ClusterSet than the token: use an empty directory")]
    OtherClusterSet(PathBuf),
    #[error("the hub refused: {0}")]
    Refused(String),
    #[error("the hub cannot be reached")]
    Unreachable(#[source] ClientError),
    #[error("the hub failed: {0}")]
    Failed(String),
    #[error("the response of the hub is not usable: {0}")]
    Unfit(&'static str),
    #[error("create {0}")]
    Folder(PathBuf, #[source] std::io::Error),
    #[error("stopped")]
    Stopped,
}

/// A member's identity and its cluster's own authority. Clones share them.
#[derive(Debug, Clone)]
pub struct MemberIdentity {
    state: State,
    cluster: Arc<str>,
    root: Certificate,
    credentials: CredentialStore,
    authority: watch::Sender<Arc<Ca>>,
    resolver: Resolver,
}

impl MemberIdentity {
    /// Reads the files of the state. `None`: the cluster has not joined yet.
    ///
    /// # Errors
    /// When files are damaged, readable by other users, or belong to another cluster.
    pub fn read(state: impl Into<State>, cluster: &str) -> Result<Option<Self>, RegistrationError> {
        let state = state.into();
        let Some(credentials) = read_credentials(&state, MEMBER)? else { return Ok(None) };
        let found = credentials.identity().to_string();
        if credentials.identity() != &Identity::Cluster(cluster.into()) {
            return Err(RegistrationError::OtherFiles(state.data().to_owned(), found, cluster.to_owned()));
        }
        let missing = |file: &str| KeyError::File(format!("read {file}"), std::io::ErrorKind::NotFound.into());
        let authority = read_credentials(&state, AUTHORITY)?.ok_or_else(|| missing(AUTHORITY))?;
        let authority = Ca::new(authority, false)?;
        let root = state.read(ROOT).map_err(|error| KeyError::File(format!("read {ROOT}"), error))?;
        Ok(Some(Self {
            state,
            cluster: cluster.into(),
            root: Certificate::from_pem(&root.ok_or_else(|| missing(ROOT))?)?,
            credentials: CredentialStore::new(credentials)?,
            authority: watch::Sender::new(Arc::new(authority)),
            resolver: Resolver::default(),
        }))
    }

    /// Whether the token in `token_file` belongs to another ClusterSet than the one that the cluster has joined.
    pub fn is_of_other_cluster_set(&self, token_file: &Path) -> bool {
        let token = files::read_provided_secret(token_file).ok();
        let token = token.and_then(|text| Token::parse(TokenKind::Cluster, std::str::from_utf8(&text).ok()?).ok());
        token.is_some_and(|token| token.root != self.root.fingerprint())
    }

    /// Joins with the token in `token_file`. A cluster that has joined before gets a new key, and its authority keeps the old one. Tries
    /// the addresses in `join` in turn, and waits for acceptance without a time limit. The token contains a hash that authenticates the
    /// hub.
    ///
    /// # Errors
    /// When the token is refused or malformed, or `stop` is cancelled. Other failures are retried.
    pub async fn join(
        state: impl Into<State>,
        cluster: &str,
        token_file: &Path,
        join: &[String],
        federated_allow_final: bool,
        stop: &CancellationToken,
    ) -> Result<Self, RegistrationError> {
        let state = state.into();
        let data = state.data();
        files::private_folder(data).map_err(|e| RegistrationError::Folder(data.to_owned(), e))?;
        let text = files::read_provided_secret(token_file)
            .map_err(|e| RegistrationError::TokenFile(token_file.to_owned(), e))?;
        let token = Token::parse(TokenKind::Cluster, std::str::from_utf8(&text).unwrap_or_default())
            .map_err(|error| RegistrationError::NoToken(token_file.to_owned(), error))?;
        if token.cluster != cluster {
            return Err(RegistrationError::OtherCluster(token.cluster, cluster.to_owned()));
        }
        // Before the first request: agents still depend on the existing files.
        if let Some(former) = Self::read(&state, cluster)?
            && former.root.fingerprint() != token.root
        {
            return Err(RegistrationError::OtherClusterSet(data.to_owned()));
        }
        let client = TlsClient::pinned(PinnedRoot::new(token.root, Identity::Hub))?;
        let key = next_key(&state, MEMBER_NEXT).await?;
        // Agents pin the key of the authority, so a cluster that joins again keeps it.
        let authority_key = match read_credentials(&state, AUTHORITY)? {
            Some(former) => former.key,
            None => next_key(&state, AUTHORITY_NEXT).await?,
        };
        let request = wire::JoinRequest {
            token: token.to_text(),
            cluster: cluster.to_owned(),
            request: key.request()?.into(),
            intermediate_request: authority_key.request()?.into(),
            federated_allow_final,
        };
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        for address in join.iter().cycle() {
            let response = tokio::select! {
                () = stop.cancelled() => return Err(RegistrationError::Stopped),
                response = request_join(&client, address, request.clone()) => response,
            };
            let wait = match response {
                Ok(wire::join_response::State::Issued(issued)) => {
                    let root = Certificate::from_der(&issued.root)?;
                    if root.fingerprint() != token.root {
                        return Err(RegistrationError::Unfit("the root differs from the one in the token"));
                    }
                    let authority = fitting(&authority_key, &issued.intermediate, cluster, true)?;
                    let credentials = fitting(&key, &issued.certificate, cluster, false)?;
                    write(&state, ROOT, root.to_pem().into()).await?;
                    write(&state, AUTHORITY, authority.to_pem()).await?;
                    // Last: the presence of this file means that the cluster has joined.
                    write(&state, MEMBER, credentials.to_pem()).await?;
                    info!(cluster, hub = address, key = %key.public(), "joined");
                    remove_next_keys(&state).await;
                    return Self::read(&state, cluster)?
                        .ok_or(RegistrationError::Unfit("the written files are missing"));
                }
                Ok(wire::join_response::State::Waiting(waiting)) => {
                    info!(cluster, hub = address, "waiting to be accepted: run `hanse cluster accept`");
                    backoff.reset();
                    Duration::from_millis(waiting.retry_ms.clamp(100, 60_000))
                }
                Err(error @ RegistrationError::Refused(_)) => return Err(error),
                Err(error) => {
                    warn!(error = causes(&error), cluster, hub = address, "join failed, trying again");
                    backoff.next_delay()
                }
            };
            tokio::select! {
                () = stop.cancelled() => return Err(RegistrationError::Stopped),
                () = tokio::time::sleep(wait) => {}
            }
        }
        Err(RegistrationError::Refused("--join is required".to_owned()))
    }

    pub fn cluster(&self) -> &Arc<str> {
        &self.cluster
    }

    /// The state that contains its keys.
    pub fn state(&self) -> &State {
        &self.state
    }

    pub fn root(&self) -> &Certificate {
        &self.root
    }

    /// The credentials for connections to the hub. `subscribe` on it reports renewals, after which connections must be opened again.
    pub fn credentials(&self) -> &CredentialStore {
        &self.credentials
    }

    /// The cluster's own authority, which issues the certificates of agents and the member's certificate for agents.
    pub fn authority(&self) -> Arc<Ca> {
        self.authority.borrow().clone()
    }

    /// The cluster's own authority, and each later one.
    pub fn authorities(&self) -> watch::Receiver<Arc<Ca>> {
        self.authority.subscribe()
    }

    /// Resolves hubs with `resolver`.
    pub fn with_resolver(self, resolver: Resolver) -> Self {
        Self { resolver, ..self }
    }

    /// Connects to a hub, HOST:PORT, with the newest certificate.
    ///
    /// # Errors
    /// When the root cannot be trusted, or no address of the hub can be reached.
    pub async fn connect(&self, hub: &str) -> Result<Connection, RegistrationError> {
        self.resolver.connect(&self.hub_client()?, hub).await.map_err(RegistrationError::Unreachable)
    }

    /// Opens connections to the hub: presents the member's newest certificate, and accepts the hub only.
    ///
    /// # Errors
    /// When the root cannot be trusted.
    pub fn hub_client(&self) -> Result<TlsClient, KeyError> {
        let trust = Trust::new(&self.root, |identity| *identity == Identity::Hub)?;
        TlsClient::mutual(self.credentials.clone(), &trust)
    }

    /// Renews the certificate before it expires, at one of `hubs`; after it has expired, at one of `join`. Returns at `stop`.
    pub async fn keep_fresh(self, hubs: Hubs, join: Vec<String>, stop: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        loop {
            let certificate = self.credentials.current().certificate;
            let wait = certificate.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            let late = SystemTime::now() >= certificate.not_after;
            let addresses = if late { join.clone() } else { hubs.all() };
            let mut renewed = false;
            for address in &addresses {
                let attempt = async { if late { self.renew_late(address).await } else { self.renew(address).await } };
                match attempt.await {
                    Ok(()) => {
                        info!(cluster = %self.cluster, hub = address, late, "certificate renewed");
                        renewed = true;
                        break;
                    }
                    Err(error) => {
                        warn!(error = causes(&error), cluster = %self.cluster, hub = address, late, "certificate not renewed")
                    }
                }
            }
            if renewed {
                backoff.reset();
            } else if !backoff.wait(&stop).await {
                return;
            }
        }
    }

    /// Requests a certificate for a new key, authenticated by the current one. Renews the intermediate as well when it is due.
    ///
    /// # Errors
    /// When the hub cannot be reached or refuses. The current certificate stays in use.
    pub async fn renew(&self, address: &str) -> Result<(), RegistrationError> {
        let key = next_key(&self.state, MEMBER_NEXT).await?;
        let authority = self.authority();
        let due = authority.certificate().renew_at() <= SystemTime::now();
        // The intermediate keeps its key, because agents pin it.
        let intermediate_request = if due { authority.credentials().key.request()? } else { Vec::new() };
        let request =
            wire::RenewRequest { request: key.request()?.into(), intermediate_request: intermediate_request.into() };
        let connection = self.connect(address).await?;
        let answer = call(&connection.peer, RenewalClient::new(connection.channel).renew(request)).await?;
        let issued = answer.issued.ok_or(RegistrationError::Unfit("it is empty"))?;
        let credentials = fitting(&key, &issued.certificate, &self.cluster, false)?;
        write(&self.state, MEMBER, credentials.to_pem()).await?;
        self.credentials.replace(credentials)?;
        if due {
            let renewed = fitting(&authority.credentials().key, &issued.intermediate, &self.cluster, true)?;
            write(&self.state, AUTHORITY, renewed.to_pem()).await?;
            self.authority.send_replace(Arc::new(Ca::new(renewed, false)?));
        }
        remove_next_keys(&self.state).await;
        Ok(())
    }

    /// Requests a certificate for the registered key after the current certificate has expired.
    ///
    /// # Errors
    /// When the hub cannot be reached or refuses.
    pub async fn renew_late(&self, address: &str) -> Result<(), RegistrationError> {
        let trust = Trust::new(&self.root, |identity| *identity == Identity::Hub)?;
        let client = TlsClient::anonymous(&trust)?;
        // If the response to a renewal was lost, the next key is already registered.
        let keys = [Some(self.credentials.current().key), read_key(&self.state, MEMBER_NEXT)?];
        let mut refused = RegistrationError::Unfit("it is empty");
        for key in keys.into_iter().flatten() {
            let request = wire::RenewLateRequest { request: key.request()?.into() };
            let connection = self.resolver.connect(&client, address).await;
            let connection = connection.map_err(RegistrationError::Unreachable)?;
            match call(&connection.peer, RegistrationClient::new(connection.channel).renew_late(request)).await {
                Ok(answer) => {
                    let credentials = fitting(&key, &answer.certificate, &self.cluster, false)?;
                    write(&self.state, MEMBER, credentials.to_pem()).await?;
                    self.credentials.replace(credentials)?;
                    return Ok(());
                }
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }
}

async fn request_join(
    client: &TlsClient,
    address: &str,
    request: wire::JoinRequest,
) -> Result<wire::join_response::State, RegistrationError> {
    let connection = client.connect(address).await.map_err(RegistrationError::Unreachable)?;
    let answer = call(&connection.peer, RegistrationClient::new(connection.channel).join(request)).await?;
    answer.state.ok_or(RegistrationError::Unfit("it is empty"))
}

async fn call<T>(
    hub: &Peer,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, RegistrationError> {
    let late = |_| RegistrationError::Failed(format!("no response within {} s", CALL_TIME.as_secs()));
    match tokio::time::timeout(CALL_TIME, answer).await.map_err(late)? {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => {
            use tonic::Code::{FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated};
            let text = hub.explain(&status);
            let refused = [FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated];
            match refused.contains(&status.code()) {
                true => Err(RegistrationError::Refused(text)),
                false => Err(RegistrationError::Failed(text)),
            }
        }
    }
}

/// An error with its sources.
fn causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |it| it.source()).fold(error.to_string(), |text, it| format!("{text}: {it}"))
}

/// The issued certificate with its key. Checks that it matches the request.
fn fitting(key: &Key, der: &[u8], cluster: &str, authority: bool) -> Result<Credentials, RegistrationError> {
    let certificate = Certificate::from_der(der)?;
    if certificate.identity != Identity::Cluster(cluster.into()) {
        return Err(RegistrationError::Unfit("the certificate is for another identity"));
    }
    if certificate.is_ca != authority {
        let expected =
            if authority { "the certificate is not an authority" } else { "the certificate is an authority" };
        return Err(RegistrationError::Unfit(expected));
    }
    Ok(Credentials::new(key.clone(), certificate)?)
}

fn read_credentials(state: &State, file: &str) -> Result<Option<Credentials>, KeyError> {
    let bytes = state.read_key(file).map_err(|error| KeyError::File(format!("read {file}"), error))?;
    bytes.map(|bytes| Credentials::from_pem(&bytes)).transpose()
}

fn read_key(state: &State, file: &str) -> Result<Option<Key>, KeyError> {
    let bytes = state.read_key(file).map_err(|error| KeyError::File(format!("read {file}"), error))?;
    bytes.map(|bytes| Key::from_pem(&bytes)).transpose()
}

/// The key of a request that had no answer, or a new one.
async fn next_key(state: &State, file: &'static str) -> Result<Key, KeyError> {
    if let Some(key) = read_key(state, file)? {
        return Ok(key);
    }
    let key = Key::generate()?;
    write(state, file, key.to_pem()).await?;
    Ok(key)
}

/// Writes a file of the state, which may take the time of a request.
async fn write(state: &State, file: &'static str, text: Zeroizing<String>) -> Result<(), KeyError> {
    let state = state.clone();
    let writing = tokio::task::spawn_blocking(move || state.write(file, text.as_bytes()));
    let written = writing.await.map_err(std::io::Error::from).flatten();
    written.map_err(|error| KeyError::File(format!("write {file}"), error))
}

async fn remove_next_keys(state: &State) {
    for file in [MEMBER_NEXT, AUTHORITY_NEXT] {
        let state = state.clone();
        // A remaining key is used for the next request.
        let _ = tokio::task::spawn_blocking(move || state.remove(file)).await;
    }
}
