//! The evaluator for many questions: the rules are judged by the reference's own code ([`crate::evaluate`]), while what
//! that code asks is looked up in indexes and remembered.
//!
//! - Pods with the same cluster, namespace, account and labels form a class, labels that no selector names aside: which
//!   policies apply to it, and which selections hold it, is found once.
//! - The policies of a cluster are sorted once; those of one class are found by a label that their selectors require.
//! - Network sets are found by the prefixes of their nets.
//!
//! It borrows what it was made of, so it never goes stale; it remembers behind `RefCell`, so it belongs to one thread.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;

use ipnet::IpNet;

use crate::evaluate::{
    Answer, Court, Direction, End, Facts, Query, TierView, View, acting, answer, backend, in_order, in_tiers,
    named_port, rules,
};
use crate::inventory::{Cluster, EffectiveLabels, Endpoint, EndpointId, EndpointKind, Inventory, Labels, selects};
use crate::model::{
    Action, ClusterName, ClusterScope, EntityMatch, Layer, Policy, PolicySet, Protocol, Rule, Selection, ServiceMatch,
};
use crate::selector::{Expr, Label, LabelLookup as _, Selector};
use crate::tri::Tri;

type Chain<'a> = Rc<Plain<'a>>;
/// A cluster (the address of its name), a direction, and the policies that apply.
type ChainKey = (usize, Direction, Vec<u32>);
/// By the number of the selection; `None` was not asked yet.
type Answers = Rc<[Cell<Option<Tri>>]>;
/// A class, the network sets that hold the address, and the enforcing cluster (the address of its name).
type MemoKey = (Option<u32>, Rc<[u32]>, usize);
type FastSet<T> = std::collections::HashSet<T, foldhash::fast::RandomState>;
type FastMap<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// What may be remembered about selections, in bytes: one byte for each selection of a class and an enforcing cluster.
/// 256 MiB hold 25,000 classes of a state with 10,000 selections; when it is full, everything is forgotten.
const MEMO_BYTES: usize = 256 << 20;

/// A set of policies and an inventory, ready to be asked.
#[derive(Debug)]
pub struct Prepared<'a> {
    inventory: &'a Inventory,
    plans: FastMap<&'a str, Plan<'a>>,
    pods: FastMap<&'a str, Pods<'a>>,
    /// By the address of the selection in the policy set.
    selections: FastMap<usize, u32>,
    selection_count: usize,
    sets: NetworkSets<'a>,
    classes: RefCell<Classes<'a>>,
    /// By class and direction.
    chains: RefCell<FastMap<(u32, Direction), Chain<'a>>>,
    chains_by_content: RefCell<FastMap<ChainKey, Chain<'a>>>,
    memos: RefCell<Memos>,
}

impl<'a> Prepared<'a> {
    pub fn new(policies: &'a PolicySet, inventory: &'a Inventory, view: View) -> Self {
        let plans = inventory.clusters.keys().map(|cluster| (&**cluster, Plan::new(policies, cluster, view))).collect();
        let mut selections = FastMap::default();
        let mut ids: FastMap<&Selection, u32> = FastMap::default();
        let layers = [&policies.federation].into_iter().chain(policies.clusters.values());
        let mut keys = FastSet::default();
        let mut note = |selector: &'a Selector| {
            selector.expr.for_each_key(&mut |key| {
                keys.insert(&**key);
            });
        };
        for policy in layers.flat_map(|layer| layer.policies.values()) {
            note(&policy.selector);
            for rule in [&policy.ingress, &policy.egress].into_iter().flatten().flatten() {
                for selection in [&rule.source, &rule.destination].into_iter().flat_map(selections_of) {
                    let next = ids.len() as u32;
                    let id = *ids.entry(selection).or_insert(next);
                    if id == next {
                        note(&selection.selector);
                    }
                    selections.insert(address_of(selection), id);
                }
            }
        }
        let pods_of = |(cluster, owner): (&'a ClusterName, &'a Cluster)| {
            let by_id = owner.endpoints.iter().map(|(id, endpoint)| (id, (id, endpoint))).collect();
            (&**cluster, Pods { cluster, owner, by_id })
        };
        Self {
            inventory,
            plans,
            pods: inventory.clusters.iter().map(pods_of).collect(),
            selections,
            selection_count: ids.len(),
            sets: NetworkSets::new(inventory),
            classes: RefCell::new(Classes { keys, by_key: FastMap::default(), by_endpoint: FastMap::default() }),
            chains: RefCell::default(),
            chains_by_content: RefCell::default(),
            memos: RefCell::default(),
        }
    }

    /// The same as [`crate::evaluate::evaluate`].
    pub fn evaluate(&self, query: &Query) -> Answer {
        let ends = [self.class_of(&query.source), self.class_of(&query.destination)];
        answer(query, |_, direction| {
            let pod = ends[usize::from(direction == Direction::Ingress)].pod?;
            let facts =
                Remembered { prepared: self, query, memos: ends.each_ref().map(|end| self.memo(end, pod.cluster)) };
            let chain = self.chain(pod, direction);
            let federated_allow_final = pod.owner.federated_allow_final;
            let court = Court { facts: &facts, enforcer: pod.cluster, federated_allow_final };
            let candidates = |tier: usize| {
                let rules = chain.rules[tier].iter().filter(|rule| facts.may_match(rule));
                rules.map(|rule| (rule.policy, rule.rule))
            };
            Some(court.judge(&chain.tiers, candidates, query))
        })
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
            let tiers = in_tiers(key.2.iter().map(|at| plan.policies[*at as usize]));
            let rules = tiers.iter().map(|tier| self.plain_rules(tier, direction)).collect();
            let chain = Rc::new(Plain { tiers, rules });
            self.chains_by_content.borrow_mut().insert(key, chain.clone());
            chain
        });
        self.chains.borrow_mut().insert((pod.class, direction), chain.clone());
        chain
    }

    /// The rules of a tier that can decide: one that does what an earlier one does, where that one matches, never comes
    /// to it. Log rules speak each time.
    fn plain_rules(&self, tier: &TierView<'a>, direction: Direction) -> Vec<PlainRule<'a>> {
        let mut seen = FastSet::default();
        let mut plain = Vec::new();
        let number = |selection: &Option<Selection>| {
            selection.as_ref().and_then(|it| self.selections.get(&address_of(it))).copied()
        };
        for policy in &tier.policies {
            for rule in rules(policy, direction).unwrap_or_default() {
                let meaning = Rule { index: 0, ..rule.clone() };
                if rule.action != Action::Log && !seen.insert(meaning) {
                    continue;
                }
                plain.push(PlainRule {
                    policy,
                    rule,
                    protocol: rule.protocol.map(Protocol::number),
                    ends: [number(&rule.source.selection), number(&rule.destination.selection)],
                });
            }
        }
        plain
    }

    fn class_of(&self, end: &End) -> EndClass<'a> {
        let pod = end.pod.as_ref().and_then(|(cluster, id)| {
            let pods = self.pods.get(&**cluster)?;
            let (id, endpoint) = pods.by_id.get(id).copied()?;
            let class = self.classes.borrow_mut().pod(pods.cluster, id, endpoint);
            Some(Pod { class, cluster: pods.cluster, owner: pods.owner, id, endpoint })
        });
        EndClass { pod, sets: self.sets.holding(end.address) }
    }

    fn memo(&self, end: &EndClass<'a>, enforcer: &'a str) -> Memo<'a> {
        let mut memos = self.memos.borrow_mut();
        let key = (end.pod.map(|pod| pod.class), end.sets.clone(), enforcer.as_ptr() as usize);
        if let Some(answers) = memos.by_class.get(&key) {
            return Memo { end: end.clone(), answers: answers.clone() };
        }
        memos.bytes += self.selection_count;
        if memos.bytes > MEMO_BYTES {
            *memos = Memos { bytes: self.selection_count, ..Memos::default() };
        }
        let answers: Answers = vec![Cell::new(None); self.selection_count].into();
        memos.by_class.insert(key, answers.clone());
        Memo { end: end.clone(), answers }
    }
}

/// What judges one direction of a pod, laid out to be read quickly.
#[derive(Debug, Default)]
struct Plain<'a> {
    tiers: Vec<TierView<'a>>,
    /// For each tier, in order.
    rules: Vec<Vec<PlainRule<'a>>>,
}

#[derive(Debug)]
struct PlainRule<'a> {
    protocol: Option<u8>,
    /// The numbers of the selections of source and destination.
    ends: [Option<u32>; 2],
    policy: &'a Policy,
    rule: &'a Rule,
}

fn selections_of(entity: &EntityMatch) -> impl Iterator<Item = &Selection> {
    entity.selection.iter().chain(&entity.not_selection)
}

fn address_of(selection: &Selection) -> usize {
    std::ptr::from_ref(selection) as usize
}

#[derive(Debug, Default)]
struct Memos {
    by_class: FastMap<MemoKey, Answers>,
    bytes: usize,
}

/// All that selections see of an end.
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
    by_id: FastMap<&'a EndpointId, (&'a EndpointId, &'a Endpoint)>,
}

#[derive(Debug)]
struct Memo<'a> {
    end: EndClass<'a>,
    answers: Answers,
}

/// [`Facts`] of one query and one enforcing cluster.
struct Remembered<'p, 'a> {
    prepared: &'p Prepared<'a>,
    query: &'p Query,
    memos: [Memo<'a>; 2],
}

impl Remembered<'_, '_> {
    /// Whether a rule is worth asking: not when its protocol, or a selection that was asked before, says no.
    fn may_match(&self, rule: &PlainRule<'_>) -> bool {
        let excluded = |(end, memo): (&Option<u32>, &Memo<'_>)| {
            end.is_some_and(|number| memo.answers[number as usize].get() == Some(Tri::No))
        };
        rule.protocol.is_none_or(|protocol| protocol == self.query.protocol)
            && !rule.ends.iter().zip(&self.memos).any(excluded)
    }
}

impl Facts for Remembered<'_, '_> {
    fn selected(&self, enforcer: &str, selection: &Selection, end: &End) -> Tri {
        let memo = &self.memos[usize::from(!std::ptr::eq(end, &self.query.source))];
        let answer = self.prepared.selections.get(&address_of(selection)).map(|id| &memo.answers[*id as usize]);
        if let Some(known) = answer.and_then(Cell::get) {
            return known;
        }
        let inventory = self.prepared.inventory;
        let mut any = Tri::No;
        if let Some(pod) = memo.end.pod {
            any = any.or(selects(enforcer, selection, pod.cluster, pod.owner, pod.id, pod.endpoint));
        }
        for set in memo.end.sets.iter() {
            any = any.or(match self.prepared.sets.all[*set as usize] {
                (Some(cluster), id, _) => inventory.selects(enforcer, selection, cluster, id),
                (None, id, _) => inventory.selects_federated_set(selection, id),
            });
        }
        if let Some(answer) = answer {
            answer.set(Some(any));
        }
        any
    }

    fn named_port(&self, enforcer: &str, scope: &ClusterScope, name: &str, end: &End, protocol: u8, port: u16) -> Tri {
        named_port(self.prepared.inventory, enforcer, scope, name, end, protocol, port)
    }

    fn backend(&self, enforcer: &str, service: &ServiceMatch, address: IpAddr, port: Option<(u8, u16)>) -> Tri {
        backend(self.prepared.inventory, enforcer, service, address, port)
    }
}

/// Numbers pods that no selector can tell apart.
#[derive(Debug)]
struct Classes<'a> {
    /// The label keys that some selector names.
    keys: FastSet<&'a str>,
    by_key: FastMap<ClassKey<'a>, u32>,
    /// By the address of the endpoint in the inventory.
    by_endpoint: FastMap<usize, u32>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct ClassKey<'a> {
    cluster: &'a str,
    namespace: Option<&'a str>,
    account: Option<&'a str>,
    host_network: bool,
    labels: Vec<(&'a str, &'a str)>,
}

impl<'a> Classes<'a> {
    fn telling(&self, labels: &'a Labels) -> Vec<(&'a str, &'a str)> {
        let pairs = labels.iter().map(|(key, value)| (&**key, &**value));
        pairs.filter(|(key, _)| self.keys.contains(key)).collect()
    }

    fn pod(&mut self, cluster: &'a str, id: &'a EndpointId, endpoint: &'a Endpoint) -> u32 {
        let address = std::ptr::from_ref(endpoint) as usize;
        if let Some(class) = self.by_endpoint.get(&address) {
            return *class;
        }
        let key = ClassKey {
            cluster,
            namespace: id.namespace.as_deref(),
            account: endpoint.service_account.as_deref(),
            host_network: endpoint.host_network,
            labels: self.telling(&endpoint.labels),
        };
        let next = self.by_key.len() as u32;
        let class = *self.by_key.entry(key).or_insert(next);
        self.by_endpoint.insert(address, class);
        class
    }
}

/// The policies that one cluster enforces, in order, and where to find those that select a pod.
#[derive(Debug)]
struct Plan<'a> {
    policies: Vec<(&'a Layer, &'a Policy)>,
    /// Subjects by a label that they require, with its value where they require that too.
    by_label: FastMap<&'a str, ByValue>,
    /// Subjects that require no label.
    others: Vec<u32>,
    subjects: Vec<(&'a Selector, Vec<u32>)>,
}

#[derive(Debug, Default)]
struct ByValue {
    any: Vec<u32>,
    of_value: FastMap<String, Vec<u32>>,
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
        let mut plan =
            Self { policies: enforced, by_label: FastMap::default(), others: Vec::new(), subjects: Vec::new() };
        let mut by_selector: FastMap<&str, u32> = FastMap::default();
        for (at, (_, policy)) in plan.policies.iter().enumerate() {
            let next = plan.subjects.len() as u32;
            let subject = *by_selector.entry(&policy.selector.canonical).or_insert(next);
            if subject == next {
                plan.subjects.push((&policy.selector, Vec::new()));
            }
            plan.subjects[subject as usize].1.push(at as u32);
        }
        plan.index_subjects();
        plan
    }

    /// Each subject under the label that it requires and the fewest others do.
    fn index_subjects(&mut self) {
        let mut all = Vec::new();
        let mut requiring: FastMap<Requirement<'_>, u32> = FastMap::default();
        for (selector, _) in &self.subjects {
            let requirements = required(&selector.expr);
            for requirement in &requirements {
                *requiring.entry(requirement.clone()).or_default() += 1;
            }
            all.push(requirements);
        }
        for (subject, requirements) in (0..).zip(all) {
            // A label with a value before one without, where as many require it.
            let rarest = requirements.into_iter().min_by_key(|it| (requiring[it], it.1.is_none()));
            match rarest {
                None => self.others.push(subject),
                Some((key, None)) => self.by_label.entry(key).or_default().any.push(subject),
                Some((key, Some(values))) => {
                    let by_value = self.by_label.entry(key).or_default();
                    for value in values {
                        by_value.of_value.entry(value.to_owned()).or_default().push(subject);
                    }
                }
            }
        }
    }

    /// The policies that apply to a pod in a direction, by their places.
    fn applying(&self, owner: &Cluster, id: &EndpointId, endpoint: &Endpoint, direction: Direction) -> Vec<u32> {
        let labels = EffectiveLabels { cluster: owner, id, endpoint, first_hand: true };
        let mut candidates = self.others.clone();
        for (key, by_value) in &self.by_label {
            if let Label::Present(value) = labels.label(key) {
                candidates.extend(&by_value.any);
                candidates.extend(by_value.of_value.get(value).into_iter().flatten());
            }
        }
        let mut found: Vec<u32> = candidates
            .into_iter()
            .map(|subject| &self.subjects[subject as usize])
            .filter(|(selector, _)| selector.evaluate(&labels) == Tri::Yes)
            .flat_map(|(_, policies)| policies.iter().copied())
            .filter(|at| rules(self.policies[*at as usize].1, direction).is_some())
            .collect();
        found.sort_unstable();
        found
    }
}

/// A label that must be present, with the values that it may have if not any.
type Requirement<'e> = (&'e str, Option<Vec<&'e str>>);

/// Labels that must be present for the expression to hold.
fn required(expr: &Expr) -> Vec<Requirement<'_>> {
    match expr {
        Expr::Equal(key, value) => vec![(key, Some(vec![value]))],
        Expr::In(key, values) => vec![(key, Some(values.iter().map(|value| &**value).collect()))],
        Expr::Has(key) | Expr::Contains(key, _) | Expr::StartsWith(key, _) | Expr::EndsWith(key, _) => {
            vec![(key, None)]
        }
        Expr::And(parts) => parts.iter().flat_map(required).collect(),
        Expr::All | Expr::Global | Expr::NotEqual(..) | Expr::NotIn(..) | Expr::Not(_) | Expr::Or(_) => Vec::new(),
    }
}

/// Network sets by the prefixes of their nets.
#[derive(Debug)]
struct NetworkSets<'a> {
    /// With the cluster; `None` is the federation.
    all: Vec<(Option<&'a str>, &'a EndpointId, &'a Endpoint)>,
    by_net: FastMap<IpNet, Vec<u32>>,
    /// The lengths in use, for each family.
    lengths: [Vec<u8>; 2],
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
        let mut by_net: FastMap<IpNet, Vec<u32>> = FastMap::default();
        let mut lengths = [Vec::new(), Vec::new()];
        for (at, (.., endpoint)) in all.iter().enumerate() {
            for net in &endpoint.nets {
                by_net.entry(net.trunc()).or_default().push(at as u32);
                lengths[usize::from(matches!(net, IpNet::V6(_)))].push(net.prefix_len());
            }
        }
        for lengths in &mut lengths {
            lengths.sort_unstable();
            lengths.dedup();
        }
        Self { all, by_net, lengths, none: Rc::new([]) }
    }

    fn holding(&self, address: IpAddr) -> Rc<[u32]> {
        let mut found = Vec::new();
        for length in &self.lengths[usize::from(address.is_ipv6())] {
            if let Ok(net) = IpNet::new(address, *length) {
                found.extend(self.by_net.get(&net.trunc()).into_iter().flatten().copied());
            }
        }
        if found.is_empty() {
            return self.none.clone();
        }
        found.sort_unstable();
        found.dedup();
        found.into()
    }
}
