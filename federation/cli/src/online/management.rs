//! The management API server: where the hub's operator runs, custom resources are the truth, and the caller's own rights at the API
//! server decide.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use hanse_kubernetes::{Access, answered};
use hanse_proto::federation::v1 as pb;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use super::kind::{KINDS, name_of};

/// The owner of the fields that the command writes.
const FIELD_MANAGER: &str = "hanse";
/// Objects in a page of a list.
const PAGE: u32 = 500;
/// How long a deletion waits until the hub has deleted its object, and how often it looks.
const DELETED_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Which API server.
#[derive(Debug, clap::Args)]
pub struct Management {
    /// Use the management API server of this kubeconfig file, with its user, instead of the hub. The operator of the hub reconciles what
    /// is written there.
    #[arg(long, env = "HANSE_KUBECONFIG", value_name = "FILE", value_parser = file)]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig file; by default its current one.
    #[arg(long, value_name = "NAME", requires = "kubeconfig")]
    kube_context: Option<String>,
}

/// Accepts the empty string, which counts as not set.
fn file(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(text))
}

impl Management {
    /// `None`: the hub.
    pub fn access(&self) -> Option<Access> {
        let kubeconfig = self.kubeconfig.clone().filter(|path| !path.as_os_str().is_empty())?;
        Some(Access { kubeconfig: Some(kubeconfig), context: self.kube_context.clone() })
    }
}

/// What an apply did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    Created,
    Configured,
    Unchanged,
}

/// The management API server.
pub struct Server(Client);

/// Runs `work` with the API server.
pub fn with<T>(access: &Access, work: impl AsyncFnOnce(Server) -> anyhow::Result<T>) -> anyhow::Result<T> {
    hanse_identity::tls::install_provider();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start")?;
    runtime.block_on(async { work(Server(access.client().await?)).await })
}

impl Server {
    fn api(&self, kind: pb::ObjectKind) -> Api<DynamicObject> {
        let kind = name_of(kind.into());
        let gvk = GroupVersionKind::gvk(hanse_api::hanse::GROUP, hanse_api::hanse::VERSION, kind);
        // The plurals of all kinds are regular, also where they end in -y.
        let lower = kind.to_ascii_lowercase();
        let plural = lower.strip_suffix('y').map_or_else(|| format!("{lower}s"), |stem| format!("{stem}ies"));
        Api::all_with(self.0.clone(), &ApiResource::from_gvk_with_plural(&gvk, &plural))
    }

    /// Applies a manifest on the side of the server. With a revision, only if the object has not changed since.
    pub async fn apply(
        &self,
        kind: pb::ObjectKind,
        name: &str,
        manifest: &[u8],
        revision: Option<u64>,
        dry_run: bool,
    ) -> anyhow::Result<(Applied, Option<u64>)> {
        let api = self.api(kind);
        let mut object: Value = serde_json::from_slice(manifest).context("read the manifest")?;
        if let Some(revision) = revision {
            object["metadata"]["resourceVersion"] = json!(revision.to_string());
        }
        let before = answered(api.get_opt(name)).await?;
        let mut parameters = PatchParams::apply(FIELD_MANAGER);
        parameters.dry_run = dry_run;
        let after = answered(api.patch(name, &parameters, &Patch::Apply(&object))).await?;
        let applied = match before {
            None => Applied::Created,
            // A dry run has no version of its own.
            Some(before)
                if before.metadata.generation == after.metadata.generation && before.labels() == after.labels() =>
            {
                Applied::Unchanged
            }
            Some(_) => Applied::Configured,
        };
        Ok((applied, revision_of(&after)))
    }

    /// Objects of one kind, or of all, without their status.
    pub async fn get(&self, kind: Option<pb::ObjectKind>, name: Option<&str>) -> anyhow::Result<Vec<pb::Object>> {
        let kinds = kind.map_or_else(|| KINDS.map(|(.., kind)| kind).to_vec(), |kind| vec![kind]);
        let mut found = Vec::new();
        for kind in kinds {
            let api = self.api(kind);
            let reading = || format!("read {} from the API server", name_of(kind.into()));
            if let Some(name) = name {
                let object = answered(api.get_opt(name)).await.with_context(reading)?;
                found.extend(object.map(|object| to_wire(kind, object)));
                continue;
            }
            let mut parameters = ListParams::default().limit(PAGE);
            loop {
                let page = answered(api.list(&parameters)).await.with_context(reading)?;
                parameters.continue_token = page.metadata.continue_.filter(|it| !it.is_empty());
                found.extend(page.items.into_iter().map(|object| to_wire(kind, object)));
                if parameters.continue_token.is_none() {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Deletes an object, and waits until the hub has deleted its own. False: it does not exist.
    pub async fn delete(&self, kind: pb::ObjectKind, name: &str) -> anyhow::Result<bool> {
        let api = self.api(kind);
        let Some(object) = answered(api.get_opt(name)).await? else { return Ok(false) };
        answered(api.delete(name, &DeleteParams::default())).await?;
        let gone = async {
            loop {
                match answered(api.get_opt(name)).await? {
                    Some(now) if now.metadata.uid == object.metadata.uid => tokio::time::sleep(LOOK_EVERY).await,
                    _ => return anyhow::Ok(()),
                }
            }
        };
        if let Ok(gone) = tokio::time::timeout(DELETED_WITHIN, gone).await {
            return gone.map(|()| true);
        }
        let now = answered(api.get_opt(name)).await?;
        let conditions = now.as_ref().and_then(|it| it.data["status"]["conditions"].as_array());
        let terminating = conditions.into_iter().flatten().find(|it| it["type"] == "Terminating");
        let why = terminating.and_then(|it| it["message"].as_str()).unwrap_or("the hub's operator may not run");
        let seconds = DELETED_WITHIN.as_secs();
        anyhow::bail!("it is being deleted, and exists after {seconds} s: {why}")
    }
}

fn revision_of(object: &DynamicObject) -> Option<u64> {
    object.resource_version()?.parse().ok()
}

/// The manifest, as `hanse get` shows that of a hub.
fn to_wire(kind: pb::ObjectKind, object: DynamicObject) -> pb::Object {
    let name = object.name_any();
    let mut metadata = json!({"name": name});
    if let Some(labels) = object.metadata.labels.as_ref().filter(|labels| !labels.is_empty()) {
        metadata["labels"] = json!(labels);
    }
    let mut manifest = json!({
        "apiVersion": hanse_api::hanse::API_VERSION, "kind": name_of(kind.into()), "metadata": metadata,
    });
    if let Some(spec) = object.data.get("spec") {
        manifest["spec"] = spec.clone();
    }
    let revision = revision_of(&object).unwrap_or_default();
    pb::Object { kind: kind.into(), name, revision, manifest: manifest.to_string().into() }
}
