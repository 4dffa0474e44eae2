//! The whole system, judged by packets: real processes, joined with real tokens, killed in the middle of things.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hanse_e2e::deployment::{Deployment, PATIENCE};
use hanse_e2e::fabric::Fabric;
use hanse_e2e::probe::{self, Listener, Observed};
use hanse_e2e::sandbox;
use hanse_e2e::world::{Cluster, Pod};

const MANIFEST: &str = "cluster.yaml";

/// Two clusters of the demo, with manifests that the test may edit.
struct World {
    clusters: Vec<Cluster>,
    pods: Vec<Pod>,
    scratch: tempfile::TempDir,
    federation: PathBuf,
}

impl World {
    fn new() -> Self {
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
        let scratch = tempfile::tempdir_in("/run").expect("a folder");
        let read = |name: &str| {
            let directory = scratch.path().join("clusters").join(name);
            std::fs::create_dir_all(&directory).expect("a folder");
            std::fs::copy(manifests.join(name).join(MANIFEST), directory.join(MANIFEST)).expect("copied");
            Cluster::read(name, &directory).expect("the demo's manifests")
        };
        let clusters: Vec<Cluster> = ["train", "serve"].map(read).into();
        let pods = clusters.iter().flat_map(|cluster| cluster.pods.clone()).collect();
        Self { clusters, pods, scratch, federation: manifests.join("federation") }
    }

    fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.name == name).expect("in the demo")
    }

    fn edit(&self, cluster: usize, from: &str, to: &str) {
        let path = self.clusters[cluster].directory.join(MANIFEST);
        let text = std::fs::read_to_string(&path).expect("a manifest");
        assert!(text.contains(from), "{from}");
        let beside = path.with_extension("new");
        std::fs::write(&beside, text.replace(from, to)).expect("written");
        std::fs::rename(&beside, &path).expect("renamed");
    }

    fn join<'f>(&self, fabric: &'f Fabric) -> Deployment<'f> {
        self.join_with(fabric, None)
    }

    fn join_with<'f>(&self, fabric: &'f Fabric, lifetime: Option<u32>) -> Deployment<'f> {
        let mut world = Deployment::start_with(fabric, &programs(), self.scratch.path(), lifetime).expect("a hub");
        let clusters = self.federation.join("clusters.yaml");
        world.hanse(&["apply", "-f", &clusters.to_string_lossy()]).expect("applied");
        for cluster in &self.clusters {
            world.join(cluster, &cluster.directory).expect("joined");
        }
        world.settle(&["train", "serve"]).expect("in sync");
        world
    }

    fn listen(&self, fabric: &Fabric) -> Vec<Listener> {
        let one = |pod: &Pod| Listener::start(fabric.pod(pod).expect("built"), pod.port, &pod.title());
        self.pods.iter().map(|pod| one(pod).expect("the port is free")).collect()
    }
}

/// The programs that `cargo xtask test` built, beside the test's own.
pub fn programs() -> PathBuf {
    let test = std::env::current_exe().expect("the test binary has a path");
    let directory = test.parent().and_then(Path::parent).expect("the target directory").to_owned();
    assert!(directory.join("hanse-agent").exists(), "build the programs first: cargo build --workspace --bins");
    directory
}

/// Ends the flood when it is dropped, also by a failure: a scope waits for its threads.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn connects(fabric: &Fabric, from: &Pod, to: &Pod) -> bool {
    let inside = fabric.pod(from).expect("built");
    (0..2)
        .all(|family| probe::tcp(inside, SocketAddr::new(to.addresses[family], to.port), &to.title()) == Observed::Open)
}

fn blocked(fabric: &Fabric, from: &Pod, to: &Pod) -> bool {
    let inside = fabric.pod(from).expect("built");
    (0..2).all(|family| {
        probe::tcp(inside, SocketAddr::new(to.addresses[family], to.port), &to.title()) == Observed::Closed
    })
}

#[test]
fn killed_processes_neither_drop_updates_nor_open_gaps() {
    sandbox::test("system::killed_processes_neither_drop_updates_nor_open_gaps", || {
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let listeners = world.listen(&fabric);
        let mut system = world.join(&fabric);
        system.hanse(&["apply", "-f", &world.federation.to_string_lossy()]).expect("applied");
        system.wait_for_policies().expect("enforced");
        let (trainer, registry) = (world.pod("trainer-0"), world.pod("registry-0"));
        let (notebook, vllm) = (world.pod("notebook-0"), world.pod("vllm-0"));
        assert!(connects(&fabric, trainer, registry) && connects(&fabric, vllm, registry));
        assert!(blocked(&fabric, notebook, registry));

        // From here on the notebook sends to the registry all the time, and nothing may arrive.
        let at_registry = world.pods.iter().position(|pod| pod.name == "registry-0").expect("it listens");
        let before = listeners[at_registry].datagrams();
        let (done, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let _ends = Ends(&done);
            scope.spawn(|| {
                let inside = fabric.pod(notebook).expect("built");
                while !done.load(Ordering::Relaxed) {
                    for family in 0..2 {
                        let to = SocketAddr::new(registry.addresses[family], registry.port);
                        if probe::send_udp(inside, notebook.addresses[family], to).is_ok() {
                            sent.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    std::thread::yield_now();
                }
            });
            let train = &world.clusters[0];
            // Each is killed while an update is under way, and started again.
            for round in 0..3 {
                let (from, to) = if round % 2 == 0 { ("app: vllm", "app: llm") } else { ("app: llm", "app: vllm") };
                world.edit(1, from, to);
                match round {
                    0 => {
                        system.kill_hub().expect("killed");
                        system.start_hub().expect("started");
                    }
                    1 => {
                        system.kill_member("train").expect("killed");
                        system.start_member(train, &train.directory).expect("started");
                    }
                    _ => {
                        for node in &train.nodes {
                            system.kill_agent("train", &node.name).expect("killed");
                        }
                        for node in &train.nodes {
                            system.start_agent(train, node).expect("started");
                        }
                    }
                }
                let open = round % 2 == 1;
                let followed = probe::until(PATIENCE, || match open {
                    true => connects(&fabric, vllm, registry),
                    false => blocked(&fabric, vllm, registry),
                });
                assert!(followed.is_some(), "round {round} did not converge\n{}", system.logs());
                system.settle(&["train", "serve"]).expect("in sync");
                assert!(connects(&fabric, trainer, registry), "round {round}: what is allowed stays so");
            }
        });
        assert_eq!(listeners[at_registry].datagrams(), before, "a forbidden packet arrived");
        let sent = sent.into_inner();
        println!("{sent} forbidden packets sent while hub, member and agents were killed, none arrived");
        assert!(sent > 1_000, "the flood is one: {sent}");
    });
}

/// Everything is denied; then all but the notebook is allowed, whose endpoint the enforcing cluster was never sent.
#[test]
fn policy_before_its_endpoints_opens_no_gap() {
    sandbox::test("system::policy_before_its_endpoints_opens_no_gap", || {
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let listeners = world.listen(&fabric);
        let mut system = world.join(&fabric);
        let (registry, notebook, vllm) = (world.pod("registry-0"), world.pod("notebook-0"), world.pod("vllm-0"));
        let policy = |name: &str, ingress: &str| {
            let path = world.scratch.path().join(format!("{name}.yaml"));
            let text = format!(
                "apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {{name: gap}}\nspec: {{phase: Guard, order: 1}}\n---\n\
                 apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {{name: gap}}\n\
                 spec:\n  tier: gap\n  clusterSelector: \"role == 'train'\"\n  \
                 selector: \"app == 'model-registry'\"\n  types: [Ingress]\n  ingress: {ingress}\n"
            );
            std::fs::write(&path, text).expect("written");
            path.to_string_lossy().into_owned()
        };
        let closed = policy("closed", "[{action: Deny}]");
        let all_but = policy("all-but", "[{action: Deny, source: {selector: \"app == 'notebook'\"}}, {action: Allow}]");
        system.hanse(&["apply", "-f", &closed]).expect("applied");
        system.wait_for_policies().expect("enforced");
        assert!(blocked(&fabric, notebook, registry) && blocked(&fabric, vllm, registry));

        let at_registry = world.pods.iter().position(|pod| pod.name == "registry-0").expect("it listens");
        let before = listeners[at_registry].datagrams();
        let (done, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let _ends = Ends(&done);
            scope.spawn(|| {
                let inside = fabric.pod(notebook).expect("built");
                while !done.load(Ordering::Relaxed) {
                    for family in 0..2 {
                        let to = SocketAddr::new(registry.addresses[family], registry.port);
                        if probe::send_udp(inside, notebook.addresses[family], to).is_ok() {
                            sent.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    std::thread::yield_now();
                }
            });
            // The endpoints come with the policy, and go with it.
            for round in 0..3 {
                system.hanse(&["apply", "-f", &all_but]).expect("applied");
                let open = probe::until(PATIENCE, || connects(&fabric, vllm, registry));
                assert!(open.is_some(), "round {round} did not open\n{}", system.logs());
                system.hanse(&["apply", "-f", &closed]).expect("applied");
                let shut = probe::until(PATIENCE, || blocked(&fabric, vllm, registry));
                assert!(shut.is_some(), "round {round} did not close\n{}", system.logs());
                system.settle(&["train"]).expect("in sync");
            }
            // They come late: a restarted hub has no endpoints of a cluster whose member is away.
            system.kill_member("serve").expect("killed");
            system.kill_hub().expect("killed");
            system.start_hub().expect("started");
            system.hanse(&["apply", "-f", &all_but]).expect("applied");
            let waits = probe::until(PATIENCE, || {
                let wait = system.try_hanse(&["wait", "--for=enforced", "--timeout", "1", "gap"]).expect("it runs");
                let said = String::from_utf8_lossy(&wait.stderr).into_owned();
                !wait.status.success() && said.contains("waits for serve")
            });
            assert!(waits.is_some(), "the policy waits for the endpoints of serve\n{}", system.logs());
            assert!(blocked(&fabric, vllm, registry), "and the former stays in force");
            let serve = &world.clusters[1];
            system.start_member(serve, &serve.directory).expect("started");
            let open = probe::until(PATIENCE, || connects(&fabric, vllm, registry));
            assert!(open.is_some(), "the policy did not come into force\n{}", system.logs());
            system.settle(&["train"]).expect("in sync");
        });
        assert_eq!(listeners[at_registry].datagrams(), before, "a forbidden packet arrived");
        let sent = sent.into_inner();
        println!("{sent} forbidden packets sent while the policy changed, none arrived");
        assert!(sent > 1_000, "the flood is one: {sent}");
    });
}

/// A rule's selection that is longer than what a member may request: what the hub derives it reads back when a member reconnects.
#[test]
fn member_with_an_oversized_selection_receives_after_reconnecting() {
    sandbox::test("system::member_with_an_oversized_selection_receives_after_reconnecting", || {
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let _listeners = world.listen(&fabric);
        let mut system = world.join(&fabric);
        let (registry, vllm) = (world.pod("registry-0"), world.pod("vllm-0"));
        let names: Vec<String> = (0..400).map(|it| format!("account-{it:03}-{}", "x".repeat(46))).collect();
        assert!(names.iter().all(|name| name.len() == 58));
        let path = world.scratch.path().join("long.yaml");
        let policy = format!(
            "apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {{name: long}}\nspec: {{phase: Guard, order: 1}}\n---\n\
             apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {{name: long}}\n\
             spec:\n  tier: long\n  selector: \"app == 'model-registry'\"\n  types: [Ingress]\n  ingress:\n  \
             - {{action: Deny, source: {{serviceAccounts: {{names: [{}]}}}}}}\n  \
             - {{action: Allow, source: {{selector: \"app == 'vllm'\"}}}}\n  - {{action: Deny}}\n",
            names.join(", ")
        );
        std::fs::write(&path, policy).expect("written");
        let path = path.to_string_lossy().into_owned();
        system.hanse(&["apply", "-f", &path]).expect("applied");
        system.wait_for_policies().expect("enforced");
        assert!(connects(&fabric, vllm, registry));
        let follows = |system: &Deployment<'_>, open: bool, what: &str| {
            let followed = probe::until(PATIENCE, || match open {
                true => connects(&fabric, vllm, registry),
                false => blocked(&fabric, vllm, registry),
            });
            assert!(followed.is_some(), "{what} is not followed\n{}", system.logs());
        };
        let train = &world.clusters[0];
        system.kill_member("train").expect("killed");
        system.start_member(train, &train.directory).expect("started");
        system.settle(&["train", "serve"]).expect("in sync");
        world.edit(1, "app: vllm", "app: llm");
        follows(&system, false, "a label that is gone");
        system.kill_hub().expect("killed");
        system.start_hub().expect("started");
        system.settle(&["train", "serve"]).expect("in sync");
        world.edit(1, "app: llm", "app: vllm");
        follows(&system, true, "a label that is back");
        system.hanse(&["cluster", "revoke", "serve"]).expect("revoked");
        follows(&system, false, "a cluster that is revoked");
        system.hanse(&["delete", "-f", &path]).expect("deleted");
        system.hanse(&["wait", "--for=deleted", "fnp/long"]).expect("gone");
    });
}

#[test]
fn deny_all_policy_can_be_withdrawn_at_the_hub() {
    sandbox::test("system::deny_all_policy_can_be_withdrawn_at_the_hub", || {
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let _listeners = world.listen(&fabric);
        let system = world.join(&fabric);
        let (trainer, vllm) = (world.pod("trainer-0"), world.pod("vllm-0"));
        assert!(connects(&fabric, trainer, vllm));
        let path = world.scratch.path().join("deny.yaml");
        let deny = "apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {name: lockdown}\nspec: {order: 1}\n---\n\
                    apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {name: lockdown}\n\
                    spec:\n  tier: lockdown\n  types: [Ingress, Egress]\n  ingress: [{action: Deny}]\n  egress: [{action: Deny}]\n";
        std::fs::write(&path, deny).expect("written");
        system.hanse(&["apply", "-f", &path.to_string_lossy()]).expect("applied");
        system.wait_for_policies().expect("enforced");
        assert!(blocked(&fabric, trainer, vllm) && blocked(&fabric, trainer, world.pod("trainer-1")));
        system.hanse(&["delete", "-f", &path.to_string_lossy()]).expect("deleted");
        let open = probe::until(PATIENCE, || connects(&fabric, trainer, vllm));
        assert!(open.is_some(), "the fleet did not recover\n{}", system.logs());
    });
}

#[test]
fn object_outside_the_grant_is_refused_and_not_distributed() {
    sandbox::test("system::object_outside_the_grant_is_refused_and_not_distributed", || {
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let _listeners = world.listen(&fabric);
        let system = world.join(&fabric);
        system.hanse(&["apply", "-f", &world.federation.to_string_lossy()]).expect("applied");
        system.wait_for_policies().expect("enforced");
        let (notebook, registry) = (world.pod("notebook-0"), world.pod("registry-0"));
        assert!(blocked(&fabric, notebook, registry));
        // serve claims a trainer at an address of its own grant, and one at an address of train's.
        let claim = |name: &str, address: std::net::IpAddr| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: models, labels: {{app: trainer}}}}\n\
                 spec: {{nodeName: node-1}}\nstatus: {{phase: Running, podIP: \"{address}\"}}\n---\n"
            )
        };
        let stolen = world.pod("trainer-1").addresses[0];
        let file = world.clusters[1].directory.join("claims.yaml");
        std::fs::write(&file, claim("thief", stolen)).expect("written");
        let refused = probe::until(PATIENCE, || {
            let status = system.hanse(&["status", "-o", "json"]).unwrap_or_default();
            let status: serde_json::Value = serde_json::from_str(&status).unwrap_or_default();
            let serve = status["items"].as_array().into_iter().flatten().find(|it| it["name"] == "serve");
            serve.is_some_and(|serve| {
                serve["refused"] == 1
                    && serve["refusals"][0].as_str().is_some_and(|it| it.starts_with("pod models/thief: "))
            })
        });
        assert!(refused.is_some(), "{}", system.hanse(&["status", "-o", "json"]).unwrap_or_default());
        // The rest of what serve publishes goes on: a relabel is followed.
        world.edit(1, "app: notebook", "app: vllm");
        let open = probe::until(PATIENCE, || connects(&fabric, notebook, registry));
        assert!(open.is_some(), "one refused object keeps others out\n{}", system.logs());
        assert!(connects(&fabric, world.pod("trainer-0"), world.pod("trainer-1")), "the owner keeps its address");
    });
}

#[test]
fn status_reports_enforcement_and_source_problems() {
    sandbox::test("system::status_reports_enforcement_and_source_problems", || {
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let mut system = world.join(&fabric);
        let (cluster, node) = (&world.clusters[1], &world.clusters[1].nodes[0]);
        let is = |system: &Deployment<'_>, expected: &dyn Fn(u64, &serde_json::Value, &serde_json::Value) -> bool| {
            let reached = probe::until(PATIENCE, || {
                let status = system.hanse(&["status", "-o", "json"]).unwrap_or_default();
                let status: serde_json::Value = serde_json::from_str(&status).unwrap_or_default();
                let of = |name: &str| status["items"].as_array()?.iter().find(|it| it["name"] == name);
                let hub = status["hubRevision"].as_u64();
                hub.zip(of("train")).zip(of("serve")).is_some_and(|((hub, train), serve)| expected(hub, train, serve))
            });
            assert!(reached.is_some(), "{}", system.hanse(&["status", "-o", "json"]).unwrap_or_default());
        };
        let enforced = |it: &serde_json::Value| it["enforcedRevision"].as_u64().unwrap_or_default();
        is(&system, &|hub, train, serve| enforced(train) == hub && enforced(serve) == hub);
        // A node whose agent is gone enforces what it did, whatever its member has compiled since.
        system.kill_agent(&cluster.name, &node.name).expect("killed");
        system.hanse(&["apply", "-f", &world.federation.to_string_lossy()]).expect("applied");
        is(&system, &|hub, train, serve| enforced(train) == hub && enforced(serve) < hub);
        system.start_agent(cluster, node).expect("started");
        is(&system, &|hub, train, serve| enforced(train) == hub && enforced(serve) == hub);
        let broken = cluster.directory.join("broken.yaml");
        std::fs::write(&broken, "apiVersion: v1\nkind: [\n").expect("written");
        let named = |problem: &serde_json::Value| problem.as_str().is_some_and(|it| it.contains("broken.yaml:"));
        let problems = |it: &serde_json::Value| it["problems"].as_array().is_some_and(|it| it.iter().any(named));
        is(&system, &|_, train, serve| problems(serve) && !problems(train));
        std::fs::remove_file(&broken).expect("removed");
        is(&system, &|_, _, serve| !problems(serve));
    });
}

/// What is staged denies what is enforced allows: the records of real connections say both.
#[test]
fn flow_records_contain_enforced_and_staged_verdicts() {
    sandbox::test("system::flow_records_contain_enforced_and_staged_verdicts", || {
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let _listeners = world.listen(&fabric);
        let system = world.join(&fabric);
        let (trainer, registry) = (world.pod("trainer-0"), world.pod("registry-0"));
        let (notebook, vllm) = (world.pod("notebook-0"), world.pod("vllm-0"));
        let staged = format!(
            "apiVersion: projectcalico.org/v3\nkind: StagedNetworkPolicy\nmetadata: {{name: closed, namespace: {}}}\n\
             spec: {{selector: \"app == 'model-registry'\", ingress: [{{action: Deny}}]}}\n",
            registry.namespace
        );
        std::fs::write(world.clusters[0].directory.join("staged.yaml"), staged).expect("written");
        system.hanse(&["apply", "-f", &world.federation.to_string_lossy()]).expect("applied");
        system.wait_for_policies().expect("enforced");
        system.settle(&["train", "serve"]).expect("in sync");
        assert!(connects(&fabric, trainer, registry) && connects(&fabric, vllm, registry));
        assert!(blocked(&fabric, notebook, registry));
        let place = |party: &serde_json::Value| {
            let text = |key: &str| party[key].as_str().unwrap_or_default().to_owned();
            (text("cluster"), text("namespace"), text("pod"))
        };
        let named = |pod: &Pod| (pod.cluster.clone(), pod.namespace.clone(), pod.name.clone());
        // `who`: the ends, as far as the member knows them.
        let expect = |cluster: &str, from: &Pod, who: [Option<&Pod>; 2], decision: &str, outcomes: [&str; 4]| {
            let mut found = Vec::new();
            let complete = probe::until(PATIENCE, || {
                found = system.flows(cluster, &["--decision", decision]).unwrap_or_default();
                let is = |party: &serde_json::Value, address: &std::net::IpAddr| party["ip"] == address.to_string();
                let of = |family: usize| {
                    let ends = (from.addresses[family], registry.addresses[family]);
                    move |it: &serde_json::Value| is(&it["from"], &ends.0) && is(&it["to"], &ends.1)
                };
                found.retain(|it| it["port"] == registry.port && (of(0)(it) || of(1)(it)));
                found.iter().any(of(0)) && found.iter().any(of(1))
            });
            assert!(complete.is_some(), "{cluster}: {} {decision}: {found:?}\n{}", from.name, system.logs());
            for flow in &found {
                let of = |path: &str| flow.pointer(path).and_then(|it| it.as_str()).unwrap_or_default();
                let said = [of("/verdict"), of("/egress/verdict"), of("/ingress/verdict"), of("/staged/verdict")];
                assert_eq!(said, outcomes, "{flow}");
                let ends = [&flow["from"], &flow["to"]].map(place);
                assert_eq!(ends, who.map(|pod| pod.map(named).unwrap_or_default()), "{flow}");
            }
        };
        expect("train", trainer, [Some(trainer), Some(registry)], "allowed", ["allow", "allow", "allow", "deny"]);
        expect("train", vllm, [Some(vllm), Some(registry)], "allowed", ["allow", "none", "allow", "deny"]);
        // Nothing selects the notebook, so the other cluster has not received it.
        expect("train", notebook, [None, Some(registry)], "denied", ["deny", "none", "deny", "deny"]);
        // The member of the source knows what its pod may send, and nothing of what is staged elsewhere; nor does any policy of
        // its own select the registry.
        expect("serve", vllm, [Some(vllm), None], "allowed", ["allow", "allow", "none", "allow"]);
        let changing = system.flows("train", &["--would-change"]).expect("flows");
        assert!(!changing.is_empty() && changing.iter().all(|it| place(&it["to"]) == named(registry)), "{changing:?}");
        // The same, staged at the hub: it changes no packet, and the records of both clusters have its verdict.
        std::fs::remove_file(world.clusters[0].directory.join("staged.yaml")).expect("removed");
        let manifest = world.scratch.path().join("staged.yaml");
        let staged = "apiVersion: hanse.dev/v1alpha1\nkind: StagedFederatedNetworkPolicy\nmetadata: {name: closed}\n\
                      spec: {tier: platform, order: 1, types: [Ingress, Egress], ingress: [{action: Deny}], egress: [{action: Deny}]}\n";
        std::fs::write(&manifest, staged).expect("written");
        system.hanse(&["apply", "-f", &manifest.to_string_lossy()]).expect("applied");
        let waited = system.hanse(&["wait", "--for=enforced", "sfnp/closed"]).expect("evaluated");
        assert!(waited.contains("StagedFederatedNetworkPolicy/closed is evaluated"), "{waited}");
        assert!(connects(&fabric, trainer, registry) && connects(&fabric, vllm, registry), "it is not enforced");
        for (cluster, direction, from) in [("train", "ingress", vllm), ("serve", "egress", vllm)] {
            let decided = format!("/staged/{direction}/trace/0/policy/kind");
            let mut found = Vec::new();
            let of_staged = |it: &serde_json::Value| {
                it["verdict"] == "allow"
                    && it["staged"]["verdict"] == "deny"
                    && it.pointer(&decided).is_some_and(|kind| kind == "StagedFederatedNetworkPolicy")
            };
            let reached = probe::until(PATIENCE, || {
                assert!(connects(&fabric, from, registry), "it is not enforced");
                found = system.flows(cluster, &["--would-change", "--decision", "allowed"]).unwrap_or_default();
                found.iter().any(of_staged)
            });
            assert!(reached.is_some(), "{cluster}: {found:?}\n{}", system.logs());
        }
        system.hanse(&["delete", "sfnp/closed"]).expect("deleted");
        assert!(connects(&fabric, trainer, registry));
    });
}

#[test]
fn certificate_renewal_drops_no_update() {
    sandbox::test("system::certificate_renewal_drops_no_update", || {
        const LIFETIME: u32 = 4;
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let _listeners = world.listen(&fabric);
        let system = world.join_with(&fabric, Some(LIFETIME));
        system.hanse(&["apply", "-f", &world.federation.to_string_lossy()]).expect("applied");
        system.wait_for_policies().expect("enforced");
        let (registry, notebook) = (world.pod("registry-0"), world.pod("notebook-0"));
        let inside = fabric.pod(notebook).expect("built");
        let target = SocketAddr::new(registry.addresses[0], registry.port);
        let rotations = |log: &str| log.matches("certificate renewed").count();
        // The hub renews by itself; members and agents request it.
        let rotated = |system: &Deployment<'_>| {
            system.all_logs().iter().skip(1).map(|log| rotations(log)).min().unwrap_or_default()
        };
        let mut updates = 0;
        while rotated(&system) < 3 {
            let (from, to, wanted) = match updates % 2 {
                0 => ("app: notebook", "app: vllm, was: notebook", Observed::Open),
                _ => ("app: vllm, was: notebook", "app: notebook", Observed::Closed),
            };
            world.edit(1, from, to);
            let followed = probe::becomes(inside, target, &registry.title(), wanted, PATIENCE);
            assert!(followed.is_some(), "update {updates} did not arrive\n{}", system.logs());
            updates += 1;
            assert!(updates < 200, "certificates do not rotate\n{}", system.logs());
        }
        println!("{updates} updates while every certificate was renewed at least 3 times");
        for log in system.all_logs() {
            let given_up = log.lines().find(|line| {
                let signs = ["trying again", "not renewed", "the stream ended"];
                signs.iter().any(|sign| line.contains(sign))
            });
            assert_eq!(given_up, None, "the next connection resumes before the last one closes");
        }
    });
}

/// Without what only one of the two can say.
fn plain(line: &str) -> serde_json::Value {
    let mut value: serde_json::Value = serde_json::from_str(line).expect("JSON");
    value.as_object_mut().expect("an object").remove("asked");
    value
}

#[test]
fn live_explain_agrees_with_offline_explain() {
    sandbox::test("system::live_explain_agrees_with_offline_explain", || {
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let mut system = world.join(&fabric);
        system.hanse(&["apply", "-f", &world.federation.to_string_lossy()]).expect("applied");
        system.wait_for_policies().expect("enforced");
        let mut queries: Vec<String> = Vec::new();
        for (from, to) in world.pods.iter().flat_map(|from| world.pods.iter().map(move |to| (from, to))) {
            let name =
                |pod: &Pod| serde_json::json!({"cluster": pod.cluster, "namespace": pod.namespace, "pod": pod.name});
            let address = |pod: &Pod, family: usize| serde_json::json!({"ip": pod.addresses[family]});
            for (version, from, to) in [
                (4, name(from), name(to)),
                (6, name(from), name(to)),
                (4, address(from, 0), name(to)),
                (6, name(from), address(to, 1)),
                (4, address(from, 0), address(to, 0)),
                (4, name(from), serde_json::json!({"ip": "203.0.113.9"})),
            ] {
                let query = serde_json::json!({"from": from, "to": to, "port": 8000, "ipVersion": version});
                queries.push(query.to_string());
            }
        }
        let file = world.scratch.path().join("queries.jsonl");
        std::fs::write(&file, queries.join("\n")).expect("written");
        let explain = ["policy", "explain", "-o", "json", "--queries", &file.to_string_lossy()].map(str::to_owned);
        let ask = |more: &[String]| {
            let arguments: Vec<&str> = explain.iter().chain(more).map(String::as_str).collect();
            system.hanse(&arguments).expect("answered")
        };
        let sources = world.clusters.iter().map(|it| format!("--cluster={}={}", it.name, it.directory.display()));
        let sources: Vec<String> = sources.chain([format!("--federation={}", world.federation.display())]).collect();
        let (live, offline) = (ask(&[]), ask(&sources));
        assert_eq!((live.lines().count(), offline.lines().count()), (queries.len(), queries.len()));
        for ((query, live), offline) in queries.iter().zip(live.lines()).zip(offline.lines()) {
            assert_eq!(plain(live), plain(offline), "{query}");
        }
        let allowed = live.lines().filter(|line| plain(line)["verdict"] == "allow").count();
        assert!(allowed > queries.len() / 20 && allowed < queries.len() / 2, "{allowed} of {}", queries.len());
        let both: serde_json::Value = serde_json::from_str(live.lines().nth(24).expect("a line")).expect("JSON");
        assert!(!both["asked"].as_array().expect("a live answer says who was asked").is_empty(), "{both}");

        let matrix = ["policy", "matrix", "-o", "json", "--port", "8000"];
        let offline: Vec<&str> = matrix.into_iter().chain(sources.iter().map(String::as_str)).collect();
        let sorted = |text: String| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let live = sorted(system.hanse(&matrix).expect("answered"));
        assert_eq!(live, sorted(system.hanse(&offline).expect("answered")));
        assert_eq!(live.len(), world.pods.len() * world.pods.len());

        // Nobody answers for a member that is away, and the others' answers come all the same.
        system.kill_member("serve").expect("killed");
        let explain = explain.each_ref().map(String::as_str);
        let mut last = String::new();
        let away = probe::until(PATIENCE, || {
            let output = system.try_hanse(&explain).expect("started");
            last = String::from_utf8_lossy(&output.stdout).into_owned();
            let named = last.lines().any(|line| line.contains("cluster serve is not connected to this hub"));
            named && last.lines().any(|line| line.contains("verdict")) && output.status.code() == Some(1)
        });
        assert!(away.is_some() && last.lines().count() == queries.len(), "{last}");
    });
}

/// One node of the cluster observes, then enforces.
#[test]
fn node_that_observes_logs_and_lets_pass() {
    sandbox::test("system::node_that_observes_logs_and_lets_pass", || {
        let world = World::new();
        let fabric = Fabric::build(&world.clusters).expect("the network");
        let _listeners = world.listen(&fabric);
        // The node of the registry.
        world.edit(0, "name: node-2\n", "name: node-2\n  labels: {hanse.dev/enforcement: Observe}\n");
        let system = world.join(&fabric);
        let (trainer, registry, notebook) = (world.pod("trainer-0"), world.pod("registry-0"), world.pod("notebook-0"));
        system.hanse(&["apply", "-f", &world.federation.to_string_lossy()]).expect("applied");
        system.settle(&["train", "serve"]).expect("in sync");
        let observed = || system.flows("train", &["--decision", "observed"]).unwrap_or_default();
        let is_from_notebook = |it: &serde_json::Value| {
            let ends = (&notebook.addresses, &registry.addresses);
            (0..2).any(|family| {
                it["from"]["ip"] == ends.0[family].to_string() && it["to"]["ip"] == ends.1[family].to_string()
            })
        };
        let logged = probe::until(PATIENCE, || {
            assert!(connects(&fabric, notebook, registry), "nothing is dropped");
            observed().iter().any(|it| is_from_notebook(it) && it["verdict"] == "deny")
        });
        assert!(logged.is_some(), "{:?}\n{}", observed(), system.logs());
        assert!(
            system.flows("train", &["--decision", "denied"]).expect("flows").iter().all(|it| !is_from_notebook(it))
        );
        let policies = world.federation.to_string_lossy().into_owned();
        let said = system.try_hanse(&["wait", "--for=enforced", "--timeout", "1", "-f", &policies]).expect("it runs");
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(!said.status.success() && text.contains("node-2") && text.contains("observes"), "{text}");

        world.edit(0, "enforcement: Observe", "enforcement: Enforce");
        let closed = probe::until(PATIENCE, || blocked(&fabric, notebook, registry));
        assert!(closed.is_some(), "{}", system.logs());
        assert!(connects(&fabric, trainer, registry));
        system.wait_for_policies().expect("enforced");
    });
}
