//! The replicas of the hub that are running: each announces its addresses with a lease of the store, so that its record is gone soon
//! after its process.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use hanse_store::{LeaseId, StoreError, Transaction};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::records::{OperatorRecord, ReplicaRecord};
use super::{ChangeError, Registry, key, records};

/// How long the record of a replica stays after its process was killed; on etcd, up to a sixth longer.
const ANNOUNCED_FOR: Duration = Duration::from_secs(15);
/// Three attempts within that time.
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// How long the end of an announcement may take at shutdown.
const END_WITHIN: Duration = Duration::from_secs(2);

impl Registry {
    /// Announces the addresses of this process until `stop`, under a name that no other process has.
    pub async fn announce(self, replica: Arc<str>, addresses: BTreeSet<String>, stop: CancellationToken) {
        let record = ReplicaRecord { addresses: addresses.into_iter().collect() };
        self.keep(["hub", &replica], || record.clone(), stop).await;
    }

    /// Keeps the state of the operator of this process in the store until `stop`. It is written when it differs.
    pub async fn report_operator(
        self,
        identity: Arc<str>,
        state: impl Fn() -> OperatorRecord,
        stop: CancellationToken,
    ) {
        self.keep(["operator", &identity], state, stop).await;
    }

    /// Keeps a record of this process in the store until `stop`. It ends with the process.
    async fn keep<R: Serialize + PartialEq>(&self, name: [&str; 2], state: impl Fn() -> R, stop: CancellationToken) {
        let mut written: Option<(LeaseId, R)> = None;
        while !stop.is_cancelled() {
            let state = state();
            match self.renew_or_write(written.as_ref(), name, &state).await {
                Ok(lease) => written = Some((lease, state)),
                // The probe of the store logs that it is unavailable.
                Err(error) if self.unavailable_for().is_none() => {
                    warn!(%error, record = name.join("/"), "record of this hub not written to the store; trying again");
                }
                Err(_) => {}
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(if written.is_some() { RENEW_EVERY } else { RENEW_EVERY / 5 }) => {}
            }
        }
        if let Some((lease, _)) = written {
            // Otherwise it ends by itself.
            let _ = tokio::time::timeout(END_WITHIN, self.shared.store.end_lease(lease)).await;
        }
    }

    /// Renews the lease of a record, and writes the record where it differs from what was written, or has ended.
    async fn renew_or_write<R: Serialize + PartialEq>(
        &self,
        written: Option<&(LeaseId, R)>,
        name: [&str; 2],
        state: &R,
    ) -> Result<LeaseId, ChangeError> {
        let mut lease = None;
        if let Some((current, before)) = written {
            match self.shared.store.renew_lease(*current).await {
                // It ended while the store did not answer.
                Err(StoreError::NoLease(_)) => {}
                outcome => {
                    self.checked(outcome)?;
                    if before == state {
                        return Ok(*current);
                    }
                    lease = Some(*current);
                }
            }
        }
        let lease = match lease {
            Some(lease) => lease,
            None => self.checked(self.shared.store.grant_lease(ANNOUNCED_FOR).await)?,
        };
        let put = Transaction::default().put_with_lease(key(&name)?, records::encode(state), lease);
        self.checked(self.shared.store.commit(put).await)?;
        debug!(record = name.join("/"), "record of this hub written to the store");
        Ok(lease)
    }
}

#[cfg(test)]
mod tests {
    use hanse_store::in_memory;

    use super::super::Clock;
    use super::super::records::OperatorProblem;
    use super::*;
    use hanse_runtime::shutdown::Shutdown;

    fn addresses(of: &[&str]) -> BTreeSet<String> {
        of.iter().map(|it| (*it).to_owned()).collect()
    }

    #[tokio::test]
    async fn announced_addresses_are_in_the_view_until_the_process_stops() {
        let registry =
            Registry::open(in_memory(), Duration::from_secs(30), Clock::default(), &Shutdown::default()).await.unwrap();
        let mut view = registry.subscribe();
        let (one, two) = (CancellationToken::new(), CancellationToken::new());
        let tasks = [("a", "hub-0:1", &one), ("b", "hub-1:1", &two)].map(|(name, address, stop)| {
            tokio::spawn(registry.clone().announce(name.into(), addresses(&[address]), stop.clone()))
        });
        view.wait_for(|it| it.hub_addresses() == addresses(&["hub-0:1", "hub-1:1"])).await.unwrap();
        one.cancel();
        view.wait_for(|it| it.hub_addresses() == addresses(&["hub-1:1"])).await.unwrap();
        two.cancel();
        view.wait_for(|it| it.hub_addresses().is_empty()).await.unwrap();
        for task in tasks {
            task.await.unwrap();
        }
    }

    #[tokio::test]
    async fn state_of_an_operator_is_seen_by_other_replicas_until_its_process_stops() {
        let store = in_memory();
        let open = async || {
            Registry::open(store.clone(), Duration::from_secs(30), Clock::default(), &Shutdown::default()).await
        };
        let (one, other) = (open().await.unwrap(), open().await.unwrap());
        let (stop, problem) = (CancellationToken::new(), "NotRead".to_owned());
        let problem = OperatorProblem { reason: problem, message: "forbidden".to_owned(), since: 7 };
        let state = OperatorRecord { leads_since: Some(5), problems: vec![problem], total: 1, leader: None };
        let reported = state.clone();
        let task = tokio::spawn(one.report_operator("hub-0".into(), move || reported.clone(), stop.clone()));
        let mut view = other.subscribe();
        view.wait_for(|it| it.operators.get("hub-0").is_some_and(|it| **it == state)).await.unwrap();
        // It is not written again while it is the same.
        let revision = other.snapshot().revision;
        let again = other.renew_or_write(None, ["operator", "hub-1"], &state).await.unwrap();
        assert_eq!(
            other.renew_or_write(Some(&(again, state.clone())), ["operator", "hub-1"], &state).await.unwrap(),
            again
        );
        view.wait_for(|it| it.operators.len() == 2).await.unwrap();
        assert_eq!(other.snapshot().revision, revision + 1);
        stop.cancel();
        view.wait_for(|it| !it.operators.contains_key("hub-0")).await.unwrap();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn an_announcement_that_has_ended_is_made_again() {
        let store = in_memory();
        let registry = Registry::open(store.clone(), Duration::from_secs(30), Clock::default(), &Shutdown::default())
            .await
            .unwrap();
        let wanted = addresses(&["hub-0:1"]);
        let record = ReplicaRecord { addresses: wanted.iter().cloned().collect() };
        let lease = registry.renew_or_write(None, ["hub", "a"], &record).await.unwrap();
        assert_eq!(
            registry.renew_or_write(Some(&(lease, record.clone())), ["hub", "a"], &record).await.unwrap(),
            lease
        );
        store.end_lease(lease).await.unwrap();
        let next = registry.renew_or_write(Some(&(lease, record.clone())), ["hub", "a"], &record).await.unwrap();
        assert_ne!(next, lease);
        registry.subscribe().wait_for(|it| it.hub_addresses() == wanted).await.unwrap();
    }

    #[tokio::test]
    async fn records_of_replicas_are_limited_and_unreadable_ones_have_no_addresses() {
        let registry =
            Registry::open(in_memory(), Duration::from_secs(30), Clock::default(), &Shutdown::default()).await.unwrap();
        let put = async |name: &str, value: String| {
            let put = Transaction::default().put(key(&["hub", name]).unwrap(), value);
            registry.shared.store.commit(put).await.unwrap();
        };
        put("x", "no JSON".to_owned()).await;
        let many: Vec<String> = (0..9).map(|number| format!("many-{number}:1")).collect();
        put("y", serde_json::json!({ "addresses": many }).to_string()).await;
        put("z", r#"{"addresses": ["good:1", "not an address", "user@host:2"], "later": true}"#.to_owned()).await;
        let expected = addresses(&["good:1", "many-0:1", "many-1:1", "many-2:1", "many-3:1"]);
        registry.subscribe().wait_for(|it| it.hub_addresses() == expected).await.unwrap();
    }
}
