//! The state of one receiver: what it has been sent, and what is due.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::model::ClusterName;

use super::claims::Claims;
use super::objects::HubObjects;
use super::opening::{Opening, ReadOpening, Received};
use super::views::ClassId;
use crate::codec::frame;
use crate::message::{RefusedParts, WatchResponse as Response};
use crate::model::{Interest, Position};

/// Dirty ids that a receiver keeps for one origin before a snapshot is cheaper: 8,192 × about 12 bytes is 96 KiB.
const MAX_DIRTY: usize = 8_192;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReceiverId(pub(super) u64);

#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) cluster: ClusterName,
    pub(super) open: Option<Box<Opening>>,
    pub(super) class: ClassId,
    /// The class of the interest in the opening, while an origin resumes from it.
    pub(super) opening_class: Option<ClassId>,
    pub(super) interest: Arc<Interest>,
    /// The next interest, while its class is being built.
    pub(super) switching: Option<Switching>,
    pub(super) own: Interest,
    /// The interest of its federated policies and of its own.
    pub(super) target: Arc<Interest>,
    /// The interest was found to select all that the target selects, and neither has changed since.
    pub(super) is_covered: bool,
    /// What its interests need beyond what the hub derived.
    pub(super) claims: Claims,
    pub(super) number: u64,
    pub(super) hub: HubCursor,
    pub(super) cursors: Cursors,
    /// Origins whose changes precede the hub's own objects: those changes were pending when the objects changed, and a policy
    /// follows everything that it selects.
    pub(super) ahead: BTreeSet<usize>,
    /// Origins that may have something to be sent.
    pub(super) pending: BTreeSet<usize>,
    /// Origins whose completeness for the present interest is still to be sent.
    pub(super) due: BTreeSet<ClusterName>,
    pub(super) urgent: VecDeque<Response>,
    /// Messages outside batches, in order.
    pub(super) notices: VecDeque<Response>,
    pub(super) flight: VecDeque<Response>,
    pub(super) flight_origin: Option<ClusterName>,
    /// Keeps a shared snapshot while it is sent.
    pub(super) snapshot: Option<Arc<Vec<Bytes>>>,
    pub(super) acked: (u64, Position),
    /// The interest in the opening was not readable as written: the next one is sent as a whole.
    pub(super) interest_widened: bool,
    /// The refused parts of its opening, and of its own interest.
    pub(super) refused: [RefusedParts; 2],
}

#[derive(Debug)]
pub(super) struct Switching {
    pub(super) class: ClassId,
    pub(super) interest: Arc<Interest>,
}

#[derive(Debug, Default)]
pub(super) struct HubCursor {
    pub(super) snapshot: bool,
    /// The first batch of the stream is due. It precedes those of origins, because it replaces objects that wait at the receiver
    /// and that the present interest does not cover.
    pub(super) first: bool,
    pub(super) dirty: BTreeSet<u64>,
    pub(super) sent: Position,
}

#[derive(Debug)]
pub(super) struct Cursor {
    pub(super) wants: Wants,
    pub(super) dirty: BTreeSet<u64>,
    pub(super) sent: u64,
    /// The receiver has objects of it.
    pub(super) shown: bool,
    /// An empty batch is due, to move its position.
    pub(super) nudge: bool,
}

/// Cursors by the origins' numbers, in one allocation: there is one for each receiver and origin.
#[derive(Debug, Default)]
pub(super) struct Cursors(Vec<Option<Cursor>>);

impl Cursors {
    pub(super) fn get_mut(&mut self, number: usize) -> Option<&mut Cursor> {
        self.0.get_mut(number)?.as_mut()
    }

    pub(super) fn entry(&mut self, number: usize) -> &mut Cursor {
        if self.0.len() <= number {
            self.0.resize_with(number + 1, || None);
        }
        self.0[number].get_or_insert_default()
    }

    pub(super) fn remove(&mut self, number: usize) {
        if let Some(cursor) = self.0.get_mut(number) {
            *cursor = None;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Cursor)> {
        self.0.iter().enumerate().filter_map(|(number, cursor)| Some((number, cursor.as_ref()?)))
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = usize> {
        self.iter().map(|(number, _)| number)
    }
}

#[derive(Debug)]
pub(super) enum Wants {
    Changes,
    Snapshot,
    Resume(Box<Received>),
}

impl Default for Cursor {
    fn default() -> Self {
        Self { wants: Wants::Snapshot, dirty: BTreeSet::new(), sent: 0, shown: false, nudge: false }
    }
}

impl Receiver {
    pub(super) fn new(cluster: ClusterName, open: ReadOpening, class: ClassId, nothing: Arc<Interest>) -> Self {
        let ReadOpening { opening, own, interest_widened, refused, .. } = open;
        Self {
            cluster,
            open: Some(Box::new(opening)),
            class,
            opening_class: None,
            switching: None,
            interest: Arc::clone(&nothing),
            own,
            target: nothing,
            is_covered: true,
            claims: Claims::default(),
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
            snapshot: None,
            acked: (0, Position::default()),
            interest_widened,
            refused,
        }
    }

    /// Everything that it was sent of the hub's own objects and of interests is in force.
    pub(super) fn rests(&self) -> bool {
        self.acked == (self.number, self.hub.sent) && !self.hub.snapshot && self.hub.dirty.is_empty()
    }

    /// The classes that it waits for.
    pub(super) fn awaited_classes(&self) -> [Option<ClassId>; 3] {
        let starting = self.open.as_ref().and_then(|open| open.starting.as_ref());
        let switching = self.switching.as_ref().map(|switching| switching.class);
        [starting.map(|starting| starting.opening_class), starting.map(|starting| starting.class), switching]
    }

    /// A class was merged into another one while it was built.
    pub(super) fn replace_class(&mut self, from: ClassId, into: ClassId) {
        let starting = self.open.as_mut().and_then(|open| open.starting.as_mut());
        let starting = starting.into_iter().flat_map(|starting| [&mut starting.opening_class, &mut starting.class]);
        let switching = self.switching.as_mut().map(|switching| &mut switching.class);
        for class in starting.chain(switching).filter(|class| **class == from) {
            *class = into;
        }
    }

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

    /// An origin has a new position. `aging`: see [`super::origin::Origin::aging_revision`]. Returns whether the receiver may be
    /// sent something of it.
    pub(super) fn origin_moved(&mut self, number: usize, aging: u64, first: bool, new_epoch: bool) -> bool {
        if self.open.is_some() {
            return false;
        }
        let cursor = self.cursors.entry(number);
        if new_epoch {
            cursor.wants = Wants::Snapshot;
            cursor.dirty.clear();
        }
        // Removals count, and not revisions, which are the publisher's choice: each nudge is paid by as many updates.
        cursor.nudge |= cursor.sent < aging;
        if first || new_epoch || cursor.nudge || matches!(cursor.wants, Wants::Resume(_)) {
            self.pending.insert(number);
        }
        self.pending.contains(&number)
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

    /// Reports the parts of its interest that were not readable as written.
    pub(super) fn report_refused_parts(&mut self) {
        let total = self.refused.iter().map(|it| it.total).fold(0, u64::saturating_add);
        let parts = self.refused.iter().flat_map(|it| it.parts.iter().cloned()).collect();
        self.notices.push_back(Response::PartsRefused(RefusedParts { parts, total }));
    }

    pub(super) fn fill_hub(&mut self, hub: &HubObjects) {
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

/// The beginning of a batch.
pub(super) fn begin(origin: Option<&ClusterName>, snapshot: bool, needs_interest: u64) -> Response {
    Response::Begin { origin: origin.cloned(), snapshot, needs_interest }
}
