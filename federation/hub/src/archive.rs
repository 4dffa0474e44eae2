//! A copy of a store in one file: for backups, and between stores.
//!
//! Format, with numbers big-endian: [`MAGIC`]; the time in seconds since 1970 and the revision (8 bytes each); the leases (their
//! number in 4 bytes, each its time to live in milliseconds, 8 bytes); the files (their number in 4 bytes, each a name and its
//! bytes); the entries (their number in 8 bytes, each a key, a value, and the number of its lease from 1 on, 4 bytes, or 0).
//! Names, keys, values and the bytes of files follow their length, 4 bytes. The BLAKE3 hash of all that ends the file.

use std::time::Duration;

use bytes::Bytes;
use hanse_store::{Key, Prefix, Store, StoreError};
use zeroize::Zeroizing;

const MAGIC: &[u8] = b"hanse-backup 1\n";
/// Largest archive, in bytes: objects of 48 MiB, 50,000 of each other record of some 1 KiB, and as much again.
pub const MAX_BYTES: usize = 256 << 20;

/// Everything in a store as of one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// When it was taken, in seconds since 1970.
    pub at: u64,
    pub revision: u64,
    pub leases: Vec<Duration>,
    /// Files of the hub's folder. They include the key of the authority, unless that is in the store.
    pub files: Vec<(String, Zeroizing<Vec<u8>>)>,
    /// In the order of their keys.
    pub entries: Vec<Record>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub key: Key,
    pub value: Bytes,
    /// Position in `leases`.
    pub lease: Option<usize>,
}

/// Why bytes are not an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveError {
    #[error("it is not a backup of a hub")]
    Foreign,
    #[error("it is damaged or incomplete: its checksum is wrong")]
    Damaged,
    #[error("it is larger than 256 MiB")]
    Large,
}

impl Archive {
    /// Copies a store.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn take(store: &dyn Store, at: u64) -> Result<Self, StoreError> {
        let everything = Prefix::new::<&str>(&[]).map_err(|_| StoreError::Closed)?;
        let listing = store.list(&everything).await?;
        let (mut ids, mut leases, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        for entry in listing.entries {
            let lease = match entry.lease {
                None => None,
                Some(id) => match ids.iter().position(|it| *it == id) {
                    Some(known) => Some(known),
                    None => match store.time_to_live(id).await {
                        Ok(time_to_live) => {
                            ids.push(id);
                            leases.push(time_to_live);
                            Some(ids.len() - 1)
                        }
                        // It has ended since, and its entries with it.
                        Err(StoreError::NoLease(_)) => continue,
                        Err(error) => return Err(error),
                    },
                },
            };
            entries.push(Record { key: entry.key, value: entry.value, lease });
        }
        Ok(Self { at, revision: listing.revision, leases, files: Vec::new(), entries })
    }

    /// Identifies the content: keys and values of all entries without a lease that `includes`.
    pub fn digest(&self, includes: impl Fn(&Key) -> bool) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for record in self.entries.iter().filter(|it| it.lease.is_none() && includes(&it.key)) {
            for part in [name_of(&record.key).as_bytes(), &record.value] {
                hasher.update(&(part.len() as u64).to_be_bytes());
                hasher.update(part);
            }
        }
        hasher.finalize()
    }

    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::new());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.at.to_be_bytes());
        bytes.extend_from_slice(&self.revision.to_be_bytes());
        bytes.extend_from_slice(&length(self.leases.len()));
        for lease in &self.leases {
            let milliseconds = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
            bytes.extend_from_slice(&milliseconds.to_be_bytes());
        }
        bytes.extend_from_slice(&length(self.files.len()));
        for (name, content) in &self.files {
            append(&mut bytes, name.as_bytes());
            append(&mut bytes, content);
        }
        bytes.extend_from_slice(&(self.entries.len() as u64).to_be_bytes());
        for record in &self.entries {
            append(&mut bytes, name_of(&record.key).as_bytes());
            append(&mut bytes, &record.value);
            bytes.extend_from_slice(&length(record.lease.map_or(0, |it| it + 1)));
        }
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes
    }

    /// # Errors
    /// When the bytes are not those of [`Self::encode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ArchiveError> {
        if bytes.len() > MAX_BYTES {
            return Err(ArchiveError::Large);
        }
        if !bytes.starts_with(MAGIC) {
            return Err(ArchiveError::Foreign);
        }
        let (content, hash) = bytes.split_at_checked(bytes.len().saturating_sub(32)).ok_or(ArchiveError::Damaged)?;
        if blake3::hash(content).as_bytes() != hash {
            return Err(ArchiveError::Damaged);
        }
        // What the checksum covers is as it was written; what cannot be read now was not written by this version.
        Reader(content.strip_prefix(MAGIC).ok_or(ArchiveError::Foreign)?).archive().ok_or(ArchiveError::Foreign)
    }
}

/// The segments of a key, which contain no zero byte.
fn name_of(key: &Key) -> String {
    key.segments().collect::<Vec<_>>().join("\0")
}

/// Parts are smaller than [`MAX_BYTES`].
fn length(count: usize) -> [u8; 4] {
    u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes()
}

fn append(bytes: &mut Vec<u8>, part: &[u8]) {
    bytes.extend_from_slice(&length(part.len()));
    bytes.extend_from_slice(part);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (part, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(part)
    }

    fn short(&mut self) -> Option<usize> {
        usize::try_from(u32::from_be_bytes(self.take(4)?.try_into().ok()?)).ok()
    }

    fn long(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }

    fn part(&mut self) -> Option<&'a [u8]> {
        let count = self.short()?;
        self.take(count)
    }

    fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.part()?).ok()
    }

    /// Memory is allocated as parts are read, so that a number alone allocates nothing.
    fn archive(mut self) -> Option<Archive> {
        let (at, revision) = (self.long()?, self.long()?);
        let (mut leases, mut files, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.short()? {
            leases.push(Duration::from_millis(self.long()?));
        }
        for _ in 0..self.short()? {
            files.push((self.text()?.to_owned(), Zeroizing::new(self.part()?.to_vec())));
        }
        for _ in 0..self.long()? {
            let key = Key::new(&self.text()?.split('\0').collect::<Vec<_>>()).ok()?;
            let value = Bytes::copy_from_slice(self.part()?);
            let lease = self.short()?.checked_sub(1);
            if lease.is_some_and(|it| it >= leases.len()) {
                return None;
            }
            entries.push(Record { key, value, lease });
        }
        self.0.is_empty().then_some(Archive { at, revision, leases, files, entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Archive {
        let record = |name: &[&str], value: &'static str, lease| Record {
            key: Key::new(name).unwrap(),
            value: Bytes::from_static(value.as_bytes()),
            lease,
        };
        Archive {
            at: 1_700_000_000,
            revision: 42,
            leases: vec![Duration::from_secs(30), Duration::from_millis(1)],
            files: vec![("ca.key".to_owned(), Zeroizing::new(b"secret".to_vec()))],
            entries: vec![record(&["a"], "", None), record(&["a", "b"], "1", Some(1)), record(&["c"], "2", None)],
        }
    }

    #[test]
    fn reads_what_it_writes_and_nothing_else() {
        let archive = archive();
        let bytes = archive.encode();
        assert_eq!(Archive::decode(&bytes), Ok(archive.clone()));
        for length in 0..bytes.len() {
            assert!(Archive::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.to_vec();
            changed[at] ^= 1;
            assert!(Archive::decode(&changed).is_err(), "byte {at}");
        }
        // With a checksum that is right.
        for at in MAGIC.len()..bytes.len() - 32 {
            let mut changed = bytes[..bytes.len() - 32].to_vec();
            changed[at] = 0xff;
            changed.extend_from_slice(blake3::hash(&changed).as_bytes());
            let _ = Archive::decode(&changed);
        }
    }

    #[test]
    fn digest_depends_on_each_key_and_value_and_not_on_leases() {
        let (one, all) = (archive(), |_: &Key| true);
        let digest = one.digest(all);
        let changed = |change: fn(&mut Archive)| {
            let mut other = one.clone();
            change(&mut other);
            other.digest(all)
        };
        assert_ne!(changed(|it| it.entries[2].value = Bytes::from_static(b"3")), digest);
        assert_ne!(changed(|it| drop(it.entries.pop())), digest);
        assert_eq!(changed(|it| drop(it.entries.remove(1))), digest);
        assert_eq!(changed(|it| (it.revision, it.at) = (1, 1)), digest);
        assert_ne!(one.digest(|key| key.name() != "c"), digest);
    }
}
