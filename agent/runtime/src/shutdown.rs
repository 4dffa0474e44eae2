//! The tasks of a process, and its graceful stop: one signal, one token for everybody, one bounded wait.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::health::{Condition, Health};
use crate::retry::Backoff;
use crate::supervisor::{Panicked, caught, caught_here};

/// A task that panicked is started again after the first of these, doubling to the second ...
const RESTART_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// ... and from the first again once it has run for this long.
const STEADY: Duration = Duration::from_secs(300);

/// Runs the tasks of a process, stops them and waits for them.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    stop: CancellationToken,
    tasks: TaskTracker,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Tasks that have panicked and wait to be started again.
    down: BTreeMap<&'static str, usize>,
    /// True while `down` is empty.
    running: Option<Condition>,
    /// Why the process ends by itself.
    failure: Option<String>,
}

impl Shutdown {
    /// Cancelled when the process must stop.
    pub fn token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Runs a task that [`Self::drain`] waits for. A panic ends the task alone, and is logged and counted.
    pub fn spawn<F>(&self, name: &'static str, task: F) -> tokio::task::JoinHandle<Result<F::Output, Panicked>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tasks.spawn(caught(name, task))
    }

    /// Runs a task that reads its state anew each time: after a panic it is started again, and until then the process is not
    /// ready.
    pub fn supervise<F>(&self, name: &'static str, task: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tasks.spawn(self.supervised(name, task));
    }

    /// As [`Self::supervise`], for the caller to spawn: what drains may need the task, so nothing waits for its end.
    pub fn supervised<F>(
        &self,
        name: &'static str,
        mut task: impl FnMut() -> F + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let this = self.clone();
        async move {
            let mut restarts = Restarts::new(name, &this);
            while caught(name, async { task().await }).await.is_err() {
                let (delay, _down) = restarts.next();
                tokio::select! {
                    () = this.stop.cancelled() => return,
                    () = tokio::time::sleep(delay) => {}
                }
            }
        }
    }

    /// As [`Self::supervise`], for work that has a thread of its own.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn supervise_thread(&self, name: &'static str, mut task: impl FnMut() + Send + 'static) -> std::io::Result<()> {
        let this = self.clone();
        let run = move || {
            let mut restarts = Restarts::new(name, &this);
            while caught_here(name, &mut task).is_err() && !this.stop.is_cancelled() {
                let (delay, _down) = restarts.next();
                std::thread::sleep(delay);
            }
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
    }

    /// Runs a task without which the process is of no use, and whose state is gone after a panic: an error or a panic ends the
    /// process.
    pub fn essential<E>(&self, name: &'static str, task: impl Future<Output = Result<(), E>> + Send + 'static)
    where
        E: Into<anyhow::Error> + Send + 'static,
    {
        let this = self.clone();
        self.tasks.spawn(async move {
            let failure = match caught(name, task).await {
                Ok(Ok(())) if this.stop.is_cancelled() => return,
                Ok(Ok(())) => format!("{name} has ended"),
                Ok(Err(error)) => format!("{name}: {:#}", error.into()),
                Err(panicked) => panicked.to_string(),
            };
            this.fail(failure);
        });
    }

    /// Ends the process with an error.
    fn fail(&self, failure: String) {
        error!(failure, "stopping");
        self.state().failure.get_or_insert(failure);
        self.begin();
    }

    /// Readiness names the tasks from now on: it needs all of them to run.
    pub fn tell(&self, health: &Health) {
        let running = health.condition("tasks run");
        let mut state = self.state();
        running.set(state.down.is_empty());
        state.running = Some(running);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, name: &'static str, is_down: bool) {
        let mut state = self.state();
        let count = state.down.entry(name).or_default();
        *count = if is_down { *count + 1 } else { count.saturating_sub(1) };
        state.down.retain(|_, count| *count > 0);
        let all_run = state.down.is_empty();
        if let Some(running) = &state.running {
            running.set(all_run);
        }
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

    /// What the process ends with: an error where a task that it needs has failed.
    ///
    /// # Errors
    /// See [`Self::essential`].
    pub fn outcome(&self) -> anyhow::Result<()> {
        self.state().failure.take().map_or(Ok(()), |failure| Err(anyhow::Error::msg(failure)))
    }
}

/// When a task that panics is started again.
struct Restarts<'a> {
    name: &'static str,
    of: &'a Shutdown,
    backoff: Backoff,
    began: Instant,
}

/// While it lives, a task waits to be started again.
struct Down<'a>(&'static str, &'a Shutdown);

impl<'a> Restarts<'a> {
    fn new(name: &'static str, of: &'a Shutdown) -> Self {
        Self { name, of, backoff: Backoff::new(RESTART_AFTER.0, RESTART_AFTER.1), began: Instant::now() }
    }

    fn next(&mut self) -> (Duration, Down<'a>) {
        if self.began.elapsed() > STEADY {
            self.backoff.reset();
        }
        let delay = self.backoff.next_delay();
        self.began = Instant::now() + delay;
        warn!(task = self.name, ?delay, "the task is started again");
        self.of.note(self.name, true);
        (delay, Down(self.name, self.of))
    }
}

impl fmt::Debug for Down<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Down").field(&self.0).finish()
    }
}

impl Drop for Down<'_> {
    fn drop(&mut self) {
        self.1.note(self.0, false);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::watch;

    use super::*;
    use crate::supervisor::{observe_panics, panics};

    const SOON: Duration = Duration::from_secs(600);

    fn process() -> (Shutdown, Health) {
        observe_panics();
        let (shutdown, health) = (Shutdown::default(), Health::default());
        shutdown.tell(&health);
        (shutdown, health)
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_counted_not_ready_and_started_again() {
        let (shutdown, health) = process();
        let (runs, mut ran) = watch::channel(0);
        let runs = Arc::new(runs);
        let stop = shutdown.token();
        shutdown.supervise("a task of a test", move || {
            let (runs, stop) = (runs.clone(), stop.clone());
            async move {
                runs.send_modify(|runs| *runs += 1);
                assert!(*runs.borrow() > 2, "a defect");
                stop.cancelled().await;
            }
        });
        // Another goes on meanwhile.
        let other = shutdown.spawn("another", async { 7 });
        let waits = async {
            while health.waiting_for() != ["tasks run"] {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(SOON, waits).await.expect("it is not ready while the task is down");
        assert_eq!(other.await.expect("no panic"), Ok(7));
        let began = tokio::time::Instant::now();
        tokio::time::timeout(SOON, ran.wait_for(|runs| *runs == 3)).await.expect("in time").expect("it runs");
        assert!(began.elapsed() >= Duration::from_millis(500), "not at once");
        while !health.waiting_for().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(panics("a task of a test"), 2);
        assert!(
            crate::metrics::Metrics::default()
                .encode()
                .contains("hanse_task_panics_total{task=\"a task of a test\"} 2")
        );
        assert!(shutdown.drain(SOON).await);
        assert!(shutdown.outcome().is_ok());
    }

    #[tokio::test]
    async fn the_end_of_an_essential_task_ends_the_process_with_an_error() {
        let check = async |task: &'static str, work: fn(CancellationToken) -> bool, expected: &str| {
            let (shutdown, _) = process();
            let stop = shutdown.token();
            shutdown.essential(task, async move {
                if work(stop) { Ok(()) } else { Err(std::io::Error::other("no such luck")) }
            });
            shutdown.wait_for_signal().await.expect("a handler");
            shutdown.drain(SOON).await;
            let text = shutdown.outcome().err().map(|error| format!("{error:#}")).unwrap_or_default();
            assert_eq!(text, expected);
        };
        check("listener a", |_| panic!("a defect"), "listener a failed by a defect: see the log").await;
        check("listener b", |_| false, "listener b: no such luck").await;
        check("listener c", |_| true, "listener c has ended").await;
        let asked_to = |stop: CancellationToken| {
            stop.cancel();
            true
        };
        check("listener d", asked_to, "").await;
        assert_eq!(panics("listener a"), 1);
    }

    #[test]
    fn a_thread_that_panics_is_started_again() {
        let (shutdown, health) = process();
        let runs = Arc::new(AtomicUsize::new(0));
        let (again, begun) = std::sync::mpsc::channel();
        let counted = Arc::clone(&runs);
        shutdown
            .supervise_thread("a thread of a test", move || {
                again.send(()).expect("the test waits");
                assert!(counted.fetch_add(1, Ordering::SeqCst) > 0, "a defect");
            })
            .expect("a thread");
        for _ in 0..2 {
            begun.recv_timeout(SOON).expect("it is started");
        }
        assert!(begun.recv_timeout(SOON).is_err(), "it has ended");
        assert_eq!((runs.load(Ordering::SeqCst), panics("a thread of a test")), (2, 1));
        assert!(health.waiting_for().is_empty());
    }

    #[tokio::test]
    async fn a_panic_in_one_call_ends_that_call_alone() {
        observe_panics();
        let before = panics("a call of a test");
        let failed = caught("a call of a test", async { panic!("a defect") }).await;
        assert_eq!(failed, Err(Panicked("a call of a test")));
        assert_eq!(caught("a call of a test", async { 7 }).await, Ok(7));
        assert_eq!(panics("a call of a test"), before + 1);
    }
}
