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

/// What plain builds leave out, because building it needs more than Rust and a C compiler.
const FEATURES: &str = "hanse-hub/etcd";

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    setup::packet_tools()?;
    setup::go()?;
    setup::etcd()?;
    setup::protocol_compiler()?;
    let mut steps: Vec<(&str, Command)> = Vec::new();
    if !arguments.tests_only {
        let mut format = setup::cargo();
        format.args(["fmt", "--all", "--check"]);
        steps.push(("formatting", format));
    }
    // The packet tests run the project's own programs. All targets are built together, so that they share one build of every
    // dependency: the programs alone would select fewer features. The store on etcd is part of it.
    let mut build = setup::cargo();
    build.args(["build", "--workspace", "--all-targets", "--locked", "--features", FEATURES]);
    steps.push(("lints, programs and tests", build));
    // Kubernetes and Helm, from source: minutes with empty caches, which a test would spend in silence.
    // Not by `cargo run`, which would build dependencies again, with the features of one package.
    steps.push(("programs in Go", Command::new(setup::programs()?.join("hanse-go-programs"))));
    let mut tests = setup::cargo();
    tests.args(["test", "--workspace", "--locked", "--no-fail-fast", "--features", FEATURES]);
    steps.push(("tests", tests));
    if !arguments.tests_only {
        // Clippy in place of the compiler: the code is checked once, for lints and for the build.
        for (_, step) in &mut steps {
            step.env("RUSTC_WORKSPACE_WRAPPER", "clippy-driver");
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
