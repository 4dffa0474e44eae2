//! The metrics of an agent. Labels come from closed sets.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hanse_dataplane::Finding;
use hanse_ruleset::Generation;
use hanse_runtime::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

/// Clones share the metrics.
#[derive(Debug, Clone)]
pub struct AgentMetrics {
    in_sync: Gauge,
    generation_lag: Gauge<u64, AtomicU64>,
    apply_seconds: Histogram,
    apply_failures: Counter,
    refused: Gauge,
    repairs: Counter,
    repair_failures: Counter,
    pods: Family<Pods, Gauge>,
    flows_reported: Counter,
    flows_dropped: Counter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Pods {
    state: &'static str,
}

/// The states of pods.
const STATES: [&str; 3] = ["enforced", "unproven", "unenforced"];

impl Default for AgentMetrics {
    fn default() -> Self {
        Self {
            in_sync: Gauge::default(),
            generation_lag: Gauge::default(),
            // 0.1 ms to 1.6 s.
            apply_seconds: Histogram::new(exponential_buckets(1e-4, 2.0, 15)),
            apply_failures: Counter::default(),
            refused: Gauge::default(),
            repairs: Counter::default(),
            repair_failures: Counter::default(),
            pods: Family::default(),
            flows_reported: Counter::default(),
            flows_dropped: Counter::default(),
        }
    }
}

impl AgentMetrics {
    pub fn new(metrics: &Metrics) -> Self {
        let this = Self::default();
        this.set_pods(&[]);
        metrics.register(|registry| {
            let agent = registry.sub_registry_with_prefix("agent");
            agent.register(
                "in_sync",
                "1 while the newest rule set of the member is in force, else 0",
                this.in_sync.clone(),
            );
            agent.register(
                "generation_lag",
                "Generations between the newest one received and the one in force",
                this.generation_lag.clone(),
            );
            agent.register(
                "apply_seconds",
                "Duration of applying a rule set to the kernel",
                this.apply_seconds.clone(),
            );
            agent.register("apply_failures", "Rule sets that could not be applied", this.apply_failures.clone());
            agent.register("refused_objects", "Objects in force that the kernel refused", this.refused.clone());
            agent.register("drift_repairs", "Repairs of rules that another program changed", this.repairs.clone());
            agent.register(
                "drift_repair_failures",
                "Repairs that failed and are tried again",
                this.repair_failures.clone(),
            );
            agent.register("pods", "Pods of the node, by the state of their enforcement", this.pods.clone());
            agent.register("flows_reported", "Flow decisions reported to the member", this.flows_reported.clone());
            agent.register("flows_dropped", "Flow decisions that were not reported", this.flows_dropped.clone());
        });
        this
    }

    /// The stream is open, and the newest rule set is in force.
    pub(crate) fn set_in_sync(&self, in_sync: bool) {
        self.in_sync.set(in_sync.into());
    }

    pub(crate) fn set_refused(&self, objects: usize) {
        self.refused.set(objects as i64);
    }

    /// The newest generation that was received, and the one in force. Numbers of different terms do not compare: the lag is then
    /// all of the newer term.
    pub(crate) fn set_generations(&self, received: Generation, in_force: Generation) {
        let base = if in_force.term == received.term { in_force.number } else { 0 };
        self.generation_lag.set(received.number.saturating_sub(base));
    }

    pub(crate) fn applied(&self, duration: Duration, succeeded: bool) {
        self.apply_seconds.observe(duration.as_secs_f64());
        self.apply_failures.inc_by(u64::from(!succeeded));
    }

    pub(crate) fn repaired(&self) {
        self.repairs.inc();
    }

    pub(crate) fn repair_failed(&self) {
        self.repair_failures.inc();
    }

    /// The findings of all pods of the node.
    pub(crate) fn set_pods(&self, findings: &[Finding]) {
        let count = |is: fn(&Finding) -> bool| findings.iter().filter(|finding| is(finding)).count() as i64;
        let enforced = count(|it| matches!(it, Finding::Enforced));
        let unproven = count(|it| matches!(it, Finding::Pending | Finding::Silent(_)));
        let counts = [enforced, unproven, findings.len() as i64 - enforced - unproven];
        for (state, count) in STATES.into_iter().zip(counts) {
            self.pods.get_or_create(&Pods { state }).set(count);
        }
    }

    pub(crate) fn flows(&self, reported: u64, dropped: u64) {
        self.flows_reported.inc_by(reported);
        self.flows_dropped.inc_by(dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_lag_and_states_of_pods() {
        let registry = Metrics::default();
        let metrics = AgentMetrics::new(&registry);
        let at = |term, number| Generation { term, number };
        let shows =
            |line: &str| assert!(registry.encode().lines().any(|it| it == line), "{line}\n{}", registry.encode());
        shows("hanse_agent_pods{state=\"unproven\"} 0");
        metrics.set_generations(at(3, 12), at(3, 10));
        shows("hanse_agent_generation_lag 2");
        metrics.set_generations(at(4, 7), at(3, 10));
        shows("hanse_agent_generation_lag 7");
        metrics.set_generations(at(4, 7), at(4, 7));
        shows("hanse_agent_generation_lag 0");
        let silent = Finding::Silent("10.0.0.1".parse().expect("an address"));
        metrics.set_pods(&[Finding::Enforced, Finding::Pending, silent, Finding::Ipvs]);
        for line in ["{state=\"enforced\"} 1", "{state=\"unproven\"} 2", "{state=\"unenforced\"} 1"] {
            shows(&format!("hanse_agent_pods{line}"));
        }
    }
}
