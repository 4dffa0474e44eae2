//! The exchange of a member over connections: publishes to every replica of the hub, watches one, and stores snapshots on disk.
//!
//! No task waits for I/O while it has a lock. Connections are retried without limit; meanwhile, the last received state stays in use.

mod opening;
mod publishing;
mod watching;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hanse_api::assemble::Changed;
use hanse_exchange::codec;
use hanse_exchange::interest::Interest;
use hanse_exchange::message::{PublishRequest, Refusals, WatchRequest, WatchResponse};
use hanse_identity::token;
use hanse_policy::inventory::Cluster;
use hanse_proto::federation::v1 as pb;
use hanse_protocol::reason::ExchangeProblem;
use hanse_runtime::files::write_atomic;
use hanse_runtime::health::Writes;
use hanse_runtime::shutdown::Shutdown;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::model::Updates;
use super::publisher::{ChangedExports, PublishSession, Publisher};
use super::receiver::{ReceiveError, ReceiveProblem, Receiver};
use crate::federated::Reader;
use crate::hubs::{Hubs, Targets};
use crate::leadership::Leadership;
use crate::registration::MemberIdentity;

/// The minimum interval between snapshots of received objects.
const STORE_EVERY: Duration = Duration::from_secs(1);
/// The same for published objects, of which only the numbering must survive a restart.
const STORE_PUBLISHED_EVERY: Duration = Duration::from_secs(30);
/// The interval between retries of a failed write.
const RETRY_WRITE_AFTER: Duration = Duration::from_secs(2);
/// The duration of a lease until the hub has sent it, and the accepted range.
const LEASE: Duration = Duration::from_secs(30);
const LEASE_AT_LEAST: Duration = Duration::from_secs(3);
const LEASE_AT_MOST: Duration = Duration::from_secs(3_600);
const HEADER: &[u8] = b"hanse-exchange/1\n";

/// The exchange state of a member. Clones share it.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    data: PathBuf,
    writes: Writes,
    /// A cache of federated objects, filled when they are received.
    reader: Reader,
    publisher: Mutex<Publisher>,
    /// Serialises snapshots of published objects. Locked before `publisher`.
    storing: Mutex<()>,
    receiver: Mutex<Receiver>,
    /// Locked after `receiver`.
    kept: Mutex<Kept>,
    /// Counts changes to publish.
    published: watch::Sender<u64>,
    /// Counts received changes.
    received: watch::Sender<u64>,
    own: watch::Sender<Interest>,
    realisation: watch::Sender<Option<Arc<pb::Realisation>>>,
    refusals: Mutex<Refusals>,
    watching: Mutex<Watching>,
    /// Of several members of the cluster, this process leads.
    leadership: Option<Leadership>,
    hubs: Hubs,
    /// Identifies this process at hubs. A process on a copy of the data directory has another value.
    instance: [u8; 16],
}

/// The state of the Watch stream.
#[derive(Debug)]
struct Watching {
    /// When a message last arrived on an accepted stream; initially, the start of the process.
    received: Instant,
    /// A message has arrived since the start.
    has_received: bool,
    /// The duration of the lease, as sent by the hub.
    lease: Duration,
    /// Why the last stream ended.
    error: Option<String>,
    /// The last result of comparing digests at the hub.
    digests_equal: Option<bool>,
    /// The address of the replica that serves the stream.
    hub: Option<String>,
}

/// Counts received changes, those on disk, and those in use. While changes are in use that are not on disk, a marker file exists: after a
/// crash, it shows that the snapshot is older than the state that nodes enforce.
#[derive(Debug, Default)]
struct Kept {
    received: u64,
    stored: u64,
    handed: u64,
    /// The marker file exists.
    marked: bool,
}

/// The name of the marker file.
const AHEAD: &str = "receiver.ahead";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The data is consistent after every call, also if another thread has panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn problem(of: ReceiveProblem) -> ExchangeProblem {
    match of {
        ReceiveProblem::SelectionsRejected(why) => ExchangeProblem::SelectionsRejected(why),
        ReceiveProblem::SelectionRejected(why) => ExchangeProblem::SelectionRejected(why),
        ReceiveProblem::SelectionsUnreadable(count) => ExchangeProblem::SelectionsUnreadable(count),
        ReceiveProblem::ObjectsUnreadable { cluster, count } => {
            ExchangeProblem::ObjectsUnreadable { cluster: cluster.map(|name| name.to_string()), count }
        }
    }
}

impl Client {
    /// Restores the snapshots of published and received objects.
    pub fn restore(data: &Path, writes: Writes, hubs: Hubs) -> Self {
        let publisher = read(&data.join("publisher.snapshot")).and_then(|bytes| Publisher::restore(&bytes));
        let epoch = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_millis() as u64);
        let reader = Reader::default();
        let receiver =
            read(&data.join("receiver.snapshot")).and_then(|bytes| Receiver::restore_checked(&bytes, reader.clone()));
        let mut receiver = receiver.unwrap_or_else(|| Receiver::checked(reader.clone()));
        let marked = data.join(AHEAD).exists();
        if marked {
            tracing::warn!(
                "snapshot of received objects older than the rules of nodes: not used until the hub confirms it"
            );
            receiver.require_confirmation();
        }
        let shared = Shared {
            data: data.to_owned(),
            writes,
            reader,
            // Without a snapshot, the clock makes the epoch larger than all earlier ones.
            publisher: Mutex::new(publisher.unwrap_or_else(|| Publisher::new(epoch()))),
            storing: Mutex::default(),
            receiver: Mutex::new(receiver),
            kept: Mutex::new(Kept { marked, ..Kept::default() }),
            published: watch::Sender::new(0),
            received: watch::Sender::new(0),
            own: watch::Sender::default(),
            realisation: watch::Sender::default(),
            refusals: Mutex::default(),
            leadership: None,
            // If no randomness is available, TLS fails as well.
            instance: token::random().unwrap_or_default(),
            watching: Mutex::new(Watching {
                received: Instant::now(),
                has_received: false,
                lease: LEASE,
                error: None,
                digests_equal: None,
                hub: None,
            }),
            hubs,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Notes there that a hub serves another process of the cluster.
    #[must_use]
    pub fn with_leadership(mut self, leadership: Option<Leadership>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.leadership = leadership;
        }
        self
    }

    /// The cache of federated objects.
    pub fn reader(&self) -> Reader {
        self.shared.reader.clone()
    }

    /// Publishes to all replicas of the hub and watches one, until the shutdown.
    pub fn start(&self, identity: &MemberIdentity, shutdown: &Shutdown) {
        let (client, publishing) = (self.clone(), identity.clone());
        self.shared.hubs.for_each(Targets::All, shutdown, "publishing to a hub", move |hub, stop| {
            let (client, identity) = (client.clone(), publishing.clone());
            async move { client.publish_for_ever(&identity, &hub, &stop).await }
        });
        let (client, identity) = (self.clone(), identity.clone());
        let stop = shutdown.token();
        shutdown.supervise("watching a hub", move || {
            let (client, identity, stop) = (client.clone(), identity.clone(), stop.clone());
            async move { client.watch_for_ever(&identity, &stop).await }
        });
        let (client, stop) = (self.clone(), shutdown.token());
        shutdown.supervise("snapshot of what was received", move || {
            let (client, stop) = (client.clone(), stop.clone());
            async move { client.store_received_for_ever(&stop).await }
        });
        let (client, stop) = (self.clone(), shutdown.token());
        shutdown.supervise("snapshot of what is published", move || {
            let (client, stop) = (client.clone(), stop.clone());
            async move { client.store_published_for_ever(&stop).await }
        });
    }

    /// Publishes the changes of this cluster. `changed`: the changed objects of `cluster`.
    pub fn publish(&self, cluster: &Cluster, changed: &Changed) {
        let mut publisher = lock(&self.shared.publisher);
        let Changed { namespaces, service_accounts, endpoints, .. } = changed;
        if !publisher.publish(cluster, ChangedExports { namespaces, service_accounts, endpoints }) {
            return;
        }
        drop(publisher);
        self.shared.published.send_modify(|count| *count += 1);
    }

    /// Stores the published objects. After a restart, objects that are not stored get new ids. Returns whether it succeeded.
    fn store_published(&self) -> bool {
        let _one_at_a_time = lock(&self.shared.storing);
        let (bytes, reserved) = lock(&self.shared.publisher).store();
        let written = self.write("publisher.snapshot", &bytes);
        if written {
            lock(&self.shared.publisher).stored(reserved);
        }
        written
    }

    /// The requests for changes that a hub does not have. Ids are on disk before they are sent, so that a restart does not reuse them.
    fn poll(&self, session: &mut PublishSession) -> Vec<PublishRequest> {
        if lock(&self.shared.publisher).must_store() {
            self.store_published();
        }
        session.poll(&lock(&self.shared.publisher))
    }

    /// Sets the interest of this cluster's own policies.
    pub fn want(&self, wanted: Interest) {
        self.shared.own.send_if_modified(|own| std::mem::replace(own, wanted.clone()) != wanted);
    }

    /// Sets the enforcement status to report to hubs.
    pub fn report(&self, realisation: pb::Realisation) {
        let realisation = Some(Arc::new(realisation));
        self.shared.realisation.send_if_modified(|last| {
            let changed = *last != realisation;
            last.clone_from(&realisation);
            changed
        });
    }

    /// Changes since the last call. `changes` notifies of new ones.
    pub fn take_updates(&self) -> Option<Updates> {
        let mut receiver = lock(&self.shared.receiver);
        let updates = receiver.take_updates()?;
        let mut kept = lock(&self.shared.kept);
        kept.handed = kept.received;
        if kept.handed > kept.stored && !kept.marked {
            let marked = std::fs::write(self.shared.data.join(AHEAD), []);
            kept.marked = marked.is_ok();
            self.shared.writes.note(AHEAD, &marked);
        }
        Some(updates)
    }

    /// Processes a message of the hub and returns the responses. A message of an unknown kind is ignored.
    fn receive(&self, message: pb::WatchResponse) -> Result<Vec<pb::WatchRequest>, ReceiveError> {
        let answers = match codec::watch::decode_response(message)? {
            Some(message) => self.take(message)?,
            None => Vec::new(),
        };
        Ok(answers.into_iter().map(codec::watch::encode_request).collect())
    }

    fn take(&self, message: WatchResponse) -> Result<Vec<WatchRequest>, ReceiveError> {
        let is_quiet = matches!(
            message,
            WatchResponse::Welcome { .. }
                | WatchResponse::Heartbeat
                | WatchResponse::PartsRefused(_)
                | WatchResponse::Hubs(_)
                | WatchResponse::Compared { .. }
        );
        match &message {
            WatchResponse::Hubs(addresses) => self.shared.hubs.announce(addresses),
            WatchResponse::Compared { equal } => lock(&self.shared.watching).digests_equal = Some(*equal),
            _ => {}
        }
        let heartbeat_ms = match &message {
            WatchResponse::Welcome { heartbeat_ms } => Some(*heartbeat_ms),
            _ => None,
        };
        let mut receiver = lock(&self.shared.receiver);
        // The first heartbeat may confirm the restored state.
        let is_change = !is_quiet || receiver.is_unconfirmed();
        lock(&self.shared.kept).received += u64::from(is_change);
        let answers = receiver.take(message)?;
        let served = receiver.is_served();
        drop(receiver);
        if served {
            let mut watching = lock(&self.shared.watching);
            (watching.received, watching.has_received, watching.error) = (Instant::now(), true, None);
            if let Some(heartbeat_ms) = heartbeat_ms {
                // A third of the lease.
                let lease = Duration::from_millis(heartbeat_ms.saturating_mul(3));
                watching.lease = lease.clamp(LEASE_AT_LEAST, LEASE_AT_MOST);
            }
        }
        if is_change {
            self.shared.received.send_modify(|count| *count += 1);
        }
        Ok(answers)
    }

    /// Stores the received objects. Returns whether it succeeded.
    fn store_received(&self) -> bool {
        let (bytes, at) = {
            let receiver = lock(&self.shared.receiver);
            (receiver.store(), lock(&self.shared.kept).received)
        };
        if !self.write("receiver.snapshot", &bytes) {
            return false;
        }
        let receiver = lock(&self.shared.receiver);
        let mut kept = lock(&self.shared.kept);
        kept.stored = at;
        if kept.marked && kept.handed <= at && !receiver.is_unconfirmed() {
            // If the marker cannot be removed, the next start waits for the hub unnecessarily.
            kept.marked = std::fs::remove_file(self.shared.data.join(AHEAD)).is_err();
        }
        true
    }

    /// Notifies of received changes. The first notification is immediate and covers all earlier changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        let mut changes = self.shared.received.subscribe();
        changes.mark_changed();
        changes
    }

    /// The message for an idle Publish stream.
    fn heartbeat(&self) -> PublishRequest {
        let watching = lock(&self.shared.watching);
        let age = u64::try_from(watching.received.elapsed().as_millis()).unwrap_or(u64::MAX);
        PublishRequest::Heartbeat { received_age_ms: watching.has_received.then_some(age) }
    }

    /// Whether a message of the hub arrived within a lease. Otherwise the policies in force may be out of date.
    pub fn is_watching(&self) -> bool {
        let watching = lock(&self.shared.watching);
        watching.received.elapsed() < watching.lease
    }

    /// Whether the digests of this member equalled those of the hub that it watches, when they were last compared.
    pub fn digests_equal(&self) -> Option<bool> {
        lock(&self.shared.watching).digests_equal
    }

    /// The address of the replica that is watched, while it serves the stream.
    pub fn watched(&self) -> Option<String> {
        lock(&self.shared.watching).hub.clone()
    }

    /// Problems of the connection to the hub and of received objects.
    pub fn problems(&self) -> Vec<ExchangeProblem> {
        let mut problems = Vec::new();
        {
            let watching = lock(&self.shared.watching);
            let age = watching.received.elapsed();
            if age >= watching.lease {
                // Rounded, so that the passage of time alone does not change the report.
                let silent = Duration::from_secs(age.as_secs() / 10 * 10);
                problems.push(ExchangeProblem::HubSilent { silent, error: watching.error.clone() });
            }
        }
        problems.extend(lock(&self.shared.receiver).problems().into_iter().map(problem));
        problems
    }

    /// Reads the state of the receiver.
    pub fn with_receiver<T>(&self, look: impl FnOnce(&Receiver) -> T) -> T {
        look(&lock(&self.shared.receiver))
    }

    /// Writes a snapshot with a checksum. Returns whether it succeeded.
    fn write(&self, name: &'static str, body: &[u8]) -> bool {
        let bytes = [HEADER, blake3::hash(body).as_bytes(), body].concat();
        let written = write_atomic(&self.shared.data.join(name), &bytes, 0o600);
        // If this fails, new objects cannot be published when the reserved ids are used up.
        self.shared.writes.note(name, &written);
        written.is_ok()
    }

    /// Stores received objects, so that the member starts without a hub.
    async fn store_received_for_ever(&self, stop: &CancellationToken) {
        let mut received = self.changes();
        let mut written = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                changed = received.changed() => if changed.is_err() { break },
                () = tokio::time::sleep(RETRY_WRITE_AFTER), if !written => {}
            }
            written = self.store_received();
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(STORE_EVERY) => {}
            }
        }
        self.store_received();
    }

    async fn store_published_for_ever(&self, stop: &CancellationToken) {
        let mut published = self.shared.published.subscribe();
        let mut written = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                changed = published.changed() => if changed.is_err() { break },
                () = std::future::ready(()), if !written => {}
            }
            // Hubs receive changes before the snapshot is written.
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(if written { STORE_PUBLISHED_EVERY } else { RETRY_WRITE_AFTER }) => {}
            }
            let client = self.clone();
            // The panic hook logs a panic.
            written = tokio::task::spawn_blocking(move || client.store_published()).await.unwrap_or(true);
        }
        self.store_published();
    }
}

/// Reads a snapshot. `None`: the file does not exist, or is damaged, which is logged.
fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let whole = bytes.strip_prefix(HEADER).and_then(|rest| rest.split_at_checked(32));
    let body = whole.filter(|(hash, body)| blake3::hash(body).as_bytes() == hash).map(|(_, body)| body.to_vec());
    if body.is_none() {
        tracing::warn!(path = %path.display(), "snapshot damaged: not used");
    }
    body
}

#[cfg(test)]
mod tests {
    use hanse_exchange::message::{InterestChange, PublishResponse};
    use hanse_exchange::model::Position;
    use hanse_runtime::health::Health;

    use super::*;

    fn writes() -> Writes {
        Writes::new(&Health::default())
    }

    fn hubs(data: &Path) -> Hubs {
        Hubs::restore("train", data, &["hub:7443".to_owned()], writes())
    }

    #[test]
    fn a_list_of_hubs_changes_addresses_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let (client, _) = start(folder.path());
        receive_empty_snapshot(&client, 1);
        client.take_updates();
        let changes = client.changes();
        let counted = *changes.borrow();
        let list = vec!["hub-0:7443".to_owned(), "hub-1:7443".to_owned()];
        client.take(WatchResponse::Hubs(list)).expect("the protocol");
        client.take(WatchResponse::Compared { equal: true }).expect("the protocol");
        assert_eq!((*changes.borrow(), client.take_updates().is_none()), (counted, true));
        assert_eq!((client.shared.hubs.all().len(), client.digests_equal()), (3, Some(true)));
        // A message of a hub of another version.
        assert!(client.receive(pb::WatchResponse { message: None }).expect("it is ignored").is_empty());
    }

    /// Receives an empty snapshot of the hub at `revision`.
    fn receive_empty_snapshot(client: &Client, revision: u64) {
        let position = Position { epoch: 1, revision };
        for message in [
            WatchResponse::Interest(InterestChange { number: 1, ..InterestChange::default() }),
            WatchResponse::Begin { origin: None, snapshot: true, needs_interest: 1 },
            WatchResponse::End { position, digest: Some(0), view: 0 },
            WatchResponse::Heartbeat,
        ] {
            client.take(message).expect("the protocol");
        }
    }

    /// Starts a member on these files. Returns its first revision in force; 0: none.
    fn start(data: &Path) -> (Client, u64) {
        let client = Client::restore(data, writes(), hubs(data));
        let begins_with = client.take_updates().map_or(Position::default(), |updates| updates.in_force);
        lock(&client.shared.receiver).open();
        (client, begins_with.revision)
    }

    #[test]
    fn member_without_messages_for_a_lease_is_not_watching() {
        let folder = tempfile::tempdir().expect("a folder");
        let (client, _) = start(folder.path());
        let receive = |message| client.take(message).expect("the protocol");
        // Moves the time of the last message back.
        let after = |seconds| {
            let mut watching = lock(&client.shared.watching);
            watching.received =
                watching.received.checked_sub(Duration::from_secs(seconds)).expect("a clock that is older");
            drop(watching);
            (client.is_watching(), client.problems().len())
        };
        let welcome = |heartbeat_ms| WatchResponse::Welcome { heartbeat_ms };
        let age = || match client.heartbeat() {
            PublishRequest::Heartbeat { received_age_ms } => received_age_ms,
            other => panic!("{other:?}"),
        };
        assert_eq!(after(29), (true, 0), "it has just started");
        assert_eq!(age(), None, "a restart renews nothing");
        receive(WatchResponse::Heartbeat);
        assert_eq!(after(1), (false, 1), "a hub that is older than what is held here does not serve the stream");
        assert_eq!(age(), None);
        receive(welcome(2_000));
        assert_eq!(after(5), (true, 0));
        assert!(age().is_some_and(|age| age >= 5_000));
        receive(WatchResponse::Heartbeat);
        assert_eq!(after(5), (true, 0));
        assert_eq!(after(1), (false, 1));
        assert!(matches!(client.problems()[..], [ExchangeProblem::HubSilent { .. }]), "{:?}", client.problems());
        // The lease is limited.
        receive(welcome(0));
        assert_eq!(after(2), (true, 0));
        receive(welcome(u64::MAX));
        assert_eq!(after(60), (true, 0));
    }

    #[test]
    fn new_subscriber_is_notified_of_earlier_changes() {
        let folder = tempfile::tempdir().expect("a folder");
        let (client, _) = start(folder.path());
        receive_empty_snapshot(&client, 1);
        let mut changes = client.changes();
        assert!(changes.has_changed().expect("it lives"), "nothing else may come for long");
        changes.mark_unchanged();
        receive_empty_snapshot(&client, 2);
        assert!(changes.has_changed().expect("it lives"));
    }

    #[test]
    fn restart_never_uses_a_state_older_than_that_of_nodes() {
        let folder = tempfile::tempdir().expect("a folder");
        let (client, begins_with) = start(folder.path());
        assert_eq!(begins_with, 0);
        receive_empty_snapshot(&client, 1);
        client.store_received();
        assert_eq!(client.take_updates().expect("updates").in_force.revision, 1);
        receive_empty_snapshot(&client, 2);
        assert_eq!(start(folder.path()).1, 1, "nodes have nothing newer");
        assert_eq!(client.take_updates().expect("updates").in_force.revision, 2);
        // A crash before the state in use is on disk, and another before a message of the hub.
        for _ in 0..2 {
            let (again, begins_with) = start(folder.path());
            assert_eq!(begins_with, 0, "the snapshot is older than the state of nodes");
            again.store_received();
        }
        let (again, _) = start(folder.path());
        receive_empty_snapshot(&again, 2);
        assert_eq!(again.take_updates().expect("the hub has confirmed it").in_force.revision, 2);
        again.store_received();
        assert_eq!(start(folder.path()).1, 2, "all of it is on disk");
        let path = folder.path().join("receiver.snapshot");
        let mut bytes = std::fs::read(&path).expect("it is there");
        *bytes.last_mut().expect("not empty") ^= 1;
        std::fs::write(&path, bytes).expect("written");
        assert_eq!(start(folder.path()).1, 0, "a damaged snapshot is not used");
    }

    #[test]
    fn publishes_nothing_that_is_not_on_disk() {
        let folder = tempfile::tempdir().expect("a folder");
        let client = Client::restore(folder.path(), writes(), hubs(folder.path()));
        let mut session = PublishSession::default();
        let welcome = PublishResponse::Welcome { published: None, heartbeat_ms: 0 };
        session.take(&mut lock(&client.shared.publisher), welcome);
        let in_the_way = folder.path().join("publisher.snapshot");
        std::fs::create_dir(&in_the_way).expect("made");
        client.publish(&Cluster::default(), &Changed::default());
        assert!(client.poll(&mut session).is_empty() && client.poll(&mut session).is_empty());
        std::fs::remove_dir(&in_the_way).expect("removed");
        assert!(!client.poll(&mut session).is_empty(), "tried again");
        assert!(in_the_way.is_file());
    }
}
