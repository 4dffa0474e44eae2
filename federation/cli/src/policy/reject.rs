//! How a pending change of a custom resource is dropped: the object becomes again what is in force, with the rights of the caller. The
//! hub is not involved, and what it enforces does not change at any moment.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hanse_api::hanse::GROUP;
use hanse_kubernetes::answered;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use super::approve::{Pending, READ_WITHIN, api, plural, read};

/// While an object has it, its deletion waits for the hub.
const FINALIZER: &str = "hanse.dev/operator";
const FIELD_MANAGER: &str = "hanse";

/// Drops the change of an object that waits, and returns what that means.
///
/// # Errors
/// When no change waits, or not the one with this digest, or the user lacks a right.
pub async fn at_management(
    client: &Client,
    kind: &'static str,
    name: &str,
    digest: Option<&str>,
) -> anyhow::Result<&'static str> {
    let pending = read(client, kind, name.to_owned()).await?;
    if let Some(digest) = digest.filter(|it| *it != pending.digest) {
        bail!("the change of {kind}/{name} is another one now, {}, and not {digest}: review it again", pending.digest);
    }
    let api = api(client, kind);
    match (&pending.before, pending.is_deletion) {
        (Value::Null, _) => withdraw(&api, &pending).await,
        (in_force, true) => keep(client, kind, &pending, in_force).await,
        (in_force, false) => restore(&api, &pending, in_force).await,
    }
}

/// Deletes an object that was never in force.
async fn withdraw(api: &Api<DynamicObject>, pending: &Pending) -> anyhow::Result<&'static str> {
    let version = pending.object.resource_version();
    let preconditions = Preconditions { uid: pending.object.uid(), resource_version: version };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    let name = pending.object.name_any();
    answered(api.delete(&name, &parameters))
        .await
        .with_context(|| format!("delete {name}, which was never in force"))?;
    Ok("it was never in force, and is deleted")
}

/// Gives an object the spec and the labels of the version in force.
async fn restore(api: &Api<DynamicObject>, pending: &Pending, in_force: &Value) -> anyhow::Result<&'static str> {
    let mut object = pending.object.clone();
    object.metadata.labels = labels(in_force)?;
    object.data["spec"] = in_force["spec"].clone();
    let parameters = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    let name = object.name_any();
    let restored = answered(api.replace(&name, &parameters, &object)).await;
    restored.with_context(|| format!("give {name} the version in force"))?;
    Ok("the object is the version in force again")
}

/// Replaces an object that is being deleted by a new one with the version in force. Kubernetes cannot revoke a deletion: the old object
/// ends without the hub, which keeps what is in force, and the new one is what the hub has already.
async fn keep(client: &Client, kind: &str, pending: &Pending, in_force: &Value) -> anyhow::Result<&'static str> {
    let (api, old) = (api(client, kind), &pending.object);
    let name = old.name_any();
    if let Some(other) = old.finalizers().iter().find(|it| *it != FINALIZER) {
        bail!("metadata.finalizers: {kind}/{name} waits for {other}, too: remove it first");
    }
    let mut new: DynamicObject = serde_json::from_value(in_force.clone()).context("read the version in force")?;
    new.metadata.annotations.clone_from(&old.metadata.annotations);
    let create = |dry_run| PostParams { dry_run, field_manager: Some(FIELD_MANAGER.to_owned()) };
    // Where the user may not create it, nothing is changed. The name is still taken. For a tier, the webhook requires no other right than
    // that of the API server.
    if kind == "FederatedNetworkPolicy" {
        let mut tried = new.clone();
        tried.metadata.name = None;
        tried.metadata.generate_name = Some("reject-".to_owned());
        let allowed = answered(api.create(&create(true), &tried)).await;
        allowed.with_context(|| format!("create {name} again, as a dry run"))?;
    } else if !may_create(client, kind).await? {
        bail!(
            "{kind}/{name} has to be created again, and the user of the kubeconfig needs the verb \"create\" on {}.{GROUP}; nothing was \
             changed",
            plural(kind)
        );
    }
    // Only of this version.
    let released =
        json!({"metadata": {"uid": old.uid(), "resourceVersion": old.resource_version(), "finalizers": null}});
    let released = answered(api.patch(&name, &PatchParams::default(), &Patch::Merge(released))).await;
    released.with_context(|| format!("remove the finalizer {FINALIZER} from {name}"))?;
    let created = answered(api.create(&create(false), &new)).await;
    created.with_context(|| {
        format!(
            "create {kind}/{name} again: it stays in force without its custom resource; apply this manifest: {in_force}"
        )
    })?;
    confirm(&api, &name).await?;
    Ok("it stays in force, as a new object with the version in force")
}

/// Waits until the hub has read an object that was created again. An approval of the deletion may have come before it.
async fn confirm(api: &Api<DynamicObject>, name: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let object = answered(api.get(name)).await.with_context(|| format!("read {name} again"))?;
        let status = &object.data["status"];
        let conditions = || status["conditions"].as_array().into_iter().flatten();
        if status["observedGeneration"] == object.metadata.generation.unwrap_or_default()
            && conditions().next().is_some()
        {
            let wrong = conditions()
                .find(|it| ["Approved", "Accepted"].iter().any(|of| it["type"] == *of) && it["status"] == "False");
            let Some(wrong) = wrong else { return Ok(()) };
            bail!(
                "{name} was created again, and is not in force: {}. The deletion was approved meanwhile",
                wrong["message"].as_str().unwrap_or_default()
            );
        }
        if start.elapsed() > READ_WITHIN {
            bail!(
                "{name} was created again, and the hub has not read it yet: see `kubectl get` for its condition Accepted"
            );
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Whether the API server permits the user to create objects of a kind. An answer that is missing is a refusal.
async fn may_create(client: &Client, kind: &str) -> anyhow::Result<bool> {
    let attributes = ResourceAttributes {
        group: Some(GROUP.to_owned()),
        resource: Some(plural(kind).to_owned()),
        verb: Some("create".to_owned()),
        ..ResourceAttributes::default()
    };
    let spec =
        SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..SelfSubjectAccessReviewSpec::default() };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let reviewed = answered(api.create(&PostParams::default(), &review)).await;
    let reviewed = reviewed.with_context(|| format!("review whether the user may create {}.{GROUP}", plural(kind)))?;
    Ok(reviewed.status.is_some_and(|it| it.allowed))
}

fn labels(manifest: &Value) -> anyhow::Result<Option<std::collections::BTreeMap<String, String>>> {
    serde_json::from_value(manifest["metadata"]["labels"].clone()).context("read the labels of the version in force")
}
