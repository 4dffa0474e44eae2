//! What one cluster publishes, as this hub has it.
//!
//! The accepted objects depend on the published objects and the grants, not on their order: replicas that have the same objects
//! accept the same. Refused objects are kept as well (within limits), so that a wider grant or the removal of a rival brings them
//! back. Endpoints with the same namespace, account and label set form a *profile*: selections are judged once per profile, and
//! per endpoint only where they name a label of its own or a port, or where its endpoints have too many keys of their own labels.
//!
//! Each entry has the revision that last *touched* it, by itself or by what it refers to; resuming finds the entries that were
//! touched later. That is a scan of the origin's entries, skipped when nothing was touched since, and costs no memory per
//! endpoint. Removed ids are in a bounded list; below its floor a receiver needs a snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_policy::inventory::LabelGrant;
use hanse_policy::model::ClusterName;

use crate::codec::object::Object;
use crate::model::{Grant, Pairs, Position, Refusal};

mod addresses;
mod apply;
mod batch;
mod granted;
mod history;
mod judging;
mod kept;
mod named;
mod objects;
mod profiles;
mod questions;
mod queue;
mod refusals;
mod update;

use addresses::Addresses;
pub use batch::{Applying, Batch, BatchError, StagedLimits};
use granted::Granted;
use history::History;
pub use history::MAX_TOMBSTONES;
pub use judging::JudgingCursor;
use kept::{Kept, Overflow};
use named::Named;
pub use objects::{Before, Entry};
use objects::{Body, Objects, read};
use profiles::Profiles;
pub use questions::{EndpointQuestion, Judged, ProfileQuestion, Selected};
use queue::Queue;

/// What a batch changed, for those who follow the origin.
#[derive(Debug, Default)]
pub struct Changes {
    /// By slot, with the object before; a slot is given to another object only after [`Origin::settle`].
    pub endpoints: BTreeMap<u32, Before>,
    /// Objects that endpoints refer to, also those whose endpoints changed.
    pub supports: BTreeMap<u32, Before>,
}

#[derive(Debug)]
pub struct Origin {
    pub name: ClusterName,
    pub position: Position,
    /// It has published to this replica since the replica started.
    pub synced: bool,
    /// Changes with everything that an answer to a question depends on.
    pub version: u64,
    /// The revision of the batch that is being applied.
    applying: Option<u64>,
    /// Everything is judged again under another grant.
    regranting: Option<Regranting>,
    granted: Granted,
    objects: Objects,
    named: Named,
    profiles: Profiles,
    queue: Queue,
    addresses: Addresses,
    /// By slot.
    refused: BTreeMap<u32, Refusal>,
    /// Slots of objects that are not visible.
    unused: BTreeSet<u32>,
    kept: Kept,
    overflow: Overflow,
    history: History,
}

/// How far everything was judged again: slots, then profiles, once they are queued.
#[derive(Debug, Clone, Copy, Default)]
struct Regranting {
    slot: u32,
    is_queued: bool,
}

impl Origin {
    pub fn new(name: ClusterName, grant: Arc<dyn Grant>) -> Self {
        Self {
            name,
            position: Position::default(),
            synced: false,
            version: 0,
            applying: None,
            regranting: None,
            granted: Granted::new(grant),
            objects: Objects::default(),
            named: Named::default(),
            profiles: Profiles::default(),
            queue: Queue::default(),
            addresses: Addresses::default(),
            refused: BTreeMap::new(),
            unused: BTreeSet::new(),
            kept: Kept::default(),
            overflow: Overflow::default(),
            history: History::default(),
        }
    }

    pub fn entry(&self, slot: u32) -> Option<&Entry> {
        self.objects.get(slot)
    }

    /// One above the highest slot that is in use.
    pub fn slot_bound(&self) -> u32 {
        self.objects.bound()
    }

    pub fn slot_of(&self, id: u64) -> Option<u32> {
        self.objects.slot_of(id)
    }

    /// The digest of everything that is published and kept.
    pub fn digest_published(&self) -> u128 {
        self.kept.digest
    }

    pub fn endpoint_count(&self) -> usize {
        self.kept.endpoints
    }

    /// One above the highest number of a profile, which is judged at once: there is one for each combination of namespace, account
    /// and label set.
    pub fn profile_bound(&self) -> u32 {
        self.profiles.bound()
    }

    /// The number of keys of endpoints' own labels that are judged, of profiles that do not have too many.
    pub fn own_key_count(&self) -> usize {
        self.profiles.iter().map(|(_, profile)| profile.own_keys.few().len()).sum()
    }

    /// Whether some published object is not kept: because of a limit, or because it cannot be read.
    pub fn is_incomplete(&self) -> bool {
        !self.overflow.refused.is_empty() || self.overflow.unreadable > 0
    }

    /// Whether a snapshot should be requested: objects that exceeded a limit may fit now. It counts as requested then.
    pub fn requests_snapshot(&mut self) -> bool {
        let grant = &*self.granted.grant;
        self.overflow.requests_snapshot(self.kept.room(grant), grant)
    }

    /// A snapshot that was requested on an earlier stream may never come.
    pub fn publisher_opens(&mut self) {
        self.overflow.requested = None;
    }

    /// Whether a resuming receiver's revision is still within the remembered removals.
    pub fn resumable_from(&self, revision: u64) -> bool {
        revision >= self.history.floor && revision <= self.position.revision
    }

    /// A receiver that resumes from an earlier revision may soon have to be sent a snapshot.
    pub fn aging_revision(&self) -> u64 {
        self.history.half()
    }

    /// Slots touched, and ids removed, after a revision.
    pub fn since(&self, revision: u64) -> (Vec<u32>, Vec<u64>) {
        if self.history.last_touched <= revision {
            return (Vec::new(), Vec::new());
        }
        let touched = self.objects.iter().filter(|(_, entry)| entry.touched > revision).map(|(slot, _)| slot).collect();
        (touched, self.history.removed_since(revision))
    }

    /// Whether the origin is between two states of its publisher, or two grants, so that nothing of it is sent.
    pub fn is_busy(&self) -> bool {
        self.applying.is_some() || self.regranting.is_some()
    }

    /// Frees the slots of removed objects, once the followers know.
    pub fn settle(&mut self) {
        self.objects.settle();
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

    pub fn label_grant(&self) -> &LabelGrant {
        &self.granted.labels
    }

    fn namespace(&self, id: u64) -> Option<(&Arc<str>, &Pairs)> {
        self.named.namespace(self.slot_of(id)?)
    }

    fn account(&self, id: u64, namespace: u64) -> Option<(&Arc<str>, &Pairs)> {
        self.named.account(self.slot_of(id)?, namespace)
    }

    fn is_label_set(&self, id: u64) -> bool {
        let entry = self.slot_of(id).and_then(|slot| self.entry(slot));
        entry.is_some_and(|entry| matches!(entry.body, Body::LabelSet))
    }

    /// A label set, read from its bytes: there are as many as applications, and a decoded one takes many times the memory.
    fn label_set(&self, id: u64) -> Option<Pairs> {
        let entry = self.entry(self.slot_of(id)?).filter(|entry| matches!(entry.body, Body::LabelSet))?;
        match read(&entry.bytes) {
            Ok(Object::LabelSet { labels }) => Some(labels),
            _ => None,
        }
    }
}
