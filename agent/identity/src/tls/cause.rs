//! Why a connection could not be opened, in words that say what to do.

use std::io;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, Error, OtherError};

use hanse_runtime::moment::rfc3339;

/// What went wrong below HTTP/2.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error("the address is not HOST:PORT")]
    Malformed,
    #[error("the name cannot be resolved ({0}): check its spelling, and DNS on this machine")]
    Name(io::Error),
    #[error("connection refused: nothing listens there; check the address and the port, and that the process runs")]
    Refused,
    #[error("no way to this address ({0}): check the address, and routes and firewalls on the way")]
    NoRoute(io::Error),
    #[error("no answer within 10 seconds: check the address and the port, and firewalls on the way")]
    Time,
    #[error("the other end does not speak TLS: check the port (health and metrics are plain HTTP, and have their own)")]
    NotTls,
    #[error(
        "the other end closed the connection during the handshake: check the port, or try again (it may have too many \
         connections)"
    )]
    Closed,
    #[error(
        "the server's certificate is from an authority that is not trusted here: it belongs to another ClusterSet or cluster, or was \
         set up anew"
    )]
    OtherAuthority,
    #[error("{0}")]
    Certificate(String),
    #[error(transparent)]
    Other(io::Error),
}

/// Why a newcomer does not take a server for the one that its token names.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stranger {
    #[error(
        "the server does not show the authority that the token names: is this the listener for newcomers (--join-listen of \
         hanse-hub, --enrol-listen of hanse-member)?"
    )]
    NoAuthority,
    #[error(
        "the server shows another authority than the token names: the token is from another ClusterSet or cluster, or the \
         address is another's"
    )]
    OtherAuthority,
}

impl From<Stranger> for Error {
    fn from(stranger: Stranger) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(stranger))))
    }
}

impl Cause {
    /// Of opening a TCP connection.
    pub(super) fn of_tcp(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Self::NoRoute(error),
            io::ErrorKind::TimedOut => Self::Time,
            _ => Self::Other(error),
        }
    }

    /// Of a TLS handshake.
    pub(super) fn of_tls(error: io::Error) -> Self {
        let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
            return match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Self::Closed,
                _ => Self::Other(error),
            };
        };
        match tls {
            Error::InvalidMessage(_) => Self::NotTls,
            Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                Self::OtherAuthority
            }
            Error::InvalidCertificate(reason) => Self::Certificate(of_certificate(reason)),
            Error::AlertReceived(AlertDescription::CertificateExpired) => Self::Certificate(
                "the server finds this certificate expired or not yet valid: compare the clocks of both machines"
                    .to_owned(),
            ),
            Error::AlertReceived(AlertDescription::CertificateRevoked) => {
                Self::Certificate("the server does not accept this certificate any more: it was revoked".to_owned())
            }
            Error::AlertReceived(AlertDescription::UnknownCA) => Self::Certificate(
                "the server does not know the authority of this certificate: it is another ClusterSet's or cluster's"
                    .to_owned(),
            ),
            _ => Self::Other(error),
        }
    }

    /// Whether another attempt may succeed without a change on this side.
    pub fn is_passing(&self) -> bool {
        !matches!(self, Self::Malformed | Self::NotTls | Self::OtherAuthority | Self::Certificate(_))
    }
}

fn of_certificate(reason: &CertificateError) -> String {
    let at = |time: &UnixTime| rfc3339(UNIX_EPOCH + Duration::from_secs(time.as_secs()));
    match reason {
        CertificateError::ExpiredContext { time, not_after } => format!(
            "the server's certificate ended at {}, and this machine's clock says {}: check this machine's clock first",
            at(not_after),
            at(time)
        ),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "the server's certificate is valid from {} on, and this machine's clock says {}: check this machine's clock first",
            at(not_before),
            at(time)
        ),
        CertificateError::Expired => "the server's certificate has ended: check this machine's clock first".to_owned(),
        CertificateError::NotValidYet => {
            "the server's certificate is not valid yet: check this machine's clock first".to_owned()
        }
        CertificateError::ApplicationVerificationFailure => {
            "the server is not the one that belongs there, by its certificate: check the address and the port"
                .to_owned()
        }
        CertificateError::Revoked => "the server's certificate was revoked".to_owned(),
        CertificateError::Other(OtherError(error)) => error.to_string(),
        other => format!("the server's certificate cannot be accepted: {other}"),
    }
}
