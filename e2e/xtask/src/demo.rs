//! `cargo xtask demo`: builds the programs and runs them on this machine.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::Context as _;

use crate::setup;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Run a management cluster and two clusters on real API servers, which are built with Go, and drive the demo with kubectl.
    #[arg(long)]
    kubernetes: bool,
    /// Exit after the last step. By default, on a terminal, the demo keeps running until Ctrl-C.
    #[arg(long)]
    once: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    setup::packet_tools()?;
    if arguments.kubernetes {
        setup::go()?;
        setup::etcd()?;
    }
    let root = setup::root()?;
    println!("building the programs (some minutes the first time)");
    let mut build = setup::cargo();
    build.current_dir(root).args(["build", "--locked", "--bins"]);
    for package in ["hanse-hub", "hanse-member", "hanse-agent", "hanse", "hanse-e2e"] {
        build.args(["--package", package]);
    }
    setup::run(&mut build)?;
    let programs = setup::programs()?;
    if arguments.kubernetes {
        // Here, since the demo has no network.
        setup::run(&mut Command::new(programs.join("hanse-go-programs")))?;
    }
    let mut demo = Command::new(programs.join("hanse-demo"));
    demo.arg("--programs").arg(&programs).arg("--manifests").arg(root.join("e2e/demo"));
    if arguments.kubernetes {
        demo.arg("--kubernetes");
    }
    if arguments.once {
        demo.arg("--once");
    }
    // The demo replaces this process, so that it alone receives signals.
    Err(demo.exec()).context("start the demo")
}
