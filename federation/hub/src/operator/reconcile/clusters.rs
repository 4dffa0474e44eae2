//! MemberClusters: which clusters take part.

use anyhow::Context as _;
use hanse_runtime::retry::Backoff;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tracing::{info, warn};

use super::Reconciler;
use crate::operator::members;
use crate::operator::resource::{Key, Resource};
use crate::operator::tracked::Details;
use crate::operator::writer::{Patched, Write};
use crate::registry::ChangeError;

/// MemberClusters that are created in one pass.
const ADOPTED: usize = 50;
/// Delays after the API server refused to create one.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

impl Reconciler {
    /// Creates a MemberCluster for each cluster that has none: it joined before the operator ran, or without one.
    pub(super) async fn adopt(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let waits = self.adopting.as_ref().is_some_and(|(_, at)| *at > now);
        if waits || !self.is_ready(Resource::MemberCluster) {
            return Ok(());
        }
        let snapshot = self.registry.snapshot();
        let lacking =
            snapshot.clusters.keys().map(|name| Key { resource: Resource::MemberCluster, name: Arc::clone(name) });
        let lacking = lacking.filter(|key| !self.tracked.contains_key(key)).take(ADOPTED);
        let writes: Vec<_> =
            lacking.map(|key| (key.clone(), Write::Create(members::adopted(&snapshot, &key.name)))).collect();
        if writes.is_empty() {
            return Ok(());
        }
        let (mut outcome, mut refused) = (Ok(()), None);
        for (key, patched) in self.writer.send(writes).await {
            match patched {
                Patched::Made(object) => {
                    info!(object = %key, "MemberCluster created for a cluster of the hub");
                    self.take_object(key.resource, &object);
                }
                // Another one is there, or the definition is gone.
                Patched::Gone => {}
                Patched::Refused(why) => refused = Some((key, why)),
                Patched::Failed(error) => outcome = Err(error),
            }
        }
        self.adopting = refused.map(|(key, why)| {
            warn!(object = %key, error = why, "MemberCluster not created for a cluster of the hub");
            let mut backoff = self.adopting.take().map_or_else(|| Backoff::new(RETRY.0, RETRY.1), |it| it.0);
            let at = now + backoff.next_delay();
            (backoff, at)
        });
        outcome
    }

    /// Carries out `spec.acceptance`.
    pub(super) async fn accept(&mut self) -> anyhow::Result<()> {
        let snapshot = self.registry.snapshot();
        let mut changes = Vec::new();
        for (key, it) in self.ready() {
            let Details::Acceptance(acceptance) = it.details else { continue };
            let Some(member) = snapshot.members.get(&key.name).filter(|_| !it.is_leaving && it.has_finalizer()) else {
                continue;
            };
            if let Some(to) = members::change(acceptance, it.is_stored(), &member.record) {
                changes.push((key.clone(), to));
            }
        }
        let mut outcome = Ok(());
        for (key, to) in changes {
            match self.administration.operate_state(&key.name, to).await {
                // It has left, or was revoked meanwhile.
                Ok(()) | Err(ChangeError::NotFound(_) | ChangeError::Conflict(_)) => {}
                Err(error) => outcome = Err(error).with_context(|| format!("change the acceptance of {key}")),
            }
        }
        outcome
    }
}
