//! Tells the member what the kernel decided of connections.
//!
//! A thread adds up what was decided alike, window by window, and a task tells the windows over a connection of its own.
//! Neither is waited for: not by the kernel, and not by who enforces. What cannot be told is lost, and counted.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use hanse_dataplane::nftables::flows::{Decided, Decision, Flows};
use hanse_proto::agent::v1 as wire;
use hanse_proto::agent::v1::agents_client::AgentsClient;
use hanse_runtime::agent_wire::MAX_FLOWS;
use hanse_runtime::retry::Backoff;
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

/// Listens to the rules of `table`, in the network namespace of the calling thread, unless it is switched `off`. Without it,
/// says why not. Blocks while somebody else listens, at most 2 s.
pub fn listen(off: bool, table: &str) -> Result<Flows, String> {
    if off {
        return Err("off".to_owned());
    }
    open_patiently(|| Flows::open(table), std::thread::sleep).map_err(|error| {
        tracing::warn!(%error, "the kernel does not tell what it decides of connections: flows are not told");
        format!("not told: the kernel does not tell them: {error}")
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

/// Gives the windows of `flows` as they are complete, from a thread that ends when nobody takes them any more. `state` is for
/// people: whether they are told.
pub fn collect(flows: Flows, state: watch::Sender<String>) -> mpsc::Receiver<wire::Flows> {
    let (sender, windows) = mpsc::channel(QUEUE);
    std::thread::spawn(move || {
        if let Err(error) = read(flows, &sender) {
            tracing::error!(%error, "the kernel does not tell any more what it decides of connections");
            state.send_replace(format!("not told: the kernel does not tell them any more: {error}"));
        }
    });
    windows
}

fn read(mut flows: Flows, windows: &mpsc::Sender<wire::Flows>) -> std::io::Result<()> {
    let mut window = Window::default();
    while !windows.is_closed() {
        let end = Instant::now() + WINDOW;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            window.lost += flows.wait(left, |decided| window.add(decided))?;
        }
        window.lost += flows.left_out()?;
        window = hand_over(window, windows);
    }
    Ok(())
}

/// Gives what the next window begins with: what is lost of this one, where who takes them is late.
fn hand_over(window: Window, windows: &mpsc::Sender<wire::Flows>) -> Window {
    if window.sums.is_empty() && window.lost == 0 {
        return window;
    }
    let late = windows.try_send(window.message()).err();
    Window { lost: late.map_or(0, |error| decisions(&error.into_inner())), ..Window::default() }
}

/// How many decisions a message stands for.
fn decisions(flows: &wire::Flows) -> u64 {
    flows.lost + flows.flows.iter().map(|flow| flow.count).sum::<u64>()
}

/// What is still to be told.
#[derive(Debug, Default)]
struct Waiting {
    windows: VecDeque<wire::Flows>,
    lost: u64,
}

impl Waiting {
    fn push(&mut self, mut window: wire::Flows) {
        self.lost += std::mem::take(&mut window.lost);
        if self.windows.len() >= MAX_WAITING {
            self.give_up();
        }
        self.windows.push_back(window);
    }

    /// The oldest is lost.
    fn give_up(&mut self) {
        self.lost += self.windows.pop_front().as_ref().map_or(0, decisions);
    }

    /// The oldest, with how many are lost.
    fn first(&self) -> Option<wire::Flows> {
        self.windows.front().map(|window| wire::Flows { lost: self.lost, ..window.clone() })
    }

    /// The first is told.
    fn told(&mut self) {
        self.windows.pop_front();
        self.lost = 0;
    }
}

/// The connection to a member.
#[derive(Debug)]
struct Open {
    client: AgentsClient<Channel>,
    ends_at: SystemTime,
}

/// Why a window was not told.
#[derive(Debug, thiserror::Error)]
enum TellError {
    #[error("the member takes no flows")]
    NotTaken,
    /// Told again it would be the same.
    #[error("the member does not understand them: {0}")]
    Misunderstood(String),
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// Tells one of `members` what comes, until `stop`, and people by `state` how it is with that. A window whose answer got lost
/// is told again.
pub async fn tell(
    mut windows: mpsc::Receiver<wire::Flows>,
    state: watch::Sender<String>,
    identity: NodeIdentity,
    members: Vec<String>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    let mut renewed = identity.credentials.subscribe();
    let (mut waiting, mut open) = (Waiting::default(), None);
    for member in members.iter().cycle() {
        let error = loop {
            while let Ok(window) = windows.try_recv() {
                waiting.push(window);
            }
            let Some(first) = waiting.first() else {
                tokio::select! {
                    () = stop.cancelled() => return,
                    window = windows.recv() => match window {
                        Some(window) => waiting.push(window),
                        None => return,
                    }
                }
                continue;
            };
            // The next connection shows the new certificate, and is open before the last one closes.
            let lasts = |it: &Open| it.ends_at.duration_since(SystemTime::now()).is_ok_and(|left| left > CALL_TIME);
            open = open.filter(|it| lasts(it) && !renewed.has_changed().unwrap_or(false));
            renewed.mark_unchanged();
            let told = tokio::select! {
                () = stop.cancelled() => return,
                told = tell_one(&mut open, &identity, member, first) => told,
            };
            match told {
                Ok(()) => waiting.told(),
                Err(error) => break error,
            }
            backoff.reset();
            say(&state, "told to the member".to_owned());
        };
        open = None;
        if say(&state, format!("not told: {error:#}")) {
            match &error {
                TellError::NotTaken => tracing::info!(member, "the member takes no flows"),
                _ => tracing::warn!(error = format!("{error:#}"), member, "flows are not told, trying again"),
            }
        }
        let pause = match error {
            TellError::NotTaken => ASK_AGAIN,
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
                Ok(()) = renewed.changed() => break,
                Some(window) = windows.recv() => waiting.push(window),
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

/// Over the connection that is open, or a new one.
async fn tell_one(
    open: &mut Option<Open>,
    identity: &NodeIdentity,
    member: &str,
    flows: wire::Flows,
) -> Result<(), TellError> {
    let open = match open {
        Some(open) => open,
        None => {
            identity.check_time()?;
            let connection = identity.client()?.connect(member).await.context("reach the member")?;
            open.insert(Open { client: AgentsClient::new(connection.channel), ends_at: connection.peer.ends_at })
        }
    };
    let answer = tokio::time::timeout(CALL_TIME, open.client.tell_flows(flows)).await;
    match answer.context("the member does not answer")? {
        Ok(_) => Ok(()),
        Err(status) => Err(match status.code() {
            Code::Unimplemented => TellError::NotTaken,
            Code::InvalidArgument => TellError::Misunderstood(status.message().to_owned()),
            _ => TellError::Failed(anyhow::anyhow!("the member refuses them: {}", status.message())),
        }),
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
        let told = windows.try_recv().expect("the first");
        assert_eq!((told.flows.len(), told.lost), (2, 1));
        assert_eq!(over(5, &[]), 0);
        assert_eq!(windows.try_recv().expect("what is lost").lost, 5);
    }

    #[test]
    fn the_newest_windows_wait_and_what_is_lost_is_counted_until_it_is_told() {
        let mut waiting = Waiting::default();
        let numbered = |number: u16| wire::Flows { lost: 1, ..window([decided(number, 1, 1), decided(number, 1, 2)]) };
        for number in 1..=6 {
            waiting.push(numbered(number));
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
