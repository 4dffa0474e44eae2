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
    setup::go()?;
    let in_ci = std::env::var_os("CI").is_some();
    let mut steps: Vec<(&str, Command)> = Vec::new();
    if !arguments.tests_only {
        let mut format = setup::cargo();
        format.args(["fmt", "--all", "--check"]);
        steps.push(("formatting", format));
        let mut lints = setup::cargo();
        lints.args(["clippy", "--workspace", "--all-targets", "--locked", "--quiet"]);
        if in_ci {
            // Warnings are denied where they would otherwise stay.
            lints.args(["--", "-D", "warnings"]);
        }
        steps.push(("lints", lints));
    }
    // The packet tests run the project's own programs. Built together with the tests, so that both use one build of every
    // dependency: alone, the programs would be built with fewer features of them.
    let mut build = setup::cargo();
    build.args(["build", "--workspace", "--bins", "--tests", "--locked"]);
    steps.push(("programs and tests", build));
    let mut tests = setup::cargo();
    tests.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    steps.push(("tests", tests));
    // The dependency policy, where the tool for it is installed; its absence is said, and no reason to fail.
    if setup::find("cargo-deny").is_some() {
        let mut deny = setup::cargo();
        deny.args(["deny", "check", "licenses", "bans", "sources"]);
        steps.push(("dependencies", deny));
    } else {
        println!("== dependencies: not checked against .deny.toml (cargo-deny is not installed)");
    }
    for (name, mut command) in steps {
        println!("== {name}");
        let start = Instant::now();
        setup::run(&mut command)?;
        println!("== {name}: passed in {:.0} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}
