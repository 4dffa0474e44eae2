//! Where a member learns of its own cluster.
//!
//! [`Source`] is what the process needs; [`Directory`] reads a directory of ordinary Kubernetes YAML. A source never
//! takes "cannot be read" for "empty": what was last good stays in force, and the problem is named.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use hanse_k8s_api::assemble::ClusterState;
use hanse_k8s_api::assemble_cluster;
use hanse_k8s_api::manifest::{self, Diagnostic, Manifest, Manifests, Place};
use hanse_policy::model::ClusterName;

/// A cluster as its source has it.
#[derive(Debug, Clone, Default)]
pub struct Sourced {
    pub state: ClusterState,
    /// What is wrong, with file and line.
    pub problems: Vec<Diagnostic>,
    /// Grows with each change.
    pub revision: u64,
}

/// Tells when the cluster changed.
pub trait Source: Send {
    /// Looks, and gives the whole when anything changed since the last call. Blocking.
    fn look(&mut self) -> Option<Arc<Sourced>>;
}

/// A directory of manifests. A file that breaks keeps its last good state; one that is gone is gone.
#[derive(Debug)]
pub struct Directory {
    cluster: ClusterName,
    path: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Why the directory cannot be listed, while it cannot.
    unlisted: Option<String>,
    revision: u64,
}

#[derive(Debug, Default)]
struct File {
    seen: Option<Stamp>,
    good: Vec<Manifest>,
    problems: Vec<Diagnostic>,
}

/// What differs when a file was written or replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    length: u64,
    inode: u64,
}

impl Directory {
    pub fn new(cluster: ClusterName, path: PathBuf) -> Self {
        Self { cluster, path, files: BTreeMap::new(), unlisted: None, revision: 0 }
    }

    /// Brings `files` up to date; whether anything changed.
    fn refresh(&mut self) -> bool {
        let listed = match manifest::list(&self.path) {
            Ok(listed) => listed,
            Err(error) => {
                let reason = format!("{error}: {}; what was read last stays in force", error.source);
                let news = self.unlisted.as_ref() != Some(&reason);
                self.unlisted = Some(reason);
                return news;
            }
        };
        let mut changed = self.unlisted.take().is_some();
        let before = self.files.len();
        self.files.retain(|path, _| listed.binary_search(path).is_ok());
        changed |= self.files.len() != before;
        for path in listed {
            let file = self.files.entry(path.clone()).or_default();
            let stamp = stamp(&path);
            if stamp.is_some() && file.seen == stamp {
                continue;
            }
            file.seen = stamp;
            changed |= file.read(&path);
        }
        changed
    }
}

impl File {
    /// Reads anew; whether the file's part of the state, or its problems, changed.
    fn read(&mut self, path: &Path) -> bool {
        let name: Arc<str> = path.to_string_lossy().into();
        let mut read = Manifests::default();
        match manifest::read_file(path) {
            Ok(bytes) => manifest::read_bytes(&name, &bytes, &mut read),
            Err(error) => read.diagnostics.push(Diagnostic {
                place: Place { file: name, line: 1 },
                start: 1,
                field: String::new(),
                message: error.to_string(),
                object: None,
            }),
        }
        let broken = !read.diagnostics.is_empty();
        let first = self.good.is_empty();
        let news = self.problems != read.diagnostics || !broken;
        self.problems = read.diagnostics;
        // A file that was never good gives what it has; one that was keeps what it had.
        if !broken || first {
            self.good = read.objects;
        }
        news
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = path.metadata().ok()?;
    Some(Stamp { modified: metadata.modified().ok(), length: metadata.len(), inode: metadata.ino() })
}

impl Source for Directory {
    fn look(&mut self) -> Option<Arc<Sourced>> {
        if !self.refresh() && self.revision > 0 {
            return None;
        }
        // Nothing was ever read: unknown, not empty.
        if self.unlisted.is_some() && self.revision == 0 {
            return None;
        }
        self.revision += 1;
        let objects: Vec<&Manifest> = self.files.values().flat_map(|file| &file.good).collect();
        let state = assemble_cluster(&self.cluster, objects.iter().copied());
        let mut problems: Vec<Diagnostic> = self.files.values().flat_map(|file| file.problems.clone()).collect();
        if let Some(reason) = &self.unlisted {
            let place = Place { file: self.path.to_string_lossy().into(), line: 1 };
            let (field, message) = (String::new(), reason.clone());
            problems.push(Diagnostic { place, start: 1, field, message, object: None });
        }
        problems.extend(state.diagnostics.iter().cloned());
        for problem in &problems {
            tracing::warn!(
                file = %problem.place.file,
                line = problem.place.line,
                field = problem.field,
                problem = problem.message,
                "a manifest is not used as written"
            );
        }
        Some(Arc::new(Sourced { state, problems, revision: self.revision }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a}\nstatus: {podIP: 10.0.0.1}\n";

    fn write(folder: &Path, name: &str, text: &str) {
        // Replaced as editors do it, so that it never is half there.
        let temporary = folder.join(format!(".{name}"));
        std::fs::write(&temporary, text).expect("written");
        std::fs::rename(&temporary, folder.join(name)).expect("renamed");
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_state() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("cluster");
        let mut source = Directory::new("c".into(), path.clone());
        assert!(source.look().is_none(), "a directory that cannot be read is not an empty one");
        std::fs::create_dir(&path).expect("made");
        write(&path, "pod.yaml", POD);
        let read = source.look().expect("news");
        assert_eq!((read.state.cluster.endpoints.len(), read.problems.len()), (1, 0));
        assert!(source.look().is_none(), "no news");
        write(&path, "pod.yaml", "apiVersion: v1\nkind: [\n");
        let read = source.look().expect("news");
        assert_eq!((read.state.cluster.endpoints.len(), read.problems.len()), (1, 1));
        assert!(read.problems[0].place.file.ends_with("pod.yaml") && read.problems[0].place.line >= 2);
        write(&path, "other.yaml", &POD.replace("name: p", "name: q").replace("0.1", "0.2"));
        assert_eq!(source.look().expect("news").state.cluster.endpoints.len(), 2, "others are read all the same");
        std::fs::rename(&path, folder.path().join("away")).expect("renamed");
        let read = source.look().expect("the problem is news");
        assert_eq!(read.state.cluster.endpoints.len(), 2, "what cannot be listed stays");
        assert!(source.look().is_none());
        std::fs::rename(folder.path().join("away"), &path).expect("renamed");
        std::fs::remove_file(path.join("pod.yaml")).expect("removed");
        let read = source.look().expect("news");
        assert_eq!((read.state.cluster.endpoints.len(), read.problems.len()), (1, 0), "a file that is gone is gone");
    }
}
