//! Clusters of real etcd nodes, on loopback if nothing else is given. They end with the test process, also when that is killed.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hanse_store::StoreUrl;
use rand::Rng as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Long for a machine that does much else.
pub const SOON: Duration = Duration::from_secs(60);

/// Below the ports that the kernel gives to outgoing connections, so that a restarted node finds its port free.
const PORTS: std::ops::Range<u16> = 15_000..30_000;

pub struct Nodes {
    host: IpAddr,
    nodes: Vec<Node>,
    extra: Vec<String>,
    tls: bool,
    _folder: tempfile::TempDir,
}

struct Node {
    client: u16,
    peer: u16,
    /// Health and metrics, without TLS.
    status: u16,
    folder: PathBuf,
    process: Option<Process>,
}

struct Process {
    shell: Child,
    /// When it is closed, the shell kills the node.
    stdin: Option<ChildStdin>,
    id: String,
}

impl Process {
    fn end(&mut self, last: &[u8]) {
        if let Some(mut stdin) = self.stdin.take() {
            let _ = stdin.write_all(last);
            drop(stdin);
            let _ = self.shell.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end(b"");
    }
}

impl Nodes {
    /// Three nodes that have elected a leader.
    pub async fn start() -> Self {
        Self::start_with(&[], false).await
    }

    /// With more arguments for each node; with `tls`, they include the certificates.
    pub async fn start_with(extra: &[String], tls: bool) -> Self {
        Self::start_at(Ipv4Addr::LOCALHOST.into(), extra, tls).await
    }

    /// At an address of this machine, or of the network namespace of the calling thread.
    pub async fn start_at(host: IpAddr, extra: &[String], tls: bool) -> Self {
        // In memory where that is possible: etcd flushes each write.
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let nodes = (0..3).map(|number| Node {
            client: free_port(host),
            peer: free_port(host),
            status: free_port(host),
            folder: folder.path().join(format!("n{number}")),
            process: None,
        });
        let mut this = Self { host, nodes: nodes.collect(), extra: extra.to_vec(), tls, _folder: folder };
        (0..3).for_each(|number| this.run(number));
        for number in 0..3 {
            this.healthy(number).await;
        }
        this
    }

    /// Starts a node, on what it had before.
    pub fn run(&mut self, number: usize) {
        let scheme = if self.tls { "https" } else { "http" };
        let host = self.host;
        let peers: Vec<String> =
            (0..).zip(&self.nodes).map(|(n, it)| format!("n{n}=http://{host}:{}", it.peer)).collect();
        let node = &mut self.nodes[number];
        assert!(node.process.is_none(), "it runs already");
        let (client, peer) = (format!("{scheme}://{host}:{}", node.client), format!("http://{host}:{}", node.peer));
        let (data, log) = (node.folder.display(), node.folder.with_extension("log"));
        // The shell outlives this process for a moment only: when its input ends, it kills the node and removes its files.
        let script = "\"$@\" >>\"$LOG\" 2>&1 </dev/null & node=$!; echo $node; read -r keep; kill -9 $node; wait; \
                      [ -n \"$keep\" ] || { rm -rf \"$DATA\" \"$LOG\"; rmdir \"$FOLDER\"; }";
        let mut shell = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(program())
            .args(["--name", &format!("n{number}"), "--data-dir"])
            .arg(&node.folder)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--listen-metrics-urls", &format!("http://{host}:{}", node.status)])
            .args(["--initial-cluster", &peers.join(","), "--initial-cluster-state", "new"])
            .args(&self.extra)
            .env("LOG", &log)
            .env("FOLDER", node.folder.parent().unwrap())
            .env("DATA", data.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh runs");
        let mut id = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut id).unwrap();
        let stdin = shell.stdin.take();
        node.process = Some(Process { shell, stdin, id: id.trim().to_owned() });
    }

    /// Kills a node with SIGKILL.
    pub fn kill(&mut self, number: usize) {
        let mut process = self.nodes[number].process.take().expect("it runs");
        assert!(Command::new("kill").args(["-9", &process.id]).status().unwrap().success());
        process.end(b"keep\n");
    }

    /// Stops a node without closing its connections (SIGSTOP), or lets it go on (SIGCONT).
    pub fn signal(&self, number: usize, signal: &str) {
        let process = self.nodes[number].process.as_ref().expect("it runs");
        assert!(Command::new("kill").args([signal, &process.id]).status().unwrap().success());
    }

    pub fn hosts(&self) -> Vec<String> {
        self.nodes.iter().map(|it| format!("{}:{}", self.host, it.client)).collect()
    }

    /// A store of its own in this cluster.
    pub fn url(&self) -> StoreUrl {
        self.url_with("")
    }

    pub fn url_with(&self, settings: &str) -> StoreUrl {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let scheme = if self.tls { "etcds" } else { "etcd" };
        let settings = if settings.is_empty() { String::new() } else { format!("?{settings}") };
        format!("{scheme}://{}/test/{number}{settings}", self.hosts().join(",")).parse().unwrap()
    }

    /// The URL of one node, for its clients.
    pub fn address(&self, number: usize) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}:{}", self.host, self.nodes[number].client)
    }

    /// Waits until a node serves requests, with a leader.
    pub async fn healthy(&self, number: usize) {
        let deadline = Instant::now() + SOON;
        loop {
            let answer = self.page(number, "/health").await;
            if answer.contains("\"health\":\"true\"") {
                return;
            }
            if Instant::now() > deadline {
                let log = std::fs::read_to_string(self.nodes[number].folder.with_extension("log"));
                panic!("etcd does not serve: {answer:?}: {}", log.unwrap_or_default());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The node that leads, of those that run.
    pub async fn leader(&self) -> usize {
        let deadline = Instant::now() + SOON;
        loop {
            for number in (0..self.nodes.len()).filter(|it| self.nodes[*it].process.is_some()) {
                if self.page(number, "/metrics").await.contains("\netcd_server_is_leader 1\n") {
                    return number;
                }
            }
            assert!(Instant::now() < deadline, "no leader");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A page of a node's status; empty if it does not answer.
    async fn page(&self, number: usize, path: &str) -> String {
        let address = (self.host, self.nodes[number].status);
        let reading = async {
            let mut stream = tokio::net::TcpStream::connect(address).await?;
            let request = format!("GET {path} HTTP/1.0\r\nHost: etcd\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await?;
            Ok::<_, std::io::Error>(text)
        };
        let answer = tokio::time::timeout(Duration::from_secs(3), reading).await;
        answer.ok().and_then(Result::ok).unwrap_or_default()
    }
}

/// The cluster of all tests that do not damage it, started once.
pub async fn shared() -> Arc<Nodes> {
    static SHARED: tokio::sync::OnceCell<Arc<Nodes>> = tokio::sync::OnceCell::const_new();
    SHARED.get_or_init(|| async { Arc::new(Nodes::start().await) }).await.clone()
}

/// etcd, from where the test clusters of Kubernetes have it, or from the path.
fn program() -> PathBuf {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(|assets| Path::new(&assets).join("etcd"));
    assets.filter(|path| path.is_file()).unwrap_or_else(|| "etcd".into())
}

fn free_port(host: IpAddr) -> u16 {
    loop {
        let port = rand::rng().random_range(PORTS);
        if TcpListener::bind((host, port)).is_ok() {
            return port;
        }
    }
}
