//! Federated objects: how they are applied and deleted, one by one or many on one stream.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, stream};
use hanse_identity::Identity;
use hanse_identity::spiffe::check_subdomain;
use hanse_proto::federation::v1 as wire;
use hanse_store::{Revision, Transaction};
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Status, Streaming};

use super::access::{clipped, permit};
use super::convert;
use super::edit::{OPERATOR, OperatorEdit};
use super::governed;
use super::state::{Administration, MAX_DRY_RUNS};
use crate::grants::MemberCluster;
use crate::manifest::{self, Checked, Kind, ObjectId};
use crate::registration::status;
use crate::registry::{
    Acceptance, AuditAction, ChangeError, ClusterState, MAX_OBJECT_BYTES, MAX_OBJECTS, Object, Snapshot, key,
};
use crate::roles::Need;

/// Maximum number of objects in one request of a stream.
const MAX_BATCH: usize = 1_000;
/// Objects that are read ahead of a transaction: half as many as the store allows changes (128).
const READ_AHEAD: usize = 64;
/// Time limit between two requests of a stream.
const SILENCE: Duration = Duration::from_secs(30);
/// Tokens that are deleted with a cluster, the newest first. At most 64 are valid.
const MAX_REMOVED_TOKENS: usize = 100;
/// Tiers that the error about a missing tier names.
const MAX_NAMED_TIERS: usize = 8;

/// The change of one object.
pub(super) enum Edit {
    Apply {
        checked: Box<Checked>,
        request: wire::ApplyRequest,
    },
    Delete(ObjectId),
    /// The registration of a cluster, with its MemberCluster.
    RemoveCluster(Arc<str>),
}

/// An edit as a caller sent it.
pub(super) struct Sent {
    pub(super) who: Identity,
    action: AuditAction,
    pub(super) edit: Result<Edit, String>,
    /// The edit of a custom resource that this is.
    pub(super) origin: Option<OperatorEdit>,
}

/// The result of one object.
pub(super) enum Done {
    Applied(wire::ApplyResponse),
    Deleted(wire::DeleteResponse),
}

/// A request of a stream, and the answer to it.
pub(super) trait Batch: Send + 'static {
    type One: One;
    type Answer: Send;
    fn split(self) -> (Vec<Self::One>, bool);
    fn answer(results: Vec<Result<Done, wire::ObjectRefusal>>) -> Self::Answer;
}

pub(super) trait One: Send + 'static {
    fn sent_by(self, who: &Identity) -> Sent;
}

impl One for wire::ApplyRequest {
    fn sent_by(self, who: &Identity) -> Sent {
        let checked = manifest::check(&self.manifest);
        // An unreadable manifest changes nothing, and is not recorded.
        let name = checked.as_ref().map_or_else(|_| String::new(), |checked| checked.id.to_string());
        let edit = checked.map(|checked| Edit::Apply { checked: Box::new(checked), request: self });
        Sent { who: who.clone(), action: AuditAction::new(who, "apply", name), edit, origin: None }
    }
}

impl One for wire::DeleteRequest {
    fn sent_by(self, who: &Identity) -> Sent {
        let action = AuditAction::new(who, "delete", clipped(&self.name));
        let id = check_subdomain(&self.name).map_err(|error| format!("name: {error}")).and_then(|()| {
            let kind = convert::kind_from_wire(self.kind).map_err(|status| status.message().to_owned())?;
            Ok(ObjectId { kind: kind.ok_or("kind: missing")?, name: self.name.as_str().into() })
        });
        let who = who.clone();
        match id {
            Ok(id) => {
                let action = AuditAction { object: id.to_string(), ..action };
                Sent { who, action, edit: Ok(Edit::Delete(id)), origin: None }
            }
            Err(error) => Sent { who, action, edit: Err(error), origin: None },
        }
    }
}

impl Batch for wire::ApplyManyRequest {
    type One = wire::ApplyRequest;
    type Answer = wire::ApplyManyResponse;

    fn split(self) -> (Vec<wire::ApplyRequest>, bool) {
        (self.objects, self.dry_run)
    }

    fn answer(results: Vec<Result<Done, wire::ObjectRefusal>>) -> wire::ApplyManyResponse {
        use wire::apply_result::Result as Wire;
        let results = results.into_iter().filter_map(|result| match result {
            Ok(Done::Applied(applied)) => Some(Wire::Applied(applied)),
            Ok(Done::Deleted(_)) => None,
            Err(refusal) => Some(Wire::Refused(refusal)),
        });
        wire::ApplyManyResponse { results: results.map(|it| wire::ApplyResult { result: Some(it) }).collect() }
    }
}

impl Batch for wire::DeleteManyRequest {
    type One = wire::DeleteRequest;
    type Answer = wire::DeleteManyResponse;

    fn split(self) -> (Vec<wire::DeleteRequest>, bool) {
        (self.objects, false)
    }

    fn answer(results: Vec<Result<Done, wire::ObjectRefusal>>) -> wire::DeleteManyResponse {
        use wire::delete_result::Result as Wire;
        let results = results.into_iter().filter_map(|result| match result {
            Ok(Done::Deleted(deleted)) => Some(Wire::Deleted(deleted)),
            Ok(Done::Applied(_)) => None,
            Err(refusal) => Some(Wire::Refused(refusal)),
        });
        wire::DeleteManyResponse { results: results.map(|it| wire::DeleteResult { result: Some(it) }).collect() }
    }
}

impl Done {
    /// The same change, which waits, with the reason as a warning for its author.
    pub(super) fn waiting(mut self, why: String) -> Self {
        match &mut self {
            Self::Applied(applied) => {
                applied.applied = wire::Applied::Pending.into();
                applied.warnings.push(why);
            }
            Self::Deleted(deleted) => {
                deleted.pending = true;
                deleted.warnings.push(why);
            }
        }
        self
    }

    /// Sets the revision of a change. An unchanged object has the revision of its last change.
    pub(super) fn at(mut self, revision: Revision) -> Self {
        let (Self::Applied(wire::ApplyResponse { revision: at, .. })
        | Self::Deleted(wire::DeleteResponse { revision: at, .. })) = &mut self;
        if *at == 0 {
            *at = revision;
        }
        self
    }
}

impl Administration {
    /// Makes changes of the operator, in order: they are validated and recorded as those of a user.
    ///
    /// # Errors
    /// When the store fails: then later ones were not made.
    pub(crate) async fn operate(&self, edits: &[OperatorEdit]) -> Result<Vec<Result<(), ChangeError>>, ChangeError> {
        self.find_authors(edits).await?;
        let snapshot = self.registry.snapshot();
        let sent = |edit: &OperatorEdit| {
            let author = edit.id().and_then(|id| governed::authors(&snapshot, &id, edit));
            // A policy that is stored before its tier would come into force with it, without an approval.
            edit.sent(author.unwrap_or_else(|| OPERATOR.to_owned()), !self.has_webhook())
        };
        let sent: Vec<Sent> = edits.iter().map(sent).collect();
        let mut outcomes = Vec::with_capacity(sent.len());
        while outcomes.len() < sent.len() {
            let next = &sent[outcomes.len()..];
            outcomes.extend(self.edit(&next[..next.len().min(READ_AHEAD)]).await?.into_iter().map(|it| it.map(drop)));
        }
        for (edit, outcome) in edits.iter().zip(&outcomes) {
            if matches!(outcome, Err(ChangeError::Pending(_))) {
                self.propose(edit).await?;
            }
        }
        Ok(outcomes)
    }

    /// An edit of a user. Where custom resources are the truth, a change here would be reverted.
    fn sent_by_user(&self, one: impl One, who: &Identity) -> Sent {
        let mut sent = one.sent_by(who);
        let kind = match &sent.edit {
            Ok(Edit::Apply { checked, .. }) => Some(checked.id.kind),
            Ok(Edit::Delete(id)) => Some(id.kind),
            Ok(Edit::RemoveCluster(_)) => Some(Kind::MemberCluster),
            Err(_) => None,
        };
        if let Some(kind) = kind.filter(|kind| self.operated.contains(kind)) {
            let kind = kind.name();
            sent.edit = Err(format!(
                "kind: the operator of this hub reconciles {kind}: use kubectl with the management cluster, or this command with \
                 --kubeconfig FILE"
            ));
        }
        sent
    }

    pub(super) async fn apply(
        &self,
        who: &Identity,
        request: wire::ApplyRequest,
        dry_run: bool,
    ) -> Result<wire::ApplyResponse, ChangeError> {
        let sent = self.sent_by_user(request, who);
        let done = match dry_run {
            true => self.judge(&sent, &mut Snapshot::clone(&self.registry.snapshot())).await,
            false => self.edit_of_user(std::slice::from_ref(&sent)).await?.pop().unwrap_or(Err(ChangeError::Busy)),
        };
        match done? {
            Done::Applied(applied) => Ok(applied),
            Done::Deleted(_) => Err(ChangeError::Busy),
        }
    }

    pub(super) async fn delete(
        &self,
        who: &Identity,
        request: wire::DeleteRequest,
    ) -> Result<wire::DeleteResponse, ChangeError> {
        let sent = self.sent_by_user(request, who);
        match self.edit_of_user(std::slice::from_ref(&sent)).await?.pop().unwrap_or(Err(ChangeError::Busy))? {
            Done::Deleted(deleted) => Ok(deleted),
            Done::Applied(_) => Err(ChangeError::Busy),
        }
    }

    /// Makes as many edits as fit into one transaction, from the first on.
    pub(super) async fn edit(&self, sent: &[Sent]) -> Result<Vec<Result<Done, ChangeError>>, ChangeError> {
        let outcomes = self.registry.change_many(sent, |sent| &sent.action, Sent::decide).await?;
        Ok(outcomes.into_iter().map(|it| it.map(|(revision, done)| done.at(revision))).collect())
    }

    /// Decides an edit on `draft`, and applies it there.
    async fn judge(&self, sent: &Sent, draft: &mut Snapshot) -> Result<Done, ChangeError> {
        let (changes, done) = match sent.decide(draft) {
            // Denials of dry runs are recorded, too.
            Err(ChangeError::Denied(text)) => {
                let denied = self.registry.change::<()>(&sent.action, |_| Err(ChangeError::Denied(text.clone())));
                return Err(denied.await.err().unwrap_or(ChangeError::Denied(text)));
            }
            Err(ChangeError::Pending(why)) => return Ok(sent.decide_alone(draft)?.1.waiting(why)),
            decided => decided?,
        };
        let now = self.registry.snapshot().revision;
        draft.preview(&changes);
        Ok(done.at(now))
    }

    /// Answers a stream of edits.
    pub(super) fn edit_many<Q: Batch>(&self, who: Identity, requests: Streaming<Q>) -> Answers<Q::Answer> {
        let editing = Editing {
            administration: self.clone(),
            who,
            requests,
            unread: VecDeque::new(),
            sent: VecDeque::new(),
            dry_run: None,
        };
        Box::pin(stream::try_unfold(editing, |mut editing| async move {
            Ok(editing.next().await?.map(|results| (Q::answer(results), editing)))
        }))
    }
}

pub(super) type Answers<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

/// A stream of edits under way.
struct Editing<Q: Batch> {
    administration: Administration,
    who: Identity,
    requests: Streaming<Q>,
    unread: VecDeque<Q::One>,
    sent: VecDeque<Sent>,
    /// Known with the first request; of a dry run with what it would have written.
    dry_run: Option<Option<(Snapshot, OwnedSemaphorePermit)>>,
}

impl<Q: Batch> Editing<Q> {
    /// The results of the next transaction. None: all are done.
    async fn next(&mut self) -> Result<Option<Vec<Result<Done, wire::ObjectRefusal>>>, Status> {
        while self.sent.is_empty() && self.unread.is_empty() {
            let message = tokio::time::timeout(SILENCE, self.requests.message()).await;
            let message = message.map_err(|_| Status::deadline_exceeded("no request within 30 seconds"))?;
            let Some(request) = message? else { return Ok(None) };
            let (ones, dry_run) = request.split();
            if ones.len() > MAX_BATCH {
                return Err(Status::invalid_argument(format!("objects: at most {MAX_BATCH} in one request")));
            }
            if self.dry_run.is_none() {
                self.dry_run = Some(if dry_run { Some(self.draft()?) } else { None });
            }
            self.unread.extend(ones);
        }
        while self.sent.len() < READ_AHEAD
            && let Some(one) = self.unread.pop_front()
        {
            self.sent.push_back(self.administration.sent_by_user(one, &self.who));
        }
        let outcomes = match &mut self.dry_run {
            Some(Some((draft, _))) => {
                let mut outcomes = Vec::with_capacity(self.sent.len());
                for sent in &self.sent {
                    outcomes.push(self.administration.judge(sent, draft).await);
                }
                // Without a denial, nothing above yields.
                tokio::task::yield_now().await;
                outcomes
            }
            _ => self.administration.edit_of_user(self.sent.make_contiguous()).await.map_err(status)?,
        };
        self.sent.drain(..outcomes.len());
        let refusal = |error| {
            let status = status(error);
            wire::ObjectRefusal { code: status.code() as u32, message: status.message().to_owned() }
        };
        Ok(Some(outcomes.into_iter().map(|outcome| outcome.map_err(refusal)).collect()))
    }

    fn draft(&self) -> Result<(Snapshot, OwnedSemaphorePermit), Status> {
        let permit = Arc::clone(&self.administration.dry_runs).try_acquire_owned();
        let busy = |_| {
            Status::resource_exhausted(format!("the limit of {MAX_DRY_RUNS} concurrent dry runs is reached: try again"))
        };
        Ok((Snapshot::clone(&self.administration.registry.snapshot()), permit.map_err(busy)?))
    }
}

impl OperatorEdit {
    pub(super) fn sent(&self, author: String, allow_missing_tier: bool) -> Sent {
        let who = Identity::Hub;
        let sent = match self {
            Self::Apply(manifest, _) => {
                let manifest = manifest.clone();
                wire::ApplyRequest { manifest, allow_missing_tier, ..wire::ApplyRequest::default() }.sent_by(&who)
            }
            Self::Delete(id, _) => {
                let action = AuditAction::new(&who, "delete", id.to_string());
                Sent { who, action, edit: Ok(Edit::Delete(id.clone())), origin: None }
            }
            Self::RemoveCluster(name) => {
                let action = AuditAction::new(&who, "cluster.remove", format!("cluster/{name}"));
                Sent { who, action, edit: Ok(Edit::RemoveCluster(Arc::clone(name))), origin: None }
            }
        };
        Sent { action: AuditAction { who: author, ..sent.action }, origin: Some(self.clone()), ..sent }
    }
}

impl Sent {
    /// The edit, as another user made it and the hub makes it now.
    pub(super) fn of_approved(id: &ObjectId, manifest: Option<Bytes>) -> Self {
        let who = Identity::Hub;
        match manifest {
            Some(manifest) => wire::ApplyRequest { manifest, ..wire::ApplyRequest::default() }.sent_by(&who),
            None => Self {
                action: AuditAction::new(&who, "delete", id.to_string()),
                edit: Ok(Edit::Delete(id.clone())),
                origin: None,
                who,
            },
        }
    }

    /// Decides on `snapshot`: the transaction and the response.
    pub(super) fn decide(&self, snapshot: &Snapshot) -> Result<(Transaction, Done), ChangeError> {
        if let Some(withdrawn) = self.withdraw(snapshot)? {
            return Ok(withdrawn);
        }
        let (transaction, done) = self.decide_alone(snapshot)?;
        match (&self.origin, self.id()) {
            (Some(edit), Some(id)) if !transaction.changes.is_empty() => {
                Ok((governed::govern(snapshot, id, edit, transaction)?, done))
            }
            (None, Some(id)) if matches!(self.who, Identity::User(_)) => {
                Ok((self.govern_user(snapshot, id, transaction)?, done))
            }
            _ => Ok((transaction, done)),
        }
    }

    /// The object. `None`: it is not known, or a registration.
    pub(super) fn id(&self) -> Option<&ObjectId> {
        match &self.edit {
            Ok(Edit::Apply { checked, .. }) => Some(&checked.id),
            Ok(Edit::Delete(id)) => Some(id),
            Ok(Edit::RemoveCluster(_)) | Err(_) => None,
        }
    }

    /// As [`Self::decide`], without regard to approvals.
    pub(super) fn decide_alone(&self, snapshot: &Snapshot) -> Result<(Transaction, Done), ChangeError> {
        match &self.edit {
            Err(error) => Err(ChangeError::Invalid(error.clone())),
            Ok(Edit::Apply { checked, request }) => decide_apply(snapshot, &self.who, checked, request),
            Ok(Edit::Delete(id)) => decide_delete(snapshot, &self.who, id),
            Ok(Edit::RemoveCluster(name)) => decide_remove(snapshot, &self.who, name),
        }
    }
}

fn decide_apply(
    snapshot: &Snapshot,
    who: &Identity,
    checked: &Checked,
    request: &wire::ApplyRequest,
) -> Result<(Transaction, Done), ChangeError> {
    let (Checked { id, tier, member, warnings }, manifest) = (checked, &request.manifest);
    let old = snapshot.objects.get(id);
    let old_tier = old.and_then(|it| it.tier()).filter(|_| tier.is_some());
    let tiers: Vec<&str> = tier.iter().chain(&old_tier).map(|t| &**t).collect();
    permit(snapshot, who, Need::Write(id, &tiers))?;
    let done = |applied: wire::Applied, revision, warnings| {
        let (kind, name) = (convert::kind_to_wire(id.kind).into(), id.name.to_string());
        Done::Applied(wire::ApplyResponse { kind, name, revision, applied: applied.into(), warnings })
    };
    use wire::apply_request::Precondition;
    match (&request.precondition, old.map(|o| o.revision)) {
        (Some(Precondition::Revision(expected)), found) if found != Some(*expected) => {
            let found = found.map_or_else(|| "it does not exist".to_owned(), |r| format!("it is at {r}"));
            return Err(ChangeError::Conflict(format!("{id} is not at revision {expected}: {found}")));
        }
        (Some(Precondition::Absent(_)), Some(_)) => {
            return Err(ChangeError::Conflict(format!("{id} exists")));
        }
        _ => {}
    }
    let missing = tier.as_ref().filter(|tier| !has_tier(snapshot, tier));
    let mut warnings = warnings.clone();
    if let Some(tier) = missing {
        warnings.push(Acceptance::TierNotFound(Arc::clone(tier)).to_string());
    }
    if let Some(same) = old.filter(|old| old.manifest == *manifest) {
        // Unchanged: the revision is that of the last write.
        return Ok((Transaction::default(), done(wire::Applied::Unchanged, same.revision, warnings)));
    }
    if let Some(tier) = missing.filter(|_| !request.allow_missing_tier) {
        return Err(ChangeError::Invalid(missing_tier(snapshot, tier)));
    }
    // The version in force would depend on a tier that is not referenced by any stored policy, and that may be deleted.
    if let Some((tier, from)) = missing.zip(old_tier.as_ref().filter(|from| has_tier(snapshot, from))) {
        let moved = format!(
            "spec.tier: Tier {tier} does not exist: a policy that is in force in tier {from} can only be moved"
        );
        return Err(ChangeError::Invalid(format!("{moved} to a tier that exists; create Tier {tier} first")));
    }
    if old.is_none() && snapshot.objects.len() >= MAX_OBJECTS {
        return Err(ChangeError::Limit(format!("the limit of {MAX_OBJECTS} objects is reached")));
    }
    let others = snapshot.object_bytes - old.map_or(0, |old| old.manifest.len());
    if others + manifest.len() > MAX_OBJECT_BYTES {
        let text = format!("the limit of {} MiB for all objects together would be exceeded", MAX_OBJECT_BYTES >> 20);
        return Err(ChangeError::Limit(text));
    }
    if id.kind == Kind::Tier && old.is_none() && *who != Identity::Hub && manifest::requires_approval(manifest) {
        let is_early = |it: &Object| it.id.kind == Kind::FederatedNetworkPolicy && it.tier().as_ref() == Some(&id.name);
        let early = snapshot.objects.values().find(|it| is_early(it));
        if let Some(policy) = early {
            return Err(ChangeError::Conflict(format!(
                "spec.requireApproval: {} would be in force in this tier without an approval: delete it first",
                policy.id
            )));
        }
    }
    if let Some(member) = member {
        check_nets(snapshot, &id.name, member)?;
    }
    let applied = if old.is_some() { wire::Applied::Configured } else { wire::Applied::Created };
    Ok((Transaction::default().put(object_key(id)?, manifest.clone()), done(applied, 0, warnings)))
}

fn decide_delete(snapshot: &Snapshot, who: &Identity, id: &ObjectId) -> Result<(Transaction, Done), ChangeError> {
    let old = snapshot.objects.get(id);
    let tier = old.and_then(|it| it.tier());
    let tiers: Vec<&str> = tier.iter().map(|t| &**t).collect();
    // A caller without the role must not learn whether the object exists.
    permit(snapshot, who, Need::Write(id, &tiers))?;
    old.ok_or_else(|| ChangeError::NotFound(format!("{id} not found")))?;
    if id.kind == Kind::Tier {
        let policies = snapshot.objects.iter().filter(|(_, object)| object.tier().as_ref() == Some(&id.name));
        let mut policies = policies.map(|(of, _)| match of.kind {
            Kind::FederatedNetworkPolicy => of.name.to_string(),
            _ => of.to_string(),
        });
        // Without the tier, new versions of these policies could not take effect.
        if let Some(first) = policies.next() {
            let more = policies.count();
            let others = if more > 0 { format!(" and {more} more") } else { String::new() };
            let message = format!("{id} is used by {first}{others}: delete or move these policies first");
            return Err(ChangeError::Conflict(message));
        }
    }
    let has_joined = id.kind == Kind::MemberCluster
        && snapshot.clusters.get(&*id.name).is_some_and(|cluster| cluster.state == ClusterState::Accepted);
    let ungranted = || format!("cluster {} has joined: without a grant, none of its endpoints is distributed", id.name);
    let warnings = has_joined.then(ungranted).into_iter().collect();
    let done = Done::Deleted(wire::DeleteResponse { warnings, ..wire::DeleteResponse::default() });
    Ok((Transaction::default().delete(object_key(id)?), done))
}

fn decide_remove(snapshot: &Snapshot, who: &Identity, name: &Arc<str>) -> Result<(Transaction, Done), ChangeError> {
    permit(snapshot, who, Need::Operate(name))?;
    let id = ObjectId { kind: Kind::MemberCluster, name: Arc::clone(name) };
    let mut transaction = Transaction::default();
    if snapshot.objects.contains_key(&id) {
        transaction = transaction.delete(object_key(&id)?);
    }
    if snapshot.members.contains_key(name) {
        // A cluster of this name that joins later has never connected.
        for part in ["member", "lease", "heard", "silent"] {
            transaction = transaction.delete(key(&[part, name])?);
        }
    }
    // A token that the cluster has used would register it again.
    let mut tokens: Vec<_> = snapshot.tokens.iter().filter(|(_, token)| *token.cluster == **name).collect();
    tokens.sort_by_key(|(_, token)| std::cmp::Reverse(token.expires_at));
    for (id, _) in tokens.into_iter().take(MAX_REMOVED_TOKENS) {
        transaction = transaction.delete(key(&["token", id])?);
    }
    Ok((transaction, Done::Deleted(wire::DeleteResponse::default())))
}

fn has_tier(snapshot: &Snapshot, name: &Arc<str>) -> bool {
    snapshot.objects.contains_key(&ObjectId { kind: Kind::Tier, name: name.clone() })
}

fn missing_tier(snapshot: &Snapshot, tier: &str) -> String {
    let tiers: Vec<&str> = snapshot.objects.keys().filter(|id| id.kind == Kind::Tier).map(|id| &*id.name).collect();
    let stored = match tiers.len() {
        0 => "no tiers exist".to_owned(),
        1..=MAX_NAMED_TIERS => format!("existing tiers: {}", tiers.join(", ")),
        more => format!("{more} other tiers exist"),
    };
    format!(
        "spec.tier: Tier {tier} does not exist ({stored}): apply it before or together with the policy, or use \
         `hanse apply --allow-missing-tier`"
    )
}

pub(super) fn object_key(id: &ObjectId) -> Result<hanse_store::Key, ChangeError> {
    key(&["object", id.kind.name(), &id.name])
}

/// CIDRs of clusters never overlap; the later one is refused.
fn check_nets(snapshot: &Snapshot, name: &str, new: &MemberCluster) -> Result<(), ChangeError> {
    for (other, cluster) in &snapshot.clusters {
        if **other != *name
            && let Some((own, theirs)) = new.overlap(&cluster.grant)
        {
            let text =
                format!("spec.grants.cidrs: {own} overlaps with {theirs}, which is granted to the cluster {other}");
            return Err(ChangeError::Conflict(text));
        }
    }
    Ok(())
}
