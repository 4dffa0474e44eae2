//! The nftables driver: one table `inet hanse`, written over netlink.
//!
//! A restarted agent recognises its rules by the table's name and by the comment of the one rule in the chain `state`: generation, digest
//! and epoch.

mod conntrack;
mod expression;
pub mod flows;
mod interfaces;
mod learned;
mod netlink;
mod probe;
mod render;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_ruleset::{Digest, EndpointId, Family, Generation, LocalEndpoint, PolicyId, RuleSet, SetId, SetKind};

use self::learned::LearnedMembers;
use self::netlink::{Attributes, BatchError, Netlink, attributes, text_of};
use self::write::{Closed, Tag, Writer, join};
use crate::{
    Applied, Backend, Decisions, Error, Finding, Found, LearnedAddress, Object, Refusal, Rejection, Settings, Uplinks,
    uplinks,
};

const TABLE: &str = "hanse";
const GET_CHAIN_RULES: u16 = (10 << 8) | 7;
const GET_SET_ELEMENTS: u16 = (10 << 8) | 13;
const EVENT_GROUP: u32 = 7;
const FAMILY_INET: u8 = 1;
/// Sets with the sources of answers to probes: of those with the node's address, and of those with another pod's.
const PROBE_SETS: [&str; 2] = ["answered", "crossed"];
/// How often a generation is tried, each time with more refused objects closed.
const MAX_ATTEMPTS: usize = 8;

/// The layout of the table. [`Settings`] become one; tests and benchmarks write their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub table: String,
    /// See [`Settings::ct_mark_mask`].
    pub ct_mark_mask: u32,
    /// See [`Settings::packet_mark_mask`]. Only the lowest two bits are used.
    pub packet_mark_mask: u32,
    /// Interfaces that lead out of the node. A packet from any other interface must come from where its source is routed to.
    pub uplinks: Vec<String>,
    /// Rules report their decisions to [`flows::Flows`]. Only for a kernel that supports it: others refuse the table.
    pub flows: bool,
}

impl Default for Config {
    fn default() -> Self {
        let Settings { ct_mark_mask, packet_mark_mask, .. } = Settings::default();
        Self { table: TABLE.into(), ct_mark_mask, packet_mark_mask, uplinks: Vec::new(), flows: false }
    }
}

/// The number of a judgement, from 1: connections judged under another number are judged again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u32);

impl Config {
    fn ct_mark(&self, epoch: Epoch, allowed: bool) -> u32 {
        ((epoch.0 << 1) | u32::from(allowed)) << self.ct_mark_mask.trailing_zeros()
    }

    fn last_epoch(&self) -> Epoch {
        Epoch((1 << (self.ct_mark_mask.count_ones() - 1)) - 1)
    }

    fn packet_mark_mask(&self) -> u32 {
        0b11 << self.packet_mark_mask.trailing_zeros()
    }

    fn packet_mark(&self, bits: u32) -> u32 {
        bits << self.packet_mark_mask.trailing_zeros()
    }
}

#[derive(Debug)]
pub struct Nftables {
    config: Config,
    /// Uplinks are read from the routes whenever a rule set is adopted or applied.
    detects_uplinks: bool,
    netlink: Netlink,
    events: Netlink,
    /// The rules in the kernel, when every object of them is known.
    installed: Option<Installed>,
    /// The rule set that was committed last, which a repair restores.
    applied: Option<Arc<RuleSet>>,
    /// The kernel may have other rules than `applied`: the whole table is written next, instead of a difference.
    drifted: bool,
    /// What was learned, also what is not written yet.
    learned: LearnedMembers,
    /// Addresses that the last probe was sent to with the address of another pod.
    probed_across: BTreeSet<IpAddr>,
    epoch: Epoch,
}

#[derive(Debug, Clone)]
struct Installed {
    rules: Arc<RuleSet>,
    digest: Digest,
    /// The digest of each set: the digest of the next rule set is computed from what changed.
    set_digests: BTreeMap<SetId, Digest>,
    closed: Closed,
    uplinks: Vec<String>,
    learned: LearnedMembers,
}

/// The digest of a rule set, and of its sets that changed; `None` for sets that are gone.
struct Digested {
    digest: Digest,
    sets: Vec<(SetId, Option<Digest>)>,
}

impl Digested {
    /// Takes time for the changes since `before` only.
    fn new(rules: &RuleSet, before: Option<&Installed>) -> Self {
        let Some(before) = before else {
            let sets: Vec<_> = rules.sets.iter().map(|(id, set)| (*id, Some(Digest::of_set(set)))).collect();
            return Self { digest: rules.digest_with(sets.iter().filter_map(|(_, digest)| *digest)), sets };
        };
        let (mut digest, mut sets, old) = (before.digest, Vec::new(), &before.rules);
        digest.remove(Digest::of_node(&old.node));
        digest.add(Digest::of_node(&rules.node));
        for (id, old, new) in join(Some(&old.sets), &rules.sets) {
            if old.zip(new).is_some_and(|(old, new)| Arc::ptr_eq(old, new)) {
                continue;
            }
            if let Some(known) = before.set_digests.get(id) {
                digest.remove(*known);
            }
            let new = new.map(|set| Digest::of_set(set));
            digest.add(new.unwrap_or_default());
            sets.push((*id, new));
        }
        let mut change = |old: Option<Digest>, new: Option<Digest>| {
            digest.remove(old.unwrap_or_default());
            digest.add(new.unwrap_or_default());
        };
        for (id, old, new) in join(Some(&old.policies), &rules.policies).filter(|(_, a, b)| a.is_some() != b.is_some())
        {
            change(old.map(|_| Digest::of_policy(*id)), new.map(|_| Digest::of_policy(*id)));
        }
        for (id, old, new) in join(Some(&old.chains), &rules.chains).filter(|(_, a, b)| a.is_some() != b.is_some()) {
            change(old.map(|_| Digest::of_chain(*id)), new.map(|_| Digest::of_chain(*id)));
        }
        for (_, old, new) in join(Some(&old.endpoints), &rules.endpoints) {
            if !old.zip(new).is_some_and(|(old, new)| Arc::ptr_eq(old, new)) {
                change(old.map(|it| Digest::of_endpoint(it)), new.map(|it| Digest::of_endpoint(it)));
            }
        }
        Self { digest, sets }
    }

    fn installed(
        self,
        before: Option<Installed>,
        rules: &Arc<RuleSet>,
        closed: Closed,
        uplinks: Vec<String>,
        learned: LearnedMembers,
    ) -> Installed {
        let mut set_digests = before.map(|it| it.set_digests).unwrap_or_default();
        for (id, digest) in self.sets {
            match digest {
                Some(digest) => drop(set_digests.insert(id, digest)),
                None => drop(set_digests.remove(&id)),
            }
        }
        Installed { rules: Arc::clone(rules), digest: self.digest, set_digests, closed, uplinks, learned }
    }
}

/// The comment of the rule in `state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    generation: Generation,
    digest: Digest,
    epoch: Epoch,
    /// The bits of connection marks that the table uses; `None`: written by a version that did not store them.
    ct_mark_mask: Option<u32>,
}

impl State {
    fn comment(self) -> String {
        let Generation { term, number } = self.generation;
        let mask = self.ct_mark_mask.map(|mask| format!(" {mask:#010x}")).unwrap_or_default();
        format!("hanse/2 {term} {number} {} {}{mask}", self.digest, self.epoch.0)
    }

    fn parse(comment: &str) -> Option<Self> {
        let mut parts = comment.split(' ');
        if parts.next()? != "hanse/2" {
            return None;
        }
        let generation = Generation { term: parts.next()?.parse().ok()?, number: parts.next()?.parse().ok()? };
        let digest = Digest(u128::from_str_radix(parts.next()?, 16).ok()?);
        let epoch = Epoch(parts.next()?.parse().ok()?);
        let ct_mark_mask = parts.next().and_then(|mask| u32::from_str_radix(mask.strip_prefix("0x")?, 16).ok());
        Some(Self { generation, digest, epoch, ct_mark_mask })
    }
}

impl Nftables {
    /// Opens netlink in the network namespace of the calling thread, with checked settings.
    ///
    /// # Errors
    /// When netlink is not available.
    pub fn new(settings: Settings) -> Result<Self, Error> {
        let Settings { ct_mark_mask, packet_mark_mask, uplinks } = settings;
        let (detects_uplinks, uplinks) = match uplinks {
            Uplinks::Detected => (true, Vec::new()),
            Uplinks::Named(names) => (false, names),
        };
        let driver = Self::open(Config { ct_mark_mask, packet_mark_mask, uplinks, ..Config::default() })?;
        Ok(Self { detects_uplinks, ..driver })
    }

    /// As [`Self::new`], with a layout.
    ///
    /// # Errors
    /// When netlink is not available.
    pub fn open(config: Config) -> Result<Self, Error> {
        let netlink = Netlink::open().map_err(Error::Access)?;
        let mut events = Netlink::open().map_err(Error::Access)?;
        events.subscribe(EVENT_GROUP).map_err(Error::Access)?;
        Ok(Self {
            config,
            detects_uplinks: false,
            netlink,
            events,
            installed: None,
            applied: None,
            drifted: false,
            learned: LearnedMembers::default(),
            probed_across: BTreeSet::new(),
            epoch: Epoch(0),
        })
    }

    fn detect_uplinks(&mut self, rules: &RuleSet) {
        if self.detects_uplinks {
            self.config.uplinks = uplinks::detect(&rules.node.pod_ranges);
        }
    }

    /// Numbers are reused after the last one, so no connection may have an old one then. They are cleared by halves: while one half is
    /// cleared, connections are judged under the other.
    fn next_epoch(&mut self) -> Result<Epoch, Error> {
        let last = self.config.last_epoch();
        let half = last.0.div_ceil(2);
        let next = if self.epoch < last { Epoch(self.epoch.0 + 1) } else { Epoch(1) };
        let entered = match next.0 {
            1 => 1..half,
            it if it == half => half..last.0 + 1,
            _ => return Ok(next),
        };
        let shift = self.config.ct_mark_mask.trailing_zeros() + 1;
        let mask = self.config.ct_mark_mask;
        conntrack::clear_marks(&mut self.netlink, mask, |mark| entered.contains(&((mark & mask) >> shift)))
            .map_err(Error::Access)?;
        Ok(next)
    }

    /// Records whether another program changed the table since the last call.
    fn check_events(&mut self) -> Result<(), Error> {
        let ours = self.netlink.port();
        let table = &self.config.table;
        let mut changed = false;
        let whole = self.events.events(|event| {
            changed |= event.port != ours
                && event.family == FAMILY_INET
                && attributes(&event.body).get(&1).is_some_and(|name| text_of(name) == *table);
        });
        // Where events were dropped, anything may have changed.
        self.drifted |= changed || !whole.map_err(Error::Access)?;
        Ok(())
    }

    fn commit(&mut self, next: &Arc<RuleSet>, whole: bool) -> Result<Applied, Error> {
        let mut closed = self.installed.as_ref().filter(|_| !whole).map(|it| it.closed.clone()).unwrap_or_default();
        // Objects that are gone need no replacement.
        closed.policies.retain(|id, _| next.policies.contains_key(id));
        closed.sets.retain(|id, _| next.sets.contains_key(id));
        closed.chains.retain(|id, _| next.chains.contains_key(id));
        closed.endpoints.retain(|id, _| next.endpoints.contains_key(id));
        let now = Instant::now();
        self.learned.retain(next, now);
        let nothing_learned = LearnedMembers::default();
        let epoch = self.next_epoch()?;
        let digested = Digested::new(next, self.installed.as_ref());
        for _ in 0..MAX_ATTEMPTS {
            let ct_mark_mask = Some(self.config.ct_mark_mask);
            let state = State { generation: next.generation, digest: digested.digest, epoch, ct_mark_mask };
            let before = self.installed.as_ref().filter(|_| !whole);
            let writer =
                Writer::new(&self.config, before.map(|it| (&*it.rules, &it.closed, &it.uplinks[..])), next, &closed)
                    .with_learned(before.map_or(&nothing_learned, |it| &it.learned), &self.learned, now);
            let batch = writer.write(epoch, &state.comment());
            match self.netlink.commit(batch) {
                Ok(()) => {
                    self.epoch = epoch;
                    let uplinks = self.config.uplinks.clone();
                    let applied = Applied { refused: closed.refusals(next) };
                    let learned = self.learned.clone();
                    self.installed = Some(digested.installed(self.installed.take(), next, closed, uplinks, learned));
                    self.applied = Some(Arc::clone(next));
                    self.drifted = false;
                    return Ok(applied);
                }
                Err(BatchError::Io(error)) => {
                    // It may have taken effect: connections may be marked with its number, which is not used again.
                    self.epoch = epoch;
                    self.drifted = true;
                    return Err(Error::Access(error));
                }
                Err(BatchError::Refused(refused)) => {
                    let reasons = in_words(&refused);
                    tracing::debug!(%reasons, "the kernel refused a batch, closing the refused objects");
                    let is_of_table = refused.iter().any(|(tag, _)| *tag == Tag::Table);
                    if is_of_table || !closed.add(next, refused) {
                        self.installed = None;
                        return Err(Error::Refused(reasons));
                    }
                }
            }
        }
        Err(Error::Refused(format!("still refused after {MAX_ATTEMPTS} attempts")))
    }

    /// The address of the next endpoint in order, of the same family and not the node's.
    fn peer_of(&self, endpoint: &LocalEndpoint, address: IpAddr, own: &BTreeSet<IpAddr>) -> Option<IpAddr> {
        let all = &self.applied.as_ref()?.endpoints;
        let after = all.range((Bound::Excluded(&endpoint.id), Bound::Unbounded));
        let others = after.chain(all.iter()).filter(|(id, _)| **id != endpoint.id);
        let fits = |other: &&IpAddr| other.is_ipv4() == address.is_ipv4() && !own.contains(other);
        others.flat_map(|(_, other)| &other.addresses).find(fits).copied()
    }

    /// The addresses that packets have added to a set, of both families.
    fn recorded(&mut self, set: &str) -> Result<BTreeSet<IpAddr>, Error> {
        let mut recorded = BTreeSet::new();
        for family in ['4', '6'] {
            recorded.extend(self.values(&format!("{set}{family}"))?.iter().filter_map(|bytes| address_of(bytes)));
        }
        Ok(recorded)
    }

    /// The keys of a set in the kernel.
    fn values(&mut self, set: &str) -> Result<BTreeSet<Vec<u8>>, Error> {
        let value = |element: &[u8]| Some(attributes(attributes(element).get(&1)?).get(&1)?.to_vec());
        self.elements(set, value).map_err(Error::Access)
    }

    /// What `read` finds in the elements of a set in the kernel.
    fn elements<T, C: Default + Extend<T>>(
        &mut self,
        set: &str,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> std::io::Result<C> {
        let query = Attributes::default().text(1, &self.config.table).text(2, set);
        let mut found = C::default();
        for part in self.netlink.query(GET_SET_ELEMENTS, netlink::DUMP, FAMILY_INET, &query)? {
            let part = attributes(&part.body);
            found.extend(part.get(&3).map(|list| netlink::list(list)).into_iter().flatten().filter_map(&read));
        }
        Ok(found)
    }

    fn read_state(&mut self) -> Result<Option<State>, Error> {
        let query = Attributes::default().text(1, &self.config.table).text(2, "state");
        let rules = match self.netlink.query(GET_CHAIN_RULES, netlink::DUMP, FAMILY_INET, &query) {
            Ok(rules) => rules,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::Access(error)),
        };
        let comment = |body: &[u8]| {
            let rule = attributes(body);
            (text_of(rule.get(&1)?) == self.config.table && text_of(rule.get(&2)?) == "state").then_some(())?;
            // Type 0 is the comment, then its length.
            let data = rule.get(&7)?.get(2..)?;
            State::parse(&text_of(data))
        };
        Ok(rules.iter().find_map(|rule| comment(&rule.body)))
    }

    /// The learned members of the sets of `rules` in the kernel.
    fn read_learned(&mut self, rules: &RuleSet) -> Result<LearnedMembers, Error> {
        let (mut learned, now) = (LearnedMembers::default(), Instant::now());
        for id in rules.sets.values().filter(|set| set.kind() == SetKind::Addresses).map(|set| set.id) {
            for family in [Family::V4, Family::V6] {
                let members: Vec<LearnedAddress> = match self.elements(&render::set_name(id, family), learned_element) {
                    Ok(members) => members,
                    // Another program removed it.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(Error::Access(error)),
                };
                if !members.is_empty() {
                    learned.add(id, &members, now);
                }
            }
        }
        Ok(learned)
    }

    /// Commits the difference to `next`; the whole table where that is refused.
    fn enforce(&mut self, next: &Arc<RuleSet>) -> Result<Applied, Error> {
        let whole = self.installed.is_none() || self.drifted;
        match self.commit(next, whole) {
            // The known state of the kernel may be wrong.
            Err(Error::Refused(reason)) if !whole => {
                tracing::warn!(%reason, "the kernel refused the difference, writing the whole table");
                self.commit(next, true)
            }
            result => result,
        }
    }
}

/// Refusals of a batch, for people.
fn in_words(refused: &[(Tag, std::io::Error)]) -> String {
    const NAMED: usize = 3;
    let text = |(tag, error): &(Tag, std::io::Error)| format!("{tag}: {error}");
    // Where the table is refused, so is everything in it.
    if let Some(of_table) = refused.iter().find(|(tag, _)| *tag == Tag::Table) {
        return text(of_table);
    }
    let mut all: Vec<String> = refused.iter().map(text).collect();
    all.dedup();
    let more = all.len().saturating_sub(NAMED);
    all.truncate(NAMED);
    all.extend((more > 0).then(|| format!("{more} more")));
    all.join("; ")
}

/// An element that ends.
fn learned_element(element: &[u8]) -> Option<LearnedAddress> {
    const KEY: u16 = 1;
    const EXPIRATION: u16 = 5;
    let element = attributes(element);
    let left_ms = u64::from_be_bytes(*element.get(&EXPIRATION)?.first_chunk()?);
    let address = address_of(attributes(element.get(&KEY)?).get(&1)?)?;
    Some(LearnedAddress { address, time_to_live: Duration::from_millis(left_ms) })
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

impl Backend for Nftables {
    fn adopt(&mut self, expected: Option<&Arc<RuleSet>>) -> Result<Found, Error> {
        let Some(state) = self.read_state()? else {
            // Marks of a former agent could be taken for judgements.
            conntrack::clear_marks(&mut self.netlink, self.config.ct_mark_mask, |_| true).map_err(Error::Access)?;
            return Ok(Found::Nothing);
        };
        self.epoch = state.epoch;
        let (mask, former) = (self.config.ct_mark_mask, state.ct_mark_mask);
        if let Some(former) = former.filter(|former| *former != mask) {
            // Nothing reads the former bits any more, and those of another program could be taken for judgements.
            for mask in [former, mask] {
                conntrack::clear_marks(&mut self.netlink, mask, |_| true).map_err(Error::Access)?;
            }
        }
        if let Some(rules) = expected.filter(|rules| rules.digest() == state.digest) {
            self.learned = self.read_learned(rules)?;
            // Another program may have changed them while no agent ran.
            (self.applied, self.drifted) = (Some(Arc::clone(rules)), true);
        }
        Ok(Found::Rules { generation: state.generation, digest: state.digest })
    }

    fn apply(&mut self, next: &Arc<RuleSet>) -> Result<Applied, Error> {
        self.detect_uplinks(next);
        self.check_events()?;
        self.enforce(next)
    }

    fn repair(&mut self) -> Result<bool, Error> {
        self.check_events()?;
        let Some(rules) = self.applied.clone() else { return Ok(false) };
        let drifted = self.drifted;
        if drifted || self.learned.has_ended(Instant::now()) {
            self.enforce(&rules)?;
        }
        Ok(drifted)
    }

    fn learn(&mut self, set: SetId, members: &[LearnedAddress]) -> Result<usize, Error> {
        self.check_events()?;
        let is_addresses = |rules: &Arc<RuleSet>| rules.sets.get(&set).map(|it| it.kind()) == Some(SetKind::Addresses);
        let Some(rules) = self.applied.clone().filter(is_addresses) else { return Ok(members.len()) };
        let before = self.learned.clone();
        let left_out = self.learned.add(set, members, Instant::now());
        if !self.learned.same(&before, set) {
            self.enforce(&rules)?;
        }
        Ok(left_out)
    }

    fn probe(&mut self, endpoints: &[Arc<LocalEndpoint>]) -> Result<(), Error> {
        let mut batch = netlink::Batch::new();
        for set in PROBE_SETS.iter().flat_map(|set| [format!("{set}4"), format!("{set}6")]) {
            let all = Attributes::default().text(1, &self.config.table).text(2, &set);
            batch.push(Tag::Base, write::DELETE_ELEMENTS, 0, FAMILY_INET, &all);
        }
        match self.netlink.commit(batch) {
            Ok(()) => {}
            Err(BatchError::Io(error)) => return Err(Error::Access(error)),
            Err(BatchError::Refused(refused)) => return Err(Error::Refused(in_words(&refused))),
        }
        // Otherwise no pod would ever answer, and the pods would be reported for it.
        probe::check().map_err(|error| {
            Error::Access(std::io::Error::new(error.kind(), format!("open a raw socket (capability NET_RAW): {error}")))
        })?;
        let own = interfaces::own_addresses().map_err(Error::Access)?;
        self.probed_across.clear();
        for endpoint in endpoints {
            for address in endpoint.addresses.iter().filter(|address| !own.contains(address)) {
                let peer = self.peer_of(endpoint, *address, &own);
                // Without another pod no traffic can bypass the hooks.
                if peer.is_some() {
                    self.probed_across.insert(*address);
                }
                for from in std::iter::once(None).chain(peer.map(Some)) {
                    if let Err(error) = probe::send_request(from, *address) {
                        tracing::debug!(%address, %error, "not probed");
                    }
                }
            }
        }
        Ok(())
    }

    fn findings(&mut self, endpoints: &[Arc<LocalEndpoint>]) -> Result<BTreeMap<EndpointId, Finding>, Error> {
        let [answered, crossed] = PROBE_SETS.map(|set| self.recorded(set));
        let (answered, crossed) = (answered?, crossed?);
        let survey = interfaces::survey().map_err(Error::Access)?;
        // The interface to which kube-proxy binds the addresses of services in IPVS mode.
        let balances_by_ipvs = nix::net::if_::if_nametoindex("kube-ipvs0").is_ok();
        let of_address = |address: IpAddr| {
            if survey.own.contains(&address) {
                Finding::HostNetwork(address)
            } else if !answered.contains(&address) {
                Finding::Silent(address)
            } else if self.probed_across.contains(&address) && !crossed.contains(&address) {
                Finding::Bypassed(address)
            } else {
                Finding::Enforced
            }
        };
        let second = |endpoint: &LocalEndpoint| {
            let home =
                survey.behind.iter().find(|it| endpoint.addresses.iter().any(|own| it.addresses.contains(own)))?;
            (home.ways.len() > 1).then(|| Finding::SecondInterface(home.ways.join(", ")))
        };
        let finding = |endpoint: &Arc<LocalEndpoint>| {
            let each = endpoint.addresses.iter().map(|address| of_address(*address));
            let worse = each.into_iter().find(|finding| *finding != Finding::Enforced);
            let all = if balances_by_ipvs { Finding::Ipvs } else { Finding::Enforced };
            worse.or_else(|| second(endpoint)).unwrap_or(all)
        };
        Ok(endpoints.iter().map(|endpoint| (endpoint.id.clone(), finding(endpoint))).collect())
    }

    fn decisions(&mut self) -> std::io::Result<Box<dyn Decisions>> {
        let listener = flows::Listener::open(&self.config.table)?;
        self.config.flows = true;
        Ok(Box::new(listener))
    }

    fn cleanup(&mut self) -> Result<(), Error> {
        let state = self.read_state()?;
        let mut batch = netlink::Batch::new();
        let table = Attributes::default().text(1, &self.config.table);
        // Created first: deleting a missing table would fail.
        batch.push(Tag::Table, write::NEW_TABLE, netlink::CREATE, FAMILY_INET, &table);
        batch.push(Tag::Table, write::DELETE_TABLE, 0, FAMILY_INET, &table);
        match self.netlink.commit(batch) {
            Ok(()) => {}
            Err(BatchError::Io(error)) => return Err(Error::Access(error)),
            Err(BatchError::Refused(refused)) => return Err(Error::Refused(in_words(&refused))),
        }
        (self.installed, self.applied, self.learned) = (None, None, LearnedMembers::default());
        // Without rules of Hanse, the marks are of other programs.
        let Some(state) = state else { return Ok(()) };
        let mask = state.ct_mark_mask.unwrap_or(self.config.ct_mark_mask);
        conntrack::clear_marks(&mut self.netlink, mask, |_| true).map_err(Error::Access)
    }
}

/// The sets that a policy names.
fn sets_of(policy: &hanse_ruleset::Policy) -> BTreeSet<SetId> {
    let peers = policy.rules.iter().flat_map(|rule| [&rule.source, &rule.destination]);
    peers
        .flat_map(|peer| {
            let named = peer.in_sets.iter().flatten().chain(&peer.not_sets).chain(&peer.in_sockets);
            named.chain(&peer.port_sets).chain(&peer.not_port_sets).copied()
        })
        .collect()
}

impl Closed {
    /// Closes the refused objects. Returns whether there are new ones.
    fn add(&mut self, next: &RuleSet, refused: Vec<(Tag, std::io::Error)>) -> bool {
        let before = self.len();
        for (tag, error) in refused {
            let rejection = Rejection { error: error.to_string(), set: None };
            match tag {
                Tag::Policy(id) => drop(self.policies.insert(id, rejection)),
                Tag::Chain(id) => drop(self.chains.insert(id, rejection)),
                Tag::Endpoint(id) => drop(self.endpoints.insert(id, rejection)),
                Tag::Set(id) => {
                    let users = next.policies.iter().filter(|(_, policy)| sets_of(policy).contains(&id));
                    for (policy, _) in users {
                        self.policies.insert(*policy, Rejection { set: Some(id), ..rejection.clone() });
                    }
                    self.sets.insert(id, rejection);
                }
                Tag::Table | Tag::Base | Tag::Removal => {}
            }
        }
        self.len() > before
    }

    fn len(&self) -> usize {
        self.policies.len() + self.sets.len() + self.chains.len() + self.endpoints.len()
    }

    fn refusals(&self, rules: &RuleSet) -> Vec<Refusal> {
        let policy = |id: &PolicyId| {
            let name = rules.policies.get(id).map_or_else(|| id.to_string().into(), |policy| Arc::clone(&policy.name));
            Object::Policy { id: *id, name }
        };
        let policies = self.policies.iter().map(|(id, rejection)| (policy(id), rejection));
        let sets = self.sets.iter().map(|(id, rejection)| (Object::Set(*id), rejection));
        let chains = self.chains.iter().map(|(id, rejection)| (Object::Chain(*id), rejection));
        let endpoints = self.endpoints.iter().map(|(id, rejection)| (Object::Endpoint(id.clone()), rejection));
        let all = policies.chain(sets).chain(chains).chain(endpoints);
        all.map(|(object, rejection)| Refusal { object, rejection: rejection.clone() }).collect()
    }
}
