//! What several kinds need to decode their fields.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::document::Node;
use crate::field::FieldError;

/// A node as a type; the error names the field, also one that is missing.
pub fn typed<T: DeserializeOwned>(node: Node<'_>) -> Result<T, Vec<FieldError>> {
    T::deserialize(node).map_err(|error| {
        let path = error.path(node);
        let message = error.message_at(&path);
        let missing = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
        vec![match missing {
            None => FieldError { path, message },
            Some(name) if path.is_empty() => FieldError { path: name.to_owned(), message: "is missing".to_owned() },
            Some(name) => FieldError { path: format!("{path}.{name}"), message: "is missing".to_owned() },
        }]
    })
}

/// `null` counts as absent, as an API server has it.
pub(crate) fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a number or a string")]
pub enum IntOrString {
    Int(i64),
    String(String),
}
