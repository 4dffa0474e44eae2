//! The exchange's wire types into the policy model's words, and back. Limits of the protocol are enforced here.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::{NonZeroU16, TryFromIntError};
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::inventory::{LabelGrant, Labels, NamedPort};
use hanse_policy::model::{ClusterName, ClusterScope};
use hanse_proto::federation::v1 as pb;
use pb::object_update::Body;
use prost::Message as _;

use super::model::{ClusterRecord, Lease, Manifest, ManifestKind, Position, Wanted};

pub use crate::limits::{MAX_FRAME_BYTES, MAX_HUB_OBJECT_BYTES as MAX_OBJECT_BYTES, PROTOCOL};

/// Why an object or a message cannot be used; names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("{0}")]
    Malformed(String),
    #[error("feature {0} is unknown here")]
    FeatureUnknown(String),
    #[error("its tier does not exist: the last version with a tier stays in force, if there is one")]
    TierMissing,
}

/// A received object.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    Namespace { name: Arc<str>, labels: Labels },
    ServiceAccount { namespace: u64, name: Arc<str>, labels: Labels },
    LabelSet { labels: Labels },
    Endpoint(RemoteEndpoint),
    Manifest { kind: ManifestKind, name: Arc<str>, manifest: Manifest },
    Cluster { name: ClusterName, record: ClusterRecord },
}

#[derive(Debug, Clone, PartialEq)]
pub struct RemoteEndpoint {
    pub namespace: u64,
    pub name: Arc<str>,
    pub service_account: u64,
    pub label_set: u64,
    pub own: Labels,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<NamedPort>,
    pub node: Option<Arc<str>>,
}

/// The id, and what the bytes say.
///
/// # Errors
/// When not even the id can be read. The inner result is about this object by itself.
pub fn read_object(bytes: &[u8]) -> Result<(u64, Result<Object, WireError>), WireError> {
    let id = id_of(bytes)?;
    if bytes.len() > MAX_OBJECT_BYTES {
        return Ok((id, Err(WireError::Malformed(format!("object: {} bytes, of {MAX_OBJECT_BYTES}", bytes.len())))));
    }
    let read = pb::ObjectUpdate::decode(bytes).map_err(|error| WireError::Malformed(format!("object: {error}")));
    Ok((id, read.and_then(|update| object(update.body, update.features))))
}

/// The id alone, without reading the rest.
///
/// # Errors
/// When there is none.
pub fn id_of(bytes: &[u8]) -> Result<u64, WireError> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Id {
        #[prost(uint64, tag = "1")]
        id: u64,
    }
    match Id::decode(bytes) {
        Ok(Id { id }) if id != 0 => Ok(id),
        Ok(_) => Err(WireError::Malformed("object: without an id".to_owned())),
        Err(error) => Err(WireError::Malformed(format!("object: {error}"))),
    }
}

/// A manifest says for itself which features it needs; nothing else of which any is not known can be read.
fn object(body: Option<Body>, features: Vec<String>) -> Result<Object, WireError> {
    let is_manifest = matches!(body, Some(Body::Policy(_) | Body::Tier(_) | Body::NetworkSet(_)));
    if let Some(feature) = features.first().filter(|_| !is_manifest) {
        return Err(WireError::FeatureUnknown(feature.clone()));
    }
    Ok(match body {
        Some(Body::Namespace(it)) => Object::Namespace { name: it.name.into(), labels: labels(it.labels) },
        Some(Body::ServiceAccount(it)) => {
            Object::ServiceAccount { namespace: it.namespace, name: it.name.into(), labels: labels(it.labels) }
        }
        Some(Body::LabelSet(it)) => Object::LabelSet { labels: labels(it.labels) },
        Some(Body::Endpoint(it)) => Object::Endpoint(RemoteEndpoint {
            namespace: it.namespace,
            name: it.name.into(),
            service_account: it.service_account,
            label_set: it.label_set,
            own: labels(it.labels),
            addresses: it.addresses.iter().map(|bytes| address(bytes)).collect::<Result<_, _>>()?,
            ports: it.ports.into_iter().map(port).collect::<Result<_, _>>()?,
            node: (!it.node.is_empty()).then(|| it.node.into()),
        }),
        Some(Body::Policy(it)) => manifest(ManifestKind::Policy, it, features),
        Some(Body::Tier(it)) => manifest(ManifestKind::Tier, it, features),
        Some(Body::NetworkSet(it)) => manifest(ManifestKind::NetworkSet, it, features),
        Some(Body::Cluster(it)) => cluster(it)?,
        None => return Err(WireError::Malformed("body: no kind that is known here".to_owned())),
    })
}

fn manifest(kind: ManifestKind, it: pb::Manifest, features: Vec<String>) -> Object {
    let names = |names: Vec<String>| names.into_iter().map(Arc::from).collect::<BTreeSet<ClusterName>>();
    let resolved = it.clusters.into_iter().map(|r| (Arc::from(r.expression), names(r.names))).collect();
    let manifest = Manifest { json: it.json, enforcers: names(it.enforcers), resolved, features };
    Object::Manifest { kind, name: it.name.into(), manifest }
}

fn cluster(it: pb::ClusterRecord) -> Result<Object, WireError> {
    use pb::cluster_record as record;
    let malformed = |field: &str| WireError::Malformed(format!("cluster.{field}: not understood"));
    let record = ClusterRecord {
        labels: labels(it.labels),
        label_grant: match it.label_grant.ok_or_else(|| malformed("label_grant"))? {
            record::LabelGrant::AllKeys(_) => LabelGrant::All,
            record::LabelGrant::Keys(keys) => LabelGrant::Keys(keys.keys.into_iter().map(Arc::from).collect()),
        },
        cidrs: it.cidrs.iter().map(|net| net.parse()).collect::<Result<_, _>>().map_err(|_| malformed("cidrs"))?,
        lease: match it.lease.ok_or_else(|| malformed("lease"))? {
            record::Lease::NeverHeard(_) => Lease::NeverHeard,
            record::Lease::Live(_) => Lease::Live,
            record::Lease::Stale(stale) => Lease::Stale { silent_ms: stale.silent_ms },
        },
        federated_allow_final: it.federated_allow_final,
    };
    Ok(Object::Cluster { name: it.name.into(), record })
}

fn labels(pairs: Vec<pb::Pair>) -> Labels {
    pairs.into_iter().map(|pair| (Arc::from(pair.key), Arc::from(pair.value))).collect()
}

fn address(bytes: &[u8]) -> Result<IpAddr, WireError> {
    match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
        (Ok(v4), _) => Ok(v4.into()),
        (_, Ok(v6)) => Ok(v6.into()),
        _ => Err(WireError::Malformed(format!("endpoint.addresses: {} bytes, of 4 or 16", bytes.len()))),
    }
}

fn port(it: pb::NamedPort) -> Result<NamedPort, WireError> {
    let malformed = |_: TryFromIntError| WireError::Malformed("endpoint.ports: out of range".to_owned());
    let protocol = u8::try_from(it.protocol).map_err(malformed)?;
    let port = NonZeroU16::try_from(u16::try_from(it.port).map_err(malformed)?).map_err(malformed)?.get();
    Ok(NamedPort { name: it.name.into(), protocol, port })
}

/// Reads a frame.
///
/// # Errors
/// When it is no frame, or exceeds the limit.
pub fn read_frame(bytes: &[u8]) -> Result<pb::Frame, WireError> {
    if bytes.len() > MAX_FRAME_BYTES {
        return Err(WireError::Malformed(format!("frame: {} bytes, of {MAX_FRAME_BYTES}", bytes.len())));
    }
    pb::Frame::decode(bytes).map_err(|error| WireError::Malformed(format!("frame: {error}")))
}

/// Cuts encoded updates and removals into frames within the limit.
pub fn frames(upserts: impl IntoIterator<Item = Bytes>, removals: Vec<u64>) -> Vec<Bytes> {
    // A tag and a length of at most four bytes before each update; ten bytes at most for each removal.
    let (mut frames, mut frame, mut size) = (Vec::new(), pb::Frame::default(), 0);
    let mut cut = |frame: &mut pb::Frame, size: &mut usize| {
        if *size > 0 {
            frames.push(Bytes::from(std::mem::take(frame).encode_to_vec()));
            *size = 0;
        }
    };
    for update in upserts {
        let cost = update.len() + 5;
        if size + cost + 16 > MAX_FRAME_BYTES {
            cut(&mut frame, &mut size);
        }
        size += cost;
        frame.upserts.push(update);
    }
    for id in removals {
        if size + 26 > MAX_FRAME_BYTES {
            cut(&mut frame, &mut size);
        }
        size += 10;
        frame.removals.push(id);
    }
    cut(&mut frame, &mut size);
    frames
}

pub fn digest_bytes(digest: u128) -> Bytes {
    Bytes::copy_from_slice(&digest.to_le_bytes())
}

pub fn read_digest(bytes: &[u8]) -> Option<u128> {
    bytes.try_into().ok().map(u128::from_le_bytes)
}

pub fn pairs<'a>(labels: impl IntoIterator<Item = (&'a Arc<str>, &'a Arc<str>)>) -> Vec<pb::Pair> {
    labels.into_iter().map(|(k, v)| pb::Pair { key: k.to_string(), value: v.to_string() }).collect()
}

impl From<Position> for pb::Position {
    fn from(Position { epoch, revision }: Position) -> Self {
        Self { epoch, revision }
    }
}

impl From<pb::Position> for Position {
    fn from(pb::Position { epoch, revision }: pb::Position) -> Self {
        Self { epoch, revision }
    }
}

pub fn selection(wanted: &Wanted) -> pb::Selection {
    let clusters = match &wanted.clusters {
        ClusterScope::Named(names) => {
            pb::selection::Clusters::Named(pb::Clusters { names: names.iter().map(|n| n.to_string()).collect() })
        }
        ClusterScope::All | ClusterScope::Local => pb::selection::Clusters::All(pb::AllClusters {}),
    };
    pb::Selection {
        clusters: Some(clusters),
        selector: wanted.selector.canonical.to_string(),
        port_names: wanted.port_names.iter().map(|n| n.to_string()).collect(),
    }
}
