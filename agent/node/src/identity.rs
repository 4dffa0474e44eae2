//! The node's certificate: enrolment with a node token, and renewal.
//!
//! In the data folder: `node.pem` (key and certificate, 0600) and `authority.pem` (the cluster's intermediate).

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_proto::agent::v1::enrolment_client::EnrolmentClient;
use hanse_runtime::keys::{Certificate, Credentials, Key};
use hanse_runtime::retry::Backoff;
use hanse_runtime::tls::{CredentialStore, PinnedRoot, TlsClient, Trust};
use hanse_runtime::token::Token;
use hanse_runtime::{Identity, files};
use tokio_util::sync::CancellationToken;

#[derive(Debug, Clone)]
pub struct NodeIdentity {
    data: PathBuf,
    authority: Certificate,
    pub credentials: CredentialStore,
}

impl NodeIdentity {
    /// `None`: the node has not enrolled yet.
    pub fn read(data: &Path, node: &str) -> anyhow::Result<Option<Self>> {
        if !data.join("node.pem").exists() {
            return Ok(None);
        }
        let credentials = Credentials::read_file(&data.join("node.pem"))?;
        match credentials.identity() {
            Identity::Node { node: own, .. } if **own == *node => {}
            other => bail!("{} is the identity of {other}, not of node {node}", data.join("node.pem").display()),
        }
        let authority = Certificate::read(&data.join("authority.pem"))?;
        Ok(Some(Self { data: data.to_owned(), authority, credentials: CredentialStore::new(credentials)? }))
    }

    /// Enrols with the token in `token_file`; tries until it succeeds or is refused.
    pub async fn enrol(
        data: &Path,
        node: &str,
        address: &str,
        token_file: &Path,
        stop: &CancellationToken,
    ) -> anyhow::Result<Self> {
        files::private_folder(data).with_context(|| format!("make {}", data.display()))?;
        let text = files::read_secret(token_file).with_context(|| format!("read {}", token_file.display()))?;
        let token = std::str::from_utf8(&text).ok().and_then(Token::parse);
        let token = token.with_context(|| format!("{} holds no node token", token_file.display()))?;
        let member = Identity::cluster(&token.cluster)?;
        let client = TlsClient::pinned(PinnedRoot::new(token.root, member))?;
        let key = Key::read_or_generate(&data.join("node.next.pem"))?;
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let request = wire::EnrolRequest { token: token.to_text(), request: key.request()?.into() };
            let asked = async {
                let connection =
                    client.connect(address).await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
                EnrolmentClient::new(connection.channel).enrol(request).await
            };
            match asked.await {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    let authority = Certificate::from_der(&answer.authority)?;
                    if authority.fingerprint() != token.root {
                        bail!("the member's authority is not the one in the token");
                    }
                    let certificate = Certificate::from_der(&answer.certificate)?;
                    let fits = matches!(&certificate.identity, Identity::Node { node: own, .. } if **own == *node);
                    if !fits {
                        bail!("the token is for {}, not for node {node}", certificate.identity);
                    }
                    authority.write(&data.join("authority.pem"))?;
                    // The last: its presence says that the node has enrolled.
                    Credentials::new(key, certificate)?.write_file(&data.join("node.pem"))?;
                    let _ = std::fs::remove_file(data.join("node.next.pem"));
                    tracing::info!(node, "enrolled");
                    return Self::read(data, node)?.context("the files are gone");
                }
                Err(status) if is_refusal(&status) => bail!("the member refused: {}", status.message()),
                Err(status) => tracing::warn!(error = status.message(), member = address, "not enrolled, trying again"),
            }
            if !backoff.wait(stop).await {
                bail!("stopped");
            }
        }
    }

    /// Opens connections to the member of this node's cluster, and to nobody else.
    pub fn client(&self) -> anyhow::Result<TlsClient> {
        let cluster = self.authority.identity.clone();
        let trust = Trust::new(&self.authority, move |identity| *identity == cluster)?;
        Ok(TlsClient::mutual(self.credentials.clone(), &trust)?)
    }

    /// Renews the certificate in time. Returns at `stop`.
    pub async fn keep_fresh(self, members: Vec<String>, stop: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        loop {
            let certificate = self.credentials.current().certificate;
            let wait = certificate.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            let mut renewed = false;
            for member in &members {
                match self.renew(member).await {
                    Ok(()) => {
                        tracing::info!(member, "certificate renewed");
                        renewed = true;
                        break;
                    }
                    Err(error) => tracing::warn!(error = format!("{error:#}"), member, "certificate not renewed"),
                }
            }
            if renewed {
                backoff.reset();
            } else if !backoff.wait(&stop).await {
                return;
            }
        }
    }

    async fn renew(&self, member: &str) -> anyhow::Result<()> {
        let key = Key::generate()?;
        let connection = self.client()?.connect(member).await?;
        let request = wire::RenewRequest { request: key.request()?.into() };
        let answer = AgentsClient::new(connection.channel).renew(request).await?.into_inner();
        let certificate = Certificate::from_der(&answer.certificate)?;
        if certificate.identity != self.credentials.current().certificate.identity {
            bail!("the member issued a certificate for {}", certificate.identity);
        }
        let credentials = Credentials::new(key, certificate)?;
        credentials.write_file(&self.data.join("node.pem"))?;
        self.credentials.replace(credentials)?;
        Ok(())
    }
}

fn is_refusal(status: &tonic::Status) -> bool {
    use tonic::Code::{FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated};
    [FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated].contains(&status.code())
}
