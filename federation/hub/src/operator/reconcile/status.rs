//! Writes the statuses that differ, as far as the allowance of each object permits, and without waiting for the answers.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use tokio::time::Instant;
use tracing::warn;

use super::Reconciler;
use super::{cluster_set, tokens};
use crate::operator::condition::{Written, refusal};
use crate::operator::members;
use crate::operator::metrics::{Objects, STATES};
use crate::operator::resource::{Key, Resource};
use crate::operator::status::{Facts, State};
use crate::operator::statuses::Refusal;
use crate::operator::tracked::{Details, Tracked};
use crate::operator::writer::{Patched, Write, reference};

impl Reconciler {
    /// Sends the statuses that differ, and takes the answers to earlier ones. Waits for none.
    pub(super) fn write_statuses(&mut self) {
        self.take_written();
        let now = Instant::now();
        let due: Vec<(Key, Value, Written)> = {
            let (snapshot, key_exchanges) = (self.registry.snapshot(), self.administration.key_exchanges());
            let state = State::new(&snapshot, &*self.realisations, self.administration.webhook_state());
            let is_due = |(_, it): &(&Key, &Tracked)| {
                it.may_write(now) && it.has_finalizer() && (!it.is_leaving || it.blocked.is_some())
            };
            let has_room = |(key, _): &(&Key, &Tracked)| self.statuses.has_room(key);
            let status = |(key, it): (&Key, &Tracked)| {
                let status = self.status(key, it, &state, &key_exchanges);
                let written = Written::of(Some(&status));
                (key.clone(), status, written)
            };
            self.ready().filter(is_due).filter(has_room).map(status).collect()
        };
        self.busy += now.elapsed();
        for (key, status, written) in due {
            let Some(tracked) = self.tracked.get_mut(&key) else { continue };
            let urgency = tracked.status.difference(&written);
            let is_permitted = urgency.is_some_and(|urgency| tracked.allowance.permits(urgency, now));
            if !is_permitted || !self.statuses.has_room(&key) {
                continue;
            }
            tracked.allowance.written(now);
            let refusal = refusal(&status).filter(|_| tracked.status.has_new_refusal(&written));
            let refusal = refusal.map(|(reason, message)| Refusal {
                about: reference(&key, tracked),
                reason: reason.to_owned(),
                message: message.to_owned(),
            });
            let write = Write::status(&key, tracked, status);
            self.statuses.send(&self.writer, key, write, refusal);
        }
    }

    /// Waits until a status is written. Cancel safe.
    pub async fn written(&mut self) {
        self.statuses.written().await;
    }

    /// Takes the answers to statuses. One that failed is sent again later, and delays nothing else.
    fn take_written(&mut self) {
        let (now, mut failed) = (Instant::now(), BTreeMap::<Resource, usize>::new());
        for (key, patched) in self.statuses.take() {
            let why = match patched {
                Patched::Made(object) => {
                    // The watch may have reported a later version meanwhile.
                    if self.tracked.get(&key).is_some_and(|it| it.precedes(&object)) {
                        self.take_object(key.resource, &object);
                    }
                    self.tracked.get_mut(&key).into_iter().for_each(Tracked::write_accepted);
                    continue;
                }
                Patched::Gone => continue,
                Patched::Refused(why) => why,
                Patched::Failed(error) => format!("{error:#}"),
            };
            let count = failed.entry(key.resource).or_default();
            *count += 1;
            if *count == 1 {
                warn!(object = %key, error = why, "status not written");
            }
            self.tracked.get_mut(&key).into_iter().for_each(|it| it.write_refused(now));
        }
        for (resource, failed) in failed.into_iter().filter(|(_, count)| *count > 1) {
            warn!(kind = resource.name(), failed, "statuses not written");
        }
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
