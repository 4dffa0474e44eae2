//! Random worlds: a few clusters with pods and network sets, policies of every kind over them, and packets between them.
//! Small vocabularies, so that things meet.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::evaluate::{End, Query};
use hanse_policy::inventory::*;
use hanse_policy::model::*;
use hanse_policy::selector::{Selector, build};

/// A small generator whose whole state is its seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn some<T>(&mut self, times: usize, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.once_in(times).then(|| make(self))
    }
}

const CLUSTERS: &[&str] = &["prod", "serve", "train"];
const NAMESPACES: &[&str] = &["edge", "jobs", "web"];
const KEYS: &[&str] = &["app", "role", "stage"];
const VALUES: &[&str] = &["a", "b", "c"];
const ACCOUNTS: &[&str] = &["default", "runner"];
const PORTS: &[u16] = &[53, 80, 8080, 40_000];
/// Among them the echo requests of both families.
const ICMP_TYPES: &[u8] = &[0, 8, 128];
const PORT_NAMES: &[&str] = &["dns", "http"];
const SELECTORS: &[&str] = &[
    "all()",
    "has(app)",
    "!has(app)",
    "app == 'a'",
    "app != 'a'",
    "role in {'a', 'b'}",
    "role not in {'b'}",
    "app == 'a' && role == 'b'",
    "app == 'a' || !has(role)",
    "stage contains 'c'",
    "pcns.stage == 'a'",
    "!pcns.stage == 'a'",
    "pcsa.role == 'a'",
    "projectcalico.org/namespace == 'web'",
    "has(projectcalico.org/namespace)",
    "projectcalico.org/serviceaccount == 'runner'",
    "projectcalico.org/orchestrator == 'k8s'",
    "set == 'x'",
    "pod//pcns.stage == 'a'",
    "!has(pod//pcns.stage)",
    "pcns.projectcalico.org/name in {'web', 'a'}",
    "pcns.//projectcalico.org/name == 'a'",
    "global()",
];

pub struct World {
    pub inventory: Inventory,
    pub policies: PolicySet,
}

pub fn world(random: &mut Random) -> World {
    let mut inventory = Inventory::default();
    for (at, name) in CLUSTERS.iter().enumerate() {
        inventory.clusters.insert((*name).into(), cluster(random, at));
    }
    if random.once_in(2) {
        let nets = vec![net(random), net(random)];
        let set = Endpoint { labels: labels(random).into(), nets, ..Endpoint::default() };
        inventory.federated_sets.insert(set_id(None, "shared"), set);
    }
    let mut policies = PolicySet::default();
    for name in ["guard-a", "guard-b"] {
        add_tier(random, &mut policies.federation, Phase::Guard, name);
    }
    add_tier(random, &mut policies.federation, Phase::Baseline, "base");
    for at in 0..random.below(6) {
        let policy = policy(random, None, at);
        policies.federation.policies.insert(policy.id.clone(), policy);
    }
    for name in CLUSTERS {
        let name: Arc<str> = (*name).into();
        let mut layer = Layer::default();
        for tier in ["default", "security"] {
            add_tier(random, &mut layer, Phase::Local, tier);
        }
        for at in 0..random.below(7) {
            let policy = policy(random, Some(name.clone()), at);
            layer.policies.insert(policy.id.clone(), policy);
        }
        policies.clusters.insert(name, layer);
    }
    World { inventory, policies }
}

fn add_tier(random: &mut Random, layer: &mut Layer, phase: Phase, name: &str) {
    if random.once_in(3) {
        return;
    }
    let id = TierId { phase, name: name.into() };
    let order = Order(random.some(2, |random| random.below(3) as f64));
    let default = random.pick(&[TierDefault::Deny, TierDefault::Pass]);
    layer.tiers.insert(id.clone(), Tier { id, order, default });
}

fn labels(random: &mut Random) -> Labels {
    let mut labels = Labels::new();
    for key in KEYS.iter().chain(&["set", "pcns.stage"]) {
        if random.once_in(2) {
            let value = if *key == "set" { "x" } else { random.pick(VALUES) };
            labels.insert((*key).into(), value.into());
        }
    }
    labels
}

fn cluster(random: &mut Random, at: usize) -> Cluster {
    let mut cluster = Cluster {
        stale: random.once_in(5),
        federated_allow_final: random.once_in(3),
        label_grant: random
            .some(4, |random| {
                LabelGrant::Keys(BTreeSet::from([(random.pick(&["app", "role", "stage", "pcns.stage"])).into()]))
            })
            .unwrap_or_default(),
        ..Cluster::default()
    };
    for name in NAMESPACES {
        let mut of_namespace = labels(random);
        if random.once_in(3) {
            of_namespace.insert(build::NAME.into(), random.pick(VALUES).into());
        }
        cluster.namespaces.insert((*name).into(), Namespace { labels: of_namespace });
        for account in ACCOUNTS {
            cluster.service_accounts.insert(((*name).into(), (*account).into()), labels(random));
        }
    }
    for pod in 0..6 {
        let namespace: Arc<str> = (random.pick(NAMESPACES)).into();
        let id = EndpointId { kind: EndpointKind::Pod, namespace: Some(namespace), name: format!("pod-{pod}").into() };
        let host_network = random.once_in(12);
        let own: Vec<IpAddr> =
            vec![format!("10.{at}.0.{pod}").parse().unwrap(), format!("fd00:{at}::{pod}").parse().unwrap()];
        let (addresses, host_addresses) = if host_network { (Vec::new(), own) } else { (own, Vec::new()) };
        let ports =
            PORT_NAMES.iter().filter(|_| random.once_in(2)).map(|name| (*name).into()).collect::<Vec<Arc<str>>>();
        let ports = ports
            .into_iter()
            .map(|name| NamedPort { name, protocol: random.pick(&[6, 17]), port: random.pick(PORTS) })
            .collect();
        let service_account = random.some(2, |random| (random.pick(ACCOUNTS)).into());
        let endpoint = Endpoint {
            labels: labels(random).into(),
            service_account,
            addresses,
            ports,
            host_network,
            host_addresses,
            ..Endpoint::default()
        };
        cluster.endpoints.insert(id, endpoint);
    }
    for set in 0..random.below(3) {
        let namespace = random.some(2, |random| (random.pick(NAMESPACES)).into());
        let nets = vec![net(random), net(random)];
        let endpoint = Endpoint { labels: labels(random).into(), nets, ..Endpoint::default() };
        cluster.endpoints.insert(set_id(namespace, &format!("set-{set}")), endpoint);
    }
    if !random.once_in(4) {
        let of_pod = |pod: usize| [(6, 8080), (6, 80), (17, 53)].map(move |(protocol, port)| (pod, protocol, port));
        let address = |pod| format!("10.{at}.0.{pod}").parse().unwrap();
        let backends = (0..4).flat_map(of_pod).map(|(pod, protocol, port)| (address(pod), protocol, port)).collect();
        // One more has no port.
        let addresses = (0..5).map(address).collect();
        cluster.services.insert(("web".into(), "front".into()), Service { addresses, backends, ..Service::default() });
    }
    cluster
}

fn set_id(namespace: Option<Arc<str>>, name: &str) -> EndpointId {
    EndpointId { kind: EndpointKind::NetworkSet, namespace, name: name.into() }
}

fn net(random: &mut Random) -> ipnet::IpNet {
    const NETS: &[&str] = &[
        "10.0.0.0/8",
        "10.1.0.0/16",
        "10.0.0.2/31",
        "10.2.0.7/29",
        "203.0.113.0/24",
        "0.0.0.0/0",
        "fd00::/16",
        "fd00:1::/64",
        "2001:db8::/32",
        "::/0",
    ];
    random.pick(NETS).parse().unwrap()
}

fn policy(random: &mut Random, cluster: Option<ClusterName>, at: usize) -> Policy {
    let federated = cluster.is_none();
    let staged = random.some(4, |random| {
        random.pick(&[StagedAction::Set, StagedAction::Delete, StagedAction::Learn, StagedAction::Ignore])
    });
    let kind = match (federated, staged) {
        (true, Some(_)) => PolicyKind::StagedFederatedNetworkPolicy,
        (true, None) => PolicyKind::FederatedNetworkPolicy,
        (_, Some(_)) => PolicyKind::StagedGlobalNetworkPolicy,
        (_, None) if random.once_in(4) => PolicyKind::KubernetesNetworkPolicy,
        (_, None) => PolicyKind::CalicoGlobalNetworkPolicy,
    };
    let tier = match federated {
        true => {
            random.pick(&[(Phase::Guard, "guard-a"), (Phase::Guard, "guard-b"), (Phase::Baseline, "base")]).to_owned()
        }
        false => (Phase::Local, random.pick(&["default", "security", "kube-admin", "nobody-made-this"])),
    };
    // Few names, so that staged policies find what they replace.
    let id = PolicyId {
        cluster,
        kind,
        namespace: None,
        name: format!("policy-{}", at % if federated { 2 } else { 4 }).into(),
    };
    let scope = |random: &mut Random| match (federated, random.below(3)) {
        (false, 0 | 1) => ClusterScope::Local,
        (_, 0) => {
            ClusterScope::Named(CLUSTERS.iter().filter(|_| random.once_in(2)).map(|name| (*name).into()).collect())
        }
        _ => ClusterScope::All,
    };
    let rules = |random: &mut Random| -> Option<Vec<Rule>> {
        (!random.once_in(4)).then(|| {
            (0..random.below(5))
                .map(|index| {
                    rule(random, index as u32, &|random| Selection {
                        clusters: scope(random),
                        selector: selector(random),
                    })
                })
                .collect()
        })
    };
    Policy {
        tier: TierId { phase: tier.0, name: tier.1.into() },
        order: Order(random.some(2, |random| random.below(3) as f64)),
        enforcers: if federated {
            if random.once_in(3) { scope(random) } else { ClusterScope::All }
        } else {
            ClusterScope::Local
        },
        selector: if random.once_in(2) { Selector::all() } else { selector(random) },
        ingress: rules(random),
        egress: rules(random),
        staged,
        host_only: random.once_in(15),
        id,
    }
}

fn selector(random: &mut Random) -> Selector {
    let expr = Selector::parse(random.pick(SELECTORS)).unwrap().expr;
    match random.below(6) {
        0 => build::all_of([build::in_namespace(random.pick(NAMESPACES)), expr]).into(),
        1 => build::in_namespaces(&expr).into(),
        _ => expr.into(),
    }
}

fn rule(random: &mut Random, index: u32, selection: &dyn Fn(&mut Random) -> Selection) -> Rule {
    let protocol = |random: &mut Random| {
        random.pick(&[
            Protocol::Tcp,
            Protocol::Tcp,
            Protocol::Udp,
            Protocol::Icmp,
            Protocol::IcmpV6,
            Protocol::Sctp,
            Protocol::Number(1),
            Protocol::Number(6),
        ])
    };
    let icmp = |random: &mut Random| Icmp {
        kind: random.some(2, |random| random.pick(ICMP_TYPES)),
        code: random.some(2, |random| random.below(2) as u8),
    };
    let port = |random: &mut Random| match random.below(5) {
        0 | 1 => Port::Named((random.pick(PORT_NAMES)).into()),
        2 => Port::Range(0, 1024),
        _ => {
            let port = random.pick(PORTS);
            Port::Range(port, port)
        }
    };
    let entity = |random: &mut Random| EntityMatch {
        nets: random.some(6, |random| vec![net(random), net(random)]).unwrap_or_default(),
        not_nets: random.some(8, |random| vec![net(random)]).unwrap_or_default(),
        selection: random.some(3, selection),
        not_selection: random.some(6, selection),
        ports: random.some(4, |random| vec![port(random), port(random)]).unwrap_or_default(),
        not_ports: random.some(8, |random| vec![port(random)]).unwrap_or_default(),
        service: random.some(8, |_| ServiceMatch { namespace: "web".into(), name: "front".into() }),
    };
    Rule {
        action: random.pick(&[
            Action::Allow,
            Action::Allow,
            Action::Allow,
            Action::Allow,
            Action::Deny,
            Action::Pass,
            Action::Log,
        ]),
        index,
        ip_version: random.some(10, |random| random.pick(&[IpVersion::V4, IpVersion::V6])),
        protocol: random.some(3, protocol),
        not_protocol: random.some(10, protocol),
        icmp: random.some(12, icmp),
        not_icmp: random.some(12, icmp),
        source: entity(random),
        destination: entity(random),
        http: random.some(30, |_| HttpMatch { methods: vec!["GET".into()], paths: Vec::new() }),
        not_understood: random.some(30, |_| "a field of next year".into()),
    }
}

/// A packet between two ends: mostly pods, of any cluster.
pub fn query(random: &mut Random, inventory: &Inventory) -> Query {
    let version = if random.once_in(3) { 6 } else { 4 };
    let end = |random: &mut Random| -> End {
        let other = if version == 4 { "203.0.113.9" } else { "2001:db8::9" };
        if random.once_in(5) {
            return End { address: other.parse().unwrap(), pod: None };
        }
        let name = random.pick(CLUSTERS);
        let pods: Vec<_> =
            inventory.clusters[name].endpoints.iter().filter(|(id, _)| id.kind == EndpointKind::Pod).collect();
        let (id, endpoint) = random.pick(&pods);
        let of_version =
            |addresses: &[IpAddr]| addresses.iter().copied().find(|address| address.is_ipv4() == (version == 4));
        match of_version(&endpoint.addresses) {
            Some(address) => End { address, pod: Some((name.into(), id.clone())) },
            None => End { address: of_version(&endpoint.host_addresses).unwrap(), pod: None },
        }
    };
    let protocol = random.pick(&[6, 6, 6, 17, 17, 132, 1, 58]);
    let ports = matches!(protocol, 6 | 17 | 132);
    Query {
        source: end(random),
        destination: end(random),
        protocol,
        source_port: if ports { 40_000 } else { 0 },
        destination_port: if ports { random.pick(PORTS) } else { 0 },
        icmp: matches!(protocol, 1 | 58).then(|| (random.pick(ICMP_TYPES), random.below(2) as u8)),
    }
}
