//! What is wrong between this hub and its management cluster, for `hanse status`: of the operator, of the admission webhook, and of
//! the API server as a whole.
//!
//! The parts of the hub that send requests note what fails, and what succeeds again. A failure that is not repeated is forgotten: a
//! watch, for example, does not report that it was started again. Each replica of the hub writes its problems to the store, so that
//! every replica shows those of all.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hanse_kubernetes::RequestError;
use hanse_kubernetes::election::{DURATION, Holder};
use kube::runtime::watcher;
use tokio::time::Instant;

use crate::registry::records::{OperatorProblem, OperatorRecord};

/// Failures in memory: 64 × about 700 bytes. More than these are not noted.
const MAX_FAILURES: usize = 64;
/// Problems of one hub in a status.
pub const MAX_PROBLEMS: usize = 24;
/// Characters of a message in a status: the answer of an API server can have any length.
const MAX_MESSAGE: usize = 512;
/// A restart of an API server, or one connection that ends, is not a problem.
const UNANSWERED_FOR: Duration = Duration::from_secs(5);
/// After the end of a process that led, another one takes the Lease within its duration and some attempts.
const LEADERLESS_FOR: Duration = DURATION.saturating_add(Duration::from_secs(5));
/// A change is reconciled within a second; a refused one waits for no other.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// The reason where no hub with the Lease is known.
pub const NO_LEADER: &str = "NoLeader";
/// The part of an object that is the object itself.
pub const OBJECT: &str = "object";
/// Every hub with a webhook reads the approvals, also one that does not lead.
pub const APPROVALS: Task = Task::Read("PolicyApproval");

/// What a hub does in the management cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// Acquire and renew the Lease of the operator.
    Lease,
    /// List and watch the objects of this kind.
    Read(&'static str),
    /// Write this part of an object of this kind.
    Write(&'static str, &'static str),
    /// Read the definition of this kind, before objects are deleted.
    Definition(&'static str),
    /// Create the Secret of a token.
    Secret,
    /// Write Events.
    Event,
    /// Reconcile all objects.
    Reconcile,
    /// Process the approvals.
    Approvals,
    /// Query the rights of users.
    Review,
    /// Read an object of this kind whose change a user approves.
    Approve(&'static str),
}

impl Task {
    /// The reason for programs.
    fn reason(self) -> &'static str {
        match self {
            Self::Lease => "LeaseNotAcquired",
            Self::Read(_) | Self::Definition(_) | Self::Approve(_) => "NotRead",
            Self::Write(..) | Self::Secret | Self::Event => "NotWritten",
            Self::Reconcile | Self::Approvals => "NotReconciled",
            Self::Review => "RightsNotChecked",
        }
    }

    /// How long a failure is remembered that does not occur again: some three times the longest delay between two attempts.
    fn remembered_for(self) -> Duration {
        Duration::from_secs(match self {
            Self::Lease | Self::Read(_) | Self::Definition(_) | Self::Reconcile | Self::Approvals => 30,
            Self::Write(..) | Self::Secret => 180,
            // There is no other attempt until the next occasion.
            Self::Event | Self::Review | Self::Approve(_) => 600,
        })
    }

    fn message(self, objects: &[&str], answer: &str) -> String {
        let first = objects.first().copied().unwrap_or_default();
        let named = |kind: &str| match objects.len() {
            0 | 1 => format!("{kind}/{first}"),
            // Where all places are taken, there may be more.
            count @ MAX_FAILURES.. => format!("{kind}/{first} and at least {} more", count - 1),
            count => format!("{kind}/{first} and {} more", count - 1),
        };
        match self {
            Self::Lease => format!("the Lease of the operator cannot be acquired or renewed: {answer}"),
            Self::Read(kind) => format!("{kind} cannot be listed or watched: {answer}"),
            Self::Write(kind, OBJECT) => format!("{} not created: {answer}", named(kind)),
            Self::Write(kind, part) => format!("{part} of {} not written: {answer}", named(kind)),
            Self::Definition(kind) => format!("deletions of {kind} wait: {answer}"),
            Self::Secret => format!("the Secret of {} not written: {answer}", named("ClusterJoinToken")),
            Self::Event => format!("Events not written: {answer}"),
            Self::Reconcile => format!("custom resources are not reconciled: {answer}"),
            Self::Approvals => format!("approvals are not processed: {answer}"),
            Self::Approve(kind) => format!("approvals of changes of {kind} are refused: {answer}"),
            Self::Review => format!("the rights of users cannot be checked, and their changes are refused: {answer}"),
        }
    }
}

#[derive(Debug)]
struct Failure {
    /// Seconds since 1970.
    since: u64,
    last: Instant,
    answer: String,
}

#[derive(Debug, Default)]
struct Observed {
    /// By the task, and the object that it concerns.
    failures: BTreeMap<(Task, String), Failure>,
    /// Since when the API server does not answer, and why.
    unanswered: Option<(Instant, u64, String)>,
    /// Since when this process leads.
    leads_since: Option<u64>,
    /// Another process that leads.
    leader: Option<String>,
    leaderless: Option<(Instant, u64)>,
    /// When the oldest change arrived that is not reconciled.
    waiting: Option<(Instant, u64)>,
    /// Why API servers cannot use the webhook of this process: the reason, the message, and since when.
    webhook: Option<(&'static str, String, u64)>,
}

/// Notes what succeeds and what fails. Clones share it.
#[derive(Debug, Clone)]
pub struct Monitor {
    /// The name of this process in the Lease.
    identity: Arc<str>,
    observed: Arc<Mutex<Observed>>,
}

/// Seconds since 1970.
fn now() -> u64 {
    crate::registry::seconds(std::time::SystemTime::now())
}

impl Monitor {
    pub fn new(identity: &str) -> Self {
        let observed = Observed { leaderless: Some((Instant::now(), now())), ..Observed::default() };
        Self { identity: identity.into(), observed: Arc::new(Mutex::new(observed)) }
    }

    /// The name of this process in the Lease.
    pub fn identity(&self) -> &Arc<str> {
        &self.identity
    }

    fn observed(&self) -> MutexGuard<'_, Observed> {
        self.observed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the API server has answered a request about an object with success.
    pub fn succeeded(&self, task: Task, object: &str) {
        self.observed().unanswered = None;
        self.done(task, object);
    }

    /// Notes that a task has no problem any more, with or without a request.
    pub fn done(&self, task: Task, object: &str) {
        let mut observed = self.observed();
        if !observed.failures.is_empty() {
            observed.failures.remove(&(task, object.to_owned()));
        }
    }

    /// Notes that a request was refused, or had no answer. Without an answer, the API server is the problem, not the task.
    pub fn failed(&self, task: Task, object: &str, error: &anyhow::Error) {
        match error.downcast_ref::<RequestError>() {
            Some(request) if !request.is_refusal => self.unanswered(format!("{error:#}")),
            _ => self.refused(task, object, &format!("{error:#}")),
        }
    }

    /// Notes that the API server has answered a request with a refusal.
    pub fn refused(&self, task: Task, object: &str, answer: &str) {
        let mut observed = self.observed();
        // Its error may be that of the store.
        if !matches!(task, Task::Reconcile | Task::Approvals) {
            observed.unanswered = None;
        }
        let (key, answer) = ((task, object.to_owned()), clipped(answer));
        if let Some(failure) = observed.failures.get_mut(&key) {
            (failure.last, failure.answer) = (Instant::now(), answer);
        } else if observed.failures.len() < MAX_FAILURES || !observed.failures.keys().any(|(of, _)| *of == task) {
            // Many objects of one task do not hide another task.
            observed.failures.insert(key, Failure { since: now(), last: Instant::now(), answer });
        }
    }

    /// Notes that a request had no answer.
    pub fn unanswered(&self, why: String) {
        let mut observed = self.observed();
        let (since, at) = observed.unanswered.take().map_or_else(|| (Instant::now(), now()), |it| (it.0, it.1));
        observed.unanswered = Some((since, at, clipped(&why)));
    }

    /// Notes why a watch has ended.
    pub fn watch_failed(&self, task: Task, error: &watcher::Error) {
        let request = match error {
            watcher::Error::InitialListFailed(error)
            | watcher::Error::WatchStartFailed(error)
            | watcher::Error::WatchFailed(error) => match error {
                kube::Error::Api(status) => Ok(status.message.clone()),
                _ => Err(error.to_string()),
            },
            // The version is too old: the objects are listed again.
            watcher::Error::WatchError(status) if status.code == 410 => return,
            watcher::Error::WatchError(status) => Ok(status.message.clone()),
            watcher::Error::NoResourceVersion => Ok(error.to_string()),
        };
        match request {
            Ok(answer) => self.refused(task, "", &answer),
            Err(why) => self.unanswered(why),
        }
    }

    /// Notes the result of an attempt to acquire or renew the Lease.
    pub fn attempted(&self, attempt: &anyhow::Result<Holder>) {
        let holder = match attempt {
            Ok(holder) => {
                self.succeeded(Task::Lease, "");
                Some(holder)
            }
            Err(error) => {
                self.failed(Task::Lease, "", error);
                None
            }
        };
        let mut observed = self.observed();
        observed.leader = match holder {
            Some(Holder::Other(name)) => Some(clipped(name)),
            _ => None,
        };
        if observed.leader.is_some() || observed.leads_since.is_some() {
            observed.leaderless = None;
        } else if observed.leaderless.is_none() {
            observed.leaderless = Some((Instant::now(), now()));
        }
    }

    /// Notes that this process leads from now on, or that it does not. What its operator found is over then.
    pub fn leads(&self, leads: bool) {
        let mut observed = self.observed();
        observed.leads_since = leads.then(now);
        observed.leaderless = (!leads).then(|| (Instant::now(), now()));
        observed.waiting = None;
        if !leads {
            let is_of_leader = |task| match task {
                Task::Read(_) => task != APPROVALS,
                Task::Lease | Task::Approvals | Task::Review | Task::Approve(_) => false,
                Task::Write(..) | Task::Definition(_) | Task::Secret | Task::Event | Task::Reconcile => true,
            };
            observed.failures.retain(|(task, _), _| !is_of_leader(*task));
        }
    }

    /// Notes why API servers cannot use the webhook of this process; `None`: they can.
    pub fn webhook(&self, problem: Option<(&'static str, &str)>) {
        let mut observed = self.observed();
        let before = observed.webhook.take();
        observed.webhook = problem.map(|(reason, message)| {
            let since = before.filter(|it| it.0 == reason).map_or_else(now, |it| it.2);
            (reason, clipped(message), since)
        });
    }

    /// Notes since when a change waits. `None`: all are reconciled.
    pub fn waiting(&self, since: Option<Instant>) {
        self.observed().waiting = since.map(|it| (it, now().saturating_sub(it.elapsed().as_secs())));
    }

    /// How long the oldest change has waited that is not reconciled.
    pub fn waiting_for(&self) -> Duration {
        self.observed().waiting.map_or(Duration::ZERO, |it| it.0.elapsed())
    }

    /// The state of this process.
    pub fn record(&self) -> OperatorRecord {
        let mut observed = self.observed();
        observed.failures.retain(|(task, _), it| it.last.elapsed() <= task.remembered_for());
        let mut problems = Vec::new();
        let mut add = |reason: &str, message: String, since| {
            problems.push(OperatorProblem { reason: reason.to_owned(), message: clipped(&message), since });
        };
        if let Some((_, at, why)) = observed.unanswered.as_ref().filter(|it| it.0.elapsed() >= UNANSWERED_FOR) {
            let text = format!("the API server of the management cluster does not answer: {why}");
            add("APIServerUnavailable", text, *at);
        }
        if let Some((_, at)) = observed.leaderless.filter(|it| it.0.elapsed() >= LEADERLESS_FOR) {
            let text = "no hub with the Lease of the operator is known: changes of custom resources wait, and their status is old";
            add(NO_LEADER, text.to_owned(), at);
        }
        if let Some((_, at)) = observed.waiting.filter(|it| it.0.elapsed() >= STUCK_AFTER) {
            add("QueueStuck", "a change of a custom resource waits to be reconciled".to_owned(), at);
        }
        if let Some((reason, message, at)) = observed.webhook.clone() {
            add(reason, message, at);
        }
        let tasks: Vec<(&(Task, String), &Failure)> = observed.failures.iter().collect();
        for of_task in tasks.chunk_by(|one, other| one.0.0 == other.0.0) {
            let objects: Vec<&str> = of_task.iter().map(|((_, object), _)| &**object).collect();
            let since = of_task.iter().map(|(_, it)| it.since).min().unwrap_or_default();
            let Some(((task, _), first)) = of_task.first() else { continue };
            add(task.reason(), task.message(&objects, &first.answer), since);
        }
        let total = u32::try_from(problems.len()).unwrap_or(u32::MAX);
        problems.truncate(MAX_PROBLEMS);
        OperatorRecord { leads_since: observed.leads_since, leader: observed.leader.clone(), problems, total }
    }
}

pub(crate) fn clipped(text: &str) -> String {
    match text.char_indices().nth(MAX_MESSAGE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> anyhow::Error {
        let error = RequestError { message: text.to_owned(), is_refusal: true };
        anyhow::Error::from(error).context("read something")
    }

    fn reasons(monitor: &Monitor) -> Vec<String> {
        monitor.record().problems.into_iter().map(|it| it.reason).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_are_named_until_they_end_or_are_not_repeated() {
        let monitor = Monitor::new("hub-0");
        monitor.attempted(&Ok(Holder::This));
        monitor.leads(true);
        assert_eq!(reasons(&monitor), [""; 0]);
        let status = Task::Write("Tier", "status");
        for name in ["a", "b", "c"] {
            monitor.refused(status, name, "forbidden");
        }
        monitor.failed(Task::Definition("Tier"), "", &refusal("cannot get"));
        let record = monitor.record();
        let messages: Vec<&str> = record.problems.iter().map(|it| &*it.message).collect();
        let expected = [
            "status of Tier/a and 2 more not written: forbidden",
            "deletions of Tier wait: read something: cannot get",
        ];
        assert_eq!(messages, expected);
        for name in ["a", "b"] {
            monitor.succeeded(status, name);
        }
        monitor.succeeded(Task::Definition("Tier"), "");
        assert_eq!(monitor.record().problems[0].message, "status of Tier/c not written: forbidden");
        // The object was deleted meanwhile.
        tokio::time::advance(status.remembered_for() + Duration::from_secs(1)).await;
        assert_eq!(reasons(&monitor), [""; 0]);
        // Texts and counts are bounded.
        for number in 0..1_000 {
            monitor.refused(status, &number.to_string(), &"x".repeat(10_000));
        }
        let record = monitor.record();
        assert_eq!((record.problems.len(), record.total), (1, 1));
        assert!(record.problems[0].message.contains("at least 63 more"), "{}", record.problems[0].message);
        assert!(record.problems[0].message.chars().count() <= MAX_MESSAGE + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn api_server_without_answers_is_one_problem() {
        let monitor = Monitor::new("hub-0");
        monitor.attempted(&Ok(Holder::This));
        monitor.leads(true);
        let refused = || RequestError { message: "connection refused".to_owned(), is_refusal: false };
        monitor.failed(Task::Read("Tier"), "", &refused().into());
        monitor.attempted(&Err(refused().into()));
        assert_eq!(reasons(&monitor), [""; 0], "a single failure");
        tokio::time::advance(UNANSWERED_FOR).await;
        assert_eq!(reasons(&monitor), ["APIServerUnavailable"]);
        monitor.leads(false);
        monitor.attempted(&Err(refused().into()));
        tokio::time::advance(LEADERLESS_FOR).await;
        assert_eq!(reasons(&monitor), ["APIServerUnavailable", "NoLeader"]);
        // It answers, and another hub leads.
        monitor.attempted(&Ok(Holder::Other("hub-1".to_owned())));
        let record = monitor.record();
        assert_eq!((record.problems.len(), record.leader.as_deref(), record.leads_since), (0, Some("hub-1"), None));
    }

    #[tokio::test(start_paused = true)]
    async fn queue_is_stuck_when_a_change_waits() {
        let monitor = Monitor::new("hub-0");
        monitor.leads(true);
        monitor.waiting(Some(Instant::now()));
        assert_eq!(reasons(&monitor), [""; 0]);
        tokio::time::advance(STUCK_AFTER).await;
        monitor.refused(Task::Reconcile, "", "the store failed");
        assert_eq!(reasons(&monitor), ["QueueStuck", "NotReconciled"]);
        monitor.waiting(None);
        monitor.done(Task::Reconcile, "");
        assert_eq!(reasons(&monitor), [""; 0]);
    }
}
