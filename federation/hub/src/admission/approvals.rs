//! Follows the PolicyApprovals of the management cluster. An approval has an effect when the object exists, and not only its request.
//! Every hub does this; the store decides which one is first.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::StreamExt as _;
use hanse_kubernetes::answered;
use hanse_runtime::retry::Backoff;
use kube::api::{DeleteParams, ListParams, Preconditions};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::custom_resources::{ApprovalAction, PolicyApproval, PolicyApprovalSpec};
use crate::management::{APPROVALS, Monitor, Task};
use crate::registry::records::{ApprovalRecord, ChangeAction, encode};
use crate::registry::{AuditAction, ChangeError, MAX_AGE, Registry, Snapshot, approval_key, change_key};

/// Between two passes without an event.
const EVERY: Duration = Duration::from_secs(2);
/// An approval that was not used for this time is removed.
const MAX_UNUSED: u64 = 7 * 86_400;
/// Records that one pass removes.
const MAX_REMOVED: usize = 256;

/// A PolicyApproval that exists.
struct Existing {
    name: String,
    spec: PolicyApprovalSpec,
}

impl Existing {
    /// Whether a record is of this PolicyApproval: a forged review can name its UID.
    fn is_recorded_by(&self, record: &ApprovalRecord) -> bool {
        let PolicyApprovalSpec { action, kind, name, uid, generation, digest } = &self.spec;
        let action = match action {
            ApprovalAction::Apply => ChangeAction::Apply,
            ApprovalAction::Delete => ChangeAction::Delete,
        };
        record.object == format!("{kind}/{name}")
            && record.uid == *uid
            && record.action == action
            && record.generation == *generation
            && record.digest == *digest
    }
}

/// Follows the PolicyApprovals.
#[derive(Clone)]
pub(super) struct Approvals {
    api: Api<PolicyApproval>,
    registry: Registry,
    monitor: Monitor,
}

impl Approvals {
    pub(super) fn new(client: Client, registry: Registry, monitor: Monitor) -> Self {
        Self { api: Api::all(client), registry, monitor }
    }

    pub(super) async fn run(self, stop: CancellationToken) {
        // By UID.
        let mut existing: BTreeMap<String, Existing> = BTreeMap::new();
        let mut listing = BTreeMap::new();
        let mut is_listed = false;
        let mut events = watcher(self.api.clone(), watcher::Config::default()).boxed();
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => event,
                () = tokio::time::sleep(EVERY) => None,
            };
            let of = |it: PolicyApproval| Some((it.uid()?, Existing { name: it.name_any(), spec: it.spec }));
            match event {
                None => {}
                Some(Ok(watcher::Event::Init)) => listing = BTreeMap::new(),
                Some(Ok(watcher::Event::InitApply(it))) => listing.extend(of(it)),
                Some(Ok(watcher::Event::InitDone)) => {
                    self.monitor.succeeded(APPROVALS, "");
                    existing = std::mem::take(&mut listing);
                    is_listed = true;
                    backoff.reset();
                }
                Some(Ok(watcher::Event::Apply(it))) => existing.extend(of(it)),
                Some(Ok(watcher::Event::Delete(it))) => drop(it.uid().and_then(|uid| existing.remove(&uid))),
                Some(Err(error)) => {
                    warn!(%error, "PolicyApprovals cannot be watched: new approvals have no effect");
                    self.monitor.watch_failed(APPROVALS, &error);
                    tokio::time::sleep(backoff.next_delay()).await;
                    continue;
                }
            }
            if !is_listed {
                continue;
            }
            match self.pass(&existing).await {
                Ok(()) => self.monitor.done(Task::Approvals, ""),
                Err(error) => {
                    warn!(error = format!("{error:#}"), "approvals not processed");
                    self.monitor.failed(Task::Approvals, "", &error);
                    tokio::time::sleep(backoff.next_delay()).await;
                }
            }
        }
    }

    async fn pass(&self, existing: &BTreeMap<String, Existing>) -> anyhow::Result<()> {
        let snapshot = self.registry.snapshot();
        for (uid, approval) in existing {
            let name = &approval.name;
            match snapshot.approvals.get(&**uid) {
                Some(record) if record.seen => {}
                Some(record) => self.confirm(uid, approval, record).await?,
                // It was used, or no webhook has seen it: then it has no effect. Another replica may have recorded it just now.
                None if self.registry.has_approval(uid).await? => {}
                None => {
                    let preconditions = Preconditions { uid: Some(uid.clone()), resource_version: None };
                    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
                    let deleting = async {
                        match self.api.delete(name, &parameters).await {
                            Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
                            other => other.map(drop),
                        }
                    };
                    answered(deleting).await.map_err(|error| error.context(format!("delete PolicyApproval {name}")))?;
                    info!(approval = name, "PolicyApproval deleted: it was used, or has no effect");
                }
            }
        }
        self.remove_old(&snapshot, existing).await
    }

    /// Records that an approval exists. A record of another approval than this one is removed.
    async fn confirm(&self, uid: &str, approval: &Existing, record: &ApprovalRecord) -> anyhow::Result<()> {
        if !approval.is_recorded_by(record) {
            let (name, object, who) = (&approval.name, &record.object, &record.who);
            warn!(approval = name, uid, object, who, "review with the UID of another PolicyApproval has no effect");
            return Ok(self.registry.remove_records(vec![approval_key(uid)?]).await?);
        }
        let action =
            AuditAction { who: record.who.clone(), action: "approve", object: record.object.clone(), proposed: None };
        let decide = |snapshot: &Snapshot| {
            let waits = snapshot.approvals.get(uid).filter(|it| !it.seen && approval.is_recorded_by(it));
            let put = |it: &ApprovalRecord| {
                let seen = ApprovalRecord { seen: true, ..it.clone() };
                Ok::<_, ChangeError>(hanse_store::Transaction::default().put(approval_key(uid)?, encode(&seen)))
            };
            Ok((waits.map(|it| put(it)).transpose()?.unwrap_or_default(), ()))
        };
        self.registry.change(&action, decide).await?;
        Ok(())
    }

    /// Removes the records of requests that led to nothing, and of approvals that were withdrawn.
    async fn remove_old(&self, snapshot: &Snapshot, existing: &BTreeMap<String, Existing>) -> anyhow::Result<()> {
        let now = self.registry.now_seconds();
        let is_older = |at: u64, than: u64| now.saturating_sub(at) > than;
        let requested = MAX_AGE.as_secs();
        let is_over = |(uid, it): &(&std::sync::Arc<str>, &std::sync::Arc<ApprovalRecord>)| {
            let exists = existing.contains_key(&***uid);
            is_older(it.at, MAX_UNUSED) || !exists && (it.seen || is_older(it.at, requested))
        };
        let mut over: Vec<&str> = snapshot.approvals.iter().filter(is_over).map(|(uid, _)| &**uid).collect();
        // The watch of another replica may be ahead of this one.
        if !over.is_empty() {
            let exist = answered(self.api.list_metadata(&ListParams::default())).await?;
            let exist: BTreeSet<String> = exist.items.iter().filter_map(ResourceExt::uid).collect();
            over.retain(|uid| !exist.contains(*uid) || existing.contains_key(*uid));
        }
        let approvals = over.into_iter().map(approval_key);
        let changes = snapshot.changes.iter().flat_map(|(uid, all)| all.iter().map(move |(id, it)| (uid, id, it)));
        let changes = changes.filter(|(.., it)| !it.proposed && is_older(it.at, requested));
        let changes = changes.map(|(uid, id, _)| change_key(uid, id));
        let keys: Vec<_> = approvals.chain(changes).take(MAX_REMOVED).collect::<Result<_, _>>()?;
        if !keys.is_empty() {
            self.registry.remove_records(keys).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use hanse_runtime::shutdown::Shutdown;
    use kube::Config;

    use super::*;
    use crate::registry::Clock;

    fn record(digest: &str, who: &str) -> ApprovalRecord {
        let (object, uid) = ("FederatedNetworkPolicy/web".to_owned(), "u".to_owned());
        let (who, digest) = (who.to_owned(), digest.to_owned());
        ApprovalRecord { at: 0, who, object, uid, action: ChangeAction::Apply, generation: 2, digest, seen: false }
    }

    #[tokio::test]
    async fn forged_reviews_take_the_place_of_no_approval() {
        hanse_identity::tls::install_provider();
        let shutdown = Shutdown::default();
        let (store, lease) = (hanse_store::in_memory(), Duration::from_secs(30));
        let registry = Registry::open(store, lease, Clock::default(), &shutdown).await.expect("it opens");
        let client = Client::try_from(Config::new("https://127.0.0.1:1".parse().expect("a URI"))).expect("a client");
        let approvals = Approvals::new(client, registry.clone(), Monitor::new("hub"));
        let spec = PolicyApprovalSpec {
            action: ApprovalAction::Apply,
            kind: "FederatedNetworkPolicy".to_owned(),
            name: "web".to_owned(),
            uid: "u".to_owned(),
            generation: 2,
            digest: "reviewed".to_owned(),
        };
        let approval = Existing { name: "a".to_owned(), spec };
        let pass = async |uid: &str| {
            let snapshot = registry.snapshot();
            approvals.confirm(uid, &approval, &snapshot.approvals[uid]).await.expect("the store works");
            registry.snapshot().approvals.get(uid).map(|it| ApprovalRecord::clone(it))
        };

        // After the review of the approval: it stays, also when the API server repeats its request later.
        registry.record_approval("a", &record("reviewed", "bob")).await.expect("recorded");
        for forged in [record("forged", "bob"), record("reviewed", "eve")] {
            let refused = registry.record_approval("a", &forged).await;
            assert!(matches!(&refused, Err(ChangeError::Conflict(text)) if text.contains("UID a")), "{refused:?}");
        }
        let again = ApprovalRecord { at: 9, ..record("reviewed", "bob") };
        registry.record_approval("a", &again).await.expect("the same");
        assert_eq!(pass("a").await, Some(ApprovalRecord { seen: true, ..record("reviewed", "bob") }));
        registry.record_approval("a", &again).await.expect("the same, which the hub has seen");
        assert!(registry.snapshot().approvals["a"].seen);

        // Before it: what the object does not say is not approved.
        for (uid, forged) in [
            ("digest", record("forged", "bob")),
            ("generation", ApprovalRecord { generation: 3, ..record("reviewed", "bob") }),
            ("uid", ApprovalRecord { uid: "v".to_owned(), ..record("reviewed", "bob") }),
            ("action", ApprovalRecord { action: ChangeAction::Delete, ..record("reviewed", "bob") }),
            ("object", ApprovalRecord { object: "Tier/web".to_owned(), ..record("reviewed", "bob") }),
        ] {
            registry.record_approval(uid, &forged).await.expect("recorded");
            assert_eq!(pass(uid).await, None, "another {uid}");
        }
        shutdown.drain(Duration::from_secs(10)).await;
    }
}
