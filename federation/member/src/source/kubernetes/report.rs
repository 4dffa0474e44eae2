//! What the tasks of a source report to it.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::collection::Collection;
use crate::source::Event;

/// Reports that wait for the source.
const REPORTS: usize = 64;
/// The texts of objects in them. What is read of an object is about as large as its text.
const QUEUED_BYTES: u32 = 16 << 20;

/// The receiver of reports is gone.
#[derive(Debug)]
pub struct Ended;

/// Where tasks report to. Waits while there is no room.
#[derive(Debug, Clone)]
pub struct Reports {
    sender: mpsc::Sender<Report>,
    room: Arc<Semaphore>,
}

impl Reports {
    pub fn new() -> (Self, mpsc::Receiver<Report>) {
        let (sender, receiver) = mpsc::channel(REPORTS);
        (Self { sender, room: Arc::new(Semaphore::new(QUEUED_BYTES as usize)) }, receiver)
    }

    /// `bytes`: the length of the texts that the events were read from.
    pub async fn events(&self, events: Vec<Event>, bytes: usize) -> Result<(), Ended> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(QUEUED_BYTES);
        let room = Arc::clone(&self.room).acquire_many_owned(bytes).await.map_err(|_| Ended)?;
        self.sender.send(Report::Events(events, room)).await.map_err(|_| Ended)
    }

    pub async fn state(&self, of: Collection, state: State) -> Result<(), Ended> {
        self.sender.send(Report::State(of, state)).await.map_err(|_| Ended)
    }
}

/// The definition of one collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Definition {
    Absent,
    /// It is being deleted, and its objects with it.
    Terminating,
    Present {
        uid: String,
    },
}

/// What a task reports about a collection.
#[derive(Debug)]
pub enum Report {
    /// With the room that they take.
    Events(Vec<Event>, OwnedSemaphorePermit),
    State(Collection, State),
}

#[derive(Debug)]
pub enum State {
    /// A list is complete.
    Listed,
    /// The API server has answered.
    Alive,
    Failing(String),
    /// The definition of a custom collection.
    Definition(Definition),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn large_reports_wait_for_room() {
        let (reports, mut receiver) = Reports::new();
        let large = QUEUED_BYTES as usize / 2;
        for _ in 0..2 {
            assert!(reports.events(Vec::new(), large).await.is_ok());
        }
        let mut third = tokio_test_poll(reports.events(Vec::new(), 1));
        assert!(third.is_none(), "there is no room");
        let Some(Report::Events(_, room)) = receiver.recv().await else { panic!("events") };
        third = tokio_test_poll(reports.events(Vec::new(), 1));
        assert!(third.is_none(), "they are still in use");
        drop(room);
        assert!(tokio_test_poll(reports.events(Vec::new(), 1)).is_some_and(|sent| sent.is_ok()));
        // One that is larger than everything takes all of it.
        receiver.recv().await.expect("the second");
        receiver.recv().await.expect("the third");
        assert!(reports.events(Vec::new(), usize::MAX).await.is_ok());
    }

    /// The result of a future that is ready.
    fn tokio_test_poll<T>(future: impl Future<Output = T>) -> Option<T> {
        futures::FutureExt::now_or_never(future)
    }
}
