//! `cargo xtask guide`: writes the reference of the guide, from the custom resource definitions and the help of the programs.

use crate::setup;

/// The test that compares the reference with the code; with `HANSE_UPDATE_GUIDE` it writes it first.
const TEST: &str = "guide::reference::reference_is_that_of_the_code";

pub fn run() -> anyhow::Result<()> {
    let mut build = setup::cargo();
    build.args(["build", "--quiet", "--locked", "--workspace", "--bins"]);
    setup::run(&mut build)?;
    let mut test = setup::cargo();
    test.args(["test", "--quiet", "--locked", "--package", "hanse-e2e", "--test", "it", "--", "--exact", TEST]);
    setup::run(test.env("HANSE_UPDATE_GUIDE", "1"))
}
