//! Changes of custom resources as the operator makes them: with the author that the admission webhook recorded, and with an approval
//! where the tier requires one.
//!
//! A change that waits is part of the audit log as `propose`, and is evaluated as a StagedFederatedNetworkPolicy of the same name, which
//! is marked by an annotation, unless a user has one of this name.

use std::collections::BTreeSet;

use bytes::Bytes;
use hanse_kubernetes::change::digest;
use hanse_store::Transaction;
use serde_json::{Value, json};

use super::edit::{OperatorEdit, Origin};
use crate::admission::approval::{Change, Judgement, Pending, authors_of, judge};
use crate::manifest::{Kind, ObjectId};
use crate::registry::records::{ChangeAction, ChangeRecord};
use crate::registry::{ChangeError, Object, Snapshot, approval_key, change_key};

/// Marks the staged policy of a change that waits for an approval.
const MARK: &str = "hanse.dev/pending-approval";
/// Records that one transaction removes; the rest is removed by age.
const MAX_REMOVED: usize = 32;
/// Authors that the audit log names.
const MAX_NAMED: usize = 4;

/// What a change of a custom resource leads to; of a deletion, the version in force. `None`: it is not one of an object in a tier.
pub(super) fn subject<'a>(
    snapshot: &'a Snapshot,
    edit: &'a OperatorEdit,
) -> Option<(ChangeAction, &'a Origin, &'a [u8])> {
    Some(match edit {
        OperatorEdit::Apply(manifest, origin) => (ChangeAction::Apply, origin, manifest),
        OperatorEdit::Delete(id, origin) => {
            let manifest = snapshot.objects.get(id).map(|object| &object.manifest[..]);
            (ChangeAction::Delete, origin, manifest.unwrap_or_default())
        }
        OperatorEdit::RemoveCluster(_) => return None,
    })
}

pub(super) fn with_change<T>(
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

pub(super) fn named(authors: &BTreeSet<String>) -> String {
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
    let keep = match pending.action {
        ChangeAction::Apply => String::new(),
        ChangeAction::Delete => {
            format!("; to keep the object, a user with the verb use runs `hanse policy reject {id}`")
        }
    };
    format!(
        "tier {tiers} requires an approval: a user other than {} with the verb approve on it runs `hanse policy approve {id}`{keep}",
        named(&pending.authors)
    )
}

/// The staged policy of a change that waits.
pub(super) fn staged(id: &ObjectId, action: ChangeAction, manifest: &[u8]) -> Option<Bytes> {
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

pub(super) fn is_marked(manifest: &[u8]) -> bool {
    let object: Option<Value> = serde_json::from_slice(manifest).ok();
    object.is_some_and(|it| it["metadata"]["annotations"][MARK] == "true")
}

/// Whether an object of the hub is the staged policy of a change that waits: it has no custom resource.
pub(crate) fn is_pending_stage(object: &Object) -> bool {
    object.id.kind == Kind::StagedFederatedNetworkPolicy && is_marked(&object.manifest)
}

pub(super) fn staged_id(id: &ObjectId) -> ObjectId {
    ObjectId { kind: Kind::StagedFederatedNetworkPolicy, name: id.name.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

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
