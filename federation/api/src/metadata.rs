//! The metadata of any object, and what an API server checks of it.

use std::sync::Arc;

use hanse_policy::inventory::Labels;
use serde::Deserialize;

use crate::decode::null_as_default;
use crate::field::{Errors, Path};
use crate::names::{NAME_RULE, is_dns_label, is_subdomain, label_key_error, label_value_error, owner_name};

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    #[serde(default, deserialize_with = "null_as_default")]
    pub name: String,
    pub namespace: Option<Arc<str>>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub labels: Labels,
    #[serde(default, deserialize_with = "null_as_default")]
    pub annotations: Labels,
    /// RFC 3339; what "newest" goes by.
    pub creation_timestamp: Option<Arc<str>>,
    pub deletion_timestamp: Option<Arc<str>>,
    /// The owner that controls the object, as [`owner_name`] names it.
    #[serde(default, rename = "ownerReferences", deserialize_with = "controller")]
    pub controller: Option<Arc<str>>,
}

/// The controller among owners; other owners do not matter.
fn controller<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Arc<str>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Owner {
        #[serde(default)]
        api_version: String,
        #[serde(default)]
        kind: String,
        #[serde(default)]
        name: String,
        controller: Option<bool>,
    }
    let owners: Vec<Owner> = null_as_default(deserializer)?;
    let controller = owners.iter().find(|owner| owner.controller == Some(true));
    Ok(controller.map(|owner| owner_name(&owner.api_version, &owner.kind, &owner.name)))
}

impl Metadata {
    /// A namespaced object without a namespace is in `default`.
    pub fn namespace(&self) -> Arc<str> {
        self.namespace.clone().filter(|namespace| !namespace.is_empty()).unwrap_or_else(|| "default".into())
    }
}

/// All keys and values of an object's annotations together.
pub const MAX_ANNOTATION_BYTES: usize = 256 * 1024;

/// Checks name, namespace, labels and annotations. A missing name is reported elsewhere.
pub fn check_metadata(metadata: &Metadata, errors: &mut Errors) {
    if errors.has_accepted_metadata() {
        return;
    }
    if !metadata.name.is_empty() && !is_subdomain(&metadata.name) {
        errors.add(&Path::Root("metadata.name"), format!("\"{}\" is not a name: {NAME_RULE}", metadata.name));
    }
    if let Some(namespace) = metadata.namespace.as_deref().filter(|it| !it.is_empty() && !is_dns_label(it)) {
        let message = format!(
            "\"{namespace}\" is not a namespace: at most 63 of a-z 0-9 -, starting and ending with a letter or digit"
        );
        errors.add(&Path::Root("metadata.namespace"), message);
    }
    check_labels(&metadata.labels, &Path::Root("metadata.labels"), errors);
    check_annotations(&metadata.annotations, &Path::Root("metadata.annotations"), errors);
}

pub fn check_labels(labels: &Labels, path: &Path<'_>, errors: &mut Errors) {
    for (key, value) in labels {
        if let Some(why) = label_key_error(key) {
            errors.add(path, format!("\"{key}\": {why}"));
        }
        if let Some(why) = label_value_error(value) {
            errors.add(path, format!("\"{value}\": {why}"));
        }
    }
}

/// Keys are those of labels, in any case; values are free, and the whole is bounded. API servers convert keys to lower case character by
/// character, as Go's `strings.ToLower` does: `İ` becomes `i`, and not `i` with a dot above.
pub fn check_annotations(annotations: &Labels, path: &Path<'_>, errors: &mut Errors) {
    for key in annotations.keys() {
        if let Some(why) = label_key_error(&lower_case(key)) {
            errors.add(path, format!("\"{key}\": {why}"));
        }
    }
    let bytes: usize = annotations.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAX_ANNOTATION_BYTES {
        errors.add(path, format!("{bytes} bytes; {MAX_ANNOTATION_BYTES} are allowed"));
    }
}

fn lower_case(text: &str) -> String {
    text.chars().map(|character| character.to_lowercase().next().unwrap_or(character)).collect()
}
