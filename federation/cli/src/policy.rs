//! `hanse policy`: verdicts of policies, from directories of manifests or of a running federation.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;
use hanse_api::decode::typed;
use hanse_api::document;
use hanse_api::field::FieldError;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::output::{self, Format};

mod check;
mod convert;
mod diff;
mod explain;
mod kustomize;
mod lint;
mod live;
mod load;
mod matrix;
mod order;
mod reading;
mod scaffold;
mod selector;

// Commands without a description here are described at their arguments.
#[derive(Debug, Subcommand)]
pub enum Command {
    Check(check::Arguments),
    Convert(convert::Arguments),
    Explain(explain::Arguments),
    Matrix(matrix::Arguments),
    Order(order::Arguments),
    Diff(diff::Arguments),
    Lint(lint::Arguments),
    /// Render a preset for AI workloads.
    Scaffold(scaffold::Arguments),
    /// Parse a selector, and show which label sets it selects.
    Selector(selector::Arguments),
}

impl Command {
    pub fn run(self, context: Option<&std::path::Path>) -> anyhow::Result<ExitCode> {
        match self {
            Self::Check(arguments) => arguments.run(),
            Self::Convert(arguments) => arguments.run(),
            Self::Explain(arguments) => arguments.run(context),
            Self::Matrix(arguments) => arguments.run(context),
            Self::Order(arguments) => arguments.run(),
            Self::Diff(arguments) => arguments.run(),
            Self::Lint(arguments) => arguments.run(context),
            Self::Scaffold(arguments) => arguments.run(),
            Self::Selector(arguments) => arguments.run(),
        }
    }
}

/// Opens a file; `-` is standard input.
fn open(path: &std::path::Path) -> anyhow::Result<Box<dyn std::io::BufRead>> {
    if path == std::path::Path::new("-") {
        return Ok(Box::new(std::io::stdin().lock()));
    }
    let file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    Ok(Box::new(std::io::BufReader::new(file)))
}

/// One line of a file of JSON as a value.
///
/// # Errors
/// The first error, with its column and field.
fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| {
        let column = error.column();
        // The reader of manifests reports the field, too.
        let document = document::documents(text).next().filter(|_| error.is_data()).and_then(Result::ok);
        let errors = document.and_then(|document| typed::<T>(document.root()).err());
        let message = match errors.and_then(|errors| errors.into_iter().next()) {
            Some(FieldError { path, message }) if path.is_empty() => message,
            Some(error) => error.to_string(),
            // serde_json reports every line as the first one.
            None => {
                let message = error.to_string();
                let place = format!(" at line {} column {column}", error.line());
                message.strip_suffix(&place).unwrap_or(&message).to_owned()
            }
        };
        format!("column {column}: {message}")
    })
}

/// An answer that does not include refused objects.
#[derive(Serialize)]
struct Incomplete<'a, T> {
    #[serde(flatten)]
    answer: &'a T,
    incomplete: bool,
}

/// One answer as a line of JSON or a document of YAML, with `incomplete: true` if an object was refused.
fn write_answer(
    out: &mut impl std::io::Write,
    format: Format,
    incomplete: bool,
    answer: &impl Serialize,
) -> anyhow::Result<()> {
    match incomplete {
        true => output::write(out, format, &Incomplete { answer, incomplete }),
        false => output::write(out, format, answer),
    }
}
