//! The memory of requests that arrive, for all connections together, and for each source.
//!
//! What has arrived is counted, and not what a request announces: a client that sends slowly takes little.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// The limits, and what is taken.
#[derive(Debug)]
pub(super) struct Buffers {
    most: usize,
    most_of_source: usize,
    taken: Mutex<Taken>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    of_source: HashMap<IpAddr, usize>,
}

/// What one request takes, until it is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    buffers: Arc<Buffers>,
    source: IpAddr,
    bytes: usize,
}

impl Buffers {
    pub(super) fn new(most: usize, most_of_source: usize) -> Arc<Self> {
        Arc::new(Self { most, most_of_source, taken: Mutex::default(), freed: Notify::new() })
    }

    /// For a request from `source`.
    pub(super) fn buffer(self: &Arc<Self>, source: IpAddr) -> Buffer {
        Buffer { buffers: Arc::clone(self), source, bytes: 0 }
    }

    fn try_take(&self, source: IpAddr, bytes: usize) -> bool {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let of_source = taken.of_source.get(&source).copied().unwrap_or_default();
        let fits = taken.all + bytes <= self.most && of_source + bytes <= self.most_of_source;
        if fits && bytes > 0 {
            taken.all += bytes;
            taken.of_source.insert(source, of_source + bytes);
        }
        fits
    }
}

impl Buffer {
    /// Waits until `bytes` more fit.
    pub(super) async fn take(&mut self, bytes: usize) {
        loop {
            let freed = self.buffers.freed.notified();
            tokio::pin!(freed);
            // Before the check: what is freed after it wakes this task.
            freed.as_mut().enable();
            if self.buffers.try_take(self.source, bytes) {
                self.bytes += bytes;
                return;
            }
            freed.await;
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut taken = self.buffers.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= self.bytes;
        if let Some(of_source) = taken.of_source.get_mut(&self.source) {
            *of_source -= self.bytes;
            if *of_source == 0 {
                taken.of_source.remove(&self.source);
            }
        }
        drop(taken);
        self.buffers.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn one_source_leaves_memory_for_others() {
        let buffers = Buffers::new(100, 60);
        let [a, b] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        let mut first = buffers.buffer(a);
        first.take(60).await;
        let mut second = buffers.buffer(a);
        assert!(second.take(1).now_or_never().is_none(), "the source has all that it may have");
        let mut other = buffers.buffer(b);
        other.take(40).await;
        assert!(other.take(1).now_or_never().is_none(), "all memory is taken");
        let waiting = tokio::spawn(async move {
            second.take(50).await;
            second
        });
        tokio::task::yield_now().await;
        drop(first);
        drop(waiting.await.expect("no panic"));
        drop(other);
        let taken = buffers.taken.lock().expect("not poisoned");
        assert!(taken.all == 0 && taken.of_source.is_empty(), "{taken:?}");
    }
}
