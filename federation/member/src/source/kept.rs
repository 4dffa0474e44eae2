//! Stores the last good text of each origin on disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_api::manifest::{Manifest, Manifests, read_bytes};
use hanse_runtime::files::private_folder;
use hanse_runtime::health::Writes;

const HEADER: &[u8] = b"hanse-source/2\n";
/// The interval between retries of a failed write.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// The names of the files in reports of failed writes.
const STATES: &str = "the last good state of the source";
const REVISION: &str = "the revision of the source";

/// The texts of origins, each in a separate file with a checksum.
#[derive(Debug)]
pub struct Kept {
    folder: PathBuf,
    writes: Writes,
    revision: Revision,
    /// Texts whose last write failed.
    unwritten: BTreeMap<Arc<Path>, (Vec<u8>, std::io::Error)>,
    retry_at: Option<Instant>,
}

/// A revision that increases, also across restarts.
#[derive(Debug)]
struct Revision {
    path: PathBuf,
    last: u64,
}

impl Revision {
    fn open(path: PathBuf) -> Self {
        let last = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        Self { path, last: last.unwrap_or(0) }
    }

    fn write(&self) -> std::io::Result<()> {
        replace(&self.path, format!("{}\n", self.last).as_bytes())
    }
}

impl Kept {
    /// Opens the subdirectory of `data`. `writes`: reports failed writes.
    pub fn open(data: &Path, writes: Writes) -> Self {
        let folder = data.join("source");
        if let Err(error) = private_folder(&folder) {
            tracing::error!(%error, path = %folder.display(), "last good states cannot be kept");
        }
        let revision = Revision::open(folder.join("revision"));
        Self { folder, writes, revision, unwritten: BTreeMap::new(), retry_at: None }
    }

    fn file(&self, origin: &Path) -> PathBuf {
        self.folder.join(format!("{}.kept", blake3::hash(origin.as_os_str().as_encoded_bytes()).to_hex()))
    }

    /// The origins with a stored text.
    pub fn origins(&self) -> impl Iterator<Item = Arc<Path>> {
        use std::os::unix::ffi::OsStrExt as _;
        let names = self.folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
        let kept = names.filter(|name| name.extension().is_some_and(|extension| extension == "kept"));
        kept.filter_map(|name| {
            let file = std::fs::read(&name).ok()?;
            let path = file.strip_prefix(HEADER).and_then(|file| file.get(32..)?.split(|byte| *byte == 0).next());
            if path.is_none() {
                tracing::warn!(path = %name.display(), "kept state ignored: damaged, or of an earlier version");
            }
            Some(Path::new(std::ffi::OsStr::from_bytes(path?)).into())
        })
    }

    /// The objects of an origin; `None` if its file is missing or damaged.
    pub fn restore(&self, origin: &Path) -> Option<Vec<Manifest>> {
        let name = self.file(origin);
        let file = std::fs::read(&name).ok()?;
        let objects = objects_of(&file, origin);
        if objects.is_none() {
            tracing::warn!(path = %name.display(), "kept state ignored: damaged, or of an earlier version");
        }
        objects
    }

    /// Stores the text of an origin.
    pub fn keep(&mut self, origin: Arc<Path>, text: Vec<u8>) {
        match replace(&self.file(&origin), &file_of(&origin, &text)) {
            Ok(()) => drop(self.unwritten.remove(&origin)),
            Err(error) => drop(self.unwritten.insert(origin, (text, error))),
        }
    }

    /// Whether `text` is the stored text of an origin.
    pub fn is_kept(&self, origin: &Path, text: &[u8]) -> bool {
        std::fs::read(self.file(origin)).is_ok_and(|file| file == file_of(origin, text))
    }

    /// Removes the text of an origin.
    pub fn forget(&mut self, origin: &Path) {
        self.unwritten.remove(origin);
        if let Err(error) = std::fs::remove_file(self.file(origin))
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, origin = %origin.display(), "kept state of a removed origin cannot be deleted");
        }
    }

    /// The next revision. If it cannot be written, it may be reused after a restart.
    pub fn advance(&mut self) -> u64 {
        self.revision.last = self.revision.last.saturating_add(1);
        let written = self.revision.write();
        self.report(&written);
        self.revision.last
    }

    /// Retries failed writes.
    pub fn retry(&mut self) {
        if self.retry_at.is_none_or(|at| Instant::now() < at) {
            return;
        }
        self.retry_at = None;
        for (origin, (text, _)) in std::mem::take(&mut self.unwritten) {
            self.keep(origin, text);
        }
        let written = self.revision.write();
        self.report(&written);
    }

    fn report(&mut self, revision: &std::io::Result<()>) {
        let failed = self.unwritten.values().next().map(|(_, error)| error);
        let states = failed.map_or(Ok(()), |error| Err(std::io::Error::new(error.kind(), error.to_string())));
        self.writes.note(STATES, &states);
        self.writes.note(REVISION, revision);
        if states.is_err() || revision.is_err() {
            self.retry_at.get_or_insert_with(|| Instant::now() + RETRY_AFTER);
        }
    }
}

/// The file of an origin.
fn file_of(origin: &Path, text: &[u8]) -> Vec<u8> {
    let body = [origin.as_os_str().as_encoded_bytes(), &[0], text].concat();
    [HEADER, blake3::hash(&body).as_bytes(), &body].concat()
}

/// The objects in a file; `None` if it is damaged or belongs to another origin.
fn objects_of(file: &[u8], origin: &Path) -> Option<Vec<Manifest>> {
    let (hash, body) = file.strip_prefix(HEADER)?.split_at_checked(32)?;
    let text = body.strip_prefix(origin.as_os_str().as_encoded_bytes())?.strip_prefix(&[0])?;
    if blake3::hash(body).as_bytes() != hash {
        return None;
    }
    let mut read = Manifests::default();
    read_bytes(&origin.to_string_lossy().into(), text, &mut read);
    read.diagnostics.is_empty().then_some(read.objects)
}

/// Replaces a file atomically, without flushing, since there may be many. The checksum detects damage after a crash.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, path)
}
