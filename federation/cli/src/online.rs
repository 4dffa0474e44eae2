//! Commands that ask a hub, over mutual TLS, as the user whose certificate the context file names.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_proto::federation::v1::administration_client::AdministrationClient;
use hanse_runtime::Identity;
use hanse_runtime::keys::{Certificate, Credentials};
use hanse_runtime::tls::{CredentialStore, TlsClient, Trust, install_provider};
use serde::Deserialize;
use tonic::transport::Channel;

pub mod cluster;
pub mod object;
pub mod status;
pub mod token;
pub mod wait;

/// The largest answer: all manifests of a hub with 10,000 objects of 6 KiB.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How long one answer may take.
const CALL_TIME: Duration = Duration::from_secs(30);

/// A context file, YAML or JSON. Paths are relative to the file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContextFile {
    hubs: Vec<String>,
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

pub type Client = AdministrationClient<Channel>;

/// Runs `work` with a client of the first hub of the context that answers.
pub fn with_client<T, F>(context: Option<&Path>, work: impl FnOnce(Client) -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    connected(context, async |channel| {
        work(AdministrationClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)).await
    })
}

/// Runs `work` with a connection to the first hub of the context that answers.
pub fn connected<T>(context: Option<&Path>, work: impl AsyncFnOnce(Channel) -> anyhow::Result<T>) -> anyhow::Result<T> {
    install_provider();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start")?;
    runtime.block_on(async { work(connect(context).await?).await })
}

async fn connect(context: Option<&Path>) -> anyhow::Result<Channel> {
    let path = context.context("no hub is known: name a context file with --context or HANSE_CONTEXT")?;
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let file: ContextFile = serde_yaml_ng::from_str(&text).with_context(|| format!("understand {}", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let credentials = Credentials::read(&folder.join(file.key), &folder.join(file.certificate))?;
    let root = Certificate::read(&folder.join(file.ca))?;
    let trust = Trust::new(&root, |identity| *identity == Identity::Hub)?;
    let client = TlsClient::mutual(CredentialStore::new(credentials)?, &trust)?;
    let mut last = None;
    for hub in &file.hubs {
        match client.connect(hub).await {
            Ok(connection) => return Ok(connection.channel),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error).context("no hub answers"),
        None => bail!("{} names no hub", path.display()),
    }
}

/// Waits for an answer; a refusal is told in the hub's words.
pub async fn call<T>(answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> anyhow::Result<T> {
    match tokio::time::timeout(CALL_TIME, answer).await {
        Err(_) => bail!("the hub did not answer within {} seconds", CALL_TIME.as_secs()),
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => bail!("{}", status.message()),
    }
}

/// A time of the hub's clock, RFC 3339.
pub fn time(seconds: u64) -> String {
    let at = i64::try_from(seconds).ok().and_then(|at| time::OffsetDateTime::from_unix_timestamp(at).ok());
    let format = &time::format_description::well_known::Rfc3339;
    at.filter(|_| seconds > 0).and_then(|at| at.format(format).ok()).unwrap_or_else(|| "-".to_owned())
}
