//! Which process publishes for a cluster: all replicas of the hub prefer the same one, if copies of a member's folder run.
//!
//! The record has the lease of its cluster. It decides nothing by itself: it names the process that other
//! replicas have served, for one that has just started.

use hanse_store::{Compare, Transaction};
use tracing::debug;

use super::{ChangeError, Registry, key};

impl Registry {
    /// Records the process that publishes for a cluster, unless the record has changed or the cluster has no lease.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn record_instance(&self, cluster: &str, number: &str) -> Result<(), ChangeError> {
        let snapshot = self.snapshot();
        let Some((lease, _)) = snapshot.lease_of(cluster) else { return Ok(()) };
        let name = key(&["instance", cluster])?;
        let unchanged = match snapshot.instances.get(cluster) {
            Some(record) => Compare::Modified(name.clone(), record.revision),
            None => Compare::Absent(name.clone()),
        };
        let put = Transaction::default().when(unchanged).put_with_lease(name, number.to_owned(), lease);
        let outcome = self.checked(self.shared.store.commit(put).await)?;
        debug!(cluster, number, ?outcome, "process of a cluster recorded");
        Ok(())
    }
}
