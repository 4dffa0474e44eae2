//! Readiness as a set of named conditions, each owned by one component.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// All conditions of a process. It is ready when every condition is true.
#[derive(Debug, Clone, Default)]
pub struct Health {
    conditions: Arc<Mutex<Vec<Condition>>>,
}

/// A condition of readiness. It starts as false. The default is one of no process.
#[derive(Debug, Clone, Default)]
pub struct Condition {
    name: &'static str,
    holds: Arc<AtomicBool>,
}

impl Health {
    /// Adds a condition.
    pub fn condition(&self, name: &'static str) -> Condition {
        let condition = Condition { name, holds: Arc::new(AtomicBool::new(false)) };
        self.conditions.lock().unwrap_or_else(PoisonError::into_inner).push(condition.clone());
        condition
    }

    /// The names of the conditions that are false; empty when the process is ready.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        let conditions = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        conditions.iter().filter(|c| !c.holds()).map(|c| c.name).collect()
    }
}

impl Condition {
    pub fn set(&self, holds: bool) {
        self.holds.store(holds, Ordering::Release);
    }

    pub fn holds(&self) -> bool {
        self.holds.load(Ordering::Acquire)
    }
}

/// Which of its files a process cannot write, such as on a full disk. It goes on, but a start would begin with something older: it is
/// not ready, and its status shows the reason. Clones share it.
#[derive(Debug, Clone)]
pub struct Writes {
    failing: watch::Sender<BTreeMap<&'static str, Failure>>,
    written: Condition,
}

/// Why something cannot be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    error: String,
    /// The next start would begin with something older.
    is_of_start: bool,
}

impl Writes {
    pub fn new(health: &Health) -> Self {
        let written = health.condition("files written");
        written.set(true);
        Self { failing: watch::Sender::default(), written }
    }

    /// Records that a file was written, or could not be. Logs changes.
    pub fn note(&self, file: &'static str, result: &io::Result<()>) {
        self.record(file, result, true);
    }

    /// The same of an object that only other programs read: the process is ready without it.
    pub fn note_for_others(&self, object: &'static str, result: &io::Result<()>) {
        self.record(object, result, false);
    }

    fn record(&self, file: &'static str, result: &io::Result<()>, is_of_start: bool) {
        self.failing.send_if_modified(|failing| {
            let is_change = match result {
                Ok(()) => {
                    let failed = failing.remove(file).is_some();
                    if failed {
                        tracing::info!(file, "file written again");
                    }
                    failed
                }
                Err(error) => {
                    let failure = Failure { error: error.to_string(), is_of_start };
                    let is_change = failing.get(file) != Some(&failure);
                    match is_of_start {
                        _ if !is_change => {}
                        true => {
                            tracing::error!(file, %error, "file not written: the next start would use an older one")
                        }
                        false => tracing::error!(file, %error, "object not written: other programs use an older one"),
                    }
                    if is_change {
                        failing.insert(file, failure);
                    }
                    is_change
                }
            };
            self.written.set(!failing.values().any(|it| it.is_of_start));
            is_change
        });
    }

    /// The files that cannot be written, with the error.
    pub fn failing(&self) -> BTreeMap<&'static str, String> {
        self.failing.borrow().iter().map(|(file, failure)| (*file, failure.error.clone())).collect()
    }

    /// Changes with [`Self::failing`].
    pub fn changes(&self) -> watch::Receiver<BTreeMap<&'static str, Failure>> {
        self.failing.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_not_ready_until_a_failed_file_is_written_again() {
        let health = Health::default();
        let writes = Writes::new(&health);
        let full = || Err(io::Error::from(io::ErrorKind::StorageFull));
        let mut changes = writes.changes();
        assert!(health.waiting_for().is_empty() && writes.failing().is_empty());
        writes.note("snapshot", &Ok(()));
        assert!(!changes.has_changed().unwrap(), "nothing changed");
        writes.note("snapshot", &full());
        writes.note("ranges", &full());
        changes.mark_unchanged();
        writes.note("ranges", &full());
        assert!(!changes.has_changed().unwrap(), "the same error again changes nothing");
        assert_eq!(health.waiting_for(), ["files written"]);
        let failing = ["ranges", "snapshot"].map(|file| (file, "no storage space".to_owned()));
        assert_eq!(writes.failing(), failing.into());
        writes.note("snapshot", &Ok(()));
        assert!(changes.has_changed().unwrap() && !health.waiting_for().is_empty());
        writes.note("ranges", &Ok(()));
        assert!(health.waiting_for().is_empty() && writes.failing().is_empty());
        writes.note_for_others("a Service", &full());
        assert!(health.waiting_for().is_empty() && writes.failing().contains_key("a Service"));
        writes.note_for_others("a Service", &Ok(()));
        assert!(writes.failing().is_empty());
    }
}
