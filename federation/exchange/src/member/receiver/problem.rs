//! Why an object cannot be used here.

use bytes::Bytes;

use super::super::model::ManifestKind;
use crate::codec::DecodeError;

/// Checks whether this version can read a manifest.
pub trait Check: std::fmt::Debug + Send + Sync {
    /// # Errors
    /// What is wrong with the manifest, with the field.
    fn check(&self, kind: ManifestKind, json: &Bytes) -> Result<(), String>;
}

/// Why an object cannot be used here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectProblem {
    #[error("{0}")]
    Malformed(String),
    #[error("this version does not know feature {0}")]
    FeatureUnknown(String),
    #[error("its tier does not exist: the last version with a tier stays in force, if there is one")]
    TierMissing,
    #[error("an object of this kind cannot come from this origin")]
    WrongKind,
    #[error("not an object")]
    NotAnObject,
}

impl From<DecodeError> for ObjectProblem {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::Malformed(why) => Self::Malformed(why),
            DecodeError::FeatureUnknown(feature) => Self::FeatureUnknown(feature),
            DecodeError::KindNotPublishable(_) => Self::WrongKind,
        }
    }
}
