//! Which selections the endpoints of an origin satisfy: judged once per profile, and per endpoint only where a selection names a
//! port or one of the endpoint's own labels.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_policy::inventory::{LabelGrant, NamedPort};
use hanse_policy::selector::build;
use hashbrown::HashMap;

use super::Origin;
use super::objects::{Before, Body, Entry, endpoint_of};
use super::profiles::{Numbers, Profile, ProfileId, ProfileKey};
use super::questions::{EndpointQuestion, Judged, ProfileQuestion, Selected};
use crate::hub::selections::{EVALUATIONS_PER_UPDATE, EffectiveLabels, KnownLabels, Selections, needs_endpoints};
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
    /// The questions of new selections, which are sorted and concern this cluster, over profiles from a cursor on, for about this
    /// number of evaluations. Returns the next cursor, if there is more.
    pub fn profile_questions(
        &self,
        fresh: &[u32],
        selections: &Selections,
        from: JudgingCursor,
        evaluations: usize,
        questions: &mut Vec<ProfileQuestion>,
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
            let (question, next) = self.profile_question(profile, rest, selections, evaluations - spent);
            questions.extend(question.filter(|question| !question.candidates.is_empty()));
            match next {
                Some(next) => return Some(JudgingCursor { profile, selection: next }),
                None => (profile, selection) = (profile + 1, 0),
            }
        }
        None
    }

    /// New selections over one profile, at least one, for about this number of evaluations, and the next of them if these are not all.
    fn profile_question(
        &self,
        number: u32,
        fresh: &[u32],
        selections: &Selections,
        evaluations: usize,
    ) -> (Option<ProfileQuestion>, Option<u32>) {
        let Some((id, profile)) = self.profiles.at(number) else { return (None, None) };
        if profile.problem.is_some() || profile.endpoints.is_empty() || profile.own_keys.is_many() {
            return (None, None);
        }
        let labels = self.effective(profile.key, &[]);
        // Of many, only those that the labels may satisfy are evaluated.
        let mut candidates = match fresh.len() <= FEW_SELECTIONS {
            true => fresh.to_vec(),
            false => {
                let known = KnownLabels { pairs: &labels, grant: &self.granted.labels };
                let mut candidates = selections.candidates(&self.name, &known, profile.own_keys.few());
                candidates.retain(|number| fresh.binary_search(number).is_ok());
                candidates
            }
        };
        // The lookup is repeated in each part, so that it does not count.
        let began = selections.evaluated();
        let rest = candidates.iter().enumerate().find_map(|(at, candidate)| {
            let is_enough = at > 0 && selections.evaluated_since(began) >= evaluations;
            selections.charge_evaluation(*candidate);
            is_enough.then_some(at)
        });
        let next = rest.map(|at| candidates[at]);
        candidates.truncate(rest.unwrap_or(candidates.len()));
        let own_keys = profile.own_keys.few().to_vec();
        (Some(ProfileQuestion { profile: id, labels, own_keys, candidates }), next)
    }

    /// Takes over what was found for a profile, unless what it depends on has changed: then the profile was judged again, or will be,
    /// for these selections as well. `changed`: the origin is not as it was when the question was made.
    pub fn answer_profile(&mut self, question: &ProfileQuestion, judged: &Judged, grant: &LabelGrant, changed: bool) {
        if changed && !self.is_answerable(question, grant) {
            return;
        }
        let profile = self.profiles.get_mut(question.profile);
        add(&mut profile.matches, &judged.matches);
        add(&mut profile.per_endpoint, &judged.per_endpoint);
    }

    /// Whether everything that the answer depends on is as it was when the question was made.
    fn is_answerable(&self, question: &ProfileQuestion, grant: &LabelGrant) -> bool {
        let Some(profile) = self.profiles.find(question.profile) else { return false };
        let had = |(key, _): &(Arc<str>, u32)| question.own_keys.binary_search_by(|(had, _)| had.cmp(key)).is_ok();
        profile.problem.is_none()
            && !profile.endpoints.is_empty()
            && !profile.own_keys.is_many()
            && profile.own_keys.few().iter().all(had)
            && self.granted.labels == *grant
            && self.effective(profile.key, &[]) == question.labels
    }

    /// How an endpoint relates to an interest: see [`Selected`].
    pub fn selected(&self, slot: u32, interest: &Bits, selections: &Selections) -> Selected {
        let Some(entry @ Entry { body: Body::Endpoint { profile, .. }, visible: true, .. }) = self.entry(slot) else {
            return Selected::No;
        };
        let profile = self.profiles.get(*profile);
        selections.charge(profile.matches.len() / MATCHES_PER_EVALUATION);
        if profile.matches.iter().any(|number| interest.contains(*number)) {
            return Selected::Yes;
        }
        let is_many = profile.own_keys.is_many();
        if !is_many && !profile.per_endpoint.iter().any(|number| interest.contains(*number)) {
            return Selected::No;
        }
        let Some((labels, ports)) = self.labels_and_ports(entry, profile) else { return Selected::No };
        let known = KnownLabels { pairs: &labels, grant: &self.granted.labels };
        let mut candidates: Vec<u32> = match is_many {
            true => selections.filed(&known).collect(),
            false => profile.per_endpoint.to_vec(),
        };
        candidates.retain(|number| interest.contains(*number));
        if is_many {
            candidates.sort_unstable();
            candidates.dedup();
            candidates.retain(|number| selections.concerns(*number, &self.name));
        }
        Selected::IfOneMatches(EndpointQuestion { slot, labels, ports, candidates })
    }

    fn labels_and_ports(&self, entry: &Entry, profile: &Profile) -> Option<(EffectiveLabels, Vec<NamedPort>)> {
        let endpoint = endpoint_of(&entry.bytes)?;
        Some((self.effective(profile.key, &endpoint.own), endpoint.ports))
    }

    /// Whether an endpoint is as it was when the question was made.
    pub fn is_unchanged(&self, question: &EndpointQuestion, grant: &LabelGrant) -> bool {
        let Some(entry @ Entry { body: Body::Endpoint { profile, .. }, visible: true, .. }) = self.entry(question.slot)
        else {
            return false;
        };
        let now = self.labels_and_ports(entry, self.profiles.get(*profile));
        self.granted.labels == *grant && now.is_some_and(|now| now.0 == question.labels && now.1 == question.ports)
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
        if needs_endpoints(selections.wanted(number), profile.own_keys.few()) {
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
        match self.selected(slot, interest, selections) {
            Selected::Yes => true,
            Selected::No => false,
            Selected::IfOneMatches(question) => {
                let wanted = |number: u32| {
                    selections.charge_evaluation(number);
                    Some(&**selections.wanted(number))
                };
                question.evaluate(&self.granted.labels, wanted)
            }
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
            (problem.map(Box::new), Numbers::from_slice(&matches), Numbers::from_slice(&per_endpoint));
    }

    /// The effective labels of a profile's endpoint with these labels of its own, sorted by key.
    fn effective(&self, key: ProfileKey, own: &[(Arc<str>, Arc<str>)]) -> EffectiveLabels {
        let [namespace, account, label_set] = key;
        let effective = |key: &Arc<str>| match build::own_key(key) {
            Cow::Borrowed(_) => key.clone(),
            Cow::Owned(key) => key.into(),
        };
        let mut pairs: EffectiveLabels = own.iter().map(|(k, v)| (effective(k), v.clone())).collect();
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
fn add(list: &mut Numbers, numbers: &[u32]) {
    if !numbers.is_empty() {
        let mut all = [&**list, numbers].concat();
        // Stable sorting merges the two runs.
        all.sort();
        all.dedup();
        *list = Numbers::from_slice(&all);
    }
}

fn drop_from(list: &mut Numbers, numbers: &Bits) {
    if list.iter().any(|number| numbers.contains(*number)) {
        list.retain(|it| !numbers.contains(*it));
        list.shrink_to_fit();
    }
}

/// `own_name`: the key under which a label with the key of the name is visible.
fn prefixed(prefix: &str, own_name: Option<&str>, name: &Arc<str>, labels: &Pairs, into: &mut EffectiveLabels) {
    into.push((format!("{prefix}{}", build::NAME).into(), name.clone()));
    for (key, value) in labels.iter() {
        let key = if &**key == build::NAME { own_name } else { Some(&**key) };
        into.extend(key.map(|key| (format!("{prefix}{key}").into(), value.clone())));
    }
}
