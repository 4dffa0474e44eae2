//! The hub's own objects, as they are sent: clusters, policies, tiers and network sets.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::model::ClusterName;
use hashbrown::HashMap;

use super::origin::MAX_TOMBSTONES;
use crate::codec::object::{self, Object};
use crate::model::{FederatedManifest, Federation, ManifestKind, digest_of, first_bits};

/// The hub's own objects, at one revision.
#[derive(Debug, Default)]
pub(super) struct HubObjects {
    pub(super) loaded: bool,
    pub(super) federation: Federation,
    pub(super) objects: BTreeMap<u64, HubObject>,
    tombstones: VecDeque<(u64, u64)>,
    pub(super) floor: u64,
    /// The digest of the objects for all clusters, and that of the further objects of each cluster.
    common: u128,
    digests: HashMap<ClusterName, u128>,
}

#[derive(Debug, Clone)]
pub(super) struct HubObject {
    pub(super) bytes: Bytes,
    digest: u128,
    touched: u64,
    audience: Audience,
    /// Its audience before the last change: they must be sent the change.
    former: Audience,
}

/// The clusters that are sent an object; `None`: all.
type Audience = Option<BTreeSet<ClusterName>>;

impl HubObjects {
    /// Takes over a newer federation, and notes what it touched.
    pub(super) fn replace(&mut self, federation: Federation) {
        let revision = federation.position.revision;
        if !self.loaded || federation.position.epoch != self.federation.position.epoch {
            self.floor = revision;
            self.tombstones.clear();
            self.objects.clear();
            self.common = 0;
            self.digests.clear();
        }
        // `None`: unchanged.
        let mut made: BTreeMap<u64, Option<(Bytes, Audience)>> = BTreeMap::new();
        for (name, state) in &federation.clusters {
            let id = id_of("cluster", name);
            made.insert(
                id,
                Some((
                    object::encode(id, 0, &Object::Cluster { name: name.clone(), record: state.record() }).into(),
                    None,
                )),
            );
        }
        for ((kind, name), manifest) in &federation.manifests {
            let label = match kind {
                ManifestKind::Policy => "policy",
                ManifestKind::StagedPolicy => "staged policy",
                ManifestKind::Tier => "tier",
                ManifestKind::NetworkSet => "network set",
            };
            let id = id_of(label, name);
            let same = |old: &Arc<FederatedManifest>| Arc::ptr_eq(old, manifest) && self.objects.contains_key(&id);
            let made_before = self.federation.manifests.get(&(*kind, name.clone())).is_some_and(same);
            let new = || (object::encode_manifest(id, *kind, name, manifest), manifest.audience());
            made.insert(id, (!made_before).then(new));
        }
        let gone: Vec<u64> = self.objects.keys().copied().filter(|id| !made.contains_key(id)).collect();
        for id in gone {
            if let Some(object) = self.objects.remove(&id) {
                self.count(&object, false);
            }
            self.tombstones.push_back((revision, id));
        }
        while self.tombstones.len() > MAX_TOMBSTONES {
            self.floor = self.tombstones.pop_front().map_or(self.floor, |(at, _)| self.floor.max(at));
        }
        for (id, new) in made {
            let Some((bytes, audience)) = new else { continue };
            let old = self.objects.get(&id);
            if old.is_some_and(|old| old.bytes == bytes && old.audience == audience) {
                continue;
            }
            let former = old.map_or(Some(BTreeSet::new()), |old| old.audience.clone());
            let object = HubObject { digest: digest_of(&bytes), bytes, touched: revision, audience, former };
            self.count(&object, true);
            if let Some(old) = self.objects.insert(id, object) {
                self.count(&old, false);
            }
        }
        self.federation = federation;
        self.loaded = true;
    }

    /// Enters an object into the digests, or takes it out.
    fn count(&mut self, object: &HubObject, enters: bool) {
        let by = if enters { object.digest } else { object.digest.wrapping_neg() };
        match &object.audience {
            None => self.common = self.common.wrapping_add(by),
            Some(names) => {
                for name in names {
                    let digest = self.digests.entry(name.clone()).or_default();
                    *digest = digest.wrapping_add(by);
                    if *digest == 0 {
                        self.digests.remove(name);
                    }
                }
            }
        }
    }

    pub(super) fn digest_for(&self, cluster: &str) -> u128 {
        self.common.wrapping_add(self.digests.get(cluster).copied().unwrap_or_default())
    }

    /// Ids touched or removed after a revision.
    pub(super) fn since(&self, revision: u64) -> impl Iterator<Item = u64> + '_ {
        let touched = self.objects.iter().filter(move |(_, o)| o.touched > revision).map(|(id, _)| *id);
        let removed = self.tombstones.iter().filter(move |(at, _)| *at > revision).map(|(_, id)| *id);
        touched.chain(removed)
    }
}

impl HubObject {
    pub(super) fn is_for(&self, cluster: &str) -> bool {
        self.audience.as_ref().is_none_or(|names| names.contains(cluster))
    }

    pub(super) fn was_for(&self, cluster: &str) -> bool {
        self.former.as_ref().is_none_or(|names| names.contains(cluster))
    }
}

/// Names are unique in their kind; 64 bits of a hash are far beyond the birthday of 50,000 objects.
fn id_of(kind: &str, name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(kind.as_bytes()).update(b"/").update(name.as_bytes());
    first_bits(&hasher.finalize()).max(1)
}
