//! Names and labels as Kubernetes checks them.

use std::sync::Arc;

/// How most objects are named.
pub const NAME_RULE: &str = "at most 253 of a-z 0-9 - and ., in parts that start and end with a letter or digit";

/// RFC 1123: what most objects are named by.
pub fn is_subdomain(text: &str) -> bool {
    let label = |label: &str| {
        let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !label.is_empty() && label.bytes().all(inside) && !label.starts_with('-') && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

/// One part of a DNS name, lower case: at most 63 of a-z 0-9 -.
pub fn is_dns_label(text: &str) -> bool {
    text.len() <= 63 && !text.contains('.') && is_subdomain(text)
}

/// What makes `key` no label key: an optional DNS subdomain with `/`, and a name.
pub fn label_key_error(key: &str) -> Option<&'static str> {
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if !is_name(name) {
        return Some("a label's name has 1 to 63 of A-Z a-z 0-9 - _ . and starts and ends with a letter or digit");
    }
    if prefix.is_some_and(|prefix| !is_subdomain(prefix)) {
        return Some("the part before / must be a lowercase DNS name of at most 253 characters");
    }
    None
}

pub fn label_value_error(value: &str) -> Option<&'static str> {
    if value.is_empty() || is_name(value) {
        return None;
    }
    Some("a label's value has at most 63 of A-Z a-z 0-9 - _ . and starts and ends with a letter or digit")
}

fn is_name(text: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    text.len() <= 63
        && text.bytes().all(inside)
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.ends_with(|last: char| last.is_ascii_alphanumeric())
}

/// What makes `name` no port name (RFC 6335 as Kubernetes applies it).
pub fn port_name_error(name: &str) -> Option<&'static str> {
    if name.is_empty() || name.len() > 15 {
        return Some("it must have 1 to 15 characters");
    }
    if !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-') {
        return Some("only a-z, 0-9 and - are allowed in it");
    }
    if !name.bytes().any(|byte| byte.is_ascii_lowercase()) {
        return Some("it must contain at least one letter");
    }
    if name.contains("--") || name.starts_with('-') || name.ends_with('-') {
        return Some("hyphens must be single, and not at the ends");
    }
    None
}

/// The group of an `apiVersion`; the core group is empty.
pub fn group(api_version: &str) -> &str {
    api_version.rsplit_once('/').map_or("", |(group, _)| group)
}

/// `Deployment.apps/web`: how owners are named.
pub fn owner_name(api_version: &str, kind: &str, name: &str) -> Arc<str> {
    format!("{kind}.{}/{name}", group(api_version)).into()
}
