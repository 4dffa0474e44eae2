//! The one thread that touches the kernel: applies rule sets in order, and repairs what others change.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use hanse_dataplane::nftables::{Config, Nftables};
use hanse_dataplane::{Applied, Backend as _, Error, Found};
use hanse_ruleset::{NodeConfig, RuleSet};
use ipnet::IpNet;
use tokio::sync::oneshot;

use crate::{snapshot, uplinks};

/// How often drift is looked for: well under the second within which it is promised to be gone.
const REPAIR_EVERY: Duration = Duration::from_millis(200);

struct Command {
    rules: Arc<RuleSet>,
    answer: oneshot::Sender<Result<Applied, Error>>,
}

/// Hands rule sets to the thread.
#[derive(Debug, Clone)]
pub struct Enforcer {
    commands: mpsc::Sender<Command>,
}

/// How the agent enforces.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the snapshot is kept.
    pub data: PathBuf,
    pub dataplane: Config,
    /// Take the interfaces with routes out of the node as uplinks, instead of those in `dataplane`.
    pub detect_uplinks: bool,
    /// Denied, as long as nothing else is known.
    pub pod_ranges: Vec<IpNet>,
}

impl Options {
    pub fn snapshot(&self) -> PathBuf {
        self.data.join("ruleset.snapshot")
    }
}

impl Enforcer {
    /// Brings the kernel to what is known at start, before anybody is asked: rules that are found stay; without any the
    /// snapshot is applied; without one the node's pod ranges are closed. Returns what is now known to be in force.
    ///
    /// # Errors
    /// When the kernel cannot be spoken to.
    pub fn start(options: Options) -> Result<(Self, Option<Arc<RuleSet>>), Error> {
        let mut backend = Nftables::open(options.dataplane.clone())?;
        let kept = snapshot::read(&options.snapshot()).map(Arc::new);
        let ranges = kept.as_ref().map_or(&options.pod_ranges, |rules| &rules.node.pod_ranges).clone();
        if options.detect_uplinks {
            backend.set_uplinks(uplinks::detect(&ranges));
        }
        let held = match backend.adopt(kept.as_ref())? {
            Found::Rules { generation, digest } => {
                tracing::info!(term = generation.term, number = generation.number, %digest, "found rules in the kernel, which stay");
                kept.filter(|rules| rules.digest() == digest)
            }
            Found::Nothing => {
                let known = kept.is_some();
                let rules = kept.clone().unwrap_or_else(|| {
                    let node = NodeConfig { pod_ranges: options.pod_ranges.clone(), ..NodeConfig::default() };
                    Arc::new(RuleSet { node, ..RuleSet::default() })
                });
                backend.apply(&rules)?;
                tracing::info!(snapshot = known, "the kernel held no rules; applied what is known");
                kept
            }
        };
        let (commands, receiver) = mpsc::channel();
        std::thread::spawn(move || serve(&mut backend, &options, &receiver));
        Ok((Self { commands }, held))
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
}

fn serve(backend: &mut Nftables, options: &Options, commands: &mpsc::Receiver<Command>) {
    let mut ranges = options.pod_ranges.clone();
    loop {
        match commands.recv_timeout(REPAIR_EVERY) {
            Ok(Command { rules, answer }) => {
                ranges.clone_from(&rules.node.pod_ranges);
                if options.detect_uplinks {
                    backend.set_uplinks(uplinks::detect(&ranges));
                }
                let applied = backend.apply(&rules);
                if applied.is_ok()
                    && let Err(error) = snapshot::write(&options.snapshot(), &rules)
                {
                    tracing::error!(%error, "the snapshot cannot be written: a restart would begin with an older one");
                }
                // Who asked may have gone; the rules are in force all the same.
                let _ = answer.send(applied);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => match backend.repair() {
                Ok(true) => tracing::warn!("someone changed our rules in the kernel; repaired"),
                Ok(false) => {}
                Err(error) => tracing::error!(%error, "looking for drift failed"),
            },
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
    }
}
