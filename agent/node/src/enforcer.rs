//! The one thread that touches the kernel: applies rule sets in order, repairs what others change, and probes whether the
//! hooks see the pods' packets.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hanse_dataplane::nftables::{Config, Nftables};
use hanse_dataplane::{Applied, Backend as _, Error, Finding, Found, Refusal};
use hanse_ruleset::{EndpointId, Generation, LocalEndpoint, NodeConfig, RuleSet};
use hanse_runtime::health::Writes;
use ipnet::IpNet;
use tokio::sync::{oneshot, watch};

use crate::{pod_ranges, snapshot, uplinks};

/// How often drift is looked for and probes have their turn, however many commands come: well under the second within which
/// drift is promised to be gone.
const REPAIR_EVERY: Duration = Duration::from_millis(200);
/// How long answers to a probe may take.
const PROBE_PATIENCE: Duration = Duration::from_millis(300);
/// Pods that one probe asks: with two addresses 2,000 packets, in a few milliseconds.
const MAX_PROBED: usize = 500;
/// When a pod that is not proven is asked again, doubling from the first to the second.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long what was proven is believed: what stands beside us on the node changes.
const BELIEVED: Duration = Duration::from_secs(600);
/// How long the snapshot may be older than what is in force while generations follow each other closely.
const SNAPSHOT_AGE: Duration = Duration::from_secs(1);
/// When a file that could not be written is tried again.
const WRITE_AGAIN: Duration = Duration::from_secs(2);

struct Command {
    rules: Arc<RuleSet>,
    answer: oneshot::Sender<Result<Applied, Error>>,
}

/// Hands rule sets to the thread.
#[derive(Debug, Clone)]
pub struct Enforcer {
    commands: mpsc::Sender<Command>,
    proofs: watch::Receiver<Arc<Proofs>>,
}

/// An agent's beginning.
#[derive(Debug)]
pub struct Started {
    pub enforcer: Enforcer,
    /// What is in force, as far as it is known.
    pub held: Option<Arc<RuleSet>>,
    /// What of it the kernel refused.
    pub refused: Vec<Refusal>,
    /// The ranges of the node's pods, as far as they are known.
    pub pod_ranges: Vec<IpNet>,
    /// Nothing is in force: no rules are known, and no range to close.
    pub open: bool,
    pub ended: Ended,
}

/// Sees the end of the enforcing thread.
#[derive(Debug)]
pub struct Ended(watch::Receiver<Arc<Proofs>>);

impl Ended {
    /// Returns when the thread has ended: because no [`Enforcer`] is left, or by a defect.
    pub async fn wait(mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

/// What probes have found so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proofs {
    /// What is wrong with the hooks as a whole; empty when they see pod traffic, or there is no pod.
    pub hooks: String,
    /// Pods that are not enforced, and those of which it is not known.
    pub unenforced: BTreeMap<EndpointId, String>,
}

/// How the agent enforces.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the snapshot is kept.
    pub data: PathBuf,
    pub dataplane: Config,
    /// Take the interfaces with routes out of the node as uplinks, instead of those in `dataplane`.
    pub detect_uplinks: bool,
    /// Denied, as long as nothing else is known, in place of those that the member has told.
    pub pod_ranges: Vec<IpNet>,
    /// Told which files cannot be written.
    pub writes: Writes,
}

impl Options {
    pub fn snapshot(&self) -> PathBuf {
        self.data.join("ruleset.snapshot")
    }
}

impl Enforcer {
    /// Brings the kernel to what is known at start, before anybody is asked: rules that are found stay; without any the
    /// snapshot is applied; without one the node's pod ranges are closed: those of `options`, else those that the member
    /// told last.
    ///
    /// # Errors
    /// When the kernel cannot be spoken to.
    pub fn start(options: Options) -> Result<Started, Error> {
        let mut backend = Nftables::open(options.dataplane.clone())?;
        let kept = snapshot::read(&options.snapshot()).map(Arc::new);
        let known = match options.pod_ranges.is_empty() {
            true => pod_ranges::read(&options.data),
            false => options.pod_ranges.clone(),
        };
        let ranges = kept.as_ref().map_or(&known, |rules| &rules.node.pod_ranges).clone();
        if options.detect_uplinks {
            backend.set_uplinks(uplinks::detect(&ranges));
        }
        let (mut refused, mut open) = (Vec::new(), false);
        let held = match backend.adopt(kept.as_ref())? {
            Found::Rules { generation, digest, whole } if is_of_member(generation) => {
                tracing::info!(term = generation.term, number = generation.number, %digest, "found rules in the kernel, which stay");
                let kept = kept.filter(|rules| rules.digest() == digest);
                if let Some(rules) = kept.as_ref().filter(|_| !whole) {
                    refused = backend.apply(rules)?.refused;
                    tracing::warn!("they were not what they say they are; repaired");
                }
                kept
            }
            // Ranges that were closed before stay closed, where none is known any more.
            Found::Rules { digest, .. } if kept.is_none() && known.is_empty() && digest != closed(&[]).digest() => None,
            Found::Rules { .. } | Found::Nothing => {
                let rules = kept.clone().unwrap_or_else(|| Arc::new(closed(&known)));
                refused = backend.apply(&rules)?.refused;
                tracing::info!(
                    snapshot = kept.is_some(),
                    pod_ranges = ranges.len(),
                    "the kernel held no rules of a member; applied what is known"
                );
                open = kept.is_none() && known.is_empty();
                kept
            }
        };
        if open {
            tracing::warn!(
                "no range of this node's pods is known: they are OPEN until the first rules arrive; give --pod-range"
            );
        }
        let (commands, receiver) = mpsc::channel();
        let (telling, proofs) = watch::channel(Arc::default());
        let prober = Prober::new(held.clone(), telling);
        // A panic ends the process ([`Ended`]): its rules stay, and the next start adopts them.
        std::thread::Builder::new()
            .name("enforcer".to_owned())
            .spawn(move || serve(&mut backend, &options, &receiver, prober))
            .map_err(Error::Io)?;
        let ended = Ended(proofs.clone());
        Ok(Started { enforcer: Self { commands, proofs }, held, refused, pod_ranges: ranges, open, ended })
    }

    /// One whose thread has ended, and whose probes have found `proofs`.
    #[cfg(test)]
    pub fn ended(proofs: Proofs) -> Self {
        Self { commands: mpsc::channel().0, proofs: watch::channel(Arc::new(proofs)).1 }
    }

    /// What probes have found, and when that changes.
    pub fn proofs(&self) -> watch::Receiver<Arc<Proofs>> {
        self.proofs.clone()
    }

    /// Makes `rules` what is enforced. When it returns, connections that they forbid are cut.
    ///
    /// # Errors
    /// When nothing of it is in force; what was stays.
    pub async fn apply(&self, rules: Arc<RuleSet>) -> Result<Applied, Error> {
        let (answer, answered) = oneshot::channel();
        let gone = || Error::Io(std::io::Error::other("the enforcing thread has ended"));
        self.commands.send(Command { rules, answer }).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// Closes `ranges` until the first rules arrive, on a node on which nothing is in force.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn close(&self, ranges: &[IpNet]) -> Result<(), Error> {
        self.apply(Arc::new(closed(ranges))).await.map(drop)
    }
}

/// Denies what no rules are known for. It has the generation that no member gives.
fn closed(ranges: &[IpNet]) -> RuleSet {
    let node = NodeConfig { pod_ranges: ranges.to_vec(), ..NodeConfig::default() };
    RuleSet { node, ..RuleSet::default() }
}

fn is_of_member(generation: Generation) -> bool {
    generation != Generation::default()
}

fn serve(backend: &mut Nftables, options: &Options, commands: &mpsc::Receiver<Command>, mut prober: Prober) {
    // What the file of the snapshot does not say yet, since when.
    let mut unsaved: Option<(Instant, Arc<RuleSet>)> = None;
    // What the file of the node's ranges says, by this process.
    let mut ranges = Vec::new();
    // A file could not be written: it is tried again then.
    let mut again_at: Option<Instant> = None;
    let mut look_at = Instant::now() + REPAIR_EVERY;
    loop {
        let idle = match commands.recv_timeout(look_at.saturating_duration_since(Instant::now())) {
            Ok(Command { rules, answer }) => {
                if options.detect_uplinks {
                    backend.set_uplinks(uplinks::detect(&rules.node.pod_ranges));
                }
                let applied = backend.apply(&rules);
                if applied.is_ok() && is_of_member(rules.generation) {
                    let since = unsaved.map_or_else(Instant::now, |(since, _)| since);
                    unsaved = Some((since, Arc::clone(&rules)));
                    prober.rules = Some(rules);
                }
                // Who asked may have gone; the rules are in force all the same.
                let _ = answer.send(applied);
                false
            }
            Err(mpsc::RecvTimeoutError::Timeout) => true,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                if let Some((_, rules)) = unsaved {
                    save(options, &rules);
                }
                return;
            }
        };
        if Instant::now() >= look_at {
            match backend.repair() {
                Ok(true) => tracing::warn!("someone changed our rules in the kernel; repaired"),
                Ok(false) => {}
                Err(error) => tracing::error!(%error, "looking for drift failed"),
            }
            prober.turn(backend);
            look_at = Instant::now() + REPAIR_EVERY;
        }
        if again_at.is_some_and(|at| Instant::now() < at) {
            continue;
        }
        let mut written = true;
        if let Some(rules) = prober.rules.as_ref().filter(|rules| rules.node.pod_ranges != ranges) {
            written = keep_ranges(options, &rules.node.pod_ranges);
            if written {
                ranges.clone_from(&rules.node.pod_ranges);
            }
        }
        // Time enough, or long enough.
        if let Some((_, rules)) = unsaved.as_ref().filter(|(since, _)| idle || since.elapsed() >= SNAPSHOT_AGE) {
            match save(options, rules) {
                true => unsaved = None,
                false => written = false,
            }
        }
        again_at = (!written).then(|| Instant::now() + WRITE_AGAIN);
    }
}

/// Whether they could be kept.
fn keep_ranges(options: &Options, ranges: &[IpNet]) -> bool {
    let kept = pod_ranges::write(&options.data, ranges);
    options.writes.note("pod-ranges", &kept);
    kept.is_ok()
}

/// Whether the snapshot could be written.
fn save(options: &Options, rules: &RuleSet) -> bool {
    let written = snapshot::write(&options.snapshot(), rules);
    options.writes.note("ruleset.snapshot", &written);
    written.is_ok()
}

/// Which pods are asked when, and what was found.
struct Prober {
    rules: Option<Arc<RuleSet>>,
    known: BTreeMap<EndpointId, Known>,
    under_way: Option<(Instant, Vec<Arc<LocalEndpoint>>)>,
    telling: watch::Sender<Arc<Proofs>>,
}

struct Known {
    endpoint: Arc<LocalEndpoint>,
    finding: Finding,
    again_at: Instant,
    again_after: Duration,
}

impl Prober {
    fn new(rules: Option<Arc<RuleSet>>, telling: watch::Sender<Arc<Proofs>>) -> Self {
        Self { rules, known: BTreeMap::new(), under_way: None, telling }
    }

    /// Reads the answers that are due, and asks whom it is time to ask.
    fn turn(&mut self, backend: &mut Nftables) {
        let Some(rules) = self.rules.clone() else { return };
        let mut hooks = String::new();
        match self.under_way.take() {
            Some((since, asked)) if since.elapsed() < PROBE_PATIENCE => {
                self.under_way = Some((since, asked));
                return;
            }
            Some((_, asked)) => match backend.findings(&asked) {
                Ok(findings) => self.learn(&asked, findings),
                Err(error) => hooks = format!("the answers to the probe cannot be read: {error}"),
            },
            None => {}
        }
        self.known.retain(|id, known| {
            rules.endpoints.get(id).is_some_and(|endpoint| endpoint.addresses == known.endpoint.addresses)
        });
        let now = Instant::now();
        let due = |id: &EndpointId| self.known.get(id).is_none_or(|known| known.again_at <= now);
        let ask: Vec<_> = rules.endpoints.iter().filter(|(id, _)| due(id)).map(|(_, it)| Arc::clone(it)).collect();
        let ask: Vec<_> = ask.into_iter().take(MAX_PROBED).collect();
        if !ask.is_empty() {
            match backend.probe(&ask) {
                Ok(()) => self.under_way = Some((now, ask)),
                Err(error) => hooks = format!("the probe cannot be sent: {error}"),
            }
        }
        self.tell(&rules, hooks);
    }

    fn learn(&mut self, asked: &[Arc<LocalEndpoint>], mut findings: BTreeMap<EndpointId, Finding>) {
        for endpoint in asked {
            let Some(finding) = findings.remove(&endpoint.id) else { continue };
            let before = self.known.get(&endpoint.id).filter(|known| known.finding == finding);
            let again_after = match (&finding, before) {
                (Finding::Enforced, _) => BELIEVED,
                (_, None) => ASK_AGAIN.0,
                (_, Some(known)) => (known.again_after * 2).min(ASK_AGAIN.1),
            };
            let again_at = Instant::now() + again_after;
            let known = Known { endpoint: Arc::clone(endpoint), finding, again_at, again_after };
            self.known.insert(endpoint.id.clone(), known);
        }
    }

    fn tell(&self, rules: &RuleSet, mut hooks: String) {
        let enforced = self.known.values().any(|known| known.finding == Finding::Enforced);
        if hooks.is_empty() && !enforced && !rules.endpoints.is_empty() {
            hooks = "no pod has shown yet that the hooks see its packets".into();
        }
        let reason = |id: &EndpointId| match self.known.get(id) {
            None => Some("not proven: the probe is under way".to_owned()),
            Some(Known { finding: Finding::Enforced, .. }) => None,
            Some(known) => Some(known.finding.to_string()),
        };
        let unenforced = rules.endpoints.keys().filter_map(|id| Some((id.clone(), reason(id)?))).collect();
        let proofs = Proofs { hooks, unenforced };
        self.telling.send_if_modified(|told| {
            let changed = **told != proofs;
            if changed {
                *told = Arc::new(proofs);
            }
            changed
        });
    }
}
