//! The ranges of the node's pods, kept in a file: what is closed at a start at which nothing else is known.
//!
//! Format: one range per line. The member tells them when the node enrols, and with every rule set.

use std::io;
use std::path::{Path, PathBuf};

use hanse_runtime::files::write_atomic;
use ipnet::IpNet;

/// More are not taken from a member.
pub const MAX: usize = 64;

fn path(data: &Path) -> PathBuf {
    data.join("pod-ranges")
}

/// Keeps `ranges` in place of those before. None are not kept: they would open what is closed.
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

/// Those that are kept. What cannot be read is logged, and the rest is used.
pub fn read(data: &Path) -> Vec<IpNet> {
    let text = match std::fs::read_to_string(path(data)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(%error, path = %path(data).display(), "the ranges of the node's pods cannot be read");
            return Vec::new();
        }
    };
    let parse = |line: &str| {
        let parsed = line.parse::<IpNet>();
        if parsed.is_err() {
            tracing::warn!(line, path = %path(data).display(), "this is no range of pods, and not used");
        }
        parsed.ok().map(|range| range.trunc())
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_damaged_line_is_one_range_less() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(read(folder.path()), []);
        let ranges: Vec<IpNet> = ["10.1.0.0/24", "fd01::/64"].map(|it| it.parse().expect("a net")).into();
        write(folder.path(), &ranges).expect("written");
        assert_eq!(read(folder.path()), ranges);
        write(folder.path(), &[]).expect("nothing to do");
        assert_eq!(read(folder.path()), ranges, "none is no news");
        std::fs::write(path(folder.path()), "10.1.0.0/24\nfd01::/6four\n").expect("written");
        assert_eq!(read(folder.path()), ranges[..1]);
    }
}
