//! Windows and their reports, without a kernel and without a member.

use std::time::UNIX_EPOCH;

use hanse_dataplane::{Decided, Decision};
use hanse_protocol::MAX_FLOWS;

use super::window::MAX_OF_SOURCE;
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
    assert_eq!((reported.flows.len(), reported.missed), (MAX_FLOWS, 20));
    assert!(reported.flows.iter().all(|flow| flow.count == 2), "flows of the window are still counted");
    assert_eq!(decisions(&reported), 2 * (MAX_FLOWS as u64 + 10));
}

#[test]
fn source_that_scans_ports_leaves_room_for_other_flows() {
    let scan = (1..).take(MAX_FLOWS).map(|port| Decided { decision: Decision::Denied, ..decided(port, 1, 1) });
    let other = Decided { source: [10, 1, 0, 9].into(), decision: Decision::Denied, ..decided(80, 1, 1) };
    let reported = window(scan.chain([other, decided(80, 1, 1), decided(80, 1, 2)]));
    let rest = (MAX_FLOWS - MAX_OF_SOURCE) as u64;
    assert_eq!((reported.flows.len(), reported.missed), (MAX_OF_SOURCE + 2, rest));
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
                    received.push(it.map(|it| (it.flows.iter().map(|flow| flow.port).collect::<Vec<_>>(), it.missed)));
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
    let ports = |ports: &[u32], missed| Some((ports.to_vec(), missed));
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
        tokio::spawn(
            async move { report_over(link, &mut receiver, sender, members, AgentMetrics::default(), until).await },
        );
        Self { windows, state, calls, _stop: stop.drop_guard() }
    }

    async fn send(&self, port: u16) {
        self.windows.send(Ok(window([decided(port, 1, 1)]))).await.expect("taken");
    }

    /// Time, member, port of the first flow, dropped decisions, and whether the connection is new.
    async fn call(&mut self) -> (u64, String, Option<u32>, u64, bool) {
        let (at, member, flows, is_new) = self.calls.recv().await.expect("a call");
        (at, member, flows.flows.first().map(|flow| flow.port), flows.missed, is_new)
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
        let (at, member, port, missed, is_new) = reporter.call().await;
        assert_eq!((member.as_str(), is_new), ("a", false));
        // The first is sent until it is dropped, for their number or its age.
        assert_eq!(u64::from(port.expect("one waits")), missed + 1);
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
    let (at, _, port, missed, _) = reporter.call().await;
    assert_eq!((at / 1_000, port, missed), (60, Some(2), 1), "the first, and not yet the second");
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
    let collected = |missed, ports: &[u16]| {
        let mut window = Window { missed, ..Window::default() };
        ports.iter().for_each(|port| window.add(decided(*port, 1, 1)));
        window
    };
    let over = |missed, ports: &[u16]| hand_over(collected(missed, ports), &sender).missed;
    assert_eq!(over(0, &[]), 0);
    assert!(windows.try_recv().is_err(), "empty windows are not sent");
    assert_eq!((over(1, &[80, 80, 81]), over(2, &[82, 82]), over(4, &[83])), (0, 4, 5));
    let reported = windows.try_recv().expect("the first").expect("a window");
    assert_eq!((reported.flows.len(), reported.missed), (2, 1));
    assert_eq!(over(5, &[]), 0);
    assert_eq!(windows.try_recv().expect("the dropped ones").expect("a window").missed, 5);
}

#[test]
fn keeps_the_newest_windows_and_counts_dropped_ones_until_they_are_reported() {
    let mut waiting = Waiting::default();
    let numbered = |number: u16| wire::Flows { missed: 1, ..window([decided(number, 1, 1), decided(number, 1, 2)]) };
    for number in 1..=6 {
        waiting.push(Ok(numbered(number)));
    }
    // Two windows of two decisions, and one of each of six.
    let first = waiting.first().expect("some wait");
    assert_eq!((first.flows[0].port, first.missed, waiting.windows.len()), (3, 10, MAX_WAITING));
    assert_eq!(waiting.first(), Some(first), "it stays until it is sent");
    waiting.sent();
    let rest = std::iter::from_fn(|| {
        let first = waiting.first()?;
        waiting.sent();
        Some((first.flows[0].port, first.missed))
    });
    assert_eq!(rest.collect::<Vec<_>>(), [(4, 0), (5, 0), (6, 0)]);
}
