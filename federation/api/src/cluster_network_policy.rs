//! `policy.networking.k8s.io/v1alpha2` ClusterNetworkPolicy.
//!
//! Tier Admin is our local tier `kube-admin`, Baseline `kube-baseline`; both pass on what no rule matched, so that a
//! ClusterNetworkPolicy never isolates. A part of a rule that is not understood makes the whole rule unknown: an Accept
//! rule then matches nothing, and Deny and Pass deny whatever the rule could have covered. Not understood are fields that
//! are not known, and label selectors that are malformed: the API's schema does not look into those.

use std::sync::Arc;

use hanse_policy::model::{
    Action, ClusterScope, EntityMatch, Order, Phase, Policy, PolicyId, PolicyKind, Port, Protocol, Rule, Selection,
    TierId,
};
use hanse_policy::selector::build::{self, Namespaces};
use hanse_policy::selector::{Expr, Selector};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::address::parse_net;
use crate::decode::null_as_default;
use crate::field::{Errors, NOT_KNOWN, Path};
use crate::label_selector::{LabelSelector, written_fields, written_peer};
use crate::metadata::{Metadata, check_metadata};
use crate::policy::{LocalPolicy, NodePeers};
use crate::policy_fields::peers_scope;

/// Bounds of the API's schema.
pub const API_VERSION: &str = "policy.networking.k8s.io/v1alpha2";
pub const KIND: &str = "ClusterNetworkPolicy";

pub const MAX_RULES: usize = 25;
pub const MAX_PEERS: usize = 25;
pub const MAX_PROTOCOLS: usize = 25;
pub const MAX_NETWORKS: usize = 25;
pub const MAX_DOMAIN_NAMES: usize = 25;
pub const MAX_RULE_NAME_CHARACTERS: usize = 100;
pub const MAX_NETWORK_CHARACTERS: usize = 43;

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterNetworkPolicy {
    #[serde(rename = "apiVersion")]
    pub _api_version: serde::de::IgnoredAny,
    #[serde(rename = "kind")]
    pub _kind: serde::de::IgnoredAny,
    #[serde(default)]
    pub metadata: Metadata,
    pub spec: Spec,
    #[serde(default, rename = "status")]
    pub _status: serde::de::IgnoredAny,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    pub tier: String,
    pub priority: i64,
    pub subject: Subject,
    #[serde(default, deserialize_with = "null_as_default")]
    pub ingress: Vec<RuleSpec>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub egress: Vec<RuleSpec>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    pub namespaces: Option<LabelSelector>,
    pub pods: Option<PodsSpec>,
}

/// `other` is what this version does not know.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodsSpec {
    #[serde(default, deserialize_with = "null_as_default")]
    pub namespace_selector: LabelSelector,
    pub pod_selector: Option<LabelSelector>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// `other` is what this version does not know.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleSpec {
    /// For people.
    #[serde(default, deserialize_with = "null_as_default")]
    pub name: String,
    pub action: String,
    /// Ingress rules.
    pub from: Option<Vec<Peer>>,
    /// Egress rules.
    pub to: Option<Vec<Peer>>,
    pub protocols: Option<Vec<ProtocolSpec>>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Exactly one is given; `other` is what this version does not know.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    pub namespaces: Option<LabelSelector>,
    pub pods: Option<PodsSpec>,
    /// Egress only, as the two below.
    pub networks: Option<Vec<String>>,
    pub nodes: Option<LabelSelector>,
    pub domain_names: Option<Vec<String>>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Exactly one is given; `other` is what this version does not know.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProtocolSpec {
    pub tcp: Option<PortSpec>,
    pub udp: Option<PortSpec>,
    pub sctp: Option<PortSpec>,
    pub destination_named_port: Option<String>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortSpec {
    pub destination_port: Option<DestinationPort>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// One of both is given; `other` is what this version does not know.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct DestinationPort {
    pub number: Option<i64>,
    pub range: Option<PortRange>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// `other` is what this version does not know.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct PortRange {
    pub start: i64,
    pub end: i64,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// A part of a rule, or the reason why it is not understood.
type Part<T> = Result<T, String>;

#[derive(Debug, Clone, Default)]
struct ProtocolMatch {
    protocol: Option<Protocol>,
    ports: Vec<Port>,
}

/// The peer of a rule.
#[derive(Debug, Clone)]
enum End {
    Match(Box<EntityMatch>),
    /// The nodes of the cluster that a selector selects.
    Nodes(Expr),
}

#[derive(Debug, Default)]
struct Rules {
    rules: Vec<Rule>,
    node_peers: Vec<NodePeers>,
}

struct Walk<'a> {
    scope: &'a ClusterScope,
}

impl ClusterNetworkPolicy {
    pub fn convert(&self, errors: &mut Errors) -> LocalPolicy {
        let path = Path::Root("spec");
        let spec = &self.spec;
        let tier = match spec.tier.as_str() {
            "Admin" => "kube-admin",
            "Baseline" => "kube-baseline",
            other => {
                errors.add(&path.field("tier"), format!("\"{other}\" is neither Admin nor Baseline"));
                "kube-admin"
            }
        };
        if !(0..=1000).contains(&spec.priority) {
            errors.add(&path.field("priority"), format!("{} is not between 0 and 1000", spec.priority));
        }
        check_metadata(&self.metadata, errors);
        let scope = peers_scope(&self.metadata, errors);
        let walk = Walk { scope: &scope };
        let subject_path = path.field("subject");
        let subject = match (&spec.subject.namespaces, &spec.subject.pods) {
            (Some(namespaces), None) => namespaces_expr(namespaces, &subject_path.field("namespaces"), errors)
                .with_written(format!("subject {}", written_fields([("namespaces", Some(namespaces))]))),
            (None, Some(pods)) => {
                let path = subject_path.field("pods");
                // The subject of a policy cannot fail closed.
                for name in pods.other.keys() {
                    errors.add(&path.field(name), NOT_KNOWN);
                }
                if pods.pod_selector.is_none() {
                    errors.add(&path.field("podSelector"), NO_POD_SELECTOR);
                }
                let written = format!("subject {}", pods.written());
                pods_expr(pods, &path, errors).with_written(written)
            }
            _ => {
                errors.add(&subject_path, "must have one of namespaces and pods");
                Selector::from(build::not(Expr::All))
            }
        };
        let mut direction = |rules: &[RuleSpec], name: &'static str, ingress: bool| {
            let path = path.field(name);
            if rules.len() > MAX_RULES {
                errors.add(&path, format!("has {} rules; {MAX_RULES} are allowed", rules.len()));
            }
            let mut converted = Rules::default();
            for (index, rule) in rules.iter().enumerate() {
                walk.rule(index, rule, ingress, &path.index(index), &mut converted, errors);
            }
            // Without rules in a direction the policy says nothing of it; it never isolates.
            (!rules.is_empty()).then_some(converted)
        };
        let (ingress, egress) = (direction(&spec.ingress, "ingress", true), direction(&spec.egress, "egress", false));
        let (egress, node_peers) = egress.map(|it| (it.rules, it.node_peers)).unzip();
        let policy = Policy {
            id: PolicyId {
                cluster: None,
                kind: PolicyKind::ClusterNetworkPolicy,
                namespace: None,
                name: self.metadata.name.as_str().into(),
            },
            tier: TierId { phase: Phase::Local, name: tier.into() },
            order: Order(u16::try_from(spec.priority).ok().map(f64::from)),
            enforcers: ClusterScope::Local,
            selector: subject,
            ingress: ingress.map(|it| it.rules),
            egress,
            staged: None,
            host_only: false,
        };
        LocalPolicy::new(policy).with_node_peers(node_peers.unwrap_or_default())
    }
}

impl Walk<'_> {
    fn rule(
        &self,
        index: usize,
        rule: &RuleSpec,
        ingress: bool,
        path: &Path<'_>,
        converted: &mut Rules,
        errors: &mut Errors,
    ) {
        let action = match rule.action.as_str() {
            "Accept" => Action::Allow,
            "Deny" => Action::Deny,
            "Pass" => Action::Pass,
            other => {
                errors.add(&path.field("action"), format!("\"{other}\" is not one of Accept, Deny, Pass"));
                return;
            }
        };
        let (name, peers, wrong) = match ingress {
            true => ("from", &rule.from, ("to", rule.to.is_some())),
            false => ("to", &rule.to, ("from", rule.from.is_some())),
        };
        if wrong.1 {
            errors.add(&path.field(wrong.0), "belongs to the other direction");
        }
        if rule.name.chars().count() > MAX_RULE_NAME_CHARACTERS {
            errors.add(&path.field("name"), format!("longer than {MAX_RULE_NAME_CHARACTERS} characters"));
        }
        let peers_path = path.field(name);
        let peers = peers.as_deref().unwrap_or_default();
        if peers.is_empty() || peers.len() > MAX_PEERS {
            errors.add(&peers_path, format!("must have 1 to {MAX_PEERS} peers"));
        }
        let mut ends: Vec<Part<End>> = Vec::new();
        for (index, peer) in peers.iter().enumerate() {
            self.peer(peer, ingress, &peers_path.index(index), &mut ends, errors);
        }
        let protocols_path = path.field("protocols");
        let protocols: Vec<Part<ProtocolMatch>> = match &rule.protocols {
            None => vec![Ok(ProtocolMatch::default())],
            Some(entries) => {
                if entries.is_empty() || entries.len() > MAX_PROTOCOLS {
                    errors.add(&protocols_path, format!("must have 1 to {MAX_PROTOCOLS} entries"));
                }
                let entries = entries.iter().enumerate();
                entries
                    .filter_map(|(index, entry)| convert_protocol(entry, &protocols_path.index(index), errors))
                    .collect()
            }
        };
        let named = |entry: &ProtocolSpec| entry.destination_named_port.is_some();
        let no_pods = |peer: &Peer| peer.networks.is_some() || peer.nodes.is_some() || peer.domain_names.is_some();
        if rule.protocols.iter().flatten().any(named) && peers.iter().any(no_pods) {
            errors.add(path, "networks, nodes and domainNames have no named ports");
        }
        let peer_reason = ends.iter().find_map(|end| end.as_ref().err().cloned());
        if let Some(reason) = peer_reason.filter(|_| action != Action::Allow) {
            // A peer that is not understood may be anything, and the rule denies all of it.
            converted.rules.push(Rule { not_understood: Some(reason.into()), ..rule_of(action, index) });
            return;
        }
        let reasons = ends.iter().filter_map(|end| end.as_ref().err());
        let mut reasons = reasons.chain(protocols.iter().filter_map(|part| part.as_ref().err()));
        // Unknown fields beside peers and protocols can only narrow the rule.
        let reason = reasons.next().cloned().or_else(|| not_known(&rule.other, path));
        for end in &ends {
            if let Ok(End::Nodes(selector)) = end {
                let (first, count, selector) = (converted.rules.len(), protocols.len(), selector.clone());
                converted.node_peers.push(NodePeers { first, count, selector });
            }
            for protocol in &protocols {
                let end = match end {
                    Ok(End::Match(end)) => (**end).clone(),
                    Ok(End::Nodes(_)) | Err(_) => EntityMatch::default(),
                };
                let protocol = protocol.clone().unwrap_or_default();
                let (mut source, mut destination) = (EntityMatch::default(), EntityMatch::default());
                *(if ingress { &mut source } else { &mut destination }) = end;
                destination.ports = protocol.ports;
                let (protocol, not_understood) = (protocol.protocol, reason.as_deref().map(Arc::from));
                converted.rules.push(Rule { protocol, source, destination, not_understood, ..rule_of(action, index) });
            }
        }
    }

    fn peer(&self, peer: &Peer, ingress: bool, path: &Path<'_>, ends: &mut Vec<Part<End>>, errors: &mut Errors) {
        let given = [
            peer.namespaces.is_some(),
            peer.pods.is_some(),
            peer.networks.is_some(),
            peer.nodes.is_some(),
            peer.domain_names.is_some(),
        ];
        let count = given.into_iter().filter(|given| *given).count() + usize::from(!peer.other.is_empty());
        if count > 1 {
            errors.add(path, "must have one field only");
        }
        let selected = |selector: Selector| {
            let selection = Some(Selection { clusters: self.scope.clone(), selector });
            End::Match(Box::new(EntityMatch { selection, ..EntityMatch::default() }))
        };
        if let Some(namespaces) = &peer.namespaces {
            let written = written_peer(path, &written_fields([("namespaces", Some(namespaces))]));
            let path = path.field("namespaces");
            let selector = understood(|errors| namespaces_expr(namespaces, &path, errors));
            ends.push(selector.map(|it| selected(it.with_written(written))));
        } else if let Some(pods) = &peer.pods {
            let written = written_peer(path, &pods.written());
            let path = path.field("pods");
            if pods.pod_selector.is_none() {
                errors.add(&path.field("podSelector"), NO_POD_SELECTOR);
            }
            let selector = understood(|errors| pods_expr(pods, &path, errors).with_written(written));
            ends.push(not_known(&pods.other, &path).map_or_else(|| selector.map(selected), Err));
        } else if ingress && given[2..].iter().any(|given| *given) {
            errors.add(path, "networks, nodes and domainNames are peers of egress only");
        } else if let Some(networks) = &peer.networks {
            let path = path.field("networks");
            if networks.is_empty() || networks.len() > MAX_NETWORKS {
                errors.add(&path, format!("must have 1 to {MAX_NETWORKS} networks"));
            }
            for (index, text) in networks.iter().enumerate() {
                if text.len() > MAX_NETWORK_CHARACTERS {
                    errors.add(&path.index(index), format!("longer than {MAX_NETWORK_CHARACTERS} characters"));
                }
            }
            refuse_duplicates(networks, &path, errors);
            let nets: Vec<IpNet> = networks
                .iter()
                .enumerate()
                .filter_map(|(index, text)| errors.note(&path.index(index), parse_network(text)))
                .collect();
            self.nets(nets, ends);
        } else if let Some(nodes) = &peer.nodes {
            let path = path.field("nodes");
            match understood(|errors| nodes.convert(&path, errors).to_expr()) {
                Ok(selector) => ends.push(Ok(End::Nodes(selector))),
                Err(reason) => ends.push(Err(reason)),
            }
        } else if let Some(names) = &peer.domain_names {
            let path = path.field("domainNames");
            if names.is_empty() || names.len() > MAX_DOMAIN_NAMES {
                errors.add(&path, format!("must have 1 to {MAX_DOMAIN_NAMES} names"));
            }
            for (index, name) in names.iter().enumerate().filter(|(_, name)| !is_domain_name(name)) {
                errors.add(&path.index(index), format!("\"{name}\" is not a domain name, such as *.example.org"));
            }
            refuse_duplicates(names, &path, errors);
            ends.push(Err("domainNames cannot be enforced yet".to_owned()));
        } else {
            match not_known(&peer.other, path) {
                Some(reason) => ends.push(Err(reason)),
                None => errors.add(path, "must have a field: namespaces, pods, networks, nodes or domainNames"),
            }
        }
    }

    /// Nets of each family make a match of their own, since a rule with nets matches their families only.
    fn nets(&self, nets: Vec<IpNet>, ends: &mut Vec<Part<End>>) {
        let (v4, v6): (Vec<IpNet>, Vec<IpNet>) = nets.into_iter().partition(|net| matches!(net, IpNet::V4(_)));
        for nets in [v4, v6].into_iter().filter(|nets| !nets.is_empty()) {
            ends.push(Ok(End::Match(Box::new(EntityMatch { nets, ..EntityMatch::default() }))));
        }
    }
}

/// What a label selector becomes, or what is wrong with it: an API server stores it all the same.
fn understood<T>(convert: impl FnOnce(&mut Errors) -> T) -> Part<T> {
    let mut errors = Errors::default();
    let converted = convert(&mut errors);
    match errors.0.first() {
        None => Ok(converted),
        Some(error) => Err(format!("{} is not understood: {}", error.path, error.message)),
    }
}

/// The reason for fields that this version does not know.
fn not_known(other: &Map<String, Value>, path: &Path<'_>) -> Option<String> {
    let names = other.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    (!names.is_empty()).then(|| format!("{path} is not understood: {names}"))
}

/// A CIDR as CEL's `isCIDR` takes it: host bits may be set, and IPv4 may not be mapped into IPv6.
fn parse_network(text: &str) -> Result<IpNet, String> {
    match (parse_net(text)?, text.contains(':')) {
        (IpNet::V4(_), true) => Err(format!("\"{text}\" is IPv4 mapped into IPv6, which is not allowed")),
        (net, _) => Ok(net),
    }
}

/// A rule that matches everything.
fn rule_of(action: Action, index: usize) -> Rule {
    Rule {
        action,
        index: u32::try_from(index).unwrap_or(u32::MAX),
        ip_version: None,
        protocol: None,
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: EntityMatch::default(),
        destination: EntityMatch::default(),
        http: None,
        not_understood: None,
    }
}

/// Lists that are sets have no duplicates.
fn refuse_duplicates(texts: &[String], path: &Path<'_>, errors: &mut Errors) {
    for (index, text) in texts.iter().enumerate().filter(|(index, text)| texts[..*index].contains(text)) {
        errors.add(&path.index(index), format!("duplicate of \"{text}\""));
    }
}

/// Two labels or more; the first may be `*`, and the last may end with a dot.
fn is_domain_name(text: &str) -> bool {
    let name = text.strip_prefix("*.").unwrap_or(text);
    let name = name.strip_suffix('.').unwrap_or(name);
    let label = |label: &str| {
        let inside = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let edge = |end: Option<u8>| end.is_some_and(|byte| byte.is_ascii_alphanumeric());
        label.bytes().all(inside) && edge(label.bytes().next()) && edge(label.bytes().last())
    };
    name.contains('.') && name.split('.').all(label)
}

impl PodsSpec {
    /// As people write it, in one line.
    fn written(&self) -> String {
        let namespaces = Some(&self.namespace_selector).filter(|it| **it != LabelSelector::default());
        let fields = written_fields([("namespaceSelector", namespaces), ("podSelector", self.pod_selector.as_ref())]);
        format!("{{pods: {fields}}}")
    }
}

const NO_POD_SELECTOR: &str = "is missing; {} selects every pod";

fn namespaces_expr(namespaces: &LabelSelector, path: &Path<'_>, errors: &mut Errors) -> Selector {
    let namespaces = namespaces.convert(path, errors);
    Selector::from(build::kubernetes_pods(Namespaces::Selected(&namespaces), None))
}

fn pods_expr(pods: &PodsSpec, path: &Path<'_>, errors: &mut Errors) -> Selector {
    let namespaces = pods.namespace_selector.convert(&path.field("namespaceSelector"), errors);
    let own = pods.pod_selector.clone().unwrap_or_default().convert(&path.field("podSelector"), errors);
    Selector::from(build::kubernetes_pods(Namespaces::Selected(&namespaces), Some(&own)))
}

/// `None`: refused with an error.
fn convert_protocol(entry: &ProtocolSpec, path: &Path<'_>, errors: &mut Errors) -> Option<Part<ProtocolMatch>> {
    let named =
        [(Protocol::Tcp, "tcp", &entry.tcp), (Protocol::Udp, "udp", &entry.udp), (Protocol::Sctp, "sctp", &entry.sctp)];
    let count = named.iter().filter(|(.., spec)| spec.is_some()).count()
        + usize::from(entry.destination_named_port.is_some())
        + usize::from(!entry.other.is_empty());
    if count > 1 {
        errors.add(path, "must have one field only");
        return None;
    }
    for (protocol, name, spec) in named {
        let Some(spec) = spec else { continue };
        let path = path.field(name);
        if let Some(reason) = not_known(&spec.other, &path) {
            return Some(Err(reason));
        }
        let Some(port) = &spec.destination_port else {
            errors.add(&path, "must have a field: destinationPort");
            return None;
        };
        let path = path.field("destinationPort");
        let range_path = path.field("range");
        let in_range = port.range.as_ref().and_then(|range| not_known(&range.other, &range_path));
        let port = match not_known(&port.other, &path).or(in_range) {
            Some(reason) => return Some(Err(reason)),
            None => convert_port(port, &path, errors)?,
        };
        return Some(Ok(ProtocolMatch { protocol: Some(protocol), ports: vec![port] }));
    }
    match &entry.destination_named_port {
        Some(name) if !name.is_empty() => {
            Some(Ok(ProtocolMatch { protocol: None, ports: vec![Port::Named(name.as_str().into())] }))
        }
        Some(_) => Some(Err(format!("{path} is not understood: its name is empty"))),
        None => {
            let reason = not_known(&entry.other, path);
            if reason.is_none() {
                errors.add(path, "must have a field: tcp, udp, sctp or destinationNamedPort");
            }
            reason.map(Err)
        }
    }
}

fn convert_port(port: &DestinationPort, path: &Path<'_>, errors: &mut Errors) -> Option<Port> {
    let mut number = |value: i64, path: &Path<'_>| {
        let valid = u16::try_from(value).ok().filter(|port| *port > 0);
        if valid.is_none() {
            errors.add(path, format!("{value} is not a port (1–65535)"));
        }
        valid
    };
    match (port.number, &port.range) {
        (Some(value), None) => number(value, &path.field("number")).map(|port| Port::Range(port, port)),
        (None, Some(range)) => {
            let path = path.field("range");
            let (first, last) = (number(range.start, &path.field("start")), number(range.end, &path.field("end")));
            let (first, last) = (first?, last?);
            if first >= last {
                errors.add(&path, "start must be less than end");
                return None;
            }
            Some(Port::Range(first, last))
        }
        _ => {
            errors.add(path, "must have one of number and range");
            None
        }
    }
}
