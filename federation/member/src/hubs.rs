//! The replicas of the hub: which addresses lead to them, which of them this member reaches, and which one it watches.
//!
//! The configured addresses are the first ones; the hub sends those of its replicas, which are stored across restarts. An address says
//! where to connect, and nothing else: the certificate of a hub identifies it, as before. A list without addresses, or a wrong one, never
//! removes a configured address.
//!
//! Two addresses may lead to one replica, such as that of a Service and that of a pod. The member publishes to each replica once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hanse_exchange::hubs::read_list;
use hanse_exchange::model::Position;
use hanse_runtime::files::write_atomic;
use hanse_runtime::health::Writes;
use hanse_runtime::shutdown::Shutdown;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

mod choice;
mod view;

pub use choice::{Choice, Next};
pub use view::View;
use view::{ReachedHub, random_fraction};

/// The file of the announced addresses.
const FILE: &str = "hubs.json";
/// A changed list is followed within this time, so that not all members connect to a new replica at once.
const SPREAD: Duration = Duration::from_millis(500);
/// How long an address that leads to a replica which is reached by another address is not tried: it may lead to another one later.
const TRY_COVERED_AFTER: Duration = Duration::from_secs(60);

/// The replicas of the hub. Clones share them.
#[derive(Debug, Clone)]
pub struct Hubs {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cluster: Arc<str>,
    path: PathBuf,
    writes: Writes,
    configured: BTreeSet<String>,
    view: watch::Sender<Arc<View>>,
    next: AtomicU64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    addresses: Vec<String>,
}

/// Targets hubs a task is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Targets {
    All,
    /// Those to which the member publishes: one address of each replica.
    Reached,
}

impl Hubs {
    /// The configured addresses, and those that were announced before this start.
    pub fn restore(cluster: &str, data: &Path, configured: &[String], writes: Writes) -> Self {
        let path = data.join(FILE);
        let stored = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Stored>(&bytes).ok());
        let announced = stored.map(|it| read_list(&it.addresses).0).unwrap_or_default();
        let configured = configured.iter().cloned().collect();
        let mut view = View { announced, ..View::default() };
        view.rank(cluster, &configured);
        let (cluster, view) = (cluster.into(), watch::Sender::new(Arc::new(view)));
        Self { shared: Arc::new(Shared { cluster, path, writes, configured, view, next: AtomicU64::new(0) }) }
    }

    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.shared.view.borrow())
    }

    /// Notifies of changes.
    pub fn changes(&self) -> watch::Receiver<Arc<View>> {
        self.shared.view.subscribe()
    }

    /// All addresses, the preferred one first.
    pub fn all(&self) -> Vec<String> {
        self.view().ranked.clone()
    }

    /// The configured addresses.
    pub fn configured(&self) -> &BTreeSet<String> {
        &self.shared.configured
    }

    /// Those that the hub sent and that are not configured.
    pub fn announced(&self) -> BTreeSet<String> {
        &self.view().announced - &self.shared.configured
    }

    /// Takes over a list of the hub, and stores it.
    pub fn announce(&self, list: &[String]) {
        let (announced, refused) = read_list(list);
        if refused > 0 {
            tracing::warn!(refused, "addresses of the hub's replicas ignored: malformed, or more than the limit");
        }
        let changed = self.shared.view.send_if_modified(|view| {
            if view.announced == announced {
                return false;
            }
            let mut next = View::clone(view);
            next.announced.clone_from(&announced);
            next.rank(&self.shared.cluster, &self.shared.configured);
            *view = Arc::new(next);
            true
        });
        if changed {
            tracing::info!(?announced, "addresses of the hub's replicas received");
            let stored = Stored { addresses: announced.into_iter().collect() };
            let text = serde_json::to_vec(&stored).unwrap_or_default();
            self.shared.writes.note(FILE, &write_atomic(&self.shared.path, &text, 0o600));
        }
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, ReachedHub>)) {
        self.shared.view.send_if_modified(|view| {
            let mut next = View::clone(view);
            change(&mut next.reached);
            let is_new = next != **view;
            if is_new {
                *view = Arc::new(next);
            }
            is_new
        });
    }

    /// A Publish stream to `address` is open, until the result is dropped.
    pub fn reach(&self, address: &str) -> Reached {
        let stream = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let hub = ReachedHub { stream, replica: Bytes::new(), hub: None };
        self.change(|reached| drop(reached.insert(address.to_owned(), hub)));
        Reached { hubs: self.clone(), address: address.to_owned(), stream }
    }

    /// Waits while another address leads to the replica that `address` has led to, for a limited time.
    pub async fn while_covered(&self, address: &str, replica: &Bytes) {
        let mut view = self.shared.view.subscribe();
        let free = view.wait_for(|view| !view.is_covered(address, replica));
        let _ = tokio::time::timeout(TRY_COVERED_AFTER, free).await;
    }

    /// Runs a task for each hub, until its address is removed or the process stops.
    pub fn for_each<F>(
        &self,
        which: Targets,
        shutdown: &Shutdown,
        name: &'static str,
        task: impl Fn(String, CancellationToken) -> F + Clone + Send + Sync + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let running: Arc<Mutex<BTreeMap<String, CancellationToken>>> = Arc::default();
        let following = (self.clone(), shutdown.clone(), running, task);
        shutdown.supervise("list of hubs", move || {
            let (hubs, shutdown, running, task) = following.clone();
            async move {
                let (mut view, stop) = (hubs.changes(), shutdown.token());
                loop {
                    let wanted: BTreeSet<String> = {
                        let view = view.borrow_and_update();
                        match which {
                            Targets::All => view.ranked.iter().cloned().collect(),
                            Targets::Reached => view.reached.keys().cloned().collect(),
                        }
                    };
                    follow(&mut lock(&running), wanted, &stop, |address, stop| {
                        let task = task.clone();
                        shutdown.supervise(name, move || task(address.clone(), stop.clone()));
                    });
                    let changed = async {
                        let changed = view.changed().await;
                        if which == Targets::All {
                            tokio::time::sleep(SPREAD.mul_f64(random_fraction())).await;
                        }
                        changed
                    };
                    tokio::select! {
                        () = stop.cancelled() => return,
                        changed = changed => if changed.is_err() { return },
                    }
                }
            }
        });
    }
}

/// Ends the tasks of removed addresses, and starts those of new ones.
fn follow(
    running: &mut BTreeMap<String, CancellationToken>,
    wanted: BTreeSet<String>,
    stop: &CancellationToken,
    mut start: impl FnMut(String, CancellationToken),
) {
    running.retain(|address, token| {
        let stays = wanted.contains(address);
        if !stays {
            token.cancel();
        }
        stays
    });
    for address in wanted {
        if !running.contains_key(&address) {
            let token = stop.child_token();
            running.insert(address.clone(), token.clone());
            start(address, token);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The map is consistent after every call, also if another thread has panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open Publish stream.
#[derive(Debug)]
pub struct Reached {
    hubs: Hubs,
    address: String,
    stream: u64,
}

impl Reached {
    /// The replica that serves the stream, and its position.
    pub fn serves(&self, replica: &Bytes, hub: Position) {
        let stream = self.stream;
        self.hubs.change(|reached| {
            if let Some(it) = reached.get_mut(&self.address).filter(|it| it.stream == stream) {
                (it.replica, it.hub) = (replica.clone(), Some(hub));
            }
        });
    }

    /// Returns the replica when another address leads to it that is used instead.
    pub async fn covered(&self) -> Bytes {
        let mut view = self.hubs.changes();
        loop {
            let replica = view.borrow_and_update().reached.get(&self.address).map(|it| it.replica.clone());
            if let Some(replica) = replica.filter(|replica| self.hubs.view().is_covered(&self.address, replica)) {
                return replica;
            }
            if view.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        let stream = self.stream;
        self.hubs.change(|reached| reached.retain(|_, it| it.stream != stream));
    }
}

#[cfg(test)]
mod tests {
    use hanse_runtime::health::Health;
    use tokio::time::Instant;

    use super::*;

    fn hubs(data: &Path, configured: &[&str]) -> Hubs {
        let configured: Vec<String> = configured.iter().map(|it| (*it).to_owned()).collect();
        Hubs::restore("train", data, &configured, Writes::new(&Health::default()))
    }

    fn list(of: &[&str]) -> Vec<String> {
        of.iter().map(|it| (*it).to_owned()).collect()
    }

    fn all(hubs: &Hubs) -> BTreeSet<String> {
        hubs.all().into_iter().collect()
    }

    #[test]
    fn announced_addresses_survive_a_restart_and_never_remove_configured_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = hubs(folder.path(), &["hub:1"]);
        first.announce(&list(&["hub-0:1", "hub-1:1", "no address"]));
        let expected = BTreeSet::from(["hub:1", "hub-0:1", "hub-1:1"].map(str::to_owned));
        assert_eq!(all(&first), expected);
        let second = hubs(folder.path(), &["hub:1"]);
        assert_eq!(all(&second), expected);
        assert_eq!(second.all(), first.all(), "the order is the same");
        second.announce(&[]);
        assert_eq!(second.all(), ["hub:1"]);
        assert_eq!(hubs(folder.path(), &["hub:1"]).all(), ["hub:1"]);
        std::fs::write(folder.path().join(FILE), "damaged").expect("written");
        assert_eq!(hubs(folder.path(), &["hub:1"]).all(), ["hub:1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_address_of_each_replica_is_used_and_announced_ones_are_preferred() {
        let folder = tempfile::tempdir().expect("a folder");
        let hubs = hubs(folder.path(), &["a-service:1", "b-service:1"]);
        let replica = Bytes::from_static(b"one");
        let service = hubs.reach("a-service:1");
        service.serves(&replica, Position::default());
        let other = hubs.reach("b-service:1");
        other.serves(&replica, Position::default());
        assert_eq!(other.covered().await, replica, "the first by name");
        drop(other);
        hubs.announce(&list(&["pod-0:1"]));
        let pod = hubs.reach("pod-0:1");
        assert!(tokio::time::timeout(Duration::from_secs(1), service.covered()).await.is_err(), "which one is unknown");
        pod.serves(&replica, Position::default());
        assert_eq!(service.covered().await, replica);
        drop(service);
        assert!(tokio::time::timeout(Duration::from_secs(1), pod.covered()).await.is_err());
        let began = Instant::now();
        hubs.while_covered("a-service:1", &replica).await;
        assert_eq!(began.elapsed(), TRY_COVERED_AFTER);
        drop(pod);
        hubs.while_covered("a-service:1", &replica).await;
        assert_eq!(began.elapsed(), TRY_COVERED_AFTER);
    }

    #[test]
    fn streams_with_an_old_and_a_new_certificate_are_one_replica() {
        let folder = tempfile::tempdir().expect("a folder");
        let hubs = hubs(folder.path(), &["hub:1"]);
        let old = hubs.reach("hub:1");
        let new = hubs.reach("hub:1");
        drop(old);
        assert_eq!(hubs.view().reached.len(), 1);
        new.serves(&Bytes::from_static(b"one"), Position { epoch: 1, revision: 7 });
        assert_eq!(hubs.view().reached["hub:1"].hub, Some(Position { epoch: 1, revision: 7 }));
        drop(new);
        assert!(hubs.view().reached.is_empty());
    }

    #[test]
    fn tasks_follow_the_list() {
        let (mut running, stop) = (BTreeMap::new(), CancellationToken::new());
        let wanted = |of: &[&str]| of.iter().map(|it| (*it).to_owned()).collect::<BTreeSet<_>>();
        let mut started = Vec::new();
        let mut tokens = BTreeMap::new();
        for list in [wanted(&["a", "b"]), wanted(&["b", "c"]), wanted(&["b"])] {
            follow(&mut running, list, &stop, |address, token| {
                started.push(address.clone());
                tokens.insert(address, token);
            });
        }
        assert_eq!(started, ["a", "b", "c"]);
        let cancelled: Vec<bool> = tokens.values().map(CancellationToken::is_cancelled).collect();
        assert_eq!(cancelled, [true, false, true]);
        stop.cancel();
        assert!(tokens["b"].is_cancelled());
    }
}
