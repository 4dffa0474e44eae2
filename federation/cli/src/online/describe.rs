//! `hanse describe`: all that the hub stores about one object, cluster or node.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use hanse_proto::federation::v1 as pb;
use hanse_runtime::text;
use serde::Serialize;
use serde_json::Value;

use super::kind::{kind_of, name_of, split};
use super::manifest::summary;
use super::wait::InCluster;
use super::{CallError, Client, call, cluster, node, status, time, with_client};
use crate::completion;
use crate::output::{self, Format, UsageError};

/// Show one object, cluster or node in detail, with its last change and where it is enforced.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse describe fnp web
  hanse describe tier/platform
  hanse describe cluster train
  hanse describe node train/node-1 -o yaml")]
pub struct Describe {
    /// FederatedNetworkPolicy (fnp), StagedFederatedNetworkPolicy (sfnp), Tier, FederatedNetworkSet (fns), MemberCluster (mc), cluster or node, or KIND/NAME.
    #[arg(add = completion::described_kinds())]
    kind: String,
    /// Name; for a node, CLUSTER/NODE.
    #[arg(add = completion::names())]
    name: Option<String>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// The newest change of an object in the audit log; in JSON an object, or the reason why it is not available.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
enum LastChange {
    /// The audit log stores the newest changes only.
    NotOnRecord,
    /// Only administrators may read the audit log.
    NotReadable,
    #[serde(untagged)]
    Known { who: String, at: String, action: String },
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ObjectDescription {
    object_kind: &'static str,
    name: String,
    revision: u64,
    hub_revision: u64,
    /// Where the object is stored and changed.
    owner: &'static str,
    /// Of a policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    tier: Option<TierDescription>,
    last_change: LastChange,
    clusters: Vec<InCluster>,
    /// Advice for its author where the object is valid.
    warnings: Vec<String>,
    manifest: Value,
}

#[derive(Debug, Serialize)]
struct TierDescription {
    name: String,
    /// Absent if the tier does not exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    spec: Option<Value>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ClusterDescription {
    #[serde(flatten)]
    cluster: cluster::Cluster,
    status: status::Cluster,
    last_change: LastChange,
    nodes: Vec<node::Node>,
}

/// A kind, as the command line names it.
#[derive(Clone, Copy)]
enum Described {
    Object(pb::ObjectKind),
    Cluster,
    Node,
}

impl Describe {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let (kind, name) = split(&self.kind, self.name.as_deref())?;
        let described = match kind.to_ascii_lowercase().as_str() {
            "cluster" | "clusters" => Described::Cluster,
            "node" | "nodes" => Described::Node,
            _ => Described::Object(
                kind_of(kind).map_err(|UsageError(text)| UsageError(format!("{text}, cluster, node")))?,
            ),
        };
        let missing = || UsageError(format!("the name is missing: `hanse describe {kind} NAME`"));
        let name = name.ok_or_else(missing)?;
        if matches!(described, Described::Node) && !name.contains('/') {
            return Err(UsageError(format!("{name:?} is not CLUSTER/NODE")).into());
        }
        let format = self.output;
        with_client(context, async |mut client| match described {
            Described::Cluster => describe_cluster(&mut client, name, format).await,
            Described::Node => describe_node(&mut client, name, format).await,
            Described::Object(kind) => describe_object(&mut client, kind, name, format).await,
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

async fn last_change(client: &mut Client, object: String) -> anyhow::Result<LastChange> {
    // The audit log also records denials, at most one per caller in ten minutes.
    let request = pb::ListAuditRequest { limit: 100, object: object.clone() };
    let records = match call(client.list_audit(request)).await {
        Ok(listed) => listed.records,
        Err(error) if CallError::is_denied(&error) => return Ok(LastChange::NotReadable),
        Err(error) => return Err(error),
    };
    // Tokens for a cluster do not change it.
    let made = records.into_iter().find(|it| it.outcome == "done" && it.object == object);
    Ok(made.map_or(LastChange::NotOnRecord, |it| LastChange::Known { who: it.who, at: time(it.at), action: it.action }))
}

fn show_change(change: &LastChange) -> anyhow::Result<()> {
    match change {
        LastChange::Known { who, at, action } => output::field("Changed", format_args!("{at} by {who} ({action})")),
        LastChange::NotOnRecord => output::field("Changed", "not among the 10,000 newest changes in the audit log"),
        LastChange::NotReadable => output::field("Changed", "unknown: only administrators may read the audit log"),
    }
}

fn show_warnings(warnings: &[String]) -> anyhow::Result<()> {
    if !warnings.is_empty() {
        output::line("")?;
    }
    warnings.iter().try_for_each(|warning| output::line(format_args!("warning: {warning}")))
}

async fn describe_object(client: &mut Client, kind: pb::ObjectKind, name: &str, format: Format) -> anyhow::Result<()> {
    let get = |kind: pb::ObjectKind, name: &str| pb::GetRequest { kind: kind.into(), name: name.to_owned() };
    let kind_name = name_of(kind.into());
    let found = call(client.get(get(kind, name))).await?.objects.into_iter().next();
    let object = found.with_context(|| format!("{kind_name}/{name} not found; `hanse get {kind_name}` lists all"))?;
    let manifest: Value = serde_json::from_slice(&object.manifest).context("read the manifest")?;
    let mut tier = None;
    if [pb::ObjectKind::FederatedNetworkPolicy, pb::ObjectKind::StagedFederatedNetworkPolicy].contains(&kind) {
        let name = manifest["spec"]["tier"].as_str().unwrap_or_default().to_owned();
        let found = call(client.get(get(pb::ObjectKind::Tier, &name))).await?.objects.into_iter().next();
        let spec =
            found.and_then(|it| serde_json::from_slice::<Value>(&it.manifest).ok()).map(|mut it| it["spec"].take());
        tier = Some(TierDescription { name, spec });
    }
    let request = pb::ObjectStatusRequest { kind: kind.into(), name: name.to_owned(), gone_at: 0 };
    let status = call(client.object_status(request)).await?;
    let description = ObjectDescription {
        object_kind: kind_name,
        name: object.name,
        revision: object.revision,
        hub_revision: status.hub_revision,
        owner: "the hub's store",
        tier,
        last_change: last_change(client, format!("{kind_name}/{name}")).await?,
        clusters: status.clusters.into_iter().map(InCluster::from).collect(),
        warnings: status.warnings,
        manifest,
    };
    if format != Format::Table {
        return output::object(format, "ObjectDescription", &description);
    }
    description.show()
}

impl ObjectDescription {
    fn show(&self) -> anyhow::Result<()> {
        output::field("Kind", self.object_kind)?;
        output::field("Name", &self.name)?;
        output::field("Revision", format_args!("{} (hub: {})", self.revision, self.hub_revision))?;
        if let Some(tier) = &self.tier {
            let about = match &tier.spec {
                Some(spec) => summary(&serde_json::json!({"kind": "Tier", "spec": spec})),
                None => "does not exist: the policy is not in force".to_owned(),
            };
            output::field("Tier", format_args!("{} ({about})", tier.name))?;
        }
        output::field("About", summary(&self.manifest))?;
        output::field("Owner", self.owner)?;
        show_change(&self.last_change)?;
        output::line("")?;
        if self.clusters.is_empty() {
            output::line("none of the clusters that must enforce it has joined")?;
        } else {
            let mut table = output::table(["CLUSTER", "STATE", "NODES", "LAST DATA", "WHY"]);
            for it in &self.clusters {
                let age = it.age_ms.map(|age| output::length(Duration::from_millis(age)));
                let nodes = format!("{} of {}", it.nodes_enforcing, it.nodes);
                let why = if it.why.is_empty() { "-".to_owned() } else { it.why.clone() };
                table.add_row([
                    it.cluster.clone(),
                    it.state.to_owned(),
                    nodes,
                    age.map_or("never".to_owned(), |age| format!("{age} ago")),
                    why,
                ]);
            }
            table.print()?;
        }
        show_warnings(&self.warnings)?;
        output::line("")?;
        output::line("Manifest:")?;
        let manifest = text::yaml(&self.manifest)?;
        manifest.lines().skip(1).try_for_each(|line| output::line(format_args!("  {line}")))
    }
}

async fn describe_cluster(client: &mut Client, name: &str, format: Format) -> anyhow::Result<()> {
    let status::Overview { hub_revision, clusters, .. } = status::read(client, name, false).await?;
    let mut listed = cluster::list(client, name).await?;
    let request = pb::ListNodesRequest { cluster: name.to_owned(), ..Default::default() };
    let nodes = node::list(client, request).await?;
    let status = clusters.into_iter().next();
    let (status, cluster) =
        status.zip(listed.pop()).with_context(|| format!("cluster {name} was removed during the call"))?;
    let last_change = last_change(client, format!("cluster/{name}")).await?;
    let description = ClusterDescription { cluster, status, last_change, nodes };
    if format != Format::Table {
        return output::object(format, "ClusterDescription", &description);
    }
    for (name, value) in description.cluster.lines() {
        output::field(name, value)?;
    }
    for (name, value) in description.status.lines(hub_revision) {
        output::field(name, value)?;
    }
    show_change(&description.last_change)?;
    output::line("")?;
    node::show(&description.nodes, false, false)?;
    if !description.status.problems().is_empty() {
        output::line("")?;
        description.status.problems().iter().try_for_each(output::line)?;
    }
    show_warnings(description.status.warnings())?;
    description.nodes.iter().try_for_each(node::Node::describe_problems)
}

async fn describe_node(client: &mut Client, name: &str, format: Format) -> anyhow::Result<()> {
    let (cluster, node) = name.split_once('/').with_context(|| format!("{name:?} is not CLUSTER/NODE"))?;
    cluster::ensure_exists(client, cluster).await?;
    let request = pb::ListNodesRequest { cluster: cluster.to_owned(), node: node.to_owned(), ..Default::default() };
    let found = node::list(client, request).await?.into_iter().next();
    let found = found.with_context(|| format!("node {node} not found; `hanse node list {cluster}` lists all"))?;
    match format {
        Format::Table => found.describe(),
        format => output::object(format, "NodeDescription", &found),
    }
}
