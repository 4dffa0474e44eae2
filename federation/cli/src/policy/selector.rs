//! `hanse policy selector`.

use std::collections::BTreeMap;
use std::io::BufRead as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use hanse_policy::selector::Selector;
use hanse_policy::tri::Tri;
use serde::Serialize;

use super::input;
use crate::output::{self, Format};

/// Parse a selector, and show which label sets it selects.
///
/// Prints the canonical form and the ID of the selector. Exits 2 if the expression is malformed, with the column on standard error.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Label sets, one JSON object of strings per line, without blank lines in between; `-` is standard input.
    #[arg(long, value_name = "FILE.jsonl")]
    labels: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Expression. An empty expression selects everything.
    #[arg(value_name = "EXPR", allow_hyphen_values = true)]
    expression: String,
}

#[derive(Debug, Serialize)]
struct Answer {
    canonical: String,
    id: String,
    results: Vec<bool>,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let selector = match Selector::parse(&self.expression) {
            Ok(selector) => selector,
            Err(error) => {
                output::error(&anyhow!("malformed selector: {error}"), 2);
                if self.output != Format::Json {
                    let (excerpt, before) = error.excerpt(&self.expression);
                    output::note(format_args!("  {excerpt}"));
                    output::note(format_args!("  {}^", " ".repeat(before)));
                }
                return Ok(ExitCode::from(2));
            }
        };
        let label_sets = self.labels.as_deref().map(read_label_sets).transpose()?.unwrap_or_default();
        let answer = Answer {
            canonical: selector.canonical.to_string(),
            id: selector.id(),
            results: label_sets.iter().map(|labels| selector.evaluate(labels) == Tri::Yes).collect(),
        };
        if self.output != Format::Table {
            output::print(self.output, &answer)?;
            return Ok(ExitCode::SUCCESS);
        }
        output::line(format_args!("canonical  {}", answer.canonical))?;
        output::line(format_args!("id         {}", answer.id))?;
        if self.labels.is_some() {
            let mut table = output::table(["LINE", "SELECTED", "LABELS"]);
            for (at, (labels, selected)) in label_sets.iter().zip(&answer.results).enumerate() {
                table.add_row([(at + 1).to_string(), selected.to_string(), serde_json::to_string(labels)?]);
            }
            table.print()?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn read_label_sets(path: &std::path::Path) -> anyhow::Result<Vec<BTreeMap<String, String>>> {
    let reader = input::open(path)?;
    let (mut sets, mut blank) = (Vec::new(), None);
    for (at, line) in reader.lines().enumerate() {
        let line = line.with_context(|| format!("read {}", path.display()))?;
        let text = if at == 0 { line.trim_start_matches('\u{feff}') } else { line.as_str() };
        if text.trim().is_empty() {
            blank = blank.or(Some(at + 1));
            continue;
        }
        // Results have the order of the lines: a skipped line would shift the following ones.
        if let Some(blank) = blank {
            bail!("{}:{blank}: blank line before a label set: write {{}} for no labels", path.display());
        }
        let labels = input::from_json(text);
        sets.push(labels.map_err(|error| anyhow!("{}:{}: {error}", path.display(), at + 1))?);
    }
    Ok(sets)
}
