//! The embedded file: redb, one transaction per batch, flushed before it is acknowledged.
//!
//! Tables: `entries` (key → lease, created, modified as 8-byte big-endian numbers, then the value), `leases` (id → time to live
//! in milliseconds), `meta` (`format`, `revision`, `lease`).

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use redb::backends::FileBackend;
use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
};

use crate::error::StoreError;
use crate::key::Key;
use crate::model::{Entry, LeaseId};
use crate::state::{Batch, State};

const ENTRIES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("entries");
const LEASES: TableDefinition<'_, u64, u64> = TableDefinition::new("leases");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT: u64 = 1;
/// Readable by its owner only.
const MODE: u32 = 0o600;
/// Page cache. The state is kept in memory beside it, so the cache serves writes only.
const CACHE_BYTES: usize = 8 << 20;

#[derive(Debug)]
pub(crate) struct File {
    database: Database,
}

impl File {
    /// Makes a store at `path`, where no file may exist.
    pub(crate) fn create(path: &Path) -> Result<(Self, State), StoreError> {
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).mode(MODE).open(path);
        let file = file.map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => StoreError::Exists,
            _ => StoreError::Io(error),
        })?;
        let backend = FileBackend::new(file).map_err(not_opened)?;
        let this = Self { database: builder().create_with_backend(backend).map_err(not_opened)? };
        this.prepare().map_err(io_error)?;
        Ok((this, State::default()))
    }

    /// Opens the store at `path` and verifies every checksum in it, so that foreign changes are found.
    pub(crate) fn open(path: &Path) -> Result<(Self, State), StoreError> {
        // The library panics on some damage; its state is dropped with the panic.
        catch_unwind(AssertUnwindSafe(|| Self::open_verified(path))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(StoreError::Damaged(text.unwrap_or_else(|| "it cannot be read".to_owned())))
        })
    }

    fn open_verified(path: &Path) -> Result<(Self, State), StoreError> {
        let metadata = fs::metadata(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => StoreError::Absent,
            _ => StoreError::Io(error),
        })?;
        if !metadata.is_file() {
            return Err(StoreError::Foreign("it is not a regular file"));
        }
        if metadata.len() == 0 {
            return Err(StoreError::Foreign("it is empty"));
        }
        let database = builder().set_check_integrity_on_open(true).open(path).map_err(not_opened)?;
        fs::set_permissions(path, fs::Permissions::from_mode(MODE)).map_err(StoreError::Io)?;
        let this = Self { database };
        let state = this.load()?;
        Ok((this, state))
    }

    /// Makes the tables.
    fn prepare(&self) -> Result<(), redb::Error> {
        let mut write = self.database.begin_write()?;
        write.set_two_phase_commit(true);
        {
            write.open_table(ENTRIES)?;
            write.open_table(LEASES)?;
            write.open_table(META)?.insert("format", FORMAT)?;
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
        read().map_err(not_read)?;
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
        self.try_write(batch).map_err(io_error)
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

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

fn not_opened(error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => StoreError::InUse,
        DatabaseError::UpgradeRequired(_) => StoreError::Format("it was written by an older version of the library"),
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
            StoreError::Foreign("it is not a database")
        }
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() == ErrorKind::UnexpectedEof => {
            StoreError::Damaged("its end is missing".to_owned())
        }
        DatabaseError::Storage(StorageError::Io(error)) => StoreError::Io(error),
        error => StoreError::Damaged(error.to_string()),
    }
}

fn not_read(error: redb::Error) -> StoreError {
    match error {
        redb::Error::TableDoesNotExist(_) | redb::Error::TableTypeMismatch { .. } => {
            StoreError::Foreign("it is the database of another program")
        }
        redb::Error::Corrupted(why) => StoreError::Damaged(why),
        error => io_error(error),
    }
}

/// The library's error as one of input and output.
fn io_error(error: redb::Error) -> StoreError {
    StoreError::Io(match error {
        redb::Error::Io(error) => error,
        error => io::Error::other(error),
    })
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
