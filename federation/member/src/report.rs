//! What the hub is told of enforcement: never more than what agents have acknowledged.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use hanse_api::{Diagnostic, SourceLocation};
use hanse_policy::model::PolicyKind;
use hanse_proto::federation::v1 as pb;
use hanse_ruleset::{ChainId, EndpointId, RuleSet};
use prost::Message;

use crate::exchange::client::Client;
use crate::exchange::wire::digest_bytes;
use crate::fanout::NodeStatus;
use crate::world::World;

/// Errors of one node that are told: of some 200 bytes each.
const MAX_ERRORS: usize = 1_000;
/// Stands for every policy.
const EVERYTHING: &str = "*";
/// Pods of one node that are told to be not enforced: as many as its agent tells.
const MAX_PODS: usize = MAX_TOLD;
/// Problems of the source that are told.
const MAX_PROBLEMS: usize = 100;
/// As many as an agent tells, of objects and of pods; where it tells so many there may be more.
const MAX_TOLD: usize = 1_000;

/// Clusters that a policy is told to wait for.
const MAX_AWAITED: usize = 10;
/// What is told of errors and pods, of all nodes together, and of policies: so that a report, with the places of its nodes,
/// stays below the 4 MiB and the 65,536 of each that a hub takes.
const MAX_DETAILS: Room = Room { bytes: 1 << 20, count: 32_768 };

/// How far this cluster's nodes are.
/// `own` is what is wrong with the member itself.
pub fn realisation(
    world: &World,
    told_of: &BTreeMap<Arc<str>, NodeStatus>,
    client: &Client,
    own: &[String],
) -> pb::Realisation {
    let nothing = NodeStatus::default();
    let mut nodes: Vec<pb::NodePosition> = world
        .nodes()
        .iter()
        .map(|(name, held)| position(name, told_of.get(name).unwrap_or(&nothing), &held.rules))
        .collect();
    let current = |node: &&pb::NodePosition| {
        let at = (node.hub_epoch, node.hub_revision, node.local_revision);
        let is_one = told_of.get(node.node.as_str()).is_none_or(|status| status.rivals.is_none());
        let hub = world.hub_position();
        node.connected && is_one && at == (Some(hub.epoch), hub.revision, world.local_revision())
    };
    let agents_current = nodes.iter().filter(current).count();
    let mut of_hub = client.problems();
    of_hub.extend(strangers(world.nodes(), told_of));
    client.with_receiver(|receiver| {
        let (policies, clusters) = receiver.waiting();
        let clusters: Vec<String> = clusters.iter().take(MAX_AWAITED).map(|name| name.to_string()).collect();
        let waiting = policies.into_iter().map(|policy| pb::PolicyState {
            policy: policy.to_string(),
            state: Some(pb::policy_state::State::Waiting(pb::Waiting { clusters: clusters.clone() })),
        });
        let refused = receiver.refused().into_iter().map(|(policy, why)| pb::PolicyState {
            policy: policy.to_string(),
            state: Some(pb::policy_state::State::Refused(why)),
        });
        let (received, in_force) = receiver.positions();
        let hub = pb::OriginState {
            origin: String::new(),
            position: Some(received.into()),
            digest: digest_bytes(receiver.hub_digest()),
        };
        let origins = receiver.origins().into_iter().map(|(origin, status)| pb::OriginState {
            origin: origin.to_string(),
            position: Some(status.position.into()),
            digest: digest_bytes(status.digest),
        });
        let mut policies = refused.chain(waiting).collect();
        fit(&mut nodes, &mut policies, MAX_DETAILS);
        pb::Realisation {
            hub: Some(in_force.into()),
            received: Some(received.into()),
            agents: u32::try_from(nodes.len()).unwrap_or(u32::MAX),
            agents_current: u32::try_from(agents_current).unwrap_or(u32::MAX),
            nodes,
            policies,
            origins: [hub].into_iter().chain(origins).collect(),
            problems: of_hub
                .into_iter()
                .chain(own.iter().cloned())
                .chain(world.problems().iter().map(in_words))
                .take(MAX_PROBLEMS)
                .collect(),
            local_revision: world.local_revision(),
        }
    })
}

/// Nodes whose agents are connected and of which the source knows nothing.
fn strangers<T>(known: &BTreeMap<Arc<str>, T>, told_of: &BTreeMap<Arc<str>, NodeStatus>) -> Vec<String> {
    // Before the first rules are compiled no node is known.
    let connected = told_of.iter().filter(|(_, status)| status.connected && !known.is_empty());
    let strangers = connected.filter(|(name, _)| !known.contains_key(*name));
    let problem = |(name, _)| {
        format!(
            "node {name}: its agent is connected, and the source has no Node of this name: check the agent's --node, and the source"
        )
    };
    strangers.map(problem).collect()
}

/// How much may be told.
#[derive(Debug, Clone, Copy)]
struct Room {
    bytes: usize,
    count: usize,
}

impl Room {
    /// Whether these still fit in.
    fn take(&mut self, bytes: usize, count: usize) -> bool {
        let fits = bytes <= self.bytes && count <= self.count;
        if fits {
            (self.bytes, self.count) = (self.bytes - bytes, self.count - count);
        }
        fits
    }
}

/// Leaves out what is too much. An error that stands for everything takes its place: what is not told may not count as well.
fn fit(nodes: &mut [pb::NodePosition], policies: &mut Vec<pb::PolicyState>, room: Room) {
    let everything = |error: String| pb::ObjectError { object: EVERYTHING.to_owned(), error };
    let mut of_nodes = room;
    for node in nodes.iter_mut() {
        let bytes = node.errors.iter().map(Message::encoded_len).sum::<usize>();
        if !of_nodes.take(node.problems.iter().map(String::len).sum(), node.problems.len()) {
            node.problems.clear();
        }
        if !of_nodes.take(bytes, node.errors.len()) {
            let count = node.errors.len();
            node.errors = vec![everything(format!("{count} objects have errors, more than is told of all nodes"))];
        }
        if !of_nodes.take(node.unenforced.iter().map(Message::encoded_len).sum(), node.unenforced.len()) {
            node.unenforced.clear();
        }
    }
    let mut of_policies = room;
    let told = policies.iter().take_while(|policy| of_policies.take(policy.encoded_len(), 1)).count();
    if told < policies.len() {
        let error = format!("{} policies wait or are refused, more than is told", policies.len());
        policies.truncate(told);
        nodes.iter_mut().for_each(|node| node.errors.push(everything(error.clone())));
    }
}

fn in_words(problem: &Diagnostic) -> String {
    let SourceLocation { file, line } = &problem.location;
    match problem.field.as_str() {
        "" => format!("{file}:{line}: {}", problem.message),
        field => format!("{file}:{line}: {field}: {}", problem.message),
    }
}

/// One node's. An error is told by the federated policies that it concerns, where it concerns some; else as the agent
/// named it.
fn position(name: &Arc<str>, status: &NodeStatus, rules: &RuleSet) -> pb::NodePosition {
    let mut errors: BTreeMap<String, String> = BTreeMap::new();
    if status.refused.len() >= MAX_TOLD || status.unenforced.len() >= MAX_TOLD {
        errors.insert(EVERYTHING.to_owned(), "more is wrong than the agent tells".to_owned());
    }
    if let Some((served, refused)) = status.rivals {
        let error = format!(
            "its key is used from two places, {served} (served) and {refused} (refused), so what it acknowledges does not count: one is \
             a copy of its folder; revoke the node, and enrol it anew"
        );
        errors.insert(EVERYTHING.to_owned(), error);
    }
    if let Some(failed) = &status.failed {
        errors.insert(String::new(), failed.clone());
    }
    let chains = ChainNames::default();
    for (object, reason) in &status.refused {
        let policies = concerned(rules, &chains, object);
        if policies.is_empty() {
            errors.entry(object.clone()).or_insert_with(|| reason.clone());
        }
        for policy in policies {
            errors.entry(policy).or_insert_with(|| format!("{object}: {reason}"));
        }
    }
    for pod in status.unenforced.iter().filter(|pod| is_known(&pod.reason)) {
        let id = EndpointId { namespace: pod.namespace.as_str().into(), name: pod.name.as_str().into() };
        for policy in of_endpoint(rules, &id) {
            let error = || format!("pod {}/{} is not enforced: {}", pod.namespace, pod.name, pod.reason);
            errors.entry(policy).or_insert_with(error);
        }
    }
    if errors.len() > MAX_ERRORS {
        let more = errors.len();
        errors = errors.into_iter().take(MAX_ERRORS).collect();
        errors.insert(EVERYTHING.to_owned(), format!("{more} objects have errors"));
    }
    pb::NodePosition {
        node: name.to_string(),
        hub_revision: status.place.hub_revision,
        local_revision: status.place.local_revision,
        connected: status.connected,
        // Rounded, so that time alone is no news.
        age_ms: status.heard.map_or(u64::MAX, |heard| heard.elapsed().as_secs() / 10 * 10_000),
        errors: errors.into_iter().map(|(object, error)| pb::ObjectError { object, error }).collect(),
        probe: status.probe.clone(),
        unenforced: status.unenforced.iter().take(MAX_PODS).cloned().collect(),
        unenforced_total: u32::try_from(status.unenforced.len()).unwrap_or(u32::MAX),
        term: status.place.generation.term,
        number: status.place.generation.number,
        agent_version: status.version.clone(),
        problems: status.problems.clone(),
        hub_epoch: Some(status.place.hub_epoch),
    }
}

/// Whether an agent knows that policy does not act on a pod. One that does not answer its probe is told, but no error; one on
/// the host's network is selected by no policy.
fn is_known(reason: &str) -> bool {
    !["not proven", "host network"].iter().any(|other| reason.starts_with(other))
}

/// The chains of a rule set by the names that agents use, made when the first is looked up.
type ChainNames = OnceCell<HashMap<String, ChainId>>;

/// The federated policies that stand in what an agent calls `object`.
fn concerned(rules: &RuleSet, chains: &ChainNames, object: &str) -> BTreeSet<String> {
    if let Some(policy) = object.strip_prefix("policy ") {
        return federated(policy).into_iter().collect();
    }
    if let Some(chain) = object.strip_prefix("chain ") {
        let chains = chains.get_or_init(|| rules.chains.keys().map(|id| (id.to_string(), *id)).collect());
        return chains.get(chain).map(|id| of_chain(rules, *id)).unwrap_or_default();
    }
    let endpoint = object.strip_prefix("endpoint ").and_then(|it| it.split_once('/'));
    endpoint
        .map(|(namespace, name)| of_endpoint(rules, &EndpointId { namespace: namespace.into(), name: name.into() }))
        .unwrap_or_default()
}

fn of_endpoint(rules: &RuleSet, id: &EndpointId) -> BTreeSet<String> {
    let endpoint = rules.endpoints.get(id).into_iter();
    let chains = endpoint.flat_map(|it| [it.ingress, it.egress, it.egress_to_node]);
    chains.flat_map(|chain| of_chain(rules, chain)).collect()
}

fn of_chain(rules: &RuleSet, id: ChainId) -> BTreeSet<String> {
    let chain = rules.chains.get(&id).into_iter();
    let policies = chain.flat_map(|it| &it.phases).flat_map(|it| &it.tiers).flat_map(|it| &it.policies);
    policies.filter_map(|id| federated(&rules.policies.get(id)?.name)).collect()
}

/// The name of a federated policy, by what rule sets call it: `kind name`.
fn federated(name: &str) -> Option<String> {
    let name = name.strip_prefix(PolicyKind::FederatedNetworkPolicy.name())?;
    name.strip_prefix(' ').map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use hanse_ruleset::{Chain, LocalEndpoint, Phase, Policy, Tier, TierDefault};

    use super::*;

    /// A pod that the federated policies `a` and `ab` and a local one stand on.
    fn rules() -> RuleSet {
        let policy = |name: &str| Arc::new(Policy { name: name.into(), rules: Vec::new() });
        let policies = ["FederatedNetworkPolicy a", "FederatedNetworkPolicy ab", "NetworkPolicy x/a"].map(policy);
        let tier = Tier {
            name: "t".into(),
            policies: policies.iter().map(|it| it.id()).collect(),
            default: TierDefault::Deny,
        };
        let chain = Chain { phases: vec![Phase { name: "Guard".into(), tiers: vec![tier] }], profile_allows: true };
        let id = EndpointId { namespace: "x".into(), name: "p".into() };
        let chain_id = chain.id();
        let endpoint = LocalEndpoint {
            id: id.clone(),
            addresses: Vec::new(),
            ingress: chain_id,
            egress: chain_id,
            egress_to_node: chain_id,
        };
        RuleSet {
            policies: policies.into_iter().map(|it| (it.id(), it)).collect(),
            chains: [(chain_id, Arc::new(chain))].into(),
            endpoints: [(id, Arc::new(endpoint))].into(),
            ..RuleSet::default()
        }
    }

    fn check(status: NodeStatus, expected: &[&str]) {
        let told = position(&"n".into(), &status, &rules());
        let objects: Vec<&str> = told.errors.iter().map(|it| it.object.as_str()).collect();
        assert_eq!(objects, expected, "{status:?}");
    }

    fn refused(object: &str) -> NodeStatus {
        NodeStatus { refused: vec![(object.to_owned(), "no".to_owned())], ..NodeStatus::default() }
    }

    #[test]
    fn a_connected_node_that_the_source_does_not_know_is_a_problem() {
        let node = |connected| NodeStatus { connected, ..NodeStatus::default() };
        let told_of = [("n".into(), node(true)), ("nn".into(), node(true)), ("away".into(), node(false))].into();
        let problems = strangers(&[("n".into(), ())].into(), &told_of);
        assert!(matches!(&problems[..], [problem] if problem.starts_with("node nn: ")), "{problems:?}");
        assert_eq!(strangers::<()>(&BTreeMap::new(), &told_of), [] as [&str; 0]);
    }

    /// What does not fit is no success.
    #[test]
    fn what_is_too_much_to_tell_stands_for_everything() {
        let error = |object: &str| pb::ObjectError { object: object.to_owned(), error: "no".to_owned() };
        let pod = pb::UnenforcedPod::default();
        let node = pb::NodePosition {
            errors: vec![error("a"), error("b")],
            unenforced: vec![pod; 2],
            unenforced_total: 2,
            ..pb::NodePosition::default()
        };
        let policy = pb::PolicyState { policy: "p".to_owned(), state: None };
        let told = |room: Room| {
            let (mut nodes, mut policies) = (vec![node.clone(), node.clone()], vec![policy.clone(); 3]);
            fit(&mut nodes, &mut policies, room);
            let objects = nodes.iter().flat_map(|node| node.errors.iter().map(|it| it.object.clone()));
            let pods: usize = nodes.iter().map(|node| node.unenforced.len()).sum();
            assert!(nodes.iter().all(|node| node.unenforced_total == 2));
            (objects.collect::<Vec<_>>().join(" "), pods, policies.len())
        };
        let room = |bytes, count| Room { bytes, count };
        assert_eq!(told(room(1 << 20, 1_000)), ("a b a b".to_owned(), 4, 3));
        assert_eq!(told(room(1 << 20, 5)), ("a b *".to_owned(), 2, 3));
        assert_eq!(told(room(1 << 20, 2)), ("a b * * *".to_owned(), 0, 2));
        assert_eq!(told(room(20, 1_000)), ("a b *".to_owned(), 4, 3));
        assert_eq!(told(room(6, 1_000)), ("* * * *".to_owned(), 4, 2));
    }

    #[test]
    fn errors_name_the_federated_policies_that_they_concern() {
        check(NodeStatus::default(), &[]);
        check(refused("policy FederatedNetworkPolicy a"), &["a"]);
        check(refused("policy NetworkPolicy x/a"), &["policy NetworkPolicy x/a"]);
        check(refused("endpoint x/p"), &["a", "ab"]);
        let chain = *rules().chains.keys().next().expect("a chain");
        check(refused(&format!("chain {chain}")), &["a", "ab"]);
        check(refused("set 00"), &["set 00"]);
        let unproven = pb::UnenforcedPod { namespace: "x".into(), name: "p".into(), reason: "not proven: so".into() };
        check(NodeStatus { unenforced: vec![unproven], ..NodeStatus::default() }, &[]);
        let pod =
            |name: &str| pb::UnenforcedPod { namespace: "x".into(), name: name.into(), reason: "bypassed".into() };
        check(NodeStatus { unenforced: vec![pod("p")], ..NodeStatus::default() }, &["a", "ab"]);
        check(NodeStatus { unenforced: vec![pod("on-the-host")], ..NodeStatus::default() }, &[]);
        check(NodeStatus { failed: Some("no".into()), ..NodeStatus::default() }, &[""]);
        // What is acknowledged may be a copy's.
        let rivals = Some(([192, 0, 2, 1], 1).into()).zip(Some(([192, 0, 2, 2], 2).into()));
        check(NodeStatus { rivals, ..NodeStatus::default() }, &["*"]);
        // Files that cannot be written are no error of an object.
        check(NodeStatus { problems: vec!["no space".into()], ..NodeStatus::default() }, &[]);
        // Where something may be left out, nothing counts as enforced.
        check(NodeStatus { unenforced: vec![pod("q"); MAX_TOLD], ..NodeStatus::default() }, &["*"]);
        let many = (0..2 * MAX_ERRORS).map(|it| (format!("set {it}"), "no".to_owned())).collect();
        let told = position(&"n".into(), &NodeStatus { refused: many, ..NodeStatus::default() }, &rules());
        assert_eq!(told.errors.first().map(|it| &*it.object), Some("*"));
        assert!(told.errors.len() <= MAX_ERRORS + 1);
    }
}
