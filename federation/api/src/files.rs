//! The files of a directory of manifests, and their bytes.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

/// The largest file that is read: a list of 100,000 pods at 5 KiB each. Directories may have any number of files.
pub const MAX_FILE_BYTES: u64 = 512 * 1024 * 1024;

/// How many directories may lie between the one that is read and a file; below that, reading fails.
pub const MAX_DIRECTORY_DEPTH: usize = 16;

#[derive(Debug, thiserror::Error)]
#[error("read {path}")]
pub struct ReadError {
    pub path: PathBuf,
    pub source: std::io::Error,
}

/// What lies below a path.
#[derive(Debug, Default)]
pub struct Listing {
    /// Sorted.
    pub files: Vec<PathBuf>,
    /// What could not be looked at, a file or a directory: what it contains is unknown, which is not nothing.
    pub unread: Vec<ReadError>,
}

/// The files that [`read_dir`] would read below `path`, or `path` itself where it is not a directory. Links are followed; a
/// directory is listed once, by whatever names it is reached.
///
/// # Errors
/// When `path` itself cannot be looked at.
pub fn list(path: &Path) -> Result<Listing, ReadError> {
    let mut listing = Listing::default();
    if path.metadata().map_err(|source| ReadError { path: path.to_owned(), source })?.is_dir() {
        list_dir(path, 0, &mut BTreeSet::new(), &mut listing)?;
    } else {
        listing.files.push(path.to_owned());
    }
    listing.files.sort();
    Ok(listing)
}

fn list_dir(path: &Path, depth: usize, listed: &mut BTreeSet<PathBuf>, listing: &mut Listing) -> Result<(), ReadError> {
    let fail = |source| ReadError { path: path.to_owned(), source };
    if !listed.insert(path.canonicalize().map_err(fail)?) {
        return Ok(());
    }
    if depth > MAX_DIRECTORY_DEPTH {
        let message = format!("lies more than {MAX_DIRECTORY_DEPTH} directories below the one that is read");
        return Err(fail(std::io::Error::other(message)));
    }
    let mut entries = path.read_dir().and_then(Iterator::collect::<Result<Vec<_>, _>>).map_err(fail)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let metadata = match path.metadata() {
            Ok(metadata) => metadata,
            // It is gone by now.
            Err(_) if path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound) => continue,
            // A link that leads to nothing, or what may not be looked at; of any name, for it may be a directory.
            Err(source) => {
                listing.unread.push(ReadError { path, source });
                continue;
            }
        };
        let readable = path
            .extension()
            .is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension.eq_ignore_ascii_case(known)));
        if metadata.is_dir() {
            if let Err(error) = list_dir(&path, depth + 1, listed, listing) {
                listing.unread.push(error);
            }
        } else if metadata.is_file() && readable {
            listing.files.push(path);
        } else if readable {
            // Reading a FIFO or a device may never end.
            let source = std::io::Error::other("not a regular file: a FIFO, a socket or a device is not read");
            listing.unread.push(ReadError { path, source });
        }
    }
    Ok(())
}

/// Reads one file, up to [`MAX_FILE_BYTES`].
pub fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    read_bounded(std::fs::File::open(path)?)
}

/// Reads standard input, up to [`MAX_FILE_BYTES`].
pub fn read_stdin_bytes() -> std::io::Result<Vec<u8>> {
    read_bounded(std::io::stdin().lock())
}

fn read_bounded(from: impl std::io::Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!("larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(bytes)
}
