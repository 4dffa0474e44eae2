//! The records of the store, as JSON. Fields are only added, with defaults, so that neighbouring versions are compatible.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use hanse_exchange::hubs::{MAX_ANNOUNCED, read_list};
use hanse_kubernetes::change::digest;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tracing::warn;

use crate::manifest;
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

/// `hub/<replica>`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// HOST:PORT.
    pub addresses: Vec<String>,
}

impl ReplicaRecord {
    /// The addresses in a record, as far as this version can read them.
    pub(super) fn read(replica: &str, bytes: &Bytes) -> BTreeSet<String> {
        let record: Self = match decode(bytes) {
            Ok(record) => record,
            Err(error) => {
                warn!(replica, %error, "record of a replica of the hub not readable: its addresses are not sent to members");
                return BTreeSet::new();
            }
        };
        let (addresses, refused) = read_list(&record.addresses);
        if refused > 0 {
            warn!(replica, refused, "addresses of a replica of the hub not readable: they are not sent to members");
        }
        addresses.into_iter().take(MAX_ANNOUNCED).collect()
    }
}

/// `operator/<identity>`: the state of the operator and the webhook of one hub.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OperatorRecord {
    /// Since when it has the Lease, in seconds since 1970.
    #[serde(default)]
    pub leads_since: Option<u64>,
    /// The process that has the Lease, as this one read it.
    #[serde(default)]
    pub leader: Option<String>,
    /// The first problems, and their number.
    #[serde(default)]
    pub problems: Vec<OperatorProblem>,
    #[serde(default)]
    pub total: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OperatorProblem {
    pub reason: String,
    pub message: String,
    /// In seconds since 1970.
    pub since: u64,
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
    /// The audit log has a record `audit-detail/<number>` of this change.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detailed: bool,
}

/// `audit-detail/<number>`: the manifest before and after a change, each cut to [`MAX_DETAIL_BYTES`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditDetail {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub before: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub after: String,
}

/// The longest manifest in the audit log: 10,000 records × 2 × 8 KiB is 160 MiB at most. Policies have 1 KiB, usually.
pub const MAX_DETAIL_BYTES: usize = 8 << 10;

impl AuditDetail {
    /// From manifests; `None` where the object did not, or does not exist.
    pub fn of(before: Option<&[u8]>, after: Option<&[u8]>) -> Self {
        let cut = |manifest: Option<&[u8]>| {
            let text = String::from_utf8_lossy(manifest.unwrap_or_default());
            match text.len() {
                0..=MAX_DETAIL_BYTES => text.into_owned(),
                len => format!("{}… ({len} bytes)", &text[..text.floor_char_boundary(MAX_DETAIL_BYTES)]),
            }
        };
        Self { before: cut(before), after: cut(after) }
    }
}

/// What a change of a custom resource does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChangeAction {
    /// Creates or updates it.
    Apply,
    Delete,
}

/// `change/<uid>/<id>`: a change of a custom resource with this UID that the admission webhook allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeRecord {
    /// Seconds since 1970.
    pub at: u64,
    /// The user that sent it, such as `kubernetes/ada`.
    pub who: String,
    pub action: ChangeAction,
    /// The generation of the object with this change; of a deletion, the one before.
    pub generation: i64,
    /// The digest of the manifest with this change; of a deletion, the one before.
    pub digest: String,
    /// The audit log says that it waits for an approval.
    #[serde(default)]
    pub proposed: bool,
}

/// `approval/<uid>`: a PolicyApproval with this UID whose creation the admission webhook allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalRecord {
    /// Seconds since 1970.
    pub at: u64,
    /// The user that approved.
    pub who: String,
    /// The object, such as `FederatedNetworkPolicy/web`.
    pub object: String,
    /// The UID of the object.
    pub uid: String,
    pub action: ChangeAction,
    pub generation: i64,
    pub digest: String,
    /// The PolicyApproval exists: only then the approval has an effect, and the audit log has it.
    #[serde(default)]
    pub seen: bool,
}

/// `proposal/<kind>/<name>`: a change that waits for an approval, at a hub without an operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProposalRecord {
    /// The users that sent it, such as `user/ada`.
    pub authors: BTreeSet<String>,
    pub action: ChangeAction,
    /// The manifest with the change; empty for a deletion.
    pub manifest: String,
    /// Of the action, of the manifests before and after it, and of `nonce`.
    pub digest: String,
    /// Distinguishes this proposal from all others. Empty: of an earlier version of the hub.
    #[serde(default)]
    pub nonce: String,
    /// When it was sent first, in seconds since 1970.
    #[serde(default)]
    pub at: u64,
    #[serde(skip)]
    pub tier: TierOnce,
}

/// The tier that the manifest of a proposal names, read when it is first needed: it does not distinguish proposals.
#[derive(Debug, Clone, Default)]
pub struct TierOnce(OnceLock<Option<Arc<str>>>);

impl PartialEq for TierOnce {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for TierOnce {}

impl ProposalRecord {
    /// The tier that the manifest names. It is parsed once for all views of the store.
    pub fn tier(&self) -> Option<Arc<str>> {
        self.tier.0.get_or_init(|| manifest::tier_in(self.manifest.as_bytes())).clone()
    }

    /// The digest of a change from the manifest in force, if the object exists. The same manifest has another digest where it creates
    /// an object, where it follows another version, where it is deleted, and where it is proposed again: an approval of one of these is
    /// not one of the others.
    pub fn digest(action: ChangeAction, before: Option<&[u8]>, after: &[u8], nonce: &str) -> String {
        let before = before.map_or_else(|| "absent".to_owned(), digest);
        let (action, after) = match action {
            ChangeAction::Apply => ("apply", digest(after)),
            ChangeAction::Delete => ("delete", "absent".to_owned()),
        };
        match nonce {
            "" => digest(format!("{action} {before} {after}").as_bytes()),
            nonce => digest(format!("{action} {before} {after} {nonce}").as_bytes()),
        }
    }
}

impl ChangeRecord {
    /// The same request has always the same id.
    pub fn id(&self) -> String {
        let text = format!("{:?}\0{}\0{}\0{}", self.action, self.generation, self.digest, self.who);
        Sha256::digest(text.as_bytes()).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }

    pub fn is_version(&self, action: ChangeAction, generation: i64, digest: &str) -> bool {
        self.action == action && self.generation == generation && self.digest == digest
    }
}

pub fn encode(record: &impl Serialize) -> Bytes {
    // Records consist of strings, numbers and lists, which always serialize.
    Bytes::from(serde_json::to_vec(record).expect("a record is JSON"))
}

pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(bytes)
}
