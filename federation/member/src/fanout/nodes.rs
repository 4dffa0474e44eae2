//! The registered keys of nodes, and the nodes of the source.
//!
//! Each node has a file in the folder `nodes` of the member's state, named by the hash of the node's name. An enrolment with a node token replaces the keys;
//! one with a token of the agents' service account makes them former keys. A renewal adds the requested key; the first connection with it makes it the only key, so that a missed response is harmless. The previous key becomes a
//! former key. An agent writes its new key to disk before it uses it, so the use of a former key means that two processes have a copy of
//! the node's directory. From then on, acknowledgements of the node do not count until it is revoked. A lock on the file `.lock` in the
//! folder, or the versions of Secrets, serialise `hanse-member node revoke` and a running member.
//!
//! A running member has all records in memory and polls for changes, so that checking a key does not read a file. A change reads the file
//! under the lock.
//!
//! In a directory, a node without a file enrolled before keys were registered: it is accepted, and its next renewal registers its key.
//! Secrets are newer than that: there, it is refused, and enrols again. A node with an unreadable file is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hanse_identity::keys::Fingerprint;
use hanse_runtime::files::write_atomic;
use hanse_runtime::moment::{from_seconds, seconds};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::state::{State, Turn, Version};

const FOLDER: &str = "nodes";
/// The nodes of the source when it was last read, for commands that do not read the source.
const SOURCE_NODES: &str = "known-nodes.json";
/// How long a change waits for earlier ones of this process, and then for other processes. A change takes two disk flushes, about 10 ms.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long after expiry a certificate can be renewed.
const LATE_RENEWAL: Duration = Duration::from_secs(30 * 86_400);
/// The maximum number of stored former keys. One-day certificates, renewed after two thirds, take 45 keys in the time of a late renewal.
const MAX_FORMER: usize = 64;
/// The hexadecimal digits of a former key that are stored: 64 bits differ by accident, and a key that resembles one is only refused. At most
/// 1.2 KB per node.
const FORMER_DIGITS: usize = 16;

/// The stored record of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRecord {
    pub node: String,
    /// SHA-256 of the node's registered public key, hexadecimal.
    key: String,
    /// Likewise, of a renewed key that has not been used yet.
    next: Option<String>,
    /// Seconds since the Unix epoch, by the clock of this machine.
    enrolled_at: u64,
    /// When the last certificate expires, likewise.
    ends_at: u64,
    pub revoked: bool,
    /// The beginnings of the keys that renewals have replaced since the enrolment, the newest last. Earlier versions stored whole keys.
    #[serde(default)]
    former: Vec<String>,
    /// The address of the first use of the current key.
    #[serde(default)]
    used_from: Option<SocketAddr>,
    /// The addresses of the uses of the current key and of a former one.
    #[serde(default)]
    pub rivals: Option<(SocketAddr, SocketAddr)>,
}

impl NodeRecord {
    pub fn enrolled_at(&self) -> SystemTime {
        from_seconds(self.enrolled_at)
    }

    /// When the certificate of the node expires.
    pub fn ends_at(&self) -> SystemTime {
        from_seconds(self.ends_at)
    }

    /// It may enrol, and has no key yet.
    pub fn is_awaited(&self) -> bool {
        !self.revoked && self.key.is_empty()
    }

    fn allows(&self, key: &Fingerprint) -> bool {
        let key = key.to_string();
        !self.revoked && (self.key == key || self.next.as_ref() == Some(&key))
    }

    fn was_replaced(&self, key: &Fingerprint) -> bool {
        let text = key.to_string();
        let is_former = |former: &String| former.len() >= FORMER_DIGITS && text.starts_with(&**former);
        !self.revoked && !self.allows(key) && self.former.iter().any(is_former)
    }

    /// Makes the renewed key `key` the current one.
    fn promoted(mut self, key: &Fingerprint, from: SocketAddr) -> Self {
        let former = std::mem::replace(&mut self.key, key.to_string());
        if former != self.key && !former.is_empty() {
            self.former.push(former);
        }
        self.limit_former();
        Self { next: None, used_from: Some(from), ..self }
    }

    /// Makes `key` the current one, which enrolled while others were registered.
    fn enrolled_again(mut self, key: &Fingerprint, now: SystemTime, ends: SystemTime) -> Self {
        let key = key.to_string();
        self.former.extend([std::mem::take(&mut self.key)].into_iter().chain(self.next.take()));
        self.former.retain(|former| !former.is_empty() && !key.starts_with(&**former));
        self.limit_former();
        Self { key, used_from: None, enrolled_at: seconds(now), ends_at: seconds(ends), ..self }
    }

    fn limit_former(&mut self) {
        let excess = self.former.len().saturating_sub(MAX_FORMER);
        self.former.drain(..excess);
        self.former.iter_mut().for_each(|former| former.truncate(FORMER_DIGITS));
    }
}

/// The folder, with the records in memory.
#[derive(Debug)]
pub struct Nodes {
    state: State,
    /// By the hash of the node's name. `None`: the file is unreadable.
    records: Mutex<BTreeMap<Fingerprint, Option<ReadRecord>>>,
    /// Serialises changes of this process.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// A record, as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ReadRecord {
    version: Version,
    record: NodeRecord,
}

/// The locked folder.
#[derive(Debug)]
pub struct Locked<'a> {
    nodes: &'a Nodes,
    turn: Turn,
}

impl Nodes {
    /// Reads nothing; see [`Self::reload`].
    pub fn new(state: impl Into<State>) -> Self {
        Self { state: state.into(), records: Mutex::default(), turn: Arc::default() }
    }

    fn records(&self) -> MutexGuard<'_, BTreeMap<Fingerprint, Option<ReadRecord>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the folder. Blocks the thread while another process has the lock.
    ///
    /// # Errors
    /// When the folder cannot be locked in time.
    pub fn lock(&self) -> io::Result<Locked<'_>> {
        Ok(Locked { nodes: self, turn: self.state.lock(FOLDER, LOCK_TIMEOUT)? })
    }

    /// Changes the folder on a blocking thread, one change after the other.
    ///
    /// # Errors
    /// As [`Self::lock`].
    pub async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl FnOnce(&Locked<'_>) -> T + Send + 'static,
    ) -> io::Result<T> {
        let turn = tokio::time::timeout(LOCK_TIMEOUT, Arc::clone(&self.turn).lock_owned()).await?;
        let nodes = Arc::clone(self);
        let changing = tokio::task::spawn_blocking(move || {
            // Completes even if the caller is cancelled.
            let _turn = turn;
            nodes.lock().map(|locked| change(&locked))
        });
        changing.await?
    }

    /// Reads changed files. Returns whether another process has changed one.
    ///
    /// # Errors
    /// When the directory cannot be read. An unreadable file is logged.
    pub fn reload(&self) -> io::Result<bool> {
        let mut names: BTreeSet<Fingerprint> = self.records().keys().copied().collect();
        let files = self.state.list(FOLDER)?;
        names.extend(files.iter().filter_map(|name| Fingerprint::from_hex(name.strip_suffix(".json")?)));
        let mut changed = false;
        for name in names {
            let known = self.records().get(&name).cloned();
            let now = match self.read_record(&name, known.as_ref().and_then(Option::as_ref)) {
                Ok(record) => record.map(Some),
                Err(error) => {
                    if known != Some(None) {
                        tracing::error!(%error, file = file_of(&name), "node refused: its record cannot be read");
                    }
                    Some(None)
                }
            };
            let mut records = self.records();
            // A change of this process in the meantime is newer.
            if now != known && records.get(&name) == known.as_ref() {
                changed = true;
                match now {
                    Some(now) => records.insert(name, now),
                    None => records.remove(&name),
                };
            }
        }
        Ok(changed)
    }

    /// Reads a record, unless the file is still that of `known`.
    fn read_record(&self, name: &Fingerprint, known: Option<&ReadRecord>) -> io::Result<Option<ReadRecord>> {
        let file = file_of(name);
        let Some(version) = self.state.version(&file)? else { return Ok(None) };
        if let Some(known) = known.filter(|known| known.version == version) {
            return Ok(Some(known.clone()));
        }
        // A revocation does not remove it: another process has just replaced it.
        let bytes = self.state.read(&file)?.ok_or(io::ErrorKind::NotFound)?;
        Ok(Some(ReadRecord { version, record: serde_json::from_slice(&bytes)? }))
    }

    /// All readable records, sorted by name.
    pub fn list(&self) -> Vec<NodeRecord> {
        let mut nodes: Vec<NodeRecord> = self.records().values().flatten().map(|it| it.record.clone()).collect();
        nodes.sort_by(|a, b| a.node.cmp(&b.node));
        nodes
    }

    /// Whether `key` is registered for the node, as of the last read.
    pub fn allows(&self, node: &str, key: &Fingerprint) -> bool {
        match self.records().get(&Fingerprint::of(node.as_bytes())) {
            None => !self.state.is_in_secrets(),
            Some(kept) => kept.as_ref().is_some_and(|kept| kept.record.allows(key)),
        }
    }

    /// Whether the node has a record, as of the last read.
    pub fn has_record(&self, node: &str) -> bool {
        self.records().contains_key(&Fingerprint::of(node.as_bytes()))
    }

    /// Whether a certificate for `key` was issued, and the key not seen yet: see [`Locked::promote`].
    pub fn awaits(&self, node: &str, key: &Fingerprint) -> bool {
        let records = self.records();
        let kept = records.get(&Fingerprint::of(node.as_bytes())).and_then(Option::as_ref);
        kept.is_some_and(|kept| kept.record.next == Some(key.to_string()))
    }

    /// Whether a renewal has replaced `key`, and the newer one was used: see [`Locked::dispute`].
    pub fn was_replaced(&self, node: &str, key: &Fingerprint) -> bool {
        let records = self.records();
        let kept = records.get(&Fingerprint::of(node.as_bytes())).and_then(Option::as_ref);
        kept.is_some_and(|kept| kept.record.was_replaced(key))
    }

    /// From where the node's present key and a former one were used, if that has happened since it enrolled.
    pub fn rivals(&self, node: &str) -> Option<(SocketAddr, SocketAddr)> {
        let records = self.records();
        records.get(&Fingerprint::of(node.as_bytes())).and_then(Option::as_ref)?.record.rivals
    }

    /// Writes the nodes of the source, with their pod ranges.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_source_nodes(&self, nodes: &BTreeMap<Arc<str>, Vec<IpNet>>) -> io::Result<()> {
        write_atomic(&self.state.data().join(SOURCE_NODES), &serde_json::to_vec(nodes)?, 0o600)
    }

    /// The nodes of the source when it was last read; `None` if it was never read.
    pub fn read_source_nodes(&self) -> Option<BTreeMap<Arc<str>, Vec<IpNet>>> {
        serde_json::from_slice(&std::fs::read(self.state.data().join(SOURCE_NODES)).ok()?).ok()
    }
}

/// The file of a record.
fn file_of(name: &Fingerprint) -> String {
    format!("{FOLDER}/{name}.json")
}

impl Locked<'_> {
    /// In which other files are written, too.
    pub fn turn(&self) -> &Turn {
        &self.turn
    }

    /// # Errors
    /// When the file cannot be read: the registered key is then unknown.
    fn read(&self, node: &str) -> io::Result<Option<NodeRecord>> {
        Ok(self.nodes.read_record(&Fingerprint::of(node.as_bytes()), None)?.map(|it| it.record))
    }

    /// Registers `key` after an enrolment. Replaces an earlier record.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn enrolled(&self, node: &str, key: &Fingerprint, now: SystemTime, ends: SystemTime) -> io::Result<()> {
        self.write(NodeRecord {
            node: node.to_owned(),
            key: key.to_string(),
            next: None,
            enrolled_at: seconds(now),
            ends_at: seconds(ends),
            ..NodeRecord::default()
        })
    }

    /// Registers `key` after an enrolment that does not end earlier ones: the keys of those become former keys.
    ///
    /// # Errors
    /// When the record cannot be read or written.
    pub fn enrolled_again(&self, node: &str, key: &Fingerprint, now: SystemTime, ends: SystemTime) -> io::Result<()> {
        let record = self.read(node)?.unwrap_or_else(|| NodeRecord { node: node.to_owned(), ..NodeRecord::default() });
        self.write(record.enrolled_again(key, now, ends))
    }

    /// As [`Nodes::rivals`].
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn rivals(&self, node: &str) -> io::Result<Option<(SocketAddr, SocketAddr)>> {
        Ok(self.read(node)?.and_then(|it| it.rivals))
    }

    /// Whether the node was revoked, and has not enrolled since.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn is_revoked(&self, node: &str) -> io::Result<bool> {
        Ok(self.read(node)?.is_some_and(|it| it.revoked))
    }

    /// Whether `key` is the registered key, without a pending renewal.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn is_of(&self, node: &str, key: &Fingerprint) -> io::Result<bool> {
        Ok(self.read(node)?.is_some_and(|it| !it.revoked && it.key == key.to_string() && it.next.is_none()))
    }

    /// Records the use of `key`: a renewed key becomes the only key. Returns false if the key is not registered for the node.
    ///
    /// # Errors
    /// When the record cannot be read or written.
    pub fn promote(&self, node: &str, key: &Fingerprint, from: SocketAddr) -> io::Result<bool> {
        let Some(record) = self.read(node)? else { return Ok(!self.nodes.state.is_in_secrets()) };
        let allowed = record.allows(key);
        if allowed && record.next == Some(key.to_string()) {
            self.write(record.promoted(key, from))?;
        }
        Ok(allowed)
    }

    /// Registers `next` for a renewal with `key`. Returns false if `key` may not renew.
    ///
    /// # Errors
    /// As [`Self::promote`].
    pub fn renew(
        &self,
        node: &str,
        key: &Fingerprint,
        next: &Fingerprint,
        ends: SystemTime,
        from: SocketAddr,
    ) -> io::Result<bool> {
        let record = match self.read(node)? {
            Some(record) if !record.allows(key) => return Ok(false),
            Some(record) if record.next == Some(key.to_string()) => record.promoted(key, from),
            Some(record) => record,
            None if self.nodes.state.is_in_secrets() => return Ok(false),
            None => NodeRecord { node: node.to_owned(), key: key.to_string(), ..NodeRecord::default() },
        };
        self.write(NodeRecord { next: Some(next.to_string()), ends_at: seconds(ends), ..record })?;
        Ok(true)
    }

    /// Records the use of a former key after the newer one: two processes have a copy of the node's directory. Returns the addresses of
    /// both, of the first such use; `None` if `key` is not a former key.
    ///
    /// # Errors
    /// As [`Self::promote`].
    pub fn dispute(
        &self,
        node: &str,
        key: &Fingerprint,
        from: SocketAddr,
    ) -> io::Result<Option<(SocketAddr, SocketAddr)>> {
        let Some(record) = self.read(node)?.filter(|it| it.was_replaced(key)) else { return Ok(None) };
        if record.rivals.is_some() {
            return Ok(record.rivals);
        }
        let rivals = (record.used_from.unwrap_or(from), from);
        tracing::warn!(
            node,
            served = %rivals.0,
            refused = %rivals.1,
            "a replaced key of the node is used again: one process uses a copy of the node's directory; revoke the node and enrol it again"
        );
        self.write(NodeRecord { rivals: Some(rivals), ..record })?;
        Ok(Some(rivals))
    }

    /// Records a renewal with the registered key after the certificate has expired. Returns false if `key` may not renew.
    ///
    /// # Errors
    /// As [`Self::promote`].
    pub fn renew_late(&self, node: &str, key: &Fingerprint, now: SystemTime, ends: SystemTime) -> io::Result<bool> {
        let is_in_time = |it: &NodeRecord| now.duration_since(it.ends_at()).map_or(true, |late| late <= LATE_RENEWAL);
        let Some(record) = self.read(node)?.filter(|it| it.allows(key) && is_in_time(it)) else {
            return Ok(false);
        };
        self.write(NodeRecord { ends_at: seconds(ends), ..record })?;
        Ok(true)
    }

    /// Whether the node has a record, readable or not, or is in the source.
    pub fn is_known(&self, node: &str) -> bool {
        let is_in_source = || self.nodes.read_source_nodes().is_some_and(|nodes| nodes.contains_key(node));
        self.read(node).map_or(true, |record| record.is_some()) || is_in_source()
    }

    /// Revokes the keys of the node until it enrols again.
    ///
    /// # Errors
    /// When the record cannot be written. An unreadable record is replaced.
    pub fn revoke(&self, node: &str) -> io::Result<()> {
        let record = self.read(node).unwrap_or_else(|error| {
            tracing::warn!(%error, node, "record of the node not readable: it is replaced");
            None
        });
        let record = record.unwrap_or_else(|| NodeRecord { node: node.to_owned(), ..NodeRecord::default() });
        self.write(NodeRecord { revoked: true, former: Vec::new(), rivals: None, ..record })
    }

    /// Ends the revocation of a node: it may enrol again, with a new key only. Returns false if it was not revoked.
    ///
    /// # Errors
    /// When the record cannot be read or written.
    pub fn allow(&self, node: &str) -> io::Result<bool> {
        let Some(record) = self.read(node)?.filter(|it| it.revoked) else { return Ok(false) };
        let (key, next) = (String::new(), None);
        self.write(NodeRecord { revoked: false, key, next, ..record })?;
        Ok(true)
    }

    /// Makes room where a Secret is full: removes the records beside that of `name` of nodes that can neither connect nor renew any more.
    /// Returns their number.
    fn remove_ended(&self, name: &Fingerprint) -> io::Result<usize> {
        let now = SystemTime::now();
        let has_ended = |it: &NodeRecord| {
            !it.revoked && it.ends_at != 0 && now.duration_since(it.ends_at()).is_ok_and(|late| late > LATE_RENEWAL)
        };
        let digit = |name: &Fingerprint| name.0[0] >> 4;
        let ended: Vec<(Fingerprint, String)> = {
            let records = self.nodes.records();
            let beside = records.iter().filter(|(it, _)| digit(it) == digit(name));
            let ended = beside.filter_map(|(it, kept)| Some((*it, kept.as_ref().filter(|it| has_ended(&it.record))?)));
            ended.map(|(it, kept)| (it, kept.record.node.clone())).collect()
        };
        for (name, node) in &ended {
            self.nodes.state.remove(&file_of(name))?;
            self.nodes.records().remove(name);
            tracing::info!(node, "record of a node removed: its certificate ended more than 30 days ago");
        }
        Ok(ended.len())
    }

    fn write(&self, record: NodeRecord) -> io::Result<()> {
        let name = Fingerprint::of(record.node.as_bytes());
        let (file, bytes) = (file_of(&name), serde_json::to_vec(&record)?);
        let written = self.nodes.state.write_in(&self.turn, &file, &bytes);
        match written {
            Err(error) if error.kind() == io::ErrorKind::StorageFull && self.remove_ended(&name)? > 0 => {
                self.nodes.state.write_in(&self.turn, &file, &bytes)?;
            }
            written => written?,
        }
        let version = self.nodes.state.version(&file)?.ok_or(io::ErrorKind::NotFound)?;
        self.nodes.records().insert(name, Some(ReadRecord { version, record }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn address(last: u8) -> SocketAddr {
        ([192, 0, 2, last], 1).into()
    }

    /// If a copy of the directory renews the key, the other process still uses the former key.
    #[test]
    fn use_of_a_former_key_is_recorded_until_revocation() {
        let folder = tempfile::tempdir().expect("a folder");
        let nodes = Nodes::new(folder.path());
        let key = |name: &str| Fingerprint::of(name.as_bytes());
        let now = from_seconds(1_800_000_000);
        let locked = || nodes.lock().expect("free");
        let dispute = |name, last| locked().dispute("n", &key(name), address(last)).expect("kept");
        let renew =
            |of: &str, next: &str| locked().renew("n", &key(of), &key(next), now + HOUR, address(9)).expect("kept");
        locked().enrolled("n", &key("a"), now, now + HOUR).expect("kept");
        // A renewal for the same key replaces none.
        assert!(renew("a", "a") && locked().promote("n", &key("a"), address(1)).expect("kept"));
        assert!(nodes.allows("n", &key("a")) && !nodes.was_replaced("n", &key("a")));
        // The agent crashed before it had the new key, and renews again: no key was replaced.
        assert!(renew("a", "b") && renew("a", "c"));
        assert_eq!([dispute("a", 1), dispute("b", 1), dispute("c", 1)], [None; 3]);
        assert!(locked().promote("n", &key("a"), address(1)).expect("kept"));
        assert_eq!(dispute("a", 1), None, "the new key has not been used");
        assert!(locked().promote("n", &key("c"), address(2)).expect("kept"));
        assert_eq!((dispute("b", 1), nodes.rivals("n")), (None, None), "it was never used");
        // The next renewal with the newest key, whose first use is the renewal itself.
        assert!(renew("c", "d") && renew("d", "e"));
        for former in ["a", "c"] {
            assert!(nodes.was_replaced("n", &key(former)) && !nodes.allows("n", &key(former)));
        }
        assert_eq!(dispute("a", 3), Some((address(9), address(3))));
        assert_eq!(dispute("c", 4), Some((address(9), address(3))), "the first two are kept");
        // Another process reads it, and the one that is served goes on being served.
        let other = Nodes::new(folder.path());
        other.reload().expect("read");
        assert_eq!(other.rivals("n"), Some((address(9), address(3))));
        assert!(other.allows("n", &key("d")) && other.allows("n", &key("e")));
        assert!(locked().promote("n", &key("e"), address(9)).expect("kept") && nodes.rivals("n").is_some());
        locked().revoke("n").expect("kept");
        assert_eq!((dispute("a", 3), nodes.rivals("n")), (None, None));
        locked().enrolled("n", &key("f"), now, now + HOUR).expect("kept");
        assert_eq!((dispute("a", 3), dispute("f", 3), nodes.rivals("n")), (None, None, None));
        // What is kept is bounded.
        for at in 0..2 * MAX_FORMER {
            let of = |at: usize| if at == 0 { "f".to_owned() } else { format!("f{at}") };
            assert!(renew(&of(at), &of(at + 1)));
            assert!(locked().promote("n", &key(&of(at + 1)), address(1)).expect("kept"));
        }
        assert_eq!(nodes.list()[0].former.len(), MAX_FORMER);
        assert!(!nodes.was_replaced("n", &key("f1")) && nodes.was_replaced("n", &key("f127")));
    }

    #[test]
    fn one_key_is_registered_per_node_and_a_missed_answer_is_harmless() {
        let folder = tempfile::tempdir().expect("a folder");
        let nodes = Nodes::new(folder.path());
        let key = |name: &str| Fingerprint::of(name.as_bytes());
        let now = from_seconds(1_800_000_000);
        // As long as a name may be.
        let node = format!("{0}.{0}.{0}.{1}", "n".repeat(63), "n".repeat(61));
        let admitted = || ["a", "b", "c", "d"].map(|it| nodes.allows(&node, &key(it)));
        let from = address(1);
        let promoted = |it| nodes.lock().expect("free").promote(&node, &key(it), from).expect("kept");
        assert_eq!(admitted(), [true; 4], "it enrolled before keys were kept");
        nodes.lock().expect("free").enrolled(&node, &key("a"), now, now + HOUR).expect("kept");
        assert_eq!(admitted(), [true, false, false, false]);
        // Two answers are missed; then one is used.
        for next in ["b", "c"] {
            assert!(nodes.lock().expect("free").renew(&node, &key("a"), &key(next), now + HOUR, from).expect("kept"));
        }
        assert_eq!(admitted(), [true, false, true, false]);
        let is_of = |it| nodes.lock().expect("free").is_of(&node, &key(it)).expect("read");
        assert!(!is_of("a") && !is_of("c"), "a late response to an enrolment does not undo a renewal");
        assert_eq!(["a", "b", "c"].map(|it| nodes.awaits(&node, &key(it))), [false, false, true]);
        assert!(promoted("a") && !promoted("b"));
        assert_eq!(admitted(), [true, false, true, false], "the older one shows nothing of the newer");
        assert!(promoted("c"));
        assert_eq!(admitted(), [false, false, true, false]);
        assert!(is_of("c") && !nodes.awaits(&node, &key("c")));
        assert!(!nodes.lock().expect("free").renew(&node, &key("a"), &key("d"), now + HOUR, from).expect("read"));
        // A newer enrolment replaces all.
        nodes.lock().expect("free").enrolled(&node, &key("d"), now, now + HOUR).expect("kept");
        assert_eq!(admitted(), [false, false, false, true]);
        let late = |after: Duration| {
            nodes.lock().expect("free").renew_late(&node, &key("d"), now + after, now + HOUR).expect("kept")
        };
        assert!(late(HOUR * 2) && late(LATE_RENEWAL + HOUR) && !late(LATE_RENEWAL + HOUR * 2));
        nodes.lock().expect("free").revoke(&node).expect("kept");
        assert_eq!(admitted(), [false; 4]);
        assert!(!late(HOUR * 2) && !promoted("d"));
        assert_eq!(nodes.list().iter().map(|it| it.revoked).collect::<Vec<_>>(), [true]);
    }

    #[test]
    fn unknown_node_can_be_revoked() {
        let folder = tempfile::tempdir().expect("a folder");
        let nodes = Nodes::new(folder.path());
        let key = Fingerprint::of(b"key");
        assert!(nodes.allows("n", &key), "it enrolled before keys were kept");
        assert!(!nodes.lock().expect("free").is_known("n"));
        nodes.lock().expect("free").revoke("n").expect("kept");
        assert!(nodes.lock().expect("free").is_known("n"));
        assert!(!nodes.allows("n", &key));
        // Also with a damaged record.
        std::fs::write(folder.path().join(file_of(&Fingerprint::of(b"n"))), "no record").expect("written");
        assert!(nodes.lock().expect("free").renew("n", &key, &key, SystemTime::now(), address(1)).is_err());
        nodes.lock().expect("free").revoke("n").expect("kept");
        assert!(nodes.reload().is_ok() && !nodes.allows("n", &key));
    }

    #[test]
    fn reload_reads_only_files_changed_by_other_processes() {
        let folder = tempfile::tempdir().expect("a folder");
        let (nodes, other) = (Nodes::new(folder.path()), Nodes::new(folder.path()));
        let key = Fingerprint::of(b"key");
        let allowed = || ["a", "b"].map(|node| nodes.allows(node, &key));
        for node in ["a", "b"] {
            let now = SystemTime::now();
            nodes.lock().expect("free").enrolled(node, &key, now, now + HOUR).expect("kept");
        }
        assert!(!nodes.reload().expect("read"), "it has changed them itself");
        let path = folder.path().join(file_of(&Fingerprint::of(b"b")));
        let written = path.metadata().and_then(|it| it.modified()).expect("a time");
        let damage = |at| {
            std::fs::write(&path, "no record").expect("written");
            File::options().write(true).open(&path).and_then(|it| it.set_modified(at)).expect("set");
        };
        // By its time and number it is the file that was read.
        damage(written);
        other.lock().expect("free").revoke("a").expect("kept");
        assert_eq!(allowed(), [true; 2], "it was not looked for");
        assert!(nodes.reload().expect("read"));
        assert_eq!(allowed(), [false, true]);
        // A node whose file cannot be read is refused until it can.
        damage(written + HOUR);
        assert!(nodes.reload().expect("read"));
        assert_eq!((allowed(), nodes.list().len()), ([false; 2], 1));
        assert!(!nodes.reload().expect("read"), "it is still the same");
        let now = SystemTime::now();
        other.lock().expect("free").enrolled("b", &key, now, now + HOUR).expect("kept");
        assert!(nodes.reload().expect("read"));
        assert_eq!(allowed(), [false, true]);
        std::fs::remove_file(path).expect("removed");
        assert!(nodes.reload().expect("read") && nodes.list().len() == 1);
    }
}
