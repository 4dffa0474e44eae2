//! The hub takes over newer states of its store.

use std::collections::BTreeSet;

use hanse_policy::model::ClusterName;

use super::exchange::Exchange;
use super::interests::Unions;
use super::receiver::ReceiverId;
use crate::model::Federation;

impl Exchange {
    /// Takes over a newer state of the hub's store: policies, clusters, grants, leases. Removed clusters are withdrawn first.
    pub fn set_federation(&mut self, federation: Federation) {
        self.set_federation_part(federation);
        while self.regrant_more() {}
    }

    /// As [`Self::set_federation`], but does not judge published objects under new grants: [`Self::regrant_more`] does, and nothing
    /// of those clusters is sent until then.
    pub fn set_federation_part(&mut self, federation: Federation) {
        if self.hub.loaded
            && federation.position.epoch == self.hub.federation.position.epoch
            && federation.position.revision < self.hub.federation.position.revision
        {
            return;
        }
        let before = &self.hub.federation.clusters;
        let gone: Vec<ClusterName> = before.keys().filter(|c| !federation.clusters.contains_key(*c)).cloned().collect();
        let mut changed = Vec::new();
        let mut regranted = Vec::new();
        for (name, state) in &federation.clusters {
            let old = before.get(name);
            if old.is_some_and(|old| old.grant_token != state.grant_token) {
                regranted.push(name.clone());
            }
            if old.is_none_or(|old| !old.same(state)) {
                changed.push(name.clone());
            }
        }
        for cluster in &gone {
            self.withdraw(cluster);
        }
        let restarted = !self.hub.loaded || federation.position.epoch != self.hub.federation.position.epoch;
        self.hub.replace(federation);
        for name in regranted {
            self.regrant(&name);
        }
        let retargeted = self.derived.follow(&self.hub.federation.manifests);
        self.federation_changed(&changed, retargeted, restarted);
    }

    fn regrant(&mut self, name: &str) {
        let Some(state) = self.hub.federation.clusters.get(name).cloned() else { return };
        let Some(number) = self.origin_numbers.get(name).copied() else { return };
        let Some(origin) = self.origins[number].as_mut() else { return };
        origin.regrant(state.grant);
        self.regranting.insert(number);
        // Its changes precede the hub's own objects.
        for receiver in self.receivers.values_mut() {
            receiver.await_origin(number);
        }
    }

    /// How many origins are still to be judged under another grant.
    pub fn regrants(&self) -> usize {
        self.regranting.len()
    }

    /// Judges the next part of the objects under new grants. Returns whether there is more.
    pub fn regrant_more(&mut self) -> bool {
        let Some(number) = self.regranting.first().copied() else { return false };
        if let Some(origin) = self.origins[number].as_mut() {
            let (changes, done) = origin.regrant_step(&self.selections, self.slice);
            self.notify_classes(number, &changes);
            if !done {
                return true;
            }
        }
        self.regranting.remove(&number);
        self.ready.extend(self.receivers.keys());
        !self.regranting.is_empty()
    }

    fn withdraw(&mut self, cluster: &ClusterName) {
        if let Some(number) = self.origin_numbers.remove(cluster) {
            self.origins[number] = None;
            self.applying.remove(&number);
            self.regranting.remove(&number);
            self.classes.forget_origin(number);
            for receiver in self.receivers.values_mut() {
                receiver.forget_origin(number);
            }
        }
        self.reports.remove(cluster);
        for (id, receiver) in &mut self.receivers {
            receiver.withdraw(cluster);
            self.ready.insert(*id);
        }
    }

    /// Marks the changes of the federation for receivers. `clusters` have changed; `retargeted` are those whose policies can select
    /// other endpoints.
    fn federation_changed(&mut self, clusters: &[ClusterName], retargeted: BTreeSet<ClusterName>, restarted: bool) {
        let revision = self.hub.federation.position.revision;
        let changed: Vec<u64> = self.hub.since(revision.saturating_sub(1)).collect();
        // Their visibility or leases may have changed.
        let origins: BTreeSet<usize> =
            clusters.iter().filter_map(|name| self.origin_numbers.get(name)).copied().collect();
        let mut unions = Unions::default();
        let ids: Vec<ReceiverId> = self.receivers.keys().copied().collect();
        for id in ids {
            let Some(receiver) = self.receivers.get_mut(&id) else { continue };
            if receiver.open.is_some() {
                // It may have waited for this revision.
                self.ready.insert(id);
                continue;
            }
            if receiver.hub.sent.epoch != self.hub.federation.position.epoch {
                receiver.hub.snapshot = true;
            }
            let concerned = changed.iter().filter(|id| {
                let object = self.hub.objects.get(*id);
                object.is_none_or(|o| o.is_for(&receiver.cluster) || o.was_for(&receiver.cluster))
            });
            receiver.hub.dirty.extend(concerned);
            receiver.ahead.extend(&receiver.pending);
            receiver.pending.extend(receiver.cursors.numbers().filter(|number| origins.contains(number)));
            if restarted {
                receiver.pending.extend(receiver.cursors.numbers());
            }
            let aims = retargeted.contains(&receiver.cluster);
            // At least its position has moved.
            self.ready.insert(id);
            if aims {
                self.aim(id);
            }
            self.retarget(id, &mut unions);
        }
    }
}
