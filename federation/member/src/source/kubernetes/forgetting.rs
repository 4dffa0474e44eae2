//! Kept objects are listed in one file, and forgotten by a request in another one.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The longest time until a running member takes a request.
const TAKEN_WITHIN: Duration = Duration::from_secs(10);
/// Names in one request.
const MAX_NAMES: usize = 10_000;

/// Objects that are in force although their kind was deleted, each as `COLLECTION/NAMESPACE/NAME` or `COLLECTION/NAME`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Names {
    objects: Vec<String>,
}

/// The name of an object that is kept in force although its kind was deleted.
pub type KeptObject = String;

fn folder(data: &Path) -> PathBuf {
    data.join("source")
}

fn kept_file(data: &Path) -> PathBuf {
    folder(data).join("kept.json")
}

fn request_file(data: &Path) -> PathBuf {
    folder(data).join("forget.json")
}

fn replace(path: &Path, names: &Names) -> io::Result<()> {
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, serde_json::to_vec(names).map_err(io::Error::other)?)?;
    std::fs::rename(&temporary, path)
}

fn read(path: &Path) -> io::Result<Option<Names>> {
    match std::fs::read(path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The kept objects of the member with this data directory.
///
/// # Errors
/// When the file of the member cannot be read.
pub fn kept_objects(data: &Path) -> io::Result<Vec<KeptObject>> {
    Ok(read(&kept_file(data))?.unwrap_or_default().objects)
}

/// Requests that the running member forgets kept objects, and waits until it has.
///
/// # Errors
/// `TimedOut` when no member takes the request; when the request cannot be written.
pub fn forget(data: &Path, objects: Vec<KeptObject>) -> io::Result<()> {
    let path = request_file(data);
    replace(&path, &Names { objects })?;
    let start = Instant::now();
    while path.exists() {
        if start.elapsed() > TAKEN_WITHIN {
            std::fs::remove_file(&path)?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Objects to forget.
#[derive(Debug)]
pub(super) struct Request(Names);

impl Request {
    pub fn matches(&self, object: &str) -> bool {
        self.0.objects.iter().any(|it| it == object)
    }
}

/// The files of a running member.
#[derive(Debug)]
pub(super) struct Requests {
    data: PathBuf,
    written: Option<Names>,
}

impl Requests {
    pub fn new(data: &Path) -> Self {
        Self { data: data.to_owned(), written: None }
    }

    /// A request that was written since the last call.
    pub fn take(&self) -> Option<Request> {
        let path = request_file(&self.data);
        let request = read(&path).transpose()?;
        let removed = std::fs::remove_file(&path);
        match (request, removed) {
            (Ok(mut names), Ok(())) => {
                names.objects.truncate(MAX_NAMES);
                Some(Request(names))
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, path = %path.display(), "request to forget kept objects ignored");
                None
            }
        }
    }

    /// Lists the kept objects for `hanse-member forget`.
    pub fn write_kept(&mut self, objects: Vec<KeptObject>) {
        let names = Names { objects };
        if self.written.as_ref() == Some(&names) {
            return;
        }
        match replace(&kept_file(&self.data), &names) {
            Ok(()) => self.written = Some(names),
            Err(error) => tracing::warn!(%error, "the list of kept objects cannot be written"),
        }
    }
}
