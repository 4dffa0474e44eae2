//! The Kubernetes objects that make up the inventory, with the fields that policy needs. Other fields are left alone, so
//! that an object of a newer API server is read as well.

use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind, Labels, NamedPort};
use serde::Deserialize;

use crate::address::{parse_address, parse_block, protocol_number};
use crate::decode::null_as_default;
use crate::field::{Errors, Path};
use crate::metadata::{Metadata, check_metadata};

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Namespace {
    #[serde(default)]
    pub metadata: Metadata,
}

impl Namespace {
    pub fn check(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, errors);
        if self.metadata.name.contains('.') || self.metadata.name.len() > 63 {
            let path = Path::Root("metadata.name");
            errors.add(&path, format!("\"{}\" is not a namespace: at most 63 of a-z 0-9 -", self.metadata.name));
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ServiceAccount {
    #[serde(default)]
    pub metadata: Metadata,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Node {
    #[serde(default)]
    pub metadata: Metadata,
    #[serde(default, deserialize_with = "null_as_default")]
    pub spec: NodeSpec,
    #[serde(default, deserialize_with = "null_as_default")]
    pub status: NodeStatus,
}

/// A node, as far as rule sets need it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeInfo {
    pub labels: Labels,
    pub addresses: Vec<IpAddr>,
    pub pod_ranges: Vec<ipnet::IpNet>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs", default, deserialize_with = "null_as_default")]
    pub pod_cidrs: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct NodeStatus {
    #[serde(default, deserialize_with = "null_as_default")]
    pub addresses: Vec<NodeAddress>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct NodeAddress {
    #[serde(rename = "type")]
    pub kind: String,
    pub address: String,
}

impl Node {
    /// All IP addresses of the node, the order as stored.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let mut all = Vec::new();
        for address in self.status.addresses.iter().filter_map(|entry| parse_address(&entry.address)) {
            if !all.contains(&address) {
                all.push(address);
            }
        }
        all
    }

    /// Where this node's pods get their addresses.
    pub fn pod_ranges(&self) -> Vec<ipnet::IpNet> {
        let mut all: Vec<ipnet::IpNet> = Vec::new();
        for net in self.spec.pod_cidrs.iter().chain(&self.spec.pod_cidr).filter_map(|text| parse_block(text).ok()) {
            if !all.contains(&net) {
                all.push(net);
            }
        }
        all
    }

    /// The node as rule sets need it.
    pub fn info(&self) -> NodeInfo {
        let labels = self.metadata.labels.clone();
        NodeInfo { labels, addresses: self.addresses(), pod_ranges: self.pod_ranges() }
    }

    /// Malformed metadata, and ranges and addresses that are none: without its ranges a node's new pods are not closed.
    pub fn check(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, errors);
        let spec = Path::Root("spec");
        for text in self.spec.pod_cidr.iter().filter(|text| !text.is_empty()) {
            errors.note(&spec.field("podCIDR"), parse_block(text));
        }
        for (index, text) in self.spec.pod_cidrs.iter().enumerate() {
            errors.note(&spec.field("podCIDRs").index(index), parse_block(text));
        }
        let addresses = Path::Root("status.addresses");
        for (index, entry) in self.status.addresses.iter().enumerate() {
            if matches!(&*entry.kind, "InternalIP" | "ExternalIP") {
                check_address(&entry.address, &addresses.index(index).field("address"), errors);
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Pod {
    #[serde(default)]
    pub metadata: Metadata,
    #[serde(default, deserialize_with = "null_as_default")]
    pub spec: PodSpec,
    #[serde(default, deserialize_with = "null_as_default")]
    pub status: PodStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    pub service_account_name: Option<Arc<str>>,
    /// What the field was called once; API servers keep both alike.
    pub service_account: Option<Arc<str>>,
    pub node_name: Option<Arc<str>>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub host_network: bool,
    #[serde(default, deserialize_with = "null_as_default")]
    pub containers: Vec<Container>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub init_containers: Vec<Container>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    #[serde(default, deserialize_with = "null_as_default")]
    pub ports: Vec<ContainerPort>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    pub name: Option<Arc<str>>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub container_port: u16,
    pub protocol: Option<String>,
}

impl ContainerPort {
    fn protocol_number(&self) -> Option<u8> {
        protocol_number(self.protocol.as_deref().unwrap_or("TCP"))
    }
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    pub phase: Option<String>,
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    #[serde(rename = "podIPs", default, deserialize_with = "null_as_default")]
    pub pod_ips: Vec<PodIp>,
    #[serde(rename = "hostIP")]
    pub host_ip: Option<String>,
    #[serde(rename = "hostIPs", default, deserialize_with = "null_as_default")]
    pub host_ips: Vec<PodIp>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct PodIp {
    pub ip: Option<String>,
}

impl PodSpec {
    /// All ports of all containers. Of those that only run before the others too: nothing distinguishes them for a policy.
    fn ports(&self) -> impl Iterator<Item = &ContainerPort> {
        let containers = self.containers.iter().chain(&self.init_containers);
        containers.flat_map(|container| &container.ports)
    }

    pub fn named_ports(&self) -> Vec<NamedPort> {
        let named = |port: &ContainerPort| {
            Some(NamedPort { name: port.name.clone()?, protocol: port.protocol_number()?, port: port.container_port })
        };
        self.ports().filter_map(named).collect()
    }

    /// Protocol and number of every port, named or not.
    pub fn declared_ports(&self) -> impl Iterator<Item = (u8, u16)> {
        self.ports().filter_map(|port| Some((port.protocol_number()?, port.container_port)))
    }

    /// Adds a TCP port, unless there is one of its name or, where it has none, of its number.
    pub fn add_port(&mut self, name: Option<&str>, port: u16) {
        let is_known = |known: &ContainerPort| match name {
            Some(name) => known.name.as_deref() == Some(name),
            None => known.container_port == port,
        };
        if !self.ports().any(is_known) {
            let port = ContainerPort { name: name.map(Arc::from), container_port: port, protocol: None };
            self.containers.push(Container { ports: vec![port] });
        }
    }

    pub fn account(&self) -> Arc<str> {
        let given = [&self.service_account_name, &self.service_account].into_iter().flatten();
        given.into_iter().find(|name| !name.is_empty()).cloned().unwrap_or_else(|| "default".into())
    }
}

impl Pod {
    pub fn id(&self) -> EndpointId {
        EndpointId {
            kind: EndpointKind::Pod,
            namespace: Some(self.metadata.namespace()),
            name: self.metadata.name.as_str().into(),
        }
    }

    /// What an API server would not store: metadata that is malformed, and addresses that are none.
    pub fn check(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, errors);
        let status = Path::Root("status");
        let mut check =
            |path: &Path<'_>, text: &Option<String>| check_address(text.as_deref().unwrap_or(""), path, errors);
        check(&status.field("podIP"), &self.status.pod_ip);
        check(&status.field("hostIP"), &self.status.host_ip);
        for (name, entries) in [("podIPs", &self.status.pod_ips), ("hostIPs", &self.status.host_ips)] {
            for (index, entry) in entries.iter().enumerate() {
                check(&status.field(name).index(index).field("ip"), &entry.ip);
            }
        }
    }

    /// Succeeded or failed: it owns no address any more.
    pub fn has_ended(&self) -> bool {
        matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed"))
    }

    /// The addresses that its status names, the primary first.
    fn reported(&self) -> Vec<IpAddr> {
        let mut reported = Vec::new();
        for text in self.status.pod_ip.iter().chain(self.status.pod_ips.iter().filter_map(|entry| entry.ip.as_ref())) {
            if let Some(address) = parse_address(text)
                && !reported.contains(&address)
            {
                reported.push(address);
            }
        }
        reported
    }

    /// The addresses that it says are its own.
    pub fn claims(&self) -> Vec<IpAddr> {
        if self.has_ended() || self.spec.host_network { Vec::new() } else { self.reported() }
    }

    /// As an endpoint of the inventory, if all that it claims is its own. `node_addresses`: of the pod's node, used where the
    /// pod is on its network.
    pub fn endpoint(&self, node_addresses: &[IpAddr]) -> Endpoint {
        let reported = self.reported();
        let (ended, host) = (self.has_ended(), self.spec.host_network);
        let host_addresses = match (host && !ended, reported.is_empty()) {
            (false, _) => Vec::new(),
            (true, false) => reported.clone(),
            (true, true) => {
                let hosts = self.status.host_ips.iter().filter_map(|entry| entry.ip.as_ref());
                let mut hosts: Vec<_> =
                    hosts.chain(&self.status.host_ip).filter_map(|text| parse_address(text)).collect();
                hosts.extend(node_addresses);
                hosts
            }
        };
        Endpoint {
            labels: self.metadata.labels.clone(),
            service_account: Some(self.spec.account()),
            addresses: if ended || host { Vec::new() } else { reported },
            nets: Vec::new(),
            ports: self.spec.named_ports(),
            node: self.spec.node_name.clone(),
            host_network: host,
            host_addresses,
            planned: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Service {
    #[serde(default)]
    pub metadata: Metadata,
    #[serde(default, deserialize_with = "null_as_default")]
    pub spec: ServiceSpec,
    #[serde(default, deserialize_with = "null_as_default")]
    pub status: ServiceStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    #[serde(default, deserialize_with = "null_as_default")]
    pub load_balancer: LoadBalancerStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct LoadBalancerStatus {
    #[serde(default, deserialize_with = "null_as_default")]
    pub ingress: Vec<LoadBalancerIngress>,
}

/// An address of a load balancer, or a name, which is not resolved here.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct LoadBalancerIngress {
    pub ip: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs", default, deserialize_with = "null_as_default")]
    pub cluster_ips: Vec<String>,
    pub external_name: Option<Arc<str>>,
    #[serde(rename = "externalIPs", default, deserialize_with = "null_as_default")]
    pub external_ips: Vec<String>,
    /// The address that is requested of the load balancer.
    #[serde(rename = "loadBalancerIP")]
    pub load_balancer_ip: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub selector: Labels,
    #[serde(default, deserialize_with = "null_as_default")]
    pub ports: Vec<ServicePort>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    pub name: Option<Arc<str>>,
    pub protocol: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub port: u16,
    pub target_port: Option<TargetPort>,
}

impl ServicePort {
    /// Where packets go; `None`: to the same port. API servers take zero and no text for none.
    pub fn target(&self) -> Option<&TargetPort> {
        self.target_port.as_ref().filter(|target| match target {
            TargetPort::Number(number) => *number != 0,
            TargetPort::Name(name) => !name.is_empty(),
        })
    }
}

/// A number, or the name of a container's port.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "is neither a port (1–65535) nor a port's name")]
pub enum TargetPort {
    Number(u16),
    Name(Arc<str>),
}

impl Service {
    /// The addresses that it has in its cluster; a headless one has none.
    pub fn addresses(&self) -> Vec<IpAddr> {
        distinct(self.spec.cluster_ip.iter().chain(&self.spec.cluster_ips))
    }

    /// The addresses that it has for clients outside.
    pub fn external_addresses(&self) -> Vec<IpAddr> {
        let of_balancer = self.status.load_balancer.ingress.iter().filter_map(|it| it.ip.as_ref());
        let of_balancer = of_balancer.chain(&self.spec.load_balancer_ip);
        let of_balancer = of_balancer.filter(|_| self.spec.kind.as_deref() == Some("LoadBalancer"));
        distinct(self.spec.external_ips.iter().chain(of_balancer))
    }

    pub fn check(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, errors);
        let spec = Path::Root("spec");
        let address = self.spec.cluster_ip.as_deref().filter(|text| *text != "None");
        check_address(address.unwrap_or(""), &spec.field("clusterIP"), errors);
        for (index, text) in self.spec.external_ips.iter().enumerate() {
            check_address(text, &spec.field("externalIPs").index(index), errors);
        }
    }
}

/// Addresses in their order, once each.
fn distinct<'t>(texts: impl Iterator<Item = &'t String>) -> Vec<IpAddr> {
    let mut all = Vec::new();
    for address in texts.filter_map(|text| parse_address(text)) {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    #[serde(default)]
    pub metadata: Metadata,
    #[serde(default)]
    pub address_type: String,
    #[serde(default, deserialize_with = "null_as_default")]
    pub endpoints: Vec<SliceEndpoint>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub ports: Vec<SlicePort>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct SliceEndpoint {
    #[serde(default, deserialize_with = "null_as_default")]
    pub addresses: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub conditions: EndpointConditions,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct EndpointConditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

impl SliceEndpoint {
    /// Whether packets to the service may go to it; not given means yes.
    pub fn is_ready(&self) -> bool {
        self.conditions.ready != Some(false)
    }

    /// Whether packets go to it where no endpoint is ready: it ends, and still serves.
    pub fn is_last_resort(&self) -> bool {
        self.conditions.terminating == Some(true) && self.conditions.serving != Some(false)
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct SlicePort {
    pub name: Option<Arc<str>>,
    pub protocol: Option<String>,
    pub port: Option<u16>,
}

impl EndpointSlice {
    /// The service that the slice belongs to.
    pub fn service(&self) -> Option<(Arc<str>, Arc<str>)> {
        let name = self.metadata.labels.get("kubernetes.io/service-name")?;
        Some((self.metadata.namespace(), Arc::clone(name)))
    }

    /// A slice of names has them in place of addresses.
    pub fn check(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, errors);
        let endpoints = Path::Root("endpoints");
        for (index, endpoint) in self.endpoints.iter().enumerate().filter(|_| self.address_type != "FQDN") {
            let path = endpoints.index(index);
            for (at, text) in endpoint.addresses.iter().enumerate() {
                check_address(text, &path.field("addresses").index(at), errors);
            }
        }
        let ports = Path::Root("ports");
        for (index, port) in self.ports.iter().enumerate() {
            check_protocol(port.protocol.as_deref(), &ports.index(index), errors);
        }
    }

    /// The address of every endpoint, ready or not: policy speaks of who belongs to the service.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses_of(|_| true)
    }

    /// The addresses of some endpoints.
    pub fn addresses_of(&self, of: impl Fn(&SliceEndpoint) -> bool) -> impl Iterator<Item = IpAddr> {
        let endpoints = self.endpoints.iter().filter(move |endpoint| of(endpoint));
        endpoints.flat_map(|endpoint| &endpoint.addresses).filter_map(|text| parse_address(text))
    }

    /// Address, protocol number and port of every endpoint; none where the slice gives no number of a port.
    pub fn backends(&self) -> impl Iterator<Item = (IpAddr, u8, u16)> {
        self.addresses().flat_map(|address| {
            self.ports.iter().filter_map(move |port| {
                Some((address, protocol_number(port.protocol.as_deref().unwrap_or("TCP"))?, port.port?))
            })
        })
    }
}

/// What is empty is not given.
fn check_address(text: &str, path: &Path<'_>, errors: &mut Errors) {
    if !text.is_empty() && parse_address(text).is_none() {
        errors.add(path, format!("\"{text}\" is not an address"));
    }
}

/// Of a port; what is not given is TCP.
pub(crate) fn check_protocol(name: Option<&str>, port: &Path<'_>, errors: &mut Errors) {
    if let Some(name) = name.filter(|name| !name.is_empty() && protocol_number(name).is_none()) {
        errors.add(&port.field("protocol"), format!("\"{name}\" is not supported: TCP, UDP or SCTP"));
    }
}
