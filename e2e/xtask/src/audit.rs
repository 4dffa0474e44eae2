//! `cargo xtask audit`: dependencies against known vulnerabilities and the policy in `.deny.toml`.

use anyhow::bail;

use crate::setup;

pub fn run() -> anyhow::Result<()> {
    if setup::find("cargo-deny").is_none() {
        bail!("missing: cargo-deny. Install it (cargo install --locked cargo-deny) and run again");
    }
    // Fetches the advisory database, which needs access to github.com.
    let mut deny = setup::cargo();
    setup::run(deny.args(["deny", "--locked", "check", "advisories", "bans", "licenses", "sources"]))
}
