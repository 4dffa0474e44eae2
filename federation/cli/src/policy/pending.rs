//! `hanse policy pending` and `hanse policy reject`: the changes that wait for approvals.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use hanse_kubernetes::answered;
use hanse_kubernetes::change::{digest, manifest};
use hanse_proto::federation::v1::administration_client::AdministrationClient as HubClient;
use hanse_proto::federation::v1::{self as pb, ObjectKind};
use kube::api::{DynamicObject, ListParams};
use kube::{Client, ResourceExt as _};
use serde::Serialize;

use super::approve::{Management, api, is_elsewhere, target_name};
use super::reject;
use crate::online::kind::target;
use crate::online::{MAX_ANSWER_BYTES, call, open, time};
use crate::output::{self, Format, UsageError};

/// List the changes of policies and tiers that wait for approvals.
///
/// Any user of the hub may list them. Where an operator reconciles custom resources, or with --kubeconfig, the command lists those of the
/// management cluster, with the credentials of the kubeconfig.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse policy pending
  hanse policy pending --approvable             # those that this user can approve
  hanse policy approve fnp/web --show           # one of them")]
pub struct List {
    /// Only changes that the user of the context can approve.
    #[arg(long, conflicts_with = "kubeconfig")]
    approvable: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    management: Management,
}

/// Drop a pending change of a policy or a tier.
///
/// The version in force stays enforced. At a hub without an operator, the authors of the change may do this, and users who may approve it.
///
/// Where an operator reconciles custom resources, or with --kubeconfig, the object becomes the version in force again, with the
/// credentials of the kubeconfig: the user needs the verb `use` on the tier, and the usual verbs on the kind. Of a pending deletion,
/// which Kubernetes cannot revoke, the command removes the finalizer of the hub and creates the object again. The hub has this version
/// already, so that it needs no approval. An object that was never in force is deleted: for this, the verb `approve` suffices.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse policy reject fnp/web
  hanse policy reject tier/platform --kubeconfig management.kubeconfig")]
pub struct Reject {
    /// Object, as KIND/NAME: FederatedNetworkPolicy (fnp), the default, or Tier (tier).
    object: String,
    /// Only if the change has this digest, as `hanse policy approve --show` prints it.
    #[arg(long)]
    digest: Option<String>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    management: Management,
}

/// Objects in a page of a list.
const PAGE: u32 = 500;

/// A change that waits.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Change {
    object: String,
    /// `apply` or `delete`.
    action: &'static str,
    digest: String,
    /// Of a hub without an operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    authors: Option<Vec<String>>,
    tiers: Vec<String>,
    since: String,
    /// One of the authors may still make the change.
    #[serde(skip_serializing_if = "Option::is_none")]
    is_authorized: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    can_approve: Option<bool>,
    /// Why it waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

impl List {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let at_hub = match context.is_some() && self.management.kubeconfig.is_none() {
            true => at_hub(context)?,
            false => None,
        };
        let mut changes = match at_hub {
            Some(changes) => changes,
            None => {
                hanse_identity::tls::install_provider();
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let listing = async {
                    let client = self.management.client().await?;
                    at_management(&client).await
                };
                runtime.context("start the runtime")?.block_on(listing)?
            }
        };
        if self.approvable {
            changes.retain(|it| it.can_approve == Some(true));
        }
        if self.output != Format::Table {
            output::list(self.output, "PendingChangeList", &changes)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut table = output::table(["OBJECT", "ACTION", "TIERS", "SINCE", "AUTHORS", "APPROVAL"]);
        for change in &changes {
            let authors = change.authors.as_ref().map_or_else(|| "-".to_owned(), |it| it.join(", "));
            let approval = match (change.is_authorized, change.can_approve) {
                (Some(false), _) => "refused: no author may make it any more",
                (_, Some(true)) => "by this user",
                (_, Some(false)) => "by another user",
                (_, None) => change.message.as_deref().unwrap_or("-"),
            };
            let tiers = change.tiers.join(", ");
            table.add_row([&*change.object, change.action, &tiers, &change.since, &authors, approval]);
        }
        match table.is_empty() {
            true => output::line("no change waits for an approval")?,
            false => table.print()?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The changes at a hub that decides itself. `None`: its operator decides.
fn at_hub(context: Option<&Path>) -> anyhow::Result<Option<Vec<Change>>> {
    let (runtime, channel) = open(context)?;
    let mut client = HubClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
    let listed = match runtime.block_on(call(client.list_pending(pb::ListPendingRequest {}))) {
        Ok(listed) => listed,
        Err(error) if is_elsewhere(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let change = |it: pb::PendingSummary| Change {
        object: target_name(it.kind(), &it.name),
        action: if it.deletion { "delete" } else { "apply" },
        digest: it.digest,
        authors: Some(it.authors),
        tiers: it.tiers,
        since: time(it.since),
        is_authorized: Some(it.is_authorized),
        can_approve: Some(it.can_approve),
        message: None,
    };
    Ok(Some(listed.changes.into_iter().map(change).collect()))
}

/// Those of custom resources.
async fn at_management(client: &Client) -> anyhow::Result<Vec<Change>> {
    let mut changes = Vec::new();
    for kind in ["FederatedNetworkPolicy", "Tier"] {
        let (api, mut page) = (api(client, kind), ListParams::default().limit(PAGE));
        loop {
            let listed = answered(api.list(&page)).await;
            let listed = listed.with_context(|| format!("list objects of the kind {kind}"))?;
            changes.extend(listed.items.iter().filter_map(|object| waits(kind, object)));
            match listed.metadata.continue_.filter(|it| !it.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => break,
            }
        }
    }
    Ok(changes)
}

fn waits(kind: &str, object: &DynamicObject) -> Option<Change> {
    let status = &object.data["status"];
    let mut conditions = status["conditions"].as_array()?.iter();
    let condition = conditions.find(|it| it["type"] == "Approved" && it["status"] == "False")?;
    let is_deletion = object.metadata.deletion_timestamp.is_some();
    let in_force = status["pendingChange"]["inForce"].as_str().unwrap_or_default();
    let tier = match kind {
        "Tier" => object.name_any(),
        _ => object.data["spec"]["tier"].as_str().unwrap_or_default().to_owned(),
    };
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Some(Change {
        object: format!("{kind}/{}", object.name_any()),
        action: if is_deletion { "delete" } else { "apply" },
        digest: match is_deletion {
            true => digest(in_force.as_bytes()),
            false => digest(manifest(kind, object).as_bytes()),
        },
        authors: None,
        tiers: vec![tier],
        since: text(&condition["lastTransitionTime"]),
        is_authorized: None,
        can_approve: None,
        message: Some(text(&condition["message"])),
    })
}

impl Reject {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let (kind, name) = target(&self.object)?;
        if !matches!(kind, ObjectKind::FederatedNetworkPolicy | ObjectKind::Tier) {
            let text = "only changes of FederatedNetworkPolicy and Tier wait for approvals";
            return Err(UsageError(text.to_owned()).into());
        }
        let is_at_hub = context.is_some() && self.management.kubeconfig.is_none();
        let meaning = match is_at_hub && reject_at_hub(context, kind, &name, self.digest.clone())? {
            true => "",
            false => {
                let kind = if kind == ObjectKind::Tier { "Tier" } else { "FederatedNetworkPolicy" };
                hanse_identity::tls::install_provider();
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let rejecting = async {
                    let client = self.management.client().await?;
                    reject::at_management(&client, kind, &name, self.digest.as_deref()).await
                };
                runtime.context("start the runtime")?.block_on(rejecting)?
            }
        };
        let object = target_name(kind, &name);
        let done = serde_json::json!({"object": object, "result": "rejected"});
        let meaning = if meaning.is_empty() { String::new() } else { format!(": {meaning}") };
        output::done(self.output, &done, format_args!("the pending change of {object} is dropped{meaning}"))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Drops a change at a hub that decides itself. False: its operator decides.
fn reject_at_hub(context: Option<&Path>, kind: ObjectKind, name: &str, digest: Option<String>) -> anyhow::Result<bool> {
    let (runtime, channel) = open(context)?;
    let mut client = HubClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
    let request = pb::GetPendingRequest { kind: kind.into(), name: name.to_owned() };
    let found = match runtime.block_on(call(client.get_pending(request))) {
        Ok(found) => Some(found),
        Err(error) if is_elsewhere(&error) => return Ok(false),
        // With a digest, the hub decides whether the user may know that there is none.
        Err(_) if digest.is_some() => None,
        Err(error) => return Err(error),
    };
    let digest = digest.or(found.map(|it| it.digest)).unwrap_or_default();
    let request = pb::RejectRequest { kind: kind.into(), name: name.to_owned(), digest };
    runtime.block_on(call(client.reject(request)))?;
    Ok(true)
}
