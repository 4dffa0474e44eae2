//! The network of one pod on a simulated node, and its containers.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use k8s_openapi::jiff::Timestamp;

use super::workload::Containers;
use crate::fabric;
use crate::namespace::Namespace;

/// A pod's place on the node. Dropped, the containers end and its network is removed.
pub struct Sandbox {
    pub network: Arc<Namespace>,
    pub addresses: Vec<IpAddr>,
    /// The node, and its interface to the pod; none for a pod with `hostNetwork`.
    link: Option<(Arc<Namespace>, String)>,
    /// None before they start, while they wait for a restart, and after they ended.
    pub containers: Option<Box<dyn Containers>>,
    /// How often the containers were started.
    pub starts: i32,
    pub started: Timestamp,
    /// Since when containers that end too early, or do not start, wait for the next start.
    pub failure: Option<(Instant, String)>,
    /// They ended with this code, and will not start again.
    pub ended: Option<i32>,
    /// Since when the end is requested.
    pub stopping: Option<Instant>,
}

impl Sandbox {
    pub fn on_host(node: &Arc<Namespace>, addresses: &[IpAddr]) -> Self {
        Self::new(Arc::clone(node), addresses.to_vec(), None)
    }

    /// # Errors
    /// When the network cannot be made; what was made of it is removed.
    pub fn create(
        node: &Arc<Namespace>,
        interface: String,
        name: &str,
        addresses: Vec<IpAddr>,
    ) -> anyhow::Result<Self> {
        let network = Namespace::create(name).context("create the pod's network namespace")?;
        fabric::link_pod(node, &interface, &network, &addresses).context("join the pod to its node")?;
        Ok(Self::new(Arc::new(network), addresses, Some((Arc::clone(node), interface))))
    }

    fn new(network: Arc<Namespace>, addresses: Vec<IpAddr>, link: Option<(Arc<Namespace>, String)>) -> Self {
        let started = Timestamp::now();
        Self {
            network,
            addresses,
            link,
            containers: None,
            starts: 0,
            started,
            failure: None,
            ended: None,
            stopping: None,
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.containers = None;
        if let Some((node, interface)) = &self.link {
            // A namespace alone goes when the kernel finds the time, and its routes with it.
            if let Err(error) = node.batch(&format!("link del {interface}\n")) {
                eprintln!("remove a pod's network: {error}");
            }
        }
    }
}
