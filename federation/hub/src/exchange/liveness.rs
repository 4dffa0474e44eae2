//! Whether a cluster publishes, and whether it receives.

use std::collections::BTreeMap;
use std::time::Duration;

use hanse_policy::model::ClusterName;
use hanse_protocol::reason::ExchangeProblem;
use tokio::time::Instant;

/// What a cluster last reported about the data that it receives.
#[derive(Debug, Clone, Copy)]
pub struct Receiving {
    /// The time since it received something; `None` if it has not since its start.
    pub age: Option<Duration>,
    pub reported: Instant,
}

impl Receiving {
    /// Stores a report. A process that has received nothing yet does not replace what an earlier one reported: otherwise one that
    /// restarts within each lease would always count as receiving.
    pub fn note(
        all: &mut BTreeMap<ClusterName, Self>,
        cluster: &ClusterName,
        age: Option<Duration>,
        reported: Instant,
    ) {
        let now = Self { age, reported };
        match age {
            Some(_) => drop(all.insert(cluster.clone(), now)),
            None => _ = all.entry(cluster.clone()).or_insert(now),
        }
    }

    /// Why a cluster does not count as enforcing, if it does not: its data may be old. `watches`: it has a watching stream here.
    pub fn problem(this: Option<&Self>, watches: bool, lease: Duration, now: Instant) -> Option<ExchangeProblem> {
        let no_stream = || ExchangeProblem::NotWatching;
        let Some(this) = this else { return (!watches).then(no_stream) };
        let age = this.age.unwrap_or_default().saturating_add(now.duration_since(this.reported));
        if age >= lease {
            return Some(ExchangeProblem::NotReceiving(age));
        }
        (this.age.is_none() && !watches).then(no_stream)
    }
}

/// Which clusters this replica hears. The lease of a cluster is renewed by any replica: one that does not hear the cluster has old data
/// of it, or none, and must not present that as current to the clusters that watch it.
#[derive(Debug, Default)]
pub struct Hearing {
    /// When each cluster with a lease was first seen to have it.
    live: BTreeMap<ClusterName, Instant>,
}

impl Hearing {
    /// Longer than a lease lasts in any store, so that a single replica never needs this.
    fn patience(lease: Duration) -> Duration {
        lease + lease / 2 + Duration::from_secs(2)
    }

    /// The clusters of `live`, those with a lease, from which this replica has received nothing for longer than a lease, with the
    /// time. `heard` is the time since it received something from a cluster.
    pub fn unheard<'a>(
        &mut self,
        live: impl Iterator<Item = &'a ClusterName>,
        heard: impl Fn(&str) -> Option<Duration>,
        lease: Duration,
        now: Instant,
    ) -> BTreeMap<ClusterName, Duration> {
        let mut before = std::mem::take(&mut self.live);
        let mut unheard = BTreeMap::new();
        for name in live {
            let since = before.remove(name).unwrap_or(now);
            self.live.insert(name.clone(), since);
            let with_lease = now.duration_since(since);
            let silent = heard(name).map_or(with_lease, |heard| heard.min(with_lease));
            if silent > Self::patience(lease) {
                unheard.insert(name.clone(), silent);
            }
        }
        unheard
    }
}

/// A cluster that is connected and has not published yet.
#[derive(Debug, Clone, Copy)]
pub struct Unpublished {
    since: Instant,
    /// When a part of its first batch arrived last.
    pub progress: Instant,
    received: Instant,
    /// A warning was logged.
    pub is_logged: bool,
}

impl Unpublished {
    pub fn new(now: Instant) -> Self {
        Self { since: now, progress: now, received: now, is_logged: false }
    }

    /// A cluster is silent if nothing of its first batch arrives for the time of a lease, or the batch does not end within ten:
    /// other clusters would wait for it without end.
    pub fn is_silent(&mut self, lease: Duration, now: Instant) -> bool {
        // Its lease had ended, so that no cluster waited for it.
        if now.duration_since(self.received) > lease {
            *self = Self::new(now);
        }
        self.received = now;
        now.duration_since(self.progress) > lease || now.duration_since(self.since) > lease * 10
    }
}
