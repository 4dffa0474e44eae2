//! The policies of the cluster and of the federation, and which of them changed.

use std::cmp::Ordering;

use hanse_policy::indexed::{FastMap, IdSet, IndexedInventory, SelectorId};
use hanse_policy::model::{ClusterName, PolicyId};
use hanse_policy::slab::Slab;

use crate::ids::{PolicyIndex, PoolId, TierIndex, UnitIndex};
use crate::policy::Policy;
use crate::tiers::Tiers;

#[derive(Debug)]
pub(crate) struct PolicySlot {
    pub policy: Policy,
    /// Not removed; a removed one stays until the commit.
    pub live: bool,
    /// The selector of the pods that it applied to at the last commit.
    pub committed_subject: Option<SelectorId>,
    tie: Box<str>,
    pub tier: TierIndex,
    /// Ingress, egress.
    pub units: [Option<UnitIndex>; 2],
    pub pools: Vec<PoolId>,
    pub old_pools: Vec<PoolId>,
    pub dirty: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Policies {
    pub all: Slab<PolicyIndex, PolicySlot>,
    pub by_id: FastMap<PolicyId, PolicyIndex>,
    pub by_subject: FastMap<SelectorId, IdSet<PolicyIndex>>,
    dirty: Vec<PolicyIndex>,
    /// Uses of selectors to unregister at the end of the next commit, when nothing refers to them.
    retired: Vec<SelectorId>,
}

impl Policies {
    /// Adds or replaces a policy, converted by [`Policy::new`].
    pub fn set(&mut self, policy: Policy, tier: TierIndex) {
        let subject = policy.subject;
        let at = match self.by_id.get(&policy.id).copied() {
            Some(at) => {
                let slot = &self.all[at];
                if slot.live && slot.tier == tier && slot.policy == policy {
                    self.retired.extend(policy.selectors());
                    return;
                }
                self.retire(at);
                let slot = &mut self.all[at];
                (slot.policy, slot.tier, slot.live) = (policy, tier, true);
                at
            }
            None => {
                let id = policy.id.clone();
                let at = self.all.insert(PolicySlot {
                    tie: id.tie().into(),
                    policy,
                    live: true,
                    committed_subject: None,
                    tier,
                    units: [None; 2],
                    pools: Vec::new(),
                    old_pools: Vec::new(),
                    dirty: false,
                });
                self.by_id.insert(id, at);
                at
            }
        };
        if let Some(subject) = subject {
            self.by_subject.entry(subject).or_default().insert(at);
        }
        self.mark(at);
    }

    pub fn remove(&mut self, id: &PolicyId) {
        if let Some(at) = self.by_id.get(id).copied() {
            self.retire(at);
        }
    }

    /// Takes a policy's present content out of every index.
    fn retire(&mut self, at: PolicyIndex) {
        self.mark(at);
        let slot = &mut self.all[at];
        if !std::mem::replace(&mut slot.live, false) {
            return;
        }
        self.retired.extend(slot.policy.selectors());
        if let Some(subject) = slot.policy.subject
            && let Some(policies) = self.by_subject.get_mut(&subject)
        {
            policies.remove(at);
            if policies.is_empty() {
                self.by_subject.remove(&subject);
            }
        }
    }

    /// Marks a policy to be compiled again.
    pub fn mark(&mut self, at: PolicyIndex) {
        let slot = &mut self.all[at];
        if !std::mem::replace(&mut slot.dirty, true) {
            self.dirty.push(at);
        }
    }

    /// Marks every federated policy.
    pub fn mark_federated(&mut self) {
        let is_federated = |slot: &PolicySlot| slot.live && slot.policy.id.cluster.is_none();
        let federated: Vec<PolicyIndex> =
            self.all.iter().filter(|(_, slot)| is_federated(slot)).map(|(at, _)| at).collect();
        federated.into_iter().for_each(|at| self.mark(at));
    }

    pub fn take_dirty(&mut self) -> Vec<PolicyIndex> {
        std::mem::take(&mut self.dirty)
    }

    /// The end of a commit: frees a removed policy.
    pub fn free(&mut self, at: PolicyIndex) {
        let slot = self.all.remove(at);
        self.by_id.remove(&slot.policy.id);
    }

    /// The end of a commit: unregisters selectors that removed and replaced policies used.
    pub fn unregister(&mut self, inventory: &mut IndexedInventory) {
        for selector in std::mem::take(&mut self.retired) {
            inventory.index.unregister(selector);
        }
    }

    /// The order in which policies are evaluated.
    pub fn compare(&self, tiers: &Tiers, a: PolicyIndex, b: PolicyIndex) -> Ordering {
        let (a, b) = (&self.all[a], &self.all[b]);
        let rank = |slot: &PolicySlot| tiers.all[slot.tier].rank;
        rank(a).cmp(&rank(b)).then_with(|| a.policy.order.cmp(&b.policy.order)).then_with(|| a.tie.cmp(&b.tie))
    }

    /// Whether a policy belongs to this cluster or to the federation.
    pub fn concerns(id: &PolicyId, local: &ClusterName) -> bool {
        id.cluster.as_ref().is_none_or(|cluster| cluster == local)
    }
}
