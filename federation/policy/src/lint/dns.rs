//! Finds pods that cannot reach DNS because of a default deny, the most frequent mistake with a first policy.
//!
//! The manifest of a pod does not contain its DNS server, so all DNS servers of the cluster are evaluated; a finding means that the pod
//! can reach none of them. The DNS servers are the pods and Services of kube-dns (including CoreDNS, which has the same label) and of
//! OpenShift, and NodeLocal DNSCache, which replaces the others on each node. If the manifests contain none of these, each of them is
//! assumed. A policy of the cluster with the address of NodeLocal DNSCache means that it exists.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use crate::evaluate::{End, Query, Verdict, View};
use crate::inventory::{Backend, Cluster, EffectiveLabels, Endpoint, EndpointId, EndpointKind, Inventory, NamedPort};
use crate::model::{ClusterName, PolicySet, Selection};
use crate::prepared::Prepared;
use crate::tri::Tri;
use crate::workload::{Workload, relevant_keys, workloads};

use super::check::{About, DNS_CUT, Finding};
use super::facts::many;
use super::services::{DNS_PORT, has_node_cache};

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

    fn has_pods(&self, cluster: &Cluster) -> bool {
        cluster.endpoints.iter().any(|(id, endpoint)| self.has(id, endpoint))
    }

    /// The pods and addresses behind the Services that answer for DNS in its namespace, each with its port. `None`: there is
    /// no such Service.
    fn backends<'c>(&self, cluster: &'c Cluster) -> Option<Vec<&'c (Backend, u16)>> {
        let own = cluster.services.iter().filter(|((namespace, _), _)| **namespace == *self.namespace);
        let ports = own.filter_map(|(_, service)| service.front.as_ref()).flat_map(|front| &front.ports);
        let mut ports = ports.filter(|port| (port.port, port.protocol) == (DNS_PORT, UDP)).peekable();
        ports.peek().is_some().then(|| ports.flat_map(|port| &port.backends).collect())
    }

    /// Adds a pod of this service, with its namespace.
    fn assume(&self, cluster: &mut Cluster) {
        let (id, endpoint) = assumed(self);
        let namespace = cluster.namespaces.entry(self.namespace.into()).or_default();
        let name = "kubernetes.io/metadata.name".into();
        namespace.labels.entry(name).or_insert_with(|| self.namespace.into());
        cluster.endpoints.insert(id, endpoint);
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

const NODE_CACHE: &str = "NodeLocal DNSCache";
/// The addresses on which NodeLocal DNSCache answers on every node: as Kubernetes documents it, and as Kubespray installs it.
const NODE_LOCAL: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(169, 254, 20, 10)), IpAddr::V4(Ipv4Addr::new(169, 254, 25, 10))];
const LINK_LOCAL: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16));
/// What DNS pods and others have for addresses where none is known: reserved for documentation, so that no policy means them.
const ASSUMED: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 53)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53))];
const ASSUMED_OWN: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
const UDP: u8 = 17;
const SOURCE_PORT: u16 = 40_000;

/// The DNS servers that clusters have although none is among their pods here, each in a cluster with nothing else.
pub fn assumed_servers(inventory: &Inventory) -> BTreeMap<ClusterName, Cluster> {
    let with_servers = |cluster: &Cluster| {
        let namespaces = SERVICES.iter().filter_map(|service| cluster.namespaces.get_key_value(service.namespace));
        let namespaces = namespaces.map(|(name, namespace)| (name.clone(), namespace.clone())).collect();
        let (labels, label_grant) = (cluster.labels.clone(), cluster.label_grant.clone());
        let mut servers = Cluster { labels, label_grant, stale: cluster.stale, namespaces, ..Cluster::default() };
        missing(cluster).for_each(|service| service.assume(&mut servers));
        servers
    };
    let clusters = inventory.clusters.iter().filter(|(_, cluster)| missing(cluster).next().is_some());
    clusters.map(|(name, cluster)| (name.clone(), with_servers(cluster))).collect()
}

/// The services of which a cluster must have pods that are not here: those that a Service object speaks of, or any where
/// nothing is known of the cluster's DNS.
fn missing(cluster: &Cluster) -> impl Iterator<Item = &'static Service> {
    let is_known = is_known(cluster);
    SERVICES.iter().filter(move |service| match service.backends(cluster) {
        Some(backends) => backends.is_empty() && !service.has_pods(cluster),
        None => !is_known,
    })
}

/// Whether the cluster's DNS is known.
fn is_known(cluster: &Cluster) -> bool {
    has_node_cache(cluster)
        || SERVICES.iter().any(|service| service.has_pods(cluster) || service.backends(cluster).is_some())
}

/// Whether a policy of the cluster itself has a rule for the address of NodeLocal DNSCache.
fn names_cache(policies: &PolicySet, cluster: &ClusterName) -> bool {
    let own = policies.clusters.get(cluster).into_iter().flat_map(|layer| layer.policies.values());
    let mut nets = own.filter_map(|policy| policy.egress.as_ref()).flatten().flat_map(|rule| &rule.destination.nets);
    nets.any(|net| LINK_LOCAL.contains(net) && NODE_LOCAL.iter().any(|address| net.contains(address)))
}

/// Whether a selection is for a DNS server as a distribution installs it, which the clusters that are read may lack.
pub fn is_of_usual_server(selection: &Selection) -> bool {
    SERVICES.iter().any(|service| {
        let mut cluster = Cluster::default();
        service.assume(&mut cluster);
        cluster.endpoints.iter().any(|(id, endpoint)| {
            let labels = EffectiveLabels { cluster: &cluster, id, endpoint, first_hand: true };
            selection.selector.evaluate(&labels) == Tri::Yes
        })
    })
}

/// Namespaces with pods that cannot reach any DNS server.
pub fn cut_off(policies: &PolicySet, inventory: &Inventory) -> Vec<Finding> {
    let mut inventory = inventory.clone();
    let mut cached = BTreeSet::new();
    for (name, cluster) in &mut inventory.clusters {
        let may_have_cache = !is_known(cluster) || names_cache(policies, name);
        cached.extend(may_have_cache.then(|| name.clone()));
        let missing: Vec<&Service> = missing(cluster).collect();
        missing.into_iter().for_each(|service| service.assume(cluster));
    }
    let prepared = Prepared::new(policies, &inventory, View::Enforced);
    let mut findings = Vec::new();
    for (name, workloads) in workloads(&inventory, &relevant_keys([policies])) {
        let servers = servers(name, &inventory.clusters[name], &workloads, cached.contains(name));
        let mut tried: Vec<&str> = servers.iter().map(|server| server.name).collect();
        tried.dedup();
        let tried = tried.join(", ");
        // Of each namespace, how many pods are cut off, how many there are, and how many of them do not run.
        let mut cut: BTreeMap<&Arc<str>, [usize; 3]> = BTreeMap::new();
        for workload in &workloads {
            let (id, endpoint) = workload.members[0];
            let (EndpointKind::Pod, Some(namespace)) = (id.kind, &id.namespace) else { continue };
            if service_of(id, endpoint).is_some() || !endpoint.is_reachable() {
                continue;
            }
            let addresses = addresses(endpoint, &ASSUMED_OWN);
            let own_address =
                |server: &Server| addresses.iter().find(|it| it.is_ipv4() == server.end.address.is_ipv4());
            let query = |(server, address): (&Server, &IpAddr)| Query {
                source: End { address: *address, pod: Some((name.clone(), id.clone())) },
                destination: server.end.clone(),
                protocol: UDP,
                source_port: SOURCE_PORT,
                destination_port: server.port,
                icmp: None,
            };
            let reachable = servers.iter().filter_map(|server| Some((server, own_address(server)?)));
            let mut verdicts = reachable.map(|it| prepared.evaluate(&query(it)).verdict).peekable();
            let counts = cut.entry(namespace).or_default();
            counts[1] += workload.members.len();
            counts[2] += if endpoint.planned.is_some() { workload.members.len() } else { 0 };
            if verdicts.peek().is_some() && verdicts.all(|verdict| verdict == Verdict::Deny) {
                counts[0] += workload.members.len();
            }
        }
        for (namespace, [cut, all, planned]) in cut.into_iter().filter(|(_, [cut, ..])| *cut > 0) {
            let pods = many(cut, all, if planned > 0 { "workload" } else { "pod" });
            let message = format!("namespace {namespace}: {pods} cannot resolve names: UDP to {tried} is denied");
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

/// A DNS server that pods may use.
struct Server {
    end: End,
    port: u16,
    name: &'static str,
}

/// The DNS servers that pods of a cluster may use, one pod per workload. `may_have_cache`: a node-local cache may exist as well.
fn servers(cluster: &ClusterName, owner: &Cluster, workloads: &[Workload<'_>], may_have_cache: bool) -> Vec<Server> {
    let outside = |address, port, name| Server { end: End { address, pod: None }, port, name };
    let caches = NODE_LOCAL.map(|address| outside(address, DNS_PORT, NODE_CACHE));
    if has_node_cache(owner) {
        // It answers in place of the others, at the addresses of their Services too.
        let fronts = owner.services.values().filter_map(|service| service.front.as_ref());
        let of_dns = fronts.filter(|front| front.ports.iter().any(|port| port.port == DNS_PORT));
        let addresses = of_dns.flat_map(|front| &front.addresses);
        return caches.into_iter().chain(addresses.map(|it| outside(*it, DNS_PORT, NODE_CACHE))).collect();
    }
    let owned = owner.endpoints.iter().flat_map(|(id, pod)| pod.addresses.iter().map(move |address| (*address, id)));
    let owners: HashMap<IpAddr, &EndpointId> = owned.collect();
    let mut servers = Vec::new();
    for service in &SERVICES {
        let backends = service.backends(owner).unwrap_or_default();
        let mut ports: HashMap<&EndpointId, u16> = HashMap::new();
        if backends.is_empty() {
            let own = owner.endpoints.iter().filter(|(id, endpoint)| service.has(id, endpoint));
            ports.extend(own.map(|(id, _)| (id, service.port)));
        }
        for (backend, port) in backends {
            let pod = match backend {
                Backend::Pod(id) => Some(id),
                Backend::Address(address) => owners.get(address).copied(),
            };
            match (pod, backend) {
                (Some(id), _) => drop(ports.insert(id, *port)),
                (None, Backend::Address(address)) => servers.push(outside(*address, *port, service.name)),
                (None, Backend::Pod(_)) => {}
            }
        }
        for workload in workloads {
            let server = workload.members.iter().find_map(|(id, pod)| Some((*id, *pod, *ports.get(id)?)));
            let Some((id, pod, port)) = server else { continue };
            servers.extend(addresses(pod, &ASSUMED).iter().map(|address| {
                let end = End { address: *address, pod: Some((cluster.clone(), id.clone())) };
                Server { end, port, name: service.name }
            }));
        }
    }
    servers.extend(caches.into_iter().filter(|_| may_have_cache));
    servers
}

/// The addresses of a pod, or what is assumed where it does not run.
fn addresses<'e>(endpoint: &'e Endpoint, assumed: &'e [IpAddr]) -> &'e [IpAddr] {
    if endpoint.planned.is_some() { assumed } else { &endpoint.addresses }
}
