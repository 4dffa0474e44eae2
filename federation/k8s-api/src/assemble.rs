//! The objects of one cluster, or of the federation, into inventory and policies.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::inventory::{Cluster, Endpoint, EndpointId, Labels, Namespace};
use hanse_policy::model::{ClusterName, ClusterScope, Layer, Phase};

use crate::calico::Converted;
use crate::field::{Errors, FieldError};
use crate::hanse::{ClusterLabels, FederatedNetworkPolicy, Member};
use crate::kubernetes::{EndpointSlice, Node as KubeNode, Service, ServiceAccount, parse_address};
use crate::manifest::{Diagnostic, Manifest, Object};
use crate::metadata::check_metadata;

/// The label that the API server gives every namespace.
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// A node, as far as rule sets need it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeInfo {
    pub labels: Labels,
    pub addresses: Vec<IpAddr>,
    pub pod_ranges: Vec<ipnet::IpNet>,
}

/// One cluster's own state.
#[derive(Debug, Clone, Default)]
pub struct ClusterState {
    pub cluster: Cluster,
    pub layer: Layer,
    pub nodes: BTreeMap<Arc<str>, NodeInfo>,
    /// The services that have an address of their own, by namespace and name.
    pub service_addresses: BTreeMap<IpAddr, (Arc<str>, Arc<str>)>,
    /// Objects that were left out, and why.
    pub diagnostics: Vec<Diagnostic>,
}

/// What is written for the whole ClusterSet.
#[derive(Debug, Clone, Default)]
pub struct Federation {
    pub layer: Layer,
    pub sets: BTreeMap<EndpointId, Endpoint>,
    pub members: BTreeMap<ClusterName, Member>,
    pub diagnostics: Vec<Diagnostic>,
}

/// The objects that were met, by the key that an API server has them under.
#[derive(Debug, Default)]
struct Seen<'m>(HashMap<(&'m str, &'m str, Option<&'m str>, &'m str), &'m Manifest>);

impl<'m> Seen<'m> {
    /// What is said of an object whose key another had before it.
    fn twice(&mut self, manifest: &'m Manifest) -> Option<Diagnostic> {
        let reference = &manifest.reference;
        // The two API groups of Calico name the same objects.
        let group = match reference.api_version.as_str() {
            crate::calico::CRD_API_VERSION => crate::calico::API_VERSION,
            other => other,
        };
        let namespace = match &manifest.object {
            Object::Namespace(_)
            | Object::Node(_)
            | Object::ClusterNetworkPolicy(_)
            | Object::FederatedNetworkPolicy(_)
            | Object::Tier(_)
            | Object::FederatedNetworkSet(_)
            | Object::MemberCluster(_) => None,
            Object::ServiceAccount(_)
            | Object::Pod(_)
            | Object::Service(_)
            | Object::EndpointSlice(_)
            | Object::NetworkPolicy(_)
            | Object::Calico(_) => Some(reference.namespace.as_deref().unwrap_or("default")),
        };
        // And one may store them under another name.
        let name = match &manifest.object {
            Object::Calico(object) => &object.metadata().name,
            _ => &reference.name,
        };
        match self.0.entry((group, &reference.kind, namespace, name)) {
            Entry::Vacant(entry) => {
                entry.insert(manifest);
                None
            }
            Entry::Occupied(first) => {
                let place = &first.get().place;
                let message = format!("stands already at {}:{}, which counts", place.file, place.line);
                Some(diagnostic(manifest, "metadata.name", message))
            }
        }
    }
}

/// What is said of every object whose key another had before it, in their order.
pub fn doubles(objects: &[Manifest]) -> Vec<Diagnostic> {
    let mut seen = Seen::default();
    objects.iter().filter_map(|manifest| seen.twice(manifest)).collect()
}

/// What is wrong with an object by itself.
pub fn validate(object: &Object) -> Vec<FieldError> {
    let mut errors = Errors::default();
    let cluster: ClusterName = "cluster".into();
    match object {
        Object::NetworkPolicy(policy) => drop(policy.convert(&cluster, &mut errors)),
        Object::ClusterNetworkPolicy(policy) => drop(policy.convert(&cluster, &BTreeMap::new(), &mut errors)),
        Object::Calico(object) => drop(object.convert(&cluster, &mut errors)),
        Object::FederatedNetworkPolicy(policy) => {
            drop(policy.convert(&ClusterLabels::new(), &BTreeMap::new(), &mut errors));
        }
        Object::Tier(tier) => drop(tier.convert(&mut errors)),
        Object::FederatedNetworkSet(set) => drop(set.convert(&mut errors)),
        Object::MemberCluster(member) => drop(member.convert(&mut errors)),
        Object::Namespace(namespace) => namespace.check(&mut errors),
        Object::Pod(pod) => pod.check(&mut errors),
        Object::Node(KubeNode { metadata, .. })
        | Object::ServiceAccount(ServiceAccount { metadata })
        | Object::Service(Service { metadata, .. })
        | Object::EndpointSlice(EndpointSlice { metadata, .. }) => check_metadata(metadata, &mut errors),
    }
    errors.0
}

/// The inventory and the policies of the cluster `name`. Objects of the federation among them are left out with a
/// diagnostic; of two objects with one key the first in the order of the files counts.
pub fn assemble_cluster<'a>(
    name: &ClusterName,
    objects: impl IntoIterator<Item = &'a Manifest> + Clone,
) -> ClusterState {
    let mut state = ClusterState::default();
    for manifest in objects.clone() {
        if let Object::Node(node) = &manifest.object {
            let labels = node.metadata.labels.clone();
            let info = NodeInfo { labels, addresses: node.addresses(), pod_ranges: node.pod_ranges() };
            state.nodes.entry(node.metadata.name.as_str().into()).or_insert(info);
        }
    }
    let mut seen = Seen::default();
    let mut created = BTreeMap::new();
    for manifest in objects {
        if let Some(twice) = seen.twice(manifest) {
            state.diagnostics.push(twice);
            continue;
        }
        if let Object::Pod(pod) = &manifest.object {
            created.insert(pod.id(), pod.metadata.creation_timestamp.clone());
        }
        add_to_cluster(name, manifest, &mut state);
    }
    settle_addresses(&mut state.cluster, &created);
    let implied: BTreeSet<Arc<str>> =
        state.cluster.endpoints.keys().filter_map(|endpoint| endpoint.namespace.clone()).collect();
    for namespace in implied {
        state.cluster.namespaces.entry(namespace).or_default();
    }
    for (name, namespace) in &mut state.cluster.namespaces {
        namespace.labels.insert(NAMESPACE_NAME_LABEL.into(), name.clone());
    }
    state
}

/// An address belongs to one live pod, the newest; of equally old ones to the first by name.
fn settle_addresses(cluster: &mut Cluster, created: &BTreeMap<EndpointId, Option<Arc<str>>>) {
    let mut owners: BTreeMap<IpAddr, EndpointId> = BTreeMap::new();
    for (id, endpoint) in &cluster.endpoints {
        for address in &endpoint.addresses {
            // RFC 3339 in UTC, as API servers write it, sorts as text.
            let newer = |owner: &EndpointId| created.get(id) > created.get(owner);
            if owners.get(address).is_none_or(newer) {
                owners.insert(*address, id.clone());
            }
        }
    }
    for (id, endpoint) in &mut cluster.endpoints {
        endpoint.addresses.retain(|address| owners.get(address) == Some(id));
    }
}

fn add_to_cluster(name: &ClusterName, manifest: &Manifest, state: &mut ClusterState) {
    let cluster = &mut state.cluster;
    // Errors were found when the object was read.
    let mut errors = Errors::default();
    match &manifest.object {
        Object::Namespace(namespace) => {
            let labels = namespace.metadata.labels.clone();
            cluster.namespaces.insert(namespace.metadata.name.as_str().into(), Namespace { labels });
        }
        Object::Node(_) => {}
        Object::ServiceAccount(account) => {
            let key = (account.metadata.namespace(), account.metadata.name.as_str().into());
            cluster.service_accounts.insert(key, account.metadata.labels.clone());
        }
        Object::Pod(pod) => {
            let node = pod.spec.node_name.as_ref().and_then(|node| state.nodes.get(node));
            let endpoint = pod.endpoint(node.map_or(&[], |node| &node.addresses));
            cluster.endpoints.insert(pod.id(), endpoint);
        }
        Object::Service(service) => {
            let key: (_, Arc<str>) = (service.metadata.namespace(), service.metadata.name.as_str().into());
            if let Some(address) = service.spec.cluster_ip.as_deref().and_then(parse_address) {
                state.service_addresses.insert(address, key.clone());
            }
            cluster.services.entry(key).or_default();
        }
        Object::EndpointSlice(slice) => {
            if let Some(key) = slice.service() {
                let service = cluster.services.entry(key).or_default();
                service.addresses.extend(slice.addresses());
                service.backends.extend(slice.backends());
            }
        }
        Object::NetworkPolicy(policy) => {
            let policy = policy.convert(name, &mut errors);
            state.layer.policies.insert(policy.id.clone(), policy);
        }
        Object::ClusterNetworkPolicy(policy) => {
            let policy = policy.convert(name, &state.nodes, &mut errors);
            state.layer.policies.insert(policy.id.clone(), policy);
        }
        Object::Calico(object) => match object.convert(name, &mut errors) {
            Converted::Tier(tier) => drop(state.layer.tiers.insert(tier.id.clone(), tier)),
            Converted::Policy(policy) => drop(state.layer.policies.insert(policy.id.clone(), *policy)),
            Converted::NetworkSet(id, set) => drop(cluster.endpoints.insert(id, *set)),
        },
        Object::FederatedNetworkPolicy(_)
        | Object::Tier(_)
        | Object::FederatedNetworkSet(_)
        | Object::MemberCluster(_) => {
            let message = "belongs to the federation: apply it at the hub, or give it with --federation";
            state.diagnostics.push(diagnostic(manifest, "kind", message.to_owned()));
        }
    }
}

/// What the federation says. `clusters`: every cluster that takes part, with a MemberCluster or without.
pub fn assemble_federation<'a>(
    objects: impl IntoIterator<Item = &'a Manifest> + Clone,
    clusters: impl IntoIterator<Item = ClusterName>,
) -> Federation {
    let mut federation = Federation::default();
    let mut seen = Seen::default();
    let mut policies: Vec<(&Manifest, &FederatedNetworkPolicy)> = Vec::new();
    // Errors were found when the object was read.
    let mut errors = Errors::default();
    for manifest in objects {
        if let Some(twice) = seen.twice(manifest) {
            federation.diagnostics.push(twice);
            continue;
        }
        match &manifest.object {
            Object::Tier(tier) => {
                let tier = tier.convert(&mut errors);
                federation.layer.tiers.insert(tier.id.clone(), tier);
            }
            Object::FederatedNetworkSet(set) => {
                let (id, endpoint) = set.convert(&mut errors);
                federation.sets.insert(id, endpoint);
            }
            Object::MemberCluster(member) => {
                let member = member.convert(&mut errors);
                federation.members.insert(member.name.clone(), member);
            }
            Object::FederatedNetworkPolicy(policy) => policies.push((manifest, policy)),
            _ => {
                let message = "belongs to a cluster: the federation has FederatedNetworkPolicy, Tier, \
                               FederatedNetworkSet and MemberCluster";
                federation.diagnostics.push(diagnostic(manifest, "kind", message.to_owned()));
            }
        }
    }
    let mut labels: ClusterLabels =
        federation.members.values().map(|member| (member.name.clone(), member.labels.clone())).collect();
    for cluster in clusters {
        labels.entry(cluster).or_default();
    }
    let phases: BTreeMap<Arc<str>, Phase> =
        federation.layer.tiers.keys().map(|tier| (tier.name.clone(), tier.phase)).collect();
    for (manifest, policy) in policies {
        let policy = policy.convert(&labels, &phases, &mut errors);
        if !phases.contains_key(&policy.tier.name) {
            let message =
                format!("no Tier is called \"{}\": the policy stands in a Guard tier at the end", policy.tier.name);
            federation.diagnostics.push(diagnostic(manifest, "spec.tier", message));
        }
        if matches!(&policy.enforcers, ClusterScope::Named(names) if names.is_empty()) {
            let message = "selects no cluster: nobody enforces the policy".to_owned();
            federation.diagnostics.push(diagnostic(manifest, "spec.clusterSelector", message));
        }
        federation.layer.policies.insert(policy.id.clone(), policy);
    }
    federation
}

fn diagnostic(manifest: &Manifest, field: &str, message: String) -> Diagnostic {
    Diagnostic {
        place: manifest.place.clone(),
        field: field.to_owned(),
        message,
        object: Some(manifest.reference.clone()),
        start: manifest.place.line,
    }
}
