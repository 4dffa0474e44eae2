//! The node's certificate: enrolment with a node token, and renewal.
//!
//! Files in the data directory: `node.pem` (key and certificate, 0600) and `authority.pem` (the cluster's intermediate).
//!
//! A valid certificate is renewed with itself. An expired one is renewed late, with a proof of its registered key. If the member refuses
//! the node, or has another authority than the one at which the node enrolled (the member was set up again, or the cluster renamed), an
//! unused node token enrols the node again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail, ensure};
use hanse_identity::Identity;
use hanse_identity::keys::{Certificate, Credentials, Fingerprint, Key};
use hanse_identity::tls::{CredentialStore, PinnedRoot, TlsClient, Trust};
use hanse_identity::token::{Token, TokenKind};
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_proto::agent::v1::enrolment_client::EnrolmentClient;
use hanse_runtime::files;
use hanse_runtime::moment::rfc3339;
use hanse_runtime::retry::Backoff;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::pod_ranges;

/// Some 1.5 KiB are usual.
const MAX_SERVICE_ACCOUNT_TOKEN_BYTES: u64 = 8 * 1024;
/// How long a member may take to accept a connection.
const REACH_TIME: Duration = Duration::from_secs(5);

/// The address and the proof of enrolment.
#[derive(Debug, Clone)]
pub struct Enrolment {
    /// Enrolment address of the member, HOST:PORT.
    pub address: Option<String>,
    pub proof: Option<Proof>,
}

/// What identifies the node when it enrols, and the member to it.
#[derive(Debug, Clone)]
pub enum Proof {
    /// The file of a node token, which names the cluster's authority.
    NodeToken(PathBuf),
    /// A token of the agents' service account.
    ServiceAccount {
        /// The token, bound to the pod of the agent. It is replaced before it expires.
        token_file: PathBuf,
        /// The certificate of the cluster's authority, PEM.
        authority_file: PathBuf,
    },
}

/// A token, and the authority to which it may be presented.
struct Presentable {
    token: String,
    root: PinnedRoot,
    authority: Fingerprint,
}

/// Why the member did not issue a certificate.
#[derive(Debug, thiserror::Error)]
enum CertificateError {
    /// Another request would have the same answer.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// Why a node cannot connect to its member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// The member refuses this key.
    OfKey(Fingerprint),
    /// The member has another authority than this one, at which the node enrolled.
    OfAuthority(Fingerprint),
}

#[derive(Debug, Clone)]
pub struct NodeIdentity {
    data: PathBuf,
    node: Arc<str>,
    authority: watch::Sender<Certificate>,
    pub credentials: CredentialStore,
    /// The last rejection.
    refused: watch::Sender<Option<Rejection>>,
}

impl NodeIdentity {
    /// `None`: the node has not enrolled yet.
    pub fn read(data: &Path, node: &str) -> anyhow::Result<Option<Self>> {
        if !data.join("node.pem").exists() {
            return Ok(None);
        }
        let credentials = Credentials::read_file(&data.join("node.pem"))?;
        check_node(&credentials.certificate, node)
            .with_context(|| format!("use {}", data.join("node.pem").display()))?;
        Ok(Some(Self {
            data: data.to_owned(),
            node: node.into(),
            authority: watch::Sender::new(Certificate::read(&data.join("authority.pem"))?),
            credentials: CredentialStore::new(credentials)?,
            refused: watch::Sender::new(None),
        }))
    }

    /// Enrols for the first time; tries until it succeeds or is refused. The token is not presented before one of `members` is
    /// reachable: wrong addresses must show while the token is unused.
    pub async fn enrol(
        data: &Path,
        node: &str,
        enrolment: &Enrolment,
        members: &[String],
        stop: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let address = enrolment.address.as_ref();
        let address = address.context("the node has not enrolled: set --enrol and --token-file")?;
        let proof = enrolment.proof.as_ref();
        let proof =
            proof.context("the node has not enrolled: set --token-file, or --service-account-token and --authority")?;
        if let Proof::NodeToken(_) = proof {
            proof.read()?;
        }
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            // The files of a service account appear late, and are replaced.
            let token = async { reach(members).await.and_then(|()| proof.read()) };
            let presented = match token.await {
                Ok(token) => present(data, node, address, &token).await,
                Err(error) => Err(error.into()),
            };
            match presented {
                Ok(_) => return Self::read(data, node)?.context("the files of the enrolment are missing"),
                Err(refused @ CertificateError::Refused(_)) => return Err(refused.into()),
                Err(CertificateError::Failed(error)) => {
                    tracing::warn!(error = format!("{error:#}"), member = address, "not enrolled, trying again");
                }
            }
            if !backoff.wait(stop).await {
                bail!("stopped");
            }
        }
    }

    /// A client for the member of this node's cluster only.
    pub fn client(&self) -> anyhow::Result<TlsClient> {
        Ok(TlsClient::mutual(self.credentials.clone(), &self.trust()?)?)
    }

    fn trust(&self) -> anyhow::Result<Trust> {
        let authority = self.authority.borrow();
        let cluster = authority.identity.clone();
        Ok(Trust::new(&authority, move |identity| *identity == cluster)?)
    }

    /// # Errors
    /// When the certificate has expired.
    pub fn check_time(&self) -> anyhow::Result<()> {
        let not_after = self.credentials.current().certificate.not_after;
        ensure!(SystemTime::now() < not_after, "this node's certificate expired at {}", rfc3339(not_after));
        Ok(())
    }

    /// The authority at which the node enrolled.
    pub fn authority(&self) -> Fingerprint {
        self.authority.borrow().fingerprint()
    }

    /// Records a rejection, which [`Self::keep_fresh`] may resolve.
    pub fn note(&self, rejection: Rejection) {
        self.refused.send_replace(Some(rejection));
    }

    /// Renews the certificate, in time or late, or enrols again if the member refuses the node. Returns at `stop`.
    pub async fn keep_fresh(self, members: Vec<String>, enrolment: Enrolment, stop: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let mut rejections = self.refused.subscribe();
        loop {
            let certificate = self.credentials.current().certificate;
            let wait = certificate.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
            let refused = tokio::select! {
                () = stop.cancelled() => return,
                _ = rejections.changed() => true,
                () = tokio::time::sleep(wait) => false,
            };
            let renewed = if refused {
                let rejection = *rejections.borrow_and_update();
                match rejection {
                    Some(Rejection::OfKey(key)) if key == certificate.public => {
                        self.enrol_anew(&enrolment, "the member refuses this node's key".to_owned()).await
                    }
                    Some(Rejection::OfAuthority(known)) if known == self.authority() => {
                        self.enrol_at_other_authority(&enrolment).await
                    }
                    // The refused certificate has been replaced.
                    _ => continue,
                }
            } else if SystemTime::now() >= certificate.not_after {
                self.renew_late(&enrolment).await
            } else {
                self.renew_at_any(&members).await
            };
            match renewed {
                Ok(()) => backoff.reset(),
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "certificate not renewed, trying again");
                    if !backoff.wait(&stop).await {
                        return;
                    }
                }
            }
        }
    }

    async fn renew_at_any(&self, members: &[String]) -> anyhow::Result<()> {
        for member in members {
            match self.renew(member).await {
                Ok(()) => {
                    tracing::info!(member, "certificate renewed");
                    return Ok(());
                }
                Err(error) => tracing::warn!(error = format!("{error:#}"), member, "certificate not renewed"),
            }
        }
        let not_after = self.credentials.current().certificate.not_after;
        bail!("no member renewed the certificate, which expires at {}", rfc3339(not_after))
    }

    async fn renew(&self, member: &str) -> anyhow::Result<()> {
        let key = Key::generate()?;
        let connection = self.client()?.connect(member).await?;
        let request = wire::RenewRequest { request: key.request()?.into() };
        let answer = AgentsClient::new(connection.channel).renew(request).await;
        let answer =
            answer.map_err(|status| anyhow::anyhow!("renew: {}", connection.peer.explain(&status)))?.into_inner();
        self.take(key, &answer)
    }

    /// Renews an expired certificate, for its key.
    async fn renew_late(&self, enrolment: &Enrolment) -> anyhow::Result<()> {
        let ended = self.check_time().err().map(|error| error.to_string()).unwrap_or_default();
        let Some(address) = &enrolment.address else { bail!("{ended}; set --enrol to renew it") };
        let key = self.credentials.current().key;
        let attempt = async {
            let request = wire::RenewLateRequest {
                node: self.node.to_string(),
                request: key.request().context("sign the request")?.into(),
            };
            let client = TlsClient::anonymous(&self.trust()?).context("trust the cluster's authority")?;
            let connection = client.connect(address).await.context("connect to renew the expired certificate")?;
            EnrolmentClient::new(connection.channel).renew_late(request).await.map_err(CertificateError::of)
        };
        match attempt.await {
            Ok(answer) => {
                self.take(key.clone(), answer.get_ref())?;
                tracing::info!(member = address, late = true, "certificate renewed");
                Ok(())
            }
            Err(CertificateError::Failed(error)) => Err(error.context(ended)),
            Err(CertificateError::Refused(reason)) => {
                self.enrol_anew(enrolment, format!("{ended}, and the member does not renew it: {reason}")).await
            }
        }
    }

    /// Starts to use a certificate for `key`.
    fn take(&self, key: Key, answer: &wire::EnrolResponse) -> anyhow::Result<()> {
        let certificate = Certificate::from_der(&answer.certificate)?;
        if certificate.identity != self.credentials.current().certificate.identity {
            bail!("the member issued a certificate for {}", certificate.identity);
        }
        let credentials = Credentials::new(key, certificate)?;
        credentials.write_file(&self.data.join("node.pem"))?;
        self.credentials.replace(credentials)?;
        Ok(())
    }

    /// Enrols with a token of the member's present authority. An impostor at the member's address can cause an attempt, but learns
    /// nothing: the token is presented only to the authority that it names.
    async fn enrol_at_other_authority(&self, enrolment: &Enrolment) -> anyhow::Result<()> {
        let why = "the member has another authority than the one at which this node enrolled, so it was set up again, or the \
                   address is another's";
        let token = enrolment.proof.as_ref().map(|proof| (proof, proof.read()));
        if let Some((proof, Ok(token))) = token
            && token.authority == self.authority()
        {
            match proof {
                Proof::NodeToken(_) => bail!(
                    "{why}; the token in --token-file is of the former authority: put a new node token of this member there"
                ),
                Proof::ServiceAccount { .. } => bail!("{why}; the file of --authority has the former authority"),
            }
        }
        self.enrol_anew(enrolment, why.to_owned()).await
    }

    /// Enrols with a node token, because of `why`.
    async fn enrol_anew(&self, enrolment: &Enrolment, why: String) -> anyhow::Result<()> {
        let help = format!("{why}; set --token-file to a new node token, and --enrol");
        let (Some(address), Some(proof)) = (&enrolment.address, &enrolment.proof) else { bail!(help) };
        // Read each time: a new token may have been put into the file.
        let issued = match proof.read() {
            Ok(token) => present(&self.data, &self.node, address, &token).await,
            Err(error) => Err(error.into()),
        };
        let (credentials, authority) = issued.context(help)?;
        self.authority.send_replace(authority);
        self.credentials.replace(credentials)?;
        Ok(())
    }
}

impl CertificateError {
    fn of(status: tonic::Status) -> Self {
        match is_refusal(&status) {
            true => Self::Refused(format!("the member refused: {}", status.message())),
            false => Self::Failed(anyhow::Error::new(status).context("request a certificate")),
        }
    }
}

/// Fails if none of the members can be reached.
async fn reach(members: &[String]) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for member in members {
        match tokio::time::timeout(REACH_TIME, TcpStream::connect(member.as_str())).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => failed.push(format!("{member}: {error}")),
            Err(_) => failed.push(format!("{member}: no answer within {} s", REACH_TIME.as_secs())),
        }
    }
    bail!("no --member can be reached, and the node token stays unused: {}", failed.join("; "))
}

impl Proof {
    /// Reads the files.
    fn read(&self) -> anyhow::Result<Presentable> {
        match self {
            Self::NodeToken(path) => {
                let text = files::read_provided_secret(path).with_context(|| format!("read {}", path.display()))?;
                let token = Token::parse(TokenKind::Node, std::str::from_utf8(&text).unwrap_or_default());
                let token = token.map_err(|error| anyhow!("{}: {error}", path.display()))?;
                let member = Identity::cluster(&token.cluster).context("read the token's cluster")?;
                let (text, authority) = (token.to_text(), token.root);
                Ok(Presentable { token: text, root: PinnedRoot::new(authority, member), authority })
            }
            Self::ServiceAccount { token_file, authority_file } => {
                let token = read_service_account_token(token_file)?;
                let authority = Certificate::read(authority_file)
                    .with_context(|| format!("read the cluster's authority in {}", authority_file.display()))?;
                let fingerprint = authority.fingerprint();
                let root = PinnedRoot::new(fingerprint, authority.identity);
                Ok(Presentable { token, root, authority: fingerprint })
            }
        }
    }
}

/// The kubelet determines the mode of the file, and the volume is the pod's own.
fn read_service_account_token(path: &Path) -> anyhow::Result<String> {
    let read = || {
        ensure!(path.metadata()?.len() <= MAX_SERVICE_ACCOUNT_TOKEN_BYTES, "larger than 8 KiB");
        anyhow::Ok(std::fs::read_to_string(path)?)
    };
    let text = read().with_context(|| format!("read the service-account token in {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// Presents a token, and writes the certificate, the authority and the pod ranges of the answer.
async fn present(
    data: &Path,
    node: &str,
    address: &str,
    token: &Presentable,
) -> Result<(Credentials, Certificate), CertificateError> {
    let prepared = async {
        files::private_folder(data).with_context(|| format!("create {}", data.display()))?;
        let client = TlsClient::pinned(token.root.clone()).context("trust the token's authority")?;
        // Written first: the token is bound to this key, also when the answer is missed.
        let key = Key::read_or_generate(&data.join("node.next.pem")).context("generate a key")?;
        let request = key.request().context("sign the request")?;
        let connection = client.connect(address).await.context("reach the member")?;
        anyhow::Ok((connection, key, request))
    };
    let (connection, key, request) = prepared.await?;
    let request = wire::EnrolRequest { token: token.token.clone(), request: request.into(), node: node.to_owned() };
    let answer =
        EnrolmentClient::new(connection.channel).enrol(request).await.map_err(CertificateError::of)?.into_inner();
    let keep = || {
        let authority = Certificate::from_der(&answer.authority)?;
        ensure!(authority.fingerprint() == token.authority, "the member's authority is not that of the token");
        let certificate = Certificate::from_der(&answer.certificate)?;
        check_node(&certificate, node)?;
        let mut ranges = hanse_protocol::parse_nets(answer.pod_ranges.clone()).context("read the pod ranges")?;
        ranges.truncate(pod_ranges::MAX);
        pod_ranges::write(data, &ranges).context("write the pod ranges")?;
        authority.write(&data.join("authority.pem"))?;
        // Written last: its presence shows that the node has enrolled.
        let credentials = Credentials::new(key, certificate)?;
        credentials.write_file(&data.join("node.pem"))?;
        let _ = std::fs::remove_file(data.join("node.next.pem"));
        anyhow::Ok((credentials, authority))
    };
    // Another answer of the member would be wrong as well.
    let kept = keep().map_err(|error| CertificateError::Refused(format!("use what the member issued: {error:#}")))?;
    tracing::info!(node, "enrolled");
    Ok(kept)
}

fn check_node(certificate: &Certificate, node: &str) -> anyhow::Result<()> {
    let fits = matches!(&certificate.identity, Identity::Node { node: own, .. } if **own == *node);
    ensure!(fits, "the certificate is for {}, not for node {node}", certificate.identity);
    Ok(())
}

pub fn is_refusal(status: &tonic::Status) -> bool {
    use tonic::Code::{FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated};
    [FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated].contains(&status.code())
}

#[cfg(test)]
mod tests {
    use hanse_identity::TrustDomain;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn token_stays_unused_until_a_member_can_be_reached() {
        let folder = tempfile::tempdir().expect("a directory");
        let enrolling = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        // A port that was free a moment ago.
        let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port");
        let domain = TrustDomain::new("hanse.test").expect("a domain");
        let token = Token::generate(TokenKind::Node, "c", domain, Fingerprint([0; 32])).expect("a token").to_text();
        let token_file = folder.path().join("token");
        files::write_secret(&token_file, token.as_bytes()).expect("written");
        let enrolment = Enrolment {
            address: Some(enrolling.local_addr().expect("bound").to_string()),
            proof: Some(Proof::NodeToken(token_file)),
        };
        let stop = CancellationToken::new();
        let (data, members) = (folder.path().join("data"), [closed.to_string()]);
        let message = reach(&members).await.expect_err("there is no listener").to_string();
        assert!(
            message.contains("--member") && message.contains(&members[0]) && message.contains("unused"),
            "{message}"
        );
        let enrol = NodeIdentity::enrol(&data, "n", &enrolment, &members, &stop);
        tokio::pin!(enrol);
        let mut tries = tokio::time::interval(Duration::from_millis(20));
        // It keeps trying, and presents the token as soon as the member listens.
        for _ in 0..20 {
            tokio::select! {
                _ = &mut enrol => panic!("it tries until it succeeds"),
                _ = enrolling.accept() => panic!("the token is presented"),
                _ = tries.tick() => {}
            }
        }
        let _member = TcpListener::bind(closed).await.expect("still free");
        let presented = async {
            tokio::select! {
                _ = &mut enrol => panic!("it tries until it succeeds"),
                accepted = enrolling.accept() => accepted.is_ok(),
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(60), presented).await.expect("in time"));
    }
}
