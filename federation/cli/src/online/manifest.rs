//! Manifests of the federation's objects: the revision that they were read at, and a summary.

use serde_json::Value;

use crate::output;

/// The annotation in which `get` reports the revision of an object. `apply` removes it, and changes the object only if it is
/// still at that revision: concurrent edits are not overwritten.
pub const REVISION: &str = "hanse.dev/revision";

/// Removes the annotation, and returns its revision.
pub fn take_revision(manifest: &mut Value) -> Option<u64> {
    let metadata = manifest.get_mut("metadata")?.as_object_mut()?;
    let annotations = metadata.get_mut("annotations")?.as_object_mut()?;
    let revision = annotations.shift_remove(REVISION)?;
    if annotations.is_empty() {
        metadata.shift_remove("annotations");
    }
    revision.as_str()?.parse().ok()
}

/// Adds the annotation.
pub fn put_revision(manifest: &mut Value, revision: u64) {
    let Some(metadata) = manifest.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    let annotations = metadata.entry("annotations").or_insert_with(|| serde_json::json!({}));
    if let Some(annotations) = annotations.as_object_mut() {
        annotations.insert(REVISION.to_owned(), revision.to_string().into());
    }
}

/// A summary of an object, for tables.
pub fn summary(manifest: &Value) -> String {
    let spec = &manifest["spec"];
    let text = |field: &str, otherwise: &str| match &spec[field] {
        Value::Null => otherwise.to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let items = |list: &Value| list.as_array().map_or(0, Vec::len);
    let joined = |list: &Value| {
        let texts = list.as_array().into_iter().flatten().filter_map(Value::as_str);
        texts.collect::<Vec<_>>().join(",")
    };
    match manifest["kind"].as_str().unwrap_or_default() {
        kind @ ("FederatedNetworkPolicy" | "StagedFederatedNetworkPolicy") => {
            let rules = items(&spec["ingress"]) + items(&spec["egress"]);
            let (tier, order) = (text("tier", "-"), text("order", "last"));
            let clusters = text("clusterSelector", "all()");
            let staged = match kind {
                "FederatedNetworkPolicy" => String::new(),
                _ => format!("staged {}, ", text("stagedAction", "Set")),
            };
            format!("{staged}tier {tier}, order {order}, {}, clusters {clusters}", output::count(rules, "rule"))
        }
        "Tier" => format!(
            "{}, order {}, default {}",
            text("phase", "Guard"),
            text("order", "last"),
            text("defaultAction", "Deny")
        ),
        "FederatedNetworkSet" => output::count(items(&spec["nets"]), "net"),
        "MemberCluster" => format!("cidrs {}", joined(&spec["grants"]["cidrs"])),
        _ => String::new(),
    }
}
