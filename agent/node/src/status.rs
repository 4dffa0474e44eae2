//! The agent's status file, for `hanse-agent status`, and the lock of its directory, which ends with the process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use hanse_runtime::files::{is_locked, lock_file, write_atomic};
use hanse_runtime::health::Writes;
use hanse_runtime::moment::{from_seconds, seconds};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// How often a running agent writes its status when nothing changes.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How long to wait for the lock: a check whether an agent runs takes it for a moment.
const LOCK_PATIENCE: Duration = Duration::from_millis(400);

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub node: String,
    /// Term and number of the generation in force.
    pub term: u64,
    pub number: u64,
    /// Hexadecimal.
    pub digest: String,
    pub hub_revision: u64,
    pub local_revision: u64,
    pub endpoints: usize,
    pub policies: usize,
    pub sets: usize,
    /// Objects that the kernel refused, with the error.
    pub refused: Vec<String>,
    /// What is wrong with the hooks as a whole; empty when they see pod traffic.
    #[serde(default)]
    pub hooks: String,
    /// Pods that are not enforced, or not proven to be.
    #[serde(default)]
    pub unenforced: Vec<Unenforced>,
    /// The ranges of the node's pods. An address in them without rules is closed.
    #[serde(default)]
    pub pod_ranges: Vec<IpNet>,
    /// Denied packets are logged, and pass.
    #[serde(default)]
    pub observes: bool,
    /// No range is known: a pod without rules is open.
    #[serde(default)]
    pub open: bool,
    pub connected: bool,
    /// Why the agent is not in sync with its member; empty when it is.
    #[serde(default)]
    pub not_in_sync: String,
    /// Files that cannot be written, with the error.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Whether flows are reported to the member, and why not.
    #[serde(default)]
    pub flows: String,
    /// When this was written: seconds since the Unix epoch, by this machine's clock.
    pub written_at: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unenforced {
    pub namespace: String,
    pub name: String,
    /// For people.
    pub reason: String,
    /// For programs: `NotProven`, `Bypassed` and so on.
    #[serde(default)]
    pub code: String,
}

impl Status {
    fn write(&self, data: &Path, writes: &Writes) {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        writes.note("status.json", &write_atomic(&data.join("status.json"), &text, 0o600));
    }

    /// The pod ranges for people, or the consequence of having none.
    pub fn ranges(&self) -> String {
        match (self.pod_ranges.is_empty(), self.open) {
            (false, _) => self.pod_ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            (true, true) => "none known: a pod is OPEN until its rules arrive (set --pod-range)".to_owned(),
            (true, false) => "unknown: ranges that were closed before this start stay closed".to_owned(),
        }
    }

    pub fn written_at(&self) -> SystemTime {
        from_seconds(self.written_at)
    }

    /// Seconds since it was written, by this machine's clock.
    pub fn age_seconds(&self) -> u64 {
        seconds(SystemTime::now()).saturating_sub(self.written_at)
    }

    /// # Errors
    /// When no agent has written it, or it is not a status.
    pub fn read(data: &Path) -> anyhow::Result<Self> {
        let path = data.join("status.json");
        let text = std::fs::read(&path).with_context(|| {
            format!("read {}: a running agent writes it (`hanse-agent run --data`)", path.display())
        })?;
        serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
    }
}

/// Writes the newest status and flow state at each change and as a heartbeat. Returns when the sender of statuses is dropped.
pub async fn keep(
    data: PathBuf,
    mut statuses: watch::Receiver<Status>,
    mut flows: watch::Receiver<String>,
    writes: Writes,
) {
    loop {
        let (status, flows_state) = (statuses.borrow_and_update().clone(), flows.borrow_and_update().clone());
        Status { flows: flows_state, written_at: seconds(SystemTime::now()), ..status }.write(&data, &writes);
        tokio::select! {
            changed = statuses.changed() => if changed.is_err() { return },
            Ok(()) = flows.changed() => {}
            () = tokio::time::sleep(HEARTBEAT) => {}
        }
    }
}

/// Locks the directory `data` for this process.
///
/// # Errors
/// When another agent has the lock, or it cannot be created.
pub fn lock(data: &Path) -> anyhow::Result<File> {
    let locked = lock_file(&lock_path(data), LOCK_PATIENCE);
    locked.with_context(|| format!("lock the directory {}", data.display()))
}

/// Whether an agent runs with the directory `data`.
pub fn runs(data: &Path) -> bool {
    is_locked(&lock_path(data))
}

fn lock_path(data: &Path) -> PathBuf {
    data.join("agent.lock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_runs_while_the_lock_is_taken() {
        let directory = tempfile::tempdir().expect("a directory");
        assert!(!runs(directory.path()), "no agent has started");
        let locked = lock(directory.path()).expect("free");
        assert!(runs(directory.path()));
        assert!(lock(directory.path()).is_err_and(|error| format!("{error:#}").ends_with(": another process uses it")));
        drop(locked);
        assert!(!runs(directory.path()));
    }

    #[tokio::test(start_paused = true)]
    async fn writes_unchanged_status_as_a_heartbeat() {
        let directory = tempfile::tempdir().expect("a directory");
        let (sender, statuses) = watch::channel(Status { node: "n".into(), ..Status::default() });
        let (flows, flow_states) = watch::channel("off".to_owned());
        let writes = Writes::new(&hanse_runtime::health::Health::default());
        let keeping = tokio::spawn(keep(directory.path().to_owned(), statuses, flow_states, writes));
        for beat in 0..3 {
            let path = directory.path().join("status.json");
            // The paused clock advances as soon as every task waits.
            tokio::time::timeout(HEARTBEAT * 2, async {
                while !path.exists() {
                    tokio::time::sleep(HEARTBEAT / 10).await;
                }
            })
            .await
            .unwrap_or_else(|_| panic!("beat {beat}"));
            let status = Status::read(directory.path()).expect("written");
            assert_eq!((status.node.as_str(), status.flows.as_str()), ("n", "off"));
            std::fs::remove_file(path).expect("removed");
        }
        // A change is written before the next beat.
        flows.send_replace("changed".to_owned());
        let written = tokio::time::timeout(HEARTBEAT / 2, async {
            while Status::read(directory.path()).map_or(true, |status| status.flows != "changed") {
                tokio::time::sleep(HEARTBEAT / 100).await;
            }
        });
        assert!(written.await.is_ok());
        drop(sender);
        keeping.await.expect("it ends with the sender");
    }
}
