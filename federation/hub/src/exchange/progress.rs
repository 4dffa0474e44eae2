//! How far clusters enforce what they were sent: their reports, compared with where they should be.

use std::collections::HashMap;
use std::time::Duration;

use hanse_proto::federation::v1 as pb;
use hanse_proto::report::v1::{object, subject};
use hanse_protocol::reason::{Agent, Behind, Lag, Object, Reason, Subject, wire};
use hanse_store::Revision;

use crate::status::{NodeProgress, NodeReason, NodeState, ObjectState, ObjectStatus, Problem, Reasons};
use hanse_exchange::model::{ManifestKind, Position};

/// Nodes whose reasons a status has; the rest is counted.
const NAMED_NODES: usize = 3;

/// A cluster's last report of enforcement.
#[derive(Debug, Clone, Copy)]
pub struct Report<'a> {
    pub reported: &'a pb::Realisation,
    /// The position of this hub.
    pub hub: Position,
    /// Since it arrived.
    pub age: Duration,
    /// The cluster is silent, so that the report may be outdated.
    pub silent: bool,
    /// How long an agent that is not connected counts.
    pub lease: Duration,
}

impl Report<'_> {
    /// Problems of the cluster as a whole, and of each node.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        let of_cluster = self.reported.problems.iter().map(|it| Problem::new("", wire::parse_reason(it.clone())));
        of_cluster.chain(self.reported.nodes.iter().flat_map(|node| self.node_problems(node)))
    }

    pub fn nodes(&self) -> impl Iterator<Item = NodeProgress> {
        self.reported.nodes.iter().map(|node| {
            let problems: Vec<Problem> = self.node_problems(node).collect();
            NodeProgress {
                name: node.node.clone(),
                state: match (self.silent, problems.is_empty()) {
                    (true, _) => NodeState::Unknown,
                    (false, true) => NodeState::Enforcing,
                    (false, false) => NodeState::Lagging,
                },
                connected: node.connected,
                generation: (node.term, node.number),
                hub_revision: node.hub_revision,
                local_revision: node.local_revision,
                age: self.age_of(node),
                agent_version: node.agent_version.clone(),
                unenforced: node.unenforced_total,
                problems,
            }
        })
    }

    /// Since the agent last acknowledged something, or its stream ended.
    fn age_of(&self, node: &pb::NodePosition) -> Option<Duration> {
        (node.age_ms != u64::MAX).then(|| self.age.saturating_add(Duration::from_millis(node.age_ms)))
    }

    /// Whether an agent is not connected for longer than a lease: its rules are in the kernel, but nothing repairs them.
    fn is_gone(&self, node: &pb::NodePosition) -> bool {
        !node.connected && self.age_of(node).is_none_or(|age| age >= self.lease)
    }

    fn node_problems(&self, node: &pb::NodePosition) -> impl Iterator<Item = Problem> {
        let problem = |reason: Reason| Problem::new(&node.node, reason);
        let lag = self.lag(node).map(|lag| problem(Reason::Lag(lag)));
        let hooks = node.hooks.clone().map(|it| problem(Reason::Hooks(wire::parse_hooks(it))));
        let errors = node.errors.iter().cloned().map(|it| {
            let subject = wire::parse_subject(it.subject.unwrap_or_default());
            Error {
                at: it.at.and_then(wire::parse_object),
                reason: wire::parse_reason(it.reason.unwrap_or_default()),
                item: (subject != Subject::Everything).then_some(subject),
            }
        });
        let pods = node.unenforced.iter().cloned().map(|it| {
            let pod = Object::Endpoint(wire::parse_pod(it.pod.unwrap_or_default()));
            let finding = wire::parse_finding(it.finding.unwrap_or_default());
            Error { at: None, reason: Reason::Finding(finding), item: Some(Subject::Object(pod)) }
        });
        let unnamed = node.unenforced_total.saturating_sub(u32::try_from(node.unenforced.len()).unwrap_or(u32::MAX));
        let unnamed = (unnamed > 0).then(|| Problem { count: unnamed, ..problem(Reason::PodsNotNamed) });
        let grouped = grouped(&node.node, errors.chain(pods));
        let files: Vec<Problem> =
            node.files.iter().cloned().map(|it| problem(Reason::File(wire::parse_file(it)))).collect();
        lag.into_iter().chain(hooks).chain(grouped).chain(unnamed).chain(files)
    }

    /// The hub's position that a node enforces.
    fn position_of(&self, node: &pb::NodePosition) -> Position {
        let of_report = self.reported.hub.as_ref().map_or(0, |at| at.epoch);
        Position { epoch: node.hub_epoch.unwrap_or(of_report), revision: node.hub_revision }
    }

    /// The revision of the hub that a node enforces. None where it is of another epoch, or this hub has not reached it: what the node
    /// enforces is unknown then.
    fn revision_of(&self, node: &pb::NodePosition) -> Option<u64> {
        let at = self.position_of(node);
        (at.epoch == self.hub.epoch && at.revision <= self.hub.revision).then_some(at.revision)
    }

    /// The revision of the hub that all of the cluster enforces, as its member and its nodes report.
    pub fn enforced_revision(&self) -> u64 {
        let of_member = self.reported.hub.as_ref().filter(|at| at.epoch == self.hub.epoch).map_or(0, |at| at.revision);
        let of_nodes = self.reported.nodes.iter().map(|node| self.revision_of(node).unwrap_or_default());
        of_nodes.chain([of_member]).min().unwrap_or_default()
    }

    /// Why a node does not enforce the newest rule set of its member.
    fn lag(&self, node: &pb::NodePosition) -> Option<Lag> {
        let of_member = self.reported.hub.unwrap_or_default();
        let (hub, local) = (self.position_of(node), node.local_revision);
        let behind = if hub.epoch == self.hub.epoch && hub.revision > self.hub.revision {
            Some(Behind::AheadOfHub { at: hub.revision, hub: self.hub.revision })
        } else if hub.epoch != of_member.epoch {
            // Revisions of different epochs cannot be compared.
            Some(Behind::OtherEpoch { at: hub.revision })
        } else if hub.revision < of_member.revision {
            Some(Behind::Hub { at: hub.revision, wanted: of_member.revision })
        } else if local < self.reported.local_revision {
            Some(Behind::Local { at: local, wanted: self.reported.local_revision })
        } else {
            None
        };
        let failure = node.failure.clone().map(wire::parse_failure);
        let agent = match (node.connected, self.age_of(node)) {
            (true, _) => Agent::Connected,
            (false, None) => Agent::NeverConnected,
            (false, Some(age)) => Agent::Silent(age),
        };
        let lags = agent != Agent::Connected || behind.is_some() || failure.is_some();
        lags.then_some(Lag { agent, behind, failure })
    }

    /// The state of an object at this revision. Errors of a policy are found by its kind and name. A staged policy counts as
    /// enforced where it is evaluated.
    pub fn object(&self, policy: Option<(ManifestKind, &str)>, needed: Revision) -> ObjectStatus {
        // Nodes have no staged policies.
        let enforced = policy.filter(|(kind, _)| *kind == ManifestKind::Policy).map(|(_, name)| name);
        let (mut enforcing, mut refused, mut lagging) = (0_u32, Vec::new(), Vec::new());
        for node in &self.reported.nodes {
            let reason = |error: &pb::ObjectError| NodeReason {
                node: node.node.clone(),
                at: error.at.clone().and_then(wire::parse_object),
                reason: wire::parse_reason(error.reason.clone().unwrap_or_default()),
            };
            let of_policy = enforced.and_then(|name| node.errors.iter().find(|error| is_of_policy(error, name)));
            if let Some(error) = of_policy {
                refused.push(reason(error));
            } else if let Some(error) = node.errors.iter().find(|error| is_of_everything(error)) {
                lagging.push(reason(error));
            } else if self.is_gone(node) || self.revision_of(node).is_none_or(|at| at < needed) {
                let behind = Some(Behind::Hub { at: node.hub_revision, wanted: needed });
                let lag = self.lag(node).unwrap_or(Lag { agent: Agent::Connected, behind, failure: None });
                lagging.push(NodeReason { node: node.node.clone(), at: None, reason: Reason::Lag(lag) });
            } else {
                enforcing = enforcing.saturating_add(1);
            }
        }
        // Revisions of a store before this one do not count.
        let at = self.reported.hub.as_ref().filter(|at| at.epoch == self.hub.epoch).map_or(0, |at| at.revision);
        let is_of = |it: &&pb::PolicyState, (kind, name): (ManifestKind, &str)| {
            it.policy == name && it.staged == (kind == ManifestKind::StagedPolicy)
        };
        let of_policies = policy.and_then(|policy| self.reported.policies.iter().find(|it| is_of(it, policy)));
        let state = match of_policies.and_then(|it| it.state.as_ref()) {
            Some(pb::policy_state::State::Refused(why)) => {
                ObjectState::Refused(Reasons::of_cluster(Reason::PolicyUnreadable(why.clone())))
            }
            Some(pb::policy_state::State::Waiting(waiting)) => {
                ObjectState::Lagging(Reasons::of_cluster(Reason::Waiting(waiting.clusters.clone())))
            }
            // A state that this version does not know.
            None if of_policies.is_some() => ObjectState::Lagging(Reasons::of_cluster(Reason::Unknown)),
            None if !refused.is_empty() => ObjectState::Refused(first_of(refused)),
            None if !lagging.is_empty() => ObjectState::Lagging(first_of(lagging)),
            None if at < needed => {
                let behind = Behind::Hub { at, wanted: needed };
                ObjectState::Lagging(Reasons::of_cluster(Reason::MemberBehind(behind)))
            }
            None => ObjectState::Enforced,
        };
        let nodes = u32::try_from(self.reported.nodes.len()).unwrap_or(u32::MAX);
        ObjectStatus { state, nodes_enforcing: enforcing, nodes }
    }
}

fn subject_of(error: &pb::ObjectError) -> Option<&subject::Subject> {
    error.subject.as_ref()?.subject.as_ref()
}

fn is_of_policy(error: &pb::ObjectError, name: &str) -> bool {
    matches!(subject_of(error), Some(subject::Subject::FederatedPolicy(it)) if it == name)
}

/// Also where this version does not know what the error concerns: it may be any object.
fn is_of_everything(error: &pb::ObjectError) -> bool {
    match subject_of(error) {
        None | Some(subject::Subject::Everything(_)) => true,
        Some(subject::Subject::FederatedPolicy(_)) => false,
        Some(subject::Subject::Object(it)) => match &it.object {
            None => true,
            Some(object::Object::Set(id) | object::Object::Chain(id)) => id.len() != 16,
            Some(object::Object::Policy(it)) => it.id.len() != 16,
            Some(object::Object::Pod(_)) => false,
        },
    }
}

struct Error {
    at: Option<Object>,
    reason: Reason,
    item: Option<Subject>,
}

/// Errors with equal groups are one problem. Findings of several pods differ in their addresses only.
#[derive(PartialEq, Eq, Hash)]
enum Group {
    Pods(&'static str),
    Other(Option<Object>, Reason),
}

/// One problem for each reason, in the order in which reasons appear.
fn grouped(node: &str, all: impl Iterator<Item = Error>) -> Vec<Problem> {
    let (mut problems, mut positions): (Vec<Problem>, HashMap<Group, usize>) = Default::default();
    for Error { at, reason, item } in all {
        let group = match (&at, &reason) {
            (None, Reason::Finding(_)) => Group::Pods(reason.code()),
            _ => Group::Other(at.clone(), reason.clone()),
        };
        let position = *positions.entry(group).or_insert_with(|| {
            problems.push(Problem { at, count: 0, ..Problem::new(node, reason) });
            problems.len() - 1
        });
        problems[position].count = problems[position].count.saturating_add(1);
        problems[position].items.extend(item);
    }
    problems
}

fn first_of(mut all: Vec<NodeReason>) -> Reasons {
    let more = all.len().saturating_sub(NAMED_NODES);
    all.truncate(NAMED_NODES);
    Reasons { first: all, more: u32::try_from(more).unwrap_or(u32::MAX) }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use hanse_protocol::reason::words::Words;
    use hanse_protocol::reason::{Failure, Finding};
    use hanse_ruleset::EndpointId;

    use super::*;

    fn node(name: &str) -> pb::NodePosition {
        pb::NodePosition { node: name.to_owned(), hub_revision: 7, connected: true, ..pb::NodePosition::default() }
    }

    fn report(nodes: Vec<pb::NodePosition>) -> pb::Realisation {
        let hub = Some(pb::Position { epoch: 1, revision: 7 });
        pb::Realisation { hub, nodes, ..pb::Realisation::default() }
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a parameter is optional")]
    fn policy(name: &str) -> Option<(ManifestKind, &str)> {
        Some((ManifestKind::Policy, name))
    }

    fn of(reported: &pb::Realisation) -> Report<'_> {
        let hub = Position { epoch: 1, revision: 7 };
        Report { reported, hub, age: Duration::from_secs(60), silent: false, lease: Duration::from_secs(90) }
    }

    fn pod(number: u8, finding: fn(IpAddr) -> Finding) -> pb::UnenforcedPod {
        let id = EndpointId { namespace: "x".into(), name: format!("p{number}").into() };
        let finding = finding([10, 1, 0, number].into());
        pb::UnenforcedPod { pod: Some(wire::pod(&id)), finding: Some(wire::finding(&finding)) }
    }

    fn error(subject: Subject) -> pb::ObjectError {
        let reason = Some(wire::reason(&Reason::PolicyUnreadable("no".to_owned())));
        pb::ObjectError { subject: Some(wire::subject(&subject)), at: None, reason }
    }

    fn of_policy(name: &str) -> pb::ObjectError {
        error(Subject::FederatedPolicy(name.to_owned()))
    }

    /// As people read it.
    fn words(reasons: &Reasons) -> String {
        let word = |it: &NodeReason| format!("node {}: {}", it.node, Words(&it.reason));
        format!("{} +{}", reasons.first.iter().map(word).collect::<Vec<_>>().join("; "), reasons.more)
    }

    fn state(status: &ObjectStatus) -> String {
        match &status.state {
            ObjectState::Enforced => "enforced".to_owned(),
            ObjectState::Lagging(reasons) => format!("lagging: {}", words(reasons)),
            ObjectState::Refused(reasons) => format!("refused: {}", words(reasons)),
        }
    }

    #[test]
    fn groups_pods_by_finding() {
        let mut first = node("a");
        first.unenforced = (0..150).map(|it| pod(it, Finding::Silent)).collect();
        first.unenforced.push(pod(200, Finding::HostNetwork));
        first.unenforced_total = 160;
        let reported = report(vec![first, node("b")]);
        let problems: Vec<Problem> = of(&reported).problems().collect();
        let shape: Vec<(&str, u32, usize)> =
            problems.iter().map(|it| (it.reason.code(), it.count, it.items.len())).collect();
        assert_eq!(shape, [("NotProven", 150, 150), ("HostNetwork", 1, 1), ("PodsNotNamed", 9, 0)]);
        let first = Object::Endpoint(EndpointId { namespace: "x".into(), name: "p0".into() });
        assert_eq!((problems[0].node.as_str(), &problems[0].items[0]), ("a", &Subject::Object(first)));
        let states: Vec<NodeState> = of(&reported).nodes().map(|it| it.state).collect();
        assert_eq!(states, [NodeState::Lagging, NodeState::Enforcing]);
        let silent = Report { silent: true, ..of(&reported) };
        assert!(silent.nodes().all(|it| it.state == NodeState::Unknown));
    }

    #[test]
    fn a_node_that_lags_is_named_with_why() {
        let check = |change: &dyn Fn(&mut pb::NodePosition), expected: Option<&str>| {
            let mut changed = node("a");
            change(&mut changed);
            let reported = pb::Realisation { local_revision: 4, ..report(vec![changed]) };
            let reasons: Vec<String> = of(&reported).problems().map(|it| Words(&it.reason).to_string()).collect();
            assert_eq!(reasons.iter().map(String::as_str).collect::<Vec<_>>(), Vec::from_iter(expected));
        };
        check(&|it| it.local_revision = 4, None);
        check(&|_| {}, Some("at local revision 0, newest is 4"));
        check(&|it| it.hub_revision = 5, Some("at hub revision 5, newest is 7"));
        let never = Lag { agent: Agent::NeverConnected, behind: None, failure: None };
        check(&|it| (it.connected, it.age_ms) = (false, u64::MAX), Some(&Words(&never).to_string()));
        let gone = "its agent is not connected, last seen 3 m ago, at hub revision 5, newest is 7";
        check(&|it| (it.connected, it.age_ms, it.hub_revision) = (false, 120_000, 5), Some(gone));
        let failed =
            "the newest rule set is not in force (at hub revision 5, newest is 7): the enforcer thread has ended";
        let failure = wire::failure(&Failure::EnforcerEnded);
        check(&|it| (it.hub_revision, it.failure) = (5, Some(failure.clone())), Some(failed));
        // A failure that this version does not know is one.
        let unknown = "the newest rule set is not in force: unknown reason: the sender is a newer version";
        check(&|it| (it.local_revision, it.failure) = (4, Some(Default::default())), Some(unknown));
    }

    #[test]
    fn an_object_is_as_far_as_its_last_node() {
        let check = |nodes: Vec<pb::NodePosition>, expected: &str, enforcing: u32| {
            let reported = report(nodes);
            let status = of(&reported).object(policy("p"), 7);
            assert_eq!((state(&status).as_str(), status.nodes_enforcing), (expected, enforcing));
        };
        let behind = |name: &str| pb::NodePosition { hub_revision: 5, ..node(name) };
        check(vec![node("a"), node("b")], "enforced", 2);
        check(vec![node("a"), behind("b")], "lagging: node b: at hub revision 5, newest is 7 +0", 1);
        let many = ["b", "c", "d", "e", "f"].map(behind).to_vec();
        let status = of(&report(many)).object(policy("p"), 7);
        assert!(state(&status).ends_with(" +2"), "{status:?}");
        let refused = pb::NodePosition { errors: vec![of_policy("p")], ..node("b") };
        check(vec![behind("a"), refused.clone()], "refused: node b: no +0", 0);
        let other = of(&report(vec![refused])).object(policy("q"), 7);
        assert_eq!(other.state, ObjectState::Enforced);
        let any = pb::NodePosition { errors: vec![error(Subject::Everything)], ..node("b") };
        check(vec![any], "lagging: node b: no +0", 0);
        // Nothing counts as enforced of which this version does not know what is wrong, and with what.
        let unknown = pb::NodePosition { errors: vec![pb::ObjectError::default()], ..node("b") };
        check(vec![unknown], "lagging: node b: unknown reason: the sender is a newer version +0", 0);
        let mut reported = report(vec![node("a")]);
        reported.policies = vec![pb::PolicyState { policy: "p".to_owned(), ..Default::default() }];
        assert!(state(&of(&reported).object(policy("p"), 7)).starts_with("lagging: node : unknown reason"));
        // A staged policy and an enforced one may have the same name.
        let unreadable = |staged| pb::PolicyState {
            policy: "p".to_owned(),
            state: Some(pb::policy_state::State::Refused("new".to_owned())),
            staged,
        };
        let staged = Some((ManifestKind::StagedPolicy, "p"));
        let with_error = pb::NodePosition { errors: vec![of_policy("p")], ..node("a") };
        let reported = pb::Realisation { policies: vec![unreadable(true)], ..report(vec![node("a")]) };
        assert_eq!(state(&of(&reported).object(policy("p"), 7)), "enforced");
        assert!(state(&of(&reported).object(staged, 7)).starts_with("refused"));
        let reported = pb::Realisation { policies: vec![unreadable(false)], ..report(vec![with_error]) };
        assert!(state(&of(&reported).object(policy("p"), 7)).starts_with("refused"));
        assert_eq!(state(&of(&reported).object(staged, 7)), "enforced");
        // An agent that is not connected counts for a lease of 90 s; the report is 60 s old.
        let gone = |age_ms| pb::NodePosition { connected: false, age_ms, ..node("b") };
        check(vec![node("a"), gone(29_000)], "enforced", 2);
        let lag = "lagging: node b: its agent is not connected, last seen 1 m ago +0";
        check(vec![node("a"), gone(30_000)], lag, 1);
        let never = Lag { agent: Agent::NeverConnected, behind: None, failure: None };
        check(vec![node("a"), gone(u64::MAX)], &format!("lagging: node b: {} +0", Words(&never)), 1);
        // Of another store's numbering.
        let restored = Position { epoch: 2, revision: 7 };
        let status = Report { hub: restored, ..of(&report(vec![node("a")])) }.object(None, 7);
        assert!(matches!(status.state, ObjectState::Lagging(_)), "{status:?}");
    }

    /// Revisions of different epochs are not compared, and one that the hub has not reached is not enforced.
    #[test]
    fn a_node_of_another_epoch_or_ahead_of_the_hub_does_not_count() {
        let at = |epoch, hub_revision| pb::NodePosition { hub_epoch: epoch, hub_revision, ..node("a") };
        for (node_at, lag) in [
            (at(None, 7), None),
            (at(Some(1), 7), None),
            (at(Some(0), 7), Some("at revision 7 of the hub before it was restored")),
            (at(Some(0), 0), Some("has received nothing from the hub yet")),
            (at(Some(9), 7), Some("at revision 7 of the hub before it was restored")),
            (at(Some(9), 288), Some("at revision 288 of the hub before it was restored")),
            (at(Some(1), 288), Some("at revision 288 of the hub, which is at 7")),
            (at(None, u64::MAX), Some("at revision 18446744073709551615 of the hub, which is at 7")),
        ] {
            let reported = report(vec![node_at, node("b")]);
            let problems: Vec<Problem> = of(&reported).problems().collect();
            let named = problems.iter().map(|it| (it.node.clone(), Words(&it.reason).to_string())).collect::<Vec<_>>();
            assert_eq!(named, lag.map(|lag| ("a".to_owned(), lag.to_owned())).into_iter().collect::<Vec<_>>());
            let status = of(&reported).object(policy("p"), 7);
            let expected = lag.map_or("enforced".to_owned(), |lag| format!("lagging: node a: {lag} +0"));
            assert_eq!((state(&status), status.nodes_enforcing), (expected, if lag.is_none() { 2 } else { 1 }));
            assert_eq!(of(&reported).enforced_revision(), if lag.is_none() { 7 } else { 0 });
        }
    }
}
