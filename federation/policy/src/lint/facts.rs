//! Facts that several checks use.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ipnet::IpNet;

use super::imply::{everything, is_within};
use super::services;
use crate::evaluate::Direction;
use crate::inventory::{Cluster, EffectiveLabels, EndpointId, EndpointKind, Inventory, selects};
use crate::model::{Action, ClusterName, ClusterScope, Policy, PolicyId, Rule, Selection, StagedAction};
use crate::selector::{Expr, Selector, needs};
use crate::tri::Tri;
use crate::workload::Workload;

/// The clusters without known pods.
pub fn without_pods(inventory: &Inventory) -> BTreeSet<&ClusterName> {
    let has_pods = |cluster: &Cluster| cluster.endpoints.keys().any(|id| id.kind == EndpointKind::Pod);
    inventory.clusters.iter().filter(|(_, cluster)| !has_pods(cluster)).map(|(name, _)| name).collect()
}

pub(super) const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// Whether a policy affects pods, now or when it is committed.
pub(super) fn counts(policy: &Policy) -> bool {
    !policy.host_only && matches!(policy.staged, None | Some(StagedAction::Set))
}

pub(super) fn enforcers<'a>(policy: &'a Policy, inventory: &'a Inventory) -> Vec<&'a ClusterName> {
    match &policy.id.cluster {
        Some(own) => vec![own],
        None => inventory.clusters.keys().filter(|name| policy.enforcers.contains(name, name)).collect(),
    }
}

pub(super) fn named(scope: &ClusterScope) -> impl Iterator<Item = &ClusterName> {
    match scope {
        ClusterScope::Named(names) => Some(names.iter()),
        ClusterScope::Local | ClusterScope::All => None,
    }
    .into_iter()
    .flatten()
}

/// The rules as written, each with the parts that it was converted into.
pub(super) fn written(list: &[Rule]) -> BTreeMap<u32, Vec<&Rule>> {
    let mut written: BTreeMap<u32, Vec<&Rule>> = BTreeMap::new();
    for rule in list {
        written.entry(rule.index).or_default().push(rule);
    }
    written
}

pub(super) type Workloads<'a> = BTreeMap<&'a ClusterName, Vec<Workload<'a>>>;

/// What selections select, evaluated once each.
pub(super) struct Facts<'a> {
    pub inventory: &'a Inventory,
    pub workloads: &'a Workloads<'a>,
    pub services: services::ServiceAddresses<'a>,
    pub without_pods: BTreeSet<&'a ClusterName>,
    /// Clusters with the DNS servers that they are assumed to have.
    pub assumed: BTreeMap<ClusterName, Cluster>,
    pub known: HashMap<(Option<ClusterName>, Selection), bool>,
}

impl Facts<'_> {
    /// The pods of a cluster that a policy with this selector is for, or may be for when they run.
    pub fn subjects(&self, cluster: &ClusterName, subject: &Selector) -> impl Iterator<Item = &Workload<'_>> {
        let pods = self.workloads.get(cluster).into_iter().flatten();
        pods.filter(|it| it.members[0].0.kind == EndpointKind::Pod).filter(move |it| subject_of(it, subject) != Tri::No)
    }

    /// Whether a policy with this selector is for something in a cluster, as far as that is known.
    pub fn may_have_subjects(&self, cluster: &ClusterName, subject: &Selector) -> bool {
        let of_assumed = |owner: &Cluster| {
            owner.endpoints.iter().any(|(id, endpoint)| {
                let labels = EffectiveLabels { cluster: owner, id, endpoint, first_hand: true };
                subject.evaluate(&labels) != Tri::No
            })
        };
        self.without_pods.contains(cluster)
            || self.subjects(cluster, subject).next().is_some()
            || self.assumed.get(cluster).is_some_and(of_assumed)
    }

    /// Whether it is not known what is selected: of a cluster without pods here, or a DNS server that is not among them.
    pub fn may_select_others(&self, enforcer: &ClusterName, selection: &Selection) -> bool {
        let in_scope = |name: &ClusterName| selection.clusters.contains(enforcer, name);
        let is_selected = |(name, owner): (&ClusterName, &Cluster)| {
            let mut servers = owner.endpoints.iter();
            servers.any(|(id, endpoint)| selects(enforcer, selection, name, owner, id, endpoint) != Tri::No)
        };
        self.without_pods.iter().any(|name| in_scope(name)) || self.assumed.iter().any(is_selected)
    }

    /// Whether anything may be selected: a pod or a network set.
    pub fn selects(&mut self, enforcer: &ClusterName, selection: &Selection) -> bool {
        let named = matches!(selection.clusters, ClusterScope::Named(_));
        let key = ((!named).then(|| enforcer.clone()), selection.clone());
        let (inventory, workloads) = (self.inventory, self.workloads);
        *self.known.entry(key).or_insert_with(|| {
            let may = |it: &Workload<'_>| {
                let (id, endpoint) = it.members[0];
                selects(enforcer, selection, it.cluster, it.owner, id, endpoint) != Tri::No
            };
            workloads.values().flatten().any(may)
                || inventory.federated_sets.keys().any(|id| inventory.selects_federated_set(selection, id) != Tri::No)
        })
    }

    /// Whether a network set may be selected, which may have the addresses of pods.
    pub fn selects_set(&self, enforcers: &[&ClusterName], selection: &Selection) -> bool {
        let sets = self.workloads.values().flatten().filter(|it| it.members[0].0.kind == EndpointKind::NetworkSet);
        let mut of_clusters = sets.flat_map(|it| enforcers.iter().map(move |enforcer| (it, *enforcer)));
        of_clusters.any(|(it, enforcer)| {
            let (id, endpoint) = it.members[0];
            selects(enforcer, selection, it.cluster, it.owner, id, endpoint) != Tri::No
        }) || self
            .inventory
            .federated_sets
            .keys()
            .any(|id| self.inventory.selects_federated_set(selection, id) != Tri::No)
    }

    /// Another cluster whose network set a selection of the whole ClusterSet would select, if such sets were exchanged.
    pub fn set_elsewhere(&self, enforcer: &ClusterName, selection: &Selection) -> Option<(&ClusterName, &EndpointId)> {
        let sets = self.workloads.values().flatten().filter(|it| it.cluster != enforcer);
        let sets =
            sets.filter(|it| it.members[0].0.kind == EndpointKind::NetworkSet && is_subject(it, &selection.selector));
        sets.filter(|_| selection.clusters == ClusterScope::All).map(|it| (it.cluster, it.members[0].0)).next()
    }

    /// The stale clusters on which what is selected depends: those that are named, and those that had some of it.
    pub fn stale(&self, enforcers: &[&ClusterName], selection: &Selection) -> Vec<&ClusterName> {
        let depends = |name: &ClusterName, cluster: &Cluster| match &selection.clusters {
            ClusterScope::Local => false,
            ClusterScope::Named(names) => names.contains(name),
            ClusterScope::All => self.workloads.get(name).into_iter().flatten().any(|it| {
                let (id, endpoint) = it.members[0];
                let labels = EffectiveLabels { cluster, id, endpoint, first_hand: false };
                selection.selector.evaluate(&labels) == Tri::Yes
            }),
        };
        let others = |name: &ClusterName| enforcers.iter().any(|enforcer| *enforcer != name);
        let stale = self.inventory.clusters.iter().filter(|(name, cluster)| cluster.stale && others(name));
        stale.filter(|(name, cluster)| depends(name, cluster)).map(|(name, _)| name).collect()
    }

    /// Whether a network set of every address of a family is selected.
    pub fn selects_world(&self, enforcer: &ClusterName, selection: &Selection) -> bool {
        let world = |nets: &[IpNet]| [true, false].iter().any(|v4| is_within(&everything(*v4), nets));
        let sets = self.workloads.values().flatten().flat_map(|it| it.members.iter().map(move |member| (it, member)));
        let mut of_clusters = sets.filter(|(_, (_, endpoint))| world(&endpoint.nets));
        of_clusters
            .any(|(it, (id, endpoint))| selects(enforcer, selection, it.cluster, it.owner, id, endpoint) == Tri::Yes)
            || self.inventory.federated_sets.iter().any(|(id, endpoint)| {
                world(&endpoint.nets) && self.inventory.selects_federated_set(selection, id) == Tri::Yes
            })
    }
}

/// Whether a policy of its own cluster with this selector certainly applies to a workload.
pub(super) fn is_subject(workload: &Workload<'_>, subject: &Selector) -> bool {
    subject_of(workload, subject) == Tri::Yes
}

pub(super) fn subject_of(workload: &Workload<'_>, subject: &Selector) -> Tri {
    let (id, endpoint) = workload.members[0];
    subject.evaluate(&EffectiveLabels { cluster: workload.owner, id, endpoint, first_hand: true })
}

pub(super) fn title(id: &PolicyId) -> String {
    crate::explain::answer::policy_name(id)
}

pub(super) fn list_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

pub(super) fn action_verb(action: Action) -> &'static str {
    match action {
        Action::Allow => "allows",
        Action::Deny => "denies",
        Action::Pass => "passes",
        Action::Log => "logs",
    }
}

/// Labels that must be present for the expression to be true, with the value where it is one.
pub(super) fn required_labels(expr: &Expr) -> Vec<(&str, Option<&str>)> {
    needs::every(expr).into_iter().map(|(key, value)| (&**key, value.map(|value| &**value))).collect()
}

pub(super) fn many(some: usize, all: usize, noun: &str) -> String {
    match (some, all) {
        (1, 1) => format!("1 {noun}"),
        (some, all) if some == all => format!("all {all} {noun}s"),
        (some, all) => format!("{some} of {all} {noun}s"),
    }
}
