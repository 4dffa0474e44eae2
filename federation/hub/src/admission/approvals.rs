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

use crate::custom_resources::PolicyApproval;
use crate::registry::records::{ApprovalRecord, encode};
use crate::registry::{AuditAction, ChangeError, MAX_AGE, Registry, Snapshot, approval_key, change_key};

/// Between two passes without an event.
const EVERY: Duration = Duration::from_secs(2);
/// An approval that was not used for this time is removed.
const MAX_UNUSED: u64 = 7 * 86_400;
/// Records that one pass removes.
const MAX_REMOVED: usize = 256;

/// Follows the PolicyApprovals.
#[derive(Clone)]
pub(super) struct Approvals {
    api: Api<PolicyApproval>,
    registry: Registry,
}

impl Approvals {
    pub(super) fn new(client: Client, registry: Registry) -> Self {
        Self { api: Api::all(client), registry }
    }

    pub(super) async fn run(self, stop: CancellationToken) {
        // By UID: the names of those that exist.
        let mut existing: BTreeMap<String, String> = BTreeMap::new();
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
            let of = |it: &PolicyApproval| Some((it.uid()?, it.name_any()));
            match event {
                None => {}
                Some(Ok(watcher::Event::Init)) => listing = BTreeMap::new(),
                Some(Ok(watcher::Event::InitApply(it))) => listing.extend(of(&it)),
                Some(Ok(watcher::Event::InitDone)) => {
                    existing = std::mem::take(&mut listing);
                    is_listed = true;
                    backoff.reset();
                }
                Some(Ok(watcher::Event::Apply(it))) => existing.extend(of(&it)),
                Some(Ok(watcher::Event::Delete(it))) => drop(it.uid().and_then(|uid| existing.remove(&uid))),
                Some(Err(error)) => {
                    warn!(%error, "PolicyApprovals cannot be watched: new approvals have no effect");
                    tokio::time::sleep(backoff.next_delay()).await;
                    continue;
                }
            }
            if is_listed && let Err(error) = self.pass(&existing).await {
                warn!(error = format!("{error:#}"), "approvals not processed");
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }

    async fn pass(&self, existing: &BTreeMap<String, String>) -> anyhow::Result<()> {
        let snapshot = self.registry.snapshot();
        for (uid, name) in existing {
            match snapshot.approvals.get(&**uid) {
                Some(record) if record.seen => {}
                Some(record) => self.confirm(uid, record).await?,
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

    /// Records that an approval exists.
    async fn confirm(&self, uid: &str, record: &ApprovalRecord) -> anyhow::Result<()> {
        let action =
            AuditAction { who: record.who.clone(), action: "approve", object: record.object.clone(), proposed: None };
        let decide = |snapshot: &Snapshot| {
            let waits = snapshot.approvals.get(uid).filter(|it| !it.seen);
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
    async fn remove_old(&self, snapshot: &Snapshot, existing: &BTreeMap<String, String>) -> anyhow::Result<()> {
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
