//! Changes of custom resources: what a version of one says, and what an approval of it is bound to.

use kube::ResourceExt as _;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// What `hanse apply` would send: name, labels and spec.
pub fn object(kind: &str, object: &DynamicObject) -> Value {
    let mut metadata = json!({"name": object.name_any()});
    if let Some(labels) = object.metadata.labels.as_ref().filter(|labels| !labels.is_empty()) {
        metadata["labels"] = json!(labels);
    }
    let mut made = json!({"apiVersion": "hanse.dev/v1alpha1", "kind": kind, "metadata": metadata});
    if let Some(spec) = object.data.get("spec") {
        made["spec"] = spec.clone();
    }
    made.sort_all_objects();
    made
}

/// As [`object`], in JSON. The same object has always the same bytes.
pub fn manifest(kind: &str, object: &DynamicObject) -> String {
    self::object(kind, object).to_string()
}

/// The digest of a manifest: `sha256:` and 64 hexadecimal digits.
pub fn digest(manifest: &[u8]) -> String {
    let hash = Sha256::digest(manifest);
    let digits: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}
