//! What each node must enforce. Nodes with the same chains share one profile: the policies, sets and chains that follow.

use std::sync::Arc;

use hanse_policy::indexed::{FastMap, IdSet, NodeIndex, SlotId};
use hanse_policy::slab::{SecondaryMap, Slab};
use hanse_ruleset::{Digest, LocalEndpoint, NodeConfig, Objects};

use crate::chain::{Chains, ClassChains};
use crate::ids::{ChainIndex, EMPTY_PROFILE, ProfileIndex, SetIndex, UnitIndex};
use crate::pool::Pools;

/// All nodes, by the inventory's ids.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    pub all: SecondaryMap<NodeIndex, Node>,
    pub profiles: Profiles,
    pub dirty: IdSet<NodeIndex>,
    pub configs_changed: IdSet<NodeIndex>,
}

impl Nodes {
    pub fn set_config(&mut self, at: NodeIndex, config: Option<NodeConfig>) {
        let node = self.all.entry(at);
        if node.config != config {
            node.config = config;
            self.dirty.insert(at);
            self.configs_changed.insert(at);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Node {
    pub config: Option<NodeConfig>,
    /// By endpoint, with its chains.
    pub endpoints: FastMap<SlotId, (Arc<LocalEndpoint>, ClassChains)>,
    pub endpoints_digest: Digest,
    /// How many times its endpoints name each chain.
    pub chains: FastMap<ChainIndex, u32>,
    pub profile: ProfileIndex,
    /// At the last commit; `None`: the node had no rule set.
    pub committed: Option<Digest>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Profile {
    /// How many chains name each policy, and how many policies each set.
    pub units: FastMap<UnitIndex, u32>,
    pub sets: FastMap<SetIndex, u32>,
    pub chains: IdSet<ChainIndex>,
    /// Of its sets, policies and chains.
    pub digest: Digest,
    pub nodes: IdSet<NodeIndex>,
}

#[derive(Debug)]
pub(crate) struct Profiles {
    pub all: Slab<ProfileIndex, Profile>,
}

impl Default for Profiles {
    fn default() -> Self {
        let mut all = Slab::new();
        let empty = all.insert(Profile::default());
        debug_assert_eq!(empty, EMPTY_PROFILE);
        Self { all }
    }
}

/// The profile of a node, and the chains that it no longer needs and those that it now needs.
pub(crate) type Step = (ProfileIndex, Vec<ChainIndex>, Vec<ChainIndex>);

impl Profiles {
    /// Moves a node along a step, which is computed once for all nodes that take it.
    pub fn take(
        &mut self,
        node: NodeIndex,
        step: Step,
        memo: &mut FastMap<Step, (ProfileIndex, Arc<Objects>)>,
        chains: &Chains,
        pools: &mut Pools,
    ) -> (ProfileIndex, Arc<Objects>) {
        let from = step.0;
        if let Some((to, objects)) = memo.get(&step) {
            let (to, objects) = (*to, objects.clone());
            self.all[from].nodes.remove(node);
            self.all[to].nodes.insert(node);
            return (to, objects);
        }
        let alone = from != EMPTY_PROFILE && self.all[from].nodes.len() == 1;
        let to = if alone {
            from
        } else {
            let mut copy = self.all[from].clone();
            copy.nodes = IdSet::default();
            for set in copy.sets.keys() {
                pools.set_mut(*set).profiles.insert(self.all.next_id());
            }
            self.all[from].nodes.remove(node);
            copy.nodes.insert(node);
            self.all.insert(copy)
        };
        let profile = &mut self.all[to];
        // Before and after, of what the step touches.
        let mut touched_units: FastMap<UnitIndex, u32> = FastMap::default();
        let mut objects = Objects::default();
        for (list, gained) in [(&step.2, true), (&step.1, false)] {
            for chain in list {
                let stored = &chains.chains[*chain];
                let digest = Digest::of_chain(stored.id);
                if gained {
                    profile.chains.insert(*chain);
                    profile.digest.add(digest);
                    objects.chains_added.push(stored.id);
                } else {
                    profile.chains.remove(*chain);
                    profile.digest.remove(digest);
                    objects.chains_removed.push(stored.id);
                }
                for unit in &stored.units {
                    let count = profile.units.entry(*unit).or_default();
                    touched_units.entry(*unit).or_insert(*count);
                    *count = if gained { *count + 1 } else { *count - 1 };
                }
            }
        }
        let mut touched_sets: FastMap<SetIndex, u32> = FastMap::default();
        for (index, before) in touched_units {
            let unit = &chains.units[index];
            let after = profile.units.get(&index).copied().unwrap_or_default();
            let gained = match (before, after) {
                (0, 1..) => true,
                (1.., 0) => false,
                _ => {
                    if after == 0 {
                        profile.units.remove(&index);
                    }
                    continue;
                }
            };
            if gained {
                profile.digest.add(Digest::of_policy(unit.id));
                objects.policies_added.push(unit.id);
            } else {
                profile.units.remove(&index);
                profile.digest.remove(Digest::of_policy(unit.id));
                objects.policies_removed.push(unit.id);
            }
            for set in &unit.sets {
                let count = profile.sets.entry(*set).or_default();
                touched_sets.entry(*set).or_insert(*count);
                // Removals may come before additions: the count is right when all are in.
                *count = if gained { count.wrapping_add(1) } else { count.wrapping_sub(1) };
            }
        }
        for (set, before) in touched_sets {
            let after = profile.sets.get(&set).copied().unwrap_or_default();
            if after == 0 {
                profile.sets.remove(&set);
            }
            let stored = pools.set_mut(set);
            match (before, after) {
                (0, 1..) => {
                    stored.profiles.insert(to);
                    profile.digest.add(stored.digest);
                    objects.sets_added.push(stored.id);
                }
                (1.., 0) => {
                    stored.profiles.remove(to);
                    profile.digest.remove(stored.digest);
                    objects.sets_removed.push(stored.id);
                }
                _ => {}
            }
        }
        objects.sets_added.sort_unstable();
        objects.sets_removed.sort_unstable();
        objects.policies_added.sort_unstable();
        objects.policies_removed.sort_unstable();
        objects.chains_added.sort_unstable();
        objects.chains_removed.sort_unstable();
        let objects = Arc::new(objects);
        if !alone {
            memo.insert(step, (to, objects.clone()));
        }
        (to, objects)
    }

    /// Removes a profile when no node has it.
    pub fn release(&mut self, index: ProfileIndex, pools: &mut Pools) {
        if index == EMPTY_PROFILE || self.all.get(index).is_none_or(|profile| !profile.nodes.is_empty()) {
            return;
        }
        let profile = self.all.remove(index);
        for set in profile.sets.keys() {
            pools.set_mut(*set).profiles.remove(index);
        }
    }
}

impl Default for Node {
    fn default() -> Self {
        Self {
            config: None,
            endpoints: FastMap::default(),
            endpoints_digest: Digest::default(),
            chains: FastMap::default(),
            profile: EMPTY_PROFILE,
            committed: None,
        }
    }
}

impl Node {
    /// Whether it has a rule set at all.
    pub fn exists(&self) -> bool {
        self.config.is_some() || !self.endpoints.is_empty()
    }

    pub fn digest(&self, profiles: &Profiles) -> Digest {
        let default = NodeConfig::default();
        let mut sum = Digest::of_node(self.config.as_ref().unwrap_or(&default));
        sum.add(self.endpoints_digest);
        sum.add(profiles.all[self.profile].digest);
        sum
    }
}
