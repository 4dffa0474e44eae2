//! The only thread that changes the dataplane: it applies rule sets in order, repairs drift, and probes whether the hooks see the
//! packets of pods.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hanse_dataplane::{Applied, Backend, Error, Found, Refusal};
use hanse_protocol::reason::Failure;
use hanse_ruleset::{Enforcement, Generation, NodeConfig, RuleSet};
use hanse_runtime::health::Writes;
use ipnet::IpNet;
use tokio::sync::{oneshot, watch};

use crate::metrics::AgentMetrics;
pub use crate::prober::Proofs;
use crate::prober::{Prober, in_words};
use crate::{pod_ranges, snapshot};

/// How often drift is looked for and probes have their turn, also while generations follow each other: drift is to be repaired
/// within a second.
const REPAIR_EVERY: Duration = Duration::from_millis(200);
/// The longest time between two repairs that fail: drift is to be repaired within a second of when that is possible.
const REPAIR_AGAIN: Duration = Duration::from_secs(1);
/// A repair that fails is tried again after this many times the time that it took. So large rule sets leave time for other work.
const REPAIR_PAUSE: u32 = 4;
/// How much older than the rules in force the snapshot may be while generations follow each other.
const SNAPSHOT_AGE: Duration = Duration::from_secs(1);
/// When a file that could not be written is tried again.
const WRITE_AGAIN: Duration = Duration::from_secs(2);

/// Why a rule set is not in force. What was in force before stays.
#[derive(Debug, thiserror::Error)]
pub enum EnforceError {
    #[error(transparent)]
    Backend(#[from] Error),
    #[error("the enforcer thread has ended")]
    Ended,
    #[error("start the enforcer thread")]
    Thread(#[source] std::io::Error),
}

impl From<&EnforceError> for Failure {
    fn from(error: &EnforceError) -> Self {
        match error {
            EnforceError::Backend(Error::Access(cause)) => Self::Dataplane(cause.to_string()),
            EnforceError::Backend(Error::Refused(why)) => Self::Refused(why.clone()),
            EnforceError::Ended | EnforceError::Thread(_) => Self::EnforcerEnded,
        }
    }
}

struct Command {
    rules: Arc<RuleSet>,
    answer: oneshot::Sender<Result<Applied, Error>>,
}

/// Passes rule sets to the thread.
#[derive(Debug, Clone)]
pub struct Enforcer {
    commands: mpsc::Sender<Command>,
    proofs: watch::Receiver<Arc<Proofs>>,
}

/// The state after the start.
#[derive(Debug)]
pub struct Started {
    pub enforcer: Enforcer,
    /// The rule set in force, as far as it is known.
    pub in_force: Option<Arc<RuleSet>>,
    /// Its objects that the kernel refused.
    pub refused: Vec<Refusal>,
    /// The ranges of the node's pods, as far as they are known.
    pub pod_ranges: Vec<IpNet>,
    /// Nothing is in force: neither rules nor pod ranges are known.
    pub open: bool,
    pub ended: Ended,
}

/// Reports the end of the enforcer thread.
#[derive(Debug)]
pub struct Ended(watch::Receiver<Arc<Proofs>>);

impl Ended {
    /// Returns when the thread has ended: because every [`Enforcer`] is dropped, or by a panic.
    pub async fn wait(mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

#[derive(Debug, Clone)]
pub struct Options {
    /// The directory of the snapshot and of the pod ranges.
    pub data: PathBuf,
    /// Closed while nothing else is known, instead of the ranges that the member sent last.
    pub pod_ranges: Vec<IpNet>,
    /// Records which files cannot be written.
    pub writes: Writes,
    pub metrics: AgentMetrics,
}

impl Options {
    pub fn snapshot(&self) -> PathBuf {
        self.data.join("ruleset.snapshot")
    }
}

impl Enforcer {
    /// Brings the dataplane to the last known state, before any member is reached. Rules in force with the snapshot's digest are
    /// written again in one transaction, or reported and tried again; others stay. Without any the snapshot is applied; without one
    /// the node's pod ranges are closed: those of `options`, else those that the member sent last.
    ///
    /// # Errors
    /// When the dataplane cannot be read, or refuses the last known state.
    pub fn start(mut backend: Box<dyn Backend>, options: Options) -> Result<Started, EnforceError> {
        let saved = snapshot::read(&options.snapshot()).map(Arc::new);
        let known_ranges = match options.pod_ranges.is_empty() {
            true => pod_ranges::read(&options.data),
            false => options.pod_ranges.clone(),
        };
        let pod_ranges = saved.as_ref().map_or(&known_ranges, |rules| &rules.node.pod_ranges).clone();
        let Initial { in_force, refused, open, not_restored } = initial(&mut *backend, saved, &known_ranges)?;
        if open {
            tracing::warn!(
                "no pod range of this node is known: its pods are OPEN until the first rules arrive; set --pod-range"
            );
        }
        let (commands, receiver) = mpsc::channel();
        let (publish, proofs) = watch::channel(Arc::default());
        let mut prober = Prober::new(in_force.clone(), publish, options.metrics.clone());
        let mut repairs = Repairs::new(options.metrics.clone());
        if let Some(error) = not_restored {
            repairs.failed(error, Instant::now(), &mut prober);
        }
        // A panic ends the process ([`Ended`]): its rules stay in force, and the next start adopts them.
        std::thread::Builder::new()
            .name("enforcer".to_owned())
            .spawn(move || serve(&mut *backend, &options, &receiver, prober, repairs))
            .map_err(EnforceError::Thread)?;
        let ended = Ended(proofs.clone());
        Ok(Started { enforcer: Self { commands, proofs }, in_force, refused, pod_ranges, open, ended })
    }

    /// An enforcer whose thread has ended, and whose probes have found `proofs`.
    #[cfg(test)]
    pub fn ended(proofs: Proofs) -> Self {
        Self { commands: mpsc::channel().0, proofs: watch::channel(Arc::new(proofs)).1 }
    }

    /// What probes have found.
    pub fn proofs(&self) -> watch::Receiver<Arc<Proofs>> {
        self.proofs.clone()
    }

    /// Enforces `rules`. When it returns, connections that they forbid are cut.
    ///
    /// # Errors
    /// When `rules` are not in force.
    pub async fn apply(&self, rules: Arc<RuleSet>) -> Result<Applied, EnforceError> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command { rules, answer }).map_err(|_| EnforceError::Ended)?;
        Ok(answered.await.map_err(|_| EnforceError::Ended)??)
    }

    /// Closes `ranges` until the first rules arrive, on a node where nothing is in force.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn close(&self, ranges: &[IpNet]) -> Result<(), EnforceError> {
        self.apply(Arc::new(closed(ranges))).await.map(drop)
    }
}

struct Initial {
    in_force: Option<Arc<RuleSet>>,
    refused: Vec<Refusal>,
    open: bool,
    /// Why the rules in force could not be written again.
    not_restored: Option<String>,
}

/// See [`Enforcer::start`].
fn initial(backend: &mut dyn Backend, saved: Option<Arc<RuleSet>>, known_ranges: &[IpNet]) -> Result<Initial, Error> {
    let nothing_known = saved.is_none() && known_ranges.is_empty();
    match backend.adopt(saved.as_ref())? {
        Found::Rules { generation, digest } if is_of_member(generation) => {
            let in_force = saved.filter(|rules| rules.digest() == digest);
            let is_known = in_force.is_some();
            tracing::info!(term = generation.term, number = generation.number, %digest, is_known, "adopted the rules in force");
            // Another program may have changed them while no agent ran, so they are written again.
            let (refused, not_restored) = match in_force.as_ref().map(|rules| backend.apply(rules)) {
                Some(Ok(applied)) => (applied.refused, None),
                Some(Err(error)) => (Vec::new(), Some(in_words(&error))),
                None => (Vec::new(), None),
            };
            Ok(Initial { in_force, refused, open: false, not_restored })
        }
        // Ranges that were closed before stay closed where none is known any more.
        Found::Rules { digest, .. } if nothing_known && digest != closed(&[]).digest() => {
            Ok(Initial { in_force: None, refused: Vec::new(), open: false, not_restored: None })
        }
        Found::Rules { .. } | Found::Nothing => {
            let rules = saved.clone().unwrap_or_else(|| Arc::new(closed(known_ranges)));
            let refused = backend.apply(&rules)?.refused;
            tracing::info!(
                snapshot = saved.is_some(),
                pod_ranges = rules.node.pod_ranges.len(),
                "no rules of a member were in force; applied the last known state"
            );
            Ok(Initial { in_force: saved, refused, open: nothing_known, not_restored: None })
        }
    }
}

/// Denies everything in `ranges`, with a generation that members never use.
fn closed(ranges: &[IpNet]) -> RuleSet {
    let node = NodeConfig { pod_ranges: ranges.to_vec(), ..NodeConfig::default() };
    RuleSet { node, ..RuleSet::default() }
}

fn is_of_member(generation: Generation) -> bool {
    generation != Generation::default()
}

fn serve(
    backend: &mut dyn Backend,
    options: &Options,
    commands: &mpsc::Receiver<Command>,
    mut prober: Prober,
    mut repairs: Repairs,
) {
    let mut files = Files::new(options);
    let mut repair_at = Instant::now() + REPAIR_EVERY;
    loop {
        let is_idle = match commands.recv_timeout(repair_at.saturating_duration_since(Instant::now())) {
            Ok(Command { rules, answer }) => {
                let span = tracing::info_span!("apply", term = rules.generation.term, number = rules.generation.number);
                let start = Instant::now();
                let applied = span.in_scope(|| backend.apply(&rules));
                options.metrics.applied(start.elapsed(), applied.is_ok());
                if applied.is_ok() {
                    repairs.succeeded(&mut prober);
                }
                if applied.is_ok() && is_of_member(rules.generation) {
                    files.rules_changed(&rules);
                    prober.set_rules(rules);
                }
                // The caller may be gone; the rules are in force nevertheless.
                let _ = answer.send(applied);
                false
            }
            Err(mpsc::RecvTimeoutError::Timeout) => true,
            Err(mpsc::RecvTimeoutError::Disconnected) => return files.close(),
        };
        if Instant::now() >= repair_at {
            repairs.turn(backend, &mut prober);
            prober.turn(backend);
            repair_at = Instant::now() + REPAIR_EVERY;
        }
        files.write(prober.rules(), is_idle);
    }
}

/// Repairs drift, and publishes when that fails. Logs changes only.
struct Repairs {
    metrics: AgentMetrics,
    failing: Option<Failing>,
}

/// A repair that failed.
struct Failing {
    error: String,
    again_at: Instant,
    again_after: Duration,
}

impl Repairs {
    fn new(metrics: AgentMetrics) -> Self {
        Self { metrics, failing: None }
    }

    fn turn(&mut self, backend: &mut dyn Backend, prober: &mut Prober) {
        let start = Instant::now();
        if self.failing.as_ref().is_some_and(|failing| start < failing.again_at) {
            return;
        }
        match backend.repair() {
            Ok(repaired) => {
                if repaired {
                    self.metrics.repaired();
                    tracing::warn!("another program changed the rules of Hanse; repaired");
                }
                self.succeeded(prober);
            }
            Err(error) => {
                self.metrics.repair_failed();
                self.failed(in_words(&error), start, prober);
            }
        }
    }

    fn failed(&mut self, error: String, start: Instant, prober: &mut Prober) {
        let before = self.failing.take();
        if before.as_ref().is_none_or(|failing| failing.error != error) {
            tracing::error!(%error, "rules in the kernel not restored, trying again; the node does not count as enforcing");
        }
        let again_after = before.map_or(REPAIR_EVERY, |failing| (failing.again_after * 2).min(REPAIR_AGAIN));
        let again_at = Instant::now() + again_after.max(start.elapsed() * REPAIR_PAUSE);
        prober.set_not_restored(Some(error.clone()));
        self.failing = Some(Failing { error, again_at, again_after });
    }

    /// The rules in the kernel are those of the last rule set.
    fn succeeded(&mut self, prober: &mut Prober) {
        if self.failing.take().is_some() {
            tracing::info!("rules in the kernel restored");
            prober.set_not_restored(None);
        }
    }
}

/// The files of the thread, which follow what is in force.
struct Files<'a> {
    options: &'a Options,
    /// Rules that are not in the snapshot, and since when.
    unsaved: Option<(Instant, Arc<RuleSet>)>,
    /// The contents of the file of pod ranges, as written by this process. Empty: there is no file.
    ranges: Option<Vec<IpNet>>,
    /// When a file that could not be written is tried again.
    again_at: Option<Instant>,
}

impl<'a> Files<'a> {
    fn new(options: &'a Options) -> Self {
        Self { options, unsaved: None, ranges: None, again_at: None }
    }

    fn rules_changed(&mut self, rules: &Arc<RuleSet>) {
        let since = self.unsaved.take().map_or_else(Instant::now, |(since, _)| since);
        self.unsaved = Some((since, Arc::clone(rules)));
    }

    fn write(&mut self, in_force: Option<&Arc<RuleSet>>, is_idle: bool) {
        if self.again_at.is_some_and(|at| Instant::now() < at) {
            return;
        }
        let mut written = true;
        // Those of a node that only observes are not closed at a start without rules.
        let ranges = in_force.map(|rules| match rules.node.enforcement {
            Enforcement::Enforce => &rules.node.pod_ranges[..],
            Enforcement::Observe => &[],
        });
        if let Some(ranges) = ranges.filter(|ranges| self.ranges.as_deref() != Some(ranges)) {
            let result = match ranges {
                [] if in_force.is_some_and(|it| it.node.enforcement == Enforcement::Observe) => {
                    pod_ranges::remove(&self.options.data)
                }
                ranges => pod_ranges::write(&self.options.data, ranges),
            };
            self.options.writes.note("pod-ranges", &result);
            written = result.is_ok();
            if written {
                self.ranges = Some(ranges.to_vec());
            }
        }
        if let Some((_, rules)) = self.unsaved.as_ref().filter(|(since, _)| is_idle || since.elapsed() >= SNAPSHOT_AGE)
        {
            match self.save(rules) {
                true => self.unsaved = None,
                false => written = false,
            }
        }
        self.again_at = (!written).then(|| Instant::now() + WRITE_AGAIN);
    }

    fn close(self) {
        if let Some((_, rules)) = &self.unsaved {
            self.save(rules);
        }
    }

    /// Whether the snapshot could be written.
    fn save(&self, rules: &RuleSet) -> bool {
        let written = snapshot::write(&self.options.snapshot(), rules);
        self.options.writes.note("ruleset.snapshot", &written);
        written.is_ok()
    }
}
