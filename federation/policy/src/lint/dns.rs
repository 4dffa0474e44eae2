//! Pods that a default deny cuts off from DNS: the most frequent surprise of a first policy.
//!
//! Which DNS server a pod uses is not in its manifests, so every usual one is tried: kube-dns (also CoreDNS, which carries
//! its label), NodeLocal DNSCache, and OpenShift's. A pod is cut off when it reaches none of them. Where a folder does not
//! contain the pods of the DNS service, one is assumed, for policy to select.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::evaluate::{End, Query, Verdict, View};
use crate::inventory::{Cluster, Endpoint, EndpointId, EndpointKind, Inventory, NamedPort};
use crate::model::{ClusterName, PolicySet};
use crate::prepared::Prepared;
use crate::workload::{Workload, telling_keys, workloads};

use super::{About, DNS_CUT, Finding};

/// A DNS service as its distribution installs it: namespace, the label of its pods, and the port on which they answer.
struct Service {
    namespace: &'static str,
    label: (&'static str, &'static str),
    port: u16,
    name: &'static str,
}

impl Service {
    fn has(&self, id: &EndpointId, endpoint: &Endpoint) -> bool {
        let (key, value) = self.label;
        id.kind == EndpointKind::Pod
            && id.namespace.as_deref() == Some(self.namespace)
            && endpoint.labels.get(key).is_some_and(|it| **it == *value)
    }
}

const SERVICES: [Service; 2] = [
    Service { namespace: "kube-system", label: ("k8s-app", "kube-dns"), port: 53, name: "kube-dns" },
    Service {
        namespace: "openshift-dns",
        label: ("dns.operator.openshift.io/daemonset-dns", "default"),
        port: 5353,
        name: "OpenShift DNS",
    },
];

/// The address on which NodeLocal DNSCache answers on every node by default.
const NODE_LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 20, 10));
/// What DNS pods and others have for addresses where none is known: reserved for documentation, so that no policy means them.
const ASSUMED: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 53)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53))];
const ASSUMED_OWN: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
const UDP: u8 = 17;
const SOURCE_PORT: u16 = 40_000;

/// The DNS servers that a cluster has although none is among its pods here: each usual one, in a cluster with nothing else.
pub fn assumed_servers(inventory: &Inventory) -> BTreeMap<ClusterName, Cluster> {
    let has_server = |cluster: &Cluster| cluster.endpoints.iter().any(|(id, it)| service_of(id, it).is_some());
    let clusters = inventory.clusters.iter().filter(|(_, cluster)| !has_server(cluster));
    let with_servers = |cluster: &Cluster| {
        let namespaces = SERVICES.iter().filter_map(|service| cluster.namespaces.get_key_value(service.namespace));
        let namespaces = namespaces.map(|(name, namespace)| (name.clone(), namespace.clone())).collect();
        let (labels, label_grant) = (cluster.labels.clone(), cluster.label_grant.clone());
        let mut servers = Cluster { labels, label_grant, stale: cluster.stale, namespaces, ..Cluster::default() };
        SERVICES.iter().for_each(|service| assume(&mut servers, service));
        servers
    };
    clusters.map(|(name, cluster)| (name.clone(), with_servers(cluster))).collect()
}

/// Adds a pod of a DNS service, with its namespace.
fn assume(cluster: &mut Cluster, service: &Service) {
    let (id, endpoint) = assumed(service);
    let namespace = cluster.namespaces.entry(service.namespace.into()).or_default();
    let name = "kubernetes.io/metadata.name".into();
    namespace.labels.entry(name).or_insert_with(|| service.namespace.into());
    cluster.endpoints.insert(id, endpoint);
}

/// Namespaces of which some pod reaches no DNS server.
pub fn cut_off(policies: &PolicySet, inventory: &Inventory) -> Vec<Finding> {
    let mut inventory = inventory.clone();
    for cluster in inventory.clusters.values_mut() {
        for service in &SERVICES {
            if !cluster.endpoints.iter().any(|(id, endpoint)| service.has(id, endpoint)) {
                assume(cluster, service);
            }
        }
    }
    let prepared = Prepared::new(policies, &inventory, View::Enforced);
    let mut findings = Vec::new();
    for (name, workloads) in workloads(&inventory, &telling_keys([policies])) {
        let servers = servers(name, &workloads);
        // Of each namespace, how many pods are cut off, how many there are, and how many of them do not run.
        let mut cut: BTreeMap<&Arc<str>, [usize; 3]> = BTreeMap::new();
        for workload in &workloads {
            let (id, endpoint) = workload.members[0];
            let (EndpointKind::Pod, Some(namespace)) = (id.kind, &id.namespace) else { continue };
            if service_of(id, endpoint).is_some() || !endpoint.is_reachable() {
                continue;
            }
            let addresses = addresses(endpoint, &ASSUMED_OWN);
            let reaches = |server: &(End, u16)| {
                let own = addresses.iter().find(|it| it.is_ipv4() == server.0.address.is_ipv4());
                own.is_some_and(|address| {
                    let source = End { address: *address, pod: Some((name.clone(), id.clone())) };
                    let (destination, destination_port) = (server.0.clone(), server.1);
                    let query = Query {
                        source,
                        destination,
                        protocol: UDP,
                        source_port: SOURCE_PORT,
                        destination_port,
                        icmp: None,
                    };
                    prepared.evaluate(&query).verdict == Verdict::Allow
                })
            };
            let counts = cut.entry(namespace).or_default();
            counts[1] += workload.members.len();
            counts[2] += if endpoint.planned.is_some() { workload.members.len() } else { 0 };
            if !servers.iter().any(reaches) {
                counts[0] += workload.members.len();
            }
        }
        for (namespace, [cut, all, planned]) in cut.into_iter().filter(|(_, [cut, ..])| *cut > 0) {
            let pods = super::many(cut, all, if planned > 0 { "workload" } else { "pod" });
            let services = SERVICES.each_ref().map(|service| service.name).join(", ");
            let message = format!(
                "namespace {namespace}: {pods} cannot look up names: UDP to {services} and NodeLocal DNSCache is denied"
            );
            let about = About::Namespace(namespace.clone());
            findings.push(Finding { check: DNS_CUT, cluster: Some(name.clone()), about, message });
        }
    }
    findings
}

fn service_of(id: &EndpointId, endpoint: &Endpoint) -> Option<&'static Service> {
    SERVICES.iter().find(|service| service.has(id, endpoint))
}

fn assumed(service: &Service) -> (EndpointId, Endpoint) {
    let id = EndpointId {
        kind: EndpointKind::Pod,
        namespace: Some(service.namespace.into()),
        name: format!("({})", service.name).into(),
    };
    let port = |name: &str, protocol| NamedPort { name: name.into(), protocol, port: service.port };
    let endpoint = Endpoint {
        labels: [(service.label.0.into(), service.label.1.into())].into(),
        addresses: ASSUMED.to_vec(),
        ports: vec![port("dns", UDP), port("dns-tcp", 6)],
        ..Endpoint::default()
    };
    (id, endpoint)
}

/// Every DNS server of a cluster that a pod may use, with its port.
fn servers(cluster: &ClusterName, workloads: &[Workload<'_>]) -> Vec<(End, u16)> {
    let mut servers = vec![(End { address: NODE_LOCAL, pod: None }, 53)];
    for workload in workloads {
        let (id, endpoint) = workload.members[0];
        let Some(service) = service_of(id, endpoint) else { continue };
        let ends = endpoint
            .addresses
            .iter()
            .map(|address| End { address: *address, pod: Some((cluster.clone(), id.clone())) });
        servers.extend(ends.map(|end| (end, service.port)));
    }
    servers
}

/// The addresses of a pod, or what is assumed where it does not run.
fn addresses<'e>(endpoint: &'e Endpoint, assumed: &'e [IpAddr]) -> &'e [IpAddr] {
    if endpoint.planned.is_some() { assumed } else { &endpoint.addresses }
}
