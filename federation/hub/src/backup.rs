//! `hanse-hub backup` and `restore`.
//!
//! A store in a file belongs to the hub that runs. That hub passes a copy on through a Unix socket beside the file, to processes of
//! its own user and root: to those who may read the file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use hanse_runtime::files;
use hanse_runtime::shutdown::Shutdown;
use hanse_store::{Store, StoreError, StoreUrl};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tracing::warn;
use zeroize::Zeroizing;

use crate::archive::{Archive, MAX_BYTES};
use crate::registry::seconds;
use crate::sealed;
use crate::transfer::{self, Copied, Progress};

/// The files of the authority: the first is secret.
const FILES: [&str; 2] = ["ca.key", "ca.pem"];
/// Copies at the same time: each is in memory as a whole.
const MAX_COPIES: usize = 2;
/// How long one copy may take.
const COPY_TIMEOUT: Duration = Duration::from_secs(120);

/// What a backup contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    pub revision: u64,
    pub entries: usize,
    pub bytes: usize,
    /// The authority's key is in it, encrypted or not.
    pub has_authority: bool,
    /// ... and is not encrypted.
    pub has_open_key: bool,
}

/// Copies the store, as of one revision, and the authority's files in `data`, if there are any, to a new file that only its owner
/// can read.
///
/// # Errors
/// When the store cannot be read, or the file exists or cannot be written.
pub async fn backup(store: &StoreUrl, data: Option<&Path>, file: &Path) -> anyhow::Result<Summary> {
    if file.exists() {
        bail!("{} exists already: choose another file", file.display());
    }
    let opened = hanse_store::open(store).await;
    let (mut archive, is_sealed) = match (opened, store.path()) {
        (Ok(store), _) => {
            transfer::check_served(&*store).await.context("read the store")?;
            let archive = Archive::take(&*store, seconds(SystemTime::now())).await.context("read the store")?;
            (archive, sealed::is_sealed(&*store).await?)
        }
        (Err(StoreError::InUse), Some(path)) => {
            let archive = fetch(path).await.with_context(|| format!("read the store {store} through its hub"))?;
            let is_sealed = archive.entries.iter().any(|it| it.key.segments().next() == Some("authority"));
            (archive, is_sealed)
        }
        (Err(error), _) => return Err(error).with_context(|| format!("open the store {store}")),
    };
    for name in FILES {
        let Some(path) = data.map(|data| data.join(name)).filter(|path| path.exists()) else { continue };
        let content =
            if name == FILES[0] { files::read_secret(&path) } else { std::fs::read(&path).map(Zeroizing::new) };
        archive.files.push((name.to_owned(), content.with_context(|| format!("read {}", path.display()))?));
    }
    let bytes = archive.encode();
    if bytes.len() > MAX_BYTES {
        bail!("the backup has {} bytes: at most 256 MiB", bytes.len());
    }
    files::write_secret(file, &bytes).with_context(|| format!("write {}", file.display()))?;
    let has_open_key = archive.files.iter().any(|it| it.0 == FILES[0]);
    Ok(Summary {
        revision: archive.revision,
        entries: archive.entries.len(),
        bytes: bytes.len(),
        has_authority: is_sealed || has_open_key,
        has_open_key,
    })
}

/// Fills a store from a backup, and writes the authority's files into `data`. It can be repeated after an interruption.
///
/// # Errors
/// When the file is not a backup, the store contains something else, or `data` contains another authority.
pub async fn restore(
    file: &Path,
    store: &StoreUrl,
    data: Option<&Path>,
    progress: Progress<'_>,
) -> anyhow::Result<(Copied, Vec<PathBuf>)> {
    let read = || format!("read the backup {}", file.display());
    if std::fs::metadata(file).with_context(read)?.len() > MAX_BYTES as u64 {
        bail!("{} is larger than 256 MiB: it is not a backup of a hub", file.display());
    }
    let bytes = Zeroizing::new(std::fs::read(file).with_context(read)?);
    let archive = Archive::decode(&bytes).with_context(read)?;
    let known = archive.files.iter().filter(|it| FILES.contains(&&*it.0));
    let wanted: Vec<_> = data.into_iter().flat_map(|data| known.clone().map(|it| (data.join(&it.0), it))).collect();
    for (path, (_, content)) in &wanted {
        if path.exists() && std::fs::read(path).with_context(|| format!("read {}", path.display()))? != **content {
            bail!("{} belongs to another ClusterSet: choose another folder", path.display());
        }
    }
    // First of all: with the store alone, an interrupted command would look complete.
    let mut written = Vec::new();
    for (path, (name, content)) in wanted {
        let mode = if name == FILES[0] { 0o600 } else { 0o644 };
        if let Some(folder) = data {
            files::private_folder(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        files::write_atomic(&path, content, mode).with_context(|| format!("write {}", path.display()))?;
        written.push(path);
    }
    Ok((transfer::restore(&archive, store, progress).await?, written))
}

/// The socket beside the file of a store.
fn socket_of(store: &Path) -> PathBuf {
    let mut name = store.as_os_str().to_owned();
    name.push(".sock");
    name.into()
}

/// Serves copies of `store`, whose file this process has locked, until `shutdown`. Without the socket the hub works, and only
/// online backups do not.
pub fn serve(path: &Path, store: Arc<dyn Store>, shutdown: &Shutdown) {
    let socket = socket_of(path);
    // Of an earlier process: this one has the lock of the store.
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).and_then(|listener| {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    });
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => {
            warn!(%error, socket = %socket.display(), "online backups are not available");
            return;
        }
    };
    let stop = shutdown.token();
    shutdown.spawn("online backups", async move {
        let permits = Arc::new(Semaphore::new(MAX_COPIES));
        loop {
            let stream = tokio::select! {
                () = stop.cancelled() => break,
                stream = listener.accept() => stream,
            };
            let (Ok((stream, _)), Ok(permit)) = (stream, permits.clone().try_acquire_owned()) else {
                // Both pass: too many copies at once, or too many files.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let store = store.clone();
            tokio::spawn(async move {
                let _permit = permit;
                match tokio::time::timeout(COPY_TIMEOUT, copy_to(stream, &*store)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => warn!(error = format!("{error:#}"), "online backup failed"),
                    Err(_) => warn!("online backup timed out"),
                }
            });
        }
        let _ = std::fs::remove_file(&socket);
    });
}

async fn copy_to(mut stream: UnixStream, store: &dyn Store) -> anyhow::Result<()> {
    let (own, peer) = (nix::unistd::geteuid().as_raw(), stream.peer_cred().context("identify the caller")?.uid());
    if peer != own && peer != 0 {
        bail!("user {peer} may not read the store");
    }
    let archive = Archive::take(store, seconds(SystemTime::now())).await.context("read the store")?;
    stream.write_all(&archive.encode()).await.context("send the store")?;
    stream.shutdown().await.context("send the store")
}

async fn fetch(store: &Path) -> anyhow::Result<Archive> {
    let socket = socket_of(store);
    let receiving = async {
        let stream = UnixStream::connect(&socket).await.with_context(|| format!("connect to {}", socket.display()))?;
        let mut bytes = Zeroizing::new(Vec::new());
        stream.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).await.context("receive the store")?;
        if bytes.is_empty() {
            bail!("the hub sent nothing: its log has the reason");
        }
        Ok(Archive::decode(&bytes)?)
    };
    tokio::time::timeout(COPY_TIMEOUT, receiving).await.context("the hub does not answer")?
}
