//! The records of the store, as JSON. Fields are only added, with defaults, so that neighbouring versions are compatible.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::roles::Role;

/// `token/<id>`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    pub cluster: String,
    /// SHA-256 of the secret, in hexadecimal. The secret itself is not stored.
    pub secret_hash: String,
    /// Seconds since 1970.
    pub expires_at: u64,
    /// The cluster is accepted at once.
    pub accept: bool,
    /// The key that presented it first.
    #[serde(default)]
    pub bound_key: Option<String>,
    pub created_by: String,
    /// The ClusterJoinToken that requested it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub custom_resource: Option<CustomResource>,
}

/// The custom resource of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CustomResource {
    pub uid: String,
    /// The Secret was written. Otherwise, it may have been.
    pub is_written: bool,
}

/// `meta/settings`: the settings of the ClusterSet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    #[serde(default)]
    pub lease_seconds: Option<u64>,
}

/// `member/<cluster>`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// The hash of the registered public key.
    pub key: String,
    /// The key of the certificate that requested the last renewal. It stays valid until the next renewal or the end of its
    /// certificate, so that its connections survive the change. It may only repeat the renewal whose response was lost.
    #[serde(default)]
    pub previous_key: Option<String>,
    pub state: MemberState,
    /// Seconds since 1970; 0 when no certificate was issued yet.
    #[serde(default)]
    pub certificate_expires_at: u64,
    #[serde(default)]
    pub federated_allow_final: bool,
    /// The token that it joined with.
    #[serde(default)]
    pub token: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MemberState {
    Pending,
    Accepted,
    Revoked { reason: String },
}

/// `user/<name>`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRecord {
    pub key: String,
    #[serde(default)]
    pub previous_key: Option<String>,
    pub roles: Vec<Role>,
    #[serde(default)]
    pub revoked: bool,
    #[serde(default)]
    pub certificate_expires_at: u64,
}

/// `audit/<number>`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    pub at: u64,
    pub who: String,
    pub action: String,
    pub object: String,
    pub outcome: String,
}

pub fn encode(record: &impl Serialize) -> Bytes {
    // Records consist of strings, numbers and lists, which always serialize.
    Bytes::from(serde_json::to_vec(record).expect("a record is JSON"))
}

pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(bytes)
}
