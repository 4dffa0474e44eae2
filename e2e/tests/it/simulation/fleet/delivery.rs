//! Delivery of messages: every message passes through the codec as bytes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use hanse_exchange::codec;
use hanse_exchange::hub::{Next, Published};
use hanse_exchange::member::model::{Change, Position};
use hanse_exchange::member::publisher::{ChangedExports, PublishSession, Publisher};
use hanse_exchange::message::{PublishResponse, WatchRequest, WatchResponse};
use hanse_exchange::model as hub;
use hanse_policy::inventory::Cluster;
use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;

use super::{Fleet, MEMBERS, Member, Publishing, Registered, name};

/// The limit of messages until a fleet settles, far above what these tests need.
const MAX_MESSAGES: usize = 200_000;

/// Stores the publisher; returns the bytes on disk.
fn store(publisher: &mut Publisher) -> Vec<u8> {
    let (bytes, reserved) = publisher.store();
    publisher.stored(reserved);
    bytes
}

/// Publishes the difference between two states of a cluster.
fn publish_difference(publisher: &mut Publisher, before: &Cluster, now: &Cluster) {
    fn of<K: Ord + Clone, V: PartialEq>(before: &BTreeMap<K, V>, now: &BTreeMap<K, V>) -> BTreeSet<K> {
        before.keys().chain(now.keys()).filter(|key| before.get(key) != now.get(key)).cloned().collect()
    }
    let changed = ChangedExports {
        namespaces: &of(&before.namespaces, &now.namespaces),
        service_accounts: &of(&before.service_accounts, &now.service_accounts),
        endpoints: &of(&before.endpoints, &now.endpoints),
    };
    publisher.publish(now, changed);
}

/// Encodes and decodes a message.
pub(super) fn over_the_wire_to_hub(request: WatchRequest) -> WatchRequest {
    let bytes = prost::Message::encode_to_vec(&codec::watch::encode_request(request));
    let request: pb::WatchRequest = prost::Message::decode(&bytes[..]).expect("what was encoded");
    codec::watch::decode_request(request).expect("a known kind")
}

pub(super) fn over_the_wire_to_publisher(response: PublishResponse) -> PublishResponse {
    let bytes = prost::Message::encode_to_vec(&codec::publish::encode_response(response));
    let response: pb::PublishResponse = prost::Message::decode(&bytes[..]).expect("what was encoded");
    codec::publish::decode_response(response).expect("a known kind")
}

impl Fleet<'_> {
    pub(super) fn publish(&mut self, member: usize) {
        let it = &mut self.members[member];
        publish_difference(&mut it.publisher, &it.published_state, &it.truth);
        it.published_state = it.truth.clone();
        // Sometimes store earlier than required.
        if it.publisher.must_store() || self.random.below(4) == 0 {
            it.stored_publisher = store(&mut it.publisher);
        }
        self.record_history(member);
    }

    pub(super) fn record_history(&mut self, member: usize) {
        let it = &self.members[member];
        let Position { epoch, revision } = it.publisher.position();
        self.history.insert((it.name.clone(), epoch, revision), Arc::new(it.truth.clone()));
    }

    pub(super) fn send_federation(&mut self) {
        self.revision += 1;
        let cluster = |(name, it): (&ClusterName, &Registered)| {
            let token = format!("{:?} {:?}", it.grant, it.visible_to);
            let state = hub::ClusterState {
                labels: Default::default(),
                grant: Arc::new(it.grant.clone()),
                grant_token: u64::from_le_bytes(blake3::hash(token.as_bytes()).as_bytes()[..8].try_into().expect("8")),
                cidrs: Vec::new(),
                lease: it.lease,
                federated_allow_final: false,
                visible_to: it.visible_to.clone(),
            };
            (name.clone(), state)
        };
        let manifest = |(policy, number): (&Arc<str>, &u64)| {
            let version = &self.versions[number];
            let manifest = hub::FederatedManifest {
                json: number.to_string().into(),
                enforcers: Some(version.enforcers.clone()),
                also_for: BTreeSet::new(),
                resolved: BTreeMap::new(),
                interest: version.interest.clone(),
                features: Vec::new(),
            };
            // One of them is staged, which is distributed like the others.
            let kind = if &**policy == "c" { hub::ManifestKind::StagedPolicy } else { hub::ManifestKind::Policy };
            ((kind, policy.clone()), Arc::new(manifest))
        };
        self.exchange.set_federation_part(hub::Federation {
            position: hub::Position { epoch: 1, revision: self.revision },
            clusters: self.registered.iter().map(cluster).collect(),
            manifests: self.policies.iter().map(manifest).collect(),
        });
    }

    /// Opens the publish stream, or delivers one message to the hub. Returns whether there was anything to do.
    pub(super) fn deliver_published(&mut self, member: usize) -> bool {
        if self.exchange.regrants() > 0 {
            self.exchange.regrant_more();
            self.count("grant applied in parts");
            return true;
        }
        let it = &mut self.members[member];
        let is_idle = it.publishing.as_ref().is_some_and(|stream| !stream.applying && stream.outbox.is_empty());
        if let Some(id) = it.closed.last().copied()
            && (is_idle || self.random.below(2) == 0)
        {
            match self.exchange.publish_more(id) {
                Ok(Published::More) => self.count("rest of a closed stream applied"),
                _ => drop(it.closed.pop()),
            }
            return true;
        }
        if !self.registered.contains_key(&it.name) {
            return false;
        }
        let Some(stream) = it.publishing.as_mut() else {
            let open = PublishSession::open(&it.publisher, &[0; 16], false);
            let id = self.exchange.publish_open(it.name.clone());
            let (session, outbox) = (PublishSession::default(), VecDeque::from([open]));
            it.publishing = Some(Publishing { id, session, outbox, applying: false });
            return true;
        };
        if !stream.applying && stream.outbox.is_empty() {
            if it.publisher.must_store() {
                it.stored_publisher = store(&mut it.publisher);
            }
            stream.outbox.extend(stream.session.poll(&it.publisher));
        }
        let published = if stream.applying {
            self.exchange.publish_more(stream.id)
        } else {
            let Some(request) = stream.outbox.pop_front() else { return false };
            let bytes = prost::Message::encode_to_vec(&codec::publish::encode_request(request));
            it.published += bytes.len();
            let request = prost::Message::decode(&bytes[..]).expect("what was encoded");
            let request = codec::publish::decode_request(request).expect("what a member writes the hub reads");
            self.exchange.publish_part(stream.id, request)
        };
        match published.expect("the protocol") {
            Published::Answers(answers) => {
                stream.applying = false;
                for answer in answers {
                    stream.session.take(&mut it.publisher, over_the_wire_to_publisher(answer));
                }
            }
            Published::More => {
                stream.applying = true;
                self.count("batch applied in parts");
            }
        }
        if let Some(registered) = self.registered.get_mut(&name(member))
            && registered.lease == hub::Lease::NeverConnected
        {
            registered.lease = hub::Lease::Live;
            self.send_federation();
        }
        self.record_history(member);
        true
    }

    /// Opens the watch stream, or delivers one message to the receiver. Returns whether there was anything to do.
    pub fn deliver_one(&mut self, member: usize) -> bool {
        let it = &mut self.members[member];
        if it.stalled || !self.registered.contains_key(&it.name) {
            return false;
        }
        let Some(id) = it.watching else {
            let WatchRequest::Open(open) = over_the_wire_to_hub(it.receiver.open()) else { panic!("not an opening") };
            it.watching = Some(self.exchange.watch_open(it.name.clone(), open).expect("accepted"));
            it.snapshots_since_open = 0;
            return true;
        };
        if let Some(evaluated) = it.evaluated.take() {
            self.exchange.take_evaluated(&evaluated);
            return true;
        }
        let response = match self.exchange.next_step(id) {
            Next::Message(response) => response,
            // The hub evaluates the next interest in parts, while everything may change.
            Next::Evaluate(evaluation) => {
                it.evaluated = Some(evaluation.evaluate());
                self.count("interest evaluated outside the exchange");
                return true;
            }
            Next::Building => {
                self.count("interest evaluated in parts");
                return true;
            }
            Next::Nothing => return false,
        };
        let bytes = prost::Message::encode_to_vec(&codec::watch::encode_response(response));
        it.received += bytes.len();
        let response = prost::Message::decode(&bytes[..]).expect("what was encoded");
        let response = codec::watch::decode_response(response).expect("what the hub writes a member reads");
        let response = response.expect("a known kind");
        let mut resumed = None;
        match &response {
            WatchResponse::Begin { origin: Some(_), snapshot, .. } => {
                it.snapshots_since_open += usize::from(*snapshot);
                resumed = Some(*snapshot);
            }
            WatchResponse::Withdrawn { cluster } => drop(it.positions.remove(cluster)),
            _ => {}
        }
        let requests = it.receiver.take(response).expect("the protocol");
        if let Some(snapshot) = resumed {
            self.count(if snapshot { "snapshot" } else { "resumed without a snapshot" });
        }
        for request in requests {
            self.exchange.watch(id, over_the_wire_to_hub(request)).expect("the protocol");
        }
        self.take_changes(member, false);
        true
    }

    /// Applies changes like the member's process, and checks the result.
    pub(super) fn take_changes(&mut self, member: usize, restored: bool) {
        let waiting = self.members[member].receiver.waiting().0;
        if !waiting.is_empty() {
            self.count("policy waited");
        }
        let Some(updates) = self.members[member].receiver.take_updates() else { return };
        let mut came = BTreeSet::new();
        for change in updates.changes {
            let it = &mut self.members[member];
            change.apply(&mut it.view);
            match change {
                Change::Manifest { name, manifest: None, .. } => drop(it.in_force.remove(&name)),
                Change::Manifest { name: policy, manifest: Some(manifest), .. } => {
                    let number = std::str::from_utf8(&manifest.json).expect("text").parse().expect("a number");
                    it.in_force.insert(policy, number);
                    came.insert(number);
                }
                Change::Cluster { name, record: None } | Change::Withdrawn { name } => drop(it.positions.remove(&name)),
                Change::Endpoint { cluster, id, endpoint: None } => {
                    let there = |it: &Member| it.name == cluster && it.truth.endpoints.contains_key(&id);
                    if self.members.iter().any(there) {
                        self.count("left interest");
                    }
                }
                Change::Cluster { .. }
                | Change::Namespace { .. }
                | Change::ServiceAccount { .. }
                | Change::Endpoint { .. } => {}
            }
        }
        // Changes of one batch count together: a version may have been replaced within it.
        let it = &self.members[member];
        let came: Vec<u64> = it.in_force.values().copied().filter(|number| came.contains(number)).collect();
        for number in came.into_iter().filter(|_| !restored) {
            self.check_new_version(member, number);
        }
        self.check(member);
    }

    /// Delivers messages until there are none.
    pub fn pump(&mut self) {
        let mut moved = true;
        let mut messages = 0;
        while moved {
            moved = false;
            for member in 0..MEMBERS {
                while self.deliver_published(member) {
                    (moved, messages) = (true, messages + 1);
                }
                while self.deliver_one(member) {
                    (moved, messages) = (true, messages + 1);
                }
                assert!(messages < MAX_MESSAGES, "{}: it does not settle", self.at);
            }
        }
    }
}
