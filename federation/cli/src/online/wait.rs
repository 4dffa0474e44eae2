//! `hanse wait`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::object_in_cluster::State;
use serde::Serialize;

use super::kind::{name_of, target};
use super::object::read;
use super::reason::{NodeReason, of_object};
use super::{CallError, Client, call, with_client};
use crate::completion;
use crate::output::{self, Format};

/// Interval between calls.
const POLL_EVERY: Duration = Duration::from_millis(100);
/// Interval between calls while the hub is unreachable.
const RETRY: Duration = Duration::from_secs(1);
/// Interval between progress messages, after the first.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Wait until objects are enforced on all nodes, or deleted from all nodes.
///
/// Policies are enforced by the clusters that they select; tiers, network sets, MemberClusters and deletions by all clusters that
/// have joined. An unreachable hub is retried until the timeout.
///
/// A node counts by what its agent acknowledged last. An agent that is not connected counts for the time of a lease, which is 30
/// seconds by default; after that its node lags, although its rules stay in the kernel.
///
/// Exit codes: 0 the condition is met; 1 timeout, with the clusters and nodes that lag; 2 a cluster refuses an object.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse wait default-deny
  hanse wait --timeout 300 default-deny inference tier/platform
  hanse apply -f policies/ && hanse wait -f policies/
  hanse wait --all
  hanse delete fnp web && hanse wait --for=deleted web")]
pub struct Wait {
    #[arg(long = "for", value_enum, default_value_t = Condition::Enforced)]
    condition: Condition,
    /// Timeout in seconds.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
    /// Names of FederatedNetworkPolicies, or other objects as KIND/NAME.
    #[arg(value_name = "NAME", add = completion::targets(), required_unless_present_any = ["all", "files"])]
    names: Vec<String>,
    /// All FederatedNetworkPolicies of the hub.
    #[arg(long)]
    all: bool,
    /// File or directory of manifests that name the objects, or `-` for standard input; repeatable.
    #[arg(short, long = "filename", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Format of the result, with each cluster.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Condition {
    /// All nodes are at or past the object's revision, without an error that names it. A staged policy changes no packet; its
    /// clusters evaluate it.
    Enforced,
    /// The object does not exist at the hub, and all nodes are at or past the revision of its deletion.
    Deleted,
}

/// One object that is waited for.
#[derive(Debug, Clone)]
struct Target {
    kind: pb::ObjectKind,
    name: String,
    /// The hub's revision at which the object was first absent.
    gone_at: u64,
}

#[derive(Debug, Serialize)]
struct Waited {
    kind: &'static str,
    name: String,
    /// `enforced`, `deleted`, `lagging` or `refused`; `lagging` also while no cluster that enforces it has joined.
    state: &'static str,
    /// Why it lags, where no cluster is the reason.
    #[serde(skip_serializing_if = "str::is_empty")]
    why: &'static str,
    clusters: Vec<InCluster>,
}

/// How far one object is in one cluster.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InCluster {
    pub cluster: String,
    /// `enforced`, `lagging` or `refused`.
    pub state: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// The same, for programs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<NodeReason>,
    /// Since the hub last received data from the cluster.
    pub age_ms: Option<u64>,
    pub nodes_enforcing: u32,
    pub nodes: u32,
}

impl From<pb::ObjectInCluster> for InCluster {
    fn from(it: pb::ObjectInCluster) -> Self {
        let (state, (why, reasons)) = match it.state {
            Some(State::Enforced(_)) => ("enforced", (String::new(), Vec::new())),
            Some(State::Refused(reasons)) => ("refused", of_object(reasons)),
            Some(State::Lagging(reasons)) => ("lagging", of_object(reasons)),
            None => ("lagging", ("unknown response: the hub is newer than this command".to_owned(), Vec::new())),
        };
        let pb::ObjectInCluster { cluster, age_ms, nodes_enforcing, nodes, .. } = it;
        Self { cluster, state, why, reasons, age_ms, nodes_enforcing, nodes }
    }
}

impl Target {
    async fn read(&mut self, client: &mut Client, condition: Condition) -> anyhow::Result<Waited> {
        let Self { kind, name, gone_at } = self;
        let request = pb::ObjectStatusRequest { kind: (*kind).into(), name: name.clone(), gone_at: *gone_at };
        let status = call(client.object_status(request)).await?;
        let kind = name_of((*kind).into());
        let clusters: Vec<InCluster> = status.clusters.into_iter().map(InCluster::from).collect();
        let is = |state: &str| clusters.iter().any(|it| it.state == state);
        let (state, why) = match (condition, status.revision) {
            (Condition::Enforced, 0) => {
                let message = format!("{kind}/{name} not found; `hanse get {kind}` lists all");
                return Err(CallError::Refused { code: tonic::Code::NotFound, message }.into());
            }
            (Condition::Deleted, 1..) => {
                *gone_at = 0;
                ("lagging", "the hub still has it: delete it with `hanse delete`")
            }
            _ if is("refused") => ("refused", ""),
            _ if is("lagging") => ("lagging", ""),
            (Condition::Enforced, _) if clusters.is_empty() => {
                ("lagging", "a cluster to join: none of those that it selects has joined")
            }
            (Condition::Enforced, _) => ("enforced", ""),
            (Condition::Deleted, 0) => ("deleted", ""),
        };
        if condition == Condition::Deleted && status.revision == 0 && *gone_at == 0 {
            *gone_at = status.hub_revision;
        }
        Ok(Waited { kind, name: name.clone(), state, why, clusters })
    }
}

impl Waited {
    /// `what`, and a line for each of the clusters that are in `state`.
    fn say(&self, what: &str) {
        let Self { kind, name, state, .. } = self;
        if !self.why.is_empty() {
            return output::note(format_args!("{kind}/{name} {what} {}", self.why));
        }
        let line = |it: &InCluster| {
            let age = match it.age_ms {
                _ if it.reasons.iter().any(NodeReason::is_silence) => String::new(),
                Some(age) if age > 5_000 => format!(" (silent for {})", output::length(Duration::from_millis(age))),
                Some(_) => String::new(),
                None => " (no data since the hub started)".to_owned(),
            };
            let nodes = format!("{} of {} nodes", it.nodes_enforcing, it.nodes);
            format!("{}, {nodes}: {}{age}", it.cluster, it.why)
        };
        let lines = self.clusters.iter().filter(|it| it.state == *state).map(line);
        output::note_list(format_args!("{kind}/{name} {what}"), &lines.collect::<Vec<_>>());
    }
}

impl Wait {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let start = Instant::now();
        let is_up = || start.elapsed() >= Duration::from_secs(self.timeout);
        let mut targets = Vec::new();
        for name in &self.names {
            let (kind, name) = target(name)?;
            targets.push(Target { kind, name, gone_at: 0 });
        }
        if !self.files.is_empty() {
            let named = read(&self.files, Format::Table)?.into_iter();
            targets.extend(named.map(|object| Target { kind: object.kind, name: object.name, gone_at: 0 }));
        }
        let mut progress = Progress { targets, listed: !self.all, said: None };
        let (mut again, mut said) = (false, String::new());
        loop {
            match with_client(context, async |client| self.poll(client, &mut progress, start).await) {
                Err(error) if CallError::is_passing(&error) && !is_up() => {
                    // The first time is expected: a policy that was just applied may not be distributed yet.
                    let text = format!("{error:#}");
                    if again && said != text {
                        output::note(format_args!("{text}; trying again"));
                        said = text;
                    }
                    std::thread::sleep(if again { RETRY } else { POLL_EVERY });
                    again = true;
                }
                outcome => return outcome,
            }
        }
    }

    /// Polls over one connection, as long as it lasts.
    async fn poll(&self, mut client: Client, progress: &mut Progress, start: Instant) -> anyhow::Result<ExitCode> {
        if !progress.listed {
            let kind = pb::ObjectKind::FederatedNetworkPolicy;
            let all = call(client.get(pb::GetRequest { kind: kind.into(), name: String::new() })).await?;
            progress.targets.extend(all.objects.into_iter().map(|it| Target { kind, name: it.name, gone_at: 0 }));
            progress.listed = true;
        }
        if progress.targets.is_empty() {
            output::note("there is nothing to wait for");
        }
        loop {
            let mut all = Vec::new();
            for target in &mut progress.targets {
                all.push(target.read(&mut client, self.condition).await?);
            }
            let is_up = start.elapsed() >= Duration::from_secs(self.timeout);
            let is = |state: &str| all.iter().any(|it| it.state == state);
            let code = match (is("refused"), is("lagging")) {
                (true, _) => Some(2),
                (false, false) => Some(0),
                (false, true) => is_up.then_some(1),
            };
            if let Some(code) = code {
                return match self.conclude(&all, start) {
                    Err(error) if !output::is_reader_gone(&error) => Err(error),
                    _ => Ok(ExitCode::from(code)),
                };
            }
            if progress.said.is_none_or(|said| said.elapsed() > SAY_EVERY) {
                progress.said = Some(Instant::now());
                all.iter().filter(|it| it.state == "lagging").for_each(|it| it.say("waits for"));
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    fn conclude(&self, all: &[Waited], start: Instant) -> anyhow::Result<()> {
        for it in all {
            let Waited { kind, name, state, .. } = it;
            match *state {
                _ if self.output != Format::Table => output::print(self.output, it)?,
                "refused" => it.say("is refused by"),
                "lagging" => {
                    let wanted = match self.condition {
                        Condition::Enforced => "enforced",
                        Condition::Deleted => "deleted everywhere",
                    };
                    it.say(&format!("is not {wanted} after {} s: it waits for", self.timeout));
                }
                state => {
                    let is_evaluated = state == "enforced" && *kind == "StagedFederatedNetworkPolicy";
                    let state = if is_evaluated { "evaluated" } else { state };
                    output::line(format_args!(
                        "{kind}/{name} is {state}, after {:.2} s",
                        start.elapsed().as_secs_f64()
                    ))?;
                }
            }
        }
        Ok(())
    }
}

struct Progress {
    targets: Vec<Target>,
    /// What `--all` means is known.
    listed: bool,
    said: Option<Instant>,
}
