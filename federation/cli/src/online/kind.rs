//! Kinds of the federation's objects, as command lines name them.

use hanse_proto::federation::v1 as pb;

use crate::output::UsageError;

/// The kinds with their short names, in the order in which they are applied: referenced kinds come first.
pub const KINDS: [(&str, &str, pb::ObjectKind); 5] = [
    ("MemberCluster", "mc", pb::ObjectKind::MemberCluster),
    ("Tier", "tier", pb::ObjectKind::Tier),
    ("FederatedNetworkSet", "fns", pb::ObjectKind::FederatedNetworkSet),
    ("FederatedNetworkPolicy", "fnp", pb::ObjectKind::FederatedNetworkPolicy),
    ("StagedFederatedNetworkPolicy", "sfnp", pb::ObjectKind::StagedFederatedNetworkPolicy),
];

pub fn kind_of(text: &str) -> Result<pb::ObjectKind, UsageError> {
    let text = text.to_ascii_lowercase();
    let found = KINDS.iter().find(|(name, short, _)| {
        let name = name.to_ascii_lowercase();
        let plural = name.strip_suffix('y').map_or_else(|| format!("{name}s"), |stem| format!("{stem}ies"));
        [name.as_str(), &plural, short].contains(&text.as_str())
    });
    let names = KINDS.map(|(name, short, _)| format!("{name} ({short})")).join(", ");
    let unknown = || UsageError(format!("unknown kind {text:?}: expected {names}"));
    found.map(|(.., kind)| *kind).ok_or_else(unknown)
}

/// Reads a kind and a name, as two words or as `KIND/NAME`. The name may be absent.
pub fn split<'a>(kind: &'a str, name: Option<&'a str>) -> Result<(&'a str, Option<&'a str>), UsageError> {
    match (name, kind.split_once('/')) {
        (None, Some((kind, name))) if !kind.is_empty() && !name.is_empty() => Ok((kind, Some(name))),
        (_, None) if name != Some("") => Ok((kind, name)),
        _ => Err(UsageError(format!("{kind:?} is not KIND NAME or KIND/NAME"))),
    }
}

pub fn name_of(kind: i32) -> &'static str {
    KINDS.iter().find(|(.., known)| *known as i32 == kind).map_or("object", |(name, ..)| name)
}

/// Reads a target: `KIND/NAME`, or the name of a policy.
pub fn target(text: &str) -> Result<(pb::ObjectKind, String), UsageError> {
    match text.split_once('/') {
        Some((kind, name)) => Ok((kind_of(kind)?, name.to_owned())),
        None => Ok((pb::ObjectKind::FederatedNetworkPolicy, text.to_owned())),
    }
}

/// Reads the name of a cluster.
pub fn label(text: &str) -> Result<String, String> {
    hanse_identity::spiffe::check_label(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}
