//! Questions as they are written, and the packets that they ask about.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::evaluate::{End, Query};
use crate::inventory::{Endpoint, EndpointId, EndpointKind, Inventory};
use crate::model::ClusterName;
use serde::{Deserialize, Serialize};

/// One line of `--queries`. A key that is not known is an error: what it asks for would be left out in silence.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Question {
    pub from: Place,
    pub to: Place,
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

/// A pod by name, or an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields, expecting = "it is {\"ip\"}, or {\"cluster\", \"namespace\", \"pod\"}")]
pub enum Place {
    Address {
        ip: String,
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

/// What a question asks about; policies of TCP, UDP and SCTP name ports, so that a question about these must.
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

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address { ip } => f.write_str(ip),
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
    #[error("no pod {1}/{2} in cluster {0}")]
    Pod(String, String, String),
    #[error("{0} owns no address")]
    NoAddress(String),
    #[error("{0} has no address of IPv{1}")]
    Family(String, u8),
    #[error("{0} and {1} share no address family")]
    NoFamily(String, String),
    #[error("{0:?} is no address")]
    Address(String),
    #[error("protocol {0:?} is neither a name nor a number up to 255")]
    Protocol(String),
    #[error("port is missing")]
    Port,
    #[error("ipVersion is 4 or 6")]
    IpVersion,
}

/// Where an end may be: the addresses that it may use, the primary first, and who owns them.
struct Candidate {
    addresses: Vec<IpAddr>,
    owners: Vec<(ClusterName, EndpointId)>,
    /// The cluster that was named, though nobody there owns the address.
    named: Option<ClusterName>,
}

impl Candidate {
    fn is_of(&self, cluster: &ClusterName) -> bool {
        self.named.as_ref() == Some(cluster) || self.owners.iter().any(|(owner, _)| owner == cluster)
    }
}

/// Pods by their addresses.
#[derive(Debug)]
pub struct Owners<'a> {
    by_name: HashMap<&'a str, (&'a ClusterName, HashMap<&'a EndpointId, &'a Endpoint>)>,
    by_address: HashMap<IpAddr, Vec<(&'a ClusterName, &'a EndpointId)>>,
}

impl<'a> Owners<'a> {
    pub fn new(inventory: &'a Inventory) -> Self {
        let (mut by_name, mut by_address) = (HashMap::new(), HashMap::<_, Vec<_>>::new());
        for (cluster, it) in &inventory.clusters {
            by_name.insert(&**cluster, (cluster, it.endpoints.iter().collect()));
            for (id, endpoint) in it.endpoints.iter().filter(|(_, endpoint)| !endpoint.host_network) {
                for address in &endpoint.addresses {
                    by_address.entry(*address).or_default().push((cluster, id));
                }
            }
        }
        Self { by_name, by_address }
    }

    /// The packet that a question asks about.
    pub fn packet(&self, question: &Question) -> Result<Query, QuestionError> {
        let (from, to) = (self.candidate(&question.from)?, self.candidate(&question.to)?);
        let version = version(question, &from, &to)?;
        let protocol = question.protocol.as_ref().map_or(Ok(6), ProtocolName::number)?;
        let has_ports = has_ports(protocol);
        let source = self.end(&question.from, &from, &to, version)?;
        let destination = self.end(&question.to, &to, &from, version)?;
        Ok(Query {
            source,
            destination,
            protocol,
            source_port: if has_ports { question.source_port.unwrap_or(40_000) } else { 0 },
            destination_port: destination_port(question.port, protocol)?,
            icmp: question.icmp.map(|icmp| (icmp.kind, icmp.code)).or_else(|| echo_request(protocol)),
        })
    }

    fn candidate(&self, place: &Place) -> Result<Candidate, QuestionError> {
        match place {
            Place::Address { ip } => {
                let address: IpAddr = ip.parse().map_err(|_| QuestionError::Address(ip.clone()))?;
                let address = address.to_canonical();
                let owners = self.by_address.get(&address).into_iter().flatten();
                let owners = owners.map(|(cluster, id)| ((*cluster).clone(), (*id).clone())).collect();
                Ok(Candidate { addresses: vec![address], owners, named: None })
            }
            Place::Pod { cluster, namespace, pod } => {
                let (cluster, id, endpoint) = self.pod(cluster.as_deref(), namespace, pod)?;
                // A pod on the host's network has its node's addresses, which nobody owns.
                let named = Some(cluster.clone());
                let (addresses, owners) = match endpoint.host_network {
                    true => (endpoint.host_addresses.clone(), Vec::new()),
                    false => (endpoint.addresses.clone(), vec![(cluster, id)]),
                };
                if addresses.is_empty() {
                    return Err(QuestionError::NoAddress(place.to_string()));
                }
                Ok(Candidate { addresses, owners, named })
            }
        }
    }

    fn pod(
        &self,
        cluster: Option<&str>,
        namespace: &str,
        pod: &str,
    ) -> Result<(ClusterName, EndpointId, &'a Endpoint), QuestionError> {
        let clusters = &self.by_name;
        let (name, endpoints) = match cluster {
            Some(name) => clusters.get(name).ok_or_else(|| QuestionError::Cluster(name.to_owned()))?,
            None => clusters.values().next().filter(|_| clusters.len() == 1).ok_or(QuestionError::WhichCluster)?,
        };
        let id = EndpointId { kind: EndpointKind::Pod, namespace: Some(Arc::from(namespace)), name: Arc::from(pod) };
        let missing = || QuestionError::Pod(name.to_string(), namespace.to_owned(), pod.to_owned());
        let endpoint = endpoints.get(&id).ok_or_else(missing)?;
        Ok(((*name).clone(), id, endpoint))
    }

    /// An address, and who owns it; of several clusters' pods that of `prefer`.
    pub fn of(&self, address: IpAddr, prefer: &ClusterName) -> End {
        let owners = self.by_address.get(&address).map(Vec::as_slice).unwrap_or_default();
        let owner = owners.iter().find(|(cluster, _)| *cluster == prefer).or(owners.first());
        End { address, pod: owner.map(|(cluster, id)| ((*cluster).clone(), (*id).clone())) }
    }

    /// An address that several clusters' pods own is the other end's cluster's, else the first cluster's.
    fn end(&self, place: &Place, this: &Candidate, other: &Candidate, version: u8) -> Result<End, QuestionError> {
        let of_version = |address: &&IpAddr| address.is_ipv4() == (version == 4);
        let family = || QuestionError::Family(place.to_string(), version);
        let address = *this.addresses.iter().find(of_version).ok_or_else(family)?;
        let shared = this.owners.iter().find(|(cluster, _)| other.is_of(cluster));
        Ok(End { address, pod: shared.or(this.owners.first()).cloned() })
    }
}

/// What is asked for, else the only family that both ends have, else the destination's primary.
fn version(question: &Question, from: &Candidate, to: &Candidate) -> Result<u8, QuestionError> {
    match question.ip_version {
        Some(version @ (4 | 6)) => return Ok(version),
        Some(_) => return Err(QuestionError::IpVersion),
        None => {}
    }
    let version_of = |address: &IpAddr| if address.is_ipv4() { 4 } else { 6 };
    let shared =
        to.addresses.iter().map(version_of).find(|version| from.addresses.iter().any(|a| version_of(a) == *version));
    shared.ok_or_else(|| QuestionError::NoFamily(question.from.to_string(), question.to.to_string()))
}
