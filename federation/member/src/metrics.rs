//! The metrics of a member.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hanse_runtime::metrics::Metrics as Registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use crate::fanout::status::NodeStatus;
use crate::world::World;

/// Clones share the metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    nodes: Gauge,
    connected: Gauge,
    current: Gauge,
    failed: Gauge,
    unenforced: Gauge,
    problems: Gauge,
    local_revision: Gauge<u64, AtomicU64>,
    hub_revision: Gauge<u64, AtomicU64>,
    refused: Gauge,
    waiting: Gauge,
    compiles: Counter,
    compile_seconds: Histogram,
}

/// Metrics of the flow decisions that agents report. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct FlowMetrics {
    written: Counter,
    missed: Counter,
}

impl FlowMetrics {
    pub fn new(registry: &Registry) -> Self {
        let it = Self::default();
        registry.register(|r| {
            r.register("member_flows_written", "Flow records that were written", it.written.clone());
            r.register("member_flows_lost", "Flow decisions without a record", it.missed.clone());
        });
        it
    }

    pub fn count(&self, written: u64, missed: u64) {
        self.written.inc_by(written);
        self.missed.inc_by(missed);
    }
}

impl Metrics {
    pub fn new(registry: &Registry) -> Self {
        // A tenth of a millisecond to 1.6 s.
        let compile_seconds = Histogram::new(exponential_buckets(1e-4, 2.0, 15));
        let it = Self {
            nodes: Gauge::default(),
            connected: Gauge::default(),
            current: Gauge::default(),
            failed: Gauge::default(),
            unenforced: Gauge::default(),
            problems: Gauge::default(),
            local_revision: Gauge::default(),
            hub_revision: Gauge::default(),
            refused: Gauge::default(),
            waiting: Gauge::default(),
            compiles: Counter::default(),
            compile_seconds,
        };
        registry.register(|r| {
            r.register("member_nodes", "Nodes that have a rule set", it.nodes.clone());
            r.register(
                "member_nodes_connected",
                "Nodes whose agents have a stream to this member",
                it.connected.clone(),
            );
            r.register("member_nodes_current", "Nodes that acknowledged both newest revisions", it.current.clone());
            r.register("member_nodes_failed", "Nodes where the newest rule set is not in force", it.failed.clone());
            r.register(
                "member_pods_unenforced",
                "Pods that are not enforced, or not proven to be; all pods of nodes without a current acknowledgement",
                it.unenforced.clone(),
            );
            r.register(
                "member_source_problems",
                "Problems of the source, such as manifests that cannot be read",
                it.problems.clone(),
            );
            r.register("member_source_revision", "Newest revision of the source", it.local_revision.clone());
            r.register(
                "member_hub_revision",
                "Revision of the hub that the rule sets include",
                it.hub_revision.clone(),
            );
            r.register("member_policies_refused", "Federated policies that cannot be read", it.refused.clone());
            r.register("member_policies_waiting", "Federated policies that wait for endpoints", it.waiting.clone());
            r.register("member_compiles", "Compilations of rule sets", it.compiles.clone());
            r.register("member_compile_seconds", "Duration of a compilation", it.compile_seconds.clone());
        });
        it
    }

    pub fn compiled(&self, took: Duration) {
        self.compiles.inc();
        self.compile_seconds.observe(took.as_secs_f64());
    }

    /// Sets the gauges. The last argument: the numbers of refused and of waiting policies.
    pub fn set(&self, world: &World, nodes: &BTreeMap<Arc<str>, NodeStatus>, (refused, waiting): (usize, usize)) {
        let hub = world.hub_position();
        let newest = (hub.epoch, hub.revision, world.local_revision());
        let (mut connected, mut current, mut failed) = (0, 0, 0);
        for node in nodes.values() {
            connected += i64::from(node.connected);
            current += i64::from(is_current(node, newest));
            failed += i64::from(node.failed.is_some() || node.rules_may_differ());
        }
        let pods = world.nodes().iter().map(|(node, rules)| (nodes.get(node), rules.rules.endpoints.len()));
        let unenforced = pods.map(|(node, pods)| unenforced(node, pods, newest) as i64).sum();
        self.nodes.set(world.nodes().len() as i64);
        self.connected.set(connected);
        self.current.set(current);
        self.failed.set(failed);
        self.unenforced.set(unenforced);
        self.problems.set(world.problems().len() as i64);
        self.local_revision.set(newest.2);
        self.hub_revision.set(newest.1);
        self.refused.set(refused as i64);
        self.waiting.set(waiting as i64);
    }
}

/// Whether a node has acknowledged `newest`: the hub's epoch and revision, and the revision of the source.
fn is_current(node: &NodeStatus, newest: (u64, u64, u64)) -> bool {
    let at = node.position;
    let is_newest = (at.hub_epoch, at.hub_revision, at.local_revision) == newest;
    node.connected && is_newest && !node.rules_may_differ()
}

/// The pods of a node with `pods` pods that are not enforced, or not proven to be.
fn unenforced(node: Option<&NodeStatus>, pods: usize, newest: (u64, u64, u64)) -> usize {
    let counts =
        |it: &&NodeStatus| is_current(it, newest) && it.failed.is_none() && it.hooks.is_none() && it.rivals.is_none();
    node.filter(counts).map_or(pods, |it| it.unenforced.len())
}

#[cfg(test)]
mod tests {
    use hanse_protocol::reason::{Failure, HookProblem};

    use super::*;
    use crate::fanout::RulesPosition;

    #[test]
    fn all_pods_count_as_unenforced_without_a_current_acknowledgement() {
        let newest = (1, 2, 3);
        let position = RulesPosition { hub_epoch: 1, hub_revision: 2, local_revision: 3, ..RulesPosition::default() };
        let current = NodeStatus { connected: true, position, ..NodeStatus::default() };
        let count = |node: &NodeStatus| unenforced(Some(node), 3, newest);
        assert_eq!(count(&current), 0);
        assert_eq!(unenforced(None, 3, newest), 3, "no agent ever connected");
        assert_eq!(count(&NodeStatus { connected: false, ..current.clone() }), 3);
        let behind = RulesPosition { local_revision: 2, ..position };
        assert_eq!(count(&NodeStatus { position: behind, ..current.clone() }), 3);
        assert_eq!(count(&NodeStatus { failed: Some(Failure::EnforcerEnded), ..current.clone() }), 3);
        assert_eq!(count(&NodeStatus { hooks: Some(HookProblem::Unknown), ..current.clone() }), 3);
        let rivals = Some((([192, 0, 2, 1], 1).into(), ([192, 0, 2, 2], 1).into()));
        assert_eq!(count(&NodeStatus { rivals, ..current }), 3);
    }
}
