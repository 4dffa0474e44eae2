//! What must survive the loss of the member's caches: its keys and certificates, the keys, revocations and tokens of nodes, the term of
//! rule sets, and objects that are kept although their kind was deleted.
//!
//! It consists of named files, in the data directory, or in Secrets of the cluster (`secrets`), so that a pod that is rescheduled goes on
//! without a join token. Files have names such as `member.pem` or `nodes/HASH.json`.

mod layout;
pub mod moving;
mod secrets;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use hanse_identity::token;
use hanse_kubernetes::Access;
use hanse_runtime::files;
use hanse_runtime::health::Writes;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

pub use self::layout::{MAX_SECRET_BYTES, NODE_SECRETS, SecretName};
use self::secrets::Secrets;

/// In a data directory whose state is in Secrets: where it is, for commands.
const LOCATION: &str = "state.json";
/// The caches of the process that led last.
const CACHES: &str = "caches";
/// Of a data directory: the value of `CACHES` for its caches.
const CACHES_ID: &str = "caches-id";
/// Caches of the state of the cluster and of the hub. Those of an earlier leader may be older than what nodes enforce.
const CACHED: [&str; 5] = ["source", "receiver.snapshot", "receiver.ahead", "publisher.snapshot", "known-nodes.json"];

/// The state of a member. Clones share it.
#[derive(Debug, Clone)]
pub struct State {
    data: PathBuf,
    secrets: Option<Arc<Secrets>>,
}

/// A version of a file: another one after each change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(SystemTime, u64);

/// While it lives, files that other processes change are not overwritten.
#[derive(Debug)]
pub struct Turn {
    _lock: Option<File>,
    since: u64,
}

/// Where the Secrets of a state are.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Located {
    namespace: String,
    name: String,
    kubeconfig: Option<PathBuf>,
    context: Option<String>,
}

impl From<&Path> for State {
    /// The state in a data directory.
    fn from(data: &Path) -> Self {
        Self { data: data.to_owned(), secrets: None }
    }
}

impl From<&PathBuf> for State {
    fn from(data: &PathBuf) -> Self {
        Self::from(data.as_path())
    }
}

impl From<&Self> for State {
    fn from(state: &Self) -> Self {
        state.clone()
    }
}

impl State {
    /// The state in Secrets, for the only process that serves: it follows changes of others, and initialises an empty state. `data` is the
    /// directory of the caches. Failed writes are reported to `writes`. Blocks the thread.
    ///
    /// # Errors
    /// When a Secret cannot be read or written, or was replaced.
    pub fn lead(data: &Path, access: &Access, name: &SecretName, writes: &Writes) -> anyhow::Result<Self> {
        let secrets = Secrets::open(access, name, Some(writes.clone()))?;
        Ok(Self { data: data.to_owned(), secrets: Some(Arc::new(secrets)) })
    }

    /// The state of the member with this data directory, for commands. Blocks the thread.
    ///
    /// # Errors
    /// When its Secrets cannot be read.
    pub fn of_member(data: &Path) -> anyhow::Result<Self> {
        let path = data.join(LOCATION);
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::from(data)),
            text => text.with_context(|| format!("read {}", path.display()))?,
        };
        let located: Located = serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
        let Located { namespace, name, kubeconfig, context } = located;
        let secrets = Secrets::open(&Access { kubeconfig, context }, &SecretName { namespace, name }, None)?;
        Ok(Self { data: data.to_owned(), secrets: Some(Arc::new(secrets)) })
    }

    /// Writes for commands where the Secrets of the member with this data directory are; `None`: there are none.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn locate(data: &Path, at: Option<(&Access, &SecretName)>) -> io::Result<()> {
        let path = data.join(LOCATION);
        let Some((access, name)) = at else {
            return match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        };
        let absolute = access.kubeconfig.as_ref().map(std::path::absolute).transpose()?;
        let located = Located {
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            kubeconfig: absolute,
            context: access.context.clone(),
        };
        files::write_atomic(&path, &serde_json::to_vec(&located)?, 0o600)
    }

    /// The data directory, which contains caches only if the state is in Secrets.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Whether the state is in Secrets.
    pub fn is_in_secrets(&self) -> bool {
        self.secrets.is_some()
    }

    /// The content of a file.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn read(&self, file: &str) -> io::Result<Option<Vec<u8>>> {
        match &self.secrets {
            Some(secrets) => Ok(secrets.read(file)?.map(|bytes| bytes.to_vec())),
            None => found(std::fs::read(self.data.join(file))),
        }
    }

    /// The content of a file with a key.
    ///
    /// # Errors
    /// As [`Self::read`], and when others may read the file.
    pub fn read_key(&self, file: &str) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        match &self.secrets {
            Some(secrets) => secrets.read(file),
            None => found(files::read_secret(&self.data.join(file))),
        }
    }

    /// The version of a file; `None` if it does not exist.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn version(&self, file: &str) -> io::Result<Option<Version>> {
        match &self.secrets {
            Some(secrets) => Ok(secrets.version(file)?.map(|number| Version(UNIX_EPOCH, number))),
            None => {
                use std::os::unix::fs::MetadataExt as _;
                let Some(metadata) = found(self.data.join(file).metadata())? else { return Ok(None) };
                // A change creates a new file.
                Ok(Some(Version(metadata.modified()?, metadata.ino())))
            }
        }
    }

    /// The names of the files in a folder, sorted.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        if let Some(secrets) = &self.secrets {
            return secrets.list(folder);
        }
        let Some(entries) = found(self.data.join(folder).read_dir())? else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            // Others are being written.
            names.extend(name.to_str().filter(|name| !name.starts_with('.')).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// Excludes other processes that change the files of a folder, or notices what they change.
    ///
    /// # Errors
    /// When another process has the folder for longer than `timeout`.
    pub fn lock(&self, folder: &str, timeout: Duration) -> io::Result<Turn> {
        if let Some(secrets) = &self.secrets {
            return Ok(Turn { _lock: None, since: secrets.now() });
        }
        let folder = self.data.join(folder);
        files::private_folder(&folder)?;
        Ok(Turn { _lock: Some(files::lock_file(&folder.join(".lock"), timeout)?), since: 0 })
    }

    /// From now on, [`Self::write_in`] notices what other processes write to Secrets.
    pub fn turn(&self) -> Turn {
        Turn { _lock: None, since: self.secrets.as_ref().map_or(0, |secrets| secrets.now()) }
    }

    /// Writes a file, readable by its owner only, atomically and durably. In Secrets: unless another process changes it at the same time.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, file: &str, bytes: &[u8]) -> io::Result<()> {
        self.put(vec![(file.to_owned(), Some(Zeroizing::new(bytes.to_vec())))], None)
    }

    /// As [`Self::write`], unless another process has changed the file in this turn.
    ///
    /// # Errors
    /// As [`Self::write`]; `ResourceBusy` if another process has changed the file.
    pub fn write_in(&self, turn: &Turn, file: &str, bytes: &[u8]) -> io::Result<()> {
        self.put(vec![(file.to_owned(), Some(Zeroizing::new(bytes.to_vec())))], Some(turn.since))
    }

    /// Removes a file. Returns whether it existed.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, file: &str) -> io::Result<bool> {
        if self.secrets.is_none() {
            return Ok(found(std::fs::remove_file(self.data.join(file)))?.is_some());
        }
        let exists = self.version(file)?.is_some();
        if exists {
            self.put(vec![(file.to_owned(), None)], None)?;
        }
        Ok(exists)
    }

    /// `None`: removes the file.
    fn put(&self, changes: Vec<(String, Option<Zeroizing<Vec<u8>>>)>, since: Option<u64>) -> io::Result<()> {
        if let Some(secrets) = &self.secrets {
            return secrets.write(changes, since);
        }
        for (file, bytes) in changes {
            let path = self.data.join(&file);
            let Some(bytes) = bytes else {
                found(std::fs::remove_file(&path))?;
                continue;
            };
            if let Some(folder) = path.parent().filter(|folder| *folder != self.data) {
                files::private_folder(folder)?;
            }
            files::write_atomic(&path, &bytes, if file == layout::ROOT { 0o644 } else { 0o600 })?;
        }
        Ok(())
    }

    /// Reads what other processes have written, in a command: a serving process follows it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn refresh(&self) -> io::Result<()> {
        self.secrets.as_ref().map_or(Ok(()), |secrets| secrets.refresh())
    }

    /// Removes the caches in the data directory, unless the process that led last has written them: they may be older than what nodes
    /// enforce, and contain objects that were forgotten since. Returns whether they stay.
    ///
    /// # Errors
    /// When they cannot be removed, or the state cannot be written.
    pub fn claim_caches(&self) -> io::Result<bool> {
        if self.secrets.is_none() {
            return Ok(true);
        }
        if self.has_current_caches()? {
            return Ok(true);
        }
        for name in CACHED {
            let path = self.data.join(name);
            match path.is_dir() {
                true => std::fs::remove_dir_all(&path)?,
                false => drop(found(std::fs::remove_file(&path))?),
            }
        }
        self.adopt_caches()?;
        Ok(false)
    }

    /// Whether the process that led last, and may still lead, has written the caches in the data directory.
    ///
    /// # Errors
    /// When they, or the state, cannot be read.
    pub fn has_current_caches(&self) -> io::Result<bool> {
        if self.secrets.is_none() {
            return Ok(true);
        }
        let own = found(std::fs::read_to_string(self.data.join(CACHES_ID)))?.unwrap_or_default();
        let last = self.read(CACHES)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok(!own.is_empty() && last == Some(own))
    }

    /// From now on, the caches in the data directory are those of the process that led last.
    fn adopt_caches(&self) -> io::Result<()> {
        let random: [u8; 16] = token::random().map_err(io::Error::other)?;
        let own: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        files::write_atomic(&self.data.join(CACHES_ID), own.as_bytes(), 0o600)?;
        self.write(CACHES, own.as_bytes())
    }
}

fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}
