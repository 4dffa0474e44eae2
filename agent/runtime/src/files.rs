//! Files that must be whole or absent: written beside their place, flushed, then renamed into it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

/// Largest secret that is read, in bytes: a key or a token with room to spare.
pub const MAX_SECRET_BYTES: u64 = 64 * 1024;
/// How often a lock that another process has is tried again.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// Writes `bytes` to `path` with mode 0600, atomically and durably.
///
/// # Errors
/// Errors of the file system; `path` is then unchanged.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_atomic(path, bytes, 0o600)
}

/// Writes `bytes` to `path` with `mode`, atomically and durably.
///
/// # Errors
/// Errors of the file system; `path` is then unchanged.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no file name"))?;
    let temporary = folder.join(format!(
        ".{}.{}.{}",
        name.to_string_lossy(),
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        // The mode at creation is narrowed by the umask; a secret's is never widened by it.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(&folder)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Locks `lock` against other processes, until the file is dropped or this process ends. Blocks the thread for at
/// most `timeout` while another process has the lock.
///
/// # Errors
/// `WouldBlock` after the timeout; otherwise errors of the file system.
pub fn lock_file(lock: &Path, timeout: Duration) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(lock)?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if began.elapsed() < timeout => std::thread::sleep(RETRY_EVERY),
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(io::ErrorKind::WouldBlock, "another process uses it"));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Whether a process has locked `lock`. The check takes the lock for a moment.
pub fn is_locked(lock: &Path) -> bool {
    File::open(lock).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Reads a secret, refusing a file that others than its owner may read.
///
/// # Errors
/// Those of the file system; `PermissionDenied` when group or others have any access; `InvalidData` above [`MAX_SECRET_BYTES`].
pub fn read_secret(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    read_secret_if(path, |_| false, "set its mode to 0600")
}

/// As [`read_secret`], of a secret that others provide, such as a token: a group of this process may read it, as in a mounted Kubernetes
/// Secret with an `fsGroup`.
///
/// # Errors
/// As [`read_secret`].
pub fn read_provided_secret(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let admits = |it: &fs::Metadata| it.permissions().mode() & 0o077 == 0o040 && is_own_group(it.gid());
    read_secret_if(path, admits, "set its mode to 0600, or to 0640 with a group of this process")
}

fn read_secret_if(path: &Path, admits: impl Fn(&fs::Metadata) -> bool, advice: &str) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.permissions().mode() & 0o077 != 0 && !admits(&metadata) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("{} may be read by others than its owner: {advice}", path.display()),
        ));
    }
    if metadata.len() > MAX_SECRET_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "secret is larger than 64 KiB"));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(metadata.len() as usize));
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn is_own_group(group: u32) -> bool {
    let others = || nix::unistd::getgroups().unwrap_or_default().into_iter().any(|it| it.as_raw() == group);
    nix::unistd::getegid().as_raw() == group || others()
}

/// Creates `path` and its parents, readable by the owner only.
///
/// # Errors
/// Those of the file system.
pub fn private_folder(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn provided_secret_may_be_read_by_a_group_of_the_process_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        fs::write(&path, "secret").expect("written");
        let is_read = |mode| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
            assert_eq!(read_secret(&path).is_ok(), mode & 0o077 == 0, "{mode:o}");
            read_provided_secret(&path).is_ok()
        };
        assert!([0o600, 0o400, 0o640, 0o440].into_iter().all(is_read));
        for mode in [0o660, 0o620, 0o650, 0o604, 0o644, 0o602, 0o601] {
            assert!(!is_read(mode), "{mode:o}");
        }
        // Only root can give a file to another group.
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&path, None, Some(65_533)).expect("changed");
            assert!(!is_read(0o640) && is_read(0o600));
        }
    }

    #[test]
    fn one_process_locks_and_others_wait_until_the_timeout() {
        let folder = tempfile::tempdir().expect("a folder");
        let lock = folder.path().join("lock");
        assert!(!is_locked(&lock), "no process has locked it yet");
        let locked = lock_file(&lock, Duration::ZERO).expect("free");
        assert!(is_locked(&lock));
        let error = lock_file(&lock, RETRY_EVERY * 2).expect_err("it is locked");
        assert_eq!((error.kind(), &*error.to_string()), (io::ErrorKind::WouldBlock, "another process uses it"));
        let waiting = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| lock_file(&lock, Duration::from_secs(60)));
            drop(locked);
            waiting.join().expect("no panic")
        });
        assert!(waiting.is_ok() && is_locked(&lock));
        drop(waiting);
        assert!(!is_locked(&lock));
        // An error of the file is not another process.
        let error = lock_file(&folder.path().join("absent/lock"), Duration::ZERO).expect_err("no folder");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
