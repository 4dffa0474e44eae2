//! Changes of custom resources that wait for an approval: their records, and their staged policies.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use hanse_store::Transaction;

use super::approvals::proposal_key;
use super::edit::{OPERATOR, OperatorEdit, Origin};
use super::governed::{authors, is_marked, named, staged, staged_id, subject, with_change};
use super::objects::Sent;
use super::state::Administration;
use crate::admission::approval::{Seen, led_to_nothing, records_of};
use crate::manifest::{Kind, ObjectId};
use crate::registry::records::{AuditDetail, ChangeAction, ChangeRecord, encode};
use crate::registry::{AuditAction, ChangeError, Snapshot, change_key};

/// Records that one pass removes.
const MAX_REMOVED: usize = 1_024;

impl Administration {
    /// Reads what other replicas recorded of changes, where this one knows no author.
    pub(super) async fn find_authors(&self, edits: &[OperatorEdit]) -> Result<(), ChangeError> {
        if !self.has_webhook() {
            return Ok(());
        }
        for edit in edits {
            let snapshot = self.registry.snapshot();
            let Some((id, (_, origin, _))) = edit.id().zip(subject(&snapshot, edit)) else { continue };
            // The webhook does not record who changes clusters.
            if id.kind != Kind::MemberCluster && authors(&snapshot, &id, edit).is_none() {
                self.registry.has_changes(&origin.uid).await?;
            }
        }
        Ok(())
    }

    /// Records that a change waits, and has it evaluated as a staged policy.
    pub(super) async fn propose(&self, edit: &OperatorEdit) -> Result<(), ChangeError> {
        let snapshot = self.registry.snapshot();
        let Some((id, subject)) = edit.id().zip(subject(&snapshot, edit)) else { return Ok(()) };
        let (action, Origin { uid, .. }, manifest) = subject;
        let new = with_change(&snapshot, &id, edit, |change| {
            let records = records_of(&snapshot, change).filter(|it| !it.proposed);
            records.map(|it| ChangeRecord { proposed: true, ..ChangeRecord::clone(it) }).collect::<Vec<_>>()
        });
        let new = new.unwrap_or_default();
        if !new.is_empty() {
            let who = named(&new.iter().map(|it| it.who.clone()).collect());
            let before = snapshot.objects.get(&id).map(|object| &object.manifest[..]);
            let after = (action == ChangeAction::Apply).then_some(manifest);
            let detail = AuditDetail::of(before, after);
            let proposed = Some(Box::new(("waits for an approval".to_owned(), detail)));
            let action = AuditAction { who, action: "propose", object: id.to_string(), proposed };
            let write = |_: &Snapshot| {
                let put = |transaction: Transaction, it: &ChangeRecord| {
                    Ok::<_, ChangeError>(transaction.put(change_key(uid, &it.id())?, encode(it)))
                };
                Ok((new.iter().try_fold(Transaction::default(), put)?, ()))
            };
            self.registry.change(&action, write).await?;
        }
        if id.kind != Kind::FederatedNetworkPolicy {
            return Ok(());
        }
        let Some(wanted) = staged(&id, action, manifest) else { return Ok(()) };
        let found = snapshot.objects.get(&staged_id(&id));
        // One of a user stays.
        if found.is_none_or(|object| is_marked(&object.manifest) && object.manifest != wanted) {
            self.edit_alone(Sent::of_hub_apply(wanted)).await?;
        }
        Ok(())
    }

    /// Removes what belongs to changes that do not wait any more, and the records of requests that led to nothing. `pending`: changes that
    /// wait, with the UIDs of their custom resources. `seen`: all custom resources, by UID.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn settle(
        &self,
        pending: &BTreeMap<ObjectId, String>,
        seen: &BTreeMap<&str, Seen>,
    ) -> Result<(), ChangeError> {
        let snapshot = self.registry.snapshot();
        let staged = snapshot.objects.iter().filter(|(id, _)| id.kind == Kind::StagedFederatedNetworkPolicy);
        let policy = |id: &ObjectId| ObjectId { kind: Kind::FederatedNetworkPolicy, name: id.name.clone() };
        for (id, object) in staged.filter(|(id, _)| !pending.contains_key(&policy(id))) {
            if is_marked(&object.manifest) {
                self.edit_alone(Sent::of_hub_delete(id.clone())).await?;
            }
        }
        let waiting: BTreeSet<&str> = pending.values().map(String::as_str).collect();
        let now = self.registry.now_seconds();
        let all = snapshot.changes.iter().flat_map(|(uid, all)| all.iter().map(move |(record, it)| (uid, record, it)));
        let over = all.filter(|(uid, _, it)| match it.proposed {
            true => !waiting.contains(&***uid),
            false => led_to_nothing(it, seen.get(&***uid), now),
        });
        // Of a hub that had no operator before.
        let proposals = snapshot.proposals.keys().map(proposal_key);
        let keys = over.map(|(uid, record, _)| change_key(uid, record)).chain(proposals).take(MAX_REMOVED);
        self.registry.remove_records(keys.collect::<Result<_, _>>()?).await
    }

    async fn edit_alone(&self, sent: Sent) -> Result<(), ChangeError> {
        match self.edit(std::slice::from_ref(&sent)).await?.pop() {
            Some(Err(error @ (ChangeError::Store(_) | ChangeError::Busy))) => Err(error),
            // A pending change that cannot be staged still waits.
            Some(Err(error)) => {
                tracing::warn!(%error, "pending change not evaluated as a staged policy");
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Sent {
    fn of_hub_apply(manifest: Bytes) -> Self {
        Self::of_hub(OperatorEdit::Apply(manifest, Origin::default()))
    }

    fn of_hub_delete(id: ObjectId) -> Self {
        Self::of_hub(OperatorEdit::Delete(id, Origin::default()))
    }

    /// An edit of the hub itself, of a kind that needs no approval.
    fn of_hub(edit: OperatorEdit) -> Self {
        let mut sent = edit.sent(OPERATOR.to_owned(), true);
        sent.origin = None;
        sent
    }
}
