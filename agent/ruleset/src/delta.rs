//! The difference between two generations, and its application.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::digest::Digest;
use crate::model::{
    Chain, ChainId, EndpointId, Generation, LocalEndpoint, Members, NodeConfig, Policy, PolicyId, RuleSet, Set, SetId,
    SocketAddress,
};

/// Members added to and removed from one set. Additions and removals are disjoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetChange {
    Addresses { add: Vec<IpAddr>, remove: Vec<IpAddr> },
    Nets { add: Vec<IpNet>, remove: Vec<IpNet> },
    Sockets { add: Vec<SocketAddress>, remove: Vec<SocketAddress> },
}

/// What turns the rule set of digest `base` into the one of digest `digest`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Delta {
    /// `None`: start from the empty rule set.
    pub base: Option<Digest>,
    pub digest: Digest,
    pub generation: Generation,
    pub hub_revision: u64,
    pub local_revision: u64,
    pub node: Option<NodeConfig>,
    /// New sets, whole.
    pub sets: Vec<Arc<Set>>,
    pub set_changes: Vec<(SetId, SetChange)>,
    pub policies: Vec<Arc<Policy>>,
    pub chains: Vec<Arc<Chain>>,
    /// New and changed endpoints.
    pub endpoints: Vec<Arc<LocalEndpoint>>,
    pub removed_sets: Vec<SetId>,
    pub removed_policies: Vec<PolicyId>,
    pub removed_chains: Vec<ChainId>,
    pub removed_endpoints: Vec<EndpointId>,
}

/// Names of shared objects that a node gains and drops. All sorted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Objects {
    pub sets_added: Vec<SetId>,
    pub sets_removed: Vec<SetId>,
    pub policies_added: Vec<PolicyId>,
    pub policies_removed: Vec<PolicyId>,
    pub chains_added: Vec<ChainId>,
    pub chains_removed: Vec<ChainId>,
}

/// How a rule set came about from an earlier one: a [`Delta`] that names new objects, which the later rule set contains.
/// Many nodes share objects and set changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    /// `None`: from the empty rule set.
    pub base: Option<Digest>,
    pub digest: Digest,
    pub node: Option<NodeConfig>,
    pub objects: Arc<Objects>,
    /// Of sets that are in both rule sets; sorted.
    pub set_changes: Vec<(SetId, Arc<SetChange>)>,
    /// New and changed, by id.
    pub endpoints: Vec<Arc<LocalEndpoint>>,
    pub endpoints_removed: Vec<EndpointId>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error("the delta starts from digest {expected}, this rule set has {found}")]
    Base { expected: Digest, found: Digest },
    #[error("the delta changes set {0}, which does not exist")]
    UnknownSet(SetId),
    #[error("the delta changes set {0} as another kind than it has")]
    SetKind(SetId),
    #[error("{what} names {name}, which is not in the rule set")]
    Dangling { what: &'static str, name: String },
    #[error("the result has digest {found}, the sender has {expected}")]
    Digest { expected: Digest, found: Digest },
}

impl Delta {
    /// What turns `before` (`None`: the empty rule set) into `after`. Sets that both share by pointer cost nothing but
    /// their part of the digests.
    pub fn between(before: Option<&RuleSet>, after: &RuleSet) -> Self {
        Self::between_known(before.map(|before| (before, before.digest())), after, after.digest())
    }

    /// As [`Self::between`], where the digests are known already.
    pub fn between_known(before: Option<(&RuleSet, Digest)>, after: &RuleSet, digest: Digest) -> Self {
        Step::between(before, after, digest).delta(after)
    }
}

impl Step {
    /// Compares two rule sets of known digests.
    fn between(before: Option<(&RuleSet, Digest)>, after: &RuleSet, digest: Digest) -> Self {
        fn added<K: Ord + Copy, V>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Vec<K> {
            new.keys().filter(|id| !old.contains_key(id)).copied().collect()
        }
        let nothing = RuleSet::default();
        let old = before.map_or(&nothing, |(before, _)| before);
        let mut objects = Objects {
            sets_added: added(&old.sets, &after.sets),
            sets_removed: added(&after.sets, &old.sets),
            policies_added: added(&old.policies, &after.policies),
            policies_removed: added(&after.policies, &old.policies),
            chains_added: added(&old.chains, &after.chains),
            chains_removed: added(&after.chains, &old.chains),
        };
        let mut set_changes = Vec::new();
        for (id, set) in &after.sets {
            match old.sets.get(id) {
                Some(same) if Arc::ptr_eq(same, set) => {}
                Some(was) if was.kind() == set.kind() => {
                    set_changes.extend(SetChange::between(was, set).map(|change| (*id, Arc::new(change))));
                }
                // Of another kind: it replaces the old one.
                Some(_) => objects.sets_added.push(*id),
                None => {}
            }
        }
        objects.sets_added.sort_unstable();
        let changed = |(id, endpoint): &(&EndpointId, &Arc<LocalEndpoint>)| old.endpoints.get(*id) != Some(endpoint);
        Self {
            base: before.map(|(_, digest)| digest),
            digest,
            node: (before.is_none() || old.node != after.node).then(|| after.node.clone()),
            objects: Arc::new(objects),
            set_changes,
            endpoints: after.endpoints.iter().filter(changed).map(|(_, endpoint)| Arc::clone(endpoint)).collect(),
            endpoints_removed: old.endpoints.keys().filter(|id| !after.endpoints.contains_key(*id)).cloned().collect(),
        }
    }

    /// The delta of this step, to `after`.
    pub fn delta(&self, after: &RuleSet) -> Delta {
        fn named<K: Ord, V: Clone>(ids: &[K], all: &BTreeMap<K, V>) -> Vec<V> {
            ids.iter().filter_map(|id| all.get(id).cloned()).collect()
        }
        let objects = &self.objects;
        Delta {
            base: self.base,
            digest: self.digest,
            generation: after.generation,
            hub_revision: after.hub_revision,
            local_revision: after.local_revision,
            node: self.node.clone(),
            sets: named(&objects.sets_added, &after.sets),
            set_changes: self.set_changes.iter().map(|(id, change)| (*id, (**change).clone())).collect(),
            policies: named(&objects.policies_added, &after.policies),
            chains: named(&objects.chains_added, &after.chains),
            endpoints: self.endpoints.clone(),
            removed_sets: objects.sets_removed.clone(),
            removed_policies: objects.policies_removed.clone(),
            removed_chains: objects.chains_removed.clone(),
            removed_endpoints: self.endpoints_removed.clone(),
        }
    }
}

impl SetChange {
    /// `None`: nothing changed, or the kinds differ.
    fn between(was: &Set, set: &Set) -> Option<Self> {
        fn both<T: Ord + Copy>(was: &BTreeSet<T>, set: &BTreeSet<T>) -> Option<(Vec<T>, Vec<T>)> {
            let (add, remove): (Vec<T>, Vec<T>) =
                (set.difference(was).copied().collect(), was.difference(set).copied().collect());
            (!add.is_empty() || !remove.is_empty()).then_some((add, remove))
        }
        match (&was.members, &set.members) {
            (Members::Addresses(was), Members::Addresses(set)) => {
                both(was, set).map(|(add, remove)| Self::Addresses { add, remove })
            }
            (Members::Nets(was), Members::Nets(set)) => both(was, set).map(|(add, remove)| Self::Nets { add, remove }),
            (Members::Sockets(was), Members::Sockets(set)) => {
                both(was, set).map(|(add, remove)| Self::Sockets { add, remove })
            }
            _ => None,
        }
    }
}

impl RuleSet {
    /// Applies a delta: the new rule set, or an error; `self` does not change. O(size of the rule set's maps) for
    /// the clone of pointers; sets that do not change are shared.
    pub fn apply(&self, delta: &Delta) -> Result<RuleSet, ApplyError> {
        let mut next = match delta.base {
            None => RuleSet::default(),
            Some(expected) => {
                let found = self.digest();
                if found != expected {
                    return Err(ApplyError::Base { expected, found });
                }
                self.clone()
            }
        };
        next.generation = delta.generation;
        next.hub_revision = delta.hub_revision;
        next.local_revision = delta.local_revision;
        if let Some(node) = &delta.node {
            next.node = node.clone();
        }
        for id in &delta.removed_endpoints {
            next.endpoints.remove(id);
        }
        for id in &delta.removed_chains {
            next.chains.remove(id);
        }
        for id in &delta.removed_policies {
            next.policies.remove(id);
        }
        for id in &delta.removed_sets {
            next.sets.remove(id);
        }
        for set in &delta.sets {
            next.sets.insert(set.id, Arc::clone(set));
        }
        for (id, change) in &delta.set_changes {
            let set = next.sets.get_mut(id).ok_or(ApplyError::UnknownSet(*id))?;
            match (&mut Arc::make_mut(set).members, change) {
                (Members::Addresses(members), SetChange::Addresses { add, remove }) => {
                    change_members(members, add, remove)
                }
                (Members::Nets(members), SetChange::Nets { add, remove }) => change_members(members, add, remove),
                (Members::Sockets(members), SetChange::Sockets { add, remove }) => change_members(members, add, remove),
                _ => return Err(ApplyError::SetKind(*id)),
            }
        }
        for policy in &delta.policies {
            next.policies.insert(policy.id(), Arc::clone(policy));
        }
        for chain in &delta.chains {
            next.chains.insert(chain.id(), Arc::clone(chain));
        }
        for endpoint in &delta.endpoints {
            next.endpoints.insert(endpoint.id.clone(), Arc::clone(endpoint));
        }
        next.check_references()?;
        let found = next.digest();
        if found != delta.digest {
            return Err(ApplyError::Digest { expected: delta.digest, found });
        }
        Ok(next)
    }

    /// Every name that an object of the rule set uses is in the rule set.
    pub fn check_references(&self) -> Result<(), ApplyError> {
        for endpoint in self.endpoints.values() {
            for chain in [endpoint.ingress, endpoint.egress, endpoint.egress_to_node] {
                if !self.chains.contains_key(&chain) {
                    return Err(ApplyError::Dangling { what: "endpoint", name: chain.to_string() });
                }
            }
        }
        for chain in self.chains.values() {
            for policy in chain.phases.iter().flat_map(|phase| &phase.tiers).flat_map(|tier| &tier.policies) {
                if !self.policies.contains_key(policy) {
                    return Err(ApplyError::Dangling { what: "chain", name: policy.to_string() });
                }
            }
        }
        for policy in self.policies.values() {
            for peer in policy.rules.iter().flat_map(|rule| [&rule.source, &rule.destination]) {
                let named = peer.in_sets.iter().flatten().chain(&peer.not_sets).chain(&peer.in_sockets);
                for set in named.chain(&peer.port_sets).chain(&peer.not_port_sets) {
                    if !self.sets.contains_key(set) {
                        return Err(ApplyError::Dangling { what: "policy", name: set.to_string() });
                    }
                }
            }
        }
        Ok(())
    }
}

fn change_members<T: Ord + Copy>(members: &mut BTreeSet<T>, add: &[T], remove: &[T]) {
    for member in remove {
        members.remove(member);
    }
    members.extend(add.iter().copied());
}
