//! Rules as manifests contain them. The documentation of the fields is also that of the CRDs of `hanse.dev`.

use hanse_policy::inventory::Labels;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::decode::{IntOrString, null_as_default};
use crate::limits::MAX_HTTP_PATHS;
use crate::schema;

/// A rule. The first rule that matches a packet decides it, in the order of the list. All given conditions must be satisfied.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("required" = ["action"]))]
#[schemars(extend("x-kubernetes-validations" = schema::rule_validations()))]
pub struct RuleSpec {
    /// The action for packets that match: `Allow`, `Deny`, `Pass` (continue with the next tier) or `Log` (log the packet and continue
    /// with the next rule).
    #[serde(default)]
    #[schemars(extend("enum" = ["Allow", "Deny", "Pass", "Log"]))]
    pub action: String,
    /// The IP version of the packet: 4 or 6. Absent: both.
    #[schemars(extend("enum" = [4, 6]))]
    pub ip_version: Option<i64>,
    /// The protocol: `TCP`, `UDP`, `ICMP`, `ICMPv6`, `SCTP`, `UDPLite`, or a number from 1 to 255. Absent: all protocols.
    #[serde(default)]
    #[schemars(schema_with = "schema::protocol")]
    pub protocol: Option<IntOrString>,
    /// All protocols except this one, written like `protocol`.
    #[serde(default)]
    #[schemars(schema_with = "schema::protocol")]
    pub not_protocol: Option<IntOrString>,
    /// The type and code of an ICMP message. It requires the protocol `ICMP` or `ICMPv6`.
    pub icmp: Option<IcmpSpec>,
    /// All ICMP messages except those of this type and code.
    #[serde(rename = "notICMP")]
    pub not_icmp: Option<IcmpSpec>,
    /// Conditions on the source of the connection.
    #[serde(default, deserialize_with = "null_as_default")]
    pub source: EntitySpec,
    /// Conditions on the destination of the connection.
    #[serde(default, deserialize_with = "null_as_default")]
    pub destination: EntitySpec,
    /// Conditions on HTTP requests, for ingress rules with the action `Allow`. They need a gateway: without one, the rule allows
    /// nothing.
    pub http: Option<HttpSpec>,
    /// Metadata of the rule. It has no effect on packets.
    pub metadata: Option<RuleMetadata>,
}

/// Metadata of a rule.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RuleMetadata {
    /// Annotations of the rule.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::annotations")]
    pub annotations: Labels,
}

/// The type and code of an ICMP message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = schema::icmp_validations()))]
pub struct IcmpSpec {
    /// The type, from 0 to 254. Absent: all types.
    #[serde(rename = "type")]
    #[schemars(range(min = 0, max = 254))]
    pub kind: Option<i64>,
    /// The code, from 0 to 255. It requires `type`. Absent: all codes.
    #[schemars(range(min = 0, max = 255))]
    pub code: Option<i64>,
}

/// Conditions on one end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = schema::entity_validations()))]
pub struct EntitySpec {
    /// The address is in one of these nets, in CIDR notation. All nets of a rule are of one IP version.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::nets")]
    pub nets: Vec<String>,
    /// The address is in none of these nets, in CIDR notation.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::nets")]
    pub not_nets: Vec<String>,
    /// Selects pods and network sets by their labels, such as `app == 'web' && stage in {'test', 'prod'}`.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::subject_selector")]
    pub selector: String,
    /// Excludes pods and network sets by their labels.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::selector")]
    pub not_selector: String,
    /// Selects namespaces by their labels. `global()`, alone, selects network sets without a namespace.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::selector")]
    pub namespace_selector: String,
    /// Selects pods by their service accounts.
    pub service_accounts: Option<ServiceAccountsSpec>,
    /// The backends of a Service of the cluster that enforces the policy. Not allowed beside selectors, nets and service accounts.
    pub services: Option<ServiceSpec>,
    /// Ports: numbers, ranges such as `8000:8080`, or names of container ports. Numbers and ranges require the protocol `TCP`, `UDP` or
    /// `SCTP`.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::ports")]
    pub ports: Vec<IntOrString>,
    /// All ports except these, written like `ports`.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::ports")]
    pub not_ports: Vec<IntOrString>,
    /// Selects workloads by the labels of their clusters at the hub. `hanse.dev/cluster` is the name of a cluster. Absent: the workloads
    /// of all clusters, and network sets.
    #[serde(default)]
    #[schemars(schema_with = "schema::selector")]
    pub cluster_selector: Option<String>,
}

/// Selects pods by their service accounts.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceAccountsSpec {
    /// The names of the service accounts. Empty: all names.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::names")]
    pub names: Vec<String>,
    /// Selects service accounts by their labels.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::selector")]
    pub selector: String,
}

/// A Service.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("required" = ["name", "namespace"]))]
pub struct ServiceSpec {
    /// The name of the Service.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::subdomain")]
    pub name: String,
    /// The namespace of the Service.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::subdomain")]
    pub namespace: String,
}

/// Conditions on an HTTP request.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpSpec {
    /// The methods, such as `GET`. Empty: all methods.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(schema_with = "schema::http_methods")]
    pub methods: Vec<String>,
    /// The paths. Empty: all paths.
    #[serde(default, deserialize_with = "null_as_default")]
    #[schemars(length(max = MAX_HTTP_PATHS))]
    pub paths: Vec<HttpPathSpec>,
}

/// A path: exactly one of `exact` and `prefix`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = schema::http_path_validations()))]
pub struct HttpPathSpec {
    /// The whole path.
    #[serde(default)]
    #[schemars(schema_with = "schema::http_path")]
    pub exact: Option<String>,
    /// The beginning of the path.
    #[serde(default)]
    #[schemars(schema_with = "schema::http_path")]
    pub prefix: Option<String>,
}
