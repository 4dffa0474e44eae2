//! `networking.k8s.io/v1` NetworkPolicy: validation as the API server does it, and the conversion.
//!
//! A policy is a list of Allow rules in the tier `default`, whose default action denies: so a selected pod is isolated
//! in the policy's directions. Each rule becomes one model rule for every pair of a peer and a protocol.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::model::{
    Action, ClusterName, ClusterScope, EntityMatch, Order, Phase, Policy, PolicyId, PolicyKind, Port, Protocol, Rule,
    Selection, TierId,
};
use hanse_policy::selector::Selector;
use hanse_policy::selector::build::{self, Namespaces};
use ipnet::IpNet;
use serde::Deserialize;

use crate::field::{Errors, NOT_KNOWN, Path};
use crate::kubernetes::{Map, Metadata, null_as_default, without_zeros};
use crate::metadata::check_metadata;

/// Makes the peers of a local policy those of the whole ClusterSet; the only value is `ClusterSet`.
pub const PEERS_ANNOTATION: &str = "hanse.dev/peers";
/// How many blocks become one rule of the model: as many nets as a rule of Calico's may list.
const MAX_BLOCKS_OF_A_RULE: usize = crate::rule::MAX_NETS;
/// Where NetworkPolicy stands in its tier.
pub const ORDER: f64 = 1_000.0;

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkPolicy {
    #[serde(rename = "apiVersion")]
    pub _api_version: serde::de::IgnoredAny,
    #[serde(rename = "kind")]
    pub _kind: serde::de::IgnoredAny,
    #[serde(default)]
    pub metadata: Metadata,
    #[serde(default, deserialize_with = "null_as_default")]
    pub spec: Spec,
    /// Once existed; ignored.
    #[serde(default, rename = "status")]
    pub _status: serde::de::IgnoredAny,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    #[serde(default, deserialize_with = "null_as_default")]
    pub pod_selector: LabelSelector,
    #[serde(default, deserialize_with = "null_as_default")]
    pub ingress: Vec<IngressRule>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub egress: Vec<EgressRule>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub policy_types: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IngressRule {
    #[serde(default, deserialize_with = "null_as_default")]
    pub from: Vec<Peer>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub ports: Vec<PortEntry>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressRule {
    #[serde(default, deserialize_with = "null_as_default")]
    pub to: Vec<Peer>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub ports: Vec<PortEntry>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Peer {
    // Boxed, since most peers of a very large policy are blocks.
    pub pod_selector: Option<Box<LabelSelector>>,
    pub namespace_selector: Option<Box<LabelSelector>>,
    pub ip_block: Option<IpBlock>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IpBlock {
    #[serde(default)]
    pub cidr: String,
    #[serde(default, deserialize_with = "null_as_default")]
    pub except: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortEntry {
    pub protocol: Option<String>,
    pub port: Option<IntOrString>,
    pub end_port: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "a number or a text is wanted")]
pub enum IntOrString {
    Int(i64),
    String(String),
}

/// `other` is what this version does not know; it is complained of in the conversion, as all that is malformed.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LabelSelector {
    #[serde(default, deserialize_with = "null_as_default")]
    pub match_labels: Map,
    #[serde(default, deserialize_with = "null_as_default")]
    pub match_expressions: Vec<Requirement>,
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Requirement {
    pub key: Arc<str>,
    pub operator: String,
    #[serde(default, deserialize_with = "null_as_default")]
    pub values: Vec<Arc<str>>,
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

impl LabelSelector {
    /// As people write it, in one line.
    pub fn written(&self) -> String {
        let quoted = |text: &Arc<str>| if text.is_empty() { "''".to_owned() } else { text.to_string() };
        let listed = |texts: Vec<String>| texts.join(", ");
        let mut fields = Vec::new();
        if !self.match_labels.is_empty() {
            let labels = self.match_labels.iter().map(|(key, value)| format!("{key}: {}", quoted(value)));
            fields.push(format!("matchLabels: {{{}}}", listed(labels.collect())));
        }
        if !self.match_expressions.is_empty() {
            let expressions = self.match_expressions.iter().map(|Requirement { key, operator, values, .. }| {
                let values = listed(values.iter().map(quoted).collect());
                let values = if values.is_empty() { values } else { format!(", values: [{values}]") };
                format!("{{key: {key}, operator: {operator}{values}}}")
            });
            fields.push(format!("matchExpressions: [{}]", listed(expressions.collect())));
        }
        format!("{{{}}}", listed(fields))
    }
}

/// Fields that select pods, without those that are not given: `{podSelector: {}}`.
pub fn written_fields<const N: usize>(fields: [(&str, Option<&LabelSelector>); N]) -> String {
    let fields = fields.into_iter().filter_map(|(name, it)| Some(format!("{name}: {}", it?.written())));
    format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
}

/// A peer with its place in its rule: `from[1] {podSelector: {}}`.
pub fn written_peer(path: &Path<'_>, fields: &str) -> String {
    let path = path.to_string();
    format!("{} {fields}", path.rsplit('.').next().unwrap_or_default())
}

impl NetworkPolicy {
    /// As `cluster`'s policy. Every error names its field; none means that an API server would store the object.
    pub fn convert(&self, cluster: &ClusterName, errors: &mut Errors) -> Policy {
        let namespace = self.metadata.namespace();
        check_metadata(&self.metadata, errors);
        let scope = peers_scope(&self.metadata, errors);
        let id = PolicyId {
            cluster: Some(Arc::clone(cluster)),
            kind: PolicyKind::KubernetesNetworkPolicy,
            namespace: Some(namespace),
            name: self.metadata.name.as_str().into(),
        };
        self.spec.convert(id, scope, errors)
    }
}

impl Spec {
    /// Also what a StagedKubernetesNetworkPolicy holds.
    pub fn convert(&self, id: PolicyId, scope: ClusterScope, errors: &mut Errors) -> Policy {
        let spec = Path::Root("spec");
        let namespace = id.namespace.clone().unwrap_or_default();
        let subject = self.pod_selector.convert(&spec.field("podSelector"), errors);
        let mut types = (self.policy_types.is_empty(), self.policy_types.is_empty() && !self.egress.is_empty());
        let types_path = spec.field("policyTypes");
        if self.policy_types.len() > 2 {
            errors.add(&types_path, "may not name more than two policyTypes");
        }
        for (index, name) in self.policy_types.iter().enumerate() {
            match name.as_str() {
                "Ingress" => types.0 = true,
                "Egress" => types.1 = true,
                other => errors.add(&types_path.index(index), format!("\"{other}\" is neither Ingress nor Egress")),
            }
        }
        let walk = Walk { namespace: &namespace, scope: &scope };
        let (mut ingress, mut egress) = (Vec::new(), Vec::new());
        let path = spec.field("ingress");
        for (index, rule) in self.ingress.iter().enumerate() {
            let path = path.index(index);
            let peers = walk.peers(&rule.from, &path.field("from"), errors);
            let ports = convert_ports(&rule.ports, &path.field("ports"), errors);
            combine(index, peers, &ports, true, &mut ingress);
        }
        let path = spec.field("egress");
        for (index, rule) in self.egress.iter().enumerate() {
            let path = path.index(index);
            let peers = walk.peers(&rule.to, &path.field("to"), errors);
            let ports = convert_ports(&rule.ports, &path.field("ports"), errors);
            combine(index, peers, &ports, false, &mut egress);
        }
        let own = build::kubernetes_pods(Namespaces::Named(&namespace), Some(&subject));
        Policy {
            id,
            tier: TierId { phase: Phase::Local, name: "default".into() },
            order: Order(Some(ORDER)),
            enforcers: ClusterScope::Local,
            selector: Selector::from(own).with_written(format!("podSelector: {}", self.pod_selector.written())),
            ingress: types.0.then_some(ingress),
            egress: types.1.then_some(egress),
            staged: None,
            host_only: false,
        }
    }
}

/// The scope of a local policy's peers: its own cluster's, unless it is annotated.
pub fn peers_scope(metadata: &Metadata, errors: &mut Errors) -> ClusterScope {
    match metadata.annotations.get(PEERS_ANNOTATION).map(|value| &**value) {
        None => ClusterScope::Local,
        Some("ClusterSet") => ClusterScope::All,
        Some(other) => {
            let path = Path::Root("metadata.annotations");
            errors.add(&path, format!("{PEERS_ANNOTATION}: \"{other}\" is not known; the only value is ClusterSet"));
            ClusterScope::Local
        }
    }
}

struct Walk<'a> {
    namespace: &'a str,
    scope: &'a ClusterScope,
}

impl Walk<'_> {
    /// Every peer as a match of its end; one that matches everything where none is written.
    fn peers(&self, peers: &[Peer], path: &Path<'_>, errors: &mut Errors) -> Vec<EntityMatch> {
        if peers.is_empty() {
            return vec![EntityMatch::default()];
        }
        let mut ends: Vec<EntityMatch> = Vec::new();
        // Blocks without exceptions are alternatives, as the nets of one end are. A rule with nets speaks of their family only.
        let mut blocks: [Option<usize>; 2] = [None; 2];
        for (index, peer) in peers.iter().enumerate() {
            let Some(end) = self.peer(peer, &path.index(index), errors) else { continue };
            let [net] = end.nets[..] else {
                ends.push(end);
                continue;
            };
            if !end.not_nets.is_empty() {
                ends.push(end);
                continue;
            }
            let open = &mut blocks[usize::from(matches!(net, IpNet::V6(_)))];
            match open.map(|at| &mut ends[at].nets).filter(|nets| nets.len() < MAX_BLOCKS_OF_A_RULE) {
                Some(nets) => nets.push(net),
                None => {
                    *open = Some(ends.len());
                    ends.push(end);
                }
            }
        }
        ends
    }

    fn peer(&self, peer: &Peer, path: &Path<'_>, errors: &mut Errors) -> Option<EntityMatch> {
        let selectors = peer.pod_selector.is_some() || peer.namespace_selector.is_some();
        match (&peer.ip_block, selectors) {
            (Some(_), true) => {
                errors.add(path, "may not have both ipBlock and another peer");
                None
            }
            (None, false) => {
                errors.add(path, "must have a peer: ipBlock, podSelector or namespaceSelector");
                None
            }
            (Some(block), false) => block.convert(&path.field("ipBlock"), errors),
            (None, true) => {
                let mut convert = |selector: &Option<Box<LabelSelector>>, name: &'static str| {
                    selector.as_ref().map(|selector| selector.convert(&path.field(name), errors))
                };
                let pods = convert(&peer.pod_selector, "podSelector");
                let namespaces = convert(&peer.namespace_selector, "namespaceSelector");
                let namespaces = match &namespaces {
                    Some(selector) => Namespaces::Selected(selector),
                    None => Namespaces::Named(self.namespace),
                };
                let fields = written_fields([
                    ("namespaceSelector", peer.namespace_selector.as_deref()),
                    ("podSelector", peer.pod_selector.as_deref()),
                ]);
                let selector = Selector::from(build::kubernetes_pods(namespaces, pods.as_ref()))
                    .with_written(written_peer(path, &fields));
                let selection = Some(Selection { clusters: self.scope.clone(), selector });
                Some(EntityMatch { selection, ..EntityMatch::default() })
            }
        }
    }
}

impl IpBlock {
    fn convert(&self, path: &Path<'_>, errors: &mut Errors) -> Option<EntityMatch> {
        let cidr_path = path.field("cidr");
        if self.cidr.is_empty() {
            errors.add(&cidr_path, "is missing");
            return None;
        }
        let cidr = errors.note(&cidr_path, parse_block(&self.cidr))?;
        let except_path = path.field("except");
        let mut not_nets = Vec::new();
        for (index, text) in self.except.iter().enumerate() {
            let path = except_path.index(index);
            let Some(net) = errors.note(&path, parse_block(text)) else { continue };
            if !cidr.contains(&net) || cidr == net {
                errors.add(&path, format!("must lie within {cidr} and be smaller"));
            }
            not_nets.push(net);
        }
        Some(EntityMatch { nets: vec![cidr], not_nets, ..EntityMatch::default() })
    }
}

/// A CIDR; host bits are masked, and an IPv4 net mapped into IPv6 is the IPv4 net.
pub fn parse_net(text: &str) -> Result<IpNet, String> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let is_plain = prefix == "0" || prefix.starts_with(|first: char| ('1'..='9').contains(&first));
        let prefix: u8 = is_plain.then(|| prefix.parse().ok())??;
        let net = IpNet::new(address, prefix).ok()?.trunc();
        match (address.to_canonical(), prefix.checked_sub(96)) {
            (IpAddr::V4(mapped), Some(prefix)) if address.is_ipv6() => {
                Some(IpNet::new(mapped.into(), prefix).ok()?.trunc())
            }
            _ => Some(net),
        }
    };
    parse().ok_or_else(|| format!("\"{text}\" is not a CIDR, such as 10.9.8.0/24 or 2001:db8::/64"))
}

/// A CIDR as API servers take it in an `ipBlock` and of a node: zeros may stand before the numbers of an IPv4 address, and of the prefix.
pub fn parse_block(text: &str) -> Result<IpNet, String> {
    let Some((address, prefix)) = text.split_once('/') else { return parse_net(text) };
    let digits = prefix.trim_start_matches('0');
    let prefix = if digits.is_empty() && !prefix.is_empty() { "0" } else { digits };
    parse_net(&format!("{}/{prefix}", without_zeros(address))).map_err(|_| parse_net(text).err().unwrap_or_default())
}

/// One protocol with its ports: all of them where the list is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ProtocolPorts {
    protocol: Protocol,
    ports: Vec<Port>,
}

/// `None`: every protocol and port.
fn convert_ports(entries: &[PortEntry], path: &Path<'_>, errors: &mut Errors) -> Option<Vec<ProtocolPorts>> {
    if entries.is_empty() {
        return None;
    }
    // Of each protocol: whether all of its ports are meant, and which.
    let mut by_protocol: BTreeMap<Protocol, (bool, Vec<Port>)> = BTreeMap::new();
    for (index, entry) in entries.iter().enumerate() {
        let path = path.index(index);
        let protocol = match entry.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            Some(other) => {
                errors.add(&path.field("protocol"), format!("\"{other}\" is not supported: TCP, UDP or SCTP"));
                continue;
            }
        };
        let (all, ports) = by_protocol.entry(protocol).or_default();
        match convert_port(entry, &path, errors) {
            Some(port) => ports.push(port),
            None => *all |= entry.port.is_none(),
        }
    }
    let groups = by_protocol
        .into_iter()
        .map(|(protocol, (all, ports))| ProtocolPorts { protocol, ports: if all { Vec::new() } else { ports } });
    Some(groups.collect())
}

fn convert_port(entry: &PortEntry, path: &Path<'_>, errors: &mut Errors) -> Option<Port> {
    let valid = |number: i64| u16::try_from(number).ok().filter(|number| *number > 0);
    let (port_path, end_path) = (path.field("port"), path.field("endPort"));
    match (&entry.port, entry.end_port) {
        (None, None) => None,
        (None, Some(_)) => {
            errors.add(&end_path, "is not allowed without port");
            None
        }
        (Some(IntOrString::String(name)), end) => {
            if end.is_some() {
                errors.add(&end_path, "is not allowed beside a named port");
            }
            if let Some(why) = port_name_error(name) {
                errors.add(&port_path, format!("\"{name}\" is not a port name: {why}"));
                return None;
            }
            Some(Port::Named(name.as_str().into()))
        }
        (Some(IntOrString::Int(first)), end) => {
            let Some(first) = valid(*first) else {
                errors.add(&port_path, format!("{first} is not a port (1–65535)"));
                return None;
            };
            let Some(end) = end else { return Some(Port::Range(first, first)) };
            match valid(end) {
                Some(last) if last >= first => Some(Port::Range(first, last)),
                Some(_) => {
                    errors.add(&end_path, "must be greater than or equal to port");
                    None
                }
                None => {
                    errors.add(&end_path, format!("{end} is not a port (1–65535)"));
                    None
                }
            }
        }
    }
}

/// What makes `name` no port name (RFC 6335 as Kubernetes applies it).
pub fn port_name_error(name: &str) -> Option<&'static str> {
    if name.is_empty() || name.len() > 15 {
        return Some("it must have 1 to 15 characters");
    }
    if !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-') {
        return Some("only a-z, 0-9 and - are allowed in it");
    }
    if !name.bytes().any(|byte| byte.is_ascii_lowercase()) {
        return Some("it must contain at least one letter");
    }
    if name.contains("--") || name.starts_with('-') || name.ends_with('-') {
        return Some("hyphens must be single, and not at the ends");
    }
    None
}

fn combine(
    index: usize,
    peers: Vec<EntityMatch>,
    ports: &Option<Vec<ProtocolPorts>>,
    peer_is_source: bool,
    rules: &mut Vec<Rule>,
) {
    let everything = [None];
    let groups: Vec<Option<&ProtocolPorts>> = match ports {
        None => everything.to_vec(),
        Some(groups) => groups.iter().map(Some).collect(),
    };
    for peer in &peers {
        for group in &groups {
            let (mut source, mut destination) = (EntityMatch::default(), EntityMatch::default());
            *(if peer_is_source { &mut source } else { &mut destination }) = peer.clone();
            if let Some(group) = group {
                destination.ports = group.ports.clone();
            }
            rules.push(Rule {
                action: Action::Allow,
                index: u32::try_from(index).unwrap_or(u32::MAX),
                ip_version: None,
                protocol: group.map(|group| group.protocol),
                not_protocol: None,
                icmp: None,
                not_icmp: None,
                source,
                destination,
                http: None,
                not_understood: None,
            });
        }
    }
}

impl LabelSelector {
    /// With the API machinery's validation.
    pub fn convert(&self, path: &Path<'_>, errors: &mut Errors) -> build::LabelSelector {
        for name in self.other.keys() {
            errors.add(&path.field(name), NOT_KNOWN);
        }
        let labels_path = path.field("matchLabels");
        for (key, value) in &self.match_labels {
            if let Some(why) = label_key_error(key) {
                errors.add(&labels_path, format!("\"{key}\": {why}"));
            }
            if let Some(why) = label_value_error(value) {
                errors.add(&labels_path, format!("\"{value}\": {why}"));
            }
        }
        let expressions_path = path.field("matchExpressions");
        let mut match_expressions = Vec::new();
        for (index, requirement) in self.match_expressions.iter().enumerate() {
            let path = expressions_path.index(index);
            for name in requirement.other.keys() {
                errors.add(&path.field(name), NOT_KNOWN);
            }
            if let Some(why) = label_key_error(&requirement.key) {
                errors.add(&path.field("key"), format!("\"{}\": {why}", requirement.key));
            }
            let (values_path, has_values) = (path.field("values"), !requirement.values.is_empty());
            let operator = match requirement.operator.as_str() {
                "In" => build::Operator::In,
                "NotIn" => build::Operator::NotIn,
                "Exists" => build::Operator::Exists,
                "DoesNotExist" => build::Operator::DoesNotExist,
                other => {
                    let message = format!("\"{other}\" is none of In, NotIn, Exists, DoesNotExist");
                    errors.add(&path.field("operator"), message);
                    continue;
                }
            };
            match operator {
                build::Operator::In | build::Operator::NotIn if !has_values => {
                    errors.add(&values_path, "must have a value for In and NotIn");
                }
                build::Operator::Exists | build::Operator::DoesNotExist if has_values => {
                    errors.add(&values_path, "may not have values for Exists and DoesNotExist");
                }
                _ => {}
            }
            for (index, value) in requirement.values.iter().enumerate() {
                if let Some(why) = label_value_error(value) {
                    errors.add(&values_path.index(index), format!("\"{value}\": {why}"));
                }
            }
            let (key, values) = (requirement.key.clone(), requirement.values.clone());
            match_expressions.push(build::Requirement { key, operator, values });
        }
        let match_labels = self.match_labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        build::LabelSelector { match_labels, match_expressions }
    }
}

fn is_name(text: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    text.len() <= 63
        && text.bytes().all(inside)
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.ends_with(|last: char| last.is_ascii_alphanumeric())
}

/// What makes `key` no label key: an optional DNS subdomain with `/`, and a name.
pub fn label_key_error(key: &str) -> Option<&'static str> {
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if !is_name(name) {
        return Some("a label's name has 1 to 63 of A-Z a-z 0-9 - _ . and starts and ends with a letter or digit");
    }
    if prefix.is_some_and(|prefix| !is_subdomain(prefix)) {
        return Some("the part before / must be a lowercase DNS name of at most 253 characters");
    }
    None
}

/// One part of a DNS name, lower case: at most 63 of a-z 0-9 -.
pub fn is_dns_label(text: &str) -> bool {
    text.len() <= 63 && !text.contains('.') && is_subdomain(text)
}

/// RFC 1123: what most objects are named by.
pub fn is_subdomain(text: &str) -> bool {
    let label = |label: &str| {
        let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !label.is_empty() && label.bytes().all(inside) && !label.starts_with('-') && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

pub fn label_value_error(value: &str) -> Option<&'static str> {
    if value.is_empty() || is_name(value) {
        return None;
    }
    Some("a label's value has at most 63 of A-Z a-z 0-9 - _ . and starts and ends with a letter or digit")
}
