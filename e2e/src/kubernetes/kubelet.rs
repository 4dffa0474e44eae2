//! A simulated node: it plays the kubelet, the container runtime and the network plugin, so that pods that are bound to it send and
//! answer packets.
//!
//! A pod gets a network namespace with addresses from the node's pod ranges, joined to the node as in a [`fabric`](crate::fabric);
//! one with `hostNetwork` shares the node's. A [`Workload`] plays the containers. The node reports status as the kubelet does, as
//! the user `system:node:NAME`, so that the node authorizer and NodeRestriction apply. It honours graceful deletion, restart
//! policies, and objects that were there before it started.
//!
//! [`Answers`] are containers that answer on their ports; [`Programs`] runs the programs of pods.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context as _;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::oneshot;

use super::kubeconfig::client;
use super::server::ApiServer;
use crate::namespace::Namespace;
use crate::world;

mod addresses;
mod node;
mod pods;
mod programs;
mod sandbox;
mod status;
mod workload;

pub use programs::Programs;
pub use workload::{Answers, Containers, RUN_SECONDS, STOP_SECONDS, Start, Workload, title};

/// What a node is.
#[derive(Debug, Clone, Default)]
pub struct NodeOptions {
    pub name: String,
    /// Its internal addresses.
    pub addresses: Vec<IpAddr>,
    /// Where its pods' addresses come from: one range of each family.
    pub pod_ranges: Vec<IpNet>,
    pub labels: BTreeMap<String, String>,
    /// Key and effect, with which it registers.
    pub taints: Vec<(String, String)>,
}

impl From<&world::Node> for NodeOptions {
    fn from(node: &world::Node) -> Self {
        let (name, addresses, pod_ranges) = (node.name.clone(), node.addresses.clone(), node.pod_ranges.clone());
        Self { name, addresses, pod_ranges, ..Self::default() }
    }
}

/// The namespaces of the pods that run, by namespace and name.
type Running = Arc<Mutex<BTreeMap<(String, String), Arc<Namespace>>>>;

/// A running node. Dropped, its pods' namespaces are removed, and its objects stay, as those of a machine that lost its power.
#[derive(Debug)]
pub struct Kubelet {
    name: String,
    running: Running,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Kubelet {
    /// Registers the node whose network namespace is given. Pods answer on their containers' ports.
    ///
    /// # Errors
    /// When the node cannot be registered.
    pub async fn start(server: &ApiServer, network: Arc<Namespace>, options: NodeOptions) -> anyhow::Result<Self> {
        Self::start_with(server, network, options, Arc::new(Answers)).await
    }

    /// As [`Self::start`], with other containers. The node connects to the server in the network namespace of the caller.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub async fn start_with(
        server: &ApiServer,
        network: Arc<Namespace>,
        options: NodeOptions,
        workload: Arc<dyn Workload>,
    ) -> anyhow::Result<Self> {
        let kubeconfig = server.user(&format!("system:node:{}", options.name), &["system:nodes"])?;
        let (cluster, name) = ((server.name().to_owned(), server.address()), options.name.clone());
        let running = Running::default();
        let (stop, stopped) = oneshot::channel();
        let (registered, registration) = oneshot::channel::<anyhow::Result<()>>();
        let shared = Arc::clone(&running);
        // Commands that make networks block, and a node's must not delay those of others.
        let thread = std::thread::spawn(move || {
            super::run(async {
                let start = async {
                    let client = client(&kubeconfig).await?;
                    let uid = node::register(&client, &options).await?;
                    anyhow::Ok((client, uid))
                };
                match start.await {
                    Ok((client, uid)) => {
                        // Without a receiver, `stopped` has ended too.
                        drop(registered.send(Ok(())));
                        let heartbeats = heartbeats(&client, &options.name, &uid);
                        let pods = pods::Pods::new(client.clone(), cluster, options.clone(), network, workload, shared);
                        tokio::select! {
                            _ = stopped => {}
                            () = heartbeats => {}
                            () = pods.run() => {}
                        }
                    }
                    Err(error) => drop(registered.send(Err(error))),
                }
            });
        });
        let node = Self { name, running, stop: Some(stop), thread: Some(thread) };
        registration.await.with_context(|| format!("node {} ended before it was registered", node.name))??;
        Ok(node)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The network namespace of a pod that runs here.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Namespace>> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.get(&(namespace.to_owned(), name.to_owned())).map(Arc::clone)
    }

    /// Namespace and name of every pod that runs here.
    pub fn pods(&self) -> Vec<(String, String)> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            // A panic has shown itself already.
            drop(thread.join());
        }
    }
}

async fn heartbeats(client: &kube::Client, node: &str, uid: &str) {
    loop {
        if let Err(error) = node::heartbeat(client, node, uid).await {
            // The server may be away, on purpose: the next heartbeat tries again.
            eprintln!("node {node}: renew the lease: {error}");
        }
        tokio::time::sleep(node::HEARTBEAT).await;
    }
}

/// Namespace, name and UID of a pod, all of which every pod of a server has.
fn key(pod: &Pod) -> Option<(String, String, String)> {
    let metadata = &pod.metadata;
    Some((metadata.namespace.clone()?, metadata.name.clone()?, metadata.uid.clone()?))
}
