//! Applies manifests, as `kubectl apply --server-side` does.

use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_api::document;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::discovery::{self, Scope};

use super::until;

/// How long the server may take to serve a new kind.
const PATIENCE: Duration = Duration::from_secs(60);

/// The objects of a text of YAML documents, read as Kubernetes reads them. Empty documents are left out.
///
/// # Errors
/// When a document is not an object.
pub fn read(text: &str) -> anyhow::Result<Vec<DynamicObject>> {
    let mut objects = Vec::new();
    for document in document::documents(text) {
        let document = document.map_err(|error| anyhow::anyhow!("read a document: {error}"))?;
        if let Some(fault) = document.faults.first() {
            bail!("read a document: {fault}");
        }
        let value = document.root().to_value();
        if !value.is_null() {
            objects.push(serde_json::from_value(value).context("read an object")?);
        }
    }
    Ok(objects)
}

/// Applies the objects of a text in their order, as the field manager `manager`, and takes over fields from others. Namespaced
/// objects without a namespace go to `default`. After a CustomResourceDefinition it waits until its kind is served.
///
/// # Errors
/// When the server refuses an object, does not know its kind, or does not serve a new kind in time.
pub async fn apply(client: &kube::Client, manager: &str, text: &str) -> anyhow::Result<Vec<DynamicObject>> {
    let mut applied = Vec::new();
    for object in read(text)? {
        let kind = object.types.as_ref().map_or("", |types| types.kind.as_str()).to_owned();
        let name = object.metadata.name.clone().unwrap_or_default();
        let result = apply_object(client, manager, object).await.with_context(|| format!("apply {kind} {name}"))?;
        if kind == "CustomResourceDefinition" {
            established(client, &name).await?;
        }
        applied.push(result);
    }
    Ok(applied)
}

/// As [`apply`], for one object.
///
/// # Errors
/// As for [`apply`].
pub async fn apply_object(
    client: &kube::Client,
    manager: &str,
    object: DynamicObject,
) -> anyhow::Result<DynamicObject> {
    let types = object.types.as_ref().context("the object has no apiVersion and kind")?;
    let gvk = GroupVersionKind::try_from(types).context("read apiVersion and kind")?;
    let (resource, capabilities) = discovery::pinned_kind(client, &gvk).await.context("find the kind")?;
    let api: Api<DynamicObject> = match (capabilities.scope, object.metadata.namespace.as_deref()) {
        (Scope::Cluster, _) => Api::all_with(client.clone(), &resource),
        (Scope::Namespaced, Some(namespace)) => Api::namespaced_with(client.clone(), namespace, &resource),
        (Scope::Namespaced, None) => Api::default_namespaced_with(client.clone(), &resource),
    };
    let name = object.metadata.name.as_deref().context("the object has no name")?;
    let parameters = PatchParams::apply(manager).force();
    Ok(api.patch(name, &parameters, &Patch::Apply(&object)).await?)
}

/// Waits until a CustomResourceDefinition is established and its kinds are found by discovery.
///
/// # Errors
/// When it is not in time.
pub async fn established(client: &kube::Client, name: &str) -> anyhow::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut last = None;
    let served = until(PATIENCE, async || {
        last = api.get(name).await.ok();
        let Some(definition) = &last else { return false };
        let conditions = definition.status.as_ref().and_then(|status| status.conditions.as_ref());
        let established = conditions.into_iter().flatten().any(|it| it.type_ == "Established" && it.status == "True");
        established && is_found(client, definition).await
    });
    if served.await.is_none() {
        bail!("CustomResourceDefinition {name} is not established: {:?}", last.and_then(|it| it.status));
    }
    Ok(())
}

/// The server lists a kind some time after the condition says that it is established.
async fn is_found(client: &kube::Client, definition: &CustomResourceDefinition) -> bool {
    for version in definition.spec.versions.iter().filter(|version| version.served) {
        let gvk = GroupVersionKind::gvk(&definition.spec.group, &version.name, &definition.spec.names.kind);
        if discovery::pinned_kind(client, &gvk).await.is_err() {
            return false;
        }
    }
    true
}
