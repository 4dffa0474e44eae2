//! The metrics of the operator. Labels come from closed sets.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::resource::Resource;

/// The metrics of the operator. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct OperatorMetrics {
    pub(super) leader: Gauge,
    pub(super) objects: Family<Objects, Gauge>,
    pub(super) without_resource: Gauge,
    pub(super) writes: Family<Writes, Counter>,
    pub(super) refusals: Family<Refusals, Counter>,
    queue_age: Gauge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Objects {
    pub kind: &'static str,
    pub state: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Writes {
    pub write: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Refusals {
    pub by: &'static str,
}

/// The states of custom resources.
pub(super) const STATES: [&str; 4] = ["accepted", "pending", "refused", "terminating"];
pub(super) const WRITES: [&str; 6] = ["create", "event", "finalizer", "release", "secret", "status"];

impl OperatorMetrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        // Every series exists from the start.
        for kind in Resource::ALL.map(Resource::name) {
            for state in STATES {
                self.objects.get_or_create(&Objects { kind, state }).set(0);
            }
        }
        WRITES.iter().for_each(|write| drop(self.writes.get_or_create(&Writes { write })));
        ["api_server", "hub"].iter().for_each(|by| drop(self.refusals.get_or_create(&Refusals { by })));
        registry.register("leader", "Whether this hub has the Lease and reconciles", self.leader.clone());
        registry.register("objects", "Custom resources, by kind and state", self.objects.clone());
        registry.register(
            "objects_without_resource",
            "Objects of the hub without a custom resource, which stay in force",
            self.without_resource.clone(),
        );
        registry.register("writes", "Writes to the API server", self.writes.clone());
        registry.register(
            "refusals",
            "Versions of custom resources that the hub refused, and writes that the API server refused",
            self.refusals.clone(),
        );
        registry.register(
            "queue_age_seconds",
            "Age of the oldest change of a custom resource that is not reconciled",
            self.queue_age.clone(),
        );
    }

    /// The age of the oldest change that is not reconciled.
    pub(crate) fn queued_for(&self, age: Duration) {
        self.queue_age.set(i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
    }

    pub(super) fn wrote(&self, write: &'static str) {
        self.writes.get_or_create(&Writes { write }).inc();
    }

    pub(super) fn refused(&self, by: &'static str) {
        self.refusals.get_or_create(&Refusals { by }).inc();
    }
}
