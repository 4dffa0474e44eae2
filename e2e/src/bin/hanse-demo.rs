//! What `cargo xtask demo` runs: three clusters of AI workloads on one machine, and the packets between them.
//!
//! Every cell of a measured matrix is a TCP connection that was tried; what it is held against is what
//! `hanse policy explain` says of the same manifests. A difference ends the demo with exit code 1.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;
use hanse_e2e::enforcement::Enforcement;
use hanse_e2e::fabric::Fabric;
use hanse_e2e::matrix;
use hanse_e2e::probe::{self, Listener};
use hanse_e2e::process::Process;
use hanse_e2e::sandbox::{self, Privilege};
use hanse_e2e::world::{Cluster, Pod};
use hanse_e2e::{expectation, namespace};
use nix::sys::signal::{SigSet, Signal};

const CLUSTERS: [&str; 3] = ["train", "serve", "prod"];
/// Loopback of the router's namespace: the hub of the demo serves there.
const HUB: &str = "127.0.0.1:7443";
const HUB_JOIN: &str = "127.0.0.1:7444";
const HUB_HEALTH: &str = "127.0.0.1:7445";

#[derive(Debug, Parser)]
#[command(name = "hanse-demo", about = "The demo; start it with cargo xtask demo", version)]
struct Arguments {
    /// Where the programs are.
    #[arg(long)]
    programs: PathBuf,
    /// The directory of the demo's manifests.
    #[arg(long)]
    manifests: PathBuf,
    /// Run through and end, also on a terminal.
    #[arg(long)]
    once: bool,
}

fn main() -> anyhow::Result<()> {
    let Arguments { programs, manifests, once } = Arguments::parse();
    let start = Instant::now();
    let privilege = sandbox::enter()?;
    end_on_signal()?;
    let screen = Screen { colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() };
    screen.say(match privilege {
        Privilege::Root => "Running as root, in namespaces of its own.",
        Privilege::UserNamespace => "Running without root, in a user namespace of its own.",
    });
    let outcome = story(&screen, &programs, &manifests, once || !std::io::stdout().is_terminal());
    let left = namespace::list()?;
    if !left.is_empty() {
        bail!("left behind: {}", left.join(", "));
    }
    let wrong = outcome?;
    screen.say(&format!("\nEverything is removed again. {:.1} s.", start.elapsed().as_secs_f64()));
    if wrong > 0 {
        bail!("{wrong} measurements differ from what policy says");
    }
    Ok(())
}

/// Returns how many measurements differed from what was expected.
fn story(screen: &Screen, programs: &Path, manifests: &Path, once: bool) -> anyhow::Result<usize> {
    let clusters: Vec<Cluster> = CLUSTERS
        .iter()
        .map(|name| Cluster::read(name, &manifests.join(name)))
        .collect::<Result<_, _>>()
        .context("read the demo's manifests")?;
    let pods: Vec<Pod> = clusters.iter().flat_map(|cluster| cluster.pods.clone()).collect();
    let scratch = tempfile::tempdir_in("/run").context("make a folder for the demo's files")?;
    let hanse = programs.join("hanse");

    screen.title("Three clusters of two nodes; every node and pod is a network namespace");
    let fabric = Fabric::build(&clusters).context("build the network")?;
    let listeners: Vec<Listener> = pods
        .iter()
        .map(|pod| {
            let namespace = fabric.pod(pod).with_context(|| format!("find {}", pod.title()))?;
            Listener::start(namespace, pod.port, &pod.title()).with_context(|| format!("serve {}", pod.title()))
        })
        .collect::<anyhow::Result<_>>()?;
    for cluster in &clusters {
        let names: Vec<&str> = cluster.pods.iter().map(|pod| pod.name.as_str()).collect();
        screen.say(&format!("  {:6} {}", cluster.name, names.join(", ")));
    }

    let mut wrong = 0;
    screen.title("Without policy: every pod reaches every pod");
    let pairs = matrix::pairs(&pods);
    for version in [4, 6] {
        let expected = expectation::explain(&hanse, &clusters, None, &pairs, version, scratch.path())?;
        let expected: Vec<bool> = expected.iter().map(|answer| answer.allowed).collect();
        let began = Instant::now();
        let observed = matrix::measure(&fabric, &pairs, version);
        let differences = matrix::differences(&pairs, &observed, &expected);
        if version == 4 {
            print!("{}", matrix::draw(&pods, &pairs, &observed, &expected, screen.colour));
        }
        screen.verdict(
            &format!("IPv{version}: {} connections tried in {} ms", pairs.len(), began.elapsed().as_millis()),
            &differences,
        );
        wrong += differences.len();
    }

    screen.title("A hub for them");
    let hub = start_hub(&fabric, programs, &scratch.path().join("hub"))?;
    screen.say(&format!("  hanse-hub serves as process {}", hub.id()));

    screen.say("  From here on the demo itself carries rule sets to the nodes, in place of members and agents.");
    let mut enforcement = Enforcement::default();
    let federation = manifests.join("federation");
    let mut clusters = clusters;
    for (title, relabelled) in [
        ("Default deny and the federation's policies, compiled and put into every node's kernel", false),
        ("serve/notebook-0 is relabelled app=vllm: the registry of train opens to it", true),
    ] {
        screen.title(title);
        if relabelled {
            let directory = scratch.path().join("serve");
            std::fs::create_dir(&directory).context("make a folder for the changed manifests")?;
            let text =
                std::fs::read_to_string(manifests.join("serve/cluster.yaml")).context("read serve's manifests")?;
            let text = text.replace("app: notebook", "app: vllm");
            std::fs::write(directory.join("cluster.yaml"), text).context("write serve's manifests")?;
            clusters[1] = Cluster::read(CLUSTERS[1], &directory).context("read serve's manifests")?;
        }
        let took = enforcement.apply(&fabric, &clusters, &federation)?;
        screen.say(&format!("  read, compiled and applied on six nodes in {} ms", took.as_millis()));
        for version in [4, 6] {
            let asked = expectation::explain(&hanse, &clusters, Some(&federation), &pairs, version, scratch.path())?;
            let asked: Vec<bool> = asked.iter().map(|answer| answer.allowed).collect();
            let observed = matrix::measure(&fabric, &pairs, version);
            let differences = matrix::differences(&pairs, &observed, &asked);
            if version == 4 {
                print!("{}", matrix::draw(&pods, &pairs, &observed, &asked, screen.colour));
            }
            let open = asked.iter().filter(|allowed| **allowed).count();
            screen.verdict(&format!("IPv{version}: {open} of {} pairs are open", pairs.len()), &differences);
            wrong += differences.len();
        }
    }

    if !once {
        stay(screen, privilege_flags())?;
    }
    let status = hub.stop(Duration::from_secs(10)).context("stop the hub")?;
    if !status.success() {
        bail!("the hub ended with {status}");
    }
    drop(listeners);
    Ok(wrong)
}

/// Keeps everything as it is until Ctrl-C, which ends the process.
fn stay(screen: &Screen, flags: &str) -> anyhow::Result<()> {
    // /proc is the machine's, so this is our number as the machine knows it.
    let process = std::fs::read_link("/proc/self").context("read our process number")?;
    screen.title("Everything stays up until Ctrl-C");
    let enter = format!("nsenter --target {} {flags}--net --mount", process.display());
    screen.say(&format!("  the namespaces:   {enter} ip netns list"));
    screen.say(&format!("  the attacker:     {enter} ip netns exec prod-sandbox-attacker-0 bash"));
    screen.say("  what policy says: target/debug/hanse policy matrix --cluster train=e2e/demo/train \\");
    screen.say("                      --cluster serve=e2e/demo/serve --cluster prod=e2e/demo/prod --federation e2e/demo/federation");
    loop {
        std::thread::park();
    }
}

fn privilege_flags() -> &'static str {
    match sandbox::privilege() {
        Some(Privilege::UserNamespace) => "--user --preserve-credentials ",
        _ => "",
    }
}

/// Process 1 of a process namespace ignores signals that it does not ask for. When this process ends, the kernel ends
/// the others and removes their networks and files.
fn end_on_signal() -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    // Before any other thread starts, so that all of them leave the signals to this one.
    signals.thread_block().context("block signals")?;
    std::thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            println!("\nended by {signal}; everything is removed");
            std::process::exit(128 + signal as i32);
        }
    });
    Ok(())
}

fn start_hub(fabric: &Fabric, programs: &Path, data: &Path) -> anyhow::Result<Process> {
    let program = programs.join("hanse-hub");
    let hub = |verb: &str| {
        let mut command = std::process::Command::new(&program);
        command.args([verb, "--listen", HUB, "--join-listen", HUB_JOIN, "--data"]).arg(data);
        command
    };
    let output = hub("init").output().context("start hanse-hub init")?;
    if !output.status.success() {
        bail!("hanse-hub init: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let mut run = hub("run");
    run.args(["--health-listen", HUB_HEALTH]);
    let mut process = Process::start(fabric.router(), run, &data.with_extension("log")).context("start hanse-hub")?;
    let health = HUB_HEALTH.parse().context("read the health address")?;
    let ready = probe::until(Duration::from_secs(10), || {
        process.has_ended() || probe::http_ok(fabric.router(), health, "/readyz")
    });
    if ready.is_none() || process.has_ended() {
        bail!("the hub did not become ready:\n{}", process.log());
    }
    Ok(process)
}

struct Screen {
    colour: bool,
}

impl Screen {
    fn say(&self, text: &str) {
        println!("{text}");
    }

    fn title(&self, text: &str) {
        println!("\n{}", self.paint("1", text));
    }

    fn verdict(&self, text: &str, differences: &[String]) {
        if differences.is_empty() {
            println!("  {} {text}, all as policy says", self.paint("32", "✔"));
        } else {
            println!("  {} {text}, {} differ from policy", self.paint("31", "✘"), differences.len());
            for difference in differences {
                println!("      {difference}");
            }
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
