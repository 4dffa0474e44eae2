//! What has happened to a file is never served as another state: it is the same as before, or it is refused in words.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hanse_store::{Entry, Key, Prefix, Revision, Store, StoreError, StoreUrl, Transaction, create, open};

/// Everything in a store.
type State = (Revision, Vec<Entry>);

struct World {
    _folder: tempfile::TempDir,
    path: PathBuf,
    /// The file of a store that was closed.
    bytes: Vec<u8>,
    /// ... or killed.
    open_bytes: Vec<u8>,
    state: State,
    /// Before the last transaction.
    before: State,
}

/// Which of two commits is the newest is one bit of the file, and the last thing that a commit writes: a file in which it is
/// changed is, to the bit, what a crash just before leaves.
const NEWEST_COMMIT: (usize, u8) = (9, 1);

async fn state(store: &dyn Store) -> State {
    let everything = store.list(&Prefix::new::<&str>(&[]).unwrap()).await.unwrap();
    (everything.revision, everything.entries)
}

impl World {
    async fn new() -> Self {
        // Thousands of files are flushed: in memory, where that is possible.
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let path = folder.path().join("store");
        let store = create(&StoreUrl::file(&path)).await.unwrap();
        let key = |number: usize| Key::new(&["object", &format!("{number:04}")]).unwrap();
        let lease = store.grant_lease(Duration::from_secs(3_600)).await.unwrap();
        for number in 0..40 {
            let value = vec![u8::try_from(number).unwrap(); 64 + 400 * (number % 7)];
            store.commit(Transaction::default().put(key(number), value)).await.unwrap();
        }
        // Larger than a page, and what was overwritten and deleted.
        store.commit(Transaction::default().put(key(41), vec![7; 60_000])).await.unwrap();
        store.commit(Transaction::default().put_with_lease(key(1), "leased", lease)).await.unwrap();
        let before = state(&*store).await;
        store.commit(Transaction::default().delete(key(2)).delete(key(3))).await.unwrap();
        let state = state(&*store).await;
        let open_bytes = std::fs::read(&path).unwrap();
        drop(store);
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        // The lease task keeps the store until its next tick.
        while open(&StoreUrl::file(&path)).await.is_err() {
            assert!(std::time::Instant::now() < deadline, "it is not closed");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let bytes = std::fs::read(&path).unwrap();
        Self { path: folder.path().join("damaged"), _folder: folder, bytes, open_bytes, state, before }
    }

    /// Opens a file of these bytes: its state, or why there is none.
    async fn open(&self, bytes: &[u8]) -> Result<State, StoreError> {
        // The store that was opened last may hold its file for a moment.
        let _ = std::fs::remove_file(&self.path);
        std::fs::write(&self.path, bytes).unwrap();
        Ok(state(&*open(&StoreUrl::file(&self.path)).await?).await)
    }

    /// Whether it is served; then it must be what it was.
    async fn check(&self, what: &str, bytes: &[u8]) -> bool {
        match self.open(bytes).await {
            Ok(state) => {
                let (at, entries) = (state.0, state.1.len());
                assert!(
                    state == self.state,
                    "{what}: revision {at} and {entries} entries are served as if nothing were"
                );
                true
            }
            Err(error) => {
                let text = error.to_string();
                assert!(!text.is_empty() && !matches!(error, StoreError::InUse), "{what}: {text}");
                false
            }
        }
    }
}

#[tokio::test]
async fn a_file_that_was_cut_off_is_not_served_as_another_state() {
    let world = World::new().await;
    for whole in [&world.bytes, &world.open_bytes] {
        assert!(world.check("whole", whole).await);
        let length = whole.len();
        let pages = (0..length).step_by(4096 * 3).flat_map(|at| [at.saturating_sub(1), at, at + 1]);
        let lengths = (0..64).chain((64..4_096).step_by(509)).chain(pages).filter(|at| *at < length);
        let mut served = 0;
        for length in lengths {
            served += usize::from(world.check(&format!("cut to {length} bytes"), &whole[..length]).await);
        }
        println!("{length} bytes: {served} of its beginnings hold everything");
    }
}

#[tokio::test]
async fn a_changed_byte_is_not_served_as_another_state() {
    let world = World::new().await;
    for whole in [&world.bytes, &world.open_bytes] {
        let (mut random, mut served, mut tried) = (9_u64, 0, 0);
        let mut next = move || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize
        };
        // Each byte of the header; elsewhere as chance will have it, and more than one at once.
        for at in (0..320).chain((0..300).map(|_| next() % whole.len()).collect::<Vec<_>>()) {
            for bits in [1 << (next() % 8), 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= bits;
                tried += 1;
                if (at, bits) == NEWEST_COMMIT {
                    let state = world.open(&bytes).await.unwrap();
                    assert!([&world.state, &world.before].contains(&&state));
                    continue;
                }
                served += usize::from(world.check(&format!("byte {at} ^ {bits:#x}"), &bytes).await);
            }
        }
        for round in 0..100 {
            let mut bytes = whole.clone();
            let (from, count) = (next() % bytes.len(), next() % 9_000);
            let end = bytes.len().min(from + count);
            bytes[from..end].iter_mut().for_each(|byte| *byte = if round % 2 == 0 { 0 } else { next() as u8 });
            tried += 1;
            served += usize::from(world.check(&format!("{count} bytes from {from}, round {round}"), &bytes).await);
        }
        println!("{tried} changes, after {served} everything is there");
    }
}

#[tokio::test]
async fn refuses_files_that_are_not_stores() {
    let world = World::new().await;
    let other = world.path.with_file_name("other");
    {
        let other = redb::Database::create(&other).unwrap();
        let write = other.begin_write().unwrap();
        let table: redb::TableDefinition<'_, &str, u64> = redb::TableDefinition::new("another");
        write.open_table(table).unwrap().insert("a", 1).unwrap();
        write.commit().unwrap();
    }
    let other = std::fs::read(other).unwrap();
    for (what, bytes, expected) in [
        ("nothing", &b""[..], "it is empty"),
        ("text", b"apiVersion: v1\nkind: Pod\n", "it is not a database"),
        ("zeros", &[0; 65_536], "it is not a database"),
        ("a program", b"\x7fELF\x02\x01\x01", "it is not a database"),
        ("another program's database", &other, "it is the database of another program"),
    ] {
        let error = world.open(bytes).await.unwrap_err();
        assert!(matches!(error, StoreError::Foreign(_)) && error.to_string().ends_with(expected), "{what}: {error}");
        // It is looked at, and not changed.
        if bytes.len() < 60_000 {
            assert_eq!(std::fs::read(&world.path).unwrap(), bytes, "{what}");
        }
    }
    let folder = world.path.with_file_name("folder");
    std::fs::create_dir(&folder).unwrap();
    let missing = world.path.with_file_name("missing");
    let refused = async |path: &Path| open(&StoreUrl::file(path)).await.unwrap_err();
    assert!(matches!(refused(&folder).await, StoreError::Foreign(_)));
    assert!(matches!(refused(&missing).await, StoreError::Absent) && !missing.exists(), "nothing is created");
    assert!(matches!(create(&StoreUrl::file(&folder)).await, Err(StoreError::Exists)));
    std::fs::write(&world.path, &world.bytes).unwrap();
    assert!(
        matches!(create(&StoreUrl::file(&world.path)).await, Err(StoreError::Exists)),
        "an existing file is not replaced"
    );
    assert_eq!(std::fs::read(&world.path).unwrap(), world.bytes);
}
