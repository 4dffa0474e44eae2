//! The project's tasks. Each installs what is missing (or says what to install), builds, and runs.

mod setup;
mod test;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The tasks of Hanse", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Check formatting and lints, and run every test, those with packets too.
    Test(test::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Test(arguments) => test::run(&arguments),
    }
}
