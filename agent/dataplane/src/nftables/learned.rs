//! Addresses that the node itself learned: members of sets, each with its own end.
//!
//! In the kernel they are elements with a timeout, in the same sets as the compiled members. So they end also when no agent runs.
//! An address that is a compiled member too has one element, without a timeout. Neither the digest of a rule set nor its drift check
//! counts them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_ruleset::{RuleSet, SetId, SetKind};

use crate::LearnedAddress;

/// Learned members of one set: the addresses of a name change often, and a few hundred are in use at a time.
const MAX_OF_SET: usize = 4_096;
/// Learned members of a node: with about 100 bytes each here and 150 in the kernel, 16 MiB.
const MAX_OF_NODE: usize = 65_536;
/// The shortest and the longest time to live. What is shorter or longer is set to it.
const TIME_TO_LIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(24 * 3_600));

/// The learned members of each set, with their ends. Clones share the sets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LearnedMembers {
    sets: BTreeMap<SetId, Arc<BTreeMap<IpAddr, Instant>>>,
}

impl LearnedMembers {
    pub fn of(&self, set: SetId) -> Option<&BTreeMap<IpAddr, Instant>> {
        self.sets.get(&set).map(|members| &**members)
    }

    fn len(&self) -> usize {
        self.sets.values().map(|members| members.len()).sum()
    }

    /// Adds members, or extends them. Returns how many did not fit.
    pub fn add(&mut self, set: SetId, members: &[LearnedAddress], now: Instant) -> usize {
        let mut room = MAX_OF_NODE.saturating_sub(self.len());
        let mut left_out = 0;
        let of_set = Arc::make_mut(self.sets.entry(set).or_default());
        for LearnedAddress { address, time_to_live } in members {
            let end = now + (*time_to_live).clamp(TIME_TO_LIVE.0, TIME_TO_LIVE.1);
            if let Some(known) = of_set.get_mut(address) {
                *known = end.max(*known);
            } else if room > 0 && of_set.len() < MAX_OF_SET {
                room -= 1;
                of_set.insert(*address, end);
            } else {
                left_out += 1;
            }
        }
        left_out
    }

    /// Whether the end of any member has come.
    pub fn has_ended(&self, now: Instant) -> bool {
        self.sets.values().any(|members| members.values().any(|end| *end <= now))
    }

    /// Forgets members that have ended, and those of sets that `rules` does not have.
    pub fn retain(&mut self, rules: &RuleSet, now: Instant) {
        self.sets.retain(|id, members| {
            if members.values().any(|end| *end <= now) {
                Arc::make_mut(members).retain(|_, end| *end > now);
            }
            !members.is_empty() && rules.sets.get(id).is_some_and(|set| set.kind() == SetKind::Addresses)
        });
    }

    /// Whether a set has the same members in both, with the same ends.
    pub fn same(&self, other: &Self, set: SetId) -> bool {
        match (self.sets.get(&set), other.sets.get(&set)) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other) || one == other,
            (one, other) => one.is_none() && other.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hanse_ruleset::{Members, Set};

    use super::*;

    fn learned(address: u32, seconds: u64) -> LearnedAddress {
        LearnedAddress { address: Ipv4Addr::from(address).into(), time_to_live: Duration::from_secs(seconds) }
    }

    #[test]
    fn members_are_bounded_extended_and_forgotten() {
        let (now, id) = (Instant::now(), |set: u32| SetId::of_meaning(&[&set.to_string()]));
        let mut members = LearnedMembers::default();
        assert_eq!(members.add(id(0), &[learned(1, 0), learned(2, u64::MAX), learned(1, 9), learned(1, 5)], now), 0);
        let ends: Vec<u64> = members.of(id(0)).expect("it is there").values().map(|it| (*it - now).as_secs()).collect();
        assert_eq!(ends, [9, 24 * 3_600], "the last end counts, within bounds");
        let many: Vec<LearnedAddress> = (0..5_000).map(|it| learned(it, 60)).collect();
        assert_eq!(members.add(id(0), &many, now), 5_000 - MAX_OF_SET);
        for set in 1..16 {
            assert_eq!(members.add(id(set), &many, now), 5_000 - MAX_OF_SET);
        }
        assert_eq!(members.add(id(16), &many[..3], now), 3, "the node has no more room");
        // A set that is there, one of another kind, and those that are gone.
        let set = |id, members| (id, Arc::new(Set { id, members }));
        let (addresses, nets) = (Members::Addresses(Default::default()), Members::Nets(Default::default()));
        let rules = RuleSet { sets: [set(id(0), addresses), set(id(1), nets)].into(), ..RuleSet::default() };
        let before = members.clone();
        members.retain(&rules, now + Duration::from_secs(60));
        assert!(before.has_ended(now + Duration::from_secs(60)) && !members.has_ended(now + Duration::from_secs(60)));
        assert_eq!(members.of(id(0)).map(BTreeMap::len), Some(1), "the one of a day");
        assert_eq!(members.len(), 1);
        assert!(!members.same(&before, id(0)) && members.same(&before.clone(), id(99)));
    }
}
