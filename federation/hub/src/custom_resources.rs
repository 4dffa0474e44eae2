//! The kinds of `hanse.dev` as custom resources of the management cluster.
//!
//! The schema of a spec is that of the type which `hanse-api` reads it with, so that an API server and Hanse do not disagree about its
//! fields. The spec itself is kept as it was written, with fields that this version does not know: reading it is up to `hanse-api`.

use hanse_api::hanse;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

mod definition;
mod status;

pub use definition::{Definition, definitions, write};
pub use status::*;

#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "hanse.dev",
    version = "v1alpha1",
    kind = "FederatedNetworkPolicy",
    plural = "federatednetworkpolicies",
    shortname = "fnp",
    category = "hanse",
    derive = "PartialEq",
    status = "PolicyStatus",
    doc = "A network policy that clusters of the ClusterSet enforce.",
    printcolumn = r#"{"name":"Tier","type":"string","jsonPath":".spec.tier"}"#,
    printcolumn = r#"{"name":"Order","type":"number","jsonPath":".spec.order"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name":"Distributed","type":"string","jsonPath":".status.conditions[?(@.type=='Distributed')].status"}"#,
    printcolumn = r#"{"name":"Enforced","type":"string","jsonPath":".status.conditions[?(@.type=='Enforced')].status"}"#,
    printcolumn = r#"{"name":"Clusters","type":"string","jsonPath":".status.clustersEnforced"}"#,
    printcolumn = r#"{"name":"Nodes","type":"string","jsonPath":".status.nodesEnforced"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub struct FederatedNetworkPolicySpec(#[schemars(with = "hanse::PolicySpec")] pub Map<String, Value>);

#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "hanse.dev",
    version = "v1alpha1",
    kind = "StagedFederatedNetworkPolicy",
    plural = "stagedfederatednetworkpolicies",
    shortname = "sfnp",
    category = "hanse",
    derive = "PartialEq",
    status = "StagedPolicyStatus",
    doc = "A network policy that clusters of the ClusterSet evaluate and do not enforce. Flows and `hanse policy diff --staged` show the verdicts as if it replaced or deleted the FederatedNetworkPolicy of the same name.",
    printcolumn = r#"{"name":"Action","type":"string","jsonPath":".spec.stagedAction"}"#,
    printcolumn = r#"{"name":"Tier","type":"string","jsonPath":".spec.tier"}"#,
    printcolumn = r#"{"name":"Order","type":"number","jsonPath":".spec.order"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name":"Distributed","type":"string","jsonPath":".status.conditions[?(@.type=='Distributed')].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub struct StagedFederatedNetworkPolicySpec(#[schemars(with = "hanse::PolicySpec")] pub Map<String, Value>);

#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "hanse.dev",
    version = "v1alpha1",
    kind = "Tier",
    plural = "tiers",
    category = "hanse",
    derive = "PartialEq",
    status = "TierStatus",
    doc = "An ordered group of federated policies. Calico has a kind of this name too: use `tiers.hanse.dev` with kubectl.",
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".spec.phase"}"#,
    printcolumn = r#"{"name":"Order","type":"number","jsonPath":".spec.order"}"#,
    printcolumn = r#"{"name":"Default","type":"string","jsonPath":".spec.defaultAction"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name":"Policies","type":"integer","jsonPath":".status.policies"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub struct TierSpec(#[schemars(with = "hanse::TierSpec")] pub Map<String, Value>);

#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "hanse.dev",
    version = "v1alpha1",
    kind = "FederatedNetworkSet",
    plural = "federatednetworksets",
    shortname = "fns",
    category = "hanse",
    derive = "PartialEq",
    status = "NetworkSetStatus",
    doc = "Nets with labels, which the selectors of federated policies match.",
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name":"Distributed","type":"string","jsonPath":".status.conditions[?(@.type=='Distributed')].status"}"#,
    printcolumn = r#"{"name":"Nets","type":"integer","jsonPath":".status.nets"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub struct FederatedNetworkSetSpec(#[schemars(with = "hanse::NetworkSetSpec")] pub Map<String, Value>);

#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "hanse.dev",
    version = "v1alpha1",
    kind = "MemberCluster",
    plural = "memberclusters",
    shortname = "mc",
    category = "hanse",
    derive = "PartialEq",
    status = "MemberClusterStatus",
    doc = "A cluster of the ClusterSet: its labels, what it may export, and its state.",
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name":"Connected","type":"string","jsonPath":".status.conditions[?(@.type=='Connected')].status"}"#,
    printcolumn = r#"{"name":"Enforcing","type":"string","jsonPath":".status.conditions[?(@.type=='Enforcing')].status"}"#,
    printcolumn = r#"{"name":"Agents","type":"string","jsonPath":".status.agents"}"#,
    printcolumn = r#"{"name":"Revision","type":"integer","jsonPath":".status.revision"}"#,
    printcolumn = r#"{"name":"Silent","type":"date","jsonPath":".status.lastDataTime"}"#,
    printcolumn = r#"{"name":"Certificate Until","type":"string","jsonPath":".status.certificateExpirationTime","priority":1}"#,
    printcolumn = r#"{"name":"Key Exchange","type":"string","jsonPath":".status.keyExchange","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub struct MemberClusterSpec(#[schemars(with = "hanse::MemberClusterSpec")] pub Map<String, Value>);

#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "hanse.dev",
    version = "v1alpha1",
    kind = "ClusterSet",
    plural = "clustersets",
    shortname = "cset",
    category = "hanse",
    derive = "PartialEq",
    status = "ClusterSetStatus",
    doc = "The ClusterSet of this management cluster. There is one, with the name `default`.",
    printcolumn = r#"{"name":"Trust Domain","type":"string","jsonPath":".spec.trustDomain"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Synchronized","type":"string","jsonPath":".status.conditions[?(@.type=='Synchronized')].status"}"#,
    printcolumn = r#"{"name":"Clusters","type":"string","jsonPath":".status.clusters"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub struct ClusterSetSpec(#[schemars(with = "hanse::ClusterSetSpec")] pub Map<String, Value>);

#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "hanse.dev",
    version = "v1alpha1",
    kind = "ClusterJoinToken",
    plural = "clusterjointokens",
    shortname = "cjt",
    category = "hanse",
    derive = "PartialEq",
    status = "ClusterJoinTokenStatus",
    doc = "A request for a single-use token with which a cluster joins.",
    printcolumn = r#"{"name":"Cluster","type":"string","jsonPath":".spec.cluster"}"#,
    printcolumn = r#"{"name":"Secret","type":"string","jsonPath":".spec.secretName"}"#,
    printcolumn = r#"{"name":"Issued","type":"string","jsonPath":".status.conditions[?(@.type=='Issued')].status"}"#,
    printcolumn = r#"{"name":"Used","type":"string","jsonPath":".status.conditions[?(@.type=='Used')].status"}"#,
    printcolumn = r#"{"name":"Expires","type":"string","jsonPath":".status.expirationTime"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub struct ClusterJoinTokenSpec(#[schemars(with = "hanse::ClusterJoinTokenSpec")] pub Map<String, Value>);

/// What is approved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ApprovalAction {
    /// A new object, or a new version.
    Apply,
    /// A deletion.
    Delete,
}

/// The approval. It cannot be changed: create another one.
#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "hanse.dev",
    version = "v1alpha1",
    kind = "PolicyApproval",
    plural = "policyapprovals",
    shortname = "pa",
    category = "hanse",
    derive = "PartialEq",
    doc = "An approval of one pending change in a tier with `requireApproval`. `hanse policy approve` creates it. The hub deletes it when the change is in force, or has been replaced by another one.",
    printcolumn = r#"{"name":"Action","type":"string","jsonPath":".spec.action"}"#,
    printcolumn = r#"{"name":"Kind","type":"string","jsonPath":".spec.kind"}"#,
    printcolumn = r#"{"name":"Name","type":"string","jsonPath":".spec.name"}"#,
    printcolumn = r#"{"name":"Generation","type":"integer","jsonPath":".spec.generation"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [{"rule": "self == oldSelf", "message": "cannot be changed: create another object"}]))]
pub struct PolicyApprovalSpec {
    /// The action that is approved.
    pub action: ApprovalAction,
    /// The kind of the object: FederatedNetworkPolicy or Tier.
    #[schemars(extend("enum" = ["FederatedNetworkPolicy", "Tier"]))]
    pub kind: String,
    /// The name of the object.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// The UID of the object.
    #[schemars(length(min = 1, max = 64))]
    pub uid: String,
    /// The generation of the object that is approved.
    #[schemars(range(min = 0))]
    pub generation: i64,
    /// The digest of the version that is approved, which the status of the object names; of a deletion, that of the version in force.
    #[schemars(regex(pattern = "^sha256:[0-9a-f]{64}$"), length(max = 71))]
    pub digest: String,
}
