//! The accepting side: bounded handshakes, an optional rate limit, and the peer on every request.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use hanse_runtime::rate_limit::RateLimit;
use rustls::ServerConfig;
use rustls::server::{Acceptor, NoServerSessionStorage};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_rustls::LazyConfigAcceptor;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::connection::{BoundedStream, Connections, CountedSocket, Peer, STALLED, Within, host_of};
use super::refusals::{Reason, Refusals};
use super::{ALPN, CredentialStore, PresentedAuthority, Presents, Trust, VERSIONS, provider};
use crate::keys::{Certificate, KeyError};

/// A handshake takes at most this long.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// A peer that connects says something at once. One that has not in this time makes room for others ...
const LONG_SILENCE: Duration = Duration::from_secs(1);
/// ... and one that has spoken, in this: with many at once it may be us who are slow.
const LONG_HANDSHAKE: Duration = Duration::from_secs(3);

/// The bounds of a listener.
#[derive(Debug, Clone, Copy)]
pub struct IncomingLimits {
    /// Open connections, besides those in their handshake. Each costs about 100 KiB with its HTTP/2 buffers.
    pub connections: usize,
    /// Of these, from one address; `None` means unlimited.
    pub per_address: Option<usize>,
    /// Of these, from one network: a /24 of IPv4, a /48 of IPv6; `None` means unlimited.
    pub per_network: Option<usize>,
    /// Of these, of one identity, where a certificate is required; `None` means unlimited.
    pub per_identity: Option<usize>,
    /// Handshakes at once; beyond it, an address that has many, or one that takes long, makes room.
    pub handshakes: usize,
    /// New connections that one address may open in a second, and in a burst of ten seconds' worth; `None` means unlimited.
    pub per_second: Option<f64>,
    /// How long a connection may stay open, whatever its certificates say.
    pub lifetime: Option<Duration>,
    /// How long a peer may take nothing of what is sent to it.
    pub stalls_after: Duration,
}

impl Default for IncomingLimits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            per_address: None,
            per_network: None,
            per_identity: Some(64),
            handshakes: 256,
            per_second: None,
            lifetime: None,
            stalls_after: STALLED,
        }
    }
}

/// How a listener presents itself and whom it lets in.
#[derive(Debug, Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    credentials: CredentialStore,
    /// Accepted clients, where a certificate is required.
    trust: Option<Trust>,
}

impl ServerTls {
    /// Demands a certificate that `trust` accepts.
    ///
    /// # Errors
    /// When the authority cannot verify clients.
    pub fn mutual(credentials: CredentialStore, trust: &Trust) -> Result<Self, KeyError> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(|_| KeyError::Certificate("TLS 1.3 is not available"))?
            .with_client_cert_verifier(trust.client_verifier()?);
        let presents = Presents { store: credentials.clone(), authority: None };
        Ok(Self::finish(builder.with_cert_resolver(Arc::new(presents)), credentials, Some(trust.clone())))
    }

    /// Requires no certificate: only for joining and enrolling. Presents `authority` too, for clients that know its hash.
    ///
    /// # Errors
    /// When TLS 1.3 is not available.
    pub fn anonymous(credentials: CredentialStore, authority: PresentedAuthority) -> Result<Self, KeyError> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(|_| KeyError::Certificate("TLS 1.3 is not available"))?
            .with_no_client_auth();
        let presents = Presents { store: credentials.clone(), authority: Some(authority) };
        Ok(Self::finish(builder.with_cert_resolver(Arc::new(presents)), credentials, None))
    }

    fn finish(mut config: ServerConfig, credentials: CredentialStore, trust: Option<Trust>) -> Self {
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.max_early_data_size = 0;
        Self { config: Arc::new(config), credentials, trust }
    }
}

/// Accepted connections, for [`tonic::transport::server::Router::serve_with_incoming`].
pub struct Incoming {
    receiver: mpsc::Receiver<BoundedStream<tokio_rustls::server::TlsStream<CountedSocket>>>,
    address: SocketAddr,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Incoming {
    /// The bound address, with the port that was chosen for port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Stream for Incoming {
    type Item = io::Result<BoundedStream<tokio_rustls::server::TlsStream<CountedSocket>>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context).map(|stream| stream.map(Ok))
    }
}

/// A tonic server with the settings of every link: dead peers are noticed within 20 seconds, 256 streams a connection.
pub fn http2_server() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .max_concurrent_streams(256)
}

/// Binds `address` and accepts until `stop`. Every connection is entered in `connections` while it is open.
///
/// # Errors
/// When the address cannot be bound.
pub async fn incoming(
    address: SocketAddr,
    tls: ServerTls,
    limits: IncomingLimits,
    connections: Connections,
    stop: CancellationToken,
) -> io::Result<Incoming> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let (handshakes, refusals) = (Arc::new(Handshakes::new(limits.handshakes)), Arc::new(Refusals::default()));
        let mut rate = limits.per_second.map(RateLimit::new);
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                () = sender.closed() => return,
                accepted = listener.accept() => accepted,
                () = until(refusals.due()) => {
                    refusals.turn();
                    continue;
                }
            };
            let (stream, remote) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Usually out of file descriptors: waiting lets some be closed.
                    debug!(%error, "accept failed");
                    refusals.count(Reason::System, address.ip());
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            if let Err(reason) = admit(remote.ip(), &tls, &limits, &connections, &mut rate, &refusals) {
                debug!(%remote, ?reason, "connection refused");
                refusals.count(reason, remote.ip());
                continue;
            }
            let (sender, tls, connections) = (sender.clone(), tls.clone(), connections.clone());
            let begun = Handshakes::begin(&handshakes, remote.ip());
            let Some(Begun { place, cut_short }) = begun else {
                debug!(%remote, "connection refused: too many handshakes");
                refusals.count(Reason::Handshakes, remote.ip());
                continue;
            };
            if let Some(source) = cut_short {
                refusals.count(Reason::CutShort, source);
            }
            let refusals = Arc::clone(&refusals);
            tokio::spawn(async move {
                let _ = stream.set_nodelay(true);
                // Read before the handshake: a certificate replaced meanwhile ends later, never earlier.
                let own = tls.credentials.current().certificate.not_after;
                let latest = limits.lifetime.map_or(own, |lifetime| own.min(SystemTime::now() + lifetime));
                let accepted = tokio::select! {
                    () = place.cut_short.cancelled() => return debug!(%remote, "handshake cut short"),
                    accepted = tokio::time::timeout(HANDSHAKE_TIME, shake_hands(stream, &tls, &place)) => accepted,
                };
                let stream = match accepted {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => {
                        refusals.count_failed(&error, remote.ip());
                        return debug!(%remote, %error, "handshake failed");
                    }
                    Err(_) => {
                        refusals.count(Reason::Slow, remote.ip());
                        return debug!(%remote, "handshake took too long");
                    }
                };
                drop(place);
                if let Some(peer) = describe(&stream, remote, latest) {
                    if let (Some(identity), Some(most)) = (peer.identity(), limits.per_identity)
                        && connections.of(identity) >= most
                    {
                        refusals.count(Reason::Identity, remote.ip());
                        return debug!(%remote, %identity, "connection refused: too many of this identity");
                    }
                    let stream = BoundedStream::new(stream, peer.clone(), Some(&connections), limits.stalls_after);
                    // Revoked during the handshake: the closing of revoked connections has not seen this one yet.
                    if !tls.trust.is_some_and(|trust| peer.certificate.is_some_and(|it| trust.has_revoked(&it))) {
                        let _ = sender.send(stream).await;
                    }
                }
            });
        }
    });
    Ok(Incoming { receiver, address })
}

/// Whether one more connection of this address is accepted. On a listener without client certificates an earlier
/// connection makes room; who has shown a certificate is not sent away for others.
fn admit(
    address: IpAddr,
    tls: &ServerTls,
    limits: &IncomingLimits,
    connections: &Connections,
    rate: &mut Option<RateLimit<IpAddr>>,
    refusals: &Refusals,
) -> Result<(), Reason> {
    if rate.as_mut().is_some_and(|rate| !rate.allows(host_of(address), Instant::now())) {
        return Err(Reason::Rate);
    }
    let make_room = |within| tls.trust.is_none().then(|| connections.make_room(address, within)).flatten();
    if limits.per_address.is_some() || limits.per_network.is_some() {
        let (of_address, of_network) = connections.from(address);
        if limits.per_address.is_some_and(|most| of_address >= most) {
            return Err(Reason::Address);
        }
        if limits.per_network.is_some_and(|most| of_network >= most) {
            refusals.count(Reason::MadeRoom, make_room(Within::Network).ok_or(Reason::Network)?);
        }
    }
    if connections.len() >= limits.connections {
        refusals.count(Reason::MadeRoom, make_room(Within::Everywhere).ok_or(Reason::Connections)?);
    }
    Ok(())
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn shake_hands(
    stream: TcpStream,
    tls: &ServerTls,
    place: &Handshake,
) -> io::Result<tokio_rustls::server::TlsStream<CountedSocket>> {
    let begun = LazyConfigAcceptor::new(Acceptor::default(), CountedSocket::from(stream)).await?;
    place.has_spoken();
    begun.into_stream(tls.config.clone()).await
}

fn describe(
    stream: &tokio_rustls::server::TlsStream<CountedSocket>,
    address: SocketAddr,
    latest: SystemTime,
) -> Option<Peer> {
    let session = stream.get_ref().1;
    let certificate = match session.peer_certificates() {
        // The verifier has read it already, so this does not fail.
        Some([first, ..]) => Some(Arc::new(Certificate::from_der(first).ok()?)),
        _ => None,
    };
    Some(Peer {
        ends_at: certificate.as_ref().map_or(latest, |c| c.not_after.min(latest)),
        certificate,
        address,
        key_exchange: key_exchange(session.negotiated_key_exchange_group()),
        closed: CancellationToken::new(),
        failure: Arc::default(),
    })
}

/// The name of a key exchange group, as the IANA registry "TLS Supported Groups" spells it.
pub(super) fn key_exchange(group: Option<&'static dyn rustls::crypto::SupportedKxGroup>) -> &'static str {
    match group.map(|group| group.name()) {
        Some(rustls::NamedGroup::X25519MLKEM768) => "X25519MLKEM768",
        Some(rustls::NamedGroup::X25519) => "x25519",
        Some(rustls::NamedGroup::secp256r1) => "secp256r1",
        _ => "unknown",
    }
}

/// The handshakes of a listener. A client that opens connections and sends nothing makes room: the oldest handshake of the address
/// that has most is cut short for one that has less than half as many, and for everybody the oldest that takes long. Else
/// the newcomer is refused: a fleet that comes back at once would only cut short what is about to end.
#[derive(Debug)]
struct Handshakes {
    limit: usize,
    open: Mutex<OpenHandshakes>,
}

#[derive(Debug, Default)]
struct OpenHandshakes {
    /// In the order in which they began.
    list: BTreeMap<u64, OpenHandshake>,
    next: u64,
}

#[derive(Debug)]
struct OpenHandshake {
    source: IpAddr,
    began: Instant,
    /// Its first message has come.
    has_spoken: bool,
    cut_short: CancellationToken,
}

impl OpenHandshake {
    fn takes_long(&self, now: Instant) -> bool {
        now.duration_since(self.began) >= if self.has_spoken { LONG_HANDSHAKE } else { LONG_SILENCE }
    }
}

/// A handshake that may begin.
#[derive(Debug)]
struct Begun {
    place: Handshake,
    /// Whose handshake made room for it.
    cut_short: Option<IpAddr>,
}

/// A handshake that has begun.
#[derive(Debug)]
struct Handshake {
    of: Arc<Handshakes>,
    number: u64,
    cut_short: CancellationToken,
}

impl Handshakes {
    fn new(limit: usize) -> Self {
        Self { limit, open: Mutex::default() }
    }

    fn open(&self) -> MutexGuard<'_, OpenHandshakes> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No place is left for this address.
    fn begin(this: &Arc<Self>, source: IpAddr) -> Option<Begun> {
        let (source, now) = (host_of(source), Instant::now());
        let mut open = this.open();
        let mut made_room = None;
        if open.list.len() >= this.limit {
            let mut counts: HashMap<IpAddr, usize> = HashMap::new();
            for it in open.list.values() {
                *counts.entry(it.source).or_default() += 1;
            }
            let mine = counts.get(&source).copied().unwrap_or_default();
            let most = counts.values().copied().max().unwrap_or_default();
            let has_many = most >= 2 * (mine + 1);
            let makes_room =
                |it: &OpenHandshake| it.takes_long(now) || has_many && counts.get(&it.source) == Some(&most);
            let number = *open.list.iter().find(|(_, it)| makes_room(it))?.0;
            let cut = open.list.remove(&number)?;
            cut.cut_short.cancel();
            made_room = Some(cut.source);
        }
        let (number, cut_short) = (open.next, CancellationToken::new());
        open.next += 1;
        let begun = OpenHandshake { source, began: now, has_spoken: false, cut_short: cut_short.clone() };
        open.list.insert(number, begun);
        drop(open);
        Some(Begun { place: Handshake { of: Arc::clone(this), number, cut_short }, cut_short: made_room })
    }
}

impl Handshake {
    fn has_spoken(&self) {
        if let Some(it) = self.of.open().list.get_mut(&self.number) {
            it.has_spoken = true;
        }
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.of.open().list.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_has_many_handshakes_or_takes_long_makes_room() {
        let handshakes = Arc::new(Handshakes::new(4));
        let begin = |last: u8| Some(Handshakes::begin(&handshakes, IpAddr::from([10, 0, 0, last]))?.place);
        let mut of_1: Vec<Handshake> = (0..4).map(|_| begin(1).expect("room")).collect();
        assert!(begin(1).is_none(), "what it has is about to end");
        let first_of_2 = begin(2).expect("it has none, and 1 has many");
        assert!(of_1[0].cut_short.is_cancelled() && !of_1[1].cut_short.is_cancelled(), "the oldest goes");
        let second_of_2 = begin(2);
        assert!(second_of_2.is_none(), "that would be as many as 1 has");
        // Four addresses with one each, as when a fleet comes back: none is cut short.
        drop((first_of_2, of_1.split_off(0)));
        let fleet: Vec<Handshake> = (1..=4).map(|last| begin(last).expect("room")).collect();
        assert!(begin(5).is_none());
        assert!(fleet.iter().all(|it| !it.cut_short.is_cancelled()));
        // Who has spoken is given more time: it may be us who are slow.
        fleet[0].has_spoken();
        tokio::time::advance(LONG_SILENCE).await;
        let late = begin(5).expect("the second has said nothing");
        let cut = || fleet.iter().map(|it| it.cut_short.is_cancelled()).collect::<Vec<_>>();
        assert_eq!(cut(), [false, true, false, false]);
        tokio::time::advance(LONG_HANDSHAKE - LONG_SILENCE).await;
        let later = begin(6).expect("the first takes long");
        assert_eq!(cut(), [true, true, false, false]);
        drop((fleet, late, later));
        assert!(handshakes.open().list.is_empty());
    }

    #[tokio::test]
    async fn idle_connections_of_one_address_keep_no_other_out() {
        use tokio::io::AsyncReadExt as _;
        use tokio::net::TcpSocket;

        use crate::ca::Ca;
        use crate::spiffe::{Identity, TrustDomain};
        use crate::tls::{PinnedRoot, TlsClient};
        let hour = Duration::from_secs(3_600);
        let ca = Ca::root(&TrustDomain::new("hanse.test").unwrap(), hour, SystemTime::now()).unwrap();
        let own = ca.issue_credentials(&Identity::Hub, hour, SystemTime::now()).unwrap();
        let tls = ServerTls::anonymous(CredentialStore::new(own).unwrap(), PresentedAuthority::fixed(ca.certificate()))
            .unwrap();
        let limits = IncomingLimits { handshakes: 4, ..IncomingLimits::default() };
        let (connections, stop) = (Connections::default(), CancellationToken::new());
        let any = "127.0.0.1:0".parse().unwrap();
        let listener = incoming(any, tls, limits, connections, stop.clone()).await.unwrap();
        let address = listener.address();
        let serving = http2_server().add_routes(tonic::service::Routes::default());
        tokio::spawn(serving.serve_with_incoming_shutdown(listener, stop.clone().cancelled_owned()));
        let mut idle = Vec::new();
        for _ in 0..4 {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
            idle.push(socket.connect(address).await.unwrap());
        }
        let client = TlsClient::pinned(PinnedRoot::new(ca.certificate().fingerprint(), Identity::Hub)).unwrap();
        client.connect(&address.to_string()).await.expect("room was made");
        // Long before a handshake's time is over, its connection is closed.
        let mut byte = [0];
        let closed = tokio::time::timeout(HANDSHAKE_TIME / 2, idle[0].read(&mut byte));
        assert!(matches!(closed.await.expect("in time"), Ok(0) | Err(_)), "the oldest made it");
        stop.cancel();
    }

    /// A ClientHello of TLS 1.2 (RFC 5246, 7.4.1.2), and of nothing newer.
    fn hello_of_tls_1_2() -> Vec<u8> {
        // ECDHE_ECDSA with AES_128_GCM_SHA256; P-256 and uncompressed points; ecdsa_secp256r1_sha256; h2.
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
        let extensions = [
            &[0, 10, 0, 4, 0, 2, 0, 23][..],
            &[0, 11, 0, 2, 1, 0],
            &[0, 13, 0, 4, 0, 2, 4, 3],
            &[0, 16, 0, 5, 0, 3, 2],
            b"h2",
        ]
        .concat();
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let handshake = [&[1, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat();
        [&[22, 3, 1][..], &(handshake.len() as u16).to_be_bytes(), &handshake].concat()
    }

    #[tokio::test]
    async fn nothing_older_than_tls_1_3_is_spoken() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

        use crate::ca::Ca;
        use crate::spiffe::{Identity, TrustDomain};
        let hour = Duration::from_secs(3_600);
        let ca = Ca::root(&TrustDomain::new("hanse.test").unwrap(), hour, SystemTime::now()).unwrap();
        let own = CredentialStore::new(ca.issue_credentials(&Identity::Hub, hour, SystemTime::now()).unwrap()).unwrap();
        let trust = Trust::new(ca.certificate(), |_| true).unwrap();
        let anonymous = ServerTls::anonymous(own.clone(), PresentedAuthority::fixed(ca.certificate())).unwrap();
        for tls in [anonymous, ServerTls::mutual(own, &trust).unwrap()] {
            let any = "127.0.0.1:0".parse().unwrap();
            let stop = CancellationToken::new();
            let listener = incoming(any, tls, IncomingLimits::default(), Connections::default(), stop.clone());
            let listener = listener.await.unwrap();
            let mut stream = TcpStream::connect(listener.address()).await.unwrap();
            stream.write_all(&hello_of_tls_1_2()).await.unwrap();
            let mut answer = [0; 7];
            let read = tokio::time::timeout(Duration::from_secs(20), stream.read_exact(&mut answer));
            read.await.expect("in time").unwrap();
            // An alert, which is fatal: protocol_version.
            assert_eq!((answer[0], &answer[5..]), (21, &[2, 70][..]));
            stop.cancel();
        }
    }

    #[tokio::test]
    async fn who_sends_a_first_message_has_spoken() {
        use tokio::io::AsyncWriteExt as _;

        use crate::ca::Ca;
        use crate::spiffe::{Identity, TrustDomain};
        let hour = Duration::from_secs(3_600);
        let ca = Ca::root(&TrustDomain::new("hanse.test").unwrap(), hour, SystemTime::now()).unwrap();
        let own = ca.issue_credentials(&Identity::Hub, hour, SystemTime::now()).unwrap();
        let tls = ServerTls::anonymous(CredentialStore::new(own).unwrap(), PresentedAuthority::fixed(ca.certificate()))
            .unwrap();
        let handshakes = Arc::new(Handshakes::new(1));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // What was said is refused, but it was said.
        for (said, has_spoken) in [(hello_of_tls_1_2(), true), (hello_of_tls_1_2()[..20].to_vec(), false)] {
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            client.write_all(&said).await.unwrap();
            client.shutdown().await.unwrap();
            let (stream, remote) = listener.accept().await.unwrap();
            let place = Handshakes::begin(&handshakes, remote.ip()).unwrap().place;
            assert!(shake_hands(stream, &tls, &place).await.is_err());
            assert_eq!(handshakes.open().list[&place.number].has_spoken, has_spoken);
        }
    }

    #[tokio::test]
    async fn who_is_revoked_during_the_handshake_is_turned_away_after_it() {
        use std::sync::atomic::{AtomicUsize, Ordering};

        use tokio_stream::StreamExt as _;

        use crate::ca::Ca;
        use crate::spiffe::{Identity, TrustDomain};
        use crate::tls::TlsClient;
        let hour = Duration::from_secs(3_600);
        let ca = Ca::root(&TrustDomain::new("hanse.test").unwrap(), hour, SystemTime::now()).unwrap();
        let issue = |identity: &Identity| ca.issue_credentials(identity, hour, SystemTime::now()).unwrap();
        let own = CredentialStore::new(issue(&Identity::Hub)).unwrap();
        let member = CredentialStore::new(issue(&Identity::cluster("a").unwrap())).unwrap();
        // The first is checked twice, with the revocation in between; the second is accepted.
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let trust = Trust::new(ca.certificate(), |_| true).unwrap();
        let trust = trust.with_revocation(move |_| count.fetch_add(1, Ordering::SeqCst) == 1);
        let (connections, stop) = (Connections::default(), CancellationToken::new());
        let tls = ServerTls::mutual(own, &trust).unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let mut listener =
            incoming(any, tls, IncomingLimits::default(), connections.clone(), stop.clone()).await.unwrap();
        let address = listener.address().to_string();
        let anybody = Trust::new(ca.certificate(), |_| true).unwrap();
        let client = TlsClient::mutual(member, &anybody).unwrap();
        // Its handshake is complete: it may learn of the end a moment later only.
        if let Ok(first) = client.connect(&address).await {
            tokio::time::timeout(Duration::from_secs(20), first.peer.closed.cancelled()).await.expect("it is closed");
        }
        let _second = client.connect(&address).await.unwrap();
        let entered = tokio::time::timeout(Duration::from_secs(20), listener.next()).await.expect("in time");
        assert!(entered.is_some_and(|it| it.is_ok()));
        assert_eq!((connections.len(), asked.load(Ordering::SeqCst)), (0, 4));
        stop.cancel();
    }

    #[tokio::test]
    async fn one_identity_takes_few_of_the_places() {
        use crate::ca::Ca;
        use crate::spiffe::{Identity, TrustDomain};
        use crate::tls::TlsClient;
        let hour = Duration::from_secs(3_600);
        let ca = Ca::root(&TrustDomain::new("hanse.test").unwrap(), hour, SystemTime::now()).unwrap();
        let issue = |identity: &Identity| ca.issue_credentials(identity, hour, SystemTime::now()).unwrap();
        let trust = Trust::new(ca.certificate(), |_| true).unwrap();
        let tls = ServerTls::mutual(CredentialStore::new(issue(&Identity::Hub)).unwrap(), &trust).unwrap();
        let limits = IncomingLimits { per_identity: Some(2), ..IncomingLimits::default() };
        let (connections, stop) = (Connections::default(), CancellationToken::new());
        let any = "127.0.0.1:0".parse().unwrap();
        let listener = incoming(any, tls, limits, connections.clone(), stop.clone()).await.unwrap();
        let address = listener.address().to_string();
        let serving = http2_server().add_routes(tonic::service::Routes::default());
        tokio::spawn(serving.serve_with_incoming_shutdown(listener, stop.clone().cancelled_owned()));
        let [a, b] = ["a", "b"].map(|name| {
            let own = CredentialStore::new(issue(&Identity::cluster(name).unwrap())).unwrap();
            TlsClient::mutual(own, &trust).unwrap()
        });
        let until = async |wanted: usize| {
            let count = async {
                while connections.len() != wanted {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), count).await.expect("in time");
        };
        let _first = a.connect(&address).await.unwrap();
        let _second = a.connect(&address).await.unwrap();
        until(2).await;
        // Its handshake is complete: it may learn of the end a moment later only.
        if let Ok(third) = a.connect(&address).await {
            tokio::time::timeout(Duration::from_secs(20), third.peer.closed.cancelled()).await.expect("it is closed");
        }
        let _other = b.connect(&address).await.unwrap();
        until(3).await;
        stop.cancel();
    }

    /// Clients know the newest by its hash.
    #[tokio::test]
    async fn the_authority_is_presented_as_it_is_now() {
        use std::sync::Mutex;

        use crate::ca::Ca;
        use crate::spiffe::{Identity, TrustDomain};
        use crate::tls::{PinnedRoot, TlsClient};
        let hour = Duration::from_secs(3_600);
        let [former, newest] =
            [1, 2].map(|_| Ca::root(&TrustDomain::new("hanse.test").unwrap(), hour, SystemTime::now()).unwrap());
        let issue = |ca: &Ca| ca.issue_credentials(&Identity::Hub, hour, SystemTime::now()).unwrap();
        let own = CredentialStore::new(issue(&former)).unwrap();
        let now = Arc::new(Mutex::new(former.certificate().der.clone()));
        let asked = Arc::clone(&now);
        let tls = ServerTls::anonymous(own.clone(), PresentedAuthority::new(move || asked.lock().unwrap().clone()));
        let stop = CancellationToken::new();
        let any = "127.0.0.1:0".parse().unwrap();
        let listener = incoming(any, tls.unwrap(), IncomingLimits::default(), Connections::default(), stop.clone());
        let listener = listener.await.unwrap();
        let address = listener.address().to_string();
        let serving = http2_server().add_routes(tonic::service::Routes::default());
        tokio::spawn(serving.serve_with_incoming_shutdown(listener, stop.clone().cancelled_owned()));
        let client =
            |ca: &Ca| TlsClient::pinned(PinnedRoot::new(ca.certificate().fingerprint(), Identity::Hub)).unwrap();
        client(&former).connect(&address).await.expect("its hash is known");
        assert!(client(&newest).connect(&address).await.is_err());
        own.replace(issue(&newest)).unwrap();
        *now.lock().unwrap() = newest.certificate().der.clone();
        client(&newest).connect(&address).await.expect("its hash is known");
        stop.cancel();
    }

    #[tokio::test]
    async fn a_connection_without_a_certificate_is_short_and_one_of_few() {
        use crate::ca::Ca;
        use crate::spiffe::{Identity, TrustDomain};
        use crate::tls::{PinnedRoot, TlsClient};
        let hour = Duration::from_secs(3_600);
        let ca = Ca::root(&TrustDomain::new("hanse.test").unwrap(), hour, SystemTime::now()).unwrap();
        let own = ca.issue_credentials(&Identity::Hub, hour, SystemTime::now()).unwrap();
        let tls = ServerTls::anonymous(CredentialStore::new(own).unwrap(), PresentedAuthority::fixed(ca.certificate()))
            .unwrap();
        let limits = IncomingLimits {
            per_address: Some(2),
            lifetime: Some(Duration::from_secs(3)),
            ..IncomingLimits::default()
        };
        let (connections, stop) = (Connections::default(), CancellationToken::new());
        let any = "127.0.0.1:0".parse().unwrap();
        let listener = incoming(any, tls, limits, connections.clone(), stop.clone()).await.unwrap();
        let address = listener.address().to_string();
        let routes = tonic::service::Routes::default();
        let serving = http2_server().add_routes(routes).serve_with_incoming_shutdown(listener, stop.cancelled_owned());
        tokio::spawn(serving);
        let client = TlsClient::pinned(PinnedRoot::new(ca.certificate().fingerprint(), Identity::Hub)).unwrap();
        let first = client.connect(&address).await.unwrap();
        let _second = client.connect(&address).await.unwrap();
        assert!(client.connect(&address).await.is_err(), "a third of the same address");
        assert_eq!(connections.len(), 2);
        // The client sees the end of the connection without an announcement.
        tokio::time::timeout(Duration::from_secs(20), first.peer.closed.cancelled()).await.expect("it ends");
        let again = async {
            while client.connect(&address).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), again).await.expect("there is room again");
    }

    /// Twelve addresses fill a listener, or what their network may have, and go on doing so.
    #[tokio::test]
    async fn newcomers_are_let_in_whoever_fills_the_listener() {
        let limits = IncomingLimits { per_address: Some(4), ..IncomingLimits::default() };
        newcomers_are_let_in(IncomingLimits { connections: 36, ..limits }).await;
        newcomers_are_let_in(IncomingLimits { per_network: Some(36), ..limits }).await;
    }

    async fn newcomers_are_let_in(limits: IncomingLimits) {
        use tokio::net::TcpSocket;

        use crate::ca::Ca;
        use crate::spiffe::{Identity, TrustDomain};
        use crate::tls::{PinnedRoot, TlsClient};
        let hour = Duration::from_secs(3_600);
        let ca = Ca::root(&TrustDomain::new("hanse.test").unwrap(), hour, SystemTime::now()).unwrap();
        let own = ca.issue_credentials(&Identity::Hub, hour, SystemTime::now()).unwrap();
        let tls = ServerTls::anonymous(CredentialStore::new(own).unwrap(), PresentedAuthority::fixed(ca.certificate()))
            .unwrap();
        let (connections, stop) = (Connections::default(), CancellationToken::new());
        let any = "127.0.0.1:0".parse().unwrap();
        let listener = incoming(any, tls, limits, connections.clone(), stop.clone()).await.unwrap();
        let address = listener.address();
        let serving = http2_server().add_routes(tonic::service::Routes::default());
        tokio::spawn(serving.serve_with_incoming_shutdown(listener, stop.clone().cancelled_owned()));
        let client = TlsClient::pinned(PinnedRoot::new(ca.certificate().fingerprint(), Identity::Hub)).unwrap();
        let open = async |last: u8| {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(SocketAddr::from(([127, 0, 0, last], 0))).unwrap();
            client.shake_hands(socket.connect(address).await?).await
        };
        let mut idle = Vec::new();
        for last in (2..14).cycle().take(12 * 3) {
            idle.push(open(last).await.unwrap());
        }
        let full = async {
            while connections.len() < 36 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), full).await.expect("it is full");
        // The newcomer comes at once, and so does the next.
        let _newcomer = client.connect(&address.to_string()).await.expect("room was made");
        let _second = client.connect(&address.to_string()).await.expect("room was made");
        // The client knows of its connection a moment before the listener counts it.
        let counted = async {
            while connections.from("127.0.0.1".parse().unwrap()).0 != 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), counted).await.expect("both stay");
        assert!(connections.len() <= 36, "{}", connections.len());
        stop.cancel();
    }

    /// Frames of RFC 9113, 4.1, over TLS: PING (6.7) and SETTINGS (6.5) want answers, which the peer does not read.
    #[tokio::test]
    async fn a_peer_that_floods_and_reads_nothing_is_cut_off() {
        use tokio::io::AsyncWriteExt as _;
        use tokio::net::TcpSocket;

        use crate::ca::Ca;
        use crate::spiffe::{Identity, TrustDomain};
        use crate::tls::TlsClient;
        let hour = Duration::from_secs(3_600);
        let ca = Ca::root(&TrustDomain::new("hanse.test").unwrap(), hour, SystemTime::now()).unwrap();
        let issue = |identity: &Identity| ca.issue_credentials(identity, hour, SystemTime::now()).unwrap();
        let trust = Trust::new(ca.certificate(), |_| true).unwrap();
        let tls = ServerTls::mutual(CredentialStore::new(issue(&Identity::Hub)).unwrap(), &trust).unwrap();
        let limits = IncomingLimits { stalls_after: Duration::from_millis(300), ..IncomingLimits::default() };
        let (connections, stop) = (Connections::default(), CancellationToken::new());
        let any = "127.0.0.1:0".parse().unwrap();
        let listener = incoming(any, tls, limits, connections.clone(), stop.clone()).await.unwrap();
        let address = listener.address();
        let serving = http2_server().add_routes(tonic::service::Routes::default());
        tokio::spawn(serving.serve_with_incoming_shutdown(listener, stop.clone().cancelled_owned()));
        let member = CredentialStore::new(issue(&Identity::cluster("a").unwrap())).unwrap();
        let client = TlsClient::mutual(member, &trust).unwrap();
        // One that reads, and has nothing to say, stays.
        let quiet = client.connect(&address.to_string()).await.unwrap();
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4_096).unwrap();
        let mut hostile = client.shake_hands(socket.connect(address).await.unwrap()).await.unwrap();
        let frame = |kind: u8, payload: &[u8]| {
            let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
            [&length[1..], &[kind, 0, 0, 0, 0, 0], payload].concat()
        };
        let (settings, ping) = (frame(4, &[]), frame(6, b"12345678"));
        hostile.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        hostile.write_all(&settings).await.unwrap();
        let flood = [settings, ping].concat().repeat(100);
        let mut sent = 0_usize;
        let flooding = async {
            while hostile.write_all(&flood).await.is_ok() && hostile.flush().await.is_ok() {
                sent += flood.len();
            }
        };
        // Long before keep-alive would have it, and in spite of it.
        let cut = tokio::time::timeout(Duration::from_secs(18), flooding).await;
        assert!(cut.is_ok(), "it is still open after {sent} bytes");
        let gone = async {
            while connections.len() > 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), gone).await.expect("its place is free");
        assert!(!quiet.peer.closed.is_cancelled() && connections.len() == 1);
        stop.cancel();
    }
}
