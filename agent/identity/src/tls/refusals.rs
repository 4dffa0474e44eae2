//! Refusals of a listener, logged as one line a period, so that many connections do not fill the log.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

/// The first refusal is logged at once; those of each period after it in one line.
const PERIOD: Duration = Duration::from_secs(30);
/// Sources that are counted separately in a period: 1,024 × about 32 bytes.
const MAX_SOURCES: usize = 1_024;
/// Characters of an error that are logged.
const MAX_ERROR_CHARS: usize = 200;

/// Why a connection was refused or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// Too many at once.
    Connections,
    /// Too many of one address.
    Address,
    /// Too many of one network.
    Network,
    /// Too many of one identity.
    Identity,
    /// Too many in one second.
    Rate,
    /// Too many handshakes at once.
    Handshakes,
    /// A handshake was cut short to make room.
    CutShort,
    /// A connection was ended to make room.
    MadeRoom,
    /// The system gave none.
    System,
    /// A handshake failed, for example because of a certificate.
    Failed,
    /// A handshake took too long.
    Slow,
}

const REASONS: [(Reason, &str); 11] = [
    (Reason::Connections, "too many connections"),
    (Reason::Address, "too many of one address"),
    (Reason::Network, "too many of one network"),
    (Reason::Identity, "too many of one identity"),
    (Reason::Rate, "too fast"),
    (Reason::Handshakes, "too many handshakes"),
    (Reason::CutShort, "handshake cut short to make room"),
    (Reason::MadeRoom, "ended to make room"),
    (Reason::System, "not accepted by the system"),
    (Reason::Failed, "handshake failed"),
    (Reason::Slow, "handshake took too long"),
];

/// Of one listener.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// A line was logged less than a period ago.
    since: Option<Instant>,
    counted: Counted,
}

/// What was refused in a period.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Counted {
    by_reason: [u64; REASONS.len()],
    by_source: HashMap<IpAddr, u64>,
    /// Why the last handshake failed, and of whom.
    last_failure: Option<(IpAddr, String)>,
}

impl Refusals {
    /// One more. Logs where that is due.
    pub(super) fn count(&self, reason: Reason, source: IpAddr) {
        if let Some(counted) = self.counted(reason, source, Instant::now()) {
            counted.log();
        }
    }

    /// One more handshake that failed, unless the peer only connected and closed, as checks of ports do.
    pub(super) fn count_failed(&self, error: &io::Error, source: IpAddr) {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return;
        }
        let text = error.to_string().escape_debug().take(MAX_ERROR_CHARS).collect();
        self.state().counted.last_failure = Some((source, text));
        self.count(Reason::Failed, source);
    }

    /// Logs what is left of a period that is over.
    pub(super) fn turn(&self) {
        if let Some(counted) = self.over(Instant::now()) {
            counted.log();
        }
    }

    /// When [`Self::turn`] is due, where something was counted.
    pub(super) fn due(&self) -> Option<Instant> {
        let state = self.state();
        state.since.map(|since| since + PERIOD).filter(|_| state.counted.total() > 0)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counted(&self, reason: Reason, source: IpAddr, now: Instant) -> Option<Counted> {
        {
            let counted = &mut self.state().counted;
            let at = REASONS.iter().position(|(it, _)| *it == reason).unwrap_or_default();
            counted.by_reason[at] = counted.by_reason[at].saturating_add(1);
            if counted.by_source.len() < MAX_SOURCES || counted.by_source.contains_key(&source) {
                *counted.by_source.entry(source).or_default() += 1;
            }
        }
        self.over(now)
    }

    fn over(&self, now: Instant) -> Option<Counted> {
        let mut state = self.state();
        let is_over = state.since.is_none_or(|since| now.duration_since(since) >= PERIOD);
        if !is_over || state.counted.total() == 0 {
            return None;
        }
        state.since = Some(now);
        Some(std::mem::take(&mut state.counted))
    }
}

impl Counted {
    fn total(&self) -> u64 {
        self.by_reason.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    fn log(&self) {
        let most = self.by_source.iter().max_by_key(|(_, count)| **count);
        let failure = self.last_failure.as_ref();
        warn!(
            count = self.total(),
            sources = self.by_source.len(),
            most_from = most.map(|(source, _)| tracing::field::display(source)),
            reasons = %self,
            failed_from = failure.map(|(source, _)| tracing::field::display(source)),
            error = failure.map(|(_, error)| tracing::field::display(error)),
            period_seconds = PERIOD.as_secs(),
            "connections refused"
        );
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = REASONS.iter().zip(self.by_reason).filter(|(_, count)| *count > 0);
        let texts: Vec<String> = counts.map(|((_, text), count)| format!("{text}: {count}")).collect();
        f.write_str(&texts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_one_line_a_period_and_nothing_is_left_out() {
        let refusals = Refusals::default();
        let (start, mut lines) = (Instant::now(), Vec::new());
        assert_eq!(refusals.due(), None);
        // 3,455 refusals in 100 seconds, of 12 addresses.
        for number in 0..3_455_u64 {
            let now = start + Duration::from_millis(number * 100_000 / 3_455);
            let source = IpAddr::from([10, 0, 0, (number % 12) as u8]);
            let reason = if number % 5 == 0 { Reason::Address } else { Reason::Connections };
            lines.extend(refusals.counted(reason, source, now));
        }
        assert_eq!(lines.len(), 4, "at once, after 30, 60 and 90 seconds");
        assert_eq!((lines[0].total(), lines[0].to_string().as_str()), (1, "too many of one address: 1"));
        assert_eq!(lines[1].by_source.len(), 12);
        let due = refusals.due().expect("some are left");
        assert!((start + PERIOD * 4..start + PERIOD * 5).contains(&due), "{:?}", due - start);
        lines.extend(refusals.over(due));
        assert_eq!(lines.iter().map(Counted::total).sum::<u64>(), 3_455);
        assert_eq!(lines.iter().map(|it| it.by_reason[1]).sum::<u64>(), 691);
        // A quiet time later the next is logged at once again.
        assert_eq!((refusals.due(), refusals.over(start + PERIOD * 9)), (None, None));
        assert!(refusals.counted(Reason::Rate, IpAddr::from([10, 0, 0, 1]), start + PERIOD * 9).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn failed_handshake_is_counted_with_its_error() {
        let (refusals, source) = (Refusals::default(), IpAddr::from([10, 0, 0, 1]));
        refusals.count(Reason::Rate, source);
        refusals.count_failed(&io::Error::from(io::ErrorKind::UnexpectedEof), source);
        assert_eq!(refusals.due(), None, "a check of the port");
        let error = io::Error::new(io::ErrorKind::InvalidData, format!("expired\n{}", "x".repeat(500)));
        refusals.count_failed(&error, source);
        let counted = refusals.over(Instant::now() + PERIOD).expect("counted");
        assert_eq!(counted.to_string(), "handshake failed: 1");
        let (from, error) = counted.last_failure.expect("the error");
        assert!(from == source && error.starts_with("expired\\nxxx") && error.len() == MAX_ERROR_CHARS, "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn many_sources_take_bounded_room() {
        let refusals = Refusals::default();
        let now = Instant::now();
        refusals.counted(Reason::Rate, IpAddr::from([0, 0, 0, 0]), now);
        for number in 1..5_000_u32 {
            assert_eq!(refusals.counted(Reason::Rate, IpAddr::from(number.to_be_bytes()), now), None);
        }
        let counted = refusals.over(now + PERIOD).expect("counted");
        assert_eq!((counted.total(), counted.by_source.len()), (4_999, MAX_SOURCES));
    }
}
