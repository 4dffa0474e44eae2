//! Chains: the rules that judge pods, in order.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::evaluate::{Direction, View, rules};
use crate::indexed::{FastMap, SelectorId};
use crate::model::{Action, EntityMatch, Policy, PolicyId, Rule, TierDefault, TierId};
use crate::outline::{ANY, Outline};

/// Rules in all cached chains: 24 bytes each, so 48 MB. At the limit the cache is emptied.
const MAX_RULES: usize = 2 << 20;

/// The selectors of policies that match a pod, sorted, with what is evaluated.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct ChainKey {
    pub subjects: SmallVec<[SelectorId; 4]>,
    pub direction: Direction,
    pub view: View,
}

#[derive(Debug, Default)]
pub(super) struct Chain {
    pub tiers: Vec<ChainTier>,
    policies: Vec<Arc<Policy>>,
    /// What is compared first, closely packed.
    pub outlines: Vec<Outline>,
    rules: Vec<ChainRule>,
    /// By end: some outline requires a bit.
    pub requires: [bool; 2],
}

#[derive(Debug)]
pub(super) struct ChainTier {
    pub id: TierId,
    pub default: TierDefault,
    /// The last of the policies that apply.
    pub last: PolicyId,
    pub rules: Range<usize>,
}

/// A rule by its policy's position in the chain, and its own in the policy.
#[derive(Debug, Clone, Copy)]
struct ChainRule {
    policy: u32,
    rule: u32,
}

impl Chain {
    /// Appends a tier with the policies that apply, in order.
    ///
    /// A rule that does what an earlier one of the tier does, where that one matches, is never reached and left out. Log
    /// rules act each time, and so do rules of which a part cannot be judged.
    pub fn push_tier<'p>(
        &mut self,
        id: &TierId,
        default: TierDefault,
        policies: impl Iterator<Item = &'p Arc<Policy>>,
        direction: Direction,
        bit_of: &dyn Fn(&EntityMatch) -> Option<u32>,
    ) {
        let first = self.rules.len();
        let mut seen: HashSet<Rule, foldhash::fast::RandomState> = HashSet::default();
        for policy in policies {
            for (at, rule) in rules(policy, direction).unwrap_or_default().iter().enumerate() {
                let decides = rule.action != Action::Log && rule.unknown_because().is_none();
                if decides && !seen.insert(Rule { index: 0, ..rule.clone() }) {
                    continue;
                }
                let outline = Outline::of(rule, [bit_of(&rule.source), bit_of(&rule.destination)]);
                for (requires, bit) in self.requires.iter_mut().zip(outline.ends) {
                    *requires |= bit != ANY;
                }
                self.outlines.push(outline);
                self.rules.push(ChainRule { policy: self.policies.len() as u32, rule: at as u32 });
            }
            self.policies.push(policy.clone());
        }
        if let Some(last) = self.policies.last() {
            let rules = first..self.rules.len();
            self.tiers.push(ChainTier { id: id.clone(), default, last: last.id.clone(), rules });
        }
    }

    /// Whether it has the same policies, in the same order.
    pub fn has_policies_of(&self, other: &Self) -> bool {
        self.policies.len() == other.policies.len()
            && self.policies.iter().zip(&other.policies).all(|(a, b)| Arc::ptr_eq(a, b))
    }

    pub fn rule(&self, at: usize, direction: Direction) -> Option<(&Policy, &Rule)> {
        let ChainRule { policy, rule } = self.rules[at];
        let policy = &self.policies[policy as usize];
        Some((policy, rules(policy, direction)?.get(rule as usize)?))
    }
}

/// Chains that were built, until a policy of theirs changes.
#[derive(Debug, Default)]
pub(super) struct ChainCache {
    chains: FastMap<ChainKey, Arc<Chain>>,
    by_subject: FastMap<SelectorId, Vec<ChainKey>>,
    rules: usize,
}

impl ChainCache {
    pub fn get(&self, key: &ChainKey) -> Option<Arc<Chain>> {
        self.chains.get(key).cloned()
    }

    pub fn insert(&mut self, key: ChainKey, chain: &Arc<Chain>) {
        if self.rules + chain.rules.len() > MAX_RULES {
            self.clear();
        }
        if self.chains.insert(key.clone(), chain.clone()).is_none() {
            self.rules += chain.rules.len();
            for subject in &key.subjects {
                self.by_subject.entry(*subject).or_default().push(key.clone());
            }
        }
    }

    /// Drops the chains with policies of a subject.
    pub fn drop_of(&mut self, subject: SelectorId) {
        for key in self.by_subject.remove(&subject).unwrap_or_default() {
            if let Some(chain) = self.chains.remove(&key) {
                self.rules -= chain.rules.len();
                for other in key.subjects.iter().filter(|other| **other != subject) {
                    if let Some(keys) = self.by_subject.get_mut(other) {
                        keys.retain(|have| *have != key);
                    }
                }
            }
        }
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
