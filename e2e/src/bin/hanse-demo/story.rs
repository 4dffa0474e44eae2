//! The steps of the demo.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hanse_e2e::deployment::{Deployment, PATIENCE};
use hanse_e2e::fabric::Fabric;
use hanse_e2e::namespace::Namespace;
use hanse_e2e::packet::{Packet, Sender, TCP, Tap};
use hanse_e2e::probe::{self, Listener, Observed};
use hanse_e2e::sandbox;
use hanse_e2e::world::{Cluster, Pod};
use hanse_e2e::{expectation, matrix};

use crate::manifests::{edit, edit_pod, newcomer, newcomer_manifest};
use crate::screen::Screen;

const CLUSTERS: [&str; 3] = ["train", "serve", "prod"];
const MANIFEST: &str = "cluster.yaml";
/// How long the demo waits for a forged packet, which must not arrive.
pub const FORGED_PATIENCE: Duration = Duration::from_millis(300);

/// Runs all steps. Returns how many measurements differed from policy.
pub fn run(screen: &Screen, programs: &Path, manifests: &Path, once: bool) -> anyhow::Result<usize> {
    let scratch = tempfile::tempdir_in("/run").context("create a directory for the demo's files")?;
    let clusters = copy_clusters(manifests, scratch.path())?;
    let pods: Vec<Pod> = clusters.iter().flat_map(|cluster| cluster.pods.clone()).collect();
    let newcomer = newcomer(&pods)?;
    let fabric = build(screen, &clusters, &newcomer)?;
    let _listeners = listen(&fabric, &pods)?;
    let mut demo = Demo {
        screen,
        hanse: programs.join("hanse"),
        federation: manifests.join("federation"),
        scratch: scratch.path(),
        clusters: &clusters,
        pods: &pods,
        pairs: matrix::pairs(&pods),
        fabric: &fabric,
        world: start(screen, &fabric, programs, scratch.path())?,
    };
    demo.join()?;
    demo.without_policy()?;
    demo.default_deny()?;
    demo.relabelled()?;
    demo.without_hub()?;
    demo.hub_restarted()?;
    demo.forged_source()?;
    demo.new_pod(&newcomer)?;
    demo.revoked()?;
    if !once {
        stay(screen, &demo.world, programs, scratch.path())?;
    }
    Ok(screen.wrong())
}

/// Copies the manifests that the members read, so that the demo can edit them.
fn copy_clusters(manifests: &Path, scratch: &Path) -> anyhow::Result<Vec<Cluster>> {
    let copy = |name: &&str| -> anyhow::Result<Cluster> {
        let directory = scratch.join("clusters").join(name);
        std::fs::create_dir_all(&directory).context("create a directory for manifests")?;
        std::fs::copy(manifests.join(name).join(MANIFEST), directory.join(MANIFEST)).context("copy manifests")?;
        Cluster::read(name, &directory).context("read the demo's manifests")
    };
    CLUSTERS.iter().map(copy).collect()
}

fn build(screen: &Screen, clusters: &[Cluster], newcomer: &Pod) -> anyhow::Result<Fabric> {
    screen.title("Three clusters of two nodes; every node and pod is a network namespace");
    let mut fabric = Fabric::build(clusters).context("build the network")?;
    // A pod of prod that its manifests do not name yet.
    fabric.add_pod(newcomer).context("add the new pod")?;
    for cluster in clusters {
        let names: Vec<&str> = cluster.pods.iter().map(|pod| pod.name.as_str()).collect();
        screen.say(&format!("  {:6} {}", cluster.name, names.join(", ")));
    }
    Ok(fabric)
}

fn listen(fabric: &Fabric, pods: &[Pod]) -> anyhow::Result<Vec<Listener>> {
    let listen = |pod: &Pod| {
        let namespace = fabric.pod(pod).with_context(|| format!("find {}", pod.title()))?;
        Listener::start(namespace, pod.port, &pod.title()).with_context(|| format!("serve {}", pod.title()))
    };
    pods.iter().map(listen).collect()
}

fn start<'f>(screen: &Screen, fabric: &'f Fabric, programs: &Path, scratch: &Path) -> anyhow::Result<Deployment<'f>> {
    screen.title("A hub, a member of each cluster, an agent on every node; joined with real tokens");
    Deployment::start(fabric, programs, scratch)
}

struct Demo<'a> {
    screen: &'a Screen,
    hanse: PathBuf,
    federation: PathBuf,
    scratch: &'a Path,
    clusters: &'a [Cluster],
    pods: &'a [Pod],
    pairs: Vec<(&'a Pod, &'a Pod)>,
    fabric: &'a Fabric,
    world: Deployment<'a>,
}

impl<'a> Demo<'a> {
    fn join(&mut self) -> anyhow::Result<()> {
        self.apply(&self.federation.join("clusters.yaml"))?;
        let start = Instant::now();
        for cluster in self.clusters {
            self.world.join(cluster, &cluster.directory)?;
        }
        self.world.settle(&CLUSTERS)?;
        let seconds = start.elapsed().as_secs_f64();
        self.screen.say(&format!("  3 members and 6 agents joined and in sync after {seconds:.1} s"));
        self.screen.quote(&self.world.hanse(&["status"])?);
        Ok(())
    }

    fn without_policy(&mut self) -> anyhow::Result<()> {
        self.screen.title("Without policy: every pod reaches every pod");
        self.measure(false, true)
    }

    fn default_deny(&mut self) -> anyhow::Result<()> {
        self.screen.title("Default deny, and federated policies that allow exactly what the workloads need");
        let start = Instant::now();
        self.apply(&self.federation.clone())?;
        self.world.wait_for_policies()?;
        self.screen.say(&format!("  applied, and enforced on six nodes, after {} ms", start.elapsed().as_millis()));
        self.measure(true, true)
    }

    fn relabelled(&mut self) -> anyhow::Result<()> {
        self.screen
            .title("serve/notebook-0 gets the label app=vllm in its own cluster: the registry of train opens to it");
        let (notebook, registry) = (self.pod("notebook-0")?, self.pod("registry-0")?);
        self.screen.claim("before: closed", !self.connects(notebook, registry, 0));
        edit(&self.manifest(1), "app: notebook", "app: vllm")?;
        let took = self.becomes(notebook, registry, Observed::Open);
        self.screen.claim_within(took, "it did not open", |ms| format!("open {ms} ms after the file was written"));
        self.world.settle(&CLUSTERS)?;
        self.measure(true, true)
    }

    fn without_hub(&mut self) -> anyhow::Result<()> {
        self.screen.title("The hub is killed: enforcement continues, and so does each cluster by itself");
        self.world.kill_hub()?;
        self.measure(true, false)?;
        let (trainer, other) = (self.pod("trainer-0")?, self.pod("trainer-1")?);
        self.screen.claim("train/trainer-0 reaches trainer-1", self.connects(trainer, other, 0));
        let train = self.manifest(0);
        edit_pod(&train, "trainer-0", "app: trainer", "app: retired")?;
        let took = self.becomes(trainer, other, Observed::Closed);
        self.screen.claim_within(took, "a new label in train changed nothing", |ms| {
            format!("labelled app=retired: closed {ms} ms after the file was written, without a hub")
        });
        edit_pod(&train, "trainer-0", "app: retired", "app: trainer")?;
        let took = self.becomes(trainer, other, Observed::Open);
        self.screen.claim_within(took, "labelled app=trainer again: still closed", |ms| {
            format!("labelled app=trainer again: open after {ms} ms")
        });
        Ok(())
    }

    fn hub_restarted(&mut self) -> anyhow::Result<()> {
        self.screen.title("The hub is started again");
        self.world.start_hub()?;
        let took = self.world.settle(&CLUSTERS)?;
        self.screen.say(&format!("  all members and agents in sync after {} ms", took.as_millis()));
        self.measure(true, false)
    }

    fn forged_source(&mut self) -> anyhow::Result<()> {
        self.screen.title("The attacker forges its source address");
        let (attacker, client, gateway) = (self.pod("attacker-0")?, self.pod("client-0")?, self.pod("gateway-0")?);
        let tap = Tap::open(self.namespace(gateway)?).context("watch the gateway")?;
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
            send_as(self.namespace(client)?, address, target, number)?;
            let honest = arrives(number, PATIENCE).is_some();
            send_as(self.namespace(attacker)?, address, target, number + 1)?;
            let forged = arrives(number + 1, FORGED_PATIENCE).is_some();
            let text = format!(
                "a packet of {} from {address} reaches the gateway, the same packet of {} does not",
                client.title(),
                attacker.title()
            );
            self.screen.claim(&text, honest && !forged);
        }
        Ok(())
    }

    fn new_pod(&mut self, newcomer: &Pod) -> anyhow::Result<()> {
        self.screen.title("A new pod sends packets before its rules arrive; then its manifest is written");
        let (gateway, trainer) = (self.pod("gateway-0")?, self.pod("trainer-0")?);
        for family in 0..2 {
            let closed = !self.connects(newcomer, gateway, family) && !self.connects(trainer, newcomer, family);
            self.screen.claim(&format!("{} is closed in both directions", newcomer.addresses[family]), closed);
        }
        let file = self.clusters[2].directory.join("newcomer.yaml");
        std::fs::write(&file, newcomer_manifest(newcomer)).context("write the manifest of the new pod")?;
        let took = self.becomes(newcomer, gateway, Observed::Open);
        self.screen.claim_within(took, "it did not reach the gateway", |ms| {
            format!("with the label app=client it reaches the gateway {ms} ms after its manifest was written")
        });
        Ok(())
    }

    fn revoked(&mut self) -> anyhow::Result<()> {
        self.screen.title("prod is revoked: its endpoints are withdrawn from every cluster at once");
        let (gateway, vllm) = (self.pod("gateway-0")?, self.pod("vllm-0")?);
        self.screen.claim("before: prod/gateway-0 reaches serve/vllm-0", self.connects(gateway, vllm, 0));
        self.world.hanse(&["cluster", "revoke", "prod", "--reason", "the demo"])?;
        let took = self.becomes(gateway, vllm, Observed::Closed);
        self.screen.claim_within(took, "it stayed open", |ms| format!("closed {ms} ms after the command returned"));
        let (notebook, registry) = (self.pod("notebook-0")?, self.pod("registry-0")?);
        self.screen.claim("train and serve are not affected", self.connects(notebook, registry, 0));
        Ok(())
    }

    /// Tries every pair of pods over both families, and compares with policy: the federation's, or none.
    fn measure(&mut self, with_policy: bool, draw: bool) -> anyhow::Result<()> {
        let policy = with_policy.then_some(self.federation.as_path());
        for version in [4, 6] {
            let expected =
                expectation::explain(&self.hanse, self.clusters, policy, &self.pairs, version, self.scratch)?;
            let expected: Vec<bool> = expected.iter().map(|answer| answer.allowed).collect();
            let start = Instant::now();
            let observed = matrix::measure(self.fabric, &self.pairs, version);
            let differences = matrix::differences(&self.pairs, &observed, &expected);
            if draw && version == 4 {
                let drawn = matrix::draw(self.pods, &self.pairs, &observed, &expected, self.screen.colour);
                self.screen.say(drawn.trim_end_matches('\n'));
            }
            let open = expected.iter().filter(|allowed| **allowed).count();
            let text = format!(
                "IPv{version}: {open} of {pairs} pairs open, {pairs} connections tried in {} ms",
                start.elapsed().as_millis(),
                pairs = self.pairs.len(),
            );
            self.screen.verdict(&text, &differences);
        }
        Ok(())
    }

    fn apply(&self, manifests: &Path) -> anyhow::Result<()> {
        self.world.hanse(&["apply", "-f", &manifests.to_string_lossy()]).map(drop)
    }

    fn pod(&self, name: &str) -> anyhow::Result<&'a Pod> {
        self.pods.iter().find(|pod| pod.name == name).with_context(|| format!("{name} is in the manifests"))
    }

    fn namespace(&self, pod: &Pod) -> anyhow::Result<&'a Namespace> {
        self.fabric.pod(pod).with_context(|| format!("{} has a namespace", pod.title()))
    }

    fn manifest(&self, cluster: usize) -> PathBuf {
        self.clusters[cluster].directory.join(MANIFEST)
    }

    fn connects(&self, from: &Pod, to: &Pod, family: usize) -> bool {
        let address = SocketAddr::new(to.addresses[family], to.port);
        self.fabric.pod(from).is_some_and(|inside| probe::tcp(inside, address, &to.title()) == Observed::Open)
    }

    fn becomes(&self, from: &Pod, to: &Pod, wanted: Observed) -> Option<Duration> {
        let address = SocketAddr::new(to.addresses[0], to.port);
        self.fabric.pod(from).and_then(|inside| probe::becomes(inside, address, &to.title(), wanted, PATIENCE))
    }
}

/// Sends the first packet of a TCP connection, from an address that need not be the sender's.
pub fn send_as(inside: &Namespace, source: IpAddr, target: SocketAddr, number: u64) -> anyhow::Result<()> {
    let sender = Sender::open(inside).context("open raw sockets")?;
    let (destination, destination_port, source_port) = (target.ip(), target.port(), 40_000);
    let packet = Packet { source, destination, protocol: TCP, source_port, destination_port, icmp: (0, 0), number };
    sender.send(&packet).context("send a packet")
}

/// Keeps everything running until Ctrl-C, which ends the process.
fn stay(screen: &Screen, world: &Deployment<'_>, programs: &Path, scratch: &Path) -> anyhow::Result<()> {
    screen.title("The clusters keep running until Ctrl-C");
    let enter = sandbox::command()?;
    let (hanse, context) = (programs.canonicalize().context("find the programs")?.join("hanse"), world.context());
    let edit = scratch.join("clusters").join(CLUSTERS[0]).join(MANIFEST);
    screen.say("  in another terminal:");
    screen.say(&format!(
        "    hanse() {{ {enter} ip netns exec router {} --context {} \"$@\"; }}",
        hanse.display(),
        context.display()
    ));
    screen.say("    hanse status");
    screen.say("    hanse policy matrix --port 5000        # the verdicts for the model registry, from the members");
    screen.say("    hanse get FederatedNetworkPolicy");
    screen.say("  a shell of the attacker:");
    screen.say(&format!("    {enter} ip netns exec prod-sandbox-attacker-0 bash"));
    screen.say("  the manifests that a member watches; a saved change is enforced:");
    screen.say(&format!("    {enter} ${{EDITOR:-vi}} {}", edit.display()));
    loop {
        std::thread::park();
    }
}
