//! The rate at which packets are evaluated, on one core: 100,000 endpoints in 100 namespaces, 10,000 policies of one tier of
//! which about 323 apply to each endpoint in each direction, five ingress rules each.
//!
//! Two sets of policies. `equal`: 31 different rules, each written many times. `diverse`: no two rules equal, of every kind of
//! clause, few of which match, so that most packets are compared with all 1,600 of an endpoint.
//!
//! `equal` and `diverse` measure [`Prepared`], which the offline commands use; `live-equal` and `live-diverse` measure
//! [`Evaluator`], which a member uses, with packets that are all different; `flows` measures a member's flow records: batches
//! of 10,000 by address, with one endpoint changed before each batch.
//!
//! `cargo bench -p hanse-policy --bench questions [-- [SHAPE…] -o json]`. Rates are of time on a processor; the wall clock's
//! are beside them.

use std::sync::Arc;
use std::time::Instant;

use hanse_policy::evaluate::{End, Query, Verdict, View, evaluate};
use hanse_policy::evaluator::{Evaluator, Judge};
use hanse_policy::indexed::{IndexedInventory, LOCAL};
use hanse_policy::inventory::{Cluster, Endpoint, EndpointId, EndpointKind, Inventory, Labels, Namespace};
use hanse_policy::model::*;
use hanse_policy::prepared::Prepared;
use hanse_policy::selector::Selector;

const ENDPOINTS: u32 = 100_000;
const POLICIES: usize = 10_000;
const MARKERS: usize = 31;
const QUESTIONS: usize = 200_000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let json = arguments.iter().any(|argument| argument == "json");
    let inventory = inventory();
    const SHAPES: [&str; 5] = ["equal", "diverse", "live-equal", "live-diverse", "flows"];
    let named = |shape: &str| arguments.iter().any(|argument| argument == shape);
    let all = !SHAPES.into_iter().any(named);
    for shape in SHAPES.into_iter().filter(|shape| all || named(shape)) {
        let rows = match shape {
            "equal" => prepared(&policies(equal_rule), &inventory),
            "diverse" => prepared(&policies(diverse_rule), &inventory),
            "live-equal" => live(&policies(equal_rule), &inventory),
            "live-diverse" => live(&policies(diverse_rule), &inventory),
            _ => flows(&policies(diverse_rule), &inventory),
        };
        for (metric, value, unit) in rows {
            if json {
                println!(
                    r#"{{"bench":"questions","shape":"{shape}","metric":"{metric}","value":{value},"unit":"{unit}"}}"#
                );
            } else {
                println!("{shape:<12} {metric:<36} {value:>14.3} {unit}");
            }
        }
    }
}

type Rows = Vec<(String, f64, &'static str)>;

fn prepared(policies: &PolicySet, inventory: &Inventory) -> Rows {
    let start = cpu_s();
    let prepared = Prepared::new(policies, inventory, View::Enforced);
    let preparing = cpu_s() - start;
    let queries = queries();
    // One only: the reference reads every endpoint for every selection.
    assert_eq!(prepared.evaluate(&queries[0]), evaluate(policies, inventory, &queries[0], View::Enforced));
    let mut rows = vec![("prepare_cpu".to_owned(), preparing, "s")];
    measure(&queries, &mut rows, |query| prepared.evaluate(query).verdict);
    rows
}

fn live(policies: &PolicySet, inventory: &Inventory) -> Rows {
    let (mut indexed, mut evaluator, mut rows) = build(policies, inventory);
    let queries = queries();
    let before = resident_mb();
    let judge = Judge::new(&evaluator, &indexed);
    assert_eq!(judge.evaluate(&queries[0], View::Enforced), evaluate(policies, inventory, &queries[0], View::Enforced));
    measure(&queries, &mut rows, |query| judge.evaluate(query, View::Enforced).verdict);
    rows.push(("resident_chains".to_owned(), resident_mb() - before, "MB"));
    // A policy that selects every 31st endpoint is replaced.
    let layer = &policies.clusters["c"];
    let mut times = Vec::new();
    for policy in layer.policies.values().take(CHANGES) {
        let start = cpu_s();
        evaluator.set_policy(&mut indexed, policy);
        indexed.refresh(|_, _, _, _| {});
        times.push((cpu_s() - start) * 1e6);
    }
    rows.push(("policy_change_cpu_median".to_owned(), median(times), "us"));
    rows
}

fn flows(policies: &PolicySet, inventory: &Inventory) -> Rows {
    const FLOWS: usize = 10_000;
    let (mut indexed, mut evaluator, mut rows) = build(policies, inventory);
    let mut next = random();
    let mut batch = || -> Vec<(std::net::IpAddr, std::net::IpAddr, u16)> {
        (0..FLOWS).map(|at| (address(next()), address(next()), 80 + (at % 3) as u16)).collect()
    };
    let staged = {
        let policy = policies.clusters["c"].policies.values().next().expect("there are policies").clone();
        let kind = PolicyKind::StagedGlobalNetworkPolicy;
        Policy { id: PolicyId { kind, ..policy.id.clone() }, staged: Some(StagedAction::Set), ..policy }
    };
    for name in ["flows", "flows_with_staged"] {
        if name == "flows_with_staged" {
            evaluator.set_policy(&mut indexed, &staged);
            indexed.refresh(|_, _, _, _| {});
        }
        let (mut changes, mut rates, mut walls) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..12_u32 {
            let batch = batch();
            let (id, mut endpoint) = (id(round), inventory.clusters["c"].endpoints[&id(round)].clone());
            endpoint.labels.insert("label-10".into(), format!("value-{}", (round + 1) % 10).into());
            let start = cpu_s();
            indexed.set_endpoint(LOCAL, id, endpoint);
            indexed.refresh(|_, _, _, _| {});
            changes.push((cpu_s() - start) * 1e6);
            let (cpu, start) = (cpu_s(), Instant::now());
            let judge = Judge::new(&evaluator, &indexed);
            let mut denied = 0;
            for (source, destination, destination_port) in batch {
                let (source, destination) = (judge.end(source), judge.end(destination));
                let query =
                    Query { source, destination, protocol: 6, source_port: 40_000, destination_port, icmp: None };
                denied += usize::from(judge.explain(&query).enforced.verdict == Verdict::Deny);
            }
            assert!(denied > 0);
            rates.push(FLOWS as f64 / (cpu_s() - cpu));
            walls.push(FLOWS as f64 / start.elapsed().as_secs_f64());
        }
        rows.push((format!("{name}_first_batch_per_cpu_second"), rates[0], "1/s"));
        rows.push((format!("{name}_per_cpu_second_median"), median(rates[1..].to_vec()), "1/s"));
        rows.push((format!("{name}_per_wall_second_median"), median(walls[1..].to_vec()), "1/s"));
        rows.push((format!("{name}_endpoint_change_cpu_median"), median(changes), "us"));
    }
    rows
}

const CHANGES: usize = 200;

/// The state of a member, with what building it cost.
fn build(policies: &PolicySet, inventory: &Inventory) -> (IndexedInventory, Evaluator, Rows) {
    let start = cpu_s();
    let mut indexed = IndexedInventory::new("c".into());
    let cluster = &inventory.clusters["c"];
    for (name, namespace) in &cluster.namespaces {
        indexed.set_namespace(LOCAL, name.clone(), Some(namespace.labels.clone()));
    }
    for (id, endpoint) in &cluster.endpoints {
        indexed.set_endpoint(LOCAL, id.clone(), endpoint.clone());
    }
    indexed.refresh(|_, _, _, _| {});
    let (endpoints, stored) = (cpu_s() - start, resident_mb());
    let start = cpu_s();
    let mut evaluator = Evaluator::new("c".into(), &mut indexed);
    let layer = &policies.clusters["c"];
    layer.policies.values().for_each(|policy| evaluator.set_policy(&mut indexed, policy));
    indexed.refresh(|_, _, _, _| {});
    let rows = vec![
        ("endpoints_cpu".to_owned(), endpoints, "s"),
        ("policies_cpu".to_owned(), cpu_s() - start, "s"),
        ("resident_policies_and_classes".to_owned(), resident_mb() - stored, "MB"),
    ];
    (indexed, evaluator, rows)
}

fn random() -> impl FnMut() -> u32 {
    let mut state = 1_u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % ENDPOINTS
    }
}

fn queries() -> Vec<Query> {
    let mut next = random();
    let end = |index: u32| End { address: address(index), pod: Some(("c".into(), id(index))) };
    (0..QUESTIONS)
        .map(|at| Query {
            source: end(next()),
            destination: end(next()),
            protocol: 6,
            source_port: 40_000,
            destination_port: 80 + (at % 3) as u16,
            icmp: None,
        })
        .collect()
}

fn measure(queries: &[Query], rows: &mut Rows, evaluate: impl Fn(&Query) -> Verdict) {
    for round in ["first", "again"] {
        let (cpu, start) = (cpu_s(), Instant::now());
        let denied = queries.iter().filter(|query| evaluate(query) == Verdict::Deny).count();
        let (cpu, wall) = (cpu_s() - cpu, start.elapsed().as_secs_f64());
        rows.push((format!("{round}_questions_per_cpu_second"), QUESTIONS as f64 / cpu, "1/s"));
        rows.push((format!("{round}_questions_per_wall_second"), QUESTIONS as f64 / wall, "1/s"));
        rows.push((format!("{round}_denied"), denied as f64 / QUESTIONS as f64, "share"));
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn resident_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/statm").expect("Linux has /proc");
    let pages: f64 = status.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("the second number");
    pages * 4096.0 / 1e6
}

/// Time on a processor of this, the only thread.
fn cpu_s() -> f64 {
    let time =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every Linux has this clock");
    time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9
}

fn address(index: u32) -> std::net::IpAddr {
    std::net::Ipv4Addr::from(0x0a00_0000 + index).into()
}

fn id(index: u32) -> EndpointId {
    let namespace: Arc<str> = format!("ns-{}", index % 100).into();
    EndpointId { kind: EndpointKind::Pod, namespace: Some(namespace), name: format!("pod-{index}").into() }
}

fn inventory() -> Inventory {
    let mut cluster = Cluster::default();
    for at in 0..100 {
        cluster.namespaces.insert(format!("ns-{at}").into(), Namespace::default());
    }
    for index in 0..ENDPOINTS {
        let mut labels = Labels::from([(marker(index as usize % MARKERS).into(), "true".into())]);
        for values in [10, 11, 20, 30, 40] {
            labels.insert(format!("label-{values}").into(), format!("value-{}", index % values).into());
        }
        let endpoint = Endpoint { labels: labels.into(), addresses: vec![address(index)], ..Endpoint::default() };
        cluster.endpoints.insert(id(index), endpoint);
    }
    Inventory { clusters: [("c".into(), cluster)].into(), ..Inventory::default() }
}

fn marker(at: usize) -> String {
    format!("marker-{}", at % MARKERS)
}

fn has(at: usize) -> Selector {
    Selector::parse(&format!("has({})", marker(at))).expect("a selector")
}

/// Rule `offset` of policy `at`: one of 31.
fn equal_rule(at: usize, offset: usize) -> Rule {
    let selection = Selection { clusters: ClusterScope::Local, selector: has(at + offset) };
    let source = EntityMatch { selection: Some(selection), ..EntityMatch::default() };
    Rule { source, ..bare(offset) }
}

/// Rule `offset` of policy `at`: like no other.
fn diverse_rule(at: usize, offset: usize) -> Rule {
    let number = at * 5 + offset;
    let selection = |text: String| {
        let selector = Selector::parse(&text).expect("a selector");
        Some(Selection { clusters: ClusterScope::Local, selector })
    };
    let mut rule = bare(offset);
    let (source, destination) = (&mut rule.source, &mut rule.destination);
    // Too many ports for one to be asked for often.
    let port = 1_000 + (number % 50_000) as u16;
    match number % 6 {
        0 => {
            let (ten, forty) = (number % 10, number % 40);
            source.selection = selection(format!("label-10 == 'value-{ten}' && label-40 != 'value-{forty}'"));
            destination.ports = vec![Port::Range(port, port + 10)];
        }
        1 => {
            source.selection =
                selection(format!("{} && label-30 in {{'value-{}', 'v{number}'}}", has(at), number % 30));
            rule.action = Action::Log;
        }
        2 => source.nets = vec![ipnet::Ipv4Net::new_assert((0xac10_0000 + number as u32).into(), 32).into()],
        3 => {
            source.not_selection = selection(format!("label-20 == 'value-{}'", number % 20));
            destination.ports = vec![Port::Named(format!("port-{number}").into())];
        }
        4 => {
            source.selection = selection(format!("projectcalico.org/namespace == 'ns-{number}' || has(key-{number})"));
            rule.action = Action::Deny;
        }
        _ => {
            rule.protocol = Some(Protocol::Udp);
            destination.ports = vec![Port::Range(port, port)];
        }
    }
    rule
}

/// Allows everything.
fn bare(index: usize) -> Rule {
    Rule {
        action: Action::Allow,
        index: index as u32,
        ip_version: None,
        protocol: None,
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: EntityMatch::default(),
        destination: EntityMatch::default(),
        http: None,
        not_understood: None,
    }
}

fn policies(rule: fn(usize, usize) -> Rule) -> PolicySet {
    let mut layer = Layer::default();
    for at in 0..POLICIES {
        let id = PolicyId {
            cluster: Some("c".into()),
            kind: PolicyKind::CalicoGlobalNetworkPolicy,
            namespace: None,
            name: format!("policy-{at:05}").into(),
        };
        let policy = Policy {
            tier: TierId { phase: Phase::Local, name: "default".into() },
            order: Order(Some(at as f64)),
            enforcers: ClusterScope::Local,
            selector: has(at),
            ingress: Some((0..5).map(|offset| rule(at, offset)).collect()),
            egress: Some(vec![bare(0)]),
            staged: None,
            host_only: false,
            id: id.clone(),
        };
        layer.policies.insert(id, policy);
    }
    PolicySet { clusters: [("c".into(), layer)].into(), ..PolicySet::default() }
}
