//! The tiers that policies name, in their order.

use hanse_policy::indexed::FastMap;
use hanse_policy::model::{Layer, Phase, Tier, TierDefault, TierId};
use hanse_policy::slab::Slab;

use crate::ids::TierIndex;

#[derive(Debug)]
pub(crate) struct TierSlot {
    pub id: TierId,
    pub rank: u32,
    pub default: TierDefault,
}

#[derive(Debug, Default)]
pub(crate) struct Tiers {
    /// Tier objects only: the federation's and the cluster's own.
    layers: [Layer; 2],
    pub all: Slab<TierIndex, TierSlot>,
    by_id: FastMap<TierId, TierIndex>,
    /// Ranks and defaults are those of older tier objects.
    dirty: bool,
}

impl Tiers {
    pub fn set(&mut self, tier: Tier) {
        self.layers[(tier.id.phase == Phase::Local) as usize].tiers.insert(tier.id.clone(), tier);
        self.dirty = true;
    }

    pub fn remove(&mut self, id: &TierId) {
        self.layers[(id.phase == Phase::Local) as usize].tiers.remove(id);
        self.dirty = true;
    }

    /// The tier that a policy names, with or without an object.
    pub fn named(&mut self, id: &TierId) -> TierIndex {
        if let Some(tier) = self.by_id.get(id) {
            return *tier;
        }
        let tier = self.all.insert(TierSlot { id: id.clone(), rank: 0, default: TierDefault::Deny });
        self.by_id.insert(id.clone(), tier);
        self.dirty = true;
        tier
    }

    /// Brings ranks and defaults up to date. Returns whether any may have changed.
    pub fn rank(&mut self) -> bool {
        if !std::mem::take(&mut self.dirty) {
            return false;
        }
        let object = |id: &TierId| self.layers[(id.phase == Phase::Local) as usize].tier(id);
        let mut order: Vec<TierIndex> = self.all.iter().map(|(tier, _)| tier).collect();
        order.sort_by_cached_key(|tier| {
            let id = &self.all[*tier].id;
            (id.phase, object(id).0)
        });
        let defaults: Vec<TierDefault> = order.iter().map(|tier| object(&self.all[*tier].id).1).collect();
        for (rank, (tier, default)) in order.into_iter().zip(defaults).enumerate() {
            let slot = &mut self.all[tier];
            (slot.rank, slot.default) = (rank as u32, default);
        }
        true
    }
}
