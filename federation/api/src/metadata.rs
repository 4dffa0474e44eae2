//! What an API server checks of any object's metadata.

use hanse_policy::inventory::Labels;

use crate::field::{Errors, Path};
use crate::kubernetes::Metadata;
use crate::network_policy::{is_dns_label, is_subdomain, label_key_error, label_value_error};

/// How most objects are named.
pub const NAME_RULE: &str = "at most 253 of a-z 0-9 - and ., in parts that start and end with a letter or digit";
/// All keys and values of an object's annotations together.
pub const MAX_ANNOTATION_BYTES: usize = 256 * 1024;

/// Name, namespace, labels and annotations. A name that is missing is complained of elsewhere.
pub fn check_metadata(metadata: &Metadata, errors: &mut Errors) {
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

/// Keys are those of labels, in any case; values are free, and the whole is bounded.
pub fn check_annotations(annotations: &Labels, path: &Path<'_>, errors: &mut Errors) {
    for key in annotations.keys() {
        if let Some(why) = label_key_error(&key.to_lowercase()) {
            errors.add(path, format!("\"{key}\": {why}"));
        }
    }
    let bytes: usize = annotations.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAX_ANNOTATION_BYTES {
        errors.add(path, format!("{bytes} bytes; {MAX_ANNOTATION_BYTES} are allowed"));
    }
}
