//! Which selectors match which labels, kept up to date from both sides.
//!
//! Labels are interned as pairs. Only keys that some selector names count: labels that agree in those form one *class*,
//! and every selector is evaluated once per class, however many endpoints it has. A class finds the selectors that may
//! match it by the pairs and keys that they need ([`Atom`]); those that can match without any label (negations, `all()`) are
//! the residual, which is always evaluated. A selector finds its classes the same way.
//!
//! Does not know endpoints, clusters or addresses: its owner keeps them by [`ClassId`].

use std::sync::Arc;

use crate::selector::needs::{self, Need};
use crate::selector::{Expr, Selector, build};
use crate::slab::{Id, Slab};
use crate::slab_id;
use crate::tri::Tri;
use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashTable};
use smallvec::SmallVec;
use std::hash::BuildHasher as _;

use super::id_set::IdSet;

slab_id! {
    /// A label key with a value.
    pub struct PairId;
    /// A label key.
    pub struct KeyId;
    /// A registered selector.
    pub struct SelectorId;
    /// Labels that are equal for every registered selector.
    pub struct ClassId;
    /// See [`Realm`].
    pub struct RealmId;
    /// A group of slots of the caller; see [`SelectorIndex::note_group`].
    pub struct SlotGroup;
}

pub type FastMap<K, V> = HashMap<K, V, RandomState>;

/// What is known about labels that are absent.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Realm {
    /// All labels are certain.
    Certain,
    /// Own labels with other keys than these are unknown, present or not.
    Granted(Arc<[Arc<str>]>),
    /// Every selector is unknown.
    Stale,
}

#[derive(Debug)]
struct Pair {
    key: KeyId,
    value: Arc<str>,
    references: u32,
}

#[derive(Debug)]
struct Key {
    text: Arc<str>,
    /// Some selector names it, or named it since the key came.
    relevant: bool,
    selectors: IdSet<SelectorId>,
    /// Pairs and selectors that have it.
    references: u32,
    /// Until it is relevant: the groups of pairs that have it, see [`SelectorIndex::note_group`].
    groups: IdSet<SlotGroup>,
}

/// A leaf of an expression in negation normal form.
#[derive(Debug)]
struct Leaf {
    key: KeyId,
    test: Test,
    negated: bool,
}

#[derive(Debug)]
enum Test {
    Present,
    /// Sorted.
    OneOf(Box<[PairId]>),
    Contains(Arc<str>),
    StartsWith(Arc<str>),
    EndsWith(Arc<str>),
}

#[derive(Debug)]
enum Node {
    Constant(bool),
    Leaf(Leaf),
    And(Box<[Node]>),
    Or(Box<[Node]>),
}

/// A label that a class must have for a selector to match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Atom {
    Pair(PairId),
    Key(KeyId),
}

#[derive(Debug)]
struct Registered {
    selector: Selector,
    node: Node,
    keys: Box<[KeyId]>,
    /// `None`: residual.
    anchors: Option<Box<[Atom]>>,
    users: u32,
    yes: IdSet<ClassId>,
    unknown: IdSet<ClassId>,
}

/// A selector that matches, or may match, a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Match {
    pub selector: SelectorId,
    pub certain: bool,
}

#[derive(Debug)]
struct Class {
    realm: RealmId,
    /// Keeps apart what must not share a class though its labels agree.
    tag: u8,
    /// By key.
    labels: Box<[(KeyId, PairId)]>,
    /// By selector.
    matches: Vec<Match>,
}

/// See the module.
#[derive(Debug)]
pub struct SelectorIndex {
    hasher: RandomState,
    keys: Slab<KeyId, Key>,
    keys_by_text: FastMap<Arc<str>, KeyId>,
    pairs: Slab<PairId, Pair>,
    pairs_by_content: HashTable<PairId>,
    realms: Slab<RealmId, (Realm, IdSet<ClassId>)>,
    selectors: Slab<SelectorId, Box<Registered>>,
    selectors_by_canonical: FastMap<Arc<str>, SelectorId>,
    by_pair: FastMap<PairId, IdSet<SelectorId>>,
    by_key: FastMap<KeyId, IdSet<SelectorId>>,
    residual: IdSet<SelectorId>,
    classes: Slab<ClassId, Class>,
    classes_by_content: HashTable<ClassId>,
    all_classes: IdSet<ClassId>,
    classes_by_pair: FastMap<PairId, IdSet<ClassId>>,
    classes_by_key: FastMap<KeyId, IdSet<ClassId>>,
}

impl Default for SelectorIndex {
    fn default() -> Self {
        let mut realms = Slab::new();
        realms.insert((Realm::Certain, IdSet::default()));
        Self {
            hasher: RandomState::default(),
            keys: Slab::new(),
            keys_by_text: FastMap::default(),
            pairs: Slab::new(),
            pairs_by_content: HashTable::new(),
            realms,
            selectors: Slab::new(),
            selectors_by_canonical: FastMap::default(),
            by_pair: FastMap::default(),
            by_key: FastMap::default(),
            residual: IdSet::default(),
            classes: Slab::new(),
            classes_by_content: HashTable::new(),
            all_classes: IdSet::default(),
            classes_by_pair: FastMap::default(),
            classes_by_key: FastMap::default(),
        }
    }
}

impl SelectorIndex {
    /// Interns a key. It stays while a pair or a selector has it.
    pub fn key(&mut self, text: &str) -> KeyId {
        if let Some(id) = self.keys_by_text.get(text) {
            return *id;
        }
        let shared: Arc<str> = text.into();
        let key = Key {
            text: shared.clone(),
            relevant: false,
            selectors: IdSet::default(),
            references: 0,
            groups: IdSet::default(),
        };
        let id = self.keys.insert(key);
        self.keys_by_text.insert(shared, id);
        id
    }

    fn release_key(&mut self, id: KeyId) {
        let key = &mut self.keys[id];
        key.references -= 1;
        if key.references == 0 {
            let key = self.keys.remove(id);
            self.keys_by_text.remove(&key.text);
        }
    }

    /// Interns a pair and takes a reference to it.
    pub fn pair(&mut self, key: KeyId, value: &Arc<str>) -> PairId {
        let hash = self.hasher.hash_one((key, &**value));
        let same = |id: &PairId| {
            let pair = &self.pairs[*id];
            pair.key == key && *pair.value == **value
        };
        if let Some(id) = self.pairs_by_content.find(hash, same) {
            self.pairs[*id].references += 1;
            return *id;
        }
        self.keys[key].references += 1;
        let pair = Pair { key, value: value.clone(), references: 1 };
        let id = self.pairs.insert(pair);
        let (hasher, pairs) = (&self.hasher, &self.pairs);
        self.pairs_by_content.insert_unique(hash, id, |id| {
            let pair = &pairs[*id];
            hasher.hash_one((pair.key, &*pair.value))
        });
        id
    }

    pub fn release(&mut self, pair: PairId) {
        let slot = &mut self.pairs[pair];
        slot.references -= 1;
        if slot.references == 0 {
            let Pair { key, value, .. } = self.pairs.remove(pair);
            let hash = self.hasher.hash_one((key, &*value));
            if let Ok(entry) = self.pairs_by_content.find_entry(hash, |id| *id == pair) {
                entry.remove();
            }
            self.release_key(key);
        }
    }

    pub fn key_of(&self, pair: PairId) -> KeyId {
        self.pairs[pair].key
    }

    /// A pair's key and value.
    pub fn text_of(&self, pair: PairId) -> (&str, &Arc<str>) {
        let pair = &self.pairs[pair];
        (&self.keys[pair.key].text, &pair.value)
    }

    pub fn is_relevant(&self, key: KeyId) -> bool {
        self.keys[key].relevant
    }

    /// Records that something with a pair of this key is in a group of slots. Groups are never removed: the caller
    /// checks what it finds there.
    pub fn note_group(&mut self, key: KeyId, group: SlotGroup) {
        let key = &mut self.keys[key];
        if !key.relevant {
            key.groups.insert(group);
        }
    }

    /// Takes the groups of a key that became relevant.
    pub fn take_groups(&mut self, key: KeyId) -> IdSet<SlotGroup> {
        let key = &mut self.keys[key];
        if key.relevant { std::mem::take(&mut key.groups) } else { IdSet::default() }
    }

    pub fn realm(&mut self, realm: &Realm) -> RealmId {
        let found = self.realms.iter().find(|(_, (have, _))| have == realm).map(|(id, _)| id);
        found.unwrap_or_else(|| self.realms.insert((realm.clone(), IdSet::default())))
    }

    /// Whether a realm lets an own label of this key be known.
    pub fn knows(&self, realm: RealmId, key: KeyId) -> bool {
        match &self.realms[realm].0 {
            Realm::Certain => true,
            Realm::Stale => false,
            Realm::Granted(keys) => {
                let own = build::own_label(&self.keys[key].text);
                own.is_none_or(|own| keys.binary_search_by(|key| (**key).cmp(own)).is_ok())
            }
        }
    }

    // Selectors.

    /// Takes a use of a selector, which is matched against all classes when it is new. Adds to `newly_relevant` the
    /// keys that no selector named before: labels with these keys must be classed again.
    pub fn register(&mut self, selector: &Selector, newly_relevant: &mut Vec<KeyId>) -> SelectorId {
        if let Some(id) = self.selectors_by_canonical.get(&selector.canonical) {
            self.selectors[*id].users += 1;
            return *id;
        }
        let node = self.prepare(&selector.expr, false);
        let mut keys = Vec::new();
        node.for_each_leaf(&mut |leaf| keys.push(leaf.key));
        keys.sort_unstable();
        keys.dedup();
        let anchors = self.anchors(&selector.expr);
        let registered = Registered {
            selector: selector.clone(),
            node,
            keys: keys.into(),
            anchors,
            users: 1,
            yes: IdSet::default(),
            unknown: IdSet::default(),
        };
        let id = self.selectors.next_id();
        for key in &registered.keys {
            let key_slot = &mut self.keys[*key];
            key_slot.selectors.insert(id);
            key_slot.references += 1;
            if !std::mem::replace(&mut key_slot.relevant, true) {
                newly_relevant.push(*key);
            }
        }
        match &registered.anchors {
            None => self.residual.insert(id),
            Some(atoms) => atoms.iter().for_each(|atom| match atom {
                Atom::Pair(pair) => self.by_pair.entry(*pair).or_default().insert(id),
                Atom::Key(key) => self.by_key.entry(*key).or_default().insert(id),
            }),
        }
        self.selectors_by_canonical.insert(selector.canonical.clone(), id);
        let candidates = self.candidate_classes(&registered);
        self.selectors.insert(Box::new(registered));
        for class in candidates {
            self.match_one(class, id);
        }
        id
    }

    /// Gives back a use.
    pub fn unregister(&mut self, id: SelectorId) {
        let users = &mut self.selectors[id].users;
        *users -= 1;
        if *users > 0 {
            return;
        }
        let registered = self.selectors.remove(id);
        match &registered.anchors {
            None => self.residual.remove(id),
            Some(atoms) => atoms.iter().for_each(|atom| match atom {
                Atom::Pair(pair) => forget(&mut self.by_pair, *pair, id),
                Atom::Key(key) => forget(&mut self.by_key, *key, id),
            }),
        }
        self.selectors_by_canonical.remove(&registered.selector.canonical);
        for class in registered.yes.iter().chain(registered.unknown.iter()) {
            let matches = &mut self.classes[class].matches;
            if let Ok(at) = matches.binary_search_by_key(&id, |it| it.selector) {
                matches.remove(at);
            }
        }
        registered.node.for_each_leaf(&mut |leaf| {
            if let Test::OneOf(pairs) = &leaf.test {
                pairs.iter().for_each(|pair| self.release(*pair));
            }
        });
        for key in &registered.keys {
            self.keys[*key].selectors.remove(id);
            self.release_key(*key);
        }
    }

    pub fn selector(&self, id: SelectorId) -> &Selector {
        &self.selectors[id].selector
    }

    /// The selector of this canonical form, when it is registered.
    pub fn find(&self, selector: &Selector) -> Option<SelectorId> {
        self.selectors_by_canonical.get(&selector.canonical).copied()
    }

    /// The classes that a selector certainly matches.
    pub fn certain(&self, id: SelectorId) -> impl Iterator<Item = ClassId> {
        self.selectors[id].yes.iter()
    }

    /// The classes for which it is unknown whether a selector matches.
    pub fn unknown(&self, id: SelectorId) -> impl Iterator<Item = ClassId> {
        self.selectors[id].unknown.iter()
    }

    // Classes.

    /// The class of these labels (pairs of relevant keys that the realm knows, sorted by key, no key twice), made when it
    /// is new.
    pub fn class(&mut self, realm: RealmId, tag: u8, labels: &[(KeyId, PairId)]) -> ClassId {
        let hash = self.hasher.hash_one((realm, tag, labels));
        let same = |id: &ClassId| {
            let class = &self.classes[*id];
            class.realm == realm && class.tag == tag && *class.labels == *labels
        };
        if let Some(id) = self.classes_by_content.find(hash, same) {
            return *id;
        }
        let id = self.classes.insert(Class { realm, tag, labels: labels.into(), matches: Vec::new() });
        for (key, pair) in labels {
            self.pairs[*pair].references += 1;
            self.classes_by_pair.entry(*pair).or_default().insert(id);
            self.classes_by_key.entry(*key).or_default().insert(id);
        }
        self.all_classes.insert(id);
        self.realms[realm].1.insert(id);
        let (hasher, classes) = (&self.hasher, &self.classes);
        self.classes_by_content.insert_unique(hash, id, |id| {
            let class = &classes[*id];
            hasher.hash_one((class.realm, class.tag, &*class.labels))
        });
        for selector in self.candidate_selectors(realm, labels) {
            self.match_one(id, selector);
        }
        id
    }

    /// Removes a class without endpoints.
    pub fn remove_class(&mut self, id: ClassId) {
        let class = self.classes.remove(id);
        let hash = self.hasher.hash_one((class.realm, class.tag, &*class.labels));
        if let Ok(entry) = self.classes_by_content.find_entry(hash, |have| *have == id) {
            entry.remove();
        }
        for (key, pair) in &class.labels {
            forget(&mut self.classes_by_pair, *pair, id);
            forget(&mut self.classes_by_key, *key, id);
            self.release(*pair);
        }
        self.all_classes.remove(id);
        self.realms[class.realm].1.remove(id);
        for it in &class.matches {
            let registered = &mut self.selectors[it.selector];
            let list = if it.certain { &mut registered.yes } else { &mut registered.unknown };
            list.remove(id);
        }
    }

    /// The selectors that match a class, or may, sorted.
    pub fn matches(&self, class: ClassId) -> &[Match] {
        &self.classes[class].matches
    }

    /// One above the highest number of a selector.
    pub fn selector_bound(&self) -> u32 {
        self.selectors.bound()
    }

    pub fn selector_count(&self) -> usize {
        self.selectors_by_canonical.len()
    }

    pub fn pair_count(&self) -> usize {
        self.pairs_by_content.len()
    }

    pub fn key_count(&self) -> usize {
        self.keys_by_text.len()
    }

    pub fn class_count(&self) -> usize {
        self.classes.len()
    }

    fn match_one(&mut self, class_id: ClassId, selector: SelectorId) {
        let certain = match self.evaluate(&self.selectors[selector], &self.classes[class_id]) {
            Tri::No => return,
            Tri::Yes => true,
            Tri::Unknown => false,
        };
        let registered = &mut self.selectors[selector];
        let list = if certain { &mut registered.yes } else { &mut registered.unknown };
        list.insert(class_id);
        let matches = &mut self.classes[class_id].matches;
        if let Err(at) = matches.binary_search_by_key(&selector, |it| it.selector) {
            matches.insert(at, Match { selector, certain });
        }
    }

    fn evaluate(&self, registered: &Registered, class: &Class) -> Tri {
        if self.realms[class.realm].0 == Realm::Stale {
            return Tri::Unknown;
        }
        self.value(&registered.node, class)
    }

    fn value(&self, node: &Node, class: &Class) -> Tri {
        match node {
            Node::Constant(truth) => Tri::from(*truth),
            Node::Leaf(leaf) => self.leaf_value(leaf, class),
            Node::And(parts) => {
                let mut all = Tri::Yes;
                for part in parts {
                    all = all.and(self.value(part, class));
                    if all == Tri::No {
                        break;
                    }
                }
                all
            }
            Node::Or(parts) => {
                let mut any = Tri::No;
                for part in parts {
                    any = any.or(self.value(part, class));
                    if any == Tri::Yes {
                        break;
                    }
                }
                any
            }
        }
    }

    fn leaf_value(&self, leaf: &Leaf, class: &Class) -> Tri {
        let positive = match class.labels.binary_search_by_key(&leaf.key, |(key, _)| *key) {
            Ok(at) => {
                let pair = class.labels[at].1;
                let value = || &*self.pairs[pair].value;
                match &leaf.test {
                    Test::Present => true,
                    Test::OneOf(pairs) => pairs.binary_search(&pair).is_ok(),
                    Test::Contains(part) => value().contains(&**part),
                    Test::StartsWith(part) => value().starts_with(&**part),
                    Test::EndsWith(part) => value().ends_with(&**part),
                }
            }
            Err(_) if !self.knows(class.realm, leaf.key) => return Tri::Unknown,
            Err(_) => false,
        };
        Tri::from(positive != leaf.negated)
    }

    fn candidate_selectors(&self, realm: RealmId, labels: &[(KeyId, PairId)]) -> Vec<SelectorId> {
        let mut found: Vec<SelectorId> = Vec::new();
        match &self.realms[realm].0 {
            Realm::Stale => return self.selectors_by_canonical.values().copied().collect(),
            Realm::Certain => {}
            Realm::Granted(_) => {
                for (key, slot) in self.keys.iter() {
                    if slot.relevant && !self.knows(realm, key) {
                        found.extend(slot.selectors.iter());
                    }
                }
            }
        }
        found.extend(self.residual.iter());
        for (key, pair) in labels {
            found.extend(self.by_pair.get(pair).into_iter().flat_map(IdSet::iter));
            found.extend(self.by_key.get(key).into_iter().flat_map(IdSet::iter));
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    fn candidate_classes(&self, registered: &Registered) -> Vec<ClassId> {
        let Some(atoms) = &registered.anchors else { return self.all_classes.iter().collect() };
        let mut found: Vec<ClassId> = Vec::new();
        for atom in atoms {
            let posting = match atom {
                Atom::Pair(pair) => self.classes_by_pair.get(pair),
                Atom::Key(key) => self.classes_by_key.get(key),
            };
            found.extend(posting.into_iter().flat_map(IdSet::iter));
        }
        for (id, (realm, classes)) in self.realms.iter() {
            let all = *realm == Realm::Stale || registered.keys.iter().any(|key| !self.knows(id, *key));
            if all {
                found.extend(classes.iter());
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Negation normal form over interned labels.
    fn prepare(&mut self, expr: &Expr, negated: bool) -> Node {
        let leaf = |key, test, flip: bool| Node::Leaf(Leaf { key, test, negated: negated != flip });
        match expr {
            Expr::All | Expr::Global => Node::Constant(!negated),
            Expr::Has(key) => leaf(self.key(key), Test::Present, false),
            Expr::Equal(key, value) | Expr::NotEqual(key, value) => {
                let key = self.key(key);
                let pair = self.pair(key, value);
                leaf(key, Test::OneOf([pair].into()), matches!(expr, Expr::NotEqual(..)))
            }
            Expr::In(key, values) | Expr::NotIn(key, values) => {
                let key = self.key(key);
                let mut pairs: Vec<PairId> = values.iter().map(|value| self.pair(key, value)).collect();
                pairs.sort_unstable();
                leaf(key, Test::OneOf(pairs.into()), matches!(expr, Expr::NotIn(..)))
            }
            Expr::Contains(key, part) => leaf(self.key(key), Test::Contains(part.clone()), false),
            Expr::StartsWith(key, part) => leaf(self.key(key), Test::StartsWith(part.clone()), false),
            Expr::EndsWith(key, part) => leaf(self.key(key), Test::EndsWith(part.clone()), false),
            Expr::Not(inner) => self.prepare(inner, !negated),
            Expr::And(parts) | Expr::Or(parts) => {
                let prepared = parts.iter().map(|part| self.prepare(part, negated)).collect();
                let is_and = matches!(expr, Expr::And(_)) != negated;
                if is_and { Node::And(prepared) } else { Node::Or(prepared) }
            }
        }
    }

    /// Atoms of which a class without unknown labels has at least one when the expression, which is prepared, is true; `None`
    /// when it may have none.
    fn anchors(&self, expr: &Expr) -> Option<Box<[Atom]>> {
        let atom = |(key, value): &Need<'_>| {
            let key = *self.keys_by_text.get(*key)?;
            let Some(value) = value else { return Some(Atom::Key(key)) };
            let same = |id: &PairId| self.pairs[*id].key == key && self.pairs[*id].value == **value;
            let pair = self.pairs_by_content.find(self.hasher.hash_one((key, &***value)), same)?;
            Some(Atom::Pair(*pair))
        };
        let found = needs::one_of(expr, &|list| self.cost(list.iter().filter_map(atom)))?;
        Some(found.iter().filter_map(atom).collect())
    }

    /// How many selectors atoms would find in vain: a label of all pods is worst, then whole keys, then atoms that many
    /// selectors need.
    fn cost(&self, atoms: impl Iterator<Item = Atom>) -> (bool, bool, usize) {
        let mut cost = (false, false, 0);
        for atom in atoms {
            let (key, selectors) = match atom {
                Atom::Pair(pair) => (self.key_of(pair), self.by_pair.get(&pair)),
                Atom::Key(key) => (key, self.by_key.get(&key)),
            };
            cost.0 |= &*self.keys[key].text == build::ORCHESTRATOR;
            cost.1 |= matches!(atom, Atom::Key(_));
            cost.2 += 1 + selectors.map_or(0, IdSet::len);
        }
        cost
    }
}

impl Node {
    fn for_each_leaf(&self, visit: &mut impl FnMut(&Leaf)) {
        match self {
            Self::Constant(_) => {}
            Self::Leaf(leaf) => visit(leaf),
            Self::And(parts) | Self::Or(parts) => parts.iter().for_each(|part| part.for_each_leaf(visit)),
        }
    }
}

fn forget<K: std::hash::Hash + Eq, I: Id>(map: &mut FastMap<K, IdSet<I>>, key: K, id: I) {
    if let hashbrown::hash_map::Entry::Occupied(mut entry) = map.entry(key) {
        entry.get_mut().remove(id);
        if entry.get().is_empty() {
            entry.remove();
        }
    }
}

/// Labels of one object as the index wants them.
pub type Labels = SmallVec<[(KeyId, PairId); 12]>;
