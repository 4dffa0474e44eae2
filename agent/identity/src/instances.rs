//! One key, two processes: the folder of a node or of a member that was copied, or stolen.
//!
//! A process has a number of its own, chosen at random and kept nowhere. One that takes the streams of a key over is usually the
//! same program that started again; then the earlier process does not come back. Where it does, both run. The first of them is
//! served, the other is refused as long as it tries, and what is acknowledged with the key does not count: which of them is
//! genuine is not known here.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

/// How long a process counts as one that still tries, after it last did: agents and members try again within 10 seconds.
const LASTS: Duration = Duration::from_secs(60);
/// A conflict that goes on is logged once in this time.
const WARN_EVERY: Duration = Duration::from_secs(600);

/// A process that uses a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Empty: of a version that has none. All of these are one.
    number: Vec<u8>,
    address: SocketAddr,
}

impl Instance {
    /// `number` as the process says it.
    pub fn new(number: &[u8], address: SocketAddr) -> Self {
        Self { number: number[..number.len().min(16)].to_vec(), address }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn is(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

/// The processes that used one key.
#[derive(Debug, Default)]
pub struct Instances {
    present: Option<(Instance, Instant)>,
    /// The one before.
    former: Option<(Instance, Instant)>,
    conflict: Option<Conflict>,
}

#[derive(Debug)]
struct Conflict {
    served: Instance,
    refused: Instance,
    /// When the refused one last tried.
    seen: Instant,
    warned: Option<Instant>,
}

/// The process that is served with a key.
#[derive(Debug, Clone, Copy)]
pub struct Serving<'a> {
    pub number: &'a [u8],
    /// The number of the process before.
    pub former: Option<&'a [u8]>,
    pub since: Instant,
}

impl Instances {
    /// A process opens a stream; `is_open`: that of the present one is open. False: it is refused.
    pub fn take(&mut self, newcomer: Instance, is_open: bool, now: Instant) -> bool {
        let Some((present, since)) = self.present.clone() else {
            self.present = Some((newcomer, now));
            return true;
        };
        if present.is(&newcomer) {
            self.present = Some((newcomer, since));
            return true;
        }
        let former = self.former.clone().filter(|(former, _)| former.is(&newcomer));
        let first = match former {
            // It was thought to be gone.
            Some((_, former_since)) if is_open => Some(former_since < since),
            _ => self.conflict(now).map(|conflict| conflict.served.is(&newcomer)),
        };
        let (is_let_in, since_newcomer) = match first {
            Some(is_first) => (is_first || !is_open, former.map_or(now, |(_, since)| since)),
            None => (true, now),
        };
        if first.is_some() && is_open {
            let (served, refused) =
                if is_let_in { (newcomer.clone(), present.clone()) } else { (present.clone(), newcomer.clone()) };
            let warned = self.conflict.take().and_then(|it| it.warned);
            self.conflict = Some(Conflict { served, refused, seen: now, warned });
        }
        if is_let_in {
            self.former = Some((present, since));
            self.present = Some((newcomer, since_newcomer));
        }
        is_let_in
    }

    /// A process takes the place of the present one, which has agreed to it, and is not the first one any more. True: it is served.
    pub fn succeed(&mut self, newcomer: Instance, now: Instant) -> bool {
        self.former = self.present.replace((newcomer, now)).map(|(former, _)| (former, now));
        true
    }

    /// Another place has served this process: it is the first one, if none has used the key here.
    pub fn expect(&mut self, number: &[u8], now: Instant) {
        if self.present.is_none() {
            let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
            // Earlier than the one that comes now.
            let since = now.checked_sub(Duration::from_millis(1)).unwrap_or(now);
            self.present = Some((Instance::new(number, unknown), since));
        }
    }

    /// The process that is served.
    pub fn serving(&self) -> Option<Serving<'_>> {
        let (present, since) = self.present.as_ref()?;
        let former = self.former.as_ref().map(|(former, _)| &*former.number);
        Some(Serving { number: &present.number, former, since: *since })
    }

    /// Whether this process is the one that is served.
    pub fn is_present(&self, instance: &Instance) -> bool {
        self.present.as_ref().is_some_and(|(present, _)| present.is(instance))
    }

    /// Who is served, and who is refused, where that is to be logged now: once in ten minutes.
    pub fn to_warn(&mut self, now: Instant) -> Option<(SocketAddr, SocketAddr)> {
        let conflict = self.conflict.as_mut()?;
        if conflict.warned.is_some_and(|at| now.duration_since(at) < WARN_EVERY) {
            return None;
        }
        conflict.warned = Some(now);
        Some((conflict.served.address, conflict.refused.address))
    }

    fn conflict(&self, now: Instant) -> Option<&Conflict> {
        self.conflict.as_ref().filter(|it| now.duration_since(it.seen) < LASTS)
    }

    /// Who is served, and who is refused, while both try.
    pub fn rivals(&self, now: Instant) -> Option<(SocketAddr, SocketAddr)> {
        self.conflict(now).map(|it| (it.served.address, it.refused.address))
    }

    /// Whether a conflict is over since the last call.
    pub fn settle(&mut self, now: Instant) -> bool {
        self.conflict(now).is_none() && self.conflict.take().is_some()
    }

    /// Where the process that is served connects from.
    pub fn served(&self) -> Option<SocketAddr> {
        self.present.as_ref().map(|(it, _)| it.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct World {
        instances: Instances,
        now: Instant,
    }

    impl World {
        fn take(&mut self, number: u8, is_open: bool) -> bool {
            self.now += Duration::from_secs(1);
            let from = SocketAddr::from(([192, 0, 2, number], 1));
            self.instances.take(Instance::new(&[number; 16], from), is_open, self.now)
        }

        fn rivals(&self) -> Option<(u8, u8)> {
            let last = |address: SocketAddr| match address {
                SocketAddr::V4(v4) => v4.ip().octets()[3],
                SocketAddr::V6(_) => 0,
            };
            self.instances.rivals(self.now).map(|(served, refused)| (last(served), last(refused)))
        }
    }

    fn world() -> World {
        World { instances: Instances::default(), now: Instant::now() }
    }

    #[test]
    fn an_agent_that_starts_again_takes_over_at_once() {
        let mut world = world();
        assert!(world.take(1, false) && world.take(1, true), "its next connection");
        assert!(world.take(2, true), "killed, and the old connection is not yet known to be dead");
        assert!(world.take(3, false) && world.take(3, true) && world.take(3, false));
        assert_eq!(world.rivals(), None);
    }

    #[test]
    fn of_two_that_live_the_first_is_served_and_the_other_refused() {
        let mut world = world();
        assert!(world.take(1, false) && world.take(2, true));
        assert_eq!(world.rivals(), None, "it may have started again");
        assert!(world.take(1, true), "it has not");
        assert_eq!(world.rivals(), Some((1, 2)));
        for _ in 0..20 {
            assert!(!world.take(2, true));
        }
        assert!(!world.take(3, true), "another name changes nothing");
        assert_eq!(world.rivals(), Some((1, 3)));
        // The first goes for a moment, and the other is quicker.
        assert!(world.take(2, false) && world.take(1, true) && !world.take(2, true));
        assert_eq!(world.rivals(), Some((1, 2)));
    }

    #[test]
    fn a_process_that_was_served_elsewhere_is_the_first_one() {
        let mut world = world();
        world.instances.expect(&[1; 16], world.now);
        assert!(world.take(2, false), "the first may have ended");
        assert!(world.take(1, true), "it has not");
        assert!(!world.take(2, true));
        assert_eq!(world.rivals(), Some((1, 2)));
        world.instances.expect(&[3; 16], world.now);
        assert_eq!(world.instances.serving().map(|it| it.number), Some(&[1; 16][..]), "one is known already");
    }

    #[test]
    fn conflict_that_goes_on_is_logged_once_in_ten_minutes() {
        let mut world = world();
        assert!(world.take(1, false) && world.instances.to_warn(world.now).is_none());
        assert!(world.take(2, true) && world.take(1, true));
        let mut warnings = 0;
        for _ in 0..WARN_EVERY.as_secs() + 10 {
            assert!(!world.take(2, true));
            warnings += usize::from(world.instances.to_warn(world.now).is_some());
        }
        assert_eq!(warnings, 2);
    }

    #[test]
    fn the_first_is_served_also_where_the_other_came_while_it_was_away() {
        let mut world = world();
        assert!(world.take(1, false) && world.take(2, false) && world.take(1, true));
        assert!(!world.take(2, true));
        assert_eq!(world.rivals(), Some((1, 2)));
    }

    #[test]
    fn one_that_has_agreed_to_be_replaced_does_not_replace_its_successor() {
        let mut world = world();
        assert!(world.take(1, false));
        let successor = Instance::new(&[2; 16], SocketAddr::from(([192, 0, 2, 2], 1)));
        assert!(world.instances.succeed(successor, world.now) && world.rivals().is_none());
        assert!(!world.take(1, true), "it claims to be the first one after all");
        assert_eq!(world.rivals(), Some((2, 1)));
        // A successor does not hide what was seen.
        let next = Instance::new(&[3; 16], SocketAddr::from(([192, 0, 2, 3], 1)));
        assert!(world.instances.succeed(next, world.now) && world.rivals() == Some((2, 1)));
    }

    #[test]
    fn a_conflict_is_over_when_one_of_them_is_gone() {
        let mut world = world();
        assert!(world.take(1, false) && world.take(2, true) && world.take(1, true) && !world.take(2, true));
        world.now += LASTS - Duration::from_secs(1);
        assert!(world.rivals().is_some() && !world.instances.settle(world.now));
        world.now += Duration::from_secs(2);
        assert_eq!(world.rivals(), None);
        assert!(world.instances.settle(world.now) && !world.instances.settle(world.now));
        // The agent starts again.
        assert!(world.take(4, true) && world.rivals().is_none());
    }
}
