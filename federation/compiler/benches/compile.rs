//! What compiling costs, in shapes that others have published figures for.
//!
//! `compile [SHAPE…] [-o json]`. Each shape runs in a process of its own, so that its peak resident size is that of
//! nothing else. Making the updates is not timed (but resident); applying them, committing and having every set and policy
//! in the form that nodes share is. Of the runs that counts which took a processor the shortest, as the machine may be busy.

use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use hanse_compiler::{ClusterRecord, Compiler, Update};
use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind, Labels, Namespace};
use hanse_policy::model::*;
use hanse_policy::selector::build::{self, LabelSelector, Namespaces};
use hanse_policy::selector::{Expr, Selector};
use hanse_ruleset::NodeConfig;

const SHAPES: &[&str] = &["felix", "antrea-small", "antrea-large", "antrea-one", "fleet"];
/// Processes per shape; the best one counts.
const RUNS: usize = 3;
/// Single changes per kind, from which the median and the 99th percentile are taken.
const CHANGES: usize = 201;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    if let [child, shape] = &arguments[..]
        && child == "--child"
    {
        return run(shape);
    }
    let json = arguments.windows(2).any(|pair| pair == ["-o", "json"]);
    let named: Vec<&str> = SHAPES.iter().copied().filter(|shape| arguments.iter().any(|it| it == shape)).collect();
    let program = std::env::current_exe().expect("the running program has a path");
    for shape in if named.is_empty() { SHAPES.to_vec() } else { named } {
        let mut runs: Vec<Vec<(String, f64, String)>> = (0..RUNS)
            .map(|_| {
                let output = Command::new(&program).args(["--child", shape]).output().expect("start a run");
                assert!(output.status.success(), "{shape}: {}", String::from_utf8_lossy(&output.stderr));
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                text.lines().filter_map(parse).collect()
            })
            .collect();
        runs.sort_by(|a, b| a[1].1.total_cmp(&b[1].1));
        for (metric, value, unit) in &runs[0] {
            if json {
                println!(
                    r#"{{"bench":"compile","shape":"{shape}","metric":"{metric}","value":{value},"unit":"{unit}"}}"#
                );
            } else {
                println!("{shape:<13} {metric:<34} {value:>12.3} {unit}");
            }
        }
    }
}

fn parse(line: &str) -> Option<(String, f64, String)> {
    let mut parts = line.split(' ');
    Some((parts.next()?.into(), parts.next()?.parse().ok()?, parts.next()?.into()))
}

/// A generator whose whole state is its seed (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// The compiler with the time that it took.
struct Bench {
    compiler: Compiler,
    waiting: Vec<Update>,
    wall_ms: f64,
    cpu_ms: f64,
}

/// A change and its opposite.
type Toggle = Box<dyn FnMut(bool) -> Update>;

impl Bench {
    fn new() -> Self {
        Self { compiler: Compiler::new(LOCAL), waiting: Vec::new(), wall_ms: 0.0, cpu_ms: 0.0 }
    }

    fn apply(&mut self, update: Update) {
        self.waiting.push(update);
        // Few enough to count for nothing in memory.
        if self.waiting.len() == 500 {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let mut updates = std::mem::take(&mut self.waiting);
        self.timed(|compiler| updates.drain(..).for_each(|update| compiler.apply(update)));
        self.waiting = updates;
    }

    fn timed<T>(&mut self, work: impl FnOnce(&mut Compiler) -> T) -> T {
        let (cpu, wall) = (cpu_ms(), Instant::now());
        let outcome = work(&mut self.compiler);
        self.wall_ms += wall.elapsed().as_secs_f64() * 1e3;
        self.cpu_ms += cpu_ms() - cpu;
        outcome
    }
}

const LOCAL: &str = "local";

fn run(shape: &str) {
    let mut bench = Bench::new();
    let toggles = match shape {
        "felix" => felix(&mut bench),
        "antrea-small" => antrea(&mut bench, 25_000, 2, 2),
        "antrea-large" => antrea(&mut bench, 100, 100, 10),
        "antrea-one" => antrea_one(&mut bench),
        "fleet" => fleet(&mut bench),
        other => panic!("there is no shape {other}"),
    };
    bench.flush();
    let changes = bench.timed(Compiler::commit);
    let resident = peak_resident_mb();
    println!("from_nothing_wall {} ms", bench.wall_ms);
    println!("from_nothing_cpu {} ms", bench.cpu_ms);
    println!("peak_resident {resident} MB");
    println!("nodes {} count", changes.nodes.len());
    let mut sets = std::collections::BTreeSet::new();
    let mut policies = std::collections::BTreeSet::new();
    for node in changes.nodes.values() {
        // Nodes that gain the same share one list.
        if sets.len() < 1_000_000 {
            sets.extend(node.step.objects.sets_added.iter().copied());
            policies.extend(node.step.objects.policies_added.iter().copied());
        }
    }
    println!("sets {} count", sets.len());
    println!("active_policies {} count", policies.len());
    drop(changes);
    describe(&mut bench.compiler);
    for (name, mut toggle) in toggles {
        let (mut wall, mut cpu) = (Vec::new(), Vec::new());
        for at in 0..CHANGES {
            let update = toggle(at % 2 == 0);
            let (cpu_start, start) = (cpu_ms(), Instant::now());
            bench.compiler.apply(update);
            let changes = bench.compiler.commit();
            wall.push(start.elapsed().as_secs_f64() * 1e6);
            cpu.push((cpu_ms() - cpu_start) * 1e3);
            drop(changes);
        }
        for (what, mut times) in [("wall", wall), ("cpu", cpu)] {
            times.sort_by(f64::total_cmp);
            println!("{name}_{what}_median {} us", times[CHANGES / 2]);
            println!("{name}_{what}_p99 {} us", times[CHANGES * 99 / 100]);
        }
    }
    // One after the other: together they would hold every map once per node.
    let start = Instant::now();
    let nodes = bench.compiler.nodes();
    let policies: usize = nodes.iter().map(|node| bench.compiler.rule_set(node).policies.len()).sum();
    println!("whole_rule_sets_one_by_one {} ms", start.elapsed().as_secs_f64() * 1e3);
    println!("policies_over_all_nodes {policies} count");
}

/// How large the outcome is on the busiest node, so that the shape can be checked.
fn describe(compiler: &mut Compiler) {
    let nodes = compiler.nodes();
    let first = compiler.rule_set(&nodes[0]);
    let members = |set: &hanse_ruleset::Set| match &set.members {
        hanse_ruleset::Members::Addresses(all) => all.len(),
        hanse_ruleset::Members::Nets(all) => all.len(),
        hanse_ruleset::Members::Sockets(all) => all.len(),
    };
    let of_endpoint = |endpoint: &hanse_ruleset::LocalEndpoint| -> usize {
        let tiers = first.chains[&endpoint.ingress].phases.iter().flat_map(|phase| &phase.tiers);
        tiers.map(|tier| tier.policies.len()).sum()
    };
    let policies: usize = first.endpoints.values().map(|it| of_endpoint(it)).sum();
    println!("first_node_endpoints {} count", first.endpoints.len());
    println!("first_node_sets {} count", first.sets.len());
    println!(
        "first_node_largest_set {} members",
        first.sets.values().map(|set| members(set)).max().unwrap_or_default()
    );
    println!("first_node_policies_per_endpoint {} mean", policies as f64 / first.endpoints.len().max(1) as f64);
}

/// Time on a processor of this, the only thread.
fn cpu_ms() -> f64 {
    let time =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every Linux has this clock");
    time.tv_sec() as f64 * 1e3 + time.tv_nsec() as f64 / 1e6
}

fn peak_resident_mb() -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).unwrap_or_default() / 1024.0
}

fn pod(namespace: &Arc<str>, name: &str) -> EndpointId {
    EndpointId { kind: EndpointKind::Pod, namespace: Some(namespace.clone()), name: name.into() }
}

fn address(number: usize) -> std::net::IpAddr {
    std::net::Ipv4Addr::from(0x0a00_0000 + number as u32).into()
}

fn policy(kind: PolicyKind, namespace: Option<&str>, name: &str, selector: Expr) -> Policy {
    let cluster = (kind != PolicyKind::FederatedNetworkPolicy).then(|| LOCAL.into());
    let phase = if cluster.is_none() { Phase::Guard } else { Phase::Local };
    Policy {
        id: PolicyId { cluster, kind, namespace: namespace.map(Arc::from), name: name.into() },
        tier: TierId { phase, name: "default".into() },
        order: Order(Some(1000.0)),
        enforcers: if phase == Phase::Guard { ClusterScope::All } else { ClusterScope::Local },
        selector: selector.into(),
        ingress: Some(Vec::new()),
        egress: None,
        staged: None,
        host_only: false,
    }
}

fn allow(index: u32, clusters: ClusterScope, expr: Expr, from: bool) -> Rule {
    let peer = EntityMatch {
        selection: Some(Selection { clusters, selector: Selector::from(expr) }),
        ..EntityMatch::default()
    };
    let (source, destination) = if from { (peer, EntityMatch::default()) } else { (EntityMatch::default(), peer) };
    Rule {
        action: Action::Allow,
        index,
        ip_version: None,
        protocol: None,
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source,
        destination,
        http: None,
        not_understood: None,
    }
}

fn add_cluster(bench: &mut Bench, name: &str) {
    bench.apply(Update::Cluster { name: name.into(), record: ClusterRecord::default() });
}

fn add_namespace(bench: &mut Bench, cluster: &str, name: &Arc<str>) {
    bench.apply(namespace(cluster, name, false));
}

fn namespace(cluster: &str, name: &Arc<str>, marked: bool) -> Update {
    let mut labels = Labels::from([("kubernetes.io/metadata.name".into(), name.clone())]);
    labels.insert("stage".into(), if marked { "b" } else { "a" }.into());
    Update::Namespace { cluster: cluster.into(), name: name.clone(), namespace: Namespace { labels } }
}

fn felix(bench: &mut Bench) -> Vec<(&'static str, Toggle)> {
    let markers: Arc<[Arc<str>]> = (0..31).map(|at| format!("marker-{at}").into()).collect();
    let rule_markers = markers.clone();
    let rule = |at: usize, index: usize| {
        let markers = &rule_markers;
        allow(index as u32, ClusterScope::All, Expr::Has(markers[(at + index) % 31].clone()), true)
    };
    let policy = |at: usize| Policy {
        ingress: Some((0..5).map(|index| rule(at, index)).collect()),
        egress: Some(Vec::new()),
        ..policy(
            PolicyKind::CalicoGlobalNetworkPolicy,
            None,
            &format!("policy-{at}"),
            Expr::Has(rule_markers[at % 31].clone()),
        )
    };
    (0..10_000).for_each(|at| bench.apply(Update::Policy(policy(at))));
    add_cluster(bench, "far");
    let namespaces: Arc<[Arc<str>]> = (0..100).map(|at| format!("namespace-{at}").into()).collect();
    namespaces.iter().for_each(|name| add_namespace(bench, LOCAL, name));
    namespaces.iter().for_each(|name| add_namespace(bench, "far", name));
    bench.apply(Update::Node { name: "node-0".into(), config: NodeConfig::default() });
    let keys: Arc<[Arc<str>]> = ["one", "two", "three", "four", "five"].map(Arc::from).into();
    let values: Arc<[Arc<str>]> = (0..40).map(|at| format!("value-{at}").into()).collect();
    let (local, far): (ClusterName, ClusterName) = (LOCAL.into(), "far".into());
    let make = move |at: usize, marker: usize| {
        let mut random = Random(at as u64);
        let mut labels = Labels::from([(markers[marker].clone(), "true".into())]);
        for (key, count) in keys.iter().zip([10, 11, 20, 30, 40]) {
            labels.insert(key.clone(), values[random.below(count)].clone());
        }
        let node = (at >= 250_000).then(|| "node-0".into());
        let cluster = if at >= 250_000 { &local } else { &far };
        Update::Endpoint {
            cluster: Some(cluster.clone()),
            id: pod(&namespaces[at % 100], &format!("pod-{at}")),
            endpoint: Endpoint { labels: labels.into(), node, addresses: vec![address(at)], ..Endpoint::default() },
        }
    };
    (0..250_200).for_each(|at| bench.apply(make(at, at % 31)));
    let near = make.clone();
    let ns: Arc<str> = "namespace-7".into();
    let rules: Vec<Rule> = (0..5).map(|index| rule(17, index)).collect();
    let base = policy(17);
    vec![
        ("pod_label", Box::new(move |on| near(250_100, if on { 3 } else { 250_100 % 31 }))),
        ("namespace_label", Box::new(move |on| namespace(LOCAL, &ns, on))),
        (
            "policy",
            Box::new(move |on| {
                let rules = if on { rules[..4].to_vec() } else { rules.clone() };
                Update::Policy(Policy { ingress: Some(rules), ..base.clone() })
            }),
        ),
        ("endpoint_far_away", Box::new(move |on| make(1_000, if on { 3 } else { 1_000 % 31 }))),
    ]
}

fn kubernetes(namespace: &str, app: Option<&str>) -> Expr {
    let selector =
        app.map(|app| LabelSelector { match_labels: vec![("app".into(), app.into())], match_expressions: Vec::new() });
    build::kubernetes_pods(Namespaces::Named(namespace), selector.as_ref())
}

fn among_themselves(namespace: &str, app: Option<&str>, name: &str) -> Policy {
    let expr = kubernetes(namespace, app);
    Policy {
        ingress: Some(vec![allow(0, ClusterScope::Local, expr.clone(), true)]),
        egress: Some(vec![allow(0, ClusterScope::Local, expr.clone(), false)]),
        ..policy(PolicyKind::KubernetesNetworkPolicy, Some(namespace), name, expr)
    }
}

fn add_nodes(bench: &mut Bench) -> Arc<[Arc<str>]> {
    let nodes: Arc<[Arc<str>]> = (0..1_000).map(|at| format!("node-{at}").into()).collect();
    for name in nodes.iter() {
        bench.apply(Update::Node { name: name.clone(), config: NodeConfig::default() });
    }
    nodes
}

/// Namespaces with a default deny, `apps` policies each, and `pods` pods of each app, over 1,000 nodes.
fn antrea(bench: &mut Bench, namespaces: usize, apps: usize, pods: usize) -> Vec<(&'static str, Toggle)> {
    let nodes = add_nodes(bench);
    let app_names: Arc<[Arc<str>]> = (0..apps).map(|at| format!("app-{at}").into()).collect();
    let apps_of = app_names.clone();
    let make = move |namespace: &Arc<str>, number: usize, app: usize, spare: bool| Update::Endpoint {
        cluster: Some(LOCAL.into()),
        id: pod(namespace, &format!("pod-{number}")),
        endpoint: Endpoint {
            labels: [("app".into(), apps_of[app].clone())].into(),
            node: Some(nodes[number % 1_000].clone()),
            addresses: vec![address(if spare { number + 10_000_000 } else { number })],
            ..Endpoint::default()
        },
    };
    for at in 0..namespaces {
        let name: Arc<str> = format!("namespace-{at}").into();
        add_namespace(bench, LOCAL, &name);
        bench.apply(Update::Policy(policy(
            PolicyKind::KubernetesNetworkPolicy,
            Some(&name),
            "default-deny",
            kubernetes(&name, None),
        )));
        for (app, app_name) in app_names.iter().enumerate() {
            bench.apply(Update::Policy(among_themselves(&name, Some(app_name), &format!("policy-{app}"))));
            for replica in 0..pods {
                bench.apply(make(&name, (at * apps + app) * pods + replica, app, false));
            }
        }
    }
    let ns: Arc<str> = "namespace-7".into();
    let (first, second, third) = (ns.clone(), ns.clone(), ns.clone());
    let make_again = make.clone();
    let number = 7 * apps * pods;
    vec![
        ("pod_label", Box::new(move |on| make(&first, number, on as usize, false))),
        ("namespace_label", Box::new(move |on| namespace(LOCAL, &second, on))),
        (
            "policy",
            Box::new(move |on| {
                let mut policy = among_themselves(&third, Some("app-0"), "policy-0");
                policy.egress = policy.egress.filter(|_| on);
                Update::Policy(policy)
            }),
        ),
        ("endpoint_far_away", Box::new(move |on| make_again(&ns, number + 1, 0, on))),
    ]
}

/// One namespace, 10,000 pods, 10,000 policies that each select all of them, over 1,000 nodes.
fn antrea_one(bench: &mut Bench) -> Vec<(&'static str, Toggle)> {
    let nodes = add_nodes(bench);
    let name: Arc<str> = "one".into();
    add_namespace(bench, LOCAL, &name);
    for at in 0..10_000 {
        bench.apply(Update::Policy(among_themselves(&name, None, &format!("policy-{at}"))));
    }
    let own = name.clone();
    let make = move |number: usize, app: &str, spare: bool| Update::Endpoint {
        cluster: Some(LOCAL.into()),
        id: pod(&own, &format!("pod-{number}")),
        endpoint: Endpoint {
            labels: [("app".into(), app.into())].into(),
            node: Some(nodes[number % 1_000].clone()),
            addresses: vec![address(if spare { number + 10_000_000 } else { number })],
            ..Endpoint::default()
        },
    };
    (0..10_000).for_each(|at| bench.apply(make(at, "a", false)));
    let again = make.clone();
    let own = name.clone();
    vec![
        ("pod_label", Box::new(move |on| make(77, if on { "b" } else { "a" }, false))),
        ("namespace_label", Box::new(move |on| namespace(LOCAL, &own, on))),
        (
            "policy",
            Box::new(move |on| {
                let mut policy = among_themselves(&name, None, "policy-5000");
                policy.egress = policy.egress.filter(|_| on);
                Update::Policy(policy)
            }),
        ),
        ("endpoint_far_away", Box::new(move |on| again(78, "a", on))),
    ]
}

/// 1,000 clusters × 1,000 endpoints, each with two labels of its own; 1,000 federated policies of mixed selectors; 300
/// endpoints on the local node.
fn fleet(bench: &mut Bench) -> Vec<(&'static str, Toggle)> {
    let text = |prefix: &str, count: usize| -> Arc<[Arc<str>]> {
        (0..count).map(|at| format!("{prefix}-{at}").into()).collect()
    };
    let (apps, tiers, namespaces) = (text("app", 200), text("tier", 10), text("namespace", 20));
    let clusters: Arc<[Arc<str>]> =
        (0..1_000).map(|at| if at == 0 { LOCAL.into() } else { format!("cluster-{at}").into() }).collect();
    let equal = |key: &str, value: &Arc<str>| Expr::Equal(key.into(), value.clone());
    let make_policy = {
        let (apps, tiers) = (apps.clone(), tiers.clone());
        move |at: usize, extra: bool| {
            let app = |offset: usize| equal("app", &apps[(at + offset) % 200]);
            let stage = Expr::Equal("pcns.stage".into(), "a".into());
            let peer = match at % 5 {
                0 => app(1),
                1 => Expr::And([app(1), equal("tier", &tiers[at % 10])].into()),
                2 => Expr::Or([app(1), app(2)].into()),
                3 => Expr::And([app(1), Expr::NotEqual("tier".into(), tiers[at % 10].clone())].into()),
                _ => Expr::And([app(1), stage, build::not(Expr::Has("quarantine".into()))].into()),
            };
            let mut rules = vec![allow(0, ClusterScope::All, peer, true)];
            rules.extend(extra.then(|| allow(1, ClusterScope::Local, app(3), true)));
            let base = policy(PolicyKind::FederatedNetworkPolicy, None, &format!("policy-{at}"), app(0));
            Policy { ingress: Some(rules), ..base }
        }
    };
    (0..1_000).for_each(|at| bench.apply(Update::Policy(make_policy(at, false))));
    bench.apply(Update::Node { name: "node-0".into(), config: NodeConfig::default() });
    let all_namespaces = namespaces.clone();
    let all_clusters = clusters.clone();
    let make = move |at: usize, app: usize| {
        let labels = Labels::from([
            ("app".into(), apps[app].clone()),
            ("tier".into(), tiers[at % 10].clone()),
            ("batch.kubernetes.io/job-name".into(), format!("job-{at}").into()),
            ("apps.kubernetes.io/pod-index".into(), format!("{at}").into()),
        ]);
        Update::Endpoint {
            cluster: Some(clusters[at / 1_000].clone()),
            id: pod(&namespaces[at / 7 % 20], &format!("pod-{at}")),
            endpoint: Endpoint {
                labels: labels.into(),
                node: (at < 300).then(|| "node-0".into()),
                addresses: vec![address(at)],
                ..Endpoint::default()
            },
        }
    };
    for cluster in all_clusters.iter() {
        add_cluster(bench, cluster);
        all_namespaces.iter().for_each(|name| add_namespace(bench, cluster, name));
    }
    (0..1_000_000).for_each(|at| bench.apply(make(at, Random(at as u64).below(200))));
    let again = make.clone();
    let far: Arc<str> = "namespace-3".into();
    vec![
        ("pod_label", Box::new(move |on| make(7, if on { 5 } else { 6 }))),
        ("namespace_label", Box::new(move |on| namespace("cluster-500", &far, on))),
        ("policy", Box::new(move |on| Update::Policy(make_policy(500, on)))),
        ("endpoint_far_away", Box::new(move |on| again(500_500, if on { 5 } else { 6 }))),
    ]
}
