//! `policy.networking.k8s.io/v1alpha1` AdminNetworkPolicy and BaselineAdminNetworkPolicy, rewritten as the v1alpha2
//! ClusterNetworkPolicy that replaced both. Neither is read as policy.
//!
//! The meaning stays: an AdminNetworkPolicy becomes tier Admin with its priority, a BaselineAdminNetworkPolicy tier Baseline;
//! `Allow` is spelled `Accept`; ports become protocols. A part without an equivalent (peers by `sameLabels` of early
//! versions, for example) refuses the object, since leaving a peer out of a Deny rule would open what it closed.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::cluster_network_policy;
use crate::decode::typed;
use crate::document::{Node, Notes};
use crate::field::{FieldError, UnknownField};

pub const API_VERSION: &str = "policy.networking.k8s.io/v1alpha1";
pub const KIND: &str = "AdminNetworkPolicy";
pub const BASELINE_KIND: &str = "BaselineAdminNetworkPolicy";

/// A BaselineAdminNetworkPolicy has no priority: it comes after everything else of its tier.
const BASELINE_PRIORITY: i64 = 1000;

/// Metadata that an API server sets: a new object has none of it.
const SERVER_METADATA: [&str; 7] =
    ["uid", "resourceVersion", "creationTimestamp", "managedFields", "generation", "selfLink", "deletionTimestamp"];
/// The annotation in which `kubectl apply` keeps what it applied.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AdminNetworkPolicy {
    #[serde(rename = "apiVersion")]
    _api_version: serde::de::IgnoredAny,
    kind: String,
    metadata: Map<String, Value>,
    spec: Spec,
    #[serde(default, rename = "status")]
    _status: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    priority: Option<i64>,
    /// The same in both APIs.
    subject: Value,
    #[serde(default)]
    ingress: Option<Vec<Rule>>,
    #[serde(default)]
    egress: Option<Vec<Rule>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    name: Option<String>,
    action: String,
    from: Option<Vec<Peer>>,
    to: Option<Vec<Peer>>,
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Peer {
    namespaces: Option<LabelSelector>,
    pods: Option<Pods>,
    nodes: Option<LabelSelector>,
    networks: Option<Value>,
    domain_names: Option<Value>,
}

#[derive(Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Pods {
    // Both are required, which is checked of what is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace_selector: Option<LabelSelector>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_selector: Option<LabelSelector>,
}

/// Its fields are known, so that a set of namespaces as early versions spelled it (`sameLabels`) is refused by name.
#[derive(Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LabelSelector {
    #[serde(skip_serializing_if = "Option::is_none")]
    match_labels: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    match_expressions: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Port {
    port_number: Option<Number>,
    port_range: Option<Range>,
    named_port: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Number {
    protocol: Option<String>,
    port: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Range {
    protocol: Option<String>,
    start: i64,
    end: i64,
}

/// Whether `hanse policy convert` rewrites objects of this kind.
pub fn is_convertible(api_version: &str, kind: &str) -> bool {
    api_version == API_VERSION && [KIND, BASELINE_KIND].contains(&kind)
}

/// Why an object is not rewritten.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unconvertible {
    /// It is not a valid object of its own kind either.
    #[error("malformed: {0}")]
    Malformed(FieldError),
    #[error("no equivalent: {0}")]
    NoEquivalent(FieldError),
}

impl Unconvertible {
    pub fn field(&self) -> &FieldError {
        match self {
            Self::Malformed(error) | Self::NoEquivalent(error) => error,
        }
    }
}

/// Fields of earlier versions of the API, whose meaning is known and cannot be said by a ClusterNetworkPolicy.
const WITHOUT_EQUIVALENT: [&str; 4] = ["sameLabels", "notSameLabels", "namespaceSelector", "namespaces"];

/// The ClusterNetworkPolicy that means the same. Whether it is a valid one is not checked here.
///
/// # Errors
/// Names each field that is malformed or has no equivalent.
pub fn to_cluster_network_policy(node: Node<'_>) -> Result<Value, Vec<Unconvertible>> {
    let notes = Notes::default();
    let malformed = |errors: Vec<FieldError>| errors.into_iter().map(Unconvertible::Malformed).collect::<Vec<_>>();
    let AdminNetworkPolicy { kind, mut metadata, spec, .. } = typed(node.with_notes(&notes)).map_err(malformed)?;
    let unknown = |field: UnknownField| match WITHOUT_EQUIVALENT.contains(&&*field.name) {
        true => Unconvertible::NoEquivalent(field.into()),
        false => Unconvertible::Malformed(field.into()),
    };
    let mut errors: Vec<Unconvertible> = notes.take_unknown(node).into_iter().map(unknown).collect();
    let mut error = |path: &str, message: &str| {
        errors.push(Unconvertible::Malformed(FieldError { path: path.to_owned(), message: message.to_owned() }));
    };
    let is_baseline = kind == BASELINE_KIND;
    let (tier, priority) = match (is_baseline, spec.priority) {
        (false, Some(priority)) => ("Admin", priority),
        (true, None) => ("Baseline", BASELINE_PRIORITY),
        (false, None) => {
            error("spec.priority", "is missing");
            ("Admin", 0)
        }
        (true, Some(_)) => {
            error("spec.priority", "is not a field of a BaselineAdminNetworkPolicy");
            ("Baseline", BASELINE_PRIORITY)
        }
    };
    metadata.retain(|key, _| !SERVER_METADATA.contains(&key.as_str()));
    if let Some(Value::Object(annotations)) = metadata.get_mut("annotations") {
        annotations.retain(|key, _| key != LAST_APPLIED);
        if annotations.is_empty() {
            metadata.retain(|key, _| key != "annotations");
        }
    }
    let mut converted = Map::new();
    converted.insert("tier".to_owned(), tier.into());
    converted.insert("priority".to_owned(), priority.into());
    converted.insert("subject".to_owned(), spec.subject);
    for (list, rules) in [("ingress", spec.ingress), ("egress", spec.egress)] {
        let Some(rules) = rules else { continue };
        let rules = rules.into_iter().enumerate().map(|(at, rule)| {
            let path = format!("spec.{list}[{at}]");
            convert_rule(rule, list == "ingress", is_baseline, &path, &mut error)
        });
        let rules: Vec<Value> = rules.collect();
        converted.insert(list.to_owned(), rules.into());
    }
    let object = json!({
        "apiVersion": cluster_network_policy::API_VERSION,
        "kind": cluster_network_policy::KIND,
        "metadata": metadata,
        "spec": converted,
    });
    if errors.is_empty() { Ok(object) } else { Err(errors) }
}

fn convert_rule(
    rule: Rule,
    is_ingress: bool,
    is_baseline: bool,
    path: &str,
    error: &mut impl FnMut(&str, &str),
) -> Value {
    let action = match rule.action.as_str() {
        "Allow" => "Accept",
        "Deny" => "Deny",
        "Pass" if !is_baseline => "Pass",
        _ => {
            let known = if is_baseline { "must be Allow or Deny" } else { "must be Allow, Deny or Pass" };
            error(&format!("{path}.action"), known);
            "Deny"
        }
    };
    let (name, peers, other) = match is_ingress {
        true => ("from", rule.from, ("to", rule.to)),
        false => ("to", rule.to, ("from", rule.from)),
    };
    if other.1.is_some() {
        error(&format!("{path}.{}", other.0), "belongs to the other direction");
    }
    let mut converted = Map::new();
    if let Some(name) = rule.name {
        converted.insert("name".to_owned(), name.into());
    }
    converted.insert("action".to_owned(), action.into());
    let peers = peers.unwrap_or_default().into_iter().enumerate();
    let peers: Vec<Value> =
        peers.map(|(at, peer)| convert_peer(peer, &format!("{path}.{name}[{at}]"), error)).collect();
    converted.insert(name.to_owned(), peers.into());
    // An empty list is as none: every port.
    if let Some(ports) = rule.ports.filter(|ports| !ports.is_empty()) {
        let ports = ports.into_iter().enumerate();
        let ports: Vec<Value> =
            ports.map(|(at, port)| convert_port(port, &format!("{path}.ports[{at}]"), error)).collect();
        converted.insert("protocols".to_owned(), ports.into());
    }
    converted.into()
}

fn convert_peer(peer: Peer, path: &str, error: &mut impl FnMut(&str, &str)) -> Value {
    let selector = |selector: Option<LabelSelector>| selector.map(|it| json!(it));
    let given = [
        ("namespaces", selector(peer.namespaces)),
        ("pods", peer.pods.map(|it| json!(it))),
        ("nodes", selector(peer.nodes)),
        ("networks", peer.networks),
        ("domainNames", peer.domain_names),
    ];
    let mut given = given.into_iter().filter_map(|(name, value)| Some((name, value?)));
    match (given.next(), given.next()) {
        (Some((name, value)), None) => json!({name: value}),
        _ => {
            error(path, "must have exactly one field");
            Value::Null
        }
    }
}

fn convert_port(port: Port, path: &str, error: &mut impl FnMut(&str, &str)) -> Value {
    let (protocol, destination) = match (port.port_number, port.port_range, port.named_port) {
        (Some(it), None, None) => (it.protocol, json!({"number": it.port})),
        (None, Some(it), None) => (it.protocol, json!({"range": {"start": it.start, "end": it.end}})),
        (None, None, Some(name)) => return json!({"destinationNamedPort": name}),
        _ => {
            error(path, "must have exactly one of portNumber, portRange and namedPort");
            return Value::Null;
        }
    };
    let protocol = protocol.as_deref().unwrap_or("TCP");
    if !["TCP", "UDP", "SCTP"].contains(&protocol) {
        error(path, "names a protocol that is not TCP, UDP or SCTP");
    }
    json!({protocol.to_ascii_lowercase(): {"destinationPort": destination}})
}
