//! The federated objects: which kind and name a manifest has, and whether it may enter the store.

use std::sync::Arc;

use hanse_api::manifest::{Manifests, Object, read_bytes};
use hanse_identity::spiffe::check_subdomain;
use serde::Deserialize;

use crate::grants::MemberCluster;

/// Largest manifest, in bytes.
pub const MAX_MANIFEST_BYTES: usize = 256 << 10;

/// Errors of one manifest that are named.
const MAX_ERRORS: usize = 8;

/// The kinds of `hanse.dev/v1alpha1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    FederatedNetworkPolicy,
    FederatedNetworkSet,
    MemberCluster,
    Tier,
}

/// An object's kind and name. Its fields are the store's key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId {
    pub kind: Kind,
    pub name: Arc<str>,
}

impl Kind {
    pub const ALL: [Self; 4] =
        [Self::FederatedNetworkPolicy, Self::FederatedNetworkSet, Self::MemberCluster, Self::Tier];

    pub fn name(self) -> &'static str {
        match self {
            Self::FederatedNetworkPolicy => "FederatedNetworkPolicy",
            Self::FederatedNetworkSet => "FederatedNetworkSet",
            Self::MemberCluster => "MemberCluster",
            Self::Tier => "Tier",
        }
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
    let kind = Kind::from_name(&head.kind)
        .ok_or_else(|| format!("kind: '{}' is not a kind of hanse.dev/v1alpha1", head.kind))?;
    check_subdomain(&head.metadata.name).map_err(|e| format!("metadata.name: {e}"))?;
    let id = ObjectId { kind, name: head.metadata.name.into() };
    read(&id, manifest)?;
    let mut checked = Checked { id, tier: None, warnings: Vec::new() };
    match kind {
        Kind::MemberCluster => {
            hanse_identity::spiffe::check_label(&checked.id.name).map_err(|e| format!("metadata.name: {e}"))?;
            checked.warnings = MemberCluster::from_manifest(manifest)?.1;
        }
        Kind::FederatedNetworkPolicy => checked.tier = Some(tier_of(manifest)?),
        Kind::FederatedNetworkSet | Kind::Tier => {}
    }
    Ok(checked)
}

/// Reads a manifest (JSON) as members will.
///
/// # Errors
/// Everything that is wrong, naming the fields.
pub fn read(id: &ObjectId, manifest: &[u8]) -> Result<Object, String> {
    let mut read = Manifests::default();
    read_bytes(&Arc::from(id.to_string()), manifest, &mut read);
    read.diagnostics.append(&mut read.refused_workloads);
    if !read.diagnostics.is_empty() {
        let errors = read.diagnostics.iter().take(MAX_ERRORS).map(|it| match it.field.as_str() {
            "" => it.message.clone(),
            field => format!("{field}: {}", it.message),
        });
        return Err(errors.collect::<Vec<_>>().join("; "));
    }
    match read.objects.pop() {
        Some(one) if read.objects.is_empty() && read.skipped.is_empty() && read.workloads.is_empty() => Ok(one.object),
        _ => Err("a manifest is one object".to_owned()),
    }
}

/// The tier that a policy names.
///
/// # Errors
/// When it names none.
pub fn tier_of(manifest: &[u8]) -> Result<Arc<str>, String> {
    #[derive(Deserialize)]
    struct Policy {
        spec: Spec,
    }
    #[derive(Deserialize)]
    struct Spec {
        #[serde(default)]
        tier: String,
    }
    let policy: Policy = serde_json::from_slice(manifest).map_err(|e| format!("spec: {e}"))?;
    if policy.spec.tier.is_empty() {
        return Err("spec.tier: a federated policy names its tier".to_owned());
    }
    Ok(policy.spec.tier.into())
}
