//! Applies batches, and new grants, in parts.

use std::sync::Arc;

use super::granted::Granted;
use super::update::Work;
use super::{Applying, Batch, BatchError, Changes, Origin, Regranting};
use crate::hub::selections::Selections;
use crate::model::{Grant, Position};

impl Origin {
    /// Begins to apply a batch, which [`Self::step`] does.
    ///
    /// # Errors
    /// When the batch does not follow the present state; nothing has changed then.
    pub fn begin(&mut self, batch: Batch, position: Position) -> Result<Applying, BatchError> {
        let same_epoch = self.synced && position.epoch == self.position.epoch;
        if self.synced && position.epoch < self.position.epoch {
            return Err(BatchError::OldEpoch(position.epoch));
        }
        if !batch.snapshot && !same_epoch {
            return Err(BatchError::NoSnapshot);
        }
        if same_epoch && position.revision < self.position.revision {
            return Err(BatchError::OldRevision(position.revision));
        }
        if batch.snapshot {
            self.overflow.clear();
        }
        self.applying = Some(position.revision);
        Ok(batch.end(position, same_epoch))
    }

    /// Applies the next part of a batch, of about `slice` updates, and returns whether it was the last. After the changes were
    /// reported, [`Self::settle`] must be called. Between two parts the origin is consistent, but not a state of its publisher.
    pub fn step(&mut self, batch: &mut Applying, selections: &Selections, slice: usize) -> (Changes, bool) {
        self.version += 1;
        let mut left = slice;
        let revision = batch.position.revision;
        let mut work = Work::default();
        let done = loop {
            if left == 0 {
                break false;
            }
            // Reading an update costs much less than applying it.
            if let Some(read) = batch.read() {
                left = left.saturating_sub(read / 16);
            } else if batch.removals.is_none() {
                left = left.saturating_sub(self.find_removals(batch, left.saturating_mul(16)) / 16);
            } else if let Some(id) = batch.removals.as_mut().and_then(Vec::pop) {
                self.overflow.refused.remove(&id);
                self.remove(id, &mut work);
                if batch.same_epoch {
                    self.history.push(revision, id);
                }
                let cost = self.take_cost(&mut work, selections, selections.evaluated());
                left = left.saturating_sub(1 + cost);
            } else if let Some((id, bytes)) = batch.updates.pop_first() {
                if let Some(bytes) = bytes {
                    self.put(id, &bytes, revision, &mut work);
                    left = left.saturating_sub(1 + self.judge_attached(&mut work, selections));
                }
            } else {
                left = self.judge_queued(&mut work, selections, left);
                if self.queue.is_empty() {
                    break true;
                }
            }
        };
        if done {
            self.overflow.unreadable += batch.unreadable;
            if !batch.same_epoch {
                self.history.restart(revision);
            }
            self.position = batch.position;
            self.synced = true;
            self.applying = None;
        }
        self.history.trim();
        let changes = self.recompute(work, revision);
        if done && batch.snapshot {
            self.overflow.requested = self.overflow.requested.map(|_| self.kept.room(&*self.granted.grant));
            // What grew by doubling is a third too large, and most origins change little afterwards.
            self.shrink();
        }
        (changes, done)
    }

    /// Finds the removals of a batch that was read: those in it, and of a snapshot the objects that it does not name, in at most
    /// `most` slots. Returns how many were looked at.
    fn find_removals(&self, batch: &mut Applying, most: usize) -> usize {
        if batch.snapshot {
            let most = u32::try_from(most.max(1)).unwrap_or(u32::MAX);
            let next = batch.scanned.saturating_add(most).min(self.objects.bound());
            let ids = (batch.scanned..next).filter_map(|slot| self.entry(slot)).map(|entry| entry.id);
            let gone = ids.filter(|id| !batch.same_epoch || !batch.updates.contains_key(id));
            batch.found.extend(gone);
            let scanned = next - batch.scanned;
            batch.scanned = next;
            if scanned > 0 {
                return scanned as usize;
            }
        }
        let mut removals = std::mem::take(&mut batch.found);
        removals.extend(batch.updates.iter().filter(|(_, bytes)| bytes.is_none()).map(|(id, _)| *id));
        removals.sort_unstable();
        removals.dedup();
        // They are taken from the end.
        removals.reverse();
        batch.removals = Some(removals);
        batch.updates.len()
    }

    fn shrink(&mut self) {
        self.objects.shrink();
        self.addresses.shrink();
        self.profiles.shrink();
    }

    /// Begins to judge everything again under another grant, which [`Self::regrant_step`] does. The origin's position stays;
    /// views of other grants have another token.
    pub fn regrant(&mut self, grant: Arc<dyn Grant>) {
        self.version += 1;
        self.granted = Granted::new(grant);
        self.regranting = Some(Regranting::default());
    }

    /// Judges the next `slice` objects, or profiles with about as many endpoints, under the present grant; whether those were the
    /// last. After the changes were reported, [`Self::settle`] must be called.
    pub fn regrant_step(&mut self, selections: &Selections, slice: usize) -> (Changes, bool) {
        let Some(Regranting { mut slot, mut is_queued }) = self.regranting else { return (Changes::default(), true) };
        self.version += 1;
        let mut work = Work::default();
        let (mut left, slots) = (slice, self.objects.bound());
        while left > 0 && slot < slots {
            self.put_again(slot, &mut work);
            let cost = self.take_cost(&mut work, selections, selections.evaluated());
            left = left.saturating_sub(1 + cost);
            slot += 1;
        }
        if slot == slots && !is_queued {
            // Which selections match may depend on the grant as well: that follows when all objects are judged.
            self.queue.add(self.profiles.iter().map(|(id, _)| id));
            is_queued = true;
        }
        if is_queued {
            self.judge_queued(&mut work, selections, left);
        }
        let done = is_queued && self.queue.is_empty();
        self.regranting = (!done).then_some(Regranting { slot, is_queued });
        let revision = self.applying.unwrap_or(self.position.revision);
        (self.recompute(work, revision), done)
    }
}
