//! `cargo xtask bench`: the figures behind the budgets of the design.

use anyhow::{Context as _, bail};

use crate::setup;

/// A benchmark: the name of its target.
struct Bench {
    name: &'static str,
    /// It makes a network namespace.
    needs_root: bool,
    /// It runs the programs, which are built before.
    needs_programs: bool,
    /// It runs nodes of etcd, and hubs with their store on it.
    needs_etcd: bool,
}

const BENCHES: &[Bench] = &[
    Bench { name: "apply", needs_root: false, needs_programs: false, needs_etcd: false },
    Bench { name: "compile", needs_root: false, needs_programs: false, needs_etcd: false },
    Bench { name: "failover", needs_root: false, needs_programs: false, needs_etcd: true },
    Bench { name: "fanout", needs_root: false, needs_programs: false, needs_etcd: false },
    Bench { name: "federation", needs_root: false, needs_programs: true, needs_etcd: false },
    Bench { name: "hub", needs_root: false, needs_programs: false, needs_etcd: false },
    Bench { name: "kubernetes", needs_root: false, needs_programs: false, needs_etcd: false },
    Bench { name: "nftables", needs_root: true, needs_programs: false, needs_etcd: false },
    Bench { name: "questions", needs_root: false, needs_programs: false, needs_etcd: false },
    Bench { name: "reading", needs_root: false, needs_programs: false, needs_etcd: false },
    Bench { name: "remote", needs_root: false, needs_programs: false, needs_etcd: false },
];

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Which: apply, compile, failover, fanout, federation, hub, kubernetes, nftables, questions, reading or remote; all of them when none
    /// is named.
    bench: Option<String>,
    /// Only these shapes of it.
    shapes: Vec<String>,
    /// json: one object per figure and line, {"bench","shape","metric","value","unit"}; else a table.
    #[arg(short, long, value_parser = ["table", "json"], default_value = "table")]
    output: String,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let wanted = |bench: &&Bench| arguments.bench.as_deref().is_none_or(|name| name == bench.name);
    let benches: Vec<&Bench> = BENCHES.iter().filter(wanted).collect();
    if benches.is_empty() {
        let names: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
        let name = arguments.bench.as_deref().context("at least one benchmark exists")?;
        bail!("unknown benchmark {name:?}; the benchmarks are {}", names.join(", "));
    }
    for bench in benches {
        if bench.needs_root && !setup::is_root() {
            eprintln!("{} needs root (for a network namespace of its own): left out", bench.name);
            continue;
        }
        if bench.needs_programs {
            setup::packet_tools()?;
            setup::etcd()?;
            let mut build = setup::cargo();
            build.args(["build", "--release", "--quiet", "--locked", "--workspace", "--bins"]);
            setup::run(&mut build)?;
        }
        if bench.needs_etcd {
            setup::etcd()?;
            setup::protocol_compiler()?;
        }
        let mut command = setup::cargo();
        // With the whole workspace, so that all benchmarks share one build of every dependency.
        command.args(["bench", "--quiet", "--locked", "--workspace", "--bench", bench.name]);
        if bench.needs_etcd {
            command.args(["--features", "hanse-hub/etcd"]);
        }
        command.arg("--");
        setup::run(command.args(&arguments.shapes).args(["-o", &arguments.output]))?;
    }
    Ok(())
}
