//! The demo of `cargo xtask demo`: clusters of AI workloads on one machine, and the packets between them. With `--kubernetes`, the
//! clusters have real API servers.
//!
//! Every cell of a measured matrix is a TCP connection that was tried. It is compared with the verdict of
//! `hanse policy explain` for the same manifests. A difference ends the demo with exit code 1.

mod kubernetes;
mod manifests;
mod screen;
mod story;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Parser;
use hanse_e2e::namespace;
use hanse_e2e::sandbox::{self, Privilege};
use nix::sys::signal::{SigSet, Signal};
use screen::Screen;

#[derive(Debug, Parser)]
#[command(name = "hanse-demo", about = "Run the demo; start it with cargo xtask demo", version)]
struct Arguments {
    /// Directory of the programs.
    #[arg(long)]
    programs: PathBuf,
    /// Directory of the demo's manifests.
    #[arg(long)]
    manifests: PathBuf,
    /// Run the clusters on real API servers.
    #[arg(long)]
    kubernetes: bool,
    /// Exit after the last step, also on a terminal.
    #[arg(long)]
    once: bool,
}

fn main() -> anyhow::Result<()> {
    let Arguments { programs, manifests, kubernetes, once } = Arguments::parse();
    let start = Instant::now();
    let privilege = sandbox::enter()?;
    end_on_signal()?;
    let screen = Screen::new();
    screen.say(match privilege {
        Privilege::Root => "Running as root, in separate namespaces.",
        Privilege::UserNamespace => "Running without root, in a separate user namespace.",
    });
    let run = if kubernetes { kubernetes::run } else { story::run };
    let outcome = run(&screen, &programs, &manifests, once || !std::io::stdout().is_terminal());
    let left = namespace::list()?;
    if !left.is_empty() {
        bail!("not removed: {}", left.join(", "));
    }
    let wrong = outcome?;
    screen.say(&format!("\nAll namespaces and files are removed. {:.1} s.", start.elapsed().as_secs_f64()));
    if wrong > 0 {
        bail!("{wrong} measurements differ from policy");
    }
    Ok(())
}

/// Process 1 of a process namespace ignores signals without a handler. When this process ends, the kernel ends the others and
/// removes their networks and files.
fn end_on_signal() -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    // Before any other thread starts, so that all of them leave the signals to this one.
    signals.thread_block().context("block signals")?;
    std::thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            println!("\nended by {signal}; all namespaces and files are removed");
            std::process::exit(128 + signal as i32);
        }
    });
    Ok(())
}
