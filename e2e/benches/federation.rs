//! How long a change of policy at a management cluster takes to reach the packets of two other clusters.
//!
//! `federation [CHANGES] [-o json]`, 100 changes where no number is given. A management cluster and two clusters with real API
//! servers on one etcd, a hub with its operator, members and agents as pods of two nodes each: all of them share the processors of
//! the machine. A FederatedNetworkPolicy is changed with one request; the time is from its answer until the first TCP connection
//! with the new verdict in both clusters. A connection starts every 10 ms in each.
//!
//! - `opened`, `closed`: changes that open the servers of both clusters, and those that close them.
//! - `all`: both.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use hanse_e2e::fabric::Fabric;
use hanse_e2e::federation::delays::{self, Delay, POLICY, TIER};
use hanse_e2e::federation::{Federation, becomes};
use hanse_e2e::kubernetes::run;
use hanse_e2e::probe::Observed;
use hanse_e2e::sandbox;

const CHANGES: usize = 100;
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    sandbox::enter()?;
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    let json = arguments.windows(2).any(|pair| pair == ["-o", "json"]);
    let changes = arguments.iter().find_map(|it| it.parse().ok()).unwrap_or(CHANGES);
    let delays = measure(changes)?;
    let of = |wanted: &Observed| delays.iter().filter(|it| it.became == *wanted).map(|it| it.took).collect();
    let all = delays.iter().map(|it| it.took).collect();
    for (shape, times) in [("opened", of(&Observed::Open)), ("closed", of(&Observed::Closed)), ("all", all)] {
        print(json, shape, times);
    }
    Ok(())
}

fn print(json: bool, shape: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let Some(last) = times.len().checked_sub(1) else { return };
    // The nearest rank: p99 of 100 is the 99th.
    let rank = |percent: usize| times[(times.len() * percent).div_ceil(100).saturating_sub(1).min(last)];
    for (metric, time) in [("p50", rank(50)), ("p99", rank(99)), ("longest", times[last])] {
        let value = time.as_secs_f64() * 1e3;
        if json {
            println!(
                r#"{{"bench":"federation","shape":"{shape}","metric":"{metric} of {}","value":{value},"unit":"ms"}}"#,
                times.len()
            );
        } else {
            let metric = format!("{metric} of {} changes", times.len());
            println!("{shape:<13} {metric:<34} {value:>14.3} ms");
        }
    }
}

fn measure(changes: usize) -> anyhow::Result<Vec<Delay>> {
    let worlds = delays::worlds();
    let fabric = Fabric::build(&worlds).context("build the network")?;
    let scratch = tempfile::tempdir_in("/run").context("create a folder")?;
    let programs = programs()?;
    fabric.router().enter(|| {
        run(async {
            let federation = Federation::start(&fabric, &worlds, delays::REGISTRATIONS, &programs, scratch.path());
            let federation = federation.await?;
            federation.join().await?;
            let pods = delays::Pods::start(&federation).await?;
            federation.apply(&format!("{TIER}---\n{POLICY}"))?;
            becomes(&pods.pairs(), &Observed::Closed, PATIENCE).context("the policy does not close the servers")?;
            delays::measure(&federation, &pods, changes).await
        })
    })
}

/// The programs that are built with this one: `target/release` above its `deps`.
fn programs() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("find the running program")?;
    let directory = program.ancestors().nth(2).context("the program is in a folder of a folder")?;
    for name in ["hanse-hub", "hanse-member", "hanse-agent", "hanse"] {
        ensure!(
            directory.join(name).is_file(),
            "{} has no {name}: run cargo xtask bench federation",
            directory.display()
        );
    }
    Ok(directory.to_owned())
}
