//! Single objects in and out of the indices, and what follows from them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hashbrown::HashSet;

use super::named::NamedObject;
use super::objects::{Before, Body, Entry, endpoint_of, read};
use super::profiles::ProfileId;
use super::{Changes, Origin};
use crate::codec::object::{EndpointObject, Object};
use crate::hub::selections::Selections;
use crate::model::{Refusal, digest_of};

/// What a change still has to bring up to date.
#[derive(Debug, Default)]
pub(super) struct Work {
    endpoints: BTreeMap<u32, Before>,
    supports: BTreeMap<u32, Before>,
    /// To be judged again.
    pub(super) profiles: BTreeSet<ProfileId>,
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
                for address in endpoint_of(&entry.bytes).map(|e| e.addresses).unwrap_or_default() {
                    self.addresses.release(address, entry.claim(slot), &mut work.rivals);
                }
                let of = self.profiles.get_mut(profile);
                of.endpoints.swap_remove(position as usize);
                // The last of the list has this position now.
                if let Some(moved) = of.endpoints.get(position as usize).copied()
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
                work.profiles.extend(self.profiles.referring(entry.id));
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
                let profile = self.profile(&endpoint, work);
                let list = &mut self.profiles.get_mut(profile).endpoints;
                list.push(slot);
                Body::Endpoint { profile, position: list.len() as u32 - 1 }
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
                work.profiles.extend(self.profiles.referring(id));
                work.changed_ids.insert(id);
            }
        }
        body
    }

    fn profile(&mut self, endpoint: &EndpointObject, work: &mut Work) -> ProfileId {
        let key = [endpoint.namespace, endpoint.service_account, endpoint.label_set];
        let (number, new) = self.profiles.of(key);
        let profile = self.profiles.get_mut(number);
        if new || profile.endpoints.is_empty() {
            work.profiles.insert(number);
        }
        let unknown: BTreeSet<Arc<str>> =
            endpoint.own.iter().map(|(key, _)| key.clone()).filter(|key| !profile.own_keys.contains(key)).collect();
        if !unknown.is_empty() {
            self.add_own_keys(number, unknown);
            work.profiles.insert(number);
        }
        number
    }

    /// Each key costs time at every judgement, so those of removed endpoints are dropped when their number may have doubled.
    fn add_own_keys(&mut self, number: ProfileId, mut keys: BTreeSet<Arc<str>>) {
        let profile = self.profiles.get(number);
        let mut most = profile.most_keys;
        if profile.own_keys.len() + keys.len() <= most {
            keys.extend(profile.own_keys.iter().cloned());
        } else {
            let endpoints = profile.endpoints.iter().filter_map(|slot| endpoint_of(&self.objects.live(*slot).bytes));
            keys.extend(endpoints.flat_map(|endpoint| endpoint.own.into_iter().map(|(key, _)| key)));
            most = most.max(2 * keys.len());
        }
        let profile = self.profiles.get_mut(number);
        (profile.own_keys, profile.most_keys) = (keys.into_iter().collect(), most);
    }

    /// Brings everything derived up to date, and returns what changed.
    pub(super) fn recompute(&mut self, mut work: Work, selections: &Selections, revision: u64) -> Changes {
        for profile in std::mem::take(&mut work.emptied) {
            if self.profiles.remove_empty(profile) {
                work.profiles.remove(&profile);
            }
        }
        self.recompute_supports(&mut work, revision);
        self.recompute_profiles(&mut work, selections);
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

    /// Namespaces, accounts and label sets. An account is used only if its namespace is.
    fn recompute_supports(&mut self, work: &mut Work, revision: u64) {
        let changed = std::mem::take(&mut work.changed_ids);
        let mut accounts = BTreeSet::new();
        if !changed.is_empty() {
            let is_affected = |(slot, namespace): &(u32, u64)| {
                changed.contains(namespace) || changed.contains(&self.objects.live(*slot).id)
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
                work.profiles.extend(self.profiles.referring(entry.id));
            }
            self.show(slot, visible, revision);
        }
    }

    fn recompute_profiles(&mut self, work: &mut Work, selections: &Selections) {
        for id in std::mem::take(&mut work.profiles) {
            self.judge(id, selections);
            let profile = self.profiles.get(id);
            for slot in &profile.endpoints {
                work.endpoints.entry(*slot).or_insert_with(|| self.objects.live(*slot).before());
            }
            work.referred.extend(profile.key);
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
