//! Real packets: a listener in each pod, and connections between them.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::namespace::Namespace;

/// How long a connection may take. A refused packet costs all of it, so it is short; an open path on one machine takes
/// well below a tenth of it.
pub const PATIENCE: Duration = Duration::from_millis(700);
/// How finely [`becomes`] looks: at most 70 connections at once are under way.
const PROBE_EVERY: Duration = Duration::from_millis(10);
/// The longest title that a listener sends.
const TITLE_BYTES: usize = 128;

/// What became of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// The listener's title came back.
    Open,
    /// Nothing came back, or a reset did.
    Closed,
    /// Another program answered, or the probe itself failed.
    Wrong(String),
}

/// A server on one port, for TCP (it sends its title and closes) and UDP (it counts what arrives and sends its title
/// back). Dropped, it stops.
#[derive(Debug)]
pub struct Listener {
    stop: Arc<AtomicBool>,
    datagrams: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Listener {
    pub fn start(namespace: &Namespace, port: u16, title: &str) -> std::io::Result<Self> {
        // The unspecified IPv6 address takes IPv4 too.
        let any = SocketAddr::new(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED), port);
        let (tcp, udp) =
            namespace.enter(|| -> std::io::Result<_> { Ok((TcpListener::bind(any)?, UdpSocket::bind(any)?)) })?;
        // How often the threads look whether to stop.
        let tick = Duration::from_millis(20);
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(tick))?;
        let stop = Arc::new(AtomicBool::new(false));
        let datagrams = Arc::new(AtomicU64::new(0));
        let serve_tcp = {
            let (stop, title) = (Arc::clone(&stop), title.to_owned());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    match tcp.accept() {
                        // The peer may be gone already; that is its own business.
                        Ok((mut stream, _)) => drop(stream.write_all(title.as_bytes())),
                        Err(_) => std::thread::park_timeout(Duration::from_millis(2)),
                    }
                }
            }
        };
        let serve_udp = {
            let (stop, title, datagrams) = (Arc::clone(&stop), title.to_owned(), Arc::clone(&datagrams));
            move || {
                let mut buffer = [0; TITLE_BYTES];
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((_, from)) = udp.recv_from(&mut buffer) {
                        datagrams.fetch_add(1, Ordering::SeqCst);
                        // A missing route back to a forged source is not a failure.
                        drop(udp.send_to(title.as_bytes(), from));
                    }
                }
            }
        };
        let threads = vec![std::thread::spawn(serve_tcp), std::thread::spawn(serve_udp)];
        Ok(Self { stop, datagrams, threads })
    }

    /// How many datagrams arrived so far.
    pub fn datagrams(&self) -> u64 {
        self.datagrams.load(Ordering::SeqCst)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A listener that panicked has shown it already.
            drop(thread.join());
        }
    }
}

/// Opens a TCP connection from `namespace` and reads the title.
pub fn tcp(namespace: &Namespace, to: SocketAddr, title: &str) -> Observed {
    tcp_within(namespace, to, title, PATIENCE)
}

/// As [`tcp`], of a connection that may take longer than [`PATIENCE`].
pub fn tcp_within(namespace: &Namespace, to: SocketAddr, title: &str, patience: Duration) -> Observed {
    namespace.enter(|| {
        let Ok(mut stream) = TcpStream::connect_timeout(&to, patience) else { return Observed::Closed };
        if let Err(error) = stream.set_read_timeout(Some(patience)) {
            return Observed::Wrong(error.to_string());
        }
        let mut answer = Vec::new();
        match (&mut stream).take(TITLE_BYTES as u64).read_to_end(&mut answer) {
            Ok(_) if answer == title.as_bytes() => Observed::Open,
            Ok(_) => Observed::Wrong(format!("answered by {:?}", String::from_utf8_lossy(&answer))),
            Err(_) => Observed::Closed,
        }
    })
}

/// Sends a datagram from `source`, which the namespace must own (an address of its loopback interface will do), without
/// waiting for an answer.
pub fn send_udp(namespace: &Namespace, source: IpAddr, to: SocketAddr) -> std::io::Result<()> {
    namespace.enter(|| {
        let socket = UdpSocket::bind(SocketAddr::new(source, 0))?;
        socket.send_to(b"?", to).map(drop)
    })
}

/// Tries again until `done`, or until the time is up. Returns how long it took.
pub fn until(deadline: Duration, mut done: impl FnMut() -> bool) -> Option<Duration> {
    let start = Instant::now();
    loop {
        if done() {
            return Some(start.elapsed());
        }
        if start.elapsed() >= deadline {
            return None;
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// When connections become open, or closed: a new one starts every few milliseconds, and the result is the start of the
/// first that was as wanted, after which none was otherwise. `None` when that did not happen before the deadline.
pub fn becomes(
    namespace: &Namespace,
    to: SocketAddr,
    title: &str,
    wanted: Observed,
    deadline: Duration,
) -> Option<Duration> {
    let (start, wanted) = (Instant::now(), &wanted);
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut outcomes: Vec<(Duration, bool)> = Vec::new();
        while start.elapsed() < deadline && !outcomes.iter().any(|(_, as_wanted)| *as_wanted) {
            let (sender, at) = (sender.clone(), start.elapsed());
            scope.spawn(move || {
                let as_wanted = tcp(namespace, to, title) == *wanted;
                sender.send((at, as_wanted)).expect("the receiver outlives the scope");
            });
            std::thread::park_timeout(PROBE_EVERY);
            outcomes.extend(receiver.try_iter());
        }
        drop(sender);
        outcomes.extend(receiver.iter());
        outcomes.sort();
        let last_otherwise = outcomes.iter().rposition(|(_, as_wanted)| !as_wanted);
        outcomes.get(last_otherwise.map_or(0, |at| at + 1)).map(|(at, _)| *at)
    })
}

/// Whether an HTTP server answers 200.
pub fn http_ok(namespace: &Namespace, server: SocketAddr, path: &str) -> bool {
    namespace.enter(|| {
        let Ok(mut stream) = TcpStream::connect_timeout(&server, PATIENCE) else { return false };
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let mut answer = [0; 12];
        stream.set_read_timeout(Some(PATIENCE)).is_ok()
            && stream.write_all(request.as_bytes()).is_ok()
            && stream.read_exact(&mut answer).is_ok()
            && answer.ends_with(b" 200")
    })
}
