//! Real Kubernetes control planes for tests: etcd, kube-apiserver, kube-controller-manager and kube-scheduler.
//!
//! An [`Etcd`](etcd::Etcd) serves any number of [`ApiServer`](server::ApiServer)s, each with objects, authority and users of its
//! own. A [`Controllers`](controllers::Controllers) runs the controllers of one, and its scheduler where a test wants pods placed;
//! each [`Kubelet`](kubelet::Kubelet) is a node, on which pods are network namespaces. A [`Cluster`](cluster::Cluster) is all of
//! these. [`manifests`] applies objects.
//!
//! Programs start in the network namespace of the calling thread, end with this process, and leave nothing behind. Waiting is for
//! conditions, with generous limits.

pub mod certificates;
pub mod cluster;
pub mod controllers;
pub mod crds;
pub mod etcd;
pub mod kubeconfig;
pub mod kubelet;
pub mod manifests;
pub mod programs;
mod scratch;
pub mod server;
pub mod services;

use std::time::{Duration, Instant};

pub use controllers::Controllers;
pub use etcd::Etcd;
pub use kubelet::{Kubelet, NodeOptions};
pub use server::{ApiServer, Options, TokenOptions};

/// How often a condition is checked.
const EVERY: Duration = Duration::from_millis(20);

/// Tries again until `done`, or until the time is up. Returns how long it took.
pub async fn until(deadline: Duration, mut done: impl AsyncFnMut() -> bool) -> Option<Duration> {
    let start = Instant::now();
    loop {
        if done().await {
            return Some(start.elapsed());
        }
        if start.elapsed() >= deadline {
            return None;
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Runs `work` on a runtime of one thread, the caller's, so that its clients connect in the network namespace of the caller:
/// `namespace.enter(|| kubernetes::run(async { … }))`.
///
/// # Panics
/// When the runtime cannot be made.
pub fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime of one thread needs no more than memory").block_on(work)
}
