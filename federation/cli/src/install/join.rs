//! `hanse join`: member and agents in a cluster, with a token of the management cluster.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use hanse_kubernetes::answered;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Namespace, Node, Secret, Service, Taint};
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::{Value, json};

use super::helm::Helm;
use super::progress::{Report, followed};
use super::rollout::ready;
use super::target::{
    CREATED, FIELD_MANAGER, JOIN_SECRET, Target, condition, create_namespace, custom_resources, delete_token_secret,
    hub_service, ignore_missing, is_balanced, name_of, outside_host, service_of, until,
};
use super::{Place, Settings, block_on, check_digest, engines, label, print};
use crate::output;

/// The key of the token in its Secret.
const TOKEN: &str = "token";

/// Install member and agents in a cluster, and join it to the ClusterSet; or upgrade them.
///
/// Creates a ClusterJoinToken at the management cluster, gives its token to the cluster as a Secret, installs the Helm chart that the command
/// carries with `helm` from PATH, and waits until all nodes have rules and the hub receives the data of the cluster. All of it is done with the
/// users of the kubeconfigs.
///
/// Where another program enforces network policy, such as Calico or Cilium, the cluster begins in Observe mode: what policy denies is
/// logged, and passes. `--enforcement Enforce` ends that.
///
/// The labels and grants of a cluster are in its MemberCluster, which may be applied before or after. Without grants, a cluster enforces
/// policy and exports nothing.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse join --kube-context train --hub-context management --cluster train \\
    --registry $REGISTRY --member-digest $MEMBER_DIGEST --agent-digest $AGENT_DIGEST
  hanse join --kube-context train --hub-context management --cluster train \\
    --registry $REGISTRY --member-digest $MEMBER_DIGEST --agent-digest $AGENT_DIGEST \\
    --enforcement Enforce")]
pub struct Join {
    #[command(flatten, next_help_heading = "Cluster")]
    target: Target,
    /// Name of the cluster in the ClusterSet.
    #[arg(long, value_name = "NAME", value_parser = label, help_heading = "Cluster")]
    cluster: String,
    /// kubeconfig file of the management cluster [default: as --kubeconfig].
    #[arg(long, value_name = "FILE", env = "HANSE_KUBECONFIG", help_heading = "Hub")]
    hub_kubeconfig: Option<PathBuf>,
    /// Context of the management cluster; by default the current one of its kubeconfig.
    #[arg(long, value_name = "NAME", help_heading = "Hub")]
    hub_context: Option<String>,
    /// Namespace of the hub.
    #[arg(long, value_name = "NAME", default_value = "hanse", value_parser = label, help_heading = "Hub")]
    hub_namespace: String,
    /// Helm release of the hub.
    #[arg(long, value_name = "NAME", default_value = "hanse", value_parser = label, help_heading = "Hub")]
    hub_release: String,
    /// Address of the hub for members [default: that of the load balancer of its Service, port 7443]; repeatable.
    #[arg(long, value_name = "HOST:PORT", value_parser = hanse_runtime::settings::host_port, requires = "join", help_heading = "Hub")]
    hub: Vec<String>,
    /// Address of the hub for clusters that join [default: as --hub, port 7444]; repeatable.
    #[arg(long, value_name = "HOST:PORT", value_parser = hanse_runtime::settings::host_port, requires = "hub", help_heading = "Hub")]
    join: Vec<String>,
    #[command(flatten)]
    settings: Settings,
    /// Digest of the image `hanse-member`.
    #[arg(long, value_name = "DIGEST", help_heading = "Release")]
    member_digest: String,
    /// Digest of the image `hanse-agent`.
    #[arg(long, value_name = "DIGEST", help_heading = "Release")]
    agent_digest: String,
    /// Whether nodes drop what policy denies [default: Observe beside another policy engine, else Enforce; an upgrade changes nothing].
    #[arg(long, value_enum, help_heading = "Release")]
    enforcement: Option<Enforcement>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[value(rename_all = "PascalCase")]
enum Enforcement {
    /// Drop it.
    Enforce,
    /// Log it, and let it pass.
    Observe,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Joined {
    cluster: String,
    namespace: String,
    release: String,
    enforcement: Enforcement,
    /// Other policy engines of the cluster.
    policy_engines: Vec<String>,
    /// Nodes whose agents are ready.
    nodes: usize,
}

/// The management cluster.
struct Hub {
    client: Client,
    place: Place,
}

impl Join {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        block_on(self.join_cluster())
    }

    async fn join_cluster(self) -> anyhow::Result<ExitCode> {
        check_digest("--member-digest", &self.member_digest)?;
        check_digest("--agent-digest", &self.agent_digest)?;
        let (settings, place, name) = (&self.settings, &self.settings.place, &self.cluster);
        let helm = Helm::new(&self.target, place).await?;
        let client = self.target.open().await?;
        let management = Target {
            kubeconfig: self.hub_kubeconfig.clone().or_else(|| self.target.kubeconfig.clone()),
            kube_context: self.hub_context.clone(),
        };
        let hub = Hub {
            client: management.open().await?,
            place: Place { namespace: self.hub_namespace.clone(), release: self.hub_release.clone() },
        };
        let before = helm.values().await?.unwrap_or_default();
        let other = before["member"]["cluster"].as_str().filter(|other| !other.is_empty() && other != name);
        if let Some(other) = other {
            bail!("release {} of {} is the cluster {other} already", place.release, self.target.title());
        }
        let (hubs, joins) = self.addresses(&hub, &management, &client).await?;
        let engines = engines::found(&client).await?;
        let is_upgrade = before["member"]["enabled"] == true;
        let enforcement = match (self.enforcement, is_upgrade) {
            (Some(enforcement), _) => enforcement,
            (None, true) if before["member"]["enforcement"] == "Observe" => Enforcement::Observe,
            (None, true) => Enforcement::Enforce,
            (None, false) if engines.is_empty() => Enforcement::Enforce,
            (None, false) => Enforcement::Observe,
        };
        if enforcement == Enforcement::Observe {
            let why = match (self.enforcement, engines.is_empty()) {
                (None, false) => format!("{} enforces policy here", engines.join(", ")),
                _ => "as chosen".to_owned(),
            };
            output::note(format_args!("the cluster observes ({why}): what policy denies is logged, and passes"));
        }
        let mut values = json!({
            "image": {"registry": settings.registry},
            "member": {
                "enabled": true, "image": {"digest": self.member_digest}, "cluster": name, "enforcement": enforcement,
                "hub": {"addresses": hubs, "joinAddresses": joins, "tokenSecret": {"name": JOIN_SECRET, "key": TOKEN}},
            },
            "agent": {"enabled": true, "cleanup": false, "image": {"digest": self.agent_digest}},
        });
        // Two members use the same ports of their nodes. An upgrade changes nothing.
        if !is_upgrade && nodes(&client).await? < 2 {
            output::note("the cluster has one node: one member runs, and no other can take its place");
            values["member"]["replicas"] = json!(1);
        }
        if settings.dry_run {
            return print(&helm.install(&values, settings).await?);
        }
        create_namespace(&client, &place.namespace, true).await?;
        let is_member = hub.has(name).await?;
        if !(is_upgrade && is_member) {
            self.give_token(&hub, &client).await?;
        }
        let doing = if is_upgrade { "upgrading" } else { "installing" };
        output::note(format_args!(
            "{doing} member and agents in namespace {} of {}",
            place.namespace,
            self.target.title()
        ));
        let work = helm.install(&values, settings);
        let (installed, progress) = followed(&client, place, Report::PodsAndWarnings, work).await;
        installed.with_context(|| format!("install member and agents ({})", progress.text()))?;
        let work = async {
            hub.connected(name, settings).await?;
            hub.remove_token(name).await?;
            ready(&client, place, settings.timeout()).await
        };
        // Helm does not wait for all agents.
        let (nodes, progress) = followed(&client, place, Report::Warnings, work).await;
        let nodes = nodes.with_context(|| progress.text())?;
        let joined = Joined {
            cluster: name.clone(),
            namespace: place.namespace.clone(),
            release: place.release.clone(),
            enforcement,
            policy_engines: engines,
            nodes,
        };
        let what = match enforcement {
            Enforcement::Enforce => "have rules and enforce",
            Enforcement::Observe => "have rules and observe",
        };
        let count = output::count(nodes, "node");
        output::done(settings.output, &joined, format_args!("cluster {name} has joined: {count} {what}"))?;
        if enforcement == Enforcement::Observe {
            output::note("when no connection that you need is observed: repeat the command with --enforcement Enforce");
        }
        hub.note_grants(name).await?;
        Ok(ExitCode::SUCCESS)
    }

    /// The addresses of the hub, as the member uses them. Both empty: the hub is in the same release.
    async fn addresses(
        &self,
        hub: &Hub,
        management: &Target,
        client: &Client,
    ) -> anyhow::Result<(Vec<String>, Vec<String>)> {
        let place = &hub.place;
        let is_shared = cluster_id(client).await? == cluster_id(&hub.client).await?;
        if !is_shared {
            let given = self.hub.iter().map(|it| ("--hub", it)).chain(self.join.iter().map(|it| ("--join", it)));
            for (option, address) in given {
                if let Some(service) = unresolved(client, address, None).await? {
                    bail!(
                        "{option} {address}: only the cluster of the hub resolves this name, and the cluster of {} has no {service}: give an \
                         address that its pods reach",
                        self.target.title()
                    );
                }
            }
            hub.check_announced(client, management).await?;
        }
        if !self.hub.is_empty() {
            return Ok((self.hub.clone(), self.join.clone()));
        }
        let Some(service) = hub_service(&hub.client, place).await? else {
            bail!(
                "no hub in namespace {} of {} (release {}): install one with `hanse install`, or name it with --hub-context, \
                 --hub-namespace and --hub-release",
                place.namespace,
                management.title(),
                place.release
            );
        };
        if is_shared {
            let own = &self.settings.place;
            if (&own.namespace, &own.release) == (&place.namespace, &place.release) {
                return Ok((Vec::new(), Vec::new()));
            }
            let host = format!("{}.{}.svc", service.name_any(), place.namespace);
            return Ok((vec![format!("{host}:7443")], vec![format!("{host}:7444")]));
        }
        let name = format!("{}/{}", place.namespace, service.name_any());
        if !is_balanced(&service) {
            bail!(
                "the hub's Service {name} has no address for other clusters: set the value hub.service.type=LoadBalancer of the \
                 hub's release, or give --hub and --join"
            );
        }
        let host = until(self.settings.timeout(), &format!("wait for an address of Service {name}"), async || {
            let service = hub_service(&hub.client, place).await?;
            Ok(service
                .as_ref()
                .and_then(outside_host)
                .ok_or_else(|| format!("Service {name} has no load balancer yet")))
        })
        .await?;
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        Ok((vec![format!("{host}:7443")], vec![format!("{host}:7444")]))
    }

    /// Brings a join token from the management cluster into a Secret of the cluster. It is in no argument, and in no file.
    async fn give_token(&self, hub: &Hub, client: &Client) -> anyhow::Result<()> {
        let token = hub.token(&self.cluster, &self.settings).await?;
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": JOIN_SECRET, "labels": {CREATED.0: CREATED.1}},
            "data": {TOKEN: token},
        });
        let api: Api<Secret> = Api::namespaced(client.clone(), &self.settings.place.namespace);
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        answered(api.patch(JOIN_SECRET, &parameters, &Patch::Apply(&secret)))
            .await
            .with_context(|| format!("write Secret {JOIN_SECRET}"))?;
        output::note(format_args!("join token of cluster {} given to the cluster", self.cluster));
        Ok(())
    }
}

impl Hub {
    /// Whether the cluster takes part in the ClusterSet.
    async fn has(&self, cluster: &str) -> anyhow::Result<bool> {
        let api = custom_resources(&self.client, "MemberCluster", "memberclusters");
        let found = answered(api.get_opt(cluster)).await.with_context(|| format!("read MemberCluster {cluster}"))?;
        let Some(found) = found else { return Ok(false) };
        if found.data["spec"]["acceptance"] == "Revoked" {
            bail!("MemberCluster {cluster} has the acceptance Revoked: set it to Accepted, or delete the object");
        }
        Ok(found.data["status"]["certificateExpirationTime"].is_string())
    }

    /// Replicas of the hub announce addresses that the cluster can resolve: members leave the first address for them.
    async fn check_announced(&self, client: &Client, management: &Target) -> anyhow::Result<()> {
        let (api, name): (Api<StatefulSet>, _) =
            (Api::namespaced(self.client.clone(), &self.place.namespace), format!("{}-hub", name_of(&self.place)));
        let hub = answered(api.get_opt(&name)).await.with_context(|| format!("read StatefulSet {name} of the hub"))?;
        let pod = hub.and_then(|it| it.spec).and_then(|it| it.template.spec).unwrap_or_default();
        let mut arguments = pod.containers.iter().flat_map(|it| it.args.iter().flatten());
        let Some(announced) = arguments.find_map(|it| it.strip_prefix("--advertise=")) else { return Ok(()) };
        let Some(service) = unresolved(client, announced, Some(&format!("{name}-0"))).await? else { return Ok(()) };
        bail!(
            "the replicas of the hub announce {announced}, a name that only the cluster of {} resolves, and this cluster has no {service}: \
             give each Service {name}-NUMBER a name that other clusters resolve, and set the value hub.advertise of the hub's release to \
             it, for example `hanse install --set 'hub.advertise=$(POD_NAME).hub.example:7443'`",
            management.title()
        );
    }

    /// A token of the cluster that was not used, in base64: that of its ClusterJoinToken, which is created if needed.
    async fn token(&self, cluster: &str, settings: &Settings) -> anyhow::Result<Value> {
        let api = custom_resources(&self.client, "ClusterJoinToken", "clusterjointokens");
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.place.namespace);
        let doing = || format!("create ClusterJoinToken {cluster}");
        let before = answered(api.get_opt(cluster)).await.with_context(doing)?;
        if let Some(before) = &before {
            let of = before.data["spec"]["cluster"].as_str().unwrap_or_default();
            if of != cluster {
                bail!("ClusterJoinToken {cluster} is for another cluster, {of}: delete it, or name it differently");
            }
            let ended =
                ["Used", "Expired"].into_iter().any(|kind| condition(before, kind).is_some_and(|it| it.0 == "True"));
            let is_issued = condition(before, "Issued").is_some_and(|it| it.0 == "True");
            let has_secret = match before.data["spec"]["secretName"].as_str() {
                Some(secret) if is_issued => answered(secrets.get_opt(secret)).await.with_context(doing)?.is_some(),
                _ => true,
            };
            if ended || !has_secret || before.metadata.deletion_timestamp.is_some() {
                let note = "was used, has expired, or has no Secret any more: it is replaced";
                output::note(format_args!("ClusterJoinToken {cluster} {note}"));
                self.delete_token(before, settings).await?;
            }
        }
        let token = match answered(api.get_opt(cluster)).await.with_context(doing)? {
            Some(token) => token,
            None => {
                let token = json!({
                    "apiVersion": hanse_api::hanse::API_VERSION, "kind": "ClusterJoinToken",
                    "metadata": {"name": cluster, "labels": {CREATED.0: CREATED.1}},
                    "spec": {"cluster": cluster, "secretName": format!("{cluster}-join"), "accept": true},
                });
                let (parameters, patch) = (PatchParams::apply(FIELD_MANAGER), Patch::Apply(&token));
                answered(api.patch(cluster, &parameters, &patch)).await.with_context(doing)?
            }
        };
        until(settings.timeout(), &format!("wait for the token of ClusterJoinToken {cluster}"), async || {
            let token = answered(api.get(cluster)).await?;
            Ok(match condition(&token, "Issued") {
                Some(("True", _)) => Ok(()),
                Some((_, why)) => Err(why.to_owned()),
                None => Err("the hub's operator has not seen it yet".to_owned()),
            })
        })
        .await?;
        let secret = token.data["spec"]["secretName"].as_str().unwrap_or_default();
        let reading = || format!("read Secret {secret} of namespace {}", self.place.namespace);
        let secret = answered(secrets.get(secret)).await.with_context(reading)?;
        let token = secret.data.unwrap_or_default().remove(TOKEN).context("it has no token").with_context(reading)?;
        serde_json::to_value(token).context("write the token")
    }

    /// Deletes a ClusterJoinToken and its Secret. Another one of the same name stays.
    async fn delete_token(&self, token: &DynamicObject, settings: &Settings) -> anyhow::Result<()> {
        let (api, name) = (custom_resources(&self.client, "ClusterJoinToken", "clusterjointokens"), token.name_any());
        let doing = || format!("delete ClusterJoinToken {name}");
        let deleted = answered(async { Ok(api.delete(&name, &DeleteParams::default()).await) }).await?;
        deleted.map(drop).or_else(ignore_missing).with_context(doing)?;
        until(settings.timeout(), &doing(), async || {
            let now = answered(api.get_opt(&name)).await?;
            Ok(match now.filter(|it| it.metadata.uid == token.metadata.uid) {
                None => Ok(()),
                Some(_) => Err("the hub's operator has not deleted it yet".to_owned()),
            })
        })
        .await?;
        // The API server deletes it only after a while.
        if let Some(secret) = token.data["spec"]["secretName"].as_str() {
            let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.place.namespace);
            delete_token_secret(&secrets, secret, token).await?;
        }
        Ok(())
    }

    /// Deletes the ClusterJoinToken, if this command created it: it was used.
    async fn remove_token(&self, cluster: &str) -> anyhow::Result<()> {
        let api = custom_resources(&self.client, "ClusterJoinToken", "clusterjointokens");
        let found = answered(api.get_opt(cluster)).await.with_context(|| format!("read ClusterJoinToken {cluster}"))?;
        if found.is_some_and(|it| it.labels().get(CREATED.0).is_some_and(|by| by == CREATED.1)) {
            answered(api.delete(cluster, &DeleteParams::default()))
                .await
                .with_context(|| format!("delete ClusterJoinToken {cluster}"))?;
        }
        Ok(())
    }

    /// Waits until the hub receives the data of the cluster.
    async fn connected(&self, cluster: &str, settings: &Settings) -> anyhow::Result<()> {
        let api = custom_resources(&self.client, "MemberCluster", "memberclusters");
        until(settings.timeout(), &format!("wait until cluster {cluster} is connected"), async || {
            let Some(found) = answered(api.get_opt(cluster)).await? else {
                return Ok(Err("the hub does not know the cluster yet".to_owned()));
            };
            Ok(match condition(&found, "Connected") {
                Some(("True", _)) => Ok(()),
                Some((_, why)) => Err(why.to_owned()),
                None => Err("the hub's operator has not seen it yet".to_owned()),
            })
        })
        .await
    }

    async fn note_grants(&self, cluster: &str) -> anyhow::Result<()> {
        let api = custom_resources(&self.client, "MemberCluster", "memberclusters");
        let found = answered(api.get_opt(cluster)).await.with_context(|| format!("read MemberCluster {cluster}"))?;
        if found.is_some_and(|it| it.data["spec"]["grants"]["namespaces"].as_array().is_none_or(Vec::is_empty)) {
            output::note(format_args!(
                "it exports nothing: `spec.grants` of MemberCluster {cluster} has no namespaces; rules of other clusters match none \
                 of its pods"
            ));
        }
        Ok(())
    }
}

/// The Service that an address HOST:PORT names, if the cluster has none of this name. `pod` is the name of a pod of the hub.
async fn unresolved(client: &Client, address: &str, pod: Option<&str>) -> anyhow::Result<Option<String>> {
    let address = address.replace("$(POD_NAME)", pod.unwrap_or_default());
    let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
    let Some((name, namespace)) = service_of(host) else { return Ok(None) };
    let title = format!("Service {namespace}/{name}");
    // A Service of the same name may lead to the hub, for example in a cluster mesh.
    let api: Api<Service> = Api::namespaced(client.clone(), namespace);
    let found = answered(api.get_opt(name)).await.with_context(|| format!("look for {title}"))?;
    Ok(found.is_none().then_some(title))
}

/// The nodes on which a member can run.
async fn nodes(client: &Client) -> anyhow::Result<usize> {
    let api: Api<Node> = Api::all(client.clone());
    let parameters = ListParams::default().labels("kubernetes.io/os=linux");
    let nodes = answered(api.list(&parameters)).await.context("list nodes")?;
    let keeps_out = |taint: &Taint| {
        matches!(&*taint.effect, "NoSchedule" | "NoExecute") && taint.key != "hanse.dev/agent-not-ready"
    };
    let runs_pods = |node: &Node| {
        let spec = node.spec.as_ref();
        !spec.is_some_and(|it| it.unschedulable == Some(true) || it.taints.iter().flatten().any(keeps_out))
    };
    Ok(nodes.items.iter().filter(|it| runs_pods(it)).count())
}

/// Identifies a cluster, whatever its addresses are.
async fn cluster_id(client: &Client) -> anyhow::Result<Option<String>> {
    let api: Api<Namespace> = Api::all(client.clone());
    let namespace = answered(api.get("kube-system")).await.context("read the namespace kube-system")?;
    Ok(namespace.metadata.uid)
}
