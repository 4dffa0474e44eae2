//! One etcd for any number of API servers, each with a prefix of its own.
//!
//! It listens on a socket in the file system, so that API servers in all network namespaces reach it, and nothing else does.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::programs;
use super::scratch::Scratch;
use crate::probe;
use crate::process::Process;

/// How long etcd may take to serve. A loaded machine takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(30);
/// etcd 3.4 derives the name of its socket from a host and a port. The file is in its working directory.
const SOCKET: &str = "localhost:2379";
const PEERS: &str = "localhost:2380";

/// A running etcd; dropped, it is killed and its data removed.
#[derive(Debug)]
pub struct Etcd {
    process: Mutex<Option<Process>>,
    directory: Scratch,
}

impl Etcd {
    /// # Errors
    /// When etcd is missing, or does not serve.
    pub fn start() -> anyhow::Result<Arc<Self>> {
        let etcd = Self { process: Mutex::new(None), directory: Scratch::create("etcd")? };
        etcd.start_again()?;
        Ok(Arc::new(etcd))
    }

    /// Starts it with the data that it had.
    ///
    /// # Errors
    /// When it runs, or does not serve.
    pub fn start_again(&self) -> anyhow::Result<()> {
        let mut slot = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(slot.is_none(), "etcd is running already");
        let directory = self.directory.path();
        // A process that was killed leaves its sockets, and etcd does not bind them again.
        for socket in [SOCKET, PEERS] {
            match std::fs::remove_file(directory.join(socket)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context("remove the socket of etcd");
                }
                _ => {}
            }
        }
        let mut command = Command::new(programs::etcd()?);
        command.current_dir(directory).args(["--name=test", "--data-dir=data", "--logger=zap"]);
        command.args(["--listen-client-urls", &format!("unix://{SOCKET}")]);
        command.args(["--advertise-client-urls", &format!("unix://{SOCKET}")]);
        // Its only peer is itself.
        let peers = format!("unix://{PEERS}");
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.arg(format!("--initial-cluster=test={peers}"));
        // No test writes 8 GiB; 2 GiB, the default, could stop one that writes for long.
        command.arg("--quota-backend-bytes=8589934592");
        let log = directory.join("etcd.log");
        let mut process = Process::start_bound(command, &log).context("start etcd")?;
        let served = probe::until(PATIENCE, || process.has_ended() || self.revision().is_ok());
        if served.is_none() || process.has_ended() {
            bail!("etcd does not serve:\n{}", process.log());
        }
        *slot = Some(process);
        Ok(())
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&self) -> anyhow::Result<()> {
        let mut slot = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        slot.take().context("etcd is not running")?.kill().context("kill etcd")?;
        Ok(())
    }

    /// The URL for an API server.
    pub fn url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join(SOCKET)
    }

    /// The newest revision.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub fn revision(&self) -> anyhow::Result<u64> {
        let answer = self.call("kv/range", &json!({ "key": "AA==" }))?;
        let revision = answer["header"]["revision"].as_str().and_then(|text| text.parse().ok());
        revision.with_context(|| format!("etcd answered without a revision: {answer}"))
    }

    /// Compacts up to the newest revision, of all prefixes: older ones can no longer be read or watched.
    ///
    /// An API server answers from its cache for as long as it runs; after a restart, it answers 410 (Gone) to those who resume a
    /// watch from before.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub fn compact(&self) -> anyhow::Result<u64> {
        let revision = self.revision()?;
        self.call("kv/compaction", &json!({ "revision": revision.to_string(), "physical": true }))?;
        Ok(revision)
    }

    /// The value of a key.
    ///
    /// # Errors
    /// When etcd does not answer, or has no such key.
    pub fn read(&self, key: &str) -> anyhow::Result<Vec<u8>> {
        let answer = self.call("kv/range", &json!({ "key": STANDARD.encode(key) }))?;
        let value = answer["kvs"][0]["value"].as_str().with_context(|| format!("etcd has no key {key}"))?;
        STANDARD.decode(value).with_context(|| format!("read the value of {key}"))
    }

    /// Writes up to 128 keys in one transaction.
    ///
    /// # Errors
    /// When etcd does not answer, or refuses.
    pub fn write(&self, entries: &[(String, Vec<u8>)]) -> anyhow::Result<()> {
        let put = |(key, value): &(String, Vec<u8>)| json!({ "requestPut": { "key": STANDARD.encode(key), "value": STANDARD.encode(value) } });
        let puts: Vec<Value> = entries.iter().map(put).collect();
        self.call("kv/txn", &json!({ "success": puts })).map(drop)
    }

    /// A call of etcd's gateway for JSON: <https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/>.
    fn call(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let mut stream = UnixStream::connect(self.socket()).context("connect to etcd")?;
        stream.set_read_timeout(Some(PATIENCE)).context("limit the wait for etcd")?;
        let body = body.to_string();
        let request = format!(
            "POST /v3/{path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).context("send to etcd")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("receive from etcd")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("etcd answered without a body")?;
        ensure!(head.split(' ').nth(1) == Some("200"), "etcd refused {path}: {body}");
        serde_json::from_str(body).with_context(|| format!("read etcd's answer {body:?}"))
    }
}
