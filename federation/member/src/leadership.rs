//! Of several members of a cluster, the holder of a Lease serves: it publishes, serves nodes, and writes the state. The others wait.
//!
//! A leader that cannot renew the Lease goes on. If it stopped, an API server that is away would end the lease of the cluster at the hub, and
//! other clusters would remove its endpoints, although no other process can lead meanwhile. It stops as soon as it knows that another
//! process leads: it reads that the Lease has another holder; or the Lease is older than its duration, and another process publishes for the
//! cluster at the hub, which serves one process only. Until then, what it writes fails: the state is in Secrets of the same API server.
//!
//! A process that no longer leads ends, so that a leader always begins with the state that the last one has left.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::anyhow;
use hanse_kubernetes::Access;
use hanse_kubernetes::election::{DURATION, Election, identity};
use hanse_runtime::health::{Condition, Writes};
use hanse_runtime::shutdown::Shutdown;
use kube::Client;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::state::SecretName;

/// The name of the Lease in reports of failed writes.
const REPORTED_AS: &str = "the Lease of the member";

/// That this process leads. Clones share it.
#[derive(Clone)]
pub struct Leadership {
    client: Client,
    lease: SecretName,
    identity: String,
    /// The start of the last successful renewal.
    renewed: Arc<Mutex<Instant>>,
    replaced: CancellationToken,
}

impl std::fmt::Debug for Leadership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leadership")
            .field("lease", &self.lease)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl Leadership {
    /// Waits until this process has the Lease, and renews it from then on. The process ends with an error when another one has it. `None`: it
    /// stops before. `standby`: the Lease can be read, and another process has it.
    ///
    /// # Errors
    /// When the configuration for the API server cannot be read.
    pub async fn acquire(
        access: &Access,
        lease: &SecretName,
        standby: &Condition,
        writes: &Writes,
        shutdown: &Shutdown,
    ) -> anyhow::Result<Option<Self>> {
        let (client, identity, stop) = (access.client().await?, identity(), shutdown.token());
        let mut election = Election::new(client.clone(), Some(&lease.namespace), &lease.name, identity.clone());
        tracing::info!(%lease, identity, "waiting for the Lease");
        let acquired = tokio::select! {
            () = stop.cancelled() => return Ok(None),
            acquired = election.acquire(|attempt| standby.set(attempt.is_ok())) => acquired,
        };
        let renewed = Arc::new(Mutex::new(acquired));
        let this = Self { client, lease: lease.clone(), identity, renewed, replaced: CancellationToken::new() };
        let (leading, writes) = (this.clone(), writes.clone());
        shutdown.essential("leadership", async move {
            let attempted = |started, result: &anyhow::Result<()>| leading.note(started, result, &writes);
            tokio::select! {
                () = stop.cancelled() => Ok(()),
                ended = election.keep_until_taken(attempted) => Err(anyhow!(ended)),
                () = leading.replaced.cancelled() => Err(anyhow!(
                    "the Lease was not renewed for {} s, and another process publishes for the cluster",
                    leading.age().as_secs()
                )),
            }
        });
        Ok(Some(this))
    }

    fn note(&self, started: Instant, result: &anyhow::Result<()>, writes: &Writes) {
        match result {
            Ok(()) => {
                *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = started;
                writes.note(REPORTED_AS, &Ok(()));
            }
            // A restart of the API server is not a problem.
            Err(_) if self.is_certain() => {}
            Err(error) => {
                let error = std::io::Error::other(format!("{error:#}"));
                writes.note(REPORTED_AS, &Err(error));
            }
        }
    }

    /// The time since the last renewal began.
    fn age(&self) -> std::time::Duration {
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Whether no other process can lead, by the monotonic clock of this machine.
    pub fn is_certain(&self) -> bool {
        self.age() < DURATION
    }

    /// The hub serves another process with the key of the cluster. If the Lease is current, this is a copy, which the hub reports; otherwise
    /// it is the next leader.
    pub fn note_replaced(&self) {
        if !self.is_certain() {
            self.replaced.cancel();
        }
    }

    /// Gives the Lease back, so that the next leader need not wait until it ends. Everything that this process has served must have ended.
    pub async fn release(&self) {
        let Self { client, lease, identity, .. } = self.clone();
        Election::new(client, Some(&lease.namespace), &lease.name, identity).release().await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hanse_runtime::health::Health;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn another_process_at_the_hub_is_the_next_leader_only_after_the_lease_has_ended() {
        hanse_identity::tls::install_provider();
        let config = kube::Config::new("https://127.0.0.1:1".parse().expect("an address"));
        let leadership = Leadership {
            client: Client::try_from(config).expect("a client"),
            lease: SecretName { namespace: "hanse".to_owned(), name: "member".to_owned() },
            identity: "one".to_owned(),
            renewed: Arc::new(Mutex::new(Instant::now())),
            replaced: CancellationToken::new(),
        };
        let writes = Writes::new(&Health::default());
        let failed = || Err(anyhow!("the API server is away"));
        let second = Duration::from_secs(1);
        tokio::time::advance(DURATION - second).await;
        leadership.note(Instant::now(), &failed(), &writes);
        leadership.note_replaced();
        assert!(!leadership.replaced.is_cancelled(), "no other process can have the Lease: it is a copy");
        assert!(writes.failing().is_empty(), "a restart of the API server is not reported");
        leadership.note(Instant::now(), &Ok(()), &writes);
        tokio::time::advance(DURATION - second).await;
        leadership.note_replaced();
        assert!(leadership.is_certain() && !leadership.replaced.is_cancelled(), "it was renewed");
        tokio::time::advance(second).await;
        leadership.note(Instant::now(), &failed(), &writes);
        assert!(!leadership.is_certain() && writes.failing().contains_key(REPORTED_AS));
        assert!(!leadership.replaced.is_cancelled(), "while no other process publishes, it goes on");
        leadership.note_replaced();
        assert!(leadership.replaced.is_cancelled());
    }
}
