//! Which process publishes for a cluster: the first, where a copy of its member's folder runs beside it.

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
pub struct Speakers(Mutex<BTreeMap<ClusterName, Speaker>>);

#[derive(Debug, Default)]
struct Speaker {
    instances: Instances,
    /// Of the process that is served, while one of its streams is open.
    present: Weak<CancellationToken>,
}

/// While this is kept, a stream of the process that is served is open.
#[derive(Debug)]
pub struct Speaking(Arc<CancellationToken>);

impl Speaking {
    /// Whether another process is served instead.
    pub fn is_replaced(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Returns when another process is served instead.
    pub async fn replaced(&self) {
        self.0.cancelled().await;
    }
}

impl Speakers {
    /// A process opens a stream to publish.
    ///
    /// # Errors
    /// `ABORTED`: another process with the same key is served.
    pub fn speak(&self, cluster: &ClusterName, instance: Instance) -> Result<Speaking, Status> {
        let now = Instant::now();
        let mut speakers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let speaker = speakers.entry(cluster.clone()).or_default();
        let present = speaker.present.upgrade();
        let stays = speaker.instances.is_present(&instance);
        let is_let_in = speaker.instances.take(instance, present.is_some(), now);
        if let Some((served, refused)) = speaker.instances.to_warn(now) {
            tracing::warn!(
                %cluster, %served, %refused,
                "the key of a cluster's member is used from two places: one is a copy of its folder"
            );
        }
        if !is_let_in {
            let served = speaker.instances.served().map(|served| format!(" from {served}")).unwrap_or_default();
            return Err(Status::aborted(format!(
                "the key of cluster {cluster} is in use{served}: one of both is a copy of the member's folder; stop it, or revoke the \
                 cluster and let it join with a new token and a new --data"
            )));
        }
        if let Some(present) = present {
            if stays {
                return Ok(Speaking(present));
            }
            present.cancel();
        }
        let speaking = Arc::new(CancellationToken::new());
        speaker.present = Arc::downgrade(&speaking);
        Ok(Speaking(speaking))
    }

    /// Why nothing that a cluster reports counts, where two processes report for it.
    pub fn conflict(&self, cluster: &ClusterName) -> Option<ExchangeProblem> {
        let speakers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (served, refused) = speakers.get(cluster)?.instances.rivals(Instant::now())?;
        Some(ExchangeProblem::ClusterKeyInUse { served: served.to_string(), refused: refused.to_string() })
    }
}
