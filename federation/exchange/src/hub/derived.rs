//! What the policies that a cluster enforces can select in other clusters. An update costs what changed.
//!
//! Each cluster has the sum of the hashes of its policies: clusters with equal sums enforce the same, and share one
//! interest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::interest;
use hanse_policy::model::ClusterName;
use hashbrown::HashMap;

use crate::model::{FederatedManifest, Interest, ManifestKind, Wanted, digest_of};

type Manifests = BTreeMap<(ManifestKind, Arc<str>), Arc<FederatedManifest>>;

/// The interests that the hub derives.
#[derive(Debug, Default)]
pub(super) struct Derived {
    /// The present policies, enforced and staged, each with a hash of its interest.
    policies: BTreeMap<(ManifestKind, Arc<str>), (Arc<FederatedManifest>, u128)>,
    sums: HashMap<ClusterName, u128>,
    interests: HashMap<u128, Arc<Interest>>,
    nothing: Arc<Interest>,
}

impl Derived {
    /// The interest of a cluster. Clusters that enforce the same policies share it.
    pub(super) fn of(&self, cluster: &str) -> Arc<Interest> {
        let interest = self.sums.get(cluster).and_then(|sum| self.interests.get(sum));
        Arc::clone(interest.unwrap_or(&self.nothing))
    }

    /// Takes over the present policies. Returns the clusters whose interest may have changed.
    pub(super) fn follow(&mut self, manifests: &Manifests) -> BTreeSet<ClusterName> {
        let mut touched: BTreeMap<ClusterName, u128> = BTreeMap::new();
        let mut add = |manifest: &FederatedManifest, by: u128| {
            for cluster in manifest.enforcers.iter().flatten() {
                let change = touched.entry(cluster.clone()).or_default();
                *change = change.wrapping_add(by);
            }
        };
        let mut policies = BTreeMap::new();
        for (key, manifest) in manifests.iter().filter(|((kind, _), _)| kind.is_policy()) {
            let old = self.policies.remove(key);
            let hash = match &old {
                Some((old, hash)) if Arc::ptr_eq(old, manifest) => *hash,
                _ => {
                    let hash = hash_of(key, manifest);
                    if let Some((old, hash)) = &old {
                        add(old, hash.wrapping_neg());
                    }
                    add(manifest, hash);
                    hash
                }
            };
            policies.insert(key.clone(), (Arc::clone(manifest), hash));
        }
        for (old, hash) in self.policies.values() {
            add(old, hash.wrapping_neg());
        }
        self.policies = policies;
        touched.retain(|_, change| *change != 0);
        for (cluster, change) in &touched {
            let sum = self.sums.entry(cluster.clone()).or_default();
            *sum = sum.wrapping_add(*change);
            let sum = *sum;
            if sum == 0 {
                self.sums.remove(cluster);
            } else if !self.interests.contains_key(&sum) {
                let enforced = self.policies.values().filter(|(policy, _)| {
                    policy.enforcers.as_ref().is_some_and(|enforcers| enforcers.contains(cluster))
                });
                let interest: Interest = enforced.flat_map(|(policy, _)| policy.interest.iter().cloned()).collect();
                self.interests.insert(sum, Arc::new(interest::bounded(interest, interest::DERIVED)));
            }
        }
        if !touched.is_empty() {
            let used: BTreeSet<u128> = self.sums.values().copied().collect();
            self.interests.retain(|sum, _| used.contains(sum));
        }
        touched.into_keys().collect()
    }
}

fn hash_of((kind, name): &(ManifestKind, Arc<str>), manifest: &FederatedManifest) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[u8::from(*kind == ManifestKind::StagedPolicy)]).update(name.as_bytes()).update(b"\n");
    for wanted in &manifest.interest {
        hash(wanted, &mut hasher);
    }
    digest_of(hasher.finalize().as_bytes())
}

/// Enters a selection into a hash that is the same on every replica.
pub(super) fn hash(wanted: &Wanted, hasher: &mut blake3::Hasher) {
    let text = format!("{:?}\n{}\n{:?}\n", wanted.clusters(), wanted.selector().canonical, wanted.port_names());
    hasher.update(text.as_bytes());
}
