//! The federated objects: which kind and name a manifest has, and whether it may enter the store.

use std::sync::Arc;

use hanse_api::Object;
use hanse_api::federated::FederatedObject;
use hanse_identity::spiffe::{check_label, check_subdomain};
use serde::Deserialize;

use crate::grants::MemberCluster;

/// Largest manifest, in bytes.
pub const MAX_MANIFEST_BYTES: usize = 256 << 10;

/// The kinds of `hanse.dev/v1alpha1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    FederatedNetworkPolicy,
    FederatedNetworkSet,
    MemberCluster,
    StagedFederatedNetworkPolicy,
    Tier,
}

/// An object's kind and name. Its fields are the store's key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId {
    pub kind: Kind,
    pub name: Arc<str>,
}

impl Kind {
    pub const ALL: [Self; 5] = [
        Self::FederatedNetworkPolicy,
        Self::FederatedNetworkSet,
        Self::MemberCluster,
        Self::StagedFederatedNetworkPolicy,
        Self::Tier,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::FederatedNetworkPolicy => "FederatedNetworkPolicy",
            Self::FederatedNetworkSet => "FederatedNetworkSet",
            Self::MemberCluster => "MemberCluster",
            Self::StagedFederatedNetworkPolicy => "StagedFederatedNetworkPolicy",
            Self::Tier => "Tier",
        }
    }

    /// Whether it is a policy, enforced or staged: in a tier, for clusters.
    pub fn is_policy(self) -> bool {
        matches!(self, Self::FederatedNetworkPolicy | Self::StagedFederatedNetworkPolicy)
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl std::fmt::Display for ObjectId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.kind.name(), self.name)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    api_version: String,
    kind: String,
    metadata: Metadata,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    name: String,
}

/// What a valid manifest is.
#[derive(Debug, Clone)]
pub struct Checked {
    pub id: ObjectId,
    /// The tier of a policy.
    pub tier: Option<Arc<str>>,
    /// The grants of a MemberCluster.
    pub member: Option<MemberCluster>,
    /// What its author should know though it is valid.
    pub warnings: Vec<String>,
}

/// Validates a manifest (JSON). Every process of this version can read an accepted manifest.
///
/// # Errors
/// What is wrong, naming the field.
pub fn check(manifest: &[u8]) -> Result<Checked, String> {
    if manifest.len() > MAX_MANIFEST_BYTES {
        return Err("a manifest has at most 256 KiB".to_owned());
    }
    let head: Head = serde_json::from_slice(manifest).map_err(|e| format!("the manifest cannot be read: {e}"))?;
    if head.api_version != "hanse.dev/v1alpha1" {
        return Err(format!("apiVersion: '{}' is not hanse.dev/v1alpha1", head.api_version));
    }
    let kind = Kind::from_name(&head.kind).ok_or_else(|| match head.kind.as_str() {
        kind @ ("ClusterSet" | "ClusterJoinToken") => {
            format!("kind: {kind} is for the operator: apply it with kubectl to the management cluster")
        }
        other => format!("kind: '{other}' is not a kind of hanse.dev/v1alpha1"),
    })?;
    check_subdomain(&head.metadata.name).map_err(|e| format!("metadata.name: {e}"))?;
    if kind == Kind::MemberCluster {
        check_label(&head.metadata.name).map_err(|e| format!("metadata.name: {e}"))?;
    }
    let read = FederatedObject::read(manifest);
    let object = read.object()?;
    let id = ObjectId { kind, name: head.metadata.name.into() };
    Ok(Checked { tier: tier_of(object), member: MemberCluster::of(object), warnings: warnings(object), id })
}

/// Warnings for the author of a valid object.
pub fn warnings(object: &Object) -> Vec<String> {
    let Object::Member(member) = object else { return Vec::new() };
    let is_final = "spec.federatedAllow: ignored; the operator of the cluster grants Final when it joins";
    let grants = MemberCluster::of(object).map(|member| member.warnings()).unwrap_or_default();
    let acceptance =
        "spec.acceptance: ignored without an operator; use `hanse cluster accept` or `hanse cluster revoke`";
    let ignored = [(member.federated_allow_final, is_final), (member.acceptance.is_some(), acceptance)];
    ignored.into_iter().filter(|(given, _)| *given).map(|(_, text)| text.to_owned()).chain(grants).collect()
}

/// The tier of a policy.
pub fn tier_of(object: &Object) -> Option<Arc<str>> {
    match object {
        Object::FederatedPolicy(policy) => Some(Arc::clone(policy.tier())),
        _ => None,
    }
}

/// The tier that a policy names which this version cannot read.
pub fn tier_in(manifest: &[u8]) -> Option<Arc<str>> {
    #[derive(Deserialize)]
    struct Policy {
        spec: Spec,
    }
    #[derive(Deserialize)]
    struct Spec {
        tier: Arc<str>,
    }
    let policy: Policy = serde_json::from_slice(manifest).ok()?;
    Some(policy.spec.tier).filter(|tier| !tier.is_empty())
}

/// Whether a Tier requires approvals, also one that this version cannot read.
pub fn requires_approval(manifest: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Tier {
        spec: Option<Spec>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Spec {
        require_approval: Option<bool>,
    }
    let tier: Option<Tier> = serde_json::from_slice(manifest).ok();
    tier.and_then(|tier| tier.spec).and_then(|spec| spec.require_approval).unwrap_or_default()
}
