//! Whether a change of a custom resource takes effect: pure decisions on the hub's state.
//!
//! A change of a FederatedNetworkPolicy in a tier with `requireApproval`, or that leaves one, and a change of such a Tier itself, takes
//! effect when a user other than its authors has approved exactly this change. Whether a tier requires it is decided by the Tier in
//! force, which the hub stores, so that a change of the Tier cannot allow itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::manifest::{self, Kind, ObjectId};
use crate::registry::records::{ApprovalRecord, ChangeAction, ChangeRecord};
use crate::registry::{DECIDED_WITHIN, Snapshot};

/// One change of a custom resource.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    pub id: &'a ObjectId,
    /// The UID of the custom resource.
    pub uid: &'a str,
    pub action: ChangeAction,
    /// The generation of the custom resource now.
    pub generation: i64,
    /// The manifest with the change; of a deletion, the one in force.
    pub manifest: &'a [u8],
    pub digest: &'a str,
}

/// A change that waits for an approval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    pub action: ChangeAction,
    pub generation: i64,
    pub digest: String,
    /// The tiers that require it.
    pub tiers: BTreeSet<Arc<str>>,
    /// Who sent it. Empty: the webhook has not seen it, and nothing can approve it.
    pub authors: BTreeSet<String>,
}

/// An approval with the UID of its PolicyApproval.
pub type Given = (Arc<str>, Arc<ApprovalRecord>);

/// Whether a change takes effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// It does, by this approval where one is needed.
    Effective(Option<Given>),
    Pending(Pending),
}

/// Whether this tier, as the hub has it, requires approvals.
fn requires_approval(snapshot: &Snapshot, tier: &Arc<str>) -> bool {
    let id = ObjectId { kind: Kind::Tier, name: Arc::clone(tier) };
    snapshot.objects.get(&id).is_some_and(|object| manifest::requires_approval(&object.manifest))
}

/// The tiers that require an approval of a change. `manifest`: what it leads to.
pub fn tiers_of(snapshot: &Snapshot, id: &ObjectId, manifest: &[u8]) -> BTreeSet<Arc<str>> {
    let concerned = tiers_concerned(snapshot, id, || manifest::tier_in(manifest));
    concerned.into_iter().filter(|tier| requires_approval(snapshot, tier)).collect()
}

/// The tiers of a change. `written`: that of the policy which it leads to.
fn tiers_concerned(
    snapshot: &Snapshot,
    id: &ObjectId,
    written: impl FnOnce() -> Option<Arc<str>>,
) -> BTreeSet<Arc<str>> {
    let concerned = match id.kind {
        Kind::FederatedNetworkPolicy => {
            let in_force = snapshot.objects.get(id).and_then(|object| object.tier());
            [in_force, written()]
        }
        Kind::Tier => [Some(Arc::clone(&id.name)), None],
        // Staged policies are not enforced. Sets and clusters are in no tier.
        Kind::StagedFederatedNetworkPolicy | Kind::FederatedNetworkSet | Kind::MemberCluster => [None, None],
    };
    concerned.into_iter().flatten().collect()
}

/// Which tiers require approvals. For many changes, each Tier is read once.
#[derive(Debug, Default)]
pub struct Strict(BTreeMap<Arc<str>, bool>);

impl Strict {
    /// As [`tiers_of`]. `written`: the tier of the policy which the change leads to.
    pub fn tiers_of(&mut self, snapshot: &Snapshot, id: &ObjectId, written: Option<Arc<str>>) -> BTreeSet<Arc<str>> {
        let mut tiers = tiers_concerned(snapshot, id, || written);
        tiers.retain(|tier| {
            *self.0.entry(Arc::clone(tier)).or_insert_with_key(|tier| requires_approval(snapshot, tier))
        });
        tiers
    }
}

/// The records of the requests that made a change.
pub fn records_of<'a>(snapshot: &'a Snapshot, change: &Change<'_>) -> impl Iterator<Item = &'a Arc<ChangeRecord>> {
    let (action, generation, digest) = (change.action, change.generation, change.digest.to_owned());
    let all = snapshot.changes.get(change.uid).into_iter().flat_map(|all| all.values());
    // A deletion is one, also where the object was changed while it was requested.
    all.filter(move |it| match action {
        ChangeAction::Delete => it.action == action,
        ChangeAction::Apply => it.is_version(action, generation, &digest),
    })
}

/// Who sent a change.
pub fn authors_of(snapshot: &Snapshot, change: &Change<'_>) -> BTreeSet<String> {
    records_of(snapshot, change).map(|it| it.who.clone()).collect()
}

/// Decides a change.
pub fn judge(snapshot: &Snapshot, change: &Change<'_>) -> Judgement {
    let tiers = tiers_of(snapshot, change.id, change.manifest);
    if tiers.is_empty() {
        return Judgement::Effective(None);
    }
    let authors = authors_of(snapshot, change);
    let object = change.id.to_string();
    let approves = |(_, it): &(&Arc<str>, &Arc<ApprovalRecord>)| {
        it.seen
            && it.object == object
            && it.uid == change.uid
            && it.action == change.action
            && it.generation == change.generation
            && it.digest == change.digest
            && !authors.contains(&it.who)
    };
    let given = snapshot.approvals.iter().find(approves).filter(|_| !authors.is_empty());
    match given {
        Some((uid, record)) => Judgement::Effective(Some((Arc::clone(uid), Arc::clone(record)))),
        None => {
            let (action, generation, digest) = (change.action, change.generation, change.digest.to_owned());
            Judgement::Pending(Pending { action, generation, digest, tiers, authors })
        }
    }
}

/// A custom resource as the operator sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub generation: i64,
    /// Its deletion was requested.
    pub is_leaving: bool,
}

/// Whether a recorded request had no effect, such as one that another webhook refused after this one. `seen`: `None` for an object that
/// does not exist. `now`: in seconds since 1970.
pub fn led_to_nothing(record: &ChangeRecord, seen: Option<&Seen>, now: u64) -> bool {
    if record.proposed || now.saturating_sub(record.at) <= DECIDED_WITHIN.as_secs() {
        return false;
    }
    match (record.action, seen) {
        (_, None) => true,
        // Of the version that exists, the author must stay known: it may still wait, or be refused by the hub.
        (ChangeAction::Apply, Some(seen)) => record.generation != seen.generation,
        (ChangeAction::Delete, Some(seen)) => !seen.is_leaving,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use hanse_store::{Entry, Event, Key};

    use super::*;
    use crate::registry::records::encode;

    fn put(snapshot: &mut Snapshot, key: &[&str], value: Bytes) {
        let key = Key::new(key).expect("a key");
        let revision = snapshot.revision + 1;
        let entry = Entry { key: key.clone(), value, created: revision, modified: revision, lease: None };
        snapshot.apply(&Event { revision, key, entry: Some(entry) }).expect("read");
    }

    fn tier(snapshot: &mut Snapshot, name: &str, require: bool) {
        let text = format!(
            r#"{{"apiVersion":"hanse.dev/v1alpha1","kind":"Tier","metadata":{{"name":"{name}"}},"spec":{{"requireApproval":{require}}}}}"#
        );
        put(snapshot, &["object", "Tier", name], text.into());
    }

    fn policy(tier: &str) -> Bytes {
        format!(
            r#"{{"apiVersion":"hanse.dev/v1alpha1","kind":"FederatedNetworkPolicy","metadata":{{"name":"p"}},"spec":{{"tier":"{tier}"}}}}"#
        )
        .into()
    }

    fn sent(snapshot: &mut Snapshot, who: &str, action: ChangeAction, generation: i64, digest: &str) {
        let (at, who, digest) = (0, who.to_owned(), digest.to_owned());
        let record = ChangeRecord { at, who, action, generation, digest, proposed: false };
        put(snapshot, &["change", "u", &record.id()], encode(&record));
    }

    fn approved(snapshot: &mut Snapshot, who: &str, generation: i64, digest: &str, seen: bool) {
        let (at, action, who, digest, uid) =
            (0, ChangeAction::Apply, who.to_owned(), digest.to_owned(), "u".to_owned());
        let object = "FederatedNetworkPolicy/p".to_owned();
        let record = ApprovalRecord { at, who, object, uid, action, generation, digest, seen };
        put(snapshot, &["approval", "a"], encode(&record));
    }

    #[test]
    fn changes_in_a_tier_with_approval_wait_for_another_user() {
        let id = ObjectId { kind: Kind::FederatedNetworkPolicy, name: "p".into() };
        let mut snapshot = Snapshot::default();
        tier(&mut snapshot, "open", false);
        tier(&mut snapshot, "strict", true);
        let (open, strict) = (policy("open"), policy("strict"));
        let judged = |snapshot: &Snapshot, action, generation, manifest: &[u8], digest: &str| {
            let change = Change { id: &id, uid: "u", action, generation, manifest, digest };
            judge(snapshot, &change)
        };
        let is_pending = |it: Judgement| matches!(it, Judgement::Pending(_));
        let apply = ChangeAction::Apply;

        // In a tier without approval, and where the tier does not exist.
        assert_eq!(judged(&snapshot, apply, 1, &open, "d"), Judgement::Effective(None));
        assert_eq!(judged(&snapshot, apply, 1, &policy("none"), "d"), Judgement::Effective(None));

        // Without a record of its author, an approval has no effect.
        approved(&mut snapshot, "bob", 1, "d", true);
        assert!(is_pending(judged(&snapshot, apply, 1, &strict, "d")));
        sent(&mut snapshot, "ada", apply, 1, "d");
        assert!(matches!(judged(&snapshot, apply, 1, &strict, "d"), Judgement::Effective(Some(_))));
        // Not without its PolicyApproval, for another digest, generation, action or object.
        approved(&mut snapshot, "bob", 1, "d", false);
        assert!(is_pending(judged(&snapshot, apply, 1, &strict, "d")));
        approved(&mut snapshot, "bob", 1, "d", true);
        sent(&mut snapshot, "ada", apply, 1, "e");
        sent(&mut snapshot, "ada", apply, 2, "d");
        sent(&mut snapshot, "ada", ChangeAction::Delete, 1, "d");
        assert!(is_pending(judged(&snapshot, apply, 1, &strict, "e")));
        assert!(is_pending(judged(&snapshot, apply, 2, &strict, "d")));
        put(&mut snapshot, &["object", "FederatedNetworkPolicy", "p"], strict.clone());
        assert!(is_pending(judged(&snapshot, ChangeAction::Delete, 1, &strict, "d")));
        let other = Change { id: &id, uid: "v", action: apply, generation: 1, manifest: &strict, digest: "d" };
        assert!(is_pending(judge(&snapshot, &other)));
        // A move out of the tier needs one as well.
        assert!(is_pending(judged(&snapshot, apply, 3, &open, "f")));

        // No author approves a change, also when there are several.
        sent(&mut snapshot, "bob", apply, 1, "d");
        assert!(is_pending(judged(&snapshot, apply, 1, &strict, "d")));
        approved(&mut snapshot, "eve", 1, "d", true);
        assert!(matches!(judged(&snapshot, apply, 1, &strict, "d"), Judgement::Effective(Some(_))));
    }

    #[test]
    fn requests_without_an_effect_are_forgotten_in_minutes() {
        let record = |action, generation, at| {
            let (who, digest) = ("ada".to_owned(), "d".to_owned());
            ChangeRecord { at, who, action, generation, digest, proposed: false }
        };
        let seen = |generation, is_leaving| Some(Seen { generation, is_leaving });
        let late = DECIDED_WITHIN.as_secs() + 1;
        let (apply, delete) = (ChangeAction::Apply, ChangeAction::Delete);
        for (action, generation, seen, is_over) in [
            (apply, 1, None, true),
            (delete, 1, None, true),
            (apply, 2, seen(1, false), true),
            (apply, 1, seen(2, false), true),
            (apply, 2, seen(2, false), false),
            (delete, 2, seen(2, false), true),
            (delete, 2, seen(2, true), false),
        ] {
            let record = record(action, generation, 0);
            assert_eq!(led_to_nothing(&record, seen.as_ref(), late), is_over, "{record:?} {seen:?}");
            assert!(!led_to_nothing(&record, seen.as_ref(), late - 1), "{record:?} {seen:?}");
            let proposed = ChangeRecord { proposed: true, ..record };
            assert!(!led_to_nothing(&proposed, seen.as_ref(), late), "it waits for an approval");
        }
    }

    #[test]
    fn a_tier_that_requires_approvals_is_changed_with_one_only() {
        let mut snapshot = Snapshot::default();
        tier(&mut snapshot, "strict", true);
        tier(&mut snapshot, "open", false);
        let of = |name: &str| {
            let id = ObjectId { kind: Kind::Tier, name: name.into() };
            tiers_of(&snapshot, &id, br#"{"spec":{"requireApproval":false}}"#).len()
        };
        assert_eq!([of("strict"), of("open"), of("new")], [1, 0, 0]);
    }
}
