//! The report to the hub about enforcement. It contains only what agents have acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_api::{Diagnostic, SourceLocation};
use hanse_policy::model::PolicyKind;
use hanse_proto::federation::v1 as pb;
use hanse_protocol::reason::{FileProblem, Finding, Object, Reason, Subject, wire};
use hanse_ruleset::{ChainId, EndpointId, Enforcement, RuleSet};
use prost::Message;

use crate::exchange::client::Client;
use crate::exchange::model::ManifestKind;
use crate::fanout::NodeStatus;
use crate::world::World;
use hanse_exchange::codec::digest_bytes;

/// The maximum number of errors per node, about 200 bytes each.
const MAX_ERRORS: usize = 1_000;
/// The maximum number of refusals, and of pods, in a report of an agent. A report with this number may be incomplete.
const MAX_REPORTED: usize = 1_000;
/// The maximum number of problems of the source.
const MAX_PROBLEMS: usize = 100;
/// The maximum number of clusters per waiting policy.
const MAX_AWAITED: usize = 10;
/// The limit of errors, pods and policies of all nodes. With the positions of nodes, a report stays below the limits of the hub: 4 MiB,
/// and 65,536 of each.
const MAX_DETAILS: Room = Room { bytes: 1 << 20, count: 32_768 };

/// The enforcement status of this cluster. `failing`: files that the member itself cannot write.
pub fn realisation(
    world: &World,
    reported: &BTreeMap<Arc<str>, NodeStatus>,
    client: &Client,
    failing: BTreeMap<&'static str, String>,
) -> pb::Realisation {
    let nothing = NodeStatus::default();
    let mut nodes: Vec<pb::NodePosition> = world
        .nodes()
        .iter()
        .map(|(name, compiled)| position(name, reported.get(name).unwrap_or(&nothing), &compiled.rules))
        .collect();
    let is_current = |node: &&pb::NodePosition| {
        let at = (node.hub_epoch, node.hub_revision, node.local_revision);
        let status = reported.get(node.node.as_str());
        let counts = status.is_none_or(|status| status.rivals.is_none() && !status.rules_may_differ());
        let hub = world.hub_position();
        node.connected && counts && at == (Some(hub.epoch), hub.revision, world.local_revision())
    };
    let agents_current = nodes.iter().filter(is_current).count();
    let of_exchange = client.problems().into_iter().map(Reason::Exchange);
    let of_files = failing.into_iter().map(|(file, error)| Reason::File(FileProblem { file: file.to_owned(), error }));
    let of_source = world.problems().most_important().map(manifest_problem);
    let of_nodes = unknown_nodes(world.nodes(), reported).into_iter().chain(world.outside_ranges());
    let problems = of_exchange.chain(of_nodes).chain(of_files).chain(of_source);
    let problems = problems.take(MAX_PROBLEMS).map(|reason| wire::reason(&reason)).collect();
    client.with_receiver(|receiver| {
        let (policies, clusters) = receiver.waiting();
        let clusters: Vec<String> = clusters.iter().take(MAX_AWAITED).map(|name| name.to_string()).collect();
        let is_staged = |kind: ManifestKind| kind == ManifestKind::StagedPolicy;
        let waiting = policies.into_iter().map(|(kind, policy)| pb::PolicyState {
            policy: policy.to_string(),
            staged: is_staged(kind),
            state: Some(pb::policy_state::State::Waiting(pb::Waiting { clusters: clusters.clone() })),
        });
        let refused = receiver.refused().into_iter().map(|((kind, policy), why)| pb::PolicyState {
            policy: policy.to_string(),
            staged: is_staged(kind),
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
            problems,
            local_revision: world.local_revision(),
            digests_equal: client.digests_equal(),
        }
    })
}

/// Nodes with a connected agent that are not in the source.
fn unknown_nodes<T>(known: &BTreeMap<Arc<str>, T>, reported: &BTreeMap<Arc<str>, NodeStatus>) -> Vec<Reason> {
    // Empty before the first compilation.
    let connected = reported.iter().filter(|(_, status)| status.connected && !known.is_empty());
    let unknown = connected.filter(|(name, _)| !known.contains_key(*name));
    unknown.map(|(name, _)| Reason::UnknownNode(name.to_string())).collect()
}

/// The remaining space in a report.
#[derive(Debug, Clone, Copy)]
struct Room {
    bytes: usize,
    count: usize,
}

impl Room {
    /// Reserves space. Returns false if it does not suffice.
    fn take(&mut self, bytes: usize, count: usize) -> bool {
        let fits = bytes <= self.bytes && count <= self.count;
        if fits {
            (self.bytes, self.count) = (self.bytes - bytes, self.count - count);
        }
        fits
    }
}

fn error(subject: &Subject, at: Option<&Object>, reason: &Reason) -> pb::ObjectError {
    pb::ObjectError {
        subject: Some(wire::subject(subject)),
        at: at.map(wire::object),
        reason: Some(wire::reason(reason)),
    }
}

fn incomplete() -> pb::ObjectError {
    error(&Subject::Everything, None, &Reason::Incomplete)
}

/// Removes entries above the limit and replaces them with an error for all objects, so that unreported objects do not count as enforced.
fn fit(nodes: &mut [pb::NodePosition], policies: &mut Vec<pb::PolicyState>, room: Room) {
    let mut of_nodes = room;
    for node in nodes.iter_mut() {
        let bytes = node.errors.iter().map(Message::encoded_len).sum::<usize>();
        if !of_nodes.take(node.files.iter().map(Message::encoded_len).sum(), node.files.len()) {
            node.files.clear();
        }
        if !of_nodes.take(bytes, node.errors.len()) {
            node.errors = vec![incomplete()];
        }
        if !of_nodes.take(node.unenforced.iter().map(Message::encoded_len).sum(), node.unenforced.len()) {
            node.unenforced.clear();
        }
    }
    let mut of_policies = room;
    let fitting = policies.iter().take_while(|policy| of_policies.take(policy.encoded_len(), 1)).count();
    if fitting < policies.len() {
        policies.truncate(fitting);
        nodes.iter_mut().for_each(|node| node.errors.push(incomplete()));
    }
}

fn manifest_problem(problem: &Diagnostic) -> Reason {
    let SourceLocation { file, line } = &problem.location;
    let (field, message) = (problem.field.clone(), problem.message.clone());
    Reason::Manifest { file: file.to_string(), line: *line, field, message }
}

/// The position of one node. An error is reported for the affected federated policies, or if there are none, for the object.
fn position(name: &Arc<str>, status: &NodeStatus, rules: &RuleSet) -> pb::NodePosition {
    let mut errors: BTreeMap<Subject, (Option<Object>, Reason)> = BTreeMap::new();
    if status.refused.len() >= MAX_REPORTED || status.unenforced.len() >= MAX_REPORTED {
        errors.insert(Subject::Everything, (None, Reason::Incomplete));
    }
    if let Some((served, refused)) = status.rivals {
        let reason = Reason::KeyInUse { served: served.to_string(), refused: refused.to_string() };
        errors.insert(Subject::Everything, (None, reason));
    }
    if rules.node.enforcement == Enforcement::Observe {
        errors.entry(Subject::Everything).or_insert((None, Reason::Observing));
    }
    // No object counts as enforced then, whatever the position.
    let differing = status.hooks.as_ref().filter(|_| status.rules_may_differ());
    if let Some(problem) = differing {
        errors.entry(Subject::Everything).or_insert_with(|| (None, Reason::Hooks(problem.clone())));
    }
    for (object, rejection) in &status.refused {
        let reason = Reason::Rejection(rejection.clone());
        let Some(object) = object else {
            errors.entry(Subject::Everything).or_insert((None, reason));
            continue;
        };
        let policies = concerned(rules, object);
        if policies.is_empty() {
            errors.entry(Subject::Object(object.clone())).or_insert_with(|| (None, reason.clone()));
        }
        let at = (!matches!(object, Object::Policy { .. })).then_some(object);
        for policy in policies {
            errors.entry(Subject::FederatedPolicy(policy)).or_insert_with(|| (at.cloned(), reason.clone()));
        }
    }
    for (id, finding) in status.unenforced.iter().filter(|(_, finding)| finding.is_error()) {
        for policy in of_endpoint(rules, id) {
            let error = || (Some(Object::Endpoint(id.clone())), Reason::Finding(finding.clone()));
            errors.entry(Subject::FederatedPolicy(policy)).or_insert_with(error);
        }
    }
    if errors.len() > MAX_ERRORS {
        errors = errors.into_iter().take(MAX_ERRORS).collect();
        errors.insert(Subject::Everything, (None, Reason::Incomplete));
    }
    let pod = |(id, finding): &(EndpointId, Finding)| pb::UnenforcedPod {
        pod: Some(wire::pod(id)),
        finding: Some(wire::finding(finding)),
    };
    pb::NodePosition {
        node: name.to_string(),
        hub_revision: status.position.hub_revision,
        local_revision: status.position.local_revision,
        connected: status.connected,
        // Rounded, so that the passage of time alone does not change the report.
        age_ms: status.last_seen.map_or(u64::MAX, |at| at.elapsed().as_secs() / 10 * 10_000),
        errors: errors.iter().map(|(subject, (at, reason))| error(subject, at.as_ref(), reason)).collect(),
        hooks: status.hooks.as_ref().filter(|_| differing.is_none()).map(wire::hooks),
        unenforced: status.unenforced.iter().take(MAX_REPORTED).map(pod).collect(),
        unenforced_total: u32::try_from(status.unenforced.len()).unwrap_or(u32::MAX),
        term: status.position.generation.term,
        number: status.position.generation.number,
        agent_version: status.version.clone(),
        files: status.files.iter().map(wire::file).collect(),
        hub_epoch: Some(status.position.hub_epoch),
        failure: status.failed.as_ref().map(wire::failure),
    }
}

/// The federated policies that contain an object.
fn concerned(rules: &RuleSet, object: &Object) -> BTreeSet<String> {
    match object {
        Object::Policy { name, .. } => federated(name).into_iter().collect(),
        Object::Chain(id) => of_chain(rules, *id),
        Object::Endpoint(id) => of_endpoint(rules, id),
        Object::Set(_) => BTreeSet::new(),
    }
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

/// The name of a federated policy, from the name in a rule set: `KIND NAME`.
fn federated(name: &str) -> Option<String> {
    let (kind, name) = name.split_once(' ')?;
    (kind == PolicyKind::FederatedNetworkPolicy.name()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use hanse_protocol::reason::{Failure, HookProblem, Rejection};
    use hanse_ruleset::{Chain, LocalEndpoint, Phase, Policy, PolicyId, SetId, Tier, TierDefault};

    use super::*;

    /// A pod that the federated policies `a` and `ab` and a local one select.
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

    fn subjects(node: &pb::NodePosition) -> Vec<Subject> {
        node.errors.iter().map(|it| wire::parse_subject(it.subject.clone().unwrap_or_default())).collect()
    }

    fn check(status: NodeStatus, expected: &[Subject]) {
        assert_eq!(subjects(&position(&"n".into(), &status, &rules())), expected, "{status:?}");
    }

    fn rejection() -> Rejection {
        Rejection { error: "no".to_owned(), set: None }
    }

    fn refused(object: Object) -> NodeStatus {
        NodeStatus { refused: vec![(Some(object), rejection())], ..NodeStatus::default() }
    }

    fn of(policies: &[&str]) -> Vec<Subject> {
        policies.iter().map(|name| Subject::FederatedPolicy((*name).to_owned())).collect()
    }

    #[test]
    fn reports_connected_nodes_that_the_source_does_not_have() {
        let node = |connected| NodeStatus { connected, ..NodeStatus::default() };
        let reported = [("n".into(), node(true)), ("nn".into(), node(true)), ("away".into(), node(false))].into();
        let problems = unknown_nodes(&[("n".into(), ())].into(), &reported);
        assert_eq!(problems, [Reason::UnknownNode("nn".to_owned())]);
        assert_eq!(unknown_nodes::<()>(&BTreeMap::new(), &reported), []);
    }

    /// Entries above the limit do not count as enforced.
    #[test]
    fn replaces_errors_that_do_not_fit_by_one_of_every_object() {
        let error = |name: &str| {
            error(&Subject::FederatedPolicy(name.to_owned()), None, &Reason::PolicyUnreadable("no".to_owned()))
        };
        let pod = pb::UnenforcedPod::default();
        let node = pb::NodePosition {
            errors: vec![error("a"), error("b")],
            unenforced: vec![pod; 2],
            unenforced_total: 2,
            ..pb::NodePosition::default()
        };
        let policy = pb::PolicyState { policy: "p".to_owned(), ..Default::default() };
        let fitted = |room: Room| {
            let (mut nodes, mut policies) = (vec![node.clone(), node.clone()], vec![policy.clone(); 3]);
            fit(&mut nodes, &mut policies, room);
            let name = |subject: Subject| match subject {
                Subject::FederatedPolicy(name) => name,
                _ => "*".to_owned(),
            };
            let objects = nodes.iter().flat_map(subjects).map(name);
            let pods: usize = nodes.iter().map(|node| node.unenforced.len()).sum();
            assert!(nodes.iter().all(|node| node.unenforced_total == 2));
            (objects.collect::<Vec<_>>().join(" "), pods, policies.len())
        };
        let room = |bytes, count| Room { bytes, count };
        assert_eq!(fitted(room(1 << 20, 1_000)), ("a b a b".to_owned(), 4, 3));
        assert_eq!(fitted(room(1 << 20, 5)), ("a b *".to_owned(), 2, 3));
        assert_eq!(fitted(room(1 << 20, 2)), ("a b * * *".to_owned(), 0, 2));
        assert_eq!(fitted(room(2 * error("a").encoded_len(), 1_000)), ("a b *".to_owned(), 4, 3));
        assert_eq!(fitted(room(6, 1_000)), ("* * * *".to_owned(), 4, 2));
    }

    #[test]
    fn errors_name_the_federated_policies_that_they_concern() {
        let policy = |name: &str| Object::Policy { id: PolicyId([1; 16]), name: name.into() };
        let pod = |name: &str| EndpointId { namespace: "x".into(), name: name.into() };
        let found =
            |id: EndpointId, finding: Finding| NodeStatus { unenforced: vec![(id, finding)], ..NodeStatus::default() };
        let (address, everything) = ([10, 1, 0, 2].into(), [Subject::Everything]);
        check(NodeStatus::default(), &[]);
        check(refused(policy("FederatedNetworkPolicy a")), &of(&["a"]));
        let local = policy("NetworkPolicy x/a");
        check(refused(local.clone()), &[Subject::Object(local)]);
        check(refused(Object::Endpoint(pod("p"))), &of(&["a", "ab"]));
        let chain = *rules().chains.keys().next().expect("a chain");
        check(refused(Object::Chain(chain)), &of(&["a", "ab"]));
        let set = Object::Set(SetId([0; 16]));
        check(refused(set.clone()), &[Subject::Object(set)]);
        // An object of an unknown kind may be any object.
        check(NodeStatus { refused: vec![(None, rejection())], ..NodeStatus::default() }, &everything);
        for finding in [Finding::Pending, Finding::Silent(address), Finding::HostNetwork(address)] {
            check(found(pod("p"), finding), &[]);
        }
        let second = Finding::SecondInterface("eth0, net1".to_owned());
        for finding in [second, Finding::Bypassed(address), Finding::Ipvs, Finding::Unknown] {
            check(found(pod("p"), finding.clone()), &of(&["a", "ab"]));
            check(found(pod("on-the-host"), finding), &[]);
        }
        for hooks in [HookProblem::NotRestored("not permitted".to_owned()), HookProblem::Unknown] {
            let status = NodeStatus { hooks: Some(hooks.clone()), ..NodeStatus::default() };
            let position = position(&"n".into(), &status, &rules());
            let reason = position.errors[0].reason.clone().map(wire::parse_reason);
            assert_eq!((reason, position.hooks), (Some(Reason::Hooks(hooks)), None), "the problem is reported once");
            check(status, &everything);
        }
        check(NodeStatus { hooks: Some(HookProblem::NotProven), ..NodeStatus::default() }, &[]);
        let failed = NodeStatus { failed: Some(Failure::Unknown), ..NodeStatus::default() };
        assert!(position(&"n".into(), &failed, &rules()).failure.is_some(), "also one that this version does not know");
        // The acknowledgement may come from a copy.
        let rivals = Some(([192, 0, 2, 1], 1).into()).zip(Some(([192, 0, 2, 2], 2).into()));
        check(NodeStatus { rivals, ..NodeStatus::default() }, &everything);
        // A file that cannot be written is not an error of an object.
        let files = vec![FileProblem { file: "f".to_owned(), error: "no space".to_owned() }];
        check(NodeStatus { files, ..NodeStatus::default() }, &[]);
        // If the report may be incomplete, nothing counts as enforced.
        let silent = (pod("q"), Finding::Silent(address));
        check(NodeStatus { unenforced: vec![silent; MAX_REPORTED], ..NodeStatus::default() }, &everything);
        let set = |it: usize| Object::Set(SetId::of_meaning(&[&it.to_string()]));
        let many = (0..2 * MAX_ERRORS).map(|it| (Some(set(it)), rejection())).collect();
        let fitted = position(&"n".into(), &NodeStatus { refused: many, ..NodeStatus::default() }, &rules());
        assert_eq!(subjects(&fitted).first(), Some(&Subject::Everything));
        assert!(fitted.errors.len() <= MAX_ERRORS + 1);
    }
}
