//! Keys as lists of segments, so that a prefix never matches half a name.

use std::fmt;

use bytes::Bytes;

/// Longest encoded key, in bytes.
pub const MAX_KEY_BYTES: usize = 1024;

/// A key: one to eight segments. Encoded as each segment followed by a zero byte, which keeps the order of segments.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Bytes);

/// All keys that begin with these segments. No segments: all keys.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Prefix(Bytes);

/// Why segments are not a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("a key has 1 to 8 segments")]
    Segments,
    #[error("a segment is not empty and contains no zero byte")]
    Segment,
    #[error("a key has at most 1,024 bytes")]
    Length,
}

impl Key {
    /// # Errors
    /// When there are none or more than 8 segments, one is empty or contains a zero byte, or all are longer than 1,024 bytes.
    pub fn new<S: AsRef<str>>(segments: &[S]) -> Result<Self, KeyError> {
        if segments.is_empty() {
            return Err(KeyError::Segments);
        }
        encode(segments).map(Self)
    }

    /// The segments, in order.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        // Built from `str`s, so every segment is UTF-8.
        self.0
            .strip_suffix(&[0])
            .unwrap_or(&self.0)
            .split(|b| *b == 0)
            .map(|s| std::str::from_utf8(s).unwrap_or_default())
    }

    /// The last segment: usually the name.
    pub fn name(&self) -> &str {
        self.segments().last().unwrap_or_default()
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let valid = bytes.last() == Some(&0) && bytes.len() <= MAX_KEY_BYTES && std::str::from_utf8(bytes).is_ok();
        valid.then(|| Self(Bytes::copy_from_slice(bytes)))
    }
}

impl Prefix {
    /// # Errors
    /// As [`Key::new`], but no segments are allowed.
    pub fn new<S: AsRef<str>>(segments: &[S]) -> Result<Self, KeyError> {
        encode(segments).map(Self)
    }

    pub fn matches(&self, key: &Key) -> bool {
        key.0.starts_with(&self.0)
    }

    pub(crate) fn first(&self) -> Key {
        Key(self.0.clone())
    }
}

fn encode<S: AsRef<str>>(segments: &[S]) -> Result<Bytes, KeyError> {
    if segments.len() > 8 {
        return Err(KeyError::Segments);
    }
    let mut bytes = Vec::new();
    for segment in segments {
        let segment = segment.as_ref().as_bytes();
        if segment.is_empty() || segment.contains(&0) {
            return Err(KeyError::Segment);
        }
        bytes.extend_from_slice(segment);
        bytes.push(0);
    }
    if bytes.len() > MAX_KEY_BYTES {
        return Err(KeyError::Length);
    }
    Ok(bytes.into())
}

fn show(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.split(|b| *b == 0).filter(|s| !s.is_empty()).try_for_each(|s| write!(f, "/{}", String::from_utf8_lossy(s)))
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(&self.0, f)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(&self.0, f)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(&self.0, f)?;
        f.write_str("/*")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_matches_whole_segments() {
        let key = |s: &[&str]| Key::new(s).unwrap();
        let prefix = Prefix::new(&["cluster", "a"]).unwrap();
        assert!(prefix.matches(&key(&["cluster", "a"])) && prefix.matches(&key(&["cluster", "a", "b"])));
        assert!(!prefix.matches(&key(&["cluster", "ab"])) && !prefix.matches(&key(&["cluster"])));
        assert!(key(&["a", "b"]) < key(&["a!"]), "a shorter segment comes first, with all below it");
        assert_eq!(key(&["a", "b"]).segments().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(Key::new(&["a", ""]), Err(KeyError::Segment));
        assert_eq!(Key::new::<&str>(&[]), Err(KeyError::Segments));
    }
}
