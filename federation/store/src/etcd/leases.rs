//! Leases, which etcd keeps and ends.
//!
//! etcd counts in whole seconds and renews over the network. A renewal within a seventh of the time to live after the last one
//! is answered here, so that a caller may renew with each message; the lease is granted a sixth longer in turn, and so never ends
//! early.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::connection::{CallError, Connection};
use super::failure::Failure;
use super::keys::number;
use crate::error::StoreError;
use crate::model::LeaseId;

/// Leases may be long, but not so long that adding them to a clock fails.
const MAX_SECONDS: u64 = 366 * 86_400;

#[derive(Debug, Default)]
pub(super) struct Leases {
    /// Those that this process has granted or renewed. Each is removed when it can only have ended.
    known: Mutex<HashMap<LeaseId, Known>>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    /// As etcd counts.
    granted: Duration,
    /// Before the request that renewed it.
    renewed: Instant,
}

/// The seconds that a lease is granted in etcd.
fn granted(time_to_live: Duration) -> u64 {
    let seconds = time_to_live.as_secs().saturating_add(u64::from(time_to_live.subsec_nanos() > 0));
    let seconds = seconds.clamp(1, MAX_SECONDS);
    seconds + seconds.div_ceil(6)
}

/// The time to live that was requested, in whole seconds.
fn requested(granted: u64) -> Duration {
    Duration::from_secs(granted - granted.div_ceil(7))
}

impl Leases {
    fn known(&self) -> MutexGuard<'_, HashMap<LeaseId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn renewed(&self, lease: LeaseId, granted: Duration, renewed: Instant) {
        let mut known = self.known();
        known.retain(|_, it| renewed.saturating_duration_since(it.renewed) < it.granted * 2);
        known.insert(lease, Known { granted, renewed });
    }

    /// Forgets a lease that has ended.
    pub(super) fn ended(&self, lease: LeaseId) {
        self.known().remove(&lease);
    }

    pub(super) async fn grant(&self, connection: &Connection, time_to_live: Duration) -> Result<LeaseId, StoreError> {
        let seconds = granted(time_to_live);
        let now = Instant::now();
        // A grant whose answer is lost leaves a lease without keys, which ends by itself.
        let answer =
            connection.call(|client| async move { client.lease_client().grant(number(seconds), None).await }).await?;
        let lease = LeaseId(u64::try_from(answer.id()).map_err(|_| StoreError::Closed)?);
        let seconds = u64::try_from(answer.ttl()).unwrap_or(seconds);
        self.renewed(lease, Duration::from_secs(seconds), now);
        Ok(lease)
    }

    pub(super) async fn renew(&self, connection: &Connection, lease: LeaseId) -> Result<(), StoreError> {
        let now = Instant::now();
        let known = self.known().get(&lease).copied();
        if known.is_some_and(|it| now.saturating_duration_since(it.renewed) < it.granted / 7) {
            return Ok(());
        }
        let id = id(lease)?;
        let renewal =
            connection.call(|client| async move { client.lease_client().keep_alive(id).await.map(drop) }).await;
        if let Err(error) = renewal {
            return Err(self.failed(lease, error));
        }
        let granted = match known {
            Some(known) => known.granted,
            None => self.granted(connection, lease).await?,
        };
        self.renewed(lease, granted, now);
        Ok(())
    }

    pub(super) async fn time_to_live(&self, connection: &Connection, lease: LeaseId) -> Result<Duration, StoreError> {
        Ok(requested(self.granted(connection, lease).await?.as_secs()))
    }

    async fn granted(&self, connection: &Connection, lease: LeaseId) -> Result<Duration, StoreError> {
        let id = id(lease)?;
        let answer = connection.call(|client| async move { client.lease_client().time_to_live(id, None).await }).await;
        match answer {
            Ok(answer) if answer.ttl() > 0 => {
                Ok(Duration::from_secs(u64::try_from(answer.granted_ttl()).unwrap_or_default()))
            }
            Ok(_) => Err(self.failed(lease, CallError::Failure(Failure::NoLease))),
            Err(error) => Err(self.failed(lease, error)),
        }
    }

    /// Whether a lease has ended.
    pub(super) async fn is_gone(&self, connection: &Connection, lease: LeaseId) -> Result<bool, StoreError> {
        match self.granted(connection, lease).await {
            Ok(_) => Ok(false),
            Err(StoreError::NoLease(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn end(&self, connection: &Connection, lease: LeaseId) -> Result<(), StoreError> {
        let id = id(lease)?;
        // A repetition finds that the first request has ended the lease.
        let attempts = std::sync::atomic::AtomicU32::new(0);
        let outcome = connection
            .call(|client| {
                attempts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                async move { client.lease_client().revoke(id).await }
            })
            .await;
        self.ended(lease);
        match outcome {
            Ok(_) => Ok(()),
            Err(CallError::Failure(Failure::NoLease)) if attempts.into_inner() > 1 => Ok(()),
            Err(error) => Err(self.failed(lease, error)),
        }
    }

    fn failed(&self, lease: LeaseId, error: CallError) -> StoreError {
        if matches!(error, CallError::Failure(Failure::NoLease)) {
            self.ended(lease);
            return StoreError::NoLease(lease);
        }
        error.into()
    }
}

/// etcd's number of a lease.
pub(super) fn id(lease: LeaseId) -> Result<i64, StoreError> {
    i64::try_from(lease.0).ok().filter(|id| *id > 0).ok_or(StoreError::NoLease(lease))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_a_sixth_more_than_the_longest_pause_between_renewals() {
        for seconds in [1, 2, 5, 6, 7, 30, 86_400] {
            let granted = granted(Duration::from_secs(seconds));
            assert_eq!(requested(granted), Duration::from_secs(seconds));
            let pause = Duration::from_secs(granted) / 7;
            assert!(Duration::from_secs(granted) - pause >= Duration::from_secs(seconds), "{seconds}");
        }
        assert_eq!(granted(Duration::from_millis(1_100)), 3);
        assert_eq!(granted(Duration::ZERO), 2);
        assert!(granted(Duration::MAX) < 1 << 32);
    }
}
