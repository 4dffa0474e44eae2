//! `hanse policy approve`: approves a change in a tier that requires approvals, as a user of the hub, or as the user of a kubeconfig
//! where the operator of the hub decides.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hanse_kubernetes::change::{digest, manifest};
use hanse_kubernetes::{Access, answered};
use hanse_proto::federation::v1::administration_client::AdministrationClient as HubClient;
use hanse_proto::federation::v1::{self as pb, ObjectKind};
use hanse_runtime::text;
use kube::api::{ApiResource, DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use crate::online::kind::target;
use crate::online::{CallError, MAX_ANSWER_BYTES, call, open};
use crate::output::{self, UsageError};

/// Approve a pending change of a policy or a tier.
///
/// In a Tier with `requireApproval`, a change takes effect when a user other than its author approves it. The command shows the change,
/// and then approves exactly this version. At a hub without an operator, the user of the context needs the role `approver` in the tier.
/// Where an operator reconciles custom resources, or with --kubeconfig, the command creates a PolicyApproval with the credentials of the
/// kubeconfig: the user needs the verb `approve` on the tier (tiers.hanse.dev).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse policy approve fnp/web
  hanse policy approve tier/platform --yes
  hanse policy pending                          # all changes that wait
  kubectl get fnp -o wide                       # Approved=False: a change waits")]
pub struct Arguments {
    /// Object, as KIND/NAME: FederatedNetworkPolicy (fnp), the default, or Tier (tier).
    object: String,
    /// Approve without a question.
    #[arg(short, long)]
    yes: bool,
    /// Only show the change.
    #[arg(long, conflicts_with = "yes")]
    show: bool,
    #[command(flatten)]
    management: Management,
}

/// Where changes are decided by an operator.
#[derive(Debug, clap::Args)]
pub struct Management {
    /// File with the address of the management cluster and the credentials [default: $KUBECONFIG, or ~/.kube/config].
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig file; by default its current one.
    #[arg(long, value_name = "NAME")]
    pub kube_context: Option<String>,
}

impl Management {
    /// # Errors
    /// When the kubeconfig cannot be read.
    pub async fn client(self) -> anyhow::Result<Client> {
        let home = || std::env::home_dir().map(|home| home.join(".kube/config"));
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        let variable = || std::env::var_os("KUBECONFIG").map(PathBuf::from).filter(given);
        let kubeconfig = self.kubeconfig.filter(given).or_else(variable).or_else(home);
        Access { kubeconfig, context: self.kube_context }.client().await
    }
}

/// A change that waits.
pub struct Pending {
    kind: &'static str,
    name: String,
    uid: String,
    generation: i64,
    pub is_deletion: bool,
    pub digest: String,
    why: String,
    /// The version in force; null if there is none.
    pub before: Value,
    after: Value,
    /// The object with the change.
    pub object: DynamicObject,
}

impl Arguments {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        let (kind, name) = target(&self.object)?;
        if context.is_some()
            && self.management.kubeconfig.is_none()
            && matches!(kind, ObjectKind::FederatedNetworkPolicy | ObjectKind::Tier)
            && let Some(code) = self.approve_at_hub(context, kind, &name)?
        {
            return Ok(code);
        }
        let kind = match kind {
            ObjectKind::FederatedNetworkPolicy => "FederatedNetworkPolicy",
            ObjectKind::Tier => "Tier",
            _ => {
                return Err(
                    UsageError("only changes of FederatedNetworkPolicy and Tier need approvals".to_owned()).into()
                );
            }
        };
        hanse_identity::tls::install_provider();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.context("start the runtime")?.block_on(self.approve(kind, name))
    }

    /// Approves a change at a hub that decides itself. `None`: its operator decides.
    fn approve_at_hub(&self, context: Option<&Path>, kind: ObjectKind, name: &str) -> anyhow::Result<Option<ExitCode>> {
        let (runtime, channel) = open(context)?;
        let mut client = HubClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        let request = pb::GetPendingRequest { kind: kind.into(), name: name.to_owned() };
        let found = match runtime.block_on(call(client.get_pending(request))) {
            Ok(found) => found,
            Err(error) if is_elsewhere(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let what = target_name(kind, name);
        let manifest = |bytes: &[u8]| match bytes {
            [] => Ok(Value::Null),
            bytes => serde_json::from_slice(bytes).with_context(|| format!("read {what}")),
        };
        output::line(format_args!("{what}, {}", found.digest))?;
        let (authors, tiers) = (found.authors.join(", "), found.tiers.join(" and "));
        output::line(format_args!("sent by {authors}; tier {tiers} requires an approval"))?;
        print_diff(&manifest(&found.before)?, &manifest(&found.after)?)?;
        if self.show {
            return Ok(Some(ExitCode::SUCCESS));
        }
        if !self.yes && !confirmed()? {
            output::note("not approved");
            return Ok(Some(ExitCode::FAILURE));
        }
        let request = pb::ApproveRequest { kind: kind.into(), name: name.to_owned(), digest: found.digest };
        let approved = runtime.block_on(call(client.approve(request)))?;
        output::line(format_args!("{what} approved, in force at revision {}", approved.revision))?;
        Ok(Some(ExitCode::SUCCESS))
    }

    async fn approve(self, kind: &'static str, name: String) -> anyhow::Result<ExitCode> {
        let client = self.management.client().await?;
        let pending = read(&client, kind, name).await?;
        pending.print()?;
        if self.show {
            return Ok(ExitCode::SUCCESS);
        }
        if !self.yes && !confirmed()? {
            output::note("not approved");
            return Ok(ExitCode::FAILURE);
        }
        let created = create(&client, &pending).await?;
        let Pending { kind, name, generation, .. } = &pending;
        output::line(format_args!("{kind}/{name} generation {generation} approved (PolicyApproval {created})"))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Whether the changes of this hub are approved at its management cluster.
pub fn is_elsewhere(error: &anyhow::Error) -> bool {
    use tonic::Code::{FailedPrecondition, Unimplemented};
    match error.downcast_ref::<CallError>() {
        Some(CallError::Refused { code, .. }) => matches!(code, FailedPrecondition | Unimplemented),
        _ => false,
    }
}

pub fn target_name(kind: ObjectKind, name: &str) -> String {
    let kind = if kind == ObjectKind::Tier { "Tier" } else { "FederatedNetworkPolicy" };
    format!("{kind}/{name}")
}

pub fn api(client: &Client, kind: &str) -> Api<DynamicObject> {
    let plural = plural(kind);
    let kind = GroupVersionKind::gvk("hanse.dev", "v1alpha1", kind);
    Api::all_with(client.clone(), &ApiResource::from_gvk_with_plural(&kind, plural))
}

/// The resource of a kind of which changes are approved.
pub fn plural(kind: &str) -> &'static str {
    match kind {
        "FederatedNetworkPolicy" => "federatednetworkpolicies",
        "Tier" => "tiers",
        _ => "policyapprovals",
    }
}

/// How long the hub may take to read the newest version of the object.
pub const READ_WITHIN: Duration = Duration::from_secs(10);

/// The change of an object that waits.
pub async fn read(client: &Client, kind: &'static str, name: String) -> anyhow::Result<Pending> {
    let start = Instant::now();
    loop {
        match read_once(client, kind, name.clone()).await? {
            Some(pending) => return Ok(pending),
            None if start.elapsed() < READ_WITHIN => tokio::time::sleep(Duration::from_millis(200)).await,
            None => bail!("the hub has not read the newest version of {kind}/{name} yet: try again"),
        }
    }
}

/// As [`read`]. `None`: the hub has not read the newest version.
async fn read_once(client: &Client, kind: &'static str, name: String) -> anyhow::Result<Option<Pending>> {
    let what = format!("{kind}/{name}");
    let object = answered(api(client, kind).get_opt(&name)).await.with_context(|| format!("read {what}"))?;
    let object = object.with_context(|| format!("{what} not found in the management cluster"))?;
    let status = &object.data["status"];
    let generation = object.metadata.generation.unwrap_or_default();
    // The version in force is that of the same moment.
    if status["observedGeneration"] != generation {
        return Ok(None);
    }
    let mut conditions = status["conditions"].as_array().into_iter().flatten();
    let approved = conditions.find(|it| it["type"] == "Approved");
    let Some(condition) = approved.filter(|it| it["status"] == "False") else {
        bail!("no change of {what} waits for an approval");
    };
    let in_force = status["pendingChange"]["inForce"].as_str();
    let in_force = in_force.with_context(|| format!("{what}: status.pendingChange.inForce is missing"))?;
    let before = match in_force {
        "" => Value::Null,
        manifest => {
            serde_json::from_str(manifest).with_context(|| format!("{what}: read status.pendingChange.inForce"))?
        }
    };
    let is_deletion = object.metadata.deletion_timestamp.is_some();
    let written = manifest(kind, &object);
    let (digest, after) = match is_deletion {
        true => (digest(in_force.as_bytes()), Value::Null),
        false => (digest(written.as_bytes()), serde_json::from_str(&written).context("read the object")?),
    };
    let why = condition["message"].as_str().unwrap_or_default().to_owned();
    let uid = object.uid().unwrap_or_default();
    Ok(Some(Pending { kind, name, uid, generation, is_deletion, digest, why, before, after, object }))
}

async fn create(client: &Client, pending: &Pending) -> anyhow::Result<String> {
    let Pending { kind, name, uid, generation, is_deletion, digest, .. } = pending;
    let action = if *is_deletion { "Delete" } else { "Apply" };
    let stem: String = name.chars().take(200).collect();
    let approval = json!({
        "apiVersion": "hanse.dev/v1alpha1", "kind": "PolicyApproval", "metadata": {"generateName": format!("{stem}-")},
        "spec": {
            "action": action, "kind": kind, "name": name, "uid": uid, "generation": generation, "digest": digest,
        },
    });
    let approval: DynamicObject = serde_json::from_value(approval).context("make the PolicyApproval")?;
    let created = answered(api(client, "PolicyApproval").create(&PostParams::default(), &approval)).await;
    Ok(created.with_context(|| format!("approve {kind}/{name}"))?.name_any())
}

fn confirmed() -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("standard input is not a terminal: use --yes to approve, or --show");
    }
    let mut out = std::io::stderr();
    write!(out, "Approve this change? [y/N] ").and_then(|()| out.flush()).context("write the question")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("read the answer")?;
    Ok(["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()))
}

impl Pending {
    /// The change, as lines of a diff.
    fn print(&self) -> anyhow::Result<()> {
        let Self { kind, name, generation, digest, why, .. } = self;
        output::line(format_args!("{kind}/{name} generation {generation}, {digest}"))?;
        output::line(why)?;
        print_diff(&self.before, &self.after)
    }
}

pub fn print_diff(before: &Value, after: &Value) -> anyhow::Result<()> {
    output::line("")?;
    for (mark, line) in diff(&lines(before)?, &lines(after)?) {
        output::line(format_args!("{mark} {line}"))?;
    }
    output::line("")
}

fn lines(manifest: &Value) -> anyhow::Result<Vec<String>> {
    if manifest.is_null() {
        return Ok(Vec::new());
    }
    let text = text::yaml(manifest).context("write YAML")?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// The longest texts that are compared line by line: 4 million pairs are 16 MiB. Of longer ones, all lines are shown.
const MAX_PAIRS: usize = 4_000_000;

/// The lines of both texts in order: ` ` in both, `-` in the first, `+` in the second only.
fn diff<'a>(old: &'a [String], new: &'a [String]) -> Vec<(char, &'a str)> {
    let first = old.iter().zip(new).take_while(|(one, other)| one == other).count();
    let rest = old[first..].iter().rev().zip(new[first..].iter().rev());
    let last = rest.take_while(|(one, other)| one == other).count();
    let (a, b) = (&old[first..old.len() - last], &new[first..new.len() - last]);
    let mut made: Vec<(char, &str)> = old[..first].iter().map(|line| (' ', line.as_str())).collect();
    // The length of the longest common subsequence from each pair of lines on.
    let width = b.len() + 1;
    let mut common = vec![0_u32; if a.len() * width <= MAX_PAIRS { (a.len() + 1) * width } else { 0 }];
    if !common.is_empty() {
        for i in (0..a.len()).rev() {
            for j in (0..b.len()).rev() {
                common[i * width + j] = match a[i] == b[j] {
                    true => common[(i + 1) * width + j + 1] + 1,
                    false => common[(i + 1) * width + j].max(common[i * width + j + 1]),
                };
            }
        }
    }
    let (mut i, mut j) = (0, 0);
    while i < a.len() || j < b.len() {
        let at = |i: usize, j: usize| common.get(i * width + j).copied().unwrap_or_default();
        if i < a.len() && j < b.len() && !common.is_empty() && a[i] == b[j] {
            made.push((' ', &a[i]));
            (i, j) = (i + 1, j + 1);
        } else if i < a.len() && (j == b.len() || at(i + 1, j) >= at(i, j + 1)) {
            made.push(('-', &a[i]));
            i += 1;
        } else {
            made.push(('+', &b[j]));
            j += 1;
        }
    }
    made.extend(old[old.len() - last..].iter().map(|line| (' ', line.as_str())));
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn diff_shows_each_line_once() {
        let check = |old: &str, new: &str, expected: &str| {
            let of = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            let (old, new) = (of(old), of(new));
            let made: Vec<String> = diff(&old, &new).iter().map(|(mark, line)| format!("{mark}{line}")).collect();
            assert_eq!(made.join(","), expected);
        };
        check("a b c", "a b c", " a, b, c");
        check("a b c", "a x c", " a,-b,+x, c");
        check("", "a b", "+a,+b");
        check("a b", "", "-a,-b");
        check("a b c d", "a c d e", " a,-b, c, d,+e");
        check("x a y", "a", "-x, a,-y");
    }
}
