//! Approvals at a hub without an operator, by the roles of its users.
//!
//! A change of a user in a tier with `requireApproval` is stored as a proposal: it takes effect when another user with the role
//! `approver` in the tier, or an administrator, approves exactly this change. Until then the version in force stays, and the proposal is
//! evaluated as a staged policy of the same name. The authors are the users of the certificates with which the change was sent. Which
//! tiers require approvals is decided by the tiers in force, in the transaction of the change.
//!
//! A proposal has no right of its own: it takes effect only while one of its authors may still make the change. It reserves no name:
//! another change of the object replaces it, and its authors, and those who may approve it, can drop it. Each proposal has another
//! digest, also of the same change: an approval of one that was dropped is not an approval of the next.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use hanse_identity::spiffe::check_subdomain;
use hanse_identity::{Identity, token};
use hanse_proto::federation::v1 as wire;
use hanse_store::{Key, Transaction};

use super::access::permit;
use super::convert;
use super::governed::{is_marked, named, staged, staged_id};
use super::objects::{Done, Edit, Sent, object_key};
use super::state::Administration;
use crate::admission::approval::{Strict, tiers_of};
use crate::manifest::{self, Kind, ObjectId};
use crate::registry::records::{AuditDetail, ChangeAction, ProposalRecord, TierOnce, encode};
use crate::registry::{AuditAction, ChangeError, MAX_OBJECT_BYTES, MAX_OBJECTS, Snapshot, key};
use crate::roles::Need;

/// Changes that wait, and the bytes of their manifests together.
const MAX_PROPOSALS: usize = 1_000;
const MAX_PROPOSAL_BYTES: usize = 16 << 20;
/// Of both, what one user may have as an author, so that others can still propose.
const SHARE_OF_USER: usize = 4;
/// Users that sent one change.
const MAX_AUTHORS: usize = 16;

/// What makes a proposal another one than the same change before it.
struct New {
    nonce: String,
    /// In seconds since 1970.
    at: u64,
}

/// What a change leads to.
struct Subject<'a> {
    action: ChangeAction,
    /// The manifest with the change; of a deletion, the one in force.
    manifest: &'a [u8],
}

impl Sent {
    fn subject<'a>(&'a self, snapshot: &'a Snapshot) -> Option<Subject<'a>> {
        let in_force = |id| snapshot.objects.get(id).map_or(&[][..], |object| &object.manifest[..]);
        match &self.edit {
            Ok(Edit::Apply { request, .. }) => {
                Some(Subject { action: ChangeAction::Apply, manifest: &request.manifest })
            }
            Ok(Edit::Delete(id)) => Some(Subject { action: ChangeAction::Delete, manifest: in_force(id) }),
            Ok(Edit::RemoveCluster(_)) | Err(_) => None,
        }
    }

    /// Checks that a change of a user needs no approval, and adds to its transaction what ends with it: an earlier proposal.
    ///
    /// # Errors
    /// [`ChangeError::Pending`] when it needs one.
    pub(super) fn govern_user(
        &self,
        snapshot: &Snapshot,
        id: &ObjectId,
        transaction: Transaction,
    ) -> Result<Transaction, ChangeError> {
        let Some(subject) = self.subject(snapshot) else { return Ok(transaction) };
        if !transaction.changes.is_empty() {
            let tiers = tiers_of(snapshot, id, subject.manifest);
            if !tiers.is_empty() {
                let tiers: Vec<&str> = tiers.iter().map(|tier| &**tier).collect();
                let (tiers, who) = (tiers.join(" and "), &self.who);
                return Err(ChangeError::Pending(format!(
                    "waits for an approval, which tier {tiers} requires: a user other than {who} with the role approver in it runs `hanse \
                     policy approve {id}`; until then the version in force stays"
                )));
            }
        }
        end(snapshot, id, transaction)
    }

    /// The end of a proposal, where a user deletes an object that does not exist yet. `None`: this is another edit, or the user is
    /// neither an author of the proposal nor an administrator.
    ///
    /// # Errors
    /// When a name is too long for the store.
    pub(super) fn withdraw(&self, snapshot: &Snapshot) -> Result<Option<(Transaction, Done)>, ChangeError> {
        let (Ok(Edit::Delete(id)), Identity::User(_)) = (&self.edit, &self.who) else { return Ok(None) };
        let Some(proposal) = snapshot.proposals.get(id).filter(|_| !snapshot.objects.contains_key(id)) else {
            return Ok(None);
        };
        // Also an author who has no role in the tier any more.
        let is_author = proposal.authors.contains(&self.who.to_string());
        if !is_author && permit(snapshot, &self.who, Need::Administer).is_err() {
            return Ok(None);
        }
        let warnings = vec![format!("{id} does not exist: its creation, which waited for an approval, is withdrawn")];
        let done = Done::Deleted(wire::DeleteResponse { warnings, ..wire::DeleteResponse::default() });
        Ok(Some((end(snapshot, id, Transaction::default())?, done)))
    }
}

/// Adds the end of a proposal, if there is one.
fn end(snapshot: &Snapshot, id: &ObjectId, mut transaction: Transaction) -> Result<Transaction, ChangeError> {
    if !snapshot.proposals.contains_key(id) {
        return Ok(transaction);
    }
    transaction = transaction.delete(proposal_key(id)?);
    let stage = staged_id(id);
    let is_own = |it: &&Arc<crate::registry::Object>| is_marked(&it.manifest);
    if id.kind == Kind::FederatedNetworkPolicy && snapshot.objects.get(&stage).filter(is_own).is_some() {
        transaction = transaction.delete(object_key(&stage)?);
    }
    Ok(transaction)
}

pub(super) fn proposal_key(id: &ObjectId) -> Result<Key, ChangeError> {
    key(&["proposal", id.kind.name(), &id.name])
}

impl Administration {
    /// Makes edits of users; those that need an approval become proposals, with a warning.
    ///
    /// # Errors
    /// When the store fails.
    pub(super) async fn edit_of_user(&self, sent: &[Sent]) -> Result<Vec<Result<Done, ChangeError>>, ChangeError> {
        let mut outcomes = self.edit(sent).await?;
        for (sent, outcome) in sent.iter().zip(&mut outcomes) {
            if let Err(ChangeError::Pending(why)) = outcome {
                let why = std::mem::take(why);
                *outcome = self.propose_of_user(sent, why).await;
            }
        }
        Ok(outcomes)
    }

    /// Stores a change of a user that needs an approval.
    async fn propose_of_user(&self, sent: &Sent, why: String) -> Result<Done, ChangeError> {
        let snapshot = self.registry.snapshot();
        let Some((id, subject)) = sent.id().zip(sent.subject(&snapshot)) else { return Err(ChangeError::Busy) };
        let before = snapshot.objects.get(id).map(|object| &object.manifest[..]);
        let after = (subject.action == ChangeAction::Apply).then_some(subject.manifest);
        let proposed = Some(Box::new(("waits for an approval".to_owned(), AuditDetail::of(before, after))));
        let audit = AuditAction { proposed, ..AuditAction::new(&sent.who, "propose", id.to_string()) };
        let random = token::random::<16>().map_err(ChangeError::Limit)?;
        let nonce = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let new = New { nonce, at: self.registry.now_seconds() };
        let decide = |snapshot: &Snapshot| {
            let (alone, done) = sent.decide_alone(snapshot)?;
            let subject = sent.subject(snapshot).ok_or(ChangeError::Busy)?;
            if alone.changes.is_empty() || tiers_of(snapshot, id, subject.manifest).is_empty() {
                // What is in force, or the tier, has changed since.
                return Err(ChangeError::Busy);
            }
            Ok((propose(snapshot, &sent.who, id, &subject, &new)?, done))
        };
        let (revision, done) = self.registry.change(&audit, decide).await?;
        Ok(done.at(revision).waiting(why))
    }

    /// The change of an object that waits.
    ///
    /// # Errors
    /// When there is none, or the operator decides.
    pub(super) fn pending(
        &self,
        snapshot: &Snapshot,
        request: &wire::GetPendingRequest,
    ) -> Result<wire::PendingChange, ChangeError> {
        let id = self.approvable(request.kind, &request.name)?;
        let proposal = snapshot.proposals.get(&id).ok_or_else(|| nothing(&id))?;
        let before = snapshot.objects.get(&id).map(|object| object.manifest.clone()).unwrap_or_default();
        let deletion = proposal.action == ChangeAction::Delete;
        let subject = if deletion { &before[..] } else { proposal.manifest.as_bytes() };
        let tiers = tiers_of(snapshot, &id, subject).iter().map(ToString::to_string).collect();
        Ok(wire::PendingChange {
            kind: convert::kind_to_wire(id.kind).into(),
            name: id.name.to_string(),
            deletion,
            after: Bytes::copy_from_slice(proposal.manifest.as_bytes()),
            digest: proposal.digest.clone(),
            authors: proposal.authors.iter().cloned().collect(),
            tiers,
            before,
        })
    }

    /// All changes that wait, with what `who` can do about each.
    ///
    /// # Errors
    /// When the operator decides.
    pub(super) fn all_pending(
        &self,
        snapshot: &Snapshot,
        who: &Identity,
    ) -> Result<Vec<wire::PendingSummary>, ChangeError> {
        self.decides(Kind::FederatedNetworkPolicy)?;
        let mut strict = Strict::default();
        let summary = |(id, proposal): (&ObjectId, &Arc<ProposalRecord>)| {
            let written = written_tier(snapshot, id, proposal);
            let tiers = strict.tiers_of(snapshot, id, written.clone());
            let names: Vec<&str> = tiers.iter().map(|tier| &**tier).collect();
            let may_approve = permit(snapshot, who, Need::Approve(&names)).is_ok();
            wire::PendingSummary {
                kind: convert::kind_to_wire(id.kind).into(),
                name: id.name.to_string(),
                deletion: proposal.action == ChangeAction::Delete,
                digest: proposal.digest.clone(),
                authors: proposal.authors.iter().cloned().collect(),
                tiers: names.iter().map(|tier| (*tier).to_owned()).collect(),
                since: proposal.at,
                is_authorized: is_authorized(snapshot, id, proposal, written),
                can_approve: may_approve && !tiers.is_empty() && !proposal.authors.contains(&who.to_string()),
            }
        };
        Ok(snapshot.proposals.iter().map(summary).collect())
    }

    /// Drops the change of an object that waits.
    ///
    /// # Errors
    /// When there is none with this digest, or `who` is neither one of its authors nor may approve it.
    pub(super) async fn reject(
        &self,
        who: &Identity,
        request: &wire::RejectRequest,
    ) -> Result<wire::RejectResponse, ChangeError> {
        let id = self.approvable(request.kind, &request.name)?;
        let audit = AuditAction::new(who, "reject", id.to_string());
        let decide = |snapshot: &Snapshot| Ok((reject(snapshot, who, &id, &request.digest)?, ()));
        self.registry.change(&audit, decide).await?;
        Ok(wire::RejectResponse {})
    }

    /// Makes the change of an object that waits take effect.
    ///
    /// # Errors
    /// When there is none with this digest, or `who` may not approve it.
    pub(super) async fn approve(
        &self,
        who: &Identity,
        request: &wire::ApproveRequest,
    ) -> Result<wire::ApproveResponse, ChangeError> {
        let id = self.approvable(request.kind, &request.name)?;
        let audit = AuditAction::new(who, "approve", id.to_string());
        let decide = |snapshot: &Snapshot| Ok((approve(snapshot, who, &id, &request.digest)?, ()));
        let (revision, ()) = self.registry.change(&audit, decide).await?;
        Ok(wire::ApproveResponse { revision })
    }

    fn approvable(&self, kind: i32, name: &str) -> Result<ObjectId, ChangeError> {
        let invalid = |text: String| ChangeError::Invalid(text);
        check_subdomain(name).map_err(|error| invalid(format!("name: {error}")))?;
        let kind = convert::kind_from_wire(kind).map_err(|status| invalid(status.message().to_owned()))?;
        match kind {
            Some(kind @ (Kind::FederatedNetworkPolicy | Kind::Tier)) => {
                self.decides(kind)?;
                Ok(ObjectId { kind, name: name.into() })
            }
            _ => Err(invalid("kind: only changes of FederatedNetworkPolicy and Tier need approvals".to_owned())),
        }
    }

    /// Checks that this hub decides the changes of a kind, and not its operator.
    fn decides(&self, kind: Kind) -> Result<(), ChangeError> {
        if !self.operated.contains(&kind) {
            return Ok(());
        }
        Err(ChangeError::Conflict(format!(
            "kind: the operator of this hub reconciles {}: approve its changes with a kubeconfig of the management cluster",
            kind.name()
        )))
    }
}

fn nothing(id: &ObjectId) -> ChangeError {
    ChangeError::NotFound(format!("no change of {id} waits for an approval"))
}

/// The transaction that stores a proposal. A user who sends the same change becomes one of its authors; another change replaces it.
fn propose(
    snapshot: &Snapshot,
    who: &Identity,
    id: &ObjectId,
    subject: &Subject<'_>,
    new: &New,
) -> Result<Transaction, ChangeError> {
    let in_force = snapshot.objects.get(id).map(|object| &object.manifest[..]);
    let digest = |nonce: &str| ProposalRecord::digest(subject.action, in_force, subject.manifest, nonce);
    let existing = snapshot.proposals.get(id);
    let same = existing.filter(|it| it.action == subject.action && it.digest == digest(&it.nonce));
    let (nonce, at) = same.map_or((&new.nonce, new.at), |it| (&it.nonce, it.at));
    let mut authors: BTreeSet<String> = same.map(|it| it.authors.clone()).unwrap_or_default();
    if !authors.insert(who.to_string()) {
        return Ok(Transaction::default());
    }
    let manifest = match subject.action {
        ChangeAction::Apply => std::str::from_utf8(subject.manifest)
            .map_err(|error| ChangeError::Invalid(format!("the manifest cannot be read: {error}")))?
            .to_owned(),
        ChangeAction::Delete => String::new(),
    };
    let who = who.to_string();
    let others = || snapshot.proposals.iter().filter(|(other, _)| *other != id).map(|(_, it)| it);
    let sum = |(count, bytes), it: &Arc<ProposalRecord>| (count + 1, bytes + it.manifest.len());
    let (count, bytes) = others().fold((1, manifest.len()), sum);
    let (own, own_bytes) = others().filter(|it| it.authors.contains(&who)).fold((1, manifest.len()), sum);
    let of_user = format!(" of {who}");
    for (value, limit, what, of) in [
        (authors.len(), MAX_AUTHORS, "authors of one change", ""),
        (own, MAX_PROPOSALS / SHARE_OF_USER, "changes that wait for approvals", &*of_user),
        (own_bytes, MAX_PROPOSAL_BYTES / SHARE_OF_USER, "bytes of changes that wait for approvals", &*of_user),
        (count, MAX_PROPOSALS, "changes that wait for approvals", ""),
        (bytes, MAX_PROPOSAL_BYTES, "bytes of changes that wait for approvals", ""),
    ] {
        if value > limit {
            return Err(ChangeError::Limit(format!(
                "the limit of {limit} {what}{of} is reached: approve or withdraw some"
            )));
        }
    }
    let (action, digest, nonce) = (subject.action, digest(nonce), nonce.clone());
    let record = ProposalRecord { authors, action, manifest, digest, nonce, at, tier: TierOnce::default() };
    let mut transaction = Transaction::default().put(proposal_key(id)?, encode(&record));
    let wanted = staged(id, subject.action, subject.manifest).filter(|_| id.kind == Kind::FederatedNetworkPolicy);
    if let Some(wanted) = wanted.filter(|wanted| manifest::check(wanted).is_ok()) {
        let stage = staged_id(id);
        let found = snapshot.objects.get(&stage);
        // One of a user stays.
        let is_free = found.map_or(snapshot.objects.len() < MAX_OBJECTS, |it| is_marked(&it.manifest));
        let bytes = snapshot.object_bytes - found.map_or(0, |it| it.manifest.len()) + wanted.len();
        if is_free && bytes > MAX_OBJECT_BYTES {
            // It is not evaluated, and neither is an earlier one.
            if found.is_some() {
                transaction = transaction.delete(object_key(&stage)?);
            }
        } else if is_free && found.is_none_or(|it| it.manifest != wanted) {
            transaction = transaction.put(object_key(&stage)?, wanted);
        }
    }
    Ok(transaction)
}

/// What a proposal leads to; of a deletion, the version in force.
fn leads_to(snapshot: &Snapshot, id: &ObjectId, proposal: &ProposalRecord) -> Bytes {
    match proposal.action {
        ChangeAction::Apply => Bytes::copy_from_slice(proposal.manifest.as_bytes()),
        ChangeAction::Delete => snapshot.objects.get(id).map(|object| object.manifest.clone()).unwrap_or_default(),
    }
}

/// The tier of the policy which a proposal leads to; of a deletion, that of the version in force.
fn written_tier(snapshot: &Snapshot, id: &ObjectId, proposal: &ProposalRecord) -> Option<Arc<str>> {
    match proposal.action {
        ChangeAction::Apply => proposal.tier().filter(|_| id.kind.is_policy()),
        ChangeAction::Delete => snapshot.objects.get(id).and_then(|object| object.tier()),
    }
}

/// Whether one of its authors may make the change now. `written`: the tier which it leads to.
fn is_authorized(snapshot: &Snapshot, id: &ObjectId, proposal: &ProposalRecord, written: Option<Arc<str>>) -> bool {
    let in_force = snapshot.objects.get(id).and_then(|object| object.tier());
    let tiers: Vec<Arc<str>> = in_force.into_iter().chain(written).collect();
    let tiers: Vec<&str> = tiers.iter().map(|tier| &**tier).collect();
    proposal.authors.iter().any(|author| {
        let user = author.strip_prefix("user/").and_then(|name| Identity::user(name).ok());
        user.is_some_and(|user| permit(snapshot, &user, Need::Write(id, &tiers)).is_ok())
    })
}

/// The transaction that an approval makes.
fn approve(snapshot: &Snapshot, who: &Identity, id: &ObjectId, digest: &str) -> Result<Transaction, ChangeError> {
    let proposal = snapshot.proposals.get(id);
    let in_force = || snapshot.objects.get(id).map(|object| object.manifest.clone()).unwrap_or_default();
    let manifest = proposal.map_or_else(in_force, |it| leads_to(snapshot, id, it));
    let tiers = tiers_of(snapshot, id, &manifest);
    let tiers: Vec<&str> = tiers.iter().map(|tier| &**tier).collect();
    // A caller without the role does not learn whether a change waits.
    permit(snapshot, who, Need::Approve(&tiers))?;
    let proposal = proposal.ok_or_else(|| nothing(id))?;
    let authors = named(&proposal.authors);
    if proposal.authors.contains(&who.to_string()) {
        return Err(ChangeError::Denied(format!(
            "{who} is an author of the change of {id} ({authors}): another user must approve it"
        )));
    }
    // Also where what is in force has changed since.
    let before = snapshot.objects.get(id).map(|object| &object.manifest[..]);
    let now = ProposalRecord::digest(proposal.action, before, &manifest, &proposal.nonce);
    if proposal.digest != digest || proposal.digest != now {
        return Err(ChangeError::Conflict(format!(
            "the change of {id} is another one now: review and approve it again"
        )));
    }
    if tiers.is_empty() {
        return Err(ChangeError::Conflict(format!("the change of {id} needs no approval any more: apply it again")));
    }
    if !is_authorized(snapshot, id, proposal, written_tier(snapshot, id, proposal)) {
        return Err(ChangeError::Conflict(format!(
            "the author of the change of {id} ({authors}) may not make it any more: a user with the role must send it again, or `hanse \
             policy reject {id}` drops it"
        )));
    }
    let approved = Sent::of_approved(id, (proposal.action == ChangeAction::Apply).then_some(manifest));
    let (transaction, _) = approved.decide_alone(snapshot)?;
    end(snapshot, id, transaction)
}

/// The transaction that drops a proposal.
fn reject(snapshot: &Snapshot, who: &Identity, id: &ObjectId, digest: &str) -> Result<Transaction, ChangeError> {
    let proposal = snapshot.proposals.get(id);
    if !proposal.is_some_and(|it| it.authors.contains(&who.to_string())) {
        let manifest = proposal.map(|it| leads_to(snapshot, id, it)).unwrap_or_default();
        let tiers = tiers_of(snapshot, id, &manifest);
        let tiers: Vec<&str> = tiers.iter().map(|tier| &**tier).collect();
        permit(snapshot, who, Need::Approve(&tiers))?;
    }
    let proposal = proposal.ok_or_else(|| nothing(id))?;
    if proposal.digest != digest {
        return Err(ChangeError::Conflict(format!("the change of {id} is another one now: review it again")));
    }
    end(snapshot, id, Transaction::default())
}
