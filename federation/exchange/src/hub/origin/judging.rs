//! Which selections the endpoints of an origin satisfy: judged once per profile, and per endpoint only where a selection names a
//! port or one of the endpoint's own labels.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_policy::selector::build;

use super::Origin;
use super::objects::{Before, Body, Entry, endpoint_of};
use super::profiles::{ProfileId, ProfileKey};
use crate::hub::selections::{KnownLabels, Selections};
use crate::hub::slots::{Bits, Slots};
use crate::model::{Pairs, Refusal};

/// Up to this many new selections are evaluated one by one for each profile.
const FEW_SELECTIONS: usize = 8;

impl Origin {
    /// Judges new selections over these profiles. One that was judged already stays unchanged.
    pub fn select(&mut self, fresh: &[u32], selections: &Selections, profiles: std::ops::Range<u32>) {
        let counts = |number: &u32| selections.wanted(*number).clusters().contains("", &self.name);
        let mut fresh: Vec<u32> = fresh.iter().copied().filter(counts).collect();
        fresh.sort_unstable();
        if fresh.is_empty() {
            return;
        }
        for number in profiles {
            let Some((id, profile)) = self.profiles.at(number) else { continue };
            if profile.problem.is_some() || profile.endpoints.is_empty() {
                continue;
            }
            let pairs = self.effective(profile.key, &[]);
            let known = KnownLabels { pairs: &pairs, grant: &self.granted.labels };
            let (mut matches, mut per_endpoint) = (Vec::new(), Vec::new());
            let mut judge = |number: u32| {
                if selections.needs_endpoints(number, &profile.own_keys) {
                    per_endpoint.push(number);
                } else if selections.may_match(number, &known) {
                    matches.push(number);
                }
            };
            // Of many, only those that the labels may satisfy are evaluated.
            if fresh.len() <= FEW_SELECTIONS {
                fresh.iter().copied().for_each(&mut judge);
            } else {
                let candidates = selections.candidates(&self.name, &known, &profile.own_keys).into_iter();
                candidates.filter(|number| fresh.binary_search(number).is_ok()).for_each(&mut judge);
            }
            let profile = self.profiles.get_mut(id);
            matches.into_iter().for_each(|number| add(&mut profile.matches, number));
            per_endpoint.into_iter().for_each(|number| add(&mut profile.per_endpoint, number));
        }
    }

    /// Removes selections whose numbers are reused. All at once, because each profile is visited.
    pub fn unselect(&mut self, numbers: &Bits) {
        for profile in self.profiles.iter_mut() {
            drop_from(&mut profile.matches, numbers);
            drop_from(&mut profile.per_endpoint, numbers);
        }
    }

    /// For each selection, which of these endpoints it may select.
    pub fn candidates(&self, endpoints: &BTreeMap<u32, Before>) -> BTreeMap<u32, Vec<u32>> {
        let mut candidates: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for slot in endpoints.keys() {
            if let Some(Entry { body: Body::Endpoint { profile, .. }, visible: true, .. }) = self.entry(*slot) {
                let profile = self.profiles.get(*profile);
                for selection in profile.matches.iter().chain(&profile.per_endpoint) {
                    candidates.entry(*selection).or_default().push(*slot);
                }
            }
        }
        candidates
    }

    /// Whether an endpoint is used and one of the selections may match it.
    pub fn endpoint_selected(&self, slot: u32, interest: &Bits, selections: &Selections) -> bool {
        let Some(Entry { body: Body::Endpoint { profile, .. }, visible: true, bytes, .. }) = self.entry(slot) else {
            return false;
        };
        let profile = self.profiles.get(*profile);
        if profile.matches.iter().any(|number| interest.contains(*number)) {
            return true;
        }
        let per_endpoint: Vec<u32> =
            profile.per_endpoint.iter().copied().filter(|number| interest.contains(*number)).collect();
        if per_endpoint.is_empty() {
            return false;
        }
        let Some(endpoint) = endpoint_of(bytes) else { return false };
        let pairs = self.effective(profile.key, &endpoint.own);
        let known = KnownLabels { pairs: &pairs, grant: &self.granted.labels };
        per_endpoint.into_iter().any(|number| {
            let names = selections.wanted(number).port_names();
            (names.is_empty() || endpoint.ports.iter().any(|port| names.contains(&port.name)))
                && selections.may_match(number, &known)
        })
    }

    /// Whether a support is used and one of these endpoints refers to it.
    pub fn support_selected(&self, slot: u32, endpoints: &Slots) -> bool {
        let is_support = |entry: &&Entry| matches!(entry.body, Body::Named | Body::LabelSet);
        let Some(entry) = self.entry(slot).filter(|entry| entry.visible).filter(is_support) else { return false };
        let profiles = self.profiles.referring(entry.id);
        profiles.flat_map(|number| &self.profiles.get(number).endpoints).any(|slot| endpoints.contains(*slot))
    }

    /// Judges a profile: whether the objects that it refers to are accepted, and which selections match it.
    pub(super) fn judge(&mut self, id: ProfileId, selections: &Selections) {
        let profile = self.profiles.get(id);
        let [namespace, account, label_set] = profile.key;
        let problem = if self.namespace(namespace).is_none() {
            match self.slot_of(namespace).and_then(|slot| self.refused.get(&slot)) {
                Some(why @ Refusal::NamespaceNotGranted(_)) => Some(why.clone()),
                _ => Some(Refusal::ReferenceMissing(namespace)),
            }
        } else if account != 0 && self.account(account, namespace).is_none() {
            Some(Refusal::ReferenceMissing(account))
        } else if label_set != 0 && !self.is_label_set(label_set) {
            Some(Refusal::ReferenceMissing(label_set))
        } else {
            None
        };
        let (mut matches, mut per_endpoint) = (Vec::new(), Vec::new());
        if problem.is_none() && !profile.endpoints.is_empty() {
            let pairs = self.effective(profile.key, &[]);
            let known = KnownLabels { pairs: &pairs, grant: &self.granted.labels };
            for candidate in selections.candidates(&self.name, &known, &profile.own_keys) {
                if selections.needs_endpoints(candidate, &profile.own_keys) {
                    per_endpoint.push(candidate);
                } else if selections.may_match(candidate, &known) {
                    matches.push(candidate);
                }
            }
        }
        let profile = self.profiles.get_mut(id);
        (profile.problem, profile.matches, profile.per_endpoint) =
            (problem.map(Box::new), matches.into(), per_endpoint.into());
    }

    /// The effective labels of a profile's endpoint with these labels of its own, sorted by key.
    fn effective(&self, key: ProfileKey, own: &[(Arc<str>, Arc<str>)]) -> Vec<(Arc<str>, Arc<str>)> {
        let [namespace, account, label_set] = key;
        let effective = |key: &Arc<str>| match build::own_key(key) {
            Cow::Borrowed(_) => key.clone(),
            Cow::Owned(key) => key.into(),
        };
        let mut pairs: Vec<(Arc<str>, Arc<str>)> = own.iter().map(|(k, v)| (effective(k), v.clone())).collect();
        for (k, v) in self.label_set(label_set).into_iter().flatten() {
            if !own.iter().any(|(have, _)| *have == k) {
                pairs.push((effective(&k), v));
            }
        }
        if let Some((name, labels)) = self.namespace(namespace) {
            pairs.push((build::NAMESPACE.into(), name.clone()));
            prefixed(build::NAMESPACE_PREFIX, Some(build::OWN_NAME), name, labels, &mut pairs);
        }
        if let Some((name, labels)) = self.account(account, namespace) {
            pairs.push((build::SERVICE_ACCOUNT.into(), name.clone()));
            prefixed(build::SERVICE_ACCOUNT_PREFIX, None, name, labels, &mut pairs);
        }
        pairs.push((build::ORCHESTRATOR.into(), build::KUBERNETES.into()));
        pairs.sort_unstable();
        pairs
    }
}

fn add(list: &mut Box<[u32]>, number: u32) {
    if !list.contains(&number) {
        *list = list.iter().copied().chain([number]).collect();
    }
}

fn drop_from(list: &mut Box<[u32]>, numbers: &Bits) {
    if list.iter().any(|number| numbers.contains(*number)) {
        *list = list.iter().copied().filter(|it| !numbers.contains(*it)).collect();
    }
}

/// `own_name`: the key under which a label with the key of the name is visible.
fn prefixed(
    prefix: &str,
    own_name: Option<&str>,
    name: &Arc<str>,
    labels: &Pairs,
    into: &mut Vec<(Arc<str>, Arc<str>)>,
) {
    into.push((format!("{prefix}{}", build::NAME).into(), name.clone()));
    for (key, value) in labels.iter() {
        let key = if &**key == build::NAME { own_name } else { Some(&**key) };
        into.extend(key.map(|key| (format!("{prefix}{key}").into(), value.clone())));
    }
}
