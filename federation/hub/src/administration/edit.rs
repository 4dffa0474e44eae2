//! The changes that the operator makes for custom resources.

use std::sync::Arc;

use bytes::Bytes;

use crate::manifest::{self, ObjectId};

/// The author of the operator's changes in the audit log.
pub(super) const OPERATOR: &str = "operator";

/// A version of a custom resource.
#[derive(Debug, Clone, Default)]
pub(crate) struct Origin {
    pub uid: String,
    pub generation: i64,
}

/// A change that the operator makes for a custom resource.
#[derive(Debug, Clone)]
pub(crate) enum OperatorEdit {
    /// The manifest. Without a webhook, the tier of a policy need not exist.
    Apply(Bytes, Origin),
    Delete(ObjectId, Origin),
    /// Removes the registration of a cluster, its tokens and its MemberCluster, at once: none of them can exist without the others.
    RemoveCluster(Arc<str>),
}

impl OperatorEdit {
    /// The object. `None`: the manifest cannot be read, or it is a registration.
    pub(super) fn id(&self) -> Option<ObjectId> {
        match self {
            Self::Apply(manifest, _) => manifest::check(manifest).ok().map(|checked| checked.id),
            Self::Delete(id, _) => Some(id.clone()),
            Self::RemoveCluster(_) => None,
        }
    }
}
