//! A policy in compact form: its selections by their ids in the index. Most rules have few conditions, and a cluster has up
//! to hundreds of thousands of rules.

use std::sync::Arc;

use hanse_policy::model::{
    self, Action, ClusterName, ClusterScope, EntityMatch, IpVersion, Order, PolicyId, Port, Protocol, ServiceMatch,
};
use hanse_policy::selector::Selector;
use hanse_ruleset::{Family, Icmp};
use ipnet::IpNet;

use crate::report::{Direction, Reason};
use hanse_policy::indexed::SelectorId;

#[derive(Debug, PartialEq)]
pub(crate) struct Policy {
    pub id: PolicyId,
    pub order: Order,
    /// The pods that it applies to; `None` where it does not act, or another cluster enforces it.
    pub subject: Option<SelectorId>,
    /// Why it does not act.
    pub idle: Box<[Reason]>,
    /// Ingress, egress.
    rules: [Option<Box<[Rule]>>; 2],
}

#[derive(Debug, PartialEq)]
pub(crate) struct Rule {
    pub action: Action,
    pub index: u32,
    /// The families that it is for: `None` for neither, `Some(None)` for both.
    pub family: Option<Option<Family>>,
    pub protocol: Option<u8>,
    pub not_protocol: Option<u8>,
    pub icmp: Option<Icmp>,
    pub not_icmp: Option<Icmp>,
    pub unknown_because: Option<Arc<str>>,
    /// `None` says nothing.
    pub source: Option<Box<Entity>>,
    pub destination: Option<Box<Entity>>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Entity {
    pub nets: Box<[IpNet]>,
    pub not_nets: Box<[IpNet]>,
    pub selection: Option<Selection>,
    pub not_selection: Option<Selection>,
    pub ports: Box<[Port]>,
    pub not_ports: Box<[Port]>,
    /// The clusters on whose pods named ports are looked up, on those that `selection` selects where it is given; `Local`
    /// where there is no name.
    pub port_scope: ClusterScope,
    pub service: Option<ServiceMatch>,
}

/// Has one use of its selector.
#[derive(Debug, PartialEq)]
pub(crate) struct Selection {
    pub selector: SelectorId,
    pub clusters: ClusterScope,
}

impl Policy {
    /// Takes what counts in `local`. `register` takes a use of a selector; only a policy that acts here names any.
    pub fn new(policy: model::Policy, local: &ClusterName, register: &mut impl FnMut(&Selector) -> SelectorId) -> Self {
        let mut idle = Vec::new();
        if policy.staged.is_some() {
            idle.push(Reason::Staged);
        }
        if policy.host_only {
            idle.push(Reason::HostOnly);
        }
        if !policy.enforcers.contains(local, local) {
            idle.push(Reason::EnforcedElsewhere);
        }
        let acts = idle.is_empty();
        let subject = acts.then(|| register(&policy.selector));
        let mut select = |selection: model::Selection| {
            acts.then(|| Selection { selector: register(&selection.selector), clusters: selection.clusters })
        };
        let mut take = |rules: Option<Vec<model::Rule>>| -> Option<Box<[Rule]>> {
            Some(rules?.into_iter().map(|rule| Rule::new(rule, &policy.id, &mut select)).collect())
        };
        let rules = [take(policy.ingress), take(policy.egress)];
        Self { id: policy.id, order: policy.order, subject, idle: idle.into(), rules }
    }

    /// `None`: it does not apply in this direction.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        self.rules[direction as usize].as_deref()
    }

    /// Every rule, with its direction.
    pub fn all_rules(&self) -> impl Iterator<Item = (Direction, &Rule)> {
        [Direction::Ingress, Direction::Egress]
            .into_iter()
            .flat_map(|direction| self.rules(direction).into_iter().flatten().map(move |rule| (direction, rule)))
    }

    /// Every use of a selector that it has.
    pub fn selectors(&self) -> impl Iterator<Item = SelectorId> {
        let named = self.all_rules().flat_map(|(_, rule)| rule.selections()).map(|selection| selection.selector);
        self.subject.into_iter().chain(named)
    }
}

impl Rule {
    fn new(
        rule: model::Rule,
        policy: &PolicyId,
        select: &mut impl FnMut(model::Selection) -> Option<Selection>,
    ) -> Self {
        let icmp = |icmp: Option<model::Icmp>| icmp.and_then(|it| it.kind.map(|kind| Icmp { kind, code: it.code }));
        Self {
            action: rule.action,
            index: rule.index,
            family: families(&rule),
            protocol: rule.protocol.map(Protocol::number),
            not_protocol: rule.not_protocol.map(Protocol::number),
            icmp: icmp(rule.icmp),
            not_icmp: icmp(rule.not_icmp),
            unknown_because: rule.unknown_because().map(Arc::from),
            source: Entity::new(rule.source, policy, select),
            destination: Entity::new(rule.destination, policy, select),
        }
    }

    pub fn selections(&self) -> impl Iterator<Item = &Selection> {
        let ends = self.source.iter().chain(&self.destination);
        ends.flat_map(|entity| entity.selection.iter().chain(&entity.not_selection))
    }
}

impl Entity {
    fn new(
        entity: EntityMatch,
        policy: &PolicyId,
        select: &mut impl FnMut(model::Selection) -> Option<Selection>,
    ) -> Option<Box<Self>> {
        if entity == EntityMatch::default() {
            return None;
        }
        let is_named = |port: &Port| matches!(port, Port::Named(_));
        let looks_up = entity.ports.iter().chain(&entity.not_ports).any(is_named);
        let port_scope = if looks_up { entity.named_port_pods(policy).clusters.clone() } else { ClusterScope::Local };
        Some(Box::new(Self {
            nets: nets(&entity.nets),
            not_nets: nets(&entity.not_nets),
            selection: entity.selection.and_then(&mut *select),
            not_selection: entity.not_selection.and_then(select),
            ports: entity.ports.into(),
            not_ports: entity.not_ports.into(),
            port_scope,
            service: entity.service,
        }))
    }
}

/// Masked, sorted, without duplicates.
fn nets(nets: &[IpNet]) -> Box<[IpNet]> {
    let mut nets: Vec<IpNet> = nets.iter().map(IpNet::trunc).collect();
    nets.sort_unstable();
    nets.dedup();
    nets.into()
}

/// A list of nets without any of a family, and the *name* of the other family's ICMP, switch a rule off for that family.
fn families(rule: &model::Rule) -> Option<Option<Family>> {
    let lists = [&rule.source.nets, &rule.source.not_nets, &rule.destination.nets, &rule.destination.not_nets];
    let is_for = |version: IpVersion| {
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
    match (is_for(IpVersion::V4), is_for(IpVersion::V6)) {
        (true, true) => Some(None),
        (true, false) => Some(Some(Family::V4)),
        (false, true) => Some(Some(Family::V6)),
        (false, false) => None,
    }
}
