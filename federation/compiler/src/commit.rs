//! Bringing the rule sets up to date with the state.
//!
//! In this order: classes of endpoints, with what they contribute to sets; policies whose text changes; chains of the
//! classes that local pods have; pods and their nodes; profiles; and last, releasing what nothing needs.

use std::sync::Arc;

use hanse_policy::indexed::{ClassId, Contribution, FastMap, IdSet, NodeIndex, SlotId};
use hanse_policy::model::{PolicyKind, TierDefault};
use hanse_ruleset::{Chain, Digest, EndpointId, LocalEndpoint, Objects, PolicyId, RuleSet, SetChange};

use crate::chain::{ClassChains, Unit};
use crate::change::{Changes, NodeChange};
use crate::compiler::Compiler;
use crate::ids::{ChainIndex, PolicyIndex, ProfileIndex, SetIndex, TierIndex, UnitIndex};
use crate::node::Step;
use crate::report::Direction;
use crate::rule;

impl Compiler {
    /// Brings the rule sets of all nodes up to date with the state. Returns what changed.
    pub fn commit(&mut self) -> Changes {
        // Pods whose entry may change, with the node that they were on.
        let mut pods: Pods = FastMap::default();
        let mut left: Vec<ClassId> = Vec::new();
        let mut classes = IdSet::default();
        let (pools, chains) = (&mut self.pools, &self.chains);
        self.inventory.refresh(|inventory, at, old, new| {
            pools.contribute(inventory, old, new);
            let is_judged = |it: &&Contribution| it.judged;
            let (old, new) = (old.filter(is_judged), new.filter(is_judged));
            if old.is_some() || new.is_some() {
                pods.insert(at, old.and_then(|old| old.node));
            }
            if let Some(new) = new
                && !chains.by_class.contains_key(&new.class)
            {
                classes.insert(new.class);
            }
            left.extend(old.filter(|old| new.is_none_or(|new| new.class != old.class)).map(|old| old.class));
        });
        for user in self.pools.take_reshaped() {
            self.policies.mark(user);
        }
        let set_changes = self.pools.take_changes();
        for (set, _, delta) in &set_changes {
            for profile in self.pools.set(*set).profiles.iter() {
                let profile = &mut self.nodes.profiles.all[profile];
                profile.digest.add(*delta);
                profile.nodes.iter().for_each(|node| self.nodes.dirty.insert(node));
            }
        }

        let dirty_policies = self.policies.take_dirty();
        self.find_classes(&dirty_policies, &mut classes);
        let mut old_chains: Vec<ChainIndex> = Vec::new();
        self.rebuild_chains(&classes, &mut old_chains, &mut pods);
        for class in left {
            if self.inventory.judged(class).is_empty()
                && let Some(chains) = self.chains.by_class.remove(&class)
            {
                old_chains.extend(chains.all());
            }
        }

        let mut changes = Changes::default();
        let mut steps = self.move_pods(pods, &mut changes);
        self.move_profiles(&mut steps, &mut changes);
        self.add_set_changes(set_changes, &mut changes);
        self.finish_nodes(&mut changes);
        self.release(old_chains, steps, &dirty_policies);
        changes
    }

    /// The classes whose chains a changed policy is in, was in, or comes into.
    fn find_classes(&mut self, dirty_policies: &[PolicyIndex], classes: &mut IdSet<ClassId>) {
        if self.tiers.rank() {
            self.chains.by_class.keys().for_each(|class| classes.insert(*class));
        }
        for at in dirty_policies {
            let slot = &mut self.policies.all[*at];
            slot.dirty = false;
            slot.units = [None; 2];
            slot.old_pools.append(&mut slot.pools);
            let subject = slot.policy.subject.filter(|_| slot.live);
            let subjects = [slot.committed_subject, subject];
            slot.committed_subject = subject;
            let distinct = subjects.iter().take(if subjects[0] == subjects[1] { 1 } else { 2 });
            for subject in distinct.flatten() {
                for class in self.inventory.index.certain(*subject) {
                    if !self.inventory.judged(class).is_empty() {
                        classes.insert(class);
                    }
                }
            }
        }
    }

    fn rebuild_chains(&mut self, classes: &IdSet<ClassId>, old_chains: &mut Vec<ChainIndex>, pods: &mut Pods) {
        for class in classes.iter() {
            if self.inventory.judged(class).is_empty() {
                continue;
            }
            let mut policies: Vec<PolicyIndex> = Vec::new();
            for matched in self.inventory.index.matches(class).iter().filter(|matched| matched.certain) {
                policies.extend(self.policies.by_subject.get(&matched.selector).into_iter().flat_map(IdSet::iter));
            }
            policies.sort_unstable_by(|a, b| self.policies.compare(&self.tiers, *a, *b));
            let to_node: Vec<PolicyIndex> = policies
                .iter()
                .copied()
                .filter(|at| self.policies.all[*at].policy.id.kind != PolicyKind::KubernetesNetworkPolicy)
                .collect();
            let chains = ClassChains {
                ingress: self.chain_of(&policies, Direction::Ingress),
                egress: self.chain_of(&policies, Direction::Egress),
                egress_to_node: self.chain_of(&to_node, Direction::Egress),
            };
            let old = self.chains.by_class.insert(class, chains);
            if let Some(old) = old {
                old_chains.extend(old.all());
            }
            if old != Some(chains) {
                for at in self.inventory.judged(class).iter() {
                    let node = self.inventory.slots[at].node;
                    pods.entry(at).or_insert(node);
                }
            }
        }
    }

    /// The chain of policies in order, with one more reference.
    fn chain_of(&mut self, policies: &[PolicyIndex], direction: Direction) -> ChainIndex {
        // With the tier of each.
        let mut applying: Vec<(TierIndex, PolicyId)> = Vec::with_capacity(policies.len());
        let mut units: Vec<UnitIndex> = Vec::with_capacity(policies.len());
        for at in policies {
            if self.policies.all[*at].policy.rules(direction).is_none() {
                continue;
            }
            let unit = self.unit_of(*at, direction);
            let id = self.chains.units[unit].id;
            applying.push((self.policies.all[*at].tier, id));
            units.push(unit);
        }
        let phase_of = |it: &(TierIndex, PolicyId)| self.tiers.all[it.0].id.phase;
        let tier = |group: &[(TierIndex, PolicyId)]| {
            let tier = &self.tiers.all[group[0].0];
            let default = match tier.default {
                TierDefault::Deny => hanse_ruleset::TierDefault::Deny,
                TierDefault::Pass => hanse_ruleset::TierDefault::Pass,
            };
            let policies = group.iter().map(|(_, id)| *id).collect();
            hanse_ruleset::Tier { name: tier.id.name.clone(), policies, default }
        };
        let phase = |group: &[(TierIndex, PolicyId)]| {
            let by_tier = || group.chunk_by(|a, b| a.0 == b.0);
            let mut tiers = Vec::with_capacity(by_tier().count());
            tiers.extend(by_tier().map(tier));
            hanse_ruleset::Phase { name: self.phase_names[phase_of(&group[0]) as usize].clone(), tiers }
        };
        let by_phase = || applying.chunk_by(|a, b| phase_of(a) == phase_of(b));
        let mut phases = Vec::with_capacity(by_phase().count());
        phases.extend(by_phase().map(phase));
        units.sort_unstable();
        units.dedup();
        self.chains.take(Chain { phases, profile_allows: true }, units)
    }

    /// One direction of a policy, compiled where it is not yet.
    fn unit_of(&mut self, at: PolicyIndex, direction: Direction) -> UnitIndex {
        let slot = &mut self.policies.all[at];
        if let Some(unit) = slot.units[direction as usize] {
            return unit;
        }
        let compiled = rule::compile(&mut self.pools, &self.inventory, &slot.policy, at, direction, self.allow_final);
        slot.pools.extend(compiled.pools);
        slot.pools.sort_unstable();
        slot.pools.dedup();
        let id = compiled.policy.id();
        let index = match self.chains.units_by_id.get(&id) {
            Some(index) => *index,
            None => {
                compiled.sets.iter().for_each(|set| self.pools.refer(*set));
                let (policy, sets) = (Arc::new(compiled.policy), compiled.sets.into());
                let index = self.chains.units.insert(Unit { id, policy, sets, references: 0, owner: at });
                self.chains.units_by_id.insert(id, index);
                index
            }
        };
        slot.units[direction as usize] = Some(index);
        index
    }

    /// Gives pods their new entries. Returns by node the chains whose count was touched, with the count before.
    fn move_pods(&mut self, pods: Pods, changes: &mut Changes) -> FastMap<NodeIndex, NodeStep> {
        let mut steps: FastMap<NodeIndex, NodeStep> = FastMap::default();
        // In the order of memory.
        let mut pods: Vec<(SlotId, Option<NodeIndex>)> = pods.into_iter().collect();
        pods.sort_unstable();
        for (at, old_node) in pods {
            let new = self.local_endpoint(at);
            let new_node = new.as_ref().and_then(|_| self.inventory.slots[at].node);
            let old = old_node.and_then(|node| self.nodes.all.get(node)?.endpoints.get(&at).cloned());
            let old_entry = old.as_ref().map(|(old, _)| &**old);
            if old_entry == new.as_ref().map(|(new, _)| new) && old_node == new_node {
                continue;
            }
            if let (Some((old, chains)), Some(old_node)) = (old, old_node) {
                let node = self.nodes.all.entry(old_node);
                node.endpoints.remove(&at);
                node.endpoints_digest.remove(Digest::of_endpoint(&old));
                let step = steps.entry(old_node).or_default();
                step.removed.push(old.id.clone());
                for chain in chains.all() {
                    let count = node.chains.entry(chain).or_default();
                    step.chains.entry(chain).or_insert(*count);
                    *count = count.wrapping_sub(1);
                }
            }
            if let (Some((new, chains)), Some(new_node)) = (new, new_node) {
                let new = Arc::new(new);
                let node = self.nodes.all.entry(new_node);
                node.endpoints_digest.add(Digest::of_endpoint(&new));
                let step = steps.entry(new_node).or_default();
                for chain in chains.all() {
                    let count = node.chains.entry(chain).or_default();
                    step.chains.entry(chain).or_insert(*count);
                    *count = count.wrapping_add(1);
                }
                step.set.push(new.clone());
                node.endpoints.insert(at, (new, chains));
            }
        }
        for (node, step) in &mut steps {
            self.nodes.dirty.insert(*node);
            step.set.sort_unstable_by(|a, b| a.id.cmp(&b.id));
            step.removed.retain(|id| step.set.binary_search_by(|it| it.id.cmp(id)).is_err());
            step.removed.sort_unstable();
            let change = &mut changes.nodes.entry(self.inventory.nodes[*node].clone()).or_default().step;
            change.endpoints = std::mem::take(&mut step.set);
            change.endpoints_removed = std::mem::take(&mut step.removed);
        }
        steps
    }

    fn local_endpoint(&self, at: SlotId) -> Option<(LocalEndpoint, ClassChains)> {
        let slot = self.inventory.slots.get(at)?;
        let class = slot.class.filter(|class| self.inventory.judged(*class).contains(at))?;
        let chains = *self.chains.by_class.get(&class)?;
        let id = |chain: ChainIndex| self.chains.chains[chain].id;
        let mut addresses: Vec<_> = self.inventory.owned(at).collect();
        addresses.sort_unstable();
        let namespace = self.inventory.namespace_of(at).cloned().unwrap_or_default();
        let endpoint = LocalEndpoint {
            id: EndpointId { namespace, name: slot.name.clone() },
            addresses,
            ingress: id(chains.ingress),
            egress: id(chains.egress),
            egress_to_node: id(chains.egress_to_node),
        };
        Some((endpoint, chains))
    }

    fn move_profiles(&mut self, steps: &mut FastMap<NodeIndex, NodeStep>, changes: &mut Changes) {
        let mut memo: FastMap<Step, (ProfileIndex, Arc<Objects>)> = FastMap::default();
        for (at, step) in steps {
            let node = self.nodes.all.entry(*at);
            let (mut removed, mut added) = (Vec::new(), Vec::new());
            for (chain, before) in &step.chains {
                let after = node.chains.get(chain).copied().unwrap_or_default();
                if after == 0 {
                    node.chains.remove(chain);
                }
                match (*before, after) {
                    (0, 1..) => added.push(*chain),
                    (1.., 0) => removed.push(*chain),
                    _ => {}
                }
            }
            if removed.is_empty() && added.is_empty() {
                continue;
            }
            removed.sort_unstable();
            added.sort_unstable();
            step.from = Some(node.profile);
            let along = (node.profile, removed, added);
            let (to, objects) = self.nodes.profiles.take(*at, along, &mut memo, &self.chains, &mut self.pools);
            node.profile = to;
            changes.nodes.entry(self.inventory.nodes[*at].clone()).or_default().step.objects = objects;
        }
    }

    /// Adds changes of sets to the nodes that had these sets and still have them.
    fn add_set_changes(&mut self, set_changes: Vec<(SetIndex, SetChange, Digest)>, changes: &mut Changes) {
        for (set, change, _) in set_changes {
            let (stored, change) = (self.pools.set(set), Arc::new(change));
            for profile in stored.profiles.iter() {
                for node in self.nodes.profiles.all[profile].nodes.iter() {
                    let name = &self.inventory.nodes[node];
                    if !changes.nodes.contains_key(name) {
                        changes.nodes.insert(name.clone(), NodeChange::default());
                    }
                    let Some(NodeChange { step, .. }) = changes.nodes.get_mut(name) else { continue };
                    if step.objects.sets_added.binary_search(&stored.id).is_err() {
                        step.set_changes.push((stored.id, change.clone()));
                    }
                }
            }
        }
    }

    fn finish_nodes(&mut self, changes: &mut Changes) {
        let configs_changed = std::mem::take(&mut self.nodes.configs_changed);
        for at in std::mem::take(&mut self.nodes.dirty).iter() {
            let name = &self.inventory.nodes[at];
            let node = self.nodes.all.entry(at);
            let (existed, exists) = (node.committed.is_some(), node.exists());
            let digest = exists.then(|| node.digest(&self.nodes.profiles));
            if digest == node.committed {
                changes.nodes.remove(name);
                continue;
            }
            let change = changes.nodes.entry(name.clone()).or_default();
            let empty = || RuleSet::default().digest();
            change.removed = existed && !exists;
            let step = &mut change.step;
            step.base = Some(node.committed.unwrap_or_else(empty));
            step.digest = digest.unwrap_or_else(empty);
            if configs_changed.contains(at) {
                step.node = Some(node.config.clone().unwrap_or_default());
            }
            step.set_changes.sort_unstable_by_key(|(set, _)| *set);
            node.committed = digest;
        }
    }

    /// Releases chains, units, sets, pools, policies and selectors that nothing refers to.
    fn release(
        &mut self,
        old_chains: Vec<ChainIndex>,
        steps: FastMap<NodeIndex, NodeStep>,
        dirty_policies: &[PolicyIndex],
    ) {
        for step in steps.into_values() {
            if let Some(from) = step.from {
                self.nodes.profiles.release(from, &mut self.pools);
            }
        }
        let old_units: Vec<UnitIndex> = old_chains.into_iter().flat_map(|chain| self.chains.release(chain)).collect();
        let mut owners: Vec<PolicyIndex> = dirty_policies.to_vec();
        for index in old_units {
            let Some(unit) = self.chains.release_unit(index) else { continue };
            unit.sets.into_iter().for_each(|set| self.pools.release(set));
            if let Some(owner) = self.policies.all.get_mut(unit.owner) {
                owner.units.iter_mut().filter(|own| **own == Some(index)).for_each(|own| *own = None);
                owners.push(unit.owner);
            }
        }
        owners.sort_unstable();
        owners.dedup();
        for at in owners {
            let slot = &mut self.policies.all[at];
            if slot.units == [None; 2] {
                slot.old_pools.append(&mut slot.pools);
            }
            for pool in std::mem::take(&mut slot.old_pools) {
                if slot.pools.binary_search(&pool).is_err() {
                    self.pools.leave(pool, at);
                }
            }
            if !slot.live {
                self.policies.free(at);
            }
        }
        self.policies.unregister(&mut self.inventory);
    }
}

/// Pods whose entry may change, with the node that they were on.
type Pods = FastMap<SlotId, Option<NodeIndex>>;

/// What happens to one node.
#[derive(Debug, Default)]
struct NodeStep {
    set: Vec<Arc<LocalEndpoint>>,
    removed: Vec<EndpointId>,
    /// Chains whose count was touched, with the count before.
    chains: FastMap<ChainIndex, u32>,
    /// The profile that it left, if it did.
    from: Option<ProfileIndex>,
}
