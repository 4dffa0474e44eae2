//! What this cluster publishes: gives each object its id and revision, and each hub replica what it lacks.
//!
//! Numbering outlives restarts: ids and revisions are reserved in blocks on disk before they are used, so that a crash skips
//! numbers and repeats none. Where the numbering is lost, a new epoch begins.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::inventory::{Cluster, EndpointKind, Labels};
use hanse_proto::federation::v1 as pb;
use pb::object_update::Body;
use pb::publish_request::Message as Request;
use pb::publish_response::Message as Response;
use prost::Message as _;

use super::model::{Position, digest_of};
use super::wire;

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
    /// Without id and revision: what a change is told by.
    body: u128,
    bytes: Bytes,
    digest: u128,
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
    tombstones: VecDeque<(u64, u64)>,
    floor: u64,
    digest: u128,
    /// Nothing is published before the source was read once.
    filled: bool,
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
    /// A new numbering. `epoch` must be greater than those used before; the hubs tell of greater ones.
    pub fn new(epoch: u64) -> Self {
        Self {
            epoch,
            revision: 0,
            next_id: 1,
            reserved_revision: 0,
            reserved_id: 0,
            objects: BTreeMap::new(),
            tombstones: VecDeque::new(),
            floor: 0,
            digest: 0,
            filled: false,
        }
    }

    /// From what [`Self::store`] returned; none when it cannot be read.
    pub fn restore(bytes: &[u8]) -> Option<Self> {
        let stored = Stored::decode(bytes).ok()?;
        let mut publisher = Self::new(stored.epoch);
        publisher.revision = stored.reserved_revision;
        publisher.next_id = stored.reserved_id;
        publisher.reserved_revision = stored.reserved_revision;
        publisher.reserved_id = stored.reserved_id;
        // What was removed before is not known any more.
        publisher.floor = publisher.revision;
        let mut names = BTreeMap::new();
        let updates: Vec<(pb::ObjectUpdate, Bytes)> = stored
            .objects
            .into_iter()
            .map(|bytes| pb::ObjectUpdate::decode(&bytes[..]).map(|update| (update, bytes)))
            .collect::<Result<_, _>>()
            .ok()?;
        for (update, _) in &updates {
            if let Some(Body::Namespace(namespace)) = &update.body {
                names.insert(update.id, Arc::<str>::from(&*namespace.name));
            }
        }
        for (update, bytes) in updates {
            let key = match update.body.as_ref()? {
                Body::Namespace(it) => Key::Namespace(it.name.as_str().into()),
                Body::ServiceAccount(it) => {
                    Key::ServiceAccount(names.get(&it.namespace)?.clone(), it.name.as_str().into())
                }
                Body::LabelSet(it) => Key::LabelSet(
                    it.labels.iter().map(|p| (Arc::from(p.key.as_str()), Arc::from(p.value.as_str()))).collect(),
                ),
                Body::Endpoint(it) => Key::Endpoint(names.get(&it.namespace)?.clone(), it.name.as_str().into()),
                _ => return None,
            };
            let (id, revision) = (update.id, update.revision);
            let body = digest_of(&pb::ObjectUpdate { id: 0, revision: 0, ..update }.encode_to_vec());
            let digest = digest_of(&bytes);
            publisher.digest = publisher.digest.wrapping_add(digest);
            publisher.objects.insert(key, Published { id, revision, body, bytes, digest });
        }
        Some(publisher)
    }

    /// Everything that must be on disk before the next message is sent, if [`Self::must_store`].
    pub fn store(&mut self) -> Vec<u8> {
        self.reserved_revision = self.revision + RESERVE;
        self.reserved_id = self.next_id + RESERVE;
        let stored = Stored {
            epoch: self.epoch,
            reserved_revision: self.reserved_revision,
            reserved_id: self.reserved_id,
            objects: self.objects.values().map(|object| object.bytes.clone()).collect(),
        };
        stored.encode_to_vec()
    }

    /// Numbers beyond what is reserved on disk are in use.
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

    /// The object that an id stands for, in words; for refusals.
    pub fn name_of(&self, id: u64) -> Option<String> {
        let (key, _) = self.objects.iter().find(|(_, object)| object.id == id)?;
        Some(match key {
            Key::Namespace(name) => format!("namespace {name}"),
            Key::ServiceAccount(namespace, name) => format!("service account {namespace}/{name}"),
            Key::LabelSet(labels) => format!("label set {labels:?}"),
            Key::Endpoint(namespace, name) => format!("pod {namespace}/{name}"),
        })
    }

    /// Takes over the source's present state: pods that own addresses, with their namespaces and accounts. Returns whether
    /// anything changed.
    pub fn publish(&mut self, cluster: &Cluster) -> bool {
        let first = !std::mem::replace(&mut self.filled, true);
        let revision = self.revision + 1;
        let before = (self.digest, self.next_id);
        let mut present = BTreeSet::new();
        for (id, endpoint) in &cluster.endpoints {
            let Some(namespace) = id.namespace.clone().filter(|_| id.kind == EndpointKind::Pod) else { continue };
            if endpoint.host_network || endpoint.addresses.is_empty() {
                continue;
            }
            let labels = cluster.namespaces.get(&namespace).map(|it| it.labels.clone()).unwrap_or_default();
            let body = pb::Namespace { name: namespace.to_string(), labels: wire::pairs(&labels) };
            let namespace_id =
                self.put(Key::Namespace(namespace.clone()), Body::Namespace(body), revision, &mut present);
            let account = endpoint.service_account.as_ref().map_or(0, |name| {
                let labels = cluster.service_accounts.get(&(namespace.clone(), name.clone()));
                let body = pb::ServiceAccount {
                    namespace: namespace_id,
                    name: name.to_string(),
                    labels: wire::pairs(labels.into_iter().flatten()),
                };
                let key = Key::ServiceAccount(namespace.clone(), name.clone());
                self.put(key, Body::ServiceAccount(body), revision, &mut present)
            });
            let (own, shared): (Labels, Labels) = endpoint
                .labels
                .clone()
                .into_iter()
                .partition(|(key, value)| OWN_KEYS.contains(&&**key) || **value == *id.name);
            let label_set = match shared.is_empty() {
                true => 0,
                false => {
                    let body = pb::LabelSet { labels: wire::pairs(&shared) };
                    self.put(Key::LabelSet(shared), Body::LabelSet(body), revision, &mut present)
                }
            };
            let body = pb::Endpoint {
                namespace: namespace_id,
                name: id.name.to_string(),
                service_account: account,
                label_set,
                labels: wire::pairs(&own),
                addresses: endpoint.addresses.iter().map(octets).collect(),
                ports: endpoint
                    .ports
                    .iter()
                    .map(|p| pb::NamedPort {
                        name: p.name.to_string(),
                        protocol: p.protocol.into(),
                        port: p.port.into(),
                    })
                    .collect(),
                node: endpoint.node.as_deref().unwrap_or_default().to_owned(),
            };
            self.put(Key::Endpoint(namespace, id.name.clone()), Body::Endpoint(body), revision, &mut present);
        }
        let gone: Vec<Key> = self
            .objects
            .iter()
            .filter(|(_, object)| !present.contains(&object.id))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            if let Some(object) = self.objects.remove(&key) {
                self.digest = self.digest.wrapping_sub(object.digest);
                self.tombstones.push_back((revision, object.id));
            }
        }
        while self.tombstones.len() > MAX_TOMBSTONES {
            self.floor = self.tombstones.pop_front().map_or(self.floor, |(at, _)| self.floor.max(at));
        }
        if before != (self.digest, self.next_id) || first {
            self.revision = revision;
            return true;
        }
        false
    }

    fn put(&mut self, key: Key, body: Body, revision: u64, present: &mut BTreeSet<u64>) -> u64 {
        let held = self.objects.get(&key);
        if let Some(held) = held
            && present.contains(&held.id)
        {
            return held.id;
        }
        let mut update = pb::ObjectUpdate { id: 0, revision: 0, features: Vec::new(), body: Some(body) };
        let body = digest_of(&update.encode_to_vec());
        let id = match held {
            Some(held) => {
                present.insert(held.id);
                if held.body == body {
                    return held.id;
                }
                self.digest = self.digest.wrapping_sub(held.digest);
                held.id
            }
            None => {
                let id = self.next_id;
                self.next_id += 1;
                present.insert(id);
                id
            }
        };
        (update.id, update.revision) = (id, revision);
        let bytes = Bytes::from(update.encode_to_vec());
        let digest = digest_of(&bytes);
        self.digest = self.digest.wrapping_add(digest);
        self.objects.insert(key, Published { id, revision, body, bytes, digest });
        id
    }

    /// A hub holds a later numbering than this: take one that is later still.
    fn go_past(&mut self, held: Position) {
        if held.epoch > self.epoch {
            self.epoch = held.epoch + 1;
            self.reserved_revision = 0;
            self.floor = self.revision;
        } else if held.epoch == self.epoch && held.revision > self.revision {
            self.revision = held.revision + 1;
            self.floor = self.revision;
        }
    }
}

/// One publishing stream to one hub replica.
#[derive(Debug, Default)]
pub struct PublishSession {
    welcomed: bool,
    /// The position up to which everything was sent; none is: a snapshot is due.
    sent: Option<Position>,
    pub acked: Option<Position>,
    pub refusals: Vec<pb::Refusal>,
    pub refused: u64,
}

impl PublishSession {
    /// The first message of the stream.
    pub fn open(publisher: &Publisher) -> pb::PublishRequest {
        request(Request::Open(pb::PublishOpen { protocol: wire::PROTOCOL, epoch: publisher.epoch }))
    }

    pub fn take(&mut self, publisher: &mut Publisher, response: pb::PublishResponse) {
        match response.message {
            Some(Response::Welcome(welcome)) => {
                self.welcomed = true;
                let held = welcome.held.map(Position::from);
                if let Some(held) = held {
                    publisher.go_past(held);
                }
                self.sent = held.filter(|held| held.epoch == publisher.epoch && held.revision >= publisher.floor);
            }
            Some(Response::Ack(ack)) => self.acked = ack.position.map(Position::from),
            Some(Response::Refusals(refusals)) => {
                self.refused = refusals.total;
                self.refusals = refusals.refusals;
            }
            Some(Response::Resync(_)) => self.sent = None,
            None => {}
        }
    }

    /// What the hub lacks now: one batch, or nothing.
    pub fn poll(&mut self, publisher: &Publisher) -> Vec<pb::PublishRequest> {
        let now = publisher.position();
        if !self.welcomed || !publisher.filled || self.sent == Some(now) {
            return Vec::new();
        }
        let since = self.sent.filter(|sent| sent.epoch == now.epoch && sent.revision >= publisher.floor);
        let (kind, after) = match since {
            Some(sent) => (pb::begin::Kind::Delta(pb::Delta {}), sent.revision),
            None => (pb::begin::Kind::Snapshot(pb::Snapshot {}), 0),
        };
        let changed = publisher.objects.values().filter(|object| since.is_none() || object.revision > after);
        let removals = match since {
            Some(_) => publisher.tombstones.iter().filter(|(at, _)| *at > after).map(|(_, id)| *id).collect(),
            None => Vec::new(),
        };
        let begin = pb::Begin { origin: String::new(), kind: Some(kind), needs_interest: 0 };
        let mut requests = vec![request(Request::Begin(begin))];
        let frames = wire::frames(changed.map(|object| object.bytes.clone()), removals);
        requests.extend(frames.into_iter().map(|frame| request(Request::Frame(frame))));
        let digest = wire::digest_bytes(publisher.digest);
        requests.push(request(Request::End(pb::End { position: Some(now.into()), digest, view: 0 })));
        self.sent = Some(now);
        requests
    }
}

fn request(message: Request) -> pb::PublishRequest {
    pb::PublishRequest { message: Some(message) }
}

pub(crate) fn octets(address: &std::net::IpAddr) -> Bytes {
    match address {
        std::net::IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        std::net::IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}
