//! Bringing the rule sets up to date with the state.
//!
//! In this order: classes of endpoints, with what they contribute to sets; policies whose text changes; chains of the
//! classes that local pods have; pods and their nodes; profiles; and last, letting go of what nobody needs.

use std::sync::Arc;

use hanse_policy::model::{PolicyKind, TierDefault};
use hanse_ruleset::{Chain, ChainId, Digest, EndpointId, LocalEndpoint, PolicyId, RuleSet};

use crate::change::{Changes, NodeChange, Objects};
use crate::compiler::{ClassChains, Compiler};
use crate::node::{ChainIndex, HeldChain, ProfileIndex, Step, Unit, UnitIndex};
use crate::report::Direction;
use crate::rule;
use hanse_policy::indexed::FastMap;
use hanse_policy::indexed::IdSet;
use hanse_policy::indexed::{Contribution, NONE};

impl Compiler {
    /// Brings the rule sets of all nodes up to date with the state, and says what changed.
    pub fn commit(&mut self) -> Changes {
        // Pods whose entry may change, with the node that they were on.
        let mut pods: FastMap<u32, u32> = FastMap::default();
        let mut left: Vec<u32> = Vec::new();
        let mut classes = IdSet::default();
        let pools = &mut self.pools;
        let class_chains = &self.class_chains;
        self.inventory.refresh(|inventory, at, old, new| {
            pools.contribute(inventory, old, new);
            let is_judged = |it: &&Contribution| it.judged;
            let (old, new) = (old.filter(is_judged), new.filter(is_judged));
            if old.is_some() || new.is_some() {
                pods.insert(at, old.map_or(NONE, |old| old.node));
            }
            if let Some(new) = new
                && !class_chains.contains_key(&new.class)
            {
                classes.insert(new.class);
            }
            left.extend(old.filter(|old| new.is_none_or(|new| new.class != old.class)).map(|old| old.class));
        });
        self.grow_nodes();
        for user in self.pools.take_reshaped() {
            self.mark_policy(user);
        }
        let set_changes = self.pools.take_changes();
        for (set, _, delta) in &set_changes {
            for profile in self.pools.held(*set).profiles.iter() {
                self.profiles.all[profile as usize].digest.add(*delta);
                self.profiles.all[profile as usize].nodes.iter().for_each(|node| self.dirty_nodes.insert(node));
            }
        }

        let dirty_policies = std::mem::take(&mut self.dirty_policies);
        self.find_classes(&dirty_policies, &mut classes);
        let mut old_chains: Vec<ChainIndex> = Vec::new();
        self.rebuild_chains(&classes, &mut old_chains, &mut pods);
        for class in left {
            if self.inventory.judged[class as usize].is_empty()
                && let Some(chains) = self.class_chains.remove(&class)
            {
                old_chains.extend(chains.all());
            }
        }

        let mut changes = Changes::default();
        let mut steps = self.move_pods(pods, &mut changes);
        self.move_profiles(&mut steps, &mut changes);
        self.tell_sets(set_changes, &mut changes);
        self.finish_nodes(&mut changes);
        self.let_go(old_chains, steps, &dirty_policies);
        changes
    }

    /// The classes whose chains a changed policy is in, was in, or comes into.
    fn find_classes(&mut self, dirty_policies: &[u32], classes: &mut IdSet) {
        if std::mem::take(&mut self.tiers_dirty) {
            self.rank_tiers();
            self.class_chains.keys().for_each(|class| classes.insert(*class));
        }
        for at in dirty_policies {
            let slot = &mut self.policies[*at as usize];
            slot.dirty = false;
            slot.units = [None; 2];
            slot.old_pools.append(&mut slot.pools);
            let subject = slot.policy.subject.filter(|_| slot.live);
            let subjects = [slot.committed_subject, subject];
            slot.committed_subject = subject;
            let distinct = subjects.iter().take(if subjects[0] == subjects[1] { 1 } else { 2 });
            for subject in distinct.flatten() {
                for class in self.inventory.index.certain(*subject) {
                    if self.inventory.judged.get(class as usize).is_some_and(|judged| !judged.is_empty()) {
                        classes.insert(class);
                    }
                }
            }
        }
    }

    fn rebuild_chains(&mut self, classes: &IdSet, old_chains: &mut Vec<ChainIndex>, pods: &mut FastMap<u32, u32>) {
        for class in classes.iter() {
            if self.inventory.judged[class as usize].is_empty() {
                continue;
            }
            let mut policies: Vec<u32> = Vec::new();
            for matched in self.inventory.index.matches(class).iter().filter(|matched| matched.certain) {
                policies.extend(self.by_subject.get(&matched.selector).into_iter().flat_map(IdSet::iter));
            }
            policies.sort_unstable_by(|a, b| self.compare(*a, *b));
            let to_node: Vec<u32> = policies
                .iter()
                .copied()
                .filter(|at| self.policies[*at as usize].policy.id.kind != PolicyKind::KubernetesNetworkPolicy)
                .collect();
            let chains = ClassChains {
                ingress: self.chain_of(&policies, Direction::Ingress),
                egress: self.chain_of(&policies, Direction::Egress),
                egress_to_node: self.chain_of(&to_node, Direction::Egress),
            };
            let old = self.class_chains.insert(class, chains);
            if let Some(old) = old {
                old_chains.extend(old.all());
            }
            if old != Some(chains) {
                for at in self.inventory.judged[class as usize].iter() {
                    let node = self.inventory.slots[at as usize].node;
                    pods.entry(at).or_insert(node);
                }
            }
        }
    }

    /// The chain of policies in order, with one more reference.
    fn chain_of(&mut self, policies: &[u32], direction: Direction) -> ChainIndex {
        // With the tier of each.
        let mut applying: Vec<(u32, PolicyId)> = Vec::with_capacity(policies.len());
        let mut units: Vec<UnitIndex> = Vec::with_capacity(policies.len());
        for at in policies {
            if self.policies[*at as usize].policy.rules(direction).is_none() {
                continue;
            }
            let unit = self.unit_of(*at, direction);
            let Some(id) = self.units[unit as usize].as_ref().map(|unit| unit.id) else { continue };
            applying.push((self.policies[*at as usize].tier, id));
            units.push(unit);
        }
        let phase_of = |it: &(u32, PolicyId)| self.tiers[it.0 as usize].id.phase;
        let tier = |group: &[(u32, PolicyId)]| {
            let tier = &self.tiers[group[0].0 as usize];
            let default = match tier.default {
                TierDefault::Deny => hanse_ruleset::TierDefault::Deny,
                TierDefault::Pass => hanse_ruleset::TierDefault::Pass,
            };
            let policies = group.iter().map(|(_, id)| *id).collect();
            hanse_ruleset::Tier { name: tier.id.name.clone(), policies, default }
        };
        let phase = |group: &[(u32, PolicyId)]| {
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
        self.hold_chain(Chain { phases, profile_allows: true }, units)
    }

    fn hold_chain(&mut self, chain: Chain, units: Vec<UnitIndex>) -> ChainIndex {
        let id: ChainId = chain.id();
        if let Some(index) = self.chains_by_id.get(&id) {
            if let Some(held) = &mut self.chains[*index as usize] {
                held.references += 1;
            }
            return *index;
        }
        for unit in &units {
            if let Some(unit) = &mut self.units[*unit as usize] {
                unit.references += 1;
            }
        }
        let held = Some(HeldChain { id, chain: Arc::new(chain), units: units.into(), references: 1 });
        let index = match self.free_chains.pop() {
            Some(index) => {
                self.chains[index as usize] = held;
                index
            }
            None => {
                self.chains.push(held);
                self.chains.len() as ChainIndex - 1
            }
        };
        self.chains_by_id.insert(id, index);
        index
    }

    /// One direction of a policy, compiled when it is not.
    fn unit_of(&mut self, at: u32, direction: Direction) -> UnitIndex {
        let slot = &mut self.policies[at as usize];
        if let Some(unit) = slot.units[direction as usize] {
            return unit;
        }
        let compiled = rule::compile(&mut self.pools, &self.inventory, &slot.policy, at, direction, self.allow_final);
        slot.pools.extend(compiled.pools);
        slot.pools.sort_unstable();
        slot.pools.dedup();
        let id = compiled.policy.id();
        let index = match self.units_by_id.get(&id) {
            Some(index) => *index,
            None => {
                compiled.sets.iter().for_each(|set| self.pools.refer(*set));
                let (policy, sets) = (Arc::new(compiled.policy), compiled.sets.into());
                let unit = Some(Unit { id, policy, sets, references: 0, owner: at });
                let index = match self.free_units.pop() {
                    Some(index) => {
                        self.units[index as usize] = unit;
                        index
                    }
                    None => {
                        self.units.push(unit);
                        self.units.len() as UnitIndex - 1
                    }
                };
                self.units_by_id.insert(id, index);
                index
            }
        };
        slot.units[direction as usize] = Some(index);
        index
    }

    /// Gives pods their new entries. The outcome: by node, the chains whose count was touched, with the count before.
    fn move_pods(&mut self, pods: FastMap<u32, u32>, changes: &mut Changes) -> FastMap<u32, NodeStep> {
        let mut steps: FastMap<u32, NodeStep> = FastMap::default();
        // In the order in which they lie in memory.
        let mut pods: Vec<(u32, u32)> = pods.into_iter().collect();
        pods.sort_unstable();
        for (at, old_node) in pods {
            let new = self.local_endpoint(at);
            let new_node = if new.is_some() { self.inventory.slots[at as usize].node } else { NONE };
            let old = match old_node {
                NONE => None,
                node => self.nodes[node as usize].endpoints.get(&at).cloned(),
            };
            let old_entry = old.as_ref().map(|(old, _)| &**old);
            if old_entry == new.as_ref().map(|(new, _)| new) && old_node == new_node {
                continue;
            }
            if let Some((old, chains)) = old {
                let node = &mut self.nodes[old_node as usize];
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
            if let Some((new, chains)) = new {
                let new = Arc::new(new);
                let node = &mut self.nodes[new_node as usize];
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
            self.dirty_nodes.insert(*node);
            step.set.sort_unstable_by(|a, b| a.id.cmp(&b.id));
            step.removed.retain(|id| step.set.binary_search_by(|it| it.id.cmp(id)).is_err());
            step.removed.sort_unstable();
            let change = changes.nodes.entry(self.inventory.nodes[*node as usize].clone()).or_default();
            change.endpoints = std::mem::take(&mut step.set);
            change.endpoints_removed = std::mem::take(&mut step.removed);
        }
        steps
    }

    fn local_endpoint(&self, at: u32) -> Option<(LocalEndpoint, ClassChains)> {
        let slot = &self.inventory.slots[at as usize];
        if slot.class == NONE || !self.inventory.judged[slot.class as usize].contains(at) {
            return None;
        }
        let chains = *self.class_chains.get(&slot.class)?;
        let id = |chain: ChainIndex| self.chains[chain as usize].as_ref().map(|held| held.id);
        let mut addresses: Vec<_> = self.inventory.held(at).collect();
        addresses.sort_unstable();
        let namespace = self.inventory.namespace_of(at).cloned().unwrap_or_default();
        let endpoint = LocalEndpoint {
            id: EndpointId { namespace, name: slot.name.clone() },
            addresses,
            ingress: id(chains.ingress)?,
            egress: id(chains.egress)?,
            egress_to_node: id(chains.egress_to_node)?,
        };
        Some((endpoint, chains))
    }

    fn move_profiles(&mut self, steps: &mut FastMap<u32, NodeStep>, changes: &mut Changes) {
        let mut memo: FastMap<Step, (ProfileIndex, Arc<Objects>)> = FastMap::default();
        for (at, step) in steps {
            let node = &mut self.nodes[*at as usize];
            let (mut lost, mut gained) = (Vec::new(), Vec::new());
            for (chain, before) in &step.chains {
                let after = node.chains.get(chain).copied().unwrap_or_default();
                if after == 0 {
                    node.chains.remove(chain);
                }
                match (*before, after) {
                    (0, 1..) => gained.push(*chain),
                    (1.., 0) => lost.push(*chain),
                    _ => {}
                }
            }
            if lost.is_empty() && gained.is_empty() {
                continue;
            }
            lost.sort_unstable();
            gained.sort_unstable();
            step.from = Some(node.profile);
            let along = (node.profile, lost, gained);
            let (to, objects) = self.profiles.take(*at, along, &mut memo, &self.chains, &self.units, &mut self.pools);
            node.profile = to;
            changes.nodes.entry(self.inventory.nodes[*at as usize].clone()).or_default().objects = objects;
        }
    }

    /// Tells nodes which of the sets that they had and have changed.
    fn tell_sets(&mut self, set_changes: Vec<(u32, hanse_ruleset::SetChange, Digest)>, changes: &mut Changes) {
        for (set, change, _) in set_changes {
            let held = self.pools.held(set);
            let mut told = false;
            for profile in held.profiles.iter() {
                for node in self.profiles.all[profile as usize].nodes.iter() {
                    let name = &self.inventory.nodes[node as usize];
                    if !changes.nodes.contains_key(name) {
                        changes.nodes.insert(name.clone(), NodeChange::default());
                    }
                    let Some(node_change) = changes.nodes.get_mut(name) else { continue };
                    if node_change.objects.sets_added.binary_search(&held.id).is_err() {
                        node_change.set_changes.push(held.id);
                        told = true;
                    }
                }
            }
            if told {
                changes.sets.insert(held.id, Arc::new(change));
            }
        }
    }

    fn finish_nodes(&mut self, changes: &mut Changes) {
        let configs_changed = std::mem::take(&mut self.configs_changed);
        for at in std::mem::take(&mut self.dirty_nodes).iter() {
            let name = &self.inventory.nodes[at as usize];
            let node = &mut self.nodes[at as usize];
            let (existed, exists) = (node.committed.is_some(), node.exists());
            let digest = exists.then(|| node.digest(&self.profiles));
            if digest == node.committed {
                changes.nodes.remove(name);
                continue;
            }
            let change = changes.nodes.entry(name.clone()).or_default();
            let empty = || RuleSet::default().digest();
            change.base = node.committed.unwrap_or_else(empty);
            change.digest = digest.unwrap_or_else(empty);
            change.removed = existed && !exists;
            if configs_changed.contains(at) {
                change.config = Some(node.config.clone().unwrap_or_default());
            }
            change.set_changes.sort_unstable();
            node.committed = digest;
        }
    }

    fn let_go(&mut self, old_chains: Vec<ChainIndex>, steps: FastMap<u32, NodeStep>, dirty_policies: &[u32]) {
        for step in steps.into_values() {
            if let Some(from) = step.from {
                self.profiles.release(from, &mut self.pools);
            }
        }
        let mut old_units: Vec<UnitIndex> = Vec::new();
        for index in old_chains {
            let Some(held) = &mut self.chains[index as usize] else { continue };
            held.references -= 1;
            if held.references == 0
                && let Some(held) = self.chains[index as usize].take()
            {
                self.chains_by_id.remove(&held.id);
                self.free_chains.push(index);
                old_units.extend(held.units);
            }
        }
        let mut owners: Vec<u32> = dirty_policies.to_vec();
        for index in old_units {
            let Some(unit) = &mut self.units[index as usize] else { continue };
            unit.references -= 1;
            if unit.references == 0
                && let Some(unit) = self.units[index as usize].take()
            {
                self.units_by_id.remove(&unit.id);
                unit.sets.into_iter().for_each(|set| self.pools.release(set));
                self.free_units.push(index);
                for own in &mut self.policies[unit.owner as usize].units {
                    if *own == Some(index) {
                        *own = None;
                    }
                }
                owners.push(unit.owner);
            }
        }
        owners.sort_unstable();
        owners.dedup();
        for at in owners {
            let slot = &mut self.policies[at as usize];
            if slot.units == [None; 2] {
                slot.old_pools.append(&mut slot.pools);
            }
            for pool in std::mem::take(&mut slot.old_pools) {
                if slot.pools.binary_search(&pool).is_err() {
                    self.pools.leave(pool, at);
                }
            }
            if !slot.live {
                self.forget_policy(at);
            }
        }
        for selector in std::mem::take(&mut self.retired) {
            self.inventory.index.unregister(selector);
        }
    }
}

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
