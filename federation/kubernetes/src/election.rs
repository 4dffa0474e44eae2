//! Which of several processes leads: the holder of a Lease.
//!
//! The holder renews the Lease every 2 s. Others take the Lease over when it did not change for 15 s by their own clock, in which the API
//! server answered them. Clocks of processes are not compared.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::{RequestError, answered, answered_by, message};

/// Without a renewal for this time, another process takes the Lease over.
pub const DURATION: Duration = Duration::from_secs(15);
/// Without a successful renewal for this time, [`Election::keep`] returns.
const RENEW_WITHIN: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_secs(2);
/// How often the release is tried: a renewal that the process no longer waits for may come before it.
const RELEASE_ATTEMPTS: usize = 3;
const CONFLICT: u16 = 409;

/// One candidate.
pub struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    /// The version of the Lease of another holder, and since when it has not changed.
    observed: Option<(Option<String>, Instant)>,
    /// The version that the last renewal got.
    version: Option<u64>,
}

/// What an attempt to acquire or renew the Lease found.
enum Attempt {
    Acquired,
    /// Another process has it.
    Taken(String),
    /// Versions have gone back: the API server was restored from a backup, and what was read before may not exist any more.
    Restored,
}

impl Attempt {
    fn holder(self) -> Holder {
        match self {
            Self::Acquired => Holder::This,
            Self::Taken(name) => Holder::Other(name),
            Self::Restored => Holder::Unknown,
        }
    }
}

/// Which process has the Lease, as the API server answered an attempt to acquire or renew it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    This,
    Other(String),
    Unknown,
}

/// Why a process no longer leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    #[error("another process has the Lease")]
    Taken,
    #[error("the API server was restored from a backup: all objects are read again")]
    Restored,
}

/// The name of this process in a Lease: unique also for two processes on one machine, and for a process that starts again.
pub fn identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{:08x}", host.trim(), rand::random::<u32>())
}

impl std::fmt::Debug for Election {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Election").field("name", &self.name).field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Election {
    /// For the Lease `name`, in `namespace`, or in the default namespace of the client.
    pub fn new(client: Client, namespace: Option<&str>, name: &str, identity: String) -> Self {
        let api = match namespace {
            Some(namespace) => Api::namespaced(client, namespace),
            None => Api::default_namespaced(client),
        };
        Self { api, name: name.to_owned(), identity, observed: None, version: None }
    }

    /// Waits until this process has the Lease; returns since when. `attempted` receives the result of each attempt.
    pub async fn acquire(&mut self, mut attempted: impl FnMut(&anyhow::Result<Holder>)) -> Instant {
        let mut failing = false;
        loop {
            let started = Instant::now();
            let attempt = self.attempt().await;
            match &attempt {
                Ok(Attempt::Acquired) => {
                    info!(identity = self.identity, lease = self.name, "Lease acquired: this process is the leader");
                    attempted(&Ok(Holder::This));
                    return started;
                }
                Ok(Attempt::Taken(_) | Attempt::Restored) => failing = false,
                Err(error) => {
                    // The holder could not renew either while the API server was away.
                    self.observed = None;
                    if !failing {
                        let error = format!("{error:#}");
                        warn!(error, lease = self.name, "the Lease cannot be acquired: this process does not lead");
                    }
                    failing = true;
                }
            }
            attempted(&attempt.map(Attempt::holder));
            // Two candidates do not try at the same time forever.
            tokio::time::sleep(EVERY.mul_f64(rand::random_range(0.75..1.25))).await;
        }
    }

    /// Renews the Lease, which was acquired or renewed at `renewed`, until another process has it, or it could not be renewed for 10 s:
    /// no other process has it before this returns. `attempted` receives the result of each attempt.
    pub async fn keep(&mut self, mut renewed: Instant, mut attempted: impl FnMut(&anyhow::Result<Holder>)) {
        loop {
            let renewal = async {
                tokio::time::sleep(EVERY).await;
                let started = Instant::now();
                (started, self.attempt().await)
            };
            match tokio::time::timeout_at(renewed + RENEW_WITHIN, renewal).await {
                Ok((started, Ok(Attempt::Acquired))) => {
                    attempted(&Ok(Holder::This));
                    renewed = started;
                }
                Ok((_, Ok(Attempt::Restored))) => {
                    return warn!(
                        lease = self.name,
                        "the API server was restored from a backup: all objects are read again"
                    );
                }
                Ok((_, Ok(Attempt::Taken(other)))) => {
                    attempted(&Ok(Holder::Other(other)));
                    return warn!(identity = self.identity, lease = self.name, "another process has taken the Lease");
                }
                Ok((_, Err(error))) => {
                    warn!(error = format!("{error:#}"), lease = self.name, "the Lease was not renewed");
                    attempted(&Err(error));
                }
                Err(_) => {
                    let message = format!("the Lease was not renewed within {} s", RENEW_WITHIN.as_secs());
                    attempted(&Err(RequestError { message, is_refusal: false }.into()));
                    return warn!(identity = self.identity, lease = self.name, "the Lease was not renewed in time");
                }
            }
        }
    }

    /// Renews the Lease until another process has it, however long that fails. `attempted` receives the start and the result of each
    /// attempt.
    ///
    /// Another process may take the Lease [`DURATION`] after the last successful attempt: the caller must not do then what only one process
    /// may do.
    pub async fn keep_until_taken(&mut self, mut attempted: impl FnMut(Instant, &anyhow::Result<()>)) -> Ended {
        loop {
            tokio::time::sleep(EVERY).await;
            let started = Instant::now();
            let attempt = self.attempt().await;
            match &attempt {
                Ok(Attempt::Taken(_)) => return Ended::Taken,
                Ok(Attempt::Restored) => return Ended::Restored,
                Ok(Attempt::Acquired) | Err(_) => attempted(started, &attempt.map(drop)),
            }
        }
    }

    /// Gives the Lease back, so that another process need not wait.
    pub async fn release(&self) {
        let mut failed = None;
        for _ in 0..RELEASE_ATTEMPTS {
            match self.try_release().await {
                Ok(()) => return,
                Err(error) => {
                    let is_conflict = matches!(&error, Some(kube::Error::Api(status)) if status.code == CONFLICT);
                    failed = Some(error.map_or_else(|| "no answer of the API server".to_owned(), message));
                    if !is_conflict {
                        break;
                    }
                }
            }
        }
        warn!(error = failed, lease = self.name, "the Lease was not released");
    }

    /// `None`: no answer in time.
    async fn try_release(&self) -> Result<(), Option<kube::Error>> {
        let Some(mut lease) = answered_by(self.api.get_opt(&self.name)).await? else { return Ok(()) };
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() == Some(&*self.identity) {
            spec.holder_identity = None;
            answered_by(self.api.replace(&self.name, &PostParams::default(), &lease)).await?;
        }
        Ok(())
    }

    /// Acquires or renews the Lease.
    async fn attempt(&mut self) -> anyhow::Result<Attempt> {
        let now = Some(MicroTime(Timestamp::now()));
        let Some(mut lease) = answered(self.api.get_opt(&self.name)).await? else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let spec = LeaseSpec { acquire_time: now.clone(), ..LeaseSpec::default() };
            let lease = Lease { metadata, spec: Some(self.taken(spec, now)) };
            let created = answered(self.api.create(&PostParams::default(), &lease)).await?;
            return Ok(self.acquired(&created));
        };
        let mut spec = lease.spec.take().unwrap_or_default();
        let holder = spec.holder_identity.take().filter(|it| !it.is_empty());
        if holder.as_deref() != Some(&*self.identity) {
            if let Some(holder) = holder {
                let version = &lease.metadata.resource_version;
                match &self.observed {
                    Some((observed, since)) if observed == version => {
                        let seconds = spec.lease_duration_seconds.and_then(|it| u64::try_from(it).ok());
                        if since.elapsed() < seconds.map_or(DURATION, Duration::from_secs) {
                            return Ok(Attempt::Taken(holder));
                        }
                    }
                    _ => {
                        self.observed = Some((version.clone(), Instant::now()));
                        return Ok(Attempt::Taken(holder));
                    }
                }
            }
            spec.acquire_time.clone_from(&now);
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or_default().saturating_add(1));
        }
        // Fails where another candidate was faster: the version is compared.
        lease.spec = Some(self.taken(spec, now));
        let renewed = answered(self.api.replace(&self.name, &PostParams::default(), &lease)).await?;
        Ok(self.acquired(&renewed))
    }

    fn acquired(&mut self, lease: &Lease) -> Attempt {
        let version = lease.metadata.resource_version.as_deref().and_then(|it| it.parse().ok());
        let before = std::mem::replace(&mut self.version, version);
        if version < before { Attempt::Restored } else { Attempt::Acquired }
    }

    fn taken(&self, spec: LeaseSpec, now: Option<MicroTime>) -> LeaseSpec {
        let seconds = i32::try_from(DURATION.as_secs()).ok();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: seconds,
            renew_time: now,
            ..spec
        }
    }
}
