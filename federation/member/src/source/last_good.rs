//! Keeps the last good state of any source, also across restarts: an unreadable origin never counts as an empty one.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hanse_api::Diagnostic;
use hanse_api::assemble::{Candidates, ObjectKey, Position};
use hanse_api::manifest::Manifest;
use hanse_api::shared::Shared;

use super::kept::Kept;
use super::problems::{ProblemChange, Scope, limited, log_new};
use super::{Changes, Event, Source};

#[cfg(test)]
mod tests;

/// A source, with the last good state of unreadable origins.
#[derive(Debug)]
pub struct LastGood<S> {
    source: S,
    objects: Objects,
    /// Changes have been reported.
    is_started: bool,
}

/// The objects in force, by origin.
#[derive(Debug)]
pub struct Objects {
    candidates: Candidates,
    shared: Shared,
    origins: BTreeMap<Arc<Path>, Origin>,
    /// Origins with a stored state that the source has not reported since the start.
    unloaded: BTreeSet<Arc<Path>>,
    /// Unreadable scopes.
    retained: BTreeMap<Arc<Path>, Arc<[Diagnostic]>>,
    /// The number of problems of these scopes.
    problem_count: usize,
    /// The scopes whose problems have changed since the changes were reported.
    changed_problems: BTreeSet<Arc<Path>>,
    /// The start of the listing of each scope that is not synced.
    listing: BTreeMap<Arc<Path>, u64>,
    /// The number of events.
    clock: u64,
    /// The whole source was synced at least once.
    is_synced: bool,
    /// The stored states of origins that were not reported must be removed.
    sweeps: bool,
    kept: Kept,
}

#[derive(Debug, Default)]
struct Origin {
    /// It was read completely, now or earlier.
    is_good: bool,
    /// The objects, in their order. Most origins have one.
    objects: Vec<Sent>,
}

#[derive(Debug)]
struct Sent {
    index: u32,
    key: Arc<ObjectKey>,
    /// The value of `clock` when it was last sent.
    at: u64,
}

impl Origin {
    fn find(&self, index: u32, key: &ObjectKey) -> Result<usize, usize> {
        self.objects.binary_search_by(|it| (it.index, &*it.key).cmp(&(index, key)))
    }

    fn put(&mut self, index: u32, key: Arc<ObjectKey>, at: u64) {
        match self.find(index, &key) {
            Ok(found) => self.objects[found].at = at,
            Err(place) => {
                if self.objects.is_empty() {
                    self.objects.reserve_exact(1);
                }
                self.objects.insert(place, Sent { index, key, at });
            }
        }
    }

    fn remove(&mut self, index: u32, key: &ObjectKey) {
        if let Ok(found) = self.find(index, key) {
            self.objects.remove(found);
        }
    }
}

impl<S: Source> LastGood<S> {
    /// `kept`: the texts of an earlier process.
    pub fn new(source: S, kept: Kept) -> Self {
        let objects = Objects {
            candidates: Candidates::default(),
            shared: Shared::default(),
            origins: BTreeMap::new(),
            unloaded: kept.origins().cloned().collect(),
            retained: BTreeMap::new(),
            problem_count: 0,
            changed_problems: BTreeSet::new(),
            listing: BTreeMap::new(),
            clock: 0,
            is_synced: false,
            sweeps: false,
            kept,
        };
        Self { source, objects, is_started: false }
    }

    /// With the texts of origins that an earlier process has stored elsewhere; those of its own file are newer.
    #[must_use]
    pub fn with_texts(mut self, texts: impl Iterator<Item = (Arc<Path>, Vec<u8>)>) -> Self {
        for (origin, text) in texts {
            if self.objects.unloaded.insert(Arc::clone(&origin)) {
                self.objects.kept.keep(origin, text);
            }
        }
        self
    }

    /// The time until the next poll, after one that took `took`.
    pub fn pause(&self, took: Duration) -> Duration {
        self.source.pause(took)
    }

    /// The changes since the last call. `None`: there are none, or the source is not synced yet. May block.
    pub fn poll(&mut self) -> Option<Changes> {
        let changes = self.take_changes();
        self.objects.kept.flush();
        changes
    }

    fn take_changes(&mut self) -> Option<Changes> {
        let state = &mut self.objects;
        let sweeps = std::mem::take(&mut state.sweeps);
        let events = self.source.poll(state);
        let mut changed = false;
        for event in events {
            changed |= state.apply(event);
        }
        if sweeps {
            state.sweep();
        }
        if !state.is_synced {
            return None;
        }
        if !changed && self.is_started {
            return None;
        }
        if !self.is_started {
            // Most origins came in their order, which leaves each node of the map half empty.
            state.origins = std::mem::take(&mut state.origins).into_iter().collect();
        }
        self.is_started = true;
        let objects = state.candidates.take_changes();
        Some(Changes { objects, problems: state.take_problems(), revision: state.kept.advance() })
    }
}

impl Objects {
    /// The origins with objects in force, and those that were read without any.
    pub fn origins(&self) -> impl Iterator<Item = &Arc<Path>> {
        self.origins.keys()
    }

    /// Origins with a stored state that the source has not reported since the start.
    pub fn unloaded(&self) -> impl Iterator<Item = &Arc<Path>> {
        self.unloaded.iter()
    }

    /// Whether an origin was read, by this process or an earlier one, and exists.
    pub fn has_origin(&self, origin: &Path) -> bool {
        self.origins.contains_key(origin) || self.unloaded.contains(origin)
    }

    /// Whether an origin at or below a scope was read, by this process or an earlier one, and exists.
    pub fn has_origin_within(&self, scope: &Path) -> bool {
        let origin = self.origins.range::<Path, _>(from(scope)).next().map(|(origin, _)| origin);
        let unloaded = self.unloaded.range::<Path, _>(from(scope)).next();
        [origin, unloaded].into_iter().flatten().any(|origin| origin.starts_with(scope))
    }

    /// The origins at and below a scope that were read, by this process or an earlier one, and exist.
    pub fn origins_within(&self, scope: &Path) -> BTreeSet<Arc<Path>> {
        within_keys(&self.origins, scope).into_iter().chain(within(&self.unloaded, scope)).collect()
    }

    /// Whether an origin has objects and was read completely.
    pub fn has_good_objects(&mut self, origin: &Path) -> bool {
        self.load(origin);
        self.origins.get(origin).is_some_and(|it| it.is_good && !it.objects.is_empty())
    }

    /// The stored text of an origin.
    pub fn text(&self, origin: &Path) -> Option<Vec<u8>> {
        self.kept.text(origin)
    }

    /// Restores the stored state of a scope. Returns whether the scope has an origin.
    pub fn load(&mut self, scope: &Path) -> bool {
        for origin in within(&self.unloaded, scope) {
            self.unloaded.remove(&origin);
            let Some(restored) = self.kept.restore(&origin) else { continue };
            for (index, manifest) in (0..).zip(restored.objects) {
                self.put(Position { origin: Arc::clone(&origin), index }, manifest);
            }
            self.origins.entry(origin).or_default().is_good = restored.is_good;
        }
        self.origins.range::<Path, _>(from(scope)).next().is_some_and(|(origin, _)| origin.starts_with(scope))
    }

    /// Restores the stored state of an origin that the source has not reported since the start, if it differs from `text`. Returns whether
    /// it did.
    pub fn load_different(&mut self, origin: &Path, text: &[u8]) -> bool {
        self.unloaded.contains(origin) && !self.kept.is_kept(origin, text) && self.load(origin)
    }

    /// Applies an event. Returns whether objects in force or problems changed.
    fn apply(&mut self, event: Event) -> bool {
        self.clock += 1;
        match event {
            Event::Upsert(position, manifest) => {
                self.unloaded.remove(&position.origin);
                self.put(position, *manifest);
                true
            }
            Event::Partial(position, manifest) => {
                let is_used = !self.is_good(&position.origin);
                if is_used {
                    self.put(position, *manifest);
                }
                is_used
            }
            Event::Delete(position, key) => self.delete(&position, &key),
            Event::Remove(scope) => {
                self.remove(&scope);
                true
            }
            Event::Retain(scope, problems) => {
                self.load(&scope);
                self.retain(scope, problems)
            }
            Event::Release(scope) => self.release(scope),
            Event::Relist(scope) => {
                self.listing.insert(scope, self.clock);
                false
            }
            Event::Synced(scope) => self.synced(&scope),
            Event::Keep(origin, text) => {
                self.unloaded.remove(&origin);
                self.origins.entry(Arc::clone(&origin)).or_default().is_good = true;
                self.kept.keep(origin, text);
                true
            }
            Event::KeepPartial(origin, text) => {
                if !self.is_good(&origin) {
                    self.kept.keep(origin, text);
                }
                false
            }
        }
    }

    fn is_good(&mut self, origin: &Path) -> bool {
        self.load(origin);
        self.origins.get(origin).is_some_and(|it| it.is_good)
    }

    fn put(&mut self, position: Position, mut manifest: Manifest) {
        self.shared.share(&mut manifest.object);
        let (origin, index) = (Arc::clone(&position.origin), position.index);
        let key = self.candidates.put(position, manifest);
        self.origins.entry(origin).or_default().put(index, key, self.clock);
    }

    fn delete(&mut self, position: &Position, key: &ObjectKey) -> bool {
        let Some(origin) = self.origins.get_mut(&position.origin) else { return false };
        let Some(key) = self.candidates.remove(position, key) else { return false };
        origin.remove(position.index, &key);
        true
    }

    fn remove(&mut self, scope: &Path) {
        for origin in within(&self.unloaded, scope) {
            self.unloaded.remove(&origin);
            self.kept.forget(&origin);
        }
        for origin in within_keys(&self.origins, scope) {
            for Sent { index, key, .. } in self.origins.remove(&origin).unwrap_or_default().objects {
                self.candidates.remove(&Position { origin: Arc::clone(&origin), index }, &key);
            }
            self.kept.forget(&origin);
        }
        for scope in within_keys(&self.retained, scope) {
            self.release(scope);
        }
    }

    fn retain(&mut self, scope: Arc<Path>, problems: Vec<Diagnostic>) -> bool {
        let problems = limited(problems, self.problem_count);
        let before = self.retained.insert(Arc::clone(&scope), Arc::clone(&problems));
        self.problem_count =
            (self.problem_count + problems.len()).saturating_sub(before.as_ref().map_or(0, |it| it.len()));
        if before.as_ref() == Some(&problems) {
            return false;
        }
        log_new(before.as_deref().unwrap_or_default(), &problems);
        self.changed_problems.insert(scope);
        true
    }

    fn release(&mut self, scope: Arc<Path>) -> bool {
        let Some(before) = self.retained.remove(&scope) else { return false };
        self.problem_count = self.problem_count.saturating_sub(before.len());
        self.changed_problems.insert(scope);
        true
    }

    /// Deletes the objects of a scope that were not sent since its listing started, unless they are retained.
    fn synced(&mut self, scope: &Arc<Path>) -> bool {
        let mut changed = false;
        if let Some(began) = self.listing.remove(scope) {
            for path in within_keys(&self.origins, scope) {
                let is_retained = self.is_retained(&path);
                let Some(origin) = self.origins.get_mut(&path) else { continue };
                if is_retained && origin.is_good {
                    continue;
                }
                let unsent: Vec<Sent> = origin.objects.extract_if(.., |sent| sent.at < began).collect();
                let is_gone = origin.objects.is_empty() && !unsent.is_empty() && path != *scope;
                changed |= !unsent.is_empty();
                for Sent { index, key, .. } in unsent {
                    self.candidates.remove(&Position { origin: Arc::clone(&path), index }, &key);
                }
                if is_gone {
                    self.origins.remove(&path);
                    self.kept.forget(&path);
                }
            }
        }
        if scope.as_os_str().is_empty() {
            changed |= !self.is_synced;
            (self.is_synced, self.sweeps) = (true, true);
        }
        changed
    }

    fn is_retained(&self, origin: &Path) -> bool {
        !self.retained.is_empty() && origin.ancestors().any(|scope| self.retained.contains_key(scope))
    }

    /// Removes the stored states of origins that no longer exist. Otherwise they would be restored when the source is unreadable later.
    fn sweep(&mut self) {
        for origin in std::mem::take(&mut self.unloaded) {
            self.kept.forget(&origin);
        }
    }

    /// The problems that have changed since the last call. True of the changes of objects that were taken.
    fn take_problems(&mut self) -> Vec<ProblemChange> {
        let of_objects = self.candidates.take_changed_diagnostics().into_iter().map(|(position, found)| {
            let problems: Arc<[Diagnostic]> = found.into_iter().collect();
            log_new(&[], &problems);
            ProblemChange { scope: Scope::new(position.origin, Some(position.index)), problems }
        });
        let of_scopes = std::mem::take(&mut self.changed_problems).into_iter().map(|scope| {
            let problems = self.retained.get(&scope).cloned().unwrap_or_default();
            ProblemChange { scope: Scope::new(scope, None), problems }
        });
        of_objects.chain(of_scopes).collect()
    }
}

fn from(scope: &Path) -> (Bound<&Path>, Bound<&Path>) {
    (Bound::Included(scope), Bound::Unbounded)
}

/// The paths that are `scope` or below it.
fn within(paths: &BTreeSet<Arc<Path>>, scope: &Path) -> Vec<Arc<Path>> {
    paths.range::<Path, _>(from(scope)).take_while(|path| path.starts_with(scope)).cloned().collect()
}

fn within_keys<V>(paths: &BTreeMap<Arc<Path>, V>, scope: &Path) -> Vec<Arc<Path>> {
    paths
        .range::<Path, _>(from(scope))
        .take_while(|(path, _)| path.starts_with(scope))
        .map(|(path, _)| path.clone())
        .collect()
}
