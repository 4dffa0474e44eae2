//! The status of clusters, nodes and objects, from the reports of enforcement.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_exchange::hub::Exchange;
use hanse_exchange::model::{ManifestKind, Position};
use hanse_policy::model::ClusterName;
use hanse_proto::federation::v1 as pb;
use hanse_protocol::reason::{ExchangeProblem, Reason};
use hanse_store::Revision;
use tokio::runtime::Handle;
use tokio::sync::MutexGuard;

use super::Service;
use crate::exchange::liveness::Receiving;
use crate::exchange::mutex::lock;
use crate::exchange::progress::Report;
use crate::manifest::{Kind, ObjectId};
use crate::registry::{Lease, Snapshot};
use crate::status::{NodeProgress, ObjectState, ObjectStatus, Problem, Realisation, Realisations, Reasons};

/// After this time, a cluster for which the exchange is busy has its last status, marked with its age. A caller waits for 10
/// seconds.
const STATUS_TIME: Duration = Duration::from_secs(3);
/// Problems of one cluster in its status: some 200 bytes each.
const MAX_PROBLEMS: usize = 32;

impl Realisations for Service {
    fn clusters(&self) -> BTreeMap<Arc<str>, Realisation> {
        let publishing = lock(&self.shared.publishing).clone();
        let rates = lock(&self.shared.rates).clone();
        let snapshot = self.registry.snapshot();
        let until = Instant::now() + STATUS_TIME;
        let mut known: BTreeMap<Arc<str>, Realisation> = BTreeMap::new();
        let Some(exchange) = self.locked_until(until) else {
            return snapshot.clusters.keys().map(|name| (name.clone(), self.last_status(name))).collect();
        };
        let names: Vec<ClusterName> = exchange.federation().clusters.keys().cloned().collect();
        let position = exchange.federation().position;
        drop(exchange);
        let mut last = BTreeMap::new();
        // Problems are derived from the reports after the lock is released.
        let mut reports = Vec::new();
        for name in &names {
            // One lock for each: it is compared with all others, which takes seconds for thousands of clusters.
            let Some(exchange) = self.locked_until(until) else {
                last.insert(name.clone(), self.last_status(name));
                continue;
            };
            let began = Instant::now();
            let entry = known.entry(name.clone()).or_default();
            entry.connected = publishing.get(name).is_some_and(|count| *count > 0);
            if let Some(origin) = exchange.origin(name) {
                let position = origin.position;
                (entry.epoch, entry.revision) = (position.epoch, position.revision);
                entry.endpoints = origin.endpoint_count() as u64;
                let (total, refusals) = origin.refusals(10);
                entry.refused = total as u64;
                entry.refusals = refusals.into_iter().map(|(id, why)| origin.explain(id, &why)).collect();
            }
            let slowed = rates.get(name).and_then(|rate| rate.slowed);
            if slowed.is_some_and(|at| at.elapsed() < Duration::from_secs(60)) {
                let granted = snapshot.clusters.get(name).map_or(0, |it| it.grant.limits.updates_per_second);
                entry.refusals.push(format!("more than {granted} updates per second: taken later"));
            }
            // The status of a cluster that is not connected states that already, but not that another replica is connected.
            let connected = entry.connected;
            let is_due = |why: &ExchangeProblem| connected || matches!(why, ExchangeProblem::NotPublishing(_));
            let not_reached = self.not_reached(&exchange, name).filter(is_due);
            entry.problems.extend(not_reached.map(|why| Problem::new("", Reason::Exchange(why))));
            if let Some(report) = self.last_report(&exchange, name) {
                entry.received_revision = report.received.as_ref().map_or(0, |at| at.revision);
                (entry.agents, entry.agents_current) = (report.agents, report.agents_current);
                // A cluster that watches another replica reports what that one has found.
                let watches = lock(&self.shared.watching).contains_key(name);
                let elsewhere = || report.digests_equal.filter(|_| !watches);
                entry.digests_equal = exchange.digests_equal(name).or_else(elsewhere);
                let unenforced = report.nodes.iter().map(|node| node.unenforced_total);
                entry.unenforced = unenforced.fold(0, u32::saturating_add);
                reports.push((name.clone(), report));
            }
            drop(exchange);
            self.lock_time.observe(began.elapsed().as_secs_f64());
        }
        for (name, report) in reports {
            let Some(entry) = known.get_mut(&name) else { continue };
            let progress = self.progress(&snapshot, &name, &report, position);
            entry.enforced_revision = progress.enforced_revision();
            let mut problems = progress.problems();
            entry.problems.extend(problems.by_ref().take(MAX_PROBLEMS));
            let total = entry.problems.len() + problems.count();
            entry.problems_total = u32::try_from(total).unwrap_or(u32::MAX);
        }
        let mut stored = lock(&self.shared.last_status);
        let now = Instant::now();
        stored.retain(|name, _| last.contains_key(name));
        stored.extend(known.iter().map(|(name, status)| (name.clone(), (now, status.clone()))));
        drop(stored);
        known.append(&mut last);
        known
    }

    fn nodes(&self, cluster: &str) -> Vec<NodeProgress> {
        let exchange = self.locked();
        let (report, position) = (self.last_report(&exchange, cluster), exchange.federation().position);
        drop(exchange);
        let snapshot = self.registry.snapshot();
        let nodes = report
            .iter()
            .flat_map(|report| self.progress(&snapshot, cluster, report, position).nodes().collect::<Vec<_>>());
        let mut nodes: Vec<NodeProgress> = nodes.collect();
        nodes.sort_by(|one, other| one.name.cmp(&other.name));
        nodes
    }

    fn object(&self, id: &ObjectId, gone_at: Revision) -> Option<BTreeMap<Arc<str>, ObjectStatus>> {
        let snapshot = self.registry.snapshot();
        let object = snapshot.objects.get(id);
        let needed = object.map_or(if gone_at > 0 { gone_at } else { snapshot.revision }, |object| object.revision);
        let kind = match id.kind {
            Kind::FederatedNetworkPolicy => Some(ManifestKind::Policy),
            Kind::StagedFederatedNetworkPolicy => Some(ManifestKind::StagedPolicy),
            Kind::FederatedNetworkSet | Kind::MemberCluster | Kind::Tier => None,
        };
        let policy = object.and(kind).map(|kind| (kind, &*id.name));
        let exchange = self.locked();
        let federation = exchange.federation();
        let position = federation.position;
        let clusters: Vec<ClusterName> = match policy {
            Some((kind, name)) => {
                let manifest = federation.manifests.get(&(kind, Arc::from(name)))?;
                manifest.enforcers.iter().flatten().cloned().collect()
            }
            None if position.revision < needed => return None,
            None => federation.clusters.keys().cloned().collect(),
        };
        let read = |cluster: &ClusterName| (self.last_report(&exchange, cluster), self.not_reached(&exchange, cluster));
        let reports: Vec<_> = clusters.iter().map(read).collect();
        drop(exchange);
        let status =
            |cluster: &ClusterName, (report, not_reached): (Option<Arc<pb::Realisation>>, Option<ExchangeProblem>)| {
                let Some(report) = report else { return ObjectStatus::lagging(Reason::NotReported) };
                let report = self.progress(&snapshot, cluster, &report, position);
                let status = report.object(policy, needed);
                if report.silent {
                    let silent = self.registry.silent_for(cluster).map_or(Duration::ZERO, |since| since);
                    let why = Reasons::of_cluster(Reason::ClusterSilent(silent));
                    return ObjectStatus { state: ObjectState::Lagging(why), ..status };
                }
                if let Some(why) = not_reached {
                    let why = Reasons::of_cluster(Reason::Exchange(why));
                    return ObjectStatus { state: ObjectState::Lagging(why), ..status };
                }
                status
            };
        Some(clusters.iter().zip(reports).map(|(cluster, report)| (cluster.clone(), status(cluster, report))).collect())
    }
}

impl Service {
    /// The last status of a cluster, with its age as a problem.
    fn last_status(&self, name: &str) -> Realisation {
        let last = lock(&self.shared.last_status).get(name).cloned();
        let age = last.as_ref().map(|(at, _)| at.elapsed());
        let mut status = last.map(|(_, status)| status).unwrap_or_default();
        status.problems.insert(0, Problem::new("", Reason::Exchange(ExchangeProblem::OldStatus(age))));
        status.problems_total = status.problems_total.saturating_add(1);
        status
    }

    /// Waits for the lock of the exchange, for a limited time. The runtime's other tasks go on on another thread.
    fn locked_until(&self, until: Instant) -> Option<MutexGuard<'_, Exchange>> {
        let wait = || Handle::current().block_on(tokio::time::timeout_at(until.into(), self.shared.exchange.lock()));
        self.shared.exchange.try_lock().ok().or_else(|| tokio::task::block_in_place(wait).ok())
    }

    fn locked(&self) -> MutexGuard<'_, Exchange> {
        let wait = || self.shared.exchange.blocking_lock();
        self.shared.exchange.try_lock().unwrap_or_else(|_| tokio::task::block_in_place(wait))
    }

    /// Why a cluster does not count as enforcing, whatever its nodes report: it may lack newer data.
    fn not_reached(&self, exchange: &Exchange, cluster: &ClusterName) -> Option<ExchangeProblem> {
        if let Some(conflict) = self.shared.processes.conflict(cluster) {
            return Some(conflict);
        }
        if let Some(silent) = lock(&self.shared.unheard).get(cluster) {
            return Some(ExchangeProblem::NotPublishing(*silent));
        }
        if let Some(ahead) = exchange.ahead_of_hub(cluster) {
            let hub = exchange.federation().position.revision;
            return Some(ExchangeProblem::AheadOfHub { at: ahead, hub });
        }
        let watches = lock(&self.shared.watching).contains_key(cluster);
        let lease = self.registry.lease_time();
        Receiving::problem(lock(&self.shared.receiving).get(cluster), watches, lease, tokio::time::Instant::now())
    }

    /// The last report of an accepted cluster.
    fn last_report(&self, exchange: &Exchange, cluster: &str) -> Option<Arc<pb::Realisation>> {
        let reported = lock(&self.shared.reported).get(cluster).map(|(_, report)| Arc::clone(report));
        reported.filter(|_| exchange.has_reported(cluster))
    }

    fn progress<'a>(
        &self,
        snapshot: &Snapshot,
        cluster: &str,
        reported: &'a pb::Realisation,
        hub: Position,
    ) -> Report<'a> {
        let at = lock(&self.shared.reported).get(cluster).map(|(at, _)| *at);
        let silent = snapshot.clusters.get(cluster).is_some_and(|it| it.lease == Lease::Stale);
        let age = at.map_or(Duration::ZERO, |at| at.elapsed());
        Report { reported, hub, age, silent, lease: self.registry.lease_time() }
    }
}
