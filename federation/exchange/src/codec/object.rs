//! Objects of clusters, and the hub's own objects.
//!
//! The bytes of an object are its identity for digests, and the hub relays those that the member has published.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::inventory::{LabelGrant, NamedPort};
use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use pb::object_update::Body;
use prost::Message as _;

use super::DecodeError;
use crate::limits::{self, MAX_EXPORT_BYTES, MAX_HUB_OBJECT_BYTES};
use crate::model::{ClusterRecord, FederatedManifest, Lease, Manifest, ManifestKind, Pairs};

/// An object. Other objects are referred to by id; 0 is none.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    Namespace { name: Arc<str>, labels: Pairs },
    ServiceAccount { namespace: u64, name: Arc<str>, labels: Pairs },
    LabelSet { labels: Pairs },
    Endpoint(EndpointObject),
    Manifest { kind: ManifestKind, name: Arc<str>, manifest: Manifest },
    Cluster { name: ClusterName, record: ClusterRecord },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointObject {
    pub namespace: u64,
    pub name: String,
    pub service_account: u64,
    /// Labels that it shares with others.
    pub label_set: u64,
    /// Labels of its own, which override those.
    pub own: Pairs,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<NamedPort>,
    pub node: Option<String>,
}

/// An update of an object as it was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    pub id: u64,
    /// The publisher's; 0 for the hub's own objects, so that every replica makes the same bytes.
    pub revision: u64,
    /// The object, or why it cannot be used.
    pub object: Result<Object, DecodeError>,
}

/// Encodes an object that a cluster publishes.
pub fn encode(id: u64, revision: u64, object: &Object) -> Vec<u8> {
    let body = match object {
        Object::Namespace { name, labels } => {
            Body::Namespace(pb::Namespace { name: name.to_string(), labels: pairs(labels) })
        }
        Object::ServiceAccount { namespace, name, labels } => Body::ServiceAccount(pb::ServiceAccount {
            namespace: *namespace,
            name: name.to_string(),
            labels: pairs(labels),
        }),
        Object::LabelSet { labels } => Body::LabelSet(pb::LabelSet { labels: pairs(labels) }),
        Object::Endpoint(it) => Body::Endpoint(pb::Endpoint {
            namespace: it.namespace,
            name: it.name.clone(),
            service_account: it.service_account,
            label_set: it.label_set,
            labels: pairs(&it.own),
            addresses: it.addresses.iter().map(octets).collect(),
            ports: it.ports.iter().map(encode_port).collect(),
            node: it.node.clone().unwrap_or_default(),
        }),
        Object::Manifest { kind, name, manifest } => {
            let clusters = manifest.resolved.iter().map(|(expression, names)| (&**expression, names));
            let body = manifest_body(*kind, name, &manifest.json, manifest.enforcers.iter(), clusters);
            let features = features_of(*kind, &manifest.features);
            return pb::ObjectUpdate { id, revision, features, body: Some(body) }.encode_to_vec();
        }
        Object::Cluster { name, record } => Body::Cluster(cluster_body(name, record)),
    };
    pb::ObjectUpdate { id, revision, features: Vec::new(), body: Some(body) }.encode_to_vec()
}

/// Encodes a federated object of the hub.
pub fn encode_manifest(id: u64, kind: ManifestKind, name: &str, manifest: &FederatedManifest) -> Bytes {
    let clusters = manifest.resolved.iter().map(|(expression, names)| (&**expression, names));
    let body = manifest_body(kind, name, &manifest.json, manifest.enforcers.iter().flatten(), clusters);
    let features = features_of(kind, &manifest.features);
    let mut update = pb::ObjectUpdate { id, revision: 0, features, body: Some(body) };
    if update.encoded_len() > MAX_HUB_OBJECT_BYTES {
        // Members refuse it by its name, and fail closed.
        tracing::error!(
            object = name,
            bytes = update.encoded_len(),
            "cluster selectors select too many clusters for one message"
        );
        update.features.push(TOO_LARGE.to_owned());
        if let Some(Body::Policy(it) | Body::StagedPolicy(it) | Body::Tier(it) | Body::NetworkSet(it)) =
            &mut update.body
        {
            it.clusters.clear();
        }
    }
    update.encode_to_vec().into()
}

/// The feature of an object whose cluster selectors select more clusters than fit in a message.
const TOO_LARGE: &str = "cluster-selectors-select-too-much";

/// Reads an object. `None`: not even its id can be read.
pub fn decode(bytes: &[u8]) -> Option<Update> {
    decode_within(bytes, MAX_HUB_OBJECT_BYTES, |_| Ok(()))
}

/// Reads an object that a cluster publishes: as [`decode`], with the limits of such objects.
pub fn decode_export(bytes: &[u8]) -> Option<Update> {
    let update = decode_within(bytes, MAX_EXPORT_BYTES, check_kind)?;
    let object = match update.revision {
        ..=limits::MAX_NUMBER => update.object.and_then(|object| check_export(&object).map(|()| object)),
        revision => Err(DecodeError::Malformed(format!("revision {revision}, of at most {}", limits::MAX_NUMBER))),
    };
    Some(Update { object, ..update })
}

fn decode_within(
    bytes: &[u8],
    most: usize,
    check_kind: impl FnOnce(&Body) -> Result<(), DecodeError>,
) -> Option<Update> {
    let malformed = |id, why| Update { id, revision: 0, object: Err(DecodeError::Malformed(why)) };
    if bytes.len() > most {
        return Some(malformed(id_of(bytes)?, format!("{} bytes, of {most}", bytes.len())));
    }
    match pb::ObjectUpdate::decode(bytes) {
        Ok(pb::ObjectUpdate { id: 0, .. }) => None,
        Ok(pb::ObjectUpdate { id, revision, features, body }) => {
            let kind = body.as_ref().map_or(Ok(()), check_kind);
            Some(Update { id, revision, object: kind.and_then(|()| object(body, features)) })
        }
        Err(error) => Some(malformed(id_of(bytes)?, error.to_string())),
    }
}

/// Whether clusters publish objects of this kind.
fn check_kind(body: &Body) -> Result<(), DecodeError> {
    match body {
        Body::Namespace(_) | Body::ServiceAccount(_) | Body::LabelSet(_) | Body::Endpoint(_) => Ok(()),
        Body::Policy(_) | Body::StagedPolicy(_) | Body::Tier(_) | Body::NetworkSet(_) => {
            Err(DecodeError::KindNotPublishable("policy"))
        }
        Body::Cluster(_) => Err(DecodeError::KindNotPublishable("clusters")),
    }
}

/// The id alone, without reading the rest.
pub fn id_of(bytes: &[u8]) -> Option<u64> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Id {
        #[prost(uint64, tag = "1")]
        id: u64,
    }
    Id::decode(bytes).ok().map(|it| it.id).filter(|id| *id != 0)
}

/// An object's kind, the id of its namespace (0: none) and its name, for messages.
pub fn name_of(bytes: &[u8]) -> Option<(&'static str, u64, String)> {
    if bytes.len() > MAX_EXPORT_BYTES {
        return None;
    }
    match pb::ObjectUpdate::decode(bytes).ok()?.body? {
        Body::Namespace(it) => Some(("namespace", 0, it.name)),
        Body::ServiceAccount(it) => Some(("service account", it.namespace, it.name)),
        Body::Endpoint(it) => Some(("pod", it.namespace, it.name)),
        _ => None,
    }
}

pub fn octets(address: &IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

/// A manifest lists the features that it needs, for the receiver to judge; any other object with one cannot be used.
fn object(body: Option<Body>, mut features: Vec<String>) -> Result<Object, DecodeError> {
    features.retain(|feature| !limits::FEATURES.contains(&feature.as_str()));
    let is_manifest =
        matches!(body, Some(Body::Policy(_) | Body::StagedPolicy(_) | Body::Tier(_) | Body::NetworkSet(_)));
    if let Some(feature) = features.first().filter(|_| !is_manifest) {
        // As long as a name: it is kept, and sent with each refusal.
        let most = feature.floor_char_boundary(limits::MAX_NAME_BYTES);
        return Err(DecodeError::FeatureUnknown(feature[..most].to_owned()));
    }
    Ok(match body {
        Some(Body::Namespace(it)) => Object::Namespace { name: it.name.into(), labels: read_pairs(it.labels) },
        Some(Body::ServiceAccount(it)) => {
            Object::ServiceAccount { namespace: it.namespace, name: it.name.into(), labels: read_pairs(it.labels) }
        }
        Some(Body::LabelSet(it)) => Object::LabelSet { labels: read_pairs(it.labels) },
        Some(Body::Endpoint(it)) => Object::Endpoint(EndpointObject {
            namespace: it.namespace,
            name: it.name,
            service_account: it.service_account,
            label_set: it.label_set,
            own: read_pairs(it.labels),
            addresses: exactly(it.addresses.iter().map(|bytes| address(bytes)))?,
            ports: exactly(it.ports.into_iter().map(decode_port))?,
            node: (!it.node.is_empty()).then_some(it.node),
        }),
        Some(Body::Policy(it)) => manifest(ManifestKind::Policy, it, features),
        Some(Body::StagedPolicy(it)) => manifest(ManifestKind::StagedPolicy, it, features),
        Some(Body::Tier(it)) => manifest(ManifestKind::Tier, it, features),
        Some(Body::NetworkSet(it)) => manifest(ManifestKind::NetworkSet, it, features),
        Some(Body::Cluster(it)) => cluster(it)?,
        None => return Err(DecodeError::Malformed("body: of no known kind".to_owned())),
    })
}

/// A list without room for more: a snapshot has two for every endpoint, and a list that grows starts with room for four.
fn exactly<T>(items: impl ExactSizeIterator<Item = Result<T, DecodeError>>) -> Result<Vec<T>, DecodeError> {
    let mut list = Vec::with_capacity(items.len());
    for item in items {
        list.push(item?);
    }
    Ok(list)
}

/// Whether an object of a cluster is within the limits.
fn check_export(object: &Object) -> Result<(), DecodeError> {
    match object {
        Object::Namespace { name, labels } | Object::ServiceAccount { name, labels, .. } => {
            check_name("name", name)?;
            check_pairs(labels, limits::MAX_SHARED_LABELS)
        }
        Object::LabelSet { labels } => check_pairs(labels, limits::MAX_SHARED_LABELS),
        Object::Endpoint(it) => {
            check_name("name", &it.name)?;
            let node = it.node.as_ref().map_or(0, String::len);
            if it.addresses.len() > limits::MAX_ADDRESSES
                || it.ports.len() > limits::MAX_PORTS
                || node > limits::MAX_NAME_BYTES
            {
                return Err(DecodeError::Malformed("addresses, ports or node exceed their limit".to_owned()));
            }
            it.ports.iter().try_for_each(|port| check_name("ports.name", &port.name))?;
            check_pairs(&it.own, limits::MAX_OWN_LABELS)
        }
        // Refused by their kind before.
        Object::Manifest { .. } | Object::Cluster { .. } => Ok(()),
    }
}

fn check_name(field: &str, text: &str) -> Result<(), DecodeError> {
    match text.len() {
        1..=limits::MAX_NAME_BYTES => Ok(()),
        len => Err(DecodeError::Malformed(format!("{field}: {len} bytes, of 1 to {}", limits::MAX_NAME_BYTES))),
    }
}

fn check_pairs(pairs: &Pairs, max: usize) -> Result<(), DecodeError> {
    if pairs.len() > max {
        return Err(DecodeError::Malformed(format!("labels: {} pairs, of {max}", pairs.len())));
    }
    if pairs.iter().any(|(k, v)| k.len() > limits::MAX_LABEL_KEY_BYTES || v.len() > limits::MAX_LABEL_VALUE_BYTES) {
        return Err(DecodeError::Malformed("labels: a key or value is too long".to_owned()));
    }
    match pairs.windows(2).any(|two| two[0].0 == two[1].0) {
        true => Err(DecodeError::Malformed("labels: duplicate key".to_owned())),
        false => Ok(()),
    }
}

fn pairs(labels: &[(Arc<str>, Arc<str>)]) -> Vec<pb::Pair> {
    labels.iter().map(|(key, value)| pb::Pair { key: key.to_string(), value: value.to_string() }).collect()
}

fn read_pairs(list: Vec<pb::Pair>) -> Pairs {
    let mut pairs: Vec<(Arc<str>, Arc<str>)> =
        list.into_iter().map(|pair| (pair.key.into(), pair.value.into())).collect();
    pairs.sort();
    pairs.into()
}

fn address(bytes: &[u8]) -> Result<IpAddr, DecodeError> {
    match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
        (Ok(v4), _) => Ok(v4.into()),
        (_, Ok(v6)) => Ok(v6.into()),
        _ => Err(DecodeError::Malformed(format!("addresses: {} bytes, of 4 or 16", bytes.len()))),
    }
}

fn encode_port(port: &NamedPort) -> pb::NamedPort {
    pb::NamedPort { name: port.name.to_string(), protocol: port.protocol.into(), port: port.port.into() }
}

fn decode_port(it: pb::NamedPort) -> Result<NamedPort, DecodeError> {
    let number = u16::try_from(it.port).ok().and_then(NonZeroU16::new);
    match (number, u8::try_from(it.protocol)) {
        (Some(port), Ok(protocol)) => Ok(NamedPort { name: it.name.into(), protocol, port: port.get() }),
        _ => Err(DecodeError::Malformed(format!("ports: {} of protocol {}", it.port, it.protocol))),
    }
}

fn manifest_body<'a>(
    kind: ManifestKind,
    name: &str,
    json: &Bytes,
    enforcers: impl Iterator<Item = &'a ClusterName>,
    resolved: impl Iterator<Item = (&'a str, &'a BTreeSet<ClusterName>)>,
) -> Body {
    let names = |names: &BTreeSet<ClusterName>| names.iter().map(|name| name.to_string()).collect();
    let body = pb::Manifest {
        name: name.to_owned(),
        json: json.clone(),
        enforcers: enforcers.map(|name| name.to_string()).collect(),
        clusters: resolved
            .map(|(expression, of)| pb::ResolvedSelector { expression: expression.to_owned(), names: names(of) })
            .collect(),
    };
    match kind {
        ManifestKind::Policy => Body::Policy(body),
        ManifestKind::StagedPolicy => Body::StagedPolicy(body),
        ManifestKind::Tier => Body::Tier(body),
        ManifestKind::NetworkSet => Body::NetworkSet(body),
    }
}

/// The features that a manifest needs: those of its kind, and its own.
fn features_of(kind: ManifestKind, own: &[String]) -> Vec<String> {
    let of_kind = (kind == ManifestKind::StagedPolicy).then(|| limits::STAGED_POLICY.to_owned());
    of_kind.into_iter().chain(own.iter().cloned()).collect()
}

fn manifest(kind: ManifestKind, it: pb::Manifest, features: Vec<String>) -> Object {
    let names = |names: Vec<String>| names.into_iter().map(Arc::from).collect::<BTreeSet<ClusterName>>();
    let resolved = it.clusters.into_iter().map(|r| (Arc::from(r.expression), names(r.names))).collect();
    let manifest = Manifest { json: it.json, enforcers: names(it.enforcers), resolved, features };
    Object::Manifest { kind, name: it.name.into(), manifest }
}

fn cluster_body(name: &str, record: &ClusterRecord) -> pb::ClusterRecord {
    use pb::cluster_record::{LabelGrant as Grant, Lease as State};
    pb::ClusterRecord {
        name: name.to_owned(),
        labels: record.labels.iter().map(|(k, v)| pb::Pair { key: k.to_string(), value: v.to_string() }).collect(),
        label_grant: Some(match &record.label_grant {
            LabelGrant::All => Grant::AllKeys(pb::AllKeys {}),
            LabelGrant::Keys(keys) => Grant::Keys(pb::Keys { keys: keys.iter().map(|k| k.to_string()).collect() }),
        }),
        cidrs: record.cidrs.iter().map(|net| net.to_string()).collect(),
        lease: Some(match record.lease {
            Lease::NeverConnected => State::NeverConnected(pb::NeverConnected {}),
            Lease::Live => State::Live(pb::Live {}),
            Lease::Stale { silent_ms } => State::Stale(pb::Stale { silent_ms }),
        }),
        federated_allow_final: record.federated_allow_final,
    }
}

fn cluster(it: pb::ClusterRecord) -> Result<Object, DecodeError> {
    use pb::cluster_record as record;
    let malformed = |field: &str| DecodeError::Malformed(format!("cluster.{field}: not understood"));
    let record = ClusterRecord {
        labels: it.labels.into_iter().map(|pair| (Arc::from(pair.key), Arc::from(pair.value))).collect(),
        label_grant: match it.label_grant.ok_or_else(|| malformed("label_grant"))? {
            record::LabelGrant::AllKeys(_) => LabelGrant::All,
            record::LabelGrant::Keys(keys) => LabelGrant::Keys(keys.keys.into_iter().map(Arc::from).collect()),
        },
        cidrs: it.cidrs.iter().map(|net| net.parse()).collect::<Result<_, _>>().map_err(|_| malformed("cidrs"))?,
        lease: match it.lease.ok_or_else(|| malformed("lease"))? {
            record::Lease::NeverConnected(_) => Lease::NeverConnected,
            record::Lease::Live(_) => Lease::Live,
            record::Lease::Stale(stale) => Lease::Stale { silent_ms: stale.silent_ms },
        },
        federated_allow_final: it.federated_allow_final,
    };
    Ok(Object::Cluster { name: it.name.into(), record })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_the_name_of_an_unknown_feature() {
        let features = vec![format!("x{}", "ä".repeat(5_000))];
        let update = pb::ObjectUpdate { id: 1, revision: 1, features, body: None }.encode_to_vec();
        let Some(Err(DecodeError::FeatureUnknown(name))) = decode_export(&update).map(|it| it.object) else {
            panic!("the feature is unknown")
        };
        assert_eq!(name.len(), limits::MAX_NAME_BYTES);
    }
}
