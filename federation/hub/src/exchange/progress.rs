//! How far clusters enforce what they were sent: what they reported, compared with what they should be at.

use std::collections::HashMap;
use std::time::Duration;

use hanse_proto::federation::v1 as pb;
use hanse_store::Revision;

use crate::status::{NodeProgress, NodeState, ObjectState, ObjectStatus, Problem};
use hanse_exchange::model::Position;

/// What [`pb::ObjectError::object`] says before a federated policy's name, in reports of earlier members.
const POLICY_OBJECT: &str = "policy FederatedNetworkPolicy ";
/// Errors of this stand for any object.
const EVERY_OBJECT: &str = "*";
/// Errors of this are of the newest rule set, which is not in force.
const NEWEST: &str = "";
/// Of a node whose agent was not heard by this process of its member.
const NEVER_CONNECTED: &str = "no agent has connected since the member started: start it, and where it never enrolled give it a token of \
                               `hanse-member node-token create` (`hanse-member node list` shows which have enrolled)";
/// Nodes that words name; the rest is counted.
const NAMED_NODES: usize = 3;

/// A cluster's last report of enforcement.
#[derive(Debug, Clone, Copy)]
pub struct Report<'a> {
    pub told: &'a pb::Realisation,
    /// Where this hub is.
    pub hub: Position,
    /// Since it came.
    pub age: Duration,
    /// What it says may no longer be true.
    pub silent: bool,
}

impl Report<'_> {
    /// What is wrong with the cluster as a whole, and with each node.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        let of_source = self.told.problems.iter().map(|reason| Problem::new("", reason.clone()));
        of_source.chain(self.told.nodes.iter().flat_map(|node| self.node_problems(node)))
    }

    pub fn nodes(&self) -> impl Iterator<Item = NodeProgress> {
        self.told.nodes.iter().map(|node| {
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

    /// Since the agent last acknowledged something.
    fn age_of(&self, node: &pb::NodePosition) -> Option<Duration> {
        (node.age_ms != u64::MAX).then(|| self.age.saturating_add(Duration::from_millis(node.age_ms)))
    }

    fn node_problems(&self, node: &pb::NodePosition) -> impl Iterator<Item = Problem> {
        let problem = |reason: String| Problem::new(&node.node, reason);
        let lag = self.lag(node).map(problem);
        let probe = (!node.probe.is_empty()).then(|| problem(node.probe.clone()));
        // That the newest is not in force is said with the lag.
        let errors = node.errors.iter().filter(|it| it.object != NEWEST).map(|it| {
            let item = (it.object != EVERY_OBJECT).then(|| it.object.clone());
            (it.error.clone(), item)
        });
        let pods = node
            .unenforced
            .iter()
            .map(|it| (format!("not enforced: {}", it.reason), Some(format!("pod {}/{}", it.namespace, it.name))));
        let unnamed = node.unenforced_total.saturating_sub(u32::try_from(node.unenforced.len()).unwrap_or(u32::MAX));
        let unnamed = (unnamed > 0).then(|| Problem {
            count: unnamed,
            ..problem("pods are not enforced that the report does not name".to_owned())
        });
        let grouped = grouped(&node.node, errors.chain(pods));
        let others: Vec<Problem> = node.problems.iter().cloned().map(problem).collect();
        lag.into_iter().chain(probe).chain(grouped).chain(unnamed).chain(others)
    }

    /// The hub's position that a node enforces.
    fn position_of(&self, node: &pb::NodePosition) -> Position {
        let of_report = self.told.hub.as_ref().map_or(0, |at| at.epoch);
        Position { epoch: node.hub_epoch.unwrap_or(of_report), revision: node.hub_revision }
    }

    /// The revision of the hub that a node enforces; none where it is of another epoch, or this hub has not reached it:
    /// nothing is known of what it enforces then.
    fn revision_of(&self, node: &pb::NodePosition) -> Option<u64> {
        let at = self.position_of(node);
        (at.epoch == self.hub.epoch && at.revision <= self.hub.revision).then_some(at.revision)
    }

    /// The revision of the hub that all of the cluster enforces, by what its member and its nodes say.
    pub fn enforced_revision(&self) -> u64 {
        let of_member = self.told.hub.as_ref().filter(|at| at.epoch == self.hub.epoch).map_or(0, |at| at.revision);
        let of_nodes = self.told.nodes.iter().map(|node| self.revision_of(node).unwrap_or_default());
        of_nodes.chain([of_member]).min().unwrap_or_default()
    }

    /// Why a node does not enforce the newest that its member has.
    fn lag(&self, node: &pb::NodePosition) -> Option<String> {
        let of_member = self.told.hub.unwrap_or_default();
        let (hub, local) = (self.position_of(node), node.local_revision);
        let behind = if hub.epoch == self.hub.epoch && hub.revision > self.hub.revision {
            Some(format!("at revision {} of the hub, which is at {}", hub.revision, self.hub.revision))
        } else if hub.epoch != of_member.epoch {
            // Revisions of different epochs have nothing to do with each other.
            Some(format!("at revision {} of the hub before it was restored", hub.revision))
        } else if hub.revision < of_member.revision {
            Some(format!("at revision {} of the hub's {}", hub.revision, of_member.revision))
        } else if local < self.told.local_revision {
            Some(format!("at revision {local} of the cluster's own {}", self.told.local_revision))
        } else {
            None
        };
        let failed = node.errors.iter().find(|it| it.object == NEWEST);
        let behind = match (behind, failed) {
            (behind, Some(failed)) => {
                let at = behind.map(|at| format!(" ({at})")).unwrap_or_default();
                Some(format!("the newest rule set is not in force{at}: {}", failed.error))
            }
            (behind, None) => behind,
        };
        match (node.connected, self.age_of(node)) {
            (true, _) => behind,
            (false, None) => Some(NEVER_CONNECTED.to_owned()),
            (false, Some(age)) => {
                let at = behind.map(|at| format!(", {at}")).unwrap_or_default();
                Some(format!("its agent is not connected, last heard {} ago{at}", words(age)))
            }
        }
    }

    /// How far an object of this name and revision is. A policy's errors are by its name.
    pub fn object(&self, policy: Option<&str>, needed: Revision) -> ObjectStatus {
        let (mut enforcing, mut refused, mut lagging) = (0_u32, Vec::new(), Vec::new());
        for node in &self.told.nodes {
            let of = |object: &str| node.errors.iter().find(|error| error.object == object);
            let of_policy = policy.and_then(|name| of(name).or_else(|| of(&format!("{POLICY_OBJECT}{name}"))));
            if let Some(error) = of_policy {
                refused.push(format!("node {}: {}", node.node, error.error));
            } else if let Some(error) = of(EVERY_OBJECT) {
                lagging.push(format!("node {}: {}", node.node, error.error));
            } else if self.revision_of(node).is_none_or(|at| at < needed) {
                let at = format!("at revision {} of {needed}", node.hub_revision);
                lagging.push(format!("node {}: {}", node.node, self.lag(node).unwrap_or(at)));
            } else {
                enforcing = enforcing.saturating_add(1);
            }
        }
        // Revisions of a store before this one say nothing.
        let at = self.told.hub.as_ref().filter(|at| at.epoch == self.hub.epoch).map_or(0, |at| at.revision);
        let of_policies = policy.and_then(|name| self.told.policies.iter().find(|it| it.policy == name));
        let state = match of_policies.and_then(|it| it.state.as_ref()) {
            Some(pb::policy_state::State::Refused(why)) => ObjectState::Refused(why.clone()),
            Some(pb::policy_state::State::Waiting(waiting)) => {
                ObjectState::Lagging(format!("waits for {}", waiting.clusters.join(", ")))
            }
            None if !refused.is_empty() => ObjectState::Refused(first_of(refused)),
            None if !lagging.is_empty() => ObjectState::Lagging(first_of(lagging)),
            None if at < needed => ObjectState::Lagging(format!("the member is at revision {at} of {needed}")),
            None => ObjectState::Enforced,
        };
        let nodes = u32::try_from(self.told.nodes.len()).unwrap_or(u32::MAX);
        ObjectStatus { state, nodes_enforcing: enforcing, nodes }
    }
}

/// One problem for each reason, in the order in which reasons appear.
fn grouped(node: &str, all: impl Iterator<Item = (String, Option<String>)>) -> Vec<Problem> {
    let (mut problems, mut places): (Vec<Problem>, HashMap<String, usize>) = Default::default();
    for (reason, item) in all {
        let at = *places.entry(reason).or_insert_with_key(|reason| {
            problems.push(Problem { count: 0, ..Problem::new(node, reason.clone()) });
            problems.len() - 1
        });
        problems[at].count = problems[at].count.saturating_add(1);
        problems[at].items.extend(item);
    }
    problems
}

fn first_of(mut all: Vec<String>) -> String {
    let more = all.len().saturating_sub(NAMED_NODES);
    all.truncate(NAMED_NODES);
    let more = if more > 0 { format!("; and {more} more nodes") } else { String::new() };
    all.join("; ") + &more
}

/// A length of time, to the second or coarser.
pub fn words(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3_600 => format!("{} m", seconds / 60),
        seconds @ 3_600..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> pb::NodePosition {
        pb::NodePosition { node: name.to_owned(), hub_revision: 7, connected: true, ..pb::NodePosition::default() }
    }

    fn report(nodes: Vec<pb::NodePosition>) -> pb::Realisation {
        let hub = Some(pb::Position { epoch: 1, revision: 7 });
        pb::Realisation { hub, nodes, ..pb::Realisation::default() }
    }

    fn of(told: &pb::Realisation) -> Report<'_> {
        let hub = Position { epoch: 1, revision: 7 };
        Report { told, hub, age: Duration::from_secs(60), silent: false }
    }

    fn pod(name: &str, reason: &str) -> pb::UnenforcedPod {
        pb::UnenforcedPod { namespace: "x".to_owned(), name: name.to_owned(), reason: reason.to_owned() }
    }

    #[test]
    fn pods_of_one_reason_are_one_problem() {
        let mut first = node("a");
        first.unenforced = (0..150).map(|it| pod(&format!("p{it}"), "not proven")).collect();
        first.unenforced.push(pod("q", "host network"));
        first.unenforced_total = 160;
        let told = report(vec![first, node("b")]);
        let problems: Vec<Problem> = of(&told).problems().collect();
        let shape: Vec<(&str, u32, usize)> =
            problems.iter().map(|it| (it.reason.as_str(), it.count, it.items.len())).collect();
        assert_eq!(
            shape,
            [
                ("not enforced: not proven", 150, 150),
                ("not enforced: host network", 1, 1),
                ("pods are not enforced that the report does not name", 9, 0)
            ]
        );
        assert_eq!((problems[0].node.as_str(), problems[0].items[0].as_str()), ("a", "pod x/p0"));
        let states: Vec<NodeState> = of(&told).nodes().map(|it| it.state).collect();
        assert_eq!(states, [NodeState::Lagging, NodeState::Enforcing]);
        let silent = Report { silent: true, ..of(&told) };
        assert!(silent.nodes().all(|it| it.state == NodeState::Unknown));
    }

    #[test]
    fn a_node_that_lags_is_named_with_why() {
        let check = |change: &dyn Fn(&mut pb::NodePosition), expected: Option<&str>| {
            let mut changed = node("a");
            change(&mut changed);
            let told = pb::Realisation { local_revision: 4, ..report(vec![changed]) };
            let reasons: Vec<String> = of(&told).problems().map(|it| it.reason).collect();
            assert_eq!(reasons.iter().map(String::as_str).collect::<Vec<_>>(), Vec::from_iter(expected));
        };
        let error = |object: &str| pb::ObjectError { object: object.to_owned(), error: "no".to_owned() };
        check(&|it| it.local_revision = 4, None);
        check(&|_| {}, Some("at revision 0 of the cluster's own 4"));
        check(&|it| it.hub_revision = 5, Some("at revision 5 of the hub's 7"));
        check(&|it| (it.connected, it.age_ms) = (false, u64::MAX), Some(NEVER_CONNECTED));
        let gone = "its agent is not connected, last heard 3 m ago, at revision 5 of the hub's 7";
        check(&|it| (it.connected, it.age_ms, it.hub_revision) = (false, 120_000, 5), Some(gone));
        let failed = "the newest rule set is not in force (at revision 5 of the hub's 7): no";
        check(&|it| (it.hub_revision, it.errors) = (5, vec![error("")]), Some(failed));
    }

    #[test]
    fn an_object_is_as_far_as_its_last_node() {
        let check = |nodes: Vec<pb::NodePosition>, expected: ObjectState, enforcing: u32| {
            let told = report(nodes);
            let status = of(&told).object(Some("p"), 7);
            assert_eq!((status.state, status.nodes_enforcing), (expected, enforcing));
        };
        let error = |object: &str| pb::ObjectError { object: object.to_owned(), error: "no".to_owned() };
        let behind = |name: &str| pb::NodePosition { hub_revision: 5, ..node(name) };
        check(vec![node("a"), node("b")], ObjectState::Enforced, 2);
        let names = "node b: at revision 5 of the hub's 7";
        check(vec![node("a"), behind("b")], ObjectState::Lagging(names.to_owned()), 1);
        let many = ["b", "c", "d", "e", "f"].map(behind).to_vec();
        let status = of(&report(many)).object(Some("p"), 7);
        assert!(
            matches!(&status.state, ObjectState::Lagging(why) if why.ends_with("; and 2 more nodes")),
            "{status:?}"
        );
        let refused = pb::NodePosition { errors: vec![error("p")], ..node("b") };
        check(vec![behind("a"), refused.clone()], ObjectState::Refused("node b: no".to_owned()), 0);
        let other = of(&report(vec![refused])).object(Some("q"), 7);
        assert_eq!(other.state, ObjectState::Enforced);
        let any = pb::NodePosition { errors: vec![error("*")], ..node("b") };
        check(vec![any], ObjectState::Lagging("node b: no".to_owned()), 0);
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
            (at(Some(9), 7), Some("at revision 7 of the hub before it was restored")),
            (at(Some(9), 288), Some("at revision 288 of the hub before it was restored")),
            (at(Some(1), 288), Some("at revision 288 of the hub, which is at 7")),
            (at(None, u64::MAX), Some("at revision 18446744073709551615 of the hub, which is at 7")),
        ] {
            let told = report(vec![node_at, node("b")]);
            let problems: Vec<Problem> = of(&told).problems().collect();
            let named = problems.iter().map(|it| (it.node.as_str(), it.reason.as_str())).collect::<Vec<_>>();
            assert_eq!(named, lag.map(|lag| ("a", lag)).into_iter().collect::<Vec<_>>());
            let status = of(&told).object(Some("p"), 7);
            let expected = lag.map_or(ObjectState::Enforced, |lag| ObjectState::Lagging(format!("node a: {lag}")));
            assert_eq!((status.state, status.nodes_enforcing), (expected, if lag.is_none() { 2 } else { 1 }));
            assert_eq!(of(&told).enforced_revision(), if lag.is_none() { 7 } else { 0 });
        }
    }
}
