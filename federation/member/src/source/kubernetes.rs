//! Reads the objects of a cluster from its API server.
//!
//! An object is an origin: `COLLECTION/NAMESPACE/NAME`. Under a CustomResourceDefinition it is `COLLECTION/UID/NAMESPACE/NAME`, with the
//! uid of the definition, so that objects that have disappeared with their definition differ from deleted ones, also after a restart.
//! They are kept until they return or are forgotten. The origin `COLLECTION` marks that the collection was listed completely.

mod budget;
mod collection;
mod definitions;
mod follow;
mod forgetting;
mod objects;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_api::Diagnostic;
use hanse_runtime::retry::Backoff;
use kube::Client;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

use self::collection::{COLLECTIONS, Collection, DEFINITIONS};
use self::forgetting::Requests;
use self::report::{Definition, Report, Reports, State};
use super::{Event, Objects, Source};
use crate::state::State as Files;
use hanse_kubernetes::Access;

pub(super) use self::forgetting::{Earlier, Missing, earlier};
pub use self::forgetting::{forget, kept_objects};

/// A poll without changes takes this long.
const WAIT: Duration = Duration::from_millis(100);
/// Changes that follow the first one within this time belong to the same poll.
const GATHER: Duration = Duration::from_millis(20);
/// The same where changes have come within this time before: a poll costs the same for one change and for many.
const GATHER_MANY: Duration = Duration::from_millis(100);
/// Events of one poll, about.
const MAX_EVENTS: usize = 10_000;
/// A collection that has been read is reported as failing after this time: a restart of the API server is not a problem.
const FAILS_AFTER: Duration = Duration::from_secs(3);

/// Reads the objects of a cluster from its API server. Must be used outside tokio: it waits for its own runtime.
#[derive(Debug)]
pub struct Kubernetes {
    runtime: Runtime,
    reports: mpsc::Receiver<Report>,
    collections: BTreeMap<String, Status>,
    requests: Requests,
    /// Objects of an earlier process that neither its state nor its caches contain: what it enforced is not known.
    missing: Missing,
    /// That objects are missing is logged.
    is_missing_logged: bool,
    /// All collections were read, or their last good state was restored.
    is_synced: bool,
    /// When changes were received last.
    received_at: Option<Instant>,
}

/// The state of one collection.
#[derive(Debug)]
struct Status {
    collection: Collection,
    is_listed: bool,
    /// `None` before it is known; always for built-in kinds.
    definition: Option<Definition>,
    failing: Option<Failing>,
    /// What is reported for the scope of the collection.
    retained: Option<String>,
    /// The definition has changed: the kept objects must be determined again.
    is_changed: bool,
    /// Kept objects, by the scope of their definition.
    kept: BTreeMap<Arc<Path>, BTreeSet<Arc<Path>>>,
}

#[derive(Debug)]
struct Failing {
    since: Instant,
    message: String,
}

impl Kubernetes {
    /// Connects when it is polled first. `state`: of the member, with the requests to forget kept objects.
    ///
    /// # Errors
    /// When the runtime cannot be created.
    pub fn new(access: Access, state: impl Into<Files>) -> std::io::Result<Self> {
        // A thread of its own: the next objects arrive and are read while the caller applies those of this poll.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("api-server")
            .enable_all()
            .build()?;
        let (sender, reports) = Reports::new();
        runtime.spawn(start(access, sender));
        let status = |collection: &Collection| (collection.name(), Status::new(*collection));
        let collections = COLLECTIONS.iter().chain([&DEFINITIONS]).map(status).collect();
        let requests = Requests::new(state.into());
        let missing = Missing::default();
        let (is_missing_logged, is_synced, received_at) = (false, false, None);
        Ok(Self { runtime, reports, collections, requests, missing, is_missing_logged, is_synced, received_at })
    }

    /// With objects of an earlier process that are missing: nothing is reported before they are read, or forgotten.
    #[must_use]
    pub(super) fn with_missing(self, mut missing: Missing) -> Self {
        // Another version may have read other kinds.
        let is_read =
            |definition: &Path| COLLECTIONS.iter().any(|it| it.is_custom && definition.starts_with(it.origin()));
        missing.definitions.retain(|definition| is_read(definition));
        Self { missing, ..self }
    }

    fn log_missing(&mut self) {
        let is_gone = |(name, status): (&String, &Status)| {
            let exists = |uid: &str| self.missing.definitions.contains(&Path::new(name).join(uid));
            let is_missing = self.missing.definitions.iter().any(|it| it.starts_with(name));
            let is_other = match &status.definition {
                Some(Definition::Present { uid }) => !exists(uid),
                other => other.is_some(),
            };
            (is_missing && is_other).then(|| name.clone())
        };
        if self.is_missing_logged || self.missing.is_empty() {
            return;
        }
        let gone: Vec<String> = self.collections.iter().filter_map(is_gone).collect();
        if self.missing.kept > 0 || !gone.is_empty() {
            tracing::error!(
                kept = self.missing.kept,
                definitions = gone.join(", "),
                "objects whose CustomResourceDefinition was deleted were in force, and are not stored: nodes keep their rules; create the \
                 definition and the objects that are needed again, and run `hanse-member forget --all --data DIR`"
            );
            self.is_missing_logged = true;
        }
    }

    /// The reports of the next moment; empty if there are none.
    fn receive(&mut self) -> Vec<Report> {
        let reports = &mut self.reports;
        let is_busy = self.received_at.is_some_and(|at| at.elapsed() < GATHER_MANY);
        let gather = if is_busy { GATHER_MANY } else { GATHER };
        let received = self.runtime.block_on(async {
            let mut received = Vec::new();
            let Ok(Some(first)) = tokio::time::timeout(WAIT, reports.recv()).await else { return received };
            received.push(first);
            let gathered = tokio::time::Instant::now() + gather;
            while received.len() < MAX_EVENTS
                && let Ok(Some(report)) = tokio::time::timeout_at(gathered, reports.recv()).await
            {
                received.push(report);
            }
            received
        });
        if !received.is_empty() {
            self.received_at = Some(Instant::now());
        }
        received
    }

    fn take_state(&mut self, of: &Collection, state: State, events: &mut Vec<Event>) {
        let Some(status) = self.collections.get_mut(&of.name()) else { return };
        match state {
            State::Listed => {
                status.is_listed = true;
                if let Some(Definition::Present { uid }) = &status.definition {
                    self.missing.definitions.remove(&of.origin().join(uid));
                }
                events.push(Event::Keep(of.origin(), Vec::new()));
            }
            State::Alive => {
                status.failing = None;
                status.report(None, events);
            }
            State::Failing(message) => {
                let since = status.failing.as_ref().map_or_else(Instant::now, |it| it.since);
                status.failing = Some(Failing { since, message });
            }
            State::Definition(definition) => {
                (status.definition, status.is_changed) = (Some(definition), true);
                (status.is_listed, status.failing) = (false, None);
                status.report(None, events);
            }
        }
    }

    /// Reports collections that fail. Before a collection was read, at once: its last good state may have to be restored.
    fn report_failures(&mut self, objects: &Objects, events: &mut Vec<Event>) {
        let definitions = self.collections.get(&DEFINITIONS.name()).and_then(|it| it.failing.as_ref());
        let definitions = definitions.map(|it| it.message.clone());
        for status in self.collections.values_mut() {
            let unknown = definitions.as_ref().filter(|_| status.collection.is_custom && status.definition.is_none());
            let message = match (&status.failing, unknown) {
                (Some(failing), _) if !status.is_listed || failing.since.elapsed() >= FAILS_AFTER => &failing.message,
                (None, Some(message)) if !objects.origins_within(&status.collection.origin()).is_empty() => message,
                _ => continue,
            };
            let message = format!("cannot be read: {message}; the last version stays in force");
            status.report(Some(message), events);
        }
    }

    /// Whether the state of all collections is known, or was known to an earlier process.
    fn is_complete(&self, objects: &Objects) -> bool {
        if !self.missing.is_empty() {
            return false;
        }
        let was_listed = |status: &Status| status.failing.is_some() && objects.has_origin(&status.collection.origin());
        let knows_definitions = self.collections.get(&DEFINITIONS.name()).is_some_and(was_listed);
        self.collections.values().all(|status| {
            let is_read = status.is_listed || was_listed(status);
            let is_complete = match (status.collection.is_custom, &status.definition) {
                (false, _) | (true, Some(Definition::Present { .. })) => is_read,
                (true, Some(Definition::Absent | Definition::Terminating)) => true,
                (true, None) => knows_definitions,
            };
            is_complete && !status.is_changed
        })
    }

    /// Removes kept objects that have returned under another definition.
    fn take_returned(&mut self, event: &Event, events: &mut Vec<Event>) {
        let Event::Upsert(position, _) = event else { return };
        let Some(name) = position.origin.iter().next().and_then(|it| it.to_str()) else { return };
        let Some(status) = self.collections.get_mut(name).filter(|it| !it.kept.is_empty()) else { return };
        let own = object_path(&position.origin);
        let mut returned = Vec::new();
        for (scope, kept) in &mut status.kept {
            let twin = scope.join(&own);
            if *twin != *position.origin && kept.remove(&*twin) {
                returned.push(Event::Remove(twin.into()));
            }
        }
        if !returned.is_empty() {
            events.append(&mut returned);
            status.report_kept(events);
        }
    }

    /// Removes kept objects on request.
    fn forget(&mut self, events: &mut Vec<Event>) {
        let Some(request) = self.requests.take() else { return };
        if request.is_of_all() {
            self.missing = Missing::default();
        }
        for status in self.collections.values_mut() {
            let mut is_changed = false;
            for kept in status.kept.values_mut() {
                for origin in kept.extract_if(.., |origin| request.matches(&name_of(origin))) {
                    tracing::info!(object = name_of(&origin), "kept object forgotten");
                    events.push(Event::Remove(origin));
                    is_changed = true;
                }
            }
            if is_changed {
                status.report_kept(events);
            }
        }
    }

    /// For the next process. Until everything was read, the list of an earlier process is the better one.
    fn write_kept(&mut self, objects: &Objects) {
        let kept = self.collections.values().flat_map(|status| status.kept.values().flatten());
        let kept = kept.cloned().collect();
        // The objects of a definition that was deleted are stored before it is no longer recorded.
        if self.requests.write_kept(kept, name_of, |origin| objects.text(origin))
            && let Some(definitions) = self.definitions_in_force(objects)
        {
            self.requests.write_definitions(definitions);
        }
    }

    /// The definitions of the objects in force; `None` while a definition is not known.
    fn definitions_in_force(&self, objects: &Objects) -> Option<BTreeSet<PathBuf>> {
        let mut definitions = BTreeSet::new();
        for status in self.collections.values().filter(|it| it.collection.is_custom) {
            // What it leaves in force is determined by the next poll, and stored before the definition is no longer recorded.
            if status.is_changed {
                return None;
            }
            if let Definition::Present { uid } = status.definition.as_ref()? {
                let definition = status.collection.origin().join(uid);
                if objects.has_origin_within(&definition) {
                    definitions.insert(definition);
                }
            }
        }
        Some(definitions)
    }
}

impl Status {
    fn new(collection: Collection) -> Self {
        Self {
            collection,
            is_listed: false,
            definition: None,
            failing: None,
            retained: None,
            is_changed: false,
            kept: BTreeMap::new(),
        }
    }

    /// Reports a problem of the whole collection, or that there is none.
    fn report(&mut self, problem: Option<String>, events: &mut Vec<Event>) {
        if self.retained == problem {
            return;
        }
        let origin = self.collection.origin();
        events.push(match &problem {
            Some(problem) => Event::Retain(Arc::clone(&origin), vec![Diagnostic::of_file(&origin, problem.clone())]),
            None => Event::Release(origin),
        });
        self.retained = problem;
    }

    /// Determines which objects are kept although their definition is gone.
    fn find_kept(&mut self, objects: &Objects, events: &mut Vec<Event>) {
        self.is_changed = false;
        let origin = self.collection.origin();
        let present = match &self.definition {
            Some(Definition::Present { uid }) => Some(origin.join(uid)),
            _ => None,
        };
        let mut kept: BTreeMap<Arc<Path>, BTreeSet<Arc<Path>>> = BTreeMap::new();
        for object in objects.origins_within(&origin) {
            let uid = object.iter().nth(1).filter(|_| object.iter().nth(2).is_some());
            let Some(scope) = uid.map(|uid| origin.join(uid)).filter(|scope| Some(scope) != present.as_ref()) else {
                continue;
            };
            kept.entry(scope.into()).or_default().insert(object);
        }
        for scope in self.kept.keys().filter(|scope| !kept.contains_key(*scope)) {
            events.push(Event::Release(Arc::clone(scope)));
        }
        self.kept = kept;
        self.report_kept(events);
    }

    fn report_kept(&mut self, events: &mut Vec<Event>) {
        const NAMES: usize = 3;
        let reason = match self.definition {
            Some(Definition::Terminating) => "is being deleted",
            _ => "was deleted",
        };
        self.kept.retain(|scope, kept| {
            if kept.is_empty() {
                events.push(Event::Release(Arc::clone(scope)));
                return false;
            }
            let names: Vec<String> = kept.iter().take(NAMES).map(|origin| name_of(origin)).collect();
            let more = if kept.len() > NAMES { ", …" } else { "" };
            let message = format!(
                "{} kept in force ({}{more}): the CustomResourceDefinition {reason}. They are removed when they return and are deleted, or \
                 by `hanse-member forget`",
                if kept.len() == 1 { "1 object".to_owned() } else { format!("{} objects", kept.len()) },
                names.join(", "),
            );
            let problem = Diagnostic::of_file(&self.collection.origin(), message);
            events.push(Event::Retain(Arc::clone(scope), vec![problem]));
            true
        });
    }
}

/// The namespace and name in the origin of an object of a custom collection.
fn object_path(origin: &Path) -> PathBuf {
    origin.iter().skip(2).collect()
}

/// The object of an origin of a custom collection, as `COLLECTION/NAMESPACE/NAME`.
fn name_of(origin: &Path) -> String {
    let collection: PathBuf = origin.iter().take(1).collect();
    collection.join(object_path(origin)).to_string_lossy().into_owned()
}

impl Source for Kubernetes {
    fn poll(&mut self, objects: &mut Objects) -> Vec<Event> {
        let mut events = Vec::new();
        self.forget(&mut events);
        let was_synced = self.is_synced;
        for status in self.collections.values_mut().filter(|it| it.is_changed) {
            status.find_kept(objects, &mut events);
        }
        for report in self.receive() {
            match report {
                Report::State(collection, state) => self.take_state(&collection, state, &mut events),
                Report::Events(reported, _room) => {
                    for event in reported {
                        self.take_returned(&event, &mut events);
                        events.push(event);
                    }
                }
            }
        }
        self.report_failures(objects, &mut events);
        self.log_missing();
        if !self.is_synced && self.is_complete(objects) {
            self.is_synced = true;
            events.push(Event::Synced(Path::new("").into()));
        }
        // `objects` do not contain what this poll reports.
        if was_synced {
            self.write_kept(objects);
        }
        events
    }

    fn pause(&self, _took: Duration) -> Duration {
        Duration::ZERO
    }
}

/// Connects, and starts a task for each collection.
async fn start(access: Access, reports: Reports) {
    let Some(client) = connect(&access, &reports).await else { return };
    let (known, definitions) = watch::channel(None);
    tokio::spawn(definitions::follow(client.clone(), known, reports.clone()));
    for collection in COLLECTIONS {
        let (client, reports) = (client.clone(), reports.clone());
        match collection.is_custom {
            true => tokio::spawn(objects::follow_custom(*collection, client, definitions.clone(), reports)),
            false => tokio::spawn(objects::follow(*collection, client, reports)),
        };
    }
}

/// A client, as soon as the configuration can be read. `None`: the source has ended.
async fn connect(access: &Access, reports: &Reports) -> Option<Client> {
    let mut backoff = Backoff::default();
    loop {
        let error = match access.client().await {
            Ok(client) => return Some(client),
            Err(error) => format!("{error:#}"),
        };
        for collection in COLLECTIONS.iter().filter(|it| !it.is_custom).chain([&DEFINITIONS]) {
            reports.state(*collection, State::Failing(error.clone())).await.ok()?;
        }
        tokio::time::sleep(backoff.next_delay()).await;
    }
}
