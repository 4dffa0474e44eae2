//! The file of the node's pod ranges, which are closed at a start without rules.
//!
//! Format: one range per line. The member sends them when the node enrols, and with every rule set.

use std::io;
use std::path::{Path, PathBuf};

use hanse_runtime::files::write_atomic;
use ipnet::IpNet;

/// Ranges that are accepted from a member.
pub const MAX: usize = 64;

fn path(data: &Path) -> PathBuf {
    data.join("pod-ranges")
}

/// Replaces the ranges in the file. An empty list is ignored: it would open what is closed.
///
/// # Errors
/// Those of the file system.
pub fn write(data: &Path, ranges: &[IpNet]) -> io::Result<()> {
    if ranges.is_empty() {
        return Ok(());
    }
    let text: String = ranges.iter().map(|range| format!("{range}\n")).collect();
    write_atomic(&path(data), text.as_bytes(), 0o600)
}

/// Removes the ranges: a start without rules closes none.
///
/// # Errors
/// Those of the file system.
pub fn remove(data: &Path) -> io::Result<()> {
    match std::fs::remove_file(path(data)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Reads the ranges. Lines that cannot be read are logged and skipped.
pub fn read(data: &Path) -> Vec<IpNet> {
    let text = match std::fs::read_to_string(path(data)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(%error, path = %path(data).display(), "pod ranges not read");
            return Vec::new();
        }
    };
    let parse = |line: &str| {
        let parsed = line.parse::<IpNet>();
        if parsed.is_err() {
            tracing::warn!(line, path = %path(data).display(), "line of the pod ranges skipped: not a range");
        }
        parsed.ok().map(|range| range.trunc())
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_damaged_lines_and_ignores_empty_lists() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(read(directory.path()), []);
        let ranges: Vec<IpNet> = ["10.1.0.0/24", "fd01::/64"].map(|it| it.parse().expect("a net")).into();
        write(directory.path(), &ranges).expect("written");
        assert_eq!(read(directory.path()), ranges);
        write(directory.path(), &[]).expect("nothing to do");
        assert_eq!(read(directory.path()), ranges, "an empty list is ignored");
        std::fs::write(path(directory.path()), "10.1.0.0/24\nfd01::/6four\n").expect("written");
        assert_eq!(read(directory.path()), ranges[..1]);
        remove(directory.path()).and_then(|()| remove(directory.path())).expect("removed");
        assert_eq!(read(directory.path()), []);
    }
}
