//! `cargo xtask test`: everything that must hold.

use std::process::Command;
use std::time::Instant;

use crate::setup;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Leave out formatting and lints.
    #[arg(long)]
    tests_only: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    setup::packet_tools()?;
    let cargo = || Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let in_ci = std::env::var_os("CI").is_some();
    let mut steps: Vec<(&str, Command)> = Vec::new();
    if !arguments.tests_only {
        let mut format = cargo();
        format.args(["fmt", "--all", "--check"]);
        steps.push(("formatting", format));
        let mut lints = cargo();
        lints.args(["clippy", "--workspace", "--all-targets", "--locked", "--quiet"]);
        if in_ci {
            // Warnings are denied where they would otherwise stay.
            lints.args(["--", "-D", "warnings"]);
        }
        steps.push(("lints", lints));
    }
    // The packet tests run the project's own programs.
    let mut build = cargo();
    build.args(["build", "--workspace", "--bins", "--locked"]);
    steps.push(("programs", build));
    let mut tests = cargo();
    tests.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    steps.push(("tests", tests));
    for (name, mut command) in steps {
        println!("== {name}");
        let start = Instant::now();
        setup::run(&mut command)?;
        println!("== {name}: passed in {:.0} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}
