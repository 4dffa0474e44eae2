//! Reports the objects of one collection.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hanse_api::manifest::{Manifests, read_bytes};
use hanse_api::stored::without_rules;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;

use super::budget::{Budget, Checked};
use super::collection::{Collection, Raw};
use super::definitions::{self, Definitions};
use super::follow::{Follower, PAGE, PAGE_OF_LARGE, Step};
use super::report::{Definition, Ended, Reports, State};
use crate::source::{Event, report};

/// Objects that are read before other collections have their turn, and the bytes of their texts.
const READ_AT_ONCE: usize = 32;
const BYTES_AT_ONCE: usize = 1 << 20;
/// The interval between lists because a policy that was refused for the size of its namespace may now fit.
const LIST_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Deletions within this time are confirmed by one request.
const CONFIRM_AFTER: Duration = Duration::from_millis(50);
/// The interval between attempts to find out why objects were deleted.
const CONFIRM_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// The interval between look-ups of a definition that is gone, while the watch of definitions does not report it.
const LOOK_UP_EVERY: Duration = Duration::from_secs(10);

/// Follows a collection of a built-in kind.
pub async fn follow(collection: Collection, client: Client, reports: Reports) {
    let origin = collection.origin();
    let follower = Follower::new(Api::all_with(client.clone(), &collection), page_of(&collection));
    let this = Following::new(collection, origin, client, reports);
    // An error: the source has ended.
    let _ended = this.run(follower, None).await;
}

/// Follows a collection while its definition exists.
pub async fn follow_custom(
    collection: Collection,
    client: Client,
    mut definitions: watch::Receiver<Definitions>,
    reports: Reports,
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
        if reports.state(collection, State::Definition(now.clone())).await.is_err() {
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
            let follower = Follower::new(Api::all_with(client.clone(), &collection), page_of(&collection));
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

fn page_of(collection: &Collection) -> u32 {
    if collection.is_policy() { PAGE_OF_LARGE } else { PAGE }
}

/// The scope of the objects that exist under one definition of their kind.
fn scope_of(collection: &Collection, uid: &str) -> Arc<Path> {
    collection.origin().join(uid).into()
}

struct Following {
    collection: Collection,
    scope: Arc<Path>,
    client: Client,
    reports: Reports,
    /// Objects whose last version cannot be read.
    unreadable: HashSet<Arc<Path>>,
    /// Those of them that the current list has not contained yet.
    unseen: HashSet<Arc<Path>>,
    /// Deleted objects of which it is not known whether their definition was deleted.
    unconfirmed: BTreeSet<Arc<Path>>,
    /// When that is found out, for all of them at once.
    confirm_at: Instant,
    budget: Budget,
    /// When the collection is listed again, since a policy that was refused for its size may fit.
    list_again_at: Option<Instant>,
}

impl Following {
    fn new(collection: Collection, scope: Arc<Path>, client: Client, reports: Reports) -> Self {
        let (unreadable, unseen, unconfirmed) = (HashSet::new(), HashSet::new(), BTreeSet::new());
        Self {
            collection,
            scope,
            client,
            reports,
            unreadable,
            unseen,
            unconfirmed,
            confirm_at: Instant::now(),
            budget: Budget::default(),
            list_again_at: None,
        }
    }

    fn origin(&self, object: &Raw) -> Arc<Path> {
        let folder = object.namespace().map_or_else(|| self.scope.to_path_buf(), |it| self.scope.join(it));
        folder.join(object.name()).into()
    }

    async fn send(&self, events: Vec<Event>) -> Result<(), Ended> {
        self.reports.events(events, 0).await
    }

    async fn state(&self, state: State) -> Result<(), Ended> {
        self.reports.state(self.collection, state).await
    }

    /// Ends when the definition of the collection is no longer `uid`, with the current one.
    async fn run(mut self, mut follower: Follower<Raw>, uid: Option<&String>) -> Result<Definition, Ended> {
        loop {
            // One step, however often deletions are confirmed meanwhile: a step that were begun again each time might never end.
            let step = {
                let mut next = pin!(follower.next());
                loop {
                    tokio::select! {
                        step = &mut next => break Some(step),
                        () = tokio::time::sleep_until(self.list_again_at.unwrap_or_else(Instant::now)), if self.list_again_at.is_some() => {
                            break None;
                        }
                        () = tokio::time::sleep_until(self.confirm_at), if !self.unconfirmed.is_empty() => {
                            if let Some(uid) = uid
                                && let Some(other) = self.confirm_deletions(uid).await?
                            {
                                return Ok(other);
                            }
                        }
                    }
                }
            };
            let Some(step) = step else {
                self.list_again_at = None;
                follower.list_again();
                continue;
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
                self.budget = Budget::default();
                self.send(vec![Event::Relist(Arc::clone(&self.scope))]).await?;
            }
            Step::Listed(page) => {
                let mut page = page.into_iter().peekable();
                while page.peek().is_some() {
                    let (mut events, mut bytes) = (Vec::new(), 0);
                    for object in page.by_ref().take(READ_AT_ONCE) {
                        bytes += self.read(&object, &mut events);
                        if bytes >= BYTES_AT_ONCE {
                            break;
                        }
                    }
                    self.reports.events(events, bytes).await?;
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
                let bytes = self.read(&object, &mut events);
                self.reports.events(events, bytes).await?;
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

    /// Returns the length of the text.
    fn read(&mut self, object: &Raw, events: &mut Vec<Event>) -> usize {
        let origin = self.origin(object);
        self.unseen.remove(&origin);
        self.unconfirmed.remove(&origin);
        let text = object.text(&self.collection);
        // Problems name the object as kubectl does.
        let name = match object.namespace() {
            Some(namespace) => format!("{}/{namespace}/{}", self.collection.name(), object.name()),
            None => format!("{}/{}", self.collection.name(), object.name()),
        };
        let mut read = Manifests::of_api_server();
        read_bytes(&name.as_str().into(), text.as_bytes(), &mut read);
        let checked = self.budget.check(&origin, Path::new(&name), &mut read);
        if checked == Checked::Frees {
            self.list_again();
        }
        let used = read.take_used_fields();
        let is_good = report(&origin, read, events);
        match is_good {
            true => drop(self.unreadable.remove(&origin)),
            false => drop(self.unreadable.insert(Arc::clone(&origin))),
        }
        let used = used.and_then(|used| match checked {
            Checked::Closed(directions) => without_rules(&used, directions),
            Checked::Fits | Checked::Frees => Some(used),
        });
        if let Some(used) = used.map(String::into_bytes) {
            events.push(if is_good { Event::Keep(origin, used) } else { Event::KeepPartial(origin, used) });
        }
        text.len()
    }

    async fn remove(&mut self, origins: impl IntoIterator<Item = Arc<Path>>) -> Result<(), Ended> {
        let mut events = Vec::new();
        for origin in origins {
            self.unreadable.remove(&origin);
            let namespace = origin.parent().and_then(Path::file_name).and_then(|it| it.to_str());
            if namespace.is_some_and(|namespace| self.budget.remove(namespace, &origin)) {
                self.list_again();
            }
            events.push(Event::Remove(origin));
        }
        self.send(events).await
    }

    fn list_again(&mut self) {
        self.list_again_at.get_or_insert_with(|| Instant::now() + LIST_AGAIN_AFTER);
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
