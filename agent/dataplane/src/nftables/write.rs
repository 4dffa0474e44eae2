//! The difference between two rule sets as one batch.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use hanse_ruleset::{
    Chain, ChainId, EndpointId, Family, LocalEndpoint, Members, Policy, PolicyId, Rejection, RuleSet, Set, SetId,
};

use super::expression::{Expression, Verdict, value, verdict_data};
use super::learned::LearnedMembers;
use super::netlink::{Attributes, Batch, CREATE};
use super::render::{
    AnonymousSet, CLEAR_EVERY_MS, Element, INTERVAL, KernelChain, MAP, Render, Rule, SetDefinition, TIMEOUT,
    address_bytes, base_chains, endpoint_elements, epoch_chains, epoch_elements, fixed_sets, interface_key,
    range_elements, set_definitions, set_elements, set_name,
};
use super::{Config, Epoch, FAMILY_INET};

pub const NEW_TABLE: u16 = 0;
pub const DELETE_TABLE: u16 = 2;
pub const NEW_CHAIN: u16 = 3;
const DELETE_CHAIN: u16 = 5;
pub const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const DELETE_SET: u16 = 11;
const NEW_ELEMENTS: u16 = 12;
pub const DELETE_ELEMENTS: u16 = 14;
const APPEND: u16 = 0x800;
const ANONYMOUS_AND_CONSTANT: u32 = 0x1 | 0x2;
/// Elements of one message: at most 120 bytes each, so that the list stays below the 64 KiB of an attribute.
const ELEMENTS_PER_MESSAGE: usize = 500;
/// The end of an element that is deleted in the same batch, in milliseconds.
const ADDED_AGAIN_MS: u64 = 3_600_000;

/// What a message is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tag {
    Table,
    Base,
    Set(SetId),
    Policy(PolicyId),
    Chain(ChainId),
    Endpoint(EndpointId),
    Removal,
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table => f.write_str("table"),
            Self::Base => f.write_str("base of the table"),
            Self::Set(id) => write!(f, "set {id}"),
            Self::Policy(id) => write!(f, "policy {id}"),
            Self::Chain(id) => write!(f, "chain {id}"),
            Self::Endpoint(id) => write!(f, "pod {}/{}", id.namespace, id.name),
            Self::Removal => f.write_str("removal of former objects"),
        }
    }
}

/// Objects that the kernel refused. Objects that deny are in force instead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Closed {
    pub policies: BTreeMap<PolicyId, Rejection>,
    pub sets: BTreeMap<SetId, Rejection>,
    pub chains: BTreeMap<ChainId, Rejection>,
    pub endpoints: BTreeMap<EndpointId, Rejection>,
}

pub struct Writer<'a> {
    config: &'a Config,
    /// `None`: the table is written from nothing.
    before: Option<(&'a RuleSet, &'a Closed, &'a [String])>,
    next: &'a RuleSet,
    closed: &'a Closed,
    /// The learned members of the kernel and the desired ones, at this time.
    learned: Option<(&'a LearnedMembers, &'a LearnedMembers, Instant)>,
    batch: Batch<Tag>,
    anonymous_sets: u32,
}

impl<'a> Writer<'a> {
    pub fn new(
        config: &'a Config,
        before: Option<(&'a RuleSet, &'a Closed, &'a [String])>,
        next: &'a RuleSet,
        closed: &'a Closed,
    ) -> Self {
        Self { config, before, next, closed, learned: None, batch: Batch::new(), anonymous_sets: 0 }
    }

    pub fn with_learned(mut self, before: &'a LearnedMembers, next: &'a LearnedMembers, now: Instant) -> Self {
        self.learned = Some((before, next, now));
        self
    }

    /// The whole change. Sets come first, then chains, then references to them; removals come last.
    pub fn write(mut self, epoch: Epoch, state: &str) -> Batch<Tag> {
        let table = Attributes::default().text(1, &self.config.table);
        self.batch.push(Tag::Table, NEW_TABLE, CREATE, FAMILY_INET, &table);
        if self.before.is_none() {
            self.batch.push(Tag::Table, DELETE_TABLE, 0, FAMILY_INET, &table);
            self.batch.push(Tag::Table, NEW_TABLE, CREATE, FAMILY_INET, &table);
            for set in fixed_sets() {
                self.new_set(&Tag::Base, &set);
            }
        }
        self.write_fixed_elements();
        for (set, element) in epoch_elements(self.config, epoch) {
            self.replace_elements(&Tag::Base, set, &[element]);
        }
        self.write_sets();
        let mut chains = self.chains_to_write();
        let base = self.base_chains_to_write();
        let holding = epoch_chains(self.config, epoch);
        // First every chain, then the rules that jump between them.
        if self.before.is_none() {
            for chain in base.iter().chain(&holding) {
                self.new_chain(&Tag::Base, chain);
            }
            self.new_chain(&Tag::Base, &KernelChain { name: "state".into(), hook: None, rules: Vec::new() });
        }
        for (tag, chain) in &chains {
            self.new_chain(tag, chain);
        }
        for chain in base.iter().chain(&holding) {
            if self.before.is_some() {
                self.flush_chain(&chain.name);
            }
            self.rules(&Tag::Base, chain);
        }
        for (tag, chain) in std::mem::take(&mut chains) {
            if self.before.is_some() {
                self.flush_chain(&chain.name);
            }
            self.rules(&tag, &chain);
        }
        self.write_endpoints();
        if self.before.is_some() {
            self.flush_chain("state");
        }
        self.state_rule(state);
        self.remove();
        self.batch
    }

    fn fixed_elements(&self) -> Vec<(String, Vec<Element>)> {
        let uplinks = self.config.uplinks.iter().map(|name| Element::Key(interface_key(name))).collect();
        let mut fixed = vec![("uplinks".to_owned(), uplinks)];
        for family in [Family::V4, Family::V6] {
            let name = format!("ranges{}", super::render::family_digit(family));
            fixed.push((name, range_elements(&self.next.node, family)));
        }
        fixed
    }

    fn write_fixed_elements(&mut self) {
        let uplinks_same = self.before.is_some_and(|(.., uplinks)| uplinks == self.config.uplinks);
        let ranges_same = self.before.is_some_and(|(before, ..)| before.node.pod_ranges == self.next.node.pod_ranges);
        for (set, elements) in self.fixed_elements() {
            let same = if set == "uplinks" { uplinks_same } else { ranges_same };
            if !same {
                self.replace_elements(&Tag::Base, &set, &elements);
            }
        }
    }

    fn write_sets(&mut self) {
        let closed_before = self.before.map(|(_, closed, _)| closed);
        for (id, before, set) in join(self.before.map(|(before, ..)| &before.sets), &self.next.sets) {
            let Some(set) = set.filter(|_| !self.closed.sets.contains_key(id)) else { continue };
            let tag = Tag::Set(*id);
            match before.filter(|_| closed_before.is_none_or(|closed| !closed.sets.contains_key(id))) {
                None => self.whole_set(&tag, set),
                Some(before) if Arc::ptr_eq(before, set) && !self.learns(*id) => {}
                Some(before) if before.kind() != set.kind() => {
                    for definition in set_definitions(before) {
                        self.delete_set(&definition.name);
                    }
                    self.whole_set(&tag, set);
                }
                Some(before) => self.changed_set(&tag, before, set),
            }
        }
    }

    fn whole_set(&mut self, tag: &Tag, set: &Set) {
        for (definition, family) in set_definitions(set).into_iter().zip([Family::V4, Family::V6]) {
            self.new_set(tag, &definition);
            self.elements(tag, NEW_ELEMENTS, &definition.name, None, &set_elements(&set.members, family));
        }
        if let (Members::Addresses(members), Some((_, learned, now))) = (&set.members, self.learned)
            && let Some(learned) = learned.of(set.id)
        {
            let elements = learned.iter().filter(|(address, _)| !members.contains(address));
            self.learned_elements(tag, set.id, elements, now);
        }
    }

    /// Whether the learned members of a set change.
    fn learns(&self, set: SetId) -> bool {
        self.learned.is_some_and(|(before, next, _)| !before.same(next, set))
    }

    /// Adds elements with a timeout.
    fn learned_elements<'b>(
        &mut self,
        tag: &Tag,
        set: SetId,
        members: impl Iterator<Item = (&'b IpAddr, &'b Instant)> + Clone,
        now: Instant,
    ) {
        for family in [Family::V4, Family::V6] {
            let of_family = members.clone().filter(|(address, _)| Family::of(**address) == family);
            let left = |end: &Instant| u64::try_from((*end - now).as_millis()).unwrap_or(u64::MAX).max(1);
            let elements: Vec<Element> =
                of_family.map(|(address, end)| Element::Ending(address_bytes(*address), left(end))).collect();
            self.elements(tag, NEW_ELEMENTS, &set_name(set, family), None, &elements);
        }
    }

    /// The change of a set with learned members, before or after it. An address that is also compiled has one element, without a timeout.
    /// The kernel may have removed an element that ended: it is added before it is deleted, so that this cannot fail.
    fn changed_learning_set(&mut self, tag: &Tag, id: SetId, before: &BTreeSet<IpAddr>, next: &BTreeSet<IpAddr>) {
        let Some((learned_before, learned_next, now)) = self.learned else { return };
        let nothing = BTreeMap::new();
        let (was, is) = (learned_before.of(id).unwrap_or(&nothing), learned_next.of(id).unwrap_or(&nothing));
        let ended = |(address, end): &(&IpAddr, &Instant)| {
            !before.contains(address) && (next.contains(address) || is.get(address) != Some(end))
        };
        let come = |(address, end): &(&IpAddr, &Instant)| {
            !next.contains(address) && (before.contains(address) || was.get(address) != Some(end))
        };
        for family in [Family::V4, Family::V6] {
            let name = set_name(id, family);
            let of_family = was.iter().filter(ended).filter(|(address, _)| Family::of(**address) == family);
            let keys: Vec<Vec<u8>> = of_family.map(|(address, _)| address_bytes(*address)).collect();
            let again: Vec<Element> = keys.iter().map(|key| Element::Ending(key.clone(), ADDED_AGAIN_MS)).collect();
            let keys: Vec<Element> = keys.into_iter().map(Element::Key).collect();
            self.elements(tag, NEW_ELEMENTS, &name, None, &again);
            self.elements(tag, DELETE_ELEMENTS, &name, None, &keys);
            let compiled = |members| set_elements(&Members::Addresses(members), family);
            let gone = compiled(before.difference(next).copied().collect());
            self.elements(tag, DELETE_ELEMENTS, &name, None, &gone);
            let new = compiled(next.difference(before).copied().collect());
            self.elements(tag, NEW_ELEMENTS, &name, None, &new);
        }
        self.learned_elements(tag, id, is.iter().filter(come), now);
    }

    fn changed_set(&mut self, tag: &Tag, before: &Set, set: &Set) {
        use hanse_ruleset::Members::{Addresses, Nets, Sockets};
        if let ((Addresses(old), Addresses(new)), Some((was, is, _))) = ((&before.members, &set.members), self.learned)
            && (was.of(set.id).is_some() || is.of(set.id).is_some())
        {
            return self.changed_learning_set(tag, set.id, old, new);
        }
        if before.members == set.members {
            return;
        }
        for family in [Family::V4, Family::V6] {
            let name = set_name(set.id, family);
            let (gone, come) = match (&before.members, &set.members) {
                // Merged intervals cannot be changed one by one.
                (Nets(_), _) | (_, Nets(_)) => {
                    let (old, new) = (set_elements(&before.members, family), set_elements(&set.members, family));
                    if old != new {
                        self.replace_elements(tag, &name, &new);
                    }
                    continue;
                }
                (Addresses(old), Addresses(new)) => (
                    set_elements(&Addresses(old.difference(new).copied().collect()), family),
                    set_elements(&Addresses(new.difference(old).copied().collect()), family),
                ),
                (Sockets(old), Sockets(new)) => (
                    set_elements(&Sockets(old.difference(new).copied().collect()), family),
                    set_elements(&Sockets(new.difference(old).copied().collect()), family),
                ),
                _ => continue,
            };
            self.elements(tag, DELETE_ELEMENTS, &name, None, &gone);
            self.elements(tag, NEW_ELEMENTS, &name, None, &come);
        }
    }

    /// Chains that the kernel does not have as `next` needs them: new ones, and those that become closed or open.
    fn chains_to_write(&self) -> Vec<(Tag, KernelChain)> {
        let mut chains = Vec::new();
        let was = self.before.map(|(_, closed, _)| closed);
        for (id, before, policy) in join(self.before.map(|(before, ..)| &before.policies), &self.next.policies) {
            let closed = self.closed.policies.contains_key(id);
            let same = before.is_some() && was.is_some_and(|was| was.policies.contains_key(id) == closed);
            if let Some(policy) = policy.filter(|_| !same) {
                chains.extend(self.policy_chains(*id, policy));
            }
        }
        for (id, before, chain) in join(self.before.map(|(before, ..)| &before.chains), &self.next.chains) {
            let closed = self.closed.chains.contains_key(id);
            let same = before.is_some() && was.is_some_and(|was| was.chains.contains_key(id) == closed);
            if let Some(chain) = chain.filter(|_| !same) {
                chains.extend(self.chain_chains(*id, chain, self.closed));
            }
        }
        chains
    }

    fn renders(&self) -> [Render<'a>; 2] {
        [Family::V4, Family::V6].map(|family| Render { config: self.config, family })
    }

    fn policy_chains(&self, id: PolicyId, policy: &Policy) -> Vec<(Tag, KernelChain)> {
        let closed = self.closed.policies.contains_key(&id);
        let chain = |render: Render<'_>| if closed { render.closed_policy(id) } else { render.policy(id, policy) };
        self.renders().map(|render| (Tag::Policy(id), chain(render))).into()
    }

    fn chain_chains(&self, id: ChainId, chain: &Chain, closed: &Closed) -> Vec<(Tag, KernelChain)> {
        let nothing = Chain { phases: Vec::new(), profile_allows: false };
        let chain = if closed.chains.contains_key(&id) { &nothing } else { chain };
        self.renders()
            .into_iter()
            .flat_map(|render| render.chain(id, chain))
            .map(|chain| (Tag::Chain(id), chain))
            .collect()
    }

    /// All base chains for a new table; for an existing one, those that depend on the node's settings, if they changed.
    fn base_chains_to_write(&self) -> Vec<KernelChain> {
        let all = base_chains(self.config, &self.next.node);
        match self.before {
            None => all,
            Some((before, ..)) if before.node.enforcement != self.next.node.enforcement => all,
            Some((before, ..))
                if before.node.own_streams == self.next.node.own_streams
                    && before.node.unknown_pods == self.next.node.unknown_pods =>
            {
                Vec::new()
            }
            Some(_) => all
                .into_iter()
                .filter(|chain| ["judge", "node"].iter().any(|name| chain.name.starts_with(name)))
                .collect(),
        }
    }

    fn write_endpoints(&mut self) {
        let next = self.next;
        let elements = |rules: &RuleSet, closed: &Closed, id: &EndpointId| -> BTreeSet<(String, Element)> {
            let open = rules.endpoints.get(id).filter(|_| !closed.endpoints.contains_key(id));
            open.map(|endpoint| endpoint_elements(endpoint, is_guarded(rules, endpoint))).unwrap_or_default()
        };
        let mut gone: BTreeMap<String, Vec<Element>> = BTreeMap::new();
        let mut come: Vec<(EndpointId, BTreeSet<(String, Element)>)> = Vec::new();
        let mut touched: BTreeSet<&EndpointId> = next.endpoints.keys().collect();
        if let Some((before, closed, _)) = self.before {
            for (id, endpoint) in &before.endpoints {
                if next.endpoints.get(id).is_some_and(|same| Arc::ptr_eq(same, endpoint) || same == endpoint)
                    && closed.endpoints.contains_key(id) == self.closed.endpoints.contains_key(id)
                {
                    touched.remove(id);
                    continue;
                }
                let new = elements(next, self.closed, id);
                for (set, element) in elements(before, closed, id) {
                    if !new.contains(&(set.clone(), element.clone())) {
                        gone.entry(set).or_default().push(element);
                    }
                }
            }
        }
        for id in touched {
            let mut new = elements(next, self.closed, id);
            if let Some((before, closed, _)) = self.before {
                let old = elements(before, closed, id);
                new.retain(|element| !old.contains(element));
            }
            come.push((id.clone(), new));
        }
        for (set, elements) in gone {
            self.elements(&Tag::Removal, DELETE_ELEMENTS, &set, None, &elements);
        }
        for (id, elements) in come {
            for (set, element) in elements {
                self.elements(&Tag::Endpoint(id.clone()), NEW_ELEMENTS, &set, None, &[element]);
            }
        }
    }

    fn remove(&mut self) {
        let Some((before, closed, _)) = self.before else { return };
        let mut chains = Vec::new();
        for (id, chain, next) in join(Some(&before.chains), &self.next.chains) {
            let Some(chain) = chain.filter(|_| next.is_none()) else { continue };
            chains.extend(self.chain_chains(*id, chain, closed).into_iter().map(|(_, chain)| chain.name));
        }
        for (id, _, _) in join(Some(&before.policies), &self.next.policies).filter(|(_, _, next)| next.is_none()) {
            chains.extend([Family::V4, Family::V6].map(|family| super::render::policy_chain_name(*id, family)));
        }
        for name in &chains {
            self.flush_chain(name);
        }
        for name in &chains {
            let body = self.named(name, 3);
            self.batch.push(Tag::Removal, DELETE_CHAIN, 0, FAMILY_INET, &body);
        }
        for (id, set, next) in join(Some(&before.sets), &self.next.sets) {
            // A set that is refused now and existed before is removed too: the policies that used it are closed.
            let gone = next.is_none() || self.closed.sets.contains_key(id);
            let Some(set) = set.filter(|_| gone && !closed.sets.contains_key(id)) else { continue };
            for definition in set_definitions(set) {
                self.delete_set(&definition.name);
            }
        }
    }

    /// Table and a name in attribute `kind`.
    fn named(&self, name: &str, kind: u16) -> Attributes {
        Attributes::default().text(1, &self.config.table).text(kind, name)
    }

    fn new_chain(&mut self, tag: &Tag, chain: &KernelChain) {
        let mut body = self.named(&chain.name, 3);
        if let Some((kind, hook, priority)) = chain.hook {
            let hook = Attributes::default().u32(1, hook).bytes(2, &priority.to_be_bytes());
            body = body.nest(4, &hook).text(7, kind);
        }
        self.batch.push(tag.clone(), NEW_CHAIN, CREATE, FAMILY_INET, &body);
    }

    fn flush_chain(&mut self, name: &str) {
        let body = self.named(name, 2);
        self.batch.push(Tag::Removal, DELETE_RULE, 0, FAMILY_INET, &body);
    }

    fn rules(&mut self, tag: &Tag, chain: &KernelChain) {
        for rule in &chain.rules {
            self.rule(tag, &chain.name, rule);
        }
    }

    fn rule(&mut self, tag: &Tag, chain: &str, rule: &Rule) {
        let first = self.anonymous_sets;
        for set in &rule.anonymous {
            self.anonymous_set(tag, set);
        }
        let name_of = |index: usize| {
            let id = first + u32::try_from(index).unwrap_or_default() + 1;
            ("__set%d".to_owned(), id)
        };
        let expressions =
            rule.expressions.iter().fold(Attributes::default(), |list, it| list.nest(1, &it.encode(&name_of)));
        let body = self.named(chain, 2).nest(4, &expressions);
        self.batch.push(tag.clone(), NEW_RULE, CREATE | APPEND, FAMILY_INET, &body);
    }

    fn anonymous_set(&mut self, tag: &Tag, set: &AnonymousSet) {
        self.anonymous_sets += 1;
        let id = self.anonymous_sets;
        let body = self
            .named("__set%d", 2)
            .u32(3, INTERVAL | ANONYMOUS_AND_CONSTANT)
            .u32(4, 0)
            .u32(5, set.key_length)
            .u32(10, id);
        self.batch.push(tag.clone(), NEW_SET, CREATE, FAMILY_INET, &body);
        let elements: Vec<Element> =
            set.intervals.iter().map(|(first, last)| Element::Interval(first.clone(), last.clone())).collect();
        self.elements(tag, NEW_ELEMENTS, "__set%d", Some(id), &elements);
    }

    fn state_rule(&mut self, comment: &str) {
        let expression = Expression::Counter.encode(&|_| (String::new(), 0));
        // A comment as nft shows it: type 0, length, text.
        let mut data = vec![0, u8::try_from(comment.len() + 1).unwrap_or(u8::MAX)];
        data.extend(comment.as_bytes());
        data.push(0);
        let body = self.named("state", 2).nest(4, &Attributes::default().nest(1, &expression)).bytes(7, &data);
        self.batch.push(Tag::Base, NEW_RULE, CREATE | APPEND, FAMILY_INET, &body);
    }

    fn new_set(&mut self, tag: &Tag, set: &SetDefinition) {
        const VERDICT_TYPE: u32 = 0xffff_ff00;
        let mut body = self.named(&set.name, 2).u32(3, set.flags).u32(4, set.key_type).u32(5, set.key_length);
        if set.flags & MAP != 0 {
            body = body.u32(6, VERDICT_TYPE);
        }
        self.anonymous_sets += 1;
        body = body.u32(10, self.anonymous_sets);
        if set.flags & TIMEOUT != 0 {
            body = body.u32(12, CLEAR_EVERY_MS);
        }
        self.batch.push(tag.clone(), NEW_SET, CREATE, FAMILY_INET, &body);
    }

    fn delete_set(&mut self, name: &str) {
        let body = self.named(name, 2);
        self.batch.push(Tag::Removal, DELETE_SET, 0, FAMILY_INET, &body);
    }

    fn replace_elements(&mut self, tag: &Tag, set: &str, elements: &[Element]) {
        if self.before.is_some() {
            let body = self.named(set, 2);
            self.batch.push(tag.clone(), DELETE_ELEMENTS, 0, FAMILY_INET, &body);
        }
        self.elements(tag, NEW_ELEMENTS, set, None, elements);
    }

    fn elements(&mut self, tag: &Tag, message: u16, set: &str, id: Option<u32>, elements: &[Element]) {
        for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let list = chunk.iter().fold(Attributes::default(), encode_element);
            let mut body = self.named(set, 2);
            if let Some(id) = id {
                body = body.u32(4, id);
            }
            let flags = if message == NEW_ELEMENTS { CREATE } else { 0 };
            self.batch.push(tag.clone(), message, flags, FAMILY_INET, &body.nest(3, &list));
        }
    }
}

/// The entries of both maps in order of their keys. One walk costs less than a search for each of thousands of keys.
pub fn join<'a, K: Ord, V>(
    before: Option<&'a BTreeMap<K, V>>,
    next: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, Option<&'a V>, Option<&'a V>)> + use<'a, K, V> {
    let (mut before, mut next) = (before.into_iter().flatten().peekable(), next.iter().peekable());
    std::iter::from_fn(move || {
        let order = match (before.peek(), next.peek()) {
            (None, None) => return None,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        let old = if order.is_le() { before.next() } else { None };
        let new = if order.is_ge() { next.next() } else { None };
        let key = old.or(new).map(|(key, _)| key)?;
        Some((key, old.map(|(_, value)| value), new.map(|(_, value)| value)))
    })
}

/// Whether the endpoint's traffic to its node is judged at all.
fn is_guarded(rules: &RuleSet, endpoint: &LocalEndpoint) -> bool {
    let open = |chain: &Arc<Chain>| chain.profile_allows && chain.phases.iter().all(|phase| phase.tiers.is_empty());
    !rules.chains.get(&endpoint.egress_to_node).is_some_and(open)
}

fn encode_element(list: Attributes, element: &Element) -> Attributes {
    const INTERVAL_END: u32 = 1;
    let key = |bytes: &[u8]| Attributes::default().nest(1, &value(bytes));
    match element {
        Element::Key(bytes) => list.nest(1, &key(bytes)),
        Element::Interval(first, last) => {
            let list = list.nest(1, &key(first));
            match successor(last) {
                Some(end) => list.nest(1, &key(&end).u32(3, INTERVAL_END)),
                None => list,
            }
        }
        Element::Ending(bytes, left_ms) => list.nest(1, &key(bytes).u64(4, *left_ms)),
        Element::Jump(bytes, chain) => list.nest(1, &key(bytes).nest(2, &verdict_data(&Verdict::Jump(chain.clone())))),
    }
}

/// The next value of the same width; none after the last.
fn successor(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut next = bytes.to_vec();
    for byte in next.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            return Some(next);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hanse_ruleset::{Action, Peer};

    use super::*;

    /// A policy with a set of `members` addresses.
    fn rules(members: u8) -> RuleSet {
        let set = SetId::of_meaning(&["forbidden"]);
        let rule = hanse_ruleset::Rule {
            action: Action::Deny,
            index: 0,
            unknown: false,
            family: None,
            protocol: None,
            not_protocol: None,
            icmp: None,
            not_icmp: None,
            source: Peer { in_sets: vec![vec![set]], ..Peer::default() },
            destination: Peer::default(),
        };
        let policy = Policy { name: "policy".into(), rules: vec![rule] };
        let addresses = (0..members).map(|last| IpAddr::from(Ipv4Addr::new(10, 0, 0, last)));
        let members = Members::Addresses(addresses.collect());
        RuleSet {
            sets: [(set, Arc::new(Set { id: set, members }))].into(),
            policies: [(policy.id(), Arc::new(policy))].into(),
            ..RuleSet::default()
        }
    }

    #[test]
    fn closes_policies_of_a_set_that_cannot_be_changed() {
        let (before, next, nothing, config) = (rules(1), rules(2), Closed::default(), Config::default());
        let (set, policy) = (*next.sets.keys().next().expect("one"), *next.policies.keys().next().expect("one"));
        let write = |closed: &Closed| {
            let batch = Writer::new(&config, Some((&before, &nothing, &[])), &next, closed).write(Epoch(2), "state");
            [Tag::Set(set), Tag::Policy(policy)].map(|tag| batch.tags().iter().filter(|it| **it == tag).count())
        };
        // One new element; the policy does not change.
        assert_eq!(write(&nothing), [1, 0]);
        let refused = || Rejection { error: "no memory".to_owned(), set: None };
        let closed =
            Closed { sets: [(set, refused())].into(), policies: [(policy, refused())].into(), ..Closed::default() };
        // For both families a chain that exists, and a rule that denies.
        assert_eq!(write(&closed), [0, 4]);
    }

    #[test]
    fn join_yields_every_key_once() {
        let (before, next) = (BTreeMap::from([(1, 'a'), (2, 'b')]), BTreeMap::from([(2, 'B'), (3, 'c')]));
        let walked: Vec<_> = join(Some(&before), &next).map(|(key, a, b)| (*key, a.copied(), b.copied())).collect();
        assert_eq!(walked, [(1, Some('a'), None), (2, Some('b'), Some('B')), (3, None, Some('c'))]);
        assert_eq!(join(None, &next).count(), 2);
    }
}
