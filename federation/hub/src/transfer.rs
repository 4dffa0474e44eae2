//! Copies between stores, and from a backup into a store.
//!
//! A copy can be interrupted at any point and repeated: until it is complete, the target contains [`INCOMING`], with which no hub
//! serves it. Revisions of the target are others than those of the source, so that it begins a new epoch: members receive
//! everything again.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail};
use hanse_store::{
    Change, Compare, Key, MAX_TRANSACTION_BYTES, MAX_TRANSACTION_PARTS, Outcome, Store, StoreError, StoreUrl,
    Transaction,
};

use crate::archive::{Archive, Record};
use crate::registry::{key, new_epoch, seconds};

/// What a copy is made of, while it is incomplete.
const INCOMING: [&str; 2] = ["meta", "incoming"];
/// Where the store was migrated to.
const MOVED: [&str; 2] = ["meta", "moved"];
/// The numbering of revisions, which is not copied.
const EPOCH: [&str; 2] = ["meta", "epoch"];

/// The result of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// Of the store, without its own records.
    pub entries: usize,
    /// An earlier run had completed it.
    pub was_complete: bool,
}

/// Receives the number of changes made so far, and of all.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Refuses a store that must not be served.
///
/// # Errors
/// When it contains an incomplete copy, was migrated to another, or fails.
pub async fn check_served(store: &dyn Store) -> anyhow::Result<()> {
    if let Some(entry) = store.read(&key(&INCOMING)?).await? {
        let from = String::from_utf8_lossy(&entry.value).into_owned();
        bail!("it contains an incomplete copy of {from}: repeat the command that began it");
    }
    if let Some(entry) = store.read(&key(&MOVED)?).await? {
        let to = String::from_utf8_lossy(&entry.value).into_owned();
        bail!("it was migrated: start the hub with --store '{to}'");
    }
    Ok(())
}

/// Copies a store into another, which must be absent, empty or an incomplete copy of the same, and marks it as migrated.
///
/// # Errors
/// When a store fails, the target contains something else, or the source changed meanwhile.
pub async fn migrate(from: &StoreUrl, to: &StoreUrl, progress: Progress<'_>) -> anyhow::Result<Copied> {
    if from == to {
        bail!("source and target are the same store");
    }
    let source = hanse_store::open(from).await.with_context(|| format!("open the source {from}"))?;
    if source.read(&key(&INCOMING)?).await?.is_some() {
        bail!("the source {from} is an incomplete copy itself: repeat the command that began it");
    }
    let (moved, target_name) = (key(&MOVED)?, to.to_string());
    if let Some(entry) = source.read(&moved).await?
        && entry.value != target_name.as_bytes()
    {
        let other = String::from_utf8_lossy(&entry.value).into_owned();
        bail!("the source {from} was migrated to {other} already");
    }
    let archive = Archive::take(&*source, now()).await.context("read the source")?;
    if copied(&archive) == 0 {
        bail!("the source {from} is empty");
    }
    let target = open_or_create(to).await?;
    let was_complete = !fill(&*target, &archive, &format!("the store {from}"), progress).await?;
    let again = Archive::take(&*source, now()).await.context("read the source")?;
    if again.digest(is_copied) != archive.digest(is_copied) {
        bail!("the source {from} changed while it was copied: stop every hub that serves it, and repeat the command");
    }
    if !was_complete {
        finish(&*target, &archive).await?;
    }
    // From now on no hub serves the source: both would change.
    source.commit(Transaction::default().put(moved, target_name)).await.context("mark the source as migrated")?;
    Ok(Copied { entries: copied(&archive), was_complete })
}

/// Copies an archive into a store, which must be absent, empty or an incomplete copy of the same archive.
///
/// # Errors
/// When the store fails, or contains something else.
pub async fn restore(archive: &Archive, to: &StoreUrl, progress: Progress<'_>) -> anyhow::Result<Copied> {
    let target = open_or_create(to).await?;
    let origin = format!("the backup of revision {} ({})", archive.revision, archive.digest(is_copied).to_hex());
    let was_complete = !fill(&*target, archive, &origin, progress).await?;
    if !was_complete {
        finish(&*target, archive).await?;
    }
    Ok(Copied { entries: copied(archive), was_complete })
}

async fn open_or_create(url: &StoreUrl) -> anyhow::Result<std::sync::Arc<dyn Store>> {
    match hanse_store::open(url).await {
        Err(StoreError::Absent) => hanse_store::create(url).await.with_context(|| format!("create the target {url}")),
        opened => opened.with_context(|| format!("open the target {url}")),
    }
}

/// Whether a copy includes an entry: all but the records of copies and of running processes, and the epoch.
fn is_copied(key: &Key) -> bool {
    let segments: Vec<&str> = key.segments().collect();
    // Of the processes that use this store now.
    let of_processes = matches!(segments.first(), Some(&("hub" | "instance")));
    !of_processes && ![INCOMING, MOVED, EPOCH].iter().any(|it| segments == it)
}

fn copied(archive: &Archive) -> usize {
    archive.entries.iter().filter(|it| is_copied(&it.key)).count()
}

fn now() -> u64 {
    seconds(std::time::SystemTime::now())
}

/// Makes the target contain all entries of the archive that have no lease, and verifies it. False if the target is a complete copy
/// already.
async fn fill(target: &dyn Store, archive: &Archive, origin: &str, progress: Progress<'_>) -> anyhow::Result<bool> {
    let marker = key(&INCOMING)?;
    let existing = Archive::take(target, now()).await.context("read the target")?;
    match existing.entries.iter().find(|it| it.key == marker) {
        Some(record) if record.value == origin.as_bytes() => {}
        Some(record) => {
            let other = String::from_utf8_lossy(&record.value).into_owned();
            bail!("the target contains an incomplete copy of {other}: repeat that, or choose an empty target");
        }
        None if existing.entries.is_empty() => {
            let begin = Transaction::default().when(Compare::Absent(marker.clone())).put(marker, origin.to_owned());
            if target.commit(begin).await.context("write to the target")? == Outcome::Conflict {
                bail!("another process copies to the target at the same time");
            }
        }
        None if existing.digest(is_copied) == archive.digest(is_copied) => return Ok(false),
        None => bail!("the target is not empty: choose another"),
    }
    let has: BTreeMap<&Key, &Record> = existing.entries.iter().map(|it| (&it.key, it)).collect();
    let wanted: BTreeSet<&Key> = permanent(archive).map(|it| &it.key).collect();
    let surplus = existing.entries.iter().filter(|it| is_copied(&it.key) && !wanted.contains(&it.key));
    let mut changes: Vec<Change> = surplus.map(|it| Change::Delete(it.key.clone())).collect();
    let missing = permanent(archive).filter(|it| has.get(&it.key).is_none_or(|had| had.value != it.value));
    changes.extend(missing.map(|it| Change::Put { key: it.key.clone(), value: it.value.clone(), lease: None }));
    commit_all(target, changes, progress).await?;
    let verified = Archive::take(target, now()).await.context("read the target")?;
    if verified.digest(is_copied) != archive.digest(is_copied) {
        bail!("the target differs from the source after the copy: another process writes to it");
    }
    Ok(true)
}

fn permanent(archive: &Archive) -> impl Iterator<Item = &Record> {
    archive.entries.iter().filter(|it| it.lease.is_none() && is_copied(&it.key))
}

/// Copies the entries with leases, which end soon if no hub renews them, and removes the marker.
async fn finish(target: &dyn Store, archive: &Archive) -> anyhow::Result<()> {
    let mut leases = Vec::with_capacity(archive.leases.len());
    for time_to_live in &archive.leases {
        leases.push(target.grant_lease(*time_to_live).await.context("grant a lease in the target")?);
    }
    let leased = archive.entries.iter().filter(|it| is_copied(&it.key)).filter_map(|it| {
        let lease = *leases.get(it.lease?)?;
        Some(Change::Put { key: it.key.clone(), value: it.value.clone(), lease: Some(lease) })
    });
    commit_all(target, leased.collect(), &mut |_, _| ()).await?;
    let end = Transaction::default().delete(key(&INCOMING)?).put(key(&EPOCH)?, new_epoch()?.to_string());
    target.commit(end).await.context("write to the target")?;
    Ok(())
}

/// In as few transactions as possible.
async fn commit_all(target: &dyn Store, changes: Vec<Change>, progress: Progress<'_>) -> anyhow::Result<()> {
    let (all, mut made, mut bytes) = (changes.len(), 0, 0);
    let mut transaction = Transaction::default();
    for change in changes {
        let size = change.size();
        if transaction.changes.len() == MAX_TRANSACTION_PARTS || bytes + size > MAX_TRANSACTION_BYTES {
            made += transaction.changes.len();
            target.commit(std::mem::take(&mut transaction)).await.context("write to the target")?;
            progress(made, all);
            bytes = 0;
        }
        bytes += size;
        transaction.changes.push(change);
    }
    if !transaction.changes.is_empty() {
        target.commit(transaction).await.context("write to the target")?;
    }
    progress(all, all);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hanse_store::{Prefix, create, in_memory, open};

    use super::*;

    async fn source() -> std::sync::Arc<dyn Store> {
        let store = in_memory();
        for number in 0..400 {
            let put =
                Transaction::default().put(key(&["object", "x", &number.to_string()]).unwrap(), vec![7; number * 20]);
            store.commit(put).await.unwrap();
        }
        let lease = store.grant_lease(Duration::from_secs(30)).await.unwrap();
        let live = Transaction::default().put_with_lease(key(&["lease", "a"]).unwrap(), "", lease);
        store.commit(live.put(key(&EPOCH).unwrap(), "5")).await.unwrap();
        store
    }

    #[tokio::test]
    async fn restores_everything_once_with_leases_and_a_new_epoch() {
        let folder = tempfile::tempdir().unwrap();
        let url = StoreUrl::file(folder.path().join("store"));
        let archive = Archive::take(&*source().await, 0).await.unwrap();
        let mut seen = Vec::new();
        let copied = restore(&archive, &url, &mut |made, all| seen.push((made, all))).await.unwrap();
        assert_eq!(copied, Copied { entries: 401, was_complete: false });
        assert!(seen.len() > 3 && seen.last() == Some(&(400, 400)) && seen.is_sorted(), "{seen:?}");
        let target = reopen(&url).await;
        check_served(&*target).await.unwrap();
        let entry = target.read(&key(&["lease", "a"]).unwrap()).await.unwrap().unwrap();
        assert_eq!(target.time_to_live(entry.lease.unwrap()).await.unwrap(), Duration::from_secs(30));
        let epoch = target.read(&key(&EPOCH).unwrap()).await.unwrap().unwrap().value;
        assert!(epoch != "5" && !epoch.is_empty());
        drop(target);
        let _ = reopen(&url).await;
        let again = retry(async || restore(&archive, &url, &mut |_, _| ()).await).await.unwrap();
        assert!(again.was_complete);
        let mut other = archive.clone();
        other.entries.pop();
        let error = retry(async || restore(&other, &url, &mut |_, _| ()).await).await.unwrap_err().to_string();
        assert!(error.contains("is not empty"), "{error}");
    }

    /// A file is closed a moment after its store.
    async fn retry<T>(attempt: impl AsyncFn() -> anyhow::Result<T>) -> anyhow::Result<T> {
        loop {
            match attempt().await {
                Err(error) if format!("{error:#}").contains("in use") => {
                    tokio::time::sleep(Duration::from_millis(10)).await
                }
                outcome => return outcome,
            }
        }
    }

    async fn reopen(url: &StoreUrl) -> std::sync::Arc<dyn Store> {
        retry(async || Ok(open(url).await?)).await.unwrap()
    }

    #[tokio::test]
    async fn continues_an_interrupted_copy_and_refuses_to_serve_it() {
        let archive = Archive::take(&*source().await, 0).await.unwrap();
        let target = in_memory();
        let mut part = archive.clone();
        part.entries.truncate(150);
        // What an interrupted copy leaves: some entries, one of them older, one that is gone since.
        fill(&*target, &part, "x", &mut |_, _| ()).await.unwrap();
        let stale = Transaction::default().put(key(&["object", "x", "1"]).unwrap(), "old");
        target.commit(stale.put(key(&["object", "x", "gone"]).unwrap(), "old")).await.unwrap();
        let error = check_served(&*target).await.unwrap_err().to_string();
        assert!(error.contains("incomplete copy of x"), "{error}");
        let error = fill(&*target, &archive, "y", &mut |_, _| ()).await.unwrap_err().to_string();
        assert!(error.contains("incomplete copy of x"), "{error}");
        assert!(fill(&*target, &archive, "x", &mut |_, _| ()).await.unwrap());
        finish(&*target, &archive).await.unwrap();
        check_served(&*target).await.unwrap();
        let everything = target.list(&Prefix::new::<&str>(&[]).unwrap()).await.unwrap();
        assert_eq!(everything.entries.len(), archive.entries.len());
        assert!(!fill(&*target, &archive, "x", &mut |_, _| ()).await.unwrap(), "complete");
    }

    #[tokio::test]
    async fn migrates_a_file_and_marks_it() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to, third] = ["a", "b", "c"].map(|it| StoreUrl::file(folder.path().join(it)));
        assert!(format!("{:#}", migrate(&from, &to, &mut |_, _| ()).await.unwrap_err()).contains("does not exist"));
        restore(&Archive::take(&*source().await, 0).await.unwrap(), &from, &mut |_, _| ()).await.unwrap();
        let made = retry(async || migrate(&from, &to, &mut |_, _| ()).await).await.unwrap();
        assert_eq!(made, Copied { entries: 401, was_complete: false });
        assert!(retry(async || migrate(&from, &to, &mut |_, _| ()).await).await.unwrap().was_complete, "repeated");
        let error = retry(async || migrate(&from, &third, &mut |_, _| ()).await).await.unwrap_err().to_string();
        assert!(error.contains("was migrated to") && error.contains("already"), "{error}");
        let error = check_served(&*reopen(&from).await).await.unwrap_err().to_string();
        assert!(error.contains(&format!("--store '{to}'")), "{error}");
        check_served(&*reopen(&to).await).await.unwrap();
        // And back, to a new file.
        retry(async || migrate(&to, &third, &mut |_, _| ()).await).await.unwrap();
        check_served(&*reopen(&third).await).await.unwrap();
        let error = retry(async || migrate(&third, &third, &mut |_, _| ()).await).await.unwrap_err().to_string();
        assert!(error.contains("the same store"), "{error}");
        drop(create(&StoreUrl::file(folder.path().join("d"))).await.unwrap());
        let empty = StoreUrl::file(folder.path().join("d"));
        let error = retry(async || migrate(&empty, &to, &mut |_, _| ()).await).await.unwrap_err().to_string();
        assert!(error.contains("is empty"), "{error}");
    }
}
