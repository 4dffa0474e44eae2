//! The objects of one cluster, or of the federation, into inventory and policies.

mod cluster;
pub mod planned;
pub mod rivals;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use hanse_policy::evaluate::Direction;
use hanse_policy::inventory::{Endpoint, EndpointId};
use hanse_policy::model::{ClusterName, ClusterScope, Layer, Phase, PolicyId, TierId};
use ipnet::IpNet;

pub use self::cluster::{Assembly, Changed, ClusterState, NAMESPACE_NAME_LABEL, NodeInfo, assemble_cluster};
use crate::calico::{CalicoObject, Converted};
use crate::field::{Errors, FieldError};
use crate::hanse::{ClusterLabels, FederatedNetworkPolicy, Member};
use crate::kubernetes::ServiceAccount;
use crate::manifest::{Diagnostic, Manifest, Object, Place, Reference};
use crate::metadata::check_metadata;

/// What is written for the whole ClusterSet.
#[derive(Debug, Clone, Default)]
pub struct Federation {
    pub layer: Layer,
    pub sets: BTreeMap<EndpointId, Endpoint>,
    pub members: BTreeMap<ClusterName, Member>,
    /// Policies that are not in force because no object defines their tier.
    pub without_tier: Vec<(PolicyId, TierId)>,
    pub diagnostics: Vec<Diagnostic>,
}

/// The key that an API server has an object under.
fn key_of(manifest: &Manifest) -> Reference {
    let reference = &manifest.reference;
    let api_version = match reference.api_version.as_str() {
        // The two API groups of Calico name the same objects.
        crate::calico::CRD_API_VERSION => crate::calico::API_VERSION,
        other => other,
    };
    let is_namespaced = manifest.object.is_namespaced();
    let namespace = is_namespaced.then(|| reference.namespace.as_deref().unwrap_or("default").to_owned());
    // And one may store them under another name.
    let name = match &manifest.object {
        Object::Calico(object) => &object.metadata().name,
        _ => &reference.name,
    };
    Reference { api_version: api_version.to_owned(), kind: reference.kind.clone(), namespace, name: name.clone() }
}

/// The diagnostic of an object whose key another one had before it.
fn duplicate(manifest: &Manifest, first: &Place) -> Diagnostic {
    let message = format!("duplicate of {}:{}; the first one counts", first.file, first.line);
    diagnostic(manifest, "metadata.name", message)
}

/// What is said of MemberClusters with a net that overlaps with one that another was granted before it: an address belongs to
/// one cluster.
pub fn overlapping_grants(objects: &[Manifest]) -> Vec<Diagnostic> {
    let mut errors = Errors::default();
    let mut granted: Vec<(IpNet, Arc<str>)> = Vec::new();
    let mut found = Vec::new();
    for manifest in objects {
        let Object::MemberCluster(member) = &manifest.object else { continue };
        let member = member.convert(&mut errors);
        for net in &member.grants.cidrs {
            let overlaps =
                |(other, of): &&(IpNet, Arc<str>)| *of != member.name && (other.contains(net) || net.contains(other));
            if let Some((other, of)) = granted.iter().find(overlaps) {
                let message = format!("{net} overlaps with {other}, which is granted to the cluster {of}");
                found.push(diagnostic(manifest, "spec.grants.cidrs", message));
            }
        }
        granted.extend(member.grants.cidrs.into_iter().map(|net| (net, Arc::clone(&member.name))));
    }
    found
}

/// The diagnostics of all objects whose key another one had before them, in their order.
pub fn duplicates(objects: &[Manifest]) -> Vec<Diagnostic> {
    let mut seen = Seen::default();
    objects.iter().filter_map(|manifest| seen.twice(manifest)).collect()
}

/// Where each key was met first.
#[derive(Debug, Default)]
struct Seen<'m>(HashMap<Reference, &'m Place>);

impl<'m> Seen<'m> {
    fn twice(&mut self, manifest: &'m Manifest) -> Option<Diagnostic> {
        match self.0.entry(key_of(manifest)) {
            Entry::Vacant(entry) => {
                entry.insert(&manifest.place);
                None
            }
            Entry::Occupied(first) => Some(duplicate(manifest, first.get())),
        }
    }
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
        Object::Node(node) => node.check(&mut errors),
        Object::Service(service) => service.check(&mut errors),
        Object::EndpointSlice(slice) => slice.check(&mut errors),
        Object::ServiceAccount(ServiceAccount { metadata }) => check_metadata(metadata, &mut errors),
    }
    errors.0
}

/// The directions of which a policy has rules that its types leave out, so that they are in no policy of the model; with the field
/// that lists its directions.
pub fn rules_left_out(object: &Object, cluster: &ClusterName) -> Vec<(PolicyId, Direction, &'static str)> {
    let mut errors = Errors::default();
    let (policy, ingress, egress, field) = match object {
        Object::NetworkPolicy(it) => {
            let policy = it.convert(cluster, &mut errors);
            (policy, it.spec.ingress.is_empty(), it.spec.egress.is_empty(), "policyTypes")
        }
        Object::FederatedNetworkPolicy(it) => {
            let policy = it.convert(&ClusterLabels::new(), &BTreeMap::new(), &mut errors);
            (policy, it.spec.ingress.is_empty(), it.spec.egress.is_empty(), "types")
        }
        Object::Calico(object) => {
            let (ingress, egress, field) = match &**object {
                CalicoObject::Policy(_, it) => (it.spec.ingress.is_empty(), it.spec.egress.is_empty(), "types"),
                CalicoObject::StagedKubernetes(it) => {
                    (it.spec.ingress.is_empty(), it.spec.egress.is_empty(), "policyTypes")
                }
                CalicoObject::Tier(_) | CalicoObject::NetworkSet { .. } => return Vec::new(),
            };
            match object.convert(cluster, &mut errors) {
                Converted::Policy(policy) => (*policy, ingress, egress, field),
                Converted::Tier(_) | Converted::NetworkSet(..) => return Vec::new(),
            }
        }
        _ => return Vec::new(),
    };
    let directions = [
        (Direction::Ingress, !ingress && policy.ingress.is_none()),
        (Direction::Egress, !egress && policy.egress.is_none()),
    ];
    let left_out = directions.into_iter().filter(|(_, is_left_out)| *is_left_out);
    left_out.map(|(direction, _)| (policy.id.clone(), direction, field)).collect()
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
            federation.diagnostics.push(without_tier(manifest, &policy.tier.name));
            federation.without_tier.push((policy.id, policy.tier));
            continue;
        }
        if matches!(&policy.enforcers, ClusterScope::Named(names) if names.is_empty()) {
            let message = "selects no cluster: the policy is not enforced anywhere".to_owned();
            federation.diagnostics.push(diagnostic(manifest, "spec.clusterSelector", message));
        }
        federation.layer.policies.insert(policy.id.clone(), policy);
    }
    federation
}

/// What is said of the federated policies among `objects` whose tier is not.
pub fn without_tiers(objects: &[Manifest]) -> Vec<Diagnostic> {
    let tier = |manifest: &Manifest| match &manifest.object {
        Object::Tier(tier) => Some(tier.metadata.name.clone()),
        _ => None,
    };
    let tiers: BTreeSet<String> = objects.iter().filter_map(tier).collect();
    let missing = |manifest: &Manifest| match &manifest.object {
        Object::FederatedNetworkPolicy(policy) if !tiers.contains(&policy.spec.tier) => {
            Some(without_tier(manifest, &policy.spec.tier))
        }
        _ => None,
    };
    objects.iter().filter_map(missing).collect()
}

fn without_tier(manifest: &Manifest, tier: &str) -> Diagnostic {
    let message = format!("no Tier \"{tier}\" is among these objects: without one the policy is not in force");
    diagnostic(manifest, "spec.tier", message)
}

fn diagnostic(manifest: &Manifest, field: &str, message: String) -> Diagnostic {
    diagnostic_of(&manifest.place, &manifest.reference, field, message)
}

fn diagnostic_of(place: &Place, object: &Reference, field: &str, message: String) -> Diagnostic {
    Diagnostic {
        place: place.clone(),
        field: field.to_owned(),
        message,
        object: Some(object.clone()),
        start: place.line,
        not_object: None,
    }
}
