//! How many questions a second the prepared evaluator answers, on one core: 100,000 endpoints in 100 namespaces, 10,000
//! policies of one tier of which about 323 apply to each endpoint in each direction, five ingress rules each.
//!
//! `cargo bench -p hanse-policy --bench questions [-- -o json]`

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
    let json = std::env::args().any(|argument| argument == "json");
    let inventory = inventory();
    let policies = policies();
    let start = Instant::now();
    let prepared = Prepared::new(&policies, &inventory, View::Enforced);
    let preparing = start.elapsed();
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
    for query in queries.iter().step_by(QUESTIONS / 5) {
        assert_eq!(prepared.evaluate(query), evaluate(&policies, &inventory, query, View::Enforced));
    }
    let mut rows = vec![("prepare", "wall", preparing.as_secs_f64(), "s")];
    for round in ["first questions", "again"] {
        let start = Instant::now();
        let denied = queries.iter().filter(|query| prepared.evaluate(query).verdict == Verdict::Deny).count();
        let rate = QUESTIONS as f64 / start.elapsed().as_secs_f64();
        rows.push((round, "rate", rate, "1/s"));
        rows.push((round, "denied", denied as f64 / QUESTIONS as f64, "share"));
    }
    for (shape, metric, value, unit) in rows {
        if json {
            println!(
                "{{\"bench\":\"questions\",\"shape\":\"{shape}\",\"metric\":\"{metric}\",\"value\":{value},\"unit\":\"{unit}\"}}"
            );
        } else {
            println!("questions  {shape:16} {metric:8} {value:14.3} {unit}");
        }
    }
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

fn policies() -> PolicySet {
    let mut layer = Layer::default();
    for at in 0..POLICIES {
        let has = |at: usize| Selector::parse(&format!("has({})", marker(at))).expect("a selector");
        let rule = |offset: u32| Rule {
            action: Action::Allow,
            index: offset,
            ip_version: None,
            protocol: None,
            not_protocol: None,
            icmp: None,
            not_icmp: None,
            source: EntityMatch {
                selection: Some(Selection { clusters: ClusterScope::Local, selector: has(at + offset as usize) }),
                ..EntityMatch::default()
            },
            destination: EntityMatch::default(),
            http: None,
            not_understood: None,
        };
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
            ingress: Some((0..5).map(rule).collect()),
            egress: Some(vec![Rule { source: EntityMatch::default(), ..rule(0) }]),
            staged: None,
            host_only: false,
            id: id.clone(),
        };
        layer.policies.insert(id, policy);
    }
    PolicySet { clusters: [("c".into(), layer)].into(), ..PolicySet::default() }
}
