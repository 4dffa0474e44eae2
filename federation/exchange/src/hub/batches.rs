//! Batches for a receiver, of one origin at its present revision.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use hanse_policy::model::ClusterName;

use super::exchange::Exchange;
use super::receiver::{Cursor, Receiver, ReceiverId, Wants, begin};
use crate::codec::frame;
use crate::message::WatchResponse as Response;
use crate::model::{Lease, Position};

impl Exchange {
    /// Makes a batch of one origin at its present revision, if the receiver lacks something of it.
    pub(super) fn fill_origin(&mut self, id: ReceiverId, number: usize) {
        let Some(mut receiver) = self.receivers.remove(&id) else { return };
        self.fill(&mut receiver, number);
        self.receivers.insert(id, receiver);
        self.release_opening_class(id);
    }

    /// Releases the class of the interest in a receiver's opening, unless an origin still resumes from it.
    pub(super) fn release_opening_class(&mut self, id: ReceiverId) {
        let Some(receiver) = self.receivers.get_mut(&id) else { return };
        let resuming = receiver.cursors.iter().any(|(_, cursor)| matches!(cursor.wants, Wants::Resume(_)));
        if let Some(class) = receiver.opening_class.take_if(|_| !resuming) {
            self.release_class(class);
            self.drop_claims(id);
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
            // It sends nothing more, so that no policy waits for it.
            if receiver.due.remove(&name) {
                receiver.flight.push_back(complete(receiver.number, &name, None, 0));
            }
            return;
        }
        if !origin.synced {
            let lease = self.hub.federation.clusters.get(&name).map(|state| state.lease);
            if matches!(lease, Some(Lease::Stale { .. } | Lease::NeverConnected)) && receiver.due.remove(&name) {
                receiver.flight.push_back(complete(receiver.number, &name, None, 0));
            }
            return;
        }
        let view_token = self.view_token(receiver.class, &name);
        if let Wants::Resume(received) = &cursor.wants {
            let position = origin.position;
            if received.position.epoch > position.epoch
                || (received.position.epoch == position.epoch && received.position.revision > position.revision)
            {
                // This replica is behind the receiver: it waits.
                return;
            }
            let base = [Some(receiver.class), receiver.opening_class]
                .into_iter()
                .flatten()
                .find(|class| self.view_token(*class, &name) == received.view);
            let resumable =
                received.position.epoch == position.epoch && origin.resumable_from(received.position.revision);
            cursor.wants = match base.filter(|_| resumable) {
                None => Wants::Snapshot,
                Some(base) => {
                    let (touched, removed) = origin.since(received.position.revision);
                    cursor.dirty.extend(touched.into_iter().filter_map(|slot| origin.entry(slot)).map(|e| e.id));
                    cursor.dirty.extend(removed);
                    cursor.dirty.extend(self.classes.differences(number, origin, base, receiver.class));
                    let digest = self.classes.get(receiver.class).view(number).map_or(0, |view| view.digest);
                    if received.digest == Some(digest) {
                        cursor.dirty.clear();
                    }
                    cursor.nudge = true;
                    Wants::Changes
                }
            };
        }
        let class = self.classes.get_mut(receiver.class);
        let shared = class.is_shared();
        let view = class.view_mut(number);
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
                receiver.snapshot = Some(frames);
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

fn complete(interest: u64, origin: &ClusterName, position: Option<Position>, view: u64) -> Response {
    Response::Complete { interest, origin: origin.clone(), position, view }
}
