//! Reports flows to the member.
//!
//! A thread sums up equal decisions, window by window, and a task sends the windows over a connection of its own. Neither the kernel nor
//! the enforcer waits for them. Decisions that cannot be reported are dropped and counted.

use std::borrow::BorrowMut;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use hanse_dataplane::{Backend, Decided, Decision, Decisions};
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_protocol::MAX_FLOWS;
use hanse_runtime::retry::Backoff;
use hanse_runtime::shutdown::Shutdown;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Channel;

use crate::identity::NodeIdentity;
use crate::metrics::AgentMetrics;

/// How long decisions are summed up before they are reported.
const WINDOW: Duration = Duration::from_secs(2);
/// Flows of one source and decision in a window: it takes ten pods that scan ports to fill a window.
const MAX_OF_SOURCE: usize = 200;
/// Windows that wait to be sent; beyond it the oldest is dropped. With those in [`QUEUE`], of at most [`MAX_FLOWS`] of about 100
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

/// What equal decisions have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct FlowKey {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    port: u16,
    icmp: Option<(u8, u8)>,
    decision: Decision,
}

#[derive(Debug, Clone)]
struct Sum {
    /// Of the last decision.
    source_port: u16,
    count: u64,
    first_ms: u64,
    last_ms: u64,
}

/// The decisions of some time.
#[derive(Debug, Default)]
struct Window {
    sums: HashMap<FlowKey, Sum>,
    /// The number of sums of each source and decision; at most one entry for each sum.
    of_source: HashMap<(IpAddr, Decision), usize>,
    lost: u64,
}

impl Window {
    fn add(&mut self, decided: Decided) {
        let Decided { decision, source, destination, protocol, port, source_port, icmp, at } = decided;
        let at = at.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        let key = FlowKey { source, destination, protocol, port, icmp, decision };
        if let Some(sum) = self.sums.get_mut(&key) {
            sum.count += 1;
            sum.first_ms = sum.first_ms.min(at);
            // Decisions of the two directions arrive in different order.
            if at >= sum.last_ms {
                (sum.last_ms, sum.source_port) = (at, source_port);
            }
        } else if self.sums.len() < MAX_FLOWS
            && self.of_source.get(&(source, decision)).is_none_or(|sums| *sums < MAX_OF_SOURCE)
        {
            *self.of_source.entry((source, decision)).or_default() += 1;
            self.sums.insert(key, Sum { source_port, count: 1, first_ms: at, last_ms: at });
        } else {
            self.lost += 1;
        }
    }

    fn message(self) -> wire::Flows {
        let mut sums: Vec<(FlowKey, Sum)> = self.sums.into_iter().collect();
        sums.sort_by(|(a, a_sum), (b, b_sum)| (a_sum.first_ms, a).cmp(&(b_sum.first_ms, b)));
        wire::Flows { flows: sums.into_iter().map(|(key, sum)| flow(&key, &sum)).collect(), lost: self.lost }
    }
}

fn flow(key: &FlowKey, sum: &Sum) -> wire::Flow {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec().into(),
        IpAddr::V6(address) => address.octets().to_vec().into(),
    };
    let decision = match key.decision {
        Decision::Allowed => wire::Decision::Allowed,
        Decision::Denied => wire::Decision::Denied,
        Decision::Cut => wire::Decision::Cut,
    };
    wire::Flow {
        source: bytes(key.source),
        destination: bytes(key.destination),
        protocol: key.protocol.into(),
        port: key.port.into(),
        source_port: sum.source_port.into(),
        icmp: key.icmp.map(|(kind, code)| wire::Icmp { r#type: kind.into(), code: Some(code.into()) }),
        decision: decision.into(),
        count: sum.count,
        first_ms: sum.first_ms,
        last_ms: sum.last_ms,
    }
}

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
            window.lost = window.lost.saturating_add(dropped);
        }
        window.lost = window.lost.saturating_add(decisions.suppressed()?);
        *window = hand_over(std::mem::take(window), windows);
        backoff.reset();
    }
    Ok(())
}

/// Passes on a window. Returns the next one, which starts with what was dropped where the receiver is late.
fn hand_over(window: Window, windows: &mpsc::Sender<WindowResult>) -> Window {
    if window.sums.is_empty() && window.lost == 0 {
        return window;
    }
    let late = windows.try_send(Ok(window.message())).err();
    let lost = late.and_then(|error| error.into_inner().ok()).as_ref().map_or(0, decisions);
    Window { lost, ..Window::default() }
}

/// The number of decisions of a message.
fn decisions(flows: &wire::Flows) -> u64 {
    flows.flows.iter().map(|flow| flow.count).fold(flows.lost, u64::saturating_add)
}

/// Windows that are not sent yet.
#[derive(Debug, Default)]
struct Waiting {
    /// With the time of their arrival.
    windows: VecDeque<(tokio::time::Instant, wire::Flows)>,
    lost: u64,
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
        self.lost = self.lost.saturating_add(std::mem::take(&mut window.lost));
        if self.windows.len() >= MAX_WAITING {
            self.drop_oldest();
        }
        self.windows.push_back((tokio::time::Instant::now(), window));
    }

    fn drop_oldest(&mut self) {
        let lost = self.windows.pop_front().map_or(0, |(_, window)| decisions(&window));
        self.lost = self.lost.saturating_add(lost);
    }

    fn drop_expired(&mut self) {
        while self.windows.front().is_some_and(|(since, _)| since.elapsed() > MAX_AGE) {
            self.drop_oldest();
        }
    }

    /// The oldest window, with the number of dropped decisions.
    fn first(&self) -> Option<wire::Flows> {
        self.windows.front().map(|(_, window)| wire::Flows { lost: self.lost, ..window.clone() })
    }

    /// The oldest window was sent.
    fn sent(&mut self) {
        self.windows.pop_front();
        self.lost = 0;
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
            let dropped = first.lost;
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
mod tests {
    use super::*;

    fn decided(port: u16, source_port: u16, at_ms: u64) -> Decided {
        Decided {
            decision: Decision::Allowed,
            source: [10, 1, 0, 2].into(),
            destination: [10, 1, 0, 3].into(),
            protocol: 6,
            port,
            source_port,
            icmp: None,
            at: UNIX_EPOCH + Duration::from_millis(at_ms),
        }
    }

    fn window(decisions: impl IntoIterator<Item = Decided>) -> wire::Flows {
        let mut window = Window::default();
        decisions.into_iter().for_each(|decided| window.add(decided));
        window.message()
    }

    #[test]
    fn sums_up_equal_decisions_in_order_of_time() {
        let denied = Decided { decision: Decision::Denied, ..decided(80, 7, 8) };
        let echo = Decided {
            source: "fd01::2".parse().expect("an address"),
            destination: "fd01::3".parse().expect("an address"),
            protocol: 58,
            icmp: Some((128, 0)),
            decision: Decision::Cut,
            ..decided(0, 0, 3)
        };
        // Not in order of time; every field except the source port makes another flow.
        let all = [
            decided(80, 5, 20),
            decided(80, 4, 10),
            decided(81, 6, 9),
            denied,
            echo.clone(),
            Decided { icmp: Some((128, 1)), at: UNIX_EPOCH + Duration::from_millis(2), ..echo },
            decided(80, 3, 15),
        ];
        let reported = window(all);
        let short = |it: &wire::Flow| (it.port, it.source_port, it.count, it.first_ms, it.last_ms, it.decision());
        let (allowed, denied, cut) = (wire::Decision::Allowed, wire::Decision::Denied, wire::Decision::Cut);
        assert_eq!(
            reported.flows.iter().map(short).collect::<Vec<_>>(),
            [
                (0, 0, 1, 2, 2, cut),
                (0, 0, 1, 3, 3, cut),
                (80, 7, 1, 8, 8, denied),
                (81, 6, 1, 9, 9, allowed),
                (80, 5, 3, 10, 20, allowed)
            ]
        );
        let icmp = reported.flows.iter().map(|it| it.icmp.map(|icmp| (icmp.r#type, icmp.code))).collect::<Vec<_>>();
        assert_eq!(icmp, [Some((128, Some(1))), Some((128, Some(0))), None, None, None]);
        let ends = |it: &wire::Flow| (it.source.to_vec(), it.destination.to_vec(), it.protocol);
        assert_eq!(ends(&reported.flows[4]), (vec![10, 1, 0, 2], vec![10, 1, 0, 3], 6));
        assert_eq!(
            (reported.flows[0].source.len(), reported.flows[0].source[15], reported.flows[0].destination[15]),
            (16, 2, 3)
        );
    }

    #[test]
    fn window_counts_flows_beyond_its_limit() {
        let ports = || (1u16..).take(MAX_FLOWS + 10);
        // Of many sources, so that none reaches its own limit.
        let of = |port: u16| Decided { source: [10, 1, 1, (port % 100) as u8].into(), ..decided(port, 1, 1) };
        let reported = window(ports().chain(ports()).map(of));
        assert_eq!((reported.flows.len(), reported.lost), (MAX_FLOWS, 20));
        assert!(reported.flows.iter().all(|flow| flow.count == 2), "flows of the window are still counted");
        assert_eq!(decisions(&reported), 2 * (MAX_FLOWS as u64 + 10));
    }

    #[test]
    fn source_that_scans_ports_leaves_room_for_other_flows() {
        let scan = (1..).take(MAX_FLOWS).map(|port| Decided { decision: Decision::Denied, ..decided(port, 1, 1) });
        let other = Decided { source: [10, 1, 0, 9].into(), decision: Decision::Denied, ..decided(80, 1, 1) };
        let reported = window(scan.chain([other, decided(80, 1, 1), decided(80, 1, 2)]));
        let rest = (MAX_FLOWS - MAX_OF_SOURCE) as u64;
        assert_eq!((reported.flows.len(), reported.lost), (MAX_OF_SOURCE + 2, rest));
        assert_eq!(decisions(&reported), MAX_FLOWS as u64 + 3);
    }

    #[test]
    fn waits_for_another_listener_to_end() {
        let opened = |failures: u32, kind: io::ErrorKind| {
            let (mut tries, mut waited) = (0, Duration::ZERO);
            let open = || {
                tries += 1;
                if tries > failures { Ok(()) } else { Err(io::Error::from(kind)) }
            };
            let opened = open_patiently(open, |pause| waited += pause);
            (opened.map_err(|error| error.kind()), tries, waited.as_millis())
        };
        let (taken, unknown) = (io::ErrorKind::PermissionDenied, io::ErrorKind::Unsupported);
        assert_eq!(opened(0, taken), (Ok(()), 1, 0));
        for kind in [taken, io::ErrorKind::ResourceBusy] {
            assert_eq!(opened(3, kind), (Ok(()), 4, 150));
        }
        assert_eq!(opened(u32::MAX, taken), (Err(taken), 40, 1_950));
        assert_eq!(opened(1, unknown), (Err(unknown), 1, 0));
    }

    /// Reports one decision, then fails; reopens as often as its script says.
    struct Breaking<'a> {
        port: Option<u16>,
        reopen: Box<dyn FnMut() -> io::Result<Option<u16>> + Send + 'a>,
    }

    impl Decisions for Breaking<'_> {
        fn reopen(&mut self) -> io::Result<()> {
            self.port = (self.reopen)()?;
            Ok(())
        }

        fn wait(&mut self, _: Duration, receive: &mut dyn FnMut(Decided)) -> io::Result<u64> {
            self.port.take().map(|port| receive(decided(port, 1, 1))).ok_or(io::ErrorKind::BrokenPipe)?;
            Ok(1)
        }

        fn suppressed(&mut self) -> io::Result<u64> {
            Ok(0)
        }
    }

    #[test]
    fn listens_again_after_an_error_and_passes_on_what_was_read_before() {
        let (sender, mut windows) = mpsc::channel::<WindowResult>(QUEUE);
        let (mut opened, mut pauses, mut received) = (0, Vec::new(), Vec::new());
        let reopen = || {
            opened += 1;
            match opened {
                1..=9 => Err(io::ErrorKind::ResourceBusy.into()),
                10 => Ok(Some(81)),
                _ => {
                    while let Ok(it) = windows.try_recv() {
                        received
                            .push(it.map(|it| (it.flows.iter().map(|flow| flow.port).collect::<Vec<_>>(), it.lost)));
                    }
                    windows.close();
                    Ok(None)
                }
            }
        };
        let mut breaking = Breaking { port: Some(80), reopen: Box::new(reopen) };
        follow(&mut breaking, |pause| pauses.push(pause.as_millis()), &sender);
        drop(breaking);
        assert!(received.iter().filter_map(|it| it.as_ref().err()).all(|it| it == "interrupted: broken pipe"));
        let received: Vec<_> = received.into_iter().map(Result::ok).collect();
        let ports = |ports: &[u32], lost| Some((ports.to_vec(), lost));
        assert_eq!(received, [ports(&[80], 1), None, ports(&[], 0), ports(&[81], 1), None]);
        assert!((500..=1_500).contains(&pauses[0]) && pauses.len() == 11, "{pauses:?}");
        assert!(pauses[6..].iter().all(|pause| (30_000..=90_000).contains(pause)), "{pauses:?}");
    }

    /// Time, member, window, and whether the connection is new.
    type Call = (u64, String, wire::Flows, bool);

    struct Answers {
        answers: VecDeque<Result<(), ReportError>>,
        calls: mpsc::UnboundedSender<Call>,
        began: tokio::time::Instant,
        open: bool,
    }

    impl Link for Answers {
        async fn send(&mut self, member: &str, flows: wire::Flows) -> Result<(), ReportError> {
            let is_new = !std::mem::replace(&mut self.open, true);
            let at = u64::try_from(self.began.elapsed().as_millis()).expect("a small number");
            self.calls.send((at, member.to_owned(), flows, is_new)).expect("received");
            self.answers.pop_front().unwrap_or(Ok(()))
        }

        fn close(&mut self) {
            self.open = false;
        }

        async fn renewed(&mut self) {
            std::future::pending().await
        }
    }

    struct Reporter {
        windows: mpsc::Sender<WindowResult>,
        state: watch::Receiver<String>,
        calls: mpsc::UnboundedReceiver<Call>,
        _stop: tokio_util::sync::DropGuard,
    }

    impl Reporter {
        /// With members `a`, `b` and so on.
        fn new(members: usize, answers: impl IntoIterator<Item = ReportError>) -> Self {
            let (windows, mut receiver) = mpsc::channel(QUEUE);
            let (sender, state) = watch::channel(String::new());
            let (call, calls) = mpsc::unbounded_channel();
            let (answers, stop) = (answers.into_iter().map(Err).collect(), CancellationToken::new());
            let link = Answers { answers, calls: call, began: tokio::time::Instant::now(), open: false };
            let members = ["a", "b", "c"][..members].iter().map(|it| (*it).to_owned()).collect();
            let until = stop.clone();
            tokio::spawn(async move {
                report_over(link, &mut receiver, sender, members, AgentMetrics::default(), until).await
            });
            Self { windows, state, calls, _stop: stop.drop_guard() }
        }

        async fn send(&self, port: u16) {
            self.windows.send(Ok(window([decided(port, 1, 1)]))).await.expect("taken");
        }

        /// Time, member, port of the first flow, dropped decisions, and whether the connection is new.
        async fn call(&mut self) -> (u64, String, Option<u32>, u64, bool) {
            let (at, member, flows, is_new) = self.calls.recv().await.expect("a call");
            (at, member, flows.flows.first().map(|flow| flow.port), flows.lost, is_new)
        }

        async fn state(&mut self, wanted: &str) {
            let reached = tokio::time::timeout(MAX_AGE, self.state.wait_for(|it| it == wanted)).await;
            assert!(reached.is_ok_and(|it| it.is_ok()), "{wanted}: {:?}", self.state);
        }
    }

    fn busy() -> ReportError {
        ReportError::Busy("later".to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn busy_member_is_called_again_over_the_same_connection() {
        let mut reporter = Reporter::new(2, std::iter::repeat_with(busy).take(8));
        reporter.send(1).await;
        assert_eq!(reporter.call().await, (0, "a".to_owned(), Some(1), 0, true));
        reporter.state("not reported: the member is busy: later").await;
        let (mut last, mut pauses) = (0, Vec::new());
        for port in 2..10 {
            // More windows arrive than can wait.
            reporter.send(port).await;
            let (at, member, port, lost, is_new) = reporter.call().await;
            assert_eq!((member.as_str(), is_new), ("a", false));
            // The first is sent until it is dropped, for their number or its age.
            assert_eq!(u64::from(port.expect("one waits")), lost + 1);
            pauses.push(at - last);
            last = at;
        }
        assert!(pauses.iter().all(|pause| (2_000..=10_000).contains(pause)), "{pauses:?}");
        pauses.dedup();
        assert!(pauses.len() > 4, "they differ: {pauses:?}");
        reporter.state("reported to the member").await;
    }

    #[tokio::test(start_paused = true)]
    async fn state_shows_why_there_are_no_windows_until_they_continue() {
        let mut reporter = Reporter::new(1, [busy()]);
        reporter.send(1).await;
        reporter.windows.send(Err("interrupted: gone".to_owned())).await.expect("taken");
        reporter.state("not reported: the member is busy: later").await;
        reporter.state("interrupted: gone").await;
        assert_eq!((reporter.call().await.2, reporter.call().await.2), (Some(1), Some(1)));
        let changed = tokio::time::timeout(CALL_AGAIN, reporter.state.changed()).await;
        assert!(changed.is_err(), "{:?}", reporter.state);
        reporter.windows.send(Ok(wire::Flows::default())).await.expect("taken");
        reporter.state("reported to the member").await;
        assert_eq!(reporter.call().await.2, None, "an empty window shows that reports arrive");
    }

    #[tokio::test(start_paused = true)]
    async fn drops_windows_that_wait_too_long() {
        let mut reporter = Reporter::new(1, [ReportError::NotAccepted]);
        reporter.send(1).await;
        assert_eq!(reporter.call().await.2, Some(1));
        tokio::time::advance(CALL_AGAIN - MAX_AGE).await;
        reporter.send(2).await;
        tokio::time::advance(Duration::from_secs(1)).await;
        reporter.send(3).await;
        let (at, _, port, lost, _) = reporter.call().await;
        assert_eq!((at / 1_000, port, lost), (60, Some(2), 1), "the first, and not yet the second");
        assert_eq!(reporter.call().await.2, Some(3));
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_when_no_member_accepts_flows() {
        let failed = || ReportError::Failed(anyhow::anyhow!("no"));
        let none = || ReportError::NotAccepted;
        let answers = [none(), none(), none(), none(), failed(), none(), none(), none()];
        let mut reporter = Reporter::new(3, answers);
        let windows = reporter.windows.clone();
        tokio::spawn(async move {
            while windows.send(Ok(window([decided(1, 1, 1)]))).await.is_ok() {
                tokio::time::sleep(WINDOW).await;
            }
        });
        let mut called = Vec::new();
        for _ in 0..8 {
            let (at, member, ..) = reporter.call().await;
            called.push((member, at / 10_000));
        }
        let called: Vec<_> = called.iter().map(|(member, at)| (member.as_str(), *at)).collect();
        // All; then one that may accept them soon, and all again.
        let wanted = [("a", 0), ("b", 0), ("c", 0), ("a", 6), ("b", 6), ("c", 6), ("a", 6), ("b", 6)];
        assert_eq!(called, wanted);
        let (at, member, ..) = reporter.call().await;
        assert_eq!((member.as_str(), at / 10_000), ("c", 12));
    }

    #[test]
    fn counts_windows_that_the_receiver_misses() {
        let (sender, mut windows) = mpsc::channel(1);
        let collected = |lost, ports: &[u16]| {
            let mut window = Window { lost, ..Window::default() };
            ports.iter().for_each(|port| window.add(decided(*port, 1, 1)));
            window
        };
        let over = |lost, ports: &[u16]| hand_over(collected(lost, ports), &sender).lost;
        assert_eq!(over(0, &[]), 0);
        assert!(windows.try_recv().is_err(), "empty windows are not sent");
        assert_eq!((over(1, &[80, 80, 81]), over(2, &[82, 82]), over(4, &[83])), (0, 4, 5));
        let reported = windows.try_recv().expect("the first").expect("a window");
        assert_eq!((reported.flows.len(), reported.lost), (2, 1));
        assert_eq!(over(5, &[]), 0);
        assert_eq!(windows.try_recv().expect("the dropped ones").expect("a window").lost, 5);
    }

    #[test]
    fn keeps_the_newest_windows_and_counts_dropped_ones_until_they_are_reported() {
        let mut waiting = Waiting::default();
        let numbered = |number: u16| wire::Flows { lost: 1, ..window([decided(number, 1, 1), decided(number, 1, 2)]) };
        for number in 1..=6 {
            waiting.push(Ok(numbered(number)));
        }
        // Two windows of two decisions, and one of each of six.
        let first = waiting.first().expect("some wait");
        assert_eq!((first.flows[0].port, first.lost, waiting.windows.len()), (3, 10, MAX_WAITING));
        assert_eq!(waiting.first(), Some(first), "it stays until it is sent");
        waiting.sent();
        let rest = std::iter::from_fn(|| {
            let first = waiting.first()?;
            waiting.sent();
            Some((first.flows[0].port, first.lost))
        });
        assert_eq!(rest.collect::<Vec<_>>(), [(4, 0), (5, 0), (6, 0)]);
    }
}
