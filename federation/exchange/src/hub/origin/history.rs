//! What a receiver that resumes must know of the past.

use std::collections::VecDeque;

/// Removed ids that are remembered per origin: 4,096 × 16 bytes is 64 KiB.
pub const MAX_TOMBSTONES: usize = 4_096;

#[derive(Debug, Default)]
pub(super) struct History {
    /// Revisions, each with an id that it removed.
    removals: VecDeque<(u64, u64)>,
    /// Removals before this revision are not known.
    pub(super) floor: u64,
    /// The last revision that touched an entry.
    pub(super) last_touched: u64,
}

impl History {
    pub(super) fn push(&mut self, revision: u64, id: u64) {
        self.removals.push_back((revision, id));
    }

    /// The revision after which half of the removals that are remembered happened; 0 while there are fewer.
    pub(super) fn half(&self) -> u64 {
        let at = self.removals.len().checked_sub(MAX_TOMBSTONES / 2 + 1);
        at.and_then(|at| self.removals.get(at)).map_or(0, |(revision, _)| *revision)
    }

    /// Forgets everything before a revision.
    pub(super) fn restart(&mut self, revision: u64) {
        self.removals.clear();
        self.floor = revision;
    }

    pub(super) fn trim(&mut self) {
        while self.removals.len() > MAX_TOMBSTONES {
            self.floor = self.removals.pop_front().map_or(self.floor, |(revision, _)| self.floor.max(revision));
        }
    }

    /// Ids removed after a revision.
    pub(super) fn removed_since(&self, revision: u64) -> Vec<u64> {
        self.removals.iter().rev().take_while(|(at, _)| *at > revision).map(|(_, id)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_is_the_revision_that_half_of_the_removals_follow() {
        let mut history = History::default();
        let half = MAX_TOMBSTONES as u64 / 2;
        (1..=half).for_each(|revision| history.push(revision * 3_000, revision));
        assert_eq!(history.half(), 0, "however far the revisions are");
        history.push(half * 3_000 + 1, 1);
        assert_eq!((history.half(), history.removed_since(3_000).len() as u64), (3_000, half));
    }
}
