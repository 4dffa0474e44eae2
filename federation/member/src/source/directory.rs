//! Reads a directory of manifests by polling.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hanse_api::Diagnostic;
use hanse_api::files::{self, Listing};
use hanse_api::manifest::{Manifests, read_bytes};

use super::{Event, Objects, Source, report};

#[cfg(test)]
mod tests;

/// Reads the manifests at and below a path. Removing a file deletes its objects. A directory without manifests, such as the mount point
/// of a volume that is not mounted, counts as unreadable.
///
/// A file is read when two consecutive polls find it unchanged, so that a file is not read while it is written. It is deleted when two
/// consecutive polls do not find it. Edits therefore take effect at the second poll. The first poll reads all files; where a stored text
/// differs from the file, it stays in force until the second. A file that the system fails to read is read again at each poll.
#[derive(Debug)]
pub struct Directory {
    path: Arc<Path>,
    files: BTreeMap<Arc<Path>, File>,
    /// What cannot be listed, and why: the directory itself, or something below it.
    unlisted: BTreeMap<PathBuf, String>,
    /// The directory was listed since the start.
    is_listed: bool,
}

#[derive(Debug, Default)]
struct File {
    /// How it looked when it was read.
    read: Option<Stamp>,
    /// How it looked last, where that differs.
    settling: Option<Stamp>,
    is_missing: bool,
}

/// What differs when a file was written or replaced. The time of the last change of status cannot be set by programs, unlike the
/// modification time, which copies preserve.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    changed: (i64, i64),
    length: u64,
    device: u64,
    inode: u64,
}

/// The interval between polls. An edit takes effect at the second poll, and must take effect within a second.
const POLL_EVERY: Duration = Duration::from_millis(100);
const POLL_AT_LEAST_EVERY: Duration = Duration::from_millis(250);
/// The problem of a directory without a manifest.
const NO_MANIFESTS: &str = "has no manifests (.yaml, .yml or .json); the last version stays in force: to remove its objects, remove the \
                            directory, or leave one manifest in the source itself, such as a Namespace";
/// The problem of a file without a document that had objects.
const EMPTY: &str = "is empty; the last version stays in force: remove the file to remove its objects";

impl Directory {
    pub fn new(path: &Path) -> Self {
        Self { path: path.into(), files: BTreeMap::new(), unlisted: BTreeMap::new(), is_listed: false }
    }

    /// Lists the directory, and reports what became unreadable, and what is readable again.
    fn list(&mut self, objects: &Objects, events: &mut Vec<Event>) -> Listing {
        let listing = files::list(&self.path);
        let mut listing = listing.unwrap_or_else(|error| Listing { unread: vec![error], ..Listing::default() });
        let problem = |why: &dyn std::fmt::Display| format!("cannot be read: {why}; the last version stays in force");
        let unread = listing.unread.drain(..).map(|it| (it.path, problem(&it.source)));
        let mut unlisted: BTreeMap<PathBuf, String> = unread.collect();
        if !unlisted.contains_key(&*self.path) {
            let emptied = self.emptied(&listing.files, objects);
            unlisted.extend(emptied.into_iter().map(|path| (path, NO_MANIFESTS.to_owned())));
        }
        let released = self.unlisted.keys().filter(|path| !unlisted.contains_key(*path));
        events.extend(released.map(|path| Event::Release(path.as_path().into())));
        for (path, problem) in unlisted.iter().filter(|(path, problem)| self.unlisted.get(*path) != Some(problem)) {
            events.push(Event::Retain(path.as_path().into(), vec![Diagnostic::of_file(path, problem.clone())]));
        }
        self.unlisted = unlisted;
        listing
    }

    fn is_hidden(&self, path: &Path) -> bool {
        !self.unlisted.is_empty() && path.ancestors().any(|it| self.unlisted.contains_key(it))
    }

    /// Directories that exist and have no manifest where they had some: a volume that is not mounted, or a checkout that failed.
    /// At the first poll, the source itself also where it never had any. `listed` is sorted.
    fn emptied(&self, listed: &[PathBuf], objects: &Objects) -> BTreeSet<PathBuf> {
        let is_missing = |path: &&Arc<Path>| listed.binary_search_by(|file| file.as_path().cmp(path)).is_err();
        let topmost = |path: &Arc<Path>| {
            let above = path.ancestors().skip(1).take_while(|it| it.starts_with(&self.path));
            let without = above.take_while(|directory| {
                let next = listed.partition_point(|file| file.as_path() < *directory);
                listed.get(next).is_none_or(|file| !file.starts_with(directory))
            });
            without.filter(|directory| directory.is_dir()).last().map(Path::to_owned)
        };
        if !self.is_listed {
            let source = listed.is_empty().then(|| self.path.to_path_buf());
            let kept = objects.unloaded().filter(|path| path.starts_with(&self.path));
            return kept.filter(is_missing).filter_map(topmost).chain(source).collect();
        }
        // At the second poll: the only file of a directory may be about to be replaced.
        let was_missing = |(path, file): &(&Arc<Path>, &File)| file.is_missing || self.is_hidden(path);
        self.files.iter().filter(was_missing).map(|(path, _)| path).filter(is_missing).filter_map(topmost).collect()
    }

    /// Reports the files that are gone.
    fn remove_missing(&mut self, listed: &[PathBuf], events: &mut Vec<Event>) {
        let mut gone = Vec::new();
        let hidden: BTreeSet<Arc<Path>> = self.files.keys().filter(|path| self.is_hidden(path)).cloned().collect();
        self.files.retain(|path, file| {
            let exists = listed.binary_search_by(|it| it.as_path().cmp(path)).is_ok() || hidden.contains(path);
            let is_gone = !exists && std::mem::replace(&mut file.is_missing, !exists);
            if is_gone {
                gone.push(Event::Remove(Arc::clone(path)));
            }
            !is_gone
        });
        events.append(&mut gone);
    }
}

impl Source for Directory {
    fn poll(&mut self, objects: &mut Objects) -> Vec<Event> {
        let mut events = Vec::new();
        // Files that were read by an earlier process.
        for origin in objects.origins().filter(|origin| origin.starts_with(&self.path)) {
            if !self.files.contains_key(origin) {
                self.files.insert(Arc::clone(origin), File::default());
            }
        }
        let listing = self.list(objects, &mut events);
        let everything: Arc<Path> = Path::new("").into();
        if self.unlisted.contains_key(&*self.path) {
            // The last good state of an earlier process is as good as one of this process.
            if !self.is_listed && objects.load(&self.path) {
                self.is_listed = true;
                events.push(Event::Synced(everything));
            }
            return events;
        }
        let is_first = !std::mem::replace(&mut self.is_listed, true);
        self.remove_missing(&listing.files, &mut events);
        for path in listing.files {
            // It is gone by now, or the next listing says why it cannot be read.
            let Some(stamp) = stamp(&path) else { continue };
            let path: Arc<Path> = path.into();
            let file = self.files.entry(Arc::clone(&path)).or_default();
            file.is_missing = false;
            if file.read.as_ref() == Some(&stamp) {
                file.settling = None;
            } else if !is_first && file.settling.as_ref() != Some(&stamp) {
                file.settling = Some(stamp);
            } else {
                let is_read = read(&path, is_first, objects, &mut events);
                (file.settling, file.read) = if is_read { (None, Some(stamp)) } else { (Some(stamp), None) };
            }
        }
        if is_first {
            events.push(Event::Synced(everything));
        }
        events
    }

    fn pause(&self, took: Duration) -> Duration {
        // Polling many files takes long, and must not use a whole processor.
        (took * 4).clamp(POLL_EVERY, POLL_AT_LEAST_EVERY)
    }
}

/// Reads one file. Returns false if it must be read again at the next poll.
fn read(path: &Arc<Path>, is_first: bool, objects: &mut Objects, events: &mut Vec<Event>) -> bool {
    let mut read = Manifests::default();
    let bytes = files::read_file(path);
    match &bytes {
        // An editor, or a copy, that was cut short.
        Ok(bytes) if bytes.trim_ascii().is_empty() && objects.has_good_objects(path) => {
            read.diagnostics.push(Diagnostic::of_file(path, EMPTY.to_owned()));
        }
        Ok(bytes) => read_bytes(&path.to_string_lossy().into(), bytes, &mut read),
        // The file may be readable later, without a change of the file.
        Err(error) if error.raw_os_error().is_some() => {
            events.push(Event::Retain(Arc::clone(path), vec![Diagnostic::of_file(path, error.to_string())]));
            return false;
        }
        Err(error) => read.diagnostics.push(Diagnostic::of_file(path, error.to_string())),
    }
    let is_good = read.diagnostics.is_empty();
    if let Ok(text) = &bytes
        && is_first
        && is_good
        && objects.load_different(path, text)
    {
        return false;
    }
    report(path, read, events);
    if let Ok(text) = bytes
        && is_good
    {
        events.push(Event::Keep(Arc::clone(path), text));
    }
    true
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let it = path.metadata().ok()?;
    let (modified, changed) = ((it.mtime(), it.mtime_nsec()), (it.ctime(), it.ctime_nsec()));
    Some(Stamp { modified, changed, length: it.len(), device: it.dev(), inode: it.ino() })
}
