//! Where a member learns of its own cluster.
//!
//! [`Source`] is what the process needs; [`Directory`] reads a directory of ordinary Kubernetes YAML. A source tells what is
//! new, part by part, so that an edit costs what it touches. It never takes "cannot be read" for "empty": what was last good
//! stays in force, and the problem is named.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use hanse_api::Diagnostic;
use hanse_api::files;
use hanse_api::manifest::{self, Manifest, Manifests};
use hanse_runtime::files::private_folder;
use hanse_runtime::health::Writes;

/// What is new in a cluster.
#[derive(Debug, Clone, Default)]
pub struct News {
    /// What is new or different, such as a file, with all the objects that it has now: none when it is gone. At first,
    /// everything.
    pub parts: Vec<(Arc<Path>, Vec<Manifest>)>,
    /// All that cannot be read, with file and line.
    pub problems: Vec<Diagnostic>,
    /// Grows with each change, across restarts too.
    pub revision: u64,
}

/// Tells what changed in the cluster.
pub trait Source: Send {
    /// Looks, and gives what changed since the last call. Blocking.
    fn look(&mut self) -> Option<News>;
}

/// Warns of each problem when it comes up.
#[derive(Debug, Default)]
pub struct Warned(BTreeSet<(Arc<str>, u32, String)>);

impl Warned {
    /// `problems` are all that there are now.
    pub fn warn(&mut self, problems: &[Diagnostic]) {
        let now = problems.iter().map(|it| (it.location.file.clone(), it.location.line, it.message.clone())).collect();
        let before = std::mem::replace(&mut self.0, now);
        for it in problems {
            if !before.contains(&(it.location.file.clone(), it.location.line, it.message.clone())) {
                let (file, line) = (&*it.location.file, it.location.line);
                tracing::warn!(file, line, field = it.field, problem = it.message, "a manifest is not used as written");
            }
        }
    }
}

/// A directory of manifests. A file that breaks keeps its last good state, across restarts too; one that is gone is gone. A directory
/// that is there and has no manifest any more, such as the place of a volume that is not mounted, counts as one that cannot be
/// read.
///
/// What is being written is not looked at: a file counts when it looked the same twice in a row, and is gone when it was
/// not there twice. So it must be looked at more often than edits must apply.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Where the last good state of each file is kept.
    kept: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Files that are gone, which is not told yet.
    gone: Vec<PathBuf>,
    /// What cannot be listed, and why, while it cannot: the directory itself, which may also be empty, or something below it.
    unlisted: BTreeMap<PathBuf, String>,
    revisions: Revisions,
    /// It was read since the start.
    is_read: bool,
    /// States of files that went while nobody looked are kept no more.
    is_swept: bool,
    warned: Warned,
    writes: Writes,
    keep_again_at: Option<Instant>,
}

#[derive(Debug, Default)]
struct File {
    /// As it was read.
    seen: Option<Stamp>,
    /// As it looked last, when that is something else.
    settling: Option<Stamp>,
    missing: bool,
    /// Its last good state, or of a file that never was good what could be read of it, policies in doubt too, until that is
    /// told.
    news: Option<Vec<Manifest>>,
    has_objects: bool,
    was_good: bool,
    /// Why its last good state could not be kept.
    unkept: Option<std::io::Error>,
    problems: Vec<Diagnostic>,
}

/// What differs when a file was written or replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    length: u64,
    inode: u64,
}

/// Numbers that grow, across restarts too.
#[derive(Debug)]
pub struct Revisions {
    path: PathBuf,
    last: u64,
}

impl Revisions {
    /// Goes on behind what `path` holds.
    pub fn open(path: PathBuf) -> Self {
        let last = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        Self { path, last: last.unwrap_or(0) }
    }

    /// The next; kept before it is given. One that cannot be kept may come again.
    pub fn advance(&mut self) -> (u64, std::io::Result<()>) {
        self.last = self.last.saturating_add(1);
        (self.last, self.keep())
    }

    fn keep(&self) -> std::io::Result<()> {
        replace(&self.path, format!("{}\n", self.last).as_bytes())
    }
}

impl Directory {
    /// Reads `path`; `data` is the folder of the member's files. Tells `writes` what cannot be kept there.
    pub fn new(path: PathBuf, data: &Path, writes: Writes) -> Self {
        let kept = data.join("source");
        if let Err(error) = private_folder(&kept) {
            tracing::error!(%error, path = %kept.display(), "last good states cannot be kept");
        }
        Self {
            path,
            files: BTreeMap::new(),
            gone: Vec::new(),
            unlisted: BTreeMap::new(),
            revisions: Revisions::open(kept.join("revision")),
            kept,
            is_read: false,
            is_swept: false,
            warned: Warned::default(),
            writes,
            keep_again_at: None,
        }
    }

    /// Keeps what could not be kept before.
    fn keep_again(&mut self) {
        if self.keep_again_at.is_none_or(|at| Instant::now() < at) {
            return;
        }
        self.keep_again_at = None;
        for (path, file) in self.files.iter_mut().filter(|(_, file)| file.unkept.is_some()) {
            let Ok(bytes) = files::read_file(path) else { continue };
            let mut read = Manifests::default();
            manifest::read_bytes(&path.to_string_lossy().into(), &bytes, &mut read);
            // What is broken by now is not what was good.
            if read.diagnostics.is_empty() {
                file.unkept = keep(&self.kept, path, &bytes).err();
            }
        }
        let revision = self.revisions.keep();
        self.note_kept(&revision);
    }

    /// Tells what could not be kept, which is tried again.
    fn note_kept(&mut self, revision: &std::io::Result<()>) {
        let failed = self.files.values().find_map(|file| file.unkept.as_ref());
        let states = failed.map_or(Ok(()), |error| Err(std::io::Error::new(error.kind(), error.to_string())));
        self.writes.note(STATES, &states);
        self.writes.note(REVISION, revision);
        if states.is_err() || revision.is_err() {
            self.keep_again_at.get_or_insert_with(|| Instant::now() + KEEP_AGAIN);
        }
    }

    /// Brings `files` up to date; whether anything changed.
    fn refresh(&mut self) -> bool {
        let listing = match files::list(&self.path) {
            Ok(listing) => listing,
            Err(error) => files::Listing { unread: vec![error], ..files::Listing::default() },
        };
        let cannot = |why: &dyn std::fmt::Display| format!("cannot be read: {why}; what was read last stays in force");
        let unlisted = listing.unread.iter().map(|it| (it.path.clone(), cannot(&it.source)));
        let mut unlisted: BTreeMap<PathBuf, String> = unlisted.collect();
        if !unlisted.contains_key(&self.path) {
            let emptied = self.emptied(&listing.files);
            unlisted.extend(emptied.into_iter().map(|path| (path, NO_MANIFESTS.to_owned())));
        }
        let mut changed = self.unlisted != unlisted;
        self.unlisted = unlisted;
        if self.unlisted.contains_key(&self.path) {
            // What an earlier process read is as good as what this one did.
            if changed && !self.is_read {
                self.files = restore_all(&self.kept, &self.path);
            }
            return changed;
        }
        let (kept, first, unlisted, went) = (&self.kept, !self.is_read, &self.unlisted, &mut self.gone);
        if first && !unlisted.is_empty() {
            let hidden = restore_all(kept, &self.path).into_iter();
            self.files.extend(hidden.filter(|(path, _)| path.ancestors().any(|it| unlisted.contains_key(it))));
        }
        self.files.retain(|path, file| {
            let is_there = listing.files.binary_search(path).is_ok()
                || path.ancestors().any(|hidden| unlisted.contains_key(hidden));
            let gone = !is_there && std::mem::replace(&mut file.missing, !is_there);
            if gone {
                // What stays is overwritten or never looked at.
                let _ = std::fs::remove_file(kept_name(kept, path));
                went.push(path.clone());
                changed = true;
            }
            !gone
        });
        for path in listing.files {
            // It is gone by now, or the next listing says why it cannot be looked at.
            let Some(stamp) = stamp(&path) else { continue };
            let file = self.files.entry(path.clone()).or_default();
            file.missing = false;
            if file.seen.as_ref() == Some(&stamp) {
                file.settling = None;
                continue;
            }
            if !first && file.settling.as_ref() != Some(&stamp) {
                file.settling = Some(stamp);
                continue;
            }
            file.settling = None;
            file.seen = Some(stamp);
            changed |= file.read(&path, kept);
        }
        // At the second look, so that what is just being replaced is not taken for gone.
        if !first && !self.is_swept && self.unlisted.is_empty() {
            sweep(&self.kept, self.files.keys());
            self.is_swept = true;
        }
        changed
    }

    /// Directories that are there, and have no manifest where they had some: a volume that is not mounted, or a checkout that failed.
    /// At the first look, the directory also where it never had any. `listed` is sorted.
    fn emptied(&self, listed: &[PathBuf]) -> BTreeSet<PathBuf> {
        let is_missing = |path: &&PathBuf| listed.binary_search(path).is_err();
        let topmost = |path: &PathBuf| {
            let above = path.ancestors().skip(1).take_while(|it| it.starts_with(&self.path));
            let without = above.take_while(|directory| {
                let next = listed.partition_point(|file| file.as_path() < *directory);
                listed.get(next).is_none_or(|file| !file.starts_with(directory))
            });
            without.filter(|directory| directory.is_dir()).last().map(Path::to_owned)
        };
        if !self.is_read {
            let of_nothing = listed.is_empty().then(|| self.path.clone());
            let kept: Vec<PathBuf> = kept_paths(&self.kept).filter(|path| path.starts_with(&self.path)).collect();
            return kept.iter().filter(is_missing).filter_map(topmost).chain(of_nothing).collect();
        }
        // At the second look: the only file of a directory may be about to be replaced.
        let was_missing = |(path, file): &(&PathBuf, &File)| {
            file.missing || path.ancestors().any(|above| self.unlisted.contains_key(above))
        };
        self.files.iter().filter(was_missing).map(|(path, _)| path).filter(is_missing).filter_map(topmost).collect()
    }

    /// What cannot be listed.
    fn hidden(&self) -> Vec<Diagnostic> {
        self.unlisted.iter().map(|(path, problem)| Diagnostic::of_file(path, problem.clone())).collect()
    }
}

impl File {
    fn good(objects: Vec<Manifest>) -> Self {
        Self { has_objects: !objects.is_empty(), news: Some(objects), was_good: true, ..Self::default() }
    }

    /// Reads anew; whether the file's part of the state, or its problems, changed.
    fn read(&mut self, path: &Path, kept: &Path) -> bool {
        let mut read = Manifests::default();
        let problem = |message: String| Diagnostic::of_file(path, message);
        let bytes = files::read_file(path);
        if !self.was_good
            && let Some(objects) = restore(kept, path)
        {
            *self = Self { seen: self.seen.take(), ..Self::good(objects) };
        }
        match &bytes {
            // An editor, or a copy, that was cut short: who means it removes the file.
            Ok(bytes) if bytes.trim_ascii().is_empty() && self.was_good && self.has_objects => {
                let message = "is empty; what was read last stays in force: remove the file to remove its objects";
                read.diagnostics.push(problem(message.to_owned()));
            }
            Ok(bytes) => manifest::read_bytes(&path.to_string_lossy().into(), bytes, &mut read),
            Err(error) => read.diagnostics.push(problem(error.to_string())),
        }
        let broken = !read.diagnostics.is_empty();
        let mut news = self.problems != read.diagnostics || !broken;
        self.problems = read.diagnostics;
        if let Ok(bytes) = bytes
            && !broken
        {
            self.unkept = keep(kept, path, &bytes).err();
        }
        if !broken || !self.was_good {
            read.objects.append(&mut read.in_doubt);
            (self.has_objects, self.news) = (!read.objects.is_empty(), Some(read.objects));
        }
        self.was_good |= !broken;
        news |= self.news.is_some();
        news
    }
}

/// Of a directory without a manifest.
const NO_MANIFESTS: &str = "has no manifests (.yaml, .yml or .json); what was read last stays in force: to remove its objects, remove the \
                            directory, or of the source itself leave one manifest, such as a Namespace";
const HEADER: &[u8] = b"hanse-source/2\n";
/// When what could not be kept is tried again.
const KEEP_AGAIN: Duration = Duration::from_secs(2);
/// As they are named where they cannot be written.
const STATES: &str = "the last good state of the source";
const REVISION: &str = "the revision of the source";

fn kept_name(kept: &Path, path: &Path) -> PathBuf {
    kept.join(format!("{}.kept", blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex()))
}

/// Keeps a good state. One that a crash damaged is seen by its hash and not used.
fn keep(kept: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let body = [path.as_os_str().as_encoded_bytes(), &[0], bytes].concat();
    let file = [HEADER, blake3::hash(&body).as_bytes(), &body].concat();
    replace(&kept_name(kept, path), &file)
}

fn restore(kept: &Path, path: &Path) -> Option<Vec<Manifest>> {
    let (of, objects) = restore_file(&kept_name(kept, path))?;
    (of == path).then_some(objects)
}

/// A kept state, with the path of the file that it is of.
fn restore_file(name: &Path) -> Option<(PathBuf, Vec<Manifest>)> {
    use std::os::unix::ffi::OsStrExt as _;
    let file = std::fs::read(name).ok()?;
    let (hash, body) = file.strip_prefix(HEADER)?.split_at_checked(32)?;
    let end = body.iter().position(|byte| *byte == 0)?;
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(&body[..end]));
    let mut read = Manifests::default();
    manifest::read_bytes(&path.to_string_lossy().into(), &body[end + 1..], &mut read);
    (blake3::hash(body).as_bytes() == hash && read.diagnostics.is_empty()).then_some((path, read.objects))
}

/// The files of which a state is kept.
fn kept_paths(kept: &Path) -> impl Iterator<Item = PathBuf> {
    use std::os::unix::ffi::OsStrExt as _;
    kept_names(kept).filter_map(|name| {
        let file = std::fs::read(name).ok()?;
        let body = file.strip_prefix(HEADER)?.get(32..)?;
        let path = body.split(|byte| *byte == 0).next()?;
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(path)))
    })
}

/// Every state that is kept of what is in or below `path`, as of files that were read.
fn restore_all(kept: &Path, path: &Path) -> BTreeMap<PathBuf, File> {
    let good = |(path, objects)| (path, File::good(objects));
    let restored = kept_names(kept).filter_map(|name| {
        let restored = restore_file(&name);
        if restored.is_none() {
            tracing::warn!(path = %name.display(), "a kept state is damaged, or of an earlier version: it is not used");
        }
        restored
    });
    restored.filter(|(of, _)| of.starts_with(path)).map(good).collect()
}

fn kept_names(kept: &Path) -> impl Iterator<Item = PathBuf> {
    let names = kept.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    names.filter(|name| name.extension().is_some_and(|extension| extension == "kept"))
}

/// Removes what is kept of other files than `of`: a source that cannot be read would bring them back.
fn sweep<'a>(kept: &Path, of: impl Iterator<Item = &'a PathBuf>) {
    let names: BTreeSet<PathBuf> = of.map(|path| kept_name(kept, path)).collect();
    for name in kept_names(kept).filter(|name| !names.contains(name)) {
        if let Err(error) = std::fs::remove_file(&name) {
            tracing::warn!(%error, path = %name.display(), "the state of a file that is gone cannot be removed");
        }
    }
}

/// Whole or not at all, for whoever reads it; not flushed, for there may be many.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, path)
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = path.metadata().ok()?;
    Some(Stamp { modified: metadata.modified().ok(), length: metadata.len(), inode: metadata.ino() })
}

impl Source for Directory {
    fn look(&mut self) -> Option<News> {
        self.keep_again();
        if !self.refresh() && self.is_read {
            return None;
        }
        // Nothing was ever read: unknown, not empty.
        if self.unlisted.contains_key(&self.path) && !self.is_read && self.files.is_empty() {
            self.warned.warn(&self.hidden());
            return None;
        }
        self.is_read = true;
        let gone = self.gone.drain(..).map(|path| (path.as_path().into(), Vec::new()));
        let mut parts: Vec<(Arc<Path>, Vec<Manifest>)> = gone.collect();
        let files = self.files.iter_mut();
        parts.extend(files.filter_map(|(path, file)| Some((path.as_path().into(), file.news.take()?))));
        let mut problems: Vec<Diagnostic> = self.files.values().flat_map(|file| file.problems.clone()).collect();
        problems.extend(self.hidden());
        let (revision, kept) = self.revisions.advance();
        self.note_kept(&kept);
        Some(News { parts, problems, revision })
    }
}

#[cfg(test)]
mod tests {
    use hanse_api::assemble::Assembly;

    use hanse_runtime::health::Health;

    use super::*;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a}\nstatus: {podIP: 10.0.0.1}\n";

    struct World {
        folder: tempfile::TempDir,
        source: Directory,
        /// What its news come to, which a member that starts again does not know.
        told: Assembly,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let source = Self::open(folder.path());
            Self { folder, source, told: Assembly::new("c".into()) }
        }

        fn open(folder: &Path) -> Directory {
            Directory::new(folder.join("cluster"), &folder.join("data"), Writes::new(&Health::default()))
        }

        /// A member that starts again on the same files.
        fn restart(&mut self) {
            self.source = Self::open(self.folder.path());
            self.told = Assembly::new("c".into());
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join("cluster").join(name)
        }

        /// In place, as a shell does it; a file's time may stand still, so its length must differ.
        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.path(name), text).expect("written");
        }

        /// What is new after two looks: pods, problems.
        fn settled(&mut self) -> Option<(Vec<String>, Vec<Diagnostic>)> {
            assert!(self.source.look().is_none(), "it may be half written");
            self.look()
        }

        fn look(&mut self) -> Option<(Vec<String>, Vec<Diagnostic>)> {
            let news = self.source.look()?;
            self.told.update(news.parts);
            let state = self.told.state();
            let pods = state.cluster.endpoints.keys().map(|id| id.name.to_string()).collect();
            Some((pods, news.problems.into_iter().chain(state.diagnostics.iter().cloned()).collect()))
        }
    }

    fn pod(name: &str, address: &str) -> String {
        POD.replace("name: p", &format!("name: {name}")).replace("10.0.0.1", address)
    }

    fn check(world: &mut World, pods: &[&str], problems: usize) -> Vec<Diagnostic> {
        let (found, told) = world.settled().expect("news");
        assert_eq!((found.iter().map(String::as_str).collect::<Vec<_>>(), told.len()), (pods.to_vec(), problems));
        assert!(world.look().is_none() && world.look().is_none(), "no more news");
        told
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_state() {
        let mut world = World::new();
        assert!(world.look().is_none(), "a directory that cannot be read is not an empty one");
        std::fs::create_dir(world.path("")).expect("made");
        world.write("pod.yaml", POD);
        assert_eq!(world.look().expect("the first look takes what is there"), (vec!["p".to_owned()], vec![]));
        world.write("pod.yaml", "apiVersion: v1\nkind: [\n");
        let told = check(&mut world, &["p"], 1);
        assert!(told[0].location.file.ends_with("pod.yaml") && told[0].location.line >= 2, "{told:?}");
        world.write("other.yaml", &pod("q", "10.0.0.2"));
        check(&mut world, &["p", "q"], 1);
        let (cluster, away) = (world.path(""), world.folder.path().join("away"));
        std::fs::rename(&cluster, &away).expect("renamed");
        let (pods, told) = world.look().expect("the problem is news");
        assert_eq!((pods.len(), told.len()), (2, 2), "what cannot be listed stays");
        assert!(world.look().is_none());
        std::fs::rename(&away, &cluster).expect("renamed");
        assert_eq!(world.look().expect("listed again").1.len(), 1);
        std::fs::remove_file(world.path("pod.yaml")).expect("removed");
        check(&mut world, &["q"], 0);
    }

    #[test]
    fn the_last_good_state_outlives_a_restart() {
        let mut world = World::new();
        std::fs::create_dir(world.path("")).expect("made");
        world.write("pod.yaml", POD);
        let first = world.source.look().expect("read").revision;
        world.write("pod.yaml", "apiVersion: v1\nkind: [\n");
        world.restart();
        let read = world.source.look().expect("read");
        assert!(read.revision > first, "revisions grow across a restart");
        let objects = read.parts.iter().map(|(_, objects)| objects.len()).sum::<usize>();
        assert_eq!((objects, read.problems.len()), (1, 1));
        // Gone while nobody looked, and here again, broken from the start.
        world.write("other.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: other}\n");
        std::fs::remove_file(world.path("pod.yaml")).expect("removed");
        check(&mut world, &[], 0);
        world.write("pod.yaml", "apiVersion: v1\nkind: [\n");
        check(&mut world, &[], 1);
        // What can be read of it is taken, though what is wrong with it stays the same.
        world.write("pod.yaml", &format!("{}---\n{POD}---\napiVersion: v1\nkind: [\n", pod("p", "10.0.0.9")));
        check(&mut world, &["p"], 2);
        world.write(
            "pod.yaml",
            &format!("{}---\n{}---\napiVersion: v1\nkind: [\n", pod("p", "10.0.0.9"), pod("q", "10.0.0.1")),
        );
        check(&mut world, &["p", "q"], 1);
        // A kept state that was damaged is none.
        world.write("pod.yaml", POD);
        check(&mut world, &["p"], 0);
        let kept = kept_name(&world.source.kept, &world.path("pod.yaml"));
        let mut bytes = std::fs::read(&kept).expect("kept");
        // Another address, which would be read as well.
        let last = bytes.iter().rposition(|byte| *byte == b'1').expect("10.0.0.1");
        bytes[last] = b'2';
        std::fs::write(&kept, bytes).expect("written");
        world.write("pod.yaml", "apiVersion: v1\nkind: [\n");
        world.restart();
        assert_eq!(world.look().expect("read").0.len(), 0);
    }

    /// Of a file that never was good the rest is taken, and a policy of which something is not known as far as it closes.
    #[test]
    fn a_policy_that_never_was_known_whole_closes() {
        let policy = |spec: &str| {
            let head = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: a}\n";
            format!("{head}spec: {spec}\n")
        };
        let rules = |world: &World| {
            let state = world.told.state();
            let policies = state.layer.policies.values();
            let rules =
                policies.map(|it| it.ingress.iter().flatten().map(|rule| rule.not_understood.is_some()).collect());
            rules.collect::<Vec<Vec<bool>>>()
        };
        let mut world = World::new();
        std::fs::create_dir(world.path("")).expect("made");
        world.write("a.yaml", &format!("{POD}---\n{}", policy("{podSelector: {}, ingress: [{from: [], newer: 1}]}")));
        let (pods, told) = world.look().expect("read");
        assert_eq!((pods, told.len(), rules(&world)), (vec!["p".to_owned()], 1, vec![vec![true]]));
        world.write("a.yaml", &format!("{POD}---\n{}", policy("{podSelector: {}, ingress: [{from: []}]}")));
        check(&mut world, &["p"], 0);
        assert_eq!(rules(&world), [[false]]);
        // Where an earlier version is known, that is what holds; also where a slip makes another kind of it.
        for slip in [
            policy("{podSelector: {}, newer: 1, ingress: [{}, {}]}"),
            policy("{podSelector: {}}").replace("NetworkPolicy", "NetworkPolcy"),
        ] {
            world.write("a.yaml", &format!("{POD}---\n{slip}"));
            check(&mut world, &["p"], 1);
            assert_eq!(rules(&world), [[false]]);
        }
    }

    /// A link whose target is away stands for a mount that is: neither its files nor its neighbours are taken for gone.
    #[test]
    fn what_cannot_be_looked_at_is_not_gone() {
        use std::os::unix::fs::symlink;
        let mut world = World::new();
        std::fs::create_dir_all(world.path("../volume")).expect("made");
        world.write("a.yaml", &pod("p", "10.0.0.1"));
        world.write("../volume/b.yaml", &pod("q", "10.0.0.2"));
        symlink("../volume", world.path("mounted")).expect("linked");
        symlink("../volume/b.yaml", world.path("c.yaml")).expect("linked");
        assert_eq!(world.look().expect("read").0, ["p", "q"]);
        let away = world.path("../away");
        std::fs::rename(world.path("../volume"), &away).expect("renamed");
        let (pods, told) = world.look().expect("the problems are news");
        assert_eq!((pods, told.len()), (vec!["p".to_owned(), "q".to_owned()], 2 + 1), "both links; q is there twice");
        assert!(world.look().is_none() && world.look().is_none());
        // An edit beside it is taken.
        world.write("a.yaml", &pod("r", "10.0.0.10"));
        let (pods, _) = world.settled().expect("news");
        assert_eq!(pods, ["q", "r"]);
        // A restart meanwhile.
        world.restart();
        assert_eq!(world.look().expect("read").0, ["q", "r"]);
        std::fs::rename(&away, world.path("../volume")).expect("renamed");
        let (pods, told) = world.look().expect("no problem is news");
        assert_eq!((pods, told.len()), (vec!["q".to_owned(), "r".to_owned()], 1));
    }

    #[test]
    fn a_start_without_the_source_begins_with_what_was_good() {
        let mut world = World::new();
        std::fs::create_dir(world.path("")).expect("made");
        world.write("a.yaml", &pod("p", "10.0.0.1"));
        world.write("b.yaml", &pod("q", "10.0.0.2"));
        assert_eq!(world.look().expect("read").0, ["p", "q"]);
        let (cluster, away) = (world.path(""), world.folder.path().join("away"));
        std::fs::rename(&cluster, &away).expect("renamed");
        world.restart();
        let (pods, told) = world.look().expect("what was kept");
        assert_eq!((pods, told.len()), (vec!["p".to_owned(), "q".to_owned()], 1), "{told:?}");
        assert!(world.look().is_none());
        std::fs::remove_file(away.join("a.yaml")).expect("removed");
        std::fs::rename(&away, &cluster).expect("renamed");
        assert_eq!(world.look().expect("the problem has gone").1, []);
        let (pods, _) = world.look().expect("what is gone twice is gone");
        assert_eq!(pods, ["q"]);
    }

    /// A volume that is not mounted leaves an empty directory, and so does a checkout that failed.
    #[test]
    fn a_directory_that_is_empty_keeps_what_was_read_last() {
        let mut world = World::new();
        std::fs::create_dir(world.path("")).expect("made");
        assert!(world.look().is_none(), "nothing was ever read: unknown, not empty");
        world.write("a.yaml", &pod("p", "10.0.0.1"));
        world.write("b.yaml", &pod("q", "10.0.0.2"));
        assert_eq!(world.look().expect("read"), (vec!["p".to_owned(), "q".to_owned()], vec![]));
        for name in ["a.yaml", "b.yaml"] {
            std::fs::remove_file(world.path(name)).expect("removed");
        }
        world.write("README.md", "of no kind that is read");
        let (pods, told) = world.settled().expect("the problem is news");
        assert_eq!((pods.len(), told.len()), (2, 1), "{told:?}");
        assert!(told[0].message.contains("has no manifests"), "{told:?}");
        assert!(world.look().is_none() && world.look().is_none());
        world.restart();
        let (pods, told) = world.look().expect("what was kept");
        assert_eq!((pods.len(), told.len()), (2, 1), "{told:?}");
        // One of them is back: the other is gone.
        world.write("a.yaml", &pod("p", "10.0.0.1"));
        assert_eq!(world.look().expect("the problem has gone").1, []);
        let (pods, told) = world.look().expect("what is gone twice is gone");
        assert_eq!((pods, told), (vec!["p".to_owned()], vec![]));
    }

    /// Below the source as well; one that is removed is removed.
    #[test]
    fn a_directory_below_that_is_empty_keeps_what_was_read_last() {
        let mut world = World::new();
        for directory in ["", "volume", "volume/deep"] {
            std::fs::create_dir(world.path(directory)).expect("made");
        }
        world.write("a.yaml", &pod("p", "10.0.0.1"));
        world.write("volume/deep/b.yaml", &pod("q", "10.0.0.2"));
        assert_eq!(world.look().expect("read").0, ["p", "q"]);
        std::fs::remove_dir_all(world.path("volume/deep")).expect("removed");
        for _ in 0..2 {
            let (pods, told) = world.settled().expect("the problem is news");
            assert_eq!((pods, told.len()), (vec!["p".to_owned(), "q".to_owned()], 1), "{told:?}");
            assert!(told[0].location.file.ends_with("volume"), "the topmost that is empty: {told:?}");
            for _ in 0..4 {
                assert!(world.look().is_none(), "and it stays so");
            }
            world.restart();
            assert_eq!(world.look().expect("what was kept").1.len(), 1);
            // What is edited beside it is taken.
            world.write("a.yaml", &pod("p", "10.0.0.11"));
            assert_eq!(world.settled().expect("news").0, ["p", "q"]);
            std::fs::create_dir(world.path("volume/deep")).expect("made");
            world.write("volume/deep/b.yaml", &pod("q", "10.0.0.22"));
            assert_eq!(world.look().expect("the problem has gone").1, []);
            assert!(world.look().is_some() && world.look().is_none(), "what is new in it is taken when it settled");
            world.write("a.yaml", &pod("p", "10.0.0.1"));
            world.settled().expect("news");
            std::fs::remove_dir_all(world.path("volume/deep")).expect("removed");
        }
        std::fs::remove_dir(world.path("volume")).expect("removed");
        assert!(world.look().is_none());
        let (pods, told) = world.look().expect("what is gone twice is gone");
        assert_eq!((pods, told), (vec!["p".to_owned()], vec![]));
    }

    /// Not brought back when the source, or another one, cannot be read later.
    #[test]
    fn what_went_while_nobody_looked_is_gone() {
        let mut world = World::new();
        std::fs::create_dir(world.path("")).expect("made");
        world.write("a.yaml", &pod("p", "10.0.0.1"));
        world.write("b.yaml", &pod("q", "10.0.0.2"));
        assert_eq!(world.look().expect("read").0, ["p", "q"]);
        std::fs::remove_file(world.path("a.yaml")).expect("removed");
        world.restart();
        assert_eq!(world.look().expect("read").0, ["q"]);
        assert!(world.look().is_none());
        std::fs::rename(world.path(""), world.folder.path().join("away")).expect("renamed");
        world.restart();
        assert_eq!(world.look().expect("what was kept").0, ["q"]);
        let (cluster, data) = (world.folder.path().join("another"), world.folder.path().join("data"));
        world.source = Directory::new(cluster, &data, Writes::new(&Health::default()));
        assert!(world.look().is_none(), "nothing is known of it");
    }

    #[test]
    fn what_is_being_written_is_not_taken() {
        let mut world = World::new();
        std::fs::create_dir(world.path("")).expect("made");
        world.write("a.yaml", &format!("{}---\n{}", pod("p", "10.0.0.1"), pod("q", "10.0.0.2")));
        assert_eq!(world.look().expect("read").0.len(), 2);
        // Truncated, then written part by part.
        for text in ["", &pod("p", "10.0.0.1"), &format!("{}---\n{}", pod("p", "10.0.0.1"), pod("r", "10.0.0.22"))] {
            world.write("a.yaml", text);
            assert!(world.look().is_none(), "{text:?}");
        }
        let (pods, _) = world.look().expect("it settled");
        assert_eq!(pods, ["p", "r"]);
        // Moved away and written anew, as some editors save.
        std::fs::rename(world.path("a.yaml"), world.path("a.yaml~")).expect("renamed");
        assert!(world.look().is_none());
        world.write("a.yaml", &format!("{}# saved\n", pod("p", "10.0.0.1")));
        check(&mut world, &["p"], 0);
        // An empty file is no word of its author's.
        world.write("a.yaml", "\n");
        check(&mut world, &["p"], 1);
        world.restart();
        assert_eq!(world.look().expect("read").0, ["p"]);
    }

    #[test]
    fn a_mounted_volume_is_swapped_as_a_whole() {
        use std::os::unix::fs::symlink;
        let mut world = World::new();
        std::fs::create_dir_all(world.path("..1")).expect("made");
        std::fs::create_dir_all(world.path("..2")).expect("made");
        world.write("..1/a.yaml", &pod("p", "10.0.0.1"));
        world.write("..2/a.yaml", &pod("q", "10.0.0.1"));
        symlink("..1", world.path("..data")).expect("linked");
        symlink("..data/a.yaml", world.path("a.yaml")).expect("linked");
        assert_eq!(world.look().expect("read").0, ["p"]);
        symlink("..2", world.path("..next")).expect("linked");
        std::fs::rename(world.path("..next"), world.path("..data")).expect("swapped");
        check(&mut world, &["q"], 0);
    }
}
