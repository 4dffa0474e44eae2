//! `hanse cluster …`: the members of the ClusterSet.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use clap::Subcommand;
use hanse_proto::federation::v1 as pb;
use serde::Serialize;

use super::{call, time, with_client};
use crate::output::{self, Format};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Every cluster that has joined, waits, or is expected.
    List {
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// One cluster.
    Get {
        name: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Let a cluster in that waits. Compare its key with what its operator says first: hanse cluster get NAME -o yaml.
    Accept {
        name: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Throw a cluster out: its streams close at once, and what it published is withdrawn everywhere.
    Revoke {
        name: String,
        /// Why, for the audit.
        #[arg(long, default_value = "")]
        reason: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Cluster {
    name: String,
    state: &'static str,
    labels: BTreeMap<String, String>,
    namespaces: Vec<String>,
    cidrs: Vec<String>,
    federated_allow: &'static str,
    certificate_expires_at: String,
    #[serde(skip)]
    certificate_seconds: u64,
    /// Why it was revoked.
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    /// SHA-256 of its public key: what its operator can compare before it is accepted.
    key: String,
}

impl From<pb::ClusterInfo> for Cluster {
    fn from(info: pb::ClusterInfo) -> Self {
        use pb::cluster_info::State;
        let reason = match &info.state {
            Some(State::Revoked(revoked)) => revoked.reason.clone(),
            _ => String::new(),
        };
        let state = match info.state {
            Some(State::Pending(_)) => "Pending",
            Some(State::Accepted(_)) => "Accepted",
            Some(State::Revoked(_)) => "Revoked",
            Some(State::Expected(_)) | None => "Expected",
        };
        let namespaces = if info.all_namespaces { vec!["*".to_owned()] } else { info.namespaces };
        Self {
            name: info.name,
            state,
            labels: info.labels.into_iter().collect(),
            namespaces,
            cidrs: info.cidrs,
            federated_allow: if info.federated_allow_final { "Final" } else { "Pass" },
            certificate_expires_at: time(info.certificate_expires_at),
            certificate_seconds: info.certificate_expires_at,
            reason,
            key: info.key,
        }
    }
}

impl Command {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        match self {
            Self::List { output } => show(list(context, String::new())?, output)?,
            Self::Get { name, output } => {
                let mut found = list(context, name.clone())?;
                anyhow::ensure!(!found.is_empty(), "there is no cluster {name}; `hanse cluster list` names all");
                match output {
                    Format::Table => show(found, output)?,
                    format => output::print(format, &found.remove(0))?,
                }
            }
            Self::Accept { name, output } => {
                let request = pb::AcceptClusterRequest { name: name.clone() };
                with_client(context, |mut client| async move { call(client.accept_cluster(request)).await })?;
                let done = serde_json::json!({"cluster": name, "result": "accepted"});
                output::done(output, &done, format_args!("cluster {name} accepted"))?;
            }
            Self::Revoke { name, reason, output } => {
                let request = pb::RevokeClusterRequest { name: name.clone(), reason };
                let revoked =
                    with_client(context, |mut client| async move { call(client.revoke_cluster(request)).await })?;
                let closed = output::count(revoked.closed as usize, "connection");
                let done = serde_json::json!({"cluster": name, "result": "revoked", "closed": revoked.closed});
                output::done(output, &done, format_args!("cluster {name} revoked, {closed} closed"))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn list(context: Option<&Path>, name: String) -> anyhow::Result<Vec<Cluster>> {
    let request = pb::ListClustersRequest { name };
    let listed = with_client(context, |mut client| async move { call(client.list_clusters(request)).await })?;
    Ok(listed.clusters.into_iter().map(Cluster::from).collect())
}

fn show(clusters: Vec<Cluster>, format: Format) -> anyhow::Result<()> {
    if format != Format::Table {
        return output::print(format, &clusters);
    }
    let mut table = output::table(["NAME", "STATE", "LABELS", "NAMESPACES", "CIDRS", "FEDERATED ALLOW", "CERTIFICATE"]);
    for it in clusters {
        let labels: Vec<String> = it.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let (labels, namespaces, cidrs) = (labels.join(","), it.namespaces.join(","), it.cidrs.join(","));
        table.add_row([
            it.name.as_str(),
            it.state,
            &labels,
            &namespaces,
            &cidrs,
            it.federated_allow,
            &output::left(it.certificate_seconds),
        ]);
    }
    match table.is_empty() {
        true => {
            output::line("no cluster has joined, or is expected; `hanse token create --cluster NAME` lets one join")?
        }
        false => table.print()?,
    }
    Ok(())
}
