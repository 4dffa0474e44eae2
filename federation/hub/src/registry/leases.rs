//! The leases of clusters: which clusters are live.
//!
//! A cluster has one lease, whose number is in the view. Any replica that receives a message of the cluster renews it, so that it ends
//! only when no replica does.
//!
//! etcd ends leases also while no hub runs. Such an end says nothing about the cluster: a hub that observes an end marks the cluster
//! as silent, and a hub that starts begins the missing leases of all others again.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hanse_store::{Compare, LeaseId, Outcome, Store, StoreError, Transaction};
use tokio::sync::{OwnedMutexGuard, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::records::MemberState;
use super::{ChangeError, Registry, Snapshot, key};

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
        let time = self.lease_time();
        let is_current = |seconds: Option<u64>| seconds.is_none_or(|it| it == time.as_secs());
        if let Some((lease, _)) = self.snapshot().lease_of(cluster).filter(|(_, seconds)| is_current(*seconds)) {
            match self.shared.store.renew_lease(lease).await {
                Err(StoreError::NoLease(_)) => {}
                outcome => return self.checked(outcome),
            }
        }
        let lease = self.checked(self.shared.store.grant_lease(time).await)?;
        self.begin(cluster, lease, time).await
    }

    async fn begin(&self, cluster: &Arc<str>, lease: LeaseId, time: Duration) -> Result<(), ChangeError> {
        let live = Transaction::default()
            .put_with_lease(key(&["lease", cluster])?, seconds_of(time), lease)
            .put(key(&["heard", cluster])?, Bytes::new())
            .delete(key(&["silent", cluster])?);
        let outcome = self.checked(self.shared.store.commit(live).await)?;
        if let Outcome::Committed(revision) = outcome {
            self.shown(revision).await?;
        }
        info!(%cluster, "cluster is live");
        Ok(())
    }

    /// Begins the leases again that have ended while no hub ran, as a store in a file does when it is opened.
    pub(super) async fn renew_after_outage(&self) -> Result<(), ChangeError> {
        let missing: Vec<Arc<str>> = self.snapshot().unmarked_stale().cloned().collect();
        let count = missing.len();
        for cluster in missing {
            let time = self.lease_time();
            let lease = self.checked(self.shared.store.grant_lease(time).await)?;
            let (live, silent) = (key(&["lease", &cluster])?, key(&["silent", &cluster])?);
            // Unless another replica has begun one, or has observed the end.
            let begin = Transaction::default()
                .when(Compare::Absent(live.clone()))
                .when(Compare::Absent(silent))
                .put_with_lease(live, seconds_of(time), lease);
            if let Outcome::Committed(revision) = self.checked(self.shared.store.commit(begin).await)? {
                self.shown(revision).await?;
            }
        }
        if count > 0 {
            info!(clusters = count, "leases that ended while no hub ran were begun again");
        }
        Ok(())
    }

    /// Marks clusters whose lease ends while this hub runs, until `stop`. Every replica does so; one of them is first.
    pub(super) async fn mark_silent(
        store: Arc<dyn Store>,
        mut view: watch::Receiver<Arc<Snapshot>>,
        stop: CancellationToken,
    ) {
        loop {
            let snapshot = view.borrow_and_update().clone();
            for cluster in snapshot.unmarked_stale() {
                if let Err(error) = mark(&*store, cluster).await {
                    warn!(%cluster, %error, "cluster not marked as silent");
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = view.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Time since this replica received a message from a cluster, by the monotonic clock.
    pub fn silent_for(&self, cluster: &str) -> Option<Duration> {
        self.shared.last_received.lock().unwrap_or_else(PoisonError::into_inner).get(cluster).map(Instant::elapsed)
    }
}

/// The time of a lease, as the value of its entry: when the settings change, it is replaced.
fn seconds_of(time: Duration) -> Bytes {
    Bytes::from(time.as_secs().to_string())
}

async fn mark(store: &dyn Store, cluster: &str) -> Result<(), ChangeError> {
    let (live, silent) = (key(&["lease", cluster])?, key(&["silent", cluster])?);
    let mark = Transaction::default().when(Compare::Absent(live)).when(Compare::Absent(silent.clone()));
    store.commit(mark.put(silent, Bytes::new())).await?;
    Ok(())
}
