//! The state of one cluster, and what it means for each of its nodes.

use std::cmp::Ordering;
use std::sync::Arc;

use hanse_policy::inventory::EndpointKind;
use hanse_policy::model::{self, ClusterName, Layer, Phase, TierDefault, TierId};
use hanse_ruleset::{Chain, ChainId, Delta, Digest, PolicyId, RuleSet, Set, SetId};

use crate::change::{Changes, NodeChange};
use crate::node::{ChainIndex, HeldChain, Node, Profiles, Unit, UnitIndex};
use crate::policy::Policy;
use crate::pool::{PoolId, Pools, census};
use crate::report::{Ignored, PeerReport, PolicyReport, Reason, Report};
use crate::update::Update;
use hanse_policy::indexed::{ClusterRecord, IdSet};
use hanse_policy::indexed::{FEDERATION, IndexedInventory, LOCAL};
use hanse_policy::indexed::{FastMap, SelectorId};

/// A policy that is held.
#[derive(Debug)]
pub(crate) struct PolicySlot {
    pub policy: Policy,
    pub live: bool,
    /// Whom it applied to at the last commit.
    pub committed_subject: Option<SelectorId>,
    tie: Box<str>,
    pub tier: u32,
    /// Ingress, egress.
    pub units: [Option<UnitIndex>; 2],
    pub pools: Vec<PoolId>,
    pub old_pools: Vec<PoolId>,
    pub dirty: bool,
}

#[derive(Debug)]
pub(crate) struct TierSlot {
    pub id: TierId,
    pub rank: u32,
    pub default: TierDefault,
}

/// The chains of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClassChains {
    pub ingress: ChainIndex,
    pub egress: ChainIndex,
    pub egress_to_node: ChainIndex,
}

impl ClassChains {
    pub fn all(self) -> [ChainIndex; 3] {
        [self.ingress, self.egress, self.egress_to_node]
    }
}

/// See the crate.
#[derive(Debug)]
pub struct Compiler {
    pub(crate) local: ClusterName,
    pub(crate) inventory: IndexedInventory,
    pub(crate) pools: Pools,
    /// Tiers only: the federation's and the cluster's own.
    layers: [Layer; 2],
    pub(crate) tiers: Vec<TierSlot>,
    tiers_by_id: FastMap<TierId, u32>,
    pub(crate) tiers_dirty: bool,
    pub(crate) policies: Vec<PolicySlot>,
    free_policies: Vec<u32>,
    policies_by_id: FastMap<model::PolicyId, u32>,
    pub(crate) by_subject: FastMap<SelectorId, IdSet>,
    pub(crate) dirty_policies: Vec<u32>,
    /// Uses of selectors to be given back when nothing stands on them any more.
    pub(crate) retired: Vec<SelectorId>,
    pub(crate) units: Vec<Option<Unit>>,
    pub(crate) free_units: Vec<UnitIndex>,
    pub(crate) units_by_id: FastMap<PolicyId, UnitIndex>,
    pub(crate) chains: Vec<Option<HeldChain>>,
    pub(crate) free_chains: Vec<ChainIndex>,
    pub(crate) chains_by_id: FastMap<ChainId, ChainIndex>,
    pub(crate) class_chains: FastMap<u32, ClassChains>,
    /// By the inventory's node numbers.
    pub(crate) nodes: Vec<Node>,
    pub(crate) profiles: Profiles,
    pub(crate) dirty_nodes: IdSet,
    pub(crate) configs_changed: IdSet,
    pub(crate) allow_final: bool,
    /// As rule sets name them, by phase.
    pub(crate) phase_names: [Arc<str>; 3],
}

impl Compiler {
    /// The empty state of one cluster.
    pub fn new(local: impl Into<ClusterName>) -> Self {
        let local = local.into();
        Self {
            inventory: IndexedInventory::new(local.clone()),
            local,
            pools: Pools::default(),
            layers: [Layer::default(), Layer::default()],
            tiers: Vec::new(),
            tiers_by_id: FastMap::default(),
            tiers_dirty: false,
            policies: Vec::new(),
            free_policies: Vec::new(),
            policies_by_id: FastMap::default(),
            by_subject: FastMap::default(),
            dirty_policies: Vec::new(),
            retired: Vec::new(),
            units: Vec::new(),
            free_units: Vec::new(),
            units_by_id: FastMap::default(),
            chains: Vec::new(),
            free_chains: Vec::new(),
            chains_by_id: FastMap::default(),
            class_chains: FastMap::default(),
            nodes: Vec::new(),
            profiles: Profiles::default(),
            dirty_nodes: IdSet::default(),
            configs_changed: IdSet::default(),
            allow_final: false,
            phase_names: ["Guard", "Local", "Baseline"].map(Arc::from),
        }
    }

    /// Takes an update into the state. Rule sets stay as they are until [`Self::commit`].
    pub fn apply(&mut self, update: Update) {
        let inventory = &mut self.inventory;
        match update {
            Update::Cluster { name, record } => {
                let cluster = inventory.cluster(&name);
                if cluster == LOCAL {
                    self.set_allow_final(record.federated_allow_final);
                }
                self.inventory.set_record(cluster, Some(record));
            }
            Update::RemoveCluster { name } => {
                let cluster = inventory.cluster(&name);
                inventory.clear_cluster(cluster);
                if cluster == LOCAL {
                    self.set_allow_final(ClusterRecord::default().federated_allow_final);
                }
            }
            Update::Namespace { cluster, name, namespace } => {
                let cluster = inventory.cluster(&cluster);
                inventory.set_namespace(cluster, name, Some(namespace.labels));
            }
            Update::RemoveNamespace { cluster, name } => {
                let cluster = inventory.cluster(&cluster);
                inventory.set_namespace(cluster, name, None);
            }
            Update::ServiceAccount { cluster, namespace, name, labels } => {
                let cluster = inventory.cluster(&cluster);
                inventory.set_account(cluster, namespace, name, Some(labels));
            }
            Update::RemoveServiceAccount { cluster, namespace, name } => {
                let cluster = inventory.cluster(&cluster);
                inventory.set_account(cluster, namespace, name, None);
            }
            Update::Endpoint { cluster, id, endpoint } => {
                let cluster = cluster.map_or(FEDERATION, |name| inventory.cluster(&name));
                // The federation has network sets only.
                if cluster != FEDERATION || id.kind == EndpointKind::NetworkSet {
                    inventory.set_endpoint(cluster, id, endpoint);
                }
            }
            Update::RemoveEndpoint { cluster, id } => {
                let cluster = cluster.map_or(FEDERATION, |name| inventory.cluster(&name));
                inventory.remove_endpoint(cluster, &id);
            }
            Update::Service { namespace, name, service } => {
                self.pools.set_service((namespace, name), Some(service));
            }
            Update::RemoveService { namespace, name } => self.pools.set_service((namespace, name), None),
            Update::Node { name, config } => self.set_node(&name, Some(config)),
            Update::RemoveNode { name } => self.set_node(&name, None),
            Update::Tier(tier) => {
                let layer = &mut self.layers[(tier.id.phase == Phase::Local) as usize];
                layer.tiers.insert(tier.id.clone(), tier);
                self.tiers_dirty = true;
            }
            Update::RemoveTier(id) => {
                self.layers[(id.phase == Phase::Local) as usize].tiers.remove(&id);
                self.tiers_dirty = true;
            }
            Update::Policy(policy) => self.set_policy(policy),
            Update::RemovePolicy(id) => {
                if let Some(at) = self.policies_by_id.get(&id).copied() {
                    self.retire_policy(at);
                }
            }
        }
    }

    fn set_allow_final(&mut self, allow_final: bool) {
        if self.allow_final == allow_final {
            return;
        }
        self.allow_final = allow_final;
        for at in 0..self.policies.len() as u32 {
            let slot = &self.policies[at as usize];
            if slot.live && slot.policy.id.cluster.is_none() {
                self.mark_policy(at);
            }
        }
    }

    fn set_node(&mut self, name: &Arc<str>, config: Option<hanse_ruleset::NodeConfig>) {
        let at = self.inventory.node(name);
        self.grow_nodes();
        let node = &mut self.nodes[at as usize];
        if node.config != config {
            node.config = config;
            self.dirty_nodes.insert(at);
            self.configs_changed.insert(at);
        }
    }

    pub(crate) fn grow_nodes(&mut self) {
        self.nodes.resize_with(self.inventory.nodes.len(), Node::default);
    }

    fn set_policy(&mut self, policy: model::Policy) {
        if policy.id.cluster.as_ref().is_some_and(|cluster| *cluster != self.local) {
            return;
        }
        let tier = self.tier(&policy.tier);
        let (index, newly) = (&mut self.inventory.index, &mut self.inventory.newly_relevant);
        let policy = Policy::new(policy, &self.local, &mut |selector| index.register(selector, newly));
        let subject = policy.subject;
        let at = match self.policies_by_id.get(&policy.id).copied() {
            Some(at) => {
                let slot = &self.policies[at as usize];
                if slot.live && slot.tier == tier && slot.policy == policy {
                    self.retired.extend(policy.selectors());
                    return;
                }
                self.retire_policy(at);
                let slot = &mut self.policies[at as usize];
                (slot.policy, slot.tier, slot.live) = (policy, tier, true);
                at
            }
            None => {
                let id = policy.id.clone();
                let slot = PolicySlot {
                    tie: id.tie().into(),
                    policy,
                    live: true,
                    committed_subject: None,
                    tier,
                    units: [None; 2],
                    pools: Vec::new(),
                    old_pools: Vec::new(),
                    dirty: false,
                };
                let at = match self.free_policies.pop() {
                    Some(at) => {
                        self.policies[at as usize] = slot;
                        at
                    }
                    None => {
                        self.policies.push(slot);
                        self.policies.len() as u32 - 1
                    }
                };
                self.policies_by_id.insert(id, at);
                at
            }
        };
        if let Some(subject) = subject {
            self.by_subject.entry(subject).or_default().insert(at);
        }
        self.mark_policy(at);
    }

    /// Takes a policy's present content out of all that finds it.
    fn retire_policy(&mut self, at: u32) {
        self.mark_policy(at);
        let slot = &mut self.policies[at as usize];
        if !std::mem::replace(&mut slot.live, false) {
            return;
        }
        self.retired.extend(slot.policy.selectors());
        if let Some(subject) = slot.policy.subject
            && let Some(policies) = self.by_subject.get_mut(&subject)
        {
            policies.remove(at);
            if policies.is_empty() {
                self.by_subject.remove(&subject);
            }
        }
    }

    pub(crate) fn mark_policy(&mut self, at: u32) {
        let slot = &mut self.policies[at as usize];
        if !std::mem::replace(&mut slot.dirty, true) {
            self.dirty_policies.push(at);
        }
    }

    pub(crate) fn forget_policy(&mut self, at: u32) {
        let policy = &mut self.policies[at as usize].policy;
        self.policies_by_id.remove(&policy.id);
        policy.clear();
        self.free_policies.push(at);
    }

    fn tier(&mut self, id: &TierId) -> u32 {
        if let Some(at) = self.tiers_by_id.get(id) {
            return *at;
        }
        self.tiers.push(TierSlot { id: id.clone(), rank: 0, default: TierDefault::Deny });
        let at = self.tiers.len() as u32 - 1;
        self.tiers_by_id.insert(id.clone(), at);
        self.tiers_dirty = true;
        at
    }

    pub(crate) fn rank_tiers(&mut self) {
        let mut order: Vec<usize> = (0..self.tiers.len()).collect();
        order.sort_by_cached_key(|at| {
            let id = &self.tiers[*at].id;
            (id.phase, self.layers[(id.phase == Phase::Local) as usize].tier(id).0)
        });
        for (rank, at) in order.into_iter().enumerate() {
            let id = &self.tiers[at].id;
            let default = self.layers[(id.phase == Phase::Local) as usize].tier(id).1;
            self.tiers[at].rank = rank as u32;
            self.tiers[at].default = default;
        }
    }

    /// The order in which policies are asked.
    pub(crate) fn compare(&self, a: u32, b: u32) -> Ordering {
        let (a, b) = (&self.policies[a as usize], &self.policies[b as usize]);
        let rank = |slot: &PolicySlot| self.tiers[slot.tier as usize].rank;
        rank(a).cmp(&rank(b)).then_with(|| a.policy.order.cmp(&b.policy.order)).then_with(|| a.tie.cmp(&b.tie))
    }

    // Results, as of the last commit.

    /// The nodes that have a rule set, sorted.
    pub fn nodes(&self) -> Vec<Arc<str>> {
        let mut names: Vec<Arc<str>> = self
            .nodes
            .iter()
            .zip(&self.inventory.nodes)
            .filter(|(node, _)| node.committed.is_some())
            .map(|(_, name)| name.clone())
            .collect();
        names.sort_unstable();
        names
    }

    /// The digest of a node's rule set.
    pub fn digest(&self, node: &str) -> Option<Digest> {
        self.nodes.get(self.inventory.node_id(node)? as usize)?.committed
    }

    /// A set with all its members; `None` when no node needs it.
    pub fn set(&mut self, id: SetId) -> Option<Arc<Set>> {
        let index = *self.pools.sets_by_id.get(&id)?;
        Some(self.pools.whole(&self.inventory, index))
    }

    pub fn policy(&self, id: PolicyId) -> Option<Arc<hanse_ruleset::Policy>> {
        let index = *self.units_by_id.get(&id)?;
        self.units[index as usize].as_ref().map(|unit| unit.policy.clone())
    }

    pub fn chain(&self, id: ChainId) -> Option<Arc<Chain>> {
        let index = *self.chains_by_id.get(&id)?;
        self.chains[index as usize].as_ref().map(|held| held.chain.clone())
    }

    /// All that a node must enforce; empty for a node that is not known. Generation and revisions are left for the sender.
    pub fn rule_set(&mut self, node: &str) -> RuleSet {
        let Some(node) = self.inventory.node_id(node).and_then(|at| self.nodes.get(at as usize)) else {
            return RuleSet::default();
        };
        let profile = &self.profiles.all[node.profile as usize];
        let config = node.config.clone().unwrap_or_default();
        let endpoints = node.endpoints.values().map(|(it, _)| (it.id.clone(), it.clone())).collect();
        let units = profile.units.keys().filter_map(|unit| self.units[*unit as usize].as_ref());
        let policies = units.map(|unit| (unit.id, unit.policy.clone())).collect();
        let chains = profile.chains.iter().filter_map(|chain| self.chains[chain as usize].as_ref());
        let chains = chains.map(|held| (held.id, held.chain.clone())).collect();
        let sets: Vec<u32> = profile.sets.keys().copied().collect();
        let sets =
            sets.into_iter().map(|set| self.pools.whole(&self.inventory, set)).map(|set| (set.id, set)).collect();
        RuleSet { node: config, sets, policies, chains, endpoints, ..RuleSet::default() }
    }

    /// The delta for one node of the last commit, of [`Self::commit`]'s outcome. Valid until the next commit.
    pub fn delta(&mut self, changes: &Changes, change: &NodeChange) -> Delta {
        let objects = &change.objects;
        let set_change = |id: &SetId| changes.sets.get(id).map(|change| (*id, (**change).clone()));
        Delta {
            base: Some(change.base),
            digest: change.digest,
            node: change.config.clone(),
            sets: objects.sets_added.iter().filter_map(|id| self.set(*id)).collect(),
            set_changes: change.set_changes.iter().filter_map(set_change).collect(),
            policies: objects.policies_added.iter().filter_map(|id| self.policy(*id)).collect(),
            chains: objects.chains_added.iter().filter_map(|id| self.chain(*id)).collect(),
            endpoints: change.endpoints.clone(),
            removed_sets: objects.sets_removed.clone(),
            removed_policies: objects.policies_removed.clone(),
            removed_chains: objects.chains_removed.clone(),
            removed_endpoints: change.endpoints_removed.clone(),
            ..Delta::default()
        }
    }

    /// What became of each policy. Walks all policies and the members of their selectors: for status, not for each update.
    pub fn report(&self) -> Report {
        let live = self.policies_by_id.iter().filter(|(_, at)| self.policies[**at as usize].live);
        let policies = live.map(|(id, at)| (id.clone(), self.report_of(&self.policies[*at as usize]))).collect();
        let mut contested: Vec<_> = self.inventory.contested().collect();
        contested.sort_unstable();
        Report { policies, contested }
    }

    fn report_of(&self, slot: &PolicySlot) -> PolicyReport {
        let policy = &slot.policy;
        let mut report = PolicyReport { is_active: slot.units.iter().any(Option::is_some), ..PolicyReport::default() };
        let mut ignore = |rule, reason| report.ignored.push(Ignored { rule, reason });
        policy.idle.iter().for_each(|reason| ignore(None, reason.clone()));
        if let Some(subject) = policy.subject {
            let members =
                self.inventory.index.certain(subject).filter_map(|it| self.inventory.members.get(it as usize));
            let own = members
                .flat_map(IdSet::iter)
                .filter(|at| self.inventory.cluster_of(*at) == LOCAL && crate::pool::is_pod(&self.inventory, *at));
            report.selects = own.count();
            if report.selects == 0 {
                ignore(None, Reason::SelectsNothing);
            }
        }
        for (direction, rule) in policy.all_rules() {
            let place = Some((direction, rule.index));
            if rule.family.is_none() {
                ignore(place, Reason::NoFamily);
            }
            if let Some(why) = rule.unknown_because.clone() {
                let closes = matches!(rule.action, model::Action::Deny | model::Action::Pass);
                ignore(place, if closes { Reason::Denies(why) } else { Reason::NeverMatches(why) });
            }
            for selection in rule.selections() {
                let Some(selector) = self.inventory.index.selector(selection.selector) else { continue };
                report.peers.push(PeerReport {
                    direction,
                    rule: rule.index,
                    selector: selector.canonical.clone(),
                    clusters: census(&self.inventory, selection.selector, &selection.clusters),
                });
            }
        }
        report
    }
}

#[doc(hidden)]
impl Compiler {
    /// For tests: panics when something is left of a state from which everything was removed.
    pub fn check_empty(&self) {
        assert_eq!(self.inventory.index.class_count(), 0, "classes");
        assert_eq!(self.inventory.index.selector_count(), 0, "selectors");
        assert_eq!(self.inventory.index.pair_count(), 0, "pairs");
        assert_eq!(self.inventory.index.key_count(), 0, "keys");
        assert_eq!(self.inventory.count(), [0; 4], "endpoints, contexts, addresses, port names");
        assert_eq!(self.pools.count(), [0; 2], "pools, sets");
        assert_eq!(self.units_by_id.len() + self.chains_by_id.len() + self.class_chains.len(), 0, "chains");
        assert_eq!(self.policies_by_id.len(), 0, "policies");
    }
}
