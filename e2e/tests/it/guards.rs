//! The guards of every pod before any policy: no forged source, and nothing for a pod that no rule set names.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hanse_dataplane::Backend as _;
use hanse_dataplane::nftables::{Config, Nftables};
use hanse_e2e::fabric::{Fabric, UPLINK};
use hanse_e2e::probe::{self, Listener, Observed};
use hanse_e2e::sandbox;
use hanse_e2e::world::{Cluster, Pod};
use hanse_ruleset::{Chain, ChainId, EndpointId, Generation, LocalEndpoint, NodeConfig, RuleSet, UnknownPods};

use crate::network::demo;

/// The rules for `pods` without a policy: the guards, and everything else passes.
fn without_policy(cluster: &Cluster, node: &str, pods: &[&Pod], number: u64) -> Arc<RuleSet> {
    let node = cluster.nodes.iter().find(|it| it.name == node).expect("a node of the cluster");
    let open = ChainId([1; 16]);
    let endpoint = |pod: &&Pod| {
        let id = EndpointId { namespace: pod.namespace.as_str().into(), name: pod.name.as_str().into() };
        let mut addresses = pod.addresses.clone();
        addresses.sort();
        let endpoint = LocalEndpoint { id: id.clone(), addresses, ingress: open, egress: open, egress_to_node: open };
        (id, Arc::new(endpoint))
    };
    Arc::new(RuleSet {
        generation: Generation { term: 1, number },
        node: NodeConfig {
            pod_ranges: node.pod_ranges.clone(),
            node_addresses: node.addresses.clone(),
            unknown_pods: UnknownPods::Deny,
            ..NodeConfig::default()
        },
        chains: BTreeMap::from([(open, Arc::new(Chain { phases: Vec::new(), profile_allows: true }))]),
        endpoints: pods.iter().map(endpoint).collect(),
        ..RuleSet::default()
    })
}

#[test]
fn new_pod_is_denied_until_it_has_rules_and_cannot_spoof() {
    let name = "guards::new_pod_is_denied_until_it_has_rules_and_cannot_spoof";
    sandbox::test(name, || {
        let clusters = demo();
        let find = |name: &str| {
            clusters.iter().flat_map(|cluster| &cluster.pods).find(|pod| pod.name == name).expect("in the demo")
        };
        let (gateway, attacker, vllm, client) =
            (find("gateway-0"), find("attacker-0"), find("vllm-0"), find("client-0"));
        let fabric = Fabric::build(&clusters).expect("the network");
        let inside = |pod: &Pod| fabric.pod(pod).expect("built");
        let listen = |pod: &Pod| Listener::start(inside(pod), pod.port, &pod.title()).expect("the port is free");
        let (at_attacker, at_vllm) = (listen(attacker), listen(vllm));
        let connect = |from: &Pod, to: &Pod, family: usize| {
            probe::tcp(inside(from), SocketAddr::new(to.addresses[family], to.port), &to.title())
        };

        // Both are on one node of prod; the rule set does not name the attacker yet.
        assert_eq!(gateway.node, attacker.node);
        let prod = clusters.iter().find(|cluster| cluster.name == "prod").expect("in the demo");
        let node = fabric.node("prod", &attacker.node).expect("built");
        let config = Config { uplinks: vec![UPLINK.to_owned()], ..Config::default() };
        let mut kernel = node.enter(|| Nftables::open(config)).expect("nftables in the node's namespace");
        let before = kernel.apply(&without_policy(prod, &attacker.node, &[gateway], 1)).expect("applied");
        assert!(before.refused.is_empty(), "{before:?}");
        for family in 0..2 {
            assert_eq!(connect(gateway, vllm, family), Observed::Open, "a named pod");
            assert_eq!(connect(attacker, vllm, family), Observed::Closed, "from an unnamed pod");
            assert_eq!(connect(vllm, attacker, family), Observed::Closed, "to an unnamed pod, from elsewhere");
            assert_eq!(connect(gateway, attacker, family), Observed::Closed, "to an unnamed pod, from its node's pods");
        }

        let named = kernel.apply(&without_policy(prod, &attacker.node, &[gateway, attacker], 2)).expect("applied");
        assert!(named.refused.is_empty(), "{named:?}");
        for family in 0..2 {
            assert_eq!(connect(attacker, vllm, family), Observed::Open, "named now");
            assert_eq!(connect(vllm, attacker, family), Observed::Open, "named now");
        }

        // Forged: as a pod of its own node, as one of another node, and as a pod of another cluster.
        let to = |family: usize| SocketAddr::new(vllm.addresses[family], vllm.port);
        for (family, victim) in (0..2).flat_map(|family| [gateway, client, find("trainer-0")].map(|pod| (family, pod)))
        {
            let forged = victim.addresses[family];
            let length = if forged.is_ipv4() { 32 } else { 128 };
            let add = format!("addr add {forged}/{length} dev lo nodad\n");
            inside(attacker).batch(&add).expect("any address fits loopback");
            let before = at_vllm.datagrams();
            probe::send_udp(inside(attacker), forged, to(family)).expect("sent");
            // The honest datagram behind it takes the same way, so once it is there, the forged one will not come.
            probe::send_udp(inside(attacker), attacker.addresses[family], to(family)).expect("sent");
            let arrived = probe::until(Duration::from_secs(5), || at_vllm.datagrams() > before);
            assert!(arrived.is_some(), "the honest datagram");
            assert_eq!(at_vllm.datagrams(), before + 1, "forged from {forged}");
            let del = format!("addr del {forged}/{length} dev lo\n");
            inside(attacker).batch(&del).expect("the address was there");
        }
        // One honest datagram for each of three victims in two families, and none that came late.
        assert_eq!(at_vllm.datagrams(), 6);
        drop((at_attacker, at_vllm));

        kernel.cleanup().expect("removed");
    });
}
