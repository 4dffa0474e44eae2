//! Graceful stop: one signal, one token for everybody, one bounded wait.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// Tells tasks to stop and waits for them.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Shutdown {
    /// Cancelled when the process must stop.
    pub fn token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Runs a task that [`Self::drain`] waits for.
    pub fn spawn<F>(&self, task: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tasks.spawn(task)
    }

    /// Begins to stop.
    pub fn begin(&self) {
        self.stop.cancel();
    }

    /// Waits for SIGTERM, SIGINT or [`Self::begin`], then begins to stop.
    ///
    /// # Errors
    /// When the signal handlers cannot be installed.
    pub async fn wait_for_signal(&self) -> std::io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => info!(signal = "SIGTERM", "stopping"),
            _ = interrupt.recv() => info!(signal = "SIGINT", "stopping"),
            () = self.stop.cancelled() => {}
        }
        self.begin();
        Ok(())
    }

    /// Waits for the tasks, at most `limit`. True when all ended.
    pub async fn drain(&self, limit: Duration) -> bool {
        self.begin();
        self.tasks.close();
        let ended = tokio::time::timeout(limit, self.tasks.wait()).await.is_ok();
        if !ended {
            warn!(tasks = self.tasks.len(), "stopped before every task had ended");
        }
        ended
    }
}
