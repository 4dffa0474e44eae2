//! The profiles to judge again after a change, with their endpoints: the change of one namespace may concern all endpoints of a
//! cluster, so they are judged in parts.

use std::collections::BTreeSet;

use super::profiles::ProfileId;

#[derive(Debug, Default)]
pub struct Queue {
    pub profiles: BTreeSet<ProfileId>,
    /// One that was judged, and how many of its endpoints follow.
    pub current: Option<(ProfileId, usize)>,
}

impl Queue {
    /// Adds profiles, and returns what that costs, in evaluations.
    pub fn add(&mut self, profiles: impl Iterator<Item = ProfileId>) -> usize {
        let mut count = 0_usize;
        self.profiles.extend(profiles.inspect(|_| count += 1));
        count / 2
    }

    pub fn is_empty(&self) -> bool {
        self.profiles.is_empty() && self.current.is_none()
    }

    pub fn contains(&self, id: ProfileId) -> bool {
        self.profiles.contains(&id)
    }

    pub fn remove(&mut self, id: ProfileId) {
        self.profiles.remove(&id);
        self.current = self.current.filter(|(current, _)| *current != id);
    }
}
