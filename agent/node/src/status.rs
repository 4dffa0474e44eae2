//! What the agent says of itself, in a file beside its snapshot, for `hanse-agent status`; and whether it runs, by a lock
//! that ends with it, however it ends.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use hanse_runtime::files::{hold, is_held, write_atomic};
use hanse_runtime::health::Writes;
use hanse_runtime::moment::{from_seconds, seconds};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// How often an agent that runs writes its status, also when nothing changes.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How long the lock is waited for: who asks whether an agent runs keeps it from others for a moment.
const LOCK_PATIENCE: Duration = Duration::from_millis(400);

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub node: String,
    /// Term and number of what is in force.
    pub term: u64,
    pub number: u64,
    /// Hexadecimal.
    pub digest: String,
    pub hub_revision: u64,
    pub local_revision: u64,
    pub endpoints: usize,
    pub policies: usize,
    pub sets: usize,
    /// Objects that the kernel refused.
    pub refused: Vec<String>,
    /// What is wrong with the hooks as a whole; empty when they see pod traffic.
    #[serde(default)]
    pub hooks: String,
    /// Pods that are not enforced, or of which it is not known.
    #[serde(default)]
    pub unenforced: Vec<Unenforced>,
    /// The ranges of the node's pods, of which an address without rules is closed.
    #[serde(default)]
    pub pod_ranges: Vec<IpNet>,
    /// No range is closed: a pod without rules is open.
    #[serde(default)]
    pub open: bool,
    pub connected: bool,
    /// While the member's newest rules are not known: why.
    #[serde(default)]
    pub not_in_sync: String,
    /// What else is wrong with the agent, such as files that cannot be written.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Whether the member is told what the kernel decides of connections, and why not.
    #[serde(default)]
    pub flows: String,
    /// Seconds since the Unix epoch, by this machine's clock: the last sign of life.
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

    /// The ranges of the node's pods, or what it means that none are known.
    pub fn ranges(&self) -> String {
        match (self.pod_ranges.is_empty(), self.open) {
            (false, _) => self.pod_ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            (true, true) => "none known: a pod is OPEN until its rules arrive (give --pod-range)".to_owned(),
            (true, false) => "not known: what was closed before this agent started stays closed".to_owned(),
        }
    }

    pub fn written_at(&self) -> SystemTime {
        from_seconds(self.written_at)
    }

    /// How long ago it was written, by this machine's clock.
    pub fn age_seconds(&self) -> u64 {
        seconds(SystemTime::now()).saturating_sub(self.written_at)
    }

    /// # Errors
    /// When no agent has ever written it, or it cannot be understood.
    pub fn read(data: &Path) -> anyhow::Result<Self> {
        let path = data.join("status.json");
        let text = std::fs::read(&path).with_context(|| {
            format!("read {}: an agent that runs with this folder writes it (`hanse-agent run --data`)", path.display())
        })?;
        serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))
    }
}

/// Writes what is told, with how it is with flows, at each change and as a heartbeat. Returns when nobody is left to tell.
pub async fn keep(
    data: PathBuf,
    mut told: watch::Receiver<Status>,
    mut flows: watch::Receiver<String>,
    writes: Writes,
) {
    loop {
        let (told_last, flows_last) = (told.borrow_and_update().clone(), flows.borrow_and_update().clone());
        Status { flows: flows_last, written_at: seconds(SystemTime::now()), ..told_last }.write(&data, &writes);
        tokio::select! {
            changed = told.changed() => if changed.is_err() { return },
            Ok(()) = flows.changed() => {}
            () = tokio::time::sleep(HEARTBEAT) => {}
        }
    }
}

/// Held by the agent that runs with the folder `data`.
///
/// # Errors
/// When another agent holds it, or it cannot be made.
pub fn lock(data: &Path) -> anyhow::Result<File> {
    let held = hold(&lock_path(data), LOCK_PATIENCE);
    held.with_context(|| format!("run with the folder {}", data.display()))
}

/// Whether an agent runs with the folder `data`.
pub fn runs(data: &Path) -> bool {
    is_held(&lock_path(data))
}

fn lock_path(data: &Path) -> PathBuf {
    data.join("agent.lock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_the_lock_runs() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(!runs(folder.path()), "none ever has");
        let held = lock(folder.path()).expect("free");
        assert!(runs(folder.path()));
        assert!(lock(folder.path()).is_err_and(|error| format!("{error:#}").ends_with(": another process holds it")));
        drop(held);
        assert!(!runs(folder.path()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_that_does_not_change_is_written_again_and_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let (tell, told) = watch::channel(Status { node: "n".into(), ..Status::default() });
        let (flows, flows_told) = watch::channel("off".to_owned());
        let writes = Writes::new(&hanse_runtime::health::Health::default());
        let keeping = tokio::spawn(keep(folder.path().to_owned(), told, flows_told, writes));
        for beat in 0..3 {
            let path = folder.path().join("status.json");
            // The paused clock goes on as soon as everything waits.
            tokio::time::timeout(HEARTBEAT * 2, async {
                while !path.exists() {
                    tokio::time::sleep(HEARTBEAT / 10).await;
                }
            })
            .await
            .unwrap_or_else(|_| panic!("beat {beat}"));
            let status = Status::read(folder.path()).expect("written");
            assert_eq!((status.node.as_str(), status.flows.as_str()), ("n", "off"));
            std::fs::remove_file(path).expect("removed");
        }
        // A change is written before the next beat.
        flows.send_replace("told".to_owned());
        let written = tokio::time::timeout(HEARTBEAT / 2, async {
            while Status::read(folder.path()).map_or(true, |status| status.flows != "told") {
                tokio::time::sleep(HEARTBEAT / 100).await;
            }
        });
        assert!(written.await.is_ok());
        drop(tell);
        keeping.await.expect("it ends with who tells");
    }
}
