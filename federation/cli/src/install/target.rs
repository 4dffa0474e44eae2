//! A cluster, as its administrator sees it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_kubernetes::{Access, answered};
use k8s_openapi::api::core::v1::{Namespace, Secret, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::time::Instant;

use super::{LOOK_EVERY, Place};
use crate::output;

/// The owner of the fields that these commands write.
pub const FIELD_MANAGER: &str = "hanse";
/// The label of objects that these commands created, and may delete.
pub const CREATED: (&str, &str) = ("app.kubernetes.io/managed-by", "hanse");
/// The Secret of the token in the cluster that joins.
pub const JOIN_SECRET: &str = "hanse-join";
/// The oldest minor version of Kubernetes 1 that is supported.
const MINOR: u32 = 31;

/// Which cluster.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Target {
    /// kubeconfig file of the cluster [default: the files of KUBECONFIG, or ~/.kube/config].
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig; by default its current one.
    #[arg(long, value_name = "NAME")]
    pub kube_context: Option<String>,
}

impl Target {
    /// Connects, and checks that the API server serves a supported version.
    pub async fn open(&self) -> anyhow::Result<Client> {
        let access = Access { kubeconfig: self.kubeconfig.clone(), context: self.kube_context.clone() };
        let at = || format!("connect to the cluster of {}", self.title());
        let client = access.user_client().await.with_context(at)?;
        let version = answered(client.apiserver_version()).await.with_context(at)?;
        let minor = version.minor.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
        if version.major == "1" && minor < MINOR {
            bail!(
                "the cluster of {} runs Kubernetes {}: 1.{MINOR} or newer is needed",
                self.title(),
                version.git_version
            );
        }
        Ok(client)
    }

    /// The context, for people.
    pub fn title(&self) -> String {
        match (&self.kube_context, &self.kubeconfig) {
            (Some(context), _) => format!("context {context}"),
            (None, Some(file)) => file.display().to_string(),
            (None, None) => "the current context".to_owned(),
        }
    }
}

/// A kind of `hanse.dev`.
pub fn custom_resources(client: &Client, kind: &str, plural: &str) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk(hanse_api::hanse::GROUP, hanse_api::hanse::VERSION, kind);
    Api::all_with(client.clone(), &ApiResource::from_gvk_with_plural(&gvk, plural))
}

/// The status of a condition; `None`: it has none.
pub fn condition<'a>(object: &'a DynamicObject, kind: &str) -> Option<(&'a str, &'a str)> {
    let conditions = object.data["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|it| it["type"] == kind)?;
    Some((found["status"].as_str()?, found["message"].as_str().unwrap_or_default()))
}

/// Creates the namespace of a release. Agents need the Pod Security level `privileged`.
pub async fn create_namespace(client: &Client, name: &str, privileged: bool) -> anyhow::Result<()> {
    const LEVEL: &str = "pod-security.kubernetes.io/enforce";
    let api: Api<Namespace> = Api::all(client.clone());
    let doing = || format!("create the namespace {name}");
    let Some(namespace) = answered(api.get_opt(name)).await.with_context(doing)? else {
        let mut labels = json!({CREATED.0: CREATED.1});
        if privileged {
            labels[LEVEL] = json!("privileged");
        }
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        answered(api.patch(name, &PatchParams::apply(FIELD_MANAGER), &Patch::Apply(&namespace)))
            .await
            .with_context(doing)?;
        output::note(format_args!("namespace {name} created"));
        return Ok(());
    };
    match namespace.labels().get(LEVEL).map(String::as_str) {
        // An earlier command created it without agents.
        None if privileged && namespace.labels().get(CREATED.0).is_some_and(|by| by == CREATED.1) => {
            let label = json!({"metadata": {"labels": {LEVEL: "privileged"}}});
            let labelled = api.patch(name, &PatchParams::default(), &Patch::Merge(&label)).await;
            labelled.map(drop).map_err(|error| anyhow::anyhow!(hanse_kubernetes::message(error))).with_context(doing)
        }
        Some(level) if privileged && level != "privileged" => bail!(
            "the namespace {name} has the Pod Security level {level}, but agents use the network of their nodes: \
             kubectl label --overwrite namespace {name} {LEVEL}=privileged"
        ),
        _ => Ok(()),
    }
}

/// The Service of the hub.
pub async fn hub_service(client: &Client, place: &Place) -> anyhow::Result<Option<Service>> {
    let api: Api<Service> = Api::namespaced(client.clone(), &place.namespace);
    answered(api.get_opt(&format!("{}-hub", name_of(place)))).await.context("look for the hub's Service")
}

/// Whether a Service waits for a load balancer.
pub fn is_balanced(service: &Service) -> bool {
    service.spec.as_ref().and_then(|it| it.type_.as_deref()) == Some("LoadBalancer")
}

/// The host at which a Service is reached from outside of its cluster.
pub fn outside_host(service: &Service) -> Option<String> {
    let ingress = service.status.as_ref()?.load_balancer.as_ref()?.ingress.as_ref()?;
    ingress.iter().find_map(|it| it.ip.clone().or_else(|| it.hostname.clone()))
}

/// Waits until `look` returns a value. Its error text is reported when it changes.
pub async fn until<T>(
    timeout: Duration,
    what: &str,
    mut look: impl AsyncFnMut() -> anyhow::Result<Result<T, String>>,
) -> anyhow::Result<T> {
    let (start, mut said) = (Instant::now(), String::new());
    loop {
        let found = look().await;
        let why = match found {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(why)) => why,
            // The API server may be away for a moment.
            Err(error) if start.elapsed() >= timeout => return Err(error.context(what.to_owned())),
            Err(error) => format!("{error:#}"),
        };
        if start.elapsed() >= timeout {
            bail!("{what}: not within {} s: {why}", timeout.as_secs());
        }
        if why != said {
            output::note(format_args!("  {why}"));
            said = why;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What the names of a release's objects begin with, as in the chart.
pub fn name_of(place: &Place) -> String {
    match place.release.contains("hanse") {
        true => place.release.clone(),
        false => format!("{}-hanse", place.release),
    }
}

/// NAME and NAMESPACE of the Service, if a host is the name that only its own cluster resolves: NAME.NAMESPACE.svc.
pub fn service_of(host: &str) -> Option<(&str, &str)> {
    let host = host.trim_end_matches('.');
    let name = host.strip_suffix(".svc.cluster.local").or_else(|| host.strip_suffix(".svc"))?;
    let (name, namespace) = name.rsplit_once('.')?;
    // The name of a pod may be before that of its headless Service.
    Some((name.rsplit('.').next()?, namespace))
}

/// The label of all objects of a release but pods and claims.
pub const RELEASE: &str = "chart.hanse.dev/release";

/// The selectors of all objects of a release but pods and claims: by the label of the chart, which no other program changes, and
/// of charts before it.
pub fn of_release(place: &Place) -> [String; 2] {
    [format!("{RELEASE}={}", place.release), format!("!{RELEASE},{}", pods_of_release(place))]
}

/// The selector of the pods and claims of a release. Argo CD may overwrite the label `instance`, but not of what other objects create.
pub fn pods_of_release(place: &Place) -> String {
    format!("app.kubernetes.io/name=hanse,app.kubernetes.io/instance={}", place.release)
}

/// An object that does not exist needs no deletion.
pub fn ignore_missing(error: kube::Error) -> anyhow::Result<()> {
    match error {
        kube::Error::Api(status) if status.code == 404 => Ok(()),
        error => Err(anyhow::anyhow!(hanse_kubernetes::message(error))),
    }
}

/// Deletes the Secret of a token, if the hub created it for this ClusterJoinToken.
pub async fn delete_token_secret(secrets: &Api<Secret>, name: &str, token: &DynamicObject) -> anyhow::Result<()> {
    let doing = || format!("delete Secret {name}");
    let found = answered(secrets.get_opt(name)).await.with_context(doing)?;
    let is_owner = |it: &OwnerReference| Some(&it.uid) == token.metadata.uid.as_ref();
    if !found.is_some_and(|it| it.owner_references().iter().any(is_owner)) {
        return Ok(());
    }
    let deleted = answered(async { Ok(secrets.delete(name, &DeleteParams::default()).await) }).await?;
    deleted.map(drop).or_else(ignore_missing).with_context(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_a_service_is_resolved_by_its_cluster_only() {
        for (host, expected) in [
            ("hanse-hub.hanse.svc", Some(("hanse-hub", "hanse"))),
            ("hanse-hub.hanse.svc.cluster.local.", Some(("hanse-hub", "hanse"))),
            ("hanse-hub-0.hanse-hub.hanse.svc", Some(("hanse-hub", "hanse"))),
            ("$(POD_NAME).hanse.svc", Some(("$(POD_NAME)", "hanse"))),
            // The name of an exported Service, by which clusters with the Multi-Cluster Services API find it.
            ("hanse-hub.hanse.svc.clusterset.local", None),
            ("hub.example", None),
            ("svc", None),
            ("192.0.2.1", None),
        ] {
            assert_eq!(service_of(host), expected, "{host}");
        }
    }
}
