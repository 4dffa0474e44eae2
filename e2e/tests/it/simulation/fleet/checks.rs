//! Invariants of a fleet, checked after each message and at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_exchange::interest::{self, Interest, Wanted};
use hanse_exchange::member::model::{ClusterRecord, Position};
use hanse_exchange::member::receiver::ReceiveProblem;
use hanse_exchange::model as hub;
use hanse_policy::inventory::{Cluster, EffectiveLabels, Endpoint, EndpointId, Inventory};
use hanse_policy::model::ClusterName;
use hanse_policy::tri::Tri;

use super::{Fleet, MEMBERS, name};

impl Fleet<'_> {
    /// A policy takes effect only if the receiver has every endpoint that it could select when it was applied.
    pub(super) fn check_new_version(&mut self, member: usize, number: u64) {
        self.count("policy came into force");
        let (at, it, version) = (&self.at, &self.members[member], &self.versions[&number]);
        let origins = it.receiver.origins();
        for (origin, then) in &version.synced {
            let Some(registered) = self.registered.get(origin) else { continue };
            let scope = version.interest.iter().any(|wanted| wanted.clusters().contains(&it.name, origin));
            let seen = registered.visible_to.as_ref().is_none_or(|names| names.contains(&it.name));
            if *origin == it.name || !scope || !seen || self.exchange.origin(origin).is_none_or(|it| !it.synced) {
                continue;
            }
            let now = origins.get(origin).map(|status| status.position);
            assert!(now.is_some(), "{at}: {} enforces version {number} without {origin}, at {then:?}", it.name);
            let since = (origin.clone(), then.epoch, then.revision)..=(origin.clone(), u64::MAX, u64::MAX);
            let since: Vec<&Arc<Cluster>> = self.history.range(since).map(|(_, was)| was).collect();
            let then = since[0];
            let view = it.view.clusters.get(origin);
            for (id, endpoint) in &then.endpoints {
                let namespace = id.namespace.as_ref().expect("a pod");
                // If the pod has changed since, the change may be in flight.
                let same = registered.grant.denied.is_empty()
                    && since.iter().all(|was| {
                        was.endpoints.get(id) == Some(endpoint)
                            && was.namespaces.get(namespace) == then.namespaces.get(namespace)
                    });
                let labels = EffectiveLabels { cluster: then, id, endpoint, first_hand: false };
                let selects = |wanted: &Arc<Wanted>| {
                    wanted.clusters().contains(&it.name, origin) && wanted.selector().evaluate(&labels) != Tri::No
                };
                if same && version.interest.iter().any(selects) {
                    let there = view.is_some_and(|view| view.endpoints.contains_key(id));
                    assert!(there, "{at}: {} enforces version {number} without {id:?} of {origin}", it.name);
                }
            }
        }
    }

    /// The state of a receiver is a past state of its origins, and never goes back.
    pub(super) fn check(&mut self, member: usize) {
        let (at, it) = (&self.at, &mut self.members[member]);
        let me = &it.name;
        let origins = it.receiver.origins();
        for (origin, before) in &it.positions {
            let now = origins.get(origin).map(|status| status.position);
            assert!(
                now >= Some(*before) || it.hidden.contains(origin),
                "{at}: {me} had {origin} at {before:?}, now {now:?}, without a withdrawal"
            );
        }
        it.positions = origins.iter().map(|(name, status)| (name.clone(), status.position)).collect();
        for (origin, status) in &origins {
            let Position { epoch, revision } = status.position;
            let (from, to) = ((origin.clone(), epoch, 0), (origin.clone(), epoch, revision));
            let Some((_, then)) = self.history.range(from..=to).next_back() else {
                let nothing = it.view.clusters.get(origin).is_none_or(|view| view.endpoints.is_empty());
                assert!(nothing, "{at}: {me} has {origin} at {epoch}/{revision}, a position that it never had");
                continue;
            };
            let view = it.view.clusters.get(origin).cloned().unwrap_or_default();
            for (id, endpoint) in &view.endpoints {
                let truth = then.endpoints.get(id);
                let same = truth.is_some_and(|it| it.labels == endpoint.labels && it.addresses == endpoint.addresses);
                assert!(same, "{at}: {me} has {id:?} of {origin} as {endpoint:?}; at {epoch}/{revision}: {truth:?}");
            }
        }
    }

    pub(super) fn wanted(&self, member: usize) -> Interest {
        let it = &self.members[member];
        let enforced = self.policies.values().map(|number| &self.versions[number]);
        let enforced = enforced.filter(|version| version.enforcers.contains(&it.name));
        let own = interest::read("own", it.own.clone(), interest::OWN, &mut Default::default());
        own.into_iter().chain(enforced.flat_map(|version| version.interest.iter().cloned())).collect()
    }

    /// The pods of an origin that a receiver must have.
    pub(super) fn expected(&self, member: usize, origin: usize) -> BTreeSet<EndpointId> {
        let (receiver, owner) = (&self.members[member].name, &self.members[origin]);
        let Some(registered) = self.registered.get(&owner.name) else { return BTreeSet::new() };
        if registered.visible_to.as_ref().is_some_and(|names| !names.contains(receiver)) {
            return BTreeSet::new();
        }
        let wanted = self.wanted(member);
        let selected = |(id, endpoint): &(&EndpointId, &Endpoint)| {
            let labels = EffectiveLabels { cluster: &owner.truth, id, endpoint, first_hand: false };
            let namespace = id.namespace.as_deref().unwrap_or_default();
            !registered.grant.denied.contains(namespace)
                && wanted.iter().any(|wanted| {
                    wanted.clusters().contains(receiver, &owner.name) && wanted.selector().evaluate(&labels) != Tri::No
                })
        };
        owner.truth.endpoints.iter().filter(selected).map(|(id, _)| id.clone()).collect()
    }

    pub fn settle(&mut self) {
        for member in 0..MEMBERS {
            if !self.registered.contains_key(&name(member)) {
                self.come(member);
            }
            self.resume(member);
        }
        for registered in self.registered.values_mut().filter(|it| it.lease != hub::Lease::NeverConnected) {
            registered.lease = hub::Lease::Live;
        }
        self.send_federation();
        self.pump();
        let at = self.at.clone();
        for (member, it) in self.members.iter().enumerate() {
            let mut in_force: BTreeMap<Arc<str>, u64> = self.policies.clone();
            in_force.retain(|_, number| self.versions[number].enforcers.contains(&it.name));
            assert_eq!(it.in_force, in_force, "{at}: policies of {}", it.name);
            assert!(it.receiver.waiting().0.is_empty(), "{at}: {} waits", it.name);
            for origin in (0..MEMBERS).filter(|origin| *origin != member) {
                let owner = &self.members[origin];
                let view = it.view.clusters.get(&owner.name).cloned().unwrap_or_default();
                let present: BTreeSet<EndpointId> = view.endpoints.keys().cloned().collect();
                assert_eq!(present, self.expected(member, origin), "{at}: {} of {}", it.name, owner.name);
                for (id, endpoint) in &view.endpoints {
                    let truth = &owner.truth.endpoints[id];
                    assert_eq!((&truth.labels, &truth.addresses), (&endpoint.labels, &endpoint.addresses), "{at}");
                    let namespace = id.namespace.as_ref().expect("a pod");
                    assert_eq!(view.namespaces.get(namespace), owner.truth.namespaces.get(namespace), "{at}");
                }
                let digest = it.receiver.origins().get(&owner.name).map_or(0, |status| status.digest);
                let expected = self.exchange.expected_digest(it.watching.expect("connected"), &owner.name);
                assert_eq!(Some(digest), expected.or(Some(0)), "{at}: {} of {}", it.name, owner.name);
            }
            assert_eq!(
                self.exchange.expected_digest(it.watching.expect("connected"), ""),
                Some(it.receiver.hub_digest()),
                "{at}: {}",
                it.name
            );
            let mut everything = Inventory::default();
            it.receiver.everything().iter().for_each(|change| change.apply(&mut everything));
            // Clusters without endpoints appear in records only.
            everything.clusters.retain(|_, cluster| !cluster.endpoints.is_empty());
            for (cluster, all) in &everything.clusters {
                assert_eq!(Some(&all.endpoints), it.view.clusters.get(cluster).map(|it| &it.endpoints), "{at}");
            }
            let records: BTreeMap<&ClusterName, &ClusterRecord> = it.receiver.clusters().iter().collect();
            assert_eq!(records.len(), self.registered.len(), "{at}");
        }
    }

    /// The problems of a member's receiver.
    pub fn problems(&self, member: usize) -> Vec<ReceiveProblem> {
        self.members[member].receiver.problems()
    }

    pub fn delete_policy(&mut self, policy: &str) {
        self.policies.remove(policy);
        self.send_federation();
    }

    /// Whether any version of a policy is in force.
    pub fn in_force(&self, member: usize, policy: &str) -> bool {
        self.members[member].in_force.contains_key(policy)
    }

    /// Whether a receiver has a pod with this label.
    pub fn has_label(&self, member: usize, origin: usize, pod_name: &str, key: &str, value: &str) -> bool {
        let view = self.members[member].view.clusters.get(&name(origin));
        let mut pods = view.into_iter().flat_map(|view| &view.endpoints).filter(|(id, _)| *id.name == *pod_name);
        pods.any(|(_, endpoint)| endpoint.labels.get(key).is_some_and(|has| **has == *value))
    }

    pub fn enforces(&self, member: usize, policy: &str) -> bool {
        self.members[member].in_force.get(policy) == self.policies.get(policy)
    }

    pub fn bytes_received(&self, member: usize) -> usize {
        self.members[member].received
    }

    pub fn bytes_published(&self, member: usize) -> usize {
        self.members[member].published
    }

    pub fn has_any_of(&self, member: usize, origin: usize) -> bool {
        let view = self.members[member].view.clusters.get(&name(origin));
        view.is_some_and(|view| !view.endpoints.is_empty())
    }

    pub fn has_all_of(&self, member: usize, origin: usize) -> bool {
        let view = self.members[member].view.clusters.get(&name(origin)).cloned().unwrap_or_default();
        view.endpoints.keys().cloned().collect::<BTreeSet<_>>() == self.expected(member, origin)
    }
}
