//! `networking.k8s.io/v1` NetworkPolicy: validation as the API server does it, and the conversion.
//!
//! A policy is a list of Allow rules in the tier `default`, whose default action denies: so a selected pod is isolated
//! in the policy's directions. Each rule becomes one model rule for every pair of a peer and a protocol.

use std::collections::BTreeMap;

use hanse_policy::model::{
    Action, ClusterScope, EntityMatch, Order, Phase, Policy, PolicyId, PolicyKind, Port, Protocol, Rule, Selection,
    TierId,
};
use hanse_policy::selector::Selector;
use hanse_policy::selector::build::{self, Namespaces};
use ipnet::IpNet;
use serde::Deserialize;

use crate::address::parse_block;
use crate::decode::{IntOrString, null_as_default};
use crate::field::{Errors, Path};
use crate::label_selector::{LabelSelector, written_fields, written_peer};
use crate::metadata::{Metadata, check_metadata};
use crate::names::port_name_error;
use crate::policy::LocalPolicy;
use crate::policy_fields::peers_scope;

/// How many blocks become one rule of the model: as many nets as a rule of Calico's may list.
const MAX_BLOCKS_OF_A_RULE: usize = crate::rule::MAX_NETS;
/// Rules that one policy becomes, each with one peer and one protocol; at about 600 bytes 6 MB.
pub const MAX_RULES: usize = 10_000;
/// Nets and ports of these rules, each in every rule that has it; at some 24 bytes 2.4 MB. In an object of 1 MB, 25,000 peers with
/// 50,000 ports would be 1,250,000,000.
pub const MAX_ENTRIES: usize = 100_000;
/// The order of every NetworkPolicy in its tier.
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

impl NetworkPolicy {
    /// Every error names its field; none means that an API server would store the object.
    pub fn convert(&self, errors: &mut Errors) -> LocalPolicy {
        let namespace = self.metadata.namespace();
        check_metadata(&self.metadata, errors);
        let scope = peers_scope(&self.metadata, errors);
        let id = PolicyId {
            cluster: None,
            kind: PolicyKind::KubernetesNetworkPolicy,
            namespace: Some(namespace),
            name: self.metadata.name.as_str().into(),
        };
        LocalPolicy::new(self.spec.convert(id, scope, errors)).with_types(self.spec.has_rules(), "policyTypes")
    }
}

impl Spec {
    /// Whether there are ingress rules, and egress rules.
    pub fn has_rules(&self) -> [bool; 2] {
        [!self.ingress.is_empty(), !self.egress.is_empty()]
    }

    /// Also the spec of a StagedKubernetesNetworkPolicy.
    pub fn convert(&self, id: PolicyId, scope: ClusterScope, errors: &mut Errors) -> Policy {
        let spec = Path::Root("spec");
        let namespace = id.namespace.clone().unwrap_or_default();
        let subject = self.pod_selector.convert(&spec.field("podSelector"), errors);
        let mut types = (self.policy_types.is_empty(), self.policy_types.is_empty() && !self.egress.is_empty());
        let types_path = spec.field("policyTypes");
        if self.policy_types.len() > 2 {
            errors.add(&types_path, "must have at most two entries");
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
        let mut room = Room { rules: MAX_RULES, entries: MAX_ENTRIES };
        let path = spec.field("ingress");
        for (index, rule) in self.ingress.iter().enumerate() {
            let path = path.index(index);
            let peers = walk.peers(&rule.from, &path.field("from"), errors);
            let ports = convert_ports(&rule.ports, &path.field("ports"), errors);
            if !room.take(&peers, &ports) {
                ingress = Vec::new();
                errors.add(&spec.field("ingress"), TOO_LARGE);
                break;
            }
            combine(index, peers, &ports, true, &mut ingress);
        }
        let path = spec.field("egress");
        for (index, rule) in self.egress.iter().enumerate() {
            let path = path.index(index);
            let peers = walk.peers(&rule.to, &path.field("to"), errors);
            let ports = convert_ports(&rule.ports, &path.field("ports"), errors);
            if !room.take(&peers, &ports) {
                egress = Vec::new();
                errors.add(&spec.field("egress"), TOO_LARGE);
                break;
            }
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

const TOO_LARGE: &str =
    "is too large: a policy may become 10000 rules, one for each peer and protocol, with 100000 nets and ports in all";

/// What rules may still be added.
struct Room {
    rules: usize,
    entries: usize,
}

impl Room {
    /// Reserves the space of the rules that [`combine`] makes. Returns false if it does not suffice.
    fn take(&mut self, peers: &[EntityMatch], ports: &Option<Vec<ProtocolPorts>>) -> bool {
        let (groups, ports) = match ports {
            None => (1, 0),
            Some(groups) => (groups.len(), groups.iter().map(|group| group.ports.len()).sum()),
        };
        let nets: usize = peers.iter().map(|peer| peer.nets.len() + peer.not_nets.len()).sum();
        let (rules, entries) = (peers.len() * groups, nets * groups + peers.len() * ports);
        let fits = rules <= self.rules && entries <= self.entries;
        if fits {
            (self.rules, self.entries) = (self.rules - rules, self.entries - entries);
        }
        fits
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
        // Blocks without exceptions are alternatives, as the nets of one end are. A rule with nets matches their family only.
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
                errors.add(path, "must not have both ipBlock and a selector");
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
