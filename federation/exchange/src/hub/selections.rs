//! Which selections an origin's label combination matches, without evaluating each selection.
//!
//! A selection is filed under pairs (or keys) of which any match needs at least one; those that have no such anchor are
//! always evaluated. No match is missed; single endpoints are not evaluated.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;

use hanse_policy::inventory::LabelGrant;
use hanse_policy::selector::build::{own_key, own_label};
use hanse_policy::selector::needs::{self, Need};
use hanse_policy::selector::{Expr, Label, LabelLookup};
use hanse_policy::slab::{Id as _, Slab};
use hanse_policy::tri::Tri;
use hashbrown::HashMap;

use crate::model::Wanted;

/// Evaluations of a short selection in the time that one update takes.
pub const EVALUATIONS_PER_UPDATE: usize = 64;
/// Bytes of a selection that count as one more evaluation.
const BYTES_PER_EVALUATION: usize = 128;
/// Selections that are looked up in the time of an evaluation.
const LOOKUPS_PER_EVALUATION: usize = 4;

/// Effective labels, sorted by key.
pub type EffectiveLabels = Vec<(Arc<str>, Arc<str>)>;

/// Effective labels, sorted by key, and which own keys count.
#[derive(Debug)]
pub struct KnownLabels<'a> {
    pub pairs: &'a [(Arc<str>, Arc<str>)],
    pub grant: &'a LabelGrant,
}

impl LabelLookup for KnownLabels<'_> {
    fn label(&self, key: &str) -> Label<'_> {
        if let LabelGrant::Keys(granted) = self.grant
            && own_label(key).is_some_and(|own| !granted.contains(own))
        {
            return Label::Unknown;
        }
        match self.pairs.binary_search_by(|(have, _)| (**have).cmp(key)) {
            Ok(at) => Label::Present(&self.pairs[at].1),
            Err(_) => Label::Absent,
        }
    }
}

hanse_policy::slab_id! {
    struct SelectionId;
}

#[derive(Debug)]
struct Slot {
    wanted: Arc<Wanted>,
    users: u32,
}

#[derive(Debug, Default)]
struct Filed {
    /// Everything that names this key.
    naming: BTreeSet<u32>,
    /// Anchored on the key's presence.
    present: BTreeSet<u32>,
    values: HashMap<Arc<str>, BTreeSet<u32>>,
}

/// All selections in use, each with a number.
#[derive(Debug, Default)]
pub struct Selections {
    slots: Slab<SelectionId, Slot>,
    numbers: HashMap<Arc<Wanted>, u32>,
    keys: HashMap<Arc<str>, Filed>,
    unanchored: BTreeSet<u32>,
    /// Evaluations so far, and work that takes as long: parts of other work end by it.
    evaluated: Cell<usize>,
}

impl Selections {
    /// One more user of a selection; true when it is new.
    pub fn acquire(&mut self, wanted: &Arc<Wanted>) -> (u32, bool) {
        if let Some(number) = self.numbers.get(wanted) {
            self.slots[SelectionId::new(*number)].users += 1;
            return (*number, false);
        }
        let number = self.slots.insert(Slot { wanted: wanted.clone(), users: 1 }).number();
        self.numbers.insert(wanted.clone(), number);
        let expr = &wanted.selector().expr;
        expr.for_each_key(&mut |key| {
            self.keys.entry(key.clone()).or_default().naming.insert(number);
        });
        match anchors(expr) {
            None => drop(self.unanchored.insert(number)),
            Some(found) => {
                for (key, value) in found {
                    let filed = self.keys.entry(key.clone()).or_default();
                    match value {
                        None => filed.present.insert(number),
                        Some(value) => filed.values.entry(value.clone()).or_default().insert(number),
                    };
                }
            }
        }
        (number, true)
    }

    /// One user fewer; true when it was the last.
    pub fn release(&mut self, number: u32) -> bool {
        let slot = &mut self.slots[SelectionId::new(number)];
        slot.users -= 1;
        if slot.users > 0 {
            return false;
        }
        let Slot { wanted, .. } = self.slots.remove(SelectionId::new(number));
        self.numbers.remove(&wanted);
        self.unanchored.remove(&number);
        // Only where it is filed: a class of thousands of selections is released under one lock.
        let expr = &wanted.selector().expr;
        for (key, value) in anchors(expr).into_iter().flatten() {
            let Some(filed) = self.keys.get_mut(key) else { continue };
            let Some(value) = value else {
                filed.present.remove(&number);
                continue;
            };
            if let Some(list) = filed.values.get_mut(value) {
                list.remove(&number);
                if list.is_empty() {
                    filed.values.remove(value);
                }
            }
        }
        expr.for_each_key(&mut |key| {
            if let Some(filed) = self.keys.get_mut(key) {
                filed.naming.remove(&number);
                if filed.naming.is_empty() {
                    self.keys.remove(key);
                }
            }
        });
        true
    }

    pub fn wanted(&self, number: u32) -> &Arc<Wanted> {
        &self.slots[SelectionId::new(number)].wanted
    }

    /// The selections that these labels may satisfy, or that name one of `own_keys`, in order.
    pub fn candidates(&self, origin: &str, labels: &KnownLabels<'_>, own_keys: &[(Arc<str>, u32)]) -> Vec<u32> {
        let own = own_keys.iter().filter_map(|(key, _)| self.keys.get(&*own_key(key)));
        let own = own.flat_map(|filed| &filed.naming).copied();
        let mut found: Vec<u32> = self.filed(labels).chain(own).collect();
        self.charge((found.len() + own_keys.len()) / LOOKUPS_PER_EVALUATION);
        found.sort_unstable();
        found.dedup();
        found.retain(|number| self.concerns(*number, origin));
        found
    }

    /// The selections that these labels may satisfy, of any cluster; some more than once.
    pub fn filed<'a>(&'a self, labels: &'a KnownLabels<'_>) -> impl Iterator<Item = u32> + 'a {
        self.charge(self.lookups(labels.grant) / LOOKUPS_PER_EVALUATION);
        let by_pair = labels.pairs.iter().filter_map(|(key, value)| {
            let filed = self.keys.get(key)?;
            Some(filed.present.iter().chain(filed.values.get(value).into_iter().flatten()))
        });
        let granted = match labels.grant {
            LabelGrant::Keys(granted) => Some(granted),
            LabelGrant::All => None,
        };
        let unknown = granted.into_iter().flat_map(|granted| {
            let is_unknown = |key: &str| own_label(key).is_some_and(|own| !granted.contains(own));
            self.keys.iter().filter(move |(key, _)| is_unknown(key)).flat_map(|(_, filed)| &filed.naming)
        });
        self.unanchored.iter().chain(by_pair.flatten()).chain(unknown).copied()
    }

    /// What each lookup visits at least, under this grant.
    pub fn lookups(&self, grant: &LabelGrant) -> usize {
        let keys = if matches!(grant, LabelGrant::Keys(_)) { self.keys.len() } else { 0 };
        self.unanchored.len() + keys
    }

    /// Whether a selection is over the endpoints of this cluster.
    pub fn concerns(&self, number: u32, origin: &str) -> bool {
        // A cluster is never sent its own endpoints, so that the scope is compared with other clusters only.
        self.wanted(number).clusters().contains("", origin)
    }

    /// Whether a selection is not certainly false.
    pub fn may_match(&self, number: u32, labels: &KnownLabels<'_>) -> bool {
        self.charge_evaluation(number);
        may_match(self.wanted(number), labels)
    }

    /// Counts the evaluation of a selection, which takes longer for a long one.
    pub fn charge_evaluation(&self, number: u32) {
        self.charge(1 + self.wanted(number).selector().canonical.len() / BYTES_PER_EVALUATION);
    }

    /// Counts work that takes as long as this many evaluations.
    pub fn charge(&self, evaluations: usize) {
        self.evaluated.set(self.evaluated.get().wrapping_add(evaluations));
    }

    /// A reading of [`Self::evaluated_since`].
    pub fn evaluated(&self) -> usize {
        self.evaluated.get()
    }

    /// Evaluations since a reading, and work that takes as long.
    pub fn evaluated_since(&self, reading: usize) -> usize {
        self.evaluated.get().wrapping_sub(reading)
    }
}

/// Whether a selection is not certainly false.
pub fn may_match(wanted: &Wanted, labels: &KnownLabels<'_>) -> bool {
    wanted.selector().evaluate(labels) != Tri::No
}

/// Whether a selection names one of these keys, or a port, so that it must be evaluated for each endpoint.
pub fn needs_endpoints(wanted: &Wanted, own_keys: &[(Arc<str>, u32)]) -> bool {
    let mut needs = !wanted.port_names().is_empty();
    if !own_keys.is_empty() {
        let is_own = |own: &str| own_keys.binary_search_by(|(key, _)| (**key).cmp(own)).is_ok();
        wanted.selector().expr.for_each_key(&mut |key| needs |= own_label(key).is_some_and(is_own));
    }
    needs
}

/// Labels of which known labels must have at least one for `expr` to be true; `None` when there is no such list.
fn anchors(expr: &Expr) -> Option<Vec<Need<'_>>> {
    // An exact value is rarer than a key, and a short list is rarer than a long one.
    needs::one_of(expr, &|list| (list.iter().filter(|(_, value)| value.is_none()).count(), list.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hanse_policy::model::ClusterScope;

    #[test]
    fn candidates_miss_no_match() {
        let expressions = [
            "a == '1'",
            "a in {'1', '2'}",
            "has(b)",
            "!has(b)",
            "a != '1'",
            "a == '1' && b == '2'",
            "a == '1' || c == '3'",
            "a contains '1'",
            "!(a == '1')",
            "all()",
            "a == '1' || !has(c)",
            "b starts with '2' && a == '2'",
        ];
        let mut table = Selections::default();
        let numbers: Vec<u32> = expressions
            .iter()
            .map(|text| {
                let selector = hanse_policy::selector::Selector::parse(text).unwrap();
                table.acquire(&Arc::new(Wanted::new(ClusterScope::All, &selector, [].into()))).0
            })
            .collect();
        for grant in [LabelGrant::All, LabelGrant::Keys([Arc::from("a")].into())] {
            for bits in 0..27 {
                let pairs: Vec<(Arc<str>, Arc<str>)> = ["a", "b", "c"]
                    .iter()
                    .enumerate()
                    .filter_map(|(at, key)| match bits / 3_usize.pow(at as u32) % 3 {
                        0 => None,
                        value => Some((Arc::from(*key), Arc::from(value.to_string()))),
                    })
                    .collect();
                let known = KnownLabels { pairs: &pairs, grant: &grant };
                let found = table.candidates("x", &known, &[]);
                for number in &numbers {
                    assert!(
                        !table.may_match(*number, &known) || found.contains(number),
                        "{} over {pairs:?} with {grant:?}",
                        expressions[*number as usize]
                    );
                }
            }
        }
        numbers.iter().for_each(|number| assert!(table.release(*number)));
        assert!(table.keys.is_empty() && table.unanchored.is_empty() && table.numbers.is_empty());
    }
}
