//! The simulated fleet: real cores, simulated connections, and the truth that they are compared with.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use hanse_api::Object;
use hanse_api::manifest::{Manifests, read_bytes};
use hanse_exchange::codec;
use hanse_exchange::hub::{Exchange, PublishId, Published, ReceiverId};
use hanse_exchange::interest::{self, Interest, Wanted, WrittenScope, WrittenSelection};
use hanse_exchange::member::model::{Change, ClusterRecord, Position};
use hanse_exchange::member::publisher::{ChangedExports, PublishSession, Publisher};
use hanse_exchange::member::receiver::{ReceiveProblem, Receiver};
use hanse_exchange::message::{PublishRequest, PublishResponse, WatchRequest, WatchResponse};
use hanse_exchange::model as hub;
use hanse_policy::inventory::{
    Cluster, EffectiveLabels, Endpoint, EndpointId, EndpointKind, Inventory, LabelGrant, Namespace,
};
use hanse_policy::model::{ClusterName, ClusterScope};
use hanse_policy::selector::{Expr, Selector};
use hanse_policy::tri::Tri;
use hanse_proto::federation::v1 as pb;

pub const MEMBERS: usize = 4;
const NAMESPACES: [&str; 3] = ["train", "serve", "secret"];
const SELECTORS: [&str; 7] =
    ["app == 'web'", "app == 'db'", "has(app)", "all()", "app != 'web'", "pcns.stage == 'prod'", "!has(gpu)"];
/// More messages than any fleet of these tests has to say: beyond, it never comes to rest.
const MOST_MESSAGES: usize = 200_000;

/// What is on disk from now on.
fn store(publisher: &mut Publisher) -> Vec<u8> {
    let (bytes, reserved) = publisher.store();
    publisher.stored(reserved);
    bytes
}

/// Publishes what differs between two states of a cluster.
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

/// A generator whose whole state is its seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// Everything but some namespaces.
#[derive(Debug, Clone, Default)]
struct Grant {
    denied: BTreeSet<&'static str>,
}

impl hub::Grant for Grant {
    fn permits_namespace(&self, name: &str) -> bool {
        !self.denied.contains(name)
    }
    fn permits_address(&self, _: IpAddr) -> bool {
        true
    }
    fn permits_label(&self, _: &str, _: &str) -> bool {
        true
    }
    fn label_grant(&self) -> LabelGrant {
        LabelGrant::default()
    }
    fn max_endpoints(&self) -> usize {
        usize::MAX
    }
    fn max_label_sets(&self) -> usize {
        usize::MAX
    }
}

/// What the hub's store says of a cluster.
#[derive(Debug, Clone)]
struct Registered {
    grant: Grant,
    lease: hub::Lease,
    visible_to: Option<BTreeSet<ClusterName>>,
}

struct Member {
    name: ClusterName,
    truth: Cluster,
    addresses: u32,
    publisher: Publisher,
    /// As the publisher has it.
    told: Cluster,
    stored_publisher: Vec<u8>,
    receiver: Receiver,
    stored_receiver: Vec<u8>,
    /// As it is written: an earlier version of the member registers what the hub cannot read.
    own: Vec<WrittenSelection>,
    /// Kept by changes alone.
    view: Inventory,
    in_force: BTreeMap<Arc<str>, u64>,
    publishing: Option<Publishing>,
    watching: Option<ReceiverId>,
    stalled: bool,
    received: usize,
    published: usize,
    /// Origins of which this receiver has endpoints, according to the hub.
    held: BTreeMap<ClusterName, Position>,
    /// Clusters that were ever hidden from it.
    hidden: BTreeSet<ClusterName>,
    snapshots_since_open: usize,
}

struct Publishing {
    id: PublishId,
    session: PublishSession,
    outbox: VecDeque<PublishRequest>,
    /// The hub has applied a part of the last batch.
    applying: bool,
}

/// A version of a policy: what it can select, and the state of the hub when it was applied.
struct Version {
    interest: Interest,
    enforcers: BTreeSet<ClusterName>,
    /// Origins that were published at the hub then, unless the hub restarted since.
    synced: BTreeMap<ClusterName, Position>,
}

pub struct Fleet<'a> {
    random: Random,
    counts: &'a mut BTreeMap<&'static str, usize>,
    pub at: String,
    members: Vec<Member>,
    exchange: Exchange,
    registered: BTreeMap<ClusterName, Registered>,
    policies: BTreeMap<Arc<str>, u64>,
    versions: BTreeMap<u64, Version>,
    revision: u64,
    /// What each cluster was at each of its positions.
    history: BTreeMap<(ClusterName, u64, u64), Arc<Cluster>>,
}

/// 400 names of 58 bytes, of which `web` is none.
fn too_long() -> Expr {
    Expr::In("app".into(), (0..400).map(|it| format!("{it:058}").into()).collect())
}

fn written(selector: &Selector) -> WrittenSelection {
    let selector = selector.canonical.to_string();
    WrittenSelection { clusters: WrittenScope::All, selector, port_names: Vec::new() }
}

/// What one side writes, the other reads.
fn over_the_wire_to_hub(request: WatchRequest) -> WatchRequest {
    let bytes = prost::Message::encode_to_vec(&codec::watch::encode_request(request));
    let request: pb::WatchRequest = prost::Message::decode(&bytes[..]).expect("what was encoded");
    codec::watch::decode_request(request).expect("a known kind")
}

fn over_the_wire_to_publisher(response: PublishResponse) -> PublishResponse {
    let bytes = prost::Message::encode_to_vec(&codec::publish::encode_response(response));
    let response: pb::PublishResponse = prost::Message::decode(&bytes[..]).expect("what was encoded");
    codec::publish::decode_response(response).expect("a known kind")
}

/// A hub that applies large batches in parts: of most batches here.
fn exchange() -> Exchange {
    let mut exchange = Exchange::new();
    exchange.set_slice(3);
    exchange
}

fn name(member: usize) -> ClusterName {
    format!("cluster-{member}").into()
}

fn pod(namespace: &str, name: &str) -> EndpointId {
    EndpointId { kind: EndpointKind::Pod, namespace: Some(namespace.into()), name: name.into() }
}

impl<'a> Fleet<'a> {
    pub fn new(random: Random, counts: &'a mut BTreeMap<&'static str, usize>) -> Self {
        let member = |number| Member {
            name: name(number),
            truth: Cluster::default(),
            addresses: 0,
            publisher: Publisher::new(1),
            told: Cluster::default(),
            stored_publisher: Vec::new(),
            receiver: Receiver::default(),
            stored_receiver: Vec::new(),
            own: Vec::new(),
            view: Inventory::default(),
            in_force: BTreeMap::new(),
            publishing: None,
            watching: None,
            stalled: false,
            received: 0,
            published: 0,
            held: BTreeMap::new(),
            hidden: BTreeSet::new(),
            snapshots_since_open: 0,
        };
        let mut fleet = Self {
            random,
            counts,
            at: "at the start".to_owned(),
            members: (0..MEMBERS).map(member).collect(),
            exchange: exchange(),
            registered: BTreeMap::new(),
            policies: BTreeMap::new(),
            versions: BTreeMap::new(),
            revision: 0,
            history: BTreeMap::new(),
        };
        for number in 0..MEMBERS {
            let new = Registered { grant: Grant::default(), lease: hub::Lease::NeverConnected, visible_to: None };
            fleet.registered.insert(name(number), new);
            for namespace in NAMESPACES {
                let labels = [("stage".into(), "prod".into())].into_iter().collect();
                fleet.members[number].truth.namespaces.insert(namespace.into(), Namespace { labels });
            }
            fleet.publish(number);
        }
        fleet.tell_federation();
        fleet
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    // What can happen.

    pub fn something_happens(&mut self) {
        let member = self.random.below(MEMBERS);
        match self.random.below(100) {
            0..16 => {
                let (pod, value) = (format!("pod-{}", self.random.below(8)), self.random.one(&["web", "db", "cache"]));
                match self.random.below(3) {
                    0 => self.remove_pod(member, &pod),
                    1 => self.set_pod(member, &pod, "app", value),
                    _ => self.set_pod(member, &pod, "gpu", value),
                }
                self.count("pod changed");
            }
            16..18 => {
                let (namespace, stage) = (self.random.one(&NAMESPACES), self.random.one(&["prod", "dev"]));
                let labels = [("stage".into(), stage.into())].into_iter().collect();
                self.members[member].truth.namespaces.insert(namespace.into(), Namespace { labels });
                self.publish(member);
                self.count("namespace changed");
            }
            18..23 => {
                let (policy, selector) = (self.random.one(&["a", "b", "c"]), self.random.one(&SELECTORS));
                let enforcers: Vec<usize> = (0..MEMBERS).filter(|_| self.random.below(2) == 0).collect();
                let clusters = match self.random.below(3) {
                    0 => ClusterScope::Named([name(0), name(1)].into()),
                    _ => ClusterScope::All,
                };
                self.apply_policy(policy, selector, &enforcers, clusters);
                self.count("policy applied");
            }
            23 => {
                let policy = self.random.one(&["a", "b", "c"]);
                if self.policies.remove(policy).is_some() {
                    self.tell_federation();
                    self.count("policy deleted");
                }
            }
            24 => self.change_own_interest(member),
            25 => self.cut_publish(member),
            26 => self.cut_watch(member),
            27 if self.random.below(4) == 0 => self.restart_hub(),
            28 if self.random.below(4) == 0 => self.restart_member(member),
            29 => self.change_lease(member),
            30 if self.random.below(2) == 0 => self.change_grant(member),
            31 if self.random.below(3) == 0 => match self.registered.contains_key(&name(member)) {
                true => self.withdraw(member),
                false => self.come(member),
            },
            32 => {
                let stored = self.members[member].receiver.store();
                self.members[member].stored_receiver = stored;
            }
            33..66 => drop(self.deliver_published(member)),
            _ => drop(self.deliver_one(member)),
        }
    }

    /// As one change.
    pub fn set_pods(&mut self, member: usize, pods: impl Iterator<Item = (String, &'static str)>) {
        pods.for_each(|(pod, value)| self.label_pod(member, &pod, "app", value));
        self.publish(member);
    }

    pub fn set_pod(&mut self, member: usize, pod: &str, key: &str, value: &str) {
        self.label_pod(member, pod, key, value);
        self.publish(member);
    }

    fn label_pod(&mut self, member: usize, pod_name: &str, key: &str, value: &str) {
        let place = pod_name.len() + pod_name.bytes().map(usize::from).sum::<usize>();
        let id = pod(NAMESPACES[place % NAMESPACES.len()], pod_name);
        let it = &mut self.members[member];
        it.addresses += 1;
        let fresh = IpAddr::from(Ipv4Addr::from(0x0a00_0000 + (member as u32) * 0x1_0000 + it.addresses));
        let endpoint =
            it.truth.endpoints.entry(id).or_insert_with(|| Endpoint { addresses: vec![fresh], ..Endpoint::default() });
        endpoint.labels.insert(key.into(), value.into());
    }

    pub fn remove_pod(&mut self, member: usize, pod_name: &str) {
        self.members[member].truth.endpoints.retain(|id, _| *id.name != *pod_name);
        self.publish(member);
    }

    pub fn apply_policy(&mut self, policy: &str, selector: &str, enforcers: &[usize], clusters: ClusterScope) {
        let selector = Selector::parse(selector).expect("a selector");
        let wanted = Wanted::new(clusters, &selector, BTreeSet::new());
        self.apply_interest(policy, [Arc::new(wanted)].into(), enforcers);
    }

    /// A policy as its author writes it (JSON), with what the hub derives of it.
    pub fn apply_manifest(&mut self, policy: &str, manifest: &str, enforcers: &[usize]) {
        let mut read = Manifests::default();
        read_bytes(&"policy".into(), manifest.as_bytes(), &mut read);
        assert_eq!(read.diagnostics, []);
        let Some(Object::FederatedPolicy(written)) = read.objects.pop().map(|it| it.object) else {
            panic!("not a federated policy")
        };
        let converted = written.among(&BTreeMap::new(), &BTreeMap::new());
        self.apply_interest(policy, interest::derive([&converted], interest::DERIVED), enforcers);
    }

    fn apply_interest(&mut self, policy: &str, interest: Interest, enforcers: &[usize]) {
        let number = self.versions.len() as u64 + 1;
        let version = Version {
            interest,
            enforcers: enforcers.iter().map(|member| name(*member)).collect(),
            synced: BTreeMap::new(),
        };
        self.versions.insert(number, version);
        self.policies.insert(policy.into(), number);
        self.tell_federation();
        let synced = (0..MEMBERS).map(name).filter_map(|cluster| {
            let origin = self.exchange.origin(&cluster).filter(|origin| origin.synced)?;
            let at = Position { epoch: origin.position.epoch, revision: origin.position.revision };
            Some((cluster, at))
        });
        let synced: BTreeMap<ClusterName, Position> = synced.collect();
        self.versions.get_mut(&number).expect("just made").synced = synced;
    }

    fn change_own_interest(&mut self, member: usize) {
        // An earlier version of the member registers what the hub cannot read.
        let selector = match self.random.below(6) {
            0 => Selector::from(too_long()),
            _ => Selector::parse(self.random.one(&SELECTORS)).expect("a selector"),
        };
        let own = if self.random.below(3) == 0 { Vec::new() } else { vec![written(&selector)] };
        self.register(member, own);
        self.count("own interest changed");
    }

    pub fn register_too_long(&mut self, member: usize) {
        self.register(member, vec![written(&Selector::from(too_long()))]);
    }

    pub fn register_nothing(&mut self, member: usize) {
        self.register(member, Vec::new());
    }

    fn register(&mut self, member: usize, own: Vec<WrittenSelection>) {
        let it = &mut self.members[member];
        it.own.clone_from(&own);
        let request = it.receiver.set_own_written(own);
        if let (Some(request), Some(id)) = (request, it.watching) {
            self.exchange.watch(id, over_the_wire_to_hub(request)).expect("the protocol");
        }
    }

    pub fn cut_publish(&mut self, member: usize) {
        if let Some(stream) = self.members[member].publishing.take() {
            self.exchange.publish_close(stream.id);
            self.count("publish stream cut");
        }
    }

    pub fn cut_watch(&mut self, member: usize) {
        if let Some(id) = self.members[member].watching.take() {
            self.exchange.watch_close(id);
            self.members[member].receiver.disconnected();
            self.count("watch stream cut");
        }
    }

    /// Endpoints are gone at the hub, its store is not.
    pub fn restart_hub(&mut self) {
        for it in &mut self.members {
            (it.publishing, it.watching) = (None, None);
            it.receiver.disconnected();
        }
        self.exchange = exchange();
        self.versions.values_mut().for_each(|version| version.synced.clear());
        self.tell_federation();
        self.count("hub restarted");
    }

    /// It goes on from what it wrote down last, or has lost its numbering.
    fn restart_member(&mut self, member: usize) {
        self.cut_publish(member);
        self.cut_watch(member);
        let lost = self.random.below(4) == 0;
        let it = &mut self.members[member];
        it.receiver = Receiver::restore(&it.stored_receiver).unwrap_or_default();
        (it.view, it.in_force, it.held) = Default::default();
        it.publisher = match lost {
            true => Publisher::new(it.publisher.position().epoch + 1),
            false => Publisher::restore(&it.stored_publisher).expect("what was stored"),
        };
        it.receiver.set_own_written(it.own.clone());
        it.held = it.receiver.origins().into_iter().map(|(name, status)| (name, status.position)).collect();
        self.take_changes(member, true);
        self.publish(member);
        self.count(if lost { "numbering lost" } else { "member restarted" });
    }

    /// Without what it wrote down.
    pub fn start_anew(&mut self, member: usize) {
        self.members[member].stored_receiver.clear();
        self.restart_member(member);
    }

    fn change_lease(&mut self, member: usize) {
        let Some(it) = self.registered.get_mut(&name(member)) else { return };
        it.lease = match it.lease {
            hub::Lease::NeverConnected => return,
            hub::Lease::Live => hub::Lease::Stale { silent_ms: 30_000 },
            hub::Lease::Stale { .. } => hub::Lease::Live,
        };
        self.tell_federation();
        self.count("lease ended");
    }

    fn change_grant(&mut self, member: usize) {
        let someone = name(self.random.below(MEMBERS));
        let Some(it) = self.registered.get_mut(&name(member)) else { return };
        match self.random.below(3) {
            0 => {
                for other in self.members.iter_mut().filter(|other| other.name != someone) {
                    other.hidden.insert(name(member));
                }
                it.visible_to = Some([someone, name(member)].into());
            }
            1 => it.visible_to = None,
            _ if it.grant.denied.is_empty() => drop(it.grant.denied.insert("secret")),
            _ => it.grant.denied.clear(),
        }
        // What is granted from now on comes as a new cluster does, after policies.
        for version in self.versions.values_mut() {
            version.synced.remove(&name(member));
        }
        self.tell_federation();
        self.count("grant changed");
    }

    pub fn withdraw(&mut self, member: usize) {
        self.registered.remove(&name(member));
        self.cut_publish(member);
        self.cut_watch(member);
        for version in self.versions.values_mut() {
            version.synced.remove(&name(member));
        }
        self.tell_federation();
        self.count("cluster withdrawn");
    }

    fn come(&mut self, member: usize) {
        let new = Registered { grant: Grant::default(), lease: hub::Lease::NeverConnected, visible_to: None };
        self.registered.insert(name(member), new);
        self.tell_federation();
        self.count("cluster came");
    }

    pub fn stall(&mut self, member: usize) {
        self.members[member].stalled = true;
    }

    pub fn resume(&mut self, member: usize) {
        self.members[member].stalled = false;
    }

    // Wires.

    fn publish(&mut self, member: usize) {
        let it = &mut self.members[member];
        publish_difference(&mut it.publisher, &it.told, &it.truth);
        it.told = it.truth.clone();
        // What need not be on disk yet is there sometimes.
        if it.publisher.must_store() || self.random.below(4) == 0 {
            it.stored_publisher = store(&mut it.publisher);
        }
        self.remember(member);
    }

    fn remember(&mut self, member: usize) {
        let it = &self.members[member];
        let Position { epoch, revision } = it.publisher.position();
        self.history.insert((it.name.clone(), epoch, revision), Arc::new(it.truth.clone()));
    }

    fn tell_federation(&mut self) {
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
                resolved: BTreeMap::new(),
                interest: version.interest.clone(),
                features: Vec::new(),
            };
            ((hub::ManifestKind::Policy, policy.clone()), Arc::new(manifest))
        };
        self.exchange.set_federation_part(hub::Federation {
            position: hub::Position { epoch: 1, revision: self.revision },
            clusters: self.registered.iter().map(cluster).collect(),
            manifests: self.policies.iter().map(manifest).collect(),
        });
    }

    /// Connects a stream that is not, or moves one message to the hub; whether anything moved.
    fn deliver_published(&mut self, member: usize) -> bool {
        if self.exchange.regrants() > 0 {
            self.exchange.regrant_more();
            self.count("grant applied in parts");
            return true;
        }
        let it = &mut self.members[member];
        if !self.registered.contains_key(&it.name) {
            return false;
        }
        let Some(stream) = it.publishing.as_mut() else {
            let open = PublishSession::open(&it.publisher, &[0; 16]);
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
            self.tell_federation();
        }
        self.remember(member);
        true
    }

    /// Connects a stream that is not, or moves one message to the receiver; whether anything moved.
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
        let Some(response) = self.exchange.next(id) else {
            // It goes on with the class of its next interest.
            let is_building = self.exchange.is_building(id);
            if is_building {
                self.count("interest evaluated in parts");
            }
            return is_building;
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
            WatchResponse::Withdrawn { cluster } => drop(it.held.remove(cluster)),
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

    /// Passes changes on, as the member's process does, and compares the result with the truth.
    fn take_changes(&mut self, member: usize, restored: bool) {
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
                Change::Cluster { name, record: None } | Change::Withdrawn { name } => drop(it.held.remove(&name)),
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
        // Changes that come together count together: a version may have been replaced at once.
        let it = &self.members[member];
        let came: Vec<u64> = it.in_force.values().copied().filter(|number| came.contains(number)).collect();
        for number in came.into_iter().filter(|_| !restored) {
            self.comes_into_force(member, number);
        }
        self.check(member);
    }

    // What must hold.

    /// All that a policy could select when it was applied is there, as new as it was then.
    fn comes_into_force(&mut self, member: usize, number: u64) {
        self.count("policy came into force");
        let (at, it, version) = (&self.at, &self.members[member], &self.versions[&number]);
        let held = it.receiver.origins();
        for (origin, then) in &version.synced {
            let Some(registered) = self.registered.get(origin) else { continue };
            let scope = version.interest.iter().any(|wanted| wanted.clusters().contains(&it.name, origin));
            let seen = registered.visible_to.as_ref().is_none_or(|names| names.contains(&it.name));
            if *origin == it.name || !scope || !seen || self.exchange.origin(origin).is_none_or(|it| !it.synced) {
                continue;
            }
            let now = held.get(origin).map(|status| status.position);
            assert!(now.is_some(), "{at}: {} enforces version {number} without {origin}, at {then:?}", it.name);
            let since = (origin.clone(), then.epoch, then.revision)..=(origin.clone(), u64::MAX, u64::MAX);
            let since: Vec<&Arc<Cluster>> = self.history.range(since).map(|(_, was)| was).collect();
            let then = since[0];
            let view = it.view.clusters.get(origin);
            for (id, endpoint) in &then.endpoints {
                let namespace = id.namespace.as_ref().expect("a pod");
                // Where the pod has changed since, the change is under way.
                let same = registered.grant.denied.is_empty()
                    && since.iter().all(|was| {
                        was.endpoints.get(id) == Some(endpoint)
                            && was.namespaces.get(namespace) == then.namespaces.get(namespace)
                    });
                let labels = EffectiveLabels { cluster: then, id, endpoint, first_hand: false };
                let selects = |wanted: &Arc<Wanted>| {
                    wanted.clusters().contains(&it.name, origin) && wanted.selector().evaluate(&labels) != Tri::No
                };
                if same && version.interest.iter().any(selects) {
                    let there = view.is_some_and(|view| view.endpoints.contains_key(id));
                    assert!(there, "{at}: {} enforces version {number} without {id:?} of {origin}", it.name);
                }
            }
        }
    }

    /// The state of a receiver is a past state of its origins, and covers the policies that are in force.
    fn check(&mut self, member: usize) {
        let (at, it) = (&self.at, &mut self.members[member]);
        let me = &it.name;
        let origins = it.receiver.origins();
        for (origin, before) in &it.held {
            let now = origins.get(origin).map(|status| status.position);
            assert!(
                now >= Some(*before) || it.hidden.contains(origin),
                "{at}: {me} had {origin} at {before:?}, now {now:?}, and nobody said so"
            );
        }
        it.held = origins.iter().map(|(name, status)| (name.clone(), status.position)).collect();
        for (origin, status) in &origins {
            let Position { epoch, revision } = status.position;
            let (from, to) = ((origin.clone(), epoch, 0), (origin.clone(), epoch, revision));
            let Some((_, then)) = self.history.range(from..=to).next_back() else {
                let nothing = it.view.clusters.get(origin).is_none_or(|view| view.endpoints.is_empty());
                assert!(nothing, "{at}: {me} holds {origin} at {epoch}/{revision}, where it never was");
                continue;
            };
            let view = it.view.clusters.get(origin).cloned().unwrap_or_default();
            for (id, endpoint) in &view.endpoints {
                let truth = then.endpoints.get(id);
                let same = truth.is_some_and(|it| it.labels == endpoint.labels && it.addresses == endpoint.addresses);
                assert!(same, "{at}: {me} holds {id:?} of {origin} as {endpoint:?}; at {epoch}/{revision}: {truth:?}");
            }
        }
    }

    fn wanted(&self, member: usize) -> Interest {
        let it = &self.members[member];
        let enforced = self.policies.values().map(|number| &self.versions[number]);
        let enforced = enforced.filter(|version| version.enforcers.contains(&it.name));
        let own = interest::read("own", it.own.clone(), interest::OWN, &mut Default::default());
        own.into_iter().chain(enforced.flat_map(|version| version.interest.iter().cloned())).collect()
    }

    /// The pods of an origin that a receiver must have, by the truth.
    fn expected(&self, member: usize, origin: usize) -> BTreeSet<EndpointId> {
        let (receiver, owner) = (&self.members[member].name, &self.members[origin]);
        let Some(registered) = self.registered.get(&owner.name) else { return BTreeSet::new() };
        if registered.visible_to.as_ref().is_some_and(|names| !names.contains(receiver)) {
            return BTreeSet::new();
        }
        let wanted = self.wanted(member);
        let selected = |(id, endpoint): &(&EndpointId, &Endpoint)| {
            let labels = EffectiveLabels { cluster: &owner.truth, id, endpoint, first_hand: false };
            let namespace = id.namespace.as_deref().unwrap_or_default();
            !registered.grant.denied.contains(namespace)
                && wanted.iter().any(|wanted| {
                    wanted.clusters().contains(receiver, &owner.name) && wanted.selector().evaluate(&labels) != Tri::No
                })
        };
        owner.truth.endpoints.iter().filter(selected).map(|(id, _)| id.clone()).collect()
    }

    /// Until nothing more is said.
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
                assert!(messages < MOST_MESSAGES, "{}: it never comes to rest", self.at);
            }
        }
    }

    pub fn come_to_rest(&mut self) {
        for member in 0..MEMBERS {
            if !self.registered.contains_key(&name(member)) {
                self.come(member);
            }
            self.resume(member);
        }
        for registered in self.registered.values_mut().filter(|it| it.lease != hub::Lease::NeverConnected) {
            registered.lease = hub::Lease::Live;
        }
        self.tell_federation();
        self.pump();
        let at = self.at.clone();
        for (member, it) in self.members.iter().enumerate() {
            let mut in_force: BTreeMap<Arc<str>, u64> = self.policies.clone();
            in_force.retain(|_, number| self.versions[number].enforcers.contains(&it.name));
            assert_eq!(it.in_force, in_force, "{at}: policies of {}", it.name);
            assert!(it.receiver.waiting().0.is_empty(), "{at}: {} waits", it.name);
            for origin in (0..MEMBERS).filter(|origin| *origin != member) {
                let owner = &self.members[origin];
                let view = it.view.clusters.get(&owner.name).cloned().unwrap_or_default();
                let held: BTreeSet<EndpointId> = view.endpoints.keys().cloned().collect();
                assert_eq!(held, self.expected(member, origin), "{at}: {} of {}", it.name, owner.name);
                for (id, endpoint) in &view.endpoints {
                    let truth = &owner.truth.endpoints[id];
                    assert_eq!((&truth.labels, &truth.addresses), (&endpoint.labels, &endpoint.addresses), "{at}");
                    let namespace = id.namespace.as_ref().expect("a pod");
                    assert_eq!(view.namespaces.get(namespace), owner.truth.namespaces.get(namespace), "{at}");
                }
                let digest = it.receiver.origins().get(&owner.name).map_or(0, |status| status.digest);
                let expected = self.exchange.expected_digest(it.watching.expect("connected"), &owner.name);
                assert_eq!(Some(digest), expected.or(Some(0)), "{at}: {} of {}", it.name, owner.name);
            }
            assert_eq!(
                self.exchange.expected_digest(it.watching.expect("connected"), ""),
                Some(it.receiver.hub_digest()),
                "{at}: {}",
                it.name
            );
            let mut everything = Inventory::default();
            it.receiver.everything().iter().for_each(|change| change.apply(&mut everything));
            // Clusters that say nothing are named by records alone.
            everything.clusters.retain(|_, cluster| !cluster.endpoints.is_empty());
            for (cluster, all) in &everything.clusters {
                assert_eq!(Some(&all.endpoints), it.view.clusters.get(cluster).map(|it| &it.endpoints), "{at}");
            }
            let records: BTreeMap<&ClusterName, &ClusterRecord> = it.receiver.clusters().iter().collect();
            assert_eq!(records.len(), self.registered.len(), "{at}");
        }
    }

    // For the tests of single promises.

    /// What a member's receiver says is wrong.
    pub fn problems(&self, member: usize) -> Vec<ReceiveProblem> {
        self.members[member].receiver.problems()
    }

    pub fn delete_policy(&mut self, policy: &str) {
        self.policies.remove(policy);
        self.tell_federation();
    }

    /// Whether some version of a policy is in force.
    pub fn in_force(&self, member: usize, policy: &str) -> bool {
        self.members[member].in_force.contains_key(policy)
    }

    /// Whether a receiver has a pod with this label.
    pub fn sees_label(&self, member: usize, origin: usize, pod_name: &str, key: &str, value: &str) -> bool {
        let view = self.members[member].view.clusters.get(&name(origin));
        let mut pods = view.into_iter().flat_map(|view| &view.endpoints).filter(|(id, _)| *id.name == *pod_name);
        pods.any(|(_, endpoint)| endpoint.labels.get(key).is_some_and(|has| **has == *value))
    }

    pub fn enforces(&self, member: usize, policy: &str) -> bool {
        self.members[member].in_force.get(policy) == self.policies.get(policy)
    }

    pub fn bytes_received(&self, member: usize) -> usize {
        self.members[member].received
    }

    pub fn bytes_published(&self, member: usize) -> usize {
        self.members[member].published
    }

    pub fn holds_any_of(&self, member: usize, origin: usize) -> bool {
        let view = self.members[member].view.clusters.get(&name(origin));
        view.is_some_and(|view| !view.endpoints.is_empty())
    }

    pub fn holds_all_of(&self, member: usize, origin: usize) -> bool {
        let view = self.members[member].view.clusters.get(&name(origin)).cloned().unwrap_or_default();
        view.endpoints.keys().cloned().collect::<BTreeSet<_>>() == self.expected(member, origin)
    }
}
