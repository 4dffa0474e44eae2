//! `hanse policy`: verdicts of policies, from directories of manifests or of a running federation.

use std::process::ExitCode;

use clap::Subcommand;

mod answer;
mod approve;
mod check;
mod convert;
mod diff;
mod explain;
mod input;
mod kustomize;
mod lint;
mod live;
mod load;
mod matrix;
mod order;
mod pending;
mod reading;
mod reject;
mod scaffold;
mod selector;

// Commands without a description here are described at their arguments.
#[derive(Debug, Subcommand)]
pub enum Command {
    Approve(approve::Arguments),
    Check(check::Arguments),
    Convert(convert::Arguments),
    Explain(explain::Arguments),
    Matrix(matrix::Arguments),
    Order(order::Arguments),
    Pending(pending::List),
    Reject(pending::Reject),
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
            Self::Approve(arguments) => arguments.run(context),
            Self::Check(arguments) => arguments.run(),
            Self::Convert(arguments) => arguments.run(),
            Self::Explain(arguments) => arguments.run(context),
            Self::Matrix(arguments) => arguments.run(context),
            Self::Order(arguments) => arguments.run(),
            Self::Pending(arguments) => arguments.run(context),
            Self::Reject(arguments) => arguments.run(context),
            Self::Diff(arguments) => arguments.run(),
            Self::Lint(arguments) => arguments.run(context),
            Self::Scaffold(arguments) => arguments.run(),
            Self::Selector(arguments) => arguments.run(),
        }
    }
}
