//! An open connection: who is at the other end, and when it must end.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;
use tonic::{Request, Status};

use super::server::host_of;
use crate::identity::Identity;
use crate::keys::Certificate;

/// The other end of a connection. Every request of a server built on [`super::incoming`] carries it as an extension.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its certificate; absent only on a listener that asks for none.
    pub certificate: Option<Arc<Certificate>>,
    pub address: SocketAddr,
    /// The negotiated key exchange, for example `X25519MLKEM768`.
    pub key_exchange: &'static str,
    /// When the connection ends: the earlier of the two certificates' ends.
    pub ends_at: SystemTime,
    /// Cancelled when the connection has ended, or must.
    pub closed: CancellationToken,
}

impl Peer {
    /// The identity, where the listener asks for a certificate.
    pub fn identity(&self) -> Option<&Identity> {
        self.certificate.as_ref().map(|c| &c.identity)
    }
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
    open: Arc<Mutex<HashMap<u64, Peer>>>,
}

impl Connections {
    /// Ends, at once, each connection that `matches`. Returns how many.
    pub fn close_where(&self, matches: impl Fn(&Peer) -> bool) -> usize {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.values().filter(|peer| matches(peer)).map(|peer| peer.closed.cancel()).count()
    }

    /// The other ends of the open connections.
    pub fn peers(&self) -> Vec<Peer> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// How many are open.
    #[expect(clippy::len_without_is_empty, reason = "a count, not a collection")]
    pub fn len(&self) -> usize {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How many are open from the host of this address.
    pub(super) fn from(&self, address: IpAddr) -> usize {
        let host = host_of(address);
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.values().filter(|peer| host_of(peer.address.ip()) == host).count()
    }

    /// How many an identity has open.
    pub(super) fn of(&self, identity: &Identity) -> usize {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.values().filter(|peer| peer.identity() == Some(identity)).count()
    }

    fn register(&self, peer: &Peer) -> Registration {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(id, peer.clone());
        Registration { connections: self.clone(), id }
    }
}

#[derive(Debug)]
struct Registration {
    connections: Connections,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.connections.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// A TLS stream that ends at its certificates' end, or when it is told to.
pub struct BoundedStream<S> {
    stream: S,
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
    pub(super) fn new(stream: S, peer: Peer, connections: Option<&Connections>) -> Self {
        // Sleeping for more than a year at once gains nothing and may not be expressible.
        let left =
            peer.ends_at.duration_since(SystemTime::now()).unwrap_or_default().min(Duration::from_secs(366 * 86_400));
        let registration = connections.map(|c| c.register(&peer));
        Self {
            stream,
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
            Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the connection's certificate no longer holds"))
        } else {
            Ok(())
        }
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
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for BoundedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_ended(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_ended(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl Connected for BoundedStream<tokio_rustls::server::TlsStream<TcpStream>> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}
