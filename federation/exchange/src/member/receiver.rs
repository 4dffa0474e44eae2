//! What this cluster receives: staged until a batch ends, checked by its digest, and handed on as changes.
//!
//! Federated policies, tiers and network sets come into force when the interest that they need is complete; until then the
//! previous ones hold, also across reconnects and restarts. Cluster records and withdrawals count at once. What is held
//! is removed only when its origin, or the hub, says so.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::inventory::{Endpoint, EndpointId, Labels};
use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use hashbrown::HashMap;
use pb::watch_request::Message as Request;
use pb::watch_response::Message as Response;
use prost::Message as _;

use super::model::{Change, ClusterRecord, Manifest, ManifestKind, Position, Updates, Wanted, digest_of, pod};
use super::wire::{self, Object, RemoteEndpoint, WireError};
use crate::interest;
use crate::limits::EXISTING_TIER;

/// Batches of the hub's own objects that wait for their interest, before later ones are joined to the last.
const MAX_WAITING: usize = 64;

/// Parts of an interest that the hub refuses, as many as are reported.
const MAX_REFUSED_PARTS: usize = 32;

type ManifestKey = (ManifestKind, Arc<str>);

/// Everything received, and what of it is in force.
#[derive(Debug, Default)]
pub struct Receiver {
    hub: Option<Position>,
    hub_objects: BTreeMap<u64, HubObject>,
    hub_digest: u128,
    clusters: BTreeMap<ClusterName, ClusterRecord>,
    received: BTreeMap<ManifestKey, (Bytes, Manifest)>,
    in_force: BTreeMap<ManifestKey, (Bytes, Manifest)>,
    in_force_at: Position,
    waiting: VecDeque<Waiting>,
    /// Hub objects that cannot be used here, and why.
    refused: BTreeMap<u64, WireError>,
    origins: BTreeMap<ClusterName, Origin>,
    /// Encoded selections: the interest that was complete last.
    complete_interest: BTreeSet<Vec<u8>>,
    own: Vec<pb::Selection>,
    /// Why the hub did not take the last opening, or a later message of its stream: the next one names wider selections.
    rejected: Option<String>,
    session: Option<Session>,
    changes: Vec<Change>,
    /// The position that was handed out last with changes.
    told: Position,
    /// Something newer than this was handed out before a crash: until the hub was heard again, nothing is.
    doubted: bool,
    /// Says why a manifest cannot be used here.
    check: Option<Check>,
}

/// Whether a manifest can be read by this version; else why not.
pub type Check = fn(ManifestKind, &[u8]) -> Result<(), String>;

#[derive(Debug)]
struct HubObject {
    bytes: Bytes,
    digest: u128,
    what: Option<HubKey>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum HubKey {
    Cluster(ClusterName),
    Manifest(ManifestKey),
}

#[derive(Debug)]
struct Waiting {
    needs: u64,
    position: Position,
    changes: BTreeMap<ManifestKey, Option<(Bytes, Manifest)>>,
}

#[derive(Debug, Default)]
struct Session {
    /// The hub serves the stream: it is not older than what is held here.
    welcomed: bool,
    /// What the hub did not take as it was written.
    refused: pb::PartsRefused,
    /// Objects whose ids could not be read.
    unreadable: u64,
    staging: Option<Staging>,
    number: u64,
    complete: u64,
    interest: BTreeSet<Vec<u8>>,
    /// The hub's own objects came.
    hub_ended: bool,
    outstanding: BTreeSet<ClusterName>,
    /// Origins of which a batch was not taken, since its digest differed, with the interest that was said to be complete
    /// meanwhile: it is not, before the snapshot that was asked for has come.
    lacking: BTreeMap<ClusterName, Option<u64>>,
}

#[derive(Debug)]
struct Staging {
    origin: String,
    snapshot: bool,
    needs: u64,
    updates: BTreeMap<u64, Option<Bytes>>,
    /// The digests of updates whose ids cannot be read: they are refused by themselves, and the rest counts.
    unreadable: u128,
}

#[derive(Debug, Default)]
struct Origin {
    position: Position,
    view: u64,
    digest: u128,
    objects: HashMap<u64, Held>,
    names: HashMap<EndpointId, u64>,
    /// The endpoints that refer to a label set.
    users: HashMap<u64, BTreeSet<u64>>,
    refused: BTreeMap<u64, WireError>,
}

#[derive(Debug)]
struct Held {
    bytes: Bytes,
    digest: u128,
    object: Option<Small>,
}

/// What must be at hand of an object; the rest is decoded from its bytes.
#[derive(Debug, Clone)]
enum Small {
    Namespace(Arc<str>),
    ServiceAccount { namespace: u64, name: Arc<str> },
    LabelSet(Labels),
    Endpoint { namespace: u64, label_set: u64, name: Arc<str> },
}

/// Why a stream must be given up.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("{0}")]
    Protocol(&'static str),
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Of one origin, for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginStatus {
    pub position: Position,
    pub digest: u128,
    pub objects: usize,
    pub refused: usize,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredOrigin {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    epoch: u64,
    #[prost(uint64, tag = "3")]
    revision: u64,
    #[prost(fixed64, tag = "4")]
    view: u64,
    #[prost(bytes = "bytes", repeated, tag = "5")]
    objects: Vec<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Stored {
    #[prost(message, optional, tag = "1")]
    hub: Option<StoredOrigin>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    in_force: Vec<Bytes>,
    #[prost(uint64, tag = "3")]
    in_force_epoch: u64,
    #[prost(uint64, tag = "4")]
    in_force_revision: u64,
    #[prost(message, repeated, tag = "5")]
    origins: Vec<StoredOrigin>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    interest: Vec<Vec<u8>>,
}

impl Receiver {
    /// Holds nothing, and takes only manifests that `check` does not refuse.
    pub fn checked(check: Check) -> Self {
        Self { check: Some(check), ..Self::default() }
    }

    /// From what [`Self::store`] returned; none when it cannot be read. Everything held is handed out as changes.
    pub fn restore(bytes: &[u8]) -> Option<Self> {
        Self::restore_with(bytes, None)
    }

    /// As [`Self::restore`], and takes only manifests that `check` does not refuse.
    pub fn restore_checked(bytes: &[u8], check: Check) -> Option<Self> {
        Self::restore_with(bytes, Some(check))
    }

    fn restore_with(bytes: &[u8], check: Option<Check>) -> Option<Self> {
        let stored = Stored::decode(bytes).ok()?;
        let mut receiver = Self { check, ..Self::default() };
        if let Some(hub) = stored.hub {
            receiver.hub = Some(Position { epoch: hub.epoch, revision: hub.revision });
            for bytes in hub.objects {
                receiver.put_hub_object(bytes).ok()?;
            }
        }
        for bytes in stored.in_force {
            if let Ok((id, Ok(Object::Manifest { kind, name, manifest }))) = wire::read_object(&bytes) {
                let key = (kind, name);
                // What came later cannot be read: this is the last version that could, as it was before.
                if let Some(object) = receiver.hub_objects.get_mut(&id).filter(|_| receiver.refused.contains_key(&id)) {
                    object.what = Some(HubKey::Manifest(key.clone()));
                    receiver.received.insert(key.clone(), (bytes.clone(), manifest.clone()));
                }
                receiver.in_force.insert(key, (bytes, manifest));
            }
        }
        receiver.in_force_at = Position { epoch: stored.in_force_epoch, revision: stored.in_force_revision };
        let changes = differences(&receiver.in_force, &receiver.received);
        let position = receiver.hub.unwrap_or_default();
        if !changes.is_empty() {
            receiver.waiting.push_back(Waiting { needs: 1, position, changes });
        } else {
            receiver.in_force_at = position;
        }
        receiver.complete_interest = stored.interest.into_iter().collect();
        for (name, record) in &receiver.clusters {
            receiver.changes.push(Change::Cluster { name: name.clone(), record: Some(record.clone()) });
        }
        for it in stored.origins {
            let name = ClusterName::from(it.name);
            let staged = it.objects.into_iter().map(|bytes| Some((wire::read_object(&bytes).ok()?.0, Some(bytes))));
            let staged: BTreeMap<u64, Option<Bytes>> = staged.collect::<Option<_>>()?;
            let origin = receiver.origins.entry(name.clone()).or_default();
            origin.apply(&name, true, staged, None, &mut receiver.changes).ok()?;
            origin.position = Position { epoch: it.epoch, revision: it.revision };
            origin.view = it.view;
        }
        for ((kind, name), (_, manifest)) in &receiver.in_force {
            let manifest = Some(manifest.clone());
            receiver.changes.push(Change::Manifest { kind: *kind, name: name.clone(), manifest });
        }
        Some(receiver)
    }

    pub fn store(&self) -> Vec<u8> {
        let hub = self.hub.map(|position| StoredOrigin {
            name: String::new(),
            epoch: position.epoch,
            revision: position.revision,
            view: 0,
            objects: self.hub_objects.values().map(|object| object.bytes.clone()).collect(),
        });
        let origins = self.origins.iter().map(|(name, origin)| StoredOrigin {
            name: name.to_string(),
            epoch: origin.position.epoch,
            revision: origin.position.revision,
            view: origin.view,
            objects: origin.objects.values().map(|held| held.bytes.clone()).collect(),
        });
        let stored = Stored {
            hub,
            in_force: self.in_force.values().map(|(bytes, _)| bytes.clone()).collect(),
            in_force_epoch: self.in_force_at.epoch,
            in_force_revision: self.in_force_at.revision,
            origins: origins.collect(),
            interest: self.complete_interest.iter().cloned().collect(),
        };
        stored.encode_to_vec()
    }

    /// All clusters and endpoints that are held, as changes of nothing. O(all of them).
    pub fn everything(&self) -> Vec<Change> {
        let mut changes: Vec<Change> = Vec::new();
        for (name, record) in &self.clusters {
            changes.push(Change::Cluster { name: name.clone(), record: Some(record.clone()) });
        }
        for (name, origin) in &self.origins {
            origin.tell_all(name, &mut changes);
        }
        changes
    }

    /// The first message of a watching stream. What an earlier stream left unfinished is dropped.
    pub fn open(&mut self) -> pb::WatchRequest {
        self.disconnected();
        for waiting in &mut self.waiting {
            // The first interest of a stream covers everything that the hub's state needs, whatever was sent before.
            waiting.needs = 1;
        }
        let bytes: usize = self.complete_interest.iter().map(|it| it.len() + 5).sum();
        let wider = self.rejected.is_some() && bytes > 0 || bytes > interest::WHOLE.bytes;
        let interest =
            if wider { BTreeSet::from([everything().encode_to_vec()]) } else { self.complete_interest.clone() };
        let held = self.origins.iter().map(|(name, origin)| pb::Held {
            origin: name.to_string(),
            position: Some(origin.position.into()),
            view: origin.view,
            digest: wire::digest_bytes(origin.digest),
        });
        let open = pb::WatchOpen {
            protocol: wire::PROTOCOL,
            hub: self.hub.map(pb::Position::from),
            held: held.collect(),
            interest: interest.iter().filter_map(|bytes| pb::Selection::decode(&bytes[..]).ok()).collect(),
            own: self.own_selections(),
            hub_digest: wire::digest_bytes(self.hub_digest),
        };
        self.session = Some(Session { interest, ..Session::default() });
        pb::WatchRequest { message: Some(Request::Open(open)) }
    }

    /// The stream ended; what is held stays.
    pub fn disconnected(&mut self) {
        self.session = None;
    }

    /// Why the hub did not take what this cluster sent on the last stream, or that it did: the next opening names
    /// everything in place of the selections that may be the reason.
    pub fn set_rejected(&mut self, why: Option<String>) {
        self.rejected = why;
    }

    /// Whether the hub serves the stream that is open.
    pub fn is_served(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.welcomed)
    }

    /// What of this cluster's interest the hub did not take, and what of the hub's could not be read, in words.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(why) = &self.rejected {
            problems
                .push(format!("the hub refuses what own policies select, and everything is received instead: {why}"));
        }
        let Some(session) = &self.session else { return problems };
        let refused = &session.refused;
        let parts = refused.parts.iter().take(MAX_REFUSED_PARTS);
        problems
            .extend(parts.map(|part| format!("the hub cannot read a selection, and more is received instead: {part}")));
        if refused.total > refused.parts.len() as u64 {
            problems.push(format!("the hub cannot read {} selections, and more is received instead", refused.total));
        }
        if session.unreadable > 0 {
            problems.push(format!("{} objects that the hub sent cannot be read", session.unreadable));
        }
        let unread = self.origins.iter().filter(|(_, origin)| !origin.refused.is_empty()).take(MAX_REFUSED_PARTS);
        problems
            .extend(unread.map(|(name, it)| format!("{} objects of cluster {name} cannot be read", it.refused.len())));
        problems
    }

    /// Replaces the selections of this cluster's own policies; returns what to send, if a stream is open.
    pub fn set_own(&mut self, wanted: &BTreeSet<Wanted>) -> Option<pb::WatchRequest> {
        let before = self.own_selections();
        self.own = wanted.iter().map(wire::selection).collect();
        let selections = self.own_selections();
        if selections == before {
            return None;
        }
        self.session.as_ref()?;
        Some(pb::WatchRequest { message: Some(Request::Own(pb::OwnInterest { selections })) })
    }

    fn own_selections(&self) -> Vec<pb::Selection> {
        match self.rejected.is_some() && !self.own.is_empty() {
            true => vec![everything()],
            false => self.own.clone(),
        }
    }

    /// The changes since the last call, which count together; also where only the hub's position moved.
    pub fn take_updates(&mut self) -> Option<Updates> {
        let in_force = if self.doubted { Position::default() } else { self.in_force_at };
        let moved = std::mem::replace(&mut self.told, in_force) != in_force;
        (moved || !self.changes.is_empty()).then(|| Updates { changes: std::mem::take(&mut self.changes), in_force })
    }

    /// What was restored is older than what was handed out before: it counts when the hub has been heard again.
    pub fn doubt(&mut self) {
        self.doubted = true;
    }

    pub fn is_doubted(&self) -> bool {
        self.doubted
    }

    /// Takes one message; returns what to answer.
    ///
    /// # Errors
    /// When the stream must be given up: the hub does not speak the protocol. What is held stays.
    pub fn take(&mut self, response: pb::WatchResponse) -> Result<Vec<pb::WatchRequest>, ReceiveError> {
        let Some(session) = self.session.as_mut() else { return Err(ReceiveError::Protocol("no stream is open")) };
        match response.message {
            None => Ok(Vec::new()),
            Some(Response::Welcome(_)) => {
                session.welcomed = true;
                Ok(Vec::new())
            }
            Some(Response::Refused(refused)) => {
                if refused.total > 0 {
                    let first = refused.parts.first().map(String::as_str).unwrap_or_default();
                    tracing::error!(total = refused.total, first, "the hub cannot read selections: more is received");
                }
                session.refused = refused;
                Ok(Vec::new())
            }
            Some(Response::Heartbeat(_)) => {
                // Nothing more is under way.
                self.doubted &= session.number == 0 || session.complete != session.number;
                Ok(Vec::new())
            }
            Some(Response::Begin(begin)) => {
                session.staging = Some(Staging {
                    snapshot: matches!(begin.kind, Some(pb::begin::Kind::Snapshot(_))),
                    origin: begin.origin,
                    needs: begin.needs_interest,
                    updates: BTreeMap::new(),
                    unreadable: 0,
                });
                Ok(Vec::new())
            }
            Some(Response::Frame(bytes)) => {
                // A withdrawal may have ended the batch.
                let Some(staging) = session.staging.as_mut() else { return Ok(Vec::new()) };
                let frame = wire::read_frame(&bytes)?;
                for id in frame.removals {
                    staging.updates.insert(id, None);
                }
                for update in frame.upserts {
                    match wire::id_of(&update) {
                        // A copy of its own: a slice would keep the whole frame.
                        Ok(id) => drop(staging.updates.insert(id, Some(Bytes::copy_from_slice(&update)))),
                        Err(why) => {
                            tracing::error!(origin = staging.origin, %why, "an object cannot be read, and does not count");
                            staging.unreadable = staging.unreadable.wrapping_add(digest_of(&update));
                            session.unreadable = session.unreadable.saturating_add(1);
                        }
                    }
                }
                Ok(Vec::new())
            }
            Some(Response::End(end)) => {
                let Some(staging) = session.staging.take() else { return Ok(Vec::new()) };
                let position = end.position.ok_or(ReceiveError::Protocol("an end without a position"))?.into();
                let digest = wire::read_digest(&end.digest);
                match staging.origin.is_empty() {
                    true => Ok(self.end_hub(staging, position, digest)),
                    false => Ok(self.end_origin(staging, position, digest, end.view)),
                }
            }
            Some(Response::Interest(interest)) => {
                for removed in &interest.removed {
                    session.interest.remove(&removed.encode_to_vec());
                }
                if interest.added.is_empty() {
                    // Nothing in force needs what goes: the rest is as complete as it was.
                    self.complete_interest.clone_from(&session.interest);
                }
                if interest.whole {
                    session.interest.clear();
                }
                session.interest.extend(interest.added.iter().map(pb::Selection::encode_to_vec));
                session.number = interest.number;
                session.outstanding = interest.origins.into_iter().map(ClusterName::from).collect();
                Ok(self.advance())
            }
            Some(Response::Complete(complete)) => {
                if let Some(at) = session.lacking.get_mut(&*complete.origin) {
                    *at = Some(complete.interest);
                    return Ok(Vec::new());
                }
                if complete.interest == session.number {
                    session.outstanding.remove(&*complete.origin);
                }
                if let (Some(pb::complete::State::Position(at)), Some(origin)) =
                    (complete.state, self.origins.get_mut(&*complete.origin))
                {
                    (origin.position, origin.view) = (at.into(), complete.view);
                }
                Ok(self.advance())
            }
            Some(Response::Withdrawn(withdrawn)) => {
                session.outstanding.remove(&*withdrawn.cluster);
                session.lacking.remove(&*withdrawn.cluster);
                if session.staging.as_ref().is_some_and(|staging| staging.origin == withdrawn.cluster) {
                    session.staging = None;
                }
                self.withdraw(&ClusterName::from(withdrawn.cluster));
                Ok(self.advance())
            }
        }
    }

    /// The names of policies that wait, and for which clusters.
    pub fn waiting(&self) -> (BTreeSet<Arc<str>>, BTreeSet<ClusterName>) {
        let names = self.waiting.iter().flat_map(|waiting| waiting.changes.keys());
        let names = names.filter(|(kind, _)| *kind == ManifestKind::Policy).map(|(_, name)| name.clone()).collect();
        (names, self.session.as_ref().map(|session| session.outstanding.clone()).unwrap_or_default())
    }

    /// Federated policies that cannot be read here, and why; the last version that could holds, and without one what is in
    /// doubt is closed.
    pub fn refused(&self) -> BTreeMap<Arc<str>, String> {
        let refused = self.refused.iter().filter_map(|(id, why)| Some((self.hub_objects.get(id)?.what.as_ref()?, why)));
        let policy = |(what, why): (&HubKey, &WireError)| match what {
            HubKey::Manifest((ManifestKind::Policy, name)) => Some((name.clone(), why.to_string())),
            HubKey::Manifest(_) | HubKey::Cluster(_) => None,
        };
        refused.filter_map(policy).collect()
    }

    pub fn origins(&self) -> BTreeMap<ClusterName, OriginStatus> {
        let status = |origin: &Origin| OriginStatus {
            position: origin.position,
            digest: origin.digest,
            objects: origin.objects.len(),
            refused: origin.refused.len(),
        };
        self.origins.iter().map(|(name, origin)| (name.clone(), status(origin))).collect()
    }

    pub fn clusters(&self) -> &BTreeMap<ClusterName, ClusterRecord> {
        &self.clusters
    }

    /// The hub's positions that were received, and that policies in force come from.
    pub fn positions(&self) -> (Position, Position) {
        (self.hub.unwrap_or_default(), self.in_force_at)
    }

    pub fn hub_digest(&self) -> u128 {
        self.hub_digest
    }

    fn end_hub(&mut self, staging: Staging, position: Position, digest: Option<u128>) -> Vec<pb::WatchRequest> {
        let mut expected = if staging.snapshot { 0 } else { self.hub_digest }.wrapping_add(staging.unreadable);
        for (id, update) in &staging.updates {
            if let Some(held) = self.hub_objects.get(id).filter(|_| !staging.snapshot) {
                expected = expected.wrapping_sub(held.digest);
            }
            expected = expected.wrapping_add(update.as_deref().map_or(0, digest_of));
        }
        if digest != Some(expected) {
            return vec![mismatch("")];
        }
        let (before, clusters) = (self.received.clone(), self.clusters.clone());
        if staging.snapshot {
            self.hub_objects.retain(|id, _| matches!(staging.updates.get(id), Some(Some(_))));
            let keep: BTreeSet<HubKey> = self.hub_objects.values().filter_map(|object| object.what.clone()).collect();
            self.clusters.retain(|name, _| keep.contains(&HubKey::Cluster(name.clone())));
            self.received.retain(|key, _| keep.contains(&HubKey::Manifest(key.clone())));
            self.refused.retain(|id, _| self.hub_objects.contains_key(id));
        }
        for (id, update) in staging.updates {
            match update {
                Some(bytes) => drop(self.put_hub_object(bytes)),
                None => {
                    self.refused.remove(&id);
                    match self.hub_objects.remove(&id).and_then(|object| object.what) {
                        Some(HubKey::Cluster(name)) => drop(self.clusters.remove(&name)),
                        Some(HubKey::Manifest(key)) => drop(self.received.remove(&key)),
                        None => {}
                    }
                }
            }
        }
        self.hub_digest = expected;
        self.hub = Some(position);
        if let Some(session) = self.session.as_mut() {
            session.hub_ended = true;
        }
        let gone: Vec<ClusterName> =
            clusters.keys().filter(|name| !self.clusters.contains_key(*name)).cloned().collect();
        for name in gone {
            self.withdraw(&name);
        }
        for (name, record) in &self.clusters {
            if clusters.get(name) != Some(record) {
                self.changes.push(Change::Cluster { name: name.clone(), record: Some(record.clone()) });
            }
        }
        let changes = differences(&before, &self.received);
        let full = self.waiting.len() >= MAX_WAITING;
        match self.waiting.back_mut() {
            Some(last) if full => {
                last.changes.extend(changes);
                (last.needs, last.position) = (staging.needs, position);
            }
            _ => self.waiting.push_back(Waiting { needs: staging.needs, position, changes }),
        }
        self.advance()
    }

    /// Stores a hub object. One that cannot be understood is kept as bytes, and the last that could be holds.
    fn put_hub_object(&mut self, bytes: Bytes) -> Result<(), WireError> {
        let (id, object) = wire::read_object(&bytes)?;
        let digest = digest_of(&bytes);
        let mut what = self.hub_objects.get(&id).and_then(|held| held.what.clone());
        match object {
            Ok(Object::Cluster { name, record }) => {
                what = Some(HubKey::Cluster(name.clone()));
                self.clusters.insert(name, record);
                self.refused.remove(&id);
            }
            Ok(Object::Manifest { kind, name, manifest }) => {
                let key = (kind, name);
                what = Some(HubKey::Manifest(key.clone()));
                let read = match manifest.features.first() {
                    Some(feature) if feature == EXISTING_TIER => Err(WireError::TierMissing),
                    Some(feature) => Err(WireError::FeatureUnknown(feature.clone())),
                    None => {
                        self.check.map_or(Ok(()), |check| check(kind, &manifest.json)).map_err(WireError::Malformed)
                    }
                };
                // A policy that never could be read is handed on all the same: it may close what it cannot judge. One
                // without a tier is not in force.
                let held = self.received.get(&key).map(|(bytes, _)| bytes);
                let is_in_doubt = |held| self.hub_objects.get(&id).is_some_and(|it| it.bytes == held);
                let never_read = held.is_none_or(|held| self.refused.contains_key(&id) && is_in_doubt(held));
                let has_tier = read != Err(WireError::TierMissing);
                if read.is_ok() || kind == ManifestKind::Policy && never_read && has_tier {
                    self.received.insert(key, (bytes.clone(), manifest));
                }
                match read {
                    Ok(()) => drop(self.refused.remove(&id)),
                    Err(why) => self.refuse(id, why),
                }
            }
            Ok(_) => self.refuse(id, WireError::Malformed("not a kind of the hub's".to_owned())),
            Err(error) => self.refuse(id, error),
        }
        if let Some(old) = self.hub_objects.insert(id, HubObject { bytes, digest, what }) {
            self.hub_digest = self.hub_digest.wrapping_sub(old.digest);
        }
        self.hub_digest = self.hub_digest.wrapping_add(digest);
        Ok(())
    }

    fn refuse(&mut self, id: u64, why: WireError) {
        tracing::error!(id, %why, "an object of the hub's cannot be read here; its last version holds");
        self.refused.insert(id, why);
    }

    fn end_origin(
        &mut self,
        staging: Staging,
        position: Position,
        digest: Option<u128>,
        view: u64,
    ) -> Vec<pb::WatchRequest> {
        let name = ClusterName::from(&*staging.origin);
        let origin = self.origins.entry(name.clone()).or_default();
        let readable = digest.map(|digest| digest.wrapping_sub(staging.unreadable));
        match origin.apply(&name, staging.snapshot, staging.updates, readable, &mut self.changes) {
            Ok(()) => {
                origin.digest = origin.digest.wrapping_add(staging.unreadable);
                (origin.position, origin.view) = (position, view);
                let Some(session) = self.session.as_mut() else { return Vec::new() };
                if session.lacking.remove(&name).is_some_and(|complete| complete == Some(session.number)) {
                    session.outstanding.remove(&name);
                    return self.advance();
                }
                Vec::new()
            }
            // What was held stands until the snapshot replaces it.
            Err(DigestDiffers) => {
                if let Some(session) = self.session.as_mut() {
                    session.lacking.entry(name).or_default();
                }
                vec![mismatch(&staging.origin)]
            }
        }
    }

    fn withdraw(&mut self, name: &ClusterName) {
        let known = self.origins.remove(name).is_some() | self.clusters.contains_key(name);
        if known || !self.changes.iter().any(|c| matches!(c, Change::Withdrawn { name: gone } if gone == name)) {
            self.changes.push(Change::Withdrawn { name: name.clone() });
        }
    }

    /// Puts into force what its interest no longer holds back, and acknowledges.
    fn advance(&mut self) -> Vec<pb::WatchRequest> {
        let Some(session) = self.session.as_mut().filter(|session| session.number > 0) else { return Vec::new() };
        if !session.outstanding.is_empty() {
            return Vec::new();
        }
        let news = session.complete != session.number;
        session.complete = session.number;
        self.doubted &= !session.hub_ended;
        self.complete_interest.clone_from(&session.interest);
        let (number, mut moved) = (session.number, false);
        while self.waiting.front().is_some_and(|waiting| waiting.needs <= number) {
            let Some(waiting) = self.waiting.pop_front() else { break };
            moved = true;
            self.in_force_at = waiting.position;
            for ((kind, name), change) in waiting.changes {
                let manifest = change.as_ref().map(|(_, manifest)| manifest.clone());
                match change {
                    Some(change) => drop(self.in_force.insert((kind, name.clone()), change)),
                    None => drop(self.in_force.remove(&(kind, name.clone()))),
                }
                self.changes.push(Change::Manifest { kind, name, manifest });
            }
        }
        if !news && !moved {
            return Vec::new();
        }
        let in_force = pb::InForce { interest: number, hub: Some(self.in_force_at.into()) };
        vec![ack(pb::watch_ack::What::InForce(in_force))]
    }
}

/// The digest that an end names is not that of what would be held.
#[derive(Debug)]
struct DigestDiffers;

impl Origin {
    /// Applies a batch, if the result has this digest, and says what changed.
    fn apply(
        &mut self,
        cluster: &ClusterName,
        snapshot: bool,
        updates: BTreeMap<u64, Option<Bytes>>,
        digest: Option<u128>,
        changes: &mut Vec<Change>,
    ) -> Result<(), DigestDiffers> {
        let mut after = if snapshot { 0 } else { self.digest };
        let mut digests = HashMap::new();
        for (id, update) in &updates {
            if let Some(held) = self.objects.get(id).filter(|_| !snapshot) {
                after = after.wrapping_sub(held.digest);
            }
            if let Some(bytes) = update {
                let digest = digest_of(bytes);
                digests.insert(*id, digest);
                after = after.wrapping_add(digest);
            }
        }
        if digest.is_some_and(|digest| digest != after) {
            return Err(DigestDiffers);
        }
        let mut endpoints = BTreeSet::new();
        let (mut namespaces, mut accounts, mut sets) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let gone: Vec<u64> = match snapshot {
            true => self.objects.keys().copied().filter(|id| !matches!(updates.get(id), Some(Some(_)))).collect(),
            false => updates.iter().filter(|(_, update)| update.is_none()).map(|(id, _)| *id).collect(),
        };
        // Names are looked up in what was held, then in what is held: an object may have another name now.
        let mut note = |origin: &Self, id: u64| match origin.objects.get(&id).and_then(|held| held.object.clone()) {
            Some(Small::Endpoint { namespace, name, .. }) => {
                endpoints.extend(origin.namespace_name(namespace).map(|namespace| pod(namespace, name)));
            }
            Some(Small::Namespace(name)) => drop(namespaces.insert((id, name))),
            Some(Small::ServiceAccount { namespace, name }) => {
                accounts.extend(origin.namespace_name(namespace).map(|namespace| (namespace, name, id)));
            }
            Some(Small::LabelSet(_)) => drop(sets.insert(id)),
            None => {}
        };
        let changed: Vec<u64> = updates
            .iter()
            .filter(|(id, update)| {
                update.is_some() && self.objects.get(*id).map(|h| h.digest) != digests.get(*id).copied()
            })
            .map(|(id, _)| *id)
            .collect();
        gone.iter().chain(&changed).for_each(|id| note(self, *id));
        for id in gone {
            self.remove(id);
        }
        for id in &changed {
            if let Some(Some(bytes)) = updates.get(id) {
                self.remove(*id);
                self.insert(*id, bytes.clone(), digests.get(id).copied().unwrap_or_default());
            }
        }
        // Objects that name a namespace which came in the same batch are found by now.
        changed.iter().for_each(|id| note(self, *id));
        for id in &changed {
            if let Some(Held { object: Some(Small::Endpoint { namespace, name, .. }), .. }) = self.objects.get(id)
                && let Some(namespace) = self.namespace_name(*namespace)
            {
                self.names.insert(pod(namespace, name.clone()), *id);
            }
        }
        self.digest = after;
        for set in sets {
            for user in self.users.get(&set).into_iter().flatten() {
                if let Some(Held { object: Some(Small::Endpoint { namespace, name, .. }), .. }) = self.objects.get(user)
                {
                    endpoints.extend(self.namespace_name(*namespace).map(|namespace| pod(namespace, name.clone())));
                }
            }
        }
        self.tell(cluster, endpoints, namespaces, accounts, changes);
        Ok(())
    }

    /// Everything that is held, as changes from nothing.
    fn tell_all(&self, cluster: &ClusterName, changes: &mut Vec<Change>) {
        let (mut namespaces, mut accounts) = (BTreeSet::new(), BTreeSet::new());
        for (id, held) in &self.objects {
            match &held.object {
                Some(Small::Namespace(name)) => drop(namespaces.insert((*id, name.clone()))),
                Some(Small::ServiceAccount { namespace, name }) => {
                    accounts.extend(self.namespace_name(*namespace).map(|namespace| (namespace, name.clone(), *id)));
                }
                Some(Small::LabelSet(_) | Small::Endpoint { .. }) | None => {}
            }
        }
        self.tell(cluster, self.names.keys().cloned().collect(), namespaces, accounts, changes);
    }

    fn tell(
        &self,
        cluster: &ClusterName,
        endpoints: BTreeSet<EndpointId>,
        namespaces: BTreeSet<(u64, Arc<str>)>,
        accounts: BTreeSet<(Arc<str>, Arc<str>, u64)>,
        changes: &mut Vec<Change>,
    ) {
        // Labels of namespaces before the endpoints in them; endpoints that go before their namespaces.
        let mut removals = Vec::new();
        for (id, name) in namespaces {
            let labels = self.objects.get(&id).and_then(|held| match wire::read_object(&held.bytes) {
                Ok((_, Ok(Object::Namespace { name: now, labels }))) if now == name => Some(labels),
                _ => None,
            });
            // In a new epoch the same namespace has another id.
            let elsewhere =
                || self.objects.iter().any(|(_, h)| matches!(&h.object, Some(Small::Namespace(n)) if *n == name));
            match labels {
                None if elsewhere() => {}
                None => removals.push(Change::Namespace { cluster: cluster.clone(), name, labels: None }),
                labels => changes.push(Change::Namespace { cluster: cluster.clone(), name, labels }),
            }
        }
        let mut told = BTreeMap::new();
        for (namespace, name, id) in accounts {
            let labels = self.objects.get(&id).and_then(|held| match wire::read_object(&held.bytes) {
                Ok((_, Ok(Object::ServiceAccount { labels, .. }))) => Some(labels),
                _ => None,
            });
            let entry = told.entry((namespace, name)).or_insert(None);
            if labels.is_some() {
                *entry = labels;
            }
        }
        for ((namespace, name), labels) in told {
            let to = if labels.is_some() { &mut *changes } else { &mut removals };
            to.push(Change::ServiceAccount { cluster: cluster.clone(), namespace, name, labels });
        }
        for id in endpoints {
            let endpoint = self.names.get(&id).and_then(|number| self.endpoint(*number));
            changes.push(Change::Endpoint { cluster: cluster.clone(), id, endpoint });
        }
        changes.append(&mut removals);
    }

    fn endpoint(&self, id: u64) -> Option<Endpoint> {
        let Ok((_, Ok(Object::Endpoint(remote)))) = wire::read_object(&self.objects.get(&id)?.bytes) else {
            return None;
        };
        let RemoteEndpoint { service_account, label_set, own, addresses, ports, node, .. } = remote;
        let mut labels = match self.objects.get(&label_set).map(|held| &held.object) {
            Some(Some(Small::LabelSet(labels))) => labels.clone(),
            _ => Labels::new(),
        };
        labels.extend(own);
        let service_account = match self.objects.get(&service_account).map(|held| &held.object) {
            Some(Some(Small::ServiceAccount { name, .. })) => Some(name.clone()),
            _ => None,
        };
        Some(Endpoint { labels, service_account, addresses, ports, node, ..Endpoint::default() })
    }

    fn namespace_name(&self, id: u64) -> Option<Arc<str>> {
        match self.objects.get(&id)?.object.as_ref()? {
            Small::Namespace(name) => Some(name.clone()),
            _ => None,
        }
    }

    fn remove(&mut self, id: u64) {
        self.refused.remove(&id);
        let Some(held) = self.objects.remove(&id) else { return };
        if let Some(Small::Endpoint { label_set, name, .. }) = held.object {
            if let Some(users) = self.users.get_mut(&label_set) {
                users.remove(&id);
                if users.is_empty() {
                    self.users.remove(&label_set);
                }
            }
            self.names.retain(|key, number| *number != id || key.name != name);
        }
    }

    fn insert(&mut self, id: u64, bytes: Bytes, digest: u128) {
        let object = match wire::read_object(&bytes) {
            Ok((_, Ok(Object::Namespace { name, .. }))) => Some(Small::Namespace(name)),
            Ok((_, Ok(Object::ServiceAccount { namespace, name, .. }))) => {
                Some(Small::ServiceAccount { namespace, name })
            }
            Ok((_, Ok(Object::LabelSet { labels }))) => Some(Small::LabelSet(labels)),
            Ok((_, Ok(Object::Endpoint(it)))) => {
                self.users.entry(it.label_set).or_default().insert(id);
                Some(Small::Endpoint { namespace: it.namespace, label_set: it.label_set, name: it.name })
            }
            Ok((_, Ok(Object::Manifest { .. } | Object::Cluster { .. }))) => {
                self.refused.insert(id, WireError::Malformed("not a kind of a cluster's".to_owned()));
                None
            }
            Ok((_, Err(error))) | Err(error) => {
                self.refused.insert(id, error);
                None
            }
        };
        self.objects.insert(id, Held { bytes, digest, object });
    }
}

fn differences(
    before: &BTreeMap<ManifestKey, (Bytes, Manifest)>,
    after: &BTreeMap<ManifestKey, (Bytes, Manifest)>,
) -> BTreeMap<ManifestKey, Option<(Bytes, Manifest)>> {
    let gone = before.keys().filter(|key| !after.contains_key(*key)).map(|key| (key.clone(), None));
    let new = after.iter().filter(|(key, value)| before.get(*key) != Some(*value));
    gone.chain(new.map(|(key, value)| (key.clone(), Some(value.clone())))).collect()
}

fn everything() -> pb::Selection {
    wire::selection(&Wanted::everything())
}

fn mismatch(origin: &str) -> pb::WatchRequest {
    ack(pb::watch_ack::What::Mismatch(pb::DigestMismatch { origin: origin.to_owned() }))
}

fn ack(what: pb::watch_ack::What) -> pb::WatchRequest {
    pb::WatchRequest { message: Some(Request::Ack(pb::WatchAck { what: Some(what) })) }
}

#[cfg(test)]
mod tests;
