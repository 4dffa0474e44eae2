//! Reasons of the hub as text for people, and as codes for programs.

use hanse_proto::federation::v1 as pb;
use hanse_protocol::reason::words::{Located, Words};
use hanse_protocol::reason::{Object, Reason, Subject, wire};
use serde::Serialize;

/// The code of [`Reason::ClusterSilent`].
const CLUSTER_SILENT: &str = "ClusterSilent";
/// Items of a problem that a table names.
const FIRST: usize = 3;

/// One reason, with everything that it concerns, as far as the member reported it.
#[derive(Debug, Serialize)]
pub struct Problem {
    pub reason: String,
    /// For programs, such as `NotProven`.
    pub code: &'static str,
    pub count: u32,
    pub items: Vec<String>,
    /// The items, for programs.
    pub objects: Vec<ObjectRef>,
    /// The first items, as a list of one kind names them.
    #[serde(skip)]
    first: Vec<String>,
    #[serde(skip)]
    are_pods: bool,
}

/// An object that a reason concerns.
#[derive(Debug, Serialize)]
pub struct ObjectRef {
    /// `Pod`, `FederatedNetworkPolicy`, or `Policy`, `Set` and `Chain` of a rule set.
    kind: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    namespace: String,
    name: String,
}

/// A reason of one node, or of the cluster as a whole.
#[derive(Debug, Serialize)]
pub struct NodeReason {
    #[serde(skip_serializing_if = "String::is_empty")]
    node: String,
    code: &'static str,
    reason: String,
}

impl NodeReason {
    /// Whether it contains how long the cluster is silent.
    pub fn is_silence(&self) -> bool {
        self.code == CLUSTER_SILENT
    }
}

impl From<pb::Problem> for Problem {
    fn from(it: pb::Problem) -> Self {
        let subjects: Vec<Subject> = it.items.into_iter().map(wire::parse_subject).collect();
        let (reason, code) = in_words(it.at, it.reason);
        let pod = |it: &Subject| match it {
            Subject::Object(Object::Endpoint(id)) => Some(format!("{}/{}", id.namespace, id.name)),
            _ => None,
        };
        let pods: Option<Vec<String>> = subjects.iter().take(FIRST).map(pod).collect();
        let are_pods = pods.is_some();
        let words = || subjects.iter().take(FIRST).map(|it| Words(it).to_string()).collect();
        Self {
            reason,
            code,
            count: it.count,
            items: subjects.iter().map(|it| Words(it).to_string()).collect(),
            first: pods.unwrap_or_else(words),
            are_pods,
            objects: subjects.iter().map(object).collect(),
        }
    }
}

/// A reason, and its code. One that is missing is unknown.
fn in_words(
    at: Option<hanse_proto::report::v1::Object>,
    reason: Option<hanse_proto::report::v1::Reason>,
) -> (String, &'static str) {
    let (at, reason) = (at.and_then(wire::parse_object), reason.map_or(Reason::Unknown, wire::parse_reason));
    (Located { at: at.as_ref(), reason: &reason }.to_string(), reason.code())
}

fn object(of: &Subject) -> ObjectRef {
    let (kind, namespace, name) = match of {
        Subject::FederatedPolicy(name) => ("FederatedNetworkPolicy", String::new(), name.clone()),
        Subject::Everything => ("Unknown", String::new(), String::new()),
        Subject::Object(Object::Endpoint(id)) => ("Pod", id.namespace.to_string(), id.name.to_string()),
        Subject::Object(Object::Policy { name, .. }) => ("Policy", String::new(), name.to_string()),
        Subject::Object(Object::Set(id)) => ("Set", String::new(), id.to_string()),
        Subject::Object(Object::Chain(id)) => ("Chain", String::new(), id.to_string()),
    };
    ObjectRef { kind, namespace, name }
}

impl Problem {
    /// The reason with what it concerns: the first items, and how many they are.
    pub fn line(&self) -> String {
        let Self { reason, count, first, .. } = self;
        let more = (*count as usize).saturating_sub(first.len());
        let more = if more > 0 { format!(", and {more} more") } else { String::new() };
        match (&self.items[..], count) {
            ([], 0 | 1) => reason.clone(),
            ([], count) => format!("{count} {reason}"),
            ([only], 1) => format!("{only}: {reason}"),
            (_, count) => {
                let kind = if self.are_pods { "pods" } else { "objects" };
                format!("{count} {kind}: {reason} ({}{more})", first.join(", "))
            }
        }
    }
}

/// The reasons why an object is not enforced in a cluster: as one text, and each.
pub fn of_object(reasons: pb::Reasons) -> (String, Vec<NodeReason>) {
    let more = reasons.more;
    let each = reasons.first.into_iter().map(|it| {
        let (reason, code) = in_words(it.at, it.reason);
        NodeReason { node: it.node, code, reason }
    });
    let each: Vec<NodeReason> = each.collect();
    let line = |it: &NodeReason| match it.node.as_str() {
        "" => it.reason.clone(),
        node => format!("node {node}: {}", it.reason),
    };
    let mut text = each.iter().map(line).collect::<Vec<_>>().join("; ");
    if more > 0 {
        text.push_str(&format!("; and {more} more nodes"));
    }
    (text, each)
}
