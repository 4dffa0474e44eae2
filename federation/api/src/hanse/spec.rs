//! The specs of the kinds of `hanse.dev`, as manifests contain them and as the CRDs describe them.

use std::collections::BTreeMap;

use hanse_policy::inventory::Labels;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::decode::null_as_default;
use crate::rule::RuleSpec;
use crate::schema;

/// The policy. The fields have the meaning of those of Calico's GlobalNetworkPolicy, in the clusters that `clusterSelector` selects.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["tier"]))]
#[schemars(extend("x-kubernetes-validations" = schema::policy_validations()))]
pub struct PolicySpec {
    /// The name of the Tier of the policy. A policy whose tier does not exist is not in force: its last version with a tier stays in
    /// force, if there is one.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::dns_label")]
    pub tier: String,
    /// The position of the policy in its tier: lower numbers first. Absent: last.
    pub order: Option<f64>,
    /// Selects the clusters that enforce the policy by their labels at the hub. `hanse.dev/cluster` is the name of a cluster. Empty: all
    /// clusters.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::subject_selector")]
    pub cluster_selector: String,
    /// Selects the namespaces of the pods that the policy applies to, by their labels. Empty: all namespaces.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::subject_selector")]
    pub namespace_selector: String,
    /// Selects the pods that the policy applies to, by their labels. Empty: all pods.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::subject_selector")]
    pub selector: String,
    /// Selects the pods that the policy applies to, by the labels of their service accounts. Empty: all service accounts.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::subject_selector")]
    pub service_account_selector: String,
    /// The directions that the policy applies to: `Ingress`, `Egress` or both. Absent: those that have rules, and `Ingress` where none has.
    /// In such a direction, packets that no rule matches get the default action of the tier.
    #[serde(default)]
    #[schemars(schema_with = "schema::types")]
    pub types: Option<Vec<String>>,
    /// Rules for connections to the selected pods.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(length(max = crate::limits::MAX_RULES))]
    pub ingress: Vec<RuleSpec>,
    /// Rules for connections from the selected pods.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(length(max = crate::limits::MAX_RULES))]
    pub egress: Vec<RuleSpec>,
    /// For StagedFederatedNetworkPolicy only: `Set` (the default) replaces the FederatedNetworkPolicy of the same name, or adds one;
    /// `Delete` deletes it; `Learn` and `Ignore` have no effect.
    #[schemars(extend("enum" = ["Set", "Delete", "Learn", "Ignore"]))]
    pub staged_action: Option<String>,
}

/// The tier.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TierSpec {
    /// `Guard` (the default): the tier is evaluated before the tiers of the clusters. `Baseline`: after them.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(extend("enum" = ["Guard", "Baseline"]))]
    pub phase: String,
    /// The position of the tier in its phase: lower numbers first. Absent: last.
    pub order: Option<f64>,
    /// The action for packets that no rule of the tier matches, if a policy of the tier applies to the pod in this direction: `Deny` (the
    /// default) or `Pass` (continue with the next tier).
    #[schemars(extend("enum" = ["Deny", "Pass"]))]
    pub default_action: Option<String>,
    /// Whether changes of the policies of the tier, and of the tier itself, take effect only when a user other than their author has
    /// approved them: a user with the verb `approve` on the tier, by a PolicyApproval. It needs an operator with a webhook. Default: false.
    #[serde(default, deserialize_with = "null_as_default")]
    pub require_approval: bool,
}

/// The network set.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkSetSpec {
    /// Nets in CIDR notation, and single addresses. The selectors of federated policies match them by the labels of the object.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::set_nets")]
    pub nets: Vec<String>,
}

/// The cluster.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MemberClusterSpec {
    /// Labels of the cluster, for cluster selectors. Keys that start with `hanse.dev/` are reserved.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::cluster_labels")]
    pub labels: Labels,
    /// What the cluster may export to other clusters. Empty: nothing.
    #[serde(default, deserialize_with = "null_as_default")]
    pub grants: GrantsSpec,
    /// The effect of an `Allow` of a federated policy: `Pass` (the default) continues with the tiers of the cluster, `Final` allows the
    /// packet. Offline commands use it. A hub ignores it: the operator of the cluster states it when the cluster joins.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(extend("enum" = ["Pass", "Final"]))]
    pub federated_allow: String,
    /// Whether the cluster takes part in the ClusterSet: `Pending` (it waits after it has joined), `Accepted`, or `Revoked` (its connections
    /// are closed and its certificate is refused). Absent: as its join token states.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(extend("enum" = ["Pending", "Accepted", "Revoked"]))]
    pub acceptance: String,
}

/// What a cluster may export. Without namespaces or CIDRs it exports nothing.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrantsSpec {
    /// The namespaces that the cluster may export. `*`: all namespaces.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::names")]
    pub namespaces: Vec<String>,
    /// The nets of the addresses of its endpoints, in CIDR notation. They must not overlap with those of another cluster.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::cidrs")]
    pub cidrs: Vec<String>,
    /// The label keys that its endpoints may have, each with the permitted values (`*`: all values). Absent: all keys and values.
    #[serde(default)]
    #[schemars(schema_with = "schema::label_values")]
    pub labels: Option<BTreeMap<String, Vec<String>>>,
    /// The clusters that may receive its exports. Absent: all clusters.
    pub visible_to: Option<VisibleToSpec>,
    /// Limits of what the cluster may publish.
    #[serde(default, deserialize_with = "null_as_default")]
    pub limits: LimitsSpec,
}

/// A selection of clusters.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VisibleToSpec {
    /// Selects clusters by their labels at the hub. `hanse.dev/cluster` is the name of a cluster. Empty: all clusters.
    #[serde(default)]
    #[schemars(schema_with = "schema::selector")]
    pub cluster_selector: String,
}

/// Limits of what a cluster may publish.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LimitsSpec {
    /// The maximum number of endpoints. Default: 150,000.
    #[serde(default)]
    #[schemars(schema_with = "schema::limit")]
    pub endpoints: Option<u64>,
    /// The maximum number of different label sets. Default: 50,000.
    #[serde(default)]
    #[schemars(schema_with = "schema::limit")]
    pub label_sets: Option<u64>,
    /// The maximum number of updates per second, as the average of a minute. Further updates are delayed. Default: 10,000.
    #[serde(default)]
    #[schemars(schema_with = "schema::limit")]
    pub updates_per_second: Option<u64>,
}

/// The ClusterSet.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["trustDomain"]))]
pub struct ClusterSetSpec {
    /// The SPIFFE trust domain of all certificates. It cannot be changed.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::trust_domain")]
    pub trust_domain: String,
    /// The lease of a cluster in seconds. When the hub has received nothing from a cluster for this time, policies treat its endpoints as
    /// unknown. Default: 30.
    #[serde(default)]
    #[schemars(schema_with = "schema::lease_seconds")]
    pub lease_seconds: Option<u64>,
    /// Defaults for objects that do not state a value.
    pub defaults: Option<DefaultsSpec>,
}

/// Defaults for objects that do not state a value.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DefaultsSpec {
    /// Limits of MemberClusters.
    #[serde(default, deserialize_with = "null_as_default")]
    pub limits: LimitsSpec,
    /// The lifetime of a ClusterJoinToken in seconds. Default: 3,600.
    #[serde(default)]
    #[schemars(schema_with = "schema::token_seconds")]
    pub join_token_seconds: Option<u64>,
}

/// The token. It cannot be changed: create another one.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["cluster", "secretName"]))]
#[schemars(extend("x-kubernetes-validations" = schema::immutable()))]
pub struct ClusterJoinTokenSpec {
    /// The name of the cluster that may join with the token.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::dns_label")]
    pub cluster: String,
    /// The name of the Secret in the namespace of the hub that receives the token, under the key `token`. The operator creates it once; the
    /// token is not retrievable otherwise.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::subdomain")]
    pub secret_name: String,
    /// The lifetime of the token in seconds, from its creation. Default: that of the ClusterSet.
    #[serde(default)]
    #[schemars(schema_with = "schema::token_seconds")]
    pub lifetime_seconds: Option<u64>,
    /// Whether the cluster takes part as soon as it joins. Otherwise it waits until `acceptance` of its MemberCluster is `Accepted`.
    #[serde(default, deserialize_with = "null_as_default")]
    pub accept: bool,
}
