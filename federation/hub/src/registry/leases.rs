//! The leases of clusters: which clusters are live.
//!
//! A cluster has one lease, whose number is in the view. Any replica that receives a message of the cluster renews it, so that it ends
//! only when no replica does.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hanse_store::{LeaseId, Outcome, StoreError, Transaction};
use tokio::sync::OwnedMutexGuard;
use tracing::{info, warn};

use super::records::MemberState;
use super::{ChangeError, Registry, key};

/// How long a stream waits for the renewal of its lease. A store that does not answer must not stop the streams of members: the
/// renewal goes on, and a lease lasts for several of them.
const RENEWAL_WAIT: Duration = Duration::from_millis(250);

impl Registry {
    /// Begins or renews the lease of a cluster that sent a message. A renewal writes nothing, so that this may be called for each
    /// message. An error of the store is logged, and is not one of the caller.
    ///
    /// # Errors
    /// When the cluster is not accepted.
    pub async fn renew_lease(&self, cluster: &str) -> Result<(), ChangeError> {
        let name: Arc<str> = cluster.into();
        if !self.snapshot().members.get(cluster).is_some_and(|m| m.record.state == MemberState::Accepted) {
            return Err(ChangeError::NotFound(format!("cluster {cluster} is not accepted")));
        }
        let now = Instant::now();
        self.shared.last_received.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), now);
        let turn = {
            let mut renewing = self.shared.renewing.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(renewing.entry(name.clone()).or_default())
        };
        let renewing = async {
            let turn = turn.lock_owned().await;
            let this = self.clone();
            // To its end, also when the stream does not wait for it.
            let _ = tokio::spawn(async move { this.renew(&name, turn).await }).await;
        };
        let _ = tokio::time::timeout(RENEWAL_WAIT, renewing).await;
        Ok(())
    }

    async fn renew(&self, cluster: &Arc<str>, _turn: OwnedMutexGuard<()>) {
        if let Err(error) = self.begin_or_renew(cluster).await
            && self.unavailable_for().is_none()
        {
            warn!(%cluster, %error, "lease not renewed");
        }
    }

    async fn begin_or_renew(&self, cluster: &Arc<str>) -> Result<(), ChangeError> {
        if let Some(lease) = self.snapshot().lease_of(cluster) {
            match self.shared.store.renew_lease(lease).await {
                Err(StoreError::NoLease(_)) => {}
                outcome => return self.checked(outcome),
            }
        }
        let lease = self.checked(self.shared.store.grant_lease(self.shared.lease_time).await)?;
        self.begin(cluster, lease).await
    }

    async fn begin(&self, cluster: &Arc<str>, lease: LeaseId) -> Result<(), ChangeError> {
        let live = Transaction::default()
            .put_with_lease(key(&["lease", cluster])?, Bytes::new(), lease)
            .put(key(&["heard", cluster])?, Bytes::new());
        let outcome = self.checked(self.shared.store.commit(live).await)?;
        if let Outcome::Committed(revision) = outcome {
            self.shown(revision).await?;
        }
        info!(%cluster, "cluster is live");
        Ok(())
    }

    /// Time since this replica received a message from a cluster, by the monotonic clock.
    pub fn silent_for(&self, cluster: &str) -> Option<Duration> {
        self.shared.last_received.lock().unwrap_or_else(PoisonError::into_inner).get(cluster).map(Instant::elapsed)
    }
}
