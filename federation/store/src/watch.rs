//! Recent changes and their readers. A reader that is too slow gets an error and lists again; nothing is queued for it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;

use crate::error::{StoreError, StoreFuture};
use crate::key::Prefix;
use crate::model::{Event, Revision};

/// Events kept: at most 16,384, with at most 64 MiB of values.
const MAX_EVENTS: usize = 16_384;
const MAX_BYTES: usize = 64 << 20;
/// Events returned by one call of [`Watch::next`], unless one transaction has more.
const MAX_BATCH: usize = 256;

#[derive(Debug)]
pub(crate) struct History {
    events: VecDeque<Event>,
    bytes: usize,
    /// All changes after this revision are kept.
    floor: Revision,
}

impl History {
    pub(crate) fn new(floor: Revision) -> Self {
        Self { events: VecDeque::new(), bytes: 0, floor }
    }

    pub(crate) fn push(&mut self, event: Event) {
        self.bytes += size(&event);
        self.events.push_back(event);
    }

    /// Drops whole transactions from the front while the limits are exceeded.
    pub(crate) fn trim(&mut self) {
        while self.events.len() > MAX_EVENTS || self.bytes > MAX_BYTES {
            let Some(first) = self.events.front().map(|e| e.revision) else { return };
            if self.events.back().is_some_and(|last| last.revision == first) {
                return;
            }
            self.floor = first;
            while self.events.front().is_some_and(|e| e.revision == first) {
                if let Some(event) = self.events.pop_front() {
                    self.bytes -= size(&event);
                }
            }
        }
    }

    pub(crate) fn floor(&self) -> Revision {
        self.floor
    }

    /// The next events after `after` up to `newest` below `prefix`, and the revision up to which nothing else is below it.
    fn after(&self, after: Revision, prefix: &Prefix, newest: Revision) -> (Vec<Event>, Revision) {
        let start = self.events.partition_point(|e| e.revision <= after);
        let mut found: Vec<Event> = Vec::new();
        for event in self.events.range(start..) {
            // A write is in the history a moment before `newest` includes it.
            if event.revision > newest {
                break;
            }
            if !prefix.matches(&event.key) {
                continue;
            }
            match found.last() {
                Some(last) if found.len() >= MAX_BATCH && last.revision != event.revision => {
                    let upto = last.revision;
                    return (found, upto);
                }
                _ => found.push(event.clone()),
            }
        }
        (found, newest)
    }
}

fn size(event: &Event) -> usize {
    128 + event.key.as_bytes().len() + event.entry.as_ref().map_or(0, |e| e.value.len())
}

/// The source of a [`Watch`]; each kind of store has its own.
pub trait Changes: fmt::Debug + Send {
    /// As [`Watch::next`].
    fn next(&mut self) -> StoreFuture<'_, Vec<Event>>;

    /// As [`Watch::revision`].
    fn revision(&self) -> Revision;
}

/// A reader of changes.
#[derive(Debug)]
pub struct Watch {
    changes: Box<dyn Changes>,
}

impl Watch {
    pub fn new(changes: impl Changes + 'static) -> Self {
        Self { changes: Box::new(changes) }
    }

    /// The next changes: one or more whole transactions, in order, each in the order of its keys. Dropping the future drops no
    /// change.
    ///
    /// # Errors
    /// `Compacted` when this reader was too slow, `Closed` when the store is closed, `Denied` when it may no longer read. While
    /// the store is unavailable, this waits, and continues where it was.
    pub async fn next(&mut self) -> Result<Vec<Event>, StoreError> {
        self.changes.next().await
    }

    /// All changes up to this revision were returned.
    pub fn revision(&self) -> Revision {
        self.changes.revision()
    }
}

/// Reads the history of an [`Engine`](crate::engine::Engine).
#[derive(Debug)]
pub(crate) struct Recent {
    pub(crate) history: Arc<RwLock<History>>,
    pub(crate) newest: watch::Receiver<Revision>,
    pub(crate) prefix: Prefix,
    pub(crate) after: Revision,
}

impl Changes for Recent {
    fn next(&mut self) -> StoreFuture<'_, Vec<Event>> {
        Box::pin(async {
            loop {
                let newest = *self.newest.borrow_and_update();
                if newest > self.after {
                    let (events, upto) = {
                        let history = self.history.read().unwrap_or_else(PoisonError::into_inner);
                        if self.after < history.floor {
                            return Err(StoreError::Compacted { after: self.after, floor: history.floor });
                        }
                        history.after(self.after, &self.prefix, newest)
                    };
                    self.after = upto;
                    if !events.is_empty() {
                        return Ok(events);
                    }
                }
                self.newest.changed().await.map_err(|_| StoreError::Closed)?;
            }
        })
    }

    fn revision(&self) -> Revision {
        self.after
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Key;

    /// A write enters the history before `newest` includes it: a reader between the two must not return it twice.
    #[test]
    fn returns_no_write_that_newest_does_not_include_yet() {
        let mut history = History::new(0);
        for revision in 1..=3 {
            history.push(Event { revision, key: Key::new(&["a"]).unwrap(), entry: None });
        }
        let everything = Prefix::new::<&str>(&[]).unwrap();
        let revisions = |(events, upto): (Vec<Event>, Revision)| {
            (events.iter().map(|event| event.revision).collect::<Vec<_>>(), upto)
        };
        assert_eq!(revisions(history.after(0, &everything, 2)), (vec![1, 2], 2));
        assert_eq!(revisions(history.after(2, &everything, 3)), (vec![3], 3));
    }

    #[test]
    fn starts_a_batch_where_the_full_one_before_ended() {
        let mut history = History::new(0);
        let all = MAX_BATCH as Revision + 10;
        for revision in 1..=all {
            history.push(Event { revision, key: Key::new(&["a"]).unwrap(), entry: None });
        }
        let everything = Prefix::new::<&str>(&[]).unwrap();
        let (first, upto) = history.after(0, &everything, all);
        let (second, end) = history.after(upto, &everything, all);
        assert_eq!((first.len(), second.len(), end), (MAX_BATCH, 10, all));
    }
}
