//! What the operator does in one pass: it compares the custom resources with the hub's state, and makes them equal.
//!
//! A pass takes no input, and may be repeated at any time. What failed is tried again in the next one. What the API server or the hub
//! refuses of one object delays that object only.

mod cluster_set;
mod clusters;
mod status;
mod tokens;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt as _;
use hanse_runtime::retry::Backoff;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::DynamicObject;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher;
use kube::{Api, ResourceExt as _};
use tokio::time::Instant;
use tracing::{info, warn};

use super::condition::{PENDING, Refusal};
use super::objects::Defaults;
use super::resource::{Key, Resource};
use super::statuses::Statuses;
use super::tracked::{Pending, Refused, Tracked};
use super::writer::{Patched, Write, Writer};
use crate::administration::{Administration, OperatorEdit, is_pending_stage};
use crate::admission::approval::Seen;
use crate::management::Task;
use crate::manifest::{self, Kind, ObjectId};
use crate::registry::{ChangeError, Registry};
use crate::status::Realisations;
use hanse_kubernetes::answered;

/// Objects that are read again in one pass, since the hub may decide differently: 50 × at most 1.5 MiB are in memory.
const READ_AGAIN: usize = 50;
/// Delays after a definition could not be read.
const UNDECIDED: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Objects without a custom resource that a status names.
const MAX_NAMED: usize = 32;

pub struct Reconciler {
    writer: Writer,
    administration: Administration,
    registry: Registry,
    realisations: Arc<dyn Realisations>,
    tracked: BTreeMap<Key, Tracked>,
    /// Kinds that were listed as a whole.
    listed: BTreeSet<Resource>,
    /// Lists that are not complete.
    listing: HashMap<Resource, BTreeMap<Key, Tracked>>,
    pending: Pending,
    /// Those of the ClusterSet.
    defaults: Defaults,
    /// Kinds of which it is not known whether the definition stays: nothing is deleted before.
    undecided: BTreeMap<Resource, (Backoff, Instant)>,
    /// After the API server refused to create a MemberCluster: none is created before.
    adopting: Option<(Backoff, Instant)>,
    /// The first objects of the hub without a custom resource, and the number of all.
    without_resource: (Vec<ObjectId>, usize),
    statuses: Statuses,
    /// The time that the last pass computed.
    busy: Duration,
}

impl Reconciler {
    pub fn new(
        writer: Writer,
        administration: Administration,
        registry: Registry,
        realisations: Arc<dyn Realisations>,
    ) -> Self {
        Self {
            writer,
            administration,
            registry,
            realisations,
            tracked: BTreeMap::new(),
            listed: BTreeSet::new(),
            listing: HashMap::new(),
            pending: Pending::default(),
            defaults: Defaults::default(),
            undecided: BTreeMap::new(),
            adopting: None,
            without_resource: Default::default(),
            statuses: Statuses::default(),
            busy: Duration::ZERO,
        }
    }

    /// Takes what a watch reports. A list replaces the objects when it is complete.
    pub fn take(&mut self, resource: Resource, event: Result<watcher::Event<DynamicObject>, watcher::Error>) {
        match event {
            Ok(watcher::Event::Apply(object)) => {
                self.writer.monitor.succeeded(Task::Read(resource.name()), "");
                self.take_object(resource, &object);
            }
            Ok(watcher::Event::Delete(object)) => {
                let key = Key::new(resource, &object.name_any());
                self.tracked.remove(&key);
                if key.object().is_some_and(|id| self.registry.snapshot().objects.contains_key(&id)) {
                    warn!(object = %key, "custom resource is gone without its finalizer: the object stays in force");
                }
            }
            Ok(watcher::Event::Init) => drop(self.listing.insert(resource, BTreeMap::new())),
            Ok(watcher::Event::InitApply(object)) => {
                let (key, tracked) = self.track(resource, &object);
                self.listing.entry(resource).or_default().insert(key, tracked);
            }
            Ok(watcher::Event::InitDone) => {
                self.writer.monitor.succeeded(Task::Read(resource.name()), "");
                let mut old = std::mem::take(&mut self.tracked);
                for (key, tracked) in self.listing.remove(&resource).unwrap_or_default() {
                    let before = old.remove(&key);
                    self.tracked.insert(key, tracked.follow(before));
                }
                self.tracked.extend(old.into_iter().filter(|(key, _)| key.resource != resource));
                self.listed.insert(resource);
            }
            Err(error) => {
                warn!(kind = resource.name(), %error, "custom resources cannot be watched");
                self.writer.monitor.watch_failed(Task::Read(resource.name()), &error);
            }
        }
    }

    /// What is kept of an object. What the hub stores already needs no manifest.
    fn track(&self, resource: Resource, object: &DynamicObject) -> (Key, Tracked) {
        let key = Key::new(resource, &object.name_any());
        let mut tracked = Tracked::new(resource, object, &self.defaults, &self.pending);
        let snapshot = self.registry.snapshot();
        let stored = key.object().and_then(|id| snapshot.objects.get(&id));
        tracked.compare(stored.map(|object| (object.revision, &object.manifest)));
        (key, tracked)
    }

    fn take_object(&mut self, resource: Resource, object: &DynamicObject) {
        let (key, tracked) = self.track(resource, object);
        let before = self.tracked.remove(&key);
        self.tracked.insert(key, tracked.follow(before));
    }

    /// Whether the objects of a kind are known. Policies wait for the list of tiers, and what has defaults for that of the ClusterSet.
    fn is_ready(&self, resource: Resource) -> bool {
        let needs = match resource {
            Resource::FederatedNetworkPolicy | Resource::StagedFederatedNetworkPolicy => Some(Resource::Tier),
            Resource::MemberCluster | Resource::ClusterJoinToken => Some(Resource::ClusterSet),
            Resource::ClusterSet | Resource::Tier | Resource::FederatedNetworkSet => None,
        };
        self.listed.contains(&resource) && needs.is_none_or(|needed| self.listed.contains(&needed))
    }

    /// Objects in the order in which they are applied.
    fn ready(&self) -> impl Iterator<Item = (&Key, &Tracked)> {
        let ready: Vec<Resource> = Resource::ALL.into_iter().filter(|it| self.is_ready(*it)).collect();
        self.tracked.iter().filter(move |(key, _)| ready.contains(&key.resource))
    }

    /// # Errors
    /// When the API server or the store does not answer. What does not depend on it is done.
    pub async fn pass(&mut self) -> anyhow::Result<()> {
        self.busy = Duration::ZERO;
        self.compare();
        let outcomes = [
            self.add_finalizers().await,
            self.configure().await,
            self.adopt().await,
            self.apply().await,
            self.accept().await,
            self.issue().await,
            self.delete().await,
            self.settle().await,
        ];
        self.write_statuses();
        self.count();
        outcomes.into_iter().collect()
    }

    /// The time that the last pass computed, without the time in which it waited for answers.
    pub fn busy(&self) -> Duration {
        self.busy
    }

    /// Compares the custom resources with the hub's objects.
    fn compare(&mut self) {
        let started = Instant::now();
        self.compare_all();
        self.busy += started.elapsed();
    }

    fn compare_all(&mut self) {
        let snapshot = self.registry.snapshot();
        for (key, tracked) in &mut self.tracked {
            let stored = key.object().and_then(|id| snapshot.objects.get(&id));
            tracked.compare(stored.map(|object| (object.revision, &object.manifest)));
        }
        if Resource::ALL.into_iter().any(|it| !self.is_ready(it)) {
            return;
        }
        // MemberClusters are created for the clusters without one.
        let lacks = |id: &ObjectId| id.kind != Kind::MemberCluster && !self.tracked.contains_key(&Key::of(id));
        let lacking = snapshot.objects.iter().filter(|(id, it)| lacks(id) && !is_pending_stage(it));
        let lacking: Vec<&ObjectId> = lacking.map(|(id, _)| id).collect();
        let found = (lacking.iter().take(MAX_NAMED).map(|id| (*id).clone()).collect(), lacking.len());
        if found != self.without_resource && found.1 > 0 {
            let first = lacking.first().map(ToString::to_string).unwrap_or_default();
            warn!(count = found.1, first, "objects of the hub without a custom resource stay in force");
        }
        self.without_resource = found;
    }

    async fn add_finalizers(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let lacks = |it: &Tracked| !it.is_leaving && !it.has_finalizer() && it.may_write(now);
        let all = self.ready().filter(|(_, it)| lacks(it));
        let writes = all.map(|(key, it)| (key.clone(), Write::finalizer(key, it))).collect();
        self.send(writes).await
    }

    /// Sends writes. An object that is gone or replaced is left to the watch. One that the API server refuses
    /// is tried again later, and does not keep the others waiting.
    async fn send(&mut self, writes: Vec<(Key, Write)>) -> anyhow::Result<()> {
        let (mut outcome, mut refused) = (Ok(()), BTreeMap::<Resource, usize>::new());
        for (key, patched) in self.writer.send(writes).await {
            match patched {
                Patched::Made(object) => {
                    // Without its last finalizer, an object that is being deleted is gone.
                    if object.metadata.deletion_timestamp.is_none() || !object.finalizers().is_empty() {
                        self.take_object(key.resource, &object);
                    } else {
                        self.tracked.remove(&key);
                    }
                    self.tracked.get_mut(&key).into_iter().for_each(Tracked::write_accepted);
                }
                Patched::Gone => {}
                Patched::Refused(why) => {
                    let count = refused.entry(key.resource).or_default();
                    *count += 1;
                    if *count == 1 {
                        warn!(object = %key, error = why, "the API server refuses a write of the operator");
                    }
                    let now = Instant::now();
                    self.tracked.get_mut(&key).into_iter().for_each(|it| it.write_refused(now));
                }
                Patched::Failed(error) => outcome = Err(error),
            }
        }
        for (resource, refused) in refused.into_iter().filter(|(_, count)| *count > 1) {
            warn!(kind = resource.name(), refused, "the API server refuses writes of the operator");
        }
        outcome
    }

    /// Writes what differs to the store.
    async fn apply(&mut self) -> anyhow::Result<()> {
        let (snapshot, now) = (self.registry.snapshot(), Instant::now());
        let revision = snapshot.revision;
        let tiers = snapshot.objects.iter().filter(|(id, _)| id.kind == Kind::Tier);
        let tiers_changed = tiers.map(|(_, tier)| tier.revision).max().unwrap_or_default();
        let approved: BTreeSet<&str> =
            snapshot.approvals.values().filter(|it| it.seen).map(|it| it.uid.as_str()).collect();
        // What waits for an approval does not wait for more than that.
        let may_be_approved = |it: &Tracked, refused: &Refused| {
            refused.refusal.reason == PENDING
                && refused.at != revision
                && (approved.contains(it.uid.as_str()) || tiers_changed > refused.at)
        };
        let differs = |it: &Tracked| {
            let is_due = |refused: &Refused| refused.is_due(revision, now) || may_be_approved(it, refused);
            let is_due = it.refused.as_ref().is_none_or(is_due);
            // Only with the finalizer, the deletion of an object is seen in any case.
            !it.is_leaving && it.has_finalizer() && !it.is_current() && is_due
        };
        let keys: Vec<Key> = self
            .ready()
            .filter(|(key, it)| key.object().is_some() && differs(it))
            .map(|(key, _)| key.clone())
            .collect();
        let read = self.read_again(&keys).await;
        let mut edits = Vec::new();
        for key in keys {
            if let Some(manifest) = self.tracked.get(&key).filter(|it| differs(it)).and_then(Tracked::manifest) {
                let origin = self.tracked.get(&key).map(Tracked::origin).unwrap_or_default();
                edits.push((key, OperatorEdit::Apply(manifest.clone(), origin)));
            }
        }
        let (keys, edits): (Vec<Key>, Vec<OperatorEdit>) = edits.into_iter().unzip();
        let outcomes = self.administration.operate(&edits).await.context("write to the store")?;
        let snapshot = self.registry.snapshot();
        for (key, outcome) in keys.into_iter().zip(outcomes) {
            let Some((tracked, id)) = self.tracked.get_mut(&key).zip(key.object()) else { continue };
            let manifest = tracked.manifest().cloned().unwrap_or_default();
            tracked.forget_manifest();
            let before = tracked.refused.take();
            match outcome {
                Ok(()) => {}
                Err(error @ (ChangeError::Store(_) | ChangeError::Busy)) => {
                    return Err(error).with_context(|| format!("write {key} to the store"));
                }
                Err(error) => {
                    self.writer.metrics.refused("hub");
                    let tier = manifest::tier_in(&manifest).filter(|_| id.kind.is_policy());
                    let tier = tier.map(|name| ObjectId { kind: Kind::Tier, name });
                    let reason = match error {
                        _ if tier.is_some_and(|tier| !snapshot.objects.contains_key(&tier)) => "TierNotFound",
                        ChangeError::Pending(_) => PENDING,
                        ChangeError::Conflict(_) => "Conflict",
                        ChangeError::Limit(_) => "LimitReached",
                        _ => "Invalid",
                    };
                    let refusal = Refusal { reason, message: error.to_string() };
                    tracked.refused =
                        Some(Refused::new(refusal, snapshot.revision, reason == "Invalid", before, Instant::now()));
                }
            }
        }
        self.compare();
        read
    }

    /// Reads the objects again whose manifests are not kept, some of them at a time.
    async fn read_again(&mut self, keys: &[Key]) -> anyhow::Result<()> {
        let has_none = |key: &&Key| self.tracked.get(key).is_some_and(|it| it.manifest().is_none());
        let keys: Vec<Key> = keys.iter().filter(has_none).take(READ_AGAIN).cloned().collect();
        let writer = &self.writer;
        let read = |key: Key| async move { (key.clone(), writer.read(&key).await) };
        let answers: Vec<_> = futures::stream::iter(keys).map(read).buffer_unordered(8).collect().await;
        let mut outcome = Ok(());
        for (key, answer) in answers {
            match answer {
                Ok(Some(object)) => {
                    let (_, read) = self.track(key.resource, &object);
                    let before = self.tracked.remove(&key);
                    self.tracked.insert(key, read.follow_for_decision(before));
                }
                // The watch reports it.
                Ok(None) => {}
                Err(error) => outcome = Err(error),
            }
        }
        outcome
    }

    /// Deletes what is being deleted, policies before their tiers, and then releases it.
    async fn delete(&mut self) -> anyhow::Result<()> {
        let mut outcome = Ok(());
        for resource in Resource::ALL.into_iter().rev() {
            let waits = self.undecided.get(&resource).is_some_and(|(_, at)| *at > Instant::now());
            if waits || !self.is_ready(resource) {
                continue;
            }
            let at = self.registry.snapshot().revision;
            let is_blocked = |it: &Tracked| it.blocked.as_ref().is_some_and(|(blocked, _)| *blocked == at);
            let leaving = self
                .tracked
                .iter()
                .filter(|(key, it)| key.resource == resource && it.is_leaving && it.has_finalizer() && !is_blocked(it));
            let leaving: Vec<Key> = leaving.map(|(key, _)| key.clone()).collect();
            if leaving.is_empty() {
                continue;
            }
            let (definition, monitor) = (Task::Definition(resource.name()), &self.writer.monitor);
            let is_decision = match self.is_served(resource).await {
                Ok(is_decision) => {
                    monitor.succeeded(definition, "");
                    is_decision
                }
                Err(error) => {
                    monitor.failed(definition, "", &error);
                    warn!(kind = resource.name(), error = format!("{error:#}"), "deletions wait");
                    let first = || (Backoff::new(UNDECIDED.0, UNDECIDED.1), Instant::now());
                    let (backoff, at) = self.undecided.entry(resource).or_insert_with(first);
                    *at = Instant::now() + backoff.next_delay();
                    continue;
                }
            };
            self.undecided.remove(&resource);
            let mut released = Vec::new();
            for key in leaving {
                match self.remove(&key, is_decision).await {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(error) => {
                        outcome = Err(error);
                        continue;
                    }
                }
                if let Some(tracked) = self.tracked.get(&key).filter(|it| it.may_write(Instant::now())) {
                    released.push((key, Write::release(tracked)));
                }
            }
            let sent = self.send(released).await;
            outcome = outcome.and(sent);
        }
        outcome
    }

    /// Removes what the hub has for a custom resource. False: it must not be released yet.
    async fn remove(&mut self, key: &Key, is_decision: bool) -> anyhow::Result<bool> {
        if !is_decision {
            let definition = key.resource.definition();
            warn!(object = %key, definition, "definition is being deleted: the object stays in force");
            return Ok(true);
        }
        let edit = match (key.resource, key.object()) {
            (Resource::ClusterSet, _) => return self.unconfigure(key).await.map(|()| true),
            (Resource::ClusterJoinToken, _) => return self.revoke(key).await.map(|()| true),
            (Resource::MemberCluster, _) => OperatorEdit::RemoveCluster(Arc::clone(&key.name)),
            (_, Some(id)) if self.registry.snapshot().objects.contains_key(&id) => {
                OperatorEdit::Delete(id, self.tracked.get(key).map(Tracked::origin).unwrap_or_default())
            }
            _ => return Ok(true),
        };
        let outcome =
            self.administration.operate(&[edit]).await.with_context(|| format!("delete {key} from the store"));
        match outcome?.pop().unwrap_or(Err(ChangeError::Busy)) {
            Ok(()) => {
                info!(object = %key, "object deleted with its custom resource");
                Ok(true)
            }
            Err(ChangeError::NotFound(_)) => Ok(true),
            Err(ChangeError::Conflict(why) | ChangeError::Pending(why)) => {
                let at = self.registry.snapshot().revision;
                self.tracked.get_mut(key).into_iter().for_each(|it| it.blocked = Some((at, why.clone())));
                Ok(false)
            }
            Err(error) => Err(error).with_context(|| format!("delete {key} from the store")),
        }
    }

    /// Ends what belongs to changes that do not wait for an approval any more.
    async fn settle(&self) -> anyhow::Result<()> {
        if Resource::ALL.into_iter().any(|it| !self.is_ready(it)) {
            return Ok(());
        }
        let waits =
            |it: &Tracked| it.refused.as_ref().is_some_and(|it| it.refusal.reason == PENDING) || it.blocked.is_some();
        let pending = self.tracked.iter().filter(|(_, it)| waits(it));
        let pending = pending.filter_map(|(key, it)| Some((key.object()?, it.uid.clone())));
        let seen = |it: &Tracked| Seen { generation: it.generation, is_leaving: it.is_leaving };
        let seen = self.tracked.values().map(|it| (&*it.uid, seen(it))).collect();
        self.administration.settle(&pending.collect(), &seen).await.context("end what waited for approvals")
    }

    /// Whether a definition exists and stays: all objects are deleted with it, which is not the decision to delete a policy.
    async fn is_served(&self, resource: Resource) -> anyhow::Result<bool> {
        let api: Api<PartialObjectMeta<CustomResourceDefinition>> = Api::all(self.writer.client.clone());
        let definition = resource.definition();
        let found = answered(api.get_opt(&definition)).await;
        let found = found.with_context(|| format!("read the CustomResourceDefinition {definition}"))?;
        Ok(found.is_some_and(|it| it.metadata.deletion_timestamp.is_none()))
    }
}
