//! The custom resources that the operator reconciles, as the hub's objects.

use bytes::Bytes;
use kube::ResourceExt as _;
use kube::api::{ApiResource, DynamicObject};
use serde_json::{Value, json};

use crate::custom_resources::{FederatedNetworkPolicy, FederatedNetworkSet, StagedFederatedNetworkPolicy, Tier};
use crate::manifest::{Kind, ObjectId};

/// The kinds that the operator reconciles, in the order in which they are applied. They are deleted in the opposite order.
pub const KINDS: [Kind; 4] =
    [Kind::Tier, Kind::FederatedNetworkSet, Kind::FederatedNetworkPolicy, Kind::StagedFederatedNetworkPolicy];

/// While an object has it, its deletion waits for the hub.
pub const FINALIZER: &str = "hanse.dev/operator";

/// The resource of a kind. `None`: the operator does not reconcile the kind.
pub fn resource(kind: Kind) -> Option<ApiResource> {
    Some(match kind {
        Kind::Tier => ApiResource::erase::<Tier>(&()),
        Kind::FederatedNetworkSet => ApiResource::erase::<FederatedNetworkSet>(&()),
        Kind::FederatedNetworkPolicy => ApiResource::erase::<FederatedNetworkPolicy>(&()),
        Kind::StagedFederatedNetworkPolicy => ApiResource::erase::<StagedFederatedNetworkPolicy>(&()),
        Kind::MemberCluster => return None,
    })
}

pub fn id(kind: Kind, object: &DynamicObject) -> ObjectId {
    ObjectId { kind, name: object.name_any().into() }
}

/// What `hanse apply` would send: name, labels and spec. The same object has always the same bytes.
pub fn manifest(kind: Kind, object: &DynamicObject) -> Bytes {
    let mut metadata = json!({"name": object.name_any()});
    if let Some(labels) = object.metadata.labels.as_ref().filter(|labels| !labels.is_empty()) {
        metadata["labels"] = json!(labels);
    }
    let mut manifest = json!({"apiVersion": "hanse.dev/v1alpha1", "kind": kind.name(), "metadata": metadata});
    if let Some(spec) = object.data.get("spec") {
        manifest["spec"] = spec.clone();
    }
    manifest.sort_all_objects();
    Bytes::from(manifest.to_string())
}

/// An object of a server-side apply. With its UID, it is never created by it.
pub fn applied(kind: Kind, object: &DynamicObject, fields: &Value) -> Value {
    let metadata = json!({"name": object.name_any(), "uid": object.metadata.uid});
    let mut applied = json!({"apiVersion": "hanse.dev/v1alpha1", "kind": kind.name(), "metadata": metadata});
    for (path, value) in fields.as_object().into_iter().flatten() {
        match path.as_str() {
            "finalizers" => applied["metadata"]["finalizers"] = value.clone(),
            field => applied[field] = value.clone(),
        }
    }
    applied
}

/// A merge patch that removes the finalizer from this version of an object. Not a server-side apply: that removes only what no other
/// manager owns, and a backup that was restored with the finalizer owns it too.
pub fn released(object: &DynamicObject) -> Value {
    let rest: Vec<&String> = object.finalizers().iter().filter(|it| *it != FINALIZER).collect();
    let (uid, version) = (&object.metadata.uid, &object.metadata.resource_version);
    json!({"metadata": {"uid": uid, "resourceVersion": version, "finalizers": rest}})
}

pub fn has_finalizer(object: &DynamicObject) -> bool {
    object.finalizers().iter().any(|it| it == FINALIZER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifest_has_name_labels_and_spec_only() {
        let object = json!({
            "apiVersion": "hanse.dev/v1alpha1", "kind": "FederatedNetworkSet",
            "metadata": {
                "name": "n", "uid": "1", "generation": 2, "labels": {"b": "2", "a": "1"}, "annotations": {"x": "y"},
            },
            "spec": {"nets": ["10.0.0.0/8"]}, "status": {"nets": 1},
        });
        let object: DynamicObject = serde_json::from_value(object).expect("an object");
        let bytes = manifest(Kind::FederatedNetworkSet, &object);
        let expected = r#"{"apiVersion":"hanse.dev/v1alpha1","kind":"FederatedNetworkSet","metadata":{"labels":{"a":"1","b":"2"},"name":"n"},"spec":{"nets":["10.0.0.0/8"]}}"#;
        assert_eq!(std::str::from_utf8(&bytes), Ok(expected));
        crate::manifest::check(&bytes).expect("the hub reads it");
    }
}
