//! The network of a world: a router, nodes around it, pods behind the nodes.
//!
//! Every link is a veth pair with host routes, as a routed pod network has it: a pod's default route is its node, a
//! node's default route is the router, and the router knows each node's pod ranges. Nothing is bridged or translated,
//! so a packet arrives with the address that it left with.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use crate::namespace::{Namespace, NetworkError};
use crate::world::{Cluster, Node, Pod};

/// What a node answers to its pods, and the router to its nodes.
const POD_GATEWAYS: [&str; 2] = ["169.254.1.1", "fe80::1"];
const NODE_GATEWAYS: [&str; 2] = [ROUTER, "fe80::2"];
/// The router's address towards every node.
pub const ROUTER: &str = "169.254.2.1";
/// A node's interface towards the router; the others lead to its pods.
pub const UPLINK: &str = "eth0";

/// All namespaces of a world; dropped, all of them are removed.
#[derive(Debug)]
pub struct Fabric {
    router: Namespace,
    /// By (cluster, node).
    nodes: BTreeMap<(String, String), Arc<Namespace>>,
    /// By (cluster, namespace, pod).
    pods: BTreeMap<(String, String, String), Inside>,
    /// For interface names, which are short and never reused.
    links: u32,
}

/// A pod's namespace, and the name of its node's interface to it.
#[derive(Debug)]
struct Inside {
    namespace: Namespace,
    outer: String,
}

impl Fabric {
    pub fn build(clusters: &[Cluster]) -> Result<Self, NetworkError> {
        let router = Namespace::create("router")?;
        let mut fabric = Self { router, nodes: BTreeMap::new(), pods: BTreeMap::new(), links: 0 };
        for cluster in clusters {
            for node in &cluster.nodes {
                fabric.add_node(&cluster.name, node)?;
            }
            for pod in &cluster.pods {
                fabric.add_pod(pod)?;
            }
        }
        Ok(fabric)
    }

    /// The namespace in the middle, from which every node can be reached.
    pub fn router(&self) -> &Namespace {
        &self.router
    }

    pub fn node(&self, cluster: &str, node: &str) -> Option<&Namespace> {
        self.nodes.get(&(cluster.to_owned(), node.to_owned())).map(Arc::as_ref)
    }

    /// For what outlives the borrow of the fabric, such as a node that starts its own pods.
    pub fn shared_node(&self, cluster: &str, node: &str) -> Option<Arc<Namespace>> {
        self.nodes.get(&(cluster.to_owned(), node.to_owned())).map(Arc::clone)
    }

    pub fn pod(&self, pod: &Pod) -> Option<&Namespace> {
        self.pods.get(&(pod.cluster.clone(), pod.namespace.clone(), pod.name.clone())).map(|inside| &inside.namespace)
    }

    /// Adds a node to a running world.
    pub fn add_node(&mut self, cluster: &str, node: &Node) -> Result<(), NetworkError> {
        let inside = Namespace::create(&format!("{cluster}-{}", node.name))?;
        let outer = format!("hanse{}", self.links);
        link(&self.router, &outer, &inside, NODE_GATEWAYS, &node.addresses)?;
        let mut routes = String::new();
        for range in &node.pod_ranges {
            if let Some(via) = family(&node.addresses, range.addr().is_ipv4()) {
                writeln!(routes, "route add {range} via {via} dev {outer} onlink").expect("text");
            }
        }
        self.router.batch(&routes)?;
        self.links += 1;
        self.nodes.insert((cluster.to_owned(), node.name.clone()), Arc::new(inside));
        Ok(())
    }

    /// Adds a pod to a running world.
    pub fn add_pod(&mut self, pod: &Pod) -> Result<(), NetworkError> {
        let inside = Namespace::create(&format!("{}-{}-{}", pod.cluster, pod.namespace, pod.name))?;
        let node = self.node(&pod.cluster, &pod.node).ok_or_else(|| NetworkError::Command {
            command: format!("add pod {}", pod.title()),
            message: format!("its node {} does not exist", pod.node),
        })?;
        let outer = format!("hanse{}", self.links);
        link_pod(node, &outer, &inside, &pod.addresses)?;
        self.links += 1;
        let inside = Inside { namespace: inside, outer };
        self.pods.insert((pod.cluster.clone(), pod.namespace.clone(), pod.name.clone()), inside);
        Ok(())
    }

    /// Removes a pod and its interface. A namespace alone goes when the kernel finds the time, and its routes with it.
    pub fn remove_pod(&mut self, pod: &Pod) -> Result<(), NetworkError> {
        let removed = self.pods.remove(&(pod.cluster.clone(), pod.namespace.clone(), pod.name.clone()));
        match (removed, self.node(&pod.cluster, &pod.node)) {
            (Some(inside), Some(node)) => node.batch(&format!("link del {}\n", inside.outer)),
            _ => Ok(()),
        }
    }
}

/// Joins a pod to its node: the pod gets the addresses, and its node's interface to it the name `interface`.
pub(crate) fn link_pod(
    node: &Namespace,
    interface: &str,
    pod: &Namespace,
    addresses: &[IpAddr],
) -> Result<(), NetworkError> {
    link(node, interface, pod, POD_GATEWAYS, addresses)
}

/// Joins two namespaces: `inner` gets the addresses and a default route through `outer`, whose interface is called `name`.
fn link(
    outer: &Namespace,
    name: &str,
    inner: &Namespace,
    gateways: [&str; 2],
    addresses: &[IpAddr],
) -> Result<(), NetworkError> {
    let inner_name = inner.name();
    outer.batch(&format!("link add {name} type veth peer name {UPLINK} netns {inner_name}\n"))?;
    let [v4, v6] = gateways;
    let (mut out, mut into) = (String::new(), String::new());
    writeln!(out, "link set {name} up\naddr add {v4}/32 dev {name}\naddr add {v6}/64 dev {name} nodad").expect("text");
    writeln!(into, "link set {UPLINK} up").expect("text");
    for address in addresses {
        match address {
            IpAddr::V4(address) => {
                writeln!(into, "addr add {address}/32 dev {UPLINK}").expect("text");
                writeln!(out, "route add {address}/32 dev {name}").expect("text");
            }
            IpAddr::V6(address) => {
                writeln!(into, "addr add {address}/128 dev {UPLINK} nodad").expect("text");
                writeln!(out, "route add {address}/128 dev {name}").expect("text");
            }
        }
    }
    writeln!(into, "route add default via {v4} dev {UPLINK} onlink").expect("text");
    if addresses.iter().any(IpAddr::is_ipv6) {
        writeln!(into, "route add default via {v6} dev {UPLINK} onlink").expect("text");
    }
    inner.batch(&into)?;
    outer.batch(&out)?;
    Ok(())
}

fn family(addresses: &[IpAddr], v4: bool) -> Option<IpAddr> {
    addresses.iter().copied().find(|address| address.is_ipv4() == v4)
}
