//! `cargo xtask crds`: writes the CustomResourceDefinitions of `hanse.dev` into `deploy/crds`, and those of the chart.

use std::path::Path;

use crate::setup;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Write nothing; fail if the files differ from the types.
    #[arg(long)]
    check: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (directory, options) in [("deploy/crds", &[][..]), ("deploy/chart/files/crds", &["--helm"][..])] {
        let mut command = setup::cargo();
        command.args(["run", "--quiet", "--locked", "--package", "hanse-hub", "--bin", "hanse-hub", "--", "crds"]);
        command.args(options).arg("--directory").arg(root.join(directory));
        if arguments.check {
            command.arg("--check");
        }
        setup::run(&mut command)?;
    }
    Ok(())
}
