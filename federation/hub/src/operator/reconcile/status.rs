//! Writes the statuses that differ, as far as the allowance of each object permits.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use tokio::time::Instant;

use super::Reconciler;
use super::{cluster_set, tokens};
use crate::operator::condition::{Written, refusal};
use crate::operator::members;
use crate::operator::metrics::{Objects, STATES};
use crate::operator::resource::{Key, Resource};
use crate::operator::status::{Facts, State};
use crate::operator::tracked::{Details, Tracked};
use crate::operator::writer::Write;

impl Reconciler {
    pub(super) async fn write_statuses(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let due: Vec<(Key, Value, Written)> = {
            let (snapshot, key_exchanges) = (self.registry.snapshot(), self.administration.key_exchanges());
            let state = State::new(&snapshot, &*self.realisations, self.administration.webhook_state());
            let is_due = |(_, it): &(&Key, &Tracked)| {
                it.may_write(now) && it.has_finalizer() && (!it.is_leaving || it.blocked.is_some())
            };
            let status = |(key, it): (&Key, &Tracked)| {
                let status = self.status(key, it, &state, &key_exchanges);
                let written = Written::of(Some(&status));
                (key.clone(), status, written)
            };
            self.ready().filter(is_due).map(status).collect()
        };
        self.busy += now.elapsed();
        let (mut writes, mut refusals) = (Vec::new(), Vec::new());
        for (key, status, written) in due {
            let Some(tracked) = self.tracked.get_mut(&key) else { continue };
            let urgency = tracked.status.difference(&written);
            if !urgency.is_some_and(|urgency| tracked.allowance.permits(urgency, now)) {
                continue;
            }
            tracked.allowance.written(now);
            if let Some((reason, message)) = refusal(&status).filter(|_| tracked.status.has_new_refusal(&written)) {
                refusals.push((key.clone(), reason.to_owned(), message.to_owned()));
            }
            writes.push((key.clone(), Write::status(&key, tracked, status)));
        }
        let (made, outcome) = self.send(writes).await;
        for (key, reason, message) in refusals.into_iter().filter(|(key, ..)| made.contains(key)) {
            if let Some(tracked) = self.tracked.get(&key) {
                self.writer.publish(&key, tracked, reason, &message).await;
            }
        }
        outcome
    }

    fn status(
        &self,
        key: &Key,
        tracked: &Tracked,
        state: &State<'_>,
        key_exchanges: &BTreeMap<Arc<str>, &'static str>,
    ) -> Value {
        let blocked = tracked.blocked.as_ref().map(|(_, why)| why.as_str());
        let facts = Facts {
            is_stored: tracked.is_stored(),
            generation: tracked.generation,
            refusal: tracked.refused.as_ref().map(|it| &it.refusal),
            blocked,
            nets: if let Details::Nets(count) = tracked.details { count } else { 0 },
        };
        match (&tracked.details, key.object()) {
            (Details::Token(_, before), _) => {
                let now = self.registry.now_seconds();
                tokens::status(state.snapshot, tracked, before, now)
            }
            (Details::ClusterSet(_), _) => {
                let root = self.administration.root_fingerprint();
                cluster_set::status(state.snapshot, tracked, root, &self.without_resource)
            }
            (Details::Acceptance(acceptance), Some(id)) => {
                let facts = members::Facts {
                    generation: tracked.generation,
                    used: state.accepted(&id, facts),
                    blocked,
                    acceptance: *acceptance,
                    realisation: state.clusters.get(&key.name),
                    key_exchange: key_exchanges.get(&key.name).copied(),
                    silent_for: self.registry.silent_for(&key.name),
                    now: self.registry.now(),
                };
                members::status(state.snapshot, &key.name, facts, &tracked.status)
            }
            (_, Some(id)) => state.status(&id, facts, &tracked.status),
            (_, None) => Value::Null,
        }
    }

    /// Sets the gauges.
    pub(super) fn count(&self) {
        let mut counts: BTreeMap<(Resource, &'static str), i64> = BTreeMap::new();
        for (key, it) in &self.tracked {
            let is_used = match key.resource {
                Resource::ClusterSet => it.status.is("Ready"),
                Resource::ClusterJoinToken => it.status.is("Issued"),
                _ => it.is_stored(),
            };
            let state = match () {
                () if it.is_leaving => "terminating",
                () if it.refused.is_some() => "refused",
                () if is_used => "accepted",
                () => "pending",
            };
            *counts.entry((key.resource, state)).or_default() += 1;
        }
        for resource in Resource::ALL {
            for state in STATES {
                let count = counts.get(&(resource, state)).copied().unwrap_or_default();
                self.writer.metrics.objects.get_or_create(&Objects { kind: resource.name(), state }).set(count);
            }
        }
        let without = i64::try_from(self.without_resource.1).unwrap_or(i64::MAX);
        self.writer.metrics.without_resource.set(without);
    }
}
