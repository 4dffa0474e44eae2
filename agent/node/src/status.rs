//! What the agent says of itself, in a file beside its snapshot, for `hanse-agent status`.

use std::path::Path;

use serde::{Deserialize, Serialize};

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
    pub connected: bool,
    /// Seconds since the Unix epoch, by this machine's clock.
    pub written_at: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unenforced {
    pub namespace: String,
    pub name: String,
    pub reason: String,
}

impl Status {
    /// A file that cannot be written is logged: it is for people only.
    pub fn write(&self, data: &Path) {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        if let Err(error) = hanse_runtime::files::write_atomic(&data.join("status.json"), &text, 0o600) {
            tracing::warn!(%error, "the status file cannot be written");
        }
    }

    /// How long ago it was written, by this machine's clock: an agent writes it at each change, so that an old one is no sign
    /// of anything by itself.
    pub fn age_seconds(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        now.as_secs().saturating_sub(self.written_at)
    }

    pub fn read(data: &Path) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        let path = data.join("status.json");
        let text = std::fs::read(&path).with_context(|| {
            format!("read {}: an agent that runs with this folder writes it (`hanse-agent run --data`)", path.display())
        })?;
        serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))
    }
}
