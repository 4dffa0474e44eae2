//! `hanse install`, `join` and `uninstall`: the chart of this version, installed with Helm from PATH, and what is needed around it.
//!
//! Everything is done with the caller's own rights in the clusters. The commands may be repeated: they go on where an earlier one ended.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use crate::output::{self, Format, UsageError};

mod engines;
mod helm;
mod hub;
mod join;
mod managed;
mod progress;
mod rollout;
mod target;
mod uninstall;

pub use hub::Install;
pub use join::Join;
pub use uninstall::Uninstall;

/// How often pods and objects are looked at while something is awaited.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The release, and what all of its pods need.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Release")]
pub struct Settings {
    #[command(flatten)]
    place: Place,
    /// Registry, with a path, that has the images `hanse-hub`, `hanse-member` and `hanse-agent`.
    #[arg(long, value_name = "REGISTRY", value_parser = registry)]
    registry: String,
    /// Value of the chart; repeatable. It takes precedence over values files and over the other options.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// File with values of the chart; repeatable.
    #[arg(long = "values", value_name = "FILE")]
    values: Vec<PathBuf>,
    /// Timeout for each step, in seconds.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Print the manifests that would be installed, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Format of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Where a release is.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Place {
    /// Namespace of the release.
    #[arg(long, value_name = "NAME", default_value = "hanse", value_parser = label)]
    namespace: String,
    /// Name of the Helm release.
    #[arg(long, value_name = "NAME", default_value = "hanse", value_parser = label)]
    release: String,
}

impl Settings {
    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// Runs a command that calls API servers.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    hanse_identity::tls::install_provider();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(work)
}

/// Prints the manifests of a dry run, without the rest of Helm's report.
fn print(report: &str) -> anyhow::Result<ExitCode> {
    let manifests = report.split_once("\nMANIFEST:\n").map_or(report, |(_, manifests)| manifests);
    output::exit(writeln!(output::stdout(), "{manifests}").map_err(anyhow::Error::from), false)
}

/// What the chart accepts as `image.registry`.
const REGISTRY: &str = "^[a-z0-9][a-z0-9.:/_-]*[a-z0-9]$";

/// A registry as the chart accepts it: what its schema would refuse is refused before anything is done, with the message of Helm.
fn registry(text: &str) -> Result<String, String> {
    let host = text.split('/').next().unwrap_or_default();
    let is_inner = |it: u8| is_outer(it) || matches!(it, b'.' | b':' | b'/' | b'_' | b'-');
    match text {
        "" => Err("it is empty".to_owned()),
        _ if text.contains("://") => Err("it is HOST[:PORT][/PATH], without a scheme".to_owned()),
        _ if text.ends_with('/') => Err("it ends in a slash".to_owned()),
        _ if text.contains('@') || text[host.len()..].contains(':') => {
            Err("it has no tag and no digest: the digests of images have options of their own".to_owned())
        }
        _ => match text.as_bytes() {
            [first, inner @ .., last] if is_outer(*first) && is_outer(*last) && inner.iter().copied().all(is_inner) => {
                Ok(text.to_owned())
            }
            _ => Err(format!("at '/image/registry': '{text}' does not match pattern '{REGISTRY}'")),
        },
    }
}

/// What [`REGISTRY`] allows at both ends.
fn is_outer(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9')
}

/// Checks the digest of an image. Not the parser of the option does: examples of help name variables.
fn check_digest(option: &str, text: &str) -> anyhow::Result<()> {
    let digits = text.strip_prefix("sha256:").unwrap_or_default();
    match digits.len() == 64 && digits.bytes().all(|it| matches!(it, b'0'..=b'9' | b'a'..=b'f')) {
        true => Ok(()),
        false => {
            let text = format!("{option} {text}: it is not sha256: and 64 hexadecimal digits; a tag is not a digest");
            Err(UsageError(text).into())
        }
    }
}

/// The name of a namespace, a release or a cluster.
fn label(text: &str) -> Result<String, String> {
    let allowed = |it: u8| matches!(it, b'a'..=b'z' | b'0'..=b'9' | b'-');
    // A release has at most 53 characters.
    match (1..=53).contains(&text.len()) && text.bytes().all(allowed) && !text.starts_with('-') && !text.ends_with('-')
    {
        true => Ok(text.to_owned()),
        false => Err("it is not a DNS label of at most 53 characters: a-z, 0-9, and - inside".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_has_no_scheme_and_no_tag() {
        for text in ["registry.example", "registry.example:5000/hanse", "localhost:5000", "a1", "a/b_c-d"] {
            assert_eq!(registry(text).as_deref(), Ok(text));
        }
        for text in ["", "https://registry.example", "registry.example/", "registry.example/a:1", "a/b@sha256:1"] {
            assert!(registry(text).is_err(), "{text}");
        }
    }

    #[test]
    fn registry_is_refused_as_by_the_chart() {
        let schema = include_str!("../../../deploy/chart/values.schema.json");
        let schema: serde_json::Value = serde_json::from_str(schema).expect("JSON");
        assert_eq!(schema["properties"]["image"]["properties"]["registry"]["pattern"], REGISTRY);
        for text in ["a b", "Registry.example", "registry.example/Hanse", "[2001:db8::1]:5000/a", "-a", "a.", "a", "ä1"]
        {
            let error = registry(text).expect_err(text);
            assert_eq!(error, format!("at '/image/registry': '{text}' does not match pattern '{REGISTRY}'"));
        }
    }

    #[test]
    fn digest_is_sha256() {
        let digits = "0123456789abcdef".repeat(4);
        let check = |text: &str| check_digest("--hub-digest", text);
        assert!(check(&format!("sha256:{digits}")).is_ok());
        for text in [digits.clone(), format!("sha256:{}", &digits[1..]), format!("sha256:{}", digits.to_uppercase())] {
            assert!(check(&text).is_err(), "{text}");
        }
        assert!(check("latest").is_err());
    }

    #[test]
    fn name_is_a_label() {
        for text in ["hanse", "a", "a-1"] {
            assert!(label(text).is_ok(), "{text}");
        }
        for text in ["", "Hanse", "-a", "a-", "a.b", &"a".repeat(54)] {
            assert!(label(text).is_err(), "{text}");
        }
    }
}
