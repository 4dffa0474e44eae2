//! The options of a process that serves metrics.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Where metrics are served, and to whom. The options have names of their own, since they are part of other commands.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct MetricsOptions {
    /// Serve Prometheus metrics at this address: over HTTP on a loopback address, elsewhere over TLS and with a bearer token only.
    #[arg(id = "metrics-listen", long = "metrics-listen", value_name = "ADDRESS", help_heading = "Observability")]
    pub listen: Option<SocketAddr>,
    /// File with the certificate chain of the metrics (PEM). It is read again when it changes.
    #[arg(
        id = "metrics-certificate", long = "metrics-certificate",
        value_name = "FILE",
        help_heading = "Observability",
        requires_all = ["metrics-listen", "metrics-key"]
    )]
    pub certificate: Option<PathBuf>,
    /// File with the private key of that certificate (PEM), readable by its owner, and at most by a group of this process.
    #[arg(
        id = "metrics-key",
        long = "metrics-key",
        value_name = "FILE",
        help_heading = "Observability",
        requires = "metrics-certificate"
    )]
    pub key: Option<PathBuf>,
    /// Serve metrics to users of the Kubernetes cluster who have the verb `get` on the nonResourceURL `/metrics`. The API server reviews
    /// their tokens. The member of an agent requests the reviews for it.
    #[arg(
        id = "metrics-token-review",
        long = "metrics-token-review",
        help_heading = "Observability",
        requires = "metrics-listen",
        conflicts_with = "metrics-token-file"
    )]
    pub token_review: bool,
    /// Audience that these tokens must be for, so that this process cannot use them at the API server. Default: the audience of the API server.
    #[arg(
        id = "metrics-audience",
        long = "metrics-audience",
        value_name = "AUDIENCE",
        help_heading = "Observability",
        requires = "metrics-token-review"
    )]
    pub audience: Option<String>,
    /// File with the one bearer token that the metrics require, for processes without a Kubernetes cluster; readable by its owner, and at
    /// most by a group of this process.
    #[arg(
        id = "metrics-token-file",
        long = "metrics-token-file",
        value_name = "FILE",
        help_heading = "Observability",
        requires = "metrics-listen"
    )]
    pub token_file: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    /// A command with options of the same names as fields.
    #[derive(Debug, Parser)]
    struct Command {
        #[arg(long)]
        listen: Option<SocketAddr>,
        #[arg(long)]
        token_file: Option<PathBuf>,
        #[command(flatten)]
        metrics: MetricsOptions,
    }

    #[test]
    fn options_fit_into_other_commands_and_need_each_other() {
        let parse =
            |options: &[&str]| Command::try_parse_from(std::iter::once("command").chain(options.iter().copied()));
        let listen = "--metrics-listen=127.0.0.1:1";
        let all = parse(&[
            "--listen=127.0.0.1:2",
            listen,
            "--metrics-certificate=c",
            "--metrics-key=k",
            "--metrics-token-review",
            "--metrics-audience=a",
        ]);
        let all = all.expect("all options");
        assert_eq!(all.listen.map(|it| it.port()), Some(2));
        assert_eq!(all.metrics.listen.map(|it| it.port()), Some(1));
        assert!(all.metrics.token_review && all.token_file.is_none() && all.metrics.certificate.is_some());
        for wrong in [
            &["--metrics-certificate=c", "--metrics-key=k"][..],
            &[listen, "--metrics-certificate=c"],
            &[listen, "--metrics-key=k"],
            &["--metrics-token-review"],
            &[listen, "--metrics-audience=a"],
            &["--metrics-token-file=t"],
            &[listen, "--metrics-token-review", "--metrics-token-file=t"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
