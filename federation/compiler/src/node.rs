//! What each node holds. Nodes with the same chains share one profile: the policies, sets and chains that follow.

use std::sync::Arc;

use hanse_ruleset::{Chain, ChainId, Digest, LocalEndpoint, NodeConfig, Policy, PolicyId};

use crate::change::Objects;
use crate::compiler::ClassChains;
use crate::pool::{Pools, SetIndex};
use hanse_policy::indexed::FastMap;
use hanse_policy::indexed::IdSet;

pub(crate) type UnitIndex = u32;
pub(crate) type ChainIndex = u32;
pub(crate) type ProfileIndex = u32;

/// One direction of a policy, compiled.
#[derive(Debug)]
pub(crate) struct Unit {
    pub id: PolicyId,
    pub policy: Arc<Policy>,
    pub sets: Box<[SetIndex]>,
    /// Chains that name it.
    pub references: u32,
    /// The number of the source policy.
    pub owner: u32,
}

#[derive(Debug)]
pub(crate) struct HeldChain {
    pub id: ChainId,
    pub chain: Arc<Chain>,
    /// Without doubles.
    pub units: Box<[UnitIndex]>,
    /// Classes judged by it, once for each of their three chains.
    pub references: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Node {
    pub config: Option<NodeConfig>,
    /// By endpoint, with its chains.
    pub endpoints: FastMap<u32, (Arc<LocalEndpoint>, ClassChains)>,
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
    pub chains: IdSet,
    /// Of its sets, policies and chains.
    pub digest: Digest,
    pub nodes: IdSet,
}

#[derive(Debug)]
pub(crate) struct Profiles {
    pub all: Vec<Profile>,
    free: Vec<ProfileIndex>,
}

/// The profile that nothing needs, which every node starts with.
pub(crate) const EMPTY: ProfileIndex = 0;

impl Default for Profiles {
    fn default() -> Self {
        Self { all: vec![Profile::default()], free: Vec::new() }
    }
}

/// Chains that a node loses and gains.
pub(crate) type Step = (ProfileIndex, Vec<ChainIndex>, Vec<ChainIndex>);

impl Profiles {
    /// Moves a node along a step, which is worked out once however many nodes take it.
    pub fn take(
        &mut self,
        node: u32,
        step: Step,
        memo: &mut FastMap<Step, (ProfileIndex, Arc<Objects>)>,
        chains: &[Option<HeldChain>],
        units: &[Option<Unit>],
        pools: &mut Pools,
    ) -> (ProfileIndex, Arc<Objects>) {
        let from = step.0;
        if let Some((to, objects)) = memo.get(&step) {
            let (to, objects) = (*to, objects.clone());
            self.all[from as usize].nodes.remove(node);
            self.all[to as usize].nodes.insert(node);
            return (to, objects);
        }
        let alone = from != EMPTY && self.all[from as usize].nodes.len() == 1;
        let to = if alone {
            from
        } else {
            let mut copy = self.all[from as usize].clone();
            copy.nodes = IdSet::default();
            for set in copy.sets.keys() {
                pools.held_mut(*set).profiles.insert(self.next_index());
            }
            self.all[from as usize].nodes.remove(node);
            copy.nodes.insert(node);
            self.insert(copy)
        };
        let profile = &mut self.all[to as usize];
        // Before and after, of what the step touches.
        let mut touched_units: FastMap<UnitIndex, u32> = FastMap::default();
        let mut objects = Objects::default();
        for (list, gained) in [(&step.2, true), (&step.1, false)] {
            for chain in list {
                let Some(held) = &chains[*chain as usize] else { continue };
                let digest = Digest::of_chain(held.id);
                if gained {
                    profile.chains.insert(*chain);
                    profile.digest.add(digest);
                    objects.chains_added.push(held.id);
                } else {
                    profile.chains.remove(*chain);
                    profile.digest.remove(digest);
                    objects.chains_removed.push(held.id);
                }
                for unit in &held.units {
                    let count = profile.units.entry(*unit).or_default();
                    touched_units.entry(*unit).or_insert(*count);
                    *count = if gained { *count + 1 } else { *count - 1 };
                }
            }
        }
        let mut touched_sets: FastMap<SetIndex, u32> = FastMap::default();
        for (index, before) in touched_units {
            let Some(unit) = &units[index as usize] else { continue };
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
                // Losses may come before gains: the count is settled when all are in.
                *count = if gained { count.wrapping_add(1) } else { count.wrapping_sub(1) };
            }
        }
        for (set, before) in touched_sets {
            let after = profile.sets.get(&set).copied().unwrap_or_default();
            if after == 0 {
                profile.sets.remove(&set);
            }
            let held = pools.held_mut(set);
            match (before, after) {
                (0, 1..) => {
                    held.profiles.insert(to);
                    profile.digest.add(held.digest);
                    objects.sets_added.push(held.id);
                }
                (1.., 0) => {
                    held.profiles.remove(to);
                    profile.digest.remove(held.digest);
                    objects.sets_removed.push(held.id);
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

    fn next_index(&self) -> ProfileIndex {
        self.free.last().copied().unwrap_or(self.all.len() as ProfileIndex)
    }

    fn insert(&mut self, profile: Profile) -> ProfileIndex {
        match self.free.pop() {
            Some(index) => {
                self.all[index as usize] = profile;
                index
            }
            None => {
                self.all.push(profile);
                self.all.len() as ProfileIndex - 1
            }
        }
    }

    /// Forgets a profile when no node has it.
    pub fn release(&mut self, index: ProfileIndex, pools: &mut Pools) {
        if index == EMPTY || !self.all[index as usize].nodes.is_empty() || self.free.contains(&index) {
            return;
        }
        let profile = std::mem::take(&mut self.all[index as usize]);
        for set in profile.sets.keys() {
            pools.held_mut(*set).profiles.remove(index);
        }
        self.free.push(index);
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
        sum.add(profiles.all[self.profile as usize].digest);
        sum
    }
}
