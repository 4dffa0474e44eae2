//! Selections, in messages and in the member's snapshot.

use hanse_proto::federation::v1 as pb;
use prost::Message as _;

use crate::message::{WrittenScope, WrittenSelection};

pub(super) fn to_wire(it: WrittenSelection) -> pb::Selection {
    let clusters = match it.clusters {
        WrittenScope::All => Some(pb::selection::Clusters::All(pb::AllClusters {})),
        WrittenScope::Named(names) => Some(pb::selection::Clusters::Named(pb::Clusters { names })),
        WrittenScope::Unknown => None,
    };
    pb::Selection { clusters, selector: it.selector, port_names: it.port_names }
}

pub(super) fn from_wire(it: pb::Selection) -> WrittenSelection {
    let clusters = match it.clusters {
        Some(pb::selection::Clusters::All(_)) => WrittenScope::All,
        Some(pb::selection::Clusters::Named(named)) => WrittenScope::Named(named.names),
        None => WrittenScope::Unknown,
    };
    WrittenSelection { clusters, selector: it.selector, port_names: it.port_names }
}

/// As the member's snapshot has it.
pub fn encode(selection: &WrittenSelection) -> Vec<u8> {
    to_wire(selection.clone()).encode_to_vec()
}

/// Reads a selection of the member's snapshot.
pub fn decode(bytes: &[u8]) -> Option<WrittenSelection> {
    pb::Selection::decode(bytes).ok().map(from_wire)
}
