//! Nodes and pods of the test clusters: what `kubectl apply` says becomes packets.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_e2e::fabric::Fabric;
use hanse_e2e::kubernetes::{ApiServer, Controllers, Etcd, Kubelet, Options, kubelet, manifests, run, until};
use hanse_e2e::namespace::{self, Namespace};
use hanse_e2e::probe::{self, Observed};
use hanse_e2e::sandbox;
use hanse_e2e::world::{Cluster, Node};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node as NodeObject, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;

pub const PATIENCE: Duration = Duration::from_secs(60);
const PORT: u16 = 8080;

const WEB: &str = "apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: web}}}
      containers:
      - {name: web, image: web, ports: [{name: http, containerPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  ports: [{port: 80, targetPort: http}]
";

fn world() -> Cluster {
    let node = |name: &str, number: u8| Node {
        name: name.to_owned(),
        addresses: vec![[172, 20, 0, number].into(), format!("fd20::{number}").parse().expect("an address")],
        pod_ranges: vec![
            format!("10.20.{number}.0/24").parse().expect("a range"),
            format!("fd20:{number}::/64").parse().expect("a range"),
        ],
    };
    Cluster {
        name: "east".to_owned(),
        directory: PathBuf::new(),
        nodes: vec![node("a", 1), node("b", 2)],
        pods: Vec::new(),
    }
}

/// A cluster with a node for each of the world, all in one thread's network namespace but for the nodes' networks.
pub struct East {
    pub kubelets: BTreeMap<String, Kubelet>,
    pub pods: Api<Pod>,
    client: kube::Client,
    _controllers: Controllers,
    pub server: ApiServer,
}

impl East {
    async fn start(world: &Cluster, fabric: &Fabric) -> Self {
        let etcd = Etcd::start().expect("etcd starts");
        let server = ApiServer::start(&etcd, Options::new(&world.name)).await.expect("it is ready");
        let mut controllers = Controllers::start(&server).await.expect("they work");
        controllers.start_scheduler(&server).expect("it starts");
        let client = server.client().await.expect("a client");
        let pods = Api::default_namespaced(client.clone());
        let mut east = Self { kubelets: BTreeMap::new(), pods, client, _controllers: controllers, server };
        for node in &world.nodes {
            east.start_node(node, fabric).await;
        }
        east
    }

    async fn start_node(&mut self, node: &Node, fabric: &Fabric) {
        let network = fabric.shared_node(self.server.name(), &node.name).expect("it is built");
        let kubelet = Kubelet::start(&self.server, network, node.into()).await.expect("it registers");
        self.kubelets.insert(node.name.clone(), kubelet);
    }

    pub async fn apply(&self, text: &str) {
        manifests::apply(&self.client, "test", text).await.expect("it is applied");
    }

    async fn list(&self, label: &str) -> Vec<Pod> {
        self.pods.list(&ListParams::default().labels(label)).await.expect("a list").items
    }

    /// The pods with a label, when there are as many and all of them are ready.
    async fn ready(&self, label: &str, count: usize) -> Vec<Pod> {
        let mut pods = Vec::new();
        let all = until(PATIENCE, async || {
            pods = self.list(label).await;
            pods.len() == count && pods.iter().all(is_ready)
        });
        assert!(all.await.is_some(), "{count} pods with {label} are ready: {pods:#?}");
        pods
    }

    fn network(&self, pod: &Pod) -> Arc<Namespace> {
        let name = pod.metadata.name.as_deref().expect("a name");
        self.kubelets[node_of(pod)].pod("default", name).expect("it runs")
    }

    async fn slices(&self, service: &str) -> Vec<EndpointSlice> {
        let slices: Api<EndpointSlice> = Api::default_namespaced(self.client.clone());
        let of = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
        slices.list(&of).await.expect("a list").items
    }
}

pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|it| it.type_ == "Ready" && it.status == "True")
}

fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).expect("it is bound")
}

pub fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let ips = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref());
    ips.into_iter().flatten().map(|ip| ip.ip.parse().expect("an address")).collect()
}

fn title(pod: &Pod) -> String {
    kubelet::title("east", "default", pod.metadata.name.as_deref().expect("a name"))
}

/// Address, node, readiness and serving of every endpoint.
fn endpoints(slices: &[EndpointSlice]) -> BTreeSet<(IpAddr, String, bool, bool)> {
    let all = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
    all.map(|it| {
        let conditions = it.conditions.as_ref();
        (
            it.addresses[0].parse().expect("an address"),
            it.node_name.clone().unwrap_or_default(),
            conditions.and_then(|it| it.ready) == Some(true),
            conditions.and_then(|it| it.serving) == Some(true),
        )
    })
    .collect()
}

fn test(name: &str, body: impl AsyncFnOnce(&Cluster, &Fabric, &mut East) + Send) {
    test_with(&format!("nodes::{name}"), Vec::new(), body);
}

/// With further nodes in the network, which `body` starts.
pub fn test_with(name: &str, more: Vec<Node>, body: impl AsyncFnOnce(&Cluster, &Fabric, &mut East) + Send) {
    sandbox::test(&format!("clusters::{name}"), || {
        let world = world();
        let mut fabric = Fabric::build(std::slice::from_ref(&world)).expect("the network");
        for node in &more {
            fabric.add_node(&world.name, node).expect("the node's network");
        }
        let empty = namespace::list().expect("names").len();
        fabric.router().enter(|| {
            run(async {
                let mut east = East::start(&world, &fabric).await;
                body(&world, &fabric, &mut east).await;
            });
        });
        assert_eq!(namespace::list().expect("names").len(), empty, "nodes that end leave no pods behind");
    });
}

#[test]
fn an_applied_deployment_ends_in_packets() {
    test("an_applied_deployment_ends_in_packets", async |world, fabric, east| {
        let (start, nodes_only) = (Instant::now(), namespace::list().expect("names").len());
        east.apply(WEB).await;
        let pods = east.ready("app=web", 3).await;
        println!("3 pods were ready after {:?}", start.elapsed());
        assert_eq!(pods.iter().map(node_of).collect::<BTreeSet<_>>().len(), 2, "both nodes have some");
        for pod in &pods {
            let node = world.nodes.iter().find(|it| it.name == node_of(pod)).expect("a node of the world");
            let of_node = addresses(pod).iter().zip(&node.pod_ranges).filter(|(ip, range)| range.contains(*ip)).count();
            assert_eq!(of_node, 2, "{pod:#?}");
            let status = pod.status.as_ref().expect("a status");
            assert_eq!(status.host_ip.as_deref(), Some(node.addresses[0].to_string().as_str()));
            assert_eq!(status.phase.as_deref(), Some("Running"));
        }
        for from in &pods {
            for to in pods.iter().filter(|to| to.metadata.name != from.metadata.name) {
                for address in addresses(to) {
                    let to_pod = SocketAddr::new(address, PORT);
                    let is_open = || probe::tcp(&east.network(from), to_pod, &title(to)) == Observed::Open;
                    assert!(until(PATIENCE, async || is_open()).await.is_some(), "{} to {address}", title(from));
                }
            }
        }

        // The endpoints are those of the pods.
        let expected = |pods: &[Pod]| -> BTreeSet<_> {
            let of =
                |pod: &Pod| addresses(pod).into_iter().map(|ip| (ip, node_of(pod).to_owned(), true, true)).collect();
            pods.iter().flat_map(|pod| -> Vec<_> { of(pod) }).collect()
        };
        let right = until(PATIENCE, async || endpoints(&east.slices("web").await) == expected(&pods)).await;
        assert!(right.is_some(), "{:#?}", east.slices("web").await);

        // Two of three go, with their namespaces.
        let deployments: Api<k8s_openapi::api::apps::v1::Deployment> = Api::default_namespaced(east.client.clone());
        let scale = Patch::Merge(json!({ "spec": { "replicas": 1 } }));
        deployments.patch("web", &PatchParams::default(), &scale).await.expect("it is scaled");
        let one = until(PATIENCE, async || east.list("app=web").await.len() == 1).await;
        println!("2 pods were gone after {:?}", one.expect("one is left"));
        let left = east.ready("app=web", 1).await;
        assert_eq!(namespace::list().expect("names").len(), nodes_only + 1);
        let gone = pods.iter().find(|pod| pod.metadata.uid != left[0].metadata.uid).expect("two are gone");
        let to = SocketAddr::new(addresses(gone)[0], PORT);
        assert_eq!(probe::tcp(&east.network(&left[0]), to, &title(gone)), Observed::Closed);
        let right = until(PATIENCE, async || endpoints(&east.slices("web").await) == expected(&left)).await;
        assert!(right.is_some(), "{:#?}", east.slices("web").await);

        // Without the server pods go on; when it is back, so do controllers and nodes.
        let to = SocketAddr::new(addresses(&left[0])[0], PORT);
        east.server.kill().expect("it is killed");
        assert_eq!(probe::tcp(fabric.router(), to, &title(&left[0])), Observed::Open);
        east.server.start_again().await.expect("it is ready again");
        let scale = Patch::Merge(json!({ "spec": { "replicas": 2 } }));
        deployments.patch("web", &PatchParams::default(), &scale).await.expect("it is scaled");
        let start = Instant::now();
        let both = east.ready("app=web", 2).await;
        println!("a pod was ready {:?} after the server was back", start.elapsed());
        assert!(both.iter().any(|pod| pod.metadata.uid == left[0].metadata.uid), "the first pod was kept");
    });
}

#[test]
fn pods_live_and_end_as_their_specs_say() {
    test("pods_live_and_end_as_their_specs_say", async |world, fabric, east| {
        let text = format!(
            "{WEB}---
apiVersion: v1
kind: Pod
metadata:
  name: slow
  labels: {{app: slow}}
  annotations: {{{stop}: '600'}}
spec:
  terminationGracePeriodSeconds: 600
  containers: [{{name: c, image: c, ports: [{{containerPort: 8080}}]}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: host, labels: {{app: host}}}}
spec:
  hostNetwork: true
  nodeName: a
  containers: [{{name: c, image: c, ports: [{{containerPort: 9100}}]}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: again, labels: {{app: again}}, annotations: {{{run}: '0.5'}}}}
spec:
  containers: [{{name: c, image: c}}]
---
apiVersion: batch/v1
kind: Job
metadata: {{name: job}}
spec:
  template:
    metadata: {{labels: {{app: job}}, annotations: {{{run}: '0.2'}}}}
    spec:
      restartPolicy: Never
      containers: [{{name: c, image: c}}]
",
            stop = kubelet::STOP_SECONDS,
            run = kubelet::RUN_SECONDS,
        )
        .replace(
            "metadata: {name: web}\nspec:\n  selector: {app: web}",
            "metadata: {name: web}\nspec:\n  selector: {app: slow}",
        );
        east.apply(&text).await;
        let web = east.ready("app=web", 3).await;

        // A pod on the node's network has the node's addresses, and no namespace of its own.
        let host = &east.ready("app=host", 1).await[0];
        assert_eq!(addresses(host), world.nodes[0].addresses);
        let to = SocketAddr::new(addresses(host)[0], 9100);
        assert_eq!(probe::tcp(&east.network(&web[0]), to, &title(host)), Observed::Open);

        // The job's pod ends by itself, and its network goes.
        let done = async |label: &str, phase: &str| {
            let pods = east.list(label).await;
            pods.len() == 1 && pods[0].status.as_ref().is_some_and(|it| it.phase.as_deref() == Some(phase))
        };
        assert!(until(PATIENCE, async || done("app=job", "Succeeded").await).await.is_some());
        let job = east.list("app=job").await[0].metadata.name.clone().expect("a name");
        let gone = until(PATIENCE, async || east.kubelets.values().all(|it| it.pod("default", &job).is_none())).await;
        assert!(gone.is_some(), "the job's network is removed");

        // A pod that shall run for ever starts again, with the same addresses.
        let again = async || east.list("app=again").await.remove(0);
        let restarts = |pod: &Pod| {
            let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
            statuses.and_then(|it| it.first()).map_or(0, |it| it.restart_count)
        };
        let before = again().await;
        assert!(until(PATIENCE, async || restarts(&again().await) >= 2).await.is_some(), "{:#?}", again().await);
        assert_eq!(addresses(&again().await), addresses(&before));

        // One that needs time to end serves until then, and its endpoint says so. A shorter grace period ends it.
        let slow = &east.ready("app=slow", 1).await[0];
        east.pods.delete("slow", &DeleteParams::default()).await.expect("it is deleted");
        let ending = until(PATIENCE, async || {
            let endpoints = endpoints(&east.slices("web").await);
            endpoints.len() == 2 && endpoints.iter().all(|(.., ready, serving)| !ready && *serving)
        });
        assert!(ending.await.is_some(), "{:#?}", east.slices("web").await);
        let to = SocketAddr::new(addresses(slow)[0], PORT);
        assert_eq!(probe::tcp(&east.network(&web[0]), to, &title(slow)), Observed::Open);
        let shorter = DeleteParams { grace_period_seconds: Some(1), ..DeleteParams::default() };
        east.pods.delete("slow", &shorter).await.expect("it is deleted");
        let gone = until(PATIENCE, async || east.pods.get_opt("slow").await.is_ok_and(|it| it.is_none())).await;
        assert!(gone.is_some(), "the pod goes when its grace period is over");
        assert_eq!(probe::tcp(&east.network(&web[0]), to, &title(slow)), Observed::Closed);

        // A node that starts again adopts its pods, with their addresses; what was deleted meanwhile is gone.
        let on_a: Vec<&Pod> = web.iter().filter(|pod| node_of(pod) == "a").collect();
        drop(east.kubelets.remove("a"));
        let to = SocketAddr::new(addresses(on_a[0])[0], PORT);
        assert_eq!(probe::tcp(fabric.router(), to, &title(on_a[0])), Observed::Closed);
        east.start_node(&world.nodes[0], fabric).await;
        let back = until(PATIENCE, async || probe::tcp(fabric.router(), to, &title(on_a[0])) == Observed::Open).await;
        assert!(back.is_some(), "the pod answers again");

        // Nodes are what the server's own controllers take for nodes that live.
        let nodes: Api<NodeObject> = Api::all(east.client.clone());
        for node in nodes.list(&ListParams::default()).await.expect("a list") {
            assert_eq!(node.spec.and_then(|spec| spec.taints), None, "the node is ready");
        }
        let leases: Api<Lease> = Api::namespaced(east.client.clone(), "kube-node-lease");
        assert_eq!(leases.list(&ListParams::default()).await.expect("a list").items.len(), 2);
    });
}
