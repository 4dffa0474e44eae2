//! One direction of one policy, as rules over sets.
//!
//! Matching has three values, and a rule set two: every rule is written so that what is unknown fails closed. A rule that
//! opens or only notes asks for what certainly matches: certain members for what must hold, possible members for what
//! must not. One that closes asks the other way round.

use std::sync::Arc;

use hanse_policy::model::{self, EntityMatch, IpVersion, Policy, Port, Protocol};
use hanse_ruleset::{Action, Family, Icmp, Peer, PortRange, Rule};
use ipnet::IpNet;

use crate::inventory::Inventory;
use crate::pool::{PoolId, Pools, SetIndex, Source};
use crate::report::Direction;

/// What a compiled direction is made of.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub policy: hanse_ruleset::Policy,
    /// Sorted, without doubles.
    pub sets: Vec<SetIndex>,
    pub pools: Vec<PoolId>,
}

/// `user` is the policy's number, by which pools know who names them.
pub(crate) fn compile(
    pools: &mut Pools,
    inventory: &Inventory,
    policy: &Policy,
    user: u32,
    direction: Direction,
    federated_allow_final: bool,
) -> Compiled {
    let rules = match direction {
        Direction::Ingress => &policy.ingress,
        Direction::Egress => &policy.egress,
    };
    let mut writer = Writer { pools, inventory, policy, user, sets: Vec::new(), named: Vec::new() };
    let leaves = policy.id.cluster.is_none() && !federated_allow_final;
    let allow = if leaves { Action::Leave } else { Action::Allow };
    // At most two of each, nearly always one.
    let mut written = Vec::with_capacity(rules.as_ref().map_or(0, Vec::len));
    for rule in rules.iter().flatten() {
        let Some(family) = families(rule) else { continue };
        let understood = rule.unknown_because().is_none();
        let mut write = |action, matching, unknown| {
            let rule = writer.rule(rule, family, action, matching, unknown);
            written.push(rule);
        };
        match (rule.action, understood) {
            (model::Action::Allow | model::Action::Log, false) => {}
            (model::Action::Allow, true) => write(allow, Matching::Certain, false),
            (model::Action::Log, true) => write(Action::Log, Matching::Certain, false),
            (model::Action::Deny, _) => write(Action::Deny, Matching::Possible, !understood),
            (model::Action::Pass, false) => write(Action::Deny, Matching::Possible, true),
            (model::Action::Pass, true) => {
                write(Action::Pass, Matching::Certain, false);
                if writer.is_uncertain(rule) {
                    let rule = writer.rule(rule, family, Action::Deny, Matching::Possible, true);
                    written.push(rule);
                }
            }
        }
    }
    written.shrink_to_fit();
    let Writer { mut sets, mut named, .. } = writer;
    sets.sort_unstable();
    sets.dedup();
    named.sort_unstable();
    named.dedup();
    sets.shrink_to_fit();
    let policy = hanse_ruleset::Policy { name: name(&policy.id), rules: written };
    Compiled { policy, sets, pools: named }
}

/// `kind namespace/name`, or `kind name` of what has no namespace.
pub(crate) fn name(id: &model::PolicyId) -> Arc<str> {
    let kind = id.kind.name();
    match &id.namespace {
        Some(namespace) => format!("{kind} {namespace}/{}", id.name).into(),
        None => format!("{kind} {}", id.name).into(),
    }
}

/// The families that a rule speaks of: `None` of neither, `Some(None)` of both. A list of nets without any of a family,
/// and the *name* of the other family's ICMP, switch it off for that family.
pub(crate) fn families(rule: &model::Rule) -> Option<Option<Family>> {
    let lists = [&rule.source.nets, &rule.source.not_nets, &rule.destination.nets, &rule.destination.not_nets];
    let speaks = |version: IpVersion| {
        let of_version = |net: &IpNet| matches!(net, IpNet::V4(_)) == (version == IpVersion::V4);
        let foreign = match rule.protocol {
            Some(Protocol::Icmp) => version == IpVersion::V6,
            Some(Protocol::IcmpV6) => version == IpVersion::V4,
            _ => false,
        };
        rule.ip_version.is_none_or(|wanted| wanted == version)
            && !foreign
            && lists.into_iter().all(|nets| nets.is_empty() || nets.iter().any(of_version))
    };
    match (speaks(IpVersion::V4), speaks(IpVersion::V6)) {
        (true, true) => Some(None),
        (true, false) => Some(Some(Family::V4)),
        (false, true) => Some(Some(Family::V6)),
        (false, false) => None,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Matching {
    Certain,
    Possible,
}

struct Writer<'a> {
    pools: &'a mut Pools,
    inventory: &'a Inventory,
    policy: &'a Policy,
    user: u32,
    sets: Vec<SetIndex>,
    named: Vec<PoolId>,
}

impl Writer<'_> {
    fn rule(
        &mut self,
        rule: &model::Rule,
        family: Option<Family>,
        action: Action,
        matching: Matching,
        unknown: bool,
    ) -> Rule {
        let icmp = |icmp: Option<model::Icmp>| icmp.and_then(|it| it.kind.map(|kind| Icmp { kind, code: it.code }));
        Rule {
            action,
            index: rule.index,
            unknown,
            family,
            protocol: rule.protocol.map(Protocol::number),
            not_protocol: rule.not_protocol.map(Protocol::number),
            icmp: icmp(rule.icmp),
            not_icmp: icmp(rule.not_icmp),
            source: self.peer(&rule.source, matching, false),
            destination: self.peer(&rule.destination, matching, true),
        }
    }

    fn peer(&mut self, entity: &EntityMatch, matching: Matching, is_destination: bool) -> Peer {
        let (wanted, unwanted) = (matching == Matching::Possible, matching == Matching::Certain);
        let mut peer = Peer { nets: nets(&entity.nets), not_nets: nets(&entity.not_nets), ..Peer::default() };
        for port in &entity.ports {
            match port {
                Port::Range(first, last) => peer.ports.push(PortRange { first: *first, last: *last }),
                Port::Named(name) => {
                    let pool = self.port(entity, name);
                    peer.port_sets.extend(self.sets(pool, wanted));
                }
            }
        }
        // A range that holds nothing still says that there is a port to match.
        for port in &entity.not_ports {
            match port {
                Port::Range(first, last) => peer.not_ports.push(PortRange { first: *first, last: *last }),
                Port::Named(name) => {
                    let pool = self.port(entity, name);
                    peer.not_port_sets.extend(self.sets(pool, unwanted));
                }
            }
        }
        if let Some(service) = &entity.service {
            let set = self.pools.service_set(service, is_destination);
            self.sets.push(set);
            let id = self.pools.held(set).id;
            if is_destination { peer.in_sockets.push(id) } else { peer.in_sets.push(vec![id]) }
        }
        if let Some(selection) = &entity.selection
            && let Some(pool) = self.selection(selection)
        {
            let sets = self.sets(pool, wanted);
            peer.in_sets.push(sets);
        }
        if let Some(selection) = &entity.not_selection
            && let Some(pool) = self.selection(selection)
        {
            peer.not_sets = self.sets(pool, unwanted);
        }
        for list in [&mut peer.ports, &mut peer.not_ports] {
            list.sort_unstable();
            list.dedup();
        }
        for list in [&mut peer.port_sets, &mut peer.not_port_sets] {
            list.sort_unstable();
            list.dedup();
        }
        peer
    }

    fn selection(&mut self, selection: &model::Selection) -> Option<PoolId> {
        // Every selector of a policy that acts is registered.
        let selector = self.inventory.index.find(&selection.selector)?;
        let pool = self.pools.pool(self.inventory, Source::Selector(selector), &selection.clusters, self.user);
        self.named.push(pool);
        Some(pool)
    }

    fn port(&mut self, entity: &EntityMatch, name: &Arc<str>) -> PoolId {
        let scope = entity.named_port_scope(&self.policy.id);
        let pool = self.pools.pool(self.inventory, Source::Port(name.clone()), &scope, self.user);
        self.named.push(pool);
        pool
    }

    fn sets(&mut self, pool: PoolId, possible: bool) -> Vec<hanse_ruleset::SetId> {
        let sets = self.pools.sets_of(self.inventory, pool, possible);
        self.sets.extend(&sets);
        sets.into_iter().map(|set| self.pools.held(set).id).collect()
    }

    fn is_uncertain(&mut self, rule: &model::Rule) -> bool {
        let mut pools = Vec::new();
        for entity in [&rule.source, &rule.destination] {
            for selection in entity.selection.iter().chain(&entity.not_selection) {
                pools.extend(self.selection(selection));
            }
            for port in entity.ports.iter().chain(&entity.not_ports) {
                if let Port::Named(name) = port {
                    pools.push(self.port(entity, name));
                }
            }
        }
        pools.into_iter().any(|pool| self.pools.is_uncertain(pool))
    }
}

fn nets(nets: &[IpNet]) -> Vec<IpNet> {
    let mut nets: Vec<IpNet> = nets.iter().map(IpNet::trunc).collect();
    nets.sort_unstable();
    nets.dedup();
    nets
}
