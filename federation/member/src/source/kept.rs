//! Stores the last good text of each origin in one file.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::os::unix::ffi::OsStrExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_api::manifest::{Manifest, Manifests, read_bytes};
use hanse_runtime::files::private_folder;
use hanse_runtime::health::Writes;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};

/// The text of each origin.
const TEXTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("texts");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const REVISION: &str = "revision";
/// The interval between writes, and between retries of a failed one. A process that is killed misses at most this; the source is read
/// again anyway.
const WRITE_EVERY: Duration = Duration::from_secs(1);
/// Writing must not use more than this part of the time: a slow disk may take 100 ms.
const SHARE: u32 = 10;
/// Texts that wait for the next write. More are written at once.
const MAX_UNWRITTEN_BYTES: usize = 8 << 20;
/// Texts that wait while writes fail. Of further ones the stored version stays as it is: after a restart without the source, it is an
/// earlier one.
const MAX_UNWRITABLE_BYTES: usize = 64 << 20;
/// The name of the file in reports of failed writes.
const REPORTED_AS: &str = "the last good state of the source";
/// Page cache. Texts are read once, at the start.
const CACHE_BYTES: usize = 4 << 20;

/// The texts of origins, and a revision that increases, also across restarts.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    writes: Writes,
    database: Option<Database>,
    revision: u64,
    /// Changes that are not written: texts, and origins to forget.
    unwritten: BTreeMap<Arc<Path>, Option<Vec<u8>>>,
    /// The length of these texts.
    unwritten_bytes: usize,
    /// A hash of the text of each origin, whether it is written or not: most texts that are to be kept are kept already.
    hashes: HashMap<Arc<Path>, u64>,
    hasher: RandomState,
    is_revision_written: bool,
    is_whole: bool,
    /// When the next write is due.
    write_at: Instant,
}

/// What was stored of an origin.
#[derive(Debug)]
pub struct Restored {
    pub objects: Vec<Manifest>,
    /// It was read completely.
    pub is_good: bool,
}

impl Kept {
    /// Opens the file in the subdirectory `source` of `data`. A damaged file is put aside. `writes`: reports failed writes.
    pub fn open(data: &Path, writes: Writes) -> Self {
        let folder = data.join("source");
        if let Err(error) = private_folder(&folder) {
            tracing::error!(%error, path = %folder.display(), "last good states cannot be kept");
        }
        let path = folder.join("objects.redb");
        let mut this = Self {
            path,
            writes,
            database: None,
            revision: 0,
            unwritten: BTreeMap::new(),
            unwritten_bytes: 0,
            hashes: HashMap::new(),
            hasher: RandomState::new(),
            is_revision_written: true,
            is_whole: false,
            write_at: Instant::now(),
        };
        match this.connect() {
            Ok(()) => {}
            Err(error) if is_damage(&error) => {
                let aside = this.path.with_extension("damaged");
                tracing::error!(%error, path = %this.path.display(), aside = %aside.display(), "last good states are unreadable, and put aside");
                if let Err(error) = std::fs::rename(&this.path, &aside) {
                    tracing::error!(%error, path = %this.path.display(), "the file cannot be renamed");
                }
                let connected = this.connect();
                this.note(&connected);
            }
            Err(error) => this.note(&Err(error)),
        }
        // Revisions begin when the whole source was read.
        this.is_whole = this.read_hashes() && this.revision > 0;
        this
    }

    /// Whether the file was found as an earlier process wrote it after the whole source was read. Otherwise, it is not known which origins
    /// are lost.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Opens the file, or creates it.
    fn connect(&mut self) -> Result<(), redb::Error> {
        // The library panics on some damage; its state is dropped with the panic.
        let open = || -> Result<(Database, u64), redb::Error> {
            let mut builder = Database::builder();
            builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
            let database = builder.create(&self.path)?;
            let write = database.begin_write()?;
            write.open_table(TEXTS)?;
            let revision = write.open_table(META)?.get(REVISION)?.map_or(0, |it| it.value());
            write.commit()?;
            Ok((database, revision))
        };
        let opened = catch_unwind(AssertUnwindSafe(open));
        let (database, revision) =
            opened.unwrap_or_else(|_| Err(redb::Error::Corrupted("it cannot be read".to_owned())))?;
        self.revision = self.revision.max(revision);
        self.database = Some(database);
        Ok(())
    }

    /// The origins with a text.
    pub fn origins(&self) -> impl Iterator<Item = &Arc<Path>> {
        self.hashes.keys()
    }

    /// Reads the hashes of stored texts. Returns whether it could.
    fn read_hashes(&mut self) -> bool {
        let read = |database: &Database| -> Result<HashMap<Arc<Path>, u64>, redb::Error> {
            let texts = database.begin_read()?.open_table(TEXTS)?;
            let mut hashes = HashMap::new();
            for row in texts.iter()? {
                let (origin, text) = row?;
                let origin = Path::new(std::ffi::OsStr::from_bytes(origin.value())).into();
                hashes.insert(origin, self.hasher.hash_one(text.value()));
            }
            Ok(hashes)
        };
        let hashes = self.database.as_ref().map_or_else(|| Ok(HashMap::new()), read);
        let is_read = hashes.is_ok();
        self.hashes = hashes.unwrap_or_else(|error| {
            tracing::warn!(%error, path = %self.path.display(), "last good states cannot be listed");
            HashMap::new()
        });
        is_read
    }

    /// The stored text of an origin, whether it is written or not.
    pub fn text(&self, origin: &Path) -> Option<Vec<u8>> {
        if let Some(unwritten) = self.unwritten.get(origin) {
            return unwritten.clone();
        }
        let read = |database: &Database| -> Result<Option<Vec<u8>>, redb::Error> {
            let texts = database.begin_read()?.open_table(TEXTS)?;
            Ok(texts.get(origin.as_os_str().as_bytes())?.map(|text| text.value().to_vec()))
        };
        let text = read(self.database.as_ref()?);
        text.unwrap_or_else(|error| {
            tracing::warn!(%error, origin = %origin.display(), "a last good state cannot be read");
            None
        })
    }

    /// The objects of an origin; `None` if it has no stored text. What cannot be read of a policy is unknown.
    pub fn restore(&self, origin: &Path) -> Option<Restored> {
        let text = self.text(origin)?;
        // The source has accepted the text before, by its own rules.
        let mut read = Manifests::of_api_server();
        read_bytes(&origin.to_string_lossy().into(), &text, &mut read);
        let is_good = read.diagnostics.is_empty();
        if !is_good {
            tracing::warn!(origin = %origin.display(), "a stored state cannot be read completely; unread parts of policies are unknown");
        }
        read.objects.append(&mut read.partial);
        Some(Restored { objects: read.objects, is_good })
    }

    /// Stores the text of an origin at the next [`Self::flush`].
    pub fn keep(&mut self, origin: Arc<Path>, text: Vec<u8>) {
        if !self.is_kept(&origin, &text) {
            self.put(origin, Some(text));
        }
    }

    /// Whether `text` is the stored text of an origin.
    pub fn is_kept(&self, origin: &Path, text: &[u8]) -> bool {
        self.hashes.get(origin).is_some_and(|hash| *hash == self.hasher.hash_one(text))
    }

    /// Removes the text of an origin at the next [`Self::flush`].
    pub fn forget(&mut self, origin: &Arc<Path>) {
        self.put(Arc::clone(origin), None);
    }

    fn put(&mut self, origin: Arc<Path>, text: Option<Vec<u8>>) {
        let length = |text: &Option<Vec<u8>>| text.as_ref().map_or(0, Vec::len);
        let now = length(&text);
        if self.unwritten_bytes + now > MAX_UNWRITTEN_BYTES && now > 0 {
            // A failed write is not tried again for each text.
            if self.database.is_some() || Instant::now() >= self.write_at {
                self.write_all();
            }
            if self.unwritten_bytes + now > MAX_UNWRITABLE_BYTES {
                return;
            }
        }
        match &text {
            Some(text) => drop(self.hashes.insert(Arc::clone(&origin), self.hasher.hash_one(text.as_slice()))),
            None => drop(self.hashes.remove(&origin)),
        }
        self.unwritten_bytes += now;
        let before = self.unwritten.insert(origin, text);
        self.unwritten_bytes -= before.as_ref().map_or(0, length);
    }

    /// The next revision. If it cannot be written, it may be reused after a restart.
    pub fn advance(&mut self) -> u64 {
        self.revision = self.revision.saturating_add(1);
        self.is_revision_written = false;
        self.revision
    }

    /// Writes all changes in one transaction, if it is time to.
    pub fn flush(&mut self) {
        if Instant::now() >= self.write_at {
            self.write_all();
        }
    }

    fn write_all(&mut self) {
        if self.unwritten.is_empty() && self.is_revision_written {
            return;
        }
        let began = Instant::now();
        let written = match self.database {
            Some(_) => self.write(),
            None => self.connect().and_then(|()| self.write()),
        };
        if written.is_ok() {
            self.unwritten.clear();
            self.unwritten_bytes = 0;
            self.is_revision_written = true;
        }
        self.write_at = Instant::now() + WRITE_EVERY.max(began.elapsed() * SHARE);
        self.note(&written);
    }

    fn write(&self) -> Result<(), redb::Error> {
        let Some(database) = &self.database else { return Ok(()) };
        let write = database.begin_write()?;
        {
            let mut texts = write.open_table(TEXTS)?;
            for (origin, text) in &self.unwritten {
                let origin = origin.as_os_str().as_bytes();
                match text {
                    Some(text) => drop(texts.insert(origin, text.as_slice())?),
                    None => drop(texts.remove(origin)?),
                }
            }
            write.open_table(META)?.insert(REVISION, self.revision)?;
        }
        write.commit()?;
        Ok(())
    }

    fn note(&mut self, written: &Result<(), redb::Error>) {
        let written = written.as_ref().copied().map_err(|error| std::io::Error::other(error.to_string()));
        self.writes.note(REPORTED_AS, &written);
        // The library refuses further transactions after a failed one: the file is opened again.
        if written.is_err() {
            self.database = None;
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.write_all();
    }
}

/// Whether the file is unusable for ever, unlike one that cannot be read or written now.
fn is_damage(error: &redb::Error) -> bool {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    match error {
        redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) => true,
        redb::Error::Io(error) => matches!(error.kind(), InvalidData | UnexpectedEof),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use hanse_runtime::health::Health;

    use super::*;

    fn origin(number: usize) -> Arc<Path> {
        PathBuf::from(format!("networkpolicies.networking.k8s.io/n/{number}")).into()
    }

    #[test]
    fn many_texts_do_not_wait_for_the_next_write() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut kept = Kept::open(folder.path(), Writes::new(&Health::default()));
        kept.write_at = Instant::now() + Duration::from_secs(3_600);
        for number in 0..20 {
            kept.keep(origin(number), vec![b'x'; 1 << 20]);
            assert!(kept.unwritten_bytes <= MAX_UNWRITTEN_BYTES);
        }
        kept.forget(&origin(19));
        drop(kept);
        let kept = Kept::open(folder.path(), Writes::new(&Health::default()));
        assert_eq!(kept.origins().count(), 19);
        assert!(kept.is_kept(&origin(3), &vec![b'x'; 1 << 20]) && !kept.is_kept(&origin(3), b"x"));
        assert!(!kept.is_kept(&origin(19), &vec![b'x'; 1 << 20]));
    }

    #[test]
    fn texts_that_cannot_be_written_are_limited() {
        let folder = tempfile::tempdir().expect("a folder");
        // A file where a directory is needed.
        std::fs::write(folder.path().join("source"), "").expect("written");
        let mut kept = Kept::open(folder.path(), Writes::new(&Health::default()));
        for number in 0..100 {
            kept.keep(origin(number), vec![b'x'; 1 << 20]);
        }
        let waiting: usize = kept.unwritten.values().flatten().map(Vec::len).sum();
        assert_eq!((waiting, kept.unwritten_bytes), (MAX_UNWRITABLE_BYTES, MAX_UNWRITABLE_BYTES));
    }
}
