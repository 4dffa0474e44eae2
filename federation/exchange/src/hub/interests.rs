//! The interest of a receiver: it grows when the receiver lacks something, and shrinks when nothing in force needs the rest.

use std::collections::BTreeSet;
use std::sync::Arc;

use hanse_policy::model::ClusterName;
use hashbrown::HashMap;

use super::exchange::Exchange;
use super::receiver::{ReceiverId, Switching, Wants};
use super::views::ClassId;
use crate::interest::{self, Interest};
use crate::message::{InterestChange, WatchResponse as Response};
use crate::model::Wanted;

impl Exchange {
    /// Updates the interest that a receiver needs.
    pub(super) fn aim(&mut self, id: ReceiverId) {
        let Some(receiver) = self.receivers.get(&id) else { return };
        let derived = self.derived.of(&receiver.cluster);
        let target = match receiver.own.is_subset(&derived) {
            true => derived,
            false => self.admit(id, Arc::new(derived.union(&receiver.own).cloned().collect())),
        };
        if let Some(receiver) = self.receivers.get_mut(&id) {
            receiver.target = target;
            receiver.is_covered = false;
        }
    }

    /// Returns an interest of a receiver if its cluster may have all of it evaluated, and everything otherwise.
    pub(super) fn admit(&mut self, id: ReceiverId, interest: Arc<Interest>) -> Arc<Interest> {
        let Some(receiver) = self.receivers.get(&id) else { return interest };
        let derived = self.derived.of(&receiver.cluster);
        if Arc::ptr_eq(&derived, &interest) || is_everything(&interest) {
            return interest;
        }
        let missing = receiver.claims.missing(&interest, &derived);
        let of_cluster = self.receivers.values().filter(|other| other.cluster == receiver.cluster);
        if !missing.is_empty() && !missing.fit(of_cluster.map(|other| &other.claims)) {
            tracing::warn!(
                cluster = %receiver.cluster, selections = interest.len(),
                "cluster names too many selections that the hub did not derive: every endpoint is sent"
            );
            return everything();
        }
        if let Some(receiver) = self.receivers.get_mut(&id) {
            receiver.claims.extend(missing);
        }
        interest
    }

    /// Drops claims of a receiver that no interest of it needs.
    pub(super) fn drop_claims(&mut self, id: ReceiverId) {
        let Some(receiver) = self.receivers.get_mut(&id) else { return };
        if !receiver.claims.is_empty() && receiver.switching.is_none() && receiver.opening_class.is_none() {
            let (interest, target) = (&receiver.interest, &receiver.target);
            receiver.claims.retain(|wanted| interest.contains(wanted) || target.contains(wanted));
        }
    }

    /// Whether a receiver keeps selections that are not needed since it has not acknowledged what replaced them.
    pub fn keeps_replaced(&self, id: ReceiverId) -> bool {
        self.receivers.get(&id).is_some_and(|receiver| {
            receiver.open.is_none()
                && receiver.switching.is_none()
                && !Arc::ptr_eq(&receiver.interest, &receiver.target)
                && !is_everything(&receiver.interest)
        })
    }

    /// Sends a receiver everything instead of its interest, until it acknowledges: that costs nothing to evaluate.
    pub fn widen(&mut self, id: ReceiverId) {
        if self.keeps_replaced(id) {
            self.switch(id, everything());
            self.ready.insert(id);
        }
    }

    /// Widens a receiver's interest when it lacks something, and narrows it when nothing in force needs the rest.
    pub(super) fn retarget(&mut self, id: ReceiverId, unions: &mut Unions) {
        let Some(receiver) = self.receivers.get_mut(&id).filter(|receiver| receiver.open.is_none()) else { return };
        if receiver.switching.is_some() {
            // Repeated when it has switched.
            return;
        }
        let (target, interest) = (Arc::clone(&receiver.target), Arc::clone(&receiver.interest));
        if Arc::ptr_eq(&target, &interest) {
            return;
        }
        if !receiver.is_covered {
            if !covers(&interest, &target) {
                let wider = self.admit(id, unions.of(&interest, &target));
                self.switch(id, wider);
                return;
            }
            receiver.is_covered = true;
            if target == interest {
                receiver.interest = target;
                return;
            }
        }
        if receiver.rests() {
            self.switch(id, target);
        }
    }

    /// Gives a receiver its next interest, at once where its class is built, or else by [`Self::finish_switch`].
    pub(super) fn switch(&mut self, id: ReceiverId, interest: Arc<Interest>) {
        let present = self.receivers.get(&id).filter(|receiver| Arc::ptr_eq(&receiver.interest, &interest));
        let class = match present.map(|receiver| receiver.class) {
            Some(class) => {
                self.classes.add_user(class);
                class
            }
            None => self.acquire_class(&interest),
        };
        if self.classes.is_built(class) {
            self.switch_to(id, class, interest);
        } else if let Some(receiver) = self.receivers.get_mut(&id) {
            receiver.switching = Some(Switching { class, interest });
        }
    }

    /// Goes on with the class that a receiver waits for; whether it has switched.
    pub(super) fn finish_switch(&mut self, id: ReceiverId) -> bool {
        let class = |it: &Self| Some(it.receivers.get(&id)?.switching.as_ref()?.class);
        let Some(before) = class(self) else { return false };
        self.build_class(before);
        let Some(now) = class(self).filter(|class| self.classes.is_built(*class)) else { return false };
        let switching = self.receivers.get_mut(&id).and_then(|receiver| receiver.switching.take());
        if let Some(Switching { interest, .. }) = switching {
            self.switch_to(id, now, interest);
            self.retarget(id, &mut Unions::default());
        }
        true
    }

    pub(super) fn switch_to(&mut self, id: ReceiverId, new: ClassId, interest: Arc<Interest>) {
        let Some(receiver) = self.receivers.get(&id) else { return };
        let (cluster, old) = (receiver.cluster.clone(), receiver.class);
        let mut changed: Vec<(usize, Vec<u64>)> = Vec::new();
        for (number, cursor) in receiver.cursors.iter() {
            let Some(origin) = self.origins[number].as_ref() else { continue };
            if matches!(cursor.wants, Wants::Changes) {
                changed.push((number, self.classes.differences(number, origin, old, new)));
            }
        }
        let due: BTreeSet<ClusterName> = self
            .hub
            .federation
            .clusters
            .iter()
            .filter(|(name, state)| {
                self.sees(&cluster, name) && state.waits_for(self.origin(name).is_some_and(|origin| origin.synced))
            })
            .map(|(name, _)| name.clone())
            .collect();
        let numbers: Vec<usize> = due.iter().filter_map(|name| self.origin_number(name)).collect();
        if let Some(receiver) = self.receivers.get_mut(&id) {
            receiver.number += 1;
            let whole = std::mem::take(&mut receiver.interest_widened);
            let before = if whole { Arc::default() } else { Arc::clone(&receiver.interest) };
            let notice = InterestChange {
                number: receiver.number,
                added: interest.difference(&before).map(|wanted| (&**wanted).into()).collect(),
                removed: before.difference(&interest).map(|wanted| (&**wanted).into()).collect(),
                origins: due.iter().cloned().collect(),
                whole,
            };
            receiver.notices.push_back(Response::Interest(notice));
            receiver.interest = interest;
            receiver.is_covered = false;
            receiver.class = new;
            receiver.due = due;
            receiver.pending.extend(numbers);
            for (number, ids) in changed {
                receiver.mark(number, &ids);
            }
        }
        self.release_class(old);
        self.drop_claims(id);
    }
}

/// Whether an interest selects everything that another one selects.
fn covers(interest: &Interest, other: &Interest) -> bool {
    other.is_subset(interest) || is_everything(interest)
}

fn everything() -> Arc<Interest> {
    Arc::new(Interest::from([Arc::new(Wanted::everything())]))
}

fn is_everything(interest: &Interest) -> bool {
    interest.len() == 1 && interest.iter().all(|it| **it == Wanted::everything())
}

/// Unions of interests, each made once: many receivers go from one to the same other.
#[derive(Debug, Default)]
pub(super) struct Unions(HashMap<(usize, usize), Union>);

#[derive(Debug)]
struct Union {
    /// Keep the addresses from being reused.
    _of: [Arc<Interest>; 2],
    both: Arc<Interest>,
}

impl Unions {
    pub(super) fn of(&mut self, a: &Arc<Interest>, b: &Arc<Interest>) -> Arc<Interest> {
        let key = (Arc::as_ptr(a) as usize, Arc::as_ptr(b) as usize);
        let made = self.0.entry(key).or_insert_with(|| {
            let both = match (a.is_subset(b), b.is_subset(a)) {
                _ if is_everything(a) => Arc::clone(a),
                (true, _) => Arc::clone(b),
                _ if is_everything(b) => Arc::clone(b),
                (_, true) => Arc::clone(a),
                _ => Arc::new(interest::bounded(a.union(b).cloned().collect(), interest::WHOLE)),
            };
            Union { _of: [Arc::clone(a), Arc::clone(b)], both }
        });
        Arc::clone(&made.both)
    }
}
