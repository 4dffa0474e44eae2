//! The Kubernetes objects that make up the inventory, with the fields that policy needs. Other fields are left alone, so
//! that an object of a newer API server is read as well.

use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::inventory::{EndpointId, EndpointKind, Labels, NamedPort};
use serde::Deserialize;

use crate::address::{parse_address, parse_block, protocol_number};
use crate::decode::null_as_default;
use crate::field::{Errors, Path};
use crate::inventory::{self, NamespacedName, NodeInfo, PodPhase};
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

    pub fn convert(self) -> inventory::Namespace {
        inventory::Namespace { name: self.metadata.name.into(), labels: self.metadata.labels }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ServiceAccount {
    #[serde(default)]
    pub metadata: Metadata,
}

impl ServiceAccount {
    pub fn convert(self) -> inventory::ServiceAccount {
        inventory::ServiceAccount { key: key_of(&self.metadata), labels: self.metadata.labels }
    }
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

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs", default, deserialize_with = "null_as_default")]
    pub pod_cidrs: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub taints: Vec<Taint>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct Taint {
    #[serde(default, deserialize_with = "null_as_default")]
    pub key: String,
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
    fn addresses(&self) -> Vec<IpAddr> {
        let mut all = Vec::new();
        for address in self.status.addresses.iter().filter_map(|entry| parse_address(&entry.address)) {
            if !all.contains(&address) {
                all.push(address);
            }
        }
        all
    }

    /// Where this node's pods get their addresses.
    fn pod_ranges(&self) -> Vec<ipnet::IpNet> {
        let mut all: Vec<ipnet::IpNet> = Vec::new();
        for net in self.spec.pod_cidrs.iter().chain(&self.spec.pod_cidr).filter_map(|text| parse_block(text).ok()) {
            if !all.contains(&net) {
                all.push(net);
            }
        }
        all
    }

    pub fn convert(self) -> inventory::Node {
        let (addresses, pod_ranges) = (self.addresses(), self.pod_ranges());
        let agent_not_ready = self.spec.taints.iter().any(|taint| taint.key == inventory::AGENT_NOT_READY);
        let Metadata { name, labels, .. } = self.metadata;
        inventory::Node { name: name.into(), info: NodeInfo { labels, addresses, pod_ranges, agent_not_ready } }
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

    fn converted_ports(&self) -> Arc<[inventory::ContainerPort]> {
        let convert = |port: &ContainerPort| {
            let (name, port, protocol) = (port.name.clone(), port.container_port, port.protocol_number()?);
            Some(inventory::ContainerPort { name, protocol, port })
        };
        self.ports().filter_map(convert).collect()
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
    pub fn convert(self) -> inventory::Pod {
        let (service_account, ports, reported) = (self.spec.account(), self.spec.converted_ports(), self.reported());
        let Self { metadata, spec, status } = self;
        let phase = match status.phase.as_deref() {
            Some("Running") => PodPhase::Running,
            Some("Succeeded" | "Failed") => PodPhase::Ended,
            None if status.pod_ip.is_none() && status.pod_ips.is_empty() => PodPhase::Unstored,
            _ => PodPhase::Other,
        };
        let hosts = status.host_ips.iter().filter_map(|entry| entry.ip.as_ref()).chain(&status.host_ip);
        inventory::Pod {
            host_addresses: hosts.filter_map(|text| parse_address(text)).collect(),
            id: EndpointId {
                kind: EndpointKind::Pod,
                namespace: Some(metadata.namespace()),
                name: metadata.name.into(),
            },
            created: metadata.creation_timestamp,
            controller: metadata.controller,
            labels: metadata.labels.into(),
            service_account,
            ports,
            node: spec.node_name,
            host_network: spec.host_network,
            phase,
            reported,
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
        // Most pods have one, and there are many pods.
        reported.shrink_to_fit();
        reported
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
    pub fn convert(self) -> inventory::Service {
        let (addresses, external_addresses) = (self.addresses(), self.external_addresses());
        let spec = self.spec;
        let port = |port: &ServicePort| {
            let target = port.target().map(|target| match target {
                TargetPort::Number(number) => inventory::TargetPort::Number(*number),
                TargetPort::Name(name) => inventory::TargetPort::Name(Arc::clone(name)),
            });
            let protocol = protocol_number(port.protocol.as_deref().unwrap_or("TCP"))?;
            Some(inventory::ServicePort { name: port.name.clone(), protocol, port: port.port, target })
        };
        inventory::Service {
            key: key_of(&self.metadata),
            address: spec.cluster_ip.as_deref().and_then(parse_address),
            headless: spec.cluster_ip.as_deref() == Some("None"),
            addresses,
            external_addresses,
            external_name: spec.external_name.filter(|_| spec.kind.as_deref() == Some("ExternalName")),
            ports: spec.ports.iter().filter_map(port).collect(),
            selector: spec.selector,
        }
    }

    /// The addresses that it has in its cluster; a headless one has none.
    fn addresses(&self) -> Vec<IpAddr> {
        distinct(self.spec.cluster_ip.iter().chain(&self.spec.cluster_ips))
    }

    /// The addresses that it has for clients outside.
    fn external_addresses(&self) -> Vec<IpAddr> {
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

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct SlicePort {
    pub name: Option<Arc<str>>,
    pub protocol: Option<String>,
    pub port: Option<u16>,
}

impl EndpointSlice {
    pub fn convert(self) -> inventory::EndpointSlice {
        let endpoint = |SliceEndpoint { addresses, conditions }: SliceEndpoint| inventory::SliceEndpoint {
            addresses: addresses.iter().filter_map(|text| parse_address(text)).collect(),
            ready: conditions.ready != Some(false),
            last_resort: conditions.terminating == Some(true) && conditions.serving != Some(false),
        };
        let port = |SlicePort { name, protocol, port }: SlicePort| {
            let protocol = protocol_number(protocol.as_deref().unwrap_or("TCP"))?;
            Some(inventory::SlicePort { name, protocol, port })
        };
        let name = self.metadata.labels.get("kubernetes.io/service-name").cloned();
        inventory::EndpointSlice {
            service: name.map(|name| (self.metadata.namespace(), name)),
            endpoints: self.endpoints.into_iter().map(endpoint).collect(),
            ports: self.ports.into_iter().filter_map(port).collect(),
        }
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
}

fn key_of(metadata: &Metadata) -> NamespacedName {
    (metadata.namespace(), metadata.name.as_str().into())
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
