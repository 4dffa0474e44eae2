//! The hub's own objects: clusters, and federated manifests with what of them is in force.
//!
//! A batch costs what it touches. Manifests come into force when the interest that they need is complete.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::model::ClusterName;

use super::super::model::{Change, ClusterRecord, Manifest, ManifestKind};
use super::problem::{Check, ObjectProblem};
use crate::codec::object::{self, Object};
use crate::limits::EXISTING_TIER;
use crate::model::{Position, digest_of};

/// Batches of the hub's own objects that wait for their interest, before later ones are joined to the last.
const MAX_WAITING: usize = 64;

pub(super) type ManifestKey = (ManifestKind, Arc<str>);
type Received = Option<Arc<ReceivedManifest>>;

#[derive(Debug, Default)]
pub(super) struct HubObjects {
    pub(super) position: Option<Position>,
    pub(super) digest: u128,
    objects: BTreeMap<u64, HubObject>,
    pub(super) clusters: BTreeMap<ClusterName, ClusterRecord>,
    /// The last version of each manifest that can be used.
    received: BTreeMap<ManifestKey, Arc<ReceivedManifest>>,
    in_force: BTreeMap<ManifestKey, Arc<ReceivedManifest>>,
    pub(super) in_force_at: Position,
    waiting: VecDeque<Waiting>,
    /// Objects that cannot be used here, and why.
    refused: BTreeMap<u64, ObjectProblem>,
    /// Reports why a manifest cannot be used here.
    pub(super) check: Option<Arc<dyn Check>>,
}

/// A manifest with the bytes that it was read from.
#[derive(Debug, PartialEq)]
struct ReceivedManifest {
    bytes: Bytes,
    manifest: Manifest,
}

#[derive(Debug)]
struct HubObject {
    bytes: Bytes,
    digest: u128,
    key: Option<HubKey>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum HubKey {
    Cluster(ClusterName),
    Manifest(ManifestKey),
}

/// Manifests that come into force together.
#[derive(Debug)]
struct Waiting {
    /// The number of the interest.
    needs: u64,
    position: Position,
    changes: BTreeMap<ManifestKey, Received>,
}

/// What was there before a batch, of everything that the batch touches.
#[derive(Debug, Default)]
struct Before {
    manifests: BTreeMap<ManifestKey, Received>,
    clusters: BTreeMap<ClusterName, Option<ClusterRecord>>,
}

/// Clusters that a batch changed.
#[derive(Debug, Default)]
pub(super) struct ChangedClusters {
    pub(super) gone: Vec<ClusterName>,
    pub(super) changed: Vec<(ClusterName, ClusterRecord)>,
}

impl HubObjects {
    /// Restores the hub's objects as of a position.
    pub(super) fn restore(&mut self, position: Position, objects: Vec<Bytes>) -> Option<()> {
        self.position = Some(position);
        objects.into_iter().try_for_each(|bytes| self.put(bytes, &mut Before::default()))?;
        self.digest = self.objects.values().fold(0, |sum, object| sum.wrapping_add(object.digest));
        Some(())
    }

    /// Restores what was in force, after [`Self::restore`]. What differs from what was received waits for the first interest.
    pub(super) fn restore_in_force(&mut self, in_force: Vec<Bytes>, at: Position) {
        for bytes in in_force {
            let Some(object::Update { id, object: Ok(Object::Manifest { kind, name, manifest }), .. }) =
                object::decode(&bytes)
            else {
                continue;
            };
            let (key, received) = ((kind, name), Arc::new(ReceivedManifest { bytes, manifest }));
            // A later version cannot be used: this is the last one that could.
            if let Some(object) = self.objects.get_mut(&id).filter(|_| self.refused.contains_key(&id)) {
                object.key = Some(HubKey::Manifest(key.clone()));
                self.received.insert(key.clone(), received.clone());
            }
            self.in_force.insert(key, received);
        }
        self.in_force_at = at;
        let keys: BTreeSet<&ManifestKey> = self.in_force.keys().chain(self.received.keys()).collect();
        let differs = keys.into_iter().filter(|key| self.in_force.get(*key) != self.received.get(*key));
        let changes: BTreeMap<ManifestKey, Received> =
            differs.map(|key| (key.clone(), self.received.get(key).cloned())).collect();
        let position = self.position.unwrap_or_default();
        if changes.is_empty() {
            self.in_force_at = position;
        } else {
            self.waiting.push_back(Waiting { needs: 1, position, changes });
        }
    }

    pub(super) fn objects(&self) -> impl Iterator<Item = &Bytes> {
        self.objects.values().map(|object| &object.bytes)
    }

    pub(super) fn in_force_objects(&self) -> impl Iterator<Item = &Bytes> {
        self.in_force.values().map(|received| &received.bytes)
    }

    /// Everything in force, as changes of nothing.
    pub(super) fn manifests_in_force(&self) -> impl Iterator<Item = Change> {
        self.in_force.iter().map(|((kind, name), received)| Change::Manifest {
            kind: *kind,
            name: name.clone(),
            manifest: Some(received.manifest.clone()),
        })
    }

    /// The first interest of a stream covers everything that the hub's state needs, whatever was sent before.
    pub(super) fn wait_for_first_interest(&mut self) {
        self.waiting.iter_mut().for_each(|waiting| waiting.needs = 1);
    }

    /// Applies a batch, if the result has this digest. Its manifests wait for the interest of number `needs`.
    pub(super) fn apply(
        &mut self,
        snapshot: bool,
        updates: BTreeMap<u64, Option<Bytes>>,
        unreadable: u128,
        (position, digest, needs): (Position, Option<u128>, u64),
    ) -> Option<ChangedClusters> {
        let mut expected = if snapshot { 0 } else { self.digest }.wrapping_add(unreadable);
        for (id, update) in &updates {
            if let Some(object) = self.objects.get(id).filter(|_| !snapshot) {
                expected = expected.wrapping_sub(object.digest);
            }
            expected = expected.wrapping_add(update.as_deref().map_or(0, digest_of));
        }
        if digest != Some(expected) {
            return None;
        }
        let mut before = Before::default();
        if snapshot {
            let is_gone = |id: &u64| !matches!(updates.get(id), Some(Some(_)));
            let gone: Vec<u64> = self.objects.keys().copied().filter(is_gone).collect();
            gone.into_iter().for_each(|id| self.remove(id, &mut before));
        }
        for (id, update) in updates {
            match update {
                // Its id was read when it was staged.
                Some(bytes) => _ = self.put(bytes, &mut before),
                None => self.remove(id, &mut before),
            }
        }
        (self.digest, self.position) = (expected, Some(position));
        let changes: BTreeMap<ManifestKey, Received> = before
            .manifests
            .into_iter()
            .filter(|(key, before)| before.as_ref() != self.received.get(key))
            .map(|(key, _)| (key.clone(), self.received.get(&key).cloned()))
            .collect();
        let full = self.waiting.len() >= MAX_WAITING;
        match self.waiting.back_mut() {
            Some(last) if full => {
                last.changes.extend(changes);
                (last.needs, last.position) = (needs, position);
            }
            _ => self.waiting.push_back(Waiting { needs, position, changes }),
        }
        let mut clusters = ChangedClusters::default();
        for (name, before) in before.clusters {
            match self.clusters.get(&name) {
                None => clusters.gone.extend(before.map(|_| name)),
                Some(record) if before.as_ref() != Some(record) => clusters.changed.push((name, record.clone())),
                Some(_) => {}
            }
        }
        Some(clusters)
    }

    /// Puts into force what needs at most this interest, and adds the changes; whether there was anything.
    pub(super) fn advance(&mut self, interest: u64, changes: &mut Vec<Change>) -> bool {
        let mut moved = false;
        while self.waiting.front().is_some_and(|waiting| waiting.needs <= interest) {
            let Some(waiting) = self.waiting.pop_front() else { break };
            moved = true;
            self.in_force_at = waiting.position;
            for (key, received) in waiting.changes {
                let (kind, name) = key.clone();
                let manifest = received.as_ref().map(|received| received.manifest.clone());
                match received {
                    Some(received) => drop(self.in_force.insert(key, received)),
                    None => drop(self.in_force.remove(&key)),
                }
                changes.push(Change::Manifest { kind, name, manifest });
            }
        }
        moved
    }

    /// Policies that wait.
    pub(super) fn waiting_policies(&self) -> BTreeSet<ManifestKey> {
        let keys = self.waiting.iter().flat_map(|waiting| waiting.changes.keys());
        keys.filter(|(kind, _)| kind.is_policy()).cloned().collect()
    }

    /// Policies that cannot be used here, and why.
    pub(super) fn refused_policies(&self) -> BTreeMap<ManifestKey, String> {
        let refused = self.refused.iter().filter_map(|(id, why)| Some((self.objects.get(id)?.key.as_ref()?, why)));
        let policy = |(key, why): (&HubKey, &ObjectProblem)| match key {
            HubKey::Manifest(key) if key.0.is_policy() => Some((key.clone(), why.to_string())),
            HubKey::Manifest(_) | HubKey::Cluster(_) => None,
        };
        refused.filter_map(policy).collect()
    }

    fn remove(&mut self, id: u64, before: &mut Before) {
        self.refused.remove(&id);
        match self.objects.remove(&id).and_then(|object| object.key) {
            Some(HubKey::Cluster(name)) => {
                let record = self.clusters.remove(&name);
                before.clusters.entry(name).or_insert(record);
            }
            Some(HubKey::Manifest(key)) => {
                let received = self.received.remove(&key);
                before.manifests.entry(key).or_insert(received);
            }
            None => {}
        }
    }

    /// Stores an object. One that cannot be used is kept as bytes, and the last version that could be used stays. `None`: its id
    /// cannot be read.
    fn put(&mut self, bytes: Bytes, before: &mut Before) -> Option<()> {
        let object::Update { id, object, .. } = object::decode(&bytes)?;
        let digest = digest_of(&bytes);
        let mut key = self.objects.get(&id).and_then(|object| object.key.clone());
        match object {
            Ok(Object::Cluster { name, record }) => {
                key = Some(HubKey::Cluster(name.clone()));
                let former = self.clusters.insert(name.clone(), record);
                before.clusters.entry(name).or_insert(former);
                self.refused.remove(&id);
            }
            Ok(Object::Manifest { kind, name, manifest }) => {
                key = Some(HubKey::Manifest((kind, name.clone())));
                self.put_manifest(id, (kind, name), &bytes, manifest, before);
            }
            Ok(_) => self.refuse(id, ObjectProblem::WrongKind),
            Err(error) => self.refuse(id, error.into()),
        }
        self.objects.insert(id, HubObject { bytes, digest, key });
        Some(())
    }

    fn put_manifest(&mut self, id: u64, key: ManifestKey, bytes: &Bytes, manifest: Manifest, before: &mut Before) {
        let usable = match manifest.features.first() {
            Some(feature) if feature == EXISTING_TIER => Err(ObjectProblem::TierMissing),
            Some(feature) => Err(ObjectProblem::FeatureUnknown(feature.clone())),
            None => {
                let check = self.check.as_ref().map_or(Ok(()), |check| check.check(key.0, &manifest.json));
                check.map_err(ObjectProblem::Malformed)
            }
        };
        // A policy of which no version could ever be used is handed out all the same: its reader closes what it cannot judge. One
        // without a tier is not in force.
        let last = self.received.get(&key);
        let is_last_refused = |last: &Arc<ReceivedManifest>| {
            self.refused.contains_key(&id) && self.objects.get(&id).is_some_and(|object| object.bytes == last.bytes)
        };
        let never_usable = last.is_none_or(is_last_refused);
        let has_tier = usable != Err(ObjectProblem::TierMissing);
        before.manifests.entry(key.clone()).or_insert_with(|| last.cloned());
        if usable.is_ok() || key.0.is_policy() && never_usable && has_tier {
            self.received.insert(key, Arc::new(ReceivedManifest { bytes: bytes.clone(), manifest }));
        }
        match usable {
            Ok(()) => drop(self.refused.remove(&id)),
            Err(why) => self.refuse(id, why),
        }
    }

    fn refuse(&mut self, id: u64, why: ObjectProblem) {
        tracing::error!(object = id, %why, "an object of the hub cannot be used here: its last usable version stays in force");
        self.refused.insert(id, why);
    }
}
