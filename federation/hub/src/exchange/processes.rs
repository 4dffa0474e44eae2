//! Which process publishes for a cluster: the first one, if a copy of its member's folder runs as well.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hanse_identity::instances::{Instance, Instances};
use hanse_policy::model::ClusterName;
use hanse_protocol::reason::ExchangeProblem;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// One entry for each cluster that has published since the start.
#[derive(Debug, Default)]
pub struct Processes(Mutex<BTreeMap<ClusterName, Process>>);

#[derive(Debug, Default)]
struct Process {
    instances: Instances,
    /// The token of the process that is served, while one of its streams is open.
    present: Weak<CancellationToken>,
}

/// A stream of the process that is served. The process is served as long as one of these exists.
#[derive(Debug)]
pub struct ServedProcess(Arc<CancellationToken>);

impl ServedProcess {
    /// Whether another process is served instead.
    pub fn is_replaced(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Returns when another process is served instead.
    pub async fn replaced(&self) {
        self.0.cancelled().await;
    }
}

impl Processes {
    /// A process opens a stream to publish.
    ///
    /// # Errors
    /// `ABORTED`: another process with the same key is served.
    pub fn admit(&self, cluster: &ClusterName, instance: Instance) -> Result<ServedProcess, Status> {
        let now = Instant::now();
        let mut processes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let process = processes.entry(cluster.clone()).or_default();
        let present = process.present.upgrade();
        let stays = process.instances.is_present(&instance);
        let is_admitted = process.instances.take(instance, present.is_some(), now);
        if let Some((served, refused)) = process.instances.to_warn(now) {
            tracing::warn!(
                %cluster, %served, %refused,
                "the key of a cluster's member is used from two places: one is a copy of its folder"
            );
        }
        if !is_admitted {
            let served = process.instances.served().map(|served| format!(" from {served}")).unwrap_or_default();
            return Err(Status::aborted(format!(
                "the key of cluster {cluster} is in use{served}: one of both is a copy of the member's folder; stop it, or revoke the \
                 cluster and let it join with a new token and a new --data"
            )));
        }
        if let Some(present) = present {
            if stays {
                return Ok(ServedProcess(present));
            }
            present.cancel();
        }
        let served_process = Arc::new(CancellationToken::new());
        process.present = Arc::downgrade(&served_process);
        Ok(ServedProcess(served_process))
    }

    /// Why the reports of a cluster do not count, if two processes report for it.
    pub fn conflict(&self, cluster: &ClusterName) -> Option<ExchangeProblem> {
        let processes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (served, refused) = processes.get(cluster)?.instances.rivals(Instant::now())?;
        Some(ExchangeProblem::ClusterKeyInUse { served: served.to_string(), refused: refused.to_string() })
    }
}
