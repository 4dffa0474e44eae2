//! The precondition of other tests and of the demo: with nothing enforced, every packet arrives unchanged.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use hanse_e2e::fabric::Fabric;
use hanse_e2e::probe::{self, Listener, Observed};
use hanse_e2e::world::{Cluster, Pod};
use hanse_e2e::{matrix, namespace, sandbox};

pub fn demo() -> Vec<Cluster> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    ["train", "serve", "prod"]
        .map(|name| Cluster::read(name, &directory.join(name)).expect("the demo's manifests"))
        .into()
}

fn serve(fabric: &Fabric, pods: &[Pod]) -> Vec<Listener> {
    let one = |pod: &Pod| Listener::start(fabric.pod(pod).expect("built"), pod.port, &pod.title());
    pods.iter().map(|pod| one(pod).expect("the port is free")).collect()
}

#[test]
fn every_pod_reaches_every_pod_in_both_families() {
    sandbox::test("network::every_pod_reaches_every_pod_in_both_families", || {
        let clusters = demo();
        let pods: Vec<Pod> = clusters.iter().flat_map(|cluster| cluster.pods.clone()).collect();
        let fabric = Fabric::build(&clusters).expect("the network");
        let listeners = serve(&fabric, &pods);
        let pairs = matrix::pairs(&pods);
        assert_eq!(pairs.len(), pods.len() * (pods.len() - 1));
        for version in [4, 6] {
            let observed = matrix::measure(&fabric, &pairs, version);
            let differences = matrix::differences(&pairs, &observed, &vec![true; pairs.len()]);
            assert!(differences.is_empty(), "IPv{version}: {differences:?}");
        }
        drop(listeners);
        // A probe that cannot distinguish closed from open would prove nothing.
        let observed = matrix::measure(&fabric, &pairs, 4);
        assert!(observed.iter().all(|it| *it == Observed::Closed), "no listener is left: {observed:?}");
    });
}

#[test]
fn without_an_agent_a_forged_source_arrives() {
    // So that its absence later is the agent's doing, and not this network's.
    sandbox::test("network::without_an_agent_a_forged_source_arrives", || {
        let clusters = demo();
        let pods: Vec<Pod> = clusters.iter().flat_map(|cluster| cluster.pods.clone()).collect();
        let find = |name: &str| pods.iter().find(|pod| pod.name == name).expect("in the demo");
        let (attacker, victim, target) = (find("attacker-0"), find("client-0"), find("vllm-0"));
        let fabric = Fabric::build(&clusters).expect("the network");
        let listener = Listener::start(fabric.pod(target).expect("built"), target.port, &target.title())
            .expect("the port is free");
        for family in 0..2 {
            let (forged, to): (IpAddr, IpAddr) = (victim.addresses[family], target.addresses[family]);
            let length = if forged.is_ipv4() { 32 } else { 128 };
            let before = listener.datagrams();
            let inside = fabric.pod(attacker).expect("built");
            inside.batch(&format!("addr add {forged}/{length} dev lo nodad\n")).expect("any address fits loopback");
            probe::send_udp(inside, forged, SocketAddr::new(to, target.port)).expect("sent");
            let arrived = probe::until(Duration::from_secs(5), || listener.datagrams() > before);
            assert!(arrived.is_some(), "from {forged} to {to}");
        }
    });
}

#[test]
fn teardown_removes_all_namespaces() {
    sandbox::test("network::teardown_removes_all_namespaces", || {
        let clusters = demo();
        let mut fabric = Fabric::build(&clusters).expect("the network");
        let pods: usize = clusters.iter().map(|cluster| cluster.pods.len()).sum();
        let nodes: usize = clusters.iter().map(|cluster| cluster.nodes.len()).sum();
        assert_eq!(namespace::list().expect("names").len(), 1 + nodes + pods);
        // A pod goes, and the same one comes again, with the network up.
        let pod = &clusters[0].pods[0];
        fabric.remove_pod(pod).expect("it is there");
        assert_eq!(namespace::list().expect("names").len(), nodes + pods);
        fabric.add_pod(pod).expect("its address is free again");
        drop(fabric);
        assert!(namespace::list().expect("names").is_empty());
    });
}
