//! A cluster whose pods run: an API server with its controllers and scheduler, and simulated nodes in a [`fabric`](crate::fabric).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};

use super::kubelet::{Programs, title};
use super::services::Services;
use super::{ApiServer, Controllers, Etcd, Kubelet, Options, manifests, until};
use crate::fabric::Fabric;
use crate::namespace::Namespace;
use crate::probe::{self, Observed};
use crate::world;

/// How long pods may take to be ready.
const PATIENCE: Duration = Duration::from_secs(90);
/// How many of the last lines of each log an error contains.
const LOG_LINES: usize = 12;

/// A running cluster; dropped, all of it ends.
pub struct Cluster {
    /// Nodes end before their API server, whose end they would report.
    kubelets: BTreeMap<String, Kubelet>,
    _services: Services,
    pub server: ApiServer,
    /// Of the administrator.
    pub client: kube::Client,
    scratch: PathBuf,
    _controllers: Controllers,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("name", &self.name()).finish_non_exhaustive()
    }
}

impl Cluster {
    /// Starts the control plane at `address`, which every node reaches, in the network namespace of the caller, and the nodes of
    /// `world` in theirs. Containers whose image is the name of a program in `programs` run it; the others answer on their ports.
    /// `scratch` is a folder for logs, volumes and the files of nodes, which every user must be able to enter.
    ///
    /// # Errors
    /// When a program is missing or not ready in time, or a node of `world` is not in the fabric.
    pub async fn start(
        etcd: &Arc<Etcd>,
        address: IpAddr,
        world: &world::Cluster,
        fabric: &Fabric,
        programs: &Path,
        scratch: &Path,
    ) -> anyhow::Result<Self> {
        let server = ApiServer::start(etcd, Options::new(&world.name).listen(address)).await?;
        let mut controllers = Controllers::start(&server).await?;
        controllers.start_scheduler(&server)?;
        let client = server.client().await?;
        let (mut kubelets, mut networks) = (BTreeMap::new(), Vec::new());
        for node in &world.nodes {
            let network = fabric.shared_node(&world.name, &node.name);
            let network = network.with_context(|| format!("node {} is not in the fabric", node.name))?;
            networks.push(Arc::clone(&network));
            let workload = Arc::new(Programs::new(programs, scratch));
            let kubelet = Kubelet::start_with(&server, network, node.into(), workload).await?;
            kubelets.insert(node.name.clone(), kubelet);
        }
        let services = Services::start(&server, networks)?;
        Ok(Self {
            kubelets,
            _services: services,
            server,
            client,
            scratch: scratch.to_owned(),
            _controllers: controllers,
        })
    }

    pub fn name(&self) -> &str {
        self.server.name()
    }

    /// Applies manifests, as [`manifests::apply`].
    ///
    /// # Errors
    /// When the server refuses one.
    pub async fn apply(&self, text: &str) -> anyhow::Result<()> {
        manifests::apply(&self.client, "e2e", text).await.map(drop)
    }

    /// Waits until exactly `count` pods have the label, and all of them are ready.
    ///
    /// # Errors
    /// When they are not in time; the error contains the end of the logs.
    pub async fn ready(&self, namespace: &str, label: &str, count: usize) -> anyhow::Result<Vec<Endpoint>> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let mut pods = Vec::new();
        let all = until(PATIENCE, async || {
            pods = api.list(&ListParams::default().labels(label)).await.map(|it| it.items).unwrap_or_default();
            pods.len() == count && pods.iter().all(is_ready)
        });
        if all.await.is_none() {
            let names: Vec<_> = pods.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect();
            bail!("{}: not {count} ready pods with {label}, but {names:?}\n{}", self.name(), self.logs());
        }
        pods.iter().map(|pod| self.endpoint(pod)).collect()
    }

    /// The pods that run in networks of their own, by namespace and name. Those that are being deleted are left out.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn endpoints(&self) -> anyhow::Result<Vec<Endpoint>> {
        let pods = Api::<Pod>::all(self.client.clone()).list(&ListParams::default()).await.context("list pods")?;
        let is_own = |pod: &&Pod| {
            let on_host = pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true));
            !on_host && pod.metadata.deletion_timestamp.is_none()
        };
        pods.items.iter().filter(is_own).map(|pod| self.endpoint(pod)).collect()
    }

    /// Where a pod of this cluster runs.
    ///
    /// # Errors
    /// When it does not run.
    pub fn endpoint(&self, pod: &Pod) -> anyhow::Result<Endpoint> {
        let (metadata, spec) = (&pod.metadata, pod.spec.as_ref().context("a pod has a spec")?);
        let namespace = metadata.namespace.clone().context("a pod has a namespace")?;
        let name = metadata.name.clone().context("a pod has a name")?;
        let node = spec.node_name.clone().with_context(|| format!("pod {name} has no node"))?;
        let kubelet = self.kubelets.get(&node).with_context(|| format!("node {node} does not exist"))?;
        let network = kubelet.pod(&namespace, &name).with_context(|| format!("pod {name} does not run"))?;
        let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
        let addresses = ips.map(|ip| ip.ip.parse()).collect::<Result<_, _>>().context("read the addresses of a pod")?;
        let ports = spec.containers.iter().flat_map(|it| it.ports.iter().flatten());
        let port = ports.map(|port| port.container_port).next().and_then(|port| u16::try_from(port).ok());
        let port = port.unwrap_or_default();
        let cluster = self.name().to_owned();
        Ok(Endpoint { pod: world::Pod { cluster, namespace, name, node, addresses, port }, network })
    }

    /// The end of the logs of all programs that pods run.
    pub fn logs(&self) -> String {
        let mut logs = String::new();
        for file in std::fs::read_dir(self.scratch.join("logs")).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(file.path()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let end = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
            logs.push_str(&format!("{}:\n{end}\n", file.path().display()));
        }
        logs
    }
}

/// A pod that runs, and its network namespace.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub pod: world::Pod,
    pub network: Arc<Namespace>,
}

impl Endpoint {
    /// What the pod answers.
    pub fn title(&self) -> String {
        title(&self.pod.cluster, &self.pod.namespace, &self.pod.name)
    }

    /// Opens a TCP connection to the first port of another pod, over the family of its first address.
    pub fn observe(&self, to: &Self) -> Observed {
        probe::tcp(&self.network, to.address(0), &to.title())
    }

    /// An address of the pod with its port.
    pub fn address(&self, family: usize) -> SocketAddr {
        SocketAddr::new(self.pod.addresses[family], self.pod.port)
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|it| it.type_ == "Ready" && it.status == "True")
}
