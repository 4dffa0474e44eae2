//! Bringing classes and contexts up to date.

use std::hash::BuildHasher as _;
use std::sync::Arc;

use super::inventory::{GROUP_SLOTS, IndexedInventory, spread};
use super::matches::{ClassId, KeyId, Labels, PairId};
use super::model::{Addresses, Context, ContextId, Contribution, LOCAL, SlotId};
use crate::inventory::EndpointKind;
use crate::selector::build;
use crate::slab::Id as _;

impl IndexedInventory {
    /// What an endpoint contributes with its present content and the class it was last given.
    fn contribution(&self, at: SlotId) -> Option<Contribution> {
        let slot = &self.slots[at];
        let class = slot.class?;
        let cluster = self.cluster_of(at);
        let addresses: Addresses = self.owned(at).collect();
        let pod = self.kind_of(at) == EndpointKind::Pod;
        Some(Contribution {
            cluster,
            class,
            stale: self.is_stale(cluster),
            node: slot.node,
            judged: cluster == LOCAL && pod && slot.node.is_some() && !addresses.is_empty(),
            addresses,
            nets: slot.nets.iter().copied().collect(),
            ports: slot.ports().iter().cloned().collect(),
        })
    }

    /// Notes that an endpoint may change, saving what it contributes while that is still known.
    pub(super) fn mark(&mut self, at: SlotId) {
        if self.slots[at].dirty {
            return;
        }
        if let Some(contribution) = self.contribution(at) {
            self.before.insert(at, contribution);
        }
        self.slots[at].dirty = true;
        self.dirty.push(at);
    }

    /// The labels that a context adds, each pair referenced.
    fn context_pairs(&mut self, id: ContextId) -> Vec<(KeyId, PairId)> {
        let context = &self.contexts[id];
        let cluster = &self.clusters[context.cluster];
        let mut all: Vec<(String, Arc<str>)> = Vec::new();
        if let Some(namespace) = &context.namespace {
            all.push((build::NAMESPACE.into(), namespace.clone()));
            all.push((format!("{}{}", build::NAMESPACE_PREFIX, build::NAME), namespace.clone()));
            for (key, value) in cluster.namespaces.get(namespace).into_iter().flat_map(|pairs| pairs.iter()) {
                let key = if &**key == build::NAME { build::OWN_NAME } else { &**key };
                all.push((format!("{}{key}", build::NAMESPACE_PREFIX), value.clone()));
            }
        }
        if let Some(account) = &context.account {
            all.push((build::SERVICE_ACCOUNT.into(), account.clone()));
            all.push((format!("{}{}", build::SERVICE_ACCOUNT_PREFIX, build::NAME), account.clone()));
            let key = context.namespace.clone().map(|namespace| (namespace, account.clone()));
            let labels = key.and_then(|key| cluster.accounts.get(&key));
            for (key, value) in labels.into_iter().flat_map(|pairs| pairs.iter()) {
                if &**key != build::NAME {
                    all.push((format!("{}{key}", build::SERVICE_ACCOUNT_PREFIX), value.clone()));
                }
            }
        }
        if context.kind == EndpointKind::Pod {
            all.push((build::ORCHESTRATOR.into(), build::KUBERNETES.into()));
        }
        let mut pairs: Vec<(KeyId, PairId)> = Vec::with_capacity(all.len());
        for (key, value) in all {
            let key = self.index.key(&key);
            pairs.push((key, self.index.pair(key, &value)));
        }
        pairs.sort_unstable();
        pairs
    }

    /// Brings every class up to date. Calls `changed` with each endpoint whose contribution changed: the previous and the
    /// present one.
    pub fn refresh(
        &mut self,
        mut changed: impl FnMut(&mut Self, SlotId, Option<&Contribution>, Option<&Contribution>),
    ) {
        self.mark_newly_relevant();
        self.refresh_contexts();
        let dirty = std::mem::take(&mut self.dirty);
        let mut emptied: Vec<ClassId> = Vec::new();
        for at in dirty {
            let before = self.before.remove(&at);
            let class = self.class_of(at);
            let old_class = std::mem::replace(&mut self.slots[at].class, class);
            self.slots[at].dirty = false;
            let now = self.contribution(at);
            if old_class != class {
                if let Some(old_class) = old_class {
                    let members = &mut self.members.entry(old_class).all;
                    members.remove(at);
                    if members.is_empty() {
                        emptied.push(old_class);
                    }
                }
                if let Some(class) = class {
                    self.members.entry(class).all.insert(at);
                }
            }
            if let Some(before) = before.as_ref().filter(|it| it.judged) {
                self.members.entry(before.class).judged.remove(at);
            }
            if let Some(now) = now.as_ref().filter(|it| it.judged) {
                self.members.entry(now.class).judged.insert(at);
            }
            if before != now {
                changed(self, at, before.as_ref(), now.as_ref());
            }
            if !self.slots[at].live {
                self.free_slot(at);
            }
        }
        // A class may have been emptied, filled and emptied again.
        emptied.sort_unstable();
        emptied.dedup();
        for class in emptied {
            if self.members(class).is_empty() {
                self.index.remove_class(class);
            }
        }
        self.free_empty_contexts();
    }

    /// Marks what has a label whose key no selector named before.
    fn mark_newly_relevant(&mut self) {
        let newly_relevant = std::mem::take(&mut self.newly_relevant);
        for key in &newly_relevant {
            for group in self.index.take_groups(*key).iter() {
                let first = group.number() * GROUP_SLOTS;
                for at in (first..first + GROUP_SLOTS).map(SlotId::new) {
                    let Some(slot) = self.slots.get(at) else { continue };
                    if slot.own.iter().any(|pair| self.index.key_of(*pair) == *key) {
                        self.mark(at);
                    }
                }
            }
        }
        if newly_relevant.is_empty() {
            return;
        }
        // Contexts are few, and a key is new to the selectors once.
        let has_new = |pairs: &[(KeyId, PairId)]| {
            newly_relevant.iter().any(|key| pairs.binary_search_by_key(key, |(key, _)| *key).is_ok())
        };
        let contexts: Vec<ContextId> =
            self.contexts.iter().filter(|(_, context)| has_new(&context.pairs)).map(|(id, _)| id).collect();
        for id in contexts {
            self.mark_context(id);
        }
    }

    fn refresh_contexts(&mut self) {
        for id in std::mem::take(&mut self.dirty_contexts) {
            if self.contexts[id].endpoints.is_empty() {
                // Freed at the end of the refresh: until then removed endpoints are found by it.
                self.dirty_contexts.push(id);
                continue;
            }
            self.contexts[id].dirty = false;
            let pairs = self.context_pairs(id);
            let old = std::mem::replace(&mut self.contexts[id].pairs, pairs);
            let new = &self.contexts[id].pairs;
            let relevant = |pairs: &[(KeyId, PairId)], others: &[(KeyId, PairId)]| {
                pairs.iter().any(|pair| self.index.is_relevant(pair.0) && others.binary_search(pair).is_err())
            };
            if relevant(&old, new) || relevant(new, &old) {
                self.mark_context(id);
            }
            old.into_iter().for_each(|(_, pair)| self.index.release(pair));
        }
    }

    fn mark_context(&mut self, id: ContextId) {
        let endpoints: Vec<SlotId> = self.contexts[id].endpoints.iter().collect();
        endpoints.into_iter().for_each(|at| self.mark(at));
    }

    fn class_of(&mut self, at: SlotId) -> Option<ClassId> {
        let slot = &self.slots[at];
        let context = &self.contexts[slot.context];
        let cluster = &self.clusters[context.cluster];
        if !slot.live || slot.host_network || cluster.record.is_none() {
            return None;
        }
        let mut labels = Labels::new();
        if !self.is_stale(context.cluster) {
            for pair in &slot.own {
                let key = self.index.key_of(*pair);
                if self.index.is_relevant(key) && self.index.knows(cluster.realm, key) {
                    labels.push((key, *pair));
                }
            }
            labels.extend(context.pairs.iter().copied().filter(|(key, _)| self.index.is_relevant(*key)));
            labels.sort_unstable();
        }
        let tag = (context.kind == EndpointKind::NetworkSet) as u8;
        Some(self.index.class(cluster.realm, tag, &labels))
    }

    fn free_slot(&mut self, at: SlotId) {
        let slot = &self.slots[at];
        let context = &self.contexts[slot.context];
        let hash = self.hash(context.cluster, context.kind, &context.namespace, &slot.name);
        if let Ok(entry) = self.slots_by_id.find_entry(spread(hash), |(_, id)| *id == at) {
            entry.remove();
        }
        let context = self.slots.remove(at).context;
        if !self.contexts[context].dirty && self.contexts[context].endpoints.is_empty() {
            self.contexts[context].dirty = true;
            self.dirty_contexts.push(context);
        }
    }

    fn free_empty_contexts(&mut self) {
        for id in std::mem::take(&mut self.dirty_contexts) {
            self.contexts[id].dirty = false;
            if !self.contexts[id].endpoints.is_empty() {
                continue;
            }
            let Context { cluster, kind, namespace, account, pairs, .. } = self.contexts.remove(id);
            let hash = self.hasher.hash_one((cluster, kind, &namespace, &account));
            let key = (cluster, namespace);
            if let Ok(entry) = self.contexts_by_content.find_entry(hash, |have| *have == id) {
                entry.remove();
            }
            if let Some(contexts) = self.contexts_by_namespace.get_mut(&key) {
                contexts.remove(id);
                if contexts.is_empty() {
                    self.contexts_by_namespace.remove(&key);
                }
            }
            pairs.into_iter().for_each(|(_, pair)| self.index.release(pair));
        }
    }
}
