//! `cargo xtask crds`: writes the CustomResourceDefinitions of `hanse.dev` into `deploy/crds`.

use std::path::Path;

use crate::setup;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Write nothing; fail if the files differ from the types.
    #[arg(long)]
    check: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut command = setup::cargo();
    command.args(["run", "--quiet", "--locked", "--package", "hanse-hub", "--bin", "hanse-hub", "--"]);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    command.args(["crds", "--directory"]).arg(root.join("deploy/crds"));
    if arguments.check {
        command.arg("--check");
    }
    setup::run(&mut command)
}
