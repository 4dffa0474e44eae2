//! `hanse status`: how the ClusterSet is. Age and digests, not open sockets, say what is healthy.

use std::path::Path;
use std::process::ExitCode;

use hanse_proto::federation::v1 as pb;
use serde::Serialize;

use super::{call, time, with_client};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub struct Status {
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
            return Ok(ExitCode::SUCCESS);
        }
        println!("hub at revision {}", overview.hub_revision);
        let mut table = output::table([
            "CLUSTER",
            "STATE",
            "CONNECTED",
            "LEASE",
            "AGE",
            "REVISION",
            "ENDPOINTS",
            "DIGESTS",
            "ENFORCED",
            "AGENTS",
            "CERTIFICATE UNTIL",
            "KEY EXCHANGE",
            "REFUSED",
            "UNENFORCED",
        ]);
        for it in &overview.clusters {
            let digests = match it.digests_equal {
                Some(true) => "equal",
                Some(false) => "differ",
                None => "unknown",
            };
            table.add_row([
                it.name.clone(),
                it.state.clone(),
                if it.connected { "yes".to_owned() } else { "no".to_owned() },
                it.lease.clone(),
                it.age_ms.map_or_else(|| "-".to_owned(), |age| format!("{:.1} s", age as f64 / 1000.0)),
                it.revision.to_string(),
                it.endpoints.to_string(),
                digests.to_owned(),
                format!("{} of {}", it.enforced_revision, overview.hub_revision),
                format!("{} of {}", it.agents_current, it.agents),
                it.certificate_expires_at.clone(),
                it.key_exchange.clone(),
                it.refused.to_string(),
                it.unenforced.to_string(),
            ]);
        }
        println!("{table}");
        for it in &overview.clusters {
            for refusal in &it.refusals {
                println!("{}: refused: {refusal}", it.name);
            }
            for problem in &it.problems {
                println!("{}: {problem}", it.name);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
