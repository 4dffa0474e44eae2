//! Commands that call a hub over mutual TLS, as the user of the context file.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use hanse_identity::Identity;
use hanse_identity::context::Context;
use hanse_identity::keys::{Certificate, Credentials};
use hanse_identity::tls::{CredentialStore, TlsClient, Trust, install_provider};
use hanse_proto::federation::v1::administration_client::AdministrationClient;
use hanse_runtime::moment::rfc3339;
use tonic::transport::Channel;

use crate::output;

pub mod audit;
pub mod cluster;
pub mod describe;
pub mod kind;
mod management;
mod manifest;
pub mod node;
pub mod object;
mod reason;
pub mod status;
pub mod token;
pub mod user;
pub mod version;
pub mod wait;
pub mod watch;

/// The largest response: all manifests of a hub with 10,000 objects of 6 KiB.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How long to retry while the hub refuses connections.
const PATIENCE: Duration = Duration::from_secs(3);
/// Time limit of one call.
const CALL_TIME: Duration = Duration::from_secs(30);

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
fn connected<T>(context: Option<&Path>, work: impl AsyncFnOnce(Channel) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let (runtime, channel) = open(context)?;
    runtime.block_on(work(channel))
}

/// A connection to the first hub of the context that answers, and the runtime that drives it.
pub fn open(context: Option<&Path>) -> anyhow::Result<(tokio::runtime::Runtime, Channel)> {
    install_provider();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start")?;
    let channel = runtime.block_on(connect(context, PATIENCE))?;
    Ok((runtime, channel))
}

/// A connection to the first hub of the context that answers, without waiting for one that does not listen yet.
pub async fn connect_once(context: &Path) -> anyhow::Result<Channel> {
    install_provider();
    connect(Some(context), Duration::ZERO).await
}

async fn connect(context: Option<&Path>, patience: Duration) -> anyhow::Result<Channel> {
    let path = context.context(
        "no context file: set --context FILE or HANSE_CONTEXT; `hanse-hub init` writes the administrator's context, \
         `hanse user create` that of each user",
    )?;
    let file = read_context(path)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let credentials = Credentials::read(&folder.join(file.key), &folder.join(file.certificate))?;
    let root = Certificate::read(&folder.join(file.ca))?;
    let domain = root.trust_domain.to_string();
    if let Some(other) = file.trust_domain.filter(|other| *other != domain) {
        anyhow::bail!("context {}: the trust domain is {other}, but the CA belongs to {domain}", path.display());
    }
    check_time(&credentials)?;
    let trust = Trust::new(&root, |identity| *identity == Identity::Hub)?;
    let client = TlsClient::mutual(CredentialStore::new(credentials)?, &trust)?;
    anyhow::ensure!(!file.hubs.is_empty(), "context {}: hubs is empty", path.display());
    let (start, mut said) = (Instant::now(), false);
    loop {
        let (mut tried, mut passing, mut refused) = (Vec::new(), false, true);
        for hub in &file.hubs {
            match client.connect(hub).await {
                Ok(connection) => return Ok(connection.channel),
                Err(error) => {
                    passing |= error.is_passing();
                    refused &= error.is_refused();
                    tried.push(format!("{:#}", anyhow::Error::from(error)));
                }
            }
        }
        // A hub that was started a moment ago does not listen yet.
        if refused && start.elapsed() < patience {
            if !said && start.elapsed() > Duration::from_secs(1) {
                said = true;
                let hubs = file.hubs.join(", ");
                output::note(format_args!("waiting for the hub at {hubs}: connection refused"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        }
        let text = format!("hub unreachable: {}; the context file is {}", tried.join("; "), path.display());
        return Err(if passing { CallError::Unreachable(text).into() } else { anyhow::anyhow!(text) });
    }
}

/// Reports a certificate outside its validity before connecting: the TLS alert of the hub has fewer details.
fn check_time(credentials: &Credentials) -> anyhow::Result<()> {
    let (who, certificate) = (credentials.identity(), &credentials.certificate);
    let now = SystemTime::now();
    let clock = format!("this machine's clock says {}", rfc3339(now));
    if now < certificate.not_before {
        let from = rfc3339(certificate.not_before);
        anyhow::bail!("the certificate of {who} is not valid before {from}, and {clock}: check this machine's clock");
    }
    if certificate.not_after <= now {
        let ended = rfc3339(certificate.not_after);
        anyhow::bail!(
            "the certificate of {who} expired at {ended}, and {clock}: check this machine's clock, or have an administrator \
             create a new certificate with `hanse user create`"
        );
    }
    Ok(())
}

/// Reads a context file. The error contains nothing of a file that is not one: it may be a private key.
fn read_context(path: &Path) -> anyhow::Result<Context> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read the context {}", path.display()))?;
    serde_yaml_ng::from_str(&text).map_err(|error| {
        let message = error.to_string();
        // This message contains the name of a field only; all others may quote the file.
        let found = match (message.starts_with("missing field"), error.location()) {
            (true, _) => format!("{message}: "),
            (false, Some(location)) => format!("line {}: ", location.line()),
            (false, None) => String::new(),
        };
        let wanted = "expected a mapping with hubs, ca, certificate and key";
        anyhow::anyhow!("{} is not a context file: {found}{wanted}", path.display())
    })
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The hub refused the call.
    #[error("{message}{}", advice(*code))]
    Refused { code: tonic::Code, message: String },
    /// The hub did not answer. A later call may succeed.
    #[error("{0}")]
    Unreachable(String),
}

/// What to do, where the code implies it.
fn advice(code: tonic::Code) -> &'static str {
    match code {
        tonic::Code::PermissionDenied => "; `hanse user list` shows the roles of each user",
        tonic::Code::Unimplemented => "; the hub may be older than this command",
        _ => "",
    }
}

impl CallError {
    /// Whether the call may succeed when it is repeated.
    pub fn is_passing(error: &anyhow::Error) -> bool {
        matches!(error.downcast_ref(), Some(Self::Unreachable(_)))
    }

    pub fn is_denied(error: &anyhow::Error) -> bool {
        matches!(error.downcast_ref(), Some(Self::Refused { code: tonic::Code::PermissionDenied, .. }))
    }

    /// Whether a precondition failed, or the call conflicts with the state of the hub.
    pub fn is_conflict(error: &anyhow::Error) -> bool {
        matches!(error.downcast_ref(), Some(Self::Refused { code: tonic::Code::FailedPrecondition, .. }))
    }
}

/// Waits for the response of a call, up to the time limit.
pub async fn call<T>(answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> anyhow::Result<T> {
    match tokio::time::timeout(CALL_TIME, answer).await {
        Err(_) => {
            let text = format!("the hub did not answer within {} seconds", CALL_TIME.as_secs());
            Err(CallError::Unreachable(text).into())
        }
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(refused(status)),
    }
}

/// Converts the status that a call or a stream ended with.
pub fn refused(status: tonic::Status) -> anyhow::Error {
    let error = match status.code() {
        // A server without this service sends no message.
        code @ tonic::Code::Unimplemented if status.message().is_empty() => {
            let message = "this address accepts no commands: it may be the address where clusters join".to_owned();
            CallError::Refused { code, message }
        }
        code if message_with_causes(&status).contains("CertificateRevoked") => {
            let message = "the hub rejected this user's certificate: it was revoked or replaced";
            CallError::Refused { code, message: message.to_owned() }
        }
        code if message_with_causes(&status).contains("CertificateExpired") => {
            let message = "the hub rejected this user's certificate as expired or not yet valid, but by this machine's clock it is \
                           valid: compare the clocks of this machine and of the hub";
            CallError::Refused { code, message: message.to_owned() }
        }
        tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled => {
            // The connection existed. A TLS alert with the reason is dropped when the connection breaks during a write.
            let hint = "the hub also closes the connections of a revoked user";
            CallError::Unreachable(format!("the hub does not answer: {} ({hint})", message_with_causes(&status)))
        }
        code => CallError::Refused { code, message: status.message().to_owned() },
    };
    error.into()
}

/// The message of a status with its causes, which contain the reason of a closed connection.
fn message_with_causes(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// A time of the hub's clock, RFC 3339.
pub fn time(seconds: u64) -> String {
    let at = i64::try_from(seconds).ok().and_then(|at| time::OffsetDateTime::from_unix_timestamp(at).ok());
    let format = &time::format_description::well_known::Rfc3339;
    at.filter(|_| seconds > 0).and_then(|at| at.format(format).ok()).unwrap_or_else(|| "-".to_owned())
}
