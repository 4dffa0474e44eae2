//! What the federation says, from how its authors wrote it into policy, as it changes.
//!
//! A change costs what it touches: a tier that moves to another phase takes its policies along, everything else stands
//! alone. What cannot be read keeps the last version that could; a policy without one, which has fields or needs features that
//! are not known, is taken with the rules that they concern unknown. A policy whose tier is not there is not in force.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_api::assemble::Federation;
use hanse_api::manifest::{Manifest as Written, Manifests, Object, read_bytes};
use hanse_compiler::Update;
use hanse_policy::inventory::{EndpointId, EndpointKind};
use hanse_policy::model::{ClusterScope, Phase, Policy, PolicyId, PolicyKind, TierId};
use hanse_policy::selector::Selector;

use crate::exchange::model::{Manifest, ManifestKind};

/// The federation's objects in force.
#[derive(Debug, Default)]
pub struct Federated {
    policies: BTreeMap<Arc<str>, Manifest>,
    phases: BTreeMap<Arc<str>, Phase>,
    converted: Federation,
}

/// Whether an object can be read by this version.
///
/// # Errors
/// What is wrong, with the field.
pub fn readable(kind: ManifestKind, json: &[u8]) -> Result<(), String> {
    read(kind, json).map(drop)
}

fn read(kind: ManifestKind, json: &[u8]) -> Result<Object, String> {
    let mut read = read_any(json);
    if !read.diagnostics.is_empty() {
        let why = read.diagnostics.iter().map(|it| format!("{}: {}", it.field, it.message));
        return Err(why.collect::<Vec<_>>().join("; "));
    }
    let object = read.objects.pop().map(|it| it.object);
    let fits = matches!(
        (kind, &object),
        (ManifestKind::Policy, Some(Object::FederatedNetworkPolicy(_)))
            | (ManifestKind::Tier, Some(Object::Tier(_)))
            | (ManifestKind::NetworkSet, Some(Object::FederatedNetworkSet(_)))
    );
    object.filter(|_| fits).ok_or_else(|| "not of a kind that this version reads".to_owned())
}

fn read_any(json: &[u8]) -> Manifests {
    let mut read = Manifests::default();
    read_bytes(&"manifest".into(), json, &mut read);
    read
}

/// Whether a policy is read as it was written.
fn is_whole(manifest: &Manifest) -> bool {
    manifest.features.is_empty() && read(ManifestKind::Policy, &manifest.json).is_ok()
}

/// A policy, with what of it is not known.
fn written(manifest: &Manifest) -> Option<Written> {
    let mut read = read_any(&manifest.json);
    let mut written = read.objects.pop().or_else(|| read.in_doubt.pop())?;
    written.unknown.extend(manifest.features.iter().map(|feature| format!("the feature \"{feature}\"")));
    matches!(written.object, Object::FederatedNetworkPolicy(_)).then_some(written)
}

impl Federated {
    /// Everything in force.
    pub fn converted(&self) -> &Federation {
        &self.converted
    }

    /// Takes changes that count together; `None` is: gone.
    pub fn take(
        &mut self,
        changes: impl IntoIterator<Item = (ManifestKind, Arc<str>, Option<Manifest>)>,
    ) -> Vec<Update> {
        let mut updates = Vec::new();
        let (mut policies, mut moved) = (BTreeSet::new(), BTreeSet::new());
        for (kind, name, manifest) in changes {
            let object = match manifest.as_ref().map(|it| read(kind, &it.json)).transpose() {
                Ok(object) => object,
                Err(why) => {
                    let whole = self.policies.get(&name).is_some_and(is_whole);
                    let in_doubt =
                        manifest.as_ref().filter(|_| kind == ManifestKind::Policy && !whole).and_then(written);
                    if in_doubt.is_none() {
                        tracing::error!(object = %name, why, "a federated object cannot be read; its last version holds");
                        continue;
                    }
                    tracing::error!(object = %name, why, "a federated policy cannot be read: what is in doubt is closed");
                    None
                }
            };
            match (kind, object) {
                (ManifestKind::Policy, _) => {
                    match manifest {
                        Some(manifest) => drop(self.policies.insert(name.clone(), manifest)),
                        None => drop(self.policies.remove(&name)),
                    }
                    policies.insert(name);
                }
                (ManifestKind::Tier, object) => {
                    let tier = match object {
                        Some(Object::Tier(tier)) => Some(tier.convert(&mut Default::default())),
                        _ => None,
                    };
                    let phase = tier.as_ref().map(|tier| tier.id.phase);
                    let before = match phase {
                        Some(phase) => self.phases.insert(name.clone(), phase),
                        None => self.phases.remove(&name),
                    };
                    if before != phase {
                        moved.insert(name.clone());
                        if let Some(phase) = before {
                            let id = TierId { phase, name };
                            self.converted.layer.tiers.remove(&id);
                            updates.push(Update::RemoveTier(id));
                        }
                    }
                    if let Some(tier) = tier {
                        self.converted.layer.tiers.insert(tier.id.clone(), tier.clone());
                        updates.push(Update::Tier(tier));
                    }
                }
                (ManifestKind::NetworkSet, Some(Object::FederatedNetworkSet(set))) => {
                    let (id, endpoint) = set.convert(&mut Default::default());
                    self.converted.sets.insert(id.clone(), endpoint.clone());
                    updates.push(Update::Endpoint { cluster: None, id, endpoint });
                }
                (ManifestKind::NetworkSet, _) => {
                    let id = EndpointId { kind: EndpointKind::NetworkSet, namespace: None, name };
                    self.converted.sets.remove(&id);
                    updates.push(Update::RemoveEndpoint { cluster: None, id });
                }
            }
        }
        if !moved.is_empty() {
            let in_force = &self.converted.layer.policies;
            let along = in_force.values().filter(|policy| moved.contains(&policy.tier.name));
            policies.extend(along.map(|policy| policy.id.name.clone()));
            let known: BTreeSet<&Arc<str>> = in_force.keys().map(|id| &id.name).collect();
            policies.extend(self.policies.keys().filter(|name| !known.contains(name)).cloned());
        }
        for name in policies {
            let policy = self.policies.get(&name).and_then(|manifest| self.policy(manifest));
            updates.push(match policy {
                Some(policy) => {
                    self.converted.layer.policies.insert(policy.id.clone(), policy.clone());
                    Update::Policy(policy)
                }
                None => {
                    let kind = PolicyKind::FederatedNetworkPolicy;
                    let id = PolicyId { cluster: None, kind, namespace: None, name };
                    self.converted.layer.policies.remove(&id);
                    Update::RemovePolicy(id)
                }
            });
        }
        updates
    }

    fn policy(&self, manifest: &Manifest) -> Option<Policy> {
        let written = written(manifest)?;
        let Object::FederatedNetworkPolicy(policy) = &written.object else { return None };
        if !self.phases.contains_key(policy.spec.tier.as_str()) {
            tracing::error!(
                policy = policy.metadata.name,
                tier = policy.spec.tier,
                "a federated policy is not in force: its tier does not exist"
            );
            return None;
        }
        // The hub has resolved the selectors of clusters; everybody takes its word.
        let resolve = |selector: Option<&Selector>| match selector {
            None => ClusterScope::All,
            Some(selector) => {
                let same = |(text, _): &&(Arc<str>, _)| Selector::parse(text).is_ok_and(|it| it == *selector);
                let names = manifest.resolved.iter().find(same).map(|(_, names)| names.clone());
                ClusterScope::Named(names.unwrap_or_default())
            }
        };
        let mut policy = policy.convert_with(&resolve, &self.phases, &mut Default::default());
        policy.enforcers = ClusterScope::Named(manifest.enforcers.clone());
        written.doubt(&mut policy);
        Some(policy)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn manifest(kind: &str, name: &str, spec: serde_json::Value) -> Manifest {
        let json = json!({"apiVersion": "hanse.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec});
        Manifest {
            json: json.to_string().into(),
            enforcers: ["here".into()].into(),
            resolved: Vec::new(),
            features: Vec::new(),
        }
    }

    fn tier(phase: &str) -> Manifest {
        manifest("Tier", "t", json!({"phase": phase, "order": 1.0}))
    }

    fn with_tier() -> Federated {
        let mut federated = Federated::default();
        federated.take([(ManifestKind::Tier, "t".into(), Some(tier("Guard")))]);
        federated
    }

    fn policy(selector: &str) -> Manifest {
        let spec = json!({"tier": "t", "selector": selector, "types": ["Ingress"], "ingress": [{"action": "Deny"}]});
        manifest("FederatedNetworkPolicy", "p", spec)
    }

    fn set(net: &str) -> Manifest {
        manifest("FederatedNetworkSet", "s", json!({"nets": [net]}))
    }

    #[test]
    fn changes_one_by_one_come_to_the_same_as_all_at_once() {
        use ManifestKind::{NetworkSet, Policy, Tier};
        let steps = [
            vec![(Policy, "p", Some(policy("a == 'b'")))],
            vec![(Tier, "t", Some(tier("Baseline")))],
            vec![(Policy, "p", Some(policy("a == 'c'"))), (NetworkSet, "s", Some(set("192.0.2.0/24")))],
            vec![(Tier, "t", Some(tier("Guard")))],
            vec![(NetworkSet, "s", Some(set("192.0.2.0/25"))), (Tier, "t", None)],
            vec![(Tier, "t", Some(tier("Baseline"))), (Policy, "p", None)],
            vec![(NetworkSet, "s", None), (Tier, "t", None)],
        ];
        let mut kept = Federated::default();
        let mut state: BTreeMap<(ManifestKind, Arc<str>), Manifest> = BTreeMap::new();
        for (number, step) in steps.into_iter().enumerate() {
            for (kind, name, manifest) in &step {
                match manifest {
                    Some(manifest) => drop(state.insert((*kind, (*name).into()), manifest.clone())),
                    None => drop(state.remove(&(*kind, (*name).into()))),
                }
            }
            kept.take(step.into_iter().map(|(kind, name, manifest)| (kind, name.into(), manifest)));
            let mut fresh = Federated::default();
            fresh.take(state.iter().map(|((kind, name), it)| (*kind, name.clone(), Some(it.clone()))));
            let (kept, fresh) = (kept.converted(), fresh.converted());
            assert_eq!((&kept.layer, &kept.sets), (&fresh.layer, &fresh.sets), "step {number}");
            let has_tier = state.keys().any(|(kind, _)| *kind == Tier);
            let in_force = state.keys().filter(|(kind, _)| *kind != Policy || has_tier).count();
            assert_eq!(kept.layer.policies.len() + kept.layer.tiers.len() + kept.sets.len(), in_force, "step {number}");
        }
    }

    #[test]
    fn what_cannot_be_read_keeps_its_last_version() {
        let mut federated = with_tier();
        federated.take([(ManifestKind::Policy, "p".into(), Some(policy("a == 'b'")))]);
        assert_eq!(federated.converted().layer.policies.len(), 1);
        let before = federated.converted().layer.clone();
        let unread = manifest("FederatedNetworkPolicy", "p", json!({"tier": "t", "newer": true}));
        assert!(readable(ManifestKind::Policy, &unread.json).is_err_and(|why| why.contains("newer")));
        assert!(readable(ManifestKind::Policy, &tier("Guard").json).is_err(), "another kind");
        assert!(federated.take([(ManifestKind::Policy, "p".into(), Some(unread))]).is_empty());
        assert_eq!(federated.converted().layer, before);
    }
    #[test]
    fn a_policy_that_never_could_be_read_closes() {
        let rules = |federated: &Federated| {
            let policy = federated.converted().layer.policies.values().next().expect("the policy");
            let rules = policy.ingress.iter().flatten();
            rules.map(|rule| rule.not_understood.is_some()).collect::<Vec<bool>>()
        };
        let mut newer = manifest(
            "FederatedNetworkPolicy",
            "p",
            json!({"tier": "t", "ingress": [{"action": "Deny", "newer": 1}, {"action": "Allow"}]}),
        );
        let mut federated = with_tier();
        let updates = federated.take([(ManifestKind::Policy, "p".into(), Some(newer.clone()))]);
        assert_eq!((updates.len(), rules(&federated)), (1, vec![true, false]));
        // A newer version of it that cannot be read either.
        newer.json = String::from_utf8(newer.json.to_vec()).expect("JSON").replace("Allow", "Deny").into();
        newer.features = vec!["time".to_owned()];
        federated.take([(ManifestKind::Policy, "p".into(), Some(newer.clone()))]);
        assert_eq!(rules(&federated), [true, true]);
        let mut whole = policy("all()");
        federated.take([(ManifestKind::Policy, "p".into(), Some(whole.clone()))]);
        assert_eq!(rules(&federated), [false]);
        assert!(federated.take([(ManifestKind::Policy, "p".into(), Some(newer))]).is_empty());
        // Read to the last field, and meant otherwise.
        whole.features = vec!["time".to_owned()];
        let mut federated = with_tier();
        federated.take([(ManifestKind::Policy, "p".into(), Some(whole))]);
        assert_eq!(rules(&federated), [true]);
    }

    #[test]
    fn a_cluster_selector_of_everything_names_the_clusters() {
        let mut federated = with_tier();
        let source = json!({"clusterSelector": "all()", "selector": "a == 'b'"});
        let spec = json!({"tier": "t", "ingress": [{"action": "Allow", "source": source}, {"action": "Deny"}]});
        let mut policy = manifest("FederatedNetworkPolicy", "p", spec);
        let clusters: BTreeSet<Arc<str>> = ["here".into(), "there".into()].into();
        policy.resolved = vec![("all()".into(), clusters.clone())];
        federated.take([(ManifestKind::Policy, "p".into(), Some(policy))]);
        let policy = federated.converted().layer.policies.values().next().expect("the policy");
        let selections = policy.ingress.iter().flatten().map(|rule| rule.source.selection.as_ref());
        let scopes: Vec<_> = selections.map(|it| it.map(|it| it.clusters.clone())).collect();
        assert_eq!(scopes, [Some(ClusterScope::Named(clusters)), None]);
    }
}
