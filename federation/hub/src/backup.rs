//! `hanse-hub backup` and `restore`.
//!
//! A store in a file belongs to the hub that runs. That hub passes a copy on through a Unix socket beside the file, to processes of
//! its own user and root: to those who may read the file.

use std::io::{IsTerminal as _, Read as _, Write as _};
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
/// Those of the first administrator, which are as secret as the authority's key, and are part of a backup with that only.
const ADMINISTRATOR: [&str; 3] = ["admin.key", "admin.pem", "admin.context"];
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

/// Copies the store, as of one revision, and the files of the authority and of the first administrator in `data`, if there are any, to a
/// new file that only its owner can read. Without `file`, to the standard output, as a whole or with an error.
///
/// # Errors
/// When the store cannot be read, the file exists or cannot be written, or the standard output is a terminal.
pub async fn backup(store: &StoreUrl, data: Option<&Path>, file: Option<&Path>) -> anyhow::Result<Summary> {
    match file {
        Some(file) if file.exists() => bail!("{} exists already: choose another file", file.display()),
        None if std::io::stdout().is_terminal() => {
            bail!("the standard output is a terminal: redirect it to a file, or name a file")
        }
        _ => {}
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
    let has_key = |files: &[(String, Zeroizing<Vec<u8>>)]| files.iter().any(|it| it.0 == FILES[0]);
    for name in FILES.into_iter().chain(ADMINISTRATOR) {
        if ADMINISTRATOR.contains(&name) && !has_key(&archive.files) {
            continue;
        }
        let Some(path) = data.map(|data| data.join(name)).filter(|path| path.exists()) else { continue };
        let content =
            if is_secret(name) { files::read_secret(&path) } else { std::fs::read(&path).map(Zeroizing::new) };
        archive.files.push((name.to_owned(), content.with_context(|| format!("read {}", path.display()))?));
    }
    let bytes = archive.encode();
    if bytes.len() > MAX_BYTES {
        bail!("the backup has {} bytes: at most 256 MiB", bytes.len());
    }
    match file {
        Some(file) => files::write_secret(file, &bytes).with_context(|| format!("write {}", file.display()))?,
        None => {
            let mut out = std::io::stdout().lock();
            out.write_all(&bytes).and_then(|()| out.flush()).context("write the backup to the standard output")?;
        }
    }
    let has_open_key = has_key(&archive.files);
    Ok(Summary {
        revision: archive.revision,
        entries: archive.entries.len(),
        bytes: bytes.len(),
        has_authority: is_sealed || has_open_key,
        has_open_key,
    })
}

/// Reads a backup and verifies that it is complete. Without `file`, from the standard input to its end.
///
/// # Errors
/// When it cannot be read, or is damaged, cut or not a backup.
pub fn read(file: Option<&Path>) -> anyhow::Result<Archive> {
    let name = || file.map_or_else(|| "from the standard input".to_owned(), |file| file.display().to_string());
    let read = || format!("read the backup {}", name());
    let mut bytes = Zeroizing::new(Vec::new());
    let limit = MAX_BYTES as u64 + 1;
    match file {
        Some(file) => std::fs::File::open(file).with_context(read)?.take(limit).read_to_end(&mut bytes),
        None => std::io::stdin().lock().take(limit).read_to_end(&mut bytes),
    }
    .with_context(read)?;
    Archive::decode(&bytes).with_context(read)
}

/// Fills a store from a backup, and writes its files into `data`. It can be repeated after an interruption.
///
/// # Errors
/// When the store contains something else, or `data` contains another authority.
pub async fn restore(
    archive: &Archive,
    store: &StoreUrl,
    data: Option<&Path>,
    progress: Progress<'_>,
) -> anyhow::Result<(Copied, Vec<PathBuf>)> {
    let is_known = |name: &str| FILES.contains(&name) || ADMINISTRATOR.contains(&name);
    let known = archive.files.iter().filter(|it| is_known(&it.0));
    let wanted: Vec<_> = data.into_iter().flat_map(|data| known.clone().map(|it| (data.join(&it.0), it))).collect();
    let mut missing = Vec::new();
    for (path, (name, content)) in wanted {
        match path.exists() {
            false => missing.push((path, name, content)),
            // An administrator may have got another certificate since.
            true if ADMINISTRATOR.contains(&&**name) => {}
            true if std::fs::read(&path).with_context(|| format!("read {}", path.display()))? == **content => {}
            true => bail!("{} belongs to another ClusterSet: choose another folder", path.display()),
        }
    }
    // First of all: with the store alone, an interrupted command would look complete.
    let mut written = Vec::new();
    for (path, name, content) in missing {
        let mode = if is_secret(name) { 0o600 } else { 0o644 };
        if let Some(folder) = data {
            files::private_folder(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        files::write_atomic(&path, content, mode).with_context(|| format!("write {}", path.display()))?;
        written.push(path);
    }
    Ok((transfer::restore(archive, store, progress).await?, written))
}

fn is_secret(name: &str) -> bool {
    [FILES[0], "admin.key", "admin.context"].contains(&name)
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
