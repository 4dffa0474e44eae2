//! The options of a process that serves metrics.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Where metrics are served, and to whom.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct MetricsOptions {
    /// Serve Prometheus metrics at this address: over HTTP on a loopback address, elsewhere over TLS and with a bearer token only.
    #[arg(long = "metrics-listen", value_name = "ADDRESS", help_heading = "Observability")]
    pub listen: Option<SocketAddr>,
    /// File with the certificate chain of the metrics (PEM). It is read again when it changes.
    #[arg(
        long = "metrics-certificate",
        value_name = "FILE",
        help_heading = "Observability",
        requires_all = ["listen", "key"]
    )]
    pub certificate: Option<PathBuf>,
    /// File with the private key of that certificate (PEM), readable by its owner, and at most by a group of this process.
    #[arg(long = "metrics-key", value_name = "FILE", help_heading = "Observability", requires = "certificate")]
    pub key: Option<PathBuf>,
    /// Serve metrics to users of the Kubernetes cluster who have the verb `get` on the nonResourceURL `/metrics`. The API server reviews
    /// their tokens. The member of an agent requests the reviews for it.
    #[arg(
        long = "metrics-token-review",
        help_heading = "Observability",
        requires = "listen",
        conflicts_with = "token_file"
    )]
    pub token_review: bool,
    /// File with the one bearer token that the metrics require, for processes without a Kubernetes cluster; readable by its owner, and at
    /// most by a group of this process.
    #[arg(long = "metrics-token-file", value_name = "FILE", help_heading = "Observability", requires = "listen")]
    pub token_file: Option<PathBuf>,
}
