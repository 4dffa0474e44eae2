//! How answers are printed.

use std::io::Write as _;

use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::Serialize;

/// `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Default)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    Json,
    Yaml,
}

/// A table without borders, as `kubectl` prints them.
pub fn table<const N: usize>(headings: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(headings);
    table
}

/// Prints `value` as JSON on one line, or as a YAML document.
pub fn print<T: Serialize + ?Sized>(format: Format, value: &T) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match format {
        Format::Yaml => write!(out, "---\n{}", serde_yaml_ng::to_string(value)?)?,
        Format::Json | Format::Table => writeln!(out, "{}", serde_json::to_string(value)?)?,
    }
    Ok(())
}
