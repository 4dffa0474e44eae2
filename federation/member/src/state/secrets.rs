//! The Secrets of a state, with their contents in memory.
//!
//! A thread of its own talks to the API server, so that callers of all kinds can wait for a write. A write names the version that was read:
//! where another process was faster, the Secret is read again, and the write is repeated only if its files are as they were. A serving
//! process follows the Secrets, since commands in any pod change them.
//!
//! All Secrets of a state contain the same random `id`. One that was deleted and created again has none: what it contained is then not
//! known to be absent, such as the revocation of a node. A serving process writes it again from memory; a process that starts refuses it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::future::try_join_all;
use futures::{Stream, StreamExt as _};
use hanse_identity::token;
use hanse_kubernetes::{ANSWER_WITHIN, Access, answered, message};
use hanse_runtime::health::Writes;
use hanse_runtime::retry::Backoff;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams, WatchEvent, WatchParams};
use kube::{Api, Client};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::layout::{MAX_SECRET_BYTES, SecretName};

/// The key with the id of the state.
const ID: &str = "id";
/// Writes that wait: each is of a blocked caller.
const WAITING: usize = 64;
/// How often a write is repeated because another process has changed other files of the Secret.
const ATTEMPTS: usize = 5;
/// A write waits for those before it, and for its own attempts.
const WRITTEN_WITHIN: Duration = Duration::from_secs(60);
/// The interval between checks whether a Secret can be written again.
const CHECK_EVERY: Duration = Duration::from_secs(10);
/// The longest time until the API server ends a watch, in seconds: at most 295 are accepted.
const WATCH_SECONDS: u32 = 290;
/// The API server sends a bookmark about once a minute. A connection without any event for longer is dead.
const SILENCE: Duration = Duration::from_secs(90);
/// The names of the state in reports of failed writes.
const WRITTEN_AS: &str = "the Secret of the member's state";
const FOLLOWED_AS: &str = "changes of the Secret of the member's state";

type Bytes = Zeroizing<Vec<u8>>;
type Answer = SyncSender<io::Result<()>>;
/// A file, and its content; `None`: it is removed.
pub type FileChange = (String, Option<Bytes>);

enum Command {
    Write { changes: Vec<FileChange>, since: Option<u64>, answer: Answer },
    Refresh(Answer),
}

/// The Secrets of a state.
#[derive(Debug)]
pub struct Secrets {
    name: SecretName,
    mirror: Arc<Mutex<Mirror>>,
    commands: mpsc::Sender<Command>,
}

/// What is known of the Secrets, by name.
#[derive(Debug, Default)]
struct Mirror {
    secrets: BTreeMap<String, Mirrored>,
    /// The number of changes.
    changes: u64,
}

#[derive(Debug, Default)]
struct Mirrored {
    version: String,
    entries: BTreeMap<String, Entry>,
}

/// The last known content of a key.
struct Entry {
    /// `None`: it was removed.
    bytes: Option<Bytes>,
    /// The number of its last change.
    at: u64,
    /// This process has made that change.
    is_own: bool,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("at", &self.at).field("is_own", &self.is_own).finish_non_exhaustive()
    }
}

fn locked(mirror: &Mutex<Mirror>) -> MutexGuard<'_, Mirror> {
    mirror.lock().unwrap_or_else(PoisonError::into_inner)
}

fn changed_by_other(secret: &str, key: &str) -> io::Error {
    let message = format!("another process has changed {key} of Secret {secret} at the same time: try again");
    io::Error::new(io::ErrorKind::ResourceBusy, message)
}

impl Mirrored {
    fn bytes(&self, key: &str) -> Option<&Bytes> {
        self.entries.get(key)?.bytes.as_ref()
    }

    fn at(&self, key: &str) -> Option<(u64, bool)> {
        self.entries.get(key).map(|it| (it.at, it.is_own))
    }

    fn id(&self) -> Option<&Bytes> {
        self.bytes(ID)
    }
}

impl Mirror {
    /// Takes over what the API server has, unless something newer is known. `own`: the keys that this process has just written.
    fn apply(&mut self, name: &str, secret: Secret, own: &BTreeSet<&str>) {
        let version = secret.metadata.resource_version.unwrap_or_default();
        let known = self.secrets.entry(name.to_owned()).or_default();
        let number = |version: &str| version.parse::<u64>().ok();
        if let (Some(new), Some(known)) = (number(&version), number(&known.version))
            && new < known
        {
            return;
        }
        known.version = version;
        let mut data = secret.data.unwrap_or_default();
        let keys: BTreeSet<String> = known.entries.keys().chain(data.keys()).cloned().collect();
        for key in keys {
            let bytes = data.remove(&key).map(|ByteString(bytes)| Zeroizing::new(bytes));
            if known.entries.get(&key).map_or(bytes.is_none(), |entry| entry.bytes == bytes) {
                continue;
            }
            self.changes += 1;
            let is_own = own.contains(&*key);
            known.entries.insert(key, Entry { bytes, at: self.changes, is_own });
        }
    }
}

impl Secrets {
    /// Reads the Secrets. `leads`: this process serves: it initialises them, checks that it can write them, and follows changes of others;
    /// failures are reported there. Blocks the thread.
    ///
    /// # Errors
    /// When a Secret does not exist, cannot be read or written, or was replaced.
    pub fn open(access: &Access, name: &SecretName, leads: Option<Writes>) -> anyhow::Result<Self> {
        let mirror = Arc::new(Mutex::new(Mirror::default()));
        let (commands, received) = mpsc::channel(WAITING);
        let (opened, result) = sync_channel(1);
        let (access, of) = (access.clone(), name.clone());
        let of_thread = Arc::clone(&mirror);
        let run = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                // The receiver waits.
                Err(error) => return drop(opened.send(Err(anyhow::Error::new(error)))),
            };
            runtime.block_on(async {
                let worker = match Worker::start(&access, of, of_thread, leads).await {
                    Ok(worker) => worker,
                    Err(error) => return drop(opened.send(Err(error))),
                };
                if opened.send(Ok(())).is_ok() {
                    worker.run(received).await;
                }
            });
        };
        std::thread::Builder::new().name("state".to_owned()).spawn(run).context("start the thread of the state")?;
        result.recv().context("the thread of the state has ended")??;
        Ok(Self { name: name.clone(), mirror, commands })
    }

    pub fn read(&self, file: &str) -> io::Result<Option<Bytes>> {
        let (secret, key) = self.name.place(file);
        let mirror = locked(&self.mirror);
        let secret = mirror.secrets.get(&secret).ok_or(io::ErrorKind::NotFound)?;
        Ok(secret.bytes(&key).cloned())
    }

    /// The number of the last change of a file; `None` if it does not exist.
    pub fn version(&self, file: &str) -> io::Result<Option<u64>> {
        let (secret, key) = self.name.place(file);
        let mirror = locked(&self.mirror);
        let secret = mirror.secrets.get(&secret).ok_or(io::ErrorKind::NotFound)?;
        Ok(secret.entries.get(&key).filter(|it| it.bytes.is_some()).map(|it| it.at))
    }

    /// The names of the files in a folder.
    pub fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let (secrets, prefix) = self.name.places(folder);
        let mirror = locked(&self.mirror);
        let mut names = Vec::new();
        for secret in secrets {
            let secret = mirror.secrets.get(&secret).ok_or(io::ErrorKind::NotFound)?;
            let existing = secret.entries.iter().filter(|(key, it)| it.bytes.is_some() && *key != ID);
            names.extend(existing.filter_map(|(key, _)| key.strip_prefix(prefix)).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// The number of changes that are known.
    pub fn now(&self) -> u64 {
        locked(&self.mirror).changes
    }

    /// Writes files, all of one Secret at once. `since`: unless another process has changed one of them after this number of changes.
    pub fn write(&self, changes: Vec<FileChange>, since: Option<u64>) -> io::Result<()> {
        self.command(|answer| Command::Write { changes, since, answer })
    }

    /// Reads the Secrets again.
    pub fn refresh(&self) -> io::Result<()> {
        self.command(Command::Refresh)
    }

    fn command(&self, command: impl FnOnce(Answer) -> Command) -> io::Result<()> {
        let (answer, answered) = sync_channel(1);
        let ended = || io::Error::other("the thread of the state has ended");
        self.commands.try_send(command(answer)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => io::Error::from(io::ErrorKind::WouldBlock),
            mpsc::error::TrySendError::Closed(_) => ended(),
        })?;
        answered.recv_timeout(WRITTEN_WITHIN).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

/// The part that talks to the API server.
#[derive(Clone)]
struct Worker {
    client: Client,
    name: SecretName,
    mirror: Arc<Mutex<Mirror>>,
    writes: Option<Writes>,
    /// Why Secrets cannot be written or followed, by name.
    unwritable: Arc<Mutex<BTreeMap<String, String>>>,
    unfollowed: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Worker {
    async fn start(
        access: &Access,
        name: SecretName,
        mirror: Arc<Mutex<Mirror>>,
        writes: Option<Writes>,
    ) -> anyhow::Result<Self> {
        let client = access.client().await?;
        let leads = writes.is_some();
        let this = Self { client, name, mirror, writes, unwritable: Arc::default(), unfollowed: Arc::default() };
        this.read_all().await?;
        if leads {
            this.identify().await?;
            for secret in this.name.secrets() {
                tokio::spawn(this.clone().follow(secret));
            }
        }
        Ok(this)
    }

    fn api(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.name.namespace)
    }

    async fn read_all(&self) -> anyhow::Result<()> {
        try_join_all(self.name.secrets().into_iter().map(|secret| async move { self.read(&secret).await })).await?;
        Ok(())
    }

    async fn read(&self, secret: &str) -> anyhow::Result<()> {
        let (api, of) = (self.api(), &self.name.namespace);
        let read = answered(api.get(secret)).await.with_context(|| format!("read Secret {of}/{secret}"))?;
        locked(&self.mirror).apply(secret, read, &BTreeSet::new());
        Ok(())
    }

    /// Writes the id of a new state into all Secrets, and checks that all have it, and that they can be written.
    async fn identify(&self) -> anyhow::Result<()> {
        let id = locked(&self.mirror).secrets.get(&self.name.name).and_then(Mirrored::id).cloned();
        let is_new = id.is_none();
        let id = match id {
            Some(id) => id,
            None => {
                let random: [u8; 16] = token::random().map_err(anyhow::Error::msg)?;
                Zeroizing::new(random.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into_bytes())
            }
        };
        let all = self.name.secrets();
        if !is_new {
            let mirror = locked(&self.mirror);
            let has_other = |secret: &&String| mirror.secrets.get(*secret).and_then(Mirrored::id) != Some(&id);
            if let Some(other) = all.iter().find(has_other) {
                let SecretName { namespace, name } = &self.name;
                bail!(
                    "Secret {namespace}/{other} does not belong to the state in Secret {namespace}/{name}: it was created again, and the \
                     keys and revocations in it are missing. Restore it; or remove the key {ID} of Secret {namespace}/{name} to go on \
                     without them, and revoke nodes again that were revoked"
                );
            }
        }
        // Without a change, too: it needs the same right. The first Secret is last: what fails begins again.
        let write = |secret: String| {
            let change = is_new.then(|| (ID.to_owned(), Some(id.clone())));
            async move {
                let written = self.patch(&secret, change.into_iter().collect(), None).await;
                written.with_context(|| format!("write Secret {}/{secret}", self.name.namespace))
            }
        };
        let (first, others) = all.split_last().context("a state has Secrets")?;
        try_join_all(others.iter().cloned().map(write)).await?;
        write(first.clone()).await
    }

    async fn run(self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let is_failing = !self.unwritable.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
            let command = tokio::select! {
                command = commands.recv() => command,
                () = tokio::time::sleep(CHECK_EVERY), if is_failing => {
                    self.check().await;
                    continue;
                }
            };
            match command {
                None => return,
                // A caller that does not wait any more needs no answer.
                Some(Command::Write { changes, since, answer }) => drop(answer.send(self.write(changes, since).await)),
                Some(Command::Refresh(answer)) => {
                    let read = self.read_all().await.map_err(|error| io::Error::other(format!("{error:#}")));
                    drop(answer.send(read));
                }
            }
        }
    }

    /// Finds out whether Secrets can be written again.
    async fn check(&self) {
        let failing: Vec<String> =
            self.unwritable.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        for secret in failing {
            // Failures are recorded.
            let _ = self.patch(&secret, Vec::new(), None).await;
        }
    }

    async fn write(&self, changes: Vec<FileChange>, since: Option<u64>) -> io::Result<()> {
        let mut secrets: BTreeMap<String, Vec<(String, Option<Bytes>)>> = BTreeMap::new();
        for (file, bytes) in changes {
            let (secret, key) = self.name.place(&file);
            secrets.entry(secret).or_default().push((key, bytes));
        }
        for (secret, keys) in secrets {
            self.patch(&secret, keys, since).await?;
        }
        Ok(())
    }

    /// Writes keys of a Secret.
    async fn patch(&self, secret: &str, keys: Vec<(String, Option<Bytes>)>, since: Option<u64>) -> io::Result<()> {
        let own: BTreeSet<&str> = keys.iter().map(|(key, _)| &**key).collect();
        for _ in 0..ATTEMPTS {
            let (patch, before) = self.prepare(secret, &keys, since)?;
            let (api, parameters) = (self.api(), PatchParams::default());
            let sent = tokio::time::timeout(ANSWER_WITHIN, api.patch(secret, &parameters, &Patch::Merge(patch))).await;
            let error = match sent {
                Ok(Ok(written)) => {
                    locked(&self.mirror).apply(secret, written, &own);
                    self.note(&self.unwritable, WRITTEN_AS, secret, None);
                    return Ok(());
                }
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {
                    // It may have been created again: what it contained stays known.
                    let read = answered(api.get(secret)).await;
                    let taken = async { self.take(secret, read?).await }.await;
                    taken.map_err(|error| io::Error::other(format!("{error:#}")))?;
                    let mirror = locked(&self.mirror);
                    let now = mirror.secrets.get(secret);
                    let is_changed = |(key, before): &(&str, _)| now.and_then(|it| it.at(key)) != *before;
                    if let Some((key, _)) = before.iter().find(|it| is_changed(it)) {
                        return Err(changed_by_other(secret, key));
                    }
                    continue;
                }
                Ok(Err(error)) => message(error),
                Err(_) => format!("no answer of the API server within {} s", ANSWER_WITHIN.as_secs()),
            };
            self.note(&self.unwritable, WRITTEN_AS, secret, Some(error.clone()));
            return Err(io::Error::other(error));
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("other processes change Secret {secret} all the time")))
    }

    /// The patch that writes keys, and the last known changes of these.
    #[expect(clippy::type_complexity, reason = "the change of each key, as the mirror has it")]
    fn prepare<'a>(
        &self,
        secret: &str,
        keys: &'a [(String, Option<Bytes>)],
        since: Option<u64>,
    ) -> io::Result<(Value, Vec<(&'a str, Option<(u64, bool)>)>)> {
        let mirror = locked(&self.mirror);
        let known = mirror.secrets.get(secret).ok_or(io::ErrorKind::NotFound)?;
        let before: Vec<_> = keys.iter().map(|(key, _)| (&**key, known.at(key))).collect();
        let is_newer = |(_, at): &&(&str, Option<(u64, bool)>)| {
            since.is_some_and(|since| at.is_some_and(|(at, is_own)| at > since && !is_own))
        };
        if let Some((key, _)) = before.iter().find(is_newer) {
            return Err(changed_by_other(secret, key));
        }
        let length = |bytes: Option<&Bytes>| bytes.map_or(0, |it| it.len());
        let total: usize = known.entries.values().map(|it| length(it.bytes.as_ref())).sum();
        let added: usize = keys.iter().map(|(_, bytes)| length(bytes.as_ref())).sum();
        let removed: usize = keys.iter().map(|(key, _)| length(known.bytes(key))).sum();
        if added > removed && total + added - removed > MAX_SECRET_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "Secret {secret} would have more than 1 MiB: revoke tokens that are not used, or see deploy/README.md for the \
                     number of nodes"
                ),
            ));
        }
        let data: Map<String, Value> = keys
            .iter()
            .map(|(key, bytes)| (key.clone(), json!(bytes.as_ref().map(|it| ByteString(it.to_vec())))))
            .collect();
        let mut patch = json!({"metadata": {"resourceVersion": known.version}});
        if !data.is_empty() {
            patch["data"] = Value::Object(data);
        }
        Ok((patch, before))
    }

    fn note(
        &self,
        failing: &Mutex<BTreeMap<String, String>>,
        reported_as: &'static str,
        secret: &str,
        error: Option<String>,
    ) {
        let mut failing = failing.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            Some(error) => drop(failing.insert(secret.to_owned(), error)),
            None => drop(failing.remove(secret)),
        }
        let Some(writes) = &self.writes else { return };
        writes.note(reported_as, &failing.values().next().map_or(Ok(()), |error| Err(io::Error::other(error.clone()))));
    }

    /// Takes over what other processes write to a Secret.
    async fn follow(self, secret: String) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let mut received = 0;
            if let Err(error) = self.watch(&secret, &mut received).await {
                self.note(&self.unfollowed, FOLLOWED_AS, &secret, Some(format!("{error:#}")));
            }
            // A watch that ends again and again without an event is not tried in a loop.
            if received > 0 {
                backoff.reset();
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// Follows a Secret from its current version, until the watch ends. Counts what it receives.
    async fn watch(&self, secret: &str, received: &mut usize) -> anyhow::Result<()> {
        let api = self.api();
        let read = answered(api.get(secret)).await.with_context(|| format!("read Secret {secret}"))?;
        let version = read.metadata.resource_version.clone().unwrap_or_default();
        self.take(secret, read).await?;
        let only = WatchParams::default().fields(&format!("metadata.name={secret}")).timeout(WATCH_SECONDS);
        let events = answered(api.watch(&only, &version)).await.with_context(|| format!("watch Secret {secret}"))?;
        self.note(&self.unfollowed, FOLLOWED_AS, secret, None);
        self.take_events(secret, events, received).await
    }

    async fn take_events(
        &self,
        secret: &str,
        events: impl Stream<Item = kube::Result<WatchEvent<Secret>>>,
        received: &mut usize,
    ) -> anyhow::Result<()> {
        let mut events = std::pin::pin!(events);
        // After a silence, the Secret is read again: what was written meanwhile may be the revocation of a node.
        while let Ok(Some(event)) = tokio::time::timeout(SILENCE, events.next()).await {
            match event.map_err(|error| anyhow::anyhow!(message(error)))? {
                WatchEvent::Added(now) | WatchEvent::Modified(now) => {
                    self.take(secret, now).await?;
                    *received += 1;
                }
                WatchEvent::Bookmark(_) => *received += 1,
                WatchEvent::Deleted(_) => {
                    bail!("Secret {secret} was deleted: create it again, and its content is written again")
                }
                // Its version is too old: it is read again.
                WatchEvent::Error(status) if status.code == 410 => return Ok(()),
                WatchEvent::Error(status) => bail!("{}", status.message),
            }
        }
        Ok(())
    }

    /// Takes over a Secret. One that was created again gets its content back.
    async fn take(&self, secret: &str, now: Secret) -> anyhow::Result<()> {
        let id_now = now.data.as_ref().and_then(|data| data.get(ID)).map(|ByteString(bytes)| bytes.as_slice());
        let missing = {
            let mut mirror = locked(&self.mirror);
            let known = mirror.secrets.get(secret);
            let id = known.and_then(Mirrored::id).map(|id| id.as_slice());
            if id == id_now {
                mirror.apply(secret, now, &BTreeSet::new());
                return Ok(());
            }
            let entries = known.into_iter().flat_map(|it| &it.entries);
            entries.filter_map(|(key, it)| Some((key.clone(), ByteString(it.bytes.as_ref()?.to_vec())))).collect()
        };
        anyhow::ensure!(self.writes.is_some(), "Secret {secret} was created again, and its content is missing");
        tracing::error!(secret, "Secret of the state was created again: its content is written again");
        let missing: BTreeMap<String, ByteString> = missing;
        let patch = json!({"metadata": {"resourceVersion": now.metadata.resource_version}, "data": missing});
        let api = self.api();
        let parameters = PatchParams::default();
        let written = answered(api.patch(secret, &parameters, &Patch::Merge(patch))).await;
        let written = written.with_context(|| format!("write Secret {secret} again"))?;
        locked(&self.mirror).apply(secret, written, &BTreeSet::new());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures::stream::{iter, pending};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    const SECRET: &str = r#"{"apiVersion":"v1","kind":"Secret","metadata":{"name":"m","resourceVersion":"7"}}"#;

    fn worker(server: &str) -> Worker {
        hanse_identity::tls::install_provider();
        let client = Client::try_from(kube::Config::new(server.parse().expect("an address"))).expect("a client");
        let name = SecretName { namespace: "hanse".to_owned(), name: "m".to_owned() };
        Worker {
            client,
            name,
            mirror: Arc::default(),
            writes: None,
            unwritable: Arc::default(),
            unfollowed: Arc::default(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silent_watch_ends_so_that_the_secret_is_read_again() {
        let worker = worker("http://127.0.0.1:1");
        let read: Secret = serde_json::from_str(SECRET).expect("a Secret");
        let began = tokio::time::Instant::now();
        let mut received = 0;
        let events = iter([Ok(WatchEvent::Modified(read))]).chain(pending());
        let ended = tokio::time::timeout(2 * SILENCE, worker.take_events("m", events, &mut received)).await;
        ended.expect("it ends").expect("it is no failure");
        assert_eq!((received, began.elapsed()), (1, SILENCE));
    }

    #[tokio::test]
    async fn watch_that_ends_at_once_is_not_repeated_in_a_loop() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let worker = worker(&format!("http://{}", listener.local_addr().expect("an address")));
        let (watched, mut watches) = mpsc::channel(3);
        let serve = async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.expect("a request"));
                }
                let is_watch = String::from_utf8_lossy(&request).contains("watch=");
                if is_watch {
                    watched.send(std::time::Instant::now()).await.expect("the test waits");
                }
                // Of a watch, nothing.
                let body = if is_watch { "" } else { SECRET };
                let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n";
                let answer = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.expect("sent");
            }
        };
        let three = async {
            let mut next = async || watches.recv().await.expect("the server runs");
            next().await;
            // The third one comes after a delay of at least 200 ms, however slow this machine is.
            let second = next().await;
            next().await - second
        };
        let delay = tokio::select! {
            delay = three => delay,
            () = worker.clone().follow("m".to_owned()) => unreachable!("it never ends"),
            () = serve => unreachable!("it never ends"),
        };
        assert!(delay >= Duration::from_millis(150), "{delay:?}");
        let unfollowed = worker.unfollowed.lock().expect("no thread has panicked");
        assert!(unfollowed.is_empty(), "{unfollowed:?}");
    }
}
