//! Reports the objects of one collection.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hanse_api::stored::used_fields;
use kube::{Api, Client};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::collection::{Collection, Raw};
use super::definitions::{self, Definitions};
use super::follow::{Follower, Step};
use super::report::{Definition, Report, State};
use crate::source::{Event, read_object};

/// Objects that are read before other collections have their turn.
const READ_AT_ONCE: usize = 32;
/// Deletions within this time are confirmed by one request.
const CONFIRM_AFTER: Duration = Duration::from_millis(50);
/// The interval between attempts to find out why objects were deleted.
const CONFIRM_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// The interval between look-ups of a definition that is gone, while the watch of definitions does not report it.
const LOOK_UP_EVERY: Duration = Duration::from_secs(10);

/// Follows a collection of a built-in kind.
pub async fn follow(collection: Collection, client: Client, reports: mpsc::Sender<Report>) {
    let origin = collection.origin();
    let follower = Follower::new(Api::all_with(client.clone(), &collection));
    let this = Following::new(collection, origin, client, reports);
    // An error: the source has ended.
    let _ended = this.run(follower, None).await;
}

/// Follows a collection while its definition exists.
pub async fn follow_custom(
    collection: Collection,
    client: Client,
    mut definitions: watch::Receiver<Definitions>,
    reports: mpsc::Sender<Report>,
) {
    let name = collection.name();
    let of = |known: &Definitions| known.as_ref().map(|it| it.get(&name).cloned().unwrap_or(Definition::Absent));
    // What was read directly, while the watch of the definitions still reports another one.
    let mut read: Option<Definition> = None;
    loop {
        let watched = of(&definitions.borrow_and_update());
        let until_changed = definitions.wait_for(|known| of(known) != watched);
        let Some(now) = read.take().or_else(|| watched.clone()) else {
            if until_changed.await.is_err() {
                return;
            }
            continue;
        };
        if reports.send(Report::State(collection, State::Definition(now.clone()))).await.is_err() {
            return;
        }
        let following = async {
            let Definition::Present { uid } = &now else {
                if watched.as_ref() == Some(&now) {
                    return std::future::pending().await;
                }
                // The watch does not report what was read: it may not be permitted.
                tokio::time::sleep(LOOK_UP_EVERY).await;
                return Ok(definitions::look_up(&client, &name).await.ok().filter(|found| *found != now));
            };
            let follower = Follower::new(Api::all_with(client.clone(), &collection));
            let this = Following::new(collection, scope_of(&collection, uid), client.clone(), reports.clone());
            this.run(follower, Some(uid)).await.map(Some)
        };
        tokio::select! {
            changed = until_changed => if changed.is_err() {
                return;
            },
            found = following => match found {
                Ok(found) => read = found.or(Some(now)),
                Err(Ended) => return,
            },
        }
    }
}

/// The scope of the objects that exist under one definition of their kind.
fn scope_of(collection: &Collection, uid: &str) -> Arc<Path> {
    collection.origin().join(uid).into()
}

struct Following {
    collection: Collection,
    scope: Arc<Path>,
    client: Client,
    reports: mpsc::Sender<Report>,
    /// Objects whose last version cannot be read.
    unreadable: HashSet<Arc<Path>>,
    /// Those of them that the current list has not contained yet.
    unseen: HashSet<Arc<Path>>,
    /// Deleted objects of which it is not known whether their definition was deleted.
    unconfirmed: BTreeSet<Arc<Path>>,
    /// When that is found out, for all of them at once.
    confirm_at: Instant,
}

/// The receiver of reports is gone.
struct Ended;

impl From<mpsc::error::SendError<Report>> for Ended {
    fn from(_: mpsc::error::SendError<Report>) -> Self {
        Self
    }
}

impl Following {
    fn new(collection: Collection, scope: Arc<Path>, client: Client, reports: mpsc::Sender<Report>) -> Self {
        let (unreadable, unseen, unconfirmed) = (HashSet::new(), HashSet::new(), BTreeSet::new());
        Self { collection, scope, client, reports, unreadable, unseen, unconfirmed, confirm_at: Instant::now() }
    }

    fn origin(&self, object: &Raw) -> Arc<Path> {
        let folder = object.namespace().map_or_else(|| self.scope.to_path_buf(), |it| self.scope.join(it));
        folder.join(object.name()).into()
    }

    async fn send(&self, events: Vec<Event>) -> Result<(), Ended> {
        Ok(self.reports.send(Report::Events(events)).await?)
    }

    async fn state(&self, state: State) -> Result<(), Ended> {
        Ok(self.reports.send(Report::State(self.collection, state)).await?)
    }

    /// Ends when the definition of the collection is no longer `uid`, with the current one.
    async fn run(mut self, mut follower: Follower<Raw>, uid: Option<&String>) -> Result<Definition, Ended> {
        loop {
            // One step, however often deletions are confirmed meanwhile: a step that were begun again each time might never end.
            let mut next = pin!(follower.next());
            let step = loop {
                tokio::select! {
                    step = &mut next => break step,
                    () = tokio::time::sleep_until(self.confirm_at), if !self.unconfirmed.is_empty() => {
                        if let Some(uid) = uid
                            && let Some(other) = self.confirm_deletions(uid).await?
                        {
                            return Ok(other);
                        }
                    }
                }
            };
            if let Some(other) = self.take(step, uid).await? {
                return Ok(other);
            }
        }
    }

    /// Returns the current definition of the collection if it is no longer `uid`.
    async fn take(&mut self, step: Step<Raw>, uid: Option<&String>) -> Result<Option<Definition>, Ended> {
        match step {
            Step::Begin => {
                self.unseen = self.unreadable.clone();
                self.send(vec![Event::Relist(Arc::clone(&self.scope))]).await?;
            }
            Step::Listed(page) => {
                for part in page.chunks(READ_AT_ONCE) {
                    let mut events = Vec::new();
                    part.iter().for_each(|object| self.read(object, &mut events));
                    self.send(events).await?;
                    tokio::task::yield_now().await;
                }
            }
            Step::End => {
                if let Some(uid) = uid
                    && let Some(other) = self.confirm_list(uid).await?
                {
                    return Ok(Some(other));
                }
                let gone = std::mem::take(&mut self.unseen);
                self.unreadable.retain(|origin| !gone.contains(origin));
                self.unconfirmed.clear();
                self.send(gone.into_iter().map(Event::Remove).collect()).await?;
                self.state(State::Alive).await?;
                self.send(vec![Event::Synced(Arc::clone(&self.scope))]).await?;
                self.state(State::Listed).await?;
            }
            Step::Changed(object) => {
                let mut events = Vec::new();
                self.read(&object, &mut events);
                self.send(events).await?;
            }
            Step::Deleted(object) => {
                let origin = self.origin(&object);
                if uid.is_none() {
                    self.remove([origin]).await?;
                } else {
                    if self.unconfirmed.is_empty() {
                        self.confirm_at = Instant::now() + CONFIRM_AFTER;
                    }
                    self.unconfirmed.insert(origin);
                }
            }
            // What cannot be confirmed is a problem, although the watch runs.
            Step::Alive if !self.unconfirmed.is_empty() => {}
            Step::Alive => self.state(State::Alive).await?,
            Step::Failed(failure) if failure.is_absent && uid.is_some() => {
                let version = self.collection.version;
                self.state(State::Failing(format!("the API server does not serve its version {version}"))).await?;
            }
            Step::Failed(failure) => self.state(State::Failing(failure.message)).await?,
        }
        Ok(None)
    }

    fn read(&mut self, object: &Raw, events: &mut Vec<Event>) {
        let origin = self.origin(object);
        self.unseen.remove(&origin);
        self.unconfirmed.remove(&origin);
        let text = object.text(&self.collection);
        // Problems name the object as kubectl does.
        let name = match object.namespace() {
            Some(namespace) => format!("{}/{namespace}/{}", self.collection.name(), object.name()),
            None => format!("{}/{}", self.collection.name(), object.name()),
        };
        let is_good = read_object(&origin, &name.into(), text.as_bytes(), events);
        match is_good {
            true => drop(self.unreadable.remove(&origin)),
            false => drop(self.unreadable.insert(Arc::clone(&origin))),
        }
        if let Some(used) = used_fields(&text).map(String::into_bytes) {
            events.push(if is_good { Event::Keep(origin, used) } else { Event::KeepPartial(origin, used) });
        }
    }

    async fn remove(&mut self, origins: impl IntoIterator<Item = Arc<Path>>) -> Result<(), Ended> {
        let remove = |origin| {
            self.unreadable.remove(&origin);
            Event::Remove(origin)
        };
        let events = origins.into_iter().map(remove).collect();
        self.send(events).await
    }

    /// Finds out whether the objects that the list does not contain were deleted (`None`), or their kind.
    async fn confirm_list(&mut self, uid: &str) -> Result<Option<Definition>, Ended> {
        loop {
            match definitions::look_up(&self.client, &self.collection.name()).await {
                Ok(found) => return Ok((!is_present(&found, uid)).then_some(found)),
                Err(error) => self.state(unconfirmed(&error)).await?,
            }
            tokio::time::sleep(CONFIRM_AGAIN_AFTER).await;
        }
    }

    /// Removes objects that were deleted, unless their kind was: then it returns the current definition.
    async fn confirm_deletions(&mut self, uid: &str) -> Result<Option<Definition>, Ended> {
        match definitions::look_up(&self.client, &self.collection.name()).await {
            Ok(found) if is_present(&found, uid) => {
                let deleted = std::mem::take(&mut self.unconfirmed);
                self.remove(deleted).await?;
                self.state(State::Alive).await?;
                Ok(None)
            }
            Ok(found) => Ok(Some(found)),
            Err(error) => {
                self.confirm_at = Instant::now() + CONFIRM_AGAIN_AFTER;
                self.state(unconfirmed(&error)).await?;
                Ok(None)
            }
        }
    }
}

fn is_present(found: &Definition, uid: &str) -> bool {
    matches!(found, Definition::Present { uid: found } if found == uid)
}

fn unconfirmed(error: &str) -> State {
    State::Failing(format!("deleted objects stay in force: the CustomResourceDefinition cannot be read: {error}"))
}
