//! The state of one cluster, and the rule sets of its nodes.

use std::sync::Arc;

use hanse_policy::evaluator::{Evaluator, Judge};
use hanse_policy::indexed::{ClusterRecord, FEDERATION, IndexedInventory, LOCAL, ServiceKey};
use hanse_policy::inventory::{EndpointKind, Service};
use hanse_policy::model::{self, ClusterName};
use hanse_ruleset::{Chain, ChainId, Digest, PolicyId, RuleSet, Set, SetId};

use crate::chain::Chains;
use crate::ids::SetIndex;
use crate::node::Nodes;
use crate::policies::{Policies, PolicySlot};
use crate::policy::Policy;
use crate::pool::{Pools, census, is_pod};
use crate::report::{Ignored, PeerReport, PolicyReport, Reason, Report};
use crate::tiers::Tiers;
use crate::update::Update;

/// See the crate.
#[derive(Debug)]
pub struct Compiler {
    pub(crate) local: ClusterName,
    pub(crate) inventory: IndexedInventory,
    evaluator: Option<Evaluator>,
    pub(crate) tiers: Tiers,
    pub(crate) policies: Policies,
    pub(crate) pools: Pools,
    pub(crate) chains: Chains,
    pub(crate) nodes: Nodes,
    /// A federated Allow is final in this cluster.
    pub(crate) allow_final: bool,
    /// The names of phases in rule sets.
    pub(crate) phase_names: [Arc<str>; 3],
}

impl Compiler {
    /// The empty state of one cluster.
    pub fn new(local: impl Into<ClusterName>) -> Self {
        let local = local.into();
        Self {
            inventory: IndexedInventory::new(local.clone()),
            evaluator: None,
            local,
            tiers: Tiers::default(),
            policies: Policies::default(),
            pools: Pools::default(),
            chains: Chains::default(),
            nodes: Nodes::default(),
            allow_final: false,
            phase_names: ["Guard", "Local", "Baseline"].map(Arc::from),
        }
    }

    /// The empty state of one cluster, which [`Self::judge`] can evaluate packets by.
    pub fn with_evaluator(local: impl Into<ClusterName>) -> Self {
        let mut this = Self::new(local);
        this.evaluator = Some(Evaluator::new(this.local.clone(), &mut this.inventory));
        this
    }

    /// Evaluates packets by the state as of the last commit; `None`: made without an evaluator.
    pub fn judge(&self) -> Option<Judge<'_>> {
        Some(Judge::new(self.evaluator.as_ref()?, &self.inventory))
    }

    /// Applies an update to the state. Rule sets stay as they are until [`Self::commit`].
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
            Update::Service { namespace, name, service } => self.set_service((namespace, name), Some(service)),
            Update::RemoveService { namespace, name } => self.set_service((namespace, name), None),
            Update::Node { name, config } => self.nodes.set_config(inventory.node(&name), Some(config)),
            Update::RemoveNode { name } => self.nodes.set_config(inventory.node(&name), None),
            Update::Tier(tier) => {
                if let Some(evaluator) = &mut self.evaluator {
                    evaluator.set_tier(tier.clone());
                }
                self.tiers.set(tier);
            }
            Update::RemoveTier(id) => {
                if let Some(evaluator) = &mut self.evaluator {
                    evaluator.remove_tier(&id);
                }
                self.tiers.remove(&id);
            }
            Update::Policy(policy) => self.set_policy(policy),
            Update::RemovePolicy(id) => {
                if let Some(evaluator) = &mut self.evaluator {
                    evaluator.remove_policy(inventory, &id);
                }
                self.policies.remove(&id);
            }
        }
    }

    fn set_allow_final(&mut self, allow_final: bool) {
        if std::mem::replace(&mut self.allow_final, allow_final) != allow_final {
            self.policies.mark_federated();
        }
    }

    fn set_service(&mut self, key: ServiceKey, service: Option<Service>) {
        let old = self.inventory.set_service(key.clone(), service);
        self.pools.service_changed(&key, old.as_ref(), self.inventory.service(&key));
    }

    fn set_policy(&mut self, policy: model::Policy) {
        if !Policies::concerns(&policy.id, &self.local) {
            return;
        }
        let tier = self.tiers.named(&policy.tier);
        let inventory = &mut self.inventory;
        if let Some(evaluator) = &mut self.evaluator {
            evaluator.set_policy(inventory, &policy);
        }
        let policy = Policy::new(policy, &self.local, &mut |selector| inventory.register(selector));
        self.policies.set(policy, tier);
    }

    // Results, as of the last commit.

    /// The nodes that have a rule set, sorted.
    pub fn nodes(&self) -> Vec<Arc<str>> {
        let has_rules = |at| self.nodes.all.get(at).is_some_and(|node| node.committed.is_some());
        let nodes = self.inventory.nodes.iter().filter(|(at, _)| has_rules(*at));
        let mut names: Vec<Arc<str>> = nodes.map(|(_, name)| name.clone()).collect();
        names.sort_unstable();
        names
    }

    /// The digest of a node's rule set.
    pub fn digest(&self, node: &str) -> Option<Digest> {
        self.nodes.all.get(self.inventory.node_id(node)?)?.committed
    }

    /// A set with all its members; `None` when no node needs it.
    pub fn set(&mut self, id: SetId) -> Option<Arc<Set>> {
        let index = *self.pools.sets_by_id.get(&id)?;
        Some(self.pools.whole(&self.inventory, index))
    }

    pub fn policy(&self, id: PolicyId) -> Option<Arc<hanse_ruleset::Policy>> {
        let index = *self.chains.units_by_id.get(&id)?;
        Some(self.chains.units[index].policy.clone())
    }

    pub fn chain(&self, id: ChainId) -> Option<Arc<Chain>> {
        let index = *self.chains.chains_by_id.get(&id)?;
        Some(self.chains.chains[index].chain.clone())
    }

    /// The whole rule set of a node; empty for an unknown node. Generation and revisions are the sender's.
    pub fn rule_set(&mut self, node: &str) -> RuleSet {
        let Some(node) = self.inventory.node_id(node).and_then(|at| self.nodes.all.get(at)) else {
            return RuleSet::default();
        };
        let profile = &self.nodes.profiles.all[node.profile];
        let config = node.config.clone().unwrap_or_default();
        let endpoints = node.endpoints.values().map(|(it, _)| (it.id.clone(), it.clone())).collect();
        let units = profile.units.keys().map(|unit| &self.chains.units[*unit]);
        let policies = units.map(|unit| (unit.id, unit.policy.clone())).collect();
        let chains = profile.chains.iter().map(|chain| &self.chains.chains[chain]);
        let chains = chains.map(|stored| (stored.id, stored.chain.clone())).collect();
        let sets: Vec<SetIndex> = profile.sets.keys().copied().collect();
        let sets =
            sets.into_iter().map(|set| self.pools.whole(&self.inventory, set)).map(|set| (set.id, set)).collect();
        RuleSet { node: config, sets, policies, chains, endpoints, ..RuleSet::default() }
    }

    /// What became of each policy. Walks all policies and the members of their selectors: for status, not for each update.
    pub fn report(&self) -> Report {
        let live = self.policies.all.iter().filter(|(_, slot)| slot.live);
        let policies = live.map(|(_, slot)| (slot.policy.id.clone(), self.report_of(slot))).collect();
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
            let members = self.inventory.index.certain(subject).flat_map(|class| self.inventory.members(class).iter());
            let own = members.filter(|at| self.inventory.cluster_of(*at) == LOCAL && is_pod(&self.inventory, *at));
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
                let selector = self.inventory.index.selector(selection.selector);
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
        // An evaluator keeps the selector of every pod.
        let kept = usize::from(self.evaluator.is_some());
        assert_eq!(self.inventory.index.selector_count(), kept, "selectors");
        assert!(self.evaluator.as_ref().is_none_or(Evaluator::is_empty), "policies of the evaluator");
        assert_eq!(self.inventory.index.pair_count(), 0, "pairs");
        assert_eq!(self.inventory.index.key_count(), 0, "keys");
        assert_eq!(self.inventory.count(), [0; 5], "endpoints, contexts, addresses, port names, services");
        assert_eq!(self.pools.count(), [0; 2], "pools, sets");
        assert_eq!(self.chains.count(), [0; 3], "units, chains, classes");
        assert_eq!(self.policies.all.len(), 0, "policies");
    }
}
