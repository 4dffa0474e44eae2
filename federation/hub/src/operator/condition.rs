//! Conditions: how they are computed, and how a status is compared with what was written last.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use super::allowance::Urgency;
use crate::custom_resources::{Condition, MAX_MESSAGE};

/// The reason where a change waits for an approval.
pub const PENDING: &str = "PendingApproval";

/// Why the hub does not accept an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: &'static str,
    pub message: String,
}

/// The state of one condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub kind: &'static str,
    pub status: &'static str,
    pub reason: String,
    pub message: String,
}

impl Answer {
    pub fn new(kind: &'static str, is: bool, reason: &str, message: impl Into<String>) -> Self {
        let status = if is { "True" } else { "False" };
        Self { kind, status, reason: reason.to_owned(), message: clipped(&message.into()) }
    }
}

pub fn clipped(text: &str) -> String {
    match text.char_indices().nth(MAX_MESSAGE - 1) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// What a status says, without what does not count as a difference: digests in place of the texts and lists.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Written {
    is_present: bool,
    observed_generation: i64,
    conditions: BTreeMap<String, Said>,
    /// All other fields, apart from messages.
    rest: Option<blake3::Hash>,
}

#[derive(Debug, Clone)]
struct Said {
    status: String,
    reason: String,
    generation: i64,
    /// The hub's answer to this version. Other messages are about clusters, and contain ages.
    answer: Option<blake3::Hash>,
    since: Option<Time>,
}

impl PartialEq for Said {
    fn eq(&self, other: &Self) -> bool {
        let fields = |it: &Self| (it.status.clone(), it.reason.clone(), it.generation, it.answer);
        fields(self) == fields(other)
    }
}

/// Conditions whose message is part of the hub's answer.
const ANSWERS: [&str; 5] = ["Accepted", "Approved", "Issued", "Ready", "Terminating"];

impl Written {
    pub fn of(status: Option<&Value>) -> Self {
        let Some(status) = status.filter(|it| it.is_object()) else { return Self::default() };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let said = |it: &Value| {
            let kind = text(&it["type"]);
            let answer = ANSWERS.contains(&kind.as_str()).then(|| blake3::hash(text(&it["message"]).as_bytes()));
            let said = Said {
                status: text(&it["status"]),
                reason: text(&it["reason"]),
                generation: it["observedGeneration"].as_i64().unwrap_or_default(),
                answer,
                since: serde_json::from_value(it["lastTransitionTime"].clone()).ok(),
            };
            (kind, said)
        };
        let mut rest = status.clone();
        for list in ["clusters", "problems", "lastRefusals"] {
            for item in rest.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                item.as_object_mut().into_iter().for_each(|it| it.retain(|name, _| name != "message"));
            }
        }
        // Times of conditions, or of the last message.
        let is_rest = |name: &String| !["conditions", "connectionTime", "lastDataTime"].contains(&name.as_str());
        rest.as_object_mut().into_iter().for_each(|it| it.retain(|name, _| is_rest(name)));
        rest.sort_all_objects();
        Self {
            is_present: true,
            observed_generation: status["observedGeneration"].as_i64().unwrap_or_default(),
            conditions: status["conditions"].as_array().into_iter().flatten().map(said).collect(),
            rest: Some(blake3::hash(rest.to_string().as_bytes())),
        }
    }

    /// Since when a condition has this state.
    fn since(&self, kind: &str, status: &str) -> Option<Time> {
        self.conditions.get(kind).filter(|it| it.status == status)?.since.clone()
    }

    /// Whether a condition is true.
    pub fn is(&self, kind: &str) -> bool {
        self.conditions.get(kind).is_some_and(|it| it.status == "True")
    }

    /// The reason, and a digest of the message, with which the hub refuses the object.
    fn refusal(&self) -> Option<(&str, Option<blake3::Hash>)> {
        let mut answers = ANSWERS.iter().filter_map(|kind| self.conditions.get(*kind));
        let refused = answers.find(|it| it.status == "False" && is_refusal(&it.reason))?;
        Some((&refused.reason, refused.answer))
    }

    /// Whether `new` has a refusal that this has not.
    pub fn has_new_refusal(&self, new: &Self) -> bool {
        new.refusal().is_some() && new.refusal() != self.refusal()
    }

    /// How urgent it is to replace this by `new`. `None`: nothing differs but ages and messages about clusters.
    pub fn difference(&self, new: &Self) -> Option<Urgency> {
        let worse = |(kind, it): (&String, &Said)| it.status != "True" && self.is(kind);
        if new.conditions.iter().any(worse) {
            return Some(Urgency::Worse);
        }
        let same = (self.is_present, self.observed_generation) == (true, new.observed_generation);
        if !same || self.conditions != new.conditions {
            return Some(Urgency::Condition);
        }
        (self.rest != new.rest).then_some(Urgency::Counts)
    }
}

/// Whether the reason of a condition that is false needs a person.
fn is_refusal(reason: &str) -> bool {
    !["Pending", "NotJoined"].contains(&reason)
}

/// Reason and message with which the hub refuses an object.
pub fn refusal(status: &Value) -> Option<(&str, &str)> {
    let conditions = || status["conditions"].as_array().into_iter().flatten();
    let mut answers = ANSWERS.iter().filter_map(|kind| conditions().find(|it| it["type"] == *kind));
    let refused = answers.find(|it| it["status"] == "False" && it["reason"].as_str().is_some_and(is_refusal))?;
    Some((refused["reason"].as_str()?, refused["message"].as_str()?))
}

/// Conditions with these answers. Of those that `old` has in the same state, the time is kept.
pub fn conditions(answers: Vec<Answer>, generation: i64, old: &Written) -> Vec<Condition> {
    let now = Time(Timestamp::now());
    let condition = |Answer { kind, status, reason, message }: Answer| Condition {
        kind: kind.to_owned(),
        status: status.to_owned(),
        observed_generation: Some(generation),
        last_transition_time: old.since(kind, status).unwrap_or_else(|| now.clone()),
        reason,
        message,
    };
    answers.into_iter().map(condition).collect()
}

pub fn json<T: Serialize>(status: &T) -> Value {
    serde_json::to_value(status).expect("a status is JSON")
}
