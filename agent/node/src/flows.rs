//! Reports flows to the member.
//!
//! A thread sums up equal decisions, window by window, and a task sends the windows over a connection of its own. Neither the kernel nor
//! the enforcer waits for them. Decisions that cannot be reported are dropped and counted.

mod window;

use std::borrow::BorrowMut;
use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use hanse_dataplane::{Backend, Decisions};
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_runtime::retry::Backoff;
use hanse_runtime::shutdown::Shutdown;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Channel;

use self::window::Window;
use crate::identity::NodeIdentity;
use crate::metrics::AgentMetrics;

/// How long decisions are summed up before they are reported.
const WINDOW: Duration = Duration::from_secs(2);
/// Windows that wait to be sent; beyond it the oldest is dropped. With those in [`QUEUE`], of at most [`hanse_protocol::MAX_FLOWS`] of about 100
/// bytes each, 2.5 MiB.
const MAX_WAITING: usize = 4;
/// Windows between the thread and the task: as many as are completed while one call may take.
const QUEUE: usize = 8;
/// How long the member may take for one window.
const CALL_TIME: Duration = Duration::from_secs(10);
/// When a member that does not accept flows is called again: it may have been replaced by another version.
const CALL_AGAIN: Duration = Duration::from_secs(60);
/// How long a window waits before it is dropped: the member identifies addresses when it receives the window.
const MAX_AGE: Duration = Duration::from_secs(30);
/// How often, and how far apart, listening is tried while another process listens: 2 s in all. The sockets of a killed agent may close a
/// moment after its successor starts.
const OPEN_TRIES: u32 = 40;
const OPEN_PAUSE: Duration = Duration::from_millis(50);

/// Listens to the decisions of `backend`, unless it is switched `off`. The error is a state for people. Blocks while another process
/// listens, at most 2 s.
pub fn listen(off: bool, backend: &mut dyn Backend) -> Result<Box<dyn Decisions>, String> {
    if off {
        return Err("off".to_owned());
    }
    open_patiently(|| backend.decisions(), std::thread::sleep).map_err(|error| {
        tracing::warn!(%error, "flow logging unavailable");
        format!("unavailable: {error}")
    })
}

fn open_patiently<T>(mut open: impl FnMut() -> io::Result<T>, mut pause: impl FnMut(Duration)) -> io::Result<T> {
    // Also the answer to a process without the privilege to listen.
    let is_taken =
        |error: &io::Error| matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::PermissionDenied);
    for _ in 1..OPEN_TRIES {
        match open() {
            Err(error) if is_taken(&error) => pause(OPEN_PAUSE),
            opened => return opened,
        }
    }
    open()
}

/// A window, or why there are none until the next one.
pub type WindowResult = Result<wire::Flows, String>;

/// Passes on the windows of `decisions` as they are complete, from a thread that ends with the receiver. After an error it listens
/// again.
///
/// # Errors
/// When there can be no more threads.
pub fn collect(mut decisions: Box<dyn Decisions>, shutdown: &Shutdown) -> io::Result<mpsc::Receiver<WindowResult>> {
    let (sender, windows) = mpsc::channel(QUEUE);
    let mut is_open = true;
    let listen = move || {
        let opened = match std::mem::take(&mut is_open) {
            true => Ok(()),
            // After a panic.
            false => open_patiently(|| decisions.reopen(), std::thread::sleep),
        };
        match opened {
            Ok(()) => follow(&mut *decisions, std::thread::sleep, &sender),
            // The receiver keeps reporting it.
            Err(error) => drop(sender.blocking_send(Err(format!("unavailable: {error}")))),
        }
    };
    shutdown.supervise_thread("decisions of the dataplane", listen)?;
    Ok(windows)
}

fn follow(decisions: &mut dyn Decisions, mut pause: impl FnMut(Duration), windows: &mpsc::Sender<WindowResult>) {
    let (mut window, mut backoff) = (Window::default(), Backoff::new(Duration::from_secs(1), Duration::from_secs(60)));
    while let Err(error) = read(decisions, &mut window, &mut backoff, windows) {
        tracing::error!(%error, "flow logging interrupted, listening again");
        window = hand_over(window, windows);
        if windows.blocking_send(Err(format!("interrupted: {error}"))).is_err() {
            return;
        }
        loop {
            pause(backoff.next_delay());
            if windows.is_closed() {
                return;
            }
            match decisions.reopen() {
                Ok(()) => break,
                Err(error) => tracing::debug!(%error, "flow logging still interrupted"),
            }
        }
        tracing::info!("flow logging resumed");
        // Also when it is empty: the member's answer shows that reports arrive again.
        if windows.blocking_send(Ok(std::mem::take(&mut window).message())).is_err() {
            return;
        }
    }
}

/// Reads until the receiver of windows is gone, or an error; `window` then has the decisions that were not passed on.
fn read(
    decisions: &mut dyn Decisions,
    window: &mut Window,
    backoff: &mut Backoff,
    windows: &mpsc::Sender<WindowResult>,
) -> io::Result<()> {
    while !windows.is_closed() {
        let end = Instant::now() + WINDOW;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            let dropped = decisions.wait(left, &mut |decided| window.add(decided))?;
            window.missed = window.missed.saturating_add(dropped);
        }
        window.missed = window.missed.saturating_add(decisions.suppressed()?);
        *window = hand_over(std::mem::take(window), windows);
        backoff.reset();
    }
    Ok(())
}

/// Passes on a window. Returns the next one, which starts with what was dropped where the receiver is late.
fn hand_over(window: Window, windows: &mpsc::Sender<WindowResult>) -> Window {
    if window.sums.is_empty() && window.missed == 0 {
        return window;
    }
    let late = windows.try_send(Ok(window.message())).err();
    let missed = late.and_then(|error| error.into_inner().ok()).as_ref().map_or(0, decisions);
    Window { missed, ..Window::default() }
}

/// The number of decisions of a message.
fn decisions(flows: &wire::Flows) -> u64 {
    flows.flows.iter().map(|flow| flow.count).fold(flows.missed, u64::saturating_add)
}

/// Windows that are not sent yet.
#[derive(Debug, Default)]
struct Waiting {
    /// With the time of their arrival.
    windows: VecDeque<(tokio::time::Instant, wire::Flows)>,
    missed: u64,
    /// Why there are no more windows.
    ended: Option<String>,
}

impl Waiting {
    fn push(&mut self, result: WindowResult) {
        let mut window = match result {
            Ok(window) => window,
            Err(error) => {
                self.ended = Some(error);
                return;
            }
        };
        self.ended = None;
        self.missed = self.missed.saturating_add(std::mem::take(&mut window.missed));
        if self.windows.len() >= MAX_WAITING {
            self.drop_oldest();
        }
        self.windows.push_back((tokio::time::Instant::now(), window));
    }

    fn drop_oldest(&mut self) {
        let missed = self.windows.pop_front().map_or(0, |(_, window)| decisions(&window));
        self.missed = self.missed.saturating_add(missed);
    }

    fn drop_expired(&mut self) {
        while self.windows.front().is_some_and(|(since, _)| since.elapsed() > MAX_AGE) {
            self.drop_oldest();
        }
    }

    /// The oldest window, with the number of dropped decisions.
    fn first(&self) -> Option<wire::Flows> {
        self.windows.front().map(|(_, window)| wire::Flows { missed: self.missed, ..window.clone() })
    }

    /// The oldest window was sent.
    fn sent(&mut self) {
        self.windows.pop_front();
        self.missed = 0;
    }
}

/// Why a window was not sent.
#[derive(Debug, thiserror::Error)]
enum ReportError {
    #[error("the member does not accept flows")]
    NotAccepted,
    /// It accepts them later, over the same connection.
    #[error("the member is busy: {0}")]
    Busy(String),
    /// It would not accept the same window again.
    #[error("the member cannot read them: {0}")]
    Unreadable(String),
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// The connection to a member, or its replacement in tests.
trait Link {
    /// Sends over the open connection, or a new one.
    async fn send(&mut self, member: &str, flows: wire::Flows) -> Result<(), ReportError>;
    /// The next window is sent over a new connection.
    fn close(&mut self);
    /// Returns when a new connection would use another certificate, and closes the open one.
    async fn renewed(&mut self);
}

/// Sends windows to one of `members` until `stop`, and publishes its state for people. A window whose answer was missed is sent again.
pub async fn report(
    mut windows: impl BorrowMut<mpsc::Receiver<WindowResult>>,
    state: watch::Sender<String>,
    identity: NodeIdentity,
    members: Vec<String>,
    metrics: AgentMetrics,
    stop: CancellationToken,
) {
    let link = NodeLink { renewed: identity.credentials.subscribe(), identity, open: None };
    report_over(link, windows.borrow_mut(), state, members, metrics, stop).await;
}

async fn report_over(
    mut link: impl Link,
    windows: &mut mpsc::Receiver<WindowResult>,
    state: watch::Sender<String>,
    members: Vec<String>,
    metrics: AgentMetrics,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    // Spread by half: 2 s to 6 s, then 3 s to 9 s.
    let mut busy = Backoff::new(Duration::from_secs(4), Duration::from_secs(6));
    let mut waiting = Waiting::default();
    // Successive members that do not accept flows.
    let mut not_accepted = 0;
    let mut in_turn = members.iter().cycle();
    let Some(mut member) = in_turn.next() else { return };
    loop {
        let error = loop {
            while let Ok(window) = windows.try_recv() {
                waiting.push(window);
            }
            waiting.drop_expired();
            let Some(first) = waiting.first() else {
                if let Some(ended) = &waiting.ended {
                    set(&state, ended.clone());
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    window = windows.recv() => match window {
                        Some(window) => waiting.push(window),
                        None => return,
                    }
                }
                continue;
            };
            let dropped = first.missed;
            let reported = decisions(&first).saturating_sub(dropped);
            let sent = tokio::select! {
                () = stop.cancelled() => return,
                sent = link.send(member, first) => sent,
            };
            match sent {
                Ok(()) => {
                    waiting.sent();
                    metrics.flows(reported, dropped);
                }
                Err(error) => break error,
            }
            backoff.reset();
            busy.reset();
            not_accepted = 0;
            set(&state, "reported to the member".to_owned());
        };
        if set(&state, format!("not reported: {error:#}")) {
            match &error {
                ReportError::NotAccepted => tracing::info!(member, "the member does not accept flows"),
                _ => tracing::warn!(error = format!("{error:#}"), member, "flows not reported, trying again"),
            }
        }
        if !matches!(error, ReportError::Busy(_)) {
            link.close();
            member = in_turn.next().unwrap_or(member);
        }
        not_accepted = if matches!(error, ReportError::NotAccepted) { not_accepted + 1 } else { 0 };
        let pause = match error {
            // The next one may accept them.
            ReportError::NotAccepted if not_accepted % members.len() > 0 => Duration::ZERO,
            ReportError::NotAccepted => CALL_AGAIN,
            ReportError::Busy(_) => busy.next_delay(),
            ReportError::Failed(_) => backoff.next_delay(),
            ReportError::Unreadable(_) => {
                waiting.drop_oldest();
                backoff.next_delay()
            }
        };
        let over = tokio::time::sleep(pause);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = &mut over => break,
                // A new certificate may replace one that has expired.
                () = link.renewed() => break,
                Some(window) = windows.recv() => waiting.push(window),
            }
        }
    }
}

/// Sets the state. Returns whether it changed.
fn set(state: &watch::Sender<String>, text: String) -> bool {
    state.send_if_modified(|last| {
        let changed = *last != text;
        *last = text;
        changed
    })
}

/// Connections of the node, over TLS.
struct NodeLink {
    identity: NodeIdentity,
    renewed: watch::Receiver<()>,
    open: Option<Open>,
}

/// The connection to a member.
#[derive(Debug)]
struct Open {
    client: AgentsClient<Channel>,
    ends_at: SystemTime,
}

impl Link for NodeLink {
    async fn send(&mut self, member: &str, flows: wire::Flows) -> Result<(), ReportError> {
        // The next connection uses the new certificate.
        let lasts = |it: &Open| it.ends_at.duration_since(SystemTime::now()).is_ok_and(|left| left > CALL_TIME);
        let is_renewed = self.renewed.has_changed().unwrap_or(false);
        self.open = self.open.take().filter(|it| lasts(it) && !is_renewed);
        self.renewed.mark_unchanged();
        let open = match &mut self.open {
            Some(open) => open,
            none => {
                self.identity.check_time()?;
                let connection = self.identity.client()?.connect(member).await.context("reach the member")?;
                none.insert(Open { client: AgentsClient::new(connection.channel), ends_at: connection.peer.ends_at })
            }
        };
        let answer = tokio::time::timeout(CALL_TIME, open.client.report_flows(flows)).await;
        match answer.context("the member did not answer")? {
            Ok(_) => Ok(()),
            Err(status) => Err(match status.code() {
                Code::Unimplemented => ReportError::NotAccepted,
                Code::ResourceExhausted => ReportError::Busy(status.message().to_owned()),
                Code::InvalidArgument => ReportError::Unreadable(status.message().to_owned()),
                _ => ReportError::Failed(anyhow::anyhow!("the member refused them: {}", status.message())),
            }),
        }
    }

    fn close(&mut self) {
        self.open = None;
    }

    async fn renewed(&mut self) {
        match self.renewed.changed().await {
            Ok(()) => self.open = None,
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests;
