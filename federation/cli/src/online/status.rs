//! `hanse status`: how the ClusterSet is. Age and digests, not open sockets, say what is healthy.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use hanse_proto::federation::v1 as pb;
use serde::Serialize;

use super::{call, time, with_client};
use crate::output::{self, Format};

/// How the clusters are: connected, age of data, digests, agents, certificates.
///
/// AGE is since the hub last heard the cluster; `stale` when its lease has ended. REVISION and ENDPOINTS are of what it
/// publishes; DIGESTS says whether what it holds of the others equals what was selected for it; ENFORCED is the hub's
/// revision that all its nodes enforce; AGENTS how many of its agents enforce the current generation.
#[derive(Debug, clap::Args)]
pub struct Status {
    /// Exit 1 when a cluster waits, is silent, lags, or was refused something.
    #[arg(long)]
    exit_code: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Overview {
    hub_revision: u64,
    clusters: Vec<Cluster>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Cluster {
    name: String,
    state: String,
    connected: bool,
    lease: String,
    /// Since the hub last heard it.
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
    problems: Vec<String>,
}

impl From<pb::ClusterStatus> for Cluster {
    fn from(it: pb::ClusterStatus) -> Self {
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
            problems: it.problems,
        }
    }
}

impl Status {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let status = with_client(context, |mut client| async move { call(client.status(pb::StatusRequest {})).await })?;
        let clusters = status.clusters.into_iter().map(Cluster::from).collect();
        let overview = Overview { hub_revision: status.revision, clusters };
        if self.output != Format::Table {
            output::print(self.output, &overview)?;
            return Ok(overview.code(self.exit_code));
        }
        overview.show()?;
        Ok(overview.code(self.exit_code))
    }
}

impl Overview {
    fn code(&self, exit_code: bool) -> ExitCode {
        let all_well = self.clusters.iter().all(|it| it.problems(self.hub_revision).is_empty());
        if exit_code && !all_well { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }

    fn show(&self) -> anyhow::Result<()> {
        let problems = |it: &Cluster| it.problems(self.hub_revision);
        let well = self.clusters.iter().filter(|it| it.state == "accepted" && problems(it).is_empty()).count();
        let clusters = output::count(self.clusters.len(), "cluster");
        output::line(format_args!("hub at revision {}; {clusters}, {well} in sync", self.hub_revision))?;
        if self.clusters.is_empty() {
            return output::line("`hanse token create --cluster NAME` lets a cluster join");
        }
        let mut table = output::table([
            "CLUSTER",
            "STATE",
            "CONNECTED",
            "AGE",
            "REVISION",
            "ENDPOINTS",
            "DIGESTS",
            "ENFORCED",
            "AGENTS",
            "CERTIFICATE",
            "KEY EXCHANGE",
            "REFUSED",
            "UNENFORCED",
        ]);
        for it in &self.clusters {
            let digests = match it.digests_equal {
                Some(true) => "equal",
                Some(false) => "differ",
                None => "unknown",
            };
            let age = match (it.age_ms, it.lease.as_str()) {
                (None, _) => "never heard".to_owned(),
                (Some(age), "live") => output::length(Duration::from_millis(age)),
                (Some(age), lease) => format!("{} ({lease})", output::length(Duration::from_millis(age))),
            };
            let known = it.age_ms.is_some();
            let shown = |text: String| if known { text } else { "-".to_owned() };
            table.add_row([
                it.name.clone(),
                it.state.clone(),
                if it.connected { "yes".to_owned() } else { "no".to_owned() },
                age,
                shown(it.revision.to_string()),
                shown(it.endpoints.to_string()),
                shown(digests.to_owned()),
                shown(format!("{} of {}", it.enforced_revision, self.hub_revision)),
                shown(format!("{} of {}", it.agents_current, it.agents)),
                output::left(it.certificate_seconds),
                if it.key_exchange.is_empty() { "-".to_owned() } else { it.key_exchange.clone() },
                it.refused.to_string(),
                it.unenforced.to_string(),
            ]);
        }
        output::line("")?;
        table.print()?;
        let mut first = true;
        for it in &self.clusters {
            for problem in problems(it) {
                if std::mem::take(&mut first) {
                    output::line("")?;
                }
                output::line(format_args!("{}: {problem}", it.name))?;
            }
        }
        Ok(())
    }
}

impl Cluster {
    /// What keeps it from being in sync, and what it was refused, in words.
    fn problems(&self, hub_revision: u64) -> Vec<String> {
        let age = self.age_ms.map(|age| output::length(Duration::from_millis(age)));
        let mut problems = Vec::new();
        match (self.state.as_str(), self.lease.as_str()) {
            ("pending", _) => problems.push(format!("waits for `hanse cluster accept {}`", self.name)),
            ("accepted", "never heard") => {
                problems.push("has joined and was never heard: see that hanse-member runs there".to_owned());
            }
            ("accepted", "stale") => problems.push(format!(
                "silent for {}: its endpoints count as unknown, so rules that allow them do not match",
                age.unwrap_or_default()
            )),
            ("accepted", _) if !self.connected => problems.push("not connected to this hub".to_owned()),
            ("accepted", _) => {
                if self.digests_equal == Some(false) {
                    problems.push("what it holds differs from what the hub selected for it".to_owned());
                }
                let behind = self.agents.saturating_sub(self.agents_current);
                if behind > 0 {
                    problems
                        .push(format!("{behind} of its {} agents do not enforce its current generation", self.agents));
                } else if self.enforced_revision < hub_revision {
                    let at = self.enforced_revision;
                    problems.push(format!("it enforces revision {at}, the hub is at {hub_revision}"));
                }
            }
            _ => {}
        }
        problems.extend(self.refusals.iter().map(|refusal| format!("refused: {refusal}")));
        let untold = self.refused.saturating_sub(self.refusals.len() as u64);
        if untold > 0 {
            problems.push(format!("{untold} more refused"));
        }
        problems.extend(self.problems.iter().cloned());
        problems
    }
}
