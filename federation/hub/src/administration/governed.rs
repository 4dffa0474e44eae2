//! Changes of custom resources as the operator makes them: with the author that the admission webhook recorded, and with an approval
//! where the tier requires one.
//!
//! A change that waits is part of the audit log as `propose`, and is evaluated as a StagedFederatedNetworkPolicy of the same name, which
//! is marked by an annotation, unless a user has one of this name.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use hanse_kubernetes::change::digest;
use hanse_store::Transaction;
use serde_json::{Value, json};

use super::objects::{OPERATOR, OperatorEdit, Origin, Sent};
use super::state::Administration;
use crate::admission::approval::{Change, Judgement, Pending, authors_of, judge, records_of};
use crate::manifest::{self, Kind, ObjectId};
use crate::registry::records::{AuditDetail, ChangeAction, ChangeRecord, encode};
use crate::registry::{AuditAction, ChangeError, Object, Snapshot, approval_key, change_key};

/// Marks the staged policy of a change that waits for an approval.
const MARK: &str = "hanse.dev/pending-approval";
/// Records that one transaction removes; the rest is removed by age.
const MAX_REMOVED: usize = 32;
/// Authors that the audit log names.
const MAX_NAMED: usize = 4;

/// What a change of a custom resource leads to; of a deletion, the version in force. `None`: it is not one of an object in a tier.
fn subject<'a>(snapshot: &'a Snapshot, edit: &'a OperatorEdit) -> Option<(ChangeAction, &'a Origin, &'a [u8])> {
    Some(match edit {
        OperatorEdit::Apply(manifest, origin) => (ChangeAction::Apply, origin, manifest),
        OperatorEdit::Delete(id, origin) => {
            let manifest = snapshot.objects.get(id).map(|object| &object.manifest[..]);
            (ChangeAction::Delete, origin, manifest.unwrap_or_default())
        }
        OperatorEdit::RemoveCluster(_) => return None,
    })
}

fn with_change<T>(
    snapshot: &Snapshot,
    id: &ObjectId,
    edit: &OperatorEdit,
    f: impl FnOnce(&Change<'_>) -> T,
) -> Option<T> {
    let (action, Origin { uid, generation }, manifest) = subject(snapshot, edit)?;
    let digest = digest(manifest);
    Some(f(&Change { id, uid, action, generation: *generation, manifest, digest: &digest }))
}

/// The authors of an edit, as the audit log names them. `None`: they are not known.
pub(super) fn authors(snapshot: &Snapshot, id: &ObjectId, edit: &OperatorEdit) -> Option<String> {
    let authors = with_change(snapshot, id, edit, |change| authors_of(snapshot, change))?;
    (!authors.is_empty()).then(|| named(&authors))
}

fn named(authors: &BTreeSet<String>) -> String {
    let mut text = authors.iter().take(MAX_NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    if let Some(more) = authors.len().checked_sub(MAX_NAMED).filter(|more| *more > 0) {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// Adds what ends with an edit to its transaction.
///
/// # Errors
/// [`ChangeError::Pending`] when it needs an approval that does not exist.
pub(super) fn govern(
    snapshot: &Snapshot,
    id: &ObjectId,
    edit: &OperatorEdit,
    mut transaction: Transaction,
) -> Result<Transaction, ChangeError> {
    let Some((action, Origin { uid, generation }, _)) = subject(snapshot, edit) else { return Ok(transaction) };
    if let Some(Judgement::Pending(pending)) = with_change(snapshot, id, edit, |change| judge(snapshot, change)) {
        return Err(ChangeError::Pending(waits(id, &pending)));
    }
    let is_over = |it: &ChangeRecord| match action {
        ChangeAction::Delete => true,
        ChangeAction::Apply => it.action == action && it.generation <= *generation,
    };
    let changes = snapshot.changes.get(&**uid).into_iter().flatten();
    let changes = changes.filter(|(_, it)| is_over(it)).map(|(record, _)| change_key(uid, record));
    let approvals = snapshot.approvals.iter().filter(|(_, it)| it.uid == *uid && it.generation <= *generation);
    let approvals = approvals.map(|(name, _)| approval_key(name));
    for key in approvals.chain(changes).take(MAX_REMOVED) {
        transaction = transaction.delete(key?);
    }
    Ok(transaction)
}

fn waits(id: &ObjectId, pending: &Pending) -> String {
    let tiers: Vec<&str> = pending.tiers.iter().map(|tier| &**tier).collect();
    let tiers = tiers.join(" and ");
    if pending.authors.is_empty() {
        return format!(
            "tier {tiers} requires an approval, and the author of this change is unknown, because the admission webhook did not \
             see it: write it again"
        );
    }
    format!(
        "tier {tiers} requires an approval: a user other than {} with the verb approve on it runs `hanse policy approve {id}`",
        named(&pending.authors)
    )
}

/// The staged policy of a change that waits.
fn staged(id: &ObjectId, action: ChangeAction, manifest: &[u8]) -> Option<Bytes> {
    let mut object: Value = serde_json::from_slice(manifest).ok()?;
    object["kind"] = json!(Kind::StagedFederatedNetworkPolicy.name());
    object["metadata"] = json!({"name": id.name, "annotations": {MARK: "true"}});
    let staged_action = match action {
        ChangeAction::Apply => "Set",
        ChangeAction::Delete => "Delete",
    };
    object.get_mut("spec")?.as_object_mut()?.insert("stagedAction".to_owned(), json!(staged_action));
    object.sort_all_objects();
    Some(object.to_string().into())
}

fn is_marked(manifest: &[u8]) -> bool {
    let object: Option<Value> = serde_json::from_slice(manifest).ok();
    object.is_some_and(|it| it["metadata"]["annotations"][MARK] == "true")
}

/// Whether an object of the hub is the staged policy of a change that waits: it has no custom resource.
pub(crate) fn is_pending_stage(object: &Object) -> bool {
    object.id.kind == Kind::StagedFederatedNetworkPolicy && is_marked(&object.manifest)
}

fn staged_id(id: &ObjectId) -> ObjectId {
    ObjectId { kind: Kind::StagedFederatedNetworkPolicy, name: id.name.clone() }
}

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

    /// Removes what belongs to changes that do not wait any more. `pending`: those that do, with the UIDs of their custom resources.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn settle(&self, pending: &BTreeMap<ObjectId, String>) -> Result<(), ChangeError> {
        let snapshot = self.registry.snapshot();
        let staged = snapshot.objects.iter().filter(|(id, _)| id.kind == Kind::StagedFederatedNetworkPolicy);
        let policy = |id: &ObjectId| ObjectId { kind: Kind::FederatedNetworkPolicy, name: id.name.clone() };
        for (id, object) in staged.filter(|(id, _)| !pending.contains_key(&policy(id))) {
            if is_marked(&object.manifest) {
                self.edit_alone(Sent::of_hub_delete(id.clone())).await?;
            }
        }
        let waiting: BTreeSet<&str> = pending.values().map(String::as_str).collect();
        let over = snapshot.changes.iter().filter(|(uid, _)| !waiting.contains(&***uid));
        let over = over.flat_map(|(uid, all)| all.iter().map(move |(record, it)| (uid, record, it)));
        let keys = over.filter(|(.., it)| it.proposed).map(|(uid, record, _)| change_key(uid, record));
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

impl OperatorEdit {
    /// The object. `None`: the manifest cannot be read, or it is a registration.
    pub(super) fn id(&self) -> Option<ObjectId> {
        match self {
            Self::Apply(manifest, _) => manifest::check(manifest).ok().map(|checked| checked.id),
            Self::Delete(id, _) => Some(id.clone()),
            Self::RemoveCluster(_) => None,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_changes_become_staged_policies() {
        let id = ObjectId { kind: Kind::FederatedNetworkPolicy, name: "web".into() };
        let manifest = br#"{"apiVersion":"hanse.dev/v1alpha1","kind":"FederatedNetworkPolicy","metadata":{"name":"web","labels":{"a":"b"}},"spec":{"tier":"platform"}}"#;
        for (action, name) in [(ChangeAction::Apply, "Set"), (ChangeAction::Delete, "Delete")] {
            let staged = staged(&id, action, manifest).expect("a manifest");
            let checked = manifest::check(&staged).expect("the hub reads it");
            assert_eq!(checked.id, staged_id(&id));
            assert!(is_marked(&staged) && String::from_utf8_lossy(&staged).contains(name));
        }
        assert!(!is_marked(manifest));
    }
}
