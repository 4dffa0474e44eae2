//! Compares two states: finds the packets between workloads whose verdict changes.
//!
//! Groups are compared instead of pods. The pods of a group are equal for the policies of both states: labels, namespace, service
//! account, named ports, and the nets and service backends of their addresses. A pair of groups is compared only if the policies of
//! one end differ, or the inventories. Ports are compared in ranges that all applicable rules treat alike, so the result is
//! complete for source port 40,000 and for the protocols and ICMP types in policies, with one example of each outside of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::evaluate::{Answer, Direction, End, Query, Verdict, View, acting, in_order, rules};
use crate::inventory::{Cluster, EffectiveLabels, Endpoint, EndpointId, EndpointKind, Inventory};
use crate::model::{ClusterName, Icmp, Layer, Policy, PolicySet, Port, Protocol, Rule, TierDefault, TierId};
use crate::placement::{Case, NetLists, Placement, Spot};
use crate::prepared::Prepared;
use crate::tri::Tri;
use crate::workload::{relevant_keys, seen};

/// One of the two states.
#[derive(Debug, Clone, Copy)]
pub struct State<'a> {
    pub policies: &'a PolicySet,
    pub inventory: &'a Inventory,
    pub view: View,
}

/// One end of the pairs that are compared.
#[derive(Debug, Clone)]
pub enum Party<'a> {
    /// Pods that exist in both states and are equal for the policies of each.
    Pods { cluster: &'a ClusterName, members: Vec<&'a EndpointId> },
    /// An address without a pod.
    Address(IpAddr),
}

/// Packets of one protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Packets {
    /// `None`: every protocol that no policy names.
    pub protocol: Option<u8>,
    /// Destination ports, both ends inclusive; `None` where the protocol has none.
    pub ports: Option<(u16, u16)>,
    /// A type of ICMP with a code, or with every code that no policy names; `None`: every type that none names.
    pub icmp: Option<(u8, Option<u8>)>,
}

/// A change between two parties, given by their indexes in [`Diff::parties`], for one IP version.
#[derive(Debug, Clone)]
pub struct Change {
    pub from: usize,
    pub to: usize,
    pub ip_version: u8,
    pub packets: Vec<Packets>,
    pub before: Verdict,
    /// The answer in the second state. Its verdict differs from `before`.
    pub after: Answer,
    /// For pods without an address: a description of the addresses to which the change is limited.
    pub condition: Option<String>,
}

#[derive(Debug)]
pub struct Diff<'a> {
    pub parties: Vec<Party<'a>>,
    /// Pods that exist in the first state only, and in the second only: not compared.
    pub unpaired: [Vec<(&'a ClusterName, &'a EndpointId)>; 2],
    compared: Vec<Compared<'a>>,
    facts_equal: bool,
    /// Compare only these protocols and ports; empty: all.
    only_ports: Vec<(u8, u16)>,
    /// The pod networks; empty if they are not known.
    pod_nets: Vec<IpNet>,
    states: [State<'a>; 2],
}

/// The ends of a packet in each state, and a description of the addresses to which they are limited.
type Ends = (Option<String>, [[End; 2]; 2]);

/// A party, prepared for comparison.
#[derive(Debug, Default)]
struct Compared<'a> {
    /// One or two members; empty for an address.
    examples: Vec<[Pod<'a>; 2]>,
    address: Option<IpAddr>,
    /// Whether the policies for ingress, and for egress, differ.
    changed: [bool; 2],
    /// The criteria of the rules for ingress, and for egress, in either state.
    criteria: [Criteria; 2],
    /// The pod's named ports that occur in rules: protocol and number.
    ports: BTreeSet<(u8, u16)>,
}

#[derive(Debug, Clone, Copy)]
struct Pod<'a> {
    cluster: &'a ClusterName,
    owner: &'a Cluster,
    id: &'a EndpointId,
    endpoint: &'a Endpoint,
}

/// Properties of packets that occur in rules.
#[derive(Debug, Default)]
struct Criteria {
    protocols: BTreeSet<u8>,
    /// The first port of each range that all rules treat alike.
    cuts: BTreeSet<u16>,
    icmp: BTreeSet<(u8, Option<u8>)>,
}

/// Packets, and one of them: protocol, destination port, ICMP type and code.
type Example = (Packets, u8, u16, Option<(u8, u8)>);
/// A backend of a service: the number of the service, and protocol and port; without a port, an endpoint of the service.
type Backend = (usize, Option<(u8, u16)>);

type Chain<'a> = Vec<(&'a TierId, TierDefault, &'a Policy)>;

impl<'a> Diff<'a> {
    /// `outside`: examples of addresses outside the ClusterSet. `only_ports` limits the comparison to these protocols and ports;
    /// empty: all.
    pub fn new(before: State<'a>, after: State<'a>, outside: &[IpAddr], only_ports: Vec<(u8, u16)>) -> Self {
        let facts_equal = std::ptr::eq(before.inventory, after.inventory) || before.inventory == after.inventory;
        let mut diff = Self {
            parties: Vec::new(),
            unpaired: [Vec::new(), Vec::new()],
            compared: Vec::new(),
            facts_equal,
            only_ports,
            pod_nets: Vec::new(),
            states: [before, after],
        };
        let states = diff.states;
        let facts = states.map(Facts::new);
        let keys = relevant_keys(states.map(|state| state.policies));
        let names: BTreeSet<&str> = facts.iter().flat_map(|facts| facts.port_names.iter().copied()).collect();
        let mut groups: HashMap<_, usize> = HashMap::new();
        for (cluster, owner) in &before.inventory.clusters {
            let other = after.inventory.clusters.get_key_value(cluster);
            for (id, endpoint) in owner.endpoints.iter().filter(|(id, endpoint)| is_party(id, endpoint)) {
                let first = Pod { cluster, owner, id, endpoint };
                let second = other.and_then(|(cluster, owner)| {
                    let (id, endpoint) = owner.endpoints.get_key_value(id).filter(|(id, it)| is_party(id, it))?;
                    Some(Pod { cluster, owner, id, endpoint })
                });
                let Some(second) = second else {
                    diff.unpaired[0].push((cluster, id));
                    continue;
                };
                let pair = [first, second];
                let key = [0, 1].map(|at| facts[at].key(&pair[at], &keys, &names));
                let place = *groups.entry((cluster, id.namespace.as_deref(), key)).or_insert(diff.parties.len());
                match diff.parties.get_mut(place) {
                    Some(Party::Pods { members, .. }) => {
                        members.push(id);
                        if diff.compared[place].examples.len() < 2 {
                            diff.compared[place].examples.push(pair);
                        }
                    }
                    _ => {
                        diff.parties.push(Party::Pods { cluster, members: vec![id] });
                        diff.compared.push(Compared { examples: vec![pair], ..Compared::default() });
                    }
                }
            }
        }
        for (cluster, owner) in &after.inventory.clusters {
            let other = before.inventory.clusters.get(cluster);
            let is_paired = |id: &EndpointId| {
                let endpoint = other.and_then(|other| other.endpoints.get(id));
                endpoint.is_some_and(|endpoint| is_party(id, endpoint))
            };
            let own = owner.endpoints.iter().filter(|(id, endpoint)| is_party(id, endpoint));
            diff.unpaired[1].extend(own.map(|(id, _)| (cluster, id)).filter(|(_, id)| !is_paired(id)));
        }
        let mut same = HashMap::new();
        for compared in &mut diff.compared {
            let [first, second] = compared.examples[0];
            for pod in [first, second] {
                let ports = pod.endpoint.ports.iter().filter(|port| names.contains(&*port.name));
                compared.ports.extend(ports.map(|port| (port.protocol, port.port)));
            }
            for (at, direction) in [Direction::Ingress, Direction::Egress].into_iter().enumerate() {
                let chains = [facts[0].chain(&first, direction), facts[1].chain(&second, direction)];
                compared.changed[at] = !is_same(&chains, direction, &mut same);
                for (chain, facts) in chains.iter().zip(&facts) {
                    for rule in chain.iter().flat_map(|(.., policy)| rules(policy, direction).unwrap_or_default()) {
                        compared.criteria[at].add(rule, facts, first.cluster);
                    }
                }
            }
        }
        for address in outside {
            diff.parties.push(Party::Address(*address));
            diff.compared.push(Compared { address: Some(*address), ..Compared::default() });
        }
        diff
    }

    /// Pods that do not run yet get their addresses in these nets.
    pub fn with_pod_nets(self, nets: &[IpNet]) -> Self {
        Self { pod_nets: nets.to_vec(), ..self }
    }

    /// Calls `take` with everything that changes, by source and destination in the order of [`Self::parties`].
    ///
    /// # Errors
    /// What `take` fails with, which ends the comparison.
    pub fn compare<E>(&self, mut take: impl FnMut(Change) -> Result<(), E>) -> Result<(), E> {
        let prepared = self.states.map(|state| Prepared::new(state.policies, state.inventory, state.view));
        let placements = self.states.map(|it| Placement::new(it.policies, it.inventory, &self.pod_nets));
        for from in 0..self.parties.len() {
            for to in 0..self.parties.len() {
                let judged = self.compared[from].changed[1] || self.compared[to].changed[0];
                if !judged && self.facts_equal {
                    continue;
                }
                for ip_version in [4, 6] {
                    let all = self.ends(from, to, ip_version, &placements);
                    let of_ends = |(condition, ends): &Ends| {
                        (condition.clone(), self.changes(from, to, ip_version, ends, &prepared))
                    };
                    let changes: Vec<_> = all.iter().map(of_ends).collect();
                    joined(changes).into_iter().try_for_each(&mut take)?;
                }
            }
        }
        Ok(())
    }

    /// The ends of a packet in each state: several if the address of a pod is not known yet, none if there is nothing to compare.
    fn ends(&self, from: usize, to: usize, ip_version: u8, placements: &[Placement<'_>; 2]) -> Vec<Ends> {
        let v4 = ip_version == 4;
        if self.compared[from].address.is_some() && self.compared[to].address.is_some() {
            return Vec::new();
        }
        let spot = |place: usize, example: usize, state: usize| {
            let compared = &self.compared[place];
            let of_version = |address: &IpAddr| address.is_ipv4() == v4;
            match compared.address {
                Some(address) => Some(Spot { address: Some(address), pod: None }).filter(|_| of_version(&address)),
                None => {
                    let pod = compared.examples.get(example).or_else(|| {
                        // Another pod of the same workload.
                        compared
                            .examples
                            .first()
                            .filter(|it| it[0].endpoint.planned.as_ref().is_some_and(|it| it.several))
                    })?;
                    let Pod { cluster, id, endpoint, .. } = pod[state];
                    let address = endpoint.addresses.iter().copied().find(of_version);
                    (address.is_some() || endpoint.planned.as_ref().is_some_and(|it| it.has_family(v4)))
                        .then(|| Spot { address, pod: Some((cluster.clone(), id.clone())) })
                }
            }
        };
        // A pod always reaches itself: within a group the pair is of two.
        let second = usize::from(from == to);
        let of_state = |state| Some([spot(from, 0, state)?, spot(to, second, state)?]);
        let (Some(first), Some(last)) = (of_state(0), of_state(1)) else { return Vec::new() };
        let known = |[source, destination]: &[Spot; 2]| {
            let end = |spot: &Spot| Some(End { address: spot.address?, pod: spot.pod.clone() });
            Some([end(source)?, end(destination)?])
        };
        if let (Some(first), Some(last)) = (known(&first), known(&last)) {
            return vec![(None, [first, last])];
        }
        let mut lists = [NetLists::new(), NetLists::new()];
        for (placement, spots) in placements.iter().zip([&first, &last]) {
            for (spot, direction) in spots.iter().zip([Direction::Egress, Direction::Ingress]) {
                let Some(pod) = &spot.pod else { continue };
                for (all, own) in lists.iter_mut().zip(&*placement.lists(pod, direction)) {
                    all.extend(own.iter().cloned());
                }
            }
        }
        // An address that is not known in one of the states is none that is known in the other.
        let open = |end: usize| Spot { address: first[end].address.and(last[end].address), ..first[end].clone() };
        let (source, destination) = (open(0), open(1));
        let (cases, all) = match placements[0].cases_of(&source, &destination, &lists, v4) {
            Some(cases) => (cases, true),
            None => (placements[0].cases_of(&source, &destination, &Default::default(), v4).unwrap_or_default(), false),
        };
        let many = cases.len() > 1;
        let of_case = |case: &Case| {
            let end =
                |spot: &Spot, end: &End| End { address: spot.address.unwrap_or(end.address), pod: spot.pod.clone() };
            let ends = |[from, to]: &[Spot; 2]| [end(from, &case.source), end(to, &case.destination)];
            // An end whose addresses make no difference to rules is not named.
            let tells = |end: usize| cases.iter().any(|it| [&it.from, &it.to][end] != [&case.from, &case.to][end]);
            let parts = [("source's", &case.from), ("destination's", &case.to)];
            let parts = parts.into_iter().enumerate().filter(|(at, _)| tells(*at)).map(|(_, part)| part);
            let parts = parts.filter_map(|(end, class)| Some(format!("the {end} address is {}", class.as_ref()?)));
            let condition = match all {
                true => parts.collect::<Vec<_>>().join(" and "),
                false => "the addresses are in no net that a rule names; others are not compared".to_owned(),
            };
            (Some(condition).filter(|_| many || !all), [ends(&first), ends(&last)])
        };
        cases.iter().map(of_case).collect()
    }

    fn changes(
        &self,
        from: usize,
        to: usize,
        ip_version: u8,
        ends: &[[End; 2]; 2],
        prepared: &[Prepared<'_>; 2],
    ) -> Vec<Change> {
        let mut changes: Vec<Change> = Vec::new();
        for (packets, protocol, port, icmp) in self.packets(from, to, ip_version) {
            let answer = |state: usize| {
                let [source, destination] = ends[state].clone();
                let source_port = if packets.ports.is_some() { 40_000 } else { 0 };
                let query = Query { source, destination, protocol, source_port, destination_port: port, icmp };
                prepared[state].evaluate(&query)
            };
            let (before, after) = (answer(0).verdict, answer(1));
            if before == after.verdict {
                continue;
            }
            let same = changes.iter_mut().find(|change| change.before == before && change.after == after);
            match same {
                Some(change) => match change.packets.last_mut().and_then(|last| last.extended(&packets)) {
                    Some(joined) => *change.packets.last_mut().expect("just seen") = joined,
                    None => change.packets.push(packets),
                },
                None => {
                    let packets = vec![packets];
                    changes.push(Change { from, to, ip_version, packets, before, after, condition: None });
                }
            }
        }
        changes
    }

    /// Classes of packets that all rules between the two parties treat alike, each with an example.
    fn packets(&self, from: usize, to: usize, ip_version: u8) -> Vec<Example> {
        if !self.only_ports.is_empty() {
            let packet = |(protocol, port): &(u8, u16)| {
                let ports = has_ports(*protocol).then_some((*port, *port));
                let packets = Packets { protocol: Some(*protocol), ports, icmp: None };
                (packets, *protocol, if ports.is_some() { *port } else { 0 }, None)
            };
            return self.only_ports.iter().map(packet).collect();
        }
        let (egress, ingress) = (&self.compared[from].criteria[1], &self.compared[to].criteria[0]);
        let own_icmp = if ip_version == 4 { 1 } else { 58 };
        let mut protocols = BTreeSet::from([6, 17, 132, own_icmp]);
        protocols.extend(egress.protocols.iter().chain(&ingress.protocols));
        let mut cuts: BTreeSet<u16> = egress.cuts.union(&ingress.cuts).copied().collect();
        cuts.insert(0);
        for (protocol, port) in self.compared[from].ports.iter().chain(&self.compared[to].ports) {
            protocols.insert(*protocol);
            cuts.extend([Some(*port), port.checked_add(1)].into_iter().flatten());
        }
        let cuts: Vec<u16> = cuts.into_iter().collect();
        let mut all = Vec::new();
        for protocol in &protocols {
            let packets = |ports, icmp| Packets { protocol: Some(*protocol), ports, icmp };
            if has_ports(*protocol) {
                for (at, first) in cuts.iter().enumerate() {
                    let last = cuts.get(at + 1).map_or(u16::MAX, |next| next - 1);
                    all.push((packets(Some((*first, last)), None), *protocol, *first, None));
                }
            } else if *protocol == own_icmp {
                let in_rules: BTreeSet<_> = egress.icmp.union(&ingress.icmp).copied().collect();
                for (kind, code) in icmp_examples(&in_rules) {
                    let code_named = in_rules.contains(&(kind, Some(code))).then_some(code);
                    let named = in_rules.iter().any(|(of, _)| *of == kind).then_some((kind, code_named));
                    all.push((packets(None, named), *protocol, 0, Some((kind, code))));
                }
            } else {
                all.push((packets(None, None), *protocol, 0, None));
            }
        }
        // 253 and 254 are for experiments (RFC 3692), so that policies hardly name them.
        let unnamed = (0..=254)
            .rev()
            .find(|number| !protocols.contains(number) && !has_ports(*number) && *number != 1 && *number != 58);
        all.extend(unnamed.map(|number| (Packets { protocol: None, ports: None, icmp: None }, number, 0, None)));
        all
    }
}

impl Party<'_> {
    /// The number of pods; 0 for an address.
    pub fn count(&self) -> usize {
        match self {
            Self::Pods { members, .. } => members.len(),
            Self::Address(_) => 0,
        }
    }
}

impl Packets {
    /// Both as one, if `next` continues the port range.
    fn extended(&self, next: &Self) -> Option<Self> {
        let ((low, end), (start, high)) = (self.ports?, next.ports?);
        let joins = self.protocol == next.protocol && end.checked_add(1) == Some(start);
        joins.then_some(Self { ports: Some((low, high)), ..*self })
    }
}

/// How many conditions are named of what changes alike.
const MAX_CONDITIONS: usize = 3;

/// What changes for each case, with its condition, as one list: what changes in all cases has none.
fn joined(cases: Vec<(Option<String>, Vec<Change>)>) -> Vec<Change> {
    let many = cases.len();
    let mut alike: Vec<(Vec<String>, Vec<Change>)> = Vec::new();
    for (condition, changes) in cases {
        let says = |changes: &[Change]| -> Vec<_> {
            changes.iter().map(|it| (it.packets.clone(), it.before, it.after.verdict)).collect()
        };
        match alike.iter_mut().find(|(_, known)| says(known) == says(&changes)) {
            Some((conditions, _)) => conditions.extend(condition),
            None => alike.push((condition.into_iter().collect(), changes)),
        }
    }
    let whole = alike.len() == 1 && many > 1;
    let conditioned = alike.into_iter().flat_map(|(mut conditions, changes)| {
        let more = conditions.len().saturating_sub(MAX_CONDITIONS);
        conditions.truncate(MAX_CONDITIONS);
        let more = if more > 0 { format!(", or in {more} more cases") } else { String::new() };
        let condition = (!whole && !conditions.is_empty()).then(|| conditions.join(", or if ") + &more);
        changes.into_iter().map(move |change| Change { condition: condition.clone(), ..change })
    });
    conditioned.collect()
}

/// Each type and code that is named, and beside each one that is not.
fn icmp_examples(told: &BTreeSet<(u8, Option<u8>)>) -> Vec<(u8, u8)> {
    let kinds: BTreeSet<u8> = told.iter().map(|(kind, _)| *kind).collect();
    let mut examples = Vec::new();
    for kind in &kinds {
        let codes: BTreeSet<u8> = told.iter().filter(|(of, _)| of == kind).filter_map(|(_, code)| *code).collect();
        let other = (0..=u8::MAX).find(|code| !codes.contains(code));
        examples.extend(codes.iter().copied().chain(other).map(|code| (*kind, code)));
    }
    // An echo request of either version, where no policy names it.
    let other = [8, 128].into_iter().chain(0..=u8::MAX).find(|kind| !kinds.contains(kind));
    examples.extend(other.map(|kind| (kind, 0)));
    examples
}

fn is_party(id: &EndpointId, endpoint: &Endpoint) -> bool {
    id.kind == EndpointKind::Pod && endpoint.is_reachable()
}

/// TCP, UDP, DCCP, SCTP and UDP-Lite.
fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 6 | 17 | 33 | 132 | 136)
}

/// Whether the policies of two chains say the same. `known` remembers pairs of policies by their addresses.
fn is_same(
    [first, second]: &[Chain<'_>; 2],
    direction: Direction,
    known: &mut HashMap<(usize, usize, Direction), bool>,
) -> bool {
    let mut same = |a: &Policy, b: &Policy| {
        let key = (std::ptr::from_ref(a) as usize, std::ptr::from_ref(b) as usize, direction);
        key.0 == key.1
            || *known.entry(key).or_insert_with(|| a.id == b.id && rules(a, direction) == rules(b, direction))
    };
    first.len() == second.len() && first.iter().zip(second).all(|(a, b)| a.0 == b.0 && a.1 == b.1 && same(a.2, b.2))
}

impl Criteria {
    fn add(&mut self, rule: &Rule, facts: &Facts<'_>, enforcer: &ClusterName) {
        self.protocols.extend([rule.protocol, rule.not_protocol].into_iter().flatten().map(Protocol::number));
        for port in rule.destination.ports.iter().chain(&rule.destination.not_ports) {
            if let Port::Range(first, last) = port {
                self.cuts.insert(*first);
                self.cuts.extend(last.checked_add(1));
            }
        }
        for Icmp { kind, code } in [rule.icmp, rule.not_icmp].into_iter().flatten() {
            self.icmp.extend(kind.map(|kind| (kind, code)));
        }
        let key = rule.destination.service.as_ref().map(|it| (it.namespace.clone(), it.name.clone()));
        let services = facts.state.inventory.clusters.get(enforcer).map(|cluster| &cluster.services);
        let service = key.and_then(|key| services?.get(&key));
        for (_, protocol, port) in service.into_iter().flat_map(|service| &service.backends) {
            self.protocols.insert(*protocol);
            self.cuts.insert(*port);
            self.cuts.extend(port.checked_add(1));
        }
    }
}

/// Properties of pods that occur in the policies of a state.
struct Facts<'a> {
    state: State<'a>,
    /// The nets of rules and network sets, with a number each.
    nets: HashMap<IpNet, usize>,
    /// The prefix lengths of the nets, for IPv4 and IPv6.
    lengths: [BTreeSet<u8>; 2],
    /// Backends of services in rules, by address.
    backends: HashMap<IpAddr, BTreeSet<Backend>>,
    /// Backends without an address, by cluster and name.
    planned: HashMap<(&'a ClusterName, &'a EndpointId), BTreeSet<Backend>>,
    port_names: BTreeSet<&'a str>,
    plans: BTreeMap<&'a str, Vec<(&'a Layer, &'a Policy)>>,
}

/// The properties of a pod that affect policies, except its cluster and namespace.
#[derive(PartialEq, Eq, Hash)]
struct Key<'a> {
    account: Option<&'a str>,
    labels: Vec<(&'a str, Option<&'a str>)>,
    ports: Vec<(&'a str, u8, u16)>,
    /// For each family: whether there is an address, and the nets and service backends that contain it.
    addresses: [Option<(Vec<usize>, Vec<Backend>)>; 2],
}

impl<'a> Facts<'a> {
    fn new(state: State<'a>) -> Self {
        let State { policies, inventory, view } = state;
        let layers = [&policies.federation].into_iter().chain(policies.clusters.values());
        let all = layers.flat_map(|layer| layer.policies.values());
        let rules = all.flat_map(|policy| [&policy.ingress, &policy.egress]).flatten().flatten();
        let entities: Vec<_> = rules.flat_map(|rule| [&rule.source, &rule.destination]).collect();
        let sets = inventory.clusters.values().flat_map(|cluster| cluster.endpoints.values());
        let sets = sets.chain(inventory.federated_sets.values());
        let written = entities.iter().flat_map(|entity| entity.nets.iter().chain(&entity.not_nets));
        let (mut nets, mut lengths) = (HashMap::new(), [BTreeSet::new(), BTreeSet::new()]);
        for net in written.chain(sets.flat_map(|set| &set.nets)) {
            let next = nets.len();
            nets.entry(net.trunc()).or_insert(next);
            lengths[usize::from(matches!(net, IpNet::V6(_)))].insert(net.prefix_len());
        }
        let named = |port: &'a Port| match port {
            Port::Named(name) => Some(&**name),
            Port::Range(..) => None,
        };
        let ports = entities.iter().flat_map(|entity| entity.ports.iter().chain(&entity.not_ports));
        let port_names = ports.filter_map(named).collect();
        let services: BTreeSet<_> = entities.iter().filter_map(|it| it.service.as_ref()).collect();
        let mut backends: HashMap<IpAddr, BTreeSet<Backend>> = HashMap::new();
        let mut planned: HashMap<_, BTreeSet<Backend>> = HashMap::new();
        let mut number = 0;
        for service in services {
            let key = (service.namespace.clone(), service.name.clone());
            for (name, cluster) in &inventory.clusters {
                number += 1;
                let Some(service) = cluster.services.get(&key) else { continue };
                for address in &service.addresses {
                    backends.entry(*address).or_default().insert((number, None));
                }
                for (address, protocol, port) in &service.backends {
                    backends.entry(*address).or_default().insert((number, Some((*protocol, *port))));
                }
                for (id, ports) in &service.planned {
                    let own = planned.entry((name, id)).or_default();
                    own.insert((number, None));
                    own.extend(ports.iter().map(|port| (number, Some(*port))));
                }
            }
        }
        let plan = |cluster: &'a ClusterName| {
            let layers = [Some(&policies.federation), policies.clusters.get(cluster)].into_iter().flatten();
            let mut plan: Vec<(&Layer, &Policy)> =
                layers.flat_map(|layer| acting(layer, view).into_iter().map(move |policy| (layer, policy))).collect();
            plan.retain(|(_, policy)| policy.enforcers.contains(cluster, cluster));
            in_order(&mut plan);
            (&**cluster, plan)
        };
        let plans = inventory.clusters.keys().map(plan).collect();
        Self { state, nets, lengths, backends, planned, port_names, plans }
    }

    fn key(&self, pod: &Pod<'a>, keys: &BTreeSet<&str>, names: &BTreeSet<&str>) -> Key<'a> {
        let endpoint = pod.endpoint;
        let named = endpoint.ports.iter().filter(|port| names.contains(&*port.name));
        let mut ports: Vec<_> = named.map(|port| (&*port.name, port.protocol, port.port)).collect();
        ports.sort_unstable();
        let within = |address: &IpAddr| {
            let lengths = self.lengths[usize::from(address.is_ipv6())].iter();
            let nets = lengths.filter_map(|length| self.nets.get(&IpNet::new(*address, *length).ok()?.trunc()));
            let backends = self.backends.get(address).into_iter().flatten();
            (nets.copied().collect(), backends.copied().collect())
        };
        let first = |v4: bool| match &endpoint.planned {
            // Of an address that is not known no net is: a number that no net has.
            Some(planned) if !planned.has_family(v4) => None,
            Some(_) => {
                let backends = self.planned.get(&(pod.cluster, pod.id)).into_iter().flatten();
                Some((vec![usize::MAX], backends.copied().collect()))
            }
            None => endpoint.addresses.iter().find(|address| address.is_ipv4() == v4).map(within),
        };
        Key {
            account: endpoint.service_account.as_deref(),
            labels: seen(endpoint, keys),
            ports,
            addresses: [first(true), first(false)],
        }
    }

    /// The policies that judge a pod, in order.
    fn chain(&self, pod: &Pod<'a>, direction: Direction) -> Chain<'a> {
        let labels = EffectiveLabels { cluster: pod.owner, id: pod.id, endpoint: pod.endpoint, first_hand: true };
        let plan = self.plans.get(&**pod.cluster).into_iter().flatten();
        let judging = plan.filter(|(_, policy)| rules(policy, direction).is_some());
        let judging = judging.filter(|(_, policy)| policy.selector.evaluate(&labels) != Tri::No);
        judging.map(|(layer, policy)| (&policy.tier, layer.tier(&policy.tier).1, *policy)).collect()
    }
}
