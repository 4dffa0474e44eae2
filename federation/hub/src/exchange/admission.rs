//! Limits of a cluster's streams: their number, the rate of updates, and the time of a batch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hanse_exchange::message::PublishRequest;
use hanse_policy::model::ClusterName;
use tokio::time::Instant;
use tonic::Status;

use super::mutex::lock;
use crate::grants::Limits;

/// Streams of one cluster in each direction: replicas of its member, each twice while a certificate is renewed.
pub const MAX_STREAMS: usize = 8;
/// The next frame of a batch must arrive within this time ...
pub const FRAME_TIME: Duration = Duration::from_secs(30);
/// ... and its end within this time: 300,000 endpoints of 250 bytes take 10 minutes at 1 Mbit/s.
const BATCH_TIME: Duration = Duration::from_secs(900);

/// The number of open streams of each cluster.
pub type StreamCounts = Arc<Mutex<BTreeMap<ClusterName, usize>>>;

/// One open stream of a cluster. It counts until this is dropped.
#[derive(Debug)]
pub struct StreamPermit {
    counts: StreamCounts,
    cluster: ClusterName,
}

impl StreamPermit {
    /// # Errors
    /// `RESOURCE_EXHAUSTED` if the cluster has too many streams.
    pub fn acquire(counts: &StreamCounts, cluster: &ClusterName) -> Result<Self, Status> {
        let mut streams = lock(counts);
        let count = streams.entry(cluster.clone()).or_default();
        if *count >= MAX_STREAMS {
            return Err(Status::resource_exhausted(format!("{MAX_STREAMS} such streams of the cluster are open")));
        }
        *count += 1;
        Ok(Self { counts: Arc::clone(counts), cluster: cluster.clone() })
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut streams = lock(&self.counts);
        if let Some(count) = streams.get_mut(&self.cluster) {
            *count -= 1;
            if *count == 0 {
                streams.remove(&self.cluster);
            }
        }
    }
}

/// The updates that a cluster may publish now: a bucket that fills at the granted rate, up to the updates of a minute or
/// everything that the cluster may publish, whichever is more. One message may overdraw it.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    left: f64,
    at: Instant,
    /// When updates last had to wait.
    pub slowed: Option<Instant>,
}

impl Rate {
    /// Takes `updates` out, and returns how long the next ones must wait.
    pub fn spend(&mut self, updates: usize, limits: Limits, now: Instant) -> Duration {
        // At least one per second, or a wait would never end.
        let per_second = limits.updates_per_second.max(1) as f64;
        let full = (per_second * 60.0).max(limits.endpoints.saturating_add(limits.label_sets) as f64);
        self.left = (self.left + now.duration_since(self.at).as_secs_f64() * per_second).min(full) - updates as f64;
        self.at = now;
        if self.left >= 0.0 {
            return Duration::ZERO;
        }
        self.slowed = Some(now);
        Duration::try_from_secs_f64(-self.left / per_second).unwrap_or(Duration::MAX)
    }

    pub fn full(now: Instant) -> Self {
        Self { left: f64::MAX, at: now, slowed: None }
    }
}

/// The time that the streams of one cluster in one direction have used, over all of them: at most one part in [`Account::SHARE`],
/// after a burst. No use lowers the debt; only time does.
#[derive(Debug, Clone, Copy, Default)]
pub struct Account {
    /// When the debt ends.
    until: Option<Instant>,
}

impl Account {
    const SHARE: u32 = 3;
    /// The debt up to which no stream waits: some 30 ms of use. A batch of small changes costs some 20 µs, and a timer waits for
    /// 1 ms at least.
    const BURST: Duration = Duration::from_millis(100);

    /// Charges what was used until now.
    pub fn charge(&mut self, used: Duration, now: Instant) {
        let since = now.checked_sub(used).unwrap_or(now);
        self.until = Some(self.until.map_or(since, |until| until.max(since)) + used * Self::SHARE);
    }

    /// How long the streams must wait.
    pub fn wait(&self, now: Instant) -> Duration {
        self.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now)).saturating_sub(Self::BURST)
    }
}

/// The accounts of all clusters, for one direction.
#[derive(Debug, Default)]
pub struct Accounts(Mutex<BTreeMap<ClusterName, Account>>);

impl Accounts {
    pub fn charge(&self, cluster: &ClusterName, used: Duration) {
        lock(&self.0).entry(cluster.clone()).or_default().charge(used, Instant::now());
    }

    /// Waits until the streams of a cluster may use the exchange again.
    pub async fn affordable(&self, cluster: &ClusterName) {
        loop {
            let now = Instant::now();
            let wait = lock(&self.0).get(cluster).map_or(Duration::ZERO, |account| account.wait(now));
            if wait.is_zero() {
                return;
            }
            tokio::time::sleep(wait).await;
        }
    }
}

/// A batch that has begun and not ended. Its staged part is kept until then.
#[derive(Debug, Clone, Copy)]
pub struct Unfinished {
    pub began: Instant,
    /// When a part of it arrived last.
    pub progress: Instant,
}

impl Unfinished {
    pub fn follow(this: &mut Option<Self>, request: &PublishRequest, now: Instant) {
        match (request, this.as_mut()) {
            (PublishRequest::Begin { .. }, _) => *this = Some(Self { began: now, progress: now }),
            (PublishRequest::Frame(_), Some(unfinished)) => unfinished.progress = now,
            (PublishRequest::End { .. }, _) => *this = None,
            _ => {}
        }
    }

    /// Does not count time for which the hub delayed the stream.
    pub fn waited(&mut self, time: Duration) {
        self.began += time;
        self.progress += time;
    }

    pub fn ends_at(&self) -> Instant {
        (self.began + BATCH_TIME).min(self.progress + FRAME_TIME)
    }
}

/// The next message, which must arrive in time while a batch is unfinished.
pub async fn within<T>(unfinished: &Option<Unfinished>, next: impl Future<Output = T>) -> Result<T, Status> {
    match unfinished {
        None => Ok(next.await),
        Some(unfinished) => tokio::time::timeout_at(unfinished.ends_at(), next)
            .await
            .map_err(|_| Status::deadline_exceeded("a batch was begun and not ended in time")),
    }
}
