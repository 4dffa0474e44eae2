//! The objects of a cluster's inventory, converted from the API's types.

use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::inventory::{Endpoint, EndpointId, Labels, NamedPort, SharedLabels};
use ipnet::IpNet;

/// A namespace and a name in it.
pub type NamespacedName = (Arc<str>, Arc<str>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    pub name: Arc<str>,
    pub labels: Labels,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    pub key: NamespacedName,
    pub labels: Labels,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: Arc<str>,
    pub info: NodeInfo,
}

/// The key of the taint of nodes whose agents have no rules yet.
pub const AGENT_NOT_READY: &str = "hanse.dev/agent-not-ready";

/// The fields of a node that rule sets need.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeInfo {
    pub labels: Labels,
    pub addresses: Vec<IpAddr>,
    pub pod_ranges: Vec<IpNet>,
    /// It has the taint [`AGENT_NOT_READY`].
    pub agent_not_ready: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    pub id: EndpointId,
    /// RFC 3339. The newest pod owns an address that several pods report.
    pub created: Option<Arc<str>>,
    /// The owner that controls the pod, as [`crate::names::owner_name`] names it.
    pub controller: Option<Arc<str>>,
    pub labels: SharedLabels,
    pub service_account: Arc<str>,
    pub ports: Arc<[ContainerPort]>,
    pub node: Option<Arc<str>>,
    pub host_network: bool,
    pub phase: PodPhase,
    /// The addresses in its status, the primary first.
    pub reported: Vec<IpAddr>,
    /// The addresses of its host in its status.
    pub host_addresses: Vec<IpAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodPhase {
    /// No API server has stored the pod: it has no status.
    Unstored,
    /// Neither running nor ended.
    Other,
    Running,
    /// Succeeded or failed. The pod owns no address any more.
    Ended,
}

/// A port that a container declares.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ContainerPort {
    pub name: Option<Arc<str>>,
    pub protocol: u8,
    pub port: u16,
}

impl Pod {
    /// The addresses that the pod reports as its own.
    pub fn claims(&self) -> &[IpAddr] {
        if self.phase == PodPhase::Ended || self.host_network { &[] } else { &self.reported }
    }

    pub fn is_running(&self) -> bool {
        !self.claims().is_empty() || self.phase == PodPhase::Running
    }

    /// Protocol and number of every port, named or not.
    pub fn declared_ports(&self) -> impl Iterator<Item = (u8, u16)> {
        self.ports.iter().map(|port| (port.protocol, port.port))
    }

    /// The endpoint of a pod that owns all addresses that it reports. `node_addresses`: those of its node, for a pod on its
    /// node's network.
    pub fn endpoint(&self, node_addresses: &[IpAddr]) -> Endpoint {
        let ended = self.phase == PodPhase::Ended;
        let host_addresses = match (self.host_network && !ended, self.reported.is_empty()) {
            (false, _) => Vec::new(),
            (true, false) => self.reported.clone(),
            (true, true) => self.host_addresses.iter().chain(node_addresses).copied().collect(),
        };
        let named = |port: &ContainerPort| {
            Some(NamedPort { name: port.name.clone()?, protocol: port.protocol, port: port.port })
        };
        Endpoint {
            labels: self.labels.clone(),
            service_account: Some(Arc::clone(&self.service_account)),
            addresses: self.claims().to_vec(),
            nets: Vec::new(),
            ports: self.ports.iter().filter_map(named).collect(),
            node: self.node.clone(),
            host_network: self.host_network,
            host_addresses,
            planned: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub key: NamespacedName,
    pub selector: Labels,
    /// `spec.clusterIP`.
    pub address: Option<IpAddr>,
    pub headless: bool,
    /// The addresses for clients in the cluster.
    pub addresses: Vec<IpAddr>,
    /// The addresses for clients outside the cluster.
    pub external_addresses: Vec<IpAddr>,
    /// The name that a service of the type ExternalName is an alias of.
    pub external_name: Option<Arc<str>>,
    pub ports: Vec<ServicePort>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    pub name: Option<Arc<str>>,
    pub protocol: u8,
    pub port: u16,
    /// The port of the pods; `None` for the same number.
    pub target: Option<TargetPort>,
}

/// A number, or the name of a container's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    Number(u16),
    Name(Arc<str>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The service that the slice belongs to.
    pub service: Option<NamespacedName>,
    pub endpoints: Vec<SliceEndpoint>,
    pub ports: Vec<SlicePort>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceEndpoint {
    pub addresses: Vec<IpAddr>,
    /// Whether the service sends packets to it.
    pub ready: bool,
    /// Whether the service sends packets to it while no endpoint is ready: it terminates and still serves.
    pub last_resort: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    pub name: Option<Arc<str>>,
    pub protocol: u8,
    /// `None` where the slice gives no number.
    pub port: Option<u16>,
}

impl EndpointSlice {
    /// The address of every endpoint, ready or not: rules that name the service match all of them.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses_of(|_| true)
    }

    /// The addresses of some endpoints.
    pub fn addresses_of(&self, of: impl Fn(&SliceEndpoint) -> bool) -> impl Iterator<Item = IpAddr> {
        let endpoints = self.endpoints.iter().filter(move |endpoint| of(endpoint));
        endpoints.flat_map(|endpoint| &endpoint.addresses).copied()
    }

    /// Address, protocol number and port of every endpoint.
    pub fn backends(&self) -> impl Iterator<Item = (IpAddr, u8, u16)> {
        let ports = |address| self.ports.iter().filter_map(move |port| Some((address, port.protocol, port.port?)));
        self.addresses().flat_map(ports)
    }
}
