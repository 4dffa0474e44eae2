//! The project's tasks. Each installs what is missing (or says what to install), builds, and runs.

mod bench;
mod demo;
mod fuzz;
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
    /// Three clusters of AI workloads on this machine, and the packets between them.
    Demo(demo::Arguments),
    /// Measure what the design has budgets for: time as wall and as CPU, memory as the peak of a process of its own.
    Bench(bench::Arguments),
    /// Put mutated inputs into a parser for as long as wanted.
    Fuzz(fuzz::Arguments),
    /// Check formatting and lints, and run every test, those with packets too.
    Test(test::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
    }
}
