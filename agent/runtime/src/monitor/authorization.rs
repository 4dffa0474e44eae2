//! Who may read metrics.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use hyper::{HeaderMap, StatusCode, header};
use zeroize::Zeroizing;

use super::reviews::{METRICS_PATH, METRICS_VERB, Reviews, Verdict};
use crate::files;
use crate::places::source_of;
use crate::rate_limit::RateLimit;

/// The shortest token that is accepted, in bytes: 128 bits in base 64 have 22.
pub(super) const MIN_TOKEN_BYTES: usize = 22;

/// Who may read metrics.
#[derive(Debug, Clone)]
pub enum Authorization {
    /// All who reach the listener, which must be on a loopback address.
    Everyone,
    /// Bearers of the token in a file.
    TokenFile(Arc<TokenFile>),
    /// Bearers of tokens that another system allows.
    Reviews(Reviews),
}

/// Why a request is refused: the status and the reason.
pub(super) type Refused = (StatusCode, String);

/// The file of a bearer token. It is read at each request, so that it can be replaced.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    /// Of the warning that it cannot be read: any client can cause one.
    warnings: Mutex<RateLimit<()>>,
}

impl TokenFile {
    /// # Errors
    /// When the file cannot be read, others can read it, or it has no token of [`MIN_TOKEN_BYTES`].
    pub fn new(path: &Path) -> io::Result<Self> {
        read_token(path)?;
        Ok(Self { path: path.to_owned(), warnings: Mutex::new(RateLimit::with_burst(1.0 / 60.0, 1.0)) })
    }

    fn admits(&self, sent: &[u8]) -> Result<bool, Refused> {
        match read_token(&self.path) {
            Ok(token) => Ok(verify_slices_are_equal(sent, token.as_bytes()).is_ok()),
            Err(error) => {
                self.warn(&error);
                Err((StatusCode::SERVICE_UNAVAILABLE, "the file of the token cannot be read".to_owned()))
            }
        }
    }

    /// Logs that the file cannot be read, once a minute at most. Returns whether it did.
    pub(super) fn warn(&self, error: &io::Error) -> bool {
        let allowed =
            self.warnings.lock().unwrap_or_else(PoisonError::into_inner).allows((), tokio::time::Instant::now());
        if allowed {
            tracing::warn!(%error, "metrics not served: the file of the token cannot be read");
        }
        allowed
    }
}

impl Authorization {
    /// Checks the bearer token of a request from `peer`.
    pub(super) async fn check(&self, headers: &HeaderMap, peer: IpAddr) -> Result<(), Refused> {
        let invalid = || (StatusCode::UNAUTHORIZED, "the bearer token is missing or not valid".to_owned());
        if matches!(self, Self::Everyone) {
            return Ok(());
        }
        let header = headers.get(header::AUTHORIZATION).map(header::HeaderValue::as_bytes);
        let parts = header.and_then(|it| it.split_at_checked(b"Bearer ".len()));
        let (_, sent) = parts.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer ")).ok_or_else(invalid)?;
        let sent = sent.trim_ascii();
        let reviews = match self {
            Self::Everyone => return Ok(()),
            Self::TokenFile(file) => return if file.admits(sent)? { Ok(()) } else { Err(invalid()) },
            Self::Reviews(reviews) => reviews,
        };
        let token = std::str::from_utf8(sent).map_err(|_| invalid())?;
        let source = source_of(peer).to_string().into();
        match reviews.decide(token, source).await {
            Ok(Verdict::Allowed) => Ok(()),
            Ok(Verdict::Unauthenticated) => Err(invalid()),
            Ok(Verdict::Forbidden { user }) => {
                let reason =
                    format!("user {user:?} needs the verb \"{METRICS_VERB}\" on the nonResourceURL \"{METRICS_PATH}\"");
                Err((StatusCode::FORBIDDEN, reason))
            }
            Err(error) => Err((StatusCode::SERVICE_UNAVAILABLE, format!("the token cannot be reviewed: {error}"))),
        }
    }
}

fn read_token(path: &Path) -> io::Result<Zeroizing<String>> {
    let bytes = files::read_provided_secret(path)?;
    let text = std::str::from_utf8(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let token = text.trim();
    if token.len() < MIN_TOKEN_BYTES {
        let short = format!("the token has {} bytes, and needs at least {MIN_TOKEN_BYTES}", token.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, short));
    }
    Ok(Zeroizing::new(token.to_owned()))
}
