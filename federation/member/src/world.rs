//! The state of a member, and the rule sets of its nodes.
//!
//! Changes from the hub and from the cluster's source become updates of the compiler, so that a change costs what it
//! touches. They are applied together by the next compile, since other threads read the compiler's state. What the hub
//! relays of the cluster itself is ignored: its own source is newer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_api::assemble::{Assembly, Changed, ClusterState, Federation};
use hanse_api::inventory::NodeInfo;
use hanse_compiler::{self as compiler, ClusterRecord, Compiler, NodeChange, Report, Update};
use hanse_policy::inventory::{EndpointKind, Labels, Namespace};
use hanse_policy::model::ClusterName;
use hanse_protocol::reason::Reason;
use hanse_ruleset::{
    Delta, Digest, Enforcement, Members, NodeConfig, RuleSet, Set, SetChange, SetId, Step, UnknownPods,
};

use crate::exchange::model::{self, Change, Lease, Position, Updates};
use crate::federated::{Federated, Reader};
use crate::live::Live;
use crate::outside_ranges::OutsideRanges;
use crate::own_streams::{Ends, OwnStreams, local_address};
use crate::source::{Changes, Problems};

/// The label of a Node that overrides the member's setting: `Enforce` or `Observe`.
const ENFORCEMENT_LABEL: &str = "hanse.dev/enforcement";

#[derive(Debug)]
pub struct World {
    cluster: ClusterName,
    unknown_pods: UnknownPods,
    /// Of nodes whose label does not say otherwise.
    enforcement: Enforcement,
    /// The endpoints of Hanse's own streams, which are allowed before every tier.
    ends: Ends,
    own_streams: OwnStreams,
    /// The cluster as its source has it.
    local: Assembly,
    local_revision: u64,
    problems: Problems,
    outside_ranges: OutsideRanges,
    federated: Federated,
    /// The hub's position of the policies in force.
    in_force: Position,
    /// What the next compile applies, in this order.
    pending: Vec<Pending>,
    live: Live,
    /// The rule sets of all nodes were returned once.
    compiled: bool,
    nodes: BTreeMap<Arc<str>, NodeRules>,
}

#[derive(Debug)]
enum Pending {
    Update(Box<Update>),
    /// Changes of the cluster, which are looked up one by one: at first that is everything.
    Local(Arc<Changed>),
    /// A batch of the hub: a snapshot has a change for every endpoint, so that it is converted one by one.
    Received(Vec<Change>),
}

/// The rule set of one node. Generation and revisions are the sender's.
#[derive(Debug, Clone, Default)]
pub struct NodeRules {
    pub rules: Arc<RuleSet>,
    pub digest: Digest,
    /// How it came about from the node's previous rule set, if there was one.
    pub step: Option<Arc<Step>>,
}

/// The changes of a compile.
#[derive(Debug, Default)]
pub struct Compiled {
    pub changed: Vec<(Arc<str>, NodeRules)>,
    pub removed: Vec<Arc<str>>,
}

impl NodeRules {
    /// The delta from a rule set of digest `held`, where that is one step.
    pub fn delta_from(&self, held: Digest) -> Option<Delta> {
        let step = self.step.as_ref().filter(|step| step.base == Some(held))?;
        Some(step.delta(&self.rules))
    }
}

impl World {
    pub fn new(cluster: ClusterName, unknown_pods: UnknownPods, ends: Ends) -> Self {
        Self {
            pending: Vec::new(),
            live: Live::new(cluster.clone()),
            compiled: false,
            local: Assembly::new(cluster.clone()),
            local_revision: 0,
            problems: Problems::default(),
            outside_ranges: OutsideRanges::default(),
            cluster,
            unknown_pods,
            enforcement: Enforcement::default(),
            ends,
            own_streams: OwnStreams::default(),
            federated: Federated::default(),
            in_force: Position::default(),
            nodes: BTreeMap::new(),
        }
    }

    /// Objects of the federation that `reader` has read are not read again.
    pub fn with_reader(self, reader: Reader) -> Self {
        Self { federated: Federated::new(reader), ..self }
    }

    /// Sets what happens to denied packets at nodes whose label does not say otherwise.
    pub fn with_enforcement(self, enforcement: Enforcement) -> Self {
        Self { enforcement, ..self }
    }

    /// What happens to denied packets at a node. A label that is not understood enforces.
    pub fn enforcement(&self, node: &NodeInfo) -> Enforcement {
        match node.labels.get(ENFORCEMENT_LABEL).map(|value| &**value) {
            None => self.enforcement,
            Some("Observe") => Enforcement::Observe,
            Some(_) => Enforcement::Enforce,
        }
    }

    /// The hub's revision that policies come from.
    pub fn hub_revision(&self) -> u64 {
        self.in_force.revision
    }

    /// The same, with its epoch.
    pub fn hub_position(&self) -> Position {
        self.in_force
    }

    /// The cluster as its source has it.
    pub fn local(&self) -> &Arc<ClusterState> {
        self.local.state()
    }

    /// The source's revision that this is true of.
    pub fn local_revision(&self) -> u64 {
        self.local_revision
    }

    /// Problems of the source, with file and line.
    pub fn problems(&self) -> &Problems {
        &self.problems
    }

    /// Pods that are not closed before their rules arrive, if there are any.
    pub fn outside_ranges(&self) -> Option<Reason> {
        self.outside_ranges.problem()
    }

    /// The federation's policies, tiers and network sets in force.
    pub fn federation(&self) -> &Federation {
        self.federated.converted()
    }

    /// The state of each policy.
    pub fn report(&self) -> Report {
        self.live.read().compiler.report()
    }

    /// The evaluator, as of the last compile.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// Applies changes of the source. Returns the changes of the cluster.
    pub fn take_local(&mut self, changes: Changes) -> Arc<Changed> {
        let changed = Arc::new(self.local.update(changes.objects));
        let state = Arc::clone(self.local.state());
        self.outside_ranges.update(&state, &changed);
        self.problems.apply(changes.problems);
        self.local_revision = changes.revision;
        self.pending.push(Pending::Local(Arc::clone(&changed)));
        let others = !changed.nodes.is_empty()
            || changed.service_addresses
            || OwnStreams::depend_on(&self.ends, &state, &changed.services);
        self.refresh_own_streams(match others {
            true => OwnStreams::new(&self.ends, &self.local, local_address),
            false => self.own_streams.clone(),
        });
        changed
    }

    /// Gives `apply` what the compiler does not have of the cluster.
    fn each_local(&self, changed: &Changed, mut apply: impl FnMut(Update)) {
        let state = self.local.state();
        let cluster = || self.cluster.clone();
        for name in &changed.namespaces {
            let labels = state.cluster.namespaces.get(name).map(|it| it.labels.clone());
            apply(namespace_update(cluster(), name.clone(), labels));
        }
        for key @ (namespace, name) in &changed.service_accounts {
            let labels = state.cluster.service_accounts.get(key).cloned();
            apply(account_update(cluster(), namespace.clone(), name.clone(), labels));
        }
        for id in &changed.endpoints {
            let (cluster, id) = (Some(cluster()), id.clone());
            apply(match state.cluster.endpoints.get(&id).cloned() {
                Some(endpoint) => Update::Endpoint { cluster, id, endpoint },
                None => Update::RemoveEndpoint { cluster, id },
            });
        }
        for key @ (namespace, name) in &changed.services {
            let (namespace, name) = (namespace.clone(), name.clone());
            apply(match state.cluster.services.get(key).cloned() {
                Some(service) => Update::Service { namespace, name, service },
                None => Update::RemoveService { namespace, name },
            });
        }
        for name in &changed.nodes {
            let name = name.clone();
            apply(match state.nodes.get(&name) {
                Some(node) => Update::Node { config: self.node(&name, node), name },
                None => Update::RemoveNode { name },
            });
        }
        for id in &changed.tiers {
            let tier = state.layer.tiers.get(id).cloned();
            apply(tier.map_or_else(|| Update::RemoveTier(id.clone()), Update::Tier));
        }
        for id in &changed.policies {
            let policy = state.layer.policies.get(id).cloned();
            apply(policy.map_or_else(|| Update::RemovePolicy(id.clone()), Update::Policy));
        }
    }

    /// Sets the addresses of Hanse's own processes.
    pub fn set_ends(&mut self, ends: Ends) {
        self.ends = ends;
        self.look_at_addresses();
    }

    /// Reads this process's own addresses. Returns whether anything changed.
    pub fn look_at_addresses(&mut self) -> bool {
        self.refresh_own_streams(OwnStreams::new(&self.ends, &self.local, local_address))
    }

    /// Replaces the streams, each limited to the nodes of its pods. Returns whether anything changed.
    fn refresh_own_streams(&mut self, now: OwnStreams) -> bool {
        let state = Arc::clone(self.local.state());
        let now = now.on_nodes_of(|address| state.cluster.endpoints.get(self.local.owner(address)?)?.node.clone());
        if now == self.own_streams {
            return false;
        }
        self.own_streams = now;
        for (name, node) in &state.nodes {
            self.push(Update::Node { name: name.clone(), config: self.node(name, node) });
        }
        true
    }

    /// Applies changes that the hub sent as one batch.
    pub fn receive(&mut self, updates: Updates) {
        let Updates { mut changes, in_force } = updates;
        let manifests = changes.extract_if(.., |change| matches!(change, Change::Manifest { .. }));
        let manifests = manifests.filter_map(|change| match change {
            Change::Manifest { kind, name, manifest } => Some((kind, name, manifest)),
            _ => None,
        });
        let manifests: Vec<_> = manifests.collect();
        self.pending.push(Pending::Received(changes));
        for update in self.federated.take(manifests) {
            self.push(update);
        }
        self.in_force = in_force;
    }

    /// Brings the rule set of every node up to date. Returns those that changed. The cost is that of what changed, and of a
    /// copy of pointers for each changed node.
    ///
    /// `None`: nothing was ever received from the hub, so its policies are unknown, not absent. Nodes keep their rules.
    pub fn compile(&mut self) -> Option<Compiled> {
        let live = self.live.clone();
        let state = &mut *live.write();
        let compiler = &mut state.compiler;
        for pending in std::mem::take(&mut self.pending) {
            match pending {
                Pending::Update(update) => compiler.apply(*update),
                Pending::Local(changed) => self.each_local(&changed, |update| compiler.apply(update)),
                Pending::Received(changes) => {
                    let updates = changes.into_iter().filter_map(|change| update_of(change, &self.cluster));
                    updates.for_each(|update| compiler.apply(update));
                }
            }
        }
        let compiler::Changes { mut nodes } = compiler.commit();
        (state.hub_revision, state.local_revision) = (self.in_force.revision, self.local_revision);
        if self.in_force == Position::default() {
            return None;
        }
        if !std::mem::replace(&mut self.compiled, true) {
            // With those that changed before the hub was heard.
            nodes.extend(compiler.nodes().into_iter().map(|name| {
                let digest = compiler.digest(&name).unwrap_or_default();
                (name, NodeChange { removed: false, step: Step { digest, ..Step::default() } })
            }));
        }
        let mut compiled = Compiled::default();
        // Changed sets, by id: nodes share the old set and the new.
        let mut changed_sets: BTreeMap<SetId, Arc<Set>> = BTreeMap::new();
        for (name, change) in nodes {
            if change.removed {
                self.nodes.remove(&name);
                state.own_streams.remove(&name);
                state.pod_ranges.remove(&name);
                compiled.removed.push(name);
                continue;
            }
            let (digest, step) = (change.step.digest, change.step);
            let now = match self.nodes.get(&name).filter(|held| Some(held.digest) == step.base) {
                Some(held) => {
                    let rules = Arc::new(next(compiler, &held.rules, &step, &mut changed_sets));
                    NodeRules { rules, digest, step: Some(Arc::new(step)) }
                }
                None => NodeRules { rules: Arc::new(compiler.rule_set(&name)), digest, step: None },
            };
            if state.pod_ranges.get(&name) != Some(&now.rules.node.pod_ranges) {
                state.pod_ranges.insert(name.clone(), now.rules.node.pod_ranges.clone());
            }
            match &now.rules.node.own_streams {
                streams if streams.is_empty() => drop(state.own_streams.remove(&name)),
                streams => drop(state.own_streams.insert(name.clone(), streams.clone())),
            }
            self.nodes.insert(name.clone(), now.clone());
            compiled.changed.push((name, now));
        }
        Some(compiled)
    }

    /// The rule sets of all nodes, as of the last compile.
    pub fn nodes(&self) -> &BTreeMap<Arc<str>, NodeRules> {
        &self.nodes
    }

    fn push(&mut self, update: Update) {
        self.pending.push(Pending::Update(Box::new(update)));
    }

    fn node(&self, name: &str, node: &NodeInfo) -> NodeConfig {
        NodeConfig {
            pod_ranges: node.pod_ranges.clone(),
            node_addresses: node.addresses.clone(),
            unknown_pods: self.unknown_pods,
            enforcement: self.enforcement(node),
            own_streams: self.own_streams.on_node(name, node),
        }
    }
}

/// A change of another cluster, or of the record of `local`; `None`: what the hub relays of `local` itself.
fn update_of(change: Change, local: &ClusterName) -> Option<Update> {
    Some(match change {
        Change::Cluster { name, record: Some(record) } => Update::Cluster { name, record: record_of(&record) },
        // Only the record is withdrawn; the objects of this cluster are its own.
        Change::Cluster { name, record: None } | Change::Withdrawn { name } if name == *local => {
            Update::Cluster { name, record: ClusterRecord::default() }
        }
        Change::Cluster { name, record: None } | Change::Withdrawn { name } => Update::RemoveCluster { name },
        Change::Namespace { cluster, name, labels } if cluster != *local => namespace_update(cluster, name, labels),
        Change::ServiceAccount { cluster, namespace, name, labels } if cluster != *local => {
            account_update(cluster, namespace, name, labels)
        }
        Change::Endpoint { cluster, id, endpoint } if cluster != *local && id.kind == EndpointKind::Pod => {
            let cluster = Some(cluster);
            match endpoint {
                Some(endpoint) => Update::Endpoint { cluster, id, endpoint },
                None => Update::RemoveEndpoint { cluster, id },
            }
        }
        Change::Namespace { .. }
        | Change::ServiceAccount { .. }
        | Change::Endpoint { .. }
        | Change::Manifest { .. } => return None,
    })
}

fn namespace_update(cluster: ClusterName, name: Arc<str>, labels: Option<Labels>) -> Update {
    match labels {
        Some(labels) => Update::Namespace { cluster, name, namespace: Namespace { labels } },
        None => Update::RemoveNamespace { cluster, name },
    }
}

fn account_update(cluster: ClusterName, namespace: Arc<str>, name: Arc<str>, labels: Option<Labels>) -> Update {
    match labels {
        Some(labels) => Update::ServiceAccount { cluster, namespace, name, labels },
        None => Update::RemoveServiceAccount { cluster, namespace, name },
    }
}

/// A node's rule set after a change.
fn next(compiler: &mut Compiler, held: &RuleSet, step: &Step, changed_sets: &mut BTreeMap<SetId, Arc<Set>>) -> RuleSet {
    let (mut rules, objects) = (held.clone(), &step.objects);
    if let Some(config) = &step.node {
        rules.node = config.clone();
    }
    objects.sets_removed.iter().for_each(|id| drop(rules.sets.remove(id)));
    objects.policies_removed.iter().for_each(|id| drop(rules.policies.remove(id)));
    objects.chains_removed.iter().for_each(|id| drop(rules.chains.remove(id)));
    step.endpoints_removed.iter().for_each(|id| drop(rules.endpoints.remove(id)));
    for (id, change) in &step.set_changes {
        if let Some(set) = rules.sets.get_mut(id) {
            *set = changed_sets.entry(*id).or_insert_with(|| Arc::new(changed(set, change))).clone();
        }
    }
    rules.sets.extend(objects.sets_added.iter().filter_map(|id| Some((*id, compiler.set(*id)?))));
    rules.policies.extend(objects.policies_added.iter().filter_map(|id| Some((*id, compiler.policy(*id)?))));
    rules.chains.extend(objects.chains_added.iter().filter_map(|id| Some((*id, compiler.chain(*id)?))));
    rules.endpoints.extend(step.endpoints.iter().map(|it| (it.id.clone(), Arc::clone(it))));
    rules
}

fn changed(set: &Set, change: &SetChange) -> Set {
    let mut set = set.clone();
    match (&mut set.members, change) {
        (Members::Addresses(members), SetChange::Addresses { add, remove }) => renew(members, add, remove),
        (Members::Nets(members), SetChange::Nets { add, remove }) => renew(members, add, remove),
        (Members::Sockets(members), SetChange::Sockets { add, remove }) => renew(members, add, remove),
        // A set's id is derived from its kind, among others.
        _ => unreachable!("a set keeps its kind"),
    }
    set
}

fn renew<T: Ord + Copy>(members: &mut BTreeSet<T>, add: &[T], remove: &[T]) {
    for member in remove {
        members.remove(member);
    }
    members.extend(add.iter().copied());
}

fn record_of(record: &model::ClusterRecord) -> ClusterRecord {
    ClusterRecord {
        label_grant: record.label_grant.clone(),
        stale: matches!(record.lease, Lease::Stale { .. }),
        federated_allow_final: record.federated_allow_final,
    }
}

#[cfg(test)]
mod offline;

#[cfg(test)]
mod tests {
    use hanse_api::assemble::Candidates;
    use hanse_api::manifest::{Manifests, read_bytes};
    use hanse_policy::inventory::Endpoint;
    use hanse_ruleset::Digest;

    use super::*;
    use crate::exchange::model::pod;

    const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: 'n'}\nspec: {podCIDR: 10.0.0.0/24}\n\
                        status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}\n---\n";
    const DENY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: d, namespace: a}\n\
                        spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}\n---\n";

    fn pod_of(name: &str, app: &str, address: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: a, labels: {{app: {app}}}}}\n\
             spec: {{nodeName: 'n'}}\nstatus: {{phase: Running, podIP: {address}}}\n---\n"
        )
    }

    /// The whole state of a source, after that of `candidates`.
    fn sourced(candidates: &mut Candidates, text: &str, revision: u64) -> Changes {
        let mut read = Manifests::default();
        read_bytes(&"cluster.yaml".into(), text.as_bytes(), &mut read);
        assert!(read.diagnostics.is_empty(), "{:?}", read.diagnostics);
        candidates.replace_all(read.objects);
        Changes { objects: candidates.take_changes(), problems: Vec::new(), revision }
    }

    fn world() -> World {
        let mut world = World::new("here".into(), UnknownPods::default(), Ends::default());
        world.receive(Updates { in_force: Position { epoch: 1, revision: 1 }, ..Updates::default() });
        world
    }

    fn digest(world: &mut World) -> Digest {
        let before = world.nodes().get("n").cloned();
        world.compile().expect("the hub was heard");
        let now = &world.nodes()["n"];
        assert_eq!(now.rules.digest(), now.digest, "the rule set has the compiler's digest");
        if let Some(before) = before.filter(|before| before.digest != now.digest) {
            let delta = now.delta_from(before.digest).expect("one step");
            let stepped = before.rules.apply(&delta).expect("the step fits");
            assert_eq!(stepped, *now.rules, "an agent that applies the step has the same rule set");
            assert!(now.delta_from(now.digest).is_none(), "the step starts from one digest only");
        }
        now.digest
    }

    #[test]
    fn an_edit_gives_the_rule_sets_of_a_fresh_start() {
        let states = [
            format!("{NODE}{}{}", pod_of("p", "web", "10.0.0.1"), pod_of("q", "db", "10.0.0.2")),
            format!("{NODE}{DENY}{}{}", pod_of("p", "web", "10.0.0.1"), pod_of("q", "db", "10.0.0.2")),
            format!("{NODE}{DENY}{}{}", pod_of("p", "db", "10.0.0.1"), pod_of("r", "web", "10.0.0.2")),
            format!("{NODE}{}", pod_of("p", "db", "10.0.0.3")),
        ];
        let (mut kept, mut candidates) = (world(), Candidates::default());
        let mut seen = std::collections::BTreeSet::new();
        for (revision, state) in (1..).zip(states.iter().chain(states.iter().rev())) {
            kept.take_local(sourced(&mut candidates, state, revision));
            let mut fresh = world();
            fresh.take_local(sourced(&mut Candidates::default(), state, revision));
            assert_eq!(digest(&mut kept), digest(&mut fresh), "revision {revision}");
            assert!(kept.compile().expect("heard").changed.is_empty(), "nothing changes by itself");
            seen.insert(digest(&mut kept));
        }
        assert_eq!(seen.len(), states.len(), "each state has rules of its own");
    }

    #[test]
    fn compiles_nothing_for_nodes_before_the_first_message_of_the_hub() {
        let mut world = World::new("here".into(), UnknownPods::default(), Ends::default());
        world.take_local(sourced(&mut Candidates::default(), &format!("{NODE}{}", pod_of("p", "web", "10.0.0.1")), 1));
        assert!(world.compile().is_none(), "the hub's policies may deny what local ones allow");
        world.receive(Updates { in_force: Position { epoch: 1, revision: 7 }, ..Updates::default() });
        let owner = |world: &World| world.live().read().judge().end("10.0.0.1".parse().expect("an address")).pod;
        assert!(owner(&world).is_some(), "flows are judged all the same");
        let compiled = world.compile().expect("the hub was heard");
        let [(name, node)] = &compiled.changed[..] else { panic!("one node") };
        assert_eq!((&**name, node.rules.endpoints.len(), node.rules.digest()), ("n", 1, node.digest));
        assert_eq!((world.hub_revision(), world.live().read().hub_revision), (7, 7));
        assert!(world.compile().expect("the hub was heard").changed.is_empty());
    }

    #[test]
    fn a_cluster_is_first_hand_to_itself() {
        let mut world = world();
        world.take_local(sourced(
            &mut Candidates::default(),
            &format!("{NODE}{DENY}{}", pod_of("p", "web", "10.0.0.1")),
            1,
        ));
        let before = digest(&mut world);
        let relayed = |endpoint| Change::Endpoint { cluster: "here".into(), id: pod("a".into(), "p".into()), endpoint };
        let changes = vec![
            relayed(Some(Endpoint::default())),
            relayed(None),
            Change::Namespace { cluster: "here".into(), name: "a".into(), labels: None },
            Change::Withdrawn { name: "here".into() },
        ];
        world.receive(Updates { changes, in_force: Position { epoch: 1, revision: 1 } });
        assert_eq!(digest(&mut world), before, "what the hub says of this cluster's endpoints is not looked at");
    }

    #[test]
    fn an_own_stream_follows_its_pod_to_another_node() {
        let ends = Ends { hubs: ["10.0.0.9:7443".parse().expect("an address")].into(), ..Ends::default() };
        let mut world = World::new("here".into(), UnknownPods::default(), ends);
        world.receive(Updates { in_force: Position { epoch: 1, revision: 1 }, ..Updates::default() });
        let mut candidates = Candidates::default();
        let nodes = NODE.replace("10.0.0.0/24", "10.1.0.0/24")
            + &NODE.replace("name: 'n'", "name: m").replace("10.0.0", "10.2.0");
        for (revision, node) in [(1, "n"), (2, "m"), (3, "n")] {
            let hub = pod_of("hub", "hub", "10.0.0.9").replace("nodeName: 'n'", &format!("nodeName: '{node}'"));
            world.take_local(sourced(&mut candidates, &format!("{nodes}{hub}"), revision));
            world.compile().expect("the hub was heard");
            for name in ["n", "m"] {
                let streams = world.nodes()[name].rules.node.own_streams.iter();
                let towards_hub = streams.filter(|it| it.name.starts_with("anyone to hub")).count();
                assert_eq!(towards_hub, usize::from(name == node), "node {name} when the hub is on {node}");
            }
        }
    }
}
