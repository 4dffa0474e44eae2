//! Compiled directions of policies, and the chains of them that classes of pods have.

use std::sync::Arc;

use hanse_policy::indexed::{ClassId, FastMap};
use hanse_policy::slab::Slab;
use hanse_ruleset::{Chain, ChainId, Policy, PolicyId};

use crate::ids::{ChainIndex, PolicyIndex, SetIndex, UnitIndex};

/// One direction of a policy, compiled.
#[derive(Debug)]
pub(crate) struct Unit {
    pub id: PolicyId,
    pub policy: Arc<Policy>,
    pub sets: Box<[SetIndex]>,
    /// Chains that name it.
    pub references: u32,
    /// The source policy. Others with the same content share the unit.
    pub owner: PolicyIndex,
}

#[derive(Debug)]
pub(crate) struct SharedChain {
    pub id: ChainId,
    pub chain: Arc<Chain>,
    /// Distinct.
    pub units: Box<[UnitIndex]>,
    /// Classes judged by it, once for each of their three chains.
    pub references: u32,
}

/// The chains of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClassChains {
    pub ingress: ChainIndex,
    pub egress: ChainIndex,
    pub egress_to_node: ChainIndex,
}

impl ClassChains {
    pub fn all(self) -> [ChainIndex; 3] {
        [self.ingress, self.egress, self.egress_to_node]
    }
}

#[derive(Debug, Default)]
pub(crate) struct Chains {
    pub units: Slab<UnitIndex, Unit>,
    pub units_by_id: FastMap<PolicyId, UnitIndex>,
    pub chains: Slab<ChainIndex, SharedChain>,
    pub chains_by_id: FastMap<ChainId, ChainIndex>,
    /// Of the classes that have judged pods.
    pub by_class: FastMap<ClassId, ClassChains>,
}

impl Chains {
    /// The chain of this content, with one more reference.
    pub fn take(&mut self, chain: Chain, units: Vec<UnitIndex>) -> ChainIndex {
        let id: ChainId = chain.id();
        if let Some(index) = self.chains_by_id.get(&id) {
            self.chains[*index].references += 1;
            return *index;
        }
        for unit in &units {
            self.units[*unit].references += 1;
        }
        let index = self.chains.insert(SharedChain { id, chain: Arc::new(chain), units: units.into(), references: 1 });
        self.chains_by_id.insert(id, index);
        index
    }

    /// Gives back a reference. Returns the units of the chain when it was the last.
    pub fn release(&mut self, index: ChainIndex) -> Box<[UnitIndex]> {
        let references = &mut self.chains[index].references;
        *references -= 1;
        if *references > 0 {
            return Box::default();
        }
        let chain = self.chains.remove(index);
        self.chains_by_id.remove(&chain.id);
        chain.units
    }

    /// Gives back a chain's reference to a unit. Returns the unit when it was the last.
    pub fn release_unit(&mut self, index: UnitIndex) -> Option<Unit> {
        let references = &mut self.units[index].references;
        *references -= 1;
        if *references > 0 {
            return None;
        }
        let unit = self.units.remove(index);
        self.units_by_id.remove(&unit.id);
        Some(unit)
    }

    /// The numbers of units, chains and classes.
    pub fn count(&self) -> [usize; 3] {
        [self.units.len(), self.chains.len(), self.by_class.len()]
    }
}
