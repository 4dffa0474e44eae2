//! Reviews: requests of API servers, and the answers to them.

use std::collections::BTreeSet;
use std::sync::Arc;

use hanse_api::federated::FederatedObject;
use hanse_identity::spiffe::check_subdomain;
use hanse_kubernetes::{answered, change};
use k8s_openapi::api::authentication::v1::UserInfo;
use kube::api::{ApiResource, DynamicObject};
use kube::{Api, Client, ResourceExt as _};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::access::{Access, Verb};
use super::approval::{Change, authors_of, tiers_of};
use crate::custom_resources::{ApprovalAction, FederatedNetworkPolicy, PolicyApprovalSpec, Tier};
use crate::management::{Monitor, Task};
use crate::manifest::{self, Kind, ObjectId};
use crate::metrics::HubMetrics;
use crate::registry::records::{ApprovalRecord, ChangeAction, ChangeRecord};
use crate::registry::{AuditAction, ChangeError, Registry};

/// `AdmissionReview` of `admission.k8s.io/v1`, as API servers send it. Other fields are not used.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: String,
    kind: String,
    request: Request,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    kind: GroupVersionKind,
    operation: Operation,
    user_info: UserInfo,
    object: Option<DynamicObject>,
    old_object: Option<DynamicObject>,
    #[serde(default)]
    dry_run: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct GroupVersionKind {
    group: String,
    version: String,
    kind: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    api_version: &'static str,
    kind: &'static str,
    response: AnswerBody,
}

#[derive(Debug, Serialize)]
struct AnswerBody {
    uid: String,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<AnswerStatus>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct AnswerStatus {
    code: u16,
    reason: &'static str,
    message: String,
}

/// Why a request is refused.
#[derive(Debug)]
enum Refusal {
    /// The object is wrong.
    Invalid(String),
    /// The user may not do this.
    Denied(String),
    /// It cannot be decided now.
    Unavailable(String),
}

impl Refusal {
    fn status(self) -> AnswerStatus {
        let (code, reason, message) = match self {
            Self::Invalid(message) => (422, "Invalid", message),
            Self::Denied(message) => (403, "Forbidden", message),
            Self::Unavailable(message) => (503, "ServiceUnavailable", message),
        };
        AnswerStatus { code, reason, message }
    }
}

impl From<ChangeError> for Refusal {
    fn from(error: ChangeError) -> Self {
        Self::Unavailable(format!("the hub cannot record the change: {error}"))
    }
}

/// A user of the management cluster, as the audit log names one.
fn named(user: &UserInfo) -> String {
    format!("kubernetes/{}", user.username.as_deref().unwrap_or_default())
}

/// Decides reviews.
#[derive(Clone)]
pub(super) struct Reviewer {
    client: Client,
    access: Access,
    registry: Registry,
    metrics: HubMetrics,
    monitor: Monitor,
}

impl Reviewer {
    pub(super) fn new(client: Client, registry: Registry, metrics: HubMetrics, monitor: Monitor) -> Self {
        Self { access: Access::new(client.clone(), monitor.clone()), client, registry, metrics, monitor }
    }

    /// The answer to a review, in JSON.
    ///
    /// # Errors
    /// When `body` is not a review.
    pub(super) async fn review(&self, body: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
        use serde::de::Error as _;
        let review: Review = serde_json::from_slice(body)?;
        if (&*review.api_version, &*review.kind) != ("admission.k8s.io/v1", "AdmissionReview") {
            return Err(serde_json::Error::custom("not an AdmissionReview of admission.k8s.io/v1"));
        }
        let (allowed, status, warnings) = match self.decide(&review.request).await {
            Ok(warnings) => {
                self.metrics.count_review("allowed");
                (true, None, warnings)
            }
            Err(refusal) => {
                if let Refusal::Unavailable(error) = &refusal {
                    warn!(error, "request of an API server not decided");
                }
                self.metrics.count_review(if matches!(refusal, Refusal::Unavailable(_)) {
                    "undecided"
                } else {
                    "refused"
                });
                (false, Some(refusal.status()), Vec::new())
            }
        };
        let response = AnswerBody { uid: review.request.uid, allowed, status, warnings };
        serde_json::to_vec(&Answer { api_version: "admission.k8s.io/v1", kind: "AdmissionReview", response })
    }

    /// A review had no answer within the time that API servers wait.
    pub(super) fn not_decided_in_time(&self) {
        let why = "reviews of changes were not decided in time: the API server, or a webhook for authorization, answers slowly";
        warn!("{why}");
        self.metrics.count_review("undecided");
        self.monitor.refused(Task::Review, "", why);
    }

    /// Whether a request is allowed, with warnings for its author.
    async fn decide(&self, request: &Request) -> Result<Vec<String>, Refusal> {
        let GroupVersionKind { group, version, kind } = &request.kind;
        if (&**group, &**version) != ("hanse.dev", "v1alpha1") {
            return Err(Refusal::Invalid(format!("{kind} of {group}/{version} is not known to this hub")));
        }
        let subject = match request.operation {
            Operation::Delete => &request.old_object,
            _ => &request.object,
        };
        let subject = subject.as_ref().ok_or_else(|| Refusal::Invalid("the request has no object".to_owned()))?;
        if kind == "PolicyApproval" {
            return match request.operation {
                Operation::Create => self.approve(request, subject).await,
                _ => Ok(Vec::new()),
            };
        }
        let warnings = match request.operation {
            Operation::Delete => Vec::new(),
            _ => check(kind, subject).map_err(Refusal::Invalid)?,
        };
        match Kind::from_name(kind).filter(|kind| *kind != Kind::MemberCluster) {
            None => {}
            Some(kind) => {
                let id = ObjectId { kind, name: subject.name_any().into() };
                self.authorize(request, &id).await?;
                self.record(request, kind, subject).await?;
            }
        }
        Ok(warnings)
    }

    /// Checks that the user may use the tiers of a policy: the one in which it was, the one in which it will be, and the one in which its
    /// version in force is.
    async fn authorize(&self, request: &Request, id: &ObjectId) -> Result<(), Refusal> {
        if request.operation == Operation::Delete && self.may_withdraw(request, id).await? {
            return Ok(());
        }
        // A Tier itself is a matter of the verbs on it. A set belongs to the policies of all tiers.
        let tiers: BTreeSet<Option<Arc<str>>> = match id.kind {
            Kind::Tier | Kind::MemberCluster => return Ok(()),
            Kind::FederatedNetworkSet => BTreeSet::from([None]),
            Kind::FederatedNetworkPolicy | Kind::StagedFederatedNetworkPolicy => {
                let written = [&request.object, &request.old_object].into_iter().flatten().map(|object| {
                    let tier = object.data["spec"]["tier"].as_str();
                    tier.filter(|tier| !tier.is_empty()).map(Arc::from)
                });
                let snapshot = self.registry.snapshot();
                let in_force = snapshot.objects.get(id).and_then(|object| object.tier());
                written.chain(in_force.map(Some)).collect()
            }
        };
        self.require(request, Verb::Use, &tiers, &id.to_string()).await
    }

    /// Whether the request deletes a policy that was never in force, since its creation waits for an approval, and its user may approve it.
    /// Otherwise a user could reserve names in all tiers with policies that no other user of its tier deletes.
    async fn may_withdraw(&self, request: &Request, id: &ObjectId) -> Result<bool, Refusal> {
        let snapshot = self.registry.snapshot();
        let Some(object) = request.old_object.as_ref().filter(|_| !snapshot.objects.contains_key(id)) else {
            return Ok(false);
        };
        let tiers = tiers_of(&snapshot, id, change::manifest(id.kind.name(), object).as_bytes());
        for tier in &tiers {
            let allowed = self.access.allows(&request.user_info, Verb::Approve, Some(tier)).await;
            if !allowed.map_err(|error| Refusal::Unavailable(format!("{error:#}")))? {
                return Ok(false);
            }
        }
        Ok(!tiers.is_empty())
    }

    /// Checks a right on each of the tiers; `None` is all tiers.
    async fn require(
        &self,
        request: &Request,
        verb: Verb,
        tiers: &BTreeSet<Option<Arc<str>>>,
        object: &str,
    ) -> Result<(), Refusal> {
        let user = &request.user_info;
        for tier in tiers {
            let allowed = self.access.allows(user, verb, tier.as_deref()).await;
            if allowed.map_err(|error| Refusal::Unavailable(format!("{error:#}")))? {
                continue;
            }
            let name = user.username.as_deref().unwrap_or_default();
            let tier =
                tier.as_deref().map_or_else(|| "all tiers.hanse.dev".to_owned(), |it| format!("tiers.hanse.dev/{it}"));
            let verb = verb.name();
            let message = format!("user \"{name}\" needs the verb \"{verb}\" on {tier}");
            self.record_denial(request, object, &message).await;
            return Err(Refusal::Denied(message));
        }
        Ok(())
    }

    /// Adds a refused request to the audit log, as often as the log accepts them of one user.
    async fn record_denial(&self, request: &Request, object: &str, why: &str) {
        if request.dry_run == Some(true) {
            return;
        }
        let action = match request.operation {
            Operation::Delete => "delete",
            _ if request.kind.kind == "PolicyApproval" => "approve",
            _ => "apply",
        };
        let action = AuditAction { who: named(&request.user_info), action, object: object.to_owned(), proposed: None };
        let denied = self.registry.change::<()>(&action, |_| Err(ChangeError::Denied(why.to_owned())));
        // The request is refused in any case.
        drop(denied.await);
    }

    /// Records who sends a change, before it is allowed. A request that changes nothing is not recorded.
    async fn record(&self, request: &Request, kind: Kind, subject: &DynamicObject) -> Result<(), Refusal> {
        if request.dry_run == Some(true) {
            return Ok(());
        }
        let of = |object: &DynamicObject| change::digest(change::manifest(kind.name(), object).as_bytes());
        let digest = of(subject);
        let action = match request.operation {
            Operation::Delete if subject.metadata.deletion_timestamp.is_some() => return Ok(()),
            Operation::Delete => ChangeAction::Delete,
            _ if request.old_object.as_ref().is_some_and(|old| of(old) == digest) => return Ok(()),
            _ => ChangeAction::Apply,
        };
        let uid = subject.uid().ok_or_else(|| Refusal::Invalid("the object has no metadata.uid".to_owned()))?;
        let record = ChangeRecord {
            at: self.registry.now_seconds(),
            who: named(&request.user_info),
            action,
            generation: subject.metadata.generation.unwrap_or_default(),
            digest,
            proposed: false,
        };
        Ok(self.registry.record_change(&uid, &record).await?)
    }

    /// Decides the creation of a PolicyApproval: of the pending change that it names, by a user who may and is not its author.
    async fn approve(&self, request: &Request, approval: &DynamicObject) -> Result<Vec<String>, Refusal> {
        let invalid = |message: String| Refusal::Invalid(message);
        let spec: PolicyApprovalSpec = serde_json::from_value(approval.data["spec"].clone())
            .map_err(|error| Refusal::Invalid(format!("spec: {error}")))?;
        let (kind, resource) = match Kind::from_name(&spec.kind) {
            Some(kind @ Kind::FederatedNetworkPolicy) => (kind, ApiResource::erase::<FederatedNetworkPolicy>(&())),
            Some(kind @ Kind::Tier) => (kind, ApiResource::erase::<Tier>(&())),
            _ => return Err(invalid(format!("spec.kind: changes of {} need no approval", spec.kind))),
        };
        // It becomes a part of a path: other characters would make another request, with the rights of the hub.
        check_subdomain(&spec.name).map_err(|error| invalid(format!("spec.name: {error}")))?;
        let id = ObjectId { kind, name: spec.name.as_str().into() };
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let object = answered(api.get_opt(&spec.name)).await;
        let task = Task::Approve(kind.name());
        match &object {
            Ok(_) => self.monitor.succeeded(task, ""),
            Err(error) => self.monitor.failed(task, "", error),
        }
        let object = object.map_err(|error| Refusal::Unavailable(format!("read {id}: {error:#}")))?;
        let object = object.ok_or_else(|| invalid(format!("spec.name: {id} does not exist")))?;
        let snapshot = self.registry.snapshot();
        let (is_leaving, action) = match spec.action {
            ApprovalAction::Apply => (false, ChangeAction::Apply),
            ApprovalAction::Delete => (true, ChangeAction::Delete),
        };
        let manifest = if is_leaving {
            snapshot.objects.get(&id).map(|it| it.manifest.to_vec()).unwrap_or_default()
        } else {
            change::manifest(kind.name(), &object).into_bytes()
        };
        let digest = change::digest(&manifest);
        let generation = object.metadata.generation.unwrap_or_default();
        if object.uid().as_deref() != Some(&*spec.uid) {
            return Err(invalid(format!("spec.uid: {id} is another object than the one with this UID")));
        }
        if object.metadata.deletion_timestamp.is_some() != is_leaving
            || generation != spec.generation
            || digest != spec.digest
        {
            let message = format!(
                "spec: {id} has changed since: it is at generation {generation} with digest {digest}; review the change, \
                 and approve it again"
            );
            return Err(Refusal::Invalid(message));
        }
        let change = Change { id: &id, uid: &spec.uid, action, generation, manifest: &manifest, digest: &digest };
        let tiers = tiers_of(&snapshot, &id, &manifest);
        if tiers.is_empty() {
            return Err(invalid(format!("spec: no change of {id} waits for an approval")));
        }
        let needed = tiers.into_iter().map(Some).collect();
        self.require(request, Verb::Approve, &needed, &id.to_string()).await?;
        let (who, authors) = (named(&request.user_info), authors_of(&snapshot, &change));
        if authors.is_empty() {
            let message = format!("spec: the author of the change of {id} is unknown: write {id} again");
            return Err(Refusal::Invalid(message));
        }
        if authors.contains(&who) {
            let name = request.user_info.username.as_deref().unwrap_or_default();
            let message = format!("user \"{name}\" is an author of the change of {id}: another user must approve it");
            self.record_denial(request, &id.to_string(), &message).await;
            return Err(Refusal::Denied(message));
        }
        if request.dry_run != Some(true) {
            let uid = approval.uid().ok_or_else(|| invalid("the object has no metadata.uid".to_owned()))?;
            let (at, object) = (self.registry.now_seconds(), id.to_string());
            let record = ApprovalRecord { at, who, object, uid: spec.uid, action, generation, digest, seen: false };
            self.registry.record_approval(&uid, &record).await?;
        }
        Ok(Vec::new())
    }
}

/// Checks an object as `hanse policy check` does; returns warnings.
fn check(kind: &str, object: &DynamicObject) -> Result<Vec<String>, String> {
    let bytes = change::manifest(kind, object);
    match Kind::from_name(kind) {
        // What a hub without an operator ignores.
        Some(Kind::MemberCluster) => manifest::check(bytes.as_bytes()).map(|_| Vec::new()),
        Some(_) => Ok(manifest::check(bytes.as_bytes())?.warnings),
        None => FederatedObject::read(bytes.as_bytes()).object().map(|_| Vec::new()).map_err(str::to_owned),
    }
}
