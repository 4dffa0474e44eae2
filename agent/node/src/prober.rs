//! Probes whether the hooks see the packets of pods.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_dataplane::{Backend, Finding};
use hanse_protocol::reason::HookProblem;
use hanse_ruleset::{EndpointId, LocalEndpoint, RuleSet};
use tokio::sync::watch;

use crate::metrics::AgentMetrics;

/// How long answers to a probe may take.
const ANSWER_TIME: Duration = Duration::from_millis(300);
/// Pods of one probe: with two addresses each 2,000 packets, in a few milliseconds.
const MAX_PROBED: usize = 500;
/// When a pod that is not proven is probed again, doubling from the first to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// When a pod that is proven is probed again: other programs of the node change.
const RECHECK: Duration = Duration::from_secs(600);

/// What probes have found so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proofs {
    /// What is wrong with the hooks as a whole; `None` when they see pod traffic, or there is no pod.
    pub hooks: Option<HookProblem>,
    /// Pods that are not enforced, or not proven to be.
    pub unenforced: BTreeMap<EndpointId, Finding>,
}

/// Schedules probes and publishes what they find.
pub struct Prober {
    rules: Option<Arc<RuleSet>>,
    probed: BTreeMap<EndpointId, Probed>,
    in_flight: Option<(Instant, Vec<Arc<LocalEndpoint>>)>,
    /// Why the rules in the kernel cannot be restored. Nothing is probed meanwhile.
    not_restored: Option<String>,
    proofs: watch::Sender<Arc<Proofs>>,
    metrics: AgentMetrics,
}

struct Probed {
    endpoint: Arc<LocalEndpoint>,
    finding: Finding,
    again_at: Instant,
    again_after: Duration,
}

impl Prober {
    pub fn new(rules: Option<Arc<RuleSet>>, proofs: watch::Sender<Arc<Proofs>>, metrics: AgentMetrics) -> Self {
        Self { rules, probed: BTreeMap::new(), in_flight: None, not_restored: None, proofs, metrics }
    }

    pub fn set_rules(&mut self, rules: Arc<RuleSet>) {
        self.rules = Some(rules);
    }

    /// The rule set of a member that is in force, as far as it is known.
    pub fn rules(&self) -> Option<&Arc<RuleSet>> {
        self.rules.as_ref()
    }

    /// Publishes that the rules in the kernel cannot be restored: no pod counts as proven until they are, and it has answered again.
    pub fn set_not_restored(&mut self, error: Option<String>) {
        if self.not_restored != error {
            self.probed.clear();
            self.in_flight = None;
            self.not_restored = error;
            self.publish(None);
        }
    }

    /// Reads the answers that are due, and probes the pods that are due.
    pub fn turn(&mut self, backend: &mut dyn Backend) {
        let Some(rules) = self.rules.clone().filter(|_| self.not_restored.is_none()) else { return };
        let mut hooks = None;
        match self.in_flight.take() {
            Some((since, pods)) if since.elapsed() < ANSWER_TIME => {
                self.in_flight = Some((since, pods));
                return;
            }
            Some((_, pods)) => match backend.findings(&pods) {
                Ok(findings) => self.record(&pods, findings),
                Err(error) => hooks = Some(HookProblem::ProbeNotRead(in_words(&error))),
            },
            None => {}
        }
        self.probed.retain(|id, probed| {
            rules.endpoints.get(id).is_some_and(|endpoint| endpoint.addresses == probed.endpoint.addresses)
        });
        let now = Instant::now();
        let is_due = |id: &EndpointId| self.probed.get(id).is_none_or(|probed| probed.again_at <= now);
        let due = rules.endpoints.iter().filter(|(id, _)| is_due(id)).map(|(_, pod)| Arc::clone(pod));
        let due: Vec<_> = due.take(MAX_PROBED).collect();
        if !due.is_empty() {
            match backend.probe(&due) {
                Ok(()) => self.in_flight = Some((now, due)),
                Err(error) => hooks = Some(HookProblem::ProbeNotSent(in_words(&error))),
            }
        }
        self.publish(hooks);
    }

    fn record(&mut self, pods: &[Arc<LocalEndpoint>], mut findings: BTreeMap<EndpointId, Finding>) {
        for endpoint in pods {
            let Some(finding) = findings.remove(&endpoint.id) else { continue };
            let same = self.probed.get(&endpoint.id).filter(|probed| probed.finding == finding);
            let again_after = match (&finding, same) {
                (Finding::Enforced, _) => RECHECK,
                (_, None) => RETRY.0,
                (_, Some(probed)) => (probed.again_after * 2).min(RETRY.1),
            };
            let again_at = Instant::now() + again_after;
            let probed = Probed { endpoint: Arc::clone(endpoint), finding, again_at, again_after };
            self.probed.insert(endpoint.id.clone(), probed);
        }
    }

    fn publish(&self, hooks: Option<HookProblem>) {
        let nothing = RuleSet::default();
        let rules = self.rules.as_deref().unwrap_or(&nothing);
        let is_proven = self.probed.values().any(|probed| probed.finding == Finding::Enforced);
        let unproven = (!is_proven && !rules.endpoints.is_empty()).then_some(HookProblem::NotProven);
        let not_restored = self.not_restored.clone().map(HookProblem::NotRestored);
        let hooks = not_restored.or(hooks).or(unproven);
        let finding = |id: &EndpointId| self.probed.get(id).map_or(Finding::Pending, |probed| probed.finding.clone());
        let (ids, findings): (Vec<_>, Vec<_>) = rules.endpoints.keys().map(|id| (id.clone(), finding(id))).unzip();
        self.metrics.set_pods(&findings);
        let unenforced = ids.into_iter().zip(findings).filter(|(_, finding)| *finding != Finding::Enforced).collect();
        let proofs = Proofs { hooks, unenforced };
        self.proofs.send_if_modified(|published| {
            let changed = **published != proofs;
            if changed {
                *published = Arc::new(proofs);
            }
            changed
        });
    }
}

/// An error with its cause.
pub fn in_words(error: &hanse_dataplane::Error) -> String {
    match error {
        hanse_dataplane::Error::Access(cause) => cause.to_string(),
        hanse_dataplane::Error::Refused(why) => why.clone(),
    }
}
