//! Where the hub's listeners are. Names are asked for again and again; the last good answer stays, on disk too, so that a
//! member finds its hub when it cannot ask: under a policy that denies it, or when whoever answers is down.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hanse_identity::tls::{ClientError, Connection, TlsClient};
use hanse_runtime::files::write_atomic;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often names are asked for.
const EVERY: Duration = Duration::from_secs(10);
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Addresses of one name that are kept.
const MAX_ADDRESSES: usize = 16;

type Known = BTreeMap<String, BTreeSet<SocketAddr>>;

/// Clones share what is known.
#[derive(Debug, Clone, Default)]
pub struct Resolver {
    path: Option<PathBuf>,
    known: Arc<watch::Sender<Known>>,
}

impl Resolver {
    /// Of these names, HOST:PORT, what is written in them and what was known at the last end.
    pub fn restore<'a>(data: &Path, names: impl IntoIterator<Item = &'a String>) -> Self {
        let path = data.join("resolved.json");
        let kept = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Known>(&bytes).ok());
        let mut kept = kept.unwrap_or_default();
        let known = names.into_iter().map(|name| {
            let written = name.parse().ok().map(|address| BTreeSet::from([address]));
            (name.clone(), written.or_else(|| kept.remove(name)).unwrap_or_default())
        });
        Self { path: Some(path), known: Arc::new(watch::Sender::new(known.collect())) }
    }

    /// Tells when an answer differs.
    pub fn changes(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }

    /// What is known of these names.
    pub fn addresses<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> BTreeSet<SocketAddr> {
        let known = self.known.borrow();
        names.into_iter().filter_map(|name| known.get(name)).flatten().copied().collect()
    }

    /// Asks until `stop`.
    pub async fn keep_fresh(self, stop: CancellationToken) {
        let mut tick = tokio::time::interval(EVERY);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            let names: Vec<String> = self.known.borrow().keys().cloned().collect();
            for name in names.into_iter().filter(|name| name.parse::<SocketAddr>().is_err()) {
                match tokio::time::timeout(PATIENCE, tokio::net::lookup_host(&name)).await {
                    Ok(Ok(found)) => self.take(&name, found.take(MAX_ADDRESSES).collect()),
                    Ok(Err(error)) => tracing::debug!(name, %error, "a hub's name cannot be resolved"),
                    Err(_) => tracing::debug!(name, "a hub's name is not resolved in time"),
                }
            }
        }
    }

    fn take(&self, name: &str, found: BTreeSet<SocketAddr>) {
        if found.is_empty() {
            return;
        }
        let changed = self.known.send_if_modified(|known| {
            let held = known.entry(name.to_owned()).or_default();
            std::mem::replace(held, found.clone()) != found
        });
        if !changed {
            return;
        }
        tracing::info!(name, addresses = ?found, "hub resolved");
        let Some(path) = &self.path else { return };
        let text = serde_json::to_vec(&*self.known.borrow()).unwrap_or_default();
        if let Err(error) = write_atomic(path, &text, 0o600) {
            tracing::error!(%error, "resolved names cannot be kept");
        }
    }

    /// Connects to the first address of `name` that can be reached.
    ///
    /// # Errors
    /// When none can.
    pub async fn connect(&self, client: &TlsClient, name: &str) -> Result<Connection, ClientError> {
        let mut failed = None;
        let known = self.known.borrow().get(name).cloned().unwrap_or_default();
        for address in known {
            match client.connect(&address.to_string()).await {
                Ok(connection) => return Ok(connection),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => client.connect(name).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_answer_stays_across_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        let names = ["hub.example:7443".to_owned(), "192.0.2.7:7443".to_owned()];
        let first = Resolver::restore(folder.path(), &names);
        assert_eq!(first.addresses(&names), ["192.0.2.7:7443".parse().expect("an address")].into());
        let found: SocketAddr = "192.0.2.9:7443".parse().expect("an address");
        first.take(&names[0], [found].into());
        first.take(&names[0], BTreeSet::new());
        let second = Resolver::restore(folder.path(), &names);
        assert_eq!(second.addresses(&names[..1]), [found].into(), "no answer takes nothing away");
        assert!(second.addresses([&"other:1".to_owned()]).is_empty());
    }
}
