//! The exchange's wire types into what the stores hold, and back. Limits of the protocol are enforced here.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use hanse_policy::inventory::LabelGrant;
use hanse_policy::model::ClusterScope;
use hanse_policy::selector::{Expr, Selector};
use hanse_proto::bounded;
use hanse_proto::federation::v1 as pb;
use pb::object_update::Body;
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::interest::{self, Size};
use crate::model::{ClusterState, FederatedManifest, Lease, ManifestKind, Position, Refusal, Wanted};

pub use crate::limits::{
    MAX_EXPORT_BYTES, MAX_FRAME_BYTES, MAX_HUB_OBJECT_BYTES, MAX_MESSAGE_BYTES, MAX_NUMBER, MAX_PLAIN_BYTES, PROTOCOL,
};

/// Parts of one message that are named when they are refused, of at most 256 bytes each.
const MAX_NAMED_PARTS: usize = 16;
const MAX_PART_BYTES: usize = 256;
const MAX_NAME_BYTES: usize = 253;
const MAX_KEY_BYTES: usize = 512;
const MAX_VALUE_BYTES: usize = 1 << 10;
const MAX_ADDRESSES: usize = 16;
const MAX_PORTS: usize = 256;
const MAX_OWN_PAIRS: usize = 64;
const MAX_SHARED_PAIRS: usize = 256;

/// Sorted by key, keys unique.
pub type Pairs = Box<[(Arc<str>, Arc<str>)]>;

/// What members publish, as far as selecting and granting need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Export {
    Namespace { name: Arc<str>, labels: Pairs },
    ServiceAccount { namespace: u64, name: Arc<str>, labels: Pairs },
    LabelSet { labels: Pairs },
    Endpoint(EndpointExport),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointExport {
    pub namespace: u64,
    pub service_account: u64,
    pub label_set: u64,
    pub own: Pairs,
    pub addresses: Vec<IpAddr>,
    pub port_names: BTreeSet<Arc<str>>,
}

/// An update's id and revision, and what it says or why it is refused. None when not even the id can be read.
pub fn read_export(bytes: &[u8]) -> Option<(u64, u64, Result<Export, Refusal>)> {
    if bytes.len() > MAX_EXPORT_BYTES {
        let refusal = Refusal::Malformed(format!("{} bytes, of {MAX_EXPORT_BYTES}", bytes.len()));
        return Some((id_of_export(bytes)?, 0, Err(refusal)));
    }
    let update = pb::ObjectUpdate::decode(bytes).ok().filter(|update| update.id != 0)?;
    let (id, revision) = (update.id, update.revision);
    Some((id, revision, export(update)))
}

/// The id alone, without reading the rest.
pub fn id_of_export(bytes: &[u8]) -> Option<u64> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Id {
        #[prost(uint64, tag = "1")]
        id: u64,
    }
    Id::decode(bytes).ok().map(|it| it.id).filter(|id| *id != 0)
}

/// What an update's object is called: its kind, the id of its namespace (0 where it has none) and its name.
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

/// How many objects a message of a publisher updates or removes.
pub fn updates_in(request: &pb::PublishRequest) -> usize {
    match &request.message {
        Some(pb::publish_request::Message::Frame(bytes)) => {
            // Slices of the same bytes.
            read_frame(bytes).map_or(0, |frame| frame.upserts.len() + frame.removals.len())
        }
        _ => 0,
    }
}

fn export(update: pb::ObjectUpdate) -> Result<Export, Refusal> {
    if update.revision > MAX_NUMBER {
        return Err(Refusal::Malformed(format!("revision {}, of at most {MAX_NUMBER}", update.revision)));
    }
    if let Some(feature) = update.features.into_iter().next() {
        return Err(Refusal::FeatureUnknown(feature));
    }
    match update.body {
        Some(Body::Namespace(it)) => {
            Ok(Export::Namespace { name: name("name", &it.name)?, labels: pairs(it.labels, MAX_SHARED_PAIRS)? })
        }
        Some(Body::ServiceAccount(it)) => Ok(Export::ServiceAccount {
            namespace: it.namespace,
            name: name("name", &it.name)?,
            labels: pairs(it.labels, MAX_SHARED_PAIRS)?,
        }),
        Some(Body::LabelSet(it)) => Ok(Export::LabelSet { labels: pairs(it.labels, MAX_SHARED_PAIRS)? }),
        Some(Body::Endpoint(it)) => {
            name("name", &it.name)?;
            if it.addresses.len() > MAX_ADDRESSES || it.ports.len() > MAX_PORTS || it.node.len() > MAX_NAME_BYTES {
                return Err(Refusal::Malformed("addresses, ports or node exceed their limit".to_owned()));
            }
            Ok(Export::Endpoint(EndpointExport {
                namespace: it.namespace,
                service_account: it.service_account,
                label_set: it.label_set,
                own: pairs(it.labels, MAX_OWN_PAIRS)?,
                addresses: it.addresses.iter().map(|bytes| address(bytes)).collect::<Result<_, _>>()?,
                port_names: it.ports.iter().map(port_name).collect::<Result<_, _>>()?,
            }))
        }
        Some(Body::Policy(_) | Body::Tier(_) | Body::NetworkSet(_)) => Err(Refusal::KindNotPublishable("policy")),
        Some(Body::Cluster(_)) => Err(Refusal::KindNotPublishable("clusters")),
        None => Err(Refusal::Malformed("no kind that is known here".to_owned())),
    }
}

fn name(field: &str, text: &str) -> Result<Arc<str>, Refusal> {
    match text.len() {
        1..=MAX_NAME_BYTES => Ok(text.into()),
        len => Err(Refusal::Malformed(format!("{field}: {len} bytes, of 1 to {MAX_NAME_BYTES}"))),
    }
}

fn port_name(port: &pb::NamedPort) -> Result<Arc<str>, Refusal> {
    // Receivers are relayed the bytes, and could not read others.
    if !(1..=65_535).contains(&port.port) || port.protocol > 255 {
        return Err(Refusal::Malformed(format!("ports: {} of protocol {}", port.port, port.protocol)));
    }
    name("ports.name", &port.name)
}

fn pairs(list: Vec<pb::Pair>, max: usize) -> Result<Pairs, Refusal> {
    if list.len() > max {
        return Err(Refusal::Malformed(format!("labels: {} pairs, of {max}", list.len())));
    }
    let mut pairs: Vec<(Arc<str>, Arc<str>)> = Vec::with_capacity(list.len());
    for pair in list {
        if pair.key.len() > MAX_KEY_BYTES || pair.value.len() > MAX_VALUE_BYTES {
            return Err(Refusal::Malformed("labels: a key or value is too long".to_owned()));
        }
        pairs.push((pair.key.into(), pair.value.into()));
    }
    pairs.sort();
    match pairs.windows(2).any(|two| two[0].0 == two[1].0) {
        true => Err(Refusal::Malformed("labels: a key is there twice".to_owned())),
        false => Ok(pairs.into()),
    }
}

fn address(bytes: &[u8]) -> Result<IpAddr, Refusal> {
    match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
        (Ok(v4), _) => Ok(v4.into()),
        (_, Ok(v6)) => Ok(v6.into()),
        _ => Err(Refusal::Malformed(format!("addresses: {} bytes, of 4 or 16", bytes.len()))),
    }
}

/// Cuts encoded updates and removals into frames.
pub fn frames(upserts: impl IntoIterator<Item: AsRef<[u8]>>, removals: Vec<u64>) -> Vec<Bytes> {
    // As prost encodes a `Frame`, of which no copy is made first: others wait while a snapshot of 300,000 objects is cut. A tag and
    // a length of at most four bytes before each update; ten bytes at most for each removal, and their tag and length.
    let (mut frames, mut frame) = (Vec::new(), Vec::new());
    let mut cut = |frame: &mut Vec<u8>| {
        if !frame.is_empty() {
            frames.push(Bytes::from(std::mem::take(frame)));
        }
    };
    for update in upserts {
        let update = update.as_ref();
        if frame.len() + update.len() + 5 > MAX_FRAME_BYTES {
            cut(&mut frame);
        }
        encode_key(1, WireType::LengthDelimited, &mut frame);
        encode_varint(update.len() as u64, &mut frame);
        frame.extend_from_slice(update);
    }
    let mut removals = &removals[..];
    while !removals.is_empty() {
        let fit = (MAX_FRAME_BYTES.saturating_sub(frame.len() + 8) / 10).min(removals.len());
        let (first, rest) = removals.split_at(fit);
        prost::encoding::uint64::encode_packed(2, first, &mut frame);
        removals = rest;
        if !removals.is_empty() {
            cut(&mut frame);
        }
    }
    cut(&mut frame);
    frames
}

/// Its updates are slices of the same bytes.
pub fn read_frame(bytes: &Bytes) -> Result<pb::Frame, Refusal> {
    if bytes.len() > MAX_FRAME_BYTES {
        return Err(Refusal::Malformed(format!("frame: {} bytes, of {MAX_FRAME_BYTES}", bytes.len())));
    }
    bounded::decode(bytes.clone()).map_err(|status| Refusal::Malformed(format!("frame: {}", status.message())))
}

pub fn digest_bytes(digest: u128) -> Bytes {
    Bytes::copy_from_slice(&digest.to_le_bytes())
}

pub fn read_digest(bytes: &[u8]) -> Option<u128> {
    bytes.try_into().ok().map(u128::from_le_bytes)
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
        // A receiver is never sent what is its own, so `Local` would be nothing; it is resolved before it comes here.
        ClusterScope::All | ClusterScope::Local => pb::selection::Clusters::All(pb::AllClusters {}),
    };
    pb::Selection {
        clusters: Some(clusters),
        selector: wanted.selector.canonical.to_string(),
        port_names: wanted.port_names.iter().map(|n| n.to_string()).collect(),
    }
}

/// Parts of a message that are not taken as they are. Each is replaced by something wider, so that nothing is missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refused {
    pub total: u64,
    /// The first, in words.
    pub parts: Vec<String>,
}

impl Refused {
    pub fn add(&mut self, mut part: String) {
        self.total = self.total.saturating_add(1);
        if self.parts.len() < MAX_NAMED_PARTS {
            part.truncate(part.floor_char_boundary(MAX_PART_BYTES));
            self.parts.push(part);
        }
    }
}

/// Reads an interest. A selection that cannot be read is widened by itself; an interest beyond the limit is everything.
pub fn read_interest(
    field: &str,
    list: Vec<pb::Selection>,
    limit: Size,
    refused: &mut Refused,
) -> BTreeSet<Arc<Wanted>> {
    let everything = || BTreeSet::from([Arc::new(Wanted::everything())]);
    if list.len() > limit.selections {
        refused.add(format!("{field}: {} selections, of {}", list.len(), limit.selections));
        return everything();
    }
    let mut interest = BTreeSet::new();
    for (at, selection) in list.into_iter().enumerate() {
        let mut problem = |why: String| refused.add(format!("{field}[{at}].{why}"));
        interest.insert(Arc::new(read_selection(selection, &mut problem)));
    }
    if !interest::fits(interest.iter().map(|it| &**it), limit) {
        refused.add(format!("{field}: more than {} bytes", limit.bytes));
        return everything();
    }
    interest
}

/// What cannot be read does not restrict the selection.
fn read_selection(selection: pb::Selection, problem: &mut impl FnMut(String)) -> Wanted {
    let selector = interest::read_selector(&selection.selector).unwrap_or_else(|why| {
        problem(why);
        Selector::all()
    });
    let clusters = match selection.clusters {
        Some(pb::selection::Clusters::All(_)) => ClusterScope::All,
        Some(pb::selection::Clusters::Named(named)) => {
            ClusterScope::Named(named.names.into_iter().map(Arc::from).collect())
        }
        None => {
            problem("clusters: missing".to_owned());
            ClusterScope::All
        }
    };
    let mut port_names: BTreeSet<Arc<str>> = selection.port_names.into_iter().map(Arc::from).collect();
    if let Err(why) = interest::check_port_names(&port_names) {
        problem(why);
        port_names.clear();
    }
    // The canonical form, which is what is sent on, may be longer than what was written.
    let wanted = Wanted::readable(clusters, &selector, port_names);
    if wanted.selector.expr == Expr::All && selector.expr != Expr::All {
        problem(format!(
            "selector: its canonical form has {} bytes, or is nested too deeply",
            selector.canonical.len()
        ));
    }
    wanted
}

/// The hub's own objects have no revision of their own in their bytes, so that every replica makes the same of them.
pub fn manifest_update(id: u64, kind: ManifestKind, name: &str, manifest: &FederatedManifest) -> Bytes {
    let body = pb::Manifest {
        name: name.to_owned(),
        json: manifest.json.clone(),
        enforcers: manifest.enforcers.iter().flatten().map(|n| n.to_string()).collect(),
        clusters: manifest
            .resolved
            .iter()
            .map(|(expression, names)| pb::ResolvedSelector {
                expression: expression.to_string(),
                names: names.iter().map(|n| n.to_string()).collect(),
            })
            .collect(),
    };
    let body = match kind {
        ManifestKind::Policy => Body::Policy(body),
        ManifestKind::Tier => Body::Tier(body),
        ManifestKind::NetworkSet => Body::NetworkSet(body),
    };
    let mut update = pb::ObjectUpdate { id, revision: 0, features: manifest.features.clone(), body: Some(body) };
    if update.encoded_len() > MAX_HUB_OBJECT_BYTES {
        // Members refuse it by its name, and what they do not know of it is closed.
        tracing::error!(
            object = name,
            bytes = update.encoded_len(),
            "cluster selectors select too much for one message"
        );
        update.features.push(TOO_LARGE.to_owned());
        if let Some(Body::Policy(it) | Body::Tier(it) | Body::NetworkSet(it)) = &mut update.body {
            it.clusters.clear();
        }
    }
    update.encode_to_vec().into()
}

/// The feature that an object needs whose cluster selectors select more than fits in a message.
const TOO_LARGE: &str = "cluster-selectors-select-too-much";

pub fn cluster_update(id: u64, name: &str, state: &ClusterState) -> Bytes {
    use pb::cluster_record::{LabelGrant as Grant, Lease as State};
    let record = pb::ClusterRecord {
        name: name.to_owned(),
        labels: state.labels.iter().map(|(k, v)| pb::Pair { key: k.to_string(), value: v.to_string() }).collect(),
        label_grant: Some(match state.grant.label_grant() {
            LabelGrant::All => Grant::AllKeys(pb::AllKeys {}),
            LabelGrant::Keys(keys) => Grant::Keys(pb::Keys { keys: keys.iter().map(|k| k.to_string()).collect() }),
        }),
        cidrs: state.cidrs.iter().map(|net| net.to_string()).collect(),
        lease: Some(match state.lease {
            Lease::NeverHeard => State::NeverHeard(pb::NeverHeard {}),
            Lease::Live => State::Live(pb::Live {}),
            Lease::Stale { silent_ms } => State::Stale(pb::Stale { silent_ms }),
        }),
        federated_allow_final: state.federated_allow_final,
    };
    let update = pb::ObjectUpdate { id, revision: 0, features: Vec::new(), body: Some(Body::Cluster(record)) };
    update.encode_to_vec().into()
}

pub fn refusal(id: u64, refusal: &Refusal) -> pb::Refusal {
    use pb::refusal::Reason;
    let reason = match refusal {
        Refusal::Malformed(why) => Reason::Malformed(why.clone()),
        Refusal::FeatureUnknown(feature) => Reason::FeatureUnknown(feature.clone()),
        Refusal::NamespaceNotGranted(name) => Reason::NamespaceNotGranted(name.to_string()),
        Refusal::AddressNotGranted(address) => Reason::AddressNotGranted(address.to_string()),
        Refusal::LabelNotGranted(label) => Reason::LabelNotGranted(label.clone()),
        Refusal::AddressTaken(address) => Reason::AddressTaken(address.to_string()),
        Refusal::ReferenceMissing(id) => Reason::ReferenceMissing(*id),
        Refusal::LimitExceeded(what) => Reason::LimitExceeded((*what).to_owned()),
        Refusal::KindNotPublishable(kind) => Reason::KindNotPublishable((*kind).to_owned()),
    };
    pb::Refusal { id, reason: Some(reason) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_what_prost_encodes_and_within_their_size() {
        let updates: Vec<Vec<u8>> = (0..3_000_usize).map(|at| vec![at as u8; at % 1_300]).collect();
        let removals: Vec<u64> = (0..250_000_u64).map(|at| u64::MAX - at).collect();
        for (updates, removals, count) in [
            (&updates[..0], &removals[..0], 0),
            (&updates[..3], &removals[..0], 1),
            (&updates[..0], &removals[..3], 1),
            (&updates[..3], &removals[..3], 1),
            (&updates[..], &removals[..], 5),
        ] {
            let frames = frames(updates, removals.to_vec());
            assert_eq!(frames.len(), count);
            let mut read = pb::Frame::default();
            for bytes in &frames {
                assert!(bytes.len() <= MAX_FRAME_BYTES, "{}", bytes.len());
                let frame = read_frame(bytes).expect("a frame");
                assert_eq!(frame.encode_to_vec(), &bytes[..], "as prost encodes it");
                read.upserts.extend(frame.upserts);
                read.removals.extend(frame.removals);
            }
            assert!(read.upserts.iter().eq(updates) && read.removals == removals);
        }
    }
}
