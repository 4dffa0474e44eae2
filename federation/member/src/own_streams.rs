//! Hanse's own streams: connections that are allowed before all tiers, so that a policy that denies all traffic can still be withdrawn at
//! the hub.
//!
//! The list is fixed, and limited to addresses, protocol and port. A node receives only streams with one of its own pods as an end:
//! traffic between hosts, and between a node and its own pods, is not subject to rules. [`crate::resolver`] resolves the names of hubs.
//! The address of a service is replaced by those of its backends, because rules see packets after address translation.
//!
//! What others say never opens a pod to anyone: towards an address that the hub announced, only this member's own connections are allowed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use hanse_api::assemble::{Assembly, ClusterState};
use hanse_api::inventory::NodeInfo;
use hanse_ruleset::OwnStream;
use ipnet::IpNet;

const TCP: u8 = 6;

/// Where the processes of Hanse are that this member knows of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ends {
    /// Where the hub serves members and users, as configured, and where it takes newcomers.
    pub hubs: BTreeSet<SocketAddr>,
    /// Where replicas of the hub are, as the hub says.
    pub announced: BTreeSet<SocketAddr>,
    pub joins: BTreeSet<SocketAddr>,
    /// The member's listeners; an unspecified address is every one of the member's.
    pub agents: Option<SocketAddr>,
    pub enrolment: Option<SocketAddr>,
}

impl Ends {
    /// All that are of the hub.
    fn named(&self) -> impl Iterator<Item = &SocketAddr> {
        self.hubs.iter().chain(&self.announced).chain(&self.joins)
    }
}

/// The streams of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnStreams {
    all: Vec<OwnStream>,
    /// On which node the pods are that own an address in `all`.
    pods: BTreeMap<IpAddr, Arc<str>>,
}

impl OwnStreams {
    /// `local` gives the address with which this process speaks to another, if there is a way.
    pub fn new(ends: &Ends, cluster: &Assembly, local: impl Fn(SocketAddr) -> Option<IpAddr>) -> Self {
        let nodes = cluster.state().nodes.values();
        let nodes: BTreeSet<IpAddr> = nodes.flat_map(|node| node.addresses.iter().copied()).collect();
        let [hubs, announced, joins] = [&ends.hubs, &ends.announced, &ends.joins].map(|it| translated(it, cluster));
        let towards_hub: BTreeSet<IpAddr> = ends.named().filter_map(|it| local(*it)).collect();
        let mut all = Vec::new();
        for (name, configured, announced) in [("hub", &hubs, &announced), ("joining", &joins, &BTreeSet::new())] {
            for (port, to) in by_port(&(configured | announced)) {
                all.extend(stream(&format!("member to {name}"), Some(&towards_hub), &to, port));
            }
            for (port, to) in by_port(configured) {
                // Members of other clusters and people come from addresses that nobody here knows.
                all.extend(stream(&format!("anyone to {name}"), None, &to, port));
            }
        }
        let mut own: Option<BTreeSet<IpAddr>> = None;
        for (name, listener) in [("agents to member", ends.agents), ("nodes to enrolment", ends.enrolment)] {
            let Some(listener) = listener else { continue };
            let to = match listener.ip().is_unspecified() {
                // Which of this process's addresses the nodes reach: those with which it would speak to them.
                true => own.get_or_insert_with(|| {
                    let towards_nodes = nodes.iter().filter_map(|node| local(SocketAddr::new(*node, listener.port())));
                    towards_nodes.chain(towards_hub.iter().copied()).collect()
                }),
                false => &mut [listener.ip()].into(),
            };
            all.extend(stream(name, Some(&nodes), to, listener.port()));
        }
        Self { pods: BTreeMap::new(), all }
    }

    /// Whether they are other ones when these services are.
    pub fn depend_on(ends: &Ends, state: &ClusterState, services: &BTreeSet<(Arc<str>, Arc<str>)>) -> bool {
        let service = |end: &SocketAddr| state.service_addresses.get(&end.ip().to_canonical());
        ends.named().filter_map(service).any(|key| services.contains(key))
    }

    /// The same streams; `node_of` gives the node of the pod that owns an address.
    pub fn on_nodes_of(self, node_of: impl Fn(IpAddr) -> Option<Arc<str>>) -> Self {
        let named: BTreeSet<IpAddr> =
            self.all.iter().flat_map(|it| it.from.iter().chain(&it.to)).map(IpNet::addr).collect();
        let pods = named.into_iter().filter_map(|address| Some((address, node_of(address)?))).collect();
        Self { pods, ..self }
    }

    /// Those of which a pod of this node is an end.
    pub fn on_node(&self, name: &str, node: &NodeInfo) -> Vec<OwnStream> {
        let here = |net: &IpNet| match self.pods.get(&net.addr()) {
            Some(owner) => **owner == *name,
            None => node.pod_ranges.iter().any(|range| range.contains(&net.addr())),
        };
        // A stream from anywhere is for the node that it leads to.
        let ends_here = |it: &&OwnStream| it.from.iter().chain(&it.to).any(here);
        self.all.iter().filter(ends_here).cloned().collect()
    }
}

/// The address from which a datagram to `to` would leave. Nothing is sent.
pub fn local_address(to: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip().to_canonical())
}

/// As people read it: `agents to member: TCP from 192.0.2.1/32 to 10.0.0.7/32, port 7445`.
pub fn describe(stream: &OwnStream) -> String {
    let nets = |nets: &[IpNet]| match nets {
        [] => "anywhere".to_owned(),
        nets if nets.len() > 8 => format!("{} and {} more", join(&nets[..8]), nets.len() - 8),
        nets => join(nets),
    };
    let protocol = if stream.protocol == TCP { "TCP".to_owned() } else { stream.protocol.to_string() };
    format!("{}: {protocol} from {} to {}, port {}", stream.name, nets(&stream.from), nets(&stream.to), stream.port)
}

fn join(nets: &[IpNet]) -> String {
    nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ")
}

fn stream(name: &str, from: Option<&BTreeSet<IpAddr>>, to: &BTreeSet<IpAddr>, port: u16) -> Option<OwnStream> {
    // What stays within a host meets no hook.
    let nets = |addresses: &BTreeSet<IpAddr>| -> Vec<IpNet> {
        addresses.iter().filter(|it| !it.is_loopback() && !it.is_unspecified()).map(|it| IpNet::from(*it)).collect()
    };
    let (from, to) = (from.map(nets), nets(to));
    // From nobody is not from anywhere.
    let from = match from {
        Some(from) if from.is_empty() => return None,
        from => from.unwrap_or_default(),
    };
    (!to.is_empty()).then(|| OwnStream { name: name.into(), from, to, protocol: TCP, port })
}

fn by_port(ends: &BTreeSet<SocketAddr>) -> BTreeMap<u16, BTreeSet<IpAddr>> {
    let mut ports: BTreeMap<u16, BTreeSet<IpAddr>> = BTreeMap::new();
    for end in ends {
        ports.entry(end.port()).or_default().insert(end.ip().to_canonical());
    }
    ports
}

fn translated(ends: &BTreeSet<SocketAddr>, cluster: &Assembly) -> BTreeSet<SocketAddr> {
    let backends = |end: &SocketAddr| match cluster.state().service_addresses.get(&end.ip().to_canonical()) {
        Some(service) => cluster.backends(service, TCP, end.port()),
        None => [*end].into(),
    };
    ends.iter().flat_map(backends).collect()
}

#[cfg(test)]
mod tests {

    use hanse_api::assemble::Candidates;
    use hanse_api::manifest::{Manifests, read_bytes};

    use super::*;

    const CLUSTER: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: a}
spec: {podCIDR: 10.0.1.0/24}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: b}
spec: {podCIDR: 10.0.2.0/24}
status: {addresses: [{type: InternalIP, address: 192.0.2.2}]}
---
apiVersion: v1
kind: Service
metadata: {name: hub, namespace: hanse}
spec: {clusterIP: 10.96.0.9, ports: [{name: hub, port: 443, targetPort: hub}, {name: debug, port: 9000}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: hub-1, namespace: hanse, labels: {kubernetes.io/service-name: hub}}
addressType: IPv4
endpoints: [{addresses: [10.0.2.9]}]
ports: [{name: hub, port: 7443, protocol: TCP}, {name: debug, port: 9000, protocol: TCP}]
---
apiVersion: v1
kind: Pod
metadata: {name: hub, namespace: hanse}
spec: {nodeName: b}
status: {phase: Running, podIP: 10.0.2.9}
---
apiVersion: v1
kind: Pod
metadata: {name: member, namespace: hanse}
spec: {nodeName: a}
status: {phase: Running, podIP: 10.0.1.7}
---
apiVersion: v1
kind: Pod
metadata: {name: moved, namespace: hanse}
spec: {nodeName: b}
status: {phase: Running, podIP: 10.0.1.20}
"#;

    fn cluster() -> Assembly {
        let mut read = Manifests::default();
        read_bytes(&"cluster.yaml".into(), CLUSTER.as_bytes(), &mut read);
        assert!(read.diagnostics.is_empty(), "{:?}", read.diagnostics);
        let mut assembly = Assembly::new("here".into());
        let mut candidates = Candidates::default();
        candidates.replace_all(read.objects);
        assembly.update(candidates.take_changes());
        assembly
    }

    fn streams(ends: &Ends, member: &str, expected: [&[&str]; 2]) {
        let assembly = cluster();
        let state = assembly.state();
        let node_of = |address| state.cluster.endpoints[assembly.owner(address)?].node.clone();
        let own = OwnStreams::new(ends, &assembly, |_| member.parse().ok()).on_nodes_of(node_of);
        for (node, expected) in ["a", "b"].into_iter().zip(expected) {
            let found: Vec<String> = own.on_node(node, &state.nodes[node]).iter().map(describe).collect();
            assert_eq!(found, expected, "node {node}");
        }
    }

    fn check(hub: &str, member: &str, expected: [&[&str]; 2]) {
        let ends = Ends {
            hubs: [hub.parse().expect("an address")].into(),
            agents: Some("0.0.0.0:7445".parse().expect("an address")),
            ..Ends::default()
        };
        streams(&ends, member, expected);
        let assembly = cluster();
        let state = assembly.state();
        let service = |name: &str| BTreeSet::from([("hanse".into(), name.into())]);
        assert_eq!(OwnStreams::depend_on(&ends, state, &service("hub")), hub.starts_with("10.96.0.9:"));
        assert!(!OwnStreams::depend_on(&ends, state, &service("another")));
    }

    #[test]
    fn a_node_is_given_the_streams_of_its_own_pods_only() {
        let agents = "agents to member: TCP from 192.0.2.1/32, 192.0.2.2/32 to 10.0.1.7/32, port 7445";
        let out = "member to hub: TCP from 10.0.1.7/32 to 203.0.113.5/32, port 7443";
        // Both on hosts: no pod is an end.
        check("203.0.113.5:7443", "192.0.2.1", [&[], &[]]);
        check("203.0.113.5:7443", "10.0.1.7", [&[out, agents], &[]]);
        let through = "member to hub: TCP from 10.0.1.7/32 to 10.0.2.9/32, port 7443";
        let anyone = "anyone to hub: TCP from anywhere to 10.0.2.9/32, port 7443";
        check("10.0.2.9:7443", "10.0.1.7", [&[through, agents], &[through, anyone]]);
        // By the service's address, another port in front.
        check("10.96.0.9:443", "10.0.1.7", [&[through, agents], &[through, anyone]]);
        // A pod is where it says, whatever the range of its address.
        let moved = "anyone to hub: TCP from anywhere to 10.0.1.20/32, port 7443";
        check(
            "10.0.1.20:7443",
            "192.0.2.9",
            [&[], &["member to hub: TCP from 192.0.2.9/32 to 10.0.1.20/32, port 7443", moved]],
        );
        check("127.0.0.1:7443", "127.0.0.1", [&[], &[]]);
        // The service has no such port.
        check("10.96.0.9:7443", "10.0.1.7", [&[agents], &[]]);
    }

    #[test]
    fn announced_addresses_open_no_pod_to_anyone() {
        let set = |of: &[&str]| of.iter().map(|it| it.parse().expect("an address")).collect::<BTreeSet<SocketAddr>>();
        let announced = |of: &[&str]| Ends { announced: set(of), ..Ends::default() };
        let to_pod = "member to hub: TCP from 10.0.1.7/32 to 10.0.1.20/32, port 80";
        streams(&announced(&["10.0.1.20:80"]), "10.0.1.7", [&[to_pod], &[to_pod]]);
        let to_hub = "member to hub: TCP from 10.0.1.7/32 to 10.0.2.9/32, port 7443";
        streams(&announced(&["10.96.0.9:443"]), "10.0.1.7", [&[to_hub], &[to_hub]]);
        // Beside a configured address, which stays open, and is not allowed twice.
        let both = Ends { hubs: set(&["10.96.0.9:443"]), ..announced(&["10.0.1.20:80", "10.0.2.9:7443"]) };
        let anyone = "anyone to hub: TCP from anywhere to 10.0.2.9/32, port 7443";
        streams(&both, "10.0.1.7", [&[to_pod, to_hub], &[to_pod, to_hub, anyone]]);
        let service = BTreeSet::from([("hanse".into(), "hub".into())]);
        assert!(OwnStreams::depend_on(&announced(&["10.96.0.9:443"]), cluster().state(), &service));
    }
}
