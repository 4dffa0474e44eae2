//! Clusters, namespaces, accounts, endpoints and services, in compact form.

use std::hash::BuildHasher as _;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::{HashSet, HashTable};
use ipnet::IpNet;
use smallvec::SmallVec;

use super::id_set::IdSet;
use super::matches::{ClassId, FastMap, KeyId, PairId, Realm, SelectorIndex, SlotGroup};
use super::model::{
    Addresses, ClusterId, ClusterRecord, Context, ContextId, Contribution, FEDERATION, IndexedCluster, LOCAL, Members,
    NodeIndex, ServiceKey, Slot, SlotId,
};
use super::nets::NetTable;
use crate::inventory::{Endpoint, EndpointId, EndpointKind, LabelGrant, Labels, NamedPort, Service};
use crate::model::{ClusterName, ClusterScope};
use crate::selector::{Selector, build};
use crate::slab::{Id as _, SecondaryMap, Slab};

/// Endpoints that are visited together when a key becomes relevant.
pub(super) const GROUP_SLOTS: u32 = 64;

/// See the module `indexed`.
#[derive(Debug)]
pub struct IndexedInventory {
    pub index: SelectorIndex,
    pub(super) hasher: RandomState,
    pub clusters: Slab<ClusterId, IndexedCluster>,
    clusters_by_name: FastMap<ClusterName, ClusterId>,
    pub(super) contexts: Slab<ContextId, Context>,
    pub(super) contexts_by_content: HashTable<ContextId>,
    pub(super) contexts_by_namespace: FastMap<(ClusterId, Option<Arc<str>>), IdSet<ContextId>>,
    pub(super) dirty_contexts: Vec<ContextId>,
    pub slots: Slab<SlotId, Slot>,
    /// With the hash, so that growing does not read names.
    pub(super) slots_by_id: HashTable<(u32, SlotId)>,
    /// The owner of each address, as a slot and the position among its addresses. If several endpoints claim an address, those of the
    /// local cluster come first, then the first by name.
    pub(super) owners: HashTable<(SlotId, u32)>,
    /// All claimants of an address that more than one endpoint claims.
    pub(super) contested: FastMap<IpAddr, SmallVec<[SlotId; 2]>>,
    /// Network sets by their nets.
    by_net: NetTable<SlotId>,
    /// The addresses of pods on the host's network, the primary first: their node's, which no pod owns.
    host_addresses: FastMap<SlotId, Box<[IpAddr]>>,
    pub by_port: FastMap<Arc<str>, IdSet<SlotId>>,
    port_lists: HashSet<Arc<[NamedPort]>, RandomState>,
    pub(super) members: SecondaryMap<ClassId, Members>,
    no_members: Members,
    /// Keys that no selector named at the last refresh.
    pub(super) newly_relevant: Vec<KeyId>,
    pub(super) dirty: Vec<SlotId>,
    /// Of dirty endpoints that contributed something.
    pub(super) before: FastMap<SlotId, Contribution>,
    pub nodes: Slab<NodeIndex, Arc<str>>,
    nodes_by_name: FastMap<Arc<str>, NodeIndex>,
    /// Of the local cluster: policies can name only its services.
    services: FastMap<ServiceKey, Service>,
}

impl IndexedInventory {
    pub fn new(local: ClusterName) -> Self {
        let mut this = Self {
            index: SelectorIndex::default(),
            hasher: RandomState::default(),
            clusters: Slab::new(),
            clusters_by_name: FastMap::default(),
            contexts: Slab::new(),
            contexts_by_content: HashTable::new(),
            contexts_by_namespace: FastMap::default(),
            dirty_contexts: Vec::new(),
            slots: Slab::new(),
            slots_by_id: HashTable::new(),
            owners: HashTable::new(),
            contested: FastMap::default(),
            by_net: NetTable::default(),
            host_addresses: FastMap::default(),
            by_port: FastMap::default(),
            port_lists: HashSet::default(),
            members: SecondaryMap::default(),
            no_members: Members::default(),
            newly_relevant: Vec::new(),
            dirty: Vec::new(),
            before: FastMap::default(),
            nodes: Slab::new(),
            nodes_by_name: FastMap::default(),
            services: FastMap::default(),
        };
        // The federation is not a cluster, and its name cannot be one's.
        for (id, name) in [(FEDERATION, "".into()), (LOCAL, local.clone())] {
            let realm = this.index.realm(&Realm::Certain);
            let cluster = this.clusters.insert(IndexedCluster::new(name, Some(ClusterRecord::default()), realm));
            debug_assert_eq!(cluster, id);
        }
        this.clusters_by_name.insert(local, LOCAL);
        this
    }

    /// The id of a cluster, assigned when the name is new.
    pub fn cluster(&mut self, name: &ClusterName) -> ClusterId {
        if let Some(id) = self.clusters_by_name.get(name) {
            return *id;
        }
        let realm = self.index.realm(&Realm::Certain);
        let id = self.clusters.insert(IndexedCluster::new(name.clone(), None, realm));
        self.clusters_by_name.insert(name.clone(), id);
        id
    }

    pub fn cluster_id(&self, name: &str) -> Option<ClusterId> {
        self.clusters_by_name.get(name).copied()
    }

    /// The id of a node, assigned when the name is new.
    pub fn node(&mut self, name: &Arc<str>) -> NodeIndex {
        if let Some(id) = self.nodes_by_name.get(name) {
            return *id;
        }
        let id = self.nodes.insert(name.clone());
        self.nodes_by_name.insert(name.clone(), id);
        id
    }

    pub fn node_id(&self, name: &str) -> Option<NodeIndex> {
        self.nodes_by_name.get(name).copied()
    }

    /// Takes a use of a selector. Its matches are complete after the next refresh.
    pub fn register(&mut self, selector: &Selector) -> super::SelectorId {
        self.index.register(selector, &mut self.newly_relevant)
    }

    pub fn set_record(&mut self, cluster: ClusterId, record: Option<ClusterRecord>) {
        let realm = match &record {
            _ if cluster <= LOCAL => Realm::Certain,
            Some(record) if record.stale => Realm::Stale,
            Some(ClusterRecord { label_grant: LabelGrant::Keys(keys), .. }) => {
                Realm::Granted(keys.iter().cloned().collect())
            }
            _ => Realm::Certain,
        };
        let realm = self.index.realm(&realm);
        let slot = &mut self.clusters[cluster];
        let same = slot.record.is_some() == record.is_some() && slot.realm == realm;
        if same {
            slot.record = record;
            return;
        }
        // Contributions are saved as the old record has them.
        let endpoints: Vec<SlotId> = slot.endpoints.iter().collect();
        for endpoint in endpoints {
            self.mark(endpoint);
        }
        let slot = &mut self.clusters[cluster];
        slot.record = record;
        slot.realm = realm;
    }

    /// Removes everything in a cluster, and its record.
    pub fn clear_cluster(&mut self, cluster: ClusterId) {
        let endpoints: Vec<SlotId> = self.clusters[cluster].endpoints.iter().collect();
        for endpoint in endpoints {
            self.remove_slot(endpoint);
        }
        let slot = &mut self.clusters[cluster];
        slot.namespaces = FastMap::default();
        slot.accounts = FastMap::default();
        self.set_record(cluster, (cluster == LOCAL).then(ClusterRecord::default));
    }

    pub fn set_namespace(&mut self, cluster: ClusterId, name: Arc<str>, labels: Option<Labels>) {
        let namespaces = &mut self.clusters[cluster].namespaces;
        match labels {
            Some(labels) => drop(namespaces.insert(name.clone(), labels.into_iter().collect())),
            None => drop(namespaces.remove(&name)),
        }
        self.mark_contexts(cluster, name, None);
    }

    pub fn set_account(&mut self, cluster: ClusterId, namespace: Arc<str>, name: Arc<str>, labels: Option<Labels>) {
        let accounts = &mut self.clusters[cluster].accounts;
        let key = (namespace.clone(), name.clone());
        match labels {
            Some(labels) => drop(accounts.insert(key, labels.into_iter().collect())),
            None => drop(accounts.remove(&key)),
        }
        self.mark_contexts(cluster, namespace, Some(&name));
    }

    fn mark_contexts(&mut self, cluster: ClusterId, namespace: Arc<str>, account: Option<&Arc<str>>) {
        for context in self.contexts_by_namespace.get(&(cluster, Some(namespace))).into_iter().flat_map(IdSet::iter) {
            let slot = &mut self.contexts[context];
            if !slot.dirty && (account.is_none() || slot.account.as_ref() == account) {
                slot.dirty = true;
                self.dirty_contexts.push(context);
            }
        }
    }

    /// Replaces a service of the local cluster. Returns the previous one.
    pub fn set_service(&mut self, key: ServiceKey, service: Option<Service>) -> Option<Service> {
        match service {
            Some(service) => self.services.insert(key, service),
            None => self.services.remove(&key),
        }
    }

    pub fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key)
    }

    pub fn set_endpoint(&mut self, cluster: ClusterId, id: EndpointId, endpoint: Endpoint) {
        let account = endpoint.service_account.filter(|_| id.kind == EndpointKind::Pod);
        let context = self.context(cluster, id.kind, &id.namespace, &account);
        // The nodes of other clusters are unknown here.
        let node = endpoint.node.as_ref().filter(|_| cluster == LOCAL).map(|node| self.node(node));
        let mut own: SmallVec<[PairId; 16]> = SmallVec::new();
        for (key, value) in endpoint.labels.iter() {
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
                let at = self.slots.insert(Slot {
                    name: id.name.clone(),
                    context,
                    class: None,
                    node: None,
                    own: Box::default(),
                    addresses: Addresses::new(),
                    nets: Box::default(),
                    ports: None,
                    host_network: false,
                    live: true,
                    dirty: true,
                });
                self.dirty.push(at);
                self.slots_by_id.insert_unique(spread(hash), (hash, at), |(hash, _)| spread(*hash));
                at
            }
        };
        for pair in &own {
            let key = self.index.key_of(*pair);
            self.index.note_group(key, SlotGroup::new(at.number() / GROUP_SLOTS));
        }
        for port in &endpoint.ports {
            self.by_port.entry(port.name.clone()).or_default().insert(at);
        }
        let ports = self.shared_ports(endpoint.ports);
        // Network sets have no addresses, pods no nets, and pods on the host's network nothing.
        let holds = id.kind == EndpointKind::Pod && !endpoint.host_network;
        let mut addresses = Addresses::new();
        for address in endpoint.addresses.into_iter().filter(|_| holds) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if endpoint.host_network {
            self.host_addresses.insert(at, endpoint.host_addresses.into());
        }
        self.contexts[context].endpoints.insert(at);
        self.clusters[cluster].endpoints.insert(at);
        let slot = &mut self.slots[at];
        slot.context = context;
        slot.node = node;
        slot.own = own.into_vec().into();
        slot.addresses = addresses;
        slot.nets = endpoint.nets.iter().filter(|_| id.kind == EndpointKind::NetworkSet).map(IpNet::trunc).collect();
        slot.ports = ports;
        slot.host_network = endpoint.host_network;
        slot.live = true;
        let nets = slot.nets.iter().copied();
        nets.for_each(|net| self.by_net.insert(net, at));
        for position in 0..self.slots[at].addresses.len() {
            self.claim(at, position);
        }
    }

    pub fn remove_endpoint(&mut self, cluster: ClusterId, id: &EndpointId) {
        let hash = self.hash(cluster, id.kind, &id.namespace, &id.name);
        if let Some(at) = self.find(hash, cluster, id) {
            self.remove_slot(at);
        }
    }

    fn remove_slot(&mut self, at: SlotId) {
        if self.slots[at].live {
            self.mark(at);
            self.empty(at);
            self.slots[at].live = false;
        }
    }

    pub(super) fn hash(&self, cluster: ClusterId, kind: EndpointKind, namespace: &Option<Arc<str>>, name: &str) -> u32 {
        self.hasher.hash_one((cluster, kind, namespace.as_deref(), name)) as u32
    }

    fn find(&self, hash: u32, cluster: ClusterId, id: &EndpointId) -> Option<SlotId> {
        let same = |(_, at): &(u32, SlotId)| {
            let slot = &self.slots[*at];
            let context = &self.contexts[slot.context];
            slot.name == id.name
                && context.cluster == cluster
                && context.kind == id.kind
                && context.namespace == id.namespace
        };
        self.slots_by_id.find(spread(hash), same).map(|(_, at)| *at)
    }

    /// The slot of an endpoint that is not removed.
    pub fn endpoint(&self, cluster: ClusterId, id: &EndpointId) -> Option<SlotId> {
        let hash = self.hash(cluster, id.kind, &id.namespace, &id.name);
        self.find(hash, cluster, id).filter(|at| self.slots[*at].live)
    }

    /// Removes an endpoint's content from every index; its context stays, for its name.
    fn empty(&mut self, at: SlotId) {
        let slot = &mut self.slots[at];
        let (own, ports) = (std::mem::take(&mut slot.own), std::mem::take(&mut slot.ports));
        let (addresses, context) = (slot.addresses.clone(), slot.context);
        std::mem::take(&mut slot.nets).iter().for_each(|net| self.by_net.remove(*net, at));
        self.host_addresses.remove(&at);
        own.iter().for_each(|pair| self.index.release(*pair));
        for port in ports.iter().flat_map(|ports| ports.iter()) {
            if let Some(endpoints) = self.by_port.get_mut(&port.name) {
                endpoints.remove(at);
                if endpoints.is_empty() {
                    self.by_port.remove(&port.name);
                }
            }
        }
        // With the one in the table.
        if let Some(ports) = ports.filter(|ports| Arc::strong_count(ports) == 2) {
            self.port_lists.remove(&ports);
        }
        addresses.iter().for_each(|address| self.yield_address(*address, at));
        self.slots[at].addresses.clear();
        let context_slot = &mut self.contexts[context];
        context_slot.endpoints.remove(at);
        if context_slot.endpoints.is_empty() && !context_slot.dirty {
            context_slot.dirty = true;
            self.dirty_contexts.push(context);
        }
        let cluster = self.contexts[context].cluster;
        self.clusters[cluster].endpoints.remove(at);
    }

    fn shared_ports(&mut self, ports: Vec<NamedPort>) -> Option<Arc<[NamedPort]>> {
        if ports.is_empty() {
            return None;
        }
        if let Some(shared) = self.port_lists.get(&*ports) {
            return Some(shared.clone());
        }
        let shared: Arc<[NamedPort]> = ports.into();
        self.port_lists.insert(shared.clone());
        Some(shared)
    }

    pub fn cluster_of(&self, at: SlotId) -> ClusterId {
        self.contexts[self.slots[at].context].cluster
    }

    pub fn namespace_of(&self, at: SlotId) -> Option<&Arc<str>> {
        self.contexts[self.slots[at].context].namespace.as_ref()
    }

    pub fn kind_of(&self, at: SlotId) -> EndpointKind {
        self.contexts[self.slots[at].context].kind
    }

    pub fn id_of(&self, at: SlotId) -> EndpointId {
        let slot = &self.slots[at];
        let context = &self.contexts[slot.context];
        EndpointId { kind: context.kind, namespace: context.namespace.clone(), name: slot.name.clone() }
    }

    /// An endpoint's own labels as written, by key.
    pub fn own_labels(&self, at: SlotId) -> impl Iterator<Item = (&str, &Arc<str>)> {
        self.slots[at].own.iter().filter_map(|pair| {
            let (key, value) = self.index.text_of(*pair);
            Some((build::own_label(key)?, value))
        })
    }

    /// The addresses that an endpoint claims, the primary first.
    pub fn claimed(&self, at: SlotId) -> &[IpAddr] {
        &self.slots[at].addresses
    }

    /// The addresses of a pod on the host's network; `None` where it is not on it.
    pub fn host_addresses(&self, at: SlotId) -> Option<&[IpAddr]> {
        self.host_addresses.get(&at).map(|addresses| &**addresses)
    }

    /// The network sets that contain an address, each once.
    pub fn sets_containing(&self, address: IpAddr) -> SmallVec<[SlotId; 4]> {
        let mut found: SmallVec<[SlotId; 4]> = self.by_net.containing(address).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    pub fn is_stale(&self, cluster: ClusterId) -> bool {
        cluster > LOCAL && self.clusters[cluster].record.as_ref().is_some_and(|record| record.stale)
    }

    /// Whether a scope includes a cluster's pods.
    pub fn in_scope(&self, scope: &ClusterScope, cluster: ClusterId) -> bool {
        match scope {
            ClusterScope::All => true,
            ClusterScope::Local => cluster == LOCAL,
            ClusterScope::Named(names) => cluster != FEDERATION && names.contains(&self.clusters[cluster].name),
        }
    }

    /// Whether a scope includes a cluster's network sets, or the federation's.
    pub fn sets_in_scope(&self, scope: &ClusterScope, cluster: ClusterId) -> bool {
        match scope {
            ClusterScope::All => cluster <= LOCAL,
            ClusterScope::Local => cluster == LOCAL,
            ClusterScope::Named(_) => false,
        }
    }

    /// The endpoints of a class.
    pub fn members(&self, class: ClassId) -> &IdSet<SlotId> {
        &self.members.get(class).unwrap_or(&self.no_members).all
    }

    /// The pods of the local cluster in a class that policy judges.
    pub fn judged(&self, class: ClassId) -> &IdSet<SlotId> {
        &self.members.get(class).unwrap_or(&self.no_members).judged
    }

    fn context(
        &mut self,
        cluster: ClusterId,
        kind: EndpointKind,
        namespace: &Option<Arc<str>>,
        account: &Option<Arc<str>>,
    ) -> ContextId {
        let hash = self.hasher.hash_one((cluster, kind, namespace, account));
        let same = |id: &ContextId| {
            let have = &self.contexts[*id];
            have.cluster == cluster && have.kind == kind && have.namespace == *namespace && have.account == *account
        };
        if let Some(id) = self.contexts_by_content.find(hash, same) {
            return *id;
        }
        let id = self.contexts.insert(Context {
            cluster,
            kind,
            namespace: namespace.clone(),
            account: account.clone(),
            pairs: Vec::new(),
            endpoints: IdSet::default(),
            dirty: true,
        });
        self.dirty_contexts.push(id);
        self.contexts_by_namespace.entry((cluster, namespace.clone())).or_default().insert(id);
        let (contexts, hasher) = (&self.contexts, &self.hasher);
        self.contexts_by_content.insert_unique(hash, id, |id| {
            let it = &contexts[*id];
            hasher.hash_one((it.cluster, it.kind, &it.namespace, &it.account))
        });
        id
    }

    /// The numbers of endpoints, contexts, addresses, port names with lists of ports, and services.
    pub fn count(&self) -> [usize; 5] {
        let addresses = self.owners.len() + self.contested.len();
        let ports = self.by_port.len() + self.port_lists.len();
        [self.slots_by_id.len(), self.contexts.len(), addresses, ports, self.services.len()]
    }
}

/// A table uses its hash's bits at both ends.
pub(super) fn spread(hash: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(hash)
}
