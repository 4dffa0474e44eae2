//! Lists and watches one collection.

use std::fmt::Debug;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use hanse_runtime::retry::Backoff;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::{ObjectList, Status};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use hanse_kubernetes::{SILENCE, message};

/// Objects of one page of a list.
pub const PAGE: u32 = 500;
/// Of objects that may be as large as an API server stores, 1.5 MB each: 75 MB.
pub const PAGE_OF_LARGE: u32 = 50;
/// Seconds after which the API server ends a watch; the next one continues where it ended.
const WATCH_SECONDS: u32 = 290;
/// The longest time for one page.
const LIST_WITHIN: Duration = Duration::from_secs(60);
const FIRST_DELAY: Duration = Duration::from_millis(200);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// What is new in a collection.
#[derive(Debug)]
pub enum Step<K> {
    /// A list begins.
    Begin,
    /// A part of the list.
    Listed(Vec<K>),
    /// The list is complete: what it did not contain does not exist.
    End,
    /// Added or modified.
    Changed(K),
    Deleted(K),
    /// The watch runs, and has nothing new.
    Alive,
    Failed(Failure),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub message: String,
    /// The API server does not serve the collection.
    pub is_absent: bool,
    /// The client could not read the answer.
    pub is_unreadable: bool,
}

/// Follows a collection for ever. Continues a broken watch at its last position, and lists again where that is no longer possible.
pub struct Follower<K: Clone> {
    api: Api<K>,
    /// Objects of one page.
    page: u32,
    state: State<K>,
    /// The request of the next page, which the API server answers while the page before it is read.
    ahead: JoinSet<Result<ObjectList<K>, Problem>>,
    backoff: Backoff,
    /// After a failure.
    delay: Option<Duration>,
    /// A list that had expired before it was followed by a watch is read at once the next time.
    is_paged: bool,
    /// An event or a bookmark was received since the watch began.
    has_received: bool,
    /// An event or a bookmark was received since the last list.
    has_followed: bool,
}

enum State<K> {
    Start,
    Listing {
        next: Option<String>,
    },
    Listed {
        version: String,
    },
    Ready {
        version: String,
    },
    Watching {
        version: String,
        events: BoxStream<'static, kube::Result<WatchEvent<K>>>,
    },
    /// A watch received nothing. Where the API server was restored from a backup, it accepts versions that it has not reached yet, and
    /// is silent until then.
    Doubtful {
        version: String,
    },
}

/// Whether `now` is an earlier version. Versions are numbers; others are not compared.
fn is_before(now: Option<&str>, kept: &str) -> bool {
    now.and_then(|it| it.parse::<u64>().ok()).zip(kept.parse::<u64>().ok()).is_some_and(|(now, kept)| now < kept)
}

const GONE: u16 = 410;
const NOT_FOUND: u16 = 404;

impl<K: Resource + Clone + DeserializeOwned + Debug + Send + 'static> Follower<K> {
    pub fn new(api: Api<K>, page: u32) -> Self {
        let backoff = Backoff::new(FIRST_DELAY, LONGEST_DELAY);
        Self {
            api,
            page,
            state: State::Start,
            ahead: JoinSet::new(),
            backoff,
            delay: None,
            is_paged: true,
            has_received: false,
            has_followed: false,
        }
    }

    /// The next step. Dropping the future before it is ready skips nothing, but begins the step again.
    pub async fn next(&mut self) -> Step<K> {
        loop {
            if let Some(delay) = self.delay {
                tokio::time::sleep(delay).await;
                self.delay = None;
            }
            if let Some(step) = self.advance().await {
                return step;
            }
        }
    }

    /// Lists everything again, beginning with the next step.
    pub fn list_again(&mut self) {
        self.state = State::Start;
    }

    async fn advance(&mut self) -> Option<Step<K>> {
        match &mut self.state {
            State::Start => {
                self.ahead.abort_all();
                self.ahead = JoinSet::new();
                self.state = State::Listing { next: None };
                Some(Step::Begin)
            }
            State::Listing { next } => {
                let page = match self.ahead.join_next().await {
                    Some(Ok(page)) => page,
                    // There is none, or it has panicked.
                    None | Some(Err(_)) => {
                        request(self.api.clone(), self.is_paged.then_some(self.page), next.clone()).await
                    }
                };
                self.take_page(page)
            }
            State::Listed { version } => {
                self.state = State::Ready { version: std::mem::take(version) };
                Some(Step::End)
            }
            State::Ready { version } => {
                let parameters = WatchParams { timeout: Some(WATCH_SECONDS), ..WatchParams::default() };
                let watch = self.api.watch(&parameters, version);
                match within(LIST_WITHIN, watch).await {
                    Ok(events) => {
                        self.state = State::Watching { version: std::mem::take(version), events: events.boxed() };
                        self.has_received = false;
                        Some(Step::Alive)
                    }
                    Err(error) => self.failed(&error),
                }
            }
            State::Watching { events, .. } => {
                match tokio::time::timeout(SILENCE, events.next()).await {
                    Ok(Some(event)) => self.take_event(event),
                    // The watch has ended, or its connection is dead. One that ends again and again is not tried in a loop.
                    Ok(None) | Err(_) => {
                        self.delay = Some(self.backoff.next_delay());
                        self.state = match self.at_last_version() {
                            State::Ready { version } if !self.has_received => State::Doubtful { version },
                            other => other,
                        };
                        None
                    }
                }
            }
            State::Doubtful { version } => {
                let parameters = ListParams { limit: Some(1), ..ListParams::default() };
                match within(LIST_WITHIN, self.api.list(&parameters)).await {
                    Ok(page) => {
                        self.state = match is_before(page.metadata.resource_version.as_deref(), version) {
                            true => State::Start,
                            false => State::Ready { version: std::mem::take(version) },
                        };
                        None
                    }
                    Err(problem) => self.failed(&problem),
                }
            }
        }
    }

    /// A watch that starts at the last known version, or a list where there is none.
    fn at_last_version(&mut self) -> State<K> {
        match std::mem::replace(&mut self.state, State::Start) {
            State::Ready { version } | State::Watching { version, .. } | State::Doubtful { version } => {
                State::Ready { version }
            }
            _ => State::Start,
        }
    }

    fn take_page(&mut self, page: Result<ObjectList<K>, Problem>) -> Option<Step<K>> {
        match page {
            Ok(page) => {
                self.has_followed = false;
                let text = |text: Option<String>| text.filter(|text| !text.is_empty());
                self.state = match (text(page.metadata.continue_), text(page.metadata.resource_version)) {
                    (Some(next), _) => {
                        // Two pages of large objects would take too much memory.
                        if self.page == PAGE {
                            self.ahead.spawn(request(self.api.clone(), Some(PAGE), Some(next.clone())));
                        }
                        State::Listing { next: Some(next) }
                    }
                    (None, Some(version)) => State::Listed { version },
                    (None, None) => return self.failed(&Problem::new("the list has no resource version")),
                };
                Some(Step::Listed(page.items))
            }
            Err(problem) => self.failed(&problem),
        }
    }

    fn take_event(&mut self, event: kube::Result<WatchEvent<K>>) -> Option<Step<K>> {
        let State::Watching { version, .. } = &mut self.state else { return None };
        let object = match event {
            Ok(WatchEvent::Bookmark(bookmark)) => {
                *version = bookmark.metadata.resource_version;
                (self.has_received, self.has_followed, self.is_paged) = (true, true, true);
                self.backoff.reset();
                return Some(Step::Alive);
            }
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => Ok(object),
            Ok(WatchEvent::Deleted(object)) => Err(object),
            Ok(WatchEvent::Error(status)) => return self.failed(&Problem::of_status(&status)),
            Err(error) => return self.failed(&error.into()),
        };
        let (Ok(of) | Err(of)) = &object;
        let Some(at) = of.meta().resource_version.clone().filter(|it| !it.is_empty()) else {
            self.state = State::Start;
            return self.failed(&Problem::new("an event has no resource version"));
        };
        *version = at;
        (self.has_received, self.has_followed, self.is_paged) = (true, true, true);
        self.backoff.reset();
        Some(match object {
            Ok(object) => Step::Changed(object),
            Err(object) => Step::Deleted(object),
        })
    }

    /// Continues after the delay: a watch where it was, a list from its start.
    fn failed(&mut self, problem: &Problem) -> Option<Step<K>> {
        let is_expired = problem.code == Some(GONE);
        if is_expired && !self.has_followed {
            self.is_paged = false;
        }
        self.state = match is_expired || problem.is_absent() {
            true => State::Start,
            false => self.at_last_version(),
        };
        self.delay = Some(self.backoff.next_delay());
        // Normal after a long interruption: the list that follows reports how it is.
        let (message, is_unreadable) = (problem.message.clone(), problem.is_unreadable);
        let failure = Failure { message, is_absent: problem.is_absent(), is_unreadable };
        (!is_expired).then_some(Step::Failed(failure))
    }
}

/// An error of the API server, or of the connection to it.
struct Problem {
    message: String,
    code: Option<u16>,
    is_unreadable: bool,
}

impl Problem {
    fn new(message: &str) -> Self {
        Self { message: message.to_owned(), code: None, is_unreadable: false }
    }

    fn of_status(status: &Status) -> Self {
        let message = if status.message.is_empty() { &status.reason } else { &status.message };
        Self { message: message.clone(), code: Some(status.code), is_unreadable: false }
    }

    fn is_absent(&self) -> bool {
        self.code == Some(NOT_FOUND)
    }
}

impl From<kube::Error> for Problem {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(&status),
            error => {
                let is_unreadable = matches!(error, kube::Error::SerdeError(_));
                Self { message: message(error), code: None, is_unreadable }
            }
        }
    }
}

/// A page of a list.
async fn request<K: Clone + DeserializeOwned + Debug>(
    api: Api<K>,
    limit: Option<u32>,
    continue_token: Option<String>,
) -> Result<ObjectList<K>, Problem> {
    let parameters = ListParams { limit, continue_token, ..ListParams::default() };
    within(LIST_WITHIN, api.list(&parameters)).await
}

async fn within<T>(time: Duration, call: impl Future<Output = kube::Result<T>>) -> Result<T, Problem> {
    match tokio::time::timeout(time, call).await {
        Ok(result) => result.map_err(Problem::from),
        Err(_) => Err(Problem::new(&format!("no answer within {} s", time.as_secs()))),
    }
}
