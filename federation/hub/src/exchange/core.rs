//! The exchange without sockets and clocks: what members publish goes in, what receivers must be sent comes out.
//!
//! Receivers with the same interest form a class, which knows for each origin the objects that the interest selects and
//! their digest. A receiver has, per origin, the ids that are dirty, and no queue of messages: a slow one is sent the
//! newest state once. A batch is cut at one revision, so that what a receiver holds is always a past state of the origin.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use hashbrown::HashMap;

use super::model::{Bits, ClusterState, Federation, Interest, Lease, ManifestKind, Position, digest_of};
use super::origin::{Batch, BatchError, Changes, Origin};
use super::select::Selections;
use super::wire;

mod publish;
mod watch;

pub use publish::PublishId;
pub use watch::{ReceiverId, ReceiverState};

/// Dirty ids that a receiver keeps for one origin before a snapshot is cheaper: 8,192 × about 12 bytes is 96 KiB.
const MAX_DIRTY: usize = 8_192;

/// The exchange of one hub replica.
#[derive(Debug)]
pub struct Exchange {
    selections: Selections,
    origins: Vec<Option<Origin>>,
    origin_numbers: HashMap<ClusterName, usize>,
    classes: Vec<Option<Class>>,
    class_numbers: HashMap<Vec<u32>, usize>,
    receivers: BTreeMap<ReceiverId, watch::Receiver>,
    publishers: BTreeMap<PublishId, publish::Publisher>,
    next_id: u64,
    hub: HubObjects,
    /// Of each cluster: what the policies that it enforces can select elsewhere.
    derived: HashMap<ClusterName, Arc<Interest>>,
    ready: BTreeSet<ReceiverId>,
    realisations: BTreeMap<ClusterName, Arc<pb::Realisation>>,
}

/// The hub's own objects, at one revision.
#[derive(Debug, Default)]
struct HubObjects {
    loaded: bool,
    federation: Federation,
    objects: BTreeMap<u64, HubObject>,
    tombstones: VecDeque<(u64, u64)>,
    floor: u64,
}

#[derive(Debug, Clone)]
struct HubObject {
    bytes: Bytes,
    digest: u128,
    touched: u64,
    /// None is everybody.
    audience: Option<BTreeSet<ClusterName>>,
    /// Who it was for before it changed last: they must be told.
    former: Option<BTreeSet<ClusterName>>,
}

#[derive(Debug)]
struct Class {
    numbers: Vec<u32>,
    interest: Bits,
    /// Of the selections' canonical forms: the same on every replica.
    token: u64,
    users: u32,
    views: HashMap<usize, View>,
}

/// What a class holds of one origin.
#[derive(Debug, Default)]
struct View {
    members: Bits,
    digest: u128,
    /// The snapshot's frames, while someone is being sent them.
    snapshot: Option<Weak<Vec<Bytes>>>,
}

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
            classes: Vec::new(),
            class_numbers: HashMap::new(),
            receivers: BTreeMap::new(),
            publishers: BTreeMap::new(),
            next_id: 1,
            hub: HubObjects::default(),
            derived: HashMap::new(),
            ready: BTreeSet::new(),
            realisations: BTreeMap::new(),
        }
    }

    /// The receivers that may have something to be sent.
    pub fn take_ready(&mut self) -> BTreeSet<ReceiverId> {
        std::mem::take(&mut self.ready)
    }

    pub fn federation(&self) -> &Federation {
        &self.hub.federation
    }

    pub fn realisations(&self) -> &BTreeMap<ClusterName, Arc<pb::Realisation>> {
        &self.realisations
    }

    pub fn origin(&self, cluster: &str) -> Option<&Origin> {
        self.origins[*self.origin_numbers.get(cluster)?].as_ref()
    }

    /// Takes over a newer state of the hub's store: policies, clusters, grants, leases. Clusters that are gone are withdrawn
    /// ahead of everything.
    pub fn set_federation(&mut self, federation: Federation) {
        if self.hub.loaded
            && federation.position.epoch == self.hub.federation.position.epoch
            && federation.position.revision < self.hub.federation.position.revision
        {
            return;
        }
        let gone: Vec<ClusterName> = self.hub.federation.clusters.keys().cloned().collect();
        let gone: Vec<ClusterName> = gone.into_iter().filter(|c| !federation.clusters.contains_key(c)).collect();
        for cluster in &gone {
            self.withdraw(cluster);
        }
        let mut regranted = Vec::new();
        for (name, state) in &federation.clusters {
            let before = self.hub.federation.clusters.get(name);
            if before.is_some_and(|before| before.grant_token != state.grant_token) {
                regranted.push(name.clone());
            }
        }
        let policies_changed = self.hub.federation.manifests != federation.manifests || !self.hub.loaded;
        self.hub.replace(federation);
        for name in regranted {
            self.regrant(&name);
        }
        if policies_changed {
            self.derive();
        }
        self.federation_changed();
    }

    fn derive(&mut self) {
        let mut derived: HashMap<ClusterName, Interest> = HashMap::new();
        for ((kind, _), manifest) in &self.hub.federation.manifests {
            if *kind != ManifestKind::Policy {
                continue;
            }
            for cluster in manifest.enforcers.iter().flatten() {
                derived.entry(cluster.clone()).or_default().extend(manifest.interest.iter().cloned());
            }
        }
        self.derived = derived.into_iter().map(|(name, interest)| (name, Arc::new(interest))).collect();
    }

    fn regrant(&mut self, name: &str) {
        let Some(state) = self.hub.federation.clusters.get(name).cloned() else { return };
        let Some(number) = self.origin_numbers.get(name).copied() else { return };
        let Some(origin) = self.origins[number].as_mut() else { return };
        let changes = origin.regrant(state.grant, &self.selections);
        self.tell(number, &changes);
    }

    fn withdraw(&mut self, cluster: &ClusterName) {
        if let Some(number) = self.origin_numbers.remove(cluster) {
            self.origins[number] = None;
            for class in self.classes.iter_mut().flatten() {
                class.views.remove(&number);
            }
            for receiver in self.receivers.values_mut() {
                receiver.forget_origin(number);
            }
        }
        self.realisations.remove(cluster);
        for (id, receiver) in &mut self.receivers {
            receiver.withdraw(cluster);
            self.ready.insert(*id);
        }
    }

    /// The number of an accepted cluster's origin; made when it is heard first.
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

    /// Applies a batch and tells the classes.
    fn apply(&mut self, number: usize, batch: Batch, position: Position) -> Result<(), BatchError> {
        let Some(origin) = self.origins[number].as_mut() else { return Ok(()) };
        let first = !origin.synced;
        let new_epoch = origin.synced && position.epoch != origin.position.epoch;
        let changes = origin.apply(batch, position, &self.selections)?;
        self.tell(number, &changes);
        for (id, receiver) in &mut self.receivers {
            receiver.origin_moved(number, position, first, new_epoch);
            self.ready.insert(*id);
        }
        Ok(())
    }

    fn tell(&mut self, number: usize, changes: &Changes) {
        let Some(origin) = self.origins[number].as_ref() else { return };
        let mut dirty: HashMap<usize, Vec<u64>> = HashMap::new();
        for (class_number, class) in self.classes.iter_mut().enumerate() {
            let Some(class) = class else { continue };
            let view = class.views.entry(number).or_default();
            let ids = view.update(origin, changes, &class.interest, &self.selections);
            if !ids.is_empty() {
                view.snapshot = None;
                dirty.insert(class_number, ids);
            }
        }
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

    /// The class of an interest, with one more user.
    fn acquire_class(&mut self, interest: &Interest) -> usize {
        let mut fresh = Vec::new();
        let mut numbers: Vec<u32> = interest
            .iter()
            .map(|wanted| {
                let (number, new) = self.selections.acquire(wanted);
                if new {
                    fresh.push(number);
                }
                number
            })
            .collect();
        numbers.sort_unstable();
        for number in fresh {
            for origin in self.origins.iter_mut().flatten() {
                origin.select(number, &self.selections);
            }
        }
        if let Some(at) = self.class_numbers.get(&numbers).copied()
            && let Some(class) = self.classes[at].as_mut()
        {
            class.users += 1;
            // The class holds its selections once.
            for number in numbers {
                self.selections.release(number);
            }
            return at;
        }
        let mut bits = Bits::default();
        for number in &numbers {
            bits.set(*number, true);
        }
        let mut hasher = blake3::Hasher::new();
        for wanted in interest {
            hasher.update(
                format!("{:?}\n{}\n{:?}\n", wanted.clusters, wanted.selector.canonical, wanted.port_names).as_bytes(),
            );
        }
        let mut class = Class {
            numbers: numbers.clone(),
            interest: bits,
            token: u64::from_le_bytes(first_eight(hasher.finalize().as_bytes())),
            users: 1,
            views: HashMap::new(),
        };
        for (at, origin) in self.origins.iter().enumerate() {
            if let Some(origin) = origin {
                class.views.insert(at, View::of(origin, &class.interest, &self.selections));
            }
        }
        let at = self.classes.iter().position(Option::is_none).unwrap_or_else(|| {
            self.classes.push(None);
            self.classes.len() - 1
        });
        self.classes[at] = Some(class);
        self.class_numbers.insert(numbers, at);
        at
    }

    fn release_class(&mut self, at: usize) {
        let Some(class) = self.classes[at].as_mut() else { return };
        class.users -= 1;
        if class.users > 0 {
            return;
        }
        let Some(class) = self.classes[at].take() else { return };
        self.class_numbers.remove(&class.numbers);
        for number in class.numbers {
            if self.selections.release(number) {
                for origin in self.origins.iter_mut().flatten() {
                    origin.unselect(number);
                }
            }
        }
    }

    fn class(&self, at: usize) -> &Class {
        self.classes[at].as_ref().expect("a receiver's class is there")
    }

    /// Names the interest and the grants under which a state is selected; the same on every replica.
    fn view_token(&self, class: usize, origin: &str) -> u64 {
        let grant = self.hub.federation.clusters.get(origin).map_or(0, |state| state.grant_token);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.class(class).token.to_le_bytes()).update(&grant.to_le_bytes());
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

impl View {
    /// From nothing.
    fn of(origin: &Origin, interest: &Bits, selections: &Selections) -> Self {
        let mut view = Self::default();
        for (slot, entry) in origin.slots() {
            if origin.is_endpoint(slot) && origin.endpoint_selected(slot, interest, selections) {
                view.members.set(slot, true);
                view.digest = view.digest.wrapping_add(entry.digest);
            }
        }
        for slot in view.members.clone().iter() {
            for support in origin.supports_of(slot) {
                if let Some(entry) = origin.entry(support)
                    && !view.members.set(support, true)
                {
                    view.digest = view.digest.wrapping_add(entry.digest);
                }
            }
        }
        view
    }

    /// After a change of the origin; returns the ids that a receiver must be told of.
    fn update(&mut self, origin: &Origin, changes: &Changes, interest: &Bits, selections: &Selections) -> Vec<u64> {
        let mut dirty = Vec::new();
        let mut supports = BTreeMap::new();
        for (slot, before) in &changes.endpoints {
            let now = origin.endpoint_selected(*slot, interest, selections);
            let was = self.members.set(*slot, now);
            self.account(origin, *slot, *before, was, now, &mut dirty);
        }
        supports.extend(changes.supports.iter().map(|(slot, before)| (*slot, *before)));
        for slot in &changes.referred {
            if let Some(entry) = origin.entry(*slot) {
                let same = super::origin::Before { id: entry.id, digest: entry.digest };
                supports.entry(*slot).or_insert(same);
            }
        }
        for (slot, before) in supports {
            let now = origin.support_selected(slot, &self.members);
            let was = self.members.set(slot, now);
            self.account(origin, slot, before, was, now, &mut dirty);
        }
        dirty
    }

    fn account(
        &mut self,
        origin: &Origin,
        slot: u32,
        before: super::origin::Before,
        was: bool,
        now: bool,
        dirty: &mut Vec<u64>,
    ) {
        let after = origin.entry(slot).map_or((before.id, 0), |entry| (entry.id, entry.digest));
        if was {
            self.digest = self.digest.wrapping_sub(before.digest);
        }
        if now {
            self.digest = self.digest.wrapping_add(after.1);
        }
        if was != now || (now && before.digest != after.1) {
            dirty.push(before.id);
        }
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
        }
        let mut made: BTreeMap<u64, (Bytes, Option<BTreeSet<ClusterName>>)> = BTreeMap::new();
        for (name, state) in &federation.clusters {
            let id = id_of("cluster", name);
            made.insert(id, (wire::cluster_update(id, name, state), None));
        }
        for ((kind, name), manifest) in &federation.manifests {
            let label = match kind {
                ManifestKind::Policy => "policy",
                ManifestKind::Tier => "tier",
                ManifestKind::NetworkSet => "network set",
            };
            let id = id_of(label, name);
            made.insert(id, (wire::manifest_update(id, *kind, name, manifest), manifest.enforcers.clone()));
        }
        let gone: Vec<u64> = self.objects.keys().copied().filter(|id| !made.contains_key(id)).collect();
        for id in gone {
            self.objects.remove(&id);
            self.tombstones.push_back((revision, id));
        }
        while self.tombstones.len() > super::origin::MAX_TOMBSTONES {
            self.floor = self.tombstones.pop_front().map_or(self.floor, |(at, _)| self.floor.max(at));
        }
        for (id, (bytes, audience)) in made {
            let old = self.objects.get(&id);
            if old.is_some_and(|old| old.bytes == bytes && old.audience == audience) {
                continue;
            }
            let former = old.map_or(Some(BTreeSet::new()), |old| old.audience.clone());
            let object = HubObject { digest: digest_of(&bytes), bytes, touched: revision, audience, former };
            self.objects.insert(id, object);
        }
        self.federation = federation;
        self.loaded = true;
    }

    fn digest_for(&self, cluster: &str) -> u128 {
        let objects = self.objects.values().filter(|object| object.is_for(cluster));
        objects.fold(0, |sum, object| sum.wrapping_add(object.digest))
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
    fn waits_for(&self, synced: bool) -> bool {
        synced || self.lease != Lease::NeverHeard
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
