//! The state of the exchange, and the operations that its parts share.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_policy::model::ClusterName;
use hashbrown::HashMap;

use super::classes::Classes;
use super::derived::Derived;
use super::evaluation::Evaluated;
use super::objects::HubObjects;
use super::origin::{Changes, Origin};
use super::publisher::{Applying, PublishId, Publisher};
use super::receiver::{Receiver, ReceiverId};
use super::recent::RecentSnapshots;
use super::selections::Selections;
use super::views::ClassId;
use crate::model::{Federation, Interest, ReportedState, first_bits};

/// Updates of a batch that are applied at once: some 25 µs each, during which all other streams wait.
const SLICE: usize = 1_000;

/// The exchange of one hub replica.
#[derive(Debug)]
pub struct Exchange {
    pub(super) selections: Selections,
    pub(super) origins: Vec<Option<Origin>>,
    pub(super) origin_numbers: HashMap<ClusterName, usize>,
    pub(super) classes: Classes,
    pub(super) receivers: BTreeMap<ReceiverId, Receiver>,
    pub(super) publishers: BTreeMap<PublishId, Publisher>,
    pub(super) next_id: u64,
    pub(super) hub: HubObjects,
    pub(super) derived: Derived,
    pub(super) heartbeat_ms: u64,
    pub(super) ready: BTreeSet<ReceiverId>,
    pub(super) reports: BTreeMap<ClusterName, ReportedState>,
    pub(super) recent: RecentSnapshots,
    /// Batches that are being applied, by the origins' numbers.
    pub(super) applying: BTreeMap<usize, Applying>,
    /// Numbers of origins that are judged again under another grant.
    pub(super) regranting: BTreeSet<usize>,
    /// Updates that are applied at once.
    pub(super) slice: usize,
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

    /// The interval in which a member should send a message, in milliseconds, as sent in welcomes.
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

    /// The number of an accepted cluster's origin; made when it first publishes.
    pub(super) fn origin_number(&mut self, cluster: &ClusterName) -> Option<usize> {
        if let Some(number) = self.origin_numbers.get(cluster) {
            return Some(*number);
        }
        let state = self.hub.federation.clusters.get(cluster)?;
        let origin = Origin::new(cluster.clone(), state.grant.clone());
        // Numbers are not reused: receivers and classes refer to them, and few clusters leave.
        self.origins.push(Some(origin));
        let number = self.origins.len() - 1;
        self.origin_numbers.insert(cluster.clone(), number);
        Some(number)
    }

    pub(super) fn origin_of(&mut self, cluster: &ClusterName) -> Option<&mut Origin> {
        self.origin_numbers.get(cluster).and_then(|number| self.origins[*number].as_mut())
    }

    /// Applies changes of an origin to the classes, and marks them for their receivers.
    pub(super) fn notify_classes(&mut self, number: usize, changes: &Changes) {
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

    /// The class of an interest, with one more user. It may not be built yet: see [`Self::build_class`].
    pub(super) fn acquire_class(&mut self, interest: &Arc<Interest>) -> ClassId {
        match self.classes.acquire(interest) {
            (id, false) => id,
            (id, true) => self.build_class(id),
        }
    }

    /// Goes on with a class that is not built yet. Returns the class: another one where that has the same selections.
    pub(super) fn build_class(&mut self, id: ClassId) -> ClassId {
        let built = self.classes.build(id, &mut self.selections, &mut self.origins, self.slice);
        if built != id {
            for receiver in self.receivers.values_mut() {
                receiver.replace_class(id, built);
            }
        }
        built
    }

    /// Takes over the answers of an evaluation that [`Self::next_step`] returned.
    pub fn take_evaluated(&mut self, evaluated: &Evaluated) {
        self.classes.take_evaluated(evaluated, &mut self.origins);
    }

    pub(super) fn release_class(&mut self, id: ClassId) {
        self.classes.release(id, &mut self.selections, &mut self.origins);
    }

    /// Bytes of the classes without receivers that are kept.
    pub fn idle_bytes(&self) -> usize {
        self.classes.idle_bytes()
    }

    /// Identifies the interest and the grants under which a state is selected. The same on every replica.
    pub(super) fn view_token(&self, class: ClassId, origin: &str) -> u64 {
        let grant = self.hub.federation.clusters.get(origin).map_or(0, |state| state.grant_token);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.classes.get(class).token().to_le_bytes()).update(&grant.to_le_bytes());
        first_bits(&hasher.finalize())
    }

    pub(super) fn sees(&self, receiver: &str, origin: &str) -> bool {
        origin != receiver
            && self
                .hub
                .federation
                .clusters
                .get(origin)
                .is_some_and(|state| state.visible_to.as_ref().is_none_or(|visible| visible.contains(receiver)))
    }
}
