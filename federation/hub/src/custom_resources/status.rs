//! The status of custom resources. Lists are bounded: a status is written often, and etcd keeps every version of an object.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Clusters in the status of a policy, those that do not enforce it first: some 300 bytes each.
pub const MAX_CLUSTERS: usize = 256;
/// Conditions of an object.
pub const MAX_CONDITIONS: usize = 16;
/// Problems and refusals in the status of a cluster.
pub const MAX_PROBLEMS: usize = 32;
/// Characters of a message; longer ones are cut.
pub const MAX_MESSAGE: usize = 1_024;

fn time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}

fn conditions(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": MAX_CONDITIONS, "items": Condition::json_schema(generator),
        "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"],
    })
}

fn clusters(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": MAX_CLUSTERS, "items": ClusterEnforcement::json_schema(generator),
        "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
    })
}

fn reason(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "minLength": 1, "maxLength": 1_024, "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"})
}

/// A condition of an object, as Kubernetes defines it (`metav1.Condition`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// The type of the condition.
    #[serde(rename = "type")]
    #[schemars(length(max = 316), regex(pattern = r"^[A-Za-z0-9][-A-Za-z0-9_./]*$"))]
    pub kind: String,
    /// The state of the condition: `True`, `False` or `Unknown`.
    #[schemars(extend("enum" = ["True", "False", "Unknown"]))]
    pub status: String,
    /// The generation of the object that the condition is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// The time at which `status` changed last.
    #[schemars(schema_with = "time")]
    pub last_transition_time: Time,
    /// The reason of the state, for programs.
    #[schemars(schema_with = "reason")]
    pub reason: String,
    /// The reason of the state, for people.
    #[schemars(length(max = 32_768))]
    pub message: String,
}

/// The state of a policy in one cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterEnforcement {
    /// The name of the cluster.
    #[schemars(length(max = 63))]
    pub name: String,
    /// `Enforced`, `Lagging` (not yet, or not known) or `Refused` (it cannot be enforced as written).
    #[schemars(extend("enum" = ["Enforced", "Lagging", "Refused"]))]
    pub state: String,
    /// The number of nodes that enforce the policy.
    #[schemars(range(min = 0))]
    pub nodes_enforced: i64,
    /// The number of nodes of the cluster.
    #[schemars(range(min = 0))]
    pub nodes_total: i64,
    /// Why the cluster does not enforce the policy, for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "reason")]
    pub reason: Option<String>,
    /// Why the cluster does not enforce the policy, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_MESSAGE))]
    pub message: Option<String>,
}

/// The state of the policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyStatus {
    /// The generation of the object that the status is about.
    #[schemars(range(min = 0))]
    pub observed_generation: i64,
    /// `Accepted`: the hub uses this version. `Distributed`: all clusters that enforce it have received it. `Enforced`: all nodes of these
    /// clusters enforce it; false again when a cluster lags or is silent. `Approved`, in a tier that requires approvals: false while this
    /// version or the deletion waits for one.
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// The number of clusters that enforce the policy, of those that must: `2/3`.
    #[schemars(length(max = 32))]
    pub clusters_enforced: String,
    /// The number of nodes that enforce the policy, of those of all these clusters: `11/12`.
    #[schemars(length(max = 32))]
    pub nodes_enforced: String,
    /// The clusters that must enforce the policy. At most 256, those that do not enforce it first.
    #[schemars(schema_with = "clusters")]
    pub clusters: Vec<ClusterEnforcement>,
    /// The change that waits for an approval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending_change: Option<PendingChange>,
}

/// A change that waits for an approval.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PendingChange {
    /// The version in force (JSON). Empty: there is none.
    #[schemars(length(max = 262_144))]
    pub in_force: String,
}

/// The state of the staged policy. It is never enforced.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StagedPolicyStatus {
    /// The generation of the object that the status is about.
    #[schemars(range(min = 0))]
    pub observed_generation: i64,
    /// `Accepted`: the hub uses this version. `Distributed`: all clusters that it concerns evaluate it.
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
}

/// The state of the tier.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TierStatus {
    /// The generation of the object that the status is about.
    #[schemars(range(min = 0))]
    pub observed_generation: i64,
    /// `Accepted`: the hub uses this version. `Admission`: API servers can use the admission webhook; otherwise they refuse changes.
    /// `Approved`, where the tier requires approvals: false while this version or the deletion waits for one.
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// The number of policies in the tier, staged ones included.
    #[schemars(range(min = 0))]
    pub policies: i64,
    /// The change that waits for an approval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending_change: Option<PendingChange>,
}

/// The state of the network set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkSetStatus {
    /// The generation of the object that the status is about.
    #[schemars(range(min = 0))]
    pub observed_generation: i64,
    /// `Accepted`: the hub uses this version. `Distributed`: all clusters have received it.
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// The number of nets.
    #[schemars(range(min = 0))]
    pub nets: i64,
}

/// An object that the hub does not accept from a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObjectRefusal {
    /// The object, such as `pod web/vllm-0`.
    #[schemars(length(max = 600))]
    pub object: String,
    /// Why the hub does not accept it.
    #[schemars(length(max = MAX_MESSAGE))]
    pub message: String,
}

/// A reason why a cluster, or one of its nodes, does not enforce everything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterProblem {
    /// The node. Absent: the cluster as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
    /// The reason, for programs.
    #[schemars(schema_with = "reason")]
    pub reason: String,
    /// The reason, for people.
    #[schemars(length(max = MAX_MESSAGE))]
    pub message: String,
}

/// The state of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MemberClusterStatus {
    /// The generation of the object that the status is about.
    #[schemars(range(min = 0))]
    pub observed_generation: i64,
    /// `Accepted`: the cluster takes part in the ClusterSet. `Connected`: the hub receives its data within the lease. `Enforcing`: all of
    /// its nodes enforce the newest revision.
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// The time at which the connection of the cluster to the hub began or ended last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "time")]
    pub connection_time: Option<Time>,
    /// The time of the last data of the cluster, while it is silent. Absent while the hub receives its data within the lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "time")]
    pub last_data_time: Option<Time>,
    /// The revision of what the cluster publishes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub revision: Option<i64>,
    /// The revision of the hub that all nodes of the cluster enforce.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub enforced_revision: Option<i64>,
    /// Whether what the cluster has received equals what the hub selected for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digests_equal: Option<bool>,
    /// The number of agents with the newest rule set, of all nodes: `3/3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub agents: Option<String>,
    /// The number of endpoints that the cluster exports.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub endpoints: Option<i64>,
    /// The end of the validity of the certificate of the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "time")]
    pub certificate_expiration_time: Option<Time>,
    /// The key exchange of the connection, such as `X25519MLKEM768`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub key_exchange: Option<String>,
    /// Objects that the hub does not accept from the cluster. At most 32.
    #[schemars(length(max = MAX_PROBLEMS))]
    pub last_refusals: Vec<ObjectRefusal>,
    /// Why the cluster does not enforce everything. At most 32.
    #[schemars(length(max = MAX_PROBLEMS))]
    pub problems: Vec<ClusterProblem>,
}

/// The state of the ClusterSet.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterSetStatus {
    /// The generation of the object that the status is about.
    #[schemars(range(min = 0))]
    pub observed_generation: i64,
    /// `Ready`: the hub uses these settings. `Synchronized`: every object of the hub has a custom resource.
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// The number of connected clusters, of those that are accepted: `2/3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub clusters: Option<String>,
    /// The SHA-256 fingerprint of the root certificate of the ClusterSet.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub root_fingerprint: Option<String>,
    /// Objects of the hub without a custom resource, which stay in force. At most 32.
    #[schemars(length(max = MAX_PROBLEMS), inner(length(max = 320)))]
    pub objects_without_resource: Vec<String>,
}

/// The state of the token. It never contains the token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterJoinTokenStatus {
    /// The generation of the object that the status is about.
    #[schemars(range(min = 0))]
    pub observed_generation: i64,
    /// `Issued`: the Secret contains the token. `Used`: a cluster has joined with it. `Expired`: it is not valid any more.
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// The identifier of the token, which is not secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub token_id: Option<String>,
    /// The end of the validity of the token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "time")]
    pub expiration_time: Option<Time>,
    /// The hash of the public key that the token is bound to since its first use.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub bound_key: Option<String>,
}
