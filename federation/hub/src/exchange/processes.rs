//! Which process publishes for a cluster: the first one, if a copy of its member's folder runs as well. Of several members of a cluster, the
//! elected one: a process that may have been replaced says so when it opens a stream, and yields to any other.
//!
//! Each replica of the hub decides by what it has seen. A replica that has just started has seen nothing: the store names the
//! process that the others serve, so that all of them serve the same one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use hanse_identity::instances::{Instance, Instances, Serving};
use hanse_policy::model::ClusterName;
use hanse_protocol::reason::ExchangeProblem;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// A process that another one has replaced has ended if it does not return within this time.
const RETURNS_WITHIN: Duration = Duration::from_secs(60);
/// A former leader that can reach its API server ends within this time. One that tries for longer is cut off, or a copy.
const ENDS_WITHIN: Duration = Duration::from_secs(60);
/// One that does not try for this time has ended.
const TRIES_EVERY: Duration = Duration::from_secs(60);
/// One that goes on to try is logged once in this time.
const WARN_EVERY: Duration = Duration::from_secs(600);

/// One entry for each cluster that has published since the start.
#[derive(Debug, Default)]
pub struct Processes(Mutex<BTreeMap<ClusterName, Process>>);

#[derive(Debug, Default)]
struct Process {
    instances: Instances,
    /// The token of the process that is served, while one of its streams is open.
    present: Weak<CancellationToken>,
    /// Another process may be elected in its place.
    yields: bool,
    /// Processes that yield are refused.
    yielding: Option<Yielding>,
}

/// Attempts of processes that may have been replaced, while another one is served.
#[derive(Debug, Clone, Copy)]
struct Yielding {
    since: Instant,
    seen: Instant,
    warned: Option<Instant>,
}

impl Process {
    /// A process that yields is refused. Since when that goes on, where it is to be logged now.
    fn refuse_yielding(&mut self, now: Instant) -> Option<Instant> {
        let goes_on = self.yielding.filter(|it| now.duration_since(it.seen) < TRIES_EVERY);
        let mut yielding = goes_on.unwrap_or(Yielding { since: now, seen: now, warned: None });
        yielding.seen = now;
        let is_due = now.duration_since(yielding.since) >= ENDS_WITHIN
            && yielding.warned.is_none_or(|at| now.duration_since(at) >= WARN_EVERY);
        if is_due {
            yielding.warned = Some(now);
        }
        self.yielding = Some(yielding);
        is_due.then_some(yielding.since)
    }
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
    /// A process opens a stream to publish. `yields`: another one may be elected in its place. `recorded`: the number of the process that
    /// the store names.
    ///
    /// # Errors
    /// `ABORTED`: another process with the same key is served.
    pub fn admit(
        &self,
        cluster: &ClusterName,
        instance: Instance,
        yields: bool,
        recorded: Option<&[u8]>,
    ) -> Result<ServedProcess, Status> {
        let now = Instant::now();
        let mut processes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let process = processes.entry(cluster.clone()).or_default();
        if let Some(recorded) = recorded {
            process.instances.expect(recorded, now);
        }
        let present = process.present.upgrade();
        let stays = process.instances.is_present(&instance);
        if present.is_some() && !stays && yields {
            if let Some(since) = process.refuse_yielding(now) {
                let (served, refused) = (process.instances.served(), instance.address());
                tracing::warn!(
                    %cluster, served = served.map(tracing::field::display), %refused, seconds = now.duration_since(since).as_secs(),
                    "a member that may have been replaced goes on to try: it does not reach its API server, or the cluster's key was copied"
                );
            }
            return Err(Status::aborted(format!("another member of cluster {cluster} was elected to publish")));
        }
        let is_admitted = match present.is_some() && !stays && process.yields {
            true => process.instances.succeed(instance, now),
            false => process.instances.take(instance, present.is_some(), now),
        };
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
        process.yields = yields;
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

    /// The number to record for a cluster, if the store is to name another process, or none yet. Of one that another replica serves, only
    /// the end is known: the process that came after it here is recorded when the other has not returned.
    pub fn to_record(&self, cluster: &ClusterName, recorded: Option<&[u8]>) -> Option<Vec<u8>> {
        let now = Instant::now();
        let processes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let instances = &processes.get(cluster)?.instances;
        let Serving { number: present, former, since } = instances.serving()?;
        let is_due = match recorded {
            _ if present.is_empty() => false,
            None => true,
            Some(recorded) => {
                let has_gone = now.duration_since(since) > RETURNS_WITHIN && instances.rivals(now).is_none();
                recorded != present && former == Some(recorded) && has_gone
            }
        };
        is_due.then(|| present.to_vec())
    }

    /// Why the reports of a cluster do not count, if two processes report for it.
    pub fn conflict(&self, cluster: &ClusterName) -> Option<ExchangeProblem> {
        let processes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (served, refused) = processes.get(cluster)?.instances.rivals(Instant::now())?;
        Some(ExchangeProblem::ClusterKeyInUse { served: served.to_string(), refused: refused.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn instance(number: u8) -> Instance {
        Instance::new(&[number; 16], SocketAddr::from(([192, 0, 2, number], 1)))
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_starts_prefers_the_recorded_process() {
        let (processes, cluster) = (Processes::default(), ClusterName::from("train"));
        let recorded: Option<&[u8]> = Some(&[1; 16]);
        let copy = processes.admit(&cluster, instance(2), false, recorded).expect("the first may have ended");
        assert_eq!(processes.to_record(&cluster, recorded), None, "it may return");
        let first = processes.admit(&cluster, instance(1), false, recorded).expect("it is the first");
        assert!(copy.is_replaced() && !first.is_replaced());
        assert!(
            processes.admit(&cluster, instance(2), false, recorded).is_err() && processes.conflict(&cluster).is_some()
        );
        assert_eq!(processes.to_record(&cluster, recorded), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_is_recorded_at_once_and_its_successor_when_it_has_not_returned() {
        let (processes, cluster) = (Processes::default(), ClusterName::from("train"));
        assert_eq!(processes.to_record(&cluster, None), None);
        let one = processes.admit(&cluster, instance(1), false, None).expect("the first");
        assert_eq!(processes.to_record(&cluster, None), Some(vec![1; 16]));
        drop(one);
        let recorded: Option<&[u8]> = Some(&[1; 16]);
        assert_eq!(processes.to_record(&cluster, recorded), None);
        let _two = processes.admit(&cluster, instance(2), false, recorded).expect("the member was started again");
        assert_eq!(processes.to_record(&cluster, recorded), None);
        tokio::time::advance(RETURNS_WITHIN + Duration::from_secs(1)).await;
        assert_eq!(processes.to_record(&cluster, recorded), Some(vec![2; 16]));
        // A process that was never here: another replica serves it.
        assert_eq!(processes.to_record(&cluster, Some(&[9; 16])), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_may_be_replaced_yields_to_another_one() {
        let (processes, cluster) = (Processes::default(), ClusterName::from("train"));
        let former = processes.admit(&cluster, instance(1), false, None).expect("the first");
        let elected = processes.admit(&cluster, instance(2), false, None).expect("it has the Lease");
        assert!(former.is_replaced());
        // It was cut off, and does not know that another one was elected.
        let refused = processes.admit(&cluster, instance(1), true, None).expect_err("another one is served");
        assert!(refused.code() == tonic::Code::Aborted && refused.message().contains("elected"), "{refused}");
        assert!(!elected.is_replaced() && processes.conflict(&cluster).is_none(), "it is not a copy");
        // While no other process is served, it goes on, and its connections may change.
        drop((former, elected));
        let former = processes.admit(&cluster, instance(1), true, None).expect("no other one is there");
        let again = processes.admit(&cluster, instance(1), true, None).expect("it is the same one");
        let elected = processes.admit(&cluster, instance(2), false, None).expect("it has the Lease");
        assert!(former.is_replaced() && again.is_replaced() && !elected.is_replaced());
        assert!(processes.conflict(&cluster).is_none());
        assert!(processes.admit(&cluster, instance(1), true, None).is_err());
        // It has agreed to be replaced: without its word, it is a copy.
        assert!(processes.admit(&cluster, instance(1), false, None).is_err() && !elected.is_replaced());
        assert!(processes.conflict(&cluster).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_former_process_that_does_not_end_is_logged_once_in_ten_minutes() {
        let mut process = Process::default();
        let second = Duration::from_secs(1);
        let mut logged = Vec::new();
        for _ in 0..ENDS_WITHIN.as_secs() + WARN_EVERY.as_secs() + 5 {
            logged.extend(process.refuse_yielding(Instant::now()).map(|since| since.elapsed()));
            tokio::time::advance(second).await;
        }
        assert_eq!(logged, [ENDS_WITHIN, ENDS_WITHIN + WARN_EVERY]);
        // Another one, later.
        tokio::time::advance(TRIES_EVERY).await;
        assert_eq!(process.refuse_yielding(Instant::now()), None);
        tokio::time::advance(ENDS_WITHIN - second).await;
        assert_eq!(process.refuse_yielding(Instant::now()), None, "it has not been trying for a minute");
    }
}
