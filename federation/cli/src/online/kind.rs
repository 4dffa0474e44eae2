//! Kinds of the federation's objects, as command lines name them.

use anyhow::Context as _;
use hanse_proto::federation::v1 as pb;

/// The kinds with their short names, in the order in which they are applied: referenced kinds come first.
pub const KINDS: [(&str, &str, pb::ObjectKind); 4] = [
    ("MemberCluster", "mc", pb::ObjectKind::MemberCluster),
    ("Tier", "tier", pb::ObjectKind::Tier),
    ("FederatedNetworkSet", "fns", pb::ObjectKind::FederatedNetworkSet),
    ("FederatedNetworkPolicy", "fnp", pb::ObjectKind::FederatedNetworkPolicy),
];

pub fn kind_of(text: &str) -> anyhow::Result<pb::ObjectKind> {
    let text = text.to_ascii_lowercase();
    let found = KINDS.iter().find(|(name, short, _)| {
        let name = name.to_ascii_lowercase();
        let plural = name.strip_suffix('y').map_or_else(|| format!("{name}s"), |stem| format!("{stem}ies"));
        [name.as_str(), &plural, short].contains(&text.as_str())
    });
    let names = KINDS.map(|(name, short, _)| format!("{name} ({short})")).join(", ");
    found.map(|(.., kind)| *kind).with_context(|| format!("unknown kind {text:?}: expected {names}"))
}

pub fn name_of(kind: i32) -> &'static str {
    KINDS.iter().find(|(.., known)| *known as i32 == kind).map_or("object", |(name, ..)| name)
}

/// Reads a target: `KIND/NAME`, or the name of a policy.
pub fn target(text: &str) -> anyhow::Result<(pb::ObjectKind, String)> {
    match text.split_once('/') {
        Some((kind, name)) => Ok((kind_of(kind)?, name.to_owned())),
        None => Ok((pb::ObjectKind::FederatedNetworkPolicy, text.to_owned())),
    }
}
