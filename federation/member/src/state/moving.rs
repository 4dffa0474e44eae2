//! Moves a state from a data directory into Secrets, once.

use anyhow::{Context as _, ensure};
use hanse_identity::keys::Fingerprint;
use zeroize::Zeroizing;

use super::State;
use super::layout::ROOT;

/// The certificate, whose presence means that the cluster has joined: it is written last.
const JOINED: &str = "member.pem";
/// The files of the member itself, and of what it has in force of kinds that may have been deleted.
const FILES: [&str; 8] = [
    ROOT,
    "intermediate.pem",
    "member.next.pem",
    "intermediate.next.pem",
    "term",
    "newest-node-at-start",
    "source/texts.json",
    "source/definitions.json",
];
const FOLDERS: [&str; 2] = ["nodes", "node-tokens"];

/// Moves the state in the data directory into the Secrets of `state`, if these have none. Afterwards, the directory contains no key.
///
/// # Errors
/// When a file cannot be read, written or removed. The next call goes on.
pub fn take_from_data(state: &State) -> anyhow::Result<()> {
    let from = State::from(state.data());
    if !state.is_in_secrets() || from.read_key(JOINED).context("read member.pem")?.is_none() {
        return Ok(());
    }
    move_files(&from, state)
}

fn move_files(from: &State, to: &State) -> anyhow::Result<()> {
    let data = from.data().display();
    let (Some(own), there) = (from.read_key(JOINED)?, to.read_key(JOINED)?) else { return Ok(()) };
    if let Some(there) = there {
        // The files were written, but not removed yet.
        ensure!(
            Fingerprint::of(&own) == Fingerprint::of(&there),
            "both {data} (--data) and the Secret of the state contain a member.pem: remove the one that is not in use"
        );
    } else {
        let mut changes = Vec::new();
        for file in FILES {
            let bytes = match file {
                // Others may read it.
                ROOT => from.read(file)?.map(Zeroizing::new),
                file => from.read_key(file)?,
            };
            changes.extend(bytes.map(|bytes| (file.to_owned(), Some(bytes))));
        }
        for folder in FOLDERS {
            for name in from.list(folder)? {
                let file = format!("{folder}/{name}");
                let bytes = from.read(&file)?.with_context(|| format!("read {data}/{file}"))?;
                changes.push((file, Some(Zeroizing::new(bytes))));
            }
        }
        let count = changes.len() + 1;
        to.put(changes, None).with_context(|| format!("move the files of {data} into the Secrets of the state"))?;
        // They are those of the only process that has served, and may contain objects whose kind was deleted.
        to.adopt_caches().context("take over the caches in --data")?;
        to.put(vec![(JOINED.to_owned(), Some(own))], None).context("move member.pem")?;
        tracing::info!(data = %from.data().display(), files = count, "state moved from the data directory into Secrets");
    }
    for folder in FOLDERS {
        for name in from.list(folder)? {
            from.remove(&format!("{folder}/{name}"))?;
        }
    }
    // The certificate last: until then, the next start goes on here.
    for file in FILES.into_iter().chain([JOINED]) {
        from.remove(file)?;
    }
    Ok(())
}
