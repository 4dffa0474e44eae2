//! An open connection: who is at the other end, and when it must end.

use std::collections::{BTreeMap, HashMap};
use std::error::Error as _;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;
use tonic::{Code, Request, Status};

use crate::keys::Certificate;
use crate::spiffe::Identity;

/// The other end of a connection. Every request of a server built on [`super::incoming`] carries it as an extension.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its certificate; absent only on a listener that requires none.
    pub certificate: Option<Arc<Certificate>>,
    pub address: SocketAddr,
    /// The negotiated key exchange, for example `X25519MLKEM768`.
    pub key_exchange: &'static str,
    /// When the connection ends: the earlier of the two certificates' ends.
    pub ends_at: SystemTime,
    /// Cancelled when the connection has ended, or must.
    pub closed: CancellationToken,
    /// Why nothing more could be read from it.
    pub(super) failure: Arc<OnceLock<String>>,
}

impl Peer {
    /// What went wrong with a call over this connection: what the other side answered, or why it closed the connection. Of TLS 1.3 a
    /// client learns after its own handshake only that its certificate is refused.
    pub fn explain(&self, status: &Status) -> String {
        let answered = status.source().is_none();
        match self.failure().filter(|_| !answered) {
            Some(failure) => format!("the other side closed the connection: {failure}"),
            None => answer_in_words(status),
        }
    }

    /// Why nothing more could be read, in words.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.get().map(|failure| alert_in_words(failure).to_owned())
    }

    /// The identity, where the listener requires a certificate.
    pub fn identity(&self) -> Option<&Identity> {
        self.certificate.as_ref().map(|c| &c.identity)
    }
}

/// What a server answered. Without the called service, it sends no message.
fn answer_in_words(status: &Status) -> String {
    match (status.code(), status.message()) {
        (Code::Unimplemented, "") => {
            "this address does not serve this call: check that its port is not that of another listener, such as \
                                      the one for joining or enrolling, and that both versions fit"
                .to_owned()
        }
        (code, "") => format!("it answered {code:?} without a message"),
        (_, message) => message.to_owned(),
    }
}

/// A TLS alert (RFC 8446, 6.2) as people read it; what is none stays.
fn alert_in_words(failure: &str) -> &str {
    let words = [
        ("CertificateRevoked", "our certificate is not admitted: it was revoked, or its key was replaced"),
        ("CertificateExpired", "our certificate has ended: check this machine's clock"),
        ("UnknownCA", "our certificate is of an authority that is not known there"),
        ("BadCertificate", "our certificate is not accepted"),
        ("AccessDenied", "our certificate is for an identity that is not let in there"),
        ("CertificateRequired", "the listener requires a certificate, and none was presented"),
    ];
    let alert = failure.rsplit(": ").next().unwrap_or_default();
    words.iter().find(|(name, _)| *name == alert).map_or(failure, |(_, words)| words)
}

/// The connection's other end.
///
/// # Errors
/// `UNAUTHENTICATED` where the request did not come over one of our listeners.
pub fn peer<T>(request: &Request<T>) -> Result<&Peer, Status> {
    request.extensions().get::<Peer>().ok_or_else(|| Status::unauthenticated("no connection"))
}

/// Who calls, from the certificate.
///
/// # Errors
/// `UNAUTHENTICATED` where the caller has shown none.
pub fn peer_identity<T>(request: &Request<T>) -> Result<&Identity, Status> {
    peer(request)?.identity().ok_or_else(|| Status::unauthenticated("no certificate"))
}

/// The open connections of a listener, so that a revocation can end those that it concerns.
#[derive(Debug, Clone, Default)]
pub struct Connections {
    /// In the order in which they were opened.
    open: Arc<Mutex<BTreeMap<u64, Open>>>,
}

#[derive(Debug)]
struct Open {
    peer: Peer,
    since: Instant,
}

/// Whose connections may end for a newcomer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Within {
    /// Those of its own network, which has all that a network may have.
    Network,
    Everywhere,
}

/// A connection of a newcomer that is this old has had time for what it came for: one call.
const SETTLED: Duration = Duration::from_secs(2);

impl Connections {
    fn open(&self) -> MutexGuard<'_, BTreeMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends, at once, each connection that `matches`. Returns how many.
    pub fn close_where(&self, matches: impl Fn(&Peer) -> bool) -> usize {
        let open = self.open();
        open.values().filter(|it| matches(&it.peer)).map(|it| it.peer.closed.cancel()).count()
    }

    /// The other ends of the open connections.
    pub fn peers(&self) -> Vec<Peer> {
        self.open().values().map(|it| it.peer.clone()).collect()
    }

    /// How many are open.
    #[expect(clippy::len_without_is_empty, reason = "a count, not a collection")]
    pub fn len(&self) -> usize {
        self.open().len()
    }

    /// How many are open from the host of this address, and from its network.
    pub(super) fn from(&self, address: IpAddr) -> (usize, usize) {
        let (host, network) = (host_of(address), network_of(address));
        let open = self.open();
        let count = |is: &dyn Fn(IpAddr) -> bool| open.values().filter(|it| is(it.peer.address.ip())).count();
        (count(&|it| host_of(it) == host), count(&|it| network_of(it) == network))
    }

    /// How many an identity has open.
    pub(super) fn of(&self, identity: &Identity) -> usize {
        self.open().values().filter(|it| it.peer.identity() == Some(identity)).count()
    }

    /// Ends one connection for a newcomer from `address`, in its network only where `within` says so: the oldest of the host that has
    /// most in the network that has most, where these have more than the newcomer's; else the oldest that has had its time. The
    /// address whose connection it was.
    pub(super) fn make_room(&self, address: IpAddr, within: Within) -> Option<IpAddr> {
        let mut open = self.open();
        let network = network_of(address);
        let may_yield = |it: &&Open| within == Within::Everywhere || network_of(it.peer.address.ip()) == network;
        let (mut networks, mut hosts): (HashMap<IpAddr, usize>, HashMap<IpAddr, usize>) = Default::default();
        for it in open.values().filter(may_yield) {
            *networks.entry(network_of(it.peer.address.ip())).or_default() += 1;
            *hosts.entry(host_of(it.peer.address.ip())).or_default() += 1;
        }
        let count = |counts: &HashMap<IpAddr, usize>, of: IpAddr| counts.get(&of).copied().unwrap_or_default();
        let most = |counts: &HashMap<IpAddr, usize>| counts.values().copied().max().unwrap_or_default();
        let mine = (count(&networks, network), count(&hosts, host_of(address)));
        let of_hosts = {
            let in_largest = |host: &&IpAddr| count(&networks, network_of(**host)) == most(&networks);
            hosts.keys().filter(in_largest).map(|host| count(&hosts, *host)).max().unwrap_or_default()
        };
        // With the newcomer's.
        let is_unfair = most(&networks) > mine.0 + 1 && of_hosts > mine.1 || most(&hosts) > mine.1 + 1;
        let yields = |it: &Open| {
            let of = it.peer.address.ip();
            let has_most = if most(&networks) > mine.0 + 1 {
                count(&networks, network_of(of)) == most(&networks) && count(&hosts, host_of(of)) == of_hosts
            } else {
                count(&hosts, host_of(of)) == most(&hosts)
            };
            is_unfair && has_most || it.since.elapsed() >= SETTLED
        };
        let id = *open.iter().find(|(_, it)| may_yield(it) && yields(it))?.0;
        let ended = open.remove(&id)?;
        ended.peer.closed.cancel();
        Some(ended.peer.address.ip())
    }

    fn register(&self, peer: &Peer) -> Registration {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        self.open().insert(id, Open { peer: peer.clone(), since: Instant::now() });
        Registration { connections: self.clone(), id }
    }
}

/// The network that one owner can have many addresses of: 256 of IPv4, and of IPv6 what a site is given.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::from((u32::from(v4) >> 8 << 8).to_be_bytes()),
        IpAddr::V6(v6) => IpAddr::from((u128::from(v6) >> 80 << 80).to_be_bytes()),
    }
}

#[derive(Debug)]
struct Registration {
    connections: Connections,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.connections.open().remove(&self.id);
    }
}

/// A peer takes something of what is sent to it within this time: HTTP/2 has flow control of its own, so that one that lives always
/// reads. A few KiB a second are enough.
pub(super) const STALLED: Duration = Duration::from_secs(20);

/// A socket that counts the bytes it has taken: the TLS stream above it has a buffer of its own, so that writing to that one is no
/// sign that the peer reads.
#[derive(Debug)]
pub struct CountedSocket {
    socket: TcpStream,
    /// Wraps: only changes matter.
    taken: u64,
}

impl From<TcpStream> for CountedSocket {
    fn from(socket: TcpStream) -> Self {
        Self { socket, taken: 0 }
    }
}

impl AsyncRead for CountedSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for CountedSocket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(context, bytes);
        self.count(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(context, slices);
        self.count(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

impl CountedSocket {
    fn count(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &written {
            self.taken = self.taken.wrapping_add(*bytes as u64);
        }
        written
    }
}

/// A stream that buffers, above a [`CountedSocket`].
pub trait AboveSocket {
    /// The bytes that the socket has taken, wrapping.
    fn taken(&self) -> u64;
}

impl AboveSocket for tokio_rustls::server::TlsStream<CountedSocket> {
    fn taken(&self) -> u64 {
        self.get_ref().0.taken
    }
}

impl AboveSocket for tokio_rustls::client::TlsStream<CountedSocket> {
    fn taken(&self) -> u64 {
        self.get_ref().0.taken
    }
}

/// A TLS stream that ends at its certificates' end, when it is closed, or when its peer takes nothing any more.
pub struct BoundedStream<S> {
    stream: S,
    /// While something waits to be sent: when the stream ends, if the socket takes nothing until then.
    stalled: Option<Pin<Box<Sleep>>>,
    /// What the socket had taken at the last look.
    taken: u64,
    stalls_after: Duration,
    peer: Peer,
    expires: Pin<Box<Sleep>>,
    told: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: bool,
    _registration: Option<Registration>,
}

impl<S> fmt::Debug for BoundedStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoundedStream").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl<S> BoundedStream<S> {
    pub(super) fn new(stream: S, peer: Peer, connections: Option<&Connections>, stalls_after: Duration) -> Self {
        // Sleeping for more than a year at once gains nothing and may not be expressible.
        let left =
            peer.ends_at.duration_since(SystemTime::now()).unwrap_or_default().min(Duration::from_secs(366 * 86_400));
        let registration = connections.map(|c| c.register(&peer));
        Self {
            stream,
            stalled: None,
            taken: 0,
            stalls_after,
            expires: Box::pin(tokio::time::sleep(left)),
            told: Box::pin(peer.closed.clone().cancelled_owned()),
            peer,
            ended: false,
            _registration: registration,
        }
    }

    /// Registers the task for the end, and says whether it has come.
    fn poll_ended(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if !self.ended {
            self.ended = self.told.as_mut().poll(context).is_ready() || self.expires.as_mut().poll(context).is_ready();
            if self.ended {
                self.peer.closed.cancel();
            }
        }
        if self.ended {
            Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the certificate of the connection is no longer valid",
            ))
        } else {
            Ok(())
        }
    }
}

impl<S: AboveSocket> BoundedStream<S> {
    /// Ends the stream where what was to be sent waits for too long. `is_empty`: nothing waits any more.
    fn poll_stalled<T>(
        &mut self,
        context: &mut Context<'_>,
        sent: Poll<io::Result<T>>,
        is_empty: bool,
    ) -> Poll<io::Result<T>> {
        let taken = self.stream.taken();
        if is_empty || taken != self.taken {
            (self.taken, self.stalled) = (taken, None);
        }
        if sent.is_ready() {
            return sent;
        }
        let after = self.stalls_after;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(after)));
        if stalled.as_mut().poll(context).is_pending() {
            return Poll::Pending;
        }
        self.peer.closed.cancel();
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes nothing of what is sent to it")))
    }
}

impl<S> Drop for BoundedStream<S> {
    fn drop(&mut self) {
        self.peer.closed.cancel();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for BoundedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_ended(context)?;
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Poll::Ready(Err(error)) = &read {
            self.peer.failure.get_or_init(|| error.to_string());
        }
        read
    }
}

impl<S: AsyncWrite + AboveSocket + Unpin> AsyncWrite for BoundedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_ended(context)?;
        let sent = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.poll_stalled(context, sent, false)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_ended(context)?;
        let sent = Pin::new(&mut self.stream).poll_flush(context);
        let is_empty = sent.is_ready();
        self.poll_stalled(context, sent, is_empty)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = Pin::new(&mut self.stream).poll_shutdown(context);
        self.poll_stalled(context, sent, false)
    }
}

impl Connected for BoundedStream<tokio_rustls::server::TlsStream<CountedSocket>> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

/// The host of an address: IPv6 hosts own whole /64 networks.
pub fn host_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::from((u128::from(v6) >> 64 << 64).to_be_bytes()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    /// A TLS stream whose own buffer has room for `room` bytes, over a socket that takes none of them.
    #[derive(Debug)]
    struct Buffering {
        room: usize,
        taken: u64,
    }

    impl AboveSocket for Buffering {
        fn taken(&self) -> u64 {
            self.taken
        }
    }

    impl AsyncWrite for Buffering {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            let fits = bytes.len().min(self.room);
            self.room -= fits;
            if fits == 0 { Poll::Pending } else { Poll::Ready(Ok(fits)) }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    fn bounded(stream: Buffering, stalls_after: Duration) -> BoundedStream<Buffering> {
        let peer = Peer {
            certificate: None,
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            key_exchange: "x25519",
            ends_at: SystemTime::now() + Duration::from_secs(86_400),
            closed: CancellationToken::new(),
            failure: Arc::default(),
        };
        BoundedStream::new(stream, peer, None, stalls_after)
    }

    #[test]
    fn an_ipv6_host_is_its_network_and_a_mapped_address_is_ipv4() {
        let host = |text: &str| host_of(text.parse().unwrap());
        assert_eq!(host("fd00::1"), host("fd00::ffff:0:0:1"));
        assert_ne!(host("fd00::1"), host("fd00:0:0:1::1"));
        assert_eq!(host("::ffff:10.0.0.1"), host("10.0.0.1"));
    }

    #[tokio::test]
    async fn answer_without_a_message_is_explained() {
        let peer = bounded(Buffering { room: 0, taken: 0 }, Duration::ZERO).peer.clone();
        let explain = |status: Status| peer.explain(&status);
        assert!(explain(Status::new(Code::Unimplemented, "")).contains("another listener"));
        assert_eq!(explain(Status::new(Code::Internal, "")), "it answered Internal without a message");
        assert_eq!(explain(Status::new(Code::Unimplemented, "not here")), "not here");
    }

    async fn flush_once(stream: &mut BoundedStream<Buffering>) -> Poll<io::Result<()>> {
        poll_fn(|context| Poll::Ready(Pin::new(&mut *stream).poll_flush(context))).await
    }

    async fn write_once(stream: &mut BoundedStream<Buffering>) -> Poll<io::Result<usize>> {
        poll_fn(|context| Poll::Ready(Pin::new(&mut *stream).poll_write(context, b"17 bytes of a PING"))).await
    }

    /// Keep-alive writes into the buffer of a stalled stream every ten seconds.
    #[tokio::test(start_paused = true)]
    async fn writing_to_the_buffer_of_a_stalled_stream_does_not_prolong_it() {
        let mut stream = bounded(Buffering { room: 16_384, taken: 0 }, Duration::from_secs(20));
        assert!(flush_once(&mut stream).await.is_pending());
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(matches!(write_once(&mut stream).await, Poll::Ready(Ok(_))));
        assert!(flush_once(&mut stream).await.is_pending());
        tokio::time::advance(Duration::from_millis(9_900)).await;
        assert!(matches!(write_once(&mut stream).await, Poll::Ready(Ok(_))));
        assert!(flush_once(&mut stream).await.is_pending());
        tokio::time::advance(Duration::from_millis(200)).await;
        assert!(
            matches!(flush_once(&mut stream).await, Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::TimedOut)
        );
        assert!(stream.peer.closed.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_whose_socket_takes_a_little_lives() {
        let mut stream = bounded(Buffering { room: 0, taken: 0 }, Duration::from_secs(20));
        for _ in 0..10 {
            assert!(flush_once(&mut stream).await.is_pending());
            tokio::time::advance(Duration::from_secs(19)).await;
            stream.stream.taken = stream.stream.taken.wrapping_add(1);
        }
        assert!(!stream.peer.closed.is_cancelled());
    }
}
