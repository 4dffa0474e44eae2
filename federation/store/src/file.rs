//! The embedded file: redb, one transaction per batch, flushed before it is acknowledged.
//!
//! Tables: `entries` (key → lease, created, modified as 8-byte big-endian numbers, then the value), `leases` (id → time to live
//! in milliseconds), `meta` (`format`, `revision`, `lease`).

use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use redb::backends::FileBackend;
use redb::{Builder, Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use crate::engine::{Batch, State};
use crate::{Entry, Key, LeaseId, StoreError};

const ENTRIES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("entries");
const LEASES: TableDefinition<'_, u64, u64> = TableDefinition::new("leases");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT: u64 = 1;
/// Pages held in memory: the state is held beside it, so this only serves writing.
const CACHE_BYTES: usize = 8 << 20;

#[derive(Debug)]
pub(crate) struct File {
    database: Database,
}

impl File {
    pub(crate) fn open(path: &Path) -> Result<(Self, State), StoreError> {
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = file.map_err(|e| StoreError::File(e.into()))?;
        file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(|e| StoreError::File(e.into()))?;
        let backend = FileBackend::new(file).map_err(StoreError::Open)?;
        let database =
            Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend).map_err(StoreError::Open)?;
        let this = Self { database };
        this.prepare().map_err(StoreError::File)?;
        let state = this.load()?;
        Ok((this, state))
    }

    /// Makes the tables where they are absent.
    fn prepare(&self) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        {
            write.open_table(ENTRIES)?;
            write.open_table(LEASES)?;
            let mut meta = write.open_table(META)?;
            let found = meta.get("format")?.is_some();
            if !found {
                meta.insert("format", FORMAT)?;
            }
        }
        write.commit()?;
        Ok(())
    }

    fn load(&self) -> Result<State, StoreError> {
        let mut state = State::default();
        let mut unreadable = false;
        let mut format = 0;
        let mut read = || -> Result<(), redb::Error> {
            let read = self.database.begin_read()?;
            let meta = read.open_table(META)?;
            let number = |name| Ok::<_, redb::Error>(meta.get(name)?.map_or(0, |v| v.value()));
            format = number("format")?;
            state.revision = number("revision")?;
            state.last_lease = number("lease")?;
            for row in read.open_table(LEASES)?.iter()? {
                let (id, ttl) = row?;
                state.leases.insert(LeaseId(id.value()), Duration::from_millis(ttl.value()));
            }
            for row in read.open_table(ENTRIES)?.iter()? {
                let (key, value) = row?;
                match decode(key.value(), value.value()) {
                    Some(entry) => drop(state.entries.insert(entry.key.clone(), entry)),
                    None => unreadable = true,
                }
            }
            Ok(())
        };
        read().map_err(StoreError::File)?;
        if format != FORMAT {
            return Err(StoreError::Format("its format number is not 1"));
        }
        if unreadable {
            return Err(StoreError::Format("an entry is malformed"));
        }
        Ok(state)
    }

    /// Writes a batch. When this returns, it is on disk.
    pub(crate) fn write(&self, batch: &Batch) -> Result<(), StoreError> {
        self.try_write(batch).map_err(StoreError::File)
    }

    fn try_write(&self, batch: &Batch) -> Result<(), redb::Error> {
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        // Two flushes, so that a power cut in the middle cannot leave a page that a checksum happens to accept.
        write.set_two_phase_commit(true);
        {
            let mut entries = write.open_table(ENTRIES)?;
            for (key, entry) in &batch.entries {
                match entry {
                    Some(entry) => drop(entries.insert(key.as_bytes(), encode(entry).as_slice())?),
                    None => drop(entries.remove(key.as_bytes())?),
                }
            }
            let mut leases = write.open_table(LEASES)?;
            for (lease, ttl) in &batch.leases {
                match ttl {
                    Some(ttl) => drop(leases.insert(lease.0, u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))?),
                    None => drop(leases.remove(lease.0)?),
                }
            }
            let mut meta = write.open_table(META)?;
            meta.insert("revision", batch.revision)?;
            meta.insert("lease", batch.last_lease)?;
        }
        write.commit()?;
        Ok(())
    }
}

fn encode(entry: &Entry) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24 + entry.value.len());
    // Leases are numbered from 1.
    for number in [entry.lease.map_or(0, |l| l.0), entry.created, entry.modified] {
        bytes.extend_from_slice(&number.to_be_bytes());
    }
    bytes.extend_from_slice(&entry.value);
    bytes
}

fn decode(key: &[u8], bytes: &[u8]) -> Option<Entry> {
    let (head, value) = bytes.split_at_checked(24)?;
    let number = |at: usize| head[at..at + 8].try_into().ok().map(u64::from_be_bytes);
    Some(Entry {
        key: Key::from_bytes(key)?,
        value: Bytes::copy_from_slice(value),
        lease: Some(LeaseId(number(0)?)).filter(|l| l.0 != 0),
        created: number(8)?,
        modified: number(16)?,
    })
}
