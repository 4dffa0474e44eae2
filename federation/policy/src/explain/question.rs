//! The format of questions, and the packets that they describe.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::evaluate::{End, Query};
use crate::inventory::{Backend, Endpoint, EndpointId, EndpointKind, Front, FrontPort, Inventory, Service, Stopped};
use crate::model::ClusterName;
use crate::placement::Spot;
use serde::{Deserialize, Serialize};

/// One line of `--queries`. An unknown key is an error, since ignoring it would answer another question.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Question {
    pub from: QueryEnd,
    pub to: QueryEnd,
    /// TCP where it is left out.
    #[serde(default)]
    pub protocol: Option<ProtocolName>,
    pub port: Option<u16>,
    /// 40000 where it is left out.
    pub source_port: Option<u16>,
    /// That of an echo request where it is left out.
    pub icmp: Option<IcmpHeader>,
    pub ip_version: Option<u8>,
}

/// A pod by name, an address, or, as a destination, a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "it is {\"ip\"}, {\"cluster\", \"namespace\", \"pod\"}, or {\"cluster\", \"namespace\", \"service\"}"
)]
pub enum QueryEnd {
    Address {
        ip: String,
    },
    Service {
        /// May be left out where only one cluster is read.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cluster: Option<String>,
        /// May be left out where `service` is `NAMESPACE/NAME`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        namespace: Option<String>,
        service: String,
    },
    Pod {
        /// May be left out where only one cluster is read.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cluster: Option<String>,
        namespace: String,
        pod: String,
    },
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IcmpHeader {
    #[serde(rename = "type")]
    pub kind: u8,
    /// 0 where it is left out.
    #[serde(default)]
    pub code: u8,
}

/// A name, or a number as a number or a string.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum ProtocolName {
    Number(u8),
    Name(String),
}

impl ProtocolName {
    pub fn number(&self) -> Result<u8, QuestionError> {
        let name = match self {
            Self::Number(number) => return Ok(*number),
            Self::Name(name) => name,
        };
        Ok(match name.to_ascii_lowercase().as_str() {
            "tcp" => 6,
            "udp" => 17,
            "icmp" => 1,
            "icmpv6" => 58,
            "sctp" => 132,
            "udplite" => 136,
            number => number.parse().map_err(|_| QuestionError::Protocol(name.clone()))?,
        })
    }
}

/// Whether packets of a protocol have ports.
pub fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 6 | 17 | 33 | 132 | 136)
}

/// The destination port of a packet; a question about TCP, UDP or SCTP must name it, since their policies do.
fn destination_port(given: Option<u16>, protocol: u8) -> Result<u16, QuestionError> {
    match given.filter(|_| has_ports(protocol)) {
        None if matches!(protocol, 6 | 17 | 132) => Err(QuestionError::Port),
        port => Ok(port.unwrap_or(0)),
    }
}

/// Type and code of an echo request, of ICMP and ICMPv6.
fn echo_request(protocol: u8) -> Option<(u8, u8)> {
    match protocol {
        1 => Some((8, 0)),
        58 => Some((128, 0)),
        _ => None,
    }
}

/// A protocol's name, which [`ProtocolName`] reads; a number where it has none.
pub fn protocol_name(number: u8) -> String {
    match number {
        1 => "ICMP".to_owned(),
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        58 => "ICMPv6".to_owned(),
        132 => "SCTP".to_owned(),
        136 => "UDPLite".to_owned(),
        number => number.to_string(),
    }
}

impl std::fmt::Display for QueryEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address { ip } => f.write_str(ip),
            Self::Service { cluster, namespace, service } => {
                let parts = [cluster.as_deref(), namespace.as_deref(), Some(service.as_str())];
                f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join("/"))
            }
            Self::Pod { cluster: Some(cluster), namespace, pod } => write!(f, "{cluster}/{namespace}/{pod}"),
            Self::Pod { cluster: None, namespace, pod } => write!(f, "{namespace}/{pod}"),
        }
    }
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuestionError {
    #[error("no cluster {0:?} was read")]
    Cluster(String),
    #[error("cluster is missing, and more than one was read")]
    WhichCluster,
    #[error("no pod {1}/{2} in cluster {0}{3}")]
    Pod(String, String, String, String),
    #[error("{0} is a host-network pod, and the address of its node is not known: query it by {{\"ip\"}}")]
    HostNetwork(String),
    #[error("{0} is a Service, which can be queried only with --cluster and only as the destination: query its pods")]
    Service(String),
    #[error("no Service {1}/{2} in cluster {0}")]
    NoService(String, String, String),
    #[error("a Service is named by its namespace: {{\"namespace\", \"service\"}}, or \"service\": \"NAMESPACE/NAME\"")]
    ServiceName,
    #[error("{0} is a Service of type ExternalName: its name is {1}, whose addresses can be queried by {{\"ip\"}}")]
    ExternalName(String, String),
    #[error("{0} is a Service, which forwards TCP, UDP and SCTP only: query its pods")]
    ServiceProtocol(String),
    #[error("{0} is a Service without port {1}; it has {2}")]
    ServicePort(String, String, String),
    #[error("{0} is a Service without backends: {1}")]
    NoBackends(String, &'static str),
    #[error("{0} has no address")]
    NoAddress(String),
    #[error("the nets of --pod-net have no free address of IPv{0}")]
    NoFreeAddress(u8),
    #[error("{0} has no address of IPv{1}")]
    Family(String, u8),
    #[error("{0} and {1} share no address family")]
    NoFamily(String, String),
    #[error("{0:?} is not an address")]
    Address(String),
    #[error("protocol {0:?} is neither a name nor a number up to 255")]
    Protocol(String),
    #[error("port is missing")]
    Port,
    #[error("ipVersion is 4 or 6")]
    IpVersion,
}

/// The possible addresses of an end, the primary first, and their owners.
pub(crate) struct Candidate {
    addresses: Vec<IpAddr>,
    /// Whether it has an unknown IPv4 address, and an unknown IPv6 address.
    planned: [bool; 2],
    owners: Vec<(ClusterName, EndpointId)>,
    /// The cluster in the query, also if no pod of it has the address.
    named: Option<ClusterName>,
}

impl Candidate {
    /// An address, and its owners by cluster and name.
    pub fn address(
        text: &str,
        owners: impl FnOnce(IpAddr) -> Vec<(ClusterName, EndpointId)>,
    ) -> Result<Self, QuestionError> {
        let address: IpAddr = text.parse().map_err(|_| QuestionError::Address(text.to_owned()))?;
        let address = address.to_canonical();
        Ok(Self { addresses: vec![address], planned: [false; 2], owners: owners(address), named: None })
    }

    /// A pod by name, with its addresses; `pod` is `None` if it does not own them (host network). Returns `None` without an address.
    pub fn running(cluster: ClusterName, pod: Option<EndpointId>, addresses: Vec<IpAddr>) -> Option<Self> {
        let owners = pod.into_iter().map(|pod| (cluster.clone(), pod)).collect();
        (!addresses.is_empty()).then_some(Self { addresses, planned: [false; 2], owners, named: Some(cluster) })
    }

    fn is_of(&self, cluster: &ClusterName) -> bool {
        self.named.as_ref() == Some(cluster) || self.owners.iter().any(|(owner, _)| owner == cluster)
    }

    fn is_planned(&self) -> bool {
        self.planned != [false; 2]
    }

    fn has_version(&self, version: u8) -> bool {
        self.planned[usize::from(version == 6)] || self.addresses.iter().any(|address| version_of(address) == version)
    }
}

/// The packet of a question, as far as the addresses of its ends are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub source: Spot,
    pub destination: Spot,
    pub ip_version: u8,
    pub protocol: u8,
    pub source_port: u16,
    pub destination_port: u16,
    pub icmp: Option<(u8, u8)>,
}

impl Packet {
    /// With the ends of its question, which must have addresses.
    pub fn query_of(&self, question: &Question) -> Result<Query, QuestionError> {
        let end = |spot: &Spot, place: &QueryEnd| match spot.address {
            Some(address) => Ok(End { address, pod: spot.pod.clone() }),
            None => Err(QuestionError::NoAddress(place.to_string())),
        };
        Ok(self.query(end(&self.source, &question.from)?, end(&self.destination, &question.to)?))
    }

    /// With these ends.
    pub fn query(&self, source: End, destination: End) -> Query {
        Query {
            source,
            destination,
            protocol: self.protocol,
            source_port: self.source_port,
            destination_port: self.destination_port,
            icmp: self.icmp,
        }
    }
}

/// A service that a question is about: where its packets go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded {
    /// `cluster/namespace/name`.
    pub service: String,
    /// Its name resolves to the addresses of its pods, and ports are not translated.
    pub headless: bool,
    /// Each backend with the port on it.
    pub backends: Vec<(QueryEnd, u16)>,
}

type ServiceAt<'a> = (&'a ClusterName, &'a (Arc<str>, Arc<str>), &'a Service);

/// Pods and services by their names and addresses.
#[derive(Debug)]
pub struct Owners<'a> {
    by_name: HashMap<&'a str, (&'a ClusterName, HashMap<&'a EndpointId, &'a Endpoint>)>,
    by_address: HashMap<IpAddr, Vec<(&'a ClusterName, &'a EndpointId)>>,
    services: HashMap<IpAddr, ServiceAt<'a>>,
    inventory: &'a Inventory,
}

impl<'a> Owners<'a> {
    pub fn new(inventory: &'a Inventory) -> Self {
        let (mut by_name, mut by_address) = (HashMap::new(), HashMap::<_, Vec<_>>::new());
        let mut services = HashMap::new();
        for (cluster, it) in &inventory.clusters {
            by_name.insert(&**cluster, (cluster, it.endpoints.iter().collect()));
            for (id, endpoint) in it.endpoints.iter().filter(|(_, endpoint)| !endpoint.host_network) {
                for address in &endpoint.addresses {
                    by_address.entry(*address).or_default().push((cluster, id));
                }
            }
            for (key, service) in &it.services {
                for address in service.front.iter().flat_map(|front| &front.addresses) {
                    services.entry(*address).or_insert((cluster, key, service));
                }
            }
        }
        // After those within clusters.
        for (cluster, it) in &inventory.clusters {
            for (key, service) in &it.services {
                for address in service.front.iter().flat_map(|front| &front.external_addresses) {
                    services.entry(*address).or_insert((cluster, key, service));
                }
            }
        }
        Self { by_name, by_address, services, inventory }
    }

    /// The packet of a question.
    pub fn packet(&self, question: &Question) -> Result<Query, QuestionError> {
        self.packet_of_spots(question)?.query_of(question)
    }

    /// The same, where pods that do not run yet may be named.
    pub fn packet_of_spots(&self, question: &Question) -> Result<Packet, QuestionError> {
        packet_between(question, &self.candidate(&question.from)?, &self.candidate(&question.to)?)
    }

    /// Where the packets of a question go, if it is to a service, by name or by an address that no pod owns.
    ///
    /// # Errors
    /// When the service has no such port, or nothing behind it.
    pub fn forwarded(&self, question: &Question) -> Result<Option<Forwarded>, QuestionError> {
        let (cluster, key, service) = match &question.to {
            QueryEnd::Pod { .. } => return Ok(None),
            QueryEnd::Address { ip } => {
                let address = ip.parse::<IpAddr>().ok().map(|address| address.to_canonical());
                let service = address.filter(|address| !self.by_address.contains_key(address));
                match service.and_then(|address| self.services.get(&address)) {
                    Some(service) => *service,
                    None => return Ok(None),
                }
            }
            QueryEnd::Service { cluster, namespace, service } => {
                self.service(cluster.as_deref(), namespace.as_deref(), service)?
            }
        };
        let title = format!("{cluster}/{}/{}", key.0, key.1);
        let Some(front) = &service.front else { return Err(QuestionError::Service(title)) };
        if let Some(name) = &front.external_name {
            return Err(QuestionError::ExternalName(title, name.to_string()));
        }
        let protocol = question.protocol.as_ref().map_or(Ok(6), ProtocolName::number)?;
        let mut backends = match front.headless {
            true => of_headless(service, front, question.port),
            false => {
                if !matches!(protocol, 6 | 17 | 132) {
                    return Err(QuestionError::ServiceProtocol(title));
                }
                let port = question.port.ok_or(QuestionError::Port)?;
                let Some(found) = front.ports.iter().find(|it| (it.protocol, it.port) == (protocol, port)) else {
                    let wanted = format!("{port}/{}", protocol_name(protocol));
                    return Err(QuestionError::ServicePort(title, wanted, ports_of(front)));
                };
                found.backends.clone()
            }
        };
        for (backend, _) in &mut backends {
            // Of a pod with addresses of both families there is one backend.
            let owner = match backend {
                Backend::Address(address) => {
                    self.by_address.get(address).into_iter().flatten().find(|(of, _)| *of == cluster)
                }
                Backend::Pod(_) => None,
            };
            if let Some((_, id)) = owner {
                *backend = Backend::Pod((*id).clone());
            }
        }
        backends.sort_unstable();
        backends.dedup();
        if backends.is_empty() {
            let why = match front.selects {
                true => "its selector selects no pod and no workload with this port",
                false => "it has no selector, and no EndpointSlice of it was read",
            };
            return Err(QuestionError::NoBackends(title, why));
        }
        let place = |backend: Backend| match backend {
            Backend::Address(address) => QueryEnd::Address { ip: address.to_string() },
            Backend::Pod(id) => QueryEnd::Pod {
                cluster: Some(cluster.to_string()),
                namespace: id.namespace.as_deref().unwrap_or_default().to_owned(),
                pod: id.name.to_string(),
            },
        };
        let backends = backends.into_iter().map(|(backend, port)| (place(backend), port)).collect();
        Ok(Some(Forwarded { service: title, headless: front.headless, backends }))
    }

    fn service(
        &self,
        cluster: Option<&str>,
        namespace: Option<&str>,
        service: &str,
    ) -> Result<ServiceAt<'a>, QuestionError> {
        let (namespace, name) = match (namespace, service.split_once('/')) {
            (Some(namespace), None) => (namespace, service),
            (None, Some(parts)) => parts,
            _ => return Err(QuestionError::ServiceName),
        };
        let (cluster, _) = self.cluster(cluster)?;
        let services = self.inventory.clusters.get(*cluster).map(|it| &it.services);
        let key = (Arc::from(namespace), Arc::from(name));
        let found = services.and_then(|services| services.get_key_value(&key));
        let missing = || QuestionError::NoService(cluster.to_string(), namespace.to_owned(), name.to_owned());
        found.map(|(key, service)| (*cluster, key, service)).ok_or_else(missing)
    }

    /// Whether a place is a pod that does not run, or a workload; in words, with those of the labels in question that are
    /// not known before it runs.
    pub fn not_running(&self, place: &QueryEnd, keys: &BTreeSet<&str>) -> Option<String> {
        let QueryEnd::Pod { cluster, namespace, pod } = place else { return None };
        let (cluster, id, endpoint) = self.pod(cluster.as_deref(), namespace, pod).ok()?;
        let planned = endpoint.planned.as_ref()?;
        let stopped = planned.stopped.map(|stopped| match stopped {
            Stopped::NoReplicas => "replicas: 0".to_owned(),
            Stopped::Suspended => "suspended".to_owned(),
        });
        let unknown = endpoint.run_time_labels().filter(|(key, _)| keys.contains(&***key));
        let unknown = unknown.map(|(key, certain)| match certain {
            true => format!("value of label {key} unknown"),
            false => format!("label {key} unknown"),
        });
        let notes: Vec<String> = stopped.into_iter().chain(unknown).collect();
        let notes = if notes.is_empty() { String::new() } else { format!(" ({})", notes.join(", ")) };
        Some(format!("{cluster}/{namespace}/{}{notes}", id.name))
    }

    fn candidate(&self, place: &QueryEnd) -> Result<Candidate, QuestionError> {
        match place {
            QueryEnd::Address { ip } => Candidate::address(ip, |address| {
                let owners = self.by_address.get(&address).into_iter().flatten();
                owners.map(|(cluster, id)| ((*cluster).clone(), (*id).clone())).collect()
            }),
            QueryEnd::Service { .. } => Err(QuestionError::Service(place.to_string())),
            QueryEnd::Pod { cluster, namespace, pod } => {
                let (cluster, id, endpoint) = self.pod(cluster.as_deref(), namespace, pod)?;
                // A pod on the host's network has its node's addresses, which no pod owns.
                let named = Some(cluster.clone());
                let (addresses, owners) = match endpoint.host_network {
                    true => (endpoint.host_addresses.clone(), Vec::new()),
                    false => (endpoint.addresses.clone(), vec![(cluster, id)]),
                };
                let may_have = |v4| {
                    let planned = endpoint.planned.as_ref().filter(|_| !endpoint.host_network && addresses.is_empty());
                    planned.is_some_and(|planned| planned.has_family(v4))
                };
                let planned = [true, false].map(may_have);
                if addresses.is_empty() && planned == [false; 2] {
                    let error =
                        if endpoint.planned.is_some() { QuestionError::HostNetwork } else { QuestionError::NoAddress };
                    return Err(error(place.to_string()));
                }
                Ok(Candidate { addresses, planned, owners, named })
            }
        }
    }

    fn cluster(
        &self,
        cluster: Option<&str>,
    ) -> Result<&(&'a ClusterName, HashMap<&'a EndpointId, &'a Endpoint>), QuestionError> {
        let clusters = &self.by_name;
        match cluster {
            Some(name) => clusters.get(name).ok_or_else(|| QuestionError::Cluster(name.to_owned())),
            None => clusters.values().next().filter(|_| clusters.len() == 1).ok_or(QuestionError::WhichCluster),
        }
    }

    fn pod(
        &self,
        cluster: Option<&str>,
        namespace: &str,
        pod: &str,
    ) -> Result<(ClusterName, EndpointId, &'a Endpoint), QuestionError> {
        let (name, endpoints) = self.cluster(cluster)?;
        let id = EndpointId { kind: EndpointKind::Pod, namespace: Some(Arc::from(namespace)), name: Arc::from(pod) };
        let missing = || {
            // A workload's name is that of its kind and its own.
            let is_meant = |id: &&&EndpointId| {
                id.namespace.as_deref() == Some(namespace) && id.name.split('/').skip(1).any(|part| part == pod)
            };
            let mut meant: Vec<&str> = endpoints.keys().filter(is_meant).map(|id| &*id.name).collect();
            meant.sort_unstable();
            meant.truncate(3);
            let meant =
                if meant.is_empty() { String::new() } else { format!("; did you mean {}?", meant.join(" or ")) };
            QuestionError::Pod(name.to_string(), namespace.to_owned(), pod.to_owned(), meant)
        };
        let endpoint = endpoints.get(&id).ok_or_else(missing)?;
        Ok(((*name).clone(), id, endpoint))
    }

    /// An address, and who owns it; of several clusters' pods that of `prefer`.
    pub fn of(&self, address: IpAddr, prefer: &ClusterName) -> End {
        let owners = self.by_address.get(&address).map(Vec::as_slice).unwrap_or_default();
        let owner = owners.iter().find(|(cluster, _)| *cluster == prefer).or(owners.first());
        End { address, pod: owner.map(|(cluster, id)| ((*cluster).clone(), (*id).clone())) }
    }
}

/// The packet of a question whose ends may be at these places.
pub(crate) fn packet_between(question: &Question, from: &Candidate, to: &Candidate) -> Result<Packet, QuestionError> {
    let protocol = question.protocol.as_ref().map_or(Ok(6), ProtocolName::number)?;
    let version = version(question, from, to, protocol)?;
    let has_ports = has_ports(protocol);
    Ok(Packet {
        source: spot(&question.from, from, to, version)?,
        destination: spot(&question.to, to, from, version)?,
        ip_version: version,
        protocol,
        source_port: if has_ports { question.source_port.unwrap_or(40_000) } else { 0 },
        destination_port: destination_port(question.port, protocol)?,
        icmp: question.icmp.map(|icmp| (icmp.kind, icmp.code)).or_else(|| echo_request(protocol)),
    })
}

/// An address that pods of several clusters own belongs to the other end's cluster, else to the first cluster.
fn spot(place: &QueryEnd, this: &Candidate, other: &Candidate, version: u8) -> Result<Spot, QuestionError> {
    let family = || QuestionError::Family(place.to_string(), version);
    let address = match this.has_version(version) && this.is_planned() {
        true => None,
        false => Some(*this.addresses.iter().find(|it| version_of(it) == version).ok_or_else(family)?),
    };
    let shared = this.owners.iter().find(|(cluster, _)| other.is_of(cluster));
    Ok(Spot { address, pod: shared.or(this.owners.first()).cloned() })
}

fn version_of(address: &IpAddr) -> u8 {
    if address.is_ipv4() { 4 } else { 6 }
}

/// The version that the question names, else the only one that both ends have, else the destination's primary; of ends that have no address
/// yet IPv4, unless the protocol is ICMPv6.
fn version(question: &Question, from: &Candidate, to: &Candidate, protocol: u8) -> Result<u8, QuestionError> {
    match question.ip_version {
        Some(version @ (4 | 6)) => return Ok(version),
        Some(_) => return Err(QuestionError::IpVersion),
        None => {}
    }
    let usual = if protocol == 58 { [6, 4] } else { [4, 6] };
    let addresses = if to.is_planned() { &from.addresses } else { &to.addresses };
    let of_addresses = addresses.iter().map(version_of);
    let of_both = usual.into_iter().filter(|_| from.is_planned() && to.is_planned());
    let shared = of_addresses.chain(of_both).find(|version| from.has_version(*version) && to.has_version(*version));
    shared.ok_or_else(|| QuestionError::NoFamily(question.from.to_string(), question.to.to_string()))
}

/// The backends of a headless service, with the port of the question.
fn of_headless(service: &Service, front: &Front, port: Option<u16>) -> Vec<(Backend, u16)> {
    let port = port.unwrap_or_default();
    let of_ports = front.ports.iter().flat_map(|it| &it.backends).map(|(backend, _)| backend.clone());
    let planned = service.planned.keys().cloned().map(Backend::Pod);
    let mut all: Vec<_> = of_ports.chain(planned).map(|backend| (backend, port)).collect();
    if front.ports.is_empty() {
        all.extend(service.addresses.iter().map(|address| (Backend::Address(*address), port)));
    }
    all
}

fn ports_of(front: &Front) -> String {
    let port = |it: &FrontPort| {
        let name = it.name.as_ref().map_or(String::new(), |name| format!(" ({name})"));
        format!("{}/{}{name}", it.port, protocol_name(it.protocol))
    };
    match front.ports.is_empty() {
        true => "none".to_owned(),
        false => front.ports.iter().map(port).collect::<Vec<_>>().join(", "),
    }
}
