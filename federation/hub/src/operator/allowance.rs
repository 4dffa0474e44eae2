//! How often the status of an object is written.
//!
//! An object may be written once a minute. What it does not use is saved, up to [`BURST`] writes, so that a change shows at once. The
//! last one is kept for a condition that becomes false: a status that cannot follow is rather too pessimistic than too optimistic. A
//! change of the spec begins anew, since its author waits for the answer.

use std::time::Duration;

use tokio::time::Instant;

/// One write in this time.
const EVERY: Duration = Duration::from_secs(60);
/// Writes that are saved: those of a change from its acceptance to its enforcement, with one of a cluster that lags, and one kept.
const BURST: u32 = 5;
/// Of these, counts use what is above this number at once; then they wait for a minute.
const FOR_CONDITIONS: u32 = 3;

/// The writes that are left to an object.
#[derive(Debug, Clone, Copy)]
pub struct Allowance {
    left: u32,
    /// Since when the next one is saved.
    since: Option<Instant>,
    written: Option<Instant>,
}

/// How urgent a write is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Counts, revisions and digests.
    Counts,
    /// A condition changes.
    Condition,
    /// A condition is not true any more.
    Worse,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { left: BURST, since: None, written: None }
    }
}

impl Allowance {
    /// The author has changed the object.
    pub fn renew(&mut self) {
        self.left = BURST;
        self.since = None;
    }

    fn saved(&mut self, now: Instant) {
        let Some(since) = self.since else { return };
        let more = now.duration_since(since).as_secs() / EVERY.as_secs();
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(BURST);
        self.since = (self.left < BURST).then(|| since + EVERY.saturating_mul(more));
    }

    /// Whether a write may be made now.
    pub fn permits(&mut self, urgency: Urgency, now: Instant) -> bool {
        self.saved(now);
        match urgency {
            Urgency::Counts if self.left > FOR_CONDITIONS => true,
            Urgency::Counts => self.left > 1 && self.written.is_none_or(|at| now.duration_since(at) >= EVERY),
            Urgency::Condition => self.left > 1,
            Urgency::Worse => self.left > 0,
        }
    }

    pub fn written(&mut self, now: Instant) {
        self.saved(now);
        self.left = self.left.saturating_sub(1);
        self.since.get_or_insert(now);
        self.written = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The writes of an object whose status differs in each second, by minute.
    fn writes(minutes: u64, urgency: impl Fn(u64) -> Urgency) -> Vec<u32> {
        let (start, mut allowance) = (Instant::now(), Allowance::default());
        let mut writes = Vec::new();
        for minute in 0..minutes {
            let mut count = 0;
            for second in 0..60 {
                let second = minute * 60 + second;
                let now = start + Duration::from_secs(second);
                if allowance.permits(urgency(second), now) {
                    allowance.written(now);
                    count += 1;
                }
            }
            writes.push(count);
        }
        writes
    }

    #[test]
    fn at_most_one_write_a_minute_after_a_burst() {
        assert_eq!(writes(6, |_| Urgency::Counts), [2, 1, 1, 1, 1, 1]);
        assert_eq!(writes(6, |_| Urgency::Condition), [4, 1, 1, 1, 1, 1]);
        let flapping = writes(60, |second| if second % 2 == 0 { Urgency::Worse } else { Urgency::Condition });
        assert_eq!(flapping[0], BURST);
        assert!(flapping[1..].iter().all(|it| *it <= 1), "{flapping:?}");
    }

    #[test]
    fn last_write_is_kept_for_a_condition_that_becomes_false() {
        let (now, mut allowance) = (Instant::now(), Allowance::default());
        while allowance.permits(Urgency::Condition, now) {
            allowance.written(now);
        }
        assert!(allowance.permits(Urgency::Worse, now));
        allowance.written(now);
        assert!(!allowance.permits(Urgency::Worse, now));
        allowance.renew();
        assert!(allowance.permits(Urgency::Condition, now));
    }
}
