//! The policies and tiers of an evaluator.

use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;

use super::chain::{Chain, ChainCache, ChainKey};
use crate::evaluate::{View, rules};
use crate::indexed::{FastMap, IdSet, IndexedInventory, NetTable, SelectorId};
use crate::model::{ClusterName, EntityMatch, Layer, Phase, Policy, PolicyId, StagedAction, Tier, TierId};
use crate::outline::only;
use crate::selector::Selector;
use crate::slab::{Id as _, SecondaryMap, Slab};
use crate::slab_id;

slab_id! {
    /// A policy.
    pub(super) struct StoredId;
    /// A net that is the only one of some rule's end.
    pub(super) struct NetId;
}

#[derive(Debug)]
pub(super) struct Stored {
    pub policy: Arc<Policy>,
    pub tie: Box<str>,
    pub subject: SelectorId,
    /// All registered uses, with the subject.
    selectors: Vec<SelectorId>,
    nets: Vec<NetId>,
    /// This cluster enforces it, or would if it were not staged.
    enforced: bool,
}

#[derive(Debug)]
struct UsedNet {
    net: IpNet,
    users: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Evaluator {
    local: ClusterName,
    /// Tier objects only: the federation's and the cluster's own.
    layers: [Layer; 2],
    pub(super) policies: Slab<StoredId, Stored>,
    by_id: FastMap<PolicyId, StoredId>,
    by_subject: FastMap<SelectorId, IdSet<StoredId>>,
    /// Whether a selector is the subject of some policy.
    pub(super) is_subject: SecondaryMap<SelectorId, bool>,
    /// How many policies are staged.
    staged: usize,
    /// Policies that staged ones would replace or delete, with the number of these.
    replaced: FastMap<PolicyId, u32>,
    nets: Slab<NetId, UsedNet>,
    pub(super) nets_by_address: NetTable<NetId>,
    chains: Mutex<ChainCache>,
}

impl Evaluator {
    /// Without policies. `inventory` must be the one of every later call, and its local cluster `local`.
    pub fn new(local: ClusterName, inventory: &mut IndexedInventory) -> Self {
        // What the named ports of a rule without a selection are looked up on.
        inventory.register(&Selector::all());
        Self {
            local,
            layers: Default::default(),
            policies: Slab::new(),
            by_id: FastMap::default(),
            by_subject: FastMap::default(),
            is_subject: SecondaryMap::default(),
            staged: 0,
            replaced: FastMap::default(),
            nets: Slab::new(),
            nets_by_address: NetTable::default(),
            chains: Mutex::default(),
        }
    }

    pub fn set_tier(&mut self, tier: Tier) {
        self.layers[usize::from(tier.id.phase == Phase::Local)].tiers.insert(tier.id.clone(), tier);
        self.cache().clear();
    }

    pub fn remove_tier(&mut self, id: &TierId) {
        self.layers[usize::from(id.phase == Phase::Local)].tiers.remove(id);
        self.cache().clear();
    }

    /// Adds or replaces a policy. Those of other clusters are ignored.
    pub fn set_policy(&mut self, inventory: &mut IndexedInventory, policy: &Policy) {
        if policy.id.cluster.as_ref().is_some_and(|cluster| *cluster != self.local) {
            return;
        }
        // Before the previous version gives its selectors back, so that those of both stay registered.
        let subject = inventory.register(&policy.selector);
        let mut selectors = vec![subject];
        let mut nets = Vec::new();
        let all_rules = [&policy.ingress, &policy.egress].into_iter().flatten().flatten();
        for end in all_rules.flat_map(|rule| [&rule.source, &rule.destination]) {
            selectors.extend(selections(end).map(|selection| inventory.register(&selection.selector)));
            nets.extend(only(&end.nets).map(|net| self.use_net(net)));
        }
        self.remove_policy(inventory, &policy.id);
        let stored = Stored {
            tie: policy.id.tie().into(),
            policy: Arc::new(policy.clone()),
            subject,
            selectors,
            nets,
            enforced: !policy.host_only && policy.enforcers.contains(&self.local, &self.local),
        };
        let at = self.policies.insert(stored);
        self.by_id.insert(policy.id.clone(), at);
        self.by_subject.entry(subject).or_default().insert(at);
        *self.is_subject.entry(subject) = true;
        self.staged += usize::from(policy.staged.is_some());
        if let Some(target) = replaced_by(policy) {
            *self.replaced.entry(target.clone()).or_default() += 1;
            self.drop_chains_of(&target);
        }
        self.cache().drop_of(subject);
    }

    pub fn remove_policy(&mut self, inventory: &mut IndexedInventory, id: &PolicyId) {
        let Some(at) = self.by_id.remove(id) else { return };
        let Stored { policy, subject, selectors, nets, .. } = self.policies.remove(at);
        self.cache().drop_of(subject);
        if let Some(policies) = self.by_subject.get_mut(&subject) {
            policies.remove(at);
            if policies.is_empty() {
                self.by_subject.remove(&subject);
                *self.is_subject.entry(subject) = false;
            }
        }
        self.staged -= usize::from(policy.staged.is_some());
        if let Some(target) = replaced_by(&policy)
            && let Some(count) = self.replaced.get_mut(&target)
        {
            *count -= 1;
            if *count == 0 {
                self.replaced.remove(&target);
            }
            self.drop_chains_of(&target);
        }
        selectors.into_iter().for_each(|selector| inventory.index.unregister(selector));
        nets.into_iter().for_each(|net| self.release_net(net));
    }

    fn drop_chains_of(&mut self, id: &PolicyId) {
        if let Some(at) = self.by_id.get(id) {
            let subject = self.policies[*at].subject;
            self.cache().drop_of(subject);
        }
    }

    fn use_net(&mut self, net: IpNet) -> NetId {
        let id = match self.nets_by_address.of(net).first() {
            Some(id) => *id,
            None => {
                let id = self.nets.insert(UsedNet { net, users: 0 });
                self.nets_by_address.insert(net, id);
                id
            }
        };
        self.nets[id].users += 1;
        id
    }

    fn release_net(&mut self, id: NetId) {
        self.nets[id].users -= 1;
        if self.nets[id].users == 0 {
            let net = self.nets.remove(id).net;
            self.nets_by_address.remove(net, id);
        }
    }

    fn cache(&mut self) -> &mut ChainCache {
        self.chains.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any policy is staged.
    pub fn has_staged(&self) -> bool {
        self.staged > 0
    }

    /// Whether it has no policies, nor anything that depends on one.
    pub fn is_empty(&self) -> bool {
        let policies = self.policies.len() + self.by_id.len() + self.by_subject.len() + self.staged;
        policies + self.replaced.len() + self.nets.len() == 0 && self.nets_by_address.is_empty()
    }

    /// Bits that outlines may require of an end.
    pub(super) fn bit_count(&self, inventory: &IndexedInventory) -> u32 {
        2 * inventory.index.selector_bound().max(self.nets.bound())
    }

    /// The chain of a key, from the cache or built.
    pub(super) fn chain(&self, inventory: &IndexedInventory, key: ChainKey) -> Arc<Chain> {
        if let Some(chain) = self.chains.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return chain;
        }
        // Outside the lock: other readers go on.
        let mut chain = Arc::new(self.build(inventory, &key));
        if key.view == View::Pending {
            // Shared where no staged policy changes it, so that its judgement is, too.
            let enforced = self.chain(inventory, ChainKey { view: View::Enforced, ..key.clone() });
            if chain.has_policies_of(&enforced) {
                chain = enforced;
            }
        }
        self.chains.lock().unwrap_or_else(PoisonError::into_inner).insert(key, &chain);
        chain
    }

    fn build(&self, inventory: &IndexedInventory, key: &ChainKey) -> Chain {
        let policies = key.subjects.iter().filter_map(|subject| self.by_subject.get(subject)).flat_map(IdSet::iter);
        let policies = policies.map(|at| &self.policies[at]);
        let mut applying: Vec<&Stored> =
            policies.filter(|it| self.acts(it, key.view) && rules(&it.policy, key.direction).is_some()).collect();
        let layer = |id: &TierId| &self.layers[usize::from(id.phase == Phase::Local)];
        applying.sort_by_cached_key(|it| {
            let tier = &it.policy.tier;
            (tier.phase, layer(tier).tier(tier).0, it.policy.order, it.tie.clone())
        });
        let mut chain = Chain::default();
        for tier in applying.chunk_by(|a, b| a.policy.tier == b.policy.tier) {
            let id = &tier[0].policy.tier;
            let default = layer(id).tier(id).1;
            let policies = tier.iter().map(|it| &it.policy);
            chain.push_tier(id, default, policies, key.direction, &|end| self.bit_of(inventory, end));
        }
        chain
    }

    fn acts(&self, stored: &Stored, view: View) -> bool {
        let pending = view == View::Pending;
        stored.enforced
            && match stored.policy.staged {
                None => !(pending && self.replaced.contains_key(&stored.policy.id)),
                Some(StagedAction::Set) => pending,
                Some(StagedAction::Delete | StagedAction::Learn | StagedAction::Ignore) => false,
            }
    }

    /// The bit that is set where an end may match: its selector's, or else its only net's.
    fn bit_of(&self, inventory: &IndexedInventory, end: &EntityMatch) -> Option<u32> {
        match &end.selection {
            Some(selection) => inventory.index.find(&selection.selector).map(selector_bit),
            None => only(&end.nets).and_then(|net| self.nets_by_address.of(net).first().copied()).map(net_bit),
        }
    }
}

/// Selectors have the even bits.
pub(super) fn selector_bit(selector: SelectorId) -> u32 {
    2 * selector.number()
}

/// Nets have the odd bits.
pub(super) fn net_bit(net: NetId) -> u32 {
    2 * net.number() + 1
}

fn selections(end: &EntityMatch) -> impl Iterator<Item = &crate::model::Selection> {
    end.selection.iter().chain(&end.not_selection)
}

/// The policy that a staged one would replace or delete.
fn replaced_by(policy: &Policy) -> Option<PolicyId> {
    policy.id.commits_to().filter(|_| matches!(policy.staged, Some(StagedAction::Set | StagedAction::Delete)))
}
