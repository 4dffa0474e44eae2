//! `hanse policy …`: what policy says, from directories of manifests.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;

mod selector;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Read a selector: its canonical form, its id, and which label sets it selects.
    Selector(selector::Arguments),
}

impl Command {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Selector(arguments) => arguments.run(),
        }
    }
}

/// A file to be read by lines; `-` is standard input.
fn open(path: &std::path::Path) -> anyhow::Result<Box<dyn std::io::BufRead>> {
    if path == std::path::Path::new("-") {
        return Ok(Box::new(std::io::stdin().lock()));
    }
    let file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    Ok(Box::new(std::io::BufReader::new(file)))
}
