//! What is received of one cluster: its objects as bytes, and indices over them.
//!
//! There is an entry for every endpoint of the ClusterSet that this cluster's policies can select, so an entry keeps only the
//! encoded object (a snapshot and the digest need the bytes anyway), and the indices keep slots. What an object says is read
//! from its bytes when it is needed. An endpoint that was handed out shares names and labels with the others of its origin.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher as _;
use std::sync::Arc;

use hanse_policy::inventory::{Endpoint, EndpointId, Labels, SharedLabels};
use hanse_policy::model::ClusterName;
use hanse_policy::slab::Slab;
use hashbrown::{DefaultHashBuilder, HashMap, HashTable};

use super::super::model::{Change, pod};
use super::problem::ObjectProblem;
use crate::codec::object::{self, EndpointObject, Object};
use crate::model::{Position, digest_of};

hanse_policy::slab_id! {
    /// An object of an origin.
    struct Slot;
}

#[derive(Debug, Default)]
pub(super) struct Origin {
    pub(super) position: Position,
    pub(super) view: u64,
    pub(super) digest: u128,
    entries: Slab<Slot, Entry>,
    hasher: DefaultHashBuilder,
    /// By the ids of the objects.
    ids: HashTable<Slot>,
    /// Endpoints, by the ids of their namespaces and by their names.
    endpoints: HashTable<Slot>,
    /// Names by id.
    namespaces: HashMap<u64, Arc<str>>,
    /// The namespace's id, and the name, by id.
    accounts: HashMap<u64, (u64, Arc<str>)>,
    label_sets: HashMap<u64, LabelSet>,
    pub(super) refused: BTreeMap<u64, ObjectProblem>,
    strings: Strings,
}

/// 40 bytes: there is one for every endpoint that is received.
#[derive(Debug)]
struct Entry {
    id: u64,
    bytes: Box<[u8]>,
    /// Of an endpoint, its place among the users of its label set.
    place: u32,
}

/// A label set, which may be missing, and the endpoints that refer to it.
#[derive(Debug, Default)]
struct LabelSet {
    labels: Option<SharedLabels>,
    users: Vec<Slot>,
}

/// Texts that many endpoints have in common: names of nodes and ports, and labels.
#[derive(Debug, Default)]
struct Strings(hashbrown::HashSet<Arc<str>>);

impl Strings {
    /// Beyond this many they are not shared: a cluster has at most 16,384 nodes.
    const MAX: usize = 1 << 15;

    fn add(&mut self, text: &str) {
        if self.0.len() < Self::MAX && !self.0.contains(text) {
            self.0.insert(text.into());
        }
    }

    fn shared(&self, text: &str) -> Arc<str> {
        self.0.get(text).cloned().unwrap_or_else(|| text.into())
    }

    fn forget_unused(&mut self) {
        self.0.retain(|text| Arc::strong_count(text) > 1);
        self.0.shrink_to_fit();
    }
}

/// The digest that an end names is not that of what would be there.
#[derive(Debug)]
pub(super) struct DigestDiffers;

/// What a batch touched, by the names that the inventory has.
#[derive(Debug, Default)]
struct Touched {
    /// With the ids that their namespaces had. Not a map: a snapshot has an entry for every endpoint.
    endpoints: Vec<(EndpointId, u64)>,
    namespaces: BTreeSet<(Arc<str>, u64)>,
    /// Namespace, name and id.
    accounts: BTreeSet<(Arc<str>, Arc<str>, u64)>,
    label_sets: BTreeSet<u64>,
}

impl Origin {
    /// The number of objects.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The bytes of all objects.
    pub(super) fn objects(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().map(|(_, entry)| &*entry.bytes)
    }

    /// Applies a batch if the result has this digest, and adds what changed. O(the batch), and for a snapshot O(all objects).
    pub(super) fn apply(
        &mut self,
        cluster: &ClusterName,
        snapshot: bool,
        updates: BTreeMap<u64, Option<Box<[u8]>>>,
        digest: Option<u128>,
        changes: &mut Vec<Change>,
    ) -> Result<(), DigestDiffers> {
        let mut after = if snapshot { 0 } else { self.digest };
        for (id, update) in &updates {
            if let Some(before) = self.entry(*id).filter(|_| !snapshot) {
                after = after.wrapping_sub(digest_of(&before.bytes));
            }
            after = after.wrapping_add(update.as_deref().map_or(0, digest_of));
        }
        if digest.is_some_and(|digest| digest != after) {
            return Err(DigestDiffers);
        }
        let removed: Vec<u64> = match snapshot {
            true => {
                let all = self.entries.iter().map(|(_, entry)| entry.id);
                all.filter(|id| !matches!(updates.get(id), Some(Some(_)))).collect()
            }
            false => {
                let gone = updates.iter().filter(|(id, update)| update.is_none() && self.slot_of(**id).is_some());
                gone.map(|(id, _)| *id).collect()
            }
        };
        let sent = updates.into_iter().filter_map(|(id, update)| Some((id, update?)));
        let changed: Vec<(u64, Box<[u8]>)> =
            sent.filter(|(id, bytes)| self.entry(*id).is_none_or(|before| before.bytes != *bytes)).collect();
        let changed_ids: Vec<u64> = changed.iter().map(|(id, _)| *id).collect();
        // Names are looked up in the former state, then in the new one: an object may have another name now.
        let mut touched = Touched::default();
        for id in removed.iter().chain(&changed_ids) {
            self.touch(*id, &mut touched);
        }
        for id in removed.iter().chain(&changed_ids) {
            self.remove(*id);
        }
        for (id, bytes) in changed {
            self.insert(id, bytes);
        }
        // Objects that refer to a namespace of the same batch are found by now.
        for id in &changed_ids {
            self.touch(*id, &mut touched);
        }
        for set in std::mem::take(&mut touched.label_sets) {
            let users: Vec<Slot> = self.label_sets.get(&set).map(|set| set.users.clone()).unwrap_or_default();
            for user in users {
                self.touch(self.entries[user].id, &mut touched);
            }
        }
        self.digest = after;
        self.add_changes(cluster, touched, changes);
        if snapshot {
            // What grew by doubling is a third too large, and most origins change little afterwards.
            self.shrink();
        }
        Ok(())
    }

    /// All objects, as changes of nothing.
    pub(super) fn everything(&self, cluster: &ClusterName, changes: &mut Vec<Change>) {
        let mut touched = Touched::default();
        let ids: Vec<u64> = self.entries.iter().map(|(_, entry)| entry.id).collect();
        for id in ids {
            self.touch(id, &mut touched);
        }
        self.add_changes(cluster, touched, changes);
    }

    /// Notes the names that an object is known by.
    fn touch(&self, id: u64, touched: &mut Touched) {
        let Some(entry) = self.entry(id) else { return };
        if let Some(name) = self.namespaces.get(&id) {
            touched.namespaces.insert((name.clone(), id));
        } else if let Some((namespace, name)) = self.accounts.get(&id) {
            touched.accounts.extend(self.namespaces.get(namespace).map(|it| (it.clone(), name.clone(), id)));
        } else if self.label_sets.get(&id).is_some_and(|set| set.labels.is_some()) {
            touched.label_sets.insert(id);
        } else if let Some(endpoint) = endpoint_of(&entry.bytes)
            && let Some(namespace) = self.namespaces.get(&endpoint.namespace)
        {
            touched.endpoints.push((pod(namespace.clone(), endpoint.name.into()), endpoint.namespace));
        }
    }

    fn add_changes(&self, cluster: &ClusterName, mut touched: Touched, changes: &mut Vec<Change>) {
        // Labels of namespaces come before the endpoints in them; endpoints go before their namespaces.
        let mut removals = Vec::new();
        for (name, id) in touched.namespaces {
            let labels = self.object(id).and_then(|object| match object {
                Object::Namespace { name: now, labels } if now == name => Some(labels.into_vec().into_iter().collect()),
                _ => None,
            });
            match labels {
                // In a new epoch the same namespace has another id.
                None if self.namespaces.values().any(|other| *other == name) => {}
                None => removals.push(Change::Namespace { cluster: cluster.clone(), name, labels: None }),
                labels => changes.push(Change::Namespace { cluster: cluster.clone(), name, labels }),
            }
        }
        let mut accounts: BTreeMap<(Arc<str>, Arc<str>), Option<Labels>> = BTreeMap::new();
        for (namespace, name, id) in touched.accounts {
            let labels = match self.object(id) {
                Some(Object::ServiceAccount { labels, .. }) => Some(labels.into_vec().into_iter().collect()),
                _ => None,
            };
            let entry = accounts.entry((namespace, name)).or_default();
            if labels.is_some() {
                *entry = labels;
            }
        }
        for ((namespace, name), labels) in accounts {
            let to = if labels.is_some() { &mut *changes } else { &mut removals };
            to.push(Change::ServiceAccount { cluster: cluster.clone(), namespace, name, labels });
        }
        touched.endpoints.sort_unstable();
        touched.endpoints.dedup();
        for same_name in touched.endpoints.chunk_by(|(a, _), (b, _)| a == b) {
            let id = same_name[0].0.clone();
            let objects = same_name.iter().flat_map(|(_, namespace)| self.endpoints_named(*namespace, &id.name));
            // A publisher gives one id to each name. Where one does not, the outcome does not depend on any order.
            let newest = objects.max_by_key(|(id, _)| *id).map(|(_, endpoint)| endpoint);
            let endpoint = newest.map(|endpoint| self.endpoint(endpoint));
            changes.push(Change::Endpoint { cluster: cluster.clone(), id, endpoint });
        }
        changes.append(&mut removals);
    }

    /// The endpoint objects of one name, with their ids.
    fn endpoints_named(&self, namespace: u64, name: &str) -> Vec<(u64, EndpointObject)> {
        let slots = self.endpoints.iter_hash(self.hasher.hash_one((namespace, name)));
        let named = slots.filter_map(|slot| {
            let entry = &self.entries[*slot];
            let endpoint = endpoint_of(&entry.bytes)?;
            (endpoint.namespace == namespace && endpoint.name == name).then_some((entry.id, endpoint))
        });
        named.collect()
    }

    fn endpoint(&self, object: EndpointObject) -> Endpoint {
        let EndpointObject { service_account, label_set, own, addresses, mut ports, node, .. } = object;
        let mut labels = self.label_sets.get(&label_set).and_then(|set| set.labels.clone()).unwrap_or_default();
        if !own.is_empty() {
            labels.extend(own);
        }
        let service_account = self.accounts.get(&service_account).map(|(_, name)| name.clone());
        for port in &mut ports {
            port.name = self.strings.shared(&port.name);
        }
        let node = node.map(|node| self.strings.shared(&node));
        Endpoint { labels, service_account, addresses, ports, node, ..Endpoint::default() }
    }

    fn slot_of(&self, id: u64) -> Option<Slot> {
        self.ids.find(self.hasher.hash_one(id), |slot| self.entries[*slot].id == id).copied()
    }

    fn entry(&self, id: u64) -> Option<&Entry> {
        self.slot_of(id).map(|slot| &self.entries[slot])
    }

    fn object(&self, id: u64) -> Option<Object> {
        object::decode(&self.entry(id)?.bytes)?.object.ok()
    }

    fn remove(&mut self, id: u64) {
        self.refused.remove(&id);
        let Ok(found) = self.ids.find_entry(self.hasher.hash_one(id), |slot| self.entries[*slot].id == id) else {
            return;
        };
        let (slot, _) = found.remove();
        let Entry { bytes, place, .. } = self.entries.remove(slot);
        self.namespaces.remove(&id);
        self.accounts.remove(&id);
        if let Some(set) = self.label_sets.get_mut(&id) {
            set.labels = None;
            self.forget_unused(id);
        }
        let Some(endpoint) = endpoint_of(&bytes) else { return };
        let hash = self.hasher.hash_one((endpoint.namespace, &*endpoint.name));
        if let Ok(found) = self.endpoints.find_entry(hash, |it| *it == slot) {
            found.remove();
        }
        if let Some(set) = self.label_sets.get_mut(&endpoint.label_set) {
            set.users.swap_remove(place as usize);
            // The last of the list has its place now.
            if let Some(moved) = set.users.get(place as usize) {
                self.entries[*moved].place = place;
            }
            self.forget_unused(endpoint.label_set);
        }
    }

    fn forget_unused(&mut self, label_set: u64) {
        if self.label_sets.get(&label_set).is_some_and(|set| set.labels.is_none() && set.users.is_empty()) {
            self.label_sets.remove(&label_set);
        }
    }

    /// Stores an object whose id has none.
    fn insert(&mut self, id: u64, bytes: Box<[u8]>) {
        let object = match object::decode(&bytes) {
            Some(update) => update.object.map_err(ObjectProblem::from),
            None => Err(ObjectProblem::NotAnObject),
        };
        let slot = self.entries.insert(Entry { id, bytes, place: 0 });
        let (entries, hasher) = (&self.entries, &self.hasher);
        self.ids.insert_unique(hasher.hash_one(id), slot, |slot| hasher.hash_one(entries[*slot].id));
        match object {
            Ok(Object::Namespace { name, .. }) => drop(self.namespaces.insert(id, name)),
            Ok(Object::ServiceAccount { namespace, name, .. }) => drop(self.accounts.insert(id, (namespace, name))),
            Ok(Object::LabelSet { labels }) => {
                let mut shared = |text: &Arc<str>| {
                    self.strings.add(text);
                    self.strings.shared(text)
                };
                let labels = labels.iter().map(|(key, value)| (shared(key), shared(value))).collect();
                self.label_sets.entry(id).or_default().labels = Some(labels);
            }
            Ok(Object::Endpoint(endpoint)) => {
                let hash = hasher.hash_one((endpoint.namespace, &*endpoint.name));
                self.endpoints.insert_unique(hash, slot, |slot| name_hash(entries, hasher, *slot));
                let users = &mut self.label_sets.entry(endpoint.label_set).or_default().users;
                users.push(slot);
                self.entries[slot].place = users.len() as u32 - 1;
                endpoint.node.iter().for_each(|node| self.strings.add(node));
                endpoint.ports.iter().for_each(|port| self.strings.add(&port.name));
            }
            Ok(Object::Manifest { .. } | Object::Cluster { .. }) => {
                self.refused.insert(id, ObjectProblem::WrongKind);
            }
            Err(problem) => drop(self.refused.insert(id, problem)),
        }
    }

    fn shrink(&mut self) {
        let (entries, hasher) = (&self.entries, &self.hasher);
        self.ids.shrink_to_fit(|slot| hasher.hash_one(entries[*slot].id));
        self.endpoints.shrink_to_fit(|slot| name_hash(entries, hasher, *slot));
        for set in self.label_sets.values_mut() {
            set.users.shrink_to_fit();
        }
        self.strings.forget_unused();
    }
}

fn endpoint_of(bytes: &[u8]) -> Option<EndpointObject> {
    match object::decode(bytes)?.object {
        Ok(Object::Endpoint(endpoint)) => Some(endpoint),
        _ => None,
    }
}

fn name_hash(entries: &Slab<Slot, Entry>, hasher: &DefaultHashBuilder, slot: Slot) -> u64 {
    endpoint_of(&entries[slot].bytes).map_or(0, |it| hasher.hash_one((it.namespace, &*it.name)))
}
