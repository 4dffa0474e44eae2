//! The ids of the compiler's slabs.

use hanse_policy::slab_id;

slab_id! {
    /// A policy.
    pub(crate) struct PolicyIndex;
    /// A tier that some policy names. Tiers keep their ids.
    pub(crate) struct TierIndex;
    /// One direction of a policy, compiled.
    pub(crate) struct UnitIndex;
    /// A chain of policies.
    pub(crate) struct ChainIndex;
    /// The sets, policies and chains that nodes have in common.
    pub(crate) struct ProfileIndex;
    /// The endpoints of a selector or of a port name.
    pub(crate) struct PoolId;
    /// A set that some compiled policy names.
    pub(crate) struct SetIndex;
}

/// The profile that needs nothing, which every node starts with.
pub(crate) const EMPTY_PROFILE: ProfileIndex = ProfileIndex::at(0);
