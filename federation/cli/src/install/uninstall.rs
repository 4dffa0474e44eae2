//! `hanse uninstall`: removes a release, the rules of its nodes, and everything that the release or these commands created.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use hanse_kubernetes::answered;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::helm::Helm;
use super::managed;
use super::rollout::agents;
use super::target::{
    CREATED, JOIN_SECRET, Target, custom_resources, delete_token_secret, ignore_missing, name_of, of_release,
    pods_of_release, until,
};
use super::{Place, block_on};
use crate::output::{self, Format, UsageError};

/// Objects in a page of a list.
const PAGE: u32 = 500;

/// Remove Hanse from a cluster: the rules of its nodes, the Helm release, and everything that they created.
///
/// First, agents are replaced by pods that remove all rules and files of their node: from then on, all traffic of the node's pods is
/// allowed. When that is done on all nodes, the release, its volumes, Secrets, Leases and taints are removed, and the namespace, if
/// `hanse install` or `hanse join` created it. With --hub-context or --hub-kubeconfig, the cluster is also removed from its ClusterSet.
///
/// In the management cluster, this removes the ClusterSet: the root key, and all custom resources of hanse.dev. That needs
/// --delete-clusterset, and that no cluster belongs to it. Where the management cluster is itself a cluster of the ClusterSet, in one
/// release, --member-only removes member and agents, and keeps the hub.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse uninstall --kube-context train --hub-context management
  hanse uninstall --kube-context management --member-only
  hanse uninstall --kube-context management --delete-clusterset")]
pub struct Uninstall {
    #[command(flatten, next_help_heading = "Cluster")]
    target: Target,
    #[command(flatten)]
    place: Place,
    /// kubeconfig file of the management cluster, which removes the cluster [default: as --kubeconfig, with --hub-context].
    #[arg(long, value_name = "FILE", env = "HANSE_KUBECONFIG", help_heading = "Hub")]
    hub_kubeconfig: Option<PathBuf>,
    /// Context of the management cluster.
    #[arg(long, value_name = "NAME", help_heading = "Hub")]
    hub_context: Option<String>,
    /// Remove the hub, its root key and all custom resources of hanse.dev.
    #[arg(long)]
    delete_clusterset: bool,
    /// Remove member and agents from a release that also contains the hub, which stays.
    #[arg(long, conflicts_with_all = ["delete_clusterset", "hub_context"])]
    member_only: bool,
    /// Go on where nodes do not answer (their rules and files stay), where clusters still belong to the ClusterSet (they keep its
    /// policies in force), and where a GitOps program manages the release.
    #[arg(long)]
    force: bool,
    /// Timeout for each step, in seconds.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Format of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Uninstalled {
    namespace: String,
    release: String,
    /// The cluster that the release was; `None`: it had no member.
    cluster: Option<String>,
    /// Nodes whose rules and files were removed.
    nodes: usize,
    /// What stays, and why.
    left: Vec<String>,
}

impl Uninstall {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        block_on(self.uninstall())
    }

    async fn uninstall(self) -> anyhow::Result<ExitCode> {
        let Self { target, place, .. } = &self;
        let helm = Helm::new(target, place).await?;
        let client = target.open().await?;
        let hub = match (&self.hub_kubeconfig, &self.hub_context) {
            (None, None) => None,
            (file, context) => {
                let file = file.clone().or_else(|| target.kubeconfig.clone());
                Some(Target { kubeconfig: file, kube_context: context.clone() }.open().await?)
            }
        };
        let releases = managed::releases(&client).await?;
        let Some(state) = helm.status().await? else {
            bail!(managed::without_history(&releases, place, target));
        };
        if let Some(why) = managed::installed_again(&releases, place).filter(|_| !self.force) {
            bail!("{why} With --force, this command removes it nevertheless");
        }
        // An earlier run may have ended after any step.
        let is_removed = state == "uninstalled";
        let values = if is_removed { helm.kept_values().await? } else { helm.values().await?.unwrap_or_default() };
        let has = |component: &str| values[component]["enabled"] == true;
        if has("hub") && !self.delete_clusterset && !self.member_only {
            let only = if has("member") { "; to remove member and agents only, give --member-only" } else { "" };
            let text = format!(
                "the release contains the hub of the ClusterSet, with its root key: to remove it, give --delete-clusterset{only}"
            );
            return Err(UsageError(text).into());
        }
        let cluster = values["member"]["cluster"].as_str().filter(|it| !it.is_empty()).map(str::to_owned);
        if self.member_only {
            if !has("hub") || is_removed {
                let text =
                    format!("release {} contains no hub: --member-only is for a release that does", place.release);
                return Err(UsageError(text).into());
            }
            let Some(cluster) = cluster else {
                let done = format!("release {} contains no member", place.release);
                return self.report(None, 0, Vec::new(), done);
            };
            return self.remove_member(&client, &helm, &values, cluster).await;
        }
        let cluster = cluster.filter(|_| has("member"));
        if has("hub") && !is_removed {
            self.check_clusters(&client, cluster.as_deref()).await?;
        }
        let mut left = Vec::new();
        // An interrupted removal may have removed the agents already.
        let has_agents = !is_removed && state != "uninstalling" && agents(&client, place).await?.is_some();
        let nodes = if has_agents { self.clean_nodes(&client, &helm, &mut left).await? } else { 0 };
        output::note(format_args!("removing release {} of {}", place.release, target.title()));
        if !is_removed {
            helm.uninstall(self.timeout).await?;
        }
        self.remove_rest(&client, &values).await?;
        if has("hub") {
            self.remove_custom_resources(&client).await?;
            if let Some(url) = values["hub"]["etcd"]["url"].as_str().filter(|url| !url.is_empty()) {
                // What follows names files only.
                let url = url.split('?').next().unwrap_or_default();
                left.push(format!("the ClusterSet in the store {url}, and the Secrets with which the hub opened it"));
            }
        }
        if let Some(cluster) = &cluster {
            remove_taints(&client).await?;
            match &hub {
                Some(hub) => self.leave(hub, cluster).await?,
                None if has("hub") => {}
                None => left.push(format!(
                    "MemberCluster {cluster} of the management cluster: kubectl delete membercluster {cluster}, or --hub-context"
                )),
            }
        }
        let others = helm.others().await?;
        helm.purge().await?;
        self.remove_namespace(&client, &others, &mut left).await?;
        let count = output::count(nodes, "node");
        let done = match has_agents {
            true => format!("Hanse is removed from {}, and its rules from {count}", target.title()),
            false => format!("Hanse is removed from {}", target.title()),
        };
        self.report(cluster, nodes, left, done)
    }

    /// Removes member and agents of a release that also contains the hub. May be repeated.
    async fn remove_member(
        &self,
        client: &Client,
        helm: &Helm,
        values: &Value,
        cluster: String,
    ) -> anyhow::Result<ExitCode> {
        let Self { target, place, .. } = self;
        let mut left = Vec::new();
        let has_agents = agents(client, place).await?.is_some();
        let nodes = if has_agents { self.clean_nodes(client, helm, &mut left).await? } else { 0 };
        output::note(format_args!("removing member and agents of release {} of {}", place.release, target.title()));
        // The name of the cluster stays until the end, so that the command can be repeated.
        helm.set(&["member.enabled=false", "agent.enabled=false", "agent.cleanup=false"]).await?;
        for labels in of_release(place) {
            let labels = format!("{labels},app.kubernetes.io/component=member");
            delete_labelled::<Secret>(client, &place.namespace, &labels).await?;
        }
        self.remove_state_of_member(client, values).await?;
        remove_taints(client).await?;
        self.leave(client, &cluster).await?;
        helm.set(&["member.cluster="]).await?;
        let count = output::count(nodes, "node");
        let done = match has_agents {
            true => {
                format!("member and agents are removed from {}, and rules from {count}; the hub stays", target.title())
            }
            false => format!("member and agents are removed from {}; the hub stays", target.title()),
        };
        self.report(Some(cluster), nodes, left, done)
    }

    fn report(
        &self,
        cluster: Option<String>,
        nodes: usize,
        left: Vec<String>,
        done: String,
    ) -> anyhow::Result<ExitCode> {
        let Place { namespace, release } = self.place.clone();
        let uninstalled = Uninstalled { namespace, release, cluster, nodes, left };
        output::done(self.output, &uninstalled, done)?;
        if !uninstalled.left.is_empty() {
            output::note_list("What stays:", &uninstalled.left);
        }
        Ok(ExitCode::SUCCESS)
    }

    /// What the member and these commands wrote for it, without the labels of the release.
    async fn remove_state_of_member(&self, client: &Client, values: &Value) -> anyhow::Result<()> {
        let namespace = &self.place.namespace;
        let leases: Api<Lease> = Api::namespaced(client.clone(), namespace);
        delete(&leases, &format!("{}-member", name_of(&self.place))).await?;
        if values["member"]["hub"]["tokenSecret"]["name"] == JOIN_SECRET {
            let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
            delete(&secrets, JOIN_SECRET).await?;
        }
        Ok(())
    }

    /// No other cluster belongs to the ClusterSet.
    async fn check_clusters(&self, client: &Client, own: Option<&str>) -> anyhow::Result<()> {
        let api = custom_resources(client, "MemberCluster", "memberclusters");
        if !self.force && answered(async { Ok(api.list(&ListParams::default().limit(1)).await) }).await?.is_err() {
            bail!(
                "the clusters of the ClusterSet cannot be listed here, since the hub has no operator: remove Hanse from them, and give --force"
            );
        }
        let clusters: Vec<String> =
            list(&api).await?.iter().map(ResourceExt::name_any).filter(|it| Some(it.as_str()) != own).collect();
        if clusters.is_empty() || self.force {
            return Ok(());
        }
        bail!(
            "clusters belong to the ClusterSet: {}; remove Hanse from them first (`hanse uninstall`), delete their MemberClusters, or \
             give --force: then they keep its policies in force",
            clusters.join(", ")
        );
    }

    /// Removes the rules and files of all nodes. Returns the number of nodes.
    async fn clean_nodes(&self, client: &Client, helm: &Helm, left: &mut Vec<String>) -> anyhow::Result<usize> {
        output::note("removing the rules of all nodes: all traffic of their pods is then allowed");
        helm.set(&["agent.cleanup=true"]).await?;
        let clean = until(std::time::Duration::from_secs(self.timeout), "remove the rules of nodes", async || {
            Ok(match agents(client, &self.place).await? {
                None => Ok(0),
                Some(it) if it.are_ready() => Ok(it.wanted),
                Some(it) => Err(format!("rules removed from {} of {} nodes", it.updated.min(it.ready), it.wanted)),
            })
        });
        match clean.await {
            Ok(nodes) => Ok(nodes),
            Err(error) => {
                let nodes = self.unclean(client).await?;
                if !self.force {
                    let nodes = if nodes.is_empty() { String::new() } else { format!(" on {}", nodes.join(", ")) };
                    return Err(error.context(format!(
                        "rules may be in force{nodes}; all other nodes are open. When these nodes are ready, repeat the command, or give \
                         --force; to enforce again instead, repeat `hanse join`"
                    )));
                }
                left.extend(nodes.iter().map(|node| format!("rules and /var/lib/hanse of node {node}")));
                Ok(agents(client, &self.place).await?.map_or(0, |it| it.wanted.saturating_sub(nodes.len())))
            }
        }
    }

    /// Nodes with a pod of the agents that has not removed their rules.
    async fn unclean(&self, client: &Client) -> anyhow::Result<Vec<String>> {
        let api: Api<Pod> = Api::namespaced(client.clone(), &self.place.namespace);
        let labels = format!("{},app.kubernetes.io/component=agent", pods_of_release(&self.place));
        let pods = answered(api.list(&ListParams::default().labels(&labels))).await.context("read the agents' pods")?;
        let is_clean = |pod: &Pod| {
            let spec = pod.spec.as_ref();
            let arguments =
                spec.into_iter().flat_map(|it| it.containers.iter().flat_map(|it| it.args.iter().flatten()));
            let conditions = pod.status.iter().flat_map(|it| it.conditions.iter().flatten());
            arguments.into_iter().any(|it| it == "cleanup")
                && conditions.into_iter().any(|it| it.type_ == "Ready" && it.status == "True")
        };
        let unclean = pods.items.iter().filter(|pod| !is_clean(pod));
        Ok(unclean.filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect())
    }

    /// Objects of the release's namespace that Helm keeps, or that the programs created.
    async fn remove_rest(&self, client: &Client, values: &Value) -> anyhow::Result<()> {
        let namespace = &self.place.namespace;
        delete_labelled::<PersistentVolumeClaim>(client, namespace, &pods_of_release(&self.place)).await?;
        for labels in of_release(&self.place) {
            delete_labelled::<Secret>(client, namespace, &labels).await?;
            delete_labelled::<ConfigMap>(client, namespace, &labels).await?;
            delete_labelled::<Lease>(client, namespace, &labels).await?;
        }
        // The programs create them without the labels of the release.
        if values["member"]["enabled"] == true {
            self.remove_state_of_member(client, values).await?;
        }
        if values["hub"]["enabled"] == true {
            let leases: Api<Lease> = Api::namespaced(client.clone(), namespace);
            delete(&leases, managed::OPERATOR_LEASE).await?;
        }
        Ok(())
    }

    /// Removes all kinds of hanse.dev, with their objects. The hub does not run any more, so that its finalizer is removed here.
    async fn remove_custom_resources(&self, client: &Client) -> anyhow::Result<()> {
        let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
        let all =
            answered(definitions.list(&ListParams::default())).await.context("list custom resource definitions")?;
        let mut ours: Vec<_> = all.items.into_iter().filter(|it| it.spec.group == hanse_api::hanse::GROUP).collect();
        // Secrets of tokens belong to them, but are garbage only after a while.
        let tokens = custom_resources(client, "ClusterJoinToken", "clusterjointokens");
        let secrets: Api<Secret> = Api::namespaced(client.clone(), &self.place.namespace);
        for token in list(&tokens).await.unwrap_or_default() {
            if let Some(secret) = token.data["spec"]["secretName"].as_str() {
                delete_token_secret(&secrets, secret, &token).await?;
            }
        }
        ours.sort_by_key(ResourceExt::name_any);
        for definition in &ours {
            let (kind, plural) = (&definition.spec.names.kind, &definition.spec.names.plural);
            let api = custom_resources(client, kind, plural);
            let objects = list(&api).await.with_context(|| format!("list {plural}"))?;
            delete(&definitions, &definition.name_any()).await?;
            for object in objects.iter().filter(|it| !it.finalizers().is_empty()) {
                let none = json!({"metadata": {"finalizers": null}});
                let patched =
                    async { Ok(api.patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(&none)).await) };
                answered(patched)
                    .await?
                    .map(drop)
                    .or_else(ignore_missing)
                    .with_context(|| format!("release {kind} {}", object.name_any()))?;
            }
            let what = format!("remove the definition of {kind}");
            until(std::time::Duration::from_secs(self.timeout), &what, async || {
                Ok(match answered(definitions.get_opt(&definition.name_any())).await? {
                    None => Ok(()),
                    Some(_) => Err(format!("objects of {kind} are being deleted")),
                })
            })
            .await?;
        }
        output::note(format_args!("{} of hanse.dev removed, with their objects", output::count(ours.len(), "kind")));
        Ok(())
    }

    /// Removes the cluster from the ClusterSet.
    async fn leave(&self, hub: &Client, cluster: &str) -> anyhow::Result<()> {
        for (kind, plural) in [("ClusterJoinToken", "clusterjointokens"), ("MemberCluster", "memberclusters")] {
            let api = custom_resources(hub, kind, plural);
            delete(&api, cluster).await?;
            let what = format!("remove {kind} {cluster}");
            until(std::time::Duration::from_secs(self.timeout), &what, async || {
                Ok(match answered(api.get_opt(cluster)).await? {
                    None => Ok(()),
                    Some(_) => Err(format!("the hub's operator has not removed {kind} {cluster} yet")),
                })
            })
            .await?;
        }
        output::note(format_args!("cluster {cluster} removed from the ClusterSet"));
        Ok(())
    }

    /// Removes the namespace, if these commands created it.
    async fn remove_namespace(&self, client: &Client, others: &[String], left: &mut Vec<String>) -> anyhow::Result<()> {
        let (api, name): (Api<Namespace>, _) = (Api::all(client.clone()), &self.place.namespace);
        let Some(namespace) = answered(api.get_opt(name)).await.with_context(|| format!("read namespace {name}"))?
        else {
            return Ok(());
        };
        if namespace.labels().get(CREATED.0).is_none_or(|by| by != CREATED.1) {
            left.push(format!("namespace {name}, which another program created"));
            return Ok(());
        }
        if !others.is_empty() {
            left.push(format!("namespace {name}, which contains other releases: {}", others.join(", ")));
            return Ok(());
        }
        delete(&api, name).await?;
        if self.force {
            // Pods of a node that does not answer keep it.
            left.push(format!("namespace {name}, until all of its pods have ended"));
            return Ok(());
        }
        until(std::time::Duration::from_secs(self.timeout), &format!("remove namespace {name}"), async || {
            Ok(match answered(api.get_opt(name)).await? {
                None => Ok(()),
                Some(_) => Err(format!("objects of namespace {name} are being deleted")),
            })
        })
        .await
    }
}

/// All objects of a kind; none if the kind does not exist.
async fn list(api: &Api<DynamicObject>) -> anyhow::Result<Vec<DynamicObject>> {
    let (mut found, mut parameters) = (Vec::new(), ListParams::default().limit(PAGE));
    loop {
        let page = match answered(async { Ok(api.list(&parameters).await) }).await? {
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(found),
            page => page.map_err(|error| anyhow::anyhow!(hanse_kubernetes::message(error)))?,
        };
        parameters.continue_token = page.metadata.continue_.filter(|it| !it.is_empty());
        found.extend(page.items);
        if parameters.continue_token.is_none() {
            return Ok(found);
        }
    }
}

async fn delete<K: Clone + std::fmt::Debug + DeserializeOwned>(api: &Api<K>, name: &str) -> anyhow::Result<()> {
    let deleted = answered(async { Ok(api.delete(name, &DeleteParams::default()).await) }).await?;
    deleted.map(drop).or_else(ignore_missing).with_context(|| format!("delete {name}"))
}

async fn delete_labelled<K>(client: &Client, namespace: &str, labels: &str) -> anyhow::Result<()>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let parameters = ListParams::default().labels(labels);
    let deleted = answered(api.delete_collection(&DeleteParams::default(), &parameters)).await;
    deleted.map(drop).with_context(|| format!("delete {} of the release", K::plural(&())))
}

/// Removes the taint of nodes that wait for an agent.
async fn remove_taints(client: &Client) -> anyhow::Result<()> {
    const TAINT: &str = "hanse.dev/agent-not-ready";
    let api: Api<Node> = Api::all(client.clone());
    for node in answered(api.list(&ListParams::default())).await.context("list nodes")? {
        let name = node.name_any();
        let mut current = Some(node);
        // Kubelets write their nodes often: a conflict is tried again.
        for attempt in 1.. {
            let Some(node) = &current else { break };
            let Some(taints) = node.spec.as_ref().and_then(|it| it.taints.as_ref()) else { break };
            let kept: Vec<_> = taints.iter().filter(|it| it.key != TAINT).collect();
            if kept.len() == taints.len() {
                break;
            }
            let patch = json!({"metadata": {"resourceVersion": node.resource_version()}, "spec": {"taints": kept}});
            let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
            match answered(async { Ok(api.patch(&name, &parameters, &patch).await) }).await? {
                Err(kube::Error::Api(status)) if status.code == 409 && attempt < 10 => {
                    current = answered(api.get_opt(&name)).await.with_context(|| format!("read node {name}"))?;
                }
                patched => {
                    let removing = || format!("remove the taint {TAINT} of node {name}");
                    patched.map(drop).or_else(ignore_missing).with_context(removing)?;
                    break;
                }
            }
        }
    }
    Ok(())
}
