//! Tells the member what the kernel decided of connections.
//!
//! A thread adds up what was decided alike, window by window, and a task tells the windows over a connection of its own.
//! Neither is waited for: not by the kernel, and not by who enforces. What cannot be told is lost, and counted.

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

/// How long decisions are added up before they are told.
const WINDOW: Duration = Duration::from_secs(2);
/// Flows of one source in a window that were decided alike: ten pods that scan ports together fill it, and not one.
const MAX_OF_SOURCE: usize = 200;
/// Windows that wait to be told; beyond it the oldest are lost. With those in [`QUEUE`], of at most [`MAX_FLOWS`] of about 100
/// bytes each, 2.5 MiB.
const MAX_WAITING: usize = 4;
/// Windows on their way from the thread to the task: as many as come while one call may take.
const QUEUE: usize = 8;
/// What the member may take for one window.
const CALL_TIME: Duration = Duration::from_secs(10);
/// When a member that takes no flows is asked again: another version may stand in its place.
const ASK_AGAIN: Duration = Duration::from_secs(60);
/// How long a window waits before it is lost: the member judges by whose addresses they are when it is told.
const MAX_AGE: Duration = Duration::from_secs(30);
/// How often, and how far apart, the kernel is asked while somebody else listens: 2 s in all. What an agent that was killed
/// had open may close a moment after its successor starts.
const OPEN_TRIES: u32 = 40;
const OPEN_PAUSE: Duration = Duration::from_millis(50);

/// What is decided alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    port: u16,
    icmp: Option<(u8, u8)>,
    decision: Decision,
}

#[derive(Debug, Clone)]
struct Sum {
    /// Of the last.
    source_port: u16,
    count: u64,
    first_ms: u64,
    last_ms: u64,
}

/// What was decided in a while.
#[derive(Debug, Default)]
struct Window {
    sums: HashMap<Key, Sum>,
    /// How many of the sums are a source's; no more entries than sums.
    of_source: HashMap<(IpAddr, Decision), usize>,
    lost: u64,
}

impl Window {
    fn add(&mut self, decided: Decided) {
        let Decided { decision, source, destination, protocol, port, source_port, icmp, at } = decided;
        let at = at.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        let key = Key { source, destination, protocol, port, icmp, decision };
        if let Some(sum) = self.sums.get_mut(&key) {
            sum.count += 1;
            sum.first_ms = sum.first_ms.min(at);
            // What was seen in either direction comes in two orders.
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
        let mut sums: Vec<(Key, Sum)> = self.sums.into_iter().collect();
        sums.sort_by(|(a, a_sum), (b, b_sum)| (a_sum.first_ms, a).cmp(&(b_sum.first_ms, b)));
        wire::Flows { flows: sums.into_iter().map(|(key, sum)| flow(&key, &sum)).collect(), lost: self.lost }
    }
}

fn flow(key: &Key, sum: &Sum) -> wire::Flow {
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

/// Listens to the decisions of `backend`, unless it is switched `off`. Else returns why not. Blocks while another process listens, at
/// most 2 s.
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
    // Of a group that is somebody else's the kernel says EPERM, as it does of one who may not listen at all.
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

/// A window, or why there are none until the next.
pub type Heard = Result<wire::Flows, String>;

/// Passes on the windows of `decisions` as they are complete, from a thread that ends with the receiver. After an error it listens
/// again.
///
/// # Errors
/// When there can be no more threads.
pub fn collect(mut decisions: Box<dyn Decisions>, shutdown: &Shutdown) -> io::Result<mpsc::Receiver<Heard>> {
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

fn follow(decisions: &mut dyn Decisions, mut pause: impl FnMut(Duration), windows: &mpsc::Sender<Heard>) {
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
    windows: &mpsc::Sender<Heard>,
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

/// Gives what the next window begins with: what is lost of this one, where who takes them is late.
fn hand_over(window: Window, windows: &mpsc::Sender<Heard>) -> Window {
    if window.sums.is_empty() && window.lost == 0 {
        return window;
    }
    let late = windows.try_send(Ok(window.message())).err();
    let lost = late.and_then(|error| error.into_inner().ok()).as_ref().map_or(0, decisions);
    Window { lost, ..Window::default() }
}

/// How many decisions a message stands for.
fn decisions(flows: &wire::Flows) -> u64 {
    flows.flows.iter().map(|flow| flow.count).fold(flows.lost, u64::saturating_add)
}

/// What is still to be told.
#[derive(Debug, Default)]
struct Waiting {
    /// With when they came.
    windows: VecDeque<(tokio::time::Instant, wire::Flows)>,
    lost: u64,
    /// Why no windows come.
    ended: Option<String>,
}

impl Waiting {
    fn push(&mut self, heard: Heard) {
        let mut window = match heard {
            Ok(window) => window,
            Err(error) => {
                self.ended = Some(error);
                return;
            }
        };
        self.ended = None;
        self.lost = self.lost.saturating_add(std::mem::take(&mut window.lost));
        if self.windows.len() >= MAX_WAITING {
            self.give_up();
        }
        self.windows.push_back((tokio::time::Instant::now(), window));
    }

    /// The oldest is lost.
    fn give_up(&mut self) {
        let lost = self.windows.pop_front().map_or(0, |(_, window)| decisions(&window));
        self.lost = self.lost.saturating_add(lost);
    }

    fn give_up_old(&mut self) {
        while self.windows.front().is_some_and(|(since, _)| since.elapsed() > MAX_AGE) {
            self.give_up();
        }
    }

    /// The oldest, with how many are lost.
    fn first(&self) -> Option<wire::Flows> {
        self.windows.front().map(|(_, window)| wire::Flows { lost: self.lost, ..window.clone() })
    }

    /// The first is told.
    fn told(&mut self) {
        self.windows.pop_front();
        self.lost = 0;
    }
}

/// Why a window was not told.
#[derive(Debug, thiserror::Error)]
enum TellError {
    #[error("the member takes no flows")]
    NotTaken,
    /// It takes them later, over the same connection.
    #[error("the member has too many: {0}")]
    Busy(String),
    /// Told again it would be the same.
    #[error("the member does not understand them: {0}")]
    Misunderstood(String),
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// The way to members, or what stands for it in a test.
trait Link {
    /// Over the connection that is open, or a new one.
    async fn tell(&mut self, member: &str, flows: wire::Flows) -> Result<(), TellError>;
    /// The next is told over a new connection.
    fn close(&mut self);
    /// Returns when a new connection would show another certificate, and closes the last.
    async fn renewed(&mut self);
}

/// Tells one of `members` what comes, until `stop`, and people by `state` how it is with that. A window whose answer got lost
/// is told again.
pub async fn tell(
    mut windows: impl BorrowMut<mpsc::Receiver<Heard>>,
    state: watch::Sender<String>,
    identity: NodeIdentity,
    members: Vec<String>,
    stop: CancellationToken,
) {
    let link = NodeLink { renewed: identity.credentials.subscribe(), identity, open: None };
    tell_over(link, windows.borrow_mut(), state, members, stop).await;
}

async fn tell_over(
    mut link: impl Link,
    windows: &mut mpsc::Receiver<Heard>,
    state: watch::Sender<String>,
    members: Vec<String>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    // Spread by half: 2 s to 6 s, then 3 s to 9 s.
    let mut busy = Backoff::new(Duration::from_secs(4), Duration::from_secs(6));
    let mut waiting = Waiting::default();
    // How many, one after the other, take no flows.
    let mut not_taken = 0;
    let mut in_turn = members.iter().cycle();
    let Some(mut member) = in_turn.next() else { return };
    loop {
        let error = loop {
            while let Ok(heard) = windows.try_recv() {
                waiting.push(heard);
            }
            waiting.give_up_old();
            let Some(first) = waiting.first() else {
                if let Some(ended) = &waiting.ended {
                    say(&state, ended.clone());
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    heard = windows.recv() => match heard {
                        Some(heard) => waiting.push(heard),
                        None => return,
                    }
                }
                continue;
            };
            let told = tokio::select! {
                () = stop.cancelled() => return,
                told = link.tell(member, first) => told,
            };
            match told {
                Ok(()) => waiting.told(),
                Err(error) => break error,
            }
            backoff.reset();
            busy.reset();
            not_taken = 0;
            say(&state, "told to the member".to_owned());
        };
        if say(&state, format!("not told: {error:#}")) {
            match &error {
                TellError::NotTaken => tracing::info!(member, "the member takes no flows"),
                _ => tracing::warn!(error = format!("{error:#}"), member, "flows are not told, trying again"),
            }
        }
        if !matches!(error, TellError::Busy(_)) {
            link.close();
            member = in_turn.next().unwrap_or(member);
        }
        not_taken = if matches!(error, TellError::NotTaken) { not_taken + 1 } else { 0 };
        let pause = match error {
            // Another may.
            TellError::NotTaken if not_taken % members.len() > 0 => Duration::ZERO,
            TellError::NotTaken => ASK_AGAIN,
            TellError::Busy(_) => busy.next_delay(),
            TellError::Failed(_) => backoff.next_delay(),
            TellError::Misunderstood(_) => {
                waiting.give_up();
                backoff.next_delay()
            }
        };
        let over = tokio::time::sleep(pause);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = &mut over => break,
                // Who waits with a certificate that has ended need not wait any longer.
                () = link.renewed() => break,
                Some(heard) = windows.recv() => waiting.push(heard),
            }
        }
    }
}

/// Whether it is news.
fn say(state: &watch::Sender<String>, text: String) -> bool {
    state.send_if_modified(|said| {
        let is_news = *said != text;
        *said = text;
        is_news
    })
}

/// As the node, over TLS.
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
    async fn tell(&mut self, member: &str, flows: wire::Flows) -> Result<(), TellError> {
        // The next connection shows the new certificate, and is open before the last one closes.
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
        let answer = tokio::time::timeout(CALL_TIME, open.client.tell_flows(flows)).await;
        match answer.context("the member does not answer")? {
            Ok(_) => Ok(()),
            Err(status) => Err(match status.code() {
                Code::Unimplemented => TellError::NotTaken,
                Code::ResourceExhausted => TellError::Busy(status.message().to_owned()),
                Code::InvalidArgument => TellError::Misunderstood(status.message().to_owned()),
                _ => TellError::Failed(anyhow::anyhow!("the member refuses them: {}", status.message())),
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
    fn what_is_decided_alike_is_added_up_in_the_order_of_time() {
        let denied = Decided { decision: Decision::Denied, ..decided(80, 7, 8) };
        let echo = Decided {
            source: "fd01::2".parse().expect("an address"),
            destination: "fd01::3".parse().expect("an address"),
            protocol: 58,
            icmp: Some((128, 0)),
            decision: Decision::Cut,
            ..decided(0, 0, 3)
        };
        // In reverse, as groups may bring it; every field but the source's port makes another flow.
        let all = [
            decided(80, 5, 20),
            decided(80, 4, 10),
            decided(81, 6, 9),
            denied,
            echo.clone(),
            Decided { icmp: Some((128, 1)), at: UNIX_EPOCH + Duration::from_millis(2), ..echo },
            decided(80, 3, 15),
        ];
        let told = window(all);
        let short = |it: &wire::Flow| (it.port, it.source_port, it.count, it.first_ms, it.last_ms, it.decision());
        let (allowed, denied, cut) = (wire::Decision::Allowed, wire::Decision::Denied, wire::Decision::Cut);
        assert_eq!(
            told.flows.iter().map(short).collect::<Vec<_>>(),
            [
                (0, 0, 1, 2, 2, cut),
                (0, 0, 1, 3, 3, cut),
                (80, 7, 1, 8, 8, denied),
                (81, 6, 1, 9, 9, allowed),
                (80, 5, 3, 10, 20, allowed)
            ]
        );
        let icmp = told.flows.iter().map(|it| it.icmp.map(|icmp| (icmp.r#type, icmp.code))).collect::<Vec<_>>();
        assert_eq!(icmp, [Some((128, Some(1))), Some((128, Some(0))), None, None, None]);
        let ends = |it: &wire::Flow| (it.source.to_vec(), it.destination.to_vec(), it.protocol);
        assert_eq!(ends(&told.flows[4]), (vec![10, 1, 0, 2], vec![10, 1, 0, 3], 6));
        assert_eq!((told.flows[0].source.len(), told.flows[0].source[15], told.flows[0].destination[15]), (16, 2, 3));
    }

    #[test]
    fn a_window_holds_so_many_flows_and_counts_the_rest() {
        let ports = || (1u16..).take(MAX_FLOWS + 10);
        // Of so many sources that none has too many.
        let of = |port: u16| Decided { source: [10, 1, 1, (port % 100) as u8].into(), ..decided(port, 1, 1) };
        let told = window(ports().chain(ports()).map(of));
        assert_eq!((told.flows.len(), told.lost), (MAX_FLOWS, 20));
        assert!(told.flows.iter().all(|flow| flow.count == 2), "what is in it goes on being counted");
        assert_eq!(decisions(&told), 2 * (MAX_FLOWS as u64 + 10));
    }

    #[test]
    fn who_scans_ports_leaves_room_for_others_and_for_what_else_is_decided_of_them() {
        let scan = (1..).take(MAX_FLOWS).map(|port| Decided { decision: Decision::Denied, ..decided(port, 1, 1) });
        let other = Decided { source: [10, 1, 0, 9].into(), decision: Decision::Denied, ..decided(80, 1, 1) };
        let told = window(scan.chain([other, decided(80, 1, 1), decided(80, 1, 2)]));
        let rest = (MAX_FLOWS - MAX_OF_SOURCE) as u64;
        assert_eq!((told.flows.len(), told.lost), (MAX_OF_SOURCE + 2, rest));
        assert_eq!(decisions(&told), MAX_FLOWS as u64 + 3);
    }

    #[test]
    fn who_listens_already_is_waited_for_a_while() {
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
        let (sender, mut windows) = mpsc::channel::<Heard>(QUEUE);
        let (mut opened, mut pauses, mut heard) = (0, Vec::new(), Vec::new());
        let reopen = || {
            opened += 1;
            match opened {
                1..=9 => Err(io::ErrorKind::ResourceBusy.into()),
                10 => Ok(Some(81)),
                _ => {
                    while let Ok(it) = windows.try_recv() {
                        heard.push(it.map(|it| (it.flows.iter().map(|flow| flow.port).collect::<Vec<_>>(), it.lost)));
                    }
                    windows.close();
                    Ok(None)
                }
            }
        };
        let mut breaking = Breaking { port: Some(80), reopen: Box::new(reopen) };
        follow(&mut breaking, |pause| pauses.push(pause.as_millis()), &sender);
        drop(breaking);
        assert!(heard.iter().filter_map(|it| it.as_ref().err()).all(|it| it == "interrupted: broken pipe"));
        let heard: Vec<_> = heard.into_iter().map(Result::ok).collect();
        let ports = |ports: &[u32], lost| Some((ports.to_vec(), lost));
        assert_eq!(heard, [ports(&[80], 1), None, ports(&[], 0), ports(&[81], 1), None]);
        assert!((500..=1_500).contains(&pauses[0]) && pauses.len() == 11, "{pauses:?}");
        assert!(pauses[6..].iter().all(|pause| (30_000..=90_000).contains(pause)), "{pauses:?}");
    }

    /// What is told, with when and to whom, and whether over a new connection.
    type Call = (u64, String, wire::Flows, bool);

    struct Answers {
        answers: VecDeque<Result<(), TellError>>,
        calls: mpsc::UnboundedSender<Call>,
        began: tokio::time::Instant,
        open: bool,
    }

    impl Link for Answers {
        async fn tell(&mut self, member: &str, flows: wire::Flows) -> Result<(), TellError> {
            let is_new = !std::mem::replace(&mut self.open, true);
            let at = u64::try_from(self.began.elapsed().as_millis()).expect("soon");
            self.calls.send((at, member.to_owned(), flows, is_new)).expect("looked at");
            self.answers.pop_front().unwrap_or(Ok(()))
        }

        fn close(&mut self) {
            self.open = false;
        }

        async fn renewed(&mut self) {
            std::future::pending().await
        }
    }

    struct Teller {
        windows: mpsc::Sender<Heard>,
        state: watch::Receiver<String>,
        calls: mpsc::UnboundedReceiver<Call>,
        _stop: tokio_util::sync::DropGuard,
    }

    impl Teller {
        /// With members `a`, `b` and so on.
        fn new(members: usize, answers: impl IntoIterator<Item = TellError>) -> Self {
            let (windows, mut receiver) = mpsc::channel(QUEUE);
            let (sender, state) = watch::channel(String::new());
            let (call, calls) = mpsc::unbounded_channel();
            let (answers, stop) = (answers.into_iter().map(Err).collect(), CancellationToken::new());
            let link = Answers { answers, calls: call, began: tokio::time::Instant::now(), open: false };
            let members = ["a", "b", "c"][..members].iter().map(|it| (*it).to_owned()).collect();
            let until = stop.clone();
            tokio::spawn(async move { tell_over(link, &mut receiver, sender, members, until).await });
            Self { windows, state, calls, _stop: stop.drop_guard() }
        }

        async fn send(&self, port: u16) {
            self.windows.send(Ok(window([decided(port, 1, 1)]))).await.expect("taken");
        }

        /// When it is told what, to whom, with how many lost, and whether over a new connection.
        async fn call(&mut self) -> (u64, String, Option<u32>, u64, bool) {
            let (at, member, flows, is_new) = self.calls.recv().await.expect("it goes on");
            (at, member, flows.flows.first().map(|flow| flow.port), flows.lost, is_new)
        }

        async fn state(&mut self, wanted: &str) {
            let reached = tokio::time::timeout(MAX_AGE, self.state.wait_for(|it| it == wanted)).await;
            assert!(reached.is_ok_and(|it| it.is_ok()), "{wanted}: {:?}", self.state);
        }
    }

    fn busy() -> TellError {
        TellError::Busy("later".to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_that_has_too_many_is_asked_again_later_over_the_same_connection() {
        let mut teller = Teller::new(2, std::iter::repeat_with(busy).take(8));
        teller.send(1).await;
        assert_eq!(teller.call().await, (0, "a".to_owned(), Some(1), 0, true));
        teller.state("not told: the member has too many: later").await;
        let (mut last, mut pauses) = (0, Vec::new());
        for port in 2..10 {
            // More than may wait are taken meanwhile.
            teller.send(port).await;
            let (at, member, told, lost, is_new) = teller.call().await;
            assert_eq!((member.as_str(), is_new), ("a", false));
            // The first is told until it is lost, by their number or by its age.
            assert_eq!(u64::from(told.expect("one waits")), lost + 1);
            pauses.push(at - last);
            last = at;
        }
        assert!(pauses.iter().all(|pause| (2_000..=10_000).contains(pause)), "{pauses:?}");
        pauses.dedup();
        assert!(pauses.len() > 4, "they differ: {pauses:?}");
        teller.state("told to the member").await;
    }

    #[tokio::test(start_paused = true)]
    async fn why_no_windows_come_is_said_when_the_last_is_told_and_until_they_come_again() {
        let mut teller = Teller::new(1, [busy()]);
        teller.send(1).await;
        teller.windows.send(Err("not told: gone".to_owned())).await.expect("taken");
        teller.state("not told: the member has too many: later").await;
        teller.state("not told: gone").await;
        assert_eq!((teller.call().await.2, teller.call().await.2), (Some(1), Some(1)));
        let changed = tokio::time::timeout(ASK_AGAIN, teller.state.changed()).await;
        assert!(changed.is_err(), "{:?}", teller.state);
        teller.windows.send(Ok(wire::Flows::default())).await.expect("taken");
        teller.state("told to the member").await;
        assert_eq!(teller.call().await.2, None, "the member shows that it is told");
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_that_waits_too_long_is_lost() {
        let mut teller = Teller::new(1, [TellError::NotTaken]);
        teller.send(1).await;
        assert_eq!(teller.call().await.2, Some(1));
        tokio::time::advance(ASK_AGAIN - MAX_AGE).await;
        teller.send(2).await;
        tokio::time::advance(Duration::from_secs(1)).await;
        teller.send(3).await;
        let (at, _, told, lost, _) = teller.call().await;
        assert_eq!((at / 1_000, told, lost), (60, Some(2), 1), "the first, and not yet the second");
        assert_eq!(teller.call().await.2, Some(3));
    }

    #[tokio::test(start_paused = true)]
    async fn members_that_take_no_flows_are_left_alone_when_all_of_them_have_said_so() {
        let failed = || TellError::Failed(anyhow::anyhow!("no"));
        let none = || TellError::NotTaken;
        let answers = [none(), none(), none(), none(), failed(), none(), none(), none()];
        let mut teller = Teller::new(3, answers);
        let windows = teller.windows.clone();
        tokio::spawn(async move {
            while windows.send(Ok(window([decided(1, 1, 1)]))).await.is_ok() {
                tokio::time::sleep(WINDOW).await;
            }
        });
        let mut asked = Vec::new();
        for _ in 0..8 {
            let (at, member, ..) = teller.call().await;
            asked.push((member, at / 10_000));
        }
        let asked: Vec<_> = asked.iter().map(|(member, at)| (member.as_str(), *at)).collect();
        // All; then one that may take them soon, and all again.
        let wanted = [("a", 0), ("b", 0), ("c", 0), ("a", 6), ("b", 6), ("c", 6), ("a", 6), ("b", 6)];
        assert_eq!(asked, wanted);
        let (at, member, ..) = teller.call().await;
        assert_eq!((member.as_str(), at / 10_000), ("c", 12));
    }

    #[test]
    fn a_window_that_nobody_takes_in_time_is_lost_and_told_with_the_next() {
        let (sender, mut windows) = mpsc::channel(1);
        let collected = |lost, ports: &[u16]| {
            let mut window = Window { lost, ..Window::default() };
            ports.iter().for_each(|port| window.add(decided(*port, 1, 1)));
            window
        };
        let over = |lost, ports: &[u16]| hand_over(collected(lost, ports), &sender).lost;
        assert_eq!(over(0, &[]), 0);
        assert!(windows.try_recv().is_err(), "nothing is told of nothing");
        assert_eq!((over(1, &[80, 80, 81]), over(2, &[82, 82]), over(4, &[83])), (0, 4, 5));
        let told = windows.try_recv().expect("the first").expect("a window");
        assert_eq!((told.flows.len(), told.lost), (2, 1));
        assert_eq!(over(5, &[]), 0);
        assert_eq!(windows.try_recv().expect("what is lost").expect("a window").lost, 5);
    }

    #[test]
    fn the_newest_windows_wait_and_what_is_lost_is_counted_until_it_is_told() {
        let mut waiting = Waiting::default();
        let numbered = |number: u16| wire::Flows { lost: 1, ..window([decided(number, 1, 1), decided(number, 1, 2)]) };
        for number in 1..=6 {
            waiting.push(Ok(numbered(number)));
        }
        // Two windows of two decisions, and one of each of six.
        let first = waiting.first().expect("some wait");
        assert_eq!((first.flows[0].port, first.lost, waiting.windows.len()), (3, 10, MAX_WAITING));
        assert_eq!(waiting.first(), Some(first), "nothing changes until it is told");
        waiting.told();
        let rest = std::iter::from_fn(|| {
            let first = waiting.first()?;
            waiting.told();
            Some((first.flows[0].port, first.lost))
        });
        assert_eq!(rest.collect::<Vec<_>>(), [(4, 0), (5, 0), (6, 0)]);
    }
}
