//! A rate limit for each source of requests, bounded in the number of sources.

use std::collections::HashMap;
use std::hash::Hash;

use tokio::time::Instant;

/// Sources that the rate limit remembers: 4,096 × about 64 bytes is 256 KiB. Beyond it, full allowances are forgotten; when none is full, newcomers are refused.
const MAX_SOURCES: usize = 4096;

/// A token bucket per source: `per_second` refill, ten seconds' worth of burst and at least 1.
#[derive(Debug)]
pub struct RateLimit<K> {
    per_second: f64,
    burst: f64,
    sources: HashMap<K, (f64, Instant)>,
}

impl<K: Eq + Hash> RateLimit<K> {
    /// With a burst of ten seconds' worth.
    pub fn new(per_second: f64) -> Self {
        Self::with_burst(per_second, (per_second * 10.0).max(1.0))
    }

    pub fn with_burst(per_second: f64, burst: f64) -> Self {
        Self { per_second, burst, sources: HashMap::new() }
    }

    /// Whether one more from this source is allowed; counts it then.
    pub fn allows(&mut self, source: K, now: Instant) -> bool {
        if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&source) {
            let (burst, per_second) = (self.burst, self.per_second);
            self.sources.retain(|_, (left, at)| *left + now.duration_since(*at).as_secs_f64() * per_second < burst);
            if self.sources.len() >= MAX_SOURCES {
                return false;
            }
        }
        let (left, at) = self.sources.entry(source).or_insert((self.burst, now));
        *left = (*left + now.duration_since(*at).as_secs_f64() * self.per_second).min(self.burst);
        *at = now;
        if *left < 1.0 {
            return false;
        }
        *left -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_rate_limit_refills_and_is_per_source() {
        let mut rate = RateLimit::new(1.0);
        let now = Instant::now();
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        assert_eq!((0..20).filter(|_| rate.allows(a, now)).count(), 10);
        assert!(rate.allows(b, now));
        assert!(rate.allows(a, now + Duration::from_secs(1)));
        assert!(!rate.allows(a, now + Duration::from_secs(1)));
    }
}
