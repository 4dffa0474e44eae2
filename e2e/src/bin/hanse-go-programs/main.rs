//! Builds the Go programs of the tests and downloads their modules, or finds them in the cache: the first build takes minutes, and
//! reports its progress.

use hanse_e2e::go::Program;
use hanse_e2e::kubernetes::crds::NETWORK_POLICY_API;

fn main() -> anyhow::Result<()> {
    for program in Program::ALL {
        println!("{}", program.build()?.display());
    }
    println!("{}", NETWORK_POLICY_API.download()?.display());
    Ok(())
}
