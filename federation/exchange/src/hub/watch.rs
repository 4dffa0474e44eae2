//! One watching stream: what its receiver lacks, and the order in which it is sent.
//!
//! Withdrawals come first, also within a batch; then the rest of the batch that is being sent; then a change of interest, what
//! origins changed before the hub's own objects did, those, and the origins in turn. The interest shrinks only when everything that needed the larger one is out of
//! force at the receiver.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Weak};

use crate::interest;
use bytes::Bytes;
use hanse_policy::model::ClusterName;
use hashbrown::HashMap;

mod opening;

use opening::{Held, Opening};
pub use opening::{ReadOpening, ReadRequest};

use super::{Exchange, HubObjects, MAX_DIRTY, Origin};
use crate::codec::frame;
use crate::limits::PROTOCOL;
use crate::message::{InterestChange, RefusedParts, WatchOpen, WatchRequest, WatchResponse as Response};
use crate::model::{Interest, Lease, Position, Wanted};

/// How far a receiver's position may fall behind while nothing of interest to it changes: half of the removals remembered.
const MAX_LAG: u64 = super::origin::MAX_TOMBSTONES as u64 / 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReceiverId(u64);

/// Why a watching stream is closed.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error("{0}")]
    Protocol(String),
    #[error("protocol version {0} is not known here")]
    Version(u32),
    #[error("cluster is not accepted")]
    NotAccepted,
}

/// A receiver for status.
#[derive(Debug, Clone)]
pub struct ReceiverState {
    pub cluster: ClusterName,
    pub interest: u64,
    pub interest_in_force: u64,
    pub in_force: Position,
}

#[derive(Debug)]
pub(super) struct Receiver {
    cluster: ClusterName,
    open: Option<Box<Opening>>,
    pub(super) class: usize,
    /// The class of the interest that the receiver came with, while anything resumes from it.
    held_class: Option<usize>,
    interest: Arc<Interest>,
    own: Interest,
    /// What it should be sent: of its policies and its own wishes.
    target: Arc<Interest>,
    number: u64,
    hub: HubCursor,
    cursors: Cursors,
    /// Origins whose changes go before the hub's own objects: they were here when those changed, and a policy comes with all
    /// that it selects.
    ahead: BTreeSet<usize>,
    /// Origins that may have something to be sent.
    pending: BTreeSet<usize>,
    /// Origins whose completeness for the present interest is still to be told.
    due: BTreeSet<ClusterName>,
    urgent: VecDeque<Response>,
    /// What belongs to no batch, in order.
    notices: VecDeque<Response>,
    flight: VecDeque<Response>,
    flight_origin: Option<ClusterName>,
    /// Keeps a shared snapshot while it is sent.
    _snapshot: Option<Arc<Vec<Bytes>>>,
    acked: (u64, Position),
    /// What it named as its interest was not read as it was written: it is told the whole of the next one.
    interest_widened: bool,
    /// What was not taken of its opening, and of its own interest.
    refused: [RefusedParts; 2],
}

#[derive(Debug, Default)]
struct HubCursor {
    snapshot: bool,
    /// The first batch of the stream is due: it goes before any origin's, as it takes back what waits at the receiver and is
    /// not covered by the present interest.
    first: bool,
    dirty: BTreeSet<u64>,
    sent: Position,
}

#[derive(Debug)]
struct Cursor {
    wants: Wants,
    dirty: BTreeSet<u64>,
    sent: u64,
    /// The receiver holds something of it.
    shown: bool,
    /// An empty batch is due, to move its position.
    nudge: bool,
}

/// Cursors by the origins' numbers. There is one for each receiver and origin, so they lie side by side.
#[derive(Debug, Default)]
struct Cursors(Vec<Option<Cursor>>);

impl Cursors {
    fn get_mut(&mut self, number: usize) -> Option<&mut Cursor> {
        self.0.get_mut(number)?.as_mut()
    }

    fn entry(&mut self, number: usize) -> &mut Cursor {
        if self.0.len() <= number {
            self.0.resize_with(number + 1, || None);
        }
        self.0[number].get_or_insert_default()
    }

    fn remove(&mut self, number: usize) {
        if let Some(cursor) = self.0.get_mut(number) {
            *cursor = None;
        }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &Cursor)> {
        self.0.iter().enumerate().filter_map(|(number, cursor)| Some((number, cursor.as_ref()?)))
    }

    fn numbers(&self) -> impl Iterator<Item = usize> {
        self.iter().map(|(number, _)| number)
    }
}

#[derive(Debug)]
enum Wants {
    Changes,
    Snapshot,
    Resume(Box<Held>),
}

impl Default for Cursor {
    fn default() -> Self {
        Self { wants: Wants::Snapshot, dirty: BTreeSet::new(), sent: 0, shown: false, nudge: false }
    }
}

impl Receiver {
    pub(super) fn forget_origin(&mut self, number: usize) {
        self.cursors.remove(number);
        self.pending.remove(&number);
        self.ahead.remove(&number);
    }

    pub(super) fn withdraw(&mut self, cluster: &ClusterName) {
        if *cluster == self.cluster {
            return;
        }
        if self.flight_origin.as_ref() == Some(cluster) {
            self.flight.clear();
            self.flight_origin = None;
        }
        self.due.remove(cluster);
        // The withdrawal overtakes them.
        for notice in &mut self.notices {
            if let Response::Interest(interest) = notice {
                interest.origins.retain(|origin| origin != cluster);
            }
        }
        self.urgent.push_back(Response::Withdrawn { cluster: cluster.clone() });
    }

    pub(super) fn origin_moved(&mut self, number: usize, position: Position, first: bool, new_epoch: bool) {
        if self.open.is_some() {
            return;
        }
        let cursor = self.cursors.entry(number);
        if new_epoch {
            cursor.wants = Wants::Snapshot;
            cursor.dirty.clear();
        }
        cursor.nudge |= position.revision > cursor.sent.saturating_add(MAX_LAG);
        if first || new_epoch || cursor.nudge || matches!(cursor.wants, Wants::Resume(_)) {
            self.pending.insert(number);
        }
    }

    /// Something of an origin is about to change.
    pub(super) fn await_origin(&mut self, number: usize) {
        if self.cursors.get_mut(number).is_some() {
            self.pending.insert(number);
        }
    }

    pub(super) fn mark(&mut self, number: usize, ids: &[u64]) {
        let Some(cursor) = self.cursors.get_mut(number) else { return };
        if matches!(cursor.wants, Wants::Changes) {
            if ids.len() <= MAX_DIRTY {
                cursor.dirty.extend(ids);
            }
            if cursor.dirty.len().max(ids.len()) > MAX_DIRTY {
                cursor.dirty.clear();
                cursor.wants = Wants::Snapshot;
            }
        }
        self.pending.insert(number);
    }
}

impl Exchange {
    /// A cluster opened a watching stream with this first message.
    ///
    /// # Errors
    /// When the message does not speak the protocol, or the cluster is not accepted.
    pub fn watch_open(&mut self, cluster: ClusterName, open: WatchOpen) -> Result<ReceiverId, WatchError> {
        self.watch_opened(cluster, ReadOpening::of(open))
    }

    /// As [`Self::watch_open`], of what was read before.
    ///
    /// # Errors
    /// As [`Self::watch_open`].
    pub fn watch_opened(&mut self, cluster: ClusterName, open: ReadOpening) -> Result<ReceiverId, WatchError> {
        let ReadOpening { protocol, opening, own, interest_widened, refused } = open;
        if protocol != PROTOCOL {
            return Err(WatchError::Version(protocol));
        }
        if self.hub.loaded && !self.hub.federation.clusters.contains_key(&cluster) {
            return Err(WatchError::NotAccepted);
        }
        let now = self.hub.federation.position;
        if self.hub.loaded && opening.hub.is_some_and(|held| held.epoch == now.epoch && held.revision > now.revision) {
            let held = opening.hub.map_or(0, |held| held.revision);
            tracing::error!(
                %cluster, held, have = now.revision,
                "a member holds a newer state of the hub than the hub: where its files were restored, start it with --restored"
            );
        }
        let nothing = Arc::new(Interest::new());
        let class = self.acquire_class(&nothing);
        let id = ReceiverId(self.next_id);
        self.next_id += 1;
        let receiver = Receiver {
            cluster,
            open: Some(Box::new(opening)),
            class,
            held_class: None,
            interest: Arc::clone(&nothing),
            own,
            target: nothing,
            number: 0,
            hub: HubCursor::default(),
            cursors: Cursors::default(),
            ahead: BTreeSet::new(),
            pending: BTreeSet::new(),
            due: BTreeSet::new(),
            urgent: VecDeque::new(),
            notices: VecDeque::new(),
            flight: VecDeque::new(),
            flight_origin: None,
            _snapshot: None,
            acked: (0, Position::default()),
            interest_widened,
            refused,
        };
        self.receivers.insert(id, receiver);
        self.ready.insert(id);
        Ok(id)
    }

    pub fn watch_close(&mut self, id: ReceiverId) {
        if let Some(receiver) = self.receivers.remove(&id) {
            self.release_class(receiver.class);
            if let Some(class) = receiver.held_class {
                self.release_class(class);
            }
        }
        self.ready.remove(&id);
    }

    /// Takes a later message of the receiver.
    ///
    /// # Errors
    /// When it does not speak the protocol.
    pub fn watch(&mut self, id: ReceiverId, request: WatchRequest) -> Result<(), WatchError> {
        self.watch_read(id, ReadRequest::of(request))
    }

    /// As [`Self::watch`], of what was read before.
    ///
    /// # Errors
    /// As [`Self::watch`].
    pub fn watch_read(&mut self, id: ReceiverId, request: ReadRequest) -> Result<(), WatchError> {
        let Some(receiver) = self.receivers.get_mut(&id) else { return Ok(()) };
        match request {
            ReadRequest::Nothing => return Ok(()),
            ReadRequest::Open => return Err(WatchError::Protocol("open comes once".to_owned())),
            ReadRequest::Own(own, refused) => {
                receiver.own = own;
                if receiver.refused[1] != refused {
                    receiver.refused[1] = refused;
                    if receiver.open.is_none() {
                        receiver.tell_refused();
                    }
                }
                self.aim(id);
            }
            ReadRequest::InForce { interest, hub } => receiver.acked = (interest, hub),
            ReadRequest::Mismatch { origin: None } => receiver.hub.snapshot = true,
            ReadRequest::Mismatch { origin: Some(origin) } => {
                if let Some(number) = self.origin_numbers.get(&origin)
                    && let Some(cursor) = receiver.cursors.get_mut(*number)
                {
                    cursor.wants = Wants::Snapshot;
                    cursor.dirty.clear();
                    receiver.pending.insert(*number);
                }
            }
        }
        self.retarget(id, &mut Unions::default());
        self.ready.insert(id);
        Ok(())
    }

    pub fn receivers(&self) -> Vec<ReceiverState> {
        let state = |receiver: &Receiver| ReceiverState {
            cluster: receiver.cluster.clone(),
            interest: receiver.number,
            interest_in_force: receiver.acked.0,
            in_force: receiver.acked.1,
        };
        self.receivers.values().map(state).collect()
    }

    /// The digest of what a receiver should hold of an origin now, once it has been sent all of it.
    pub fn expected_digest(&self, id: ReceiverId, origin: &str) -> Option<u128> {
        let receiver = self.receivers.get(&id)?;
        if origin.is_empty() {
            return Some(self.hub.digest_for(&receiver.cluster));
        }
        if !self.sees(&receiver.cluster, origin) {
            return Some(0);
        }
        let number = self.origin_numbers.get(origin)?;
        self.origins[*number].as_ref().filter(|origin| origin.synced && !origin.is_busy())?;
        Some(self.class(receiver.class).views.get(*number).map_or(0, |view| view.digest))
    }

    /// Whether what a cluster last said it holds is what it should hold, of the hub's own objects and of each origin; none
    /// while that is not known: it has not said, or does not watch here.
    pub fn digests_equal(&self, cluster: &str) -> Option<bool> {
        // One that was not taken names no origin.
        let reported = self.reports.get(cluster).filter(|reported| reported.hub.is_some())?;
        // The newest, where a renewed certificate has opened another one.
        let mut receivers = self.receivers.iter().rev();
        let (id, _) = receivers.find(|(_, receiver)| *receiver.cluster == *cluster && receiver.open.is_none())?;
        // Of an origin that it does not name it has nothing. An earlier version does not name the hub's own objects.
        let named = reported.origins.keys().map(|name| &**name);
        let origins = named.chain(self.hub.federation.clusters.keys().map(|name| &**name));
        let equal = |origin: &str| {
            let expected = self.expected_digest(*id, origin);
            // An origin that has not published yet is not known here, so nothing is said of it.
            expected.is_none_or(|expected| reported.origins.get(origin).unwrap_or(&Some(0)) == &Some(expected))
        };
        let mut origins = origins.filter(|origin| *origin != cluster);
        Some(origins.all(equal))
    }

    /// The revision of the hub that a cluster holds and that this hub has not reached, so that its stream waits.
    pub fn ahead_of_hub(&self, cluster: &str) -> Option<u64> {
        let now = self.hub.federation.position;
        let of_streams = self.receivers.values().filter(|receiver| *receiver.cluster == *cluster);
        let of_streams = of_streams.filter_map(|receiver| receiver.open.as_ref()?.hub);
        let reported = self.reports.get(cluster);
        let positions = reported.into_iter().flat_map(|reported| [reported.hub, reported.received]).flatten();
        let ahead = of_streams.chain(positions);
        // What a node says is not heard here: one node must not make its cluster doubt the hub.
        let ahead = ahead.filter(|at| at.epoch == now.epoch).map(|at| at.revision);
        ahead.max().filter(|at| self.hub.loaded && *at > now.revision)
    }

    /// The next message for a receiver; none when there is nothing to say now.
    pub fn next(&mut self, id: ReceiverId) -> Option<Response> {
        loop {
            let receiver = self.receivers.get_mut(&id)?;
            let message = receiver.urgent.pop_front().or_else(|| receiver.flight.pop_front());
            if let Some(message) = message {
                return Some(message);
            }
            receiver.flight_origin = None;
            receiver._snapshot = None;
            if receiver.open.is_some() {
                if !self.start(id) {
                    return None;
                }
                continue;
            }
            if let Some(message) = receiver.notices.pop_front() {
                return Some(message);
            }
            if receiver.hub.first && self.has_news(id) {
                // Origins were heard since the interest was told: the policies of this batch wait for them as well.
                let interest = Arc::clone(&self.receivers.get(&id)?.interest);
                self.switch(id, interest);
                continue;
            }
            let receiver = self.receivers.get_mut(&id)?;
            // A change that says nothing to this receiver moves its position all the same, in an empty batch.
            let moved = receiver.hub.sent != self.hub.federation.position;
            if receiver.hub.snapshot || !receiver.hub.dirty.is_empty() || moved {
                let first = receiver.ahead.first().filter(|_| !receiver.hub.first);
                if first.is_some_and(|number| is_busy(&self.origins, *number) && receiver.pending.contains(number)) {
                    // A policy comes after what it selects of that.
                    return None;
                }
                match receiver.ahead.pop_first().filter(|_| !receiver.hub.first) {
                    Some(number) if receiver.pending.remove(&number) => self.fill_origin(id, number),
                    Some(_) => {}
                    None => receiver.fill_hub(&self.hub),
                }
                continue;
            }
            // What is between two states is sent when it is at the next.
            let number = receiver.pending.iter().copied().find(|number| !is_busy(&self.origins, *number))?;
            receiver.pending.remove(&number);
            self.fill_origin(id, number);
        }
    }

    /// Begins to serve a receiver, once the hub's state is not older than what it holds.
    fn start(&mut self, id: ReceiverId) -> bool {
        let Some(receiver) = self.receivers.get_mut(&id) else { return false };
        let now = self.hub.federation.position;
        let behind = |held: Position| held.epoch == now.epoch && held.revision > now.revision;
        if !self.hub.loaded || receiver.open.as_ref().is_none_or(|open| open.hub.is_some_and(behind)) {
            return false;
        }
        let Some(open) = receiver.open.take() else { return false };
        let cluster = receiver.cluster.clone();
        let heartbeat_ms = self.heartbeat_ms;
        receiver.notices.push_back(Response::Welcome { heartbeat_ms });
        if receiver.refused.iter().any(|refused| refused.total > 0) {
            receiver.tell_refused();
        }
        let hub = &mut receiver.hub;
        let digest = self.hub.digest_for(&cluster);
        match open.hub {
            Some(held) if held.epoch == now.epoch && open.hub_digest == Some(digest) => hub.sent = held,
            Some(held) if held.epoch == now.epoch && held.revision >= self.hub.floor => {
                hub.dirty = self.hub.since(held.revision).collect();
                hub.sent = held;
                hub.snapshot = hub.dirty.is_empty();
            }
            _ => hub.snapshot = true,
        }
        hub.first = hub.snapshot || !hub.dirty.is_empty();
        receiver.interest = Arc::clone(&open.interest);
        for origin in open.held.keys() {
            if !self.hub.federation.clusters.contains_key(origin) {
                receiver.urgent.push_back(Response::Withdrawn { cluster: origin.clone() });
            }
        }
        self.aim(id);
        let target = self.receivers.get(&id).map(|receiver| Arc::clone(&receiver.target)).unwrap_or_default();
        let interest = Unions::default().of(&open.interest, &target);
        let held_class = self.acquire_class(&open.interest);
        let origins: Vec<ClusterName> = self.hub.federation.clusters.keys().cloned().collect();
        let mut cursors = Cursors::default();
        for name in origins {
            let Some(number) = self.origin_number(&name).filter(|_| name != cluster) else { continue };
            let held = open.held.get(&name).copied();
            let wants = held.map_or(Wants::Snapshot, |held| Wants::Resume(Box::new(held)));
            *cursors.entry(number) = Cursor { wants, shown: held.is_some(), ..Cursor::default() };
        }
        if let Some(receiver) = self.receivers.get_mut(&id) {
            receiver.held_class = Some(held_class);
            receiver.pending = cursors.numbers().collect();
            receiver.cursors = cursors;
        }
        self.switch(id, interest);
        true
    }

    /// Whether an origin can be sent that the receiver holds nothing newest of, and does not wait for.
    fn has_news(&self, id: ReceiverId) -> bool {
        let Some(receiver) = self.receivers.get(&id) else { return false };
        let is_news = |(number, cursor): (usize, &Cursor)| {
            self.origins[number].as_ref().is_some_and(|origin| {
                origin.synced
                    && !matches!(cursor.wants, Wants::Changes)
                    && !receiver.due.contains(&origin.name)
                    && self.sees(&receiver.cluster, &origin.name)
            })
        };
        receiver.cursors.iter().any(is_news)
    }

    /// Brings up to date what a receiver should be sent.
    fn aim(&mut self, id: ReceiverId) {
        let Some(receiver) = self.receivers.get_mut(&id) else { return };
        let derived = self.derived.of(&receiver.cluster);
        receiver.target = match receiver.own.is_subset(&derived) {
            true => derived,
            false => Arc::new(derived.union(&receiver.own).cloned().collect()),
        };
    }

    /// Widens a receiver's interest when it lacks something, and narrows it when nothing in force needs the rest.
    fn retarget(&mut self, id: ReceiverId, unions: &mut Unions) {
        let Some(receiver) = self.receivers.get_mut(&id).filter(|receiver| receiver.open.is_none()) else { return };
        let (target, interest) = (Arc::clone(&receiver.target), Arc::clone(&receiver.interest));
        if Arc::ptr_eq(&target, &interest) {
            return;
        }
        let rests = receiver.acked == (receiver.number, receiver.hub.sent)
            && !receiver.hub.snapshot
            && receiver.hub.dirty.is_empty();
        if !covers(&interest, &target) {
            self.switch(id, unions.of(&interest, &target));
        } else if target == interest {
            receiver.interest = target;
        } else if rests {
            self.switch(id, target);
        }
    }

    /// Gives a receiver its next interest.
    fn switch(&mut self, id: ReceiverId, interest: Arc<Interest>) {
        let new = self.acquire_class(&interest);
        let Some(receiver) = self.receivers.get(&id) else { return };
        let (cluster, old) = (receiver.cluster.clone(), receiver.class);
        let mut changed: Vec<(usize, Vec<u64>)> = Vec::new();
        for (number, cursor) in receiver.cursors.iter() {
            let Some(origin) = self.origins[number].as_ref() else { continue };
            if matches!(cursor.wants, Wants::Changes) {
                changed.push((number, differences(self, origin, number, old, new)));
            }
        }
        let due: BTreeSet<ClusterName> = self
            .hub
            .federation
            .clusters
            .iter()
            .filter(|(name, state)| {
                self.sees(&cluster, name) && state.waits_for(self.origin(name).is_some_and(|origin| origin.synced))
            })
            .map(|(name, _)| name.clone())
            .collect();
        let numbers: Vec<usize> = due.iter().filter_map(|name| self.origin_number(name)).collect();
        if let Some(receiver) = self.receivers.get_mut(&id) {
            receiver.number += 1;
            let whole = std::mem::take(&mut receiver.interest_widened);
            let before = if whole { Arc::default() } else { Arc::clone(&receiver.interest) };
            let notice = InterestChange {
                number: receiver.number,
                added: interest.difference(&before).map(|wanted| (&**wanted).into()).collect(),
                removed: before.difference(&interest).map(|wanted| (&**wanted).into()).collect(),
                origins: due.iter().cloned().collect(),
                whole,
            };
            receiver.notices.push_back(Response::Interest(notice));
            receiver.interest = interest;
            receiver.class = new;
            receiver.due = due;
            receiver.pending.extend(numbers);
            for (number, ids) in changed {
                receiver.mark(number, &ids);
            }
        }
        self.release_class(old);
    }

    /// The federation changed: marks what receivers must be told of it. `clusters` are those of which something is another
    /// now, `retargeted` those whose policies can select something else.
    pub(super) fn federation_changed(
        &mut self,
        clusters: &[ClusterName],
        retargeted: BTreeSet<ClusterName>,
        restarted: bool,
    ) {
        let revision = self.hub.federation.position.revision;
        let changed: Vec<u64> = self.hub.since(revision.saturating_sub(1)).collect();
        // Their visibility or leases may have changed.
        let origins: BTreeSet<usize> =
            clusters.iter().filter_map(|name| self.origin_numbers.get(name)).copied().collect();
        let mut unions = Unions::default();
        let ids: Vec<ReceiverId> = self.receivers.keys().copied().collect();
        for id in ids {
            let Some(receiver) = self.receivers.get_mut(&id) else { continue };
            if receiver.open.is_some() {
                // It may have waited for this revision.
                self.ready.insert(id);
                continue;
            }
            if receiver.hub.sent.epoch != self.hub.federation.position.epoch {
                receiver.hub.snapshot = true;
            }
            let told = changed.iter().filter(|id| {
                let object = self.hub.objects.get(*id);
                object.is_none_or(|o| o.is_for(&receiver.cluster) || o.was_for(&receiver.cluster))
            });
            receiver.hub.dirty.extend(told);
            receiver.ahead.extend(&receiver.pending);
            receiver.pending.extend(receiver.cursors.numbers().filter(|number| origins.contains(number)));
            if restarted {
                receiver.pending.extend(receiver.cursors.numbers());
            }
            let aims = retargeted.contains(&receiver.cluster);
            // Its position has moved, if nothing else has.
            self.ready.insert(id);
            if aims {
                self.aim(id);
            }
            self.retarget(id, &mut unions);
        }
    }

    /// Cuts a batch of one origin at its present revision, if the receiver lacks something of it.
    fn fill_origin(&mut self, id: ReceiverId, number: usize) {
        let Some(mut receiver) = self.receivers.remove(&id) else { return };
        self.fill(&mut receiver, number);
        let resuming = receiver.cursors.iter().any(|(_, cursor)| matches!(cursor.wants, Wants::Resume(_)));
        let done = if resuming { None } else { receiver.held_class.take() };
        self.receivers.insert(id, receiver);
        if let Some(class) = done {
            self.release_class(class);
        }
    }

    fn fill(&mut self, receiver: &mut Receiver, number: usize) {
        let Some(origin) = self.origins[number].as_ref() else { return };
        let name = origin.name.clone();
        if name == receiver.cluster {
            return;
        }
        let sees = self.sees(&receiver.cluster, &name);
        let cursor = receiver.cursors.entry(number);
        if !sees {
            if cursor.shown {
                *cursor = Cursor::default();
                let end = Response::End { position: origin.position, digest: Some(0), view: 0 };
                receiver.flight.extend([begin(Some(&name), true, 0), end]);
            }
            // Nothing more comes of it: nobody need wait.
            if receiver.due.remove(&name) {
                receiver.flight.push_back(complete(receiver.number, &name, None, 0));
            }
            return;
        }
        if !origin.synced {
            let lease = self.hub.federation.clusters.get(&name).map(|state| state.lease);
            if matches!(lease, Some(Lease::Stale { .. } | Lease::NeverHeard)) && receiver.due.remove(&name) {
                receiver.flight.push_back(complete(receiver.number, &name, None, 0));
            }
            return;
        }
        let view_token = self.view_token(receiver.class, &name);
        if let Wants::Resume(held) = &cursor.wants {
            let position = origin.position;
            if held.position.epoch > position.epoch
                || (held.position.epoch == position.epoch && held.position.revision > position.revision)
            {
                // This replica is behind: it waits rather than going back in time.
                return;
            }
            let base = [Some(receiver.class), receiver.held_class]
                .into_iter()
                .flatten()
                .find(|class| self.view_token(*class, &name) == held.view);
            let resumable = held.position.epoch == position.epoch && origin.resumable_from(held.position.revision);
            cursor.wants = match base.filter(|_| resumable) {
                None => Wants::Snapshot,
                Some(base) => {
                    let (touched, removed) = origin.since(held.position.revision);
                    cursor.dirty.extend(touched.into_iter().filter_map(|slot| origin.entry(slot)).map(|e| e.id));
                    cursor.dirty.extend(removed);
                    cursor.dirty.extend(differences(self, origin, number, base, receiver.class));
                    let digest = self.class(receiver.class).views.get(number).map_or(0, |view| view.digest);
                    if held.digest == Some(digest) {
                        cursor.dirty.clear();
                    }
                    cursor.nudge = true;
                    Wants::Changes
                }
            };
        }
        let Some(class) = self.classes[receiver.class].as_mut() else { return };
        let shared = class.users > 1;
        let view = super::view_of(&mut class.views, number);
        let snapshot = matches!(cursor.wants, Wants::Snapshot);
        if snapshot || !cursor.dirty.is_empty() || cursor.nudge {
            receiver.flight.push_back(begin(Some(&name), snapshot, 0));
            let bytes = |slot| origin.entry(slot).map(|entry| &entry.bytes[..]);
            if snapshot {
                let frames = view.snapshot.as_ref().and_then(Weak::upgrade).unwrap_or_else(|| {
                    let frames = Arc::new(frame::cut(view.members.iter().filter_map(bytes), &[]));
                    if shared {
                        self.recent.keep(Arc::clone(&frames));
                        view.snapshot = Some(Arc::downgrade(&frames));
                    }
                    frames
                });
                receiver.flight.extend(frames.iter().cloned().map(Response::Frame));
                receiver._snapshot = Some(frames);
            } else {
                let (mut upserts, mut removals) = (Vec::new(), Vec::new());
                for id in &cursor.dirty {
                    match origin.slot_of(*id).filter(|slot| view.members.contains(*slot)).and_then(bytes) {
                        Some(update) => upserts.push(update),
                        None => removals.push(*id),
                    }
                }
                receiver.flight.extend(frame::cut(upserts, &removals).into_iter().map(Response::Frame));
            }
            let (position, digest) = (origin.position, Some(view.digest));
            receiver.flight.push_back(Response::End { position, digest, view: view_token });
            receiver.flight_origin = Some(name.clone());
            let sent = origin.position.revision;
            *cursor = Cursor { wants: Wants::Changes, dirty: BTreeSet::new(), sent, shown: true, nudge: false };
        }
        if receiver.due.remove(&name) {
            receiver.flight.push_back(complete(receiver.number, &name, Some(origin.position), view_token));
        }
    }
}

/// Whether a receiver of an interest is sent all that another one selects.
fn covers(interest: &Interest, other: &Interest) -> bool {
    let everything = || interest.len() == 1 && interest.iter().all(|it| **it == Wanted::everything());
    other.is_subset(interest) || everything()
}

/// Unions of interests, each made once: many receivers go from one to the same other.
#[derive(Debug, Default)]
struct Unions(HashMap<(usize, usize), Union>);

#[derive(Debug)]
struct Union {
    /// Keep the addresses from being given again.
    _of: [Arc<Interest>; 2],
    both: Arc<Interest>,
}

impl Unions {
    fn of(&mut self, a: &Arc<Interest>, b: &Arc<Interest>) -> Arc<Interest> {
        let key = (Arc::as_ptr(a) as usize, Arc::as_ptr(b) as usize);
        let made = self.0.entry(key).or_insert_with(|| {
            let both = match (a.is_subset(b), b.is_subset(a)) {
                (true, _) => Arc::clone(b),
                (_, true) => Arc::clone(a),
                _ => Arc::new(interest::bounded(a.union(b).cloned().collect(), interest::WHOLE)),
            };
            Union { _of: [Arc::clone(a), Arc::clone(b)], both }
        });
        Arc::clone(&made.both)
    }
}

impl Receiver {
    /// What of its interest is not taken as it was written, if anything.
    fn tell_refused(&mut self) {
        let total = self.refused.iter().map(|it| it.total).fold(0, u64::saturating_add);
        let parts = self.refused.iter().flat_map(|it| it.parts.iter().cloned()).collect();
        self.notices.push_back(Response::PartsRefused(RefusedParts { parts, total }));
    }

    fn fill_hub(&mut self, hub: &HubObjects) {
        self.ahead.clear();
        self.hub.first = false;
        let snapshot = std::mem::take(&mut self.hub.snapshot);
        let dirty = std::mem::take(&mut self.hub.dirty);
        let (mut upserts, mut removals) = (Vec::new(), Vec::new());
        if snapshot {
            upserts.extend(hub.objects.values().filter(|o| o.is_for(&self.cluster)).map(|o| o.bytes.clone()));
        } else {
            for id in dirty {
                match hub.objects.get(&id).filter(|object| object.is_for(&self.cluster)) {
                    Some(object) => upserts.push(object.bytes.clone()),
                    None => removals.push(id),
                }
            }
        }
        let position = hub.federation.position;
        self.flight.push_back(begin(None, snapshot, self.number));
        self.flight.extend(frame::cut(upserts, &removals).into_iter().map(Response::Frame));
        let digest = Some(hub.digest_for(&self.cluster));
        self.flight.push_back(Response::End { position, digest, view: 0 });
        self.hub.sent = position;
    }
}

impl HubObjects {
    /// Ids touched or removed after a revision.
    fn since(&self, revision: u64) -> impl Iterator<Item = u64> + '_ {
        let touched = self.objects.iter().filter(move |(_, o)| o.touched > revision).map(|(id, _)| *id);
        let removed = self.tombstones.iter().filter(move |(at, _)| *at > revision).map(|(_, id)| *id);
        touched.chain(removed)
    }
}

fn is_busy(origins: &[Option<Origin>], number: usize) -> bool {
    origins[number].as_ref().is_some_and(Origin::is_busy)
}

/// The ids that only one of two classes selects of an origin.
fn differences(exchange: &Exchange, origin: &super::Origin, number: usize, old: usize, new: usize) -> Vec<u64> {
    if old == new {
        return Vec::new();
    }
    let (old, new) = (exchange.class(old).views.get(number), exchange.class(new).views.get(number));
    let has = |view: Option<&super::View>, slot| view.is_some_and(|view| view.members.contains(slot));
    let either = [old, new].into_iter().flatten().flat_map(|view| view.members.iter());
    let slots = either.filter(|slot| has(old, *slot) != has(new, *slot));
    slots.filter_map(|slot| origin.entry(slot)).map(|entry| entry.id).collect()
}

fn begin(origin: Option<&ClusterName>, snapshot: bool, needs_interest: u64) -> Response {
    Response::Begin { origin: origin.cloned(), snapshot, needs_interest }
}

fn complete(interest: u64, origin: &ClusterName, position: Option<Position>, view: u64) -> Response {
    Response::Complete { interest, origin: origin.clone(), position, view }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hanse_policy::inventory::LabelGrant;

    use crate::model::{ClusterState, Federation, Grant};

    #[derive(Debug)]
    struct Everything;

    impl Grant for Everything {
        fn permits_namespace(&self, _: &str) -> bool {
            true
        }
        fn permits_address(&self, _: std::net::IpAddr) -> bool {
            true
        }
        fn permits_label(&self, _: &str, _: &str) -> bool {
            true
        }
        fn label_grant(&self) -> LabelGrant {
            LabelGrant::All
        }
        fn max_endpoints(&self) -> usize {
            usize::MAX
        }
        fn max_label_sets(&self) -> usize {
            usize::MAX
        }
    }

    #[test]
    fn a_change_that_says_nothing_to_a_receiver_moves_its_position() {
        let state = ClusterState {
            labels: Default::default(),
            grant: Arc::new(Everything),
            grant_token: 1,
            cidrs: Vec::new(),
            lease: Lease::Live,
            federated_allow_final: false,
            visible_to: None,
        };
        let federation = |revision| Federation {
            position: Position { epoch: 1, revision },
            clusters: [("a".into(), state.clone())].into(),
            ..Federation::default()
        };
        let mut exchange = Exchange::new();
        exchange.set_federation(federation(1));
        let open = WatchOpen { protocol: PROTOCOL, ..WatchOpen::default() };
        let id = exchange.watch_open("a".into(), open).expect("opened");
        let told = |exchange: &mut Exchange| {
            let all = std::iter::from_fn(|| exchange.next(id));
            let ends =
                all.filter_map(
                    |response| if let Response::End { position, .. } = response { Some(position) } else { None },
                );
            ends.map(|position| position.revision).collect::<Vec<_>>()
        };
        assert_eq!(told(&mut exchange), [1]);
        assert!(told(&mut exchange).is_empty());
        exchange.set_federation(federation(2));
        assert!(exchange.take_ready().into_iter().any(|ready| ready == id));
        assert_eq!(told(&mut exchange), [2]);
    }
}
