//! Times of the kernel: `cargo bench -p hanse-dataplane --bench nftables [-- -o json]`, as root. It runs in a network
//! namespace of its own.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use hanse_dataplane::Backend as _;
use hanse_dataplane::nftables::{Config, Nftables};
use hanse_ruleset::{
    Action, Chain, EndpointId, Generation, LocalEndpoint, Members, NodeConfig, Peer, Phase, Policy, PortRange, Rule,
    RuleSet, Set, SetId, Tier, TierDefault,
};

/// Repetitions of each small change; the median is printed.
const REPEATS: u32 = 500;

const SHAPES: [(&str, u32, u32); 2] = [("2000-sets", 2_000, 25), ("500-rules-50000-members", 500, 100)];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let json = arguments.iter().any(|argument| argument == "json");
    if let Some((shape, sets, members)) = SHAPES.into_iter().find(|(shape, ..)| arguments.iter().any(|it| it == shape))
    {
        return measure(shape, sets, members, json);
    }
    if !json {
        println!("{:<10} {:<26} {:<28} {:>12} unit", "bench", "shape", "metric", "value");
    }
    // A process for each, so that its peak is its own.
    for (shape, ..) in SHAPES {
        let program = std::env::current_exe().expect("this program");
        let format = if json { "json" } else { "table" };
        let ended = std::process::Command::new(program).args([shape, format]).status().expect("started");
        assert!(ended.success(), "{shape} failed");
    }
}

fn measure(shape: &'static str, sets: u32, members: u32, json: bool) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root");
    let mut figures = Vec::new();
    bench(shape, sets, members, &mut figures);
    for (shape, metric, value, unit) in figures {
        match json {
            true => println!(
                r#"{{"bench":"nftables","shape":"{shape}","metric":"{metric}","value":{value:.4},"unit":"{unit}"}}"#
            ),
            false => println!("{:<10} {shape:<26} {metric:<28} {value:>12.3} {unit}", "nftables"),
        }
    }
}

type Figure = (&'static str, &'static str, f64, &'static str);

fn bench(shape: &'static str, sets: u32, members: u32, figures: &mut Vec<Figure>) {
    // An agent's rules log decisions.
    let mut driver = Nftables::open(Config { flows: true, ..Config::default() }).expect("netlink");
    driver.adopt(None).expect("read");
    let mut rules = rule_set(sets, members);
    let (start, cpu) = (Instant::now(), cpu_ms());
    driver.apply(&Arc::new(rules.clone())).expect("applied");
    figures.push((shape, "from nothing, wall", start.elapsed().as_secs_f64() * 1e3, "ms"));
    figures.push((shape, "from nothing, CPU", cpu_ms() - cpu, "ms"));

    let first = SetId::of_meaning(&["0"]);
    let mut cpu = 0.0;
    let mut times: Vec<f64> = (0..REPEATS)
        .map(|turn| {
            let set = rules.sets.get_mut(&first).expect("the first set");
            if let Members::Addresses(members) = &mut Arc::make_mut(set).members {
                let extra: IpAddr = Ipv4Addr::new(172, 16, 0, 1).into();
                if turn % 2 == 0 {
                    members.insert(extra)
                } else {
                    members.remove(&extra)
                };
            }
            rules.generation.number += 1;
            let next = Arc::new(rules.clone());
            let start = (Instant::now(), cpu_ns());
            driver.apply(&next).expect("applied");
            cpu += cpu_ns() - start.1;
            start.0.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    figures.push((shape, "one member, CPU, mean", cpu / 1e6 / f64::from(REPEATS), "ms"));
    times.sort_by(f64::total_cmp);
    figures.push((shape, "one member, median", times[times.len() / 2], "ms"));
    figures.push((shape, "one member, p99", times[times.len() * 99 / 100], "ms"));
    figures.push((shape, "peak resident", peak_resident_mb(), "MB"));
    driver.cleanup().expect("removed");
}

/// One pod under `sets` policies of one rule, each with a set of its own.
fn rule_set(sets: u32, members: u32) -> RuleSet {
    let mut rules = RuleSet {
        generation: Generation { term: 1, number: 1 },
        node: NodeConfig { pod_ranges: vec!["10.1.0.0/24".parse().expect("a net")], ..NodeConfig::default() },
        ..RuleSet::default()
    };
    let mut policies = Vec::new();
    for set in 0..sets {
        let id = SetId::of_meaning(&[&set.to_string()]);
        let addresses = (0..members).map(|member| Ipv4Addr::from(0x0a80_0000 + set * members + member).into());
        rules.sets.insert(id, Arc::new(Set { id, members: Members::Addresses(addresses.collect()) }));
        let rule = Rule {
            action: Action::Allow,
            index: 0,
            unknown: false,
            family: None,
            protocol: Some(6),
            not_protocol: None,
            icmp: None,
            not_icmp: None,
            source: Peer { in_sets: vec![vec![id]], ..Peer::default() },
            destination: Peer { ports: vec![PortRange { first: 8000, last: 8000 }], ..Peer::default() },
        };
        let policy = Policy { name: format!("policy {set}").into(), rules: vec![rule] };
        let id = policy.id();
        rules.policies.insert(id, Arc::new(policy));
        policies.push(id);
    }
    let tier = Tier { name: "default".into(), policies, default: TierDefault::Deny };
    let ingress = Chain { phases: vec![Phase { name: "Local".into(), tiers: vec![tier] }], profile_allows: true };
    let open = Chain { phases: Vec::new(), profile_allows: true };
    let (ingress_id, open_id) = (ingress.id(), open.id());
    rules.chains.insert(ingress_id, Arc::new(ingress));
    rules.chains.insert(open_id, Arc::new(open));
    for pod in 1..=20u8 {
        let id = EndpointId { namespace: "a".into(), name: format!("p{pod}").into() };
        let endpoint = LocalEndpoint {
            id: id.clone(),
            addresses: vec![Ipv4Addr::new(10, 1, 0, pod).into()],
            ingress: ingress_id,
            egress: open_id,
            egress_to_node: open_id,
        };
        rules.endpoints.insert(id, Arc::new(endpoint));
    }
    rules
}

/// User and system time of this process (`/proc/self/stat`, clock ticks of 10 ms).
fn cpu_ms() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) * 10.0
}

/// Time on a processor of this thread (`/proc/thread-self/schedstat`, nanoseconds).
fn cpu_ns() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0)
}

fn peak_resident_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}
