//! Temporary folders of test clusters.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use tempfile::TempDir;

const MEMORY: &str = "/dev/shm";
const PREFIX: &str = "hanse-cluster-";
const LOCK: &str = ".lock";
/// A folder that is older has its lock, if anything uses it.
const UNLOCKED: Duration = Duration::from_secs(60);

/// A folder in memory where the machine has one, since etcd waits for the disk with every write. Dropped, it is removed.
#[derive(Debug)]
pub struct Scratch {
    directory: TempDir,
    /// Locked while the folder is used, by a process that may be killed.
    _lock: File,
}

impl Scratch {
    /// # Errors
    /// When no folder can be created.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        sweep(Path::new(MEMORY));
        let (prefix, mut builder) = (format!("{PREFIX}{name}-"), tempfile::Builder::new());
        builder.prefix(&prefix);
        let directory =
            builder.tempdir_in(MEMORY).or_else(|_| builder.tempdir()).context("create a temporary folder")?;
        let lock = File::create(directory.path().join(LOCK)).context("create the folder's lock")?;
        lock.lock().context("lock the folder")?;
        Ok(Self { directory, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Removes folders of processes that were killed: they would fill the memory. What cannot be removed now is tried again.
fn sweep(parent: &Path) {
    for entry in parent.read_dir().into_iter().flatten().flatten() {
        let old =
            entry.metadata().and_then(|it| it.modified()).is_ok_and(|it| it.elapsed().is_ok_and(|it| it > UNLOCKED));
        if old && entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let lock = File::open(entry.path().join(LOCK));
            if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
                drop(std::fs::remove_dir_all(entry.path()));
            }
        }
    }
}
