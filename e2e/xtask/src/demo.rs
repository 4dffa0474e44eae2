//! `cargo xtask demo`: builds the programs and shows them on one machine.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use crate::setup;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Run through and end; otherwise, on a terminal, stay up to be explored until Ctrl-C.
    #[arg(long)]
    once: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    setup::packet_tools()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).context("find the workspace's root")?;
    println!("building (a few minutes the first time)");
    let mut build = setup::cargo();
    setup::run(build.current_dir(root).args(["build", "--quiet", "--locked", "--workspace", "--bins"]))?;
    let programs = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into).join("debug");
    let mut demo = Command::new(programs.join("hanse-demo"));
    demo.arg("--programs").arg(&programs).arg("--manifests").arg(root.join("e2e/demo"));
    if arguments.once {
        demo.arg("--once");
    }
    // The demo takes this process's place, so that signals reach it alone.
    Err(demo.exec()).context("start the demo")
}
