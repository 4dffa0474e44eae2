//! Selections that the hub evaluates for a cluster without having derived them for it: those of the cluster's own policies, and of
//! replaced policies that are still in force.
//!
//! A receiver names them, and they are evaluated for the labels of every origin. So they are bounded for each cluster, over all of
//! its streams.

use std::collections::BTreeSet;
use std::sync::Arc;

use hanse_policy::selector::needs;
use hashbrown::HashSet;

use crate::interest::{Interest, OWN, Wanted};

/// What a cluster registers, and as much again that it replaces.
const MAX_ANCHORED: usize = 2 * OWN.selections;
/// Selections that no label excludes, such as `!has(a)`. Each may match all labels: 256 × 50,000 label sets × 4 bytes is 50 MB.
const MAX_UNANCHORED: usize = 256;

/// The claims of one receiver.
#[derive(Debug, Default)]
pub(super) struct Claims {
    anchored: Interest,
    unanchored: Interest,
}

impl Claims {
    /// What an interest needs beyond a derived one and these claims: a part of it where it exceeds the bounds.
    pub(super) fn missing(&self, interest: &Interest, derived: &Interest) -> Self {
        let mut missing = Self::default();
        let is_new = |wanted: &&Arc<Wanted>| !self.anchored.contains(*wanted) && !self.unanchored.contains(*wanted);
        for wanted in interest.difference(derived).filter(is_new).take(MAX_ANCHORED + 1) {
            let is_anchored = needs::one_of(&wanted.selector().expr, &|list| list.len()).is_some();
            let of = if is_anchored { &mut missing.anchored } else { &mut missing.unanchored };
            of.insert(Arc::clone(wanted));
        }
        missing
    }

    pub(super) fn is_empty(&self) -> bool {
        self.anchored.is_empty() && self.unanchored.is_empty()
    }

    /// Whether these claims are within the bounds together with those of all receivers of the cluster.
    pub(super) fn fit<'a>(&'a self, others: impl Iterator<Item = &'a Self> + Clone) -> bool {
        let within = |of: fn(&Self) -> &Interest, most: usize| {
            let all = others.clone().chain([self]).map(of);
            // Streams of one cluster mostly have equal claims.
            all.clone().map(BTreeSet::len).sum::<usize>() <= most || all.flatten().collect::<HashSet<_>>().len() <= most
        };
        within(|claims| &claims.anchored, MAX_ANCHORED) && within(|claims| &claims.unanchored, MAX_UNANCHORED)
    }

    pub(super) fn extend(&mut self, new: Self) {
        self.anchored.extend(new.anchored);
        self.unanchored.extend(new.unanchored);
    }

    pub(super) fn retain(&mut self, is_used: impl Fn(&Arc<Wanted>) -> bool) {
        self.anchored.retain(&is_used);
        self.unanchored.retain(&is_used);
    }
}
