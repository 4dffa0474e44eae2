//! Fields that several kinds of policies and tiers share.

use hanse_policy::model::{ClusterScope, StagedAction, TierDefault};

use crate::field::{Errors, Path};
use crate::metadata::Metadata;
use crate::names::{is_dns_label, is_subdomain};

/// Makes the peers of a local policy those of the whole ClusterSet; the only value is `ClusterSet`.
pub const PEERS_ANNOTATION: &str = "hanse.dev/peers";

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

/// `types` with Calico's defaults where there is none: whether the policy is of ingress, and of egress. A stored policy
/// without types is of both; Calico reads those that it has in any case, and passes over others.
pub fn convert_types(
    types: Option<&[String]>,
    has_ingress: bool,
    has_egress: bool,
    path: &Path<'_>,
    errors: &mut Errors,
) -> (bool, bool) {
    if errors.is_stored() {
        let types = types.unwrap_or_default();
        let is_of = |name: &str| types.is_empty() || types.iter().any(|it| it.eq_ignore_ascii_case(name));
        return (is_of("Ingress"), is_of("Egress"));
    }
    let Some(types) = types else {
        return (has_ingress || !has_egress, has_egress);
    };
    if types.is_empty() {
        errors.add(path, "is empty: name Ingress, Egress or both, or leave it out");
    }
    let mut of = (false, false);
    for (index, name) in types.iter().enumerate() {
        let seen = match name.as_str() {
            "Ingress" => &mut of.0,
            "Egress" => &mut of.1,
            other => {
                errors.add(&path.index(index), format!("\"{other}\" is neither Ingress nor Egress"));
                continue;
            }
        };
        if std::mem::replace(seen, true) {
            errors.add(&path.index(index), format!("duplicate of {name}"));
        }
    }
    of
}

/// An order is a number: JSON has no NaN, but a very large one reads as infinite.
pub fn check_order(order: Option<f64>, spec: &Path<'_>, errors: &mut Errors) {
    if order.is_some_and(|order| !order.is_finite()) {
        errors.add(&spec.field("order"), "is not a finite number");
    }
}

pub fn convert_default_action(text: Option<&str>, path: &Path<'_>, errors: &mut Errors) -> TierDefault {
    match text {
        None | Some("Deny") => TierDefault::Deny,
        Some("Pass") => TierDefault::Pass,
        Some(other) => {
            errors.add(path, format!("\"{other}\" is neither Deny nor Pass"));
            TierDefault::Deny
        }
    }
}

/// In a stored object an action that is not known is Set.
pub fn convert_staged_action(text: Option<&str>, path: &Path<'_>, errors: &mut Errors) -> StagedAction {
    match text {
        None | Some("Set") => StagedAction::Set,
        Some("Delete") => StagedAction::Delete,
        Some("Learn") => StagedAction::Learn,
        Some("Ignore") => StagedAction::Ignore,
        Some(other) => {
            errors.refuse(path, format!("\"{other}\" is not one of Set, Delete, Learn, Ignore"));
            StagedAction::Set
        }
    }
}

pub const TIER_NAME_RULE: &str = "a tier is named by at most 63 of a-z 0-9 -, without dots";

/// Checks a name of one part. A missing or invalid name is reported with the other metadata.
pub fn check_part_name(name: &str, rule: &str, errors: &mut Errors) {
    if !errors.has_accepted_metadata() && is_subdomain(name) && !is_dns_label(name) {
        errors.add(&Path::Root("metadata.name"), rule);
    }
}
