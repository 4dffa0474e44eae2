//! The evaluator for many packets over a fixed state. Rules are evaluated by the code of the reference ([`crate::evaluate`]), with
//! indexes and caches for selections, ports and backends.
//!
//! - Pods with the same cluster, namespace, service account and relevant labels form a class. The policies and selections of a class
//!   are determined once, with an index by required labels.
//! - The policies of a cluster are sorted once. Most rules that do not match are skipped by their outline: protocol, port, a single
//!   net, and the selections of both ends.
//! - Network sets are found by the prefixes of their nets.
//!
//! It borrows its policies and inventory, so it cannot become stale. Its caches are in `RefCell`s, so it is not `Sync`.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::hash::BuildHasher as _;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use crate::evaluate::{
    Answer, Direction, End, Enforcer, Facts, Query, TierView, View, acting, answer, backend, has_named_port, in_order,
    in_tiers, rules,
};
use crate::indexed::NetTable;
use crate::inventory::{Cluster, EffectiveLabels, Endpoint, EndpointId, EndpointKind, Inventory, LabelGrant, selects};
use crate::model::{Action, ClusterName, EntityMatch, Layer, Policy, PolicySet, Rule, Selection, ServiceMatch};
use crate::outline::{ANY, EndBits, Outline, PacketOutline, only};
use crate::selector::needs::{self, Need};
use crate::selector::{Expr, Selector, build};
use crate::tri::Tri;
use crate::workload::SOME_VALUE;

type Chain<'a> = Rc<Plain<'a>>;
/// A cluster (the address of its name), a direction, and the policies that apply or may apply.
type ChainKey = (usize, Direction, Vec<(u32, Tri)>);
/// The selections that match an end or may match it, by number, sorted.
type Matched = Rc<[(u32, Tri)]>;
/// A class, the network sets that contain the address, and the enforcing cluster (the address of its name).
type MemoKey = (Option<u32>, Rc<[u32]>, usize);
type FastSet<T> = std::collections::HashSet<T, foldhash::fast::RandomState>;
type FastMap<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// The size limit of the cache of matching selections, with 8 bytes per match: enough for 100,000 classes with 300 selections each.
/// When it is full, it is cleared.
const MEMO_BYTES: usize = 256 << 20;
/// The size of a cache entry without matches: key and table slot.
const MEMO_KEY_BYTES: usize = 64;

/// A set of policies and an inventory, prepared for many evaluations.
#[derive(Debug)]
pub struct Prepared<'a> {
    inventory: &'a Inventory,
    plans: FastMap<&'a str, Plan<'a>>,
    pods: FastMap<&'a str, Pods<'a>>,
    /// The number of a selection, by its address in the policy set.
    selections: FastMap<usize, u32>,
    by_number: Vec<&'a Selection>,
    /// Numbers of selections by labels.
    index: LabelIndex<'a>,
    /// The nets of rules with a single net. Their numbers follow those of the selections.
    nets: NetTable<u32>,
    sets: NetworkSets<'a>,
    classes: RefCell<Classes<'a>>,
    /// By class and direction.
    chains: RefCell<FastMap<(u32, Direction), Chain<'a>>>,
    chains_by_content: RefCell<FastMap<ChainKey, Chain<'a>>>,
    memos: RefCell<Memos>,
    /// For each end, one bit per selection and net. Cleared after each query.
    bits: EndBits,
}

impl<'a> Prepared<'a> {
    pub fn new(policies: &'a PolicySet, inventory: &'a Inventory, view: View) -> Self {
        let plans = inventory.clusters.keys().map(|cluster| (&**cluster, Plan::new(policies, cluster, view))).collect();
        let mut selections = FastMap::default();
        let mut ids: FastMap<&Selection, u32> = FastMap::default();
        let (mut by_number, mut only_nets) = (Vec::new(), FastSet::default());
        let layers = [&policies.federation].into_iter().chain(policies.clusters.values());
        let mut keys = FastSet::default();
        let mut note = |selector: &'a Selector| {
            selector.expr.for_each_key(&mut |key| keys.extend(build::own_label(key)));
        };
        for policy in layers.flat_map(|layer| layer.policies.values()) {
            note(&policy.selector);
            for rule in [&policy.ingress, &policy.egress].into_iter().flatten().flatten() {
                only_nets.extend([&rule.source, &rule.destination].into_iter().filter_map(|end| only(&end.nets)));
                for selection in [&rule.source, &rule.destination].into_iter().flat_map(selections_of) {
                    let next = ids.len() as u32;
                    let id = *ids.entry(selection).or_insert(next);
                    if id == next {
                        note(&selection.selector);
                        by_number.push(selection);
                    }
                    selections.insert(address_of(selection), id);
                }
            }
        }
        let pods_of = |(cluster, owner): (&'a ClusterName, &'a Cluster)| {
            let known = |(id, endpoint)| (id, PreparedPod { id, endpoint, class: Cell::new(NO_CLASS) });
            let by_id = owner.endpoints.iter().map(known).collect();
            (&**cluster, Pods { cluster, owner, by_id })
        };
        let (mut nets, mut count) = (NetTable::default(), by_number.len() as u32);
        for net in only_nets {
            if nets.of(net).is_empty() {
                nets.insert(net, count);
                count += 1;
            }
        }
        Self {
            inventory,
            plans,
            nets,
            pods: inventory.clusters.iter().map(pods_of).collect(),
            selections,
            index: LabelIndex::new(by_number.iter().map(|selection| &selection.selector)),
            bits: EndBits::new(count),
            by_number,
            sets: NetworkSets::new(inventory),
            classes: RefCell::new(Classes { keys, by_key: FastMap::default() }),
            chains: RefCell::default(),
            chains_by_content: RefCell::default(),
            memos: RefCell::default(),
        }
    }

    /// The same as [`crate::evaluate::evaluate`].
    pub fn evaluate(&self, query: &Query) -> Answer {
        let ends = [self.class_of(&query.source), self.class_of(&query.destination)];
        let of_several =
            ends[0].pod.and_then(|pod| pod.endpoint.planned.as_ref()).is_some_and(|planned| planned.several);
        answer(query, of_several, |_, direction| {
            let pod = ends[usize::from(direction == Direction::Ingress)].pod?;
            let chain = self.chain(pod, direction);
            let facts =
                CachedFacts { prepared: self, query, ends: &ends, enforcer: pod.cluster, matched: Default::default() };
            self.set_bits(&facts, chain.named);
            let names_ports = |pod: Pod<'_>| !pod.endpoint.ports.is_empty();
            let packet = PacketOutline::new(query, ends[1].pod.is_some_and(names_ports), &self.bits);
            let federated_allow_final = pod.owner.federated_allow_final;
            let enforcer = Enforcer { facts: &facts, cluster: pod.cluster, federated_allow_final };
            let tiers = chain.tiers.iter().zip(&chain.rules).filter_map(|(tier, PlainRules { outlines, rules })| {
                let candidates = outlines.iter().zip(rules).filter(|(outline, _)| packet.may_match(outline));
                tier.with_rules(candidates.map(|(_, rule)| (rule.policy, rule.rule, rule.selects)))
            });
            Some(enforcer.judge(tiers, query))
        })
    }

    /// Sets the bits of the selections that match the ends or may match them, and of the nets that contain them. Only for ends with a
    /// rule that requires one of these.
    fn set_bits(&self, facts: &CachedFacts<'_, '_>, named: [bool; 2]) {
        self.bits.clear();
        let addresses = [facts.query.source.address, facts.query.destination.address];
        for end in [0, 1].into_iter().filter(|end| named[*end]) {
            facts.matched(end).iter().for_each(|(number, _)| self.bits.set(end, *number));
            self.nets.containing(addresses[end]).for_each(|number| self.bits.set(end, number));
        }
    }

    fn chain(&self, pod: Pod<'a>, direction: Direction) -> Chain<'a> {
        if let Some(chain) = self.chains.borrow().get(&(pod.class, direction)) {
            return chain.clone();
        }
        let Some(plan) = self.plans.get(pod.cluster).filter(|_| !pod.endpoint.host_network) else {
            return Rc::default();
        };
        let found = plan.applying(pod.owner, pod.id, pod.endpoint, direction);
        let key = (pod.cluster.as_ptr() as usize, direction, found);
        let known = self.chains_by_content.borrow().get(&key).cloned();
        let chain = known.unwrap_or_else(|| {
            let tiers = in_tiers(key.2.iter().map(|(at, selects)| {
                let (layer, policy) = plan.policies[*at as usize];
                (layer, policy, *selects)
            }));
            let rules: Vec<_> = tiers.iter().map(|tier| self.plain_rules(tier, direction)).collect();
            let outlines = || rules.iter().flat_map(|rules| &rules.outlines);
            let named = [0, 1].map(|end| outlines().any(|outline| outline.ends[end] != ANY));
            let chain = Rc::new(Plain { tiers, rules, named });
            self.chains_by_content.borrow_mut().insert(key, chain.clone());
            chain
        });
        self.chains.borrow_mut().insert((pod.class, direction), chain.clone());
        chain
    }

    /// The rules of a tier that can decide. A rule with the conditions of an earlier rule never decides, except after Log rules and
    /// rules with parts that cannot be evaluated.
    fn plain_rules(&self, tier: &TierView<'a>, direction: Direction) -> PlainRules<'a> {
        let mut seen = FastSet::default();
        let mut plain = PlainRules::default();
        let number = |selection: &Option<Selection>| {
            selection.as_ref().and_then(|it| self.selections.get(&address_of(it))).copied()
        };
        for policy in &tier.policies {
            for rule in rules(policy, direction).unwrap_or_default() {
                let meaning = Rule { index: 0, ..rule.clone() };
                let selects = tier.selects(policy);
                let certain = rule.unknown_because().is_none() && selects == Tri::Yes;
                let ends = rule.action != Action::Log && certain;
                if ends && !seen.insert(meaning) {
                    continue;
                }
                let end = |end: &EntityMatch| {
                    number(&end.selection)
                        .or_else(|| only(&end.nets).and_then(|net| self.nets.of(net).first().copied()))
                };
                let ends = [end(&rule.source), end(&rule.destination)];
                plain.outlines.push(Outline::of(rule, ends));
                plain.rules.push(PlainRule { policy, rule, selects });
            }
        }
        plain
    }

    fn class_of(&self, end: &End) -> EndClass<'a> {
        let pod = end.pod.as_ref().and_then(|(cluster, id)| {
            let pods = self.pods.get(&**cluster)?;
            let PreparedPod { id, endpoint, class: known } = pods.by_id.get(id)?;
            if known.get() == NO_CLASS {
                known.set(self.classes.borrow_mut().pod(pods.cluster, id, endpoint));
            }
            let class = known.get();
            Some(Pod { class, cluster: pods.cluster, owner: pods.owner, id, endpoint })
        });
        EndClass { pod, sets: self.sets.containing(end.address) }
    }

    /// The selections that match an end, cached.
    fn matched(&self, end: &EndClass<'a>, enforcer: &'a str) -> Matched {
        let mut memos = self.memos.borrow_mut();
        let key = (end.pod.map(|pod| pod.class), end.sets.clone(), enforcer.as_ptr() as usize);
        if let Some(matched) = memos.by_class.get(&key) {
            return matched.clone();
        }
        let matched = self.evaluate_selections(end, enforcer);
        let bytes = MEMO_KEY_BYTES + std::mem::size_of_val(&*matched);
        if memos.bytes + bytes > MEMO_BYTES {
            *memos = Memos::default();
        }
        memos.bytes += bytes;
        memos.by_class.insert(key, matched.clone());
        matched
    }

    /// Evaluates every selection that can match an end.
    fn evaluate_selections(&self, end: &EndClass<'a>, enforcer: &str) -> Matched {
        let mut found: Vec<(u32, Tri)> = Vec::new();
        let mut add = |labels: EffectiveLabels<'_>, selected: &dyn Fn(&Selection) -> Tri| {
            // Where a label may be unknown, its absence excludes nothing.
            let owner = labels.cluster;
            let known = labels.first_hand || !owner.stale && owner.label_grant == LabelGrant::All;
            let known = known && labels.endpoint.run_time_labels().next().is_none();
            let candidates =
                if known { self.index.candidates(&labels) } else { (0..self.by_number.len() as u32).collect() };
            let answers = candidates.into_iter().map(|number| (number, selected(self.by_number[number as usize])));
            found.extend(answers.filter(|(_, answer)| *answer != Tri::No));
        };
        if let Some(Pod { cluster, owner, id, endpoint, .. }) = end.pod {
            let labels = EffectiveLabels { cluster: owner, id, endpoint, first_hand: enforcer == cluster };
            add(labels, &|selection| selects(enforcer, selection, cluster, owner, id, endpoint));
        }
        for set in end.sets.iter() {
            let (cluster, id, endpoint) = self.sets.all[*set as usize];
            let no_cluster = Cluster::default();
            let owner = cluster.and_then(|cluster| self.inventory.clusters.get(cluster)).unwrap_or(&no_cluster);
            let first_hand = cluster.is_none_or(|cluster| cluster == enforcer);
            add(EffectiveLabels { cluster: owner, id, endpoint, first_hand }, &|selection| match cluster {
                Some(cluster) => selects(enforcer, selection, cluster, owner, id, endpoint),
                None => self.inventory.selects_federated_set(selection, id),
            });
        }
        found.sort_unstable_by_key(|(number, _)| *number);
        found.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 = kept.1.or(next.1);
            }
            same
        });
        found.into()
    }
}

/// What judges one direction of a pod, laid out to be read quickly.
#[derive(Debug, Default)]
struct Plain<'a> {
    tiers: Vec<TierView<'a>>,
    /// For each tier, in order.
    rules: Vec<PlainRules<'a>>,
    /// Of which ends some rule says which it means.
    named: [bool; 2],
}

/// The rules of a tier, and apart from them, closely packed, what is looked at first.
#[derive(Debug, Default)]
struct PlainRules<'a> {
    outlines: Vec<Outline>,
    rules: Vec<PlainRule<'a>>,
}

#[derive(Debug)]
struct PlainRule<'a> {
    policy: &'a Policy,
    rule: &'a Rule,
    /// Whether the policy selects the pod.
    selects: Tri,
}

fn selections_of(entity: &EntityMatch) -> impl Iterator<Item = &Selection> {
    entity.selection.iter().chain(&entity.not_selection)
}

fn address_of(selection: &Selection) -> usize {
    std::ptr::from_ref(selection) as usize
}

#[derive(Debug, Default)]
struct Memos {
    by_class: FastMap<MemoKey, Matched>,
    bytes: usize,
}

/// The properties of an end that selections evaluate.
#[derive(Debug, Clone)]
struct EndClass<'a> {
    pod: Option<Pod<'a>>,
    sets: Rc<[u32]>,
}

#[derive(Debug, Clone, Copy)]
struct Pod<'a> {
    class: u32,
    cluster: &'a str,
    owner: &'a Cluster,
    id: &'a EndpointId,
    endpoint: &'a Endpoint,
}

/// The endpoints of one cluster.
#[derive(Debug)]
struct Pods<'a> {
    cluster: &'a str,
    owner: &'a Cluster,
    by_id: FastMap<&'a EndpointId, PreparedPod<'a>>,
}

#[derive(Debug)]
struct PreparedPod<'a> {
    id: &'a EndpointId,
    endpoint: &'a Endpoint,
    /// [`NO_CLASS`] until the first use.
    class: Cell<u32>,
}

const NO_CLASS: u32 = u32::MAX;

/// [`Facts`] of one query and one enforcing cluster.
struct CachedFacts<'p, 'a> {
    prepared: &'p Prepared<'a>,
    query: &'p Query,
    ends: &'p [EndClass<'a>; 2],
    enforcer: &'a str,
    /// For source and destination; filled at the first use.
    matched: [OnceCell<Matched>; 2],
}

impl CachedFacts<'_, '_> {
    /// 0 for the source of the query, 1 for the destination.
    fn side(&self, end: &End) -> usize {
        usize::from(!std::ptr::eq(end, &self.query.source))
    }

    fn matched(&self, side: usize) -> &Matched {
        self.matched[side].get_or_init(|| self.prepared.matched(&self.ends[side], self.enforcer))
    }
}

impl Facts for CachedFacts<'_, '_> {
    fn selected(&self, _enforcer: &str, selection: &Selection, end: &End) -> Tri {
        let number = self.prepared.selections[&address_of(selection)];
        let matched = self.matched(self.side(end));
        matched.binary_search_by_key(&number, |(number, _)| *number).map_or(Tri::No, |at| matched[at].1)
    }

    fn named_port(&self, enforcer: &str, pods: &Selection, name: &str, end: &End, protocol: u8, port: u16) -> Tri {
        let pod = self.ends[self.side(end)].pod.filter(|pod| has_named_port(&pod.endpoint.ports, name, protocol, port));
        pod.map_or(Tri::No, |pod| selects(enforcer, pods, pod.cluster, pod.owner, pod.id, pod.endpoint))
    }

    fn backend(&self, enforcer: &str, service: &ServiceMatch, end: &End, port: Option<(u8, u16)>) -> Tri {
        backend(self.prepared.inventory, enforcer, service, end, port)
    }
}

/// Numbers classes of pods that every selector treats alike.
#[derive(Debug)]
struct Classes<'a> {
    /// The label keys that some selector names.
    keys: FastSet<&'a str>,
    by_key: FastMap<ClassKey<'a>, u32>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct ClassKey<'a> {
    cluster: &'a str,
    namespace: Option<&'a str>,
    account: Option<&'a str>,
    host_network: bool,
    /// As [`crate::workload::seen`] has them.
    labels: Vec<(&'a str, Option<&'a str>)>,
}

impl<'a> Classes<'a> {
    fn relevant_labels(&self, endpoint: &'a Endpoint) -> Vec<(&'a str, Option<&'a str>)> {
        let pairs = endpoint.labels.iter().map(|(key, value)| (&**key, Some(&**value)));
        let unknown = endpoint.run_time_labels().map(|(key, certain)| (&**key, certain.then_some(SOME_VALUE)));
        pairs.chain(unknown).filter(|(key, _)| self.keys.contains(key)).collect()
    }

    fn pod(&mut self, cluster: &'a str, id: &'a EndpointId, endpoint: &'a Endpoint) -> u32 {
        let key = ClassKey {
            cluster,
            namespace: id.namespace.as_deref(),
            account: endpoint.service_account.as_deref(),
            host_network: endpoint.host_network,
            labels: self.relevant_labels(endpoint),
        };
        let next = self.by_key.len() as u32;
        *self.by_key.entry(key).or_insert(next)
    }
}

/// The policies that one cluster enforces, in order, and where to find those that select a pod.
#[derive(Debug)]
struct Plan<'a> {
    policies: Vec<(&'a Layer, &'a Policy)>,
    /// Distinct selectors with the policies that have them.
    subjects: Vec<(&'a Selector, Vec<u32>)>,
    index: LabelIndex<'a>,
}

impl<'a> Plan<'a> {
    fn new(policies: &'a PolicySet, cluster: &str, view: View) -> Self {
        let layers = [Some(&policies.federation), policies.clusters.get(cluster)];
        let mut enforced: Vec<(&Layer, &Policy)> = layers
            .into_iter()
            .flatten()
            .flat_map(|layer| acting(layer, view).into_iter().map(move |policy| (layer, policy)))
            .filter(|(_, policy)| policy.enforcers.contains(cluster, cluster))
            .collect();
        in_order(&mut enforced);
        let mut subjects: Vec<(&Selector, Vec<u32>)> = Vec::new();
        let mut by_selector: FastMap<&str, u32> = FastMap::default();
        for (at, (_, policy)) in enforced.iter().enumerate() {
            let next = subjects.len() as u32;
            let subject = *by_selector.entry(&policy.selector.canonical).or_insert(next);
            if subject == next {
                subjects.push((&policy.selector, Vec::new()));
            }
            subjects[subject as usize].1.push(at as u32);
        }
        let index = LabelIndex::new(subjects.iter().map(|(selector, _)| *selector));
        Self { policies: enforced, subjects, index }
    }

    /// The policies that apply to a pod in a direction, or may, by their places.
    fn applying(&self, owner: &Cluster, id: &EndpointId, endpoint: &Endpoint, direction: Direction) -> Vec<(u32, Tri)> {
        let labels = EffectiveLabels { cluster: owner, id, endpoint, first_hand: true };
        // Where a label is unknown, its absence excludes nothing.
        let candidates = match endpoint.run_time_labels().next() {
            None => self.index.candidates(&labels),
            Some(_) => (0..self.subjects.len() as u32).collect(),
        };
        let mut found: Vec<(u32, Tri)> = candidates
            .into_iter()
            .map(|subject| &self.subjects[subject as usize])
            .map(|(selector, policies)| (selector.evaluate(&labels), policies))
            .filter(|(selects, _)| *selects != Tri::No)
            .flat_map(|(selects, policies)| policies.iter().map(move |at| (*at, selects)))
            .filter(|(at, _)| rules(self.policies[*at as usize].1, direction).is_some())
            .collect();
        found.sort_unstable_by_key(|(at, _)| *at);
        found
    }
}

/// Finds selectors by their required labels.
#[derive(Debug, Default)]
struct LabelIndex<'a> {
    by_label: FastMap<&'a str, ByValue<'a>>,
    /// Selectors without a required label.
    others: Vec<u32>,
    /// The required labels of each selector.
    sketches: Vec<Sketch>,
    hasher: foldhash::fast::RandomState,
}

/// A Bloom filter over labels: one of 256 bits per key, and per key with value. A selector whose bits are not a subset of the
/// endpoint's bits cannot match.
#[derive(Debug, Default, Clone, Copy)]
struct Sketch([u64; 4]);

impl Sketch {
    fn add(&mut self, hash: u64) {
        self.0[(hash >> 6) as usize % 4] |= 1 << (hash % 64);
    }

    fn is_in(&self, all: &Self) -> bool {
        self.0.iter().zip(all.0).all(|(bits, all)| bits & !all == 0)
    }
}

/// The cost of evaluating a selector, relative to comparing its sketch.
const SKETCHED: usize = 8;

#[derive(Debug, Default)]
struct ByValue<'a> {
    any: Vec<u32>,
    of_value: FastMap<&'a str, Vec<u32>>,
}

impl<'a> LabelIndex<'a> {
    /// Selectors are numbered in their order.
    fn new(selectors: impl Iterator<Item = &'a Selector> + Clone) -> Self {
        // How many selectors name each label.
        let mut users: FastMap<Need<'a>, usize> = FastMap::default();
        for selector in selectors.clone() {
            selector.expr.for_each_key(&mut |key| *users.entry((key, None)).or_default() += 1);
            each_value(&selector.expr, &mut |key, value| *users.entry((key, Some(value))).or_default() += 1);
        }
        // Alternatives are not in a sketch: evaluation decides them.
        let cost = |list: &[Need<'a>]| -> usize {
            let all: usize = list.iter().map(|need| users[need]).sum();
            if list.len() == 1 { all * SKETCHED } else { all }
        };
        let mut index = Self::default();
        for (number, selector) in (0..).zip(selectors) {
            let mut sketch = Sketch::default();
            needs::every(&selector.expr)
                .iter()
                .for_each(|need| sketch.add(index.hash_of(need.0, need.1.map(|it| &**it))));
            index.sketches.push(sketch);
            match needs::one_of(&selector.expr, &cost) {
                None => index.others.push(number),
                Some(needs) => {
                    for (key, value) in needs {
                        let by_value = index.by_label.entry(key).or_default();
                        match value {
                            None => by_value.any.push(number),
                            Some(value) => by_value.of_value.entry(value).or_default().push(number),
                        }
                    }
                }
            }
        }
        index
    }

    fn hash_of(&self, key: &str, value: Option<&str>) -> u64 {
        self.hasher.hash_one((key, value))
    }

    /// The selectors that can match, without duplicates. No label may be unknown.
    fn candidates(&self, labels: &EffectiveLabels<'_>) -> Vec<u32> {
        let mut found = self.others.clone();
        let mut sketch = Sketch::default();
        labels.each_known(&mut |key, value| {
            [None, Some(&**value)].into_iter().for_each(|value| sketch.add(self.hash_of(key, value)));
            if let Some(by_value) = self.by_label.get(key) {
                found.extend(&by_value.any);
                found.extend(by_value.of_value.get(&**value).into_iter().flatten());
            }
        });
        found.retain(|number| self.sketches[*number as usize].is_in(&sketch));
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// Calls `visit` with every label value that an expression compares for equality.
fn each_value<'e>(expr: &'e Expr, visit: &mut impl FnMut(&'e Arc<str>, &'e Arc<str>)) {
    match expr {
        Expr::Equal(key, value) | Expr::NotEqual(key, value) => visit(key, value),
        Expr::In(key, values) | Expr::NotIn(key, values) => values.iter().for_each(|value| visit(key, value)),
        Expr::Not(inner) => each_value(inner, visit),
        Expr::And(parts) | Expr::Or(parts) => parts.iter().for_each(|part| each_value(part, visit)),
        _ => {}
    }
}

/// Network sets by the prefixes of their nets.
#[derive(Debug)]
struct NetworkSets<'a> {
    /// With the cluster; `None` is the federation.
    all: Vec<(Option<&'a str>, &'a EndpointId, &'a Endpoint)>,
    nets: NetTable<u32>,
    none: Rc<[u32]>,
}

impl<'a> NetworkSets<'a> {
    fn new(inventory: &'a Inventory) -> Self {
        let of_clusters = inventory.clusters.iter().flat_map(|(name, cluster)| {
            cluster.endpoints.iter().map(move |(id, endpoint)| (Some(&**name), id, endpoint))
        });
        let federated = inventory.federated_sets.iter().map(|(id, endpoint)| (None, id, endpoint));
        let all: Vec<_> =
            of_clusters.filter(|(_, id, _)| id.kind == EndpointKind::NetworkSet).chain(federated).collect();
        let mut nets = NetTable::default();
        for (at, (.., endpoint)) in all.iter().enumerate() {
            endpoint.nets.iter().for_each(|net| nets.insert(*net, at as u32));
        }
        Self { all, nets, none: Rc::new([]) }
    }

    fn containing(&self, address: IpAddr) -> Rc<[u32]> {
        let mut found: Vec<u32> = self.nets.containing(address).collect();
        if found.is_empty() {
            return self.none.clone();
        }
        found.sort_unstable();
        found.dedup();
        found.into()
    }
}
