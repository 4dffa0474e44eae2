//! The tasks of the project. Each installs what is missing (or reports what to install), builds, and runs.

mod audit;
mod bench;
mod crds;
mod demo;
mod fuzz;
mod guide;
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
    /// Check dependencies against known vulnerabilities and the dependency policy (needs cargo-deny and its database).
    Audit,
    /// Measure the budgets of the design: wall and CPU time, and the peak memory of a separate process.
    Bench(bench::Arguments),
    /// Write the custom resource definitions into deploy/crds and the chart, from the types.
    Crds(crds::Arguments),
    /// Run three clusters of AI workloads on this machine and try the connections between them.
    Demo(demo::Arguments),
    /// Run a parser on mutated inputs.
    Fuzz(fuzz::Arguments),
    /// Write the reference of the guide, from the custom resource definitions and the help of the programs.
    Guide,
    /// Check formatting and lints, and run every test.
    Test(test::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Audit => audit::run(),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Crds(arguments) => crds::run(&arguments),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Guide => guide::run(),
        Task::Test(arguments) => test::run(&arguments),
    }
}
