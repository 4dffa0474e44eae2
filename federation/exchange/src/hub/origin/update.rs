//! Single objects in and out of the indices, and what follows from them.

use std::collections::{BTreeMap, BTreeSet};

use hashbrown::HashSet;

use super::named::NamedObject;
use super::objects::{Before, Body, Entry, endpoint_of, read};
use super::profiles::ProfileId;
use super::{Changes, Origin};
use crate::codec::object::{EndpointObject, Object};
use crate::hub::selections::{EVALUATIONS_PER_UPDATE, Selections};
use crate::model::{Refusal, digest_of};

/// What a change still has to bring up to date.
#[derive(Debug, Default)]
pub(super) struct Work {
    endpoints: BTreeMap<u32, Before>,
    supports: BTreeMap<u32, Before>,
    /// Of the endpoint that was attached last, and whether it is to be judged.
    attached: Option<(ProfileId, bool)>,
    /// Profiles of attached endpoints, whose selections are counted once.
    counted: HashSet<ProfileId>,
    /// Counted in evaluations, beside the updates themselves.
    cost: usize,
    /// From which an endpoint was removed, and which may have none.
    emptied: BTreeSet<ProfileId>,
    /// Ids of objects that changed endpoints refer to.
    referred: BTreeSet<u64>,
    /// Of supports.
    changed_ids: HashSet<u64>,
    /// Slots that own an address more, or less.
    rivals: BTreeSet<u32>,
}

impl Origin {
    pub(super) fn remove(&mut self, id: u64, work: &mut Work) {
        let Some((slot, entry)) = self.objects.remove(id) else { return };
        self.kept.digest = self.kept.digest.wrapping_sub(entry.digest());
        self.kept.objects -= 1;
        self.detach(slot, &entry, work);
    }

    /// Takes an entry out of every index.
    fn detach(&mut self, slot: u32, entry: &Entry, work: &mut Work) {
        let before = entry.before();
        self.kept.bytes -= entry.bytes.len();
        self.unused.remove(&slot);
        match entry.body {
            Body::Endpoint { profile, position } => {
                self.kept.endpoints -= 1;
                work.endpoints.entry(slot).or_insert(before);
                let endpoint = endpoint_of(&entry.bytes);
                for address in endpoint.iter().flat_map(|endpoint| &endpoint.addresses) {
                    self.addresses.release(*address, entry.claim(slot), &mut work.rivals);
                }
                let of = self.profiles.get_mut(profile);
                let own = endpoint.map(|endpoint| endpoint.own).unwrap_or_default();
                // The last of the list has this position now.
                if let Some(moved) = of.remove(position, &own)
                    && let Body::Endpoint { position: of_moved, .. } = &mut self.objects.get_mut(moved).body
                {
                    *of_moved = position;
                }
                work.referred.extend(of.key);
                if of.endpoints.is_empty() {
                    work.emptied.insert(profile);
                }
            }
            Body::Named | Body::LabelSet => {
                match entry.body {
                    Body::LabelSet => self.kept.label_sets -= 1,
                    _ => self.named.remove(slot),
                }
                work.supports.entry(slot).or_insert(before);
                work.cost += self.queue.add(self.profiles.referring(entry.id));
                work.changed_ids.insert(entry.id);
            }
            Body::Refused => {
                self.refused.remove(&slot);
                work.supports.entry(slot).or_insert(before);
            }
        }
    }

    pub(super) fn put(&mut self, id: u64, bytes: &[u8], revision: u64, work: &mut Work) {
        let slot = self.slot_of(id);
        if slot.is_some_and(|slot| *self.objects.live(slot).bytes == *bytes) {
            return;
        }
        let export = read(bytes);
        self.remove(id, work);
        if let Some(limit) = self.kept.exceeded(&*self.granted.grant, &export, bytes.len()) {
            self.overflow.refuse(id, limit);
            return;
        }
        self.overflow.refused.remove(&id);
        let slot = self.objects.reserve(slot);
        self.kept.digest = self.kept.digest.wrapping_add(digest_of(bytes));
        self.kept.objects += 1;
        self.kept.bytes += bytes.len();
        let body = self.attach(slot, id, export, work);
        self.objects.insert(slot, Entry { id, bytes: bytes.into(), touched: revision, body, visible: false });
    }

    /// Judges an object again. Without another result nothing is touched: a namespace would touch all of its endpoints.
    pub(super) fn put_again(&mut self, slot: u32, work: &mut Work) {
        let Some(entry) = self.entry(slot) else { return };
        let judged = read(&entry.bytes).and_then(|export| self.granted.permit(export)).err();
        if judged.as_ref() == self.refused.get(&slot) {
            return;
        }
        let Some(mut entry) = self.objects.take(slot) else { return };
        self.detach(slot, &entry, work);
        self.kept.bytes += entry.bytes.len();
        entry.body = self.attach(slot, entry.id, read(&entry.bytes), work);
        self.objects.put_back(slot, entry);
    }

    /// Enters an object into the indices, if the grant permits it.
    fn attach(&mut self, slot: u32, id: u64, export: Result<Object, Refusal>, work: &mut Work) -> Body {
        let export = export.and_then(|export| self.granted.permit(export));
        let body = match export {
            Err(refusal) => {
                self.refused.insert(slot, refusal);
                Body::Refused
            }
            // Decoding has refused them.
            Ok(Object::Manifest { .. } | Object::Cluster { .. }) => Body::Refused,
            Ok(Object::Namespace { name, labels }) => {
                self.named.insert(slot, NamedObject::Namespace { name, labels });
                Body::Named
            }
            Ok(Object::ServiceAccount { namespace, name, labels }) => {
                self.named.insert(slot, NamedObject::Account { namespace, name, labels });
                Body::Named
            }
            Ok(Object::LabelSet { .. }) => {
                self.kept.label_sets += 1;
                Body::LabelSet
            }
            Ok(Object::Endpoint(endpoint)) => {
                self.kept.endpoints += 1;
                let profile = self.profiles.of([endpoint.namespace, endpoint.service_account, endpoint.label_set]);
                let (position, is_judged) = self.profiles.get_mut(profile).add(slot, &endpoint.own);
                work.attached = Some((profile, is_judged));
                Body::Endpoint { profile, position }
            }
        };
        match body {
            Body::Endpoint { profile, .. } => {
                work.referred.extend(self.profiles.get(profile).key);
                let before = work.supports.get(&slot).copied().unwrap_or(Before { id, digest: 0 });
                work.endpoints.entry(slot).or_insert(before);
            }
            Body::Named | Body::LabelSet | Body::Refused => {
                work.supports.entry(slot).or_insert(Before { id, digest: 0 });
                work.cost += self.queue.add(self.profiles.referring(id));
                work.changed_ids.insert(id);
            }
        }
        body
    }

    /// Judges the profile of the endpoint that was attached last, if it has changed. The selections of its other endpoints stay: one
    /// that names a new key is evaluated for each of them, to the same result. Returns the cost of the change, in updates.
    pub(super) fn judge_attached(&mut self, work: &mut Work, selections: &Selections) -> usize {
        let began = selections.evaluated();
        if let Some((id, is_judged)) = work.attached.take() {
            // One that is queued is judged later, and all of its endpoints follow.
            if is_judged && !self.queue.contains(id) {
                self.judge(id, selections);
            }
            let (once, each) = self.endpoint_cost(id, selections);
            work.cost += each + if work.counted.insert(id) { once } else { 0 };
        }
        self.take_cost(work, selections, began)
    }

    /// The cost of what was done since a reading of the evaluations, in updates.
    pub(super) fn take_cost(&self, work: &mut Work, selections: &Selections, began: usize) -> usize {
        (std::mem::take(&mut work.cost) + selections.evaluated_since(began)) / EVALUATIONS_PER_UPDATE
    }

    /// What it costs to find the classes that a profile's endpoints belong to, in evaluations: once, and for each endpoint.
    fn endpoint_cost(&self, id: ProfileId, selections: &Selections) -> (usize, usize) {
        let profile = self.profiles.get(id);
        match profile.own_keys.is_many() {
            true => (0, selections.lookups(&self.granted.labels)),
            false => (profile.matches.len() + profile.per_endpoint.len(), profile.per_endpoint.len()),
        }
    }

    /// Judges queued profiles and brings their endpoints up to date, for about as long as `left` updates take. Returns what is left.
    pub(super) fn judge_queued(&mut self, work: &mut Work, selections: &Selections, mut left: usize) -> usize {
        while left > 0 {
            let (id, rest) = match self.queue.current.take() {
                Some(current) => current,
                None => {
                    let Some(id) = self.queue.profiles.pop_first() else { break };
                    let began = selections.evaluated();
                    self.judge(id, selections);
                    work.cost += self.endpoint_cost(id, selections).0;
                    left = left.saturating_sub(1 + self.take_cost(work, selections, began));
                    (id, self.profiles.get(id).endpoints.len())
                }
            };
            let each = self.endpoint_cost(id, selections).1 + EVALUATIONS_PER_UPDATE;
            let most = left.saturating_mul(EVALUATIONS_PER_UPDATE) / each;
            let profile = self.profiles.get(id);
            // From the end: the last endpoint takes the position of one that is removed meanwhile.
            let rest = rest.min(profile.endpoints.len());
            let next = rest.saturating_sub(most.max(1));
            for slot in &profile.endpoints[next..rest] {
                work.endpoints.entry(*slot).or_insert_with(|| self.objects.live(*slot).before());
            }
            work.referred.extend(profile.key);
            left = left.saturating_sub(((rest - next) * each).div_ceil(EVALUATIONS_PER_UPDATE));
            self.queue.current = (next > 0).then_some((id, next));
        }
        left
    }

    /// Brings everything derived up to date, and returns what changed.
    pub(super) fn recompute(&mut self, mut work: Work, revision: u64) -> Changes {
        for profile in std::mem::take(&mut work.emptied) {
            if self.profiles.remove_empty(profile) {
                self.queue.remove(profile);
            }
        }
        self.recompute_supports(&mut work, revision);
        self.recompute_owners(&mut work);
        for slot in work.endpoints.keys() {
            let Some(Entry { body: Body::Endpoint { profile, .. }, bytes, .. }) = self.objects.get(*slot) else {
                continue;
            };
            let owns_all = |e: EndpointObject| e.addresses.iter().all(|a| self.addresses.owner(*a) == Some(*slot));
            let visible = self.profiles.get(*profile).problem.is_none() && endpoint_of(bytes).is_some_and(owns_all);
            self.show(*slot, visible, revision);
        }
        for id in work.referred {
            if let Some(slot) = self.slot_of(id) {
                let entry = self.objects.get_mut(slot);
                entry.touched = revision;
                work.supports.entry(slot).or_insert_with(|| entry.before());
            }
        }
        // A slot may have had an object of the other sort, and in another epoch an id may be an endpoint's.
        work.supports.retain(|slot, _| !self.is_endpoint(*slot));
        self.history.last_touched = revision;
        Changes { endpoints: work.endpoints, supports: work.supports }
    }

    /// Namespaces, accounts and label sets. An account is used only if its namespace is. Profiles that refer to both are queued by the
    /// namespace.
    fn recompute_supports(&mut self, work: &mut Work, revision: u64) {
        let changed = std::mem::take(&mut work.changed_ids);
        let mut accounts = BTreeSet::new();
        if !changed.is_empty() {
            let is_affected = |(slot, namespace): &(u32, u64)| {
                changed.contains(namespace) && self.objects.live(*slot).visible != self.namespace(*namespace).is_some()
            };
            accounts.extend(self.named.accounts().filter(is_affected).map(|(slot, _)| slot));
        }
        let supports: Vec<u32> = work.supports.keys().copied().collect();
        for slot in supports.into_iter().chain(accounts.iter().copied()) {
            let Some(entry) = self.objects.get(slot) else { continue };
            let visible = match entry.body {
                Body::Named => self.named.namespace_of(slot).is_none_or(|id| self.namespace(id).is_some()),
                Body::LabelSet => true,
                Body::Endpoint { .. } | Body::Refused => false,
            };
            if accounts.contains(&slot) {
                work.supports.entry(slot).or_insert_with(|| entry.before());
            }
            self.show(slot, visible, revision);
        }
    }

    /// The owners of addresses: the newest of the endpoints that are otherwise accepted.
    fn recompute_owners(&mut self, work: &mut Work) {
        let mut rivals = std::mem::take(&mut work.rivals);
        for slot in work.endpoints.keys() {
            let Some(entry) = self.objects.get(*slot) else { continue };
            let Body::Endpoint { profile, .. } = entry.body else { continue };
            let accepted = self.profiles.get(profile).problem.is_none();
            let addresses = endpoint_of(&entry.bytes).map(|e| e.addresses).unwrap_or_default();
            let claim = entry.claim(*slot);
            for address in addresses {
                match accepted {
                    true => {
                        let claim_of = |slot: u32| self.objects.live(slot).claim(slot);
                        self.addresses.claim(address, claim, claim_of, &mut rivals);
                    }
                    false => self.addresses.release(address, claim, &mut rivals),
                }
            }
        }
        for slot in rivals {
            if let Some(entry) = self.objects.get(slot) {
                work.endpoints.entry(slot).or_insert_with(|| entry.before());
                if let Body::Endpoint { profile, .. } = entry.body {
                    work.referred.extend(self.profiles.get(profile).key);
                }
            }
        }
    }

    /// Sets whether an entry is used, as of a revision.
    fn show(&mut self, slot: u32, visible: bool, revision: u64) {
        let entry = self.objects.get_mut(slot);
        entry.visible = visible;
        entry.touched = revision;
        match visible {
            true => self.unused.remove(&slot),
            false => self.unused.insert(slot),
        };
    }
}
