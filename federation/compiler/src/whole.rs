//! The rule sets of every node of a cluster, from nothing: the obvious way, to which any faster one must be equal.
//!
//! # Unknown never opens
//! Three-valued matching ends here. Of each selector there are the certain members and the possible ones. Allow and Log
//! rules look at the certain members, and at the possible ones where they negate; Deny rules the other way round. A Pass
//! rule passes the certain and is followed by a Deny of the possible. Where the two are equal (nearly always) there is one
//! set. Where they part, both get names of their own, so that a rule that reads the old name never sees fewer members.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::evaluate::order;
use hanse_policy::inventory::{Endpoint, EndpointId as PolicyEndpointId, EndpointKind, Inventory};
use hanse_policy::model::{
    Action, ClusterName, ClusterScope, EntityMatch, IpVersion, Phase as PolicyPhase, Policy, PolicyId as PolicyKey,
    PolicyKind, PolicySet, Port, Protocol, Rule, Selection, ServiceMatch, TierDefault,
};
use hanse_policy::tri::Tri;
use hanse_ruleset as out;
use hanse_ruleset::{
    Chain, EndpointId, Family, LocalEndpoint, Members, NodeConfig, Peer, PortRange, RuleSet, Set, SetId, SocketAddress,
};
use ipnet::IpNet;

/// What is compiled.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    pub cluster: &'a ClusterName,
    pub policies: &'a PolicySet,
    pub inventory: &'a Inventory,
    /// The cluster's nodes with what only the node needs.
    pub nodes: &'a BTreeMap<Arc<str>, NodeConfig>,
}

/// What one policy comes to in this cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyReport {
    /// How many of the cluster's endpoints it selects.
    pub selected: usize,
    /// What is ignored, and why.
    pub ignored: Vec<String>,
}

/// The rule sets of all nodes, and the report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compiled {
    pub nodes: BTreeMap<Arc<str>, RuleSet>,
    pub report: BTreeMap<PolicyKey, PolicyReport>,
}

/// Compiles. O(selections × endpoints), the sets shared between nodes.
pub fn compile(input: Input<'_>) -> Compiled {
    let mut sets = Sets { input, sets: BTreeMap::new(), selections: BTreeMap::new() };
    let mut report = BTreeMap::new();
    let final_allow = input.inventory.clusters.get(input.cluster).is_some_and(|own| own.federated_allow_final);
    let tiers: Vec<CompiledTier> = order(input.policies, input.cluster)
        .into_iter()
        .map(|tier| CompiledTier {
            phase: tier.id.phase,
            name: Arc::clone(&tier.id.name),
            default: match tier.default {
                TierDefault::Deny => out::TierDefault::Deny,
                TierDefault::Pass => out::TierDefault::Pass,
            },
            policies: tier
                .policies
                .into_iter()
                .filter(|policy| policy.acts())
                .map(|policy| compile_policy(policy, final_allow, &mut sets, &mut report))
                .collect(),
        })
        .collect();
    let mut nodes: BTreeMap<Arc<str>, RuleSet> = BTreeMap::new();
    for (name, node) in input.nodes {
        nodes.insert(Arc::clone(name), RuleSet { node: node.clone(), ..RuleSet::default() });
    }
    let own = input.inventory.clusters.get(input.cluster);
    for (id, endpoint) in own.iter().flat_map(|cluster| &cluster.endpoints) {
        let selecting = selecting(input, &tiers, id, endpoint, &mut report);
        let Some(rules) = endpoint.node.as_ref().and_then(|node| nodes.get_mut(node)) else { continue };
        if id.kind != EndpointKind::Pod || endpoint.addresses.is_empty() || endpoint.host_network {
            continue;
        }
        let mut chain = |direction: Direction, to_node: bool| {
            let (chain, policies) = chain(&tiers, &selecting, direction, to_node);
            for policy in policies {
                add_policy(rules, policy, &sets);
            }
            let id = chain.id();
            rules.chains.entry(id).or_insert_with(|| Arc::new(chain));
            id
        };
        let (ingress, egress) = (chain(Direction::Ingress, false), chain(Direction::Egress, false));
        let egress_to_node = chain(Direction::Egress, true);
        let local = EndpointId { namespace: id.namespace.clone().unwrap_or_default(), name: Arc::clone(&id.name) };
        let mut addresses = endpoint.addresses.clone();
        addresses.sort();
        let endpoint = LocalEndpoint { id: local.clone(), addresses, ingress, egress, egress_to_node };
        rules.endpoints.insert(local, Arc::new(endpoint));
    }
    Compiled { nodes, report }
}

struct CompiledTier<'a> {
    phase: PolicyPhase,
    name: Arc<str>,
    default: out::TierDefault,
    policies: Vec<CompiledPolicy<'a>>,
}

struct CompiledPolicy<'a> {
    source: &'a Policy,
    ingress: Option<Arc<out::Policy>>,
    egress: Option<Arc<out::Policy>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

impl CompiledPolicy<'_> {
    fn rules(&self, direction: Direction) -> Option<&Arc<out::Policy>> {
        match direction {
            Direction::Ingress => self.ingress.as_ref(),
            Direction::Egress => self.egress.as_ref(),
        }
    }
}

/// Which policies select an endpoint: tier and place in it.
fn selecting(
    input: Input<'_>,
    tiers: &[CompiledTier<'_>],
    id: &PolicyEndpointId,
    endpoint: &Endpoint,
    report: &mut BTreeMap<PolicyKey, PolicyReport>,
) -> BTreeSet<(usize, usize)> {
    let mut selecting = BTreeSet::new();
    if id.kind != EndpointKind::Pod || endpoint.host_network {
        return selecting;
    }
    for (at, tier) in tiers.iter().enumerate() {
        for (place, policy) in tier.policies.iter().enumerate() {
            let own = Selection { clusters: ClusterScope::Local, selector: policy.source.selector.clone() };
            // A subject that is not known to be outside is inside.
            if input.inventory.selects(input.cluster, &own, input.cluster, id) != Tri::No {
                selecting.insert((at, place));
                report.entry(policy.source.id.clone()).or_default().selected += 1;
            }
        }
    }
    selecting
}

fn chain<'a>(
    tiers: &'a [CompiledTier<'_>],
    selecting: &BTreeSet<(usize, usize)>,
    direction: Direction,
    to_node: bool,
) -> (Chain, Vec<&'a Arc<out::Policy>>) {
    let mut phases: Vec<out::Phase> = Vec::new();
    let mut used = Vec::new();
    for (at, tier) in tiers.iter().enumerate() {
        let applying: Vec<&Arc<out::Policy>> = tier
            .policies
            .iter()
            .enumerate()
            .filter(|(place, _)| selecting.contains(&(at, *place)))
            .filter(|(_, policy)| !to_node || policy.source.id.kind != PolicyKind::KubernetesNetworkPolicy)
            .filter_map(|(_, policy)| policy.rules(direction))
            .collect();
        if applying.is_empty() {
            continue;
        }
        let name: Arc<str> = match tier.phase {
            PolicyPhase::Guard => "Guard".into(),
            PolicyPhase::Local => "Local".into(),
            PolicyPhase::Baseline => "Baseline".into(),
        };
        if phases.last().is_none_or(|phase| phase.name != name) {
            phases.push(out::Phase { name, tiers: Vec::new() });
        }
        let policies = applying.iter().map(|policy| policy.id()).collect();
        if let Some(phase) = phases.last_mut() {
            phase.tiers.push(out::Tier { name: Arc::clone(&tier.name), policies, default: tier.default });
        }
        used.extend(applying);
    }
    (Chain { phases, profile_allows: true }, used)
}

fn add_policy(rules: &mut RuleSet, policy: &Arc<out::Policy>, sets: &Sets<'_>) {
    let id = policy.id();
    if rules.policies.contains_key(&id) {
        return;
    }
    for peer in policy.rules.iter().flat_map(|rule| [&rule.source, &rule.destination]) {
        let named = peer.in_sets.iter().flatten().chain(&peer.not_sets).chain(&peer.in_sockets);
        for set in named.chain(&peer.port_sets).chain(&peer.not_port_sets) {
            if let Some(found) = sets.sets.get(set) {
                rules.sets.entry(*set).or_insert_with(|| Arc::clone(found));
            }
        }
    }
    rules.policies.insert(id, Arc::clone(policy));
}

fn compile_policy<'a>(
    policy: &'a Policy,
    final_allow: bool,
    sets: &mut Sets<'_>,
    report: &mut BTreeMap<PolicyKey, PolicyReport>,
) -> CompiledPolicy<'a> {
    let entry = report.entry(policy.id.clone()).or_default();
    let mut name = policy.id.kind.name().to_owned();
    name.push(' ');
    if let Some(namespace) = &policy.id.namespace {
        name.push_str(namespace);
        name.push('/');
    }
    name.push_str(&policy.id.name);
    let mut direction = |rules: &Option<Vec<Rule>>, side: &str| {
        let rules = rules.as_ref()?;
        let mut compiled = Vec::new();
        for rule in rules {
            if let Some(reason) = rule.unknown_because() {
                let note = format!("{side} rule {}: {reason}", rule.index);
                if !entry.ignored.contains(&note) {
                    entry.ignored.push(note);
                }
            }
            compile_rule(policy, rule, final_allow, sets, &mut compiled);
        }
        Some(Arc::new(out::Policy { name: name.as_str().into(), rules: compiled }))
    };
    let (ingress, egress) = (direction(&policy.ingress, "ingress"), direction(&policy.egress, "egress"));
    CompiledPolicy { source: policy, ingress, egress }
}

/// Which members a positive clause looks at; a negated one looks at the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum View {
    Certain,
    Possible,
}

fn compile_rule(policy: &Policy, rule: &Rule, final_allow: bool, sets: &mut Sets<'_>, into: &mut Vec<out::Rule>) {
    let Some(family) = families(rule) else { return };
    let certain = |sets: &mut Sets<'_>, action| render(policy, rule, family, action, View::Certain, false, sets);
    let possible =
        |sets: &mut Sets<'_>, unknown| render(policy, rule, family, out::Action::Deny, View::Possible, unknown, sets);
    let understood = rule.unknown_because().is_none();
    let leaves = policy.id.cluster.is_none() && !final_allow;
    match rule.action {
        Action::Allow | Action::Log if !understood => {}
        Action::Allow => into.push(certain(sets, if leaves { out::Action::Leave } else { out::Action::Allow })),
        Action::Log => into.push(certain(sets, out::Action::Log)),
        Action::Deny => into.push(possible(sets, !understood)),
        Action::Pass => {
            let deny = possible(sets, true);
            if understood {
                let pass = certain(sets, out::Action::Pass);
                let same = pass.source == deny.source && pass.destination == deny.destination;
                into.push(pass);
                if same {
                    return;
                }
            }
            into.push(deny);
        }
    }
}

/// The families of which a rule speaks: `None`: of neither; `Some(None)`: of both.
fn families(rule: &Rule) -> Option<Option<Family>> {
    let lists = [&rule.source.nets, &rule.source.not_nets, &rule.destination.nets, &rule.destination.not_nets];
    let speaks = |version: IpVersion| {
        let of_version = |net: &IpNet| matches!(net, IpNet::V4(_)) == (version == IpVersion::V4);
        let foreign = match rule.protocol {
            Some(Protocol::Icmp) => version == IpVersion::V6,
            Some(Protocol::IcmpV6) => version == IpVersion::V4,
            _ => false,
        };
        !foreign
            && rule.ip_version.is_none_or(|wanted| wanted == version)
            && lists.into_iter().all(|nets| nets.is_empty() || nets.iter().any(of_version))
    };
    match (speaks(IpVersion::V4), speaks(IpVersion::V6)) {
        (true, true) => Some(None),
        (true, false) => Some(Some(Family::V4)),
        (false, true) => Some(Some(Family::V6)),
        (false, false) => None,
    }
}

fn render(
    policy: &Policy,
    rule: &Rule,
    family: Option<Family>,
    action: out::Action,
    view: View,
    unknown: bool,
    sets: &mut Sets<'_>,
) -> out::Rule {
    let icmp = |icmp: Option<hanse_policy::model::Icmp>| {
        let icmp = icmp?;
        Some(out::Icmp { kind: icmp.kind?, code: icmp.code })
    };
    out::Rule {
        action,
        index: rule.index,
        unknown,
        family,
        protocol: rule.protocol.map(Protocol::number),
        not_protocol: rule.not_protocol.map(Protocol::number),
        icmp: icmp(rule.icmp),
        not_icmp: icmp(rule.not_icmp),
        source: peer(policy, &rule.source, false, view, sets),
        destination: peer(policy, &rule.destination, true, view, sets),
    }
}

fn peer(policy: &Policy, entity: &EntityMatch, is_destination: bool, view: View, sets: &mut Sets<'_>) -> Peer {
    let against = match view {
        View::Certain => View::Possible,
        View::Possible => View::Certain,
    };
    let mut peer = Peer { nets: entity.nets.clone(), not_nets: entity.not_nets.clone(), ..Peer::default() };
    if let Some(selection) = &entity.selection {
        peer.in_sets.push(sets.selection(selection, view));
    }
    if let Some(selection) = &entity.not_selection {
        peer.not_sets = sets.selection(selection, against);
    }
    if let Some(service) = &entity.service {
        match is_destination {
            true => peer.in_sockets.push(sets.service_sockets(service)),
            false => peer.in_sets.push(vec![sets.service_addresses(service)]),
        }
    }
    let scope = entity.named_port_scope(&policy.id);
    for (ports, ranges, named, view) in [
        (&entity.ports, &mut peer.ports, &mut peer.port_sets, view),
        (&entity.not_ports, &mut peer.not_ports, &mut peer.not_port_sets, against),
    ] {
        for port in ports {
            match port {
                Port::Range(first, last) => ranges.push(PortRange { first: *first, last: *last }),
                Port::Named(name) => named.push(sets.named_port(&scope, name, view)),
            }
        }
    }
    peer
}

/// The sets that rules name, made when first named.
struct Sets<'a> {
    input: Input<'a>,
    sets: BTreeMap<SetId, Arc<Set>>,
    selections: BTreeMap<Selection, [Vec<SetId>; 2]>,
}

fn scope_text(scope: &ClusterScope, enforcer: &str) -> String {
    match scope {
        ClusterScope::Local => format!("named {enforcer}"),
        ClusterScope::All => "all".to_owned(),
        ClusterScope::Named(names) => {
            let names: Vec<&str> = names.iter().map(|name| &**name).collect();
            // Cluster names are DNS labels: no comma stands in one.
            format!("named {}", names.join(","))
        }
    }
}

impl Sets<'_> {
    /// The parts of a selector's set: addresses, and nets where there are any.
    fn selection(&mut self, selection: &Selection, view: View) -> Vec<SetId> {
        if !self.selections.contains_key(selection) {
            let made = self.make_selection(selection);
            self.selections.insert(selection.clone(), made);
        }
        let [certain, possible] = &self.selections[selection];
        match view {
            View::Certain => certain.clone(),
            View::Possible => possible.clone(),
        }
    }

    fn make_selection(&mut self, selection: &Selection) -> [Vec<SetId>; 2] {
        let (mut addresses, mut nets) = (Pair::<IpAddr>::default(), Pair::<IpNet>::default());
        let inventory = self.input.inventory;
        let enforcer = self.input.cluster;
        for (name, cluster) in &inventory.clusters {
            if !selection.clusters.contains(enforcer, name) {
                continue;
            }
            for (id, endpoint) in &cluster.endpoints {
                let selected = inventory.selects(enforcer, selection, name, id);
                endpoint.addresses.iter().for_each(|address| addresses.add(*address, selected));
                endpoint.nets.iter().for_each(|net| nets.add(net.trunc(), selected));
            }
        }
        for (id, endpoint) in &inventory.federated_sets {
            let selected = inventory.selects_federated_set(selection, id);
            endpoint.nets.iter().for_each(|net| nets.add(net.trunc(), selected));
        }
        let scope = scope_text(&selection.clusters, enforcer);
        let meaning = [&*scope, &*selection.selector.canonical];
        let has_nets = !nets.possible.is_empty();
        let mut parts = addresses.ids(&[&["selected addresses"], &meaning[..]].concat(), self, Members::Addresses);
        if has_nets {
            let nets = nets.ids(&[&["selected nets"], &meaning[..]].concat(), self, Members::Nets);
            for (parts, nets) in parts.iter_mut().zip(nets) {
                parts.extend(nets);
            }
        }
        parts
    }

    fn named_port(&mut self, scope: &ClusterScope, name: &str, view: View) -> SetId {
        let enforcer = self.input.cluster;
        let mut sockets = Pair::<SocketAddress>::default();
        for (cluster_name, cluster) in &self.input.inventory.clusters {
            if !scope.contains(enforcer, cluster_name) {
                continue;
            }
            let stale = cluster.stale && **cluster_name != **enforcer;
            let known = if stale { Tri::Unknown } else { Tri::Yes };
            for endpoint in cluster.endpoints.values() {
                for port in endpoint.ports.iter().filter(|port| *port.name == *name) {
                    for address in &endpoint.addresses {
                        let (protocol, port) = (port.protocol, port.port);
                        sockets.add(SocketAddress { address: *address, protocol, port }, known);
                    }
                }
            }
        }
        let scope = scope_text(scope, enforcer);
        let [certain, possible] = sockets.ids(&["named port", &scope, name], self, Members::Sockets);
        let chosen = if view == View::Certain { certain } else { possible };
        chosen[0]
    }

    fn service_sockets(&mut self, service: &ServiceMatch) -> SetId {
        let backends = self.backends(service);
        let sockets = backends.into_iter().map(|(address, protocol, port)| SocketAddress { address, protocol, port });
        let id = SetId::of_meaning(&["service sockets", &service.namespace, &service.name]);
        self.insert(id, Members::Sockets(sockets.collect()))
    }

    fn service_addresses(&mut self, service: &ServiceMatch) -> SetId {
        let addresses = self.backends(service).into_iter().map(|(address, ..)| address).collect();
        let id = SetId::of_meaning(&["service addresses", &service.namespace, &service.name]);
        self.insert(id, Members::Addresses(addresses))
    }

    fn backends(&self, service: &ServiceMatch) -> BTreeSet<(IpAddr, u8, u16)> {
        let own = self.input.inventory.clusters.get(self.input.cluster);
        let key = (Arc::clone(&service.namespace), Arc::clone(&service.name));
        own.and_then(|cluster| cluster.services.get(&key)).map(|found| found.backends.clone()).unwrap_or_default()
    }

    fn insert(&mut self, id: SetId, members: Members) -> SetId {
        self.sets.entry(id).or_insert_with(|| Arc::new(Set { id, members }));
        id
    }
}

/// The certain members and the possible ones.
struct Pair<T> {
    certain: BTreeSet<T>,
    possible: BTreeSet<T>,
}

impl<T> Default for Pair<T> {
    fn default() -> Self {
        Self { certain: BTreeSet::new(), possible: BTreeSet::new() }
    }
}

impl<T: Ord + Copy> Pair<T> {
    fn add(&mut self, member: T, selected: Tri) {
        if selected != Tri::No {
            self.possible.insert(member);
        }
        if selected == Tri::Yes {
            self.certain.insert(member);
        }
    }

    /// One set where both are equal, else two with names of their own.
    fn ids(self, meaning: &[&str], sets: &mut Sets<'_>, wrap: fn(BTreeSet<T>) -> Members) -> [Vec<SetId>; 2] {
        let named = |view: &str| SetId::of_meaning(&[meaning, &[view]].concat());
        if self.certain == self.possible {
            let id = sets.insert(named("known"), wrap(self.certain));
            return [vec![id], vec![id]];
        }
        let certain = sets.insert(named("certain"), wrap(self.certain));
        let possible = sets.insert(named("possible"), wrap(self.possible));
        [vec![certain], vec![possible]]
    }
}
