//! The state of one publishing stream.

use hanse_policy::model::ClusterName;

use super::origin::{self, Batch};
use crate::message::PublishResponse as Response;
use crate::model::{Position, Refusal};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublishId(pub(super) u64);

#[derive(Debug)]
pub(super) struct Publisher {
    pub(super) cluster: ClusterName,
    pub(super) epoch: Option<u64>,
    pub(super) staged: Option<Batch>,
    /// A batch that has ended, while that of another stream of the cluster is applied.
    pub(super) waiting: Option<Waiting>,
    /// A snapshot was requested. Until it arrives, all other batches are dropped.
    pub(super) resyncing: bool,
    pub(super) sent_refusals: Vec<(u64, Refusal)>,
    /// The answers to a batch that was applied.
    pub(super) answers: Option<Vec<Response>>,
}

impl Publisher {
    /// Bytes of its batches that are not being applied.
    pub(super) fn staged_bytes(&self) -> usize {
        let waiting = self.waiting.as_ref().map(|waiting| &waiting.batch);
        self.staged.iter().chain(waiting).map(Batch::bytes).sum()
    }
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) batch: Batch,
    pub(super) position: Position,
    pub(super) digest: Option<u128>,
}

/// A batch that is being applied.
#[derive(Debug)]
pub(super) struct Applying {
    pub(super) publisher: PublishId,
    pub(super) batch: origin::Applying,
    /// The publisher's digest of all of its objects.
    pub(super) digest: Option<u128>,
}
