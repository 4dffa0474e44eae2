//! What stands in the store, as JSON. Fields are only added, with defaults, so that neighbouring versions read each other.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::roles::Role;

/// `token/<id>`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    pub cluster: String,
    /// SHA-256 of the secret, in hexadecimal. The secret itself is nowhere.
    pub secret_hash: String,
    /// Seconds since 1970.
    pub expires_at: u64,
    /// The cluster is accepted at once.
    pub accept: bool,
    /// The key that presented it first.
    #[serde(default)]
    pub bound_key: Option<String>,
    pub created_by: String,
}

/// `member/<cluster>`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// The hash of the registered public key.
    pub key: String,
    /// The key of the certificate that asked for the last renewal, so that its connections outlive the change: it holds until
    /// the next renewal or its certificate's end, and renews nothing but the answer that was lost.
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
    // Our records hold strings, numbers and lists of them: this does not fail.
    Bytes::from(serde_json::to_vec(record).expect("a record is JSON"))
}

pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(bytes)
}
