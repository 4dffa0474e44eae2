//! What the containers of a simulated pod do.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::FutureExt as _;
use futures::future::{self, LocalBoxFuture};
use k8s_openapi::api::core::v1::Pod;

use crate::namespace::Namespace;
use crate::probe::Listener;

/// An annotation: the pod's containers end by themselves, with success, after this number of seconds.
pub const RUN_SECONDS: &str = "e2e.hanse.dev/run-seconds";
/// An annotation: the pod's containers go on for this number of seconds when they are requested to stop.
pub const STOP_SECONDS: &str = "e2e.hanse.dev/stop-seconds";

/// A pod whose network is ready.
pub struct Start<'a> {
    pub cluster: &'a str,
    pub node: &'a str,
    pub pod: &'a Pod,
    /// The pod's, which is the node's for a pod with `hostNetwork`.
    pub network: &'a Arc<Namespace>,
    pub node_network: &'a Arc<Namespace>,
    pub addresses: &'a [IpAddr],
    /// The node's own.
    pub node_addresses: &'a [IpAddr],
    /// How often the containers were started before.
    pub restarts: i32,
    /// With the rights of the node.
    pub client: &'a kube::Client,
    /// Where pods reach the API server.
    pub server: SocketAddr,
}

impl std::fmt::Debug for Start<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (pod, addresses) = (&self.pod.metadata.name, self.addresses);
        f.debug_struct("Start").field("pod", pod).field("addresses", &addresses).finish_non_exhaustive()
    }
}

/// Starts the containers of pods.
pub trait Workload: Send + Sync {
    /// # Errors
    /// When a container cannot be started: the pod is not ready, and the node tries again.
    fn start<'a>(&'a self, start: &'a Start<'a>) -> LocalBoxFuture<'a, anyhow::Result<Box<dyn Containers>>>;
}

/// The containers of one pod; dropped, they are killed. No call may block for long: the node waits for it.
pub trait Containers: Send {
    /// Whether the pod can serve.
    fn is_ready(&mut self) -> bool {
        true
    }

    /// The exit code, once they ended by themselves: of the first that failed, or 0.
    fn ended(&mut self) -> Option<i32> {
        None
    }

    /// Requests the end, once.
    fn stop(&mut self) {}

    /// Whether they ended after the request. The node kills them when the grace period is over.
    fn has_stopped(&mut self) -> bool {
        true
    }
}

/// The text with which a pod answers.
pub fn title(cluster: &str, namespace: &str, name: &str) -> String {
    format!("{cluster}/{namespace}/{name}")
}

/// Every container port answers with the pod's [`title`], on TCP and UDP alike.
#[derive(Debug, Clone, Copy)]
pub struct Answers;

impl Workload for Answers {
    fn start<'a>(&'a self, start: &'a Start<'a>) -> LocalBoxFuture<'a, anyhow::Result<Box<dyn Containers>>> {
        future::ready(answer(start)).boxed_local()
    }
}

fn answer(start: &Start<'_>) -> anyhow::Result<Box<dyn Containers>> {
    let Some(spec) = &start.pod.spec else { anyhow::bail!("the pod has no spec") };
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let ports = containers.flat_map(|it| it.ports.iter().flatten()).map(|port| port.container_port);
    let metadata = &start.pod.metadata;
    let (namespace, name) = (metadata.namespace.as_deref(), metadata.name.as_deref());
    let title = title(start.cluster, namespace.unwrap_or_default(), name.unwrap_or_default());
    let mut listeners = Vec::new();
    for port in ports.collect::<BTreeSet<i32>>() {
        let port = u16::try_from(port).with_context(|| format!("container port {port} is not a port"))?;
        match Listener::start(start.network, port, &title) {
            Ok(listener) => listeners.push(listener),
            // A program of the test, or another pod, has the node's port.
            Err(error) if spec.host_network == Some(true) && error.kind() == std::io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).with_context(|| format!("listen on container port {port}")),
        }
    }
    let seconds = |key: &str| metadata.annotations.as_ref()?.get(key)?.parse().ok().map(Duration::from_secs_f64);
    Ok(Box::new(Answering {
        _listeners: listeners,
        end: seconds(RUN_SECONDS).map(|it| Instant::now() + it),
        patience: seconds(STOP_SECONDS).unwrap_or_default(),
        stopped: None,
    }))
}

struct Answering {
    _listeners: Vec<Listener>,
    end: Option<Instant>,
    patience: Duration,
    stopped: Option<Instant>,
}

impl Containers for Answering {
    fn ended(&mut self) -> Option<i32> {
        self.end.is_some_and(|end| end <= Instant::now()).then_some(0)
    }

    fn stop(&mut self) {
        self.stopped = Some(Instant::now());
    }

    fn has_stopped(&mut self) -> bool {
        self.stopped.is_some_and(|since| since.elapsed() >= self.patience)
    }
}
