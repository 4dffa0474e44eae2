//! What this cluster publishes: gives each object its id and revision, and each hub replica what it lacks.
//!
//! Numbering outlives restarts: ids and revisions are reserved in blocks on disk before they are used, so that a crash skips
//! numbers and repeats none. Without its file, a new epoch begins.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::inventory::{Cluster, Endpoint, EndpointId, EndpointKind, Labels};
use prost::Message as _;

use super::model::pod;
use crate::codec::frame;
use crate::codec::object::{self, EndpointObject, Object};
use crate::limits::{MAX_NUMBER, PROTOCOL};
use crate::message::{PublishRequest, PublishResponse, Refusals};
use crate::model::{Pairs, Position, digest_of};

/// Removed ids that are remembered: 65,536 × 16 bytes is 1 MiB.
const MAX_TOMBSTONES: usize = 65_536;
/// Numbers reserved at a time.
const RESERVE: u64 = 1 << 16;
/// Labels that controllers give to each pod of its own, so that they would make every label set unique.
const OWN_KEYS: [&str; 9] = [
    "apps.kubernetes.io/pod-index",
    "statefulset.kubernetes.io/pod-name",
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-completion-index",
    "batch.kubernetes.io/job-name",
    "controller-uid",
    "job-name",
    "leaderworkerset.sigs.k8s.io/worker-index",
    "training.kubeflow.org/replica-index",
];

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Namespace(Arc<str>),
    ServiceAccount(Arc<str>, Arc<str>),
    LabelSet(Labels),
    Endpoint(Arc<str>, Arc<str>),
}

#[derive(Debug, Clone)]
struct Published {
    id: u64,
    revision: u64,
    /// The digest without id and revision: it differs when the object changed.
    body: u128,
    bytes: Bytes,
    digest: u128,
    uses: Uses,
}

/// Of an endpoint, the ids of its namespace, account and label set, 0 for none; of those, how many endpoints use them. What
/// was restored has no users yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Uses {
    Uses([u64; 3]),
    UsedBy(u32),
}

/// What changed in the source's state, as far as it is published.
#[derive(Debug, Clone, Copy)]
pub struct ChangedExports<'a> {
    pub namespaces: &'a BTreeSet<Arc<str>>,
    /// Namespace and name.
    pub service_accounts: &'a BTreeSet<(Arc<str>, Arc<str>)>,
    pub endpoints: &'a BTreeSet<EndpointId>,
}

/// What is published now, in which numbering.
#[derive(Debug)]
pub struct Publisher {
    epoch: u64,
    revision: u64,
    next_id: u64,
    reserved_revision: u64,
    reserved_id: u64,
    objects: BTreeMap<Key, Published>,
    /// What endpoints use, by id.
    shared: HashMap<u64, Key>,
    tombstones: VecDeque<(u64, u64)>,
    floor: u64,
    digest: u128,
    /// Nothing is published before the source was read once.
    filled: bool,
}

/// Numbers below these may be used, once they are on disk.
#[derive(Debug, Clone, Copy)]
pub struct Reserved {
    epoch: u64,
    revision: u64,
    id: u64,
}

/// The file's contents.
#[derive(Clone, PartialEq, prost::Message)]
struct Stored {
    #[prost(uint64, tag = "1")]
    epoch: u64,
    #[prost(uint64, tag = "2")]
    reserved_revision: u64,
    #[prost(uint64, tag = "3")]
    reserved_id: u64,
    #[prost(bytes = "bytes", repeated, tag = "4")]
    objects: Vec<Bytes>,
}

impl Publisher {
    /// A new numbering. `epoch` must be greater than those used before; hubs report greater ones.
    pub fn new(epoch: u64) -> Self {
        Self {
            epoch,
            revision: 0,
            next_id: 1,
            reserved_revision: 0,
            reserved_id: 0,
            objects: BTreeMap::new(),
            shared: HashMap::new(),
            tombstones: VecDeque::new(),
            floor: 0,
            digest: 0,
            filled: false,
        }
    }

    /// From what [`Self::store`] returned; none when it cannot be read.
    pub fn restore(bytes: &[u8]) -> Option<Self> {
        let stored = Stored::decode(bytes).ok()?;
        // An earlier version may have followed a hub to the last number.
        let most = MAX_NUMBER - RESERVE;
        if stored.epoch > MAX_NUMBER || stored.reserved_revision > most || stored.reserved_id > most {
            tracing::error!(epoch = stored.epoch, "the numbers of what is published are used up: a new epoch begins");
            return None;
        }
        let mut publisher = Self::new(stored.epoch);
        publisher.revision = stored.reserved_revision;
        publisher.next_id = stored.reserved_id;
        publisher.reserved_revision = stored.reserved_revision;
        publisher.reserved_id = stored.reserved_id;
        // What was removed before is not known any more.
        publisher.floor = publisher.revision;
        let updates: Vec<(object::Update, Bytes)> =
            stored.objects.into_iter().map(|bytes| Some((object::decode(&bytes)?, bytes))).collect::<Option<_>>()?;
        let mut names = BTreeMap::new();
        for (update, _) in &updates {
            if let Ok(Object::Namespace { name, .. }) = &update.object {
                names.insert(update.id, name.clone());
            }
        }
        for (update, bytes) in updates {
            let object::Update { id, revision, object } = update;
            let object = object.ok()?;
            let key = match &object {
                Object::Namespace { name, .. } => Key::Namespace(name.clone()),
                Object::ServiceAccount { namespace, name, .. } => {
                    Key::ServiceAccount(names.get(namespace)?.clone(), name.clone())
                }
                Object::LabelSet { labels } => Key::LabelSet(labels.iter().cloned().collect()),
                Object::Endpoint(it) => Key::Endpoint(names.get(&it.namespace)?.clone(), it.name.as_str().into()),
                Object::Manifest { .. } | Object::Cluster { .. } => return None,
            };
            let (body, digest) = (body_digest(&object), digest_of(&bytes));
            publisher.digest = publisher.digest.wrapping_add(digest);
            publisher.add(key, Published { id, revision, body, bytes, digest, uses: Uses::UsedBy(0) });
        }
        Some(publisher)
    }

    /// What is to be on disk, and the numbers that it reserves: see [`Self::stored`].
    pub fn store(&self) -> (Vec<u8>, Reserved) {
        let (revision, id) = (self.revision + RESERVE, self.next_id + RESERVE);
        let stored = Stored {
            epoch: self.epoch,
            reserved_revision: revision,
            reserved_id: id,
            objects: self.objects.values().map(|object| object.bytes.clone()).collect(),
        };
        (stored.encode_to_vec(), Reserved { epoch: self.epoch, revision, id })
    }

    /// It is on disk, and nothing older comes there any more.
    pub fn stored(&mut self, reserved: Reserved) {
        if reserved.epoch == self.epoch {
            (self.reserved_revision, self.reserved_id) = (reserved.revision, reserved.id);
        }
    }

    /// Numbers beyond what is reserved on disk are in use: until more are, nothing is sent.
    pub fn must_store(&self) -> bool {
        self.filled && (self.revision >= self.reserved_revision || self.next_id > self.reserved_id)
    }

    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, revision: self.revision }
    }

    pub fn digest(&self) -> u128 {
        self.digest
    }

    pub fn object_count(&self) -> usize {
        self.objects.len()
    }

    /// The name of an object by its id, for messages.
    pub fn name_of(&self, id: u64) -> Option<String> {
        let (key, _) = self.objects.iter().find(|(_, object)| object.id == id)?;
        Some(match key {
            Key::Namespace(name) => format!("namespace {name}"),
            Key::ServiceAccount(namespace, name) => format!("service account {namespace}/{name}"),
            Key::LabelSet(labels) => format!("label set {labels:?}"),
            Key::Endpoint(namespace, name) => format!("pod {namespace}/{name}"),
        })
    }

    /// Takes over what changed in the source's state: pods that own addresses, with their namespaces and accounts. At first,
    /// everything. Returns whether anything changed.
    pub fn publish(&mut self, cluster: &Cluster, changed: ChangedExports<'_>) -> bool {
        if self.filled { self.take(cluster, changed, BTreeSet::new()) } else { self.publish_all(cluster) }
    }

    /// As [`Self::publish`], whatever changed: O(everything).
    pub fn publish_all(&mut self, cluster: &Cluster) -> bool {
        let mut namespaces: BTreeSet<_> = cluster.namespaces.keys().cloned().collect();
        let mut service_accounts: BTreeSet<_> = cluster.service_accounts.keys().cloned().collect();
        let mut endpoints: BTreeSet<_> = cluster.endpoints.keys().cloned().collect();
        for key in self.objects.keys().cloned() {
            match key {
                Key::Namespace(name) => drop(namespaces.insert(name)),
                Key::ServiceAccount(namespace, name) => drop(service_accounts.insert((namespace, name))),
                Key::LabelSet(_) => {}
                Key::Endpoint(namespace, name) => drop(endpoints.insert(pod(namespace, name))),
            }
        }
        let first = !std::mem::replace(&mut self.filled, true);
        // Objects that were restored and may have no users.
        let maybe_unused = self.shared.keys().copied().collect();
        let changed =
            ChangedExports { namespaces: &namespaces, service_accounts: &service_accounts, endpoints: &endpoints };
        let changed = self.take(cluster, changed, maybe_unused);
        if first && !changed {
            // An empty state is a state too.
            self.revision += 1;
        }
        first || changed
    }

    /// `maybe_unused` are shared objects that may have no users.
    fn take(&mut self, cluster: &Cluster, changed: ChangedExports<'_>, mut maybe_unused: BTreeSet<u64>) -> bool {
        let revision = self.revision + 1;
        let before = (self.digest, self.next_id);
        for name in changed.namespaces {
            let key = Key::Namespace(name.clone());
            if self.objects.contains_key(&key) {
                self.put(key, &namespace_object(cluster, name), revision);
            }
        }
        for (namespace, name) in changed.service_accounts {
            let key = Key::ServiceAccount(namespace.clone(), name.clone());
            if let Some(published) = self.objects.get(&Key::Namespace(namespace.clone()))
                && self.objects.contains_key(&key)
            {
                self.put(key, &account_object(cluster, published.id, namespace, name), revision);
            }
        }
        for id in changed.endpoints.iter().filter(|id| id.kind == EndpointKind::Pod) {
            let Some(namespace) = &id.namespace else { continue };
            let key = Key::Endpoint(namespace.clone(), id.name.clone());
            let used = match self.objects.get(&key).map(|published| published.uses) {
                Some(Uses::Uses(used)) => used,
                Some(Uses::UsedBy(_)) | None => [0; 3],
            };
            let endpoint = cluster.endpoints.get(id);
            match endpoint.filter(|it| !it.host_network && !it.addresses.is_empty()) {
                Some(endpoint) => self.put_endpoint(cluster, key, namespace, endpoint, revision),
                None => self.remove(&key, revision),
            }
            for id in used.into_iter().filter(|id| *id != 0) {
                self.count_use(id, |count| count - 1);
                maybe_unused.insert(id);
            }
        }
        for id in maybe_unused {
            if let Some(key) = self.shared.get(&id).cloned()
                && self.objects.get(&key).is_some_and(|it| it.uses == Uses::UsedBy(0))
            {
                self.remove(&key, revision);
            }
        }
        while self.tombstones.len() > MAX_TOMBSTONES {
            self.floor = self.tombstones.pop_front().map_or(self.floor, |(at, _)| self.floor.max(at));
        }
        if before == (self.digest, self.next_id) {
            return false;
        }
        self.revision = revision;
        true
    }

    fn put_endpoint(&mut self, cluster: &Cluster, key: Key, namespace: &Arc<str>, endpoint: &Endpoint, revision: u64) {
        let Key::Endpoint(_, pod) = &key else { return };
        let pod = pod.clone();
        let used = Key::Namespace(namespace.clone());
        let namespace_id = self.use_shared(used, || namespace_object(cluster, namespace), revision);
        let account = endpoint.service_account.as_ref().map_or(0, |name| {
            let used = Key::ServiceAccount(namespace.clone(), name.clone());
            self.use_shared(used, || account_object(cluster, namespace_id, namespace, name), revision)
        });
        let is_own = |(key, value): &(Arc<str>, Arc<str>)| OWN_KEYS.contains(&&**key) || *value == pod;
        let (own, shared): (Labels, Labels) =
            endpoint.labels.iter().map(|(key, value)| (key.clone(), value.clone())).partition(is_own);
        let labels = pairs(&shared);
        let label_set = if shared.is_empty() {
            0
        } else {
            self.use_shared(Key::LabelSet(shared), || Object::LabelSet { labels }, revision)
        };
        let object = EndpointObject {
            namespace: namespace_id,
            name: pod.to_string(),
            service_account: account,
            label_set,
            own: pairs(&own),
            addresses: endpoint.addresses.clone(),
            ports: endpoint.ports.clone(),
            node: endpoint.node.as_deref().map(str::to_owned),
        };
        self.put(key.clone(), &Object::Endpoint(object), revision);
        if let Some(published) = self.objects.get_mut(&key) {
            published.uses = Uses::Uses([namespace_id, account, label_set]);
        }
    }

    /// The id of an object that one more endpoint uses.
    fn use_shared(&mut self, key: Key, object: impl FnOnce() -> Object, revision: u64) -> u64 {
        let id = match self.objects.get(&key) {
            // What is in use is kept up to date.
            Some(Published { id, uses: Uses::UsedBy(1..), .. }) => *id,
            _ => self.put(key, &object(), revision),
        };
        self.count_use(id, |count| count + 1);
        id
    }

    fn count_use(&mut self, id: u64, change: impl FnOnce(u32) -> u32) {
        let published = self.shared.get(&id).and_then(|key| self.objects.get_mut(key));
        if let Some(Published { uses: Uses::UsedBy(count), .. }) = published {
            *count = change(*count);
        }
    }

    /// Publishes an object, unless it is published so already; its id.
    fn put(&mut self, key: Key, object: &Object, revision: u64) -> u64 {
        let body = body_digest(object);
        let (id, uses) = match self.objects.get(&key) {
            Some(published) if published.body == body => return published.id,
            Some(published) => {
                self.digest = self.digest.wrapping_sub(published.digest);
                (published.id, published.uses)
            }
            None => {
                self.next_id += 1;
                (self.next_id - 1, Uses::UsedBy(0))
            }
        };
        let bytes = Bytes::from(object::encode(id, revision, object));
        let digest = digest_of(&bytes);
        self.digest = self.digest.wrapping_add(digest);
        self.add(key, Published { id, revision, body, bytes, digest, uses });
        id
    }

    fn add(&mut self, key: Key, object: Published) {
        if !matches!(key, Key::Endpoint(..)) {
            self.shared.insert(object.id, key.clone());
        }
        self.objects.insert(key, object);
    }

    fn remove(&mut self, key: &Key, revision: u64) {
        if let Some(object) = self.objects.remove(key) {
            self.shared.remove(&object.id);
            self.digest = self.digest.wrapping_sub(object.digest);
            self.tombstones.push_back((revision, object.id));
        }
    }

    /// A hub has a later numbering than this publisher: takes one that is later still. The numbers come from outside.
    fn go_past(&mut self, published: Position) {
        let spent = published.revision > MAX_NUMBER - RESERVE;
        if published.epoch > self.epoch || published.epoch == self.epoch && spent {
            let Some(epoch) = published.epoch.checked_add(1).filter(|epoch| *epoch <= MAX_NUMBER) else {
                tracing::error!(
                    published = published.epoch,
                    "a hub has the last possible epoch of this cluster: another process has published in its name; revoke the \
                     cluster and let it join again"
                );
                return;
            };
            self.epoch = epoch;
            self.reserved_revision = 0;
            self.floor = self.revision;
        } else if published.epoch == self.epoch && published.revision > self.revision {
            self.revision = published.revision + 1;
            self.floor = self.revision;
        }
    }
}

fn namespace_object(cluster: &Cluster, name: &Arc<str>) -> Object {
    let labels = cluster.namespaces.get(name).map(|it| pairs(&it.labels)).unwrap_or_default();
    Object::Namespace { name: name.clone(), labels }
}

fn account_object(cluster: &Cluster, namespace_id: u64, namespace: &Arc<str>, name: &Arc<str>) -> Object {
    let labels = cluster.service_accounts.get(&(namespace.clone(), name.clone()));
    let labels = labels.map(pairs).unwrap_or_default();
    Object::ServiceAccount { namespace: namespace_id, name: name.clone(), labels }
}

fn pairs(labels: &Labels) -> Pairs {
    labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Of what an object says, whatever its id and revision are.
fn body_digest(object: &Object) -> u128 {
    digest_of(&object::encode(0, 0, object))
}

/// One publishing stream to one hub replica.
#[derive(Debug, Default)]
pub struct PublishSession {
    welcomed: bool,
    /// The position up to which everything was sent. `None`: a snapshot is due.
    sent: Option<Position>,
    refusals: Refusals,
}

impl PublishSession {
    /// The first message of the stream; `instance` identifies this process. `yields`: another process may publish in its place.
    pub fn open(publisher: &Publisher, instance: &[u8; 16], yields: bool) -> PublishRequest {
        PublishRequest::Open { protocol: PROTOCOL, epoch: publisher.epoch, instance: instance.to_vec().into(), yields }
    }

    /// What the hub refuses of the cluster's objects.
    pub fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    pub fn take(&mut self, publisher: &mut Publisher, response: PublishResponse) {
        match response {
            PublishResponse::Welcome { published, .. } => {
                self.welcomed = true;
                if let Some(published) = published {
                    publisher.go_past(published);
                }
                self.sent = published
                    .filter(|published| published.epoch == publisher.epoch && published.revision >= publisher.floor);
            }
            PublishResponse::Refusals(refusals) => self.refusals = refusals,
            PublishResponse::Resync { .. } => self.sent = None,
            PublishResponse::Ack { .. } | PublishResponse::Replica { .. } => {}
        }
    }

    /// What the hub lacks now: one batch, or nothing. O(all that is published).
    pub fn poll(&mut self, publisher: &Publisher) -> Vec<PublishRequest> {
        let now = publisher.position();
        if !self.welcomed || !publisher.filled || publisher.must_store() || self.sent == Some(now) {
            return Vec::new();
        }
        let since = self.sent.filter(|sent| sent.epoch == now.epoch && sent.revision >= publisher.floor);
        let after = since.map_or(0, |sent| sent.revision);
        let changed = publisher.objects.values().filter(|object| since.is_none() || object.revision > after);
        let removals: Vec<u64> = match since {
            Some(_) => publisher.tombstones.iter().filter(|(at, _)| *at > after).map(|(_, id)| *id).collect(),
            None => Vec::new(),
        };
        let mut requests = vec![PublishRequest::Begin { snapshot: since.is_none() }];
        let frames = frame::cut(changed.map(|object| &object.bytes), &removals);
        requests.extend(frames.into_iter().map(PublishRequest::Frame));
        requests.push(PublishRequest::End { position: now, digest: Some(publisher.digest) });
        self.sent = Some(now);
        requests
    }
}

#[cfg(test)]
mod tests {

    use hanse_api::assemble::{Assembly, Candidates, Changed};
    use hanse_api::manifest::{Manifests, read_bytes};

    use super::*;

    /// An object with names in place of ids; how many use it.
    type Named = (Key, Vec<Option<Key>>, Option<u32>, Object);

    fn published(publisher: &Publisher) -> Vec<Named> {
        let object = |(key, object): (&Key, &Published)| {
            let update = object::decode(&object.bytes).expect("what was encoded");
            assert_eq!((update.id, update.revision), (object.id, object.revision));
            let (mut body, mut used_by) = (update.object.expect("a body"), None);
            let names = match &mut body {
                Object::Endpoint(it) => vec![&mut it.namespace, &mut it.service_account, &mut it.label_set],
                Object::ServiceAccount { namespace, .. } => vec![namespace],
                _ => Vec::new(),
            };
            let names = names.into_iter().map(|id| publisher.shared.get(&std::mem::take(id)).cloned()).collect();
            if let Uses::UsedBy(count) = object.uses {
                used_by = Some(count);
                assert_eq!(publisher.shared.get(&object.id), Some(key));
            }
            (key.clone(), names, used_by, body)
        };
        publisher.objects.iter().map(object).collect()
    }

    fn exports(changed: &Changed) -> ChangedExports<'_> {
        let Changed { namespaces, service_accounts, endpoints, .. } = changed;
        ChangedExports { namespaces, service_accounts, endpoints }
    }

    const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: 'n'}\n";

    fn pod_of(name: &str, namespace: &str, app: &str, account: &str, address: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app}, own: {name}}}}}\n\
             spec: {{nodeName: 'n', serviceAccountName: {account}}}\nstatus: {{phase: Running, podIP: {address}}}\n"
        )
    }

    fn labelled(kind: &str, name: &str, team: &str) -> String {
        let namespace = if kind == "Namespace" { "" } else { ", namespace: x" };
        format!("apiVersion: v1\nkind: {kind}\nmetadata: {{name: {name}{namespace}, labels: {{team: {team}}}}}\n")
    }

    #[test]
    fn publishing_changes_equals_publishing_everything() {
        let (p, q) = (pod_of("p", "x", "web", "a", "10.0.0.1"), pod_of("q", "x", "web", "b", "10.0.0.2"));
        let team = |kind, team| labelled(kind, if kind == "Namespace" { "x" } else { "a" }, team);
        let states: Vec<Vec<String>> = vec![
            vec![p.clone(), q.clone(), team("Namespace", "red"), team("ServiceAccount", "red")],
            // The labels of what is shared.
            vec![p.clone(), q.clone(), team("Namespace", "blue"), team("ServiceAccount", "blue")],
            // The last user of a label set and of an account, and one that remains.
            vec![p.clone(), team("Namespace", "blue")],
            vec![pod_of("p", "x", "db", "b", "10.0.0.1"), q.clone()],
            // To another namespace, with another's address; a node's address is not a pod's.
            vec![pod_of("p", "other", "db", "b", "10.0.0.2"), NODE.to_owned()],
            vec![NODE.to_owned()],
            vec![q, p],
        ];
        let (mut source, mut candidates) = (Assembly::new("c".into()), Candidates::default());
        let mut kept = Publisher::new(1);
        let mut at_hub: BTreeMap<u64, Bytes> = BTreeMap::new();
        for state in states.iter().chain(states.iter().rev()) {
            let mut read = Manifests::default();
            read_bytes(&"c.yaml".into(), state.join("---\n").as_bytes(), &mut read);
            assert_eq!(read.diagnostics, []);
            candidates.replace_all(read.objects);
            let changed = source.update(candidates.take_changes());
            let cluster = &source.state().cluster;
            let (after, changed) = (kept.position().revision, kept.publish(cluster, exports(&changed)));
            let mut fresh = Publisher::new(1);
            fresh.publish_all(cluster);
            assert_eq!(published(&kept), published(&fresh), "{state:?}");
            // What a hub that received all of it has.
            for (_, gone) in kept.tombstones.iter().filter(|(at, _)| *at > after) {
                assert!(at_hub.remove(gone).is_some(), "the hub has it");
            }
            at_hub.extend(kept.objects.values().filter(|it| it.revision > after).map(|it| (it.id, it.bytes.clone())));
            let published_now: BTreeMap<u64, Bytes> =
                kept.objects.values().map(|it| (it.id, it.bytes.clone())).collect();
            assert_eq!(at_hub, published_now);
            assert_eq!(kept.digest(), published_now.values().fold(0, |sum: u128, it| sum.wrapping_add(digest_of(it))));
            assert!(!changed || kept.position().revision == after + 1);
            assert!(
                !kept.publish_all(cluster) && !kept.publish(cluster, exports(&Changed::default())),
                "nothing is new"
            );
            assert_eq!(published(&kept), published(&fresh), "however often it is counted");
            // A restart drops nothing, and keeps nothing that was removed.
            let mut restored = Publisher::restore(&kept.store().0).expect("what was stored");
            assert!(
                restored.publish_all(&Cluster::default()) && restored.objects.is_empty() && restored.shared.is_empty()
            );
            let mut restored = Publisher::restore(&kept.store().0).expect("what was stored");
            restored.publish(cluster, exports(&Changed::default()));
            assert_eq!(published(&restored), published(&fresh));
        }
    }

    /// What a hub has may have been published by another process in the cluster's name.
    #[test]
    fn survives_numbers_of_another_publisher() {
        let most = MAX_NUMBER;
        for (published, epoch) in [
            ((most, 1), 3),
            ((u64::MAX, u64::MAX), 3),
            ((most - 1, u64::MAX), most),
            ((3, most), 4),
            ((3, u64::MAX), 4),
            ((3, 1_000), 3),
        ] {
            let mut publisher = Publisher::new(3);
            publisher.publish_all(&Cluster::default());
            let published = Position { epoch: published.0, revision: published.1 };
            let welcome = PublishResponse::Welcome { published: Some(published), heartbeat_ms: 0 };
            PublishSession::default().take(&mut publisher, welcome);
            assert_eq!(publisher.position().epoch, epoch, "{published:?}");
            let (bytes, reserved) = publisher.store();
            publisher.stored(reserved);
            let mut restored = Publisher::restore(&bytes).expect("what was stored");
            assert!(restored.publish_all(&Cluster::default()) && restored.position() > publisher.position());
        }
        let poisoned = |epoch, reserved_revision, reserved_id| Stored {
            epoch,
            reserved_revision,
            reserved_id,
            objects: Vec::new(),
        };
        assert!(Publisher::restore(&poisoned(1, 2, 3).encode_to_vec()).is_some());
        for stored in [poisoned(u64::MAX, 1, 1), poisoned(1, u64::MAX, 1), poisoned(1, 1, u64::MAX)] {
            assert!(Publisher::restore(&stored.encode_to_vec()).is_none(), "{stored:?}");
        }
    }

    #[test]
    fn sends_nothing_before_its_numbers_are_on_disk() {
        let mut publisher = Publisher::new(3);
        let mut session = PublishSession::default();
        let take = |publisher: &mut Publisher, session: &mut PublishSession, published| {
            session.take(publisher, PublishResponse::Welcome { published, heartbeat_ms: 0 });
        };
        take(&mut publisher, &mut session, None);
        publisher.publish_all(&Cluster::default());
        assert!(publisher.must_store() && session.poll(&publisher).is_empty());
        let (_, reserved) = publisher.store();
        publisher.stored(reserved);
        assert!(!publisher.must_store() && !session.poll(&publisher).is_empty());
        // Another numbering begins, for which what is on disk says nothing.
        take(&mut publisher, &mut session, Some(Position { epoch: 7, revision: 1 }));
        assert!(publisher.must_store() && session.poll(&publisher).is_empty());
        publisher.stored(reserved);
        assert!(publisher.must_store());
        let (bytes, reserved) = publisher.store();
        publisher.stored(reserved);
        assert!(!session.poll(&publisher).is_empty());
        let restored = Publisher::restore(&bytes).expect("what was stored");
        assert!(restored.position().revision > publisher.position().revision, "numbers are not used again");
        assert_eq!(restored.position().epoch, publisher.position().epoch);
    }
}
