//! One cluster, put together part by part, so that a change costs what it touches.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};

use hanse_policy::inventory::{Cluster, Endpoint, EndpointId, EndpointKind, Labels, Namespace, Service};
use hanse_policy::model::{ClusterName, Layer, Policy, PolicyId, Tier, TierId};

use super::candidates::{Candidates, ObjectChange};
use crate::diagnostic::{Diagnostic, Reference};
use crate::inventory::{NamespacedName, NodeInfo, Pod};
use crate::manifest::Manifest;
use crate::object::Object;

/// The label that the API server gives every namespace.
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// One cluster's own state.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterState {
    pub cluster: Cluster,
    pub layer: Layer,
    pub nodes: BTreeMap<Arc<str>, NodeInfo>,
    /// The services that have an address of their own; of two with one address the first by namespace and name.
    pub service_addresses: BTreeMap<IpAddr, NamespacedName>,
    /// Objects that were left out, and why.
    pub diagnostics: Vec<Diagnostic>,
}

/// What is new, different or gone in a [`ClusterState`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Changed {
    pub namespaces: BTreeSet<Arc<str>>,
    /// Namespace and name.
    pub service_accounts: BTreeSet<(Arc<str>, Arc<str>)>,
    pub endpoints: BTreeSet<EndpointId>,
    pub services: BTreeSet<NamespacedName>,
    pub nodes: BTreeSet<Arc<str>>,
    pub tiers: BTreeSet<TierId>,
    pub policies: BTreeSet<PolicyId>,
    pub service_addresses: bool,
}

/// The inventory and the policies of the cluster `name`. Objects of the federation among them are left out with a
/// diagnostic; of two objects with one key the first counts.
pub fn assemble_cluster(name: &ClusterName, objects: impl IntoIterator<Item = Manifest>) -> ClusterState {
    let mut candidates = Candidates::default();
    candidates.replace_all(objects);
    let mut assembly = Assembly::new(name.clone());
    assembly.update(candidates.take_changes());
    let mut state = Arc::unwrap_or_clone(assembly.state);
    state.diagnostics = candidates.diagnostics().cloned().collect();
    state
}

/// The objects of one cluster, and the state that follows from them.
#[derive(Debug)]
pub struct Assembly {
    name: ClusterName,
    state: Arc<ClusterState>,
    objects: Objects,
    /// Which pods say that an address is theirs.
    claims: BTreeSet<(IpAddr, EndpointId)>,
    /// Pods on their node's network, by node.
    on_host: BTreeMap<Arc<str>, BTreeSet<EndpointId>>,
    /// How many endpoints each namespace has.
    inhabitants: HashMap<Arc<str>, usize>,
    /// Services that an object defines, with their addresses.
    defined: BTreeMap<NamespacedName, Option<IpAddr>>,
    slices: BTreeMap<NamespacedName, BTreeSet<Arc<Reference>>>,
    /// Policies with nodes as peers.
    cluster_policies: BTreeSet<Arc<Reference>>,
}

/// The object under each key.
#[derive(Debug, Default)]
struct Objects(HashMap<Arc<Reference>, Arc<Manifest>>);

/// The object under a key before and after a change.
struct Turn {
    key: Arc<Reference>,
    before: Option<Arc<Manifest>>,
    now: Option<Arc<Manifest>>,
}

impl Objects {
    fn get(&self, key: &Reference) -> Option<&Arc<Manifest>> {
        self.0.get(key)
    }

    fn pod(&self, id: &EndpointId) -> Option<&Pod> {
        let key = Reference {
            api_version: "v1".into(),
            kind: "Pod".into(),
            namespace: id.namespace.as_deref().map(Into::into),
            name: (&*id.name).into(),
        };
        self.get(&key).and_then(|manifest| pod_of(manifest))
    }
}

impl Assembly {
    pub fn new(name: ClusterName) -> Self {
        Self {
            name,
            state: Arc::default(),
            objects: Objects::default(),
            claims: BTreeSet::new(),
            on_host: BTreeMap::new(),
            inhabitants: HashMap::new(),
            defined: BTreeMap::new(),
            slices: BTreeMap::new(),
            cluster_policies: BTreeSet::new(),
        }
    }

    pub fn state(&self) -> &Arc<ClusterState> {
        &self.state
    }

    /// Which pod owns an address.
    pub fn owner(&self, address: IpAddr) -> Option<&EndpointId> {
        let claimants = || claimants(&self.claims, address);
        // A single claimant owns it.
        claimants().nth(1).map_or_else(|| claimants().next(), |_| newest(&self.objects, claimants()))
    }

    /// Where packets to a port of a service go: the endpoints of this port, ready or not. Empty if the service or port does not exist.
    pub fn backends(&self, service: &NamespacedName, protocol: u8, port: u16) -> BTreeSet<SocketAddr> {
        let key = Reference {
            api_version: "v1".into(),
            kind: "Service".into(),
            namespace: Some((&*service.0).into()),
            name: (&*service.1).into(),
        };
        let ports = match self.objects.get(&key).map(|it| &it.object) {
            Some(Object::Service(service)) => &service.ports[..],
            _ => &[],
        };
        let Some(of) = ports.iter().find(|it| it.protocol == protocol && it.port == port) else {
            return BTreeSet::new();
        };
        let named = |name: &Option<Arc<str>>| name.clone().unwrap_or_default();
        let mut backends = BTreeSet::new();
        for slice in self.slices.get(service).into_iter().flatten().filter_map(|key| self.objects.get(key)) {
            let Object::EndpointSlice(slice) = &slice.object else { continue };
            let same = slice.ports.iter().filter(|it| it.protocol == protocol && named(&it.name) == named(&of.name));
            for number in same.filter_map(|it| it.port) {
                backends.extend(slice.addresses().map(|address| SocketAddr::new(address, number)));
            }
        }
        backends
    }

    /// Applies changes of objects. The cost is that of these objects, and of what depends on them; it grows with the logarithm of
    /// the cluster's size, but for a copy of the state while another owner of it exists.
    pub fn update(&mut self, changes: impl IntoIterator<Item = ObjectChange>) -> Changed {
        let is_first = self.objects.0.is_empty();
        let mut turns: BTreeMap<Arc<Reference>, Turn> = BTreeMap::new();
        for ObjectChange { key, object } in changes {
            let before = match &object {
                Some(object) => self.objects.0.insert(Arc::clone(&key), Arc::clone(object)),
                None => self.objects.0.remove(&key),
            };
            let turn = turns.entry(Arc::clone(&key)).or_insert(Turn { key, before, now: None });
            turn.now = object;
        }
        let mut turns: Vec<Turn> = turns.into_values().collect();
        let mut changed = Changed::default();
        let mut on_moved_nodes = BTreeSet::new();
        for turn in &turns {
            self.take_node(turn, &mut changed, &mut on_moved_nodes);
        }
        if !changed.nodes.is_empty() {
            let (touched, objects) = (turns.iter().map(|turn| &turn.key).collect::<BTreeSet<_>>(), &self.objects);
            let others = self.cluster_policies.iter().filter(|key| !touched.contains(key));
            let again = |key: &Arc<Reference>| {
                let now = objects.get(key).cloned();
                Turn { key: Arc::clone(key), before: now.clone(), now }
            };
            let again: Vec<Turn> = others.map(again).collect();
            turns.extend(again);
        }
        self.take_endpoints(&turns, on_moved_nodes, &mut changed);
        self.take_namespaces(&turns, &mut changed);
        self.take_services(&turns, &mut changed);
        self.take_policies(&turns, &mut changed);
        if is_first {
            let state = Arc::make_mut(&mut self.state);
            pack(&mut state.cluster.endpoints);
            pack(&mut state.cluster.services);
            pack(&mut state.layer.policies);
            pack(&mut self.defined);
            pack(&mut self.slices);
            self.claims = std::mem::take(&mut self.claims).into_iter().collect();
        }
        changed
    }

    fn take_node(&mut self, turn: &Turn, changed: &mut Changed, on_moved: &mut BTreeSet<EndpointId>) {
        let Some(name) = turn.either(|object| match object {
            Object::Node(node) => Some(Arc::clone(&node.name)),
            _ => None,
        }) else {
            return;
        };
        let now = turn.now.as_ref().and_then(|manifest| match &manifest.object {
            Object::Node(node) => Some(node.info.clone()),
            _ => None,
        });
        let before = self.state.nodes.get(&name);
        if before == now.as_ref() {
            return;
        }
        if before.map(|it| &it.addresses) != now.as_ref().map(|it| &it.addresses) {
            on_moved.extend(self.on_host.get(&name).into_iter().flatten().cloned());
        }
        put(&mut Arc::make_mut(&mut self.state).nodes, name, now, &mut changed.nodes);
    }

    /// An address belongs to one live pod, the newest; of equally old ones to the first by name.
    fn take_endpoints(&mut self, turns: &[Turn], mut touched: BTreeSet<EndpointId>, changed: &mut Changed) {
        let mut addresses = BTreeSet::new();
        for turn in turns {
            if let Some(pod) = turn.before.as_deref().and_then(pod_of) {
                let id = pod.id.clone();
                for address in pod.claims() {
                    addresses.insert(*address);
                    self.claims.remove(&(*address, id.clone()));
                }
                if let Some(node) = pod.node.as_ref().filter(|_| pod.host_network)
                    && let Some(pods) = self.on_host.get_mut(node)
                {
                    pods.remove(&id);
                    if pods.is_empty() {
                        self.on_host.remove(node);
                    }
                }
                touched.insert(id);
            }
            if let Some(pod) = turn.now.as_deref().and_then(pod_of) {
                let id = pod.id.clone();
                for address in pod.claims() {
                    addresses.insert(*address);
                    self.claims.insert((*address, id.clone()));
                }
                if let Some(node) = pod.node.clone().filter(|_| pod.host_network) {
                    self.on_host.entry(node).or_default().insert(id.clone());
                }
                touched.insert(id);
            }
        }
        // Contested addresses, each judged once.
        let mut owners: HashMap<IpAddr, EndpointId> = HashMap::new();
        for address in addresses {
            touched.extend(claimants(&self.claims, address).cloned());
        }
        for id in touched {
            let now = self.objects.pod(&id).map(|pod| {
                let node = pod.node.as_ref().and_then(|node| self.state.nodes.get(node));
                let mut endpoint = pod.endpoint(node.map_or(&[], |node| &node.addresses));
                endpoint.addresses.retain(|address| {
                    let claimants = || claimants(&self.claims, *address);
                    if claimants().nth(1).is_none() {
                        return true;
                    }
                    let owner = || newest(&self.objects, claimants()).cloned().unwrap_or_else(|| id.clone());
                    *owners.entry(*address).or_insert_with(owner) == id
                });
                endpoint
            });
            self.put_endpoint(id, now, changed);
        }
        let sets_of = |manifest: &Option<Arc<Manifest>>| match &manifest.as_ref()?.object {
            Object::NetworkSet(id, set) => Some((id.clone(), Endpoint::clone(set))),
            _ => None,
        };
        let sets: Vec<_> = turns.iter().map(|turn| (sets_of(&turn.before), sets_of(&turn.now))).collect();
        for (before, now) in sets {
            if let Some((id, _)) = before.filter(|_| now.is_none()) {
                self.put_endpoint(id, None, changed);
            }
            if let Some((id, set)) = now {
                self.put_endpoint(id, Some(set), changed);
            }
        }
    }

    fn put_endpoint(&mut self, id: EndpointId, now: Option<Endpoint>, changed: &mut Changed) {
        let before = self.state.cluster.endpoints.get(&id);
        if before == now.as_ref() {
            return;
        }
        if let Some(namespace) = id.namespace.clone().filter(|_| before.is_some() != now.is_some()) {
            let count = self.inhabitants.entry(namespace.clone()).or_default();
            *count = if now.is_some() { *count + 1 } else { *count - 1 };
            if *count == 0 {
                self.inhabitants.remove(&namespace);
            }
            changed.namespaces.insert(namespace);
        }
        put(&mut Arc::make_mut(&mut self.state).cluster.endpoints, id, now, &mut changed.endpoints);
    }

    /// Namespaces, also those that only endpoints name, and service accounts.
    fn take_namespaces(&mut self, turns: &[Turn], changed: &mut Changed) {
        let mut touched = std::mem::take(&mut changed.namespaces);
        for turn in turns {
            touched.extend(turn.either(|object| match object {
                Object::Namespace(it) => Some(Arc::clone(&it.name)),
                _ => None,
            }));
            let Some(key) = turn.either(|object| match object {
                Object::ServiceAccount(it) => Some(it.key.clone()),
                _ => None,
            }) else {
                continue;
            };
            let now = turn.now.as_ref().and_then(|manifest| match &manifest.object {
                Object::ServiceAccount(account) => Some(account.labels.clone()),
                _ => None,
            });
            let accounts = &self.state.cluster.service_accounts;
            if accounts.get(&key) != now.as_ref() {
                let accounts = &mut Arc::make_mut(&mut self.state).cluster.service_accounts;
                put(accounts, key, now, &mut changed.service_accounts);
            }
        }
        for name in touched {
            let key = Reference {
                api_version: "v1".into(),
                kind: "Namespace".into(),
                namespace: None,
                name: (&*name).into(),
            };
            let written = self.objects.get(&key).and_then(|manifest| match &manifest.object {
                Object::Namespace(namespace) => Some(namespace.labels.clone()),
                _ => None,
            });
            let labels = written.or_else(|| self.inhabitants.contains_key(&name).then(Labels::new));
            let now = labels.map(|mut labels| {
                labels.insert(NAMESPACE_NAME_LABEL.into(), Arc::clone(&name));
                Namespace { labels }
            });
            if self.state.cluster.namespaces.get(&name) != now.as_ref() {
                let namespaces = &mut Arc::make_mut(&mut self.state).cluster.namespaces;
                put(namespaces, name, now, &mut changed.namespaces);
            }
        }
    }

    fn take_services(&mut self, turns: &[Turn], changed: &mut Changed) {
        let mut touched = BTreeSet::new();
        let mut redefined = false;
        for turn in turns {
            let address = |object: Option<&Object>| match object {
                Some(Object::Service(service)) => Some(service.address),
                _ => None,
            };
            redefined |= address(turn.before()) != address(turn.now());
            for (object, counts) in [(turn.before(), false), (turn.now(), true)] {
                match object {
                    Some(Object::Service(service)) => {
                        let key = service.key.clone();
                        match counts {
                            true => drop(self.defined.insert(key.clone(), service.address)),
                            false => drop(self.defined.remove(&key)),
                        }
                        touched.insert(key);
                    }
                    Some(Object::EndpointSlice(slice)) => {
                        let Some(key) = slice.service.clone() else { continue };
                        let slices = self.slices.entry(key.clone()).or_default();
                        match counts {
                            true => slices.insert(Arc::clone(&turn.key)),
                            false => slices.remove(&turn.key),
                        };
                        if slices.is_empty() {
                            self.slices.remove(&key);
                        }
                        touched.insert(key);
                    }
                    _ => {}
                }
            }
        }
        for key in touched {
            let slices = self.slices.get(&key);
            let now = (slices.is_some() || self.defined.contains_key(&key)).then(|| {
                let mut service = Service::default();
                for slice in slices.into_iter().flatten().filter_map(|key| self.objects.get(key)) {
                    if let Object::EndpointSlice(slice) = &slice.object {
                        service.addresses.extend(slice.addresses());
                        service.backends.extend(slice.backends());
                    }
                }
                service
            });
            if self.state.cluster.services.get(&key) != now.as_ref() {
                put(&mut Arc::make_mut(&mut self.state).cluster.services, key, now, &mut changed.services);
            }
        }
        if redefined {
            // Services are few, and seldom change themselves.
            let mut now = BTreeMap::new();
            for (key, address) in &self.defined {
                address.map(|address| now.entry(address).or_insert_with(|| key.clone()));
            }
            if now != self.state.service_addresses {
                Arc::make_mut(&mut self.state).service_addresses = now;
                changed.service_addresses = true;
            }
        }
    }

    fn take_policies(&mut self, turns: &[Turn], changed: &mut Changed) {
        let mut tiers: BTreeMap<TierId, Option<Tier>> = BTreeMap::new();
        let mut policies: BTreeMap<PolicyId, Option<Policy>> = BTreeMap::new();
        // What is, after what was: an object that is another now may have the same name.
        for counts in [false, true] {
            for turn in turns {
                let of_turn = if counts { &turn.now } else { &turn.before };
                let Some(manifest) = of_turn else { continue };
                if matches!(&manifest.object, Object::Policy(policy) if policy.has_node_peers()) {
                    match counts {
                        true => self.cluster_policies.insert(Arc::clone(&turn.key)),
                        false => self.cluster_policies.remove(&turn.key),
                    };
                }
                match &manifest.object {
                    Object::Tier(tier) => drop(tiers.insert(tier.id.clone(), counts.then(|| tier.clone()))),
                    Object::Policy(policy) => {
                        let now = counts.then(|| policy.in_cluster(&self.name, &self.state.nodes));
                        policies.insert(policy.id(&self.name), now);
                    }
                    _ => {}
                }
            }
        }
        for (id, now) in tiers {
            if self.state.layer.tiers.get(&id) != now.as_ref() {
                put(&mut Arc::make_mut(&mut self.state).layer.tiers, id, now, &mut changed.tiers);
            }
        }
        for (id, now) in policies {
            if self.state.layer.policies.get(&id) != now.as_ref() {
                put(&mut Arc::make_mut(&mut self.state).layer.policies, id, now, &mut changed.policies);
            }
        }
    }
}

impl Turn {
    fn before(&self) -> Option<&Object> {
        self.before.as_ref().map(|manifest| &manifest.object)
    }

    fn now(&self) -> Option<&Object> {
        self.now.as_ref().map(|manifest| &manifest.object)
    }

    /// Something that does not differ between objects of one key.
    fn either<T>(&self, of: impl Fn(&Object) -> Option<T>) -> Option<T> {
        self.now().or(self.before()).and_then(of)
    }
}

fn put<K: Ord + Clone, V>(map: &mut BTreeMap<K, V>, key: K, now: Option<V>, changed: &mut BTreeSet<K>) {
    changed.insert(key.clone());
    match now {
        Some(now) => drop(map.insert(key, now)),
        None => drop(map.remove(&key)),
    }
}

/// Frees the unused half of a map whose entries came in their order: each full node is split, and what comes later is put into one half.
fn pack<K: Ord, V>(map: &mut BTreeMap<K, V>) {
    *map = std::mem::take(map).into_iter().collect();
}

fn pod_of(manifest: &Manifest) -> Option<&Pod> {
    if let Object::Pod(pod) = &manifest.object { Some(pod) } else { None }
}

fn claimants(claims: &BTreeSet<(IpAddr, EndpointId)>, address: IpAddr) -> impl Iterator<Item = &EndpointId> {
    /// Before every pod.
    static LOWEST: LazyLock<EndpointId> =
        LazyLock::new(|| EndpointId { kind: EndpointKind::Pod, namespace: None, name: "".into() });
    let from = claims.range((address, LOWEST.clone())..);
    from.take_while(move |(of, _)| *of == address).map(|(_, id)| id)
}

/// The newest pod; of equally old ones the first by name.
fn newest<'a>(objects: &Objects, pods: impl Iterator<Item = &'a EndpointId>) -> Option<&'a EndpointId> {
    // RFC 3339 in UTC, as API servers write it, sorts as text.
    let created = |id: &EndpointId| objects.pod(id).and_then(|pod| pod.created.clone());
    pods.min_by_key(|id| Reverse(created(id)))
}
