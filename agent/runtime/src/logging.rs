//! Structured logs on standard error. Each event is one line, in which control characters are escaped.

use std::str::FromStr;

use tracing_subscriber::EnvFilter;

use crate::text::LogWriter;

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("'{text}' is not a log format: use text or json")),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Starts logging. `HANSE_LOG` filters (syntax of `tracing_subscriber::EnvFilter`), and is `info` when absent or empty. A value that cannot
/// be read is logged. Panics are logged too. A second call changes nothing.
pub fn init(format: Format) {
    crate::supervisor::observe_panics();
    let (filter, error) = filter(std::env::var("HANSE_LOG").as_deref().unwrap_or_default());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogWriter);
    // An error means that a subscriber is already in place, which tests may have set.
    let _ = match format {
        Format::Text => builder.with_ansi(false).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
    if let Some(error) = error {
        tracing::warn!(error, "HANSE_LOG not used: it cannot be read; the log level is info");
    }
}

/// The filter, and what is wrong with its text.
fn filter(text: &str) -> (EnvFilter, Option<String>) {
    let text = if text.trim().is_empty() { "info" } else { text };
    match EnvFilter::try_new(text) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_filter_is_reported_and_replaced() {
        for (text, expected) in
            [("", "info"), (" ", "info"), ("debug", "debug"), ("hanse_hub=debug,info", "hanse_hub=debug,info")]
        {
            let (filter, error) = filter(text);
            assert_eq!((filter.to_string(), error), (expected.to_owned(), None));
        }
        let (filter, error) = filter("hanse_hub=loud");
        assert!(filter.to_string() == "info" && error.is_some(), "{filter} {error:?}");
    }
}
