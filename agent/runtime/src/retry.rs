//! Waiting between attempts: the one place that names the `backoff` crate.

use std::time::Duration;

use backoff::ExponentialBackoffBuilder;
use backoff::backoff::Backoff as _;
use tokio_util::sync::CancellationToken;

/// Growing delays with jitter, for a loop that never gives up.
#[derive(Debug)]
pub struct Backoff {
    inner: backoff::ExponentialBackoff,
    max: Duration,
}

impl Default for Backoff {
    /// From 100 ms to 10 s.
    fn default() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(10))
    }
}

impl Backoff {
    /// Delays that grow from about `initial` to about `max`, each twice the one before; each is spread by half in both directions.
    pub fn new(initial: Duration, max: Duration) -> Self {
        let inner = ExponentialBackoffBuilder::new()
            .with_initial_interval(initial)
            .with_max_interval(max)
            .with_multiplier(2.0)
            .with_randomization_factor(0.5)
            .with_max_elapsed_time(None)
            .build();
        Self { inner, max }
    }

    /// The next delay.
    pub fn next_delay(&mut self) -> Duration {
        self.inner.next_backoff().unwrap_or(self.max)
    }

    /// Starts again from the initial delay, after a success.
    pub fn reset(&mut self) {
        self.inner.reset();
    }

    /// Waits for the next delay; false when `stop` came first.
    pub async fn wait(&mut self, stop: &CancellationToken) -> bool {
        tokio::select! {
            () = stop.cancelled() => false,
            () = tokio::time::sleep(self.next_delay()) => true,
        }
    }
}

/// Repeats `attempt` until it succeeds or `stop`; the caller logs inside `attempt` where that is wanted.
pub async fn until_ok<T, E, F>(
    mut backoff: Backoff,
    stop: &CancellationToken,
    mut attempt: impl FnMut() -> F,
) -> Option<T>
where
    F: Future<Output = Result<T, E>>,
{
    loop {
        let result = tokio::select! {
            () = stop.cancelled() => return None,
            result = attempt() => result,
        };
        if let Ok(value) = result {
            return Some(value);
        }
        if !backoff.wait(stop).await {
            return None;
        }
    }
}
