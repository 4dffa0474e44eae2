//! What one cluster publishes, as this hub has it.
//!
//! What is accepted is a function of the published objects and the grants, not of their order: replicas that have the same
//! objects accept the same. Refused objects are kept beside (within limits), so that a wider grant or a withdrawn rival
//! brings them back. Endpoints with the same namespace, account and label set form a *profile*: selections are judged once
//! per profile, and per endpoint only where they name a label of its own or a port.
//!
//! Each entry has the revision by which it was last *touched*, by itself or by what it refers to; resuming looks for
//! entries touched later. That is a scan of the origin's entries, skipped when nothing was touched since, which costs no memory
//! per endpoint. Removed ids are in a bounded list; below its floor a receiver needs a snapshot.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::BuildHasher as _;
use std::sync::Arc;

use hanse_policy::inventory::LabelGrant;
use hanse_policy::model::ClusterName;
use hashbrown::{DefaultHashBuilder, HashSet, HashTable};

use super::selections::Selections;
use crate::codec::object::{self, EndpointObject, Object};
use crate::model::{Grant, Limit, Pairs, Position, Refusal, digest_of};

mod addresses;
mod batch;
mod judging;
mod profiles;

use addresses::{Addresses, Claim};
pub use batch::{Applying, Batch, BatchError, StagedLimits};
use batch::{BYTES_PER_OBJECT, MAX_OTHERS, kept_bytes};
use profiles::Profiles;

/// Removed ids that are remembered per origin: 4,096 × 16 bytes is 64 KiB.
pub const MAX_TOMBSTONES: usize = 4_096;
/// 48 bytes: there is one for each endpoint of the ClusterSet. Everything else is read from its bytes when it is needed.
#[derive(Debug)]
pub struct Entry {
    pub id: u64,
    pub bytes: Box<[u8]>,
    pub touched: u64,
    body: Body,
    /// It counts: nothing is wrong with it nor with what it refers to, and no newer endpoint has its addresses.
    pub visible: bool,
}

impl Entry {
    pub fn digest(&self) -> u128 {
        digest_of(&self.bytes)
    }

    fn before(&self) -> Before {
        Before { id: self.id, digest: self.digest() }
    }

    fn claim(&self, slot: u32) -> Claim {
        let revision = object::decode_export(&self.bytes).map_or(0, |update| update.revision);
        Claim { revision, id: self.id, slot }
    }
}

#[derive(Debug, Clone, Copy)]
enum Body {
    /// `place` is where its profile's list has it.
    Endpoint {
        profile: u32,
        place: u32,
    },
    /// A namespace or an account; what it says is among the origin's `named`.
    Named,
    LabelSet,
    /// Why is among the origin's `refused`.
    Refused,
}

#[derive(Debug)]
enum Named {
    Namespace { name: Arc<str>, labels: Pairs },
    Account { namespace: u64, name: Arc<str>, labels: Pairs },
}

/// The label with a namespace's name.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// What a batch changed, for those who follow the origin.
#[derive(Debug, Default)]
pub struct Changes {
    /// By slot, with the object before; a slot is given to another object only after the changes were reported.
    pub endpoints: BTreeMap<u32, Before>,
    /// Also those whose endpoints changed.
    pub supports: BTreeMap<u32, Before>,
}

#[derive(Debug, Clone, Copy)]
pub struct Before {
    pub id: u64,
    pub digest: u128,
}

#[derive(Debug)]
pub struct Origin {
    pub name: ClusterName,
    pub position: Position,
    /// It has published to this replica since the replica started.
    pub synced: bool,
    /// A batch is being applied.
    is_applying: bool,
    /// Everything is judged again under another grant.
    regranting: Option<Regranting>,
    pub grant: Arc<dyn Grant>,
    label_grant: LabelGrant,
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    freed: Vec<u32>,
    /// Slots by the ids of their objects.
    ids: HashTable<u32>,
    hasher: DefaultHashBuilder,
    addresses: Addresses,
    profiles: Profiles,
    /// By slot.
    named: BTreeMap<u32, Named>,
    /// By slot.
    refused: BTreeMap<u32, Refusal>,
    tombstones: VecDeque<(u64, u64)>,
    floor: u64,
    last_touched: u64,
    /// Of everything published and kept.
    published: u128,
    endpoints: usize,
    label_sets: usize,
    bytes: usize,
    /// Slots of what does not count.
    troubled: BTreeSet<u32>,
    overflow: BTreeMap<u64, Refusal>,
    /// The room when a snapshot was requested last, or that it left.
    requested: Option<Room>,
    pub unreadable: usize,
}

/// How far everything was judged again: slots, then profiles.
#[derive(Debug, Clone, Copy, Default)]
struct Regranting {
    slot: u32,
    profile: u32,
}

/// How much more could be kept.
#[derive(Debug, Clone, Copy)]
struct Room {
    endpoints: usize,
    label_sets: usize,
    others: usize,
    bytes: usize,
}

impl Origin {
    pub fn new(name: ClusterName, grant: Arc<dyn Grant>) -> Self {
        let label_grant = grant.label_grant();
        Self {
            name,
            position: Position::default(),
            synced: false,
            is_applying: false,
            regranting: None,
            grant,
            label_grant,
            entries: Vec::new(),
            free: Vec::new(),
            freed: Vec::new(),
            ids: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            addresses: Addresses::default(),
            profiles: Profiles::default(),
            named: BTreeMap::new(),
            refused: BTreeMap::new(),
            tombstones: VecDeque::new(),
            floor: 0,
            last_touched: 0,
            published: 0,
            endpoints: 0,
            label_sets: 0,
            bytes: 0,
            troubled: BTreeSet::new(),
            overflow: BTreeMap::new(),
            requested: None,
            unreadable: 0,
        }
    }

    pub fn entry(&self, slot: u32) -> Option<&Entry> {
        self.entries.get(slot as usize)?.as_ref()
    }

    fn live(&self, slot: u32) -> &Entry {
        self.entry(slot).expect("a slot that is referred to is taken")
    }

    /// One above the highest slot that is in use.
    pub fn slot_bound(&self) -> u32 {
        self.entries.len() as u32
    }

    pub fn slots(&self) -> impl Iterator<Item = (u32, &Entry)> {
        self.entries.iter().enumerate().filter_map(|(slot, entry)| Some((slot as u32, entry.as_ref()?)))
    }

    pub fn slot_of(&self, id: u64) -> Option<u32> {
        let is_it = |slot: &u32| self.entry(*slot).is_some_and(|entry| entry.id == id);
        self.ids.find(self.hasher.hash_one(id), is_it).copied()
    }

    pub fn digest_published(&self) -> u128 {
        self.published
    }

    pub fn endpoint_count(&self) -> usize {
        self.endpoints
    }

    /// How many kinds of endpoints are judged at once: one for each namespace, account and label set that go together.
    pub fn profile_count(&self) -> usize {
        self.profiles.len()
    }

    /// How many keys of labels that endpoints have of their own are judged by.
    pub fn own_key_count(&self) -> usize {
        self.profiles.iter().map(|profile| profile.own_keys.len()).sum()
    }

    /// Something published is not kept, because of a limit.
    pub fn overflowed(&self) -> bool {
        !self.overflow.is_empty()
    }

    /// Whether a snapshot should be requested: of what was not kept because of a limit, so much may fit now that a snapshot is
    /// worth its while, which is all of it or a hundredth of what is granted. It is requested once per stream, until there is
    /// more room than then, or than the snapshot left: how large the refused objects are is not known.
    pub fn requests_snapshot(&mut self) -> bool {
        let (room, requested) = (self.room(), self.requested);
        let fits = |what: Limit, of: fn(Room) -> usize, most: usize, share: usize| {
            let lacking = self.overflow.values().filter(|why| **why == Refusal::LimitExceeded(what)).count();
            lacking > 0
                && of(room) >= lacking.saturating_mul(share).min(1 + most / 100)
                && requested.is_none_or(|requested| of(room) >= of(requested) + share)
        };
        let requests = !self.overflow.is_empty()
            && (fits(Limit::Endpoints, |room| room.endpoints, self.grant.max_endpoints(), 1)
                || fits(Limit::LabelSets, |room| room.label_sets, self.grant.max_label_sets(), 1)
                || fits(Limit::OtherObjects, |room| room.others, MAX_OTHERS, 1)
                || fits(Limit::Bytes, |room| room.bytes, kept_bytes(&*self.grant), BYTES_PER_OBJECT));
        if requests {
            self.requested = Some(room);
        }
        requests
    }

    /// A snapshot that was requested on an earlier stream may never come.
    pub fn publisher_opens(&mut self) {
        self.requested = None;
    }

    fn room(&self) -> Room {
        Room {
            endpoints: self.grant.max_endpoints().saturating_sub(self.endpoints),
            label_sets: self.grant.max_label_sets().saturating_sub(self.label_sets),
            others: MAX_OTHERS.saturating_sub(self.ids.len() - self.endpoints - self.label_sets),
            bytes: kept_bytes(&*self.grant).saturating_sub(self.bytes),
        }
    }

    /// Whether a resuming receiver's revision is still within the remembered removals.
    pub fn resumable_from(&self, revision: u64) -> bool {
        revision >= self.floor && revision <= self.position.revision
    }

    /// Slots touched, and ids removed, after a revision.
    pub fn since(&self, revision: u64) -> (Vec<u32>, Vec<u64>) {
        if self.last_touched <= revision {
            return (Vec::new(), Vec::new());
        }
        let touched = self.slots().filter(|(_, entry)| entry.touched > revision).map(|(slot, _)| slot).collect();
        let removed = self.tombstones.iter().rev().take_while(|(at, _)| *at > revision).map(|(_, id)| *id).collect();
        (touched, removed)
    }

    /// All refusals: how many, and the first `max`.
    pub fn refusals(&self, max: usize) -> (usize, Vec<(u64, Refusal)>) {
        let mut total = self.overflow.len() + self.unreadable;
        let mut list: Vec<_> = self.overflow.iter().take(max).map(|(id, why)| (*id, why.clone())).collect();
        for slot in &self.troubled {
            let Some(entry) = self.entry(*slot) else { continue };
            let why = match entry.body {
                Body::Endpoint { profile, .. } if !entry.visible => match &self.profiles.get(profile).problem {
                    Some(problem) => (**problem).clone(),
                    None => self.taken_address(entry),
                },
                Body::Named if !entry.visible => match self.named.get(slot) {
                    Some(Named::Account { namespace, .. }) => Refusal::ReferenceMissing(*namespace),
                    _ => continue,
                },
                _ => match self.refused.get(slot) {
                    Some(why) => why.clone(),
                    None => continue,
                },
            };
            if list.len() == max {
                break;
            }
            list.push((entry.id, why));
        }
        total += self.troubled.len();
        (total, list)
    }

    /// What an object is called, for people.
    pub fn describe(&self, id: u64) -> String {
        let object = self.slot_of(id).and_then(|slot| self.entry(slot));
        let Some((kind, namespace, name)) = object.and_then(|entry| object::name_of(&entry.bytes)) else {
            return format!("object {id}");
        };
        // Also where the namespace itself is refused.
        let of = self.slot_of(namespace).and_then(|slot| self.entry(slot));
        match of.and_then(|entry| object::name_of(&entry.bytes)) {
            Some(("namespace", _, of)) => format!("{kind} {of}/{name}"),
            _ => format!("{kind} {name}"),
        }
    }

    /// Why an object is refused, for people.
    pub fn explain(&self, id: u64, why: &Refusal) -> String {
        let object = self.describe(id);
        match why {
            Refusal::ReferenceMissing(to) => {
                format!("{object}: it refers to {}, which does not exist or is refused", self.describe(*to))
            }
            why => format!("{object}: {why}"),
        }
    }

    fn taken_address(&self, entry: &Entry) -> Refusal {
        let taken = endpoint_of(&entry.bytes).and_then(|e| {
            e.addresses.into_iter().find(|address| {
                let owner = self.addresses.owner(*address).and_then(|slot| self.entry(slot));
                owner.is_none_or(|owner| owner.id != entry.id)
            })
        });
        taken.map_or(Refusal::ReferenceMissing(0), Refusal::AddressTaken)
    }

    /// Begins to apply a batch, which [`Self::step`] does.
    ///
    /// # Errors
    /// When the batch does not follow the present state; nothing has changed then.
    pub fn begin(&mut self, batch: Batch, position: Position) -> Result<Applying, BatchError> {
        let same_epoch = self.synced && position.epoch == self.position.epoch;
        if self.synced && position.epoch < self.position.epoch {
            return Err(BatchError::OldEpoch(position.epoch));
        }
        if !batch.snapshot && !same_epoch {
            return Err(BatchError::NothingHeld);
        }
        if same_epoch && position.revision < self.position.revision {
            return Err(BatchError::OldRevision(position.revision));
        }
        if batch.snapshot {
            self.overflow.clear();
            self.unreadable = 0;
        }
        self.is_applying = true;
        Ok(batch.end(position, same_epoch))
    }

    /// Applies the next part of a batch, of about `slice` updates; whether that was the last. After the changes were
    /// reported, [`Self::settle`] must be called. Between two parts the origin is consistent, but not a state of its publisher.
    pub fn step(&mut self, batch: &mut Applying, selections: &Selections, slice: usize) -> (Changes, bool) {
        let mut left = slice;
        let revision = batch.position.revision;
        let mut work = Work::default();
        let done = loop {
            if left == 0 {
                break false;
            }
            // Much less than applying them.
            if let Some(read) = batch.read() {
                left = left.saturating_sub(read / 16);
            } else if batch.removals.is_none() {
                left = left.saturating_sub(self.find_removals(batch, left.saturating_mul(16)) / 16);
            } else if let Some(id) = batch.removals.as_mut().and_then(Vec::pop) {
                self.overflow.remove(&id);
                self.remove(id, &mut work);
                if batch.same_epoch {
                    self.tombstones.push_back((revision, id));
                }
                left -= 1;
            } else if let Some((id, bytes)) = batch.updates.pop_first() {
                if let Some(bytes) = bytes {
                    self.put(id, &bytes, revision, &mut work);
                    left -= 1;
                }
            } else {
                break true;
            }
        };
        if done {
            self.unreadable += batch.unreadable;
            if !batch.same_epoch {
                self.tombstones.clear();
                self.floor = revision;
            }
            self.position = batch.position;
            self.synced = true;
            self.is_applying = false;
        }
        while self.tombstones.len() > MAX_TOMBSTONES {
            self.floor = self.tombstones.pop_front().map_or(self.floor, |(revision, _)| self.floor.max(revision));
        }
        let changes = self.recompute(work, selections, revision);
        if done && batch.snapshot {
            self.requested = self.requested.map(|_| self.room());
            // What grew by doubling is a third too large, and most origins change little afterwards.
            self.shrink();
        }
        (changes, done)
    }

    /// Finds what a batch that was read removes: what it says, and of a snapshot what it does not name, of at most `most` slots.
    fn find_removals(&self, batch: &mut Applying, most: usize) -> usize {
        if batch.snapshot {
            let slots = self.entries.len().saturating_sub(batch.scanned).min(most.max(1));
            let held = self.entries.iter().skip(batch.scanned).take(slots).flatten().map(|entry| entry.id);
            let gone = held.filter(|id| !batch.same_epoch || !batch.updates.contains_key(id));
            batch.found.extend(gone);
            batch.scanned += slots;
            if slots > 0 {
                return slots;
            }
        }
        let mut removals = std::mem::take(&mut batch.found);
        removals.extend(batch.updates.iter().filter(|(_, bytes)| bytes.is_none()).map(|(id, _)| *id));
        removals.sort_unstable();
        removals.dedup();
        // They are taken from the end.
        removals.reverse();
        batch.removals = Some(removals);
        batch.updates.len()
    }

    fn shrink(&mut self) {
        self.entries.shrink_to_fit();
        let (entries, hasher) = (&self.entries, &self.hasher);
        self.ids.shrink_to_fit(|slot| hash_of(entries, hasher, *slot));
        self.addresses.shrink();
        self.profiles.shrink();
    }

    /// What is here is between two states of its publisher, or two grants, and nothing of it is sent.
    pub fn is_busy(&self) -> bool {
        self.is_applying || self.regranting.is_some()
    }

    /// Begins to judge everything again under another grant, which [`Self::regrant_step`] does. The origin's position stays;
    /// views of other grants have another token.
    pub fn regrant(&mut self, grant: Arc<dyn Grant>) {
        self.label_grant = grant.label_grant();
        self.grant = grant;
        self.regranting = Some(Regranting::default());
    }

    /// Judges the next `slice` objects, or profiles with about as many endpoints, under the present grant; whether those were the
    /// last. After the changes were reported, [`Self::settle`] must be called.
    pub fn regrant_step(&mut self, selections: &Selections, slice: usize) -> (Changes, bool) {
        let Some(Regranting { slot, profile }) = self.regranting else { return (Changes::default(), true) };
        let mut work = Work::default();
        let (slots, profiles) = (self.entries.len() as u32, self.profiles.len() as u32);
        let most = u32::try_from(slice).unwrap_or(u32::MAX);
        let next = slot.saturating_add(most).min(slots);
        for slot in slot..next {
            self.put_again(slot, &mut work);
        }
        // Which selections match may be another question of the grant, once all objects are judged.
        let mut after = profile;
        if next == slots {
            let mut endpoints = 0;
            while after < profiles && endpoints < slice {
                endpoints = endpoints.saturating_add(self.profiles.get(after).endpoints.len() + 1);
                work.profiles.insert(after);
                after += 1;
            }
        }
        let done = next == slots && after >= profiles;
        self.regranting = (!done).then_some(Regranting { slot: next, profile: after });
        let revision = self.position.revision;
        (self.recompute(work, selections, revision), done)
    }

    /// Frees the slots of removed objects, once their followers know.
    pub fn settle(&mut self) {
        self.free.append(&mut self.freed);
    }

    pub fn is_endpoint(&self, slot: u32) -> bool {
        matches!(self.entry(slot), Some(Entry { body: Body::Endpoint { .. }, .. }))
    }

    /// The supports that an endpoint refers to.
    pub fn supports_of(&self, slot: u32) -> impl Iterator<Item = u32> + '_ {
        let profile = match self.entry(slot) {
            Some(Entry { body: Body::Endpoint { profile, .. }, .. }) => Some(self.profiles.get(*profile).key),
            _ => None,
        };
        profile.into_iter().flatten().filter_map(|id| self.slot_of(id))
    }

    fn remove(&mut self, id: u64, work: &mut Work) {
        let is_it = |slot: &u32| self.entries[*slot as usize].as_ref().is_some_and(|entry| entry.id == id);
        let Ok(found) = self.ids.find_entry(self.hasher.hash_one(id), is_it) else { return };
        let (slot, _) = found.remove();
        let entry = self.entries[slot as usize].take().expect("an id's slot is taken");
        self.published = self.published.wrapping_sub(entry.digest());
        self.detach(slot, &entry, work);
        self.freed.push(slot);
    }

    /// Takes an entry out of every index.
    fn detach(&mut self, slot: u32, entry: &Entry, work: &mut Work) {
        let before = entry.before();
        self.bytes -= entry.bytes.len();
        self.troubled.remove(&slot);
        match entry.body {
            Body::Endpoint { profile, place } => {
                self.endpoints -= 1;
                work.endpoints.entry(slot).or_insert(before);
                for address in endpoint_of(&entry.bytes).map(|e| e.addresses).unwrap_or_default() {
                    self.addresses.release(address, entry.claim(slot), &mut work.rivals);
                }
                let of = self.profiles.get_mut(profile);
                of.endpoints.swap_remove(place as usize);
                // The last of the list has its place now.
                if let Some(moved) = of.endpoints.get(place as usize).copied()
                    && let Some(Entry { body: Body::Endpoint { place: of_moved, .. }, .. }) =
                        self.entries[moved as usize].as_mut()
                {
                    *of_moved = place;
                }
                work.referred.extend(of.key);
                if of.endpoints.is_empty() {
                    work.emptied.insert(profile);
                }
            }
            Body::Named | Body::LabelSet => {
                match entry.body {
                    Body::LabelSet => self.label_sets -= 1,
                    _ => drop(self.named.remove(&slot)),
                }
                work.supports.entry(slot).or_insert(before);
                work.profiles.extend(self.profiles.referring(entry.id));
                work.changed_ids.insert(entry.id);
            }
            Body::Refused => {
                self.refused.remove(&slot);
                work.supports.entry(slot).or_insert(before);
            }
        }
    }

    fn put(&mut self, id: u64, bytes: &[u8], revision: u64, work: &mut Work) {
        let slot = self.slot_of(id);
        if slot.is_some_and(|slot| *self.live(slot).bytes == *bytes) {
            return;
        }
        let export = read(bytes);
        self.remove(id, work);
        let others = self.ids.len() - self.endpoints - self.label_sets;
        let full = match &export {
            _ if self.bytes + bytes.len() > kept_bytes(&*self.grant) => Some(Limit::Bytes),
            Ok(Object::Endpoint(_)) if self.endpoints >= self.grant.max_endpoints() => Some(Limit::Endpoints),
            Ok(Object::LabelSet { .. }) if self.label_sets >= self.grant.max_label_sets() => Some(Limit::LabelSets),
            Ok(Object::Endpoint(_) | Object::LabelSet { .. }) => None,
            _ => (others >= MAX_OTHERS).then_some(Limit::OtherObjects),
        };
        if let Some(what) = full {
            // At most this many are named.
            if self.overflow.len() < MAX_OTHERS {
                self.overflow.insert(id, Refusal::LimitExceeded(what));
            }
            return;
        }
        self.overflow.remove(&id);
        // The slot of a replaced object is used again at once: its followers know it by the slot.
        let slot = match slot {
            Some(slot) => {
                self.freed.retain(|s| *s != slot);
                slot
            }
            None => self.free.pop().unwrap_or_else(|| {
                self.entries.push(None);
                self.entries.len() as u32 - 1
            }),
        };
        self.published = self.published.wrapping_add(digest_of(bytes));
        self.bytes += bytes.len();
        let body = self.attach(slot, id, export, work);
        self.entries[slot as usize] = Some(Entry { id, bytes: bytes.into(), touched: revision, body, visible: false });
        let (entries, hasher) = (&self.entries, &self.hasher);
        self.ids.insert_unique(hasher.hash_one(id), slot, |slot| hash_of(entries, hasher, *slot));
    }

    /// Judges an object again, where the grants say otherwise of it than before: a namespace touches all of its endpoints.
    fn put_again(&mut self, slot: u32, work: &mut Work) {
        let Some(entry) = self.entry(slot) else { return };
        let judged = read(&entry.bytes).and_then(|export| self.permit(export)).err();
        if judged.as_ref() == self.refused.get(&slot) {
            return;
        }
        let Some(mut entry) = self.entries[slot as usize].take() else { return };
        self.detach(slot, &entry, work);
        self.bytes += entry.bytes.len();
        entry.body = self.attach(slot, entry.id, read(&entry.bytes), work);
        self.entries[slot as usize] = Some(entry);
    }

    /// Puts what an object says into the indices, if the grants let it.
    fn attach(&mut self, slot: u32, id: u64, export: Result<Object, Refusal>, work: &mut Work) -> Body {
        let export = export.and_then(|export| self.permit(export));
        let body = match export {
            Err(refusal) => {
                self.refused.insert(slot, refusal);
                Body::Refused
            }
            // Decoding has refused them.
            Ok(Object::Manifest { .. } | Object::Cluster { .. }) => Body::Refused,
            Ok(Object::Namespace { name, labels }) => {
                self.named.insert(slot, Named::Namespace { name, labels });
                Body::Named
            }
            Ok(Object::ServiceAccount { namespace, name, labels }) => {
                self.named.insert(slot, Named::Account { namespace, name, labels });
                Body::Named
            }
            Ok(Object::LabelSet { .. }) => {
                self.label_sets += 1;
                Body::LabelSet
            }
            Ok(Object::Endpoint(endpoint)) => {
                self.endpoints += 1;
                let profile = self.profile(&endpoint, work);
                let list = &mut self.profiles.get_mut(profile).endpoints;
                list.push(slot);
                Body::Endpoint { profile, place: list.len() as u32 - 1 }
            }
        };
        match body {
            Body::Endpoint { profile, .. } => {
                work.referred.extend(self.profiles.get(profile).key);
                let before = work.supports.get(&slot).copied().unwrap_or(Before { id, digest: 0 });
                work.endpoints.entry(slot).or_insert(before);
            }
            Body::Named | Body::LabelSet | Body::Refused => {
                work.supports.entry(slot).or_insert(Before { id, digest: 0 });
                work.profiles.extend(self.profiles.referring(id));
                work.changed_ids.insert(id);
            }
        }
        body
    }

    fn permit(&self, export: Object) -> Result<Object, Refusal> {
        let labels = match &export {
            Object::Namespace { name, .. } if !self.grant.permits_namespace(name) => {
                return Err(Refusal::NamespaceNotGranted(name.clone()));
            }
            Object::Namespace { name, labels } => {
                // Kubernetes sets it to the name, and policies go by it: another value would be another namespace.
                if let Some((key, value)) = labels.iter().find(|(key, value)| **key == *NAME_LABEL && value != name) {
                    return Err(Refusal::LabelNotGranted(format!("{key}={value}")));
                }
                labels
            }
            Object::ServiceAccount { labels, .. } => labels,
            Object::Endpoint(endpoint) => {
                if let Some(address) = endpoint.addresses.iter().find(|a| !self.grant.permits_address(**a)) {
                    return Err(Refusal::AddressNotGranted(*address));
                }
                &endpoint.own
            }
            Object::LabelSet { labels } => labels,
            Object::Manifest { .. } | Object::Cluster { .. } => {
                return Err(Refusal::KindNotPublishable("federated objects".into()));
            }
        };
        let granted = |key: &str, value: &str| key == NAME_LABEL || self.grant.permits_label(key, value);
        match labels.iter().find(|(key, value)| !granted(key, value)) {
            Some((key, value)) => Err(Refusal::LabelNotGranted(format!("{key}={value}"))),
            None => Ok(export),
        }
    }

    fn profile(&mut self, endpoint: &EndpointObject, work: &mut Work) -> u32 {
        let key = [endpoint.namespace, endpoint.service_account, endpoint.label_set];
        let (number, new) = self.profiles.number(key);
        let profile = self.profiles.get_mut(number);
        if new || profile.endpoints.is_empty() {
            work.profiles.insert(number);
        }
        let unknown: BTreeSet<Arc<str>> =
            endpoint.own.iter().map(|(key, _)| key.clone()).filter(|key| !profile.own_keys.contains(key)).collect();
        if !unknown.is_empty() {
            self.add_own_keys(number, unknown);
            work.profiles.insert(number);
        }
        number
    }

    /// Each key costs at every judgement, so those of endpoints that went are dropped each time that their number may have doubled.
    fn add_own_keys(&mut self, number: u32, mut keys: BTreeSet<Arc<str>>) {
        let profile = self.profiles.get(number);
        let mut most = profile.most_keys;
        if profile.own_keys.len() + keys.len() <= most {
            keys.extend(profile.own_keys.iter().cloned());
        } else {
            let endpoints = profile.endpoints.iter().filter_map(|slot| endpoint_of(&self.live(*slot).bytes));
            keys.extend(endpoints.flat_map(|endpoint| endpoint.own.into_iter().map(|(key, _)| key)));
            most = most.max(2 * keys.len());
        }
        let profile = self.profiles.get_mut(number);
        (profile.own_keys, profile.most_keys) = (keys.into_iter().collect(), most);
    }

    /// Brings everything derived up to date and says what changed.
    fn recompute(&mut self, mut work: Work, selections: &Selections, revision: u64) -> Changes {
        for number in std::mem::take(&mut work.emptied) {
            if self.profiles.forget_empty(number) {
                work.profiles.remove(&number);
            }
        }
        // An account counts only where its namespace does.
        let changed = std::mem::take(&mut work.changed_ids);
        let mut accounts = BTreeSet::new();
        for (slot, named) in self.named.iter().filter(|_| !changed.is_empty()) {
            if let Named::Account { namespace, .. } = named
                && (changed.contains(namespace) || changed.contains(&self.live(*slot).id))
            {
                accounts.insert(*slot);
            }
        }
        let supports: Vec<u32> = work.supports.keys().copied().collect();
        for slot in supports.into_iter().chain(accounts.iter().copied()) {
            let Some(entry) = self.entry(slot) else { continue };
            let visible = match entry.body {
                Body::Named => match self.named.get(&slot) {
                    Some(Named::Account { namespace, .. }) => self.namespace(*namespace).is_some(),
                    _ => true,
                },
                Body::LabelSet => true,
                Body::Endpoint { .. } | Body::Refused => false,
            };
            if accounts.contains(&slot) {
                work.supports.entry(slot).or_insert_with(|| entry.before());
                work.profiles.extend(self.profiles.referring(entry.id));
            }
            self.show(slot, visible, revision);
        }
        for number in std::mem::take(&mut work.profiles) {
            self.judge(number, selections);
            let profile = self.profiles.get(number);
            for slot in &profile.endpoints {
                work.endpoints.entry(*slot).or_insert_with(|| self.live(*slot).before());
            }
            work.referred.extend(profile.key);
        }
        // Who owns which address: the newest of those that are otherwise fine.
        let mut rivals = BTreeSet::new();
        let affected: Vec<u32> = work.endpoints.keys().copied().collect();
        for slot in &affected {
            let Some(Entry { body: Body::Endpoint { profile, .. }, bytes, .. }) = self.entry(*slot) else { continue };
            let fine = self.profiles.get(*profile).problem.is_none();
            let addresses = endpoint_of(bytes).map(|e| e.addresses).unwrap_or_default();
            let claim_of =
                |slot: u32| self.entries[slot as usize].as_ref().expect("an owner's slot is taken").claim(slot);
            let claim = claim_of(*slot);
            for address in addresses {
                match fine {
                    true => self.addresses.claim(address, claim, claim_of, &mut rivals),
                    false => self.addresses.release(address, claim, &mut rivals),
                }
            }
        }
        rivals.extend(std::mem::take(&mut work.rivals));
        for slot in rivals {
            if let Some(entry) = self.entry(slot) {
                work.endpoints.entry(slot).or_insert_with(|| entry.before());
                if let Body::Endpoint { profile, .. } = entry.body {
                    work.referred.extend(self.profiles.get(profile).key);
                }
            }
        }
        for slot in work.endpoints.keys() {
            let Some(Entry { body: Body::Endpoint { profile, .. }, bytes, .. }) = self.entry(*slot) else { continue };
            let owns_all = |e: EndpointObject| e.addresses.iter().all(|a| self.addresses.owner(*a) == Some(*slot));
            let visible = self.profiles.get(*profile).problem.is_none() && endpoint_of(bytes).is_some_and(owns_all);
            self.show(*slot, visible, revision);
        }
        for id in work.referred {
            if let Some(slot) = self.slot_of(id) {
                let entry = self.entries[slot as usize].as_mut().expect("an id's slot is taken");
                entry.touched = revision;
                work.supports.entry(slot).or_insert_with(|| entry.before());
            }
        }
        // A slot may have had an object of the other sort, and in another epoch an id may be an endpoint's.
        work.supports.retain(|slot, _| !self.is_endpoint(*slot));
        self.last_touched = revision;
        Changes { endpoints: work.endpoints, supports: work.supports }
    }

    /// Says whether an entry counts, as of a revision.
    fn show(&mut self, slot: u32, visible: bool, revision: u64) {
        let entry = self.entries[slot as usize].as_mut().expect("a slot that was looked at is taken");
        entry.visible = visible;
        entry.touched = revision;
        match visible {
            true => self.troubled.remove(&slot),
            false => self.troubled.insert(slot),
        };
    }

    fn namespace(&self, id: u64) -> Option<(&Arc<str>, &Pairs)> {
        match self.named.get(&self.slot_of(id)?)? {
            Named::Namespace { name, labels } => Some((name, labels)),
            Named::Account { .. } => None,
        }
    }

    fn account(&self, id: u64, of: u64) -> Option<(&Arc<str>, &Pairs)> {
        match self.named.get(&self.slot_of(id)?)? {
            Named::Account { namespace, name, labels } if *namespace == of => Some((name, labels)),
            _ => None,
        }
    }

    fn is_label_set(&self, id: u64) -> bool {
        let entry = self.slot_of(id).and_then(|slot| self.entry(slot));
        entry.is_some_and(|entry| matches!(entry.body, Body::LabelSet))
    }

    /// A label set as it is read from its bytes: kept read, there are as many as applications, and each takes many times the
    /// room.
    fn label_set(&self, id: u64) -> Option<Pairs> {
        let entry = self.entry(self.slot_of(id)?).filter(|entry| matches!(entry.body, Body::LabelSet))?;
        match read(&entry.bytes) {
            Ok(Object::LabelSet { labels }) => Some(labels),
            _ => None,
        }
    }
}

/// What a change still has to bring up to date.
#[derive(Debug, Default)]
struct Work {
    endpoints: BTreeMap<u32, Before>,
    supports: BTreeMap<u32, Before>,
    profiles: BTreeSet<u32>,
    /// From which an endpoint was removed, and which may have none.
    emptied: BTreeSet<u32>,
    referred: BTreeSet<u64>,
    changed_ids: HashSet<u64>,
    rivals: BTreeSet<u32>,
}

fn read(bytes: &[u8]) -> Result<Object, Refusal> {
    match object::decode_export(bytes) {
        Some(update) => update.object.map_err(Refusal::from),
        None => Err(Refusal::Malformed("not an object".to_owned())),
    }
}

fn endpoint_of(bytes: &[u8]) -> Option<EndpointObject> {
    match read(bytes) {
        Ok(Object::Endpoint(endpoint)) => Some(endpoint),
        _ => None,
    }
}

fn hash_of(entries: &[Option<Entry>], hasher: &DefaultHashBuilder, slot: u32) -> u64 {
    hasher.hash_one(entries[slot as usize].as_ref().map_or(0, |entry| entry.id))
}
