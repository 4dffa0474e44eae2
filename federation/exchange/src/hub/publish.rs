//! Publishing streams: a batch is staged, applied at its end, and answered with refusals and the acknowledgement.

use hanse_policy::model::ClusterName;

use super::exchange::Exchange;
use super::origin::{Batch, BatchError, Origin, StagedLimits};
use super::publisher::{Applying, PublishId, Publisher, Waiting};
use crate::limits::{MAX_NUMBER, PROTOCOL};
use crate::message::{PublishRequest as Request, PublishResponse as Response, Refusals};
use crate::model::ReportedState;

/// The error of a frame or an end outside a batch.
const NO_BATCH: &str =
    "no batch has begun, another stream of the cluster has begun one since, or there was no room for it";
const NOT_OPEN: PublishError = PublishError::Protocol("the first message is not open");
/// Batches that have begun and not ended, of all clusters together: three snapshots of 300,000 endpoints of 250 bytes.
const MAX_STAGED_BYTES: usize = 256 << 20;
/// Refusals that one message names.
const MAX_REFUSALS: usize = 256;

/// The result of a message.
#[derive(Debug)]
pub enum Published {
    Answers(Vec<Response>),
    /// A part of a batch was applied; the rest is for [`Exchange::publish_more`].
    More,
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
    #[error("{what} {number}: the greatest is {}", MAX_NUMBER)]
    Number { what: &'static str, number: u64 },
    #[error("unfinished batches of all clusters have more than {} MiB, this one most of it", MAX_STAGED_BYTES >> 20)]
    NoRoom,
    #[error("the hub has newer data of the cluster: a second member may publish in its name")]
    Behind,
}

/// Whether a publisher may use a number.
fn check_number(what: &'static str, number: u64) -> Result<(), PublishError> {
    if number > MAX_NUMBER { Err(PublishError::Number { what, number }) } else { Ok(()) }
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
            waiting: None,
            resyncing: false,
            sent_refusals: Vec::new(),
            answers: None,
        };
        self.publishers.insert(id, publisher);
        if let Some(origin) = self.origin_of(&cluster) {
            origin.publisher_opens();
        }
        id
    }

    /// The stream ended. What was published stays, and the rest of a batch that is being applied is for [`Self::publish_more`].
    pub fn publish_close(&mut self, id: PublishId) {
        self.publishers.remove(&id);
    }

    /// Takes one message and returns the answers.
    ///
    /// # Errors
    /// When the stream must be closed: the caller violates the protocol, or is not accepted any more.
    pub fn publish(&mut self, id: PublishId, request: Request) -> Result<Vec<Response>, PublishError> {
        let mut published = self.publish_part(id, request)?;
        loop {
            match published {
                Published::Answers(answers) => return Ok(answers),
                Published::More => published = self.publish_more(id)?,
            }
        }
    }

    /// Goes on with the batch that a stream has ended, also after the stream was closed.
    ///
    /// # Errors
    /// When its cluster was removed meanwhile, another stream of the cluster has begun a batch since, or the stream is closed and
    /// its batch is applied.
    pub fn publish_more(&mut self, id: PublishId) -> Result<Published, PublishError> {
        let of_stream = self.applying.iter().find(|(_, applying)| applying.publisher == id).map(|(number, _)| *number);
        // It waits for the batch of another stream of the cluster.
        let waits_for = self.publishers.get(&id).filter(|publisher| publisher.waiting.is_some());
        let waits_for = waits_for.and_then(|publisher| self.origin_numbers.get(&publisher.cluster).copied());
        if let Some(number) = of_stream.or(waits_for).filter(|number| self.applying.contains_key(number)) {
            self.advance(number);
            if of_stream.is_none() || self.applying.contains_key(&number) {
                return Ok(Published::More);
            }
        }
        let publisher = self.publishers.get_mut(&id).ok_or(PublishError::NotAccepted)?;
        if let Some(waiting) = publisher.waiting.take() {
            return self.publish_batch(id, waiting);
        }
        if let Some(answers) = publisher.answers.take() {
            return Ok(Published::Answers(answers));
        }
        match self.hub.federation.clusters.contains_key(&publisher.cluster) {
            true => Err(PublishError::Protocol(NO_BATCH)),
            false => Err(PublishError::NotAccepted),
        }
    }

    /// As [`Self::publish`], without waiting for a large batch to be applied.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub fn publish_part(&mut self, id: PublishId, request: Request) -> Result<Published, PublishError> {
        let publisher = self.publishers.get_mut(&id).ok_or(PublishError::Protocol("closed"))?;
        let cluster = publisher.cluster.clone();
        let answers = match request {
            Request::Open { protocol, epoch, .. } => {
                if protocol != PROTOCOL {
                    return Err(PublishError::Version(protocol));
                }
                check_number("epoch", epoch)?;
                publisher.epoch = Some(epoch);
                let number = self.origin_number(&cluster).ok_or(PublishError::NotAccepted)?;
                let published = self.origins[number].as_ref().filter(|o| o.synced).map(|o| o.position);
                vec![Response::Welcome { published, heartbeat_ms: self.heartbeat_ms }]
            }
            _ if publisher.epoch.is_none() => return Err(NOT_OPEN),
            Request::Begin { snapshot } => {
                // Of all streams of a cluster only the newest batch is staged.
                for other in self.publishers.values_mut().filter(|other| other.cluster == cluster) {
                    (other.staged, other.waiting) = (None, None);
                }
                let publisher = self.publishers.get_mut(&id).ok_or(PublishError::Protocol("closed"))?;
                publisher.resyncing &= !snapshot;
                publisher.staged = Some(Batch::of(snapshot));
                Vec::new()
            }
            Request::Frame(bytes) => {
                let batch = publisher.staged.as_mut().ok_or(PublishError::Protocol(NO_BATCH))?;
                let state = self.hub.federation.clusters.get(&cluster).ok_or(PublishError::NotAccepted)?;
                let put = batch.put(&bytes, StagedLimits::of(&*state.grant));
                put.map_err(|_| PublishError::Protocol("a frame that cannot be read"))?;
                if self.staged_bytes() > MAX_STAGED_BYTES {
                    self.drop_largest(id)?;
                }
                Vec::new()
            }
            Request::End { position, digest } => {
                let batch = publisher.staged.take().ok_or(PublishError::Protocol(NO_BATCH))?;
                if publisher.resyncing {
                    return Ok(Published::Answers(Vec::new()));
                }
                check_number("epoch", position.epoch)?;
                check_number("revision", position.revision)?;
                return self.publish_batch(id, Waiting { batch, position, digest });
            }
            Request::Report(_) => return Err(PublishError::Protocol("a report is taken by itself")),
            // The grant may be wider now, or other objects were removed: objects that were not kept are requested again.
            Request::Heartbeat { .. } => match self.origin_of(&cluster).is_some_and(Origin::requests_snapshot) {
                true => vec![Response::Resync { reason: "there is room for objects that were refused".to_owned() }],
                false => Vec::new(),
            },
        };
        Ok(Published::Answers(answers))
    }

    /// Stores the report of a cluster about the data that it has received.
    ///
    /// # Errors
    /// When the stream was not opened.
    pub fn publish_report(&mut self, id: PublishId, report: ReportedState) -> Result<(), PublishError> {
        let publisher = self.publishers.get(&id).ok_or(PublishError::Protocol("closed"))?;
        if publisher.epoch.is_none() {
            return Err(NOT_OPEN);
        }
        if self.hub.federation.clusters.contains_key(&publisher.cluster) {
            self.reports.insert(publisher.cluster.clone(), report);
        }
        Ok(())
    }

    /// Bytes of the batches that have begun and are not being applied.
    pub fn staged_bytes(&self) -> usize {
        self.publishers.values().map(Publisher::staged_bytes).sum()
    }

    /// Drops the largest staged batch of all clusters. It is an error if that is the batch of this stream, whose publisher starts again.
    fn drop_largest(&mut self, id: PublishId) -> Result<(), PublishError> {
        let largest = self.publishers.iter_mut().max_by_key(|(_, publisher)| publisher.staged_bytes());
        let Some((largest, publisher)) = largest else { return Ok(()) };
        (publisher.staged, publisher.waiting) = (None, None);
        if *largest == id { Err(PublishError::NoRoom) } else { Ok(()) }
    }

    /// Whether a cluster has published since this hub started.
    pub fn has_published(&self, cluster: &ClusterName) -> bool {
        self.origin(cluster).is_some_and(|origin| origin.synced)
    }

    fn publish_batch(&mut self, id: PublishId, ended: Waiting) -> Result<Published, PublishError> {
        let publisher = self.publishers.get(&id).ok_or(PublishError::NotAccepted)?;
        let cluster = publisher.cluster.clone();
        let number = self.origin_number(&cluster).ok_or(PublishError::NotAccepted)?;
        if self.applying.contains_key(&number) {
            if let Some(publisher) = self.publishers.get_mut(&id) {
                publisher.waiting = Some(ended);
            }
            return Ok(Published::More);
        }
        let Waiting { batch, position, digest } = ended;
        let Some(origin) = self.origins[number].as_mut() else { return Err(PublishError::NotAccepted) };
        match origin.begin(batch, position) {
            Ok(batch) => {
                self.applying.insert(number, Applying { publisher: id, batch, digest });
                self.publish_more(id)
            }
            // An older stream of the cluster, or a second member with its name. The next welcome states the present position.
            Err(BatchError::OldEpoch(_) | BatchError::OldRevision(_)) => Err(PublishError::Behind),
            Err(error @ BatchError::NoSnapshot) => {
                if let Some(publisher) = self.publishers.get_mut(&id) {
                    publisher.resyncing = true;
                }
                Ok(Published::Answers(vec![Response::Resync { reason: error.to_string() }]))
            }
        }
    }

    /// Applies the next part of an origin's batch and updates the classes.
    fn advance(&mut self, number: usize) {
        let Some(mut applying) = self.applying.remove(&number) else { return };
        let Some(origin) = self.origins[number].as_mut() else { return };
        let (first, before) = (!origin.synced, origin.position);
        let (changes, done) = origin.step(&mut applying.batch, &self.selections, self.slice);
        self.notify_classes(number, &changes);
        if !done {
            self.applying.insert(number, applying);
            return;
        }
        let position = applying.batch.position;
        let new_epoch = !first && position.epoch != before.epoch;
        let aging = self.origins[number].as_ref().map_or(0, Origin::aging_revision);
        for (id, receiver) in &mut self.receivers {
            if receiver.origin_moved(number, aging, first, new_epoch) {
                self.ready.insert(*id);
            }
        }
        self.applied(number, applying);
    }

    /// A batch was applied: its publisher is answered.
    fn applied(&mut self, number: usize, applying: Applying) {
        let Some(origin) = self.origins[number].as_ref() else { return };
        let (total, refusals) = origin.refusals(MAX_REFUSALS);
        let differs = applying.digest.is_some_and(|digest| digest != origin.digest_published());
        let missing = origin.is_incomplete();
        let Some(publisher) = self.publishers.get_mut(&applying.publisher) else { return };
        let mut answers = Vec::new();
        if publisher.sent_refusals != refusals {
            publisher.sent_refusals.clone_from(&refusals);
            answers.push(Response::Refusals(Refusals { refusals, total: total as u64 }));
        }
        // If objects could not be kept, the digests differ, and a snapshot would not help.
        if differs && !missing && !applying.batch.snapshot {
            publisher.resyncing = true;
            answers.push(Response::Resync { reason: "the digests differ".to_owned() });
        } else {
            answers.push(Response::Ack { position: applying.batch.position });
        }
        publisher.answers = Some(answers);
    }
}
