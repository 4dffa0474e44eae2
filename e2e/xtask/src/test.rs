//! `cargo xtask test`: formatting, lints and every test.

use std::process::Command;
use std::time::Instant;

use crate::setup;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Skip formatting and lints.
    #[arg(long)]
    tests_only: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    setup::packet_tools()?;
    setup::go()?;
    let in_ci = std::env::var_os("CI").is_some();
    let mut steps: Vec<(&str, Command)> = Vec::new();
    if !arguments.tests_only {
        let mut format = setup::cargo();
        format.args(["fmt", "--all", "--check"]);
        steps.push(("formatting", format));
        let mut lints = setup::cargo();
        lints.args(["clippy", "--workspace", "--all-targets", "--locked"]);
        if in_ci {
            // A warning does not stop work in progress; it does not get past CI.
            lints.args(["--", "-D", "warnings"]);
        }
        steps.push(("lints", lints));
    }
    // The packet tests run the project's own programs. Both are built together, so that they share one build of every
    // dependency: the programs alone would select fewer features.
    let mut build = setup::cargo();
    build.args(["build", "--workspace", "--bins", "--tests", "--locked"]);
    steps.push(("programs and tests", build));
    let mut tests = setup::cargo();
    tests.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    steps.push(("tests", tests));
    if in_ci {
        // A fresh clone has no next build for which the caches of incremental compilation would be written.
        for (_, step) in &mut steps {
            step.env("CARGO_INCREMENTAL", "0");
        }
    }
    let count = steps.len();
    for (number, (name, mut command)) in (1..).zip(steps) {
        println!("== {number}/{count} {name}");
        let start = Instant::now();
        setup::run(&mut command)?;
        println!("== {number}/{count} {name}: passed in {:.0} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}
