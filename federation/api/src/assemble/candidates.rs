//! The objects that sources offer under each key, of which the first one wins.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use super::duplicates::{diagnostic, duplicate, key_of};
use crate::diagnostic::{Diagnostic, Reference};
use crate::manifest::Manifest;

/// The key of an object in an API server.
pub type ObjectKey = Reference;

/// Where a source has an object: its origin, such as a file, and a number in it. Of several objects with one key the one with
/// the lowest position wins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub origin: Arc<Path>,
    pub index: u32,
}

/// The object that wins under a key now; `None` for none.
#[derive(Debug, Clone)]
pub struct ObjectChange {
    pub key: Arc<ObjectKey>,
    pub object: Option<Arc<Manifest>>,
}

/// All objects of one cluster, also those that another object overrides.
#[derive(Debug, Default)]
pub struct Candidates {
    objects: HashMap<Arc<ObjectKey>, Vec<(Position, Arc<Manifest>)>>,
    /// The keys that were touched since the changes were taken last.
    touched: BTreeSet<Arc<ObjectKey>>,
    diagnostics: BTreeMap<Position, Diagnostic>,
    /// The positions whose diagnostic is new, different or gone since they were taken last.
    changed_diagnostics: BTreeSet<Position>,
}

impl Candidates {
    /// Puts an object, in the place of one that has the same key and position. Returns its key.
    pub fn put(&mut self, position: Position, manifest: Manifest) -> Arc<ObjectKey> {
        let key = key_of(&manifest);
        let key = self.objects.get_key_value(&key).map_or(key, |(key, _)| Arc::clone(key));
        let candidates = self.objects.entry(Arc::clone(&key)).or_insert_with(|| Vec::with_capacity(1));
        match candidates.binary_search_by(|(it, _)| it.cmp(&position)) {
            Ok(at) => candidates[at].1 = Arc::new(manifest),
            Err(at) => candidates.insert(at, (position, Arc::new(manifest))),
        }
        self.touched.insert(Arc::clone(&key));
        key
    }

    /// Replaces everything, for a source that reports its whole state at once.
    pub fn replace_all(&mut self, objects: impl IntoIterator<Item = Manifest>) {
        self.touched.extend(self.objects.keys().cloned());
        self.objects.values_mut().for_each(Vec::clear);
        self.changed_diagnostics.extend(std::mem::take(&mut self.diagnostics).into_keys());
        let origin: Arc<Path> = Path::new("").into();
        for (index, manifest) in (0..).zip(objects) {
            self.put(Position { origin: Arc::clone(&origin), index }, manifest);
        }
    }

    /// Removes an object; returns its key if it existed.
    pub fn remove(&mut self, position: &Position, key: &ObjectKey) -> Option<Arc<ObjectKey>> {
        let (key, _) = self.objects.get_key_value(key)?;
        let key = Arc::clone(key);
        let candidates = self.objects.get_mut(&key)?;
        let at = candidates.binary_search_by(|(it, _)| it.cmp(position)).ok()?;
        candidates.remove(at);
        if self.diagnostics.remove(position).is_some() {
            self.changed_diagnostics.insert(position.clone());
        }
        self.touched.insert(Arc::clone(&key));
        Some(key)
    }

    /// The winner under each key that was touched since the last call.
    pub fn take_changes(&mut self) -> Vec<ObjectChange> {
        let touched = std::mem::take(&mut self.touched);
        let change = |key: Arc<ObjectKey>| {
            self.judge(&key);
            let object = self.objects.get(&key).and_then(|it| it.first()).map(|(_, object)| Arc::clone(object));
            if object.is_none() {
                self.objects.remove(&key);
            }
            ObjectChange { key, object }
        };
        touched.into_iter().map(change).collect()
    }

    /// What is wrong with objects that do not win, or do not belong to a cluster. True of the changes that were taken.
    pub fn diagnostics(&self) -> impl Iterator<Item = &Diagnostic> {
        self.diagnostics.values()
    }

    /// What is wrong with the object at each position where that has changed since the last call, like [`Self::diagnostics`].
    pub fn take_changed_diagnostics(&mut self) -> Vec<(Position, Option<Diagnostic>)> {
        let changed = std::mem::take(&mut self.changed_diagnostics);
        changed.into_iter().map(|position| (position.clone(), self.diagnostics.get(&position).cloned())).collect()
    }

    fn judge(&mut self, key: &ObjectKey) {
        let candidates = self.objects.get(key).map_or(&[][..], Vec::as_slice);
        for (position, manifest) in candidates {
            let found = match candidates.first() {
                Some((first, winner)) if first != position => Some(duplicate(manifest, &winner.location)),
                _ if manifest.object.is_federated() => {
                    let message = "belongs to the federation: apply it at the hub, or give it with --federation";
                    Some(diagnostic(manifest, "kind", message.to_owned()))
                }
                _ => None,
            };
            if self.diagnostics.get(position) == found.as_ref() {
                continue;
            }
            self.changed_diagnostics.insert(position.clone());
            match found {
                Some(found) => drop(self.diagnostics.insert(position.clone(), found)),
                None => drop(self.diagnostics.remove(position)),
            }
        }
    }
}
