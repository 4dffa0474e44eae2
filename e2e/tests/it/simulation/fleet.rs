//! The simulated fleet: the real exchange, simulated connections, and the true state for comparison.

mod checks;
mod delivery;
mod events;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use hanse_exchange::hub::{Evaluated, Exchange, PublishId, ReceiverId};
use hanse_exchange::interest::Interest;
use hanse_exchange::member::model::Position;
use hanse_exchange::member::publisher::{PublishSession, Publisher};
use hanse_exchange::member::receiver::Receiver;
use hanse_exchange::message::{PublishRequest, WrittenSelection};
use hanse_exchange::model as hub;
use hanse_policy::inventory::{Cluster, EndpointId, EndpointKind, Inventory, LabelGrant, Namespace};
use hanse_policy::model::ClusterName;

pub const MEMBERS: usize = 4;
const NAMESPACES: [&str; 3] = ["train", "serve", "secret"];
/// A random number generator (SplitMix64).
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

/// Grants everything except some namespaces.
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

/// The registration of a cluster at the hub.
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
    /// The state that was passed to the publisher.
    published_state: Cluster,
    stored_publisher: Vec<u8>,
    receiver: Receiver,
    stored_receiver: Vec<u8>,
    /// Unparsed: earlier versions of the member register selections that the hub cannot read.
    own: Vec<WrittenSelection>,
    /// Maintained from changes only.
    view: Inventory,
    in_force: BTreeMap<Arc<str>, u64>,
    publishing: Option<Publishing>,
    /// Closed streams, whose last batches may be applied only in part.
    closed: Vec<PublishId>,
    watching: Option<ReceiverId>,
    /// Evaluated for its next interest, and not taken over yet.
    evaluated: Option<Evaluated>,
    stalled: bool,
    received: usize,
    published: usize,
    /// The position of each origin at this receiver.
    positions: BTreeMap<ClusterName, Position>,
    /// Clusters that were hidden from this receiver at some time.
    hidden: BTreeSet<ClusterName>,
    snapshots_since_open: usize,
}

struct Publishing {
    id: PublishId,
    session: PublishSession,
    outbox: VecDeque<PublishRequest>,
    /// The hub has applied the last batch partially.
    applying: bool,
}

/// A version of a policy: its interest, and the state of the hub when it was applied.
struct Version {
    interest: Interest,
    enforcers: BTreeSet<ClusterName>,
    /// The origins that were synced at the hub, unless it has restarted since.
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
    /// The state of each cluster at each of its positions.
    history: BTreeMap<(ClusterName, u64, u64), Arc<Cluster>>,
}

/// A hub that applies batches in small parts.
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
            published_state: Cluster::default(),
            stored_publisher: Vec::new(),
            receiver: Receiver::default(),
            stored_receiver: Vec::new(),
            own: Vec::new(),
            view: Inventory::default(),
            in_force: BTreeMap::new(),
            publishing: None,
            closed: Vec::new(),
            watching: None,
            evaluated: None,
            stalled: false,
            received: 0,
            published: 0,
            positions: BTreeMap::new(),
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
        fleet.send_federation();
        fleet
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }
}
