//! Nets with the cluster IP of a Service. They match nothing, because policy is evaluated after the address is translated to that of a
//! backend.
//!
//! Exception: NodeLocal DNSCache serves the address of the DNS Service on the node itself, so packets to it keep that address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use crate::inventory::{Backend, Cluster, EndpointKind, Inventory, Service};
use crate::model::{ClusterName, EntityMatch, Policy, PolicyKind};
use crate::tri::Tri;

/// The host bits of the widest range from which API servers assign addresses to Services.
const MAX_RANGE_BITS: u8 = 20;
/// Ranges that are not wider than that, but usually mean all private addresses (RFC 1918).
const PRIVATE: [Ipv4Net; 2] =
    [Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12), Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16)];
pub(super) const DNS_PORT: u16 = 53;

/// Backends that are named.
const MAX_BACKENDS: usize = 3;

/// The clusters' addresses of Services.
pub(super) struct ServiceAddresses<'i>(BTreeMap<&'i ClusterName, (&'i Cluster, BTreeMap<IpAddr, ServiceName<'i>>)>);

/// Namespace and name.
type ServiceName<'i> = (&'i Arc<str>, &'i Arc<str>);

impl<'i> ServiceAddresses<'i> {
    pub(super) fn new(inventory: &'i Inventory) -> Self {
        let of_cluster = |cluster: &'i Cluster| {
            let has_cache = has_node_cache(cluster);
            let mut addresses = BTreeMap::new();
            for ((namespace, name), service) in &cluster.services {
                let Some(front) = &service.front else { continue };
                if !has_cache || front.ports.iter().all(|port| port.port != DNS_PORT) {
                    addresses.extend(front.addresses.iter().map(|address| (*address, (namespace, name))));
                }
            }
            addresses
        };
        Self(inventory.clusters.iter().map(|(name, cluster)| (name, (cluster, of_cluster(cluster)))).collect())
    }

    /// Of the nets of an end, and of the network sets that it selects, those that have no address but Services', for people.
    pub(super) fn nets_of_services(
        &self,
        policy: &Policy,
        entity: &EntityMatch,
        enforcers: &[&ClusterName],
    ) -> Vec<String> {
        // In each cluster that enforces the policy: a net may be something else in another.
        let of_service = |net: &IpNet| {
            let mut found = enforcers.iter().map(|name| self.service_of(name, net));
            let first = found.next()??;
            found.all(|it| it.is_some()).then_some(first)
        };
        let message = |net: &IpNet| {
            let (what, (namespace, name)) = of_service(net)?;
            let not_pods = enforcers.iter().find_map(|enforcer| {
                let (cluster, _) = self.0.get(*enforcer)?;
                not_pods(cluster, cluster.services.get(&(namespace.clone(), name.clone()))?)
            });
            let instead = match (policy.id.kind, &not_pods) {
                (
                    kind @ (PolicyKind::KubernetesNetworkPolicy
                    | PolicyKind::StagedKubernetesNetworkPolicy
                    | PolicyKind::ClusterNetworkPolicy),
                    Some(addresses),
                ) => addresses_instead(kind, addresses),
                (PolicyKind::KubernetesNetworkPolicy | PolicyKind::StagedKubernetesNetworkPolicy, None) => format!(
                    "a namespaceSelector with kubernetes.io/metadata.name: {namespace}, and a podSelector of its pods"
                ),
                (PolicyKind::ClusterNetworkPolicy, None) => format!("pods of namespace {namespace}"),
                _ => format!("services: {{name: {name}, namespace: {namespace}}}"),
            };
            Some(format!(
                "net {net} {what}, which is translated to a backend before policy is evaluated; write {instead}"
            ))
        };
        let mut messages: Vec<String> = entity.nets.iter().filter_map(message).collect();
        if let Some(selection) = &entity.selection {
            for enforcer in enforcers {
                let Some((cluster, _)) = self.0.get(*enforcer) else { continue };
                let sets = cluster.endpoints.iter().filter(|(id, _)| id.kind == EndpointKind::NetworkSet);
                let selected = sets.filter(|(id, set)| {
                    crate::inventory::selects(enforcer, selection, enforcer, cluster, id, set) == Tri::Yes
                });
                for (id, set) in selected {
                    let first = set.nets.iter().find_map(message);
                    messages.extend(first.map(|message| format!("network set {}: {message}", id.name)));
                }
            }
        }
        messages
    }

    /// What a net is that has Services' addresses and no others that are known, with the first of these Services.
    fn service_of(&self, cluster: &ClusterName, net: &IpNet) -> Option<(String, ServiceName<'i>)> {
        let (cluster, addresses) = self.0.get(cluster)?;
        let is_private = matches!(net, IpNet::V4(net) if PRIVATE.contains(net));
        if net.max_prefix_len() - net.prefix_len() > MAX_RANGE_BITS || is_private {
            return None;
        }
        let mut inside = addresses.range(net.network()..=net.broadcast());
        let (first, service) = inside.next()?;
        let others = inside.filter(|(_, it)| *it != service).count();
        let own = cluster.endpoints.values().flat_map(|it| it.addresses.iter().chain(&it.host_addresses));
        let backends = cluster.services.values().flat_map(|service| &service.addresses);
        if own.chain(backends).any(|address| net.contains(address)) {
            return None;
        }
        let (namespace, name) = service;
        let what = match others {
            0 if IpNet::from(*first) == *net => format!("is the cluster address of Service {namespace}/{name}"),
            0 => format!("has the cluster address {first} of Service {namespace}/{name} and no pod's"),
            _ => {
                format!("has the cluster addresses of {} Services ({namespace}/{name} first) and no pod's", others + 1)
            }
        };
        Some((what, *service))
    }
}

/// What NodeLocal DNSCache is labelled with: by Kubernetes, and by Kubespray.
const NODE_CACHES: [&str; 2] = ["node-local-dns", "nodelocaldns"];

pub(super) fn has_node_cache(cluster: &Cluster) -> bool {
    let labels = cluster.endpoints.values().filter_map(|it| it.labels.get("k8s-app"));
    labels.into_iter().any(|label| NODE_CACHES.contains(&&**label))
}

/// Addresses of a Service's backends with their ports, where none of them is a pod that policy can select.
fn not_pods(cluster: &Cluster, service: &Service) -> Option<BTreeSet<(IpAddr, u16)>> {
    let front = service.front.as_ref()?;
    let mut addresses = BTreeSet::new();
    for (backend, port) in front.ports.iter().flat_map(|port| &port.backends) {
        let Backend::Address(address) = backend else { return None };
        addresses.insert((*address, *port));
    }
    let is_pod = |(address, _): &(IpAddr, u16)| cluster.endpoints.values().any(|it| it.addresses.contains(address));
    let unknown = front.selects && addresses.is_empty();
    (!unknown && !addresses.iter().any(is_pod)).then_some(addresses)
}

/// What opens the way to such backends, for people.
fn addresses_instead(kind: PolicyKind, addresses: &BTreeSet<(IpAddr, u16)>) -> String {
    let field = if kind == PolicyKind::ClusterNetworkPolicy { "networks" } else { "an ipBlock" };
    let shown = addresses.iter().take(MAX_BACKENDS);
    let shown: Vec<String> =
        shown.map(|(address, port)| format!("{} and port {port}", IpNet::from(*address))).collect();
    match addresses.len().saturating_sub(MAX_BACKENDS) {
        _ if addresses.is_empty() => {
            format!("{field} with the addresses and ports of its EndpointSlices, since its backends are not pods")
        }
        0 => format!("{field} with {}, since its backends are not pods", shown.join("; ")),
        more => format!("{field} with {}; and {more} more, since its backends are not pods", shown.join("; ")),
    }
}
