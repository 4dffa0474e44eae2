//! Watching streams: what each receiver lacks, and the order in which it is sent.
//!
//! Withdrawals come first, also within a batch. Then follow the rest of the batch that is being sent, a change of interest,
//! changes of origins that precede a change of the hub's own objects, the hub's own objects, and the origins in turn. The
//! interest shrinks only when nothing in force at the receiver needs the larger one.

use std::sync::Arc;

use hanse_policy::model::ClusterName;

use super::evaluation::Evaluation;
use super::exchange::Exchange;
use super::interests::Unions;
use super::opening::{ReadOpening, ReadRequest, Starting};
use super::origin::Origin;
use super::receiver::{Cursor, Cursors, Receiver, ReceiverId, Wants};
use crate::limits::PROTOCOL;
use crate::message::{WatchOpen, WatchRequest, WatchResponse as Response};
use crate::model::{Interest, Position};

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

/// What a receiver is to be sent.
#[derive(Debug)]
pub enum Next {
    Message(Response),
    /// Its next interest: the answers are for [`Exchange::take_evaluated`].
    Evaluate(Arc<Evaluation>),
    /// Its next interest is being evaluated: the next call of [`Exchange::next_step`] goes on with it.
    Building,
    Nothing,
}

impl Exchange {
    /// A cluster opened a watching stream with this first message.
    ///
    /// # Errors
    /// When the version of the protocol is unknown, or the cluster is not accepted.
    pub fn watch_open(&mut self, cluster: ClusterName, open: WatchOpen) -> Result<ReceiverId, WatchError> {
        self.watch_opened(cluster, ReadOpening::of(open))
    }

    /// As [`Self::watch_open`], with a decoded message.
    ///
    /// # Errors
    /// As [`Self::watch_open`].
    pub fn watch_opened(&mut self, cluster: ClusterName, open: ReadOpening) -> Result<ReceiverId, WatchError> {
        if open.protocol != PROTOCOL {
            return Err(WatchError::Version(open.protocol));
        }
        if self.hub.loaded && !self.hub.federation.clusters.contains_key(&cluster) {
            return Err(WatchError::NotAccepted);
        }
        let now = self.hub.federation.position;
        if self.hub.loaded
            && open.opening.hub.is_some_and(|received| received.epoch == now.epoch && received.revision > now.revision)
        {
            let received = open.opening.hub.map_or(0, |received| received.revision);
            tracing::error!(
                %cluster, received, have = now.revision,
                "a member has a newer state than the hub: if the hub's files were restored, start it with --restored"
            );
        }
        let nothing = Arc::new(Interest::new());
        let class = self.acquire_class(&nothing);
        let id = ReceiverId(self.next_id);
        self.next_id += 1;
        let receiver = Receiver::new(cluster, open, class, nothing);
        self.receivers.insert(id, receiver);
        self.ready.insert(id);
        Ok(id)
    }

    pub fn watch_close(&mut self, id: ReceiverId) {
        if let Some(receiver) = self.receivers.remove(&id) {
            self.release_class(receiver.class);
            let starting = receiver.open.and_then(|open| open.starting);
            let starting = starting.into_iter().flat_map(|starting| [starting.opening_class, starting.class]);
            let switching = receiver.switching.map(|switching| switching.class);
            for class in starting.chain(switching).chain(receiver.opening_class) {
                self.release_class(class);
            }
        }
        self.ready.remove(&id);
    }

    /// Takes a later message of the receiver.
    ///
    /// # Errors
    /// When the message violates the protocol.
    pub fn watch(&mut self, id: ReceiverId, request: WatchRequest) -> Result<(), WatchError> {
        self.watch_read(id, ReadRequest::of(request))
    }

    /// As [`Self::watch`], with a decoded message.
    ///
    /// # Errors
    /// As [`Self::watch`].
    pub fn watch_read(&mut self, id: ReceiverId, request: ReadRequest) -> Result<(), WatchError> {
        let Some(receiver) = self.receivers.get_mut(&id) else { return Ok(()) };
        match request {
            ReadRequest::Nothing => return Ok(()),
            ReadRequest::Open => return Err(WatchError::Protocol("open comes once".to_owned())),
            ReadRequest::Own(own, refused) => {
                let is_new = receiver.own != own;
                receiver.own = own;
                if receiver.refused[1] != refused {
                    receiver.refused[1] = refused;
                    if receiver.open.is_none() {
                        receiver.report_refused_parts();
                    }
                }
                if is_new {
                    self.aim(id);
                    self.retarget(id, &mut Unions::default());
                }
            }
            ReadRequest::InForce { interest, hub } => {
                receiver.acked = (interest, hub);
                // Only then the interest may shrink.
                if !receiver.rests() {
                    return Ok(());
                }
                self.retarget(id, &mut Unions::default());
            }
            ReadRequest::Mismatch { origin: None } => receiver.hub.snapshot = true,
            ReadRequest::Mismatch { origin: Some(origin) } => {
                let number = self.origin_numbers.get(&origin);
                let cursor = number.and_then(|number| Some((*number, receiver.cursors.get_mut(*number)?)));
                let Some((number, cursor)) = cursor else { return Ok(()) };
                cursor.wants = Wants::Snapshot;
                cursor.dirty.clear();
                receiver.pending.insert(number);
            }
        }
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

    /// The digest of the objects of an origin that a receiver has once everything was sent.
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
        Some(self.classes.get(receiver.class).view(*number).map_or(0, |view| view.digest))
    }

    /// Whether the digests that a cluster reported are those of the hub's own objects and of each origin; `None` while that is
    /// unknown: it has not reported, or does not watch here.
    pub fn digests_equal(&self, cluster: &str) -> Option<bool> {
        // A refused report names no origin.
        let reported = self.reports.get(cluster).filter(|reported| reported.hub.is_some())?;
        // The newest stream: a renewed certificate opens another one.
        let mut receivers = self.receivers.iter().rev();
        let (id, _) = receivers.find(|(_, receiver)| *receiver.cluster == *cluster && receiver.open.is_none())?;
        // It has no objects of an origin that it does not name. Earlier versions do not name the hub's own objects.
        let named = reported.origins.keys().map(|name| &**name);
        let origins = named.chain(self.hub.federation.clusters.keys().map(|name| &**name));
        let equal = |origin: &str| {
            let expected = self.expected_digest(*id, origin);
            // The digest of an origin that has not published yet is unknown.
            expected.is_none_or(|expected| reported.origins.get(origin).unwrap_or(&Some(0)) == &Some(expected))
        };
        let mut origins = origins.filter(|origin| *origin != cluster);
        Some(origins.all(equal))
    }

    /// The revision that a cluster has received from the hub and that this hub has not reached. Its stream waits.
    pub fn ahead_of_hub(&self, cluster: &str) -> Option<u64> {
        let now = self.hub.federation.position;
        let of_streams = self.receivers.values().filter(|receiver| *receiver.cluster == *cluster);
        let of_streams = of_streams.filter_map(|receiver| receiver.open.as_ref()?.hub);
        let reported = self.reports.get(cluster);
        let positions = reported.into_iter().flat_map(|reported| [reported.hub, reported.received]).flatten();
        let ahead = of_streams.chain(positions);
        // Positions of single nodes do not count: a faulty node must not stop the exchange of its cluster.
        let ahead = ahead.filter(|at| at.epoch == now.epoch).map(|at| at.revision);
        ahead.max().filter(|at| self.hub.loaded && *at > now.revision)
    }

    /// The next message for a receiver, if there is one. As [`Self::next_step`], with what is to be evaluated.
    pub fn next(&mut self, id: ReceiverId) -> Option<Response> {
        match self.next_step(id) {
            Next::Message(message) => Some(message),
            Next::Evaluate(evaluation) => {
                self.take_evaluated(&evaluation.evaluate());
                None
            }
            Next::Building | Next::Nothing => None,
        }
    }

    /// The next message for a receiver, or what it waits for.
    pub fn next_step(&mut self, id: ReceiverId) -> Next {
        if let Some(message) = self.next_message(id) {
            return Next::Message(message);
        }
        if !self.is_building(id) {
            return Next::Nothing;
        }
        let prepared = self.receivers.get(&id).and_then(|receiver| {
            let classes = receiver.awaited_classes();
            classes.into_iter().flatten().find_map(|class| self.classes.prepared(class))
        });
        prepared.map_or(Next::Building, Next::Evaluate)
    }

    fn next_message(&mut self, id: ReceiverId) -> Option<Response> {
        loop {
            let receiver = self.receivers.get_mut(&id)?;
            let message = receiver.urgent.pop_front().or_else(|| receiver.flight.pop_front());
            if let Some(message) = message {
                return Some(message);
            }
            receiver.flight_origin = None;
            receiver.snapshot = None;
            if receiver.open.is_some() {
                if !self.start(id) {
                    return None;
                }
                continue;
            }
            if let Some(message) = receiver.notices.pop_front() {
                return Some(message);
            }
            if receiver.switching.is_some() {
                if self.finish_switch(id) {
                    continue;
                }
                // The hub's own objects may need the next interest, and the first batch of them precedes those of origins. Otherwise
                // changes within the present interest are sent meanwhile.
                if self.receivers.get(&id)?.hub.first {
                    return None;
                }
                return self.next_of_origins(id).and_then(|()| self.receivers.get_mut(&id)?.flight.pop_front());
            }
            if receiver.hub.first && self.has_unsent_origin(id) {
                // Origins have published since the interest was sent: the policies of this batch wait for them as well.
                let interest = Arc::clone(&self.receivers.get(&id)?.interest);
                self.switch(id, interest);
                continue;
            }
            let receiver = self.receivers.get_mut(&id)?;
            // A change that does not concern this receiver moves its position as well, in an empty batch.
            let moved = receiver.hub.sent != self.hub.federation.position;
            if receiver.hub.snapshot || !receiver.hub.dirty.is_empty() || moved {
                let first = receiver.ahead.first().filter(|_| !receiver.hub.first);
                if first.is_some_and(|number| is_busy(&self.origins, *number) && receiver.pending.contains(number)) {
                    // The endpoints that a policy selects precede it.
                    return None;
                }
                match receiver.ahead.pop_first().filter(|_| !receiver.hub.first) {
                    Some(number) if receiver.pending.remove(&number) => self.fill_origin(id, number),
                    Some(_) => {}
                    None => receiver.fill_hub(&self.hub),
                }
                continue;
            }
            self.next_of_origins(id)?;
        }
    }

    /// Makes a batch of the next origin that has something to be sent. An origin that is between two states waits.
    fn next_of_origins(&mut self, id: ReceiverId) -> Option<()> {
        let receiver = self.receivers.get_mut(&id)?;
        let number = receiver.pending.iter().copied().find(|number| !is_busy(&self.origins, *number))?;
        receiver.pending.remove(&number);
        self.fill_origin(id, number);
        Some(())
    }

    /// Whether a receiver waits for the class of its next interest: the next call of [`Self::next`] goes on with it.
    pub fn is_building(&self, id: ReceiverId) -> bool {
        self.receivers.get(&id).is_some_and(|receiver| {
            receiver.switching.is_some() || receiver.open.as_ref().is_some_and(|open| open.starting.is_some())
        })
    }

    /// Starts a receiver, once the hub's state is not older than the receiver's.
    fn start(&mut self, id: ReceiverId) -> bool {
        let Some(receiver) = self.receivers.get_mut(&id) else { return false };
        let now = self.hub.federation.position;
        let behind = |received: Position| received.epoch == now.epoch && received.revision > now.revision;
        if !self.hub.loaded || receiver.open.as_ref().is_none_or(|open| open.hub.is_some_and(behind)) {
            return false;
        }
        let Some(starting) = self.build_first_classes(id) else { return false };
        let Some(receiver) = self.receivers.get_mut(&id) else { return false };
        let Some(open) = receiver.open.take() else { return false };
        let cluster = receiver.cluster.clone();
        let heartbeat_ms = self.heartbeat_ms;
        receiver.notices.push_back(Response::Welcome { heartbeat_ms });
        if receiver.refused.iter().any(|refused| refused.total > 0) {
            receiver.report_refused_parts();
        }
        let hub = &mut receiver.hub;
        let digest = self.hub.digest_for(&cluster);
        match open.hub {
            Some(received) if received.epoch == now.epoch && open.hub_digest == Some(digest) => hub.sent = received,
            Some(received) if received.epoch == now.epoch && received.revision >= self.hub.floor => {
                hub.dirty = self.hub.since(received.revision).collect();
                hub.sent = received;
                hub.snapshot = hub.dirty.is_empty();
            }
            _ => hub.snapshot = true,
        }
        hub.first = hub.snapshot || !hub.dirty.is_empty();
        receiver.interest = Arc::clone(&open.interest);
        for origin in open.received.keys() {
            if !self.hub.federation.clusters.contains_key(origin) {
                receiver.urgent.push_back(Response::Withdrawn { cluster: origin.clone() });
            }
        }
        let origins: Vec<ClusterName> = self.hub.federation.clusters.keys().cloned().collect();
        let mut cursors = Cursors::default();
        for name in origins {
            let Some(number) = self.origin_number(&name).filter(|_| name != cluster) else { continue };
            let received = open.received.get(&name).copied();
            let wants = received.map_or(Wants::Snapshot, |received| Wants::Resume(Box::new(received)));
            *cursors.entry(number) = Cursor { wants, shown: received.is_some(), ..Cursor::default() };
        }
        if let Some(receiver) = self.receivers.get_mut(&id) {
            receiver.opening_class = Some(starting.opening_class);
            receiver.pending = cursors.numbers().collect();
            receiver.cursors = cursors;
        }
        self.switch_to(id, starting.class, starting.interest);
        self.release_opening_class(id);
        // Policies may have changed since the classes were begun.
        self.aim(id);
        self.retarget(id, &mut Unions::default());
        true
    }

    /// The classes that a receiver starts with, once they are built.
    fn build_first_classes(&mut self, id: ReceiverId) -> Option<Starting> {
        let receiver = self.receivers.get(&id)?;
        if receiver.open.as_ref()?.starting.is_none() {
            let received = Arc::clone(&receiver.open.as_ref()?.interest);
            self.aim(id);
            let admitted = self.admit(id, Arc::clone(&received));
            let receiver = self.receivers.get_mut(&id)?;
            if !Arc::ptr_eq(&admitted, &received) {
                receiver.interest_widened = true;
                receiver.open.as_mut()?.interest = Arc::clone(&admitted);
            }
            let received = admitted;
            let interest = Unions::default().of(&received, &self.receivers.get(&id)?.target);
            let (opening_class, class) = (self.acquire_class(&received), self.acquire_class(&interest));
            let open = self.receivers.get_mut(&id)?.open.as_mut()?;
            open.starting = Some(Starting { opening_class, class, interest });
        }
        let starting = |it: &Self| it.receivers.get(&id)?.open.as_ref()?.starting.clone();
        for class in [starting(self)?.opening_class, starting(self)?.class] {
            if !self.classes.is_built(class) {
                self.build_class(class);
                // One part at a time.
                break;
            }
        }
        let now = starting(self)?;
        let is_built = self.classes.is_built(now.opening_class) && self.classes.is_built(now.class);
        is_built.then(|| self.receivers.get_mut(&id)?.open.as_mut()?.starting.take()).flatten()
    }

    /// Whether there is an origin that the receiver lacks and does not wait for.
    fn has_unsent_origin(&self, id: ReceiverId) -> bool {
        let Some(receiver) = self.receivers.get(&id) else { return false };
        let is_unsent = |(number, cursor): (usize, &Cursor)| {
            self.origins[number].as_ref().is_some_and(|origin| {
                origin.synced
                    && !matches!(cursor.wants, Wants::Changes)
                    && !receiver.due.contains(&origin.name)
                    && self.sees(&receiver.cluster, &origin.name)
            })
        };
        receiver.cursors.iter().any(is_unsent)
    }
}

fn is_busy(origins: &[Option<Origin>], number: usize) -> bool {
    origins[number].as_ref().is_some_and(Origin::is_busy)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::message::{PublishRequest, WrittenScope, WrittenSelection};
    use crate::model::{ClusterState, Federation, GrantAll, Lease};

    /// A hub with cluster `a`.
    fn federation(revision: u64) -> Federation {
        let state = ClusterState {
            labels: Default::default(),
            grant: Arc::new(GrantAll),
            grant_token: 1,
            cidrs: Vec::new(),
            lease: Lease::Live,
            federated_allow_final: false,
            visible_to: None,
        };
        Federation {
            position: Position { epoch: 1, revision },
            clusters: [("a".into(), state)].into(),
            ..Federation::default()
        }
    }

    #[test]
    fn change_that_does_not_concern_a_receiver_moves_its_position() {
        let mut exchange = Exchange::new();
        exchange.set_federation(federation(1));
        let open = WatchOpen { protocol: PROTOCOL, ..WatchOpen::default() };
        let id = exchange.watch_open("a".into(), open).expect("opened");
        let sent = |exchange: &mut Exchange| {
            let all = std::iter::from_fn(|| exchange.next(id));
            let ends =
                all.filter_map(
                    |response| if let Response::End { position, .. } = response { Some(position) } else { None },
                );
            ends.map(|position| position.revision).collect::<Vec<_>>()
        };
        assert_eq!(sent(&mut exchange), [1]);
        assert!(sent(&mut exchange).is_empty());
        exchange.set_federation(federation(2));
        assert!(exchange.take_ready().into_iter().any(|ready| ready == id));
        assert_eq!(sent(&mut exchange), [2]);
    }

    #[test]
    fn request_that_changes_nothing_does_not_wake_the_receiver() {
        let mut exchange = Exchange::new();
        exchange.set_federation(federation(1));
        let open = WatchOpen { protocol: PROTOCOL, ..WatchOpen::default() };
        let id = exchange.watch_open("a".into(), open).expect("opened");
        while exchange.next(id).is_some() {}
        exchange.take_ready();
        let at = exchange.federation().position;
        let mut wakes = |request| {
            exchange.watch(id, request).expect("the protocol");
            !exchange.take_ready().is_empty()
        };
        assert!(!wakes(WatchRequest::InForce { interest: 7, hub: at }));
        assert!(!wakes(WatchRequest::Mismatch { origin: Some("unknown".into()) }));
        assert!(wakes(WatchRequest::InForce { interest: 1, hub: at }));
        assert!(wakes(WatchRequest::Mismatch { origin: None }));
    }

    fn selections(texts: impl Iterator<Item = String>) -> Vec<WrittenSelection> {
        let selection = |selector| WrittenSelection { clusters: WrittenScope::All, selector, port_names: Vec::new() };
        texts.map(selection).collect()
    }

    /// The selectors that a receiver of `a` is sent as its interest, and whether as a whole.
    fn interest_of(exchange: &mut Exchange, id: ReceiverId) -> (BTreeSet<String>, bool) {
        let (mut interest, mut is_whole) = (BTreeSet::new(), false);
        loop {
            match exchange.next(id) {
                Some(Response::Interest(change)) => {
                    is_whole |= change.whole;
                    change.removed.iter().for_each(|it| _ = interest.remove(&it.selector));
                    interest.extend(change.added.into_iter().map(|it| it.selector));
                }
                Some(_) => {}
                None if exchange.is_building(id) => {}
                None => return (interest, is_whole),
            }
        }
    }

    fn everything() -> BTreeSet<String> {
        ["all()".to_owned()].into()
    }

    #[test]
    fn opening_with_too_many_underived_selections_is_sent_everything() {
        for (count, is_widened) in [(32_768, false), (32_769, true)] {
            let mut exchange = Exchange::new();
            exchange.set_federation(federation(1));
            let interest = selections((0..count).map(|at| format!("a == '{at}'")));
            let open = WatchOpen { protocol: PROTOCOL, interest, ..WatchOpen::default() };
            let id = exchange.watch_open("a".into(), open).expect("opened");
            let (added, is_whole) = interest_of(&mut exchange, id);
            assert_eq!((added, is_whole), (if is_widened { everything() } else { BTreeSet::new() }, is_widened));
        }
    }

    #[test]
    fn bounds_underived_selections_over_all_streams_of_a_cluster() {
        let mut exchange = Exchange::new();
        exchange.set_federation(federation(1));
        // Nothing excludes labels from these.
        let own = |of: std::ops::Range<u32>| selections(of.map(|at| format!("!has(a{at})")));
        let open = |exchange: &mut Exchange, of| {
            let open = WatchOpen { protocol: PROTOCOL, own: own(of), ..WatchOpen::default() };
            let id = exchange.watch_open("a".into(), open).expect("opened");
            (id, interest_of(exchange, id).0)
        };
        let (first, interest) = open(&mut exchange, 0..200);
        assert_eq!(interest.len(), 200);
        assert_eq!(open(&mut exchange, 0..200).1.len(), 200, "another stream of the same member");
        assert_eq!(open(&mut exchange, 100..256).1.len(), 156);
        let (fourth, interest) = open(&mut exchange, 200..257);
        assert_eq!(interest, everything());
        assert_eq!(exchange.receivers.values().filter(|it| it.claims.is_empty()).count(), 1);
        // A stream that ends, or replaces what it claimed, leaves room.
        exchange.watch(first, WatchRequest::Own(own(0..1))).expect("the protocol");
        interest_of(&mut exchange, first);
        let at = exchange.federation().position;
        exchange.watch(first, WatchRequest::InForce { interest: 1, hub: at }).expect("the protocol");
        interest_of(&mut exchange, first);
        let ids: Vec<ReceiverId> =
            exchange.receivers.keys().copied().filter(|id| *id != first && *id != fourth).collect();
        ids.into_iter().for_each(|id| exchange.watch_close(id));
        assert_eq!(open(&mut exchange, 1..256).1.len(), 255);
    }

    #[test]
    fn receiver_that_does_not_acknowledge_is_sent_everything_instead_of_its_interest() {
        let mut exchange = Exchange::new();
        exchange.set_federation(federation(1));
        let own = selections(["has(a)".to_owned()].into_iter());
        let open = WatchOpen { protocol: PROTOCOL, own, ..WatchOpen::default() };
        let id = exchange.watch_open("a".into(), open).expect("opened");
        interest_of(&mut exchange, id);
        exchange.widen(id);
        assert_eq!(interest_of(&mut exchange, id).0, BTreeSet::new(), "it keeps nothing");
        exchange.watch(id, WatchRequest::Own(Vec::new())).expect("the protocol");
        assert!(exchange.keeps_replaced(id));
        exchange.take_ready();
        exchange.widen(id);
        assert!(exchange.take_ready().contains(&id));
        assert_eq!(interest_of(&mut exchange, id).0, everything());
        assert!(!exchange.keeps_replaced(id) && exchange.receivers[&id].claims.is_empty());
        // It shrinks once it is acknowledged.
        let at = exchange.federation().position;
        exchange.watch(id, WatchRequest::InForce { interest: 2, hub: at }).expect("the protocol");
        interest_of(&mut exchange, id);
        assert_eq!(exchange.receivers[&id].interest.len(), 0);
    }

    #[test]
    fn batch_without_updates_wakes_no_receiver() {
        let mut with_b = federation(1);
        let state = with_b.clusters["a"].clone();
        with_b.clusters.insert("b".into(), state);
        let mut exchange = Exchange::new();
        exchange.set_federation(with_b);
        let of_b = exchange.publish_open("b".into());
        let batch = |exchange: &mut Exchange, snapshot, revision| {
            exchange.publish(of_b, PublishRequest::Begin { snapshot }).expect("the protocol");
            let end = PublishRequest::End { position: Position { epoch: 1, revision }, digest: None };
            exchange.publish(of_b, end).expect("the protocol");
        };
        let open = PublishRequest::Open { protocol: PROTOCOL, epoch: 1, instance: Default::default(), yields: false };
        exchange.publish(of_b, open).expect("the protocol");
        let open = WatchOpen { protocol: PROTOCOL, ..WatchOpen::default() };
        let id = exchange.watch_open("a".into(), open).expect("opened");
        batch(&mut exchange, true, 1);
        while exchange.next(id).is_some() {}
        exchange.take_ready();
        batch(&mut exchange, false, 1_000_000);
        assert!(exchange.take_ready().is_empty() && exchange.next(id).is_none());
    }
}
