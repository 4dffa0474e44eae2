//! Builds the Go programs of the tests, or finds them in the cache: their first build takes minutes, and reports its progress.

use hanse_e2e::go::Program;

fn main() -> anyhow::Result<()> {
    for program in Program::ALL {
        println!("{}", program.build()?.display());
    }
    Ok(())
}
