//! Where the keys of a store are in etcd.
//!
//! All keys of a store begin with its prefix and a colon, which prefixes of URLs do not contain: the store `/a` sees nothing of
//! `/a/b` or `/ab`. The colon is followed by the bytes of a [`Key`], or by a zero byte and a name for the store's own keys, which
//! no listing and no watch includes.

use etcd_client::KeyValue;
use tracing::warn;

use crate::key::{Key, Prefix};
use crate::model::{Entry, LeaseId, Revision};

/// The first bytes of all keys of a store.
#[derive(Debug, Clone)]
pub(super) struct Root(Vec<u8>);

/// The keys from the first up to, and without, the second.
pub(super) type Range = (Vec<u8>, Vec<u8>);

impl Root {
    pub(super) fn new(prefix: &str) -> Self {
        Self(format!("{prefix}:").into_bytes())
    }

    pub(super) fn key(&self, key: &Key) -> Vec<u8> {
        self.with(key.as_bytes())
    }

    /// A key of the store itself.
    pub(super) fn own(&self, name: &str) -> Vec<u8> {
        self.with(&[b"\0", name.as_bytes()].concat())
    }

    /// Everything in the store, with its own keys.
    pub(super) fn everything(&self) -> Range {
        (self.0.clone(), end(self.0.clone()))
    }

    pub(super) fn below(&self, prefix: &Prefix) -> Range {
        let first = prefix.first();
        match first.as_bytes() {
            // After the store's own keys.
            [] => (self.with(b"\x01"), end(self.0.clone())),
            bytes => (self.with(bytes), end(self.with(bytes))),
        }
    }

    /// The key at `bytes`. Something else than this store wrote any other; it has no meaning, and is skipped.
    pub(super) fn parse(&self, bytes: &[u8]) -> Option<Key> {
        let key = bytes.strip_prefix(&*self.0).and_then(Key::from_bytes);
        if key.is_none() {
            warn!(key = %bytes.escape_ascii(), "unknown key in the store skipped");
        }
        key
    }

    pub(super) fn entry(&self, found: &KeyValue) -> Option<Entry> {
        Some(Entry {
            key: self.parse(found.key())?,
            value: found.value().to_vec().into(),
            created: revision(found.create_revision()),
            modified: revision(found.mod_revision()),
            lease: lease(found.lease()),
        })
    }

    fn with(&self, bytes: &[u8]) -> Vec<u8> {
        [&*self.0, bytes].concat()
    }
}

/// The first key after all that begin with `bytes`, which do not end with 0xff.
fn end(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(last) = bytes.last_mut() {
        *last = last.saturating_add(1);
    }
    bytes
}

/// etcd's numbers are signed, and never negative.
pub(super) fn revision(number: i64) -> Revision {
    u64::try_from(number).unwrap_or_default()
}

/// A revision as etcd's number. One that etcd cannot have is after all others.
pub(super) fn number(revision: Revision) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX - 1)
}

/// 0 is etcd's number for no lease.
fn lease(number: i64) -> Option<LeaseId> {
    u64::try_from(number).ok().filter(|it| *it != 0).map(LeaseId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_include_the_keys_of_one_store_only() {
        let root = Root::new("/a");
        let key = root.key(&Key::new(&["x", "y"]).unwrap());
        let within = |range: &Range, key: &[u8]| *range.0 <= *key && *key < *range.1;
        let everything = root.everything();
        let all = root.below(&Prefix::new::<&str>(&[]).unwrap());
        let some = root.below(&Prefix::new(&["x"]).unwrap());
        assert!([&everything, &all, &some].into_iter().all(|range| within(range, &key)));
        let own = root.own("store");
        assert!(within(&everything, &own) && !within(&all, &own));
        for prefix in ["/a/b", "/ab", "/a-"] {
            let other = Root::new(prefix);
            let others = [other.own("store"), other.key(&Key::new(&["x"]).unwrap())];
            assert!(others.iter().all(|key| !within(&everything, key)), "{prefix}");
        }
        assert!(!within(&some, &root.key(&Key::new(&["xy"]).unwrap())));
        assert_eq!(root.parse(&key), Some(Key::new(&["x", "y"]).unwrap()));
        assert_eq!((root.parse(b"/a:x"), root.parse(b"/b:x\0")), (None, None));
    }
}
