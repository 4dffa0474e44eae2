//! Which selections the endpoints of an origin satisfy: judged once per profile, and per endpoint only where a selection names a
//! port or one of the endpoint's own labels.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_policy::selector::build;
use hashbrown::HashMap;

use super::Origin;
use super::objects::{Before, Body, Entry, endpoint_of};
use super::profiles::{Profile, ProfileId, ProfileKey};
use crate::hub::selections::{EVALUATIONS_PER_UPDATE, KnownLabels, Selections};
use crate::hub::slots::{Bits, Slots};
use crate::model::{Pairs, Refusal};

/// Up to this many new selections are evaluated one by one for each profile.
const FEW_SELECTIONS: usize = 8;
/// Numbers that are compared with an interest in the time of an evaluation.
const MATCHES_PER_EVALUATION: usize = 128;

/// How far new selections were judged: the next profile, and the next selection over it.
#[derive(Debug, Clone, Copy, Default)]
pub struct JudgingCursor {
    profile: u32,
    selection: u32,
}

impl JudgingCursor {
    pub fn profile(self) -> u32 {
        self.profile
    }
}

/// Endpoints by the selections that may select them.
#[derive(Debug, Default)]
pub struct Candidates {
    /// Those that the same selections may select.
    groups: Vec<Vec<u32>>,
    by_selection: BTreeMap<u32, Vec<usize>>,
}

impl Origin {
    /// Judges new selections, which are sorted and concern this cluster, from a cursor on, for about this number of evaluations.
    /// Returns the next cursor, if there is more. Selections that were judged before stay unchanged.
    pub fn select(
        &mut self,
        fresh: &[u32],
        selections: &Selections,
        from: JudgingCursor,
        evaluations: usize,
    ) -> Option<JudgingCursor> {
        let (began, mut visited) = (selections.evaluated(), 0_usize);
        let JudgingCursor { mut profile, mut selection } = from;
        while profile < self.profiles.bound() && !fresh.is_empty() {
            let spent = selections.evaluated_since(began).saturating_add(visited * EVALUATIONS_PER_UPDATE);
            if spent >= evaluations {
                return Some(JudgingCursor { profile, selection });
            }
            visited += 1;
            let rest = &fresh[fresh.partition_point(|number| *number < selection)..];
            match self.select_of(profile, rest, selections, evaluations - spent) {
                Some(next) => return Some(JudgingCursor { profile, selection: next }),
                None => (profile, selection) = (profile + 1, 0),
            }
        }
        None
    }

    /// Judges new selections over one profile, at least one, for about this number of evaluations. Returns the next of them if it
    /// stopped before the end.
    fn select_of(&mut self, number: u32, fresh: &[u32], selections: &Selections, evaluations: usize) -> Option<u32> {
        let (id, profile) = self.profiles.at(number)?;
        if profile.problem.is_some() || profile.endpoints.is_empty() || profile.own_keys.is_many() {
            return None;
        }
        let pairs = self.effective(profile.key, &[]);
        let known = KnownLabels { pairs: &pairs, grant: &self.granted.labels };
        // Of many, only those that the labels may satisfy are evaluated.
        let candidates: Cow<'_, [u32]> = match fresh.len() <= FEW_SELECTIONS {
            true => fresh.into(),
            false => {
                let mut candidates = selections.candidates(&self.name, &known, profile.own_keys.few());
                candidates.retain(|number| fresh.binary_search(number).is_ok());
                candidates.into()
            }
        };
        let (mut matches, mut per_endpoint, mut next) = (Vec::new(), Vec::new(), None);
        // The lookup is repeated in each part, so that it does not count.
        let began = selections.evaluated();
        for (at, candidate) in candidates.iter().copied().enumerate() {
            if at > 0 && selections.evaluated_since(began) >= evaluations {
                next = Some(candidate);
                break;
            }
            self.judge_one(profile, candidate, selections, &known, [&mut matches, &mut per_endpoint]);
        }
        let profile = self.profiles.get_mut(id);
        add(&mut profile.matches, &matches);
        add(&mut profile.per_endpoint, &per_endpoint);
        next
    }

    /// Adds a selection to those that match a profile, or to those that are evaluated for each of its endpoints, or to neither.
    fn judge_one(
        &self,
        profile: &Profile,
        number: u32,
        selections: &Selections,
        known: &KnownLabels<'_>,
        [matches, per_endpoint]: [&mut Vec<u32>; 2],
    ) {
        if selections.needs_endpoints(number, profile.own_keys.few()) {
            selections.charge(1);
            per_endpoint.push(number);
        } else if selections.may_match(number, known) {
            matches.push(number);
        }
    }

    /// Removes selections whose numbers are reused. All at once, because each profile is visited.
    pub fn unselect(&mut self, numbers: &Bits) {
        for profile in self.profiles.iter_mut() {
            drop_from(&mut profile.matches, numbers);
            drop_from(&mut profile.per_endpoint, numbers);
        }
    }

    /// Which of these endpoints selections may select.
    pub fn candidates(&self, endpoints: &BTreeMap<u32, Before>, selections: &Selections) -> Candidates {
        let mut candidates = Candidates::default();
        let mut groups: HashMap<ProfileId, usize> = HashMap::new();
        for slot in endpoints.keys() {
            let Some(Entry { body: Body::Endpoint { profile: id, .. }, visible: true, bytes, .. }) = self.entry(*slot)
            else {
                continue;
            };
            let profile = self.profiles.get(*id);
            if profile.own_keys.is_many() {
                let Some(endpoint) = endpoint_of(bytes) else { continue };
                let pairs = self.effective(profile.key, &endpoint.own);
                let known = KnownLabels { pairs: &pairs, grant: &self.granted.labels };
                candidates.add(*slot, selections.filed(&known));
            } else if let Some(group) = groups.get(id) {
                candidates.groups[*group].push(*slot);
            } else {
                groups.insert(*id, candidates.groups.len());
                candidates.add(*slot, profile.matches.iter().chain(&profile.per_endpoint).copied());
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
        selections.charge(profile.matches.len() / MATCHES_PER_EVALUATION);
        if profile.matches.iter().any(|number| interest.contains(*number)) {
            return true;
        }
        let is_many = profile.own_keys.is_many();
        if !is_many && !profile.per_endpoint.iter().any(|number| interest.contains(*number)) {
            return false;
        }
        let Some(endpoint) = endpoint_of(bytes) else { return false };
        let pairs = self.effective(profile.key, &endpoint.own);
        let known = KnownLabels { pairs: &pairs, grant: &self.granted.labels };
        let selects = |number: u32| {
            let names = selections.wanted(number).port_names();
            (names.is_empty() || endpoint.ports.iter().any(|port| names.contains(&port.name)))
                && selections.may_match(number, &known)
        };
        match is_many {
            true => {
                let mut all = selections.filed(&known).filter(|number| interest.contains(*number));
                all.any(|number| selections.concerns(number, &self.name) && selects(number))
            }
            false => profile.per_endpoint.iter().any(|number| interest.contains(*number) && selects(*number)),
        }
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
        if problem.is_none() && !profile.endpoints.is_empty() && !profile.own_keys.is_many() {
            let pairs = self.effective(profile.key, &[]);
            let known = KnownLabels { pairs: &pairs, grant: &self.granted.labels };
            for candidate in selections.candidates(&self.name, &known, profile.own_keys.few()) {
                self.judge_one(profile, candidate, selections, &known, [&mut matches, &mut per_endpoint]);
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

impl Candidates {
    fn add(&mut self, slot: u32, numbers: impl Iterator<Item = u32>) {
        let group = self.groups.len();
        self.groups.push(vec![slot]);
        for number in numbers {
            self.by_selection.entry(number).or_default().push(group);
        }
    }

    /// The endpoints that one of these selections may select, some more than once.
    pub fn of(&self, interest: &Bits) -> Vec<u32> {
        let fit = self.by_selection.iter().filter(|(selection, _)| interest.contains(**selection));
        let groups: BTreeSet<usize> = fit.flat_map(|(_, groups)| groups).copied().collect();
        groups.into_iter().flat_map(|group| &self.groups[group]).copied().collect()
    }
}

/// Adds numbers in order to others in order.
fn add(list: &mut Box<[u32]>, numbers: &[u32]) {
    if !numbers.is_empty() {
        let mut all = [&**list, numbers].concat();
        // Stable sorting merges the two runs.
        all.sort();
        all.dedup();
        *list = all.into();
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
