//! What the operator does in one pass: it compares the custom resources with the hub's objects, and makes them equal.
//!
//! A pass takes no input, and may be repeated at any time. What failed is tried again in the next one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures::StreamExt as _;
use hanse_runtime::retry::Backoff;
use hanse_store::Revision;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::runtime::watcher;
use kube::{Api, Client, Resource as _, ResourceExt as _};
use serde_json::{Value, json};
use tokio::time::Instant;
use tracing::{info, warn};

use super::objects::{self, FINALIZER, KINDS, applied, has_finalizer};
use super::status::{Difference, Facts, Refusal, State, compare, refusal};
use crate::administration::{Administration, OperatorEdit};
use crate::manifest::{self, Kind, ObjectId};
use crate::registry::{ChangeError, Registry};
use crate::status::Realisations;
use hanse_kubernetes::answered;

/// The owner of the fields that the operator writes.
const FIELD_MANAGER: &str = "hanse-operator";
/// The shortest time between two writes of a status of which only counts differ.
const COUNTS_EVERY: Duration = Duration::from_secs(60);
/// Requests to the API server at the same time.
const CONCURRENT: usize = 8;

pub struct Reconciler {
    pub client: Client,
    pub administration: Administration,
    pub registry: Registry,
    pub realisations: Arc<dyn Realisations>,
    pub recorder: Recorder,
    tracked: BTreeMap<ObjectId, Tracked>,
    /// Kinds that were listed as a whole.
    listed: BTreeSet<Kind>,
    /// Lists that are not complete.
    listing: HashMap<Kind, BTreeMap<ObjectId, Tracked>>,
}

enum Write {
    /// A server-side apply of the status.
    Status(Value),
    /// A server-side apply of the finalizer.
    Finalizer(Value),
    /// A merge patch that removes the finalizer.
    Release(Value),
}

enum Patched {
    Made(Box<DynamicObject>),
    Gone,
    Refused(String),
}

/// One custom resource.
struct Tracked {
    object: DynamicObject,
    manifest: Bytes,
    /// The hub's refusal of this manifest, and the revision at which it was decided.
    refused: Option<(Revision, Refusal)>,
    /// Why the hub does not delete it, and the revision at which it was decided.
    blocked: Option<(Revision, String)>,
    written: Option<Instant>,
    /// After the API server refused a write of this object: no write before.
    retry: Option<(Backoff, Instant)>,
}

impl Tracked {
    fn new(kind: Kind, mut object: DynamicObject) -> Self {
        object.metadata.managed_fields = None;
        let manifest = objects::manifest(kind, &object);
        Self { object, manifest, refused: None, blocked: None, written: None, retry: None }
    }

    fn is_leaving(&self) -> bool {
        self.object.metadata.deletion_timestamp.is_some()
    }

    fn may_write(&self, now: Instant) -> bool {
        self.retry.as_ref().is_none_or(|(_, at)| *at <= now)
    }

    fn version(&self) -> u64 {
        self.object.resource_version().and_then(|it| it.parse().ok()).unwrap_or_default()
    }

    /// Replaces an older version of the same object by this one, and keeps what is known of it.
    fn follow(mut self, old: Option<Self>) -> Self {
        let Some(old) = old.filter(|old| old.object.metadata.uid == self.object.metadata.uid) else { return self };
        // An event from before the operator's last write.
        if old.version() > self.version() {
            return old;
        }
        if old.manifest == self.manifest {
            self.refused = old.refused;
        }
        Self { blocked: old.blocked, written: old.written, retry: old.retry, ..self }
    }
}

impl Reconciler {
    pub fn new(
        client: Client,
        administration: Administration,
        registry: Registry,
        realisations: Arc<dyn Realisations>,
        recorder: Recorder,
    ) -> Self {
        let (tracked, listed, listing) = Default::default();
        Self { client, administration, registry, realisations, recorder, tracked, listed, listing }
    }

    /// Takes what a watch reports. A list replaces the objects when it is complete.
    pub fn take(&mut self, kind: Kind, event: Result<watcher::Event<DynamicObject>, watcher::Error>) {
        match event {
            Ok(watcher::Event::Apply(object)) => self.take_object(kind, object),
            Ok(watcher::Event::Delete(object)) => {
                let id = objects::id(kind, &object);
                self.tracked.remove(&id);
                if self.registry.snapshot().objects.contains_key(&id) {
                    warn!(object = %id, "custom resource is gone without its finalizer: the object stays in force");
                }
            }
            Ok(watcher::Event::Init) => drop(self.listing.insert(kind, BTreeMap::new())),
            Ok(watcher::Event::InitApply(object)) => {
                let listing = self.listing.entry(kind).or_default();
                listing.insert(objects::id(kind, &object), Tracked::new(kind, object));
            }
            Ok(watcher::Event::InitDone) => {
                let mut old = std::mem::take(&mut self.tracked);
                for (id, tracked) in self.listing.remove(&kind).unwrap_or_default() {
                    let before = old.remove(&id);
                    self.tracked.insert(id, tracked.follow(before));
                }
                self.tracked.extend(old.into_iter().filter(|(id, _)| id.kind != kind));
                self.listed.insert(kind);
            }
            Err(error) => warn!(kind = kind.name(), %error, "custom resources cannot be watched"),
        }
    }

    fn take_object(&mut self, kind: Kind, object: DynamicObject) {
        let id = objects::id(kind, &object);
        let before = self.tracked.remove(&id);
        self.tracked.insert(id, Tracked::new(kind, object).follow(before));
    }

    /// Objects in the order in which they are applied. Policies wait for the list of tiers.
    fn ready(&self, kind: Kind) -> impl Iterator<Item = (&ObjectId, &Tracked)> {
        let is_ready = self.listed.contains(&kind) && (!kind.is_policy() || self.listed.contains(&Kind::Tier));
        self.tracked.iter().filter(move |(id, _)| is_ready && id.kind == kind)
    }

    /// # Errors
    /// When the API server or the store fails. What does not depend on it is done.
    pub async fn pass(&mut self) -> anyhow::Result<()> {
        let finalizers = self.add_finalizers().await;
        let applied = self.apply().await;
        let deleted = self.delete().await;
        finalizers.and(applied).and(deleted).and(self.write_statuses().await)
    }

    async fn add_finalizers(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let lacks = |it: &Tracked| !it.is_leaving() && !has_finalizer(&it.object) && it.may_write(now);
        let all = KINDS.iter().flat_map(|kind| self.ready(*kind)).filter(|(_, it)| lacks(it));
        let fields = json!({"finalizers": [FINALIZER]});
        let patches =
            all.map(|(id, it)| (id.clone(), Write::Finalizer(applied(id.kind, &it.object, &fields)))).collect();
        self.patch(patches).await.1
    }

    /// Sends writes; returns which were made. An object that is gone or replaced is left to the watch. One that the API
    /// server refuses is tried again later, and does not keep the others waiting.
    async fn patch(&mut self, patches: Vec<(ObjectId, Write)>) -> (Vec<ObjectId>, anyhow::Result<()>) {
        let client = &self.client;
        let send = |(id, write): (ObjectId, Write)| async move {
            let resource = objects::resource(id.kind).context("the kind is reconciled")?;
            let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
            let applying = PatchParams::apply(FIELD_MANAGER).force();
            let patching = async {
                let patched = match write {
                    Write::Status(status) => api.patch_status(&id.name, &applying, &Patch::Apply(status)).await,
                    Write::Finalizer(fields) => api.patch(&id.name, &applying, &Patch::Apply(fields)).await,
                    Write::Release(rest) => api.patch(&id.name, &PatchParams::default(), &Patch::Merge(rest)).await,
                };
                match patched {
                    Ok(object) => Ok(Patched::Made(Box::new(object))),
                    Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(Patched::Gone),
                    Err(kube::Error::Api(status)) if (400..429).contains(&status.code) => {
                        Ok(Patched::Refused(status.message))
                    }
                    Err(error) => Err(error),
                }
            };
            let patched = answered(patching).await.with_context(|| format!("write {id} to the API server"))?;
            anyhow::Ok((id, patched))
        };
        let sent: Vec<_> = futures::stream::iter(patches).map(send).buffer_unordered(CONCURRENT).collect().await;
        let (mut made, mut outcome, mut refused) = (Vec::new(), Ok(()), 0);
        for result in sent {
            match result {
                Ok((id, Patched::Made(object))) => {
                    // Without its last finalizer, an object that is being deleted is gone.
                    if object.metadata.deletion_timestamp.is_none() || !object.finalizers().is_empty() {
                        self.take_object(id.kind, *object);
                    } else {
                        self.tracked.remove(&id);
                    }
                    self.tracked.get_mut(&id).into_iter().for_each(|it| it.retry = None);
                    made.push(id);
                }
                Ok((_, Patched::Gone)) => {}
                Ok((id, Patched::Refused(why))) => {
                    refused += 1;
                    if refused == 1 {
                        warn!(object = %id, error = why, "the API server refuses a write of the operator");
                    }
                    if let Some(tracked) = self.tracked.get_mut(&id) {
                        let first = || (Backoff::new(Duration::from_secs(1), Duration::from_secs(60)), Instant::now());
                        let (backoff, at) = tracked.retry.get_or_insert_with(first);
                        *at = Instant::now() + backoff.next_delay();
                    }
                }
                Err(error) => outcome = Err(error),
            }
        }
        if refused > 1 {
            warn!(refused, "the API server refuses writes of the operator");
        }
        (made, outcome)
    }

    /// Writes what differs to the store.
    async fn apply(&mut self) -> anyhow::Result<()> {
        let snapshot = self.registry.snapshot();
        let mut edits = Vec::new();
        for (id, it) in KINDS.iter().flat_map(|kind| self.ready(*kind)) {
            let is_stored = snapshot.objects.get(id).is_some_and(|object| object.manifest == it.manifest);
            let is_refused = it.refused.as_ref().is_some_and(|(at, _)| *at == snapshot.revision);
            // Only with the finalizer, the deletion of an object is seen in any case.
            if !it.is_leaving() && has_finalizer(&it.object) && !is_stored && !is_refused {
                edits.push((id.clone(), OperatorEdit::Apply(it.manifest.clone())));
            }
        }
        let (ids, edits): (Vec<ObjectId>, Vec<OperatorEdit>) = edits.into_iter().unzip();
        let outcomes = self.administration.operate(&edits).await.context("write to the store")?;
        let now = self.registry.snapshot();
        for (id, outcome) in ids.into_iter().zip(outcomes) {
            let Some(tracked) = self.tracked.get_mut(&id) else { continue };
            tracked.refused = match outcome {
                Ok(()) => None,
                Err(error @ (ChangeError::Store(_) | ChangeError::Busy)) => {
                    return Err(error).with_context(|| format!("write {id} to the store"));
                }
                Err(error) => {
                    let tier = manifest::tier_in(&tracked.manifest).filter(|_| id.kind.is_policy());
                    let tier = tier.map(|name| ObjectId { kind: Kind::Tier, name });
                    let reason = match error {
                        _ if tier.is_some_and(|tier| !now.objects.contains_key(&tier)) => "TierNotFound",
                        ChangeError::Conflict(_) => "Conflict",
                        ChangeError::Limit(_) => "LimitReached",
                        _ => "Invalid",
                    };
                    Some((now.revision, Refusal { reason, message: error.to_string() }))
                }
            };
        }
        // What the hub stores already was accepted when it was stored.
        for (id, tracked) in &mut self.tracked {
            if now.objects.get(id).is_some_and(|object| object.manifest == tracked.manifest) {
                tracked.refused = None;
            }
        }
        Ok(())
    }

    /// Deletes what is being deleted, policies before their tiers, and then releases it.
    async fn delete(&mut self) -> anyhow::Result<()> {
        for kind in KINDS.iter().rev() {
            let now = self.registry.snapshot().revision;
            let is_blocked = |it: &Tracked| it.blocked.as_ref().is_some_and(|(at, _)| *at == now);
            let leaving = self.ready(*kind).filter(|(_, it)| it.is_leaving() && has_finalizer(&it.object));
            let leaving = leaving.filter(|(_, it)| !is_blocked(it));
            let leaving: Vec<ObjectId> = leaving.map(|(id, _)| id.clone()).collect();
            if leaving.is_empty() {
                continue;
            }
            let resource = objects::resource(*kind).context("the kind is reconciled")?;
            let definition = format!("{}.hanse.dev", resource.plural);
            let is_decision = self.is_served(&definition).await?;
            let mut released = Vec::new();
            for id in leaving {
                let snapshot = self.registry.snapshot();
                if !is_decision {
                    warn!(object = %id, definition, "definition is being deleted: the object stays in force");
                } else if snapshot.objects.contains_key(&id) {
                    let outcome = self.administration.operate(&[OperatorEdit::Delete(id.clone())]).await?.pop();
                    match outcome.unwrap_or(Err(ChangeError::Busy)) {
                        Ok(()) => info!(object = %id, "object deleted with its custom resource"),
                        Err(ChangeError::NotFound(_)) => {}
                        Err(ChangeError::Conflict(why)) => {
                            let at = self.registry.snapshot().revision;
                            let tracked = self.tracked.get_mut(&id);
                            tracked.into_iter().for_each(|it| it.blocked = Some((at, why.clone())));
                            continue;
                        }
                        Err(error) => return Err(error).with_context(|| format!("delete {id} from the store")),
                    }
                }
                if let Some(tracked) = self.tracked.get(&id).filter(|it| it.may_write(Instant::now())) {
                    released.push((id, Write::Release(objects::released(&tracked.object))));
                }
            }
            self.patch(released).await.1?;
        }
        Ok(())
    }

    /// Whether a definition exists and stays: all objects are deleted with it, which is not the decision to delete a policy.
    async fn is_served(&self, definition: &str) -> anyhow::Result<bool> {
        let api: Api<PartialObjectMeta<CustomResourceDefinition>> = Api::all(self.client.clone());
        let found = answered(api.get_opt(definition)).await;
        let found = found.with_context(|| format!("read the CustomResourceDefinition {definition}"))?;
        Ok(found.is_some_and(|it| it.metadata.deletion_timestamp.is_none()))
    }

    /// Writes statuses that differ: conditions at once, counts at most once in [`COUNTS_EVERY`] for each object.
    async fn write_statuses(&mut self) -> anyhow::Result<()> {
        let (snapshot, now) = (self.registry.snapshot(), Instant::now());
        let mut patches = Vec::new();
        let state = State::new(&snapshot, &*self.realisations);
        for (id, it) in KINDS.iter().flat_map(|kind| self.ready(*kind)) {
            if !it.may_write(now) || !has_finalizer(&it.object) || it.is_leaving() && it.blocked.is_none() {
                continue;
            }
            let old = it.object.data.get("status");
            let is_stored = snapshot.objects.get(id).is_some_and(|object| object.manifest == it.manifest);
            let facts = Facts {
                is_stored,
                generation: it.object.metadata.generation.unwrap_or_default(),
                refusal: it.refused.as_ref().map(|(_, refusal)| refusal),
                blocked: it.blocked.as_ref().map(|(_, why)| why.as_str()),
                nets: it.object.data["spec"]["nets"].as_array().map_or(0, Vec::len),
            };
            let status = state.status(id, facts, old);
            let is_due = match compare(old, &status) {
                Difference::None => false,
                Difference::Counts => it.written.is_none_or(|at| now.duration_since(at) >= COUNTS_EVERY),
                Difference::Conditions => true,
            };
            if is_due {
                let refused = refusal(&status).filter(|it| old.and_then(refusal).as_ref() != Some(it));
                let refused = refused.map(|(reason, message)| (reason.to_owned(), message.to_owned()));
                patches.push((id.clone(), applied(id.kind, &it.object, &json!({"status": status})), refused));
            }
        }
        drop(state);
        let mut refusals: BTreeMap<ObjectId, (String, String)> = BTreeMap::new();
        let mut sending = Vec::new();
        for (id, patch, refused) in patches {
            refusals.extend(refused.map(|refused| (id.clone(), refused)));
            sending.push((id, Write::Status(patch)));
        }
        let (made, outcome) = self.patch(sending).await;
        for id in &made {
            let Some(tracked) = self.tracked.get_mut(id) else { continue };
            tracked.written = Some(now);
            if let Some((reason, message)) = refusals.remove(id) {
                self.publish(id, reason, message).await;
            }
        }
        outcome
    }

    /// An Event about a refusal. Where it cannot be written, the condition says the same.
    async fn publish(&self, id: &ObjectId, reason: String, message: String) {
        let Some((tracked, resource)) = self.tracked.get(id).zip(objects::resource(id.kind)) else { return };
        let reference: ObjectReference = tracked.object.object_ref(&resource);
        // At most 1 KiB.
        let note = message.chars().take(250).collect();
        let event =
            Event { type_: EventType::Warning, reason, note: Some(note), action: "Apply".to_owned(), secondary: None };
        if let Err(error) = answered(self.recorder.publish(&event, &reference)).await {
            warn!(object = %id, error = format!("{error:#}"), "event not written");
        }
    }
}
