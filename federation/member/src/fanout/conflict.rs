//! One key, two processes: a node's folder that was copied, or stolen.
//!
//! An agent's process has a number of its own, chosen at random and kept nowhere. One that takes the stream of a node over is
//! usually the agent that started again; then the earlier one does not come back. Where it does, both live. The one that
//! was there first is served, the other is refused as long as it tries, and what the node acknowledges does not count: which of them
//! is the node is not known here.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

/// How long a process counts as one that still tries, after it last did: an agent tries again within 8 seconds.
const LASTS: Duration = Duration::from_secs(60);
/// A conflict that goes on is logged once in this time.
const WARN_EVERY: Duration = Duration::from_secs(600);

/// A process that has a node's key.
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

    #[cfg(test)]
    pub fn of_test(number: u8) -> Self {
        Self::new(&[number; 16], SocketAddr::from(([192, 0, 2, number], 1)))
    }
}

/// The processes that spoke for one node with its present key.
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

impl Instances {
    /// A process opens a stream; `is_open`: that of the present one is open. False: it is refused.
    pub fn take(&mut self, newcomer: Instance, is_open: bool, node: &str, now: Instant) -> bool {
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
            let mut conflict = Conflict { served, refused, seen: now, warned };
            if conflict.warned.is_none_or(|at| now.duration_since(at) >= WARN_EVERY) {
                conflict.warned = Some(now);
                tracing::warn!(
                    node,
                    served = %conflict.served.address,
                    refused = %conflict.refused.address,
                    "the node's key is used from two places: one is a copy of its folder; revoke the node, and enrol it anew"
                );
            }
            self.conflict = Some(conflict);
        }
        if is_let_in {
            self.former = Some((present, since));
            self.present = Some((newcomer, since_newcomer));
        }
        is_let_in
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

    /// What a process is told that is refused.
    pub fn refusal(&self, node: &str) -> Option<String> {
        self.present.as_ref().map(|(it, _)| refusal(node, it.address))
    }
}

/// What a process is sent that is refused since another one is served.
pub fn refusal(node: &str, served: SocketAddr) -> String {
    format!("the key of node {node} is in use from {served}: one of both is a copy; revoke the node, and enrol it anew")
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
            self.instances.take(Instance::of_test(number), is_open, "n", self.now)
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
        assert!(!world.take(3, true), "another name is no way around");
        assert_eq!(world.rivals(), Some((1, 3)));
        // The first goes for a moment, and the other is quicker.
        assert!(world.take(2, false) && world.take(1, true) && !world.take(2, true));
        assert_eq!(world.rivals(), Some((1, 2)));
    }

    #[test]
    fn the_first_is_served_also_where_the_other_came_while_it_was_away() {
        let mut world = world();
        assert!(world.take(1, false) && world.take(2, false) && world.take(1, true));
        assert!(!world.take(2, true));
        assert_eq!(world.rivals(), Some((1, 2)));
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
