//! The state of one publishing stream.

use hanse_policy::model::ClusterName;

use super::origin::{self, Batch};
use crate::message::PublishResponse as Response;
use crate::model::Refusal;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublishId(pub(super) u64);

#[derive(Debug)]
pub(super) struct Publisher {
    pub(super) cluster: ClusterName,
    pub(super) epoch: Option<u64>,
    pub(super) staged: Option<Batch>,
    /// A snapshot was requested. Until it arrives, all other batches are dropped.
    pub(super) resyncing: bool,
    pub(super) sent_refusals: Vec<(u64, Refusal)>,
    /// The answers to a batch that was applied.
    pub(super) answers: Option<Vec<Response>>,
}

/// A batch that is being applied.
#[derive(Debug)]
pub(super) struct Applying {
    pub(super) publisher: PublishId,
    pub(super) batch: origin::Applying,
    /// The publisher's digest of all of its objects.
    pub(super) digest: Option<u128>,
}
