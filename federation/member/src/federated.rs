//! Converts federated objects into policies, incrementally.
//!
//! A change converts only the changed objects; a tier that moves to another phase also converts its policies. An unreadable object keeps
//! its last readable version. A policy without one, with unknown fields or features, is used with the affected rules as unknown. A
//! policy whose tier does not exist is not in force.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use hanse_api::Object;
use hanse_api::assemble::Federation;
use hanse_api::clusters::ClusterSelector;
use hanse_api::federated::FederatedObject;
use hanse_api::policy::FederatedPolicy;
use hanse_compiler::Update;
use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind};
use hanse_policy::model::{ClusterScope, Phase, Policy, PolicyId, PolicyKind, TierId};

use crate::exchange::model::{Manifest, ManifestKind};
use crate::exchange::receiver::Check;

/// Cached bytes of objects that are not in force: the two largest batches, or 16 objects of the maximum size.
const MAX_PENDING_BYTES: usize = 4 << 20;

/// Reads each version of a federated object once: when it is received, and not again when it takes effect. Clones share the cache.
#[derive(Debug, Clone, Default)]
pub struct Reader(Arc<Mutex<ReadObjects>>);

#[derive(Debug, Default)]
struct ReadObjects {
    objects: HashMap<Bytes, Arc<FederatedObject>>,
    /// The bytes of all objects.
    bytes: usize,
    /// The bytes of objects in use when the others were last dropped.
    used_bytes: usize,
    /// The number of objects that were read.
    reads: usize,
}

impl Check for Reader {
    fn check(&self, kind: ManifestKind, json: &Bytes) -> Result<(), String> {
        object_of(kind, &self.read(json)).map(drop)
    }
}

impl Reader {
    fn read(&self, json: &Bytes) -> Arc<FederatedObject> {
        let mut read = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(read) = read.objects.get(json) {
            return Arc::clone(read);
        }
        if read.bytes > 2 * read.used_bytes + MAX_PENDING_BYTES {
            read.objects.retain(|_, object| Arc::strong_count(object) > 1);
            read.used_bytes = read.objects.keys().map(Bytes::len).sum();
            read.bytes = read.used_bytes;
        }
        let object = Arc::new(FederatedObject::read(json));
        read.objects.insert(json.clone(), Arc::clone(&object));
        read.bytes += json.len();
        read.reads += 1;
        object
    }
}

fn object_of(kind: ManifestKind, read: &FederatedObject) -> Result<&Object, String> {
    let object = read.object()?;
    let fits = match object {
        Object::FederatedPolicy(policy) => kind == kind_of(policy),
        Object::FederatedTier(_) => kind == ManifestKind::Tier,
        Object::FederatedNetworkSet(..) => kind == ManifestKind::NetworkSet,
        _ => false,
    };
    if fits { Ok(object) } else { Err("has a kind that differs from that of its key".to_owned()) }
}

fn kind_of(policy: &FederatedPolicy) -> ManifestKind {
    if policy.is_staged() { ManifestKind::StagedPolicy } else { ManifestKind::Policy }
}

/// A federated policy, in force or waiting for its tier.
#[derive(Debug)]
struct StoredPolicy {
    manifest: Manifest,
    read: Arc<FederatedObject>,
}

impl StoredPolicy {
    /// Whether this version of Hanse can read the whole policy and has all required features.
    fn is_complete(&self) -> bool {
        self.manifest.features.is_empty() && self.read.object().is_ok()
    }

    /// The policy, if it is of this kind.
    fn possible(&self, kind: ManifestKind) -> Option<&FederatedPolicy> {
        match self.read.possible()? {
            Object::FederatedPolicy(policy) if kind_of(policy) == kind => Some(policy),
            _ => None,
        }
    }
}

/// The federated objects in force.
#[derive(Debug, Default)]
pub struct Federated {
    reader: Reader,
    /// Enforced and staged ones.
    policies: BTreeMap<(ManifestKind, Arc<str>), StoredPolicy>,
    phases: BTreeMap<Arc<str>, Phase>,
    converted: Federation,
}

impl Federated {
    /// Uses the cache of `reader`.
    pub fn new(reader: Reader) -> Self {
        Self { reader, ..Self::default() }
    }

    /// Everything in force.
    pub fn converted(&self) -> &Federation {
        &self.converted
    }

    /// Applies changes that take effect together; `None` is a deletion.
    pub fn take(
        &mut self,
        changes: impl IntoIterator<Item = (ManifestKind, Arc<str>, Option<Manifest>)>,
    ) -> Vec<Update> {
        let mut updates = Vec::new();
        let (mut policies, mut moved) = (BTreeSet::new(), BTreeSet::new());
        for (kind, name, manifest) in changes {
            let stored = manifest.map(|manifest| StoredPolicy { read: self.reader.read(&manifest.json), manifest });
            let object = match stored.as_ref().map(|it| object_of(kind, &it.read)).transpose() {
                Ok(object) => object.cloned(),
                Err(why) => {
                    let is_usable = kind.is_policy()
                        && !self.policies.get(&(kind, name.clone())).is_some_and(StoredPolicy::is_complete)
                        && stored.as_ref().is_some_and(|it| it.possible(kind).is_some());
                    if !is_usable {
                        tracing::error!(object = %name, why, "federated object not readable: its last version stays in force");
                        continue;
                    }
                    tracing::error!(object = %name, why, "federated policy not readable: rules with unknown fields fail closed");
                    None
                }
            };
            match (kind, object) {
                (ManifestKind::Policy | ManifestKind::StagedPolicy, _) => {
                    let key = (kind, name);
                    match stored {
                        Some(stored) => drop(self.policies.insert(key.clone(), stored)),
                        None => drop(self.policies.remove(&key)),
                    }
                    policies.insert(key);
                }
                (ManifestKind::Tier, object) => {
                    let tier = match object {
                        Some(Object::FederatedTier(tier)) => Some(tier),
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
                (ManifestKind::NetworkSet, Some(Object::FederatedNetworkSet(id, set))) => {
                    let endpoint = Endpoint::clone(&set);
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
            policies.extend(along.map(|policy| key_of(&policy.id)));
            let known: BTreeSet<_> = in_force.keys().map(key_of).collect();
            policies.extend(self.policies.keys().filter(|key| !known.contains(key)).cloned());
        }
        for key in policies {
            let policy = self.policies.get(&key).and_then(|stored| self.policy(key.0, stored));
            updates.push(match policy {
                Some(policy) => {
                    self.converted.layer.policies.insert(policy.id.clone(), policy.clone());
                    Update::Policy(policy)
                }
                None => {
                    let id = id_of(key);
                    self.converted.layer.policies.remove(&id);
                    Update::RemovePolicy(id)
                }
            });
        }
        updates
    }

    fn policy(&self, kind: ManifestKind, stored: &StoredPolicy) -> Option<Policy> {
        let (manifest, policy) = (&stored.manifest, stored.possible(kind)?);
        if !self.phases.contains_key(policy.tier()) {
            tracing::error!(
                policy = %policy.id().name,
                tier = %policy.tier(),
                "federated policy not in force: its tier does not exist"
            );
            return None;
        }
        // The hub resolves cluster selectors, so that all clusters agree.
        let resolved = |selector: &ClusterSelector| {
            let names = manifest.resolved.iter().find(|(text, _)| *text == selector.text).map(|(_, names)| names);
            names.cloned().unwrap_or_default()
        };
        let mut policy = match &manifest.features[..] {
            [] => policy.resolve(&resolved, &self.phases),
            features => {
                let mut policy = FederatedPolicy::clone(policy);
                let unknown: Vec<String> = features.iter().map(|it| format!("the feature \"{it}\"")).collect();
                policy.mark_unknown(&unknown);
                policy.resolve(&resolved, &self.phases)
            }
        };
        policy.enforcers = ClusterScope::Named(manifest.enforcers.clone());
        Some(policy)
    }
}

fn key_of(id: &PolicyId) -> (ManifestKind, Arc<str>) {
    let kind = match id.kind {
        PolicyKind::StagedFederatedNetworkPolicy => ManifestKind::StagedPolicy,
        _ => ManifestKind::Policy,
    };
    (kind, id.name.clone())
}

fn id_of((kind, name): (ManifestKind, Arc<str>)) -> PolicyId {
    let kind = match kind {
        ManifestKind::StagedPolicy => PolicyKind::StagedFederatedNetworkPolicy,
        _ => PolicyKind::FederatedNetworkPolicy,
    };
    PolicyId { cluster: None, kind, namespace: None, name }
}

#[cfg(test)]
mod tests {
    use hanse_policy::model::StagedAction;
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
    fn incremental_changes_equal_a_fresh_start() {
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
    fn unreadable_object_keeps_its_last_version() {
        let mut federated = with_tier();
        federated.take([(ManifestKind::Policy, "p".into(), Some(policy("a == 'b'")))]);
        assert_eq!(federated.converted().layer.policies.len(), 1);
        let before = federated.converted().layer.clone();
        let unread = manifest("FederatedNetworkPolicy", "p", json!({"tier": "t", "newer": true}));
        let reader = Reader::default();
        assert!(reader.check(ManifestKind::Policy, &unread.json).is_err_and(|why| why.contains("newer")));
        assert!(reader.check(ManifestKind::Policy, &tier("Guard").json).is_err(), "another kind");
        assert!(federated.take([(ManifestKind::Policy, "p".into(), Some(unread))]).is_empty());
        assert_eq!(federated.converted().layer, before);
    }
    #[test]
    fn policy_without_a_readable_version_fails_closed() {
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
    fn staged_and_enforced_policies_of_one_name_are_two_objects() {
        let mut federated = with_tier();
        let staged = |action: &str| {
            let spec = json!({"tier": "t", "stagedAction": action, "types": ["Ingress"]});
            Some(manifest("StagedFederatedNetworkPolicy", "p", spec))
        };
        let kinds = |federated: &Federated| {
            let policies = federated.converted().layer.policies.values();
            policies.map(|policy| (policy.id.kind, policy.staged)).collect::<Vec<_>>()
        };
        let (enforced, pending) = (PolicyKind::FederatedNetworkPolicy, PolicyKind::StagedFederatedNetworkPolicy);
        federated.take([(ManifestKind::StagedPolicy, "p".into(), staged("Set"))]);
        federated.take([(ManifestKind::Policy, "p".into(), Some(policy("a == 'b'")))]);
        assert_eq!(kinds(&federated), [(enforced, None), (pending, Some(StagedAction::Set))]);
        // A manifest of the other kind is not taken for its key's.
        let reader = Reader::default();
        assert!(reader.check(ManifestKind::Policy, &staged("Set").expect("a manifest").json).is_err());
        assert!(federated.take([(ManifestKind::Policy, "p".into(), staged("Set"))]).is_empty());
        // A tier that moves takes both along.
        let moved = federated.take([(ManifestKind::Tier, "t".into(), Some(tier("Baseline")))]);
        assert_eq!(moved.iter().filter(|it| matches!(it, Update::Policy(_))).count(), 2);
        federated.take([(ManifestKind::Policy, "p".into(), None)]);
        federated.take([(ManifestKind::StagedPolicy, "p".into(), staged("Delete"))]);
        assert_eq!(kinds(&federated), [(pending, Some(StagedAction::Delete))]);
        let removed = federated.take([(ManifestKind::StagedPolicy, "p".into(), None)]);
        assert!(matches!(&removed[..], [Update::RemovePolicy(id)] if id.kind == pending), "{removed:?}");
        assert_eq!(kinds(&federated), []);
    }

    #[test]
    fn cluster_selector_of_all_resolves_to_names() {
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
