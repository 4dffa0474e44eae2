//! Clusters, namespaces, accounts and endpoints, compactly, with the class of each endpoint's labels.

use std::net::IpAddr;
use std::sync::Arc;

use crate::inventory::{self, Endpoint, EndpointId, EndpointKind, LabelGrant, Labels, NamedPort};
use crate::model::{ClusterName, ClusterScope};
use crate::selector::build;
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use ipnet::IpNet;
use smallvec::SmallVec;
use std::hash::BuildHasher as _;

mod id_set;
mod matches;

pub use id_set::IdSet;
pub use matches::{Atom, ClassId, FastMap, Index, KeyId, Match, PairId, Realm, RealmId, SelectorId};

/// The pseudo-cluster of federated network sets.
pub const FEDERATION: u32 = 0;
/// The cluster that is compiled for.
pub const LOCAL: u32 = 1;
pub const NONE: u32 = u32::MAX;

/// How many endpoints are looked at together when a key becomes relevant.
const PLACE: u32 = 64;

pub type Addresses = SmallVec<[IpAddr; 1]>;

/// What the hub, or the operator, says of a cluster as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClusterRecord {
    pub label_grant: LabelGrant,
    /// The lease has ended: every selector answers unknown for its endpoints. Says nothing of the local cluster.
    pub stale: bool,
    /// In the local cluster: a federated Allow is final, instead of leaving to the local tiers.
    pub federated_allow_final: bool,
}

impl ClusterRecord {
    pub fn of(cluster: &inventory::Cluster) -> Self {
        Self {
            label_grant: cluster.label_grant.clone(),
            stale: cluster.stale,
            federated_allow_final: cluster.federated_allow_final,
        }
    }
}

#[derive(Debug)]
pub struct Cluster {
    pub name: ClusterName,
    pub record: Option<ClusterRecord>,
    realm: RealmId,
    endpoints: IdSet,
    namespaces: FastMap<Arc<str>, Pairs>,
    accounts: FastMap<(Arc<str>, Arc<str>), Pairs>,
}

/// The labels of a namespace or an account, in the least room.
type Pairs = Box<[(Arc<str>, Arc<str>)]>;

/// What endpoints of one cluster, kind, namespace and account have in common.
#[derive(Debug)]
struct Context {
    cluster: u32,
    kind: EndpointKind,
    namespace: Option<Arc<str>>,
    account: Option<Arc<str>>,
    /// What it adds to their labels; sorted by key.
    pairs: Vec<(KeyId, PairId)>,
    endpoints: IdSet,
    dirty: bool,
}

#[derive(Debug)]
pub struct Slot {
    pub name: Arc<str>,
    context: u32,
    pub class: ClassId,
    /// Interned by [`IndexedInventory::nodes`].
    pub node: u32,
    own: Box<[PairId]>,
    /// All that it claims; see [`IndexedInventory::held`].
    addresses: Addresses,
    pub nets: Box<[IpNet]>,
    pub ports: Box<[NamedPort]>,
    host_network: bool,
    live: bool,
    dirty: bool,
}

/// What an endpoint contributed at the last commit.
#[derive(Debug, Clone, PartialEq)]
pub struct Contribution {
    pub cluster: u32,
    pub class: ClassId,
    pub stale: bool,
    pub node: u32,
    pub addresses: Addresses,
    pub nets: SmallVec<[IpNet; 1]>,
    pub ports: SmallVec<[NamedPort; 1]>,
    /// A pod of the local cluster that policy judges.
    pub judged: bool,
}

#[derive(Debug)]
pub struct IndexedInventory {
    pub index: Index,
    hasher: RandomState,
    pub clusters: Vec<Cluster>,
    clusters_by_name: FastMap<ClusterName, u32>,
    contexts: Vec<Context>,
    free_contexts: Vec<u32>,
    contexts_by_content: HashTable<u32>,
    contexts_by_namespace: FastMap<(u32, Option<Arc<str>>), IdSet>,
    dirty_contexts: Vec<u32>,
    pub slots: Vec<Slot>,
    free_slots: Vec<u32>,
    /// With the hash, so that growing does not look at names.
    slots_by_id: HashTable<(u32, u32)>,
    /// Who holds an address: of several that claim it, the local cluster's, then the first by name.
    /// As slot and place among its addresses.
    holders: HashTable<(u32, u32)>,
    /// All who claim an address that more than one claims.
    contested: FastMap<IpAddr, SmallVec<[u32; 2]>>,
    pub by_port: FastMap<Arc<str>, IdSet>,
    /// By class: all endpoints, and the judged pods of the local cluster.
    pub members: Vec<IdSet>,
    pub judged: Vec<IdSet>,
    pub newly_relevant: Vec<KeyId>,
    dirty: Vec<u32>,
    /// Of dirty endpoints that contributed something.
    before: FastMap<u32, Contribution>,
    pub nodes: Vec<Arc<str>>,
    nodes_by_name: FastMap<Arc<str>, u32>,
}

impl IndexedInventory {
    pub fn new(local: ClusterName) -> Self {
        let mut this = Self {
            index: Index::default(),
            hasher: RandomState::default(),
            clusters: Vec::new(),
            clusters_by_name: FastMap::default(),
            contexts: Vec::new(),
            free_contexts: Vec::new(),
            contexts_by_content: HashTable::new(),
            contexts_by_namespace: FastMap::default(),
            dirty_contexts: Vec::new(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            slots_by_id: HashTable::new(),
            holders: HashTable::new(),
            contested: FastMap::default(),
            by_port: FastMap::default(),
            members: Vec::new(),
            judged: Vec::new(),
            newly_relevant: Vec::new(),
            dirty: Vec::new(),
            before: FastMap::default(),
            nodes: Vec::new(),
            nodes_by_name: FastMap::default(),
        };
        let realm = this.index.realm(&Realm::Known);
        let record = Some(ClusterRecord::default());
        // The federation is no cluster and has no name that one could have.
        for name in ["".into(), local.clone()] {
            this.clusters.push(Cluster {
                name,
                record: record.clone(),
                realm,
                endpoints: IdSet::default(),
                namespaces: FastMap::default(),
                accounts: FastMap::default(),
            });
        }
        this.clusters_by_name.insert(local, LOCAL);
        this
    }

    pub fn cluster(&mut self, name: &ClusterName) -> u32 {
        if let Some(id) = self.clusters_by_name.get(name) {
            return *id;
        }
        let id = self.clusters.len() as u32;
        self.clusters.push(Cluster {
            name: name.clone(),
            record: None,
            realm: 0,
            endpoints: IdSet::default(),
            namespaces: FastMap::default(),
            accounts: FastMap::default(),
        });
        self.clusters_by_name.insert(name.clone(), id);
        id
    }

    pub fn node(&mut self, name: &Arc<str>) -> u32 {
        if let Some(id) = self.nodes_by_name.get(name) {
            return *id;
        }
        self.nodes.push(name.clone());
        let id = self.nodes.len() as u32 - 1;
        self.nodes_by_name.insert(name.clone(), id);
        id
    }

    pub fn node_id(&self, name: &str) -> Option<u32> {
        self.nodes_by_name.get(name).copied()
    }

    pub fn set_record(&mut self, cluster: u32, record: Option<ClusterRecord>) {
        let realm = match &record {
            _ if cluster <= LOCAL => Realm::Known,
            Some(record) if record.stale => Realm::Stale,
            Some(ClusterRecord { label_grant: LabelGrant::Keys(keys), .. }) => {
                Realm::Granted(keys.iter().cloned().collect())
            }
            _ => Realm::Known,
        };
        let realm = self.index.realm(&realm);
        let slot = &mut self.clusters[cluster as usize];
        let same = slot.record.is_some() == record.is_some() && slot.realm == realm;
        if same {
            slot.record = record;
            return;
        }
        // Contributions are saved as the old record has them.
        let endpoints: Vec<u32> = slot.endpoints.iter().collect();
        for endpoint in endpoints {
            self.mark(endpoint);
        }
        let slot = &mut self.clusters[cluster as usize];
        slot.record = record;
        slot.realm = realm;
    }

    pub fn clear_cluster(&mut self, cluster: u32) {
        let endpoints: Vec<u32> = self.clusters[cluster as usize].endpoints.iter().collect();
        for endpoint in endpoints {
            self.remove_slot(endpoint);
        }
        let slot = &mut self.clusters[cluster as usize];
        slot.namespaces = FastMap::default();
        slot.accounts = FastMap::default();
        self.set_record(cluster, (cluster == LOCAL).then(ClusterRecord::default));
    }

    pub fn set_namespace(&mut self, cluster: u32, name: Arc<str>, labels: Option<Labels>) {
        let namespaces = &mut self.clusters[cluster as usize].namespaces;
        match labels {
            Some(labels) => drop(namespaces.insert(name.clone(), labels.into_iter().collect())),
            None => drop(namespaces.remove(&name)),
        }
        self.mark_contexts(cluster, name, None);
    }

    pub fn set_account(&mut self, cluster: u32, namespace: Arc<str>, name: Arc<str>, labels: Option<Labels>) {
        let accounts = &mut self.clusters[cluster as usize].accounts;
        let key = (namespace.clone(), name.clone());
        match labels {
            Some(labels) => drop(accounts.insert(key, labels.into_iter().collect())),
            None => drop(accounts.remove(&key)),
        }
        self.mark_contexts(cluster, namespace, Some(&name));
    }

    fn mark_contexts(&mut self, cluster: u32, namespace: Arc<str>, account: Option<&Arc<str>>) {
        for context in self.contexts_by_namespace.get(&(cluster, Some(namespace))).into_iter().flat_map(IdSet::iter) {
            let slot = &mut self.contexts[context as usize];
            if !slot.dirty && (account.is_none() || slot.account.as_ref() == account) {
                slot.dirty = true;
                self.dirty_contexts.push(context);
            }
        }
    }

    pub fn set_endpoint(&mut self, cluster: u32, id: EndpointId, endpoint: Endpoint) {
        let account = endpoint.service_account.filter(|_| id.kind == EndpointKind::Pod);
        let context = self.context(cluster, id.kind, &id.namespace, &account);
        // Others' nodes are not ours to know.
        let node = endpoint.node.as_ref().filter(|_| cluster == LOCAL).map_or(NONE, |node| self.node(node));
        let mut own: SmallVec<[PairId; 16]> = SmallVec::new();
        for (key, value) in &endpoint.labels {
            let key = self.index.key(&build::own_key(key));
            own.push(self.index.pair(key, value));
        }
        let hash = self.hash(cluster, id.kind, &id.namespace, &id.name);
        let found = self.find(hash, cluster, &id);
        let at = match found {
            Some(at) => {
                self.mark(at);
                self.empty(at);
                at
            }
            None => {
                let slot = Slot {
                    name: id.name.clone(),
                    context,
                    class: NONE,
                    node: NONE,
                    own: Box::default(),
                    addresses: Addresses::new(),
                    nets: Box::default(),
                    ports: Box::default(),
                    host_network: false,
                    live: true,
                    dirty: true,
                };
                let at = match self.free_slots.pop() {
                    Some(at) => {
                        self.slots[at as usize] = slot;
                        at
                    }
                    None => {
                        self.slots.push(slot);
                        self.slots.len() as u32 - 1
                    }
                };
                self.dirty.push(at);
                self.slots_by_id.insert_unique(spread(hash), (hash, at), |(hash, _)| spread(*hash));
                at
            }
        };
        for pair in &own {
            let key = self.index.key_of(*pair);
            self.index.note_place(key, at / PLACE);
        }
        for port in &endpoint.ports {
            self.by_port.entry(port.name.clone()).or_default().insert(at);
        }
        // Network sets hold no addresses, pods no nets, and pods on the host's network nothing.
        let holds = id.kind == EndpointKind::Pod && !endpoint.host_network;
        let mut addresses: Addresses = endpoint.addresses.into_iter().filter(|_| holds).collect();
        addresses.sort_unstable();
        addresses.dedup();
        self.contexts[context as usize].endpoints.insert(at);
        self.clusters[cluster as usize].endpoints.insert(at);
        let slot = &mut self.slots[at as usize];
        slot.context = context;
        slot.node = node;
        slot.own = own.into_vec().into();
        slot.addresses = addresses;
        slot.nets = endpoint.nets.iter().filter(|_| id.kind == EndpointKind::NetworkSet).map(IpNet::trunc).collect();
        slot.ports = endpoint.ports.into();
        slot.host_network = endpoint.host_network;
        slot.live = true;
        for place in 0..self.slots[at as usize].addresses.len() {
            self.claim(at, place);
        }
    }

    pub fn remove_endpoint(&mut self, cluster: u32, id: &EndpointId) {
        let hash = self.hash(cluster, id.kind, &id.namespace, &id.name);
        if let Some(at) = self.find(hash, cluster, id) {
            self.remove_slot(at);
        }
    }

    fn remove_slot(&mut self, at: u32) {
        if self.slots[at as usize].live {
            self.mark(at);
            self.empty(at);
            self.slots[at as usize].live = false;
        }
    }

    fn hash(&self, cluster: u32, kind: EndpointKind, namespace: &Option<Arc<str>>, name: &str) -> u32 {
        self.hasher.hash_one((cluster, kind, namespace.as_deref(), name)) as u32
    }

    fn find(&self, hash: u32, cluster: u32, id: &EndpointId) -> Option<u32> {
        let same = |(_, at): &(u32, u32)| {
            let slot = &self.slots[*at as usize];
            let context = &self.contexts[slot.context as usize];
            slot.name == id.name
                && context.cluster == cluster
                && context.kind == id.kind
                && context.namespace == id.namespace
        };
        self.slots_by_id.find(spread(hash), same).map(|(_, at)| *at)
    }

    /// Takes back all that an endpoint's content is entered under; its context stays, for its name.
    fn empty(&mut self, at: u32) {
        let slot = &mut self.slots[at as usize];
        let (own, ports) = (std::mem::take(&mut slot.own), std::mem::take(&mut slot.ports));
        let (addresses, context) = (slot.addresses.clone(), slot.context);
        slot.nets = Box::default();
        own.iter().for_each(|pair| self.index.release(*pair));
        for port in &ports {
            if let Some(endpoints) = self.by_port.get_mut(&port.name) {
                endpoints.remove(at);
                if endpoints.is_empty() {
                    self.by_port.remove(&port.name);
                }
            }
        }
        addresses.iter().for_each(|address| self.yield_address(*address, at));
        self.slots[at as usize].addresses.clear();
        let context_slot = &mut self.contexts[context as usize];
        context_slot.endpoints.remove(at);
        if context_slot.endpoints.is_empty() && !context_slot.dirty {
            context_slot.dirty = true;
            self.dirty_contexts.push(context);
        }
        let cluster = self.contexts[context as usize].cluster;
        self.clusters[cluster as usize].endpoints.remove(at);
    }

    fn holder(&self, address: IpAddr) -> Option<u32> {
        let same = |(at, place): &(u32, u32)| self.slots[*at as usize].addresses.get(*place as usize) == Some(&address);
        self.holders.find(self.hasher.hash_one(address), same).map(|(at, _)| *at)
    }

    /// Makes an endpoint, which must have the address in its slot, its holder.
    fn set_holder(&mut self, address: IpAddr, at: u32) {
        if let Some(place) = self.slots[at as usize].addresses.iter().position(|it| *it == address) {
            self.hold_free(address, at, place as u32);
        }
    }

    /// Makes an endpoint the holder of an address unless there is one, which is returned.
    fn hold_free(&mut self, address: IpAddr, at: u32, place: u32) -> Option<u32> {
        let (slots, hasher) = (&self.slots, &self.hasher);
        let address_of = |(at, place): &(u32, u32)| slots[*at as usize].addresses.get(*place as usize);
        let hash = |it: &(u32, u32)| address_of(it).map_or(0, |address| hasher.hash_one(address));
        match self.holders.entry(hasher.hash_one(address), |it| address_of(it) == Some(&address), hash) {
            Entry::Occupied(holder) => Some(holder.get().0),
            Entry::Vacant(free) => {
                free.insert((at, place));
                None
            }
        }
    }

    /// Must be called while the holder has the address in its slot.
    fn unset_holder(&mut self, address: IpAddr) {
        let slots = &self.slots;
        let same = |(at, place): &(u32, u32)| slots[*at as usize].addresses.get(*place as usize) == Some(&address);
        if let Ok(entry) = self.holders.find_entry(self.hasher.hash_one(address), same) {
            entry.remove();
        }
    }

    /// Claims what is at a place of an endpoint's slot.
    fn claim(&mut self, at: u32, place: usize) {
        let address = self.slots[at as usize].addresses[place];
        if let Some(holder) = self.hold_free(address, at, place as u32) {
            let claimants = self.contested.entry(address).or_insert_with(|| SmallVec::from_slice(&[holder]));
            claimants.push(at);
            self.settle(address);
        }
    }

    /// Gives up what is still in an endpoint's slot.
    fn yield_address(&mut self, address: IpAddr, at: u32) {
        match self.contested.get_mut(&address) {
            None => self.unset_holder(address),
            Some(claimants) => {
                claimants.retain(|claimant| *claimant != at);
                self.settle(address);
            }
        }
    }

    /// Decides who holds a contested address.
    fn settle(&mut self, address: IpAddr) {
        let Some(claimants) = self.contested.get(&address) else { return };
        let claimants = claimants.clone();
        let first = claimants.iter().copied().min_by(|a, b| self.precedence(*a).cmp(&self.precedence(*b)));
        let holder = self.holder(address);
        if first != holder {
            for changed in [holder, first].into_iter().flatten() {
                self.mark(changed);
            }
            self.unset_holder(address);
            if let Some(first) = first {
                self.set_holder(address, first);
            }
        }
        if claimants.len() < 2 {
            self.contested.remove(&address);
        }
    }

    fn precedence(&self, at: u32) -> (bool, &str, EndpointKind, Option<&str>, &str) {
        let slot = &self.slots[at as usize];
        let context = &self.contexts[slot.context as usize];
        let cluster = &self.clusters[context.cluster as usize].name;
        (context.cluster != LOCAL, cluster, context.kind, context.namespace.as_deref(), &slot.name)
    }

    /// The addresses that an endpoint holds.
    pub fn held(&self, at: u32) -> impl Iterator<Item = IpAddr> {
        let slot = &self.slots[at as usize];
        let uncontested = self.contested.is_empty();
        slot.addresses.iter().copied().filter(move |it| uncontested || self.holder(*it) == Some(at))
    }

    pub fn contested(&self) -> impl Iterator<Item = IpAddr> {
        self.contested.keys().copied()
    }

    pub fn cluster_of(&self, at: u32) -> u32 {
        self.contexts[self.slots[at as usize].context as usize].cluster
    }

    pub fn namespace_of(&self, at: u32) -> Option<&Arc<str>> {
        self.contexts[self.slots[at as usize].context as usize].namespace.as_ref()
    }

    pub fn kind_of(&self, at: u32) -> EndpointKind {
        self.contexts[self.slots[at as usize].context as usize].kind
    }

    pub fn is_stale(&self, cluster: u32) -> bool {
        cluster > LOCAL && self.clusters[cluster as usize].record.as_ref().is_some_and(|record| record.stale)
    }

    /// Whether a scope has a cluster's pods.
    pub fn in_scope(&self, scope: &ClusterScope, cluster: u32) -> bool {
        match scope {
            ClusterScope::All => true,
            ClusterScope::Local => cluster == LOCAL,
            ClusterScope::Named(names) => {
                cluster != FEDERATION && names.contains(&self.clusters[cluster as usize].name)
            }
        }
    }

    /// Whether a scope has a cluster's network sets, or the federation's.
    pub fn sets_in_scope(&self, scope: &ClusterScope, cluster: u32) -> bool {
        match scope {
            ClusterScope::All => cluster <= LOCAL,
            ClusterScope::Local => cluster == LOCAL,
            ClusterScope::Named(_) => false,
        }
    }

    /// What an endpoint contributes with its present content and the class it was last given.
    fn contribution(&self, at: u32) -> Option<Contribution> {
        let slot = &self.slots[at as usize];
        if slot.class == NONE {
            return None;
        }
        let cluster = self.cluster_of(at);
        let addresses: Addresses = self.held(at).collect();
        let pod = self.kind_of(at) == EndpointKind::Pod;
        Some(Contribution {
            cluster,
            class: slot.class,
            stale: self.is_stale(cluster),
            node: slot.node,
            judged: cluster == LOCAL && pod && slot.node != NONE && !addresses.is_empty(),
            addresses,
            nets: slot.nets.iter().copied().collect(),
            ports: slot.ports.iter().cloned().collect(),
        })
    }

    /// Notes that an endpoint may change, saving what it contributes while that is still known.
    fn mark(&mut self, at: u32) {
        if self.slots[at as usize].dirty {
            return;
        }
        if let Some(contribution) = self.contribution(at) {
            self.before.insert(at, contribution);
        }
        self.slots[at as usize].dirty = true;
        self.dirty.push(at);
    }

    fn context(
        &mut self,
        cluster: u32,
        kind: EndpointKind,
        namespace: &Option<Arc<str>>,
        account: &Option<Arc<str>>,
    ) -> u32 {
        let hash = self.hasher.hash_one((cluster, kind, namespace, account));
        let same = |id: &u32| {
            let have = &self.contexts[*id as usize];
            have.cluster == cluster && have.kind == kind && have.namespace == *namespace && have.account == *account
        };
        if let Some(id) = self.contexts_by_content.find(hash, same) {
            return *id;
        }
        let context = Context {
            cluster,
            kind,
            namespace: namespace.clone(),
            account: account.clone(),
            pairs: Vec::new(),
            endpoints: IdSet::default(),
            dirty: true,
        };
        let id = match self.free_contexts.pop() {
            Some(id) => {
                self.contexts[id as usize] = context;
                id
            }
            None => {
                self.contexts.push(context);
                self.contexts.len() as u32 - 1
            }
        };
        self.dirty_contexts.push(id);
        self.contexts_by_namespace.entry((cluster, namespace.clone())).or_default().insert(id);
        let (contexts, hasher) = (&self.contexts, &self.hasher);
        self.contexts_by_content.insert_unique(hash, id, |id| {
            let it = &contexts[*id as usize];
            hasher.hash_one((it.cluster, it.kind, &it.namespace, &it.account))
        });
        id
    }

    /// The labels that a context adds, each pair referenced.
    fn context_pairs(&mut self, id: u32) -> Vec<(KeyId, PairId)> {
        let context = &self.contexts[id as usize];
        let cluster = &self.clusters[context.cluster as usize];
        let mut all: Vec<(String, Arc<str>)> = Vec::new();
        if let Some(namespace) = &context.namespace {
            all.push((build::NAMESPACE.into(), namespace.clone()));
            all.push((format!("{}{}", build::NAMESPACE_PREFIX, build::NAME), namespace.clone()));
            for (key, value) in cluster.namespaces.get(namespace).into_iter().flat_map(|pairs| pairs.iter()) {
                let key = if &**key == build::NAME { build::OWN_NAME } else { &**key };
                all.push((format!("{}{key}", build::NAMESPACE_PREFIX), value.clone()));
            }
        }
        if let Some(account) = &context.account {
            all.push((build::SERVICE_ACCOUNT.into(), account.clone()));
            all.push((format!("{}{}", build::SERVICE_ACCOUNT_PREFIX, build::NAME), account.clone()));
            let key = context.namespace.clone().map(|namespace| (namespace, account.clone()));
            let labels = key.and_then(|key| cluster.accounts.get(&key));
            for (key, value) in labels.into_iter().flat_map(|pairs| pairs.iter()) {
                if &**key != build::NAME {
                    all.push((format!("{}{key}", build::SERVICE_ACCOUNT_PREFIX), value.clone()));
                }
            }
        }
        if context.kind == EndpointKind::Pod {
            all.push((build::ORCHESTRATOR.into(), build::KUBERNETES.into()));
        }
        let mut pairs: Vec<(KeyId, PairId)> = Vec::with_capacity(all.len());
        for (key, value) in all {
            let key = self.index.key(&key);
            pairs.push((key, self.index.pair(key, &value)));
        }
        pairs.sort_unstable();
        pairs
    }

    /// Brings every class up to date. Calls `changed` with each endpoint that may contribute otherwise than before, with
    /// what it contributed then and now.
    pub fn refresh(&mut self, mut changed: impl FnMut(&mut Self, u32, Option<&Contribution>, Option<&Contribution>)) {
        let newly_relevant = std::mem::take(&mut self.newly_relevant);
        for key in &newly_relevant {
            for place in self.index.take_places(*key).iter() {
                for at in place * PLACE..self.slots.len().min((place as usize + 1) * PLACE as usize) as u32 {
                    if self.slots[at as usize].own.iter().any(|pair| self.index.key_of(*pair) == *key) {
                        self.mark(at);
                    }
                }
            }
        }
        // Contexts are few, and a key is new to the selectors once.
        let contexts = if newly_relevant.is_empty() { 0 } else { self.contexts.len() };
        for id in 0..contexts {
            let added = &self.contexts[id].pairs;
            if newly_relevant.iter().any(|key| added.binary_search_by_key(key, |(key, _)| *key).is_ok()) {
                self.mark_context(id as u32);
            }
        }
        for id in std::mem::take(&mut self.dirty_contexts) {
            if self.contexts[id as usize].endpoints.is_empty() {
                // Freed at the end; until then endpoints that are gone have their names from it.
                self.dirty_contexts.push(id);
                continue;
            }
            self.contexts[id as usize].dirty = false;
            let pairs = self.context_pairs(id);
            let old = std::mem::replace(&mut self.contexts[id as usize].pairs, pairs);
            let new = &self.contexts[id as usize].pairs;
            let relevant = |pairs: &[(KeyId, PairId)], others: &[(KeyId, PairId)]| {
                pairs.iter().any(|pair| self.index.is_relevant(pair.0) && others.binary_search(pair).is_err())
            };
            if relevant(&old, new) || relevant(new, &old) {
                self.mark_context(id);
            }
            old.into_iter().for_each(|(_, pair)| self.index.release(pair));
        }
        let dirty = std::mem::take(&mut self.dirty);
        let mut emptied: Vec<ClassId> = Vec::new();
        for at in dirty {
            let before = self.before.remove(&at);
            let class = self.class_of(at);
            let old_class = self.slots[at as usize].class;
            self.slots[at as usize].class = class;
            self.slots[at as usize].dirty = false;
            let now = self.contribution(at);
            if old_class != class {
                if old_class != NONE {
                    self.members[old_class as usize].remove(at);
                    if self.members[old_class as usize].is_empty() {
                        emptied.push(old_class);
                    }
                }
                if class != NONE {
                    self.members[class as usize].insert(at);
                }
            }
            if let Some(before) = before.as_ref().filter(|it| it.judged) {
                self.judged[before.class as usize].remove(at);
            }
            if let Some(now) = now.as_ref().filter(|it| it.judged) {
                self.judged[now.class as usize].insert(at);
            }
            if before != now {
                changed(self, at, before.as_ref(), now.as_ref());
            }
            if !self.slots[at as usize].live {
                self.free_slot(at);
            }
        }
        for class in emptied {
            if self.members[class as usize].is_empty() {
                self.index.remove_class(class);
            }
        }
        self.free_empty_contexts();
    }

    fn mark_context(&mut self, id: u32) {
        let endpoints: Vec<u32> = self.contexts[id as usize].endpoints.iter().collect();
        endpoints.into_iter().for_each(|at| self.mark(at));
    }

    fn class_of(&mut self, at: u32) -> ClassId {
        let slot = &self.slots[at as usize];
        let context = &self.contexts[slot.context as usize];
        let cluster = &self.clusters[context.cluster as usize];
        if !slot.live || slot.host_network || cluster.record.is_none() {
            return NONE;
        }
        let mut labels = matches::Labels::new();
        if !self.is_stale(context.cluster) {
            for pair in &slot.own {
                let key = self.index.key_of(*pair);
                if self.index.is_relevant(key) && self.index.knows(cluster.realm, key) {
                    labels.push((key, *pair));
                }
            }
            labels.extend(context.pairs.iter().copied().filter(|(key, _)| self.index.is_relevant(*key)));
            labels.sort_unstable();
        }
        let tag = (context.kind == EndpointKind::NetworkSet) as u8;
        let class = self.index.class(cluster.realm, tag, &labels);
        if self.members.len() <= class as usize {
            self.members.resize_with(class as usize + 1, IdSet::default);
            self.judged.resize_with(class as usize + 1, IdSet::default);
        }
        class
    }

    fn free_slot(&mut self, at: u32) {
        let slot = &self.slots[at as usize];
        let context = &self.contexts[slot.context as usize];
        let hash = self.hash(context.cluster, context.kind, &context.namespace, &slot.name);
        if let Ok(entry) = self.slots_by_id.find_entry(spread(hash), |(_, id)| *id == at) {
            entry.remove();
        }
        let context = slot.context;
        self.slots[at as usize].name = Arc::default();
        if !self.contexts[context as usize].dirty && self.contexts[context as usize].endpoints.is_empty() {
            self.contexts[context as usize].dirty = true;
            self.dirty_contexts.push(context);
        }
        self.free_slots.push(at);
    }

    fn free_empty_contexts(&mut self) {
        for id in std::mem::take(&mut self.dirty_contexts) {
            let context = &mut self.contexts[id as usize];
            context.dirty = false;
            if !context.endpoints.is_empty() {
                continue;
            }
            let pairs = std::mem::take(&mut context.pairs);
            let key = (context.cluster, context.namespace.take());
            let account = context.account.take();
            let hash = self.hasher.hash_one((key.0, context.kind, &key.1, &account));
            if let Ok(entry) = self.contexts_by_content.find_entry(hash, |have| *have == id) {
                entry.remove();
            }
            if let Some(contexts) = self.contexts_by_namespace.get_mut(&key) {
                contexts.remove(id);
                if contexts.is_empty() {
                    self.contexts_by_namespace.remove(&key);
                }
            }
            pairs.into_iter().for_each(|(_, pair)| self.index.release(pair));
            self.free_contexts.push(id);
        }
    }

    /// Endpoints, contexts, addresses and port names that are held.
    pub fn count(&self) -> [usize; 4] {
        let contexts = self.contexts.len() - self.free_contexts.len();
        [self.slots_by_id.len(), contexts, self.holders.len() + self.contested.len(), self.by_port.len()]
    }
}

/// A table wants its bits at both ends.
fn spread(hash: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(hash)
}
