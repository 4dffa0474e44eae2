//! The status of custom resources: computed from the hub's state, and compared with what was written last.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_protocol::reason::words::Words;
use hanse_store::Revision;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use crate::custom_resources::{
    ClusterEnforcement, Condition, MAX_CLUSTERS, MAX_MESSAGE, NetworkSetStatus, PolicyStatus, StagedPolicyStatus,
    TierStatus,
};
use crate::manifest::{Kind, ObjectId};
use crate::registry::{Acceptance, Snapshot};
use crate::status::{ObjectState, ObjectStatus, Realisations, Reasons};

/// Why the hub does not accept an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: &'static str,
    pub message: String,
}

/// What is known of one custom resource.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    pub generation: i64,
    /// The hub has stored this version, and not only an earlier one.
    pub is_stored: bool,
    pub refusal: Option<&'a Refusal>,
    /// Why it is not deleted yet.
    pub blocked: Option<&'a str>,
    /// The number of nets of a set.
    pub nets: usize,
}

/// The hub's state, for all objects of one pass.
pub struct State<'a> {
    snapshot: &'a Snapshot,
    realisations: &'a dyn Realisations,
    /// The revision that each cluster has received.
    received: BTreeMap<Arc<str>, Revision>,
    /// The number of policies of each tier.
    policies: BTreeMap<Arc<str>, i64>,
}

/// How a status differs from the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    None,
    /// Counts, or reasons of clusters.
    Counts,
    /// The state or the reason of a condition, or the answer of the hub to this version.
    Conditions,
}

struct Answer {
    kind: &'static str,
    status: &'static str,
    reason: String,
    message: String,
}

impl Answer {
    fn new(kind: &'static str, is: bool, reason: &str, message: impl Into<String>) -> Self {
        let status = if is { "True" } else { "False" };
        Self { kind, status, reason: reason.to_owned(), message: clipped(&message.into()) }
    }
}

fn clipped(text: &str) -> String {
    match text.char_indices().nth(MAX_MESSAGE - 1) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl<'a> State<'a> {
    pub fn new(snapshot: &'a Snapshot, realisations: &'a dyn Realisations) -> Self {
        let received = realisations.clusters().into_iter().map(|(name, it)| (name, it.received_revision)).collect();
        let mut policies = BTreeMap::new();
        for tier in snapshot.objects.values().filter_map(|object| object.tier()) {
            *policies.entry(tier).or_default() += 1;
        }
        Self { snapshot, realisations, received, policies }
    }

    /// The status of an object. Of conditions that `old` has in the same state, the time is kept.
    pub fn status(&self, id: &ObjectId, facts: Facts<'_>, old: Option<&Value>) -> Value {
        let observed_generation = facts.generation;
        let acceptance = self.snapshot.acceptance(id);
        let accepted = match (facts.refusal, &acceptance) {
            (Some(Refusal { reason, message }), _) => Answer::new("Accepted", false, reason, message),
            (None, _) if !facts.is_stored => {
                Answer::new("Accepted", false, "Pending", "the hub has not stored this version yet")
            }
            (None, Some(Acceptance::Accepted)) => {
                Answer::new("Accepted", true, "Accepted", "the hub uses this version")
            }
            (None, Some(other)) => {
                Answer::new("Accepted", false, other.reason().unwrap_or("NotAccepted"), other.to_string())
            }
            (None, None) => Answer::new("Accepted", false, "Pending", "the hub has not stored this version yet"),
        };
        let is_accepted = accepted.status == "True";
        let mut answers = vec![accepted];
        if let Some(why) = facts.blocked {
            answers.push(Answer::new("Terminating", true, "InUse", why));
        }
        let clusters = if id.kind != Kind::Tier && is_accepted { self.realisations.object(id, 0) } else { None };
        if id.kind != Kind::Tier {
            answers.push(self.distributed(id, is_accepted, clusters.as_ref()));
        }
        if id.kind == Kind::FederatedNetworkPolicy {
            answers.push(enforced(is_accepted, clusters.as_ref()));
        }
        let conditions = conditions(answers, observed_generation, old);
        match id.kind {
            Kind::FederatedNetworkPolicy => {
                let clusters = clusters.unwrap_or_default();
                let enforcing = clusters.values().filter(|it| it.state == ObjectState::Enforced).count();
                let sum = |of: fn(&ObjectStatus) -> u32| clusters.values().map(|it| u64::from(of(it))).sum::<u64>();
                let (nodes_enforcing, nodes) = (sum(|it| it.nodes_enforcing), sum(|it| it.nodes));
                json(&PolicyStatus {
                    observed_generation,
                    conditions,
                    clusters_enforced: format!("{enforcing}/{}", clusters.len()),
                    nodes_enforced: format!("{nodes_enforcing}/{nodes}"),
                    clusters: of_clusters(&clusters),
                })
            }
            Kind::StagedFederatedNetworkPolicy => json(&StagedPolicyStatus { observed_generation, conditions }),
            Kind::FederatedNetworkSet => {
                let nets = i64::try_from(facts.nets).unwrap_or(i64::MAX);
                json(&NetworkSetStatus { observed_generation, conditions, nets })
            }
            Kind::Tier | Kind::MemberCluster => {
                let policies = self.policies.get(&id.name).copied().unwrap_or_default();
                json(&TierStatus { observed_generation, conditions, policies })
            }
        }
    }

    fn distributed(
        &self,
        id: &ObjectId,
        is_accepted: bool,
        clusters: Option<&BTreeMap<Arc<str>, ObjectStatus>>,
    ) -> Answer {
        let answer = |is, reason, message: String| Answer::new("Distributed", is, reason, message);
        if !is_accepted {
            return answer(false, "NotAccepted", "the hub does not use this version".to_owned());
        }
        let Some(clusters) = clusters else {
            return answer(false, "Pending", "the hub has not distributed this version yet".to_owned());
        };
        let needed = self.snapshot.objects.get(id).map_or(0, |object| object.revision);
        let has = |cluster: &Arc<str>, status: &ObjectStatus| match id.kind {
            // Evaluated, not only received.
            Kind::StagedFederatedNetworkPolicy => status.state == ObjectState::Enforced,
            _ => self.received.get(cluster).is_some_and(|at| *at >= needed),
        };
        let mut missing = clusters.iter().filter(|(cluster, status)| !has(cluster, status)).map(|(cluster, _)| cluster);
        match (missing.next(), clusters.len()) {
            (_, 0) => answer(false, "NoClusters", "no cluster of the ClusterSet is concerned".to_owned()),
            (None, count) => answer(true, "Distributed", format!("clusters with this version: {count}")),
            (Some(first), count) => {
                let lacking = 1 + missing.count();
                let message =
                    format!("clusters without this version: {lacking} of {count}, the first of which is {first}");
                answer(false, "ClustersLag", message)
            }
        }
    }
}

fn enforced(is_accepted: bool, clusters: Option<&BTreeMap<Arc<str>, ObjectStatus>>) -> Answer {
    let answer = |is, reason, message: String| Answer::new("Enforced", is, reason, message);
    if !is_accepted {
        let message = "the hub does not use this version: the last accepted one stays in force";
        return answer(false, "NotAccepted", message.to_owned());
    }
    let Some(clusters) = clusters else {
        return answer(false, "Pending", "the hub has not distributed this version yet".to_owned());
    };
    let worst =
        clusters.iter().filter_map(|(cluster, status)| Some((cluster, lacking(status)?))).max_by_key(|(_, it)| it.0);
    match worst {
        _ if clusters.is_empty() => answer(false, "NoClusters", "no cluster has to enforce the policy".to_owned()),
        None => answer(true, "Enforced", format!("clusters that enforce the policy: {}", clusters.len())),
        Some((cluster, (is_refused, _, message))) => {
            let reason = if is_refused { "ClustersRefuse" } else { "ClustersLag" };
            answer(false, reason, format!("cluster {cluster}: {message}"))
        }
    }
}

/// Why a cluster does not enforce an object: whether it cannot, the reason for programs, and for people.
fn lacking(status: &ObjectStatus) -> Option<(bool, String, String)> {
    let (is_refused, Reasons { first, more }) = match &status.state {
        ObjectState::Enforced => return None,
        ObjectState::Lagging(reasons) => (false, reasons),
        ObjectState::Refused(reasons) => (true, reasons),
    };
    let Some(why) = first.first() else { return Some((is_refused, "Unknown".to_owned(), "unknown".to_owned())) };
    let node = if why.node.is_empty() { String::new() } else { format!("node {}: ", why.node) };
    let others = first.len() - 1 + usize::try_from(*more).unwrap_or(usize::MAX - first.len());
    let others = if others > 0 { format!(" (and {others} more nodes)") } else { String::new() };
    Some((is_refused, why.reason.code().to_owned(), clipped(&format!("{node}{}{others}", Words(&why.reason)))))
}

/// Those that do not enforce it first.
fn of_clusters(clusters: &BTreeMap<Arc<str>, ObjectStatus>) -> Vec<ClusterEnforcement> {
    let mut all: Vec<ClusterEnforcement> = clusters
        .iter()
        .map(|(name, status)| {
            let why = lacking(status);
            let state = match &why {
                None => "Enforced",
                Some((false, ..)) => "Lagging",
                Some((true, ..)) => "Refused",
            };
            let (reason, message) = why.map(|(_, reason, message)| (reason, message)).unzip();
            ClusterEnforcement {
                name: name.to_string(),
                state: state.to_owned(),
                nodes_enforced: status.nodes_enforcing.into(),
                nodes_total: status.nodes.into(),
                reason,
                message,
            }
        })
        .collect();
    all.sort_by_key(|it| it.state == "Enforced");
    all.truncate(MAX_CLUSTERS);
    all
}

fn conditions(answers: Vec<Answer>, generation: i64, old: Option<&Value>) -> Vec<Condition> {
    let now = Timestamp::now();
    let condition = |Answer { kind, status, reason, message }: Answer| {
        let before = of_kind(old, kind).filter(|it| it["status"] == status);
        let since = before.and_then(|it| serde_json::from_value(it["lastTransitionTime"].clone()).ok());
        Condition {
            kind: kind.to_owned(),
            status: status.to_owned(),
            observed_generation: Some(generation),
            last_transition_time: since.unwrap_or(Time(now)),
            reason,
            message,
        }
    };
    answers.into_iter().map(condition).collect()
}

fn of_kind<'a>(status: Option<&'a Value>, kind: &str) -> Option<&'a Value> {
    status?.get("conditions")?.as_array()?.iter().find(|it| it["type"] == kind)
}

fn json<T: Serialize>(status: &T) -> Value {
    serde_json::to_value(status).expect("a status is JSON")
}

/// Why the hub does not accept an object, as its status says.
pub fn refusal(status: &Value) -> Option<(&str, &str)> {
    let condition =
        of_kind(Some(status), "Accepted").filter(|it| it["status"] == "False" && it["reason"] != "Pending")?;
    Some((condition["reason"].as_str()?, condition["message"].as_str()?))
}

/// Compares two statuses. Messages about clusters contain ages, which are not a difference.
pub fn compare(old: Option<&Value>, new: &Value) -> Difference {
    let Some(old) = old.filter(|old| old.is_object()) else { return Difference::Conditions };
    let states = |status: &Value| -> BTreeMap<String, [Value; 4]> {
        let of = |it: &Value| {
            // The hub's answer to this version; other messages are about clusters.
            let is_answer = it["type"] == "Accepted" || it["type"] == "Terminating";
            let message = if is_answer { it["message"].clone() } else { Value::Null };
            let fields = [it["status"].clone(), it["reason"].clone(), it["observedGeneration"].clone(), message];
            (it["type"].to_string(), fields)
        };
        status["conditions"].as_array().into_iter().flatten().map(of).collect()
    };
    if old["observedGeneration"] != new["observedGeneration"] || states(old) != states(new) {
        return Difference::Conditions;
    }
    let without_words = |status: &Value| {
        let mut status = status.clone();
        for list in ["conditions", "clusters"] {
            for item in status.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                let fields = item.as_object_mut().into_iter();
                fields.for_each(|it| it.retain(|name, _| name != "message" && name != "lastTransitionTime"));
            }
        }
        status.sort_all_objects();
        status
    };
    if without_words(old) == without_words(new) { Difference::None } else { Difference::Counts }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hanse_protocol::reason::Reason;

    use super::*;

    fn status(clusters: &[(&str, ObjectState, u32)]) -> Value {
        let of = |(name, state, nodes): &(&str, ObjectState, u32)| {
            let status = ObjectStatus { state: state.clone(), nodes_enforcing: *nodes, nodes: 3 };
            (Arc::from(*name), status)
        };
        let clusters: BTreeMap<Arc<str>, ObjectStatus> = clusters.iter().map(of).collect();
        let conditions = conditions(vec![enforced(true, Some(&clusters))], 1, None);
        json(&PolicyStatus {
            observed_generation: 1,
            conditions,
            clusters: of_clusters(&clusters),
            ..Default::default()
        })
    }

    fn silent(seconds: u64) -> ObjectState {
        ObjectState::Lagging(Reasons::of_cluster(Reason::ClusterSilent(Duration::from_secs(seconds))))
    }

    #[test]
    fn enforced_only_where_every_cluster_enforces() {
        let check = |clusters: &[(&str, ObjectState, u32)], expected: (&str, &str)| {
            let status = status(clusters);
            let condition = of_kind(Some(&status), "Enforced").expect("a condition");
            assert_eq!(
                (condition["status"].as_str(), condition["reason"].as_str()),
                (Some(expected.0), Some(expected.1))
            );
        };
        check(&[], ("False", "NoClusters"));
        check(&[("a", ObjectState::Enforced, 3)], ("True", "Enforced"));
        check(&[("a", ObjectState::Enforced, 3), ("b", silent(40), 0)], ("False", "ClustersLag"));
        let refused = ObjectState::Refused(Reasons::of_cluster(Reason::PolicyUnreadable("x".to_owned())));
        check(&[("a", silent(40), 0), ("b", refused, 0)], ("False", "ClustersRefuse"));
    }

    #[test]
    fn ages_are_not_a_difference() {
        let lagging = |seconds, nodes| status(&[("a", silent(seconds), nodes)]);
        let before = lagging(40, 0);
        assert_eq!(compare(None, &before), Difference::Conditions);
        assert_eq!(compare(Some(&before), &before), Difference::None);
        assert_ne!(lagging(40, 0)["clusters"], lagging(99, 0)["clusters"], "the message has the age");
        assert_eq!(compare(Some(&before), &lagging(99, 0)), Difference::None);
        assert_eq!(compare(Some(&before), &lagging(40, 1)), Difference::Counts);
        assert_eq!(compare(Some(&before), &status(&[("a", ObjectState::Enforced, 3)])), Difference::Conditions);
    }
}
