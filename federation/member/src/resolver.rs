//! Resolves the names of hubs. Names are resolved periodically, and the last successful result is stored on disk, so that a member
//! finds its hub when DNS is not available: when a policy denies it, or the server is down.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hanse_identity::tls::{ClientError, Connection, TlsClient};
use hanse_runtime::files::write_atomic;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::hubs::Hubs;

/// The interval between resolutions of a name.
const EVERY: Duration = Duration::from_secs(10);
/// The timeout of one resolution.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The maximum number of addresses per name.
const MAX_ADDRESSES: usize = 16;

/// The addresses of each name.
type Addresses = BTreeMap<String, BTreeSet<SocketAddr>>;

/// The last known addresses of hubs. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Resolver {
    path: Option<PathBuf>,
    known: Arc<watch::Sender<Addresses>>,
}

impl Resolver {
    /// Starts with the stored addresses of `names`, each HOST:PORT. A HOST that is an address needs no resolution.
    pub fn restore<'a>(data: &Path, names: impl IntoIterator<Item = &'a String>) -> Self {
        let path = data.join("resolved.json");
        let stored = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Addresses>(&bytes).ok());
        let mut stored = stored.unwrap_or_default();
        let known = names.into_iter().map(|name| {
            let literal = name.parse().ok().map(|address| BTreeSet::from([address]));
            (name.clone(), literal.or_else(|| stored.remove(name)).unwrap_or_default())
        });
        Self { path: Some(path), known: Arc::new(watch::Sender::new(known.collect())) }
    }

    /// Notifies of changed addresses.
    pub fn changes(&self) -> watch::Receiver<Addresses> {
        self.known.subscribe()
    }

    /// The last known addresses of these names.
    pub fn addresses<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> BTreeSet<SocketAddr> {
        let known = self.known.borrow();
        names.into_iter().filter_map(|name| known.get(name)).flatten().copied().collect()
    }

    /// Resolves the names of all hubs and of `join` periodically, until `stop`.
    pub async fn keep_fresh(self, hubs: Hubs, join: Vec<String>, stop: CancellationToken) {
        let mut tick = tokio::time::interval(EVERY);
        let mut announced = hubs.changes();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
                changed = announced.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // New names are resolved at once.
                    if !self.follow(hubs.all().iter().chain(&join)) {
                        continue;
                    }
                }
            }
            let names: Vec<String> = self.known.borrow().keys().cloned().collect();
            for name in names.into_iter().filter(|name| name.parse::<SocketAddr>().is_err()) {
                match tokio::time::timeout(TIMEOUT, tokio::net::lookup_host(&name)).await {
                    Ok(Ok(found)) => self.take(&name, found.take(MAX_ADDRESSES).collect()),
                    Ok(Err(error)) => tracing::debug!(hub = name, %error, "hub not resolved"),
                    Err(_) => tracing::debug!(hub = name, "hub not resolved: timeout"),
                }
            }
        }
    }

    /// Replaces the names that are resolved; those that stay keep their addresses. Returns whether they differ from before.
    fn follow<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> bool {
        let names: BTreeSet<&String> = names.into_iter().collect();
        self.known.send_if_modified(|known| {
            if known.keys().eq(names.iter().copied()) {
                return false;
            }
            let mut next = Addresses::new();
            for name in names {
                let literal = || name.parse().ok().map(|address| BTreeSet::from([address]));
                next.insert(name.clone(), known.remove(name).or_else(literal).unwrap_or_default());
            }
            *known = next;
            true
        })
    }

    fn take(&self, name: &str, found: BTreeSet<SocketAddr>) {
        if found.is_empty() {
            return;
        }
        let changed = self.known.send_if_modified(|known| {
            let current = known.entry(name.to_owned()).or_default();
            std::mem::replace(current, found.clone()) != found
        });
        if !changed {
            return;
        }
        tracing::info!(hub = name, addresses = ?found, "hub resolved");
        let Some(path) = &self.path else { return };
        let text = serde_json::to_vec(&*self.known.borrow()).unwrap_or_default();
        if let Err(error) = write_atomic(path, &text, 0o600) {
            tracing::error!(%error, "resolved addresses not stored");
        }
    }

    /// Connects to the first reachable address of `name`.
    ///
    /// # Errors
    /// When none is reachable.
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
    fn follows_the_names_of_hubs_and_keeps_their_addresses() {
        let folder = tempfile::tempdir().expect("a folder");
        let names = ["hub.example:1", "192.0.2.7:1", "hub-0.example:1"].map(str::to_owned);
        let resolver = Resolver::restore(folder.path(), &names[..1]);
        let found: SocketAddr = "192.0.2.9:1".parse().expect("an address");
        resolver.take(&names[0], [found].into());
        assert!(resolver.follow(&names) && !resolver.follow(&names));
        let literal: SocketAddr = "192.0.2.7:1".parse().expect("an address");
        assert_eq!(resolver.addresses(&names), [literal, found].into());
        assert!(resolver.follow(&names[..1]));
        assert_eq!(resolver.addresses(&names), [found].into());
    }

    #[test]
    fn keeps_last_addresses_across_restart() {
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
