//! What `cargo xtask demo` runs: three clusters of AI workloads on one machine, and the packets between them.
//!
//! Every cell of a measured matrix is a TCP connection that was tried; what it is held against is what
//! `hanse policy explain` says of the same manifests. A difference ends the demo with exit code 1.

use std::collections::BTreeSet;
use std::io::IsTerminal as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;
use hanse_e2e::deployment::{Deployment, PATIENCE};
use hanse_e2e::fabric::Fabric;
use hanse_e2e::matrix;
use hanse_e2e::namespace::Namespace;
use hanse_e2e::packet::{Packet, Sender, TCP, Tap};
use hanse_e2e::probe::{self, Listener, Observed};
use hanse_e2e::sandbox::{self, Privilege};
use hanse_e2e::world::{Cluster, Pod};
use hanse_e2e::{expectation, namespace};
use nix::sys::signal::{SigSet, Signal};

const CLUSTERS: [&str; 3] = ["train", "serve", "prod"];
const MANIFEST: &str = "cluster.yaml";
/// How long a forged packet is waited for.
const FORGED_PATIENCE: Duration = Duration::from_millis(300);

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
    let scratch = tempfile::tempdir_in("/run").context("make a folder for the demo's files")?;
    let scratch = scratch.path();
    // The members read copies, so that the demo can edit them.
    let read = |name: &&str| -> anyhow::Result<Cluster> {
        let directory = scratch.join("clusters").join(name);
        std::fs::create_dir_all(&directory).context("make a folder for manifests")?;
        std::fs::copy(manifests.join(name).join(MANIFEST), directory.join(MANIFEST)).context("copy manifests")?;
        Cluster::read(name, &directory).context("read the demo's manifests")
    };
    let clusters: Vec<Cluster> = CLUSTERS.iter().map(read).collect::<anyhow::Result<_>>()?;
    let pods: Vec<Pod> = clusters.iter().flat_map(|cluster| cluster.pods.clone()).collect();

    screen.title("Three clusters of two nodes; every node and pod is a network namespace");
    let mut fabric = Fabric::build(&clusters).context("build the network")?;
    // A pod of prod that its manifests do not name yet.
    let newcomer = newcomer(&pods)?;
    fabric.add_pod(&newcomer).context("add the newcomer")?;
    let listen = |fabric: &Fabric, pod: &Pod| {
        let namespace = fabric.pod(pod).with_context(|| format!("find {}", pod.title()))?;
        Listener::start(namespace, pod.port, &pod.title()).with_context(|| format!("serve {}", pod.title()))
    };
    let listeners: Vec<Listener> = pods.iter().map(|pod| listen(&fabric, pod)).collect::<anyhow::Result<_>>()?;
    for cluster in &clusters {
        let names: Vec<&str> = cluster.pods.iter().map(|pod| pod.name.as_str()).collect();
        screen.say(&format!("  {:6} {}", cluster.name, names.join(", ")));
    }
    let find =
        |name: &str| pods.iter().find(|pod| pod.name == name).with_context(|| format!("{name} is in the manifests"));
    let connects = |fabric: &Fabric, from: &Pod, to: &Pod, family: usize| {
        fabric.pod(from).is_some_and(|namespace| {
            probe::tcp(namespace, SocketAddr::new(to.addresses[family], to.port), &to.title()) == Observed::Open
        })
    };
    let fabric = fabric;
    let federation = manifests.join("federation");
    let hanse = programs.join("hanse");
    let mut wrong = 0;
    let pairs = matrix::pairs(&pods);
    let measure = |fabric: &Fabric, policy: Option<&Path>, draw: bool| -> anyhow::Result<usize> {
        let mut wrong = 0;
        for version in [4, 6] {
            let expected = expectation::explain(&hanse, &clusters, policy, &pairs, version, scratch)?;
            let expected: Vec<bool> = expected.iter().map(|answer| answer.allowed).collect();
            let began = Instant::now();
            let observed = matrix::measure(fabric, &pairs, version);
            let differences = matrix::differences(&pairs, &observed, &expected);
            if draw && version == 4 {
                print!("{}", matrix::draw(&pods, &pairs, &observed, &expected, screen.colour));
            }
            let open = expected.iter().filter(|allowed| **allowed).count();
            let text = format!(
                "IPv{version}: {open} of {} pairs open, {} connections tried in {} ms",
                pairs.len(),
                pairs.len(),
                began.elapsed().as_millis()
            );
            screen.verdict(&text, &differences);
            wrong += differences.len();
        }
        Ok(wrong)
    };
    let claim = |text: &str, holds: bool| {
        screen.claim(text, holds);
        usize::from(!holds)
    };
    let becomes = |fabric: &Fabric, from: &Pod, to: &Pod, wanted: Observed| {
        let address = SocketAddr::new(to.addresses[0], to.port);
        fabric.pod(from).and_then(|inside| probe::becomes(inside, address, &to.title(), wanted, PATIENCE))
    };

    screen.title("A hub, a member of each cluster, an agent on every node; joined with real tokens");
    let mut world = Deployment::start(&fabric, programs, scratch)?;
    let member_clusters = federation.join("clusters.yaml");
    world.hanse(&["apply", "-f", &member_clusters.to_string_lossy()])?;
    let began = Instant::now();
    for cluster in &clusters {
        world.join(cluster, &cluster.directory)?;
    }
    world.settle(&CLUSTERS)?;
    screen.say(&format!("  3 members and 6 agents joined and in sync after {:.1} s", began.elapsed().as_secs_f64()));
    print!("{}", indent(&world.hanse(&["status"])?));
    screen.title("Without policy: every pod reaches every pod");
    wrong += measure(&fabric, None, true)?;

    screen.title("Default deny, and federated policies that allow exactly what the workloads need");
    let began = Instant::now();
    world.hanse(&["apply", "-f", &federation.to_string_lossy()])?;
    world.wait_for_policies()?;
    screen.say(&format!("  applied, and enforced on six nodes, after {} ms", began.elapsed().as_millis()));
    wrong += measure(&fabric, Some(&federation), true)?;

    screen.title("serve/notebook-0 is relabelled app=vllm in its own cluster: the registry of train opens to it");
    let (notebook, registry) = (find("notebook-0")?, find("registry-0")?);
    let manifest = clusters[1].directory.join(MANIFEST);
    wrong += claim("before: closed", !connects(&fabric, notebook, registry, 0));
    edit(&manifest, "app: notebook", "app: vllm")?;
    let followed = becomes(&fabric, notebook, registry, Observed::Open);
    let text = followed.map_or("it never opened".to_owned(), |took| {
        format!("open {} ms after the file was written", took.as_millis())
    });
    wrong += claim(&text, followed.is_some());
    world.settle(&CLUSTERS)?;
    wrong += measure(&fabric, Some(&federation), true)?;

    screen.title("The hub is killed: enforcement, and each cluster by itself, go on");
    world.kill_hub()?;
    wrong += measure(&fabric, Some(&federation), false)?;
    let (trainer, other) = (find("trainer-0")?, find("trainer-1")?);
    wrong += claim("train/trainer-0 reaches trainer-1", connects(&fabric, trainer, other, 0));
    let train = clusters[0].directory.join(MANIFEST);
    edit_pod(&train, "trainer-0", "app: trainer", "app: retired")?;
    let cut = becomes(&fabric, trainer, other, Observed::Closed);
    let text = cut.map_or("a relabel in train changed nothing".to_owned(), |took| {
        format!("relabelled app=retired: closed {} ms after the file was written, without a hub", took.as_millis())
    });
    wrong += claim(&text, cut.is_some());
    edit_pod(&train, "trainer-0", "app: retired", "app: trainer")?;
    let back = becomes(&fabric, trainer, other, Observed::Open);
    let text = back.map_or("relabelled back: still closed".to_owned(), |took| {
        format!("relabelled back: open again after {} ms", took.as_millis())
    });
    wrong += claim(&text, back.is_some());

    screen.title("The hub is back");
    world.start_hub()?;
    let took = world.settle(&CLUSTERS)?;
    screen.say(&format!("  everybody in sync after {} ms", took.as_millis()));
    wrong += measure(&fabric, Some(&federation), false)?;

    screen.title("The attacker lies about its address");
    let (attacker, client, gateway) = (find("attacker-0")?, find("client-0")?, find("gateway-0")?);
    let tap = Tap::open(fabric.pod(gateway).context("the gateway is built")?).context("watch the gateway")?;
    let mut seen = BTreeSet::new();
    let mut arrives = |number: u64, patience: Duration| {
        probe::until(patience, || {
            seen.extend(tap.arrived().unwrap_or_default());
            seen.contains(&number)
        })
    };
    for family in 0..2 {
        let target = SocketAddr::new(gateway.addresses[family], gateway.port);
        let address = client.addresses[family];
        let number = 2 * family as u64;
        send_as(fabric.pod(client).context("the client is built")?, address, target, number)?;
        let honest = arrives(number, PATIENCE).is_some();
        send_as(fabric.pod(attacker).context("the attacker is built")?, address, target, number + 1)?;
        let forged = arrives(number + 1, FORGED_PATIENCE).is_some();
        let text = format!(
            "a packet of {} as {address} reaches the gateway, the same of {} does not",
            client.title(),
            attacker.title()
        );
        wrong += claim(&text, honest && !forged);
    }

    screen.title("A new pod's first packets, before its rules; then it is named");
    for family in 0..2 {
        let quiet = !connects(&fabric, &newcomer, gateway, family) && !connects(&fabric, trainer, &newcomer, family);
        wrong += claim(&format!("{} reaches nobody and nobody reaches it", newcomer.addresses[family]), quiet);
    }
    let file = clusters[2].directory.join("newcomer.yaml");
    std::fs::write(&file, newcomer_manifest(&newcomer)).context("write the newcomer's manifest")?;
    let opened = becomes(&fabric, &newcomer, gateway, Observed::Open);
    let text = opened.map_or("it never reached the gateway".to_owned(), |took| {
        format!("as app=client it reaches the gateway {} ms after its manifest was written", took.as_millis())
    });
    wrong += claim(&text, opened.is_some());

    screen.title("prod is revoked: what it published is gone everywhere, at once");
    let vllm = find("vllm-0")?;
    wrong += claim("before: prod/gateway-0 reaches serve/vllm-0", connects(&fabric, gateway, vllm, 0));
    world.hanse(&["cluster", "revoke", "prod", "--reason", "the demo"])?;
    let closed = becomes(&fabric, gateway, vllm, Observed::Closed);
    let text = closed.map_or("it stayed open".to_owned(), |took| {
        format!("closed {} ms after the command returned", took.as_millis())
    });
    wrong += claim(&text, closed.is_some());
    wrong += claim("train and serve go on", connects(&fabric, notebook, registry, 0));

    if !once {
        stay(screen, privilege_flags(), &world, programs, scratch)?;
    }
    drop(world);
    drop(listeners);
    Ok(wrong)
}

/// A client in a namespace of its own on the node of the attacker.
fn newcomer(pods: &[Pod]) -> anyhow::Result<Pod> {
    let attacker = pods.iter().find(|pod| pod.name == "attacker-0").context("the attacker is in the manifests")?;
    let beside = |address: &IpAddr| match address {
        IpAddr::V4(address) => IpAddr::V4((u32::from(*address) + 50).into()),
        IpAddr::V6(address) => IpAddr::V6((u128::from(*address) + 50).into()),
    };
    let addresses = attacker.addresses.iter().map(beside).collect();
    Ok(Pod { namespace: "apps".into(), name: "newcomer-0".into(), addresses, ..attacker.clone() })
}

fn newcomer_manifest(pod: &Pod) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {}, namespace: {}, labels: {{app: client}}}}\n\
         spec: {{nodeName: {}}}\nstatus: {{phase: Running, podIP: {}, podIPs: [{{ip: {}}}, {{ip: \"{}\"}}]}}\n",
        pod.name, pod.namespace, pod.node, pod.addresses[0], pod.addresses[0], pod.addresses[1]
    )
}

/// Replaces text in a file, as editors do it: the file is never half written.
fn edit(path: &Path, from: &str, to: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path).context("read a manifest")?;
    if !text.contains(from) {
        bail!("{} does not hold {from}", path.display());
    }
    replace(path, &text.replace(from, to))
}

/// As [`edit`], in the document of one pod.
fn edit_pod(path: &Path, pod: &str, from: &str, to: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path).context("read a manifest")?;
    let documents = text.split("\n---\n").map(|document| {
        let is_it = document.lines().any(|line| line.trim() == format!("name: {pod}"));
        if is_it { document.replace(from, to) } else { document.to_owned() }
    });
    replace(path, &documents.collect::<Vec<_>>().join("\n---\n"))
}

fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).context("write a manifest")?;
    std::fs::rename(&beside, path).context("put a manifest in its place")
}

/// Sends the first packet of a TCP connection, from an address that need not be the sender's.
fn send_as(inside: &Namespace, source: IpAddr, target: SocketAddr, number: u64) -> anyhow::Result<()> {
    let sender = Sender::open(inside).context("open raw sockets")?;
    let (destination, destination_port, source_port) = (target.ip(), target.port(), 40_000);
    let packet = Packet { source, destination, protocol: TCP, source_port, destination_port, icmp: (0, 0), number };
    sender.send(&packet).context("send a packet")
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {}\n", line.trim_end())).collect()
}

/// Keeps everything as it is until Ctrl-C, which ends the process.
fn stay(screen: &Screen, flags: &str, world: &Deployment<'_>, programs: &Path, scratch: &Path) -> anyhow::Result<()> {
    // /proc is the machine's, so this is our number as the machine knows it.
    let process = std::fs::read_link("/proc/self").context("read our process number")?;
    screen.title("Everything stays up until Ctrl-C");
    let enter = format!("nsenter --target {} {flags}--net --mount", process.display());
    let (hanse, context) = (programs.canonicalize().context("find the programs")?.join("hanse"), world.context());
    let edit = scratch.join("clusters").join(CLUSTERS[0]).join(MANIFEST);
    screen.say("  in another terminal:");
    screen.say(&format!(
        "    hanse() {{ {enter} ip netns exec router {} --context {} \"$@\"; }}",
        hanse.display(),
        context.display()
    ));
    screen.say("    hanse status");
    screen.say("    hanse policy matrix --port 5000        # what the members say of the model registry");
    screen.say("    hanse get FederatedNetworkPolicy");
    screen.say("  the attacker's shell:");
    screen.say(&format!("    {enter} ip netns exec prod-sandbox-attacker-0 bash"));
    screen.say("  the manifests that a member watches; save a change and it is enforced:");
    screen.say(&format!("    {enter} ${{EDITOR:-vi}} {}", edit.display()));
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

    fn claim(&self, text: &str, holds: bool) {
        let mark = if holds { self.paint("32", "✔") } else { self.paint("31", "✘ the packets say otherwise:") };
        println!("  {mark} {text}");
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
