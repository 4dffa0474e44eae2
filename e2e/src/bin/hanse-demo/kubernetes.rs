//! The demo on real API servers: a management cluster whose custom resources are the policy, and two clusters whose pods are
//! judged by it. Everything is done with `kubectl` and `helm`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use hanse_e2e::fabric::Fabric;
use hanse_e2e::federation::{Federation, becomes, kubectl};
use hanse_e2e::kubernetes::cluster::{Cluster, Endpoint};
use hanse_e2e::kubernetes::{kubeconfig, until};
use hanse_e2e::matrix::{self, Network};
use hanse_e2e::namespace::Namespace;
use hanse_e2e::packet::Tap;
use hanse_e2e::probe::{self, Observed};
use hanse_e2e::world::{self, Node, Pod};
use hanse_e2e::{expectation, kubernetes, sandbox};
use serde_json::json;

use crate::screen::Screen;
use crate::story::{FORGED_PATIENCE, send_as};

const CLUSTERS: [(&str, u8); 2] = [("train", 10), ("prod", 30)];
/// How long packets and conditions may take to change.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs all steps. Returns how many measurements differed from policy.
pub fn run(screen: &Screen, programs: &Path, manifests: &Path, once: bool) -> anyhow::Result<usize> {
    // Pods see them at the same path.
    let programs = &programs.canonicalize().context("find the programs")?;
    let scratch = tempfile::tempdir_in("/run").context("create a folder for the demo's files")?;
    let worlds: Vec<world::Cluster> =
        CLUSTERS.iter().map(|(name, number)| world(name, *number)).collect::<Result<_, _>>()?;
    let fabric = Fabric::build(&worlds).context("build the network")?;
    fabric.router().enter(|| {
        kubernetes::run(async {
            screen.title(
                "A management cluster and two clusters of two nodes: real API servers; pods are network namespaces",
            );
            let start = Instant::now();
            let folder = manifests.join("kubernetes");
            let read = |name: &str| std::fs::read_to_string(folder.join(name)).with_context(|| format!("read {name}"));
            let registrations = read("clusters.yaml")?;
            let federation = Federation::start(&fabric, &worlds, &registrations, programs, scratch.path()).await?;
            screen.say(&format!(
                "  API servers, controllers, nodes and the hub after {:.1} s",
                start.elapsed().as_secs_f64()
            ));
            let mut demo = Demo {
                screen,
                hanse: programs.join("hanse"),
                policies: manifests.join("federation/policies.yaml"),
                scratch: scratch.path(),
                federation,
                pods: Vec::new(),
            };
            demo.install().await?;
            for (name, _) in CLUSTERS {
                demo.cluster(name)?.apply(&read(&format!("{name}.yaml"))?).await?;
            }
            demo.without_policy().await?;
            demo.policies_applied().await?;
            demo.relabelled().await?;
            demo.scaled().await?;
            demo.deleted().await?;
            demo.without_management().await?;
            demo.forged_source().await?;
            if !once {
                demo.stay(programs)?;
            }
            demo.revoked().await?;
            Ok(screen.wrong())
        })
    })
}

/// A cluster of two nodes, with addresses of both families.
fn world(name: &str, number: u8) -> anyhow::Result<world::Cluster> {
    let node = |of: u8| -> anyhow::Result<Node> {
        let addresses = [format!("192.168.{number}.{of}"), format!("fd00:{number}::{of}")];
        let ranges = [format!("10.{number}.{of}.0/24"), format!("fd00:{number}:{of}::/64")];
        Ok(Node {
            name: format!("node-{of}"),
            addresses: addresses.iter().map(|it| it.parse()).collect::<Result<_, _>>()?,
            pod_ranges: ranges.iter().map(|it| it.parse()).collect::<Result<_, _>>()?,
        })
    };
    let nodes = vec![node(1)?, node(2)?];
    Ok(world::Cluster { name: name.to_owned(), directory: PathBuf::new(), nodes, pods: Vec::new() })
}

struct Demo<'a> {
    screen: &'a Screen,
    hanse: PathBuf,
    policies: PathBuf,
    scratch: &'a Path,
    federation: Federation<'a>,
    pods: Vec<Endpoint>,
}

/// The pods of a measurement.
struct Running<'a>(&'a [Endpoint]);

impl Running<'_> {
    fn find(&self, pod: &Pod) -> Option<&Endpoint> {
        let key = |pod: &Pod| (pod.cluster.clone(), pod.namespace.clone(), pod.name.clone());
        self.0.iter().find(|it| key(&it.pod) == key(pod))
    }
}

impl Network for Running<'_> {
    fn namespace(&self, pod: &Pod) -> Option<&Namespace> {
        self.find(pod).map(|it| it.network.as_ref())
    }

    fn answer(&self, pod: &Pod) -> String {
        self.find(pod).map(Endpoint::title).unwrap_or_default()
    }
}

impl Demo<'_> {
    async fn install(&self) -> anyhow::Result<()> {
        self.screen.title("kubectl apply of MemberClusters and join tokens; helm install in both clusters");
        let start = Instant::now();
        self.federation.join().await?;
        let seconds = start.elapsed().as_secs_f64();
        self.screen.say(&format!("  2 members and 4 agents are pods, and in sync after {seconds:.1} s"));
        self.screen.quote(&self.federation.kubectl(&["get", "memberclusters"])?);
        Ok(())
    }

    async fn without_policy(&mut self) -> anyhow::Result<()> {
        self.screen
            .title("kubectl apply of the workloads in both clusters; without policy, every pod reaches every pod");
        for (name, count) in [("train", 3), ("prod", 5)] {
            self.running(name, count).await?;
        }
        self.measure(true).await
    }

    async fn policies_applied(&mut self) -> anyhow::Result<()> {
        self.screen
            .title("kubectl apply at the management cluster: default deny, and policies for what the workloads need");
        let (client, attacker) = (self.pod("client").await?, self.pod("attacker").await?);
        self.federation.kubectl(&["apply", "-f", &self.policies.to_string_lossy()])?;
        let took = becomes(&[(&attacker, &client)], &Observed::Closed, PATIENCE);
        self.screen.claim_within(took, "the attacker reaches the application", |ms| {
            format!("the attacker no longer reaches the application {ms} ms after kubectl returned")
        });
        self.enforced()?;
        let table = self.federation.kubectl(&["get", "federatednetworkpolicies"])?;
        self.screen.quote(&table);
        let is_counted = |line: &str| line.contains("2/2") && line.contains("4/4");
        self.screen.claim("every policy counts two clusters and four nodes", table.lines().skip(1).all(is_counted));
        self.measure(true).await
    }

    async fn relabelled(&mut self) -> anyhow::Result<()> {
        self.screen.title("prod: kubectl label pod notebook app=vllm; the registry in train opens to it");
        let (notebook, registry) = (self.pod("notebook").await?, self.pod("registry").await?);
        self.screen.claim("before: closed", notebook.observe(&registry) == Observed::Closed);
        self.in_cluster("prod", &["label", "pod", "notebook", "--namespace=research", "--overwrite", "app=vllm"])?;
        let took = becomes(&[(&notebook, &registry)], &Observed::Open, PATIENCE);
        self.screen.claim_within(took, "it did not open", |ms| format!("open {ms} ms after kubectl returned"));
        self.in_cluster("prod", &["label", "pod", "notebook", "--namespace=research", "--overwrite", "app=notebook"])?;
        let took = becomes(&[(&notebook, &registry)], &Observed::Closed, PATIENCE);
        self.screen.claim_within(took, "it did not close", |ms| format!("labelled back: closed after {ms} ms"));
        Ok(())
    }

    async fn scaled(&mut self) -> anyhow::Result<()> {
        self.screen.title("prod: kubectl scale deployment vllm --replicas=2; the new pod has the rules of its labels");
        let known = self.pod("vllm").await?;
        self.in_cluster("prod", &["scale", "deployment", "vllm", "--namespace=inference", "--replicas=2"])?;
        let start = Instant::now();
        let all = self.cluster("prod")?.ready("inference", "app=vllm", 2).await?;
        let new = all.into_iter().find(|it| it.pod.name != known.pod.name).context("a pod is new")?;
        let ready = start.elapsed();
        let (registry, attacker) = (self.pod("registry").await?, self.pod("attacker").await?);
        let took = becomes(&[(&new, &registry)], &Observed::Open, PATIENCE).map(|took| ready + took);
        self.screen.claim_within(took, "it does not reach the registry", |ms| {
            format!("{} reaches the registry in train {ms} ms after kubectl returned", new.pod.name)
        });
        self.screen.claim("the attacker does not reach it", attacker.observe(&new) == Observed::Closed);
        self.running("prod", 6).await?;
        self.measure(true).await
    }

    async fn deleted(&mut self) -> anyhow::Result<()> {
        self.screen.title("kubectl delete of the policy that opens the registry; then it is applied again");
        let (vllm, trainer, registry) =
            (self.pod("vllm").await?, self.pod("trainer").await?, self.pod("registry").await?);
        let pairs = [(&vllm, &registry), (&trainer, &registry)];
        self.federation.kubectl(&["delete", "--wait=false", "federatednetworkpolicy/registry"])?;
        let took = becomes(&pairs, &Observed::Closed, PATIENCE);
        self.screen.claim_within(took, "it stays open", |ms| {
            format!("prod/vllm and train/trainer no longer reach it {ms} ms after kubectl returned")
        });
        // Not before its finalizer is removed: the object would be the one that is being deleted.
        self.federation.kubectl(&["wait", "--for=delete", "--timeout=60s", "federatednetworkpolicy/registry"])?;
        let text = std::fs::read_to_string(&self.policies).context("read the policies")?;
        let registry = text.split("\n---\n").find(|it| it.contains("\n  name: registry\n"));
        self.federation.apply(registry.context("the policies have one of the registry")?)?;
        let took = becomes(&pairs, &Observed::Open, PATIENCE);
        self.screen.claim_within(took, "it stays closed", |ms| format!("applied again: open after {ms} ms"));
        self.enforced()
    }

    async fn without_management(&mut self) -> anyhow::Result<()> {
        self.screen.title("The management API server and the hub are killed: each cluster continues by itself");
        let before = self.operator()?;
        self.federation.management.kill()?;
        self.federation.system.kill_hub()?;
        let trainers = self.cluster("train")?.ready("training", "app=trainer", 2).await?;
        self.measure(false).await?;
        self.in_cluster("train", &["label", "pod", "trainer-0", "--namespace=training", "job=llm-7b", "stopped=true"])?;
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": { "name": "stopped", "namespace": "training" },
            "spec": { "podSelector": { "matchLabels": { "stopped": "true" } }, "policyTypes": ["Ingress", "Egress"] },
        });
        kubectl(&self.cluster("train")?.server, &["apply", "-f", "-"], &policy.to_string())?;
        let took = becomes(&[(&trainers[0], &trainers[1])], &Observed::Closed, PATIENCE);
        self.screen.claim_within(took, "a NetworkPolicy of train changed nothing", |ms| {
            format!("a NetworkPolicy of train closes trainer-0 {ms} ms after kubectl returned")
        });
        self.in_cluster("train", &["delete", "networkpolicy", "stopped", "--namespace=training"])?;
        let took = becomes(&[(&trainers[0], &trainers[1])], &Observed::Open, PATIENCE);
        self.screen.claim_within(took, "it stays closed", |ms| format!("deleted: open after {ms} ms"));
        self.federation.management.start_again().await?;
        self.federation.system.start_hub()?;
        let took = self.federation.settle()?;
        self.screen.say(&format!("  started again: all members and agents in sync after {} ms", took.as_millis()));
        // The hub was killed, and did not give its Lease back.
        let elected = until(PATIENCE, async || self.operator().is_ok_and(|now| !now.is_empty() && now != before)).await;
        let elected = elected.context("no operator is elected")?;
        self.screen.say(&format!("  its operator has the Lease {:.1} s later", elected.as_secs_f64()));
        self.enforced()
    }

    /// The hub whose operator reconciles.
    fn operator(&self) -> anyhow::Result<String> {
        self.federation.kubectl(&["get", "lease", "hanse-hub-operator", "-o", "jsonpath={.spec.holderIdentity}"])
    }

    async fn forged_source(&mut self) -> anyhow::Result<()> {
        self.screen.title("The attacker forges its source address");
        let (attacker, client, gateway) =
            (self.pod("attacker").await?, self.pod("client").await?, self.pod("gateway").await?);
        let tap = Tap::open(&gateway.network).context("watch the gateway")?;
        let mut seen = BTreeSet::new();
        let mut arrives = |number: u64, patience: Duration| {
            probe::until(patience, || {
                seen.extend(tap.arrived().unwrap_or_default());
                seen.contains(&number)
            })
        };
        for family in 0..2 {
            let (address, number) = (client.pod.addresses[family], 2 * family as u64);
            send_as(&client.network, address, gateway.address(family), number)?;
            let honest = arrives(number, PATIENCE).is_some();
            send_as(&attacker.network, address, gateway.address(family), number + 1)?;
            let forged = arrives(number + 1, FORGED_PATIENCE).is_some();
            let text = format!(
                "a packet of the client from {address} reaches the gateway, the same packet of the attacker does not"
            );
            self.screen.claim(&text, honest && !forged);
        }
        Ok(())
    }

    async fn revoked(&mut self) -> anyhow::Result<()> {
        self.screen
            .title("kubectl patch of MemberCluster prod: revoked, its endpoints are withdrawn from every cluster");
        let (vllm, registry, trainer) =
            (self.pod("vllm").await?, self.pod("registry").await?, self.pod("trainer").await?);
        self.screen.claim("before: prod/vllm reaches train/registry", vllm.observe(&registry) == Observed::Open);
        let patch = json!({ "spec": { "acceptance": "Revoked" } }).to_string();
        self.federation.kubectl(&["patch", "membercluster", "prod", "--type=merge", "--patch", &patch])?;
        let took = becomes(&[(&vllm, &registry)], &Observed::Closed, PATIENCE);
        self.screen.claim_within(took, "it stayed open", |ms| format!("closed {ms} ms after kubectl returned"));
        self.screen.claim("train is not affected", trainer.observe(&registry) == Observed::Open);
        Ok(())
    }

    /// Waits until every policy is enforced, as a user does.
    fn enforced(&self) -> anyhow::Result<()> {
        let start = Instant::now();
        let wait = ["wait", "--for=condition=Enforced", "--timeout=60s", "--all", "federatednetworkpolicies"];
        self.federation.kubectl(&wait).with_context(|| self.federation.logs())?;
        let seconds = start.elapsed().as_secs_f64();
        self.screen.say(&format!("  kubectl wait --for=condition=Enforced fnp --all: {seconds:.1} s"));
        Ok(())
    }

    /// Tries every pair of pods over both families, and compares with `hanse policy explain` for the objects of the API servers.
    async fn measure(&mut self, draw: bool) -> anyhow::Result<()> {
        self.read().await?;
        let pods: Vec<Pod> = self.pods.iter().map(|it| it.pod.clone()).collect();
        let pairs = matrix::pairs(&pods);
        let clusters: Vec<world::Cluster> = CLUSTERS
            .iter()
            .map(|(name, _)| world::Cluster {
                name: (*name).to_owned(),
                directory: self.scratch.join("objects").join(name),
                nodes: Vec::new(),
                pods: Vec::new(),
            })
            .collect();
        let federation = self.scratch.join("objects/management");
        for version in [4, 6] {
            let expected =
                expectation::explain(&self.hanse, &clusters, Some(&federation), &pairs, version, self.scratch)?;
            let expected: Vec<bool> = expected.iter().map(|answer| answer.allowed).collect();
            // What policy opens may take a moment, since new pods are closed until their rules arrive. What it closes may not.
            let (mut took, mut observed) = (Duration::ZERO, Vec::new());
            probe::until(PATIENCE, || {
                let attempt = Instant::now();
                observed = matrix::measure(&Running(&self.pods), &pairs, version);
                took = attempt.elapsed();
                let has = |found: &Observed, allowed: bool| {
                    observed.iter().zip(&expected).any(|(outcome, expected)| outcome == found && *expected == allowed)
                };
                has(&Observed::Open, false) || !has(&Observed::Closed, true)
            });
            let differences = matrix::differences(&pairs, &observed, &expected);
            if draw && version == 4 {
                let drawn = matrix::draw(&pods, &pairs, &observed, &expected, self.screen.colour);
                self.screen.say(drawn.trim_end_matches('\n'));
            }
            let open = expected.iter().filter(|allowed| **allowed).count();
            let text = format!(
                "IPv{version}: {open} of {pairs} pairs open, {pairs} connections tried in {} ms",
                took.as_millis(),
                pairs = pairs.len(),
            );
            self.screen.verdict(&text, &differences);
        }
        Ok(())
    }

    /// Stores the objects of every API server that answers as manifests, and finds the pods.
    async fn read(&mut self) -> anyhow::Result<()> {
        const KINDS: &str = "namespaces,nodes,serviceaccounts,services,pods,networkpolicies";
        const POLICIES: &str = "memberclusters,tiers.hanse.dev,federatednetworkpolicies,federatednetworksets";
        let objects = self.scratch.join("objects");
        let store = |name: &str, file: &str, text: &str| -> anyhow::Result<()> {
            std::fs::create_dir_all(objects.join(name)).context("create a folder for objects")?;
            std::fs::write(objects.join(name).join(file), text).context("write objects")
        };
        if self.federation.management.process().is_some() {
            store("management", "policies.yaml", &self.federation.kubectl(&["get", POLICIES, "-o", "json"])?)?;
        }
        self.pods.clear();
        for cluster in &self.federation.clusters {
            store(cluster.name(), "objects.yaml", &kubectl(&cluster.server, &["get", KINDS, "-A", "-o", "json"], "")?)?;
            self.pods.extend(cluster.endpoints().await?);
        }
        Ok(())
    }

    /// Waits until a cluster runs exactly `count` workloads.
    async fn running(&self, cluster: &str, count: usize) -> anyhow::Result<()> {
        let cluster = self.cluster(cluster)?;
        let all = until(PATIENCE, async || cluster.endpoints().await.is_ok_and(|it| it.len() == count));
        ensure!(all.await.is_some(), "{} does not run {count} pods\n{}", cluster.name(), self.federation.logs());
        Ok(())
    }

    fn cluster(&self, name: &str) -> anyhow::Result<&Cluster> {
        self.federation.clusters.iter().find(|it| it.name() == name).with_context(|| format!("cluster {name} runs"))
    }

    fn in_cluster(&self, name: &str, arguments: &[&str]) -> anyhow::Result<String> {
        kubectl(&self.cluster(name)?.server, arguments, "")
    }

    /// The first pod whose name begins so.
    async fn pod(&self, prefix: &str) -> anyhow::Result<Endpoint> {
        for cluster in &self.federation.clusters {
            if let Some(found) = cluster.endpoints().await?.into_iter().find(|it| it.pod.name.starts_with(prefix)) {
                return Ok(found);
            }
        }
        anyhow::bail!("no pod is named {prefix}…")
    }

    /// Keeps everything running until Ctrl-C, which ends the process. No cluster is revoked.
    fn stay(&self, programs: &Path) -> anyhow::Result<()> {
        let path = self.scratch.join("kubeconfig");
        let servers = self.federation.clusters.iter().map(|it| &it.server).chain([&self.federation.management]);
        kubeconfig::write_private(&path, &kubeconfig::merged(servers)?.to_string())?;
        let inside = format!("{} ip netns exec router", sandbox::command()?);
        let (kubectl, config) = (kubernetes::programs::kubernetes("kubectl")?, path.display());
        // What kubectl knows of a server at the same address, from another run of the demo, is not true here.
        let cache = self.scratch.join("kubectl-cache");
        let (kubectl, cache) = (kubectl.display(), cache.display());
        let (hanse, context) = (programs.join("hanse"), self.federation.system.context());
        let (hanse, context) = (hanse.display(), context.display());
        let pod = self.pods.first().map_or("router", |it| it.network.name());
        self.screen.title("The clusters keep running until Ctrl-C");
        self.screen.quote(&format!(
            "in another terminal:
  kubectl() {{ {inside} env KUBECONFIG={config} KUBECACHEDIR={cache} {kubectl} \"$@\"; }}
  hanse() {{ {inside} {hanse} --context {context} \"$@\"; }}
contexts: management (the current one), train and prod:
  kubectl get hanse                            # policies, and where they are enforced
  kubectl explain fnp.spec.ingress
  kubectl edit fnp inference                   # a saved change is enforced
  kubectl --context prod get pods -A -o wide
  kubectl --context prod scale -n inference deployment vllm --replicas=4
  hanse status
  hanse policy matrix --port 5000              # the verdicts for the model registry, from the members
  kubectl patch mc prod --type=merge -p '{{\"spec\":{{\"acceptance\":\"Pending\"}}}}'    # suspends the cluster
a shell in the network of a pod; ip netns lists them:
  {} ip netns exec {pod} bash",
            sandbox::command()?
        ));
        loop {
            std::thread::park();
        }
    }
}
