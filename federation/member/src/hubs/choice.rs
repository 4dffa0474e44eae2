//! Which replica of the hub a member watches.
//!
//! It prefers, in this order: replicas that it reaches and that are not behind others, replicas that it reaches, and all others; among
//! these, the one of the greatest weight, so that clusters spread over replicas. When a stream ends, the next replica is tried at once.
//! A stream moves while it is served only for a reason: its replica is no longer reached, it stays behind others (it may have lost the
//! store, while they have not), or a preferred replica has returned. Clusters move back to a replica spread over time.

use std::collections::BTreeMap;
use std::time::Duration;

use hanse_exchange::model::Position;
use tokio::time::Instant;

use super::view::{View, random_fraction};

/// A replica is behind if it has not reached, within this time to twice this time, the position of another.
const BEHIND_AFTER: Duration = Duration::from_secs(10);
/// When a preferred replica has returned, clusters move back to it within this time.
const RETURN_AFTER: Duration = Duration::from_secs(10);
const RETURN_WITHIN: Duration = Duration::from_secs(30);
/// When a replica is left for another reason, clusters leave within this time.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
/// The delays between attempts to watch one replica.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(2);

/// The state of the choice. It starts anew with the process.
#[derive(Debug, Default)]
pub struct Choice {
    failed: BTreeMap<String, Failed>,
    /// The greatest position of all replicas at some time, and the one before, which all of them should have reached.
    newest: Option<(Position, Instant)>,
    expected: Option<Position>,
    planned: Option<Planned>,
}

/// A move to another replica.
#[derive(Debug)]
struct Planned {
    to: String,
    at: Instant,
    /// The member's position when the move was planned: the replica has this and more by then. Its present position is known a few
    /// seconds later only, when the member's is greater again.
    needs: Position,
}

#[derive(Debug, Clone, Copy)]
struct Failed {
    times: u32,
    until: Instant,
}

/// What to watch when no stream is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    Hub(String),
    /// No replica may be tried before.
    At(Instant),
}

/// How good a replica is. The least is best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Current,
    Behind,
    Unreached,
}

impl Choice {
    /// The stream to a replica failed, or could not be opened.
    pub fn failed(&mut self, address: &str, now: Instant) {
        let times = self.failed.get(address).map_or(0, |it| it.times);
        let delay = RETRY_FIRST.saturating_mul(1 << times.min(8)).min(RETRY_LAST);
        // Between half of it and all of it, as clusters that fail together.
        let until = now + delay.mul_f64(0.5 + random_fraction() / 2.0);
        self.failed.insert(address.to_owned(), Failed { times: times.saturating_add(1), until });
        self.planned = None;
    }

    /// A replica serves the stream.
    pub fn serves(&mut self, address: &str) {
        self.failed.remove(address);
    }

    /// The replica to watch now.
    pub fn next(&mut self, view: &View, now: Instant) -> Next {
        self.observe(view, now);
        self.failed.retain(|address, _| view.ranked.contains(address));
        let free = view.ranked.iter().filter(|address| self.failed.get(*address).is_none_or(|it| it.until <= now));
        // `min_by_key` returns the first of equals, which is the preferred one.
        match free.min_by_key(|address| self.class(view, address)) {
            Some(address) => Next::Hub(address.clone()),
            None => Next::At(self.failed.values().map(|it| it.until).min().unwrap_or(now + RETRY_FIRST)),
        }
    }

    /// The replica to which the stream is to move from `watched` now, if any. `received`: the member's position.
    pub fn better(&mut self, watched: &str, received: Position, view: &View, now: Instant) -> Option<String> {
        self.observe(view, now);
        let best = view.ranked.iter().min_by_key(|address| self.class(view, address))?;
        let (is, was) = (self.class(view, best), self.class(view, watched));
        let has_failed = self.failed.get(best).is_some_and(|it| it.until > now);
        if best == watched || is != Class::Current || has_failed {
            self.planned = None;
            return None;
        }
        if self.planned.as_ref().is_none_or(|planned| planned.to != *best) {
            let after = match was {
                Class::Current => RETURN_AFTER + (RETURN_WITHIN - RETURN_AFTER).mul_f64(random_fraction()),
                Class::Behind | Class::Unreached => LEAVE_WITHIN.mul_f64(random_fraction()),
            };
            self.planned = Some(Planned { to: best.clone(), at: now + after, needs: received });
        }
        let planned = self.planned.as_ref()?;
        // A replica does not serve a member that has received more than it has.
        let hub = view.reached.get(best).and_then(|it| it.hub);
        (planned.at <= now && hub.is_none_or(|hub| !is_less(hub, planned.needs))).then(|| best.clone())
    }

    fn observe(&mut self, view: &View, now: Instant) {
        let Some(newest) = view.reached.values().filter_map(|it| it.hub).max() else {
            (self.newest, self.expected) = (None, None);
            return;
        };
        match self.newest {
            Some((before, at)) if now.duration_since(at) >= BEHIND_AFTER => {
                (self.expected, self.newest) = (Some(before), Some((newest, now)));
            }
            Some(_) => {}
            None => self.newest = Some((newest, now)),
        }
    }

    fn class(&self, view: &View, address: &str) -> Class {
        match (view.reached.get(address), self.expected) {
            (None, _) => Class::Unreached,
            (Some(it), Some(expected)) if it.hub.is_some_and(|hub| is_less(hub, expected)) => Class::Behind,
            (Some(_), _) => Class::Current,
        }
    }
}

/// Positions of different epochs are not comparable.
fn is_less(one: Position, other: Position) -> bool {
    one.epoch == other.epoch && one.revision < other.revision
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bytes::Bytes;

    use super::super::view::ReachedHub;
    use super::*;

    fn view(reached: &[(&str, u64)]) -> View {
        let ranked: Vec<String> = ["a", "b", "c"].map(str::to_owned).into();
        let reached = reached.iter().map(|(address, revision)| {
            let hub = Some(Position { epoch: 1, revision: *revision });
            ((*address).to_owned(), ReachedHub { stream: 0, replica: Bytes::new(), hub })
        });
        View { announced: BTreeSet::new(), ranked, reached: reached.collect() }
    }

    const AT_5: Position = Position { epoch: 1, revision: 5 };

    /// When it moves from `watched` within two minutes, checked each 100 ms.
    fn moves(choice: &mut Choice, watched: &str, view: &View, now: &mut Instant) -> Option<(String, Duration)> {
        let began = *now;
        while now.duration_since(began) < Duration::from_secs(120) {
            if let Some(to) = choice.better(watched, AT_5, view, *now) {
                return Some((to, now.duration_since(began)));
            }
            *now += Duration::from_millis(100);
        }
        None
    }

    #[test]
    fn the_next_replica_is_tried_at_once_and_a_failed_one_later() {
        let (mut choice, now) = (Choice::default(), Instant::now());
        let all = view(&[("a", 5), ("b", 5), ("c", 5)]);
        let hub = |address: &str| Next::Hub(address.to_owned());
        assert_eq!(choice.next(&all, now), hub("a"));
        choice.failed("a", now);
        assert_eq!(choice.next(&all, now), hub("b"));
        choice.failed("b", now);
        assert_eq!(choice.next(&all, now), hub("c"));
        choice.failed("c", now);
        let Next::At(at) = choice.next(&all, now) else { panic!("all have failed") };
        assert!(at > now && at <= now + RETRY_FIRST, "{:?}", at - now);
        assert!(matches!(choice.next(&all, at), Next::Hub(_)));
        for _ in 0..40 {
            choice.failed("a", now);
        }
        assert_eq!(choice.next(&all, now + RETRY_LAST), hub("a"), "the delay is limited");
        assert_eq!(choice.next(&view(&[("c", 5)]), now + RETRY_LAST), hub("c"), "the one that is reached");
        assert_eq!(choice.next(&view(&[]), now + RETRY_LAST), hub("a"), "at the start none is");
    }

    #[test]
    fn returns_to_its_replica_spread_over_time() {
        let mut times = Vec::new();
        for _ in 0..200 {
            let (mut choice, mut now) = (Choice::default(), Instant::now());
            let all = view(&[("a", 5), ("b", 5), ("c", 5)]);
            let (to, after) = moves(&mut choice, "b", &all, &mut now).expect("a is preferred");
            assert_eq!(to, "a");
            times.push(after);
        }
        let within = |time: &&Duration| (RETURN_AFTER..=RETURN_WITHIN + Duration::from_millis(100)).contains(*time);
        assert_eq!(times.iter().filter(within).count(), times.len(), "{times:?}");
        let early = times.iter().filter(|it| **it < (RETURN_AFTER + RETURN_WITHIN) / 2).count();
        assert!((60..140).contains(&early), "{early} of 200 in the first half");
        let (mut choice, mut now) = (Choice::default(), Instant::now());
        assert_eq!(moves(&mut choice, "a", &view(&[("a", 5), ("b", 5)]), &mut now), None, "it stays where it prefers");
        // Also after it has failed, as when it was killed.
        (0..10).for_each(|_| choice.failed("a", now));
        let all = view(&[("a", 5), ("b", 5)]);
        assert_eq!(moves(&mut choice, "b", &all, &mut now).map(|it| it.0).as_deref(), Some("a"));
    }

    #[test]
    fn leaves_a_replica_that_is_not_reached_or_stays_behind() {
        let (mut choice, mut now) = (Choice::default(), Instant::now());
        let (to, after) = moves(&mut choice, "a", &view(&[("b", 5), ("c", 5)]), &mut now).expect("it leaves");
        assert!(to == "b" && after <= LEAVE_WITHIN + Duration::from_millis(100), "{to} {after:?}");
        // The preferred replica no longer sees the store, while the others do.
        let (mut choice, mut now) = (Choice::default(), Instant::now());
        let behind = view(&[("a", 5), ("b", 6), ("c", 6)]);
        let (to, after) = moves(&mut choice, "a", &behind, &mut now).expect("it leaves");
        assert!(to == "b" && (BEHIND_AFTER..BEHIND_AFTER * 3).contains(&after), "{to} {after:?}");
        assert_eq!(choice.next(&behind, now), Next::Hub("b".to_owned()));
        assert_eq!(moves(&mut choice, "b", &behind, &mut now), None);
        // Behind by a moment only: its position moves on, as do all others.
        let (mut choice, mut now) = (Choice::default(), Instant::now());
        for revision in 5..600 {
            let moving = view(&[("a", revision), ("b", revision + 3), ("c", revision + 1)]);
            assert_eq!(choice.better("a", AT_5, &moving, now), None, "{revision}");
            now += Duration::from_millis(500);
        }
    }

    #[test]
    fn does_not_move_to_a_replica_that_has_less_than_the_member() {
        let (mut choice, mut now) = (Choice::default(), Instant::now());
        let all = view(&[("a", 4), ("b", 5)]);
        // Not behind yet, and it would not serve the stream.
        for _ in 0..5 {
            assert_eq!(choice.better("b", AT_5, &all, now), None);
            now += Duration::from_secs(1);
        }
        assert_eq!(moves(&mut choice, "b", &all, &mut now), None);
        let caught_up = view(&[("a", 5), ("b", 5)]);
        assert_eq!(moves(&mut choice, "b", &caught_up, &mut now).map(|it| it.0).as_deref(), Some("a"));
    }

    /// Positions of replicas are known some seconds later than that of the member.
    #[test]
    fn moves_also_while_the_hub_changes_all_the_time() {
        let (mut choice, mut now) = (Choice::default(), Instant::now());
        let moved = (100..1_000_u64).find(|revision| {
            now += Duration::from_millis(100);
            let known = revision - revision % 30;
            let received = Position { epoch: 1, revision: *revision };
            choice.better("b", received, &view(&[("a", known), ("b", known)]), now).is_some()
        });
        let after = Duration::from_millis(100 * (moved.expect("it moves") - 100));
        assert!((RETURN_AFTER..RETURN_WITHIN + Duration::from_secs(4)).contains(&after), "{after:?}");
    }

    #[test]
    fn epochs_are_not_compared() {
        let (mut choice, mut now) = (Choice::default(), Instant::now());
        let mut restored = view(&[("a", 5), ("b", 900)]);
        if let Some(hub) = restored.reached.get_mut("a") {
            hub.hub = Some(Position { epoch: 2, revision: 5 });
        }
        assert_eq!(moves(&mut choice, "a", &restored, &mut now), None);
    }
}
