//! One direction of one policy, as rules over sets.
//!
//! Matching has three values, and a rule set two: every rule is written so that what is unknown fails closed. A rule that
//! allows or logs requires what certainly matches: certain members for what must match, possible members for what must
//! not. A rule that denies requires the opposite. A Pass rule passes the certain, and is followed by a Deny of the
//! possible where the two differ.

use std::sync::Arc;

use hanse_policy::model::{self, ClusterScope, Port};
use hanse_ruleset::{Action, Family, Peer, PortRange};

use crate::ids::{PolicyIndex, PoolId, SetIndex};
use crate::policy::{Entity, Policy, Rule, Selection};
use crate::pool::{Pools, Source};
use crate::report::Direction;
use hanse_policy::indexed::IndexedInventory;

/// What a compiled direction is made of.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub policy: hanse_ruleset::Policy,
    /// Sorted, without duplicates.
    pub sets: Vec<SetIndex>,
    pub pools: Vec<PoolId>,
}

/// `user` is the policy's number, by which pools know who names them.
pub(crate) fn compile(
    pools: &mut Pools,
    inventory: &IndexedInventory,
    policy: &Policy,
    user: PolicyIndex,
    direction: Direction,
    federated_allow_final: bool,
) -> Compiled {
    let rules = policy.rules(direction).unwrap_or_default();
    let mut writer = Writer { pools, inventory, user, sets: Vec::new(), named: Vec::new() };
    let leaves = policy.id.cluster.is_none() && !federated_allow_final;
    let allow = if leaves { Action::Leave } else { Action::Allow };
    // At most two of each, nearly always one.
    let mut written = Vec::with_capacity(rules.len());
    for rule in rules {
        let Some(family) = rule.family else { continue };
        let understood = rule.unknown_because.is_none();
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
fn name(id: &model::PolicyId) -> Arc<str> {
    let kind = id.kind.name();
    match &id.namespace {
        Some(namespace) => format!("{kind} {namespace}/{}", id.name).into(),
        None => format!("{kind} {}", id.name).into(),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Matching {
    Certain,
    Possible,
}

struct Writer<'a> {
    pools: &'a mut Pools,
    inventory: &'a IndexedInventory,
    user: PolicyIndex,
    sets: Vec<SetIndex>,
    named: Vec<PoolId>,
}

impl Writer<'_> {
    fn rule(
        &mut self,
        rule: &Rule,
        family: Option<Family>,
        action: Action,
        matching: Matching,
        unknown: bool,
    ) -> hanse_ruleset::Rule {
        let mut peer = |entity: &Option<Box<Entity>>, is_destination| match entity {
            Some(entity) => self.peer(entity, matching, is_destination),
            None => Peer::default(),
        };
        hanse_ruleset::Rule {
            action,
            index: rule.index,
            unknown,
            family,
            protocol: rule.protocol,
            not_protocol: rule.not_protocol,
            icmp: rule.icmp,
            not_icmp: rule.not_icmp,
            source: peer(&rule.source, false),
            destination: peer(&rule.destination, true),
        }
    }

    fn peer(&mut self, entity: &Entity, matching: Matching, is_destination: bool) -> Peer {
        let (wanted, unwanted) = (matching == Matching::Possible, matching == Matching::Certain);
        let mut peer = Peer { nets: entity.nets.to_vec(), not_nets: entity.not_nets.to_vec(), ..Peer::default() };
        (peer.ports, peer.port_sets) = self.ports(&entity.ports, entity, wanted);
        (peer.not_ports, peer.not_port_sets) = self.ports(&entity.not_ports, entity, unwanted);
        if let Some(selection) = &entity.selection {
            let pool = self.selection(selection);
            peer.in_sets = vec![self.sets(pool, wanted)];
        }
        if let Some(service) = &entity.service {
            let set = self.pools.service_set(self.inventory, service, is_destination);
            self.sets.push(set);
            let id = self.pools.set(set).id;
            if is_destination { peer.in_sockets.push(id) } else { peer.in_sets.push(vec![id]) }
        }
        if let Some(selection) = &entity.not_selection {
            let pool = self.selection(selection);
            peer.not_sets = self.sets(pool, unwanted);
        }
        peer
    }

    /// Both sorted, without duplicates.
    fn ports(
        &mut self,
        ports: &[Port],
        entity: &Entity,
        possible: bool,
    ) -> (Vec<PortRange>, Vec<hanse_ruleset::SetId>) {
        let (mut ranges, mut named) = (Vec::new(), Vec::new());
        for port in ports {
            match port {
                // A range that holds nothing still says that there is a port to match.
                Port::Range(first, last) => ranges.push(PortRange { first: *first, last: *last }),
                Port::Named(name) => {
                    let pool = self.port(name, entity);
                    named.extend(self.sets(pool, possible));
                }
            }
        }
        ranges.sort_unstable();
        ranges.dedup();
        named.sort_unstable();
        named.dedup();
        (ranges, named)
    }

    fn selection(&mut self, selection: &Selection) -> PoolId {
        self.pool(Source::Selector(selection.selector), &selection.clusters)
    }

    fn port(&mut self, name: &Arc<str>, entity: &Entity) -> PoolId {
        let selector = entity.selection.as_ref().map(|selection| selection.selector);
        self.pool(Source::Port(name.clone(), selector), &entity.port_scope)
    }

    fn pool(&mut self, source: Source, scope: &ClusterScope) -> PoolId {
        let pool = self.pools.pool(self.inventory, source, scope, self.user);
        self.named.push(pool);
        pool
    }

    fn sets(&mut self, pool: PoolId, possible: bool) -> Vec<hanse_ruleset::SetId> {
        let sets = self.pools.sets_of(self.inventory, pool, possible);
        self.sets.extend(&sets);
        sets.into_iter().map(|set| self.pools.set(set).id).collect()
    }

    fn is_uncertain(&mut self, rule: &Rule) -> bool {
        let mut pools: Vec<PoolId> = rule.selections().map(|selection| self.selection(selection)).collect();
        for entity in rule.source.iter().chain(&rule.destination) {
            for port in entity.ports.iter().chain(&entity.not_ports) {
                if let Port::Named(name) = port {
                    pools.push(self.port(name, entity));
                }
            }
        }
        pools.into_iter().any(|pool| self.pools.is_uncertain(pool))
    }
}
