//! A cluster whose pods run the project's programs, and the workloads whose packets are judged.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_e2e::fabric::Fabric;
use hanse_e2e::kubernetes::kubelet::Programs;
use hanse_e2e::kubernetes::services::Services;
use hanse_e2e::kubernetes::{ApiServer, Controllers, Etcd, Kubelet, Options, kubelet, manifests, until};
use hanse_e2e::namespace::Namespace;
use hanse_e2e::probe::{self, Observed};
use hanse_e2e::world::{Cluster, Node};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};

use super::nodes::{PATIENCE, addresses, is_ready};

const PORT: u16 = 8080;

/// Two pods that serve, one on each node, and one that connects to them.
pub const WORKLOADS: &str = "apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: web}}}
      containers: [{name: web, image: web, ports: [{name: http, containerPort: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: default, labels: {app: client}}
spec:
  nodeName: b
  containers: [{name: client, image: client, ports: [{containerPort: 8080}]}]
";

pub fn node(name: &str, number: u8) -> Node {
    Node {
        name: name.to_owned(),
        addresses: vec![[172, 20, 0, number].into()],
        pod_ranges: vec![format!("10.20.{number}.0/24").parse().expect("a range")],
    }
}

pub fn world() -> Cluster {
    Cluster {
        name: "east".to_owned(),
        directory: PathBuf::new(),
        nodes: vec![node("a", 1), node("b", 2)],
        pods: Vec::new(),
    }
}

/// A cluster whose pods run.
pub struct East {
    pub server: ApiServer,
    pub client: kube::Client,
    pub kubelets: BTreeMap<String, Kubelet>,
    pub programs: Programs,
    pub scratch: PathBuf,
    networks: Vec<Arc<Namespace>>,
    services: Option<Services>,
    _controllers: Controllers,
}

impl East {
    pub async fn start(world: &Cluster, fabric: &Fabric, scratch: &Path) -> Self {
        let etcd = Etcd::start().expect("etcd starts");
        // Where every node reaches the router. It reaches the pods of a webhook, and no Services.
        let options = Options::new(&world.name).listen([169, 254, 2, 1].into());
        let options = options.argument("--enable-aggregator-routing=true");
        let server = ApiServer::start(&etcd, options).await.expect("it is ready");
        let mut controllers = Controllers::start(&server).await.expect("they work");
        controllers.start_scheduler(&server).expect("it starts");
        let client = server.client().await.expect("a client");
        let programs = Programs::new(&crate::system::programs(), scratch);
        let mut east = Self {
            server,
            client,
            kubelets: BTreeMap::new(),
            programs,
            scratch: scratch.to_owned(),
            networks: Vec::new(),
            services: None,
            _controllers: controllers,
        };
        for node in &world.nodes {
            east.add(fabric, node).await;
        }
        east
    }

    /// Starts a node of the fabric.
    pub async fn add(&mut self, fabric: &Fabric, node: &Node) {
        let network = fabric.shared_node(self.server.name(), &node.name).expect("it is built");
        // What a kube-proxy does on every node.
        self.networks.push(Arc::clone(&network));
        self.services = None;
        self.services = Some(Services::start(&self.server, self.networks.clone()).expect("they start"));
        let workload = Arc::new(self.programs.clone());
        let kubelet = Kubelet::start_with(&self.server, network, node.into(), workload).await;
        self.kubelets.insert(node.name.clone(), kubelet.expect("it registers"));
    }

    pub async fn apply(&self, text: &str) {
        manifests::apply(&self.client, "test", text).await.expect("it is applied");
    }

    pub fn pods(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub async fn ready(&self, namespace: &str, label: &str, count: usize) -> Vec<Pod> {
        let mut pods = Vec::new();
        let all = until(PATIENCE, async || {
            let listed = self.pods(namespace).list(&ListParams::default().labels(label)).await;
            pods = listed.expect("a list").items;
            pods.len() == count && pods.iter().all(is_ready)
        });
        assert!(all.await.is_some(), "{count} pods with {label} are ready: {pods:#?}\n{}", self.logs());
        pods
    }

    /// The end of every log.
    pub fn logs(&self) -> String {
        let mut logs = String::new();
        for file in std::fs::read_dir(self.scratch.join("logs")).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(file.path()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            logs.push_str(&format!(
                "{}:\n{}\n",
                file.path().display(),
                lines[lines.len().saturating_sub(12)..].join("\n")
            ));
        }
        logs
    }

    pub fn network(&self, pod: &Pod) -> Arc<Namespace> {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).expect("it is bound");
        let (namespace, name) = (pod.metadata.namespace.as_deref(), pod.metadata.name.as_deref());
        self.kubelets[node].pod(namespace.expect("a namespace"), name.expect("a name")).expect("it runs")
    }

    pub fn observe(&self, from: &Pod, to: &Pod) -> Observed {
        let title = kubelet::title("east", "default", to.metadata.name.as_deref().expect("a name"));
        probe::tcp(&self.network(from), SocketAddr::new(addresses(to)[0], PORT), &title)
    }

    /// Waits until packets from one pod to all others are judged so. Returns how long that took.
    pub async fn until_observed(&self, from: &Pod, to: &[Pod], expected: Observed) -> Duration {
        let start = Instant::now();
        let is = until(PATIENCE, async || to.iter().all(|to| self.observe(from, to) == expected)).await;
        assert!(is.is_some(), "packets are {expected:?}: {}", self.logs());
        start.elapsed()
    }
}
