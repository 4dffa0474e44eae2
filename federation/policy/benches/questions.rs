//! How many questions a second the prepared evaluator answers, on one core: 100,000 endpoints in 100 namespaces, 10,000
//! policies of one tier of which about 323 apply to each endpoint in each direction, five ingress rules each.
//!
//! Two shapes. `equal`: 31 different rules, each written many times. `diverse`: no two rules equal, of every kind of clause,
//! few of which match, so that most questions ask all 1,600 of an endpoint.
//!
//! `cargo bench -p hanse-policy --bench questions [-- [SHAPE…] -o json]`. Rates are of time on a processor; the wall clock's
//! are beside them.

use std::sync::Arc;
use std::time::Instant;

use hanse_policy::evaluate::{End, Query, Verdict, View, evaluate};
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
    let named = |shape: &str| arguments.iter().any(|argument| argument == shape);
    let all = !named("equal") && !named("diverse");
    if all || named("equal") {
        measure("equal", &policies(equal_rule), &inventory, json);
    }
    if all || named("diverse") {
        measure("diverse", &policies(diverse_rule), &inventory, json);
    }
}

fn measure(shape: &str, policies: &PolicySet, inventory: &Inventory, json: bool) {
    let start = cpu_s();
    let prepared = Prepared::new(policies, inventory, View::Enforced);
    let preparing = cpu_s() - start;
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % ENDPOINTS
    };
    let end = |index: u32| End { address: address(index), pod: Some(("c".into(), id(index))) };
    let queries: Vec<Query> = (0..QUESTIONS)
        .map(|at| Query {
            source: end(next()),
            destination: end(next()),
            protocol: 6,
            source_port: 40_000,
            destination_port: 80 + (at % 3) as u16,
            icmp: None,
        })
        .collect();
    // One only: the reference looks at every endpoint for every selection.
    assert_eq!(prepared.evaluate(&queries[0]), evaluate(policies, inventory, &queries[0], View::Enforced));
    let mut rows = vec![("prepare_cpu".to_owned(), preparing, "s")];
    for round in ["first", "again"] {
        let (cpu, start) = (cpu_s(), Instant::now());
        let denied = queries.iter().filter(|query| prepared.evaluate(query).verdict == Verdict::Deny).count();
        let (cpu, wall) = (cpu_s() - cpu, start.elapsed().as_secs_f64());
        rows.push((format!("{round}_questions_per_cpu_second"), QUESTIONS as f64 / cpu, "1/s"));
        rows.push((format!("{round}_questions_per_wall_second"), QUESTIONS as f64 / wall, "1/s"));
        rows.push((format!("{round}_denied"), denied as f64 / QUESTIONS as f64, "share"));
    }
    for (metric, value, unit) in rows {
        if json {
            println!(
                r#"{{"bench":"questions","shape":"{shape}","metric":"{metric}","value":{value},"unit":"{unit}"}}"#
            );
        } else {
            println!("{shape:<10} {metric:<34} {value:>14.3} {unit}");
        }
    }
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
        let endpoint = Endpoint { labels, addresses: vec![address(index)], ..Endpoint::default() };
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
