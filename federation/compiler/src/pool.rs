//! The sets that rules name: the endpoints of a selector, a port name or a service, as addresses, nets and sockets.
//!
//! A *pool* is the endpoints of a clause: a selector in a scope, or a port name in a scope, of all pods or of those of a selector. It has
//! up to two sets per part: the certain and the possible members. If these are equal, one set serves as both. If they differ, both get
//! new ids: sets may be updated before rules, and a Deny rule that still refers to the old id must never see fewer members. A *set* exists
//! while a compiled policy refers to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::indexed::{
    ClusterId, Contribution, FastMap, IdSet, IndexedInventory, SelectorId, ServiceKey, SlotId,
};
use hanse_policy::inventory::{EndpointKind, Service};
use hanse_policy::model::{ClusterScope, ServiceMatch};
use hanse_policy::slab::Slab;
use hanse_ruleset::{Digest, Members, Set, SetChange, SetId, SocketAddress};
use ipnet::IpNet;
use smallvec::SmallVec;

use crate::ids::{PolicyIndex, PoolId, ProfileIndex, SetIndex};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Selector(SelectorId),
    /// A port's name: of the pods that the selector selects, of all pods without one.
    Port(Arc<str>, Option<SelectorId>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Addresses of a selector, sockets of a port name.
    Main,
    Nets,
}

/// The members of a pool that a set contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum View {
    /// All, none of them being unknown.
    Exact,
    Certain,
    Possible,
}

const VIEWS: [View; 3] = [View::Exact, View::Certain, View::Possible];

#[derive(Debug)]
struct Pool {
    scope: ClusterScope,
    source: Source,
    /// Compiled policies that name it.
    users: IdSet<PolicyIndex>,
    /// Endpoints with nets; those of both parts for which it is unknown whether they belong.
    nets: u32,
    unknown_main: u32,
    unknown_nets: u32,
    /// By part and view.
    sets: [[Option<SetIndex>; 3]; 2],
}

/// What a policy's text depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    nets: bool,
    unknown_main: bool,
    unknown_nets: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Meaning {
    Pool { pool: PoolId, part: Part, view: View },
    Service { key: ServiceKey, sockets: bool },
}

#[derive(Debug)]
pub(crate) struct StoredSet {
    pub id: SetId,
    meaning: Meaning,
    /// Compiled policies that name it.
    references: u32,
    pub digest: Digest,
    /// All members, while none changed since the last request.
    whole: Option<Arc<Set>>,
    /// The number of network sets that contain each net.
    nets: BTreeMap<IpNet, u32>,
    /// Profiles that have it.
    pub profiles: IdSet<ProfileIndex>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Member {
    Address(IpAddr),
    Net(IpNet),
    Socket(SocketAddress),
}

#[derive(Debug, Default)]
pub(crate) struct Pools {
    pools: Slab<PoolId, Pool>,
    /// Also those of port names of the pods that a selector selects.
    by_selector: FastMap<SelectorId, SmallVec<[PoolId; 2]>>,
    /// Those of port names of all pods.
    by_port: FastMap<Arc<str>, SmallVec<[PoolId; 2]>>,
    sets: Slab<SetIndex, StoredSet>,
    pub sets_by_id: FastMap<SetId, SetIndex>,
    service_sets: FastMap<(ServiceKey, bool), SetIndex>,
    /// Members that come (positive) and go, since the last commit.
    pending: FastMap<(SetIndex, Member), i32>,
    /// The shapes at the last commit of pools that may have another since.
    shapes: FastMap<PoolId, Shape>,
}

impl Pools {
    /// The pool of a source in a scope, used by a policy.
    pub fn pool(
        &mut self,
        inventory: &IndexedInventory,
        source: Source,
        scope: &ClusterScope,
        user: PolicyIndex,
    ) -> PoolId {
        let filed = match &source {
            Source::Selector(selector) | Source::Port(_, Some(selector)) => self.by_selector.get(selector),
            Source::Port(name, None) => self.by_port.get(name),
        };
        for id in filed.into_iter().flatten() {
            let pool = &mut self.pools[*id];
            if pool.source == source && pool.scope == *scope {
                pool.users.insert(user);
                return *id;
            }
        }
        let mut pool = Pool {
            scope: scope.clone(),
            source,
            users: IdSet::default(),
            nets: 0,
            unknown_main: 0,
            unknown_nets: 0,
            sets: [[None; 3]; 2],
        };
        pool.users.insert(user);
        pool.count(inventory);
        let id = self.pools.next_id();
        match &pool.source {
            Source::Selector(selector) | Source::Port(_, Some(selector)) => {
                self.by_selector.entry(*selector).or_default().push(id);
            }
            Source::Port(name, None) => self.by_port.entry(name.clone()).or_default().push(id),
        }
        self.pools.insert(pool)
    }

    /// Removes a policy from the users of a pool, and the pool with its last user. Its sets are released by the compiled
    /// policies that name them.
    pub fn leave(&mut self, id: PoolId, user: PolicyIndex) {
        let users = &mut self.pools[id].users;
        users.remove(user);
        if !users.is_empty() {
            return;
        }
        let pool = self.pools.remove(id);
        match &pool.source {
            Source::Selector(selector) | Source::Port(_, Some(selector)) => {
                if let Some(list) = self.by_selector.get_mut(selector) {
                    list.retain(|it| *it != id);
                    if list.is_empty() {
                        self.by_selector.remove(selector);
                    }
                }
            }
            Source::Port(name, None) => {
                if let Some(list) = self.by_port.get_mut(name) {
                    list.retain(|it| *it != id);
                    if list.is_empty() {
                        self.by_port.remove(name);
                    }
                }
            }
        }
        self.shapes.remove(&id);
    }

    /// The sets that together contain the certain or the possible members of a pool.
    pub fn sets_of(&mut self, inventory: &IndexedInventory, id: PoolId, possible: bool) -> SmallVec<[SetIndex; 2]> {
        let shape = self.pools[id].shape();
        let mut sets = SmallVec::new();
        sets.push(self.pool_set(inventory, id, Part::Main, View::of(possible, shape.unknown_main)));
        if shape.nets {
            sets.push(self.pool_set(inventory, id, Part::Nets, View::of(possible, shape.unknown_nets)));
        }
        sets
    }

    /// Whether a pool's certain and possible members differ.
    pub fn is_uncertain(&self, id: PoolId) -> bool {
        let pool = &self.pools[id];
        pool.unknown_main + pool.unknown_nets > 0
    }

    fn pool_set(&mut self, inventory: &IndexedInventory, id: PoolId, part: Part, view: View) -> SetIndex {
        let pool = &self.pools[id];
        if let Some(set) = pool.sets[part as usize][view as usize] {
            return set;
        }
        let meaning = Meaning::Pool { pool: id, part, view };
        let (set_id, members, nets) = pool.members(inventory, part, view);
        let index = self.insert_set(set_id, meaning, members, nets);
        self.pools[id].sets[part as usize][view as usize] = Some(index);
        index
    }

    /// The backends of a service: sockets, or for a source their addresses.
    pub fn service_set(&mut self, inventory: &IndexedInventory, service: &ServiceMatch, sockets: bool) -> SetIndex {
        let key = ((service.namespace.clone(), service.name.clone()), sockets);
        if let Some(set) = self.service_sets.get(&key) {
            return *set;
        }
        let kind = if sockets { "sockets" } else { "addresses" };
        let id = SetId::of_meaning(&["service", &service.namespace, &service.name, kind]);
        let members = service_members(inventory.service(&key.0), sockets);
        let meaning = Meaning::Service { key: key.0.clone(), sockets };
        let index = self.insert_set(id, meaning, members, BTreeMap::new());
        self.service_sets.insert(key, index);
        index
    }

    fn insert_set(&mut self, id: SetId, meaning: Meaning, members: Members, nets: BTreeMap<IpNet, u32>) -> SetIndex {
        let set = Set { id, members };
        let stored = StoredSet {
            id,
            meaning,
            references: 0,
            digest: Digest::of_set(&set),
            whole: Some(Arc::new(set)),
            nets,
            profiles: IdSet::default(),
        };
        let index = self.sets.insert(stored);
        self.sets_by_id.insert(id, index);
        index
    }

    pub fn set(&self, set: SetIndex) -> &StoredSet {
        &self.sets[set]
    }

    pub fn set_mut(&mut self, set: SetIndex) -> &mut StoredSet {
        &mut self.sets[set]
    }

    pub fn refer(&mut self, set: SetIndex) {
        self.set_mut(set).references += 1;
    }

    pub fn release(&mut self, set: SetIndex) {
        let stored = self.set_mut(set);
        stored.references -= 1;
        if stored.references > 0 {
            return;
        }
        let stored = self.sets.remove(set);
        self.sets_by_id.remove(&stored.id);
        match stored.meaning {
            Meaning::Pool { pool, part, view } => {
                // The pool may have been removed before its sets.
                if let Some(pool) =
                    self.pools.get_mut(pool).filter(|pool| pool.sets[part as usize][view as usize] == Some(set))
                {
                    pool.sets[part as usize][view as usize] = None;
                }
            }
            Meaning::Service { key, sockets } => drop(self.service_sets.remove(&(key, sockets))),
        }
    }

    /// A set with all its members.
    pub fn whole(&mut self, inventory: &IndexedInventory, set: SetIndex) -> Arc<Set> {
        let stored = self.set(set);
        if let Some(whole) = &stored.whole {
            return whole.clone();
        }
        let members = match &stored.meaning {
            Meaning::Service { key, sockets } => service_members(inventory.service(key), *sockets),
            Meaning::Pool { part: Part::Nets, .. } => Members::Nets(stored.nets.keys().copied().collect()),
            Meaning::Pool { pool, part, view } => self.pools[*pool].members(inventory, *part, *view).1,
        };
        let whole = Arc::new(Set { id: stored.id, members });
        self.set_mut(set).whole = Some(whole.clone());
        whole
    }

    /// Records that a service's backends changed.
    pub fn service_changed(&mut self, key: &ServiceKey, old: Option<&Service>, new: Option<&Service>) {
        let members = |members: Members| -> BTreeSet<Member> {
            match members {
                Members::Addresses(all) => all.into_iter().map(Member::Address).collect(),
                Members::Nets(all) => all.into_iter().map(Member::Net).collect(),
                Members::Sockets(all) => all.into_iter().map(Member::Socket).collect(),
            }
        };
        for sockets in [true, false] {
            if let Some(set) = self.service_sets.get(&(key.clone(), sockets)) {
                let old = members(service_members(old, sockets));
                let new = members(service_members(new, sockets));
                for gone in old.difference(&new) {
                    *self.pending.entry((*set, *gone)).or_default() -= 1;
                }
                for come in new.difference(&old) {
                    *self.pending.entry((*set, *come)).or_default() += 1;
                }
            }
        }
    }

    /// Takes note that an endpoint contributes otherwise.
    pub fn contribute(&mut self, inventory: &IndexedInventory, old: Option<&Contribution>, new: Option<&Contribution>) {
        if self.pools.is_empty() {
            return;
        }
        let what = |it: Option<&Contribution>| it.map(|it| (it.cluster, it.class));
        let same_labels = what(old) == what(new);
        let same_addresses = old.map(|it| &it.addresses) == new.map(|it| &it.addresses);
        let same_ports = same_addresses && old.map(|it| &it.ports) == new.map(|it| &it.ports);
        let same_stale = old.map(|it| (it.stale, it.cluster)) == new.map(|it| (it.stale, it.cluster));
        let unchanged = Unchanged {
            members: same_labels && same_addresses && old.map(|it| &it.nets) == new.map(|it| &it.nets),
            selected_ports: same_labels && same_ports,
        };
        for (contribution, sign) in [(old, -1), (new, 1)] {
            let Some(contribution) = contribution else { continue };
            if !unchanged.members || !unchanged.selected_ports {
                self.contribute_selected(inventory, contribution, unchanged, sign);
            }
            if !same_ports || !same_stale {
                self.contribute_ports(inventory, contribution, sign);
            }
        }
    }

    /// To the pools of the selectors that select an endpoint.
    fn contribute_selected(
        &mut self,
        inventory: &IndexedInventory,
        it: &Contribution,
        unchanged: Unchanged,
        sign: i32,
    ) {
        for matched in inventory.index.matches(it.class) {
            let Some(pools) = self.by_selector.get(&matched.selector) else { continue };
            for id in pools {
                let pool = &mut self.pools[*id];
                let name = match &pool.source {
                    Source::Selector(_) => None,
                    Source::Port(name, _) => Some(name.clone()),
                };
                let same = if name.is_some() { unchanged.selected_ports } else { unchanged.members };
                let is_net_set = !it.nets.is_empty();
                let in_scope = if is_net_set { IndexedInventory::sets_in_scope } else { IndexedInventory::in_scope };
                if same || !in_scope(inventory, &pool.scope, it.cluster) {
                    continue;
                }
                if let Some(name) = name {
                    contribute_port(pool, *id, &mut self.shapes, &mut self.pending, (it, &name, matched.certain), sign);
                    continue;
                }
                self.shapes.entry(*id).or_insert_with(|| pool.shape());
                let count = |counter: &mut u32| *counter = counter.wrapping_add_signed(sign);
                if is_net_set {
                    count(&mut pool.nets);
                }
                if !matched.certain {
                    count(if is_net_set { &mut pool.unknown_nets } else { &mut pool.unknown_main });
                }
                for view in VIEWS.into_iter().filter(|view| view.takes(matched.certain)) {
                    if let Some(set) = pool.sets[Part::Main as usize][view as usize] {
                        for address in &it.addresses {
                            *self.pending.entry((set, Member::Address(*address))).or_default() += sign;
                        }
                    }
                    if let Some(set) = pool.sets[Part::Nets as usize][view as usize] {
                        for net in &it.nets {
                            *self.pending.entry((set, Member::Net(*net))).or_default() += sign;
                        }
                    }
                }
            }
        }
    }

    /// To the pools of its port names, of all pods.
    fn contribute_ports(&mut self, inventory: &IndexedInventory, it: &Contribution, sign: i32) {
        let mut names: SmallVec<[&Arc<str>; 4]> = it.ports.iter().map(|port| &port.name).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            for id in self.by_port.get(name).into_iter().flatten() {
                let pool = &mut self.pools[*id];
                if inventory.in_scope(&pool.scope, it.cluster) {
                    contribute_port(pool, *id, &mut self.shapes, &mut self.pending, (it, name, !it.stale), sign);
                }
            }
        }
    }

    /// The numbers of pools and of sets.
    pub fn count(&self) -> [usize; 2] {
        [self.pools.len(), self.sets.len()]
    }

    /// Policies that name a pool whose shape is another than at the last commit.
    pub fn take_reshaped(&mut self) -> Vec<PolicyIndex> {
        let shapes = std::mem::take(&mut self.shapes);
        let reshaped = shapes.into_iter().filter_map(|(id, before)| {
            let pool = &self.pools[id];
            (pool.shape() != before).then(|| pool.users.iter().collect::<Vec<PolicyIndex>>())
        });
        let mut users: Vec<PolicyIndex> = reshaped.flatten().collect();
        users.sort_unstable();
        users.dedup();
        users
    }

    /// Settles what came and went: the changes by set, with the digests already those of the new contents, and by how
    /// much each digest changed.
    pub fn take_changes(&mut self) -> Vec<(SetIndex, SetChange, Digest)> {
        let mut pending: Vec<((SetIndex, Member), i32)> =
            std::mem::take(&mut self.pending).into_iter().filter(|(_, count)| *count != 0).collect();
        pending.sort_unstable();
        let mut changes = Vec::new();
        for group in pending.chunk_by(|a, b| a.0.0 == b.0.0) {
            let index = group[0].0.0;
            // A set may have been released since.
            let Some(stored) = self.sets.get_mut(index) else { continue };
            let mut add = Vec::new();
            let mut remove = Vec::new();
            for ((_, member), count) in group {
                if let Member::Net(net) = member {
                    let holders = stored.nets.entry(*net).or_default();
                    let before = *holders;
                    *holders = holders.wrapping_add_signed(*count);
                    let after = *holders;
                    if after == 0 {
                        stored.nets.remove(net);
                    }
                    match (before, after) {
                        (0, 1..) => add.push(*member),
                        (1.., 0) => remove.push(*member),
                        _ => {}
                    }
                } else if *count > 0 {
                    add.push(*member);
                } else {
                    remove.push(*member);
                }
            }
            if add.is_empty() && remove.is_empty() {
                continue;
            }
            let mut delta = Digest::default();
            add.iter().for_each(|member| delta.add(member.digest(stored.id)));
            remove.iter().for_each(|member| delta.remove(member.digest(stored.id)));
            stored.digest.add(delta);
            let change = change_of(&add, &remove);
            stored.change(&change);
            changes.push((index, change, delta));
        }
        changes
    }
}

/// What an endpoint contributes as before.
#[derive(Debug, Clone, Copy)]
struct Unchanged {
    /// To the pools of selectors.
    members: bool,
    /// To the pools of port names of what selectors select.
    selected_ports: bool,
}

/// Takes note of what an endpoint contributes to a pool of a port's name; it belongs certainly, or may belong.
fn contribute_port(
    pool: &mut Pool,
    id: PoolId,
    shapes: &mut FastMap<PoolId, Shape>,
    pending: &mut FastMap<(SetIndex, Member), i32>,
    (it, name, certain): (&Contribution, &Arc<str>, bool),
    sign: i32,
) {
    let ports: BTreeSet<(u8, u16)> =
        it.ports.iter().filter(|port| port.name == *name).map(|port| (port.protocol, port.port)).collect();
    if ports.is_empty() {
        return;
    }
    shapes.entry(id).or_insert_with(|| pool.shape());
    if !certain {
        pool.unknown_main = pool.unknown_main.wrapping_add_signed(sign);
    }
    for view in VIEWS.into_iter().filter(|view| view.takes(certain)) {
        let Some(set) = pool.sets[Part::Main as usize][view as usize] else { continue };
        for address in &it.addresses {
            for (protocol, port) in &ports {
                let member = SocketAddress { address: *address, protocol: *protocol, port: *port };
                *pending.entry((set, Member::Socket(member))).or_default() += sign;
            }
        }
    }
}

impl StoredSet {
    /// Updates the whole set where nothing else shares it, else drops it.
    fn change(&mut self, change: &SetChange) {
        let Some(set) = self.whole.as_mut().and_then(Arc::get_mut) else {
            self.whole = None;
            return;
        };
        match (&mut set.members, change) {
            (Members::Addresses(members), SetChange::Addresses { add, remove }) => {
                for it in remove {
                    members.remove(it);
                }
                members.extend(add);
            }
            (Members::Nets(members), SetChange::Nets { add, remove }) => {
                for it in remove {
                    members.remove(it);
                }
                members.extend(add);
            }
            (Members::Sockets(members), SetChange::Sockets { add, remove }) => {
                for it in remove {
                    members.remove(it);
                }
                members.extend(add);
            }
            _ => self.whole = None,
        }
    }
}

impl Member {
    fn digest(self, set: SetId) -> Digest {
        match self {
            Self::Address(it) => Digest::of_address(set, it),
            Self::Net(it) => Digest::of_net(set, it),
            Self::Socket(it) => Digest::of_socket(set, it),
        }
    }
}

fn change_of(add: &[Member], remove: &[Member]) -> SetChange {
    fn only<T>(all: &[Member], pick: impl Fn(&Member) -> Option<T>) -> Vec<T> {
        all.iter().filter_map(pick).collect()
    }
    let address = |it: &Member| if let Member::Address(it) = it { Some(*it) } else { None };
    let net = |it: &Member| if let Member::Net(it) = it { Some(*it) } else { None };
    let socket = |it: &Member| if let Member::Socket(it) = it { Some(*it) } else { None };
    match add.first().or(remove.first()) {
        Some(Member::Net(_)) => SetChange::Nets { add: only(add, net), remove: only(remove, net) },
        Some(Member::Socket(_)) => SetChange::Sockets { add: only(add, socket), remove: only(remove, socket) },
        _ => SetChange::Addresses { add: only(add, address), remove: only(remove, address) },
    }
}

fn service_members(service: Option<&Service>, sockets: bool) -> Members {
    if sockets {
        let backends = service.into_iter().flat_map(|service| &service.backends).copied();
        Members::Sockets(backends.map(|(address, protocol, port)| SocketAddress { address, protocol, port }).collect())
    } else {
        Members::Addresses(service.into_iter().flat_map(|service| &service.addresses).copied().collect())
    }
}

impl View {
    /// The set to read for the certain or the possible members, by whether they differ.
    fn of(possible: bool, differ: bool) -> Self {
        match (differ, possible) {
            (false, _) => Self::Exact,
            (true, false) => Self::Certain,
            (true, true) => Self::Possible,
        }
    }

    fn takes(self, certain: bool) -> bool {
        certain || self == Self::Possible
    }
}

impl Pool {
    fn shape(&self) -> Shape {
        Shape { nets: self.nets > 0, unknown_main: self.unknown_main > 0, unknown_nets: self.unknown_nets > 0 }
    }

    /// Calls `visit` with each endpoint in scope that belongs, or may belong.
    fn for_each(&self, inventory: &IndexedInventory, mut visit: impl FnMut(SlotId, bool)) {
        let mut selected = |selector: SelectorId, belongs: &dyn Fn(SlotId) -> bool| {
            let certain = inventory.index.certain(selector).map(|class| (class, true));
            let unknown = inventory.index.unknown(selector).map(|class| (class, false));
            for (class, certain) in certain.chain(unknown) {
                for at in inventory.members(class).iter() {
                    let in_scope = match inventory.kind_of(at) {
                        EndpointKind::Pod => IndexedInventory::in_scope,
                        EndpointKind::NetworkSet => IndexedInventory::sets_in_scope,
                    };
                    if belongs(at) && in_scope(inventory, &self.scope, inventory.cluster_of(at)) {
                        visit(at, certain);
                    }
                }
            }
        };
        match &self.source {
            Source::Selector(selector) => selected(*selector, &|_| true),
            Source::Port(name, Some(selector)) => {
                selected(*selector, &|at| inventory.slots[at].ports().iter().any(|port| port.name == *name));
            }
            Source::Port(name, None) => {
                for at in inventory.by_port.get(name).into_iter().flat_map(IdSet::iter) {
                    let cluster = inventory.cluster_of(at);
                    let counts = inventory.slots[at].class.is_some();
                    if counts && inventory.in_scope(&self.scope, cluster) {
                        visit(at, !inventory.is_stale(cluster));
                    }
                }
            }
        }
    }

    fn count(&mut self, inventory: &IndexedInventory) {
        let (mut nets, mut unknown_main, mut unknown_nets) = (0, 0, 0);
        let is_port = matches!(self.source, Source::Port(..));
        self.for_each(inventory, |at, certain| {
            let is_net_set = !is_port && !inventory.slots[at].nets.is_empty();
            nets += is_net_set as u32;
            unknown_main += (!certain && !is_net_set) as u32;
            unknown_nets += (!certain && is_net_set) as u32;
        });
        (self.nets, self.unknown_main, self.unknown_nets) = (nets, unknown_main, unknown_nets);
    }

    fn members(&self, inventory: &IndexedInventory, part: Part, view: View) -> (SetId, Members, BTreeMap<IpNet, u32>) {
        let which = match view {
            View::Exact => "known",
            View::Certain => "certain",
            View::Possible => "possible",
        };
        let names = match &self.scope {
            ClusterScope::Named(names) => names.iter().map(|name| &**name).collect(),
            _ => Vec::new(),
        };
        let scope = match &self.scope {
            ClusterScope::Local => "local",
            ClusterScope::All => "all",
            ClusterScope::Named(_) => "named",
        };
        let named = |what: &[&str]| {
            let parts: Vec<&str> = what.iter().copied().chain([which, scope]).chain(names.iter().copied()).collect();
            SetId::of_meaning(&parts)
        };
        let text_of = |selector: SelectorId| &*inventory.index.selector(selector).canonical;
        match (&self.source, part) {
            (Source::Port(name, selector), _) => {
                let mut all = Vec::new();
                self.for_each(inventory, |at, certain| {
                    let ports = inventory.slots[at].ports().iter().filter(|_| view.takes(certain));
                    for port in ports.filter(|port| port.name == *name) {
                        let (protocol, port) = (port.protocol, port.port);
                        all.extend(inventory.owned(at).map(|address| SocketAddress { address, protocol, port }));
                    }
                });
                let id = match selector {
                    None => named(&["port", name, "sockets"]),
                    Some(selector) => named(&["port of selected", name, text_of(*selector), "sockets"]),
                };
                (id, Members::Sockets(all.into_iter().collect()), BTreeMap::new())
            }
            (Source::Selector(selector), part) => {
                let text = text_of(*selector);
                let mut addresses = Vec::new();
                let mut nets = BTreeMap::new();
                self.for_each(inventory, |at, certain| {
                    if !view.takes(certain) {
                        return;
                    }
                    match part {
                        Part::Main => addresses.extend(inventory.owned(at)),
                        Part::Nets => {
                            for net in &inventory.slots[at].nets {
                                *nets.entry(*net).or_default() += 1;
                            }
                        }
                    }
                });
                match part {
                    Part::Main => {
                        let id = named(&["selector", text, "addresses"]);
                        (id, Members::Addresses(addresses.into_iter().collect()), nets)
                    }
                    Part::Nets => {
                        let members = Members::Nets(nets.keys().copied().collect());
                        (named(&["selector", text, "nets"]), members, nets)
                    }
                }
            }
        }
    }
}

/// How many endpoints of each cluster belong to a selector in a scope, and how many more may.
pub(crate) fn census(
    inventory: &IndexedInventory,
    selector: SelectorId,
    scope: &ClusterScope,
) -> BTreeMap<Arc<str>, (usize, usize)> {
    let pool = Pool {
        scope: scope.clone(),
        source: Source::Selector(selector),
        users: IdSet::default(),
        nets: 0,
        unknown_main: 0,
        unknown_nets: 0,
        sets: [[None; 3]; 2],
    };
    let mut by_cluster: FastMap<ClusterId, (usize, usize)> = FastMap::default();
    pool.for_each(inventory, |at, certain| {
        let counts = by_cluster.entry(inventory.cluster_of(at)).or_default();
        if certain { counts.0 += 1 } else { counts.1 += 1 }
    });
    by_cluster.into_iter().map(|(id, counts)| (inventory.clusters[id].name.clone(), counts)).collect()
}

/// How many pods of a selection there are, for reports.
pub(crate) fn is_pod(inventory: &IndexedInventory, at: SlotId) -> bool {
    inventory.kind_of(at) == EndpointKind::Pod
}
