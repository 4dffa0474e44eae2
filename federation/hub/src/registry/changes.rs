//! Changes of custom resources as the admission webhook saw them, until the operator has seen their result.
//!
//! A record says who sent a request, and not that it succeeded: an API server may refuse it after the webhook. It becomes part of the
//! audit log when the operator sees the object with that generation and digest. Records of requests that led to nothing are removed
//! [`DECIDED_WITHIN`] later where the operator sees the object as it was before, and after [`MAX_AGE`] in any case.

use std::sync::Arc;
use std::time::Duration;

use hanse_store::{Compare, Key, Outcome, Prefix, Transaction};

use super::records::{self, ApprovalRecord, ChangeRecord};
use super::{ChangeError, Registry, invalid, key};

/// Records of changes that are not finished: 20,000 × about 500 bytes is 10 MiB. Further changes are refused until some are.
pub const MAX_CHANGES: usize = 20_000;
/// Records of one version of an object, one for each user that sent it.
const MAX_AUTHORS: usize = 16;
/// Of these, of one user, so that one whose requests lead to nothing leaves room for others.
const MAX_OF_USER: usize = MAX_CHANGES / 4;
/// Of these, of one object.
const MAX_OF_OBJECT: usize = 64;
/// API servers decide a request within a minute, and the operator sees the result within seconds while it runs.
pub const DECIDED_WITHIN: Duration = Duration::from_secs(300);
/// The operator may not run for longer than [`DECIDED_WITHIN`].
pub const MAX_AGE: Duration = Duration::from_secs(86_400);

impl Registry {
    /// Records a request before it is allowed. The same request is recorded once.
    ///
    /// # Errors
    /// When a limit is reached, or the store fails.
    pub async fn record_change(&self, uid: &str, change: &ChangeRecord) -> Result<(), ChangeError> {
        let snapshot = self.snapshot();
        let of_object = snapshot.changes.get(uid);
        let id = change.id();
        if of_object.is_some_and(|all| all.contains_key(&*id)) {
            return Ok(());
        }
        let is_same = |it: &&Arc<ChangeRecord>| it.is_version(change.action, change.generation, &change.digest);
        let authors = of_object.into_iter().flat_map(|all| all.values()).filter(is_same).count();
        let all: usize = snapshot.changes.values().map(|all| all.len()).sum();
        let of_user = snapshot.changes.values().flat_map(|all| all.values()).filter(|it| it.who == change.who).count();
        for (count, limit, of) in [
            (authors, MAX_AUTHORS, "of this version".to_owned()),
            (of_object.map_or(0, |all| all.len()), MAX_OF_OBJECT, "of this object".to_owned()),
            (of_user, MAX_OF_USER, format!("of user {}", change.who)),
            (all, MAX_CHANGES, "of all users".to_owned()),
        ] {
            if count >= limit {
                let minutes = DECIDED_WITHIN.as_secs() / 60;
                return Err(ChangeError::Limit(format!(
                    "the limit of {limit} unfinished changes {of} is reached: try again in {minutes} minutes, when the operator has \
                     removed those that led to nothing"
                )));
            }
        }
        let name = key(&["change", uid, &id])?;
        let write = Transaction::default().when(Compare::Absent(name.clone())).put(name, records::encode(change));
        self.write_unaudited(write).await
    }

    /// Records the author of a PolicyApproval with this UID before its creation is allowed. A record is never replaced: a later request
    /// with the same UID would take the place of the approval that was reviewed.
    ///
    /// # Errors
    /// When a limit is reached, another approval has this UID, or the store fails.
    pub async fn record_approval(&self, uid: &str, approval: &ApprovalRecord) -> Result<(), ChangeError> {
        if self.snapshot().approvals.len() >= MAX_CHANGES {
            let text = format!("the limit of {MAX_CHANGES} unused approvals is reached: delete PolicyApprovals");
            return Err(ChangeError::Limit(text));
        }
        self.shared.availability.check()?;
        let name = approval_key(uid)?;
        let write =
            Transaction::default().when(Compare::Absent(name.clone())).put(name.clone(), records::encode(approval));
        if let Outcome::Committed(revision) = self.checked(self.shared.store.commit(write).await)? {
            return self.shown(revision).await;
        }
        // An API server may send a request again.
        let found = self.checked(self.shared.store.read(&name).await)?;
        let found = found.and_then(|entry| records::decode::<ApprovalRecord>(&entry.value).ok());
        if found.is_some_and(|it| ApprovalRecord { at: approval.at, seen: approval.seen, ..it } == *approval) {
            return Ok(());
        }
        Err(ChangeError::Conflict(format!(
            "metadata.uid: another approval has the UID {uid}: create the PolicyApproval again"
        )))
    }

    /// Removes records that led to nothing.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn remove_records(&self, keys: Vec<Key>) -> Result<(), ChangeError> {
        for keys in keys.chunks(64) {
            self.write_unaudited(keys.iter().cloned().fold(Transaction::default(), Transaction::delete)).await?;
        }
        Ok(())
    }

    async fn write_unaudited(&self, transaction: Transaction) -> Result<(), ChangeError> {
        self.shared.availability.check()?;
        match self.checked(self.shared.store.commit(transaction).await)? {
            Outcome::Committed(revision) => self.shown(revision).await,
            // Another request wrote it.
            Outcome::Conflict => Ok(()),
        }
    }

    /// Whether the store has a record of a change of this object. The view of this process may not show yet what another replica
    /// recorded.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn has_changes(&self, uid: &str) -> Result<bool, ChangeError> {
        let prefix = Prefix::new(&["change", uid]).map_err(invalid)?;
        let listing = self.checked(self.shared.store.list(&prefix).await)?;
        if listing.entries.is_empty() {
            return Ok(false);
        }
        let newest = listing.entries.iter().map(|entry| entry.modified).max().unwrap_or_default();
        self.shown(newest).await?;
        Ok(true)
    }
}

impl Registry {
    /// Whether the store has the record of an approval.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn has_approval(&self, uid: &str) -> Result<bool, ChangeError> {
        Ok(self.checked(self.shared.store.read(&approval_key(uid)?).await)?.is_some())
    }
}

/// The key of the record of a change.
pub fn change_key(uid: &str, id: &str) -> Result<Key, ChangeError> {
    key(&["change", uid, id])
}

/// The key of the record of an approval.
pub fn approval_key(uid: &str) -> Result<Key, ChangeError> {
    key(&["approval", uid])
}
