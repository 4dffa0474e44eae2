//! The status of custom resources: computed from the hub's state, and compared with what was written last.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_protocol::reason::words::Words;
use serde_json::Value;

use super::condition::{Answer, PENDING, Refusal, Written, clipped, conditions, json};
use crate::admission::{self, approval};
use crate::custom_resources::{
    ClusterEnforcement, MAX_CLUSTERS, NetworkSetStatus, PendingChange, PolicyStatus, StagedPolicyStatus, TierStatus,
};
use crate::manifest::{Kind, ObjectId};
use crate::registry::{Acceptance, Snapshot};
use crate::status::{ObjectState, ObjectStatus, Realisation, Realisations, Reasons};

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
    pub snapshot: &'a Snapshot,
    realisations: &'a dyn Realisations,
    pub clusters: BTreeMap<Arc<str>, Realisation>,
    /// The number of policies of each tier.
    policies: BTreeMap<Arc<str>, i64>,
    /// The state of the admission webhook, if there is one.
    webhook: Option<admission::State>,
}

impl<'a> State<'a> {
    pub fn new(snapshot: &'a Snapshot, realisations: &'a dyn Realisations, webhook: Option<admission::State>) -> Self {
        let mut policies = BTreeMap::new();
        for tier in snapshot.objects.values().filter_map(|object| object.tier()) {
            *policies.entry(tier).or_default() += 1;
        }
        Self { snapshot, realisations, clusters: realisations.clusters(), policies, webhook }
    }

    /// The status of an object. Of conditions that `old` has in the same state, the time is kept.
    pub fn status(&self, id: &ObjectId, facts: Facts<'_>, old: &Written) -> Value {
        let observed_generation = facts.generation;
        let accepted = self.accepted(id, facts);
        let is_accepted = accepted.status == "True";
        let mut answers = vec![accepted];
        let stored = self.snapshot.objects.get(id);
        let in_force = stored.map(|object| &object.manifest[..]).unwrap_or_default();
        let is_governed = !approval::tiers_of(self.snapshot, id, in_force).is_empty();
        if let Some(why) = facts.blocked {
            let reason = if is_governed && !self.is_in_use(id) { PENDING } else { "InUse" };
            answers.push(Answer::new("Terminating", true, reason, why));
        }
        let waits = facts.refusal.filter(|it| it.reason == PENDING).map(|it| it.message.as_str());
        let waits = waits.or(facts.blocked.filter(|_| is_governed && !self.is_in_use(id)));
        let pending = waits.map(|_| PendingChange { in_force: String::from_utf8_lossy(in_force).into_owned() });
        match waits {
            Some(why) => answers.push(Answer::new("Approved", false, PENDING, why)),
            None if is_governed && is_accepted => {
                let message = "the version in force is this one";
                answers.push(Answer::new("Approved", true, "Approved", message));
            }
            None => {}
        }
        if let (Kind::Tier, Some(webhook)) = (id.kind, &self.webhook) {
            answers.push(admission_of(webhook));
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
                    pending_change: pending,
                })
            }
            Kind::StagedFederatedNetworkPolicy => json(&StagedPolicyStatus { observed_generation, conditions }),
            Kind::FederatedNetworkSet => {
                let nets = i64::try_from(facts.nets).unwrap_or(i64::MAX);
                json(&NetworkSetStatus { observed_generation, conditions, nets })
            }
            // The status of a cluster is computed elsewhere.
            Kind::Tier | Kind::MemberCluster => {
                let policies = self.policies.get(&id.name).copied().unwrap_or_default();
                json(&TierStatus { observed_generation, conditions, policies, pending_change: pending })
            }
        }
    }

    /// Whether the hub uses this version.
    pub fn accepted(&self, id: &ObjectId, facts: Facts<'_>) -> Answer {
        let acceptance = self.snapshot.acceptance(id);
        match (facts.refusal, &acceptance) {
            (Some(Refusal { reason, message }), _) => Answer::new("Accepted", false, reason, message),
            (None, Some(Acceptance::Accepted)) if facts.is_stored => {
                Answer::new("Accepted", true, "Accepted", "the hub uses this version")
            }
            (None, Some(other)) if facts.is_stored => {
                Answer::new("Accepted", false, other.reason().unwrap_or("NotAccepted"), other.to_string())
            }
            (None, _) => Answer::new("Accepted", false, "Pending", "the hub has not stored this version yet"),
        }
    }

    /// Whether policies name a tier.
    fn is_in_use(&self, id: &ObjectId) -> bool {
        id.kind == Kind::Tier && self.policies.contains_key(&id.name)
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
            _ => self.clusters.get(cluster).is_some_and(|it| it.received_revision >= needed),
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

/// Whether the webhook decides about changes of the policies of a tier.
fn admission_of(webhook: &admission::State) -> Answer {
    let answer = |is, reason: &str, message: &str| Answer::new("Admission", is, reason, message);
    match webhook {
        admission::State::Ready => answer(true, "Ready", "API servers use the admission webhook"),
        admission::State::Unknown => answer(false, "Starting", "the admission webhook starts"),
        admission::State::Failing { reason, message } => answer(false, reason, message),
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hanse_protocol::reason::Reason;

    use super::super::allowance::Urgency;
    use super::*;

    fn status(clusters: &[(&str, ObjectState, u32)]) -> Value {
        let of = |(name, state, nodes): &(&str, ObjectState, u32)| {
            let status = ObjectStatus { state: state.clone(), nodes_enforcing: *nodes, nodes: 3 };
            (Arc::from(*name), status)
        };
        let clusters: BTreeMap<Arc<str>, ObjectStatus> = clusters.iter().map(of).collect();
        let conditions = conditions(vec![enforced(true, Some(&clusters))], 1, &Written::default());
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
            let condition = &status["conditions"][0];
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
        let difference = |old: &Value, new: &Value| Written::of(Some(old)).difference(&Written::of(Some(new)));
        let before = lagging(40, 0);
        let enforced = status(&[("a", ObjectState::Enforced, 3)]);
        assert_eq!(Written::default().difference(&Written::of(Some(&before))), Some(Urgency::Condition));
        assert_eq!(difference(&before, &before), None);
        assert_ne!(lagging(40, 0)["clusters"], lagging(99, 0)["clusters"], "the message has the age");
        assert_eq!(difference(&before, &lagging(99, 0)), None);
        assert_eq!(difference(&before, &lagging(40, 1)), Some(Urgency::Counts));
        assert_eq!(difference(&before, &enforced), Some(Urgency::Condition));
        assert_eq!(difference(&enforced, &before), Some(Urgency::Worse));
    }

    #[test]
    fn version_is_pending_until_the_hub_has_stored_it() {
        let manifest = br#"{"apiVersion":"hanse.dev/v1alpha1","kind":"Tier","metadata":{"name":"t"}}"#;
        let id = ObjectId { kind: Kind::Tier, name: "t".into() };
        let key = crate::registry::key(&["object", "Tier", "t"]).expect("a key");
        let mut snapshot = Snapshot::default();
        snapshot.preview(&hanse_store::Transaction::default().put(key, &manifest[..]));
        let state = State::new(&snapshot, &crate::status::NoRealisations, None);
        let accepted = |is_stored, refusal: Option<&Refusal>| {
            let facts = Facts { generation: 2, is_stored, refusal, blocked: None, nets: 0 };
            let answer = state.accepted(&id, facts);
            (answer.status, answer.reason)
        };
        assert_eq!(accepted(true, None), ("True", "Accepted".to_owned()));
        // An earlier version is stored, and the store refuses writes.
        assert_eq!(accepted(false, None), ("False", "Pending".to_owned()));
        let refusal = Refusal { reason: "Invalid", message: "no".to_owned() };
        assert_eq!(accepted(false, Some(&refusal)), ("False", "Invalid".to_owned()));
    }
}
