//! One publishing stream: stages a batch, applies it at its end, answers with refusals and the acknowledgement.

use std::sync::Arc;

use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use pb::publish_request::Message as Request;
use pb::publish_response::Message as Response;

use super::{Exchange, report};
use crate::exchange::model::Position;
use crate::exchange::origin::{Batch, BatchError, Origin, StagedLimits};
use crate::exchange::wire;

/// What is said of a frame, or of an end, where no batch is under way.
const NO_BATCH: &str = "no batch has begun, or another stream of the cluster has begun one since";
/// Refusals that one message names.
const MAX_REFUSALS: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublishId(u64);

#[derive(Debug)]
pub(super) struct Publisher {
    cluster: ClusterName,
    epoch: Option<u64>,
    staged: Option<Batch>,
    /// A snapshot was asked for, and until it comes everything else is dropped.
    resyncing: bool,
    told_refusals: Vec<pb::Refusal>,
}

/// Why a publishing stream is closed.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error("{0}")]
    Protocol(&'static str),
    #[error("protocol version {0} is not known here")]
    Version(u32),
    #[error("cluster is not accepted")]
    NotAccepted,
    #[error("what is held of the cluster is newer: does a second member publish in its name?")]
    Behind,
}

impl Exchange {
    /// A cluster opened a publishing stream.
    pub fn publish_open(&mut self, cluster: ClusterName) -> PublishId {
        let id = PublishId(self.next_id);
        self.next_id += 1;
        let publisher = Publisher {
            cluster: cluster.clone(),
            epoch: None,
            staged: None,
            resyncing: false,
            told_refusals: Vec::new(),
        };
        self.publishers.insert(id, publisher);
        if let Some(origin) = self.origin_of(&cluster) {
            origin.publisher_opens();
        }
        id
    }

    /// The stream ended. What was published stays.
    pub fn publish_close(&mut self, id: PublishId) {
        self.publishers.remove(&id);
    }

    /// Takes one message and returns the answers.
    ///
    /// # Errors
    /// When the stream must be closed: the caller does not speak the protocol, or is no longer accepted.
    pub fn publish(
        &mut self,
        id: PublishId,
        request: pb::PublishRequest,
    ) -> Result<Vec<pb::PublishResponse>, PublishError> {
        let publisher = self.publishers.get_mut(&id).ok_or(PublishError::Protocol("closed"))?;
        let cluster = publisher.cluster.clone();
        let answers = match request.message.ok_or(PublishError::Protocol("an empty message"))? {
            Request::Open(open) => {
                if open.protocol != wire::PROTOCOL {
                    return Err(PublishError::Version(open.protocol));
                }
                publisher.epoch = Some(open.epoch);
                let number = self.origin_number(&cluster).ok_or(PublishError::NotAccepted)?;
                let held = self.origins[number].as_ref().filter(|o| o.synced).map(|o| o.position.into());
                vec![Response::Welcome(pb::PublishWelcome { held, heartbeat_ms: self.heartbeat_ms })]
            }
            _ if publisher.epoch.is_none() => return Err(PublishError::Protocol("the first message is not open")),
            Request::Begin(begin) => {
                // One batch of a cluster is staged at a time, whatever its streams are: the newest.
                for other in self.publishers.values_mut().filter(|other| other.cluster == cluster) {
                    other.staged = None;
                }
                let publisher = self.publishers.get_mut(&id).ok_or(PublishError::Protocol("closed"))?;
                let snapshot = matches!(begin.kind, Some(pb::begin::Kind::Snapshot(_)));
                publisher.resyncing &= !snapshot;
                publisher.staged = Some(Batch { snapshot, ..Batch::default() });
                Vec::new()
            }
            Request::Frame(bytes) => {
                let batch = publisher.staged.as_mut().ok_or(PublishError::Protocol(NO_BATCH))?;
                let frame =
                    wire::read_frame(&bytes).map_err(|_| PublishError::Protocol("a frame that cannot be read"))?;
                let state = self.hub.federation.clusters.get(&cluster).ok_or(PublishError::NotAccepted)?;
                let limits = StagedLimits::of(&*state.grant);
                for id in frame.removals {
                    batch.put(id, None, limits);
                }
                for update in frame.upserts {
                    match wire::id_of_export(&update) {
                        Some(id) => batch.put(id, Some(&update), limits),
                        None => batch.unreadable += 1,
                    }
                }
                Vec::new()
            }
            Request::End(end) => {
                let batch = publisher.staged.take().ok_or(PublishError::Protocol(NO_BATCH))?;
                if publisher.resyncing {
                    return Ok(Vec::new());
                }
                let position = Position::from(end.position.ok_or(PublishError::Protocol("an end without a position"))?);
                self.publish_batch(id, &cluster, batch, position, wire::read_digest(&end.digest))?
            }
            Request::Realisation(realisation) => {
                if self.hub.federation.clusters.contains_key(&cluster) {
                    self.realisations.insert(cluster, Arc::new(report::taken(realisation)));
                }
                Vec::new()
            }
            // A grant may have been widened, or others of the objects have gone: what was not kept is asked for again.
            Request::Heartbeat(_) => match self.origin_of(&cluster).is_some_and(Origin::asks_again) {
                true => vec![Response::Resync(pb::Resync { reason: "there is room for what was refused".to_owned() })],
                false => Vec::new(),
            },
        };
        Ok(answers.into_iter().map(|message| pb::PublishResponse { message: Some(message) }).collect())
    }

    /// Whether a cluster has published since this hub started.
    pub fn has_published(&self, cluster: &ClusterName) -> bool {
        self.origin(cluster).is_some_and(|origin| origin.synced)
    }

    fn origin_of(&mut self, cluster: &ClusterName) -> Option<&mut Origin> {
        self.origin_numbers.get(cluster).and_then(|number| self.origins[*number].as_mut())
    }

    fn publish_batch(
        &mut self,
        id: PublishId,
        cluster: &ClusterName,
        batch: Batch,
        position: Position,
        digest: Option<u128>,
    ) -> Result<Vec<Response>, PublishError> {
        let number = self.origin_number(cluster).ok_or(PublishError::NotAccepted)?;
        let snapshot = batch.snapshot;
        let mut answers = Vec::new();
        match self.apply(number, batch, position) {
            Ok(()) => {}
            // An older stream of the same cluster, or a second member with its name. The next welcome says what is held.
            Err(BatchError::OldEpoch(_) | BatchError::OldRevision(_)) => return Err(PublishError::Behind),
            Err(error @ BatchError::NothingHeld) => {
                if let Some(publisher) = self.publishers.get_mut(&id) {
                    publisher.resyncing = true;
                }
                return Ok(vec![Response::Resync(pb::Resync { reason: error.to_string() })]);
            }
        }
        let Some(origin) = self.origins[number].as_ref() else { return Err(PublishError::NotAccepted) };
        let (total, refusals) = origin.refusals(MAX_REFUSALS);
        let refusals: Vec<pb::Refusal> = refusals.iter().map(|(id, why)| wire::refusal(*id, why)).collect();
        let differs = digest.is_some_and(|digest| digest != origin.digest_published());
        let missing = origin.overflowed() || origin.unreadable > 0;
        if let Some(publisher) = self.publishers.get_mut(&id) {
            if publisher.told_refusals != refusals {
                publisher.told_refusals.clone_from(&refusals);
                answers.push(Response::Refusals(pb::Refusals { refusals, total: total as u64 }));
            }
            // With objects that could not be kept the digests cannot be equal; a snapshot would not help.
            if differs && !missing && !snapshot {
                publisher.resyncing = true;
                answers.push(Response::Resync(pb::Resync { reason: "the digests differ".to_owned() }));
                return Ok(answers);
            }
        }
        answers.push(Response::Ack(pb::PublishAck { position: Some(position.into()) }));
        Ok(answers)
    }
}
