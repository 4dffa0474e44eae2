//! `hanse status`. Health is the age of data and the equality of digests, not an open socket.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use hanse_proto::federation::v1 as pb;
use serde::Serialize;

use super::node::{self, Node};
use super::reason::Problem;
use super::{Client, call, time, with_client};
use crate::completion;
use crate::output::{self, ListFormat};

/// Show cluster status: connection, age of data, agents, certificates and problems.
///
/// AGE is the time since the hub last received data from the cluster, or `stale` if its lease has expired. ENDPOINTS is the
/// number of endpoints that the cluster publishes. ENFORCED is the hub revision that all its nodes enforce. AGENTS is the number
/// of agents that enforce the current generation. The lines below the table are the problems, with their nodes;
/// `hanse describe cluster` and `-o json` show all details.
///
/// Where hubs run with `--operator`, a line names the hub that reconciles the custom resources, and further lines the problems of all
/// hubs with the management cluster: missing rights, an API server that does not answer, and a webhook that cannot be used.
///
/// `-o wide` adds REVISION (of the data that the cluster publishes), DIGESTS (whether the cluster has received what the hub
/// selected for it), REFUSED (number of its objects that the hub refuses) and UNENFORCED (number of its pods without enforcement).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse status
  hanse status train
  hanse status --exit-code -o json
  hanse node list train")]
pub struct Status {
    /// Only this cluster.
    #[arg(add = completion::clusters())]
    cluster: Option<String>,
    /// Exit 1 if a cluster or the operator of the hub has a problem, if no cluster has joined, or if the store of the hub does not
    /// answer.
    #[arg(long)]
    exit_code: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: ListFormat,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    pub hub_revision: u64,
    /// Since the store of the hub last answered, while it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    store_unavailable_ms: Option<u64>,
    /// Of the hubs that reconcile custom resources, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    operator: Option<Operator>,
    #[serde(rename = "items")]
    pub clusters: Vec<Cluster>,
}

/// The operator, over all hubs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Operator {
    /// The hub that reconciles, by its name in the Lease.
    #[serde(skip_serializing_if = "String::is_empty")]
    leader: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    leading_ms: Option<u64>,
    problems: Vec<OperatorProblem>,
    problems_total: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct OperatorProblem {
    hub: String,
    reason: String,
    message: String,
    age_ms: u64,
}

impl Operator {
    fn new(it: pb::OperatorStatus) -> Self {
        let problem = |it: pb::OperatorProblem| OperatorProblem {
            hub: it.hub,
            reason: it.reason,
            message: it.message,
            age_ms: it.age_ms,
        };
        let problems = it.problems.into_iter().map(problem).collect();
        Self { leader: it.leader, leading_ms: it.leading_ms, problems, problems_total: it.problems_total }
    }

    fn lines(&self) -> Vec<String> {
        let length = |ms| output::length(Duration::from_millis(ms));
        let leads = match (&*self.leader, self.leading_ms) {
            ("", _) => "operator: no hub is known to reconcile custom resources".to_owned(),
            (leader, None) => format!("operator: {leader} reconciles custom resources"),
            (leader, Some(ms)) => format!("operator: {leader} reconciles custom resources, for {}", length(ms)),
        };
        let problem = |it: &OperatorProblem| format!("operator: {}: {}, for {}", it.hub, it.message, length(it.age_ms));
        let mut lines: Vec<String> = std::iter::once(leads).chain(self.problems.iter().map(problem)).collect();
        let unnamed = (self.problems_total as usize).saturating_sub(self.problems.len());
        if unnamed > 0 {
            lines.push(format!("operator: {} not listed here", output::count(unnamed, "more problem")));
        }
        lines
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    name: String,
    state: String,
    connected: bool,
    lease: String,
    /// Since the hub last received data from it.
    age_ms: Option<u64>,
    epoch: u64,
    revision: u64,
    endpoints: u64,
    digests_equal: Option<bool>,
    received_revision: u64,
    enforced_revision: u64,
    agents: u32,
    agents_current: u32,
    certificate_expires_at: String,
    #[serde(skip)]
    certificate_seconds: u64,
    key_exchange: String,
    refused: u64,
    refusals: Vec<String>,
    /// Pods that are not enforced.
    unenforced: u32,
    /// In words, as they are printed.
    problems: Vec<String>,
    /// Nodes with a problem, with all that each concerns.
    nodes: Vec<Node>,
    /// Advice where nothing is wrong.
    warnings: Vec<String>,
}

impl Cluster {
    fn new(it: pb::ClusterStatus, hub_revision: u64) -> Self {
        let problems = problems(&it, hub_revision);
        Self {
            name: it.name,
            state: it.state,
            connected: it.connected,
            lease: it.lease,
            age_ms: it.age_ms,
            epoch: it.epoch,
            revision: it.revision,
            endpoints: it.endpoints,
            digests_equal: it.digests_equal,
            received_revision: it.received_revision,
            enforced_revision: it.enforced_revision,
            agents: it.agents,
            agents_current: it.agents_current,
            certificate_expires_at: time(it.certificate_expires_at),
            certificate_seconds: it.certificate_expires_at,
            key_exchange: it.key_exchange,
            refused: it.refused,
            refusals: it.refusals,
            unenforced: it.unenforced,
            problems,
            nodes: Vec::new(),
            warnings: it.warnings,
        }
    }
}

/// The status of every cluster, or of one; with every node that has a problem, where `details` are wanted.
pub async fn read(client: &mut Client, cluster: &str, details: bool) -> anyhow::Result<Overview> {
    let status = call(client.status(pb::StatusRequest {})).await?;
    let (revision, store_unavailable_ms) = (status.revision, status.store_unavailable_ms);
    let operator = status.operator.map(Operator::new);
    let wanted = status.clusters.into_iter().filter(|it| cluster.is_empty() || it.name == cluster);
    let mut clusters: Vec<Cluster> = wanted.map(|it| Cluster::new(it, revision)).collect();
    anyhow::ensure!(
        cluster.is_empty() || !clusters.is_empty(),
        "cluster {cluster} not found; `hanse cluster list` lists all"
    );
    if details {
        let request = pb::ListNodesRequest { cluster: cluster.to_owned(), only_problems: true, ..Default::default() };
        let mut nodes = node::list(client, request).await?;
        for it in &mut clusters {
            let (its, others) = nodes.into_iter().partition(|node: &Node| node.cluster == it.name);
            (it.nodes, nodes) = (its, others);
        }
    }
    Ok(Overview { hub_revision: revision, store_unavailable_ms, operator, clusters })
}

impl Status {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let cluster = self.cluster.unwrap_or_default();
        let details = self.output.data().is_some();
        let overview = with_client(context, async |mut client| read(&mut client, &cluster, details).await)?;
        let printed = match (self.output, self.output.data()) {
            (_, Some(format)) => output::object(format, "ClusterStatusList", &overview),
            (ListFormat::Name, None) => overview.clusters.iter().try_for_each(|it| output::line(&it.name)),
            (wide, None) => overview.show(wide == ListFormat::Wide),
        };
        // A cluster that is expected does not count: if no other has joined, nothing can be in sync.
        let has_joined = overview.clusters.iter().any(|it| it.state != "expected");
        let is_available = overview.store_unavailable_ms.is_none();
        let is_operated = overview.operator.as_ref().is_none_or(|it| it.problems_total == 0);
        let all_well =
            has_joined && is_available && is_operated && overview.clusters.iter().all(|it| it.problems.is_empty());
        if self.exit_code && !has_joined {
            output::note("no cluster has joined; `hanse token create --cluster NAME` creates a token for one");
        }
        output::exit(printed, self.exit_code && !all_well)
    }
}

impl Overview {
    fn show(&self, wide: bool) -> anyhow::Result<()> {
        let well = self.clusters.iter().filter(|it| it.state == "accepted" && it.problems.is_empty()).count();
        let clusters = output::count(self.clusters.len(), "cluster");
        output::line(format_args!("hub at revision {}; {clusters}, {well} in sync", self.hub_revision))?;
        if let Some(time) = self.store_unavailable_ms {
            let time = output::length(Duration::from_millis(time));
            output::line(format_args!(
                "the store of the hub has not answered for {time}: changes are refused; clusters enforce what they have"
            ))?;
        }
        self.operator.iter().flat_map(Operator::lines).try_for_each(output::line)?;
        if self.clusters.is_empty() {
            return output::line("`hanse token create --cluster NAME` creates a token that a cluster can join with");
        }
        let mut headings =
            vec!["CLUSTER", "STATE", "CONNECTED", "AGE", "ENDPOINTS", "ENFORCED", "AGENTS", "CERTIFICATE"];
        if wide {
            headings.extend(["REVISION", "DIGESTS", "KEY EXCHANGE", "REFUSED", "UNENFORCED"]);
        }
        headings.push("PROBLEMS");
        let mut table = output::table(headings);
        for it in &self.clusters {
            let known = it.age_ms.is_some();
            let shown = |text: String| if known { text } else { "-".to_owned() };
            let mut row = vec![
                it.name.clone(),
                it.state.clone(),
                if it.connected { "yes".to_owned() } else { "no".to_owned() },
                it.age(),
                shown(it.endpoints.to_string()),
                shown(format!("{} of {}", it.enforced_revision, self.hub_revision)),
                shown(format!("{} of {}", it.agents_current, it.agents)),
                output::left(it.certificate_seconds),
            ];
            if wide {
                row.extend([
                    shown(it.revision.to_string()),
                    shown(it.digests().to_owned()),
                    if it.key_exchange.is_empty() { "-".to_owned() } else { it.key_exchange.clone() },
                    it.refused.to_string(),
                    it.unenforced.to_string(),
                ]);
            }
            row.push(it.problems.len().to_string());
            table.add_row(row);
        }
        output::line("")?;
        table.print()?;
        let mut first = true;
        for it in &self.clusters {
            for problem in &it.problems {
                if std::mem::take(&mut first) {
                    output::line("")?;
                }
                output::line(format_args!("{}: {problem}", it.name))?;
            }
        }
        // Most clusters have the same warnings: one line for all of them.
        let mut warnings: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for it in &self.clusters {
            it.warnings.iter().for_each(|text| warnings.entry(text).or_default().push(&it.name));
        }
        for (warning, clusters) in warnings {
            output::line("")?;
            output::line(format_args!("warning: {}: {warning}", clusters.join(", ")))?;
        }
        Ok(())
    }
}

impl Cluster {
    fn digests(&self) -> &'static str {
        match self.digests_equal {
            Some(true) => "equal",
            Some(false) => "differ",
            None => "unknown",
        }
    }

    fn age(&self) -> String {
        match (self.age_ms, self.lease.as_str()) {
            // After a restart, the hub knows the clusters, but not the age of their data.
            (None, "stale") => "unknown (stale)".to_owned(),
            (None, _) => "never".to_owned(),
            (Some(age), "live") => output::length(Duration::from_millis(age)),
            (Some(age), lease) => format!("{} ({lease})", output::length(Duration::from_millis(age))),
        }
    }

    /// For `hanse describe cluster`.
    pub fn lines(&self, hub_revision: u64) -> Vec<(&'static str, String)> {
        let connected = if self.connected { "yes" } else { "no" };
        vec![
            ("Connected", format!("{connected}, age of data: {}", self.age())),
            (
                "Publishes",
                format!("{}, at revision {}", output::count(self.endpoints as usize, "endpoint"), self.revision),
            ),
            ("Refused", self.refused.to_string()),
            ("Digests", self.digests().to_owned()),
            ("Received", format!("revision {} of {hub_revision}", self.received_revision)),
            ("Enforced", format!("revision {} of {hub_revision}", self.enforced_revision)),
            ("Agents", format!("{} of {} at the current generation", self.agents_current, self.agents)),
            ("Unenforced", output::count(self.unenforced as usize, "pod")),
            ("Key exchange", if self.key_exchange.is_empty() { "-".to_owned() } else { self.key_exchange.clone() }),
        ]
    }

    /// Problems of the cluster itself, not of its nodes.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// One reason, with the node and what else it concerns: the first three, and how many they are.
pub fn in_words(problem: &pb::Problem) -> String {
    let node = if problem.node.is_empty() { String::new() } else { format!("node {}: ", problem.node) };
    format!("{node}{}", Problem::from(problem.clone()).line())
}

/// The problems of a cluster, as text.
fn problems(it: &pb::ClusterStatus, hub_revision: u64) -> Vec<String> {
    let age = it.age_ms.map(|age| output::length(Duration::from_millis(age)));
    let mut problems = Vec::new();
    match (it.state.as_str(), it.lease.as_str()) {
        ("pending", _) => problems.push(format!("waits for `hanse cluster accept {}`", it.name)),
        ("accepted", "never heard") => {
            problems.push("joined, but never connected: check that hanse-member runs".to_owned());
        }
        ("accepted", "stale") => {
            let silent =
                age.map_or_else(|| "no data since this hub started".to_owned(), |age| format!("silent for {age}"));
            problems.push(format!("{silent}: its endpoints are unknown, and rules that allow them do not match"));
        }
        ("accepted", _) if !it.connected => problems.push("not connected to this hub".to_owned()),
        ("accepted", _) => {
            if it.digests_equal.is_none() {
                problems.push("not known whether it has received what the hub selected for it".to_owned());
            }
            if it.digests_equal == Some(false) {
                problems.push("received data differs from what the hub selected for it".to_owned());
            }
            let behind = it.agents.saturating_sub(it.agents_current);
            if behind > 0 {
                problems.push(format!("{behind} of {} agents do not enforce the current generation", it.agents));
            } else if it.enforced_revision < hub_revision {
                let at = it.enforced_revision;
                problems.push(format!("enforces revision {at} of {hub_revision}"));
            }
        }
        _ => {}
    }
    problems.extend(it.refusals.iter().map(|refusal| format!("refused: {refusal}")));
    let unnamed = it.refused.saturating_sub(it.refusals.len() as u64);
    if unnamed > 0 {
        problems.push(format!("{unnamed} more refused"));
    }
    problems.extend(it.problems.iter().map(in_words));
    let unnamed = (it.problems_total as usize).saturating_sub(it.problems.len());
    if unnamed > 0 {
        problems.push(format!(
            "{} not listed here: see `hanse describe cluster {}`",
            output::count(unnamed, "more problem"),
            it.name
        ));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operator_is_named_with_its_problems() {
        let problem = pb::OperatorProblem {
            hub: "hub-1".to_owned(),
            reason: "NotRead".to_owned(),
            message: "Tier cannot be listed or watched: forbidden".to_owned(),
            age_ms: 61_000,
        };
        let mut status = pb::OperatorStatus {
            leader: "hub-0".to_owned(),
            leading_ms: Some(3_600_000),
            problems: vec![problem],
            problems_total: 3,
        };
        let lines = [
            "operator: hub-0 reconciles custom resources, for 1h0m",
            "operator: hub-1: Tier cannot be listed or watched: forbidden, for 1m1s",
            "operator: 2 more problems not listed here",
        ];
        assert_eq!(Operator::new(status.clone()).lines(), lines);
        (status.leader, status.leading_ms) = (String::new(), None);
        let lines = Operator::new(status).lines();
        assert_eq!(lines[0], "operator: no hub is known to reconcile custom resources");
    }

    #[test]
    fn cluster_without_data_since_the_hub_started_has_no_duration_of_silence() {
        let accepted = |lease: &str, age_ms| {
            let status = pb::ClusterStatus {
                state: "accepted".into(),
                lease: lease.into(),
                age_ms,
                ..pb::ClusterStatus::default()
            };
            let problems = problems(&status, 1);
            (problems.first().cloned().unwrap_or_default(), Cluster::new(status, 1).age())
        };
        let (problem, age) = accepted("stale", None);
        assert!(problem.starts_with("no data since this hub started: "), "{problem}");
        assert_eq!(age, "unknown (stale)");
        let (problem, age) = accepted("stale", Some(90_000));
        assert!(problem.starts_with("silent for "), "{problem}");
        assert!(age.ends_with("(stale)"), "{age}");
        assert_eq!(accepted("never heard", None).1, "never");
    }
}
