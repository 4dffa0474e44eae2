//! A node with pods in network namespaces of their own, and probes with real sockets.
//!
//! Each pod is connected to the node by a veth pair with its own route; behind the node's uplink is one remote host.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hanse_dataplane::nftables::{Config, Nftables};

/// How long a probe waits for what policy would drop: a packet within one machine takes well under a millisecond, and
/// the first on a fresh link a neighbour's answer.
pub const PATIENCE: Duration = Duration::from_millis(400);

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Gone, with all its namespaces, when dropped.
pub struct Net {
    prefix: String,
    names: Vec<String>,
}

pub fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("ip of iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Net {
    /// The namespace of the node is `node`, of the remote host (10.9.0.2, fd09::2) `remote`.
    pub fn new() -> Self {
        let prefix = format!("hdp{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut net = Self { prefix, names: Vec::new() };
        net.add("node");
        let node = net.name("node");
        net.sysctl("node", "net.ipv4.ip_forward=1");
        net.sysctl("node", "net.ipv6.conf.all.forwarding=1");
        net.add("remote");
        let remote = net.name("remote");
        ip(&format!("link add up0 netns {node} type veth peer name eth0 netns {remote}"));
        ip(&format!("-n {node} addr add 10.9.0.1/24 dev up0"));
        ip(&format!("-n {node} addr add fd09::1/64 dev up0 nodad"));
        ip(&format!("-n {remote} addr add 10.9.0.2/24 dev eth0"));
        ip(&format!("-n {remote} addr add fd09::2/64 dev eth0 nodad"));
        ip(&format!("-n {node} link set up0 up"));
        ip(&format!("-n {remote} link set eth0 up"));
        ip(&format!("-n {remote} route add 10.0.0.0/8 via 10.9.0.1"));
        ip(&format!("-n {remote} -6 route add fd00::/8 via fd09::1"));
        net
    }

    fn add(&mut self, short: &str) {
        let name = self.name(short);
        ip(&format!("netns add {name}"));
        self.names.push(name.clone());
        // Duplicate address detection would delay the first packets.
        self.sysctl(short, "net.ipv6.conf.default.accept_dad=0");
        ip(&format!("-n {name} link set lo up"));
    }

    pub fn sysctl(&self, short: &str, setting: &str) {
        let (key, value) = setting.split_once('=').expect("key=value");
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        let value = value.to_owned();
        self.within(short, move || std::fs::write(path, value).expect("a sysctl"));
    }

    /// Adds a pod `10.1.0.N` / `fd01::N` with its route.
    pub fn pod(&mut self, number: u8) {
        let short = format!("p{number}");
        self.add(&short);
        let (node, pod) = (self.name("node"), self.name(&short));
        ip(&format!("link add pod{number} netns {node} type veth peer name eth0 netns {pod}"));
        ip(&format!("-n {pod} addr add 10.1.0.{number}/32 dev eth0"));
        ip(&format!("-n {pod} addr add fd01::{number}/128 dev eth0 nodad"));
        ip(&format!("-n {pod} link set eth0 up"));
        ip(&format!("-n {node} link set pod{number} up"));
        if number == first(&self.names) {
            ip(&format!("-n {node} addr add 10.1.255.1/32 dev lo"));
            ip(&format!("-n {node} addr add fd01:ffff::1/128 dev lo"));
        }
        ip(&format!("-n {pod} route add 10.1.255.1 dev eth0"));
        ip(&format!("-n {pod} route add default via 10.1.255.1"));
        ip(&format!("-n {node} addr add fe80::1/64 dev pod{number} nodad"));
        ip(&format!("-n {pod} -6 route add default via fe80::1 dev eth0"));
        ip(&format!("-n {node} route add 10.1.0.{number} dev pod{number}"));
        ip(&format!("-n {node} -6 route add fd01::{number} dev pod{number}"));
    }

    /// Adds pods `10.1.0.N` / `fd01::N` that are connected to one bridge of the node, whose filtering is on or off.
    pub fn bridged_pods(&mut self, numbers: &[u8], filtered: bool) {
        let node = self.name("node");
        ip(&format!("-n {node} link add br0 type bridge"));
        ip(&format!("-n {node} addr add 10.1.0.1/24 dev br0"));
        ip(&format!("-n {node} addr add fd01::1/64 dev br0 nodad"));
        ip(&format!("-n {node} link set br0 up"));
        for family in ["iptables", "ip6tables"] {
            self.sysctl("node", &format!("net.bridge.bridge-nf-call-{family}={}", u8::from(filtered)));
        }
        for number in numbers {
            let short = format!("p{number}");
            self.add(&short);
            let pod = self.name(&short);
            ip(&format!("link add pod{number} netns {node} type veth peer name eth0 netns {pod}"));
            ip(&format!("-n {node} link set pod{number} master br0"));
            ip(&format!("-n {node} link set pod{number} up"));
            ip(&format!("-n {pod} addr add 10.1.0.{number}/24 dev eth0"));
            ip(&format!("-n {pod} addr add fd01::{number}/64 dev eth0 nodad"));
            ip(&format!("-n {pod} link set eth0 up"));
            ip(&format!("-n {pod} route add default via 10.1.0.1"));
            ip(&format!("-n {pod} -6 route add default via fd01::1"));
        }
    }

    pub fn name(&self, short: &str) -> String {
        format!("{}-{short}", self.prefix)
    }

    /// Runs `work` in a namespace, on a thread of its own.
    pub fn within<T: Send>(&self, short: &str, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.name(short));
        std::thread::scope(|scope| {
            let enter = move || {
                let namespace = std::fs::File::open(&path).expect("the namespace");
                nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("root");
                work()
            };
            scope.spawn(enter).join().expect("no panic in the namespace")
        })
    }

    /// The driver, in the node's namespace. Its rules log decisions, as an agent's do, also without a listener.
    pub fn driver(&self) -> Nftables {
        self.driver_with(Config { flows: true, ..Config::default() })
    }

    pub fn driver_with(&self, config: Config) -> Nftables {
        let config = Config { uplinks: vec!["up0".into()], ..config };
        self.within("node", || Nftables::open(config).expect("netlink"))
    }

    pub fn listen(&self, short: &str, address: &str) -> TcpListener {
        let address: SocketAddr = address.parse().expect("an address");
        self.within(short, || {
            let listener = bound(|| TcpListener::bind(address));
            listener.set_nonblocking(true).expect("set");
            listener
        })
    }

    pub fn udp(&self, short: &str, address: &str) -> UdpSocket {
        let address: SocketAddr = address.parse().expect("an address");
        self.within(short, || {
            let socket = bound(|| UdpSocket::bind(address));
            socket.set_read_timeout(Some(PATIENCE)).expect("set");
            socket
        })
    }

    /// Opens a connection; `None` when no answer comes, or a refusal.
    pub fn connect(&self, short: &str, to: &str) -> Option<TcpStream> {
        let to: SocketAddr = to.parse().expect("an address");
        self.within(short, || TcpStream::connect_timeout(&to, PATIENCE).ok())
    }

    /// A connection with both of its ends.
    pub fn pair(&self, short: &str, to: &str, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let client = self.connect(short, to).expect("allowed");
        let server = accept(listener).expect("the connection that was made");
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            stream.set_write_timeout(Some(PATIENCE)).expect("set");
            stream.set_nodelay(true).expect("set");
        }
        (client, server)
    }

    /// Sends a whole IP packet from `short`, with the header that it has.
    pub fn raw(&self, short: &str, to: IpAddr, packet: &[u8]) {
        use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, sendto, socket};
        use std::os::fd::AsRawFd as _;
        self.within(short, || {
            let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            let socket = socket(family, SockType::Raw, SockFlag::empty(), SockProtocol::Raw).expect("root");
            let to = nix::sys::socket::SockaddrStorage::from(SocketAddr::new(to, 0));
            sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty()).expect("sent");
        });
    }

    /// Whether a datagram from `short` reaches a socket.
    pub fn datagram(&self, short: &str, from: &str, to: &UdpSocket) -> bool {
        let target = to.local_addr().expect("bound");
        let sender = self.udp(short, from);
        drain(to);
        sender.send_to(b"probe", target).is_ok() && to.recv_from(&mut [0; 16]).is_ok()
    }
}

/// A socket of an address that may just have been closed: a child that another test starts at this moment has a copy of every open
/// socket until it executes its program.
fn bound<T>(bind: impl Fn() -> std::io::Result<T>) -> T {
    let in_use = |error: &std::io::Error| error.kind() == std::io::ErrorKind::AddrInUse;
    until(|| Some(bind()).filter(|bound| !bound.as_ref().is_err_and(in_use)))
        .expect("the address is free")
        .expect("bound")
}

fn first(names: &[String]) -> u8 {
    let numbers = names.iter().filter_map(|name| name.rsplit_once("-p")?.1.parse().ok());
    numbers.min().unwrap_or(0)
}

pub fn drain(socket: &UdpSocket) {
    socket.set_nonblocking(true).expect("set");
    while socket.recv_from(&mut [0; 64]).is_ok() {}
    socket.set_nonblocking(false).expect("set");
}

/// Waits for a connection that is on its way.
pub fn accept(listener: &TcpListener) -> Option<TcpStream> {
    until(|| listener.accept().ok().map(|(stream, _)| stream)).inspect(|stream| {
        stream.set_nonblocking(false).expect("set");
    })
}

/// Repeats until there is an answer, or patience ends.
pub fn until<T>(mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + PATIENCE * 5;
    loop {
        if let Some(answer) = attempt() {
            return Some(answer);
        }
        if Instant::now() > end {
            return None;
        }
        std::thread::yield_now();
    }
}

/// Whether bytes written at one end arrive at the other.
pub fn passes(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    from.write_all(b"ping").is_ok() && to.read_exact(&mut [0; 4]).is_ok()
}

/// Whether the connection is reset when it writes: the answer may take a moment. One that is merely silent is not.
pub fn is_reset(stream: &mut TcpStream) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    let is_reset = |error: &std::io::Error| [BrokenPipe, ConnectionReset].contains(&error.kind());
    until(|| stream.write_all(b"x").err().filter(is_reset)).is_some()
}

pub fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

/// Runs `nft` on the node; what it prints.
pub fn nft(net: &Net, command: &str) -> String {
    let output = Command::new("ip")
        .args(["netns", "exec", &net.name("node"), "nft"])
        .args(command.split(' '))
        .output()
        .expect("nft of nftables");
    assert!(output.status.success(), "nft {command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
