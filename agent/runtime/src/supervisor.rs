//! Long-lived tasks: a panic of one is logged, counted and visible in readiness, and stops no other.
//!
//! The hook sees every panic of the process, wherever it happens, and names the task. [`crate::shutdown::Shutdown`] decides what
//! follows: a task that reads its state anew is started again; one whose state is gone ends the process, so that what
//! started it can start it again.

use std::any::Any;
use std::backtrace::BacktraceStatus;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::{LazyLock, Once};

use futures::FutureExt as _;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tracing::error;

tokio::task_local! {
    static TASK: &'static str;
}

thread_local! {
    static THREAD: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Of the whole process, as its panic hook is.
static PANICS: LazyLock<Family<Label, Counter>> = LazyLock::new(Family::default);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Label {
    task: String,
}

/// A task has panicked. The hook has logged it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} failed by a defect: see the log")]
pub struct Panicked(pub &'static str);

/// Logs each panic of this process at ERROR and counts it, instead of the text that Rust prints; without a log, that text is printed. A
/// second call changes nothing.
pub fn observe_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let printed = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            observe(info);
            if !tracing::enabled!(tracing::Level::ERROR) {
                printed(info);
            }
        }));
    });
}

/// Adds the counter to the metrics of a process.
pub(crate) fn register(registry: &mut Registry) {
    // A series that starts at zero shows the first panic as an increase. Tasks start theirs.
    start_series("unnamed");
    registry.register("task_panics", "Panics, by the task that was stopped by them", PANICS.clone());
}

fn start_series(task: &str) {
    drop(PANICS.get_or_create(&Label { task: task.to_owned() }));
}

/// How many panics of a task were counted.
pub fn panics(task: &str) -> u64 {
    PANICS.get(&Label { task: task.to_owned() }).map_or(0, |it| it.get())
}

fn observe(info: &PanicHookInfo<'_>) {
    let task = TASK.try_with(|task| *task).ok().or(THREAD.get());
    let thread = std::thread::current();
    // Names of threads come from this code and the async runtime: a closed set.
    let task = task.or(thread.name()).unwrap_or("unnamed");
    PANICS.get_or_create(&Label { task: task.to_owned() }).inc();
    let at = info.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = std::backtrace::Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| tracing::field::display(backtrace));
    error!(task, at, panic = message(info.payload()), backtrace, "task panicked; this is a bug");
}

fn message(payload: &dyn Any) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

/// Runs `task` under its name; a panic ends it alone.
///
/// # Errors
/// When it panicked.
pub async fn caught<T>(name: &'static str, task: impl Future<Output = T>) -> Result<T, Panicked> {
    start_series(name);
    TASK.scope(name, AssertUnwindSafe(task).catch_unwind()).await.map_err(|_| Panicked(name))
}

/// As [`caught`], for what does not wait.
///
/// # Errors
/// When it panicked.
pub fn caught_here<T>(name: &'static str, task: impl FnOnce() -> T) -> Result<T, Panicked> {
    start_series(name);
    let before = THREAD.replace(Some(name));
    let result = catch_unwind(AssertUnwindSafe(task));
    THREAD.set(before);
    result.map_err(|_| Panicked(name))
}
