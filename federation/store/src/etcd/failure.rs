//! Errors of etcd's client, by what to do about them.

use std::error::Error as _;

use etcd_client::Error;
use tonic::Code;

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The node does not answer, or has no leader. Another may; the request may have been applied.
    Node(String),
    /// The node has too much to do: try again.
    Busy(String),
    /// The token has ended, or belongs to an earlier state of users and roles.
    Token,
    /// The revision was compacted.
    Compacted,
    /// The revision is newer than the newest.
    Future,
    NoLease,
    /// The response exceeds the limit of this side.
    Large,
    Denied(String),
    Full(String),
    /// The request is wrong, or etcd cannot serve it.
    Refused(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::GRpcStatus(status) => {
                let text = reason(&status);
                let says = |part: &str| text.contains(part);
                match status.code() {
                    Code::Unauthenticated => Self::Token,
                    // Two messages that etcd sends with a code for wrong requests.
                    Code::InvalidArgument if says("revision of auth store is old") => Self::Token,
                    Code::InvalidArgument if says("authentication failed") => Self::Denied(text),
                    Code::InvalidArgument if says("user name is empty") => Self::Denied(
                        "etcd requires a user: add user=NAME&password-file=FILE to the URL of the store".to_owned(),
                    ),
                    Code::PermissionDenied => Self::Denied(text),
                    Code::FailedPrecondition if says("authentication is not enabled") => {
                        Self::Denied(format!("{text}: enable it, or remove user and password-file from the URL"))
                    }
                    Code::OutOfRange if says("has been compacted") => Self::Compacted,
                    Code::OutOfRange if says("future revision") => Self::Future,
                    Code::OutOfRange if says("message length too large") => Self::Large,
                    Code::NotFound if says("lease not found") => Self::NoLease,
                    Code::ResourceExhausted if says("space exceeded") => Self::Full(format!(
                        "{text}: compact and defragment etcd or raise its quota, then disarm its alarm"
                    )),
                    Code::ResourceExhausted => Self::Busy(text),
                    Code::DataLoss => Self::Refused(format!("etcd is damaged: {text}")),
                    Code::Unimplemented => Self::Refused(format!("the server is not etcd 3.4 or later: {text}")),
                    Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition | Code::OutOfRange => {
                        Self::Refused(text)
                    }
                    _ => Self::Node(text),
                }
            }
            // The client's own errors about a stream that ended, or about a lease that does not exist.
            Error::LeaseKeepAliveError(text) if text.contains("not found") => Self::NoLease,
            Error::InvalidArgs(text) => Self::Refused(text),
            Error::InvalidUri(error) => Self::Refused(error.to_string()),
            Error::TransportError(error) => Self::Node(innermost(&error)),
            Error::IoError(error) => Self::Node(error.to_string()),
            error => Self::Node(error.to_string()),
        }
    }
}

/// The message, or the cause of one that only names a layer.
fn reason(status: &tonic::Status) -> String {
    let text = status.source().map_or_else(|| status.message().to_owned(), innermost);
    text.trim_start_matches("etcdserver: ").to_owned()
}

/// The last error of the chain, which says most.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
