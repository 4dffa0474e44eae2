//! The nodes of the cluster: which key speaks for each, and which nodes the source knows.
//!
//! One file per node in the folder `nodes`, named by the hash of the node's name, which may be as long as a file's. A newer
//! enrolment replaces the key; what held the older one is let in no more. A renewal adds the key that it was asked for,
//! and the first connection with that one makes it the only one: an answer that was lost locks nobody out. A lock on the
//! file `.lock` in the folder keeps `hanse-member node revoke` and a member that runs apart.
//!
//! A node without such a file enrolled before keys were kept: it is let in, and its next renewal registers its key.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hanse_runtime::files::{hold, private_folder, write_atomic};
use hanse_runtime::keys::Fingerprint;
use hanse_runtime::moment::{from_seconds, seconds};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

const FOLDER: &str = "nodes";
/// What the source knew last, for those who run no source.
const KNOWN: &str = "known-nodes.json";
/// How long the folder is waited for: a change of it takes two flushes of a disk, about 10 ms.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long after its certificate's end a node may renew it.
const LATE_RENEWAL: Duration = Duration::from_secs(30 * 86_400);

/// What is kept of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRecord {
    pub node: String,
    /// SHA-256 of the public key that speaks for the node, hexadecimal.
    key: String,
    /// The same of a key whose certificate was issued, and that has not been seen yet.
    next: Option<String>,
    /// Seconds since the Unix epoch, by this machine's clock.
    enrolled_at: u64,
    /// When the last certificate ends, likewise.
    ends_at: u64,
    pub revoked: bool,
}

impl NodeRecord {
    pub fn enrolled_at(&self) -> SystemTime {
        from_seconds(self.enrolled_at)
    }

    /// When the node's certificate ends.
    pub fn ends_at(&self) -> SystemTime {
        from_seconds(self.ends_at)
    }

    fn allows(&self, key: &Fingerprint) -> bool {
        let key = key.to_string();
        !self.revoked && (self.key == key || self.next.as_ref() == Some(&key))
    }
}

/// The folder. Clones share it.
#[derive(Debug, Clone)]
pub struct Nodes {
    data: PathBuf,
}

/// The folder while nobody else changes it.
#[derive(Debug)]
pub struct Locked<'a> {
    nodes: &'a Nodes,
    _lock: File,
}

impl Nodes {
    pub fn new(data: &Path) -> Self {
        Self { data: data.to_owned() }
    }

    fn folder(&self) -> PathBuf {
        self.data.join(FOLDER)
    }

    fn path(&self, node: &str) -> PathBuf {
        self.folder().join(format!("{}.json", Fingerprint::of(node.as_bytes())))
    }

    /// # Errors
    /// When the lock cannot be had, or not in time.
    pub fn lock(&self) -> io::Result<Locked<'_>> {
        let folder = self.folder();
        private_folder(&folder)?;
        Ok(Locked { nodes: self, _lock: hold(&folder.join(".lock"), PATIENCE)? })
    }

    /// # Errors
    /// When there is a file that cannot be read: it is not known then who may speak for the node.
    pub fn read(&self, node: &str) -> io::Result<Option<NodeRecord>> {
        match std::fs::read(self.path(node)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            bytes => Ok(Some(serde_json::from_slice(&bytes?)?)),
        }
    }

    /// Every node that is kept, by name.
    ///
    /// # Errors
    /// When the folder or a file cannot be read.
    pub fn list(&self) -> io::Result<Vec<NodeRecord>> {
        let mut nodes: Vec<NodeRecord> = Vec::new();
        let entries = match self.folder().read_dir() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(nodes),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.ends_with(".json") && !name.starts_with('.') {
                nodes.push(serde_json::from_slice(&std::fs::read(&path)?)?);
            }
        }
        nodes.sort_by(|a, b| a.node.cmp(&b.node));
        Ok(nodes)
    }

    /// Whether `key` may speak for the node.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn allows(&self, node: &str, key: &Fingerprint) -> io::Result<bool> {
        Ok(self.read(node)?.is_none_or(|record| record.allows(key)))
    }

    /// As [`Self::allows`], of a key that is seen to be in use: a renewed one is the only one from now on.
    ///
    /// # Errors
    /// As [`Self::read`], and when the change cannot be kept.
    pub fn admits(&self, node: &str, key: &Fingerprint) -> io::Result<bool> {
        let Some(record) = self.read(node)? else { return Ok(true) };
        if record.allows(key) && record.key != key.to_string() {
            return self.lock()?.promote(node, key);
        }
        Ok(record.allows(key))
    }

    /// When anything of a node changed last.
    pub fn changed_at(&self) -> Option<SystemTime> {
        self.folder().metadata().and_then(|folder| folder.modified()).ok()
    }

    /// Keeps which nodes the source knows, with the ranges of their pods.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_known(&self, known: &BTreeMap<Arc<str>, Vec<IpNet>>) -> io::Result<()> {
        write_atomic(&self.data.join(KNOWN), &serde_json::to_vec(known)?, 0o600)
    }

    /// Which nodes the source knew last; none when it was never read.
    pub fn read_known(&self) -> Option<BTreeMap<Arc<str>, Vec<IpNet>>> {
        serde_json::from_slice(&std::fs::read(self.data.join(KNOWN)).ok()?).ok()
    }
}

impl Locked<'_> {
    /// A token has enrolled the node with `key`, whatever was before.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn enrolled(&self, node: &str, key: &Fingerprint, now: SystemTime, ends: SystemTime) -> io::Result<()> {
        self.write(&NodeRecord {
            node: node.to_owned(),
            key: key.to_string(),
            next: None,
            enrolled_at: seconds(now),
            ends_at: seconds(ends),
            revoked: false,
        })
    }

    /// Whether `key` is the one that speaks for the node, with no newer one in sight.
    ///
    /// # Errors
    /// As [`Nodes::read`].
    pub fn is_of(&self, node: &str, key: &Fingerprint) -> io::Result<bool> {
        Ok(self.nodes.read(node)?.is_some_and(|record| !record.revoked && record.key == key.to_string()))
    }

    fn promote(&self, node: &str, key: &Fingerprint) -> io::Result<bool> {
        // Read again: it may have been revoked meanwhile.
        let Some(record) = self.nodes.read(node)? else { return Ok(true) };
        let allowed = record.allows(key);
        if allowed {
            self.write(&NodeRecord { key: key.to_string(), next: None, ..record })?;
        }
        Ok(allowed)
    }

    /// Whoever holds `key` gets a certificate for `next` too. False: it may not.
    ///
    /// # Errors
    /// As [`Nodes::read`], and when the change cannot be kept.
    pub fn renew(&self, node: &str, key: &Fingerprint, next: &Fingerprint, ends: SystemTime) -> io::Result<bool> {
        let (key, next) = (key.to_string(), next.to_string());
        let record = match self.nodes.read(node)? {
            Some(record) if record.revoked || record.key != key && record.next.as_ref() != Some(&key) => {
                return Ok(false);
            }
            Some(record) => record,
            None => {
                let node = node.to_owned();
                NodeRecord { node, key: key.clone(), next: None, enrolled_at: 0, ends_at: 0, revoked: false }
            }
        };
        self.write(&NodeRecord { key, next: Some(next), ends_at: seconds(ends), ..record })?;
        Ok(true)
    }

    /// A certificate for `key`, which is registered, after the last has ended. False: it may not.
    ///
    /// # Errors
    /// As [`Self::renew`].
    pub fn renew_late(&self, node: &str, key: &Fingerprint, now: SystemTime, ends: SystemTime) -> io::Result<bool> {
        let Some(record) = self.nodes.read(node)?.filter(|it| it.allows(key) && now <= it.ends_at() + LATE_RENEWAL)
        else {
            return Ok(false);
        };
        self.write(&NodeRecord { ends_at: seconds(ends), ..record })?;
        Ok(true)
    }

    /// Lets no key speak for the node until it enrols anew. False: there is no such node.
    ///
    /// # Errors
    /// As [`Self::renew`].
    pub fn revoke(&self, node: &str) -> io::Result<bool> {
        let known = || self.nodes.read_known().is_some_and(|known| known.contains_key(node));
        let record = match self.nodes.read(node)? {
            Some(record) => record,
            None if known() => {
                let node = node.to_owned();
                NodeRecord { node, key: String::new(), next: None, enrolled_at: 0, ends_at: 0, revoked: true }
            }
            None => return Ok(false),
        };
        self.write(&NodeRecord { revoked: true, ..record })?;
        Ok(true)
    }

    fn write(&self, record: &NodeRecord) -> io::Result<()> {
        write_atomic(&self.nodes.path(&record.node), &serde_json::to_vec(record)?, 0o600)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn one_key_speaks_for_a_node_and_a_lost_answer_locks_nobody_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let nodes = Nodes::new(folder.path());
        let key = |name: &str| Fingerprint::of(name.as_bytes());
        let now = from_seconds(1_800_000_000);
        // As long as a name may be.
        let node = format!("{0}.{0}.{0}.{1}", "n".repeat(63), "n".repeat(61));
        let admitted = || ["a", "b", "c", "d"].map(|it| nodes.allows(&node, &key(it)).expect("read"));
        assert_eq!(admitted(), [true; 4], "it enrolled before keys were kept");
        nodes.lock().expect("free").enrolled(&node, &key("a"), now, now + HOUR).expect("kept");
        assert_eq!(admitted(), [true, false, false, false]);
        // Two answers are lost; then one is used.
        for next in ["b", "c"] {
            assert!(nodes.lock().expect("free").renew(&node, &key("a"), &key(next), now + HOUR).expect("kept"));
        }
        assert_eq!(admitted(), [true, false, true, false]);
        assert!(nodes.admits(&node, &key("a")).expect("read"));
        assert_eq!(admitted(), [true, false, true, false], "the older one shows nothing of the newer");
        assert!(nodes.admits(&node, &key("c")).expect("kept"));
        assert_eq!(admitted(), [false, false, true, false]);
        assert!(!nodes.lock().expect("free").renew(&node, &key("a"), &key("d"), now + HOUR).expect("read"));
        // A newer enrolment replaces all.
        nodes.lock().expect("free").enrolled(&node, &key("d"), now, now + HOUR).expect("kept");
        assert_eq!(admitted(), [false, false, false, true]);
        let late = |after: Duration| {
            nodes.lock().expect("free").renew_late(&node, &key("d"), now + after, now + HOUR).expect("kept")
        };
        assert!(late(HOUR * 2) && late(LATE_RENEWAL + HOUR) && !late(LATE_RENEWAL + HOUR * 2));
        assert!(nodes.lock().expect("free").revoke(&node).expect("kept"));
        assert_eq!(admitted(), [false; 4]);
        assert!(!late(HOUR * 2) && !nodes.admits(&node, &key("d")).expect("read"));
        assert_eq!(nodes.list().expect("read").iter().map(|it| it.revoked).collect::<Vec<_>>(), [true]);
        assert!(!nodes.lock().expect("free").revoke("other").expect("read"), "nobody knows it");
    }
}
