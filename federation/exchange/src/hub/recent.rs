//! Snapshots that were encoded last.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

/// Snapshots that were encoded last: other receivers of the class are likely to need them next.
#[derive(Debug, Default)]
pub(super) struct RecentSnapshots {
    kept: VecDeque<Arc<Vec<Bytes>>>,
    bytes: usize,
}

impl RecentSnapshots {
    /// Some seventy origins of a thousand endpoints.
    const MAX_BYTES: usize = 8 << 20;

    pub(super) fn keep(&mut self, frames: Arc<Vec<Bytes>>) {
        let size = |frames: &[Bytes]| frames.iter().map(Bytes::len).sum::<usize>();
        self.bytes += size(&frames);
        self.kept.push_back(frames);
        while self.bytes > Self::MAX_BYTES
            && let Some(oldest) = self.kept.pop_front()
        {
            self.bytes -= size(&oldest);
        }
    }
}
