//! The exchange without sockets and clocks: what members publish goes in, what receivers must be sent comes out.
//!
//! Receivers with the same interest form a class ([`classes`]). A receiver has, per origin, the ids that are dirty, and no queue of messages: a slow one is sent the
//! newest state once. A batch is cut at one revision, so that what a receiver has is always a past state of the origin.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::model::ClusterName;
use hashbrown::HashMap;

use crate::codec::object::{self, Object};
use crate::model::{ClusterState, FederatedManifest, Federation, Lease, ManifestKind, ReportedState, digest_of};
use origin::{Changes, Origin};
use selections::Selections;

mod classes;
mod derived;
pub mod origin;
mod publish;
pub mod selections;
pub mod slots;
mod watch;

use classes::{ClassId, Classes, View};
use derived::Derived;

pub use publish::{PublishError, PublishId, Published};
pub use watch::{ReadOpening, ReadRequest, ReceiverId, ReceiverState};

/// Dirty ids that a receiver keeps for one origin before a snapshot is cheaper: 8,192 × about 12 bytes is 96 KiB.
const MAX_DIRTY: usize = 8_192;

/// Updates of a batch that are applied at once: some 25 µs each, and meanwhile the others wait.
const SLICE: usize = 1_000;

/// The exchange of one hub replica.
#[derive(Debug)]
pub struct Exchange {
    selections: Selections,
    origins: Vec<Option<Origin>>,
    origin_numbers: HashMap<ClusterName, usize>,
    classes: Classes,
    receivers: BTreeMap<ReceiverId, watch::Receiver>,
    publishers: BTreeMap<PublishId, publish::Publisher>,
    next_id: u64,
    hub: HubObjects,
    derived: Derived,
    heartbeat_ms: u64,
    ready: BTreeSet<ReceiverId>,
    reports: BTreeMap<ClusterName, ReportedState>,
    recent: RecentSnapshots,
    /// Batches that are being applied, by the origins' numbers.
    applying: BTreeMap<usize, publish::Applying>,
    /// Numbers of origins that are judged again under another grant.
    regranting: BTreeSet<usize>,
    /// Updates that are applied at once.
    slice: usize,
}

/// Snapshots that were encoded last: what one receiver of a class is sent, the class's next is about to be.
#[derive(Debug, Default)]
struct RecentSnapshots {
    kept: VecDeque<Arc<Vec<Bytes>>>,
    bytes: usize,
}

impl RecentSnapshots {
    /// Some seventy origins of a thousand endpoints.
    const MAX_BYTES: usize = 8 << 20;

    fn keep(&mut self, frames: Arc<Vec<Bytes>>) {
        let size = |frames: &[Bytes]| frames.iter().map(Bytes::len).sum::<usize>();
        self.bytes += size(&frames);
        self.kept.push_back(frames);
        while self.bytes > Self::MAX_BYTES
            && let Some(oldest) = self.kept.pop_front()
        {
            self.bytes -= size(&oldest);
        }
    }
}

/// The hub's own objects, at one revision.
#[derive(Debug, Default)]
struct HubObjects {
    loaded: bool,
    federation: Federation,
    objects: BTreeMap<u64, HubObject>,
    tombstones: VecDeque<(u64, u64)>,
    floor: u64,
    /// The digest of what is for everybody, and of what is for some cluster besides.
    common: u128,
    digests: HashMap<ClusterName, u128>,
}

#[derive(Debug, Clone)]
struct HubObject {
    bytes: Bytes,
    digest: u128,
    touched: u64,
    audience: Audience,
    /// Who it was for before it changed last: they must be sent the change.
    former: Audience,
}

/// Who is sent an object; none is everybody.
type Audience = Option<BTreeSet<ClusterName>>;

impl Default for Exchange {
    fn default() -> Self {
        Self::new()
    }
}

impl Exchange {
    pub fn new() -> Self {
        Self {
            selections: Selections::default(),
            origins: Vec::new(),
            origin_numbers: HashMap::new(),
            classes: Classes::default(),
            receivers: BTreeMap::new(),
            publishers: BTreeMap::new(),
            next_id: 1,
            hub: HubObjects::default(),
            derived: Derived::default(),
            heartbeat_ms: 0,
            ready: BTreeSet::new(),
            reports: BTreeMap::new(),
            recent: RecentSnapshots::default(),
            applying: BTreeMap::new(),
            regranting: BTreeSet::new(),
            slice: SLICE,
        }
    }

    /// How many updates of a batch are applied at once.
    pub fn set_slice(&mut self, slice: usize) {
        self.slice = slice.max(1);
    }

    /// Sent in welcomes: how often a member should send something, in milliseconds.
    pub fn set_heartbeat(&mut self, heartbeat_ms: u64) {
        self.heartbeat_ms = heartbeat_ms;
    }

    /// The receivers that may have something to be sent.
    pub fn take_ready(&mut self) -> BTreeSet<ReceiverId> {
        std::mem::take(&mut self.ready)
    }

    pub fn federation(&self) -> &Federation {
        &self.hub.federation
    }

    /// Whether an accepted cluster has reported what it enforces.
    pub fn has_reported(&self, cluster: &str) -> bool {
        self.reports.contains_key(cluster)
    }

    pub fn origin(&self, cluster: &str) -> Option<&Origin> {
        self.origins[*self.origin_numbers.get(cluster)?].as_ref()
    }

    /// Takes over a newer state of the hub's store: policies, clusters, grants, leases. Clusters that are gone are withdrawn
    /// ahead of everything.
    pub fn set_federation(&mut self, federation: Federation) {
        self.set_federation_part(federation);
        while self.regrant_more() {}
    }

    /// As [`Self::set_federation`], without waiting until what clusters publish is judged under their new grants: nothing of
    /// those is sent until [`Self::regrant_more`] has done so.
    pub fn set_federation_part(&mut self, federation: Federation) {
        if self.hub.loaded
            && federation.position.epoch == self.hub.federation.position.epoch
            && federation.position.revision < self.hub.federation.position.revision
        {
            return;
        }
        let before = &self.hub.federation.clusters;
        let gone: Vec<ClusterName> = before.keys().filter(|c| !federation.clusters.contains_key(*c)).cloned().collect();
        let mut changed = Vec::new();
        let mut regranted = Vec::new();
        for (name, state) in &federation.clusters {
            let old = before.get(name);
            if old.is_some_and(|old| old.grant_token != state.grant_token) {
                regranted.push(name.clone());
            }
            if old.is_none_or(|old| !old.same(state)) {
                changed.push(name.clone());
            }
        }
        for cluster in &gone {
            self.withdraw(cluster);
        }
        let restarted = !self.hub.loaded || federation.position.epoch != self.hub.federation.position.epoch;
        self.hub.replace(federation);
        for name in regranted {
            self.regrant(&name);
        }
        let retargeted = self.derived.follow(&self.hub.federation.manifests);
        self.federation_changed(&changed, retargeted, restarted);
    }

    fn regrant(&mut self, name: &str) {
        let Some(state) = self.hub.federation.clusters.get(name).cloned() else { return };
        let Some(number) = self.origin_numbers.get(name).copied() else { return };
        let Some(origin) = self.origins[number].as_mut() else { return };
        origin.regrant(state.grant);
        self.regranting.insert(number);
        // What it changes goes before the hub's own objects, as if it had come before them.
        for receiver in self.receivers.values_mut() {
            receiver.await_origin(number);
        }
    }

    /// How many origins are still to be judged under another grant.
    pub fn regrants(&self) -> usize {
        self.regranting.len()
    }

    /// Judges the next part of what is published under another grant; whether there is more.
    pub fn regrant_more(&mut self) -> bool {
        let Some(number) = self.regranting.first().copied() else { return false };
        if let Some(origin) = self.origins[number].as_mut() {
            let (changes, done) = origin.regrant_step(&self.selections, self.slice);
            self.notify_classes(number, &changes);
            if !done {
                return true;
            }
        }
        self.regranting.remove(&number);
        self.ready.extend(self.receivers.keys());
        !self.regranting.is_empty()
    }

    fn withdraw(&mut self, cluster: &ClusterName) {
        if let Some(number) = self.origin_numbers.remove(cluster) {
            self.origins[number] = None;
            self.applying.remove(&number);
            self.regranting.remove(&number);
            self.classes.forget_origin(number);
            for receiver in self.receivers.values_mut() {
                receiver.forget_origin(number);
            }
        }
        self.reports.remove(cluster);
        for (id, receiver) in &mut self.receivers {
            receiver.withdraw(cluster);
            self.ready.insert(*id);
        }
    }

    /// The number of an accepted cluster's origin; made when it first publishes.
    fn origin_number(&mut self, cluster: &ClusterName) -> Option<usize> {
        if let Some(number) = self.origin_numbers.get(cluster) {
            return Some(*number);
        }
        let state = self.hub.federation.clusters.get(cluster)?;
        let origin = Origin::new(cluster.clone(), state.grant.clone());
        // A number is not given again while anything may still refer to it; clusters that leave are few.
        self.origins.push(Some(origin));
        let number = self.origins.len() - 1;
        self.origin_numbers.insert(cluster.clone(), number);
        Some(number)
    }

    /// Applies the next part of an origin's batch and updates the classes.
    fn advance(&mut self, number: usize) {
        let Some(mut applying) = self.applying.remove(&number) else { return };
        let Some(origin) = self.origins[number].as_mut() else { return };
        let (first, before) = (!origin.synced, origin.position);
        let (changes, done) = origin.step(&mut applying.batch, &self.selections, self.slice);
        self.notify_classes(number, &changes);
        if !done {
            self.applying.insert(number, applying);
            return;
        }
        let position = applying.batch.position;
        let new_epoch = !first && position.epoch != before.epoch;
        for (id, receiver) in &mut self.receivers {
            receiver.origin_moved(number, position, first, new_epoch);
            self.ready.insert(*id);
        }
        self.applied(number, applying);
    }

    fn notify_classes(&mut self, number: usize, changes: &Changes) {
        let Some(origin) = self.origins[number].as_ref() else { return };
        let dirty = self.classes.update(number, origin, changes, &self.selections);
        for (id, receiver) in &mut self.receivers {
            if let Some(ids) = dirty.get(&receiver.class) {
                receiver.mark(number, ids);
                self.ready.insert(*id);
            }
        }
        if let Some(origin) = self.origins[number].as_mut() {
            origin.settle();
        }
    }

    /// Names the interest and the grants under which a state is selected; the same on every replica.
    fn view_token(&self, class: ClassId, origin: &str) -> u64 {
        let grant = self.hub.federation.clusters.get(origin).map_or(0, |state| state.grant_token);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.classes.get(class).token().to_le_bytes()).update(&grant.to_le_bytes());
        u64::from_le_bytes(first_eight(hasher.finalize().as_bytes()))
    }

    fn sees(&self, receiver: &str, origin: &str) -> bool {
        origin != receiver
            && self
                .hub
                .federation
                .clusters
                .get(origin)
                .is_some_and(|state| state.visible_to.as_ref().is_none_or(|visible| visible.contains(receiver)))
    }
}

impl HubObjects {
    /// Takes over a newer federation, and notes what it touched.
    fn replace(&mut self, federation: Federation) {
        let revision = federation.position.revision;
        if !self.loaded || federation.position.epoch != self.federation.position.epoch {
            self.floor = revision;
            self.tombstones.clear();
            self.objects.clear();
            self.common = 0;
            self.digests.clear();
        }
        // None: as it was.
        let mut made: BTreeMap<u64, Option<(Bytes, Audience)>> = BTreeMap::new();
        for (name, state) in &federation.clusters {
            let id = id_of("cluster", name);
            made.insert(
                id,
                Some((
                    object::encode(id, 0, &Object::Cluster { name: name.clone(), record: state.record() }).into(),
                    None,
                )),
            );
        }
        for ((kind, name), manifest) in &federation.manifests {
            let label = match kind {
                ManifestKind::Policy => "policy",
                ManifestKind::Tier => "tier",
                ManifestKind::NetworkSet => "network set",
            };
            let id = id_of(label, name);
            let same = |old: &Arc<FederatedManifest>| Arc::ptr_eq(old, manifest) && self.objects.contains_key(&id);
            let made_before = self.federation.manifests.get(&(*kind, name.clone())).is_some_and(same);
            let new = || (object::encode_manifest(id, *kind, name, manifest), manifest.enforcers.clone());
            made.insert(id, (!made_before).then(new));
        }
        let gone: Vec<u64> = self.objects.keys().copied().filter(|id| !made.contains_key(id)).collect();
        for id in gone {
            if let Some(object) = self.objects.remove(&id) {
                self.count(&object, false);
            }
            self.tombstones.push_back((revision, id));
        }
        while self.tombstones.len() > origin::MAX_TOMBSTONES {
            self.floor = self.tombstones.pop_front().map_or(self.floor, |(at, _)| self.floor.max(at));
        }
        for (id, new) in made {
            let Some((bytes, audience)) = new else { continue };
            let old = self.objects.get(&id);
            if old.is_some_and(|old| old.bytes == bytes && old.audience == audience) {
                continue;
            }
            let former = old.map_or(Some(BTreeSet::new()), |old| old.audience.clone());
            let object = HubObject { digest: digest_of(&bytes), bytes, touched: revision, audience, former };
            self.count(&object, true);
            if let Some(old) = self.objects.insert(id, object) {
                self.count(&old, false);
            }
        }
        self.federation = federation;
        self.loaded = true;
    }

    /// Enters an object into the digests, or takes it out.
    fn count(&mut self, object: &HubObject, enters: bool) {
        let by = if enters { object.digest } else { object.digest.wrapping_neg() };
        match &object.audience {
            None => self.common = self.common.wrapping_add(by),
            Some(names) => {
                for name in names {
                    let digest = self.digests.entry(name.clone()).or_default();
                    *digest = digest.wrapping_add(by);
                    if *digest == 0 {
                        self.digests.remove(name);
                    }
                }
            }
        }
    }

    fn digest_for(&self, cluster: &str) -> u128 {
        self.common.wrapping_add(self.digests.get(cluster).copied().unwrap_or_default())
    }
}

impl HubObject {
    fn is_for(&self, cluster: &str) -> bool {
        self.audience.as_ref().is_none_or(|names| names.contains(cluster))
    }

    fn was_for(&self, cluster: &str) -> bool {
        self.former.as_ref().is_none_or(|names| names.contains(cluster))
    }
}

impl ClusterState {
    /// Whether nothing that others are sent, or that decides what they are sent, differs.
    fn same(&self, other: &Self) -> bool {
        let all = |it: &Self| (it.grant_token, it.lease, it.federated_allow_final);
        all(self) == all(other)
            && self.labels == other.labels
            && self.cidrs == other.cidrs
            && self.visible_to == other.visible_to
    }

    fn waits_for(&self, synced: bool) -> bool {
        synced || self.lease != Lease::NeverConnected
    }
}

/// Names are unique in their kind; 64 bits of a hash are far beyond the birthday of 50,000 objects.
fn id_of(kind: &str, name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(kind.as_bytes()).update(b"/").update(name.as_bytes());
    u64::from_le_bytes(first_eight(hasher.finalize().as_bytes())).max(1)
}

fn first_eight(bytes: &[u8; 32]) -> [u8; 8] {
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    first
}
