//! What this cluster receives: staged until a batch ends, checked by its digest, and handed out as changes.
//!
//! Federated policies, tiers and network sets come into force when the interest that they need is complete; until then the
//! previous ones stay, also across reconnects and restarts. Cluster records and withdrawals take effect at once. What was
//! received is removed only when its origin, or the hub, removes it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::model::ClusterName;

use super::model::{Change, ClusterRecord, Updates};
use crate::codec::{DecodeError, frame, object};
use crate::interest::{self, Interest, Wanted};
use crate::limits::PROTOCOL;
use crate::message::{
    InterestChange, ReceivedOrigin, RefusedParts, WatchOpen, WatchRequest, WatchResponse, WrittenSelection,
};
use crate::model::{ManifestKind, Position, digest_of};

mod hub_objects;
mod origin;
mod problem;
mod stored;

use hub_objects::HubObjects;
use origin::{DigestDiffers, Origin};
pub use problem::{Check, ObjectProblem};

/// Problems of one kind that are reported.
const MAX_PROBLEMS: usize = 32;

/// Everything received, and what of it is in force.
#[derive(Debug, Default)]
pub struct Receiver {
    hub: HubObjects,
    origins: BTreeMap<ClusterName, Origin>,
    /// The interest that was complete last.
    complete_interest: BTreeSet<WrittenSelection>,
    own: Vec<WrittenSelection>,
    /// Why the hub did not take the last opening, or a later message of its stream: the next one names wider selections.
    rejected: Option<String>,
    session: Option<Session>,
    changes: Vec<Change>,
    /// The position that was handed out last with changes.
    handed_out: Position,
    /// Something newer than this was handed out before a crash: until the hub has confirmed the present state, the position
    /// does not count.
    unconfirmed: bool,
}

/// One watching stream.
#[derive(Debug, Default)]
struct Session {
    /// The hub serves the stream: its state is not older than what was received here.
    welcomed: bool,
    /// What the hub could not read as it was written.
    refused: RefusedParts,
    /// Objects whose ids could not be read.
    unreadable: u64,
    staging: Option<Staging>,
    number: u64,
    complete: u64,
    interest: BTreeSet<WrittenSelection>,
    /// The hub's own objects came.
    hub_ended: bool,
    outstanding: BTreeSet<ClusterName>,
    /// Origins of which a batch was not taken because its digest differed, with the interest that was reported complete
    /// meanwhile: it is not, before the requested snapshot has come.
    lacking: BTreeMap<ClusterName, Option<u64>>,
}

/// A batch that has begun.
#[derive(Debug)]
struct Staging {
    /// `None`: the hub's own objects.
    origin: Option<ClusterName>,
    snapshot: bool,
    needs: u64,
    /// Copies: slices would keep whole frames.
    updates: BTreeMap<u64, Option<Box<[u8]>>>,
    /// The digests of updates whose ids cannot be read: they are refused by themselves, and the rest counts.
    unreadable: u128,
}

/// Why a stream must be given up.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("{0}")]
    Protocol(&'static str),
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// What is wrong with what a member receives, although the stream goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReceiveProblem {
    /// The hub rejects the selections of this cluster's own policies, and sends every endpoint instead.
    SelectionsRejected(String),
    /// The hub cannot read one selection, and sends more instead.
    SelectionRejected(String),
    /// How many selections the hub cannot read, of which not all are named.
    SelectionsUnreadable(u64),
    /// Objects that cannot be read here: of a cluster, or the hub's own.
    ObjectsUnreadable { cluster: Option<ClusterName>, count: u64 },
}

/// What was received of one origin, for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginStatus {
    pub position: Position,
    pub digest: u128,
    pub objects: usize,
    pub refused: usize,
}

impl Receiver {
    /// Without anything received. Takes only manifests that `check` does not refuse.
    pub fn checked(check: impl Check + 'static) -> Self {
        let mut receiver = Self::default();
        receiver.hub.check = Some(Arc::new(check));
        receiver
    }

    /// All clusters and endpoints that were received, as changes of nothing. O(all of them).
    pub fn everything(&self) -> Vec<Change> {
        let mut changes: Vec<Change> = Vec::new();
        for (name, record) in &self.hub.clusters {
            changes.push(Change::Cluster { name: name.clone(), record: Some(record.clone()) });
        }
        for (name, origin) in &self.origins {
            origin.everything(name, &mut changes);
        }
        changes
    }

    /// The first message of a watching stream. What an earlier stream left unfinished is dropped.
    pub fn open(&mut self) -> WatchRequest {
        self.disconnected();
        self.hub.wait_for_first_interest();
        let size = |it: &WrittenSelection| crate::codec::selection::encode(it).len() + 5;
        let bytes: usize = self.complete_interest.iter().map(size).sum();
        let wider = self.rejected.is_some() && bytes > 0 || bytes > interest::WHOLE.bytes;
        let interest = if wider { BTreeSet::from([everything()]) } else { self.complete_interest.clone() };
        let received = self.origins.iter().map(|(name, origin)| ReceivedOrigin {
            origin: name.clone(),
            position: Some(origin.position),
            view: origin.view,
            digest: Some(origin.digest),
        });
        let open = WatchOpen {
            protocol: PROTOCOL,
            hub: self.hub.position,
            hub_digest: Some(self.hub.digest),
            received: received.collect(),
            interest: interest.iter().cloned().collect(),
            own: self.own_selections(),
        };
        self.session = Some(Session { interest, ..Session::default() });
        WatchRequest::Open(open)
    }

    /// The stream ended; what was received stays.
    pub fn disconnected(&mut self) {
        self.session = None;
    }

    /// Why the hub did not take what this cluster sent on the last stream, or that it did: the next opening names everything in
    /// place of the selections that may be the reason.
    pub fn set_rejected(&mut self, why: Option<String>) {
        self.rejected = why;
    }

    /// Whether the hub serves the stream that is open.
    pub fn is_served(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.welcomed)
    }

    /// Selections of this cluster that the hub rejected, and objects that this member cannot read.
    pub fn problems(&self) -> Vec<ReceiveProblem> {
        let mut problems = Vec::new();
        problems.extend(self.rejected.clone().map(ReceiveProblem::SelectionsRejected));
        let Some(session) = &self.session else { return problems };
        let refused = &session.refused;
        problems.extend(refused.parts.iter().take(MAX_PROBLEMS).cloned().map(ReceiveProblem::SelectionRejected));
        if refused.total > refused.parts.len() as u64 {
            problems.push(ReceiveProblem::SelectionsUnreadable(refused.total));
        }
        if session.unreadable > 0 {
            problems.push(ReceiveProblem::ObjectsUnreadable { cluster: None, count: session.unreadable });
        }
        let unread = self.origins.iter().filter(|(_, origin)| !origin.refused.is_empty()).take(MAX_PROBLEMS);
        problems.extend(unread.map(|(name, it)| ReceiveProblem::ObjectsUnreadable {
            cluster: Some(name.clone()),
            count: it.refused.len() as u64,
        }));
        problems
    }

    /// Replaces the selections of this cluster's own policies; returns what to send, if a stream is open.
    pub fn set_own(&mut self, own: &Interest) -> Option<WatchRequest> {
        self.set_own_written(own.iter().map(|wanted| (&**wanted).into()).collect())
    }

    /// As [`Self::set_own`], of selections that need not be readable: as another version writes them.
    pub fn set_own_written(&mut self, own: Vec<WrittenSelection>) -> Option<WatchRequest> {
        let before = self.own_selections();
        self.own = own;
        let selections = self.own_selections();
        if selections == before {
            return None;
        }
        self.session.as_ref()?;
        Some(WatchRequest::Own(selections))
    }

    fn own_selections(&self) -> Vec<WrittenSelection> {
        match self.rejected.is_some() && !self.own.is_empty() {
            true => vec![everything()],
            false => self.own.clone(),
        }
    }

    /// The changes since the last call, which take effect together; also where only the hub's position moved.
    pub fn take_updates(&mut self) -> Option<Updates> {
        let in_force = if self.unconfirmed { Position::default() } else { self.hub.in_force_at };
        let moved = std::mem::replace(&mut self.handed_out, in_force) != in_force;
        (moved || !self.changes.is_empty()).then(|| Updates { changes: std::mem::take(&mut self.changes), in_force })
    }

    /// What was restored is older than what was handed out before: it counts when the hub has confirmed it.
    pub fn require_confirmation(&mut self) {
        self.unconfirmed = true;
    }

    pub fn is_unconfirmed(&self) -> bool {
        self.unconfirmed
    }

    /// Takes one message; returns what to answer.
    ///
    /// # Errors
    /// When the stream must be given up because the hub violates the protocol. What was received stays.
    pub fn take(&mut self, response: WatchResponse) -> Result<Vec<WatchRequest>, ReceiveError> {
        let Some(session) = self.session.as_mut() else { return Err(ReceiveError::Protocol("no stream is open")) };
        match response {
            WatchResponse::Welcome { .. } => session.welcomed = true,
            WatchResponse::PartsRefused(refused) => {
                if refused.total > 0 {
                    let first = refused.parts.first().map(String::as_str).unwrap_or_default();
                    tracing::error!(
                        total = refused.total,
                        first,
                        "the hub cannot read selections of this cluster, so that it sends more"
                    );
                }
                session.refused = refused;
            }
            // Of the connection, not of the objects.
            WatchResponse::Hubs(_) | WatchResponse::Compared { .. } => {}
            // Nothing more is under way.
            WatchResponse::Heartbeat => {
                self.unconfirmed &= session.number == 0 || session.complete != session.number;
            }
            WatchResponse::Begin { origin, snapshot, needs_interest } => {
                let (updates, unreadable) = (BTreeMap::new(), 0);
                session.staging = Some(Staging { origin, snapshot, needs: needs_interest, updates, unreadable });
            }
            WatchResponse::Frame(bytes) => session.stage(&bytes)?,
            WatchResponse::End { position, digest, view } => {
                // A withdrawal may have ended the batch.
                let Some(mut staging) = session.staging.take() else { return Ok(Vec::new()) };
                return Ok(match staging.origin.take() {
                    None => self.end_hub(staging, position, digest),
                    Some(origin) => self.end_origin(origin, staging, position, digest, view),
                });
            }
            WatchResponse::Interest(change) => {
                session.change_interest(change, &mut self.complete_interest);
                return Ok(self.advance());
            }
            WatchResponse::Complete { interest, origin, position, view } => {
                if let Some(at) = session.lacking.get_mut(&origin) {
                    *at = Some(interest);
                    return Ok(Vec::new());
                }
                if interest == session.number {
                    session.outstanding.remove(&origin);
                }
                if let (Some(position), Some(origin)) = (position, self.origins.get_mut(&origin)) {
                    (origin.position, origin.view) = (position, view);
                }
                return Ok(self.advance());
            }
            WatchResponse::Withdrawn { cluster } => {
                session.outstanding.remove(&cluster);
                session.lacking.remove(&cluster);
                if session.staging.as_ref().is_some_and(|staging| staging.origin.as_ref() == Some(&cluster)) {
                    session.staging = None;
                }
                self.withdraw(&cluster);
                return Ok(self.advance());
            }
        }
        Ok(Vec::new())
    }

    /// The policies that wait, enforced and staged ones, and for which clusters.
    pub fn waiting(&self) -> (BTreeSet<(ManifestKind, Arc<str>)>, BTreeSet<ClusterName>) {
        let outstanding = self.session.as_ref().map(|session| session.outstanding.clone());
        (self.hub.waiting_policies(), outstanding.unwrap_or_default())
    }

    /// Federated policies that cannot be used here, and why. Their last usable versions stay in force; without one, what such a
    /// policy concerns is closed.
    pub fn refused(&self) -> BTreeMap<(ManifestKind, Arc<str>), String> {
        self.hub.refused_policies()
    }

    pub fn origins(&self) -> BTreeMap<ClusterName, OriginStatus> {
        let status = |origin: &Origin| OriginStatus {
            position: origin.position,
            digest: origin.digest,
            objects: origin.len(),
            refused: origin.refused.len(),
        };
        self.origins.iter().map(|(name, origin)| (name.clone(), status(origin))).collect()
    }

    pub fn clusters(&self) -> &BTreeMap<ClusterName, ClusterRecord> {
        &self.hub.clusters
    }

    /// The hub's positions that were received, and that policies in force come from.
    pub fn positions(&self) -> (Position, Position) {
        (self.hub.position.unwrap_or_default(), self.hub.in_force_at)
    }

    pub fn hub_digest(&self) -> u128 {
        self.hub.digest
    }

    fn end_hub(&mut self, staging: Staging, position: Position, digest: Option<u128>) -> Vec<WatchRequest> {
        let Staging { snapshot, updates, unreadable, needs, .. } = staging;
        let updates = updates.into_iter().map(|(id, update)| (id, update.map(Bytes::from))).collect();
        let Some(clusters) = self.hub.apply(snapshot, updates, unreadable, (position, digest, needs)) else {
            return vec![WatchRequest::Mismatch { origin: None }];
        };
        if let Some(session) = self.session.as_mut() {
            session.hub_ended = true;
        }
        clusters.gone.iter().for_each(|name| self.withdraw(name));
        let changed = clusters.changed.into_iter();
        self.changes.extend(changed.map(|(name, record)| Change::Cluster { name, record: Some(record) }));
        self.advance()
    }

    fn end_origin(
        &mut self,
        name: ClusterName,
        staging: Staging,
        position: Position,
        digest: Option<u128>,
        view: u64,
    ) -> Vec<WatchRequest> {
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
            // What was received stays until the snapshot replaces it.
            Err(DigestDiffers) => {
                if let Some(session) = self.session.as_mut() {
                    session.lacking.entry(name.clone()).or_default();
                }
                vec![WatchRequest::Mismatch { origin: Some(name) }]
            }
        }
    }

    fn withdraw(&mut self, name: &ClusterName) {
        let known = self.origins.remove(name).is_some() | self.hub.clusters.contains_key(name);
        if known || !self.changes.iter().any(|c| matches!(c, Change::Withdrawn { name: gone } if gone == name)) {
            self.changes.push(Change::Withdrawn { name: name.clone() });
        }
    }

    /// Puts into force what no longer waits for its interest, and acknowledges.
    fn advance(&mut self) -> Vec<WatchRequest> {
        let Some(session) = self.session.as_mut().filter(|session| session.number > 0) else { return Vec::new() };
        if !session.outstanding.is_empty() {
            return Vec::new();
        }
        let became_complete = session.complete != session.number;
        session.complete = session.number;
        self.unconfirmed &= !session.hub_ended;
        self.complete_interest.clone_from(&session.interest);
        let interest = session.number;
        let moved = self.hub.advance(interest, &mut self.changes);
        if !became_complete && !moved {
            return Vec::new();
        }
        vec![WatchRequest::InForce { interest, hub: self.hub.in_force_at }]
    }
}

impl Session {
    fn stage(&mut self, bytes: &Bytes) -> Result<(), DecodeError> {
        // A withdrawal may have ended the batch.
        let Some(staging) = self.staging.as_mut() else { return Ok(()) };
        let frame = frame::read(bytes)?;
        staging.updates.extend(frame.removals.into_iter().map(|id| (id, None)));
        for update in frame.upserts {
            match object::id_of(&update) {
                Some(id) => drop(staging.updates.insert(id, Some(Box::from(&*update)))),
                None => {
                    let origin = staging.origin.as_deref().unwrap_or("hub");
                    tracing::error!(origin, "an object without an id is not used");
                    staging.unreadable = staging.unreadable.wrapping_add(digest_of(&update));
                    self.unreadable = self.unreadable.saturating_add(1);
                }
            }
        }
        Ok(())
    }

    fn change_interest(&mut self, change: InterestChange, complete: &mut BTreeSet<WrittenSelection>) {
        for removed in &change.removed {
            self.interest.remove(removed);
        }
        if change.added.is_empty() {
            // Nothing in force needs what goes: the rest is as complete as it was.
            complete.clone_from(&self.interest);
        }
        if change.whole {
            self.interest.clear();
        }
        self.interest.extend(change.added);
        self.number = change.number;
        self.outstanding = change.origins.into_iter().collect();
    }
}

fn everything() -> WrittenSelection {
    (&Wanted::everything()).into()
}

#[cfg(test)]
mod tests;
