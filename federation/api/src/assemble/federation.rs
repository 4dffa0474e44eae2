//! The federation's objects: tiers, policies, sets and the members' grants.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_policy::inventory::{Endpoint, EndpointId};
use hanse_policy::model::{ClusterName, ClusterScope, Layer, Phase, PolicyId, TierId};
use ipnet::IpNet;

use super::duplicates::{Seen, diagnostic};
use crate::clusters::ClusterLabels;
use crate::diagnostic::Diagnostic;
use crate::hanse::Member;
use crate::manifest::Manifest;
use crate::object::Object;
use crate::policy::FederatedPolicy;

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

/// What the federation says. `clusters`: every cluster that takes part, with a MemberCluster or without.
pub fn assemble_federation<'a>(
    objects: impl IntoIterator<Item = &'a Manifest> + Clone,
    clusters: impl IntoIterator<Item = ClusterName>,
) -> Federation {
    let mut federation = Federation::default();
    let mut seen = Seen::default();
    let mut policies: Vec<(&Manifest, &FederatedPolicy)> = Vec::new();
    for manifest in objects {
        if let Some(twice) = seen.twice(manifest) {
            federation.diagnostics.push(twice);
            continue;
        }
        match &manifest.object {
            Object::FederatedTier(tier) => {
                federation.layer.tiers.insert(tier.id.clone(), tier.clone());
            }
            Object::FederatedNetworkSet(id, set) => {
                federation.sets.insert(id.clone(), Endpoint::clone(set));
            }
            Object::Member(member) => {
                federation.members.insert(member.name.clone(), Member::clone(member));
            }
            Object::FederatedPolicy(policy) => policies.push((manifest, policy)),
            // They change no verdict.
            Object::ClusterSet(_) | Object::ClusterJoinToken(_) => {}
            _ => {
                let message = "belongs to a cluster: the federation has FederatedNetworkPolicy, \
                               StagedFederatedNetworkPolicy, Tier, FederatedNetworkSet and MemberCluster";
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
        let policy = policy.among(&labels, &phases);
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

/// Diagnostics of the federated policies among `objects` whose tier is missing.
pub fn without_tiers<'m>(objects: &'m [Manifest]) -> Vec<Diagnostic> {
    let tier = |manifest: &'m Manifest| match &manifest.object {
        Object::FederatedTier(tier) => Some(&tier.id.name),
        _ => None,
    };
    let tiers: BTreeSet<&Arc<str>> = objects.iter().filter_map(tier).collect();
    let missing = |manifest: &Manifest| match &manifest.object {
        Object::FederatedPolicy(policy) if !tiers.contains(policy.tier()) => {
            Some(without_tier(manifest, policy.tier()))
        }
        _ => None,
    };
    objects.iter().filter_map(missing).collect()
}

fn without_tier(manifest: &Manifest, tier: &str) -> Diagnostic {
    let message = format!("Tier \"{tier}\" is not among these objects: without it the policy is not in force");
    diagnostic(manifest, "spec.tier", message)
}

/// Diagnostics of MemberClusters with a net that overlaps with one that another cluster was granted earlier: an address belongs to
/// one cluster.
pub fn overlapping_grants(objects: &[Manifest]) -> Vec<Diagnostic> {
    let mut granted: Vec<(IpNet, Arc<str>)> = Vec::new();
    let mut found = Vec::new();
    for manifest in objects {
        let Object::Member(member) = &manifest.object else { continue };
        for net in &member.grants.cidrs {
            let overlaps =
                |(other, of): &&(IpNet, Arc<str>)| *of != member.name && (other.contains(net) || net.contains(other));
            if let Some((other, of)) = granted.iter().find(overlaps) {
                let message = format!("{net} overlaps with {other}, which is granted to the cluster {of}");
                found.push(diagnostic(manifest, "spec.grants.cidrs", message));
            }
        }
        granted.extend(member.grants.cidrs.iter().map(|net| (*net, Arc::clone(&member.name))));
    }
    found
}
