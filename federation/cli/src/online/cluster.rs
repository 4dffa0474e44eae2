//! `hanse cluster`: the clusters of the ClusterSet.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use clap::Subcommand;
use hanse_proto::federation::v1 as pb;
use serde::Serialize;

use super::{Client, call, time, with_client};
use crate::completion;
use crate::output::{self, Format, ListFormat};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List clusters that have joined, wait for acceptance, or are expected. `-o wide` adds the hash of the key.
    List {
        #[arg(short, long, value_enum, default_value_t)]
        output: ListFormat,
    },
    /// Show one cluster.
    Get {
        #[arg(add = completion::clusters())]
        name: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Accept a cluster that waits to join. First compare its key (`hanse cluster get NAME -o yaml`) with its operator.
    Accept {
        #[arg(add = completion::clusters())]
        name: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Revoke a cluster. Its connections are closed at once, and its endpoints are withdrawn from all clusters.
    Revoke {
        #[arg(add = completion::clusters())]
        name: String,
        /// Reason, for the audit log.
        #[arg(long, default_value = "")]
        reason: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
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
    /// SHA-256 of its public key, to be compared with its operator before it is accepted.
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
            Self::List { output } => {
                show(with_client(context, async |mut client| list(&mut client, "").await)?, output)?;
            }
            Self::Get { name, output } => {
                let mut found = with_client(context, async |mut client| list(&mut client, &name).await)?;
                match output {
                    Format::Table => show(found, ListFormat::Wide)?,
                    format => output::object(format, "Cluster", &found.remove(0))?,
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

/// All clusters, or the one of this name.
pub async fn list(client: &mut Client, name: &str) -> anyhow::Result<Vec<Cluster>> {
    let listed = call(client.list_clusters(pb::ListClustersRequest { name: name.to_owned() })).await?;
    let clusters: Vec<Cluster> = listed.clusters.into_iter().map(Cluster::from).collect();
    anyhow::ensure!(
        name.is_empty() || !clusters.is_empty(),
        "cluster {name} not found; `hanse cluster list` lists all"
    );
    Ok(clusters)
}

/// Fails if the cluster does not exist.
pub async fn ensure_exists(client: &mut Client, name: &str) -> anyhow::Result<()> {
    list(client, name).await.map(drop)
}

impl Cluster {
    fn labels(&self) -> String {
        let labels: Vec<String> = self.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        labels.join(",")
    }

    /// For `hanse describe cluster`.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let reason = if self.reason.is_empty() { String::new() } else { format!(" ({})", self.reason) };
        let shown = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        vec![
            ("Cluster", self.name.clone()),
            ("State", format!("{}{reason}", self.state)),
            ("Labels", shown(self.labels())),
            ("Namespaces", shown(self.namespaces.join(","))),
            ("CIDRs", shown(self.cidrs.join(","))),
            ("Fed. allow", self.federated_allow.to_owned()),
            ("Certificate", format!("{} ({})", self.certificate_expires_at, output::left(self.certificate_seconds))),
            ("Key", shown(self.key.clone())),
        ]
    }
}

fn show(clusters: Vec<Cluster>, format: ListFormat) -> anyhow::Result<()> {
    match (format, format.data()) {
        (_, Some(format)) => return output::list(format, "ClusterList", &clusters),
        (ListFormat::Name, None) => return clusters.iter().try_for_each(|it| output::line(&it.name)),
        _ => {}
    }
    let mut headings = vec!["NAME", "STATE", "LABELS", "NAMESPACES", "CIDRS", "FEDERATED ALLOW", "CERTIFICATE"];
    if format == ListFormat::Wide {
        headings.push("KEY");
    }
    let mut table = output::table(headings);
    for it in clusters {
        let mut row = vec![
            it.name.clone(),
            it.state.to_owned(),
            it.labels(),
            it.namespaces.join(","),
            it.cidrs.join(","),
            it.federated_allow.to_owned(),
            output::left(it.certificate_seconds),
        ];
        if format == ListFormat::Wide {
            row.push(it.key);
        }
        table.add_row(row);
    }
    match table.is_empty() {
        true => output::line("no clusters; `hanse token create --cluster NAME` creates a token that one can join with"),
        false => table.print(),
    }
}
