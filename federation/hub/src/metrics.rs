//! The metrics of a hub. Labels come from closed sets.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_runtime::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use crate::operator::OperatorMetrics;
use crate::registry::{ClusterState, Lease, Snapshot};
use crate::status::Realisation;

/// The metrics of a hub. Clones share them.
#[derive(Debug, Clone)]
pub struct HubMetrics {
    pub(crate) connections: Gauge,
    revision: Gauge,
    pub(crate) store_unavailable: Gauge,
    clusters: Family<Cluster, Gauge>,
    publishing: Gauge,
    endpoints: Gauge,
    refused: Gauge,
    pub(crate) joins: Family<Outcome, Counter>,
    pub(crate) closed: Counter,
    pub(crate) exchange_lock: Histogram,
    agents: Gauge,
    agents_current: Gauge,
    unequal: Gauge,
    reviews: Family<Review, Counter>,
    unfinished: Gauge,
    pub(crate) operator: OperatorMetrics,
    pub(crate) operator_problems: Gauge,
}

impl Default for HubMetrics {
    fn default() -> Self {
        Self {
            connections: Gauge::default(),
            revision: Gauge::default(),
            store_unavailable: Gauge::default(),
            clusters: Family::default(),
            publishing: Gauge::default(),
            endpoints: Gauge::default(),
            refused: Gauge::default(),
            joins: Family::default(),
            closed: Counter::default(),
            // 0.1 ms to 6.5 s.
            exchange_lock: Histogram::new(exponential_buckets(0.0001, 4.0, 9)),
            agents: Gauge::default(),
            agents_current: Gauge::default(),
            unequal: Gauge::default(),
            reviews: Family::default(),
            unfinished: Gauge::default(),
            operator: OperatorMetrics::default(),
            operator_problems: Gauge::default(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cluster {
    state: &'static str,
}

/// The decision about a request of an API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Review {
    decision: &'static str,
}

/// The outcome of a call on the join listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Outcome {
    outcome: &'static str,
}

impl Outcome {
    pub(crate) const ISSUED: Self = Self { outcome: "issued" };
    pub(crate) const WAITING: Self = Self { outcome: "waiting" };
    pub(crate) const REFUSED: Self = Self { outcome: "refused" };
}

const DECISIONS: [&str; 3] = ["allowed", "refused", "undecided"];
const STATES: [&str; 6] = ["expected", "pending", "never heard", "live", "stale", "revoked"];

impl HubMetrics {
    pub fn new(metrics: &Metrics) -> Self {
        let this = Self::default();
        // Every series exists from the start.
        for outcome in [Outcome::ISSUED, Outcome::WAITING, Outcome::REFUSED] {
            this.joins.get_or_create(&outcome).inc_by(0);
        }
        for decision in DECISIONS {
            this.reviews.get_or_create(&Review { decision }).inc_by(0);
        }
        for state in STATES {
            this.clusters.get_or_create(&Cluster { state }).set(0);
        }
        metrics.register(|registry| {
            let hub = registry.sub_registry_with_prefix("hub");
            hub.register("connections", "Open connections of members and users", this.connections.clone());
            hub.register("registry_revision", "Newest revision of the registry", this.revision.clone());
            let help = "Seconds since the store last answered; 0 while it does";
            hub.register("store_unavailable_seconds", help, this.store_unavailable.clone());
            hub.register("clusters", "Clusters, by the state of their registration and lease", this.clusters.clone());
            hub.register(
                "publishing_clusters",
                "Clusters with a publishing stream at this hub",
                this.publishing.clone(),
            );
            hub.register("endpoints", "Endpoints that clusters publish", this.endpoints.clone());
            hub.register(
                "refused_objects",
                "Published objects that are refused by a grant or cannot be read",
                this.refused.clone(),
            );
            hub.register("joins", "Calls on the join listener, by outcome", this.joins.clone());
            hub.register(
                "revoked_connections",
                "Connections closed because their certificates are no longer admitted",
                this.closed.clone(),
            );
            hub.register(
                "exchange_lock_seconds",
                "Time for which one piece of work kept the lock of the exchange",
                this.exchange_lock.clone(),
            );
            hub.register("agents", "Agents of the clusters that publish at this hub", this.agents.clone());
            hub.register(
                "agents_current",
                "Agents that enforce the newest rules that their member has received",
                this.agents_current.clone(),
            );
            hub.register(
                "unequal_clusters",
                "Clusters whose copy of the objects of others differs from what the hub selected",
                this.unequal.clone(),
            );
            let help = "Requests of API servers at the admission webhook, by decision";
            hub.register("admission_reviews", help, this.reviews.clone());
            let help = "Recorded changes of custom resources that are neither in force nor known to have failed";
            hub.register("unfinished_changes", help, this.unfinished.clone());
            let help =
                "Problems of the operator and of the admission webhook at this hub, as `hanse status` shows them";
            hub.register("operator_problems", help, this.operator_problems.clone());
            this.operator.register(hub.sub_registry_with_prefix("operator"));
        });
        this
    }

    /// Counts a decision of the admission webhook, one of [`DECISIONS`].
    pub(crate) fn count_review(&self, decision: &'static str) {
        self.reviews.get_or_create(&Review { decision }).inc();
    }

    /// Sets the gauges to the current state.
    pub(crate) fn observe(&self, snapshot: &Snapshot, realisations: &BTreeMap<Arc<str>, Realisation>) {
        let gauge = |gauge: &Gauge, value: u64| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        gauge(&self.revision, snapshot.revision);
        let mut states: BTreeMap<&str, u64> = STATES.iter().map(|state| (*state, 0)).collect();
        for cluster in snapshot.clusters.values() {
            let state = match (&cluster.state, cluster.lease) {
                (ClusterState::Expected, _) => "expected",
                (ClusterState::Pending, _) => "pending",
                (ClusterState::Revoked { .. }, _) => "revoked",
                (ClusterState::Accepted, Lease::NeverConnected) => "never heard",
                (ClusterState::Accepted, Lease::Live) => "live",
                (ClusterState::Accepted, Lease::Stale) => "stale",
            };
            *states.entry(state).or_default() += 1;
        }
        for (state, count) in STATES.iter().filter_map(|state| Some((*state, *states.get(state)?))) {
            gauge(&self.clusters.get_or_create(&Cluster { state }), count);
        }
        gauge(&self.publishing, realisations.values().filter(|it| it.connected).count() as u64);
        gauge(&self.endpoints, realisations.values().map(|it| it.endpoints).fold(0, u64::saturating_add));
        let agents = realisations.values().map(|it| (u64::from(it.agents), u64::from(it.agents_current)));
        let (agents, current) = agents.fold((0, 0), |sum, it| (sum.0 + it.0, sum.1 + it.1));
        gauge(&self.agents, agents);
        gauge(&self.agents_current, current);
        gauge(&self.unequal, realisations.values().filter(|it| it.digests_equal == Some(false)).count() as u64);
        gauge(&self.unfinished, snapshot.changes.values().map(|all| all.len() as u64).sum());
        gauge(&self.refused, realisations.values().map(|it| it.refused).fold(0, u64::saturating_add));
    }
}
