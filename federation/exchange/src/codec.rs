//! The wire format of the exchange. Each message and object is encoded and decoded here and nowhere else, for both sides.
//!
//! Only this module names the generated types. Limits of single objects are checked by [`object::decode_export`], those of
//! interests by [`crate::interest::read`].

use bytes::Bytes;
use hanse_proto::federation::v1 as pb;

use crate::model::{Position, Refusal};

pub mod frame;
pub mod object;
pub mod publish;
mod refusal;
pub mod selection;
pub mod watch;

/// Why a message or an object cannot be used; names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("{0}")]
    Malformed(String),
    #[error("this version does not know feature {0}")]
    FeatureUnknown(String),
    #[error("members do not publish {0}")]
    KindNotPublishable(&'static str),
}

impl From<DecodeError> for Refusal {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::Malformed(why) => Self::Malformed(why),
            DecodeError::FeatureUnknown(feature) => Self::FeatureUnknown(feature),
            DecodeError::KindNotPublishable(kind) => Self::KindNotPublishable(kind.into()),
        }
    }
}

pub fn digest_bytes(digest: u128) -> Bytes {
    Bytes::copy_from_slice(&digest.to_le_bytes())
}

pub fn read_digest(bytes: &[u8]) -> Option<u128> {
    bytes.try_into().ok().map(u128::from_le_bytes)
}

impl From<Position> for pb::Position {
    fn from(Position { epoch, revision }: Position) -> Self {
        Self { epoch, revision }
    }
}

impl From<pb::Position> for Position {
    fn from(pb::Position { epoch, revision }: pb::Position) -> Self {
        Self { epoch, revision }
    }
}

fn kind(snapshot: bool) -> pb::begin::Kind {
    match snapshot {
        true => pb::begin::Kind::Snapshot(pb::Snapshot {}),
        false => pb::begin::Kind::Delta(pb::Delta {}),
    }
}

fn is_snapshot(kind: Option<&pb::begin::Kind>) -> bool {
    matches!(kind, Some(pb::begin::Kind::Snapshot(_)))
}

fn required<T>(field: &str, value: Option<T>) -> Result<T, DecodeError> {
    value.ok_or_else(|| DecodeError::Malformed(format!("{field}: missing")))
}
