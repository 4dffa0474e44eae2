//! Points in time as people and programs read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// RFC 3339 in UTC, in whole seconds; `-` for what it cannot express.
pub fn rfc3339(at: SystemTime) -> String {
    let whole = seconds(at).try_into().ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
    whole.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_else(|| "-".to_owned())
}

/// Seconds since the Unix epoch; 0 for what lies before.
pub fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The reverse of [`seconds`].
pub fn from_seconds(seconds: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_written_in_utc() {
        assert_eq!(rfc3339(from_seconds(1_800_000_000)), "2027-01-15T08:00:00Z");
        assert_eq!(seconds(from_seconds(7)), 7);
        assert_eq!(rfc3339(from_seconds(u64::MAX / 2)), "-");
    }
}
