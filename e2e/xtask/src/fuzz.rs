//! `cargo xtask fuzz`: the fuzz targets of `e2e/tests/it/fuzz`, for longer than their part of the tests.

use anyhow::bail;

use crate::setup;

const TARGETS: &[&str] = &["manifests", "selectors", "wire"];

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Which parser: manifests, selectors or wire.
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    target: String,
    /// How long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where the inputs start; the same seed gives the same ones. Another one each day where it is left out.
    #[arg(long)]
    seed: Option<u64>,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let today = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs() / 86_400);
    let seed = arguments.seed.unwrap_or(today);
    let test = format!("fuzz::{}", arguments.target);
    let mut command = setup::cargo();
    command
        .args([
            "test",
            "--quiet",
            "--locked",
            "--package",
            "hanse-e2e",
            "--test",
            "it",
            "--",
            "--exact",
            "--nocapture",
            &test,
        ])
        .env("HANSE_FUZZ_SECONDS", arguments.seconds.to_string())
        .env("HANSE_SEED", seed.to_string());
    if setup::run(&mut command).is_err() {
        bail!(
            "{test} failed with the seed {seed}. The input that it names belongs into e2e/tests/it/fuzz/found/{} together \
             with the fix",
            arguments.target
        );
    }
    Ok(())
}
