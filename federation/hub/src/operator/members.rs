//! MemberCluster: whether a cluster takes part, and its state.
//!
//! The registration of a cluster and its MemberCluster exist together. A cluster that joins without one gets one from the operator, as
//! wide as what the hub stores for it: nothing at first. It waits there for its acceptance, as a CertificateSigningRequest waits for its
//! approval. The deletion of the MemberCluster removes the registration, and the cluster needs a new token to return.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hanse_api::hanse::ClusterAcceptance;
use hanse_protocol::reason::words::Words;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::condition::{Answer, Written, clipped, conditions, json as to_json};
use super::objects::FINALIZER;
use crate::custom_resources::{ClusterProblem, MAX_PROBLEMS, MemberClusterStatus, ObjectRefusal};
use crate::manifest::{Kind, ObjectId};
use crate::registry::records::{MemberRecord, MemberState};
use crate::registry::{ClusterState, Lease, Snapshot};
use crate::status::Realisation;

/// The MemberCluster for a cluster that has none: with what the hub stores, so that nothing changes for the cluster.
pub fn adopted(snapshot: &Snapshot, name: &Arc<str>) -> Value {
    let id = ObjectId { kind: Kind::MemberCluster, name: Arc::clone(name) };
    let stored = snapshot.objects.get(&id);
    let stored: Value = stored.and_then(|it| serde_json::from_slice(&it.manifest).ok()).unwrap_or_default();
    let mut metadata = json!({"name": name, "finalizers": [FINALIZER]});
    if let Some(labels) = stored["metadata"]["labels"].as_object() {
        metadata["labels"] = json!(labels);
    }
    let spec = stored["spec"].as_object().cloned().unwrap_or_default();
    json!({"apiVersion": "hanse.dev/v1alpha1", "kind": "MemberCluster", "metadata": metadata, "spec": spec})
}

/// The state that the registration of a cluster must get. `is_stored`: the hub uses this version. A version that it does not use never
/// accepts a cluster, but may suspend or revoke it.
pub fn change(acceptance: Option<ClusterAcceptance>, is_stored: bool, record: &MemberRecord) -> Option<MemberState> {
    match (acceptance?, &record.state) {
        (ClusterAcceptance::Accepted, MemberState::Pending) if is_stored => Some(MemberState::Accepted),
        (ClusterAcceptance::Pending, MemberState::Accepted) => Some(MemberState::Pending),
        (ClusterAcceptance::Revoked, MemberState::Pending | MemberState::Accepted) => {
            Some(MemberState::Revoked { reason: "spec.acceptance of the MemberCluster is Revoked".to_owned() })
        }
        // A revoked cluster joins again.
        _ => None,
    }
}

/// What the hub knows of a cluster.
#[derive(Debug)]
pub struct Facts<'a> {
    pub generation: i64,
    /// Whether the hub uses this version.
    pub used: Answer,
    pub blocked: Option<&'a str>,
    pub acceptance: Option<ClusterAcceptance>,
    pub realisation: Option<&'a Realisation>,
    pub key_exchange: Option<&'static str>,
    /// Since the last message of the cluster.
    pub silent_for: Option<Duration>,
    pub now: SystemTime,
}

/// The status of a MemberCluster.
pub fn status(snapshot: &Snapshot, name: &str, facts: Facts<'_>, old: &Written) -> Value {
    let record = snapshot.members.get(name).map(|it| &it.record);
    let lease = snapshot.clusters.get(name).map_or(Lease::NeverConnected, |it| it.lease);
    let accepted = accepted(facts.used, snapshot.clusters.get(name).map(|it| &it.state), facts.acceptance);
    let takes_part = record.is_some_and(|it| it.state == MemberState::Accepted);
    let since = facts.silent_for.and_then(|it| facts.now.checked_sub(it)).and_then(seconds);
    let connected = connected(takes_part, lease, since.as_ref());
    let is_connected = connected.status == "True";
    let realisation = facts.realisation.filter(|_| takes_part);
    let enforcing = enforcing(is_connected, realisation);
    let mut answers = vec![accepted, connected, enforcing];
    if let Some(why) = facts.blocked {
        answers.push(Answer::new("Terminating", true, "InUse", why));
    }
    let conditions = conditions(answers, facts.generation, old);
    let connection_time = conditions.iter().find(|it| it.kind == "Connected" && it.reason != "NotAccepted");
    let expires = record.map_or(0, |it| it.certificate_expires_at);
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    to_json(&MemberClusterStatus {
        observed_generation: facts.generation,
        connection_time: connection_time.map(|it| it.last_transition_time.clone()),
        last_data_time: since.filter(|_| takes_part && !is_connected),
        revision: realisation.map(|it| number(it.revision)),
        enforced_revision: realisation.map(|it| number(it.enforced_revision)),
        digests_equal: realisation.and_then(|it| it.digests_equal),
        agents: realisation.map(|it| format!("{}/{}", it.agents_current, it.agents)),
        endpoints: realisation.map(|it| number(it.endpoints)),
        certificate_expiration_time: Some(expires).filter(|it| *it > 0).and_then(time),
        key_exchange: facts.key_exchange.map(str::to_owned),
        last_refusals: realisation.map(refusals).unwrap_or_default(),
        problems: realisation.map(problems).unwrap_or_default(),
        conditions,
    })
}

fn accepted(used: Answer, state: Option<&ClusterState>, acceptance: Option<ClusterAcceptance>) -> Answer {
    let answer = |is, reason, message: &str| Answer::new("Accepted", is, reason, message);
    if used.status != "True" {
        return match state {
            Some(ClusterState::Accepted) => {
                let message = format!("{}: the cluster takes part, with the last accepted version", used.message);
                Answer { message, ..used }
            }
            _ => used,
        };
    }
    match state {
        Some(ClusterState::Accepted) if acceptance == Some(ClusterAcceptance::Accepted) || acceptance.is_none() => {
            answer(true, "Accepted", "the cluster takes part in the ClusterSet")
        }
        Some(ClusterState::Accepted) => answer(false, "Pending", "the hub has not carried out spec.acceptance yet"),
        Some(ClusterState::Pending) if acceptance == Some(ClusterAcceptance::Accepted) => {
            answer(false, "Pending", "the hub has not carried out spec.acceptance yet")
        }
        Some(ClusterState::Pending) => {
            let message = "the cluster has joined and waits: set spec.acceptance to Accepted to let it take part";
            answer(false, "AwaitingAcceptance", message)
        }
        Some(ClusterState::Revoked { reason }) => {
            let message = format!("the cluster was revoked ({reason}): it needs a new join token to return");
            answer(false, "Revoked", &message)
        }
        Some(ClusterState::Expected) | None => {
            answer(false, "NotJoined", "no cluster has joined with this name: create a join token for it")
        }
    }
}

fn connected(takes_part: bool, lease: Lease, since: Option<&Time>) -> Answer {
    let answer = |is, reason, message: &str| Answer::new("Connected", is, reason, message);
    match lease {
        _ if !takes_part => answer(false, "NotAccepted", "the cluster does not take part in the ClusterSet"),
        Lease::Live => answer(true, "Connected", "the hub receives the data of the cluster"),
        Lease::NeverConnected => answer(false, "NeverConnected", "the cluster has not connected yet"),
        Lease::Stale => {
            let since = since.map(|it| format!(" since {}", it.0)).unwrap_or_default();
            answer(false, "Silent", &format!("the hub has received nothing from the cluster{since}"))
        }
    }
}

fn enforcing(is_connected: bool, realisation: Option<&Realisation>) -> Answer {
    let answer = |is, reason, message: String| Answer::new("Enforcing", is, reason, message);
    let Some(it) = realisation.filter(|_| is_connected) else {
        return answer(false, "NotConnected", "the state of the nodes is not known".to_owned());
    };
    let (agents, current) = (it.agents, it.agents_current);
    match () {
        () if it.digests_equal == Some(false) => {
            answer(false, "DigestsDiffer", "the data of the cluster differs from what the hub selected".to_owned())
        }
        () if it.digests_equal.is_none() => {
            answer(false, "NotReported", "what the cluster has received was not compared yet".to_owned())
        }
        () if agents == 0 => answer(false, "NoAgents", "no agent of the cluster has enrolled".to_owned()),
        () if current < agents => {
            answer(false, "NodesLag", format!("nodes with the newest rule set: {current} of {agents}"))
        }
        () if it.unenforced > 0 || it.problems_total > 0 => {
            let first = it.problems.first().map(|it| format!(": {}", Words(&it.reason))).unwrap_or_default();
            let text = format!("pods not enforced: {}, problems: {}{first}", it.unenforced, it.problems_total);
            answer(false, "Problems", text)
        }
        () => answer(true, "Enforcing", format!("nodes with the newest rule set: {current} of {agents}")),
    }
}

fn refusals(realisation: &Realisation) -> Vec<ObjectRefusal> {
    let refusal = |text: &String| {
        let (object, message) = text.split_once(": ").unwrap_or(("", text));
        ObjectRefusal { object: object.chars().take(600).collect(), message: clipped(message) }
    };
    realisation.refusals.iter().take(MAX_PROBLEMS).map(refusal).collect()
}

fn problems(realisation: &Realisation) -> Vec<ClusterProblem> {
    let problem = |it: &crate::status::Problem| ClusterProblem {
        node: Some(it.node.chars().take(253).collect()).filter(|it: &String| !it.is_empty()),
        reason: it.reason.code().to_owned(),
        message: clipped(&Words(&it.reason).to_string()),
    };
    realisation.problems.iter().take(MAX_PROBLEMS).map(problem).collect()
}

fn seconds(at: SystemTime) -> Option<Time> {
    time(at.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs())
}

/// A time in whole seconds since 1970, as the API server writes it.
pub fn time(seconds: u64) -> Option<Time> {
    Timestamp::from_second(i64::try_from(seconds).ok()?).ok().map(Time)
}

/// The connected and the accepted clusters.
pub fn count(snapshot: &Snapshot) -> (usize, usize) {
    let accepted: BTreeMap<_, _> =
        snapshot.clusters.iter().filter(|(_, it)| it.state == ClusterState::Accepted).collect();
    (accepted.values().filter(|it| it.lease == Lease::Live).count(), accepted.len())
}
